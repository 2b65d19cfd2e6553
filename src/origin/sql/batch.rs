//! Many keys in one query: each distinct key is asked for once, and its answer goes to every place that it came from.

use std::collections::HashMap;

use super::super::Loaded;
use super::super::error::Failure;

/// A key's parts as texts, in the pattern's order; parts that no statement uses are empty.
pub(in crate::origin) type Parts = Vec<String>;
/// A key's answer. `None`: the batch cannot tell, and the key has to be asked for by itself.
pub(in crate::origin) type Answer = Option<Result<Loaded, Failure>>;

/// Keys to ask for together.
#[derive(Debug, Default)]
pub(in crate::origin) struct Batch {
    keys: Vec<Parts>,
    places: HashMap<Parts, usize>,
    /// For each place, the index of its key.
    slots: Vec<Option<usize>>,
}

impl Batch {
    /// The next place asks for `parts`.
    pub(in crate::origin) fn push(&mut self, parts: Parts) {
        let index = *self.places.entry(parts).or_insert_with_key(|parts| {
            self.keys.push(parts.clone());
            self.keys.len() - 1
        });
        self.slots.push(Some(index));
    }

    /// The next place asks for nothing.
    pub(in crate::origin) fn skip(&mut self) {
        self.slots.push(None);
    }

    pub(in crate::origin) fn is_empty(&self) -> bool {
        self.keys.is_empty()
    }

    /// The distinct keys.
    pub(super) fn keys(&self) -> &[Parts] {
        &self.keys
    }

    /// The answers by place, where there are any. `answers` stand in the order of [`Self::keys`].
    pub(in crate::origin) fn spread(&self, answers: Vec<Answer>) -> impl Iterator<Item = (usize, Result<Loaded, Failure>)> {
        self.slots.iter().enumerate().filter_map(move |(place, slot)| Some((place, answers.get((*slot)?)?.clone()?)))
    }
}

/// Matches the rows of an answer to the keys they belong to.
#[derive(Debug)]
pub(super) struct Matching {
    answers: Vec<Answer>,
    by_parts: HashMap<Vec<String>, usize>,
    strangers: bool,
}

impl Matching {
    /// For keys whose part columns hold `expected`; `None` for one that was not asked for, because it cannot exist.
    pub(super) fn new(expected: impl Iterator<Item = Option<Vec<String>>>) -> Self {
        let mut matching = Self { answers: Vec::new(), by_parts: HashMap::new(), strangers: false };
        for (index, parts) in expected.enumerate() {
            matching.answers.push(match parts {
                Some(parts) if !matching.by_parts.contains_key(&parts) => {
                    matching.by_parts.insert(parts, index);
                    None
                }
                // Another key has the same parts in another spelling.
                Some(_) => None,
                None => Some(Ok(Loaded::NotFound)),
            });
        }
        matching
    }

    /// How many keys are asked for.
    pub(super) fn asked(&self) -> usize {
        self.by_parts.len()
    }

    /// Takes a row whose part columns hold `parts`.
    pub(super) fn row(&mut self, parts: Option<Vec<String>>, value: Result<Loaded, Failure>) {
        match parts.and_then(|parts| self.by_parts.get(&parts)) {
            Some(index) => {
                let answer = &mut self.answers[*index];
                *answer = Some(if answer.is_some() { Err(several_rows()) } else { value });
            }
            // The database found equal what is spelt differently, such as names without regard to case.
            None => self.strangers = true,
        }
    }

    /// The answers. Keys without a row do not exist, unless rows belong to none of the keys or `certain` does not hold for the
    /// key's parts: then the key is asked for by itself.
    pub(super) fn finish(mut self, complete: bool, certain: impl Fn(&[String]) -> bool) -> Vec<Answer> {
        if complete && !self.strangers {
            for (_, index) in self.by_parts.iter().filter(|(parts, _)| certain(parts)) {
                self.answers[*index].get_or_insert(Ok(Loaded::NotFound));
            }
        }
        self.answers
    }
}

/// Why a key with more than one row has no value.
pub(super) fn several_rows() -> Failure {
    Failure::Unusable(
        "there is more than one row for a key: make the statement give one, with LIMIT 1 or an aggregate".to_owned(),
    )
}
