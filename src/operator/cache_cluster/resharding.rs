//! Slots move while they are served: what is remembered of that from one look to the next, and told.
//!
//! Whoever carries plans out keeps one [`Resharding`] for each Cluster. It may be lost at any time: the plan goes on from what is seen, and
//! the figures begin anew.

use std::fmt;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use tracing::{debug, warn};

use super::move_slots::{self, MoveError, Pace, Side};
use super::plan::{SlotSet, Way};
use crate::operator::admin::Entry;

/// How often progress is told.
const TELL_EVERY: Duration = Duration::from_secs(2);
/// How long a move that failed is left alone.
const FIRST_DELAY: Duration = Duration::from_millis(200);
/// The bound of that, which doubles with each failure.
const LONGEST_DELAY: Duration = Duration::from_secs(10);

/// The change of the number of shards that goes on, if any.
#[derive(Debug, Default)]
pub struct Resharding {
    pace: Pace,
    attempts: Attempts,
    change: Option<Change>,
}

/// One move, as it is planned.
#[derive(Debug, Clone, Copy)]
pub struct Move<'a> {
    /// The address of the primary that owns the slots.
    pub from: SocketAddr,
    /// The address of the one that is to own them.
    pub to: SocketAddr,
    /// Which.
    pub slots: &'a SlotSet,
    /// How.
    pub way: Way,
}

impl Resharding {
    /// Moves slots, or has them moved: key by key for as long as `go_on` says so, and a move by the engine is only begun. What fails is
    /// tried again by the next plan, after a while.
    pub async fn move_slots(&mut self, planned: Move<'_>, entry: Entry<'_>, go_on: impl Fn() -> bool) {
        if !self.may_begin() {
            return;
        }
        match self.attempt(planned, entry, go_on).await {
            Ok(keys) => {
                if let Some(change) = &mut self.change {
                    change.keys += keys;
                }
            }
            Err(error) => {
                let Move { from, to, .. } = planned;
                warn!(%from, %to, %error, "slots did not move; it is tried again");
                self.attempts.failed(error.to_string());
            }
        }
    }

    async fn attempt(
        &mut self,
        Move { from, to, slots, way }: Move<'_>,
        entry: Entry<'_>,
        go_on: impl Fn() -> bool,
    ) -> Result<u64, MoveError> {
        let (mut source, mut target) = (Side::connect(from, entry).await?, Side::connect(to, entry).await?);
        match way {
            Way::ByKeys => {
                let keys = move_slots::by_keys([&mut source, &mut target], slots, entry.login, &mut self.pace, go_on).await?;
                self.attempts.succeeded();
                Ok(keys)
            }
            Way::Atomic => {
                if self.attempts.is_repeated(slots) {
                    let why = move_slots::failure(&mut source, &mut target).await.unwrap_or_default();
                    warn!(%from, %to, why, "the servers gave a move of slots up; it is tried again");
                    self.attempts.failed(format!("{from} gave it up: {why}"));
                }
                debug!(%from, %to, ?slots, "the servers are asked to move slots");
                move_slots::at_once(&mut source, &mut target, slots).await?;
                Ok(0)
            }
        }
    }

    /// Whether slots move when they are asked to: not for a while after a move that failed.
    pub fn may_begin(&self) -> bool {
        self.attempts.may_begin()
    }

    /// How far the change is that was last told of; `None` where none is under way.
    pub fn progress(&self) -> Option<Progress> {
        self.change.as_ref().map(|change| change.progress(Instant::now()))
    }

    /// How far the change is, and why its last step failed, in words; `None` where none is under way.
    pub fn account(&self) -> Option<String> {
        let progress = self.progress()?;
        Some(match &self.attempts.failure {
            Some(why) => format!("{progress}; the last attempt failed, and is made again: {why}"),
            None => progress.to_string(),
        })
    }

    /// Takes note that so many slots are not where they are to be, and says what there is to tell of it. `None`: the owner of one is not known
    /// at this moment.
    pub fn tell(&mut self, left: Option<u16>) -> Option<String> {
        let now = Instant::now();
        match (left?, &mut self.change) {
            (0, change) => {
                self.attempts = Attempts::default();
                change.take().map(|change| change.end(now))
            }
            (left, None) => {
                self.change = Some(Change { total: left, left, begun: now, told: now, keys: 0 });
                Some(format!("{left} slots begin to move; commands are served meanwhile"))
            }
            (left, Some(change)) => {
                (change.total, change.left) = (change.total.max(left), left);
                (now >= change.told + TELL_EVERY).then(|| {
                    change.told = now;
                    change.progress(now).to_string()
                })
            }
        }
    }
}

/// When a move that failed is tried again. The delay doubles with each failure.
#[derive(Debug, Default)]
struct Attempts {
    asked: Option<SlotSet>,
    failures: u32,
    /// Why the last one failed.
    failure: Option<String>,
    not_before: Option<Instant>,
}

impl Attempts {
    fn may_begin(&self) -> bool {
        self.not_before.is_none_or(|time| Instant::now() >= time)
    }

