//! The state of a modelled cluster: nodes, pods, processes, data; and what fails.

use super::super::Desired;
use super::super::{Layout, SentinelId, ServerId};
use fastrand::Rng;

/// A replica has a whole copy after this many ticks.
pub(super) const SYNC_TICKS: u32 = 2;
/// A pod's containers start after this many ticks, and it is gone this many after its deletion.
const START_TICKS: u32 = 2;
const GRACE_TICKS: u32 = 2;
/// A sentinel that has forgotten all knows everybody again after fewer ticks.
const REDISCOVERY_TICKS: u32 = 21;
pub(super) const NODES: usize = 4;

/// What went against an invariant.
pub(super) type Verdict = Result<(), String>;

#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Node {
    Up,
    /// Its processes stand still, for so many ticks.
    Frozen(u32),
    /// Nobody else reaches it, for so many ticks.
    Cut(u32),
}

#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Image {
    Good,
    /// It cannot be pulled.
    Missing,
    /// Its server ends at once.
    Crashing,
}

/// What pods are made of.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Template {
    pub(super) revision: u32,
    pub(super) image: Image,
}

#[derive(Debug, Clone, Copy)]
pub(super) struct PodSim {
    pub(super) uid: u64,
    pub(super) made_of: Template,
    pub(super) node: usize,
    age: u32,
    pub(super) deleting: Option<u32>,
}

impl PodSim {
    pub(super) fn started(&self) -> bool {
        self.age >= START_TICKS && self.made_of.image != Image::Missing
    }

    /// Whether its process can run.
    fn works(&self) -> bool {
        self.started() && self.made_of.image == Image::Good
    }
}

/// A copy of the data: a number of writes; 0 is empty.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub(super) struct Data {
    pub(super) version: u64,
    pub(super) lineage: u32,
    pub(super) complete: bool,
    pub(super) led: bool,
    pub(super) exact: bool,
}

#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Process {
    None,
    /// Its agent is about to start it as primary, and says so.
    Intending,
    Primary,
    Replica {
        of: usize,
        synced_for: u32,
        promotable: bool,
    },
}

#[derive(Debug, Clone)]
pub(super) struct ServerSim {
    pub(super) pod: Option<PodSim>,
    pub(super) process: Process,
    pub(super) data: Data,
    pub(super) held: Option<&'static str>,
    /// For so many ticks its process ends as soon as it starts.
    pub(super) crashes: u32,
}

/// A place that nobody has taken yet.
const EMPTY_PLACE: ServerSim = ServerSim {
    pod: None,
    process: Process::None,
    data: Data { version: 0, lineage: 0, complete: false, led: false, exact: false },
    held: None,
    crashes: 0,
};

/// What a sentinel remembers; sets are bits by index.
#[derive(Debug, Clone, Copy)]
pub(super) struct Memory {
    pub(super) primary: usize,
    pub(super) epoch: u32,
    pub(super) quorum: u16,
    pub(super) replicas: u8,
    pub(super) peers: u8,
    pub(super) gone: u32,
}

#[derive(Debug, Clone)]
pub(super) struct SentinelSim {
    pub(super) pod: Option<PodSim>,
    pub(super) memory: Option<Memory>,
    away: u32,
    /// For so many ticks it finds nobody, after it has forgotten all.
    pub(super) finds_nobody: u32,
}

/// A place of a sentinel that nobody has taken yet.
const NO_SENTINEL: SentinelSim = SentinelSim { pod: None, memory: None, away: 0, finds_nobody: 0 };

#[derive(Debug, Clone, Copy)]
pub(super) enum Fault {
    KillServer(usize),
    /// Its process ends, and again each time that it is started.
    Crash(usize, u32),
    /// Gracefully, as a drain does.
    DeletePod(usize),
    KillPod(usize),
    KillAllPods,
    DeleteSentinel(usize),
    KillSentinel(usize, u32),
    LoseMemory,
    Freeze(usize, u32),
    Cut(usize, u32),
    LoseNode(usize),
    /// Nothing is scheduled there any more, for so many ticks, and what runs there is to go.
    Drain(usize, u32),
    OperatorAway(u32),
    Roll(Image),
    RollSentinels,
    Replicas(u16),
    Sentinels(u16),
    Pause,
    Unpause,
    Nothing,
}

