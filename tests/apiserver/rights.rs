//! The chart grants what the operator uses, and nothing else: what is granted is held against the API server's audit log.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use k8s_openapi::api::networking::v1::NetworkPolicy;
use kube::api::{DeleteParams, Patch, PatchParams};
use larder::api::cache_cluster::CacheClusterStatus;
use larder::api::{CacheCluster, CachePolicy};
use serde_json::{Value, json};

use super::audit::Entry;
use super::chart;
use super::control_plane::User;
use super::operator::Operator;
use super::policies;
use super::scene::{KINDS, Scene, cache_cluster, eventually};

const SHOP: &str = "shop";
const NAME: &str = "main";
/// No request of its own: where the admission plug-in OwnerReferencesPermissionEnforcement is on, as it is here, the API server asks for
/// it when an object names an owner. [`without_a_right`] takes it away.
const FOR_OWNERS: &str = "update larder.dev/cacheclusters/finalizers";

/// What a user did, as grants are written.
fn used(audit: &[Entry], user: User) -> BTreeSet<String> {
    let mut used = BTreeSet::new();
    // That there is nothing of a name is an answer, too.
    for entry in audit.iter().filter(|entry| entry.user.username == user.name() && entry.response_status.code != 403) {
        used.insert(entry.right());
        // An object that is applied and is not there yet is made, which takes the right to create it besides.
        if entry.verb == "patch" && entry.response_status.code == 201 {
            used.insert(entry.right().replacen("patch", "create", 1));
        }
    }
    used
}

fn forbidden(audit: &[Entry]) -> Vec<String> {
    let refused = audit.iter().filter(|entry| entry.response_status.code == 403);
    refused.map(|entry| format!("{} {}: {}", entry.user.username, entry.right(), entry.response_status.message)).collect()
}

/// Changes the specification, and waits until the change is carried out.
async fn change(scene: &Scene, operator: &Operator, spec: Value, what: &str, done: impl Fn(&CacheClusterStatus) -> bool) {
    let patch = Patch::Merge(json!({"spec": spec}));
    scene.api::<CacheCluster>(SHOP).patch(NAME, &PatchParams::default(), &patch).await.expect("changed");
    let ready = |status: &CacheClusterStatus| status.summary.as_deref() == Some("Ready") && done(status);
    scene.await_status(operator, (SHOP, NAME), what, ready).await;
}

fn servers_ready(status: &CacheClusterStatus, wanted: &str) -> bool {
    status.servers.as_ref().is_some_and(|servers| servers.ready == wanted)
}

/// Everything that needs a right: a tier forms, grows, shrinks, rolls, opens its network, and goes.
async fn live_through_all(scene: &Scene, operator: &Operator) {
    let login = json!({
        "apiVersion": "v1", "kind": "Secret", "metadata": {"namespace": SHOP, "name": "login"}, "stringData": {"password": "first"},
    });
    scene.apply(&login).await.expect("a Secret");
    let mut manifest = cache_cluster(SHOP, NAME);
    manifest["spec"]["auth"] = json!({"user": "app", "password": {"secretKeyRef": {"name": "login", "key": "password"}}});
    manifest["spec"]["storage"] = json!({"size": "1Gi", "fsync": "Always"});
    scene.apply(&manifest).await.expect("applied");
    scene.await_ready(operator, SHOP, NAME).await;

    change(scene, operator, json!({"replicas": 2}), "three servers", |status| servers_ready(status, "3/3")).await;
    change(scene, operator, json!({"replicas": 1}), "two servers", |status| servers_ready(status, "2/2")).await;
    // Each restarts every server, the primary last; the second tells of itself with the event of the first.
    for backlog in ["300", "400"] {
        let before = scene.stage.with(SHOP, NAME, |tier| tier.failovers);
        change(scene, operator, json!({"parameters": {"tcp-backlog": backlog}}), "a roll", |_| {
            scene.stage.with(SHOP, NAME, |tier| tier.failovers) > before
        })
        .await;
    }
    change(scene, operator, json!({"networkPolicy": {"enabled": false}}), "an open network", |_| true).await;
    eventually("no NetworkPolicy", Duration::from_secs(60), async || {
        let left = scene.api::<NetworkPolicy>(SHOP).list(&Default::default()).await.map_err(|error| error.to_string())?;
        if left.items.is_empty() { Ok(()) } else { Err(format!("{} are left", left.items.len())) }
    })
    .await;
    policies::begin_with_policy(scene, operator).await;
    policies::changes_often(scene, operator).await;
    policies::behind_comes_and_goes(scene, operator).await;
    policies::end(scene).await;
    operator_sees_deletion(scene, operator).await;
}

/// Deletes the CacheCluster, and what it owns, as Kubernetes' garbage collection would.
async fn operator_sees_deletion(scene: &Scene, operator: &Operator) {
    scene.api::<CacheCluster>(SHOP).delete(NAME, &DeleteParams::default()).await.expect("deleted");
    eventually("the operator forgets it", Duration::from_secs(60), async || {
        let known = operator.figure("larder_operator_clusters", None).await;
        if known == Some(0.0) { Ok(()) } else { Err(format!("it knows {known:?}")) }
    })
    .await;
    // Sets before pods: otherwise these come back.
    for kind in KINDS.iter().rev().filter(|kind| !kind.ends_with("claims")) {
        let (version, plural) = kind.rsplit_once('/').expect("a path");
        let of_tier = |object: &&Value| object["metadata"]["labels"]["larder.dev/cluster"] == NAME;
        for object in scene.list(kind, SHOP).await.iter().filter(of_tier) {
            let path = format!("/{version}/namespaces/{SHOP}/{plural}/{}", object["metadata"]["name"].as_str().expect("a name"));
            let (status, text) = scene.plane.request(reqwest::Method::DELETE, &path, &[], None).await;
            assert!(status < 300 || status == 404, "{path}: {text}");
        }
    }
    eventually("its pods are gone", Duration::from_secs(60), async || {
        let pods = scene.list("api/v1/pods", SHOP).await.len();
        if pods == 0 { Ok(()) } else { Err(format!("{pods} are left")) }
    })
    .await;
}

