//! Sidecars that outnumber the connections of their origin, and the relays that load for them, before a real Postgres.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use larder::journal::loads::LoadQueue;
use serde_json::{Value as Json, json};

use super::{JOURNAL, LONG, Relay, Scene};
use crate::read_through::{Servers, rule, sql_origin};
use crate::support::postgres::Postgres;
use crate::support::resp::{Client, Value, encode};
use crate::support::sidecar::Sidecar;
use crate::support::wait_for;
use crate::write_through::block;

/// How many sidecars there are, and how many connections the origin may have from all of them.
const SIDECARS: usize = 6;
const CONNECTIONS: u32 = 2;
/// A query that takes 20 ms, and fails for one id.
const READ: &str = "SELECT CASE WHEN id = 'bad' THEN (1 / (length(id) - 3))::text ELSE name END || pg_sleep(0.02)::text FROM users WHERE id = $id";
const READ_MANY: &str = "SELECT id, name || pg_sleep(0.02)::text FROM users WHERE id = ANY($id)";

/// A database of users, and six sidecars that share two connections to it.
pub struct Crowd {
    pub scene: Scene,
    pub server: Arc<Postgres>,
    pub database: String,
    pub sidecars: Vec<Sidecar>,
}

impl Crowd {
    pub fn new(servers: Servers, timeout: &str, read: Json) -> Self {
        let server = Postgres::shared();
        let tables = [
            "CREATE TABLE users (id text PRIMARY KEY, name text NOT NULL)",
            "INSERT INTO users SELECT 'id-' || n, 'name ' || n FROM generate_series(0, 999) n",
        ];
        let url = block(server.database(&tables));
        let database = url.rsplit('/').next().expect("a name").to_owned();
        let mut origin = sql_origin("db", &url);
        origin["maxTotalConnections"] = CONNECTIONS.into();
        origin["loadQueue"] = JOURNAL.into();
        origin["timeout"] = timeout.into();
        let mut scene =
            Scene::new(servers, &[origin], &[rule("users", "db", json!({"sql": read}), json!({"negativeTtl": "1m"}))]);
        (scene.snapshot["version"], scene.snapshot["requires"]) = (8.into(), 8.into());
        scene.write_snapshot();
        let count = SIDECARS.to_string();
        let sidecar = |_| Sidecar::start_with(&scene.snapshot, &["--sidecars", &count]);
        let sidecars = (0..SIDECARS).map(sidecar).collect();
        Self { scene, server, database, sidecars }
    }

    fn client(&self, number: usize) -> Client {
        self.sidecars[number % SIDECARS].client()
    }

    /// Which relay takes requests.
    fn holder(&self) -> Option<Vec<u8>> {
        let key = String::from_utf8(LoadQueue::new(self.scene.journal()).relay()).expect("a text");
        match self.scene.servers.holder_of(&key).call(&["GET", &key]) {
            Value::Bulk(token) => Some(token),
            _ => None,
        }
    }

    pub fn relay(&self) -> Relay {
        let relay = self.scene.relay();
        wait_for("a relay takes requests", LONG, || self.holder().is_some());
        relay
    }

    fn connections(&self) -> String {
        format!("SELECT count(*)::text FROM pg_stat_activity WHERE datname = '{}'", self.database)
    }

    /// Has 36 clients read at once until all have read what they are to, and counts the database's connections meanwhile.
    fn read_all(&self, keys: usize) -> u32 {
        let over = AtomicBool::new(false);
        thread::scope(|scope| {
            let counting = scope.spawn(|| {
                let (mut most, query) = (0, self.connections());
                while !over.load(Ordering::Relaxed) {
                    most = most.max(block(self.server.value("postgres", &query)).parse().expect("a number"));
                }
                most
            });
            let readers: Vec<_> = (0..36)
                .map(|number| {
                    let mut client = self.client(number);
                    scope.spawn(move || {
                        for n in 0..keys {
                            // Neighbours want the same keys, in another order.
                            let id = (n * 7 + number / 3) % keys;
                            assert_eq!(client.call(&["GET", &format!("users:id-{id}")]).text(), format!("name {id}"));
                        }
                    })
                })
                .collect();
            readers.into_iter().for_each(|reader| reader.join().expect("all are answered"));
            over.store(true, Ordering::Relaxed);
            counting.join().expect("the database counts")
        })
    }
}

fn one() -> Json {
    json!({"read": READ, "readMany": null})
}

