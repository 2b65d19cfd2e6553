//! The servers, the origin, and what is checked.

use std::rc::Rc;

use super::Switch;
use super::actors::{Actor, Detour, Relay, Transaction};
use crate::journal;
use crate::journal::model::Partition;
use crate::journal::scripts::Bounds;
use crate::journal::{Change, Version};
use crate::sidecar::patterns::write_through::model as key;

/// Steps of a history.
const STEPS: usize = 300;
/// How many keys there are.
pub const KEYS: usize = 2;
/// How far a server's clock may be ahead.
const SKEW: u64 = 12;
/// An append leaves, and is carried out, within such a time.
pub const SENT_WITHIN: u64 = 40;
pub const CARRIED_OUT_WITHIN: u64 = 40;
/// The origin is told past the journal within such a time of the leave, and such a transaction comes to something within so long.
pub const TOLD_WITHIN: u64 = 60;
pub const DETOUR_TAKES: u64 = 60;
/// How long a key's writes stay out of the journal for it.
pub const AWAY: u64 = TOLD_WITHIN + DETOUR_TAKES + 2 * SKEW;
/// How long a mark stands where a journal overflows: a leave is sent like an append.
const MARK_WITH_DETOUR: u64 = SENT_WITHIN + AWAY;
/// How long it stands otherwise.
const MARK: u64 = SENT_WITHIN + CARRIED_OUT_WITHIN + 2 * SKEW;
pub const BOUNDS: Bounds = Bounds { depth: 100, bytes: 1 << 20, age_ms: 1 << 20 };

/// What a server holds.
#[derive(Debug, Clone, Default)]
pub struct State {
    pub keys: [key::Key; KEYS],
    pub journal: Partition,
    /// The last write of each key that was appended, by its number; and whether it deletes.
    pub latest: [(u64, bool); KEYS],
}

/// How far a server is in the primary's history.
#[derive(Debug, Clone, Copy)]
struct Server {
    memory: usize,
    disk: usize,
    /// One that is not follows nobody: it is dead, or hangs.
    is_up: bool,
    /// Whether it may be promoted all the same, at the moment when it is back. Else it takes no primary's place before it has all of its
    /// data.
    may_be_heir: bool,
    skew: u64,
}

/// A moment in the history of one primary's reign.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Moment {
    reign: u64,
    offset: usize,
}

/// What the origin has of a key.
#[derive(Debug, Clone, Copy, Default)]
pub struct Row {
    pub version: Version,
    pub number: u64,
    pub deleted: bool,
}

/// How often what is of interest happened.
#[derive(Debug, Clone, Copy, Default)]
pub struct Seen {
    pub acknowledged: u64,
    pub failovers: u64,
    /// Promotions of a server that had followed nobody.
    pub strays: u64,
    /// Writes of which nobody was told and that are gone.
    pub vanished: u64,
    pub from_dirty: u64,
    pub filled: u64,
    pub refused_commits: u64,
    /// Writes that the origin was told past the journal.
    pub detours: u64,
}

impl Seen {
    pub fn add(&mut self, other: &Self) {
        self.acknowledged += other.acknowledged;
        self.failovers += other.failovers;
        self.strays += other.strays;
        self.vanished += other.vanished;
        self.from_dirty += other.from_dirty;
        self.filled += other.filled;
        self.refused_commits += other.refused_commits;
        self.detours += other.detours;
    }
}

