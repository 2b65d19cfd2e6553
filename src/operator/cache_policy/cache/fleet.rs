//! How many the sidecars of a binding are told that they are. Pure.
//!
//! Each takes its share of an origin's connections by that number, so it is never smaller than the number of those who live: it rises at
//! once, above sixteen with an eighth to spare, and falls only to what was the most for a while. A roll of a Deployment is over by
//! then. Where nothing is heard nothing falls, and where nobody lives any more the last number stays: those who come next come all at once.

use std::collections::VecDeque;
use std::time::Duration;

use tokio::time::Instant;

/// For how long there have to be fewer before fewer are told.
pub const HOLD: Duration = Duration::from_secs(60);
/// Up to so many are told exactly while they become more.
const EXACT: u32 = 16;
/// The most that what lies in the cache is believed: somebody else may have written it.
const MOST: u32 = 1_000_000;

/// How many sidecars of one binding there are, over time.
#[derive(Debug, Clone)]
pub struct Count {
    hold: Duration,
    told: Option<u32>,
    /// When more were told last.
    rose: Option<Instant>,
    /// Since when everything has been heard, and somebody has.
    since: Option<Instant>,
    /// How many lived, and when: falling, so that the first is the most of all that is remembered.
    lately: VecDeque<(Instant, u32)>,
}

impl Count {
    /// Nobody has been seen. `hold`: [`HOLD`].
    pub fn new(hold: Duration) -> Self {
        Self { hold, told: None, rose: None, since: None, lately: VecDeque::new() }
    }

    /// What is told now.
    pub fn told(&self) -> Option<u32> {
        self.told
    }

    /// This is what was told before this process came.
    pub fn found(&mut self, told: u32) {
        self.told.get_or_insert(told.clamp(1, MOST));
    }

    /// Nothing is heard from now on.
    pub fn deaf(&mut self) {
        self.since = None;
        self.lately.clear();
    }

    /// So many live now, as far as is heard.
    pub fn saw(&mut self, now: Instant, live: u32) {
        if live == 0 {
            return self.deaf();
        }
        self.since.get_or_insert(now);
        while self.lately.back().is_some_and(|(_, earlier)| *earlier <= live) {
            self.lately.pop_back();
        }
        self.lately.push_back((now, live));
        while self.lately.front().is_some_and(|(at, _)| now.duration_since(*at) > self.hold) {
            self.lately.pop_front();
        }
    }

    /// What is to be told now, where that is something else than what is.
    pub fn due(&self, now: Instant) -> Option<u32> {
        let (most, live) = (self.lately.front()?.1, self.lately.back()?.1);
        let settled = self.since.max(self.rose).is_some_and(|since| now.duration_since(since) > self.hold);
        match self.told {
            Some(told) if live <= told => (settled && most < told).then_some(most),
            _ => Some(with_spare(live)),
        }
    }

    /// It is told.
    pub fn tell(&mut self, now: Instant, sidecars: u32) {
        if self.told.is_none_or(|told| told < sidecars) {
            self.rose = Some(now);
        }
        self.told = Some(sidecars);
    }
}

/// While they become more, they are not told of each.
fn with_spare(live: u32) -> u32 {
    if live <= EXACT { live } else { live.saturating_add(live / 8) }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// What is told after each second in which so many lived; `None`: nothing was heard.
    fn told(count: &mut Count, start: Instant, seconds: &[Option<u32>]) -> Vec<Option<u32>> {
        let steps = seconds.iter().zip(0u64..);
        let step = |(live, second): (&Option<u32>, u64)| {
            let now = start + Duration::from_secs(second);
            match live {
                Some(live) => count.saw(now, *live),
                None => count.deaf(),
            }
            if let Some(due) = count.due(now) {
                count.tell(now, due);
            }
            count.told()
        };
        steps.map(step).collect()
    }

    fn for_seconds(live: u32, seconds: usize) -> Vec<Option<u32>> {
        vec![Some(live); seconds]
    }

    #[test]
    fn more_are_told_at_once_and_fewer_after_a_while() {
        let mut count = Count::new(HOLD);
        let all = told(&mut count, Instant::now(), &[for_seconds(3, 5), for_seconds(4, 5), for_seconds(2, 70)].concat());
        assert_eq!((all[0], all[5], all[60], all[79]), (Some(3), Some(4), Some(4), Some(2)));
    }

    #[test]
    fn a_roll_is_told_once() {
        let mut count = Count::new(HOLD);
        let roll: Vec<_> = (0..100).flat_map(|_| [Some(10), Some(12), Some(11), Some(10)]).collect();
        let mut all = told(&mut count, Instant::now(), &roll);
        all.dedup();
        assert_eq!(all, [Some(10), Some(12)]);
    }

    #[test]
    fn a_thousand_that_come_one_by_one_are_told_of_seldom() {
        let mut count = Count::new(HOLD);
        let mut all = told(&mut count, Instant::now(), &(1..=1000).map(Some).collect::<Vec<_>>());
        all.dedup();
        assert!(all.len() < 60, "{}", all.len());
        let all = told(&mut count, Instant::now() + Duration::from_secs(2000), &for_seconds(1000, 70));
        assert_eq!(all.last(), Some(&Some(1000)), "in the end it is exact");
    }

    #[test]
    fn a_new_leader_goes_on_from_what_it_finds() {
        let start = Instant::now();
        let mut count = Count::new(HOLD);
        count.found(40);
        count.found(7);
        assert_eq!(told(&mut count, start, &for_seconds(0, 90)).last(), Some(&Some(40)), "nobody came, and may yet");
        assert_eq!(told(&mut count, start + Duration::from_secs(90), &for_seconds(5, 90)).last(), Some(&Some(5)));
    }

    proptest! {
        #[test]
        fn a_share_is_never_too_big(
            steps in proptest::collection::vec((proptest::option::weighted(0.9, 0u32..200), 1usize..90), 1..20), found in 0u32..300
        ) {
            let seconds: Vec<Option<u32>> = steps.iter().flat_map(|(live, times)| vec![*live; *times]).collect();
            let mut count = Count::new(HOLD);
            count.found(found);
            let all = told(&mut count, Instant::now(), &seconds);
            for (second, told) in all.iter().enumerate() {
                prop_assert!(seconds[second].unwrap_or_default() <= told.unwrap_or_default());
                let before = second.checked_sub(1).and_then(|before| all[before]).unwrap_or(found.max(1));
                if told.unwrap_or_default() < before {
                    let while_held = &seconds[second.saturating_sub(HOLD.as_secs() as usize)..=second];
                    prop_assert!(while_held.iter().all(|live| live.is_some_and(|live| live <= told.unwrap_or_default())));
                }
            }
        }
    }
}
