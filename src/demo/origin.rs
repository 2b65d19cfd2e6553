//! The origin: the database as a server, with a record of each query.
//!
//! SQLite is embedded in this process, and three kinds of clients must share it on equal terms: the application without a cache, the
//! one with plain cache-aside, and the sidecars, which are processes of their own. So the origin speaks Postgres' wire protocol on
//! loopback, and every client, Larder's `sql` origin included, goes through it with an ordinary Postgres driver. A query costs all of
//! them the same, and the start and end of each are written down here, outside of what is measured. With `--database`, the same
//! server passes the queries on to that Postgres, so that the records are the same too.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use tokio::io::{AsyncWriteExt, BufReader};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;

use super::database::Database;
use super::wire::{self, Answers, Frontend, Startup};

/// The most sessions at once; one more is refused, as Postgres does.
const MAX_SESSIONS: usize = 200;
/// The most statements that one session may prepare.
const MAX_STATEMENTS: usize = 256;
/// The most records that are kept; later queries are counted without.
const MAX_RECORDS: usize = 500_000;

/// One query, from its arrival at the origin to its answer: the wait for a free connection included.
#[derive(Debug, Clone)]
pub struct Record {
    /// Identical queries have the same: the parameters, which tell the statements apart too.
    pub query: Arc<str>,
    /// When it arrived.
    pub start: Instant,
    /// When it was answered.
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

/// Serves `database` on a free port of loopback until the runtime ends.
///
/// # Errors
/// Where no port can be had.
pub async fn serve(database: Database, recorder: Arc<Recorder>) -> std::io::Result<SocketAddr> {
    let listener = TcpListener::bind(("127.0.0.1", 0)).await?;
    let address = listener.local_addr()?;
    tokio::spawn(async move {
        let places = Arc::new(Semaphore::new(MAX_SESSIONS));
        loop {
            let Ok((stream, _)) = listener.accept().await else {
                // Out of file descriptors: they come back as sessions end.
                tokio::time::sleep(Duration::from_millis(50)).await;
                continue;
            };
            let place = Arc::clone(&places).try_acquire_owned().ok();
            let (database, recorder) = (database.clone(), Arc::clone(&recorder));
            tokio::spawn(async move {
                let session = Session { database, recorder, statements: HashMap::new(), portals: HashMap::new(), failed: false };
                // A client that breaks off or speaks nonsense loses its connection, nothing else.
                let _ = session.run(stream, place.is_some()).await;
                drop(place);
            });
        }
    });
    Ok(address)
}

struct Session {
    database: Database,
    recorder: Arc<Recorder>,
    statements: HashMap<String, Arc<str>>,
    portals: HashMap<String, (Arc<str>, Vec<String>)>,
    /// After an error, everything up to the next Sync is skipped.
    failed: bool,
}

impl Session {
    async fn run(mut self, stream: TcpStream, admitted: bool) -> std::io::Result<()> {
        stream.set_nodelay(true)?;
        let mut stream = BufReader::new(stream);
        while wire::read_startup(&mut stream).await? == Startup::Encryption {
            stream.write_all(b"N").await?;
        }
        let mut answers = Answers::default();
        if !admitted {
            answers.error("53300", "too many connections for the demo's origin");
            return stream.write_all(&answers.0).await;
        }
        answers.welcome();
        loop {
            stream.write_all(&answers.0).await?;
            answers.0.clear();
            match wire::read_message(&mut stream).await? {
                None | Some(Frontend::Terminate) => return Ok(()),
                Some(message) => self.answer(message, &mut answers).await,
            }
        }
    }

    async fn answer(&mut self, message: Frontend, answers: &mut Answers) {
        match message {
            Frontend::Sync => {
                self.failed = false;
                answers.ready();
            }
            Frontend::Query(sql) => {
                self.execute(&sql, &[], true, answers).await;
                self.failed = false;
                answers.ready();
            }
            _ if self.failed => {}
            Frontend::Parse { statement, sql } => self.parse(statement, sql, answers),
            Frontend::Bind { portal, statement, parameters } => self.bind(portal, &statement, parameters, answers),
            Frontend::DescribeStatement(name) => match self.statements.get(&name) {
                Some(sql) => {
                    answers.parameters(count_parameters(sql));
                    describe(sql, answers);
                }
                None => self.fail("26000", "no such statement", answers),
            },
            Frontend::DescribePortal(name) => match self.portals.get(&name) {
                Some((sql, _)) => describe(sql, answers),
                None => self.fail("34000", "no such portal", answers),
            },
            Frontend::Execute(name) => match self.portals.remove(&name) {
                Some((sql, parameters)) => self.execute(&sql, &parameters, false, answers).await,
                None => self.fail("34000", "no such portal", answers),
            },
            // Statements live as long as the session, whose number of them is bounded.
            Frontend::Close => answers.closed(),
            Frontend::Flush | Frontend::Terminate => {}
        }
    }

