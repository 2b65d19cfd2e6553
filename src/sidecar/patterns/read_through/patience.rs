//! How long one who waits for another's load goes on waiting.
//!
//! Where the policy's `wait` is over, a holder of the lease that lives is slow, and whoever waits loads alone; but one that has died
//! is to have one successor, not as many as wait. A holder that lives renews its lease all the time. So who has waited long
//! enough asks on until it has seen a renewal, or got the lease itself.

use std::time::Duration;

use tokio::time::Instant;

/// One wait.
#[derive(Debug)]
pub struct Patience {
    wait: Duration,
    lease: Duration,
    until: Instant,
    /// Whose load is waited for: the token of the lease.
    holder: Option<Vec<u8>>,
    left_ms: u64,
    /// Whether a successor has been given a wait of its own. The next gets none, so that waits are bounded.
    extended: bool,
}

impl Patience {
    /// A wait of `wait` that begins at `now`, for a holder that renews its lease for `lease` at a time.
    pub fn new(now: Instant, wait: Duration, lease: Duration) -> Self {
        Self { wait, lease, until: now + wait, holder: None, left_ms: 0, extended: false }
    }

    /// Whether to ask again later, where now `holder` has the lease for another `left_ms` milliseconds.
    pub fn goes_on(&mut self, now: Instant, holder: &[u8], left_ms: u64) -> bool {
        let known = self.holder.as_deref() == Some(holder);
        if !known {
            if self.holder.is_some() && !self.extended {
                self.extended = true;
                self.until = now + self.wait;
            }
            self.holder = Some(holder.to_vec());
        }
        let renewed = known && left_ms > self.left_ms;
        self.left_ms = left_ms;
        now < self.until || !renewed && now < self.until + self.lease
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Looks at these times (ms), each with who holds the lease then and for how long; the last alone ends a wait of 100 ms.
    #[track_caller]
    fn check(looks: &[(u64, &str, u64)]) {
        let start = Instant::now();
        let mut patience = Patience::new(start, Duration::from_millis(100), Duration::from_millis(50));
        for (index, (at, holder, left)) in looks.iter().enumerate() {
            let goes_on = patience.goes_on(start + Duration::from_millis(*at), holder.as_bytes(), *left);
            assert_eq!(goes_on, index + 1 < looks.len(), "at {at} ms");
        }
    }

    #[test]
    fn a_slow_holder_is_waited_for_until_it_is_seen_to_live() {
        check(&[(10, "a", 40), (90, "a", 40), (99, "a", 31), (105, "a", 25), (115, "a", 50)]);
        check(&[(99, "a", 30), (101, "a", 50)]);
    }

    #[test]
    fn a_dead_holder_is_waited_for_until_its_lease_has_ended() {
        check(&[(90, "a", 50), (110, "a", 30), (139, "a", 1), (150, "a", 0)]);
    }

    #[test]
    fn one_successor_gets_a_wait_of_its_own() {
        let first = [(90, "a", 50), (120, "a", 20)];
        check(&[&first[..], &[(141, "b", 50), (200, "b", 40), (240, "b", 30), (245, "b", 50)]].concat());
        // The third has none: it is waited for until it is seen to live, and no longer than the second.
        check(&[&first[..], &[(141, "b", 50), (230, "c", 50), (245, "c", 40), (250, "c", 50)]].concat());
    }
}
