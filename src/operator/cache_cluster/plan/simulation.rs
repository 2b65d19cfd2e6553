//! The planner against a simulated cluster under random kills, freezes and failovers.
//!
//! Time passes in ticks of [`TICK`]. Sentinel and the Cluster bus are modelled by what they promise: after
//! [`FAILOVER_TICKS`] without the primary, a majority promotes the best replica that may be promoted. Each plan is applied
//! one tick after it was made, and only a part of it, as an actuator that is slow and fails would.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;

use proptest::prelude::*;

use super::*;

const TICK: Duration = Duration::from_millis(500);
const FAILOVER_TICKS: u32 = 5;
const SYNC_TICKS: u32 = 2;
const SETTLE_TICKS: u32 = 300;
/// For how long sentinels that have voted leave another failover of the same primary alone: at least twice their `failover-timeout`, in which one
/// that ended is started anew and tells them.
const VOTED_TICKS: u32 = 20;

#[derive(Debug, Clone, Copy, PartialEq)]
enum Process {
    Stopped,
    Frozen { ticks: u32 },
    Running,
}

#[derive(Debug, Clone)]
struct SimServer {
    process: Process,
    /// How many writes its data contains; 0: empty.
    version: u64,
    role: Role,
    syncing_for: u32,
    promotable: bool,
    /// The claim to the shard's slots.
    epoch: u64,
    /// How many claims were made before it: of two that tie, the others believe the earlier one.
    claimed: u64,
    serves: bool,
    knows: BTreeSet<ServerId>,
    absent_for: u32,
}

#[derive(Debug, Clone)]
struct SimSentinel {
    running: bool,
    watch: Option<SocketAddr>,
    epoch: u64,
}

#[derive(Debug, Clone, Copy)]
enum Fault {
    Kill(usize),
    Freeze(usize, u32),
    KillSentinel(usize),
}

struct World {
    desired: Desired,
    persistent: bool,
    servers: BTreeMap<ServerId, SimServer>,
    sentinels: BTreeMap<SentinelId, SimSentinel>,
    epoch: u64,
    /// The greatest epoch that the nodes had heard of at the last tick.
    heard: u64,
    /// Whether replicas have the epoch of their primary from their birth, as nodes that were made at the same moment may.
    born_alike: bool,
    claims: u64,
    /// The primary for whose failover the sentinels have voted, and for how long they leave it alone.
    voted: Option<(SocketAddr, u32)>,
    seen: Option<Observed>,
    steady: Duration,
    writes: u64,
    /// The servers that were to be given leave to be promoted, which nobody gave them.
    forbidden: BTreeSet<ServerId>,
    /// Whether data is lost that no planner could have kept, which ends the history.
    is_lost: bool,
}

fn address(id: ServerId) -> SocketAddr {
    (Ipv4Addr::LOCALHOST, 1000 + id.shard * 10 + id.index).into()
}

fn node_id(id: ServerId) -> NodeId {
    NodeId(format!("{}-{}", id.shard, id.index))
}

impl World {
    fn new(desired: Desired, persistent: bool, born_alike: bool) -> Self {
        let blank = SimServer {
            process: Process::Stopped,
            version: 0,
            role: Role::Primary,
            syncing_for: 0,
            promotable: true,
            epoch: 0,
            claimed: 0,
            serves: false,
            knows: BTreeSet::new(),
            absent_for: 0,
        };
        let sentinel = SimSentinel { running: false, watch: None, epoch: 0 };
        Self {
            desired: desired.clone(),
            persistent,
            servers: desired.servers().map(|id| (id, blank.clone())).collect(),
            sentinels: desired.sentinels().map(|id| (id, sentinel.clone())).collect(),
            epoch: 0,
            heard: 0,
            born_alike,
            claims: 0,
            voted: None,
            seen: None,
            steady: Duration::ZERO,
            writes: 0,
            forbidden: BTreeSet::new(),
            is_lost: false,
        }
    }

