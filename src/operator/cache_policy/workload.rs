//! A workload: what owns pods that use a cache.

use std::collections::BTreeMap;
use std::fmt;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::OwnerReference;

use crate::api::CachePolicy;
use crate::policy::binding::BindingName;

/// What owns pods: a Deployment, a StatefulSet, a Job; or a pod that nothing owns.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Workload {
    /// Its namespace, which is that of its policies and of their CacheCluster.
    pub namespace: String,
    /// Its `apiVersion`, such as `apps/v1`.
    pub api_version: String,
    /// Its kind.
    pub kind: String,
    /// Its name.
    pub name: String,
    /// Its `metadata.uid`. Empty where nothing tells it: what belongs to such a workload names what made its pods.
    pub uid: String,
    /// The labels of its pods.
    pub labels: BTreeMap<String, String>,
}

impl Workload {
    /// Whether its pods follow a policy.
    pub fn follows(&self, policy: &CachePolicy) -> bool {
        let namespace = policy.metadata.namespace.as_deref().unwrap_or("default");
        namespace == self.namespace && policy.spec.workloads.include(|name| self.labels.get(name).map(String::as_str))
    }

    /// What ties it to a CacheCluster.
    pub fn binding(&self, cluster: &str) -> BindingName {
        BindingName::of(&self.kind, &self.name, cluster)
    }

    /// What marks an object as this workload's own, which goes with it. The workload's own controller minds no such objects.
    pub fn owner_reference(&self) -> Option<OwnerReference> {
        (!self.uid.is_empty()).then(|| OwnerReference {
            api_version: self.api_version.clone(),
            kind: self.kind.clone(),
            name: self.name.clone(),
            uid: self.uid.clone(),
            controller: None,
            block_owner_deletion: None,
        })
    }
}

impl fmt::Display for Workload {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.kind, self.name)
    }
}

#[cfg(test)]
impl Workload {
    /// A Deployment that tests deliver policies to.
    pub(super) fn shop() -> Self {
        Self {
            namespace: "store".to_owned(),
            api_version: "apps/v1".to_owned(),
            kind: "Deployment".to_owned(),
            name: "shop".to_owned(),
            uid: "8d2c".to_owned(),
            labels: [("app", "shop"), ("tier", "web")].map(|(key, value)| (key.to_owned(), value.to_owned())).into(),
        }
    }
}
