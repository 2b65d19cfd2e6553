//! What write-behind costs and saves: against writing through, and against an application that writes to its database itself, side by side.

use std::fmt::Write as _;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use larder::journal::scripts::Status;
use serde_json::{Value as Json, json};
use sqlx::Connection as _;

use super::together::{DELETE, WRITE, database};
use super::{LONG, Scene, sentinel, sql_rule};
use crate::read_through::sql_origin;
use crate::support::postgres::Postgres;
use crate::support::resp::{Client, Value};
use crate::support::sidecar::Sidecar;
use crate::support::wait_for;
use crate::write_through::block;

const CLIENTS: usize = 8;
const KEYS: usize = 500;
const ROUNDS: usize = 5;
const ROUND: Duration = Duration::from_secs(3);
/// How long the database is away, in seconds, unless `LARDER_BEHIND_OUTAGE` says otherwise.
const OUTAGE: u64 = 60;
/// How many writes a tight journal has room for.
const TIGHT: u64 = 4096;
/// How long the journal may take to come to the database after an outage, while clients go on writing.
const CATCH_UP: Duration = Duration::from_secs(300);
/// How long a client waits behind each reply in an outage.
const PAUSE: Duration = Duration::from_millis(5);
/// What has caught up lets no write wait for longer.
const LEVEL_MICROS: u64 = 1_000_000;
const DIRECT: &str = "INSERT INTO users (id, name, row_version) VALUES ($1, $2, 0) ON CONFLICT (id) DO UPDATE SET name = $2";

#[derive(Debug, Clone, Copy)]
enum Way {
    Direct,
    Through,
    Behind,
}

impl Way {
    const ALL: [Self; 3] = [Self::Direct, Self::Through, Self::Behind];

    fn name(self) -> &'static str {
        match self {
            Self::Direct => "the application writes to Postgres itself",
            Self::Through => "write-through",
            Self::Behind => "write-behind",
        }
    }
}

#[derive(Default)]
struct Figures {
    /// Of each write, in microseconds.
    took: Vec<u32>,
    /// Writing transactions at Postgres.
    transactions: u64,
    lasted: Duration,
}

impl Figures {
    fn quantile(&mut self, part: f64) -> f64 {
        self.took.sort_unstable();
        let at = ((self.took.len() - 1) as f64 * part) as usize;
        f64::from(self.took[at]) / 1000.0
    }
}

struct Bench {
    scene: Scene,
    postgres: Postgres,
    url: String,
    database: String,
    sidecar: Sidecar,
}

/// What came of writes.
#[derive(Debug, Clone, Copy)]
struct Counts {
    acknowledged: u64,
    refused: u64,
}

/// What came of writes while the database was away, and behind that, when they went on.
struct Outage {
    lasted: Duration,
    /// While it was away.
    away: Counts,
    /// How many writes waited at its end.
    waited: u64,
    /// How long it then took until the database had all that was older than its end.
    had_all: Duration,
    /// How long it took until no write waited for longer than [`LEVEL_MICROS`].
    level: Duration,
    /// Until then.
    behind: Counts,
}

impl std::fmt::Display for Outage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { lasted, away, waited, had_all, level, behind } = self;
        write!(
            f,
            "While Postgres was away for {} s, {} writes were acknowledged and {} refused. {waited} waited at its end; {:.1} s after it was back it had all of \
             them, and after {:.1} s no write waited for longer than a second. Until then {} more were acknowledged and {} refused.",
            lasted.as_secs(),
            away.acknowledged,
            away.refused,
            had_all.as_secs_f64(),
            level.as_secs_f64(),
            behind.acknowledged,
            behind.refused
        )
    }
}

/// Clients that write until it is dropped, and count what comes of it.
#[derive(Default)]
struct Load {
    over: AtomicBool,
    /// Whether a write was refused since the journal has no room.
    full: AtomicBool,
    acknowledged: AtomicU64,
    refused: AtomicU64,
}

impl Load {
    /// Writes to keys of this rule, with a pause behind each reply.
    fn write(&self, port: u16, rule: &str, seed: u64) {
        let mut random = fastrand::Rng::with_seed(seed);
        let mut client = Client::connect(port).expect("it accepts");
        while !self.over.load(Ordering::Relaxed) {
            match client.call(&["SET", &format!("{rule}:{}", random.usize(..KEYS)), "value"]) {
                Value::Error(text) => {
                    self.refused.fetch_add(1, Ordering::Relaxed);
                    self.full.fetch_or(text.contains("the most there may be"), Ordering::Relaxed);
                }
                _ => {
                    self.acknowledged.fetch_add(1, Ordering::Relaxed);
                }
            }
            std::thread::sleep(PAUSE);
        }
    }

