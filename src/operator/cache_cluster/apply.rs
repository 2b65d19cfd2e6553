//! Objects are written, quietly: only where what is wanted, or what is there, differs from the last time.
//!
//! The API server fills in defaults and rewrites quantities, so what is there never equals what is sent. Instead each object carries
//! the digest of what was last sent, and what came back is remembered: a different digest is a change of ours, a different object is
//! somebody else's, and both are answered by sending it again.

use std::borrow::Cow;
use std::collections::HashMap;
use std::fmt::Debug;
use std::sync::Arc;

use k8s_openapi::NamespaceResourceScope;
use kube::api::{DeleteParams, Patch, PatchParams, Preconditions};
use kube::runtime::reflector::Store;
use kube::{Api, Resource};
use serde::de::DeserializeOwned;
use tracing::{debug, info};

use super::fetch::find;
use super::names::MANAGER;
use super::validate::Wanted;
use crate::operator::controller::Context;
use crate::operator::held::{Held, Part};
use crate::policy::digest::{Digest, digest, hexadecimal};

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
    known: HashMap<(Cow<'static, str>, Box<str>), Exchange>,
    /// How many pods StatefulSets were asked for, and as what a watch showed each before.
    asked: HashMap<Box<str>, (u16, Digest)>,
}

impl Applied {
    /// Remembers for how many pods a StatefulSet was asked that a watch shows as `shown`.
    pub fn ask_for(&mut self, set: &str, count: u16, shown: Digest) {
        self.asked.insert(set.into(), (count, shown));
    }

    /// For how many pods a StatefulSet was asked, where a watch that shows it as `shown` has not heard of it yet: else whoever writes the set again by
    /// what the watch says takes that back.
    pub fn asked_for(&self, set: &str, shown: Digest) -> Option<u16> {
        self.asked.get(set).filter(|(_, before)| *before == shown).map(|(count, _)| *count)
    }
}

/// One object as it was sent, and as it came back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Exchange {
    sent: Digest,
    back: Digest,
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
    pub async fn apply<P: Part>(&mut self, store: &Store<Held<P>>, mut object: P::Of) -> Result<Arc<Held<P>>, ApplyError> {
        let (kind, name) = (P::Of::kind(&()), object.meta().name.clone().unwrap_or_default());
        let serialise = |source| ApplyError::Serialise { kind: kind.clone().into_owned(), name: name.clone(), source };
        let sent = digest(&serde_json::to_vec(&object).map_err(serialise)?);
        let live = find(store, &self.wanted.namespace, &name);
        let known = (kind.clone(), name.as_str().into());
        // What came back carried the digest of what was sent.
        let as_applied = |live: &Held<P>| self.applied.known.get(&known) == Some(&Exchange { sent, back: live.fingerprint() });
        if let Some(live) = live.as_ref().filter(|live| as_applied(live)) {
            return Ok(live.clone());
        }
        if self.wanted.paused {
            return Ok(live.unwrap_or_else(|| Arc::new(Held::of(&object))));
        }
        if live.is_none() {
            self.check_free::<P::Of>(&name).await?;
        }
        check_leads(self.context)?;
        object.meta_mut().annotations.get_or_insert_default().insert(APPLIED.to_owned(), hexadecimal(&sent));
        let params = PatchParams::apply(MANAGER).force();
        let back = self.api::<P::Of>().patch(&name, &params, &Patch::Apply(&object)).await;
        let now = Held::of(&back.map_err(|source| refused(&kind, &name, source))?);
        debug!(%kind, name, namespace = self.wanted.namespace, "applied");
        self.context.metrics.wrote(static_kind(&kind));
        self.applied.known.insert(known, Exchange { sent, back: now.fingerprint() });
        Ok(Arc::new(now))
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
    pub async fn keep_only<P: Part>(&mut self, store: &Store<Held<P>>, names: &[String]) -> Result<(), ApplyError> {
        if self.wanted.paused {
            return Ok(());
        }
        let left_over = store.state_filter(|object| {
            object.namespace() == self.wanted.namespace
                && object.cluster() == Some(self.wanted.names.cluster())
                && object.is_owned_by(&self.wanted.uid)
                && !object.is_deleting()
                && !names.iter().any(|name| name == object.name())
        });
        for object in left_over {
            let (kind, name) = (P::Of::kind(&()), object.name());
            self.delete::<P::Of>(name, object.uid()).await?;
            info!(%kind, name, namespace = self.wanted.namespace, "removed what is no longer needed");
            self.applied.known.remove(&(kind, name.into()));
        }
        Ok(())
    }

    /// Deletes an object, if it is still the one with this uid.
    pub async fn delete<K>(&self, name: &str, uid: &str) -> Result<(), ApplyError>
    where
        K: Resource<Scope = NamespaceResourceScope, DynamicType = ()> + Clone + Debug + DeserializeOwned,
    {
        check_leads(self.context)?;
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

/// Whether this operator may change anything: asked right before each command.
pub fn check_leads(context: &Context) -> Result<(), ApplyError> {
    if context.leadership.holds() { Ok(()) } else { Err(ApplyError::NotLeading) }
}

/// An object that the API server refused, or did not answer for.
pub fn refused(kind: &str, name: &str, source: kube::Error) -> ApplyError {
    ApplyError::Refused { kind: kind.to_owned(), name: name.to_owned(), source: Box::new(source) }
}

/// The kind as a label of metrics: one of a few words.
pub fn static_kind(kind: &str) -> &'static str {
    const KINDS: [&str; 9] = [
        "Service",
        "ConfigMap",
        "Secret",
        "StatefulSet",
        "ServiceAccount",
        "PodDisruptionBudget",
        "NetworkPolicy",
        "EndpointSlice",
        "Deployment",
    ];
    KINDS.into_iter().find(|known| *known == kind).unwrap_or("Other")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refusals_say_what_to_do() {
        let status = kube::core::Status { code: 403, message: "exceeded quota: small".to_owned(), ..Default::default() };
        let error = refused("Service", "shop-0-0", kube::Error::Api(Box::new(status)));
        let text = error.to_string();
        assert!(text.contains("Service shop-0-0: exceeded quota: small: raise the ResourceQuota"), "{text}");
        assert!(error.is_refusal());
    }

    #[test]
    fn what_a_set_was_asked_for_counts_until_the_watch_shows_something_else() {
        let mut applied = Applied::default();
        let [before, after] = [digest(b"two pods"), digest(b"none")];
        applied.ask_for("shop-3", 0, before);
        assert_eq!((applied.asked_for("shop-3", before), applied.asked_for("shop-3", after)), (Some(0), None));
        assert_eq!(applied.asked_for("shop-4", before), None);
    }
}
