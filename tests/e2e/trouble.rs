//! What cannot be carried out: the status says what, and what to do; everything else goes on.

use std::time::Duration;

use serde_json::{Value, json};

use super::cluster::{apply, condition, eventually, kubectl, list, run};
use super::install::{self, ELSEWHERE, PLACE};
use super::tier::{REDIS_7_0, Tier, VALKEY_9_1};

const TOLD_WITHIN: Duration = Duration::from_secs(120);

/// Waits for a condition whose message holds some words.
fn told(tier: &Tier, words: &[&str]) -> Value {
    eventually(&format!("{} tells of {words:?}", tier.name), TOLD_WITHIN, || {
        let object = tier.object();
        let mut conditions = ["Accepted", "Ready", "Progressing", "Degraded"].iter().filter_map(|kind| condition(&object, kind));
        let has = |found: &Value| {
            let text = found["message"].as_str().unwrap_or_default();
            words.iter().all(|word| text.contains(word))
        };
        conditions.find(has).ok_or(object["status"].to_string())
    })
}

fn change(manifest: &mut Value, path: &str, value: Value) {
    *manifest.pointer_mut(path).unwrap_or_else(|| panic!("no {path}")) = value;
}

#[test]
fn a_missing_secret_is_named_and_its_arrival_noticed() {
    let (_cluster, _others) = (install::cluster(), install::beside_others());
    let tier = Tier::of("no-secret", VALKEY_9_1);
    tier.delete();
    apply(&tier.manifest()).expect("applied");
    let said = told(&tier, &[&tier.login(), "Secret"]);
    assert_eq!(said["status"], "False", "{said}");
    assert!(tier.pods().is_empty(), "servers without the password that they are to ask for");
    tier.set_password("arrived").expect("a Secret");
    tier.settle("once the Secret is there");
    tier.delete();
}

#[test]
fn an_image_that_cannot_be_pulled_is_named_and_the_spec_heals_it() {
    let (_cluster, _others) = (install::cluster(), install::beside_others());
    let tier = Tier::of("no-image", REDIS_7_0);
    tier.delete();
    tier.set_password("first").expect("a Secret");
    let mut manifest = tier.manifest();
    manifest["spec"]["engine"]["image"] = json!("larder-kind/none:of-that-name");
    apply(&manifest).expect("applied");
    told(&tier, &["larder-kind/none:of-that-name"]);
    apply(&tier.manifest()).expect("applied");
    tier.settle("with an image that exists");
    tier.delete();
}

#[test]
fn pods_that_fit_nowhere_are_named() {
    let (_cluster, _others) = (install::cluster(), install::beside_others());
    let tier = Tier::of("no-room", REDIS_7_0);
    tier.delete();
    tier.set_password("first").expect("a Secret");
    let mut manifest = tier.manifest();
    change(&mut manifest, "/spec/pod", json!({"cpu": {"request": "900"}}));
    apply(&manifest).expect("applied");
    told(&tier, &["no-room-0-0", "schedul"]);
    apply(&tier.manifest()).expect("applied");
    tier.settle("with pods that fit");
    tier.delete();
}

#[test]
fn a_volume_that_cannot_be_bound_is_named() {
    let (_cluster, _others) = (install::cluster(), install::beside_others());
    let tier = Tier { durable: true, ..Tier::of("no-volume", VALKEY_9_1) };
    tier.delete();
    tier.set_password("first").expect("a Secret");
    let mut manifest = tier.manifest();
    change(&mut manifest, "/spec/storage", json!({"size": "256Mi", "class": "none-of-that-name", "whenDeleted": "Delete"}));
    apply(&manifest).expect("applied");
    told(&tier, &["data-no-volume-0-0"]);
    tier.delete();
}

#[test]
fn a_quota_that_refuses_is_told_and_hurts_nobody_else() {
    // Nobody else is to get no pods.
    let (_cluster, _others) = (install::cluster(), install::without_others());
    let quota = json!({
        "apiVersion": "v1", "kind": "ResourceQuota", "metadata": {"name": "e2e", "namespace": PLACE},
        "spec": {"hard": {"pods": "0"}},
    });
    let tier = Tier::of("no-quota", VALKEY_9_1);
    tier.delete();
    tier.set_password("first").expect("a Secret");
    apply(&quota).expect("applied");
    apply(&tier.manifest()).expect("applied");
    let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| told(&tier, &["quota"])));
    kubectl(&["-n", PLACE, "delete", "resourcequota", "e2e"]).expect("deleted");
    outcome.expect("told");
    tier.settle("once the quota is gone");
    tier.delete();
}

#[test]
fn a_malformed_object_hurts_only_itself() {
    let (_cluster, _others) = (install::cluster(), install::beside_others());
    let broken = Tier::of("cluster-mode", VALKEY_9_1);
    broken.delete();
    broken.set_password("first").expect("a Secret");
    let mut manifest = broken.manifest();
    change(&mut manifest, "/spec/mode", json!("Cluster"));
    apply(&manifest).expect("applied");
    let said = told(&broken, &["larder dev"]);
    assert_eq!((&said["type"], &said["status"]), (&json!("Accepted"), &json!("False")));
    let (sound, _) = Tier::create("beside-it", VALKEY_9_1, false);
    sound.delete();
    broken.delete();
}

#[test]
fn other_namespaces_are_left_alone() {
    let (_cluster, _others) = (install::cluster(), install::beside_others());
    let mut manifest = Tier::of("unwatched", VALKEY_9_1).manifest();
    change(&mut manifest, "/metadata/namespace", json!(ELSEWHERE));
    apply(&manifest).expect("applied");
    let (watched, _) = Tier::create("watched", VALKEY_9_1, false);
    let kinds = ["pods", "services", "statefulsets", "configmaps", "secrets"];
    let made: Vec<Value> = kinds.iter().flat_map(|kind| list(ELSEWHERE, kind, "larder.dev/cluster=unwatched")).collect();
    let object = super::cluster::get(ELSEWHERE, "cachecluster/unwatched").expect("it exists");
    kubectl(&["-n", ELSEWHERE, "delete", "cachecluster", "unwatched"]).expect("deleted");
    watched.delete();
    assert!(made.is_empty() && object["status"].is_null(), "{made:?} {object}");
    let account = format!("system:serviceaccount:{}:{}", install::SYSTEM, install::RELEASE);
    let may = run("kubectl", &["auth", "can-i", "get", "secrets", "--namespace", ELSEWHERE, "--as", &account], "");
    assert!(may.is_err_and(|said| said.contains("no")), "the operator may read Secrets that it does not watch");
}