/// `larder uninstall-check`, as the chart's hook runs it.
fn uninstall_check(scene: &Scene, chart: &[Value]) -> std::process::Output {
    let job = chart.iter().find(|object| object["kind"] == "Job").expect("a Job");
    let arguments = job.pointer("/spec/template/spec/containers/0/args").and_then(Value::as_array).expect("arguments");
    Command::new(PathBuf::from(env!("CARGO_BIN_EXE_larder")))
        .args(arguments.iter().filter_map(Value::as_str))
        .env("KUBECONFIG", scene.plane.kubeconfig(User::Uninstall))
        .output()
        .expect("larder starts")
}

/// Takes a right away: the status says so, and what to do; given back, the tier forms.
async fn without_a_right(scene: &Scene, operator: &Operator, chart: &[Value]) {
    let role = chart.iter().find(|object| object["kind"] == "Role" && object["metadata"]["namespace"] == SHOP).expect("a Role");
    let mut less = role.clone();
    let rules = less["rules"].as_array_mut().expect("rules");
    rules.retain(|rule| rule["resources"] != json!(["cacheclusters/finalizers"]));
    assert!(rules.len() < role["rules"].as_array().map_or(0, Vec::len));
    scene.apply(&less).await.expect("a Role");
    scene.apply(&cache_cluster(SHOP, "poor")).await.expect("applied");
    let blocked =
        scene.await_status(operator, (SHOP, "poor"), "blocked", |status| status.summary.as_deref() == Some("Blocked")).await;
    let progressing = blocked.conditions.iter().find(|condition| condition.type_ == "Progressing").expect("a condition");
    for words in ["finalizers", "give the operator's Role that right"] {
        assert!(progressing.message.contains(words), "{words}: {}", progressing.message);
    }
    scene.apply(role).await.expect("a Role");
    scene.await_ready(operator, SHOP, "poor").await;
}

/// Forced, the hook refuses nothing, and takes away what others wait for, with the rights that it is then given and no others.
async fn forced(scene: &Scene) {
    let chart = chart::render_with(&[SHOP], &["uninstall.force=true"]);
    let hook = |object: &&Value| object["kind"] == "Role" && object["metadata"]["name"] == "larder-uninstall";
    for role in chart.iter().filter(hook) {
        scene.apply(role).await.expect("a Role");
    }
    scene.apply(&policies::loading("users", "10m")).await.expect("a policy");
    let held = Patch::Merge(json!({"metadata": {"finalizers": ["example.com/held"]}}));
    let (clusters, policies) = (scene.api::<CacheCluster>(SHOP), scene.api::<CachePolicy>(SHOP));
    clusters.patch("poor", &PatchParams::default(), &held).await.expect("held");
    policies.patch("users", &PatchParams::default(), &held).await.expect("held");
    let output = uninstall_check(scene, &chart);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let left = [
        clusters.get("poor").await.expect("it stays").metadata.finalizers,
        policies.get("users").await.expect("it stays").metadata.finalizers,
    ];
    assert!(left.iter().flatten().all(Vec::is_empty), "{left:?}");
    assert_eq!(chart::grants(&chart, "larder-uninstall"), used(&scene.plane.audit(), User::Uninstall), "of the forced hook");
}

#[tokio::test]
async fn the_chart_grants_what_is_used_and_nothing_else() {
    let scene = Scene::start(&[SHOP]).await;
    let chart = chart::render(&[SHOP]);
    let operator = scene.operator();
    live_through_all(&scene, &operator).await;
    let after = uninstall_check(&scene, &chart);
    assert!(after.status.success(), "{}", String::from_utf8_lossy(&after.stderr));

    let audit = scene.plane.audit();
    assert_eq!(forbidden(&audit), Vec::<String>::new(), "is used and not granted");
    let mut granted = chart::grants(&chart, "larder");
    assert!(granted.len() > 40 && granted.remove(FOR_OWNERS), "the chart is not read: {granted:?}");
    let used_by_operator = used(&audit, User::Operator);
    let unused: Vec<&String> = granted.difference(&used_by_operator).collect();
    assert!(unused.is_empty(), "is granted to the operator and never used: {unused:#?}");
    let granted = chart::grants(&chart, "larder-uninstall");
    assert_eq!(granted, used(&audit, User::Uninstall), "of the uninstall hook");

    without_a_right(&scene, &operator, &chart).await;
    let refused = uninstall_check(&scene, &chart);
    assert!(!refused.status.success());
    assert!(
        String::from_utf8_lossy(&refused.stderr).contains("CacheCluster shop/poor"),
        "{}",
        String::from_utf8_lossy(&refused.stderr)
    );
    forced(&scene).await;
    assert_eq!(scene.stage.unknown_commands(), Vec::<String>::new());
}
