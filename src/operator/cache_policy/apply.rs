//! A binding's objects are written, quietly: only where what is there differs from what is to be.

use std::fmt::Debug;

use k8s_openapi::NamespaceResourceScope;
use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::core::v1::{ConfigMap, Secret};
use kube::api::{ApiResource, DeleteParams, DynamicObject, Patch, PatchParams, PostParams, Preconditions};
use kube::{Api, Resource};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::json;
use tracing::{debug, info};

use super::fetch::Bound;
use super::objects::{BINDING_LABEL, outlived};
use super::parts::{content_of_map, content_of_secret, substance};
use super::relay::FINALIZER;
use super::relay::objects::RELAY_LABEL;
use crate::api::CachePolicy;
use crate::operator::cache_cluster::apply::{ApplyError, refused, static_kind};
use crate::operator::cache_cluster::names::MANAGER;
use crate::operator::controller::Context;
use crate::policy::Snapshot;
use crate::policy::binding::{BindingName, SNAPSHOT_FILE};

/// Writes the objects of one namespace's bindings.
pub struct Applier<'a> {
    /// What the operator may use.
    pub context: &'a Context,
    /// The namespace.
    pub namespace: &'a str,
}

/// What came of keeping a snapshot.
#[derive(Debug, PartialEq, Eq)]
pub enum Kept {
    /// It is kept.
    Now,
    /// Another has this generation already.
    Taken,
}

