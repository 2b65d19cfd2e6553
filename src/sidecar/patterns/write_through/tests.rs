//! Random histories of one key: sidecars that write, read and die at any step, an origin that commits when it likes within its bound.
//!
//! What must hold: a read gives nothing older than what was acknowledged before it began; and what the cache has is what the origin
//! has, whenever anybody could read it.

use super::model::{Broken, Key, Outcome, Time, Token, Value};

/// How long a transaction may take from its mark on.
const BOUND: Time = 60;
/// A mark outlasts it.
const MARK: Time = BOUND + 10;
const ACTORS: u64 = 9;
const STEPS: usize = 400;
const MOST: usize = 64;

#[derive(Debug, Clone, Copy)]
enum Actor {
    Idle,
    /// Its mark stands; the transaction may be committed until then.
    Marked {
        token: Token,
        until: Time,
        deletes: bool,
    },
    /// The origin has made it.
    Made {
        token: Token,
        value: Option<Value>,
        version: u64,
    },
    /// The origin refused it.
    Refused {
        token: Token,
    },
    /// Its sidecar is dead, or waits no longer: the transaction may still be committed until then.
    Gone {
        until: Time,
        deletes: bool,
    },
    /// It found nothing, and loads: with the right to store, or without.
    Loads {
        token: Option<Token>,
        floor: u64,
    },
    /// It has loaded.
    Loaded {
        token: Option<Token>,
        floor: u64,
        value: Option<Value>,
        version: u64,
    },
}

struct World {
    key: Key,
    random: fastrand::Rng,
    now: Time,
    next: Token,
    broken: Broken,
    /// Whether the origin tells versions.
    versioned: bool,
    /// What the origin has, and how often it changed.
    value: Option<Value>,
    version: u64,
    /// The latest version that was acknowledged.
    acknowledged: u64,
    actors: Vec<Actor>,
    /// At which version each value was stored.
    trace: Vec<String>,
    kept: u64,
}

impl World {
    fn new(seed: u64, broken: Broken) -> Self {
        let mut random = fastrand::Rng::with_seed(seed);
        let versioned = random.bool();
        let actors = vec![Actor::Idle; random.usize(2..=ACTORS as usize)];
        Self {
            key: Key::default(),
            random,
            now: 1,
            next: 1,
            broken,
            versioned,
            value: None,
            version: 0,
            acknowledged: 0,
            actors,
            trace: Vec::new(),
            kept: 0,
        }
    }

    fn token(&mut self) -> Token {
        self.next += 1;
        self.next
    }

    fn commit(&mut self, deletes: bool) {
        self.version += 1;
        self.value = (!deletes).then_some(self.version);
    }

    /// Plays a history. The error tells what is wrong.
    fn play(&mut self) -> Result<(), String> {
        for _ in 0..STEPS {
            self.now += self.random.u64(0..8);
            if self.random.u8(..) < 6 {
                (self.key.value, self.key.lease) = (None, None);
                self.trace.push("evicted".to_owned());
            }
            let at = self.random.usize(..self.actors.len());
            let before = self.actors[at];
            let after = self.step(before)?;
            self.trace.push(format!("{at} {before:?} -> {after:?}"));
            self.actors[at] = after;
            self.check()?;
        }
        Ok(())
    }

    /// What anybody could read now is what the origin has.
    fn check(&self) -> Result<(), String> {
        match self.key.value {
            Some(value) if Some(value) != self.value => Err(format!("the cache has {value}, the origin {:?}", self.value)),
            _ => Ok(()),
        }
    }

    fn step(&mut self, actor: Actor) -> Result<Actor, String> {
        Ok(match actor {
            Actor::Idle if self.random.bool() => {
                let (token, until) = (self.token(), self.now + MARK);
                let deletes = self.random.u8(..) < 64;
                if self.key.begin(token, self.now, until, MOST, self.broken) {
                    Actor::Marked { token, until: self.now + BOUND, deletes }
                } else {
                    Actor::Idle
                }
            }
            Actor::Idle => self.read()?,
            Actor::Marked { until, deletes, .. } if self.random.u8(..) < 24 => Actor::Gone { until, deletes },
            Actor::Marked { token, .. } if self.random.u8(..) < 24 => Actor::Refused { token },
            // The origin undoes what was not committed in time.
            Actor::Marked { token, until, .. } if self.now >= until => Actor::Refused { token },
            Actor::Marked { token, deletes, .. } => {
                self.commit(deletes);
                Actor::Made { token, value: self.value, version: self.version }
            }
            Actor::Made { .. } if self.random.u8(..) < 24 => Actor::Idle,
            Actor::Made { token, value, version } => {
                let told = self.versioned.then_some(version);
                let outcome = value.map_or(Outcome::Deleted, |value| Outcome::Stored(value, told));
                self.kept += u64::from(self.key.end(token, self.now, outcome, self.broken));
                self.acknowledged = self.acknowledged.max(version);
                Actor::Idle
            }
            Actor::Refused { token } => {
                self.key.end(token, self.now, Outcome::Refused, self.broken);
                Actor::Idle
            }
            Actor::Gone { until, deletes } => {
                if self.now < until && self.random.bool() {
                    self.commit(deletes);
                }
                Actor::Idle
            }
            Actor::Loads { token, floor } => Actor::Loaded { token, floor, value: self.value, version: self.version },
            Actor::Loaded { token, floor, value, version } => {
                if let Some(token) = token {
                    self.key.fill(token, value);
                }
                if version < floor {
                    return Err(format!("a read loaded version {version}, and {floor} was acknowledged before it began"));
                }
                Actor::Idle
            }
        })
    }

    fn read(&mut self) -> Result<Actor, String> {
        if let Some(value) = self.key.value {
            if value < self.acknowledged {
                return Err(format!("a read gave {value}, and version {} was acknowledged before", self.acknowledged));
            }
            return Ok(Actor::Idle);
        }
        let token = self.token();
        let leased = self.key.lease(token, self.now, self.broken);
        Ok(Actor::Loads { token: leased.then_some(token), floor: self.acknowledged })
    }
}

fn histories() -> u64 {
    std::env::var("HISTORIES").ok().and_then(|text| text.parse().ok()).unwrap_or(10_000)
}

#[test]
fn no_history_shows_an_older_value() {
    let mut kept = [0; 2];
    for seed in 0..histories() {
        let mut world = World::new(seed, Broken::Nothing);
        if let Err(wrong) = world.play() {
            panic!("seed {seed}: {wrong}\n{}", world.trace.join("\n"));
        }
        kept[usize::from(world.versioned)] += world.kept;
    }
    // Values are kept all the same, and more of them where the origin tells versions.
    assert!(kept[0] > histories() && kept[1] > kept[0], "{kept:?}");
}

#[test]
fn each_switch_is_noticed() {
    for broken in [
        Broken::Revocation,
        Broken::Removal,
        Broken::Mark,
        Broken::Overlap,
        Broken::Version,
        Broken::Lost,
        Broken::Own,
        Broken::Deletion,
    ] {
        let found = (0..histories()).find(|seed| World::new(*seed, broken).play().is_err());
        assert!(found.is_some(), "{broken:?} is not noticed");
    }
}
