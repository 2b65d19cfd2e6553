//! Figures of one rule: how often its leads are filled, and how long a load takes.

use super::Millis;
use super::load_times::LoadTimes;

/// A rule that is off tries again after this.
pub const DISARMED_MS: Millis = 60_000;
/// How many of the last leads are looked at.
const LEADS: u32 = u64::BITS;
/// A load's time until one is measured.
pub const FIRST_LOAD_MS: f64 = 50.0;
/// So many loads' time a read waits over the connection that loads its key.
const OWN_WAIT_LOADS: f64 = 3.0;
/// But at least this.
const LEAST_OWN_WAIT_MS: Millis = 50;
/// After so many such waits in vain, one after the other, there are none for [`DISARMED_MS`].
const MOST_IN_VAIN: u8 = 3;
/// However little time loads take, a read waits at least this, where its rule allows: loads that suddenly take longer shall not turn
/// into errors.
pub const LEAST_WAIT_MS: Millis = 250;
/// How much a new measurement counts.
const WEIGHT: f64 = 0.1;

/// The figures.
#[derive(Debug, Clone)]
pub struct Rates {
    /// A bit for each of the last leads, the youngest lowest: whether it was filled.
    filled: u64,
    leads: u32,
    disarmed_until: Millis,
    load_ms: f64,
    measured: bool,
    times: LoadTimes,
    /// Own waits in vain since the last that was not.
    in_vain: u8,
    no_own_wait_until: Millis,
}

impl Default for Rates {
    fn default() -> Self {
        Self {
            filled: 0,
            leads: 0,
            disarmed_until: 0,
            load_ms: FIRST_LOAD_MS,
            measured: false,
            times: LoadTimes::default(),
            in_vain: 0,
            no_own_wait_until: 0,
        }
    }
}

impl Rates {
    /// Whether the rule leases.
    pub fn is_armed(&self, now: Millis) -> bool {
        now >= self.disarmed_until
    }

    /// The mean time from the holder's nil to its fill, in milliseconds.
    #[inline]
    pub fn load_ms(&self) -> f64 {
        self.load_ms
    }

    /// How long 99 of 100 loads took of late, where enough are known.
    pub fn load_p99(&self, now: Millis) -> Option<Millis> {
        self.times.p99(now)
    }

    /// For how long a read waits where nobody has said how long: twice as long as 99 of 100 loads take, as far as that is known, but
    /// at least [`LEAST_WAIT_MS`], and at most `most`.
    pub fn wait(&self, most: Millis, now: Millis) -> Millis {
        self.load_p99(now).map_or(most, |p99| (2 * p99).max(LEAST_WAIT_MS).min(most))
    }

    /// What a load brought has been stored, so long after the nil.
    pub fn loaded(&mut self, took: Millis, now: Millis) {
        self.times.add(took, now);
    }

    /// For how long a read waits that comes over the connection that loads its key: three times the time of a load, as far as that is
    /// known, and at most `wait`. `None`: not at all, since of late nothing came of it. Its clients have given their loads up, or
    /// need the connection to store what they loaded.
    pub fn own_wait(&self, wait: Millis, now: Millis) -> Option<Millis> {
        let measured = || ((self.load_ms * OWN_WAIT_LOADS) as Millis).max(LEAST_OWN_WAIT_MS);
        let own_wait = if self.measured { measured() } else { wait / 2 };
        (now >= self.no_own_wait_until).then_some(own_wait.min(wait))
    }

    /// A read over the connection that loads its key was given what was loaded.
    pub fn own_wait_served(&mut self) {
        self.in_vain = 0;
    }

    /// One was not.
    pub fn own_wait_in_vain(&mut self, now: Millis) {
        self.in_vain += 1;
        if self.in_vain >= MOST_IN_VAIN {
            (self.in_vain, self.no_own_wait_until) = (0, now + DISARMED_MS);
        }
    }

    /// Counts a lead that a SET followed, whether it was stored or not: the clients do fill. `took`: how long the load took, where
    /// that is known.
    pub fn filled(&mut self, took: Option<Millis>) {
        if let Some(took) = took.map(|took| took as f64) {
            self.load_ms = if self.measured { self.load_ms + WEIGHT * (took - self.load_ms) } else { took };
            self.measured = true;
        }
        self.count(true);
    }

