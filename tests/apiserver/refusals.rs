//! Every rule of the resources' definitions refuses what it is there for, with its own words, at the API server itself.
//!
//! The rules are read from the definitions as the API server has them. For each a good manifest is changed in the one place that the rule
//! is about, so a new rule fails the test until there is a change that breaks it.

use reqwest::Method;
use serde_json::{Value, json};

use super::scene::Scene;

const SHOP: &str = "shop";
const AS_JSON: (&str, &str) = ("content-type", "application/json");
const AS_MERGE_PATCH: (&str, &str) = ("content-type", "application/merge-patch+json");

/// A rule of a definition.
#[derive(Debug)]
struct Rule {
    /// Where it stands: names of fields, `[]` for the elements of a list, `{}` for the values of a map.
    path: Vec<String>,
    message: String,
    /// Whether it compares with an earlier form of the object.
    transition: bool,
}

fn rules(schema: &Value, path: &mut Vec<String>, found: &mut Vec<Rule>) {
    for rule in schema["x-kubernetes-validations"].as_array().into_iter().flatten() {
        let text = |field: &str| rule[field].as_str().unwrap_or_default();
        let transition = text("rule").contains("oldSelf");
        found.push(Rule { path: path.clone(), message: text("message").to_owned(), transition });
    }
    let fields = schema["properties"].as_object().into_iter().flatten().map(|(name, inner)| (name.clone(), inner));
    let elements = [("items", "[]"), ("additionalProperties", "{}")];
    let elements = elements.iter().filter_map(|(field, step)| Some(((*step).to_owned(), schema.get(field)?)));
    for (step, inner) in fields.chain(elements) {
        path.push(step);
        rules(inner, path, found);
        path.pop();
    }
}

/// How a value is changed so that a rule about it is broken.
#[derive(Debug, Clone)]
enum Change {
    /// It is this.
    Is(Value),
    /// It is patched: an object gets fields, and loses those that are null.
    Gets(Value),
}

use Change::{Gets, Is};

/// What breaks the rule with this message: every change alone does. Empty: nobody knows.
fn changes(message: &str) -> Vec<Change> {
    if let Some((names, _)) = message.strip_prefix("Larder sets ").and_then(|rest| rest.split_once(" itself: ")) {
        return names.split(", ").map(|name| Gets(json!({name.replace('*', "x"): "1"}))).collect();
    }
    let table = [of_texts(), of_clusters(), of_policies()].concat();
    table.into_iter().filter(|(beginning, _)| message.starts_with(beginning)).map(|(_, change)| change).collect()
}

/// Changes of texts and numbers, by the beginnings of what the rules say.
fn of_texts() -> Vec<(&'static str, Change)> {
    vec![
        ("write the name of an entry in the Secret", Is(json!("a/b"))),
        ("write the name of an object", Is(json!("No_Name"))),
        ("write it on one line", Is(json!("a\nb"))),
        ("write the value on one line", Is(json!("a\nb"))),
        ("write a user of letters", Is(json!("no user"))),
        ("write an image such as", Is(json!("No Image"))),
        ("write the version as in", Is(json!("latest"))),
        ("write at least 16Mi", Is(json!("much"))),
        ("write a label's value", Is(json!("no value!"))),
        ("write CPUs or thousandths", Is(json!("0"))),
        ("write a key such as dedicated", Is(json!("no key!"))),
        ("write an odd number", Is(json!(4))),
        ("write a size such as", Is(json!("big"))),
        ("write letters, digits, dashes, dots, colons", Is(json!("no request!"))),
        ("write a duration from 1s to 1h", Is(json!("250ms"))),
        ("write a duration from 10s to 24h", Is(json!("1s"))),
        ("write a duration from 1s to 24h", Is(json!("25h"))),
        ("write at least 64Mi", Is(json!("16Mi"))),
        ("write a duration from 100ms to 1m", Is(json!("10ms"))),
        ("write a duration above zero", Is(json!("0s"))),
        ("write a duration in whole numbers", Is(json!("forever"))),
        ("write a share in whole per cent", Is(json!("101%"))),
        ("write a name of lower-case letters", Is(json!("No-Name"))),
        ("write the keys with their parts", Is(json!("user:*"))),
        ("write a path that begins with a slash", Is(json!("products"))),
        ("an SQL statement has no NUL", Is(json!("SELECT \u{0}"))),
        ("write the name of a column", Is(json!("row-version"))),
    ]
}

