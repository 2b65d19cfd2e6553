//! Slots with data move between shards while clients read and write their keys.

use std::sync::atomic::{AtomicBool, AtomicU16, Ordering};
use std::time::Duration;

use larder::sidecar::slots::tag_of;
use serde_json::json;

use super::load::{Key, Load, Writes};
use super::{SHARDS, wait_until_writable};
use crate::support::resp::{Client, Value, encode};
use crate::support::server::{Engine, Redis, RedisCluster};
use crate::support::sidecar::{Sidecar, bypass, cluster_topology};
use crate::support::wait_for;

/// Slots of the first shard that move.
const SLOTS: std::ops::Range<u16> = 0..12;
const CLIENTS: usize = 6;
const LIMIT: Duration = Duration::from_secs(30);

pub fn ok(reply: &Value) {
    assert_eq!(*reply, Value::Simple("OK".to_owned()));
}

/// A key of `slot`.
pub fn key_of(slot: u16, name: &str) -> String {
    format!("{{{}}}{name}", String::from_utf8_lossy(&tag_of(slot)))
}

/// Moves one slot as `redis-cli --cluster reshard` does, a few keys at a time.
pub fn move_slot(cluster: &RedisCluster, slot: u16, from: &Redis, to: &Redis) {
    let (mut source, mut target) = (from.client(), to.client());
    let (source_id, target_id) = (source.line("CLUSTER MYID").text(), target.line("CLUSTER MYID").text());
    ok(&target.line(&format!("CLUSTER SETSLOT {slot} IMPORTING {source_id}")));
    ok(&source.line(&format!("CLUSTER SETSLOT {slot} MIGRATING {target_id}")));
    loop {
        let keys = source.line(&format!("CLUSTER GETKEYSINSLOT {slot} 1")).items();
        if keys.is_empty() {
            break;
        }
        let keys: Vec<String> = keys.iter().map(Value::text).collect();
        let port = to.port().to_string();
        let mut migrate = vec!["MIGRATE", "127.0.0.1", &port, "", "0", "5000", "KEYS"];
        migrate.extend(keys.iter().map(String::as_str));
        ok(&source.call(&migrate));
        std::thread::sleep(Duration::from_millis(2));
    }
    ok(&target.line(&format!("CLUSTER SETSLOT {slot} NODE {target_id}")));
    ok(&source.line(&format!("CLUSTER SETSLOT {slot} NODE {target_id}")));
    for other in &cluster.servers[..SHARDS] {
        let _ = other.client().line(&format!("CLUSTER SETSLOT {slot} NODE {target_id}"));
    }
}

/// Asks for two keys of the slot that moves, which a server refuses while they are apart.
fn read_pairs(port: u16, slot: &AtomicU16, stop: &AtomicBool) {
    let mut client = Client::connect(port).expect("the sidecar accepts");
    while !stop.load(Ordering::Relaxed) {
        let slot = slot.load(Ordering::Relaxed);
        let reply = client.call(&["MGET", &key_of(slot, "a"), &key_of(slot, "b")]);
        let values: Vec<String> = reply.items().iter().map(Value::text).collect();
        assert_eq!(values, [format!("a{slot}"), format!("b{slot}")]);
    }
}

#[test]
fn slots_move_under_load_without_an_error() {
    let cluster = RedisCluster::start(Engine::Redis7, SHARDS, 0);
    let sidecar = Sidecar::start(&bypass(cluster_topology(&cluster)));
    let mut client = sidecar.client();
    for slot in SLOTS {
        for name in ["a", "b"] {
            ok(&client.call(&["SET", &key_of(slot, name), &format!("{name}{slot}")]));
        }
    }
    let keys_of = |client: usize| SLOTS.flat_map(move |slot| (0..2).map(move |n| key_of(slot, &format!("c{client}k{n}"))));
    let keys = (0..CLIENTS).map(|client| keys_of(client).map(|name| Key { name, shard: 0 }).collect()).collect();
    let load = Load::start(sidecar.port(), keys, Writes::Plain);
    let (moving, stop) = (AtomicU16::new(0), AtomicBool::new(false));
    std::thread::scope(|scope| {
        let pairs = scope.spawn(|| read_pairs(sidecar.port(), &moving, &stop));
        for (from, to) in [(0, 1), (1, 2)] {
            for slot in SLOTS {
                moving.store(slot, Ordering::Relaxed);
                move_slot(&cluster, slot, &cluster.servers[from], &cluster.servers[to]);
            }
        }
        stop.store(true, Ordering::Relaxed);
        pairs.join().expect("pairs are read");
    });
    wait_until_writable(sidecar.port());
    let seen = load.stop();
    assert!(seen.iter().all(|seen| seen.refused == 0 && seen.uncertain == 0 && seen.lost == 0));
    let stats = cluster.servers[0].client().line("INFO errorstats").text();
    println!("acknowledged {} of the source's errors {stats}", seen.iter().map(|seen| seen.acknowledged).sum::<usize>());
    for code in ["ASK", "MOVED", "TRYAGAIN"] {
        let told = cluster.servers[..SHARDS].iter().any(|server| server.client().line("INFO errorstats").text().contains(code));
        assert!(told, "no server said {code}: the test shows nothing");
    }
    assert!(sidecar.metric("larder_redirects_total") > 0.0);
}

