//! The users of bindings: each workload that uses the cache through sidecars has one, which can do what its policies need. Pure.
//!
//! They change as clients' passwords do: what is new is added first, and what it replaces goes ten minutes after every server has proved
//! it. A policy that narrows its keys thus refuses nothing to sidecars that have not heard of it yet. Each binding has its own grace:
//! one whose policies change every minute keeps no other's earlier keys alive.
//!
//! What a user can do:
//! - Its keys, and channels of such names, are those that some rule covers, whatever the policies say of unmatched keys: elsewhere the
//!   server answers NOPERM. Globs say less than patterns: [`crate::policy::glob`] tells what they let through besides.
//! - Of Larder's own keys, the companions of those, the mark of WAIT, its lease and turn to sweep, and what it keeps of its reading of events.
//!   Its own snapshot, and how many sidecars it has, can only be read; to the stream of events, entries can be added besides, and the oldest
//!   dropped.
//! - All commands on keys but those that copy servers' innards (RESTORE, MIGRATE); none of administration. CONFIG GET is among these: it
//!   shows the password that servers log in with.
//! - The journals that its rules write behind to. A relay has a user of its own, which reaches its policy's journals, the stream of events where
//!   it reads what databases changed, and nothing else; of the keys that its rules write behind it may delete what is cached, and no more.
//! - EVAL and EVALSHA, which leases are made of. Within a script the user's own limits hold for each command, declared or not; a script
//!   may keep a server busy, as any slow command may. No functions: all workloads would share them.
//! - The names of other keys can be seen (SCAN, which the sweep needs; RANDOMKEY), not their values.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use serde::{Deserialize, Serialize};

use super::{DISCOVERY_RULES, GRACE, UserRules, lines};
use crate::policy::binding::BindingName;
use crate::policy::digest::sha256;
use crate::policy::events::{self, STREAM, feed_claim_key, feed_state_key};

/// The most that all users of bindings may take of the Secret of users, in bytes: an object holds a megabyte.
const MAX_BYTES: usize = 800 * 1024;
/// The most bindings of a CacheCluster: agents take a thousand users.
const MAX_BINDINGS: usize = 900;
/// The most that a user may still do besides what it is to. The next change waits until these are gone.
const MAX_EARLIER: usize = 8;
/// The most passwords of a grant besides its own, of which one is on its way and others may have been lost there.
const MAX_ALSO: usize = 3;

/// Commands on keys, connections, channels and transactions, and scripts; nothing that is an administrator's, or concerns all keys.
/// By categories, so that each engine and version knows all the words. Functions count as writes.
const COMMANDS: &str = "-@all +@read +@write +@connection +@pubsub +@transaction +eval +eval_ro +evalsha +evalsha_ro +script|exists \
                        +script|load +cluster -@admin -@dangerous -function +info +role +sort +sort_ro +time";
/// What `allow.flush` adds.
const FLUSH: &str = "+flushall +flushdb";
/// What `allow.keys` adds.
const LIST: &str = "+keys";
/// Keys that sidecars of all bindings share: whose turn it is to sweep, and the marks of WAIT.
const SHARED_KEYS: &str = "%W~larder:sweeps %W~larder:w:{???}";
/// What a relay does: `docs/relay.md` has the same, and a test holds relays to that. Servers are vouched for, so it asks nobody's configuration.
const OF_A_RELAY: &str = "%W~larder:w:{???} -@all +@read +@write +@connection +@transaction -@admin -@dangerous +eval +time +wait +role \
                          +info +cluster|info +cluster|slots +cluster|shards +cluster|nodes";

/// How the user of a binding is to log in, and what it can do. `Debug` does not show the hash.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Grant {
    /// The SHA-256 of its password, in hexadecimal.
    hash: String,
    /// Those of others that work as well, the newest first: they are on their way to its sidecars.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    also: Vec<String>,
    /// Globs of its keys.
    keys: BTreeSet<String>,
    /// FLUSHALL and FLUSHDB.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    flush: bool,
    /// KEYS.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    list: bool,
    /// The names of its journals.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    journals: BTreeSet<String>,
    /// Whether it is a relay's, which does nothing but drain them, and read feeds.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    drains: bool,
    /// The slots by which databases' changes are read: by it, where it is a relay's; else it may ask how that is.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    feeds: BTreeSet<String>,
}

