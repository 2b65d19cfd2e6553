//! The planner: desired and observed state become ordered actions. Pure: no client, no clock.
//!
//! It is called in a loop, observe → plan → apply, until it has nothing to say, and from then on to keep it so. Three
//! invariants hold whatever is observed:
//!
//! - A restarted server never becomes, or stays, primary while a peer holds the data. A stopped server is not started before
//!   the planner knows its place, and no restarted server may be promoted before it has synchronised once.
//! - A server that may hold the last copy of the data is never told to replace it by another's.
//! - Faults are failed over by Sentinel or by the Cluster bus. The planner waits for them; it promotes by itself only where
//!   they cannot, because their majority is lost, and only after [`Desired::takeover_after`].

mod action;
mod agents;
mod cluster;
#[cfg(test)]
mod cluster_under_agents;
mod desired;
#[cfg(test)]
mod model;
mod observed;
mod report;
mod reshard;
#[cfg(test)]
mod reshard_simulation;
mod rollout;
mod rules;
mod sentinel;
#[cfg(test)]
mod simulation;
mod slots;
mod spread;

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::time::Duration;

use crate::policy::agent::DataState;
pub use action::{Action, Set, Start, Waiting, Way, Why};
use agents::Acting;
pub use desired::{Desired, DesiredPods, Layout, SLOTS, SentinelId, ServerId, Starter};
pub use observed::{
    ClusterFacts, Facts, Held, Link, Member, Node, NodeId, Observed, OpenSlot, Peer, Pod, Revision, Role, Scale, Sentinel,
    Server, ServerState, SlotRange, Watch,
};
use rules::{Rule, holds};
pub use slots::{SlotSet, Transfer, transfers};
pub use spread::{Crowded, CrowdedPrimaries, Moved, Tries, crowded, crowded_primaries, has_room};

/// What to do next, in order. Empty: everything is as desired.
pub fn plan(desired: &Desired, observed: &Observed) -> Vec<Action> {
    if desired.paused && holds(Rule::Pause) {
        return Vec::new();
    }
    match (desired.layout, desired.starter) {
        (Layout::Sentinel { .. }, Starter::Planner) => sentinel::plan(desired, observed),
        (Layout::Cluster { .. }, Starter::Planner) => cluster::plan(desired, observed),
        (_, Starter::Agent) => under_agents(desired, observed),
    }
}

/// What heals comes first; what disrupts waits until there is nothing to heal.
fn under_agents(desired: &Desired, observed: &Observed) -> Vec<Action> {
    let mut actions = match desired.layout {
        Layout::Sentinel { .. } => agents::heal(desired, observed),
        Layout::Cluster { .. } => cluster::plan(desired, observed),
    };
    actions.extend(rollout::at_once(desired, observed));
    actions.extend(rollout::next(desired, observed, &actions));
    actions
}

/// The server that acts as primary, where no majority of sentinels contradicts. Under Sentinel with agents.
pub fn primary(desired: &Desired, observed: &Observed) -> Option<ServerId> {
    agents::acting(desired, observed).map(|acting| acting.id)
}

/// The primary of each shard of a Cluster that owns slots and answers.
pub fn primaries(observed: &Observed) -> BTreeMap<u16, ServerId> {
    cluster::leaders(observed).into_iter().map(|(shard, acting)| (shard, acting.id)).collect()
}

/// Whether every slot of a Cluster is owned by a primary that answers.
pub fn serves_all_slots(observed: &Observed) -> bool {
    let views = cluster::leaders(observed).into_values().filter_map(|acting| acting.facts.cluster.as_ref());
    views.flat_map(|view| view.slots.iter().copied()).collect::<SlotSet>() == SlotSet::all()
}

/// Who acts as primary, by shard, as far as nobody contradicts.
fn leaders<'a>(desired: &Desired, observed: &'a Observed) -> BTreeMap<u16, Acting<'a>> {
    match desired.layout {
        Layout::Sentinel { .. } => agents::acting(desired, observed).map(|acting| (0, acting)).into_iter().collect(),
        Layout::Cluster { .. } => cluster::leaders(observed),
    }
}

/// How many slots of a Cluster are not yet where they are to be; `None` where the owner of one is not known, and outside a Cluster.
pub fn slots_to_move(desired: &Desired, observed: &Observed) -> Option<u16> {
    match desired.layout {
        Layout::Sentinel { .. } => None,
        Layout::Cluster { .. } => cluster::left_to_move(desired, observed),
    }
}

/// Whether a replica follows the server at `address`, with its link in this state.
fn is_followed(facts: &Facts, address: SocketAddr, link: Link) -> bool {
    facts.role == Role::Replica { of: address, link }
}

