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

mod cluster;
mod sentinel;
#[cfg(test)]
mod simulation;

use std::collections::BTreeMap;
use std::fmt;
use std::net::SocketAddr;
use std::time::Duration;

/// The number of hash slots of a Cluster.
pub const SLOTS: u16 = 16384;

/// A server's fixed place. It outlives processes and pods.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ServerId {
    /// The shard it belongs to; always 0 under Sentinel.
    pub shard: u16,
    /// Its place in the shard, from 0. Says nothing of its role.
    pub index: u16,
}

impl fmt::Display for ServerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "server {}-{}", self.shard, self.index)
    }
}

/// A sentinel's fixed place, from 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SentinelId(pub u16);

impl fmt::Display for SentinelId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "sentinel {}", self.0)
    }
}

/// Who fails over, and over what.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Layout {
    /// One primary with replicas, watched by sentinels.
    Sentinel {
        /// How many sentinels; odd, at least three.
        sentinels: u16,
    },
    /// A Cluster.
    Cluster {
        /// How many shards; at least three.
        shards: u16,
    },
}

/// What is wanted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Desired {
    /// Who fails over, and over what.
    pub layout: Layout,
    /// Replicas of each primary; at least one.
    pub replicas: u16,
    /// How long nothing may have changed before the planner acts where Sentinel or the Cluster bus should have. It must be
    /// longer than their failover takes.
    pub takeover_after: Duration,
}

impl Desired {
    /// The number of shards; one under Sentinel.
    pub fn shards(&self) -> u16 {
        match self.layout {
            Layout::Sentinel { .. } => 1,
            Layout::Cluster { shards } => shards,
        }
    }

    /// Every server, by shard and index.
    pub fn servers(&self) -> impl Iterator<Item = ServerId> + use<> {
        let (shards, replicas) = (self.shards(), self.replicas);
        (0..shards).flat_map(move |shard| (0..=replicas).map(move |index| ServerId { shard, index }))
    }

    /// Every sentinel.
    pub fn sentinels(&self) -> impl Iterator<Item = SentinelId> + use<> {
        let count = match self.layout {
            Layout::Sentinel { sentinels } => sentinels,
            Layout::Cluster { .. } => 0,
        };
        (0..count).map(SentinelId)
    }

    /// How many sentinels must agree that a primary is down: their majority.
    pub fn quorum(&self) -> u16 {
        match self.layout {
            Layout::Sentinel { sentinels } => sentinels / 2 + 1,
            Layout::Cluster { .. } => 0,
        }
    }

    /// The slots of a shard, first and last, when a Cluster is created.
    pub fn home_slots(&self, shard: u16) -> SlotRange {
        let (shards, shard) = (u32::from(self.shards()), u32::from(shard));
        let bound = |n: u32| (n * u32::from(SLOTS) / shards) as u16;
        SlotRange { first: bound(shard), last: bound(shard + 1) - 1 }
    }
}

/// What is seen.
#[derive(Debug, Clone, PartialEq)]
pub struct Observed {
    /// Every desired server.
    pub servers: BTreeMap<ServerId, Server>,
    /// Every desired sentinel.
    pub sentinels: BTreeMap<SentinelId, Sentinel>,
    /// For how long no process, role or opinion has changed.
    pub steady: Duration,
}

/// One server as seen.
#[derive(Debug, Clone, PartialEq)]
pub struct Server {
    /// Where it listens, or will: the address that is announced everywhere and survives restarts.
    pub address: SocketAddr,
    /// The port of its Cluster bus.
    pub bus_port: u16,
    /// What it is doing.
    pub state: ServerState,
}

/// What a server is doing.
#[derive(Debug, Clone, PartialEq)]
pub enum ServerState {
    /// No process.
    Stopped {
        /// Whether its directory holds data.
        data: bool,
    },
    /// The process runs and cannot answer for its data: starting, loading, hanging or cut off.
    Silent,
    /// It answers.
    Running(Facts),
}

