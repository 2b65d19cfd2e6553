//! What there is in a namespace that its policies are about: everything that is read before anything is decided.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fmt;
use std::sync::Arc;

use k8s_openapi::api::core::v1::{ConfigMap, Secret};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::OwnerReference;
use kube::runtime::reflector::{ObjectRef, Store};
use kube::{Api, Resource as _};

use super::merge::Namespace;
use super::origins::{Files, KnownSecrets, is_file_of_an_origin};
use super::parts::{Controller, Keyring, Maker, Map, Sidecar, Template, labels};
use super::relay::{self, objects::RELAY_LABEL};
use super::slots;
use super::ties::{Found, Offer};
use super::unreadable::{Earlier, Unknown};
use super::workload::Workload;
use crate::api::CachePolicy;
use crate::operator::controller::Context;
use crate::operator::held::Held;
use crate::operator::owner::Owner;
use crate::operator::queue::Key;
use crate::operator::watches::{Policy, Watches, secrets_of};
use crate::policy::JournalName;
use crate::policy::binding::{BindingName, SNAPSHOT_FILE};

/// The most owners of one object: of so many, some outlive the others until the next look.
const MAX_MAKERS: usize = 16;
/// What a Rollout is of: nothing tells its `apiVersion` to whoever sees its pods alone.
const ROLLOUT_VERSION: &str = "argoproj.io/v1alpha1";

/// The entries of a Secret that policies refer to, as they were read once. `Debug` does not show them.
#[derive(Clone, Default)]
pub struct ReadSecret {
    version: Option<Box<str>>,
    entries: BTreeMap<String, Vec<u8>>,
}

impl ReadSecret {
    /// The version in which it was read.
    pub fn version(&self) -> Option<&str> {
        self.version.as_deref()
    }
}

impl fmt::Debug for ReadSecret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ReadSecret").field("version", &self.version).finish_non_exhaustive()
    }
}

/// What lies of a binding.
#[derive(Debug, Clone, Default)]
pub struct Bound {
    /// The ConfigMap that is mounted.
    pub map: Option<Arc<Held<Map>>>,
    /// The Secret.
    pub secret: Option<Arc<Held<Keyring>>>,
    /// What the ConfigMap was.
    pub past: Vec<Arc<Held<Map>>>,
    /// How many pods run that mount it.
    pub sidecars: u32,
    /// How many more are on their way out.
    pub leaving: u32,
}

impl Bound {
    /// The CacheCluster that its objects name.
    pub fn cluster(&self) -> Option<&str> {
        let tag = self.map.as_ref().map(|map| &map.part.tag).or_else(|| Some(&self.secret.as_ref()?.part.tag))?;
        Some(&tag.cluster)
    }

    /// The workload that its objects name, as a kind and a name with a slash between.
    pub fn workload(&self) -> Option<&str> {
        let tag = self.map.as_ref().map(|map| &map.part.tag).or_else(|| Some(&self.secret.as_ref()?.part.tag))?;
        Some(&tag.workload)
    }
}

/// A workload of the namespace, and the bindings that its pods mount.
#[derive(Debug, Clone)]
pub struct Tenant {
    /// The workload.
    pub workload: Workload,
    /// Those bindings.
    pub mounted: BTreeSet<BindingName>,
    /// Where nothing tells the workload's uid: what made its pods, or these themselves. What names all of them goes once none is left.
    pub makers: BTreeSet<Controller>,
    /// Whether it is the relay of the policy of its name, which is the only one that it follows.
    pub is_relay: bool,
}

impl Tenant {
    fn new(workload: Workload) -> Self {
        Self { workload, mounted: BTreeSet::new(), makers: BTreeSet::new(), is_relay: false }
    }

    fn relay_of(policy: &CachePolicy) -> Self {
        Self { is_relay: true, ..Self::new(relay::workload(policy)) }
    }