pub struct World {
    pub switch: Switch,
    /// Whether writes may find no room in the journal.
    pub overflows: bool,
    pub random: fastrand::Rng,
    pub now: u64,
    history: Vec<Rc<State>>,
    servers: Vec<Server>,
    primary: usize,
    reign: u64,
    pub rows: [Row; KEYS],
    /// Up to where the origin has all.
    pub position: Version,
    /// The last write of each key that it was told past the journal, by its number; and whether that deletes.
    pub direct: [(u64, bool); KEYS],
    /// The latest acknowledged write of each key.
    pub acknowledged: [u64; KEYS],
    /// The number of the write that has each version.
    pub numbers: std::collections::BTreeMap<Version, u64>,
    next: u64,
    actors: Vec<Actor>,
    relays: Vec<Relay>,
    /// Transactions that nobody waits for any more.
    pub adrift: Vec<Transaction>,
    /// The same of those past the journal, and when each comes to nothing.
    pub astray: Vec<(Detour, u64)>,
    /// Whether each step is told.
    pub traces: bool,
    pub trace: Vec<String>,
    pub seen: Seen,
}

impl World {
    pub fn new(seed: u64, switch: Switch) -> Self {
        let mut random = fastrand::Rng::with_seed(seed);
        let servers = random.usize(2..=3);
        let server =
            |random: &mut fastrand::Rng| Server { memory: 0, disk: 0, is_up: true, may_be_heir: true, skew: random.u64(..SKEW) };
        let servers = (0..servers).map(|_| server(&mut random)).collect();
        let actors = vec![Actor::Idle; random.usize(2..=7)];
        let overflows = match switch {
            Switch::Nothing => seed.is_multiple_of(2),
            Switch::LeaveUnconfirmed => true,
            Switch::Journal(journal::model::Broken::Absence | journal::model::Broken::Precedence) => true,
            _ => false,
        };
        Self {
            switch,
            overflows,
            now: 1_000,
            history: vec![Rc::default()],
            servers,
            primary: 0,
            reign: 1,
            rows: Default::default(),
            position: Version::ZERO,
            direct: Default::default(),
            acknowledged: [0; KEYS],
            numbers: std::collections::BTreeMap::new(),
            next: 0,
            actors,
            relays: vec![Relay::Idle; 2],
            adrift: Vec::new(),
            astray: Vec::new(),
            traces: false,
            trace: Vec::new(),
            seen: Seen::default(),
            random,
        }
    }

    /// How long a mark stands.
    pub fn mark(&self) -> u64 {
        if self.overflows { MARK_WITH_DETOUR } else { MARK }
    }

    pub fn number(&mut self) -> u64 {
        self.next += 1;
        self.next
    }

    /// What the primary has.
    pub fn state(&self) -> &State {
        &self.history[self.history.len() - 1]
    }

    /// The primary's clock.
    pub fn clock(&self) -> u64 {
        self.now + self.servers[self.primary].skew
    }

    pub fn moment(&self) -> Moment {
        Moment { reign: self.reign, offset: self.history.len() - 1 }
    }

    pub fn is_same_reign(&self, moment: Moment) -> bool {
        self.reign == moment.reign
    }

    /// Carries out a command at the primary.
    pub fn change<T>(&mut self, change: impl FnOnce(&mut State, u64) -> T) -> T {
        let mut state = self.state().clone();
        let outcome = change(&mut state, self.clock());
        self.history.push(Rc::new(state));
        let offset = self.history.len() - 1;
        let primary = &mut self.servers[self.primary];
        primary.memory = offset;
        if self.switch != Switch::Memory {
            primary.disk = offset;
        }
        outcome
    }

    /// Appends a write at the primary. Its version, and its number.
    pub fn append(&mut self, key: usize, deletes: bool, until: u64) -> Option<(Version, u64)> {
        let number = self.number();
        let broken = match self.switch {
            Switch::Journal(broken) => broken,
            _ => journal::model::Broken::Nothing,
        };
        let value = (!deletes).then(|| number.to_string().into_bytes());
        let changes = [Change { key: vec![key as u8], value }];
        let appended = self.change(|state, now| {
            let appended = state.journal.append(now, until, BOUNDS, &changes, broken);
            if matches!(appended, journal::scripts::Appended::Done(_)) {
                state.latest[key] = (number, deletes);
            }
            appended
        });
        let journal::scripts::Appended::Done(versions) = appended else { return None };
        self.numbers.insert(versions[0], number);
        Some((versions[0], number))
    }

