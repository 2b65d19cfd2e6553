//! Write-behind through real sidecars and servers: what sidecars append, and what reads see of it.

mod clients;
mod durability;
mod fsyncs;
mod heirs;
mod lone;
mod scripts;

use larder::journal::{Entry, Held, PARTITIONS, Partition, partition_of};
use larder::policy::JournalName;
use serde_json::{Value as Json, json};

use crate::support::resp::{Client, Value};
use crate::support::server::{Engine, Redis, SentinelCluster};

/// With which servers write all to disk before they answer.
pub const DURABLE: [&str; 4] = ["--appendonly", "yes", "--appendfsync", "always"];

/// Servers under Sentinel that write all to disk before they answer.
pub fn durable(engine: Engine, replicas: usize) -> SentinelCluster {
    let servers = SentinelCluster::start(engine, replicas);
    servers.servers.iter().for_each(write_to_disk);
    servers
}

/// Has a server write all to disk before it answers, from now on.
pub fn write_to_disk(server: &Redis) {
    for setting in ["appendonly yes", "appendfsync always"] {
        assert_eq!(server.client().line(&format!("CONFIG SET {setting}")), Value::Simple("OK".to_owned()));
    }
}

pub fn journal() -> JournalName {
    "test.shop".parse().expect("a name")
}

/// A rule for `NAME:{id}` that loads by `read`, and whose writes wait in a journal that is bounded by `bounds` where it says so.
pub fn rule(name: &str, origin: &str, read: &str, bounds: &Json) -> Json {
    let read = json!({
        "ttl": {"default": "1h", "max": "2h", "jitter": "0%"}, "stale": "0s", "negativeTtl": "10s", "lease": "10s", "wait": "10s",
        "load": {"origin": origin, "query": {"sql": {"read": read}}, "reply": null},
    });
    let store = json!({"sql": {"write": "INSERT INTO kv VALUES ($id, $value)", "delete": "DELETE FROM kv WHERE id = $id"}});
    let mut journal = json!({"name": journal(), "maxLag": "1h", "maxDepth": 100_000, "maxBytes": "64Mi", "batch": 100});
    for (field, value) in bounds.as_object().expect("bounds are an object") {
        journal[field] = value.clone();
    }
    let strategy = json!({"writeBehind": {"read": read, "store": store, "journal": journal}});
    json!({"name": name, "keys": format!("{name}:{{id}}"), "strategy": strategy})
}

pub fn partition(key: &str) -> Partition {
    Partition::new(&journal(), partition_of(key.as_bytes()))
}

/// The entries of a partition, at the server that has it.
pub fn entries(server: &mut Client, partition: &Partition) -> Vec<Entry> {
    let all = server.call(&[b"XRANGE".to_vec(), partition.log(), b"-".to_vec(), b"+".to_vec()]).items();
    all.iter().map(entry).collect()
}

fn entry(value: &Value) -> Entry {
    let [id, fields]: [Value; 2] = value.items().try_into().expect("an ID and fields");
    let fields: Vec<Vec<u8>> = fields.items().iter().map(bytes).collect();
    Entry::parse(&bytes(&id), fields.chunks(2).map(|pair| (&pair[0][..], &pair[1][..]))).expect("an entry")
}

pub fn bytes(value: &Value) -> Vec<u8> {
    match value {
        Value::Bulk(bytes) => bytes.clone(),
        other => other.text().into_bytes(),
    }
}

/// All entries of a journal that lies in one server.
pub fn all_entries(server: &mut Client) -> Vec<Entry> {
    (0..PARTITIONS).flat_map(|number| entries(server, &Partition::new(&journal(), number))).collect()
}

/// What the dirty index has of a key.
pub fn held(server: &mut Client, key: &str) -> Option<Held> {
    let value = server.call(&[b"HGET".to_vec(), partition(key).dirty(), key.as_bytes().to_vec()]);
    (value != Value::Nil).then(|| Held::parse(&bytes(&value)).expect("a write"))
}
