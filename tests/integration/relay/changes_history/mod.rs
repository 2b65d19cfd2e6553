//! Histories of rows that are changed all the time, most of them followed through the database's log and some told of by events, and of clients that
//! read them through sidecars, while relays, sidecars, primaries of the cache and the database die or stand still, slots and what the cache keeps
//! of them vanish, and versions are evicted. What each read is held to [`checker`] says.

mod broken;
mod checker;
mod clients;
mod marks;
mod soak;

use std::collections::BTreeMap;
use std::sync::Mutex;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use serde_json::json;

use checker::Verdict;
use clients::{Ends, KEYS, TOTAL, USERS, World, key};

use super::changes::{SLOT, STATE, Shop, figure};
use super::{LONG, Relay};
use crate::read_through::{Servers, rule};
use crate::support::resp::{Client, Value};
use crate::support::server::{Engine, SentinelCluster};
use crate::support::sidecar::Sidecar;
use crate::support::wait_for;

const READERS: u64 = 4;

/// What may happen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fault {
    RelayDies,
    RelayStandsStill,
    DatabaseRestarts,
    /// Who reads the slot is ended, and the slot is dropped.
    SlotGoes,
    /// Who reads the slot is ended.
    ReaderIsEnded,
    /// The cache has another position than was written last.
    PositionIsAnother,
    /// The cache knows nothing of the feed.
    StateGoes,
    VersionsGo,
    SidecarDies,
    SidecarStandsStill,
    PrimaryDies,
}

impl Fault {
    const ALL: [Self; 11] = [
        Self::RelayDies,
        Self::RelayStandsStill,
        Self::DatabaseRestarts,
        Self::SlotGoes,
        Self::ReaderIsEnded,
        Self::PositionIsAnother,
        Self::StateGoes,
        Self::VersionsGo,
        Self::SidecarDies,
        Self::SidecarStandsStill,
        Self::PrimaryDies,
    ];
}

/// How a history goes.
struct Plan {
    seed: u64,
    /// Whether the rule of the notes has versions.
    versioned: bool,
    /// Whether servers have less memory than is stored, and evict whatever key they meet.
    evicts: bool,
    /// What befalls it, one after the other.
    faults: Vec<Fault>,
    /// How many names more there are, for walks to pass by.
    fill: u32,
}

impl Plan {
    /// Each fault once, in another order each time.
    fn full(seed: u64) -> Self {
        let mut faults = Fault::ALL.to_vec();
        fastrand::Rng::with_seed(seed).shuffle(&mut faults);
        Self { seed, versioned: seed.is_multiple_of(2), evicts: seed % 3 == 1, faults, fill: 0 }
    }
}

/// What histories have shown.
#[derive(Default)]
struct Seen {
    histories: usize,
    verdict: Verdict,
    errors: BTreeMap<String, u64>,
    /// What was evicted, by the beginning of its name.
    evicted: BTreeMap<String, u64>,
}

impl Seen {
    #[track_caller]
    fn assert_right(&self) {
        let wrong = &self.verdict.wrong;
        assert!(wrong.is_empty(), "{} wrong:\n{}", wrong.len(), wrong[..wrong.len().min(20)].join("\n"));
    }

    /// What holds is not held of nothing, on a busy machine either.
    #[track_caller]
    fn assert_busy(&self) {
        let Verdict { reads, held, commits, .. } = self.verdict;
        let is_busy = commits > 300 * self.histories && held * 8 > reads && held > 500 * self.histories;
        assert!(is_busy, "{commits} commits, and {held} of {reads} reads were held to something");
    }
}

struct Stage {
    shop: Shop,
    relays: Vec<Relay>,
}

