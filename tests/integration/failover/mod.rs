//! The sidecar while servers die, hang and hand slots over: no reply is mismatched, no order is broken, and what cannot be done
//! is said precisely.

mod load;
mod moved;
mod patience;
pub mod reshard;
mod secured;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use larder::sidecar::slots::slot_of;
use serde_json::{Value as Json, json};

use self::load::{Key, Load, Seen, Writes};
use super::support::resp::{Client, Value};
use super::support::server::{Engine, Redis, RedisCluster, SentinelCluster};
use super::support::sidecar::{Sidecar, bypass, cluster_topology, sentinel_topology};
use super::support::wait_for;

/// How long a promotion may take. Long: test machines are busy.
const LONG: Duration = Duration::from_secs(60);
const SHARDS: usize = 3;
const CLIENTS: usize = 30;
const KEYS: usize = 20;
const IN_FLIGHT: i64 = 1_000;
/// Calls that show how long one takes where nothing is wrong.
const USUAL: usize = 300;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fault {
    Kill,
    Hang,
}

fn shard_of(key: &str) -> usize {
    usize::from(slot_of(key.as_bytes())) * SHARDS / 16384
}

/// Keys of one client: of one shard, or, for the last clients, of all.
fn keys_of(client: usize, shard: Option<usize>) -> Vec<Key> {
    let all = (0..).map(|number| format!("c{client}:k{number}")).map(|name| Key { shard: shard_of(&name), name });
    all.filter(|key| shard.is_none_or(|shard| shard == key.shard)).take(KEYS).collect()
}

/// Reads and writes a key of a shard again and again, and notes how long each took. An error makes the test fail.
struct Probe {
    stop: std::sync::mpsc::Sender<()>,
    /// How many rounds it has made.
    rounds: Arc<AtomicUsize>,
    thread: std::thread::JoinHandle<Times>,
}

#[derive(Debug, Default)]
struct Times {
    get: Vec<Duration>,
    set: Vec<Duration>,
}

impl Times {
    fn longest(&self) -> Duration {
        self.get.iter().chain(&self.set).max().copied().unwrap_or_default()
    }
}

impl Probe {
    /// Nobody else may write the key.
    fn start(port: u16, key: &Key) -> Self {
        let (stop, stopped) = std::sync::mpsc::channel();
        let (name, rounds) = (key.name.clone(), Arc::new(AtomicUsize::new(0)));
        let made = rounds.clone();
        let thread = std::thread::spawn(move || {
            let mut client = Client::connect(port).expect("the sidecar accepts");
            let mut times = Times::default();
            for round in 0.. {
                if stopped.try_recv() != Err(std::sync::mpsc::TryRecvError::Empty) {
                    break;
                }
                let value = round.to_string();
                let began = Instant::now();
                assert_eq!(client.call(&["SET", &name, &value]), Value::Simple("OK".to_owned()));
                times.set.push(began.elapsed());
                let began = Instant::now();
                assert_eq!(client.call(&["GET", &name]), Value::Bulk(value.into_bytes()));
                times.get.push(began.elapsed());
                made.store(round + 1, Ordering::Relaxed);
                std::thread::sleep(Duration::from_millis(2));
            }
            times
        });
        Self { stop, rounds, thread }
    }

    /// Waits until it has made so many rounds as show what is usual.
    fn wait_for_the_usual(&self) {
        wait_for("a probe to have been at work", LONG, || self.rounds.load(Ordering::Relaxed) >= USUAL);
    }

    fn end(self) -> Times {
        let _ = self.stop.send(());
        self.thread.join().expect("reads and writes succeed")
    }
}

fn times_of(probes: Vec<Probe>) -> Times {
    let mut all = Times::default();
    for mut times in probes.into_iter().map(Probe::end) {
        all.get.append(&mut times.get);
        all.set.append(&mut times.set);
    }
    all
}

/// Panics where the other shards stood still for more than a small part of the time that the fault lasted. Standing still is
/// what takes ten times as long as the longest call before the fault.
fn check_others(before: &Times, during: &Times, away: Duration) {
    for (name, before, during) in [("GET", &before.get, &during.get), ("SET", &before.set, &during.set)] {
        let longest = |times: &[Duration]| times.iter().max().copied().unwrap_or_default();
        let limit = longest(before) * 10;
        let stood: Duration = during.iter().filter(|took| **took > limit).sum();
        println!("{name} of the others: before {:?}, during {:?}, stood still {stood:?}", longest(before), longest(during));
        assert!(during.len() > 100, "only {} calls of {name}: the test shows nothing", during.len());
        assert!(stood < away / 20, "{name} of the other shards stood still for {stood:?} of {away:?}; a call took {limit:?}");
    }
}

