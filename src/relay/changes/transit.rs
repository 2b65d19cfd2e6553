//! How long what is read had lain on its way, while its reader was busy or stood still. Without it, a change that waited in a buffer for an hour
//! would count as new when it is read. Pure.
//!
//! The server says when it sent each message, by its own clock. What the two clocks are apart by is told by each message that was waited
//! for, since that one was read as it came; by how much more they seem to be apart at a later one, that one has lain.

use std::time::Duration;

use tokio::time::Instant;

/// A message that came after a longer wait may have come earlier, while the whole process stood still: a server that is asked every five seconds
/// whether it is there says something sooner.
const LONGEST_WAIT: Duration = Duration::from_secs(10);

/// What is known of the way.
#[derive(Debug)]
pub struct Transit {
    /// From which this side counts.
    zero: Instant,
    /// How many microseconds this side's count is ahead of the server's for what is read as it comes.
    ahead: Option<i64>,
    /// Since when the next message is waited for. `None`: it may be there already.
    waits: Option<Instant>,
}

impl Transit {
    /// Nothing was read by `now`.
    pub fn new(now: Instant) -> Self {
        Self { zero: now, ahead: None, waits: None }
    }

    /// The next message is read from `now` on; `waits`: it is not there yet.
    pub fn goes_on(&mut self, waits: bool, now: Instant) {
        self.waits = waits.then_some(now);
    }

    /// How long the message that is read `now` had lain, which the server sent at `sent`, in microseconds by its clock.
    pub fn lain(&mut self, sent: i64, now: Instant) -> Duration {
        let ahead = i64::try_from((now - self.zero).as_micros()).unwrap_or(i64::MAX).saturating_sub(sent);
        let was_waited_for = self.waits.take().is_some_and(|since| now - since < LONGEST_WAIT);
        let as_it_comes = self.ahead.filter(|_| !was_waited_for).map_or(ahead, |known| known.min(ahead));
        self.ahead = Some(as_it_comes);
        Duration::from_micros(u64::try_from(ahead.saturating_sub(as_it_comes)).unwrap_or_default())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOUR: Duration = Duration::from_secs(3_600);

    /// So many seconds on both clocks, of which the server's began elsewhere.
    fn at(began: Instant, seconds: u64) -> (i64, Instant) {
        let micros = i64::try_from(seconds * 1_000_000).expect("a short test");
        (700_000_000_000_000 + micros, began + Duration::from_secs(seconds))
    }

    #[test]
    fn what_lay_while_its_reader_was_busy_is_as_old_as_that() {
        let began = Instant::now();
        let mut transit = Transit::new(began);
        let (sent, now) = at(began, 1);
        assert_eq!(transit.lain(sent, now), Duration::ZERO, "the first tells how far the clocks are apart");
        assert_eq!(transit.lain(sent, at(began, 8).1), Duration::from_secs(7));
        assert_eq!(transit.lain(at(began, 8).0, at(began, 9).1), Duration::from_secs(1));
    }

    #[test]
    fn what_was_waited_for_is_new_and_tells_the_clocks_anew() {
        let began = Instant::now();
        let mut transit = Transit::new(began);
        let (sent, now) = at(began, 1);
        transit.lain(sent, now);
        transit.goes_on(true, now);
        // The server's clock was set back.
        let set_back = |seconds| at(began, seconds).0 - 3_600_000_000;
        assert_eq!(transit.lain(set_back(4), at(began, 4).1), Duration::ZERO);
        transit.goes_on(false, at(began, 4).1);
        assert_eq!(transit.lain(set_back(4), at(began, 6).1), Duration::from_secs(2));
        // It was set forward.
        assert_eq!(transit.lain(at(began, 6).0, at(began, 6).1), Duration::ZERO);
    }

    /// The process stood still while it waited: what had come meanwhile is not new.
    #[test]
    fn what_came_while_the_process_stood_still_is_not_new() {
        let began = Instant::now();
        let mut transit = Transit::new(began);
        let (sent, now) = at(began, 1);
        transit.lain(sent, now);
        transit.goes_on(true, now);
        assert_eq!(transit.lain(sent, now + HOUR), HOUR);
    }
}
