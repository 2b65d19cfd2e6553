//! Planned handover under writers.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use larder::operator::admin::Entry;
use larder::operator::cache_cluster::handover::{Handover, HandoverError, Outcome};
use larder::operator::election::Leadership;
use serde_json::{Value as Json, json};

use super::tier::{MASTER, Member, Tier, Watcher, signal};
use crate::support::resp::{Client, Value};
use crate::support::server::Engine;
use crate::support::tilt::{is_in_tilt, stand_still};

const WRITERS: usize = 4;
/// How long a writer rests after each write: sentinels and servers share the processors with it.
const PACE: Duration = Duration::from_millis(1);

/// Writes values of its own to whichever server takes them, and keeps those that were acknowledged.
fn writer(id: usize, ports: Vec<u16>, stop: Arc<AtomicBool>) -> (Vec<String>, Duration) {
    let (mut acknowledged, mut longest, mut last) = (Vec::new(), Duration::ZERO, Instant::now());
    let mut connection: Option<Client> = None;
    let (mut at, mut number) = (0, 0);
    while !stop.load(Ordering::Relaxed) {
        let key = format!("w{id}:{number}");
        let Some(client) = connection.as_mut() else {
            connection = Client::connect(ports[at % ports.len()]).ok();
            at += 1;
            continue;
        };
        match client.try_call(&["SET", &key, "x"]) {
            Ok(Value::Simple(_)) => {
                longest = longest.max(last.elapsed());
                last = Instant::now();
                acknowledged.push(key);
                number += 1;
                thread::sleep(PACE);
            }
            // Whether it was done is not known: it is not counted, and another key follows.
            Ok(_) | Err(_) => {
                (connection, number) = (None, number + 1);
                thread::sleep(Duration::from_millis(5));
            }
        }
    }
    (acknowledged, longest)
}

/// Writers that are under way.
struct Writers {
    stop: Arc<AtomicBool>,
    threads: Vec<thread::JoinHandle<(Vec<String>, Duration)>>,
}

impl Writers {
    fn start(tier: &Tier) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let ports: Vec<u16> = tier.members.iter().map(|member| member.port).collect();
        let thread = |id| {
            let (ports, stop) = (ports.clone(), stop.clone());
            thread::spawn(move || writer(id, ports, stop))
        };
        let threads = (0..WRITERS).map(thread).collect();
        thread::sleep(Duration::from_millis(500));
        Self { stop, threads }
    }

    /// Ends them, counts the acknowledged writes that `primary` does not have, and tells how long one of them waited at most.
    fn end(self, primary: &Member) -> (usize, Duration) {
        thread::sleep(Duration::from_millis(500));
        self.stop.store(true, Ordering::Relaxed);
        let mut client = primary.client();
        let mut lacks = |key: &String| reply_of(primary, &mut client, &["GET", key]) == Value::Nil;
        let (mut lost, mut longest) = (0, Duration::ZERO);
        for thread in self.threads {
            let (acknowledged, waited) = thread.join().expect("the writer ends");
            println!("{} acknowledged, longest wait {waited:?}", acknowledged.len());
            longest = longest.max(waited);
            assert!(acknowledged.len() > 100, "too few writes to say anything: {}", acknowledged.len());
            lost += acknowledged.iter().filter(|key| lacks(key)).count();
        }
        (lost, longest)
    }
}

/// What a server answers. The sentinel that promoted it cuts its clients off once, a moment after it has begun to lead.
fn reply_of(member: &Member, client: &mut Client, words: &[&str]) -> Value {
    let mut given = client.try_call(words);
    if given.is_err() {
        *client = member.client();
        given = client.try_call(words);
    }
    given.unwrap_or_else(|error| panic!("{words:?}: {error}"))
}

fn check(engine: Engine) {
    let tier = Tier::form(engine, 3, false);
    let writers = Writers::start(&tier);
    // Two ask at the same time, as a control plane and a preStop hook would: one does it, the other finds it done.
    let ask = || tier.members[0].ask(&["handover", "--limit", "30s"]);
    let (answer, other) = thread::scope(|scope| {
        let other = scope.spawn(ask);
        (ask(), other.join().expect("it ends"))
    });
    let texts = [&answer, &other].map(|answer| String::from_utf8_lossy(&answer.stdout).into_owned());
    assert!(answer.status.success() && other.status.success(), "{answer:?} {other:?}\n{}", tier.members[0].log());
    let mut reports: Vec<Json> = texts.iter().map(|text| serde_json::from_str(text).expect("JSON")).collect();
    reports.sort_by_key(|report| report["outcome"].to_string());
    assert_eq!((&reports[0]["outcome"], &reports[1]["outcome"]), (&json!("done"), &json!("noPrimary")), "{texts:?}");
    let successor = tier.wait_for_successor(0);
    assert_eq!(reports[0]["primary"], tier.members[successor].address());
    assert_eq!(writers.end(&tier.members[successor]).0, 0, "acknowledged writes were lost");
    assert!(tier.members[0].get("/metrics").1.contains("larder_agent_handovers_total 1"));
}

