//! An acknowledged write is on disk at every server that might serve it next.

use std::collections::BTreeMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use serde_json::{Value as Json, json};
use tempfile::TempDir;

use super::{all_entries, durable, rule, write_to_disk};
use crate::read_through::{policy, sql_origin};
use crate::support::resp::{Client, Value};
use crate::support::server::{Engine, SentinelCluster};
use crate::support::sidecar::{Sidecar, sentinel_topology};
use crate::support::wait_for;

const LIMIT: Duration = Duration::from_secs(60);

fn snapshot(servers: &SentinelCluster, directory: &TempDir) -> Json {
    let url = format!("sqlite://{}/shop.db?mode=rwc", directory.path().display());
    let rules = [rule("kv", "db", "SELECT 'x' WHERE $id = 'none'", &json!({}))];
    policy(sentinel_topology(servers), 1, &[sql_origin("db", &url)], &rules)
}

/// With a database that has no table.
fn directory() -> TempDir {
    let directory = TempDir::new().expect("a temporary directory");
    std::fs::write(directory.path().join("shop.db"), "").expect("a file");
    directory
}

#[track_caller]
fn refused(reply: &Value, words: &[&str]) {
    let Value::Error(text) = reply else { panic!("{reply:?} is no error") };
    words.iter().for_each(|word| assert!(text.contains(word), "{word} in {text}"));
}

#[test]
fn servers_that_do_not_write_to_disk_before_they_answer_are_refused() {
    let directory = directory();
    for (setting, replicas, words) in [
        ("appendfsync everysec", 1, ["appendfsync always", "nothing was written"]),
        ("appendonly no", 1, ["appendonly yes", "nothing was written"]),
        ("appendfsync always", 0, ["NOREPLICAS 0 of 1 replicas", "nothing was written"]),
    ] {
        let servers = durable(Engine::Valkey9, replicas);
        for server in &servers.servers {
            assert_eq!(server.client().line(&format!("CONFIG SET {setting}")), Value::Simple("OK".to_owned()));
        }
        let sidecar = Sidecar::start(&snapshot(&servers, &directory));
        refused(&sidecar.client().call(&["SET", "kv:1", "x"]), &words);
        assert!(all_entries(&mut servers.primary().client()).is_empty());
        assert_eq!(sidecar.client().call(&["GET", "kv:1"]), Value::Nil);
    }
}

#[test]
fn a_replica_that_does_not_write_to_disk_before_it_answers_is_not_believed() {
    let directory = directory();
    for engine in Engine::ALL {
        let servers = durable(engine, 2);
        let sidecar = Sidecar::start(&snapshot(&servers, &directory));
        let (mut client, replica) = (sidecar.client(), &servers.servers[2]);
        let set = |setting: &str| {
            assert_eq!(replica.client().line(&format!("CONFIG SET {setting}")), Value::Simple("OK".to_owned()));
        };
        let ok = Value::Simple("OK".to_owned());
        assert_eq!(client.call(&["SET", "kv:1", "on disk"]), ok);
        for (worse, better) in [("appendfsync everysec", "appendfsync always"), ("appendonly no", "appendonly yes")] {
            set(worse);
            let replica = format!("127.0.0.1:{} does not write each command to disk", replica.port());
            refused(&client.call(&["SET", "kv:1", "in memory"]), &[&replica, better, "nothing was written"]);
            set(better);
            // It writes all it has first.
            wait_for("writes to be taken again", LIMIT, || client.call(&["SET", "kv:1", "on disk again"]) == ok);
        }
    }
}

#[test]
fn a_write_is_not_acknowledged_while_a_replica_does_not_write_it_to_disk() {
    let directory = directory();
    for engine in Engine::ALL {
        let servers = durable(engine, 2);
        let sidecar = Sidecar::start(&snapshot(&servers, &directory));
        let mut client = sidecar.client();
        assert_eq!(client.call(&["SET", "kv:1", "one"]), Value::Simple("OK".to_owned()));
        servers.servers[2].pause();
        let reply = client.call(&["SET", "kv:1", "two"]);
        servers.servers[2].resume();
        assert!(reply.is_error(), "{reply:?}");
        wait_for("writes to be taken again", LIMIT, || client.call(&["SET", "kv:1", "three"]) == Value::Simple("OK".to_owned()));
        assert_eq!(client.call(&["GET", "kv:1"]).text(), "three");
    }
}

/// Clients that write numbers, each to a key of its own, and what of it was acknowledged.
#[derive(Default)]
struct Writers {
    over: AtomicBool,
    acknowledged: Mutex<BTreeMap<String, u64>>,
    errors: Mutex<BTreeMap<String, u64>>,
}

impl Writers {
    fn write(&self, port: u16, key: &str) {
        let mut client = Client::connect(port).expect("the sidecar accepts");
        for number in 1.. {
            if self.over.load(Ordering::SeqCst) {
                return;
            }
            match client.call(&["SET", key, &number.to_string()]) {
                Value::Error(text) => *self.errors.lock().unwrap().entry(text).or_default() += 1,
                _ => drop(self.acknowledged.lock().unwrap().insert(key.to_owned(), number)),
            }
        }
    }

    fn count(&self) -> u64 {
        self.acknowledged.lock().unwrap().values().sum()
    }
}

#[test]
fn what_was_acknowledged_is_in_the_next_primarys_journal() {
    let directory = directory();
    for engine in Engine::ALL {
        let mut servers = durable(engine, 2);
        let sidecar = Sidecar::start(&snapshot(&servers, &directory));
        let (writers, port) = (Writers::default(), sidecar.port());
        std::thread::scope(|scope| {
            let writers = &writers;
            (0..6).for_each(|id| drop(scope.spawn(move || writers.write(port, &format!("kv:{id}")))));
            wait_for("writes", LIMIT, || writers.count() > 200);
            let old = servers.fail_over(LIMIT);
            write_to_disk(&servers.servers[old]);
            let before = writers.count();
            wait_for("writes at the new primary", LIMIT, || writers.count() > before + 200);
            writers.over.store(true, Ordering::SeqCst);
        });
        let new = servers.elected_port().expect("a primary");
        let mut server = Client::connect(new).expect("it accepts");
        let mut last: BTreeMap<String, Vec<u64>> = BTreeMap::new();
        for entry in all_entries(&mut server) {
            let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).expect("text");
            let number = text(&entry.change.value.expect("a value")).parse().expect("a number");
            last.entry(text(&entry.change.key)).or_default().push(number);
        }
        let acknowledged = writers.acknowledged.lock().unwrap();
        println!("{engine:?}: {acknowledged:?}, {:?}", writers.errors.lock().unwrap());
        for (key, number) in acknowledged.iter() {
            let numbers = &last[key];
            assert!(numbers.is_sorted() && numbers.contains(number), "{key}: {number} was acknowledged: {numbers:?}");
            let read = sidecar.client().call(&["GET", key]).text().parse::<u64>().expect("a number");
            assert!(read >= *number, "{key}: {read} is read, {number} was acknowledged");
        }
    }
}