    /// What the objects of its bindings name as their owners, so that they go with it.
    pub fn owners(&self) -> Vec<OwnerReference> {
        match self.workload.owner_reference() {
            Some(owner) => vec![owner],
            None => self.makers.iter().take(MAX_MAKERS).map(Controller::owner_reference).collect(),
        }
    }
}

/// What there is.
#[derive(Debug)]
pub struct Seen {
    /// The policies, but for those on their way out: these select nobody any more.
    pub policies: Vec<Arc<Policy>>,
    /// Those on their way out that wait for their journals.
    pub leaving: Vec<Arc<Policy>>,
    /// Those that cannot be read, as they were when they could.
    pub stand_ins: Vec<Arc<Policy>>,
    /// Those that cannot be read, and that nobody here ever could.
    pub unknown: Vec<Unknown>,
    /// The workloads, by kind and name.
    pub tenants: Vec<Tenant>,
    /// The bindings that have objects or pods.
    pub bound: BTreeMap<BindingName, Bound>,
    /// What policies may name.
    pub namespace: Namespace,
    /// What looks at CacheClusters found.
    pub offers: BTreeMap<String, Arc<Offer>>,
    /// All CacheClusters of the namespace.
    pub clusters: BTreeSet<String>,
    /// Of policies, by their names, the queues of origins whose connections the sidecars of some workload outnumber.
    pub queues: BTreeMap<String, BTreeSet<JournalName>>,
}

impl Seen {
    /// The policies as they can be read, or could last.
    pub fn readable(&self) -> Vec<&CachePolicy> {
        self.policies.iter().chain(&self.stand_ins).filter_map(|policy| policy.0.as_ref().ok()).collect()
    }

    /// The policies that have relays: those that need one, and those that did until nothing is left to do.
    pub fn with_relays(&self) -> impl Iterator<Item = &CachePolicy> {
        let all = self.policies.iter().chain(&self.stand_ins).chain(&self.leaving);
        all.filter_map(|policy| policy.0.as_ref().ok()).filter(|policy| self.needs_relay(policy) || relay::is_held(policy))
    }

    /// Whether a policy needs a relay now.
    pub fn needs_relay(&self, policy: &CachePolicy) -> bool {
        relay::is_needed(policy) || policy.metadata.name.as_ref().is_some_and(|name| self.queues.contains_key(name))
    }

    /// The queues that a policy needs. One that has a relay keeps them until its sidecars are half as many: they come and go.
    fn queues_of(&self, policy: &CachePolicy) -> BTreeSet<JournalName> {
        let queues = relay::load_queues(policy);
        if queues.is_empty() {
            return BTreeSet::new();
        }
        let following = self.tenants.iter().filter(|tenant| !tenant.is_relay && tenant.workload.follows(policy));
        let bound = following.filter_map(|tenant| self.bound.get(&tenant.workload.binding(&policy.spec.cache_cluster)));
        let sidecars = bound.map(|bound| bound.sidecars).max().unwrap_or(0);
        let most = |total: u32| if relay::is_held(policy) { total / 2 } else { total };
        queues.into_iter().filter(|(_, total)| sidecars > most(*total)).map(|(queue, _)| queue).collect()
    }

    /// The policy that a relay is of.
    pub fn policy_of(&self, relay: &Workload) -> Option<&CachePolicy> {
        self.with_relays().find(|policy| policy.metadata.name.as_deref() == Some(&relay.name))
    }

    /// The names of policies that may have a part in what a workload has, and of which no more is known.
    pub fn unknown_to(&self, workload: &Workload) -> Vec<String> {
        let concerning = self.unknown.iter().filter(|unknown| unknown.may_concern(workload));
        concerning.map(|unknown| unknown.name.clone()).collect()
    }
}

