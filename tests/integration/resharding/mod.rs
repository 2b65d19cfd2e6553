//! Slots of real servers move as the plan asks, by the code that every actuator shares.

mod bench;
mod fault_points;
mod fuse;

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::thread::sleep;
use std::time::{Duration, Instant};

use larder::operator::admin::{Admin, Entry, Login};
use larder::operator::cache_cluster::move_slots::{self, Side};
use larder::operator::cache_cluster::observe;
use larder::operator::cache_cluster::plan::{
    Action, Desired, Facts, Layout, Observed, Server, ServerId, ServerState, SlotSet, Waiting, plan, slots_to_move,
};
use larder::operator::cache_cluster::resharding::{Move, Resharding};
use tokio::runtime::Runtime;

use crate::support::resp::Client;
use crate::support::server::RedisCluster;

/// How long all slots may take to be where they are to be. Long: test machines are busy.
const LIMIT: Duration = Duration::from_secs(300);
/// As Larder configures servers: one that gives its last slot away stays a primary.
pub const STAYING: [&str; 2] = ["--cluster-allow-replica-migration", "no"];
/// As `larder dev` does.
const LOOK_EVERY: Duration = Duration::from_millis(100);
const AT_A_LOOK: Duration = Duration::from_millis(500);

fn loopback(port: u16) -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], port))
}

/// Whoever moves slots between the primaries of a Cluster.
pub struct Rig {
    /// The primaries, by shard.
    ports: Vec<u16>,
    login: Option<Login>,
    runtime: Runtime,
}

/// What is planned after one look at the servers.
pub struct Look {
    actions: Vec<Action>,
    left: Option<u16>,
}

impl Look {
    /// The slots that are asked for next, and the server that owns them.
    fn next_move(&self) -> Option<&SlotSet> {
        self.actions.iter().find_map(|action| match action {
            Action::MoveSlots { slots, .. } => Some(slots),
            _ => None,
        })
    }

    /// Whether all slots are where they are to be, and no node remembers that one was on its way.
    fn is_over(&self) -> bool {
        let is_open = |action: &Action| {
            matches!(
                action,
                Action::MoveSlots { .. } | Action::SettleSlots { .. } | Action::Wait(Waiting::Slots | Waiting::Gossip(_))
            )
        };
        self.left == Some(0) && !self.actions.iter().any(is_open)
    }
}

impl Rig {
    pub fn over(cluster: &RedisCluster, login: Option<Login>) -> Self {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime starts");
        Self { ports: cluster.servers.iter().map(|server| server.port()).collect(), login, runtime }
    }

    pub fn ports(&self) -> &[u16] {
        &self.ports
    }

    /// Why the last move failed that the engine made from one shard's primary to another's.
    pub fn failure(&self, from: usize, to: usize) -> Option<String> {
        let side =
            async |shard: usize| Side::connect(loopback(self.ports[shard]), self.entry()).await.expect("the server accepts");
        self.runtime.block_on(async { move_slots::failure(&mut side(from).await, &mut side(to).await).await })
    }

    fn entry(&self) -> Entry<'_> {
        Entry::from(self.login.as_ref())
    }

    async fn observe(&self) -> Observed {
        let mut servers = BTreeMap::new();
        for (port, shard) in self.ports.iter().zip(0..) {
            let address = loopback(*port);
            let mut admin = Admin::connect(address, self.entry()).await.expect("the server accepts");
            let facts = observe::server(&mut admin, true).await.expect("it answers").expect("it has loaded");
            servers.insert(ServerId { shard, index: 0 }, Server { address, bus_port: 0, state: ServerState::Running(facts) });
        }
        Observed { servers, ..Observed::default() }
    }

    /// The slots that a server owns by its own word.
    fn owned(&self, shard: usize) -> SlotSet {
        let observed = self.runtime.block_on(self.observe());
        let server = observed.servers.into_values().nth(shard).expect("one of ours");
        let ServerState::Running(Facts { cluster: Some(view), .. }) = server.state else { panic!("it runs in a Cluster") };
        view.slots.into_iter().collect()
    }

    /// What is to be done next for so many shards.
    pub fn look(&self, shards: u16) -> Look {
        let desired = Desired::on_one_machine(Layout::Cluster { shards }, 1, LIMIT);
        let observed = self.runtime.block_on(self.observe());
        Look { actions: plan(&desired, &observed), left: slots_to_move(&desired, &observed) }
    }

    /// Carries out what moves slots, told to the servers at these ports.
    pub fn apply(&self, resharding: &mut Resharding, look: &Look, ports: &[u16]) {
        let at = |id: &ServerId| loopback(ports[usize::from(id.shard)]);
        let _ = resharding.tell(look.left);
        for action in &look.actions {
            match action {
                Action::MoveSlots { from, to, slots, way } => {
                    let planned = Move { from: at(from), to: at(to), slots, way: *way };
                    let until = Instant::now() + AT_A_LOOK;
                    self.runtime.block_on(resharding.move_slots(planned, self.entry(), || Instant::now() < until));
                }
                Action::SettleSlots { server, slots } => {
                    let mut client = Client::connect(self.ports[usize::from(server.shard)]).expect("the server accepts");
                    slots.iter().for_each(|slot| assert!(!client.line(&format!("CLUSTER SETSLOT {slot} STABLE")).is_error()));
                }
                _ => {}
            }
        }
    }

    /// Goes on until so many shards own even shares.
    #[track_caller]
    pub fn settle(&self, shards: u16) {
        let (mut resharding, deadline) = (Resharding::default(), Instant::now() + LIMIT);
        loop {
            let look = self.look(shards);
            if look.is_over() {
                return;
            }
            assert!(Instant::now() < deadline, "{:?} slots are left to move: {:?}", look.left, look.actions);
            self.apply(&mut resharding, &look, &self.ports);
            sleep(LOOK_EVERY);
        }
    }
}
