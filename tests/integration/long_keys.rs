//! Keys, and commands over many keys, too long to be held: kept in a file until it is known where they go.

use std::io::Write;

use larder::sidecar::slots::tag_of;
use serde_json::{Value as Json, json};

use crate::support::resp::{Client, Value, encode};
use crate::support::server::{Engine, RedisCluster, SentinelCluster};
use crate::support::sidecar::{Sidecar, bypass, cluster_topology, sentinel_topology};

const MIB: usize = 1024 * 1024;

fn ok() -> Value {
    Value::Simple("OK".to_owned())
}

/// `prefix`, bytes that repeat nowhere near a buffer's size and hold neither `:` nor a brace, and `end`.
fn long_key(prefix: &str, length: usize, end: &str) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    let mut key = prefix.as_bytes().to_vec();
    while key.len() < length {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        key.extend(state.to_le_bytes().iter().filter(|byte| !matches!(byte, b':' | b'{' | b'}')));
    }
    key.truncate(length);
    key.extend_from_slice(end.as_bytes());
    key
}

/// Two rules that only the end of a key tells apart, and one that nothing touches.
fn rules(cluster: Json) -> Json {
    let mut snapshot = bypass(cluster);
    let rule = |name: &str, keys: &str, ttl: &str| json!({"name": name, "keys": keys, "strategy": {"cacheAside": {"ttl": {"default": ttl, "max": "24h", "jitter": "10%"}}}});
    snapshot["rules"] = json!([rule("plain", "long:{id}", "10m"), rule("tailed", "long:{id…}:end", "1h")]);
    snapshot
}

/// The TTL of a key, asked from one server or, in a Cluster, from the one that has it.
fn ttl(client: &mut Client, key: &[u8]) -> i64 {
    client.call(&[&b"TTL"[..], key]).int()
}

#[test]
fn keys_of_64_mib_pass_in_bounded_memory() {
    let (sentinel, cluster) = (SentinelCluster::start(Engine::Redis7, 1), RedisCluster::start(Engine::Redis7, 3, 0));
    for topology in [sentinel_topology(&sentinel), cluster_topology(&cluster)] {
        let sidecar = Sidecar::start(&rules(topology));
        let mut client = sidecar.client();
        let (key, value) = (long_key("long:", 64 * MIB, ""), long_key("", 2 * MIB, "value"));
        assert_eq!(client.line("GET nothing"), Value::Nil);
        let before = sidecar.resident_bytes();
        assert_eq!(client.call(&[&b"SET"[..], &key, &value]), ok());
        let after_set = sidecar.resident_bytes();
        assert!(client.call(&[&b"GET"[..], &key]) == Value::Bulk(value), "the value came back changed");
        let after_get = sidecar.resident_bytes();
        for (name, after) in [("SET", after_set), ("GET", after_get)] {
            assert!(after < before + 12 * MIB as u64, "{name}: {before} bytes before, {after} after");
        }
        assert!((500..=600).contains(&ttl(&mut client, &key)), "the covered key has its rule's TTL");
        // The client goes on as before.
        assert_eq!(client.call(&[&b"DEL"[..], &key]), Value::Int(1));
        assert_eq!(client.line("DBSIZE"), Value::Int(0));
    }
}

