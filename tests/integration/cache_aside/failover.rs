//! Caches that go away, and primaries that do not come back.

use serde_json::json;

use super::{LIMIT, bulk, first_answered, item, ok, rule, sidecars, total};
use crate::read_through::Servers;
use crate::support::resp::{Client, Value, encode};
use crate::support::saboteur::Change;
use crate::support::server::{Engine, SentinelCluster};
use crate::support::wait_for;

#[test]
fn a_new_primary_that_missed_the_last_writes_serves_none_of_their_keys() {
    let outdated = after_a_lossy_failover(SentinelCluster::start(Engine::Valkey9, 1));
    assert_eq!(outdated, Vec::<String>::new(), "what was there before an acknowledged write, or a copy of it");
}

/// The same check, of what does without it.
#[test]
fn without_its_mechanisms_a_new_primary_serves_what_is_outdated() {
    /// The keys that were written lately are not deleted.
    const NOT_DELETED: &[Change] = &[
        Change { from: "UNLINK\r\n$6\r\nitem:", to: "EXISTS\r\n$6\r\nitem:" },
        Change { from: "UNLINK\r\n$5\r\nold:", to: "EXISTS\r\n$5\r\nold:" },
    ];
    /// All servers seem to be one.
    const ONE_RUN: &[Change] = &[Change { from: "redis.pcall('INFO', 'server')", to: "nil" }];
    for (changes, missed) in [(NOT_DELETED, vec!["item:1", "item:2", "old:1"]), (ONE_RUN, vec!["item:3"])] {
        let cluster = SentinelCluster::start_sabotaged(Engine::Valkey9, 1, changes);
        assert_eq!(after_a_lossy_failover(cluster), missed);
    }
}

/// The keys that show what is outdated, after a replica has taken over that has missed the last writes.
fn after_a_lossy_failover(mut cluster: SentinelCluster) -> Vec<String> {
    let rules = [item(json!({})), rule("old", json!({}), json!({"stale": "1h"}))];
    let snapshot = crate::read_through::policy(crate::support::sidecar::sentinel_topology(&cluster), 1, &[], &rules);
    let sidecar = crate::support::sidecar::Sidecar::start(&snapshot);
    let mut client = sidecar.client();
    for key in ["item:1", "item:2", "old:1", "plain"] {
        assert_eq!(client.call(&["SET", key, "before"]), ok());
    }
    assert_eq!(client.line("GET item:3"), Value::Nil, "a lease that is about to be lost");
    let port = cluster.servers[0].port();
    let offset = |server: &mut Client| {
        let info = server.line("INFO replication").text();
        info.lines().find_map(|line| line.strip_prefix("master_repl_offset:")?.trim().parse::<u64>().ok()).unwrap()
    };
    wait_for("the replica to have it all", LIMIT, || {
        offset(&mut cluster.servers[1].client()) >= offset(&mut Client::connect(port).unwrap())
    });
    // From now on it hears of nothing.
    assert_eq!(cluster.servers[1].client().line("REPLICAOF 127.0.0.1 1"), ok());
    assert_eq!(client.line("SET item:1 after"), ok());
    assert_eq!(client.line("DEL item:2"), Value::Int(1));
    assert_eq!(client.line("SETEX old:1 100 after"), ok());
    assert_eq!(client.line("SET plain after"), ok());
    cluster.servers[0].kill();
    wait_for("the failover", LIMIT, || sidecar.client().line("GET plain") == bulk("before"));
    let mut outdated = Vec::new();
    for key in ["item:1", "item:2", "old:1"] {
        match sidecar.client().call(&["GET", key]) {
            Value::Nil => {}
            reply => {
                assert_eq!(reply, bulk("before"), "{key}");
                outdated.push(key.to_owned());
            }
        }
    }
    // Leases ended with their primary.
    assert_eq!(client.line("SET item:3 late"), ok());
    if cluster.servers[1].client().line("GET item:3") != Value::Nil {
        outdated.push("item:3".to_owned());
    }
    outdated
}

#[test]
fn an_invalidation_is_told_of_when_the_replicas_have_it() {
    Engine::ALL.into_iter().for_each(check_invalidation);
}

/// Servers differ in which writes a connection's WAIT stands for.
fn check_invalidation(engine: Engine) {
    let cluster = SentinelCluster::start(engine, 1);
    let topology = crate::support::sidecar::sentinel_topology(&cluster);
    let sidecar = crate::support::sidecar::Sidecar::start(&crate::read_through::policy(topology, 1, &[], &[item(json!({}))]));
    let mut client = sidecar.client();
    assert_eq!(client.line("SET item:1 v"), ok());
    assert_eq!(client.line("LARDER.INVALIDATE item:1 item:2"), Value::Int(1));
    assert_eq!(client.line("SET item:1 v"), ok());
    cluster.servers[1].pause();
    let reply = client.line("LARDER.INVALIDATE item:1");
    assert_eq!(client.line("SET plain v"), ok());
    let waited = client.line("WAIT 1 300");
    cluster.servers[1].resume();
    assert_eq!(waited, Value::Int(0), "{engine:?}: a client's own WAIT");
    let Value::Error(text) = reply else { panic!("{reply:?} although the replica does not answer") };
    assert!(text.starts_with("NOREPLICAS the keys are removed, but 0 of 1 replicas"), "{text}");
    assert_eq!(client.line("GET item:1"), Value::Nil);
    wait_for("the replica to be back", LIMIT, || client.line("LARDER.INVALIDATE item:1") == Value::Int(0));
}

#[test]
fn while_the_cache_is_away_one_client_of_a_pod_loads() {
    let mut servers = Servers::sentinel();
    let sidecars = sidecars(&servers, 1, &[item(json!({"lease": "15s", "wait": "500ms"}))]);
    assert_eq!(sidecars[0].client().line("SET item:0 v"), ok());
    let Servers::Sentinel(cluster) = &mut servers else { unreachable!() };
    cluster.servers[0].kill();
    let mut clients: Vec<Client> = (0..20).map(|_| sidecars[0].client()).collect();
    clients.iter_mut().for_each(|client| client.send(&encode(&["GET", "item:1"])).unwrap());
    let (holder, reply) = first_answered(&mut clients);
    assert_eq!(reply, Value::Nil, "one may load");
    for (_, client) in clients.iter_mut().enumerate().filter(|(index, _)| *index != holder) {
        let Value::Error(text) = client.read().unwrap() else { panic!("the others wait") };
        assert!(text.starts_with("TRYAGAIN the key `item:1`"), "{text}");
    }
    let Value::Error(text) = sidecars[0].client().line("GET plain") else { panic!("keys without leases fail") };
    assert!(text.starts_with("TRYAGAIN"), "{text}");
    assert_eq!(total(&sidecars, "leases"), 1);
}
