//! The database that really holds the flights: an SQLite file, or Postgres where `--database` names one.
//!
//! This module fills it, changes it, and reads all of it at once, as a nightly job would. The queries that the demo is about are not
//! made here: applications and sidecars make them, by its URL.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use sqlx::postgres::{PgConnectOptions, PgPool, PgPoolOptions};
use sqlx::sqlite::{SqliteConnectOptions, SqliteJournalMode, SqlitePool, SqlitePoolOptions, SqliteSynchronous};
use sqlx::{AssertSqlSafe, ConnectOptions as _, Executor};

use super::data::Dataset;
use super::truth::Update;

/// The Postgres schema that the demo drops, creates and uses; it touches nothing else.
pub const SCHEMA: &str = "larder_demo";
/// How long an update may wait for a free connection, on a machine that is busy with slow queries.
const ACQUIRE_TIMEOUT: Duration = Duration::from_secs(30);
/// One connection for updates, and one for the nightly job.
const OWN_CONNECTIONS: u32 = 2;
/// Large pages: each query reads the whole table, and a call of the system for every 4 KiB of it would only add to its cost.
const SQLITE_PAGE_BYTES: u32 = 32 << 10;
/// Rows per INSERT into SQLite.
const ROWS_PER_STATEMENT: usize = 500;

const TABLES: &str = "CREATE TABLE flights (id INTEGER PRIMARY KEY, origin TEXT NOT NULL, dest TEXT NOT NULL, carrier TEXT NOT NULL, \
    number INTEGER NOT NULL, month INTEGER NOT NULL, day INTEGER NOT NULL, time_hour TEXT NOT NULL, dep_delay INTEGER); \
    CREATE TABLE weather (origin TEXT NOT NULL, time_hour TEXT NOT NULL, wet INTEGER NOT NULL, PRIMARY KEY (origin, time_hour))";

/// Why the database could not be used.
#[derive(Debug, thiserror::Error)]
pub enum DatabaseError {
    /// It refused a statement or a connection.
    #[error("the demo's database: {0}")]
    Sql(#[from] sqlx::Error),
    /// A file of it could not be written.
    #[error("the demo's database at {}: {why}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What the system said.
        why: std::io::Error,
    },
}

/// The database, filled.
#[derive(Clone)]
pub struct Database {
    url: String,
    schema: String,
    pool: Pool,
}

/// The demo's own connections.
#[derive(Clone)]
enum Pool {
    Sqlite(SqlitePool),
    Postgres(PgPool),
}

impl Database {
    /// SQLite in `file`, filled with `dataset`. With a `cache`, the filled file is kept there for the next run, and this run works on
    /// a copy: updates never reach the cached one.
    ///
    /// # Errors
    /// Where a file cannot be written.
    pub async fn open_sqlite(dataset: &Dataset, cache: Option<&Path>, file: &Path) -> Result<Self, DatabaseError> {
        match cache {
            Some(cache) => {
                if !cache.is_file() {
                    // Under another name until it is whole: an interrupted run leaves no half of a database behind.
                    let partial = cache.with_extension("partial");
                    std::fs::remove_file(&partial).or_else(ignore_missing).map_err(|why| file_error(&partial, why))?;
                    fill_sqlite(dataset, &partial).await?;
                    std::fs::rename(&partial, cache).map_err(|why| file_error(cache, why))?;
                }
                std::fs::copy(cache, file).map_err(|why| file_error(file, why))?;
            }
            None => fill_sqlite(dataset, file).await?,
        }
        let options = sqlite_options(file).journal_mode(SqliteJournalMode::Wal);
        let pool = SqlitePoolOptions::new().max_connections(OWN_CONNECTIONS).acquire_timeout(ACQUIRE_TIMEOUT);
        let pool = pool.acquire_slow_threshold(ACQUIRE_TIMEOUT).connect_with(options).await?;
        Ok(Self { url: sqlite_url(file), schema: String::new(), pool: Pool::Sqlite(pool) })
    }