    fn is_cluster(&self) -> bool {
        matches!(self.desired.layout, Layout::Cluster { .. })
    }

    fn is_up(&self, id: ServerId) -> bool {
        self.servers[&id].process == Process::Running
    }

    fn by_address(&self, wanted: SocketAddr) -> Option<ServerId> {
        self.servers.keys().copied().find(|id| address(*id) == wanted)
    }

    fn shard(&self, shard: u16) -> Vec<ServerId> {
        self.servers.keys().copied().filter(|id| id.shard == shard).collect()
    }

    fn others_up(&self, of: ServerId) -> Vec<ServerId> {
        self.shard(of.shard).into_iter().filter(|id| *id != of && self.is_up(*id)).collect()
    }

    /// The node with the latest claim to the shard's slots.
    fn owner(&self, shard: u16) -> Option<ServerId> {
        let claim = |id: &ServerId| (self.servers[id].epoch, std::cmp::Reverse(self.servers[id].claimed));
        self.shard(shard).into_iter().filter(|id| self.servers[id].serves).max_by_key(claim)
    }

    /// Whom clients would write to.
    fn acting(&self, shard: u16) -> Option<ServerId> {
        let id = if self.is_cluster() { self.owner(shard)? } else { self.by_address(self.belief()?.0)? };
        (self.is_up(id) && self.servers[&id].role == Role::Primary).then_some(id)
    }

    /// The latest opinion among the sentinels that run.
    fn belief(&self) -> Option<(SocketAddr, u64)> {
        let running = self.sentinels.values().filter(|sentinel| sentinel.running);
        running.filter_map(|sentinel| Some((sentinel.watch?, sentinel.epoch))).max_by_key(|(_, epoch)| *epoch)
    }

    fn fail(&mut self, fault: Fault) {
        match fault {
            Fault::Kill(index) => {
                let (id, persistent) = (self.nth(index), self.persistent);
                let server = self.servers.get_mut(&id).unwrap();
                server.process = Process::Stopped;
                if !persistent {
                    server.version = 0;
                }
            }
            Fault::Freeze(index, ticks) => {
                let id = self.nth(index);
                let server = self.servers.get_mut(&id).unwrap();
                if server.process == Process::Running {
                    server.process = Process::Frozen { ticks };
                }
            }
            Fault::KillSentinel(index) => {
                let count = self.sentinels.len();
                if let Some(sentinel) = self.sentinels.values_mut().nth(index % count.max(1)) {
                    sentinel.running = false;
                }
            }
        }
    }

    fn nth(&self, index: usize) -> ServerId {
        *self.servers.keys().nth(index % self.servers.len()).unwrap()
    }

    /// One tick of everything that goes on without the planner.
    fn tick(&mut self) {
        for server in self.servers.values_mut() {
            match &mut server.process {
                Process::Frozen { ticks: 0 } => server.process = Process::Running,
                Process::Frozen { ticks } => *ticks -= 1,
                Process::Stopped | Process::Running => {}
            }
            server.absent_for = if server.process == Process::Running { 0 } else { server.absent_for + 1 };
        }
        self.voted = self.voted.and_then(|(of, left)| Some((of, left.checked_sub(1)?)));
        if self.is_cluster() {
            self.bus()
        } else {
            self.sentinel_duty()
        }
        // Before any write could hide that a primary began with nothing.
        self.check();
        self.replicate();
        for shard in 0..self.desired.shards() {
            if let Some(primary) = self.acting(shard) {
                self.writes += 1;
                self.servers.get_mut(&primary).unwrap().version += 1;
            }
        }
        self.replicate_in_step();
    }

