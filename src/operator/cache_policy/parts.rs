//! What is kept of each object that a look at a namespace's policies asks about. Pure.

use std::collections::BTreeMap;
use std::fmt;
use std::marker::PhantomData;
use std::sync::Arc;
use std::time::SystemTime;

use k8s_openapi::NamespaceResourceScope;
use k8s_openapi::api::apps::v1::{DaemonSet, Deployment, StatefulSet};
use k8s_openapi::api::batch::v1::CronJob;
use k8s_openapi::api::core::v1::{ConfigMap, Pod, PodTemplateSpec, Secret as KubeSecret};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::OwnerReference;
use k8s_openapi::jiff::Timestamp;
use kube::Resource;
use kube::core::ObjectMeta;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use super::objects::{BINDING_LABEL, CONTENT_LABEL, USES_LABEL, WORKLOAD_ANNOTATION};
use super::passwords::{ASKED_ANNOTATION, HEEDED_ANNOTATION, SINCE_ANNOTATION};
use crate::operator::held::Part;
use crate::operator::owner::{Owner, owners};
use crate::policy::Snapshot;
use crate::policy::binding::{BindingName, SNAPSHOT_FILE};
use crate::policy::digest::{Digest, digest};
use crate::policy::snapshot::{OriginKind, Sensitive};

/// Labels, as they are kept.
pub type Labels = Box<[(Box<str>, Box<str>)]>;

/// The labels of an object as a workload has them.
pub fn labels(labels: &Labels) -> BTreeMap<String, String> {
    labels.iter().map(|(name, value)| (name.to_string(), value.to_string())).collect()
}

fn keep(labels: Option<&BTreeMap<String, String>>) -> Labels {
    labels.into_iter().flatten().map(|(name, value)| (name.as_str().into(), value.as_str().into())).collect()
}

/// What makes pods from a template, and outlives all that it makes.
pub trait Maker:
    Resource<Scope = NamespaceResourceScope, DynamicType = ()>
    + Clone
    + fmt::Debug
    + Serialize
    + DeserializeOwned
    + Send
    + Sync
    + 'static
{
    /// What its pods are made from.
    fn template(&self) -> Option<&PodTemplateSpec>;
}

impl Maker for Deployment {
    fn template(&self) -> Option<&PodTemplateSpec> {
        Some(&self.spec.as_ref()?.template)
    }
}

impl Maker for StatefulSet {
    fn template(&self) -> Option<&PodTemplateSpec> {
        Some(&self.spec.as_ref()?.template)
    }
}

impl Maker for DaemonSet {
    fn template(&self) -> Option<&PodTemplateSpec> {
        Some(&self.spec.as_ref()?.template)
    }
}

impl Maker for CronJob {
    fn template(&self) -> Option<&PodTemplateSpec> {
        Some(&self.spec.as_ref()?.job_template.spec.as_ref()?.template)
    }
}

/// Of what makes pods: the labels that they get.
#[derive(Debug, Clone)]
pub struct Template<K> {
    /// Those labels.
    pub labels: Labels,
    maker: PhantomData<fn() -> K>,
}

impl<K: Maker> Part for Template<K> {
    type Of = K;
    const IS_WRITTEN: bool = false;

    fn of(object: &K) -> Self {
        let metadata = object.template().and_then(|template| template.metadata.as_ref());
        Self { labels: keep(metadata.and_then(|metadata| metadata.labels.as_ref())), maker: PhantomData }
    }
}

/// Of a pod with a sidecar.
#[derive(Debug, Clone)]
pub struct Sidecar {
    /// The binding that it mounts.
    pub binding: Option<BindingName>,
    /// Whose it may be.
    pub owners: Box<[Owner]>,
    /// Its controller, or itself where it has none.
    pub controller: Option<Controller>,
    /// Its labels.
    pub labels: Labels,
    /// Whether its containers have ended for good.
    pub finished: bool,
}

/// What a pod names as its controller.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Controller {
    /// Its `apiVersion`.
    pub api_version: Box<str>,
    /// Its kind.
    pub kind: Box<str>,
    /// Its name.
    pub name: Box<str>,
    /// Its `metadata.uid`.
    pub uid: Box<str>,
}

