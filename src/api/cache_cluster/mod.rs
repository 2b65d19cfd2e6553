//! `CacheCluster`: a cache tier, and how it is run.

// Each printer column has a name and a path of its own, which the lint takes for repetition.
#![allow(clippy::duplicated_attributes)]

mod keeping;
mod network;
mod pods;
mod status;
mod tls;

use std::collections::BTreeMap;

use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::sensitive::SensitiveSource;
use super::text::{ImageText, LagText, MemoryText, ObjectNameText, StorageText, UserText, VersionText};
use crate::policy::{ByteSize, Span};

pub use keeping::Keeping;
pub use network::{NetworkPolicyOptions, PeerSpec, SelectorSpec};
pub use pods::{CpuOptions, NameRef, PodOptions, Spread, TaintEffect, TolerationOperator, TolerationSpec};
pub use status::{CacheClusterStatus, CertificatesStatus, ConditionType, SentinelsStatus, ServersStatus, UsersStatus};
pub use tls::TlsSpec;

/// The longest name of a CacheCluster on Kubernetes: the names of its objects and their labels are made from it.
pub const MAX_NAME_CHARS: usize = 40;

/// A cache tier: Redis or Valkey servers under Sentinel or Cluster, with replicas.
#[derive(CustomResource, KubeSchema, Clone, Debug, PartialEq, Serialize, Deserialize)]
#[kube(
    group = "larder.dev",
    version = "v1alpha1",
    kind = "CacheCluster",
    plural = "cacheclusters",
    shortname = "cc",
    category = "larder",
    namespaced,
    derive = "PartialEq",
    doc = "A cache tier: Redis or Valkey servers under Sentinel or Cluster, with replicas.",
    status = "CacheClusterStatus",
    validation = Rule::new("self.metadata.name.size() <= 40 && self.metadata.name.matches('^[a-z]([-a-z0-9]*[a-z0-9])?$')")
        .message("name it with at most 40 lower-case letters, digits and dashes, beginning with a letter: its Services are named after it"),
    printcolumn(name = "Status", type_ = "string", json_path = ".status.summary"),
    printcolumn(name = "Ready", type_ = "string", json_path = ".status.servers.ready"),
    printcolumn(name = "Primary", type_ = "string", json_path = ".status.servers.primary"),
    printcolumn(name = "Engine", type_ = "string", json_path = ".spec.engine.kind"),
    printcolumn(name = "Version", type_ = "string", json_path = ".spec.engine.version"),
    printcolumn(name = "Memory", type_ = "string", json_path = ".spec.memory"),
    printcolumn(name = "Mode", type_ = "string", json_path = ".spec.mode", priority = "1"),
    printcolumn(name = "Shards", type_ = "integer", json_path = ".spec.shards", priority = "1"),
    printcolumn(name = "Sentinels", type_ = "string", json_path = ".status.sentinels.ready", priority = "1"),
    printcolumn(name = "Updated", type_ = "string", json_path = ".status.servers.updated", priority = "1"),
    printcolumn(name = "Eviction", type_ = "string", json_path = ".spec.eviction", priority = "1"),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp")
)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[x_kube(validation = Rule::new("self.mode == 'Cluster' || !has(self.shards)")
    .message("shards has a meaning under mode: Cluster only: remove it, or write mode: Cluster"))]
#[x_kube(validation = Rule::new("self.mode == 'Sentinel' || !has(self.sentinels)")
    .message("sentinels has a meaning under mode: Sentinel only: remove it, or write mode: Sentinel"))]
#[x_kube(validation = Rule::new("!has(self.writes) || self.writes.minReplicas <= (has(self.replicas) ? self.replicas : 1)")
    .message("writes.minReplicas is more than there are replicas, so every write would be refused: lower it, or raise replicas"))]
#[x_kube(validation = Rule::new("self.mode == oldSelf.mode")
    .message("mode cannot be changed: create another CacheCluster, and move its users"))]
#[x_kube(validation = Rule::new("has(self.storage) == has(oldSelf.storage)")
    .message("storage cannot be added or removed later: create another CacheCluster, and move its users"))]
#[x_kube(validation = Rule::new("(has(self.tls) && self.tls.enabled) == (has(oldSelf.tls) && oldSelf.tls.enabled)")
    .message("TLS cannot be switched on or off later, since clients would be cut off: create another CacheCluster, and move its users"))]
