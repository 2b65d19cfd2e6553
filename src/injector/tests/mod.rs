//! What becomes of pods, branch by branch, and for pods of all kinds.

mod branches;
mod properties;

use std::collections::BTreeSet;

use json_patch::patch as apply;
use k8s_openapi::api::core::v1::Pod;
use serde_json::{Value, json};

use super::container::NAME;
use super::patch::{Occasion, Outcome, Settings, inject};
use crate::api::CachePolicy;

pub fn settings() -> Settings {
    Settings {
        image: "registry.example/larder:1".to_owned(),
        image_pull_policy: Some("IfNotPresent".to_owned()),
        pull_secrets: Vec::new(),
        uid: 65532,
        cpu: "100m".to_owned(),
        guaranteed_cpu: "500m".to_owned(),
        memory: "128Mi".to_owned(),
    }
}

fn policy(name: &str, created: &str, cluster: &str, inject: &Value) -> CachePolicy {
    let mut manifest = json!({
        "apiVersion": "larder.dev/v1alpha1",
        "kind": "CachePolicy",
        "metadata": {"name": name, "namespace": "shop", "creationTimestamp": created},
        "spec": {
            "cacheCluster": cluster,
            "workloads": {"matchLabels": {"app": "shop"}},
            "rules": [{"name": "user", "keys": "user:{id}", "strategy": "CacheAside"}],
        },
    });
    if !inject.is_null() {
        manifest["spec"]["inject"] = inject.clone();
    }
    serde_json::from_value(manifest).unwrap()
}

/// What becomes of a pod under policies, where every CacheCluster exists.
fn under(policies: &[CachePolicy], pod: &Value) -> Outcome {
    let policies: Vec<&CachePolicy> = policies.iter().collect();
    let occasion = Occasion { pod, policies: &policies, has_cluster: &|_| true, has_redis_service: false };
    inject(&occasion, &settings())
}

/// What becomes of a pod under one policy that says nothing of injection.
fn plainly(pod: &Value) -> Outcome {
    under(&[policy("a", "2026-01-01T00:00:00Z", "main", &Value::Null)], pod)
}

#[track_caller]
fn patched(outcome: Outcome, pod: &Value) -> (Value, Vec<String>) {
    match outcome {
        Outcome::Patched { steps, warnings } => {
            let mut changed = pod.clone();
            apply(&mut changed, &steps).unwrap();
            check_structure(&changed);
            (changed, warnings)
        }
        other => panic!("{other:?}"),
    }
}

/// The pod as it is with a sidecar, and without a warning.
#[track_caller]
fn injected(pod: &Value) -> Value {
    let (changed, warnings) = patched(plainly(pod), pod);
    assert_eq!(warnings, Vec::<String>::new());
    changed
}

/// A pod of the Deployment `shop`.
fn pod(spec: &Value) -> Value {
    let mut pod = json!({
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "generateName": "shop-6f7c-",
            "labels": {"app": "shop", "pod-template-hash": "6f7c"},
            "ownerReferences": [{"apiVersion": "apps/v1", "kind": "ReplicaSet", "name": "shop-6f7c", "uid": "1", "controller": true}],
        },
        "spec": {"containers": [{"name": "app", "image": "app:1"}]},
    });
    for (name, value) in spec.as_object().unwrap() {
        pod["spec"][name] = value.clone();
    }
    pod
}

fn sidecar(pod: &Value) -> &Value {
    pod["spec"]["initContainers"].as_array().and_then(|all| all.iter().find(|one| one["name"] == NAME)).expect("a sidecar")
}

fn env_of<'a>(pod: &'a Value, container: &str, name: &str) -> Option<&'a str> {
    let all = pod["spec"]["containers"].as_array().unwrap();
    let found = all.iter().find(|one| one["name"] == container).unwrap();
    found["env"].as_array()?.iter().rev().find(|entry| entry["name"] == name)?["value"].as_str()
}

fn texts<'a>(list: &'a Value, field: &str) -> Vec<&'a str> {
    list.as_array().into_iter().flatten().filter_map(|one| one[field].as_str()).collect()
}

/// What the API server asks of every pod, as far as a sidecar could break it; and that the sidecar is the first to start.
#[track_caller]
fn check_structure(pod: &Value) {
    let _: Pod = serde_json::from_value(pod.clone()).expect("a pod");
    let unique = |names: &[&str], what: &str| {
        assert_eq!(names.iter().collect::<BTreeSet<_>>().len(), names.len(), "{what} occur twice: {names:?}");
    };
    let spec = &pod["spec"];
    let volumes = texts(&spec["volumes"], "name");
    unique(&volumes, "volumes");
    let all = [texts(&spec["initContainers"], "name"), texts(&spec["containers"], "name")].concat();
    unique(&all, "containers");
    assert_eq!(spec["initContainers"][0]["name"], NAME, "another starts first");
    assert_eq!(spec["initContainers"][0]["restartPolicy"], "Always");
    for container in ["initContainers", "containers"].iter().flat_map(|list| spec[*list].as_array().into_iter().flatten()) {
        unique(&texts(&container["volumeMounts"], "mountPath"), "mounts");
        for name in texts(&container["volumeMounts"], "name") {
            assert!(volumes.contains(&name), "{name} is mounted and is no volume");
            let is_private = super::volumes::NAMES.contains(&name) && name != super::volumes::SOCKET_VOLUME;
            assert!(!is_private || container["name"] == NAME, "{} mounts {name}", container["name"]);
        }
        let requests = container["resources"]["requests"].as_object();
        for (kind, request) in requests.into_iter().flatten().filter(|_| container["name"] == NAME) {
            let limit = &container["resources"]["limits"][kind];
            assert!(limit.is_null() || limit == request, "{container}");
        }
    }
    let token = "/var/run/secrets/kubernetes.io/serviceaccount";
    let mounts = sidecar(pod)["volumeMounts"].as_array().unwrap();
    let there = mounts.iter().find(|mount| mount["mountPath"] == token).expect("something in the token's place");
    assert_eq!(there["name"], "larder-no-token");
    let names: Vec<&Value> = sidecar(pod)["env"].as_array().unwrap().iter().filter(|entry| entry["name"] == "POD_NAME").collect();
    let of_the_pod = json!({"apiVersion": "v1", "fieldPath": "metadata.name"});
    assert!(names.len() == 1 && names[0]["valueFrom"]["fieldRef"] == of_the_pod, "heartbeats name the pod: {names:?}");
    assert!(pod["metadata"]["labels"]["larder.dev/binding"].as_str().is_some_and(|name| name.len() <= 63));
}
