//! What the sidecar answers by itself: the one server that clients see, and Larder's own commands.

use larder::sidecar::slots::Companion;
use serde_json::json;

use crate::read_through::{http_origin, web_rule};
use crate::support::resp::{Client, Value, encode};
use crate::support::server::{Engine, PRIMARY_NAME, Redis, RedisCluster, SentinelCluster};
use crate::support::sidecar::{Sidecar, bypass, cluster_topology, sentinel_topology};
use crate::support::wait_for;
use crate::support::web::Web;

fn ok() -> Value {
    Value::Simple("OK".to_owned())
}

/// Sends all lines at once; their replies.
fn pipeline(client: &mut Client, lines: &[&str]) -> Vec<Value> {
    let bytes: Vec<u8> = lines.iter().flat_map(|line| encode(&line.split_whitespace().collect::<Vec<_>>())).collect();
    client.send(&bytes).unwrap();
    lines.iter().map(|_| client.read().unwrap()).collect()
}

#[test]
fn under_sentinel_there_is_one_server_at_the_address_that_was_used() {
    let servers = SentinelCluster::start(Engine::Redis7, 1);
    let sidecar = Sidecar::start(&bypass(sentinel_topology(&servers)));
    let mut client = sidecar.client();
    one_primary(&mut client, sidecar.port());
    assert!(client.line("CLUSTER SLOTS").is_error());
    lanes_keep_the_order(&mut client);
    own_keys_are_out_of_reach(&mut client, servers.primary());
    random_keys_are_the_clients(&mut client, servers.primary());
    credentials_go_nowhere(&mut client, &sidecar);
}

#[test]
fn a_cluster_looks_like_one_node_with_all_slots() {
    let servers = RedisCluster::start(Engine::Valkey9, 3, 1);
    let sidecar = Sidecar::start(&bypass(cluster_topology(&servers)));
    let mut client = sidecar.client();
    one_primary(&mut client, sidecar.port());
    let slots = client.line("CLUSTER SLOTS").items();
    let [range] = &slots[..] else { panic!("one range is expected: {slots:?}") };
    let fields = range.items();
    assert_eq!((fields[0].int(), fields[1].int()), (0, 16383));
    let node = fields[2].items();
    assert_eq!((node[0].text().as_str(), node[1].int()), ("127.0.0.1", i64::from(sidecar.port())));
    assert_eq!(node[2].text(), client.line("CLUSTER MYID").text());
    let line = client.line("CLUSTER NODES").text();
    assert!(line.contains(&format!("127.0.0.1:{}@", sidecar.port())) && line.ends_with(" 0-16383\n"), "{line}");
    assert!(client.line("CLUSTER INFO").text().contains("cluster_state:ok"));
    assert_eq!(client.line("SELECT 0"), ok());
    assert!(client.line("SELECT 1").is_error());
    client.line("SET {x}1 a");
    let slot = client.line("CLUSTER KEYSLOT {x}1").int();
    assert_eq!(client.line(&format!("CLUSTER COUNTKEYSINSLOT {slot}")), Value::Int(1));
    client.line("SET {x}2 b");
    let server = servers.owner(slot as u16);
    for key in ["{x}1", "{x}2", "{x}3", "{x}4"] {
        for companion in [Companion::Lease, Companion::Stale, Companion::Negative] {
            server.client().call(&[b"SET".to_vec(), companion.name(key.as_bytes()), b"x".to_vec()]);
        }
    }
    for count in 1..20 {
        let found = client.line(&format!("CLUSTER GETKEYSINSLOT {slot} {count}")).items();
        assert_eq!(found.len(), count.min(2), "{found:?}");
        assert!(found.iter().all(|key| key.text().starts_with("{x}")), "{found:?}");
    }
    assert_eq!(client.line(&format!("CLUSTER GETKEYSINSLOT {slot} 0")), Value::Array(vec![]));
    assert!(client.line(&format!("CLUSTER GETKEYSINSLOT {slot} -1")).is_error());
    let drawn: Vec<String> = (0..50).map(|_| client.line("RANDOMKEY").text()).collect();
    assert!(drawn.iter().all(|key| key.starts_with("{x}")), "{drawn:?}");
}

