//! Histories of clients of two sidecars that write behind, each key by one client and with rising numbers, while relays, sidecars, servers
//! and Postgres die or stand still. What must hold (I11, I12):
//!
//! - A read gives nothing older than what was acknowledged before it began, and nothing that was refused.
//! - Postgres ends with the last acknowledged write of each key, or with one behind it of which nobody heard.
//! - No write is made there twice, and none after a later one of its key.
//!
//! So it is, too, where a journal is over its bound all the time, and a rule's writes go past it.

mod clients;
mod points;

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use clients::{Account, Ends, Heard, KEYS_OF_A_WRITER, World, key, number};

use super::together::{TABLES, WRITE, disorder, rows};
use super::{LONG, Relay, Scene, sql_rule};
use crate::read_through::{Servers, sql_origin};
use crate::support::histories::{from_environment, play_all, play_enough};
use crate::support::postgres::Postgres;
use crate::support::resp::{Client, Value};
use crate::support::saboteur::Change;
use crate::support::server::{Engine, RedisCluster, SentinelCluster};
use crate::support::sidecar::Sidecar;
use crate::support::wait_for;
use crate::write_behind::{DURABLE, durable, write_to_disk};
use crate::write_through::block;

const WRITERS: usize = 4;
const READERS: usize = 3;
/// The kinds of faults that [`Stage::befall`] knows.
const FAULTS: u8 = 9;
/// Until then a write of which nobody heard is made or never will be: an append counts for five seconds.
const DOUBT_LASTS: Duration = Duration::from_secs(8);
/// The rules, of which the first may go past a full journal.
const RULES: [&str; 2] = ["users", "others"];
/// Tells writes that relays carried from those that sidecars told by themselves: by relays' account, which moves in the same transaction.
const CARRIED: [&str; 5] = [
    "ALTER TABLE history ADD COLUMN told_in bigint NOT NULL DEFAULT txid_current()",
    "CREATE TABLE carried (by_one bigint PRIMARY KEY)",
    "CREATE TABLE larder_journal (part varchar(600) PRIMARY KEY, fence bigint NOT NULL, position bigint NOT NULL)",
    "CREATE FUNCTION carry() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN \
     INSERT INTO carried VALUES (txid_current()) ON CONFLICT DO NOTHING; RETURN NEW; END $$",
    "CREATE TRIGGER carry BEFORE INSERT OR UPDATE ON larder_journal FOR EACH ROW EXECUTE FUNCTION carry()",
];
const DELETE: &str = "WITH told AS (INSERT INTO history (id, version) VALUES ($id, $version)) DELETE FROM users WHERE id = $id";

struct Stage {
    scene: Scene,
    postgres: Postgres,
    database: String,
    sidecars: Vec<Sidecar>,
    relays: Vec<Relay>,
    spills: bool,
}

/// How a history is played, beside its servers.
struct Setting<'a> {
    /// What else the database is told at its beginning.
    tables: &'a [&'a str],
    /// The most writes of a transaction.
    batch: u32,
    /// Where a trap stands before the servers: which they are.
    engine: Engine,
    /// Whether a journal is full so soon that writes of the first rule go past it, and those of the other are refused.
    spills: bool,
}

impl Setting<'static> {
    const USUAL: Self = Self { tables: &[], batch: 100, engine: Engine::Valkey9, spills: false };
}

impl Stage {
    /// Sidecars and relays find the database at the port `door`.
    fn set(servers: Servers, postgres: Postgres, door: u16, setting: &Setting<'_>) -> Self {
        let spilling = if setting.spills { &CARRIED[..] } else { &[] };
        let url = block(postgres.database(&[&TABLES[..], spilling, setting.tables].concat()));
        let database = url.rsplit('/').next().expect("a name").to_owned();
        let url = url.replace(&format!(":{}/", postgres.port()), &format!(":{door}/"));
        let rules = RULES.map(|name| {
            let mut rule = sql_rule("users", "db", WRITE, DELETE);
            (rule["name"], rule["keys"]) = (name.into(), format!("{name}:{{id}}").into());
            let journal = &mut rule["strategy"]["writeBehind"]["journal"];
            journal["batch"] = setting.batch.into();
            if setting.spills {
                journal["maxLag"] = "20ms".into();
            }
            if setting.spills && name == RULES[0] {
                journal["overflow"] = "writeThrough".into();
            }
            rule
        });
        let scene = Scene::new(servers, &[sql_origin("db", &url)], &rules);
        let sidecars = (0..2).map(|_| Sidecar::start(&scene.snapshot)).collect();
        let relays = (0..2).map(|_| scene.relay()).collect();
        Self { scene, postgres, database, sidecars, relays, spills: setting.spills }
    }

