//! Which shard is to own which hash slots.
//!
//! Shares are even: they differ by one slot at the most. As few slots as possible move, and nothing is remembered between two
//! calls: what is left of the moves follows from who owns which slots by now, wherever the earlier ones stopped.

use std::collections::BTreeMap;
use std::fmt;

use super::desired::SLOTS;
use super::observed::SlotRange;

const WORD_BITS: u16 = 64;
const WORDS: usize = (SLOTS / WORD_BITS) as usize;

/// A set of hash slots.
#[derive(Clone, PartialEq, Eq)]
pub struct SlotSet(Box<[u64; WORDS]>);

impl Default for SlotSet {
    fn default() -> Self {
        Self(Box::new([0; WORDS]))
    }
}

impl fmt::Debug for SlotSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let texts = self.ranges().into_iter().map(|SlotRange { first, last }| format!("{first}-{last}"));
        f.write_str(&texts.collect::<Vec<_>>().join(" "))
    }
}

impl FromIterator<SlotRange> for SlotSet {
    fn from_iter<I: IntoIterator<Item = SlotRange>>(ranges: I) -> Self {
        let mut set = Self::default();
        ranges.into_iter().for_each(|range| set.insert(range));
        set
    }
}

impl SlotSet {
    /// All slots of a Cluster.
    pub fn all() -> Self {
        Self(Box::new([u64::MAX; WORDS]))
    }

    /// Adds the slots of a range; those beyond the last slot of a Cluster are left out.
    pub fn insert(&mut self, SlotRange { first, last }: SlotRange) {
        let last = last.min(SLOTS - 1);
        let (first_word, last_word) = (first / WORD_BITS, last / WORD_BITS);
        let words = self.0.get_mut(usize::from(first_word)..=usize::from(last_word)).unwrap_or_default();
        for (word, index) in words.iter_mut().zip(first_word..) {
            let from = if index == first_word { first % WORD_BITS } else { 0 };
            let to = if index == last_word { last % WORD_BITS } else { WORD_BITS - 1 };
            *word |= (u64::MAX << from) & (u64::MAX >> (WORD_BITS - 1 - to));
        }
    }

    /// Whether a slot is among them.
    pub fn contains(&self, slot: u16) -> bool {
        self.0.get(usize::from(slot / WORD_BITS)).is_some_and(|word| *word & (1u64 << (slot % WORD_BITS)) != 0)
    }

    /// How many there are.
    pub fn len(&self) -> u16 {
        self.0.iter().map(|word| word.count_ones() as u16).sum()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.0.iter().all(|word| *word == 0)
    }

    /// Adds those of another set.
    pub fn add(&mut self, other: &Self) {
        self.0.iter_mut().zip(other.0.iter()).for_each(|(word, other)| *word |= other);
    }

    /// Removes those of another set.
    pub fn remove(&mut self, other: &Self) {
        self.0.iter_mut().zip(other.0.iter()).for_each(|(word, other)| *word &= !other);
    }

    /// Those that are in both.
    pub fn common(&self, other: &Self) -> Self {
        let mut common = self.clone();
        common.0.iter_mut().zip(other.0.iter()).for_each(|(word, other)| *word &= other);
        common
    }

    /// The first slot from `from` on that is among them, or, with `is_in` false, that is not.
    fn next(&self, from: u16, is_in: bool) -> Option<u16> {
        let words = self.0.iter().zip((0..SLOTS).step_by(usize::from(WORD_BITS)));
        words.skip(usize::from(from / WORD_BITS)).find_map(|(word, base)| {
            let bits = if is_in { *word } else { !*word };
            let bits = if base < from { bits & (u64::MAX << (from - base)) } else { bits };
            (bits != 0).then(|| base + bits.trailing_zeros() as u16)
        })
    }

    /// They as ranges, in order, none of which touches the next.
    pub fn ranges(&self) -> Vec<SlotRange> {
        let (mut ranges, mut from) = (Vec::new(), 0);
        while let Some(first) = self.next(from, true) {
            from = self.next(first, false).unwrap_or(SLOTS);
            ranges.push(SlotRange { first, last: from - 1 });
        }
        ranges
    }

    /// They one by one, in order.
    pub fn iter(&self) -> impl Iterator<Item = u16> + use<> {
        self.ranges().into_iter().flat_map(|range| range.first..=range.last)
    }

