//! Why policies are not in force: each reason of a CachePolicy's conditions that somebody can come to, with what is said and what to do.
//!
//! `Overlap` among several policies, `WaitsForPolicy` and what becomes of a Secret that goes are in [`super::policies`], `Unreadable` in
//! [`super::odd_policies`].

use std::collections::BTreeMap;
use std::time::Duration;

use k8s_openapi::api::core::v1::ConfigMap;
use kube::api::DeleteParams;
use larder::api::CachePolicy;
use larder::api::cache_policy::CachePolicyStatus;
use larder::policy::binding::BindingName;
use serde_json::{Value, json};

use super::operator::Operator;
use super::scene::{Scene, cache_cluster, eventually};

const SHOP: &str = "shop";
const SOON: Duration = Duration::from_secs(120);
/// Workloads whose users together have more patterns than a CacheCluster has room for: each has some 63 KiB of them, of 64, and all share 800.
const CROWD: usize = 14;

/// A policy, the status and the reason of its three conditions, the one whose message counts, and words of that.
type Said = (&'static str, [(&'static str, &'static str); 3], &'static str, &'static [&'static str]);

const SAID: &[Said] = &[
    (
        "overlap",
        [("False", "Overlap"), ("True", "ResolvedRefs"), ("False", "NotInForce")],
        "Accepted",
        &[
            "the rule `only` (user:{name}) and the rule `only` (user:{id}) of the CachePolicy `first`, which is older, both cover keys such as \
             `user:x` for Deployment web: `first` stays in force; narrow one of the patterns, or bring both rules into one policy",
        ],
    ),
    (
        "two-clusters",
        [("False", "TwoClusters"), ("False", "CacheClusterNotFound"), ("False", "NotInForce")],
        "Accepted",
        &[
            "Deployment web follows the CachePolicy `first`, which is older and names the CacheCluster `main`, and a workload uses one \
             CacheCluster: name `main` here too, or select other workloads",
        ],
    ),
    (
        "invalid",
        [("False", "InvalidSpec"), ("True", "ResolvedRefs"), ("False", "NotInForce")],
        "Accepted",
        &["spec.rules[0].keys: `id` and `name` stand side by side; put at least one byte between two parts"],
    ),
    (
        "large",
        [("False", "TooLarge"), ("True", "ResolvedRefs"), ("False", "NotInForce")],
        "Accepted",
        &[
            "with this policy the snapshot of Deployment large would have",
            "bytes and 240 rules, more than 921600 bytes or 1000 rules: shorten its statements, or bring rules together",
        ],
    ),
    (
        "wide",
        [("False", "TooManyKeys"), ("True", "ResolvedRefs"), ("False", "NotInForce")],
        "Accepted",
        &[
            "with this policy the patterns of Deployment wide would be",
            "bytes of access rules, more than 65536",
            "bring patterns together, such as user:{id…}",
        ],
    ),
    (
        "lost",
        [("True", "Accepted"), ("False", "CacheClusterNotFound"), ("False", "NotInForce")],
        "ResolvedRefs",
        &[
            "there is no CacheCluster `absent` in this namespace: create it, or name another in spec.cacheCluster",
            "until then the last good snapshot stays in force",
        ],
    ),
    (
        "early",
        [("True", "Accepted"), ("False", "CacheClusterNotReady"), ("False", "NotInForce")],
        "ResolvedRefs",
        &["the CacheCluster `refused` is being formed and has no address yet: its own status tells how far it is"],
    ),
    (
        "no-secret",
        [("True", "Accepted"), ("False", "SecretNotFound"), ("False", "NotInForce")],
        "ResolvedRefs",
        &["spec.origins `db` names the Secret `nowhere`, which does not exist: create it, with the URL under `url`"],
    ),
    (
        "no-entry",
        [("True", "Accepted"), ("False", "SecretKeyNotFound"), ("False", "NotInForce")],
        "ResolvedRefs",
        &["spec.origins `db` names the entry `url` of the Secret `other`, which has none: add it, or name another"],
    ),
    (
        "no-url",
        [("True", "Accepted"), ("False", "InvalidSecret"), ("False", "NotInForce")],
        "ResolvedRefs",
        &["the entry `url` of the Secret `spoiled` holds no URL for spec.origins `db`: write postgres://… or sqlite://…"],
    ),
    (
        "nobody",
        [("True", "Accepted"), ("True", "ResolvedRefs"), ("False", "NoWorkload")],
        "Delivered",
        &["no Deployment, StatefulSet, DaemonSet or CronJob makes pods with these labels", "see spec.workloads"],
    ),
    (
        "taken",
        [("True", "Accepted"), ("True", "ResolvedRefs"), ("False", "NotWritten")],
        "Delivered",
        &["for Deployment/taken: ConfigMap larder-b-taken-", " exists and does not belong to ", "rename or delete it"],
    ),
];

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

/// A policy for the pods of a Deployment.
fn policy(name: &str, app: &str, cluster: &str, rules: &Value) -> Value {
    json!({
        "apiVersion": "larder.dev/v1alpha1", "kind": "CachePolicy", "metadata": {"namespace": SHOP, "name": name},
        "spec": {"cacheCluster": cluster, "workloads": {"matchLabels": {"app": app}}, "rules": rules},
    })
}

