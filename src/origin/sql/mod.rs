//! SQL origins: what is common to Postgres and SQLite.

mod batch;
mod input;
mod ledger;
mod own_table;
mod postgres;
mod shape;
mod sqlite;
mod template;
mod versions;
mod write;

use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time::{Instant, timeout_at};

pub(super) use self::batch::Batch;
pub(super) use self::ledger::{Post, Posting};
pub(super) use self::postgres::{connect as postgres_connect, failure as postgres_failure, options as postgres_options};
pub(super) use self::write::{Orders, Step, Texts};

use self::batch::Parts;
use self::template::{Dialect, Purpose, Template};
use super::Loaded;
use super::error::{Failure, OriginError};
use super::ledger::{Hold, Verdict};
use super::{Changed, Commits};
use crate::policy::snapshot::{Origin, Sensitive};
use crate::policy::{KeyPattern, ReplyForm};

/// The longest part of a key that is asked for, in bytes. Longer keys are never loaded: no read of one is held.
const MAX_PART_BYTES: usize = 1024 * 1024;
/// A connection that was idle for longer is closed instead of used: firewalls forget such ones silently.
const MAX_IDLE: Duration = Duration::from_secs(5 * 60);
/// An older connection is closed instead of used, so that what changed behind a name comes into force.
const MAX_AGE: Duration = Duration::from_secs(30 * 60);
/// How often a file that holds the URL is read while there are connections to use.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// A database and the idle connections to it. The gate bounds how many there are.
#[derive(Debug)]
pub(super) struct Database {
    url: Sensitive,
    /// When the file with the URL was last read.
    looked: Mutex<Instant>,
    connect_timeout: Duration,
    /// How many idle ones are kept.
    most_idle: AtomicUsize,
    idle: Mutex<Vec<Held>>,
}

#[derive(Debug)]
struct Held {
    connection: Connection,
    /// A hash of the URL, which may hold a password.
    url: u64,
    born: Instant,
    idle_since: Instant,
    /// Whether it may change anything.
    writes: bool,
}

#[derive(Debug)]
enum Connection {
    Postgres(Box<sqlx::PgConnection>),
    Sqlite(Box<sqlite::Client>),
}

/// What a rule asks of a database.
#[derive(Debug)]
pub(super) struct Question {
    /// Absent where the statements do not follow the dialect. One is always there; which one counts is known once the URL is.
    postgres: Option<Statements>,
    sqlite: Option<Statements>,
    /// For each part of the pattern, whether a statement uses it.
    used: Vec<bool>,
    reply: Option<ReplyForm>,
    batches: bool,
    described: postgres::Described,
}

#[derive(Debug)]
struct Statements {
    read: Template,
    read_many: Option<Template>,
}

/// What `parse` makes of a rule's statements in Postgres' dialect and in SQLite's. Where the URL tells the dialect, in that one alone; else one of
/// them at least.
fn by_dialect<T>(
    url: &Sensitive,
    parse: impl Fn(Dialect) -> Result<T, OriginError>,
) -> Result<(Option<T>, Option<T>), OriginError> {
    let known = match url {
        Sensitive::Value(url) => dialect_of(url),
        Sensitive::File(_) => None,
    };
    Ok(match known {
        Some(Dialect::Postgres) => (Some(parse(Dialect::Postgres)?), None),
        Some(Dialect::Sqlite) => (None, Some(parse(Dialect::Sqlite)?)),
        None => match (parse(Dialect::Postgres), parse(Dialect::Sqlite)) {
            (Err(why), Err(_)) => return Err(why),
            (postgres, sqlite) => (postgres.ok(), sqlite.ok()),
        },
    })
}

impl Question {
    pub(super) fn new(
        keys: &KeyPattern,
        url: &Sensitive,
        read: &str,
        read_many: Option<&str>,
        reply: Option<ReplyForm>,
    ) -> Result<Self, OriginError> {
        let (postgres, sqlite) = by_dialect(url, |dialect| Statements::parse(read, read_many, keys, dialect))?;
        let mut used = vec![false; keys.parts().count()];
        for statements in postgres.iter().chain(&sqlite) {
            statements.read.parts().iter().for_each(|part| used[part.index] = true);
        }
        Ok(Self { postgres, sqlite, used, reply, batches: read_many.is_some(), described: postgres::Described::default() })
    }

    pub(super) fn batches(&self) -> bool {
        self.batches
    }

    /// The parts as texts. `None` where one that is asked for cannot be in a database, which settles the key without a query.
    pub(super) fn parts(&self, parts: &[&[u8]]) -> Option<Parts> {
        let texts = parts.iter().zip(&self.used).map(|(part, used)| if *used { text_of(part) } else { Some(String::new()) });
        let parts = texts.collect::<Option<Parts>>()?;
        self.described.admits(&parts).then_some(parts)
    }

