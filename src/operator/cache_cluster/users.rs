//! Who may log in at servers and sentinels, in numbered generations. Pure.
//!
//! A changed password is added first: one generation accepts both. When every server has proved it, clients may be told, and ten minutes
//! later the next generation drops the earlier password. So no client meets a server that does not know its password yet, and each
//! has time to take up the new one.

mod bindings;

use std::collections::BTreeMap;
use std::fmt;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

use self::bindings::{At, BindingUsers};
use crate::policy::binding::BindingName;
use crate::policy::digest::sha256;

pub use bindings::Grant;

/// Larder's own user: agents, the operator, replicas and sentinels log in as it.
pub const SYSTEM_USER: &str = "larder-system";
/// How long an earlier password works after every server has proved the newer one.
pub const GRACE: Duration = Duration::from_secs(600);
/// How many earlier logins are accepted at the same time; the oldest goes first.
const MAX_PREVIOUS: usize = 3;

/// What clients may do on servers: everything but what would take a server out of Larder's hands. CONFIG GET is among that: it shows the
/// password of [`SYSTEM_USER`], by which replicas log in.
const CLIENT_RULES: &str = "~* &* +@all -acl +acl|cat +acl|getuser +acl|help +acl|list +acl|log +acl|users +acl|whoami \
                            -cluster +cluster|countkeysinslot +cluster|getkeysinslot +cluster|info +cluster|keyslot +cluster|links +cluster|myid \
                            +cluster|nodes +cluster|replicas +cluster|shards +cluster|slaves +cluster|slots \
                            -config -debug -failover -module +module|list -replicaof -shutdown -slaveof";
/// What clients may do on sentinels: find the servers.
const DISCOVERY_RULES: &str = "resetchannels &* -@all +auth +hello +ping +client -client|kill -client|pause -client|unpause \
                               +subscribe +unsubscribe +psubscribe +punsubscribe +role +info +command +sentinel|myid \
                               +sentinel|get-master-addr-by-name +sentinel|master +sentinel|masters +sentinel|replicas +sentinel|slaves \
                               +sentinel|sentinels";
/// What Larder itself may do.
const SYSTEM_RULES: &str = "~* &* +@all";

/// How clients log in.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", rename_all_fields = "camelCase")]
pub enum Access {
    /// They do not.
    Open,
    /// As a user.
    User {
        /// Its name.
        name: String,
        /// The SHA-256 of its password, in hexadecimal.
        hash: String,
    },
}

impl fmt::Debug for Access {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Open => f.write_str("Open"),
            Self::User { name, .. } => f.debug_struct("User").field("name", name).finish_non_exhaustive(),
        }
    }
}

impl Access {
    /// As a user with this password.
    pub fn user(name: impl Into<String>, password: &str) -> Self {
        Self::User { name: name.into(), hash: sha256(password.as_bytes()) }
    }
}

/// Everybody who may log in. This is what the Secret of users remembers, without `Secret`'s own form: see [`Users::parse`].
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Users {
    /// Rises with each change.
    pub generation: u64,
    /// The SHA-256 of the password of [`SYSTEM_USER`], in hexadecimal.
    system: String,
    /// How clients are to log in.
    current: Access,
    /// How else they may, the latest first.
    previous: Vec<Access>,
    /// When every server had proved this generation, in seconds since 1970. Only kept while there is something to drop.
    proved_at: Option<u64>,
    /// The users of bindings, which have their own times.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    bindings: BindingUsers,
}

impl fmt::Debug for Users {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { generation, system: _, current, previous, proved_at, bindings } = self;
        let mut shown = f.debug_struct("Users");
        shown.field("generation", generation).field("current", current).field("previous", previous);
        shown.field("proved_at", proved_at).field("bindings", bindings).finish_non_exhaustive()
    }
}

/// How far a change of users has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// Nothing is under way.
    Settled,
    /// The new login is on its way to the servers.
    Adding,
    /// It works everywhere, and so do earlier ones.
    Both {
        /// When the earlier ones are dropped, at the earliest.
        until: SystemTime,
    },
}

impl Phase {
    /// The phase in one word, as the status has it.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Settled => "Settled",
            Self::Adding => "Adding",
            Self::Both { .. } => "Both",
        }
    }
}

/// One user, as `ACL SETUSER name rules…` makes it.
#[derive(Clone, PartialEq, Eq)]
pub struct UserRules {
    /// Its name.
    pub name: String,
    /// Its rules, which hold hashes of passwords.
    pub rules: Vec<String>,
}

impl fmt::Debug for UserRules {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("UserRules").field("name", &self.name).finish_non_exhaustive()
    }
}

