//! Policies reach their workloads: from `kubectl apply` to what sidecars mount, and to what is told.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use k8s_openapi::ByteString;
use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::core::v1::{ConfigMap, Pod, Secret};
use k8s_openapi::jiff::Timestamp;
use kube::api::{DeleteParams, ListParams, Patch, PatchParams};
use larder::api::CachePolicy;
use larder::api::cache_policy::CachePolicyStatus;
use larder::policy::binding::BindingName;
use larder::policy::{Snapshot, Unmatched};
use serde_json::{Value, json};

use super::audit::Entry;
use super::forming;
use super::operator::Operator;
use super::scene::{Scene, cache_cluster, eventually, restricted};

const SHOP: &str = "shop";
/// Looks come when something changes; this is for machines that are busy.
const SOON: Duration = Duration::from_secs(90);
/// The most snapshots that are kept of a binding.
const HISTORY: usize = 5;
/// For how long a status stands at the least, but for what two clocks differ by meanwhile.
const APART: Duration = Duration::from_millis(9900);
/// How often the status of one policy is written at the least while it is delivered, gets sidecars, lacks a Secret and changes seven times.
const OFTEN: usize = 6;

fn deployment(name: &str) -> Value {
    let labels = json!({"app": name});
    json!({
        "apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"namespace": SHOP, "name": name},
        "spec": {
            "selector": {"matchLabels": labels},
            "template": {"metadata": {"labels": labels}, "spec": {"containers": [{"name": "app", "image": "app:1"}]}},
        },
    })
}

fn policy(name: &str, rules: &Value) -> Value {
    json!({
        "apiVersion": "larder.dev/v1alpha1", "kind": "CachePolicy", "metadata": {"namespace": SHOP, "name": name},
        "spec": {"cacheCluster": "main", "workloads": {"matchLabels": {"app": "web"}}, "rules": rules},
    })
}

/// A policy that loads what is missing from a database whose URL is in the Secret `shop-db`.
pub fn loading(name: &str, ttl: &str) -> Value {
    let mut policy = policy(
        name,
        &json!([{"name": "user", "keys": "user:{id}", "strategy": "ReadThrough", "ttl": ttl,
            "origin": {"name": "db", "read": "SELECT name FROM users WHERE id = $id"}}]),
    );
    let url = json!({"secretKeyRef": {"name": "shop-db", "key": "url"}});
    policy["spec"]["origins"] = json!([{"name": "db", "sql": {"url": url, "maxConnections": 4, "maxTotalConnections": 50}}]);
    policy
}

/// The same from a Secret that is not there.
fn elsewhere(name: &str) -> Value {
    let mut policy = loading(name, "10m");
    policy["spec"]["origins"][0]["sql"]["url"]["secretKeyRef"]["name"] = json!("nowhere");
    policy
}

/// A policy of one rule.
fn covering(name: &str, keys: &str) -> Value {
    policy(name, &json!([{"name": "only", "keys": keys, "strategy": "CacheAside"}]))
}

fn database(url: &str) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Secret", "metadata": {"namespace": SHOP, "name": "shop-db"}, "stringData": {"url": url},
    })
}

fn binding() -> BindingName {
    BindingName::of("Deployment", "web", "main")
}

/// What lies ready for the sidecars of the Deployment.
struct Lying {
    snapshot: Snapshot,
    map: ConfigMap,
    entries: BTreeMap<String, String>,
}

async fn lying(scene: &Scene) -> Result<Lying, String> {
    let name = binding().object_name();
    let map = scene.api::<ConfigMap>(SHOP).get(&name).await.map_err(|error| error.to_string())?;
    let secret = scene.api::<Secret>(SHOP).get(&name).await.map_err(|error| error.to_string())?;
    let text = map.data.as_ref().and_then(|data| data.get("snapshot.json")).ok_or("no snapshot")?;
    let snapshot = Snapshot::parse(text.as_bytes()).map_err(|error| error.to_string())?;
    let text = |ByteString(bytes): ByteString| String::from_utf8(bytes).expect("a text");
    let entries = secret.data.unwrap_or_default().into_iter().map(|(name, bytes)| (name, text(bytes))).collect();
    Ok(Lying { snapshot, map, entries })
}

