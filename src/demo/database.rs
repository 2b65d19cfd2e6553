//! The database that really holds the flights: SQLite in this process, or Postgres where `--database` names one.

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
/// How long a query may wait for a free connection. The longest queue is that of the phase without a cache, where slow queries are
/// the point and no news for the log.
const ACQUIRE_TIMEOUT: Duration = Duration::from_secs(30);
/// How many queries a Postgres origin runs at once; a real one has processors of its own.
const POSTGRES_READERS: u32 = 8;
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

/// Where queries run.
#[derive(Debug, Clone)]
pub enum Database {
    /// SQLite, embedded. Updates have a connection of their own, so that they never queue behind slow reads.
    Sqlite {
        /// For queries.
        reads: SqlitePool,
        /// For updates.
        writes: SqlitePool,
    },
    /// A Postgres server, with the same division.
    Postgres {
        /// For queries.
        reads: PgPool,
        /// For updates.
        writes: PgPool,
    },
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
        // As many readers as processors: more would only share them.
        let readers = std::thread::available_parallelism().map_or(2, usize::from) as u32;
        let options = sqlite_options(file).journal_mode(SqliteJournalMode::Wal);
        let pool = |size| {
            SqlitePoolOptions::new()
                .max_connections(size)
                .acquire_timeout(ACQUIRE_TIMEOUT)
                .acquire_slow_threshold(ACQUIRE_TIMEOUT)
        };
        let writes = pool(1).connect_with(options.clone()).await?;
        let reads = pool(readers).connect_with(options.read_only(true)).await?;
        Ok(Self::Sqlite { reads, writes })
    }

    /// The Postgres server at `url`, filled with `dataset` in the schema [`SCHEMA`].
    ///
    /// # Errors
    /// Where the server cannot be reached, or the user may not create a schema.
    pub async fn open_postgres(dataset: &Dataset, url: &str) -> Result<Self, DatabaseError> {
        let options: PgConnectOptions = url.parse()?;
        let options = options.options([("search_path", SCHEMA)]).disable_statement_logging();
        let pool = |size| {
            PgPoolOptions::new().max_connections(size).acquire_timeout(ACQUIRE_TIMEOUT).acquire_slow_threshold(ACQUIRE_TIMEOUT)
        };
        let writes = pool(1).connect_with(options.clone()).await?;
        let mut connection = writes.acquire().await?;
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
        let reads = pool(POSTGRES_READERS).connect_with(options).await?;
        Ok(Self::Postgres { reads, writes })
    }

    /// The only column of the only row that `sql` answers with, or `None` without a row.
    ///
    /// # Errors
    /// Where the database refuses, or no connection comes free in time.
    pub async fn fetch(&self, sql: &str, parameters: &[String]) -> Result<Option<String>, DatabaseError> {
        // `sql` is one of the demo's own constants, and its parameters are bound.
        let sql = AssertSqlSafe(sql.to_owned());
        let row = match self {
            Self::Sqlite { reads, .. } => {
                let query = parameters.iter().fold(sqlx::query_scalar(sql), |query, text| query.bind(text));
                query.fetch_optional(reads).await?
            }
            Self::Postgres { reads, .. } => {
                let query = parameters.iter().fold(sqlx::query_scalar(sql), |query, text| query.bind(text));
                query.fetch_optional(reads).await?
            }
        };
        Ok(row)
    }

    /// Every history key with its value, in one statement: what a nightly job would put into the cache.
    ///
    /// # Errors
    /// Where the database refuses.
    pub async fn history(&self) -> Result<Vec<(String, String)>, DatabaseError> {
        let sql = AssertSqlSafe(super::keyspace::history_sql());
        Ok(match self {
            Self::Sqlite { reads, .. } => sqlx::query_as(sql).fetch_all(reads).await?,
            Self::Postgres { reads, .. } => sqlx::query_as(sql).fetch_all(reads).await?,
        })
    }

    /// Changes one row.
    ///
    /// # Errors
    /// Where the database refuses.
    pub async fn apply(&self, update: Update) -> Result<(), DatabaseError> {
        const SQL: &str = "UPDATE flights SET dep_delay = $1 WHERE id = $2";
        let (delay, id) = (i32::from(update.delay), update.id.cast_signed());
        match self {
            Self::Sqlite { writes, .. } => sqlx::query(SQL).bind(delay).bind(id).execute(writes).await.map(|_| ())?,
            Self::Postgres { writes, .. } => sqlx::query(SQL).bind(delay).bind(id).execute(writes).await.map(|_| ())?,
        }
        Ok(())
    }

    /// Closes every connection.
    pub async fn close(&self) {
        match self {
            Self::Sqlite { reads, writes } => {
                reads.close().await;
                writes.close().await;
            }
            Self::Postgres { reads, writes } => {
                reads.close().await;
                writes.close().await;
            }
        }
    }
}

