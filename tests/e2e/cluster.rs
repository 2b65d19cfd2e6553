//! The cluster, by `kubectl`, `helm` and `docker`, as a person would reach it.

use std::io::Write as _;
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::Value;

use super::api;

/// How often a state is looked at that is waited for.
const LOOK_AGAIN: Duration = Duration::from_millis(500);

/// Runs a program: what it wrote, or what it said against it.
pub fn run(program: &str, arguments: &[&str], input: &str) -> Result<String, String> {
    let mut child = Command::new(program)
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|error| format!("{program}: {error}"))?;
    child.stdin.take().expect("a pipe").write_all(input.as_bytes()).map_err(|error| format!("{program}: {error}"))?;
    let output = child.wait_with_output().map_err(|error| format!("{program}: {error}"))?;
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim().to_owned();
    if output.status.success() {
        Ok(text(&output.stdout))
    } else {
        Err(format!("{program} {}: {} {}", arguments.join(" "), text(&output.stderr), text(&output.stdout)))
    }
}

pub fn kubectl(arguments: &[&str]) -> Result<String, String> {
    run("kubectl", arguments, "")
}

/// Applies a manifest.
pub fn apply(manifest: &Value) -> Result<String, String> {
    run("kubectl", &["apply", "-f", "-"], &manifest.to_string())
}

/// One object, when it is there.
pub fn get(namespace: &str, what: &str) -> Option<Value> {
    let (kind, name) = what.split_once('/')?;
    api::get(&format!("{}/{name}", api::path(namespace, kind)))
}

/// The objects of a kind that have some labels, without the kind of each.
pub fn list(namespace: &str, kind: &str, labels: &str) -> Vec<Value> {
    let list = api::get(&format!("{}?labelSelector={}", api::path(namespace, kind), api::escaped(labels))).unwrap_or_default();
    list["items"].as_array().cloned().unwrap_or_default()
}

pub fn name(object: &Value) -> String {
    object["metadata"]["name"].as_str().unwrap_or_default().to_owned()
}

pub fn uid(object: &Value) -> String {
    object["metadata"]["uid"].as_str().unwrap_or_default().to_owned()
}

/// A condition of an object, when it is about the present generation.
pub fn condition(object: &Value, kind: &str) -> Option<Value> {
    let conditions = object["status"]["conditions"].as_array()?;
    let found = conditions.iter().find(|condition| condition["type"] == kind)?;
    (found["observedGeneration"] == object["metadata"]["generation"]).then(|| found.clone())
}

/// Polls until the probe has something, or fails with what the probe last said is missing.
pub fn eventually<T>(what: &str, within: Duration, mut probe: impl FnMut() -> Result<T, String>) -> T {
    let deadline = Instant::now() + within;
    loop {
        match probe() {
            Ok(value) => return value,
            Err(missing) if Instant::now() > deadline => panic!("{what}: not within {} s: {missing}", within.as_secs()),
            Err(_) => thread::sleep(LOOK_AGAIN),
        }
    }
}

/// What a person would look at first, for the log of a failed test.
pub fn describe(namespace: &str) -> String {
    let ask = |arguments: &[&str]| {
        let arguments: Vec<&str> = ["-n", namespace].into_iter().chain(arguments.iter().copied()).collect();
        kubectl(&arguments).unwrap_or_else(|error| error)
    };
    format!(
        "{}\n{}\n{}",
        ask(&["get", "cacheclusters", "-o", "jsonpath={range .items[*]}{.metadata.name} {.status}{\"\\n\"}{end}"]),
        ask(&["get", "pods", "-o", "wide"]),
        ask(&["get", "events", "--sort-by=.lastTimestamp"]).lines().rev().take(25).collect::<Vec<_>>().join("\n")
    )
}