pub struct CacheClusterSpec {
    /// The server program.
    pub engine: Engine,
    /// How servers are watched and addressed: Sentinel for one primary that holds all keys, Cluster for several shards.
    pub mode: Mode,
    /// The number of shards, each with a primary of its own, under mode Cluster. At least 3, which is the default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 3, max = 100))]
    pub shards: Option<u32>,
    /// The replicas of each primary, at least 1: a single instance is no cache tier. Default 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 5))]
    pub replicas: Option<u32>,
    /// The sentinels under mode Sentinel: an odd number of at least 3, which is the default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 3, max = 9))]
    #[x_kube(validation = Rule::new("self % 2 == 1").message("write an odd number of sentinels, such as 3 or 5: an even one tolerates no more failures"))]
    pub sentinels: Option<u32>,
    /// The memory of each server, such as 512Mi. At least 16Mi, and on Kubernetes 64Mi. Two thirds of what is beyond 24Mi hold data
    /// there (maxmemory), three quarters of all on one machine; the rest is for the programs, buffers and copies.
    #[schemars(with = "MemoryText")]
    pub memory: ByteSize,
    /// What a full server drops. Default volatile-lfu: the least used keys that have a TTL.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Eviction")]
    pub eviction: Option<Eviction>,
    /// Further lines of the servers' configuration, such as hz: "20". Keys that Larder sets itself are refused by name. Servers take
    /// changes up while they run; those few that they read at their start only restart the servers, one at a time. A line that is
    /// removed stays in effect until the next restart: write its default instead.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    #[schemars(with = "super::parameters::ParametersSchema")]
    pub parameters: BTreeMap<String, String>,
    /// The ACL user that servers ask for. Absent: none, for a network that only the workloads can reach.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub auth: Option<AuthSpec>,
    /// Whether servers and sentinels speak TLS. Absent: plain TCP. One machine ignores it: its servers listen on loopback.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tls: Option<TlsSpec>,
    /// Where data is kept, so that it survives the servers. Absent: in memory only, and replicas keep it through a server's death.
    /// On one machine it survives the servers' processes, and `larder dev --data` says whether it survives the run.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub storage: Option<StorageSpec>,
    /// When a primary refuses writes, because too few replicas would have them. Absent: never. It bounds what a primary that is cut
    /// off can acknowledge and lose, and costs availability when replicas are missing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub writes: Option<WritesSpec>,
    /// How the pods are scheduled and marked. One machine ignores it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pod: Option<PodOptions>,
    /// Who may open connections to the servers and sentinels. Absent: every pod of the same namespace. One machine ignores it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub network_policy: Option<NetworkPolicyOptions>,
    /// What may be given up to serve again after a disaster.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub recovery: Option<RecoverySpec>,
    /// Whether the operator leaves everything as it is. Sentinels go on failing over. One machine ignores it.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub paused: bool,
}

/// The server program.
#[derive(KubeSchema, Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Engine {
    /// Redis or Valkey.
    pub kind: EngineKind,
    /// Its version, in quotes, such as "8.1" or "8.1.3".
    #[schemars(with = "VersionText")]
    pub version: String,
    /// The container image, where the engine's official one is not to be used. One machine without containers ignores it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<ImageText>")]
    pub image: Option<String>,
}

/// Which server program.
#[derive(JsonSchema, Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[schemars(inline)]
pub enum EngineKind {
    /// Redis.
    Redis,
    /// Valkey.
    Valkey,
}

/// How servers are watched and addressed.
#[derive(JsonSchema, Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[schemars(inline)]
pub enum Mode {
    /// One primary, watched by sentinels.
    Sentinel,
    /// Several shards of 16,384 slots.
    Cluster,
}

/// What a full server drops.
#[derive(JsonSchema, Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[schemars(inline)]
pub enum Eviction {
    /// The least frequently used key that has a TTL.
    VolatileLfu,
    /// The least recently used key that has a TTL.
    VolatileLru,
    /// The key that expires next.
    VolatileTtl,
    /// Any key that has a TTL.
    VolatileRandom,
    /// The least frequently used key.
    AllkeysLfu,
    /// The least recently used key.
    AllkeysLru,
    /// Any key.
    AllkeysRandom,
    /// None: writes fail.
    Noeviction,
}

impl EngineKind {
    /// The name of the engine's server program.
    pub const fn server_program(self) -> &'static str {
        match self {
            Self::Redis => "redis-server",
            Self::Valkey => "valkey-server",
        }
    }
}

impl Eviction {
    /// Whether a full server also drops keys that have no TTL.
    pub const fn drops_any_key(self) -> bool {
        matches!(self, Self::AllkeysLfu | Self::AllkeysLru | Self::AllkeysRandom)
    }

    /// The value of `maxmemory-policy`.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::VolatileLfu => "volatile-lfu",
            Self::VolatileLru => "volatile-lru",
            Self::VolatileTtl => "volatile-ttl",
            Self::VolatileRandom => "volatile-random",
            Self::AllkeysLfu => "allkeys-lfu",
            Self::AllkeysLru => "allkeys-lru",
            Self::AllkeysRandom => "allkeys-random",
            Self::Noeviction => "noeviction",
        }
    }
}