impl Users {
    /// The users that are to be in force now. `previous`: those that were until now, if any. `proved`: the newest generation that every
    /// server has proved. Calling it again with its own result changes nothing. Users of bindings stay as they are: see [`Users::bind`].
    pub fn next(previous: Option<&Self>, wanted: &Access, system_password: &str, proved: Option<u64>, now: SystemTime) -> Self {
        let system = sha256(system_password.as_bytes());
        let Some(before) = previous else {
            let (current, previous, bindings) = (wanted.clone(), Vec::new(), BindingUsers::new());
            return Self { generation: 1, system, current, previous, proved_at: None, bindings };
        };
        if before.current != *wanted || before.system != system {
            return before.changed(wanted, system);
        }
        let mut next = before.clone();
        if before.previous.is_empty() {
            return next;
        }
        let now = secs(now);
        match before.proved_at {
            None if proved.is_some_and(|proved| proved >= before.generation) => next.proved_at = Some(now),
            Some(since) if now.saturating_sub(since) >= GRACE.as_secs() => {
                next.generation += 1;
                next.previous.clear();
                next.proved_at = None;
            }
            _ => {}
        }
        next
    }

    fn changed(&self, wanted: &Access, system: String) -> Self {
        let mut previous = self.previous.clone();
        previous.insert(0, self.current.clone());
        previous.retain(|access| access != wanted);
        previous.truncate(MAX_PREVIOUS);
        let bindings = self.bindings.clone();
        Self { generation: self.generation + 1, system, current: wanted.clone(), previous, proved_at: None, bindings }
    }

    /// The same with the users of these bindings, and of no others. `previous`: those that were until now, if any, as
    /// [`Users::next`] was given them. A binding that has no room is left out: see [`Users::is_in_force`].
    #[must_use]
    pub fn bind(
        mut self,
        previous: Option<&Self>,
        wanted: &BTreeMap<BindingName, Grant>,
        proved: Option<u64>,
        now: SystemTime,
    ) -> Self {
        let generation = previous.map_or(self.generation, |previous| previous.generation + 1);
        let (bindings, changed) = bindings::next(&self.bindings, wanted, At { generation, proved, now: secs(now) });
        self.bindings = bindings;
        if changed {
            self.generation = generation;
        }
        self
    }

    /// Whether the user of a binding may still write to a journal.
    pub fn reaches_journal(&self, binding: &BindingName, journal: &str) -> bool {
        bindings::reaches_journal(&self.bindings, binding, journal)
    }

    /// Whether every server lets the sidecars of a binding in and do what `wanted` says, so that they may be told. `in_force`: the newest
    /// generation that every server has by its file, or by having been told.
    pub fn is_in_force(&self, binding: &BindingName, wanted: &Grant, in_force: Option<u64>) -> bool {
        bindings::is_in_force(&self.bindings, binding, wanted, in_force)
    }

    /// Whether every server takes this password of a binding's user, as one that is to stay.
    pub fn takes(&self, binding: &BindingName, password: &str, proved: Option<u64>) -> bool {
        bindings::takes(&self.bindings, binding, password, proved)
    }

    /// What the user of a binding is to be able to do, where there is one.
    pub fn grant_of(&self, binding: &BindingName) -> Option<Grant> {
        bindings::grant_of(&self.bindings, binding)
    }

    /// How far a change has come. `proved`: the newest generation that every server has proved.
    pub fn phase(&self, proved: Option<u64>) -> Phase {
        let both = |since: u64| Phase::Both { until: UNIX_EPOCH + Duration::from_secs(since) + GRACE };
        if let Some(since) = self.proved_at {
            return both(since);
        }
        if proved.is_none_or(|proved| proved < self.generation) {
            return Phase::Adding;
        }
        self.bindings.values().filter_map(|user| user.proved_at).max().map_or(Phase::Settled, both)
    }

    /// The login that every server knows, for those who tell clients: the newest only once that is proved.
    pub fn published(&self) -> &Access {
        match self.previous.first() {
            Some(earlier) if self.proved_at.is_none() => earlier,
            _ => &self.current,
        }
    }

    /// Reads what [`Users::to_json`] wrote. An unreadable text is as good as none: the next generation must then be higher than `floor`.
    pub fn parse(json: &[u8]) -> Option<Self> {
        serde_json::from_slice(json).ok()
    }

    /// What is to be remembered until the next call.
    pub fn to_json(&self) -> String {
        serde_json::to_string(self).unwrap_or_default()
    }

    /// The users of servers.
    pub fn on_servers(&self) -> Vec<UserRules> {
        self.with_clients(CLIENT_RULES, bindings::on_servers(&self.bindings))
    }

    /// Whether the user of any binding changed after a generation.
    pub fn have_bindings_since(&self, generation: u64) -> bool {
        !bindings::changed_since(&self.bindings, generation).is_empty()
    }

