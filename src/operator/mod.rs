//! The operator: what a CacheCluster needs, as a plan, and how it is carried out on Kubernetes.
//!
//! [`controller`] decides when a CacheCluster, or the policies of a namespace, are looked at, [`cache_cluster`] and [`cache_policy`] what is
//! done then; [`watches`] is what the API server holds.

pub mod admin;
pub mod api_error;
pub mod cache_cluster;
pub mod cache_policy;
pub mod controller;
pub mod election;
pub mod events;
#[cfg(test)]
mod fake_api;
#[cfg(test)]
mod fake_server;
pub mod held;
pub mod metrics;
pub mod owner;
pub mod queue;
pub mod serve;
pub mod switches;
pub mod watches;
