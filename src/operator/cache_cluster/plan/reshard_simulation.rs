//! A Cluster whose number of shards changes, against a simulated one whose nodes and whose actuator die at every step.
//!
//! Nodes are modelled by what servers do without atomic migration: each has its own claims to slots, gossip settles them by epoch, the loser
//! drops its keys of such a slot, and a replica that is promoted knows nothing of slots on their way. With it, slots and keys change hands
//! in one moment after a while. The actuator takes any part of a plan's steps, and then ends.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;

use proptest::prelude::*;

use super::observed::OpenSlot;
use super::rules::{Rule, test::switch_off};
use super::slots::SlotSet;
use super::*;

const TICK: Duration = Duration::from_millis(500);
const FAILOVER_TICKS: u32 = 4;
const SYNC_TICKS: u32 = 2;
const EXPORT_TICKS: u32 = 3;
const BAN_TICKS: u32 = 30;
const SETTLE_TICKS: u32 = 800;
/// How many slots an actuator moves together, and how many at a look.
const GROUP: u16 = 100;
const AT_A_LOOK: u16 = 1500;
/// Every so many slots there is one with a key.
const KEY_EVERY: u16 = 64;
/// How many keys are written at a tick.
const WRITES: u32 = 16;

#[derive(Debug, Clone, Default)]
struct SimNode {
    up: bool,
    following: Option<ServerId>,
    in_step: bool,
    syncing_for: u32,
    promotable: bool,
    absent_for: u32,
    epoch: u64,
    claims: SlotSet,
    /// The claims that others have heard of.
    told: SlotSet,
    migrating: BTreeMap<u16, ServerId>,
    importing: BTreeMap<u16, ServerId>,
    keys: BTreeMap<u16, u64>,
    knows: BTreeSet<ServerId>,
    banned: BTreeMap<ServerId, u32>,
    export: Option<(ServerId, SlotSet, u32)>,
    /// Keys that an engine has moved, and drops a while later.
    dropping: Vec<(u32, SlotSet)>,
}

/// One command.
#[derive(Debug, Clone)]
enum Step {
    Plain(Action),
    Import { at: ServerId, from: ServerId, slots: SlotSet },
    Migrate { at: ServerId, to: ServerId, slots: SlotSet },
    MoveKey { from: ServerId, to: ServerId, slots: SlotSet },
    Claim { at: ServerId, from: ServerId, slots: SlotSet },
    Yield { at: ServerId, to: ServerId, slots: SlotSet },
}

#[derive(Debug, Clone, Copy)]
enum Event {
    Kill(usize),
    Shards(u16),
}

struct World {
    desired: Desired,
    durable: bool,
    atomic: bool,
    /// Whether slots change hands before their keys have moved: what the checks are to notice.
    claims_first: bool,
    /// Whether no key at all may be lost at any moment: no node dies, or one at a time.
    strict: bool,
    nodes: BTreeMap<ServerId, SimNode>,
    epoch: u64,
    now: u32,
    /// The newest acknowledged version of each key that some copy is left of.
    expected: BTreeMap<u16, u64>,
    seen: Option<Observed>,
    steady: Duration,
}

fn address(id: ServerId) -> SocketAddr {
    (Ipv4Addr::LOCALHOST, 1000 + id.shard * 10 + id.index).into()
}

fn node_id(id: ServerId) -> NodeId {
    NodeId(format!("{}-{}", id.shard, id.index))
}

impl World {
    fn new(shards: u16, replicas: u16, [durable, atomic]: [bool; 2]) -> Self {
        let desired = Desired::on_one_machine(Layout::Cluster { shards }, replicas, TICK * 12);
        let (nodes, expected, steady) = (BTreeMap::new(), BTreeMap::new(), Duration::ZERO);
        let mut world = Self {
            desired,
            durable,
            atomic,
            claims_first: false,
            strict: false,
            nodes,
            epoch: 0,
            now: 0,
            expected,
            seen: None,
            steady,
        };
        world.resize(shards);
        world
    }