/// What a running server says of itself.
#[derive(Debug, Clone, PartialEq)]
pub struct Facts {
    /// Its role.
    pub role: Role,
    /// Whether it holds any key.
    pub holds_data: bool,
    /// Its replication offset.
    pub offset: u64,
    /// Whether Sentinel or the bus may promote it. Restarted servers may not be promoted until they have synchronised.
    pub promotable: bool,
    /// What it says of its Cluster; `None` outside one.
    pub cluster: Option<ClusterFacts>,
}

/// A server's role.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// It accepts writes.
    Primary,
    /// It follows another.
    Replica {
        /// The server that it follows.
        of: SocketAddr,
        /// Whether it does.
        link: Link,
    },
}

/// The state of a replica's link.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Link {
    /// In step.
    Up,
    /// Receiving or loading a copy, or not connected.
    Down,
}

/// A server's own view of its Cluster.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct ClusterFacts {
    /// Its node id.
    pub id: NodeId,
    /// The epoch of its claim to its slots: of two claims, the greater one holds.
    pub epoch: u64,
    /// Whether it sees the Cluster as whole.
    pub ok: bool,
    /// Its own slots; none for a replica.
    pub slots: Vec<SlotRange>,
    /// The other nodes that it knows.
    pub peers: Vec<Peer>,
}

/// A Cluster node's name for itself: 40 hexadecimal digits.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct NodeId(pub String);

impl fmt::Debug for NodeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Another node, as a server sees it.
#[derive(Debug, Clone, PartialEq)]
pub struct Peer {
    /// Its id.
    pub id: NodeId,
    /// Its address, where known.
    pub address: Option<SocketAddr>,
    /// Whether the two have not introduced themselves yet.
    pub handshake: bool,
    /// Its slots.
    pub slots: Vec<SlotRange>,
}

/// Consecutive slots, both ends included.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SlotRange {
    /// The first slot.
    pub first: u16,
    /// The last slot.
    pub last: u16,
}

/// One sentinel as seen.
#[derive(Debug, Clone, PartialEq)]
pub enum Sentinel {
    /// No process.
    Stopped,
    /// The process runs and does not answer.
    Silent,
    /// It answers.
    Running {
        /// What it watches; `None` when nothing.
        watch: Option<Watch>,
    },
}

/// What a sentinel watches.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Watch {
    /// The primary's address.
    pub primary: SocketAddr,
    /// How many replicas of it the sentinel knows.
    pub replicas: u16,
    /// How many other sentinels it knows.
    pub sentinels: u16,
}

/// One step. Each is safe to repeat.
#[derive(Debug, Clone, PartialEq)]
pub enum Action {
    /// Start a stopped server.
    StartServer {
        /// Which.
        server: ServerId,
        /// In which role.
        start: Start,
    },
    /// Start a stopped sentinel.
    StartSentinel {
        /// Which.
        sentinel: SentinelId,
    },
    /// Make a sentinel watch a primary, and nothing else.
    Monitor {
        /// Which sentinel.
        sentinel: SentinelId,
        /// Which primary.
        primary: SocketAddr,
        /// How many sentinels must agree that it is down.
        quorum: u16,
    },
    /// Make a server follow a primary.
    ReplicateFrom {
        /// Which server.
        server: ServerId,
        /// Which primary.
        primary: SocketAddr,
    },
    /// Make a replica primary, where nobody else can: too few sentinels remember anything, and no primary runs.
    Promote {
        /// Which.
        server: ServerId,
    },
    /// Let Sentinel or the bus promote a server that has synchronised.
    AllowPromotion {
        /// Which.
        server: ServerId,
    },
    /// Introduce two nodes of a Cluster.
    ClusterMeet {
        /// Which node is told.
        server: ServerId,
        /// Of which.
        peer: ServerId,
    },
    /// Give slots that nobody owns to a primary.
    AddSlots {
        /// Which.
        server: ServerId,
        /// Which slots.
        slots: Vec<SlotRange>,
    },
    /// Make a node of a Cluster, which owns no slots, follow another.
    ClusterReplicate {
        /// Which.
        server: ServerId,
        /// Whom to follow.
        primary: NodeId,
    },
    /// Make a node forget one that is no more.
    ClusterForget {
        /// Which is told.
        server: ServerId,
        /// Whom to forget.
        node: NodeId,
    },
    /// Make a replica take its shard without a vote, where the primaries that would vote have no majority.
    ClusterTakeover {
        /// Which.
        server: ServerId,
    },
    /// Nothing to do about this now but to look again.
    Wait(Waiting),
}