impl Controller {
    /// What marks an object as one that goes with it, and maybe with others.
    pub fn owner_reference(&self) -> OwnerReference {
        OwnerReference {
            api_version: self.api_version.to_string(),
            kind: self.kind.to_string(),
            name: self.name.to_string(),
            uid: self.uid.to_string(),
            controller: None,
            block_owner_deletion: None,
        }
    }
}

impl Part for Sidecar {
    type Of = Pod;
    const IS_WRITTEN: bool = false;

    fn of(pod: &Pod) -> Self {
        let ObjectMeta { name, generate_name, labels, owner_references, uid, .. } = &pod.metadata;
        let named = labels.as_ref().and_then(|labels| labels.get(BINDING_LABEL));
        let seen = json!({"metadata": {
            "name": name, "generateName": generate_name, "labels": labels, "ownerReferences": owner_references,
        }});
        let controller = owner_references.iter().flatten().find(|owner| owner.controller == Some(true));
        let text = |text: &str| -> Box<str> { text.into() };
        let controller = controller.map(|OwnerReference { api_version, kind, name, uid, .. }| Controller {
            api_version: text(api_version),
            kind: text(kind),
            name: text(name),
            uid: text(uid),
        });
        let itself = || {
            Some(Controller {
                api_version: text("v1"),
                kind: text("Pod"),
                name: text(name.as_deref()?),
                uid: text(uid.as_deref()?),
            })
        };
        let phase = pod.status.as_ref().and_then(|status| status.phase.as_deref());
        Self {
            binding: named.and_then(|named| BindingName::parse(named).ok()),
            owners: owners(&seen).into(),
            controller: controller.or_else(itself),
            labels: keep(labels.as_ref()),
            finished: matches!(phase, Some("Succeeded" | "Failed")),
        }
    }
}

/// Of one of a binding's objects: whose it is.
#[derive(Debug, Clone)]
pub struct Tag {
    /// The binding.
    pub binding: Option<BindingName>,
    /// The CacheCluster.
    pub cluster: Box<str>,
    /// The workload's kind and name, with a slash between.
    pub workload: Box<str>,
    /// The owners that it names.
    pub owners: Box<[OwnerReference]>,
    /// A digest of all that Larder writes of it.
    pub substance: Digest,
}

impl Tag {
    fn of(metadata: &ObjectMeta, content: &Value) -> Self {
        let label = |name: &str| metadata.labels.as_ref().and_then(|labels| labels.get(name)).map(String::as_str);
        let annotation = metadata.annotations.as_ref().and_then(|annotations| annotations.get(WORKLOAD_ANNOTATION));
        Self {
            binding: label(BINDING_LABEL).and_then(|name| BindingName::parse(name).ok()),
            cluster: label(USES_LABEL).unwrap_or_default().into(),
            workload: annotation.map(String::as_str).unwrap_or_default().into(),
            owners: metadata.owner_references.clone().unwrap_or_default().into(),
            substance: substance(metadata, content),
        }
    }
}

/// The labels and annotations that Larder writes on a binding's objects. Whatever else people put there is theirs.
const OWN: [&str; 8] = [
    "app.kubernetes.io/name",
    "app.kubernetes.io/managed-by",
    BINDING_LABEL,
    USES_LABEL,
    CONTENT_LABEL,
    WORKLOAD_ANNOTATION,
    SINCE_ANNOTATION,
    HEEDED_ANNOTATION,
];

/// A digest of what Larder writes of an object: its own labels, annotations and owners, and all that is in it. The API server adds nothing
/// to these, so that what is to be and what is there can be compared.
pub fn substance(metadata: &ObjectMeta, content: &Value) -> Digest {
    let own = |map: Option<&BTreeMap<String, String>>| -> BTreeMap<String, String> {
        map.into_iter()
            .flatten()
            .filter(|(name, _)| OWN.contains(&name.as_str()))
            .map(|(name, value)| (name.clone(), value.clone()))
            .collect()
    };
    let owners: Vec<&str> = metadata.owner_references.iter().flatten().map(|owner| owner.uid.as_str()).collect();
    let document = json!([own(metadata.labels.as_ref()), own(metadata.annotations.as_ref()), owners, content]);
    digest(document.to_string().as_bytes())
}

