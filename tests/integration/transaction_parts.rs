//! Transactions with commands that the sidecar answers itself, or has a part in: byte for byte as by a bare server.

use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, sleep};
use std::time::Duration;

use serde_json::json;

use crate::support::resp::{Client, Value, encode, show};
use crate::support::server::{Engine, Redis, RedisCluster, SentinelCluster};
use crate::support::sidecar::{Sidecar, bypass, cluster_topology, sentinel_topology};
use crate::support::wait_for;

/// Ends each conversation.
const MARK: &str = "the-end";
/// What is sent is cut into pieces of at most so many bytes.
const PIECES: [usize; 3] = [usize::MAX, 37, 5];

/// What one client sends. In a Cluster a transaction goes to its first key's server.
const CONVERSATIONS: &[&[&str]] = &[
    // In order with all others, and with what the connection is called afterwards.
    &[
        "MULTI",
        "CLIENT SETNAME me",
        "CLIENT GETNAME",
        "SET {a}x 1",
        "CLIENT SETNAME you",
        "INCR {a}x",
        "CLIENT GETNAME",
        "EXEC",
        "CLIENT GETNAME",
    ],
    &["MULTI", "CLIENT GETNAME", "EXEC"],
    &["MULTI", "CLIENT SETNAME me", "DISCARD", "CLIENT GETNAME"],
    &["MULTI", "CLIENT SETNAME me", "RESET", "CLIENT GETNAME"],
    &["WATCH {a}x", "SET {a}x 5", "MULTI", "CLIENT SETNAME me", "HELLO 3", "SELECT 0", "EXEC", "CLIENT GETNAME", "GET {a}none"],
    // Errors of form are told at once, and abort.
    &["MULTI", "SET {a}x 1", "CLIENT SETNAME", "CLIENT SETNAME me", "EXEC", "CLIENT GETNAME"],
    &["MULTI", "SET {a}x 1", "CLUSTER NONSENSE", "EXEC"],
    &["MULTI", "SET {a}x 1", "CLIENT NONSENSE", "SELECT", "AUTH", "EXEC"],
    // Others are elements.
    &[
        "MULTI",
        "SET {a}x 1",
        "AUTH a b c d",
        "PING a b",
        "SELECT x",
        "SELECT 99999999999",
        "CLIENT SETNAME a\u{1}b",
        "CLIENT NO-EVICT maybe",
        "CLIENT NO-EVICT on",
        "CLIENT KILL nonsense x",
        "CLIENT KILL 1.2.3.4:5",
        "CLIENT UNBLOCK 999999",
        "CLIENT TRACKING maybe",
        "CLIENT CACHING YES",
        "CLIENT GETREDIR",
        "CLIENT TRACKINGINFO",
        "EXEC",
        "CLIENT GETNAME",
    ],
    // The protocol changes in the midst.
    &[
        "MULTI",
        "HGETALL {a}h",
        "HELLO 3",
        "HGETALL {a}h",
        "GET {a}none",
        "CLIENT GETNAME",
        "HELLO 2 SETNAME two",
        "HGETALL {a}h",
        "GET {a}none",
        "CLIENT GETNAME",
        "EXEC",
        "HGETALL {a}h",
    ],
    &["MULTI", "SET {a}x 1", "HELLO 3", "EXEC", "HGETALL {a}h", "GET {a}none"],
    &[
        "MULTI",
        "HELLO",
        "HELLO 4",
        "HELLO x",
        "HELLO 3 NONSENSE",
        "HELLO 3 SETNAME a\u{1}b",
        "HGETALL {a}h",
        "EXEC",
        "HGETALL {a}h",
    ],
    &["MULTI", "HELLO 3", "HGETALL {a}h", "DISCARD", "HGETALL {a}h"],
    // Who wants no replies gets none, from there on.
    &["MULTI", "PING", "SET {a}x 2", "CLIENT REPLY OFF", "PING", "CLIENT GETNAME", "CLIENT REPLY ON", "PING", "EXEC", "GET {a}x"],
    &["MULTI", "SET {a}x 2", "CLIENT REPLY OFF", "GET {a}x", "CLIENT GETNAME", "EXEC", "GET {a}x"],
    &["MULTI", "SET {a}x 2", "CLIENT REPLY SKIP", "GET {a}x", "CLIENT GETNAME", "EXEC", "GET {a}x", "GET {a}x"],
    &["MULTI", "SET {a}x 2", "CLIENT REPLY SKIP", "CLIENT REPLY OFF", "CLIENT REPLY ON", "EXEC", "PING", "PING"],
    &["MULTI", "SET {a}x 2", "CLIENT REPLY OFF", "CLIENT REPLY SKIP", "CLIENT REPLY ON", "PING", "EXEC", "PING"],
    &["CLIENT REPLY OFF", "MULTI", "SET {a}x 3", "CLIENT REPLY ON", "PING", "EXEC", "PING"],
    &["CLIENT REPLY SKIP", "MULTI", "SET {a}x 3", "CLIENT GETNAME", "EXEC"],
    &["MULTI", "SET {a}x 3", "CLIENT REPLY maybe", "EXEC"],
    // Subscriptions.
    &[
        "MULTI",
        "SUBSCRIBE one two",
        "GET {a}h2",
        "PSUBSCRIBE p*",
        "UNSUBSCRIBE one none",
        "SSUBSCRIBE {a}s",
        "UNSUBSCRIBE",
        "PUNSUBSCRIBE",
        "SUNSUBSCRIBE",
        "EXEC",
        "PING",
    ],
    &["MULTI", "SUBSCRIBE one", "EXEC", "PING", "UNSUBSCRIBE one", "PING"],
    &["MULTI", "SUBSCRIBE late", "DISCARD", "PUBLISH late x"],
    &["SUBSCRIBE one", "UNSUBSCRIBE one", "MULTI", "UNSUBSCRIBE", "EXEC"],
    // Tracking.
    &[
        "MULTI",
        "CLIENT TRACKING ON OPTIN",
        "CLIENT CACHING YES",
        "CLIENT TRACKINGINFO",
        "SET {a}x 4",
        "EXEC",
        "CLIENT TRACKINGINFO",
        "MULTI",
        "CLIENT TRACKING OFF",
        "EXEC",
        "CLIENT TRACKINGINFO",
    ],
    // What concerns all shards, or is answered for all of them.
    &["MULTI", "SET {a}n 1", "DBSIZE", "DEL {a}n", "DBSIZE", "EXEC", "DBSIZE"],
    &["MULTI", "SET {a}n 1", "KEYS {a}n", "KEYS none", "DEL {a}n", "KEYS {a}n", "EXEC"],
    &[
        "MULTI",
        "SET {a}x 1",
        "SCRIPT LOAD return{KEYS[1]}",
        "SCRIPT LOAD nonsense(",
        "SCRIPT EXISTS 890233c94faee9801fb9b69aef7c7dd33a24aaa1 0000000000000000000000000000000000000000",
        "EVALSHA 890233c94faee9801fb9b69aef7c7dd33a24aaa1 1 {a}x",
        "SCRIPT KILL",
        "EXEC",
        "EVALSHA 890233c94faee9801fb9b69aef7c7dd33a24aaa1 1 {b}x",
        "EVALSHA 890233c94faee9801fb9b69aef7c7dd33a24aaa1 1 {c}x",
        "MULTI",
        "SCRIPT FLUSH",
        "EXEC",
        "EVALSHA 890233c94faee9801fb9b69aef7c7dd33a24aaa1 1 {c}x",
    ],
    &["MULTI", "SET {a}x 1", "FUNCTION FLUSH", "FUNCTION KILL", "FUNCTION LIST", "PUBSUB NUMSUB none", "PUBSUB NUMPAT", "EXEC"],
    &["MULTI", "SET {a}x 1", "SLOWLOG RESET", "MEMORY PURGE", "CONFIG GET maxmemory-policy", "COMMAND GETKEYS GET a", "EXEC"],
    &["MULTI", "SET {a}x 1", "CLUSTER KEYSLOT a", "CLUSTER COUNTKEYSINSLOT 5", "CLUSTER GETKEYSINSLOT 5 10", "EXEC"],
    &[
        "MULTI",
        "SET {a}x 1",
        "FLUSHALL nonsense",
        "FLUSHALL",
        "SET {a}x 2",
        "DBSIZE",
        "FLUSHDB",
        "SET {a}x 3",
        "EXEC",
        "DBSIZE",
        "GET {a}x",
    ],
];