    /// Asks for so many shards: there is a place for each of their servers from now on.
    fn resize(&mut self, shards: u16) {
        self.desired.layout = Layout::Cluster { shards };
        for id in self.desired.servers() {
            self.nodes.entry(id).or_default();
        }
    }

    fn node(&mut self, id: ServerId) -> &mut SimNode {
        self.nodes.get_mut(&id).unwrap()
    }

    fn is_up(&self, id: ServerId) -> bool {
        self.nodes.get(&id).is_some_and(|node| node.up)
    }

    fn is_primary(&self, id: ServerId) -> bool {
        self.nodes.get(&id).is_some_and(|node| node.following.is_none())
    }

    fn ids(&self) -> Vec<ServerId> {
        self.nodes.keys().copied().collect()
    }

    fn new_epoch(&mut self) -> u64 {
        self.epoch += 1;
        self.epoch
    }

    /// Who owns which slots, as everybody believes: of two that tell the same, the later claim.
    fn map(&self) -> Vec<(ServerId, SlotSet)> {
        let mut claims: Vec<_> = self.nodes.iter().filter(|(id, node)| self.is_primary(**id) && !node.told.is_empty()).collect();
        claims.sort_by_key(|(_, node)| std::cmp::Reverse(node.epoch));
        let mut taken = SlotSet::default();
        let resolve = |(id, node): (&ServerId, &SimNode)| {
            let mut slots = node.told.clone();
            slots.remove(&taken);
            taken.add(&slots);
            (*id, slots)
        };
        claims.into_iter().map(resolve).filter(|(_, slots)| !slots.is_empty()).collect()
    }

    fn follow(&mut self, id: ServerId, of: ServerId) {
        let node = self.node(id);
        (node.following, node.in_step, node.syncing_for, node.export) = (Some(of), false, 0, None);
        (node.claims, node.told) = (SlotSet::default(), SlotSet::default());
        node.migrating.clear();
        node.importing.clear();
    }

    /// What of the keys nobody holds any more is lost with the last copy, and nobody's fault.
    fn forgive(&mut self) {
        let durable = self.durable;
        let holders: Vec<_> = self.nodes.values().filter(|node| node.up || durable).map(|node| node.keys.clone()).collect();
        let strict = self.strict;
        self.expected.retain(|slot, version| {
            let best = holders.iter().filter_map(|keys| keys.get(slot)).max().copied();
            assert!(!strict || best >= Some(*version), "the only copy of the key of slot {slot} is lost");
            *version = best.unwrap_or(0).min(*version);
            *version > 0
        });
    }

    fn kill(&mut self, index: usize) {
        let up: Vec<ServerId> = self.ids().into_iter().filter(|id| self.is_up(*id)).collect();
        if let Some(id) = up.get(index % up.len().max(1)) {
            self.kill_server(*id);
        }
    }

    fn kill_server(&mut self, id: ServerId) {
        let durable = self.durable;
        let node = self.node(id);
        (node.up, node.in_step, node.export) = (false, false, None);
        if !durable {
            node.keys.clear();
        }
        self.forgive();
    }

    fn tick(&mut self) {
        self.now += 1;
        self.gossip();
        self.settle_claims();
        self.fail_over();
        self.export();
        self.synchronise();
        for write in 0..WRITES {
            self.write((self.now * WRITES + write) % u32::from(SLOTS / KEY_EVERY));
        }
        for id in self.ids() {
            let Some(of) = self.nodes[&id].following.filter(|_| self.nodes[&id].up && self.nodes[&id].in_step) else { continue };
            self.node(id).keys = self.nodes[&of].keys.clone();
        }
        for node in self.nodes.values_mut() {
            node.absent_for = if node.up { 0 } else { node.absent_for + 1 };
        }
    }

