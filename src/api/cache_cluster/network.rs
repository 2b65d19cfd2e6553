//! `spec.networkPolicy`: who may open connections to a CacheCluster.

use std::collections::BTreeMap;

use kube::KubeSchema;
use serde::{Deserialize, Serialize};

/// Who may open connections to the servers and sentinels. They themselves and the operator always may.
#[derive(KubeSchema, Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[x_kube(validation = Rule::new("!has(self.enabled) || self.enabled || (!has(self.from) && !has(self.metricsFrom))")
    .message("from and metricsFrom have no effect with enabled: false: remove them, or enabled"))]
pub struct NetworkPolicyOptions {
    /// Whether there is a NetworkPolicy. Default true.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "bool")]
    pub enabled: Option<bool>,
    /// The pods that may use the cache. Default: every pod of the same namespace.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 16))]
    pub from: Vec<PeerSpec>,
    /// Further pods that may read metrics, from port 9121 of the servers. Default: none.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 16))]
    pub metrics_from: Vec<PeerSpec>,
}

/// Some pods.
#[derive(KubeSchema, Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[x_kube(validation = Rule::new("has(self.podSelector) || has(self.namespaceSelector)")
    .message("write podSelector, namespaceSelector, or both for pods that match both"))]
pub struct PeerSpec {
    /// By their labels. Absent: all pods of the namespaces.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pod_selector: Option<SelectorSpec>,
    /// By the labels of their namespaces; {} is every namespace. Absent: this object's namespace.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub namespace_selector: Option<SelectorSpec>,
}

/// Labels that all must be there.
#[derive(KubeSchema, Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct SelectorSpec {
    /// The labels. Default: none, which everything has.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    #[schemars(with = "crate::api::labels::LabelsSchema")]
    pub match_labels: BTreeMap<String, String>,
}