    /// Of the users of servers those of bindings that changed after a generation.
    pub fn of_bindings_since(&self, generation: u64) -> Vec<UserRules> {
        let changed = bindings::changed_since(&self.bindings, generation);
        self.on_servers().into_iter().filter(|user| changed.contains(&user.name)).collect()
    }

    /// The users of sentinels.
    pub fn on_sentinels(&self) -> Vec<UserRules> {
        self.with_clients(DISCOVERY_RULES, bindings::on_sentinels(&self.bindings))
    }

    /// The file of the servers' users: a first line with the generation, then one user a line.
    pub fn server_file(&self) -> String {
        format!("# generation {}\n{}", self.generation, lines(&self.on_servers()))
    }

    /// The sentinels' users, one a line.
    pub fn sentinel_file(&self) -> String {
        lines(&self.on_sentinels())
    }

    fn with_clients(&self, client_rules: &str, bindings: Vec<UserRules>) -> Vec<UserRules> {
        let accesses = || [&self.current].into_iter().chain(&self.previous);
        let mut users = vec![("default".to_owned(), vec!["off".to_owned()])];
        if accesses().any(|access| *access == Access::Open) {
            users[0].1 = vec!["on".to_owned(), "nopass".to_owned()];
        }
        for access in accesses() {
            let Access::User { name, hash } = access else { continue };
            let hash = format!("#{hash}");
            match users.iter_mut().find(|(known, _)| known == name) {
                Some((_, rules)) if rules.iter().any(|rule| rule == "nopass") => {}
                Some((_, rules)) if rules[0] == "off" => *rules = vec!["on".to_owned(), hash],
                Some((_, rules)) => rules.push(hash),
                None => users.push((name.clone(), vec!["on".to_owned(), hash])),
            }
        }
        for (_, rules) in users.iter_mut().filter(|(_, rules)| rules[0] == "on") {
            rules.extend(client_rules.split_ascii_whitespace().map(str::to_owned));
        }
        let system = ["on".to_owned(), format!("#{}", self.system)].into_iter();
        let system = system.chain(SYSTEM_RULES.split_ascii_whitespace().map(str::to_owned));
        let system = UserRules { name: SYSTEM_USER.to_owned(), rules: system.collect() };
        let mut users: Vec<UserRules> = users.into_iter().map(|(name, rules)| UserRules { name, rules }).collect();
        // No file names a user twice: where clients chose a binding's name, it is theirs.
        let bindings = bindings.into_iter().filter(|user| users.iter().all(|known| known.name != user.name));
        let bindings: Vec<UserRules> = bindings.collect();
        users.extend(bindings);
        users.push(system);
        users
    }
}

/// Seconds since 1970.
fn secs(now: SystemTime) -> u64 {
    now.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}

