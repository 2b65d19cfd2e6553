//! Where the data really lives: SQL databases and HTTP services.
//!
//! [`Origins`] holds what the snapshot's origins need (connections, caps, breakers); a [`Loader`] asks one of them on behalf of
//! one rule. Nothing of them does I/O before the first load, and everything is safe to share between threads, but connections
//! belong to the tokio runtime that made them: load from one runtime only, and keep it running.
//!
//! Key parts reach a database as bound parameters and a service percent-encoded, never as text of a statement or a path.

mod breaker;
pub mod changes;
mod error;
pub mod fields;
mod gate;
mod http;
mod ledger;
pub mod parcel;
mod permits;
pub mod query_log;
mod sql;
mod writer;

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use futures_util::StreamExt as _;
use futures_util::stream;
use tokio::time::Instant;

pub use self::breaker::BreakerState;
pub use self::error::{LoadError, OriginError};
pub use self::gate::OriginStats;
pub use self::http::MAX_BODY_BYTES;
pub use self::ledger::{Entry, Hold, Ledger, Verdict};
pub use self::writer::{Carriage, Change, Changed, Writer};

use self::error::Failure;
use self::gate::{Counters, Gate};
use self::query_log::Asked;
use self::writer::{Commits, Orders};
use crate::policy::snapshot::{Origin, OriginKind, Sensitive};
use crate::policy::{JournalName, KeyPattern, Load, Query, Span, Store};

/// The most keys in one query of [`Loader::load_many`]. More are asked for in several.
pub const MAX_BATCH: usize = 500;
/// The largest file that may hold a URL, in bytes.
const MAX_URL_BYTES: u64 = 64 * 1024;

/// The origins of a snapshot. Cloning shares them.
#[derive(Debug, Clone)]
pub struct Origins {
    by_name: Arc<HashMap<String, Arc<Source>>>,
}

#[derive(Debug)]
struct Source {
    config: Origin,
    gate: Gate,
    backend: Backend,
    /// Whether sidecars outnumber its connections, so that a relay loads for them.
    is_queued: AtomicBool,
}

#[derive(Debug)]
enum Backend {
    Sql(sql::Database),
    Http(http::Service),
}

/// Loads the keys of one rule. Cloning shares everything.
#[derive(Debug, Clone)]
pub struct Loader {
    inner: Arc<Inner>,
    /// When a load is to be over, where that is before the origin's timeout.
    until: Option<Instant>,
}

#[derive(Debug)]
struct Inner {
    source: Arc<Source>,
    keys: KeyPattern,
    question: Question,
}

#[derive(Debug)]
enum Question {
    Sql(Box<sql::Question>),
    Http(http::Question),
}

/// What an origin knows about a key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Loaded {
    /// A value.
    Found {
        /// Its bytes; of a rule whose values are hashes as [`fields::pack`] makes them.
        value: Vec<u8>,
        /// The longest time that it may be kept, where the origin sets a limit. Zero: it must not be stored.
        max_age: Option<Span>,
        /// What the origin calls this state of it, where it has names for such.
        tag: Option<String>,
    },
    /// That there is none.
    NotFound,
}

impl Origins {
    /// Prepares the snapshot's origins. Connects to nothing and reads no file.
    pub fn new(origins: &[Origin]) -> Result<Self, OriginError> {
        Self { by_name: Arc::default() }.updated(origins)
    }

    /// The same for a newer snapshot. An origin that did not change keeps its connections and its breaker; one that did keeps
    /// its counters.
    pub fn updated(&self, origins: &[Origin]) -> Result<Self, OriginError> {
        let mut by_name = HashMap::with_capacity(origins.len());
        for origin in origins {
            let before = self.by_name.get(&origin.name);
            let source = match before {
                Some(before) if before.config == *origin => Arc::clone(before),
                _ => Arc::new(Source::new(origin, before.map(|before| Arc::clone(before.gate.counters())))?),
            };
            by_name.insert(origin.name.clone(), source);
        }
        Ok(Self { by_name: Arc::new(by_name) })
    }