fn ignore_missing(error: std::io::Error) -> std::io::Result<()> {
    if error.kind() == std::io::ErrorKind::NotFound { Ok(()) } else { Err(error) }
}

fn file_error(path: &Path, why: std::io::Error) -> DatabaseError {
    DatabaseError::File { path: path.to_owned(), why }
}

fn sqlite_options(file: &Path) -> SqliteConnectOptions {
    SqliteConnectOptions::new()
        .filename(file)
        .create_if_missing(true)
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
    use super::*;
    use crate::demo::keyspace::{Family, Keyspace};
    use crate::demo::truth::Truth;

    #[tokio::test]
    async fn sql_and_the_independent_count_agree_before_and_after_updates() {
        let dataset = Dataset::generate(3000);
        let keyspace = Keyspace::of(&dataset);
        let truth = Truth::new(&dataset, &keyspace);
        let dir = tempfile::tempdir().expect("a directory");
        let database = Database::open_sqlite(&dataset, None, &dir.path().join("flights.db")).await.expect("opens");
        let mut random = fastrand::Rng::with_seed(7);
        for round in 0..4 {
            for index in (0..keyspace.entities.len()).step_by(97).chain(0..keyspace.boards) {
                let entity = keyspace.entities[index];
                let value = database.fetch(&entity.family().sql(), &entity.parameters()).await.expect("answers");
                assert_eq!(value, Some(truth.current(index)), "round {round}, {}", entity.key());
            }
            let update = truth.next_update(&mut random).expect("flights leave today");
            truth.update_sent(update, std::time::Instant::now());
            database.apply(update).await.expect("updates");
        }
        let history: std::collections::HashMap<_, _> = database.history().await.expect("answers").into_iter().collect();
        assert_eq!(history.len(), keyspace.entities.len() - keyspace.boards);
        for (index, entity) in keyspace.entities.iter().enumerate().skip(keyspace.boards) {
            assert_eq!(history.get(&entity.key()), Some(&truth.current(index)), "{}", entity.key());
        }
        let unknown = database.fetch(&Family::Board.sql(), &["XXX".to_owned()]).await.expect("answers");
        assert_eq!(unknown, None);
        database.close().await;
    }

    #[tokio::test]
    async fn the_cached_file_is_filled_once_and_never_updated() {
        let dir = tempfile::tempdir().expect("a directory");
        let cache = dir.path().join("cached.db");
        let dataset = Dataset::generate(100);
        for run in 0..2 {
            let file = dir.path().join(format!("{run}.db"));
            let database = Database::open_sqlite(&dataset, Some(&cache), &file).await.expect("opens");
            let sum = "SELECT CAST(SUM(dep_delay) AS TEXT) FROM flights";
            let expected: i64 = dataset.flights.iter().filter_map(|flight| flight.dep_delay).map(i64::from).sum();
            assert_eq!(database.fetch(sum, &[]).await.expect("answers"), Some(expected.to_string()));
            database.apply(Update { id: 1, delay: 999 }).await.expect("updates");
            database.close().await;
        }
    }
}
