//! What the [scripts](super::scripts) do to a partition, as code: simulations play it, and random steps hold it to real servers.

use std::collections::BTreeMap;

use super::scripts::{Appended, Bound, Bounds, Claimed, Fenced, Left};
use super::{Change, Entry, Held, Version};

/// A letter that is among so many last ones is not made again.
const REPEATS_SEEN: usize = 4;

/// A partition.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Partition {
    /// The entries, in order.
    pub log: Vec<Entry>,
    /// The last write of each key that the origin has an older value of.
    pub dirty: BTreeMap<Vec<u8>, Held>,
    /// The keys of which a write goes past the journal: until when, in microseconds, and its version.
    pub away: BTreeMap<Vec<u8>, (u64, Version)>,
    /// The greatest version given.
    pub last: Version,
    /// Up to where all is applied or parked.
    pub position: Version,
    /// Bytes ever appended, and trimmed.
    pub bytes: (u64, u64),
    /// The latest claim's number, and who has the partition until when.
    pub fence: u64,
    /// Who applies, and until when, in microseconds.
    pub relay: Option<(String, u64)>,
    /// For each key with a dead letter, the greatest version of those.
    pub parked: BTreeMap<Vec<u8>, Version>,
    /// The versions of the dead letters, in the order in which they came.
    pub dead: Vec<Version>,
}

/// What breaks the model, to show that a simulation would notice. Whoever uses it for anything else leaves it at its default.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Broken {
    /// Nothing.
    #[default]
    Nothing,
    /// Keys are cleared from the dirty index whatever version it has.
    ClearedVersion,
    /// An append counts, however late it comes.
    Lateness,
    /// A write is appended while another of its key is past the journal.
    Absence,
    /// A write goes past the journal while another of its key waits there.
    Precedence,
}

impl Partition {
    /// Appends. `now` and `until` are microseconds of the server's clock.
    pub fn append(&mut self, now: u64, until: u64, bounds: Bounds, changes: &[Change], broken: Broken) -> Appended {
        if now > until && broken != Broken::Lateness {
            return Appended::Late;
        }
        for key in changes.iter().map(|change| &change.key) {
            match self.away.get(key) {
                Some((until, _)) if *until > now && broken != Broken::Absence => return Appended::Busy,
                Some(_) => drop(self.away.remove(key)),
                None => {}
            }
        }
        let weight: u64 = changes.iter().map(|change| change.weight() as u64).sum();
        if self.log.len() as u64 + changes.len() as u64 > bounds.depth {
            return Appended::Full(Bound::Depth);
        }
        if self.bytes.0 - self.bytes.1 + weight > bounds.bytes {
            return Appended::Full(Bound::Bytes);
        }
        let oldest = self.log.first().map(|entry| entry.version.get());
        if oldest.is_some_and(|oldest| now.saturating_sub(oldest) > bounds.age_ms * 1_000) {
            return Appended::Full(Bound::Age);
        }
        let versions = changes.iter().map(|change| {
            self.last = Version::new(now.max(self.last.get() + 1));
            self.bytes.0 += change.weight() as u64;
            self.log.push(Entry { version: self.last, change: change.clone(), through: self.bytes.0 });
            self.dirty.insert(change.key.clone(), Held { version: self.last, value: change.value.clone() });
            self.last
        });
        Appended::Done(versions.collect())
    }

    /// Has writes of these keys go past the journal for so many microseconds. `now` and `until` are as for an append.
    pub fn leave(&mut self, now: u64, until: u64, micros: u64, keys: &[Vec<u8>], broken: Broken) -> Left {
        if now > until {
            return Left::Late;
        }
        for key in keys {
            if self.dirty.contains_key(key) && broken != Broken::Precedence {
                return Left::Waits;
            }
            if self.away.get(key).is_some_and(|(until, _)| *until > now) {
                return Left::Busy;
            }
        }
        let versions = keys.iter().map(|key| {
            self.last = Version::new(now.max(self.last.get() + 1));
            self.away.insert(key.clone(), (now + micros, self.last));
            self.last
        });
        Left::Done(versions.collect())
    }

    /// Ends that, where it is these writes that are past the journal. How many are.
    pub fn arrive(&mut self, writes: &[(Vec<u8>, Version)]) -> u64 {
        let mut count = 0;
        for (key, version) in writes {
            if self.away.get(key).is_some_and(|(_, own)| own == version) {
                self.away.remove(key);
                count += 1;
            }
        }
        count
    }

    /// Claims it for so many milliseconds.
    pub fn claim(&mut self, now: u64, token: &str, millis: u64) -> Claimed {
        let holder = self.relay.take().filter(|(_, until)| *until > now);
        if let Some((holder, until)) = &holder
            && holder != token
        {
            let held = Claimed::Held(holder.clone().into_bytes());
            self.relay = Some((holder.clone(), *until));
            return held;
        }
        if holder.is_none() || self.fence == 0 {
            self.fence = now.max(self.fence + 1);
        }
        self.relay = Some((token.to_owned(), now + millis * 1_000));
        Claimed::Yes { fence: self.fence, position: self.position }
    }

    /// Trims, and clears what the origin has.
    pub fn done(
        &mut self,
        fence: u64,
        upto: Version,
        through: u64,
        cleared: &[(Vec<u8>, Version)],
        broken: Broken,
    ) -> Fenced<u64> {
        if fence != self.fence {
            return Fenced::Lost;
        }
        self.log.retain(|entry| entry.version > upto);
        let mut count = 0;
        for (key, version) in cleared {
            if self.dirty.get(key).is_some_and(|held| held.version <= *version || broken == Broken::ClearedVersion) {
                self.dirty.remove(key);
                count += 1;
            }
            if self.parked.get(key).is_some_and(|parked| parked <= version) {
                self.parked.remove(key);
            }
        }
        self.position = self.position.max(upto);
        self.bytes.1 = self.bytes.1.max(through);
        Fenced::Done(count)
    }

    /// Makes an entry a dead letter, where it is none yet.
    pub fn park(&mut self, fence: u64, most: u64, version: Version, key: &[u8]) -> Fenced<bool> {
        if fence != self.fence {
            return Fenced::Lost;
        }
        if self.dead.iter().rev().take(REPEATS_SEEN).any(|letter| *letter == version) {
            return Fenced::Done(true);
        }
        if self.dead.len() as u64 >= most {
            return Fenced::Done(false);
        }
        self.dead.push(version);
        let parked = self.parked.entry(key.to_vec()).or_default();
        *parked = version.max(*parked);
        Fenced::Done(true)
    }
}