    /// What there was since it was last asked.
    fn take(&self) -> Counts {
        let [acknowledged, refused] = [&self.acknowledged, &self.refused].map(|count| count.swap(0, Ordering::Relaxed));
        Counts { acknowledged, refused }
    }
}

/// The clients go when this does, also where the bench fails.
struct Ends<'a>(&'a Load);

impl Drop for Ends<'_> {
    fn drop(&mut self) {
        self.0.over.store(true, Ordering::Relaxed);
    }
}

/// A rule for `tight:{id}`, to the same table and in the same journal, which has less room for it.
fn tight(behind: &Json) -> Json {
    let mut rule = behind.clone();
    (rule["name"], rule["keys"]) = (json!("tight"), json!("tight:{id}"));
    rule["strategy"]["writeBehind"]["journal"]["maxDepth"] = json!(TIGHT);
    rule
}

/// A rule for `through:{id}`, to the same table.
fn through() -> Json {
    let write = "INSERT INTO users (id, name, row_version) VALUES ($id, $value, 0) ON CONFLICT (id) DO UPDATE SET name = $value";
    let mut rule = sql_rule("users", "db", write, DELETE);
    let behind = rule["strategy"]["writeBehind"].take();
    rule["strategy"] = json!({"writeThrough": {"read": behind["read"], "store": behind["store"]}});
    (rule["name"], rule["keys"]) = (json!("through"), json!("through:{id}"));
    rule
}

impl Bench {
    fn open() -> Self {
        let postgres = Postgres::start_durable();
        let (url, database) = database(&postgres);
        let mut behind = sql_rule("users", "db", &without_history(WRITE), DELETE);
        // It outlasts the outage.
        behind["strategy"]["writeBehind"]["journal"]["maxLag"] = json!("10m");
        let rules = [tight(&behind), behind, through()];
        let scene = Scene::new(sentinel(), &[sql_origin("db", &url)], &rules);
        let sidecar = Sidecar::start(&scene.snapshot);
        Self { scene, postgres, url, database, sidecar }
    }

    /// The number of the next writing transaction.
    fn transaction(&self) -> u64 {
        block(self.postgres.value(&self.database, "SELECT pg_current_xact_id()::text")).parse().expect("a number")
    }

    fn play(&self, way: Way, figures: &mut Figures) {
        let (before, began) = (self.transaction(), Instant::now());
        let took: Vec<Vec<u32>> = std::thread::scope(|scope| {
            let clients: Vec<_> =
                (0..CLIENTS).map(|client| scope.spawn(move || self.write(way, client as u64, began + ROUND))).collect();
            clients.into_iter().map(|client| client.join().expect("it writes")).collect()
        });
        figures.lasted += began.elapsed();
        figures.took.extend(took.into_iter().flatten());
        self.scene.wait_until_drained();
        figures.transactions += self.transaction() - before - 1;
    }

    fn write(&self, way: Way, seed: u64, until: Instant) -> Vec<u32> {
        let mut random = fastrand::Rng::with_seed(seed);
        let mut took = Vec::new();
        let mut note = |began: Instant| took.push(u32::try_from(began.elapsed().as_micros()).expect("seconds"));
        match way {
            Way::Direct => block(async {
                let mut connection = sqlx::PgConnection::connect(&self.url).await.expect("connects");
                while Instant::now() < until {
                    let (id, began) = (random.usize(..KEYS).to_string(), Instant::now());
                    sqlx::query(DIRECT).bind(&id).bind("value").execute(&mut connection).await.expect("it is written");
                    note(began);
                }
            }),
            Way::Through | Way::Behind => {
                let name = if matches!(way, Way::Through) { "through" } else { "users" };
                let mut client = self.sidecar.client();
                while Instant::now() < until {
                    let (key, began) = (format!("{name}:{}", random.usize(..KEYS)), Instant::now());
                    assert_eq!(client.call(&["SET", &key, "value"]), Value::Simple("OK".to_owned()));
                    note(began);
                }
            }
        }
        took
    }