#[test]
fn the_database_has_no_more_connections_than_it_may_and_everybody_is_answered() {
    for servers in [Servers::sentinel(), Servers::cluster()] {
        let crowd = Crowd::new(servers, "10s", one());
        let relays = [crowd.relay(), crowd.scene.relay()];
        let most = crowd.read_all(40);
        assert!((1..=CONNECTIONS).contains(&most), "{most} connections");
        let figure = |name: &str| relays.iter().map(|relay| relay.figure_of(name, "queue", JOURNAL)).sum::<u64>();
        assert!((40..80).contains(&figure("larder_relay_loads_total")), "leases keep keys from being loaded by all");
        assert_eq!((figure("larder_relay_load_errors_total"), figure("larder_relay_loads_undelivered_total")), (0, 0));
        // What was loaded lies in the cache as ever.
        let ttl = crowd.scene.servers.holder_of("users:id-7").line("PTTL users:id-7").int();
        assert!((1..=7_200_000).contains(&ttl), "{ttl}");
        relays.into_iter().for_each(Relay::stop);
        wait_for("no connection is left", LONG, || block(crowd.server.value("postgres", &crowd.connections())) == "0");
    }
}

#[test]
fn what_is_no_value_comes_as_from_a_load_of_one_s_own() {
    let crowd = Crowd::new(Servers::sentinel(), "10s", one());
    let _relay = crowd.relay();
    let alone = Sidecar::start(&crowd.scene.snapshot);
    let (mut through, mut own) = (crowd.client(0), alone.client());
    assert_eq!(through.line("GET users:nobody"), Value::Nil);
    let negative = crowd.scene.servers.holder_of("users:nobody").line("KEYS larder:n:*users:nobody").items();
    assert_eq!(negative.len(), 1, "it is remembered that there is none");
    block(crowd.server.run(&crowd.database, &["INSERT INTO users VALUES ('bad', 'poison')"]));
    let failed = through.line("GET users:bad");
    assert!(matches!(&failed, Value::Error(text) if text.starts_with("ORIGIN origin `db` ")), "{failed:?}");
    assert_eq!(failed, own.line("GET users:bad"), "in the same words");
    let long = format!("users:{}", "x".repeat(40_000));
    let refused = through.call(&["GET", &long]);
    assert!(matches!(&refused, Value::Error(text) if text.contains("keys of at most")), "{refused:?}");
}

#[test]
fn keys_of_one_command_are_one_query() {
    let crowd = Crowd::new(Servers::cluster(), "10s", json!({"read": READ, "readMany": READ_MANY}));
    let relay = crowd.relay();
    let keys: Vec<String> = (0..50).map(|n| format!("users:id-{n}")).collect();
    let command: Vec<&str> = ["MGET"].into_iter().chain(keys.iter().map(String::as_str)).chain(["users:nobody"]).collect();
    let values = crowd.client(0).call(&command).items();
    let expected: Vec<String> = (0..50).map(|n| format!("name {n}")).collect();
    assert_eq!(values[..50].iter().map(Value::text).collect::<Vec<_>>(), expected);
    assert_eq!(values[50], Value::Nil);
    assert_eq!(relay.figure_of("larder_relay_loads_total", "queue", JOURNAL), 51);
}

#[test]
fn clients_are_told_in_time_that_no_relay_runs_and_served_once_one_does() {
    let crowd = Crowd::new(Servers::sentinel(), "1s", one());
    let mut client = crowd.client(0);
    let asked = Instant::now();
    let told = client.line("GET users:id-1");
    assert!(matches!(&told, Value::Error(text) if text.starts_with("ORIGIN ") && text.contains("none runs")), "{told:?}");
    assert!(asked.elapsed() >= Duration::from_secs(1), "one that comes in time would have answered");
    let first = crowd.relay();
    assert_eq!(client.line("GET users:id-1").text(), "name 1");
    // One that dies: who waits is told, and another takes its place.
    let holder = crowd.holder();
    first.kill();
    let told = client.line("GET users:id-2");
    assert!(matches!(&told, Value::Error(text) if text.contains("gave no answer within 1s")), "{told:?}");
    let _second = crowd.scene.relay();
    wait_for("another takes over", LONG, || crowd.holder().is_some_and(|now| Some(now) != holder));
    assert_eq!(client.line("GET users:id-2").text(), "name 2");
}

/// What the database saw of its clients: the most queries that ran at once, and the most connections, idle ones among them.
#[derive(Debug, Default)]
struct Busy {
    queries: u32,
    connections: u32,
}

