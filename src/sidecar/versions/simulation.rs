//! Sidecars that read, load, store and delete versioned keys, while somebody invalidates their rule, a key's tag or a key, whose versions are lost
//! now and then.
//!
//! Nothing is read that is older than a deletion which was acknowledged before the read began, nor than an invalidation of its rule, its tag or itself a second
//! before: within that second, others may show what was there before it, also of keys that are deleted meanwhile. Who waits for that second is told of
//! no older value by anybody. The cache is a map; answers of it arrive whenever they like. Each of the switches breaks one mechanism, and
//! is caught.

use std::collections::HashMap;

use super::epoch::{Epoch, LEASE_MS, Place, place};
use super::told::Told;
use crate::policy::versions::Version;

const KEYS: usize = 2;
/// The rule's version, that of each key's tag, and its own.
const COUNTERS: usize = 1 + 2 * KEYS;
const SIDECARS: usize = 3;
const STEPS: usize = 500;
const HISTORIES: u64 = 3_000;
/// As many more in which servers say when versions change.
const TOLD_HISTORIES: u64 = 1_000;

/// What is left out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Switch {
    Nothing,
    /// An answer is believed for ever.
    Lease,
    /// A write is acknowledged without a question which version counts.
    Question,
    /// A version is counted up, and begins with one where it was lost.
    Chance,
    /// A value is stored under the version that is meant now, whenever its load began.
    Earlier,
    /// A value that goes under an earlier version leaves loads under the present one their lease.
    Revocation,
    /// Who wants to know when nobody can show what was there before is answered at once.
    Sync,
}

type Name = (Version, usize);

/// What is demanded of each key.
struct Demand {
    from: u64,
    /// Whether somebody has waited until it is so for everybody.
    synced: bool,
    least: [u64; KEYS],
}

/// A client that was told that a key is missing, and loads.
#[derive(Debug, Clone, Copy)]
struct Load {
    name: Name,
    lease: u64,
}

#[derive(Default)]
struct Sidecar {
    epochs: [Epoch; COUNTERS],
    /// Its clients' loads, as it knows them.
    outstanding: Vec<Load>,
    told: Told,
    /// What clients have loaded, and not sent yet.
    values: Vec<(usize, u64)>,
}

/// What is on its way.
enum Pending {
    /// An answer to a question for the version.
    Answer { sidecar: usize, counter: usize, asked_at: u64, version: Version },
    /// A read, with what it may not be older than.
    Read { sidecar: usize, name: Name, least: u64 },
    /// A write whose sidecar asks which version counts. A deletion promises something.
    Written { key: usize, version: Version, promises: Option<u64>, syncs: bool },
}

struct World {
    random: fastrand::Rng,
    switch: Switch,
    /// Whether servers say when a version changes.
    tells: bool,
    now: u64,
    origin: [u64; KEYS],
    versions: [Option<Version>; COUNTERS],
    count: u64,
    values: HashMap<Name, u64>,
    leases: HashMap<Name, u64>,
    last_lease: u64,
    sidecars: [Sidecar; SIDECARS],
    pending: Vec<Pending>,
    /// When the version was drawn or lost last.
    changed_at: u64,
    demands: Vec<Demand>,
}

impl World {
    fn new(seed: u64, switch: Switch, tells: bool) -> Self {
        Self {
            random: fastrand::Rng::with_seed(seed),
            switch,
            tells,
            now: 0,
            origin: [1; KEYS],
            versions: [None; COUNTERS],
            count: 0,
            values: HashMap::new(),
            leases: HashMap::new(),
            last_lease: 0,
            sidecars: std::array::from_fn(|_| Sidecar::default()),
            pending: Vec::new(),
            changed_at: 0,
            demands: Vec::new(),
        }
    }

