//! Objects are written, quietly: only where what is wanted, or what is there, differs from the last time.
//!
//! The API server fills in defaults and rewrites quantities, so what is there never equals what is sent. Instead each object carries
//! the digest of what was last sent, and what came back is remembered: a different digest is a change of ours, a different object is
//! somebody else's, and both are answered by sending it again.

use std::collections::HashMap;
use std::fmt::Debug;
use std::sync::Arc;

use k8s_openapi::NamespaceResourceScope;
use kube::api::{DeleteParams, Patch, PatchParams, Preconditions};
use kube::runtime::reflector::Store;
use kube::{Api, Resource};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;
use tracing::{debug, info};

use super::fetch::find;
use super::names::{CLUSTER_LABEL, MANAGER};
use super::validate::Wanted;
use crate::operator::controller::Context;
use crate::policy::digest::sha256;

/// The annotation with the digest of what was last sent.
const APPLIED: &str = "larder.dev/applied";

/// Why an object could not be written or removed.
#[derive(Debug, thiserror::Error)]
pub enum ApplyError {
    /// The API server refused it, or did not answer.
    #[error("{kind} {name}: {}{}", describe(source), remedy(source))]
    Refused {
        /// Its kind.
        kind: String,
        /// Its name.
        name: String,
        /// What it said.
        source: Box<kube::Error>,
    },
    /// Somebody else's object has the name.
    #[error("{kind} {name} exists and does not belong to this CacheCluster: rename or delete it")]
    Taken {
        /// Its kind.
        kind: String,
        /// Its name.
        name: String,
    },
    /// This operator no longer leads.
    #[error("another operator leads")]
    NotLeading,
    /// An object does not serialise: an error in Larder.
    #[error("{kind} {name} does not serialise: {source}: please report it")]
    Serialise {
        /// Its kind.
        kind: String,
        /// Its name.
        name: String,
        /// Why.
        source: serde_json::Error,
    },
}

impl ApplyError {
    /// Whether the API server understood and refused: then it says so until something changes.
    pub fn is_refusal(&self) -> bool {
        match self {
            Self::Refused { source, .. } => {
                matches!(&**source, kube::Error::Api(status) if (400..500).contains(&status.code) && status.code != 409 && status.code != 429)
            }
            Self::Taken { .. } => true,
            Self::NotLeading | Self::Serialise { .. } => false,
        }
    }
}

fn describe(error: &kube::Error) -> String {
    match error {
        kube::Error::Api(status) => status.message.clone(),
        other => other.to_string(),
    }
}

fn remedy(error: &kube::Error) -> &'static str {
    match error {
        kube::Error::Api(status) if status.message.contains("exceeded quota") => {
            ": raise the ResourceQuota of the namespace, or lower spec.replicas or spec.memory"
        }
        kube::Error::Api(status) if status.code == 403 => {
            ": give the operator's Role that right, or see which admission refuses it"
        }
        kube::Error::Api(status) if status.code == 422 => ": correct the specification",
        _ => "",
    }
}

/// What was sent and what came back, by kind and name.
#[derive(Debug, Default)]
pub struct Applied {
    known: HashMap<(String, String), (String, String)>,
}

/// Writes the objects of one CacheCluster.
pub struct Applier<'a> {
    /// What the operator may use.
    pub context: &'a Context,
    /// Whose objects.
    pub wanted: &'a Wanted,
    /// What was sent before.
    pub applied: &'a mut Applied,
}

