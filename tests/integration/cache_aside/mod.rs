//! Cache-aside through real sidecars and servers.

mod history;
mod scripts;
mod stampede;
mod teams;
mod tokens;

use serde_json::{Value as Json, json};

use crate::read_through::Servers;
use crate::support::admin::rule_count;
use crate::support::sidecar::Sidecar;

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