    /// The first ones, `count` of them or all that there are.
    pub fn first(&self, count: u16) -> Self {
        let mut first = Self::default();
        let mut left = count;
        for range in self.ranges() {
            let taken = left.min(range.last - range.first + 1);
            if taken == 0 {
                break;
            }
            first.insert(SlotRange { first: range.first, last: range.first + taken - 1 });
            left -= taken;
        }
        first
    }

    /// Takes the last ones away, `count` of them or all that there are.
    fn take_last(&mut self, count: u16) -> Self {
        let staying = self.first(self.len().saturating_sub(count));
        let mut taken = std::mem::replace(self, staying);
        taken.remove(self);
        taken
    }
}

/// Slots that are to go from one shard to another.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Transfer {
    /// The shard that owns them.
    pub from: u16,
    /// The shard that is to own them.
    pub to: u16,
    /// Which; at least one.
    pub slots: SlotSet,
}

/// How many slots each shard is to own: shares of those that `owned` has, even over the shards `0..shards`, and none for the others. What
/// cannot be divided stays with those that own most, so that the fewest move.
fn shares(owned: &BTreeMap<u16, SlotSet>, shards: u16) -> BTreeMap<u16, u16> {
    let count = |shard: u16| owned.get(&shard).map_or(0, SlotSet::len);
    let total = owned.values().map(SlotSet::len).fold(0, u16::saturating_add);
    let mut staying: Vec<u16> = (0..shards).collect();
    staying.sort_by_key(|shard| (std::cmp::Reverse(count(*shard)), *shard));
    let (each, left) = (total / shards.max(1), total % shards.max(1));
    staying.into_iter().zip(0..).map(|(shard, place)| (shard, each + u16::from(place < left))).collect()
}

