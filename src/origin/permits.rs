//! How many loads may be under way at once: a number that may change while they are.

use std::sync::{Mutex, MutexGuard, PoisonError};

use tokio::sync::{AcquireError, Semaphore, SemaphorePermit, TryAcquireError};

/// Permits, first come, first served.
#[derive(Debug)]
pub(super) struct Permits {
    semaphore: Semaphore,
    level: Mutex<Level>,
}

#[derive(Debug)]
struct Level {
    most: usize,
    /// How many of those that are out are not to come back: there were more when they were given.
    owed: usize,
}

/// One of them. It comes back when it is dropped.
#[derive(Debug)]
pub(super) struct Permit<'a> {
    permits: &'a Permits,
    inner: Option<SemaphorePermit<'a>>,
}

impl Permits {
    pub(super) fn new(most: u32) -> Self {
        let most = bounded(most);
        Self { semaphore: Semaphore::new(most), level: Mutex::new(Level { most, owed: 0 }) }
    }

    /// How many there are.
    pub(super) fn most(&self) -> usize {
        self.level().most
    }

    /// There are so many from now on. Where that is fewer, those that are out stay valid, and the next ones wait for them.
    pub(super) fn resize(&self, most: u32) {
        let (most, mut level) = (bounded(most), self.level());
        if most >= level.most {
            let more = most - level.most;
            let kept = more.min(level.owed);
            level.owed -= kept;
            self.semaphore.add_permits(more - kept);
        } else {
            let fewer = level.most - most;
            level.owed += fewer - self.semaphore.forget_permits(fewer);
        }
        level.most = most;
    }

    pub(super) fn try_acquire(&self) -> Result<Permit<'_>, TryAcquireError> {
        self.semaphore.try_acquire().map(|permit| self.guard(permit))
    }

    pub(super) async fn acquire(&self) -> Result<Permit<'_>, AcquireError> {
        self.semaphore.acquire().await.map(|permit| self.guard(permit))
    }

    fn guard<'a>(&'a self, permit: SemaphorePermit<'a>) -> Permit<'a> {
        Permit { permits: self, inner: Some(permit) }
    }

    fn level(&self) -> MutexGuard<'_, Level> {
        self.level.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Permit<'_> {
    fn drop(&mut self) {
        let mut level = self.permits.level();
        if level.owed > 0
            && let Some(permit) = self.inner.take()
        {
            level.owed -= 1;
            permit.forget();
        }
    }
}

fn bounded(most: u32) -> usize {
    (most as usize).min(Semaphore::MAX_PERMITS)
}

#[cfg(test)]
mod tests {
    use std::task::Poll;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// Never more are given than there are at that moment, and in the end all are back.
        #[test]
        fn permits_follow_every_change(first in 1u32..9, steps in proptest::collection::vec((0u8..3, 1u32..9), 1..80)) {
            let permits = Permits::new(first);
            let (mut out, mut most) = (Vec::new(), first as usize);
            for (step, number) in steps {
                match step {
                    0 => {
                        permits.resize(number);
                        most = number as usize;
                    }
                    1 => {
                        out.pop();
                    }
                    _ => {
                        let given = permits.try_acquire();
                        prop_assert_eq!(given.is_ok(), out.len() < most, "{} of {}", out.len(), most);
                        out.extend(given);
                    }
                }
                prop_assert_eq!(permits.most(), most);
            }
            out.clear();
            prop_assert_eq!(permits.semaphore.available_permits(), most);
            prop_assert_eq!(permits.level().owed, 0);
        }
    }

    #[tokio::test]
    async fn whoever_waits_is_served_where_there_are_more() {
        let permits = Permits::new(1);
        let held = permits.acquire().await.unwrap();
        let mut waiting = std::pin::pin!(permits.acquire());
        let mut is_served = async || std::future::poll_fn(|cx| Poll::Ready(waiting.as_mut().poll(cx).is_ready())).await;
        assert!(!is_served().await);
        permits.resize(2);
        assert!(is_served().await);
        drop(held);
    }
}
