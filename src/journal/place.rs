//! Where a journal lies: its partitions and their keys.

use crate::policy::JournalName;
use crate::policy::slots::{self, SLOTS};

/// How many partitions each journal has. It is part of the form: a key's partition follows from it.
pub const PARTITIONS: u8 = 16;

/// One partition of a journal.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Partition {
    number: u8,
    slot: u16,
    base: Vec<u8>,
}

impl Partition {
    /// The one with this number, below [`PARTITIONS`], of a journal.
    pub fn new(journal: &JournalName, number: u8) -> Self {
        let number = number % PARTITIONS;
        let width = u64::from(SLOTS / u16::from(PARTITIONS));
        // Neighbours are a sixteenth of the slots apart: every shard of a Cluster has its share of them.
        let slot = (hash(journal.as_str().as_bytes()) % u64::from(SLOTS) + u64::from(number) * width) % u64::from(SLOTS);
        let slot = u16::try_from(slot).unwrap_or_default();
        let base = format!("larder:j:{{{}}}{journal}/{number}", String::from_utf8_lossy(&slots::tag_of(slot))).into_bytes();
        Self { number, slot, base }
    }

    /// All of a journal, by number.
    pub fn all(journal: &JournalName) -> impl Iterator<Item = Self> + '_ {
        (0..PARTITIONS).map(|number| Self::new(journal, number))
    }

    /// Which of its journal's.
    pub fn number(&self) -> u8 {
        self.number
    }

    /// The slot in which all its keys lie.
    pub fn slot(&self) -> u16 {
        self.slot
    }

    /// The stream of entries.
    pub fn log(&self) -> Vec<u8> {
        self.key(b":log")
    }

    /// The dirty index.
    pub fn dirty(&self) -> Vec<u8> {
        self.key(b":dirty")
    }

    /// Counters and positions.
    pub fn head(&self) -> Vec<u8> {
        self.key(b":head")
    }

    /// The keys of which a write goes past the journal.
    pub fn away(&self) -> Vec<u8> {
        self.key(b":away")
    }

    /// Who applies its entries now.
    pub fn relay(&self) -> Vec<u8> {
        self.key(b":relay")
    }

    /// The dead letters.
    pub fn dead(&self) -> Vec<u8> {
        self.key(b":dead")
    }

    /// The keys with dead letters.
    pub fn parked(&self) -> Vec<u8> {
        self.key(b":parked")
    }

    fn key(&self, part: &[u8]) -> Vec<u8> {
        [&self.base, part].concat()
    }
}

/// The number of the partition in which all writes of `key` are. Keys that share a hash tag are spread like any others.
pub fn partition_of(key: &[u8]) -> u8 {
    let hash = hash(key);
    // The low bits of FNV-1a mix least.
    (((hash >> 32) ^ hash) % u64::from(PARTITIONS)) as u8
}

/// FNV-1a of 64 bits: the same in every build and for ever, as what lies in a journal demands.
fn hash(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_hash_is_fnv_1a() {
        assert_eq!(hash(b""), 0xcbf2_9ce4_8422_2325);
        assert_eq!(hash(b"a"), 0xaf63_dc4c_8601_ec8c);
        assert_eq!(hash(b"foobar"), 0x8594_4171_f739_67e8);
    }

    #[test]
    fn a_partitions_keys_lie_in_its_slot_and_partitions_are_spread() {
        let mut slots: Vec<u16> = Vec::new();
        let journal = "shop.users".parse().expect("a name");
        for partition in Partition::all(&journal) {
            let waiting = [partition.log(), partition.dirty(), partition.head(), partition.away()];
            for key in waiting.into_iter().chain([partition.relay(), partition.dead(), partition.parked()]) {
                assert_eq!(slots::slot_of(&key), partition.slot(), "{}", String::from_utf8_lossy(&key));
                assert!(slots::is_larder_key(&key) && slots::Companion::parse(&key).is_none());
            }
            slots.push(partition.slot() / (SLOTS / u16::from(PARTITIONS)));
        }
        slots.sort_unstable();
        slots.dedup();
        assert_eq!(slots.len(), usize::from(PARTITIONS), "each sixteenth of the slots has one");
    }

    #[test]
    fn keys_are_spread_evenly() {
        let mut counts = [0u32; PARTITIONS as usize];
        (0..16_000).for_each(|id| counts[usize::from(partition_of(format!("user:{{{id}}}").as_bytes()))] += 1);
        assert!(counts.iter().all(|count| (800..1_200).contains(count)), "{counts:?}");
    }

    proptest! {
        #[test]
        fn every_key_has_a_partition(key in proptest::collection::vec(any::<u8>(), 0..64)) {
            prop_assert!(partition_of(&key) < PARTITIONS);
        }
    }
}
