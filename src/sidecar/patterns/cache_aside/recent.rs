//! The keys that this worker wrote lately, which another primary may not have heard of.
//!
//! Replication is asynchronous: a new primary may lack the last writes and deletions that were acknowledged. What it has of those
//! keys may be older, so it is deleted before anything is read there: a miss, never a value from before an acknowledged write.

use std::cell::RefCell;
use std::collections::VecDeque;

use rustc_hash::{FxHashMap, FxHashSet};

use crate::sidecar::resp::encode;
use crate::sidecar::slots::{self, Companion};
use crate::sidecar::upstream::queue::ANY_SLOT;

/// A write is remembered for this long: ten seconds of writes before a primary's end, and twenty until another is known.
const KEPT_MS: u64 = 30_000;
/// The most writes that are remembered.
const MOST_WRITES: usize = 65_536;
/// The most memory for their keys.
const MOST_BYTES: usize = 4 * 1024 * 1024;
/// The most keys of one command.
const KEYS_PER_COMMAND: usize = 128;

/// Keys, oldest first.
#[derive(Debug, Default)]
pub struct Recent(RefCell<Ring>);

#[derive(Debug, Default)]
struct Ring {
    writes: VecDeque<Write>,
    keys: VecDeque<u8>,
    /// When writes were last dropped for lack of room, and were younger than [`KEPT_MS`].
    overflowed: Option<u64>,
}

#[derive(Debug, Clone, Copy)]
struct Write {
    at: u64,
    length: u32,
    database: u8,
}

/// Keys of one slot to delete, with what is beside them.
#[derive(Debug, PartialEq, Eq)]
pub struct Deletion {
    /// Their slot; [`ANY_SLOT`] where there are none.
    pub slot: u16,
    /// Their database.
    pub database: u8,
    /// The command.
    pub wire: Vec<u8>,
}

impl Recent {
    /// A covered key is written or deleted.
    pub fn note(&self, now: u64, database: u8, key: &[u8]) {
        let mut ring = self.0.borrow_mut();
        while let Some(oldest) = ring.writes.front().copied() {
            let is_old = now.saturating_sub(oldest.at) > KEPT_MS;
            let is_full = ring.writes.len() >= MOST_WRITES || ring.keys.len() + key.len() > MOST_BYTES;
            if !is_old && !is_full {
                break;
            }
            if !is_old {
                ring.overflowed = Some(now);
            }
            ring.writes.pop_front();
            ring.keys.drain(..oldest.length as usize);
        }
        ring.writes.push_back(Write { at: now, length: key.len() as u32, database });
        ring.keys.extend(key);
    }

    /// What deletes the keys of those slots that have a new owner. Each key once.
    pub fn deletions(&self, is_cluster: bool, is_new: impl Fn(u16) -> bool) -> Vec<Deletion> {
        let mut ring = self.0.borrow_mut();
        let mut groups: FxHashMap<(u16, u8), FxHashSet<&[u8]>> = FxHashMap::default();
        let Ring { writes, keys, .. } = &mut *ring;
        let (mut rest, writes): (&[u8], &VecDeque<Write>) = (keys.make_contiguous(), writes);
        for write in writes {
            let (key, behind) = rest.split_at(write.length as usize);
            rest = behind;
            let slot = if is_cluster { slots::slot_of(key) } else { ANY_SLOT };
            if is_new(slot) {
                groups.entry((slot, write.database)).or_default().insert(key);
            }
        }
        let mut deletions = Vec::new();
        for ((slot, database), keys) in groups {
            let keys: Vec<&[u8]> = keys.into_iter().collect();
            deletions.extend(keys.chunks(KEYS_PER_COMMAND).map(|keys| Deletion { slot, database, wire: unlink(keys) }));
        }
        deletions
    }

    /// Whether writes were forgotten for lack of room that are younger than they should be.
    pub fn has_overflowed(&self, now: u64) -> bool {
        self.0.borrow().overflowed.is_some_and(|at| now.saturating_sub(at) <= KEPT_MS)
    }
}

fn unlink(keys: &[&[u8]]) -> Vec<u8> {
    const BESIDE: [Companion; 3] = [Companion::Lease, Companion::Stale, Companion::Negative];
    let mut wire = Vec::new();
    encode::array(&mut wire, 1 + keys.len() * (1 + BESIDE.len()));
    encode::bulk(&mut wire, b"UNLINK");
    for key in keys {
        encode::bulk(&mut wire, key);
        BESIDE.iter().for_each(|companion| encode::bulk(&mut wire, &companion.name(key)));
    }
    wire
}

#[cfg(test)]
mod tests {
    use super::*;

    fn keys_of(recent: &Recent, database: u8) -> Vec<String> {
        let deletions = recent.deletions(false, |_| true);
        let wire: Vec<u8> = deletions.into_iter().filter(|it| it.database == database).flat_map(|it| it.wire).collect();
        let text = String::from_utf8(wire).expect("text");
        let mut words: Vec<String> = text.split("\r\n").filter(|word| word.starts_with("k")).map(str::to_owned).collect();
        words.sort();
        words
    }

    #[test]
    fn what_was_written_lately_is_deleted_once() {
        let recent = Recent::default();
        recent.note(0, 0, b"k-old");
        recent.note(KEPT_MS, 0, b"k1");
        recent.note(KEPT_MS + 1, 0, b"k1");
        recent.note(KEPT_MS + 1, 3, b"k3");
        assert_eq!(keys_of(&recent, 0), ["k1"]);
        assert_eq!(keys_of(&recent, 3), ["k3"]);
        assert!(!recent.has_overflowed(KEPT_MS + 1));
        let slot = slots::slot_of(b"k1");
        let mut of_slot = recent.deletions(true, |other| other == slot);
        assert_eq!(of_slot.len(), 1);
        let deletion = of_slot.remove(0);
        assert_eq!((deletion.slot, deletion.database), (slot, 0));
        assert!(deletion.wire.starts_with(b"*5\r\n$6\r\nUNLINK\r\n$2\r\nk1\r\n"));
    }

    #[test]
    fn memory_is_bounded_and_what_is_lost_is_said() {
        let recent = Recent::default();
        for number in 0..=MOST_WRITES {
            recent.note(5, 0, format!("k{number}").as_bytes());
        }
        assert_eq!(recent.0.borrow().writes.len(), MOST_WRITES);
        assert!(recent.has_overflowed(KEPT_MS) && !recent.has_overflowed(2 * KEPT_MS + 5));
        let large = Recent::default();
        let key = vec![b'k'; MOST_BYTES / 3];
        (0..9).for_each(|_| large.note(5, 0, &key));
        assert_eq!(large.0.borrow().writes.len(), 3);
    }
}
