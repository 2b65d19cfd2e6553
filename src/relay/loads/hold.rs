//! What a relay may do by its claim of a queue. Pure.
//!
//! A load is begun only where it surely is over before the claim ends, by the clock of whoever claimed: so when another relay may claim the
//! queue, nothing of the earlier one is under way, though it stood still since and ended nothing itself. That takes origins that end by
//! themselves what takes too long, as databases do that are told how long a statement may take.

use std::time::Duration;

use tokio::time::Instant;

/// So long before the end of a claim everything is over.
const MARGIN: Duration = Duration::from_millis(200);

/// A claim, as far as this relay knows of it.
#[derive(Debug)]
pub struct Hold {
    claim: Duration,
    /// Until when the queue is surely ours. `None`: it is not.
    until: Option<Instant>,
    due: Instant,
}

impl Hold {
    /// Nothing is claimed yet. Another relay may take over after `claim` without a word, and the time of one load more.
    pub fn new(now: Instant, claim: Duration) -> Self {
        Self { claim, until: None, due: now }
    }

    /// For how long to claim a queue whose loads take at most `timeout`.
    pub fn lasts(&self, timeout: Duration) -> Duration {
        self.claim + timeout + MARGIN
    }

    /// When to claim it, or to renew the claim.
    pub fn due(&self) -> Instant {
        self.due
    }

    /// Whether it is ours.
    pub fn is_ours(&self) -> bool {
        self.until.is_some()
    }

    /// What came of a claim that was asked for at a moment, for so long.
    pub fn answered(&mut self, asked: Instant, lasts: Duration, is_ours: bool) {
        self.until = is_ours.then_some(asked + lasts);
        self.due = asked + self.claim / 4;
    }

    /// A claim was asked for, and nobody knows what came of it.
    pub fn unanswered(&mut self, now: Instant) {
        self.due = now + self.claim / 16;
    }

    /// Another relay was found to have it, or none.
    pub fn lost(&mut self, now: Instant) {
        (self.until, self.due) = (None, now);
    }

    /// How many more loads may be begun, where so many of at most `at_once` are under way.
    pub fn room(&self, now: Instant, timeout: Duration, at_once: usize, under_way: usize) -> usize {
        let is_safe = self.until.is_some_and(|until| now + timeout + MARGIN <= until);
        if is_safe { at_once.saturating_sub(under_way) } else { 0 }
    }

    /// When a load that is begun now has to be over, whose sidecar waits for another `left`. `None`: it may not be begun any more.
    pub fn deadline(&self, now: Instant, left: Duration) -> Option<Instant> {
        let ends = self.until?.checked_sub(MARGIN)?.min(now + left);
        (ends > now).then_some(ends)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CLAIM: Duration = Duration::from_secs(8);
    const TIMEOUT: Duration = Duration::from_secs(2);

    #[test]
    fn nothing_is_begun_without_a_claim_or_near_its_end() {
        let start = Instant::now();
        let mut hold = Hold::new(start, CLAIM);
        assert_eq!((hold.room(start, TIMEOUT, 3, 0), hold.deadline(start, TIMEOUT), hold.due()), (0, None, start));
        let lasts = hold.lasts(TIMEOUT);
        hold.answered(start, lasts, true);
        assert_eq!((hold.room(start, TIMEOUT, 3, 1), hold.due()), (2, start + CLAIM / 4));
        assert_eq!((hold.room(start + CLAIM, TIMEOUT, 3, 1), hold.room(start, TIMEOUT, 3, 4)), (2, 0));
        let late = start + CLAIM + Duration::from_millis(1);
        assert_eq!(hold.room(late, TIMEOUT, 3, 0), 0, "it might outlive the claim");
        assert_eq!(hold.deadline(late, TIMEOUT), Some(start + CLAIM + TIMEOUT), "what was taken before ends with it");
        assert_eq!(hold.deadline(start + CLAIM + TIMEOUT, TIMEOUT), None);
        hold.lost(late);
        assert!(!hold.is_ours() && hold.due() == late && hold.deadline(start, TIMEOUT).is_none());
    }
}
