//! The operator in the model: what it sees, what it does, and what it must never do.

use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;

use super::super::{
    Action, Desired, DesiredPods, Facts, Held, Link, Member, Observed, Pod, Revision, Role, Scale, Sentinel, Server, ServerState,
    Set, Tries, Waiting, Watch, Why, plan,
};
use super::actors::DOWN_TICKS;
use super::world::{Data, Image, Memory, NODES, Node, PodSim, Process, Verdict, World, sentinel, server};
use crate::policy::agent::{DataState, Position};

pub(super) const TICK: Duration = Duration::from_millis(500);
pub(super) const TAKEOVER_TICKS: u32 = 16;
/// No sentinel may forget its ghosts this soon after another did, and knew everybody again at once.
const PRUNE_TICKS: u32 = 8;
/// No sentinel may be moved this soon after another was, unless that left its node with fewer.
const MOVE_TICKS: u32 = 358;
/// No sentinel may be moved this soon after another was at all.
const LEAST_MOVE_TICKS: u32 = 58;
/// No handover may follow one that failed this soon.
const HANDOVER_TICKS: u32 = 100;

/// The operator: what it saw last, and what it has done.
pub(super) struct Operator {
    shape: Option<Observed>,
    steady: Duration,
    decided: Vec<Action>,
    now: u32,
    failed_handover: Option<u32>,
    pruned: Option<u32>,
    moved: Option<u32>,
    /// How many sentinels the fullest node carried then.
    moved_of: usize,
    tries: Tries,
    /// For how many looks each server has been silent.
    silent: Vec<u32>,
    /// Steps that change something, since they were last counted.
    pub(super) steps: u32,
    /// For how many ticks nothing has been planned.
    pub(super) idle: u32,
}

pub(super) fn address(index: usize) -> SocketAddr {
    (Ipv4Addr::LOCALHOST, 7000 + index as u16).into()
}

fn index_of(address: SocketAddr) -> usize {
    usize::from(address.port() - 7000)
}

fn revision(number: u32) -> Revision {
    Revision(number.to_string())
}

impl Operator {
    pub(super) fn new() -> Self {
        Self {
            shape: None,
            steady: Duration::ZERO,
            decided: Vec::new(),
            now: 0,
            failed_handover: None,
            pruned: None,
            moved: None,
            moved_of: 0,
            tries: Tries::default(),
            silent: Vec::new(),
            steps: 0,
            idle: 0,
        }
    }

    /// What was decided a tick ago is done, as far as `part` goes; then it looks and decides anew. `struck`: a fault has struck in
    /// between, and what disrupts is not done, since it is looked at again right before.
    pub(super) fn turn(&mut self, world: &mut World, part: usize, struck: bool) -> Verdict {
        self.now += 1;
        for action in std::mem::take(&mut self.decided).into_iter().take(part) {
            let disrupts = matches!(action, Action::ReplacePod { .. } | Action::SetReplicas { .. } | Action::Handover { .. });
            if !(struck && disrupts) {
                self.apply(world, &action)?;
            }
        }
        if world.operator_away > 0 {
            world.operator_away -= 1;
            return Ok(());
        }
        let mut desired = world.desired.clone();
        desired.pods = Some(DesiredPods {
            servers: revision(world.template.revision),
            sentinels: revision(world.sentinel_template.revision),
        });
        let observed = self.observe(world);
        self.decided = plan(&desired, &observed);
        self.idle = if self.decided.is_empty() { self.idle + 1 } else { 0 };
        self.check(world, &desired)
    }

    /// Whether what is waited for is a person's decision, and is said to be.
    pub(super) fn waits_for_a_person(&self) -> bool {
        let decides = |reason: &str| ["PeersUnknown", "Incomparable", "OwnPartial", "OwnerIsEmpty"].contains(&reason);
        self.decided.iter().any(|action| match action {
            Action::Wait(Waiting::Held { reason, .. }) => decides(reason),
            Action::Wait(Waiting::Choice | Waiting::BestCopy(_)) => true,
            _ => false,
        })
    }

