//! The origin: the database behind a small HTTP service, with a record of each query.
//!
//! SQLite is embedded in this process, and three kinds of clients must share it on equal terms: the application without a cache, the
//! one with plain cache-aside, and the sidecars, which are processes of their own. An embedded database cannot be watched from
//! outside either. So all of them ask this service, on loopback, by plain HTTP: the sidecars through Larder's `http` origin. A query
//! costs everybody the same, and the start and end of each are written down here, outside of what is measured. With `--database`,
//! the same service asks that Postgres.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use axum::Router;
use axum::extract::{Path, State};
use axum::http::StatusCode;
use axum::routing::get;
use tokio::net::TcpListener;
use tokio::sync::Semaphore;

use super::data::Code;
use super::database::Database;
use super::keyspace::{Entity, Family};

/// The most queries at once, waiting ones included; one more is refused, as a database with its connections used up does.
const MAX_QUERIES: usize = 200;
/// The most records that are kept; later queries are counted without.
const MAX_RECORDS: usize = 500_000;

/// One query, from its arrival at the origin to its answer: the wait for a free connection included.
#[derive(Debug, Clone)]
pub struct Record {
    /// Its path: identical queries have the same.
    pub query: Arc<str>,
    /// When it arrived.
    pub start: Instant,
    /// When it was answered, or given up.
    pub end: Instant,
}

/// Every query since the last [`Recorder::take`].
#[derive(Debug, Default)]
pub struct Recorder {
    records: Mutex<Vec<Record>>,
    started: AtomicU64,
}

impl Recorder {
    /// How many queries arrived since the last [`Recorder::take`].
    pub fn started(&self) -> u64 {
        self.started.load(Ordering::Relaxed)
    }

    /// The queries that were answered since the last call.
    pub fn take(&self) -> Vec<Record> {
        self.started.store(0, Ordering::Relaxed);
        std::mem::take(&mut *self.records.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn add(&self, record: Record) {
        let mut records = self.records.lock().unwrap_or_else(PoisonError::into_inner);
        if records.len() < MAX_RECORDS {
            records.push(record);
        }
    }
}

/// The greatest number of identical queries that were under way at once.
pub fn peak_identical(records: &[Record]) -> usize {
    let mut edges: HashMap<&str, Vec<(Instant, i32)>> = HashMap::new();
    for record in records {
        edges.entry(&record.query).or_default().extend([(record.start, 1), (record.end, -1)]);
    }
    let peak_of = |mut edges: Vec<(Instant, i32)>| {
        // Where one ends at the very moment another starts, they did not overlap.
        edges.sort_unstable_by_key(|(at, step)| (*at, *step));
        edges
            .iter()
            .scan(0, |open, (_, step)| {
                *open += step;
                Some(*open)
            })
            .max()
            .unwrap_or_default()
    };
    edges.into_values().map(peak_of).max().and_then(|peak| usize::try_from(peak).ok()).unwrap_or_default()
}

/// The longest query.
pub fn longest(records: &[Record]) -> Duration {
    records.iter().map(|record| record.end - record.start).max().unwrap_or_default()
}

/// Notes a query's end even where its client gives up, which drops the handler.
struct UnderWay<'a> {
    recorder: &'a Recorder,
    query: Arc<str>,
    start: Instant,
}

impl Drop for UnderWay<'_> {
    fn drop(&mut self) {
        self.recorder.add(Record { query: Arc::clone(&self.query), start: self.start, end: Instant::now() });
    }
}

struct Service {
    database: Database,
    recorder: Arc<Recorder>,
    places: Semaphore,
    statements: [(Family, String); 2],
}

/// Serves `database` on a free port of loopback until the runtime ends.
///
/// # Errors
/// Where no port can be had.
pub async fn serve(database: Database, recorder: Arc<Recorder>) -> std::io::Result<SocketAddr> {
    let listener = TcpListener::bind(("127.0.0.1", 0)).await?;
    let address = listener.local_addr()?;
    let statements = Family::ALL.map(|family| (family, family.sql()));
    let service = Arc::new(Service { database, recorder, places: Semaphore::new(MAX_QUERIES), statements });
    let router =
        Router::new().route(Family::Board.path(), get(board)).route(Family::Flight.path(), get(flight)).with_state(service);
    // The server ends with its runtime, and has no other way to end.
    tokio::spawn(async move { axum::serve(listener, router).await });
    Ok(address)
}