/// Changes of what a CacheCluster's specification holds.
fn of_clusters() -> Vec<(&'static str, Change)> {
    let both = json!({"value": "x", "secretKeyRef": {"name": "a", "key": "b"}});
    vec![
        ("name it with at most 40", Gets(json!({"metadata": {"name": "a-name-that-is-longer-than-forty-characters"}}))),
        ("shards has a meaning", Gets(json!({"shards": 3}))),
        ("sentinels has a meaning", Gets(json!({"mode": "Cluster"}))),
        ("writes.minReplicas is more", Gets(json!({"writes": {"minReplicas": 5}}))),
        ("mode cannot be changed", Gets(json!({"mode": "Cluster", "sentinels": null}))),
        ("storage cannot be added or removed", Gets(json!({"storage": null}))),
        ("size and class cannot be changed", Gets(json!({"size": "2Gi"}))),
        ("rotation has a meaning", Gets(json!({"enabled": false}))),
        ("TLS cannot be switched on or off", Gets(json!({"tls": {"enabled": false, "rotation": null}}))),
        ("larder-system is the user of Larder", Gets(json!({"user": "larder-system"}))),
        ("write either value or secretKeyRef", Gets(both)),
        ("from and metricsFrom have no effect", Gets(json!({"enabled": false}))),
        ("write podSelector, namespaceSelector", Gets(json!({"podSelector": null, "namespaceSelector": null}))),
        ("write labels such as", Gets(json!({"-no-label": "x"}))),
        ("write annotations such as", Gets(json!({"-no-annotation": "x"}))),
        ("Larder and Kubernetes set larder.dev/*", Gets(json!({"larder.dev/cluster": "x"}))),
        ("write parameters as in redis.conf", Gets(json!({"HZ": "10"}))),
        ("write the taint's key", Gets(json!({"key": null, "operator": null}))),
        ("value is compared by operator: Equal", Gets(json!({"operator": "Exists"}))),
        ("tolerationSeconds has a meaning", Gets(json!({"effect": "NoSchedule"}))),
    ]
}