    /// How many writes sidecars told the database by themselves.
    fn past_the_journal(&self) -> usize {
        let query = "SELECT count(*)::text FROM history WHERE told_in NOT IN (SELECT by_one FROM carried)";
        block(self.postgres.value(&self.database, query)).parse().expect("a number")
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
            2 => write_to_disk(self.scene.servers.fail_over(random)),
            3 => self.scene.servers.stand_still(Duration::from_millis(random.u64(0..500)), random),
            4 => {
                self.sidecars[victim] = Sidecar::start(&self.scene.snapshot);
                world.ports.lock().unwrap()[victim] = self.sidecars[victim].port();
            }
            5 => self.postgres.restart(),
            6 => {
                self.sidecars[victim].signal("STOP");
                std::thread::sleep(Duration::from_millis(random.u64(1_000..4_000)));
                self.sidecars[victim].signal("CONT");
            }
            _ => {
                let lasts = Duration::from_millis(random.u64(500..2_500));
                write_to_disk(self.scene.servers.lose_a_replica(fault == 7, lasts, random));
            }
        }
    }
}

/// How a history goes.
struct Plan {
    seed: u64,
    /// What befalls it, one after the other.
    faults: Vec<u8>,
    /// How long it goes on behind the last fault.
    rest: Duration,
}

impl Plan {
    /// Each kind of fault once, in another order each time.
    fn full(seed: u64) -> Self {
        let mut faults: Vec<u8> = (0..FAULTS).collect();
        fastrand::Rng::with_seed(seed).shuffle(&mut faults);
        Self { seed, faults, rest: Duration::from_millis(500) }
    }
}

/// What histories have shown.
#[derive(Default)]
struct Seen {
    histories: usize,
    wrong: Vec<String>,
    acknowledged: usize,
    refused: usize,
    unheard: usize,
    reads: usize,
    /// Writes that went past a full journal.
    past: usize,
    errors: BTreeMap<String, u64>,
}

impl Seen {
    fn add(&mut self, other: Self) {
        self.histories += other.histories;
        self.wrong.extend(other.wrong);
        self.acknowledged += other.acknowledged;
        self.refused += other.refused;
        self.unheard += other.unheard;
        self.reads += other.reads;
        self.past += other.past;
        other.errors.into_iter().for_each(|(text, count)| *self.errors.entry(text).or_default() += count);
    }

    #[track_caller]
    fn assert_right(&self) {
        assert!(self.wrong.is_empty(), "{} wrong:\n{}", self.wrong.len(), self.wrong[..self.wrong.len().min(20)].join("\n"));
    }

    /// What holds is not held of nothing, on a busy machine either.
    #[track_caller]
    fn assert_busy(&self) {
        let Self { histories, acknowledged, reads, .. } = self;
        assert!(*acknowledged > 50 * histories && *reads > 200 * histories, "{acknowledged} acknowledged, {reads} reads");
    }
}

fn play(servers: Servers, setting: &Setting<'_>, plan: &Plan) -> Seen {
    let postgres = Postgres::start();
    let port = postgres.port();
    let mut stage = Stage::set(servers, postgres, port, setting);
    let world = World::new(stage.sidecars.iter().map(Sidecar::port).collect(), WRITERS * KEYS_OF_A_WRITER);
    let (seed, servers) = (plan.seed * 1000, stage.scene.servers.ports());
    let mut random = fastrand::Rng::with_seed(seed);
    std::thread::scope(|scope| {
        let (world, servers) = (&world, &servers);
        let _ends = Ends(world);
        (0..WRITERS).for_each(|index| drop(scope.spawn(move || world.write(index, seed + index as u64))));
        (0..READERS).for_each(|index| drop(scope.spawn(move || world.read(seed + 500 + index as u64))));
        scope.spawn(move || world.evict(servers, seed + 900));
        for fault in &plan.faults {
            std::thread::sleep(Duration::from_millis(random.u64(200..900)));
            stage.befall(*fault, world, &mut random);
        }
        std::thread::sleep(plan.rest);
    });
    judge(&stage, &world, plan)
}

