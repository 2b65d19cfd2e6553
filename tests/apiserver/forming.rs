//! From `kubectl apply` to Ready, and then nothing more.

use std::collections::BTreeMap;

use reqwest::Method;
use serde_json::Value;

use super::control_plane::User;
use super::operator::Operator;
use super::scene::{KINDS, Scene, cache_cluster};

const SHOP: &str = "shop";
/// What the operator writes, as `apiserver_request_total` names it.
const RESOURCES: [&str; 12] = [
    "cacheclusters",
    "cachepolicies",
    "services",
    "configmaps",
    "secrets",
    "serviceaccounts",
    "pods",
    "statefulsets",
    "poddisruptionbudgets",
    "networkpolicies",
    "endpointslices",
    "events",
];

/// The version of every object of the namespace, by its path.
async fn versions(scene: &Scene) -> BTreeMap<String, String> {
    let mut versions = BTreeMap::new();
    let told =
        ["apis/larder.dev/v1alpha1/cacheclusters", "apis/larder.dev/v1alpha1/cachepolicies", "apis/events.k8s.io/v1/events"];
    for kind in KINDS.into_iter().chain(told) {
        for object in scene.list(kind, SHOP).await {
            let text = |field: &str| object["metadata"][field].as_str().unwrap_or_default().to_owned();
            versions.insert(format!("{kind}/{}", text("name")), text("resourceVersion"));
        }
    }
    versions
}

/// What has no owner that is this CacheCluster, directly or through a StatefulSet.
async fn unowned(scene: &Scene, uid: &str) -> Vec<String> {
    let mut found = Vec::new();
    // Events and claims are not owned; pods are their sets'.
    for kind in KINDS.into_iter().filter(|kind| !kind.ends_with("/pods") && !kind.ends_with("claims")) {
        for object in scene.list(kind, SHOP).await {
            let owners = object["metadata"]["ownerReferences"].as_array().cloned().unwrap_or_default();
            if !owners.iter().any(|owner| owner["uid"] == uid && owner["controller"] == true) {
                found.push(format!("{kind}/{}", object["metadata"]["name"]));
            }
        }
    }
    found
}

/// What of the objects that the operator makes is somebody else's, or not applied. Pods and claims are their sets', and the status of sets is
/// the stage's.
async fn managed_by_others(scene: &Scene) -> Vec<String> {
    let of = |object: &Value, is_status: bool| {
        let entries = object["metadata"]["managedFields"].as_array().cloned().unwrap_or_default().into_iter();
        let of_part = entries.filter(move |entry| (entry["subresource"] == "status") == is_status);
        of_part.map(|entry| format!("{} by {}", entry["operation"], entry["manager"])).collect::<Vec<_>>()
    };
    let applied = [r#""Apply" by "larder""#];
    let mut found = Vec::new();
    for kind in KINDS.into_iter().filter(|kind| !kind.ends_with("/pods") && !kind.ends_with("claims")) {
        for object in scene.list(kind, SHOP).await {
            let entries = of(&object, false);
            if entries != applied {
                found.push(format!("{kind}/{}: {entries:?}", object["metadata"]["name"]));
            }
        }
    }
    for cluster in scene.list("apis/larder.dev/v1alpha1/cacheclusters", SHOP).await {
        let entries = of(&cluster, true);
        if entries != applied {
            found.push(format!("the status: {entries:?}"));
        }
    }
    found
}

/// The row of `kubectl get cc`, as the API server makes it, by the columns' names.
async fn table(scene: &Scene) -> BTreeMap<String, Value> {
    let as_table = [("accept", "application/json;as=Table;v=v1;g=meta.k8s.io")];
    let path = format!("/apis/larder.dev/v1alpha1/namespaces/{SHOP}/cacheclusters");
    let (_, text) = scene.plane.request(Method::GET, &path, &as_table, None).await;
    let table: Value = serde_json::from_str(&text).expect("a table");
    let names = table["columnDefinitions"].as_array().expect("columns").iter();
    let cells = table["rows"][0]["cells"].as_array().expect("cells").iter();
    names.zip(cells).map(|(column, cell)| (column["name"].as_str().unwrap_or_default().to_owned(), cell.clone())).collect()
}

#[tokio::test]
async fn a_tier_forms_and_is_then_left_alone() {
    let scene = Scene::start(&[SHOP]).await;
    let operator = scene.operator();
    let made = scene.apply(&cache_cluster(SHOP, "main")).await.expect("applied");
    let status = scene.await_ready(&operator, SHOP, "main").await;

    let conditions = status
        .conditions
        .iter()
        .map(|condition| (condition.type_.as_str(), condition.status.as_str(), condition.reason.as_str()));
    let expected = [
        ("Accepted", "True", "Accepted"),
        ("Ready", "True", "Serving"),
        ("Progressing", "False", "Settled"),
        ("Degraded", "False", "Healthy"),
    ];
    assert_eq!(conditions.collect::<Vec<_>>(), expected);
    assert!(status.initialized);
    let primary = scene.stage.with(SHOP, "main", |tier| tier.primary());
    assert_eq!(primary, Some(0), "the servers begin with the first");
    let row = table(&scene).await;
    for (column, cell) in [
        ("Name", "main"),
        ("Status", "Ready"),
        ("Ready", "2/2"),
        ("Primary", "main-0-0"),
        ("Engine", "Valkey"),
        ("Memory", "256Mi"),
    ] {
        assert_eq!(row.get(column).and_then(Value::as_str), Some(cell), "column {column} of {row:?}");
    }
    let uid = made.metadata.uid.expect("a uid");
    assert_eq!(unowned(&scene, &uid).await, Vec::<String>::new(), "has no owner, and would stay behind");
    assert_eq!(
        managed_by_others(&scene).await,
        Vec::<String>::new(),
        "has another manager, and two would undo each other's work"
    );
    let told = scene.stage.with(SHOP, "main", |tier| tier.users_on_sentinels());
    assert!(told.len() == 3 && told.iter().all(|users| users.contains("larder-system")), "{told:?}");

    is_left_alone(&scene, &operator).await;
    operator.stop();
}

/// Nothing changes, and so nothing is written or read but the Lease.
pub async fn is_left_alone(scene: &Scene, operator: &Operator) {
    nothing_is_written(scene, operator).await;
    assert_eq!(scene.stage.unknown_commands(), Vec::<String>::new());
}

/// Nothing changes at the API server.
pub async fn nothing_is_written(scene: &Scene, operator: &Operator) {
    // What the end of a change brings has been written by now: the operator has looked again.
    scene.await_looks(operator, 1).await;
    let (before, counted, asked) = (versions(scene).await, scene.plane.requests().await, scene.plane.audit().len());
    assert!(before.len() > 20, "{before:?}");
    scene.await_looks(operator, 1).await;
    let requests = scene.plane.requests().await.since(&counted);
    assert_eq!(versions(scene).await, before, "an object was written although nothing had changed");
    assert_eq!(requests.writes_of(&RESOURCES), BTreeMap::new(), "the API server counts writes although nothing had changed");
    let audit = scene.plane.audit().split_off(asked);
    let beyond: Vec<String> = audit
        .iter()
        .filter(|entry| entry.user.username == User::Operator.name() && entry.is_end())
        .filter(|entry| entry.verb != "watch" && entry.object_ref.resource != "leases")
        .map(|entry| format!("{} {}", entry.verb, entry.uri))
        .collect();
    assert!(beyond.is_empty(), "the operator asks although nothing had changed: {beyond:?}");
    assert!(audit.iter().any(|entry| entry.object_ref.resource == "leases"), "the Lease is kept, and seen here");
}
