//! What most tests begin with: an API server with the chart on it, three nodes, and the stage behind it.

use std::fmt::Debug;
use std::time::{Duration, Instant};

use k8s_openapi::api::core::v1::{Namespace, Node};
use kube::api::{ApiResource, DynamicObject, ObjectMeta, Patch, PatchParams, PostParams};
use kube::core::GroupVersionKind;
use kube::{Api, Client};
use larder::api::CacheCluster;
use larder::api::cache_cluster::CacheClusterStatus;
use reqwest::Method;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use super::chart;
use super::control_plane::{ControlPlane, SYSTEM, User};
use super::operator::Operator;
use super::stage::{NODES, Stage};

/// How often a state is looked at that is waited for.
const LOOK_AGAIN: Duration = Duration::from_millis(100);
/// The kinds that a CacheCluster is made of, as paths of the API server, and pods.
pub const KINDS: [&str; 10] = [
    "api/v1/services",
    "api/v1/configmaps",
    "api/v1/secrets",
    "api/v1/serviceaccounts",
    "api/v1/pods",
    "api/v1/persistentvolumeclaims",
    "apis/apps/v1/statefulsets",
    "apis/policy/v1/poddisruptionbudgets",
    "apis/networking.k8s.io/v1/networkpolicies",
    "apis/discovery.k8s.io/v1/endpointslices",
];

/// An API server, and what plays behind it.
pub struct Scene {
    pub plane: ControlPlane,
    pub client: Client,
    pub stage: Stage,
    namespaces: Vec<&'static str>,
}