fn judge(stage: &Stage, world: &World, plan: &Plan) -> Seen {
    let heard = |heard: Heard| -> usize {
        let of = |account: &Mutex<Account>| account.lock().unwrap().writes.iter().filter(|(_, own)| *own == heard).count();
        world.accounts.iter().map(of).sum()
    };
    if heard(Heard::Nothing) > 0 {
        // An append of which nobody heard may still come.
        std::thread::sleep(DOUBT_LASTS);
    }
    let scene = &stage.scene;
    wait_for("nothing is left", LONG, || scene.depth() == 0 && scene.dirty() == 0);
    assert_eq!(scene.dead(), 0, "{}", stage.relays[0].log());
    let mut wrong = disorder(&stage.postgres, &stage.database);
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
    let seen = Seen {
        histories: 1,
        wrong: wrong.into_iter().map(|wrong| format!("seed {}: {wrong}", plan.seed)).collect(),
        acknowledged: heard(Heard::Acknowledged),
        refused: heard(Heard::Refused),
        unheard: heard(Heard::Nothing),
        reads: reads.len(),
        past: if stage.spills { stage.past_the_journal() } else { 0 },
        errors: world.errors.lock().unwrap().clone(),
    };
    let Seen { acknowledged, refused, unheard, reads, past, errors, .. } = &seen;
    println!("seed {}: {:?}", plan.seed, plan.faults);
    println!(
        "{acknowledged} acknowledged, {past} past the journal, {refused} refused, {unheard} unheard; {reads} reads; {errors:?}"
    );
    seen
}

fn wait_for_read(client: &mut Client, at: usize) -> Option<usize> {
    let mut read = Value::Nil;
    wait_for("a read to be answered", LONG, || {
        read = client.call(&["GET", &key(at)]);
        !read.is_error()
    });
    number(&read)
}

/// A Sentinel tier whose servers know WAITAOF, one whose servers do not, and a Cluster, by turns.
fn servers(seed: u64) -> Servers {
    match seed % 3 {
        0 => Servers::Cluster(RedisCluster::start_with(Engine::Valkey9, 3, 1, &DURABLE)),
        1 => Servers::Sentinel(durable(Engine::Valkey9, 2)),
        _ => Servers::Sentinel(durable(Engine::Redis7, 2)),
    }
}

fn play_fully(seed: u64) -> Seen {
    play(servers(seed), &Setting::USUAL, &Plan::full(seed))
}

/// `HISTORIES=20 SEED=100` plays more of them, or others.
#[test]
fn what_was_acknowledged_comes_to_the_database_once_and_in_order_whoever_dies() {
    let (first, count) = (from_environment("SEED", 1), from_environment("HISTORIES", 10));
    let mut sum = Seen::default();
    play_all(first..first + count, play_fully).into_iter().for_each(|seen| sum.add(seen));
    sum.assert_right();
    sum.assert_busy();
}

/// Where a rule's writes go past a journal over its bound, and another's are refused.
#[test]
fn so_does_what_sidecars_tell_it_by_themselves() {
    let play_spilling = |seed: u64| play(servers(seed), &Setting { spills: true, ..Setting::USUAL }, &Plan::full(seed));
    let mut sum = Seen::default();
    play_all(500..503, play_spilling).into_iter().for_each(|seen| sum.add(seen));
    sum.assert_right();
    assert!(sum.past > 10 * sum.histories && sum.refused > 10 * sum.histories, "{} past, {} refused", sum.past, sum.refused);
}

#[test]
#[ignore = "`make soak` runs it"]
fn soak() {
    let (seeds, began) = (from_environment("LARDER_SOAK_SEEDS", 200), Instant::now());
    let mut sum = Seen::default();
    let (played, unended) = play_enough(1000..1000 + seeds, play_fully);
    played.into_iter().for_each(|seen| sum.add(seen));
    if let Ok(file) = std::env::var("LARDER_SOAK_BEHIND_REPORT") {
        std::fs::write(&file, report(&sum, unended, began.elapsed())).unwrap_or_else(|error| panic!("{file}: {error}"));
    }
    sum.assert_right();
    assert_eq!(sum.histories as u64, seeds, "{unended} histories came to no end");
}

