//! `larder dev`: the number of shards changes while clients read and write.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};

use larder::sidecar::slots::tag_of;
use tempfile::TempDir;

use crate::support::dev::{Dev, LIMIT, cluster, info, policy, runs};
use crate::support::resp::{Client, Value, encode};
use crate::support::server::Engine;
use crate::support::wait_for;

const KEYS: usize = 4000;
const PASSWORD: &str = "a secret";
const AUTH: &str = "  auth: {user: shop, password: {secretKeyRef: {name: main, key: password}}}\n";

fn secret() -> String {
    format!("apiVersion: v1\nkind: Secret\nmetadata: {{name: main}}\nstringData: {{password: {PASSWORD}}}\n")
}

fn with_shards(engine: Engine, shards: u16, further: &str) -> String {
    cluster(engine, "Cluster", &format!("  shards: {shards}\n{further}"))
}

fn save(dev: &Dev, engine: Engine, shards: u16, further: &str) {
    let path = dev.manifests.path().join("cache.yaml");
    fs::write(&path, with_shards(engine, shards, further)).unwrap();
}

/// The port of each server that has a place, by the name of its directory.
fn places(run: &Path) -> BTreeMap<String, u16> {
    let text = fs::read_to_string(run.join("places.json")).unwrap();
    let places: serde_json::Value = serde_json::from_str(&text).unwrap();
    let port = |ports: &serde_json::Value| ports[0].as_u64().unwrap().try_into().unwrap();
    places["ports"].as_object().unwrap().iter().map(|(name, ports)| (name.clone(), port(ports))).collect()
}

/// A connection to a server, also to one that asks for the user of [`AUTH`].
fn server(port: u16) -> std::io::Result<Client> {
    let mut client = Client::connect(port)?;
    client.try_call(&["AUTH", "shop", PASSWORD])?;
    Ok(client)
}

fn nodes(port: u16) -> Vec<String> {
    let reply = server(port).and_then(|mut client| client.try_call(&["CLUSTER", "NODES"]));
    reply.map(|reply| reply.text().lines().map(str::to_owned).collect()).unwrap_or_default()
}

/// How many slots each primary owns by its own word, and whether one of them is on its way.
fn own_slots(port: u16) -> Option<(u32, bool)> {
    let own = nodes(port).into_iter().find(|line| line.contains("myself,master"))?;
    let slots = own.split_ascii_whitespace().skip(8);
    let count = |text: &str| {
        let (first, last) = text.split_once('-').unwrap_or((text, text));
        last.parse::<u32>().unwrap() - first.parse::<u32>().unwrap() + 1
    };
    Some((slots.clone().filter(|text| !text.starts_with('[')).map(count).sum(), slots.clone().any(|text| text.starts_with('['))))
}

/// Waits until `shards` shards own even shares, all servers know each other and nobody else, and no slot is on its way.
#[track_caller]
fn wait_for_shards(dev: &Dev, run: &Path, shards: u16) {
    let is_even = || {
        let places = places(run);
        let owned: Vec<(u32, bool)> = places.values().filter_map(|port| own_slots(*port)).collect();
        let counts = owned.iter().map(|(count, _)| *count);
        let share = 16384 / u32::from(shards);
        let all_known = places.values().all(|port| nodes(*port).len() == places.len());
        let is_share = |(count, open): &(u32, bool)| (share..=share + 1).contains(count) && !open;
        places.len() == usize::from(shards) * 2
            && all_known
            && counts.sum::<u32>() == 16384
            && owned.iter().filter(|owned| is_share(owned)).count() == usize::from(shards)
    };
    dev.wait_until(&format!("{shards} even shards"), is_even);
}

fn key(number: usize) -> String {
    format!("free:{number}")
}

fn value(number: usize) -> String {
    format!("{number}:{}", "x".repeat(number % 700))
}

fn fill(client: &mut Client) {
    for number in 0..KEYS {
        client.send(&encode(&["SET", &key(number), &value(number)])).unwrap();
        if number % 500 == 499 {
            (0..500).for_each(|_| assert_eq!(client.read().unwrap(), Value::Simple("OK".to_owned())));
        }
    }
}

#[track_caller]
fn assert_all_there(port: u16) {
    let mut client = Client::connect(port).unwrap();
    for first in (0..KEYS).step_by(500) {
        (first..first + 500).for_each(|number| client.send(&encode(&["GET", &key(number)])).unwrap());
        for number in first..first + 500 {
            assert_eq!(client.read().unwrap(), Value::Bulk(value(number).into_bytes()), "{}", key(number));
        }
    }
}

/// A client that writes and reads its own counters until it is stopped, and takes every error and every older value for a fault.
struct Load {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<u64>,
}

