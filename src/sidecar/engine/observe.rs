//! What leases would have done, told from traffic that they did not touch.
//!
//! A policy that only observes changes no byte. What its rules would do is read off the commands that pass: of the misses of one
//! key, the first would have been asked to load, and the others would have waited for it, or been given a stale copy; a SET would
//! have been stored, or not, by the rules of [`Misses`]. Since nobody really waits, those others load and store as well: their SETs
//! would not have been sent, and do not count.
//!
//! Only this pod's traffic is seen, so several pods together save more loads than their sum says, and find more fills ambiguous.
//! Keys are known by their hashes, and as many of them as fit: what is forgotten is predicted as if it had never been.

use std::collections::VecDeque;

use rustc_hash::FxHashMap;

use super::lease::misses::Misses;
use super::lease::rates::FIRST_LOAD_MS;
use super::lease::{Generation, Millis, Rule, Verdict};

/// The most keys that are remembered; then the one that missed first is forgotten.
pub const MOST_KEYS: usize = 16_384;
/// The most misses that are remembered beside those that would lead, over all keys.
pub const MOST_FOLLOWERS: usize = 65_536;

/// What would have become of a miss.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Missed {
    /// Whether it would have been answered from another client's load.
    pub saved: bool,
    /// How many clients load the key at once, this one among them.
    pub at_once: u64,
}

/// What would have become of a SET.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stored {
    /// It would not have been sent: its client would have been answered without a load.
    Unsent,
    /// It would have been stored, as an update.
    Update,
    /// It would have been stored, as the fill of a miss.
    Fill,
    /// It could not have been told from an outdated one: the key would have been removed.
    Ambiguous,
}

/// What is remembered of one key.
#[derive(Debug, Default)]
struct Key {
    /// Of those who would have been asked to load.
    misses: Misses,
    /// The generation of their lease. `None`: something was written since.
    generation: Option<Generation>,
    /// Who would hold it, and until when.
    holder: u64,
    until: Millis,
    /// Who would have waited, and since when, oldest first.
    followers: VecDeque<(u64, Millis)>,
}

/// The keys that were missed.
#[derive(Debug, Default)]
pub struct Forecast {
    keys: FxHashMap<u64, Key>,
    /// In the order in which they came.
    order: VecDeque<u64>,
    /// Which keys a connection would hold the lease of: at most one is remembered.
    holders: FxHashMap<u64, u64>,
    followers: usize,
    generations: u64,
}

impl Forecast {
    /// A read of the key with hash `hash` found nothing.
    pub fn missed(&mut self, hash: u64, connection: u64, rule: &Rule, now: Millis) -> Missed {
        self.generations += 1;
        let fresh = Generation { random: self.generations, run: 0 };
        let key = self.key(hash);
        let before = key.followers.len();
        while key.followers.front().is_some_and(|(_, since)| since + rule.lease <= now) {
            key.followers.pop_front();
        }
        let mut change = key.followers.len().cast_signed() - before.cast_signed();
        let saved = now < key.until && key.holder != connection;
        if saved {
            key.followers.push_back((connection, now));
            change += 1;
        } else {
            let generation = *key.generation.get_or_insert(fresh);
            key.misses.add(connection, Some(generation), rule, now);
            (key.holder, key.until) = (connection, now + rule.lease);
        }
        let at_once = 1 + key.followers.len() as u64;
        if !saved {
            self.holders.insert(connection, hash);
        }
        self.followers = self.followers.saturating_add_signed(change);
        self.bound();
        Missed { saved, at_once }
    }

    /// A SET of the key arrived.
    pub fn stored(&mut self, hash: u64, connection: u64, rule: &Rule, now: Millis) -> Stored {
        let Some(key) = self.keys.get_mut(&hash) else { return Stored::Update };
        if key.holder != connection
            && let Some(place) = key.followers.iter().position(|(follower, _)| *follower == connection)
        {
            key.followers.remove(place);
            self.followers -= 1;
            return Stored::Unsent;
        }
        let verdict = key.misses.judge(connection, rule, FIRST_LOAD_MS, now);
        key.misses.end_one(connection, rule, verdict, now);
        let valid = key.generation.take();
        (key.holder, key.until) = (0, 0);
        match verdict {
            Verdict::Update => Stored::Update,
            Verdict::Fill(generation) if Some(generation) == valid => Stored::Fill,
            Verdict::Fill(_) | Verdict::Ambiguous(_) => Stored::Ambiguous,
        }
    }

    /// The key was written by something else than a SET, deleted or invalidated.
    pub fn changed(&mut self, hash: u64) {
        if let Some(key) = self.keys.get_mut(&hash) {
            key.generation = None;
            (key.holder, key.until) = (0, 0);
        }
    }