/// How a server starts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Start {
    /// As primary: nobody else holds data.
    Primary,
    /// As a replica that must not be promoted before it has synchronised.
    ReplicaOf(SocketAddr),
    /// As a node of a Cluster, in the role that its peers tell it, and not to be promoted before it has synchronised.
    ClusterNode,
}

/// What is waited for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Waiting {
    /// A server's process to answer.
    Server(ServerId),
    /// A sentinel's process to answer.
    Sentinel(SentinelId),
    /// A server to synchronise with its primary.
    Synchronisation(ServerId),
    /// Sentinel or the bus to fail a shard over.
    Failover {
        /// The shard.
        shard: u16,
    },
    /// The sentinels to agree on the primary.
    Agreement,
    /// A sentinel to learn of the replicas and of the others.
    Discovery(SentinelId),
    /// A Cluster node to know all others, and to see every slot served.
    Gossip(ServerId),
}

impl fmt::Display for Waiting {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Server(server) => write!(f, "{server} to answer"),
            Self::Sentinel(sentinel) => write!(f, "{sentinel} to answer"),
            Self::Synchronisation(server) => write!(f, "{server} to synchronise with its primary"),
            Self::Failover { shard } => write!(f, "shard {shard} to fail over"),
            Self::Agreement => f.write_str("the sentinels to agree on the primary"),
            Self::Discovery(sentinel) => write!(f, "{sentinel} to learn of the replicas and the other sentinels"),
            Self::Gossip(server) => write!(f, "{server} to see the whole cluster"),
        }
    }
}

/// What to do next, in order. Empty: everything is as desired.
pub fn plan(desired: &Desired, observed: &Observed) -> Vec<Action> {
    match desired.layout {
        Layout::Sentinel { .. } => sentinel::plan(desired, observed),
        Layout::Cluster { .. } => cluster::plan(desired, observed),
    }
}

impl Observed {
    /// The servers that answer.
    fn running(&self) -> impl Iterator<Item = (ServerId, &Server, &Facts)> {
        self.servers.iter().filter_map(|(id, server)| match &server.state {
            ServerState::Running(facts) => Some((*id, server, facts)),
            ServerState::Stopped { .. } | ServerState::Silent => None,
        })
    }

    /// The same without what changes all the time: two equal shapes are a steady state.
    pub fn shape(&self) -> Self {
        let mut shape = self.clone();
        shape.steady = Duration::ZERO;
        for server in shape.servers.values_mut() {
            if let ServerState::Running(facts) = &mut server.state {
                (facts.offset, facts.holds_data) = (0, false);
            }
        }
        shape
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

/// Replicas that have synchronised since they started may be promoted from now on.
fn allow_promotions(observed: &Observed) -> impl Iterator<Item = Action> {
    let synchronised = observed.running().filter(|(_, _, facts)| !facts.promotable && facts.is_in_step());
    synchronised.map(|(server, ..)| Action::AllowPromotion { server })
}

/// With the primary gone and nobody electable: the replica with the most data, if any has some. It synchronised a moment ago, or
/// came back with its own; a copy that was still under way is not held at all.
fn only_copy<'a>(running: impl Iterator<Item = (ServerId, &'a Server, &'a Facts)>) -> Option<ServerId> {
    let copies = running.filter(|(_, _, facts)| facts.role != Role::Primary && facts.holds_data);
    copies.max_by_key(|(_, _, facts)| facts.offset).map(|(server, ..)| server)
}

/// What the servers themselves still have to do: answer, and synchronise.
fn unfinished(observed: &Observed) -> impl Iterator<Item = Action> {
    observed.servers.iter().filter_map(|(id, server)| {
        let waiting = match &server.state {
            ServerState::Silent => Waiting::Server(*id),
            ServerState::Running(Facts { role: Role::Replica { link: Link::Down, .. }, .. }) => Waiting::Synchronisation(*id),
            ServerState::Running(_) | ServerState::Stopped { .. } => return None,
        };
        Some(Action::Wait(waiting))
    })
}