/// Looks around in a namespace. `None`: some CacheCluster that a policy names has not been looked at since this process leads, and nothing
/// can be said of its policies yet.
pub async fn see(
    context: &Context,
    watches: &Watches,
    namespace: &str,
    read: &mut HashMap<String, ReadSecret>,
    earlier: &mut Earlier,
) -> Result<Option<Seen>, kube::Error> {
    let all = watches.policies.state_filter(|policy| policy.meta().namespace.as_deref() == Some(namespace));
    let (policies, mut leaving): (Vec<_>, Vec<_>) =
        all.into_iter().partition(|policy| policy.meta().deletion_timestamp.is_none());
    leaving.retain(|policy| policy.0.as_ref().is_ok_and(relay::is_held));
    let (stand_ins, unknown) = earlier.settle(context, namespace, &policies).await;
    let mut seen = Seen {
        policies,
        leaving,
        stand_ins,
        unknown,
        tenants: Vec::new(),
        bound: bound(watches, namespace),
        namespace: Namespace::default(),
        offers: BTreeMap::new(),
        clusters: BTreeSet::new(),
        queues: BTreeMap::new(),
    };
    if !see_clusters(context, watches, namespace, &mut seen) {
        return Ok(None);
    }
    seen.tenants = tenants(watches, namespace, &seen.clusters);
    let policies = seen.policies.iter().chain(&seen.stand_ins).filter_map(|policy| policy.0.as_ref().ok());
    let queues = policies.filter_map(|policy| Some((policy.metadata.name.clone()?, seen.queues_of(policy))));
    seen.queues = queues.filter(|(_, queues)| !queues.is_empty()).collect();
    let relays: Vec<Tenant> = seen.with_relays().map(Tenant::relay_of).collect();
    seen.tenants.extend(relays);
    // Of one that leaves, a relay takes the slot away.
    let leaving = seen.leaving.iter().filter_map(|policy| policy.0.as_ref().ok());
    let taken = slots::taken(&seen.readable().into_iter().chain(leaving).collect::<Vec<_>>());
    seen.namespace.taken = taken;
    seen.namespace.lying = lying(&seen.bound);
    seen.namespace.secrets = secrets(context, watches, namespace, &seen, read).await?;
    Ok(Some(seen))
}

/// The files of origins that lie ready for sidecars.
fn lying(bound: &BTreeMap<BindingName, Bound>) -> BTreeMap<BindingName, Files> {
    let of = |secret: &Held<Keyring>| {
        let files = secret.part.entries.iter().filter(|(entry, _)| is_file_of_an_origin(entry));
        Files(files.map(|(entry, url)| (entry.to_string(), url.to_string())).collect())
    };
    bound.iter().filter_map(|(binding, bound)| Some((binding.clone(), of(bound.secret.as_ref()?)))).collect()
}

/// What is known of CacheClusters. Whether it is enough.
fn see_clusters(context: &Context, watches: &Watches, namespace: &str, seen: &mut Seen) -> bool {
    let clusters = watches.clusters.state_filter(|cluster| {
        cluster.meta().namespace.as_deref() == Some(namespace) && cluster.meta().deletion_timestamp.is_none()
    });
    let policies = seen.readable().into_iter().chain(seen.with_relays());
    let used: BTreeSet<String> = policies.map(|policy| policy.spec.cache_cluster.clone()).collect();
    let mut is_enough = true;
    for name in clusters.iter().filter_map(|cluster| cluster.meta().name.clone()) {
        let key = Key { namespace: namespace.to_owned(), name: name.clone() };
        let place = match context.ties.found(&key) {
            Found::NotYet => {
                is_enough &= !used.contains(&name);
                None
            }
            Found::Nothing => None,
            Found::Offer(offer) => {
                seen.offers.insert(name.clone(), offer.clone());
                Some(offer.place.clone())
            }
        };
        seen.namespace.clusters.insert(name.clone(), place);
        seen.clusters.insert(name);
    }
    is_enough
}

