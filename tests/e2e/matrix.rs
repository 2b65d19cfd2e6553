//! The matrix: which engine meets what, with which storage.

use std::env;

use super::clusters;
use super::disruptions;
use super::install;
use super::report::{self, Line};
use super::tier::{Engine, REDIS_7_0, REDIS_8_0, Tier, VALKEY_8_1, VALKEY_9_1};
use super::writers::Writers;

/// The tiers that may be there at the same time.
pub const TIERS: [&str; 8] =
    ["redis-7-0-e", "redis-7-0-p", "redis-8-0-e", "redis-8-0-p", "valkey-8-1-e", "valkey-8-1-p", "valkey-9-1-e", "valkey-9-1-p"];

/// Whether every engine is to meet everything.
pub fn is_full() -> bool {
    env::var_os("LARDER_E2E_FULL").is_some()
}

/// The tier is made, and disturbed in every way.
pub fn suite(described: Tier) {
    let _cluster = install::cluster();
    let (mut tier, writers) = make(described);
    let failed = disruptions::run_all(&mut tier, &writers);
    writers.remove();
    // What was seen of a failure is told by now; a tier that is left would make tests fail that need the release to themselves.
    tier.delete();
    assert!(failed.is_empty(), "{}", failed.join("\n"));
}

/// The same under Sentinel.
fn disturbed(name: &str, engine: Engine, durable: bool) {
    suite(Tier { durable, ..Tier::of(name, engine) });
}

/// The tier is made, and fails over once by the engine's own command; all of it only with `LARDER_E2E_FULL`.
fn made(name: &str, engine: Engine, durable: bool) {
    if is_full() {
        return disturbed(name, engine, durable);
    }
    let _cluster = install::cluster();
    let (tier, writers) = make(Tier { durable, ..Tier::of(name, engine) });
    disruptions::fail_over(&tier, &writers);
    writers.remove();
    tier.delete();
}

fn make(described: Tier) -> (Tier, Writers) {
    let _others = install::beside_others();
    let (mut tier, took) = described.make();
    report::add(Line { took: Some(took), ..Line::of(&tier, "made and ready") });
    if let Some(shards) = tier.shards {
        clusters::is_formed(&tier, shards).unwrap_or_else(|error| panic!("{error}"));
    }
    let writers = Writers::start(&mut tier);
    (tier, writers)
}

#[test]
fn redis_7_0_ephemeral() {
    disturbed("redis-7-0-e", REDIS_7_0, false);
}

#[test]
fn redis_7_0_persistent() {
    made("redis-7-0-p", REDIS_7_0, true);
}

#[test]
fn redis_8_0_ephemeral() {
    made("redis-8-0-e", REDIS_8_0, false);
}

#[test]
fn redis_8_0_persistent() {
    disturbed("redis-8-0-p", REDIS_8_0, true);
}

#[test]
fn valkey_8_1_ephemeral() {
    made("valkey-8-1-e", VALKEY_8_1, false);
}

#[test]
fn valkey_8_1_persistent() {
    disturbed("valkey-8-1-p", VALKEY_8_1, true);
}

#[test]
fn valkey_9_1_ephemeral() {
    disturbed("valkey-9-1-e", VALKEY_9_1, false);
}

#[test]
fn valkey_9_1_persistent() {
    made("valkey-9-1-p", VALKEY_9_1, true);
}
