//! Three applications: one without a cache, one with plain cache-aside, and one that only sends GET to Larder.
//!
//! Each client has a connection of its own and one request under way, as the threads of a web server have.

use std::time::Duration;

use sqlx::postgres::PgConnectOptions;
use sqlx::{AssertSqlSafe, ConnectOptions, PgConnection};
use tokio::runtime::Runtime;

use super::keyspace::{Entity, Family};

/// How long a client waits for an answer. Longer than the queue of the phase without a cache.
const REPLY_TIMEOUT: Duration = Duration::from_secs(30);
/// How long a client waits for a connection.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// Why a request got no answer.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// From the cache.
    #[error("cache: {0}")]
    Redis(#[from] redis::RedisError),
    /// From the origin.
    #[error("origin: {0}")]
    Sql(#[from] sqlx::Error),
    /// The origin did not answer in time.
    #[error("origin: no answer within {REPLY_TIMEOUT:?}")]
    Timeout,
    /// A runtime for the driver could not be had.
    #[error("this machine: {0}")]
    System(#[from] std::io::Error),
}

/// What an application does to get a value. `None`: there is none.
pub trait Client: Send {
    /// Gets the value of `entity`, whose cache key is `key`.
    ///
    /// # Errors
    /// Where a server refuses, breaks off or is too slow. The next call begins with a new connection.
    fn get(&mut self, entity: &Entity, key: &str) -> Result<Option<String>, ClientError>;
}

/// How long the application without Larder lets values live.
#[derive(Debug, Clone, Copy)]
pub struct Ttls {
    /// Of [`Family::Board`].
    pub board: Duration,
    /// Of [`Family::Flight`].
    pub flight: Duration,
}

impl Ttls {
    /// The TTL of a family.
    pub const fn of(&self, family: Family) -> Duration {
        match family {
            Family::Board => self.board,
            Family::Flight => self.flight,
        }
    }
}

/// An ordinary connection to the origin.
struct SqlConnection {
    options: PgConnectOptions,
    runtime: Runtime,
    connection: Option<PgConnection>,
    statements: [(Family, String); 2],
}

impl SqlConnection {
    fn new(url: &str) -> Result<Self, ClientError> {
        let options = url.parse::<PgConnectOptions>()?.disable_statement_logging();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let statements = Family::ALL.map(|family| (family, family.numbered_sql()));
        Ok(Self { options, runtime, connection: None, statements })
    }

    fn query(&mut self, entity: &Entity) -> Result<Option<String>, ClientError> {
        let mut connection = match self.connection.take() {
            Some(connection) => connection,
            None => self.runtime.block_on(self.options.connect())?,
        };
        let sql = self.statements.iter().find(|(family, _)| *family == entity.family()).map_or("", |(_, sql)| sql);
        let parameters = entity.parameters();
        let answer = self.runtime.block_on(async {
            let query = sqlx::query_scalar(AssertSqlSafe(sql));
            let query = parameters.iter().fold(query, |query, text| query.bind(text));
            tokio::time::timeout(REPLY_TIMEOUT, query.fetch_optional(&mut connection)).await
        });
        let value = answer.map_err(|_| ClientError::Timeout)??;
        self.connection = Some(connection);
        Ok(value)
    }
}

/// An ordinary connection to a Redis server, or to what takes its place.
struct RedisConnection {
    client: redis::Client,
    connection: Option<redis::Connection>,
}

impl RedisConnection {
    fn new(url: &str) -> Result<Self, ClientError> {
        Ok(Self { client: redis::Client::open(url)?, connection: None })
    }

    fn call<T: redis::FromRedisValue>(&mut self, command: &redis::Cmd) -> Result<T, ClientError> {
        let mut connection = match self.connection.take() {
            Some(connection) => connection,
            None => connect(&self.client)?,
        };
        let answer = command.query(&mut connection)?;
        self.connection = Some(connection);
        Ok(answer)
    }
}

fn connect(client: &redis::Client) -> Result<redis::Connection, redis::RedisError> {
    let connection = client.get_connection_with_timeout(CONNECT_TIMEOUT)?;
    connection.set_read_timeout(Some(REPLY_TIMEOUT))?;
    connection.set_write_timeout(Some(REPLY_TIMEOUT))?;
    Ok(connection)
}

/// No cache: each request is a query.
pub struct Direct(SqlConnection);

impl Direct {
    /// A client of the origin at `url`.
    ///
    /// # Errors
    /// Where the URL is none.
    pub fn new(url: &str) -> Result<Self, ClientError> {
        SqlConnection::new(url).map(Self)
    }
}

impl Client for Direct {
    fn get(&mut self, entity: &Entity, _key: &str) -> Result<Option<String>, ClientError> {
        self.0.query(entity)
    }
}

/// Cache-aside as it is written everywhere: GET; where that is nil, query and SET with a TTL.
pub struct Aside {
    cache: RedisConnection,
    origin: SqlConnection,
    ttls: Ttls,
}

impl Aside {
    /// A client of the cache and the origin at these URLs.
    ///
    /// # Errors
    /// Where a URL is none.
    pub fn new(cache: &str, origin: &str, ttls: Ttls) -> Result<Self, ClientError> {
        Ok(Self { cache: RedisConnection::new(cache)?, origin: SqlConnection::new(origin)?, ttls })
    }
}

impl Client for Aside {
    fn get(&mut self, entity: &Entity, key: &str) -> Result<Option<String>, ClientError> {
        if let Some(value) = self.cache.call::<Option<String>>(redis::cmd("GET").arg(key))? {
            return Ok(Some(value));
        }
        let value = self.origin.query(entity)?;
        if let Some(value) = &value {
            let ttl_ms = self.ttls.of(entity.family()).as_millis() as u64;
            self.cache.call::<()>(redis::cmd("SET").arg(key).arg(value).arg("PX").arg(ttl_ms))?;
        }
        Ok(value)
    }
}

/// An unmodified Redis client whose server happens to be a Larder sidecar: GET, nothing else.
pub struct Through(RedisConnection);

impl Through {
    /// A client of the sidecar at `url`.
    ///
    /// # Errors
    /// Where the URL is none.
    pub fn new(url: &str) -> Result<Self, ClientError> {
        RedisConnection::new(url).map(Self)
    }
}

impl Client for Through {
    fn get(&mut self, _entity: &Entity, key: &str) -> Result<Option<String>, ClientError> {
        self.0.call(redis::cmd("GET").arg(key))
    }
}

/// Writes what the nightly job found into the cache at `url`, in batches: with a TTL, or without one where Larder gives it.
///
/// # Errors
/// Where the cache refuses or is too slow.
pub fn fill(url: &str, history: &[(String, String)], ttl: Option<Duration>) -> Result<(), ClientError> {
    const BATCH: usize = 500;
    let mut connection = connect(&redis::Client::open(url)?)?;
    for rows in history.chunks(BATCH) {
        let mut pipeline = redis::pipe();
        for (key, value) in rows {
            let command = pipeline.cmd("SET").arg(key).arg(value);
            if let Some(ttl) = ttl {
                command.arg("PX").arg(ttl.as_millis() as u64);
            }
            command.ignore();
        }
        pipeline.query::<()>(&mut connection)?;
    }
    Ok(())
}
