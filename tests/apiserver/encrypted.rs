//! A tier that speaks TLS: its certificates are written, shown by everybody, made anew on demand and by age, and otherwise left alone.

use std::collections::BTreeMap;
use std::time::Duration;

use k8s_openapi::ByteString;
use k8s_openapi::api::core::v1::{ConfigMap, Pod, Secret};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use kube::api::{ListParams, Patch, PatchParams};
use larder::api::CacheCluster;
use larder::api::cache_cluster::{CacheClusterStatus, CertificatesStatus};
use serde_json::{Value, json};

use super::forming::is_left_alone;
use super::operator::Operator;
use super::scene::{Scene, cache_cluster, eventually};

const SHOP: &str = "shop";
const NAME: &str = "main";
const DAY: u64 = 24 * 3600;

/// Waits until everything is as it is written, and everybody has shown certificates that are as wanted.
async fn shown(
    scene: &Scene,
    operator: &Operator,
    what: &str,
    wanted: impl Fn(&CertificatesStatus) -> bool,
) -> CertificatesStatus {
    let settled = |status: &CacheClusterStatus| {
        let certificates = status.certificates.as_ref();
        let all = |certificates: &CertificatesStatus| certificates.servers == "2/2" && certificates.sentinels == "3/3";
        status.summary.as_deref() == Some("Ready") && certificates.is_some_and(|told| all(told) && wanted(told))
    };
    let status = scene.await_status(operator, (SHOP, NAME), what, settled).await;
    status.certificates.expect("it has some")
}

/// The uids of all pods, by name.
async fn pods(scene: &Scene) -> BTreeMap<String, String> {
    let pods = scene.api::<Pod>(SHOP).list(&ListParams::default()).await.expect("a list");
    pods.items.into_iter().map(|pod| (pod.metadata.name.unwrap_or_default(), pod.metadata.uid.unwrap_or_default())).collect()
}

/// Every sentinel is another pod, every server the same.
fn check_restarts(before: &BTreeMap<String, String>, after: &BTreeMap<String, String>) {
    let others: Vec<&str> = before.iter().filter(|(name, uid)| after[*name] != **uid).map(|(name, _)| name.as_str()).collect();
    assert_eq!(others, ["main-sentinel-0", "main-sentinel-1", "main-sentinel-2"]);
}

async fn entry(scene: &Scene, secret: &str, name: &str) -> Vec<u8> {
    let secret = scene.api::<Secret>(SHOP).get(secret).await.expect("a Secret");
    secret.data.and_then(|mut data| data.remove(name)).map(|ByteString(bytes)| bytes).expect("an entry")
}

/// How many authorities are trusted: by servers, by sentinels and by clients alike.
async fn authorities(scene: &Scene) -> usize {
    let map = scene.api::<ConfigMap>(SHOP).get("main-ca").await.expect("a ConfigMap");
    let bundle = map.data.and_then(|mut data| data.remove("ca.crt")).expect("a bundle");
    for secret in ["main-server-tls", "main-sentinel-tls"] {
        assert_eq!(String::from_utf8(entry(scene, secret, "ca.crt").await).expect("a text"), bundle, "of {secret}");
    }
    bundle.matches("BEGIN CERTIFICATE").count()
}

/// What is remembered of certificates says that all was made so many days earlier.
pub fn make_older(state: &mut Value, days: u64) {
    let older = |of: &mut Value| {
        for time in ["made", "renewal", "expires"] {
            if let Some(was) = of[time].as_u64() {
                of[time] = json!(was - days * DAY);
            }
        }
    };
    state["authorities"].as_array_mut().expect("authorities").iter_mut().for_each(older);
    ["servers", "sentinels"].iter().for_each(|name| older(&mut state[*name]));
}

/// What the operator remembers of certificates becomes so many days older, as if it had been away.
async fn age(scene: &Scene, days: u64) {
    let mut state: Value = serde_json::from_slice(&entry(scene, "main-pki", "state.json").await).expect("JSON");
    make_older(&mut state, days);
    let patch = Patch::Merge(json!({"stringData": {"state.json": state.to_string()}}));
    scene.api::<Secret>(SHOP).patch("main-pki", &PatchParams::default(), &patch).await.expect("changed");
}