    fn gossip(&mut self) {
        for id in self.ids().into_iter().filter(|id| self.is_up(*id)).collect::<Vec<_>>() {
            let now = self.now;
            let heard: BTreeSet<ServerId> = (self.nodes[&id].knows.iter().filter(|peer| self.is_up(**peer)))
                .filter(|peer| self.nodes[peer].knows.contains(&id))
                .flat_map(|peer| self.nodes[peer].knows.iter().copied())
                .collect();
            let node = self.node(id);
            node.banned.retain(|_, until| *until > now);
            let new: Vec<_> = heard.into_iter().filter(|peer| *peer != id && !node.banned.contains_key(peer)).collect();
            node.knows.extend(new);
            node.told = node.claims.clone();
        }
    }

    /// Of two running primaries that claim the same slot, the later claim holds; the other one drops its keys.
    fn settle_claims(&mut self) {
        let primaries: Vec<ServerId> = self.ids().into_iter().filter(|id| self.is_up(*id) && self.is_primary(*id)).collect();
        for (id, other) in primaries.iter().flat_map(|id| primaries.iter().map(move |other| (*id, *other))) {
            let both = self.nodes[&id].claims.common(&self.nodes[&other].claims);
            if id == other || both.is_empty() || self.nodes[&id].epoch > self.nodes[&other].epoch {
                continue;
            }
            if self.nodes[&id].epoch == self.nodes[&other].epoch {
                let (epoch, first) = (self.new_epoch(), id.min(other));
                self.node(first).epoch = epoch;
                continue;
            }
            let node = self.node(id);
            node.claims.remove(&both);
            node.told = node.claims.clone();
            node.keys.retain(|slot, _| !both.contains(*slot));
            if node.claims.is_empty() && id.shard == other.shard {
                self.follow(id, other);
            }
        }
        let map = self.map();
        let is_owner = |id: ServerId| map.iter().any(|(owner, _)| *owner == id);
        if !map.iter().any(|(owner, _)| self.is_up(*owner)) {
            return;
        }
        for id in self.ids() {
            // Any primary tells a replica that another has all that its own one claimed, be that one dead by now.
            let is_beaten = |of: ServerId| {
                let led = self.nodes.get(&of).is_some_and(|node| node.following.is_some() || !node.claims.is_empty());
                led && !is_owner(of)
            };
            let new = self.nodes[&id].following.filter(|of| self.is_up(id) && is_beaten(*of)).and_then(|of| {
                let owners = map.iter().map(|(owner, _)| *owner);
                owners.filter(|owner| owner.shard == of.shard).max_by_key(|owner| self.nodes[owner].epoch)
            });
            if let Some(new) = new.filter(|new| *new != id) {
                self.follow(id, new);
            }
        }
    }

    fn fail_over(&mut self) {
        let map = self.map();
        let up = map.iter().filter(|(id, _)| self.is_up(*id)).count();
        for (lost, slots) in &map {
            if self.nodes[lost].absent_for < FAILOVER_TICKS || up <= map.len() / 2 {
                continue;
            }
            let electable =
                |id: &ServerId| self.is_up(*id) && self.nodes[id].following == Some(*lost) && self.nodes[id].promotable;
            let best = self.ids().into_iter().filter(electable).max_by_key(|id| self.nodes[id].keys.values().sum::<u64>());
            if let Some(id) = best {
                self.lead(id, slots.clone());
            }
        }
    }

    /// A replica is primary from now on. It knows nothing of slots on their way.
    fn lead(&mut self, id: ServerId, slots: SlotSet) {
        let epoch = self.new_epoch();
        let node = self.node(id);
        (node.following, node.in_step, node.epoch) = (None, false, epoch);
        (node.told, node.claims) = (slots.clone(), slots);
    }

    fn export(&mut self) {
        for id in self.ids() {
            let Some((to, slots, ticks)) = self.nodes[&id].export.clone() else { continue };
            if !self.is_up(to) || !self.is_primary(to) || !self.is_primary(id) {
                self.node(id).export = None;
            } else if ticks > 0 {
                self.node(id).export = Some((to, slots, ticks - 1));
            } else {
                let copied: Vec<_> = self.nodes[&id].keys.clone().into_iter().filter(|(slot, _)| slots.contains(*slot)).collect();
                self.node(to).keys.extend(copied);
                self.claim(to, &slots);
                let drop_at = self.now + EXPORT_TICKS;
                let node = self.node(id);
                node.export = None;
                node.claims.remove(&slots);
                node.told.remove(&slots);
                node.dropping.push((drop_at, slots));
            }
        }
        let now = self.now;
        for node in self.nodes.values_mut().filter(|node| node.up) {
            let due = node.dropping.extract_if(.., |(at, _)| *at <= now).map(|(_, slots)| slots);
            for mut slots in due {
                slots.remove(&node.claims);
                node.keys.retain(|slot, _| !slots.contains(*slot));
            }
        }
    }

