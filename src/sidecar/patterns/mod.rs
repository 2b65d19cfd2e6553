//! The caching patterns, one file each.

pub mod cache_aside;
pub mod observe;
pub mod read_through;