impl fmt::Debug for Grant {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { hash: _, also: _, keys, flush, list, journals, drains, feeds } = self;
        let mut shown = f.debug_struct("Grant");
        shown.field("keys", keys).field("flush", flush).field("list", list);
        shown.field("journals", journals).field("drains", drains).field("feeds", feeds).finish_non_exhaustive()
    }
}

impl Grant {
    /// With this password, the keys of these globs; `flush` and `list` for commands that touch or name every key.
    pub fn new(password: &str, keys: BTreeSet<String>, flush: bool, list: bool) -> Self {
        let (hash, journals, feeds) = (sha256(password.as_bytes()), BTreeSet::new(), BTreeSet::new());
        Self { hash, also: Vec::new(), keys, flush, list, journals, drains: false, feeds }
    }

    /// A relay's, with this password and these journals.
    pub fn of_relay(password: &str, journals: BTreeSet<String>) -> Self {
        Self { drains: true, ..Self::new(password, BTreeSet::new(), false, false).with_journals(journals) }
    }

    /// The same with these globs of keys and no others. A relay's may be deleted, and nothing else.
    #[must_use]
    pub fn with_keys(self, keys: BTreeSet<String>) -> Self {
        Self { keys, ..self }
    }

    /// The same of a relay that reads feeds by these slots, whose names are plain, or of a workload whose rules follow them.
    #[must_use]
    pub fn with_feeds(self, feeds: BTreeSet<String>) -> Self {
        Self { feeds, ..self }
    }

    /// The same with these journals and no others, by their names.
    #[must_use]
    pub fn with_journals(self, journals: BTreeSet<String>) -> Self {
        Self { journals, ..self }
    }

    /// The names of its journals.
    pub fn journals(&self) -> &BTreeSet<String> {
        &self.journals
    }

    /// The same with another's passwords.
    #[must_use]
    pub fn with_password_of(self, other: &Self) -> Self {
        Self { hash: other.hash.clone(), also: other.also.clone(), ..self }
    }

    /// The same with this password besides.
    #[must_use]
    pub fn and(mut self, password: &str) -> Self {
        let hash = sha256(password.as_bytes());
        if !self.hashes().any(|known| *known == hash) {
            self.also.insert(0, hash);
            self.also.truncate(MAX_ALSO);
        }
        self
    }

    fn hashes(&self) -> impl Iterator<Item = &String> {
        [&self.hash].into_iter().chain(&self.also)
    }
}

/// The user of one binding.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct BindingUser {
    /// What it is to be.
    current: Grant,
    /// What it still is besides, the latest first.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    earlier: Vec<Grant>,
    /// The generation that made it so.
    since: u64,
    /// When every server had proved that, in seconds since 1970. Only kept while there is something to drop.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) proved_at: Option<u64>,
}

/// All of a CacheCluster, by the names of their bindings.
pub(super) type BindingUsers = BTreeMap<String, BindingUser>;

/// The moment at which something is decided.
#[derive(Clone, Copy)]
pub(super) struct At {
    /// What a change is numbered with.
    pub generation: u64,
    /// The newest generation that every server has proved.
    pub proved: Option<u64>,
    /// Seconds since 1970.
    pub now: u64,
}

impl BindingUser {
    fn new(wanted: &Grant, at: At) -> Self {
        Self { current: wanted.clone(), earlier: Vec::new(), since: at.generation, proved_at: None }
    }

    fn next(&self, wanted: &Grant, at: At) -> Self {
        if self.current == *wanted || self.earlier.len() >= MAX_EARLIER {
            return self.aged(at);
        }
        let mut earlier = self.earlier.clone();
        earlier.insert(0, self.current.clone());
        earlier.retain(|grant| grant != wanted);
        Self { current: wanted.clone(), earlier, since: at.generation, proved_at: None }
    }

