//! MULTI, WATCH, EXEC through the sidecar, in both topologies.

use std::time::Duration;

use serde_json::Value as Json;

use crate::support::resp::{Client, Value, encode};
use crate::support::server::{Engine, RedisCluster, SentinelCluster};
use crate::support::sidecar::{Sidecar, bypass, cluster_topology, sentinel_topology};
use crate::support::wait_for;

fn ok() -> Value {
    Value::Simple("OK".to_owned())
}

fn queued() -> Value {
    Value::Simple("QUEUED".to_owned())
}

/// Runs `check` through a sidecar before each topology.
fn in_both(check: impl Fn(&Sidecar)) {
    let sentinel = SentinelCluster::start(Engine::Redis7, 1);
    check(&Sidecar::start(&bypass(sentinel_topology(&sentinel))));
    let cluster = RedisCluster::start(Engine::Redis7, 3, 0);
    check(&Sidecar::start(&bypass(cluster_topology(&cluster))));
}

#[test]
fn transactions_are_those_of_redis() {
    in_both(|sidecar| {
        let mut client = sidecar.client();
        // Commands without keys may come first.
        for (command, reply) in [
            ("MULTI", ok()),
            ("PING", queued()),
            ("SET {t}a 1", queued()),
            ("INCR {t}a", queued()),
            ("LPUSH {t}a x", queued()),
            ("ECHO hello", queued()),
            ("BLPOP {t}none 0", queued()),
        ] {
            assert_eq!(client.line(command), reply, "{command}");
        }
        let results = client.line("EXEC").items();
        assert_eq!(results[..3], [Value::Simple("PONG".to_owned()), ok(), Value::Int(2)]);
        assert!(matches!(&results[3], Value::Error(text) if text.starts_with("WRONGTYPE")), "{results:?}");
        assert_eq!(results[4..], [Value::Bulk(b"hello".to_vec()), Value::Nil]);
        assert_eq!(client.line("GET {t}a").text(), "2");
        // Nothing at all.
        assert_eq!([client.line("MULTI"), client.line("EXEC")], [ok(), Value::Array(Vec::new())]);
        assert_eq!([client.line("MULTI"), client.line("DISCARD"), client.line("UNWATCH")], [ok(), ok(), ok()]);
        assert_eq!(client.line("EXEC"), Value::Error("ERR EXEC without MULTI".to_owned()));
        assert_eq!(client.line("DISCARD"), Value::Error("ERR DISCARD without MULTI".to_owned()));
        // Discarded.
        assert_eq!([client.line("MULTI"), client.line("SET {t}a 9"), client.line("DISCARD")], [ok(), queued(), ok()]);
        assert_eq!(client.line("GET {t}a").text(), "2");
    });
}

#[test]
fn what_is_refused_within_multi_aborts_it() {
    in_both(|sidecar| {
        let aborted = |client: &mut Client| {
            let reply = client.line("EXEC");
            assert!(matches!(&reply, Value::Error(text) if text.starts_with("EXECABORT")), "{reply:?}");
        };
        for refused in ["SET {t}a", "NOSUCHCOMMAND x", "CONFIG SET maxmemory 1", "SELECT", "MONITOR", "FLUSHALL"] {
            let mut client = sidecar.client();
            assert_eq!([client.line("MULTI"), client.line("SET {t}b 1")], [ok(), queued()]);
            assert!(client.line(refused).is_error(), "{refused}");
            assert_eq!(client.line("SET {t}b 2"), queued());
            aborted(&mut client);
            assert_eq!(client.line("GET {t}b"), Value::Nil, "{refused}");
        }
        // Not refused by Redis either: only the one command fails.
        let mut client = sidecar.client();
        assert_eq!(client.line("MULTI"), ok());
        assert_eq!(client.line("MULTI"), Value::Error("ERR MULTI calls can not be nested".to_owned()));
        assert_eq!(client.line("WATCH {t}a"), Value::Error("ERR WATCH inside MULTI is not allowed".to_owned()));
        assert_eq!(client.line("SET {t}c 1"), queued());
        assert_eq!(client.line("EXEC"), Value::Array(vec![ok()]));
    });
}

