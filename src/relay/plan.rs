//! What is told of a batch of a journal, and in which parts: the last write of each key, in the journal's order, halved where the origin
//! refuses, until the entry is found that it will not have.
//!
//! Pure: it says what is to be done, and is told what came of it.
//!
//! An entry that an origin refuses becomes a dead letter, and the write of the same key before it in the batch, which it had made needless,
//! is told in its place: at its position, since that before may be passed already. The dead letter comes first. So wherever the relay
//! dies, the next one finds the refused entry refused again, or its successor told.

use std::collections::{HashMap, VecDeque};

/// An entry of a batch, as far as it matters here.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Item {
    /// Its place in the journal. Rises from one entry to the next.
    pub version: u64,
    /// The key that it writes.
    pub key: Vec<u8>,
    /// Which of the origins it is for.
    pub origin: usize,
}

/// What is known of an origin when a batch is planned.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Account {
    /// It keeps a position, up to which it has everything; a batch is told in one transaction.
    Kept(u64),
    /// It keeps none: entries are told one by one, so many at once.
    None {
        /// At least one.
        at_once: usize,
    },
}

/// An entry that is told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Told {
    /// Its index in the batch.
    pub index: usize,
    /// As which version it is told: its own, or that of the refused entry whose place it takes.
    pub at: u64,
}

/// What is to be done next.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step<'a> {
    /// The origin is told these. Of an origin with an account all or none are made.
    Tell {
        /// Whom.
        origin: usize,
        /// What, in order of `at`.
        entries: &'a [Told],
    },
    /// This entry becomes a dead letter.
    Park {
        /// Its index in the batch.
        index: usize,
        /// What the origin said of it.
        why: &'a str,
    },
    /// Everything is made or a dead letter. The entries, by index, that their origin has as the last of their keys.
    Finish(&'a [usize]),
}

#[derive(Debug)]
struct Piece {
    origin: usize,
    entries: Vec<Told>,
}

/// How far a batch is.
#[derive(Debug)]
pub struct Plan {
    items: Vec<Item>,
    /// Of each key the entries that are not refused, in order.
    chains: HashMap<Vec<u8>, Vec<usize>>,
    pieces: VecDeque<Piece>,
    refused: VecDeque<(Told, String)>,
    made: Vec<usize>,
    splits: u64,
}

impl Plan {
    /// Plans a batch. `accounts` stand by the items' origins; `is_parked` tells of entries that an origin has passed whether they are dead
    /// letters.
    pub fn new(items: Vec<Item>, accounts: &[Account], is_parked: impl Fn(&Item) -> bool) -> Self {
        let mut chains: HashMap<Vec<u8>, Vec<usize>> = HashMap::new();
        for (index, item) in items.iter().enumerate() {
            chains.entry(item.key.clone()).or_default().push(index);
        }
        let mut last: Vec<usize> = chains.values().filter_map(|chain| chain.last().copied()).collect();
        last.sort_unstable();
        let mut plan = Self { items, chains, pieces: VecDeque::new(), refused: VecDeque::new(), made: Vec::new(), splits: 0 };
        let mut by_origin: Vec<Vec<Told>> = vec![Vec::new(); accounts.len()];
        for index in last {
            let item = &plan.items[index];
            let Some(account) = accounts.get(item.origin) else { continue };
            let is_passed = matches!(account, Account::Kept(position) if item.version <= *position);
            if !is_passed {
                by_origin[item.origin].push(Told { index, at: item.version });
            } else if !is_parked(item) {
                plan.made.push(index);
            }
        }
        for (origin, entries) in by_origin.into_iter().enumerate().filter(|(_, entries)| !entries.is_empty()) {
            let size = match accounts[origin] {
                Account::Kept(_) => entries.len(),
                Account::None { at_once } => at_once.max(1),
            };
            plan.pieces.extend(entries.chunks(size).map(|chunk| Piece { origin, entries: chunk.to_vec() }));
        }
        plan
    }

