//! Policies that cannot be read any more, and workloads that nobody owns: each keeps what it has, and is in nobody's way.

use std::time::Duration;

use k8s_openapi::api::core::v1::{ConfigMap, Pod, Secret};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::OwnerReference;
use kube::ResourceExt as _;
use kube::api::{DeleteParams, Patch, PatchParams};
use larder::api::CachePolicy;
use larder::policy::Snapshot;
use larder::policy::binding::BindingName;
use serde_json::{Value, json};

use super::operator::Operator;
use super::scene::{Scene, cache_cluster, eventually, restricted};

const SHOP: &str = "shop";
const SOON: Duration = Duration::from_secs(90);

fn deployment(app: &str) -> Value {
    let labels = json!({"app": app});
    json!({
        "apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"namespace": SHOP, "name": app},
        "spec": {
            "selector": {"matchLabels": labels},
            "template": {"metadata": {"labels": labels}, "spec": {"containers": [{"name": "app", "image": "app:1"}]}},
        },
    })
}

fn policy(name: &str, app: &str, keys: &str) -> Value {
    json!({
        "apiVersion": "larder.dev/v1alpha1", "kind": "CachePolicy", "metadata": {"namespace": SHOP, "name": name},
        "spec": {
            "cacheCluster": "main", "workloads": {"matchLabels": {"app": app}},
            "rules": [{"name": name, "keys": keys, "strategy": "CacheAside"}],
        },
    })
}

/// A pod with a sidecar, as the injector would make it.
fn pod(name: &str, app: &str, binding: &BindingName, more: &Value) -> Value {
    let mut pod = json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {"namespace": SHOP, "name": name, "labels": {"app": app, "larder.dev/binding": binding.as_str()}},
        "spec": {"containers": [{"name": "app", "image": "app:1", "securityContext": restricted()}]},
    });
    let (metadata, more) = (pod["metadata"].as_object_mut().expect("metadata"), more.as_object().expect("fields"));
    for (field, value) in more {
        match (metadata.get_mut(field).and_then(Value::as_object_mut), value.as_object()) {
            (Some(there), Some(added)) => there.extend(added.clone()),
            _ => drop(metadata.insert(field.clone(), value.clone())),
        }
    }
    pod
}

/// What a Rollout's pods say of themselves.
fn of_replica_set(hash: &str) -> Value {
    let (name, uid) = (format!("roll-{hash}"), format!("set-{hash}"));
    let owner = json!({"apiVersion": "apps/v1", "kind": "ReplicaSet", "name": name, "uid": uid, "controller": true});
    json!({"labels": {"rollouts-pod-template-hash": hash}, "ownerReferences": [owner]})
}

async fn delete_pod(scene: &Scene, name: &str) {
    let at_once = DeleteParams { grace_period_seconds: Some(0), ..DeleteParams::default() };
    scene.api::<Pod>(SHOP).delete(name, &at_once).await.expect("deleted");
}

/// Waits until the objects of a binding name owners of these uids: the ConfigMap, and the Secret.
async fn await_owners(scene: &Scene, operator: &Operator, binding: &BindingName, (of_map, of_secret): (&[&str], &[&str])) {
    let name = binding.object_name();
    let uids = |owners: &[OwnerReference]| -> Vec<String> { owners.iter().map(|owner| owner.uid.clone()).collect() };
    eventually("owners", SOON, async || {
        let map = scene.api::<ConfigMap>(SHOP).get(&name).await.map_err(|error| format!("{error}\n{}", operator.log_end()))?;
        let secret = scene.api::<Secret>(SHOP).get(&name).await.map_err(|error| error.to_string())?;
        let (map, secret) = (uids(map.owner_references()), uids(secret.owner_references()));
        let is_so = map == of_map && secret == of_secret;
        if is_so { Ok(()) } else { Err(format!("{map:?} {secret:?}\n{}", operator.log_end())) }
    })
    .await;
}

/// Nothing tells the uid of a Rollout, and pods of a generated name have no owner: what belongs to them goes with what made the pods, or with
/// the pods.
async fn goes_with_what_there_is(scene: &Scene, operator: &Operator) {
    let (roll, debug) = (BindingName::of("Rollout", "roll", "main"), BindingName::of("Pod", "debug", "main"));
    for (name, app, keys) in [("roll", "roll", "roll:{id}"), ("debug", "debug", "debug:{id}")] {
        scene.apply(&policy(name, app, keys)).await.expect("a policy");
    }
    scene.apply(&pod("roll-77-a", "roll", &roll, &of_replica_set("77"))).await.expect("a pod");
    await_owners(scene, operator, &roll, (&["set-77"], &["set-77"])).await;
    scene.apply(&pod("roll-78-b", "roll", &roll, &of_replica_set("78"))).await.expect("a pod");
    await_owners(scene, operator, &roll, (&["set-77", "set-78"], &["set-77"])).await;
    delete_pod(scene, "roll-77-a").await;
    await_owners(scene, operator, &roll, (&["set-78"], &["set-77"])).await;
    // As Kubernetes' garbage collection does, once that one is gone: it comes back with an owner that is there.
    scene.api::<Secret>(SHOP).delete(&roll.object_name(), &DeleteParams::default()).await.expect("deleted");
    await_owners(scene, operator, &roll, (&["set-78"], &["set-78"])).await;

    let generated = json!({"generateName": "debug-"});
    scene.apply(&pod("debug-x7k2p", "debug", &debug, &generated)).await.expect("a pod");
    let uid = scene.api::<Pod>(SHOP).get("debug-x7k2p").await.expect("a pod").metadata.uid.expect("a uid");
    await_owners(scene, operator, &debug, (&[uid.as_str()], &[uid.as_str()])).await;
    for pod in ["roll-78-b", "debug-x7k2p"] {
        delete_pod(scene, pod).await;
    }
}

