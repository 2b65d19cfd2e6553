//! Histories of concurrent clients of two sidecars, whose every value is unique and in the order in which Postgres made it, while
//! sidecars, servers and Postgres die. What must hold (I11, and what the cache may keep):
//!
//! - A read gives nothing older than what was acknowledged before it began, and nothing that Postgres never had.
//! - What is acknowledged is in Postgres; what is said not to have been made is not.
//! - When all is quiet the cache has what Postgres has, or nothing.

use std::collections::{BTreeMap, HashMap};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use serde_json::{Value as Json, json};

use super::{block, origin, rule, sidecar};
use crate::read_through::Servers;
use crate::support::postgres::Postgres;
use crate::support::resp::{Client, Value};
use crate::support::saboteur::Change;
use crate::support::server::{Engine, SentinelCluster};
use crate::support::sidecar::{Sidecar, connect_to_any};
use crate::support::wait_for;

const LIMIT: Duration = Duration::from_secs(60);
const WRITERS: usize = 5;
const READERS: usize = 5;
const FAULTS: usize = 8;
/// How often a history is played at most whose servers did not hold still.
const MOST_TAKES: usize = 5;

/// Each change is logged in the order in which it was made, for each key: under the lock of its row.
const TABLES: [&str; 5] = [
    "CREATE SEQUENCE versions",
    "CREATE TABLE kv (id text PRIMARY KEY, v text NOT NULL, row_version bigint NOT NULL DEFAULT nextval('versions'))",
    "CREATE TABLE log (seq bigserial PRIMARY KEY, id text NOT NULL, v text)",
    "CREATE FUNCTION note() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN \
     PERFORM pg_sleep(random() * 0.004); \
     IF TG_OP = 'DELETE' THEN INSERT INTO log (id, v) VALUES (OLD.id, NULL); \
     ELSE INSERT INTO log (id, v) VALUES (NEW.id, NEW.v); END IF; RETURN NULL; END $$",
    "CREATE TRIGGER note AFTER INSERT OR UPDATE OR DELETE ON kv FOR EACH ROW EXECUTE FUNCTION note()",
];

/// What a client heard of a write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Heard {
    Made,
    NotMade,
    Nothing,
}

#[derive(Debug)]
struct Write {
    key: usize,
    value: String,
    answered: Instant,
    heard: Heard,
}

#[derive(Debug)]
struct Read {
    key: usize,
    sent: Instant,
    value: Option<String>,
}

/// How a history goes.
#[derive(Clone, Copy)]
struct Plan {
    seed: u64,
    versioned: bool,
    /// Whether the primary is killed, and its replica takes over.
    failover: bool,
    faults: usize,
    /// How many keys there are: the fewer, the more writes overlap.
    keys: usize,
}

#[derive(Default)]
struct World {
    keys: usize,
    ports: Mutex<Vec<u16>>,
    over: AtomicBool,
    next: AtomicU64,
    writes: Mutex<Vec<Write>>,
    reads: Mutex<Vec<Read>>,
    errors: Mutex<BTreeMap<String, u64>>,
}

fn key(index: usize) -> String {
    format!("kv:{index}")
}

impl World {
    fn is_over(&self) -> bool {
        self.over.load(Ordering::SeqCst)
    }

    fn connect(&self, random: &mut fastrand::Rng) -> Client {
        connect_to_any(&self.ports, random, LIMIT)
    }

    fn note_error(&self, text: &str) {
        let word = text.split([':', '`']).next().unwrap_or_default().to_owned();
        *self.errors.lock().unwrap().entry(word).or_default() += 1;
    }

    fn write(&self, seed: u64) {
        let mut random = fastrand::Rng::with_seed(seed);
        let mut client = self.connect(&mut random);
        while !self.is_over() {
            let at = random.usize(..self.keys);
            let (name, value) = (key(at), format!("v{}", self.next.fetch_add(1, Ordering::SeqCst)));
            let deletes = random.u8(0..8) == 0;
            let reply = if deletes { client.try_call(&["DEL", &name]) } else { client.try_call(&["SET", &name, &value]) };
            let answered = Instant::now();
            let heard = match &reply {
                Ok(Value::Error(text)) => {
                    self.note_error(text);
                    if text.contains("nothing was written") { Heard::NotMade } else { Heard::Nothing }
                }
                Ok(_) => Heard::Made,
                Err(_) => Heard::Nothing,
            };
            if reply.is_err() {
                client = self.connect(&mut random);
            }
            if !deletes {
                self.writes.lock().unwrap().push(Write { key: at, value, answered, heard });
            }
            std::thread::sleep(Duration::from_millis(random.u64(0..6)));
        }
    }

