//! Which objects are to be looked at, and when. Each at most once at a time, and each remembered once however often it is named.

use std::collections::{HashMap, HashSet};
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::{Instant, sleep_until};

/// How long changes of one object are gathered before it is looked at: one change seldom comes alone.
const GATHER: Duration = Duration::from_millis(50);

/// A namespaced object.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Key {
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

/// A queue of objects. It holds each once, so it is bounded by their number.
#[derive(Debug, Clone, Default)]
pub struct Queue {
    shared: Arc<Shared>,
}

#[derive(Debug, Default)]
struct Shared {
    state: Mutex<State>,
    changed: Notify,
}

#[derive(Debug, Default)]
struct State {
    due: HashMap<Key, Instant>,
    running: HashSet<Key>,
}

/// The right to work on an object; until it is dropped nobody else gets it.
#[derive(Debug)]
pub struct Turn {
    key: Key,
    shared: Arc<Shared>,
}

impl Turn {
    /// Which object.
    pub fn key(&self) -> &Key {
        &self.key
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        self.shared.lock().running.remove(&self.key);
        self.shared.changed.notify_waiters();
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Queue {
    /// The object changed: it is looked at soon.
    pub fn add(&self, key: Key) {
        self.add_after(key, GATHER);
    }

    /// The object is looked at after `delay`, or earlier where that was asked for already.
    pub fn add_after(&self, key: Key, delay: Duration) {
        let at = Instant::now() + delay;
        {
            let mut state = self.shared.lock();
            let due = state.due.entry(key).or_insert(at);
            *due = at.min(*due);
        }
        self.shared.changed.notify_waiters();
    }

    /// The next object that is due, once there is one that nobody works on.
    pub async fn next(&self) -> Turn {
        loop {
            let mut changed = std::pin::pin!(self.shared.changed.notified());
            // From here on no change is missed.
            changed.as_mut().enable();
            let next = {
                let mut state = self.shared.lock();
                let State { due, running } = &*state;
                let next = due.iter().filter(|(key, _)| !running.contains(*key)).min_by_key(|(_, at)| **at);
                let next = next.map(|(key, at)| (key.clone(), *at));
                if let Some((key, _)) = next.as_ref().filter(|(_, at)| *at <= Instant::now()) {
                    state.due.remove(key);
                    state.running.insert(key.clone());
                    return Turn { key: key.clone(), shared: self.shared.clone() };
                }
                next
            };
            match next {
                None => changed.await,
                Some((_, at)) => tokio::select! {
                    () = changed => {}
                    () = sleep_until(at) => {}
                },
            }
        }
    }
}

/// How long to wait after so many failures in a row: from one second, doubled each time, to two minutes; of that between half and all,
/// so that objects that failed together are not tried together.
pub fn back_off(failures: u32) -> Duration {
    let whole = Duration::from_secs(1).saturating_mul(1 << failures.saturating_sub(1).min(7)).min(Duration::from_secs(120));
    whole.mul_f64(0.5 + fastrand::f64() / 2.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(name: &str) -> Key {
        Key { namespace: "shop".to_owned(), name: name.to_owned() }
    }

    #[tokio::test]
    async fn an_object_is_worked_on_once_at_a_time() {
        let queue = Queue::default();
        queue.add(key("a"));
        queue.add(key("a"));
        let turn = queue.next().await;
        queue.add(key("a"));
        queue.add_after(key("b"), GATHER * 2);
        let other = queue.next().await;
        assert_eq!((turn.key().name.as_str(), other.key().name.as_str()), ("a", "b"));
        drop(turn);
        assert_eq!(queue.next().await.key(), &key("a"));
        assert!(tokio::time::timeout(GATHER * 3, queue.next()).await.is_err());
    }

    #[tokio::test]
    async fn an_earlier_time_wins() {
        let queue = Queue::default();
        queue.add_after(key("a"), Duration::from_secs(3600));
        queue.add(key("a"));
        queue.add_after(key("a"), Duration::from_secs(7200));
        drop(queue.next().await);
    }

    #[tokio::test]
    async fn who_waits_hears_of_an_earlier_object() {
        let queue = Queue::default();
        queue.add_after(key("late"), Duration::from_secs(3600));
        let waiting = tokio::spawn({
            let queue = queue.clone();
            async move { queue.next().await.key().clone() }
        });
        tokio::task::yield_now().await;
        queue.add(key("soon"));
        assert_eq!(waiting.await.unwrap(), key("soon"));
    }

    #[test]
    fn failures_are_tried_again_ever_less_often() {
        for (failures, most) in [(1, 1), (2, 2), (4, 8), (8, 120), (1000, 120)] {
            let delay = back_off(failures);
            assert!(delay <= Duration::from_secs(most) && delay * 2 >= Duration::from_secs(most), "{failures}: {delay:?}");
        }
    }
}