    /// Prepares to load the keys that `keys` covers. Checks what can be checked without asking the origin.
    pub fn loader(&self, keys: &KeyPattern, load: &Load) -> Result<Loader, OriginError> {
        let source = self.by_name.get(&load.origin).ok_or_else(|| OriginError::Unknown(load.origin.clone()))?;
        let question = Question::new(&source.config, keys, load)?;
        Ok(Loader { inner: Arc::new(Inner { source: Arc::clone(source), keys: keys.clone(), question }), until: None })
    }

    /// Prepares to write the keys that `keys` covers, at the origin that `load` asks. Checks what can be checked without asking it.
    pub fn writer(&self, keys: &KeyPattern, load: &Load, store: &Store, carriage: Carriage) -> Result<Writer, OriginError> {
        let source = self.by_name.get(&load.origin).ok_or_else(|| OriginError::Unknown(load.origin.clone()))?;
        let orders = Orders::new(&source.config, keys, load, store, carriage)?;
        Ok(Writer::new(Arc::clone(source), keys.clone(), orders))
    }

    /// Prepares to tell an origin what stands in `part` of a journal. `None`: it is no database, and keeps no account of that.
    pub fn ledger(&self, origin: &str, part: &str) -> Result<Option<Ledger>, OriginError> {
        let source = self.by_name.get(origin).ok_or_else(|| OriginError::Unknown(origin.to_owned()))?;
        Ok(matches!(source.backend, Backend::Sql(_)).then(|| Ledger::new(Arc::clone(source), part)))
    }

    /// Leaves each origin the connections that are this sidecar's share where there are so many, from now on. What is under way
    /// goes on.
    pub fn share_among(&self, sidecars: u32) {
        for source in self.by_name.values() {
            let is_queued = source.config.queue(sidecars).is_some();
            source.is_queued.store(is_queued, Ordering::Relaxed);
            // One for a write, which is the sidecar's own to make.
            let connections = source.config.share(sidecars);
            source.gate.allow(connections);
            if let Backend::Sql(database) = &source.backend {
                database.keep(if is_queued { 0 } else { connections as usize });
            }
        }
    }

    /// Leaves each origin from which a relay loads for sidecars all connections that these have together, from now on.
    pub fn load_for_all(&self) {
        for source in self.by_name.values().filter(|source| source.config.load_queue.is_some()) {
            let Some(total) = source.config.max_total_connections else { continue };
            source.gate.allow(total);
            if let Backend::Sql(database) = &source.backend {
                database.keep(total as usize);
            }
        }
    }

    /// A reading of each origin's counters, in the order of their names.
    pub fn stats(&self) -> Vec<OriginStats> {
        let mut stats: Vec<_> = self.by_name.values().map(|source| source.gate.stats()).collect();
        stats.sort_by(|a, b| a.origin.cmp(&b.origin));
        stats
    }
}

/// Checks what a rule asks and tells its origin against its pattern and that origin, without connecting to anything: placeholders name
/// parts, and each statement is a single one. `larder check` and the sidecar refuse the same.
pub fn check_rule(origin: &Origin, keys: &KeyPattern, load: &Load, store: Option<(&Store, Carriage)>) -> Result<(), OriginError> {
    Source::new(origin, None)?;
    Question::new(origin, keys, load)?;
    store.map_or(Ok(()), |(store, carriage)| Orders::new(origin, keys, load, store, carriage).map(|_| ()))
}

