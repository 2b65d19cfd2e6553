//! Clients that load a key and give its value tags, others that write and delete it, and others that invalidate tags and the key, while versions and
//! the log of invalidated tags are lost now and then.
//!
//! Nobody reads a value that is older than a deletion, or than an invalidation of the key or of a tag that the value has, which was acknowledged
//! a second before the read began. The cache is some maps; whatever takes several steps takes them one by one, among those of others. Each of
//! the switches breaks one mechanism, and is caught.

use std::collections::HashMap;
use std::rc::Rc;

use super::epoch::{Epoch, LEASE_MS};
use super::state::{State, combined};
use crate::policy::versions::{Counter, Version};

const TAGS: usize = 2;
const SIDECARS: usize = 3;
const STEPS: usize = 1_500;
const HISTORIES: u64 = 2_000;

/// What is left out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Switch {
    Nothing,
    /// The tags that were invalidated since the load began are not asked for.
    Log,
    /// How far the log is, is looked at when the value comes.
    Moment,
    /// A log that is lost goes on from where it was, as far as it knows.
    Era,
    /// A tag's version is drawn before it is noted.
    NotedLate,
    /// The tags' versions are asked for behind the look at the log.
    VersionsLate,
    /// The key's own version is drawn whatever it was before.
    Condition,
    /// Whether the rest of the version counts that the client was told of is not asked.
    Rest,
    /// The client's lease is not asked for.
    Lease,
    /// The lease under the value's name is not asked for.
    OwnLease,
    /// It is taken once the value's name is known to others.
    OwnLeaseLate,
    /// A key's version that is lost is the same again.
    Chance,
}

/// The number that the origin had when it was loaded, the tags that it was given, and until when it is kept.
#[derive(Debug, Clone)]
struct Value {
    number: u64,
    tags: Vec<usize>,
    until: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Moment {
    count: u64,
    era: u64,
}

struct Log {
    now: Moment,
    last: [u64; TAGS],
}

/// A client's load.
#[derive(Debug, Clone)]
struct Load {
    sidecar: usize,
    name: Version,
    lease: u64,
    moment: Moment,
    number: u64,
}

/// A value with tags on its way into the cache, and how many of its steps are done.
#[derive(Debug)]
struct Fill {
    load: Load,
    tags: Vec<usize>,
    own: Version,
    /// The tags that stood with it.
    before: Vec<usize>,
    next: Version,
    versions: Vec<Version>,
    lease: u64,
    done: usize,
}

/// What is on its way.
enum Pending {
    Answer {
        sidecar: usize,
        counter: usize,
        asked_at: u64,
        state: State,
    },
    Read {
        sidecar: usize,
        name: Version,
        due: [u64; 1 + TAGS],
    },
    /// A lease was taken; the log has not been looked at.
    Taken {
        sidecar: usize,
        name: Version,
        lease: u64,
    },
    Fill(Fill),
    /// A write or a deletion, whose sidecar asks which version counts; behind it the key's own version is drawn, where it is invalidated.
    Written {
        version: Version,
        promises: u64,
        draws: bool,
    },
    /// A tag's invalidation, and how many of its steps are done.
    Invalidate {
        tag: usize,
        promises: u64,
        done: usize,
    },
}

#[derive(Default)]
struct Sidecar {
    /// Of the key's own version, and of each tag's.
    epochs: [Epoch; 1 + TAGS],
}

struct World {
    random: fastrand::Rng,
    switch: Switch,
    now: u64,
    /// How slow whoever invalidates is, and how often the log is lost, as chance has it in each history.
    slow: u8,
    lossy: u32,
    counters: [Counter; 1 + TAGS],
    origin: u64,
    own: Option<(Version, Vec<usize>)>,
    tags: [Option<Version>; TAGS],
    log: Log,
    values: HashMap<Version, Value>,
    leases: HashMap<Version, u64>,
    last_lease: u64,
    lost: Option<Version>,
    changed_at: u64,
    sidecars: [Sidecar; SIDECARS],
    loads: Vec<Load>,
    pending: Vec<Pending>,
    /// From when on a value of the key is nothing less, or one that has the tag.
    demands: Vec<(u64, [u64; 1 + TAGS])>,
    filled: u64,
}

impl World {
    fn new(seed: u64, switch: Switch) -> Self {
        let keys = "k:{id}".parse().expect("a pattern");
        let mut random = fastrand::Rng::with_seed(seed);
        let era = random.u64(..);
        Self {
            random,
            switch,
            now: 10_000,
            slow: [1, 3, 8][seed as usize % 3],
            lossy: [1, 20][seed as usize / 3 % 2],
            counters: [Counter::of_key(b"k:1"), Counter::of_tag(&keys, b"0"), Counter::of_tag(&keys, b"1")],
            origin: 1,
            own: None,
            tags: [None; TAGS],
            log: Log { now: Moment { count: 0, era }, last: [0; TAGS] },
            values: HashMap::new(),
            leases: HashMap::new(),
            last_lease: 0,
            lost: None,
            changed_at: 0,
            sidecars: std::array::from_fn(|_| Sidecar::default()),
            loads: Vec::new(),
            pending: Vec::new(),
            demands: Vec::new(),
            filled: 0,
        }
    }

