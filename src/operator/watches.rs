//! What the API server holds, kept at hand: one watch for each kind and namespace, and a word to the queue about each change.
//!
//! Objects are kept without what nobody reads here, see [`super::held`].

use std::sync::Arc;

use futures_util::{StreamExt as _, TryStreamExt as _};
use k8s_openapi::NamespaceResourceScope;
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
use super::held::{Held, Part};
use super::queue::{Key, Queue};
use crate::api::CacheCluster;

/// The label that names the CacheCluster that an object belongs to.
pub const CLUSTER_LABEL: &str = "larder.dev/cluster";
/// The annotation of what was last applied. Every other annotation of an object may be set by anybody.
const OWN_PREFIX: &str = "larder.dev/";
/// How many objects one answer of a list may hold: while it is read all of them are in memory as a whole.
const PAGE: u32 = 50;

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
}

/// Starts watches.
struct Starter<'a> {
    client: &'a Client,
    namespace: Option<&'a str>,
    queue: &'a Queue,
    clusters: Store<Cluster>,
    /// Had by whoever lists for the first time: a page in the making is many times as large as what is kept of it.
    turn: Arc<Semaphore>,
    tasks: &'a mut JoinSet<()>,
}

impl Watches {
    /// Begins to watch. The tasks end when `tasks` is dropped or aborted. `turn` is shared by all that start at the same time.
    pub fn start(
        client: &Client,
        namespace: Option<&str>,
        queue: &Queue,
        turn: &Arc<Semaphore>,
        tasks: &mut JoinSet<()>,
    ) -> Self {
        let (clusters, writer) = store::<Cluster>();
        let mut starter = Starter { client, namespace, queue, clusters: clusters.clone(), turn: turn.clone(), tasks };
        starter.clusters(writer);
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
            budgets "PodDisruptionBudgets", network_policies "NetworkPolicies", endpoint_slices "EndpointSlices"
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
        let queue = self.queue.clone();
        let events = watcher::watcher(self.api::<Cluster>(), watching()).default_backoff();
        let events = events.modify(|cluster| strip(cluster.meta_mut())).reflect(writer);
        let clusters = self.clusters.clone();
        self.follow("CacheClusters", events, move |cluster: Option<&Cluster>| match cluster {
            Some(cluster) => key_of(cluster).into_iter().for_each(|key| queue.add_changed(key, cluster.meta().generation)),
            None => keys_of(&clusters).into_iter().for_each(|key| queue.add(key)),
        });
    }

    /// Objects that belong to CacheClusters: each change concerns the one that a label names.
    fn children<P: Part>(&mut self) -> Store<Held<P>> {
        let (reader, writer) = store::<Held<P>>();
        let (queue, clusters) = (self.queue.clone(), self.clusters.clone());
        let events = watcher::watcher(self.api::<P::Of>(), watching().labels(CLUSTER_LABEL)).default_backoff();
        let events = reflector(writer, events.map_ok(Held::of_event));
        self.follow(&P::Of::plural(&()), events, move |child: Option<&Held<P>>| match child {
            Some(child) => owner_of(child).into_iter().for_each(|key| queue.add(key)),
            // What vanished while nobody watched is noticed by all who may miss it.
            None => keys_of(&clusters).into_iter().for_each(|key| queue.add(key)),
        });
        reader
    }

    /// All Secrets by name and version: a change concerns the CacheClusters that refer to it.
    fn secret_versions(&mut self) -> Store<Held<Version>> {
        let (reader, writer) = store();
        let (queue, clusters) = (self.queue.clone(), self.clusters.clone());
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