    fn bus(&mut self) {
        let met: Vec<_> = self.servers.keys().copied().filter(|id| self.is_up(*id)).collect();
        // Gossip: whoever is known to one is known to all that know that one.
        let all = self.servers.len() - 1;
        for id in met.iter().filter(|id| self.servers[id].knows.len() < all).copied().collect::<Vec<_>>() {
            let theirs: BTreeSet<_> = self.servers[&id].knows.iter().flat_map(|peer| self.servers[peer].knows.clone()).collect();
            self.servers.get_mut(&id).unwrap().knows.extend(theirs.into_iter().filter(|peer| *peer != id));
        }
        self.heard = self.epoch;
        for shard in 0..self.desired.shards() {
            self.part_ties(shard);
            let Some(owner) = self.owner(shard) else { continue };
            // Any primary that still runs corrects those whose claim is beaten.
            if self.is_up(owner) || self.voters() > 0 {
                for id in self.others_up(owner) {
                    let server = &self.servers[&id];
                    let beaten = server.serves && server.epoch < self.servers[&owner].epoch;
                    let follows_beaten = matches!(server.role, Role::Replica { of, .. } if of != address(owner));
                    if beaten || follows_beaten {
                        self.follow(id, address(owner));
                    }
                }
            }
            if self.servers[&owner].absent_for >= FAILOVER_TICKS && self.voters() > self.electorate() / 2 {
                self.elect(shard, owner);
            }
        }
    }

    /// Of two primaries that meet with the same claim, the one with the smaller id renews its own.
    fn part_ties(&mut self, shard: u16) {
        let up: Vec<ServerId> = self.shard(shard).into_iter().filter(|id| self.is_up(*id) && self.servers[id].serves).collect();
        if let [first, second, ..] = up[..]
            && self.servers[&first].epoch == self.servers[&second].epoch
        {
            self.claim(first);
        }
    }

    fn claim(&mut self, id: ServerId) {
        (self.epoch, self.claims) = (self.epoch + 1, self.claims + 1);
        let (epoch, claimed) = (self.epoch, self.claims);
        let server = self.servers.get_mut(&id).unwrap();
        (server.epoch, server.claimed) = (epoch, claimed);
    }

    /// A node whose epoch is the greatest that it has heard of takes no other without a vote.
    fn claim_unasked(&mut self, id: ServerId) {
        if self.servers[&id].epoch < self.heard {
            self.claim(id);
        } else {
            self.claims += 1;
            self.servers.get_mut(&id).unwrap().claimed = self.claims;
        }
    }

    /// Of how many primaries most must vote: those that own slots.
    fn electorate(&self) -> u16 {
        (0..self.desired.shards()).filter(|shard| self.owner(*shard).is_some()).count() as u16
    }

    fn voters(&self) -> u16 {
        (0..self.desired.shards()).filter(|shard| self.acting(*shard).is_some()).count() as u16
    }

    /// Promotes the best replica of `lost`. Sentinel remembers replicas that follow another by now; the bus does not.
    fn elect(&mut self, shard: u16, lost: ServerId) -> Option<ServerId> {
        let followers = self.shard(shard).into_iter().filter(|id| {
            let server = &self.servers[id];
            let knows = |of| of == address(lost) || !self.is_cluster();
            self.is_up(*id) && server.promotable && matches!(server.role, Role::Replica { of, .. } if knows(of))
        });
        let best = followers.max_by_key(|id| self.servers[id].version)?;
        self.promote(best);
        Some(best)
    }

    fn promote(&mut self, id: ServerId) {
        self.claim(id);
        self.lead(id);
    }

    fn lead(&mut self, id: ServerId) {
        let cluster = self.is_cluster();
        let server = self.servers.get_mut(&id).unwrap();
        (server.role, server.serves) = (Role::Primary, cluster);
    }

    fn follow(&mut self, id: ServerId, of: SocketAddr) {
        let server = self.servers.get_mut(&id).unwrap();
        server.role = Role::Replica { of, link: Link::Down };
        server.syncing_for = 0;
        server.serves = false;
    }