async fn board(State(service): State<Arc<Service>>, Path(origin): Path<String>) -> Result<String, (StatusCode, String)> {
    let origin = origin.parse().map_err(unknown)?;
    service.answer(Entity::Board { origin }).await
}

async fn flight(
    State(service): State<Arc<Service>>,
    Path((carrier, number, month)): Path<(String, u16, u8)>,
) -> Result<String, (StatusCode, String)> {
    let carrier: Code = carrier.parse().map_err(unknown)?;
    service.answer(Entity::Flight { carrier, number, month }).await
}

fn unknown(why: String) -> (StatusCode, String) {
    (StatusCode::NOT_FOUND, why)
}

impl Service {
    async fn answer(&self, entity: Entity) -> Result<String, (StatusCode, String)> {
        let Ok(_place) = self.places.try_acquire() else {
            return Err((StatusCode::SERVICE_UNAVAILABLE, format!("{MAX_QUERIES} queries are under way")));
        };
        self.recorder.started.fetch_add(1, Ordering::Relaxed);
        let _record = UnderWay { recorder: &self.recorder, query: entity.path().into(), start: Instant::now() };
        let sql = self.statements.iter().find(|(family, _)| *family == entity.family()).map_or("", |(_, sql)| sql);
        match self.database.fetch(sql, &entity.parameters()).await {
            Ok(Some(value)) => Ok(value),
            Ok(None) => Err(unknown("no such flights".to_owned())),
            Err(error) => Err((StatusCode::INTERNAL_SERVER_ERROR, error.to_string())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::demo::client::{Client, ClientError, Direct};
    use crate::demo::data::Dataset;
    use crate::demo::keyspace::Keyspace;
    use crate::demo::truth::Truth;

    #[test]
    fn queries_overlap_only_while_both_are_under_way() {
        let start = Instant::now();
        let record = |query: &str, from, to| Record {
            query: query.into(),
            start: start + Duration::from_millis(from),
            end: start + Duration::from_millis(to),
        };
        assert_eq!(peak_identical(&[]), 0);
        assert_eq!(peak_identical(&[record("a", 0, 10), record("a", 10, 20), record("b", 5, 15)]), 1);
        assert_eq!(peak_identical(&[record("a", 0, 10), record("a", 9, 20), record("a", 5, 15)]), 3);
    }

    #[tokio::test]
    async fn clients_get_answers_and_leave_records() {
        let dataset = Dataset::generate(1000);
        let keyspace = Keyspace::of(&dataset);
        let truth = Truth::new(&dataset, &keyspace);
        let dir = tempfile::tempdir().expect("a directory");
        let database = Database::open_sqlite(&dataset, None, &dir.path().join("flights.db")).await.expect("opens");
        let recorder = Arc::new(Recorder::default());
        let address = serve(database, Arc::clone(&recorder)).await.expect("serves");
        let expected = [0, 1, 5, 5].map(|index| (keyspace.entities[index], truth.current(index)));
        let asking = tokio::task::spawn_blocking(move || {
            let mut client = Direct::new(address);
            for (entity, value) in expected {
                assert_eq!(client.get(&entity, &entity.key()).expect("an answer"), Some(value));
            }
            let nowhere = Entity::Board { origin: "XXX".parse().expect("a code") };
            assert_eq!(client.get(&nowhere, "").expect("an answer"), None);
            Ok::<(), ClientError>(())
        });
        asking.await.expect("no panic").expect("answers");
        assert_eq!(recorder.started(), 5);
        let records = recorder.take();
        assert_eq!(records.len(), 5);
        assert_eq!(peak_identical(&records), 1);
        assert_eq!(recorder.started(), 0);
    }
}