    fn step(&mut self) -> Result<(), String> {
        self.now += self.random.u64(..40);
        let (sidecar, key) = (self.random.usize(..SIDECARS), self.random.usize(..KEYS));
        match self.random.u32(..1000) {
            0..250 => self.begin_read(sidecar, key),
            250..400 => self.ask(sidecar),
            400..500 => self.store(sidecar),
            500..530 => self.delete(sidecar, key),
            530..550 => self.invalidate(),
            550..555 => {
                let counter = self.random.usize(..COUNTERS);
                (self.versions[counter], self.changed_at) = (None, self.now);
            }
            555..565 => self.values.retain(|name, _| name.1 != key),
            565..570 => self.leases.retain(|name, _| name.1 != key),
            // A server says that a version changed, rightly or not.
            570..580 if self.tells => self.sidecars[sidecar].epochs[self.random.usize(..COUNTERS)].forget(self.now),
            _ => return self.arrive(),
        }
        Ok(())
    }

    fn draw(&mut self) -> Version {
        if self.switch != Switch::Chance {
            return Version::new(self.random.u64(..));
        }
        self.count = if self.versions.iter().all(Option::is_some) { self.count + 1 } else { 1 };
        Version::new(self.count)
    }

    /// The version that counts for a key. `None`: part of it is to be drawn.
    fn counts(&self, key: usize) -> Option<Version> {
        Some(self.versions[0]?.with(self.versions[1 + key]?).with(self.versions[1 + KEYS + key]?))
    }

    /// The version that a key is meant under, as a sidecar knows it.
    fn meant(&mut self, sidecar: usize, key: usize) -> Version {
        // As if no time had passed since it was asked.
        let now = if self.switch == Switch::Lease { 0 } else { self.now };
        let (random, epochs) = (&mut self.random, &mut self.sidecars[sidecar].epochs);
        let [rule, tag, own] =
            [0, 1 + key, 1 + KEYS + key].map(|counter| epochs[counter].current(now, || random.u64(..)).version);
        rule.with(tag).with(own)
    }

    /// What nobody may read less of, who begins now; who has not been told the version, a second later.
    fn least(&self, sidecar: usize, key: usize) -> u64 {
        let knows = |counter: usize| self.sidecars[sidecar].epochs[counter].known(self.now).is_some();
        let grace = if [0, 1 + key, 1 + KEYS + key].into_iter().all(knows) { 0 } else { LEASE_MS };
        let due = self.demands.iter().filter(|demand| demand.from + if demand.synced { 0 } else { grace } <= self.now);
        due.map(|demand| demand.least[key]).max().unwrap_or_default()
    }

    fn begin_read(&mut self, sidecar: usize, key: usize) {
        let (version, least) = (self.meant(sidecar, key), self.least(sidecar, key));
        self.pending.push(Pending::Read { sidecar, name: (version, key), least });
    }

    fn ask(&mut self, sidecar: usize) {
        for counter in 0..COUNTERS {
            if self.versions[counter].is_none() {
                (self.versions[counter], self.changed_at) = (Some(self.draw()), self.now);
            }
            if let Some(version) = self.versions[counter] {
                self.pending.push(Pending::Answer { sidecar, counter, asked_at: self.now, version });
            }
        }
    }

    /// A client sends what it has loaded. The sidecar does not know which of its loads that was.
    fn store(&mut self, sidecar: usize) {
        if self.sidecars[sidecar].values.is_empty() {
            return;
        }
        let at = self.random.usize(..self.sidecars[sidecar].values.len());
        let (key, value) = self.sidecars[sidecar].values.swap_remove(at);
        let current = self.meant(sidecar, key);
        let Sidecar { outstanding, told, .. } = &mut self.sidecars[sidecar];
        let is_missing = |version: Version| outstanding.iter().any(|load| load.name == (version, key));
        let told = told.take(0, &[key as u8], current, is_missing);
        let told = if self.switch == Switch::Earlier { Vec::new() } else { told };
        let Place { version, revoked } = place(current, &told, is_missing(current));
        let name = (version, key);
        for version in revoked.into_iter().filter(|_| self.switch != Switch::Revocation) {
            self.values.remove(&(version, key));
            self.leases.remove(&(version, key));
        }
        match outstanding.iter().position(|load| load.name == name) {
            Some(at) => {
                // It is stored where no other load that it may be of has another lease.
                let lease = self.leases.remove(&name);
                if outstanding.iter().filter(|load| load.name == name).all(|load| Some(load.lease) == lease) {
                    self.values.insert(name, value);
                } else {
                    self.values.remove(&name);
                }
                outstanding.swap_remove(at);
            }
            None => {
                self.leases.remove(&name);
                self.values.insert(name, value);
            }
        }
        self.pending.push(Pending::Written { key, version: name.0, promises: None, syncs: false });
    }

