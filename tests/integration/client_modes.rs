//! What a client asks of its connection: no replies, no touch of what it reads.

use std::time::Duration;

use crate::support::resp::{Client, Value, encode};
use crate::support::server::{Engine, Redis, RedisCluster, SentinelCluster};
use crate::support::sidecar::{Sidecar, bypass, cluster_topology, sentinel_topology};
use crate::support::wait_for;

const LIMIT: Duration = Duration::from_secs(20);

fn ok() -> Value {
    Value::Simple("OK".to_owned())
}

fn bulk(text: &str) -> Value {
    Value::Bulk(text.as_bytes().to_vec())
}

/// Sends all lines at once.
fn send(client: &mut Client, lines: &[&str]) {
    let bytes: Vec<u8> = lines.iter().flat_map(|line| encode(&line.split_whitespace().collect::<Vec<_>>())).collect();
    client.send(&bytes).unwrap();
}

/// Sends all lines at once, and reads `count` replies.
fn exchange(client: &mut Client, lines: &[&str], count: usize) -> Vec<Value> {
    send(client, lines);
    (0..count).map(|_| client.read().unwrap()).collect()
}

#[test]
fn replies_stop_and_come_back_exactly_where_the_client_says() {
    let sentinel = SentinelCluster::start(Engine::Redis7, 1);
    let cluster = RedisCluster::start(Engine::Valkey9, 3, 0);
    for topology in [sentinel_topology(&sentinel), cluster_topology(&cluster)] {
        let sidecar = Sidecar::start(&bypass(topology));
        for hello in ["HELLO 2", "HELLO 3"] {
            let mut client = sidecar.client();
            assert!(!client.line(hello).is_error());
            replies_in_a_pipeline(&mut client);
            replies_of_own_connections(&mut client, &sidecar);
        }
        pushes_are_no_replies(&sidecar);
    }
}

/// In one pipeline with what goes before and after.
fn replies_in_a_pipeline(client: &mut Client) {
    let off = [
        "SET a 1",
        "GET a",
        "CLIENT REPLY OFF",
        "SET a 2",
        "MGET a b c",
        "NONSENSE",
        "CLIENT REPLY x",
        "CLIENT REPLY ON",
        "GET a",
    ];
    assert_eq!(exchange(client, &off, 4), [ok(), bulk("1"), ok(), bulk("2")]);
    for skipped in ["GET a", "MGET a b c", "NONSENSE", "PING", "SCAN 0", "DEL none other"] {
        assert_eq!(exchange(client, &["CLIENT REPLY SKIP", skipped, "GET a", "ECHO x"], 2), [bulk("2"), bulk("x")], "{skipped}");
    }
    // The later one counts; one that is off stays off.
    assert_eq!(exchange(client, &["CLIENT REPLY SKIP", "CLIENT REPLY SKIP", "ECHO x", "ECHO y"], 1), [bulk("y")]);
    assert_eq!(exchange(client, &["CLIENT REPLY SKIP", "CLIENT REPLY ON", "ECHO y"], 2), [ok(), bulk("y")]);
    let nested = ["CLIENT REPLY OFF", "CLIENT REPLY SKIP", "ECHO x", "ECHO y", "CLIENT REPLY ON", "ECHO z"];
    assert_eq!(exchange(client, &nested, 2), [ok(), bulk("z")]);
    assert_eq!(
        exchange(client, &["CLIENT REPLY OFF", "ECHO x", "RESET", "ECHO z"], 2),
        [Value::Simple("RESET".to_owned()), bulk("z")]
    );
}