    fn step(&mut self) -> Result<(), String> {
        self.now += self.random.u64(..30);
        let sidecar = self.random.usize(..SIDECARS);
        match self.random.u32(..1000) {
            0..150 => self.begin_read(sidecar),
            150..200 => self.ask(sidecar),
            200..260 => self.begin_fill(),
            260..266 => self.write(sidecar, true),
            266..276 => self.write(sidecar, false),
            276..282 => {
                self.origin += 1;
                self.pending.push(Pending::Written { version: Version::new(0), promises: self.origin, draws: true });
            }
            282..302 => {
                self.origin += 1;
                let tag = self.random.usize(..TAGS);
                self.pending.push(Pending::Invalidate { tag, promises: self.origin, done: 0 });
            }
            302..304 => {
                self.lost = self.own.take().map(|(version, _)| version);
                self.changed_at = self.now;
            }
            304..306 => {
                let tag = self.random.usize(..TAGS);
                (self.tags[tag], self.changed_at) = (None, self.now);
            }
            306..326 => {
                if self.random.u32(..20) >= self.lossy {
                    return Ok(());
                }
                let era = if self.switch == Switch::Era { self.log.now.era } else { self.random.u64(..) };
                self.log = Log { now: Moment { count: 0, era }, last: [0; TAGS] };
            }
            326..328 => self.leases.clear(),
            328..333 => self.values.clear(),
            // What is on its way does not pile up.
            _ => return (0..=self.pending.len() / 8).try_for_each(|_| self.arrive()),
        }
        Ok(())
    }

    fn draw(&mut self) -> Version {
        Version::new(self.random.u64(..))
    }

    fn state(&self, own: &(Version, Vec<usize>)) -> State {
        let tags: Rc<[Counter]> = own.1.iter().map(|tag| self.counters[1 + tag].clone()).collect();
        State { version: own.0, tags }
    }

    fn index(counters: &[Counter], counter: &Counter) -> usize {
        counters.iter().position(|other| other == counter).expect("a counter")
    }

    /// The version that the key is meant under, as a sidecar knows it.
    fn meant(&mut self, sidecar: usize) -> Version {
        let Self { counters, sidecars, random, now, .. } = self;
        let epochs = &mut sidecars[sidecar].epochs;
        let look = |counter: &Counter| Some(epochs[Self::index(counters, counter)].current(*now, || random.u64(..)));
        combined(&counters[..1], look).expect("a version")
    }

    /// What is known of the version, where all of it is.
    fn known(&self, sidecar: usize) -> Option<(State, Version)> {
        let look = |counter: &Counter| self.sidecars[sidecar].epochs[Self::index(&self.counters, counter)].known(self.now);
        Some((look(&self.counters[0])?, combined(&self.counters[..1], look)?))
    }

    /// The version that counts. `None`: part of it is to be drawn.
    fn counts(&self) -> Option<Version> {
        let own = self.own.as_ref()?;
        own.1.iter().try_fold(own.0, |version, tag| Some(version.with(self.tags[*tag]?)))
    }

    fn begin_read(&mut self, sidecar: usize) {
        let name = self.meant(sidecar);
        let mut due = [0; 1 + TAGS];
        for (_, least) in self.demands.iter().filter(|(from, _)| *from <= self.now) {
            (0..=TAGS).for_each(|at| due[at] = due[at].max(least[at]));
        }
        self.pending.push(Pending::Read { sidecar, name, due });
    }

    fn ask(&mut self, sidecar: usize) {
        if self.own.is_none() {
            let again = self.lost.filter(|_| self.switch == Switch::Chance);
            self.own = Some((again.unwrap_or_else(|| self.draw()), Vec::new()));
            self.changed_at = self.now;
        }
        for tag in 0..TAGS {
            self.version_of(tag);
        }
        let own = self.own.clone().expect("just drawn");
        let states = [self.state(&own)].into_iter().chain(self.tags.iter().flatten().map(|version| (*version).into()));
        for (counter, state) in states.enumerate().collect::<Vec<_>>() {
            self.pending.push(Pending::Answer { sidecar, counter, asked_at: self.now, state });
        }
    }

