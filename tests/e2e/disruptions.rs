//! What is done to a tier while the writers write, and what must hold.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::thread;
use std::time::Duration;

use serde_json::{Value, json};

use super::cluster::{condition, eventually, get, kill_in_pod, kubectl, list, name, uid};
use super::install::{PLACE, SYSTEM};
use super::report::{self, Line};
use super::tier::{SETTLES_WITHIN, Tier};
use super::writers::Writers;

/// What a case promises.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Promise {
    /// Planned: nothing acknowledged is lost, and the gap is within three times that of the engine's own failover, plus a second.
    Planned,
    /// A fault that Sentinel must notice first: replication is asynchronous, so what was acknowledged within a second may be lost.
    Fault,
    /// Nothing that clients notice: no loss, no failed command.
    Unnoticed,
    /// Nothing acknowledged is lost, but for a while there is nobody to serve.
    Kept,
    /// What is in memory is lost with all servers; the tier serves again.
    Emptied,
}

/// A case: its name, what it promises, and what it does. It returns when the tier is as it is meant to be afterwards.
pub struct Case {
    pub name: &'static str,
    pub promise: Promise,
    pub act: fn(&Tier),
}

/// The cases, in order of worth.
pub fn cases(tier: &Tier) -> Vec<Case> {
    use Promise::{Emptied, Fault, Kept, Planned, Unnoticed};
    let case = |name, promise, act| Case { name, promise, act };
    let mut cases = vec![
        case("primary pod deleted", Planned, delete_primary as fn(&Tier)),
        case("server process killed", Fault, kill_server),
        case("agent killed", Fault, kill_agent),
        case("live parameter", Unnoticed, change_live_parameter),
        case("parameter that restarts", Planned, change_start_parameter),
        case("bad image, reverted", Planned, name_a_bad_image),
        case("operator restarted in a roll", Planned, restart_operator_in_a_roll),
        case("replicas up and down", Planned, change_replicas),
        case("password rotated", Unnoticed, rotate_password),
        case("majority of sentinels lost", Planned, delete_sentinels),
        case("node drained", Planned, drain_node),
        case("all pods deleted", if tier.durable { Kept } else { Emptied }, delete_all_pods),
    ];
    if std::env::var_os("LARDER_E2E_NODES").is_none() {
        eprintln!("left out: processes are killed from their nodes, which must be containers of kind");
        cases.retain(|case| case.promise != Fault);
    }
    if tier.engine.newer().is_some() {
        cases.push(case("upgraded to the next version", Planned, upgrade));
    }
    cases
}

/// The floor that bounds are relative to: the longest gap when a sentinel is told to fail over, with nothing else around it.
pub fn floor(tier: &Tier, writers: &Writers) -> Duration {
    let sentinel = name(tier.sentinels().first().expect("a sentinel"));
    let before = tier.primary();
    writers.begin();
    failover_by(tier, &sentinel);
    eventually("another primary", Duration::from_secs(60), || {
        let now = tier.primary();
        if now == before { Err(format!("{now} still is")) } else { Ok(()) }
    });
    let report = writers.finish();
    tier.settle("after the engine's own failover");
    report::add(Line {
        tier: tier.name.clone(),
        case: "floor: the engine's own failover".to_owned(),
        report: Some(report.clone()),
        problem: None,
    });
    report.longest_gap
}

/// By Larder's own login, which the agent of the primary's pod uses too: clients may not fail over.
fn failover_by(tier: &Tier, sentinel: &str) {
    let system = get(PLACE, &format!("secret/{}-system", tier.name)).expect("the system's login");
    let field = |name: &str| super::tier::decode(system["data"][name].as_str().expect("a field of the login"));
    let mut command = vec!["sentinel", "failover", &tier.name];
    if tier.engine.has_coordinated_failover() {
        command.push("coordinated");
    }
    let said = tier.ask_as(&field("username"), &field("password"), sentinel, "26379", &command);
    assert_eq!(said.as_deref(), Ok("OK"));
}

/// Runs all cases, each to its end whatever became of the one before, and says which failed.
pub fn run_all(tier: &mut Tier, writers: &Writers) -> Vec<String> {
    let only = std::env::var("LARDER_E2E_CASES").ok();
    let floor = floor(tier, writers);
    let down_after = tier.down_after();
    let mut failed = Vec::new();
    for case in cases(tier) {
        if only.as_ref().is_some_and(|only| !only.split(',').any(|part| case.name.contains(part))) {
            continue;
        }
        eprintln!("{}: {}", tier.name, case.name);
        if let Err(panic) = catch_unwind(AssertUnwindSafe(|| run_case(tier, writers, &case, floor, down_after))) {
            let text =
                panic.downcast_ref::<String>().cloned().or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned()));
            let problem = format!("{}: {}: {}", tier.name, case.name, text.unwrap_or_default());
            eprintln!("{problem}\n{}", super::cluster::describe(PLACE));
            report::add(Line {
                tier: tier.name.clone(),
                case: case.name.to_owned(),
                report: None,
                problem: Some(problem.clone()),
            });
            failed.push(problem);
            if catch_unwind(AssertUnwindSafe(|| tier.settle("after a case that failed"))).is_err() {
                failed.push(format!("{}: the cases after it were not run: the tier does not settle", tier.name));
                break;
            }
        }
        if case.name.starts_with("upgraded") {
            tier.engine = tier.engine.newer().unwrap_or(tier.engine);
        }
    }
    failed
}

