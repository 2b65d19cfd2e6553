//! A replica that does not follow its primary may be promoted all the same: no write is acknowledged past it.

use std::time::Duration;

use serde_json::json;
use tempfile::TempDir;

use super::{DURABLE, durable, held, partition, rule};
use crate::read_through::{policy, sql_origin};
use crate::support::postgres::Postgres;
use crate::support::resp::{Client, Value};
use crate::support::server::{Engine, Redis, RedisCluster, SentinelCluster};
use crate::support::sidecar::{Sidecar, cluster_topology, sentinel_topology};
use crate::support::wait_for;
use crate::write_through::{self, block};

const LIMIT: Duration = Duration::from_secs(60);
/// How often a write is tried that is to be refused: each for three seconds.
const TRIES: usize = 2;

/// A sidecar before servers whose origin is a database without a table.
fn sidecar(topology: serde_json::Value) -> (Sidecar, TempDir) {
    let directory = TempDir::new().expect("a temporary directory");
    std::fs::write(directory.path().join("shop.db"), "").expect("a file");
    let url = format!("sqlite://{}/shop.db?mode=rwc", directory.path().display());
    let rules = [rule("kv", "db", "SELECT 'x' WHERE $id = 'none'", &json!({}))];
    (Sidecar::start(&policy(topology, 1, &[sql_origin("db", &url)], &rules)), directory)
}

fn set(server: &Redis, settings: &[(&str, &str)]) {
    for (name, value) in settings {
        assert_eq!(server.client().call(&["CONFIG", "SET", name, value]), Value::Simple("OK".to_owned()), "{name}");
    }
}

fn followers(primary: &Redis) -> usize {
    primary.client().line("ROLE").items()[2].items().len()
}

/// What each sentinel says of the replica at a port.
fn told(servers: &SentinelCluster, replica: u16, field: &str) -> Vec<String> {
    let of = |client: &mut Client| {
        let all = client.line("SENTINEL REPLICAS main").items();
        let value = |entry: &Value, name: &str| {
            let entry = entry.items();
            entry.chunks(2).find(|pair| pair[0].text() == name).map_or_else(String::new, |pair| pair[1].text())
        };
        all.iter().find(|entry| value(entry, "port") == replica.to_string()).map_or_else(String::new, |entry| value(entry, field))
    };
    servers.sentinels.iter().map(|sentinel| of(&mut sentinel.client())).collect()
}

/// Writes that are refused one after the other, as long as `replica` strays; or the first that was acknowledged.
fn refused(client: &mut Client, replica: u16, remedy: &str) -> Option<String> {
    (0..TRIES).find_map(|number| match client.call(&["SET", "kv:1", &format!("later-{number}")]) {
        Value::Error(text) => {
            let words = ["NOREPLICAS", "nothing was written", &format!("127.0.0.1:{replica} may be promoted"), remedy];
            words.iter().for_each(|word| assert!(text.contains(word), "{word} in {text}"));
            None
        }
        _ => Some(format!("later-{number}")),
    })
}

fn value_at(port: u16) -> String {
    let mut server = Client::connect(port).expect("it accepts");
    String::from_utf8(held(&mut server, "kv:1").expect("a write").value.expect("a value")).expect("text")
}

/// The replica that sentinels prefer hangs, until its primary and all sentinels take it for dead; its port.
fn hang(servers: &SentinelCluster) -> u16 {
    let (primary, replica) = (&servers.servers[0], &servers.servers[2]);
    set(replica, &[("replica-priority", "1")]);
    set(primary, &[("repl-timeout", "3")]);
    let port = replica.port();
    wait_for("the sentinels to hear that", LIMIT, || told(servers, port, "slave-priority").iter().all(|it| it == "1"));
    replica.pause();
    wait_for("it to be dropped", LIMIT, || followers(primary) == 1);
    wait_for("it to be taken for dead", LIMIT, || told(servers, port, "flags").iter().all(|it| it.contains("s_down")));
    port
}

/// The primary dies, and the one that hung is back, and promoted.
fn promote_what_hung(servers: &mut SentinelCluster) {
    servers.servers[0].kill();
    servers.servers[2].resume();
    servers.servers[1].pause();
    let port = servers.servers[2].port();
    wait_for("it to be promoted", LIMIT, || servers.elected_port() == Some(port));
    servers.servers[1].resume();
}

#[test]
fn a_replica_that_hangs_until_its_primary_dies_takes_no_acknowledged_write_with_it() {
    for engine in Engine::ALL {
        let mut servers = durable(engine, 2);
        let (sidecar, _directory) = sidecar(sentinel_topology(&servers));
        let mut client = sidecar.client();
        assert_eq!(client.call(&["SET", "kv:1", "first"]), Value::Simple("OK".to_owned()));
        let stale = hang(&servers);
        let acknowledged = refused(&mut client, stale, "SENTINEL RESET").unwrap_or_else(|| "first".to_owned());
        promote_what_hung(&mut servers);
        assert_eq!(value_at(stale), acknowledged, "{engine:?}: an acknowledged write is lost");
    }
}

