//! How much a journal holds, over all of its partitions. Pure.

use super::scripts::Status;

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
    pub fn add(&mut self, status: &Status) {
        let Status { depth, bytes, dead, dirty, .. } = *status;
        *self = self.and(Self { depth, bytes, lag_ms: status.age_ms(), dead, dirty });
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
