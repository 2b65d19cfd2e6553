//! `CacheCluster`: a cache tier, and how it is run.

// Each printer column has a name and a path of its own, which the lint takes for repetition.
#![allow(clippy::duplicated_attributes)]

use std::collections::BTreeMap;

use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::sensitive::SensitiveSource;
use super::text::{ImageText, MemoryText, UserText, VersionText};
use crate::policy::ByteSize;

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
    printcolumn(name = "Engine", type_ = "string", json_path = ".spec.engine.kind"),
    printcolumn(name = "Version", type_ = "string", json_path = ".spec.engine.version"),
    printcolumn(name = "Mode", type_ = "string", json_path = ".spec.mode"),
    printcolumn(name = "Shards", type_ = "integer", json_path = ".spec.shards"),
    printcolumn(name = "Replicas", type_ = "integer", json_path = ".spec.replicas"),
    printcolumn(name = "Memory", type_ = "string", json_path = ".spec.memory"),
    printcolumn(name = "Eviction", type_ = "string", json_path = ".spec.eviction", priority = "1"),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp")
)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[x_kube(validation = Rule::new("self.mode == 'Cluster' || !has(self.shards)")
    .message("shards has a meaning under mode: Cluster only: remove it, or write mode: Cluster"))]
#[x_kube(validation = Rule::new("self.mode == 'Sentinel' || !has(self.sentinels)")
    .message("sentinels has a meaning under mode: Sentinel only: remove it, or write mode: Sentinel"))]
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
    /// The memory of each server, such as 512Mi, and at least 16Mi. Three quarters of it hold data (maxmemory); the rest is for buffers and copies.
    #[schemars(with = "MemoryText")]
    pub memory: ByteSize,
    /// What a full server drops. Default volatile-lfu: the least used keys that have a TTL.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Eviction")]
    pub eviction: Option<Eviction>,
    /// Further lines of the servers' configuration, such as hz: "20". Keys that Larder sets itself are refused by name.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    #[schemars(with = "super::parameters::ParametersSchema")]
    pub parameters: BTreeMap<String, String>,
    /// The ACL user that servers ask for. Absent: none, for a network that only the workloads can reach.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub auth: Option<AuthSpec>,
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

impl Eviction {
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
pub struct AuthSpec {
    /// The user's name. Default larder. The servers' own user `default` is switched off.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<UserText>")]
    pub user: Option<String>,
    /// The user's password.
    pub password: SensitiveSource,
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

    /// How much of a server's memory may hold data: three quarters. The rest is for client and replication buffers,
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
