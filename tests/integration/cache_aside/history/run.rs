//! One history: a database, its writers, the readers, and what befalls them.

use std::fmt::Write as _;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use larder::sidecar::slots::{Companion, is_larder_key};
use serde_json::Value as Json;

use super::super::{sidecars, total};
use super::readers;
use crate::read_through::Servers;
use crate::support::resp::{Client, Value};
use crate::support::sidecar::Sidecar;

/// The first half of the keys is deleted after each change, the other half is deleted or set.
pub const KEYS: usize = 6;
const SIDECARS: usize = 3;
/// How often each row changes.
const CHANGES: u64 = 30;
/// Faults of one history.
const FAULTS: usize = 12;

/// One row of the database, and its key.
pub struct Row {
    pub key: String,
    /// What the database says.
    pub version: AtomicU64,
    /// The latest whose deletion or storing was acknowledged.
    pub acknowledged: AtomicU64,
}

/// What clients saw.
#[derive(Debug, Default, Clone)]
pub struct Seen {
    pub hits: u64,
    pub misses: u64,
    pub fills: u64,
    pub writes: u64,
    /// Reads that were told to try again, and commands lost with a connection.
    pub errors: u64,
    /// Fills that the sidecars did not store.
    pub refused: Refused,
    /// Reads that waited for another client's load and were given its value.
    pub woken: u64,
    /// Values past their TTL, and values loaded anew before it.
    pub early_or_stale: u64,
    /// Times that a rule gave up its leases: from then on nothing is shown.
    pub disarmed: u64,
    /// What must never happen.
    pub wrong: Vec<String>,
}

/// Fills that were not stored, by reason.
#[derive(Debug, Default, Clone, Copy)]
pub struct Refused {
    /// What they were loaded under had ended: the key was written, deleted, evicted, or filled by another.
    pub late: u64,
    /// They may have come of a load that began before something was written, or of one that began after.
    pub mixed: u64,
    /// They may have come of a load of which it is not known since when nothing was written.
    pub undated: u64,
}

impl Refused {
    fn by(sidecars: &[Sidecar]) -> Self {
        // The part before the whole, which goes on growing.
        let undated = total(sidecars, "undated_fills");
        Self { late: total(sidecars, "late_fills"), mixed: total(sidecars, "ambiguous_fills") - undated, undated }
    }

    fn add(&mut self, other: &Self) {
        self.late += other.late;
        self.mixed += other.mixed;
        self.undated += other.undated;
    }

    pub fn total(&self) -> u64 {
        self.late + self.mixed + self.undated
    }
}

/// What all threads of a history share.
pub struct World {
    pub rows: Vec<Row>,
    /// The sidecars' ports. A sidecar that is killed comes back on another.
    pub ports: Mutex<Vec<u16>>,
    pub over: AtomicBool,
    pub seen: Mutex<Seen>,
    pub seed: u64,
}

