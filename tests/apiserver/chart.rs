//! What the chart installs, as helm renders it.

use std::collections::BTreeSet;
use std::process::Command;

use serde_json::Value;

use super::control_plane::SYSTEM;
use super::process::tool;

/// The chart's objects for an operator that watches these namespaces.
pub fn render(namespaces: &[&str]) -> Vec<Value> {
    render_with(namespaces, &[])
}

/// The same with some values.
pub fn render_with(namespaces: &[&str], values: &[&str]) -> Vec<Value> {
    let watched = format!("watchNamespaces={{{}}}", namespaces.join(","));
    let output = Command::new(tool("helm"))
        .args(["template", "larder", "charts/larder", "--namespace", SYSTEM, "--kube-version", "1.34"])
        .args(["--set", &watched, "--set", "image.repository=registry.example/larder"])
        .args(values.iter().flat_map(|value| ["--set", value]))
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .output()
        .expect("helm starts");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let text = String::from_utf8(output.stdout).expect("a text");
    let objects: Vec<Value> = serde_saphyr::from_multiple(&text).expect("YAML");
    objects.into_iter().filter(|object| !object.is_null()).collect()
}

/// `verb group/resource` of every rule of the roles that are bound to an account.
pub fn grants(objects: &[Value], account: &str) -> BTreeSet<String> {
    let is_bound = |role: &Value| {
        objects.iter().any(|binding| {
            let subjects = binding["subjects"].as_array();
            binding["roleRef"]["name"] == role["metadata"]["name"]
                && binding["roleRef"]["kind"] == role["kind"]
                && subjects.into_iter().flatten().any(|subject| subject["name"] == account)
        })
    };
    let roles = objects.iter().filter(|object| object["kind"] == "Role" || object["kind"] == "ClusterRole");
    let rules = roles.filter(|role| is_bound(role)).flat_map(|role| role["rules"].as_array().cloned().unwrap_or_default());
    let mut granted = BTreeSet::new();
    for rule in rules {
        for group in texts(&rule["apiGroups"]) {
            for resource in texts(&rule["resources"]) {
                granted.extend(texts(&rule["verbs"]).iter().map(|verb| format!("{verb} {group}/{resource}")));
            }
        }
    }
    granted
}

fn texts(value: &Value) -> Vec<String> {
    value.as_array().into_iter().flatten().filter_map(Value::as_str).map(str::to_owned).collect()
}
