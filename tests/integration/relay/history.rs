//! Histories of clients of two sidecars that write behind, each key by one client and with rising numbers, while relays, sidecars, servers
//! and Postgres die or stand still. What must hold (I11, I12):
//!
//! - A read gives nothing older than what was acknowledged before it began, and nothing that was refused.
//! - Postgres ends with the last acknowledged write of each key, or with one behind it of which nobody heard.
//! - No write is made there twice, and none after a later one of its key.

use std::collections::BTreeMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use super::together::{TABLES, WRITE, assert_in_order, rows};
use super::{LONG, Relay, Scene, sql_rule};
use crate::read_through::{Servers, sql_origin};
use crate::support::postgres::Postgres;
use crate::support::resp::{Client, Value};
use crate::support::server::{Engine, SentinelCluster};
use crate::support::sidecar::{Sidecar, connect_to_any};
use crate::support::wait_for;
use crate::write_behind::{durable, write_to_disk};
use crate::write_through::block;

const WRITERS: usize = 4;
const READERS: usize = 3;
const KEYS_OF_A_WRITER: usize = 4;
const FAULTS: usize = 7;
/// Until then a write of which nobody heard is made or never will be: an append counts for five seconds.
const DOUBT_LASTS: Duration = Duration::from_secs(8);
const DELETE: &str = "WITH told AS (INSERT INTO history (id, version) VALUES ($id, $version)) DELETE FROM users WHERE id = $id";

/// What a client heard of a write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Heard {
    Acknowledged,
    Refused,
    Nothing,
}

/// The writes of one key; the number of each is its place, counted from 1.
#[derive(Default)]
struct Account {
    /// Whether it deletes, and what was heard of it.
    writes: Vec<(bool, Heard)>,
    /// The last that was acknowledged; 0: none.
    acknowledged: usize,
}

impl Account {
    fn begin(&mut self, deletes: bool) -> usize {
        self.writes.push((deletes, Heard::Nothing));
        self.writes.len()
    }

    fn end(&mut self, number: usize, heard: Heard) {
        self.writes[number - 1].1 = heard;
        if heard == Heard::Acknowledged {
            self.acknowledged = number;
        }
    }

    /// Whether a key may be as `value` says, between the writes `floor` and `ceiling`.
    fn admits(&self, floor: usize, ceiling: usize, value: Option<usize>) -> bool {
        let may = |number: usize, deletes: bool| {
            self.writes.get(number - 1).is_some_and(|(does, heard)| *does == deletes && *heard != Heard::Refused)
        };
        match value {
            Some(number) => (floor.max(1)..=ceiling).contains(&number) && may(number, false),
            None => floor == 0 || (floor..=ceiling).any(|number| may(number, true)),
        }
    }
}

#[derive(Debug)]
struct Read {
    key: usize,
    floor: usize,
    ceiling: usize,
    value: Option<usize>,
}

#[derive(Default)]
struct World {
    ports: Mutex<Vec<u16>>,
    over: AtomicBool,
    accounts: Vec<Mutex<Account>>,
    reads: Mutex<Vec<Read>>,
    errors: Mutex<BTreeMap<String, u64>>,
}

fn key(index: usize) -> String {
    format!("users:{index}")
}

fn number(value: &Value) -> Option<usize> {
    if *value == Value::Nil { None } else { Some(value.text().parse().expect("a number")) }
}

impl World {
    fn is_over(&self) -> bool {
        self.over.load(Ordering::SeqCst)
    }

    fn note_error(&self, text: &str) {
        let word = text.split([':', '`']).next().unwrap_or_default().to_owned();
        *self.errors.lock().unwrap().entry(word).or_default() += 1;
    }

    fn write(&self, writer: usize, seed: u64) {
        let mut random = fastrand::Rng::with_seed(seed);
        let mut client = connect_to_any(&self.ports, &mut random, LONG);
        let mut rests: [Option<Instant>; KEYS_OF_A_WRITER] = [None; KEYS_OF_A_WRITER];
        while !self.is_over() {
            std::thread::sleep(Duration::from_millis(random.u64(0..8)));
            let own = random.usize(..KEYS_OF_A_WRITER);
            if rests[own].is_some_and(|since| since.elapsed() < DOUBT_LASTS) {
                continue;
            }
            let at = writer * KEYS_OF_A_WRITER + own;
            let deletes = random.u8(0..8) == 0;
            let (name, number) = (key(at), self.accounts[at].lock().unwrap().begin(deletes));
            let reply =
                if deletes { client.try_call(&["DEL", &name]) } else { client.try_call(&["SET", &name, &number.to_string()]) };
            let heard = match &reply {
                Ok(Value::Error(text)) => {
                    self.note_error(text);
                    let refused =
                        text.contains("nothing was written") || text.starts_with("NOREPLICAS") || text.starts_with("TRYAGAIN");
                    if refused { Heard::Refused } else { Heard::Nothing }
                }
                Ok(_) => Heard::Acknowledged,
                Err(_) => Heard::Nothing,
            };
            self.accounts[at].lock().unwrap().end(number, heard);
            rests[own] = (heard == Heard::Nothing).then(Instant::now);
            if reply.is_err() {
                client = connect_to_any(&self.ports, &mut random, LONG);
            }
        }
    }

