//! What takes a walk over all keys: a rule's, a pattern's or a tag's keys, or all that are kept right by leases. Pure.
//!
//! A walk looks at every name in every shard, twice. The first pass ends the leases of what it is about: a load that began before the
//! walk has a lease then, unless it has ended before the pass came by, and its value stands in the cache. The second pass removes
//! values, copies and remembered absences. One pass could meet a lease's place before, and its value's after, the load ended
//! in between: SCAN tells for certain only of what is there from its beginning to its end.
//!
//! One walk is under way at a time, for all that was wanted when it began. What is wanted meanwhile has the next one, for values that
//! are stored behind the walk's back may be older than the later wish.

use std::collections::{BTreeMap, HashSet, VecDeque};

use serde::{Deserialize, Serialize};

use super::position::EntryId;
use crate::policy::{KeyPattern, tags};
use crate::sidecar::policy::ActivePolicy;
use crate::sidecar::slots::{Companion, is_larder_key};

/// The most that waits for the next walk.
pub const MOST_WISHES: usize = 64;
/// How many that have ended are remembered, for those who ask what became of them.
const MOST_ENDED: usize = 64;

/// Which keys are to go.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Target {
    /// Those of the rule of this name.
    Rule(String),
    /// Those of a pattern that some rule covers.
    Pattern(KeyPattern),
    /// Those that have this tag.
    Tag(String),
    /// Those of all rules with leases: events were lost, and nobody knows which.
    Leased,
}

/// A target, and the events that wanted it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Wish {
    /// Which keys.
    pub target: Target,
    /// The first event.
    #[serde(with = "as_text")]
    pub from: EntryId,
    /// The last.
    #[serde(with = "as_text")]
    pub to: EntryId,
}

impl Wish {
    fn includes(&self, event: EntryId) -> bool {
        self.from <= event && event <= self.to
    }
}

/// Which names a pass looks for.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Pass {
    /// Leases.
    #[default]
    Leases,
    /// Values, stale copies, remembered absences.
    Values,
}

/// A shard as a pass found it. Cursors mean something to one process of a server alone, and only while no slot moves.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Shard {
    /// The server's address.
    pub address: String,
    /// What tells its process from others.
    pub run: String,
    /// The slots that it owns, as it writes them.
    pub slots: String,
}

/// How far a shard has been looked at.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reached {
    /// Which shard.
    pub shard: Shard,
    /// The databases that are left, the one under way first.
    pub databases: Vec<u8>,
    /// Where SCAN goes on in the first.
    pub cursor: String,
}

/// A walk under way.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Walk {
    /// What it is about.
    pub wishes: Vec<Wish>,
    /// Its pass.
    pub pass: Pass,
    /// How far it is. Empty: it has not begun.
    pub shards: Vec<Reached>,
    /// How many names there were about when the pass began.
    pub total: u64,
    /// How many were looked at in this pass.
    pub seen: u64,
    /// How many keys have lost something, since the walk began.
    pub removed: u64,
    /// How often it began anew, since servers or slots had changed.
    pub restarts: u32,
}

/// A wish that was fulfilled.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Ended {
    /// Which.
    pub wish: Wish,
    /// How many keys its walk removed, for all that it was about.
    pub removed: u64,
}

/// All that is wanted, under way, and has ended lately.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Jobs {
    /// The walk under way.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub current: Option<Walk>,
    /// What the next is about.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    next: Vec<Wish>,
    /// The latest last.
    #[serde(default, skip_serializing_if = "VecDeque::is_empty")]
    ended: VecDeque<Ended>,
}

/// What became of an event that wants a walk.
#[derive(Debug, Clone, PartialEq)]
pub enum Progress {
    /// Another walk has to end first.
    Waiting,
    /// Its walk is under way.
    Walking(Walk),
    /// Its walk has ended, and removed so many keys.
    Ended(u64),
    /// Nothing is known of it.
    Unknown,
}

impl Jobs {
    /// Whether [`Jobs::wish`] has room for anything.
    pub fn has_room(&self) -> bool {
        self.next.len() < MOST_WISHES
    }

    /// What `event` wants. What waits for the same takes it in.
    pub fn wish(&mut self, target: Target, event: EntryId) {
        match self.next.iter_mut().find(|wish| wish.target == target) {
            Some(wish) => wish.to = wish.to.max(event),
            None => self.next.push(Wish { target, from: event, to: event }),
        }
    }