/// The server that the last two sentinels name, once the others follow it.
fn leader(tier: &Tier) -> usize {
    let mut leader = None;
    tier.wait("somebody to lead and the others to follow", || {
        let named = tier.sentinels[1].names().filter(|named| tier.sentinels[2].names() == Some(*named));
        leader = tier.members.iter().position(|member| Some(member.port) == named);
        let follows = |member: &Member| member.phase()["replica"]["linkUp"] == json!(true);
        leader.is_some_and(|leader| tier.members[leader].phase() == json!("primary"))
            && tier.members.iter().filter(|member| follows(member)).count() == tier.members.len() - 1
    });
    leader.expect("somebody leads")
}

/// The sentinel that was asked dies in the middle. However it ends, no acknowledged write is lost and somebody leads; and writes wait
/// not much longer than where it lives, since another is asked.
fn check_with_dying_sentinel(engine: Engine) {
    let mut tier = Tier::form(engine, 3, false);
    let writers = Writers::start(&tier);
    let answer = tier.members[0].ask(&["handover", "--limit", "30s"]);
    assert!(answer.status.success(), "{engine:?}: {answer:?}\n{}", tier.members[0].log());
    let first = leader(&tier);
    let (lost, floor) = writers.end(&tier.members[first]);
    assert_eq!(lost, 0, "acknowledged writes were lost");

    let writers = Writers::start(&tier);
    let socket = tier.members[first].socket();
    let asking = thread::spawn(move || {
        let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_larderd"));
        command.args(["agent", "handover", "--limit", "10s", "--socket"]).arg(socket).output().expect("larderd runs")
    });
    // It is asked first, as soon as the replicas are equal.
    tier.wait("the first sentinel to act", || asking.is_finished() || tier.sentinels[0].acts());
    tier.sentinels[0].kill();
    let answer = asking.join().expect("it ends");
    println!("{engine:?}: {}", String::from_utf8_lossy(&[answer.stdout, answer.stderr].concat()));
    let (lost, longest) = writers.end(&tier.members[leader(&tier)]);
    assert_eq!(lost, 0, "acknowledged writes were lost");
    println!("{engine:?}: writes waited {longest:?}, and {floor:?} where all sentinels live");
    assert!(longest <= 6 * floor + Duration::from_secs(1), "writes waited {longest:?}, and {floor:?} where all sentinels live");
}

#[test]
fn a_sentinel_that_dies_in_the_middle_of_a_handover_loses_nothing() {
    for engine in Engine::ALL {
        check_with_dying_sentinel(engine);
    }
}

/// A sentinel whose node stood still carries nothing out for half a minute, although it takes the order.
#[test]
fn a_sentinel_in_tilt_mode_is_passed_over() {
    for engine in Engine::ALL {
        let tier = Tier::form(engine, 2, false);
        let sentinel = &tier.sentinels[0];
        stand_still(sentinel.port);
        let answer = tier.members[0].ask(&["handover", "--limit", "20s"]);
        assert!(answer.status.success(), "{engine:?}: {answer:?}\n{}", tier.members[0].log());
        assert!(is_in_tilt(sentinel.port), "{engine:?}: the handover waited for a sentinel that did not act");
    }
}

#[test]
fn a_handover_by_pause_loses_no_acknowledged_write() {
    check(Engine::Redis7);
}

#[test]
fn a_coordinated_handover_loses_no_acknowledged_write() {
    check(Engine::Valkey9);
}

#[test]
fn a_handover_that_cannot_be_is_given_up_and_writes_go_on() {
    let mut tier = Tier::form(Engine::Redis7, 2, false);
    // The replica hangs: it will never have everything.
    let pid = tier.members[1].server_pid();
    signal("STOP", pid);
    let answer = tier.members[0].ask(&["handover", "--limit", "2s"]);
    assert!(!answer.status.success());
    let mut client = tier.members[0].client();
    assert_eq!(client.line("SET after x"), Value::Simple("OK".to_owned()), "writes are not paused any more");
    signal("CONT", pid);
    // Without any replica it is refused at once.
    tier.members[1].kill_agent();
    tier.wait("the replica to be gone", || client.line("INFO replication").text().contains("connected_slaves:0"));
    let answer = tier.members[0].ask(&["handover", "--limit", "60s"]);
    assert!(String::from_utf8_lossy(&answer.stderr).contains("no replica"), "{answer:?}");
}

/// Hands server `from` over to `to` as an operator does.
fn hand_over_as_operator(tier: &Tier, from: usize, to: usize) -> Result<Outcome, HandoverError> {
    let at = |port: u16| SocketAddr::from(([127, 0, 0, 1], port));
    let sentinels: Vec<SocketAddr> = tier.sentinels.iter().map(|sentinel| at(sentinel.port)).collect();
    let (from, to) = (at(tier.members[from].port), at(tier.members[to].port));
    let (entry, leadership, limit) = (Entry::default(), &Leadership::for_good(), Duration::from_secs(30));
    let handover = Handover { master: MASTER, from, to, sentinels: &sentinels, entry, leadership, limit };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    runtime.block_on(handover.run())
}

