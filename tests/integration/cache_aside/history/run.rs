//! One history: a database, its writers, the readers, and what befalls them.

use std::io;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use serde_json::Value as Json;

use super::super::{sidecars, total};
use super::faults::{self, Great};
use super::readers;
use super::seen::{Refused, Seen};
use crate::read_through::Servers;
use crate::support::resp::{Client, Value, encode};
use crate::support::sidecar::{Sidecar, connect_to_any};

/// The first half of the keys is deleted after each change, the other half is deleted or set.
pub const KEYS: usize = 6;
const SIDECARS: usize = 3;
/// How often each row changes.
const CHANGES: u64 = 30;
/// Longer than anybody may wait for a reply: the rule waits for 150 ms, and what cannot be sent is held for 2 s. What stops for a while
/// by the history's faults, or since the machine is busy, has the rest. Clients give up after twice this.
pub const LONGEST: Duration = Duration::from_secs(10);

/// One row of the database, and its key.
pub struct Row {
    pub key: String,
    /// What the database says.
    pub version: AtomicU64,
    /// The latest whose deletion or storing was acknowledged.
    pub acknowledged: AtomicU64,
}

impl Row {
    /// What is stored for a version. It names the key, so that another key's reply is found.
    pub fn value(&self, version: u64) -> String {
        format!("{}:{version}", self.key)
    }

    /// The version that a value is of, where it is one of this row's.
    fn version_of(&self, value: &Value) -> Option<u64> {
        let Value::Bulk(bytes) = value else { return None };
        std::str::from_utf8(bytes).ok()?.strip_prefix(&self.key)?.strip_prefix(':')?.parse().ok()
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
        connect_to_any(&self.ports, random, Duration::from_secs(60))
    }

    pub fn is_over(&self) -> bool {
        self.over.load(Ordering::SeqCst)
    }

    pub fn note(&self, note: impl FnOnce(&mut Seen)) {
        note(&mut self.seen.lock().unwrap());
    }

    pub fn note_wrong(&self, what: &str) {
        self.note(|seen| seen.wrong.push(format!("seed {}: {what}", self.seed)));
    }

    /// Sends a command and reads its reply.
    pub fn call(&self, client: &mut Client, command: &[&str]) -> io::Result<Value> {
        let sent = Instant::now();
        self.send(client, &encode(command))?;
        self.reply(client, sent, command)
    }

    pub fn send(&self, client: &mut Client, bytes: &[u8]) -> io::Result<()> {
        client.send(bytes).inspect_err(|_| self.note(|seen| seen.errors += 1))
    }

    /// Reads the reply of a command that went out at `sent`, and judges how long that took, and which errors there are.
    pub fn reply(&self, client: &mut Client, sent: Instant, command: &[&str]) -> io::Result<Value> {
        let reply = client.read();
        let took = sent.elapsed();
        self.note(|seen| {
            seen.longest = seen.longest.max(took);
            let is_cut_short =
                matches!(&reply, Ok(Value::Error(text)) if text.contains("other commands were sent behind the read"));
            seen.cut_short += u64::from(is_cut_short);
            seen.errors += u64::from(!is_cut_short && !matches!(&reply, Ok(value) if !value.is_error()));
        });
        if took > LONGEST {
            self.note_wrong(&format!("{command:?} took {took:?}, and then came {reply:?}"));
        }
        match &reply {
            Ok(Value::Error(text)) if !["TRYAGAIN ", "UNCERTAIN "].iter().any(|kind| text.starts_with(kind)) => {
                self.note_wrong(&format!("{command:?} was told: {text}"));
            }
            // What was waited for without an end is told of above: nothing else may come but the connection's end.
            Err(error) if error.kind() == io::ErrorKind::InvalidData => self.note_wrong(&format!("{command:?}: {error}")),
            _ => {}
        }
        reply
    }

    /// Adds what sidecars have counted that are about to go.
    pub fn take_counts(&self, sidecars: &[Sidecar]) {
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
        self.note(|seen| seen.hits += 1);
        if !row.version_of(value).is_some_and(|version| (least..=newest).contains(&version)) {
            self.note_wrong(&format!(
                "{who} read {value:?} of {} when {least} was acknowledged and {newest} the newest",
                row.key
            ));
        }
    }
}

/// A history that is about to be run.
pub struct Run<'a> {
    servers: &'a Servers,
    sidecars: Vec<Sidecar>,
    rule: &'a Json,
    great: Option<Great>,
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
        Self { servers, sidecars, rule, great: None, world }
    }

    /// The same, where this befalls a server, too.
    pub fn with(mut self, great: Option<Great>) -> Self {
        self.great = great;
        self
    }

    /// What its threads will share.
    pub fn world(&self) -> &World {
        &self.world
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
            faults::befall(self.servers, &mut self.sidecars, self.rule, self.great, world, random());
            writers.into_iter().for_each(|writer| writer.join().unwrap());
        });
        self.read_once_more();
        self.world.take_counts(&self.sidecars);
        self.world.seen.lock().unwrap().clone()
    }

    /// When all is quiet, everybody sees the last version, or nothing, and no key is there for good.
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
        self.world.rows.iter().for_each(|row| faults::look_at_ttls(self.servers, &self.world, &row.key));
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
        let set = sets.then(|| world.call(&mut client, &["SET", &row.key, &row.value(version)]));
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
    while !matches!(world.call(client, &["DEL", key]), Ok(Value::Int(_))) {
        assert!(Instant::now() < deadline, "{key} cannot be deleted");
        *client = world.connect(random);
    }
}