/// Of databases, of which a Cluster has one.
const DATABASES: &[&[&str]] = &[
    &[
        "MULTI",
        "SET {a}d zero",
        "SELECT 1",
        "GET {a}d",
        "SET {a}d one",
        "SELECT 99",
        "SELECT -1",
        "GET {a}d",
        "SELECT 0",
        "GET {a}d",
        "SELECT 1",
        "EXEC",
        "GET {a}d",
        "MULTI",
        "GET {a}d",
        "FLUSHDB",
        "DBSIZE",
        "EXEC",
        "SELECT 0",
        "GET {a}d",
    ],
    &["SELECT 1", "MULTI", "SELECT 2", "SET {a}d two", "DISCARD", "GET {a}d", "SET {a}d one", "SELECT 2", "GET {a}d"],
    &["SELECT 1", "WATCH {a}d", "SET {a}d x", "MULTI", "SELECT 2", "SET {a}d two", "EXEC", "GET {a}d", "DEL {a}d"],
    &["MULTI", "SELECT 3", "NONSENSE", "SET {a}d three", "EXEC", "GET {a}d", "MULTI", "SELECT 3", "EXEC", "GET {a}d"],
];

#[test]
fn they_are_those_of_a_bare_server_under_sentinel() {
    for engine in Engine::ALL {
        let servers = SentinelCluster::start(engine, 1);
        let sidecar = Sidecar::start(&allowing(bypass(sentinel_topology(&servers))));
        let bare = Redis::start(engine);
        compare(&bare, &sidecar, CONVERSATIONS);
        compare(&bare, &sidecar, DATABASES);
    }
}