    fn synchronise(&mut self) {
        for id in self.ids() {
            let Some(of) = self.nodes[&id].following else { continue };
            let connected = self.is_up(id) && self.is_up(of) && self.is_primary(of);
            let keys = self.nodes.get(&of).map(|node| node.keys.clone()).unwrap_or_default();
            let node = self.node(id);
            if !connected {
                (node.in_step, node.syncing_for) = (false, 0);
            } else if !node.in_step {
                node.syncing_for += 1;
                if node.syncing_for >= SYNC_TICKS {
                    (node.in_step, node.keys) = (true, keys);
                }
            }
        }
        if self.strict {
            self.forgive();
        }
    }

    /// A client writes one key where it is sent.
    fn write(&mut self, key: u32) {
        let slot = key as u16 * KEY_EVERY;
        let version = u64::from(self.now);
        let Some((owner, _)) = self.map().into_iter().find(|(_, slots)| slots.contains(slot)) else { return };
        if !self.is_up(owner) || !self.nodes[&owner].claims.contains(slot) {
            return;
        }
        let node = &self.nodes[&owner];
        let asked = node.migrating.get(&slot).filter(|_| !node.keys.contains_key(&slot)).copied();
        let takes = |peer: ServerId| self.is_up(peer) && self.nodes[&peer].importing.contains_key(&slot);
        let written = match asked {
            Some(peer) if takes(peer) => peer,
            Some(_) => return,
            None => owner,
        };
        self.node(written).keys.insert(slot, version);
        self.expected.insert(slot, version);
    }

    fn move_keys(&mut self, from: ServerId, to: ServerId, slots: &SlotSet, count: usize) {
        let moved: Vec<(u16, u64)> = self.nodes[&from]
            .keys
            .iter()
            .filter(|(slot, _)| slots.contains(**slot))
            .map(|(slot, key)| (*slot, *key))
            .take(count)
            .collect();
        for (slot, version) in moved {
            self.node(from).keys.remove(&slot);
            self.node(to).keys.insert(slot, version);
        }
    }

    fn claim(&mut self, id: ServerId, slots: &SlotSet) {
        let epoch = self.new_epoch();
        let node = self.node(id);
        node.epoch = epoch;
        node.claims.add(slots);
        node.told = node.claims.clone();
        node.importing.retain(|slot, _| !slots.contains(*slot));
    }

    /// The commands of a step of the plan.
    fn steps(&self, action: &Action) -> Vec<Step> {
        let Action::MoveSlots { from, to, slots, way: Way::ByKeys } = action.clone() else {
            return vec![Step::Plain(action.clone())];
        };
        let (mut rest, mut steps) = (slots.first(AT_A_LOOK), Vec::new());
        while !rest.is_empty() {
            let slots = rest.first(GROUP);
            rest.remove(&slots);
            let claim = Step::Claim { at: to, from, slots: slots.clone() };
            let yields = Step::Yield { at: from, to, slots: slots.clone() };
            steps.push(Step::Import { at: to, from, slots: slots.clone() });
            steps.push(Step::Migrate { at: from, to, slots: slots.clone() });
            if self.claims_first {
                steps.push(claim.clone());
            }
            let keys = self.nodes[&from].keys.keys().filter(|slot| slots.contains(**slot)).count();
            steps.extend((0..keys).map(|_| Step::MoveKey { from, to, slots: slots.clone() }));
            steps.extend([claim, yields]);
        }
        steps
    }

