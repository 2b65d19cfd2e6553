//! Requests → decisions, pure.
use super::resp::Protocol;
use crate::policy::Lifetime;

/// Which keys are covered, and how.
pub trait Coverage {
    /// The lifetime of a covered key.
    fn lifetime(&self, key: &[u8]) -> Option<Lifetime>;
    /// Whether its misses are loaded.
    fn read_through(&self, key: &[u8]) -> bool;
}

/// How a reply is turned.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ReplyRule {
    /// As it is.
    Same,
}
impl ReplyRule {
    /// Applies.
    pub fn apply(self, bytes: &[u8], _protocol: Protocol, out: &mut Vec<u8>) {
        out.extend_from_slice(bytes)
    }
}
