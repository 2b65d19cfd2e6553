//! Three applications: one without a cache, one with cache-aside as everybody writes it, and one that only sends GET to Larder.
//!
//! Each client has a connection of its own to the cache and one request under way, as the threads of a web server have; they share a
//! pool of connections to the database, as such threads do.

use std::time::Duration;

use super::keyspace::{Entity, Family};
use super::origin::Asking;

/// How long a client waits for an answer of its cache. Longer than the sidecar waits for a load.
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
    Origin(String),
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
pub struct Direct(pub Asking);

impl Client for Direct {
    fn get(&mut self, entity: &Entity, key: &str) -> Result<Option<String>, ClientError> {
        self.0.query(entity.family(), key)
    }
}

/// Cache-aside as it is written everywhere: GET; where that is nil, query and SET with a TTL.
pub struct Aside {
    cache: RedisConnection,
    origin: Asking,
    ttls: Ttls,
}

impl Aside {
    /// A client of the cache and the origin.
    ///
    /// # Errors
    /// Where `cache` is no URL.
    pub fn new(cache: &str, origin: Asking, ttls: Ttls) -> Result<Self, ClientError> {
        Ok(Self { cache: RedisConnection::new(cache)?, origin, ttls })
    }
}

impl Client for Aside {
    fn get(&mut self, entity: &Entity, key: &str) -> Result<Option<String>, ClientError> {
        if let Some(value) = self.cache.call::<Option<String>>(redis::cmd("GET").arg(key))? {
            return Ok(Some(value));
        }
        let value = self.origin.query(entity.family(), key)?;
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