fn covering(name: &str, app: &str, cluster: &str, keys: &str) -> Value {
    policy(name, app, cluster, &json!([{"name": "only", "keys": keys, "strategy": "CacheAside"}]))
}

/// A policy that loads from a database by statements of some length, whose URL is in a Secret.
fn loading(name: &str, secret: &str, statements: usize, length: usize) -> Value {
    let rule = |number: usize| {
        json!({"name": format!("rule-{number}"), "keys": format!("{name}-{number}:{{id}}"), "strategy": "ReadThrough",
            "origin": {"name": "db", "read": format!("SELECT '{}' WHERE 1 = $id", "x".repeat(length))}})
    };
    let mut policy = policy(name, name, "main", &(0..statements).map(rule).collect());
    policy["spec"]["origins"] = json!([{"name": "db", "sql": {"url": {"secretKeyRef": {"name": secret, "key": "url"}}}}]);
    policy
}

/// A policy of so many patterns of nearly the greatest length.
fn wide(name: &str, patterns: usize) -> Value {
    let rule = |number: usize| json!({"name": format!("rule-{number}"), "keys": format!("{number}:{}:{{id}}", "k".repeat(470)), "strategy": "CacheAside"});
    policy(name, name, "main", &(0..patterns).map(rule).collect())
}

fn secret(name: &str, entry: &str, text: &str) -> Value {
    json!({"apiVersion": "v1", "kind": "Secret", "metadata": {"namespace": SHOP, "name": name}, "stringData": {entry: text}})
}

/// Everything that the policies of [`SAID`] are about, but for what they say is missing.
fn around() -> Vec<Value> {
    let mut refused = cache_cluster(SHOP, "refused");
    refused["spec"]["eviction"] = "allkeys-lru".into();
    refused["spec"]["auth"] = json!({"password": {"secretKeyRef": {"name": "nowhere-either", "key": "password"}}});
    let taken = json!({
        "apiVersion": "v1", "kind": "ConfigMap", "data": {"of": "somebody else"},
        "metadata": {"namespace": SHOP, "name": BindingName::of("Deployment", "taken", "main").object_name()},
    });
    let secrets = [
        secret("shop-db", "url", "postgres://app:hidden@db/shop"),
        secret("other", "uri", "postgres://app:hidden@db/shop"),
        secret("spoiled", "url", "hidden"),
    ];
    let names = ["web", "invalid", "large", "wide", "lost", "early", "no-secret", "no-entry", "no-url", "taken"];
    names.map(deployment).into_iter().chain(secrets).chain([refused, taken]).collect()
}

fn policies() -> Vec<Value> {
    vec![
        covering("overlap", "web", "main", "user:{name}"),
        covering("two-clusters", "web", "absent", "page:{path…}"),
        covering("invalid", "invalid", "main", "{id}{name}"),
        loading("large", "shop-db", 240, 4000),
        wide("wide", 150),
        covering("lost", "lost", "absent", "user:{id}"),
        covering("early", "early", "refused", "user:{id}"),
        loading("no-secret", "nowhere", 1, 1),
        loading("no-entry", "other", 1, 1),
        loading("no-url", "spoiled", 1, 1),
        covering("nobody", "nobody", "main", "user:{id}"),
        covering("taken", "taken", "main", "user:{id}"),
    ]
}

/// The statuses of all policies that are about their present generations.
async fn statuses(scene: &Scene) -> BTreeMap<String, CachePolicyStatus> {
    let policies = scene.api::<CachePolicy>(SHOP).list(&Default::default()).await.expect("a list");
    let told = policies.items.into_iter().filter_map(|policy| {
        let status = policy.status?;
        (status.observed_generation == policy.metadata.generation).then(|| (policy.metadata.name.unwrap_or_default(), status))
    });
    told.collect()
}

fn reasons(status: &CachePolicyStatus) -> Vec<(&str, &str)> {
    status.conditions.iter().map(|condition| (condition.status.as_str(), condition.reason.as_str())).collect()
}

fn message<'a>(status: &'a CachePolicyStatus, kind: &str) -> &'a str {
    status.conditions.iter().find(|condition| condition.type_ == kind).map_or("", |condition| &condition.message)
}

/// Waits until a policy's conditions have these reasons.
async fn await_reasons(scene: &Scene, operator: &Operator, name: &str, wanted: &[(&str, &str)]) -> CachePolicyStatus {
    eventually(&format!("{name}: {wanted:?}"), SOON, async || {
        let status = statuses(scene).await.remove(name).ok_or("no status")?;
        if reasons(&status) == wanted { Ok(status) } else { Err(format!("{status:#?}\n{}", operator.log_end())) }
    })
    .await
}

