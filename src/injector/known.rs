//! What an admission needs to know of the cluster, kept at hand by watches: nothing is asked of the API server while an object waits.

use std::collections::{BTreeMap, BTreeSet};

use futures_util::{Stream, StreamExt as _};
use k8s_openapi::NamespaceResourceScope;
use k8s_openapi::api::core::v1::Service;
use kube::api::PartialObjectMeta;
use kube::core::DeserializeGuard;
use kube::runtime::WatchStreamExt as _;
use kube::runtime::reflector::{ObjectRef, Store, store};
use kube::runtime::watcher::{self, Event};
use kube::{Api, Client, Resource};
use serde_json::Value;
use tokio::task::JoinSet;
use tracing::{debug, warn};

use super::patch::{Occasion, Outcome, Settings, inject};
use crate::api::{CacheCluster, CachePolicy};
use crate::operator::api_error;

/// The Service that sets REDIS_PORT in the pods of its namespace.
const SERVICE_OF_LINKS: &str = "redis";
/// How many objects one answer of a list may hold.
const PAGE: u32 = 50;

/// A policy, or what is known of one that cannot be read.
type Policy = DeserializeGuard<CachePolicy>;
/// A CacheCluster likewise.
type Cluster = DeserializeGuard<CacheCluster>;

/// What is watched in one namespace, or in all.
struct Scope {
    namespace: Option<String>,
    policies: Store<Policy>,
    clusters: Store<Cluster>,
    services: Store<PartialObjectMeta<Service>>,
}

/// What is known of the watched namespaces.
pub struct Known {
    scopes: Vec<Scope>,
}

impl Known {
    /// Begins to watch these namespaces, or all where none is named. The tasks end with `tasks`.
    pub fn start(client: &Client, namespaces: &[String], tasks: &mut JoinSet<()>) -> Self {
        let scopes = match namespaces {
            [] => vec![Scope::start(client, None, tasks)],
            names => names.iter().map(|name| Scope::start(client, Some(name), tasks)).collect(),
        };
        Self { scopes }
    }

    /// Returns once everything is at hand.
    pub async fn ready(&self) {
        for Scope { namespace: _, policies, clusters, services } in &self.scopes {
            // A writer that is dropped ends with its process.
            let _ = policies.wait_until_ready().await;
            let _ = clusters.wait_until_ready().await;
            let _ = services.wait_until_ready().await;
        }
    }

    /// What is watched of a namespace.
    fn scope(&self, namespace: &str) -> Option<&Scope> {
        self.scopes.iter().find(|scope| scope.namespace.as_deref().is_none_or(|own| own == namespace))
    }

    /// The policies of a namespace, but for those on their way out, and those that cannot be read.
    pub fn policies(&self, namespace: &str) -> Vec<CachePolicy> {
        let of_namespace = |policy: &Policy| is_in_force(policy, namespace);
        let found = self.scope(namespace).map(|scope| scope.policies.state_filter(of_namespace)).unwrap_or_default();
        found.iter().filter_map(|policy| policy.0.as_ref().ok().cloned()).collect()
    }

    /// The policies of a namespace that name this CacheCluster, those on their way out among them: what they wrote may still be there.
    pub fn policies_about(&self, namespace: &str, cluster: &str) -> Vec<CachePolicy> {
        let is_about = |policy: &Policy| {
            policy.meta().namespace.as_deref() == Some(namespace)
                && policy.0.as_ref().is_ok_and(|policy| policy.spec.cache_cluster == cluster)
        };
        let found = self.scope(namespace).map(|scope| scope.policies.state_filter(is_about)).unwrap_or_default();
        found.iter().filter_map(|policy| policy.0.as_ref().ok().cloned()).collect()
    }

    /// A CacheCluster, without its status. `None`: there is none of that name, or it cannot be read.
    pub fn cluster(&self, namespace: &str, name: &str) -> Option<CacheCluster> {
        let found = self.scope(namespace)?.clusters.get(&ObjectRef::new(name).within(namespace))?;
        found.0.as_ref().ok().cloned()
    }

