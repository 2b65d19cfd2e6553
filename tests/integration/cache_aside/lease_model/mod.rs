//! The model that the simulation of the lease engine runs against, held to the scripts and transactions of the sidecar on real servers.
//!
//! Random histories are played on a server and in the model side by side. Where they differ, a shorter history that shows it is looked
//! for and printed. `CASES=5000 cargo test --test integration lease_model` plays more.

mod breaks;
mod commands;
mod pair;
mod server;
mod steps;

use std::cell::RefCell;
use std::collections::BTreeSet;

use larder::sidecar::slots;
use proptest::test_runner::{Config, RngAlgorithm, TestCaseError, TestError, TestRng, TestRunner};

use self::breaks::Break;
use self::pair::Pair;
use self::server::Server;
use crate::support::server::{Engine, Redis, RedisCluster};

/// So many histories in each topology, of some forty steps.
fn cases() -> u32 {
    std::env::var("CASES").ok().and_then(|count| count.parse().ok()).unwrap_or(100)
}

/// How often a difference is looked for in a shorter history.
const MOST_SHRINKS: u32 = 5_000;

/// Plays `cases` histories. What differs first, if anything does; and what happened at all.
fn play(server: &Redis, broken: Break, cases: u32, shrinks: u32) -> (Result<(), String>, BTreeSet<String>) {
    let pair = RefCell::new(Pair::new(Server::new(server, broken)));
    let config = Config { cases, failure_persistence: None, max_shrink_iters: shrinks, ..Config::default() };
    let mut runner = TestRunner::new_with_rng(config, TestRng::from_seed(RngAlgorithm::ChaCha, &[7; 32]));
    let outcome = runner.run(&steps::steps(), |steps| pair.borrow_mut().play(&steps).map_err(TestCaseError::fail));
    let outcome = outcome.map_err(|error| match error {
        TestError::Fail(reason, steps) => {
            let steps: Vec<String> = steps.iter().map(|step| format!("    {step:?}\n")).collect();
            format!("after\n{}{reason}", steps.concat())
        }
        TestError::Abort(reason) => reason.to_string(),
    });
    (outcome, pair.into_inner().met)
}

/// What must have happened, or nothing was shown of it.
const WANTED: &[&str] = &[
    "a value at a miss",
    "fresh early",
    "leased at a miss",
    "leased, with a copy, at a miss",
    "leased early",
    "busy at a miss",
    "busy, with a copy, at a miss",
    "busy early",
    "shared at a miss",
    "taken once given back",
    "taken once over",
    "held on under another generation",
    "Stored as a SET",
    "Stored on a condition",
    "Removed as a SET",
    "Removed on a condition",
    "Unchanged on a condition",
    "many, stored",
    "many, refused",
    "FILL_IF: true",
    "FILL_IF: false",
    "RELEASE: true",
    "RELEASE: false",
    "an end announced by BEGIN",
    "an end announced by FILL",
    "an end announced by FILL of many",
    "an end announced by FILL_IF",
    "an end announced by RELEASE",
];

fn hold(servers: &[&Redis], cases: u32) {
    let mut met = BTreeSet::new();
    for server in servers {
        let (outcome, own) = play(server, Break::Nothing, cases, MOST_SHRINKS);
        if let Err(text) = outcome {
            panic!("{:?}: {text}", server.engine());
        }
        met.extend(own);
    }
    let missing: Vec<&&str> = WANTED.iter().filter(|wanted| !met.contains(**wanted)).collect();
    assert!(missing.is_empty(), "{missing:?} did not happen, but {met:#?}");
}

#[test]
fn the_model_does_what_the_scripts_do() {
    let servers = Engine::ALL.map(Redis::start);
    hold(&servers.each_ref(), cases());
}

#[test]
fn the_model_does_what_the_scripts_do_in_cluster_mode() {
    let clusters = Engine::ALL.map(|engine| RedisCluster::start(engine, 3, 0));
    hold(&clusters.each_ref().map(|cluster| cluster.owner(slots::slot_of(steps::OTHER.as_bytes()))), cases());
}

#[test]
fn whatever_differs_is_noticed() {
    let servers = Engine::ALL.map(Redis::start);
    for (at, (what, broken)) in breaks::ALL.into_iter().enumerate() {
        let (outcome, _) = play(&servers[at % 2], broken, 10 * cases(), 0);
        let Err(text) = outcome else { panic!("{what}, and nothing differs") };
        let differs = text.lines().last().unwrap_or_default();
        println!("{what}: {differs}");
        assert!(!differs.contains("ERR "), "{what}: that is no script any more: {differs}");
    }
}