    /// Begins a walk where none is under way and something is wanted. Whether one is.
    pub fn begin(&mut self) -> bool {
        if self.current.is_none() && !self.next.is_empty() {
            let wishes = std::mem::take(&mut self.next);
            let walk = Walk { wishes, pass: Pass::Leases, shards: Vec::new(), total: 0, seen: 0, removed: 0, restarts: 0 };
            self.current = Some(walk);
        }
        self.current.is_some()
    }

    /// The walk under way has ended.
    pub fn end(&mut self) {
        let Some(walk) = self.current.take() else { return };
        let ended = walk.wishes.into_iter().map(|wish| Ended { wish, removed: walk.removed });
        self.ended.extend(ended);
        let over = self.ended.len().saturating_sub(MOST_ENDED);
        self.ended.drain(..over);
    }

    /// Whether a walk is under way or wanted for a target, by this event or an earlier one.
    pub fn awaits(&self, target: &Target, event: EntryId) -> bool {
        let is_it = |wish: &Wish| wish.target == *target && wish.from <= event;
        self.next.iter().any(is_it) || self.current.as_ref().is_some_and(|walk| walk.wishes.iter().any(is_it))
    }

    /// What became of what `event` wants.
    pub fn progress(&self, target: &Target, event: EntryId) -> Progress {
        let is_it = |wish: &Wish| wish.target == *target && wish.includes(event);
        if self.next.iter().any(is_it) {
            return Progress::Waiting;
        }
        if let Some(walk) = self.current.as_ref().filter(|walk| walk.wishes.iter().any(is_it)) {
            return Progress::Walking(walk.clone());
        }
        match self.ended.iter().rev().find(|ended| is_it(&ended.wish)) {
            Some(ended) => Progress::Ended(ended.removed),
            None => Progress::Unknown,
        }
    }
}

impl Walk {
    /// Whether it may go on where it was, with these shards.
    pub fn fits(&self, shards: &[Shard]) -> bool {
        self.shards.len() == shards.len() && shards.iter().all(|shard| self.shards.iter().any(|reached| reached.shard == *shard))
    }

    /// Begins its first pass, over these shards with their databases.
    pub fn start_over(&mut self, shards: BTreeMap<Shard, Vec<u8>>, total: u64) {
        self.restarts += u32::from(!self.shards.is_empty());
        self.start_pass(Pass::Leases, shards, total);
    }

    /// What it has met is of no use any more.
    pub fn give_up(&mut self) {
        self.restarts += 1;
        self.shards.clear();
    }

    /// Begins a pass.
    pub fn start_pass(&mut self, pass: Pass, shards: BTreeMap<Shard, Vec<u8>>, total: u64) {
        let begin = |(shard, databases)| Reached { shard, databases, cursor: "0".to_owned() };
        self.shards = shards.into_iter().map(begin).collect();
        (self.pass, self.total, self.seen) = (pass, total, 0);
    }

    /// A page of a shard has been dealt with; `next` is where SCAN goes on.
    pub fn turn_page(&mut self, shard: &Shard, next: &str, seen: u64, removed: u64) {
        self.seen += seen;
        self.removed += removed;
        if let Some(reached) = self.shards.iter_mut().find(|reached| reached.shard == *shard) {
            reached.cursor = next.to_owned();
            if next == "0" && !reached.databases.is_empty() {
                reached.databases.remove(0);
            }
        }
    }

    /// What of a page is to be removed, each entry the names of one key's: all of them lie in one slot.
    pub fn sift<'n>(&self, policy: &ActivePolicy, page: impl IntoIterator<Item = &'n [u8]>) -> Vec<Vec<Vec<u8>>> {
        let mut met = HashSet::new();
        let about = |key: &[u8]| self.wishes.iter().any(|wish| wish.target.covers(policy, key));
        let keys = page.into_iter().filter_map(|name| key_of(self.pass, name)).filter(|key| about(key) && met.insert(*key));
        keys.map(|key| names(self.pass, key)).collect()
    }
}

/// The key that a name belongs to, where a pass is about such names.
fn key_of(pass: Pass, name: &[u8]) -> Option<&[u8]> {
    match (Companion::parse(name), pass) {
        (Some((Companion::Lease, key)), Pass::Leases) | (Some((Companion::Stale | Companion::Negative, key)), Pass::Values) => {
            Some(key)
        }
        (None, Pass::Values) => Some(name).filter(|name| !is_larder_key(name)),
        _ => None,
    }
}

/// What a pass removes of a key. Leases that were taken after the first pass are of loads that began after the event.
fn names(pass: Pass, key: &[u8]) -> Vec<Vec<u8>> {
    match pass {
        Pass::Leases => vec![Companion::Lease.name(key)],
        Pass::Values => vec![key.to_vec(), Companion::Stale.name(key), Companion::Negative.name(key)],
    }
}