    fn aged(&self, At { generation, proved, now }: At) -> Self {
        let mut next = self.clone();
        if self.earlier.is_empty() {
            return next;
        }
        match self.proved_at {
            None if proved.is_some_and(|proved| proved >= self.since) => next.proved_at = Some(now),
            Some(since) if now.saturating_sub(since) >= GRACE.as_secs() => {
                (next.earlier, next.since, next.proved_at) = (Vec::new(), generation, None);
            }
            _ => {}
        }
        next
    }

    /// Whether every server has proved what it is to be.
    fn is_proved(&self, proved: Option<u64>) -> bool {
        self.proved_at.is_some() || proved.is_some_and(|proved| proved >= self.since)
    }

    fn grants(&self) -> impl Iterator<Item = &Grant> {
        [&self.current].into_iter().chain(&self.earlier)
    }

    /// The journals that it reaches now, also for the sake of what it was.
    fn journals(&self) -> BTreeSet<&String> {
        self.grants().flat_map(|grant| &grant.journals).collect()
    }

    fn with_hashes(&self, name: &BindingName, rules: impl IntoIterator<Item = String>) -> UserRules {
        let hashes: BTreeSet<String> = self.grants().flat_map(Grant::hashes).map(|hash| format!("#{hash}")).collect();
        UserRules { name: name.user(), rules: ["on".to_owned()].into_iter().chain(hashes).chain(rules).collect() }
    }

    /// On servers.
    fn on_servers(&self, name: &BindingName) -> UserRules {
        let globs: BTreeSet<&String> = self.grants().flat_map(|grant| &grant.keys).collect();
        let mut rules = vec!["resetchannels".to_owned()];
        rules.extend(self.journals().iter().map(|name| format!("~larder:j:{{???}}{name}/*")));
        let feeds: BTreeSet<&String> = self.grants().flat_map(|grant| &grant.feeds).collect();
        if self.current.drains {
            let kept = feeds.iter().flat_map(|slot| [feed_claim_key(slot), feed_state_key(slot)]);
            // The stream lies in one script with them.
            let stream = (!feeds.is_empty()).then(|| STREAM.to_owned());
            rules.extend(stream.into_iter().chain(kept).map(|key| format!("~{key}")));
            rules.extend(OF_A_RELAY.split_ascii_whitespace().map(str::to_owned));
            rules.extend(deletion_of(&globs));
            return self.with_hashes(name, rules);
        }
        for glob in &globs {
            rules.extend([format!("~{glob}"), format!("~larder:[ilnsv]:{{???}}{glob}")]);
            rules.extend([format!("&{glob}"), format!("&larder:l:{{???}}{glob}")]);
        }
        let snapshot = name.snapshot_key();
        rules.extend([format!("%R~{snapshot}"), format!("%R~{}", name.fleet_key()), format!("%W~{}", name.sweep_key())]);
        rules.extend([format!("&{snapshot}"), format!("&{}", name.heartbeat_channel())]);
        // The stream is everybody's: it is read, and written to by nothing but what adds entries or trims it.
        rules.extend([events::turn_key(Some(name)), events::state_key(Some(name))].map(|key| format!("~{key}")));
        rules.extend(feeds.iter().map(|slot| format!("%R~{}", feed_state_key(slot))));
        rules.extend([format!("%R~{STREAM}"), format!("(%W~{STREAM}"), "+xadd".to_owned(), "+xtrim)".to_owned()]);
        let flush = self.grants().any(|grant| grant.flush).then_some(FLUSH);
        let list = self.grants().any(|grant| grant.list).then_some(LIST);
        let words = [Some(SHARED_KEYS), Some(COMMANDS), flush, list].into_iter().flatten();
        rules.extend(words.flat_map(str::split_ascii_whitespace).map(str::to_owned));
        self.with_hashes(name, rules)
    }

    /// On sentinels, which know no keys.
    fn on_sentinels(&self, name: &BindingName) -> UserRules {
        self.with_hashes(name, DISCOVERY_RULES.split_ascii_whitespace().map(str::to_owned))
    }

    /// How many bytes it takes of the Secret: one line for servers, one for sentinels, and what is remembered.
    fn weight(&self, name: &BindingName) -> usize {
        let state = serde_json::to_string(self).unwrap_or_default().len() + name.as_str().len() + 4;
        lines(&[self.on_servers(name)]).len() + lines(&[self.on_sentinels(name)]).len() + state
    }
}

