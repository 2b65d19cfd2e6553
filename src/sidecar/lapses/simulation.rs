//! Sidecars that read and load keys whose rows change while nobody tells of it: slots are lost, and a relay finds that and reads on, again and again.
//!
//! From when the relay reads on, nothing is read that is older than what the database had as the slot was made anew. The cache is a map; answers of
//! it arrive whenever they like, and some sidecars cannot ask for a while. Each of the switches breaks one mechanism, and is caught.

use std::collections::HashMap;

use smallvec::smallvec;

use super::cleared::Cleared;
use super::{Footing, Mark, Marks};
use crate::sidecar::events::position::EntryId;
use crate::sidecar::versions::epoch::{Epoch, LEASE_MS};

const KEYS: usize = 3;
const SIDECARS: usize = 3;
const STEPS: usize = 600;
const HISTORIES: u64 = 2_000;

/// What is left out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Switch {
    Nothing,
    /// An answer is believed for ever.
    Lease,
    /// The relay reads on at once.
    Wait,
    /// Nothing is removed before it is read.
    Removal,
    /// A key that was removed for one lapse is not removed for the next.
    Next,
    /// A lapse counts as made up for as soon as its event is read.
    Walk,
    /// What is removed leaves loads the right to store.
    Leases,
    /// Who knows nothing believes that nothing was lost.
    Unknown,
    /// Who knows nothing removes a key once, however long that lasts.
    Renewal,
}

enum Pending {
    Answer {
        sidecar: usize,
        asked_at: u64,
        footing: Footing,
    },
    /// A key that goes before it is read.
    Removal {
        sidecar: usize,
        key: usize,
        marks: Marks,
        least: u64,
    },
    Read {
        key: usize,
        least: u64,
    },
    Store {
        key: usize,
        lease: u64,
        value: u64,
    },
}

/// What is left of a walk: first the leases of all keys, then their values.
type Walk = Vec<(bool, usize)>;

#[derive(Default)]
struct Sidecar {
    footing: Epoch<Footing>,
    cleared: Cleared,
    /// Until when no question of it is answered.
    dark_until: u64,
}

struct World {
    random: fastrand::Rng,
    switch: Switch,
    now: u64,
    origin: [u64; KEYS],
    values: HashMap<usize, u64>,
    leases: HashMap<usize, u64>,
    last_lease: u64,
    sidecars: [Sidecar; SIDECARS],
    pending: Vec<Pending>,
    /// The last lapse, that which was read, and that which was walked for.
    lapses: [u64; 3],
    walk: Option<Walk>,
    /// When the relay reads on, and what nothing may be older than from then.
    waits: Option<(u64, [u64; KEYS])>,
    least: [u64; KEYS],
}

impl World {
    fn new(seed: u64, switch: Switch) -> Self {
        Self {
            random: fastrand::Rng::with_seed(seed),
            switch,
            now: 0,
            origin: [1; KEYS],
            values: HashMap::new(),
            leases: HashMap::new(),
            last_lease: 0,
            sidecars: std::array::from_fn(|_| Sidecar::default()),
            pending: Vec::new(),
            lapses: [0; 3],
            walk: None,
            waits: None,
            least: [0; KEYS],
        }
    }

    fn step(&mut self) -> Result<(), String> {
        self.now += self.random.u64(..40);
        if let Some((_, least)) = self.waits.take_if(|(until, _)| *until <= self.now) {
            self.least = least;
        }
        let (sidecar, key) = (self.random.usize(..SIDECARS), self.random.usize(..KEYS));
        match self.random.u32(..1000) {
            0..250 => self.begin_read(sidecar, key),
            250..400 => self.ask(sidecar),
            400..440 => self.origin[key] += 1,
            440..446 => self.lose(),
            446..460 => self.read_event(),
            460..500 => self.walk_on(),
            500..504 => self.sidecars[sidecar].dark_until = self.now + self.random.u64(..4 * LEASE_MS),
            504..510 => drop(self.leases.remove(&key)),
            _ => return self.arrive(),
        }
        Ok(())
    }

    /// A relay finds the slot lost, has made another, and notes that.
    fn lose(&mut self) {
        if self.waits.is_some() {
            return;
        }
        self.lapses[0] += 1;
        let waits = if self.switch == Switch::Wait { 0 } else { LEASE_MS };
        self.waits = Some((self.now + waits, self.origin));
    }

    fn read_event(&mut self) {
        if self.lapses[1] < self.lapses[0] && self.walk.is_none() {
            self.lapses[1] = self.lapses[0];
            self.walk = Some([false, true].into_iter().flat_map(|values| (0..KEYS).map(move |key| (values, key))).collect());
        }
    }

