//! End-to-end tests on a Kubernetes cluster: the chart is installed, caches are made, disturbed and judged by what clients see.
//!
//! `make e2e` builds the images, makes a cluster where KUBECONFIG names none, and runs them. The matrix is pairwise: each engine meets
//! every disruption, each disruption meets both kinds of storage, and each engine both kinds of storage.
//!
//! | engine | every disruption | made and served |
//! |---|---|---|
//! | Redis 7.0 | ephemeral | persistent |
//! | Redis 8.0 | persistent | ephemeral |
//! | Valkey 8.1 | persistent | ephemeral |
//! | Valkey 9.1 | ephemeral | persistent |
//!
//! With `LARDER_E2E_FULL=1` (`make e2e-full`) every engine meets every disruption with both. `LARDER_E2E_CASES=a,b` runs the disruptions whose
//! names contain one of the parts.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::print_stdout, clippy::print_stderr)]

mod cluster;
mod disruptions;
mod encrypted;
mod install;
mod refusals;
mod report;
mod tier;
mod trouble;
mod uninstall;
mod writers;

use std::env;

use report::Line;
use tier::{Engine, REDIS_7_0, REDIS_8_0, Tier, VALKEY_8_1, VALKEY_9_1};
use writers::Writers;

/// The tier is made, and disturbed in every way.
fn suite(name: &str, engine: Engine, durable: bool) {
    let _cluster = install::cluster();
    let (mut tier, took) = Tier::create(name, engine, durable);
    let made = format!("made and ready within {} s", took.as_secs());
    report::add(Line { tier: name.to_owned(), case: made, report: None, problem: None });
    let writers = Writers::start(&tier);
    let failed = disruptions::run_all(&mut tier, &writers);
    writers.remove();
    if failed.is_empty() {
        tier.delete();
    }
    assert!(failed.is_empty(), "{}", failed.join("\n"));
}

/// The tier is made, and fails over once by the engine's own command; all of it only with `LARDER_E2E_FULL`.
fn made(name: &str, engine: Engine, durable: bool) {
    if env::var_os("LARDER_E2E_FULL").is_some() {
        return suite(name, engine, durable);
    }
    let _cluster = install::cluster();
    let (tier, took) = Tier::create(name, engine, durable);
    let made = format!("made and ready within {} s", took.as_secs());
    report::add(Line { tier: name.to_owned(), case: made, report: None, problem: None });
    let writers = Writers::start(&tier);
    disruptions::floor(&tier, &writers);
    writers.remove();
    tier.delete();
}

#[test]
fn redis_7_0_ephemeral() {
    suite("redis-7-0-e", REDIS_7_0, false);
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
    suite("redis-8-0-p", REDIS_8_0, true);
}

#[test]
fn valkey_8_1_ephemeral() {
    made("valkey-8-1-e", VALKEY_8_1, false);
}

#[test]
fn valkey_8_1_persistent() {
    suite("valkey-8-1-p", VALKEY_8_1, true);
}

#[test]
fn valkey_9_1_ephemeral() {
    suite("valkey-9-1-e", VALKEY_9_1, false);
}

#[test]
fn valkey_9_1_persistent() {
    made("valkey-9-1-p", VALKEY_9_1, true);
}