/// As where somebody deletes the pod that the operator is about to replace: there and back, several times.
#[test]
fn the_agents_handover_and_the_operators_at_once_are_one() {
    for engine in Engine::ALL {
        let tier = Tier::form(engine, 2, false);
        let writers = Writers::start(&tier);
        for (from, to) in [(0, 1), (1, 0), (0, 1), (1, 0)] {
            let (agents, operators) = thread::scope(|scope| {
                let agents = scope.spawn(|| tier.members[from].ask(&["handover", "--limit", "30s"]));
                let operators = hand_over_as_operator(&tier, from, to);
                (agents.join().expect("it ends"), operators)
            });
            println!("{engine:?}: {} {operators:?}", String::from_utf8_lossy(&agents.stdout));
            assert!(
                agents.status.success() && operators.is_ok(),
                "{engine:?}: {agents:?} {operators:?}\n{}",
                tier.members[from].log()
            );
            assert_eq!(tier.wait_for_successor(from), to);
        }
        assert_eq!(writers.end(&tier.members[0]).0, 0, "{engine:?}: acknowledged writes were lost");
    }
}

/// The operator's handover has got further: what this one gives up must not let writes go on that the successor lacks.
#[test]
fn writes_stay_paused_where_a_handover_is_given_up_while_sentinels_act() {
    let tier = Tier::form(Engine::Redis7, 2, false);
    tier.wait("a sentinel that would promote the replica", || tier.sentinels[0].would_promote());
    // It begins to, although the replica hangs, which will therefore never have everything.
    let pid = tier.members[1].server_pid();
    signal("STOP", pid);
    let mut sentinel = Client::connect(tier.sentinels[0].port).expect("it accepts");
    assert_eq!(sentinel.line(&format!("SENTINEL FAILOVER {MASTER}")), Value::Simple("OK".to_owned()));
    let answer = tier.members[0].ask(&["handover", "--limit", "2s"]);
    assert!(String::from_utf8_lossy(&answer.stderr).contains("no replica had everything"), "{answer:?}");
    assert!(tier.members[0].was_told("client|pause") && !tier.members[0].was_told("client|unpause"), "{answer:?}");
    signal("CONT", pid);
}

/// The grace of a pod may end before its handover does: then the agent is told to end in the middle of it.
fn check_short_grace(engine: Engine, hangs: bool) {
    let mut tier = Tier::form(engine, 3, false);
    let shutdown = Duration::from_secs(3);
    tier.configure(json!({"shutdown": "3s"}));
    tier.wait("the configuration to be taken up", || tier.members[0].state()["generation"] == json!(tier.generation()));
    let writers = Writers::start(&tier);
    let hung = hangs.then(|| tier.members[1].server_pid());
    hung.into_iter().for_each(|pid| signal("STOP", pid));
    let socket = tier.members[0].socket();
    let asking = thread::spawn(move || {
        let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_larderd"));
        command.args(["agent", "handover", "--limit", "30s", "--socket"]).arg(socket).output().expect("larderd runs")
    });
    tier.wait("the handover to be under way", || {
        let is_paused = hangs && tier.members[0].was_told("client|pause");
        is_paused || tier.sentinels.iter().any(Watcher::acts) || asking.is_finished()
    });
    let told = Instant::now();
    let status = tier.members[0].stop_agent();
    // Beside the bound: the look before it, the last requests, and a machine that is busy.
    assert!(status.success() && told.elapsed() < shutdown + Duration::from_secs(10), "{engine:?}: {status} {:?}", told.elapsed());
    let answer = asking.join().expect("it ends");
    println!("{engine:?}: ended {:?} after it was told: {}", told.elapsed(), String::from_utf8_lossy(&answer.stderr));
    let leads = |member: &Member| member.phase() == json!("primary");
    tier.wait("another to lead", || tier.members[1..].iter().any(leads));
    let successor = &tier.members[if leads(&tier.members[1]) { 1 } else { 2 }];
    let written = reply_of(successor, &mut successor.client(), &["SET", "after", "x"]);
    assert_eq!(written, Value::Simple("OK".to_owned()), "{engine:?}: writes go on there");
    // It would keep the writers that ask it waiting, too.
    hung.into_iter().for_each(|pid| signal("CONT", pid));
    assert_eq!(writers.end(successor).0, 0, "{engine:?}: acknowledged writes were lost");
}

#[test]
fn a_handover_that_the_end_of_the_pod_cuts_short_loses_no_acknowledged_write() {
    for engine in Engine::ALL {
        check_short_grace(engine, false);
    }
}

#[test]
fn a_handover_that_waits_for_a_replica_that_hangs_does_not_hold_up_the_end_of_the_pod() {
    for engine in Engine::ALL {
        check_short_grace(engine, true);
    }
}
