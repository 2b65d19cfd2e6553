//! How a Postgres database tells of its changes: logical replication by its own plugin, `pgoutput`.
//!
//! [`Database`] is where relays come in. A [`Feed`] is the stream of a slot over a connection of its own ([`link`]), since the driver that
//! loads use speaks no replication; all questions beside it are asked over an ordinary one ([`catalog`]). What the stream says ([`pgoutput`]),
//! how it is said ([`wire`]), and which transactions can be seen ([`snapshot`]) is pure.

mod address;
mod catalog;
mod feed;
mod link;
pub mod pgoutput;
mod scram;
mod snapshot;
mod tls;
mod wire;

use std::time::Duration;

use tokio::time::{sleep, timeout};

pub use self::catalog::{Lag, Needs, Place, Ready, SlotOwner};
pub use self::feed::{Identity, Told};
pub use self::link::MOST_BYTES;

use self::address::Address;
use self::catalog::Catalog;
use self::feed::{Ended, Stream};
use self::pgoutput::{Lsn, Message};
use super::error::{Failure, LoadError, OriginError};
use super::reveal;
use crate::policy::Span;
use crate::policy::snapshot::{Origin, OriginKind, Sensitive};

/// How often it is asked whether a transaction can be seen, at first and at most.
const FIRST_LOOK: Duration = Duration::from_millis(1);
const LONGEST_LOOK: Duration = Duration::from_millis(50);
/// How long that may take before the server is told that this side is there.
const PATIENCE: Duration = Duration::from_secs(5);

/// What notes of Larder's own are for, in the log.
pub(super) const NOTE_PREFIX: &str = "larder";

/// What a write through Larder notes in the database's log beside its change, for who reads this slot.
pub(super) fn note(slot: &str, key: &[u8]) -> Vec<u8> {
    [slot.as_bytes(), b"\0", key].concat()
}

/// The key that a note of such a write names, where it is for this slot: the cache has been told of its change.
pub fn noted<'a>(message: &Message<'a>, slot: &str) -> Option<&'a [u8]> {
    let Message::Note { transactional: true, prefix, content } = message else { return None };
    let is_ours = *prefix == NOTE_PREFIX.as_bytes();
    content.strip_prefix(slot.as_bytes()).filter(|_| is_ours)?.strip_prefix(b"\0")
}

/// A database whose changes are followed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Database {
    name: String,
    url: Sensitive,
    connect_timeout: Duration,
    timeout: Span,
}

/// Why changes are not told any more.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FeedError {
    /// What the slot keeps cannot be told: it is to be made anew.
    #[error("the slot of origin `{origin}` is of no use any more: {why}")]
    Useless {
        /// The origin's name.
        origin: String,
        /// What the server said.
        why: String,
    },
    /// Anything else.
    #[error(transparent)]
    Origin(#[from] LoadError),
}

impl Database {
    /// Prepares to follow an origin. Connects to nothing.
    ///
    /// # Errors
    /// It is no Postgres database, as far as its URL is known.
    pub fn new(origin: &Origin) -> Result<Self, OriginError> {
        let refuse = |why: &str| Err(OriginError::Url { origin: origin.name.clone(), why: why.to_owned() });
        let OriginKind::Sql { url } = &origin.kind else {
            return refuse("a service tells nobody of its changes: follow tables of an sql origin");
        };
        if let Sensitive::Value(text) = url
            && let Err(why) = Address::parse(text)
        {
            return refuse(&format!("only Postgres tells of its changes, and {why}"));
        }
        let connect_timeout = origin.connect_timeout.as_duration();
        Ok(Self { name: origin.name.clone(), url: url.clone(), connect_timeout, timeout: origin.timeout })
    }

    /// The origin's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Connects, and sees to it that there is all that a stream of `tables` needs. With `anew`, what the slot keeps is of no use: it is made
    /// anew where it is Larder's, and moved where it is somebody else's. Nothing is told before [`Feed::start`].
    ///
    /// # Errors
    /// The database, or what it lacks.
    pub async fn feed(&self, place: &Place, tables: &Needs, owner: SlotOwner, anew: bool) -> Result<(Feed, Ready), LoadError> {
        let open = async {
            let address = self.address().await?;
            Stream::open(&address).await
        };
        let (stream, identity) = self.within(self.connect_timeout, open).await?;
        let mut catalog = self.catalog().await?;
        let tells_notes = catalog.check_server().await.map_err(|failure| self.named(failure))?;
        let ready = catalog.prepare(place, tables, owner, anew).await.map_err(|failure| self.named(failure))?;
        let feed = Feed { database: self.clone(), place: place.clone(), identity, stream, catalog, tells_notes };
        Ok((feed, ready))
    }