    /// Has a write go past the journal, where it may.
    pub fn leave(&mut self, key: usize, deletes: bool, until: u64) -> Option<Detour> {
        let broken = match self.switch {
            Switch::Journal(broken) => broken,
            _ => journal::model::Broken::Nothing,
        };
        let left = self.change(|state, now| state.journal.leave(now, until, AWAY, &[vec![key as u8]], broken));
        let journal::scripts::Left::Done(versions) = left else { return None };
        Some(Detour { key, version: versions[0], number: self.number(), deletes })
    }

    /// The origin carries it out.
    pub fn pass_by(&mut self, detour: Detour) {
        let Detour { key, version, number, deletes: deleted } = detour;
        self.rows[key] = Row { version, number, deleted };
        self.direct[key] = (number, deleted);
        self.seen.detours += 1;
    }

    /// The last write of a key that cannot vanish any more: of the journal's, and of those past it.
    fn last(&self, key: usize) -> (u64, bool) {
        self.state().latest[key].max(self.direct[key])
    }

    /// Whether all who might be primary have what was there at a moment: on disk, or at least in memory. One that does not follow cannot
    /// say so.
    pub fn is_confirmed(&self, moment: Moment, on_disk: bool) -> bool {
        let strays = self.servers.iter().any(|server| !server.is_up && server.may_be_heir);
        if self.reign != moment.reign || (strays && self.switch != Switch::Stray) {
            return false;
        }
        let has = |server: &Server| {
            let reached = if on_disk && self.switch != Switch::Memory { server.disk } else { server.memory };
            reached >= moment.offset
        };
        let replicas = || self.servers.iter().enumerate().filter(|(at, server)| *at != self.primary && server.is_up);
        let count = replicas().filter(|(_, server)| has(server)).count();
        let needed = if self.switch == Switch::OneReplica { 1 } else { replicas().count() };
        has(&self.servers[self.primary]) && count >= needed.max(1)
    }

    fn tell(&mut self, step: impl FnOnce() -> String) {
        if self.traces {
            let step = format!("{} {}", self.now, step());
            self.trace.push(step);
        }
    }

    /// Another server's history becomes everybody's.
    fn begin_reign(&mut self, primary: usize, offset: usize) {
        let lost = self.history.len() - 1 - offset;
        if self.history[offset].latest != self.state().latest {
            self.seen.vanished += 1;
        }
        self.tell(|| format!("server {primary} begins with offset {offset}, {lost} are lost"));
        self.history.truncate(offset + 1);
        for server in &mut self.servers {
            (server.memory, server.disk) = (server.memory.min(offset), server.disk.min(offset));
        }
        self.servers[primary].memory = offset;
        // A server that begins writes all that it has.
        self.servers[primary].disk = offset;
        (self.primary, self.reign) = (primary, self.reign + 1);
    }

    fn servers_step(&mut self) {
        let at = self.random.usize(..self.servers.len());
        match self.random.u8(..32) {
            0 if at == self.primary => {
                let may_be = |server: &Server| server.is_up || server.may_be_heir;
                let heirs: Vec<usize> =
                    (0..self.servers.len()).filter(|heir| *heir != at && may_be(&self.servers[*heir])).collect();
                let Some(heir) = self.random.choice(heirs) else { return };
                self.seen.failovers += 1;
                self.seen.strays += u64::from(!self.servers[heir].is_up);
                let offset = self.servers[heir].memory;
                self.begin_reign(heir, offset);
                self.servers[heir].is_up = true;
                self.servers[at].is_up = false;
            }
            // It is back before anybody takes its place.
            1 if at == self.primary => self.begin_reign(at, self.servers[at].disk),
            2 if at != self.primary && self.servers[at].is_up => {
                let (hangs, server) = (self.random.bool(), &mut self.servers[at]);
                server.memory = if hangs { server.memory } else { server.disk };
                server.is_up = false;
            }
            // It has ruled out that it is promoted.
            3..6 if !self.servers[at].is_up => self.servers[at].may_be_heir = false,
            6..16 if !self.servers[at].is_up => {
                let all = self.history.len() - 1;
                self.servers[at] = Server { memory: all, disk: all, is_up: true, may_be_heir: true, ..self.servers[at] };
            }
            _ if self.servers[at].is_up => {
                let all = self.history.len() - 1;
                let server = &mut self.servers[at];
                server.memory = self.random.usize(server.memory..=all);
                server.disk = self.random.usize(server.disk..=server.memory);
            }
            _ => {}
        }
    }