    fn statements(&self, dialect: Dialect) -> Result<&Statements, Failure> {
        let statements = match dialect {
            Dialect::Postgres => self.postgres.as_ref(),
            Dialect::Sqlite => self.sqlite.as_ref(),
        };
        statements.ok_or_else(|| Failure::Unusable(format!("the statement is not {dialect:?}'s SQL, and the url is")))
    }
}

impl Statements {
    fn parse(read: &str, read_many: Option<&str>, keys: &KeyPattern, dialect: Dialect) -> Result<Self, OriginError> {
        let parse =
            |place, text| Template::parse(text, keys, dialect, Purpose::Read).map_err(|why| OriginError::Template { place, why });
        let read = parse("read", read)?;
        let read_many = read_many.map(|text| parse("readMany", text)).transpose()?;
        if let Some(many) = &read_many {
            let refuse = |why: &str| Err(OriginError::Template { place: "readMany", why: why.to_owned() });
            if many.parts().is_empty() {
                return refuse(
                    "it uses no part of the key: write = ANY($id), or for SQLite IN (SELECT value FROM json_each($id))",
                );
            }
            let same = many.parts().len() == read.parts().len() && many.parts().iter().all(|part| read.parts().contains(part));
            if !same {
                return refuse("it must use the same parts of the key as `read`");
            }
        }
        Ok(Self { read, read_many })
    }
}

fn text_of(part: &[u8]) -> Option<String> {
    let text = std::str::from_utf8(part).ok()?;
    (text.len() <= MAX_PART_BYTES && !text.contains('\0')).then(|| text.to_owned())
}

fn dialect_of(url: &str) -> Option<Dialect> {
    match url.trim().split(':').next() {
        Some("postgres" | "postgresql") => Some(Dialect::Postgres),
        Some("sqlite") => Some(Dialect::Sqlite),
        _ => None,
    }
}

impl Database {
    pub(super) fn new(origin: &Origin, url: &Sensitive) -> Result<Self, OriginError> {
        if let Sensitive::Value(url) = url {
            check_url(url).map_err(|why| OriginError::Url { origin: origin.name.clone(), why })?;
        }
        let connect_timeout = origin.connect_timeout.as_duration();
        let most_idle = AtomicUsize::new(origin.max_connections as usize);
        Ok(Self { url: url.clone(), looked: Mutex::new(Instant::now()), connect_timeout, most_idle, idle: Mutex::default() })
    }

    /// Keeps at most so many idle connections from now on.
    pub(super) fn keep(&self, most: usize) {
        self.most_idle.store(most, Ordering::Relaxed);
        self.idle().truncate(most);
    }

    /// Closes the idle connections.
    pub(super) fn close_idle(&self) {
        self.idle().clear();
    }

    /// Asks for one key.
    pub(super) async fn load(&self, question: &Question, parts: &Parts, deadline: Instant) -> Result<Loaded, Failure> {
        let mut held = self.take(false).await?;
        let outcome = match &mut held.connection {
            Connection::Postgres(connection) => postgres::load(connection, question, parts, deadline).await,
            Connection::Sqlite(client) => sqlite::load(client, question, parts).await,
        };
        self.give_back(held, outcome.as_ref().err());
        outcome
    }

    /// Asks for many keys in one query. `None` stands for keys that have to be asked for one by one.
    pub(super) async fn load_many(
        &self,
        question: &Question,
        batch: &Batch,
        deadline: Instant,
    ) -> Result<Vec<batch::Answer>, Failure> {
        let mut held = self.take(false).await?;
        let outcome = match &mut held.connection {
            Connection::Postgres(connection) => postgres::load_many(connection, question, batch.keys(), deadline).await,
            Connection::Sqlite(client) => sqlite::load_many(client, question, batch.keys()).await,
        };
        self.give_back(held, outcome.as_ref().err());
        outcome
    }

    /// Makes all changes in one transaction, or none. What came of each, in their order.
    pub(super) async fn write(
        &self,
        orders: &Orders,
        steps: &[Step],
        deadline: Instant,
        commits: &Commits,
    ) -> Result<Vec<Changed>, Failure> {
        let mut held = self.take(true).await?;
        let outcome = match &mut held.connection {
            Connection::Postgres(connection) => write::in_postgres(connection, orders, steps, deadline, commits).await,
            Connection::Sqlite(client) => sqlite::write(client, orders, steps, deadline, commits).await,
        };
        self.give_back(held, outcome.as_ref().err());
        outcome
    }

