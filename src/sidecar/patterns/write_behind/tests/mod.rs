//! Random histories of two keys of one partition: sidecars that write, read and die at any step, servers that are killed, lose power,
//! hang and are replaced, also by one that hung when they had their latest writes, and relays that overtake each other.
//!
//! What must hold: a read gives nothing older than what was acknowledged before it began, whatever fails over in between; and when all has
//! come to its end the origin has the last write that the journal kept, which is no older than the last acknowledged one, the dirty
//! index is empty, and the cache has what the origin has or nothing.

mod actors;
mod world;

use crate::journal;
use crate::sidecar::patterns::write_through::model as key;
use world::World;

/// What breaks the simulated parts, to show that it would be noticed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Switch {
    Nothing,
    /// Something of what is beside the key.
    Key(key::Broken),
    /// Something of the partition.
    Journal(journal::model::Broken),
    /// A write is acknowledged when the primary has it.
    Unconfirmed,
    /// One replica is enough.
    OneReplica,
    /// A replica that is taken for dead is waited for no longer, though it may be promoted.
    Stray,
    /// Memory is enough.
    Memory,
    /// A mark need not be confirmed.
    MarkUnconfirmed,
    /// A miss asks the origin at once.
    DirtyUnread,
    /// A miss looks at the dirty index before it has its lease.
    DirtyFirst,
    /// The relay clears before the origin has it.
    ClearedEarly,
    /// The relay tells the origin what may still vanish.
    RelayUnconfirmed,
    /// The origin takes what it is told, in whatever order.
    Order,
    /// The origin is told past the journal before it is sure that nobody journals meanwhile.
    LeaveUnconfirmed,
}

fn histories() -> u64 {
    std::env::var("HISTORIES").ok().and_then(|text| text.parse().ok()).unwrap_or(10_000)
}

#[test]
fn no_acknowledged_write_is_lost_and_no_read_is_older() {
    let mut seen = world::Seen::default();
    for seed in 0..histories() {
        let mut world = World::new(seed, Switch::Nothing);
        if world.play().is_err() {
            let mut again = World::new(seed, Switch::Nothing);
            again.traces = true;
            panic!("seed {seed}: {:?}\n{}", again.play(), again.trace.join("\n"));
        }
        seen.add(&world.seen);
    }
    // All of it happens, so that what holds is not held of nothing.
    let least = histories() / 50;
    let world::Seen { acknowledged, failovers, strays, vanished, from_dirty, filled, refused_commits, detours } = seen;
    assert!(
        [acknowledged, failovers, strays, vanished, from_dirty, filled, refused_commits].iter().all(|count| *count > least)
            && detours > least / 4,
        "{seen:?}"
    );
}

#[test]
fn each_switch_is_noticed() {
    for switch in [
        Switch::Key(key::Broken::Mark),
        Switch::Key(key::Broken::Removal),
        Switch::Key(key::Broken::Revocation),
        Switch::Key(key::Broken::Version),
        Switch::Key(key::Broken::Overlap),
        Switch::Journal(journal::model::Broken::ClearedVersion),
        Switch::Journal(journal::model::Broken::Lateness),
        Switch::Journal(journal::model::Broken::Absence),
        Switch::Journal(journal::model::Broken::Precedence),
        Switch::Unconfirmed,
        Switch::OneReplica,
        Switch::Stray,
        Switch::Memory,
        Switch::MarkUnconfirmed,
        Switch::DirtyUnread,
        Switch::DirtyFirst,
        Switch::ClearedEarly,
        Switch::RelayUnconfirmed,
        Switch::Order,
        Switch::LeaveUnconfirmed,
    ] {
        // Some take more than one in ten thousand.
        let found = (0..4 * histories()).find(|seed| World::new(*seed, switch).play().is_err());
        assert!(found.is_some(), "{switch:?} is not noticed");
    }
}