#[test]
fn they_are_those_of_a_bare_server_under_cluster() {
    for engine in Engine::ALL {
        let servers = RedisCluster::start(engine, 3, 0);
        let sidecar = Sidecar::start(&allowing(bypass(cluster_topology(&servers))));
        let bare = Redis::start_with(engine, &["--cluster-enabled", "yes"]);
        assert_eq!(bare.client().line("CLUSTER ADDSLOTSRANGE 0 16383"), ok());
        wait_for("the cluster of one", Duration::from_secs(30), || {
            bare.client().line("CLUSTER INFO").text().contains("cluster_state:ok")
        });
        compare(&bare, &sidecar, CONVERSATIONS);
    }
}

/// With all that a policy can allow.
fn allowing(mut snapshot: serde_json::Value) -> serde_json::Value {
    snapshot["allow"] = json!({"keys": true, "flush": true});
    snapshot
}

fn ok() -> Value {
    Value::Simple("OK".to_owned())
}

fn queued() -> Value {
    Value::Simple("QUEUED".to_owned())
}

/// Holds each conversation with both, in both protocols, whole and in pieces.
#[track_caller]
fn compare(bare: &Redis, sidecar: &Sidecar, conversations: &[&[&str]]) {
    for client in [&mut bare.client(), &mut sidecar.client()] {
        assert_eq!(client.line("FLUSHALL"), ok());
    }
    for lines in conversations {
        for resp3 in [false, true] {
            for piece in PIECES {
                let replies = [bare.port(), sidecar.port()].map(|port| {
                    Client::connect(port).unwrap().line("HSET {a}h f v");
                    converse(port, lines, resp3, piece)
                });
                let told = format!("{:?}, RESP3: {resp3}, in pieces of {piece}: {lines:#?}", bare.engine());
                assert_eq!(replies[1], replies[0], "through the sidecar, and bare: {told}");
            }
        }
    }
}

