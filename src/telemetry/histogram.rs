//! A histogram with fixed buckets that costs a few nanoseconds a value.
//!
//! Log-linear: four buckets for each doubling, from about 1 µs to about 69 s. One thread records; any thread reads.

use std::time::Duration;

use super::counter::Counter;

/// Values below `2^FIRST` nanoseconds (about 1 µs) share the first bucket.
const FIRST: u32 = 10;
/// Values from `2^LAST` nanoseconds (about 69 s) on share the last bucket.
const LAST: u32 = 36;
const STEPS: usize = 4;
const BUCKETS: usize = 2 + (LAST - FIRST) as usize * STEPS;

/// Durations by size.
#[derive(Debug)]
pub struct Histogram {
    counts: Box<[Counter; BUCKETS]>,
    sum_ns: Counter,
}

impl Default for Histogram {
    fn default() -> Self {
        Self { counts: Box::new(std::array::from_fn(|_| Counter::default())), sum_ns: Counter::default() }
    }
}

impl Histogram {
    /// Counts a duration of `ns` nanoseconds.
    #[inline]
    pub fn record(&self, ns: u64) {
        if let Some(count) = self.counts.get(bucket_of(ns)) {
            count.inc();
        }
        self.sum_ns.add(ns);
    }

    /// Adds what is counted here to `sum`.
    pub fn add_to(&self, sum: &mut Distribution) {
        sum.counts.iter_mut().zip(self.counts.iter()).for_each(|(sum, count)| *sum += count.get());
        sum.sum_ns = sum.sum_ns.wrapping_add(self.sum_ns.get());
    }
}

#[inline]
fn bucket_of(ns: u64) -> usize {
    // Never zero, so that the logarithm exists.
    let power = (ns | 1).ilog2();
    match power {
        0..FIRST => 0,
        FIRST..LAST => 1 + (power - FIRST) as usize * STEPS + ((ns >> (power - 2)) & 3) as usize,
        _ => BUCKETS - 1,
    }
}

/// The first value, in nanoseconds, that is too large for bucket `index`.
fn end_of(index: usize) -> u64 {
    let power = FIRST + (index / STEPS) as u32;
    (1 << power) + (index % STEPS) as u64 * (1 << (power - 2))
}

/// Histograms summed.
#[derive(Debug, Clone)]
pub struct Distribution {
    counts: [u64; BUCKETS],
    sum_ns: u64,
}

impl Default for Distribution {
    fn default() -> Self {
        Self { counts: [0; BUCKETS], sum_ns: 0 }
    }
}

impl Distribution {
    /// How many values there are.
    pub fn count(&self) -> u64 {
        self.counts.iter().sum()
    }

    /// Their sum in seconds.
    pub fn sum_seconds(&self) -> f64 {
        self.sum_ns as f64 / 1e9
    }

    /// A value that a share `quantile` (0 to 1) of the values do not exceed; at most a quarter too high. `None`: there is no value.
    pub fn quantile(&self, quantile: f64) -> Option<Duration> {
        let total = self.count();
        let rank = ((total as f64 * quantile).ceil() as u64).clamp(1, total.max(1));
        let mut seen = 0;
        let index = self.counts.iter().position(|count| {
            seen += count;
            seen >= rank
        });
        index.filter(|_| total > 0).map(|index| Duration::from_nanos(end_of(index)))
    }

    /// For Prometheus: each doubling's bound in seconds with the number of values in its bucket alone, and all the rest last.
    pub fn buckets(&self) -> Vec<(f64, u64)> {
        let mut buckets = Vec::with_capacity((LAST - FIRST) as usize + 2);
        let mut rest = self.counts.as_slice();
        for power in FIRST..=LAST {
            let (these, others) = rest.split_at(if power == FIRST { 1 } else { STEPS });
            buckets.push(((1u64 << power) as f64 / 1e9, these.iter().sum()));
            rest = others;
        }
        buckets.push((f64::INFINITY, rest.iter().sum()));
        buckets
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn of(values: &[u64]) -> Distribution {
        let histogram = Histogram::default();
        values.iter().for_each(|ns| histogram.record(*ns));
        let mut sum = Distribution::default();
        histogram.add_to(&mut sum);
        sum
    }

    #[test]
    fn nothing_has_no_quantile() {
        assert_eq!(of(&[]).quantile(0.5), None);
        assert_eq!(of(&[0]).quantile(0.5), Some(Duration::from_nanos(1024)));
        assert_eq!(of(&[u64::MAX]).count(), 1);
    }

    proptest! {
        #[test]
        fn each_value_lies_within_its_bucket(ns in 0u64..1 << LAST) {
            let index = bucket_of(ns);
            prop_assert!(ns < end_of(index));
            prop_assert!(index == 0 || ns >= end_of(index - 1));
        }

        #[test]
        fn quantiles_are_at_most_a_quarter_too_high(mut values in proptest::collection::vec(1u64 << FIRST..1 << LAST, 1..50), share in 0.0..1.0f64) {
            let told = of(&values).quantile(share).unwrap().as_nanos() as f64;
            values.sort_unstable();
            let rank = ((values.len() as f64 * share).ceil() as usize).max(1);
            let exact = values[rank - 1] as f64;
            prop_assert!(told >= exact && told <= exact * 1.25 + 1.0, "{told} for {exact}");
        }

        #[test]
        fn the_exported_buckets_hold_every_value_once(values in proptest::collection::vec(any::<u64>(), 0..50)) {
            let buckets = of(&values).buckets();
            let mut below = 0;
            for (bound, count) in buckets {
                below += count;
                let exact = values.iter().filter(|ns| **ns < (bound * 1e9).round() as u64 || bound == f64::INFINITY).count() as u64;
                prop_assert_eq!(below, exact);
            }
        }
    }
}
