//! A Cluster: shards of one primary with replicas, failed over by their own bus.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;

use super::rules::{Rule, holds};
use super::{
    Acting, Action, ClusterFacts, Desired, Facts, NodeId, Observed, Peer, Role, Server, ServerId, ServerState, SlotRange,
    SlotSet, Start, Starter, Waiting, reshard,
};
use crate::policy::agent::DataState;

/// A server that answers, with its view of the Cluster.
#[derive(Clone, Copy)]
pub(super) struct Node<'a> {
    pub(super) id: ServerId,
    server: &'a Server,
    pub(super) facts: &'a Facts,
    pub(super) view: &'a ClusterFacts,
}

impl Node<'_> {
    pub(super) fn is_primary(&self) -> bool {
        self.facts.role == Role::Primary
    }

    pub(super) fn serves(&self) -> bool {
        self.is_primary() && !self.view.slots.is_empty()
    }

    /// Whether it and the node `other` have introduced themselves.
    pub(super) fn knows(&self, other: &NodeId) -> bool {
        self.view.peers.iter().any(|peer| peer.id == *other && !peer.handshake)
    }
}

pub(super) fn plan(desired: &Desired, observed: &Observed) -> Vec<Action> {
    let nodes = nodes(observed).collect();
    let mut cluster = Cluster { desired, observed, nodes, leaving: BTreeSet::new() };
    cluster.leaving = reshard::emptied(&cluster);
    cluster.nodes.retain(|node| !cluster.leaving.contains(&node.id));
    let mut actions = Vec::new();
    for shard in cluster.shards() {
        match desired.starter {
            Starter::Planner => actions.extend(cluster.fill(shard)),
            Starter::Agent => actions.extend(cluster.relieve(shard)),
        }
    }
    actions.extend(cluster.introduce());
    actions.extend(cluster.assign_slots());
    actions.extend(cluster.replicate());
    actions.extend(cluster.forget());
    if desired.starter == Starter::Planner {
        actions.extend(super::allow_promotions(observed));
    }
    actions.extend(super::unfinished(observed));
    actions.extend(cluster.gossip());
    let is_well = actions.is_empty();
    actions.extend(reshard::plan(&cluster, is_well));
    actions
}

/// The primary of each shard that owns slots: of two that claim them, the one with the later claim.
pub(super) fn leaders(observed: &Observed) -> BTreeMap<u16, Acting<'_>> {
    let mut leaders: BTreeMap<u16, (u64, Acting<'_>)> = BTreeMap::new();
    for Node { id, server, facts, view } in nodes(observed).filter(Node::serves) {
        let is_later = leaders.get(&id.shard).is_none_or(|(epoch, _)| view.epoch > *epoch);
        if is_later {
            leaders.insert(id.shard, (view.epoch, Acting { id, server, facts }));
        }
    }
    leaders.into_iter().map(|(shard, (_, acting))| (shard, acting)).collect()
}

/// Whether a node takes the server at this address for an owner of slots.
pub(super) fn is_named(observed: &Observed, address: SocketAddr) -> bool {
    let names = |peer: &Peer| peer.address == Some(address) && !peer.slots.is_empty();
    nodes(observed).any(|node| node.view.peers.iter().any(names))
}

fn nodes(observed: &Observed) -> impl Iterator<Item = Node<'_>> {
    observed.running().filter_map(|(id, server, facts)| Some(Node { id, server, facts, view: facts.cluster.as_ref()? }))
}

pub(super) struct Cluster<'a> {
    pub(super) desired: &'a Desired,
    pub(super) observed: &'a Observed,
    /// The nodes that answer, without those that leave.
    pub(super) nodes: Vec<Node<'a>>,
    /// Servers that are wanted no more and hold nothing.
    pub(super) leaving: BTreeSet<ServerId>,
}

impl<'a> Cluster<'a> {
    pub(super) fn patience_over(&self) -> bool {
        self.observed.steady >= self.desired.takeover_after
    }

    /// The shards that are wanted, and those that still have servers which are not about to leave.
    fn shards(&self) -> BTreeSet<u16> {
        let present = self.observed.servers.keys().filter(|id| !self.leaving.contains(id)).map(|id| id.shard);
        (0..self.desired.shards()).chain(present).collect()
    }

