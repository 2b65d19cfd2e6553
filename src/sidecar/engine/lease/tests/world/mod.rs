//! A simulated world: clients, pods with a desk each, a cache with a replica, a database, and a network that is slow anywhere.
//!
//! One history is one seed. Time is virtual; what can be late is late at random, in order per connection. See [`super::simulation`]
//! for what is asked of it.

mod checks;
mod clients;
mod connection;
mod pods;
mod server;

use std::cmp::Reverse;
use std::collections::{BTreeSet, BinaryHeap, VecDeque};

use super::super::model::{Condition, Set};
use super::super::*;
use super::Switch;
use super::cache::Cache;

/// What may happen in a history.
#[derive(Debug, Clone, Copy)]
pub(super) struct Config {
    pub(super) pods: u64,
    pub(super) keys: usize,
    pub(super) actors: usize,
    pub(super) operations: u32,
    pub(super) rule: Rule,
    /// Clients share connections: [`Sharing`] is drawn for each pod.
    pub(super) sharing: bool,
    /// Reads and fills alone; nobody is slow, and connections that close are the only trouble.
    pub(super) calm: bool,
    /// Of a thousand operations so many change the database.
    pub(super) writes: u32,
    /// No value lives longer, in milliseconds.
    pub(super) ttl: Millis,
    /// Of ten loads so many end without a SET.
    pub(super) unfilled: u8,
    pub(super) faults: bool,
    /// With faults, one history of so many has a failover.
    pub(super) failover_in: u8,
    /// With faults, connections to the cache break fewer times than this.
    pub(super) breaks: u32,
    pub(super) early: bool,
    /// Of reads that may ask for the lease early, one of so many does.
    pub(super) early_in: u8,
    /// Of fills, one of so many has a condition.
    pub(super) condition_in: u8,
    /// In pools loads may outlast their leases: see [`World::late_over`].
    pub(super) late: bool,
    pub(super) groups: bool,
    /// Who waits in another pod is woken.
    pub(super) signs: bool,
    /// Some clients' commands go to the cache over a connection beside the one for leases.
    pub(super) lanes: bool,
    /// All pods are pools, and SETs are long on their way to the cache.
    pub(super) crossed: bool,
    pub(super) broken: Option<Switch>,
    /// Print every step.
    pub(super) shown: bool,
}

/// How the clients of a pod use connections.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Sharing {
    /// Each actor has its own.
    Exclusive,
    /// Any free one for each command.
    Pool,
    /// One for all.
    Multiplexed,
}

/// A version of a key's value.
pub(super) type Version = u32;

#[derive(Debug, Clone, PartialEq, Eq)]
enum Cmd {
    Get(usize),
    Mget(Vec<usize>),
    /// `fill`: what was loaded, not what was written to the database.
    Set {
        key: usize,
        version: Version,
        condition: Condition,
        fill: bool,
    },
    Del(usize),
}

/// What goes to the cache.
#[derive(Debug, Clone)]
enum Req {
    Client { conn: usize, place: u32, cmd: Cmd, verdict: Verdict },
    Begin { key: usize, fresh: u64, mode: Mode, rule: Rule },
    Release { key: usize, token: Token },
}

/// What comes back.
#[derive(Debug, Clone)]
enum Rep {
    Values(Vec<Option<Version>>),
    Begun(Begun<Version>),
    Written(Written),
    Done,
    Failed,
}

/// What a client gets.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Got {
    Replies(Vec<Reply<Version>>),
    Done,
    Error,
}

#[derive(Debug)]
enum Event {
    Act(usize),
    Arrive {
        conn: usize,
        place: u32,
        cmd: Cmd,
    },
    Exec {
        pod: usize,
        epoch: u32,
        req: Req,
    },
    Back {
        pod: usize,
        epoch: u32,
        req: Req,
        rep: Rep,
    },
    Deliver {
        conn: usize,
        place: u32,
        actor: usize,
        got: Got,
    },
    Tick(usize),
    Wake(usize, usize),
    Close(usize),
    Evict,
    Sync,
    Failover,
    /// A pod's connection to the cache breaks.
    Break(usize),
    Topology(usize),
}

