//! Writes that are split over shards, some of which refuse their part.

use larder::sidecar::slots::tag_of;
use serde_json::json;

use crate::support::resp::{Client, Value};
use crate::support::server::{Engine, RedisCluster};
use crate::support::sidecar::{Sidecar, bypass, cluster_topology};

const SHARDS: usize = 3;

/// A key of one slot of each shard.
fn keys(prefix: &str) -> [String; SHARDS] {
    [0, 6_000, 12_000].map(|slot| format!("{prefix}:{{{}}}", String::from_utf8_lossy(&tag_of(slot))))
}

/// Has these shards, and no others, refuse what needs memory (`maxmemory`), or all writes (`min-replicas-to-write`).
fn refuse(cluster: &RedisCluster, setting: &str, shards: &[usize]) {
    for shard in 0..SHARDS {
        let value = if shards.contains(&shard) { "1" } else { "0" };
        let set = cluster.shard(shard).client().call(&["CONFIG", "SET", setting, value]);
        assert_eq!(set, Value::Simple("OK".to_owned()));
    }
}

fn mset(client: &mut Client, keys: &[String], value: &str) -> Value {
    let mut command = vec!["MSET"];
    keys.iter().for_each(|key| command.extend([key.as_str(), value]));
    client.call(&command)
}

#[track_caller]
fn is_partial(reply: &Value, done: usize, cause: &str) {
    let start = format!("PARTIAL the command was split into {SHARDS} parts and {done} of them were carried out: {cause}");
    assert!(matches!(reply, Value::Error(text) if text.starts_with(&start)), "{done}: {reply:?}");
}

/// What each shard has of its key, asked past Larder.
fn held(cluster: &RedisCluster, keys: &[String]) -> Vec<Value> {
    keys.iter().enumerate().map(|(shard, key)| cluster.shard(shard).client().call(&["GET", key])).collect()
}

fn bulk(value: &str) -> Value {
    Value::Bulk(value.as_bytes().to_vec())
}

#[test]
fn a_split_write_that_failed_in_part_says_so() {
    let cluster = RedisCluster::start_with(Engine::Redis7, SHARDS, 0, &["--maxmemory-policy", "noeviction"]);
    let mut snapshot = bypass(cluster_topology(&cluster));
    let ttl = json!({"default": "10m", "max": "24h", "jitter": "10%"});
    snapshot["rules"] = json!([{"name": "covered", "keys": "covered:{id…}", "strategy": {"cacheAside": {"ttl": ttl}}}]);
    let sidecar = Sidecar::start(&snapshot);
    let mut client = sidecar.client();
    for prefix in ["plain", "covered"] {
        let keys = keys(prefix);
        // Of ordinary length; beyond 1 MiB in parts of ordinary length; in parts that are beyond it themselves.
        for length in [10, 600_000, 1_500_000] {
            let [old, new] = ["o", "n"].map(|letter| letter.repeat(length));
            assert_eq!(mset(&mut client, &keys, &old), Value::Simple("OK".to_owned()));
            refuse(&cluster, "maxmemory", &[1]);
            is_partial(&mset(&mut client, &keys, &new), 2, "OOM ");
            assert!(held(&cluster, &keys) == [bulk(&new), bulk(&old), bulk(&new)], "{prefix} {length}");
            refuse(&cluster, "maxmemory", &[0, 2]);
            is_partial(&mset(&mut client, &keys, &new), 1, "OOM ");
            // Where nothing was carried out, that is said.
            refuse(&cluster, "maxmemory", &[0, 1, 2]);
            let refused = mset(&mut client, &keys, &old);
            assert!(matches!(&refused, Value::Error(text) if text.starts_with("OOM ")), "{refused:?}");
            refuse(&cluster, "maxmemory", &[]);
            assert!(held(&cluster, &keys) == [bulk(&new), bulk(&new), bulk(&new)], "{prefix} {length}");
        }
        for name in ["DEL", "UNLINK"] {
            assert_eq!(mset(&mut client, &keys, "v"), Value::Simple("OK".to_owned()));
            refuse(&cluster, "min-replicas-to-write", &[2]);
            is_partial(&client.call(&[name, &keys[0], &keys[1], &keys[2]]), 2, "NOREPLICAS ");
            refuse(&cluster, "min-replicas-to-write", &[]);
            assert_eq!(held(&cluster, &keys), [Value::Nil, Value::Nil, bulk("v")]);
        }
    }
    assert_eq!(client.line("PING"), Value::Simple("PONG".to_owned()));
}

#[test]
fn a_long_deletion_that_failed_in_part_says_so() {
    let cluster = RedisCluster::start(Engine::Redis7, SHARDS, 0);
    let sidecar = Sidecar::start(&bypass(cluster_topology(&cluster)));
    let mut client = sidecar.client();
    let keys = keys("plain").map(|key| format!("{key}{}", "k".repeat(600_000)));
    assert_eq!(mset(&mut client, &keys, "v"), Value::Simple("OK".to_owned()));
    refuse(&cluster, "min-replicas-to-write", &[0]);
    is_partial(&client.call(&["DEL", &keys[0], &keys[1], &keys[2]]), 2, "NOREPLICAS ");
    refuse(&cluster, "min-replicas-to-write", &[]);
    assert_eq!(held(&cluster, &keys), [bulk("v"), Value::Nil, Value::Nil]);
}