    fn fail(&mut self, code: &str, sentence: &str, answers: &mut Answers) {
        self.failed = true;
        answers.error(code, sentence);
    }

    fn parse(&mut self, name: String, sql: String, answers: &mut Answers) {
        if self.statements.len() >= MAX_STATEMENTS && !self.statements.contains_key(&name) {
            return self.fail("54000", "too many prepared statements", answers);
        }
        self.statements.insert(name, sql.into());
        answers.parsed();
    }

    fn bind(&mut self, portal: String, statement: &str, parameters: Vec<String>, answers: &mut Answers) {
        let Some(sql) = self.statements.get(statement) else {
            return self.fail("26000", "no such statement", answers);
        };
        // One portal at a time is all that drivers without cursors use.
        self.portals.clear();
        self.portals.insert(portal, (Arc::clone(sql), parameters));
        answers.bound();
    }

    async fn execute(&mut self, sql: &str, parameters: &[String], simple: bool, answers: &mut Answers) {
        if !returns_rows(sql) {
            // Session settings: the origin has none.
            answers.complete(sql.split_whitespace().next().unwrap_or_default());
            return;
        }
        self.recorder.started.fetch_add(1, Ordering::Relaxed);
        let start = Instant::now();
        let fetched = self.database.fetch(sql, parameters).await;
        let end = Instant::now();
        self.recorder.add(Record { query: parameters.join(" ").into(), start, end });
        match fetched {
            Ok(row) => {
                if simple {
                    answers.columns();
                }
                if let Some(value) = &row {
                    answers.row(value);
                }
                answers.complete(if row.is_some() { "SELECT 1" } else { "SELECT 0" });
            }
            Err(error) => self.fail("XX000", &error.to_string(), answers),
        }
    }
}

fn describe(sql: &str, answers: &mut Answers) {
    if returns_rows(sql) { answers.columns() } else { answers.no_columns() }
}

fn returns_rows(sql: &str) -> bool {
    sql.trim_start().get(..6).is_some_and(|verb| verb.eq_ignore_ascii_case("select"))
}

/// The highest `$n`.
fn count_parameters(sql: &str) -> u16 {
    let numbers = sql.split('$').skip(1).filter_map(|rest| {
        let end = rest.find(|c: char| !c.is_ascii_digit()).unwrap_or(rest.len());
        rest[..end].parse().ok()
    });
    numbers.max().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::demo::data::Dataset;
    use crate::demo::keyspace::{Family, Keyspace};
    use crate::demo::truth::Truth;
    use sqlx::{AssertSqlSafe, Connection, PgConnection};

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

    #[test]
    fn parameters_are_counted_by_their_numbers() {
        assert_eq!(count_parameters("SELECT $1 || $2 || $1"), 2);
        assert_eq!(count_parameters("SELECT 1"), 0);
    }

    #[tokio::test]
    async fn an_ordinary_driver_gets_answers_and_leaves_records() {
        let dataset = Dataset::generate(1000);
        let keyspace = Keyspace::of(&dataset);
        let truth = Truth::new(&dataset, &keyspace);
        let dir = tempfile::tempdir().expect("a directory");
        let database = Database::open_sqlite(&dataset, None, &dir.path().join("flights.db")).await.expect("opens");
        let recorder = Arc::new(Recorder::default());
        let address = serve(database, Arc::clone(&recorder)).await.expect("serves");
        let mut client = PgConnection::connect(&format!("postgres://demo@{address}/flights")).await.expect("connects");
        for index in [0, 1, 5, 5] {
            let entity = &keyspace.entities[index];
            let parameters = entity.parameters();
            let query = sqlx::query_scalar::<_, String>(AssertSqlSafe(entity.family().numbered_sql()));
            let query = parameters.iter().fold(query, |query, text| query.bind(text));
            assert_eq!(query.fetch_one(&mut client).await.expect("a row"), truth.current(index));
        }
        client.ping().await.expect("answers");
        let unknown = sqlx::query_scalar::<_, String>(AssertSqlSafe(Family::Board.numbered_sql())).bind("nowhere");
        assert_eq!(unknown.fetch_optional(&mut client).await.expect("no row"), None);
        let wrong = sqlx::query_scalar::<_, String>("SELECT nonsense").fetch_one(&mut client).await;
        assert!(wrong.is_err_and(|error| error.to_string().contains("nonsense")));
        assert_eq!(recorder.started(), 6);
        let records = recorder.take();
        assert_eq!(records.len(), 6);
        assert_eq!(peak_identical(&records), 1);
        assert_eq!(recorder.started(), 0);
    }
}
