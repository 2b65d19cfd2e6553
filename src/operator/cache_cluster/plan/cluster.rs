//! A Cluster: shards of one primary with replicas, failed over by their own bus.

use super::{
    Action, ClusterFacts, Desired, Facts, NodeId, Observed, Peer, Role, SLOTS, Server, ServerId, ServerState, SlotRange, Start,
    Waiting,
};

/// A server that answers, with its view of the Cluster.
#[derive(Clone, Copy)]
struct Node<'a> {
    id: ServerId,
    server: &'a Server,
    facts: &'a Facts,
    view: &'a ClusterFacts,
}

impl Node<'_> {
    fn is_primary(&self) -> bool {
        self.facts.role == Role::Primary
    }

    fn serves(&self) -> bool {
        self.is_primary() && !self.view.slots.is_empty()
    }

    /// Whether it and the node `other` have introduced themselves.
    fn knows(&self, other: &NodeId) -> bool {
        self.view.peers.iter().any(|peer| peer.id == *other && !peer.handshake)
    }
}

pub(super) fn plan(desired: &Desired, observed: &Observed) -> Vec<Action> {
    let nodes: Vec<Node<'_>> = nodes(observed).collect();
    let cluster = Cluster { desired, observed, nodes };
    let mut actions = Vec::new();
    for shard in 0..desired.shards() {
        actions.extend(cluster.fill(shard));
    }
    actions.extend(cluster.introduce());
    actions.extend(cluster.assign_slots());
    actions.extend(cluster.replicate());
    actions.extend(cluster.forget());
    actions.extend(super::allow_promotions(observed));
    actions.extend(super::unfinished(observed));
    actions.extend(cluster.gossip());
    actions
}

fn nodes(observed: &Observed) -> impl Iterator<Item = Node<'_>> {
    observed.running().filter_map(|(id, server, facts)| Some(Node { id, server, facts, view: facts.cluster.as_ref()? }))
}

struct Cluster<'a> {
    desired: &'a Desired,
    observed: &'a Observed,
    nodes: Vec<Node<'a>>,
}

impl<'a> Cluster<'a> {
    fn patience_over(&self) -> bool {
        self.observed.steady >= self.desired.takeover_after
    }

    fn members(&self, shard: u16) -> impl Iterator<Item = &Node<'a>> {
        self.nodes.iter().filter(move |node| node.id.shard == shard)
    }

    /// The shard's primary: of two that claim its slots, the one with the later claim.
    fn primary(&self, shard: u16) -> Option<&Node<'a>> {
        self.members(shard).filter(|node| node.serves()).max_by_key(|node| node.view.epoch)
    }

    fn in_shard(&self, shard: u16) -> impl Iterator<Item = (ServerId, &'a Server)> {
        self.observed.servers.iter().filter(move |(id, _)| id.shard == shard).map(|(id, server)| (*id, server))
    }

    /// Whether too few primaries run to elect another.
    fn majority_is_lost(&self) -> bool {
        let serving = (0..self.desired.shards()).filter(|shard| self.primary(*shard).is_some()).count();
        serving < usize::from(self.desired.shards()) / 2 + 1
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
        let Some(best) = electable().max_by_key(|node| node.facts.merit()) else {
            let on_disk = self.in_shard(shard).any(|(_, server)| matches!(server.state, ServerState::Stopped { data: true, .. }));
            let members = self.members(shard).map(|node| (node.id, node.server, node.facts));
            return match super::only_copy(members) {
                Some(server) if !on_disk => vec![Action::AllowPromotion { server }, Action::Wait(Waiting::Failover { shard })],
                _ => start(),
            };
        };
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

    /// Slots that nobody owns go to their home shard's primary, once every server has been asked.
    fn assign_slots(&self) -> Vec<Action> {
        let mut owned = vec![false; usize::from(SLOTS)];
        let views = self.nodes.iter().map(|node| node.view);
        for claim in views.flat_map(|view| view.slots.iter().chain(view.peers.iter().flat_map(|peer| &peer.slots))) {
            if let Some(slots) = owned.get_mut(usize::from(claim.first)..=usize::from(claim.last)) {
                slots.fill(true);
            }
        }
        if self.nodes.len() < self.observed.servers.len() || owned.iter().all(|slot| *slot) {
            return Vec::new();
        }
        let shards = (0..self.desired.shards()).filter_map(|shard| {
            let slots = unowned(&owned, self.desired.home_slots(shard));
            let server = self.primary(shard).or_else(|| self.members(shard).find(|node| node.is_primary()))?.id;
            (!slots.is_empty()).then_some(Action::AddSlots { server, slots })
        });
        shards.collect()
    }

    /// Nodes without slots follow their shard's primary. A replica that follows another is moved only where the bus has not.
    fn replicate(&self) -> Vec<Action> {
        let misplaced = self.nodes.iter().filter_map(|node| {
            let primary = self.primary(node.id.shard).filter(|primary| primary.id != node.id)?;
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
        if self.nodes.len() < self.observed.servers.len() {
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

/// The parts of a range that are not owned.
fn unowned(owned: &[bool], range: SlotRange) -> Vec<SlotRange> {
    let mut free: Vec<SlotRange> = Vec::new();
    for slot in range.first..=range.last {
        if owned.get(usize::from(slot)).copied().unwrap_or(true) {
            continue;
        }
        match free.last_mut() {
            Some(last) if last.last + 1 == slot => last.last = slot,
            _ => free.push(SlotRange { first: slot, last: slot }),
        }
    }
    free
}
