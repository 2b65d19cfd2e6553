//! Read-through through real sidecars, servers and origins.

mod authorities;
mod forms;
mod full;
mod hanging;
mod hostile;
mod long;
mod races;
mod stale;
mod stampede;

use larder::sidecar::slots::slot_of;
use serde_json::{Value as Json, json};

use crate::support::resp::Client;
use crate::support::saboteur::Change;
use crate::support::server::{Engine, RedisCluster, SentinelCluster};
use crate::support::sidecar::{Sidecar, cluster_topology, sentinel_topology};
use crate::support::web::Web;

/// Servers in either topology.
pub enum Servers {
    Sentinel(SentinelCluster),
    Cluster(RedisCluster),
}

impl Servers {
    /// One Valkey under three sentinels.
    pub fn sentinel() -> Self {
        Self::Sentinel(SentinelCluster::start(Engine::Valkey9, 0))
    }

    /// [`Servers::sentinel`], where what sidecars send is changed on its way.
    pub fn sabotaged(changes: &'static [Change]) -> Self {
        Self::Sentinel(SentinelCluster::start_sabotaged(Engine::Valkey9, 0, changes))
    }

    /// How often that was done.
    pub fn changed(&self) -> u64 {
        match self {
            Self::Sentinel(servers) => servers.sabotaged(),
            Self::Cluster(_) => 0,
        }
    }

    /// Three shards of Redis.
    pub fn cluster() -> Self {
        Self::Cluster(RedisCluster::start(Engine::Redis7, 3, 0))
    }

    pub fn topology(&self) -> Json {
        match self {
            Self::Sentinel(servers) => sentinel_topology(servers),
            Self::Cluster(servers) => cluster_topology(servers),
        }
    }

    /// The server that holds `key`, asked past Larder.
    pub fn holder_of(&self, key: &str) -> Client {
        match self {
            Self::Sentinel(servers) => servers.primary().client(),
            Self::Cluster(servers) => servers.owner(slot_of(key.as_bytes())).client(),
        }
    }

    /// Has `key` expire, and waits until it has.
    pub fn expire(&self, key: &str) {
        let mut server = self.holder_of(key);
        assert_eq!(server.call(&["PEXPIRE", key, "1"]).int(), 1, "{key} is there");
        crate::support::wait_for("the key to expire", std::time::Duration::from_secs(10), || {
            server.call(&["PTTL", key]).int() == -2
        });
    }

    pub fn sidecar(&self, origins: &[Json], rules: &[Json]) -> Sidecar {
        Sidecar::start(&policy(self.topology(), 1, origins, rules))
    }
}

/// A snapshot.
pub fn policy(topology: Json, generation: u64, origins: &[Json], rules: &[Json]) -> Json {
    json!({
        "version": 1, "requires": 1, "generation": generation, "cluster": topology, "unmatched": {"bypass": {}},
        "origins": origins, "rules": rules,
    })
}

/// An origin that gives up after `timeout`.
pub fn http_origin(name: &str, web: &Web, timeout: &str) -> Json {
    origin(name, json!({"http": {"url": {"value": web.url()}}}), timeout)
}

/// An SQL origin.
pub fn sql_origin(name: &str, url: &str) -> Json {
    origin(name, json!({"sql": {"url": {"value": url}}}), "10s")
}

fn origin(name: &str, kind: Json, timeout: &str) -> Json {
    json!({"name": name, "kind": kind, "maxConnections": 4, "connectTimeout": "5s", "timeout": timeout})
}

/// A rule that loads `NAME:{id}` by `query` from `origin`. `settings` replace what else it says.
pub fn rule(name: &str, origin: &str, query: Json, settings: Json) -> Json {
    let mut read_through = json!({
        "ttl": {"default": "1h", "max": "2h", "jitter": "10%"}, "stale": "0s", "negativeTtl": "0s", "lease": "10s", "wait": "10s",
        "load": {"origin": origin, "query": query, "reply": null},
    });
    for (field, value) in settings.as_object().expect("settings are an object") {
        read_through[field] = value.clone();
    }
    json!({"name": name, "keys": format!("{name}:{{id}}"), "strategy": {"readThrough": read_through}})
}

/// A rule `NAME:{id}` that asks the HTTP origin `web` for `/NAME/{id}`.
pub fn web_rule(name: &str, settings: Json) -> Json {
    rule(name, "web", json!({"http": {"path": format!("/{name}/{{id}}")}}), settings)
}
