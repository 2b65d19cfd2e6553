//! The operator: what a CacheCluster needs, as a plan, and how it is carried out on Kubernetes.
//!
//! [`controller`] decides when a CacheCluster is looked at, [`cache_cluster`] what is done then; [`watches`] is what the API server holds.
//! [`cache_policy`] makes of CachePolicies what a workload's sidecars are to be told; nothing calls it yet.

pub mod admin;
pub mod api_error;
pub mod cache_cluster;
pub mod cache_policy;
pub mod controller;
pub mod election;
#[cfg(test)]
mod fake_api;
pub mod held;
pub mod metrics;
pub mod queue;
pub mod serve;
pub mod switches;
pub mod watches;