/// Waits until every key takes writes again through a new connection.
fn wait_until_writable(port: u16) {
    let mut client = Client::connect(port).expect("the sidecar accepts");
    for number in 0..200 {
        let key = format!("after:{number}");
        wait_for("every key to be writable", LONG, || client.call(&["SET", &key, "x"]) == Value::Simple("OK".to_owned()));
        assert_eq!(client.call(&["GET", &key]).text(), "x");
    }
}

/// Waits until a key of the first shard takes writes, which must follow the promotion soon.
fn wait_for_first_write(port: u16, began: Instant, promoted: Duration) {
    let mut client = Client::connect(port).expect("the sidecar accepts");
    let key = keys_of(CLIENTS, Some(0)).remove(0).name;
    wait_for("a write after the promotion", LONG, || client.call(&["SET", &key, "x"]) == Value::Simple("OK".to_owned()));
    let back = began.elapsed();
    println!("promoted after {promoted:?}, back after {back:?}");
    assert!(back < promoted * 2, "the promotion took {promoted:?}, and was taken up only after {back:?}");
}

fn check_recovery(seen: &[Seen]) {
    let sum = |of: fn(&Seen) -> usize| seen.iter().map(of).sum::<usize>();
    println!(
        "acknowledged {} uncertain {} refused {} lost {}",
        sum(|s| s.acknowledged),
        sum(|s| s.uncertain),
        sum(|s| s.refused),
        sum(|s| s.lost)
    );
    assert!(seen.iter().all(|seen| seen.recovered >= load::DEPTH), "a client does not go on: {seen:?}");
    assert!(sum(|seen| seen.uncertain + seen.refused) > 0, "the fault was not felt");
}

/// A policy for the load: that its keys have a TTL where writes are to be wrapped, else none.
fn policy(topology: Json, writes: Writes) -> Json {
    let mut snapshot = bypass(topology);
    if writes == Writes::Wrapped {
        let lifetime = json!({"default": "1h", "max": "2h", "jitter": "10%"});
        snapshot["rules"] = json!([{"name": "load", "keys": "c{client}:{key}", "strategy": {"cacheAside": {"ttl": lifetime}}}]);
    }
    snapshot
}

/// Where the policy gives TTLs, every key of the load that is there has one. Some may be missing: see the load.
fn check_ttls(sidecar: &Sidecar, keys: &[Vec<Key>], writes: Writes) {
    let mut client = sidecar.client();
    let left: Vec<i64> = keys.iter().flatten().map(|key| client.call(&["PTTL", &key.name]).int()).collect();
    match writes {
        Writes::Plain => assert!(left.iter().all(|left| *left == -1), "keys without a rule have TTLs: {left:?}"),
        Writes::Wrapped => {
            assert!(!left.contains(&-1), "covered keys have no TTL: {left:?}");
            assert!(left.iter().filter(|left| **left > 0).count() > left.len() / 2, "most keys are gone: {left:?}");
        }
    }
}

/// What befalls a server.
fn befall(server: &mut Redis, fault: Fault) {
    match fault {
        Fault::Kill => server.kill(),
        Fault::Hang => server.pause(),
    }
}

/// A server that hung goes on as if nothing had been, and believes that it is the primary until it is told. Nobody may notice.
fn wake(server: &Redis, load: &Load, port: u16) {
    server.resume();
    let woken = Instant::now();
    wait_for("the old primary to follow the new one", LONG, || server.follows());
    println!("the old primary follows after {:?}", woken.elapsed());
    wait_until_writable(port);
    load.wait_for_a_batch_of_each();
}

fn lose_a_shard(engine: Engine, fault: Fault, writes: Writes) {
    let mut cluster = RedisCluster::start_with(engine, SHARDS, 1, &["--cluster-require-full-coverage", "no"]);
    let sidecar = Sidecar::start(&policy(cluster_topology(&cluster), writes));
    let keys: Vec<Vec<Key>> = (0..CLIENTS).map(|client| keys_of(client, (client % 4 < SHARDS).then_some(client % 4))).collect();
    let load = Load::start(sidecar.port(), keys.clone(), writes);
    let others: Vec<Key> = (1..SHARDS).map(|shard| keys_of(CLIENTS + shard, Some(shard)).remove(0)).collect();
    let watch = || others.iter().map(|key| Probe::start(sidecar.port(), key)).collect::<Vec<_>>();
    let before = watch();
    before.iter().for_each(Probe::wait_for_the_usual);
    load.wait_for_writes_that_last();
    let before = times_of(before);
    let during = watch();
    let old = cluster.shard(0).port();
    let began = Instant::now();
    let in_flight = load.strike(0, IN_FLIGHT, || befall(&mut cluster.servers[0], fault));
    let witness = &cluster.servers[1];
    wait_for("a promotion", LONG, || {
        let slots = witness.client().line("CLUSTER SLOTS").items();
        slots.iter().map(Value::items).any(|run| run[0].int() == 0 && run[2].items()[1].int() != i64::from(old))
    });
    let promoted = began.elapsed();
    wait_for_first_write(sidecar.port(), began, promoted);
    wait_until_writable(sidecar.port());
    let away = began.elapsed();
    println!("{fault:?}: in flight {in_flight} promoted {promoted:?} away {away:?}");
    check_others(&before, &times_of(during), away);
    load.calm();
    if fault == Fault::Hang {
        wake(&cluster.servers[0], &load, sidecar.port());
    }
    check_recovery(&load.stop());
    check_ttls(&sidecar, &keys, writes);
}