impl Stage {
    fn set(servers: Servers, plan: &Plan) -> Self {
        let query = json!({"sql": {"read": "SELECT n::text FROM notes WHERE grp = $group AND id = $id"}});
        let mut note = rule("note", "db", query, json!({"negativeTtl": "1h"}));
        (note["keys"], note["tags"], note["versioned"]) =
            (json!("note:{group}:{id}"), json!(["group:{group}"]), json!(plan.versioned));
        let shop = Shop::with(servers, &[note], 2);
        shop.change(&clients::tables().iter().map(String::as_str).collect::<Vec<_>>());
        if plan.fill > 0 {
            shop.fill(plan.fill);
        }
        let relays = (0..2).map(|_| shop.scene.relay()).collect();
        Self { shop, relays }
    }

    /// How many shards there are, with how many replicas each.
    fn shape(&self) -> (usize, usize) {
        match &self.shop.scene.servers {
            Servers::Sentinel(servers) => (1, servers.servers.len() - 1),
            Servers::Cluster(servers) => (servers.shards(), servers.servers.len() / servers.shards() - 1),
        }
    }

    /// Lets one fault happen. What it stops goes on before it returns.
    fn befall(&mut self, fault: Fault, world: &World, random: &mut fastrand::Rng) {
        let victim = random.usize(..2);
        let shop = &mut self.shop;
        match fault {
            Fault::RelayDies => {
                let relay = shop.scene.relay();
                std::mem::replace(&mut self.relays[victim], relay).kill();
            }
            Fault::RelayStandsStill => {
                // That of both that reads, so that the other takes over, where one does.
                let reads = self.relays.iter().position(|relay| figure(relay, "reading") == 1);
                let relay = &self.relays[reads.unwrap_or(victim)];
                relay.signal("STOP");
                std::thread::sleep(Duration::from_millis(random.u64(500..4_000)));
                relay.signal("CONT");
            }
            Fault::DatabaseRestarts => shop.postgres.restart(),
            Fault::SlotGoes => {
                // Whoever reads it may be back before it can be dropped.
                let drop = format!(
                    "SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots WHERE NOT active AND slot_name = '{SLOT}'"
                );
                shop.try_to_change(&[&end_reader(), "SELECT pg_sleep(0.1)", &drop]);
            }
            Fault::ReaderIsEnded => shop.try_to_change(&[&end_reader()]),
            Fault::PositionIsAnother => drop(shop.kept(&["HSET", STATE, "position", "0/1 elsewhere"])),
            Fault::StateGoes => drop(shop.kept(&["DEL", STATE])),
            Fault::VersionsGo => shop.scene.servers.ports().into_iter().for_each(lose_versions),
            Fault::SidecarDies => {
                shop.sidecars[victim] = Sidecar::start(&shop.scene.snapshot);
                world.ports.lock().unwrap()[victim] = shop.sidecars[victim].port();
            }
            Fault::SidecarStandsStill => {
                shop.sidecars[victim].signal("STOP");
                std::thread::sleep(Duration::from_millis(random.u64(500..4_000)));
                shop.sidecars[victim].signal("CONT");
            }
            Fault::PrimaryDies => {
                shop.scene.servers.fail_over(random);
            }
        }
    }

