//! Figures of one rule: how often its leads are filled, and how long a load takes.

use super::Millis;

/// A rule that is off tries again after this.
pub const DISARMED_MS: Millis = 60_000;
/// How many of the last leads are looked at.
const LEADS: u32 = u64::BITS;
/// A load's time until one is measured.
pub const FIRST_LOAD_MS: f64 = 50.0;
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
}

impl Default for Rates {
    fn default() -> Self {
        Self { filled: 0, leads: 0, disarmed_until: 0, load_ms: FIRST_LOAD_MS, measured: false }
    }
}

impl Rates {
    /// Whether the rule leases.
    pub fn is_armed(&self, now: Millis) -> bool {
        now >= self.disarmed_until
    }

    /// The mean time from the holder's nil to its fill, in milliseconds.
    pub fn load_ms(&self) -> f64 {
        self.load_ms
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
    fn a_load_takes_what_it_took_lately() {
        let mut rates = Rates::default();
        assert_eq!(rates.load_ms(), 50.0);
        rates.filled(Some(200));
        assert_eq!(rates.load_ms(), 200.0);
        (0..100).for_each(|_| rates.filled(Some(20)));
        assert!((rates.load_ms() - 20.0).abs() < 1.0);
    }
}
