//! Changes that are planned: nothing acknowledged is lost by any of them.

use std::collections::BTreeSet;
use std::thread;
use std::time::Duration;

use serde_json::{Value, json};

use super::cluster::{condition, eventually, kubectl, list, name, uid};
use super::disruptions::{Scene, changed, replaced};
use super::install::PLACE;
use super::nodes::{Cordoned, node_of};
use super::primaries::TAGS;
use super::tier::{SETTLES_WITHIN, Tier, is_ready};

/// How long a primary that is cut off goes on, by `spec.writes`, while there are two replicas.
pub const MAX_LAG: Duration = Duration::from_secs(3);
pub fn delete_primary(scene: &Scene<'_>) {
    let primary = scene.tier.reign();
    kubectl(&["-n", PLACE, "delete", "pod", &primary.pod, "--wait=false"]).expect("deleted");
    changed(scene.tier, &primary);
}

/// Waits until every server says of one of its settings what is wanted.
pub fn await_setting(tier: &Tier, key: &str, wanted: &str) {
    eventually(&format!("every server has {key} {wanted}"), Duration::from_secs(120), || {
        for pod in tier.servers() {
            let said = tier.ask_as_larder(&name(&pod), "6379", &["config", "get", key])?;
            if said.lines().last() != Some(wanted) {
                return Err(format!("{}: {said}", name(&pod)));
            }
        }
        Ok(())
    });
}