impl Load {
    fn start(port: u16, name: &'static str) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let thread = thread::spawn(move || {
            let (mut client, mut count) = (Client::connect(port).unwrap(), 0u64);
            while !stopped.load(Ordering::Relaxed) {
                count += 1;
                let (key, text) = (format!("{name}:{}", count % 997), count.to_string());
                assert_eq!(client.call(&["SET", &key, &text]), Value::Simple("OK".to_owned()), "SET {key}");
                assert_eq!(client.call(&["GET", &key]), Value::Bulk(text.into_bytes()), "GET {key}");
                // Covered by the policy: in transactions and scripts, with keys of Larder's own beside it.
                let user = format!("user:{name}{}", count % 499);
                assert_eq!(client.call(&["SET", &user, &count.to_string()]), Value::Simple("OK".to_owned()), "SET {user}");
                let found = client.call(&["GET", &user]);
                assert!(found == Value::Nil || found == Value::Bulk(count.to_string().into_bytes()), "GET {user}: {found:?}");
                let pair = [format!("{{{name}{}}}:a", count % 211), format!("{{{name}{}}}:b", count % 211)];
                assert!(!client.call(&["DEL", &pair[0], &pair[1]]).is_error(), "DEL {pair:?}");
            }
            count
        });
        Self { stop, thread }
    }

    fn end(self) {
        self.stop.store(true, Ordering::Relaxed);
        let count = self.thread.join().expect("no error and no older value");
        assert!(count > 0);
    }
}

/// Servers ask for a user, as which slots move and replicas follow.
#[track_caller]
fn check_shards_come_and_go(engine: Engine) {
    let cache = with_shards(engine, 3, AUTH);
    let files = [("cache.yaml", cache), ("policy.yaml", policy("user:{id}")), ("secret.yaml", secret())];
    let mut dev = Dev::start(engine, &files, &["--sidecars", "1"]);
    let port = dev.ready(1)[0];
    let run = dev.directory();
    fill(&mut Client::connect(port).unwrap());
    let loads = ["one", "two"].map(|name| Load::start(port, name));
    save(&dev, engine, 5, AUTH);
    wait_for_shards(&dev, &run, 5);
    assert_all_there(port);
    dev.wait_for_stderr("slots have moved, in ");
    let refused = Client::connect(places(&run)["server-4-0"]).unwrap().line("DBSIZE");
    assert!(matches!(&refused, Value::Error(text) if text.starts_with("NOAUTH")), "{refused:?}");
    save(&dev, engine, 3, AUTH);
    wait_for_shards(&dev, &run, 3);
    assert_all_there(port);
    loads.into_iter().for_each(Load::end);
    let left = ["server-3-0", "server-4-1"].map(|name| run.join(name));
    assert!(left.iter().all(|directory| !directory.exists()), "the directories of servers that are gone are left");
    dev.wait_until("a snapshot that names those who are left", || {
        let snapshot = fs::read_to_string(run.join("snapshot.json")).unwrap();
        let snapshot: serde_json::Value = serde_json::from_str(&snapshot).unwrap();
        snapshot["cluster"]["topology"]["cluster"]["seeds"].as_array().unwrap().len() == 6
    });
    assert!(!["restart larder dev", "ended"].iter().any(|text| dev.stderr().contains(text)), "{}", dev.stderr());
    dev.stop();
}

#[test]
fn shards_come_and_go_under_load_key_by_key() {
    check_shards_come_and_go(Engine::Redis7);
}

#[test]
fn shards_come_and_go_under_load_at_once() {
    check_shards_come_and_go(Engine::Valkey9);
}

#[test]
fn shards_come_and_go_under_load_by_imports() {
    if let Some(engine) = Engine::redis_8() {
        check_shards_come_and_go(engine);
    }
}

/// A pipeline that a server carries out in one piece.
fn at_once(port: u16, commands: &[&[&str]]) -> Vec<Value> {
    let mut client = server(port).unwrap();
    client.send(&commands.iter().flat_map(|command| encode(command)).collect::<Vec<_>>()).unwrap();
    commands.iter().map(|_| client.read().unwrap()).collect()
}

/// A key that got where it does not belong could be the only copy of it.
#[test]
fn a_shard_that_holds_a_key_stays() {
    let engine = Engine::Redis7;
    let mut dev = Dev::start(engine, &[("cache.yaml", with_shards(engine, 4, ""))], &["--sidecars", "1"]);
    let port = dev.ready(1)[0];
    let run = dev.directory();
    fill(&mut Client::connect(port).unwrap());
    let (first, last) = (places(&run)["server-0-0"], places(&run)["server-3-0"]);
    let owner = Client::connect(first).unwrap().line("CLUSTER MYID").text();
    // Slot 0 is the first shard's.
    let key = format!("{{{}}}stray", String::from_utf8_lossy(&tag_of(0)));
    let importing = ["CLUSTER", "SETSLOT", "0", "IMPORTING", &owner];
    let there = |command: &[&str]| {
        let replies = at_once(last, &[&importing, &["ASKING"], command, &["CLUSTER", "SETSLOT", "0", "STABLE"]]);
        assert!(!replies.iter().any(Value::is_error), "{replies:?}");
    };
    there(&["SET", &key, "alone"]);
    save(&dev, engine, 3, "");
    dev.wait_for_stderr("to lose its last keys");
    dev.wait_until("its slots to be others'", || own_slots(last) == Some((0, false)));
    assert_all_there(port);
    assert_eq!(Client::connect(last).unwrap().line("DBSIZE"), Value::Int(1));
    there(&["DEL", &key]);
    wait_for_shards(&dev, &run, 3);
    assert!(Client::connect(last).is_err(), "its server runs on");
    assert_all_there(port);
    dev.stop();
}

