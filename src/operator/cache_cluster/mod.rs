//! One CacheCluster: what is seen of it, and what to do next.
//!
//! The pure middle ([`plan`]) takes no client, so that one planner serves both actuators: processes on one machine, and Kubernetes.

pub mod build;
pub mod observe;
pub mod plan;
