//! The databases whose changes a relay reads: what its snapshot says of them, what the cache tells, and when nothing is left of one. Pure.
//!
//! A slot that nobody reads keeps its database's log for ever. So a feed that is wanted no more stays in the relay's snapshot, followed by
//! nobody, until a relay has told the cache that slot and publication are taken away: whichever relay comes to it, and whatever died meanwhile.

use std::collections::BTreeMap;
use std::time::Duration;

use tokio::time::Instant;

use super::ABANDON_ANNOTATION;
use crate::api::cache_policy::{ChangesStatus, MAX_CHANGES_TOLD};
use crate::journal::feed::{LATE, View};
use crate::operator::cache_cluster::report::Verdict;
use crate::policy::Snapshot;
use crate::policy::changes::{Feed, required_form};
use crate::policy::snapshot::Origin;

/// How long a feed stays named after its slot was taken away, where relays run on: a kubelet brings them a snapshot within two minutes, and one
/// that has not heard yet must not make the slot anew.
const NAMED_FOR: Duration = Duration::from_secs(180);

/// What a relay of `policy` is to have: what policies say now, and beside it what of the feeds in `standing` is still to be taken away. Of a
/// policy that is leaving all are. `is_over`: whether a feed need not be named any longer.
pub fn with_feeds(
    mut wished: Snapshot,
    standing: Option<&Snapshot>,
    policy: &str,
    is_leaving: bool,
    is_over: impl Fn(&str) -> bool,
) -> Snapshot {
    for feed in &mut wished.feeds {
        feed.policy = Some(policy.to_owned());
        if is_leaving {
            feed.follows.clear();
        }
    }
    for feed in standing.into_iter().flat_map(|standing| &standing.feeds) {
        let is_named = wished.feeds.iter().any(|named| named.slot == feed.slot);
        let is_over = !is_leaving && feed.follows.is_empty() && is_over(&feed.slot);
        let origin = standing.and_then(|standing| standing.origins.iter().find(|origin| origin.name == feed.origin));
        if let Some(origin) = origin.filter(|_| !is_named && !is_over) {
            let origin = name_of(&mut wished, origin);
            wished.feeds.push(Feed { origin, follows: Vec::new(), ..feed.clone() });
        }
    }
    wished.requires = wished.requires.max(required_form(&wished.feeds));
    wished
}

/// What an earlier origin is called in a snapshot, where it is added if it is gone.
fn name_of(snapshot: &mut Snapshot, origin: &Origin) -> String {
    if let Some(same) = snapshot.origins.iter().find(|known| known.kind == origin.kind) {
        return same.name.clone();
    }
    let mut name = origin.name.clone();
    while snapshot.origins.iter().any(|known| known.name == name) {
        name.push_str("/earlier");
    }
    snapshot.origins.push(Origin { name: name.clone(), ..origin.clone() });
    name
}

/// How one feed is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Seen {
    /// The origin, as the relay's snapshot calls it.
    pub origin: String,
    /// Whether nobody follows it any more.
    pub ends: bool,
    /// What the cache tells. `None`: it does not answer.
    pub view: Option<View>,
}

/// What is known of a policy's feeds from look to look, by their slots.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Feeds {
    seen: BTreeMap<String, Seen>,
    /// Since when the slot is known to be gone of those that end.
    gone: BTreeMap<String, Instant>,
}

impl Feeds {
    /// Takes note of all feeds of the snapshot that the relay has, as they are now.
    pub fn note(&mut self, standing: Option<&Snapshot>, mut views: BTreeMap<String, View>, now: Instant) {
        let feeds = standing.into_iter().flat_map(|standing| &standing.feeds);
        let seen = |feed: &Feed| {
            let view = views.remove(&feed.slot);
            (feed.slot.clone(), Seen { origin: feed.origin.clone(), ends: feed.follows.is_empty(), view })
        };
        self.seen = feeds.map(seen).collect();
        self.gone.retain(|slot, _| self.seen.get(slot).is_some_and(|seen| seen.ends));
        for (slot, seen) in self.seen.iter().filter(|(_, seen)| seen.ends) {
            match &seen.view {
                Some(view) if view.is_removed => {
                    self.gone.entry(slot.clone()).or_insert(now);
                }
                Some(_) => {
                    self.gone.remove(slot);
                }
                None => {}
            }
        }
    }