/// Changes of what a CachePolicy's specification holds.
fn of_policies() -> Vec<(&'static str, Change)> {
    let url = json!({"url": {"value": "x"}});
    vec![
        ("a rule's origin.name must be", Gets(json!({"origins": null}))),
        ("a rule with origin.read needs an sql", Gets(json!({"origins": [{"name": "db", "http": url}]}))),
        ("a rule with origin.path needs an http", Gets(json!({"origins": [{"name": "api", "sql": url}]}))),
        ("ttl is longer than maxTtl", Gets(json!({"ttl": "48h", "maxTtl": "1h"}))),
        ("maxConnections is more than maxTotal", Gets(json!({"maxConnections": 5, "maxTotalConnections": 4}))),
        ("write either sql or http", Gets(json!({"sql": url, "http": url}))),
        ("a ReadThrough rule loads what is missing", Gets(json!({"strategy": "ReadThrough", "origin": null}))),
        (
            "only a ReadThrough, WriteThrough or WriteBehind rule has an origin",
            Gets(json!({"strategy": "CacheAside", "origin": {"name": "db", "read": "SELECT 1"}})),
        ),
        (
            "only a ReadThrough, WriteThrough or WriteBehind rule knows",
            Gets(json!({"strategy": "CacheAside", "negativeTtl": "1m"})),
        ),
        ("a WriteThrough or WriteBehind rule loads what is missing", Gets(json!({"strategy": "WriteThrough", "origin": null}))),
        ("a WriteThrough or WriteBehind rule carries writes", Gets(json!({"strategy": "WriteThrough"}))),
        ("only a WriteThrough or WriteBehind rule writes", Gets(json!({"origin": {"version": "v"}}))),
        ("only a WriteBehind rule has a journal", Gets(json!({"writeBehind": {}}))),
        (
            "what is written later cannot be on condition",
            Gets(
                json!({"strategy": "WriteBehind", "origin": {"name": "api", "read": null, "readMany": null, "path": "/x", "version": "ETag"}}),
            ),
        ),
        (
            "a journal numbers its writes itself",
            Gets(json!({"strategy": "WriteBehind", "origin": {"write": "INSERT", "version": "Kept"}})),
        ),
        (
            "a journal cannot overflow to a service",
            Gets(json!({"origin": {"read": null, "readMany": null, "path": "/x"}, "writeBehind": {"overflow": "WriteThrough"}})),
        ),
        ("a journal lies in the policy's own", Gets(json!({"cacheCluster": "other"}))),
        ("FLUSHALL would drop what WriteBehind", Gets(json!({"allow": {"flush": true}}))),
        ("an http origin is written to", Gets(json!({"read": null, "readMany": null, "path": "/x", "write": "INSERT"}))),
        ("an http origin tells versions", Gets(json!({"read": null, "readMany": null, "path": "/x", "version": "v"}))),
        ("a Bypass rule touches nothing", Gets(json!({"strategy": "Bypass", "ttl": "1m"}))),
        (
            "a ReadThrough, WriteThrough or WriteBehind rule always",
            Gets(json!({"strategy": "ReadThrough", "stampede": {"mode": "Disabled"}})),
        ),
        ("earlyExpiry is supported on CacheAside", Gets(json!({"strategy": "ReadThrough", "stampede": {"earlyExpiry": 1.0}}))),
        (
            "at the end of its wait a ReadThrough, WriteThrough",
            Gets(json!({"strategy": "ReadThrough", "stampede": {"atWaitEnd": "Miss"}})),
        ),
        (
            "stale values are served while",
            Gets(json!({"strategy": "CacheAside", "stale": "1m", "stampede": {"mode": "Disabled"}})),
        ),
        ("write either read (for an sql origin)", Gets(json!({"read": "SELECT 1", "path": "/a"}))),
        ("readMany answers MGET beside read", Gets(json!({"read": null, "path": "/a", "readMany": "SELECT 1"}))),
        ("wait is not shorter than lease", Gets(json!({"lease": "1s", "wait": "2s"}))),
        (
            "wait is not shorter than the 3s",
            Gets(
                json!({"strategy": "CacheAside", "origin": null, "negativeTtl": null, "stampede": {"lease": null, "wait": "3s"}}),
            ),
        ),
        ("lease is longer than 5m", Gets(json!({"lease": "6m"}))),
        ("port 9121 is where the sidecar serves", Gets(json!({"port": 9121}))),
        ("mode: Disabled protects from nothing", Gets(json!({"mode": "Disabled", "lease": "1s"}))),
    ]
}

fn merge(into: &mut Value, change: &Value) {
    let Value::Object(fields) = change else { return *into = change.clone() };
    if !into.is_object() {
        *into = json!({});
    }
    let object = into.as_object_mut().expect("an object");
    for (name, change) in fields {
        match change {
            Value::Null => drop(object.remove(name)),
            change => merge(object.entry(name.clone()).or_insert(Value::Null), change),
        }
    }
}

/// A good manifest with one value changed, and the value's place as the API server writes it; `None` where the manifest has no such
/// value.
fn changed(base: &Value, path: &[String], change: &Change) -> Option<(Value, String)> {
    let mut manifest = base.clone();
    let place = change_at(&mut manifest, path, change)?;
    Some((manifest, place.trim_start_matches('.').to_owned()))
}

