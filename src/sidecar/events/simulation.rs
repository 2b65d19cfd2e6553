//! Walks among loads, expiries, and slots that move: no value from before an event outlives the walk that the event wanted.
//!
//! The model of a shard has what SCAN promises and no more: names lie in buckets, a page is what a bucket holds at that moment, and what
//! is there from a pass's beginning to its end is met. Loads hold leases, and are stored under them alone, as the cache's scripts do it.
//! Each of the switches breaks one mechanism, and is caught.

use std::collections::BTreeMap;
use std::hash::BuildHasher as _;
use std::sync::Arc;

use rustc_hash::FxBuildHasher;

use super::jobs::{Jobs, Pass, Progress, Shard, Target};
use super::position::EntryId;
use crate::origin::Origins;
use crate::policy::Snapshot;
use crate::sidecar::policy::ActivePolicy;
use crate::sidecar::slots::Companion;

const KEYS: usize = 5;
const BUCKETS: u64 = 3;
const STEPS: usize = 300;
const HISTORIES: u64 = 2_000;

/// What is left out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Switch {
    Nothing,
    /// Leases stay.
    Leases,
    /// One pass meets leases and values alike.
    SecondPass,
    /// The walk goes on though a slot has moved.
    Restart,
    /// What is wanted while a walk is under way counts as done with it.
    NextWalk,
    /// A walk for tags finds no key.
    Tags,
}

/// A load: its key, the lease that it holds, and what it has read.
struct Load {
    key: usize,
    lease: u64,
    version: u64,
}

struct World {
    random: fastrand::Rng,
    switch: Switch,
    policy: ActivePolicy,
    /// What each shard holds: names, with a value's version or a lease's number.
    shards: [BTreeMap<Vec<u8>, u64>; 2],
    /// Where each key lives.
    home: [usize; KEYS],
    moves: u64,
    origin: [u64; KEYS],
    /// How soon loads end: the share of the steps.
    pace: u64,
    leases: u64,
    loads: Vec<Load>,
    jobs: Jobs,
    events: u64,
    /// What each event that was not fulfilled yet demands.
    demands: BTreeMap<EntryId, (Target, [u64; KEYS])>,
    /// What is demanded of the cache from now on.
    least: [u64; KEYS],
    /// Where the walk is: the pages that are left of each shard, and the layout that it began with.
    pages: Vec<(usize, u64)>,
    layout: u64,
}

fn key(index: usize) -> Vec<u8> {
    format!("user:{}:{index}", group(index)).into_bytes()
}

/// What a key's tag says.
fn group(index: usize) -> usize {
    index % 2
}

fn policy() -> ActivePolicy {
    let snapshot = r#"{"version":6,"requires":6,"generation":1,
        "cluster":{"name":"main","topology":{"cluster":{"seeds":["127.0.0.1:7000"]}}},"unmatched":{"bypass":{}},
        "rules":[{"name":"user","keys":"user:{group}:{id}","tags":["group:{group}"],"strategy":{"cacheAside":{"ttl":{"default":"1h","max":"2h","jitter":"0%"},
            "stampede":{"lease":"10s","wait":"1s","atWaitEnd":"error"}}}}]}"#;
    let snapshot = Snapshot::parse(snapshot.as_bytes()).expect("a snapshot");
    let origins = Origins::new(&snapshot.origins).expect("no origins");
    ActivePolicy::new(Arc::new(snapshot), &origins).expect("a policy")
}

impl World {
    fn new(seed: u64, switch: Switch) -> Self {
        Self {
            random: fastrand::Rng::with_seed(seed),
            switch,
            policy: policy(),
            shards: [BTreeMap::new(), BTreeMap::new()],
            home: std::array::from_fn(|index| index % 2),
            moves: 0,
            origin: [1; KEYS],
            pace: 20 + seed % 200,
            leases: 0,
            loads: Vec::new(),
            jobs: Jobs::default(),
            events: 0,
            demands: BTreeMap::new(),
            least: [0; KEYS],
            pages: Vec::new(),
            layout: 0,
        }
    }

    fn step(&mut self) -> Result<(), String> {
        let index = self.random.usize(..KEYS);
        match self.random.u64(..1000) {
            0..200 => self.begin_load(index),
            200..220 => self.expire(index, &key(index)),
            220..230 => self.expire(index, &Companion::Lease.name(&key(index))),
            230..235 => self.move_slot(index),
            235..275 => self.change(index),
            // Some loads outlast walks.
            ending if ending < 275 + self.pace => self.end_load(),
            _ => self.walk(),
        }
        self.check()
    }

    fn expire(&mut self, index: usize, name: &[u8]) {
        self.shards[self.home[index]].remove(name);
    }

    /// A miss whose client is told to load, and reads the origin.
    fn begin_load(&mut self, index: usize) {
        let shard = &mut self.shards[self.home[index]];
        let name = Companion::Lease.name(&key(index));
        if shard.contains_key(&key(index)) || shard.contains_key(&name) {
            return;
        }
        self.leases += 1;
        shard.insert(name, self.leases);
        self.loads.push(Load { key: index, lease: self.leases, version: self.origin[index] });
    }

    /// A load's value arrives: it is stored under its lease, or not at all.
    fn end_load(&mut self) {
        if self.loads.is_empty() {
            return;
        }
        let Load { key: index, lease, version } = self.loads.swap_remove(self.random.usize(..self.loads.len()));
        let shard = &mut self.shards[self.home[index]];
        let name = Companion::Lease.name(&key(index));
        if shard.get(&name) == Some(&lease) {
            shard.remove(&name);
            shard.insert(key(index), version);
        }
    }

