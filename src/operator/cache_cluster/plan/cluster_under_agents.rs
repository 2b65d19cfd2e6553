//! A Cluster whose servers are started by agents: what the planner does, and what it leaves to the bus.

use super::rules::test::switch_off;
use super::*;
use crate::policy::agent::Position;

const PATIENCE: Duration = Duration::from_secs(20);
const SHARDS: u16 = 3;

fn id(shard: u16, index: u16) -> ServerId {
    ServerId { shard, index }
}

fn address(id: ServerId) -> SocketAddr {
    SocketAddr::from(([10, 96, id.shard as u8, id.index as u8], 6379))
}

fn node_id(id: ServerId) -> NodeId {
    NodeId(format!("{}-{}", id.shard, id.index))
}

fn desired(durable: bool) -> Desired {
    let pods = DesiredPods { servers: Revision("new".to_owned()), sentinels: Revision("new".to_owned()) };
    Desired {
        starter: Starter::Agent,
        durable,
        pods: Some(pods),
        ..Desired::on_one_machine(Layout::Cluster { shards: SHARDS }, 1, PATIENCE)
    }
}

/// Shards of two servers on three nodes. Server 0 of each shard owns its slots, server 1 follows.
struct Scene {
    desired: Desired,
    observed: Observed,
}

impl Scene {
    fn whole(durable: bool) -> Self {
        Self::of(durable, SHARDS, SHARDS)
    }

    /// So many shards own all slots, of so many that there are.
    fn of(durable: bool, owning: u16, present: u16) -> Self {
        let owners = desired(durable);
        let desired = Desired { layout: Layout::Cluster { shards: present }, ..owners.clone() };
        let owners = Desired { layout: Layout::Cluster { shards: owning }, ..owners };
        let servers = desired.servers().map(|id| {
            let primary = ServerId { index: 0, ..id };
            let role = if id == primary { Role::Primary } else { Role::Replica { of: address(primary), link: Link::Up } };
            (
                id,
                Server {
                    address: address(id),
                    bus_port: 16379,
                    state: ServerState::Running(facts((&owners, &desired), id, role)),
                },
            )
        });
        let pods = desired.servers().map(|id| {
            let node = Node { name: format!("node-{}", (id.shard + id.index) % 3), ready: true };
            let revision = Some(Revision("new".to_owned()));
            let uid = format!("uid {id}");
            (Member::Server(id), Pod { uid, revision, node: Some(node), started: true, ready: true, deleting: false })
        });
        let observed = Observed {
            servers: servers.collect(),
            pods: pods.collect(),
            scale: Some(Scale { servers: 2, sentinels: 0 }),
            sizes: (0..present).map(|shard| (shard, 2)).collect(),
            steady: PATIENCE,
            ..Observed::default()
        };
        Self { desired, observed }
    }

    fn want(&mut self, shards: u16) -> &mut Self {
        self.desired.layout = Layout::Cluster { shards };
        self
    }

    /// A shard holds no keys.
    fn empty(&mut self, shard: u16) -> &mut Self {
        for index in [0, 1] {
            let facts = self.facts(id(shard, index));
            (facts.holds_data, facts.lineage) = (false, None);
        }
        self
    }

    fn set(&mut self, id: ServerId, state: ServerState) -> &mut Self {
        self.observed.servers.get_mut(&id).unwrap().state = state;
        self
    }

    fn facts(&mut self, id: ServerId) -> &mut Facts {
        match &mut self.observed.servers.get_mut(&id).unwrap().state {
            ServerState::Running(facts) => facts,
            other => panic!("{other:?}"),
        }
    }

    fn pod(&mut self, id: ServerId) -> &mut Pod {
        self.observed.pods.get_mut(&Member::Server(id)).unwrap()
    }

    fn plan(&self) -> Vec<Action> {
        plan(&self.desired, &self.observed)
    }

    /// What is done, without what is waited for.
    fn done(&self) -> Vec<Action> {
        self.plan().into_iter().filter(|action| !matches!(action, Action::Wait(_))).collect()
    }

    #[track_caller]
    fn check_waits(&self, waiting: &Waiting) {
        let actions = self.plan();
        assert!(actions.contains(&Action::Wait(waiting.clone())), "{actions:?}");
        assert_eq!(self.done(), []);
    }
}

fn facts((owners, desired): (&Desired, &Desired), id: ServerId, role: Role) -> Facts {
    let owns = |id: ServerId| id.index == 0 && id.shard < owners.shards();
    let owned = |id: ServerId| if owns(id) { vec![owners.home_slots(id.shard)] } else { Vec::new() };
    let others = desired.servers().filter(|other| *other != id);
    let peers = others.map(|id| Peer { id: node_id(id), address: Some(address(id)), handshake: false, slots: owned(id) });
    let cluster = ClusterFacts {
        id: node_id(id),
        epoch: u64::from(id.shard),
        current_epoch: 9,
        ok: true,
        slots: owned(id),
        peers: peers.collect(),
        ..ClusterFacts::default()
    };
    let lineage = Some(format!("shard {}", id.shard));
    Facts { role, holds_data: true, offset: 10, lineage, promotable: true, cluster: Some(cluster) }
}