    /// Takes a part of a journal from whoever has it.
    pub(super) async fn take_part(&self, part: &str, least: i64, deadline: Instant) -> Result<Hold, Failure> {
        let mut held = self.take(true).await?;
        let outcome = match &mut held.connection {
            Connection::Postgres(connection) => ledger::take_in_postgres(connection, part, least, deadline).await,
            Connection::Sqlite(client) => ledger::take_in_sqlite(client, part, least).await,
        };
        self.give_back(held, outcome.as_ref().err());
        outcome
    }

    /// Makes a batch of a journal's part in one transaction, or nothing of it.
    pub(super) async fn post(&self, batch: &Posting<'_>, deadline: Instant, commits: &Commits) -> Result<Verdict, Failure> {
        let mut held = self.take(true).await?;
        let outcome = match &mut held.connection {
            Connection::Postgres(connection) => ledger::post_in_postgres(connection, batch, deadline, commits).await,
            Connection::Sqlite(client) => ledger::post_in_sqlite(client, batch, deadline, commits).await,
        };
        self.give_back(held, outcome.as_ref().err());
        outcome
    }

    /// An idle connection or a new one, which `writes` or only reads. The URL is read anew for each new one.
    async fn take(&self, writes: bool) -> Result<Held, Failure> {
        self.follow_url().await;
        if let Some(held) = self.take_idle(writes) {
            return Ok(held);
        }
        let connected_by = Instant::now() + self.connect_timeout;
        let connect = async {
            let url = super::reveal(&self.url).await?;
            check_url(&url).map_err(Failure::Unusable)?;
            let connection = match dialect_of(&url) {
                Some(Dialect::Sqlite) => Connection::Sqlite(Box::new(sqlite::connect(&url, writes).await?)),
                _ => Connection::Postgres(Box::new(postgres::connect(&url).await?)),
            };
            Ok((connection, hash_of(&url)))
        };
        // Where the load's own time ends first, the gate says so.
        let late = |_| Failure::Unreachable("no connection in time".to_owned());
        let (connection, url) = timeout_at(connected_by, connect).await.map_err(late)??;
        let born = Instant::now();
        Ok(Held { connection, url, born, idle_since: born, writes })
    }

    /// Closes connections by an earlier URL, where a file holds it. One that cannot be read is for the next connection to tell.
    async fn follow_url(&self) {
        if !matches!(self.url, Sensitive::File(_)) || self.idle().is_empty() || !self.is_time_to_look() {
            return;
        }
        if let Ok(url) = super::reveal(&self.url).await {
            let current = hash_of(&url);
            self.idle().retain(|held| held.url == current);
        }
    }

    fn is_time_to_look(&self) -> bool {
        let mut looked = self.looked.lock().unwrap_or_else(PoisonError::into_inner);
        let is_time = looked.elapsed() >= LOOK_EVERY;
        if is_time {
            *looked = Instant::now();
        }
        is_time
    }

    fn take_idle(&self, writes: bool) -> Option<Held> {
        let now = Instant::now();
        let mut idle = self.idle();
        idle.retain(|held| now - held.idle_since < MAX_IDLE && now - held.born < MAX_AGE);
        // Postgres has each transaction say whether it only reads.
        let serves = |held: &Held| held.writes == writes || matches!(held.connection, Connection::Postgres(_));
        idle.iter().rposition(serves).map(|at| idle.remove(at))
    }

    /// Keeps the connection, unless it may be in the midst of something or broken. Where one broke, the idle ones did too:
    /// most likely the server went away.
    fn give_back(&self, mut held: Held, failure: Option<&Failure>) {
        match failure {
            None | Some(Failure::Unusable(_) | Failure::Rejected(_)) => {
                held.idle_since = Instant::now();
                let mut idle = self.idle();
                if idle.len() < self.most_idle.load(Ordering::Relaxed) {
                    idle.push(held);
                }
            }
            Some(Failure::Unreachable(_)) => self.idle().clear(),
            Some(Failure::Timeout | Failure::Failed { .. } | Failure::Unknown { .. }) => {}
        }
    }

    fn idle(&self) -> MutexGuard<'_, Vec<Held>> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn hash_of(url: &str) -> u64 {
    let mut hasher = DefaultHasher::new();
    url.hash(&mut hasher);
    hasher.finish()
}

/// Refuses what is wrong with a URL without repeating any of it.
fn check_url(url: &str) -> Result<(), String> {
    match dialect_of(url) {
        Some(Dialect::Postgres) => postgres::check_url(url),
        Some(Dialect::Sqlite) => sqlite::check_url(url),
        None => Err("write postgres://USER:PASSWORD@HOST:PORT/DATABASE or sqlite://FILE".to_owned()),
    }
}
