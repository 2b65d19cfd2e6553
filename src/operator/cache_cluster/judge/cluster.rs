//! Verdicts on a Cluster, where slots take the place of the one primary, and primaries that of the sentinels.

use super::super::plan::{self, Action, CrowdedPrimaries, Link, Role, SLOTS, ServerState};
use super::super::report::Verdict;
use super::Seen;

impl Seen<'_> {
    /// How many of the wanted servers serve: primaries, and replicas in step.
    pub fn serving(&self) -> usize {
        if !self.wanted.is_cluster() {
            return usize::from(self.acting().is_some()) + self.in_step();
        }
        let wanted = plan::primaries(self.observed).into_keys().filter(|shard| *shard < self.wanted.shards());
        wanted.count() + self.in_step()
    }

    /// How many replicas of the wanted shards follow their primaries in step.
    pub(super) fn in_step_in_cluster(&self) -> usize {
        let primaries = plan::primaries(self.observed);
        let servers = self.observed.servers.iter().filter(|(id, _)| id.shard < self.wanted.shards());
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

    /// How far a change of the number of shards is, in words.
    pub(super) fn tell_of_slots(&self) -> String {
        let waits = self.actions.iter().any(|action| matches!(action, Action::Wait(_)));
        match &self.resharding {
            Some(account) if waits => format!("{account}; {}", self.waits()),
            Some(account) => account.clone(),
            None if waits => self.waits(),
            None => "slots settle".to_owned(),
        }
    }

    /// One node carries too many primaries, in words.
    pub(super) fn crowded_in_cluster(&self) -> Option<Verdict> {
        let CrowdedPrimaries { node, primaries, of } = plan::crowded_primaries(self.observed, &plan::primaries(self.observed))?;
        let message = format!(
            "node {node} holds {} of {of} primaries, and without it nobody can fail over: one of them hands over where a replica in step is \
             on another node, and a replica is made anew where another node has room for it; where that does not help, add nodes",
            primaries.len()
        );
        Some(Verdict::yes("TooFewNodes", message))
    }
}
