//! `status`: what the operator has seen and done. Written by the operator alone.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use kube::KubeSchema;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// The types of a CacheCluster's conditions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum ConditionType {
    /// Whether the object can be carried out as it is written.
    Accepted,
    /// Whether clients are served: a primary, and a majority of sentinels that name it.
    Ready,
    /// Whether the operator is on its way to what is written.
    Progressing,
    /// Whether something is missing that makes the next fault worse.
    Degraded,
}

impl ConditionType {
    /// All of them, in the order in which they are told.
    pub const ALL: [Self; 4] = [Self::Accepted, Self::Ready, Self::Progressing, Self::Degraded];

    /// The condition's `type`.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Accepted => "Accepted",
            Self::Ready => "Ready",
            Self::Progressing => "Progressing",
            Self::Degraded => "Degraded",
        }
    }
}

/// What the operator has seen and done.
#[derive(KubeSchema, Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct CacheClusterStatus {
    /// The generation of the object that this is about.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,
    /// Accepted, Ready, Progressing and Degraded; each with a reason, and a message that says what to do.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 8))]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["type".to_owned()]))]
    pub conditions: Vec<Condition>,
    /// In a word or two: Forming, Ready, Rolling, Failing over, Paused, Invalid …
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 64))]
    pub summary: Option<String>,
    /// Whether it ever served. From then on the operator only repairs: it never forms the tier anew over data.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub initialized: bool,
    /// The servers.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub servers: Option<ServersStatus>,
    /// The sentinels.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sentinels: Option<SentinelsStatus>,
    /// The users and their passwords.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub users: Option<UsersStatus>,
    /// The certificates, under TLS.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub certificates: Option<CertificatesStatus>,
    /// Labels that select the pods of the servers, as `kubectl get pods -l` takes them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 512))]
    pub selector: Option<String>,
}

/// The servers.
#[derive(JsonSchema, Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ServersStatus {
    /// The primary's pod.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 63))]
    pub primary: Option<String>,
    /// The primary's announced address.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 64))]
    pub primary_address: Option<String>,
    /// How many serve in step, of how many: `2/2`.
    #[schemars(length(max = 16))]
    pub ready: String,
    /// How many run in the form that is written, of how many: `2/2`.
    #[schemars(length(max = 16))]
    pub updated: String,
}

/// The sentinels.
#[derive(JsonSchema, Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct SentinelsStatus {
    /// How many answer and name the primary, of how many: `3/3`.
    #[schemars(length(max = 16))]
    pub ready: String,
    /// How many run in the form that is written, of how many: `3/3`.
    #[schemars(length(max = 16))]
    pub updated: String,
}

/// The users and their passwords.
#[derive(JsonSchema, Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct UsersStatus {
    /// The generation that is to be in force. Rises with each change.
    pub generation: u64,
    /// The newest generation that every server has proved.
    pub proved: u64,
    /// What is going on: `Settled`, `Adding` (a new password is on its way to the servers), `Both` (it works everywhere, and so does
    /// the earlier one, until it is dropped), or `Dropping`.
    #[schemars(length(max = 16))]
    pub phase: String,
}

/// The certificates of servers and sentinels.
#[derive(JsonSchema, Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct CertificatesStatus {
    /// The spec.tls.rotation that they were made for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 64))]
    pub rotation: Option<String>,
    /// The SHA-256 of the servers' newest certificate.
    #[schemars(length(max = 64))]
    pub fingerprint: String,
    /// When the first of the newest certificates ends. They are renewed a month before.
    #[schemars(length(max = 64))]
    pub expires: String,
    /// How many servers have shown the newest in a handshake, of how many: `2/2`.
    #[schemars(length(max = 16))]
    pub servers: String,
    /// How many sentinels have, of how many: `3/3`.
    #[schemars(length(max = 16))]
    pub sentinels: String,
}