/// Waits until what lies ready is as wanted.
async fn await_lying(scene: &Scene, operator: &Operator, what: &str, wanted: impl Fn(&Lying) -> bool) -> Lying {
    eventually(what, SOON, async || {
        let lying = lying(scene).await.map_err(|error| format!("{error}\n{}", operator.log_end()))?;
        if wanted(&lying) { Ok(lying) } else { Err(format!("{:#?}\n{}", lying.snapshot, operator.log_end())) }
    })
    .await
}

fn keys(lying: &Lying) -> Vec<String> {
    lying.snapshot.rules.iter().map(|rule| rule.keys.to_string()).collect()
}

/// Waits until a policy's status is about its present generation, and as wanted.
async fn await_policy(
    scene: &Scene,
    operator: &Operator,
    name: &str,
    what: &str,
    wanted: impl Fn(&CachePolicyStatus) -> bool,
) -> CachePolicyStatus {
    let api = scene.api::<CachePolicy>(SHOP);
    eventually(&format!("{name}: {what}"), SOON, async || {
        let policy = api.get(name).await.map_err(|error| error.to_string())?;
        let status = policy.status.unwrap_or_default();
        if status.observed_generation == policy.metadata.generation && wanted(&status) {
            return Ok(status);
        }
        Err(format!("{status:#?}\n{}", operator.log_end()))
    })
    .await
}

/// The status and the reason of each condition.
fn reasons(status: &CachePolicyStatus) -> Vec<(&str, &str)> {
    status.conditions.iter().map(|condition| (condition.status.as_str(), condition.reason.as_str())).collect()
}

fn message<'a>(status: &'a CachePolicyStatus, kind: &str) -> &'a str {
    status.conditions.iter().find(|condition| condition.type_ == kind).map_or("", |condition| &condition.message)
}

/// Whether servers and sentinels have the binding's user, as the operator wrote it.
async fn user_rules(scene: &Scene) -> Option<String> {
    let secret = scene.api::<Secret>(SHOP).get("main-users").await.expect("a Secret");
    let files = secret.data.unwrap_or_default();
    let lines: Vec<String> = files
        .values()
        .flat_map(|ByteString(bytes)| String::from_utf8_lossy(bytes).lines().map(str::to_owned).collect::<Vec<_>>())
        .collect();
    lines.into_iter().find(|line| line.starts_with(&format!("user {} ", binding().user())) && line.contains("~larder:"))
}

fn sentinels_know(scene: &Scene) -> usize {
    let told = scene.stage.with(SHOP, "main", |tier| tier.users_on_sentinels());
    told.iter().filter(|users| users.contains(&binding().user())).count()
}

/// A tier, a Deployment, and an operator.
async fn begin() -> (Scene, Operator) {
    let scene = Scene::start(&[SHOP]).await;
    let operator = scene.operator();
    scene.apply(&cache_cluster(SHOP, "main")).await.expect("applied");
    let account = json!({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "default", "namespace": SHOP}});
    scene.apply(&account).await.expect("an account");
    scene.apply(&deployment("web")).await.expect("a Deployment");
    scene.await_ready(&operator, SHOP, "main").await;
    (scene, operator)
}

/// A Deployment and a policy for it, beside a tier that stands.
pub async fn begin_with_policy(scene: &Scene, operator: &Operator) {
    scene.apply(&deployment("web")).await.expect("a Deployment");
    scene.apply(&database("postgres://app:hidden@db/shop")).await.expect("a Secret");
    scene.apply(&loading("users", "10m")).await.expect("a policy");
    await_lying(scene, operator, "a snapshot", |lying| keys(lying) == ["user:{id}"]).await;
    // The snapshot lies there before servers know its user; then that is told.
    await_policy(scene, operator, "users", "delivered", |status| status.summary.as_deref() == Some("Delivered")).await;
}