    fn sentinel_duty(&mut self) {
        let Some((watched, epoch)) = self.belief() else { return };
        for sentinel in self.sentinels.values_mut().filter(|sentinel| sentinel.running && sentinel.watch.is_some()) {
            (sentinel.watch, sentinel.epoch) = (Some(watched), epoch);
        }
        let primary = self.by_address(watched).unwrap();
        let watching = self.sentinels.values().filter(|sentinel| sentinel.running && sentinel.watch.is_some()).count();
        if watching < usize::from(self.desired.quorum()) {
            return;
        }
        if self.is_up(primary) {
            for id in self.others_up(primary) {
                let astray = !matches!(self.servers[&id].role, Role::Replica { of, .. } if of == watched);
                if astray && self.servers[&primary].role == Role::Primary {
                    self.follow(id, watched);
                }
            }
        } else if self.servers[&primary].absent_for >= FAILOVER_TICKS
            && self.voted.is_none_or(|(of, _)| of != watched)
            && let Some(promoted) = self.elect(0, primary)
        {
            self.voted = Some((watched, VOTED_TICKS));
            // One sentinel knows first; the others follow at the next tick.
            let first = self.sentinels.values_mut().find(|sentinel| sentinel.running && sentinel.watch.is_some());
            let first = first.unwrap();
            (first.watch, first.epoch) = (Some(address(promoted)), self.epoch);
        }
    }

    /// Replicas whose link is down make progress towards a full copy, which replaces what they hold.
    fn replicate(&mut self) {
        for id in self.servers.keys().copied().collect::<Vec<_>>() {
            let Role::Replica { of, link } = self.servers[&id].role else { continue };
            let source = self.by_address(of).filter(|source| self.is_up(*source));
            let connected = self.is_up(id) && source.is_some_and(|source| self.servers[&source].role == Role::Primary);
            let source_version = source.map_or(0, |source| self.servers[&source].version);
            let server = self.servers.get_mut(&id).unwrap();
            if !connected {
                server.role = Role::Replica { of, link: Link::Down };
                server.syncing_for = 0;
            } else if link == Link::Down {
                server.syncing_for += 1;
                if server.syncing_for >= SYNC_TICKS {
                    assert!(server.version == 0 || source_version > 0, "{id} replaces its data by nothing");
                    server.version = source_version;
                    server.role = Role::Replica { of, link: Link::Up };
                }
            }
        }
    }

    fn replicate_in_step(&mut self) {
        for id in self.servers.keys().copied().collect::<Vec<_>>() {
            if let Role::Replica { of, link: Link::Up } = self.servers[&id].role {
                let version = self.servers[&self.by_address(of).unwrap()].version;
                self.servers.get_mut(&id).unwrap().version = version;
            }
        }
    }

    /// No server acts as primary without data while a peer holds some: unless that one was to be preferred, and whoever carries plans out stood
    /// still for as long as a failover takes.
    fn check(&mut self) {
        for shard in 0..self.desired.shards() {
            let Some(primary) = self.acting(shard) else { continue };
            let holder = self.shard(shard).into_iter().find(|id| self.is_up(*id) && self.servers[id].version > 0);
            let Some(holder) = holder.filter(|_| self.servers[&primary].version == 0) else { continue };
            assert!(self.forbidden.contains(&holder), "{primary} is primary and empty while {holder} holds data");
            self.is_lost = true;
        }
    }

    fn observe(&mut self) -> Observed {
        let servers = self.servers.iter().map(|(id, server)| {
            let state = match server.process {
                Process::Stopped => {
                    ServerState::Stopped { data: server.version > 0, claim: server.serves.then_some(server.epoch) }
                }
                Process::Frozen { .. } => ServerState::Silent,
                Process::Running => ServerState::Running(self.facts(*id)),
            };
            (*id, Server { address: address(*id), bus_port: 1, state })
        });
        let servers = servers.collect();
        let others = self.sentinels.values().filter(|sentinel| sentinel.watch.is_some()).count() as u16;
        let sentinels = self.sentinels.iter().map(|(id, sentinel)| {
            let watch = sentinel.watch.map(|primary| Watch {
                primary,
                replicas: self.desired.replicas,
                sentinels: others - 1,
                quorum: self.desired.quorum(),
                alarmed: false,
            });
            (*id, if sentinel.running { Sentinel::Running { watch } } else { Sentinel::Stopped })
        });
        let mut observed = Observed { servers, sentinels: sentinels.collect(), ..Observed::default() };
        let shape = observed.shape();
        self.steady = if self.seen.as_ref() == Some(&shape) { self.steady + TICK } else { Duration::ZERO };
        self.seen = Some(shape);
        observed.steady = self.steady;
        observed
    }