#[test]
fn a_watched_key_that_changes_ends_the_transaction_with_nil() {
    in_both(|sidecar| {
        let (mut client, mut other) = (sidecar.client(), sidecar.client());
        for changed in [false, true] {
            assert_eq!(client.line("SET {w}n 1"), ok());
            assert_eq!(client.line("WATCH {w}n {w}m"), ok());
            // Between WATCH and MULTI commands take their usual ways, in a Cluster also to other servers.
            assert_eq!(client.line("GET {w}n").text(), "1");
            assert_eq!(client.line("SET elsewhere 1"), ok());
            if changed {
                assert_eq!(other.line("INCR {w}n"), Value::Int(2));
            }
            assert_eq!([client.line("MULTI"), client.line("SET {w}n 10")], [ok(), queued()]);
            let expected = if changed { Value::Nil } else { Value::Array(vec![ok()]) };
            assert_eq!(client.line("EXEC"), expected, "changed: {changed}");
        }
        // UNWATCH forgets, and so does EXEC.
        assert_eq!([client.line("WATCH {w}n"), client.line("UNWATCH")], [ok(), ok()]);
        assert_eq!(other.line("SET {w}n 5"), ok());
        assert_eq!([client.line("MULTI"), client.line("GET {w}n")], [ok(), queued()]);
        assert_eq!(client.line("EXEC"), Value::Array(vec![Value::Bulk(b"5".to_vec())]));
        // RESP3 has another nil.
        let mut three = sidecar.client();
        three.line("HELLO 3");
        assert_eq!(three.line("WATCH {w}n"), ok());
        assert_eq!(other.line("SET {w}n 6"), ok());
        assert_eq!([three.line("MULTI"), three.line("GET {w}n"), three.line("EXEC")], [ok(), queued(), Value::Nil]);
    });
}

#[test]
fn pipelined_transactions_keep_their_order_among_other_commands() {
    in_both(|sidecar| {
        let mut client = sidecar.client();
        let mut wire = Vec::new();
        for round in 0..50 {
            let value = round.to_string();
            for command in [
                &["SET", "{p}k", value.as_str()][..],
                &["MULTI"],
                &["APPEND", "{p}k", "x"],
                &["GET", "{p}k"],
                &["EXEC"],
                &["GET", "{p}k"],
            ] {
                wire.extend_from_slice(&encode(command));
            }
        }
        client.send(&wire).unwrap();
        for round in 0..50 {
            let after = format!("{round}x");
            assert_eq!([client.read().unwrap(), client.read().unwrap()], [ok(), ok()]);
            assert_eq!([client.read().unwrap(), client.read().unwrap()], [queued(), queued()]);
            assert_eq!(client.read().unwrap().items()[1].text(), after);
            assert_eq!(client.read().unwrap().text(), after);
        }
    });
}

#[test]
fn keys_of_two_slots_are_refused_in_one_transaction() {
    let cluster = RedisCluster::start(Engine::Redis7, 3, 0);
    let sidecar = Sidecar::start(&bypass(cluster_topology(&cluster)));
    let mut client = sidecar.client();
    assert_eq!([client.line("MULTI"), client.line("SET {a}k 1")], [ok(), queued()]);
    let cross = Value::Error("CROSSSLOT Keys in request don't hash to the same slot".to_owned());
    assert_eq!(client.line("SET {b}k 1"), cross);
    assert!(client.line("EXEC").is_error());
    assert_eq!(client.line("GET {a}k"), Value::Nil);
}

#[test]
fn connections_go_back_clean_or_not_at_all() {
    let sentinel = SentinelCluster::start(Engine::Redis7, 1);
    let sidecar = Sidecar::start(&bypass(sentinel_topology(&sentinel)));
    let mut server = sentinel.primary().client();
    let connections = |server: &mut Client| server.line("CLIENT LIST TYPE normal").text().lines().count();
    let mut client = sidecar.client();
    for _ in 0..20 {
        assert_eq!([client.line("MULTI"), client.line("SET k 1"), client.line("EXEC")].len(), 3);
    }
    let clean = connections(&mut server);
    // Left in the middle: the connection goes with the client.
    for _ in 0..5 {
        let mut leaver = sidecar.client();
        assert_eq!([leaver.line("WATCH k"), leaver.line("MULTI"), leaver.line("SET k 2")], [ok(), ok(), queued()]);
    }
    wait_for("no connection to be left", Duration::from_secs(10), || connections(&mut server) <= clean);
    assert_eq!(client.line("GET k").text(), "1");
    assert!(!server.line("CLIENT LIST TYPE normal").text().lines().any(|line| !line.contains("multi=-1")));
}

#[test]
fn a_lost_watch_ends_the_transaction_with_nil() {
    let sentinel = SentinelCluster::start(Engine::Redis7, 1);
    let sidecar = Sidecar::start(&bypass(sentinel_topology(&sentinel)));
    let mut client = sidecar.client();
    assert_eq!(client.line("WATCH k"), ok());
    let mut server = sentinel.primary().client();
    let watching = server.line("CLIENT LIST TYPE normal").text();
    let watching = watching.lines().find(|line| line.contains("cmd=watch")).expect("a watching connection").to_owned();
    let id = watching.split_whitespace().find_map(|field| field.strip_prefix("id=")).unwrap().to_owned();
    assert_eq!(server.line(&format!("CLIENT KILL ID {id}")), Value::Int(1));
    assert_eq!([client.line("MULTI"), client.line("SET k 1"), client.line("EXEC")], [ok(), queued(), Value::Nil]);
    assert_eq!(client.line("GET k"), Value::Nil);
}

