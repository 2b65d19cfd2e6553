//! What the other containers of a pod get: variables that lead to the sidecar, and its socket.

use serde_json::{Value, json};

use super::patch::Plan;
use super::volumes::{SOCKET_DIR, SOCKET_VOLUME, socket_mount};
use crate::api::cache_policy::EnvMode;

/// What a Service named `redis` in the namespace sets in every container, unless the pod says otherwise.
const LINKED: &str = "REDIS_PORT";

/// The variables for a sidecar at this port.
pub fn variables(port: u16) -> [(&'static str, String); 3] {
    [("REDIS_URL", format!("redis://127.0.0.1:{port}")), ("REDIS_HOST", "127.0.0.1".to_owned()), ("REDIS_PORT", port.to_string())]
}

/// Gives a container what it is to have. `earlier`: the port that an earlier look gave it. The warnings say what it has now in
/// place of something else, and what it keeps.
pub fn equip(container: &mut Value, plan: &Plan, earlier: Option<u16>, warnings: &mut Vec<String>) {
    let wanted = variables(plan.port);
    let ours: Vec<(&str, String)> = wanted.iter().cloned().chain(earlier.into_iter().flat_map(variables)).collect();
    let kept = own_variables(container, &ours);
    if !kept.is_empty() && plan.env == EnvMode::IfAbsent {
        let name = container["name"].as_str().unwrap_or_default();
        let kept = kept.join(", ");
        warnings.push(format!(
            "container {name} sets {kept} itself and keeps it: to lead it to the sidecar, remove it or write inject.env: Override"
        ));
    } else if set_variables(container, &wanted) {
        warnings.extend(hidden_sources(container, plan));
    }
    if plan.socket {
        mount_socket(container);
    }
}

/// The variables that the container's own env sets to anything else.
fn own_variables(container: &Value, ours: &[(&str, String)]) -> Vec<String> {
    let entries = container["env"].as_array().into_iter().flatten();
    let named = entries.filter_map(|entry| Some((entry["name"].as_str()?, entry["value"].as_str())));
    let foreign = named.filter(|(name, value)| {
        let is_one = ours.iter().any(|(own, _)| own == name);
        is_one && !ours.iter().any(|(own, text)| own == name && *value == Some(text.as_str()))
    });
    foreign.map(|(name, _)| name.to_owned()).collect()
}

/// Sets all of them. Whether they were not set so before.
fn set_variables(container: &mut Value, wanted: &[(&str, String)]) -> bool {
    let mut missing = Vec::new();
    let mut changed = false;
    for (name, value) in wanted {
        let wanted = json!({"name": name, "value": value});
        let mut is_named = false;
        for entry in container["env"].as_array_mut().into_iter().flatten().filter(|entry| entry["name"] == *name) {
            is_named = true;
            if *entry != wanted {
                *entry = wanted.clone();
                changed = true;
            }
        }
        if !is_named {
            missing.push(wanted);
        }
    }
    if missing.is_empty() {
        return changed;
    }
    // In front, so that the container's own may refer to them.
    if let Some(present) = container["env"].as_array() {
        missing.extend(present.iter().cloned());
    }
    container["env"] = missing.into();
    true
}

/// Sources of variables that cannot be looked into, or that say less than what a container says itself.
fn hidden_sources(container: &Value, plan: &Plan) -> Option<String> {
    let name = container["name"].as_str().unwrap_or_default();
    let from = container["envFrom"].as_array().is_some_and(|sources| !sources.is_empty());
    let what = match (from, plan.linked) {
        (true, true) => format!("what envFrom says of them, and the {LINKED} of the Service redis, have no effect"),
        (true, false) => "what envFrom says of them has no effect".to_owned(),
        (false, true) => format!("the {LINKED} of the Service redis has no effect"),
        (false, false) => return None,
    };
    Some(format!(
        "container {name} is given REDIS_URL, REDIS_HOST and REDIS_PORT: {what}; write them into its env to keep others"
    ))
}

fn mount_socket(container: &mut Value) {
    if !container["volumeMounts"].is_array() {
        container["volumeMounts"] = json!([]);
    }
    let Some(mounts) = container["volumeMounts"].as_array_mut() else { return };
    // What the container has there itself is its own.
    if !mounts.iter().any(|mount| mount["mountPath"] == SOCKET_DIR || mount["name"] == SOCKET_VOLUME) {
        mounts.push(socket_mount(true));
    }
}