impl World {
    /// A connection to any sidecar that takes one.
    pub fn connect(&self, random: &mut fastrand::Rng) -> Client {
        let deadline = Instant::now() + Duration::from_secs(60);
        loop {
            let port = {
                let ports = self.ports.lock().unwrap();
                ports[random.usize(..ports.len())]
            };
            match Client::connect(port) {
                Ok(client) => return client,
                Err(error) => assert!(Instant::now() < deadline, "no sidecar takes a connection: {error}"),
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    pub fn is_over(&self) -> bool {
        self.over.load(Ordering::SeqCst)
    }

    pub fn note(&self, note: impl FnOnce(&mut Seen)) {
        note(&mut self.seen.lock().unwrap());
    }

    /// Adds what sidecars have counted that are about to go.
    fn take_counts(&self, sidecars: &[Sidecar]) {
        let (refused, woken, disarmed) = (Refused::by(sidecars), total(sidecars, "woken"), total(sidecars, "disarmed"));
        let early_or_stale = total(sidecars, "early_refreshes") + total(sidecars, "stale");
        self.note(|seen| {
            seen.refused.add(&refused);
            seen.woken += woken;
            seen.disarmed += disarmed;
            seen.early_or_stale += early_or_stale;
        });
    }

    /// Judges a value that was read by a command sent when `least` had been acknowledged.
    pub fn judge(&self, row: &Row, least: u64, value: &Value, who: &str) {
        let newest = row.version.load(Ordering::SeqCst);
        let number = value.text().parse::<u64>();
        let right = number.as_ref().is_ok_and(|number| (least..=newest).contains(number));
        self.note(|seen| {
            seen.hits += 1;
            if !right {
                seen.wrong.push(format!(
                    "seed {}: {who} read {} of {} when {least} was acknowledged and {newest} the newest",
                    self.seed,
                    value.text(),
                    row.key
                ));
            }
        });
    }
}

/// A history that is about to be run.
pub struct Run<'a> {
    servers: &'a Servers,
    sidecars: Vec<Sidecar>,
    rule: &'a Json,
    world: World,
}

impl<'a> Run<'a> {
    pub fn new(servers: &'a Servers, seed: u64, rule: &'a Json) -> Self {
        let sidecars = sidecars(servers, SIDECARS, std::slice::from_ref(rule));
        let row =
            |index| Row { key: format!("item:{seed}-{index}"), version: AtomicU64::new(1), acknowledged: AtomicU64::new(0) };
        let world = World {
            rows: (0..KEYS).map(row).collect(),
            ports: Mutex::new(sidecars.iter().map(Sidecar::port).collect()),
            over: AtomicBool::new(false),
            seen: Mutex::default(),
            seed,
        };
        Self { servers, sidecars, rule, world }
    }

    /// Runs it to its end, and tells what was seen.
    pub fn finish(mut self) -> Seen {
        let world = &self.world;
        std::thread::scope(|scope| {
            let _over = Over(world);
            let mut number = world.seed * 1000;
            let mut random = || {
                number += 1;
                fastrand::Rng::with_seed(number)
            };
            for _ in 0..6 {
                let random = random();
                scope.spawn(move || readers::exclusive(world, random));
            }
            for _ in 0..3 {
                let random = random();
                scope.spawn(move || readers::pooled(world, random));
            }
            for _ in 0..2 {
                let random = random();
                scope.spawn(move || readers::multiplexed(world, random));
            }
            for _ in 0..2 {
                let random = random();
                scope.spawn(move || readers::many(world, random));
            }
            let writers: Vec<_> = (0..KEYS)
                .map(|index| {
                    let random = random();
                    scope.spawn(move || write(world, index, random))
                })
                .collect();
            befall(self.servers, &mut self.sidecars, self.rule, world, random());
            writers.into_iter().for_each(|writer| writer.join().unwrap());
        });
        self.read_once_more();
        self.world.take_counts(&self.sidecars);
        self.world.seen.lock().unwrap().clone()
    }

    /// When all is quiet, everybody sees the last version, or nothing.
    fn read_once_more(&self) {
        for sidecar in &self.sidecars {
            let mut client = sidecar.client();
            for row in &self.world.rows {
                let reply = client.call(&["GET", &row.key]);
                if matches!(reply, Value::Bulk(_)) {
                    self.world.judge(row, row.version.load(Ordering::SeqCst), &reply, "the last reader");
                }
            }
        }
    }
}

/// Tells the readers that the history is over, also where a writer fails.
struct Over<'a>(&'a World);

impl Drop for Over<'_> {
    fn drop(&mut self) {
        self.0.over.store(true, Ordering::SeqCst);
    }
}

/// Changes one row, again and again.
fn write(world: &World, index: usize, mut random: fastrand::Rng) {
    let row = &world.rows[index];
    let mut client = world.connect(&mut random);
    for version in 2..=CHANGES {
        std::thread::sleep(Duration::from_millis(random.u64(0..120)));
        row.version.store(version, Ordering::SeqCst);
        std::thread::sleep(Duration::from_millis(random.u64(0..5)));
        let sets = index >= KEYS / 2 && random.bool();
        let set = sets.then(|| client.try_call(&["SET", &row.key, &version.to_string()]));
        if !matches!(set, Some(Ok(Value::Simple(_)))) {
            // It is not known what became of a SET that failed: then nothing may stay.
            delete(world, &row.key, &mut client, &mut random);
        }
        row.acknowledged.store(version, Ordering::SeqCst);
        world.note(|seen| seen.writes += 1);
    }
}

