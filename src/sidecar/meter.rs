//! What a worker counts.

use super::policy::RuleId;
use super::upstream::node::NodeAddr;

/// One worker's counters.
#[derive(Debug, Default)]
pub struct Meter {}

impl Meter {
    /// A read was answered; null is a miss.
    #[inline]
    pub fn count_read(&self, _rule: RuleId, _null: bool) {}
    /// A load began.
    pub fn load(&self, _rule: RuleId) {}
    /// A load failed.
    pub fn load_error(&self, _rule: RuleId) {}
    /// A read waited for a load that another had begun.
    pub fn coalesced(&self, _rule: RuleId) {}
    /// A read was served a stale copy.
    pub fn stale(&self, _rule: RuleId) {}
    /// A read was answered by a negative entry.
    pub fn negative(&self, _rule: RuleId) {}
    /// A connection ended.
    pub fn reconnect(&self, _node: &NodeAddr) {}
    /// A redirect was followed.
    pub fn redirect(&self) {}
    /// A client came.
    pub fn client_came(&self) {}
    /// A client left.
    pub fn client_left(&self) {}
}