/// A command that a connection's client sent and that is not answered.
#[derive(Debug)]
struct Place {
    place: u32,
    actor: usize,
    cmd: Cmd,
    /// When it came to the sidecar.
    arrived: Millis,
    /// The oldest versions that it may read.
    floors: Vec<Version>,
    /// When something came behind it for which it must not wait.
    pressed: Option<Millis>,
    /// The cache has answered.
    answered: bool,
    /// When its miss was found.
    missed: Option<Millis>,
    /// What the cache said, with gaps.
    values: Vec<Option<Version>>,
    /// What it must not see: written behind it before its own answer was known.
    forbidden: Vec<Version>,
    /// When it was executed, where it is a write.
    executed: Option<Millis>,
    got: Option<Got>,
}

#[derive(Debug)]
struct Conn {
    pod: usize,
    open: bool,
    busy: bool,
    /// When a pool got it back.
    returned: Millis,
    shared: bool,
    next: u32,
    places: VecDeque<Place>,
    arrive_after: Millis,
    deliver_after: Millis,
    /// Reads and writes up to here have a place in the cache's history not before this.
    points: Vec<Millis>,
    /// Of which keys' misses its clients were told, and when, since they last set them.
    told: Vec<(usize, Millis)>,
    /// When it last sent a SET of each key.
    last_set: Vec<Millis>,
}

struct Pod {
    desk: Desk<Version>,
    sharing: Sharing,
    /// Its clients write to the database and SET; otherwise they DEL.
    sets: bool,
    conns: Vec<usize>,
    /// By lane: see [`Config::lanes`].
    exec_after: [Millis; 2],
    back_after: [Millis; 2],
    tick_at: Option<Millis>,
    link: u32,
    watched: BTreeSet<usize>,
    grants: u32,
    leads: u32,
    /// When SETs of each key were doubtful.
    doubts: Vec<Vec<Millis>>,
    /// When SETs of each key came over a connection of whose clients none had been told of its miss, or may have been put down to that
    /// of others.
    strays: Vec<Vec<Millis>>,
    /// When a lease was won that nobody leads yet, for each key.
    granted: Vec<Option<Millis>>,
    /// When a client was last told to load each key while the cache was away.
    led_alone: Vec<Option<Millis>>,
}

