//! Steps of a look at a CacheCluster that take more than one command: a primary is handed over, slots move.

use std::net::SocketAddr;
use std::time::Duration;

use tokio::time::Instant;
use tracing::info;

use super::super::act::ActError;
use super::super::apply;
use super::super::cluster_handover::ClusterHandover;
use super::super::handover::{self, Handover};
use super::super::names::SERVER_PORT;
use super::super::plan::{self, Observed, ServerId, SlotSet, Way};
use super::super::resharding::{Move, Resharding};
use super::super::written::Built;
use super::{HANDOVER_LIMIT, Look, Memory};
use crate::operator::admin::Entry;

/// How long slots move key by key before everything is looked at again. A look takes about half a second.
const SLOTS_AT_A_LOOK: Duration = Duration::from_secs(2);

/// Where a server listens.
fn address(built: &Built, id: ServerId) -> Option<SocketAddr> {
    built.addresses.servers.get(&id).map(|ip| SocketAddr::new(*ip, SERVER_PORT))
}

impl Look<'_> {
    /// Hands a primary over to another, within a deadline.
    pub(super) async fn hand_over(
        &self,
        built: &Built,
        entry: Entry<'_>,
        (from, to): (ServerId, ServerId),
        observed: &Observed,
        memory: &mut Memory,
    ) -> Result<(), ActError> {
        apply::check_leads(self.context)?;
        // One that is cut short leaves writes paused for a while.
        if self.until.saturating_duration_since(Instant::now()) < handover::longest(HANDOVER_LIMIT) {
            return Err(ActError::NoTime);
        }
        let (Some(from), Some(to)) = (address(built, from), address(built, to)) else { return Ok(()) };
        info!(key = %self.place.key, %from, %to, "hands the primary over");
        if self.wanted.is_cluster() {
            let primaries = plan::primaries(observed).into_values();
            let primaries: Vec<SocketAddr> = primaries.filter_map(|id| address(built, id)).collect();
            let (leadership, limit) = (&self.context.leadership, HANDOVER_LIMIT);
            let outcome = ClusterHandover { from, to, primaries: &primaries, entry, leadership, limit }.run().await;
            memory.handover_failed = outcome.is_err().then(Instant::now);
            return outcome.map(drop).map_err(ActError::from);
        }
        let (master, sentinels, leadership) = (self.wanted.master_name(), &built.sentinels(), &self.context.leadership);
        let handover = Handover { master, from, to, sentinels, entry, leadership, limit: HANDOVER_LIMIT };
        // It may be dropped in the middle, or fail to put back what it set.
        memory.unpreferred.clear();
        let outcome = handover.run().await;
        memory.handover_failed = outcome.is_err().then(Instant::now);
        outcome.map(drop).map_err(ActError::from)
    }

    /// Moves slots from one server to another for a while, and begins no more of them where another operator leads. What fails is told by
    /// the status, and tried again.
    pub(super) async fn move_slots(
        &self,
        built: &Built,
        entry: Entry<'_>,
        ([from, to], slots, way): ([ServerId; 2], &SlotSet, Way),
        resharding: &mut Resharding,
    ) -> Result<(), ActError> {
        apply::check_leads(self.context)?;
        let (Some(from), Some(to)) = (address(built, from), address(built, to)) else { return Ok(()) };
        let until = (Instant::now() + SLOTS_AT_A_LOOK).min(self.until);
        let go_on = || Instant::now() < until && self.context.leadership.holds();
        resharding.move_slots(Move { from, to, slots, way }, entry, go_on).await;
        Ok(())
    }
}
