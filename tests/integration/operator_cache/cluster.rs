//! The same in a Cluster, whose primaries keep a part of the keys each.

use std::sync::Arc;

use larder::policy::slots::slot_of;

use super::*;
use crate::failover::reshard::move_slot;
use crate::support::server::RedisCluster;
use crate::support::sidecar::cluster_topology;

const SHARDS: usize = 3;
/// How many bindings there are beside: their keys are everywhere.
const OTHERS: usize = 6;

fn snapshot(cluster: &RedisCluster, generation: u64) -> Json {
    snapshot_at(cluster_topology(cluster), generation)
}

/// This generation for everybody.
fn wanted(cluster: &RedisCluster, generation: u64) -> Option<Wanted> {
    let servers = Servers {
        servers: cluster.servers.iter().map(|server| at(server.port())).collect(),
        in_cluster: true,
        ..Servers::default()
    };
    let text: Arc<str> = snapshot(cluster, generation).to_string().into();
    let bindings = others().chain([shop()]).map(|binding| (binding, text.clone())).collect();
    Some(Wanted { servers, keys: Keys::from(Entry::default()), bindings })
}

fn others() -> impl Iterator<Item = BindingName> {
    (0..OTHERS).map(|number| BindingName::parse(&format!("other-{number}")).unwrap())
}

/// Of which bindings there is a snapshot, at whichever primary keeps it.
fn present(cluster: &RedisCluster) -> usize {
    let is_there = |binding: &BindingName| {
        let key = binding.snapshot_key();
        let mut owner = cluster.owner(slot_of(key.as_bytes())).client();
        owner.call(&["EXISTS", &key]) == Value::Int(1)
    };
    others().chain([shop()]).filter(is_there).count()
}

#[test]
fn every_primary_keeps_what_is_its_own() {
    for engine in Engine::ALL {
        let mut cluster = RedisCluster::start(engine, SHARDS, 1);
        let sidecars = ["shop-0", "shop-1"].map(|pod| Sidecar::start_in(&snapshot(&cluster, 1), &BOUND, &[("POD_NAME", pod)]));
        let are_under = |generation: u64| sidecars.iter().all(|sidecar| in_force(sidecar) == generation);
        let operator = Operator::start();
        operator.set(wanted(&cluster, 2));
        operator.await_figures("both under the second", |figures| figures.current == 2);
        assert!(are_under(2));
        wait_for("all snapshots", LIMIT, || present(&cluster) == OTHERS + 1);
        let slot = slot_of(shop().snapshot_key().as_bytes());
        wait_for("their number", LIMIT, || fleet_at(&mut cluster.owner(slot).client()) == Some(2));
        wait_for("both to know it", LIMIT, || sidecars.iter().all(|sidecar| metric(sidecar, "larder_sidecars") == 2));

        // The slot moves, with its keys.
        let from = cluster.servers.iter().position(|server| server.port() == cluster.owner(slot).port()).unwrap();
        move_slot(&cluster, slot, &cluster.servers[from], &cluster.servers[(from + 1) % SHARDS]);
        operator.set(wanted(&cluster, 3));
        operator.await_figures("both under the third", |figures| figures.current == 2 && figures.wanted == 3);
        assert!(are_under(3));

        // A primary is gone, and its replica has what it kept.
        let owner = cluster.owner(slot).port();
        cluster.servers.iter_mut().find(|server| server.port() == owner).unwrap().kill();
        operator.set(wanted(&cluster, 4));
        operator.await_figures("both under the fourth", |figures| figures.current == 2 && figures.wanted == 4);
        assert!(are_under(4));

        // Nothing is left of what is over.
        operator.set(Some(Wanted { bindings: BTreeMap::new(), ..wanted(&cluster, 4).unwrap() }));
        wait_for("all to be taken away", LIMIT, || present(&cluster) == 0);
    }
}