    fn take(&mut self, step: &Step) {
        match step {
            Step::Plain(action) => self.apply(action),
            Step::Import { at, from, slots }
                if self.is_up(*at) && self.is_primary(*at) && self.nodes[at].knows.contains(from) =>
            {
                let new: Vec<u16> = slots.iter().filter(|slot| !self.nodes[at].claims.contains(*slot)).collect();
                self.node(*at).importing.extend(new.into_iter().map(|slot| (slot, *from)));
            }
            Step::Migrate { at, to, slots } if self.is_up(*at) && self.nodes[at].knows.contains(to) => {
                let own: Vec<u16> = slots.iter().filter(|slot| self.nodes[at].claims.contains(*slot)).collect();
                self.node(*at).migrating.extend(own.into_iter().map(|slot| (slot, *to)));
            }
            Step::MoveKey { from, to, slots } if self.is_up(*from) && self.is_up(*to) && self.is_primary(*to) => {
                // Whoever was not told that the slots are on their way keeps their keys.
                let told: SlotSet =
                    slots.iter().filter(|slot| self.nodes[from].migrating.get(slot) == Some(to)).map(one).collect();
                self.move_keys(*from, *to, &told, 1);
            }
            Step::Claim { at, from, slots } if self.is_up(*at) && self.is_up(*from) => {
                let ready = |slot: &u16| {
                    let is_empty = self.claims_first || !self.nodes[from].keys.contains_key(slot);
                    let is_given = self.nodes[from].migrating.get(slot) == Some(at);
                    self.nodes[at].importing.contains_key(slot) && is_given && is_empty
                };
                let ready: SlotSet = slots.iter().filter(ready).map(one).collect();
                if !ready.is_empty() {
                    self.claim(*at, &ready);
                }
            }
            Step::Yield { at, to, slots } if self.is_up(*at) => {
                let settled = |slot: &u16| self.nodes[to].claims.contains(*slot) && !self.nodes[at].keys.contains_key(slot);
                let settled: SlotSet = slots.iter().filter(settled).map(one).collect();
                let node = self.node(*at);
                node.claims.remove(&settled);
                node.told = node.claims.clone();
                node.migrating.retain(|slot, _| !settled.contains(*slot));
            }
            _ => {}
        }
    }

    fn apply(&mut self, action: &Action) {
        match action {
            Action::StartServer { server, .. } if !self.is_up(*server) => {
                let node = self.node(*server);
                (node.up, node.promotable, node.in_step, node.syncing_for) = (true, false, false, 0);
            }
            Action::AllowPromotion { server, .. } if self.is_up(*server) => self.node(*server).promotable = true,
            Action::ClusterMeet { server, peer } if self.is_up(*server) && self.is_up(*peer) => {
                self.node(*server).knows.insert(*peer);
                self.node(*peer).knows.insert(*server);
            }
            Action::AddSlots { server, slots } if self.is_up(*server) => {
                let slots: SlotSet = slots.iter().copied().collect();
                let map = self.map();
                assert!(map.iter().all(|(_, owned)| owned.common(&slots).is_empty()), "slots are added twice");
                self.claim(*server, &slots);
            }
            Action::ClusterReplicate { server, primary } if self.is_up(*server) => {
                let primary = self.ids().into_iter().find(|id| node_id(*id) == *primary).unwrap();
                let node = &self.nodes[server];
                assert!(node.claims.is_empty(), "{server} owns slots and is to follow");
                if node.knows.contains(&primary) && (node.following.is_some() || node.keys.is_empty()) {
                    self.follow(*server, primary);
                }
            }
            Action::ClusterForget { server, node } if self.is_up(*server) => {
                let until = self.now + BAN_TICKS;
                let known: Vec<_> = self.nodes[server].knows.iter().copied().filter(|id| node_id(*id) == *node).collect();
                for id in known {
                    self.node(*server).knows.remove(&id);
                    self.node(*server).banned.insert(id, until);
                }
            }
            Action::ClusterTakeover { server } if self.is_up(*server) => {
                let Some(of) = self.nodes[server].following else { return };
                let slots = self.map().into_iter().find(|(id, _)| *id == of).map(|(_, slots)| slots).unwrap_or_default();
                self.lead(*server, slots);
            }
            Action::BumpEpoch { server } if self.is_up(*server) => {
                let epoch = self.new_epoch();
                self.node(*server).epoch = epoch;
            }
            Action::MoveSlots { from, to, slots, way: Way::Atomic } if self.is_up(*from) && self.is_up(*to) => {
                let own = self.nodes[from].claims.common(slots);
                assert!(self.is_primary(*to) && own == *slots, "an engine refuses that");
                self.node(*from).export = Some((*to, slots.clone(), EXPORT_TICKS));
            }
            Action::SettleSlots { server, slots } if self.is_up(*server) => {
                self.node(*server).migrating.retain(|slot, _| !slots.contains(*slot));
                self.node(*server).importing.retain(|slot, _| !slots.contains(*slot));
            }
            Action::DropKeys { server } if self.is_up(*server) => {
                assert!(self.nodes[server].claims.is_empty(), "{server} owns slots and is to drop its keys");
                self.node(*server).keys.clear();
            }
            Action::RemoveServer { server } => {
                let node = self.nodes.remove(server).unwrap();
                assert!(node.claims.is_empty(), "{server} is removed with its slots");
                assert!(node.keys.is_empty(), "{server} is removed with keys");
            }
            _ => {}
        }
    }

