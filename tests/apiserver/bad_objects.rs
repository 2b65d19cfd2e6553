//! What cannot be carried out says so in its status, with what to do, goes on once that is done, and is in nobody else's way.

use std::time::Duration;

use k8s_openapi::api::core::v1::ConfigMap;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use kube::api::{DeleteParams, Patch, PatchParams};
use larder::api::CacheCluster;
use larder::api::cache_cluster::CacheClusterStatus;
use reqwest::Method;
use serde_json::{Value, json};

use super::operator::Operator;
use super::scene::{Scene, cache_cluster, eventually};
use super::stage::NO_SUCH_IMAGE;

const SHOP: &str = "shop";
/// A namespace that may hold one StatefulSet, and one that may hold three pods.
const TIGHT: &str = "tight";
const NARROW: &str = "narrow";
const QUOTAS: [(&str, &str, u32); 2] = [(TIGHT, "count/statefulsets.apps", 1), (NARROW, "pods", 3)];
/// A class of volumes that does not exist at first.
const NO_SUCH_CLASS: &str = "fast-disks";
const PASSWORD: &str = "a-password-that-no-log-shows";

/// One that asks for a password in an entry of a Secret.
fn with_login(name: &str, secret: &str) -> Value {
    let mut manifest = cache_cluster(SHOP, name);
    manifest["spec"]["auth"] = json!({"password": {"secretKeyRef": {"name": secret, "key": "password"}}});
    manifest
}

fn secret(name: &str, entries: Value) -> Value {
    json!({"apiVersion": "v1", "kind": "Secret", "metadata": {"namespace": SHOP, "name": name}, "stringData": entries})
}

fn condition<'a>(status: &'a CacheClusterStatus, kind: &str) -> Option<&'a Condition> {
    status.conditions.iter().find(|condition| condition.type_ == kind)
}

/// A CacheCluster, a condition with its reason, and words of its message: what it is about, and what to do.
type Said = ((&'static str, &'static str), (&'static str, &'static str), &'static [&'static str]);

const SAID: &[Said] = &[
    ((SHOP, "forbidden"), ("Accepted", "InvalidSpec"), &["spec.parameters.port", "Larder decides where servers listen"]),
    ((SHOP, "no-secret"), ("Accepted", "SecretMissing"), &["no Secret nowhere", "kubectl create secret generic nowhere -n shop"]),
    ((SHOP, "no-entry"), ("Accepted", "SecretMalformed"), &["the entry password of Secret empty does not exist"]),
    ((SHOP, "line-feed"), ("Accepted", "SecretMalformed"), &["control character, such as the line feed"]),
    ((SHOP, "no-image"), ("Progressing", "Blocked"), &["ImagePullBackOff", "correct spec.engine.version or spec.engine.image"]),
    ((SHOP, "taken"), ("Progressing", "Blocked"), &["Service taken-primary exists and does not belong", "rename or delete it"]),
    (
        (SHOP, "homeless"),
        ("Progressing", "Blocked"),
        &["cannot be scheduled", "didn't match Pod's node affinity/selector", "add nodes, or lower spec.memory or spec.pod"],
    ),
    (
        (SHOP, "no-volume"),
        ("Progressing", "Blocked"),
        &["kubectl describe pvc data-no-volume-", "whether spec.storage.class exists"],
    ),
    ((TIGHT, "main"), ("Progressing", "Blocked"), &["exceeded quota: small", "raise the ResourceQuota"]),
    (
        (NARROW, "main"),
        ("Progressing", "Blocked"),
        &["is not made", "kubectl describe statefulset main-", "where a quota is used up, raise the ResourceQuota"],
    ),
];

/// Waits until a condition has this reason, and its message these words.
async fn says(scene: &Scene, operator: &Operator, place: (&str, &str), (kind, reason): (&str, &str), words: &[&str]) {
    let wanted = |status: &CacheClusterStatus| {
        condition(status, kind)
            .is_some_and(|condition| condition.reason == reason && words.iter().all(|words| condition.message.contains(words)))
    };
    scene.await_status(operator, place, &format!("{kind} by {reason}, with {words:?}"), wanted).await;
}

/// What is not there, not usable, or not possible, all at the same time beside a good one.
async fn make_trouble(scene: &Scene) {
    let mut unknown_image = cache_cluster(SHOP, "no-image");
    unknown_image["spec"]["engine"]["image"] = json!(NO_SUCH_IMAGE);
    let taken = json!({
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"namespace": SHOP, "name": "taken-primary"},
        "spec": {"ports": [{"port": 80}]},
    });
    let mut homeless = cache_cluster(SHOP, "homeless");
    homeless["spec"]["pod"] = json!({"nodeSelector": {"disk": "none"}});
    let mut no_volume = cache_cluster(SHOP, "no-volume");
    no_volume["spec"]["storage"] = json!({"size": "1Gi", "class": NO_SUCH_CLASS});
    for manifest in [
        with_login("no-secret", "nowhere"),
        secret("empty", json!({"user": "app"})),
        with_login("no-entry", "empty"),
        secret("broken", json!({"password": format!("{PASSWORD}\n")})),
        with_login("line-feed", "broken"),
        unknown_image,
        taken,
        cache_cluster(SHOP, "taken"),
        homeless,
        no_volume,
    ] {
        scene.apply(&manifest).await.unwrap_or_else(|error| panic!("{manifest}: {error}"));
    }
    for (namespace, resource, most) in QUOTAS {
        set_quota(scene, (namespace, resource), most).await;
        scene.apply(&cache_cluster(namespace, "main")).await.expect("applied");
    }
}

