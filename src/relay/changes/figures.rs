//! What a relay counts of feeds.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::SystemTime;

use crate::telemetry::readings::{Reading, ReadingKind};

/// Counts and levels of one feed since the process began.
#[derive(Debug, Default)]
pub struct Counts {
    /// Transactions that were read to their end.
    pub transactions: AtomicU64,
    /// Keys and tags that were named in events.
    pub keys: AtomicU64,
    /// Times that all keys of a rule were.
    pub rules: AtomicU64,
    /// Times that changes may have been lost.
    pub losses: AtomicU64,
    /// Times that the feed was claimed.
    pub claims: AtomicU64,
    /// Times that another relay was found to have it.
    pub fenced: AtomicU64,
    /// Attempts that came to nothing and were made again.
    pub retries: AtomicU64,
    /// Whether this relay reads it: one, or zero.
    pub reading: AtomicU64,
    /// From a commit to its events, in milliseconds: of the last that was said.
    pub lag_ms: AtomicU64,
    /// Since when everything is said that was committed before, in milliseconds since 1970 by this machine's clock. Zero: another relay's
    /// matter, or not known yet.
    pub through_ms: AtomicU64,
    /// Bytes of the log that the database keeps for the slot.
    pub slot_bytes: AtomicU64,
    /// What is wrong with tables that are followed: they cannot be told of, or not in full.
    pub troubles: AtomicU64,
}

impl Counts {
    /// Adds to one of them.
    pub fn add(count: &AtomicU64, amount: u64) {
        count.fetch_add(amount, Relaxed);
    }

    /// Sets one that is a level.
    pub fn set(level: &AtomicU64, value: u64) {
        level.store(value, Relaxed);
    }

    /// How old a change may be that is not said, in milliseconds. `None`: another relay knows.
    fn behind_ms(&self, now_ms: u64) -> Option<u64> {
        let through = self.through_ms.load(Relaxed);
        (through > 0).then(|| now_ms.saturating_sub(through))
    }
}

/// The time in milliseconds since 1970.
pub fn now_ms() -> u64 {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

/// All feeds' figures, by origin. Cloning shares them.
#[derive(Debug, Clone, Default)]
pub struct FeedFigures(Arc<Mutex<BTreeMap<String, Arc<Counts>>>>);

impl FeedFigures {
    /// Those of the feed of an origin.
    pub fn counts(&self, origin: &str) -> Arc<Counts> {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        all.entry(origin.to_owned()).or_default().clone()
    }

    /// Everything as it is now.
    pub fn readings(&self) -> Vec<Reading> {
        type Read = fn(&Counts) -> &AtomicU64;
        let all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let reading = |kind, name, help, read: Read| {
            let lines = all.iter().map(|(origin, counts)| (origin.clone(), read(counts).load(Relaxed))).collect();
            Reading { name, help, kind, label: "origin", lines }
        };
        let now = now_ms();
        let behind = all.iter().filter_map(|(origin, counts)| Some((origin.clone(), counts.behind_ms(now)?))).collect();
        let level = |name, help, read: Read| reading(ReadingKind::Level, name, help, read);
        let count = |name, help, read: Read| reading(ReadingKind::Count, name, help, read);
        vec![
            level("larder_changes_reading", "Whether this relay reads the database's changes", |c| &c.reading),
            Reading {
                name: "larder_changes_behind_milliseconds",
                help: "How old a change may be that is not said, at the relay that reads the database",
                kind: ReadingKind::Level,
                label: "origin",
                lines: behind,
            },
            level("larder_changes_lag_milliseconds", "From the last commit that was said to its events", |c| &c.lag_ms),
            level("larder_changes_slot_bytes", "Bytes of its log that the database keeps for the slot", |c| &c.slot_bytes),
            level("larder_changes_troubles", "Reasons why tables that are followed cannot be told of, or not in full", |c| {
                &c.troubles
            }),
            count("larder_changes_transactions", "Transactions that were read", |c| &c.transactions),
            count("larder_changes_keys", "Keys and tags that were named in events", |c| &c.keys),
            count("larder_changes_rules", "Times that all keys of a rule were named", |c| &c.rules),
            count("larder_changes_losses", "Times that changes may have been lost", |c| &c.losses),
            count("larder_changes_retries", "Attempts that came to nothing and were made again", |c| &c.retries),
            count("larder_changes_claims", "Times that a feed was claimed", |c| &c.claims),
            count("larder_changes_fenced", "Times that another relay was found to have a feed", |c| &c.fenced),
        ]
    }
}