    fn observe(&mut self) -> Observed {
        let map = self.map();
        let servers = self.nodes.iter().map(|(id, node)| {
            let claim = (!node.claims.is_empty()).then_some(node.epoch);
            let state = match node.up {
                false => ServerState::Stopped { data: !node.keys.is_empty(), claim },
                true => ServerState::Running(self.facts(*id, &map)),
            };
            (*id, Server { address: address(*id), bus_port: 1, state })
        });
        let mut observed = Observed { servers: servers.collect(), ..Observed::default() };
        let shape = observed.shape();
        self.steady = if self.seen.as_ref() == Some(&shape) { self.steady + TICK } else { Duration::ZERO };
        self.seen = Some(shape);
        observed.steady = self.steady;
        observed
    }

    fn facts(&self, id: ServerId, map: &[(ServerId, SlotSet)]) -> Facts {
        let node = &self.nodes[&id];
        let role = node.following.map_or(Role::Primary, |of| Role::Replica {
            of: address(of),
            link: if node.in_step { Link::Up } else { Link::Down },
        });
        let told = |peer: &ServerId| {
            let slots = map.iter().find(|(owner, _)| owner == peer).map(|(_, slots)| slots.clone());
            let mut slots = slots.unwrap_or_default();
            slots.remove(&node.claims);
            slots.ranges()
        };
        let peers = node.knows.iter().map(|peer| Peer {
            id: node_id(*peer),
            address: Some(address(*peer)),
            handshake: false,
            slots: told(peer),
        });
        let open = |slots: &BTreeMap<u16, ServerId>| {
            slots.iter().map(|(slot, peer)| OpenSlot { slot: *slot, peer: node_id(*peer) }).collect()
        };
        let served = map.iter().filter(|(owner, _)| self.is_up(*owner)).map(|(_, slots)| slots.len()).sum::<u16>();
        let cluster = ClusterFacts {
            id: node_id(id),
            epoch: node.epoch,
            current_epoch: self.epoch,
            ok: served == SLOTS,
            slots: node.claims.ranges(),
            peers: peers.collect(),
            migrating: open(&node.migrating),
            importing: open(&node.importing),
            in_transit: self.atomic.then(|| node.export.as_ref().map(|(_, slots, _)| slots.ranges()).unwrap_or_default()),
        };
        Facts {
            role,
            holds_data: !node.keys.is_empty(),
            offset: node.keys.values().sum(),
            lineage: None,
            promotable: node.promotable,
            cluster: Some(cluster),
        }
    }

    /// A look, and the first `part` commands of its plan.
    fn look(&mut self, part: usize) -> Vec<Action> {
        let observed = self.observe();
        let actions = plan(&self.desired, &observed);
        let steps: Vec<Step> = actions.iter().flat_map(|action| self.steps(action)).collect();
        steps.iter().take(part).for_each(|step| self.take(step));
        self.tick();
        actions
    }

