//! Three relays, one queue, in simulated time: relays stand still and die at every step, and what they send to the cache, and it to them, arrives
//! late.
//!
//! Held to: never are more loads at the origin than there may be, whoever began them; no request is loaded twice; and where nobody stands
//! still or dies, each is loaded before its sidecar gives up.

use std::collections::VecDeque;
use std::time::Duration;

use tokio::time::Instant;

use super::hold::Hold;

const RELAYS: usize = 3;
const AT_ONCE: usize = 2;
const CLAIM: u64 = 2_000;
const TIMEOUT: u64 = 1_000;
/// Of simulated time, in milliseconds; one tick is so long.
const LASTS: u64 = 120_000;
const TICK: u64 = 20;

/// What is broken, to show that this simulation would notice.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Broken {
    Nothing,
    /// What is under way is not counted.
    UnderWay,
    /// A load may take its whole time, whatever is left of the claim.
    Deadline,
    /// The claim is thought to last from when its answer came.
    Asked,
    /// The cache gives everybody what they claim.
    Claim,
}

#[derive(Debug, Clone, Copy)]
enum Message {
    Claim { asked: u64, lasts: u64 },
    Take { room: usize },
}

#[derive(Debug, Clone)]
enum Answer {
    Claimed { asked: u64, lasts: u64, is_ours: bool },
    Taken(Vec<(u64, u64)>),
    Lost,
}

/// Where a relay's exchange with the cache is: one at a time.
#[derive(Debug, Clone)]
enum Exchange {
    None,
    /// On its way to the cache, until then.
    Sent(u64, Message),
    /// On its way back.
    Answered(u64, Answer),
}

#[derive(Debug)]
struct Relay {
    token: u64,
    hold: Hold,
    exchange: Exchange,
    asleep_until: u64,
    /// Of what it began, until when each is at the origin.
    under_way: Vec<u64>,
}

#[derive(Debug, Default)]
struct Cache {
    claim: Option<(u64, u64)>,
    /// Until when each request is waited for, and its number.
    queue: VecDeque<(u64, u64)>,
}

#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
struct Seen {
    pushed: u64,
    loaded: u64,
    takeovers: u64,
    /// Ticks in which all connections were in use.
    full: u64,
}

struct World {
    start: Instant,
    random: fastrand::Rng,
    broken: Broken,
    faults: bool,
    cache: Cache,
    relays: Vec<Relay>,
    /// Loads of relays that died: the origin ends them in time.
    orphans: Vec<u64>,
    loaded: Vec<bool>,
    tokens: u64,
    seen: Seen,
}

impl World {
    fn new(seed: u64, broken: Broken, faults: bool) -> Self {
        let mut world = Self {
            start: Instant::now(),
            random: fastrand::Rng::with_seed(seed),
            broken,
            faults,
            cache: Cache::default(),
            relays: Vec::new(),
            orphans: Vec::new(),
            loaded: Vec::new(),
            tokens: 0,
            seen: Seen::default(),
        };
        for _ in 0..RELAYS {
            let relay = world.relay(0);
            world.relays.push(relay);
        }
        world
    }

    fn relay(&mut self, now: u64) -> Relay {
        self.tokens += 1;
        let hold = Hold::new(self.at(now), Duration::from_millis(CLAIM));
        Relay { token: self.tokens, hold, exchange: Exchange::None, asleep_until: now, under_way: Vec::new() }
    }

    fn at(&self, now: u64) -> Instant {
        self.start + Duration::from_millis(now)
    }

    fn millis(&self, at: Instant) -> u64 {
        u64::try_from(at.duration_since(self.start).as_millis()).unwrap_or(u64::MAX)
    }

    /// How long a message takes: mostly no time, and now and then very long.
    fn delay(&mut self) -> u64 {
        let longest = if self.faults && self.random.u8(..) < 8 { 3 * CLAIM } else { 30 };
        self.random.u64(0..longest)
    }

    fn run(mut self) -> Result<Seen, String> {
        for now in (0..LASTS).step_by(TICK as usize) {
            self.orphans.retain(|ends| *ends > now);
            self.relays.iter_mut().for_each(|relay| relay.under_way.retain(|ends| *ends > now));
            if self.random.u8(..) < 40 {
                self.cache.queue.push_back((now + TIMEOUT, self.seen.pushed));
                self.seen.pushed += 1;
                self.loaded.push(false);
            }
            for at in 0..RELAYS {
                self.disturb(at, now);
                self.serve(at, now);
                if self.relays[at].asleep_until <= now {
                    self.step(at, now)?;
                }
            }
            let busy = self.orphans.len() + self.relays.iter().map(|relay| relay.under_way.len()).sum::<usize>();
            if busy > AT_ONCE {
                return Err(format!("at {now} ms {busy} loads are at the origin, and {AT_ONCE} may be"));
            }
            self.seen.full += u64::from(busy == AT_ONCE);
        }
        self.seen.loaded = self.loaded.iter().filter(|loaded| **loaded).count() as u64;
        Ok(self.seen)
    }

    fn disturb(&mut self, at: usize, now: u64) {
        if !self.faults || self.relays[at].asleep_until > now {
            return;
        }
        match self.random.u16(..) {
            0..60 => self.relays[at].asleep_until = now + self.random.u64(0..3 * CLAIM),
            60..80 => {
                let fresh = self.relay(now);
                let dead = std::mem::replace(&mut self.relays[at], fresh);
                self.orphans.extend(dead.under_way);
            }
            _ => {}
        }
    }