/// All that comes back, with the number of the connection left out.
fn converse(port: u16, lines: &[&str], resp3: bool, piece: usize) -> String {
    let mut stream = TcpStream::connect(("127.0.0.1", port)).unwrap();
    stream.set_nodelay(true).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    let greeting = if resp3 { "HELLO 3" } else { "PING" };
    let end = ["CLIENT REPLY ON".to_owned(), format!("ECHO {MARK}")];
    let all = [greeting].into_iter().chain(lines.iter().copied()).chain(end.iter().map(String::as_str));
    let wire: Vec<u8> = all.flat_map(|line| encode(&line.split(' ').collect::<Vec<_>>())).collect();
    for part in wire.chunks(piece.min(wire.len())) {
        stream.write_all(part).unwrap();
        if piece < 10 {
            // So that the pieces are read one by one, mostly.
            sleep(Duration::from_micros(100));
        }
    }
    let (mut came, mut buffer) = (Vec::new(), [0; 4096]);
    while !came.ends_with(format!("{MARK}\r\n").as_bytes()) {
        let count = stream.read(&mut buffer);
        let count = count.unwrap_or_else(|error| panic!("{error} after {:?} of {lines:#?}", String::from_utf8_lossy(&came)));
        assert_ne!(count, 0, "closed after {:?} of {lines:#?}", String::from_utf8_lossy(&came));
        came.extend_from_slice(&buffer[..count]);
    }
    let text = String::from_utf8(came).unwrap();
    let mut parts = text.split("$2\r\nid\r\n:");
    let first = parts.next().unwrap().to_owned();
    parts.fold(first, |told, part| told + "$2\r\nid\r\n:N" + &part[part.find('\r').unwrap()..])
}

/// Runs `check` through a sidecar before each topology. The servers come with it.
fn in_both(check: impl Fn(&Sidecar, &[&Redis])) {
    let sentinel = SentinelCluster::start(Engine::Redis7, 1);
    check(&Sidecar::start(&allowing(bypass(sentinel_topology(&sentinel)))), &[sentinel.primary()]);
    let cluster = RedisCluster::start(Engine::Redis7, 3, 0);
    let shards: Vec<&Redis> = (0..3).map(|index| cluster.shard(index)).collect();
    check(&Sidecar::start(&allowing(bypass(cluster_topology(&cluster)))), &shards);
}

#[track_caller]
fn transaction(client: &mut Client, lines: &[&str]) -> Vec<Value> {
    assert_eq!(client.line("MULTI"), ok());
    lines.iter().for_each(|line| assert_eq!(client.line(line), queued(), "{line}"));
    client.line("EXEC").items()
}

/// Every shard is emptied, learns scripts and functions, and counts.
#[test]
fn what_concerns_all_shards_reaches_them_all() {
    in_both(|sidecar, servers| {
        let mut client = sidecar.client();
        for index in 0..50 {
            assert_eq!(client.line(&format!("SET k{index} v")), ok());
        }
        let function =
            "#!lua name=lib\nredis.register_function{function_name='f', callback=function() return 1 end, flags={'no-writes'}}";
        assert_eq!(client.line("MULTI"), ok());
        for words in [
            &["SET", "{a}x", "1"][..],
            &["DBSIZE"],
            &["SCRIPT", "LOAD", "return{KEYS[1]}"],
            &["FUNCTION", "LOAD", function],
            &["FCALL_RO", "f", "1", "{a}x"],
        ] {
            assert_eq!(client.call(words), queued(), "{}", show(words));
        }
        let results = client.line("EXEC").items();
        assert_eq!((&results[0], &results[1], &results[4]), (&ok(), &Value::Int(51), &Value::Int(1)), "{results:?}");
        let sha = results[2].text();
        for server in servers {
            let mut direct = server.client();
            assert_eq!(direct.line(&format!("SCRIPT EXISTS {sha}")).items(), [Value::Int(1)]);
            assert_eq!(direct.line("FUNCTION LIST").items().len(), 1);
            assert_ne!(direct.line("DBSIZE"), Value::Int(0));
        }
        // A walk from transaction to transaction finds all of them.
        let (mut cursor, mut found) = ("0".to_owned(), Vec::new());
        loop {
            let results = transaction(&mut client, &[&format!("SCAN {cursor} COUNT 7"), "GET {a}x"]);
            let page = results[0].items();
            found.extend(page[1].items().iter().map(Value::text));
            cursor = page[0].text();
            if cursor == "0" {
                break;
            }
        }
        found.sort();
        found.dedup();
        assert_eq!(found.len(), 51);
        assert!(transaction(&mut client, &["RANDOMKEY"])[0].text().contains(['k', 'x']));
        let results =
            transaction(&mut client, &["GET {a}x", "FLUSHALL", "SET {a}x 2", "FUNCTION FLUSH", "SCRIPT FLUSH", "DBSIZE"]);
        assert_eq!(results[5], Value::Int(1), "{results:?}");
        let left: Vec<Value> = servers.iter().map(|server| server.client().line("DBSIZE")).collect();
        assert_eq!(left.iter().map(Value::int).sum::<i64>(), 1, "{left:?}");
        for server in servers {
            assert!(server.client().line("FUNCTION LIST").items().is_empty());
            assert_eq!(server.client().line(&format!("SCRIPT EXISTS {sha}")).items(), [Value::Int(0)]);
        }
    });
}

