//! From a request to a decision. Pure: no I/O, no clock, no waiting.

pub mod early;
pub mod lease;
pub mod observe;
pub mod ttl;
