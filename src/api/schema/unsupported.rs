//! Fields that Larder will have, and does not have yet: refused by name, with a sentence.

use super::Kind;
use crate::api::path::FieldPath;

const CLUSTER_FIELDS: &[(&str, &str)] = &[(
    "spec.monitoring",
    "remove it: scrape port 9121, named metrics, of pods labelled app.kubernetes.io/name: larder-cache, and let spec.networkPolicy.metricsFrom name who may",
)];

const POLICY_FIELDS: &[(&str, &str)] = &[
    ("spec.workloads.matchExpressions", "remove it, and select workloads by matchLabels"),
    ("spec.rules[].invalidate.events", "remove it: events in the stream larder:events need nothing here"),
    ("spec.rules[].nearCache", "remove it: values are kept in the cache tier only"),
];

const BOUNDS: &[(Kind, &str, &str)] = &[
    (Kind::CacheCluster, "spec.replicas", "write at least 1: a single instance is no cache tier, its death empties the cache"),
    (
        Kind::CacheCluster,
        "spec.shards",
        "write at least 3: fewer primaries have no majority when one dies; or write mode: Sentinel",
    ),
    (Kind::CacheCluster, "spec.sentinels", "write at least 3: fewer have no majority when one dies"),
    (
        Kind::CachePolicy,
        "spec.rules[].writeBehind.maxDepth",
        "write at least 4096: a single command may bring 256 writes to one of sixteen partitions",
    ),
];

/// What to do about a field that is not supported yet.
pub(super) fn field(kind: Kind, path: &FieldPath) -> Option<&'static str> {
    let fields = match kind {
        Kind::CacheCluster => CLUSTER_FIELDS,
        Kind::CachePolicy => POLICY_FIELDS,
    };
    let shape = path.shape();
    fields.iter().find(|(field, _)| *field == shape).map(|(_, sentence)| *sentence)
}

/// Why a number has its lower bound.
pub(super) fn bound(kind: Kind, path: &FieldPath) -> Option<&'static str> {
    let shape = path.shape();
    BOUNDS.iter().find(|(of, field, _)| *of == kind && *field == shape).map(|(.., sentence)| *sentence)
}