/// As outside of transactions: neither Larder's own keys nor the servers' passwords.
#[test]
fn what_is_not_for_clients_is_left_out() {
    in_both(|sidecar, servers| {
        let mut client = sidecar.client();
        for server in servers {
            let mut direct = server.client();
            assert_eq!(direct.line("CONFIG SET masterauth hidden-word"), ok());
            for index in 0..2000 {
                direct.line(&format!("SET larder:s:{{{index}}} copy"));
            }
        }
        assert_eq!(client.line("SET {a}mine 1"), ok());
        for _ in 0..5 {
            let lines =
                ["GET {a}mine", "SCAN 0 COUNT 100000", "KEYS *", "RANDOMKEY", "CONFIG GET masterauth", "CONFIG GET maxmemory"];
            let results = transaction(&mut client, &lines);
            let told = format!("{results:?}");
            assert!(!told.contains("larder:") && !told.contains("hidden-word"), "{told}");
            assert_eq!(results[2].items(), [Value::Bulk(b"{a}mine".to_vec())]);
            assert_eq!(results[3].text(), "{a}mine");
            assert_eq!(results[4].items()[0].text(), "masterauth");
            assert_eq!(results[5].items()[1].text(), "0");
        }
        for refused in ["GET larder:s:{1}", "LARDER.EXPLAIN larder:s:{1}", "LARDER.INVALIDATE larder:s:{1}"] {
            assert_eq!(client.line("MULTI"), ok());
            let reply = client.line(refused);
            let end = client.line("EXEC");
            assert!(format!("{reply:?}{end:?}").contains("is Larder's own"), "{refused}: {reply:?} {end:?}");
        }
    });
}

/// Where EXEC carries nothing out, nor does the sidecar: whatever the reason.
#[test]
fn nothing_is_carried_out_where_exec_is_not() {
    in_both(|sidecar, servers| {
        let (mut client, mut other) = (sidecar.client(), sidecar.client());
        let lines = [
            "GET {a}x",
            "CLIENT SETNAME me",
            "HELLO 3",
            "CLIENT TRACKING ON",
            "SUBSCRIBE one",
            "LARDER.INVALIDATE {b}x",
            "FLUSHALL",
            "SCRIPT LOAD return{1}",
        ];
        for way in ["DISCARD", "EXECABORT", "nil", "nil at the server"] {
            for key in ["{a}x", "{b}x", "{c}x"] {
                assert_eq!(client.line(&format!("SET {key} 1")), ok());
            }
            if way.starts_with("nil") {
                assert_eq!(client.line("WATCH {a}x"), ok());
            }
            if way == "nil" {
                assert_eq!(other.line("SET {a}x 2"), ok());
            }
            assert_eq!(client.line("MULTI"), ok());
            lines.iter().for_each(|line| assert_eq!(client.line(line), queued(), "{line}"));
            match way {
                "DISCARD" => assert_eq!(client.line("DISCARD"), ok()),
                "EXECABORT" => {
                    assert!(client.line("SET {a}x").is_error());
                    assert!(matches!(client.line("EXEC"), Value::Error(text) if text.starts_with("EXECABORT")));
                }
                _ => {
                    other.line("SET {a}x 2");
                    assert_eq!(client.line("EXEC"), Value::Nil, "{way}");
                }
            }
            assert_eq!(client.line("CLIENT GETNAME"), Value::Nil, "{way}");
            assert!(
                matches!(client.line("CLIENT TRACKINGINFO"), Value::Array(_)),
                "{way}: it speaks RESP2, and is not subscribed"
            );
            assert!(format!("{:?}", client.line("CLIENT TRACKINGINFO")).contains("off"), "{way}");
            assert_eq!(client.line("GET {b}x").text(), "1", "{way}");
            for server in servers {
                let known = server.client().line("SCRIPT EXISTS 7da067d306ba2950a9b8ae9ef59deade71ff5b36");
                assert_eq!(known.items(), [Value::Int(0)], "{way}");
            }
        }
        assert_eq!(other.line("PUBLISH one x"), Value::Int(0));
    });
}

