//! The sidecar's container.

use serde_json::{Map, Value, json};

use super::patch::{Plan, contains};
use super::volumes::{ADMIN_SOCKET, SOCKET, sidecar_mounts};
use crate::policy::binding::{POLICY_DIR, SNAPSHOT_FILE};

/// The container's name.
pub const NAME: &str = "larder-sidecar";
/// How long clients may finish. The sidecar is told to stop after every other container has stopped, or with two seconds left.
const DRAIN: &str = "1s";
/// For how long the sidecar may take to listen, and to let applications start, in seconds. Far longer than it takes it upon itself to hold
/// them up.
const START_WITHIN: u32 = 120;
/// Whether applications may start.
const STARTED: &str = "/livez?started";
/// Whether it listens.
const ALIVE: &str = "/livez";

/// The container as it is to be.
///
/// A native sidecar: it starts before all others, which wait until it says that they may start: until its policy and its login are in force, and
/// for a while at most. It stops after them. From then on it is asked whether it listens and never whether it reaches the cache, which would
/// take every application down with that. There is no probe of readiness: once started it listens until it ends.
pub fn container(plan: &Plan) -> Value {
    let probe = |path: &str, failures: u32, period: u32| {
        json!({
            "httpGet": {"path": path, "port": plan.admin, "scheme": "HTTP"},
            "periodSeconds": period, "timeoutSeconds": 5, "successThreshold": 1, "failureThreshold": failures,
        })
    };
    let mut container = json!({
        "name": NAME,
        "image": plan.image,
        "command": ["/larderd"],
        "args": arguments(plan),
        "env": [environment()],
        "restartPolicy": "Always",
        "ports": [{"name": "larder-metrics", "containerPort": plan.admin, "protocol": "TCP"}],
        "startupProbe": probe(STARTED, START_WITHIN, 1),
        "livenessProbe": probe(ALIVE, 6, 10),
        "securityContext": security(plan.uid),
        "volumeMounts": sidecar_mounts(plan),
        "terminationMessagePath": "/dev/termination-log",
        "terminationMessagePolicy": "FallbackToLogsOnError",
    });
    if let Some(policy) = &plan.image_pull_policy {
        container["imagePullPolicy"] = policy.as_str().into();
    }
    if let Some(resources) = resources(plan) {
        container["resources"] = resources;
    }
    container
}

fn arguments(plan: &Plan) -> Vec<String> {
    let mut arguments: Vec<String> = ["sidecar", "--snapshot"].map(str::to_owned).into();
    arguments.push(format!("{POLICY_DIR}/{SNAPSHOT_FILE}"));
    arguments.extend(["--binding".to_owned(), plan.binding.as_str().to_owned()]);
    for host in ["127.0.0.1", "[::1]"] {
        arguments.extend(["--listen".to_owned(), format!("{host}:{}", plan.port)]);
    }
    if plan.socket {
        // Any user of any container of the pod.
        arguments.extend(["--socket", SOCKET, "--socket-mode", "666"].map(str::to_owned));
    }
    arguments.extend(["--admin".to_owned(), format!("[::]:{}", plan.admin)]);
    arguments.extend(["--admin-socket", ADMIN_SOCKET, "--drain", DRAIN].map(str::to_owned));
    arguments
}

/// How heartbeats name the pod, whose name may not be known yet. The version is what the API server fills in.
fn environment() -> Value {
    json!({"name": "POD_NAME", "valueFrom": {"fieldRef": {"apiVersion": "v1", "fieldPath": "metadata.name"}}})
}

/// The `restricted` profile of Pod Security, whatever the pod says for others.
fn security(uid: i64) -> Value {
    json!({
        "runAsNonRoot": true,
        "runAsUser": uid,
        "runAsGroup": uid,
        "allowPrivilegeEscalation": false,
        "privileged": false,
        "readOnlyRootFilesystem": true,
        "capabilities": {"drop": ["ALL"]},
        "seccompProfile": {"type": "RuntimeDefault"},
    })
}

/// Requests and limits; none where the pod has its own for all of its containers together.
fn resources(plan: &Plan) -> Option<Value> {
    let (cpu, memory) = plan.resources.as_ref()?;
    let mut limits = json!({"memory": memory});
    if plan.guaranteed {
        limits["cpu"] = cpu.as_str().into();
    }
    Some(json!({"requests": {"cpu": cpu, "memory": memory}, "limits": limits}))
}

/// What becomes of a container that an earlier look made, and others may have changed since: they may have rewritten its image to
/// another registry, its resources, its probes, or have given it more variables, and would do so again. What makes it ours is put right.
/// Where the plan has changed it is made anew, but for its image and its resources.
pub fn repaired(existing: &Value, wanted: Value) -> Value {
    let same_plan = existing["args"] == wanted["args"];
    let mut repaired = if same_plan { existing.clone() } else { wanted.clone() };
    let (Some(fields), Some(wanted)) = (repaired.as_object_mut(), wanted.as_object()) else { return wanted };
    if !same_plan {
        for field in ["image", "imagePullPolicy", "resources"] {
            if let Some(value) = existing.get(field).filter(|value| !value.is_null()) {
                fields.insert(field.to_owned(), value.clone());
            }
        }
    }
    for (name, value) in wanted {
        match name.as_str() {
            "name" | "command" | "args" | "restartPolicy" => drop(fields.insert(name.clone(), value.clone())),
            "securityContext" => enforce(fields.entry(name.clone()).or_insert(Value::Null), value),
            "volumeMounts" => enforce_each(fields, name, "mountPath", value),
            "env" => enforce_each(fields, name, "name", value),
            _ => drop(fields.entry(name.clone()).or_insert_with(|| value.clone())),
        }
    }
    repaired
}

/// Every member that is wanted is as it is wanted; others stay.
fn enforce(place: &mut Value, wanted: &Value) {
    match (place, wanted) {
        (Value::Object(place), Value::Object(wanted)) => {
            for (name, value) in wanted {
                enforce(place.entry(name.clone()).or_insert(Value::Null), value);
            }
        }
        (place, wanted) => *place = wanted.clone(),
    }
}

/// Each of the wanted entries of a list is in its place, which `key` tells; others stay beside it.
fn enforce_each(fields: &mut Map<String, Value>, list: &str, key: &str, wanted: &Value) {
    let place = fields.entry(list).or_insert(Value::Null);
    if !place.is_array() {
        *place = json!([]);
    }
    let (Some(entries), Some(wanted)) = (place.as_array_mut(), wanted.as_array()) else { return };
    for entry in wanted {
        match entries.iter_mut().find(|found| found[key] == entry[key]) {
            Some(found) if contains(found, entry) => {}
            Some(found) => *found = entry.clone(),
            None => entries.push(entry.clone()),
        }
    }
}
