//! The scanners against an independent decoder, `redis-protocol`, over mutated commands and replies: the same verdict and the same
//! length, or a difference that is explained here. And the sidecar against a bare server, over mutated commands.
//!
//! `LARDER_FUZZ_CASES` sets how many cases each test of a scanner tries, `LARDER_FUZZ_SEED` which.

mod commands;
mod corpus;
mod mutation;
mod replies;

use std::collections::BTreeMap;

use self::mutation::Mutator;

/// How many cases each test of a scanner tries where the environment does not say.
const CASES: usize = 200_000;

/// What the front of a buffer is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Verdict {
    /// A whole frame of so many bytes.
    Whole(usize),
    /// The start of one.
    More,
    Refused,
}

fn from_environment(name: &str, default: usize) -> usize {
    std::env::var(name).map_or(default, |value| value.parse().unwrap_or_else(|error| panic!("{name}={value}: {error}")))
}

/// Runs `check` over `seeds` and mutations of them, and counts what it says: the reason of a difference, or nothing.
fn fuzz(seeds: &[Vec<u8>], check: impl Fn(&[u8]) -> Option<&'static str>) {
    let cases = from_environment("LARDER_FUZZ_CASES", CASES);
    let mut mutator = Mutator::new(seeds, from_environment("LARDER_FUZZ_SEED", 1) as u64);
    let (mut same, mut reasons) = (0, BTreeMap::new());
    for _ in 0..cases {
        match check(&mutator.next()) {
            None => same += 1,
            Some(reason) => *reasons.entry(reason).or_insert(0) += 1,
        }
    }
    println!("{same} of {cases} are the same; explained: {reasons:#?}");
    assert!(same * 3 > cases * 2, "too few cases are the same to show anything");
}

/// Looks at ever longer starts of `case`, as if it trickled in. The last verdict, or the first that is final.
fn trickle(case: &[u8], mut look: impl FnMut(&[u8]) -> Verdict) -> Verdict {
    let step = 1 + case.len() % 13;
    let ends = (0..case.len()).step_by(step).chain([case.len()]);
    ends.map(|end| look(&case[..end])).find(|verdict| *verdict != Verdict::More).unwrap_or(Verdict::More)
}
