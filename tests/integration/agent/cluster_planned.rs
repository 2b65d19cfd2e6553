//! A Cluster of real servers under agents that is brought forward by the planner alone, as by an operator.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use larder::operator::admin::{Admin, Entry};
use larder::operator::cache_cluster::cluster_steps::{Step, step};
use larder::operator::cache_cluster::observe;
use larder::operator::cache_cluster::plan::{
    Action, Desired, Facts, Layout, Observed, Server, ServerId, ServerState, Starter, plan, serves_all_slots,
};
use larder::policy::agent::StateReport;
use tokio::runtime::{Builder, Runtime};

use super::cluster::{Cluster, SHARDS};
use super::tier::LIMIT;
use crate::support::server::Engine;

/// Longer than a failover by the bus takes, on a busy machine too.
const PATIENCE: Duration = Duration::from_secs(10);

/// Looks, plans, and does what is planned.
struct Operator {
    desired: Desired,
    runtime: Runtime,
    last: Option<(Observed, Instant)>,
}

impl Operator {
    fn new() -> Self {
        let layout = Layout::Cluster { shards: SHARDS as u16 };
        let desired = Desired { starter: Starter::Agent, ..Desired::on_one_machine(layout, 1, PATIENCE) };
        let runtime = Builder::new_current_thread().enable_all().build().expect("a runtime");
        Self { desired, runtime, last: None }
    }

    fn observe(&mut self, cluster: &Cluster) -> Observed {
        let servers = self.desired.servers().map(|id| (id, self.observe_server(cluster, id))).collect();
        let mut observed = Observed { servers, ..Observed::default() };
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
        let at = |id: ServerId| Some((address(cluster, id), cluster.buses[index_of(id)]));
        for Step { server, command, arguments } in actions.iter().filter_map(|action| step(action, at)) {
            let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
            // One that fails is planned again.
            let _ = self.runtime.block_on(async {
                let mut admin = Admin::connect(address(cluster, server), Entry::default()).await?;
                admin.ask::<()>(command, &arguments).await
            });
        }
        (actions, observed)
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
