//! What a relay counts, and how it is shown to Prometheus.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};

use super::changes::figures::FeedFigures;
use super::loads::figures::LoadFigures;
use crate::journal::Level;
use crate::journal::scripts::Status;
use crate::policy::JournalName;
use crate::telemetry::readings::{Reading, ReadingKind, render};

/// Counts of one journal since the process began.
#[derive(Debug, Default)]
pub struct Counts {
    /// Entries that origins have got, those included that a later write of their key made needless.
    pub entries: AtomicU64,
    /// Changes that origins were told.
    pub changes: AtomicU64,
    /// Batches that were trimmed.
    pub batches: AtomicU64,
    /// Transactions and requests at origins, those included that failed.
    pub tellings: AtomicU64,
    /// Steps that came to nothing and were taken again.
    pub retries: AtomicU64,
    /// Times that a refused batch was halved.
    pub halvings: AtomicU64,
    /// Entries that became dead letters.
    pub dead_letters: AtomicU64,
    /// Partitions that were claimed.
    pub claims: AtomicU64,
    /// Times that another relay was found to have the partition.
    pub fenced: AtomicU64,
}

impl Counts {
    /// Adds to one of the counts.
    pub fn add(count: &AtomicU64, amount: usize) {
        count.fetch_add(amount as u64, Relaxed);
    }
}

/// How a journal is, and what of it is this relay's.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Share {
    /// How it is, over all of its partitions.
    pub level: Level,
    /// Partitions that this relay has.
    pub held: u64,
}

impl Share {
    /// Takes one more partition into account.
    pub fn add(&mut self, status: &Status, held: bool) {
        self.level.add(status);
        self.held += u64::from(held);
    }
}

type Journals = BTreeMap<JournalName, (Arc<Counts>, Share)>;

/// All figures of a relay. Cloning shares them.
#[derive(Debug, Clone, Default)]
pub struct Figures {
    journals: Arc<Mutex<Journals>>,
    feeds: FeedFigures,
    loads: LoadFigures,
}

impl Figures {
    /// The counts of a journal.
    pub fn counts(&self, journal: &JournalName) -> Arc<Counts> {
        let mut all = self.journals.lock().unwrap_or_else(PoisonError::into_inner);
        all.entry(journal.clone()).or_default().0.clone()
    }

    /// Those of feeds.
    pub fn feeds(&self) -> &FeedFigures {
        &self.feeds
    }

    /// Those of queues of loads.
    pub fn loads(&self) -> &LoadFigures {
        &self.loads
    }

    /// How a journal is now.
    pub fn set_share(&self, journal: &JournalName, share: Share) {
        let mut all = self.journals.lock().unwrap_or_else(PoisonError::into_inner);
        all.entry(journal.clone()).or_default().1 = share;
    }

    /// Everything in the OpenMetrics text format.
    pub fn render(&self) -> String {
        let all = self.journals.lock().unwrap_or_else(PoisonError::into_inner);
        let count = |name, help, read: fn(&Counts) -> &AtomicU64| {
            let lines = all.iter().map(|(journal, (counts, _))| (journal.to_string(), read(counts).load(Relaxed)));
            Reading { name, help, kind: ReadingKind::Count, label: "journal", lines: lines.collect() }
        };
        let level = |name, help, read: fn(&Share) -> u64| {
            let lines = all.iter().map(|(journal, (_, share))| (journal.to_string(), read(share)));
            Reading { name, help, kind: ReadingKind::Level, label: "journal", lines: lines.collect() }
        };
        let mut readings = vec![
            level("larder_journal_lag_milliseconds", "Age of the oldest write that no origin has", |share| share.level.lag_ms),
            level("larder_journal_depth", "Writes that are not trimmed", |share| share.level.depth),
            level("larder_journal_bytes", "Bytes of writes that are not trimmed", |share| share.level.bytes),
            level("larder_journal_dirty", "Keys whose last write no origin has", |share| share.level.dirty),
            level("larder_journal_dead", "Dead letters that wait for a person", |share| share.level.dead),
            level("larder_relay_partitions", "Partitions that this relay has", |share| share.held),
            count("larder_relay_entries", "Writes that origins have got, or that a later one made needless", |c| &c.entries),
            count("larder_relay_changes", "Changes that origins were told", |c| &c.changes),
            count("larder_relay_batches", "Batches that were trimmed", |c| &c.batches),
            count("larder_relay_tellings", "Transactions and requests at origins", |c| &c.tellings),
            count("larder_relay_retries", "Steps that came to nothing and were taken again", |c| &c.retries),
            count("larder_relay_halvings", "Times that a refused batch was halved", |c| &c.halvings),
            count("larder_relay_dead_letters", "Writes that became dead letters", |c| &c.dead_letters),
            count("larder_relay_claims", "Partitions that were claimed", |c| &c.claims),
            count("larder_relay_fenced", "Times that another relay was found to have the partition", |c| &c.fenced),
        ];
        readings.extend(self.feeds.readings());
        readings.extend(self.loads.readings());
        render(readings)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_are_told_by_journal() {
        let figures = Figures::default();
        let journal: JournalName = "shop.users".parse().expect("a name");
        Counts::add(&figures.counts(&journal).entries, 7);
        let level = Level { depth: 3, lag_ms: 1_500, ..Level::default() };
        figures.set_share(&journal, Share { level, held: 0 });
        let text = figures.render();
        for line in [
            "larder_relay_entries_total{journal=\"shop.users\"} 7",
            "larder_journal_depth{journal=\"shop.users\"} 3",
            "larder_journal_lag_milliseconds{journal=\"shop.users\"} 1500",
            "# EOF",
        ] {
            assert!(text.lines().any(|found| found == line), "{line} is not in\n{text}");
        }
    }
}