impl Crowd {
    /// Counts until `over`.
    fn busy_until(&self, over: &AtomicBool) -> Busy {
        let query = format!(
            "SELECT count(*) FILTER (WHERE state = 'active') || ' ' || count(*) FROM pg_stat_activity \
             WHERE backend_type = 'client backend' AND datname = '{}'",
            self.database
        );
        let mut most = Busy::default();
        while !over.load(Ordering::Relaxed) {
            let answer = block(self.server.value("postgres", &query));
            let (queries, connections) = answer.split_once(' ').expect("two numbers");
            most.queries = most.queries.max(queries.parse().expect("a number"));
            most.connections = most.connections.max(connections.parse().expect("a number"));
        }
        most
    }

    /// Reads keys that nobody has read, until each is answered. How many errors came before.
    fn read_in_spite(&self, number: usize, ids: std::ops::Range<usize>) -> usize {
        let (mut client, mut errors) = (self.client(number), 0);
        for id in ids {
            wait_for("a read to be answered", LONG, || match client.call(&["GET", &format!("users:id-{id}")]) {
                Value::Error(text) => {
                    assert!(text.starts_with("ORIGIN ") || text.starts_with("TRYAGAIN"), "{text}");
                    errors += 1;
                    false
                }
                value => {
                    assert_eq!(value.text(), format!("name {id}"));
                    true
                }
            });
        }
        errors
    }
}

#[test]
fn a_relay_that_stands_still_while_it_loads_is_followed_by_one_that_keeps_to_the_bound() {
    let crowd = Crowd::new(Servers::sentinel(), "2s", one());
    let first = crowd.relay();
    let (second, over) = (crowd.scene.relay(), AtomicBool::new(false));
    let loads = |relay: &Relay| relay.figure_of("larder_relay_loads_total", "queue", JOURNAL);
    let holder = crowd.holder();
    let (busy, errors) = thread::scope(|scope| {
        let counting = scope.spawn(|| crowd.busy_until(&over));
        let crowd = &crowd;
        let readers: Vec<_> =
            (0..12).map(|number| scope.spawn(move || crowd.read_in_spite(number, number * 60..(number + 1) * 60))).collect();
        wait_for("it loads", LONG, || loads(&first) >= 20);
        first.signal("STOP");
        wait_for("the other takes over", LONG, || crowd.holder().is_some_and(|now| Some(now) != holder));
        wait_for("it loads as well", LONG, || loads(&second) >= 20);
        // What it had taken is too old to be begun.
        first.signal("CONT");
        let errors: usize = readers.into_iter().map(|reader| reader.join().expect("all are answered")).sum();
        over.store(true, Ordering::Relaxed);
        (counting.join().expect("the database counts"), errors)
    });
    assert!(errors > 0, "who waited for it was told");
    assert!((1..=CONNECTIONS).contains(&busy.queries), "{busy:?}");
    assert!(busy.connections <= 2 * CONNECTIONS, "idle ones of the one that stood still, and the other's: {busy:?}");
    [first, second].into_iter().for_each(Relay::stop);
}

#[test]
fn a_value_that_was_loaded_before_a_deletion_is_not_stored_after_it() {
    let crowd = Crowd::new(Servers::sentinel(), "10s", one());
    let _relay = crowd.relay();
    let mut locked = crowd.client(0);
    block(crowd.server.run(&crowd.database, &["CREATE TABLE gate (is_open bool)"]));
    let wait = "DO $$ BEGIN WHILE (SELECT count(*) FROM gate) = 0 LOOP PERFORM pg_sleep(0.02); END LOOP; END $$";
    let lock = ["BEGIN", "LOCK TABLE users IN ACCESS EXCLUSIVE MODE", wait, "COMMIT"];
    thread::scope(|scope| {
        scope.spawn(|| block(crowd.server.run(&crowd.database, &lock)));
        let exclusive = "SELECT count(*)::text FROM pg_locks WHERE mode = 'AccessExclusiveLock' AND granted";
        wait_for("the table is locked", LONG, || block(crowd.server.value(&crowd.database, exclusive)) != "0");
        locked.send(&encode(&["GET", "users:id-3"])).expect("it is sent");
        let waiting = "SELECT count(*)::text FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND query LIKE '%CASE WHEN id%' AND datname = current_database()";
        wait_for("the load waits", LONG, || block(crowd.server.value(&crowd.database, waiting)) != "0");
        crowd.client(1).line("DEL users:id-3");
        block(crowd.server.run(&crowd.database, &["INSERT INTO gate VALUES (true)"]));
    });
    assert_eq!(locked.read().expect("an answer").text(), "name 3", "it asked before");
    assert_eq!(crowd.scene.servers.holder_of("users:id-3").line("EXISTS users:id-3").int(), 0, "and nothing is stored");
    block(crowd.server.run(&crowd.database, &["UPDATE users SET name = 'new' WHERE id = 'id-3'"]));
    assert_eq!(locked.line("GET users:id-3").text(), "new");
}
