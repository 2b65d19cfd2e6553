//! The sweep: repairs covered keys without a TTL, however they came about.
//!
//! What the sidecar forwards keeps its keys' TTLs in the same transaction. What it does not see does not: scripts that write
//! undeclared keys, writers that bypass it, keys older than the policy. So one sidecar of each binding, by a lease in the cache,
//! walks all keys of all shards within each period, and gives a TTL to each covered key that has none. `PEXPIRE … NX` does nothing
//! to a key that has one. Bindings walk one after another: a server answers one walk at a time, however many bindings it has.

use std::rc::Rc;
use std::time::Duration;

use futures_util::future::join_all;
use tokio::time::{Instant, sleep};

use super::resp::reply;
use super::slots;
use super::upstream::ask::ask_node;
use super::upstream::queue::ANY_SLOT;
use super::upstream::router::Node;
use super::worker::Worker;
use crate::policy::binding::BindingName;

/// Held by the sidecar that sweeps, of all without a binding. It ends by itself a little before the next sweep is due.
const LEASE: &str = "larder:sweep";
/// Held by whoever walks the keys, of whichever binding.
const TURN: &[u8] = b"larder:sweeps";
/// For how long a turn is held that nobody gives back, at the most and at the least.
const TURN_FOR: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(30));
/// How many keys a step looks at, about.
const KEYS_PER_STEP: &[u8] = b"200";
/// How often the policy is looked at for another period.
const LOOK: Duration = Duration::from_secs(1);
/// The pause between steps: a few thousand keys a second cost a server little, and no client notices a step.
const PAUSE: Duration = Duration::from_millis(20);
/// The sweep may take half of the period; where there are more keys than that allows, steps follow each other without pause.
const SHARE_OF_PERIOD: u32 = 2;

/// The lease by which one sidecar of all those of a binding sweeps, or of those without one.
pub fn lease(binding: Option<&BindingName>) -> String {
    binding.map_or_else(|| LEASE.to_owned(), BindingName::sweep_key)
}

/// Sweeps once in each period, for ever. One worker of each sidecar runs it; the lease picks one sidecar.
pub async fn sweep_forever(worker: Rc<Worker>, lease: String) {
    loop {
        let period = wait_for_turn(&worker).await;
        if worker.policy().covers_anything() && take(&worker, lease.as_bytes(), period / 2).await {
            let repaired = sweep(&worker, period).await;
            if repaired > 0 {
                tracing::warn!(repaired, "keys without a TTL were given one: something writes them past the sidecar");
            }
        }
    }
}

/// Waits for a quarter to half of the period, which may change meanwhile. The period.
async fn wait_for_turn(worker: &Rc<Worker>) -> Duration {
    let began = Instant::now();
    // All sidecars of a fleet start at once; their sweeps should not.
    let share = 0.25 + f64::from(worker.random()) / f64::from(u32::MAX) / 4.0;
    loop {
        let period = worker.policy().ttl_sweep().as_duration();
        let left = period.mul_f64(share).saturating_sub(began.elapsed());
        if left.is_zero() {
            return period;
        }
        sleep(left.min(LOOK)).await;
    }
}

/// Takes a key that others would take as well, for so long. Whether it was free.
async fn take(worker: &Rc<Worker>, key: &[u8], length: Duration) -> bool {
    let millis = length.as_millis().to_string();
    let Some(node) = owner(worker, key) else { return false };
    let taken = ask(worker, &node, 0, &[b"SET", key, b"1", b"NX", b"PX", millis.as_bytes()]).await;
    taken.as_deref() == Some(b"+OK\r\n")
}

fn owner(worker: &Rc<Worker>, key: &[u8]) -> Option<Rc<Node>> {
    let slot = if worker.is_cluster() { slots::slot_of(key) } else { ANY_SLOT };
    worker.router().node_of(slot)
}

