//! What the API server holds, kept at hand: one watch for each kind and namespace, and a word to the queue about each change.
//!
//! Objects are kept without what nobody reads here, see [`super::held`].

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use futures_util::{StreamExt as _, TryStreamExt as _};
use k8s_openapi::NamespaceResourceScope;
use k8s_openapi::api::apps::v1::{DaemonSet, Deployment, StatefulSet as KubeSet};
use k8s_openapi::api::batch::v1::CronJob;
use k8s_openapi::api::core::v1::{Node, NodeSpec, NodeStatus, ServiceAccount};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use k8s_openapi::api::networking::v1::NetworkPolicy;
use k8s_openapi::api::policy::v1::PodDisruptionBudget;
use kube::core::DeserializeGuard;
use kube::runtime::WatchStreamExt as _;
use kube::runtime::reflector::store::Writer;
use kube::runtime::reflector::{ObjectRef, Store, reflector, store};
use kube::runtime::watcher::{self, Event};
use kube::{Api, Client, Resource};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tracing::{debug, warn};

use super::api_error;
use super::cache_cluster::parts::{Bare, Claim, ConfigMap, Pod, Secret, Service, StatefulSet, Version};
use super::cache_policy::objects::BINDING_LABEL;
use super::cache_policy::parts::{Keyring, Maker, Map, Sidecar, Template};
use super::held::{Held, Part};
use super::queue::{Key, Queue};
use crate::api::{CacheCluster, CachePolicy};

/// The label that names the CacheCluster that an object belongs to.
pub const CLUSTER_LABEL: &str = "larder.dev/cluster";
/// The annotation of what was last applied. Every other annotation of an object may be set by anybody.
const OWN_PREFIX: &str = "larder.dev/";
/// How many objects one answer of a list may hold: while it is read all of them are in memory as a whole.
const PAGE: u32 = 50;
/// How long changes are gathered that no pod waits for.
const UNHURRIED: Duration = Duration::from_millis(500);

/// A CachePolicy, or what is known of one that cannot be read.
pub type Policy = DeserializeGuard<CachePolicy>;
/// A CacheCluster, or what is known of one that cannot be read.
pub type Cluster = DeserializeGuard<CacheCluster>;

/// Everything that is watched in one namespace, or in all.
#[derive(Debug)]
pub struct Watches {
    /// `None`: all namespaces.
    namespace: Option<String>,
    /// The CacheClusters.
    pub clusters: Store<Cluster>,
    /// What belongs to CacheClusters, by kind.
    pub stateful_sets: Store<Held<StatefulSet>>,
    /// See [`Watches::stateful_sets`].
    pub pods: Store<Held<Pod>>,
    /// See [`Watches::stateful_sets`].
    pub services: Store<Held<Service>>,
    /// See [`Watches::stateful_sets`].
    pub config_maps: Store<Held<ConfigMap>>,
    /// See [`Watches::stateful_sets`].
    pub secrets: Store<Held<Secret>>,
    /// See [`Watches::stateful_sets`].
    pub claims: Store<Held<Claim>>,
    /// See [`Watches::stateful_sets`].
    pub accounts: Store<Held<Bare<ServiceAccount>>>,
    /// See [`Watches::stateful_sets`].
    pub budgets: Store<Held<Bare<PodDisruptionBudget>>>,
    /// See [`Watches::stateful_sets`].
    pub network_policies: Store<Held<Bare<NetworkPolicy>>>,
    /// See [`Watches::stateful_sets`].
    pub endpoint_slices: Store<Held<Bare<EndpointSlice>>>,
    /// Names and versions of all Secrets: those that CacheClusters refer to are among them.
    pub secret_versions: Store<Held<Version>>,
    /// The CachePolicies.
    pub policies: Store<Policy>,
    /// What makes pods, by kind: the workloads that policies may select.
    pub deployments: Store<Held<Template<Deployment>>>,
    /// See [`Watches::deployments`].
    pub all_stateful_sets: Store<Held<Template<KubeSet>>>,
    /// See [`Watches::deployments`].
    pub daemon_sets: Store<Held<Template<DaemonSet>>>,
    /// See [`Watches::deployments`].
    pub cron_jobs: Store<Held<Template<CronJob>>>,
    /// Pods with a sidecar.
    pub sidecars: Store<Held<Sidecar>>,
    /// The ConfigMaps of bindings.
    pub binding_maps: Store<Held<Map>>,
    /// The Secrets of bindings.
    pub binding_secrets: Store<Held<Keyring>>,
}

