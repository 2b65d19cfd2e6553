//! What is kept of each kind of object that belongs to a CacheCluster: what a look at one asks of it. Pure.

use std::fmt;
use std::marker::PhantomData;
use std::net::IpAddr;

use k8s_openapi::api::apps::v1::StatefulSet as KubeSet;
use k8s_openapi::api::core::v1::{
    ConfigMap as KubeMap, ContainerStatus, PersistentVolumeClaim, Pod as KubePod, PodCondition, PodStatus, PodTemplateSpec,
    Secret as KubeSecret, Service as KubeService,
};
use kube::api::PartialObjectMeta;

use super::names::REVISION_ANNOTATION;
use super::objects::{PASSWORD, PKI_STATE, USERS_STATE, announced_address, memory_limit};
use crate::operator::held::Part;
use crate::policy::ByteSize;

/// What keeps a container from starting however often it is tried, as the kubelet gives it.
const HOPELESS: [&str; 8] = [
    "ImagePullBackOff",
    "ErrImagePull",
    "InvalidImageName",
    "ErrImageNeverPull",
    "CrashLoopBackOff",
    "CreateContainerConfigError",
    "CreateContainerError",
    "RunContainerError",
];

/// Nothing: only whether it stands as it was written is asked.
#[derive(Debug, Clone)]
pub struct Bare<K>(PhantomData<fn() -> K>);

impl<K> Part for Bare<K>
where
    Self: Clone + fmt::Debug,
    K: kube::Resource<Scope = k8s_openapi::NamespaceResourceScope, DynamicType = ()>
        + Clone
        + fmt::Debug
        + serde::Serialize
        + serde::de::DeserializeOwned
        + Send
        + Sync
        + 'static,
{
    type Of = K;

    fn of(_: &K) -> Self {
        Self(PhantomData)
    }
}

/// Of a Service.
#[derive(Debug, Clone)]
pub struct Service {
    /// Its cluster address.
    pub address: Option<IpAddr>,
}

impl Part for Service {
    type Of = KubeService;

    fn of(service: &KubeService) -> Self {
        let address = service.spec.as_ref().and_then(|spec| spec.cluster_ip.as_deref());
        Self { address: address.and_then(|address| address.parse().ok()) }
    }
}

/// Of a ConfigMap.
#[derive(Debug, Clone)]
pub struct ConfigMap {
    /// The address that each entry has a server or a sentinel announce.
    announced: Box<[(Box<str>, IpAddr)]>,
}

impl Part for ConfigMap {
    type Of = KubeMap;

    fn of(map: &KubeMap) -> Self {
        let entries = map.data.iter().flatten();
        Self { announced: entries.filter_map(|(name, text)| Some((name.as_str().into(), announced_address(text)?))).collect() }
    }
}

impl ConfigMap {
    /// The address that is announced by the configuration in this entry.
    pub fn announced(&self, entry: &str) -> Option<IpAddr> {
        self.announced.iter().find(|(name, _)| **name == *entry).map(|(_, address)| *address)
    }
}

/// Of a Secret. `Debug` does not show what is in it.
#[derive(Clone)]
pub struct Secret {
    /// The entries that the operator itself reads.
    entries: Box<[Entry]>,
}

/// A name, and what stands under it.
type Entry = (Box<str>, Box<[u8]>);

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Secret").finish_non_exhaustive()
    }
}

impl Part for Secret {
    type Of = KubeSecret;

    fn of(secret: &KubeSecret) -> Self {
        let read = |name: &str| [PASSWORD, USERS_STATE, PKI_STATE].contains(&name);
        let entries = secret.data.iter().flatten().filter(|(name, _)| read(name));
        Self { entries: entries.map(|(name, bytes)| (name.as_str().into(), bytes.0.as_slice().into())).collect() }
    }
}

impl Secret {
    /// One of the entries that the operator reads.
    pub fn entry(&self, name: &str) -> Option<&[u8]> {
        self.entries.iter().find(|(own, _)| **own == *name).map(|(_, bytes)| &**bytes)
    }
}

