//! What the API server itself refuses, and with which words.

use serde_json::{Value, json};

use super::cluster::run;
use super::install::{self, PLACE};
use super::tier::{Tier, VALKEY_8_1};

/// Changes of a good policy's spec and of its rule, and what is said of them.
const POLICIES_REFUSED: [(&str, &str, &str); 11] = [
    (r#"{"defaults": {"ttl": "2h", "maxTtl": "1h"}}"#, "{}", "ttl is longer than maxTtl"),
    (r#"{"defaults": {"jitter": "101%"}}"#, "{}", "write a share in whole per cent"),
    (r#"{"origins": [{"name": "none"}]}"#, "{}", "write either sql or http"),
    (r#"{"inject": {"env": "IfAbsent", "port": 9121}}"#, "{}", "port 9121 is where the sidecar serves"),
    ("{}", r#"{"keys": "user:*"}"#, "there are no globs"),
    ("{}", r#"{"ttl": "5 minutes"}"#, "write a duration above zero"),
    ("{}", r#"{"strategy": "Bypass"}"#, "a Bypass rule touches nothing"),
    ("{}", r#"{"strategy": "ReadThrough"}"#, "a ReadThrough rule loads what is missing"),
    (
        "{}",
        r#"{"strategy": "ReadThrough", "origin": {"name": "db", "read": "SELECT 1"}}"#,
        "origin.name must be the name of one of spec.origins",
    ),
    ("{}", r#"{"strategy": "WriteThrough"}"#, "a WriteThrough or WriteBehind rule loads what is missing"),
    ("{}", r#"{"stampede": {"mode": "Disabled", "lease": "1s"}}"#, "mode: Disabled protects from nothing"),
];

/// A manifest that is good but for one change at a path.
fn with(change: &Value) -> Value {
    let tier = Tier::of("refused", VALKEY_8_1);
    let mut manifest = tier.manifest();
    merge(&mut manifest, change);
    manifest
}

fn merge(into: &mut Value, change: &Value) {
    match (into, change) {
        (Value::Object(into), Value::Object(change)) => {
            for (key, value) in change {
                merge(into.entry(key.clone()).or_insert(Value::Null), value);
            }
        }
        (into, change) => *into = change.clone(),
    }
}

fn refused(manifest: &Value) -> String {
    let said = run("kubectl", &["-n", PLACE, "apply", "--dry-run=server", "-f", "-"], &manifest.to_string());
    said.expect_err("the API server takes it")
}

#[test]
fn the_api_server_refuses_and_says_what_to_write() {
    let _cluster = install::cluster();
    let good = run("kubectl", &["-n", PLACE, "apply", "--dry-run=server", "-f", "-"], &with(&json!({})).to_string());
    good.expect("the manifest without a change is good");
    for (change, words) in [
        (json!({"spec": {"shards": 3}}), "shards has a meaning under mode: Cluster only: remove it, or write mode: Cluster"),
        (json!({"spec": {"mode": "Cluster", "sentinels": 3}}), "sentinels has a meaning under mode: Sentinel only"),
        (json!({"spec": {"sentinels": 4}}), "write an odd number of sentinels"),
        (json!({"spec": {"sentinels": 1}}), "spec.sentinels"),
        (json!({"spec": {"replicas": 0}}), "spec.replicas"),
        (json!({"spec": {"mode": "Single"}}), "spec.mode"),
        (json!({"spec": {"memory": "much"}}), "spec.memory"),
        (json!({"spec": {"eviction": "oldest"}}), "spec.eviction"),
        (json!({"spec": {"parameters": {"port": "6380"}}}), "port"),
        (json!({"spec": {"parameters": {"maxmemory": "1gb"}}}), "memory"),
        (json!({"spec": {"engine": {"kind": "Memcached"}}}), "spec.engine.kind"),
        (json!({"spec": {"engine": {"version": "latest"}}}), "spec.engine.version"),
        (
            json!({"spec": {"auth": {"password": {"value": "a", "secretKeyRef": {"name": "a", "key": "b"}}}}}),
            "spec.auth.password",
        ),
        (json!({"spec": {"writes": {"minReplicas": 2}}}), "writes.minReplicas is more than there are replicas"),
        (json!({"spec": {"tls": {"enabled": false, "rotation": "now"}}}), "rotation has a meaning with enabled: true only"),
        (json!({"metadata": {"name": "a-name-that-is-longer-than-forty-characters"}}), "at most 40"),
    ] {
        let said = refused(&with(&change));
        assert!(said.contains(words), "{change}: {said}");
    }
    let unknown = refused(&with(&json!({"spec": {"replica": 2}})));
    assert!(unknown.contains("unknown field \"spec.replica\""), "{unknown}");
}

#[test]
fn the_api_server_refuses_policies_and_says_what_to_write() {
    let _cluster = install::cluster();
    let rule = |change: &Value| {
        let mut rule = json!({"name": "user", "keys": "user:{id}", "strategy": "CacheAside", "ttl": "10m"});
        merge(&mut rule, change);
        rule
    };
    let policy = |spec: &Value, changed: &Value| {
        let mut policy = json!({
            "apiVersion": "larder.dev/v1alpha1", "kind": "CachePolicy", "metadata": {"name": "refused", "namespace": PLACE},
            "spec": {"cacheCluster": "main", "workloads": {"matchLabels": {"app": "refused"}}, "rules": [rule(changed)]},
        });
        merge(&mut policy["spec"], spec);
        policy
    };
    let none = json!({});
    let good = run("kubectl", &["-n", PLACE, "apply", "--dry-run=server", "-f", "-"], &policy(&none, &none).to_string());
    good.expect("the manifest without a change is good");
    for (spec, changed, words) in POLICIES_REFUSED {
        let (spec, changed) = (serde_json::from_str(spec).expect("JSON"), serde_json::from_str(changed).expect("JSON"));
        let said = refused(&policy(&spec, &changed));
        assert!(said.contains(words), "{spec} {changed}: {said}");
    }
}