fn held(data: DataState) -> ServerState {
    ServerState::Held(Held { reason: "PeerAhead".to_owned(), message: "why".to_owned(), data })
}

fn copy(offset: u64) -> DataState {
    DataState::Complete(Position { lineage: "shard 0".to_owned(), offset, led: true, exact: false })
}

#[test]
fn nothing_is_done_where_all_is_well() {
    assert_eq!(Scene::whole(true).plan(), []);
}

#[test]
fn servers_that_own_nothing_are_introduced_and_given_even_shares() {
    let mut scene = Scene::whole(false);
    let servers: Vec<ServerId> = scene.desired.servers().collect();
    for id in &servers {
        let facts = scene.facts(*id);
        (facts.role, facts.holds_data, facts.lineage) = (Role::Primary, false, None);
        let view = facts.cluster.as_mut().unwrap();
        (view.slots, view.peers, view.ok) = (Vec::new(), Vec::new(), false);
    }
    let done = scene.done();
    let meet = |peer: &ServerId| Action::ClusterMeet { server: id(0, 0), peer: *peer };
    let add = |shard| Action::AddSlots { server: id(shard, 0), slots: vec![scene.desired.home_slots(shard)] };
    let expected: Vec<Action> = servers[1..].iter().map(meet).chain((0..SHARDS).map(add)).collect();
    assert_eq!(done, expected);
    // Not while one of them cannot be asked.
    scene.set(id(2, 1), ServerState::Silent);
    assert!(!scene.done().iter().any(|action| matches!(action, Action::AddSlots { .. })));
}

#[test]
fn the_bus_fails_over_as_long_as_it_can() {
    let mut scene = Scene::whole(true);
    scene.set(id(0, 0), held(DataState::Empty));
    scene.check_waits(&Waiting::Failover { shard: 0 });
}

/// The primaries of shards 0 and 1 are gone.
fn without_majority(durable: bool) -> Scene {
    let mut scene = Scene::whole(durable);
    scene.set(id(0, 0), held(DataState::Empty)).set(id(1, 0), ServerState::Absent);
    scene
}

#[test]
fn a_shard_is_taken_over_where_the_majority_is_lost_and_its_primary_is_gone() {
    let takeover = |shard| Action::ClusterTakeover { server: id(shard, 1) };
    assert_eq!(without_majority(false).done(), [takeover(0), takeover(1)]);
    let mut hasty = without_majority(false);
    hasty.observed.steady = PATIENCE / 2;
    hasty.check_waits(&Waiting::Failover { shard: 0 });
    // What is on a volume may come back: a person does without it.
    let mut durable = without_majority(true);
    assert_eq!(durable.done(), [takeover(0)]);
    assert!(durable.plan().contains(&Action::Wait(Waiting::Choice)));
    durable.desired.accept_data_loss = true;
    assert_eq!(durable.done(), [takeover(0), takeover(1)]);
}

#[test]
fn a_claim_that_the_others_do_not_believe_is_renewed() {
    let mut scene = without_majority(false);
    let slots = scene.desired.home_slots(0);
    let taken = scene.facts(id(0, 1));
    taken.role = Role::Primary;
    let view = taken.cluster.as_mut().unwrap();
    (view.slots, view.epoch) = (vec![slots], 3);
    assert!(scene.done().contains(&Action::BumpEpoch { server: id(0, 1) }), "{:?}", scene.plan());
    scene.observed.steady = PATIENCE / 2;
    assert!(!scene.done().iter().any(|action| matches!(action, Action::BumpEpoch { .. })));
}

#[test]
fn nobody_takes_over_from_one_that_may_live_or_holds_more() {
    let with = |state: ServerState| {
        let mut scene = without_majority(false);
        scene.set(id(0, 0), state);
        scene
    };
    let takes_over = |scene: &Scene| scene.done().contains(&Action::ClusterTakeover { server: id(0, 1) });
    for (state, waiting) in [
        (ServerState::Silent, Waiting::Server(id(0, 0))),
        (ServerState::Starting(copy(11)), Waiting::BestCopy(id(0, 0))),
        (held(copy(11)), Waiting::Choice),
    ] {
        let scene = with(state);
        assert!(!takes_over(&scene) && scene.plan().contains(&Action::Wait(waiting)), "{:?}", scene.plan());
        switch_off(Some(Rule::ProveGone));
        let broken = takes_over(&scene);
        switch_off(None);
        assert!(broken, "the rule is needed");
    }
    assert!(takes_over(&with(held(copy(10)))) && takes_over(&with(ServerState::Starting(DataState::Empty))));
    let mut accepted = with(held(copy(11)));
    accepted.desired.accept_data_loss = true;
    assert!(takes_over(&accepted));
    // It may be serving on the other side of a cut, whatever a person accepts.
    let mut silent = with(ServerState::Silent);
    silent.desired.accept_data_loss = true;
    assert!(!takes_over(&silent));
}

