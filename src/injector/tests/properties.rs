//! What holds for pods of all kinds.

use proptest::prelude::*;
use proptest::sample::{select, subsequence};

use super::super::annotations::{BINDING, INJECTED};
use super::super::volumes;
use super::*;

fn resources() -> impl Strategy<Value = Value> {
    select(vec![
        Value::Null,
        json!({"requests": {"cpu": "100m"}}),
        json!({"limits": {"cpu": "1", "memory": "64Mi"}}),
        json!({"requests": {"cpu": "1", "memory": "64Mi"}, "limits": {"cpu": "1", "memory": "64Mi"}}),
    ])
}

fn env() -> impl Strategy<Value = Vec<Value>> {
    let all = vec![
        json!({"name": "REDIS_URL", "value": "redis://elsewhere:6379"}),
        json!({"name": "REDIS_HOST", "value": "127.0.0.1"}),
        json!({"name": "REDIS_PORT", "value": "6379"}),
        json!({"name": "REDIS_PORT", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}}),
        json!({"name": "MODE", "value": "$(REDIS_HOST)"}),
    ];
    subsequence(all, 0..=5)
}

fn a_container() -> impl Strategy<Value = Value> {
    let ports = subsequence(vec![6379_u16, 6380, 9121, 9122, 8080], 0..=3);
    let mounts = subsequence(vec![json!({"name": "data", "mountPath": "/data"})], 0..=1);
    (env(), any::<bool>(), ports, mounts, resources(), any::<bool>()).prop_map(
        |(env, from, ports, mounts, resources, unknown)| {
            let mut container = json!({"image": "app:1"});
            let ports: Vec<Value> = ports.iter().map(|port| json!({"containerPort": port})).collect();
            for (field, list) in [("env", env), ("ports", ports), ("volumeMounts", mounts)] {
                if !list.is_empty() {
                    container[field] = list.into();
                }
            }
            if from {
                container["envFrom"] = json!([{"secretRef": {"name": "s"}}]);
            }
            if !resources.is_null() {
                container["resources"] = resources;
            }
            if unknown {
                container["aFieldOfLater"] = json!({"kept": [1, {"as": "it is"}]});
            }
            container
        },
    )
}

fn named(containers: Vec<Value>, prefix: &str) -> Value {
    let name = |(index, mut container): (usize, Value)| {
        container["name"] = format!("{prefix}-{index}").into();
        container
    };
    containers.into_iter().enumerate().map(name).collect::<Vec<_>>().into()
}

fn annotations() -> impl Strategy<Value = Vec<(&'static str, &'static str)>> {
    let all = vec![
        ("larder.dev/inject", "true"),
        ("larder.dev/inject-env", "Override"),
        ("larder.dev/inject-socket", "true"),
        ("larder.dev/inject-containers", "app-0"),
        ("larder.dev/sidecar-uid", "1000"),
        ("team", "a"),
    ];
    subsequence(all, 0..=6)
}

fn owners() -> impl Strategy<Value = Value> {
    let controller =
        |kind: &str, name: &str| json!([{"kind": kind, "name": name, "controller": true, "apiVersion": "apps/v1", "uid": "1"}]);
    select(vec![
        Value::Null,
        controller("ReplicaSet", "shop-6f7c"),
        controller("StatefulSet", "db"),
        controller("DaemonSet", "logs"),
        controller("Job", "report-28391040"),
    ])
}

fn a_pod() -> impl Strategy<Value = Value> {
    let containers = prop::collection::vec(a_container(), 1..4);
    let first = prop::collection::vec(a_container(), 0..3);
    let has_mounts = Just(json!([{"name": "data", "emptyDir": {}}]));
    let extra = select(vec![
        json!({}),
        json!({"terminationGracePeriodSeconds": 2}),
        json!({"restartPolicy": "OnFailure", "imagePullSecrets": [{"name": "x"}]}),
        json!({"resources": {"limits": {"cpu": "2"}}, "aFieldOfLater": 1}),
    ]);
    (containers, first, annotations(), owners(), has_mounts, extra).prop_map(
        |(containers, first, asked, owners, volumes, extra)| {
            let mut pod = json!({"metadata": {"generateName": "x-"}, "spec": extra});
            pod["spec"]["containers"] = named(containers, "app");
            pod["spec"]["volumes"] = volumes;
            if !first.is_empty() {
                pod["spec"]["initContainers"] = named(first, "init");
            }
            for (name, text) in asked {
                pod["metadata"]["annotations"][name] = text.into();
            }
            if !owners.is_null() {
                pod["metadata"]["ownerReferences"] = owners;
                pod["metadata"]["labels"] = json!({"pod-template-hash": "6f7c"});
            }
            pod
        },
    )
}