fn lines(users: &[UserRules]) -> String {
    users.iter().map(|UserRules { name, rules }| format!("user {name} {}\n", rules.join(" "))).collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn at(secs: u64) -> SystemTime {
        UNIX_EPOCH + Duration::from_secs(secs)
    }

    fn first() -> Users {
        Users::next(None, &Access::user("shop", "one"), "system", None, at(0))
    }

    /// Whether a password opens a user by these lines.
    fn opens(users: &[UserRules], access: &Access) -> bool {
        let (name, hash) = match access {
            Access::Open => ("default", "nopass".to_owned()),
            Access::User { name, hash } => (name.as_str(), format!("#{hash}")),
        };
        let user = users.iter().find(|user| user.name == name);
        user.is_some_and(|user| user.rules[0] == "on" && user.rules.iter().any(|rule| *rule == hash || rule == "nopass"))
    }

    #[test]
    fn a_new_password_is_added_then_proved_then_alone() {
        let (one, two) = (Access::user("shop", "one"), Access::user("shop", "two"));
        let both = Users::next(Some(&first()), &two, "system", Some(1), at(10));
        assert_eq!((both.generation, both.published(), both.phase(Some(1))), (2, &one, Phase::Adding));
        assert!(opens(&both.on_servers(), &one) && opens(&both.on_servers(), &two));
        assert_eq!(Users::next(Some(&both), &two, "system", Some(1), at(9999)), both, "one server lags");
        let proved = Users::next(Some(&both), &two, "system", Some(2), at(1000));
        assert_eq!((proved.published(), proved.phase(Some(2))), (&two, Phase::Both { until: at(1600) }));
        assert_eq!(Users::next(Some(&proved), &two, "system", Some(2), at(1599)), proved);
        let alone = Users::next(Some(&proved), &two, "system", Some(2), at(1600));
        assert_eq!((alone.generation, alone.phase(Some(2)), alone.phase(Some(3))), (3, Phase::Adding, Phase::Settled));
        assert!(!opens(&alone.on_servers(), &one) && opens(&alone.on_servers(), &two));
    }

    #[test]
    fn files_have_the_forms_that_servers_and_agents_read() {
        let text = first().server_file();
        let hash = sha256(b"one");
        assert!(text.starts_with(&format!("# generation 1\nuser default off\nuser shop on #{hash} ~* &* +@all -acl ")), "{text}");
        assert!(text.ends_with(&format!("user larder-system on #{} ~* &* +@all\n", sha256(b"system"))), "{text}");
        let open = Users::next(None, &Access::Open, "system", None, at(0));
        assert!(open.server_file().contains("\nuser default on nopass ~* "));
        assert!(!open.sentinel_file().contains('#') || open.sentinel_file().matches('#').count() == 1);
        assert!(!format!("{:?} {:?}", first(), first().on_servers()).contains(&hash));
        assert_eq!(Users::parse(first().to_json().as_bytes()), Some(first()));
    }

    /// What everybody who may log in can do at sentinels, and thereby at the tier: a change of this is one of what clients are trusted with.
    #[test]
    fn at_sentinels_everybody_finds_the_servers_and_changes_nothing() {
        let rules = "resetchannels &* -@all +auth +hello +ping +client -client|kill -client|pause -client|unpause \
                     +subscribe +unsubscribe +psubscribe +punsubscribe +role +info +command \
                     +sentinel|myid +sentinel|get-master-addr-by-name +sentinel|master +sentinel|masters +sentinel|replicas \
                     +sentinel|slaves +sentinel|sentinels";
        let name = BindingName::of("Deployment", "web", "main");
        let grant = Grant::new("two", std::iter::once("*".to_owned()).collect(), true, true);
        let users = first().bind(None, &BTreeMap::from([(name.clone(), grant)]), None, at(0));
        let expected = [
            ("default".to_owned(), "off".to_owned()),
            ("shop".to_owned(), format!("on #{} {rules}", sha256(b"one"))),
            (name.user(), format!("on #{} {rules}", sha256(b"two"))),
            (SYSTEM_USER.to_owned(), format!("on #{} ~* &* +@all", sha256(b"system"))),
        ];
        let on_sentinels = users.on_sentinels().into_iter().map(|UserRules { name, rules }| (name, rules.join(" ")));
        assert_eq!(on_sentinels.collect::<Vec<_>>(), expected);
    }

    proptest! {
        /// Whatever is changed when, and however servers lag: what was published keeps working for the grace after it was replaced,
        /// what is published every server has proved, and in the end only what is wanted works.
        #[test]
        fn no_client_is_locked_out(steps in prop::collection::vec((0u8..4, 1u64..400, any::<bool>()), 1..40)) {
            let accesses = [
                Access::Open, Access::user("shop", "a"), Access::user("shop", "b"), Access::user("default", "c"),
            ];
            let mut users = Users::next(None, &accesses[0], "system", None, at(0));
            let (mut now, mut proved) = (0, 0);
            // Each published login with the moment at which it ceased to be the published one.
            let mut told: Vec<(Access, Option<u64>)> = vec![(users.published().clone(), None)];
            // Changes come rarely enough that no more are under way than are kept.
            let mut last_change = 0;
            for (choice, passing, catches_up) in steps {
                now += passing;
                if catches_up {
                    proved = users.generation;
                }
                let wanted = if now - last_change > 2 * GRACE.as_secs() || last_change == 0 {
                    last_change = now;
                    accesses[usize::from(choice)].clone()
                } else {
                    users.current.clone()
                };
                let before = users.clone();
                users = Users::next(Some(&before), &wanted, "system", Some(proved), at(now));
                prop_assert!(users.generation == before.generation || users.generation == before.generation + 1);
                prop_assert_eq!(&Users::next(Some(&users), &wanted, "system", None, at(now)), &users);
                if told.last().is_some_and(|(last, _)| last != users.published()) {
                    told.last_mut().unwrap().1 = Some(now);
                    told.push((users.published().clone(), None));
                }
                for (access, since) in &told {
                    if since.is_none_or(|since| now < since + GRACE.as_secs()) {
                        prop_assert!(opens(&users.on_servers(), access), "{:?} at {now}: {:?}", access, users);
                    }
                }
            }
            for _ in 0..4 {
                now += GRACE.as_secs();
                users = Users::next(Some(&users), &users.current.clone(), "system", Some(users.generation), at(now));
            }
            prop_assert_eq!(users.phase(Some(users.generation)), Phase::Settled);
            for access in accesses.iter().filter(|access| **access != users.current) {
                let shadowed = users.current == Access::Open && matches!(access, Access::User { name, .. } if name == "default");
                prop_assert!(shadowed || !opens(&users.on_servers(), access));
            }
        }
    }
}