/// Nor where it is not known whether EXEC was.
#[test]
fn nothing_is_carried_out_where_the_server_is_lost() {
    let mut servers = SentinelCluster::start(Engine::Redis7, 0);
    let sidecar = Sidecar::start(&bypass(sentinel_topology(&servers)));
    let mut client = sidecar.client();
    assert_eq!([client.line("MULTI"), client.line("SET x 1")], [ok(), queued()]);
    assert_eq!([client.line("CLIENT SETNAME me"), client.line("SUBSCRIBE one")], [queued(), queued()]);
    servers.primary().pause();
    client.send(&encode(&["EXEC"])).unwrap();
    client.send(&encode(&["CLIENT", "GETNAME"])).unwrap();
    assert!(client.poll().is_none());
    servers.servers.iter_mut().for_each(Redis::kill);
    let reply = client.read().unwrap();
    // On a busy machine the sidecar may see that the server is gone before it sees EXEC.
    let expected = ["UNCERTAIN ", "TRYAGAIN ", "EXECABORT "];
    assert!(matches!(&reply, Value::Error(text) if expected.iter().any(|code| text.starts_with(code))), "{reply:?}");
    assert_eq!(client.read().unwrap(), Value::Nil);
}

/// Thousands in one transaction, each in its place.
#[test]
fn many_parts_keep_their_order() {
    const MANY: usize = 10_000;
    in_both(|sidecar, _| {
        let mut client = sidecar.client();
        let mut wire = encode(&["MULTI"]);
        for number in 0..MANY {
            wire.extend(encode(&["CLIENT", "SETNAME", &number.to_string()]));
            wire.extend(encode(&["SET", "{a}x", &number.to_string()]));
            wire.extend(encode(&["CLIENT", "GETNAME"]));
            wire.extend(encode(&["GET", "{a}x"]));
        }
        wire.extend(encode(&["EXEC"]));
        let mut sender = client.stream().try_clone().unwrap();
        let results = thread::scope(|scope| {
            scope.spawn(|| sender.write_all(&wire).unwrap());
            assert_eq!(client.read().unwrap(), ok());
            (0..4 * MANY).for_each(|_| assert_eq!(client.read().unwrap(), queued()));
            client.read().unwrap().items()
        });
        assert_eq!(results.len(), 4 * MANY);
        for (number, parts) in results.chunks(4).enumerate() {
            let told = Value::Bulk(number.to_string().into_bytes());
            assert_eq!(parts, [ok(), ok(), told.clone(), told]);
        }
    });
}

