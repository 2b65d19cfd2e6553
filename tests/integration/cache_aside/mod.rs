//! Cache-aside through real sidecars and servers.

mod cost;
mod default_wait;
mod django;
mod failover;
mod fills;
mod history;
mod lease_model;
mod locks;
mod many;
mod multiplexed;
mod negative;
mod scripts;
mod stampede;
mod succession;
mod teams;
mod tokens;
mod wake;

use std::time::Duration;

use serde_json::{Value as Json, json};

use crate::read_through::Servers;
use crate::support::admin::rule_count;
use crate::support::resp::{Client, Value};
use crate::support::sidecar::Sidecar;
use crate::support::wait_for;

pub const LIMIT: Duration = Duration::from_secs(30);

/// A rule for `NAME:{id}` whose misses take leases. `settings` replace what else it says.
pub fn rule(name: &str, stampede: Json, settings: Json) -> Json {
    let mut cache_aside = json!({"ttl": {"default": "1h", "max": "2h", "jitter": "10%"}});
    let mut all = json!({"lease": "20s", "wait": "19s", "atWaitEnd": "error"});
    stampede.as_object().expect("an object").iter().for_each(|(field, value)| all[field] = value.clone());
    settings.as_object().expect("an object").iter().for_each(|(field, value)| cache_aside[field] = value.clone());
    cache_aside["stampede"] = all;
    json!({"name": name, "keys": format!("{name}:{{id}}"), "strategy": {"cacheAside": cache_aside}})
}

/// The usual rule: `item:{id}`.
pub fn item(stampede: Json) -> Json {
    rule("item", stampede, json!({}))
}

/// So many sidecars for the same servers and rules.
pub fn sidecars(servers: &Servers, count: usize, rules: &[Json]) -> Vec<Sidecar> {
    (0..count).map(|_| servers.sidecar(&[], rules)).collect()
}

/// A counter of the rule `item`, over all sidecars.
pub fn total(sidecars: &[Sidecar], counter: &str) -> u64 {
    sidecars.iter().map(|sidecar| rule_count(sidecar, "item", counter)).sum()
}

pub fn ok() -> Value {
    Value::Simple("OK".to_owned())
}

pub fn bulk(text: &str) -> Value {
    Value::Bulk(text.as_bytes().to_vec())
}

/// The first client that has an answer, by its position.
#[track_caller]
pub fn first_answered(clients: &mut [Client]) -> (usize, Value) {
    let mut found = None;
    wait_for("somebody to be answered", LIMIT, || {
        found = clients.iter_mut().enumerate().find_map(|(index, client)| Some((index, client.poll()?)));
        found.is_some()
    });
    found.expect("found")
}