pub(super) struct World {
    pub(super) rng: Rng,
    pub(super) desired: Desired,
    pub(super) scale: (usize, usize),
    pub(super) template: Template,
    pub(super) sentinel_template: Template,
    pub(super) nodes: [Node; NODES],
    /// For how many ticks nothing is scheduled on each.
    cordoned: [u32; NODES],
    /// Whether the scheduler always places pods as well as it can.
    schedules_well: bool,
    pub(super) servers: Vec<ServerSim>,
    pub(super) sentinels: Vec<SentinelSim>,
    /// The writes that were acknowledged and that no fault has destroyed.
    pub(super) truth: u64,
    pub(super) lineages: u32,
    pub(super) epoch: u32,
    uids: u64,
    pub(super) operator_away: u32,
    /// What went wrong inside something that cannot return it.
    pub(super) broken: Option<String>,
}

impl World {
    pub(super) fn new(seed: u64, desired: Desired) -> Self {
        let Layout::Sentinel { sentinels } = desired.layout else { unreachable!("under Sentinel alone") };
        let template = Template { revision: 1, image: Image::Good };
        let scale = (usize::from(desired.replicas) + 1, usize::from(sentinels));
        Self {
            rng: Rng::with_seed(seed),
            desired,
            scale,
            template,
            sentinel_template: template,
            nodes: [Node::Up; NODES],
            cordoned: [0; NODES],
            schedules_well: false,
            servers: vec![EMPTY_PLACE; scale.0],
            sentinels: vec![NO_SENTINEL; scale.1],
            truth: 0,
            lineages: 0,
            epoch: 0,
            uids: 0,
            operator_away: 0,
            broken: None,
        }
    }

    /// The best copy that anybody holds, and will hold when what is under way is done.
    pub(super) fn held(&self) -> u64 {
        let stays = |server: &&ServerSim| self.desired.durable || server.pod.is_some_and(|pod| pod.deleting.is_none());
        let copies = self.servers.iter().filter(stays).filter(|server| server.data.complete);
        copies.map(|server| server.data.version).max().unwrap_or(0)
    }

    /// Whether what runs on one node reaches what runs on the other.
    pub(super) fn reach(&self, a: usize, b: usize) -> bool {
        let (at, bt) = (self.nodes[a], self.nodes[b]);
        let frozen = |node| matches!(node, Node::Frozen(_));
        !frozen(at) && !frozen(bt) && (a == b || (at == Node::Up && bt == Node::Up))
    }

    fn thawed(&self, pod: &PodSim) -> bool {
        !matches!(self.nodes[pod.node], Node::Frozen(_))
    }

    /// The node of a server whose agent works.
    pub(super) fn agent_node(&self, index: usize) -> Option<usize> {
        let pod = self.servers.get(index)?.pod.filter(|pod| pod.started() && self.thawed(pod))?;
        Some(pod.node)
    }

    /// The node of a server whose process serves.
    pub(super) fn serving_node(&self, index: usize) -> Option<usize> {
        let server = self.servers.get(index)?;
        let pod = server.pod.filter(|pod| pod.works() && self.thawed(pod))?;
        matches!(server.process, Process::Primary | Process::Replica { .. }).then_some(pod.node)
    }

    pub(super) fn acts(&self, index: usize) -> bool {
        self.serving_node(index).is_some() && self.servers[index].process == Process::Primary
    }

    /// The node of a sentinel that works.
    pub(super) fn sentinel_node(&self, index: usize) -> Option<usize> {
        let sentinel = self.sentinels.get(index)?;
        let pod = sentinel.pod.filter(|pod| pod.works() && self.thawed(pod) && sentinel.away == 0)?;
        Some(pod.node)
    }

    pub(super) fn can_run(&self, index: usize) -> bool {
        let server = &self.servers[index];
        server.crashes == 0 && server.pod.is_some_and(|pod| pod.works() && self.thawed(&pod) && pod.deleting.is_none())
    }

