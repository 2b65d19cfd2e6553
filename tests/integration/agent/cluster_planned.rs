//! A Cluster of real servers under agents that is brought forward by the planner alone, as by an operator.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use larder::operator::admin::{Admin, Entry};
use larder::operator::cache_cluster::cluster_steps::{Step, step};
use larder::operator::cache_cluster::move_slots;
use larder::operator::cache_cluster::observe;
use larder::operator::cache_cluster::plan::{
    Action, Desired, Facts, Layout, Observed, Server, ServerId, ServerState, Set, Starter, plan, serves_all_slots, slots_to_move,
};
use larder::operator::cache_cluster::resharding::{Move, Resharding};
use larder::policy::agent::StateReport;
use serde_json::json;
use tokio::runtime::{Builder, Runtime};

use super::cluster::{Cluster, SHARDS};
use super::tier::LIMIT;
use crate::failover::reshard::{key_of, ok};
use crate::support::resp::{Client, Value};
use crate::support::server::Engine;
use crate::support::sidecar::{Sidecar, bypass};

/// Longer than a failover by the bus takes, on a busy machine too.
const PATIENCE: Duration = Duration::from_secs(10);

/// Looks, plans, and does what is planned.
struct Operator {
    desired: Desired,
    /// How many servers the set of each shard asks for.
    sizes: BTreeMap<u16, u16>,
    resharding: Resharding,
    runtime: Runtime,
    last: Option<(Observed, Instant)>,
}

impl Operator {
    fn new() -> Self {
        let layout = Layout::Cluster { shards: SHARDS as u16 };
        let desired = Desired { starter: Starter::Agent, ..Desired::on_one_machine(layout, 1, PATIENCE) };
        let runtime = Builder::new_current_thread().enable_all().build().expect("a runtime");
        let mut operator = Self { desired, sizes: BTreeMap::new(), resharding: Resharding::default(), runtime, last: None };
        operator.want(SHARDS as u16);
        operator
    }

    /// Asks for so many shards: each has a set from now on.
    fn want(&mut self, shards: u16) {
        self.desired.layout = Layout::Cluster { shards };
        self.sizes.extend((0..shards).map(|shard| (shard, 2)));
    }

    fn observe(&mut self, cluster: &Cluster) -> Observed {
        let present = self.sizes.iter().flat_map(|(shard, size)| (0..*size).map(|index| ServerId { shard: *shard, index }));
        let servers = present.map(|id| (id, self.observe_server(cluster, id))).collect();
        let mut observed = Observed { servers, sizes: self.sizes.clone(), ..Observed::default() };
        let shape = observed.shape();
        observed.steady = match &self.last {
            Some((last, since)) if *last == shape => since.elapsed(),
            _ => {
                self.last = Some((shape, Instant::now()));
                Duration::ZERO
            }
        };
        observed
    }

    fn observe_server(&self, cluster: &Cluster, id: ServerId) -> Server {
        let index = index_of(id);
        let member = &cluster.members[index];
        let report: Option<StateReport> = serde_json::from_value(member.state()).ok();
        let state = match report.as_ref().map(ServerState::from) {
            Some(ServerState::Running(told)) => self.ask(address(cluster, id), told),
            Some(state) => state,
            None if member.is_away() => ServerState::Absent,
            None => ServerState::Silent,
        };
        Server { address: address(cluster, id), bus_port: cluster.buses[index], state }
    }

    fn ask(&self, address: SocketAddr, told: Facts) -> ServerState {
        let asked = self.runtime.block_on(async {
            let mut admin = Admin::connect(address, Entry::default()).await?;
            observe::server(&mut admin, true).await
        });
        match asked {
            Ok(Some(facts)) => ServerState::Running(Facts { lineage: told.lineage, ..facts }),
            Ok(None) | Err(_) => ServerState::Silent,
        }
    }

    /// One look. What is planned, and what was seen.
    fn look(&mut self, cluster: &Cluster) -> (Vec<Action>, Observed) {
        let observed = self.observe(cluster);
        let actions = plan(&self.desired, &observed);
        let _ = self.resharding.tell(slots_to_move(&self.desired, &observed));
        self.carry_out(cluster, &actions);
        (actions, observed)
    }

