//! Admission: pods that a CachePolicy selects get a sidecar, and who writes a policy is told where it has no effect.
//!
//! [`patch`] decides what becomes of a pod, and [`advice`] what is said of a policy; both are pure. [`known`] is what the API server holds,
//! [`serve`] answers it, and [`certificates`] sees that it believes the answers. [`missed`] finds pods that were made while nobody
//! answered. [`run`] puts them together.

mod advice;
mod annotations;
mod certificates;
mod container;
mod environment;
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
