//! The rules that write behind, as a relay needs them: which journals there are, and who is told of which key.

use std::collections::BTreeMap;

use crate::journal::Partition;
use crate::origin::{Carriage, Ledger, OriginError, Origins, Writer};
use crate::policy::snapshot::OriginKind;
use crate::policy::{JournalName, RuleIndex, Snapshot};

/// What a rule's writes go to.
#[derive(Debug, Clone)]
pub struct Outlet {
    /// The rule's name.
    pub rule: String,
    /// The origin's name.
    pub origin: String,
    /// Whether the origin keeps an account of what it was told.
    pub keeps_account: bool,
    /// How many writes it takes at once.
    pub at_once: usize,
    /// How long one may take at most.
    pub timeout_ms: u64,
    /// Who tells it.
    pub writer: Writer,
}

/// The rules of a snapshot. Immutable: a change makes another one.
#[derive(Debug)]
pub struct Rules {
    index: RuleIndex,
    outlets: Vec<Option<Outlet>>,
    /// Of each journal, the most entries that are read at once.
    journals: BTreeMap<JournalName, usize>,
    origins: Origins,
}

impl Rules {
    /// Prepares the rules of a snapshot, whose origins are `origins`. Connects to nothing.
    pub fn new(snapshot: &Snapshot, origins: &Origins) -> Result<Self, OriginError> {
        let mut journals: BTreeMap<JournalName, usize> = BTreeMap::new();
        let mut outlets = Vec::with_capacity(snapshot.rules.len());
        for rule in &snapshot.rules {
            let Some(behind) = rule.strategy.behind() else {
                outlets.push(None);
                continue;
            };
            let load = &behind.read.load;
            let origin = snapshot.origins.iter().find(|origin| origin.name == load.origin);
            let origin = origin.ok_or_else(|| OriginError::Unknown(load.origin.clone()))?;
            let batch = journals.entry(behind.journal.name.clone()).or_default();
            *batch = (*batch).max(behind.journal.batch as usize);
            outlets.push(Some(Outlet {
                rule: rule.name.clone(),
                origin: origin.name.clone(),
                keeps_account: matches!(origin.kind, OriginKind::Sql { .. }),
                at_once: origin.max_connections as usize,
                timeout_ms: origin.timeout.as_millis(),
                writer: origins.writer(&rule.keys, load, &behind.store, Carriage::Behind)?,
            }));
        }
        let index = RuleIndex::new(snapshot.patterns().cloned());
        Ok(Self { index, outlets, journals, origins: origins.clone() })
    }

    /// The journals, each with the most entries that are read at once.
    pub fn journals(&self) -> &BTreeMap<JournalName, usize> {
        &self.journals
    }

    /// Where writes of `key` go. `None`: no rule that writes behind covers it.
    pub fn outlet(&self, key: &[u8]) -> Option<&Outlet> {
        self.outlets.get(self.index.find(key)?)?.as_ref()
    }

    /// The account of a partition that an origin keeps.
    pub fn ledger(&self, origin: &str, partition: &Partition, journal: &JournalName) -> Result<Option<Ledger>, OriginError> {
        self.origins.ledger(origin, &format!("{journal}/{}", partition.number()))
    }

    /// The origins, whose connections the next rules go on with.
    pub fn origins(&self) -> &Origins {
        &self.origins
    }
}