    /// Whether there is none.
    pub fn are_none(&self) -> bool {
        self.seen.is_empty()
    }

    /// Whether nothing is left of any at its database.
    pub fn are_gone(&self) -> bool {
        self.left().is_none()
    }

    /// Origin and slot of the first of which something may be left.
    pub fn left(&self) -> Option<(&str, &str)> {
        let (slot, seen) = self.seen.iter().find(|(slot, _)| !self.gone.contains_key(*slot))?;
        Some((&seen.origin, slot))
    }

    /// Whether the feed of a slot need not be named any longer to relays that run on.
    pub fn is_over(&self, slot: &str, now: Instant) -> bool {
        self.gone.get(slot).is_some_and(|since| now.duration_since(*since) >= NAMED_FOR)
    }

    /// Whether something is under way that relays will soon tell of.
    pub fn are_ending(&self) -> bool {
        self.seen.iter().any(|(slot, seen)| seen.ends && !self.gone.contains_key(slot))
    }

    /// How old the oldest change may be that is not said, in milliseconds.
    pub fn behind_ms(&self) -> Option<u64> {
        self.read().filter_map(|(_, seen)| seen.view.as_ref()?.behind_ms).max()
    }

    /// In words, where there is any.
    pub fn status(&self) -> Vec<ChangesStatus> {
        let told = |(slot, seen): (&String, &Seen)| {
            let view = seen.view.as_ref();
            ChangesStatus {
                origin: seen.origin.clone(),
                slot: slot.clone(),
                reading: view.is_some_and(|view| view.reader.is_some()),
                // In steps that are coarser than the relays' own, so that a status which says nothing new is not written.
                lag_seconds: view.and_then(|view| view.behind_ms).map(|millis| millis / 10_000 * 10),
                kept_mebibytes: view.and_then(|view| view.kept_bytes).map(|bytes| bytes >> 20),
            }
        };
        self.read().take(MAX_CHANGES_TOLD).map(told).collect()
    }

    /// Whether what databases commit is told in time. `None`: there is no feed.
    pub fn verdict(&self, is_leaving: bool) -> Option<Verdict> {
        if self.are_none() {
            return None;
        }
        let ending = self.seen.iter().find(|(slot, seen)| seen.ends && !self.gone.contains_key(*slot));
        if let Some((slot, seen)) = ending.filter(|_| is_leaving) {
            return Some(Verdict::no("Leaving", leaving(slot, seen)));
        }
        let wrong = self.read().find_map(|(_, seen)| wrong(seen)).or_else(|| {
            let (slot, seen) = ending?;
            let trouble = seen.view.as_ref()?.trouble.as_ref()?;
            let Seen { origin, .. } = seen;
            Some(Verdict::no("SlotStays", format!("the slot `{slot}` of origin `{origin}` cannot be taken away: {trouble}")))
        });
        Some(wrong.unwrap_or_else(|| Verdict::yes("InTime", "what databases commit is told within seconds")))
    }

    fn read(&self) -> impl Iterator<Item = (&String, &Seen)> {
        self.seen.iter().filter(|(_, seen)| !seen.ends)
    }
}

/// What is wrong with a feed that rules follow.
fn wrong(Seen { origin, view, .. }: &Seen) -> Option<Verdict> {
    let Some(View { reader, behind_ms, trouble, .. }) = view else {
        let message = "the cache does not say whether databases' changes are read: see the CacheCluster's status";
        return Some(Verdict::no("Unknown", message));
    };
    if let Some(trouble) = trouble {
        return Some(Verdict::no("Trouble", format!("changes of origin `{origin}` are not told, or not in full: {trouble}")));
    }
    match (reader, behind_ms) {
        (_, None) => Some(Verdict::no(
            "Beginning",
            format!("no relay reads the changes of origin `{origin}` yet: relays start within a minute or two"),
        )),
        (None, Some(_)) => Some(Verdict::no(
            "NotRead",
            format!(
                "no relay reads the changes of origin `{origin}`: see that the pods of larder-r-… run, and what their logs say"
            ),
        )),
        (Some(_), Some(behind)) if u128::from(*behind) > LATE.as_millis() => Some(Verdict::no(
            "Late",
            format!("what origin `{origin}` committed more than {LATE:?} ago may not be told yet: see what the relay's log says"),
        )),
        (Some(_), Some(_)) => None,
    }
}

