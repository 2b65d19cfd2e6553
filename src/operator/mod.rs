//! What a CacheCluster needs, as a plan.