    /// The Postgres server at `url`, filled with `dataset` in the schema [`SCHEMA`].
    ///
    /// # Errors
    /// Where the server cannot be reached, or the user may not create a schema.
    pub async fn open_postgres(dataset: &Dataset, url: &str) -> Result<Self, DatabaseError> {
        let options: PgConnectOptions = url.parse()?;
        let options = options.options([("search_path", SCHEMA), ("client_min_messages", "warning")]).disable_statement_logging();
        let pool = PgPoolOptions::new().max_connections(OWN_CONNECTIONS).acquire_timeout(ACQUIRE_TIMEOUT);
        let pool = pool.acquire_slow_threshold(ACQUIRE_TIMEOUT).connect_with(options).await?;
        let mut connection = pool.acquire().await?;
        let fresh = format!("DROP SCHEMA IF EXISTS {SCHEMA} CASCADE; CREATE SCHEMA {SCHEMA}; {TABLES}");
        connection.execute(sqlx::raw_sql(AssertSqlSafe(fresh))).await?;
        for (table, rows) in [("flights", flights_as_csv(dataset)), ("weather", weather_as_csv(dataset))] {
            let mut copy = connection.copy_in_raw(&format!("COPY {table} FROM STDIN WITH (FORMAT csv)")).await?;
            copy.send(rows.into_bytes()).await?;
            copy.finish().await?;
        }
        connection.execute("ANALYZE flights").await?;
        connection.execute("ANALYZE weather").await?;
        drop(connection);
        Ok(Self { url: url.to_owned(), schema: format!("{SCHEMA}."), pool: Pool::Postgres(pool) })
    }

    /// Where applications and sidecars find it. May hold a password.
    pub fn url(&self) -> &str {
        &self.url
    }

    /// What stands before the names of tables in statements of theirs.
    pub fn schema(&self) -> &str {
        &self.schema
    }

    /// Every history key with its value, in one statement: what a nightly job would put into the cache.
    ///
    /// # Errors
    /// Where the database refuses.
    pub async fn history(&self) -> Result<Vec<(String, String)>, DatabaseError> {
        let sql = AssertSqlSafe(super::keyspace::history_sql());
        Ok(match &self.pool {
            Pool::Sqlite(pool) => sqlx::query_as(sql).fetch_all(pool).await?,
            Pool::Postgres(pool) => sqlx::query_as(sql).fetch_all(pool).await?,
        })
    }

    /// Changes one row.
    ///
    /// # Errors
    /// Where the database refuses.
    pub async fn apply(&self, update: Update) -> Result<(), DatabaseError> {
        const SQL: &str = "UPDATE flights SET dep_delay = $1 WHERE id = $2";
        let (delay, id) = (i32::from(update.delay), update.id.cast_signed());
        match &self.pool {
            Pool::Sqlite(pool) => sqlx::query(SQL).bind(delay).bind(id).execute(pool).await.map(|_| ())?,
            Pool::Postgres(pool) => sqlx::query(SQL).bind(delay).bind(id).execute(pool).await.map(|_| ())?,
        }
        Ok(())
    }

    /// Closes every connection.
    pub async fn close(&self) {
        match &self.pool {
            Pool::Sqlite(pool) => pool.close().await,
            Pool::Postgres(pool) => pool.close().await,
        }
    }
}

fn ignore_missing(error: std::io::Error) -> std::io::Result<()> {
    if error.kind() == std::io::ErrorKind::NotFound { Ok(()) } else { Err(error) }
}

fn file_error(path: &Path, why: std::io::Error) -> DatabaseError {
    DatabaseError::File { path: path.to_owned(), why }
}

/// As sqlx reads it: what would end the path or begin an escape is escaped.
fn sqlite_url(file: &Path) -> String {
    let path = file.to_string_lossy().replace('%', "%25").replace('?', "%3F");
    format!("sqlite://{path}")
}

fn sqlite_options(file: &Path) -> SqliteConnectOptions {
    SqliteConnectOptions::new()
        .filename(file)
        .create_if_missing(true)
        .page_size(SQLITE_PAGE_BYTES)
        .synchronous(SqliteSynchronous::Normal)
        .disable_statement_logging()
}