/// Of any Secret: its version.
#[derive(Debug, Clone)]
pub struct Version(pub Option<Box<str>>);

impl Part for Version {
    type Of = PartialObjectMeta<KubeSecret>;
    const IS_WRITTEN: bool = false;

    fn of(secret: &Self::Of) -> Self {
        Self(secret.metadata.resource_version.as_deref().map(Into::into))
    }
}

/// Of a volume's claim.
#[derive(Debug, Clone)]
pub struct Claim {
    /// Whether no volume is bound to it.
    pub is_pending: bool,
}

impl Part for Claim {
    type Of = PersistentVolumeClaim;
    const IS_WRITTEN: bool = false;

    fn of(claim: &PersistentVolumeClaim) -> Self {
        Self { is_pending: claim.status.as_ref().is_some_and(|status| status.phase.as_deref() != Some("Bound")) }
    }
}

/// Of a StatefulSet.
#[derive(Debug, Clone)]
pub struct StatefulSet {
    /// How many pods it asks for.
    pub replicas: Option<i32>,
    /// What pods are made from, as JSON, which takes a tenth of the memory.
    template: Box<[u8]>,
}

impl Part for StatefulSet {
    type Of = KubeSet;

    fn of(set: &KubeSet) -> Self {
        let spec = set.spec.as_ref();
        let template = spec.and_then(|spec| serde_json::to_vec(&spec.template).ok()).unwrap_or_default();
        Self { replicas: spec.and_then(|spec| spec.replicas), template: template.into() }
    }
}

impl StatefulSet {
    /// What pods are made from.
    pub fn template(&self) -> Option<PodTemplateSpec> {
        serde_json::from_slice(&self.template).ok()
    }
}

/// Of a pod.
#[derive(Debug, Clone)]
pub struct Pod {
    /// The revision of what it was made from.
    pub revision: Option<Box<str>>,
    /// Where it runs.
    pub node: Option<Box<str>>,
    /// Its own address.
    pub ip: Option<IpAddr>,
    /// How much memory its main container may take.
    pub memory: Option<ByteSize>,
    /// Whether a container other than those that prepare it has ever run.
    pub started: bool,
    /// Whether it says that it is ready.
    pub ready: bool,
    /// What keeps it from running.
    pub trouble: Option<Box<Trouble>>,
}

/// What keeps a pod from running, where time is not all that it needs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Trouble {
    /// No node takes it; why, as the scheduler says.
    Unschedulable(Option<Box<str>>),
    /// A container does not start.
    Hopeless {
        /// Which.
        container: Box<str>,
        /// Why, in a word.
        reason: &'static str,
        /// Why, in more.
        message: Option<Box<str>>,
    },
}

impl Part for Pod {
    type Of = KubePod;
    const IS_WRITTEN: bool = false;

    fn of(pod: &KubePod) -> Self {
        let revision = pod.metadata.annotations.as_ref().and_then(|annotations| annotations.get(REVISION_ANNOTATION));
        let status = pod.status.as_ref();
        Self {
            revision: revision.map(|revision| revision.as_str().into()),
            node: pod.spec.as_ref().and_then(|spec| spec.node_name.as_deref()).map(Into::into),
            ip: status.and_then(|status| status.pod_ip.as_deref()?.parse().ok()),
            memory: memory_limit(pod),
            started: status.is_some_and(has_started),
            ready: status.is_some_and(is_ready),
            trouble: status.and_then(trouble).map(Box::new),
        }
    }
}

fn has_started(status: &PodStatus) -> bool {
    status.container_statuses.iter().flatten().any(|container| {
        let state = container.state.as_ref();
        let ran = state.is_some_and(|state| state.running.is_some() || state.terminated.is_some());
        ran || container.restart_count > 0 || container.last_state.as_ref().is_some_and(|last| last.terminated.is_some())
    })
}

fn is_ready(status: &PodStatus) -> bool {
    status.conditions.iter().flatten().any(|condition| condition.type_ == "Ready" && condition.status == "True")
}