fn bound(watches: &Watches, namespace: &str) -> BTreeMap<BindingName, Bound> {
    let mut all: BTreeMap<BindingName, Bound> = BTreeMap::new();
    for map in watches.binding_maps.state_filter(|map| map.namespace() == namespace && !map.is_deleting()) {
        let Some(name) = map.part.tag.binding.clone() else { continue };
        let is_mounted = map.part.is_mounted && map.name() == name.object_name();
        let bound = all.entry(name).or_default();
        if is_mounted { bound.map = Some(map) } else { bound.past.push(map) }
    }
    for secret in watches.binding_secrets.state_filter(|secret| secret.namespace() == namespace && !secret.is_deleting()) {
        let Some(name) = secret.part.tag.binding.clone() else { continue };
        if secret.name() == name.object_name() {
            all.entry(name).or_default().secret = Some(secret);
        }
    }
    for pod in watches.sidecars.state_filter(|pod| pod.namespace() == namespace && !pod.part.finished) {
        let Some(name) = pod.part.binding.clone() else { continue };
        let bound = all.entry(name).or_default();
        bound.sidecars += u32::from(!pod.is_deleting());
        bound.leaving += u32::from(pod.is_deleting());
    }
    all
}

/// The workloads: what makes pods, and the owners of pods that nothing of that kind makes.
fn tenants(watches: &Watches, namespace: &str, clusters: &BTreeSet<String>) -> Vec<Tenant> {
    let mut all: BTreeMap<(String, String), Tenant> = BTreeMap::new();
    let mut add = |workload: Workload| {
        all.insert((workload.kind.clone(), workload.name.clone()), Tenant::new(workload));
    };
    made(&watches.deployments, namespace, &mut add);
    made(&watches.all_stateful_sets, namespace, &mut add);
    made(&watches.daemon_sets, namespace, &mut add);
    made(&watches.cron_jobs, namespace, &mut add);
    for pod in watches.sidecars.state_filter(|pod| pod.namespace() == namespace && !pod.part.finished) {
        let Some(binding) = &pod.part.binding else { continue };
        let Some(owner) = owner_by(&pod.part, clusters, binding) else { continue };
        let key = (owner.kind.clone(), owner.name.clone());
        if !all.contains_key(&key)
            && let Some(workload) = of_pod(&pod, owner)
        {
            all.insert(key.clone(), Tenant::new(workload));
        }
        if let Some(tenant) = all.get_mut(&key) {
            tenant.mounted.insert(binding.clone());
            if tenant.workload.uid.is_empty() {
                tenant.makers.extend(pod.part.controller.clone());
            }
        }
    }
    all.into_values().collect()
}

fn made<K: Maker>(store: &Store<Held<Template<K>>>, namespace: &str, add: &mut impl FnMut(Workload)) {
    // Larder's own sets are no one's workloads.
    let is_relay = |maker: &Held<Template<K>>| maker.part.labels.iter().any(|(name, _)| **name == *RELAY_LABEL);
    let made = store.state_filter(|maker| maker.namespace() == namespace && maker.cluster().is_none() && !is_relay(maker));
    for maker in made.into_iter().filter(|maker| !maker.is_deleting()) {
        add(Workload {
            namespace: namespace.to_owned(),
            api_version: K::api_version(&()).into_owned(),
            kind: K::kind(&()).into_owned(),
            name: maker.name().to_owned(),
            uid: maker.uid().to_owned(),
            labels: labels(&maker.part.labels),
        });
    }
}

/// Of those whose pod it may be, the one that its binding is named after; else the first.
fn owner_by<'a>(pod: &'a Sidecar, clusters: &BTreeSet<String>, binding: &BindingName) -> Option<&'a Owner> {
    let is_named = |owner: &&Owner| clusters.iter().any(|cluster| BindingName::of(&owner.kind, &owner.name, cluster) == *binding);
    pod.owners.iter().find(is_named).or_else(|| pod.owners.first())
}

