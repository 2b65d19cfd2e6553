//! Objects as they are kept: what is asked of each, and a digest of all that somebody could change.
//!
//! The API's own types have room for everything that Kubernetes knows, and are many times as large as what is ever read of them. A process
//! that watches many is as large as what it keeps.

use std::borrow::Cow;
use std::fmt::Debug;

use k8s_openapi::NamespaceResourceScope;
use kube::Resource;
use kube::core::ObjectMeta;
use kube::runtime::reflector::Lookup;
use kube::runtime::watcher::Event;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use super::watches::CLUSTER_LABEL;
use crate::policy::digest::{Digest, digest};

/// What is kept of one kind of object.
pub trait Part: Clone + Debug + Send + Sync + 'static {
    /// That kind.
    type Of: Resource<Scope = NamespaceResourceScope, DynamicType = ()>
        + Clone
        + Debug
        + Serialize
        + DeserializeOwned
        + Send
        + Sync
        + 'static;
    /// Whether Larder writes objects of it, so that a change by somebody else has to be noticed.
    const IS_WRITTEN: bool = true;

    /// Takes of an object what is kept.
    fn of(object: &Self::Of) -> Self;
}

/// An object as it is kept.
#[derive(Debug, Clone)]
pub struct Held<P> {
    name: Box<str>,
    namespace: Box<str>,
    uid: Box<str>,
    /// The CacheCluster that a label names.
    cluster: Option<Box<str>>,
    owners: Box<[Box<str>]>,
    deleting: bool,
    fingerprint: Digest,
    /// What is particular to its kind.
    pub part: P,
}

impl<P: Part> Held<P> {
    /// Keeps an object.
    pub fn of(object: &P::Of) -> Self {
        let ObjectMeta { name, namespace, uid, labels, owner_references, deletion_timestamp, .. } = object.meta();
        let text = |text: &Option<String>| text.as_deref().unwrap_or_default().into();
        Self {
            name: text(name),
            namespace: text(namespace),
            uid: text(uid),
            cluster: labels.as_ref().and_then(|labels| labels.get(CLUSTER_LABEL)).map(|name| name.as_str().into()),
            owners: owner_references.iter().flatten().map(|owner| owner.uid.as_str().into()).collect(),
            deleting: deletion_timestamp.is_some(),
            fingerprint: if P::IS_WRITTEN { fingerprint(object) } else { Digest::default() },
            part: P::of(object),
        }
    }

    /// Keeps the object of an event.
    pub fn of_event(event: Event<P::Of>) -> Event<Self> {
        match event {
            Event::Apply(object) => Event::Apply(Self::of(&object)),
            Event::Delete(object) => Event::Delete(Self::of(&object)),
            Event::Init => Event::Init,
            Event::InitApply(object) => Event::InitApply(Self::of(&object)),
            Event::InitDone => Event::InitDone,
        }
    }
}

impl<P> Held<P> {
    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its namespace.
    pub fn namespace(&self) -> &str {
        &self.namespace
    }

    /// What no other object ever has.
    pub fn uid(&self) -> &str {
        &self.uid
    }

    /// The CacheCluster that its label names.
    pub fn cluster(&self) -> Option<&str> {
        self.cluster.as_deref()
    }

    /// Whether the object with this uid owns it.
    pub fn is_owned_by(&self, uid: &str) -> bool {
        self.owners.iter().any(|owner| **owner == *uid)
    }

    /// Whether it is on its way out.
    pub fn is_deleting(&self) -> bool {
        self.deleting
    }

    /// A digest of what somebody could change, for kinds that are written.
    pub fn fingerprint(&self) -> Digest {
        self.fingerprint
    }
}

impl<P: Part> Lookup for Held<P> {
    type DynamicType = ();

    fn kind((): &()) -> Cow<'_, str> {
        <P::Of as Resource>::kind(&())
    }

    fn group((): &()) -> Cow<'_, str> {
        <P::Of as Resource>::group(&())
    }

    fn version((): &()) -> Cow<'_, str> {
        <P::Of as Resource>::version(&())
    }

    fn plural((): &()) -> Cow<'_, str> {
        <P::Of as Resource>::plural(&())
    }

    fn name(&self) -> Option<Cow<'_, str>> {
        Some(Cow::Borrowed(&*self.name))
    }

    fn namespace(&self) -> Option<Cow<'_, str>> {
        Some(Cow::Borrowed(&*self.namespace))
    }

    // A store would keep both beside the object, and compares neither.
    fn resource_version(&self) -> Option<Cow<'_, str>> {
        None
    }

    fn uid(&self) -> Option<Cow<'_, str>> {
        None
    }
}

/// A digest of what somebody could change: everything but the status, and what the API server keeps for itself.
fn fingerprint<K: Serialize>(object: &K) -> Digest {
    let Ok(mut json) = serde_json::to_value(object) else { return Digest::default() };
    if let Some(fields) = json.as_object_mut() {
        fields.remove("status");
    }
    if let Some(metadata) = json.get_mut("metadata").and_then(Value::as_object_mut) {
        metadata.retain(|field, _| ["name", "labels", "ownerReferences", "annotations"].contains(&field.as_str()));
        if let Some(annotations) = metadata.get_mut("annotations").and_then(Value::as_object_mut) {
            // Others' annotations are theirs.
            annotations.retain(|name, _| name.starts_with("larder.dev/"));
        }
        if metadata.get("annotations").and_then(Value::as_object).is_some_and(serde_json::Map::is_empty) {
            metadata.remove("annotations");
        }
    }
    digest(json.to_string().as_bytes())
}

#[cfg(test)]
mod tests {
    use k8s_openapi::api::core::v1::ConfigMap;

    use super::*;

    fn map(json: Value) -> ConfigMap {
        serde_json::from_value(json).unwrap()
    }

    #[test]
    fn a_fingerprint_tells_only_of_what_counts() {
        let object = map(serde_json::json!({"metadata": {"name": "a", "uid": "1", "resourceVersion": "1"}, "data": {"k": "v"}}));
        let touched = map(serde_json::json!({
            "metadata": {"name": "a", "uid": "1", "resourceVersion": "2", "managedFields": [{"manager": "x"}], "annotations": {"other": "y"}},
            "data": {"k": "v"},
        }));
        let mut annotated = object.clone();
        annotated.metadata.annotations = Some(std::collections::BTreeMap::new());
        assert_eq!(fingerprint(&annotated), fingerprint(&touched));
        let edited = map(serde_json::json!({"metadata": {"name": "a"}, "data": {"k": "w"}}));
        assert_ne!(fingerprint(&object), fingerprint(&edited));
        let signed = map(
            serde_json::json!({"metadata": {"name": "a", "annotations": {"larder.dev/applied": "another"}}, "data": {"k": "v"}}),
        );
        assert_ne!(fingerprint(&object), fingerprint(&signed), "what was last sent is part of it");
    }
}
