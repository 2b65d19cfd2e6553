//! Which objects are to be looked at, and when. Each at most once at a time, and each remembered once however often it is named.

use std::collections::{HashMap, HashSet};
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::{Instant, sleep_until};

/// How long changes of one object are gathered before it is looked at: one change seldom comes alone.
const GATHER: Duration = Duration::from_millis(50);
/// How long a change of what belongs to an object that failed waits for its back-off, at the most.
const LONGEST_HOLD: Duration = Duration::from_secs(30);

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
    /// Objects that failed: they are not looked at before, whatever changes, unless they themselves are written anew.
    held: HashMap<Key, Hold>,
    running: HashSet<Key>,
}

/// An object that failed.
#[derive(Debug, Clone, Copy)]
struct Hold {
    until: Instant,
    /// Its `metadata.generation` when it did.
    generation: Option<i64>,
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
    /// Something about the object changed: it is looked at soon, or where it failed, when its back-off is over.
    pub fn add(&self, key: Key) {
        let at = Instant::now() + GATHER;
        let held = self.shared.lock().held.get(&key).map(|hold| hold.until);
        self.add_at(key, held.map_or(at, |until| at.max(until)));
    }

    /// The object itself changed, to this generation: with a new one its back-off is over.
    pub fn add_changed(&self, key: Key, generation: Option<i64>) {
        {
            let mut state = self.shared.lock();
            if state.held.get(&key).is_some_and(|hold| hold.generation != generation) {
                state.held.remove(&key);
            }
        }
        self.add(key);
    }

    /// The object is looked at soon, whether it failed or not: others wait for what changed.
    pub fn add_urgent(&self, key: Key) {
        self.add_after(key, GATHER);
    }

    /// The object, of this generation, failed, and is tried again after `delay`.
    pub fn fail(&self, key: Key, generation: Option<i64>, delay: Duration) {
        let now = Instant::now();
        let (at, until) = (now + delay, now + delay.min(LONGEST_HOLD));
        {
            let mut state = self.shared.lock();
            state.held.insert(key.clone(), Hold { until, generation });
            // What changed while it was looked at waits as well.
            let due = state.due.entry(key).or_insert(at);
            *due = (*due).clamp(until, at);
        }
        self.shared.changed.notify_waiters();
    }

    /// Nothing is known any more of who failed.
    pub fn forget_failures(&self) {
        self.shared.lock().held.clear();
    }

    /// The object did not fail, or is gone.
    pub fn succeed(&self, key: &Key) {
        self.shared.lock().held.remove(key);
    }

    /// The object is looked at after `delay`, or earlier where that was asked for already.
    pub fn add_after(&self, key: Key, delay: Duration) {
        self.add_at(key, Instant::now() + delay);
    }

    fn add_at(&self, key: Key, at: Instant) {
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
                let State { due, running, held: _ } = &*state;
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

    #[test]
    fn what_failed_waits_although_something_changes() {
        let queue = Queue::default();
        let due = || queue.shared.lock().due[&key("a")];
        let until = || queue.shared.lock().held[&key("a")].until;
        queue.add(key("a"));
        queue.fail(key("a"), Some(3), Duration::from_secs(8));
        queue.add(key("a"));
        // A status that is written, or what makes no generation.
        queue.add_changed(key("a"), Some(3));
        assert_eq!(due(), until());
        queue.shared.lock().due.clear();
        queue.fail(key("a"), Some(3), Duration::from_secs(100));
        assert_eq!(due() - until(), Duration::from_secs(100) - LONGEST_HOLD);
        queue.add(key("a"));
        assert_eq!(due(), until(), "a change waits, and not for long");
        queue.add_urgent(key("a"));
        assert!(due() < until());
    }

    #[test]
    fn what_is_corrected_waits_no_more() {
        let queue = Queue::default();
        let due_soon = || queue.shared.lock().due[&key("a")] <= Instant::now() + GATHER;
        queue.fail(key("a"), Some(3), LONGEST_HOLD);
        queue.add_changed(key("a"), Some(4));
        assert!(due_soon());
        queue.shared.lock().due.clear();
        queue.fail(key("a"), Some(4), LONGEST_HOLD);
        queue.shared.lock().due.clear();
        queue.succeed(&key("a"));
        queue.add(key("a"));
        assert!(due_soon());
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