    fn read(&self, seed: u64) {
        let mut random = fastrand::Rng::with_seed(seed);
        let mut client = connect_to_any(&self.ports, &mut random, LONG);
        while !self.is_over() {
            std::thread::sleep(Duration::from_micros(random.u64(0..4_000)));
            let at = random.usize(..self.accounts.len());
            let floor = self.accounts[at].lock().unwrap().acknowledged;
            match client.try_call(&["GET", &key(at)]) {
                Ok(Value::Error(text)) => self.note_error(&text),
                Ok(value) => {
                    let ceiling = self.accounts[at].lock().unwrap().writes.len();
                    self.reads.lock().unwrap().push(Read { key: at, floor, ceiling, value: number(&value) });
                }
                Err(_) => client = connect_to_any(&self.ports, &mut random, LONG),
            }
        }
    }
}

/// The clients go when this does, also where a test fails.
struct Ends<'a>(&'a World);

impl Drop for Ends<'_> {
    fn drop(&mut self) {
        self.0.over.store(true, Ordering::SeqCst);
    }
}

struct Stage {
    scene: Scene,
    postgres: Postgres,
    database: String,
    sidecars: Vec<Sidecar>,
    relays: Vec<Relay>,
}

impl Stage {
    fn set(engine: Engine) -> Self {
        let postgres = Postgres::start();
        let url = block(postgres.database(&TABLES));
        let database = url.rsplit('/').next().expect("a name").to_owned();
        let rules = [sql_rule("users", "db", WRITE, DELETE)];
        let scene = Scene::new(Servers::Sentinel(durable(engine, 2)), &[sql_origin("db", &url)], &rules);
        let sidecars = (0..2).map(|_| Sidecar::start(&scene.snapshot)).collect();
        let relays = (0..2).map(|_| scene.relay()).collect();
        Self { scene, postgres, database, sidecars, relays }
    }

    fn servers(&mut self) -> &mut SentinelCluster {
        match &mut self.scene.servers {
            Servers::Sentinel(servers) => servers,
            Servers::Cluster(_) => panic!("not under Sentinel"),
        }
    }

    /// Lets one fault happen. What it stops goes on before it returns.
    fn befall(&mut self, fault: u8, world: &World, random: &mut fastrand::Rng) {
        let victim = random.usize(..2);
        match fault {
            0 => {
                let relay = self.scene.relay();
                std::mem::replace(&mut self.relays[victim], relay).kill();
            }
            1 => {
                // Longer than a claim lasts: the other has its partitions.
                self.relays[victim].signal("STOP");
                std::thread::sleep(Duration::from_millis(random.u64(2_500..4_000)));
                self.relays[victim].signal("CONT");
            }
            2 => {
                let at = self.servers().fail_over(LONG);
                write_to_disk(&self.servers().servers[at]);
            }
            3 => self.stand_still(random),
            4 => {
                self.sidecars[victim] = Sidecar::start(&self.scene.snapshot);
                world.ports.lock().unwrap()[victim] = self.sidecars[victim].port();
            }
            5 => self.postgres.restart(),
            _ => {
                let name = key(random.usize(..world.accounts.len()));
                self.servers().primary().client().call(&["DEL", &name]);
            }
        }
    }

    /// The primary stands still until another has taken its place, and follows that.
    fn stand_still(&mut self, random: &mut fastrand::Rng) {
        let servers = self.servers();
        let old = servers.primary_port();
        let at = servers.servers.iter().position(|server| server.service_port() == old).expect("one of ours");
        servers.servers[at].pause();
        wait_for("another primary", LONG, || servers.elected_port().is_some_and(|port| port != old));
        std::thread::sleep(Duration::from_millis(random.u64(0..500)));
        servers.servers[at].resume();
        wait_for("the old primary to follow", LONG, || servers.servers[at].follows());
    }
}