fn report(sum: &Seen, unended: u64, took: Duration) -> String {
    let mut text = format!(
        "# Soak: write-behind under faults\n\n`make soak` writes this. {} histories against real servers, sidecars, relays and Postgres (two thirds \
         of them under Sentinel, one in Cluster), {} s.\nWhat happens in each: `tests/integration/relay/history`.\n\n| | |\n|---|---|\n",
        sum.histories,
        took.as_secs()
    );
    for (what, count) in [
        ("histories beside these that came to no end, since servers did not", unended as usize),
        ("writes that were acknowledged", sum.acknowledged),
        ("writes that were refused: none of them came to the database", sum.refused),
        ("writes of which nobody heard", sum.unheard),
        ("reads", sum.reads),
        ("relays, sidecars, primaries, replicas and databases that were killed, of each", sum.histories),
        ("relays and primaries that stood still until another had taken their place, of each", sum.histories),
        ("sidecars and replicas that stood still for a while, of each", sum.histories),
        (
            "**wrong: values older than an acknowledged write, acknowledged writes that did not come to the database, came twice, or behind a \
             later one**",
            sum.wrong.len(),
        ),
    ] {
        let _ = writeln!(text, "| {what} | {count} |");
    }
    sum.wrong.iter().for_each(|wrong| {
        let _ = write!(text, "\n- {wrong}\n");
    });
    text
}

/// A key whose last write is forgotten to wait is read as the database has it, once the write before it is made there.
#[test]
fn it_is_noticed_where_a_later_write_is_taken_for_made_as_well() {
    const CHANGES: [Change; 1] =
        [Change { from: "if held and tonumber(string.match(held, '^%d+')) <= version then", to: "if held then" }];
    // A write waits in its transaction until the gate lets its number in.
    let gate = [
        "CREATE TABLE gate (upto bigint NOT NULL)",
        "INSERT INTO gate VALUES (0)",
        "CREATE FUNCTION wait() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN \
         WHILE (SELECT upto FROM gate) < NEW.name::bigint LOOP PERFORM pg_sleep(0.02); END LOOP; RETURN NEW; END $$",
        "CREATE TRIGGER wait BEFORE INSERT OR UPDATE ON users FOR EACH ROW EXECUTE FUNCTION wait()",
    ];
    let servers = SentinelCluster::start_sabotaged(Engine::Valkey9, 1, &CHANGES);
    servers.servers.iter().for_each(write_to_disk);
    let (postgres, servers) = (Postgres::start(), Servers::Sentinel(servers));
    let port = postgres.port();
    let stage = Stage::set(servers, postgres, port, &Setting { tables: &gate, batch: 1, ..Setting::USUAL });
    let (world, mut client) = (World::new(Vec::new(), 1), stage.sidecars[0].client());
    let open = |upto: u64| block(stage.postgres.run(&stage.database, &[&format!("UPDATE gate SET upto = {upto}")]));
    assert_eq!(world.write_once(&mut client, 0, false).expect("an answer"), Heard::Acknowledged);
    let waits = "SELECT count(*)::text FROM pg_stat_activity WHERE wait_event = 'PgSleep'";
    wait_for("the first to be told", LONG, || block(stage.postgres.value(&stage.database, waits)) == "1");
    assert_eq!(world.write_once(&mut client, 0, false).expect("an answer"), Heard::Acknowledged);
    open(1);
    wait_for("the first to be made", LONG, || stage.scene.depth() == 1);
    stage.scene.servers.holder_of(&key(0)).call(&["DEL", &key(0)]);
    world.read_once(&mut client, 0).expect("an answer");
    open(2);
    let seen = judge(&stage, &world, &Plan { seed: 0, faults: Vec::new(), rest: Duration::ZERO });
    assert!(
        seen.wrong.iter().any(|wrong| wrong.contains("floor: 2") && wrong.contains("Some(1)")),
        "not noticed: {:?}",
        seen.wrong
    );
}