/// Deletes that policy.
pub async fn end(scene: &Scene) {
    scene.api::<CachePolicy>(SHOP).delete("users", &DeleteParams::default()).await.expect("deleted");
}

/// A policy that writes behind, beside a tier that keeps what it acknowledges.
fn behind() -> Value {
    let mut behind = loading("behind", "10m");
    behind["spec"]["rules"][0]["keys"] = json!("behind:{id}");
    behind["spec"]["rules"][0]["strategy"] = json!("WriteBehind");
    let write = "INSERT INTO users VALUES ($id, $value, $version) ON CONFLICT (id) DO UPDATE SET name = $value, row_version = $version \
                 WHERE users.row_version < $version";
    behind["spec"]["rules"][0]["origin"]["write"] = json!(write);
    behind
}

/// A policy that writes behind gets a relay. It is deleted, waits for a cache that nobody can ask, and is given up.
pub async fn behind_comes_and_goes(scene: &Scene, operator: &Operator) {
    scene.apply(&behind()).await.expect("a policy");
    await_policy(scene, operator, "behind", "accepted", |status| reasons(status).contains(&("True", "Accepted"))).await;
    let relay = BindingName::of("CachePolicy", "behind", "main");
    let deployments = scene.api::<Deployment>(SHOP);
    let name = format!("larder-r-{relay}");
    eventually("a relay", SOON, async || deployments.get(&name).await.map(drop).map_err(|error| error.to_string())).await;
    let policies = scene.api::<CachePolicy>(SHOP);
    policies.delete("behind", &DeleteParams::default()).await.expect("deleted");
    let draining = |status: &CachePolicyStatus| status.summary.as_deref() == Some("Draining");
    let status = await_policy(scene, operator, "behind", "draining", draining).await;
    assert!(message(&status, "Carried").contains("how much is left is not known"), "{status:#?}");
    let patch = Patch::Merge(json!({"metadata": {"annotations": {"larder.dev/abandon-journal": "true"}}}));
    policies.patch("behind", &PatchParams::default(), &patch).await.expect("annotated");
    eventually("it is gone", SOON, async || match policies.get_opt("behind").await {
        Ok(None) => Ok(()),
        found => Err(format!("{found:#?}\n{}", operator.log_end())),
    })
    .await;
    let left = deployments.get_opt(&name).await.expect("an answer");
    assert!(left.is_none(), "{left:#?}");
}

/// Everything is there before the first pod.
async fn arrives(scene: &Scene, operator: &Operator) -> Lying {
    scene.apply(&database("postgres://app:hidden@db/shop")).await.expect("a Secret");
    scene.apply(&loading("users", "10m")).await.expect("a policy");
    let lying = await_lying(scene, operator, "a snapshot", |lying| keys(lying) == ["user:{id}"]).await;
    let owner = lying.map.metadata.owner_references.as_ref().and_then(|owners| owners.first()).expect("an owner");
    let uid = scene.api::<Deployment>(SHOP).get("web").await.expect("a Deployment").metadata.uid;
    assert_eq!((owner.kind.as_str(), Some(&owner.uid)), ("Deployment", uid.as_ref()));
    assert_eq!(lying.entries.get("username"), Some(&binding().user()));
    assert!(lying.entries.values().any(|url| url == "postgres://app:hidden@db/shop"), "{:?}", lying.entries.keys());
    let text = serde_json::to_string(&lying.map).expect("JSON");
    assert!(!text.contains("hidden") && !text.contains(&lying.entries["password"]), "{text}");
    // The first snapshot lies there before servers let its sidecars in, which is told.
    let status =
        await_policy(scene, operator, "users", "delivered", |status| status.summary.as_deref() == Some("Delivered")).await;
    let rules = user_rules(scene).await.expect("a user");
    assert!(rules.contains("~user:[^:]*"), "{rules}");
    assert_eq!(sentinels_know(scene), 3);
    assert_eq!(reasons(&status), [("True", "Accepted"), ("True", "ResolvedRefs"), ("True", "Delivered")]);
    let workloads = status.workloads.expect("workloads");
    assert_eq!((workloads.matched, workloads.names), (1, vec!["Deployment/web".to_owned()]));
    assert_eq!(workloads.generation, Some(lying.snapshot.generation));
    lying
}

