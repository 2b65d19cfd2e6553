//! What one query takes while nothing else runs: by that, what the phases make of it can be judged.

use std::time::Instant;

use serde::Serialize;

use super::DemoError;
use super::keyspace::{Keyspace, Schedule};
use super::origin::Asking;

/// So many keys are asked for, one after the other.
const KEYS: usize = 24;

/// Times of queries that had the machine for themselves, in milliseconds.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Alone {
    /// How many were made.
    pub queries: usize,
    /// One in ten is faster.
    pub p10_ms: f64,
    /// The median.
    pub p50_ms: f64,
    /// One in ten is slower.
    pub p90_ms: f64,
}

impl Alone {
    /// Asks for the first keys that the load will ask for, each once.
    ///
    /// # Errors
    /// Where the database gives no answer.
    pub fn measure(keyspace: &Keyspace, keys: &[String], schedule: &Schedule, asking: &Asking) -> Result<Self, DemoError> {
        let mut ranks: Vec<usize> = Vec::with_capacity(KEYS);
        for (_, rank) in &schedule.arrivals {
            if ranks.len() < KEYS && !ranks.contains(rank) {
                ranks.push(*rank);
            }
        }
        let mut times = Vec::with_capacity(ranks.len());
        for rank in ranks {
            let began = Instant::now();
            asking.query(keyspace.entities[rank].family(), &keys[rank])?;
            times.push(began.elapsed().as_secs_f64() * 1_000.0);
        }
        Ok(Self::of(times))
    }

    fn of(mut times: Vec<f64>) -> Self {
        times.sort_unstable_by(f64::total_cmp);
        let at = |share: f64| times.get(((times.len().max(1) - 1) as f64 * share).round() as usize).copied().unwrap_or_default();
        Self { queries: times.len(), p10_ms: at(0.1), p50_ms: at(0.5), p90_ms: at(0.9) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_middle_and_the_ends_are_told() {
        let alone = Alone::of((0..=10).rev().map(f64::from).collect());
        assert_eq!(alone, Alone { queries: 11, p10_ms: 1.0, p50_ms: 5.0, p90_ms: 9.0 });
        assert_eq!(Alone::of(Vec::new()), Alone { queries: 0, p10_ms: 0.0, p50_ms: 0.0, p90_ms: 0.0 });
    }
}