impl Observed {
    /// The servers that answer.
    fn running(&self) -> impl Iterator<Item = (ServerId, &Server, &Facts)> {
        self.servers.iter().filter_map(|(id, server)| match &server.state {
            ServerState::Running(facts) => Some((*id, server, facts)),
            ServerState::Stopped { .. }
            | ServerState::Absent
            | ServerState::Held(_)
            | ServerState::Starting(_)
            | ServerState::Silent => None,
        })
    }

    /// The same without what changes all the time: two equal shapes are a steady state.
    pub fn shape(&self) -> Self {
        let server = |(id, server): (&ServerId, &Server)| {
            let mut server = server.clone();
            match &mut server.state {
                ServerState::Running(facts) => {
                    (facts.offset, facts.holds_data, facts.lineage) = (0, false, None);
                    // Each vote that is lost makes it greater.
                    facts.cluster.iter_mut().for_each(|view| view.current_epoch = 0);
                }
                ServerState::Held(held) => held.message.clear(),
                // One that begins again and again loads a little more each time.
                ServerState::Starting(data) => *data = DataState::Empty,
                ServerState::Stopped { .. } | ServerState::Absent | ServerState::Silent => {}
            }
            (*id, server)
        };
        Self {
            servers: self.servers.iter().map(server).collect(),
            sentinels: self.sentinels.clone(),
            sizes: BTreeMap::new(),
            pods: BTreeMap::new(),
            open_nodes: BTreeSet::new(),
            scale: None,
            steady: Duration::ZERO,
            handover_failed: None,
            unaware: BTreeSet::new(),
            moved: None,
        }
    }

    /// The server at an address.
    fn at(&self, address: SocketAddr) -> Option<(ServerId, &Server)> {
        self.servers.iter().find(|(_, server)| server.address == address).map(|(id, server)| (*id, server))
    }
}

impl Server {
    fn is_stopped(&self) -> bool {
        matches!(self.state, ServerState::Stopped { .. })
    }

    fn is_silent(&self) -> bool {
        matches!(self.state, ServerState::Silent)
    }
}

impl Facts {
    /// Whether Sentinel or the bus could make it primary.
    fn is_electable(&self) -> bool {
        matches!(self.role, Role::Replica { .. }) && self.promotable
    }

    /// Whether it follows its primary in step.
    fn is_in_step(&self) -> bool {
        matches!(self.role, Role::Replica { link: Link::Up, .. })
    }

    /// Whether following a primary would replace data by nothing.
    fn would_lose_to(&self, primary: &Facts) -> bool {
        self.holds_data && !primary.holds_data
    }

    /// How good a primary it would make: greater is better.
    fn merit(&self) -> (bool, bool, u64) {
        (self.promotable, self.holds_data, self.offset)
    }
}

/// Replicas whose link has been up since they started may be promoted, once they have all that their primary has.
fn allow_promotions(observed: &Observed) -> impl Iterator<Item = Action> {
    let followed = |facts: &Facts| match facts.role {
        Role::Replica { of, link: Link::Up } if !facts.promotable => Some(of),
        _ => None,
    };
    observed.running().filter_map(move |(server, _, facts)| Some(Action::AllowPromotion { server, of: Some(followed(facts)?) }))
}

/// With the primary gone and nobody electable who holds data: the replica with the most data, if any has some. It synchronised a moment ago,
/// or came back with its own; a copy that was still under way is not held at all.
fn only_copy<'a>(running: impl Iterator<Item = (ServerId, &'a Server, &'a Facts)>) -> Option<ServerId> {
    let copies = running.filter(|(_, _, facts)| facts.role != Role::Primary && facts.holds_data);
    copies.max_by_key(|(_, _, facts)| facts.offset).map(|(server, ..)| server)
}

/// What the servers themselves still have to do: answer, and synchronise.
fn unfinished(observed: &Observed) -> impl Iterator<Item = Action> {
    observed.servers.iter().filter_map(|(id, server)| {
        let waiting = match &server.state {
            ServerState::Silent | ServerState::Starting(_) => Waiting::Server(*id),
            ServerState::Running(Facts { role: Role::Replica { link: Link::Down, .. }, .. }) => Waiting::Synchronisation(*id),
            ServerState::Held(held) => Waiting::Held { server: *id, reason: held.reason.clone(), message: held.message.clone() },
            ServerState::Absent => Waiting::Pod(Member::Server(*id)),
            ServerState::Running(_) | ServerState::Stopped { .. } => return None,
        };
        Some(Action::Wait(waiting))
    })
}
