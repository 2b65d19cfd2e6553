//! What to do, and what is waited for.

use std::fmt;
use std::net::SocketAddr;

use super::desired::{SentinelId, ServerId};
use super::observed::{Member, NodeId, SlotRange};
use super::slots::SlotSet;

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
    /// Let Sentinel or the bus promote a server.
    AllowPromotion {
        /// Which.
        server: ServerId,
        /// The primary whose link to it is up: the server must have all that this one has first, and is left as it is until then. `None`:
        /// its copy is the only one.
        of: Option<SocketAddr>,
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
    /// Make a primary of a Cluster renew its claim to its slots with an epoch that nobody has.
    BumpEpoch {
        /// Which.
        server: ServerId,
    },
    /// Move slots with their keys from one primary to another. A part of it may be done: the next plan goes on from there.
    MoveSlots {
        /// Who owns them.
        from: ServerId,
        /// Who is to own them.
        to: ServerId,
        /// Which.
        slots: SlotSet,
        /// How.
        way: Way,
    },
    /// Make a node of a Cluster forget that slots were on their way: it owns those that it was to take, or no longer owns those that it
    /// was to hand over.
    SettleSlots {
        /// Which.
        server: ServerId,
        /// Which slots.
        slots: SlotSet,
    },
    /// Remove all keys of a primary that owns no slots and is wanted no more: copies of keys whose slots its engine has moved.
    DropKeys {
        /// Which.
        server: ServerId,
    },
    /// End a server that is wanted no more, and give up its place: it holds no slot and no key, and the others have forgotten it.
    RemoveServer {
        /// Which.
        server: ServerId,
    },
    /// Make a sentinel watch nothing.
    Forget {
        /// Which sentinel.
        sentinel: SentinelId,
    },
    /// Tell a sentinel how many must agree that the primary is down.
    SetQuorum {
        /// Which sentinel.
        sentinel: SentinelId,
        /// How many.
        quorum: u16,
    },
    /// Make a sentinel forget all other sentinels and all replicas, and find again those that there are.
    PruneGhosts {
        /// Which sentinel.
        sentinel: SentinelId,
    },
    /// Hand a shard over from its primary, which serves, to a replica in step, and lose nothing.
    Handover {
        /// The primary.
        from: ServerId,
        /// The replica that is preferred.
        to: ServerId,
    },
    /// Delete a pod, if it is still the same; its set makes another of the desired revision.
    ReplacePod {
        /// Whose.
        member: Member,
        /// The pod's uid.
        uid: String,
        /// Why.
        why: Why,
    },
    /// Change how many pods a set asks for. The last ones go first.
    SetReplicas {
        /// Which set.
        of: Set,
        /// How many.
        count: u16,
    },
    /// Nothing to do about this now but to look again.
    Wait(Waiting),
}

/// How slots move.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// By the engine: all keys are copied, and then they and the slots change hands in one moment.
    Atomic,
    /// Key by key, with `MIGRATE`, while both sides redirect clients to each other.
    ByKeys,
}

/// Why a pod is replaced.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Why {
    /// It is of an earlier revision, and its turn has come.
    Stale,
    /// It is of an earlier revision and not ready: nothing is gained by waiting for it.
    StaleAndUnready,
    /// Its node carries too many sentinels, or in a Cluster another too many primaries, and one with room could take it.
    Crowded,
}

/// A set of pods.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Set {
    /// The servers of a shard.
    Servers {
        /// The shard.
        shard: u16,
    },
    /// The sentinels.
    Sentinels,
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
#[derive(Debug, Clone, PartialEq, Eq)]
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
    /// The engine to finish the moves of slots that it has begun.
    Slots,
    /// A server that is to go to lose its last keys.
    Keys(ServerId),
    /// A server's agent to hear which shards there are: it counts their primaries' votes.
    Told(ServerId),
    /// A held server's reason to end.
    Held {
        /// Which server.
        server: ServerId,
        /// Why, in one word.
        reason: String,
        /// Why, for people, with what ends it.
        message: String,
    },
    /// A server to start that holds more than any that runs.
    BestCopy(ServerId),
    /// A person to say which of the copies counts: no primary is left, and nothing says which is the newest.
    Choice,
    /// A member's pod to exist, or to be ready.
    Pod(Member),
    /// A member's node to come back, or to be deleted: until then nobody knows whether its pod still runs.
    Node {
        /// Which member.
        member: Member,
        /// The node's name.
        node: String,
    },
    /// A sentinel to find its peers again before the next forgets its ghosts.
    Ghosts(SentinelId),
    /// A pause after a handover that failed.
    HandoverRetry(ServerId),
}

impl Action {
    /// Whether it moves slots key by key: a part of them at each look.
    pub fn moves_slots(&self) -> bool {
        matches!(self, Self::MoveSlots { way: Way::ByKeys, .. })
    }

    /// Whether it belongs to a change of the number of shards, during which all slots are served.
    pub fn is_resharding(&self) -> bool {
        matches!(
            self,
            Self::MoveSlots { .. }
                | Self::SettleSlots { .. }
                | Self::DropKeys { .. }
                | Self::RemoveServer { .. }
                | Self::Wait(Waiting::Slots | Waiting::Keys(_) | Waiting::Told(_))
        )
    }
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
            Self::Slots => f.write_str("the servers to finish a move of slots"),
            Self::Keys(server) => write!(f, "{server}, which owns no slots and is to go, to lose its last keys"),
            Self::Told(server) => write!(f, "{server} to hear which shards there are; its files change within two minutes"),
            Self::Held { server, message, .. } => write!(f, "{server}, which is held: {message}"),
            Self::BestCopy(server) => write!(
                f,
                "{server}, which holds more than any that runs, to start: see its log; recovery.acceptDataLoss does without it"
            ),
            Self::Choice => f.write_str(
                "a person: no primary is left, and nothing says which copy counts; recovery.acceptDataLoss takes the one that reaches furthest",
            ),
            Self::Pod(member) => write!(f, "the pod of {member} to become ready"),
            Self::Node { member, node } => {
                write!(f, "node {node} of {member} to come back, or to be deleted or marked as out of service")
            }
            Self::Ghosts(sentinel) => write!(f, "{sentinel} to find its peers again before ghosts are forgotten"),
            Self::HandoverRetry(server) => write!(f, "a while before {server} is asked again to hand over"),
        }
    }
}