    /// The origin changes, and somebody says so, by the name of the rule or of a tag.
    fn change(&mut self, index: usize) {
        self.origin[index] += 1;
        self.events += 1;
        let event = EntryId::new(self.events, 0);
        let (target, about) = if self.random.bool() {
            (Target::Rule("user".to_owned()), self.origin)
        } else {
            let is_about = |key| u64::from(group(key) == group(index));
            (Target::Tag(format!("group:{}", group(index))), std::array::from_fn(|key| is_about(key) * self.origin[key]))
        };
        match self.jobs.current.as_mut().filter(|_| self.switch == Switch::NextWalk) {
            Some(walk) => walk.wishes.iter_mut().for_each(|wish| wish.to = event),
            None => self.jobs.wish(target.clone(), event),
        }
        self.demands.insert(event, (target, about));
    }

    fn move_slot(&mut self, index: usize) {
        let (from, to) = (self.home[index], 1 - self.home[index]);
        for name in [key(index), Companion::Lease.name(&key(index))] {
            if let Some(value) = self.shards[from].remove(&name) {
                self.shards[to].insert(name, value);
            }
        }
        self.home[index] = to;
        self.moves += 1;
    }

    /// One step of the walk, as the walker makes them.
    fn walk(&mut self) {
        if !self.jobs.begin() {
            return;
        }
        let Some(walk) = self.jobs.current.as_mut() else { return };
        if walk.shards.is_empty() {
            walk.start_over(layout(), 0);
            (self.pages, self.layout) = (pages(&mut self.random), self.moves);
            return;
        }
        let Some((shard, bucket)) = self.pages.pop() else { return self.end_pass() };
        let held: Vec<Vec<u8>> = self.shards[shard].keys().filter(|name| bucket_of(name) == bucket).cloned().collect();
        let mut doomed = walk.sift(&self.policy, held.iter().map(Vec::as_slice));
        match (self.switch, walk.pass) {
            (Switch::Leases, Pass::Leases) => doomed.clear(),
            (Switch::Tags, _) if walk.wishes.iter().all(|wish| matches!(wish.target, Target::Tag(_))) => doomed.clear(),
            (Switch::SecondPass, Pass::Leases) => {
                let mut values = walk.clone();
                values.pass = Pass::Values;
                doomed.extend(values.sift(&self.policy, held.iter().map(Vec::as_slice)));
            }
            _ => {}
        }
        for name in doomed.iter().flatten() {
            self.shards[shard].remove(name);
        }
    }

    fn end_pass(&mut self) {
        let Some(walk) = self.jobs.current.as_mut() else { return };
        if self.moves != self.layout && self.switch != Switch::Restart {
            return walk.give_up();
        }
        if walk.pass == Pass::Leases && self.switch != Switch::SecondPass {
            walk.start_pass(Pass::Values, layout(), 0);
            self.pages = pages(&mut self.random);
            return;
        }
        self.jobs.end();
        let has_ended =
            |(event, (target, _)): &(&EntryId, &(Target, _))| matches!(self.jobs.progress(target, **event), Progress::Ended(_));
        let ended: Vec<EntryId> = self.demands.iter().filter(has_ended).map(|(event, _)| *event).collect();
        for (_, demanded) in ended.iter().filter_map(|event| self.demands.remove(event)) {
            self.least = std::array::from_fn(|index| self.least[index].max(demanded[index]));
        }
    }

    fn check(&self) -> Result<(), String> {
        for index in 0..KEYS {
            if let Some(version) = self.shards[self.home[index]].get(&key(index))
                && *version < self.least[index]
            {
                return Err(format!("key {index} is {version}, and {} was demanded", self.least[index]));
            }
        }
        Ok(())
    }
}

fn bucket_of(name: &[u8]) -> u64 {
    (FxBuildHasher.hash_one(name) >> 20) % BUCKETS
}

fn layout() -> BTreeMap<Shard, Vec<u8>> {
    let shard = |address: &str| Shard { address: address.to_owned(), run: String::new(), slots: String::new() };
    BTreeMap::from([(shard("a"), vec![0]), (shard("b"), vec![0])])
}

/// All pages, in an order of its own for each pass.
fn pages(random: &mut fastrand::Rng) -> Vec<(usize, u64)> {
    let mut pages: Vec<_> = (0..2).flat_map(|shard| (0..BUCKETS).map(move |bucket| (shard, bucket))).collect();
    random.shuffle(&mut pages);
    pages
}

/// The first history that breaks the promise.
fn broken(switch: Switch) -> Option<(u64, String)> {
    (0..HISTORIES).find_map(|seed| {
        let mut world = World::new(seed, switch);
        (0..STEPS).find_map(|_| world.step().err()).map(|error| (seed, error))
    })
}

#[test]
fn what_an_event_was_about_is_gone_when_its_walk_has_ended() {
    assert_eq!(broken(Switch::Nothing), None);
}

#[test]
fn without_any_of_its_mechanisms_a_walk_leaves_what_is_outdated() {
    for switch in [Switch::Leases, Switch::SecondPass, Switch::Restart, Switch::NextWalk, Switch::Tags] {
        assert!(broken(switch).is_some(), "{switch:?} is not caught");
    }
}
