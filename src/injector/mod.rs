//! Admission: pods that a CachePolicy selects get a sidecar, who writes a policy is told where it has no effect, and what is written behind
//! has a CacheCluster that can carry it.
//!
//! [`patch`] decides what becomes of a pod, [`advice`] what is said of a policy, and [`journals`] what is refused; all are pure. [`known`] is what the API server holds,
//! [`serve`] answers it, and [`certificates`] sees that it believes the answers. [`missed`] finds pods that were made while nobody
//! answered. [`run`] puts them together.

mod advice;
mod annotations;
mod certificates;
mod container;
mod environment;
mod journals;
mod known;
mod missed;
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