/// The connection of a transaction goes on in what it was brought into, and serves nobody else.
#[test]
fn connections_keep_to_their_database_and_protocol() {
    let servers = SentinelCluster::start(Engine::Valkey9, 1);
    let sidecar = Sidecar::start(&bypass(sentinel_topology(&servers)));
    let mut clients: Vec<Client> = (0..8).map(|_| sidecar.client()).collect();
    for (index, client) in clients.iter_mut().enumerate() {
        let select = format!("SELECT {index}");
        let set = format!("SET d {index}");
        let hello = if index % 2 == 0 { "HELLO 2" } else { "HELLO 3" };
        transaction(client, &[&select, hello, "CLIENT NO-TOUCH ON", &set, "HSET h f v"]);
    }
    for round in 0..20 {
        for (index, client) in clients.iter_mut().enumerate() {
            let results = transaction(client, &["GET d", "HGETALL h", "CLIENT LIST"]);
            assert_eq!(results[0].text(), index.to_string(), "round {round}");
            assert_eq!(matches!(results[1], Value::Map(_)), index % 2 == 1, "round {round}");
            assert_eq!(client.line("GET d").text(), index.to_string());
            let line = client.line("CLIENT INFO").text();
            assert!(line.contains(&format!(" db={index} ")) && line.contains("flags=T "), "{line}");
        }
        let mut fresh = sidecar.client();
        assert_eq!(
            transaction(&mut fresh, &["GET d", "HGETALL h"]),
            [Value::Bulk(b"0".to_vec()), Value::Array(vec![Value::Bulk(b"f".to_vec()), Value::Bulk(b"v".to_vec())])]
        );
    }
}

/// A client that kills its own connection gets EXEC's reply first.
#[test]
fn who_kills_itself_is_answered_first() {
    in_both(|sidecar, _| {
        let mut client = sidecar.client();
        let id = client.line("CLIENT ID").int();
        let kill = format!("CLIENT KILL ID {id} SKIPME no");
        let results = transaction(&mut client, &["SET {a}x 1", "CLIENT ID", &kill, "GET {a}x"]);
        assert_eq!(results, [ok(), Value::Int(id), Value::Int(1), Value::Bulk(b"1".to_vec())]);
        assert!(client.try_call(&["PING"]).is_err());
    });
}

/// Sets it at the end, also where that is a panic.
struct Stop<'a>(&'a AtomicBool);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// No message lands within EXEC's reply, though its parts come at different times.
#[test]
fn messages_wait_for_the_end_of_the_reply() {
    in_both(|sidecar, _| {
        let (mut client, mut other) = (sidecar.client(), sidecar.client());
        client.line("HELLO 3");
        assert!(matches!(client.line("SUBSCRIBE news"), Value::Push(_)));
        let lines = [
            "SET {a}x 1",
            "CLIENT LIST",
            "CLIENT UNBLOCK 999999",
            "GET {a}x",
            "LARDER.EXPLAIN {b}x",
            "CLIENT KILL TYPE replica",
            "HELLO",
            "GET {a}x",
        ];
        let wire: Vec<u8> = ["MULTI"]
            .iter()
            .chain(&lines)
            .chain(&["EXEC"])
            .flat_map(|line| encode(&line.split(' ').collect::<Vec<_>>()))
            .collect();
        let (done, mut messages) = (AtomicBool::new(false), 0);
        thread::scope(|scope| {
            scope.spawn(|| {
                while !done.load(Ordering::Relaxed) {
                    assert!(!other.line("PUBLISH news hello").is_error());
                }
            });
            let _stop = Stop(&done);
            for _ in 0..100 {
                client.send(&wire).unwrap();
                let mut replies = Vec::new();
                while replies.len() < lines.len() + 2 {
                    match client.read().unwrap() {
                        Value::Push(_) => messages += 1,
                        reply => replies.push(reply),
                    }
                }
                let results = replies.pop().unwrap().items();
                assert_eq!(results.len(), lines.len(), "{results:?}");
                assert!(!results.iter().any(|result| matches!(result, Value::Push(_)) || result.is_error()), "{results:?}");
            }
        });
        assert!(messages > 0, "nothing was published meanwhile");
    });
}

