//! The load: many clients ask for keys, at times fixed beforehand or as fast as they can, and hold each reply against the truth.

use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use hdrhistogram::{CreationError, Histogram};

use super::client::{Client, ClientError};
use super::keyspace::{Entity, Family, Keyspace, Schedule};
use super::truth::{Truth, Verdict};

/// Latencies and ages above this are counted as this.
const LONGEST: Duration = Duration::from_secs(600);
/// Rest after an error, so that a server that is gone is not asked in a tight loop.
const REST_AFTER_ERROR: Duration = Duration::from_millis(20);

/// What all clients share.
pub struct Load<'a> {
    /// The keys by rank.
    pub keyspace: &'a Keyspace,
    /// The cache key of each entity.
    pub keys: &'a [String],
    /// When which is asked for.
    pub schedule: &'a Schedule,
    /// What replies are held against.
    pub truth: &'a Truth,
    /// Set when the user wants to stop.
    pub stop: &'a AtomicBool,
    /// For the live display.
    pub live: &'a Live,
}

/// Counters that change while the load runs.
#[derive(Debug, Default)]
pub struct Live {
    /// Requests answered since the phase began.
    pub answered: AtomicU64,
    /// Requests that got an error.
    pub errors: AtomicU64,
}

/// What became of a load's requests.
#[derive(Debug, Clone)]
pub struct Tally {
    /// Requests that got a reply, right or wrong.
    pub answered: u64,
    /// Requests that got an error.
    pub errors: u64,
    /// The first error, as an example.
    pub example: Option<String>,
    /// Requests whose time came, but no client was free before the phase ended.
    pub unanswered: u64,
    /// Replies that never were the key's value.
    pub never_true: u64,
    /// An example of those: the key and the reply.
    pub never_true_example: Option<String>,
    /// Microseconds from the time that the schedule set, not from the sending: a stall counts for all who waited behind it.
    /// Unanswered requests count with the time that they had waited.
    pub latency_us: Histogram<u64>,
    /// How old replies were, in milliseconds, by family.
    ages_ms: Vec<(Family, Histogram<u64>)>,
    /// From the first request to the last reply.
    pub elapsed: Duration,
}

impl Tally {
    fn new() -> Result<Self, CreationError> {
        let ages = || histogram(LONGEST.as_millis() as u64);
        Ok(Self {
            answered: 0,
            errors: 0,
            example: None,
            unanswered: 0,
            never_true: 0,
            never_true_example: None,
            latency_us: histogram(LONGEST.as_micros() as u64)?,
            ages_ms: vec![(Family::Board, ages()?), (Family::Flight, ages()?)],
            elapsed: Duration::ZERO,
        })
    }

    fn add(&mut self, other: Self) {
        self.answered += other.answered;
        self.errors += other.errors;
        self.unanswered += other.unanswered;
        self.never_true += other.never_true;
        self.example = self.example.take().or(other.example);
        self.never_true_example = self.never_true_example.take().or(other.never_true_example);
        // Both have the same bounds, so that adding cannot fail.
        let _ = self.latency_us.add(&other.latency_us);
        for ((_, mine), (_, theirs)) in self.ages_ms.iter_mut().zip(&other.ages_ms) {
            let _ = mine.add(theirs);
        }
    }

    /// Replies of a second.
    pub fn throughput(&self) -> f64 {
        self.answered as f64 / self.elapsed.as_secs_f64().max(f64::MIN_POSITIVE)
    }

    /// Replies that never were true, or were true longer ago than `allowed` for their family.
    pub fn wrong(&self, allowed: impl Fn(Family) -> Duration) -> u64 {
        let too_old = self.ages_ms.iter().map(|(family, ages)| {
            let limit = allowed(*family).as_millis() as u64;
            ages.iter_recorded()
                .filter(|step| step.value_iterated_to() > ages.highest_equivalent(limit))
                .map(|step| step.count_at_value())
                .sum::<u64>()
        });
        self.never_true + too_old.sum::<u64>()
    }

    /// The oldest reply of a family.
    pub fn oldest(&self, family: Family) -> Duration {
        let ages = self.ages_ms.iter().find(|(of, _)| *of == family);
        Duration::from_millis(ages.map(|(_, ages)| ages.max()).unwrap_or_default())
    }

    fn note_latency(&mut self, latency: Duration) {
        self.latency_us.saturating_record(latency.as_micros() as u64);
    }

    fn note(
        &mut self,
        load: &Load<'_>,
        entity: usize,
        outcome: Result<Option<String>, ClientError>,
        sent: Instant,
        received: Instant,
    ) {
        let reply = match outcome {
            Ok(reply) => reply,
            Err(error) => {
                self.errors += 1;
                load.live.errors.fetch_add(1, Ordering::Relaxed);
                self.example.get_or_insert_with(|| error.to_string());
                thread::sleep(REST_AFTER_ERROR);
                return;
            }
        };
        self.answered += 1;
        load.live.answered.fetch_add(1, Ordering::Relaxed);
        let family = load.keyspace.entities[entity].family();
        // Every key of the keyspace exists: a nil is as wrong as a value of another key.
        match load.truth.check(entity, reply.as_deref().unwrap_or_default(), sent, received) {
            Verdict::True { age } => {
                if let Some((_, ages)) = self.ages_ms.iter_mut().find(|(of, _)| *of == family) {
                    ages.saturating_record(age.as_millis() as u64);
                }
            }
            Verdict::False => {
                self.never_true += 1;
                self.never_true_example.get_or_insert_with(|| format!("{}: {reply:?}", load.keys[entity]));
            }
        }
    }
}

