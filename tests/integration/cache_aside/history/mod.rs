//! Histories of clients that know nothing of leases, under faults, checked against what the database said.
//!
//! Each key has a row whose version only rises. Its one writer raises it, then deletes the key or sets it, and waits for the reply:
//! from then on nobody may read an older version. Readers do what applications do: read, load on nil, set, over exclusive
//! connections, over pools (the GET and the SET on different connections) and over connections with many commands at once; they
//! are slow, fill twice, not at all, or go away. Meanwhile keys and companions are evicted, connections are cut, sidecars hang and
//! are killed, a server hangs for longer than a lease, and a replica takes over as planned. (What an unplanned failover loses is lost:
//! no history has one.)
//!
//! Values name their key, so that no reply of another goes unnoticed; nothing is waited for without an end; and whatever is looked at
//! on the servers has a TTL.
//!
//! Ten seeds run with the other tests. `make soak` runs many more and writes down what came of them. That the checker can catch is
//! shown by breaking one mechanism at a time on the way between sidecars and servers.

mod faults;
mod readers;
mod run;
mod seen;

use std::path::PathBuf;

use serde_json::json;

use super::{ok, rule};
use crate::read_through::Servers;
use crate::support::resp::encode;
use crate::support::saboteur::Change;
use crate::support::server::{Engine, RedisCluster, SentinelCluster};
use faults::Great;
use run::Run;
use seen::Seen;

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
    let topologies = [
        Servers::Sentinel(SentinelCluster::start(Engine::Valkey9, 1)),
        Servers::Cluster(RedisCluster::start(Engine::Redis7, 3, 1)),
    ];
    topologies.iter().for_each(faults::never_give_up);
    seeds.map(|seed| Run::new(&topologies[(seed % 2) as usize], seed, rule).with(Great::of(seed)).finish()).collect()
}

/// What somebody between sidecars and servers breaks.
const BROKEN: [(&str, &[Change]); 4] = [
    (
        "what was loaded late is stored",
        &[Change { from: "(lease and lease.generation == given and string.sub(given, -8) == run)", to: "given ~= '-'" }],
    ),
    ("what is doubtful is stored", &[Change { from: "valid[i] = given == '*' or", to: "valid[i] = #given == 1 or" }]),
    ("writes and deletions leave the lease", &[Change { from: "$6\r\nUNLINK\r\n", to: "$6\r\nEXISTS\r\n" }]),
    ("replies are those of another key", &[Change { from: "-0\r\n", to: "-1\r\n" }]),
];

#[test]
fn nobody_reads_what_is_older_than_an_acknowledged_write() {
    let seen = Seen::sum(&run(0..SEEDS, &protected()));
    assert_eq!(seen.faults(), Vec::<String>::new());
    // What was not exercised was not shown.
    for (what, count) in [
        ("hits", seen.hits),
        ("fills", seen.fills),
        ("writes", seen.writes),
        ("refused fills", seen.refused.total()),
        ("reads cut short", seen.cut_short),
        ("TTLs", seen.ttls),
    ] {
        assert!(count > SEEDS, "only {count} {what}");
    }
    let great = |which| (0..SEEDS).filter(|seed| Great::of(*seed) == Some(which)).count() as u64;
    assert_eq!((seen.failovers, seen.stops), (great(Great::Failover), great(Great::Stop)));
}

#[test]
fn the_checker_finds_what_plain_cache_aside_gets_wrong() {
    let wrong = (0..20).map(|round| run(round * 2..round * 2 + 2, &bare())).find(|seen| Seen::sum(seen).is_outdated());
    assert!(wrong.is_some(), "40 histories without leases showed nothing outdated");
}

#[test]
fn the_checker_finds_each_mechanism_that_is_broken() {
    for (what, changes) in BROKEN {
        let servers = Servers::sabotaged(changes);
        let found = (0..40).find(|seed| Run::new(&servers, *seed, &without_copies()).finish().is_outdated());
        assert!(servers.changed() > 0, "{what}: the sidecars never sent what was to be changed");
        println!("{what}: found in history {found:?}");
        assert!(found.is_some(), "{what}, and 40 histories showed nothing outdated");
    }
}

#[test]
fn the_checker_finds_keys_for_good_slow_replies_and_strange_errors() {
    let servers = Servers::sentinel();
    let rule = protected();
    let run = Run::new(&servers, 0, &rule);
    let (world, mut client) = (run.world(), servers.holder_of(""));
    let key = &world.rows[0].key;
    let wrong = |what: &str| {
        let seen = std::mem::take(&mut *world.seen.lock().unwrap());
        assert!(matches!(&seen.wrong[..], [wrong] if wrong.contains(what)), "{what}: {:?}", seen.wrong);
    };
    assert_eq!(client.call(&["SET", key, "v"]), ok());
    faults::look_at_ttls(&servers, world, key);
    wrong("has no TTL");
    assert!(world.call(&mut client, &["NEITHER"]).unwrap().is_error());
    wrong("was told: ERR unknown command");
    let long_ago = std::time::Instant::now().checked_sub(run::LONGEST * 2).unwrap();
    world.send(&mut client, &encode(&["PING"])).unwrap();
    world.reply(&mut client, long_ago, &["PING"]).unwrap();
    wrong("took ");
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
    assert_eq!(sum.faults(), Vec::<String>::new());
}