#[test]
fn a_killed_primary_of_a_cluster_harms_its_shard_only() {
    lose_a_shard(Engine::Redis7, Fault::Kill, Writes::Plain);
}

#[test]
fn a_hanging_primary_of_a_cluster_harms_its_shard_only() {
    lose_a_shard(Engine::Redis7, Fault::Hang, Writes::Plain);
}

#[test]
fn a_hanging_primary_of_valkey_under_a_rule_harms_its_shard_only() {
    lose_a_shard(Engine::Valkey9, Fault::Hang, Writes::Wrapped);
}

/// Where a Cluster serves nothing while slots are uncovered, as is its default, those who ask elsewhere are made to wait.
#[test]
fn a_cluster_that_wants_all_slots_covered_is_waited_for() {
    let mut cluster = RedisCluster::start(Engine::Redis7, SHARDS, 1);
    let mut topology = cluster_topology(&cluster);
    topology["patience"] = json!("30s");
    let sidecar = Sidecar::start(&bypass(topology));
    let keys: Vec<Key> = (1..SHARDS).flat_map(|shard| keys_of(shard, Some(shard))).collect();
    let probes: Vec<Probe> = keys.iter().map(|key| Probe::start(sidecar.port(), key)).collect();
    cluster.servers[0].kill();
    wait_until_writable(sidecar.port());
    println!("the longest call took {:?}", times_of(probes).longest());
    let refused = |server: &Redis| server.client().line("INFO errorstats").text().contains("CLUSTERDOWN");
    assert!(cluster.servers[1..SHARDS].iter().any(refused), "no server was ever down: the test shows nothing");
}

fn lose_the_primary(engine: Engine, fault: Fault, writes: Writes) {
    let mut cluster = SentinelCluster::start(engine, 2);
    let sidecar = Sidecar::start(&policy(sentinel_topology(&cluster), writes));
    lose_the_primary_of(&mut cluster, &sidecar, fault, writes);
}

/// A fault befalls the primary under load.
fn lose_the_primary_of(cluster: &mut SentinelCluster, sidecar: &Sidecar, fault: Fault, writes: Writes) {
    let one_shard = |key: Key| Key { shard: 0, ..key };
    let keys: Vec<Vec<Key>> = (0..CLIENTS).map(|client| keys_of(client, None).into_iter().map(one_shard).collect()).collect();
    let load = Load::start(sidecar.port(), keys.clone(), writes);
    load.wait_for_writes_that_last();
    let old = cluster.primary_port();
    let began = Instant::now();
    let at = cluster.servers.iter().position(|server| server.service_port() == old).expect("one of ours");
    let in_flight = load.strike(0, IN_FLIGHT, || befall(&mut cluster.servers[at], fault));
    wait_for("a promotion", LONG, || cluster.primary_port() != old);
    let promoted = began.elapsed();
    wait_for_first_write(sidecar.port(), began, promoted);
    wait_until_writable(sidecar.port());
    println!("{fault:?}: in flight {in_flight} promoted {promoted:?} away {:?}", began.elapsed());
    load.calm();
    if fault == Fault::Hang {
        wake(&cluster.servers[at], &load, sidecar.port());
        assert_ne!(cluster.primary_port(), old, "the old primary is one again");
    }
    check_recovery(&load.stop());
    check_ttls(sidecar, &keys, writes);
}

#[test]
fn a_killed_primary_is_followed() {
    lose_the_primary(Engine::Redis7, Fault::Kill, Writes::Plain);
}

#[test]
fn a_hanging_primary_is_followed() {
    lose_the_primary(Engine::Redis7, Fault::Hang, Writes::Plain);
}

#[test]
fn a_killed_primary_of_valkey_under_a_rule_is_followed() {
    lose_the_primary(Engine::Valkey9, Fault::Kill, Writes::Wrapped);
}

#[test]
fn a_hanging_primary_under_a_rule_is_followed() {
    lose_the_primary(Engine::Redis7, Fault::Hang, Writes::Wrapped);
}