/// What empties a cache or walks through all of it needs the policy's word, also within a transaction.
#[test]
fn flushes_and_keys_are_refused_unless_the_policy_allows_them() {
    let servers = RedisCluster::start(Engine::Redis7, 3, 0);
    for (keys, flush) in [(false, false), (true, false), (false, true)] {
        let mut snapshot = bypass(cluster_topology(&servers));
        snapshot["allow"] = json!({"keys": keys, "flush": flush});
        let sidecar = Sidecar::start(&snapshot);
        let mut client = sidecar.client();
        (0..20).for_each(|number| assert_eq!(client.line(&format!("SET k:{number} v")), ok()));
        let count =
            |servers: &RedisCluster| servers.servers.iter().map(|server| server.client().line("DBSIZE").int()).sum::<i64>();
        for (line, allowed) in [("KEYS k:*", keys), ("FLUSHDB", flush), ("FLUSHALL", flush), ("FLUSHALL ASYNC", flush)] {
            assert!(count(&servers) >= 20, "{line}: nothing was flushed before");
            let reply = client.line(line);
            let refused = matches!(&reply, Value::Error(text) if text.starts_with("NOPERM ") && text.contains("allow"));
            assert_eq!(refused, !allowed, "{line}: {reply:?}");
            if line.starts_with("FLUSH") && allowed {
                assert_eq!((reply, count(&servers)), (ok(), 0), "{line}: all shards are emptied");
                (0..20).for_each(|number| assert_eq!(client.line(&format!("SET k:{number} v")), ok()));
            } else if allowed {
                assert_eq!(reply.items().len(), 20);
            } else {
                let replies = pipeline(&mut client, &["MULTI", "SET {k}x v", line, "EXEC"]);
                assert!(matches!(&replies[3], Value::Error(text) if text.starts_with("EXECABORT")), "{line}: {replies:?}");
            }
        }
    }
}

/// Whatever becomes of the servers: clients are told of one server, and not where it is.
#[test]
fn no_error_names_a_server() {
    let mut servers = SentinelCluster::start(Engine::Redis7, 0);
    let mut snapshot = bypass(sentinel_topology(&servers));
    snapshot["cluster"]["patience"] = json!("300ms");
    let sidecar = Sidecar::start(&snapshot);
    let (mut blocked, mut queued, mut watching, mut client) =
        (sidecar.client(), sidecar.client(), sidecar.client(), sidecar.client());
    assert_eq!([client.line("SET k v"), queued.line("MULTI"), watching.line("WATCH k")], [ok(), ok(), ok()]);
    assert_eq!(queued.line("SET k w"), Value::Simple("QUEUED".to_owned()));
    blocked.send(&encode(&["BLPOP", "none", "0"])).unwrap();
    wait_for("a blocked client", std::time::Duration::from_secs(20), || {
        servers.primary().client().line("CLIENT LIST").text().contains("cmd=blpop")
    });
    let port = servers.primary_port().to_string();
    servers.servers.iter_mut().for_each(Redis::kill);
    let mut heard = vec![blocked.read().unwrap(), queued.line("EXEC")];
    for line in ["GET k", "SET k v", "MGET k j", "INFO", "WATCH k", "BLPOP none 1", "SUBSCRIBE channel", "LARDER.INVALIDATE k"] {
        heard.push(client.line(line));
    }
    let long = "x".repeat(100_000);
    heard.push(client.call(&["SET", "k", &long]));
    heard.push(watching.line("WATCH j"));
    for reply in heard {
        let told = format!("{reply:?}");
        assert!(!told.contains("127.0.0.1") && !told.contains(&port), "{told}");
        assert!(reply.is_error() || told == "+OK", "{told}");
    }
}

