//! Whoever moves slots dies after each number of commands; clients meet no error meanwhile, and another goes on.

use larder::operator::cache_cluster::plan::SlotSet;
use larder::operator::cache_cluster::resharding::Resharding;

use super::fuse::Fuse;
use super::{LIMIT, Look, Rig, STAYING};
use crate::failover::reshard::{key_of, move_slot, ok};
use crate::support::resp::{Client, Value};
use crate::support::server::{Engine, RedisCluster};
use crate::support::sidecar::{Sidecar, bypass, cluster_topology};
use crate::support::wait_for;

const SHARDS: usize = 3;
/// How many slots are out of place.
const SLOTS: usize = 3;
const NAMES: [&str; 3] = ["stays", "changes", "goes"];

/// Puts some slots, which are empty, where they are not to be. What is planned then.
fn unbalance(cluster: &RedisCluster, rig: &Rig, round: usize) -> Look {
    let servers = &cluster.servers;
    let [from, to] = [round % SHARDS, (round + 1) % SHARDS];
    servers.iter().for_each(|server| ok(&server.client().line("FLUSHALL")));
    let slots = rig.owned(from).first(SLOTS as u16);
    slots.iter().for_each(|slot| move_slot(cluster, slot, &servers[from], &servers[to]));
    let mut look = rig.look(SHARDS as u16);
    wait_for("a plan", LIMIT, || {
        look = rig.look(SHARDS as u16);
        look.next_move().is_some()
    });
    look
}

fn value(round: usize, slot: u16) -> String {
    format!("{round}:{slot}")
}

fn fill(client: &mut Client, slots: &SlotSet, round: usize) {
    for (slot, name) in slots.iter().flat_map(|slot| NAMES.map(|name| (slot, name))) {
        ok(&client.call(&["SET", &key_of(slot, name), &value(round, slot)]));
    }
}

/// Every key is there, whatever has happened to its slot; one changes, one is removed.
fn use_all(client: &mut Client, slots: &SlotSet, round: usize) {
    for slot in slots.iter() {
        for name in NAMES {
            let key = key_of(slot, name);
            assert_eq!(client.call(&["GET", &key]), Value::Bulk(value(round, slot).into_bytes()), "{key} after {round} commands");
        }
        ok(&client.call(&["SET", &key_of(slot, "changes"), "changed"]));
        assert_eq!(client.call(&["DEL", &key_of(slot, "goes")]), Value::Int(1), "slot {slot} after {round} commands");
    }
}

fn check_outcome(client: &mut Client, slots: &SlotSet, round: usize) {
    for slot in slots.iter() {
        let found = NAMES.map(|name| client.call(&["GET", &key_of(slot, name)]));
        let expected = [Value::Bulk(value(round, slot).into_bytes()), Value::Bulk(b"changed".to_vec()), Value::Nil];
        assert_eq!(found, expected, "slot {slot} after {round} commands");
    }
}

/// How many numbers of commands there were after which the mover could die.
#[track_caller]
fn die_at_every_step(engine: Engine) -> usize {
    let cluster = RedisCluster::start_with(engine, SHARDS, 0, &STAYING);
    let rig = Rig::over(&cluster, None);
    let sidecar = Sidecar::start(&bypass(cluster_topology(&cluster)));
    let fuse = Fuse::before(&rig.ports);
    let mut client = sidecar.client();
    for round in 0.. {
        let look = unbalance(&cluster, &rig, round);
        let slots = look.next_move().expect("a move").clone();
        fill(&mut client, &slots, round);
        fuse.allow(i64::try_from(round).expect("few rounds"));
        rig.apply(&mut Resharding::default(), &look, fuse.ports());
        let died = fuse.is_blown();
        use_all(&mut client, &slots, round);
        rig.settle(SHARDS as u16);
        check_outcome(&mut client, &slots, round);
        if !died {
            return round;
        }
    }
    unreachable!("it comes to its end")
}

#[test]
fn a_mover_key_by_key_may_die_after_any_command() {
    let points = die_at_every_step(Engine::Redis7);
    assert!(points > 20, "only {points} commands: the test shows little");
}

#[test]
fn a_mover_at_once_may_die_after_any_command() {
    let points = die_at_every_step(Engine::Valkey9);
    assert!(points > 2, "only {points} commands: the test shows little");
}

#[test]
fn a_mover_by_imports_may_die_after_any_command() {
    let Some(engine) = Engine::redis_8() else { return };
    let points = die_at_every_step(engine);
    assert!(points > 2, "only {points} commands: the test shows little");
}
