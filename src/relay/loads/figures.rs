//! What a relay counts of the loads that it makes for sidecars.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};

use crate::policy::JournalName;
use crate::telemetry::readings::{Reading, ReadingKind};

/// Counts and levels of one queue since the process began.
#[derive(Debug, Default)]
pub struct Counts {
    /// Keys that were loaded, those that came to an error included.
    pub keys: AtomicU64,
    /// Keys of which sidecars were told an error.
    pub errors: AtomicU64,
    /// Requests at the origin now.
    pub under_way: AtomicU64,
    /// Times that the queue was claimed from nobody or from another relay.
    pub claims: AtomicU64,
    /// Answers that the cache did not take.
    pub undelivered: AtomicU64,
}

impl Counts {
    /// Adds to one of them.
    pub fn add(count: &AtomicU64, amount: usize) {
        count.fetch_add(amount as u64, Relaxed);
    }

    /// Sets one that is a level.
    pub fn set(level: &AtomicU64, value: usize) {
        level.store(value as u64, Relaxed);
    }
}

/// All queues' figures. Cloning shares them.
#[derive(Debug, Clone, Default)]
pub struct LoadFigures(Arc<Mutex<BTreeMap<JournalName, Arc<Counts>>>>);

impl LoadFigures {
    /// Those of a queue.
    pub fn counts(&self, queue: &JournalName) -> Arc<Counts> {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        all.entry(queue.clone()).or_default().clone()
    }

    /// Everything as it is now.
    pub fn readings(&self) -> Vec<Reading> {
        let all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let reading = |kind, name, help, read: fn(&Counts) -> &AtomicU64| {
            let lines = all.iter().map(|(queue, counts)| (queue.to_string(), read(counts).load(Relaxed)));
            Reading { name, help, kind, label: "queue", lines: lines.collect() }
        };
        let (count, level) = (ReadingKind::Count, ReadingKind::Level);
        vec![
            reading(count, "larder_relay_loads", "Keys that were loaded for sidecars", |c| &c.keys),
            reading(count, "larder_relay_load_errors", "Keys of which sidecars were told an error", |c| &c.errors),
            reading(level, "larder_relay_loads_under_way", "Requests of sidecars at the origin now", |c| &c.under_way),
            reading(count, "larder_relay_load_claims", "Times that the queue of loads was claimed", |c| &c.claims),
            reading(count, "larder_relay_loads_undelivered", "Loads that the cache did not take", |c| &c.undelivered),
        ]
    }
}