#[test]
fn long_keys_are_treated_like_short_ones() {
    let (sentinel, cluster) = (SentinelCluster::start(Engine::Redis7, 1), RedisCluster::start(Engine::Redis7, 3, 0));
    for topology in [sentinel_topology(&sentinel), cluster_topology(&cluster)] {
        let is_cluster = topology["topology"].get("cluster").is_some();
        let sidecar = Sidecar::start(&rules(topology));
        let mut client = sidecar.client();
        for length in [MIB - 60, MIB - 20, MIB, MIB + 1, 3 * MIB + 7] {
            let (plain, tailed) = (long_key("long:", length, ""), long_key("long:", length, ":end"));
            let free = long_key("free:", length, "");
            for (key, times) in [(&plain, 500..=600), (&tailed, 3000..=3600), (&free, -1..=-1)] {
                assert_eq!(client.call(&[&b"SET"[..], key, b"v"]), ok());
                assert!(times.contains(&ttl(&mut client, key)), "{length}: {}", ttl(&mut client, key));
                assert_eq!(client.call(&[&b"APPEND"[..], key, b"w"]), Value::Int(2));
                assert_eq!(client.call(&[&b"GET"[..], key]).text(), "vw");
                assert!(client.call(&[&b"SET"[..], key, b"v", b"nonsense"]).is_error());
            }
            assert_eq!(client.call(&[&b"PEXPIRE"[..], &plain, b"999999999999"]), Value::Int(1));
            assert!(ttl(&mut client, &plain) <= 24 * 3600);
            // Scripts, whose keys stand behind their number; a key that the script does not use.
            assert_eq!(client.call(&[&b"EVAL"[..], b"return redis.call('GET', KEYS[1])", b"1", &plain, b"x"]).text(), "vw");
            // Two keys, in one slot or not.
            let renamed = client.call(&[&b"RENAME"[..], &free, &plain]);
            if is_cluster {
                assert!(matches!(&renamed, Value::Error(text) if text.starts_with("CROSSSLOT")), "{renamed:?}");
            } else {
                assert_eq!(renamed, ok());
                assert!((500..=600).contains(&ttl(&mut client, &plain)), "what was renamed gets its rule's TTL");
            }
            // Within a transaction.
            assert_eq!(client.line("MULTI"), ok());
            for command in [&[&b"SET"[..], &plain, b"in"][..], &[b"STRLEN", &plain]] {
                assert_eq!(client.call(command), Value::Simple("QUEUED".to_owned()));
            }
            assert_eq!(client.line("EXEC"), Value::Array(vec![ok(), Value::Int(2)]));
            assert!((500..=600).contains(&ttl(&mut client, &plain)));
            assert_eq!(client.call(&[&b"DEL"[..], &plain, &tailed, &free]).int(), 2 + i64::from(is_cluster));
        }
        // In the pipeline, a long key keeps its place.
        let key = long_key("long:", 2 * MIB, "");
        let commands = [&[&b"INCR"[..], b"n"][..], &[b"SET", &key, b"1"], &[b"INCR", b"n"], &[b"INCR", &key], &[b"INCR", b"n"]];
        let wire = commands.map(encode).concat();
        let mut writer = client.stream().try_clone().unwrap();
        let sender = std::thread::spawn(move || writer.write_all(&wire).unwrap());
        let replies: Vec<Value> = (0..5).map(|_| client.read().unwrap()).collect();
        assert_eq!(replies, [Value::Int(1), ok(), Value::Int(2), Value::Int(2), Value::Int(3)]);
        sender.join().unwrap();
        // Names of Larder's own.
        let reserved = client.call(&[&b"SET"[..], &long_key("larder:", 2 * MIB, ""), b"v"]);
        assert!(matches!(&reserved, Value::Error(text) if text.starts_with("NOPERM")), "{reserved:?}");
        // What blocks is refused.
        assert!(client.call(&[&b"BLPOP"[..], &key, b"1"]).is_error());
        assert_eq!(client.line("PING"), Value::Simple("PONG".to_owned()));
    }
}

#[test]
fn long_keys_that_no_rule_covers_are_refused_where_the_policy_says_so() {
    let sentinel = SentinelCluster::start(Engine::Redis7, 1);
    let mut snapshot = rules(sentinel_topology(&sentinel));
    snapshot["unmatched"] = json!({"refuse": {}});
    let sidecar = Sidecar::start(&snapshot);
    let mut client = sidecar.client();
    assert_eq!(client.call(&[&b"SET"[..], &long_key("long:", 2 * MIB, ":end"), b"v"]), ok());
    let refused = client.call(&[&b"SET"[..], &long_key("long:", 2 * MIB, ":ends"), b"v"]);
    assert!(matches!(&refused, Value::Error(text) if text.starts_with("NOPERM no rule")), "{refused:?}");
    assert_eq!(client.line("GET long:1"), Value::Nil);
}

#[test]
fn without_a_temporary_file_the_error_names_the_remedy() {
    let sentinel = SentinelCluster::start(Engine::Redis7, 1);
    let sidecar = Sidecar::start_in(&rules(sentinel_topology(&sentinel)), &[], &[("TMPDIR", "/nonexistent/larder")]);
    let mut client = sidecar.client();
    let refused = client.call(&[&b"SET"[..], &long_key("long:", 2 * MIB, ""), b"v"]);
    assert!(matches!(&refused, Value::Error(text) if text.contains("TMPDIR")), "{refused:?}");
    assert_eq!(client.line("SET long:1 v"), ok());
}