/// Walks all shards at once, when nobody else walks. How many keys were given a TTL.
async fn sweep(worker: &Rc<Worker>, period: Duration) -> u64 {
    let until = Instant::now() + period / SHARE_OF_PERIOD;
    let held = (period / 4).clamp(TURN_FOR.0, TURN_FOR.1);
    while !take(worker, TURN, held).await {
        if Instant::now() >= until {
            // Others took all of the time; the next sweep begins anew.
            return 0;
        }
        sleep(LOOK.mul_f64(0.5 + f64::from(worker.random()) / f64::from(u32::MAX))).await;
    }
    let nodes = worker.router().primaries();
    let walk = join_all(nodes.iter().map(|node| sweep_node(worker, node, until)));
    let repaired = tokio::select! {
        repaired = walk => repaired.into_iter().sum(),
        () = keep_turn(worker, held) => 0,
    };
    if let Some(node) = owner(worker, TURN) {
        let _ = ask(worker, &node, 0, &[b"DEL", TURN]).await;
    }
    repaired
}

/// Holds the turn for as long as it is asked to.
async fn keep_turn(worker: &Rc<Worker>, held: Duration) {
    let millis = held.as_millis().to_string();
    loop {
        sleep(held / 3).await;
        if let Some(node) = owner(worker, TURN) {
            let _ = ask(worker, &node, 0, &[b"PEXPIRE", TURN, millis.as_bytes()]).await;
        }
    }
}

/// Walks one shard and all its databases, each to its end or until it does not answer: the next sweep begins anew.
async fn sweep_node(worker: &Rc<Worker>, node: &Rc<Node>, until: Instant) -> u64 {
    let mut repaired = 0;
    for database in databases(worker, node).await {
        repaired += sweep_database(worker, node, database, until).await;
    }
    repaired
}

/// The databases that hold keys. A Cluster has one.
pub async fn databases(worker: &Rc<Worker>, node: &Rc<Node>) -> Vec<u8> {
    if worker.is_cluster() {
        return vec![0];
    }
    let keyspace = ask(worker, node, 0, &[b"INFO", b"keyspace"]).await.unwrap_or_default();
    let text = String::from_utf8_lossy(&keyspace).into_owned();
    text.lines().filter_map(|line| line.strip_prefix("db")?.split(':').next()?.parse().ok()).collect()
}

async fn sweep_database(worker: &Rc<Worker>, node: &Rc<Node>, database: u8, until: Instant) -> u64 {
    let mut cursor = b"0".to_vec();
    let mut repaired = 0;
    loop {
        let Some(page) = ask(worker, node, database, &[b"SCAN", &cursor, b"COUNT", KEYS_PER_STEP]).await else { return repaired };
        let Some([next, keys]) = reply::elements(&page).and_then(|parts| <[&[u8]; 2]>::try_from(parts).ok()) else {
            return repaired;
        };
        let keys = reply::elements(keys).unwrap_or_default();
        repaired += repair(worker, node, database, keys.into_iter().filter_map(reply::text)).await;
        cursor = reply::text(next).unwrap_or(b"0").to_vec();
        if cursor == b"0" {
            return repaired;
        }
        if Instant::now() < until {
            sleep(PAUSE).await;
        }
    }
}

/// Gives the covered ones of `keys` a TTL where they have none.
async fn repair<'k>(worker: &Rc<Worker>, node: &Rc<Node>, database: u8, keys: impl Iterator<Item = &'k [u8]>) -> u64 {
    let policy = worker.policy();
    let mut asked = Vec::new();
    for key in keys.filter(|key| !slots::is_larder_key(key)) {
        let rule = policy.find(key);
        let Some(lifetime) = policy.lifetime_of(rule) else { continue };
        let ttl = lifetime.jittered(worker.random()).as_millis().to_string();
        let (worker, node) = (worker.clone(), node.clone());
        asked.push(async move {
            let given = ask(&worker, &node, database, &[b"PEXPIRE", key, ttl.as_bytes(), b"NX"]).await;
            let given = given.as_deref() == Some(b":1\r\n");
            if given {
                worker.metrics().ttl_repaired(rule);
            }
            u64::from(given)
        });
    }
    join_all(asked).await.into_iter().sum()
}

/// One command to one node. `None`: no answer, or an error.
async fn ask(worker: &Rc<Worker>, node: &Rc<Node>, database: u8, command: &[&[u8]]) -> Option<Vec<u8>> {
    ask_node(worker, node, database, command).await.ok()
}
