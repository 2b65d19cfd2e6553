//! Two relays, one partition, one database, in simulated time: relays stand still and die at every step, requests that they sent arrive
//! long after, answers are lost, the database refuses some writes, and some of these only for a while.
//!
//! Held to: the database ends with the last write of each key that it will have; nothing is made twice, and nothing older over newer; what is
//! not dirty is in the database as it was last acknowledged, at every moment; what was refused, and nothing else, is a dead letter.

use std::collections::{BTreeMap, BTreeSet};

use super::drain::{Ask, Batch, Drain, Hold, Target};
use super::plan::{Item, Told};

const CLAIM_LASTS: u64 = 40;
const KEYS: u64 = 4;
const BATCH: usize = 6;
const STEPS: u64 = 600;

/// What is broken, to show that this simulation would notice.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Broken {
    Nothing,
    /// The database takes everybody's word for who holds the partition and how far it is.
    Fence,
    /// The journal makes dead letters of whatever it is told to.
    JournalFence,
    /// The position moves in a transaction of its own.
    Position,
    /// What is cleared is not compared with what is dirty.
    Clear,
    /// Of a batch that is refused, every entry becomes a dead letter.
    Halving,
    /// A dead letter's key is cleared like the others'.
    Parked,
    /// A dead letter is made only after what takes its place is told.
    ParkLate,
}

#[derive(Debug, Default)]
struct Journal {
    log: BTreeMap<u64, u64>,
    dirty: BTreeMap<u64, u64>,
    parked: BTreeMap<u64, u64>,
    dead: BTreeSet<u64>,
    last: u64,
    fence: u64,
    claim: Option<(usize, u64)>,
}

#[derive(Debug, Default)]
struct Database {
    rows: BTreeMap<u64, u64>,
    made: BTreeSet<u64>,
    fence: u64,
    position: u64,
}

/// What is sent to the database, with all that it holds.
#[derive(Debug, Clone)]
struct Telling {
    fence: u64,
    known: u64,
    entries: Vec<(u64, u64, u64)>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Verdict {
    Applied,
    Refused,
    Fenced,
}

#[derive(Debug, Default)]
struct Relay {
    drain: Option<Drain>,
    known: u64,
    asleep_until: u64,
    /// A request that it sent before it stood still, and when it arrives.
    late: Option<(u64, Telling)>,
    /// The same of a dead letter, which arrives when it goes on.
    late_park: Option<(u64, u64, u64)>,
}

struct World {
    random: fastrand::Rng,
    broken: Broken,
    now: u64,
    journal: Journal,
    database: Database,
    relays: [Relay; 2],
    /// Versions that the database refuses, and until when.
    poison: BTreeMap<u64, u64>,
    /// Each key's writes, in order.
    written: BTreeMap<u64, Vec<u64>>,
    wrong: Option<String>,
}

impl World {
    fn new(seed: u64, broken: Broken) -> Self {
        Self {
            random: fastrand::Rng::with_seed(seed),
            broken,
            now: 1,
            journal: Journal::default(),
            database: Database::default(),
            relays: Default::default(),
            poison: BTreeMap::new(),
            written: BTreeMap::new(),
            wrong: None,
        }
    }

    fn chance(&mut self, percent: u32) -> bool {
        self.random.u32(..100) < percent
    }

    fn wrong(&mut self, what: String) {
        self.wrong.get_or_insert(format!("at {}: {what}", self.now));
    }

    fn write(&mut self) {
        let key = self.random.u64(..KEYS);
        self.journal.last += 1;
        let version = self.journal.last;
        self.journal.log.insert(version, key);
        self.journal.dirty.insert(key, version);
        self.written.entry(key).or_default().push(version);
        if self.chance(15) {
            let heals = if self.chance(30) { self.now + self.random.u64(..80) } else { u64::MAX };
            self.poison.insert(version, heals);
        }
    }

    fn is_poison(&self, version: u64) -> bool {
        self.poison.get(&version).is_some_and(|heals| self.now < *heals)
    }

    /// One transaction of the database.
    fn tell(&mut self, telling: &Telling) -> Verdict {
        let trusts = self.broken == Broken::Fence;
        if telling.fence != self.database.fence && !trusts {
            return Verdict::Fenced;
        }
        let position = if trusts { telling.known } else { self.database.position };
        let open: Vec<_> = telling.entries.iter().copied().filter(|(_, _, at)| *at > position).collect();
        if open.iter().any(|(version, ..)| self.is_poison(*version)) {
            return Verdict::Refused;
        }
        for (version, key, at) in open {
            if self.database.rows.get(&key).is_some_and(|row| *row > version) {
                self.wrong(format!("{version} of key {key} is made over a newer one"));
            }
            if at == version && !self.database.made.insert(version) {
                self.wrong(format!("{version} of key {key} is made twice"));
            }
            self.database.rows.insert(key, version);
        }
        let lost = self.broken == Broken::Position && self.chance(20);
        if let Some((_, _, at)) = telling.entries.last().filter(|_| !lost) {
            self.database.position = (*at).max(if trusts { 0 } else { self.database.position });
        }
        Verdict::Applied
    }