    /// The cache's part: it works also where a relay stands still.
    fn serve(&mut self, at: usize, now: u64) {
        let Exchange::Sent(arrives, message) = self.relays[at].exchange else { return };
        if arrives > now {
            return;
        }
        let token = self.relays[at].token;
        let holder = self.cache.claim.filter(|(_, ends)| *ends > now).map(|(holder, _)| holder);
        let answer = match message {
            Message::Claim { asked, lasts } => {
                let is_ours = holder.is_none_or(|holder| holder == token) || self.broken == Broken::Claim;
                if is_ours {
                    self.seen.takeovers += u64::from(self.cache.claim.is_some_and(|(last, _)| last != token));
                    self.cache.claim = Some((token, now + lasts));
                }
                Answer::Claimed { asked, lasts, is_ours }
            }
            Message::Take { .. } if holder != Some(token) && self.broken != Broken::Claim => Answer::Lost,
            Message::Take { room } => {
                let mut taken = Vec::new();
                while taken.len() < room
                    && let Some((ends, number)) = self.cache.queue.pop_front()
                {
                    if ends > now {
                        taken.push((ends - now, number));
                    }
                }
                Answer::Taken(taken)
            }
        };
        self.relays[at].exchange = Exchange::Answered(now + self.delay(), answer);
    }

    fn step(&mut self, at: usize, now: u64) -> Result<(), String> {
        match std::mem::replace(&mut self.relays[at].exchange, Exchange::None) {
            Exchange::Answered(arrives, answer) if arrives <= now => self.heed(at, now, answer)?,
            Exchange::None => {}
            waiting => {
                self.relays[at].exchange = waiting;
                return Ok(());
            }
        }
        let (clock, timeout) = (self.at(now), Duration::from_millis(TIMEOUT));
        let relay = &self.relays[at];
        let under_way = if self.broken == Broken::UnderWay { 0 } else { relay.under_way.len() };
        let room = relay.hold.room(clock, timeout, AT_ONCE, under_way);
        let message = if clock >= relay.hold.due() {
            let lasts = u64::try_from(relay.hold.lasts(timeout).as_millis()).unwrap_or(u64::MAX);
            Message::Claim { asked: now, lasts }
        } else if room > 0 {
            Message::Take { room }
        } else {
            return Ok(());
        };
        let arrives = now + self.delay();
        self.relays[at].exchange = Exchange::Sent(arrives, message);
        Ok(())
    }

    fn heed(&mut self, at: usize, now: u64, answer: Answer) -> Result<(), String> {
        let clock = self.at(now);
        match answer {
            Answer::Claimed { asked, lasts, is_ours } => {
                let asked = if self.broken == Broken::Asked { clock } else { self.at(asked) };
                let relay = &mut self.relays[at];
                if relay.hold.is_ours() && !is_ours {
                    relay.under_way.clear();
                }
                relay.hold.answered(asked, Duration::from_millis(lasts), is_ours);
            }
            Answer::Lost => {
                let relay = &mut self.relays[at];
                relay.hold.lost(clock);
                relay.under_way.clear();
            }
            Answer::Taken(requests) => {
                for (left, number) in requests {
                    let deadline = match self.broken {
                        Broken::Deadline => Some(clock + Duration::from_millis(left)),
                        _ => self.relays[at].hold.deadline(clock, Duration::from_millis(left)),
                    };
                    let Some(deadline) = deadline else { continue };
                    let takes = if self.faults { self.random.u64(0..TIMEOUT * 2) } else { self.random.u64(0..100) };
                    let ends = self.millis(deadline).min(now + takes);
                    self.relays[at].under_way.push(ends);
                    let loaded = &mut self.loaded[number as usize];
                    if std::mem::replace(loaded, true) {
                        return Err(format!("request {number} was loaded twice"));
                    }
                }
            }
        }
        Ok(())
    }
}

#[test]
fn relays_together_never_load_more_at_once_than_they_may() {
    let mut sum = Seen::default();
    for seed in 0..300 {
        let seen = World::new(seed, Broken::Nothing, true).run().unwrap_or_else(|error| panic!("seed {seed}: {error}"));
        sum.loaded += seen.loaded;
        sum.takeovers += seen.takeovers;
        sum.full += seen.full;
    }
    assert!(sum.loaded > 30_000 && sum.takeovers > 1_000 && sum.full > 10_000, "it shows nothing: {sum:?}");
}

#[test]
fn all_requests_are_loaded_where_nothing_stands_still() {
    for seed in 0..50 {
        let seen = World::new(seed, Broken::Nothing, false).run().unwrap_or_else(|error| panic!("seed {seed}: {error}"));
        // What was pushed last may still wait.
        assert!(seen.loaded + 20 >= seen.pushed && seen.pushed > 500, "seed {seed}: {seen:?}");
    }
}

#[test]
fn each_mechanism_is_missed_where_it_is_broken() {
    for broken in [Broken::UnderWay, Broken::Deadline, Broken::Asked, Broken::Claim] {
        let is_caught = (0..300).any(|seed| World::new(seed, broken, true).run().is_err());
        assert!(is_caught, "{broken:?} is not noticed");
    }
}
