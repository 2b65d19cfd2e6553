//! Nodes that go. After a drain pods stay where they found room, and the operator moves the sentinel that is one too many there; pods of a
//! node that does not answer are a person's to give up.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{Node, Pod};
use kube::Api;
use kube::api::{DeleteParams, ListParams, Patch, PatchParams};
use larder::api::cache_cluster::CacheClusterStatus;
use serde_json::json;

use super::operator::Operator;
use super::scene::{Scene, cache_cluster, eventually};
use std::time::Duration;

const SHOP: &str = "shop";
const NAME: &str = "main";

async fn cordon(scene: &Scene, node: &str, on: bool) {
    let patch = Patch::Merge(json!({"spec": {"unschedulable": on}}));
    Api::<Node>::all(scene.client.clone()).patch(node, &PatchParams::default(), &patch).await.expect("changed");
}

/// The sentinels' pods: the node and the uid of each, by name.
async fn sentinels(scene: &Scene) -> BTreeMap<String, (String, String)> {
    let pods =
        scene.api::<Pod>(SHOP).list(&ListParams::default().labels("app.kubernetes.io/component=sentinel")).await.expect("a list");
    let place = |pod: &Pod| {
        let node = pod.spec.as_ref().and_then(|spec| spec.node_name.clone()).unwrap_or_default();
        (pod.metadata.name.clone().unwrap_or_default(), (node, pod.metadata.uid.clone().unwrap_or_default()))
    };
    pods.items.iter().map(place).collect()
}

fn degraded<'a>(status: &'a CacheClusterStatus, reason: &str) -> Option<&'a str> {
    let condition = status.conditions.iter().find(|condition| condition.type_ == "Degraded" && condition.reason == reason);
    condition.map(|condition| condition.message.as_str())
}

/// What `kubectl drain` does with the sentinel of a node.
async fn drain(scene: &Scene, node: &str) {
    cordon(scene, node, true).await;
    for (name, (on, _)) in sentinels(scene).await {
        if on == node {
            scene.api::<Pod>(SHOP).delete(&name, &DeleteParams::default()).await.expect("deleted");
        }
    }
}

/// Waits until one of the sentinels that were there is another, and says which; all others are the same.
async fn moved(scene: &Scene, operator: &Operator, before: &BTreeMap<String, (String, String)>) -> String {
    eventually("a sentinel is moved", Duration::from_secs(120), async || {
        let now = sentinels(scene).await;
        let others: Vec<&String> =
            before.iter().filter(|(name, was)| now.get(*name) != Some(was)).map(|(name, _)| name).collect();
        match others[..] {
            [one] if now.contains_key(one) => Ok(one.clone()),
            [] | [_] => Err(format!("{now:?}\n{}", operator.log_end())),
            _ => panic!("more than one: {before:?} {now:?}"),
        }
    })
    .await
}

#[tokio::test]
async fn a_sentinel_that_is_one_too_many_on_a_node_moves_once_another_has_room() {
    let scene = Scene::start(&[SHOP]).await;
    let operator = scene.operator();
    scene.apply(&cache_cluster(SHOP, NAME)).await.expect("applied");
    scene.await_ready(&operator, SHOP, NAME).await;
    drain(&scene, "node-c").await;
    let crowded =
        |status: &CacheClusterStatus| degraded(status, "TooFewNodes").is_some_and(|message| message.contains("add nodes"));
    scene.await_status(&operator, (SHOP, NAME), "two sentinels on one node", crowded).await;
    let before = sentinels(&scene).await;
    assert!(before.len() == 3 && before.values().all(|(node, _)| node != "node-c"), "{before:?}");
    // Nowhere to go: everything stays.
    scene.await_looks(&operator, 1).await;
    assert_eq!(sentinels(&scene).await, before);

    scene.stage.with(SHOP, NAME, |tier| tier.fewest_sentinels = usize::MAX);
    cordon(&scene, "node-c", false).await;
    let name = moved(&scene, &operator, &before).await;
    let healthy =
        |status: &CacheClusterStatus| status.summary.as_deref() == Some("Ready") && degraded(status, "Healthy").is_some();
    scene.await_status(&operator, (SHOP, NAME), "spread again", healthy).await;
    let after = sentinels(&scene).await;
    assert_eq!(after[&name].0, "node-c");
    assert_eq!(scene.stage.with(SHOP, NAME, |tier| tier.fewest_sentinels), 2, "a majority was there at all times");
    scene.await_looks(&operator, 1).await;
    assert_eq!(sentinels(&scene).await, after, "and nobody else moves");
    operator.stop();
}

async fn answers(scene: &Scene, node: &str, ready: &str) {
    let patch = Patch::Merge(json!({"status": {"conditions": [{"type": "Ready", "status": ready}]}}));
    Api::<Node>::all(scene.client.clone()).patch_status(node, &PatchParams::default(), &patch).await.expect("changed");
}

#[tokio::test]
async fn a_node_that_does_not_answer_is_named_with_the_next_commands_and_keeps_its_pods() {
    let scene = Scene::start(&[SHOP]).await;
    let operator = scene.operator();
    let mut manifest = cache_cluster(SHOP, NAME);
    manifest["spec"]["storage"] = json!({"size": "1Gi"});
    scene.apply(&manifest).await.expect("applied");
    scene.await_ready(&operator, SHOP, NAME).await;
    answers(&scene, "node-c", "Unknown").await;
    let words = ["node node-c of pod main-", "`kubectl delete node node-c`", "`kubectl delete pvc/data-main-"];
    let is_told = |status: &CacheClusterStatus| {
        let mut blocked = status.conditions.iter().filter(|condition| condition.reason == "Blocked");
        blocked.any(|condition| words.iter().all(|words| condition.message.contains(words)))
    };
    scene.await_status(&operator, (SHOP, NAME), "told of", is_told).await;
    // It may be cut off for a while: nobody but a person can know.
    scene.await_looks(&operator, 1).await;
    let audit = scene.plane.audit();
    let deleted: Vec<&str> =
        audit.iter().filter(|entry| entry.right() == "delete /pods").map(|entry| entry.uri.as_str()).collect();
    assert_eq!(deleted, Vec::<&str>::new());
    answers(&scene, "node-c", "True").await;
    scene.await_ready(&operator, SHOP, NAME).await;
    operator.stop();
}