/// What the quota controller would do: the API server's admission goes by the status.
async fn set_quota(scene: &Scene, (namespace, resource): (&str, &str), most: u32) {
    let path = format!("/api/v1/namespaces/{namespace}/resourcequotas/small");
    let merge = [("content-type", "application/merge-patch+json")];
    let hard = json!({resource: most.to_string()});
    let quota = json!({
        "apiVersion": "v1",
        "kind": "ResourceQuota",
        "metadata": {"namespace": namespace, "name": "small"},
        "spec": {"hard": hard},
    });
    scene.apply(&quota).await.expect("a quota");
    let quota = scene.plane.get(&path).await;
    let used = quota["status"]["used"][resource].as_str().unwrap_or("0");
    let told = json!({"status": {"hard": hard, "used": {resource: used}}});
    let (status, text) = scene.plane.request(Method::PATCH, &format!("{path}/status"), &merge, Some(&told)).await;
    assert_eq!(status, 200, "{text}");
}

/// Objects that an earlier, laxer definition let pass: one cannot be read, one sets what Larder sets itself.
async fn make_outdated(scene: &Scene) {
    let (mut unreadable, mut forbidden) = (cache_cluster(SHOP, "unreadable"), cache_cluster(SHOP, "forbidden"));
    unreadable["spec"]["memory"] = json!({"much": true});
    forbidden["spec"]["parameters"] = json!({"port": "6380"});
    scene.apply_outdated("cacheclusters", &[unreadable, forbidden]).await;
}

/// The API server takes no status for an object whose fields are of another kind than they should be: an event tells of it.
async fn unreadable_is_told(scene: &Scene, operator: &Operator) {
    eventually("an event of what cannot be read", Duration::from_secs(60), async || {
        let events = scene.list("apis/events.k8s.io/v1/events", SHOP).await;
        let told = events.iter().find(|event| event["regarding"]["name"] == "unreadable" && event["reason"] == "Unreadable");
        let note = told.and_then(|event| event["note"].as_str()).unwrap_or_default();
        let says_all = note.contains("memory") && note.contains("correct it, or delete it");
        if says_all { Ok(()) } else { Err(format!("{events:?}\n{}", operator.log_end())) }
    })
    .await;
}

/// The remedy that each status names.
async fn mend(scene: &Scene) {
    for manifest in [
        secret("nowhere", json!({"password": PASSWORD})),
        secret("empty", json!({"password": PASSWORD})),
        secret("broken", json!({"password": PASSWORD})),
    ] {
        scene.apply(&manifest).await.expect("a Secret");
    }
    let image = Patch::Merge(json!({"spec": {"engine": {"image": null}}}));
    scene.api::<CacheCluster>(SHOP).patch("no-image", &PatchParams::default(), &image).await.expect("changed");
    let services = scene.api::<k8s_openapi::api::core::v1::Service>(SHOP);
    services.delete("taken-primary", &DeleteParams::default()).await.expect("deleted");
    let anywhere = Patch::Merge(json!({"spec": {"pod": null}}));
    scene.api::<CacheCluster>(SHOP).patch("homeless", &PatchParams::default(), &anywhere).await.expect("changed");
    let class = json!({
        "apiVersion": "storage.k8s.io/v1",
        "kind": "StorageClass",
        "metadata": {"name": NO_SUCH_CLASS},
        "provisioner": "example.com/none",
    });
    scene.apply(&class).await.expect("a class");
    for (namespace, resource, _) in QUOTAS {
        set_quota(scene, (namespace, resource), 10).await;
    }
}

#[tokio::test]
async fn bad_objects_say_what_to_do_and_hurt_only_themselves() {
    let scene = Scene::start(&[SHOP, TIGHT, NARROW]).await;
    let operator = scene.operator();
    scene.apply(&cache_cluster(SHOP, "good")).await.expect("applied");
    scene.await_ready(&operator, SHOP, "good").await;
    make_outdated(&scene).await;
    make_trouble(&scene).await;

    for (place, condition, words) in SAID {
        says(&scene, &operator, *place, *condition, words).await;
    }

    unreadable_is_told(&scene, &operator).await;

    // The others go on: what is good is changed, and what is new forms.
    let change = Patch::Merge(json!({"spec": {"parameters": {"hz": "25"}}}));
    scene.api::<CacheCluster>(SHOP).patch("good", &PatchParams::default(), &change).await.expect("changed");
    let configured = |map: &ConfigMap| map.data.as_ref().is_some_and(|data| data["server.conf"].contains("hz 25"));
    eventually("a change of the good one", Duration::from_secs(60), async || {
        let map = scene.api::<ConfigMap>(SHOP).get("good-0").await.map_err(|error| error.to_string())?;
        if configured(&map) { Ok(()) } else { Err(format!("{:?}\n{}", map.data, operator.log_end())) }
    })
    .await;
    scene.await_ready(&operator, SHOP, "good").await;
    scene.apply(&cache_cluster(SHOP, "late")).await.expect("applied");
    scene.await_ready(&operator, SHOP, "late").await;

    mend(&scene).await;
    for name in ["no-secret", "no-entry", "line-feed", "no-image", "taken", "homeless", "no-volume"] {
        scene.await_ready(&operator, SHOP, name).await;
    }
    for (namespace, ..) in QUOTAS {
        scene.await_ready(&operator, namespace, "main").await;
    }
    let log = std::fs::read_to_string(scene.plane.directory().join("operator.log")).expect("a log");
    assert!(!log.contains(PASSWORD), "the operator logs a password");
    assert_eq!(scene.stage.unknown_commands(), Vec::<String>::new());
}
