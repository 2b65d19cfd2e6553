//! Planned handover under writers.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::Value as Json;

use super::tier::Tier;
use crate::support::resp::{Client, Value};
use crate::support::server::Engine;

const WRITERS: usize = 4;

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

fn check(engine: Engine) {
    let tier = Tier::form(engine, 3, false);
    let stop = Arc::new(AtomicBool::new(false));
    let ports: Vec<u16> = tier.members.iter().map(|member| member.port).collect();
    let writers: Vec<_> = (0..WRITERS)
        .map(|id| {
            let (ports, stop) = (ports.clone(), stop.clone());
            thread::spawn(move || writer(id, ports, stop))
        })
        .collect();
    thread::sleep(Duration::from_millis(500));
    let answer = tier.members[0].ask(&["handover", "--limit", "30s"]);
    let text = String::from_utf8_lossy(&answer.stdout).into_owned();
    assert!(answer.status.success(), "{text} {}\n{}", String::from_utf8_lossy(&answer.stderr), tier.members[0].log());
    let report: Json = serde_json::from_str(&text).expect("JSON");
    assert_eq!(report["outcome"], "done", "{text}");
    let successor = tier.wait_for_successor(0);
    assert_eq!(report["primary"], tier.members[successor].address());
    thread::sleep(Duration::from_millis(500));
    stop.store(true, Ordering::Relaxed);
    let mut lost = 0;
    let mut client = tier.members[successor].client();
    for writer in writers {
        let (acknowledged, longest) = writer.join().expect("the writer ends");
        println!("{engine:?}: {} acknowledged, longest wait {longest:?}", acknowledged.len());
        assert!(acknowledged.len() > 100, "too few writes to say anything: {}", acknowledged.len());
        lost += acknowledged.iter().filter(|key| client.call(&["GET", key]) == Value::Nil).count();
    }
    assert_eq!(lost, 0, "acknowledged writes were lost");
    // Idempotent: there is nothing left to do here.
    let again = tier.members[0].ask(&["handover"]);
    assert!(String::from_utf8_lossy(&again.stdout).contains("noPrimary"));
    assert!(tier.members[0].get("/metrics").1.contains("larder_agent_handovers_total 1"));
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
    let replica = tier.members[1].client().line("INFO server").text();
    let pid = replica.lines().find_map(|line| line.strip_prefix("process_id:")).expect("a process id");
    let pid: u32 = pid.trim().parse().expect("a number");
    super::tier::signal("STOP", pid);
    let answer = tier.members[0].ask(&["handover", "--limit", "2s"]);
    assert!(!answer.status.success());
    let mut client = tier.members[0].client();
    assert_eq!(client.line("SET after x"), Value::Simple("OK".to_owned()), "writes are not paused any more");
    super::tier::signal("CONT", pid);
    // Without any replica it is refused at once.
    tier.members[1].kill_agent();
    tier.wait("the replica to be gone", || client.line("INFO replication").text().contains("connected_slaves:0"));
    let answer = tier.members[0].ask(&["handover", "--limit", "60s"]);
    assert!(String::from_utf8_lossy(&answer.stderr).contains("no replica"), "{answer:?}");
}