/// MULTI, a command that blocks, one that is too long to be held, and a reply that is.
fn replies_of_own_connections(client: &mut Client, sidecar: &Sidecar) {
    let skip = ["CLIENT REPLY SKIP", "MULTI", "SET {t}a 1", "INCR {t}a", "EXEC", "ECHO x"];
    let queued = Value::Simple("QUEUED".to_owned());
    let done = Value::Array(vec![ok(), Value::Int(2)]);
    assert_eq!(exchange(client, &skip, 4), [queued.clone(), queued, done, bulk("x")]);
    let off =
        ["CLIENT REPLY OFF", "MULTI", "SET {t}a 7", "EXEC", "RPUSH l x", "BLPOP l 1", "CLIENT REPLY ON", "GET {t}a", "LLEN l"];
    assert_eq!(exchange(client, &off, 3), [ok(), bulk("7"), Value::Int(0)]);

    send(client, &["CLIENT REPLY SKIP", "BLPOP q 0", "ECHO after"]);
    let mut pusher = sidecar.client();
    assert_eq!(pusher.line("RPUSH q x"), Value::Int(1));
    assert_eq!(client.read().unwrap(), bulk("after"));

    let long = "v".repeat(3 << 20);
    send(client, &["CLIENT REPLY SKIP"]);
    client.send(&encode(&["SET", "long", &long])).unwrap();
    for _ in 0..3 {
        assert_eq!(exchange(client, &["ECHO x", "CLIENT REPLY SKIP", "GET long", "ECHO y"], 2), [bulk("x"), bulk("y")]);
    }
    let off = ["CLIENT REPLY OFF", "GET long", "GET long", "STRLEN long", "CLIENT REPLY ON", "STRLEN long"];
    assert_eq!(exchange(client, &off, 2), [ok(), Value::Int(3 << 20)]);
    assert_eq!(client.line("DEL long a {t}a"), Value::Int(3));
}

fn pushes_are_no_replies(sidecar: &Sidecar) {
    let mut client = sidecar.client();
    assert!(!client.line("HELLO 3").is_error());
    send(&mut client, &["CLIENT REPLY OFF", "SUBSCRIBE news", "PING"]);
    assert!(matches!(client.read().unwrap(), Value::Push(_)));
    let mut publisher = sidecar.client();
    for index in 0..100 {
        send(&mut client, &["ECHO dropped", "CLIENT ID"]);
        publisher.line(&format!("PUBLISH news {index}"));
        let Value::Push(items) = client.read().unwrap() else { panic!("a message is a push") };
        assert_eq!(items[2].text(), index.to_string());
    }
    send(&mut client, &["CLIENT REPLY ON", "CLIENT REPLY SKIP"]);
    assert_eq!(client.read().unwrap(), ok());
    publisher.line("PUBLISH news last");
    assert!(matches!(client.read().unwrap(), Value::Push(_)), "it waits for no reply");
    assert_eq!(exchange(&mut client, &["ECHO x", "ECHO y"], 1), [bulk("y")]);
}

/// Each access of a key counts once, unless the client is in the mode.
fn frequency(server: &Redis, key: &str) -> i64 {
    server.client().line(&format!("OBJECT FREQ {key}")).int()
}

#[test]
fn reads_of_a_client_that_says_so_touch_nothing() {
    let lfu = ["--maxmemory-policy", "allkeys-lfu", "--lfu-log-factor", "0", "--lfu-decay-time", "0"];
    let cluster = RedisCluster::start_with(Engine::Valkey9, 3, 0, &lfu);
    let sidecar = Sidecar::start(&bypass(cluster_topology(&cluster)));
    let (mut quiet, mut plain) = (sidecar.client(), sidecar.client());
    let keys = ["{a}k", "{b}k", "{c}k"];
    keys.iter().for_each(|key| assert_eq!(plain.line(&format!("SET {key} v")), ok()));
    let frequencies = |keys: &[&str]| -> Vec<i64> {
        let slot = |key: &str| larder::sidecar::slots::slot_of(key.as_bytes());
        keys.iter().map(|key| frequency(cluster.owner(slot(key)), key)).collect()
    };
    let before = frequencies(&keys);
    let reads: Vec<String> =
        keys.iter().flat_map(|key| [format!("GET {key}"), "MULTI".into(), format!("GET {key}"), "EXEC".into()]).collect();
    let reads: Vec<&str> = reads.iter().map(String::as_str).collect();
    let mut lines = vec!["CLIENT NO-TOUCH ON"];
    lines.extend(&reads);
    assert_eq!(exchange(&mut quiet, &lines, 13)[0], ok());
    assert_eq!(frequencies(&keys), before);
    // Whoever is not in the mode touches, before and after.
    exchange(&mut plain, &reads, 12);
    let touched = frequencies(&keys);
    assert!(touched.iter().zip(&before).all(|(after, before)| *after == before + 2), "{before:?} {touched:?}");
    let mut lines = vec!["CLIENT NO-TOUCH OFF"];
    lines.extend(&reads);
    assert_eq!(exchange(&mut quiet, &lines, 13)[0], ok());
    let again = frequencies(&keys);
    assert!(again.iter().zip(&touched).all(|(after, before)| *after == before + 2), "{touched:?} {again:?}");
    // RESET ends it, too; a server's own refusal leaves the client as it was.
    assert_eq!(exchange(&mut quiet, &["CLIENT NO-TOUCH ON", "RESET", "GET {a}k"], 3)[2], bulk("v"));
    assert_eq!(frequencies(&keys[..1]), [again[0] + 1]);
    assert!(quiet.line("CLIENT IMPORT-SOURCE ON").is_error());
    assert_eq!(quiet.line("GET {a}k"), bulk("v"));
    assert_eq!(frequencies(&keys[..1]), [again[0] + 2]);
}