/// For whoever asks sentinels, or asks for the role.
#[track_caller]
fn one_primary(client: &mut Client, port: u16) {
    let address = client.line(&format!("SENTINEL get-master-addr-by-name {PRIMARY_NAME}")).items();
    assert_eq!((address[0].text(), address[1].text()), ("127.0.0.1".to_owned(), port.to_string()));
    assert_eq!(client.line("SENTINEL get-master-addr-by-name other"), Value::Nil);
    assert!(client.line("SENTINEL master other").is_error());
    assert_eq!(client.line(&format!("SENTINEL replicas {PRIMARY_NAME}")), Value::Array(vec![]));
    assert_eq!(client.line("SENTINEL masters").items().len(), 1);
    assert_eq!(client.line("ROLE").items()[0].text(), "master");
}

/// What changes the connection waits for all that was sent before, and holds for all that comes after.
fn lanes_keep_the_order(client: &mut Client) {
    for round in 0..50 {
        let lines = [
            &format!("SET k a{round}"),
            "SELECT 1",
            &format!("SET k b{round}"),
            "SELECT 0",
            "GET k",
            "SELECT 1",
            "GET k",
            "SELECT 0",
        ];
        let replies = pipeline(client, &lines);
        assert_eq!((replies[4].text(), replies[6].text()), (format!("a{round}"), format!("b{round}")));
    }
    let replies = pipeline(client, &["HSET h a 1", "HGETALL h", "HELLO 3", "HGETALL h", "RESET", "HGETALL h"]);
    let shapes = [&replies[1], &replies[3], &replies[5]].map(|reply| matches!(reply, Value::Map(_)));
    assert_eq!(shapes, [false, true, false], "{replies:?}");
    assert!(matches!(replies[2], Value::Map(_)));
}

fn own_keys_are_out_of_reach(client: &mut Client, server: &Redis) {
    let lease = String::from_utf8(Companion::Lease.name(b"k")).unwrap();
    server.client().line(&format!("SET {lease} token"));
    let naming = [
        format!("GET {lease}"),
        format!("SET {lease} x"),
        format!("MGET k {lease}"),
        format!("RENAME k {lease}"),
        format!("EVAL return{{1}} 1 {lease}"),
        format!("BLPOP {lease} 1"),
        format!("WATCH {lease}"),
        format!("LARDER.INVALIDATE {lease}"),
    ];
    for line in &naming {
        let reply = client.line(line);
        assert!(matches!(&reply, Value::Error(text) if text.contains("is Larder's own")), "{line}: {reply:?}");
    }
    assert_eq!(client.line("MULTI"), ok());
    assert!(client.line(&format!("GET {lease}")).is_error());
    assert!(matches!(client.line("EXEC"), Value::Error(text) if text.starts_with("EXECABORT")));
    let found = client.line("SCAN 0 COUNT 1000").items()[1].items();
    assert!(
        found.contains(&Value::Bulk(b"k".to_vec())) && !found.iter().any(|key| key.text().starts_with("larder:")),
        "{found:?}"
    );
    assert_eq!(client.line("SET x larder:value"), ok(), "values may be called anything");
}

/// RANDOMKEY names a client's key where there is one, however many of Larder's there are, and in its place among other commands.
fn random_keys_are_the_clients(client: &mut Client, server: &Redis) {
    let mut direct = server.client();
    assert!(!direct.line("FLUSHALL").is_error());
    for index in 0..200 {
        direct.call(&[b"SET".to_vec(), Companion::Stale.name(format!("k{index}").as_bytes()), b"copy".to_vec()]);
    }
    assert_eq!(client.line("RANDOMKEY"), Value::Nil);
    for round in 0..30 {
        let (set, del) = (format!("SET k{round} x"), format!("DEL k{round}"));
        let replies = pipeline(client, &[&set, "RANDOMKEY", &del, "RANDOMKEY", "PING"]);
        let shown = [Value::Bulk(format!("k{round}").into_bytes()), Value::Int(1), Value::Nil, Value::Simple("PONG".to_owned())];
        assert_eq!(replies[1..], shown);
    }
    for refused in ["SLOWLOG GET", "SLOWLOG GET 5"] {
        let reply = client.line(refused);
        assert!(matches!(&reply, Value::Error(text) if text.starts_with("NOPERM SLOWLOG GET")), "{reply:?}");
    }
    assert!(matches!(client.line("SLOWLOG LEN"), Value::Int(_)));
}