/// What is to be looked at: CacheClusters, and namespaces for their policies.
#[derive(Debug, Clone, Default)]
pub struct Queues {
    /// CacheClusters.
    pub clusters: Queue,
    /// Namespaces: see [`namespace_key`].
    pub policies: Queue,
}

/// A namespace, as the queue of policies names it.
pub fn namespace_key(namespace: &str) -> Key {
    Key { namespace: namespace.to_owned(), name: String::new() }
}

/// Starts watches.
struct Starter<'a> {
    client: &'a Client,
    namespace: Option<&'a str>,
    queues: &'a Queues,
    clusters: Store<Cluster>,
    policies: Store<Policy>,
    /// Had by whoever lists for the first time: a page in the making is many times as large as what is kept of it.
    turn: Arc<Semaphore>,
    tasks: &'a mut JoinSet<()>,
}

impl Watches {
    /// Begins to watch. The tasks end when `tasks` is dropped or aborted. `turn` is shared by all that start at the same time.
    pub fn start(
        client: &Client,
        namespace: Option<&str>,
        queues: &Queues,
        turn: &Arc<Semaphore>,
        tasks: &mut JoinSet<()>,
    ) -> Self {
        let (clusters, writer) = store::<Cluster>();
        let (policies, policies_writer) = store::<Policy>();
        let (kept_clusters, kept_policies) = (clusters.clone(), policies.clone());
        let mut starter =
            Starter { client, namespace, queues, clusters: kept_clusters, policies: kept_policies, turn: turn.clone(), tasks };
        starter.clusters(writer);
        let binding_maps = starter.bound();
        starter.policies(policies_writer, binding_maps.clone());
        Self {
            namespace: namespace.map(str::to_owned),
            stateful_sets: starter.children(),
            pods: starter.children(),
            services: starter.children(),
            config_maps: starter.children(),
            secrets: starter.children(),
            claims: starter.children(),
            accounts: starter.children(),
            budgets: starter.children(),
            network_policies: starter.children(),
            endpoint_slices: starter.children(),
            secret_versions: starter.secret_versions(),
            deployments: starter.makers(),
            all_stateful_sets: starter.makers(),
            daemon_sets: starter.makers(),
            cron_jobs: starter.makers(),
            sidecars: starter.sidecars(binding_maps.clone()),
            binding_secrets: starter.bound(),
            binding_maps,
            policies,
            clusters,
        }
    }

    /// Whether an object of this namespace is watched here.
    pub fn covers(&self, namespace: &str) -> bool {
        self.namespace.as_deref().is_none_or(|own| own == namespace)
    }

    /// The CacheCluster of that name.
    pub fn cluster(&self, key: &Key) -> Option<Arc<Cluster>> {
        self.clusters.get(&ObjectRef::new(&key.name).within(&key.namespace))
    }

    /// Every CacheCluster.
    pub fn keys(&self) -> Vec<Key> {
        keys_of(&self.clusters)
    }

    /// Every namespace with policies, or with what they left behind.
    pub fn namespaces(&self) -> BTreeSet<String> {
        let bound = self.binding_maps.state().into_iter().map(|map| map.namespace().to_owned());
        let secrets = self.binding_secrets.state().into_iter().map(|secret| secret.namespace().to_owned());
        namespaces_of(&self.policies).into_iter().chain(bound).chain(secrets).collect()
    }