    /// Whether the servers were asked for the same before, so that they gave it up. Notes what they are asked for.
    fn is_repeated(&mut self, slots: &SlotSet) -> bool {
        let is_repeated = self.asked.as_ref() == Some(slots);
        if !is_repeated {
            self.succeeded();
        }
        self.asked = Some(slots.clone());
        is_repeated
    }

    fn succeeded(&mut self) {
        (self.failures, self.failure, self.not_before) = (0, None, None);
    }

    fn failed(&mut self, why: String) {
        let delay = FIRST_DELAY.saturating_mul(1 << self.failures.min(10)).min(LONGEST_DELAY);
        self.failures = self.failures.saturating_add(1);
        self.failure = Some(why);
        self.not_before = Some(Instant::now() + delay.mul_f64(0.5 + fastrand::f64() / 2.0));
    }
}

/// A change of who owns what, from when it was first seen.
#[derive(Debug)]
struct Change {
    total: u16,
    left: u16,
    begun: Instant,
    told: Instant,
    keys: u64,
}

impl Change {
    fn progress(&self, now: Instant) -> Progress {
        let Self { total, left, keys, .. } = *self;
        Progress { total, left, keys, lasted: now.duration_since(self.begun) }
    }

    fn end(&self, now: Instant) -> String {
        let Progress { total, lasted, .. } = self.progress(now);
        format!("all {total} slots have moved, in {:.1} s{}", lasted.as_secs_f64(), self.progress(now).keys_text())
    }
}

/// How far a change of who owns what is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Progress {
    /// How many slots it moves.
    pub total: u16,
    /// How many of them are still to move.
    pub left: u16,
    /// How many keys have moved key by key; engines do not tell of theirs.
    pub keys: u64,
    /// How long it has been seen.
    pub lasted: Duration,
}

impl Progress {
    /// How many slots have moved in a second, so far.
    pub fn slots_per_second(&self) -> f64 {
        f64::from(self.total - self.left) / self.lasted.as_secs_f64().max(f64::MIN_POSITIVE)
    }

    /// How long it still takes at this rate; `None` before the first slot has moved.
    pub fn time_left(&self) -> Option<Duration> {
        let seconds = f64::from(self.left) / self.slots_per_second();
        Duration::try_from_secs_f64(seconds.ceil()).ok().filter(|_| self.left < self.total)
    }

    fn keys_text(&self) -> String {
        match self.keys {
            0 => String::new(),
            keys => format!(", with {keys} keys, {:.0} a second", keys as f64 / self.lasted.as_secs_f64()),
        }
    }
}

impl fmt::Display for Progress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (moved, rate) = (self.total - self.left, self.slots_per_second());
        write!(f, "{moved} of {} slots have moved, {rate:.0} a second{}", self.total, self.keys_text())?;
        self.time_left().map_or(Ok(()), |left| write!(f, ", some {} s left", left.as_secs()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn progress_has_a_rate_and_an_end() {
        let progress = Progress { total: 400, left: 300, keys: 5000, lasted: Duration::from_secs(4) };
        let text = "100 of 400 slots have moved, 25 a second, with 5000 keys, 1250 a second, some 12 s left";
        assert_eq!(progress.to_string(), text);
        let first = Progress { left: 400, keys: 0, ..progress };
        assert_eq!(first.to_string(), "0 of 400 slots have moved, 0 a second");
        assert_eq!((first.time_left(), Progress { lasted: Duration::ZERO, ..first }.time_left()), (None, None));
    }

    #[test]
    fn a_change_is_told_of_from_its_beginning_to_its_end() {
        let mut resharding = Resharding::default();
        assert_eq!(resharding.tell(Some(0)), None);
        assert_eq!(resharding.tell(Some(9)).as_deref(), Some("9 slots begin to move; commands are served meanwhile"));
        assert_eq!(resharding.tell(None), None, "a primary is away");
        assert_eq!(resharding.tell(Some(5)), None, "too soon");
        assert!(resharding.progress().is_some_and(|progress| (progress.total, progress.left) == (9, 5)));
        resharding.attempts.failed("NOPERM".to_owned());
        let account = resharding.account().unwrap();
        assert!(account.starts_with("4 of 9 slots") && account.ends_with("; the last attempt failed, and is made again: NOPERM"));
        assert!(resharding.tell(Some(0)).is_some_and(|line| line.starts_with("all 9 slots have moved, in ")));
        assert_eq!((resharding.tell(Some(0)), resharding.progress()), (None, None));
    }

    #[test]
    fn what_fails_is_tried_again_later_and_later() {
        let (mut attempts, slots) = (Attempts::default(), SlotSet::all());
        assert!(attempts.may_begin() && !attempts.is_repeated(&slots));
        for _ in 0..40 {
            assert!(attempts.is_repeated(&slots));
            attempts.failed("why".to_owned());
            let wait = attempts.not_before.unwrap().saturating_duration_since(Instant::now());
            assert!(!attempts.may_begin() && wait <= LONGEST_DELAY, "{wait:?}");
        }
        assert!(!attempts.is_repeated(&slots.first(1)) && attempts.may_begin(), "others are no worse for it");
    }
}