impl Scene {
    /// Makes one whose operators keep the CacheClusters of some namespaces.
    pub async fn start(namespaces: &[&'static str]) -> Self {
        let plane = ControlPlane::start().await;
        let client = plane.client(User::Admin).await;
        for name in namespaces.iter().chain([&SYSTEM]) {
            // Every pod here holds to the restricted profile.
            let labels = [("pod-security.kubernetes.io/enforce".to_owned(), "restricted".to_owned())].into();
            let metadata = ObjectMeta { name: Some((*name).to_owned()), labels: Some(labels), ..ObjectMeta::default() };
            let namespace = Namespace { metadata, ..Namespace::default() };
            Api::all(client.clone()).create(&PostParams::default(), &namespace).await.expect("a namespace");
        }
        for name in NODES {
            make_node(&client, name).await;
        }
        let stage = Stage::start(plane.kubeconfig(User::Admin));
        let scene = Self { plane, client, stage, namespaces: namespaces.to_vec() };
        for object in chart::render(namespaces) {
            scene.apply(&object).await.unwrap_or_else(|error| panic!("the API server refuses the chart's {object}: {error}"));
        }
        for plural in ["cacheclusters", "cachepolicies"] {
            let path = format!("/apis/larder.dev/v1alpha1/{plural}");
            eventually(plural, Duration::from_secs(30), async || {
                let (status, text) = scene.plane.request(Method::GET, &path, &[], None).await;
                if status == 200 { Ok(()) } else { Err(text) }
            })
            .await;
        }
        scene
    }

    /// Starts an operator.
    pub fn operator(&self) -> Operator {
        Operator::start(&self.plane, &self.namespaces)
    }

    /// Applies a manifest.
    pub async fn apply(&self, manifest: &Value) -> Result<DynamicObject, kube::Error> {
        let field = |pointer: &str| manifest.pointer(pointer).and_then(Value::as_str).unwrap_or_default();
        let (group, version) = field("/apiVersion").split_once('/').unwrap_or(("", field("/apiVersion")));
        let resource = ApiResource::from_gvk(&GroupVersionKind::gvk(group, version, field("/kind")));
        let api: Api<DynamicObject> = match field("/metadata/namespace") {
            "" => Api::all_with(self.client.clone(), &resource),
            namespace => Api::namespaced_with(self.client.clone(), namespace, &resource),
        };
        api.patch(field("/metadata/name"), &PatchParams::apply("test").force(), &Patch::Apply(manifest)).await
    }

    /// Applies manifests of our kind `plural` that the chart's definition would refuse, as one before it, which was laxer, let them pass.
    pub async fn apply_outdated(&self, plural: &str, manifests: &[Value]) {
        let path = format!("/apis/apiextensions.k8s.io/v1/customresourcedefinitions/{plural}.larder.dev");
        let lax = json!([{
            "op": "replace",
            "path": "/spec/versions/0/schema/openAPIV3Schema/properties/spec",
            "value": {"type": "object", "x-kubernetes-preserve-unknown-fields": true},
        }]);
        let json_patch = [("content-type", "application/json-patch+json")];
        let (status, text) = self.plane.request(Method::PATCH, &path, &json_patch, Some(&lax)).await;
        assert_eq!(status, 200, "{text}");
        for manifest in manifests {
            eventually("the lax definition is in force", Duration::from_secs(30), async || {
                self.apply(manifest).await.map(drop).map_err(|error| error.to_string())
            })
            .await;
        }
        for object in chart::render(&self.namespaces).iter().filter(|object| object["kind"] == "CustomResourceDefinition") {
            self.apply(object).await.expect("a definition");
        }
    }

    /// Every object of a kind in a namespace; see [`KINDS`].
    pub async fn list(&self, kind: &str, namespace: &str) -> Vec<Value> {
        let (version, plural) = kind.rsplit_once('/').expect("a path");
        let list = self.plane.get(&format!("/{version}/namespaces/{namespace}/{plural}")).await;
        list["items"].as_array().cloned().unwrap_or_default()
    }

    pub fn api<K>(&self, namespace: &str) -> Api<K>
    where
        K: kube::Resource<Scope = k8s_openapi::NamespaceResourceScope, DynamicType = ()> + DeserializeOwned + Clone + Debug,
    {
        Api::namespaced(self.client.clone(), namespace)
    }

    /// Waits until a CacheCluster's status is about its present generation, and as wanted. The status is what a failure shows.
    pub async fn await_status(
        &self,
        operator: &Operator,
        (namespace, name): (&str, &str),
        what: &str,
        wanted: impl Fn(&CacheClusterStatus) -> bool,
    ) -> CacheClusterStatus {
        let api = self.api::<CacheCluster>(namespace);
        eventually(&format!("{namespace}/{name}: {what}"), Duration::from_secs(180), async || {
            let cluster = api.get(name).await.map_err(|error| error.to_string())?;
            let status = cluster.status.unwrap_or_default();
            if status.observed_generation == cluster.metadata.generation && wanted(&status) {
                return Ok(status);
            }
            Err(format!("{status:#?}\n{}", operator.log_end()))
        })
        .await
    }

    /// Waits until a CacheCluster is as it is written, and clients are served.
    pub async fn await_ready(&self, operator: &Operator, namespace: &str, name: &str) -> CacheClusterStatus {
        self.await_status(operator, (namespace, name), "ready", |status| status.summary.as_deref() == Some("Ready")).await
    }

    /// Waits until the operator has looked at each of `count` CacheClusters a few times without an occasion.
    pub async fn await_looks(&self, operator: &Operator, count: usize) {
        let wanted = operator.looks().await + 3.0 * count as f64;
        eventually("regular looks at every CacheCluster", Duration::from_secs(180), async || {
            let looks = operator.looks().await;
            if looks >= wanted { Ok(()) } else { Err(format!("{looks} of {wanted}\n{}", operator.log_end())) }
        })
        .await;
    }
}

/// The security context of a container that holds to the restricted profile.
pub fn restricted() -> Value {
    json!({
        "allowPrivilegeEscalation": false, "runAsNonRoot": true, "runAsUser": 1000, "capabilities": {"drop": ["ALL"]},
        "seccompProfile": {"type": "RuntimeDefault"},
    })
}

async fn make_node(client: &Client, name: &str) {
    let api: Api<Node> = Api::all(client.clone());
    let metadata = ObjectMeta { name: Some(name.to_owned()), ..ObjectMeta::default() };
    api.create(&PostParams::default(), &Node { metadata, ..Node::default() }).await.expect("a node");
    let ready = json!({"status": {"conditions": [{"type": "Ready", "status": "True"}]}});
    api.patch_status(name, &PatchParams::default(), &Patch::Merge(ready)).await.expect("a node's status");
    // The API server itself taints new nodes as not ready; a controller would take that back.
    let untainted = json!({"spec": {"taints": null}});
    api.patch(name, &PatchParams::default(), &Patch::Merge(untainted)).await.expect("a node");
}

/// A small ephemeral tier.
pub fn cache_cluster(namespace: &str, name: &str) -> Value {
    json!({
        "apiVersion": "larder.dev/v1alpha1",
        "kind": "CacheCluster",
        "metadata": {"namespace": namespace, "name": name},
        "spec": {
            "engine": {"kind": "Valkey", "version": "8.1"},
            "mode": "Sentinel",
            "replicas": 1,
            "sentinels": 3,
            "memory": "256Mi",
        },
    })
}

/// Polls until the probe has something, or fails with what the probe last said is missing.
pub async fn eventually<T>(what: &str, within: Duration, mut probe: impl AsyncFnMut() -> Result<T, String>) -> T {
    let deadline = Instant::now() + within;
    loop {
        match probe().await {
            Ok(value) => return value,
            Err(missing) if Instant::now() > deadline => panic!("{what}: not within {} s: {missing}", within.as_secs()),
            Err(_) => tokio::time::sleep(LOOK_AGAIN).await,
        }
    }
}
