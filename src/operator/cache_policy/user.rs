//! What the user of a binding can do, as its policies say.

use std::collections::BTreeSet;

use crate::operator::cache_cluster::users::Grant;
use crate::policy::{KeyPattern, Snapshot};

/// The most bytes of a binding's globs: a server goes through them at every command.
pub const MAX_GLOB_BYTES: usize = 64 * 1024;

/// The globs of all keys that some rule covers, whatever its strategy, and whatever becomes of other keys in the sidecar: a workload is
/// let at its own keys, and `unmatched` says nothing of whose the others are. Who needs more of them writes a rule, `Bypass` if the
/// sidecar is to leave them alone.
pub fn globs(snapshot: &Snapshot) -> BTreeSet<String> {
    snapshot.patterns().flat_map(KeyPattern::globs).collect()
}

/// How many bytes they are.
pub fn size(globs: &BTreeSet<String>) -> usize {
    globs.iter().map(String::len).sum()
}

/// What the sidecars of a binding need under this snapshot, with this password.
pub fn grant(snapshot: &Snapshot, password: &str) -> Grant {
    Grant::new(password, globs(snapshot), snapshot.allow.flush, snapshot.allow.keys)
}
