//! What write-behind costs and saves: against writing through, and against an application that writes to its database itself, side by side.

use std::fmt::Write as _;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use serde_json::{Value as Json, json};
use sqlx::Connection as _;

use super::together::{DELETE, WRITE, database};
use super::{LONG, Scene, sentinel, sql_rule};
use crate::read_through::sql_origin;
use crate::support::postgres::Postgres;
use crate::support::resp::{Client, Value};
use crate::support::sidecar::Sidecar;
use crate::write_through::block;

const CLIENTS: usize = 8;
const KEYS: usize = 500;
const ROUNDS: usize = 5;
const ROUND: Duration = Duration::from_secs(3);
/// How long the database is away, in seconds, unless `LARDER_BEHIND_OUTAGE` says otherwise.
const OUTAGE: u64 = 60;
/// How many writes a tight journal has room for.
const TIGHT: u64 = 4096;
/// How long the journal may take to come to the database after an outage.
const CATCH_UP: Duration = Duration::from_secs(300);
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

/// What came of writes while the database was away.
struct Outage {
    lasted: Duration,
    acknowledged: u64,
    refused: u64,
    /// How many writes waited at its end.
    waited: u64,
    /// How long it then took until the database had all of them.
    caught_up: Duration,
}

impl std::fmt::Display for Outage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { lasted, acknowledged, refused, waited, caught_up } = self;
        write!(
            f,
            "While Postgres was away for {} s, {acknowledged} writes were acknowledged and {refused} refused. {waited} waited at its end; {:.1} s after it \
             was back it had all of them.",
            lasted.as_secs(),
            caught_up.as_secs_f64()
        )
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

    /// Writes to keys of this rule while the database is away: for so long, and, where it `fills` the journal, until that has no room.
    fn outage(&mut self, rule: &str, lasts: Duration, fills: bool) -> Outage {
        let [over, full] = [(); 2].map(|()| AtomicBool::new(false));
        let [acknowledged, refused] = [(); 2].map(|()| AtomicU64::new(0));
        let (port, postgres, scene) = (self.sidecar.port(), &mut self.postgres, &self.scene);
        let (mut waited, mut lasted, began) = (0, Duration::ZERO, Instant::now());
        let write = |seed: u64| {
            let mut random = fastrand::Rng::with_seed(seed);
            let mut client = Client::connect(port).expect("it accepts");
            while !over.load(Ordering::Relaxed) {
                match client.call(&["SET", &format!("{rule}:{}", random.usize(..KEYS)), "value"]) {
                    Value::Error(text) => {
                        refused.fetch_add(1, Ordering::Relaxed);
                        full.fetch_or(text.contains("the most there may be"), Ordering::Relaxed);
                    }
                    _ => {
                        acknowledged.fetch_add(1, Ordering::Relaxed);
                    }
                }
                std::thread::sleep(Duration::from_millis(5));
            }
        };
        postgres.interrupt(|| {
            std::thread::scope(|scope| {
                (0..CLIENTS).for_each(|client| {
                    drop(scope.spawn({
                        let write = &write;
                        move || write(client as u64)
                    }))
                });
                std::thread::sleep(lasts);
                crate::support::wait_for("the journal to be full", CATCH_UP, || !fills || full.load(Ordering::Relaxed));
                over.store(true, Ordering::Relaxed);
            });
            lasted = began.elapsed();
            waited = scene.depth();
        });
        let began = Instant::now();
        crate::support::wait_for("the database to have caught up", CATCH_UP, || scene.depth() == 0);
        let (acknowledged, refused) = (acknowledged.into_inner(), refused.into_inner());
        Outage { lasted, acknowledged, refused, waited, caught_up: began.elapsed() }
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
    crate::support::wait_for("both have their share", LONG, || bench.scene.holders() == [8, 8]);
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
    let _ = write!(text, "\n{roomy}\n\nThe same with room for {TIGHT} writes: {tight}\n");
    println!("{text}");
    if let Ok(file) = std::env::var("LARDER_BEHIND_REPORT") {
        std::fs::write(&file, &text).unwrap_or_else(|error| panic!("{file}: {error}"));
    }
    drop(relays);
}