impl Target {
    /// Whether the key that the cache has by this name is to go. Only keys that a rule covers are: what a policy leaves alone may be no cache.
    pub fn covers(&self, policy: &ActivePolicy, name: &[u8]) -> bool {
        let (id, key) = (policy.find(name), policy.key_of(name));
        let Some(rule) = policy.rule(id).filter(|_| policy.lifetime_of(id).is_some()) else { return false };
        match self {
            Self::Rule(name) => rule.name == *name,
            Self::Pattern(pattern) => pattern.matches(key),
            Self::Tag(tag) => tags::has(rule, key, tag.as_bytes()),
            Self::Leased => policy.leases(id) || policy.loads(id),
        }
    }
}

mod as_text {
    use serde::de::Error as _;
    use serde::{Deserialize as _, Deserializer, Serializer};

    use super::EntryId;

    pub fn serialize<S: Serializer>(id: &EntryId, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(id)
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<EntryId, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(|()| D::Error::custom("no id of an entry"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(number: u64) -> EntryId {
        EntryId::new(number, 0)
    }

    fn rule(name: &str) -> Target {
        Target::Rule(name.to_owned())
    }

    #[test]
    fn what_is_wanted_while_a_walk_is_under_way_has_the_next() {
        let mut jobs = Jobs::default();
        assert!(!jobs.begin());
        jobs.wish(rule("user"), id(1));
        jobs.wish(rule("user"), id(2));
        assert_eq!(jobs.progress(&rule("user"), id(1)), Progress::Waiting);
        assert!(jobs.begin());
        jobs.wish(rule("user"), id(3));
        jobs.wish(Target::Leased, id(3));
        assert!(matches!(jobs.progress(&rule("user"), id(2)), Progress::Walking(walk) if walk.wishes.len() == 1));
        assert_eq!(jobs.progress(&rule("user"), id(3)), Progress::Waiting);
        assert!(jobs.awaits(&rule("user"), id(2)) && !jobs.awaits(&rule("user"), id(0)) && !jobs.awaits(&rule("other"), id(9)));
        jobs.end();
        assert!(!jobs.awaits(&rule("user"), id(2)) && jobs.awaits(&rule("user"), id(3)));
        assert_eq!(jobs.progress(&rule("user"), id(1)), Progress::Ended(0));
        assert!(jobs.begin() && jobs.current.as_ref().is_some_and(|walk| walk.wishes.len() == 2));
        assert_eq!(jobs.progress(&rule("other"), id(1)), Progress::Unknown);
        let kept = serde_json::to_string(&jobs).unwrap();
        assert_eq!(serde_json::from_str::<Jobs>(&kept).unwrap(), jobs);
    }

    #[test]
    fn what_waits_and_what_is_remembered_is_bounded() {
        let mut jobs = Jobs::default();
        for round in 0..3 {
            (0..MOST_WISHES).for_each(|number| jobs.wish(rule(&format!("{round}-{number}")), id(round)));
            assert!(!jobs.has_room());
            assert!(jobs.begin() && jobs.has_room());
            jobs.end();
        }
        assert_eq!(jobs.progress(&rule("2-0"), id(2)), Progress::Ended(0));
        assert_eq!(jobs.progress(&rule("0-0"), id(0)), Progress::Unknown);
    }

    #[test]
    fn a_walk_goes_on_with_the_same_processes_and_slots_alone() {
        let shard =
            |address: &str, run: &str| Shard { address: address.to_owned(), run: run.to_owned(), slots: "0-1".to_owned() };
        let (one, two) = (shard("a", "1"), shard("b", "1"));
        let mut jobs = Jobs::default();
        jobs.wish(rule("user"), id(1));
        jobs.begin();
        let walk = jobs.current.as_mut().unwrap();
        walk.start_over([(one.clone(), vec![0, 3]), (two.clone(), vec![])].into(), 10);
        assert!(walk.fits(&[two.clone(), one.clone()]) && walk.restarts == 0);
        assert!(!walk.fits(std::slice::from_ref(&one)) && !walk.fits(&[one.clone(), shard("b", "2")]));
        walk.turn_page(&one, "7", 5, 2);
        walk.turn_page(&one, "0", 5, 1);
        let reached = walk.shards.iter().find(|reached| reached.shard == one).unwrap();
        assert_eq!((reached.databases.as_slice(), reached.cursor.as_str(), walk.seen, walk.removed), (&[3][..], "0", 10, 3));
        walk.give_up();
        walk.start_over([(one, vec![0])].into(), 10);
        assert_eq!((walk.restarts, walk.seen, walk.removed), (1, 0, 3));
    }
}