#[test]
fn long_commands_over_many_keys_are_split() {
    let cluster = RedisCluster::start(Engine::Redis7, 3, 0);
    for snapshot in [bypass(cluster_topology(&cluster)), rules(cluster_topology(&cluster))] {
        let covered = snapshot.get("rules").is_some();
        let sidecar = Sidecar::start(&snapshot);
        let mut client = sidecar.client();
        assert_eq!(client.line("GET nothing"), Value::Nil);
        let before = sidecar.resident_bytes();
        // Values of all sizes: below a part's bound, above it, and several in one slot.
        let pairs: Vec<(Vec<u8>, Vec<u8>)> = (0..400usize)
            .map(|index| {
                let key = if index % 40 == 7 { format!("long:{{tag}}{index}") } else { format!("long:{index}") };
                let length = [0, 10, 60_000, 70_000, 300_000][index % 5] + if index % 100 == 3 { 6 * MIB } else { 0 };
                (key.into_bytes(), long_key("", length, &index.to_string()))
            })
            .collect();
        let mut set: Vec<&[u8]> = vec![b"MSET"];
        pairs.iter().for_each(|(key, value)| set.extend([&key[..], &value[..]]));
        assert!(set.iter().map(|part| part.len()).sum::<usize>() > 50 * MIB);
        assert_eq!(client.call(&set), ok());
        let after = sidecar.resident_bytes();
        assert!(after < before + 16 * MIB as u64, "{before} bytes before, {after} after");
        for (key, value) in &pairs {
            assert!(client.call(&[&b"GET"[..], key]) == Value::Bulk(value.clone()), "{}", String::from_utf8_lossy(key));
            let expected = if covered { 500..=600 } else { -1..=-1 };
            assert!(expected.contains(&ttl(&mut client, key)));
        }
        // As many short keys as make a long command.
        let keys: Vec<String> = (0..60_000).map(|index| format!("long:{index:020}")).collect();
        let mut many: Vec<&str> = vec!["MSET"];
        keys.iter().for_each(|key| many.extend([key.as_str(), "v"]));
        assert_eq!(client.call(&many), ok());
        let with = |name| std::iter::once(name).chain(keys.iter().map(String::as_str)).collect::<Vec<&str>>();
        let values = client.call(&with("MGET")).items();
        assert!(values.len() == keys.len() && values.iter().all(|value| value.text() == "v"));
        assert_eq!(client.call(&with("EXISTS")), Value::Int(60_000));
        assert_eq!(client.call(&with("UNLINK")), Value::Int(60_000));
        // A part that fails is told.
        assert!(client.call(&many[..many.len() - 1]).is_error());
        assert_eq!(client.line("RPUSH long:list a"), Value::Int(1));
        assert_eq!(client.line("PING"), Value::Simple("PONG".to_owned()));
        let mut delete: Vec<&[u8]> = vec![b"DEL"];
        pairs.iter().for_each(|(key, _)| delete.push(key));
        assert_eq!(client.call(&delete), Value::Int(400));
        assert_eq!(client.line("DEL long:list"), Value::Int(1));
    }
}

#[test]
fn long_keys_are_found_while_their_slot_moves() {
    const SLOT: u16 = 5;
    let cluster = RedisCluster::start(Engine::Redis7, 3, 0);
    let sidecar = Sidecar::start(&rules(cluster_topology(&cluster)));
    let mut client = sidecar.client();
    let prefix = format!("long:{{{}}}", String::from_utf8_lossy(&tag_of(SLOT)));
    let (stays, fresh) = (long_key(&prefix, 2 * MIB, "a"), long_key(&prefix, 2 * MIB, "b"));
    assert_eq!(client.call(&[&b"SET"[..], &stays, b"old"]), ok());
    let (mut source, mut target) = (cluster.servers[0].client(), cluster.servers[1].client());
    let (source_id, target_id) = (source.line("CLUSTER MYID").text(), target.line("CLUSTER MYID").text());
    assert_eq!(target.line(&format!("CLUSTER SETSLOT {SLOT} IMPORTING {source_id}")), ok());
    assert_eq!(source.line(&format!("CLUSTER SETSLOT {SLOT} MIGRATING {target_id}")), ok());
    // What is there is found where it is; what is new goes where the slot goes.
    assert_eq!(client.call(&[&b"GET"[..], &stays]).text(), "old");
    assert_eq!(client.call(&[&b"SET"[..], &fresh, b"new"]), ok());
    assert_eq!(client.call(&[&b"GET"[..], &fresh]).text(), "new");
    assert!((500..=600).contains(&ttl(&mut client, &fresh)));
    assert_eq!((source.line("DBSIZE"), target.line("DBSIZE")), (Value::Int(1), Value::Int(1)));
    assert_eq!(client.call(&[&b"DEL"[..], &stays]), Value::Int(1));
    for server in [1, 0, 2] {
        let settled = cluster.servers[server].client().line(&format!("CLUSTER SETSLOT {SLOT} NODE {target_id}"));
        assert_eq!(settled, ok());
    }
    assert_eq!(client.call(&[&b"GET"[..], &fresh]).text(), "new");
    assert_eq!(client.call(&[&b"SET"[..], &stays, b"again"]), ok());
    assert_eq!(target.line("DBSIZE"), Value::Int(2));
}