#[test]
fn nor_does_it_bring_back_what_was_written_through() {
    let postgres = Postgres::shared();
    let url = block(postgres.database(&["CREATE TABLE kv (id text PRIMARY KEY, v text NOT NULL)"]));
    let write = "INSERT INTO kv VALUES ($id, $value) ON CONFLICT (id) DO UPDATE SET v = $value";
    let store = json!({"write": write, "delete": "DELETE FROM kv WHERE id = $id"});
    let rules = [write_through::rule("kv", "db", "SELECT v FROM kv WHERE id = $id", &store)];
    let mut servers = SentinelCluster::start(Engine::Valkey9, 2);
    let origins = [write_through::origin("db", &url, "2s")];
    let sidecar = Sidecar::start(&policy(sentinel_topology(&servers), 1, &origins, &rules));
    let mut client = sidecar.client();
    assert_eq!(client.call(&["SET", "kv:1", "first"]), Value::Simple("OK".to_owned()));
    let stale = hang(&servers);
    let acknowledged = refused(&mut client, stale, "SENTINEL RESET").unwrap_or_else(|| "first".to_owned());
    promote_what_hung(&mut servers);
    let mut read = Value::Nil;
    wait_for("a read", LIMIT, || {
        read = client.call(&["GET", "kv:1"]);
        !read.is_error()
    });
    assert_eq!(read.text(), acknowledged, "an older value is read");
}

#[test]
fn in_a_cluster_neither() {
    let mut servers = RedisCluster::start_with(Engine::Valkey9, 3, 2, &DURABLE);
    let (sidecar, _directory) = sidecar(cluster_topology(&servers));
    let mut client = sidecar.client();
    assert_eq!(client.call(&["SET", "kv:1", "first"]), Value::Simple("OK".to_owned()));
    let port = servers.owner(partition("kv:1").slot()).port();
    let at = servers.servers.iter().position(|server| server.port() == port).expect("one of ours");
    let (fresh, stale) = (at + 3, at + 6);
    set(&servers.servers[at], &[("repl-timeout", "3")]);
    servers.servers[stale].pause();
    wait_for("it to be dropped", LIMIT, || followers(&servers.servers[at]) == 1);
    let acknowledged =
        refused(&mut client, servers.servers[stale].port(), "CLUSTER FORGET").unwrap_or_else(|| "first".to_owned());
    servers.servers[at].kill();
    servers.servers[stale].resume();
    servers.servers[fresh].pause();
    let is_primary = |server: &Redis| server.client().line("ROLE").items()[0].text() == "master";
    wait_for("it to be promoted", LIMIT, || is_primary(&servers.servers[stale]));
    let there = value_at(servers.servers[stale].port());
    servers.servers[fresh].resume();
    assert_eq!(there, acknowledged, "an acknowledged write is lost");
}

/// Has a replica answer everybody but its primary, which lets nobody follow with a password that there is not.
fn detach(primary: &Redis, replica: &Redis) {
    set(replica, &[("masterauth", "wrong")]);
    primary.client().line("CLIENT KILL TYPE replica");
    wait_for("the others to be back", LIMIT, || followers(primary) == 1);
}

#[test]
fn one_that_nobody_promotes_is_not_waited_for() {
    let servers = durable(Engine::Valkey9, 2);
    let (sidecar, _directory) = sidecar(sentinel_topology(&servers));
    let mut client = sidecar.client();
    let (primary, other) = (&servers.servers[0], &servers.servers[2]);
    detach(primary, other);
    assert_eq!(refused(&mut client, other.port(), "replica-priority"), None);
    set(other, &[("replica-priority", "0")]);
    let ok = Value::Simple("OK".to_owned());
    wait_for("writes past it", LIMIT, || client.call(&["SET", "kv:1", "past it"]) == ok);
    let all_pass_it_over = told(&servers, other.port(), "slave-priority").iter().all(|priority| priority == "0");
    assert!(all_pass_it_over, "a sentinel had not heard");
    // It may be promoted again as soon as it says so.
    set(other, &[("replica-priority", "100")]);
    assert_eq!(refused(&mut client, other.port(), "replica-priority"), None);
    set(other, &[("masterauth", "")]);
    wait_for("it to follow again", LIMIT, || followers(primary) == 2);
    wait_for("writes that it has", LIMIT, || client.call(&["SET", "kv:1", "it has"]) == ok);
}

#[test]
fn nor_one_that_stands_for_no_election() {
    let servers = RedisCluster::start_with(Engine::Redis7, 3, 2, &DURABLE);
    let (sidecar, _directory) = sidecar(cluster_topology(&servers));
    let mut client = sidecar.client();
    let ok = Value::Simple("OK".to_owned());
    assert_eq!(client.call(&["SET", "kv:1", "first"]), ok);
    let owner = servers.owner(partition("kv:1").slot()).port();
    let at = servers.servers.iter().position(|server| server.port() == owner).expect("one of ours");
    let (primary, other) = (&servers.servers[at], &servers.servers[at + 6]);
    detach(primary, other);
    assert_eq!(refused(&mut client, other.port(), "cluster-replica-no-failover"), None);
    set(other, &[("cluster-replica-no-failover", "yes")]);
    wait_for("writes past it", LIMIT, || client.call(&["SET", "kv:1", "past it"]) == ok);
}