    /// Whether a replica's link is up.
    pub(super) fn link_up(&self, index: usize) -> bool {
        matches!(self.servers[index].process, Process::Replica { synced_for, .. } if synced_for >= SYNC_TICKS)
    }

    /// The primary that a majority of all sentinels names, asked from nodes that are up.
    pub(super) fn named(&self) -> Option<usize> {
        let up =
            (0..self.sentinels.len()).filter(|index| self.sentinel_node(*index).is_some_and(|node| self.nodes[node] == Node::Up));
        let named: Vec<usize> = up.filter_map(|index| self.sentinels[index].memory.map(|memory| memory.primary)).collect();
        let majority = self.sentinels.len() / 2 + 1;
        named.iter().copied().find(|primary| named.iter().filter(|other| *other == primary).count() >= majority)
    }

    /// The process ends; `clean`: after having written all that it had.
    pub(super) fn end_process(&mut self, index: usize, clean: bool) {
        let durable = self.desired.durable;
        let server = &mut self.servers[index];
        let ran = matches!(server.process, Process::Primary | Process::Replica { .. });
        server.process = Process::None;
        server.held = None;
        if ran {
            server.data.exact = clean;
        }
        if !durable {
            server.data = Data::default();
        }
    }

    fn end_pod(&mut self, index: usize, clean: bool) {
        self.end_process(index, clean);
        self.servers[index].pod = None;
    }

    fn end_sentinel_pod(&mut self, index: usize) {
        let durable = self.desired.durable;
        let sentinel = &mut self.sentinels[index];
        (sentinel.pod, sentinel.away) = (None, 0);
        if !durable {
            sentinel.memory = None;
        }
    }

    pub(super) fn new_lineage(&mut self, index: usize) {
        self.lineages += 1;
        let data = &mut self.servers[index].data;
        if data.version > 0 {
            *data = Data { lineage: self.lineages, complete: true, led: true, exact: true, ..*data };
        }
    }

    pub(super) fn fail(&mut self, fault: Fault) {
        let (servers, sentinels) = (self.servers.len(), self.sentinels.len());
        match fault {
            Fault::KillServer(index) if self.serving_node(index % servers).is_some() => self.end_process(index % servers, false),
            Fault::Crash(index, ticks) => {
                self.end_process(index % servers, false);
                self.servers[index % servers].crashes = ticks;
            }
            Fault::DeletePod(index) => self.delete_pod(index % servers),
            Fault::KillPod(index) => self.end_pod(index % servers, false),
            Fault::KillAllPods => (0..servers).for_each(|index| self.end_pod(index, false)),
            Fault::DeleteSentinel(index) => self.delete_sentinel_pod(index % sentinels),
            Fault::KillSentinel(index, ticks) => self.sentinels[index % sentinels].away = ticks,
            Fault::LoseMemory => self.sentinels.iter_mut().for_each(|sentinel| sentinel.memory = None),
            Fault::Freeze(node, ticks) => self.nodes[node % NODES] = Node::Frozen(ticks),
            Fault::Cut(node, ticks) => self.nodes[node % NODES] = Node::Cut(ticks),
            Fault::LoseNode(node) => self.lose_node(node % NODES),
            Fault::Drain(node, ticks) => self.drain(node % NODES, ticks),
            Fault::OperatorAway(ticks) => self.operator_away = ticks,
            Fault::Roll(image) => self.template = Template { revision: self.template.revision + 1, image },
            Fault::RollSentinels => self.sentinel_template.revision += 1,
            Fault::Replicas(count) => self.desired.replicas = count,
            Fault::Sentinels(sentinels) => self.desired.layout = Layout::Sentinel { sentinels },
            Fault::Pause => self.desired.paused = true,
            Fault::Unpause => self.desired.paused = false,
            Fault::KillServer(_) | Fault::Nothing => {}
        }
        self.grow();
        self.truth = self.truth.min(self.held());
    }

    /// There is a place for each member that is desired or exists.
    fn grow(&mut self) {
        let wanted = usize::from(self.desired.replicas) + 1;
        while self.servers.len() < wanted {
            self.servers.push(EMPTY_PLACE);
        }
        while self.sentinels.len() < self.desired.sentinels().count() {
            self.sentinels.push(NO_SENTINEL);
        }
    }

