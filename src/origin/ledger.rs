//! Changes that come from a journal: in its order, each with effect once, by one consumer at a time.
//!
//! A database keeps a row of the table `larder_journal` for each part of a journal: how far it was applied, the position, and who may go
//! on, the fence. Both are looked at and changed in the very transaction that changes the data. So whoever is not the last to have
//! taken a part changes nothing any more, however long he slept, and what is told again because nobody heard that it was made is made
//! once.

use std::sync::Arc;

use super::error::LoadError;
use super::query_log::Asked;
use super::writer::{Change, Commits, Orders, Writer};
use super::{Backend, Source, parts_of, sql};

/// A change that stands in a journal.
#[derive(Debug, Clone)]
pub struct Entry {
    /// As what it counts: entries up to the part's position were made before.
    pub position: u64,
    /// The number of the write, which rises with each. Statements may take it as `$version`.
    pub version: u64,
    /// Of its rule, at the ledger's origin.
    pub writer: Writer,
    /// What changes.
    pub change: Change,
}

/// The right to go on in a part, and from where.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Hold {
    /// Above all earlier ones.
    pub fence: u64,
    /// Up to which entry all was made; zero at the beginning. Nobody who holds an older fence can move it any more.
    pub position: u64,
}

/// What came of a batch that the origin did not refuse.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// It is made, now or before.
    Applied,
    /// Another has taken the part since: nothing was changed.
    Fenced,
}

/// A part of a journal, as a database accounts for it. Cloning shares everything.
#[derive(Debug, Clone)]
pub struct Ledger {
    source: Arc<Source>,
    part: Arc<str>,
}

impl Ledger {
    pub(super) fn new(source: Arc<Source>, part: &str) -> Self {
        Self { source, part: Arc::from(part) }
    }

    /// Takes the part from whoever has it. The fence is `least` or more. Waits for a transaction of the one before to end, at most the
    /// origin's timeout. Makes the table where there is none and the login may.
    ///
    /// # Errors
    /// Every error leaves open whether the part was taken: take it again.
    pub async fn take(&self, least: u64) -> Result<Hold, LoadError> {
        let database = self.database()?;
        let least = self.number(least)?;
        self.source.gate.run(Asked::journalled(&[]), |deadline| database.take_part(&self.part, least, deadline)).await
    }

    /// Makes those of `entries` that lie behind what was applied, in their order, and moves the position to `upto`, all in one
    /// transaction or not at all. Takes at most the origin's timeout.
    ///
    /// # Errors
    /// [`LoadError::Rejected`]: one of the entries at least will not be had, and nothing has changed. [`LoadError::Unknown`]: tell it
    /// again, with the same fence or after having taken the part again.
    pub async fn apply(&self, fence: u64, upto: u64, entries: &[Entry]) -> Result<Verdict, LoadError> {
        let database = self.database()?;
        let commits = Commits::default();
        let posts = entries.iter().map(|entry| self.post(entry)).collect::<Result<Vec<_>, _>>()?;
        let batch = sql::Posting { part: &self.part, fence: self.number(fence)?, upto: self.number(upto)?, posts };
        let keys: Vec<Vec<u8>> = entries.iter().map(|entry| entry.change.key.clone()).collect();
        let run = |deadline| database.post(&batch, deadline, &commits);
        let outcome = self.source.gate.run(Asked::journalled(&keys), run).await;
        outcome.map_err(|error| commits.judge(error))
    }

    fn database(&self) -> Result<&sql::Database, LoadError> {
        match &self.source.backend {
            Backend::Sql(database) => Ok(database),
            Backend::Http(_) => Err(self.unusable("it is no database")),
        }
    }

    fn post<'e>(&self, entry: &'e Entry) -> Result<sql::Post<'e>, LoadError> {
        let Orders::Sql(orders) = entry.writer.orders() else { return Err(self.unusable("told in the wrong terms")) };
        let parts = parts_of(entry.writer.keys(), &entry.change.key);
        let step = parts.and_then(|parts| sql::Orders::step(&parts, entry.change.value.clone(), entry.version));
        let step = step.ok_or_else(|| entry.writer.no_such_key())?.noted(entry.writer.note(&entry.change.key));
        Ok(sql::Post { at: self.number(entry.position)?, orders, step })
    }

    /// As a database counts.
    fn number(&self, number: u64) -> Result<i64, LoadError> {
        i64::try_from(number).map_err(|_| self.unusable("the journal's numbers are beyond what a database can count"))
    }

    fn unusable(&self, why: &str) -> LoadError {
        LoadError::Unusable { origin: self.source.config.name.clone(), why: why.to_owned() }
    }
}