#[test]
fn covered_keys_get_their_ttl_within_transactions() {
    let rules: Json = serde_json::json!([{"name": "user", "keys": "user:{id}", "strategy":
        {"cacheAside": {"ttl": {"default": "10m", "max": "24h", "jitter": "10%"}}}}]);
    let with_rules = |topology| {
        let mut snapshot = bypass(topology);
        snapshot["rules"] = rules.clone();
        snapshot
    };
    let sentinel = SentinelCluster::start(Engine::Redis7, 1);
    let cluster = RedisCluster::start(Engine::Redis7, 3, 0);
    for snapshot in [with_rules(sentinel_topology(&sentinel)), with_rules(cluster_topology(&cluster))] {
        let sidecar = Sidecar::start(&snapshot);
        for hello in ["HELLO 2", "HELLO 3"] {
            let mut client = sidecar.client();
            client.line(hello);
            client.line("DEL user:1");
            assert_eq!([client.line("MULTI"), client.line("HSET user:1 name x")], [ok(), queued()]);
            assert_eq!([client.line("HGET user:1 name"), client.line("TTL user:1")], [queued(), queued()]);
            let results = client.line("EXEC").items();
            assert_eq!(results[..2], [Value::Int(1), Value::Bulk(b"x".to_vec())]);
            assert!((500..=600).contains(&results[2].int()), "{results:?}");
            assert_eq!(results.len(), 3);
        }
    }
}

/// What a transaction reads and writes counts for its rule as elsewhere, once EXEC has carried it out; its commands count for the node.
#[test]
fn transactions_are_counted() {
    let servers = SentinelCluster::start(Engine::Redis7, 1);
    let mut snapshot = bypass(sentinel_topology(&servers));
    snapshot["rules"] = serde_json::json!([{"name": "user", "keys": "user:{id}", "strategy":
        {"cacheAside": {"ttl": {"default": "10m", "max": "24h", "jitter": "10%"}}}}]);
    let sidecar = Sidecar::start(&snapshot);
    let mut client = sidecar.client();
    let counts = |client: &mut Client, rule: &str| {
        let stats = client.line(&format!("LARDER.STATS {rule}")).items()[1].items();
        let of = |name: &str| stats.chunks(2).find(|pair| pair[0].text() == name).unwrap()[1].int();
        [of("hits"), of("misses"), of("ttl_added")]
    };
    let sent = || sidecar.metric(&format!("larder_node_requests_total{{node=\"127.0.0.1:{}\"}}", servers.primary_port()));
    let before = sent();
    let lines =
        ["GET user:1", "SET user:1 x", "GET user:1", "HGET user:1 f", "INCR user:2", "GET other", "TTL user:3", "DEL user:1"];
    for end in ["DISCARD", "EXEC"] {
        assert_eq!(client.line("MULTI"), ok());
        lines.iter().for_each(|line| assert_eq!(client.line(line), queued()));
        client.line(end);
    }
    assert_eq!(counts(&mut client, "user"), [2, 1, 2], "HGET failed");
    assert_eq!(counts(&mut client, "(unmatched)"), [0, 1, 0]);
    assert_eq!(sent() - before, (2 * lines.len() + 1) as f64, "MULTI goes with the first command");
    // A watched key that changes: nothing was carried out.
    assert_eq!(client.line("WATCH user:9"), ok());
    sidecar.client().line("SET user:9 y");
    assert_eq!([client.line("MULTI"), client.line("GET user:9"), client.line("EXEC")], [ok(), queued(), Value::Nil]);
    assert_eq!(counts(&mut client, "user"), [2, 1, 3], "the other client's SET alone");
    // A long value, and a pop that blocks.
    let long = vec![b'x'; 100_000];
    assert_eq!(client.call(&[&b"SET"[..], b"user:4", &long]), ok());
    assert_eq!(client.line("RPUSH user:5 a"), Value::Int(1));
    assert_eq!(client.line("BLMOVE user:5 user:6 LEFT LEFT 1").text(), "a");
    assert_eq!(counts(&mut client, "user"), [2, 1, 6]);
}

