//! How much the journals of a relay hold, asked of the cache's primary itself: that needs no relay that runs.

use std::collections::BTreeMap;
use std::net::SocketAddr;

use crate::journal::Partition;
use crate::journal::scripts::{self, Call, Status};
use crate::operator::admin::{Admin, AdminError, Entry};
use crate::policy::JournalName;

/// Why that is not known.
#[derive(Debug, thiserror::Error)]
pub enum LevelError {
    /// The cache did not answer.
    #[error(transparent)]
    Cache(#[from] AdminError),
    /// It gave an answer that is none.
    #[error("the journal `{0}` gives an unexpected answer")]
    Answer(JournalName),
}

/// How a journal is, over all of its partitions.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Level {
    /// Writes that are not trimmed.
    pub depth: u64,
    /// Their bytes.
    pub bytes: u64,
    /// The age of the oldest, in milliseconds: how far origins are behind.
    pub lag_ms: u64,
    /// Dead letters, which wait for a person.
    pub dead: u64,
    /// Keys whose last write no origin has.
    pub dirty: u64,
}

impl Level {
    /// With one more partition.
    fn add(&mut self, status: &Status) {
        self.depth += status.depth;
        self.bytes += status.bytes;
        self.lag_ms = self.lag_ms.max(status.age_ms());
        self.dead += status.dead;
        self.dirty += status.dirty;
    }

    /// Both together.
    #[must_use]
    pub fn and(self, other: Self) -> Self {
        Self {
            depth: self.depth + other.depth,
            bytes: self.bytes + other.bytes,
            lag_ms: self.lag_ms.max(other.lag_ms),
            dead: self.dead + other.dead,
            dirty: self.dirty + other.dirty,
        }
    }

    /// Whether origins have all that was acknowledged.
    pub const fn is_drained(&self) -> bool {
        self.depth == 0 && self.dirty == 0 && self.dead == 0
    }
}

/// Asks the primary how these journals are.
pub async fn ask<'a>(
    primary: SocketAddr,
    entry: Entry<'_>,
    journals: impl IntoIterator<Item = &'a JournalName>,
) -> Result<BTreeMap<JournalName, Level>, LevelError> {
    let mut admin = Admin::connect(primary, entry).await?;
    let mut levels = BTreeMap::new();
    for journal in journals {
        let mut level = Level::default();
        for partition in Partition::all(journal) {
            let answer: Vec<Vec<u8>> = evaluate(&mut admin, &scripts::status(&partition)).await?;
            let answer: Vec<&[u8]> = answer.iter().map(Vec::as_slice).collect();
            level.add(&scripts::status_answer(&answer).map_err(|_| LevelError::Answer(journal.clone()))?);
        }
        levels.insert(journal.clone(), level);
    }
    Ok(levels)
}

async fn evaluate(admin: &mut Admin, call: &Call) -> Result<Vec<Vec<u8>>, AdminError> {
    let words = call.command();
    let words: Vec<String> = words.iter().skip(1).map(|word| String::from_utf8_lossy(word).into_owned()).collect();
    admin.ask("EVAL", &words.iter().map(String::as_str).collect::<Vec<_>>()).await
}