/// The fewest slots that must move for `shards` shards to own even shares of what `owned` says, by shard, and for all others to own
/// nothing. No slot may have two owners.
///
/// It is the same for the same `owned`. After any part of the transfers was done, as many are asked for as are left of them: each slot
/// that has moved leaves one fewer to move.
pub fn transfers(owned: &BTreeMap<u16, SlotSet>, shards: u16) -> Vec<Transfer> {
    let shares = shares(owned, shards);
    let share = |shard: u16| shares.get(&shard).copied().unwrap_or(0);
    let mut surplus: Vec<(u16, SlotSet)> = Vec::new();
    for (shard, slots) in owned {
        let mut slots = slots.clone();
        let excess = slots.take_last(slots.len().saturating_sub(share(*shard)));
        if !excess.is_empty() {
            surplus.push((*shard, excess));
        }
    }
    let mut transfers = Vec::new();
    for (to, share) in &shares {
        let mut wanting = share.saturating_sub(owned.get(to).map_or(0, SlotSet::len));
        while wanting > 0
            && let Some((from, excess)) = surplus.last_mut()
        {
            let slots = excess.take_last(wanting);
            wanting -= slots.len();
            transfers.push(Transfer { from: *from, to: *to, slots });
            if excess.is_empty() {
                surplus.pop();
            }
        }
    }
    transfers
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn range(first: u16, last: u16) -> SlotRange {
        SlotRange { first, last }
    }

    fn even(shards: u16) -> BTreeMap<u16, SlotSet> {
        let bound = |n: u16| (u32::from(n) * u32::from(SLOTS) / u32::from(shards)) as u16;
        (0..shards).map(|shard| (shard, [range(bound(shard), bound(shard + 1) - 1)].into_iter().collect())).collect()
    }

    /// Carries out a part of the transfers, as one that dies within them.
    fn carry_out(owned: &mut BTreeMap<u16, SlotSet>, transfers: &[Transfer], mut budget: u16) {
        for Transfer { from, to, slots } in transfers {
            let moved = slots.first(budget);
            budget -= moved.len();
            owned.get_mut(from).unwrap().remove(&moved);
            owned.entry(*to).or_default().add(&moved);
        }
    }

    fn moving(transfers: &[Transfer]) -> u16 {
        transfers.iter().map(|transfer| transfer.slots.len()).sum()
    }

    fn assert_even(owned: &BTreeMap<u16, SlotSet>, shards: u16) {
        let counts: Vec<u16> = (0..shards).map(|shard| owned[&shard].len()).collect();
        let (least, most) = (counts.iter().min().unwrap(), counts.iter().max().unwrap());
        assert!(most - least <= 1, "{counts:?}");
        let mut all = SlotSet::default();
        owned.values().for_each(|slots| all.add(slots));
        assert_eq!(all, SlotSet::all(), "a slot has no owner");
        assert_eq!(counts.iter().sum::<u16>(), SLOTS, "a slot has two owners, or one that is to go");
    }

    #[test]
    fn sets_hold_what_was_put_in() {
        let set: SlotSet = [range(0, 0), range(63, 64), range(100, 300), range(16_383, u16::MAX)].into_iter().collect();
        assert_eq!(set.ranges(), [range(0, 0), range(63, 64), range(100, 300), range(16_383, 16_383)]);
        assert_eq!((set.len(), set.contains(64), set.contains(65)), (205, true, false));
        assert_eq!(set.first(3).ranges(), [range(0, 0), range(63, 64)]);
        assert_eq!(format!("{set:?}"), "0-0 63-64 100-300 16383-16383");
        assert_eq!(SlotSet::all().ranges(), [range(0, SLOTS - 1)]);
        assert!(SlotSet::default().is_empty() && !set.is_empty());
    }

    #[test]
    fn even_shares_stay_as_they_are() {
        for shards in 1..40 {
            assert_eq!(transfers(&even(shards), shards), [], "{shards}");
        }
    }

    #[test]
    fn new_shards_get_as_much_as_they_need_and_no_shard_gives_to_another() {
        let moves = transfers(&even(3), 5);
        assert!(moves.iter().all(|transfer| transfer.from < 3 && transfer.to >= 3), "{moves:?}");
        assert_eq!(moving(&moves), 2 * (SLOTS / 5) + 1);
        let back = transfers(&even(5), 3);
        assert!(back.iter().all(|transfer| transfer.from >= 3 && transfer.to < 3), "{back:?}");
        assert_eq!(moving(&back), even(5)[&3].len() + even(5)[&4].len());
    }

    /// Any ownership, in pieces of some slots, over up to nine shards.
    fn ownership() -> impl Strategy<Value = BTreeMap<u16, SlotSet>> {
        let piece = (0u16..9, 1u16..4000);
        prop::collection::vec(piece, 1..40).prop_map(|pieces| {
            let mut owned: BTreeMap<u16, SlotSet> = BTreeMap::new();
            let (mut next, mut pieces) = (0, pieces.into_iter().cycle());
            while next < SLOTS {
                let (shard, length) = pieces.next().unwrap();
                let last = (next + length - 1).min(SLOTS - 1);
                owned.entry(shard).or_default().insert(range(next, last));
                next = last + 1;
            }
            owned
        })
    }

    /// The fewest moves that any assignment with even shares needs, by trying who may own one more.
    fn fewest(owned: &BTreeMap<u16, SlotSet>, shards: u16) -> u16 {
        let (each, left) = (SLOTS / shards, SLOTS % shards);
        let with_more = (0u32..1 << shards).filter(|more| more.count_ones() == u32::from(left));
        let moves = with_more.map(|more| {
            let excess = owned.iter().map(|(shard, slots)| {
                let share = if *shard < shards { each + (more >> shard & 1) as u16 } else { 0 };
                slots.len().saturating_sub(share)
            });
            excess.sum::<u16>()
        });
        moves.min().unwrap()
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]
        #[test]
        fn shares_become_even_with_the_fewest_moves(owned in ownership(), shards in 1u16..9) {
            let moves = transfers(&owned, shards);
            assert_eq!(moves, transfers(&owned, shards), "not the same twice");
            assert_eq!(moving(&moves), fewest(&owned, shards));
            let mut after = owned.clone();
            carry_out(&mut after, &moves, u16::MAX);
            assert_even(&after, shards);
            assert_eq!(transfers(&after, shards), [], "not finished");
        }

        #[test]
        fn what_is_left_after_a_death_is_the_rest(
            owned in ownership(), shards in 1u16..9, deaths in prop::collection::vec(1u16..3000, 1..8),
        ) {
            let mut left = moving(&transfers(&owned, shards));
            let mut now = owned;
            for done in deaths {
                let moves = transfers(&now, shards);
                assert_eq!(moving(&moves), left);
                carry_out(&mut now, &moves, done);
                left = left.saturating_sub(done);
            }
            carry_out(&mut now.clone(), &transfers(&now, shards), u16::MAX);
            assert_eq!(moving(&transfers(&now, shards)), left);
        }
    }
}