/// A pod of the Deployment with a sidecar, as the injector would make it.
async fn counts_pods(scene: &Scene, operator: &Operator) {
    let labels = json!({"app": "web", "pod-template-hash": "6f7c", "larder.dev/binding": binding().as_str()});
    let owner = json!({"apiVersion": "apps/v1", "kind": "ReplicaSet", "name": "web-6f7c", "uid": "1", "controller": true});
    for name in ["web-6f7c-a", "web-6f7c-b"] {
        let pod = json!({
            "apiVersion": "v1", "kind": "Pod",
            "metadata": {"namespace": SHOP, "name": name, "labels": labels, "ownerReferences": [owner]},
            "spec": {"containers": [{"name": "app", "image": "app:1", "securityContext": restricted()}]},
        });
        scene.apply(&pod).await.expect("a pod");
    }
    let total = |status: &CachePolicyStatus| status.sidecars.as_ref().map(|sidecars| sidecars.total);
    let status = await_policy(scene, operator, "users", "two sidecars", |status| total(status) == Some(2)).await;
    let connections = status.connections.expect("an origin");
    assert_eq!((connections.per_sidecar, connections.fleet), (4, 8));
}

/// Rights that a running workload gains are in force, and told on, while no kubelet has brought the servers' files: the servers are told at
/// once, each once its agent leaves alone what it is told.
async fn gains_rights(scene: &Scene, operator: &Operator) -> Lying {
    let tier = |late: bool| {
        scene.stage.with(SHOP, "main", |tier| {
            tier.users_are_late = late;
            (tier.users_in_files(), tier.told_to_servers(&binding().user()))
        })
    };
    let (before, _) = tier(true);
    scene.apply(&covering("pages", "page:{path…}")).await.expect("a policy");
    let both = await_lying(scene, operator, "both policies", |lying| lying.snapshot.rules.len() == 2).await;
    let (files, told) = tier(true);
    assert_eq!(files, before, "no file has come");
    let knows =
        |rules: &Option<String>| rules.as_ref().is_some_and(|rules| rules.contains(" ~page:?* ") && rules.contains(" ~user:"));
    assert!(told.len() == 2 && told.iter().all(knows), "{told:?}");
    tier(false);
    // The kubelet is played by what changes: this is the next change of that tier's objects.
    let label = json!({"metadata": {"labels": {"touched": "yes"}}});
    let secrets = scene.api::<Secret>(SHOP);
    secrets.patch("main-users", &PatchParams::default(), &Patch::Merge(label)).await.expect("touched");
    eventually("the files say the same", SOON, async || {
        let (files, told) = tier(false);
        if files > before && told == [None, None] { Ok(()) } else { Err(format!("{files:?} {told:?}\n{}", operator.log_end())) }
    })
    .await;
    both
}

