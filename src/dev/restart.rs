//! When a process that ended may start again.

use std::time::{Duration, Instant};

const FIRST_DELAY: Duration = Duration::from_millis(100);
const LONGEST_DELAY: Duration = Duration::from_secs(10);
/// A process that lived this long starts over with the first delay.
const STABLE_AFTER: Duration = Duration::from_secs(20);

/// The history of one process. The delay doubles with each quick end, and chance varies it.
#[derive(Debug, Default)]
pub struct Restarts {
    started: Option<Instant>,
    answered: bool,
    quick_ends: u32,
    failed_starts: u32,
    not_before: Option<Instant>,
}

impl Restarts {
    /// Whether it may start now.
    pub fn may_start(&self) -> bool {
        self.not_before.is_none_or(|time| Instant::now() >= time)
    }

    /// It was started.
    pub fn started(&mut self) {
        (self.started, self.answered) = (Some(Instant::now()), false);
    }

    /// It answered.
    pub fn answered(&mut self) {
        (self.answered, self.failed_starts) = (true, 0);
    }

    /// It ended.
    pub fn ended(&mut self) {
        if !self.answered {
            self.failed_starts += 1;
        }
        let stable = self.started.is_some_and(|started| started.elapsed() >= STABLE_AFTER);
        self.quick_ends = if stable { 0 } else { self.quick_ends + 1 };
        let delay = FIRST_DELAY.saturating_mul(1 << self.quick_ends.min(10)).min(LONGEST_DELAY);
        self.not_before = Some(Instant::now() + delay.mul_f64(0.5 + fastrand::f64() / 2.0));
    }

    /// How often in a row it ended without ever having answered.
    pub fn failed_starts(&self) -> u32 {
        self.failed_starts
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quick_ends_wait_longer_and_within_bounds() {
        let mut restarts = Restarts::default();
        assert!(restarts.may_start());
        for end in 1..30 {
            restarts.started();
            restarts.ended();
            assert_eq!(restarts.failed_starts(), end);
            let wait = restarts.not_before.unwrap().saturating_duration_since(Instant::now());
            assert!(!restarts.may_start() && wait <= LONGEST_DELAY, "{wait:?}");
        }
        restarts.started();
        restarts.answered();
        assert_eq!(restarts.failed_starts(), 0);
    }
}