    fn park(&mut self, fence: u64, version: u64, key: u64) -> bool {
        if fence != self.journal.fence && self.broken != Broken::JournalFence {
            return false;
        }
        if self.database.rows.get(&key) == Some(&version) {
            self.wrong(format!("{version} of key {key} becomes a dead letter, and the database has it"));
        }
        self.journal.dead.insert(version);
        let parked = self.journal.parked.entry(key).or_default();
        *parked = (*parked).max(version);
        true
    }

    fn finish(&mut self, fence: u64, upto: u64, made: &[(u64, u64)]) -> bool {
        if fence != self.journal.fence {
            return false;
        }
        self.journal.log.retain(|version, _| *version > upto);
        for (key, version) in made {
            let blind = self.broken == Broken::Clear;
            self.journal.dirty.retain(|dirty, held| dirty != key || (*held > *version && !blind));
            self.journal.parked.retain(|parked, held| parked != key || *held > *version);
        }
        true
    }

    /// What a relay does next, and what becomes of it.
    fn step(&mut self, me: usize) {
        self.arrive(me);
        if self.now < self.relays[me].asleep_until {
            return;
        }
        if self.chance(2) {
            // What it sent may still arrive; what it only meant to send does not.
            self.relays[me].drain = None;
            if self.broken == Broken::ParkLate {
                self.relays[me].late_park = None;
            }
            self.relays[me].asleep_until = self.now + self.random.u64(..60);
            return;
        }
        if self.renew(me) {
            self.ask(me);
        }
    }

    /// What was sent long ago.
    fn arrive(&mut self, me: usize) {
        if let Some((_, telling)) = self.relays[me].late.take_if(|(at, _)| *at <= self.now) {
            let _ = self.tell(&telling);
        }
        let waits = self.now < self.relays[me].asleep_until || (self.broken == Broken::ParkLate && self.chance(70));
        if let Some((fence, version, key)) = self.relays[me].late_park.take_if(|_| !waits) {
            self.park(fence, version, key);
        }
    }

    /// Claims the partition, or renews the claim. Whether it is `me` who has it.
    fn renew(&mut self, me: usize) -> bool {
        let now = self.now;
        match self.journal.claim {
            Some((holder, until)) if holder != me && until > now => {
                self.relays[me].drain = None;
                return false;
            }
            Some((holder, until)) if holder == me && until > now => {}
            _ => {
                self.journal.fence += 1;
                self.relays[me].drain = None;
            }
        }
        self.journal.claim = Some((me, now + CLAIM_LASTS));
        let fence = self.journal.fence;
        self.relays[me].drain.get_or_insert_with(|| Drain::new(fence));
        true
    }

    fn ask(&mut self, me: usize) {
        let Some(mut drain) = self.relays[me].drain.take() else { return };
        // The answer is lost, or the request.
        let (lost, trouble) = (self.chance(10), self.chance(10));
        if !trouble {
            self.answer(me, &mut drain, lost);
        }
        if !matches!(drain.next(), Ask::Nothing) {
            self.relays[me].drain = Some(drain);
        }
        if self.chance(4) {
            self.relays[me].asleep_until = self.now + self.random.u64(..120);
        }
    }

    fn answer(&mut self, me: usize, drain: &mut Drain, lost: bool) {
        let items = drain.batch().map(|batch| batch.items.clone()).unwrap_or_default();
        let of = |index: usize| (items[index].version, u64::from(items[index].key[0]));
        match drain.next() {
            Ask::Nothing | Ask::TellEach { .. } => {}
            Ask::Read => {
                let front = self.journal.log.iter().take(BATCH);
                let items = front.map(|(version, key)| Item { version: *version, key: vec![*key as u8], origin: 0 }).collect();
                let targets = vec![Target { name: "db".to_owned(), at_once: None }];
                drain.read(Batch { items, targets, through: 0 });
            }
            Ask::Take { least, .. } => {
                self.database.fence = (self.database.fence + 1).max(least);
                let Database { fence, position, .. } = self.database;
                if !lost {
                    self.relays[me].known = position;
                    drain.taken(Hold { fence, position });
                }
            }
            Ask::Parked(indices) => {
                let blind = self.broken == Broken::Parked;
                let parked = |index: &usize| self.journal.parked.get(&of(*index).1).copied().filter(|_| !blind);
                drain.parked_before(&indices.iter().map(parked).collect::<Vec<_>>());
            }
            Ask::Tell { fence, entries, .. } => {
                let told = |told: &Told| (of(told.index).0, of(told.index).1, told.at);
                let telling = Telling { fence, known: self.relays[me].known, entries: entries.iter().map(told).collect() };
                self.send(me, drain, telling, lost);
            }
            Ask::Park { index, .. } => {
                let (version, key) = of(index);
                let fence = drain.fence();
                if self.broken == Broken::ParkLate && self.relays[me].late_park.is_none() {
                    // It counts as done, and is done at the next step, unless the relay is gone by then.
                    self.relays[me].late_park = Some((fence, version, key)).filter(|_| !lost);
                    return drain.parked();
                }
                if self.chance(10) {
                    // It stands still with this on its way.
                    self.relays[me].late_park = Some((fence, version, key));
                    self.relays[me].asleep_until = self.now + self.random.u64(30..120);
                    return;
                }
                match self.park(fence, version, key) {
                    true if lost => {}
                    true => drain.parked(),
                    false => drain.fenced(),
                }
            }
            Ask::Finish { upto, made, .. } => {
                let made: Vec<_> = made.iter().map(|index| (of(*index).1, of(*index).0)).collect();
                match self.finish(drain.fence(), upto, &made) {
                    true if lost => {}
                    true => drain.finished(),
                    false => drain.fenced(),
                }
            }
        }
    }