/// A load that a client owes.
#[derive(Debug, Clone, Copy)]
struct Load {
    key: usize,
    /// When the sidecar decided its nil.
    nil_at: Millis,
    /// It holds the lease.
    leads: bool,
    /// Over which connection it came.
    conn: usize,
    version: Option<Version>,
    /// Its SET has failed: until when it is sent again.
    repeat_by: Option<Millis>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Step {
    Idle,
    Reading,
    Loading,
    /// The second tells whether a SET is to be sent after the database was written.
    Writing(usize, Version, bool),
    Filling,
}

#[derive(Debug)]
struct Actor {
    pod: usize,
    conn: usize,
    left: u32,
    step: Step,
    loads: Vec<Load>,
    /// What it is storing.
    filling: Option<Load>,
    awaits: u32,
    /// What it stores, or stored last, was loaded under the lease.
    led: bool,
}

/// Counts of one history, so that a test sees that its subject happened at all.
#[derive(Debug, Default, Clone, Copy)]
pub(super) struct Counts {
    pub(super) leads: u64,
    pub(super) values: u64,
    pub(super) stale: u64,
    pub(super) waited: u64,
    pub(super) timed_out: u64,
    pub(super) passed: u64,
    pub(super) unparked: u64,
    pub(super) cut_short: u64,
    pub(super) shared: u64,
    pub(super) local: u64,
    pub(super) stored: u64,
    pub(super) removed: u64,
    pub(super) updates: u64,
    pub(super) early: u64,
    pub(super) failovers: u64,
    pub(super) late: u64,
    pub(super) orphaned: u64,
    /// Of those, over connections of pools that had been lent to somebody who was told of the same miss.
    pub(super) lent: u64,
    pub(super) fills: u64,
    /// Fills that were as new as any, and were removed.
    pub(super) spoiled: u64,
    pub(super) repeated: u64,
}

impl Counts {
    pub(super) fn add(&mut self, other: &Self) {
        let Self { leads, values, stale, waited, timed_out, passed, unparked, shared, local, stored, removed, updates, .. } =
            other;
        self.leads += leads;
        self.values += values;
        self.stale += stale;
        self.waited += waited;
        self.timed_out += timed_out;
        self.passed += passed;
        self.unparked += unparked;
        self.shared += shared;
        self.local += local;
        self.stored += stored;
        self.removed += removed;
        self.updates += updates;
        self.cut_short += other.cut_short;
        self.early += other.early;
        self.failovers += other.failovers;
        self.late += other.late;
        self.orphaned += other.orphaned;
        self.lent += other.lent;
        self.fills += other.fills;
        self.spoiled += other.spoiled;
        self.repeated += other.repeated;
    }
}

pub(super) struct World {
    config: Config,
    pub(super) now: Millis,
    random: fastrand::Rng,
    queue: BinaryHeap<Reverse<(Millis, u32)>>,
    events: Vec<Option<Event>>,
    cache: Cache,
    database: Vec<Version>,
    /// An update by SET is under way.
    locks: Vec<bool>,
    pods: Vec<Pod>,
    conns: Vec<Conn>,
    actors: Vec<Actor>,
    pub(super) counts: Counts,
    pub(super) failure: Option<String>,
    /// A rule has disarmed itself.
    excused: bool,
}

/// Where nobody is slow, BEGINs are answered within this.
const MOST_DELAY_MS: Millis = 30;

const NAMES: [&[u8]; 4] = [b"a", b"b", b"c", b"d"];

fn key_of(name: &[u8]) -> usize {
    usize::from(name[0] - b'a')
}

/// Runs one history.
pub(super) fn run(config: Config, seed: u64) -> (Counts, Result<(), String>) {
    let mut world = World::new(config, seed);
    world.play();
    let failure = world.failure.take();
    (world.counts, failure.map_or(Ok(()), Err))
}

impl World {
    fn new(config: Config, seed: u64) -> Self {
        let mut random = fastrand::Rng::with_seed(seed);
        let (mut pods, mut conns, mut actors) = (Vec::new(), Vec::<Conn>::new(), Vec::new());
        for pod in 0..config.pods {
            let sharing = match random.u8(..3) {
                _ if config.crossed => Sharing::Pool,
                1 if config.sharing => Sharing::Pool,
                2 if config.sharing => Sharing::Multiplexed,
                _ => Sharing::Exclusive,
            };
            let mut desk = Desk::new(seed.wrapping_mul(31) + pod);
            desk.broken = config.broken;
            pods.push(Pod {
                desk,
                sharing,
                sets: sharing == Sharing::Exclusive && random.bool(),
                conns: Vec::new(),
                exec_after: [0; 2],
                back_after: [0; 2],
                tick_at: None,
                link: 0,
                watched: BTreeSet::new(),
                grants: 0,
                leads: 0,
                doubts: vec![Vec::new(); config.keys],
                strays: vec![Vec::new(); config.keys],
                granted: vec![None; config.keys],
                led_alone: vec![None; config.keys],
            });
        }
        for actor in 0..config.actors {
            let pod = actor % pods.len();
            let own = pods[pod].sharing != Sharing::Multiplexed || pods[pod].conns.is_empty();
            let conn = if own { conns.len() } else { pods[pod].conns[0] };
            if own {
                conns.push(Conn::new(pod, config.keys));
                pods[pod].conns.push(conn);
            }
            let left = random.u32(1..=config.operations);
            let (step, loads, filling) = (Step::Idle, Vec::new(), None);
            actors.push(Actor { pod, conn, left, step, loads, filling, awaits: 0, led: false });
        }
        let mut world = Self {
            config,
            now: 1_000,
            random,
            queue: BinaryHeap::new(),
            events: Vec::new(),
            cache: Cache::new(config.keys, config.broken),
            database: vec![1; config.keys],
            locks: vec![false; config.keys],
            pods,
            conns,
            actors,
            counts: Counts::default(),
            failure: None,
            excused: false,
        };
        world.plan_all();
        world
    }

