//! What a CacheCluster needs, as a plan.

pub mod cache_cluster;