/// The same as [`check_rule`], where the origin's URL may stand in a file, which is read: it may say something else later.
pub async fn check_rule_and_file(
    origin: &Origin,
    keys: &KeyPattern,
    load: &Load,
    store: Option<(&Store, Carriage)>,
) -> Result<(), OriginError> {
    let (OriginKind::Sql { url } | OriginKind::Http { url }) = &origin.kind;
    let Sensitive::File(path) = url else { return check_rule(origin, keys, load, store) };
    let unusable = |why| OriginError::Secret { origin: origin.name.clone(), path: path.clone(), why };
    let url = read_url(path).await.map(Sensitive::Value).map_err(unusable)?;
    let kind = match &origin.kind {
        OriginKind::Sql { .. } => OriginKind::Sql { url },
        OriginKind::Http { .. } => OriginKind::Http { url },
    };
    match check_rule(&Origin { kind, ..origin.clone() }, keys, load, store) {
        Err(OriginError::Url { why, .. }) => Err(unusable(why)),
        checked => checked,
    }
}

impl Source {
    fn new(origin: &Origin, counters: Option<Arc<Counters>>) -> Result<Self, OriginError> {
        let backend = match &origin.kind {
            OriginKind::Sql { url } => Backend::Sql(sql::Database::new(origin, url)?),
            OriginKind::Http { url } => Backend::Http(http::Service::new(origin, url)?),
        };
        let gate = Gate::new(origin, counters.unwrap_or_default());
        Ok(Self { config: origin.clone(), gate, backend, is_queued: AtomicBool::new(false) })
    }
}

impl Question {
    fn new(origin: &Origin, keys: &KeyPattern, load: &Load) -> Result<Self, OriginError> {
        match (&origin.kind, &load.query) {
            (OriginKind::Sql { url }, Query::Sql { read, read_many }) => {
                Ok(Self::Sql(Box::new(sql::Question::new(keys, url, read, read_many.as_deref(), load.reply)?)))
            }
            (OriginKind::Http { .. }, Query::Http { path }) => Ok(Self::Http(http::Question::new(keys, path, load.reply)?)),
            _ => Err(OriginError::WrongTerms(origin.name.clone())),
        }
    }
}

impl Loader {
    /// The same, whose loads are over by then: what is not answered counts as too slow.
    #[must_use]
    pub fn until(&self, moment: Instant) -> Self {
        Self { inner: Arc::clone(&self.inner), until: Some(moment) }
    }

    /// The queue by which a relay is to be asked for keys instead, as long as sidecars outnumber the origin's connections.
    pub fn queue(&self) -> Option<&JournalName> {
        let source = &self.inner.source;
        source.config.load_queue.as_ref().filter(|_| source.is_queued.load(Ordering::Relaxed))
    }

    /// What the rule calls the origin.
    pub fn origin(&self) -> &str {
        &self.inner.source.config.name
    }

    /// How long a load may take.
    pub fn timeout(&self) -> Span {
        self.inner.source.config.timeout
    }

    /// Closes the connections over which nothing is under way.
    pub fn close_idle(&self) {
        if let Backend::Sql(database) = &self.inner.source.backend {
            database.close_idle();
        }
    }

    /// Asks the origin for one key. Takes at most the origin's timeout. A key that the rule's pattern does not cover, or whose
    /// parts cannot be what the query asks for, is not found.
    pub async fn load(&self, key: &[u8]) -> Result<Loaded, LoadError> {
        let Inner { source, keys, question } = &*self.inner;
        let Some(parts) = parts_of(keys, key) else { return Ok(Loaded::NotFound) };
        let asked = Asked::one(keys, key);
        match (&source.backend, question) {
            (Backend::Sql(database), Question::Sql(question)) => {
                let Some(parts) = question.parts(&parts) else { return Ok(Loaded::NotFound) };
                source.gate.run_until(self.until, asked, |deadline| database.load(question, &parts, deadline)).await
            }
            (Backend::Http(service), Question::Http(question)) => {
                let Some(path) = question.path(&parts) else { return Ok(Loaded::NotFound) };
                source.gate.run_until(self.until, asked, |deadline| service.load(question, &path, deadline)).await
            }
            _ => Err(LoadError::Unusable { origin: source.config.name.clone(), why: "asked in the wrong terms".to_owned() }),
        }
    }