fn run_case(tier: &Tier, writers: &Writers, case: &Case, floor: Duration, down_after: Duration) {
    if case.promise == Promise::Fault {
        // Sentinels begin no failover by themselves within this time of the last one: the case would measure that.
        thread::sleep(2 * tier.failover_timeout());
    }
    writers.begin();
    (case.act)(tier);
    let report = writers.finish();
    report::add(Line { tier: tier.name.clone(), case: case.name.to_owned(), report: Some(report.clone()), problem: None });
    let bound = match case.promise {
        Promise::Planned => Some(3 * floor + Duration::from_secs(1)),
        Promise::Fault => Some(3 * (floor + down_after) + Duration::from_secs(1)),
        Promise::Unnoticed => Some(floor + Duration::from_secs(1)),
        Promise::Kept | Promise::Emptied => None,
    };
    if let Some(bound) = bound {
        assert!(
            report.longest_gap <= bound,
            "nothing was acknowledged for {:?}, more than {bound:?}: {report:?}",
            report.longest_gap
        );
    }
    match case.promise {
        Promise::Planned | Promise::Kept => assert_eq!(report.lost, 0, "acknowledged and lost: {report:?}"),
        Promise::Unnoticed => assert_eq!((report.lost, report.failed), (0, 0), "clients noticed: {report:?}"),
        // Four writers at 250 a second.
        Promise::Fault => assert!(report.lost <= 1_000, "more than a second of what was acknowledged is lost: {report:?}"),
        Promise::Emptied => {}
    }
}

fn changed(tier: &Tier, before: &str) {
    eventually("another primary", Duration::from_secs(90), || {
        let now = tier.primary();
        if now == before { Err(format!("{now} still is")) } else { Ok(()) }
    });
    tier.settle("with another primary");
}

fn delete_primary(tier: &Tier) {
    let primary = tier.primary();
    kubectl(&["-n", PLACE, "delete", "pod", &primary, "--wait=false"]).expect("deleted");
    changed(tier, &primary);
}

fn kill_server(tier: &Tier) {
    let primary = tier.primary();
    kill_in_pod(PLACE, &primary, &tier.engine.server()).expect("killed");
    changed(tier, &primary);
}

fn kill_agent(tier: &Tier) {
    let primary = tier.primary();
    kill_in_pod(PLACE, &primary, "larderd").expect("killed");
    changed(tier, &primary);
}

/// What every server says of one of its settings.
fn setting(tier: &Tier, key: &str) -> Vec<String> {
    let servers = tier.servers();
    servers.iter().map(|pod| tier.ask(&name(pod), "6379", &["config", "get", key]).unwrap_or_else(|error| error)).collect()
}

fn change_live_parameter(tier: &Tier) {
    let before = tier.server_uids();
    tier.patch(&json!({"parameters": {"slowlog-max-len": "77"}}));
    eventually("every server has the setting", Duration::from_secs(120), || {
        let said = setting(tier, "slowlog-max-len");
        if said.iter().all(|said| said.ends_with("77")) { Ok(()) } else { Err(format!("{said:?}")) }
    });
    tier.settle("with the setting");
    assert_eq!(tier.server_uids(), before, "no pod is replaced for what the servers take up while they run");
}

/// Waits until none of the servers is one of those before.
fn replaced(tier: &Tier, before: &std::collections::BTreeSet<String>) {
    eventually("every server is replaced", SETTLES_WITHIN, || {
        let left: Vec<String> = tier.server_uids().intersection(before).cloned().collect();
        if left.is_empty() { Ok(()) } else { Err(format!("{} are left", left.len())) }
    });
    tier.settle("after the roll");
}

fn change_start_parameter(tier: &Tier) {
    let before = tier.server_uids();
    tier.patch(&json!({"parameters": {"tcp-backlog": "100"}}));
    replaced(tier, &before);
    let said = setting(tier, "tcp-backlog");
    assert!(said.iter().all(|said| said.ends_with("100")), "{said:?}");
}

fn name_a_bad_image(tier: &Tier) {
    let good = tier.object()["spec"]["engine"]["image"].clone();
    tier.patch(&json!({"engine": {"image": "larder-kind/none:of-that-name"}}));
    eventually("the status tells of the image", Duration::from_secs(120), || {
        let object = tier.object();
        let told = ["Degraded", "Progressing"].iter().filter_map(|kind| condition(&object, kind));
        let told: Vec<Value> = told.filter(|told| told["message"].as_str().is_some_and(|text| text.contains("image"))).collect();
        if told.is_empty() { Err(object["status"].to_string()) } else { Ok(()) }
    });
    thread::sleep(Duration::from_secs(10));
    let unready = tier.pods().iter().filter(|pod| !super::tier::is_ready(pod)).count();
    assert!(unready <= 1, "the roll went on to {unready} pods although the first did not start");
    tier.patch(&json!({"engine": {"image": good}}));
    tier.settle("with the former image");
}

