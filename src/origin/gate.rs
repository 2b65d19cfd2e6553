//! What every load passes, whatever its origin is: the breaker, the cap on loads under way, the deadline and one retry.
//!
//! Each origin has a gate of its own, so that one that hangs holds nobody else's loads.

use std::future::poll_fn;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::task::Poll;
use std::time::Duration;

use tokio::time::{Instant, sleep_until, timeout_at};

use super::breaker::{Breaker, BreakerState};
use super::error::{Failure, LoadError};
use super::permits::{Permit, Permits};
use super::query_log::{self, Asked};
use crate::policy::Span;
use crate::policy::snapshot::Origin;

/// How many loads may wait for each connection. More are turned away at once: they would only wait to time out.
const WAITING_PER_CONNECTION: u64 = 64;
/// The retry comes after a pause between a half of this and the whole.
const RETRY_PAUSE: Duration = Duration::from_millis(40);
/// The first attempt and one retry.
const ATTEMPTS: u32 = 2;

/// Counters of one origin since the process began.
#[derive(Debug, Default)]
pub(super) struct Counters {
    loads: AtomicU64,
    queries: AtomicU64,
    errors: AtomicU64,
    timeouts: AtomicU64,
    refused: AtomicU64,
    busy: AtomicU64,
    in_flight: AtomicU64,
    waiting: AtomicU64,
}

/// A reading of one origin's counters.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OriginStats {
    /// The origin's name.
    pub origin: String,
    /// How many loads may be under way at once.
    pub connections: u64,
    /// Loads asked for, each with one outcome. A batch is one load.
    pub loads: u64,
    /// Attempts made at the origin, retries included.
    pub queries: u64,
    /// Loads that ended in an error of any kind.
    pub errors: u64,
    /// Errors because the origin gave no answer in time.
    pub timeouts: u64,
    /// Errors because the breaker was open.
    pub refused: u64,
    /// Errors because no connection came free.
    pub busy: u64,
    /// Loads at the origin now.
    pub in_flight: u64,
    /// Loads that wait for a connection now.
    pub waiting: u64,
    /// Whether the origin is asked now.
    pub breaker: BreakerState,
}

#[derive(Debug)]
pub(super) struct Gate {
    origin: String,
    timeout: Span,
    permits: Permits,
    breaker: Breaker,
    counters: Arc<Counters>,
}

impl Gate {
    /// A gate for `origin`, which goes on counting where `counters` stand.
    pub(super) fn new(origin: &Origin, counters: Arc<Counters>) -> Self {
        Self {
            origin: origin.name.clone(),
            timeout: origin.timeout,
            permits: Permits::new(origin.max_connections),
            breaker: Breaker::new(),
            counters,
        }
    }

    /// How many loads may be under way at once.
    pub(super) fn connections(&self) -> usize {
        self.permits.most()
    }

    /// So many loads may be under way at once from now on.
    pub(super) fn allow(&self, connections: u32) {
        self.permits.resize(connections);
    }

    pub(super) fn counters(&self) -> &Arc<Counters> {
        &self.counters
    }

    pub(super) fn stats(&self) -> OriginStats {
        let counters = &self.counters;
        OriginStats {
            origin: self.origin.clone(),
            connections: self.permits.most() as u64,
            loads: counters.loads.load(Relaxed),
            queries: counters.queries.load(Relaxed),
            errors: counters.errors.load(Relaxed),
            timeouts: counters.timeouts.load(Relaxed),
            refused: counters.refused.load(Relaxed),
            busy: counters.busy.load(Relaxed),
            in_flight: counters.in_flight.load(Relaxed),
            waiting: counters.waiting.load(Relaxed),
            breaker: self.breaker.state(),
        }
    }