/// Gives a parameter the one of two values that it does not have.
fn change_parameter(tier: &Tier, key: &str, values: [&'static str; 2]) -> &'static str {
    let is_set = |value: &&str| tier.object()["spec"]["parameters"][key] == **value;
    let value = values.into_iter().find(|value| !is_set(value)).expect("one that it does not have");
    tier.patch(&json!({"parameters": {key: value}}));
    value
}

pub fn change_live_parameter(scene: &Scene<'_>) {
    let tier = scene.tier;
    let before = tier.server_uids();
    let value = change_parameter(tier, "slowlog-max-len", ["77", "78"]);
    await_setting(tier, "slowlog-max-len", value);
    tier.settle("with the setting");
    assert_eq!(tier.server_uids(), before, "no pod is replaced for what the servers take up while they run");
}

pub fn change_start_parameter(scene: &Scene<'_>) {
    let tier = scene.tier;
    let before = tier.server_uids();
    let value = change_parameter(tier, "tcp-backlog", ["100", "101"]);
    replaced(tier, &before);
    await_setting(tier, "tcp-backlog", value);
}

pub fn name_a_bad_image(scene: &Scene<'_>) {
    let tier = scene.tier;
    let good = tier.object()["spec"]["engine"]["image"].clone();
    tier.patch(&json!({"engine": {"image": "larder-kind/none:of-that-name"}}));
    eventually("the status tells of the image", Duration::from_secs(120), || {
        let object = tier.object();
        let told = ["Degraded", "Progressing"].iter().filter_map(|kind| condition(&object, kind));
        let told: Vec<Value> = told.filter(|told| told["message"].as_str().is_some_and(|text| text.contains("image"))).collect();
        if told.is_empty() { Err(object["status"].to_string()) } else { Ok(()) }
    });
    thread::sleep(Duration::from_secs(10));
    let unready = tier.pods().iter().filter(|pod| !is_ready(pod)).count();
    assert!(unready <= 1, "the roll went on to {unready} pods although the first did not start");
    tier.patch(&json!({"engine": {"image": good}}));
    tier.settle("once the image is right again");
}

/// From here on a primary needs one of two replicas to acknowledge a write.
pub fn add_replica(scene: &Scene<'_>) {
    let writes = json!({"minReplicas": 1, "maxLag": format!("{}s", MAX_LAG.as_secs())});
    scene.tier.patch(&json!({"replicas": 2, "writes": writes}));
    scene.tier.settle("with 2 replicas");
    assert_eq!(scene.tier.servers().len(), 3 * shards(scene.tier));
    await_setting(scene.tier, "min-replicas-to-write", "1");
}

pub fn remove_replica(scene: &Scene<'_>) {
    scene.tier.patch(&json!({"replicas": 1, "writes": null}));
    scene.tier.settle("with 1 replica");
    assert_eq!(scene.tier.servers().len(), 2 * shards(scene.tier));
}

fn shards(tier: &Tier) -> usize {
    tier.shards.map_or(1, |shards| shards as usize)
}

pub fn rotate_password(scene: &Scene<'_>) {
    let tier = scene.tier;
    let mark = if tier.password().starts_with("next-") { "then" } else { "next" };
    let password = format!("{mark}-{}", uid(&tier.object()));
    tier.set_password(&password).expect("a Secret");
    eventually("every server takes the new password", Duration::from_secs(120), || {
        for pod in tier.servers() {
            tier.ask(&name(&pod), "6379", &["ping"]).and_then(|said| if said == "PONG" { Ok(()) } else { Err(said) })?;
        }
        Ok(())
    });
    // They are told of it once every server has proved it; each logs in anew.
    eventually("the writers have the new password", Duration::from_secs(120), || match scene.writers.password() {
        held if held == password => Ok(()),
        held => Err(format!("{held:?}")),
    });
    scene.writers.await_reconnected();
    tier.settle("with the new password");
}

pub fn delete_sentinels(scene: &Scene<'_>) {
    let sentinels: Vec<String> = scene.tier.sentinels().iter().map(name).collect();
    for sentinel in sentinels.iter().take(sentinels.len() / 2 + 1) {
        kubectl(&["-n", PLACE, "delete", "pod", sentinel, "--grace-period=0", "--force", "--wait=false"]).expect("deleted");
    }
    scene.tier.settle("with all sentinels");
    scene.tier.primary();
}

/// With a full cache: the copy for the evicted pod's successor costs the server that takes over the most memory.
pub fn drain_node(scene: &Scene<'_>) {
    let tier = scene.tier;
    let primary = tier.primary();
    let node = node_of(&primary);
    let selector = format!("--pod-selector=larder.dev/cluster={}", tier.name);
    let restarts = tier.restarts();
    let cordon = Cordoned::by_drain(&node);
    kubectl(&["drain", &node, "--ignore-daemonsets", "--delete-emptydir-data", "--timeout=180s", &selector]).expect("drained");
    eventually("the primary is elsewhere", Duration::from_secs(90), || {
        let now = tier.primary();
        if node_of(&now) == node { Err(format!("{now} is on {node}")) } else { Ok(()) }
    });
    cordon.lift();
    spread(tier);
    tier.settle("after the drain");
    // A pod that was replaced counts from none.
    let now = tier.restarts();
    let more: Vec<&String> =
        now.iter().filter(|(pod, count)| restarts.get(*pod).is_some_and(|before| *count > before)).map(|(pod, _)| pod).collect();
    assert!(more.is_empty(), "containers of {more:?} were killed");
}

/// Fills a primary until it evicts, with values that go before any that the writers write: they live the shortest, see the manifest.
pub fn fill(scene: &Scene<'_>) {
    let tier = scene.tier;
    let primary = &tier.primary();
    let (line, value) = (tier.benchmark_line(primary, "50000"), "x".repeat(64));
    let key = TAGS[0].key("fill:__rand_int__");
    let command = ["set", &key, &value, "ex", "300"];
    let line: Vec<&str> = line.iter().map(String::as_str).chain(command).collect();
    let evicted = || {
        let said = tier.ask(primary, "6379", &["info", "stats"]).expect("an answer");
        said.lines().find_map(|line| line.strip_prefix("evicted_keys:")).map(str::trim).map(str::to_owned).expect("a number")
    };
    let before = evicted();
    eventually(&format!("{primary} is full"), Duration::from_secs(60), || {
        kubectl(&line)?;
        if evicted() == before { Err("nothing is evicted".to_owned()) } else { Ok(()) }
    });
}

/// Where cordons left a majority of the sentinels, or of a Cluster's primaries, on one node, which the status tells, the operator moves one of
/// them, or has one hand over to a replica elsewhere, which it moves there if need be.
pub fn spread(tier: &Tier) {
    let is_crowded = || condition(&tier.object(), "Degraded").is_some_and(|found| found["reason"] == "TooFewNodes");
    eventually("it is known where those are that vote", SETTLES_WITHIN, || if is_crowded() { Ok(()) } else { tier.settled() });
    eventually("no node holds most of them", SETTLES_WITHIN, || {
        let place = |pod: &Value| format!("{} on {}", name(pod), pod["spec"]["nodeName"]);
        let places = || tier.pods().iter().map(place).collect::<Vec<_>>();
        if is_crowded() { Err(format!("{:?}", places())) } else { Ok(()) }
    });
}

pub fn upgrade(scene: &Scene<'_>) {
    let tier = scene.tier;
    let before: BTreeSet<String> = tier.server_uids();
    let newer = tier.engine.newer().expect("a newer version");
    tier.patch(&json!({"engine": newer.spec()}));
    replaced(tier, &before);
    let wanted = newer.spec()["image"].clone();
    for pod in list(PLACE, "pods", &format!("larder.dev/cluster={},app.kubernetes.io/component", tier.name)) {
        let image = &pod["spec"]["containers"][0]["image"];
        assert!(wanted.is_null() || *image == wanted, "{} runs {image}", name(&pod));
    }
}