#[test]
fn shards_roll_one_after_the_other_replicas_first() {
    let mut scene = Scene::whole(true);
    let servers: Vec<ServerId> = scene.desired.servers().collect();
    servers.iter().for_each(|id| scene.pod(*id).revision = Some(Revision("old".to_owned())));
    for shard in 0..SHARDS {
        let [action] = &scene.done()[..] else { panic!("{:?}", scene.plan()) };
        assert!(
            matches!(action, Action::ReplacePod { member: Member::Server(server), .. } if *server == id(shard, 1)),
            "{action:?}"
        );
        scene.pod(id(shard, 1)).revision = Some(Revision("new".to_owned()));
        let handover = Action::Handover { from: id(shard, 0), to: id(shard, 1) };
        assert_eq!(scene.done(), [handover]);
        // It has handed over, and its pod was replaced.
        scene.pod(id(shard, 0)).revision = Some(Revision("new".to_owned()));
    }
    assert_eq!(scene.plan(), []);
}

#[test]
fn nothing_rolls_while_a_shard_has_no_primary_or_a_replica_lags() {
    let stale = |scene: &mut Scene| scene.pod(id(2, 1)).revision = Some(Revision("old".to_owned()));
    let mut scene = Scene::whole(true);
    stale(&mut scene);
    scene.set(id(0, 0), held(DataState::Empty));
    assert_eq!(scene.done(), []);
    let mut scene = Scene::whole(true);
    stale(&mut scene);
    scene.facts(id(1, 0)).offset = 10 << 20;
    scene.check_waits(&Waiting::Synchronisation(id(1, 1)));
}

#[test]
fn a_node_that_carries_a_majority_of_primaries_is_relieved_by_a_handover() {
    let mut scene = Scene::whole(true);
    for (server, node) in [(id(0, 0), "a"), (id(1, 0), "a"), (id(2, 0), "b"), (id(0, 1), "b"), (id(1, 1), "c"), (id(2, 1), "c")] {
        scene.pod(server).node = Some(Node { name: node.to_owned(), ready: true });
    }
    // On node b, one of shard 0 would make two of three again.
    assert_eq!(scene.done(), [Action::Handover { from: id(1, 0), to: id(1, 1) }]);
    switch_off(Some(Rule::SpreadPrimaries));
    let broken = scene.plan();
    switch_off(None);
    assert_eq!(broken, []);
    scene.observed.handover_failed = Some(Duration::ZERO);
    scene.check_waits(&Waiting::HandoverRetry(id(1, 0)));
}

/// After a drain all servers are on two nodes of three, and each shard has one on either.
#[test]
fn a_replica_moves_where_none_could_relieve_a_crowded_node() {
    let mut scene = Scene::whole(true);
    for (server, node) in [(id(0, 0), "a"), (id(1, 0), "a"), (id(2, 0), "b"), (id(0, 1), "b"), (id(1, 1), "b"), (id(2, 1), "a")] {
        scene.pod(server).node = Some(Node { name: node.to_owned(), ready: true });
    }
    scene.observed.steady = Duration::from_secs(30);
    assert_eq!(scene.plan(), [], "nodes may not be seen");
    scene.observed.open_nodes = ["a", "b"].map(str::to_owned).into();
    assert_eq!(scene.plan(), [], "no other node has room");
    scene.observed.open_nodes.insert("c".to_owned());
    let moves = Action::ReplacePod { member: Member::Server(id(1, 1)), uid: "uid server 1-1".to_owned(), why: Why::Crowded };
    assert_eq!(scene.plan(), [moves]);
    for (rule, done) in [(Rule::MoveReplicas, 0), (Rule::SpreadPrimaries, 1)] {
        switch_off(Some(rule));
        let broken = scene.plan();
        switch_off(None);
        assert_eq!(broken.len(), done, "{broken:?}");
    }
    // A drain that goes on would bring it back, and so would a scheduler that knows better.
    scene.observed.steady = Duration::from_secs(29);
    assert_eq!(scene.plan(), []);
    scene.observed.steady = Duration::from_secs(30);
    let mut tries = Tries::default();
    tries.note(&scene.observed);
    tries.begin();
    scene.observed.moved = Some(tries.moved(Duration::from_secs(179)));
    assert_eq!(scene.plan(), []);
    scene.observed.moved = Some(tries.moved(Duration::from_secs(180)));
    assert_eq!(scene.done().len(), 1);
    // Where it has moved, it takes over.
    scene.pod(id(1, 1)).node = Some(Node { name: "c".to_owned(), ready: true });
    assert_eq!(scene.done(), [Action::Handover { from: id(1, 0), to: id(1, 1) }]);
}