/// The primary of a shard.
fn primary(run: &Path, shard: u16) -> Option<u16> {
    let places = places(run);
    let mut of_shard = places.iter().filter(|(name, _)| name.starts_with(&format!("server-{shard}-"))).map(|(_, port)| *port);
    of_shard.find(|port| own_slots(*port).is_some_and(|(count, _)| count > 0))
}

/// Givers and getters are killed while slots move; their replicas go on with all keys.
#[track_caller]
fn check_outlives_primaries(engine: Engine) {
    let files = [("cache.yaml", with_shards(engine, 3, "")), ("policy.yaml", policy("user:{id}"))];
    let mut dev = Dev::start(engine, &files, &["--sidecars", "1"]);
    let port = dev.ready(1)[0];
    let run = dev.directory();
    fill(&mut Client::connect(port).unwrap());
    for shard in 0..3 {
        let primary = primary(&run, shard).expect("a primary");
        assert_eq!(server(primary).unwrap().line("WAIT 1 30000"), Value::Int(1));
    }
    save(&dev, engine, 5, "");
    for (shard, moved) in [(2, 300), (3, 600), (1, 900)] {
        let has_moved = || primary(&run, 3).and_then(own_slots).is_some_and(|(count, _)| count >= moved);
        dev.wait_until("slots to move", has_moved);
        let victim = primary(&run, shard).and_then(|port| info(port, "process_id")).expect("a primary");
        assert!(Command::new("kill").args(["-9", &victim]).status().unwrap().success());
    }
    wait_for_shards(&dev, &run, 5);
    assert_all_there(port);
    assert_eq!(dev.stderr().matches("and is started again").count(), 3, "{}", dev.stderr());
    dev.stop();
}

#[test]
fn keys_outlive_primaries_that_die_while_they_move_key_by_key() {
    check_outlives_primaries(Engine::Redis7);
}

#[test]
fn keys_outlive_primaries_that_die_while_they_move_at_once() {
    check_outlives_primaries(Engine::Valkey9);
}

#[test]
fn keys_outlive_primaries_that_die_while_they_are_imported() {
    if let Some(engine) = Engine::redis_8() {
        check_outlives_primaries(engine);
    }
}

/// Kills the one that moves slots, which takes all servers with it, and starts it anew.
#[track_caller]
fn die_and_come_back(mut dev: Dev, engine: Engine, arguments: &[&str]) -> Dev {
    let children = dev.children();
    dev.signal("KILL");
    dev.wait();
    wait_for("its processes are gone", LIMIT, || !children.iter().any(|pid| runs(*pid)));
    let manifests = dev.manifests.clone();
    Dev::start_in(engine, &manifests, arguments)
}

/// Whoever moves slots is killed in the middle, with all servers, again and again.
#[track_caller]
fn check_resumes(engine: Engine, deaths: u32) {
    let always = "  storage: {size: 1Gi, fsync: Always}\n";
    let data = TempDir::new().unwrap();
    let arguments = ["--sidecars", "1", "--data", data.path().to_str().unwrap()];
    let files = [("cache.yaml", with_shards(engine, 3, always))];
    let mut dev = Dev::start(engine, &files, &arguments);
    let port = dev.ready(1)[0];
    let run = data.path().canonicalize().unwrap();
    fill(&mut Client::connect(port).unwrap());
    save(&dev, engine, 5, always);
    for death in 1..=deaths {
        let owned_by_new =
            || places(&run).iter().filter(|(name, _)| **name == "server-3-0").find_map(|(_, port)| own_slots(*port));
        // A little further each time.
        dev.wait_until("slots to move", || owned_by_new().is_some_and(|(count, _)| count >= death * 400));
        dev = die_and_come_back(dev, engine, &arguments);
        dev.ready(1);
    }
    wait_for_shards(&dev, &run, 5);
    let port = dev.ready(1)[0];
    assert_all_there(port);
    // They stay, with another number of shards from the beginning.
    save(&dev, engine, 3, always);
    dev.wait_until("slots to move back", || dev.stderr().contains("slots begin to move"));
    dev = die_and_come_back(dev, engine, &arguments);
    let port = dev.ready(1)[0];
    wait_for_shards(&dev, &run, 3);
    assert_all_there(port);
    dev.stop();
}

#[test]
fn a_move_key_by_key_goes_on_after_its_mover_was_killed() {
    check_resumes(Engine::Redis7, 3);
}

#[test]
fn a_move_at_once_goes_on_after_its_mover_was_killed() {
    check_resumes(Engine::Valkey9, 1);
}

#[test]
fn imports_go_on_after_their_mover_was_killed() {
    if let Some(engine) = Engine::redis_8() {
        check_resumes(engine, 1);
    }
}