/// Of several policies one snapshot is made, and who takes another's keys is told.
async fn merge(scene: &Scene, operator: &Operator, first: &Lying) {
    let both = gains_rights(scene, operator).await;
    assert!(both.snapshot.generation > first.snapshot.generation);
    assert_eq!(both.entries, first.entries, "the login stays");
    assert!(user_rules(scene).await.expect("a user").contains("~page:?*"));
    scene.apply(&covering("thief", "user:{name}")).await.expect("a policy");
    let status = await_policy(scene, operator, "thief", "refused", |status| status.summary.as_deref() == Some("Overlap")).await;
    assert_eq!(reasons(&status)[0], ("False", "Overlap"));
    let told = message(&status, "Accepted");
    assert!(told.contains("the CachePolicy `users`, which is older") && told.contains("for Deployment web"), "{told}");
    assert_eq!(lying(scene).await.ok().map(|lying| lying.snapshot), Some(both.snapshot), "nothing came of it");
    scene.api::<CachePolicy>(SHOP).delete("thief", &DeleteParams::default()).await.expect("deleted");
}

/// Where a Secret is gone, rules go on with the URL that was in it, which is told, and other policies change; a URL that changes reaches
/// sidecars by its file alone. What never had a URL waits, and others with it, as they are told.
async fn misses(scene: &Scene, operator: &Operator) {
    let before = lying(scene).await.unwrap_or_else(|error| panic!("{error}"));
    scene.api::<Secret>(SHOP).delete("shop-db", &DeleteParams::default()).await.expect("deleted");
    let status =
        await_policy(scene, operator, "users", "missing", |status| status.summary.as_deref() == Some("SecretNotFound")).await;
    assert_eq!(reasons(&status)[..2], [("True", "Accepted"), ("False", "SecretNotFound")]);
    assert!(message(&status, "ResolvedRefs").ends_with("its rules go on with the URL that was there last"), "{status:?}");
    let during = lying(scene).await.unwrap_or_else(|error| panic!("{error}"));
    assert_eq!((during.snapshot, &during.entries), (before.snapshot.clone(), &before.entries));
    scene.apply(&covering("pages", "site:{path…}")).await.expect("a policy");
    let before = await_lying(scene, operator, "another's change", |lying| keys(lying) == ["user:{id}", "site:{path…}"]).await;
    assert_eq!(before.entries, during.entries);
    scene.apply(&elsewhere("users")).await.expect("a policy");
    await_policy(scene, operator, "users", "waiting", |status| message(status, "ResolvedRefs").contains("`nowhere`")).await;
    scene.apply(&covering("pages", "page:{path…}")).await.expect("a policy");
    let status = await_policy(scene, operator, "pages", "waiting", |status| status.summary.as_deref() == Some("Waiting")).await;
    assert_eq!(reasons(&status)[2], ("False", "WaitsForPolicy"));
    assert!(message(&status, "Delivered").contains("the CachePolicy `users`"), "{status:?}");
    assert_eq!(lying(scene).await.ok().map(|lying| lying.snapshot), Some(before.snapshot), "nothing came of either");
    scene.apply(&loading("users", "10m")).await.expect("a policy");
    let before = await_lying(scene, operator, "both", |lying| keys(lying) == ["user:{id}", "page:{path…}"]).await;
    scene.apply(&database("postgres://app:other@db/shop")).await.expect("a Secret");
    let has_other = |lying: &Lying| lying.entries.values().any(|url| url == "postgres://app:other@db/shop");
    let after = await_lying(scene, operator, "the other URL", has_other).await;
    assert_eq!(after.snapshot, before.snapshot, "no sidecar need hear of it");
    await_policy(scene, operator, "users", "whole again", |status| status.summary.as_deref() == Some("Delivered")).await;
}

/// What events say of the anti-patterns of a policy, and how often each was told.
async fn anti_patterns(scene: &Scene, name: &str) -> Vec<(String, u64)> {
    let events = scene.plane.get(&format!("/apis/events.k8s.io/v1/namespaces/{SHOP}/events")).await;
    let is_about = |event: &&Value| {
        event["reason"] == "AntiPattern" && event["regarding"]["kind"] == "CachePolicy" && event["regarding"]["name"] == name
    };
    let told = events["items"].as_array().into_iter().flatten().filter(is_about).map(|event| {
        assert_eq!(event["type"], "Warning", "{event}");
        (event["note"].as_str().unwrap_or_default().to_owned(), event["series"]["count"].as_u64().unwrap_or(1))
    });
    told.collect()
}

