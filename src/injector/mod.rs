//! Admission: pods that a CachePolicy selects get a sidecar.
//!
//! [`patch`] decides what becomes of a pod, and is pure; [`known`] is what the API server holds, [`serve`] answers it, and
//! [`certificates`] sees that it believes the answers. [`run`] puts them together.

mod annotations;
mod certificates;
mod container;
mod environment;
mod known;
mod patch;
mod review;
mod run;
mod serve;
mod volumes;

#[cfg(test)]
mod tests;

pub use patch::{Occasion, Outcome, Settings, inject};
pub use run::{Config, bind, start};

pub use container::NAME as CONTAINER;
