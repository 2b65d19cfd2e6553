//! An application behind a sidecar that counts in many keys of a Cluster, and notices each answer that is none.

use serde_json::{Value, json};

use super::cluster::{apply, eventually, kubectl};
use super::install::{self, PLACE};
use super::operator;
use super::policies::STARTS_WITHIN;
use super::shop::has_sidecar;
use super::tier::Tier;
use super::workloads::template;

/// Threads that each count up keys of their own, which lie in slots of all shards, and read all of them in one command. redis-py repeats
/// nothing by itself. A line of JSON each second says how far they are, and what went wrong first.
const COUNTS: &str = "
import json, os, threading, time
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

THREADS, KEYS = 4, 8
counted, faults = [0] * THREADS, []

def connect():
    return redis.from_url(os.environ['REDIS_URL'], retry=Retry(NoBackoff(), 0))

def first():
    deadline = time.monotonic() + 90
    while True:
        try:
            return connect().delete(*(f'count:{thread}:{key}' for thread in range(THREADS) for key in range(KEYS)))
        except redis.RedisError as error:
            if time.monotonic() > deadline: raise
            print(error, flush=True)
            time.sleep(0.2)

def count(thread):
    client, keys, number = connect(), [f'count:{thread}:{key}' for key in range(KEYS)], 0
    while not faults:
        number += 1
        try:
            found = [client.incr(key) for key in keys]
            read = [int(value or 0) for value in client.mget(keys)]
            if found != [number] * KEYS or read != found:
                faults.append(f'{keys[0]}: {number}, not {found}, and {read}')
        except redis.RedisError as error:
            faults.append(f'{keys[0]}: {number}: {error!r}')
        counted[thread] = number * KEYS
        time.sleep(0.1)

first()
for thread in range(THREADS):
    threading.Thread(target=count, args=(thread,), daemon=True).start()
while True:
    time.sleep(1)
    print(json.dumps({'counted': sum(counted), 'faults': faults[:3]}), flush=True)
";

/// The application in a pod of its own, and the policy that gives it a sidecar.
pub struct Counting {
    name: String,
}

impl Counting {
    /// Waits until it counts.
    pub fn start(tier: &Tier) -> Self {
        // The pod must meet the injector.
        let _operator = install::with_operator();
        operator::await_ready();
        kubectl(&["label", "namespace", PLACE, "larder.dev/injection=enabled", "--overwrite"]).expect("labelled");
        let counting = Self { name: format!("{}-counts", tier.name) };
        counting.remove();
        let policy = json!({
            "apiVersion": "larder.dev/v1alpha1", "kind": "CachePolicy", "metadata": {"name": counting.name, "namespace": PLACE},
            "spec": {
                "cacheCluster": tier.name, "workloads": {"matchLabels": {"app": counting.name}},
                "rules": [{"name": "counts", "keys": "count:{thread}:{key}", "strategy": "Bypass"}],
            },
        });
        apply(&policy).expect("applied");
        let mut pod = template("counts", COUNTS);
        (pod["apiVersion"], pod["kind"]) = (json!("v1"), json!("Pod"));
        pod["metadata"] = json!({"name": counting.name, "namespace": PLACE, "labels": {"app": counting.name}});
        apply(&pod).expect("applied");
        let made = super::cluster::get(PLACE, &format!("pod/{}", counting.name)).unwrap_or_default();
        assert!(has_sidecar(&made), "{made}");
        counting.await_more(500);
        counting
    }

    /// The last line that it wrote.
    fn said(&self) -> Result<Value, String> {
        let line = kubectl(&["-n", PLACE, "logs", &self.name, "-c", "app", "--tail=1"])?;
        serde_json::from_str(&line).map_err(|_| line)
    }

    /// Waits for so many counts more, and says how many there are by then.
    fn await_more(&self, more: u64) -> u64 {
        let number = |said: &Value| said["counted"].as_u64().unwrap_or_default();
        let before = self.said().map_or(0, |said| number(&said));
        eventually(&format!("{} goes on", self.name), STARTS_WITHIN, || {
            let said = self.said()?;
            if said["faults"].as_array().is_some_and(|faults| !faults.is_empty()) {
                panic!("{} met {said}", self.name);
            }
            if number(&said) >= before + more { Ok(number(&said)) } else { Err(said.to_string()) }
        })
    }

    /// Ends it, once it is seen to go on. How many counts there were, none of them wrong.
    pub fn finish(self) -> u64 {
        self.await_more(500)
    }

    fn remove(&self) {
        for kind in ["pod", "cachepolicy"] {
            let _ = kubectl(&["-n", PLACE, "delete", kind, &self.name, "--ignore-not-found", "--wait"]);
        }
    }
}

impl Drop for Counting {
    fn drop(&mut self) {
        self.remove();
    }
}
