//! Which keys clients use most, for as long as somebody asks: a person at the sidecar's own socket, never a scrape.
//!
//! While nobody asks, a command costs one look at a flag. While somebody does, keys are counted by Misra and Gries: in bounded memory, each
//! count too small by at most [`Hottest::uncertainty`]. A worker never waits for another: a key that meets one that counts is left out.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use rustc_hash::FxBuildHasher;

/// The most keys that are counted at once.
const MOST_KEYS: usize = 1024;
/// The longest key that is counted.
const MOST_BYTES: usize = 512;
/// How many are told.
const TOLD: usize = 20;

/// See the module.
#[derive(Debug, Default)]
pub struct HotKeys {
    watched: AtomicBool,
    counts: Mutex<Counts>,
}

#[derive(Debug, Default)]
struct Counts {
    keys: HashMap<Vec<u8>, u64, FxBuildHasher>,
    total: u64,
    /// How often every count was lowered.
    lowered: u64,
}

/// What was seen.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hottest {
    /// The keys that were used most, with how often at least.
    pub keys: Vec<(Vec<u8>, u64)>,
    /// How many uses of keys were seen.
    pub total: u64,
    /// How much too small each count may be.
    pub uncertainty: u64,
}

impl HotKeys {
    /// Whether keys are to be noted now.
    #[inline]
    pub fn are_watched(&self) -> bool {
        self.watched.load(Ordering::Relaxed)
    }

    /// A command named this key.
    pub fn note(&self, key: &[u8]) {
        if let Ok(mut counts) = self.counts.try_lock() {
            counts.note(key);
        }
    }

    /// Watches for as long as that. `None`: somebody else does.
    pub async fn watch(&self, length: Duration) -> Option<Hottest> {
        if self.watched.swap(true, Ordering::Relaxed) {
            return None;
        }
        // Also where whoever asked has gone.
        let watch = Watch(self);
        self.take();
        tokio::time::sleep(length).await;
        drop(watch);
        Some(self.take().hottest())
    }

    fn take(&self) -> Counts {
        std::mem::take(&mut *self.counts.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// Ends a watch.
struct Watch<'a>(&'a HotKeys);

impl Drop for Watch<'_> {
    fn drop(&mut self) {
        self.0.watched.store(false, Ordering::Relaxed);
    }
}

impl Counts {
    fn note(&mut self, key: &[u8]) {
        self.total += 1;
        if let Some(count) = self.keys.get_mut(key) {
            *count += 1;
        } else if key.len() > MOST_BYTES {
            // Counted in the total alone.
        } else if self.keys.len() < MOST_KEYS {
            self.keys.insert(key.to_vec(), 1);
        } else {
            self.lowered += 1;
            self.keys.retain(|_, count| {
                *count -= 1;
                *count > 0
            });
        }
    }

    fn hottest(self) -> Hottest {
        let mut keys: Vec<(Vec<u8>, u64)> = self.keys.into_iter().collect();
        keys.sort_unstable_by(|a, b| b.1.cmp(&a.1).then_with(|| a.0.cmp(&b.0)));
        keys.truncate(TOLD);
        Hottest { keys, total: self.total, uncertainty: self.lowered }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    #[test]
    fn what_is_used_often_is_found_among_what_is_used_once() {
        let mut counts = Counts::default();
        for at in 0..20_000_u32 {
            counts.note(format!("once:{at}").as_bytes());
            if at % 10 == 0 {
                counts.note(b"hot");
            }
        }
        counts.note(&[b'x'; MOST_BYTES + 1]);
        assert!(counts.keys.len() <= MOST_KEYS);
        let Hottest { keys, total, uncertainty } = counts.hottest();
        let (key, count) = keys.first().expect("one");
        assert_eq!((key.as_slice(), total), (b"hot".as_slice(), 22_001));
        assert!(*count <= 2000 && count + uncertainty >= 2000, "{count} and {uncertainty}");
        assert!(uncertainty <= total / MOST_KEYS as u64 && keys.len() <= TOLD);
    }

    #[tokio::test]
    async fn one_watches_at_a_time_and_only_while_it_asks() {
        let hot = Arc::new(HotKeys::default());
        assert!(!hot.are_watched());
        let (watching, length) = (hot.clone(), Duration::from_millis(300));
        let first = tokio::spawn(async move { watching.watch(length).await });
        while !hot.are_watched() {
            tokio::task::yield_now().await;
        }
        assert_eq!(hot.watch(Duration::ZERO).await, None, "another watches");
        hot.note(b"a");
        hot.note(b"a");
        let seen = first.await.expect("it ends").expect("it watched");
        assert_eq!((seen.keys, seen.total), (vec![(b"a".to_vec(), 2)], 2));
        assert!(!hot.are_watched());
        // Who asked has gone.
        drop(tokio::time::timeout(Duration::ZERO, hot.watch(Duration::from_secs(60))).await);
        assert!(!hot.are_watched());
    }
}
