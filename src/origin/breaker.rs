//! The circuit breaker: an origin that fails repeatedly is left alone for a while, then probed by one load at a time.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

/// This many failures in a row, with no success between, open the breaker.
const FAILURES_TO_OPEN: u32 = 5;
/// The first pause; each failed probe doubles it.
const FIRST_PAUSE: Duration = Duration::from_millis(500);
/// The longest pause, also where the origin asks for a longer one.
const LONGEST_PAUSE: Duration = Duration::from_secs(60);
/// What loads are told to wait while another one probes.
const PROBE_PAUSE: Duration = Duration::from_millis(100);

/// Whether an origin is asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BreakerState {
    /// It is.
    Closed,
    /// It is not, for a while.
    Open,
    /// One load finds out whether it works again.
    HalfOpen,
}

#[derive(Debug)]
enum State {
    Closed { failures: u32 },
    Open { until: Instant, times: u32 },
    HalfOpen { times: u32 },
}

#[derive(Debug)]
pub(super) struct Breaker {
    state: Mutex<State>,
}

/// The right to ask once. Dropping it without a verdict (the load was abandoned) says nothing about the origin, and hands the
/// probe to the next load.
#[derive(Debug)]
pub(super) struct Pass<'a> {
    breaker: &'a Breaker,
    probe: bool,
    judged: bool,
}

impl Breaker {
    pub(super) fn new() -> Self {
        Self { state: Mutex::new(State::Closed { failures: 0 }) }
    }

    pub(super) fn state(&self) -> BreakerState {
        match *self.lock() {
            State::Closed { .. } => BreakerState::Closed,
            State::Open { .. } => BreakerState::Open,
            State::HalfOpen { .. } => BreakerState::HalfOpen,
        }
    }

    /// How long no load would be admitted; `None` where one would.
    pub(super) fn refuses_for(&self, now: Instant) -> Option<Duration> {
        match *self.lock() {
            State::Closed { .. } => None,
            State::Open { until, .. } => until.checked_duration_since(now).filter(|rest| !rest.is_zero()),
            State::HalfOpen { .. } => Some(PROBE_PAUSE),
        }
    }

    /// Lets a load pass, or says how long to wait.
    pub(super) fn admit(&self, now: Instant) -> Result<Pass<'_>, Duration> {
        let mut state = self.lock();
        let probe = match *state {
            State::Closed { .. } => false,
            State::Open { until, .. } if until > now => return Err(until - now),
            State::Open { times, .. } => {
                *state = State::HalfOpen { times };
                true
            }
            State::HalfOpen { .. } => return Err(PROBE_PAUSE),
        };
        Ok(Pass { breaker: self, probe, judged: false })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // The state is replaced whole, so a panic elsewhere cannot have left it half-written.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Pass<'_> {
    /// The origin answered.
    pub(super) fn succeeded(mut self) {
        self.judged = true;
        let mut state = self.breaker.lock();
        match *state {
            State::Closed { .. } => *state = State::Closed { failures: 0 },
            State::HalfOpen { .. } if self.probe => *state = State::Closed { failures: 0 },
            // An answer to an older question says nothing about now.
            State::Open { .. } | State::HalfOpen { .. } => {}
        }
    }

    /// The origin failed. `retry_after` is what it asked for itself.
    pub(super) fn failed(mut self, now: Instant, retry_after: Option<Duration>) {
        self.judged = true;
        let mut state = self.breaker.lock();
        *state = match *state {
            State::Closed { failures } if failures + 1 < FAILURES_TO_OPEN && retry_after.is_none() => {
                State::Closed { failures: failures + 1 }
            }
            State::Closed { .. } => open(now, 0, retry_after),
            State::HalfOpen { times } if self.probe => open(now, times.saturating_add(1), retry_after),
            State::Open { .. } | State::HalfOpen { .. } => return,
        };
    }
}

impl Drop for Pass<'_> {
    fn drop(&mut self) {
        if self.probe && !self.judged {
            let mut state = self.breaker.lock();
            if let State::HalfOpen { times } = *state {
                *state = State::Open { until: Instant::now(), times };
            }
        }
    }
}

/// The pause doubles with each failed probe; a random half of it keeps sidecars from probing together.
fn open(now: Instant, times: u32, retry_after: Option<Duration>) -> State {
    let full = FIRST_PAUSE.saturating_mul(1 << times.min(16)).min(LONGEST_PAUSE);
    let pause = full.mul_f64(0.5 + fastrand::f64() / 2.0);
    let asked = retry_after.unwrap_or_default().min(LONGEST_PAUSE);
    State::Open { until: now + pause.max(asked), times }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn open_it(breaker: &Breaker, now: Instant) {
        for _ in 0..FAILURES_TO_OPEN {
            breaker.admit(now).expect("closed").failed(now, None);
        }
    }

    #[test]
    fn it_opens_after_failures_in_a_row_only() {
        let (breaker, now) = (Breaker::new(), Instant::now());
        for _ in 0..FAILURES_TO_OPEN * 3 {
            breaker.admit(now).expect("closed").failed(now, None);
            breaker.admit(now).expect("closed").succeeded();
        }
        assert_eq!(breaker.state(), BreakerState::Closed);
        open_it(&breaker, now);
        assert_eq!(breaker.state(), BreakerState::Open);
        let wait = breaker.admit(now).expect_err("open");
        assert!(wait >= FIRST_PAUSE / 2 && wait <= FIRST_PAUSE, "{wait:?}");
    }

    #[test]
    fn one_load_probes_and_decides() {
        let (breaker, now) = (Breaker::new(), Instant::now());
        open_it(&breaker, now);
        let later = now + FIRST_PAUSE;
        let probe = breaker.admit(later).expect("the probe");
        assert!(breaker.admit(later).is_err(), "a second probe");
        probe.failed(later, None);
        assert!(breaker.admit(later + FIRST_PAUSE / 2).is_err(), "the pause grew");
        breaker.admit(later + FIRST_PAUSE * 2).expect("the probe").succeeded();
        assert_eq!(breaker.state(), BreakerState::Closed);
    }

    #[test]
    fn an_abandoned_probe_is_handed_on() {
        let (breaker, now) = (Breaker::new(), Instant::now());
        open_it(&breaker, now);
        let later = Instant::now() + LONGEST_PAUSE;
        drop(breaker.admit(later).expect("the probe"));
        assert!(breaker.admit(later).is_ok());
    }

    #[test]
    fn the_origin_may_ask_for_a_pause_itself_within_reason() {
        for (asked, least) in [(Duration::from_secs(7), Duration::from_secs(7)), (Duration::from_secs(9999), LONGEST_PAUSE)] {
            let (breaker, now) = (Breaker::new(), Instant::now());
            breaker.admit(now).expect("closed").failed(now, Some(asked));
            assert_eq!(breaker.admit(now).expect_err("open"), least);
        }
    }

    #[test]
    fn an_answer_to_an_older_question_does_not_close_it() {
        let (breaker, now) = (Breaker::new(), Instant::now());
        let old = breaker.admit(now).expect("closed");
        open_it(&breaker, now);
        old.succeeded();
        assert_eq!(breaker.state(), BreakerState::Open);
    }
}