    pub(super) fn waits_for(&self) -> String {
        format!("{:?}", self.decided)
    }

    fn observe(&mut self, world: &World) -> Observed {
        let mut observed = Observed {
            servers: (0..world.servers.len()).map(|index| (server(index), see_server(world, index))).collect(),
            sentinels: (0..world.sentinels.len()).map(|index| (sentinel(index), see_sentinel(world, index))).collect(),
            pods: see_pods(world),
            open_nodes: (0..NODES).filter(|node| world.is_open(*node)).map(|node| node.to_string()).collect(),
            scale: Some(Scale { servers: world.scale.0 as u16, sentinels: world.scale.1 as u16 }),
            sizes: [(0, world.scale.0 as u16)].into(),
            steady: Duration::ZERO,
            handover_failed: self.failed_handover.map(|then| TICK * (self.now - then)),
            ..Observed::default()
        };
        self.tries.note(&observed);
        observed.moved = self.moved.map(|then| self.tries.moved(TICK * (self.now - then)));
        let shape = observed.shape();
        self.steady = if self.shape.as_ref() == Some(&shape) { self.steady + TICK } else { Duration::ZERO };
        self.shape = Some(shape);
        observed.steady = self.steady;
        observed
    }

    fn apply(&mut self, world: &mut World, action: &Action) -> Verdict {
        self.steps += u32::from(!matches!(action, Action::Wait(_)));
        match action {
            Action::Wait(_) => {}
            Action::Monitor { sentinel, primary, quorum } => {
                let index = usize::from(sentinel.0);
                if reaches_sentinel(world, index) {
                    let memory =
                        Memory { primary: index_of(*primary), epoch: 0, quorum: *quorum, replicas: 0, peers: 0, gone: 0 };
                    world.sentinels[index].memory = Some(memory);
                }
            }
            Action::Forget { sentinel } if reaches_sentinel(world, usize::from(sentinel.0)) => {
                world.sentinels[usize::from(sentinel.0)].memory = None;
            }
            Action::SetQuorum { sentinel, quorum } if reaches_sentinel(world, usize::from(sentinel.0)) => {
                world.sentinels[usize::from(sentinel.0)].memory.iter_mut().for_each(|memory| memory.quorum = *quorum);
            }
            Action::PruneGhosts { sentinel } if reaches_sentinel(world, usize::from(sentinel.0)) => {
                world.forget_peers(usize::from(sentinel.0));
            }
            Action::Forget { .. } | Action::SetQuorum { .. } | Action::PruneGhosts { .. } => {}
            Action::ReplicateFrom { server, primary } if reaches_server(world, usize::from(server.index)) => {
                world.follow(usize::from(server.index), index_of(*primary));
            }
            Action::Promote { server } if reaches_server(world, usize::from(server.index)) => {
                let index = usize::from(server.index);
                world.truth = world.truth.min(world.servers[index].data.version);
                world.promote(index);
            }
            Action::ReplicateFrom { .. } | Action::Promote { .. } => {}
            Action::Handover { from, to } => self.hand_over(world, usize::from(from.index), usize::from(to.index)),
            Action::ReplacePod { member: Member::Server(server), uid, why } => {
                let index = usize::from(server.index);
                // One that did not serve is asked again right before.
                let serves_by_now = *why == Why::StaleAndUnready && world.acts(index);
                if !serves_by_now && world.servers[index].pod.is_some_and(|pod| pod.uid.to_string() == *uid) {
                    world.delete_pod(index);
                }
            }
            Action::ReplacePod { member: Member::Sentinel(sentinel), uid, why } => {
                let index = usize::from(sentinel.0);
                if *why == Why::Crowded {
                    (self.moved, self.moved_of) = (Some(self.now), world.fullest());
                    self.tries.begin();
                }
                if world.sentinels[index].pod.is_some_and(|pod| pod.uid.to_string() == *uid) {
                    world.delete_sentinel_pod(index);
                }
            }
            Action::SetReplicas { of: Set::Servers { .. }, count } => world.scale.0 = usize::from(*count),
            Action::SetReplicas { of: Set::Sentinels, count } => world.scale.1 = usize::from(*count),
            other => return Err(format!("{other:?} is not for agents")),
        }
        world.last_copy_is_there(&format!("{action:?}"))
    }

