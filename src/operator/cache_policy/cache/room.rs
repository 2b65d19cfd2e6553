//! The memory that heartbeats may take here: that of one binding, and that of all.
//!
//! A sidecar takes some 300 bytes, and 16 for each count that is not zero. At the bounds that is 15 MB for sidecars and 32 MB for counts, of
//! which one binding gets 6 and 8. Beyond them sidecars are still counted, by their heartbeats alone, and the sums lack what they counted.

use std::sync::atomic::{AtomicUsize, Ordering};

/// The most sidecars of one binding that are told apart.
pub const SIDECARS_OF_ONE: usize = 20_000;
/// The most of all bindings.
pub const SIDECARS: usize = 50_000;
/// The most counts of one binding's sidecars.
pub const COUNTS_OF_ONE: usize = 500_000;
/// The most of all.
pub const COUNTS: usize = 2_000_000;

/// What is left for all bindings.
#[derive(Debug)]
pub struct Room {
    sidecars: AtomicUsize,
    counts: AtomicUsize,
}

impl Default for Room {
    fn default() -> Self {
        Self::of(SIDECARS, COUNTS)
    }
}

impl Room {
    /// So much, and no more.
    pub fn of(sidecars: usize, counts: usize) -> Self {
        Self { sidecars: sidecars.into(), counts: counts.into() }
    }

    /// Room for one more sidecar, where there is any.
    pub fn take_sidecar(&self) -> bool {
        take(&self.sidecars, 1)
    }

    /// They are gone.
    pub fn give_sidecars(&self, sidecars: usize) {
        self.sidecars.fetch_add(sidecars, Ordering::Relaxed);
    }

    /// Room for so many more counts, where there is that much.
    pub fn take_counts(&self, counts: usize) -> bool {
        take(&self.counts, counts)
    }

    /// They are gone.
    pub fn give_counts(&self, counts: usize) {
        self.counts.fetch_add(counts, Ordering::Relaxed);
    }

    /// How many sidecars and counts there is room for.
    #[cfg(test)]
    pub fn left(&self) -> (usize, usize) {
        (self.sidecars.load(Ordering::Relaxed), self.counts.load(Ordering::Relaxed))
    }
}

fn take(left: &AtomicUsize, wanted: usize) -> bool {
    left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(wanted)).is_ok()
}
