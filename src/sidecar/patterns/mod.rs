//! The caching patterns, one file each.

pub mod cache_aside;
pub mod read_through;
