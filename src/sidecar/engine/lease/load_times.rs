//! How long 99 of 100 of a rule's loads take, of late.
//!
//! A histogram of fixed size, whose buckets are an eighth of their value wide. It is kept in two halves that take turns: one is full
//! after [`HALF`] loads or [`HALF_MS`], and the elder is then forgotten. So of at most 256 loads the third longest is what is told:
//! loads that suddenly take longer show after three of them, and loads that take less again after 256, or ten minutes.

use super::Millis;

/// From so many loads on something is told.
pub const LEAST_LOADS: u32 = 100;
/// As many loads fill one half.
const HALF: u8 = 128;
/// As long may a half take to fill.
const HALF_MS: Millis = 300_000;
/// A load that takes longer counts as this. It is far beyond any default wait.
const LONGEST_MS: Millis = (1 << 17) - 1;
/// Values below this have a bucket each, and every octave above it as many buckets.
const EXACT: u64 = 8;
const EXACT_BITS: u32 = EXACT.ilog2();
const BUCKETS: usize = (EXACT + (LONGEST_MS.ilog2() + 1 - EXACT_BITS) as u64 * EXACT) as usize;

/// The times of the last loads.
#[derive(Debug, Clone)]
pub struct LoadTimes {
    /// The younger half, then the elder.
    halves: [[u8; BUCKETS]; 2],
    /// How many are in each.
    loads: [u8; 2],
    /// When the younger began.
    since: Millis,
}

impl Default for LoadTimes {
    fn default() -> Self {
        Self { halves: [[0; BUCKETS]; 2], loads: [0; 2], since: 0 }
    }
}

impl LoadTimes {
    /// A load has taken so long.
    pub fn add(&mut self, took: Millis, now: Millis) {
        let age = self.age(now);
        if age > 0 || self.loads[0] == HALF {
            (self.halves[1], self.loads[1]) = (self.halves[0], self.loads[0]);
            if age > 1 {
                (self.halves[1], self.loads[1]) = ([0; BUCKETS], 0);
            }
            (self.halves[0], self.loads[0], self.since) = ([0; BUCKETS], 0, now);
        }
        self.halves[0][bucket_of(took)] += 1;
        self.loads[0] += 1;
    }

    /// A time that 99 of 100 of the last loads did not exceed: the smallest there is, or up to an eighth more. `None`: fewer than
    /// [`LEAST_LOADS`] are known.
    pub fn p99(&self, now: Millis) -> Option<Millis> {
        // What a half would have lost by now, had a load come.
        let known = 2usize.saturating_sub(usize::try_from(self.age(now)).unwrap_or(usize::MAX));
        let loads: u32 = self.loads.iter().take(known).copied().map(u32::from).sum();
        if loads < LEAST_LOADS {
            return None;
        }
        let mut longer = 0;
        let reached = (0..BUCKETS).rev().find(|bucket| {
            longer += self.halves.iter().take(known).map(|half| u32::from(half[*bucket])).sum::<u32>();
            longer > loads / 100
        });
        reached.map(longest_of)
    }

    /// How many halves could have been filled since the younger began.
    fn age(&self, now: Millis) -> Millis {
        now.saturating_sub(self.since) / HALF_MS
    }
}

fn bucket_of(took: Millis) -> usize {
    let took = took.min(LONGEST_MS);
    if took < EXACT {
        return took as usize;
    }
    let octave = took.ilog2() - EXACT_BITS;
    let within = (took >> octave) - EXACT;
    (EXACT * u64::from(octave + 1) + within) as usize
}

/// The longest time of a bucket.
fn longest_of(bucket: usize) -> Millis {
    let bucket = bucket as u64;
    if bucket < EXACT {
        return bucket;
    }
    let (octave, within) = (bucket / EXACT - 1, bucket % EXACT);
    ((EXACT + within + 1) << octave) - 1
}

#[cfg(test)]
mod tests {
    use super::*;

    fn known(times: impl IntoIterator<Item = Millis>) -> LoadTimes {
        let mut known = LoadTimes::default();
        times.into_iter().for_each(|took| known.add(took, 5));
        known
    }

    /// The p99 by its definition: of the times in order, the first that 99 of 100 do not exceed.
    fn exact(times: &[Millis]) -> Millis {
        let mut sorted = times.to_vec();
        sorted.sort_unstable();
        sorted[(sorted.len() * 99).div_ceil(100) - 1]
    }

    #[test]
    fn each_time_is_in_the_bucket_whose_bound_is_at_most_an_eighth_above() {
        for took in 0..=LONGEST_MS {
            let longest = longest_of(bucket_of(took));
            assert!(took <= longest && longest <= took + took / 8, "{took}: {longest}");
        }
        assert_eq!((bucket_of(LONGEST_MS), bucket_of(Millis::MAX)), (BUCKETS - 1, BUCKETS - 1));
    }

    #[test]
    fn what_is_told_is_the_p99_and_at_most_an_eighth_more() {
        let mut random = fastrand::Rng::with_seed(7);
        for _ in 0..2_000 {
            let (count, scale) = (random.usize(100..=256), 1u64 << random.u32(1..17));
            // Some have a long tail, some none.
            let times: Vec<Millis> =
                (0..count).map(|_| if random.u8(..40) == 0 { random.u64(..LONGEST_MS) } else { random.u64(..scale) }).collect();
            let (exact, told) = (exact(&times), known(times.iter().copied()).p99(5).expect("enough are known"));
            assert!(exact <= told && told <= exact + exact / 8, "{told} for {exact}, of {count}");
        }
    }

    #[test]
    fn nothing_is_told_of_fewer_than_a_hundred() {
        assert_eq!(known(std::iter::repeat_n(20, 99)).p99(5), None);
        assert!(known(std::iter::repeat_n(20, 100)).p99(5).is_some());
    }

    #[test]
    fn three_slow_loads_show_however_many_fast_ones_there_were() {
        for fast in 100..1_000 {
            let mut times = known(std::iter::repeat_n(20, fast));
            assert!(times.p99(5) < Some(24));
            (0..3).for_each(|_| times.add(900, 6));
            assert!(times.p99(6) >= Some(900), "after {fast}");
        }
    }

    #[test]
    fn one_slow_load_in_a_hundred_does_not_show() {
        let mut times = known(std::iter::repeat_n(20, 256));
        times.add(900, 5);
        assert!(times.p99(5) < Some(24));
    }

    #[test]
    fn what_was_slow_is_forgotten_after_256_loads() {
        let mut times = known(std::iter::repeat_n(900, 1_000));
        (0..256).for_each(|_| times.add(20, 6));
        assert!(times.p99(6) < Some(24));
    }

    #[test]
    fn what_was_is_forgotten_after_ten_minutes() {
        let mut times = known(std::iter::repeat_n(20, 128));
        (0..128).for_each(|_| times.add(20, HALF_MS));
        assert!(times.p99(2 * HALF_MS - 1).is_some(), "both halves are known");
        assert!(times.p99(2 * HALF_MS).is_some(), "and the younger");
        assert_eq!(times.p99(3 * HALF_MS), None);
        times.add(900, 3 * HALF_MS);
        assert_eq!(times.p99(3 * HALF_MS), None, "one load alone");
    }
}