    /// A tag's version, which is drawn where there is none.
    fn version_of(&mut self, tag: usize) -> Version {
        if self.tags[tag].is_none() {
            (self.tags[tag], self.changed_at) = (Some(self.draw()), self.now);
        }
        self.tags[tag].expect("just drawn")
    }

    /// A client writes the key anew, or deletes it.
    fn write(&mut self, sidecar: usize, deletes: bool) {
        self.origin += 1;
        let (version, tags) = (self.meant(sidecar), self.known(sidecar).map(|(state, _)| state.tags.to_vec()));
        self.remove(version);
        if !deletes {
            let tags = tags.unwrap_or_default().iter().map(|tag| Self::index(&self.counters, tag) - 1).collect();
            self.values.insert(version, Value { number: self.origin, tags, until: u64::MAX });
        }
        self.pending.push(Pending::Written { version, promises: self.origin, draws: false });
    }

    fn remove(&mut self, name: Version) {
        self.values.remove(&name);
        self.leases.remove(&name);
    }

    /// A client brings what it has loaded, and the tags that it has found in it.
    fn begin_fill(&mut self) {
        if self.loads.is_empty() {
            return;
        }
        let load = self.loads.swap_remove(self.random.usize(..self.loads.len()));
        let moment = if self.switch == Switch::Moment { self.log.now } else { load.moment };
        let load = Load { moment, ..load };
        let Some((state, _)) = self.known(load.sidecar).filter(|(_, version)| *version == load.name) else { return };
        let tags: Vec<usize> = (0..TAGS).filter(|_| self.random.bool()).collect();
        let next = self.draw();
        let before = state.tags.iter().map(|tag| Self::index(&self.counters, tag) - 1).collect();
        let fill = Fill { load, tags, own: state.version, before, next, versions: Vec::new(), lease: 0, done: 0 };
        self.pending.push(Pending::Fill(fill));
    }

    /// One more step of a value on its way, in the order of [`super::given`]. `None`: it is not stored, or has been.
    fn advance(&mut self, mut fill: Fill) -> Option<Fill> {
        fill.done += 1;
        let name = |fill: &Fill| fill.versions.iter().fold(fill.next, |version, tag| version.with(*tag));
        match fill.done {
            1 => {
                fill.versions = fill.tags.iter().map(|tag| self.version_of(*tag)).collect();
                self.is_held(fill.load.name, fill.load.lease).then_some(fill)
            }
            2 => {
                if self.switch != Switch::OwnLeaseLate {
                    fill.lease = self.take_lease(name(&fill));
                }
                Some(fill)
            }
            3 => {
                let is_it = self.own.as_ref().is_some_and(|(version, _)| *version == fill.own);
                if !is_it && self.switch != Switch::Condition {
                    return None;
                }
                (self.own, self.changed_at) = (Some((fill.next, fill.tags.clone())), self.now);
                Some(fill)
            }
            4 => {
                let told = fill.before.iter().try_fold(fill.own, |version, tag| Some(version.with(self.tags[*tag]?)));
                (told == Some(fill.load.name) || self.switch == Switch::Rest).then_some(fill)
            }
            5 => {
                let Log { now, last } = &self.log;
                let Moment { count, era } = fill.load.moment;
                let is_unchanged = now.era == era && now.count >= count && fill.tags.iter().all(|tag| last[*tag] <= count);
                (is_unchanged || self.switch == Switch::Log).then_some(fill)
            }
            6 => {
                if self.switch == Switch::VersionsLate {
                    fill.versions = fill.tags.iter().map(|tag| self.version_of(*tag)).collect();
                    fill.lease = self.take_lease(name(&fill));
                }
                if self.switch == Switch::OwnLeaseLate {
                    fill.lease = self.take_lease(name(&fill));
                }
                if !self.is_held(fill.load.name, fill.load.lease) && self.switch != Switch::Lease {
                    return None;
                }
                self.leases.remove(&fill.load.name);
                // Who reads it by that name knows nothing of its tags.
                let until = self.now + LEASE_MS;
                self.values.insert(fill.load.name, Value { number: fill.load.number, tags: fill.tags.clone(), until });
                Some(fill)
            }
            _ => {
                let name = name(&fill);
                if self.is_held(name, fill.lease) || self.switch == Switch::OwnLease {
                    self.leases.remove(&name);
                    self.values.insert(name, Value { number: fill.load.number, tags: fill.tags, until: u64::MAX });
                    self.filled += 1;
                }
                None
            }
        }
    }

