//! Writes that wait for replicas go on past one that ended in good order, and wait for one that hangs.

use std::sync::atomic::{AtomicBool, Ordering};

use serde_json::json;
use tempfile::TempDir;

use super::tier::{MASTER, Member, Tier, signal};
use crate::read_through::{policy, sql_origin};
use crate::support::resp::{Client, Value};
use crate::support::server::Engine;
use crate::support::sidecar::Sidecar;
use crate::write_behind::rule;

/// A sidecar before a tier, whose writes wait in a journal that nobody carries to its origin.
fn sidecar(tier: &Tier) -> (Sidecar, TempDir) {
    let directory = TempDir::new().expect("a temporary directory");
    std::fs::write(directory.path().join("shop.db"), "").expect("a file");
    let url = format!("sqlite://{}/shop.db?mode=rwc", directory.path().display());
    let sentinels: Vec<String> = tier.sentinels.iter().map(|sentinel| format!("127.0.0.1:{}", sentinel.port)).collect();
    let topology = json!({"name": MASTER, "topology": {"sentinel": {"master": MASTER, "sentinels": sentinels}}});
    let rules = [rule("kv", "db", "SELECT 'x' WHERE $id = 'none'", &json!({}))];
    (Sidecar::start(&policy(topology, 1, &[sql_origin("db", &url)], &rules)), directory)
}

fn write(client: &mut Client, number: usize) -> Value {
    client.call(&["SET", &format!("kv:{number}"), "later"])
}

/// What stands at the primary about a replica.
fn note(primary: &Member, replica: &Member) -> Value {
    primary.client().call(&["GET", &format!("larder:retired:{}", replica.address())])
}

fn reign(primary: &Member) -> String {
    let info = primary.client().line("INFO replication").text();
    info.lines().find_map(|line| line.strip_prefix("master_replid:")).expect("its history has a name").trim().to_owned()
}

fn followers(primary: &Member) -> usize {
    primary.client().line("ROLE").items()[2].items().len()
}

fn is_promotable(member: &Member) -> bool {
    let asked = Client::connect(member.port).and_then(|mut client| client.try_call(&["CONFIG", "GET", "replica-priority"]));
    asked.is_ok_and(|answer| answer.items().get(1).is_some_and(|priority| priority.text() == "100"))
}

#[test]
fn writes_wait_for_a_replica_that_hangs_and_not_for_one_that_ended_in_good_order() {
    let ok = Value::Simple("OK".to_owned());
    for engine in Engine::ALL {
        let always = ["--appendfsync".to_owned(), "always".to_owned()];
        let mut tier = Tier::start_with(engine, 3, true, json!({}), &always);
        tier.introduce();
        tier.wait("all to be promotable", || tier.members.iter().all(is_promotable));
        let (sidecar, _directory) = sidecar(&tier);
        let (mut client, mut writer) = (sidecar.client(), sidecar.client());
        tier.wait("writes", || write(&mut client, 0) == ok);
        let is_over = AtomicBool::new(false);
        let answers = std::thread::scope(|scope| {
            let writing = scope.spawn(|| {
                let mut answers = Vec::new();
                while !is_over.load(Ordering::SeqCst) {
                    answers.push(write(&mut writer, answers.len() % 1000));
                }
                answers
            });
            tier.members[2].stop_agent();
            let away: Vec<Value> = (0..100).map(|number| write(&mut client, number)).collect();
            is_over.store(true, Ordering::SeqCst);
            [writing.join().expect("it writes"), away].concat()
        });
        assert!(answers.iter().all(|answer| *answer == ok), "{engine:?}: {:?}", answers.iter().find(|answer| **answer != ok));
        assert_eq!(note(&tier.members[0], &tier.members[2]), Value::Bulk(reign(&tier.members[0]).into_bytes()), "{engine:?}");

        tier.members[2].start_agent();
        tier.wait("it to be promotable again", || is_promotable(&tier.members[2]));
        assert_eq!(note(&tier.members[0], &tier.members[2]), Value::Nil, "{engine:?}: it may be promoted, and is left out");
        tier.wait("writes that it has", || write(&mut client, 1) == ok);

        tier.members[0].client().line("CONFIG SET repl-timeout 3");
        let pid = tier.members[2].server_pid();
        signal("STOP", pid);
        tier.wait("it to be dropped", || followers(&tier.members[0]) == 1);
        match write(&mut client, 2) {
            Value::Error(text) => {
                let named = format!("{} may be promoted", tier.members[2].address());
                assert!(text.starts_with("NOREPLICAS") && text.contains(&named), "{engine:?}: {text}");
            }
            other => panic!("{engine:?}: {other:?} although a replica hangs that may be promoted"),
        }
        signal("CONT", pid);
        tier.wait("writes again", || write(&mut client, 3) == ok);
    }
}