/// A workload that is known by its pods alone. `None`: it is of a kind that is watched, and is not there, or not yet.
fn of_pod(pod: &Held<Sidecar>, owner: &Owner) -> Option<Workload> {
    let (api_version, uid) = match (owner.kind.as_str(), pod.part.controller.as_ref()) {
        ("Deployment" | "StatefulSet" | "DaemonSet" | "CronJob", _) => return None,
        // What the pods are named after does not own them itself, and nothing tells its uid.
        ("Rollout", _) => (ROLLOUT_VERSION.into(), "".into()),
        (kind, Some(Controller { api_version, kind: of, name, uid })) if **of == *kind && **name == *owner.name => {
            (api_version.clone(), uid.clone())
        }
        // Pods of a name that was generated share a binding, and none of them owns it.
        ("Pod", _) => ("v1".into(), "".into()),
        _ => return None,
    };
    Some(Workload {
        namespace: pod.namespace().to_owned(),
        api_version: api_version.into_string(),
        kind: owner.kind.clone(),
        name: owner.name.clone(),
        uid: uid.into_string(),
        labels: labels(&pod.part.labels),
    })
}

/// The Secrets that policies refer to. Each version of one is read once.
async fn secrets(
    context: &Context,
    watches: &Watches,
    namespace: &str,
    seen: &Seen,
    read: &mut HashMap<String, ReadSecret>,
) -> Result<KnownSecrets, kube::Error> {
    let policies = seen.readable();
    let leaving = seen.leaving.iter().filter_map(|policy| policy.0.as_ref().ok());
    let names: BTreeSet<&str> = policies.iter().copied().chain(leaving).flat_map(secrets_of).collect();
    let mut before = std::mem::take(read);
    let mut known = KnownSecrets::default();
    for name in names {
        let Some(held) = watches.secret_versions.get(&ObjectRef::new(name).within(namespace)) else { continue };
        let is_fresh = |read: &ReadSecret| held.part.0.is_some() && read.version == held.part.0;
        let secret = match before.remove(name).filter(is_fresh) {
            Some(read) => read,
            None => {
                let api = Api::<Secret>::namespaced(context.client.clone(), namespace);
                let Some(secret) = api.get_opt(name).await? else { continue };
                let entries = secret.data.unwrap_or_default().into_iter().map(|(entry, bytes)| (entry, bytes.0)).collect();
                ReadSecret { version: secret.metadata.resource_version.map(Into::into), entries }
            }
        };
        known.0.insert(name.to_owned(), secret.entries.clone());
        read.insert(name.to_owned(), secret);
    }
    Ok(known)
}

/// The newest snapshot of a binding whose ConfigMap is gone, from what keeps its past.
pub async fn restored(context: &Context, namespace: &str, bound: &Bound) -> Result<Option<Arc<str>>, kube::Error> {
    let newest = bound.past.iter().max_by_key(|map| map.part.generation);
    let Some(newest) = newest.filter(|_| bound.map.is_none()) else { return Ok(None) };
    let map = Api::<ConfigMap>::namespaced(context.client.clone(), namespace).get_opt(newest.name()).await?;
    Ok(map.and_then(|map| map.data?.remove(SNAPSHOT_FILE)).map(Into::into))
}