    /// Takes away what is Larder's own of slot and publication.
    ///
    /// # Errors
    /// The database.
    pub async fn remove(&self, place: &Place, owner: SlotOwner) -> Result<(), LoadError> {
        let mut catalog = self.catalog().await?;
        let removed = catalog.remove(place, owner).await;
        catalog.close().await;
        removed.map_err(|failure| self.named(failure))
    }

    /// How far the slot is behind, asked over a connection of its own. None: it is gone.
    ///
    /// # Errors
    /// The database.
    pub async fn lag(&self, place: &Place) -> Result<Option<Lag>, LoadError> {
        let mut catalog = self.catalog().await?;
        let lag = catalog.lag(&place.slot).await;
        catalog.close().await;
        lag.map_err(|failure| self.named(failure))
    }

    async fn catalog(&self) -> Result<Catalog, LoadError> {
        self.within(self.connect_timeout, async { Catalog::open(&reveal(&self.url).await?).await }).await
    }

    async fn address(&self) -> Result<Address, Failure> {
        let unusable = |why| Failure::Unusable(format!("only Postgres tells of its changes, and its url is none: {why}"));
        Address::parse(&reveal(&self.url).await?).map_err(unusable)
    }

    async fn within<T>(&self, limit: Duration, work: impl Future<Output = Result<T, Failure>>) -> Result<T, LoadError> {
        let outcome = timeout(limit, work).await.unwrap_or(Err(Failure::Timeout));
        outcome.map_err(|failure| self.named(failure))
    }

    fn named(&self, failure: Failure) -> LoadError {
        failure.named(&self.name, self.timeout)
    }
}

/// The changes of a database, from where they were last confirmed.
pub struct Feed {
    database: Database,
    place: Place,
    identity: Identity,
    stream: Stream,
    catalog: Catalog,
    /// Whether the server's plugin knows to tell notes: from Postgres 14 on.
    tells_notes: bool,
}

impl Feed {
    /// Which server speaks.
    pub fn identity(&self) -> &Identity {
        &self.identity
    }

    /// Begins.
    ///
    /// # Errors
    /// The database.
    pub async fn start(&mut self) -> Result<(), LoadError> {
        let Self { database, place, stream, tells_notes, .. } = self;
        database.within(database.timeout.as_duration(), stream.start(&place.slot, &place.publication, *tells_notes)).await
    }

    /// Waits for what comes next.
    ///
    /// # Errors
    /// The stream ends.
    pub async fn next(&mut self) -> Result<Told<'_>, FeedError> {
        let Self { database, stream, .. } = self;
        stream.next().await.map_err(|ended| match ended {
            Ended::Useless(why) => FeedError::Useless { origin: database.name.clone(), why },
            Ended::Failure(failure) => database.named(failure).into(),
        })
    }

    /// Whether something is there already, without waiting for it.
    pub fn has_more(&mut self) -> bool {
        self.stream.has_more()
    }

    /// Waits until everybody who asks the database sees these transactions, which are committed.
    ///
    /// # Errors
    /// The database.
    pub async fn seen(&mut self, xids: &[u32]) -> Result<(), LoadError> {
        let (mut pause, mut waited) = (FIRST_LOOK, Duration::ZERO);
        loop {
            let snapshot = self.catalog.snapshot().await.map_err(|failure| self.database.named(failure))?;
            if xids.iter().all(|xid| snapshot.sees(*xid)) {
                return Ok(());
            }
            sleep(pause).await;
            waited += pause;
            pause = (pause * 2).min(LONGEST_LOOK);
            if waited > PATIENCE {
                waited = Duration::ZERO;
                self.alive().await?;
            }
        }
    }

    /// Says that all up to `done` was carried out: the database need not keep it.
    ///
    /// # Errors
    /// The database.
    pub async fn confirm(&mut self, done: Lsn) -> Result<(), LoadError> {
        self.stream.confirm(done).await.map_err(|failure| self.database.named(failure))
    }

    /// Says that this side is there, while it is busy with something else.
    ///
    /// # Errors
    /// The database.
    pub async fn alive(&mut self) -> Result<(), LoadError> {
        self.stream.tell(false).await.map_err(|failure| self.database.named(failure))
    }

    /// How far the slot is behind. None: it is gone.
    ///
    /// # Errors
    /// The database.
    pub async fn lag(&mut self) -> Result<Option<Lag>, LoadError> {
        self.catalog.lag(&self.place.slot).await.map_err(|failure| self.database.named(failure))
    }

    /// Looks again at what `tables` need, which may have changed since. [`Ready::is_new`]: what the slot keeps is of no use.
    ///
    /// # Errors
    /// The database.
    pub async fn look_after(&mut self, tables: &Needs) -> Result<Ready, LoadError> {
        self.catalog.look_after(&self.place, tables).await.map_err(|failure| self.database.named(failure))
    }
}