    /// What is to be done next. It stays the same until it is told what came of it.
    pub fn next(&self) -> Step<'_> {
        match (self.refused.front(), self.pieces.front()) {
            (Some((told, why)), _) => Step::Park { index: told.index, why },
            (None, Some(piece)) => Step::Tell { origin: piece.origin, entries: &piece.entries },
            (None, None) => Step::Finish(&self.made),
        }
    }

    /// The origin has what it was told.
    pub fn told(&mut self) {
        let piece = self.pieces.pop_front();
        self.made.extend(piece.iter().flat_map(|piece| &piece.entries).map(|told| told.index));
    }

    /// The origin refuses what it was told, all of it, since one entry of it at least will not do.
    pub fn refused(&mut self, why: &str) {
        let Some(Piece { origin, mut entries }) = self.pieces.pop_front() else { return };
        if let [only] = entries[..] {
            self.refused.push_back((only, why.to_owned()));
            return;
        }
        self.splits += 1;
        let rest = entries.split_off(entries.len() / 2);
        self.pieces.push_front(Piece { origin, entries: rest });
        self.pieces.push_front(Piece { origin, entries });
    }

    /// What came of each entry that an origin without an account was told; a text is why it refuses. What is missing is told again.
    pub fn told_each(&mut self, outcomes: Vec<Option<Result<(), String>>>) {
        let Some(Piece { origin, entries }) = self.pieces.pop_front() else { return };
        let mut open = Vec::new();
        let outcomes = outcomes.into_iter().chain(std::iter::repeat(None));
        for (told, outcome) in entries.into_iter().zip(outcomes) {
            match outcome {
                Some(Ok(())) => self.made.push(told.index),
                Some(Err(why)) => self.refused.push_back((told, why)),
                None => open.push(told),
            }
        }
        if !open.is_empty() {
            self.pieces.push_front(Piece { origin, entries: open });
        }
    }

    /// The entry is a dead letter: what it had made needless is told in its place.
    pub fn parked(&mut self) {
        let Some((told, _)) = self.refused.pop_front() else { return };
        let Some(item) = self.items.get(told.index) else { return };
        let Some(chain) = self.chains.get_mut(&item.key) else { return };
        chain.retain(|index| *index < told.index);
        if let Some(index) = chain.last() {
            self.pieces.push_front(Piece { origin: item.origin, entries: vec![Told { index: *index, at: told.at }] });
        }
    }

    /// How often a batch was halved.
    pub fn splits(&self) -> u64 {
        self.splits
    }
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, HashSet};

    use proptest::prelude::*;

    use super::*;

    fn item(version: u64, key: u8) -> Item {
        Item { version, key: vec![key], origin: 0 }
    }

    /// What an origin has, and what became dead letters, when it refuses the versions in `poison`.
    #[derive(Debug, Default, PartialEq, Eq)]
    struct Ended {
        rows: BTreeMap<u8, u64>,
        parked: Vec<u64>,
        made: BTreeMap<u8, u64>,
        asked: usize,
        position: u64,
    }

    fn run(items: &[Item], position: u64, poison: &HashSet<u64>) -> Ended {
        let mut plan = Plan::new(items.to_vec(), &[Account::Kept(position)], |_| false);
        let mut ended = Ended { position, ..Ended::default() };
        loop {
            match plan.next() {
                Step::Tell { entries, .. } => {
                    ended.asked += 1;
                    assert!(ended.asked < 4 * items.len() + 4, "it comes to an end");
                    if entries.iter().any(|told| poison.contains(&items[told.index].version)) {
                        plan.refused("it will not do");
                        continue;
                    }
                    for told in entries {
                        assert!(told.at > ended.position, "an account would pass over {told:?}");
                        ended.position = told.at;
                        ended.rows.insert(items[told.index].key[0], items[told.index].version);
                    }
                    plan.told();
                }
                Step::Park { index, .. } => {
                    ended.parked.push(items[index].version);
                    plan.parked();
                }
                Step::Finish(made) => {
                    ended.made = made.iter().map(|index| (items[*index].key[0], items[*index].version)).collect();
                    return ended;
                }
            }
        }
    }

    #[test]
    fn the_last_write_of_each_key_is_told_at_once() {
        let items = [item(1, 7), item(2, 8), item(3, 7), item(4, 7)];
        let ended = run(&items, 0, &HashSet::new());
        assert_eq!((ended.rows, ended.asked), (BTreeMap::from([(7, 4), (8, 2)]), 1));
    }

    #[test]
    fn what_a_refused_write_made_needless_is_told_in_its_place() {
        let items = [item(1, 7), item(2, 8), item(3, 7)];
        let ended = run(&items, 0, &HashSet::from([3]));
        assert_eq!((ended.rows, ended.parked), (BTreeMap::from([(7, 1), (8, 2)]), vec![3]));
    }

    #[test]
    fn what_an_origin_has_passed_is_not_told_and_stays_dirty_as_a_dead_letter() {
        let items = vec![item(1, 7), item(2, 8), item(3, 9)];
        let plan = Plan::new(items, &[Account::Kept(2)], |item| item.version == 1);
        assert_eq!(plan.next(), Step::Tell { origin: 0, entries: &[Told { index: 2, at: 3 }] });
        assert_eq!(plan.made, [1]);
    }

    #[test]
    fn an_origin_without_an_account_is_told_entry_by_entry() {
        let mut plan = Plan::new((0..5).map(|n| item(n + 1, n as u8)).collect(), &[Account::None { at_once: 2 }], |_| false);
        let told = |plan: &Plan| match plan.next() {
            Step::Tell { entries, .. } => entries.iter().map(|told| told.index).collect::<Vec<_>>(),
            other => panic!("{other:?}"),
        };
        assert_eq!(told(&plan), [0, 1]);
        plan.told_each(vec![Some(Err("no".to_owned())), None]);
        assert_eq!(plan.next(), Step::Park { index: 0, why: "no" });
        plan.parked();
        assert_eq!(told(&plan), [1]);
        plan.told_each(vec![Some(Ok(()))]);
        assert_eq!(told(&plan), [2, 3]);
        plan.told_each(vec![]);
        assert_eq!(told(&plan), [2, 3], "what was not answered is told again");
    }

    proptest! {
        /// Whatever is refused: the origin ends with the last write of each key that it will have, everything refused up to there is a
        /// dead letter, and nothing else is.
        #[test]
        fn an_origin_ends_as_if_told_one_by_one(
            keys in proptest::collection::vec(0u8..6, 1..40),
            poison in proptest::collection::hash_set(1u64..40, 0..12),
        ) {
            let items: Vec<Item> = keys.iter().zip(1..).map(|(key, version)| item(version, *key)).collect();
            let ended = run(&items, 0, &poison);
            let mut rows = BTreeMap::new();
            for item in items.iter().filter(|item| !poison.contains(&item.version)) {
                rows.insert(item.key[0], item.version);
            }
            prop_assert_eq!(&ended.rows, &rows);
            prop_assert_eq!(&ended.made, &rows);
            // A refused write with a good one of its key behind it was never told: that one supersedes it.
            let mut parked: Vec<u64> = items.iter()
                .filter(|item| poison.contains(&item.version) && rows.get(&item.key[0]).is_none_or(|row| *row < item.version))
                .map(|item| item.version).collect();
            let mut found = ended.parked.clone();
            parked.sort_unstable();
            found.sort_unstable();
            prop_assert_eq!(found, parked);
        }

        /// One refused entry among many is found in as many steps as halving takes.
        #[test]
        fn halving_finds_a_refused_entry(count in 1usize..300, at in any::<prop::sample::Index>()) {
            let items: Vec<Item> = (0..count).map(|n| Item { key: n.to_be_bytes().to_vec(), ..item(n as u64 + 1, 0) }).collect();
            let mut plan = Plan::new(items, &[Account::Kept(0)], |_| false);
            let (bad, mut asked) = (at.index(count), 0);
            while let Step::Tell { entries, .. } = plan.next() {
                asked += 1;
                if entries.iter().any(|told| told.index == bad) { plan.refused("no") } else { plan.told() }
            }
            let found = matches!(plan.next(), Step::Park { index, .. } if index == bad);
            prop_assert!(found);
            prop_assert!(asked <= 2 * (count.ilog2() as usize + 2), "{asked} of {count}");
        }
    }
}
