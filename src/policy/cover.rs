//! Whether one key pattern covers every key that another covers, and whether some key is covered by both.
//!
//! A pattern is a chain of steps, so as an automaton it has one state per step and loops only where a part may go on. Inclusion
//! is decided exactly, by walking the inner pattern's states together with the set of states that the outer one may be in; what two
//! patterns have in common, by walking pairs of their states.

use std::collections::{BTreeSet, HashMap, HashSet, VecDeque};

use super::pattern::{KeyPattern, Segment};

/// The most pairs of states to look at before giving up, which counts as "not covered".
const MAX_PAIRS: usize = 4096;
/// The byte that stands where both patterns take any.
const ANY_BYTE: u8 = b'x';

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

    /// A byte that both take, if there is one.
    fn common_byte(self, other: Self) -> Option<u8> {
        let byte = match (self, other) {
            (Self::Byte(byte), _) | (_, Self::Byte(byte)) => byte,
            (Self::Part { .. }, Self::Part { .. }) => ANY_BYTE,
        };
        (self.takes(byte) && other.takes(byte)).then_some(byte)
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

    /// The steps that may be taken in `state`, each with the state behind it.
    fn moves(&self, state: usize) -> impl Iterator<Item = (Step, usize)> {
        let before = state.checked_sub(1).and_then(|before| self.steps.get(before));
        let goes_on = before.filter(|step| matches!(step, Step::Part { .. })).map(|step| (*step, state));
        let advances = self.steps.get(state).map(|step| (*step, state + 1));
        goes_on.into_iter().chain(advances)
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

    /// A shortest key that this pattern and `other` both cover. `None`: there is no such key.
    pub fn common_key(&self, other: &KeyPattern) -> Option<Vec<u8>> {
        let (ours, theirs) = (self.literal_prefix(), other.literal_prefix());
        if !ours.starts_with(theirs) && !theirs.starts_with(ours) {
            return None;
        }
        let (left, right) = (Chain::new(self), Chain::new(other));
        // Of each pair of states that is reached, by which byte from where. There are no more pairs than both have bytes, multiplied.
        let mut reached: HashMap<[usize; 2], Option<(u8, [usize; 2])>> = HashMap::from([([0, 0], None)]);
        let mut open = VecDeque::from([[0, 0]]);
        while let Some(pair) = open.pop_front() {
            if left.accepts(pair[0]) && right.accepts(pair[1]) {
                return Some(path_to(pair, &reached));
            }
            for (step, next) in left.moves(pair[0]) {
                for (other_step, other_next) in right.moves(pair[1]) {
                    let Some(byte) = step.common_byte(other_step) else { continue };
                    reached.entry([next, other_next]).or_insert_with(|| {
                        open.push_back([next, other_next]);
                        Some((byte, pair))
                    });
                }
            }
        }
        None
    }
}

/// The bytes that lead to a pair of states.
fn path_to(mut pair: [usize; 2], reached: &HashMap<[usize; 2], Option<(u8, [usize; 2])>>) -> Vec<u8> {
    let mut key = Vec::new();
    while let Some(Some((byte, before))) = reached.get(&pair) {
        key.push(*byte);
        pair = *before;
    }
    key.reverse();
    key
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

    #[test]
    fn what_two_patterns_share_is_shown_by_a_key() {
        for (left, right, key) in [
            ("user:{id}", "user:{name}", Some("user:x")),
            ("user:{id}", "user:7", Some("user:7")),
            ("user:{id}", "user:{id}:cart", None),
            ("user:{id…}", "user:{id}:cart", Some("user:x:cart")),
            ("user:{id}", "order:{id}", None),
            ("{a…}:end", "start:{b}", Some("start:end")),
            ("{a}-x", "y-{b}", Some("y-x")),
            ("{a}:é", "b:{c}", Some("b:é")),
            ("a", "ab", None),
        ] {
            let found = pattern(left).common_key(&pattern(right));
            assert_eq!(found.as_deref(), key.map(str::as_bytes), "{left} and {right}");
        }
    }

    /// Patterns of a few letters, colons and parts.
    fn any_pattern() -> impl Strategy<Value = KeyPattern> {
        prop::collection::vec(0u8..5, 1..7).prop_filter_map("no pattern", |pieces| {
            let piece = |(at, piece): (usize, &u8)| match piece {
                0 => "a".to_owned(),
                1 => "b".to_owned(),
                2 => ":".to_owned(),
                3 => format!("{{p{at}}}"),
                _ => format!("{{p{at}…}}"),
            };
            pieces.iter().enumerate().map(piece).collect::<String>().parse().ok()
        })
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

        #[test]
        fn a_common_key_is_covered_by_both(left in any_pattern(), right in any_pattern()) {
            let found = left.common_key(&right);
            prop_assert_eq!(found.is_some(), right.common_key(&left).is_some());
            prop_assert!(found.is_some() || !left.covers_all_of(&right));
            if let Some(key) = found {
                prop_assert!(left.matches(&key) && right.matches(&key), "{left} and {right}: {key:?}");
            }
        }

        #[test]
        fn no_key_is_covered_by_two_patterns_without_a_common_one(
            left in any_pattern(), right in any_pattern(), keys in prop::collection::vec("[ab:x]{1,8}", 32),
        ) {
            let both = keys.iter().find(|key| left.matches(key.as_bytes()) && right.matches(key.as_bytes()));
            prop_assert!(both.is_none() || left.common_key(&right).is_some(), "{left} and {right}: {both:?}");
        }
    }

    /// The longest patterns with the most parts, which have the most pairs of states.
    #[test]
    fn hostile_patterns_end_soon() {
        let parts: String = ('a'..='g').map(|name| format!("{{{name}…}}{}", "y".repeat(60))).collect();
        let (left, right) = (pattern(&format!("{parts}!")), pattern(&format!("{parts}?")));
        assert_eq!(left.common_key(&right), None);
        assert!(left.common_key(&pattern(&parts)).is_none() && left.common_key(&left).is_some());
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