/// The Secret of a binding that the watch does not know of yet: a password must not be made twice.
pub async fn own_secret(
    context: &Context,
    namespace: &str,
    binding: &BindingName,
) -> Result<Option<Arc<Held<Keyring>>>, kube::Error> {
    let api = Api::<Secret>::namespaced(context.client.clone(), namespace);
    Ok(api.get_opt(&binding.object_name()).await?.map(|secret| Arc::new(Held::of(&secret))))
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn pod(binding: &BindingName, metadata: &Value) -> Held<Sidecar> {
        let mut metadata = metadata.clone();
        metadata["namespace"] = json!("store");
        metadata["uid"] = json!("pod-uid");
        metadata["labels"]["larder.dev/binding"] = json!(binding.as_str());
        metadata["labels"]["app"] = json!("shop");
        Held::of(&serde_json::from_value(json!({"metadata": metadata})).unwrap())
    }

    /// The workload of a pod whose binding has this owner's name.
    fn workload(kind: &str, name: &str, metadata: &Value) -> Option<(String, String, String, String)> {
        let binding = BindingName::of(kind, name, "main");
        let pod = pod(&binding, metadata);
        let clusters = BTreeSet::from(["main".to_owned(), "other".to_owned()]);
        let owner = owner_by(&pod.part, &clusters, &binding)?;
        assert_eq!((owner.kind.as_str(), owner.name.as_str()), (kind, name));
        let Workload { api_version, kind, name, uid, labels, .. } = of_pod(&pod, owner)?;
        assert_eq!(labels.get("app").map(String::as_str), Some("shop"));
        Some((api_version, kind, name, uid))
    }

    fn owned(version: &str, kind: &str, name: &str, labels: &Value) -> Value {
        let owner = json!({"apiVersion": version, "kind": kind, "name": name, "uid": "owner-uid", "controller": true});
        json!({"name": "pod", "labels": labels, "ownerReferences": [owner]})
    }

    #[track_caller]
    fn check(found: Option<(String, String, String, String)>, expected: Option<[&str; 4]>) {
        let expected = expected.map(|[version, kind, name, uid]| (version.into(), kind.into(), name.into(), uid.into()));
        assert_eq!(found, expected);
    }

    #[test]
    fn what_belongs_to_pods_that_nobody_owns_goes_with_the_last_of_them() {
        let maker = |kind: &str, name: &str, uid: &str| Controller {
            api_version: "v1".into(),
            kind: kind.into(),
            name: name.into(),
            uid: uid.into(),
        };
        let mut tenant = Tenant::new(Workload { uid: String::new(), ..Workload::shop() });
        assert_eq!(tenant.owners(), []);
        tenant.makers = (0..20).map(|number| maker("Pod", &format!("debug-{number:02}"), &number.to_string())).collect();
        let names: Vec<String> = tenant.owners().into_iter().map(|owner| owner.name).collect();
        assert_eq!((names.len(), names[0].as_str(), names[15].as_str()), (MAX_MAKERS, "debug-00", "debug-15"));
        // What tells its own uid is the one owner, whatever its pods are made by.
        tenant.workload = Workload::shop();
        assert_eq!(tenant.owners(), Vec::from_iter(Workload::shop().owner_reference()));
    }

    #[test]
    fn workloads_that_are_known_by_their_pods_alone() {
        let job = owned("batch/v1", "Job", "migrate-7", &json!({}));
        check(workload("Job", "migrate-7", &job), Some(["batch/v1", "Job", "migrate-7", "owner-uid"]));
        let set = owned("apps/v1", "ReplicaSet", "bare", &json!({}));
        check(workload("ReplicaSet", "bare", &set), Some(["apps/v1", "ReplicaSet", "bare", "owner-uid"]));
        // Those that are watched are there, or are not.
        let hashed = owned("apps/v1", "ReplicaSet", "shop-6f7c", &json!({"pod-template-hash": "6f7c"}));
        check(workload("Deployment", "shop", &hashed), None);
        check(workload("CronJob", "report", &owned("batch/v1", "Job", "report-28391040", &json!({}))), None);
        // Nothing tells the uid of these.
        let rollout = owned("apps/v1", "ReplicaSet", "shop-77", &json!({"rollouts-pod-template-hash": "77"}));
        check(workload("Rollout", "shop", &rollout), Some([ROLLOUT_VERSION, "Rollout", "shop", ""]));
        check(workload("Pod", "debug", &json!({"name": "debug"})), Some(["v1", "Pod", "debug", "pod-uid"]));
        let generated = json!({"name": "debug-x7k2p", "generateName": "debug-"});
        check(workload("Pod", "debug", &generated), Some(["v1", "Pod", "debug", ""]));
    }
}
