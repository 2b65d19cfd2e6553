//! Clients that keep what they have read, and hear when it changes: CLIENT TRACKING through the sidecar.

mod caches;
mod messages;

use std::time::Duration;

use crate::support::resp::{Client, Value};
use crate::support::server::{Engine, RedisCluster, SentinelCluster};
use crate::support::sidecar::{Sidecar, bypass, cluster_topology, sentinel_topology};
use crate::support::wait_for;

const LIMIT: Duration = Duration::from_secs(20);

fn ok() -> Value {
    Value::Simple("OK".to_owned())
}

fn bulk(text: &str) -> Value {
    Value::Bulk(text.as_bytes().to_vec())
}

/// A push that says that these keys have changed.
fn changed(keys: &[&str]) -> Value {
    Value::Push(vec![bulk("invalidate"), Value::Array(keys.iter().map(|key| bulk(key)).collect())])
}

/// One that says that any may have.
fn all_changed() -> Value {
    Value::Push(vec![bulk("invalidate"), Value::Nil])
}

/// A client whose pushes are put aside.
struct Tracker {
    client: Client,
    pushes: Vec<Value>,
}

impl Tracker {
    /// Under RESP3, with `CLIENT TRACKING ON` and these options.
    fn start(client: Client, options: &str) -> Self {
        let mut tracker = Self { client, pushes: Vec::new() };
        assert!(!tracker.line("HELLO 3").is_error());
        assert_eq!(tracker.line(&format!("CLIENT TRACKING ON {options}")), ok());
        tracker
    }

    #[track_caller]
    fn line(&mut self, line: &str) -> Value {
        self.client.send(&crate::support::resp::encode(&line.split_whitespace().collect::<Vec<_>>())).unwrap();
        self.reply()
    }

    /// The next reply.
    #[track_caller]
    fn reply(&mut self) -> Value {
        loop {
            match self.client.read().unwrap() {
                push @ Value::Push(_) => self.pushes.push(push),
                reply => return reply,
            }
        }
    }

    /// Takes the pushes that have come.
    fn pushes(&mut self) -> Vec<Value> {
        while let Some(push) = self.client.poll() {
            assert!(matches!(push, Value::Push(_)), "{push:?}");
            self.pushes.push(push);
        }
        std::mem::take(&mut self.pushes)
    }

    /// Waits for a push; others that come before are dropped.
    #[track_caller]
    fn expect(&mut self, push: &Value) {
        let mut seen = Vec::new();
        wait_for(&format!("{push:?}"), LIMIT, || {
            seen.extend(self.pushes());
            seen.contains(push)
        });
    }

    /// No push comes as long as it takes a command to go there and back, and the worker's clock a few times round.
    #[track_caller]
    fn expect_silence(&mut self) {
        for _ in 0..3 {
            assert_eq!(self.line("BLPOP {nothing}ever 0.05"), Value::Nil);
        }
        assert_eq!(self.pushes(), []);
    }
}

/// A tier of each kind.
struct Tiers {
    sentinel: SentinelCluster,
    cluster: RedisCluster,
}

impl Tiers {
    fn start() -> Self {
        Self { sentinel: SentinelCluster::start(Engine::Redis7, 1), cluster: RedisCluster::start(Engine::Valkey9, 3, 0) }
    }

    /// Two sidecars before each tier, and a connection straight to the server of a key.
    fn each(&self, run: impl Fn(&Sidecar, &Sidecar, &dyn Fn(&str) -> Client)) {
        let start = |topology: &serde_json::Value| Sidecar::start(&bypass(topology.clone()));
        let topology = sentinel_topology(&self.sentinel);
        run(&start(&topology), &start(&topology), &|_| self.sentinel.primary().client());
        let topology = cluster_topology(&self.cluster);
        run(&start(&topology), &start(&topology), &|key| {
            self.cluster.owner(larder::sidecar::slots::slot_of(key.as_bytes())).client()
        });
    }
}