fn delete(world: &World, key: &str, client: &mut Client, random: &mut fastrand::Rng) {
    let deadline = Instant::now() + Duration::from_secs(60);
    while !matches!(client.try_call(&["DEL", key]), Ok(Value::Int(_))) {
        assert!(Instant::now() < deadline, "{key} cannot be deleted");
        world.note(|seen| seen.errors += 1);
        *client = world.connect(random);
    }
}

/// What befalls servers and sidecars.
fn befall(servers: &Servers, sidecars: &mut [Sidecar], rule: &Json, world: &World, mut random: fastrand::Rng) {
    for _ in 0..FAULTS {
        std::thread::sleep(Duration::from_millis(random.u64(20..150)));
        let victim = random.usize(..sidecars.len());
        match random.u8(0..10) {
            0 => {
                // Its clients are gone, and so is what it knew of them.
                world.take_counts(&sidecars[victim..=victim]);
                sidecars[victim] = servers.sidecar(&[], std::slice::from_ref(rule));
                world.ports.lock().unwrap()[victim] = sidecars[victim].port();
            }
            1 | 2 => {
                sidecars[victim].signal("STOP");
                std::thread::sleep(Duration::from_millis(random.u64(50..400)));
                sidecars[victim].signal("CONT");
            }
            3 | 4 => {
                let key = &world.rows[random.usize(..KEYS)].key;
                servers.holder_of(key).call(&["CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes"]);
            }
            _ => evict(servers, &world.rows[random.usize(..KEYS)].key, &mut random),
        }
    }
}

/// As a full server does: a key goes, or what stands beside it.
fn evict(servers: &Servers, key: &str, random: &mut fastrand::Rng) {
    let names = [key.as_bytes().to_vec(), Companion::Lease.name(key.as_bytes()), Companion::Stale.name(key.as_bytes())];
    let name = &names[random.usize(..names.len())];
    assert!(name == key.as_bytes() || is_larder_key(name));
    servers.holder_of(key).call(&[&b"UNLINK"[..], name]);
}

impl Seen {
    /// Several histories together.
    pub fn sum(all: &[Seen]) -> Self {
        let mut sum = Self::default();
        for seen in all {
            sum.hits += seen.hits;
            sum.misses += seen.misses;
            sum.fills += seen.fills;
            sum.writes += seen.writes;
            sum.errors += seen.errors;
            sum.refused.add(&seen.refused);
            sum.woken += seen.woken;
            sum.early_or_stale += seen.early_or_stale;
            sum.disarmed += seen.disarmed;
            sum.wrong.extend(seen.wrong.iter().cloned());
        }
        sum
    }

    /// A report for people.
    pub fn report(&self, seeds: u64, took: Duration) -> String {
        let mut text = format!(
            "# Soak: cache-aside under faults\n\n`make soak` writes this. {seeds} histories against real servers and sidecars (half of \
             them under Sentinel, half in Cluster), {} s.\nWhat happens in each: `tests/integration/cache_aside/history`.\n\n| | |\n|---|---|\n",
            took.as_secs()
        );
        for (what, count) in [
            ("values read", self.hits),
            ("reads that were told of a miss", self.misses),
            ("fills sent", self.fills),
            (
                "of them not stored: late, since the key was written, deleted, evicted or filled behind the load's beginning",
                self.refused.late,
            ),
            ("of them not stored: doubtful, since loads from before and after a change were under way", self.refused.mixed),
            ("of them not stored: doubtful, since of a load it was not known what had been written since", self.refused.undated),
            ("reads that waited and were given another client's load", self.woken),
            ("stale values served, and values loaded anew before their TTL", self.early_or_stale),
            ("changes of the database, each acknowledged by the cache", self.writes),
            ("commands that failed, or were lost with a connection", self.errors),
            ("**values older than an acknowledged change**", self.wrong.len() as u64),
        ] {
            let _ = writeln!(text, "| {what} | {count} |");
        }
        text += "\nThat most fills are not stored is the load's nature. Each key changes a dozen times a second. One load in ten never ends in \
                 a SET, and it is heard for a lease, which is a second here: a SET that meets loads from before and after a change is not \
                 stored, since connections may be shared, and it may be any of theirs.\n";
        for wrong in &self.wrong {
            let _ = writeln!(
                text,
                "
- {wrong}"
            );
        }
        text
    }
}
