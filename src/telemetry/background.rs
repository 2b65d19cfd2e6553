//! What the second thread counts: policy, secrets, topology. All of it is rare.

use super::counter::SharedCounter;

/// Counts of the work beside the data path.
#[derive(Debug, Default)]
pub struct Background {
    /// The generation of the policy that is applied.
    pub policy_generation: SharedCounter,
    /// Policies that were refused, the older one staying.
    pub policy_rejected: SharedCounter,
    /// The generation of the policy that was refused last. Zero: none, or one without a generation.
    pub policy_refused_generation: SharedCounter,
    /// What was told to the control plane through the cache.
    pub heartbeats: SharedCounter,
    /// How many sidecars share the origins' connections, this one included.
    pub fleet: SharedCounter,
    /// Credentials or certificates that were refused, the older ones staying.
    pub secrets_rejected: SharedCounter,
    /// Credentials or certificates that were taken up after the start.
    pub secrets_renewed: SharedCounter,
    /// Changes of the primary or of the slot map.
    pub topology_changes: SharedCounter,
    /// Events that were carried out, or whose walk was begun.
    pub events: SharedCounter,
    /// Events about what no rule of this policy covers.
    pub events_foreign: SharedCounter,
    /// Events that were not understood.
    pub events_refused: SharedCounter,
    /// Keys that an event named and the login may not touch.
    pub events_forbidden: SharedCounter,
    /// Times that what was carried out might come back after a failover.
    pub events_unconfirmed: SharedCounter,
    /// Times that events were lost before they were read.
    pub event_gaps: SharedCounter,
    /// 1 while this sidecar reads the stream of events.
    pub events_reading: SharedCounter,
    /// Walks over all keys that came to their end.
    pub walks: SharedCounter,
    /// Names that they looked at.
    pub walk_seen: SharedCounter,
    /// Keys that they removed something of.
    pub walk_removed: SharedCounter,
    /// Rounds of questions to sentinels or nodes.
    pub discovery_rounds: SharedCounter,
    /// Those of them that found nothing to trust.
    pub discovery_failures: SharedCounter,
}