    /// Counts a lead that was not. Returns until when the rule is off, where that was one too many.
    pub fn unfilled(&mut self, now: Millis) -> Option<Millis> {
        self.count(false);
        if self.leads < LEADS || self.filled.count_ones() * 2 >= LEADS {
            return None;
        }
        (self.filled, self.leads) = (0, 0);
        self.disarmed_until = now + DISARMED_MS;
        Some(self.disarmed_until)
    }

    fn count(&mut self, filled: bool) {
        self.filled = self.filled << 1 | u64::from(filled);
        self.leads = (self.leads + 1).min(LEADS);
    }
}

/// The figures of each rule that has any, by the rule's position.
#[derive(Debug, Clone, Default)]
pub struct RatesByRule(Vec<Rates>);

impl RatesByRule {
    /// Those of a rule, if it is known or comes before one that is.
    #[inline]
    pub fn get(&self, rule: u16) -> Option<&Rates> {
        self.0.get(usize::from(rule))
    }

    /// Those of a rule, which begin here.
    pub fn of(&mut self, rule: u16) -> &mut Rates {
        let at = usize::from(rule);
        if at >= self.0.len() {
            self.0.resize_with(at + 1, Rates::default);
        }
        &mut self.0[at]
    }

    /// Forgets all.
    pub fn clear(&mut self) {
        self.0.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rule_whose_leads_are_seldom_filled_is_off_for_a_while() {
        let mut rates = Rates::default();
        (0..63).for_each(|_| assert_eq!(rates.unfilled(5), None));
        assert!(rates.is_armed(5));
        assert_eq!(rates.unfilled(5), Some(60_005));
        assert!(!rates.is_armed(60_004));
        assert!(rates.is_armed(60_005));
        assert_eq!(rates.unfilled(60_005), None, "it gets a fair trial");
    }

    #[test]
    fn every_second_fill_is_enough() {
        let mut rates = Rates::default();
        for _ in 0..1_000 {
            rates.filled(Some(10));
            assert_eq!(rates.unfilled(5), None);
        }
    }

    #[test]
    fn a_read_waits_for_its_own_connection_as_long_as_something_comes_of_it() {
        let mut rates = Rates::default();
        assert_eq!(rates.own_wait(1_000, 5), Some(500), "nothing is measured");
        rates.filled(Some(2));
        assert_eq!(rates.own_wait(1_000, 5), Some(50));
        rates.filled(Some(1_000));
        assert_eq!(rates.own_wait(1_000, 5), Some(305));
        assert_eq!(rates.own_wait(100, 5), Some(100));
        for _ in 0..10 {
            rates.own_wait_in_vain(5);
            rates.own_wait_in_vain(5);
            rates.own_wait_served();
        }
        assert!(rates.own_wait(100, 5).is_some());
        (0..3).for_each(|_| rates.own_wait_in_vain(5));
        assert_eq!((rates.own_wait(100, 60_004), rates.own_wait(100, 60_005)), (None, Some(100)));
    }

    #[test]
    fn a_wait_of_which_nothing_is_said_follows_what_loads_take() {
        let after = |took: Millis, loads: u32| {
            let mut rates = Rates::default();
            (0..loads).for_each(|_| rates.loaded(took, 5));
            rates.wait(1_000, 5)
        };
        assert_eq!((after(20, 0), after(20, 99), after(20, 100)), (1_000, 1_000, LEAST_WAIT_MS));
        assert!((400..=450).contains(&after(200, 100)));
        assert_eq!(after(900, 100), 1_000);
        let mut rates = Rates::default();
        (0..500).for_each(|_| rates.loaded(20, 5));
        assert_eq!(rates.wait(100, 5), 100, "never more than the most");
        (0..3).for_each(|_| rates.loaded(400, 5));
        assert!(rates.wait(1_000, 5) >= 800, "loads that take longer show at once");
    }

    #[test]
    fn a_load_takes_what_it_took_lately() {
        let mut rates = Rates::default();
        assert_eq!(rates.load_ms(), 50.0);
        rates.filled(Some(200));
        assert_eq!(rates.load_ms(), 200.0);
        (0..100).for_each(|_| rates.filled(Some(20)));
        assert!((rates.load_ms() - 20.0).abs() < 1.0);
    }
}
