//! Writes: what a rule changes at its origin.
//!
//! Of each write it is known whether it was made, was not, or may have been. Only what was surely not made is tried again, and over
//! HTTP what carries the same idempotency key.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::error::{LoadError, OriginError};
use super::query_log::Asked;
use super::{Backend, Source, changes, http, parts_of, sql};
use crate::policy::snapshot::{Origin, OriginKind};
use crate::policy::{KeyPattern, Load, Query, ReplyForm, Store, Strategy};

/// Writes the keys of one rule. Cloning shares everything.
#[derive(Debug, Clone)]
pub struct Writer {
    inner: Arc<Inner>,
    /// Whose changes these are, for who reads the database's: see [`Writer::marked`].
    mark: Option<Arc<str>>,
}

#[derive(Debug)]
struct Inner {
    source: Arc<Source>,
    keys: KeyPattern,
    orders: Orders,
}

/// What a rule tells its origin.
#[derive(Debug)]
pub(super) enum Orders {
    Sql(Box<sql::Orders>),
    Http { question: http::Question, if_match: bool },
}

/// How writes come to an origin.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Carriage {
    /// While their client waits.
    Through,
    /// From a journal, which numbers them: statements may take `$version`.
    Behind,
}

impl Carriage {
    /// How the writes of rules with this strategy come to their origin, where they do.
    pub fn of(strategy: &Strategy) -> Self {
        if strategy.behind().is_some() { Self::Behind } else { Self::Through }
    }
}

/// One change.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Change {
    /// Of which key.
    pub key: Vec<u8>,
    /// What it is to hold: of a rule whose values are hashes as [`pack`](super::fields::pack) makes it. `None`: it is deleted.
    pub value: Option<Vec<u8>>,
    /// What the origin told of it last, where it tells such things.
    pub tag: Option<String>,
}

/// What came of a change.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Changed {
    /// How many rows changed.
    pub rows: u64,
    /// Which version it is now, where that is asked for.
    pub version: Option<u64>,
    /// What the origin calls what it has now.
    pub tag: Option<String>,
    /// What a number that was raised is now.
    pub number: Option<i64>,
}

/// Whether a write may have been made although nobody heard so.
#[derive(Debug, Default)]
pub(super) struct Commits {
    /// By the attempt under way.
    sent: AtomicBool,
    /// By an earlier one.
    doubtful: AtomicBool,
}

impl Commits {
    /// From now on.
    pub(super) fn begin(&self) {
        self.sent.store(true, Ordering::Relaxed);
    }

    /// Not by this attempt, after all.
    pub(super) fn never_left(&self) {
        self.sent.store(false, Ordering::Relaxed);
    }

    /// An attempt ended in doubt, which no later failure resolves.
    pub(super) fn doubt(&self) {
        self.doubtful.store(true, Ordering::Relaxed);
    }

    pub(super) fn judge(&self, error: LoadError) -> LoadError {
        let doubtful = self.doubtful.load(Ordering::Relaxed);
        match error {
            LoadError::Unknown { .. } => error,
            LoadError::Timeout { origin, within } if doubtful || self.sent.load(Ordering::Relaxed) => {
                LoadError::Unknown { origin, why: format!("its answer did not come within {within}") }
            }
            LoadError::Rejected { origin, why }
            | LoadError::Failed { origin, why }
            | LoadError::Unreachable { origin, why }
            | LoadError::Unusable { origin, why }
                if doubtful =>
            {
                LoadError::Unknown { origin, why: format!("the first attempt was not answered, and after the second {why}") }
            }
            error => error,
        }
    }
}

impl Orders {
    pub(super) fn new(
        origin: &Origin,
        keys: &KeyPattern,
        load: &Load,
        store: &Store,
        carriage: Carriage,
    ) -> Result<Self, OriginError> {
        match (&origin.kind, &load.query, store) {
            (OriginKind::Sql { url }, Query::Sql { .. }, Store::Sql { write, delete, version, increment }) => {
                let texts = sql::Texts {
                    write,
                    delete: delete.as_deref(),
                    version: version.as_ref(),
                    increment: increment.as_deref(),
                    carriage,
                    is_of_hashes: load.reply == Some(ReplyForm::Hash),
                };
                Ok(Self::Sql(Box::new(sql::Orders::new(keys, url, &texts)?)))
            }
            (OriginKind::Http { .. }, Query::Http { path }, Store::Http { if_match }) => {
                Ok(Self::Http { question: http::Question::new(keys, path, load.reply)?, if_match: *if_match })
            }
            _ => Err(OriginError::WrongTerms(origin.name.clone())),
        }
    }
}

impl Writer {
    pub(super) fn new(source: Arc<Source>, keys: KeyPattern, orders: Orders) -> Self {
        Self { inner: Arc::new(Inner { source, keys, orders }), mark: None }
    }

    /// The same, whose changes are known to the reader of this slot: it says nothing of the keys that they are of, since the cache has heard
    /// of them. Each costs a round trip more.
    #[must_use]
    pub fn marked(self, slot: Option<&str>) -> Self {
        Self { mark: slot.map(Arc::from), ..self }
    }