/// The ACL user that servers ask for.
#[derive(KubeSchema, Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[x_kube(validation = Rule::new("!has(self.user) || self.user != 'larder-system'")
    .message("larder-system is the user of Larder itself: choose another name"))]
pub struct AuthSpec {
    /// The user's name. Default larder. The servers' own user `default` is switched off.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<UserText>")]
    pub user: Option<String>,
    /// The user's password.
    pub password: SensitiveSource,
}

/// Where data is kept.
#[derive(KubeSchema, Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[x_kube(validation = Rule::new("self.size == oldSelf.size && has(self.class) == has(oldSelf.class) && (!has(self.class) || self.class == oldSelf.class)")
    .message("size and class cannot be changed: create another CacheCluster, and move its users"))]
pub struct StorageSpec {
    /// The size of each server's volume, such as 10Gi. An append-only file and its rewritten copy take up to three times the data.
    #[schemars(with = "StorageText")]
    pub size: ByteSize,
    /// The StorageClass. Default: the cluster's default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<ObjectNameText>")]
    pub class: Option<String>,
    /// When a write is on the disk. EverySecond, which is the default: within a second of its acknowledgement. Always: before it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Fsync")]
    pub fsync: Option<Fsync>,
    /// What becomes of the volumes when this object is deleted. Retain, which is the default, or Delete.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "WhenDeleted")]
    pub when_deleted: Option<WhenDeleted>,
}

/// When a write is on the disk.
#[derive(JsonSchema, Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[schemars(inline)]
pub enum Fsync {
    /// Within a second of its acknowledgement.
    #[default]
    EverySecond,
    /// Before its acknowledgement.
    Always,
}

impl Fsync {
    /// The value of `appendfsync`.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::EverySecond => "everysec",
            Self::Always => "always",
        }
    }
}

/// What becomes of the volumes of a deleted CacheCluster.
#[derive(JsonSchema, Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[schemars(inline)]
pub enum WhenDeleted {
    /// They stay, with their data.
    #[default]
    Retain,
    /// They are deleted.
    Delete,
}

impl WhenDeleted {
    /// As a StatefulSet's `persistentVolumeClaimRetentionPolicy` has it.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Retain => "Retain",
            Self::Delete => "Delete",
        }
    }
}

/// When a primary refuses writes.
#[derive(KubeSchema, Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct WritesSpec {
    /// How many replicas must follow (`min-replicas-to-write`).
    #[schemars(range(min = 1, max = 5))]
    pub min_replicas: u32,
    /// How long each of them may have been silent, in whole seconds: a primary that is cut off acknowledges nothing later than a second
    /// after that. 3s or more: replicas are heard once a second. Default 10s.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<LagText>")]
    pub max_lag: Option<Span>,
}

impl WritesSpec {
    /// What `min-replicas-max-lag` has to be. Servers count whole seconds and look once a second: with N they acknowledge for almost
    /// N + 2 seconds after they last heard of a replica. 0 would mean for ever.
    pub fn max_lag_secs(&self) -> u64 {
        let lag = self.max_lag.map_or(10, |lag| lag.as_millis().div_ceil(1000));
        lag.saturating_sub(1).max(1)
    }
}

/// What may be given up to serve again after a disaster.
#[derive(KubeSchema, Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct RecoverySpec {
    /// Data that only servers hold that cannot be asked any more. A person sets it while the status says that servers are held, and
    /// removes it again. One machine ignores it.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub accept_data_loss: bool,
}

impl CacheClusterSpec {
    /// The number of primaries.
    pub fn shard_count(&self) -> u32 {
        match self.mode {
            Mode::Sentinel => 1,
            Mode::Cluster => self.shards.unwrap_or(3),
        }
    }

    /// The replicas of each primary.
    pub fn replica_count(&self) -> u32 {
        self.replicas.unwrap_or(1)
    }

    /// The number of sentinels: none under mode Cluster.
    pub fn sentinel_count(&self) -> u32 {
        match self.mode {
            Mode::Sentinel => self.sentinels.unwrap_or(3),
            Mode::Cluster => 0,
        }
    }

    /// What a full server drops.
    pub fn eviction(&self) -> Eviction {
        self.eviction.unwrap_or(Eviction::VolatileLfu)
    }

    /// How much of a server's memory may hold data where it is no container's: three quarters. The rest is for client and replication buffers,
    /// fragmentation, and the pages that a fork copies.
    pub fn max_memory(&self) -> ByteSize {
        ByteSize::from_bytes(self.memory.as_bytes() / 4 * 3)
    }
}

impl AuthSpec {
    /// The user's name.
    pub fn user(&self) -> &str {
        self.user.as_deref().unwrap_or("larder")
    }
}