    fn carry_out(&mut self, cluster: &Cluster, actions: &[Action]) {
        let at = |id: ServerId| Some((address(cluster, id), cluster.buses[index_of(id)]));
        for Step { server, command, arguments } in actions.iter().filter_map(|action| step(action, at)) {
            let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
            // One that fails is planned again.
            let _ = self.runtime.block_on(async {
                let mut admin = Admin::connect(address(cluster, server), Entry::default()).await?;
                admin.ask::<()>(command, &arguments).await
            });
        }
        actions.iter().for_each(|action| self.reshard(cluster, action));
    }

    fn reshard(&mut self, cluster: &Cluster, action: &Action) {
        match action {
            Action::MoveSlots { from, to, slots, way } => {
                let planned = Move { from: address(cluster, *from), to: address(cluster, *to), slots, way: *way };
                let until = Instant::now() + Duration::from_millis(500);
                self.runtime.block_on(self.resharding.move_slots(planned, Entry::default(), || Instant::now() < until));
            }
            Action::SettleSlots { server, slots } => {
                // One that fails is planned again.
                let _ = self.runtime.block_on(async {
                    let mut admin = Admin::connect(address(cluster, *server), Entry::default()).await?;
                    move_slots::settle(&mut admin, slots).await
                });
            }
            Action::SetReplicas { of: Set::Servers { shard }, count: 0 } => drop(self.sizes.remove(shard)),
            _ => {}
        }
    }

    /// Until there is nothing left to do, and every slot is served. What was done.
    fn settle(&mut self, cluster: &Cluster) -> Vec<Action> {
        let (deadline, mut done) = (Instant::now() + LIMIT, Vec::new());
        loop {
            let (actions, observed) = self.look(cluster);
            if actions.is_empty() && serves_all_slots(&observed) {
                return done;
            }
            assert!(Instant::now() < deadline, "it does not come to rest: {actions:?}\n{observed:?}");
            done.extend(actions.into_iter().filter(|action| !matches!(action, Action::Wait(_))));
            std::thread::sleep(Duration::from_millis(200));
        }
    }
}

fn index_of(id: ServerId) -> usize {
    usize::from(id.shard) * 2 + usize::from(id.index)
}

fn address(cluster: &Cluster, id: ServerId) -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], cluster.members[index_of(id)].port))
}

#[test]
fn the_planner_forms_a_cluster_and_a_fault_needs_it_not() {
    for engine in Engine::ALL {
        let cluster = Cluster::start(engine, false);
        let mut operator = Operator::new();
        let done = operator.settle(&cluster);
        assert_eq!(done.iter().filter(|action| matches!(action, Action::AddSlots { .. })).count(), SHARDS, "{done:?}");
        (0..SHARDS).for_each(|shard| cluster.wait_until_whole(shard * 2));
        cluster.write(0);
        cluster.members[0].kill_server();
        cluster.wait_until_whole(1);
        cluster.assert_all_there(1);
        assert_eq!(operator.settle(&cluster), []);
    }
}

#[test]
fn a_lost_majority_is_taken_over_and_who_comes_back_follows() {
    for engine in Engine::ALL {
        let mut cluster = Cluster::start(engine, false);
        let mut operator = Operator::new();
        operator.settle(&cluster);
        cluster.write(0);
        for index in [0, 2] {
            cluster.members[index].kill_agent();
        }
        let deadline = Instant::now() + LIMIT;
        let (mut taken, mut served) = (Vec::new(), false);
        while !served {
            assert!(Instant::now() < deadline, "nobody takes over: {taken:?}");
            let (actions, observed) = operator.look(&cluster);
            taken.extend(actions.into_iter().filter(|action| matches!(action, Action::ClusterTakeover { .. })));
            // A claim that the others do not believe yet is renewed.
            served = serves_all_slots(&observed) && cluster.is_ok(1) && cluster.is_ok(3);
            std::thread::sleep(Duration::from_millis(200));
        }
        assert!(taken.contains(&Action::ClusterTakeover { server: ServerId { shard: 0, index: 1 } }), "{taken:?}");
        cluster.assert_all_there(1);
        for index in [0, 2] {
            cluster.members[index].start_agent();
        }
        operator.settle(&cluster);
        cluster.wait_until_whole(1);
        cluster.wait_until_whole(3);
        cluster.assert_all_there(1);
    }
}

const MANY: usize = 500;

