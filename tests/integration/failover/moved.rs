//! Transactions whose slot has moved since the map was read: they are discarded, and can be repeated. No server is ever named.

use std::time::Duration;

use serde_json::json;

use super::reshard::{key_of, move_slot, ok};
use crate::support::resp::{Client, Value};
use crate::support::server::{Engine, RedisCluster};
use crate::support::sidecar::{Sidecar, bypass, cluster_topology};
use crate::support::wait_for;

const LIMIT: Duration = Duration::from_secs(30);
const SLOTS: std::ops::Range<u16> = 0..8;
/// No reply may hold it: servers are named by it.
const HOST: &str = "127.0.0.1";

/// Three shards, and a sidecar: `plain:…` passes untouched, `aside:…` gets a TTL.
struct Scene {
    cluster: RedisCluster,
    sidecar: Sidecar,
}

impl Scene {
    fn start() -> Self {
        let cluster = RedisCluster::start(Engine::Redis7, 3, 0);
        let mut snapshot = bypass(cluster_topology(&cluster));
        let ttl = json!({"default": "10m", "max": "24h", "jitter": "10%"});
        snapshot["rules"] = json!([{"name": "aside", "keys": "aside:{tag…}", "strategy": {"cacheAside": {"ttl": ttl}}}]);
        let sidecar = Sidecar::start(&snapshot);
        Self { cluster, sidecar }
    }

    /// Moves a slot of the first shard to the second one, or back.
    fn shift(&self, slot: u16, from: usize) {
        move_slot(&self.cluster, slot, &self.cluster.servers[from], &self.cluster.servers[1 - from]);
    }
}

fn key(slot: u16, covered: bool) -> String {
    format!("{}{}", if covered { "aside:" } else { "plain:" }, key_of(slot, "k"))
}

/// The replies to MULTI, a SET and EXEC.
fn transact(client: &mut Client, key: &str, value: &str) -> Vec<Value> {
    [&["MULTI"][..], &["SET", key, value], &["EXEC"]].iter().map(|command| client.call(command)).collect()
}

fn is_done(replies: &[Value]) -> bool {
    replies.last() == Some(&Value::Array(vec![Value::Simple("OK".to_owned())]))
}

fn text_of(value: &Value) -> &str {
    if let Value::Error(text) = value { text } else { "" }
}

#[track_caller]
fn names_no_server(replies: &[Value]) {
    assert!(replies.iter().all(|reply| !text_of(reply).contains(HOST)), "{replies:?}");
}

#[test]
fn a_transaction_on_a_slot_that_has_moved_is_discarded_and_can_be_repeated() {
    let scene = Scene::start();
    let mut client = scene.sidecar.client();
    let mut discarded = 0;
    for slot in SLOTS {
        for covered in [false, true] {
            let key = key(slot, covered);
            scene.shift(slot, usize::from(covered));
            let value = format!("{slot} {covered}");
            wait_for("a repeated transaction to pass", LIMIT, || {
                let replies = transact(&mut client, &key, &value);
                names_no_server(&replies);
                if is_done(&replies) {
                    return true;
                }
                // What was told of is not done.
                assert_ne!(client.call(&["GET", &key]), Value::Bulk(value.clone().into_bytes()));
                assert!(text_of(&replies[1]).starts_with("TRYAGAIN the slot has moved"), "{replies:?}");
                assert!(
                    text_of(&replies[2]).starts_with("EXECABORT ") && text_of(&replies[2]).contains("repeated"),
                    "{replies:?}"
                );
                discarded += 1;
                false
            });
            assert_eq!(client.call(&["GET", &key]).text(), value);
            let ttl = client.call(&["TTL", &key]).int();
            assert_eq!(ttl > 0, covered, "{key}: {ttl}");
        }
    }
    assert!(discarded > 0, "no transaction met a stale map: the test shows nothing");
}

#[test]
fn a_slot_that_moves_before_exec_discards_the_transaction() {
    let scene = Scene::start();
    for (slot, covered) in SLOTS.zip([false, true].into_iter().cycle()) {
        let (mut client, key) = (scene.sidecar.client(), key(slot, covered));
        ok(&client.line("MULTI"));
        assert_eq!(client.call(&["SET", &key, "v"]), Value::Simple("QUEUED".to_owned()));
        scene.shift(slot, 0);
        let replies = [client.line("EXEC")];
        names_no_server(&replies);
        // A connection that serves a slot no more is given up after a while.
        let text = text_of(&replies[0]);
        assert!(text.starts_with("EXECABORT ") && text.contains("repeated"), "{replies:?}");
        assert_eq!(client.call(&["GET", &key]), Value::Nil);
        wait_for("a repeated transaction to pass", LIMIT, || is_done(&transact(&mut client, &key, "v")));
    }
}

#[test]
fn watched_keys_whose_slot_has_moved_count_as_changed() {
    let scene = Scene::start();
    for slot in SLOTS {
        let (mut client, key) = (scene.sidecar.client(), key(slot, false));
        ok(&client.call(&["WATCH", &key]));
        scene.shift(slot, 0);
        wait_for("the client to come through", LIMIT, || {
            let mut replies = vec![client.call(&["WATCH", &key])];
            replies.extend(transact(&mut client, &key, "v"));
            names_no_server(&replies);
            let last = replies.last().expect("EXEC is answered");
            assert!(is_done(&replies) || *last == Value::Nil || text_of(last).starts_with("EXECABORT"), "{replies:?}");
            is_done(&replies)
        });
        assert_eq!(client.call(&["GET", &key]).text(), "v");
    }
}