#[test]
fn replicas_come_to_all_shards_and_go_one_at_a_time() {
    let mut scene = Scene::whole(true);
    scene.desired.replicas = 2;
    let set = |shard, count| Action::SetReplicas { of: Set::Servers { shard }, count };
    assert_eq!(scene.done(), [set(0, 3), set(1, 3), set(2, 3)]);
    let mut scene = Scene::whole(true);
    scene.observed.sizes = [(0, 2), (1, 3), (2, 3)].into();
    scene.observed.scale = Some(Scale { servers: 3, sentinels: 0 });
    assert_eq!(scene.done(), [set(1, 2)]);
}

#[test]
fn slots_begin_to_move_to_new_shards_once_every_agent_knows_of_them() {
    let mut scene = Scene::of(false, SHARDS, 5);
    scene.empty(3).empty(4);
    let begins = |scene: &Scene| match &scene.done()[..] {
        [Action::MoveSlots { from, to, way: Way::ByKeys, .. }] => from.shard < SHARDS && *to == id(3, 0),
        other => panic!("{other:?}"),
    };
    assert!(begins(&scene), "{:?}", scene.plan());
    scene.observed.unaware = [id(1, 1)].into();
    scene.check_waits(&Waiting::Told(id(1, 1)));
    switch_off(Some(Rule::TellBeforeMoves));
    let broken = begins(&scene);
    switch_off(None);
    assert!(broken, "the rule is needed");
    // Nor where something is to be healed.
    scene.observed.unaware.clear();
    scene.set(id(2, 1), ServerState::Silent);
    scene.check_waits(&Waiting::Server(id(2, 1)));
    // With nothing to move, nobody need know.
    let mut even = Scene::whole(false);
    even.observed.unaware = [id(1, 1)].into();
    assert_eq!(even.plan(), []);
}

#[test]
fn a_shard_that_is_wanted_no_more_gives_its_slots_away() {
    let mut scene = Scene::of(false, 4, 4);
    scene.want(SHARDS);
    // Agents may not have heard yet that another shard has left: it owns nothing, and has no vote.
    scene.observed.unaware = [id(1, 1)].into();
    let done = scene.done();
    assert!(matches!(&done[..], [Action::MoveSlots { from, to, .. }] if *from == id(3, 0) && to.shard < SHARDS), "{done:?}");
}

#[test]
fn a_shard_leaves_when_it_holds_nothing_and_is_forgotten_first() {
    let leaves = Action::SetReplicas { of: Set::Servers { shard: 3 }, count: 0 };
    let mut scene = Scene::of(true, SHARDS, 4);
    scene.want(SHARDS);
    scene.check_waits(&Waiting::Keys(id(3, 0)));
    scene.empty(3);
    let done = scene.done();
    let forgets = done.iter().filter(|action| matches!(action, Action::ClusterForget { server, .. } if server.shard < SHARDS));
    assert_eq!((forgets.count(), done.len(), done.last()), (12, 13, Some(&leaves)), "each of six forgets two: {done:?}");
    // What is on the volume of one that is away may come back.
    scene.set(id(3, 1), ServerState::Absent);
    scene.check_waits(&Waiting::Pod(Member::Server(id(3, 1))));
    scene.desired.durable = false;
    assert!(scene.done().contains(&leaves), "{:?}", scene.plan());
}

#[test]
fn keys_that_have_come_outlive_the_primary_that_was_to_get_their_slots() {
    let takes_over = Action::ClusterTakeover { server: id(3, 1) };
    let mut scene = Scene::of(false, SHARDS, 4);
    scene.set(id(3, 0), held(DataState::Empty));
    assert_eq!(scene.done(), std::slice::from_ref(&takes_over));
    switch_off(Some(Rule::KeepArrivals));
    let broken = scene.done();
    switch_off(None);
    assert_eq!(broken, [], "the rule is needed");
    scene.set(id(3, 0), ServerState::Absent);
    assert_eq!(scene.done(), [takes_over]);
    scene.set(
        id(3, 0),
        held(DataState::Complete(Position { lineage: "shard 3".to_owned(), offset: 11, led: true, exact: false })),
    );
    scene.check_waits(&Waiting::Choice);
    // One that begins again by itself is not replaced.
    scene.set(id(3, 0), ServerState::Starting(DataState::Empty));
    scene.check_waits(&Waiting::Server(id(3, 0)));
}