    fn facts(&self, id: ServerId) -> Facts {
        let server = &self.servers[&id];
        // A node believes its own claim until it is told better; others believe the latest claim.
        let slots = |of: &ServerId| {
            let contested = server.serves && of.shard == id.shard;
            let believed = self.servers[of].serves && (*of == id || !contested && self.owner(of.shard) == Some(*of));
            if believed { vec![self.desired.home_slots(of.shard)] } else { Vec::new() }
        };
        let peers = server.knows.iter().map(|peer| Peer {
            id: node_id(*peer),
            address: Some(address(*peer)),
            handshake: false,
            slots: slots(peer),
        });
        let cluster = ClusterFacts {
            id: node_id(id),
            epoch: server.epoch,
            current_epoch: self.heard.max(server.epoch),
            ok: (0..self.desired.shards()).all(|shard| self.acting(shard).is_some()),
            slots: slots(&id),
            peers: peers.collect(),
            ..ClusterFacts::default()
        };
        Facts {
            role: server.role,
            holds_data: server.version > 0,
            offset: server.version,
            lineage: None,
            promotable: server.promotable,
            cluster: self.is_cluster().then_some(cluster),
        }
    }

    fn apply(&mut self, action: &Action) {
        match action {
            Action::StartServer { server, start } => self.start(*server, *start),
            Action::StartSentinel { sentinel } => self.sentinels.get_mut(sentinel).unwrap().running = true,
            Action::Monitor { sentinel, primary, .. } => {
                let epoch = self.epoch;
                let sentinel = self.sentinels.get_mut(sentinel).unwrap();
                (sentinel.watch, sentinel.epoch) = (Some(*primary), epoch);
            }
            Action::ReplicateFrom { server, primary } if self.is_up(*server) => self.follow(*server, *primary),
            Action::Promote { server } if self.is_up(*server) => self.promote(*server),
            Action::ClusterTakeover { server } if self.is_up(*server) => {
                self.claim_unasked(*server);
                self.lead(*server);
            }
            Action::BumpEpoch { server } if self.is_up(*server) && self.servers[server].epoch < self.heard => self.claim(*server),
            Action::AllowPromotion { server, .. } if self.is_up(*server) => {
                self.servers.get_mut(server).unwrap().promotable = true;
            }
            Action::ClusterMeet { server, peer } if self.is_up(*server) && self.is_up(*peer) => {
                self.servers.get_mut(server).unwrap().knows.insert(*peer);
                self.servers.get_mut(peer).unwrap().knows.insert(*server);
            }
            Action::AddSlots { server, slots } if self.is_up(*server) => {
                assert_eq!(slots[..], [self.desired.home_slots(server.shard)]);
                assert!(self.shard(server.shard).iter().all(|id| !self.servers[id].serves), "slots are added twice");
                self.promote(*server);
            }
            // Who was elected since it was planned owns slots, and refuses.
            Action::ClusterReplicate { server, primary } if self.is_up(*server) && !self.servers[server].serves => {
                let primary = self.servers.keys().copied().find(|id| node_id(*id) == *primary).unwrap();
                assert!(self.servers[server].knows.contains(&primary));
                self.follow(*server, address(primary));
                if self.born_alike {
                    self.servers.get_mut(server).unwrap().epoch = self.servers[&primary].epoch;
                }
            }
            Action::ClusterForget { .. } => panic!("nobody is to be forgotten here"),
            _ => {}
        }
    }