fn change_at(value: &mut Value, path: &[String], change: &Change) -> Option<String> {
    let Some((step, rest)) = path.split_first() else {
        match change {
            Is(new) => *value = new.clone(),
            Gets(fields) => merge(value, fields),
        }
        return Some(String::new());
    };
    match step.as_str() {
        // The first element that has what the rule is about.
        "[]" => value.as_array_mut()?.iter_mut().enumerate().find_map(|(index, element)| {
            let place = change_at(element, rest, change)?;
            Some(format!("[{index}]{place}"))
        }),
        "{}" => {
            let (name, inner) = value.as_object_mut()?.iter_mut().next()?;
            let place = change_at(inner, rest, change)?;
            Some(format!("[{name}]{place}"))
        }
        name => {
            let place = change_at(value.get_mut(name)?, rest, change)?;
            Some(format!(".{name}{place}"))
        }
    }
}

/// Good CacheClusters that together have every field that a rule is about.
fn clusters() -> Vec<Value> {
    let selector = json!({"podSelector": {"matchLabels": {"app": "shop"}}, "namespaceSelector": {"matchLabels": {"team": "a"}}});
    let full = json!({
        "apiVersion": "larder.dev/v1alpha1",
        "kind": "CacheCluster",
        "metadata": {"namespace": SHOP, "name": "main"},
        "spec": {
            "engine": {"kind": "Valkey", "version": "8.1", "image": "registry.example/valkey:8.1"},
            "mode": "Sentinel",
            "replicas": 2,
            "sentinels": 3,
            "memory": "256Mi",
            "eviction": "volatile-lfu",
            "parameters": {"hz": "20"},
            "auth": {"user": "app", "password": {"secretKeyRef": {"name": "login", "key": "password"}}},
            "storage": {"size": "1Gi", "class": "fast", "fsync": "EverySecond", "whenDeleted": "Retain"},
            "writes": {"minReplicas": 1, "maxLag": "10s"},
            "pod": {
                "labels": {"team": "a"},
                "annotations": {"team": "a"},
                "cpu": {"request": "100m", "limit": "1"},
                "nodeSelector": {"disk": "fast"},
                "tolerations": [
                    {"key": "dedicated", "operator": "Equal", "value": "cache", "effect": "NoExecute", "tolerationSeconds": 60},
                ],
                "spread": "Prefer",
                "priorityClassName": "high",
                "imagePullSecrets": [{"name": "registry"}],
            },
            "networkPolicy": {"from": [selector], "metricsFrom": [selector]},
            "tls": {"enabled": true, "rotation": "first"},
        },
    });
    let mut with_value = full.clone();
    with_value["spec"]["auth"]["password"] = json!({"value": "secret"});
    vec![full, with_value]
}