fn trouble(status: &PodStatus) -> Option<Trouble> {
    let mut conditions = status.conditions.iter().flatten();
    let unschedulable = |condition: &&PodCondition| {
        condition.type_ == "PodScheduled" && condition.status == "False" && condition.reason.as_deref() == Some("Unschedulable")
    };
    if let Some(condition) = conditions.find(unschedulable) {
        return Some(Trouble::Unschedulable(condition.message.as_deref().map(Into::into)));
    }
    let mut containers = status.init_container_statuses.iter().flatten().chain(status.container_statuses.iter().flatten());
    containers.find_map(hopeless)
}

fn hopeless(container: &ContainerStatus) -> Option<Trouble> {
    let waiting = container.state.as_ref()?.waiting.as_ref()?;
    let reason = HOPELESS.into_iter().find(|reason| waiting.reason.as_deref() == Some(reason))?;
    let message = waiting.message.as_deref().map(Into::into);
    Some(Trouble::Hopeless { container: container.name.as_str().into(), reason, message })
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn pod(status: &Value) -> Pod {
        let pod = json!({
            "metadata": {"name": "shop-0-1", "annotations": {REVISION_ANNOTATION: "r1"}},
            "spec": {"nodeName": "a", "containers": [{"name": "server", "resources": {"limits": {"memory": "256Mi"}}}]},
            "status": status,
        });
        Pod::of(&serde_json::from_value(pod).unwrap())
    }

    fn container(state: &Value) -> Value {
        json!({"name": "server", "ready": false, "restartCount": 0, "image": "", "imageID": "", "state": state})
    }

    #[test]
    fn of_a_pod_all_is_kept_that_is_asked() {
        let running = json!({
            "podIP": "10.0.0.7",
            "conditions": [{"type": "Ready", "status": "True"}],
            "containerStatuses": [container(&json!({"running": {}}))],
        });
        let kept = pod(&running);
        assert_eq!((kept.revision.as_deref(), kept.node.as_deref(), kept.ip), (Some("r1"), Some("a"), "10.0.0.7".parse().ok()));
        assert_eq!(kept.memory.map(|memory| memory.as_bytes()), Some(256 << 20));
        assert!(kept.started && kept.ready && kept.trouble.is_none());
        let waiting = container(&json!({"waiting": {"reason": "ContainerCreating"}}));
        let kept = pod(&json!({"containerStatuses": [waiting]}));
        assert!(!kept.started && !kept.ready && kept.trouble.is_none() && kept.ip.is_none());
        let hopeless = container(&json!({"waiting": {"reason": "ErrImagePull", "message": "no such image"}}));
        let expected =
            Trouble::Hopeless { container: "server".into(), reason: "ErrImagePull", message: Some("no such image".into()) };
        assert_eq!(pod(&json!({"initContainerStatuses": [hopeless]})).trouble.as_deref(), Some(&expected));
    }

    #[test]
    fn of_a_secret_only_what_the_operator_reads_is_kept_and_none_of_it_is_shown() {
        let secret = json!({"metadata": {"name": "a"}, "data": {"password": "c2VjcmV0", "tls.key": "a2V5"}});
        let kept = Secret::of(&serde_json::from_value(secret).unwrap());
        assert_eq!((kept.entry("password"), kept.entry("tls.key")), (Some(b"secret".as_slice()), None));
        assert_eq!(format!("{kept:?}"), "Secret { .. }");
    }

    #[test]
    fn a_template_comes_back_as_it_was() {
        let template =
            json!({"metadata": {"annotations": {REVISION_ANNOTATION: "r1"}}, "spec": {"containers": [{"name": "server"}]}});
        let set =
            json!({"metadata": {"name": "a"}, "spec": {"replicas": 3, "selector": {}, "serviceName": "a", "template": template}});
        let set: KubeSet = serde_json::from_value(set).unwrap();
        let kept = StatefulSet::of(&set);
        assert_eq!((kept.replicas, kept.template()), (Some(3), set.spec.map(|spec| spec.template)));
    }
}