    /// Returns once everything is at hand. `tell` hears what is waited for.
    pub async fn ready(&self, mut tell: impl FnMut(String)) {
        let place = self.namespace.as_deref().map_or_else(|| "all namespaces".to_owned(), |name| format!("namespace {name}"));
        let Self {
            namespace: _,
            clusters,
            stateful_sets,
            pods,
            services,
            config_maps,
            secrets,
            claims,
            accounts,
            budgets,
            network_policies,
            endpoint_slices,
            secret_versions,
            policies,
            deployments,
            all_stateful_sets,
            daemon_sets,
            cron_jobs,
            sidecars,
            binding_maps,
            binding_secrets,
        } = self;
        macro_rules! await_all {
            ($($store:ident $what:literal),*) => {$(
                tell(format!("the {} of {place}", $what));
                // A writer that is dropped ends with its process.
                let _ = $store.wait_until_ready().await;
            )*};
        }
        await_all!(
            clusters "CacheClusters", stateful_sets "StatefulSets", pods "Pods", services "Services", config_maps "ConfigMaps",
            secrets "Secrets", secret_versions "Secrets", claims "PersistentVolumeClaims", accounts "ServiceAccounts",
            budgets "PodDisruptionBudgets", network_policies "NetworkPolicies", endpoint_slices "EndpointSlices",
            policies "CachePolicies", deployments "Deployments", all_stateful_sets "StatefulSets", daemon_sets "DaemonSets",
            cron_jobs "CronJobs", sidecars "Pods", binding_maps "ConfigMaps", binding_secrets "Secrets"
        );
    }
}