/// The same of CachePolicies.
fn policies() -> Vec<Value> {
    let policy = |url: Value| {
        let origin = json!({"url": url, "maxConnections": 2, "timeout": "2s", "connectTimeout": "1s"});
        json!({
            "apiVersion": "larder.dev/v1alpha1",
            "kind": "CachePolicy",
            "metadata": {"namespace": SHOP, "name": "catalog"},
            "spec": {
                "cacheCluster": "main",
                "workloads": {"matchLabels": {"app": "shop"}},
                "defaults": {"ttl": "5m", "maxTtl": "24h", "jitter": "10%", "ttlSweep": "10m", "patience": "8s", "unmatched": "Bypass"},
                "inject": {"env": "IfAbsent", "port": 6380, "socket": true},
                "origins": [{"name": "db", "sql": origin}, {"name": "api", "http": origin}],
                "rules": [
                    {
                        "name": "user",
                        "keys": "user:{id}",
                        "strategy": "ReadThrough",
                        "ttl": "10m",
                        "maxTtl": "1h",
                        "jitter": "10%",
                        "stale": "1m",
                        "negativeTtl": "10s",
                        "stampede": {"lease": "3s", "wait": "1s"},
                        "origin": {
                            "name": "db",
                            "read": "SELECT name FROM users WHERE id = $id",
                            "readMany": "SELECT id, name FROM users WHERE id = ANY($id)",
                            "as": "String",
                        },
                    },
                    {"name": "page", "keys": "page:{id}", "strategy": "ReadThrough", "origin": {"name": "api", "path": "/pages/{id}"}},
                    {
                        "name": "cart",
                        "keys": "cart:{id}",
                        "strategy": "WriteThrough",
                        "origin": {
                            "name": "db",
                            "read": "SELECT body FROM carts WHERE id = $id",
                            "write": "UPDATE carts SET body = $value WHERE id = $id RETURNING row_version",
                            "delete": "DELETE FROM carts WHERE id = $id",
                            "version": "row_version",
                        },
                    },
                    {
                        "name": "order",
                        "keys": "order:{id}",
                        "strategy": "WriteBehind",
                        "writeBehind": {
                            "journal": "main", "maxLag": "30s", "batch": 500, "maxDepth": 100_000, "maxBytes": "1Gi", "overflow": "Reject",
                        },
                        "origin": {
                            "name": "db",
                            "read": "SELECT body FROM orders WHERE id = $id",
                            "write": "UPDATE orders SET body = $value, row_version = $version WHERE id = $id AND row_version < $version",
                        },
                    },
                    {
                        "name": "session",
                        "keys": "session:{id}",
                        "strategy": "CacheAside",
                        "stampede": {"mode": "Lease", "lease": "3s", "wait": "1s", "earlyExpiry": 1.0, "atWaitEnd": "Miss"},
                    },
                ],
            },
        })
    };
    vec![policy(json!({"secretKeyRef": {"name": "origin", "key": "url"}})), policy(json!({"value": "x"}))]
}

/// Asks the API server whether it would take a new object.
async fn try_create(scene: &Scene, plural: &str, manifest: &Value) -> (u16, Value) {
    let path = format!("/apis/larder.dev/v1alpha1/namespaces/{SHOP}/{plural}?dryRun=All&fieldValidation=Strict");
    let (status, text) = scene.plane.request(Method::POST, &path, &[AS_JSON], Some(manifest)).await;
    (status, serde_json::from_str(&text).unwrap_or(Value::String(text)))
}

/// Asks the API server whether it would take a change of the object that exists.
async fn try_change(scene: &Scene, plural: &str, manifest: &Value) -> (u16, Value) {
    let name = manifest["metadata"]["name"].as_str().expect("a name");
    let path = format!("/apis/larder.dev/v1alpha1/namespaces/{SHOP}/{plural}/{name}?dryRun=All");
    // A patch leaves alone what it does not name.
    let mut patch = manifest.clone();
    let spec = patch["spec"].as_object_mut().expect("a specification");
    for field in ["storage", "sentinels"] {
        spec.entry(field).or_insert(Value::Null);
    }
    let (status, text) = scene.plane.request(Method::PATCH, &path, &[AS_MERGE_PATCH], Some(&patch)).await;
    (status, serde_json::from_str(&text).unwrap_or(Value::String(text)))
}

/// A place without the difference between a map's keys and an object's fields.
fn plain(place: &str) -> String {
    place.replace('[', ".").replace(']', "")
}

/// Whether a refusal says these words at this place.
fn says(refusal: &Value, place: &str, message: &str) -> bool {
    let causes = refusal["details"]["causes"].as_array();
    causes.into_iter().flatten().any(|cause| {
        let field = cause["field"].as_str().unwrap_or_default();
        let at_place = place.is_empty() || plain(field) == plain(place);
        at_place && cause["message"].as_str().is_some_and(|text| text.contains(message))
    })
}

