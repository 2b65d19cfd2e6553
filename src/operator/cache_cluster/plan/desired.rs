//! What is wanted.

use std::fmt;
use std::time::Duration;

use super::observed::{Member, Revision, SlotRange};

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

impl Layout {
    /// The number of shards; one under Sentinel.
    pub fn shards(self) -> u16 {
        match self {
            Self::Sentinel { .. } => 1,
            Self::Cluster { shards } => shards,
        }
    }

    /// The number of sentinels; none in a Cluster.
    pub fn sentinels(self) -> u16 {
        match self {
            Self::Sentinel { sentinels } => sentinels,
            Self::Cluster { .. } => 0,
        }
    }
}

/// What is wanted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Desired {
    /// Who fails over, and over what.
    pub layout: Layout,
    /// Replicas of each primary; at least one.
    pub replicas: u16,
    /// How long nothing may have changed before the planner acts where Sentinel or the Cluster bus should have. It must be
    /// longer than their failover takes.
    pub takeover_after: Duration,
    /// Who starts servers and sentinels.
    pub starter: Starter,
    /// Whether data survives a server's process and its pod.
    pub durable: bool,
    /// Whether a person accepts the loss of what only copies hold that cannot be asked, or compared.
    pub accept_data_loss: bool,
    /// Nothing is planned while a person holds everything as it is.
    pub paused: bool,
    /// What the pods are to be; `None` on one machine, where nothing is rolled.
    pub pods: Option<DesiredPods>,
}

/// Who starts servers and sentinels, and decides in which place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Starter {
    /// The planner, by [`StartServer`](super::Action::StartServer) and [`StartSentinel`](super::Action::StartSentinel). It also says when a
    /// server may be promoted.
    Planner,
    /// An agent beside each server, by its own rules; sentinels start by themselves. The planner tells the sentinels of the primary
    /// that acts, and waits for the agents otherwise. Under Sentinel alone.
    Agent,
}

/// What pods are to be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DesiredPods {
    /// What each server's pod is to be made of.
    pub servers: Revision,
    /// What each sentinel's pod is to be made of.
    pub sentinels: Revision,
}

impl DesiredPods {
    /// What a member's pod is to be made of.
    pub fn revision(&self, member: Member) -> &Revision {
        match member {
            Member::Server(_) => &self.servers,
            Member::Sentinel(_) => &self.sentinels,
        }
    }
}

impl Desired {
    /// What is wanted on one machine: the planner starts every process, and nothing is rolled.
    pub fn on_one_machine(layout: Layout, replicas: u16, takeover_after: Duration) -> Self {
        Self {
            layout,
            replicas,
            takeover_after,
            starter: Starter::Planner,
            durable: false,
            accept_data_loss: false,
            paused: false,
            pods: None,
        }
    }

    /// The number of shards; one under Sentinel.
    pub fn shards(&self) -> u16 {
        self.layout.shards()
    }

    /// Every server, by shard and index.
    pub fn servers(&self) -> impl Iterator<Item = ServerId> + use<> {
        let (shards, replicas) = (self.shards(), self.replicas);
        (0..shards).flat_map(move |shard| (0..=replicas).map(move |index| ServerId { shard, index }))
    }

    /// Every sentinel.
    pub fn sentinels(&self) -> impl Iterator<Item = SentinelId> + use<> {
        (0..self.layout.sentinels()).map(SentinelId)
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