/// What its users will regret is told of a policy that is accepted: two kinds, each once.
async fn advises(scene: &Scene, operator: &Operator) {
    let rule =
        |name: &str, ttl: &str| json!({"name": name, "keys": format!("{name}:{{id}}"), "strategy": "CacheAside", "ttl": ttl});
    let mut regretted = policy("regretted", &json!([rule("old", "48h"), rule("older", "72h")]));
    regretted["spec"]["defaults"] = json!({"jitter": "0%"});
    scene.apply(&regretted).await.expect("a policy");
    await_policy(scene, operator, "regretted", "delivered", |status| status.summary.as_deref() == Some("Delivered")).await;
    let mut told = anti_patterns(scene, "regretted").await;
    told.sort_unstable();
    assert!(told.len() == 2 && told.iter().all(|(_, count)| *count == 1), "{told:?}");
    assert!(
        told[0].0.starts_with("long-ttl: spec.rules[0].ttl: ") && told[0].0.ends_with("; likewise spec.rules[1].ttl"),
        "{told:?}"
    );
    assert!(told[1].0.starts_with("no-jitter: spec.defaults.jitter: "), "{told:?}");
}

async fn histories(scene: &Scene) -> Vec<ConfigMap> {
    let labelled = ListParams::default().labels("larder.dev/content=history");
    scene.api::<ConfigMap>(SHOP).list(&labelled).await.expect("a list").items
}