/// The right to delete keys of these globs, with what stands beside them as long as they are cached: the lease, the stale copy, and the mark that
/// there is none.
fn deletion_of(globs: &BTreeSet<&String>) -> Vec<String> {
    let keys = globs.iter().flat_map(|glob| [format!("%W~{glob}"), format!("%W~larder:[lns]:{{???}}{glob}")]);
    let mut rules: Vec<String> = keys.collect();
    if let Some(first) = rules.first_mut() {
        first.insert(0, '(');
        rules.push("+del)".to_owned());
    }
    rules
}

/// The users that are to be in force now, and whether servers have to be told. What has no room is left as it is, or out.
pub(super) fn next(before: &BindingUsers, wanted: &BTreeMap<BindingName, Grant>, at: At) -> (BindingUsers, bool) {
    let of = |name: &BindingName| before.get(name.as_str());
    let taken: usize = wanted.keys().filter_map(|name| Some(of(name)?.weight(name))).sum();
    let mut room = MAX_BYTES.saturating_sub(taken);
    let mut users = BindingUsers::new();
    let mut changed = before.keys().any(|name| !wanted.keys().any(|wanted| wanted.as_str() == name));
    let (known, new): (Vec<_>, Vec<_>) = wanted.iter().partition(|(name, _)| of(name).is_some());
    for (name, grant) in known.into_iter().chain(new) {
        let old = of(name);
        let user = old.map_or_else(|| BindingUser::new(grant, at), |old| old.next(grant, at));
        let more = user.weight(name).saturating_sub(old.map_or(0, |old| old.weight(name)));
        let fits = more <= room && (old.is_some() || users.len() < MAX_BINDINGS);
        if fits {
            room -= more;
            changed |= old.is_none_or(|old| old.since != user.since);
            users.insert(name.as_str().to_owned(), user);
        } else if let Some(old) = old {
            users.insert(name.as_str().to_owned(), old.aged(at));
        }
    }
    (users, changed)
}

/// Whether a binding's user is as it is to be, and every server has proved it.
pub(super) fn is_in_force(users: &BindingUsers, name: &BindingName, wanted: &Grant, proved: Option<u64>) -> bool {
    let user = users.get(name.as_str()).filter(|user| user.current == *wanted);
    user.is_some_and(|user| user.is_proved(proved))
}

/// Whether every server has proved that a password opens a binding's user.
pub(super) fn takes(users: &BindingUsers, name: &BindingName, password: &str, proved: Option<u64>) -> bool {
    let hash = sha256(password.as_bytes());
    users.get(name.as_str()).is_some_and(|user| user.is_proved(proved) && user.current.hashes().any(|known| *known == hash))
}

/// What a binding's user is to be.
pub(super) fn grant_of(users: &BindingUsers, name: &BindingName) -> Option<Grant> {
    users.get(name.as_str()).map(|user| user.current.clone())
}

/// Whether a binding's user may still write to a journal, as one that sidecars have or had until a while ago.
pub(super) fn reaches_journal(users: &BindingUsers, name: &BindingName, journal: &str) -> bool {
    users.get(name.as_str()).is_some_and(|user| user.journals().iter().any(|known| *known == journal))
}

fn each(users: &BindingUsers, rules: fn(&BindingUser, &BindingName) -> UserRules) -> Vec<UserRules> {
    users.iter().filter_map(|(name, user)| Some(rules(user, &BindingName::parse(name).ok()?))).collect()
}

/// The names of the users that changed after a generation.
pub(super) fn changed_since(users: &BindingUsers, generation: u64) -> BTreeSet<String> {
    let changed = users.iter().filter(|(_, user)| user.since > generation);
    changed.filter_map(|(name, _)| Some(BindingName::parse(name).ok()?.user())).collect()
}

