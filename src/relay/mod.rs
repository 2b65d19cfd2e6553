//! What is to be written behind, on its way from a journal to the origins: the pure part. Nothing calls it yet.
//!
//! A partition of a journal has one relay at a time. It reads the front of the partition and tells the origins, by [`plan`]: the last write of
//! each key, in one transaction with the position up to which the origin has everything. [`drain`] says step by step what to ask of the
//! journal and of origins, and [`share`] which partitions a relay is to have. A simulation plays two relays that die and stand still at
//! every step.

pub mod drain;
pub mod plan;
pub mod share;
#[cfg(test)]
mod simulation;