    fn hand_over(&mut self, world: &mut World, from: usize, to: usize) {
        let tries = world.rng.u32(0..10) < 7;
        self.failed_handover = if tries && world.hand_over(from, to) { None } else { Some(self.now) };
    }

    /// What was decided, against what is really so.
    fn check(&mut self, world: &World, desired: &Desired) -> Verdict {
        if desired.paused && !self.decided.is_empty() {
            return Err("something is planned while paused".to_owned());
        }
        let disruptions = self.decided.iter().filter(|action| is_disruption(action)).count();
        if disruptions > 1 {
            return Err(format!("{disruptions} disruptions at once: {:?}", self.decided));
        }
        self.silent.resize(world.servers.len(), 0);
        for (index, looks) in self.silent.iter_mut().enumerate() {
            *looks = if state_of(world, index) == ServerState::Silent { *looks + 1 } else { 0 };
        }
        for action in &self.decided {
            check_promotion(world, action, &self.silent)?;
            check_topology(world, action)?;
            check_disruption(world, action)?;
            match action {
                Action::Handover { .. } if self.failed_handover.is_some_and(|then| self.now - then < HANDOVER_TICKS) => {
                    return Err("a handover follows one that failed at once".to_owned());
                }
                Action::PruneGhosts { .. } => {
                    if self.pruned.is_some_and(|then| self.now - then < PRUNE_TICKS && self.now - then > 1) {
                        return Err("two sentinels forget their peers at once".to_owned());
                    }
                    self.pruned = Some(self.now);
                }
                Action::ReplacePod { why: Why::Crowded, .. }
                    if self.moved.is_some_and(|then| self.moves_too_soon(then, world)) =>
                {
                    return Err("sentinels are moved one right after the other".to_owned());
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// Whether a sentinel that is moved now is moved too soon after the last one.
    fn moves_too_soon(&self, then: u32, world: &World) -> bool {
        let ago = self.now - then;
        ago < LEAST_MOVE_TICKS || (ago < MOVE_TICKS && world.fullest() >= self.moved_of)
    }
}

fn is_disruption(action: &Action) -> bool {
    matches!(action, Action::ReplacePod { .. } | Action::Handover { .. } | Action::PruneGhosts { .. })
}

fn reaches_server(world: &World, index: usize) -> bool {
    world.serving_node(index).is_some_and(|node| world.nodes[node] == Node::Up)
}

fn reaches_sentinel(world: &World, index: usize) -> bool {
    world.sentinel_node(index).is_some_and(|node| world.nodes[node] == Node::Up)
}

/// The copy that is promoted is the best that can be reached, and those that cannot were waited for.
fn check_promotion(world: &World, action: &Action, silent: &[u32]) -> Verdict {
    let Action::Promote { server } = action else { return Ok(()) };
    let reached = |other: &usize| world.agent_node(*other).is_some_and(|node| world.nodes[node] == Node::Up);
    let copies = (0..world.servers.len()).filter(reached).map(|other| world.servers[other].data).filter(|data| data.complete);
    let best = copies.map(|data| data.version).max().unwrap_or(0);
    let own = world.servers[usize::from(server.index)].data;
    if own.version < best && !world.desired.accept_data_loss {
        return Err(format!("{server} is promoted with {} of {best} writes", own.version));
    }
    for (index, other) in world.servers.iter().enumerate() {
        let fell_silent = (1..TAKEOVER_TICKS).contains(&silent[index]);
        if fell_silent && other.data.complete && other.data.version > own.version && !world.desired.accept_data_loss {
            return Err(format!("{server} is promoted, and server {index}, which holds more, fell silent a moment ago"));
        }
    }
    Ok(())
}

/// A majority of sentinels that can be asked, and could fail over, is not contradicted.
fn check_topology(world: &World, action: &Action) -> Verdict {
    let contradicts = |named: usize| match action {
        Action::Monitor { primary, .. } => index_of(*primary) != named,
        Action::Promote { .. } | Action::Forget { .. } => true,
        _ => false,
    };
    let Some(named) = world.named().filter(|named| contradicts(*named)) else {
        return check_forget(world, action);
    };
    let electable = |index: usize| {
        let promotable = matches!(world.servers[index].process, Process::Replica { promotable: true, .. });
        let asked = (0..world.sentinels.len()).filter(|sentinel| reaches_sentinel(world, *sentinel));
        let mut memories = asked.filter_map(|sentinel| world.sentinels[sentinel].memory);
        let known = memories.any(|memory| memory.primary == named && memory.replicas & 1 << index != 0);
        promotable && known && reaches_server(world, index)
    };
    let serves = world.acts(named) && reaches_server(world, named);
    if serves || (0..world.servers.len()).any(electable) {
        return Err(format!("{action:?} contradicts the sentinels, which name server {named}"));
    }
    Ok(())
}

/// Sentinels lose their memory only where nobody serves, and a majority answers.
fn check_forget(world: &World, action: &Action) -> Verdict {
    let Action::Forget { .. } = action else { return Ok(()) };
    let answering = (0..world.sentinels.len()).filter(|index| reaches_sentinel(world, *index)).count();
    let serves = (0..world.servers.len()).any(|index| reaches_server(world, index));
    if serves || answering <= world.sentinels.len() / 2 {
        return Err("memory is taken from sentinels although somebody serves, or too few answer".to_owned());
    }
    Ok(())
}

/// A disruption needs everybody else in place, but for a pod with which nothing is lost.
fn check_disruption(world: &World, action: &Action) -> Verdict {
    match action {
        Action::ReplacePod { member, why: Why::Stale, .. } => check_replaced(world, *member),
        Action::ReplacePod { member, why: Why::Crowded, .. } => check_moved(world, *member),
        Action::ReplacePod { member: Member::Server(id), why: Why::StaleAndUnready, .. } => {
            let index = usize::from(id.index);
            let serves = world.named() == Some(index) && world.acts(index);
            let data = world.servers[index].data;
            let others = (0..world.servers.len()).filter(|other| *other != index).map(|other| world.servers[other].data);
            let others = others.filter(|data| data.complete).map(|data| data.version).max().unwrap_or(0);
            let last = !world.desired.durable && data.complete && data.version >= world.truth && others < world.truth;
            if serves || last {
                return Err(format!("server {index} is replaced, unready, and nobody else has what it has"));
            }
            Ok(())
        }
        Action::Handover { from, to } => {
            let (from, to) = (usize::from(from.index), usize::from(to.index));
            let fit = world.acts(from) && world.follows_in_step(to, from);
            if fit {
                check_others(world, None)
            } else {
                Err(format!("server {from} hands over to server {to}, which is not in step"))
            }
        }
        Action::SetReplicas { of: Set::Servers { .. }, count } if usize::from(*count) < world.scale.0 => {
            let leaving = usize::from(*count);
            let serves = world.named() == Some(leaving) && world.acts(leaving);
            if serves { Err(format!("server {leaving} is removed, the primary")) } else { Ok(()) }
        }
        Action::SetReplicas { of: Set::Sentinels, count } if usize::from(*count) < world.scale.1 => {
            check_fewer(world, usize::from(*count))
        }
        Action::SetQuorum { sentinel, quorum } => check_quorum(world, usize::from(sentinel.0), *quorum),
        Action::PruneGhosts { sentinel } => {
            check_others(world, None)?;
            check_others_know_all(world, usize::from(sentinel.0))
        }
        _ => Ok(()),
    }
}

/// Those sentinels that stay all serve, know each other, and are a majority of all that they know. With one that does not serve,
/// nothing is taken from them.
fn check_fewer(world: &World, count: usize) -> Verdict {
    if !reaches_sentinel(world, count) {
        return Ok(());
    }
    let all: u8 = (0..count).map(|index| 1 << index).sum();
    for index in 0..count {
        let memory = world.sentinels[index].memory.filter(|_| reaches_sentinel(world, index));
        let Some(memory) = memory else { return Err(format!("a sentinel is removed while sentinel {index} does not serve")) };
        let known = memory.peers | 1 << index;
        if known & all != all || 2 * count <= known.count_ones() as usize {
            return Err(format!(
                "a sentinel is removed, and with {count} sentinel {index}, which knows {known:b}, cannot fail over"
            ));
        }
    }
    Ok(())
}

/// While a sentinel forgets whom it knows, the others could fail over to each replica, and know each other.
fn check_others_know_all(world: &World, forgetful: usize) -> Verdict {
    let all = |count: usize| ((1u16 << count) - 1) as u8;
    let Some(primary) = world.named() else { return Ok(()) };
    for index in (0..world.scale.1).filter(|index| *index != forgetful) {
        let Some(memory) = world.sentinels[index].memory else { continue };
        let (replicas, peers) = (memory.replicas | 1 << primary, memory.peers | 1 << index);
        if replicas & all(world.scale.0) != all(world.scale.0) || peers & all(world.scale.1) != all(world.scale.1) {
            return Err(format!("sentinel {forgetful} forgets its peers while sentinel {index} does not know all: {memory:?}"));
        }
    }
    Ok(())
}

/// Where more must agree than before, as many watch.
fn check_quorum(world: &World, index: usize, quorum: u16) -> Verdict {
    let rises = world.sentinels[index].memory.is_some_and(|memory| memory.quorum < quorum);
    let watching = world.sentinels.iter().filter(|sentinel| sentinel.memory.is_some()).count();
    if rises && watching < usize::from(quorum) {
        Err(format!("{quorum} sentinels must agree, and {watching} watch"))
    } else {
        Ok(())
    }
}

/// A sentinel is moved only off a node that carries too many, towards one that has room, and while all others serve.
fn check_moved(world: &World, member: Member) -> Verdict {
    let Member::Sentinel(id) = member else { return Err(format!("{member} is moved, which is no sentinel")) };
    let on = world.sentinels[usize::from(id.0)].pod.map(|pod| pod.node);
    let room = (0..NODES).any(|node| world.is_open(node) && world.sentinels_on(node) < world.tolerated());
    if on.is_none() || on != world.crowded() || !room {
        return Err(format!("{member} is moved, and nothing is gained"));
    }
    check_others(world, Some(member))
}

fn check_replaced(world: &World, member: Member) -> Verdict {
    if let Member::Server(id) = member
        && world.acts(usize::from(id.index))
    {
        return Err(format!("{member}, the primary, is replaced without a handover"));
    }
    check_others(world, Some(member))
}

/// Everybody but `spared` is in place: nothing else is disrupted now.
fn check_others(world: &World, spared: Option<Member>) -> Verdict {
    let on_its_way = |pod: &Option<PodSim>| pod.is_none_or(|pod| pod.deleting.is_some());
    for (index, one) in world.servers.iter().enumerate().take(world.scale.0) {
        let primary = world.named();
        let in_place = world.acts(index) || primary.is_some_and(|primary| world.follows_in_step(index, primary));
        if Some(Member::Server(server(index))) != spared && (on_its_way(&one.pod) || !in_place) {
            return Err(format!("something is disrupted while server {index} is not in place"));
        }
    }
    for (index, one) in world.sentinels.iter().enumerate().take(world.scale.1) {
        let in_place = reaches_sentinel(world, index) && one.memory.is_some();
        if Some(Member::Sentinel(sentinel(index))) != spared && (on_its_way(&one.pod) || !in_place) {
            return Err(format!("something is disrupted while sentinel {index} is not in place"));
        }
    }
    Ok(())
}

fn see_pods(world: &World) -> std::collections::BTreeMap<Member, Pod> {
    let servers = world.servers.iter().enumerate().filter_map(|(index, one)| {
        let serves = world.acts(index) || world.link_up(index);
        Some((Member::Server(server(index)), see_pod(world, one.pod?, serves && reaches_server(world, index))))
    });
    let sentinels = world.sentinels.iter().enumerate().filter_map(|(index, one)| {
        Some((Member::Sentinel(sentinel(index)), see_pod(world, one.pod?, reaches_sentinel(world, index))))
    });
    servers.chain(sentinels).collect()
}

fn see_pod(world: &World, pod: PodSim, ready: bool) -> Pod {
    let node = super::super::Node { name: pod.node.to_string(), ready: world.nodes[pod.node] == Node::Up };
    Pod {
        uid: pod.uid.to_string(),
        revision: Some(revision(pod.made_of.revision)),
        node: Some(node),
        started: pod.started(),
        ready: ready && pod.deleting.is_none(),
        deleting: pod.deleting.is_some(),
    }
}

fn see_server(world: &World, index: usize) -> Server {
    Server { address: address(index), bus_port: 0, state: state_of(world, index) }
}

fn state_of(world: &World, index: usize) -> ServerState {
    let one = &world.servers[index];
    let Some(pod) = one.pod else { return ServerState::Absent };
    if !pod.started() || world.nodes[pod.node] != Node::Up {
        return ServerState::Silent;
    }
    if pod.made_of.image == Image::Crashing {
        return ServerState::Starting(data_state(&one.data));
    }
    match (one.process, one.held) {
        (Process::None, Some(reason)) => {
            ServerState::Held(Held { reason: reason.to_owned(), message: reason.to_owned(), data: data_state(&one.data) })
        }
        (Process::None | Process::Intending, _) => ServerState::Starting(data_state(&one.data)),
        (Process::Primary, _) => ServerState::Running(facts(&one.data, Role::Primary)),
        (Process::Replica { of, .. }, _) => {
            let link = if world.link_up(index) { Link::Up } else { Link::Down };
            ServerState::Running(facts(&one.data, Role::Replica { of: address(of), link }))
        }
    }
}

fn data_state(data: &Data) -> DataState {
    match (data.version, data.complete) {
        (0, _) => DataState::Empty,
        (_, false) => DataState::Partial,
        (offset, true) => {
            let lineage = data.lineage.to_string();
            DataState::Complete(Position { lineage, offset, led: data.led, exact: data.exact })
        }
    }
}

fn facts(data: &Data, role: Role) -> Facts {
    let lineage = (data.version > 0 && data.complete).then(|| data.lineage.to_string());
    let offset = if lineage.is_some() { data.version } else { 0 };
    let promotable = lineage.is_some() || matches!(role, Role::Primary | Role::Replica { link: Link::Up, .. });
    Facts { role, holds_data: data.version > 0, offset, lineage, promotable, cluster: None }
}

fn see_sentinel(world: &World, index: usize) -> Sentinel {
    if world.sentinels[index].pod.is_none() {
        return Sentinel::Stopped;
    }
    if !reaches_sentinel(world, index) {
        return Sentinel::Silent;
    }
    let watch = world.sentinels[index].memory.map(|memory| Watch {
        primary: address(memory.primary),
        replicas: memory.replicas.count_ones() as u16,
        sentinels: memory.peers.count_ones() as u16,
        quorum: memory.quorum,
        alarmed: memory.gone >= DOWN_TICKS,
    });
    Sentinel::Running { watch }
}