fn credentials_go_nowhere(client: &mut Client, sidecar: &Sidecar) {
    assert_eq!(client.line("AUTH someone hidden-word"), ok());
    assert!(!client.line("HELLO 2 AUTH someone hidden-word SETNAME me").is_error());
    assert_eq!(client.line("CLIENT GETNAME").text(), "me");
    assert!(!sidecar.log().contains("hidden-word"));
}

#[test]
fn larder_explains_counts_and_invalidates() {
    let servers = RedisCluster::start(Engine::Redis7, 3, 1);
    let mut snapshot = bypass(cluster_topology(&servers));
    let lifetime = json!({"default": "10m", "max": "1h", "jitter": "10%"});
    snapshot["rules"] = json!([{"name": "user", "keys": "user:{id}", "strategy": {"cacheAside": {"ttl": lifetime}}}]);
    let sidecar = Sidecar::start(&snapshot);
    let mut client = sidecar.client();
    client.line("SET user:1 a");
    client.line("GET user:1");
    client.line("GET user:2");
    let explained = client.line("LARDER.EXPLAIN user:1");
    assert_eq!(field(&explained, "rule").text(), "user");
    assert_eq!(field(&explained, "strategy").text(), "CacheAside");
    assert_eq!(field(&explained, "ttl").text(), "10m");
    assert!(field(&explained, "why").text().contains("user:{id}"));
    let counters = field(&explained, "counters");
    assert_eq!((field(&counters, "hits").int(), field(&counters, "misses").int()), (1, 1));
    assert_eq!(field(&client.line("LARDER.EXPLAIN other"), "rule").text(), "(unmatched)");
    let stats = client.line("LARDER.STATS");
    assert_eq!(field(&stats, "user"), counters);
    assert!(client.line("LARDER.STATS none").is_error());

    for index in 0..20 {
        client.line(&format!("SET user:{index} v"));
        let key = format!("user:{index}");
        for companion in [Companion::Lease, Companion::Stale, Companion::Negative] {
            let name = companion.name(key.as_bytes());
            let slot = client.line(&format!("CLUSTER KEYSLOT {key}")).int();
            assert_eq!(servers.owner(slot as u16).client().call(&[b"SET".to_vec(), name, b"x".to_vec()]), ok());
        }
    }
    let keys: Vec<String> = (0..25).map(|index| format!("user:{index}")).collect();
    assert_eq!(client.line(&format!("LARDER.INVALIDATE {}", keys.join(" "))), Value::Int(20));
    assert_eq!(client.line("DBSIZE"), Value::Int(0), "nothing is left beside the keys");
    explanations_tell_what_is_there(&mut client, &servers);
}

