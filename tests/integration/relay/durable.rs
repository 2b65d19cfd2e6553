//! No origin is told what the journal could still lose.

use std::time::Duration;

use super::together::{database, rows, rules};
use super::{LONG, Scene};
use crate::read_through::{Servers, sql_origin};
use crate::support::postgres::Postgres;
use crate::support::resp::Value;
use crate::support::server::{Engine, SentinelCluster};
use crate::support::wait_for;
use crate::write_behind::durable;

/// Long enough for a relay to try some times.
const A_WHILE: u64 = 3;

fn servers(scene: &Scene) -> &SentinelCluster {
    match &scene.servers {
        Servers::Sentinel(servers) => servers,
        Servers::Cluster(_) => panic!("not under Sentinel"),
    }
}

/// A relay has entries before it that are on disk everywhere but for `hinder`, until `mend`.
fn waits(engine: Engine, hinder: impl FnOnce(&SentinelCluster), mend: impl FnOnce(&SentinelCluster), said: &str) {
    let postgres = Postgres::shared();
    let (url, database) = database(&postgres);
    let scene = Scene::new(Servers::Sentinel(durable(engine, 1)), &[sql_origin("db", &url)], &rules());
    let relay = scene.relay();
    scene.append(b"users:before", Some("carried"));
    scene.wait_until_drained();
    hinder(servers(&scene));
    for n in 0..20 {
        scene.append(format!("users:{n}").as_bytes(), Some("not on disk"));
    }
    let before = relay.figure("larder_relay_retries_total");
    wait_for("the relay has tried", LONG, || relay.figure("larder_relay_retries_total") >= before + A_WHILE);
    assert_eq!(rows(&postgres, &database).len(), 1, "{engine:?}: the origin was told what might be lost");
    assert_eq!(scene.depth(), 20);
    mend(servers(&scene));
    scene.wait_until_drained();
    assert_eq!(rows(&postgres, &database).len(), 21);
    assert!(relay.log().contains(said), "{said} in {}", relay.log());
    assert!(!relay.log().contains("not on disk"), "values are in no log");
}

#[test]
fn a_write_that_a_replica_has_not_on_disk_is_not_told() {
    for engine in [Engine::Valkey9, Engine::Redis7] {
        let hinder = |servers: &SentinelCluster| servers.servers[1].pause();
        waits(engine, hinder, |servers| servers.servers[1].resume(), "does not answer whether it writes to disk");
    }
}

#[test]
fn a_server_that_does_not_write_to_disk_before_it_answers_is_not_believed() {
    let set = |servers: &SentinelCluster, setting: &str| {
        for server in &servers.servers {
            assert_eq!(server.client().line(&format!("CONFIG SET {setting}")), Value::Simple("OK".to_owned()));
        }
    };
    let hinder = |servers: &SentinelCluster| set(servers, "appendfsync everysec");
    waits(Engine::Valkey9, hinder, |servers| set(servers, "appendfsync always"), "appendfsync always");
}

#[test]
fn nor_is_a_replica_that_does_not() {
    let set = |servers: &SentinelCluster, setting: &str| {
        let replica = &servers.servers[1];
        assert_eq!(replica.client().line(&format!("CONFIG SET {setting}")), Value::Simple("OK".to_owned()));
    };
    let hinder = |servers: &SentinelCluster| set(servers, "appendonly no");
    waits(Engine::Redis7, hinder, |servers| set(servers, "appendonly yes"), "does not write each command to disk");
}

#[test]
fn a_primary_that_has_been_replaced_tells_nothing() {
    let postgres = Postgres::shared();
    let (url, database) = database(&postgres);
    let mut scene = Scene::new(Servers::Sentinel(durable(Engine::Valkey9, 1)), &[sql_origin("db", &url)], &rules());
    let relay = scene.relay();
    scene.append(b"users:1", Some("both have it"));
    scene.wait_until_drained();
    // The primary alone has what comes now, and dies with it.
    servers(&scene).servers[1].pause();
    scene.append(b"users:1", Some("lost"));
    let before = relay.figure("larder_relay_retries_total");
    wait_for("the relay has tried", LONG, || relay.figure("larder_relay_retries_total") > before);
    let Servers::Sentinel(servers) = &mut scene.servers else { panic!("not under Sentinel") };
    let old = servers.servers[0].port();
    servers.servers[0].kill();
    std::thread::sleep(Duration::from_millis(100));
    servers.servers[1].resume();
    wait_for("another primary", LONG, || servers.elected_port().is_some_and(|port| port != old));
    let new = servers.servers[1].port();
    servers.servers[0].restart_following(new);
    crate::write_behind::write_to_disk(&servers.servers[0]);
    wait_for("it is followed", LONG, || servers.servers[0].follows());
    wait_for("it may be promoted", LONG, || servers.servers[0].may_be_promoted());
    scene.append(b"users:1", Some("the next"));
    scene.wait_until_drained();
    assert_eq!(rows(&postgres, &database)["1"], "the next");
    super::together::assert_in_order(&postgres, &database);
}