    /// Asks the origin for many keys; the answers stand in the order of `keys`. With `readMany`, [`MAX_BATCH`] keys share a
    /// query; else the keys are loaded one by one, as many at once as the origin has connections.
    pub async fn load_many(&self, keys: &[Vec<u8>]) -> Vec<Result<Loaded, LoadError>> {
        let mut answers: Vec<Option<Result<Loaded, LoadError>>> = vec![None; keys.len()];
        if self.batches() && keys.len() > 1 {
            for (chunk, slots) in keys.chunks(MAX_BATCH).zip(answers.chunks_mut(MAX_BATCH)) {
                self.load_batch(chunk, slots).await;
            }
        }
        self.load_each(keys, &mut answers).await;
        let none = || Err(LoadError::Busy { origin: self.inner.source.config.name.clone() });
        answers.into_iter().map(|answer| answer.unwrap_or_else(none)).collect()
    }

    /// Whether [`Self::load_many`] asks for many keys in one query.
    pub fn batches(&self) -> bool {
        matches!(&self.inner.question, Question::Sql(question) if question.batches())
    }

    /// One query for all keys. Leaves a slot empty where the key has to be asked for by itself.
    async fn load_batch(&self, keys: &[Vec<u8>], answers: &mut [Option<Result<Loaded, LoadError>>]) {
        let Inner { source, keys: pattern, question } = &*self.inner;
        let (Backend::Sql(database), Question::Sql(question)) = (&source.backend, question) else { return };
        let mut batch = sql::Batch::default();
        for (key, answer) in keys.iter().zip(answers.iter_mut()) {
            match parts_of(pattern, key).and_then(|parts| question.parts(&parts)) {
                Some(parts) => batch.push(parts),
                None => {
                    batch.skip();
                    *answer = Some(Ok(Loaded::NotFound));
                }
            }
        }
        if batch.is_empty() {
            return;
        }
        let asked = Asked::many(pattern, keys);
        match source.gate.run_until(self.until, asked, |deadline| database.load_many(question, &batch, deadline)).await {
            Ok(found) => {
                for (place, loaded) in batch.spread(found) {
                    answers[place] = Some(loaded.map_err(|failure| failure.named(&source.config.name, source.config.timeout)));
                }
            }
            Err(error) => {
                answers.iter_mut().filter(|answer| answer.is_none()).for_each(|answer| *answer = Some(Err(error.clone())));
            }
        }
    }

    async fn load_each(&self, keys: &[Vec<u8>], answers: &mut [Option<Result<Loaded, LoadError>>]) {
        let at_once = self.inner.source.gate.connections().max(1);
        let open: Vec<usize> = (0..keys.len()).filter(|index| answers[*index].is_none()).collect();
        let loads = open.into_iter().map(|index| async move { (index, self.load(&keys[index]).await) });
        let mut loads = stream::iter(loads).buffer_unordered(at_once);
        while let Some((index, answer)) = loads.next().await {
            answers[index] = Some(answer);
        }
    }
}

/// The parts that `pattern` takes from `key`, in its order.
fn parts_of<'k>(pattern: &KeyPattern, key: &'k [u8]) -> Option<Vec<&'k [u8]>> {
    Some(pattern.captures(key)?.into_iter().map(|range| &key[range]).collect())
}

/// The text of a setting that may stand in a file.
async fn reveal(text: &Sensitive) -> Result<String, Failure> {
    match text {
        Sensitive::Value(text) => Ok(text.clone()),
        Sensitive::File(path) => {
            let trouble =
                |why: String| Failure::Failed { why: format!("{}: {why}", path.display()), retry: true, retry_after: None };
            read_url(path).await.map_err(trouble)
        }
    }
}

/// The error says why there is none.
async fn read_url(path: &Path) -> Result<String, String> {
    let size = tokio::fs::metadata(path).await.map_err(|error| error.to_string())?.len();
    if size > MAX_URL_BYTES {
        return Err(format!("the file has {size} bytes, more than {MAX_URL_BYTES}"));
    }
    let text = tokio::fs::read_to_string(path).await.map_err(|error| error.to_string())?;
    Ok(text.trim().to_owned())
}
