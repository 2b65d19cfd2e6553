//! What of a snapshot is about one database's changes.

use super::rows::Watch;
use crate::origin::OriginError;
use crate::origin::changes::{Database, Needs, Place};
use crate::policy::changes::{Feed, Follow};
use crate::policy::{Mode, Snapshot};

/// A database, and who follows which of its tables.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Followed {
    /// The database.
    pub database: Database,
    /// Its slot and its publication.
    pub place: Place,
    /// The rules that follow its tables. Those that only observe do not.
    pub watches: Vec<Watch>,
    /// How many bytes of its log it keeps while the cache takes nothing.
    pub max_lag: u64,
    /// The policy whose rules they are, where sidecars may call them after it.
    pub policy: Option<String>,
    /// Whether nobody follows it any more: slot and publication are to be taken away.
    pub ends: bool,
}

impl Followed {
    /// Reads a feed of `snapshot`. Connects to nothing.
    ///
    /// # Errors
    /// Its origin is none that tells of its changes.
    pub fn new(snapshot: &Snapshot, feed: &Feed) -> Result<Self, OriginError> {
        let origin = snapshot.origins.iter().find(|origin| origin.name == feed.origin);
        let origin = origin.ok_or_else(|| OriginError::Unknown(feed.origin.clone()))?;
        let watch = |follow: &Follow| {
            let rule = snapshot.rules.iter().find(|rule| rule.name == follow.rule && rule.mode == Mode::Enforce)?;
            Some(Watch { keys: rule.keys.clone(), follow: follow.clone() })
        };
        Ok(Self {
            database: Database::new(origin)?,
            place: Place { slot: feed.slot.clone(), publication: feed.publication.clone(), given: feed.given },
            watches: feed.follows.iter().filter_map(watch).collect(),
            max_lag: feed.max_lag.as_bytes(),
            policy: feed.policy.clone(),
            ends: feed.follows.is_empty(),
        })
    }

    /// The tables that are followed, with the columns that keys and tags are made from.
    pub fn tables(&self) -> Needs {
        let mut tables = Needs::new();
        for Watch { keys, follow } in &self.watches {
            let columns = follow.columns(keys).into_iter().map(str::to_owned);
            tables.entry(follow.table.clone()).or_default().extend(columns);
        }
        tables
    }
}
