//! Write-through through real sidecars, servers and origins.

mod counts;
mod hashes;
mod history;
mod http;
mod kept;
mod scripts;
mod sql;

use serde_json::{Value as Json, json};

use crate::read_through::{Servers, policy};
use crate::support::sidecar::Sidecar;

/// A runtime for what the tests ask databases themselves.
pub fn block<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime").block_on(future)
}

/// An origin with this timeout.
pub fn origin(name: &str, url: &str, timeout: &str) -> Json {
    let kind = json!({"sql": {"url": {"value": url}}});
    json!({"name": name, "kind": kind, "maxConnections": 4, "connectTimeout": "5s", "timeout": timeout})
}

/// A rule for `NAME:{id}` that loads by `read` and writes by `store`.
pub fn rule(name: &str, origin: &str, read: &str, store: &Json) -> Json {
    let read = json!({
        "ttl": {"default": "1h", "max": "2h", "jitter": "0%"}, "stale": "0s", "negativeTtl": "0s", "lease": "10s", "wait": "10s",
        "load": {"origin": origin, "query": {"sql": {"read": read}}, "reply": null},
    });
    json!({"name": name, "keys": format!("{name}:{{id}}"), "strategy": {"writeThrough": {"read": read, "store": {"sql": store}}}})
}

/// A sidecar under these rules.
pub fn sidecar(servers: &Servers, origins: &[Json], rules: &[Json]) -> Sidecar {
    Sidecar::start(&policy(servers.topology(), 1, origins, rules))
}