/// What is remembered of certificates cannot be read for a while. Who restores it has everything as before.
async fn spoil(scene: &Scene, operator: Operator, before: &CertificatesStatus) -> (Operator, BTreeMap<String, String>) {
    let (pods_before, state) = (pods(scene).await, entry(scene, "main-pki", "state.json").await);
    let write = async |text: &str| {
        let patch = Patch::Merge(json!({"stringData": {"state.json": text}}));
        scene.api::<Secret>(SHOP).patch("main-pki", &PatchParams::default(), &patch).await.expect("changed");
    };
    write("{").await;
    let told = |status: &CacheClusterStatus| {
        let words = ["Secret main-pki", "restore it, or delete it"];
        let says = |condition: &Condition| words.iter().all(|words| condition.message.contains(words));
        status.conditions.iter().any(|condition| condition.reason == "CertificatesUnreadable" && says(condition))
    };
    let status = scene.await_status(&operator, (SHOP, NAME), "a Secret that cannot be read", told).await;
    let ready = status.conditions.iter().find(|condition| condition.type_ == "Ready").expect("a condition");
    assert_eq!((ready.status.as_str(), ready.reason.as_str()), ("True", "Serving"), "servers serve all the same: {ready:?}");
    assert_eq!(status.certificates.as_ref(), Some(before), "what is shown is what was");
    // Nor is it otherwise with an operator that knows nothing of before: it asks those whom clients are told to trust.
    operator.stop();
    let operator = scene.operator();
    eventually("an operator that comes anew sees it served", Duration::from_secs(60), async || {
        match operator.figure("larder_operator_clusters_ready", None).await {
            Some(1.0) => Ok(()),
            ready => Err(format!("{ready:?} are ready\n{}", operator.log_end())),
        }
    })
    .await;
    write(std::str::from_utf8(&state).expect("a text")).await;
    let same = |told: &CertificatesStatus| told.fingerprint == before.fingerprint;
    shown(scene, &operator, "the same certificates", same).await;
    let pods = pods(scene).await;
    assert_eq!(pods, pods_before, "a pod was replaced");
    (operator, pods)
}

/// The operator is away for so many days; then everybody shows another certificate than before.
async fn away_for(scene: &Scene, operator: Operator, days: u64, before: &CertificatesStatus) -> (Operator, CertificatesStatus) {
    operator.stop();
    age(scene, days).await;
    let operator = scene.operator();
    let other = |told: &CertificatesStatus| told.fingerprint != before.fingerprint;
    let after = shown(scene, &operator, &format!("certificates after {days} days"), other).await;
    (operator, after)
}

#[tokio::test]
async fn certificates_are_written_shown_and_made_anew() {
    let scene = Scene::start(&[SHOP]).await;
    let operator = scene.operator();
    let mut manifest = cache_cluster(SHOP, NAME);
    manifest["spec"]["tls"] = json!({"enabled": true});
    scene.apply(&manifest).await.expect("applied");
    let first = shown(&scene, &operator, "certificates that everybody shows", |_| true).await;
    assert_eq!(authorities(&scene).await, 1);
    is_left_alone(&scene, &operator).await;

    let before = pods(&scene).await;
    scene.stage.with(SHOP, NAME, |tier| tier.fewest_sentinels = usize::MAX);
    let rotate = Patch::Merge(json!({"spec": {"tls": {"rotation": "today"}}}));
    scene.api::<CacheCluster>(SHOP).patch(NAME, &PatchParams::default(), &rotate).await.expect("changed");
    let asked =
        shown(&scene, &operator, "certificates that were asked for", |told| told.rotation.as_deref() == Some("today")).await;
    assert_ne!(asked.fingerprint, first.fingerprint);
    let after = pods(&scene).await;
    check_restarts(&before, &after);
    assert_eq!(scene.stage.with(SHOP, NAME, |tier| tier.fewest_sentinels), 2, "one sentinel at a time");
    is_left_alone(&scene, &operator).await;

    let (operator, after) = spoil(&scene, operator, &asked).await;

    // 30 days before the end of 90.
    let (operator, renewed) = away_for(&scene, operator, 61, &asked).await;
    check_restarts(&after, &pods(&scene).await);
    assert_eq!(authorities(&scene).await, 1);
    is_left_alone(&scene, &operator).await;

    // Two years before the end of ten: a second authority is trusted, then it signs, then the first is trusted no more.
    let (operator, beside) = away_for(&scene, operator, 8 * 365, &renewed).await;
    assert_eq!(authorities(&scene).await, 2);
    let (operator, signs) = away_for(&scene, operator, 31, &beside).await;
    assert_eq!(authorities(&scene).await, 2);
    let (operator, _) = away_for(&scene, operator, 31, &signs).await;
    assert_eq!(authorities(&scene).await, 1);
    is_left_alone(&scene, &operator).await;
    operator.stop();
}