    /// A connection is gone: somebody else would load what it led.
    pub fn closed(&mut self, connection: u64) {
        let led = self.holders.remove(&connection).and_then(|hash| self.keys.get_mut(&hash));
        if let Some(key) = led.filter(|key| key.holder == connection) {
            (key.holder, key.until) = (0, 0);
        }
    }

    fn key(&mut self, hash: u64) -> &mut Key {
        let order = &mut self.order;
        self.keys.entry(hash).or_insert_with(|| {
            order.push_back(hash);
            Key::default()
        })
    }

    /// Forgets the oldest keys, where there are too many of them or of what they remember.
    fn bound(&mut self) {
        while self.order.len() > MOST_KEYS || self.followers > MOST_FOLLOWERS {
            let Some(key) = self.order.pop_front().and_then(|oldest| self.keys.remove(&oldest)) else { return };
            self.followers -= key.followers.len();
        }
        if self.holders.len() > MOST_KEYS {
            self.holders.clear();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RULE: Rule = Rule::new(0, 3000, 1000);
    const KEY: u64 = 7;

    fn led(at_once: u64) -> Missed {
        Missed { saved: false, at_once }
    }

    fn saved(at_once: u64) -> Missed {
        Missed { saved: true, at_once }
    }

    #[test]
    fn of_a_stampede_one_load_would_be_left() {
        let mut forecast = Forecast::default();
        assert_eq!(forecast.missed(KEY, 1, &RULE, 0), led(1));
        for client in 2..=1000 {
            assert_eq!(forecast.missed(KEY, client, &RULE, 5), saved(client));
        }
        // All of them load, and store what they loaded: only the first would have.
        for client in (2..=1000).rev() {
            assert_eq!(forecast.stored(KEY, client, &RULE, 100), Stored::Unsent);
        }
        assert_eq!(forecast.stored(KEY, 1, &RULE, 100), Stored::Fill);
        assert_eq!(forecast.followers, 0);
        assert_eq!(forecast.missed(KEY, 5, &RULE, 5000), led(1));
    }

    #[test]
    fn a_holder_that_is_silent_or_gone_is_succeeded() {
        let mut forecast = Forecast::default();
        assert_eq!(forecast.missed(KEY, 1, &RULE, 0), led(1));
        assert_eq!(forecast.missed(KEY, 2, &RULE, 2999), saved(2));
        assert_eq!(forecast.missed(KEY, 3, &RULE, 3000), led(2));
        forecast.closed(3);
        assert_eq!(forecast.missed(KEY, 4, &RULE, 3001), led(2));
        // Nothing was written: the first one's late fill is as good as any.
        assert_eq!(forecast.stored(KEY, 1, &RULE, 4000), Stored::Fill);
    }

    #[test]
    fn a_late_fill_is_seen() {
        let mut forecast = Forecast::default();
        forecast.missed(KEY, 1, &RULE, 0);
        forecast.changed(KEY);
        assert_eq!(forecast.stored(KEY, 1, &RULE, 500), Stored::Ambiguous);
        // Two loads, of which one began before the deletion, and either may be the SET's.
        forecast.missed(KEY, 1, &RULE, 1000);
        forecast.changed(KEY);
        assert_eq!(forecast.missed(KEY, 2, &RULE, 1100), led(1));
        assert_eq!(forecast.stored(KEY, 3, &RULE, 1150), Stored::Ambiguous);
    }

    #[test]
    fn a_set_behind_a_fill_is_an_update() {
        let mut forecast = Forecast::default();
        assert_eq!(forecast.stored(KEY, 1, &RULE, 0), Stored::Update);
        forecast.missed(KEY, 1, &RULE, 0);
        assert_eq!(forecast.stored(KEY, 1, &RULE, 10), Stored::Fill);
        assert_eq!(forecast.stored(KEY, 2, &RULE, 5000), Stored::Update);
    }

    #[test]
    fn memory_is_bounded() {
        let mut forecast = Forecast::default();
        let mut random = fastrand::Rng::with_seed(1);
        for now in 0..200_000 {
            // Few keys with many followers, and many keys with none.
            let hash = if random.bool() { random.u64(0..4) } else { random.u64(..) };
            match random.u8(0..20) {
                0 => drop(forecast.stored(hash, random.u64(1..200_000), &RULE, now / 100)),
                1 => forecast.closed(random.u64(1..200_000)),
                _ => drop(forecast.missed(hash, random.u64(1..200_000), &RULE, now / 100)),
            }
        }
        assert!(forecast.keys.len() == MOST_KEYS && forecast.order.len() == forecast.keys.len());
        assert!(forecast.followers <= MOST_FOLLOWERS && forecast.holders.len() <= MOST_KEYS);
        let counted: usize = forecast.keys.values().map(|key| key.followers.len()).sum();
        assert_eq!(counted, forecast.followers);
    }
}