    /// A sentinel forgets all that it knows but the primary, and finds others again within a while.
    pub(super) fn forget_peers(&mut self, index: usize) {
        self.sentinels[index].finds_nobody = self.rng.u32(0..REDISCOVERY_TICKS);
        self.sentinels[index].memory.iter_mut().for_each(|memory| (memory.replicas, memory.peers) = (0, 0));
    }

    fn lose_node(&mut self, node: usize) {
        let on = |pod: &Option<PodSim>| pod.is_some_and(|pod| pod.node == node);
        for index in 0..self.servers.len() {
            if on(&self.servers[index].pod) {
                self.end_pod(index, false);
            }
        }
        for index in 0..self.sentinels.len() {
            if on(&self.sentinels[index].pod) {
                self.end_sentinel_pod(index);
            }
        }
        self.nodes[node] = Node::Up;
    }

    fn drain(&mut self, node: usize, ticks: u32) {
        self.cordoned[node] = ticks;
        let on = |pod: &Option<PodSim>| pod.is_some_and(|pod| pod.node == node);
        for index in 0..self.servers.len() {
            if on(&self.servers[index].pod) {
                self.delete_pod(index);
            }
        }
        for index in 0..self.sentinels.len() {
            if on(&self.sentinels[index].pod) {
                self.delete_sentinel_pod(index);
            }
        }
    }

    /// Whether something can be scheduled on a node.
    pub(super) fn is_open(&self, node: usize) -> bool {
        self.nodes[node] == Node::Up && self.cordoned[node] == 0
    }

    /// How many sentinels a node carries.
    pub(super) fn sentinels_on(&self, node: usize) -> usize {
        self.sentinels.iter().filter(|sentinel| sentinel.pod.is_some_and(|pod| pod.node == node)).count()
    }

    fn servers_on(&self, node: usize) -> usize {
        self.servers.iter().filter(|server| server.pod.is_some_and(|pod| pod.node == node)).count()
    }

    /// How many sentinels the others can do without.
    pub(super) fn tolerated(&self) -> usize {
        self.sentinels.len() - (self.sentinels.len() / 2 + 1)
    }

    /// The node without which the other sentinels are no majority.
    pub(super) fn crowded(&self) -> Option<usize> {
        (0..NODES).find(|node| self.sentinels_on(*node) > self.tolerated())
    }

    /// How many sentinels the node carries that carries most.
    pub(super) fn fullest(&self) -> usize {
        (0..NODES).map(|node| self.sentinels_on(node)).max().unwrap_or_default()
    }

    /// Where a pod goes: mostly, and always once faults have ended, where the fewest of its kind are.
    fn schedule(&mut self, place: usize, kind: Kind) -> Option<usize> {
        let open: Vec<usize> = (0..NODES).map(|turn| (place + turn) % NODES).filter(|node| self.is_open(*node)).collect();
        if !self.schedules_well && self.rng.u32(0..4) == 0 {
            return (!open.is_empty()).then(|| open[self.rng.usize(0..open.len())]);
        }
        open.into_iter().min_by_key(|node| match kind {
            Kind::Server => self.servers_on(*node),
            Kind::Sentinel => self.sentinels_on(*node),
        })
    }

    /// A graceful deletion: a primary hands over first, where it can.
    pub(super) fn delete_pod(&mut self, index: usize) {
        let Some(pod) = &mut self.servers[index].pod else { return };
        if pod.deleting.is_some() {
            return;
        }
        pod.deleting = Some(GRACE_TICKS);
        if self.acts(index) && self.rng.u32(0..10) < 8 {
            let to = (0..self.servers.len()).find(|other| self.follows_in_step(*other, index));
            to.into_iter().for_each(|to| {
                self.hand_over(index, to);
            });
        }
    }

    pub(super) fn delete_sentinel_pod(&mut self, index: usize) {
        if let Some(pod) = &mut self.sentinels[index].pod {
            pod.deleting = pod.deleting.or(Some(GRACE_TICKS));
        }
    }

