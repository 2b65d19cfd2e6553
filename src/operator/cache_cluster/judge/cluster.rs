//! Verdicts on a Cluster, where slots take the place of the one primary, and primaries that of the sentinels.

use super::super::plan::{self, CrowdedPrimaries, Link, Role, SLOTS, ServerState};
use super::super::report::Verdict;
use super::Seen;

impl Seen<'_> {
    /// How many servers serve: primaries, and replicas in step.
    pub fn serving(&self) -> usize {
        let primaries =
            if self.wanted.is_cluster() { plan::primaries(self.observed).len() } else { usize::from(self.acting().is_some()) };
        primaries + self.in_step()
    }

    /// How many replicas follow the primaries of their shards in step.
    pub(super) fn in_step_in_cluster(&self) -> usize {
        let primaries = plan::primaries(self.observed);
        let servers = self.observed.servers.iter();
        let in_step = servers.filter(|(id, server)| {
            let primary = primaries.get(&id.shard).and_then(|primary| self.observed.servers.get(primary));
            match (&server.state, primary) {
                (ServerState::Running(facts), Some(primary)) => {
                    facts.role == Role::Replica { of: primary.address, link: Link::Up }
                }
                _ => false,
            }
        });
        in_step.count()
    }

    pub(super) fn ready_in_cluster(&self) -> Verdict {
        let primaries = plan::primaries(self.observed);
        if plan::serves_all_slots(self.observed) {
            let leads = |server| primaries.values().any(|primary| *primary == server);
            if let Some(lag) = self.lags.iter().find(|lag| leads(lag.server) && !self.initialized) {
                return Verdict::no("Forming", self.tell_of(lag));
            }
            return Verdict::yes("Serving", format!("{} primaries own all {SLOTS} slots", primaries.len()));
        }
        if !self.initialized {
            return Verdict::no("Forming", self.waits());
        }
        if let Some(held) = self.held() {
            return Verdict::no("Held", held);
        }
        let (count, of) = (primaries.len(), self.wanted.shards());
        Verdict::no("SlotsNotServed", format!("{count} of {of} shards have a primary: {}", self.waits()))
    }

    /// Slots that are not where the number of shards wants them.
    pub(super) fn uneven(&self) -> Option<Verdict> {
        let left = plan::slots_to_move(self.desired, self.observed).filter(|left| *left > 0)?;
        let message = format!(
            "{left} slots are to move for {} shards, and the operator moves none yet: every slot is served; write the former number",
            self.wanted.shards()
        );
        Some(Verdict::yes("SlotsNotMoved", message))
    }

    /// One node carries too many primaries, in words.
    pub(super) fn crowded_in_cluster(&self) -> Option<Verdict> {
        let CrowdedPrimaries { node, primaries, of } = plan::crowded_primaries(self.observed, &plan::primaries(self.observed))?;
        let message = format!(
            "node {node} holds {} of {of} primaries, and without it nobody can fail over: one of them hands over where a replica in step is \
             on another node; where that does not help, add nodes",
            primaries.len()
        );
        Some(Verdict::yes("TooFewNodes", message))
    }
}