    /// Whether every server answers that is not about to leave.
    pub(super) fn all_answer(&self) -> bool {
        self.nodes.len() + self.leaving.len() >= self.observed.servers.len()
    }

    pub(super) fn members(&self, shard: u16) -> impl Iterator<Item = &Node<'a>> {
        self.nodes.iter().filter(move |node| node.id.shard == shard)
    }

    /// The shard's primary: of two that claim its slots, the one with the later claim.
    pub(super) fn primary(&self, shard: u16) -> Option<&Node<'a>> {
        self.members(shard).filter(|node| node.serves()).max_by_key(|node| node.view.epoch)
    }

    /// The primary of a shard that owns slots, or that is to get its first: who holds keys of slots on their way, else whom the others
    /// follow already, else the first one.
    pub(super) fn head(&self, shard: u16) -> Option<&Node<'a>> {
        if self.owns_slots(shard) {
            return self.primary(shard);
        }
        let followers = |node: &Node<'_>| self.members(shard).filter(|member| follows(member, node)).count();
        let primaries = self.members(shard).filter(|node| node.is_primary());
        primaries.max_by_key(|node| (node.facts.holds_data, followers(node), Reverse(node.id)))
    }

    /// Whether anybody takes a server of the shard for an owner of slots, or one would come back as such.
    pub(super) fn owns_slots(&self, shard: u16) -> bool {
        let claims = |server: &Server| match &server.state {
            ServerState::Stopped { claim, .. } => claim.is_some(),
            ServerState::Running(Facts { cluster: Some(view), .. }) => !view.slots.is_empty(),
            _ => false,
        };
        let is_told = |peer: &Peer| !peer.slots.is_empty() && self.shard_of(peer) == Some(shard);
        self.in_shard(shard).any(|(_, server)| claims(server))
            || self.nodes.iter().any(|node| node.view.peers.iter().any(is_told))
    }

    fn shard_of(&self, peer: &Peer) -> Option<u16> {
        let known = self.nodes.iter().find(|node| node.view.id == peer.id).map(|node| node.id);
        let placed = || self.observed.at(peer.address?).map(|(id, _)| id);
        known.or_else(placed).map(|id| id.shard)
    }

    /// The shard of the node of that id, which need not answer.
    pub(super) fn shard_of_id(&self, id: &NodeId) -> Option<u16> {
        let known = self.nodes.iter().find(|node| node.view.id == *id).map(|node| node.id.shard);
        let mut peers = self.nodes.iter().flat_map(|node| &node.view.peers).filter(|peer| peer.id == *id);
        known.or_else(|| peers.find_map(|peer| self.shard_of(peer)))
    }

    pub(super) fn in_shard(&self, shard: u16) -> impl Iterator<Item = (ServerId, &'a Server)> {
        self.observed.servers.iter().filter(move |(id, _)| id.shard == shard).map(|(id, server)| (*id, server))
    }

    /// Whether too few primaries run to elect another. Those without slots have no vote.
    fn majority_is_lost(&self) -> bool {
        let owning: Vec<u16> = self.shards().into_iter().filter(|shard| self.owns_slots(*shard)).collect();
        let serving = owning.iter().filter(|shard| self.primary(**shard).is_some()).count();
        serving < owning.len() / 2 + 1
    }

    /// Whether no node believes that the primary's slots are another's by now.
    fn is_acknowledged(&self, primary: &Node<'_>) -> bool {
        let overlap = |a: &SlotRange, b: &SlotRange| a.first <= b.last && b.first <= a.last;
        let contests = |peer: &Peer| {
            let mut claims = peer.slots.iter().flat_map(|claim| primary.view.slots.iter().map(move |own| (claim, own)));
            peer.id != primary.view.id && claims.any(|(claim, own)| overlap(claim, own))
        };
        !self.nodes.iter().any(|node| node.view.peers.iter().any(contests))
    }

    /// Whether the primary's claim beats that of every stopped server of its shard, as the primary that it would come back as.
    ///
    /// `CLUSTER FAILOVER TAKEOVER` takes a new epoch only where the replica's own, which it does not show, is not the greatest that it
    /// knows. Where it is, the claims tie: no other node accepts the new one, and of the two primaries the one with the smaller id
    /// would win, be it the empty one.
    fn beats_stopped(&self, primary: &Node<'_>) -> bool {
        let claim = |server: &Server| match server.state {
            ServerState::Stopped { claim, .. } => claim,
            _ => None,
        };
        self.in_shard(primary.id.shard).all(|(_, server)| claim(server) < Some(primary.view.epoch))
    }

    /// Who is to renew its claim, so that the primary's becomes the greatest. `CLUSTER BUMPEPOCH` takes a new epoch under the same
    /// condition as a takeover does, so another primary takes one first; that the primary hears of it is waited for. The other one need
    /// not own slots: while the Cluster forms, nobody else may own any yet.
    fn bump(&self, primary: &Node<'_>) -> Option<Action> {
        let can_bump = |node: &&Node<'_>| node.view.epoch < node.view.current_epoch;
        let mut others = self.nodes.iter().filter(|node| node.id != primary.id && node.is_primary());
        let is_told = others.clone().any(|node| node.view.current_epoch > primary.view.epoch);
        let bumped = if can_bump(&primary) { Some(primary) } else { others.find(can_bump).filter(|_| !is_told) };
        bumped.map(|node| Action::BumpEpoch { server: node.id })
    }

    /// Starts the stopped servers of a shard. A node comes back in the role that its own file remembers, so a former primary
    /// waits until its shard has failed over: then its peers correct it before anyone follows it.
    fn fill(&self, shard: u16) -> Vec<Action> {
        let stopped = self.in_shard(shard).filter(|(_, server)| server.is_stopped());
        let start = || stopped.map(|(server, _)| Action::StartServer { server, start: Start::ClusterNode }).collect();
        let failover = || vec![Action::Wait(Waiting::Failover { shard })];
        if !self.in_shard(shard).any(|(_, server)| server.is_stopped()) {
            return Vec::new();
        }
        if !self.owns_slots(shard) {
            return self.rescue_arrivals(shard).map_or_else(start, |action| vec![action]);
        }
        if let Some(primary) = self.primary(shard) {
            let settled = self.members(shard).all(|node| node.id == primary.id || follows(node, primary) || is_blank(node));
            if settled && !self.beats_stopped(primary) {
                return self.bump(primary).into_iter().chain(failover()).collect();
            }
            return if settled && self.is_acknowledged(primary) { start() } else { failover() };
        }
        if let Some((silent, _)) = self.in_shard(shard).find(|(_, server)| server.is_silent()) {
            return vec![Action::Wait(Waiting::Server(silent))];
        }
        let electable = || self.members(shard).filter(|node| node.facts.is_electable());
        let on_disk = self.in_shard(shard).any(|(_, server)| matches!(server.state, ServerState::Stopped { data: true, .. }));
        if !on_disk && !electable().any(|node| node.facts.holds_data) {
            let members = self.members(shard).map(|node| (node.id, node.server, node.facts));
            if let Some(server) = super::only_copy(members) {
                return vec![Action::AllowPromotion { server, of: None }, Action::Wait(Waiting::Failover { shard })];
            }
        }
        let Some(best) = electable().max_by_key(|node| node.facts.merit()) else { return start() };
        if !self.patience_over() {
            failover()
        } else if self.majority_is_lost() {
            vec![Action::ClusterTakeover { server: best.id }]
        } else if electable().any(|node| node.facts.holds_data) {
            failover()
        } else {
            start()
        }
    }

    /// The bus fails a shard over. Where it cannot, since the primaries that vote are no majority, the best replica takes the shard; but only
    /// once it is certain that its primary is gone, and that nobody holds more.
    fn relieve(&self, shard: u16) -> Option<Action> {
        if !self.owns_slots(shard) {
            return self.relieve_arrivals(shard);
        }
        if let Some(primary) = self.primary(shard) {
            // A takeover need not have made its claim the greatest, and then the others do not believe it.
            let is_contested = self.patience_over() && !self.is_acknowledged(primary);
            return is_contested.then(|| self.bump(primary)).flatten();
        }
        if !self.patience_over() || !self.majority_is_lost() {
            return Some(Action::Wait(Waiting::Failover { shard }));
        }
        let (best, facts) = self.best_copy(shard)?;
        Some(self.take_over(best, facts))
    }

    /// Has the replica with this copy take its shard, unless another server of it hinders that.
    fn take_over(&self, best: ServerId, facts: &Facts) -> Action {
        let mut others = self.in_shard(best.shard).filter(|(id, _)| *id != best);
        let hindrance = others.find_map(|(id, server)| self.hinders(id, server, facts));
        match hindrance.filter(|_| holds(Rule::ProveGone)) {
            Some(waiting) => Action::Wait(waiting),
            None => Action::ClusterTakeover { server: best },
        }
    }

    /// The same as [`Self::rescue_arrivals`], where an agent holds back a primary that came back with nothing.
    fn relieve_arrivals(&self, shard: u16) -> Option<Action> {
        if self.members(shard).any(|node| node.is_primary() && node.facts.holds_data) {
            return None;
        }
        let (best, facts) = self.best_copy(shard).filter(|(_, facts)| facts.holds_data && holds(Rule::KeepArrivals))?;
        let Role::Replica { of, .. } = facts.role else { return None };
        let is_gone = |(_, server): (ServerId, &Server)| matches!(server.state, ServerState::Held(_) | ServerState::Absent);
        self.observed.at(of).is_some_and(is_gone).then(|| self.take_over(best, facts))
    }

    /// The replica of a shard whose copy reaches furthest.
    fn best_copy(&self, shard: u16) -> Option<(ServerId, &'a Facts)> {
        let replicas = self.members(shard).filter(|node| !node.is_primary());
        let merit = |node: &&Node<'_>| (node.facts.lineage.is_some(), node.facts.merit(), Reverse(node.id));
        let best = if holds(Rule::BestCopy) { replicas.max_by_key(merit) } else { replicas.min_by_key(merit) };
        best.map(|node| (node.id, node.facts))
    }

    /// Why a replica with this copy does not take the shard of another server over: that one may act as its primary, or hold more.
    fn hinders(&self, id: ServerId, server: &Server, best: &Facts) -> Option<Waiting> {
        let reaches_further = |data: &DataState| match data {
            DataState::Empty => false,
            DataState::Partial => best.lineage.is_none(),
            DataState::Complete(position) => best.lineage.as_ref() != Some(&position.lineage) || position.offset > best.offset,
        };
        let waiting = match &server.state {
            // Its pod is there, and nobody can say what it does.
            ServerState::Silent | ServerState::Stopped { .. } => return Some(Waiting::Server(id)),
            ServerState::Starting(data) if reaches_further(data) => Waiting::BestCopy(id),
            ServerState::Held(held) if reaches_further(&held.data) => Waiting::Choice,
            // With its pod went what it held in memory; what is on its volume may come back.
            ServerState::Absent if self.desired.durable => Waiting::Choice,
            ServerState::Running(facts) if facts.lineage.is_some() && facts.lineage != best.lineage => Waiting::Choice,
            ServerState::Starting(_) | ServerState::Held(_) | ServerState::Absent | ServerState::Running(_) => return None,
        };
        (!self.desired.accept_data_loss).then_some(waiting)
    }

    /// Where slots are on their way to a shard that owns none yet, no vote replaces its primary. The keys that have come already outlive it
    /// in a replica, which takes its place before it comes back with nothing.
    fn rescue_arrivals(&self, shard: u16) -> Option<Action> {
        let has_lost_all = |node: &&Node<'_>| {
            let Role::Replica { of, .. } = node.facts.role else { return false };
            let followed = self.observed.at(of).map(|(_, server)| &server.state);
            matches!(followed, Some(ServerState::Stopped { data: false, .. }))
        };
        let mut others = self.members(shard).filter(|node| node.is_primary() && node.facts.holds_data);
        let copies = self.members(shard).filter(|node| node.facts.holds_data).filter(has_lost_all);
        let best = copies.max_by_key(|node| node.facts.offset).filter(|_| holds(Rule::KeepArrivals))?;
        others.next().is_none().then_some(Action::ClusterTakeover { server: best.id })
    }

    /// Nodes that the first one does not know at their address are introduced; gossip does the rest.
    fn introduce(&self) -> Vec<Action> {
        let Some(host) = self.nodes.iter().find(|node| node.serves()).or(self.nodes.first()) else { return Vec::new() };
        let unknown = |node: &&Node<'_>| {
            let known = host.view.peers.iter().any(|peer| {
                let same_address = peer.address == Some(node.server.address);
                same_address && (peer.id == node.view.id || peer.handshake)
            });
            node.id != host.id && !known
        };
        self.nodes.iter().filter(unknown).map(|node| Action::ClusterMeet { server: host.id, peer: node.id }).collect()
    }

    /// The slots that somebody is taken for the owner of. One that answers and claims none of them for a while has forgotten that it is.
    fn owned(&self) -> SlotSet {
        let answers = |peer: &&Peer| self.nodes.iter().any(|node| node.view.id == peer.id);
        let counts = |peer: &&Peer| !(self.patience_over() && answers(peer));
        let views = self.nodes.iter().map(|node| node.view);
        let slots = views.flat_map(|view| view.slots.iter().chain(view.peers.iter().filter(counts).flat_map(|peer| &peer.slots)));
        slots.copied().collect()
    }

    /// Slots that nobody owns go to their home shard's primary, once every server has been asked.
    fn assign_slots(&self) -> Vec<Action> {
        let owned = self.owned();
        if !self.all_answer() || owned == SlotSet::all() {
            return Vec::new();
        }
        let shards = (0..self.desired.shards()).filter_map(|shard| {
            let mut slots = SlotSet::from_iter([self.desired.home_slots(shard)]);
            slots.remove(&owned);
            let server = self.primary(shard).or_else(|| self.members(shard).find(|node| node.is_primary()))?.id;
            (!slots.is_empty()).then_some(Action::AddSlots { server, slots: slots.ranges() })
        });
        shards.collect()
    }

    /// Nodes without slots follow their shard's primary. A replica that follows another is moved only where the bus has not.
    fn replicate(&self) -> Vec<Action> {
        // Until then it is open who of a shard gets its first slots.
        let is_formed = self.owned() == SlotSet::all();
        let misplaced = self.nodes.iter().filter_map(|node| {
            let head = if is_formed { self.head(node.id.shard) } else { self.primary(node.id.shard) };
            let primary = head.filter(|head| head.id != node.id)?;
            if follows(node, primary) || node.serves() {
                return None;
            }
            let early = !is_blank(node) && !self.patience_over();
            if early || !node.knows(&primary.view.id) || node.facts.would_lose_to(primary.facts) {
                return Some(Action::Wait(Waiting::Gossip(node.id)));
            }
            Some(Action::ClusterReplicate { server: node.id, primary: primary.view.id.clone() })
        });
        misplaced.collect()
    }

    /// When every server answers, an id that none of them bears belongs to nobody.
    fn forget(&self) -> Vec<Action> {
        if !self.all_answer() {
            return Vec::new();
        }
        let is_ours = |id: &NodeId| self.nodes.iter().any(|node| node.view.id == *id);
        let ghosts = self.nodes.iter().flat_map(|node| node.view.peers.iter().map(move |peer| (node.id, peer)));
        let ghosts = ghosts.filter(|(_, peer)| !peer.handshake && peer.slots.is_empty() && !is_ours(&peer.id));
        ghosts.map(|(server, peer)| Action::ClusterForget { server, node: peer.id.clone() }).collect()
    }

    /// The nodes that do not see the whole Cluster yet.
    fn gossip(&self) -> Vec<Action> {
        let partial = self.nodes.iter().filter(|node| {
            let knows_all = self.nodes.iter().all(|other| other.id == node.id || node.knows(&other.view.id));
            !(node.view.ok && knows_all)
        });
        partial.map(|node| Action::Wait(Waiting::Gossip(node.id))).collect()
    }
}

fn follows(node: &Node<'_>, primary: &Node<'_>) -> bool {
    matches!(node.facts.role, Role::Replica { of, .. } if of == primary.server.address)
}

/// Whether a node has no place in the Cluster yet.
fn is_blank(node: &Node<'_>) -> bool {
    node.is_primary() && node.view.slots.is_empty()
}

/// How many slots are not where they are to be; `None` where the owner of one is not known.
pub(super) fn left_to_move(desired: &Desired, observed: &Observed) -> Option<u16> {
    reshard::left_to_move(&Cluster { desired, observed, nodes: nodes(observed).collect(), leaving: BTreeSet::new() })
}