    fn read(&self, seed: u64) {
        let mut random = fastrand::Rng::with_seed(seed);
        let mut client = self.connect(&mut random);
        while !self.is_over() {
            let at = random.usize(..self.keys);
            let sent = Instant::now();
            match client.try_call(&["GET", &key(at)]) {
                Ok(Value::Error(text)) => self.note_error(&text),
                Ok(Value::Nil) => self.reads.lock().unwrap().push(Read { key: at, sent, value: None }),
                Ok(value) => self.reads.lock().unwrap().push(Read { key: at, sent, value: Some(value.text()) }),
                Err(_) => client = self.connect(&mut random),
            }
            std::thread::sleep(Duration::from_micros(random.u64(0..3000)));
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
    servers: Servers,
    postgres: Postgres,
    sidecars: Vec<Sidecar>,
    origins: Vec<Json>,
    rules: Vec<Json>,
}

impl Stage {
    fn set(servers: Servers, versioned: bool) -> Self {
        let postgres = Postgres::start();
        let url = block(postgres.database(&TABLES));
        let write = "INSERT INTO kv (id, v) VALUES ($id, $value) \
                     ON CONFLICT (id) DO UPDATE SET v = excluded.v, row_version = nextval('versions')";
        let delete = "DELETE FROM kv WHERE id = $id";
        let store = if versioned {
            json!({"write": format!("{write} RETURNING row_version"), "delete": delete, "version": "row_version"})
        } else {
            json!({"write": write, "delete": delete})
        };
        // What is read is a little old when it comes.
        let rules = vec![rule("kv", "db", "SELECT v FROM kv, pg_sleep(0.003) WHERE id = $id", &store)];
        let origins = vec![origin("db", &url, "2s")];
        let sidecars = (0..2).map(|_| sidecar(&servers, &origins, &rules)).collect();
        Self { servers, postgres, sidecars, origins, rules }
    }

    fn database(&self) -> String {
        self.origins[0]["kind"]["sql"]["url"]["value"].as_str().and_then(|url| url.rsplit('/').next()).expect("a name").to_owned()
    }

    fn befall(&mut self, plan: Plan, world: &World, random: &mut fastrand::Rng) {
        for index in 0..plan.faults {
            std::thread::sleep(Duration::from_millis(random.u64(100..300)));
            let victim = random.usize(..self.sidecars.len());
            match random.u8(0..8) {
                _ if plan.failover && index == plan.faults / 2 => self.fail_over(),
                0 | 1 => {
                    self.sidecars[victim] = sidecar(&self.servers, &self.origins, &self.rules);
                    world.ports.lock().unwrap()[victim] = self.sidecars[victim].port();
                }
                2 | 3 => {
                    self.sidecars[victim].signal("STOP");
                    std::thread::sleep(Duration::from_millis(random.u64(20..1500)));
                    self.sidecars[victim].signal("CONT");
                }
                4 if index > 0 => self.postgres.restart(),
                5 => {
                    self.servers.holder_of(&key(0)).call(&["CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes"]);
                }
                _ => {
                    let name = key(random.usize(..plan.keys));
                    self.servers.holder_of(&name).call(&["DEL", &name]);
                }
            }
        }
    }

    fn fail_over(&mut self) {
        let Servers::Sentinel(cluster) = &mut self.servers else { panic!("not under Sentinel") };
        cluster.fail_over(LIMIT);
    }

    /// Each change of each key, in order. `None`: a deletion.
    fn log(&self, keys: usize) -> Vec<Vec<Option<String>>> {
        let query = "SELECT coalesce(json_agg(json_build_array(id, v) ORDER BY seq)::text, '[]') FROM log";
        let all: Vec<(String, Option<String>)> = serde_json::from_str(&self.value(query)).expect("rows");
        (0..keys).map(|at| all.iter().filter(|(id, _)| *id == at.to_string()).map(|(_, v)| v.clone()).collect()).collect()
    }

    fn value(&self, query: &str) -> String {
        block(self.postgres.value(&self.database(), query))
    }

    fn current(&self, at: usize) -> Option<String> {
        let value = self.value(&format!("SELECT coalesce((SELECT v FROM kv WHERE id = '{at}'), '')"));
        Some(value).filter(|value| !value.is_empty())
    }

    fn cached(&self, at: usize) -> Option<String> {
        let value = self.servers.holder_of(&key(at)).call(&["GET", &key(at)]);
        if value == Value::Nil { None } else { Some(value.text()) }
    }
}

/// What a history has shown.
struct Seen {
    wrong: Vec<String>,
    made: usize,
    not_made: usize,
    unheard: usize,
    reads: usize,
    kept: u64,
    errors: BTreeMap<String, u64>,
}

/// As [`play`], before servers of which none is replaced but that which the plan kills. Where sentinels on a busy machine took another for dead
/// that was not, and promoted what was behind it, the promise ends (`docs/write-through.md`): such a history shows nothing, and is played again.
fn play_under_sentinels(plan: Plan) -> Seen {
    for _ in 0..MOST_TAKES {
        let (seen, failovers) = play_counting(Servers::Sentinel(SentinelCluster::start(Engine::Valkey9, 1)), plan);
        if seen.wrong.is_empty() || failovers == u64::from(plan.failover) {
            return seen;
        }
        println!("seed {}: {failovers} failovers, so it is played again: {:?}", plan.seed, seen.wrong.first());
    }
    panic!("in each of {MOST_TAKES} histories sentinels replaced a server that was alive");
}

fn play(servers: Servers, plan: Plan) -> Seen {
    play_counting(servers, plan).0
}

/// What a history has shown, and how often another primary was elected in it.
fn play_counting(servers: Servers, plan: Plan) -> (Seen, u64) {
    let mut stage = Stage::set(servers, plan.versioned);
    let world =
        World { keys: plan.keys, ports: Mutex::new(stage.sidecars.iter().map(Sidecar::port).collect()), ..World::default() };
    std::thread::scope(|scope| {
        let world = &world;
        let _ends = Ends(world);
        (0..WRITERS).for_each(|index| drop(scope.spawn(move || world.write(plan.seed * 1000 + index as u64))));
        (0..READERS).for_each(|index| drop(scope.spawn(move || world.read(plan.seed * 1000 + 500 + index as u64))));
        stage.befall(plan, world, &mut fastrand::Rng::with_seed(plan.seed));
        std::thread::sleep(Duration::from_millis(500));
    });
    let seen = judge(&stage, &world);
    let Servers::Sentinel(cluster) = &stage.servers else { return (seen, 0) };
    (seen, cluster.failovers())
}

fn judge(stage: &Stage, world: &World) -> Seen {
    let mut wrong = Vec::new();
    // What was under way when its sidecar died comes to its end.
    let agrees = |at: usize| stage.cached(at).is_none_or(|cached| Some(cached) == stage.current(at));
    let quiet = Instant::now();
    while quiet.elapsed() < Duration::from_secs(4) && !(0..world.keys).all(agrees) {
        std::thread::sleep(Duration::from_millis(50));
    }
    for at in 0..world.keys {
        let (cached, current) = (stage.cached(at), stage.current(at));
        if cached.is_some() && cached != current {
            wrong.push(format!("when all is quiet, {} is {cached:?} in the cache and {current:?} in Postgres", key(at)));
        }
        let mut read = Value::Nil;
        wait_for("the origin to be asked again", LIMIT, || {
            read = stage.sidecars[0].client().call(&["GET", &key(at)]);
            !read.is_error()
        });
        if read != current.clone().map_or(Value::Nil, |value| Value::Bulk(value.into_bytes())) && current == stage.current(at) {
            wrong.push(format!("when all is quiet, GET {} gives {read:?}, and Postgres has {current:?}", key(at)));
        }
    }
    let log = stage.log(world.keys);
    let places: Vec<HashMap<&str, usize>> = log
        .iter()
        .map(|changes| changes.iter().enumerate().filter_map(|(place, value)| Some((value.as_deref()?, place))).collect())
        .collect();
    let (writes, reads) = (world.writes.lock().unwrap(), world.reads.lock().unwrap());
    for write in writes.iter() {
        let place = places[write.key].get(write.value.as_str());
        match (write.heard, place) {
            (Heard::Made, None) => wrong.push(format!("{write:?} is not in Postgres")),
            (Heard::NotMade, Some(_)) => wrong.push(format!("{write:?} is in Postgres")),
            _ => {}
        }
    }
    for read in reads.iter() {
        let before =
            writes.iter().filter(|write| write.heard == Heard::Made && write.key == read.key && write.answered < read.sent);
        let floor = before.filter_map(|write| places[read.key].get(write.value.as_str())).max().copied();
        match &read.value {
            Some(value) => match (places[read.key].get(value.as_str()), floor) {
                (None, _) => wrong.push(format!("{read:?} gave what Postgres never had")),
                (Some(place), Some(floor)) if *place < floor => wrong.push(format!(
                    "{read:?} gave change {place}, and change {floor}, {:?}, was acknowledged before",
                    log[read.key][floor]
                )),
                _ => {}
            },
            None => {
                let deleted = |floor: usize| log[read.key][floor..].iter().any(Option::is_none);
                if floor.is_some_and(|floor| !deleted(floor)) {
                    wrong.push(format!("{read:?} gave nothing, and nothing was deleted since change {floor:?}"));
                }
            }
        }
    }
    let heard = |heard| writes.iter().filter(|write| write.heard == heard).count();
    Seen {
        made: heard(Heard::Made),
        not_made: heard(Heard::NotMade),
        unheard: heard(Heard::Nothing),
        reads: reads.len(),
        kept: stage.sidecars.iter().map(|sidecar| crate::support::admin::rule_count(sidecar, "kv", "hits")).sum(),
        errors: world.errors.lock().unwrap().clone(),
        wrong,
    }
}

/// `HISTORIES=20 SEED=100` plays more of them, or others.
fn from_environment(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(default)
}

#[test]
fn no_history_shows_what_is_older_than_an_acknowledged_write() {
    let (first, count) = (from_environment("SEED", 1), from_environment("HISTORIES", 4));
    let (mut made, mut reads, mut hits) = (0, 0, 0);
    for seed in first..first + count {
        let plan = Plan { seed, versioned: seed % 2 == 0, failover: seed % 4 < 2, faults: FAULTS, keys: 8 };
        let seen = play_under_sentinels(plan);
        let Seen { wrong, made: own, not_made, unheard, reads: own_reads, kept, errors } = seen;
        println!("seed {seed}: {own} made, {not_made} not, {unheard} unheard; {own_reads} reads, {kept} hits; {errors:?}");
        assert!(wrong.is_empty(), "seed {seed}, {} wrong:\n{}", wrong.len(), wrong[..wrong.len().min(20)].join("\n"));
        (made, reads, hits) = (made + own, reads + own_reads, hits + kept);
    }
    assert!(made > 100 && reads > 1000 && hits > 0, "{made} writes, {reads} reads, {hits} hits");
}

/// Plays until something is found that is wrong.
fn is_noticed(changes: &'static [Change], versioned: bool) {
    let found = (1..=30).any(|seed| {
        let servers = Servers::sabotaged(changes);
        let plan = Plan { seed, versioned, failover: false, faults: 2, keys: 2 };
        let seen = play(servers, plan);
        println!("seed {seed}: {} made, {} reads, {} wrong: {:?}", seen.made, seen.reads, seen.wrong.len(), seen.wrong.first());
        !seen.wrong.is_empty()
    });
    assert!(found, "{changes:?} is not noticed");
}

#[test]
fn it_is_noticed_where_reads_may_store_while_a_write_is_under_way() {
    is_noticed(
        &[
            Change { from: "then return {'written'} end", to: "then end" },
            Change { from: "redis.call('UNLINK', KEYS[5])\nend\nlocal holder", to: "\nend\nlocal holder" },
        ],
        true,
    );
}

#[test]
fn it_is_noticed_where_a_write_takes_nothing_away() {
    is_noticed(
        &[Change { from: "redis.call('UNLINK', KEYS[1], KEYS[2], KEYS[3], KEYS[4])\nreturn {'begun'", to: "return {'begun'" }],
        true,
    );
}

#[test]
fn it_is_noticed_where_the_last_of_overlapping_writes_is_kept() {
    is_noticed(
        &[Change {
            from: "and living == 0 and best ~= 'x' and (not mixed or (version ~= '' and (not best or newer(version, best)))) then",
            to: "then",
        }],
        false,
    );
}
