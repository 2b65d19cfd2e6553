//! Commands and replies too long to be held, through the sidecar.

use std::io::Write;

use crate::support::resp::{Value, encode};
use crate::support::server::{Engine, RedisCluster, SentinelCluster};
use crate::support::sidecar::{Sidecar, bypass, cluster_topology, sentinel_topology};

const MIB: usize = 1024 * 1024;

fn ok() -> Value {
    Value::Simple("OK".to_owned())
}

/// Bytes that repeat nowhere near a buffer's size.
fn noise(length: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    let mut bytes = Vec::with_capacity(length + 8);
    while bytes.len() < length {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(length);
    bytes
}

#[test]
fn long_values_pass_in_bounded_memory() {
    let (sentinel, cluster) = (SentinelCluster::start(Engine::Redis7, 1), RedisCluster::start(Engine::Redis7, 3, 0));
    for topology in [sentinel_topology(&sentinel), cluster_topology(&cluster)] {
        let sidecar = Sidecar::start(&bypass(topology));
        let mut client = sidecar.client();
        let value = noise(64 * MIB);
        assert_eq!(client.line("GET nothing"), Value::Nil);
        let before = sidecar.resident_bytes();
        assert_eq!(client.call(&[&b"SET"[..], b"long", &value]), ok());
        let after_set = sidecar.resident_bytes();
        match client.line("GET long") {
            Value::Bulk(bytes) => assert!(bytes == value, "the value came back changed"),
            other => panic!("{other:?}"),
        }
        let after_get = sidecar.resident_bytes();
        for (name, after) in [("SET", after_set), ("GET", after_get)] {
            assert!(after < before + 16 * MIB as u64, "{name}: {before} bytes before, {after} after");
        }
        // The client goes on as before.
        assert_eq!(client.line("STRLEN long"), Value::Int(64 * MIB as i64));
    }
}

#[test]
fn long_commands_keep_their_place_in_the_pipeline() {
    let cluster = RedisCluster::start(Engine::Redis7, 3, 0);
    let sidecar = Sidecar::start(&bypass(cluster_topology(&cluster)));
    let mut client = sidecar.client();
    for length in [65_000, 65_536, 65_600, 200_000, MIB - 30, MIB + 1, 3 * MIB] {
        let value = noise(length);
        let mut wire = encode(&["INCR", "count"]);
        wire.extend_from_slice(&encode(&[&b"SET"[..], b"k", &value]));
        wire.extend_from_slice(&encode(&["INCR", "count"]));
        wire.extend_from_slice(&encode(&["GET", "k"]));
        wire.extend_from_slice(&encode(&["STRLEN", "k"]));
        let mut writer = client.stream().try_clone().unwrap();
        let sender = std::thread::spawn(move || writer.write_all(&wire).unwrap());
        let first = client.read().unwrap().int();
        assert_eq!(client.read().unwrap(), ok(), "{length}");
        assert_eq!(client.read().unwrap(), Value::Int(first + 1));
        assert!(client.read().unwrap() == Value::Bulk(value));
        assert_eq!(client.read().unwrap(), Value::Int(length as i64));
        sender.join().unwrap();
    }
}

#[test]
fn long_commands_of_every_kind() {
    let (sentinel, cluster) = (SentinelCluster::start(Engine::Redis7, 1), RedisCluster::start(Engine::Redis7, 3, 0));
    for topology in [sentinel_topology(&sentinel), cluster_topology(&cluster)] {
        let sidecar = Sidecar::start(&bypass(topology));
        let mut client = sidecar.client();
        let value = noise(300_000);
        // Many keys: split, like short ones.
        let keys: Vec<String> = (0..20_000).map(|index| format!("many:{index}")).collect();
        let mut set: Vec<&str> = vec!["MSET"];
        keys.iter().for_each(|key| set.extend([key.as_str(), "v"]));
        assert_eq!(client.call(&set), ok());
        let mut get: Vec<&str> = vec!["MGET"];
        get.extend(keys.iter().map(String::as_str));
        assert!(client.call(&get).items().iter().all(|item| item.text() == "v"));
        // A long script, its key behind it.
        let script = format!("--{}\nreturn redis.call('SET', KEYS[1], ARGV[1])", "x".repeat(100_000));
        assert_eq!(client.call(&["EVAL", &script, "1", "scripted", "v"]), ok());
        assert_eq!(client.line("GET scripted").text(), "v");
        // A long argument behind the key; a long element; a message.
        assert_eq!(client.call(&[&b"EVAL"[..], b"return #ARGV[1]", b"1", b"k", &value]), Value::Int(300_000));
        assert_eq!(client.call(&[&b"RPUSH"[..], b"list", &value, b"end"]), Value::Int(2));
        assert!(client.line("LINDEX list 0") == Value::Bulk(value.clone()));
        assert_eq!(client.call(&[&b"PUBLISH"[..], b"channel", &value]), Value::Int(0));
        assert!(client.call(&[&b"PING"[..], &value]) == Value::Bulk(value.clone()));
        // Errors of the server, and refusals.
        assert!(client.call(&[&b"SET"[..], b"k", &value, b"nonsense"]).is_error());
        assert!(client.call(&[&b"CONFIG"[..], b"SET", b"requirepass", &value]).is_error());
        assert!(client.call(&[&b"GETRANGE"[..], b"k", &value]).is_error());
        // Within a transaction.
        assert_eq!(client.line("MULTI"), ok());
        assert_eq!(client.call(&[&b"SET"[..], b"k", &value]), Value::Simple("QUEUED".to_owned()));
        assert_eq!(client.line("GET k"), Value::Simple("QUEUED".to_owned()));
        assert!(client.line("EXEC") == Value::Array(vec![ok(), Value::Bulk(value)]));
        assert_eq!(client.line("PING"), Value::Simple("PONG".to_owned()));
    }
}

#[test]
fn covered_long_values_get_a_ttl() {
    let sentinel = SentinelCluster::start(Engine::Redis7, 1);
    let mut snapshot = bypass(sentinel_topology(&sentinel));
    snapshot["rules"] = serde_json::json!([{"name": "user", "keys": "user:{id}", "strategy":
        {"cacheAside": {"ttl": {"default": "10m", "max": "24h", "jitter": "10%"}}}}]);
    let sidecar = Sidecar::start(&snapshot);
    let mut client = sidecar.client();
    let value = noise(3 * MIB);
    assert_eq!(client.call(&[&b"SET"[..], b"user:1", &value]), ok());
    assert!((500..=600).contains(&client.line("TTL user:1").int()));
    // The reply of the command inside our transaction may be long itself.
    assert!(client.call(&[&b"GETSET"[..], b"user:1", &noise(200_000)]) == Value::Bulk(value));
    assert!((500..=600).contains(&client.line("TTL user:1").int()));
    assert!(client.call(&[&b"SET"[..], b"user:1", &noise(200_000), b"nonsense"]).is_error());
    assert_eq!(client.line("STRLEN user:1"), Value::Int(200_000));
}