/// Sees that the API server takes the manifests without a change.
async fn are_good(scene: &Scene, plural: &str, bases: &[Value]) {
    for base in bases {
        let (status, answer) = try_create(scene, plural, base).await;
        assert_eq!(status, 201, "{base}: {answer}");
    }
}

/// Breaks every rule of a definition. What went wrong, and how many changes were tried.
async fn break_all(scene: &Scene, plural: &str, bases: &[Value]) -> (Vec<String>, usize) {
    let path = format!("/apis/apiextensions.k8s.io/v1/customresourcedefinitions/{plural}.larder.dev");
    let definition = scene.plane.get(&path).await;
    let mut all = Vec::new();
    rules(&definition["spec"]["versions"][0]["schema"]["openAPIV3Schema"], &mut Vec::new(), &mut all);
    let (mut wrong, mut tried) = (Vec::new(), 0);
    for rule in &all {
        let changes = changes(&rule.message);
        if changes.is_empty() {
            wrong.push(format!("no change here breaks {rule:?}"));
        }
        for change in changes {
            let Some((manifest, place)) = bases.iter().find_map(|base| changed(base, &rule.path, &change)) else {
                wrong.push(format!("no good manifest has what this is about: {rule:?}"));
                continue;
            };
            let (status, answer) = if rule.transition {
                try_change(scene, plural, &manifest).await
            } else {
                try_create(scene, plural, &manifest).await
            };
            tried += 1;
            if status != 422 || !says(&answer, &place, &rule.message) {
                wrong.push(format!("{place}: {}: {status} {answer}", rule.message));
            }
        }
    }
    (wrong, tried)
}

#[tokio::test]
async fn every_rule_refuses_and_says_what_to_write() {
    let scene = Scene::start(&[SHOP]).await;
    are_good(&scene, "cacheclusters", &clusters()).await;
    are_good(&scene, "cachepolicies", &policies()).await;
    // For the rules that compare with what there is.
    scene.apply(&clusters()[0]).await.expect("a good manifest");
    let (wrong_clusters, tried_clusters) = break_all(&scene, "cacheclusters", &clusters()).await;
    let (wrong_policies, tried_policies) = break_all(&scene, "cachepolicies", &policies()).await;
    let wrong = [wrong_clusters, wrong_policies].concat();
    assert!(wrong.is_empty(), "{} of {}:\n{}", wrong.len(), tried_clusters + tried_policies, wrong.join("\n"));
    assert!(tried_clusters > 80 && tried_policies > 50, "{tried_clusters} and {tried_policies}: the definitions are not read");
}

#[tokio::test]
async fn wrong_values_and_unknown_fields_are_refused() {
    let scene = Scene::start(&[SHOP]).await;
    for (change, words) in [
        (json!({"mode": "Single"}), "spec.mode: Unsupported value"),
        (json!({"eviction": "oldest"}), "spec.eviction: Unsupported value"),
        (json!({"engine": {"kind": "Memcached"}}), "spec.engine.kind: Unsupported value"),
        (json!({"replicas": 0}), "spec.replicas in body should be greater than or equal to 1"),
        (json!({"replicas": 6}), "spec.replicas in body should be less than or equal to 5"),
        (json!({"sentinels": 1}), "spec.sentinels in body should be greater than or equal to 3"),
        (json!({"memory": null}), "spec.memory: Required value"),
        (json!({"replica": 2}), "unknown field \"spec.replica\""),
        (json!({"auth": {"passwort": "x"}}), "unknown field \"spec.auth.passwort\""),
    ] {
        let (manifest, _) = changed(&clusters()[0], &["spec".to_owned()], &Gets(change)).expect("a specification");
        let (status, answer) = try_create(&scene, "cacheclusters", &manifest).await;
        assert!(
            (400..=422).contains(&status) && answer["message"].as_str().unwrap_or_default().contains(words),
            "{words}: {answer}"
        );
    }
}
