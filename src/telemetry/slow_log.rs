//! A log of slow commands, sampled: so many lines a second and no more.

use std::time::{Duration, Instant};

use tracing::warn;

/// One worker's slow log. It shows the rule, the command's name and the time; never a key or a value.
#[derive(Debug)]
pub struct SlowLog {
    threshold: Duration,
    lines_per_second: u32,
    window: Instant,
    written: u32,
    suppressed: u64,
}

impl SlowLog {
    /// A log of commands that took `threshold` or longer.
    pub fn new(threshold: Duration, lines_per_second: u32) -> Self {
        Self { threshold, lines_per_second, window: Instant::now(), written: 0, suppressed: 0 }
    }

    /// Notes a command that has been answered after `took`, in the cheapest way where that was fast.
    #[inline]
    pub fn note(&mut self, took: Duration, command: &str, rule: Option<&str>) {
        if took >= self.threshold {
            self.note_slow(Instant::now(), took, command, rule);
        }
    }

    #[cold]
    fn note_slow(&mut self, now: Instant, took: Duration, command: &str, rule: Option<&str>) {
        let Some(suppressed) = self.admit(now) else { return };
        let took_ms = took.as_millis() as u64;
        warn!(command, rule = rule.unwrap_or("-"), took_ms, suppressed, "a slow command");
    }

    /// Whether a line may be written, and how many were not since the last one.
    fn admit(&mut self, now: Instant) -> Option<u64> {
        if now.saturating_duration_since(self.window) >= Duration::from_secs(1) {
            (self.window, self.written) = (now, 0);
        }
        if self.written >= self.lines_per_second {
            self.suppressed += 1;
            return None;
        }
        self.written += 1;
        Some(std::mem::take(&mut self.suppressed))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_limited_and_what_is_left_out_is_told() {
        let mut log = SlowLog::new(Duration::from_millis(10), 2);
        let start = log.window;
        let told: Vec<_> = (0..5).map(|_| log.admit(start)).collect();
        assert_eq!(told, [Some(0), Some(0), None, None, None]);
        assert_eq!(log.admit(start + Duration::from_secs(1)), Some(3));
        assert_eq!(log.admit(start + Duration::from_secs(1)), Some(0));
    }
}