/// The users on servers. While any of them reaches a journal none may drop all keys, which would drop that as well, whatever its policies allow.
pub(super) fn on_servers(users: &BindingUsers) -> Vec<UserRules> {
    let mut all = each(users, BindingUser::on_servers);
    if users.values().any(|user| !user.journals().is_empty()) {
        let is_flush = |rule: &String| FLUSH.split_ascii_whitespace().any(|word| word == rule);
        all.iter_mut().for_each(|user| user.rules.retain(|rule| !is_flush(rule)));
    }
    all
}

/// The users on sentinels.
pub(super) fn on_sentinels(users: &BindingUsers) -> Vec<UserRules> {
    each(users, BindingUser::on_sentinels)
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, SystemTime, UNIX_EPOCH};

    use proptest::prelude::*;

    use super::super::{Access, Phase, Users};
    use super::*;

    fn time(secs: u64) -> SystemTime {
        UNIX_EPOCH + Duration::from_secs(secs)
    }

    fn binding(workload: &str) -> BindingName {
        BindingName::of("Deployment", workload, "main")
    }

    fn grant(password: &str, keys: &[&str]) -> Grant {
        Grant::new(password, keys.iter().map(|glob| (*glob).to_owned()).collect(), false, false)
    }

    fn wanted(grants: &[(&str, &Grant)]) -> BTreeMap<BindingName, Grant> {
        grants.iter().map(|(workload, grant)| (binding(workload), (*grant).clone())).collect()
    }

    /// As the operator asks at each look: clients first, then bindings.
    fn look(before: Option<&Users>, wanted: &BTreeMap<BindingName, Grant>, proved: Option<u64>, now: u64) -> Users {
        let users = Users::next(before, &Access::Open, "system", proved, time(now));
        users.bind(before, wanted, proved, time(now))
    }

    fn of<'a>(users: &'a [UserRules], workload: &str) -> Option<&'a UserRules> {
        users.iter().find(|user| user.name == binding(workload).user())
    }

    /// Whether a password and the keys of a grant work by these lines.
    fn allows(users: &[UserRules], workload: &str, grant: &Grant) -> bool {
        of(users, workload).is_some_and(|user| {
            let has = |rule: String| user.rules.contains(&rule);
            has(format!("#{}", grant.hash)) && grant.keys.iter().all(|glob| has(format!("~{glob}")))
        })
    }

    #[test]
    fn a_binding_has_its_keys_and_larders_own_for_them() {
        let name = binding("shop");
        let users = look(None, &wanted(&[("shop", &grant("one", &["user:[^:]*"]))]), None, 0);
        let rules = of(&users.on_servers(), "shop").unwrap().rules.join(" ");
        let expected = format!(
            "on #{} resetchannels ~user:[^:]* ~larder:[ilnsv]:{{???}}user:[^:]* &user:[^:]* &larder:l:{{???}}user:[^:]* \
             %R~larder:p:{name} %R~larder:fleet:{{larder:p:{name}}} %W~larder:sweep:{name} &larder:p:{name} &larder:hb:{name} \
             ~larder:er:{{larder:events}}{name} ~larder:es:{{larder:events}}{name} %R~larder:events (%W~larder:events +xadd +xtrim) \
             %W~larder:sweeps %W~larder:w:{{???}} \
             -@all +@read +@write +@connection +@pubsub +@transaction +eval +eval_ro +evalsha +evalsha_ro +script|exists +script|load \
             +cluster -@admin -@dangerous -function +info +role +sort +sort_ro +time",
            sha256(b"one")
        );
        assert_eq!(rules, expected);
        let on_sentinels = of(&users.on_sentinels(), "shop").unwrap().rules.join(" ");
        assert!(on_sentinels.starts_with("on #") && !on_sentinels.contains("user:"), "{on_sentinels}");
        let following = grant("one", &["user:?*"]).with_feeds(BTreeSet::from(["larder_main_db".to_owned()]));
        let rules = of(&look(None, &wanted(&[("shop", &following)]), None, 0).on_servers(), "shop").unwrap().rules.join(" ");
        assert!(rules.contains(" %R~larder:cs:{larder:events}larder_main_db %R~larder:events "), "{rules}");
        let flushing = Grant::new("one", BTreeSet::new(), true, true);
        let users = look(Some(&users), &wanted(&[("shop", &flushing)]), Some(1), 1);
        assert!(users.server_file().contains("+time +flushall +flushdb +keys\n"), "{}", users.server_file());
        assert!(!format!("{users:?}").contains(&sha256(b"one")));
    }

    #[test]
    fn journals_are_reached_by_those_that_write_to_them_and_by_their_relay_which_reaches_nothing_else() {
        let journals = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect::<BTreeSet<_>>();
        let writer = grant("one", &["user:?*"]).with_journals(journals(&["store.shop.db"]));
        let relay = Grant::of_relay("two", journals(&["store.shop.db", "store.shop.old"]));
        let all = wanted(&[("shop", &writer), ("relay", &relay)]);
        let users = look(None, &all, None, 0);
        let rules = of(&users.on_servers(), "shop").unwrap().rules.join(" ");
        assert!(rules.contains(" resetchannels ~larder:j:{???}store.shop.db/* ~user:?* "), "{rules}");
        let rules = of(&users.on_servers(), "relay").unwrap().rules.join(" ");
        let expected = format!(
            "on #{} resetchannels ~larder:j:{{???}}store.shop.db/* ~larder:j:{{???}}store.shop.old/* %W~larder:w:{{???}} -@all +@read +@write \
             +@connection +@transaction -@admin -@dangerous +eval +time +wait +role +info +cluster|info +cluster|slots +cluster|shards \
             +cluster|nodes",
            sha256(b"two")
        );
        assert_eq!(rules, expected);
        let reader = Grant::of_relay("two", BTreeSet::new()).with_feeds(BTreeSet::from(["larder_main_db".to_owned()]));
        let reading = look(None, &wanted(&[("relay", &reader)]), None, 0);
        assert_eq!(Users::parse(reading.to_json().as_bytes()), Some(reading.clone()));
        let rules = of(&reading.on_servers(), "relay").unwrap().rules.join(" ");
        let feed = "~larder:events ~larder:cr:{larder:events}larder_main_db ~larder:cs:{larder:events}larder_main_db";
        assert!(rules.contains(&format!(" resetchannels {feed} %W~larder:w:{{???}} ")), "{rules}");
        assert_eq!(Users::parse(users.to_json().as_bytes()), Some(users.clone()));
        // What it no longer writes to is out of its reach ten minutes after all servers have heard of that.
        let reaches = |users: &Users| users.reaches_journal(&binding("shop"), "store.shop.db");
        let all = wanted(&[("shop", &writer.clone().with_journals(BTreeSet::new())), ("relay", &relay)]);
        let without = look(Some(&users), &all, Some(1), 10);
        assert!(reaches(&users) && reaches(&without) && !without.reaches_journal(&binding("other"), "store.shop.db"));
        let proved = look(Some(&without), &all, Some(2), 20);
        assert!(reaches(&proved) && !reaches(&look(Some(&proved), &all, Some(2), 620)));
    }

    #[test]
    fn nobody_drops_all_keys_while_there_is_a_journal() {
        let flushing = Grant::new("one", BTreeSet::from(["a:?*".to_owned()]), true, false);
        let relay = Grant::of_relay("two", BTreeSet::from(["store.shop.db".to_owned()]));
        let flushes =
            |users: &Users| of(&users.on_servers(), "shop").unwrap().rules.iter().any(|rule| rule.starts_with("+flush"));
        let first = look(None, &wanted(&[("shop", &flushing)]), None, 0);
        let both = look(Some(&first), &wanted(&[("shop", &flushing), ("relay", &relay)]), Some(1), 10);
        assert!(flushes(&first) && !flushes(&both) && both.generation > first.generation);
        let alone = look(Some(&both), &wanted(&[("shop", &flushing)]), Some(2), 20);
        assert!(flushes(&alone) && alone.generation > both.generation);
    }

    #[test]
    fn keys_that_policies_give_up_stay_until_sidecars_have_heard_of_it() {
        let (wide, narrow) = (grant("one", &["a:?*", "b:?*"]), grant("one", &["a:?*"]));
        let first = look(None, &wanted(&[("shop", &wide)]), None, 0);
        assert_eq!((first.generation, first.phase(Some(0)), first.phase(Some(1))), (1, Phase::Adding, Phase::Settled));
        let name = binding("shop");
        assert!(!first.is_in_force(&name, &wide, None) && first.is_in_force(&name, &wide, Some(1)));
        let both = look(Some(&first), &wanted(&[("shop", &narrow)]), Some(1), 100);
        assert_eq!((both.generation, both.phase(Some(1))), (2, Phase::Adding));
        assert!(!both.is_in_force(&name, &narrow, Some(1)), "servers do not know it yet");
        let proved = look(Some(&both), &wanted(&[("shop", &narrow)]), Some(2), 200);
        assert_eq!((proved.generation, proved.phase(Some(2))), (2, Phase::Both { until: time(800) }));
        assert!(proved.is_in_force(&name, &narrow, Some(2)) && allows(&proved.on_servers(), "shop", &wide));
        let since = |generation| proved.of_bindings_since(generation).iter().map(|user| user.name.clone()).collect::<Vec<_>>();
        assert_eq!((since(1), since(2)), (vec![name.user()], Vec::new()));
        assert!(proved.have_bindings_since(1) && !proved.have_bindings_since(2));
        let alone = look(Some(&proved), &wanted(&[("shop", &narrow)]), Some(2), 800);
        assert_eq!((alone.generation, alone.phase(Some(3))), (3, Phase::Settled));
        assert!(!allows(&alone.on_servers(), "shop", &wide) && allows(&alone.on_servers(), "shop", &narrow));
    }

    #[test]
    fn each_binding_has_its_own_grace_and_goes_with_its_workload() {
        let [a, b, c] = ["a:?*", "b:?*", "c:?*"].map(|keys| grant("one", &[keys]));
        let mut users = look(None, &wanted(&[("quiet", &a), ("busy", &a)]), None, 0);
        users = look(Some(&users), &wanted(&[("quiet", &b), ("busy", &b)]), Some(1), 10);
        users = look(Some(&users), &wanted(&[("quiet", &b), ("busy", &b)]), Some(2), 20);
        // The busy one changes again and again; the quiet one's earlier keys go all the same.
        for (now, busy) in [(300, &c), (610, &b), (620, &c)] {
            users = look(Some(&users), &wanted(&[("quiet", &b), ("busy", busy)]), Some(users.generation), now);
        }
        assert!(!allows(&users.on_servers(), "quiet", &a) && allows(&users.on_servers(), "busy", &a));
        let generation = users.generation;
        users = look(Some(&users), &wanted(&[("quiet", &b)]), Some(generation), 630);
        assert_eq!((users.generation, of(&users.on_servers(), "busy")), (generation + 1, None));
        assert!(of(&users.on_sentinels(), "busy").is_none() && of(&users.on_servers(), "quiet").is_some());
    }

    #[test]
    fn what_was_remembered_before_there_were_bindings_is_read() {
        let before = Users::next(None, &Access::Open, "system", None, time(0));
        assert!(!before.to_json().contains("bindings"));
        let users = look(Some(&before), &wanted(&[("shop", &grant("one", &["a"]))]), Some(1), 0);
        assert_eq!((users.generation, Users::parse(users.to_json().as_bytes())), (2, Some(users.clone())));
        // Clients change at the same time: one generation holds both.
        let client = Access::user("app", "p");
        let changed = Users::next(Some(&users), &client, "system", Some(2), time(1));
        let changed = changed.bind(Some(&users), &wanted(&[("shop", &grant("two", &["a"]))]), Some(2), time(1));
        assert_eq!(changed.generation, 3);
        assert_eq!(changed.on_servers().last().map(|user| user.name.as_str()), Some("larder-system"));
    }

    #[test]
    fn a_name_that_clients_chose_is_theirs() {
        let client = Access::user(binding("shop").user(), "client");
        let users = Users::next(None, &client, "system", None, time(0));
        let users = users.bind(None, &wanted(&[("shop", &grant("one", &["a"]))]), None, time(0));
        let named = users.on_servers().into_iter().filter(|user| user.name == binding("shop").user());
        let rules: Vec<Vec<String>> = named.map(|user| user.rules).collect();
        assert!(rules.len() == 1 && rules[0].contains(&"~*".to_owned()), "{rules:?}");
    }

    #[test]
    fn what_has_no_room_is_left_out_and_takes_nothing_from_others() {
        let long: Vec<String> = (0..80).map(|index| format!("{index}:{}", "k".repeat(200))).collect();
        let large = Grant::new("one", long.iter().cloned().collect(), false, false);
        let larger = Grant::new("one", long.iter().map(|glob| format!("{glob}{glob}{glob}{glob}")).collect(), false, false);
        let mut all = BTreeMap::new();
        let mut users = look(None, &all, None, 0);
        for index in 0..30 {
            all.insert(binding(&format!("shop-{index}")), large.clone());
            users = look(Some(&users), &all, Some(users.generation), index);
        }
        let held =
            |users: &Users, grant: &Grant| all.keys().filter(|name| users.is_in_force(name, grant, Some(u64::MAX))).count();
        let fit = held(&users, &large);
        assert!((5..30).contains(&fit), "{fit}");
        let total = users.server_file().len() + users.sentinel_file().len() + users.to_json().len();
        assert!((MAX_BYTES / 2..=MAX_BYTES + 4096).contains(&total), "{total}");
        let grown = all.keys().map(|name| (name.clone(), larger.clone())).collect();
        let grown = look(Some(&users), &grown, Some(users.generation), 100);
        assert_eq!(held(&grown, &large) + held(&grown, &larger), fit);
        let total = grown.server_file().len() + grown.sentinel_file().len() + grown.to_json().len();
        assert!(total <= MAX_BYTES + 4096, "{total}");
    }

    proptest! {
        /// However policies, passwords and servers change: what was in force works for the grace after it was replaced, and in the
        /// end only what is wanted works.
        #[test]
        fn no_sidecar_is_locked_out(steps in prop::collection::vec((0usize..4, 1u64..400, any::<bool>()), 1..60)) {
            let grants = [grant("p", &["a:?*"]), grant("p", &["b:?*"]), grant("q", &["a:?*", "b:?*"]), grant("q", &["a:?*"])];
            let name = binding("shop");
            let mut users = look(None, &wanted(&[("shop", &grants[0])]), None, 0);
            let (mut now, mut proved) = (0, 0);
            // What was in force, with the moment at which it was replaced.
            let mut told: Vec<(Grant, Option<u64>)> = Vec::new();
            for (choice, passing, catches_up) in steps {
                now += passing;
                if catches_up {
                    proved = users.generation;
                }
                let before = users.clone();
                users = look(Some(&before), &wanted(&[("shop", &grants[choice])]), Some(proved), now);
                prop_assert!(users.generation == before.generation || users.generation == before.generation + 1);
                prop_assert_eq!(users.generation == before.generation, users.server_file() == before.server_file());
                prop_assert_eq!(&look(Some(&users), &wanted(&[("shop", &grants[choice])]), None, now), &users);
                let current = grants.iter().find(|grant| users.is_in_force(&name, grant, Some(proved)));
                if let Some(current) = current
                    && told.last().is_none_or(|(last, _)| last != current)
                {
                    if let Some((_, until)) = told.last_mut() {
                        *until = Some(now);
                    }
                    told.push((current.clone(), None));
                }
                for (grant, since) in &told {
                    if since.is_none_or(|since| now < since + GRACE.as_secs()) {
                        prop_assert!(allows(&users.on_servers(), "shop", grant), "{:?} at {}: {:?}", grant, now, users);
                    }
                }
            }
            for _ in 0..6 {
                now += GRACE.as_secs();
                users = look(Some(&users), &wanted(&[("shop", &grants[3])]), Some(users.generation), now);
            }
            prop_assert_eq!(users.phase(Some(users.generation)), Phase::Settled);
            let rules = of(&users.on_servers(), "shop").unwrap().rules.clone();
            let gone = ["~b:?*".to_owned(), format!("#{}", grants[0].hash)];
            prop_assert!(gone.iter().all(|rule| !rules.contains(rule)), "{rules:?}");
        }
    }
}