    fn start(&mut self, id: ServerId, start: Start) {
        assert!(!self.is_up(id) || !matches!(self.servers[&id].process, Process::Frozen { .. }), "{id} runs already");
        let server = self.servers.get_mut(&id).unwrap();
        server.process = Process::Running;
        server.promotable = start == Start::Primary;
        server.syncing_for = 0;
        match start {
            Start::Primary => server.role = Role::Primary,
            Start::ReplicaOf(of) => server.role = Role::Replica { of, link: Link::Down },
            Start::ClusterNode => {
                if let Role::Replica { of, .. } = server.role {
                    server.role = Role::Replica { of, link: Link::Down };
                }
            }
        }
    }

    /// Runs the faults, each after some ticks, then lets the world settle.
    fn run(&mut self, planner: impl Fn(&Desired, &Observed) -> Vec<Action>, faults: &[(u32, Fault, usize)]) {
        let mut decided = Vec::new();
        let step = |world: &mut Self, decided: &mut Vec<Action>, part: usize| {
            let undone = decided.split_off(part.min(decided.len()));
            decided.drain(..).for_each(|action| world.apply(&action));
            let leave = |action: Action| if let Action::AllowPromotion { server, .. } = action { Some(server) } else { None };
            world.forbidden = undone.into_iter().filter_map(leave).collect();
            let observed = world.observe();
            *decided = planner(&world.desired, &observed);
            world.tick();
        };
        for (gap, fault, part) in faults {
            for _ in 0..*gap {
                step(self, &mut decided, *part);
                if self.is_lost {
                    return;
                }
            }
            self.fail(*fault);
        }
        for _ in 0..SETTLE_TICKS {
            step(self, &mut decided, usize::MAX);
            if decided.is_empty() && self.steady > TICK * 20 {
                break;
            }
        }
        assert_eq!(decided, [], "not converged: {:#?} {:#?}", self.servers, self.sentinels);
        for shard in 0..self.desired.shards() {
            let primary = self.acting(shard).expect("no primary");
            for id in self.shard(shard) {
                assert_eq!(self.servers[&id].version, self.servers[&primary].version, "{id} is out of step");
            }
        }
    }
}

fn desired() -> impl Strategy<Value = Desired> {
    let sentinel = prop_oneof![Just(3u16), Just(5)].prop_map(|sentinels| Layout::Sentinel { sentinels });
    let cluster = (3u16..6).prop_map(|shards| Layout::Cluster { shards });
    let layout = prop_oneof![sentinel, cluster];
    (layout, 1u16..4).prop_map(|(layout, replicas)| Desired::on_one_machine(layout, replicas, TICK * 12))
}

fn faults() -> impl Strategy<Value = Vec<(u32, Fault, usize)>> {
    let fault = prop_oneof![
        4 => any::<usize>().prop_map(Fault::Kill),
        1 => (any::<usize>(), 1u32..25).prop_map(|(index, ticks)| Fault::Freeze(index, ticks)),
        1 => any::<usize>().prop_map(Fault::KillSentinel),
    ];
    let gap = prop_oneof![3 => 0u32..4, 2 => 4u32..30];
    prop::collection::vec((gap, fault, prop_oneof![1 => 0usize..3, 3 => Just(usize::MAX)]), 0..40)
}

/// 100, or what LARDER_PLAN_CASES says.
fn cases() -> u32 {
    std::env::var("LARDER_PLAN_CASES").map_or(100, |cases| cases.parse().unwrap())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: cases(), ..ProptestConfig::default() })]
    #[test]
    fn every_cluster_converges_and_keeps_its_data(
        desired in desired(), persistent in any::<bool>(), born_alike in any::<bool>(), faults in faults(),
    ) {
        World::new(desired, persistent, born_alike).run(plan, &faults);
    }
}