    /// The database goes away for so long, and, where that `fills` the journal, until that has no room. Clients write to keys of this rule all the
    /// time, also while what waited comes to the database.
    fn outage(&mut self, rule: &str, lasts: Duration, fills: bool) -> Outage {
        let (load, port, postgres, scene) = (Load::default(), self.sidecar.port(), &mut self.postgres, &self.scene);
        let outage = std::thread::scope(|scope| {
            let load = &load;
            let _ends = Ends(load);
            (0..CLIENTS).for_each(|client| drop(scope.spawn(move || load.write(port, rule, client as u64))));
            let began = Instant::now();
            postgres.interrupt(|| {
                std::thread::sleep(lasts);
                wait_for("the journal to be full", CATCH_UP, || !fills || load.full.load(Ordering::Relaxed));
            });
            let (lasted, back) = (began.elapsed(), Instant::now());
            let (away, then) = (load.take(), scene.status());
            let has_all = |now: &[Status]| {
                let mut both = now.iter().zip(&then);
                both.all(|(now, then)| now.oldest.is_none_or(|oldest| oldest > then.last))
            };
            wait_for("the database to have what waited", CATCH_UP, || has_all(&scene.status()));
            let had_all = back.elapsed();
            let is_level = |status: &Status| status.oldest.is_none_or(|oldest| status.now < oldest.get() + LEVEL_MICROS);
            wait_for("no write to wait for long", CATCH_UP, || scene.status().iter().all(is_level));
            let (level, behind) = (back.elapsed(), load.take());
            Outage { lasted, away, waited: then.iter().map(|status| status.depth).sum(), had_all, level, behind }
        });
        scene.wait_until_drained();
        outage
    }
}

/// The statement alone, as an application has it.
fn without_history(write: &str) -> String {
    write.split_once(") INSERT").map_or_else(|| write.to_owned(), |(_, rest)| format!("INSERT{rest}"))
}

#[test]
#[ignore = "`make bench-write-behind` runs it"]
fn write_behind_beside_direct_writes() {
    let mut bench = Bench::open();
    let relays = [bench.scene.relay(), bench.scene.relay()];
    wait_for("both have their share", LONG, || bench.scene.holders() == [8, 8]);
    let mut all: [Figures; 3] = Default::default();
    for _ in 0..ROUNDS {
        Way::ALL.into_iter().zip(&mut all).for_each(|(way, figures)| bench.play(way, figures));
    }
    let mut text = format!(
        "# Write-behind beside direct writes\n\n`make bench-write-behind` writes this. {CLIENTS} clients without pause, {KEYS} keys, by turns {ROUNDS} times {} s each; Valkey with a \
         replica, `appendfsync always` on both, one sidecar, two relays, Postgres with `fsync` and `synchronous_commit` on, all on one machine of two processors: what counts is how the lines compare.\n\n\
         | | writes a second | p50 | p99 | transactions for 1,000 writes |\n|---|---|---|---|---|\n",
        ROUND.as_secs()
    );
    for (way, figures) in Way::ALL.into_iter().zip(&mut all) {
        let writes = figures.took.len() as f64;
        let (rate, each) = (writes / figures.lasted.as_secs_f64(), figures.transactions as f64 * 1000.0 / writes);
        let (p50, p99) = (figures.quantile(0.5), figures.quantile(0.99));
        let _ = writeln!(text, "| {} | {rate:.0} | {p50:.1} ms | {p99:.1} ms | {each:.0} |", way.name());
    }
    let lasts =
        Duration::from_secs(std::env::var("LARDER_BEHIND_OUTAGE").ok().and_then(|text| text.parse().ok()).unwrap_or(OUTAGE));
    let (roomy, tight) = (bench.outage("users", lasts, false), bench.outage("tight", lasts, true));
    assert!(tight.waited <= TIGHT, "{tight}");
    let _ = write!(
        text,
        "\nIn outages {CLIENTS} clients write all the time, each {} ms behind its last reply, also while the journal comes to the database.\n\n\
         {roomy}\n\nThe same with room for {TIGHT} writes: {tight}\n",
        PAUSE.as_millis()
    );
    println!("{text}");
    if let Ok(file) = std::env::var("LARDER_BEHIND_REPORT") {
        std::fs::write(&file, &text).unwrap_or_else(|error| panic!("{file}: {error}"));
    }
    drop(relays);
}