async fn fill_sqlite(dataset: &Dataset, file: &Path) -> Result<(), DatabaseError> {
    let pool = SqlitePoolOptions::new().max_connections(1).connect_with(sqlite_options(file)).await?;
    let mut transaction = pool.begin().await?;
    transaction.execute(sqlx::raw_sql(TABLES)).await?;
    for rows in dataset.flights.chunks(ROWS_PER_STATEMENT) {
        let mut insert = sqlx::QueryBuilder::new("INSERT INTO flights ");
        insert.push_values(rows, |mut row, flight| {
            row.push_bind(i64::from(flight.id)).push_bind(flight.origin.as_str()).push_bind(flight.dest.as_str());
            row.push_bind(flight.carrier.as_str()).push_bind(i64::from(flight.number)).push_bind(i64::from(flight.month));
            row.push_bind(i64::from(flight.day)).push_bind(&*flight.time_hour).push_bind(flight.dep_delay.map(i64::from));
        });
        insert.build().execute(&mut *transaction).await?;
    }
    for rows in dataset.weather.chunks(ROWS_PER_STATEMENT) {
        let mut insert = sqlx::QueryBuilder::new("INSERT INTO weather ");
        insert.push_values(rows, |mut row, hour| {
            row.push_bind(hour.origin.as_str()).push_bind(&*hour.time_hour).push_bind(i64::from(hour.wet));
        });
        insert.build().execute(&mut *transaction).await?;
    }
    transaction.commit().await?;
    pool.close().await;
    Ok(())
}

fn flights_as_csv(dataset: &Dataset) -> String {
    let mut text = String::with_capacity(dataset.flights.len() * 56);
    for f in &dataset.flights {
        let delay = f.dep_delay.map(|minutes| minutes.to_string()).unwrap_or_default();
        // Writing to a String cannot fail.
        let _ = writeln!(
            text,
            "{},{},{},{},{},{},{},{},{delay}",
            f.id, f.origin, f.dest, f.carrier, f.number, f.month, f.day, f.time_hour
        );
    }
    text
}

fn weather_as_csv(dataset: &Dataset) -> String {
    let mut text = String::with_capacity(dataset.weather.len() * 28);
    for hour in &dataset.weather {
        let _ = writeln!(text, "{},{},{}", hour.origin, hour.time_hour, u8::from(hour.wet));
    }
    text
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::*;
    use crate::demo::keyspace::Keyspace;
    use crate::demo::truth::Truth;

    #[tokio::test]
    async fn the_nightly_job_and_the_independent_count_agree() {
        let dataset = Dataset::generate(3000);
        let keyspace = Keyspace::of(&dataset);
        let truth = Truth::new(&dataset, &keyspace);
        let dir = tempfile::tempdir().expect("a directory");
        let database = Database::open_sqlite(&dataset, None, &dir.path().join("flights.db")).await.expect("opens");
        let mut random = fastrand::Rng::with_seed(7);
        for _ in 0..3 {
            let update = truth.next_update(&mut random).expect("flights leave today");
            truth.update_sent(update, std::time::Instant::now());
            database.apply(update).await.expect("updates");
        }
        let history: HashMap<_, _> = database.history().await.expect("answers").into_iter().collect();
        assert_eq!(history.len(), keyspace.entities.len() - keyspace.boards);
        for (index, entity) in keyspace.entities.iter().enumerate().skip(keyspace.boards) {
            assert_eq!(history.get(&entity.key()), Some(&truth.current(index)), "{}", entity.key());
        }
        database.close().await;
    }

    #[tokio::test]
    async fn the_cached_file_is_filled_once_and_never_updated() {
        let dir = tempfile::tempdir().expect("a directory");
        let cache = dir.path().join("cached.db");
        let dataset = Dataset::generate(100);
        let expected: i64 = dataset.flights.iter().filter_map(|flight| flight.dep_delay).map(i64::from).sum();
        for run in 0..2 {
            let file = dir.path().join(format!("{run}.db"));
            let database = Database::open_sqlite(&dataset, Some(&cache), &file).await.expect("opens");
            let Pool::Sqlite(pool) = &database.pool else { panic!("this is SQLite") };
            let sum: i64 = sqlx::query_scalar("SELECT SUM(dep_delay) FROM flights").fetch_one(pool).await.expect("answers");
            assert_eq!(sum, expected);
            database.apply(Update { id: 1, delay: 999 }).await.expect("updates");
            database.close().await;
        }
    }

    #[test]
    fn any_path_can_stand_in_a_url() {
        let options: SqliteConnectOptions = sqlite_url(Path::new("/tmp/50%25 of?.db")).parse().expect("a url");
        assert_eq!(options.get_filename(), Path::new("/tmp/50%25 of?.db"));
    }
}