/// All that a read-through rule says is told, from where it loads too, also of a key that is not there; nothing is loaded for that.
#[test]
fn a_rule_that_loads_is_explained() {
    let (servers, web) = (SentinelCluster::start(Engine::Valkey9, 0), Web::start());
    let mut snapshot = bypass(sentinel_topology(&servers));
    snapshot["origins"] = json!([http_origin("web", &web, "10s")]);
    let settings = json!({
        "ttl": {"default": "10m", "max": "1h", "jitter": "10%"}, "stale": "5m", "negativeTtl": "30s", "lease": "7s", "wait": "3s",
    });
    snapshot["rules"] = json!([web_rule("order", json!({})), web_rule("item", settings)]);
    let sidecar = Sidecar::start(&snapshot);
    let mut client = sidecar.client();
    web.put("/item/7", "seven");
    let explained = client.line("LARDER.EXPLAIN item:7");
    for (name, value) in [
        ("key", "item:7"),
        ("generation", "1"),
        ("rule", "item"),
        ("why", "its pattern `item:{id}` is the first, of 2 rules, that covers the key"),
        ("strategy", "ReadThrough"),
        ("ttl", "10m"),
        ("maxTtl", "1h"),
        ("jitter", "10%"),
        ("stale", "5m"),
        ("negativeTtl", "30s"),
        ("lease", "7s"),
        ("wait", "3s"),
        ("origin", "web"),
        ("type", "none"),
    ] {
        assert_eq!(field(&explained, name).text(), value, "{name} in {explained:?}");
    }
    assert_eq!(field(&explained, "pttl"), Value::Int(-2));
    assert_eq!(web.visits("/item/7"), 0, "an explanation loads");

    assert_eq!([client.line("GET item:7").text(), client.line("GET item:7").text()], ["seven", "seven"]);
    assert_eq!([client.line("GET item:none"), client.line("GET item:none")], [Value::Nil, Value::Nil]);
    let explained = client.line("LARDER.EXPLAIN item:7");
    assert_eq!(field(&explained, "type").text(), "string");
    assert!((1..=600_000).contains(&field(&explained, "pttl").int()), "{explained:?}");
    let counters = field(&explained, "counters");
    let counts = ["hits", "loads", "negative"].map(|name| field(&counters, name).int());
    assert_eq!(counts, [1, 2, 1], "{counters:?}");
    let companions = |client: &mut Client, key: &str| {
        let found = field(&client.line(&format!("LARDER.EXPLAIN {key}")), "companions").items();
        found.chunks(2).map(|pair| (pair[0].text(), pair[1].int())).collect::<Vec<_>>()
    };
    let named = |companion: Companion, key: &str| String::from_utf8(companion.name(key.as_bytes())).unwrap();
    // The stale copy outlives its key by the time that the rule gives it.
    let there = companions(&mut client, "item:7");
    assert!(matches!(&there[..], [(name, ttl)] if *name == named(Companion::Stale, "item:7") && *ttl > 300_000), "{there:?}");
    let there = companions(&mut client, "item:none");
    let remembered =
        matches!(&there[..], [(name, ttl)] if *name == named(Companion::Negative, "item:none") && (1..=30_000).contains(ttl));
    assert!(remembered, "{there:?}");
}

/// The key's type and TTL and those of what stands beside it, as the server has them; in the order of the client's commands.
fn explanations_tell_what_is_there(client: &mut Client, servers: &RedisCluster) {
    let replies =
        pipeline(client, &["RPUSH user:7 a", "LARDER.EXPLAIN user:7", "DEL user:7", "LARDER.EXPLAIN user:7", "GET user:7"]);
    let [pushed, there, deleted, gone, nothing] = &replies[..] else { panic!("{replies:?}") };
    assert_eq!((pushed, deleted, nothing), (&Value::Int(1), &Value::Int(1), &Value::Nil));
    assert_eq!(field(there, "type").text(), "list");
    assert!((1..=600_000).contains(&field(there, "pttl").int()), "{there:?}");
    assert_eq!((field(gone, "type").text().as_str(), field(gone, "pttl").int()), ("none", -2));
    assert!(field(gone, "companions").items().is_empty());

    let stale = String::from_utf8(Companion::Stale.name(b"user:7")).unwrap();
    let slot = client.line("CLUSTER KEYSLOT user:7").int();
    assert_eq!(servers.owner(slot as u16).client().line(&format!("SET {stale} copy PX 60000")), ok());
    let companions = field(&client.line("LARDER.EXPLAIN user:7"), "companions").items();
    let [name, ttl] = &companions[..] else { panic!("{companions:?}") };
    assert_eq!(name.text(), stale);
    assert!((1..=60_000).contains(&ttl.int()), "{ttl:?}");
    client.line("LARDER.INVALIDATE user:7");
}

#[track_caller]
fn field(map: &Value, name: &str) -> Value {
    let items = map.items();
    let found = items.chunks(2).find(|pair| pair[0].text() == name);
    found.unwrap_or_else(|| panic!("{map:?} has no {name}"))[1].clone()
}
