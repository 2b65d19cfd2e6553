//! Whether one key pattern covers every key that another covers.
//!
//! A pattern is a chain of steps, so as an automaton it has one state per step and loops only where a part may go on. Inclusion
//! is decided exactly, by walking the inner pattern's states together with the set of states that the outer one may be in.

use std::collections::{BTreeSet, HashSet};

use super::pattern::{KeyPattern, Segment};

/// The most pairs of states to look at before giving up, which counts as "not covered".
const MAX_PAIRS: usize = 4096;

#[derive(Clone, Copy, PartialEq, Eq)]
enum Step {
    Byte(u8),
    /// One or more bytes; without `:` where `any` is false.
    Part {
        any: bool,
    },
}

impl Step {
    fn takes(self, byte: u8) -> bool {
        match self {
            Self::Byte(wanted) => wanted == byte,
            Self::Part { any } => any || byte != b':',
        }
    }
}

/// A pattern as steps. State `i` stands before step `i`; the last state accepts.
struct Chain {
    steps: Vec<Step>,
}

impl Chain {
    fn new(pattern: &KeyPattern) -> Self {
        let mut steps = Vec::new();
        for segment in &pattern.segments {
            match segment {
                Segment::Literal(bytes) => steps.extend(bytes.iter().map(|byte| Step::Byte(*byte))),
                Segment::Part { any, .. } => steps.push(Step::Part { any: *any }),
            }
        }
        Self { steps }
    }

    /// The states after `byte` in `state`: the next one, and this one where the part before it may go on.
    fn next(&self, state: usize, byte: u8) -> impl Iterator<Item = usize> {
        let goes_on = state
            .checked_sub(1)
            .and_then(|before| self.steps.get(before))
            .is_some_and(|step| matches!(step, Step::Part { .. }) && step.takes(byte));
        let advances = self.steps.get(state).is_some_and(|step| step.takes(byte));
        goes_on.then_some(state).into_iter().chain(advances.then_some(state + 1))
    }

    fn accepts(&self, state: usize) -> bool {
        state == self.steps.len()
    }
}

/// One byte of each kind that the two patterns tell apart.
fn alphabet(chains: [&Chain; 2]) -> Vec<u8> {
    let literals = chains.iter().flat_map(|chain| &chain.steps).filter_map(|step| match step {
        Step::Byte(byte) => Some(*byte),
        Step::Part { .. } => None,
    });
    let mut bytes: BTreeSet<u8> = literals.chain([b':']).collect();
    bytes.extend((0..=u8::MAX).find(|byte| !bytes.contains(byte)));
    bytes.into_iter().collect()
}

impl KeyPattern {
    /// Whether this pattern covers every key that `other` covers. `false` also where that would take too long to find out.
    pub fn covers_all_of(&self, other: &KeyPattern) -> bool {
        let (outer, inner) = (Chain::new(self), Chain::new(other));
        let alphabet = alphabet([&outer, &inner]);
        let start = (0, vec![0]);
        let mut seen = HashSet::from([start.clone()]);
        let mut open = vec![start];
        while let Some((at, around)) = open.pop() {
            for byte in &alphabet {
                let after: BTreeSet<usize> = around.iter().flat_map(|state| outer.next(*state, *byte)).collect();
                for next in inner.next(at, *byte) {
                    // From each state of the inner chain some key is accepted, so an outer pattern with no state left misses it.
                    let missed = inner.accepts(next) && !after.iter().any(|state| outer.accepts(*state));
                    if after.is_empty() || missed || seen.len() > MAX_PAIRS {
                        return false;
                    }
                    let pair = (next, after.iter().copied().collect::<Vec<_>>());
                    if seen.insert(pair.clone()) {
                        open.push(pair);
                    }
                }
            }
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn pattern(text: &str) -> KeyPattern {
        text.parse().expect("a valid pattern")
    }

    #[track_caller]
    fn check(outer: &str, inner: &str, covered: bool) {
        assert_eq!(pattern(outer).covers_all_of(&pattern(inner)), covered, "{outer} over {inner}");
    }

    #[test]
    fn inclusion_is_exact() {
        check("user:{id}", "user:{name}", true);
        check("user:{id}", "user:7", true);
        check("user:{id}", "user:7:x", false);
        check("user:{id…}", "user:{a}:{b}", true);
        check("user:{a}:{b}", "user:{id…}", false);
        check("{x}", "user", true);
        check("{x}", "user:{id}", false);
        check("{x…}", "user:{id}", true);
        check("{a}-{b}", "{x}-{y}-{z}", true);
        check("{x}-{y}-{z}", "{a}-{b}", false);
        check("{a…}:end", "{b}:{c}:end", true);
        check("a{x}", "ab", true);
        check("ab", "a{x}", false);
    }

    const POOL: [&str; 10] = ["a:{x}", "a:b", "a:{x}:{y}", "ab:{x}", "{x}", "{x…}", "b{x}", "a{x…}", "{x}-{y}", "{x…}b"];

    proptest! {
        #[test]
        fn no_key_refutes_a_claimed_inclusion(outer in 0..POOL.len(), inner in 0..POOL.len(), key in "[ab:-]{0,6}") {
            let (outer, inner) = (pattern(POOL[outer]), pattern(POOL[inner]));
            if outer.covers_all_of(&inner) && inner.matches(key.as_bytes()) {
                prop_assert!(outer.matches(key.as_bytes()));
            }
        }
    }

    /// Short keys over the letters that the pool tells apart decide every pair of it.
    #[test]
    fn every_denied_inclusion_has_a_counterexample() {
        let mut keys = vec![String::new()];
        for length in 0..5 {
            let longest: Vec<String> = keys.iter().filter(|key| key.len() == length).cloned().collect();
            keys.extend(longest.iter().flat_map(|key| "ab:-".chars().map(move |letter| format!("{key}{letter}"))));
        }
        for outer in POOL.map(pattern) {
            for inner in POOL.map(pattern) {
                let refuted = keys.iter().any(|key| inner.matches(key.as_bytes()) && !outer.matches(key.as_bytes()));
                assert_eq!(!refuted, outer.covers_all_of(&inner), "{outer} over {inner}");
            }
        }
    }
}