    /// What is noted in the database's log beside a change.
    pub(super) fn note(&self, key: &[u8]) -> Option<Vec<u8>> {
        self.mark.as_ref().map(|slot| changes::note(slot, key))
    }

    /// Whether keys can be deleted.
    pub fn deletes(&self) -> bool {
        match &self.inner.orders {
            Orders::Sql(orders) => orders.deletes(),
            Orders::Http { .. } => true,
        }
    }

    /// The fields that a value must have, and no others, where values are hashes.
    pub fn fields(&self) -> Option<&[String]> {
        match &self.inner.orders {
            Orders::Sql(orders) => orders.fields(),
            Orders::Http { .. } => None,
        }
    }

    /// Whether numbers can be raised.
    pub fn increments(&self) -> bool {
        matches!(&self.inner.orders, Orders::Sql(orders) if orders.increments())
    }

    /// Whether several changes can be made together, all of them or none.
    pub fn is_transactional(&self) -> bool {
        matches!(self.inner.orders, Orders::Sql(_))
    }

    /// Whether a change takes heed of what was last seen of its key.
    pub fn takes_tags(&self) -> bool {
        matches!(self.inner.orders, Orders::Http { if_match: true, .. })
    }

    /// Makes all changes, or none. Takes at most the origin's timeout. What came of each, in their order.
    ///
    /// # Errors
    /// [`LoadError::Unknown`] where they may have been made; with every other error nothing has changed.
    pub async fn write(&self, changes: &[Change], id: &str) -> Result<Vec<Changed>, LoadError> {
        self.write_as(changes, &[], id).await
    }

    /// As [`Writer::write`], with the version of each change, in their order, where statements take one.
    ///
    /// # Errors
    /// As there.
    pub async fn write_as(&self, changes: &[Change], versions: &[u64], id: &str) -> Result<Vec<Changed>, LoadError> {
        let Inner { source, keys, orders } = &*self.inner;
        let commits = Commits::default();
        let written = match (&source.backend, orders) {
            (Backend::Sql(database), Orders::Sql(orders)) => {
                let steps = changes.iter().enumerate().map(|(at, change)| {
                    let (parts, version) = (parts_of(keys, &change.key)?, versions.get(at).copied().unwrap_or(0));
                    let step = sql::Orders::step(&parts, change.value.clone(), version)?;
                    Some(step.noted(self.note(&change.key)).counted(orders.counter_of(&change.key)))
                });
                let steps = steps.collect::<Option<Vec<_>>>().ok_or_else(|| self.no_such_key())?;
                let named: Vec<Vec<u8>> = changes.iter().map(|change| change.key.clone()).collect();
                let run = |deadline| database.write(orders, &steps, deadline, &commits);
                source.gate.run(Asked::many(keys, &named), run).await
            }
            (Backend::Http(service), Orders::Http { question, if_match }) => {
                let [change] = changes else { return Err(self.one_at_a_time()) };
                let path =
                    parts_of(keys, &change.key).and_then(|parts| question.path(&parts)).ok_or_else(|| self.no_such_key())?;
                let tag = change.tag.as_deref().filter(|_| *if_match);
                let step = http::Step { path: &path, value: change.value.as_deref(), if_match: tag, id };
                let (step, commits) = (&step, &commits);
                let run =
                    |deadline| async move { service.write(question, step, deadline, commits).await.map(|changed| vec![changed]) };
                source.gate.run(Asked::one(keys, &change.key), run).await
            }
            _ => Err(LoadError::Unusable { origin: self.origin(), why: "told in the wrong terms".to_owned() }),
        };
        written.map_err(|error| commits.judge(error))
    }

    /// Raises the number under a key. Takes at most the origin's timeout. What came of it, with the number that it is now.
    ///
    /// # Errors
    /// As [`Writer::write`].
    pub async fn increment(&self, key: &[u8], by: i64) -> Result<Changed, LoadError> {
        let Inner { source, keys, orders } = &*self.inner;
        let (Backend::Sql(database), Orders::Sql(orders)) = (&source.backend, orders) else {
            return Err(LoadError::Unusable { origin: self.origin(), why: "it raises no numbers".to_owned() });
        };
        let step = parts_of(keys, key).and_then(|parts| sql::Orders::increment(&parts, by)).ok_or_else(|| self.no_such_key())?;
        let steps = [step.noted(self.note(key)).counted(orders.counter_of(key))];
        let commits = Commits::default();
        let run = |deadline| database.write(orders, &steps, deadline, &commits);
        let made = source.gate.run(Asked::one(keys, key), run).await.map_err(|error| commits.judge(error))?;
        Ok(made.into_iter().next().unwrap_or_default())
    }

    pub(super) fn keys(&self) -> &KeyPattern {
        &self.inner.keys
    }

    pub(super) fn orders(&self) -> &Orders {
        &self.inner.orders
    }

    fn origin(&self) -> String {
        self.inner.source.config.name.clone()
    }

    pub(super) fn no_such_key(&self) -> LoadError {
        let why = "a part of the key cannot be one of its: it is no text, or too long".to_owned();
        LoadError::Rejected { origin: self.origin(), why }
    }

    fn one_at_a_time(&self) -> LoadError {
        LoadError::Unusable { origin: self.origin(), why: "it takes one change at a time".to_owned() }
    }
}