/// Many clients that meet one stale map have it looked at once, not once each.
#[test]
fn a_stale_map_is_refreshed_for_all_at_once() {
    const READERS: usize = 50;
    let cluster = RedisCluster::start(Engine::Redis7, SHARDS, 0);
    let sidecar = Sidecar::start(&bypass(cluster_topology(&cluster)));
    let mut clients: Vec<Client> = (0..READERS).map(|_| sidecar.client()).collect();
    let (mut moves, mut redirects, mut rounds) = (0.0, 0.0, 0.0);
    // Where the map is refreshed before the reads come, a move shows nothing.
    for slot in SLOTS {
        let key = key_of(slot, "k");
        ok(&clients[0].call(&["SET", &key, "v"]));
        move_slot(&cluster, slot, &cluster.servers[0], &cluster.servers[1]);
        let counts = || ["larder_redirects_total", "larder_discovery_rounds_total"].map(|name| sidecar.metric(name));
        let before = counts();
        clients.iter_mut().for_each(|client| client.send(&encode(&["GET", &key]).repeat(20)).expect("the sidecar reads"));
        for client in &mut clients {
            (0..20).for_each(|_| assert_eq!(client.read().expect("a reply").text(), "v"));
        }
        let after = counts();
        (moves, redirects, rounds) = (moves + 1.0, redirects + after[0] - before[0], rounds + after[1] - before[1]);
    }
    println!("{moves} moves, {redirects} redirects, {rounds} rounds");
    assert!(redirects >= 100.0, "only {redirects} redirects: the test shows nothing");
    // One for the first to meet it, one for those who came while it was under way, and one that would have come anyway.
    assert!(rounds <= moves * 3.0 && rounds * 5.0 <= redirects, "{rounds} rounds for {redirects} redirects");
}

/// A slot of the first shard.
const SLOT: u16 = 0;

/// Servers whose first gives [`SLOT`] to a second that has forgotten it, as a replica does that took over while keys were on their way; a sidecar
/// with so much patience; and two keys of the slot that nobody has, of which a rule covers the second.
fn pointing_at_each_other(patience: &str) -> (RedisCluster, Sidecar, [String; 2]) {
    let cluster = RedisCluster::start(Engine::Redis7, SHARDS, 0);
    let mut topology = cluster_topology(&cluster);
    topology["patience"] = json!(patience);
    let mut snapshot = bypass(topology);
    let ttl = json!({"default": "10m", "max": "24h", "jitter": "10%"});
    snapshot["rules"] = json!([{"name": "aside", "keys": "aside:{tag…}", "strategy": {"cacheAside": {"ttl": ttl}}}]);
    let sidecar = Sidecar::start(&snapshot);
    let getter_id = cluster.servers[1].client().line("CLUSTER MYID").text();
    ok(&cluster.servers[0].client().line(&format!("CLUSTER SETSLOT {SLOT} MIGRATING {getter_id}")));
    (cluster, sidecar, [key_of(SLOT, "k"), format!("aside:{}", key_of(SLOT, "k"))])
}

/// Whoever meets that waits until somebody mends it, and is never told of a server.
#[test]
fn servers_that_point_at_each_other_are_waited_for() {
    let (cluster, sidecar, keys) = pointing_at_each_other("30s");
    let lists = keys.each_ref().map(|key| format!("{key}:list"));
    let write = |commands: Vec<Vec<&str>>| {
        let mut client = sidecar.client();
        commands.iter().for_each(|command| client.send(&encode(command)).expect("the sidecar reads"));
        let replies: Vec<Value> = commands.iter().map(|_| client.read().expect("a reply")).collect();
        assert!(!replies.iter().any(Value::is_error), "{replies:?}");
    };
    let [mut giver, mut getter] = [0, 1].map(|shard| cluster.servers[shard].client());
    let giver_id = giver.line("CLUSTER MYID").text();
    let redirects = || sidecar.metric("larder_redirects_total");
    let before = redirects();
    std::thread::scope(|scope| {
        let write = &write;
        for (key, list) in keys.iter().zip(&lists) {
            scope.spawn(move || write(vec![vec!["SET", key, "v"]]));
            scope.spawn(move || write(vec![vec!["LPUSH", list, "v"], vec!["BLPOP", list, "1"]]));
        }
        // Each has been sent to and fro more than once.
        wait_for("commands to be sent to and fro", LIMIT, || redirects() - before > 100.0);
        ok(&getter.line(&format!("CLUSTER SETSLOT {SLOT} IMPORTING {giver_id}")));
    });
    for key in &keys {
        assert_eq!(sidecar.client().call(&["GET", key]).text(), "v");
    }
}

/// Where nobody mends it, patience ends, and what a client is told names no server either.
#[test]
fn servers_that_go_on_to_point_at_each_other_are_not_named() {
    let (_cluster, sidecar, keys) = pointing_at_each_other("1s");
    // More than is held whole.
    let long = "v".repeat(2 << 20);
    let asked = |commands: &[u8]| {
        let mut client = sidecar.client();
        client.send(commands).expect("the sidecar reads");
        client
    };
    let mut clients = Vec::new();
    for key in &keys {
        let list = format!("{key}:list");
        for command in [vec!["SET", key, "v"], vec!["LPUSH", &list, "v"], vec!["BLPOP", &list, "1"], vec!["SET", key, &long]] {
            clients.push((format!("{} {}", command[0], command[1]), 1, asked(&encode(&command))));
        }
        // The first of the two may have been overtaken when it comes back.
        clients.push((format!("SET {key} twice"), 2, asked(&encode(&["SET", key, "v"]).repeat(2))));
    }
    for (what, replies, client) in &mut clients {
        for _ in 0..*replies {
            let reply = client.read().expect("a reply");
            let Value::Error(text) = &reply else { panic!("{what}: {reply:?}") };
            assert!(text.starts_with("TRYAGAIN servers point at each other for its slot"), "{what}: {text}");
            assert!(!text.contains("127.0.0.1"), "{what}: {text}");
        }
    }
}