fn restart_operator_in_a_roll(tier: &Tier) {
    let before = tier.server_uids();
    tier.patch(&json!({"pod": {"annotations": {"e2e/roll": uid(&tier.servers()[0])}}}));
    eventually("the roll is under way", Duration::from_secs(120), || {
        let left = tier.pods().iter().filter(|pod| super::tier::is_ready(pod)).count();
        if left < tier.pods().len() { Ok(()) } else { Err("every pod is as it was".to_owned()) }
    });
    kubectl(&["-n", SYSTEM, "delete", "pods", "-l", "app.kubernetes.io/component=operator", "--wait=false"]).expect("deleted");
    replaced(tier, &before);
}

fn change_replicas(tier: &Tier) {
    for count in [2, 1] {
        tier.patch(&json!({"replicas": count}));
        tier.settle(&format!("with {count} replicas"));
        assert_eq!(tier.servers().len(), count + 1);
    }
}

fn rotate_password(tier: &Tier) {
    tier.set_password(&format!("next-{}", uid(&tier.object()))).expect("a Secret");
    eventually("every server takes the new password", Duration::from_secs(120), || {
        for pod in tier.servers() {
            tier.ask(&name(&pod), "6379", &["ping"]).and_then(|said| if said == "PONG" { Ok(()) } else { Err(said) })?;
        }
        Ok(())
    });
    // Kubelets bring it to the writers within a minute or so; both passwords work meanwhile.
    thread::sleep(Duration::from_secs(75));
    tier.settle("with the new password");
}

fn delete_sentinels(tier: &Tier) {
    let sentinels: Vec<String> = tier.sentinels().iter().map(name).collect();
    for sentinel in sentinels.iter().take(sentinels.len() / 2 + 1) {
        kubectl(&["-n", PLACE, "delete", "pod", sentinel, "--grace-period=0", "--force", "--wait=false"]).expect("deleted");
    }
    tier.settle("with all sentinels");
    tier.primary();
}

fn drain_node(tier: &Tier) {
    let primary = tier.primary();
    let pod = get(PLACE, &format!("pod/{primary}")).expect("a pod");
    let node = pod["spec"]["nodeName"].as_str().expect("a node").to_owned();
    let selector = format!("--pod-selector=larder.dev/cluster={}", tier.name);
    let drained = kubectl(&["drain", &node, "--ignore-daemonsets", "--delete-emptydir-data", "--timeout=180s", &selector]);
    let moved = catch_unwind(AssertUnwindSafe(|| {
        eventually("the primary is elsewhere", Duration::from_secs(90), || {
            let now = tier.primary();
            let pod = get(PLACE, &format!("pod/{now}")).unwrap_or_default();
            if pod["spec"]["nodeName"] == *node { Err(format!("{now} is on {node}")) } else { Ok(()) }
        });
    }));
    kubectl(&["uncordon", &node]).expect("uncordoned");
    drained.expect("drained");
    moved.expect("the primary moved");
    spread_sentinels(tier);
    tier.settle("after the drain");
}

/// Where a drain left a majority of the sentinels on one node, which the status tells, the operator moves one of them.
fn spread_sentinels(tier: &Tier) {
    let is_crowded = || condition(&tier.object(), "Degraded").is_some_and(|found| found["reason"] == "TooFewNodes");
    eventually("it is known where the sentinels are", SETTLES_WITHIN, || if is_crowded() { Ok(()) } else { tier.settled() });
    eventually("no node holds most of the sentinels", SETTLES_WITHIN, || {
        let nodes = || tier.sentinels().iter().map(|pod| pod["spec"]["nodeName"].to_string()).collect::<Vec<_>>();
        if is_crowded() { Err(format!("they are on {:?}", nodes())) } else { Ok(()) }
    });
}

fn delete_all_pods(tier: &Tier) {
    let before = tier.server_uids();
    kubectl(&["-n", PLACE, "delete", "pods", "-l", &format!("larder.dev/cluster={}", tier.name), "--wait=false"])
        .expect("deleted");
    replaced(tier, &before);
}

fn upgrade(tier: &Tier) {
    let before = tier.server_uids();
    let newer = tier.engine.newer().expect("a newer version");
    tier.patch(&json!({"engine": newer.spec()}));
    replaced(tier, &before);
    let wanted = newer.spec()["image"].clone();
    for pod in list(PLACE, "pods", &format!("larder.dev/cluster={},app.kubernetes.io/component", tier.name)) {
        let image = &pod["spec"]["containers"][0]["image"];
        assert!(wanted.is_null() || *image == wanted, "{} runs {image}", name(&pod));
    }
}
