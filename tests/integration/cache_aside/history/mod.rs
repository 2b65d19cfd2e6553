//! Histories of clients that know nothing of leases, under faults, checked against what the database said.
//!
//! Each key has a row whose version only rises. Its one writer raises it, then deletes the key or sets it, and waits for the reply:
//! from then on nobody may read an older version. Readers do what applications do: read, load on nil, set, over exclusive
//! connections, over pools (the GET and the SET on different connections) and over connections with many commands at once; they
//! are slow, fill twice, not at all, or go away. Meanwhile keys and companions are evicted, connections are cut, sidecars hang and
//! are killed.
//!
//! Ten seeds run with the other tests. `make soak` runs many more and writes down what came of them. That the checker can catch is
//! shown by breaking one mechanism at a time on the way between sidecars and servers.

mod readers;
mod run;

use std::path::PathBuf;

use serde_json::json;

use super::rule;
use crate::read_through::Servers;
use crate::support::saboteur::Change;
use run::{Run, Seen};

/// Seeds of the usual run, over both topologies.
const SEEDS: u64 = 10;

/// A rule under which a second brings many misses.
fn protected() -> serde_json::Value {
    let ttl = json!({"default": "150ms", "max": "1s", "jitter": "50%"});
    rule(
        "item",
        json!({"lease": "1s", "wait": "150ms", "earlyExpiry": 1.0, "atWaitEnd": "error"}),
        json!({"ttl": ttl, "stale": "100ms"}),
    )
}

/// The same keys and TTLs, where every miss is passed on.
fn bare() -> serde_json::Value {
    let ttl = json!({"default": "150ms", "max": "1s", "jitter": "50%"});
    json!({"name": "item", "keys": "item:{id}", "strategy": {"cacheAside": {"ttl": ttl}}})
}

/// [`protected`] without stale copies, so that nothing but what was loaded late can be outdated.
fn without_copies() -> serde_json::Value {
    let mut rule = protected();
    rule["strategy"]["cacheAside"].as_object_mut().expect("a rule").remove("stale");
    rule
}

/// Runs `seeds`, half of them in each topology.
fn run(seeds: std::ops::Range<u64>, rule: &serde_json::Value) -> Vec<Seen> {
    let topologies = [Servers::sentinel(), Servers::cluster()];
    seeds.map(|seed| Run::new(&topologies[(seed % 2) as usize], seed, rule).finish()).collect()
}

/// What somebody between sidecars and servers breaks.
const BROKEN: [(&str, &[Change]); 3] = [
    (
        "what was loaded late is stored",
        &[Change { from: "(lease and lease.generation == given and string.sub(given, -8) == run)", to: "given ~= '-'" }],
    ),
    ("what is doubtful is stored", &[Change { from: "valid[i] = given == '*' or", to: "valid[i] = #given == 1 or" }]),
    ("writes and deletions leave the lease", &[Change { from: "$6\r\nUNLINK\r\n", to: "$6\r\nEXISTS\r\n" }]),
];

#[test]
fn nobody_reads_what_is_older_than_an_acknowledged_write() {
    let seen = Seen::sum(&run(0..SEEDS, &protected()));
    assert_eq!((seen.wrong, seen.disarmed), (Vec::new(), 0));
    // What was not exercised was not shown.
    for (what, count) in
        [("hits", seen.hits), ("fills", seen.fills), ("writes", seen.writes), ("refused fills", seen.refused.total())]
    {
        assert!(count > SEEDS, "only {count} {what}");
    }
}

#[test]
fn the_checker_finds_what_plain_cache_aside_gets_wrong() {
    let wrong = (0..20).map(|round| run(round * 2..round * 2 + 2, &bare())).find(|seen| !Seen::sum(seen).wrong.is_empty());
    assert!(wrong.is_some(), "40 histories without leases showed nothing outdated");
}

#[test]
fn the_checker_finds_each_mechanism_that_is_broken() {
    for (what, changes) in BROKEN {
        let servers = Servers::sabotaged(changes);
        let found = (0..40).find(|seed| !Run::new(&servers, *seed, &without_copies()).finish().wrong.is_empty());
        assert!(servers.changed() > 0, "{what}: the sidecars never sent what was to be changed");
        println!("{what}: found in history {found:?}");
        assert!(found.is_some(), "{what}, and 40 histories showed nothing outdated");
    }
}

/// As many seeds as `LARDER_SOAK_SEEDS` says; the outcome goes to the file `LARDER_SOAK_REPORT`.
#[test]
#[ignore = "`make soak` runs it"]
fn soak() {
    let variable = |name: &str| std::env::var(name).ok();
    let seeds = variable("LARDER_SOAK_SEEDS").and_then(|text| text.parse().ok()).unwrap_or(200);
    let began = std::time::Instant::now();
    let all = run(1000..1000 + seeds, &protected());
    let sum = Seen::sum(&all);
    if let Some(file) = variable("LARDER_SOAK_REPORT").map(PathBuf::from) {
        std::fs::write(&file, sum.report(seeds, began.elapsed())).unwrap_or_else(|error| panic!("{}: {error}", file.display()));
    }
    assert_eq!((sum.wrong, sum.disarmed), (Vec::new(), 0));
}
