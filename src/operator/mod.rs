//! What a CacheCluster needs, as a plan, and how its servers are asked and told.

pub mod admin;
pub mod cache_cluster;