    /// What befalls the world of itself.
    fn plan_all(&mut self) {
        for actor in 0..self.actors.len() {
            let pause = self.random.u64(..30);
            self.at(pause, Event::Act(actor));
        }
        if self.config.faults {
            for _ in 0..self.random.u32(..6) {
                let at = self.random.u64(..2_000);
                self.at(at, Event::Evict);
            }
            for _ in 0..self.random.u32(..12) {
                let at = self.random.u64(..1_500);
                self.at(at, Event::Sync);
            }
            if self.random.u8(..self.config.failover_in) == 0 {
                let at = self.random.u64(..500);
                self.at(at, Event::Failover);
            }
            for _ in 0..self.random.u32(..self.config.breaks) {
                let (at, pod) = (self.random.u64(..1_500), self.random.usize(..self.pods.len()));
                self.at(at, Event::Break(pod));
            }
        }
        if self.config.faults || self.config.calm {
            for _ in 0..self.random.u32(..3) {
                let at = self.random.u64(..if self.config.calm { 60 } else { 1_000 });
                let conn = self.random.usize(..self.conns.len());
                self.at(at, Event::Close(conn));
            }
        }
    }

    fn at(&mut self, delay: Millis, event: Event) {
        self.at_time(self.now + delay, event);
    }

    fn at_time(&mut self, at: Millis, event: Event) {
        self.queue.push(Reverse((at, self.events.len() as u32)));
        self.events.push(Some(event));
    }

    /// How long a step takes: mostly little, now and then very long.
    fn delay(&mut self) -> Millis {
        let lease = self.config.rule.lease;
        match self.random.u8(..32) {
            _ if self.config.calm => self.random.u64(..3),
            0 => self.random.u64(..lease / 4),
            1..4 => self.random.u64(..20),
            _ => self.random.u64(..3),
        }
    }

    fn play(&mut self) {
        let mut steps = 0;
        while let Some(Reverse((at, event))) = self.queue.pop() {
            self.now = at;
            if let Some(event) = self.events[event as usize].take() {
                self.step(event);
            }
            steps += 1;
            if steps > 2_000_000 {
                self.fail(|| "it does not end".to_owned());
            }
            if self.failure.is_some() || self.excused {
                return;
            }
        }
        self.at_the_end();
    }

    fn step(&mut self, event: Event) {
        if self.config.shown && !matches!(event, Event::Tick(_)) {
            println!("{} {event:?}", self.now);
        }
        match event {
            Event::Act(actor) => self.act(actor),
            Event::Arrive { conn, place, cmd } => self.arrive(conn, place, cmd),
            Event::Exec { pod, epoch, req } => self.execute(pod, epoch, req),
            Event::Back { pod, epoch, req, rep } => {
                let rep = if epoch == self.epoch(pod) { rep } else { Rep::Failed };
                self.come_back(pod, req, rep);
            }
            Event::Deliver { conn, place, actor, got } => self.deliver(conn, place, actor, got),
            Event::Tick(pod) => {
                self.pods[pod].tick_at = None;
                self.with_desk(pod, |desk, now, effects| desk.tick(now, effects));
            }
            Event::Wake(pod, key) => self.with_desk(pod, |desk, now, effects| desk.wake(now, 0, NAMES[key], effects)),
            Event::Close(conn) => self.close(conn),
            Event::Evict => {
                let (key, which) = (self.random.usize(..self.config.keys), self.random.u8(..3));
                self.cache.evict(self.now, key, which);
            }
            Event::Sync => self.cache.synchronise(self.now),
            Event::Failover => {
                self.counts.failovers += 1;
                self.cache.fail_over(self.now, self.random.u64(..30));
                for pod in 0..self.pods.len() {
                    let delay = self.random.u64(..30);
                    self.at(delay, Event::Topology(pod));
                }
            }
            Event::Break(pod) => self.pods[pod].link += 1,
            Event::Topology(pod) => {
                self.pods[pod].led_alone.fill(None);
                self.with_desk(pod, |desk, now, effects| desk.topology_changed(now, effects));
            }
        }
    }

    /// Nobody is slow and nothing changes: so nobody waits in vain. But for a lease whose holder's SET was refused over a connection
    /// with an unfilled miss of its own: it stands until its end, though nobody loads.
    fn is_quiet(&self) -> bool {
        self.config.calm && self.config.writes == 0 && self.config.unfilled == 0 && self.counts.orphaned == 0
    }

    fn breaks(&self, switch: Switch) -> bool {
        self.config.broken == Some(switch)
    }

    /// What is under way on a pod's connection to the cache fails when this changes.
    fn epoch(&self, pod: usize) -> u32 {
        self.cache.epoch * 1_000 + self.pods[pod].link
    }

    fn fail(&mut self, text: impl FnOnce() -> String) {
        if self.failure.is_none() {
            self.failure = Some(format!("at {}: {}", self.now, text()));
        }
    }
}