#[test]
fn a_transaction_that_loses_its_server_says_what_became_of_it() {
    let mut sentinel = SentinelCluster::start(Engine::Redis7, 1);
    let sidecar = Sidecar::start(&bypass(sentinel_topology(&sentinel)));
    let mut client = sidecar.client();
    assert_eq!([client.line("MULTI"), client.line("SET k 1")], [ok(), queued()]);
    let first = sentinel.primary_port();
    let at = sentinel.servers.iter().position(|server| server.port() == first).unwrap();
    sentinel.servers[at].kill();
    let lost = client.line("EXEC");
    assert!(
        matches!(&lost, Value::Error(text) if ["EXECABORT", "TRYAGAIN", "UNCERTAIN"].iter().any(|code| text.starts_with(code)))
    );
    // Refused as a whole, never in part: nothing after MULTI is carried out alone.
    client.send(&[encode(&["MULTI"]), encode(&["SET", "k", "2"]), encode(&["EXEC"])].concat()).unwrap();
    let replies = [client.read().unwrap(), client.read().unwrap(), client.read().unwrap()];
    if replies[2].is_error() {
        assert_ne!(replies[1], ok());
    }
    wait_for("service to go on", Duration::from_secs(60), || {
        client.line("MULTI");
        client.line("INCR n");
        matches!(client.line("EXEC"), Value::Array(_))
    });
}

/// Nobody keeps a connection from others by saying nothing; and who blocks for ever takes none from transactions.
#[test]
fn idle_transactions_and_watches_give_their_connections_back() {
    const ALL: usize = 64;
    let servers = SentinelCluster::start(Engine::Redis7, 1);
    let mut snapshot = bypass(sentinel_topology(&servers));
    snapshot["cluster"]["patience"] = "300ms".into();
    let sidecar = Sidecar::start(&snapshot);
    let blocked: Vec<Client> = (0..ALL + 6)
        .map(|_| {
            let mut client = sidecar.client();
            client.send(&encode(&["BLPOP", "never", "0"])).unwrap();
            client
        })
        .collect();
    let mut idle: Vec<Client> = (0..ALL).map(|_| sidecar.client()).collect();
    for (index, client) in idle.iter_mut().enumerate() {
        let (line, reply) = if index % 2 == 0 { ("WATCH k", ok()) } else { ("MULTI", ok()) };
        assert_eq!(client.line(line), reply);
        if index % 2 == 1 {
            assert_eq!(client.line("INCR k"), queued());
        }
    }
    let mut late = sidecar.client();
    let reply = late.line("WATCH k");
    assert!(matches!(&reply, Value::Error(text) if text.starts_with("TRYAGAIN all 64 connections")), "{reply:?}");

    snapshot["generation"] = 2.into();
    snapshot["cluster"]["idleTransaction"] = "1s".into();
    sidecar.replace_snapshot(&snapshot.to_string());
    wait_for("all connections to be free", Duration::from_secs(30), || {
        (0..ALL).map(|_| sidecar.client()).collect::<Vec<_>>().iter_mut().all(|client| client.line("WATCH k") == ok())
    });
    for (index, client) in idle.iter_mut().enumerate() {
        let aborted = |reply: Value| matches!(&reply, Value::Error(text) if text.starts_with("EXECABORT Transaction discarded: no command came for 1s"));
        match index % 4 {
            // Watched alone: the client tries again, as after a change.
            0 | 2 => {
                assert_eq!([client.line("MULTI"), client.line("INCR k")], [ok(), queued()]);
                assert_eq!(client.line("EXEC"), Value::Nil);
            }
            1 => assert!(aborted(client.line("EXEC"))),
            _ => {
                assert!(aborted(client.line("INCR k")));
                assert_eq!(client.line("INCR k"), queued());
                assert_eq!(
                    client.line("EXEC"),
                    Value::Error("EXECABORT Transaction discarded because of previous errors.".to_owned())
                );
            }
        }
        assert_eq!([client.line("MULTI"), client.line("GET k")], [ok(), queued()]);
        assert_eq!(client.line("EXEC"), Value::Array(vec![Value::Nil]), "{index}");
    }
    drop(blocked);
    // Who stops within a long command is closed.
    let mut stalled = sidecar.client();
    stalled.send(&[b"*3\r\n$3\r\nSET\r\n$1\r\nk\r\n$100000\r\n".as_slice(), &[b'x'; 70_000]].concat()).unwrap();
    assert!(stalled.read().is_err_and(|error| error.kind() == std::io::ErrorKind::UnexpectedEof));
    assert_eq!(late.line("GET k"), Value::Nil);
}

#[test]
fn inline_commands_may_be_a_transaction() {
    let sentinel = SentinelCluster::start(Engine::Redis7, 1);
    let sidecar = Sidecar::start(&bypass(sentinel_topology(&sentinel)));
    let mut client = sidecar.client();
    client.send(b"MULTI\r\nSET k 'a b'\r\n\r\nGET k\r\nEXEC\r\nBLPOP none 0.01\r\nGET k\r\n").unwrap();
    assert_eq!([client.read().unwrap(), client.read().unwrap(), client.read().unwrap()], [ok(), queued(), queued()]);
    assert_eq!(client.read().unwrap(), Value::Array(vec![ok(), Value::Bulk(b"a b".to_vec())]));
    assert_eq!([client.read().unwrap(), client.read().unwrap()], [Value::Nil, Value::Bulk(b"a b".to_vec())]);
}