    fn send(&mut self, me: usize, drain: &mut Drain, telling: Telling, lost: bool) {
        if self.chance(5) {
            // It stands still with this on its way.
            let asleep = self.random.u64(20..120);
            self.relays[me].late = Some((self.now + self.random.u64(..asleep), telling));
            self.relays[me].asleep_until = self.now + asleep;
            return;
        }
        let verdict = self.tell(&telling);
        let many = telling.entries.len() > 1;
        match verdict {
            _ if lost => {}
            Verdict::Applied => {
                self.relays[me].known = telling.entries.last().map_or(0, |(_, _, at)| *at).max(self.relays[me].known);
                drain.told();
            }
            Verdict::Fenced => drain.fenced(),
            Verdict::Refused if many && self.broken == Broken::Halving => {
                for (version, key, _) in &telling.entries {
                    self.park(drain.fence(), *version, *key);
                }
                drain.told();
            }
            Verdict::Refused => drain.refused("no"),
        }
    }

    /// What is not dirty is in the database as it was acknowledged last.
    fn look(&mut self) {
        for (key, versions) in self.written.clone() {
            let row = self.database.rows.get(&key).copied();
            if !self.journal.dirty.contains_key(&key) && row != versions.last().copied() {
                self.wrong(format!("key {key} is clean, and the database has {row:?} of {versions:?}"));
            }
        }
    }

    fn judge(&mut self) {
        if !self.journal.log.is_empty() {
            self.wrong(format!("{} entries are left", self.journal.log.len()));
        }
        for (key, versions) in self.written.clone() {
            let row = self.database.rows.get(&key).copied();
            let behind = versions.iter().copied().filter(|version| row.is_none_or(|row| row < *version));
            let lost: Vec<u64> = behind.filter(|version| !self.journal.dead.contains(version)).collect();
            if !lost.is_empty() {
                self.wrong(format!("key {key}: {lost:?} were acknowledged, and are neither made nor dead letters"));
            }
        }
        let dead: Vec<u64> = self.journal.dead.iter().copied().filter(|version| !self.poison.contains_key(version)).collect();
        if !dead.is_empty() {
            self.wrong(format!("{dead:?} are dead letters, and were never refused"));
        }
    }
}

/// Some trouble, then none until everything is drained. What was wrong.
fn run(seed: u64, broken: Broken) -> Option<String> {
    let mut world = World::new(seed, broken);
    while world.now < STEPS && world.wrong.is_none() {
        world.now += 1;
        if world.now < STEPS / 2 && world.chance(40) {
            world.write();
        }
        for me in 0..2 {
            if world.chance(60) {
                world.step(me);
            }
        }
        world.look();
    }
    // From here on nobody dies.
    for _ in 0..20 * STEPS {
        if world.wrong.is_some() || world.journal.log.is_empty() {
            break;
        }
        world.now += 1;
        world.arrive(0);
        world.arrive(1);
        world.relays[0].asleep_until = 0;
        if world.renew(0) {
            world.ask(0);
        }
        world.look();
    }
    world.judge();
    world.wrong
}

#[test]
fn nothing_is_lost_made_twice_or_out_of_order() {
    for seed in 0..10_000 {
        assert_eq!(run(seed, Broken::Nothing), None, "seed {seed}");
    }
}

#[test]
fn each_mechanism_is_missed() {
    for broken in
        [Broken::Fence, Broken::JournalFence, Broken::Position, Broken::Clear, Broken::Halving, Broken::Parked, Broken::ParkLate]
    {
        assert!((0..1_000).any(|seed| run(seed, broken).is_some()), "{broken:?} is not noticed");
    }
}