    fn is_held(&self, name: Version, lease: u64) -> bool {
        self.leases.get(&name) == Some(&lease)
    }

    fn take_lease(&mut self, name: Version) -> u64 {
        self.last_lease += 1;
        self.leases.insert(name, self.last_lease);
        self.last_lease
    }

    /// Something that is on its way arrives, or goes one step further.
    fn arrive(&mut self) -> Result<(), String> {
        if self.pending.is_empty() {
            return Ok(());
        }
        let at = self.random.usize(..self.pending.len());
        match self.pending.swap_remove(at) {
            Pending::Answer { sidecar, counter, asked_at, state } => {
                self.sidecars[sidecar].epochs[counter].heard(asked_at, state);
            }
            Pending::Read { sidecar, name, due } => return self.read(sidecar, name, due),
            Pending::Taken { sidecar, name, lease } => {
                let (moment, number) = (self.log.now, self.origin);
                self.loads.push(Load { sidecar, name, lease, moment, number });
            }
            Pending::Fill(fill) => {
                let next = self.advance(fill);
                self.pending.extend(next.map(Pending::Fill));
            }
            Pending::Written { version, promises, draws } => match self.counts() {
                Some(counts) if counts != version => {
                    self.remove(counts);
                    self.pending.push(Pending::Written { version: counts, promises, draws });
                }
                _ => {
                    if draws && self.own.is_some() {
                        (self.own, self.changed_at) = (Some((self.draw(), Vec::new())), self.now);
                    }
                    let from = self.now + LEASE_MS;
                    self.demands.push((from, [promises, 0, 0]));
                }
            },
            // Others go several steps meanwhile.
            slow @ Pending::Invalidate { .. } if self.random.u8(..self.slow) > 0 => self.pending.push(slow),
            Pending::Invalidate { tag, promises, done } => self.invalidate(tag, promises, done + 1),
        }
        Ok(())
    }

    /// It is noted, then drawn, then acknowledged.
    fn invalidate(&mut self, tag: usize, promises: u64, done: usize) {
        let notes = if self.switch == Switch::NotedLate { 2 } else { 1 };
        if done == notes {
            self.log.now.count += 1;
            self.log.last[tag] = self.log.now.count;
        } else if done < 3 {
            // Where there is none, there is nothing that could be met.
            let drawn = self.draw();
            self.tags[tag] = self.tags[tag].map(|_| drawn);
            self.changed_at = self.now;
        }
        if done < 3 {
            return self.pending.push(Pending::Invalidate { tag, promises, done });
        }
        let least = std::array::from_fn(|at| if at == 1 + tag { promises } else { 0 });
        self.demands.push((self.now + LEASE_MS, least));
    }

    fn read(&mut self, sidecar: usize, name: Version, due: [u64; 1 + TAGS]) -> Result<(), String> {
        match self.values.get(&name).filter(|value| self.now < value.until) {
            Some(Value { number, tags, .. }) => {
                let least = tags.iter().map(|tag| due[1 + tag]).chain([due[0]]).max().unwrap_or_default();
                if *number < least {
                    return Err(format!("{name:?} is {number} with tags {tags:?}, and {least} was demanded"));
                }
            }
            None if !self.leases.contains_key(&name) => {
                let lease = self.take_lease(name);
                self.pending.push(Pending::Taken { sidecar, name, lease });
            }
            None => {}
        }
        Ok(())
    }
}

/// The first history that breaks the promise, and how many values were stored with tags until then.
fn broken(switch: Switch, histories: u64) -> (Option<(u64, String)>, u64) {
    let mut filled = 0;
    let found = (0..histories).find_map(|seed| {
        let mut world = World::new(seed, switch);
        let error = (0..STEPS).find_map(|_| world.step().err()).map(|error| (seed, error));
        filled += world.filled;
        error
    });
    (found, filled)
}

#[test]
fn no_value_is_read_that_is_older_than_what_invalidated_one_of_its_tags() {
    let (found, filled) = broken(Switch::Nothing, HISTORIES);
    assert_eq!(found, None);
    assert!(filled > HISTORIES, "{filled} were stored");
}

#[test]
fn without_any_of_its_mechanisms_one_is() {
    for switch in [
        Switch::Log,
        Switch::Moment,
        Switch::Era,
        Switch::NotedLate,
        Switch::VersionsLate,
        Switch::Condition,
        Switch::Rest,
        Switch::Lease,
        Switch::OwnLease,
        Switch::OwnLeaseLate,
        Switch::Chance,
    ] {
        // Most are within the first thousand.
        let (found, _) = broken(switch, 10 * HISTORIES);
        assert!(found.is_some(), "{switch:?} is not caught");
    }
}
