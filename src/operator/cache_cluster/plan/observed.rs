//! What is seen: of servers, sentinels and their pods.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::SocketAddr;
use std::time::Duration;

use super::desired::{SentinelId, ServerId};
use super::spread::Moved;
use crate::policy::agent::DataState;

/// What is seen.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Observed {
    /// Every desired server, and those that are to go and still have a place.
    pub servers: BTreeMap<ServerId, Server>,
    /// Every desired sentinel, and those that are to go and still have a place.
    pub sentinels: BTreeMap<SentinelId, Sentinel>,
    /// The pods that exist, of the same; empty on one machine.
    pub pods: BTreeMap<Member, Pod>,
    /// The nodes that a sentinel's pod could be scheduled on, as far as nodes tell; empty where they may not be seen.
    pub open_nodes: BTreeSet<String>,
    /// How many pods the cluster's sets ask for now; `None` on one machine, and before the sets exist.
    pub scale: Option<Scale>,
    /// The same, shard by shard, of a Cluster.
    pub sizes: BTreeMap<u16, u16>,
    /// For how long no process, role or opinion has changed: see [`Observed::shape`].
    pub steady: Duration,
    /// How long ago the last [`Handover`](super::Action::Handover) failed; `None` where the last one succeeded, or there was none.
    pub handover_failed: Option<Duration>,
    /// The servers whose agents have not taken up yet which other servers there are; empty on one machine.
    pub unaware: BTreeSet<ServerId>,
    /// The last time that a sentinel was moved from a crowded node; `None` where none was, or nobody remembers.
    pub moved: Option<Moved>,
}

/// A server or a sentinel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Member {
    /// A server.
    Server(ServerId),
    /// A sentinel.
    Sentinel(SentinelId),
}

impl fmt::Display for Member {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Server(server) => server.fmt(f),
            Self::Sentinel(sentinel) => sentinel.fmt(f),
        }
    }
}

/// What a pod is made of, as a short hash: pods of another one are replaced.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Revision(pub String);

/// How many pods the sets ask for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Scale {
    /// Of each shard; of several the most.
    pub servers: u16,
    /// Of the sentinels.
    pub sentinels: u16,
}

/// A pod that exists.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pod {
    /// Its uid: a pod that is replaced is another.
    pub uid: String,
    /// What it is made of; `None` where it does not say, or announces an address that is its Service's no more.
    pub revision: Option<Revision>,
    /// Where it runs; `None` until it is scheduled.
    pub node: Option<Node>,
    /// Whether its container of the server or the sentinel has ever started. Nothing in memory is lost with one that has not.
    pub started: bool,
    /// Whether it is ready.
    pub ready: bool,
    /// Whether it is on its way out.
    pub deleting: bool,
}

impl Pod {
    /// Its node, where that does not answer or is no more.
    pub fn lost_node(&self) -> Option<&str> {
        self.node.as_ref().filter(|node| !node.ready).map(|node| node.name.as_str())
    }
}

/// A node of Kubernetes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Node {
    /// Its name.
    pub name: String,
    /// Whether it is there and ready.
    pub ready: bool,
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
        /// The epoch with which it comes back as a primary of a Cluster that claims slots; `None` where it does not.
        claim: Option<u64>,
    },
    /// There is no pod, and so no process.
    Absent,
    /// Its agent answers and keeps its port closed.
    Held(Held),
    /// Its agent answers: its place is being decided, it loads, or it ends, be it again and again. With the data that it holds on its
    /// disk.
    Starting(DataState),
    /// The process runs and cannot answer for its data: loading, hanging or cut off.
    Silent,
    /// It answers.
    Running(Facts),
}

/// Why a server is held, and with what.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Held {
    /// The reason in one word, as agents give it.
    pub reason: String,
    /// The reason for people, with what ends it.
    pub message: String,
    /// The data that it would start with.
    pub data: DataState,
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
    /// The history that its offset counts in. `None` where its copy may lack a part, or it holds nothing.
    pub lineage: Option<String>,
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
    /// The greatest epoch that it has heard of.
    pub current_epoch: u64,
    /// Whether it sees the Cluster as whole.
    pub ok: bool,
    /// Its own slots; none for a replica.
    pub slots: Vec<SlotRange>,
    /// The other nodes that it knows.
    pub peers: Vec<Peer>,
    /// Slots that it has begun to hand over key by key, and to whom.
    pub migrating: Vec<OpenSlot>,
    /// Slots that it has begun to take key by key, and from whom.
    pub importing: Vec<OpenSlot>,
    /// The slots that it gives or gets at this moment by its engine's own migration; `None` where that has none.
    pub in_transit: Option<Vec<SlotRange>>,
}

/// A slot on its way, as one of the two nodes remembers it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OpenSlot {
    /// The slot.
    pub slot: u16,
    /// The other node.
    pub peer: NodeId,
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
    /// How many sentinels must agree that the primary is down.
    pub quorum: u16,
    /// Whether it takes the primary for down, or replaces it at this moment.
    pub alarmed: bool,
}