/// What a history has shown.
struct Seen {
    wrong: Vec<String>,
    acknowledged: usize,
    refused: usize,
    unheard: usize,
    reads: usize,
    errors: BTreeMap<String, u64>,
}

fn play(engine: Engine, seed: u64) -> Seen {
    let mut stage = Stage::set(engine);
    let accounts = (0..WRITERS * KEYS_OF_A_WRITER).map(|_| Mutex::default()).collect();
    let ports = Mutex::new(stage.sidecars.iter().map(Sidecar::port).collect());
    let world = World { accounts, ports, ..World::default() };
    let mut random = fastrand::Rng::with_seed(seed);
    // Each kind once, in another order each time.
    let mut faults: Vec<u8> = (0..FAULTS as u8).collect();
    random.shuffle(&mut faults);
    std::thread::scope(|scope| {
        let world = &world;
        let _ends = Ends(world);
        (0..WRITERS).for_each(|index| drop(scope.spawn(move || world.write(index, seed * 1000 + index as u64))));
        (0..READERS).for_each(|index| drop(scope.spawn(move || world.read(seed * 1000 + 500 + index as u64))));
        for fault in &faults {
            std::thread::sleep(Duration::from_millis(random.u64(200..900)));
            stage.befall(*fault, world, &mut random);
        }
        std::thread::sleep(Duration::from_millis(500));
    });
    println!("seed {seed}: {faults:?}");
    judge(&stage, &world)
}

fn judge(stage: &Stage, world: &World) -> Seen {
    // An append of which nobody heard may still come.
    std::thread::sleep(DOUBT_LASTS);
    let scene = &stage.scene;
    wait_for("nothing is left", LONG, || scene.depth() == 0 && scene.dirty() == 0);
    assert_eq!(scene.dead(), 0, "{}", stage.relays[0].log());
    let mut wrong = Vec::new();
    assert_in_order(&stage.postgres, &stage.database);
    let rows = rows(&stage.postgres, &stage.database);
    let mut client = stage.sidecars[0].client();
    for (at, account) in world.accounts.iter().enumerate() {
        let account = account.lock().unwrap();
        let row = rows.get(&at.to_string()).map(|name| name.parse::<usize>().expect("a number"));
        if !account.admits(account.acknowledged, account.writes.len(), row) {
            wrong.push(format!("{} ends as {row:?}, and {} was acknowledged", key(at), account.acknowledged));
        }
        let read = wait_for_read(&mut client, at);
        if read != row {
            wrong.push(format!("{} is read as {read:?}, and Postgres has {row:?}", key(at)));
        }
    }
    let reads = world.reads.lock().unwrap();
    for read in reads.iter() {
        if !world.accounts[read.key].lock().unwrap().admits(read.floor, read.ceiling, read.value) {
            wrong.push(format!("{read:?}"));
        }
    }
    let heard = |heard: Heard| {
        let of = |account: &Mutex<Account>| account.lock().unwrap().writes.iter().filter(|(_, own)| *own == heard).count();
        world.accounts.iter().map(of).sum()
    };
    Seen {
        wrong,
        acknowledged: heard(Heard::Acknowledged),
        refused: heard(Heard::Refused),
        unheard: heard(Heard::Nothing),
        reads: reads.len(),
        errors: world.errors.lock().unwrap().clone(),
    }
}

fn wait_for_read(client: &mut Client, at: usize) -> Option<usize> {
    let mut read = Value::Nil;
    wait_for("a read to be answered", LONG, || {
        read = client.call(&["GET", &key(at)]);
        !read.is_error()
    });
    number(&read)
}

/// `HISTORIES=20 SEED=100` plays more of them, or others.
fn from_environment(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(default)
}

#[test]
fn what_was_acknowledged_comes_to_the_database_once_and_in_order_whoever_dies() {
    let (first, count) = (from_environment("SEED", 1), from_environment("HISTORIES", 2));
    for seed in first..first + count {
        // With WAITAOF, and without.
        let engine = if seed % 2 == 1 { Engine::Valkey9 } else { Engine::Redis7 };
        let Seen { wrong, acknowledged, refused, unheard, reads, errors } = play(engine, seed);
        println!("seed {seed}: {acknowledged} acknowledged, {refused} refused, {unheard} unheard; {reads} reads; {errors:?}");
        assert!(wrong.is_empty(), "seed {seed}, {} wrong:\n{}", wrong.len(), wrong[..wrong.len().min(20)].join("\n"));
        assert!(acknowledged > 100 && reads > 500, "seed {seed}");
    }
}