impl Starter<'_> {
    fn api<K>(&self) -> Api<K>
    where
        K: Resource<Scope = NamespaceResourceScope, DynamicType = ()>,
    {
        match self.namespace {
            Some(namespace) => Api::namespaced(self.client.clone(), namespace),
            None => Api::all(self.client.clone()),
        }
    }

    /// CacheClusters: each change concerns the object itself.
    fn clusters(&mut self, writer: Writer<Cluster>) {
        let Queues { clusters: queue, policies } = self.queues.clone();
        let events = watcher::watcher(self.api::<Cluster>(), watching()).default_backoff();
        let events = events.modify(|cluster| strip(cluster.meta_mut())).reflect(writer);
        let clusters = self.clusters.clone();
        self.follow("CacheClusters", events, move |cluster: Option<&Cluster>| match cluster {
            Some(cluster) => key_of(cluster).into_iter().for_each(|key| {
                // Its policies miss it where it is gone.
                policies.add_after(namespace_key(&key.namespace), UNHURRIED);
                queue.add_changed(key, cluster.meta().generation);
            }),
            None => keys_of(&clusters).into_iter().for_each(|key| queue.add(key)),
        });
    }

    /// Objects that belong to CacheClusters: each change concerns the one that a label names.
    fn children<P: Part>(&mut self) -> Store<Held<P>> {
        let (reader, writer) = store::<Held<P>>();
        let (queue, clusters) = (self.queues.clusters.clone(), self.clusters.clone());
        let events = watcher::watcher(self.api::<P::Of>(), watching().labels(CLUSTER_LABEL)).default_backoff();
        let events = reflector(writer, events.map_ok(Held::of_event));
        self.follow(&P::Of::plural(&()), events, move |child: Option<&Held<P>>| match child {
            Some(child) => owner_of(child).into_iter().for_each(|key| queue.add(key)),
            // What vanished while nobody watched is noticed by all who may miss it.
            None => keys_of(&clusters).into_iter().for_each(|key| queue.add(key)),
        });
        reader
    }

    /// CachePolicies: each change concerns all of its namespace, since a workload may follow several.
    fn policies(&mut self, writer: Writer<Policy>, bound: Store<Held<Map>>) {
        let queue = self.queues.policies.clone();
        let events = watcher::watcher(self.api::<Policy>(), watching()).default_backoff();
        let events = events.modify(|policy| strip(policy.meta_mut())).reflect(writer);
        let policies = self.policies.clone();
        self.follow("CachePolicies", events, move |policy: Option<&Policy>| match policy {
            Some(policy) => policy.meta().namespace.iter().for_each(|namespace| queue.add(namespace_key(namespace))),
            None => {
                let bound = bound.state().into_iter().map(|map| map.namespace().to_owned());
                let namespaces: BTreeSet<String> = namespaces_of(&policies).into_iter().chain(bound).collect();
                namespaces.iter().for_each(|namespace| queue.add(namespace_key(namespace)));
            }
        });
    }

    /// Objects of bindings: each change is either Larder's own, or is to be undone.
    fn bound<P: Part>(&mut self) -> Store<Held<P>> {
        self.of_policies(Some(BINDING_LABEL), |_, _| UNHURRIED)
    }

    /// What makes pods. Those are seen themselves; whoever has none yet is in no hurry.
    fn makers<K: Maker>(&mut self) -> Store<Held<Template<K>>> {
        self.of_policies(None, |_, _| UNHURRIED)
    }

    /// Pods with a sidecar. One whose binding has nothing yet waits for it.
    fn sidecars(&mut self, bound: Store<Held<Map>>) -> Store<Held<Sidecar>> {
        self.of_policies(Some(BINDING_LABEL), move |namespace: &str, pod: &Held<Sidecar>| {
            let map = pod.part.binding.as_ref().map(|binding| ObjectRef::new(&binding.object_name()).within(namespace));
            let has_map = map.is_some_and(|map| bound.get(&map).is_some());
            if has_map { UNHURRIED } else { Duration::from_millis(20) }
        })
    }

    /// Objects that a look at a namespace's policies asks about: each change concerns the namespace, where it has policies, or where it is
    /// about something of theirs; `delay` says how soon.
    fn of_policies<P: Part>(
        &mut self,
        label: Option<&str>,
        delay: impl Fn(&str, &Held<P>) -> Duration + Send + 'static,
    ) -> Store<Held<P>> {
        let (reader, writer) = store::<Held<P>>();
        let (queue, policies, is_theirs) = (self.queues.policies.clone(), self.policies.clone(), label.is_some());
        let config = label.map_or_else(watching, |label| watching().labels(label));
        let events = watcher::watcher(self.api::<P::Of>(), config).default_backoff();
        let events = reflector(writer, events.map_ok(Held::of_event));
        self.follow(&P::Of::plural(&()), events, move |object: Option<&Held<P>>| match object {
            Some(object) => {
                let namespace = object.namespace();
                if is_theirs || has_policies(&policies, namespace) {
                    queue.add_after(namespace_key(namespace), delay(namespace, object));
                }
            }
            None => namespaces_of(&policies).iter().for_each(|namespace| queue.add(namespace_key(namespace))),
        });
        reader
    }

    /// All Secrets by name and version: a change concerns the CacheClusters and the policies that refer to it.
    fn secret_versions(&mut self) -> Store<Held<Version>> {
        let (reader, writer) = store();
        let (Queues { clusters: queue, policies: of_policies }, clusters) = (self.queues.clone(), self.clusters.clone());
        let policies = self.policies.clone();
        let events = watcher::watcher(self.api::<<Version as Part>::Of>(), watching()).default_backoff();
        let events = reflector(writer, events.map_ok(Held::of_event));
        self.follow("Secrets", events, move |secret: Option<&Held<Version>>| {
            let Some(secret) = secret else { return };
            let concerned = clusters.state_filter(|cluster| {
                let Ok(cluster) = &cluster.0 else { return false };
                cluster.metadata.namespace.as_deref() == Some(secret.namespace())
                    && referenced_secret(cluster) == Some(secret.name())
            });
            concerned.iter().filter_map(|cluster| key_of(&**cluster)).for_each(|key| queue.add(key));
            let refers = |policy: &Policy| {
                let Ok(policy) = &policy.0 else { return false };
                policy.metadata.namespace.as_deref() == Some(secret.namespace())
                    && secrets_of(policy).any(|name| name == secret.name())
            };
            if policies.find(refers).is_some() {
                of_policies.add(namespace_key(secret.namespace()));
            }
        });
        reader
    }

    /// Tells `changed` of each object that changes, and of `None` when all have been listed anew.
    fn follow<K: Send + 'static>(
        &mut self,
        kind: &str,
        events: impl futures_util::Stream<Item = watcher::Result<Event<K>>> + Send + 'static,
        changed: impl Fn(Option<&K>) + Send + 'static,
    ) {
        let place = self.namespace.unwrap_or("all namespaces").to_owned();
        let (kind, turn) = (kind.to_owned(), self.turn.clone());
        self.tasks.spawn(async move {
            let mut events = std::pin::pin!(events);
            let mut own_turn = turn.acquire_owned().await.ok();
            while let Some(event) = events.next().await {
                // Others do not wait for one that cannot be listed.
                if matches!(event, Ok(Event::InitDone) | Err(_)) {
                    drop(own_turn.take());
                }
                match event {
                    Ok(Event::Apply(object) | Event::Delete(object)) => changed(Some(&object)),
                    // Until the list is complete the store still holds what it held before.
                    Ok(Event::Init | Event::InitApply(_)) => {}
                    Ok(Event::InitDone) => changed(None),
                    Err(error) => match api_error::of_watch(&error) {
                        Some((error, remedy)) => warn!(kind, place, error, "a watch failed and begins again: {remedy}"),
                        None => debug!(kind, place, %error, "a watch begins again"),
                    },
                }
            }
        });
    }
}