/// A planner that, once there is data, restarts every server at once as what it was: the error that the checks must catch.
fn hasty(desired: &Desired, observed: &Observed) -> Vec<Action> {
    let mut actions = plan(desired, observed);
    let start = if observed.sentinels.is_empty() { Start::ClusterNode } else { Start::Primary };
    let data = observed.running().any(|(_, _, facts)| facts.holds_data);
    let stopped = observed.servers.iter().filter(|(_, server)| data && server.is_stopped());
    actions.extend(stopped.map(|(server, _)| Action::StartServer { server: *server, start }));
    actions
}

#[track_caller]
fn check_hasty_is_caught(layout: Layout) {
    let desired = Desired::on_one_machine(layout, 1, TICK * 12);
    let kill_the_primary = [(40, Fault::Kill(0), usize::MAX)];
    let caught = std::panic::catch_unwind(|| World::new(desired, false, false).run(hasty, &kill_the_primary));
    let message = *caught.unwrap_err().downcast::<String>().unwrap();
    assert!(message.contains("replaces its data by nothing") || message.contains("primary and empty"), "{message}");
}

#[test]
fn the_checks_catch_a_hasty_restart() {
    check_hasty_is_caught(Layout::Sentinel { sentinels: 3 });
    check_hasty_is_caught(Layout::Cluster { shards: 3 });
}

/// A planner that takes no notice of claims that tie.
fn careless_of_ties(desired: &Desired, observed: &Observed) -> Vec<Action> {
    plan(desired, observed).into_iter().filter(|action| !matches!(action, Action::BumpEpoch { .. })).collect()
}

/// Two of three primaries die. The replica that takes the last shard over has the greatest epoch already.
#[test]
fn a_takeover_that_ties_with_the_dead_primary_is_ended() {
    let desired = Desired::on_one_machine(Layout::Cluster { shards: 3 }, 1, TICK * 12);
    let two_die = [(60, Fault::Kill(2), usize::MAX), (0, Fault::Kill(4), usize::MAX)];
    World::new(desired.clone(), false, true).run(plan, &two_die);
    let stuck = std::panic::catch_unwind(|| World::new(desired, false, true).run(careless_of_ties, &two_die));
    let message = *stuck.unwrap_err().downcast::<String>().unwrap();
    assert!(message.contains("not converged"), "{message}");
}

/// Only one shard has its slots when its primary dies: of the others, the one to get them hangs, or dies. The replica that takes the shard
/// over has the greatest epoch already, and no other primary owns slots.
#[test]
fn a_takeover_that_ties_while_the_cluster_forms_is_ended() {
    let desired = Desired::on_one_machine(Layout::Cluster { shards: 3 }, 2, TICK * 12);
    let faults = [(2, Fault::Freeze(0, 6), usize::MAX), (0, Fault::Kill(6), usize::MAX), (4, Fault::Kill(3), usize::MAX)];
    World::new(desired, false, true).run(plan, &faults);
}

/// The sentinels promoted a server, which then died and was started as a replica of the former primary, that had only hung; it dies before
/// anybody told the sentinels.
#[test]
fn a_replica_that_the_sentinels_take_for_the_primary_does_not_wait_for_ever() {
    let desired = Desired::on_one_machine(Layout::Sentinel { sentinels: 3 }, 1, TICK * 12);
    let faults = [(7, Fault::Freeze(0, 13), 2), (5, Fault::Kill(1), usize::MAX), (22, Fault::Kill(0), 0), (1, Fault::Kill(0), 1)];
    for persistent in [false, true] {
        World::new(desired.clone(), persistent, false).run(plan, &faults);
    }
}

/// The sentinels are told of a primary that has just died, with nothing on its disk yet. They promote a replica, which takes a write and dies
/// before most of them have heard of it.
#[test]
fn a_write_to_a_primary_that_most_sentinels_have_not_heard_of_is_kept() {
    let desired = Desired::on_one_machine(Layout::Sentinel { sentinels: 3 }, 2, TICK * 12);
    let (all, kill) = (usize::MAX, Fault::Kill);
    let faults = [(3, kill(1), all), (3, kill(0), 2), (2, kill(2), all), (3, kill(1), 0), (3, kill(1), all)];
    World::new(desired, true, false).run(plan, &faults);
}