    /// Runs `attempt`, which asks for `asked`, within the cap and the deadline, and once more where the first failure makes that
    /// sensible: loads only read, and a write's failure says whether it may be repeated. Dropping the returned future abandons the
    /// attempt.
    pub(super) async fn run<T, F>(&self, asked: Asked<'_>, attempt: impl Fn(Instant) -> F) -> Result<T, LoadError>
    where
        F: Future<Output = Result<T, Failure>>,
    {
        self.run_until(None, asked, attempt).await
    }

    /// As [`Gate::run`], where all is to be over at a moment that may come before the origin's timeout has passed, and where nothing is begun
    /// behind it, even if this process stood still until then.
    pub(super) async fn run_until<T, F>(
        &self,
        until: Option<Instant>,
        asked: Asked<'_>,
        attempt: impl Fn(Instant) -> F,
    ) -> Result<T, LoadError>
    where
        F: Future<Output = Result<T, Failure>>,
    {
        self.counters.loads.fetch_add(1, Relaxed);
        let deadline = Instant::now() + self.timeout.as_duration();
        let deadline = until.map_or(deadline, |until| until.min(deadline));
        let outcome = self.pass(deadline, asked, |deadline| up_to(until, attempt(deadline))).await;
        if let Err(error) = &outcome {
            self.counters.errors.fetch_add(1, Relaxed);
            match error {
                LoadError::Refused { .. } => self.counters.refused.fetch_add(1, Relaxed),
                LoadError::Busy { .. } => self.counters.busy.fetch_add(1, Relaxed),
                LoadError::Timeout { .. } => self.counters.timeouts.fetch_add(1, Relaxed),
                _ => 0,
            };
        }
        outcome
    }

    async fn pass<T, F>(&self, deadline: Instant, asked: Asked<'_>, attempt: impl Fn(Instant) -> F) -> Result<T, LoadError>
    where
        F: Future<Output = Result<T, Failure>>,
    {
        let timeout = self.timeout.as_duration();
        if let Some(wait) = self.breaker.refuses_for(Instant::now()) {
            return Err(self.refused(wait));
        }
        // With less than a tenth of its time left a load would most likely only hold up the next one.
        let _permit = self.permit(deadline - timeout / 10).await?;
        let pass = self.breaker.admit(Instant::now()).map_err(|wait| self.refused(wait))?;
        let _in_flight = Counted::new(&self.counters.in_flight);
        match self.attempts(deadline, asked, attempt).await {
            Ok(value) => {
                pass.succeeded();
                Ok(value)
            }
            Err(failure) => {
                if failure.is_trouble() {
                    pass.failed(Instant::now(), failure.retry_after());
                } else {
                    pass.succeeded();
                }
                Err(failure.named(&self.origin, self.timeout))
            }
        }
    }

    async fn attempts<T, F>(&self, deadline: Instant, asked: Asked<'_>, attempt: impl Fn(Instant) -> F) -> Result<T, Failure>
    where
        F: Future<Output = Result<T, Failure>>,
    {
        let mut tried = 0;
        loop {
            tried += 1;
            self.counters.queries.fetch_add(1, Relaxed);
            let query = query_log::begin(&self.origin, asked);
            let outcome = timeout_at(deadline, attempt(deadline)).await.unwrap_or(Err(Failure::Timeout));
            if let Some(query) = query {
                query.ended(outcome.as_ref().err());
            }
            let failure = match outcome {
                Ok(value) => return Ok(value),
                Err(failure) => failure,
            };
            let again = Instant::now() + retry_pause();
            if tried == ATTEMPTS || !failure.is_retriable() || again >= deadline {
                return Err(failure);
            }
            sleep_until(again).await;
        }
    }

    /// One of the origin's connections. The queue is first come, first served.
    async fn permit(&self, until: Instant) -> Result<Permit<'_>, LoadError> {
        if let Ok(permit) = self.permits.try_acquire() {
            return Ok(permit);
        }
        let busy = || LoadError::Busy { origin: self.origin.clone() };
        let waiting = Counted::new(&self.counters.waiting);
        if waiting.before >= WAITING_PER_CONNECTION.saturating_mul(self.permits.most() as u64) {
            return Err(busy());
        }
        match timeout_at(until, self.permits.acquire()).await {
            Ok(Ok(permit)) => Ok(permit),
            Ok(Err(_)) | Err(_) => Err(busy()),
        }
    }

    fn refused(&self, wait: Duration) -> LoadError {
        let retry_in = Span::from_millis(u64::try_from(wait.as_millis()).unwrap_or(u64::MAX).max(1));
        LoadError::Refused { origin: self.origin.clone(), retry_in }
    }
}

/// An attempt that takes no further step behind a moment, whatever has come by then of what it waited for. A deadline alone lets it take one.
async fn up_to<T>(moment: Option<Instant>, attempt: impl Future<Output = Result<T, Failure>>) -> Result<T, Failure> {
    let mut attempt = pin!(attempt);
    poll_fn(|context| match moment {
        Some(moment) if Instant::now() >= moment => Poll::Ready(Err(Failure::Timeout)),
        _ => attempt.as_mut().poll(context),
    })
    .await
}

/// By chance, so that sidecars that failed together do not ask together again.
fn retry_pause() -> Duration {
    RETRY_PAUSE.mul_f64(0.5 + fastrand::f64() / 2.0)
}

/// Counts itself for as long as it lives.
struct Counted<'a> {
    counter: &'a AtomicU64,
    before: u64,
}

impl<'a> Counted<'a> {
    fn new(counter: &'a AtomicU64) -> Self {
        Self { counter, before: counter.fetch_add(1, Relaxed) }
    }
}

impl Drop for Counted<'_> {
    fn drop(&mut self) {
        self.counter.fetch_sub(1, Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::collections::HashSet;

    use tokio::task::yield_now;

    use super::*;

    #[tokio::test]
    async fn whoever_stood_still_begins_nothing_behind_the_moment_that_was_given() {
        const STANDS_STILL: Duration = Duration::from_millis(20);
        let begun = Cell::new(0);
        let attempt = async || {
            // Meanwhile the origin has answered the first of what it was asked.
            std::thread::sleep(STANDS_STILL);
            yield_now().await;
            begun.set(begun.get() + 1);
            Ok::<_, Failure>(())
        };
        let given_up = up_to(Some(Instant::now() + STANDS_STILL), attempt()).await;
        assert!(matches!(given_up, Err(Failure::Timeout)) && begun.get() == 0);
        assert!(up_to(None, attempt()).await.is_ok() && begun.get() == 1);
    }

    #[test]
    fn pauses_before_a_retry_differ() {
        let pauses: HashSet<Duration> = (0..100).map(|_| retry_pause()).collect();
        assert!(pauses.iter().all(|pause| (RETRY_PAUSE / 2..=RETRY_PAUSE).contains(pause)), "{pauses:?}");
        assert!(pauses.len() > 50, "{pauses:?}");
    }
}