/// The pod without all that is the injector's to give.
fn stripped(pod: &Value) -> Value {
    let mut pod = pod.clone();
    for (map, name) in [("labels", BINDING), ("annotations", INJECTED)] {
        if let Some(map) = pod["metadata"][map].as_object_mut() {
            map.remove(name);
        }
    }
    let ours = |volume: &Value| volumes::NAMES.contains(&volume["name"].as_str().unwrap_or_default());
    for list in ["initContainers", "containers"] {
        let Some(containers) = pod["spec"][list].as_array_mut() else { continue };
        containers.retain(|container| container["name"] != NAME);
        for container in containers {
            if let Some(env) = container.get_mut("env").and_then(Value::as_array_mut) {
                env.retain(|entry| !entry["name"].as_str().unwrap_or_default().starts_with("REDIS_"));
            }
            if let Some(mounts) = container.get_mut("volumeMounts").and_then(Value::as_array_mut) {
                mounts.retain(|mount| !ours(mount));
            }
        }
    }
    if let Some(volumes) = pod["spec"]["volumes"].as_array_mut() {
        volumes.retain(|volume| !ours(volume));
    }
    without_nothing(&mut pod);
    pod
}

/// Takes out empty lists, empty maps and nulls, which mean the same as their absence.
fn without_nothing(value: &mut Value) {
    match value {
        Value::Object(members) => {
            members.values_mut().for_each(without_nothing);
            members.retain(|_, member| {
                !member.is_null()
                    && member.as_array().is_none_or(|list| !list.is_empty())
                    && member.as_object().is_none_or(|map| !map.is_empty())
            });
        }
        Value::Array(list) => list.iter_mut().for_each(without_nothing),
        _ => {}
    }
}

/// What another webhook may do to a pod that has its sidecar.
fn meddle(pod: &mut Value, how: usize) {
    let spec = pod["spec"].as_object_mut().unwrap();
    let first = spec["initContainers"].as_array_mut().unwrap();
    match how {
        0 => first.insert(0, json!({"name": "mesh", "image": "mesh:1", "restartPolicy": "Always"})),
        1 => first.reverse(),
        2 => first[0]["args"] = json!(["sidecar"]),
        3 => drop(first[0].as_object_mut().unwrap().remove("securityContext")),
        4 => {
            first[0]["volumeMounts"][3] =
                json!({"name": "larder-tmp", "mountPath": "/var/run/secrets/kubernetes.io/serviceaccount"})
        }
        5 => drop(spec["volumes"].as_array_mut().unwrap().pop()),
        6 => spec["volumes"][1] = json!({"name": spec["volumes"][1]["name"], "emptyDir": {}}),
        7 => spec["containers"]
            .as_array_mut()
            .unwrap()
            .push(json!({"name": "redis", "ports": [{"containerPort": 6379}, {"containerPort": 9121}]})),
        8 => drop(first.remove(0)),
        9 => first[0]["env"] = json!([{"name": "POD_NAME", "value": "x"}, {"name": "TRACE", "value": "1"}]),
        _ => spec["containers"][0]["env"] = json!([]),
    }
}

fn a_policy() -> impl Strategy<Value = CachePolicy> {
    select(vec![Value::Null, json!({"env": "Override"}), json!({"socket": true}), json!({"env": "IfAbsent", "port": 7000})])
        .prop_map(|inject| policy("a", "2026-01-01T00:00:00Z", "main", &inject))
}

proptest! {
    #[test]
    fn a_second_look_changes_nothing_and_nothing_of_others_is_touched(pod in a_pod(), policy in a_policy()) {
        let policies = [policy];
        let (changed, _) = patched(under(&policies, &pod), &pod);
        prop_assert_eq!(stripped(&changed), stripped(&pod));
        let again = under(&policies, &changed);
        prop_assert!(matches!(again, Outcome::Unchanged { .. }), "{:?}", again);
    }

    #[test]
    fn whatever_others_do_the_next_look_puts_right(pod in a_pod(), policy in a_policy(), how in prop::collection::vec(0..11_usize, 1..4)) {
        let policies = [policy];
        let (mut changed, _) = patched(under(&policies, &pod), &pod);
        for how in how {
            // What one did away with another cannot change.
            if changed["spec"]["initContainers"][0]["name"] == NAME {
                meddle(&mut changed, how);
            }
        }
        // A name that occurs twice is the other webhook's fault.
        let names = texts(&changed["spec"]["containers"], "name");
        prop_assume!(names.iter().filter(|name| **name == "redis").count() < 2);
        let repaired = match under(&policies, &changed) {
            Outcome::Patched { steps, .. } => {
                apply(&mut changed, &steps).unwrap();
                changed
            }
            Outcome::Unchanged { .. } => changed,
            Outcome::Refused { message } => panic!("{message}"),
        };
        check_structure(&repaired);
        let again = under(&policies, &repaired);
        prop_assert!(matches!(again, Outcome::Unchanged { .. }), "{:?}", again);
    }
}