    fn settle(&mut self) {
        let mut actions = Vec::new();
        for _ in 0..SETTLE_TICKS {
            actions = self.look(usize::MAX);
            if actions.is_empty() && self.steady > TICK * 15 {
                break;
            }
        }
        assert_eq!(actions, [], "not converged: {:#?}", self.nodes);
        self.check();
    }

    fn check(&self) {
        let wanted: BTreeSet<ServerId> = self.desired.servers().collect();
        assert_eq!(self.nodes.keys().copied().collect::<BTreeSet<_>>(), wanted, "servers that are to go, or are missing");
        let mut counts = vec![0; usize::from(self.desired.shards())];
        for (id, node) in &self.nodes {
            assert!(node.migrating.is_empty() && node.importing.is_empty(), "{id} has a slot left open");
            let others: BTreeSet<ServerId> = wanted.iter().copied().filter(|other| other != id).collect();
            assert_eq!(node.knows, others, "{id} knows ghosts, or not all");
            counts[usize::from(id.shard)] += node.claims.len();
        }
        assert_eq!(counts.iter().sum::<u16>(), SLOTS, "{counts:?}");
        assert!(counts.iter().max().unwrap() - counts.iter().min().unwrap() <= 1, "{counts:?}");
        let owners = self.nodes.values().filter(|node| !node.claims.is_empty()).count();
        assert_eq!(owners, counts.len(), "a shard has two primaries: {:#?}", self.nodes);
        for (slot, version) in &self.expected {
            let owner = self.nodes.values().find(|node| node.claims.contains(*slot)).unwrap();
            assert!(
                owner.keys.get(slot) >= Some(version),
                "the key of slot {slot} is lost: {:?} of {version}",
                owner.keys.get(slot)
            );
        }
        for node in self.nodes.values() {
            let of = node.following.map(|of| &self.nodes[&of].keys);
            assert!(of.is_none_or(|keys| keys.len() == node.keys.len()), "a replica is out of step");
        }
    }

    fn run(&mut self, events: &[(u32, Event, usize)]) {
        self.settle();
        for (gap, event, part) in events {
            match event {
                Event::Kill(index) => self.kill(*index),
                Event::Shards(shards) => self.resize(*shards),
            }
            (0..*gap).for_each(|_| drop(self.look(*part)));
        }
        self.settle();
    }
}

fn one(slot: u16) -> SlotRange {
    SlotRange { first: slot, last: slot }
}

fn events() -> impl Strategy<Value = Vec<(u32, Event, usize)>> {
    let event = prop_oneof![3 => any::<usize>().prop_map(Event::Kill), 2 => (3u16..7).prop_map(Event::Shards)];
    let part = prop_oneof![3 => 0usize..60, 1 => Just(usize::MAX)];
    prop::collection::vec((0u32..25, event, part), 0..14)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]
    #[test]
    fn shards_come_and_go_whatever_dies(
        shards in 3u16..6, replicas in 1u16..3, ways in any::<[bool; 2]>(), events in events(),
    ) {
        World::new(shards, replicas, ways).run(&events);
    }
}

/// Three shards become five and three again, while the actuator ends after `part` commands of each of its first looks.
fn there_and_back(ways: [bool; 2], claims_first: bool, part: usize) {
    let mut world = World::new(3, 1, ways);
    (world.claims_first, world.strict) = (claims_first, true);
    world.run(&[(150, Event::Shards(5), part)]);
    world.run(&[(150, Event::Shards(3), part)]);
}

const PARTS: [usize; 10] = [0, 1, 2, 3, 4, 5, 6, 7, 9, 14];

#[test]
fn an_actuator_that_dies_after_any_command_is_gone_on_from() {
    for ways in [[false, false], [false, true], [true, false]] {
        PARTS.iter().for_each(|part| there_and_back(ways, false, *part));
    }
}

