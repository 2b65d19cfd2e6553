//! The caching patterns, one file each.

pub mod read_through;
