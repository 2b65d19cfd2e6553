//! Mode Cluster: shards are formed, lose their primaries in every way that pods do, roll, come and go, and every value is still there.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use serde_json::json;

use super::cluster::{eventually, kubectl, name, uid};
use super::install::{self, PLACE};
use super::nodes::kill_process;
use super::report::{self, Line};
use super::shards;
use super::tier::{Engine, REDIS_7_0, SETTLES_WITHIN, Tier, VALKEY_9_1};

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
        eventually("a write is taken", Duration::from_secs(30), || match ask(tier, &words)?.as_str() {
            "OK" => Ok(()),
            said => Err(said.to_owned()),
        });
    }
    // Replicas acknowledge once a second.
    std::thread::sleep(Duration::from_secs(2));
}

pub fn check(tier: &Tier, round: usize, why: &str) {
    for tag in TAGS {
        let values = values(tag, round);
        let words: Vec<&str> = ["MGET"].into_iter().chain(values.iter().step_by(2).map(String::as_str)).collect();
        let found = eventually("a read is answered", Duration::from_secs(30), || {
            let found = ask(tier, &words)?;
            // So says one that has begun anew, for the first seconds.
            if found.starts_with("CLUSTERDOWN") || found.starts_with("LOADING") { Err(found) } else { Ok(found) }
        });
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

/// Every value that was acknowledged before a disturbance is there after it.
struct Rounds<'a> {
    tier: &'a Tier,
    round: usize,
}

impl Rounds<'_> {
    fn disturb(&mut self, what: &str, act: impl FnOnce(&Tier)) {
        write(self.tier, self.round);
        let began = Instant::now();
        act(self.tier);
        let took = began.elapsed();
        check(self.tier, self.round, what);
        report::add(Line { took: Some(took), ..Line::of(self.tier, what) });
        self.round += 1;
    }
}

fn delete_primary(tier: &Tier) {
    let (first, before) = (primaries(tier)["0"].clone(), epoch(tier));
    replace(tier, &[first], &[], "after a primary's pod was deleted");
    // Where that left two primaries on one node, it may have got its shard back by now.
    assert!(epoch(tier) > before, "it has handed over");
}

/// Another takes over, or it comes back with all that it had, where that is on a volume.
fn kill_primary_s_process(tier: &Tier) {
    let killed = primaries(tier)["2"].clone();
    let run = || {
        let info = tier.ask(&killed, "6379", &["info", "server"])?;
        info.lines().find_map(|line| line.strip_prefix("run_id:")).map(str::to_owned).ok_or(info)
    };
    let before = run().expect("it is told");
    kill_process(&killed, &tier.engine.server());
    eventually("another process", Duration::from_secs(120), || if run()? == before { Err(before.clone()) } else { Ok(()) });
    tier.settle("after a primary's process was killed");
}

/// Without two of three primaries nobody votes: the operator has their replicas take over.
fn kill_a_majority(tier: &Tier) {
    let killed: Vec<String> = primaries(tier).into_values().take(2).collect();
    replace(tier, &killed, &["--force", "--grace-period=0"], "after two primaries' pods were killed at once");
}

/// Waits until every server's pod is another: there are twice as many as under Sentinel.
fn await_roll(tier: &Tier, before: &BTreeSet<String>) {
    eventually("every pod is another", SETTLES_WITHIN * 2, || match tier.server_uids().intersection(before).count() {
        0 => Ok(()),
        kept => Err(format!("{kept} are as before")),
    });
    tier.settle("after a roll");
}

fn upgrade(tier: &Tier, newer: Engine) {
    let before = tier.server_uids();
    tier.patch(&json!({"engine": newer.spec()}));
    await_roll(tier, &before);
}

fn suite(cluster: &str, engine: Engine, durable: bool) {
    let _cluster = install::cluster();
    let _others = install::beside_others();
    let (tier, took) = Tier { durable, shards: Some(SHARDS), ..Tier::of(cluster, engine) }.make();
    report::add(Line { took: Some(took), ..Line::of(&tier, "made and ready") });
    let info = ask(&tier, &["cluster", "info"]).expect("an answer");
    assert!(info.contains("cluster_state:ok") && info.contains("cluster_size:3"), "{info}");
    assert_eq!(primaries(&tier).len(), SHARDS as usize);

    let mut rounds = Rounds { tier: &tier, round: 0 };
    rounds.disturb("primary deleted", delete_primary);
    rounds.disturb("primary killed", |tier| {
        let killed = primaries(tier)["1"].clone();
        replace(tier, &[killed], &["--force", "--grace-period=0"], "after a primary's pod was killed");
    });
    rounds.disturb("primary's process killed", kill_primary_s_process);
    rounds.disturb("restarted by a parameter", |tier| {
        let before = tier.server_uids();
        tier.patch(&json!({"parameters": {"io-threads": "2"}}));
        await_roll(tier, &before);
    });
    rounds.disturb("3, 5 and 3 shards", shards::come_and_go);
    if durable {
        rounds.disturb("all pods deleted", |tier| {
            let all: Vec<String> = tier.servers().iter().map(name).collect();
            replace(tier, &all, &[], "after all pods were deleted");
        });
    } else {
        rounds.disturb("majority killed", kill_a_majority);
    }
    if let Some(newer) = engine.newer() {
        rounds.disturb("upgraded", |tier| upgrade(tier, newer));
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