    /// Plays a history. The error tells what is wrong.
    pub fn play(&mut self) -> Result<(), String> {
        for _ in 0..STEPS {
            self.now += self.random.u64(0..6);
            self.step()?;
        }
        self.end()
    }

    fn step(&mut self) -> Result<(), String> {
        match self.random.u8(..16) {
            0..5 => self.servers_step(),
            5 => {
                let key = self.random.usize(..KEYS);
                self.change(|state, _| (state.keys[key].value, state.keys[key].lease) = (None, None));
            }
            6..8 => self.relay_step(),
            8 if !self.adrift.is_empty() => {
                let at = self.random.usize(..self.adrift.len());
                let transaction = self.adrift.swap_remove(at);
                self.commit(&transaction);
            }
            9 if !self.astray.is_empty() => {
                let at = self.random.usize(..self.astray.len());
                let (detour, until) = self.astray.swap_remove(at);
                if self.now <= until {
                    self.pass_by(detour);
                }
            }
            _ => {
                let at = self.random.usize(..self.actors.len());
                let before = self.actors[at];
                let after = self.actor_step(before)?;
                self.tell(|| format!("actor {at}: {before:?} -> {after:?}"));
                self.actors[at] = after;
            }
        }
        match (0..KEYS).find(|key| self.last(*key).0 < self.acknowledged[*key]) {
            Some(key) => Err(format!("key {key}: write {} was acknowledged, and is lost", self.acknowledged[key])),
            None => Ok(()),
        }
    }

    fn relay_step(&mut self) {
        let at = self.random.usize(..self.relays.len());
        let before = self.relays[at].clone();
        let after = self.advance_relay(at, before.clone());
        self.tell(|| format!("relay {at}: {before:?} -> {after:?}"));
        self.relays[at] = after;
    }

    /// All that is under way comes to its end, and what is in the journal to the origin.
    fn end(&mut self) -> Result<(), String> {
        self.now += 10 * MARK_WITH_DETOUR;
        self.relays = vec![Relay::Idle; 1];
        for _ in 0..10_000 {
            if self.state().journal.log.is_empty() && matches!(self.relays[0], Relay::Idle) {
                break;
            }
            for server in &mut self.servers {
                let all = self.history.len() - 1;
                (server.memory, server.disk, server.is_up) = (all, all, true);
            }
            let relay = self.relays[0].clone();
            self.relays[0] = self.advance_relay_surely(0, relay);
        }
        for transaction in std::mem::take(&mut self.adrift) {
            self.commit(&transaction);
        }
        let (state, last) = (self.state(), [0, 1].map(|key| self.last(key)));
        if !state.journal.log.is_empty() {
            return Err("the journal is not drained".to_owned());
        }
        for (key, (number, deleted)) in last.into_iter().enumerate() {
            let row = self.rows[key];
            if row.number != number || row.deleted != deleted {
                return Err(format!("key {key}: the last write is {number}, and the origin has {row:?}"));
            }
            if state.journal.dirty.contains_key(&vec![key as u8]) {
                return Err(format!("key {key} is still dirty"));
            }
            if state.keys[key].value.is_some_and(|value| value != number || deleted) {
                return Err(format!("key {key}: the cache has {:?}, the last write is {number}", state.keys[key].value));
            }
        }
        Ok(())
    }
}