impl Applier<'_> {
    fn api<K>(&self) -> Api<K>
    where
        K: Resource<Scope = NamespaceResourceScope, DynamicType = ()>,
    {
        Api::namespaced(self.context.client.clone(), &self.wanted.namespace)
    }

    /// Makes the object be as `object` says, if it is not, and nothing where everything is held as it is. What is there now.
    pub async fn apply<K>(&mut self, store: &Store<K>, mut object: K) -> Result<Arc<K>, ApplyError>
    where
        K: Resource<Scope = NamespaceResourceScope, DynamicType = ()>
            + Clone
            + Debug
            + Serialize
            + DeserializeOwned
            + Send
            + Sync
            + 'static,
    {
        let (kind, name) = (K::kind(&()).into_owned(), object.meta().name.clone().unwrap_or_default());
        let serialise = |source| ApplyError::Serialise { kind: kind.clone(), name: name.clone(), source };
        let digest = sha256(&serde_json::to_vec(&object).map_err(serialise)?);
        let live = find(store, &self.wanted.namespace, &name);
        if let Some(live) = live.as_ref().filter(|live| self.is_as_applied(&kind, &name, live.as_ref(), &digest)) {
            return Ok(live.clone());
        }
        if self.wanted.paused {
            return Ok(live.unwrap_or_else(|| Arc::new(object)));
        }
        if live.is_none() {
            self.check_free::<K>(&name).await?;
        }
        if !self.context.leadership.holds() {
            return Err(ApplyError::NotLeading);
        }
        object.meta_mut().annotations.get_or_insert_default().insert(APPLIED.to_owned(), digest.clone());
        let params = PatchParams::apply(MANAGER).force();
        let sent = self.api::<K>().patch(&name, &params, &Patch::Apply(&object)).await;
        let now = sent.map_err(|source| refused(&kind, &name, source))?;
        debug!(kind, name, namespace = self.wanted.namespace, "applied");
        self.context.metrics.wrote(static_kind(&kind));
        self.applied.known.insert((kind, name), (digest, fingerprint(&now)));
        Ok(Arc::new(now))
    }

    /// Whether what is there is what came back when the same was sent.
    fn is_as_applied<K: Resource + Serialize>(&self, kind: &str, name: &str, live: &K, digest: &str) -> bool {
        let annotations = live.meta().annotations.as_ref();
        let theirs = annotations.and_then(|annotations| annotations.get(APPLIED));
        let known = self.applied.known.get(&(kind.to_owned(), name.to_owned()));
        theirs.is_some_and(|theirs| theirs == digest)
            && known.is_some_and(|(sent, back)| sent == digest && *back == fingerprint(live))
    }

    /// A name that is new to the watch may yet belong to somebody else.
    async fn check_free<K>(&self, name: &str) -> Result<(), ApplyError>
    where
        K: Resource<Scope = NamespaceResourceScope, DynamicType = ()> + Clone + Debug + DeserializeOwned,
    {
        let kind = K::kind(&()).into_owned();
        let existing = self.api::<K>().get_metadata_opt(name).await.map_err(|source| refused(&kind, name, source))?;
        match existing {
            Some(existing) if !self.owns(&existing.metadata) => Err(ApplyError::Taken { kind, name: name.to_owned() }),
            _ => Ok(()),
        }
    }

    fn owns(&self, metadata: &kube::core::ObjectMeta) -> bool {
        metadata.owner_references.iter().flatten().any(|owner| owner.uid == self.wanted.uid)
    }

    /// Removes what belongs to this CacheCluster and has none of these names.
    pub async fn keep_only<K>(&mut self, store: &Store<K>, names: &[String]) -> Result<(), ApplyError>
    where
        K: Resource<Scope = NamespaceResourceScope, DynamicType = ()> + Clone + Debug + DeserializeOwned + Send + Sync + 'static,
    {
        if self.wanted.paused {
            return Ok(());
        }
        let left_over = store.state_filter(|object| {
            let metadata = object.meta();
            let of_cluster = metadata.labels.as_ref().and_then(|labels| labels.get(CLUSTER_LABEL)).map(String::as_str);
            metadata.namespace.as_deref() == Some(&self.wanted.namespace)
                && of_cluster == Some(self.wanted.names.cluster())
                && self.owns(metadata)
                && metadata.deletion_timestamp.is_none()
                && !metadata.name.as_ref().is_some_and(|name| names.contains(name))
        });
        for object in left_over {
            let (kind, name) = (K::kind(&()).into_owned(), object.meta().name.clone().unwrap_or_default());
            self.delete::<K>(&name, object.meta().uid.as_deref().unwrap_or_default()).await?;
            info!(kind, name, namespace = self.wanted.namespace, "removed what is no longer needed");
            self.applied.known.remove(&(kind, name));
        }
        Ok(())
    }

    /// Deletes an object, if it is still the one with this uid.
    pub async fn delete<K>(&self, name: &str, uid: &str) -> Result<(), ApplyError>
    where
        K: Resource<Scope = NamespaceResourceScope, DynamicType = ()> + Clone + Debug + DeserializeOwned,
    {
        if !self.context.leadership.holds() {
            return Err(ApplyError::NotLeading);
        }
        let same = Preconditions { uid: Some(uid.to_owned()), resource_version: None };
        let params = DeleteParams::default().preconditions(same);
        match self.api::<K>().delete(name, &params).await {
            Ok(_) => Ok(()),
            // Gone, or another by now: then there is nothing to delete.
            Err(kube::Error::Api(status)) if status.code == 404 || status.code == 409 => Ok(()),
            Err(source) => Err(refused(&K::kind(&()), name, source)),
        }
    }
}

fn refused(kind: &str, name: &str, source: kube::Error) -> ApplyError {
    ApplyError::Refused { kind: kind.to_owned(), name: name.to_owned(), source: Box::new(source) }
}

/// A digest of what somebody could change: everything but the status, and what the API server keeps for itself.
fn fingerprint<K: Serialize>(object: &K) -> String {
    let Ok(mut json) = serde_json::to_value(object) else { return String::new() };
    if let Some(fields) = json.as_object_mut() {
        fields.remove("status");
    }
    if let Some(metadata) = json.get_mut("metadata").and_then(Value::as_object_mut) {
        metadata.retain(|field, _| ["name", "labels", "ownerReferences", "annotations"].contains(&field.as_str()));
        if let Some(annotations) = metadata.get_mut("annotations").and_then(Value::as_object_mut) {
            // Others' annotations are theirs, and the watches keep none.
            annotations.retain(|name, _| name.starts_with("larder.dev/"));
        }
        if metadata.get("annotations").and_then(Value::as_object).is_some_and(serde_json::Map::is_empty) {
            metadata.remove("annotations");
        }
    }
    sha256(json.to_string().as_bytes())
}

/// The kind as a label of metrics: one of a few words.
fn static_kind(kind: &str) -> &'static str {
    const KINDS: [&str; 8] = [
        "Service",
        "ConfigMap",
        "Secret",
        "StatefulSet",
        "ServiceAccount",
        "PodDisruptionBudget",
        "NetworkPolicy",
        "EndpointSlice",
    ];
    KINDS.into_iter().find(|known| *known == kind).unwrap_or("Other")
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
    }

    #[test]
    fn refusals_say_what_to_do() {
        let status = kube::core::Status { code: 403, message: "exceeded quota: small".to_owned(), ..Default::default() };
        let error = refused("Service", "shop-0-0", kube::Error::Api(Box::new(status)));
        let text = error.to_string();
        assert!(text.contains("Service shop-0-0: exceeded quota: small: raise the ResourceQuota"), "{text}");
        assert!(error.is_refusal());
    }
}