    fn delete(&mut self, sidecar: usize, key: usize) {
        self.origin[key] += 1;
        let version = self.meant(sidecar, key);
        self.remove((version, key));
        let syncs = self.random.bool();
        self.pending.push(Pending::Written { key, version, promises: Some(self.origin[key]), syncs });
    }

    fn remove(&mut self, name: Name) {
        self.values.remove(&name);
        self.leases.remove(&name);
    }

    /// Somebody invalidates the rule, a tag or a key.
    fn invalidate(&mut self) {
        let counter = self.random.usize(..COUNTERS);
        let is_about = |key: usize| counter == 0 || counter == 1 + key || counter == 1 + KEYS + key;
        (0..KEYS).filter(|key| is_about(*key)).for_each(|key| self.origin[key] += 1);
        (self.versions[counter], self.changed_at) = (Some(self.draw()), self.now);
        let least = std::array::from_fn(|key| if is_about(key) { self.origin[key] } else { 0 });
        let synced = self.random.bool();
        self.demand(self.now + LEASE_MS, synced, least);
    }

    /// Where it is waited for that all hear of it, it is the answer from which it is demanded.
    fn demand(&mut self, from: u64, synced: bool, least: [u64; KEYS]) {
        let from = match (synced, self.switch == Switch::Sync) {
            (true, true) => self.now,
            (true, false) => self.now + LEASE_MS,
            (false, _) => from,
        };
        self.demands.push(Demand { from, synced, least });
    }

    /// Something that is on its way arrives.
    fn arrive(&mut self) -> Result<(), String> {
        if self.pending.is_empty() {
            return Ok(());
        }
        match self.pending.swap_remove(self.random.usize(..self.pending.len())) {
            Pending::Answer { sidecar, counter, asked_at, version } => {
                let asked_at = if self.switch == Switch::Lease { 0 } else { asked_at };
                self.sidecars[sidecar].epochs[counter].heard(asked_at, version.into());
            }
            Pending::Read { sidecar, name, least } => match self.values.get(&name) {
                Some(value) if *value < least => return Err(format!("{name:?} is {value}, and {least} was demanded")),
                Some(_) => {}
                None => self.load(sidecar, name),
            },
            Pending::Written { key, version, promises, syncs } => match self.counts(key) {
                Some(counts) if counts != version && self.switch != Switch::Question => {
                    self.remove((counts, key));
                    self.pending.push(Pending::Written { key, version: counts, promises, syncs });
                }
                _ => {
                    let least = std::array::from_fn(|of| if of == key { promises.unwrap_or_default() } else { 0 });
                    self.demand(self.now.max(self.changed_at + LEASE_MS), syncs, least);
                }
            },
        }
        Ok(())
    }

    /// Who gets the lease loads.
    fn load(&mut self, sidecar: usize, name: Name) {
        if self.leases.contains_key(&name) {
            return;
        }
        self.last_lease += 1;
        self.leases.insert(name, self.last_lease);
        self.sidecars[sidecar].outstanding.push(Load { name, lease: self.last_lease });
        let Sidecar { outstanding, told, values, .. } = &mut self.sidecars[sidecar];
        told.note(0, &[name.1 as u8], name.0, |_, _| !outstanding.is_empty());
        values.push((name.1, self.origin[name.1]));
    }
}

/// The first history that breaks the promise.
fn broken(switch: Switch) -> Option<(u64, String)> {
    (0..HISTORIES + TOLD_HISTORIES).find_map(|seed| {
        let mut world = World::new(seed, switch, seed >= HISTORIES);
        (0..STEPS).find_map(|_| world.step().err()).map(|error| (seed, error))
    })
}

#[test]
fn nothing_is_read_that_is_older_than_an_acknowledged_invalidation() {
    assert_eq!(broken(Switch::Nothing), None);
}

#[test]
fn without_any_of_its_mechanisms_something_is() {
    for switch in [Switch::Lease, Switch::Question, Switch::Chance, Switch::Earlier, Switch::Revocation, Switch::Sync] {
        assert!(broken(switch).is_some(), "{switch:?} is not caught");
    }
}
