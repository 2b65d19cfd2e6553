//! The clock of the cache, as far as it has told: by it a moment means the same whenever the cache comes to read of it.

use std::time::Duration;

use tokio::time::Instant;

/// What the clock said, and when that was heard.
#[derive(Debug, Clone, Copy)]
pub struct Clock {
    said_ms: u64,
    heard: Instant,
}

impl Clock {
    /// It said so many milliseconds since 1970 in an answer that was heard at this moment.
    pub fn new(said_ms: u64, heard: Instant) -> Self {
        Self { said_ms, heard }
    }

    /// What it said `age` before `now`, in milliseconds since 1970: by as much too early as the answer took, and never too late.
    pub fn ago(&self, age: Duration, now: Instant) -> u64 {
        let since = (now - self.heard).as_millis();
        let now = u128::from(self.said_ms) + since;
        u64::try_from(now.saturating_sub(age.as_nanos().div_ceil(1_000_000))).unwrap_or(u64::MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_moment_is_never_later_than_it_was() {
        let heard = Instant::now();
        let clock = Clock::new(5_000, heard);
        let at = |micros| heard + Duration::from_micros(micros);
        assert_eq!(clock.ago(Duration::ZERO, at(1_999)), 5_001);
        assert_eq!(clock.ago(Duration::from_micros(500), at(2_000)), 5_001);
        assert_eq!(clock.ago(Duration::from_secs(4), at(1_000_000)), 2_000);
        assert_eq!(clock.ago(Duration::from_secs(9), at(0)), 0);
    }
}