/// What the deletion of a policy waits for.
fn leaving(slot: &str, Seen { origin, view, .. }: &Seen) -> String {
    let why = match view {
        None => "the cache does not say whether it is",
        Some(view) => view.trouble.as_deref().unwrap_or("relays hear of it within two minutes"),
    };
    format!(
        "the policy goes once the slot `{slot}` of origin `{origin}` is taken away: {why}; see that the database answers, or give it up with \
         the annotation {ABANDON_ANNOTATION}, and drop it: SELECT pg_drop_replication_slot('{slot}')"
    )
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn snapshot(feeds: &[(&str, bool)]) -> Snapshot {
        let feed = |(slot, ends): &(&str, bool)| {
            let follow = json!({"rule": "user", "table": "users", "touches": {"all": {}}});
            let follows = if *ends { json!([]) } else { json!([follow]) };
            json!({"origin": "db", "slot": slot, "publication": slot, "maxLag": "1Gi", "follows": follows})
        };
        let ttl = json!({"default": "5m", "max": "24h", "jitter": "10%"});
        serde_json::from_value(json!({
            "version": 6, "requires": 1, "generation": 7,
            "cluster": {"name": "main", "topology": {"sentinel": {"master": "main", "sentinels": ["10.0.0.1:26379"]}}},
            "unmatched": {"bypass": {}}, "rules": [{"name": "user", "keys": "user:{id}", "strategy": {"cacheAside": {"ttl": ttl}}}],
            "origins": [{"name": "db", "kind": {"sql": {"url": {"file": "/etc/larder/secret/x"}}}, "maxConnections": 1,
                "connectTimeout": "1s", "timeout": "2s"}],
            "feeds": feeds.iter().map(feed).collect::<Vec<_>>(),
        }))
        .unwrap()
    }

    fn named(snapshot: &Snapshot) -> Vec<(String, String, usize)> {
        snapshot.feeds.iter().map(|feed| (feed.slot.clone(), feed.origin.clone(), feed.follows.len())).collect()
    }

    fn said(slot: &str, origin: &str, follows: usize) -> (String, String, usize) {
        (slot.to_owned(), origin.to_owned(), follows)
    }

    #[test]
    fn a_feed_stays_named_until_nothing_is_left_of_it() {
        let never = |_: &str| false;
        let first = with_feeds(snapshot(&[("a", false)]), None, "shop", false, never);
        assert_eq!((named(&first), first.requires), (vec![said("a", "db", 1)], 6));
        assert_eq!(first.feeds[0].policy.as_deref(), Some("shop"));
        // Another slot: the earlier one is to go. Its origin may be gone, or another's by now.
        let second = with_feeds(snapshot(&[("b", false)]), Some(&first), "shop", false, never);
        assert_eq!(named(&second), [said("b", "db", 1), said("a", "db", 0)]);
        let mut moved = snapshot(&[]);
        moved.origins[0].kind = serde_json::from_value(json!({"sql": {"url": {"file": "/etc/larder/secret/y"}}})).unwrap();
        let third = with_feeds(moved, Some(&first), "shop", false, never);
        assert_eq!((named(&third), third.origins.len()), (vec![said("a", "db/earlier", 0)], 2));
        assert_eq!(third.origins[1].kind, first.origins[0].kind);
        assert!(Snapshot::parse(&serde_json::to_vec(&third).unwrap()).is_ok(), "a relay takes it");
        // What is followed is not over, whatever was seen of its slot.
        assert_eq!(named(&with_feeds(snapshot(&[]), Some(&second), "shop", false, |_| true)), [said("b", "db", 0)]);
        // Of a policy that is leaving all go, and stay named.
        let leaving = with_feeds(snapshot(&[("b", false)]), Some(&second), "shop", true, |_| true);
        assert_eq!(named(&leaving), [said("b", "db", 0), said("a", "db", 0)]);
        assert_eq!(with_feeds(leaving.clone(), Some(&leaving), "shop", true, never), leaving);
    }

    fn views(view: &View) -> BTreeMap<String, View> {
        BTreeMap::from([("a".to_owned(), view.clone())])
    }

    #[test]
    fn a_slot_is_gone_once_a_relay_has_said_so_of_a_feed_that_nobody_follows() {
        let start = Instant::now();
        let (followed, ends) = (snapshot(&[("a", false)]), snapshot(&[("a", true)]));
        let removed = View { is_removed: true, ..View::default() };
        let mut feeds = Feeds::default();
        assert!(feeds.are_none() && feeds.are_gone());
        feeds.note(Some(&followed), views(&removed), start);
        assert!(!feeds.are_gone() && !feeds.are_ending(), "that was said before");
        feeds.note(Some(&ends), views(&View::default()), start);
        assert!(!feeds.are_gone() && feeds.are_ending());
        feeds.note(Some(&ends), BTreeMap::new(), start);
        assert!(!feeds.are_gone(), "nobody knows");
        feeds.note(Some(&ends), views(&removed), start);
        assert!(feeds.are_gone() && !feeds.is_over("a", start) && !feeds.are_ending());
        feeds.note(Some(&ends), BTreeMap::new(), start + NAMED_FOR);
        assert!(feeds.are_gone() && feeds.is_over("a", start + NAMED_FOR), "what was said counts while the cache is away");
        feeds.note(Some(&ends), views(&View::default()), start);
        assert!(!feeds.are_gone() && !feeds.is_over("a", start + NAMED_FOR), "somebody made it anew");
        feeds.note(None, BTreeMap::new(), start);
        assert!(feeds.are_none());
    }

    #[test]
    fn how_the_reading_is_comes_to_a_word_and_a_sentence() {
        let reads =
            || View { reader: Some("r".to_owned()), behind_ms: Some(4_900), kept_bytes: Some(3 << 20), ..View::default() };
        let told = |view: Option<View>, ends: bool, is_leaving: bool| {
            let mut feeds = Feeds::default();
            feeds.note(Some(&snapshot(&[("a", ends)])), view.iter().flat_map(views).collect(), Instant::now());
            (feeds.verdict(is_leaving).unwrap(), feeds.status())
        };
        for (view, ends, is_leaving, reason, word) in [
            (Some(reads()), false, false, "InTime", "within seconds"),
            (None, false, false, "Unknown", "the cache does not say"),
            (Some(View::default()), false, false, "Beginning", "`db` yet"),
            (Some(View { reader: None, ..reads() }), false, false, "NotRead", "larder-r-"),
            (Some(View { behind_ms: Some(30_001), ..reads() }), false, false, "Late", "30s ago"),
            (Some(View { trouble: Some("wal_level".to_owned()), ..reads() }), false, false, "Trouble", "wal_level"),
            (Some(reads()), true, true, "Leaving", "pg_drop_replication_slot('a')"),
            (Some(View { trouble: Some("refused".to_owned()), ..reads() }), true, true, "Leaving", "refused"),
            (None, true, true, "Leaving", "does not say"),
            (Some(View { trouble: Some("refused".to_owned()), ..reads() }), true, false, "SlotStays", "refused"),
            (Some(reads()), true, false, "InTime", "within seconds"),
        ] {
            let (verdict, _) = told(view, ends, is_leaving);
            assert_eq!((verdict.reason, verdict.holds), (reason, reason == "InTime"));
            assert!(verdict.message.contains(word), "{}", verdict.message);
        }
        let (_, status) = told(Some(reads()), false, false);
        assert!(status[0].reading && (status[0].lag_seconds, status[0].kept_mebibytes) == (Some(0), Some(3)), "{status:?}");
        let (_, status) = told(Some(View { behind_ms: Some(47_000), ..reads() }), false, false);
        assert_eq!(status[0].lag_seconds, Some(40));
        assert_eq!(Feeds::default().verdict(true), None);
    }
}