    /// Waits until all that was committed by now is told and carried out.
    #[track_caller]
    fn wait_until_told(&self, world: &World) {
        let newest = world.newest.load(Ordering::SeqCst);
        let is_told = || world.history.lock().unwrap().furthest() >= newest;
        let until = Instant::now() + LONG;
        while !is_told() {
            let logs = || self.relays.iter().map(Relay::log).collect::<Vec<_>>().join("\n--\n");
            assert!(Instant::now() < until, "changes are not told: {:?}\n{}", world.shown.lock().unwrap(), logs());
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// The keys that a sidecar shows otherwise than the database has them, when all is told and nothing changes any more.
    fn old(&self) -> Vec<String> {
        let numbers = |query: &str| -> Vec<u64> {
            self.shop.value(query).split(',').map(|number| number.parse().expect("a number")).collect()
        };
        let rows = [
            numbers("SELECT string_agg(name, ',' ORDER BY id) FROM users"),
            numbers("SELECT sum(cents)::text FROM prices"),
            numbers("SELECT string_agg(n::text, ',' ORDER BY id) FROM notes"),
        ]
        .concat();
        assert_eq!((rows.len(), USERS), (KEYS, TOTAL));
        let mut old = Vec::new();
        for mut client in self.shop.clients() {
            for (at, row) in rows.iter().enumerate() {
                let mut shown = Value::Nil;
                wait_for("a read to be answered", LONG, || {
                    shown = client.call(&["GET", &key(at)]);
                    !shown.is_error()
                });
                if shown != Value::Bulk(row.to_string().into_bytes()) {
                    old.push(format!("{} ends as {shown:?}, and the database has {row}", key(at)));
                }
            }
        }
        old
    }
}

fn end_reader() -> String {
    format!("SELECT pg_terminate_backend(active_pid) FROM pg_replication_slots WHERE slot_name = '{SLOT}'")
}

/// All versions that a primary has are lost at once.
fn lose_versions(port: u16) {
    let Ok(mut server) = Client::connect(port) else { return };
    // Replicas refuse.
    if let Ok(Value::Array(names)) = server.try_call(&["KEYS", "larder:v:*"]) {
        names.iter().for_each(|name| drop(server.try_call(&["DEL", &name.text()])));
    }
}

/// Stores more than the primary of these servers has room for.
fn overfill(world: &World, ports: &[u16], seed: u64) {
    const ROOM: u64 = 1 << 20;
    let (mut random, mut at) = (fastrand::Rng::with_seed(seed), 0);
    let value = "x".repeat(1_000);
    while !world.is_over() {
        std::thread::sleep(Duration::from_millis(20));
        at = (at + 1) % ports.len();
        let Ok(mut server) = Client::connect(ports[at]) else { continue };
        let used =
            server.try_call(&["INFO", "memory"]).ok().filter(|told| !told.is_error()).and_then(|told| {
                told.text().lines().find_map(|line| line.strip_prefix("used_memory:")?.trim().parse::<u64>().ok())
            });
        let names = server.try_call(&["DBSIZE"]).map_or(0, |names| if names.is_error() { 0 } else { names.int() });
        let Some(used) = used else { continue };
        // One that was a replica before is full as it is.
        let room = if names < 500 { used + ROOM } else { used };
        for (name, value) in [("maxmemory", room.to_string()), ("maxmemory-policy", "allkeys-random".to_owned())] {
            let _ = server.try_call(&["CONFIG", "SET", name, &value]);
        }
        while !world.is_over() {
            let name = format!("filler:{}", random.u32(..1_000_000));
            if !server.try_call(&["SET", &name, &value]).is_ok_and(|reply| !reply.is_error()) {
                break;
            }
            std::thread::sleep(Duration::from_millis(8));
        }
    }
}

/// Counts what a server evicts.
fn count_evictions(world: &World, port: u16, evicted: &Mutex<BTreeMap<String, u64>>) {
    while !world.is_over() {
        std::thread::sleep(Duration::from_millis(50));
        let Ok(mut server) = Client::connect(port) else { continue };
        let _ = server.stream().set_read_timeout(Some(Duration::from_millis(500)));
        let _ = server.try_call(&["CONFIG", "SET", "notify-keyspace-events", "Ee"]);
        let _ = server.try_call(&["SUBSCRIBE", "__keyevent@0__:evicted"]);
        while !world.is_over() {
            match server.read() {
                Ok(told) => {
                    let name = told.items().get(2).map(Value::text).unwrap_or_default();
                    let kind =
                        name.split(':').take(if name.starts_with("larder:") { 2 } else { 1 }).collect::<Vec<_>>().join(":");
                    *evicted.lock().unwrap().entry(kind).or_default() += 1;
                }
                Err(error) if matches!(error.kind(), std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut) => {}
                Err(_) => break,
            }
        }
    }
}

fn play(servers: Servers, plan: &Plan) -> Seen {
    let mut stage = Stage::set(servers, plan);
    let world = World::new(stage.shop.sidecars.iter().map(Sidecar::port).collect(), plan.versioned);
    let (seed, ports, (shards, replicas)) = (plan.seed * 1_000, stage.shop.scene.servers.ports(), stage.shape());
    let url = stage.shop.postgres.url(&stage.shop.database);
    let mut random = fastrand::Rng::with_seed(seed);
    let evicted = Mutex::default();
    std::thread::scope(|scope| {
        let (world, ports, url, evicted) = (&world, &ports, &url, &evicted);
        let _ends = Ends(world);
        let rows = [0..USERS / 2, USERS / 2..USERS, TOTAL..TOTAL + 1].into_iter().zip(1..);
        let rows = rows.map(|(rows, at)| scope.spawn(move || world.change_rows(url, rows, seed + at)));
        let mut writers: Vec<_> = rows.collect();
        writers.extend((0..2).map(|odd| scope.spawn(move || world.change_notes(url, odd, seed + 10 + odd as u64))));
        (0..READERS).for_each(|at| drop(scope.spawn(move || world.read(seed + 100 + at))));
        scope.spawn(move || marks::watch(world, ports, shards, replicas));
        if plan.evicts {
            scope.spawn(move || overfill(world, ports, seed + 20));
            ports.iter().for_each(|port| drop(scope.spawn(move || count_evictions(world, *port, evicted))));
        }
        for fault in &plan.faults {
            std::thread::sleep(Duration::from_millis(random.u64(200..900)));
            stage.befall(*fault, world, &mut random);
            if random.bool() {
                stage.wait_until_told(world);
            }
        }
        std::thread::sleep(Duration::from_millis(500));
        world.stop_changes();
        writers.into_iter().for_each(|writer| writer.join().expect("a writer"));
        stage.wait_until_told(world);
        world.settle_notes();
        let old = stage.old();
        world.history.lock().unwrap().wrong.extend(old);
    });
    let mut verdict = world.history.lock().unwrap().judge();
    let trace = world.history.lock().unwrap().trace();
    verdict.wrong.iter_mut().for_each(|wrong| *wrong = format!("seed {}: {wrong}", plan.seed));
    let seen = Seen { histories: 1, verdict, errors: world.errors.into_inner().unwrap(), evicted: evicted.into_inner().unwrap() };
    let Verdict { reads, held, commits, delays, gaps, .. } = &seen.verdict;
    println!("seed {}: {:?}: {} wrong", plan.seed, plan.faults, seen.verdict.wrong.len());
    println!("{commits} commits; {reads} reads, {held} of them held to something; {gaps:?} of gaps");
    println!("carried out within {:?}; {:?}; evicted {:?}", delays.last(), seen.errors, seen.evicted);
    trace.iter().for_each(|line| println!("{line}"));
    seen
}

/// Two histories beside each other, in one of which whatever key is evicted.
#[test]
fn nothing_is_read_that_is_older_than_what_was_told_whatever_happens() {
    let sentinel = || Servers::Sentinel(SentinelCluster::start(Engine::Valkey9, 1));
    let seed = fastrand::u64(..100_000) * 6;
    let seen: Vec<Seen> = std::thread::scope(|scope| {
        let histories = [seed + 1, seed + 2].map(|seed| scope.spawn(move || play(sentinel(), &Plan::full(seed))));
        histories.into_iter().map(|history| history.join().expect("a history")).collect()
    });
    seen.iter().for_each(Seen::assert_right);
    seen.iter().for_each(Seen::assert_busy);
    assert!(seen.iter().any(|seen| seen.evicted.values().sum::<u64>() > 200), "{:?}", seen[0].evicted);
}