/// Reads and writes through a sidecar until told to stop. How many commands it sent; none may fail.
fn use_keys(port: u16, stop: &AtomicBool) -> usize {
    let (mut client, mut commands) = (Client::connect(port).expect("the sidecar accepts"), 0);
    while !stop.load(Ordering::Relaxed) {
        let key = format!("k{}", commands * 7 % MANY);
        let found = client.call(&["GET", &key]);
        assert!(matches!(found, Value::Bulk(_)), "{key}: {found:?} after {commands} commands");
        ok(&client.call(&["SET", &key, &commands.to_string()]));
        commands += 1;
    }
    commands
}

fn all_keys(cluster: &Cluster, shards: usize) -> i64 {
    let primaries = (0..shards * 2).filter(|index| cluster.ask(*index, "INFO replication").contains("role:master"));
    primaries.map(|index| cluster.members[index].client().line("DBSIZE").int()).sum()
}

#[test]
fn shards_come_and_go_under_load() {
    for engine in Engine::ALL {
        let mut cluster = Cluster::start_of(engine, false, 5);
        let mut operator = Operator::new();
        operator.settle(&cluster);
        let seeds: Vec<String> = cluster.members.iter().take(SHARDS * 2).map(|member| member.address()).collect();
        let sidecar = Sidecar::start(&bypass(json!({"name": "main", "topology": {"cluster": {"seeds": seeds}}})));
        let mut client = sidecar.client();
        (0..MANY).for_each(|key| ok(&client.call(&["SET", &format!("k{key}"), "first"])));
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let load = scope.spawn(|| use_keys(sidecar.port(), &stop));
            operator.want(5);
            let grown = operator.settle(&cluster);
            assert!(grown.iter().any(|action| matches!(action, Action::MoveSlots { .. })), "{grown:?}");
            (0..5).for_each(|shard| assert!(cluster.ask(shard * 2, "CLUSTER INFO").contains("cluster_size:5")));
            operator.desired.layout = Layout::Cluster { shards: SHARDS as u16 };
            operator.settle(&cluster);
            stop.store(true, Ordering::Relaxed);
            assert!(load.join().expect("no command fails") > 0);
        });
        assert_eq!(operator.sizes.len(), SHARDS);
        for index in SHARDS * 2..10 {
            cluster.members[index].kill_agent();
        }
        operator.settle(&cluster);
        for index in 0..SHARDS * 2 {
            cluster.wait("the others to be forgotten", || cluster.ask(index, "CLUSTER NODES").lines().count() == SHARDS * 2);
        }
        assert_eq!(all_keys(&cluster, SHARDS), MANY as i64);
    }
}

/// A key has come to a new shard, whose primary then loses it: the slot still arrives, with the key.
#[test]
fn keys_that_have_come_outlive_the_primary_of_a_new_shard() {
    const SLOT: u16 = 7;
    let cluster = Cluster::start_of(Engine::Redis7, false, 4);
    let mut operator = Operator::new();
    operator.settle(&cluster);
    let key = key_of(SLOT, "only");
    ok(&cluster.members[0].client().call(&["SET", &key, "copy"]));
    operator.want(4);
    // The new shard is made, and no slot has moved.
    let deadline = Instant::now() + LIMIT;
    loop {
        let observed = operator.observe(&cluster);
        let actions = plan(&operator.desired, &observed);
        if actions.iter().any(|action| matches!(action, Action::MoveSlots { .. })) {
            break;
        }
        assert!(Instant::now() < deadline, "{actions:?}");
        operator.carry_out(&cluster, &actions);
        std::thread::sleep(Duration::from_millis(200));
    }
    let (from, to) = (cluster.ask(0, "CLUSTER MYID"), cluster.ask(6, "CLUSTER MYID"));
    cluster.tell(6, &format!("CLUSTER SETSLOT {SLOT} IMPORTING {from}"));
    cluster.tell(0, &format!("CLUSTER SETSLOT {SLOT} MIGRATING {to}"));
    let port = cluster.members[6].port.to_string();
    ok(&cluster.members[0].client().call(&["MIGRATE", "127.0.0.1", &port, &key, "0", "5000"]));
    cluster.wait("the replica to have it", || cluster.members[7].client().line("DBSIZE") == Value::Int(1));
    cluster.members[6].kill_server();
    cluster.wait("the reborn primary to be held", || cluster.members[6].held_for() == "PeerAhead");
    let done = operator.settle(&cluster);
    assert!(done.contains(&Action::ClusterTakeover { server: ServerId { shard: 3, index: 1 } }), "{done:?}");
    cluster.wait("it to be read", || cluster.members[7].client().call(&["GET", &key]) == Value::Bulk(b"copy".to_vec()));
}