/// What is in a ConfigMap, for [`substance`].
pub fn content_of_map(map: &ConfigMap) -> Value {
    json!([map.data, map.immutable.unwrap_or_default()])
}

/// What is in a Secret, for [`substance`].
pub fn content_of_secret(secret: &KubeSecret) -> Value {
    json!([secret.data, secret.type_])
}

/// Of a binding's ConfigMaps: the one that is mounted, and those that keep what it was.
#[derive(Debug, Clone)]
pub struct Map {
    /// Whose it is.
    pub tag: Tag,
    /// Whether it is mounted.
    pub is_mounted: bool,
    /// The snapshot, of the one that is mounted.
    pub text: Option<Arc<str>>,
    /// The snapshot's generation.
    pub generation: Option<u64>,
    /// The files of origins that the snapshot names.
    pub files: Box<[Box<str>]>,
    /// When it was made.
    pub created: Option<SystemTime>,
}

impl Part for Map {
    type Of = ConfigMap;
    const IS_WRITTEN: bool = false;

    fn of(map: &ConfigMap) -> Self {
        let labels = map.metadata.labels.as_ref();
        let is_mounted = labels.and_then(|labels| labels.get(CONTENT_LABEL)).is_some_and(|content| content == "snapshot");
        let text = map.data.as_ref().and_then(|data| data.get(SNAPSHOT_FILE));
        let snapshot = text.and_then(|text| Snapshot::parse(text.as_bytes()).ok());
        Self {
            tag: Tag::of(&map.metadata, &content_of_map(map)),
            is_mounted,
            text: text.filter(|_| is_mounted).map(|text| text.as_str().into()),
            generation: text.and_then(|text| Snapshot::claimed_generation(text.as_bytes())),
            files: snapshot.as_ref().map(files).unwrap_or_default().iter().map(|file| file.as_str().into()).collect(),
            created: map.metadata.creation_timestamp.as_ref().map(|time| time.0.into()),
        }
    }
}

/// The entries of the binding's Secret that origins of a snapshot are read from.
pub fn files(snapshot: &Snapshot) -> Vec<String> {
    let entry = |kind: &OriginKind| {
        let (OriginKind::Sql { url: Sensitive::File(path) } | OriginKind::Http { url: Sensitive::File(path) }) = kind else {
            return None;
        };
        Some(path.file_name()?.to_string_lossy().into_owned())
    };
    snapshot.origins.iter().filter_map(|origin| entry(&origin.kind)).collect()
}

/// Of a binding's Secret. `Debug` shows the names of its entries alone.
#[derive(Clone)]
pub struct Keyring {
    /// Whose it is.
    pub tag: Tag,
    /// What is in it, where it is text.
    pub entries: BTreeMap<Box<str>, Box<str>>,
    /// When it was made.
    pub created: Option<SystemTime>,
    /// Since when its password is the one, where it says so.
    pub since: Option<SystemTime>,
    /// What a person asks of its password.
    pub asked: Option<Box<str>>,
    /// What was asked when its newest password was made.
    pub heeded: Option<Box<str>>,
}

impl fmt::Debug for Keyring {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { tag, entries, .. } = self;
        f.debug_struct("Keyring").field("tag", tag).field("entries", &entries.keys()).finish_non_exhaustive()
    }
}

impl Part for Keyring {
    type Of = KubeSecret;
    const IS_WRITTEN: bool = false;