#[test]
fn a_mode_that_no_server_knows_is_refused_in_its_words() {
    let sentinel = SentinelCluster::start(Engine::Redis7, 1);
    let sidecar = Sidecar::start(&bypass(sentinel_topology(&sentinel)));
    let mut client = sidecar.client();
    for line in ["CLIENT NO-TOUCH ON", "CLIENT NO-TOUCH OFF", "CLIENT IMPORT-SOURCE ON"] {
        assert_eq!(client.line(line), sentinel.primary().client().line(line), "{line}");
        assert_eq!(client.line("SET k v"), ok());
    }
}

/// Imports go through the sidecar, on both topologies: a source sees keys that have expired, which others do not.
#[test]
fn an_import_source_is_one_at_every_server() {
    let cluster = RedisCluster::start_with(Engine::Valkey9, 3, 0, &["--import-mode", "yes"]);
    let sidecar = Sidecar::start(&bypass(cluster_topology(&cluster)));
    let (mut source, mut other) = (sidecar.client(), sidecar.client());
    assert_eq!(source.line("CLIENT IMPORT-SOURCE ON"), ok());
    for key in ["{a}k", "{b}k", "{c}k"] {
        assert_eq!(source.line(&format!("SET {key} v PX 1")), ok());
        wait_for("the key to expire for others", LIMIT, || other.line(&format!("GET {key}")) == Value::Nil);
        assert_eq!(source.line(&format!("GET {key}")), bulk("v"));
    }
    assert_eq!(source.line("CLIENT IMPORT-SOURCE OFF"), ok());
    assert_eq!(source.line("GET {a}k"), Value::Nil);
}

#[test]
fn statistics_of_slots_are_those_of_all_shards() {
    let cluster = RedisCluster::start(Engine::Valkey9, 3, 0);
    let sidecar = Sidecar::start(&bypass(cluster_topology(&cluster)));
    let mut client = sidecar.client();
    assert!(!client.line("HELLO 3").is_error());
    let mut counts: Vec<(i64, i64)> = Vec::new();
    for (index, tag) in ["{a}", "{b}", "{c}", "{d}", "{e}"].iter().enumerate() {
        (0..=index).for_each(|key| assert_eq!(client.line(&format!("SET {tag}{key} v")), ok()));
        counts.push((client.line(&format!("CLUSTER KEYSLOT {tag}")).int(), index as i64 + 1));
    }
    let rows = |reply: Value| -> Vec<(i64, i64)> {
        let row = |row: &Value| (row.items()[0].int(), row.items()[1].items()[1].int());
        reply.items().iter().map(row).collect()
    };
    let owners: std::collections::BTreeSet<u16> = counts.iter().map(|(slot, _)| cluster.owner(*slot as u16).port()).collect();
    assert!(owners.len() > 1, "the keys lie on several shards");
    counts.reverse();
    assert_eq!(rows(client.line("CLUSTER SLOT-STATS ORDERBY KEY-COUNT LIMIT 4")), counts[..4]);
    let least = rows(client.line("CLUSTER SLOT-STATS ORDERBY key-count LIMIT 3 ASC"));
    assert_eq!(least, [(0, 0), (1, 0), (2, 0)]);
    let all = rows(client.line("CLUSTER SLOT-STATS SLOTSRANGE 0 16383"));
    assert_eq!(all.len(), 16384);
    assert!(all.iter().enumerate().all(|(index, (slot, _))| *slot == index as i64));
    let mut found: Vec<(i64, i64)> = all.into_iter().filter(|(_, keys)| *keys > 0).collect();
    counts.sort_unstable();
    found.sort_unstable();
    assert_eq!(found, counts);
    assert!(client.line("CLUSTER SLOT-STATS ORDERBY nonsense").is_error());
}