/// What a client has read in the transaction by which it begins to track it is told to forget: nobody else would tell.
#[test]
fn reads_behind_tracking_are_not_kept() {
    in_both(|sidecar, _| {
        let mut other = sidecar.client();
        for lines in [&["CLIENT TRACKING ON", "GET {a}x"][..], &["CLIENT TRACKING ON OPTIN", "CLIENT CACHING YES", "GET {a}x"]] {
            let mut client = sidecar.client();
            client.line("HELLO 3");
            assert_eq!(other.line("SET {a}x 1"), ok());
            let results = transaction(&mut client, lines);
            assert_eq!(results.last().unwrap().text(), "1");
            let forget = client.read().unwrap();
            assert_eq!(forget, Value::Push(vec![Value::Bulk(b"invalidate".to_vec()), Value::Nil]));
            // From then on it is told as ever.
            if lines.len() == 2 {
                assert_eq!(client.line("GET {a}x").text(), "1");
                assert_eq!(other.line("SET {a}x 2"), ok());
                let changed = Value::Array(vec![Value::Bulk(b"{a}x".to_vec())]);
                assert_eq!(client.read().unwrap(), Value::Push(vec![Value::Bulk(b"invalidate".to_vec()), changed]));
            }
        }
    });
}

/// LARDER's own commands, when the transaction is done; none waits there.
#[test]
fn commands_of_larder_are_carried_out_behind_the_transaction() {
    let servers = RedisCluster::start(Engine::Valkey9, 3, 0);
    let mut snapshot = bypass(cluster_topology(&servers));
    let lifetime = json!({"default": "10m", "max": "1h", "jitter": "10%"});
    let stampede = json!({"lease": "20s", "wait": "5s", "atWaitEnd": "miss"});
    snapshot["rules"] =
        json!([{"name": "user", "keys": "user:{id}", "strategy": {"cacheAside": {"ttl": lifetime, "stampede": stampede}}}]);
    let sidecar = Sidecar::start(&snapshot);
    let (mut client, mut other) = (sidecar.client(), sidecar.client());
    assert_eq!(client.line("SET user:1 a"), ok());
    let lines = [
        "SET {x}k 1",
        "LARDER.INVALIDATE user:1 user:2",
        "LARDER.EXPLAIN user:1",
        "LARDER.STATS user",
        "LARDER.FETCH user:1",
        "GET {x}k",
    ];
    let results = transaction(&mut client, &lines);
    assert_eq!((&results[1], &results[5]), (&Value::Int(1), &Value::Bulk(b"1".to_vec())), "{results:?}");
    assert!(format!("{:?}", results[2]).contains("user:{id}"), "{results:?}");
    let fetched = results[4].items();
    assert_eq!(fetched[0].text(), "load", "{results:?}");
    let token = fetched[2].text();
    // Another loads: this one is not waited for.
    let busy = transaction(&mut other, &["SET {x}k 2", "LARDER.FETCH user:1 WAIT 60000"]);
    assert_eq!(busy[1].items()[0].text(), "busy", "{busy:?}");
    let filled = transaction(&mut client, &["SET {x}k 3", &format!("LARDER.FILL user:1 {token} loaded")]);
    assert_eq!(filled[1], ok());
    assert_eq!(other.line("GET user:1").text(), "loaded");
    // The sidecar answers as a sentinel there, too.
    let results = transaction(&mut client, &["SET {x}k 4", "SENTINEL masters", "ROLE", "CLUSTER SLOTS", "READONLY", "ASKING"]);
    assert_eq!(results[1].items().len(), 1);
    assert_eq!(results[2].items()[0].text(), "master");
    assert_eq!(results[3].items().len(), 1);
    assert_eq!(results[4..], [ok(), ok()]);
}

/// What is kept until EXEC is bounded.
#[test]
fn what_is_kept_until_exec_is_bounded() {
    in_both(|sidecar, _| {
        let mut client = sidecar.client();
        assert_eq!([client.line("MULTI"), client.line("SET {a}x 1")], [ok(), queued()]);
        let name = "n".repeat(900_000);
        let replies: Vec<Value> = (0..3).map(|_| client.call(&["CLIENT", "SETNAME", &name])).collect();
        assert_eq!(replies[..2], [queued(), queued()]);
        assert!(
            matches!(&replies[2], Value::Error(text) if text.contains("too many commands that Larder answers")),
            "{replies:?}"
        );
        assert!(matches!(client.line("EXEC"), Value::Error(text) if text.starts_with("EXECABORT")));
        assert_eq!(client.line("GET {a}x"), Value::Nil);
    });
}