/// The one sentinel that knows of a failover ends before it has told the others. They have voted, and wait for it.
#[test]
fn a_failover_that_one_sentinel_knows_of_is_not_made_twice() {
    let desired = Desired::on_one_machine(Layout::Sentinel { sentinels: 5 }, 2, TICK * 12);
    let (all, kill) = (usize::MAX, Fault::Kill);
    let faults = [(2, kill(0), all), (1, kill(1), 1), (3, kill(0), all), (5, Fault::KillSentinel(0), all), (1, kill(0), 0)];
    World::new(desired, false, false).run(plan, &faults);
}

/// Three of four shards have their slots when one of the three loses its primary: the other two are the most that own any.
#[test]
fn a_shard_is_failed_over_while_the_last_one_waits_for_its_slots() {
    let desired = Desired::on_one_machine(Layout::Cluster { shards: 4 }, 1, TICK * 12);
    let (all, kill) = (usize::MAX, Fault::Kill);
    let faults = [
        (2, kill(0), 1),
        (0, kill(0), 0),
        (1, kill(1), 1),
        (2, Fault::KillSentinel(0), all),
        (2, kill(4), 2),
        (1, Fault::Freeze(2, 11), 0),
        (4, kill(2), 1),
        (0, kill(4), 0),
    ];
    World::new(desired, false, false).run(plan, &faults);
}

/// The first primary hangs before it was written to. Another is promoted, takes writes and dies, when the first one goes on, as a primary.
#[test]
fn a_primary_that_hung_and_has_nothing_does_not_take_the_place_of_one_with_data() {
    let desired = Desired::on_one_machine(Layout::Sentinel { sentinels: 3 }, 2, TICK * 12);
    let (all, kill) = (usize::MAX, Fault::Kill);
    let faults = [
        (6, Fault::Freeze(0, 5), all),
        (5, Fault::Freeze(0, 1), all),
        (0, kill(2), 0),
        (0, kill(1), 0),
        (13, kill(1), 0),
        (2, kill(0), all),
    ];
    World::new(desired, true, false).run(plan, &faults);
}

/// A replica without data hangs, and with it the leave to be promoted that it had before there was any. The one that synchronised meanwhile has
/// none yet when its primary is lost: of the two it is to take over, if anybody gives it leave in time.
#[test]
fn a_replica_that_hung_with_nothing_is_not_preferred_to_the_only_copy() {
    let desired = Desired::on_one_machine(Layout::Sentinel { sentinels: 3 }, 2, TICK * 12);
    let (all, kill) = (usize::MAX, Fault::Kill);
    let faults = [
        (3, kill(1), all),
        (1, kill(1), 2),
        (2, Fault::KillSentinel(0), 1),
        (2, kill(0), 1),
        (0, Fault::Freeze(2, 8), 0),
        (9, kill(1), all),
    ];
    let played = |gives: usize| {
        let mut world = World::new(desired.clone(), false, false);
        world.run(plan, &[&faults[..], &[(5, kill(0), gives)]].concat());
        world
    };
    assert!(!played(all).is_lost && played(0).is_lost);
}

/// A takeover ties with the claim of the dead primary, and a majority comes back that elects another replica, which was just to be told to
/// follow the one that took over.
#[test]
fn a_replica_that_is_elected_before_it_is_told_whom_to_follow_keeps_its_shard() {
    let desired = Desired::on_one_machine(Layout::Cluster { shards: 4 }, 2, TICK * 12);
    let (all, kill) = (usize::MAX, Fault::Kill);
    let faults = [(8, kill(0), all), (0, kill(9), 0), (14, Fault::Freeze(6, 17), 0), (0, kill(4), 0), (0, kill(4), 0)];
    World::new(desired, false, true).run(plan, &faults);
}