impl Applier<'_> {
    fn api<K>(&self) -> Api<K>
    where
        K: Resource<Scope = NamespaceResourceScope, DynamicType = ()>,
    {
        Api::namespaced(self.context.client.clone(), self.namespace)
    }

    fn check_leads(&self) -> Result<(), ApplyError> {
        if self.context.leadership.holds() { Ok(()) } else { Err(ApplyError::NotLeading) }
    }

    /// Makes the binding's Secret be as `secret` says.
    pub async fn secret(&self, secret: &Secret, bound: &Bound) -> Result<(), ApplyError> {
        let live = bound.secret.as_ref().map(|live| live.part.tag.substance);
        if live == Some(substance(&secret.metadata, &content_of_secret(secret))) {
            return Ok(());
        }
        self.write(secret, live.is_some()).await
    }

    /// Makes the binding's ConfigMap be as `map` says.
    pub async fn config_map(&self, map: &ConfigMap, bound: &Bound) -> Result<(), ApplyError> {
        let live = bound.map.as_ref().map(|live| live.part.tag.substance);
        if live == Some(substance(&map.metadata, &content_of_map(map))) {
            return Ok(());
        }
        self.write(map, live.is_some()).await
    }

    /// Keeps a snapshot for good. It is made and never replaced, so that no two snapshots come to have one generation, whoever else leads
    /// by now.
    pub async fn history(&self, map: &ConfigMap) -> Result<Kept, ApplyError> {
        self.check_leads()?;
        let (kind, name) = (ConfigMap::kind(&()), map.metadata.name.clone().unwrap_or_default());
        let params = PostParams { field_manager: Some(MANAGER.to_owned()), ..PostParams::default() };
        match self.api::<ConfigMap>().create(&params, map).await {
            Ok(_) => {
                self.context.metrics.wrote("ConfigMap");
                Ok(Kept::Now)
            }
            Err(kube::Error::Api(status)) if status.code == 409 => {
                let there = self.api::<ConfigMap>().get_opt(&name).await.map_err(|source| refused(&kind, &name, source))?;
                let text = |map: &ConfigMap| map.data.as_ref().and_then(|data| data.get(SNAPSHOT_FILE)).cloned();
                // A look that broke off in between, or another operator that came to the same.
                Ok(if there.as_ref().and_then(text) == text(map) { Kept::Now } else { Kept::Taken })
            }
            Err(source) => Err(refused(&kind, &name, source)),
        }
    }

    /// Deletes what was kept of a binding for longer than it is to be.
    pub async fn delete_outlived(&self, binding: &BindingName, bound: &Bound, snapshot: &Snapshot) -> Result<(), ApplyError> {
        let names = bound.past.iter().map(|map| map.name());
        for name in outlived(binding, names, snapshot.generation) {
            let Some(map) = bound.past.iter().find(|map| map.name() == name) else { continue };
            self.check_leads()?;
            let same = Preconditions { uid: Some(map.uid().to_owned()), resource_version: None };
            match self.api::<ConfigMap>().delete(name, &DeleteParams::default().preconditions(same)).await {
                Ok(_) => info!(name, namespace = self.namespace, "removed a snapshot of long ago"),
                Err(kube::Error::Api(status)) if status.code == 404 || status.code == 409 => {}
                Err(source) => return Err(refused(&ConfigMap::kind(&()), name, source)),
            }
        }
        Ok(())
    }

    async fn write<K>(&self, object: &K, is_known: bool) -> Result<(), ApplyError>
    where
        K: Resource<Scope = NamespaceResourceScope, DynamicType = ()> + Clone + Debug + Serialize + DeserializeOwned,
    {
        let (kind, name) = (K::kind(&()), object.meta().name.clone().unwrap_or_default());
        if !is_known {
            self.check_free::<K>(&name).await?;
        }
        self.check_leads()?;
        let params = PatchParams::apply(MANAGER).force();
        let sent = self.api::<K>().patch(&name, &params, &Patch::Apply(object)).await;
        sent.map_err(|source| refused(&kind, &name, source))?;
        debug!(%kind, name, namespace = self.namespace, "applied");
        self.context.metrics.wrote(static_kind(&kind));
        Ok(())
    }

    /// Makes one of the objects that run a relay be as `object` says.
    pub async fn of_relay<K>(&self, object: &K) -> Result<(), ApplyError>
    where
        K: Resource<Scope = NamespaceResourceScope, DynamicType = ()> + Clone + Debug + Serialize + DeserializeOwned,
    {
        self.write(object, false).await
    }

    /// Ends a relay: what else there is of it goes with its policy.
    pub async fn delete_relay(&self, name: &str) -> Result<(), ApplyError> {
        self.check_free::<Deployment>(name).await?;
        self.check_leads()?;
        match self.api::<Deployment>().delete(name, &DeleteParams::default()).await {
            Ok(_) => Ok(()),
            Err(kube::Error::Api(status)) if status.code == 404 => Ok(()),
            Err(source) => Err(refused(&Deployment::kind(&()), name, source)),
        }
    }

    /// Has a policy's deletion wait for its journals from now on, or no longer.
    pub async fn hold(&self, policy: &CachePolicy, is_held: bool) -> Result<(), ApplyError> {
        self.check_leads()?;
        let resource = ApiResource::erase::<CachePolicy>(&());
        let api: Api<DynamicObject> = Api::namespaced_with(self.context.client.clone(), self.namespace, &resource);
        let name = policy.metadata.name.clone().unwrap_or_default();
        let mut metadata = json!({"name": name, "uid": policy.metadata.uid});
        if is_held {
            metadata["finalizers"] = json!([FINALIZER]);
        }
        let document = json!({"apiVersion": resource.api_version, "kind": resource.kind, "metadata": metadata});
        match api.patch(&name, &PatchParams::apply(MANAGER).force(), &Patch::Apply(&document)).await {
            Ok(_) => Ok(()),
            // Gone in the meantime, or another of the same name.
            Err(kube::Error::Api(status)) if !is_held && (status.code == 404 || status.code == 409) => Ok(()),
            Err(source) => Err(refused(&resource.kind, &name, source)),
        }
    }

    /// A name that is new to the watch may yet belong to somebody else.
    async fn check_free<K>(&self, name: &str) -> Result<(), ApplyError>
    where
        K: Resource<Scope = NamespaceResourceScope, DynamicType = ()> + Clone + Debug + DeserializeOwned,
    {
        let kind = K::kind(&());
        let there = self.api::<K>().get_metadata_opt(name).await.map_err(|source| refused(&kind, name, source))?;
        let is_ours = |there: &kube::core::ObjectMeta| {
            let labels = there.labels.as_ref();
            labels.is_some_and(|labels| [BINDING_LABEL, RELAY_LABEL].iter().any(|label| labels.contains_key(*label)))
        };
        match there {
            Some(there) if !is_ours(&there.metadata) => Err(ApplyError::Taken { kind: kind.into_owned(), name: name.to_owned() }),
            _ => Ok(()),
        }
    }
}