/// The nodes, without what nobody reads. Where they may not be seen, the store never becomes ready, and is empty.
pub fn nodes(client: &Client, tasks: &mut JoinSet<()>) -> Store<Node> {
    let (reader, writer) = store::<Node>();
    let slim = |node: &mut Node| {
        strip(&mut node.metadata);
        node.metadata.labels = None;
        node.spec = node.spec.take().map(|NodeSpec { unschedulable, taints, .. }| NodeSpec {
            unschedulable,
            taints,
            ..NodeSpec::default()
        });
        node.status = node.status.take().map(|status| NodeStatus {
            conditions: status.conditions.map(|all| all.into_iter().filter(|condition| condition.type_ == "Ready").collect()),
            ..NodeStatus::default()
        });
    };
    let events = watcher::watcher(Api::<Node>::all(client.clone()), watching());
    let events = events.default_backoff().modify(slim).reflect(writer);
    tasks.spawn(async move {
        let mut events = std::pin::pin!(events);
        while let Some(event) = events.next().await {
            if let Err(error) = event
                && let Some((error, remedy)) = api_error::of_watch(&error)
            {
                warn!(error, "nodes are not watched, and faults of a whole node are told less precisely: {remedy}");
            }
        }
    });
    reader
}

/// The Secret of the same namespace that a CacheCluster's password is in.
pub fn referenced_secret(cluster: &CacheCluster) -> Option<&str> {
    Some(&cluster.spec.auth.as_ref()?.password.secret_key_ref.as_ref()?.name)
}

/// The Secrets of the same namespace that a policy's URLs are in.
pub fn secrets_of(policy: &CachePolicy) -> impl Iterator<Item = &str> {
    let access = policy.spec.origins.iter().flat_map(|origin| origin.sql.iter().chain(&origin.http));
    access.filter_map(|access| Some(access.url.secret_key_ref.as_ref()?.name.as_str()))
}

fn has_policies(policies: &Store<Policy>, namespace: &str) -> bool {
    policies.find(|policy| policy.meta().namespace.as_deref() == Some(namespace)).is_some()
}

fn namespaces_of(policies: &Store<Policy>) -> BTreeSet<String> {
    policies.state().iter().filter_map(|policy| policy.meta().namespace.clone()).collect()
}

fn keys_of(clusters: &Store<Cluster>) -> Vec<Key> {
    clusters.state().iter().filter_map(|cluster| key_of(&**cluster)).collect()
}

fn key_of<K: Resource>(object: &K) -> Option<Key> {
    let metadata = object.meta();
    Some(Key { namespace: metadata.namespace.clone()?, name: metadata.name.clone()? })
}

fn owner_of<P>(child: &Held<P>) -> Option<Key> {
    Some(Key { namespace: child.namespace().to_owned(), name: child.cluster()?.to_owned() })
}

fn watching() -> watcher::Config {
    watcher::Config::default().page_size(PAGE)
}

/// Forgets who wrote which field, and foreign annotations, which can be large.
fn strip(metadata: &mut kube::core::ObjectMeta) {
    metadata.managed_fields = None;
    metadata.self_link = None;
    if let Some(annotations) = &mut metadata.annotations {
        annotations.retain(|name, _| name.starts_with(OWN_PREFIX));
    }
}