/// What is missing of the table.
fn unsaid(told: &BTreeMap<String, CachePolicyStatus>) -> Vec<String> {
    let wrong = SAID.iter().filter_map(|(name, wanted, kind, words)| {
        let status = told.get(*name)?;
        let says = message(status, kind);
        let missing: Vec<&&str> = words.iter().filter(|words| !says.contains(**words)).collect();
        let is_right = reasons(status) == wanted && missing.is_empty();
        (!is_right).then(|| format!("{name}: {:?} without {missing:?}: {says}", reasons(status)))
    });
    let silent = SAID.iter().filter(|(name, ..)| !told.contains_key(*name)).map(|(name, ..)| format!("{name}: nothing"));
    wrong.chain(silent).collect()
}

/// A workload's first policy waits until every server knows the workload's user.
async fn begins(scene: &Scene, operator: &Operator) {
    let [accepted, resolved] = [("True", "Accepted"), ("True", "ResolvedRefs")];
    scene.apply(&deployment("web")).await.expect("a Deployment");
    scene.apply(&covering("first", "web", "main", "user:{id}")).await.expect("a policy");
    let status = await_reasons(scene, operator, "first", &[accepted, resolved, ("False", "WaitsForUser")]).await;
    let told = message(&status, "Delivered");
    assert!(told.contains("once every server of the CacheCluster `main` knows what its sidecars may do"), "{told}");
    assert_eq!(status.summary.as_deref(), Some("Waiting"));
    await_reasons(scene, operator, "first", &[accepted, resolved, ("True", "Delivered")]).await;
}

/// What is mended is told as well.
async fn is_mended(scene: &Scene, operator: &Operator) {
    scene
        .api::<ConfigMap>(SHOP)
        .delete(&BindingName::of("Deployment", "taken", "main").object_name(), &DeleteParams::default())
        .await
        .expect("deleted");
    scene.apply(&secret("nowhere", "url", "postgres://app:hidden@db/shop")).await.expect("a Secret");
    scene.apply(&deployment("nobody")).await.expect("a Deployment");
    for name in ["taken", "no-secret", "nobody"] {
        let all = [("True", "Accepted"), ("True", "ResolvedRefs"), ("True", "Delivered")];
        await_reasons(scene, operator, name, &all).await;
    }
}

/// What the users of a CacheCluster will regret is told of that, also where it cannot be formed.
async fn clusters_are_advised_of(scene: &Scene) {
    let events = scene.plane.get(&format!("/apis/events.k8s.io/v1/namespaces/{SHOP}/events")).await;
    let of_clusters =
        events["items"].as_array().into_iter().flatten().filter(|event| event["regarding"]["kind"] == "CacheCluster");
    let told: Vec<&Value> = of_clusters.filter(|event| event["reason"] == "AntiPattern").collect();
    assert!(told.len() == 1 && told[0]["regarding"]["name"] == "refused", "{told:?}");
    assert!(told[0]["note"].as_str().is_some_and(|note| note.starts_with("evicts-everything: spec.eviction: ")), "{told:?}");
}

/// Workloads come until the CacheCluster has no room for their users.
async fn has_no_room(scene: &Scene, operator: &Operator) {
    let names: Vec<String> = (0..CROWD).map(|number| format!("crowd-{number:02}")).collect();
    for name in &names {
        scene.apply(&deployment(name)).await.expect("a Deployment");
        scene.apply(&wide(name, 132)).await.expect("a policy");
    }
    let (name, status) = eventually("no room", SOON, async || {
        let told = statuses(scene).await;
        let full = told.into_iter().find(|(_, status)| reasons(status).contains(&("False", "NoRoom")));
        full.ok_or_else(|| operator.log_end())
    })
    .await;
    assert!(names.contains(&name), "{name}");
    assert_eq!(reasons(&status)[..2], [("True", "Accepted"), ("True", "ResolvedRefs")]);
    let told = message(&status, "Delivered");
    assert!(
        told.contains(&format!(
            "the CacheCluster `main` has no room for the user of Deployment/{name}: it takes 900 workloads, and 800 KiB"
        )) && told.ends_with("shorten patterns, or use another CacheCluster"),
        "{told}"
    );
}

#[tokio::test]
async fn why_a_policy_is_not_in_force_is_told() {
    let scene = Scene::start(&[SHOP]).await;
    let operator = scene.operator();
    scene.apply(&cache_cluster(SHOP, "main")).await.expect("applied");
    scene.await_ready(&operator, SHOP, "main").await;
    begins(&scene, &operator).await;
    for manifest in around().iter().chain(&policies()) {
        scene.apply(manifest).await.unwrap_or_else(|error| panic!("{}: {error}", manifest["metadata"]));
    }
    let told = eventually("all is said", SOON, async || {
        let told = statuses(&scene).await;
        let unsaid = unsaid(&told);
        if unsaid.is_empty() { Ok(told) } else { Err(format!("{}\n{}", unsaid.join("\n"), operator.log_end())) }
    })
    .await;
    assert_eq!(reasons(&told["first"])[2], ("True", "Delivered"), "nobody else's trouble is its own");
    assert!(!format!("{told:?}").contains("hidden"), "what Secrets hold is not told");
    clusters_are_advised_of(&scene).await;
    is_mended(&scene, &operator).await;
    has_no_room(&scene, &operator).await;
    operator.stop();
}