/// A reply that has begun to leave when its server dies has no honest end but the end of the connection.
#[test]
fn half_a_reply_is_never_completed_by_another() {
    let mut cluster = SentinelCluster::start(Engine::Redis7, 1);
    // Long enough for a read to be sent again to the server that is promoted.
    let mut topology = sentinel_topology(&cluster);
    topology["patience"] = json!("30s");
    let sidecar = Sidecar::start(&bypass(topology));
    let mut client = sidecar.client();
    let value = "v".repeat(48 * 1024 * 1024);
    assert_eq!(client.call(&["SET", "big", &value]), Value::Simple("OK".to_owned()));
    wait_for("the replica to have it", LONG, || cluster.servers[1].client().line("STRLEN big").int() > 0);
    client.send(b"*2\r\n$3\r\nGET\r\n$3\r\nbig\r\n").expect("the sidecar reads");
    // The start of the reply is there; its rest is not read, and so cannot all have left the server.
    let mut start = [0; 1024];
    std::io::Read::read_exact(&mut client.stream(), &mut start).expect("a reply begins");
    assert!(start.starts_with(b"$50331648\r\nvvv"));
    cluster.servers[0].kill();
    let mut rest = Vec::new();
    let ended = std::io::Read::read_to_end(&mut client.stream(), &mut rest);
    println!("{ended:?} after {} bytes", rest.len());
    assert!(!ended.is_err_and(|error| error.kind() == std::io::ErrorKind::WouldBlock), "the connection stays open");
    assert!(rest.iter().all(|byte| *byte == b'v'), "something else came within a value");
}

#[test]
fn without_sentinels_and_without_servers() {
    let mut cluster = SentinelCluster::start(Engine::Redis7, 1);
    let sidecar = Sidecar::start(&bypass(sentinel_topology(&cluster)));
    let mut client = sidecar.client();
    cluster.sentinels.iter_mut().for_each(super::support::server::Sentinel::kill);
    for number in 0..200 {
        assert_eq!(client.line(&format!("SET k:{number} {number}")), Value::Simple("OK".to_owned()));
        std::thread::sleep(Duration::from_millis(5));
    }
    assert_eq!(sidecar.client().line("GET k:199").text(), "199");
    cluster.servers.iter_mut().for_each(Redis::kill);
    wait_for("the sidecar to notice", LONG, || client.line("SET k 1").is_error());
    let began = Instant::now();
    let reply = client.line("SET k 2");
    let waited = began.elapsed();
    let Value::Error(text) = &reply else { panic!("{reply:?}") };
    assert!(text.starts_with("TRYAGAIN ") && text.contains("was not sent"), "{text}");
    // The patience of the policy is 2 s.
    assert!(waited >= Duration::from_millis(1900), "{waited:?}");
    let began = Instant::now();
    client.send(&"*2\r\n$3\r\nGET\r\n$1\r\nk\r\n".repeat(100).into_bytes()).expect("the sidecar reads");
    (0..100).for_each(|_| assert!(client.read().expect("a reply").is_error()));
    assert!(began.elapsed() < waited * 3, "{:?} for all, {waited:?} for one", began.elapsed());
}

/// A password that the server does not know is told, and once it does, service goes on.
#[test]
fn a_wrong_password_is_named() {
    let cluster = SentinelCluster::start(Engine::Redis7, 0);
    let directory = tempfile::TempDir::new().expect("a temporary directory");
    let path = directory.path().join("password");
    std::fs::write(&path, "r1ghtpw").expect("the directory is writable");
    let mut admin = cluster.servers[0].client();
    assert_eq!(admin.line("CONFIG SET requirepass r1ghtpw"), Value::Simple("OK".to_owned()));
    let mut topology = sentinel_topology(&cluster);
    topology["auth"] = json!({"passwordFile": path});
    let sidecar = Sidecar::start(&bypass(topology));
    assert_eq!(sidecar.client().line("SET k 1"), Value::Simple("OK".to_owned()));
    assert_eq!(admin.line("CONFIG SET requirepass other"), Value::Simple("OK".to_owned()));
    assert!(admin.line("CLIENT KILL TYPE normal SKIPME yes").int() > 0);
    let mut client = sidecar.client();
    wait_for("the reason to be told", LONG, || match client.line("SET k 2") {
        Value::Error(text) => {
            text.starts_with("TRYAGAIN ") && text.contains("password is wrong") && text.contains("was not sent")
        }
        other => panic!("{other:?}"),
    });
    assert!(!sidecar.log().contains("r1ghtpw"));
    std::fs::write(&path, "other").expect("the directory is writable");
    wait_for("the new password", LONG, || client.line("SET k 3") == Value::Simple("OK".to_owned()));
}