/// Each change has a generation of its own, and not all of them are kept for ever.
pub async fn changes_often(scene: &Scene, operator: &Operator) {
    let mut newest = lying(scene).await.map_or(0, |lying| lying.snapshot.generation);
    for minutes in 20..27 {
        scene.apply(&loading("users", &format!("{minutes}m"))).await.expect("a policy");
        let text = format!(r#""default":"{minutes}m""#);
        let has_ttl = |lying: &Lying| serde_json::to_string(&lying.snapshot).is_ok_and(|json| json.contains(&text));
        let lying = await_lying(scene, operator, "another TTL", has_ttl).await;
        assert!(lying.snapshot.generation > newest);
        newest = lying.snapshot.generation;
    }
    eventually("few snapshots are kept", SOON, async || {
        let kept = histories(scene).await;
        let has_newest =
            kept.iter().any(|map| map.metadata.name.as_deref().is_some_and(|name| name.ends_with(&format!(".g{newest}"))));
        let immutable = kept.iter().all(|map| map.immutable == Some(true));
        if kept.len() == HISTORY && has_newest && immutable {
            Ok(())
        } else {
            Err(format!("{} are\n{}", kept.len(), operator.log_end()))
        }
    })
    .await;
}

/// No status is written again within ten seconds by one operator, however often something changes.
fn statuses_are_kept_apart(asked: &[Entry]) {
    let mut written: BTreeMap<&str, Vec<Timestamp>> = BTreeMap::new();
    for entry in asked.iter().filter(|entry| entry.right() == "patch larder.dev/cachepolicies/status") {
        if entry.response_status.code == 200 {
            written.entry(&entry.object_ref.name).or_default().push(entry.at.0);
        }
    }
    let requests: BTreeSet<(String, u16)> = asked.iter().map(|entry| (entry.right(), entry.response_status.code)).collect();
    assert!(written.values().any(|times| times.len() >= OFTEN), "{written:?} of {requests:?}");
    for (policy, times) in &mut written {
        times.sort_unstable();
        let soonest = times.windows(2).map(|pair| pair[1].duration_since(pair[0])).min();
        assert!(soonest.is_none_or(|soonest| soonest.unsigned_abs() >= APART), "{policy}: {soonest:?} in {times:?}");
    }
}

/// Another operator takes up where this one ended.
async fn outlives_the_operator(scene: &Scene, operator: Operator) -> Operator {
    let before = lying(scene).await.unwrap_or_else(|error| panic!("{error}"));
    let version = before.map.metadata.resource_version.clone();
    operator.stop();
    let operator = scene.operator();
    eventually("policies are looked at", SOON, async || {
        let looks = operator.figure("larder_operator_policy_looks_total", Some("ok")).await;
        let bindings = operator.figure("larder_operator_bindings", None).await;
        if looks > Some(1.0) && bindings == Some(1.0) { Ok(()) } else { Err(format!("{looks:?}\n{}", operator.log_end())) }
    })
    .await;
    scene.await_looks(&operator, 1).await;
    let after = lying(scene).await.unwrap_or_else(|error| panic!("{error}"));
    assert_eq!(after.map.metadata.resource_version, version, "it writes what is there already");
    assert_eq!(after.entries, before.entries);
    // What somebody removes comes back as it was.
    scene.api::<ConfigMap>(SHOP).delete(&binding().object_name(), &DeleteParams::default()).await.expect("deleted");
    let back = await_lying(scene, &operator, "the ConfigMap", |_| true).await;
    assert_eq!(back.snapshot, after.snapshot);
    scene.apply(&loading("users", "30m")).await.expect("a policy");
    await_lying(scene, &operator, "a newer one", |lying| lying.snapshot.generation > before.snapshot.generation).await;
    operator
}

fn hash(password: &str) -> String {
    format!("#{}", larder::policy::digest::sha256(password.as_bytes()))
}

/// Waits until the Secret has another password than `before`. Servers take both by then.
async fn await_password(scene: &Scene, operator: &Operator, before: &str) -> Lying {
    let is_other = |lying: &Lying| lying.entries.get("password").is_some_and(|password| password != before);
    let after = await_lying(scene, operator, "another password", is_other).await;
    assert!(!after.entries.contains_key("next-password"));
    assert_eq!(after.entries["password"], after.entries["sentinel-password"]);
    let rules = user_rules(scene).await.expect("a user");
    assert!(rules.contains(&hash(before)) && rules.contains(&hash(&after.entries["password"])), "{rules}");
    after
}

/// Who asks for another password gets one, and who deletes the Secret cuts nobody off.
async fn changes_passwords(scene: &Scene, operator: Operator) -> Operator {
    let (secrets, name) = (scene.api::<Secret>(SHOP), binding().object_name());
    let before = lying(scene).await.unwrap_or_else(|error| panic!("{error}"));
    let asked = json!({"metadata": {"annotations": {"larder.dev/rotate-password": "today"}}});
    secrets.patch(&name, &PatchParams::default(), &Patch::Merge(asked)).await.expect("annotated");
    let rotated = await_password(scene, &operator, &before.entries["password"]).await;
    assert_eq!(rotated.snapshot, before.snapshot, "no sidecar need hear of it otherwise");
    let annotations = secrets.get(&name).await.expect("a Secret").metadata.annotations.unwrap_or_default();
    assert_eq!(annotations.get("larder.dev/password-rotated-for").map(String::as_str), Some("today"));
    assert!(annotations.contains_key("larder.dev/password-since"), "{annotations:?}");

    let uid = async || secrets.get(&name).await.ok().and_then(|secret| secret.metadata.uid);
    let first = uid().await;
    secrets.delete(&name, &DeleteParams::default()).await.expect("deleted");
    eventually("the Secret is back", SOON, async || {
        let now = uid().await;
        if now.is_some() && now != first { Ok(()) } else { Err(operator.log_end()) }
    })
    .await;
    let back = lying(scene).await.unwrap_or_else(|error| panic!("{error}"));
    assert_eq!(back.entries, rotated.entries, "the operator remembers it");

    operator.stop();
    secrets.delete(&name, &DeleteParams::default()).await.expect("deleted");
    let operator = scene.operator();
    await_password(scene, &operator, &back.entries["password"]).await;
    operator
}

/// The last policy leaves a farewell, and the user its keys; the workload takes everything with it.
async fn ends(scene: &Scene, operator: &Operator) {
    let before = lying(scene).await.unwrap_or_else(|error| panic!("{error}"));
    let rules = user_rules(scene).await;
    for name in ["users", "pages"] {
        scene.api::<CachePolicy>(SHOP).delete(name, &DeleteParams::default()).await.expect("deleted");
    }
    let last = await_lying(scene, operator, "a farewell", |lying| lying.snapshot.rules.is_empty()).await;
    assert!(last.snapshot.generation > before.snapshot.generation);
    assert!(matches!(last.snapshot.unmatched, Unmatched::Ttl(_)), "{:?}", last.snapshot.unmatched);
    assert_eq!(last.entries["password"], before.entries["password"]);
    scene.await_looks(operator, 1).await;
    let now = user_rules(scene).await.expect("a user");
    // `pages` may have been alone for a moment; what it had still works.
    let still = |rule: &str| now.contains(rule) || !rules.as_ref().is_some_and(|rules| rules.contains(rule));
    assert!(still("~user:[^:]*") && still("~page:?*"), "the application goes on: {now}");

    scene.api::<Deployment>(SHOP).delete("web", &DeleteParams::default()).await.expect("deleted");
    let pods = scene.api::<Pod>(SHOP);
    for name in ["web-6f7c-a", "web-6f7c-b"] {
        pods.delete(name, &DeleteParams { grace_period_seconds: Some(0), ..DeleteParams::default() }).await.expect("deleted");
    }
    // As Kubernetes' garbage collection would.
    let of_binding = ListParams::default().labels(&format!("larder.dev/binding={}", binding()));
    scene.api::<ConfigMap>(SHOP).delete_collection(&DeleteParams::default(), &of_binding).await.expect("deleted");
    scene.api::<Secret>(SHOP).delete_collection(&DeleteParams::default(), &of_binding).await.expect("deleted");
    eventually("the user is gone", SOON, async || {
        let (servers, sentinels) = (user_rules(scene).await, sentinels_know(scene));
        if servers.is_none() && sentinels == 0 { Ok(()) } else { Err(format!("{servers:?} {sentinels}\n{}", operator.log_end())) }
    })
    .await;
    assert!(lying(scene).await.is_err(), "nothing comes back");
}

#[tokio::test]
async fn policies_reach_their_workloads_and_leave_them() {
    let (scene, operator) = begin().await;
    let first = arrives(&scene, &operator).await;
    counts_pods(&scene, &operator).await;
    merge(&scene, &operator, &first).await;
    misses(&scene, &operator).await;
    changes_often(&scene, &operator).await;
    advises(&scene, &operator).await;
    statuses_are_kept_apart(&scene.plane.audit());
    let operator = outlives_the_operator(&scene, operator).await;
    assert_eq!(anti_patterns(&scene, "regretted").await.len(), 2, "the next operator knows that they were told");
    scene.api::<CachePolicy>(SHOP).delete("regretted", &DeleteParams::default()).await.expect("deleted");
    await_lying(&scene, &operator, "without it", |lying| lying.snapshot.rules.len() == 2).await;
    let operator = changes_passwords(&scene, operator).await;
    // Its status is written at most every ten seconds.
    await_policy(&scene, &operator, "users", "told", |status| status.summary.as_deref() == Some("Delivered")).await;
    forming::nothing_is_written(&scene, &operator).await;
    ends(&scene, &operator).await;
    let refused = scene.plane.audit().into_iter().filter(|entry| entry.response_status.code == 403);
    assert_eq!(refused.map(|entry| entry.right()).collect::<Vec<_>>(), Vec::<String>::new());
    operator.stop();
}
