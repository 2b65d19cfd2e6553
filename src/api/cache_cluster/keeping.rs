//! What a CacheCluster keeps of what it was told, as far as policies depend on it.

use super::{CacheClusterSpec, Eviction, Fsync};

/// What servers drop when they are full, and what of their data is on disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Keeping {
    /// What a full server drops.
    pub eviction: Eviction,
    /// When a write is on the disk. `None`: never, all data is in memory.
    pub fsync: Option<Fsync>,
}

impl Keeping {
    /// Whether a write can be on the disk before it is acknowledged.
    pub const fn is_durable(self) -> bool {
        matches!(self.fsync, Some(Fsync::Always))
    }
}

impl CacheClusterSpec {
    /// What its servers keep.
    pub fn keeping(&self) -> Keeping {
        let fsync = self.storage.as_ref().map(|storage| storage.fsync.unwrap_or_default());
        Keeping { eviction: self.eviction(), fsync }
    }
}
