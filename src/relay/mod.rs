//! What is written behind, on its way from the journal to the origins; and what databases changed, on its way to the cache ([`changes`]); and
//! [loads] for sidecars that are too many to have a connection each.
//!
//! Each partition of a journal has one [consumer] at a time, which a claim in the journal names. It reads the front of the partition, makes
//! sure that what it read cannot vanish, and tells the origins, by [`plan`]: the last write of each key, in one transaction with the position
//! up to which the origin has everything. Then what the origins have is no longer dirty, and is trimmed.
//!
//! What makes it right does not depend on clocks: a claim's fence in the journal and another at each origin end what an earlier consumer
//! still does, however long it stood still. Claims only keep relays out of each other's way.

pub mod changes;
pub mod consumer;
pub mod desk;
pub mod drain;
pub mod figures;
pub mod footing;
pub mod hub;
pub mod loads;
pub mod plan;
pub mod rules;
pub mod run;
pub mod share;
#[cfg(test)]
mod simulation;