    fn walk_on(&mut self) {
        let Some(walk) = &mut self.walk else { return };
        if walk.is_empty() {
            (self.walk, self.lapses[2]) = (None, self.lapses[1]);
            return;
        }
        match walk.remove(0) {
            (false, key) => drop(self.leases.remove(&key)),
            (true, key) => drop(self.values.remove(&key)),
        }
    }

    fn ask(&mut self, sidecar: usize) {
        if self.sidecars[sidecar].dark_until > self.now {
            return;
        }
        let [last, read, walked] = self.lapses;
        let done = if self.switch == Switch::Walk { read } else { walked };
        let footing = if done < last { Footing::Open(Mark::Lapse(EntryId::new(last, 0))) } else { Footing::Whole };
        let asked_at = if self.switch == Switch::Lease { u64::MAX / 2 } else { self.now };
        self.pending.push(Pending::Answer { sidecar, asked_at, footing });
    }

    /// What a sidecar takes its keys for.
    fn footing(&mut self, sidecar: usize) -> Footing {
        let (now, random, footing) = (self.now, &mut self.random, &mut self.sidecars[sidecar].footing);
        let is_known = footing.known(now).is_some();
        match self.switch {
            Switch::Unknown if !is_known => Footing::Whole,
            Switch::Renewal if !is_known => Footing::Open(Mark::Lapse(EntryId::default())),
            _ => footing.current(now, || random.u64(..)),
        }
    }

    fn begin_read(&mut self, sidecar: usize, key: usize) {
        let (footing, least) = (self.footing(sidecar), self.least[key]);
        let marks: Marks = match footing {
            Footing::Open(mark) if self.switch != Switch::Removal => smallvec![mark],
            _ => Marks::new(),
        };
        let cleared = &self.sidecars[sidecar].cleared;
        let is_cleared = match self.switch {
            Switch::Next => {
                (0..=self.lapses[0]).any(|lapse| cleared.has(0, &[key as u8], &[Mark::Lapse(EntryId::new(lapse, 0))]))
            }
            _ => cleared.has(0, &[key as u8], &marks),
        };
        self.pending.push(match marks.is_empty() || is_cleared {
            true => Pending::Read { key, least },
            false => Pending::Removal { sidecar, key, marks, least },
        });
    }

    /// Something that is on its way arrives.
    fn arrive(&mut self) -> Result<(), String> {
        if self.pending.is_empty() {
            return Ok(());
        }
        match self.pending.swap_remove(self.random.usize(..self.pending.len())) {
            Pending::Answer { sidecar, asked_at, footing } => self.sidecars[sidecar].footing.heard(asked_at, footing),
            Pending::Removal { sidecar, key, marks, least } => {
                self.values.remove(&key);
                if self.switch != Switch::Leases {
                    self.leases.remove(&key);
                }
                self.sidecars[sidecar].cleared.note(0, std::iter::once((vec![key as u8], marks)));
                self.pending.push(Pending::Read { key, least });
            }
            Pending::Read { key, least } => match self.values.get(&key) {
                Some(value) if *value < least => return Err(format!("{key} is {value}, and {least} was demanded")),
                Some(_) => {}
                None => self.load(key),
            },
            Pending::Store { key, lease, value } => {
                if self.leases.get(&key) == Some(&lease) {
                    self.leases.remove(&key);
                    self.values.insert(key, value);
                }
            }
        }
        Ok(())
    }

    /// Who gets the lease loads.
    fn load(&mut self, key: usize) {
        if self.leases.contains_key(&key) {
            return;
        }
        self.last_lease += 1;
        self.leases.insert(key, self.last_lease);
        self.pending.push(Pending::Store { key, lease: self.last_lease, value: self.origin[key] });
    }
}

/// The first history that breaks the promise.
fn broken(switch: Switch) -> Option<(u64, String)> {
    (0..HISTORIES).find_map(|seed| {
        let mut world = World::new(seed, switch);
        (0..STEPS).find_map(|_| world.step().err()).map(|error| (seed, error))
    })
}

#[test]
fn nothing_is_read_that_is_older_than_a_slot_that_was_made_anew() {
    assert_eq!(broken(Switch::Nothing), None);
}

#[test]
fn without_any_of_its_mechanisms_something_is() {
    for switch in [
        Switch::Lease,
        Switch::Wait,
        Switch::Removal,
        Switch::Next,
        Switch::Walk,
        Switch::Leases,
        Switch::Unknown,
        Switch::Renewal,
    ] {
        assert!(broken(switch).is_some(), "{switch:?} is not caught");
    }
}
