//! What the user of a binding can do, as its policies say.

use std::collections::BTreeSet;

use super::passwords::Passwords;
use super::relay::journals_of;
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

/// What the sidecars of a binding need under this snapshot, with these passwords. `known`: what its user can do already.
pub fn grant(snapshot: &Snapshot, passwords: &Passwords, known: Option<&Grant>) -> Grant {
    let with = |password: &str| {
        let grant = Grant::new(password, globs(snapshot), snapshot.allow.flush, snapshot.allow.keys);
        grant.with_journals(journals(snapshot)).with_feeds(feeds(snapshot))
    };
    with_passwords(with, passwords, known)
}

/// What a relay needs under this snapshot, with these passwords, and what a person needs in its pod. `known`: what its user can do already.
pub fn relay_grant(snapshot: &Snapshot, passwords: &Passwords, known: Option<&Grant>) -> Grant {
    let behind = snapshot.rules.iter().filter(|rule| rule.strategy.behind().is_some());
    // Of a dead letter that a person gives up, the cached value goes.
    let keys: BTreeSet<String> = behind.flat_map(|rule| rule.keys.globs()).collect();
    let with = |password: &str| Grant::of_relay(password, journals(snapshot)).with_feeds(feeds(snapshot)).with_keys(keys);
    with_passwords(with, passwords, known)
}

/// The slots by which the databases are read that rules of a snapshot follow.
fn feeds(snapshot: &Snapshot) -> BTreeSet<String> {
    snapshot.feeds.iter().map(|feed| feed.slot.clone()).collect()
}

/// The names of the journals that rules of a snapshot write behind to, and of the queues by which they are loaded, which lie beside these.
pub fn journals(snapshot: &Snapshot) -> BTreeSet<String> {
    let queues = snapshot.load_queues().map(|(queue, _)| queue.clone());
    journals_of(snapshot).into_keys().chain(queues).map(String::from).collect()
}

/// A grant with these passwords: the one that sidecars have, and the one that they are to have. Where the first is lost, its hash is what
/// is `known` of it, and it works on.
pub fn with_passwords(with: impl FnOnce(&str) -> Grant, passwords: &Passwords, known: Option<&Grant>) -> Grant {
    match (&passwords.current, &passwords.next, known) {
        (Some(current), Some(next), _) => with(current).and(next),
        (None, Some(next), Some(known)) => with(next).with_password_of(known).and(next),
        (None, Some(next), None) => with(next),
        (current, None, _) => with(current.as_deref().unwrap_or_default()),
    }
}
