//! Outstanding misses that there was no room for: a fixed bitmap of key hashes.
//!
//! A key in it counts as having an outstanding miss without generation. False positives cost a miss, never a wrong value. Two
//! halves take turns: what is put in stays for at least one span and at most two.

use super::Millis;

const BITS: usize = 1 << 18;

/// The bitmap. Takes no memory until the first key.
#[derive(Debug, Default)]
pub struct Forgotten {
    /// The younger half, then the older.
    halves: [Vec<u64>; 2],
    /// When the halves change places next.
    turn_at: Millis,
    span: Millis,
}

impl Forgotten {
    /// Puts a key in, for at least `span`.
    pub fn insert(&mut self, hash: u64, span: Millis, now: Millis) {
        self.turn(now);
        if self.is_empty() || span > self.span {
            // A longer span begins anew, so that what is in stays long enough.
            self.span = self.span.max(span);
            self.turn_at = now + self.span;
        }
        let half = &mut self.halves[0];
        half.resize(BITS / 64, 0);
        let bit = hash as usize % BITS;
        half[bit / 64] |= 1 << (bit % 64);
    }

    /// Whether a key may be in.
    pub fn contains(&mut self, hash: u64, now: Millis) -> bool {
        self.turn(now);
        let bit = hash as usize % BITS;
        self.halves.iter().any(|half| half.get(bit / 64).is_some_and(|word| word & (1 << (bit % 64)) != 0))
    }

    /// Whether nothing is in.
    pub fn is_empty(&self) -> bool {
        self.halves.iter().all(Vec::is_empty)
    }

    fn turn(&mut self, now: Millis) {
        if self.is_empty() || now < self.turn_at {
            return;
        }
        let missed = (now - self.turn_at) / self.span.max(1);
        self.halves.swap(0, 1);
        self.halves[0] = Vec::new();
        if missed > 0 {
            self.halves[1] = Vec::new();
        }
        self.turn_at = now + self.span;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_stays_for_one_span_and_goes_within_two() {
        for put_in in [0u64, 30, 99] {
            let mut forgotten = Forgotten::default();
            forgotten.insert(1, 100, 0);
            forgotten.insert(7, 100, put_in);
            assert!(!forgotten.contains(8, put_in), "another key");
            for now in put_in..=put_in + 100 {
                assert!(forgotten.contains(7, now), "put in at {put_in}, asked at {now}");
            }
            assert!(!forgotten.contains(7, put_in + 200));
            assert!(forgotten.is_empty());
        }
    }

    #[test]
    fn a_longer_span_keeps_what_is_in() {
        let mut forgotten = Forgotten::default();
        forgotten.insert(1, 100, 0);
        forgotten.insert(2, 1_000, 50);
        assert!(forgotten.contains(1, 100));
        assert!(forgotten.contains(2, 1_050));
        assert!(!forgotten.contains(2, 5_000));
    }
}
