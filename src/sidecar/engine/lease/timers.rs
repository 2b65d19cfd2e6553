//! Deadlines, soonest first. What is no longer due is left in and skipped by its owner.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use super::Millis;

/// What is due.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Due {
    /// A request's wait ends. Its slot, and which of the slot's tenants.
    Request(u32, u32),
    /// A key wants attention. Its slot, and which of the slot's tenants.
    Key(u32, u32),
}

/// A heap of deadlines.
#[derive(Debug, Default)]
pub(super) struct Timers(BinaryHeap<Reverse<(Millis, Due)>>);

impl Timers {
    /// Adds a deadline.
    pub(super) fn push(&mut self, at: Millis, due: Due) {
        self.0.push(Reverse((at, due)));
    }

    /// The soonest.
    pub(super) fn next(&self) -> Option<Millis> {
        self.0.peek().map(|Reverse((at, _))| *at)
    }

    /// Takes out one that is due at `now`.
    pub(super) fn pop(&mut self, now: Millis) -> Option<Due> {
        self.next().filter(|at| *at <= now)?;
        self.0.pop().map(|Reverse((_, due))| due)
    }

    /// How many, those that are no longer due included.
    pub(super) fn len(&self) -> usize {
        self.0.len()
    }

    /// Drops what is no longer due.
    pub(super) fn retain(&mut self, mut keep: impl FnMut(Due) -> bool) {
        self.0.retain(|Reverse((_, due))| keep(*due));
    }
}