/// The primary of a new shard dies as soon as it holds a key, after `part` commands of each look.
fn the_first_keys_outlive_their_primary(part: usize) {
    let mut world = World::new(3, 1, [false, false]);
    world.run(&[]);
    world.strict = true;
    world.resize(5);
    let new = ServerId { shard: 3, index: 0 };
    let holds_key = (0..SETTLE_TICKS).any(|_| {
        world.look(part);
        !world.nodes[&new].keys.is_empty()
    });
    assert!(holds_key, "no key moves");
    world.kill_server(new);
    world.settle();
}

#[test]
fn the_first_keys_of_a_new_shard_outlive_its_primary() {
    [3, 4, 5, 8, usize::MAX].into_iter().for_each(the_first_keys_outlive_their_primary);
}

/// The primary of a new shard is told that slots are its own, and dies before it has told anybody: it comes back as their owner.
#[test]
fn slots_that_a_getter_kept_to_itself_go_to_the_one_that_took_its_place() {
    let mut world = World::new(3, 1, [false, false]);
    world.run(&[]);
    world.resize(5);
    let [getter, replica, giver] = [(3, 0), (3, 1), (0, 0)].map(|(shard, index)| ServerId { shard, index });
    let is_moving = (0..SETTLE_TICKS).any(|_| {
        world.look(5);
        let [getter, giver] = [getter, giver].map(|id| &world.nodes[&id]);
        let rests = giver.migrating.is_empty() && getter.importing.is_empty();
        rests && !getter.claims.is_empty() && world.nodes[&replica].in_step && world.nodes[&replica].promotable
    });
    assert!(is_moving, "no slot moves");
    // None that is written to: what its giver took meanwhile would be lost.
    let slots = SlotSet::from_iter([SlotRange { first: 1, last: KEY_EVERY - 1 }]);
    assert_eq!(world.nodes[&giver].claims.common(&slots), slots);
    let epoch = world.new_epoch();
    let node = world.node(getter);
    node.epoch = epoch;
    node.claims.add(&slots);
    world.kill_server(getter);
    world.settle();
}

/// A primary that leaves dies before its replica is told to drop the keys that the engine has moved.
fn the_keys_of_slots_that_have_left_are_dropped() {
    World::new(4, 1, [false, true]).run(&[(4, Event::Shards(3), 1), (0, Event::Kill(6), 47)]);
}

#[test]
fn a_shard_whose_engine_has_not_dropped_its_keys_leaves_nevertheless() {
    the_keys_of_slots_that_have_left_are_dropped();
}

#[track_caller]
fn caught(run: impl FnOnce() + std::panic::UnwindSafe) -> String {
    let caught = std::panic::catch_unwind(run);
    switch_off(None);
    let payload = caught.expect_err("nothing is caught");
    let text = payload.downcast_ref::<&str>().map(|text| (*text).to_owned());
    text.or_else(|| payload.downcast_ref::<String>().cloned()).unwrap_or_default()
}

#[test]
fn the_checks_catch_slots_that_change_hands_before_their_keys() {
    let message = caught(|| PARTS.iter().for_each(|part| there_and_back([false, false], true, *part)));
    assert!(message.contains("is lost"), "{message}");
}

#[test]
fn each_rule_of_resharding_is_needed() {
    for (rule, expected) in [
        (Rule::FinishSlots, "left open"),
        (Rule::MoveWhenWell, "only copy"),
        (Rule::DrainFirst, "with its slots"),
        (Rule::KeepKeys, "with keys"),
        (Rule::KeepArrivals, "only copy"),
        (Rule::DropStrays, "not converged"),
    ] {
        let message = caught(move || {
            switch_off(Some(rule));
            match rule {
                Rule::MoveWhenWell | Rule::KeepArrivals => {
                    [3, usize::MAX].into_iter().for_each(the_first_keys_outlive_their_primary)
                }
                Rule::DropStrays => the_keys_of_slots_that_have_left_are_dropped(),
                _ => PARTS.iter().for_each(|part| there_and_back([false, rule == Rule::KeepKeys], false, *part)),
            }
        });
        assert!(message.contains(expected), "{rule:?}: {message}");
    }
}
