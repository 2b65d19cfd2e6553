//! Mode Cluster: shards are formed, lose their primaries in every way that pods do, roll, come and go, and every value is still there.

use std::collections::BTreeMap;
use std::time::Duration;

use serde_json::json;

use super::cluster::{eventually, kubectl, name, uid};
use super::install::{self, PLACE};
use super::report::{self, Line};
use super::shards;
use super::tier::{Engine, REDIS_7_0, Tier, VALKEY_9_1};

const SHARDS: u32 = 3;
/// Tags of keys: with so many, each shard has some of their slots.
pub const TAGS: [&str; 12] = ["a", "b", "c", "d", "e", "f", "g", "h", "i", "j", "k", "l"];
const KEYS_OF_A_TAG: usize = 50;

/// The keys of a tag with their values, in words of MSET.
fn values(tag: &str, round: usize) -> Vec<String> {
    (0..KEYS_OF_A_TAG).flat_map(|key| [format!("{{{tag}}}{key}"), format!("{round}-{key}")]).collect()
}

/// Asks by way of a pod, and goes where the Cluster says.
pub fn ask(tier: &Tier, command: &[&str]) -> Result<String, String> {
    let pod = tier.servers().first().map(name).ok_or("there is no server")?;
    let mut line = tier.client_line("app", &tier.password(), &pod, "6379");
    line.push("-c".to_owned());
    let words: Vec<&str> = line.iter().map(String::as_str).chain(command.iter().copied()).collect();
    kubectl(&words)
}

/// Writes a new value to each key, and has each acknowledged by a replica, too.
pub fn write(tier: &Tier, round: usize) {
    for tag in TAGS {
        let values = values(tag, round);
        let words: Vec<&str> = ["MSET"].into_iter().chain(values.iter().map(String::as_str)).collect();
        let said = eventually("a write is taken", Duration::from_secs(30), || ask(tier, &words));
        assert_eq!(said, "OK", "{tag}");
    }
    // Replicas acknowledge once a second.
    std::thread::sleep(Duration::from_secs(2));
}

pub fn check(tier: &Tier, round: usize, why: &str) {
    for tag in TAGS {
        let values = values(tag, round);
        let words: Vec<&str> = ["MGET"].into_iter().chain(values.iter().step_by(2).map(String::as_str)).collect();
        let found = eventually("a read is answered", Duration::from_secs(30), || ask(tier, &words));
        let expected: Vec<&str> = values.iter().skip(1).step_by(2).map(String::as_str).collect();
        assert_eq!(found.lines().collect::<Vec<_>>(), expected, "{tag} {why}");
    }
}

/// The pods that own slots, by shard.
pub fn primaries(tier: &Tier) -> BTreeMap<String, String> {
    let pods = tier.servers();
    let primary = |pod: &serde_json::Value| {
        let role = tier.ask(&name(pod), "6379", &["role"]).ok()?;
        let shard = pod["metadata"]["labels"]["larder.dev/shard"].as_str()?.to_owned();
        role.starts_with("master").then(|| (shard, name(pod)))
    };
    pods.iter().filter_map(primary).collect()
}

/// Rises with each change of who owns slots.
fn epoch(tier: &Tier) -> u64 {
    let info = ask(tier, &["cluster", "info"]).expect("an answer");
    let epoch = info.lines().find_map(|line| line.trim_end().strip_prefix("cluster_current_epoch:"));
    epoch.expect("it is told").parse().expect("a number")
}

fn delete(pods: &[String], how: &[&str]) {
    let words: Vec<&str> = ["-n", PLACE, "delete", "pod", "--wait=false"]
        .into_iter()
        .chain(how.iter().copied())
        .chain(pods.iter().map(String::as_str))
        .collect();
    kubectl(&words).expect("deleted");
}

/// Deletes pods, and waits until others stand in their places and all is well.
fn replace(tier: &Tier, pods: &[String], how: &[&str], why: &str) {
    let before = tier.server_uids();
    delete(pods, how);
    eventually("the pods are others", Duration::from_secs(120), || {
        let kept = tier.servers().iter().map(uid).filter(|uid| before.contains(uid)).count();
        if kept <= before.len() - pods.len() { Ok(()) } else { Err(format!("{kept} are as before")) }
    });
    tier.settle(why);
}

fn suite(cluster: &str, engine: Engine, durable: bool) {
    let _cluster = install::cluster();
    let _others = install::beside_others();
    let (tier, took) = Tier { durable, shards: Some(SHARDS), ..Tier::of(cluster, engine) }.make();
    report::add(Line { took: Some(took), ..Line::of(&tier, "made and ready") });
    let info = ask(&tier, &["cluster", "info"]).expect("an answer");
    assert!(info.contains("cluster_state:ok") && info.contains("cluster_size:3"), "{info}");
    assert_eq!(primaries(&tier).len(), SHARDS as usize);
    write(&tier, 0);

    let (first, before) = (primaries(&tier)["0"].clone(), epoch(&tier));
    replace(&tier, &[first], &[], "after a primary's pod was deleted");
    check(&tier, 0, "after a primary's pod was deleted");
    // Where that left two primaries on one node, it may have got its shard back by now.
    assert!(epoch(&tier) > before, "it has handed over");

    write(&tier, 1);
    let killed = primaries(&tier)["1"].clone();
    replace(&tier, &[killed], &["--force", "--grace-period=0"], "after a primary's pod was killed");
    check(&tier, 1, "after a primary's pod was killed");

    write(&tier, 2);
    let before = tier.server_uids();
    tier.patch(&json!({"parameters": {"io-threads": "2"}}));
    eventually("every pod is another", super::tier::SETTLES_WITHIN * 2, || {
        let kept = tier.servers().iter().map(uid).filter(|uid| before.contains(uid)).count();
        if kept == 0 { Ok(()) } else { Err(format!("{kept} are as before")) }
    });
    tier.settle("after a roll");
    check(&tier, 2, "after a roll");

    shards::come_and_go(&tier);

    if durable {
        write(&tier, 3);
        let all: Vec<String> = tier.servers().iter().map(name).collect();
        replace(&tier, &all, &[], "after all pods were deleted");
        check(&tier, 3, "after all pods were deleted");
    }
    tier.delete();
}

#[test]
fn clusters_redis_7_0_persistent() {
    suite("cluster-redis-7-0-p", REDIS_7_0, true);
}

#[test]
fn clusters_valkey_9_1_ephemeral() {
    suite("cluster-valkey-9-1-e", VALKEY_9_1, false);
}
