//! Admission: pods that a CachePolicy selects get a sidecar.
//!
//! [`patch`] decides what becomes of a pod, and is pure.

mod annotations;
mod container;
mod diff;
mod environment;
mod owner;
mod patch;
mod volumes;

#[cfg(test)]
mod tests;

pub use diff::Step;
pub use patch::{Occasion, Outcome, Settings, inject};
