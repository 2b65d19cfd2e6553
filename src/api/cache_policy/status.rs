//! `status`: what has become of a policy. Written by the operator alone.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use kube::KubeSchema;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// The most workloads that a status names.
pub const MAX_NAMED: usize = 20;
/// The longest name of a workload, with its kind, in characters. What owns a pod may claim any kind.
pub const MAX_NAME_CHARS: usize = 320;
/// The longest text of why a sidecar refuses a snapshot, in characters.
pub const MAX_REFUSED_CHARS: usize = 256;
/// The most databases that a status tells of.
pub const MAX_CHANGES_TOLD: usize = 16;
/// The most generations of snapshots that a status names.
pub const MAX_GENERATIONS: usize = 4;

/// The types of a CachePolicy's conditions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum ConditionType {
    /// Whether its rules have a part in the snapshots of all workloads that it selects.
    Accepted,
    /// Whether all is there that it names.
    ResolvedRefs,
    /// Whether those snapshots lie ready for their sidecars.
    Delivered,
    /// Whether origins have what was written behind, in time. Of policies that write behind alone.
    Carried,
    /// Whether the changes of the databases that rules follow are told, in time. Of policies that follow tables alone.
    Followed,
}

impl ConditionType {
    /// All of them, in the order in which they are told.
    pub const ALL: [Self; 5] = [Self::Accepted, Self::ResolvedRefs, Self::Delivered, Self::Carried, Self::Followed];

    /// The condition's `type`.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Accepted => "Accepted",
            Self::ResolvedRefs => "ResolvedRefs",
            Self::Delivered => "Delivered",
            Self::Carried => "Carried",
            Self::Followed => "Followed",
        }
    }
}

/// What has become of a policy.
#[derive(KubeSchema, Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct CachePolicyStatus {
    /// The generation of the object that this is about.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,
    /// Accepted, ResolvedRefs and Delivered, Carried where rules write behind, and Followed where they follow tables; each with a reason, and a
    /// message that says what to do.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 8))]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["type".to_owned()]))]
    pub conditions: Vec<Condition>,
    /// In a word or two: Delivered, Waiting, Overlap, SecretNotFound …
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 64))]
    pub summary: Option<String>,
    /// The workloads that it selects.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub workloads: Option<WorkloadsStatus>,
    /// The sidecars of those workloads.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sidecars: Option<SidecarsStatus>,
    /// Of all keys that the policy's rules cover, how many reads the cache answered, in per cent, since the operator listens.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 16))]
    pub hit_ratio: Option<String>,
    /// Of all such reads that an origin or the application would have had to load for, how many needed no load, in per cent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 16))]
    pub origin_load_saved: Option<String>,
    /// How many connections origins may see.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub connections: Option<ConnectionsStatus>,
    /// What is written behind, and where no origin has it yet. Absent where no rule writes behind, or the cache does not say.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub journal: Option<JournalStatus>,
    /// The databases whose changes rules follow. Absent where none does.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = MAX_CHANGES_TOLD))]
    pub changes: Vec<ChangesStatus>,
}

/// How the changes of a database are read.
#[derive(KubeSchema, Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ChangesStatus {
    /// The origin.
    #[schemars(length(max = 256))]
    pub origin: String,
    /// The replication slot.
    #[schemars(length(max = 63))]
    pub slot: String,
    /// Whether a relay has it.
    pub reading: bool,
    /// How old a change may be that is not told, in seconds, in steps of ten: relays that have nothing to tell say so every few seconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lag_seconds: Option<u64>,
    /// How much of its log the database keeps for the slot, in whole mebibytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kept_mebibytes: Option<u64>,
}

/// What was written behind and is not at its origin yet, in all journals of a policy.
#[derive(KubeSchema, Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct JournalStatus {
    /// How many writes wait.
    pub depth: u64,
    /// Their bytes.
    pub bytes: u64,
    /// How far origins are behind: the age of the oldest, in seconds.
    pub lag_seconds: u64,
    /// When the oldest was written.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 32))]
    pub oldest: Option<String>,
    /// Writes that an origin refused, which wait for a person: see `larder dead-letters`.
    pub dead_letters: u64,
}

/// The workloads that a policy selects.
#[derive(KubeSchema, Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct WorkloadsStatus {
    /// How many they are.
    pub matched: u32,
    /// The first of them, such as Deployment/shop.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = MAX_NAMED), inner(length(max = MAX_NAME_CHARS)))]
    pub names: Vec<String>,
    /// The newest generation of their snapshots.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub generation: Option<u64>,
}

/// The sidecars of the workloads that a policy selects.
#[derive(KubeSchema, Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct SidecarsStatus {
    /// How many have the newest snapshot in force, of how many: `3/3`. `-/3` where that is unknown: none of them has been heard within three
    /// of the intervals at which they speak, or the cache cannot be listened to.
    #[schemars(length(max = 32))]
    pub current: String,
    /// How many pods have one.
    pub total: u32,
    /// Why some of them refuse the newest snapshot, as one of them says.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = MAX_REFUSED_CHARS))]
    pub refused: Option<String>,
    /// Which generations of their snapshots those that are heard have in force, the newest first. Each workload counts its own.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 4))]
    pub generations: Vec<GenerationStatus>,
}

/// The sidecars that have one generation of a snapshot in force.
#[derive(JsonSchema, Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct GenerationStatus {
    /// The generation.
    pub generation: u64,
    /// How many they are.
    pub sidecars: u32,
}

/// How many connections origins may see.
#[derive(JsonSchema, Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ConnectionsStatus {
    /// From one sidecar, to all origins of its snapshot together: where workloads differ, from one that has the most.
    pub per_sidecar: u64,
    /// From all sidecars of all workloads that the policy selects.
    pub fleet: u64,
}
