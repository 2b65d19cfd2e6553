//! The chart is not uninstalled under a cache that is in use, unless that is forced.

use serde_json::Value;

use super::cluster::{get, kubectl, run};
use super::install::{self, PLACE, RELEASE, SYSTEM};
use super::tier::{Tier, VALKEY_9_1};

fn uninstall() -> Result<String, String> {
    run("helm", &["uninstall", RELEASE, "--namespace", SYSTEM, "--wait", "--timeout", "120s"], "")
}

#[test]
fn uninstalling_is_refused_while_a_cache_exists_and_can_be_forced() {
    let _cluster = install::cluster_alone();
    let (tier, _) = Tier::create("in-use", VALKEY_9_1, false);
    let servers = tier.server_uids();
    assert!(uninstall().is_err(), "the release is gone although a CacheCluster exists");
    let log = kubectl(&["-n", SYSTEM, "logs", &format!("job/{RELEASE}-uninstall")]).expect("the hook's log");
    assert!(log.contains(&format!("CacheCluster {PLACE}/in-use")) && log.contains("uninstall.force=true"), "{log}");

    let status = run("helm", &["status", RELEASE, "--namespace", SYSTEM, "--output", "json"], "").expect("its status");
    let status: Value = serde_json::from_str(&status).expect("JSON");
    // Without a number it would be the one before, which a release that was never upgraded has not.
    let revision = status["version"].to_string();
    run("helm", &["rollback", RELEASE, &revision, "--namespace", SYSTEM, "--wait"], "").expect("rolled back");
    let chart = format!("{}/charts/larder", env!("CARGO_MANIFEST_DIR"));
    let forced = ["upgrade", RELEASE, &chart, "--namespace", SYSTEM, "--reuse-values", "--set", "uninstall.force=true", "--wait"];
    run("helm", &forced, "").expect("upgraded");
    uninstall().expect("uninstalled by force");
    assert!(get("", "crd/cacheclusters.larder.dev").is_some(), "the definitions went with the release");
    assert_eq!(tier.server_uids(), servers, "the servers run on unattended");

    install::install().expect("installed again");
    tier.settle("under the operator again");
    assert_eq!(tier.server_uids(), servers, "an operator that comes back finds everything as it should be");
    tier.delete();
    uninstall().expect("uninstalled, since nothing is left");
    install::install().expect("installed for the tests that follow");
}
