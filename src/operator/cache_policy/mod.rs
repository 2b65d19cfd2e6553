//! CachePolicies: what the operator makes of them for each workload. Pure, so far: watches and writes are still to come.
//!
//! A workload that policies select has a [binding](crate::policy::binding) with the CacheCluster that they name. [`merge`] makes one
//! snapshot of the policies, or says of each why it has no part in it; [`place`] and [`origins`] know where a sidecar finds what the
//! snapshot names; [`user`] is what its login can do; [`objects`] is what lies in the workload's namespace.

pub mod cache;
pub mod merge;
pub mod objects;
pub mod origins;
pub mod place;
pub mod user;
pub mod verdict;
pub mod workload;