/// Three significant digits from 1 to `longest`.
fn histogram(longest: u64) -> Result<Histogram<u64>, CreationError> {
    Histogram::new_with_bounds(1, longest, 3)
}

impl Load<'_> {
    fn ask(&self, client: &mut dyn Client, entity: usize) -> (Result<Option<String>, ClientError>, Instant, Instant) {
        let about: &Entity = &self.keyspace.entities[entity];
        let sent = Instant::now();
        let outcome = client.get(about, &self.keys[entity]);
        (outcome, sent, Instant::now())
    }

    // The bounds of the histograms are constants that are valid: the errors of these two cannot happen.

    /// Open loop: each request is sent at its time, whatever became of the ones before it, as soon as a client is free.
    pub fn run_open(&self, clients: Vec<Box<dyn Client>>) -> Result<Tally, CreationError> {
        let next = AtomicUsize::new(0);
        self.run(clients, |client, start, tally| {
            let end = start + self.schedule.length;
            while let Some((at, entity)) = self.schedule.arrivals.get(next.fetch_add(1, Ordering::Relaxed)) {
                let due = start + *at;
                if self.stop.load(Ordering::Relaxed) {
                    return;
                }
                let now = Instant::now();
                if now >= end {
                    tally.unanswered += 1;
                    tally.note_latency(end - due);
                    continue;
                }
                thread::sleep(due.saturating_duration_since(now));
                let (outcome, sent, received) = self.ask(client, *entity);
                tally.note_latency(received - due);
                tally.note(self, *entity, outcome, sent, received);
            }
        })
    }

    /// Closed loop: each client asks again as soon as it has its answer, for `length`.
    pub fn run_closed(&self, clients: Vec<Box<dyn Client>>, length: Duration) -> Result<Tally, CreationError> {
        let next = AtomicUsize::new(0);
        self.run(clients, |client, start, tally| {
            while start.elapsed() < length && !self.stop.load(Ordering::Relaxed) {
                let turn = next.fetch_add(1, Ordering::Relaxed) % self.schedule.arrivals.len().max(1);
                let Some((_, entity)) = self.schedule.arrivals.get(turn) else { return };
                let (outcome, sent, received) = self.ask(client, *entity);
                tally.note_latency(received - sent);
                tally.note(self, *entity, outcome, sent, received);
            }
        })
    }

    fn run<W>(&self, clients: Vec<Box<dyn Client>>, work: W) -> Result<Tally, CreationError>
    where
        W: Fn(&mut dyn Client, Instant, &mut Tally) + Sync,
    {
        let mut total = Tally::new()?;
        let empty = total.clone();
        let start = Instant::now();
        thread::scope(|scope| {
            let (work, empty) = (&work, &empty);
            let running: Vec<_> = clients
                .into_iter()
                .map(|mut client| {
                    scope.spawn(move || {
                        let mut tally = empty.clone();
                        work(&mut *client, start, &mut tally);
                        tally
                    })
                })
                .collect();
            for worker in running {
                match worker.join() {
                    Ok(tally) => total.add(tally),
                    Err(cause) => std::panic::resume_unwind(cause),
                }
            }
        });
        total.elapsed = start.elapsed();
        Ok(total)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::demo::data::Dataset;

    /// Answers truly, except that the first request takes its time.
    struct Slow<'a> {
        truth: &'a Truth,
        keyspace: &'a Keyspace,
        first: bool,
        lie: bool,
    }

    impl Client for Slow<'_> {
        fn get(&mut self, entity: &Entity, _key: &str) -> Result<Option<String>, ClientError> {
            if std::mem::take(&mut self.first) {
                thread::sleep(Duration::from_millis(300));
            }
            let index = self.keyspace.entities.iter().position(|known| known == entity).unwrap();
            Ok((!self.lie).then(|| self.truth.current(index)))
        }
    }

    #[track_caller]
    fn run(lie: bool) -> Tally {
        let dataset = Dataset::generate(500);
        let keyspace: &'static Keyspace = Box::leak(Box::new(Keyspace::of(&dataset)));
        let truth: &'static Truth = Box::leak(Box::new(Truth::new(&dataset, keyspace)));
        let keys: Vec<_> = keyspace.entities.iter().map(Entity::key).collect();
        let schedule = Schedule::new(keys.len(), 200.0, Duration::from_millis(600));
        let (stop, live) = (AtomicBool::new(false), Live::default());
        let load = Load { keyspace, keys: &keys, schedule: &schedule, truth, stop: &stop, live: &live };
        let tally = load.run_open(vec![Box::new(Slow { truth, keyspace, first: true, lie })]).unwrap();
        assert_eq!(tally.answered + tally.unanswered, schedule.arrivals.len() as u64);
        tally
    }

    #[test]
    fn a_stall_counts_for_all_who_waited_behind_it() {
        let tally = run(false);
        assert_eq!(tally.wrong(|_| Duration::ZERO), 0);
        // Some 60 requests fell due during the stall of 300 ms: far more than the one that was stalled itself.
        let stalled = tally.latency_us.len() - tally.latency_us.count_between(0, 50_000);
        assert!(stalled > 20, "only {stalled} requests felt the stall");
    }

    #[test]
    fn wrong_replies_are_counted() {
        let tally = run(true);
        assert!(tally.answered > 0);
        assert_eq!(tally.wrong(|_| LONGEST), tally.answered);
        assert!(tally.never_true_example.is_some());
    }
}