    /// Which pods policies select: in each namespace, the labels of each.
    pub fn selectors(&self) -> BTreeSet<(String, BTreeMap<String, String>)> {
        let policies = self.scopes.iter().flat_map(|scope| scope.policies.state());
        let selectors = policies.filter_map(|policy| {
            let policy = policy.0.as_ref().ok().filter(|policy| policy.metadata.deletion_timestamp.is_none())?;
            Some((policy.metadata.namespace.clone()?, policy.spec.workloads.match_labels.clone()))
        });
        // No label at all stands for no pod, and would ask for every one.
        selectors.filter(|(_, labels)| !labels.is_empty()).collect()
    }

    /// What becomes of a pod in a namespace.
    pub fn admit(&self, namespace: &str, pod: &Value, settings: &Settings) -> Outcome {
        let Some(scope) = self.scope(namespace) else {
            return Outcome::Unchanged { why: "its namespace is not watched", warnings: Vec::new() };
        };
        let selecting = scope.policies.state_filter(|policy| selects(policy, namespace, pod));
        let policies: Vec<&CachePolicy> = selecting.iter().filter_map(|policy| policy.0.as_ref().ok()).collect();
        let has_cluster = |name: &str| scope.clusters.get(&ObjectRef::new(name).within(namespace)).is_some();
        let has_redis_service = scope.services.get(&ObjectRef::new(SERVICE_OF_LINKS).within(namespace)).is_some();
        inject(&Occasion { pod, policies: &policies, has_cluster: &has_cluster, has_redis_service }, settings)
    }
}

/// Whether a policy is about the pods of this namespace with such labels. One that is on its way out is about none.
fn selects(policy: &Policy, namespace: &str, pod: &Value) -> bool {
    let labels = &pod["metadata"]["labels"];
    is_in_force(policy, namespace)
        && policy.0.as_ref().is_ok_and(|policy| policy.spec.workloads.include(|name| labels[name].as_str()))
}

/// Whether it can be read, is one of this namespace, and stays.
fn is_in_force(policy: &Policy, namespace: &str) -> bool {
    let Ok(policy) = &policy.0 else { return false };
    policy.metadata.namespace.as_deref() == Some(namespace) && policy.metadata.deletion_timestamp.is_none()
}

impl Scope {
    fn start(client: &Client, namespace: Option<&str>, tasks: &mut JoinSet<()>) -> Self {
        let config = || watcher::Config::default().page_size(PAGE);
        let (policies, writer) = store();
        let events = watcher::watcher(api::<Policy>(client, namespace), config()).default_backoff().modify(strip);
        follow("CachePolicies", events.reflect(writer), tasks);
        let (clusters, writer) = store();
        let events =
            watcher::watcher(api::<Cluster>(client, namespace), config()).default_backoff().modify(|cluster: &mut Cluster| {
                strip(cluster);
                if let Ok(cluster) = &mut cluster.0 {
                    cluster.status = None;
                }
            });
        follow("CacheClusters", events.reflect(writer), tasks);
        let (services, writer) = store();
        let named = config().fields(&format!("metadata.name={SERVICE_OF_LINKS}"));
        let events = watcher::watcher(api::<PartialObjectMeta<Service>>(client, namespace), named).default_backoff();
        follow("Services", events.modify(strip).reflect(writer), tasks);
        Self { namespace: namespace.map(str::to_owned), policies, clusters, services }
    }
}

fn api<K>(client: &Client, namespace: Option<&str>) -> Api<K>
where
    K: Resource<Scope = NamespaceResourceScope, DynamicType = ()>,
{
    match namespace {
        Some(namespace) => Api::namespaced(client.clone(), namespace),
        None => Api::all(client.clone()),
    }
}