    pub(super) fn follows_in_step(&self, index: usize, primary: usize) -> bool {
        let follows = matches!(self.servers[index].process, Process::Replica { of, .. } if of == primary);
        follows && self.link_up(index) && self.serving_node(index).is_some()
    }

    /// One tick of nodes and pods.
    pub(super) fn step_pods(&mut self) {
        for node in &mut self.nodes {
            *node = match *node {
                Node::Frozen(0) | Node::Cut(0) | Node::Up => Node::Up,
                Node::Frozen(ticks) => Node::Frozen(ticks - 1),
                Node::Cut(ticks) => Node::Cut(ticks - 1),
            };
        }
        self.cordoned.iter_mut().for_each(|ticks| *ticks = ticks.saturating_sub(1));
        for index in 0..self.servers.len() {
            self.servers[index].crashes = self.servers[index].crashes.saturating_sub(1);
            if index >= self.scale.0 {
                self.delete_pod(index);
            }
            let due = self.age_pod(self.servers[index].pod, index < self.scale.0, (index, Kind::Server), self.template);
            match due {
                Aged::Pod(pod) => self.servers[index].pod = pod,
                Aged::Ended => self.end_pod(index, true),
            }
        }
        for index in 0..self.sentinels.len() {
            if index >= self.scale.1 {
                self.delete_sentinel_pod(index);
            }
            self.sentinels[index].away = self.sentinels[index].away.saturating_sub(1);
            self.sentinels[index].finds_nobody = self.sentinels[index].finds_nobody.saturating_sub(1);
            let place = (index + 1, Kind::Sentinel);
            match self.age_pod(self.sentinels[index].pod, index < self.scale.1, place, self.sentinel_template) {
                Aged::Pod(pod) => self.sentinels[index].pod = pod,
                Aged::Ended => self.end_sentinel_pod(index),
            }
        }
        self.shrink();
    }

    /// Places that nobody needs any more go, with what they held; as far as it matters, others hold it.
    fn shrink(&mut self) {
        let servers = self.scale.0.max(usize::from(self.desired.replicas) + 1);
        while self.servers.len() > servers && self.servers.last().is_some_and(|server| server.pod.is_none()) {
            self.servers.pop();
            self.truth = self.truth.min(self.held());
        }
        let sentinels = self.scale.1.max(self.desired.sentinels().count());
        while self.sentinels.len() > sentinels && self.sentinels.last().is_some_and(|sentinel| sentinel.pod.is_none()) {
            self.sentinels.pop();
        }
    }

    fn age_pod(&mut self, pod: Option<PodSim>, wanted: bool, (place, kind): (usize, Kind), made_of: Template) -> Aged {
        let Some(mut pod) = pod else {
            let Some(node) = wanted.then(|| self.schedule(place, kind)).flatten() else { return Aged::Pod(None) };
            self.uids += 1;
            return Aged::Pod(Some(PodSim { uid: self.uids, made_of, node, age: 0, deleting: None }));
        };
        if self.nodes[pod.node] != Node::Up {
            return Aged::Pod(Some(pod));
        }
        pod.age += 1;
        match pod.deleting {
            Some(0) => Aged::Ended,
            Some(ticks) => {
                pod.deleting = Some(ticks - 1);
                Aged::Pod(Some(pod))
            }
            None => Aged::Pod(Some(pod)),
        }
    }

    /// Everybody's fault ends.
    pub(super) fn heal_faults(&mut self) {
        self.nodes = [Node::Up; NODES];
        self.cordoned = [0; NODES];
        self.schedules_well = true;
        self.operator_away = 0;
        self.desired.paused = false;
        if self.template.image != Image::Good {
            self.template = Template { revision: self.template.revision + 1, image: Image::Good };
        }
    }
}

/// What a pod is for.
#[derive(Debug, Clone, Copy)]
enum Kind {
    Server,
    Sentinel,
}

enum Aged {
    Pod(Option<PodSim>),
    Ended,
}

pub(super) fn server(index: usize) -> ServerId {
    ServerId { shard: 0, index: index as u16 }
}

pub(super) fn sentinel(index: usize) -> SentinelId {
    SentinelId(index as u16)
}
