//! How a rule writes behind: what its journal may hold, and how it is carried to the origin.

use kube::KubeSchema;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::api::text::{JournalBytesText, JournalLagText, ObjectNameText};
use crate::policy::snapshot::LEAST_DEPTH;
use crate::policy::{self, ByteSize, Span};

/// The most writes of a journal in one transaction, which a relay holds in memory and tells one after another.
pub const MAX_BATCH: u32 = 500;
/// The most writes that a journal may be bounded to.
const MAX_DEPTH: u32 = 100_000_000;

/// How writes wait for their origin. All rules of a policy that write to one origin share a journal.
#[derive(KubeSchema, Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct WriteBehindSpec {
    /// The CacheCluster that keeps the journal: the policy's own, which is the default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<ObjectNameText>")]
    pub journal: Option<String>,
    /// How old a write may become before the origin has it. While one is older, new ones are refused. From 1s to 24h; default 5m.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<JournalLagText>")]
    pub max_lag: Option<Span>,
    /// The most writes that are carried to the origin in one transaction, which its timeout bounds. Where rules of one policy and origin
    /// differ, the largest counts. Default 100.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = MAX_BATCH))]
    pub batch: Option<u32>,
    /// The most writes that may wait, of which each of the journal's sixteen partitions takes its share. Default 100000.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = LEAST_DEPTH, max = MAX_DEPTH))]
    pub max_depth: Option<u32>,
    /// The most bytes that they may take, keys and values, of which each partition takes its share. In memory they take twice that. At
    /// least 64Mi, which is the default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<JournalBytesText>")]
    pub max_bytes: Option<ByteSize>,
    /// What becomes of a write for which the journal has no room. Reject, which is the default: it is refused, and nothing is written.
    /// WriteThrough, for an sql origin: the sidecar tells the origin itself, and refuses it only where an earlier write of the key still
    /// waits.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Overflow")]
    pub overflow: Option<Overflow>,
}

/// What becomes of a write for which the journal has no room.
#[derive(JsonSchema, Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[schemars(inline)]
pub enum Overflow {
    /// It is refused.
    Reject,
    /// The sidecar tells the origin itself.
    WriteThrough,
}

impl From<Overflow> for policy::Overflow {
    fn from(overflow: Overflow) -> Self {
        match overflow {
            Overflow::Reject => Self::Reject,
            Overflow::WriteThrough => Self::WriteThrough,
        }
    }
}