/// Waits until the snapshot of a Deployment has rules about these keys, which are in the order of the alphabet.
async fn await_keys(scene: &Scene, operator: &Operator, app: &str, wanted: &[&str]) {
    let name = BindingName::of("Deployment", app, "main").object_name();
    eventually(&format!("{app} has {wanted:?}"), SOON, async || {
        let keys = keys_of(scene, &name).await.map_err(|error| format!("{error}\n{}", operator.log_end()))?;
        if keys == wanted { Ok(()) } else { Err(format!("{keys:?}\n{}", operator.log_end())) }
    })
    .await;
}

async fn keys_of(scene: &Scene, map: &str) -> Result<Vec<String>, String> {
    let map = scene.api::<ConfigMap>(SHOP).get(map).await.map_err(|error| error.to_string())?;
    let text = map.data.and_then(|mut data| data.remove("snapshot.json")).ok_or("no snapshot")?;
    let snapshot = Snapshot::parse(text.as_bytes()).map_err(|error| error.to_string())?;
    let mut keys: Vec<String> = snapshot.rules.iter().map(|rule| rule.keys.to_string()).collect();
    keys.sort_unstable();
    Ok(keys)
}

/// A policy that cannot be read goes on as it was, beside others of its workload that change, and no other workload waits for it. An operator
/// that never could read it leaves alone what the workloads have that it selects.
async fn goes_on_unread(scene: &Scene, operator: Operator) -> Operator {
    for app in ["web", "other"] {
        scene.apply(&deployment(app)).await.expect("a Deployment");
    }
    for (name, app, keys) in [("users", "web", "user:{id}"), ("pages", "web", "page:{id}"), ("orders", "other", "order:{id}")] {
        scene.apply(&policy(name, app, keys)).await.expect("a policy");
    }
    await_keys(scene, &operator, "web", &["page:{id}", "user:{id}"]).await;
    await_keys(scene, &operator, "other", &["order:{id}"]).await;
    let mut unreadable = policy("users", "web", "user:{id}");
    unreadable["spec"]["rules"][0]["ttl"] = json!({"much": true});
    scene.apply_outdated("cachepolicies", std::slice::from_ref(&unreadable)).await;
    eventually("an event of what cannot be read", SOON, async || {
        let events = scene.list("apis/events.k8s.io/v1/events", SHOP).await;
        let told = events.iter().any(|event| event["regarding"]["name"] == "users" && event["reason"] == "Unreadable");
        if told { Ok(()) } else { Err(format!("{events:?}\n{}", operator.log_end())) }
    })
    .await;
    scene.apply(&policy("pages", "web", "site:{id}")).await.expect("a policy");
    await_keys(scene, &operator, "web", &["site:{id}", "user:{id}"]).await;
    let policies = scene.api::<CachePolicy>(SHOP);
    policies.delete("orders", &DeleteParams::default()).await.expect("deleted");
    await_keys(scene, &operator, "other", &[]).await;

    operator.stop();
    let operator = scene.operator();
    policies.delete("pages", &DeleteParams::default()).await.expect("deleted");
    scene.apply(&policy("orders", "other", "order:{id}")).await.expect("a policy");
    await_keys(scene, &operator, "other", &["order:{id}"]).await;
    // Both come of one look.
    await_keys(scene, &operator, "web", &["site:{id}", "user:{id}"]).await;
    policies.delete("orders", &DeleteParams::default()).await.expect("deleted");
    await_keys(scene, &operator, "other", &[]).await;
    await_keys(scene, &operator, "web", &["site:{id}", "user:{id}"]).await;
    // Server-side apply refuses what it finds there.
    let corrected = Patch::Merge(json!({"spec": policy("users", "web", "user:{name}")["spec"]}));
    policies.patch("users", &PatchParams::default(), &corrected).await.expect("corrected");
    await_keys(scene, &operator, "web", &["user:{name}"]).await;
    operator
}

#[tokio::test]
async fn odd_policies_and_workloads_keep_what_they_have_and_hurt_nobody() {
    let scene = Scene::start(&[SHOP]).await;
    let operator = scene.operator();
    let account = json!({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "default", "namespace": SHOP}});
    scene.apply(&account).await.expect("an account");
    scene.apply(&cache_cluster(SHOP, "main")).await.expect("applied");
    scene.await_ready(&operator, SHOP, "main").await;
    goes_with_what_there_is(&scene, &operator).await;
    let operator = goes_on_unread(&scene, operator).await;
    let refused = scene.plane.audit().into_iter().filter(|entry| entry.response_status.code == 403);
    assert_eq!(refused.map(|entry| entry.right()).collect::<Vec<_>>(), Vec::<String>::new());
    operator.stop();
}
