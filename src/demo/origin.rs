//! The origin: the database on a thread of its own, with rows that change all the time, and how applications ask it.
//!
//! An application asks by the same code as a sidecar, [`crate::origin`]: the same statement, bound parameters and pool, in its own
//! process. So a query costs everybody the same, and leaves the same records.

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, mpsc};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use tokio::runtime::Handle;
use tokio::sync::oneshot;

use super::client::ClientError;
use super::data::Dataset;
use super::database::{Database, DatabaseError};
use super::keyspace::{self, Family};
use super::records::{ClientLog, Recorder};
use super::truth::Truth;
use super::{CACHED_DATABASE, Config, DemoError};
use crate::origin::{Loaded, Loader, Origins};
use crate::policy::snapshot::{self, OriginKind, Sensitive};
use crate::policy::{Load, Query, Span};

/// What rules call the origin.
pub const NAME: &str = "flights";
/// The most queries at once, in every phase: of all clients together, or of all sidecars together.
pub const CONNECTIONS: u32 = 16;
/// How often a row changes.
const UPDATE_INTERVAL: Duration = Duration::from_millis(250);
/// How long an application waits for an answer. Longer than the queue of the phase without a cache, where waiting is the point.
const PATIENCE: Span = Span::from_secs(300);

/// The database, what its values truly are, and the records of its queries.
pub struct Origin {
    /// What was asked.
    pub recorder: Arc<Recorder>,
    /// What its values truly are.
    pub truth: Arc<Truth>,
    /// How applications ask.
    pub asking: Asking,
    database: Database,
    finish: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Origin {
    /// Opens the database, with files in `work`, and begins to change rows.
    ///
    /// # Errors
    /// Where the database cannot be filled, or no thread can be had.
    pub fn start(
        config: &Config,
        dataset: Dataset,
        work: &Path,
        truth: Arc<Truth>,
        recorder: Arc<Recorder>,
        stop: Arc<AtomicBool>,
    ) -> Result<Self, DemoError> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let handle = runtime.handle().clone();
        let (finish, finished) = oneshot::channel();
        let (started, start) = mpsc::sync_channel(1);
        let (config, file) = (config.clone(), work.join("flights.db"));
        let updated = Arc::clone(&truth);
        let thread = thread::Builder::new().name("origin".to_owned()).spawn(move || {
            runtime.block_on(async move {
                let opened = open(&config, dataset, &file).await;
                let database = opened.as_ref().ok().cloned();
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
        let database = start.recv().map_err(|_| gone())??;
        let asking = Asking::new(&database, handle, recorder.clone())?;
        Ok(Self { recorder, truth, asking, database, finish: Some(finish), thread: Some(thread) })
    }

    /// The database.
    pub const fn database(&self) -> &Database {
        &self.database
    }

    /// What a nightly job would put into the cache.
    ///
    /// # Errors
    /// Where the database refuses.
    pub fn history(&self) -> Result<Vec<(String, String)>, DatabaseError> {
        self.asking.runtime.block_on(self.database.history())
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

/// How an application asks the database. Cloning shares the pool, as threads of one server do.
#[derive(Debug, Clone)]
pub struct Asking {
    origins: Origins,
    loaders: [(Family, Loader); 2],
    runtime: Handle,
    log: tracing::Dispatch,
}

impl Asking {
    /// `runtime` is one that runs for as long as there are clients.
    ///
    /// # Errors
    /// Where the URL is refused.
    pub fn new(database: &Database, runtime: Handle, recorder: Arc<Recorder>) -> Result<Self, DemoError> {
        let origins = Origins::new(&[snapshot::Origin {
            name: NAME.to_owned(),
            kind: OriginKind::Sql { url: Sensitive::Value(database.url().to_owned()) },
            max_connections: CONNECTIONS,
            max_total_connections: None,
            load_queue: None,
            connect_timeout: PATIENCE,
            timeout: PATIENCE,
        }])?;
        let loader = |family: Family| -> Result<_, DemoError> {
            let read = family.sql(database.schema());
            let load = Load { origin: NAME.to_owned(), query: Query::Sql { read, read_many: None }, reply: None };
            Ok((family, origins.loader(&family.pattern()?, &load)?))
        };
        let [board, flight] = Family::ALL.map(loader);
        let loaders = [board?, flight?];
        Ok(Self { origins, loaders, runtime, log: ClientLog::subscriber(recorder) })
    }

    /// Queries one key.
    ///
    /// # Errors
    /// Where the database gave no answer.
    pub fn query(&self, family: Family, key: &str) -> Result<Option<String>, ClientError> {
        let Some((_, loader)) = self.loaders.iter().find(|(of, _)| *of == family) else { return Ok(None) };
        let loaded = tracing::dispatcher::with_default(&self.log, || self.runtime.block_on(loader.load(key.as_bytes())));
        match loaded.map_err(|error| ClientError::Origin(error.to_string()))? {
            Loaded::Found { value, .. } => {
                String::from_utf8(value).map(Some).map_err(|_| ClientError::Origin("an answer that is no text".to_owned()))
            }
            Loaded::NotFound => Ok(None),
        }
    }

    /// How many queries were made so far, as the pool counts them.
    pub fn counted(&self) -> u64 {
        self.origins.stats().iter().map(|stats| stats.queries).sum()
    }
}

async fn open(config: &Config, dataset: Dataset, file: &Path) -> Result<Database, DemoError> {
    Ok(match &config.database {
        Some(url) => Database::open_postgres(&dataset, url).await?,
        None => {
            let cached = config.rows.is_none().then(|| config.cache.join(CACHED_DATABASE));
            Database::open_sqlite(&dataset, cached.as_deref(), file).await?
        }
    })
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::demo::keyspace::{Entity, Keyspace};
    use crate::demo::records::peak_identical;

    #[tokio::test]
    async fn applications_get_answers_and_leave_records() {
        let dataset = Dataset::generate(1000);
        let keyspace = Keyspace::of(&dataset);
        let keys: Vec<String> = keyspace.entities.iter().map(Entity::key).collect();
        let truth = Truth::new(&dataset, &keyspace);
        let dir = tempfile::tempdir().expect("a directory");
        let database = Database::open_sqlite(&dataset, None, &dir.path().join("flights.db")).await.expect("opens");
        let recorder = Arc::new(Recorder::new(&keys));
        let asking = Asking::new(&database, Handle::current(), recorder.clone()).expect("valid");
        let expected = [0, 1, 5, 5].map(|index| (keyspace.entities[index], truth.current(index)));
        let counted = asking.clone();
        tokio::task::spawn_blocking(move || {
            for (entity, value) in expected {
                assert_eq!(asking.query(entity.family(), &entity.key()).expect("an answer"), Some(value));
            }
            assert_eq!(asking.query(Family::Board, "board:XXX").expect("an answer"), None);
        })
        .await
        .expect("answers");
        assert_eq!((recorder.begun(), counted.counted()), (5, 5));
        let records = recorder.take();
        let asked: Vec<&str> = records.iter().map(|record| &*record.query).collect();
        assert_eq!(asked[..4], [0, 1, 5, 5].map(|index| keys[index].as_str()));
        assert!(records.iter().all(|record| record.outcome == "answered"));
        assert_eq!(peak_identical(&records), 1);
    }
}