    fn of(secret: &KubeSecret) -> Self {
        let text = |bytes: &[u8]| std::str::from_utf8(bytes).ok().map(Box::from);
        let entries = secret.data.iter().flatten().filter_map(|(name, bytes)| Some((name.as_str().into(), text(&bytes.0)?)));
        let annotation = |name: &str| secret.metadata.annotations.as_ref()?.get(name).map(String::as_str);
        let since = annotation(SINCE_ANNOTATION).and_then(|since| since.parse::<Timestamp>().ok());
        Self {
            tag: Tag::of(&secret.metadata, &content_of_secret(secret)),
            entries: entries.collect(),
            created: secret.metadata.creation_timestamp.as_ref().map(|time| time.0.into()),
            since: since.map(Into::into),
            asked: annotation(ASKED_ANNOTATION).map(Into::into),
            heeded: annotation(HEEDED_ANNOTATION).map(Into::into),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn map(json: Value) -> ConfigMap {
        serde_json::from_value(json).unwrap()
    }

    #[test]
    fn what_others_add_is_no_difference() {
        let ours = map(json!({
            "metadata": {"name": "a", "labels": {"larder.dev/binding": "a-1"}, "ownerReferences":
                [{"apiVersion": "apps/v1", "kind": "Deployment", "name": "shop", "uid": "8d2c"}]},
            "data": {"snapshot.json": "{}"},
        }));
        let mut there = ours.clone();
        there.metadata.uid = Some("7".to_owned());
        there.metadata.resource_version = Some("7".to_owned());
        for name in ["team", "app.kubernetes.io/part-of", "larder.dev/other"] {
            there.metadata.labels.get_or_insert_default().insert(name.to_owned(), "shop".to_owned());
        }
        let digest = |map: &ConfigMap| substance(&map.metadata, &content_of_map(map));
        assert_eq!(digest(&ours), digest(&there));
        for change in [
            json!({"metadata": {"labels": {"larder.dev/binding": "a-2"}}}),
            json!({"metadata": {"ownerReferences": null}}),
            json!({"data": {"snapshot.json": "{ }"}}),
            json!({"data": {"more": "x"}}),
        ] {
            let mut changed = json!(ours);
            merge(&mut changed, &change);
            assert_ne!(digest(&ours), digest(&map(changed)), "{change}");
        }
    }

    fn merge(into: &mut Value, from: &Value) {
        match from {
            Value::Object(fields) => fields.iter().for_each(|(name, value)| merge(&mut into[name], value)),
            other => *into = other.clone(),
        }
    }

    #[test]
    fn of_a_snapshot_its_generation_and_files_are_kept() {
        let snapshot = json!({
            "version": 3, "requires": 1, "generation": 12,
            "cluster": {"name": "main", "topology": {"sentinel": {"master": "main", "sentinels": ["10.0.0.1:26379"]}}},
            "unmatched": {"bypass": {}}, "rules": [],
            "origins": [{"name": "db", "kind": {"sql": {"url": {"file": "/etc/larder/secret/origin-08d0b104b3-url"}}},
                "maxConnections": 4, "connectTimeout": "1s", "timeout": "2s"}],
        });
        let kept = |content: &str| {
            Map::of(&map(json!({
                "metadata": {"labels": {"larder.dev/binding": "shop-1", "larder.dev/content": content, "larder.dev/uses-cluster": "main"}},
                "data": {"snapshot.json": snapshot.to_string()},
            })))
        };
        let mounted = kept("snapshot");
        assert_eq!((mounted.generation, mounted.text.as_deref()), (Some(12), Some(snapshot.to_string().as_str())));
        assert_eq!(mounted.files, ["origin-08d0b104b3-url".into()].into());
        let history = kept("history");
        assert!(history.text.is_none() && history.generation == Some(12) && !history.files.is_empty());
    }

    #[test]
    fn keyrings_do_not_show_what_they_hold() {
        let secret: KubeSecret = serde_json::from_value(json!({"metadata": {}, "data": {"password": "aGlkZGVu"}})).unwrap();
        let kept = Keyring::of(&secret);
        assert_eq!(kept.entries.get("password").map(|text| &**text), Some("hidden"));
        assert!(!format!("{kept:?}").contains("hidden"));
    }

    #[test]
    fn a_pod_tells_whose_it_is() {
        let pod = json!({"metadata": {
            "name": "shop-6f7c-x", "generateName": "shop-6f7c-", "labels": {"larder.dev/binding": "shop-1", "pod-template-hash": "6f7c"},
            "ownerReferences": [{"apiVersion": "apps/v1", "kind": "ReplicaSet", "name": "shop-6f7c", "uid": "1", "controller": true}],
        }, "status": {"phase": "Running"}});
        let kept = Sidecar::of(&serde_json::from_value(pod).unwrap());
        assert_eq!(kept.owners, [Owner { kind: "Deployment".to_owned(), name: "shop".to_owned() }].into());
        assert!(kept.binding.is_some() && !kept.finished);
        assert_eq!(kept.controller.map(|controller| controller.kind), Some("ReplicaSet".into()));
    }
}
