//! `spec.pod`: what the pods of a CacheCluster are given besides their containers.

use std::collections::BTreeMap;

use kube::KubeSchema;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::api::text::{CpuText, LabelKeyText, LabelValueText, ObjectNameText};

/// How the pods of servers and sentinels are scheduled and marked. A change restarts them, one at a time.
#[derive(KubeSchema, Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct PodOptions {
    /// Further labels.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    #[schemars(with = "crate::api::labels::PodLabelsSchema")]
    pub labels: BTreeMap<String, String>,
    /// Annotations.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    #[schemars(with = "crate::api::labels::PodAnnotationsSchema")]
    pub annotations: BTreeMap<String, String>,
    /// The CPU of each server. Its memory is spec.memory.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpu: Option<CpuOptions>,
    /// Labels that a node must have.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    #[schemars(with = "crate::api::labels::LabelsSchema")]
    pub node_selector: BTreeMap<String, String>,
    /// Taints of nodes that do not keep the pods away.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 16))]
    pub tolerations: Vec<TolerationSpec>,
    /// Whether two servers of one cache, or two sentinels, may share a node. Prefer, which is the default: only where there are too
    /// few nodes. Require: never; a pod without a node of its own waits for one. Zones are always evened out where there are several.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Spread")]
    pub spread: Option<Spread>,
    /// The PriorityClass.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<ObjectNameText>")]
    pub priority_class_name: Option<String>,
    /// Secrets with the passwords of image registries.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 8))]
    pub image_pull_secrets: Vec<NameRef>,
}

/// The CPU of each server.
#[derive(KubeSchema, Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct CpuOptions {
    /// What is kept free for it, such as 500m or 2. Default 100m.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<CpuText>")]
    pub request: Option<String>,
    /// The most that it may take. Default: what the node has. A server that is throttled answers late, which Sentinel may take for
    /// its death.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<CpuText>")]
    pub limit: Option<String>,
}

/// A taint that does not keep pods away.
#[derive(KubeSchema, Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[x_kube(validation = Rule::new("has(self.key) || (has(self.operator) && self.operator == 'Exists')")
    .message("write the taint's key, or operator: Exists for every taint"))]
#[x_kube(validation = Rule::new("!has(self.value) || !has(self.operator) || self.operator == 'Equal'")
    .message("value is compared by operator: Equal only: remove it, or write operator: Equal"))]
#[x_kube(validation = Rule::new("!has(self.tolerationSeconds) || (has(self.effect) && self.effect == 'NoExecute')")
    .message("tolerationSeconds has a meaning for effect: NoExecute only: remove it, or write effect: NoExecute"))]
pub struct TolerationSpec {
    /// The taint's key.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<LabelKeyText>")]
    pub key: Option<String>,
    /// Equal, which is the default: the value must be the taint's. Exists: any will do.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "TolerationOperator")]
    pub operator: Option<TolerationOperator>,
    /// The taint's value.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<LabelValueText>")]
    pub value: Option<String>,
    /// The taint's effect. Default: every effect.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "TaintEffect")]
    pub effect: Option<TaintEffect>,
    /// How long a pod stays on a node that gets such a taint. Default: forever.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 86400))]
    pub toleration_seconds: Option<i64>,
}

/// How a taint's value is compared.
#[derive(JsonSchema, Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[schemars(inline)]
pub enum TolerationOperator {
    /// With the toleration's value.
    Equal,
    /// With none.
    Exists,
}

impl TolerationOperator {
    /// As Kubernetes writes it.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Equal => "Equal",
            Self::Exists => "Exists",
        }
    }
}

/// What a taint does.
#[derive(JsonSchema, Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[schemars(inline)]
pub enum TaintEffect {
    /// No pod is scheduled there.
    NoSchedule,
    /// A pod is scheduled there last.
    PreferNoSchedule,
    /// Pods are driven away.
    NoExecute,
}

impl TaintEffect {
    /// As Kubernetes writes it.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::NoSchedule => "NoSchedule",
            Self::PreferNoSchedule => "PreferNoSchedule",
            Self::NoExecute => "NoExecute",
        }
    }
}

/// Whether two servers of one cache may share a node.
#[derive(JsonSchema, Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[schemars(inline)]
pub enum Spread {
    /// Where there are too few nodes.
    #[default]
    Prefer,
    /// Never.
    Require,
}

/// An object of the same namespace, by its name.
#[derive(KubeSchema, Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct NameRef {
    /// Its name.
    #[schemars(with = "ObjectNameText")]
    pub name: String,
}