/// Forgets what no admission asks.
fn strip<K: Resource>(object: &mut K) {
    let metadata = object.meta_mut();
    metadata.managed_fields = None;
    metadata.annotations = None;
}

fn follow<K: Send + 'static>(
    kind: &'static str,
    events: impl Stream<Item = watcher::Result<Event<K>>> + Send + 'static,
    tasks: &mut JoinSet<()>,
) {
    tasks.spawn(async move {
        let mut events = std::pin::pin!(events);
        while let Some(event) = events.next().await {
            let Err(error) = event else { continue };
            match api_error::of_watch(&error) {
                Some((error, remedy)) => warn!(kind, error, "a watch of the injector failed and begins again: {remedy}"),
                None => debug!(kind, %error, "a watch of the injector begins again"),
            }
        }
    });
}

#[cfg(test)]
pub mod tests {
    use kube::runtime::reflector::store::Writer;
    use serde_json::json;

    use super::*;

    /// A namespace `shop` with these policies, and a CacheCluster `main` that keeps its data in memory.
    pub fn known(policies: Vec<Value>) -> Known {
        known_with(policies, &cluster()).0
    }

    /// The CacheCluster `main`.
    pub fn cluster() -> Value {
        json!({
            "apiVersion": "larder.dev/v1alpha1", "kind": "CacheCluster", "metadata": {"name": "main", "namespace": "shop"},
            "spec": {"engine": {"kind": "Valkey", "version": "8.1"}, "mode": "Sentinel", "memory": "256Mi"},
        })
    }

    /// A namespace `shop` with these policies and this CacheCluster, and what it hears of CacheClusters by.
    pub fn known_with(policies: Vec<Value>, cluster: &Value) -> (Known, Writer<Cluster>) {
        let (reader, mut writer) = store();
        writer.apply_watcher_event(&Event::Init);
        for policy in policies {
            writer.apply_watcher_event(&Event::InitApply(serde_json::from_value::<Policy>(policy).unwrap()));
        }
        writer.apply_watcher_event(&Event::InitDone);
        let (clusters, mut writer) = store::<Cluster>();
        writer.apply_watcher_event(&Event::Apply(serde_json::from_value(cluster.clone()).unwrap()));
        let (services, _) = store();
        (Known { scopes: vec![Scope { namespace: Some("shop".to_owned()), policies: reader, clusters, services }] }, writer)
    }

    pub fn policy(labels: &Value) -> Value {
        json!({
            "apiVersion": "larder.dev/v1alpha1", "kind": "CachePolicy", "metadata": {"name": "a", "namespace": "shop"},
            "spec": {
                "cacheCluster": "main", "workloads": {"matchLabels": labels},
                "rules": [{"name": "user", "keys": "user:{id}", "strategy": "CacheAside"}],
            },
        })
    }

    #[test]
    fn policies_select_by_every_label_and_a_bad_one_hurts_no_other() {
        let bad = json!({"apiVersion": "larder.dev/v1alpha1", "kind": "CachePolicy", "metadata": {"name": "bad", "namespace": "shop"}, "spec": 7});
        let known = known(vec![bad, policy(&json!({"app": "shop", "tier": "web"}))]);
        let admitted = |namespace: &str, labels: &Value| {
            let pod = json!({"metadata": {"name": "p", "labels": labels}, "spec": {"containers": [{"name": "app"}]}});
            known.admit(namespace, &pod, &super::super::tests::settings())
        };
        let matching = json!({"app": "shop", "tier": "web", "x": "y"});
        assert!(matches!(admitted("shop", &matching), Outcome::Patched { warnings, .. } if warnings.is_empty()));
        assert!(matches!(admitted("shop", &json!({"app": "shop"})), Outcome::Unchanged { why: "no policy selects it", .. }));
        assert!(matches!(admitted("other", &matching), Outcome::Unchanged { why: "its namespace is not watched", .. }));
    }
}
