//! The query log: for whoever switches it on, two structured events a query, one when it begins and one when it ends.
//!
//! `--log info,larder::origin::query=debug` does, with `--log-format json` for machines. Nothing is computed while it is off. The
//! events tell which queries overlapped, which were identical, and how each ended, also those that failed or that nobody waited for
//! any longer:
//!
//! | field | meaning |
//! |---|---|
//! | `query` | a number that the two events of a query share, counted from 1 in each process |
//! | `origin` | the origin's name |
//! | `keys` | the pattern of the rule; `-` where a batch from a journal may be of several |
//! | `key` | [`fingerprint`] of the key in 16 hexadecimal digits; of all keys together where a query asks for many |
//! | `count` | how many keys the query asks for |
//! | `at_us` | microseconds since 1970, by the system's clock |
//! | `took_us` | at the end alone: microseconds since it began |
//! | `outcome` | at the end alone: `answered`, `timeout`, `unreachable`, `failed`, `unusable`, `abandoned`, or of a write `rejected` or `unknown` |
//!
//! Keys never appear: they may hold what is nobody's business. A fingerprint tells which queries were the same, across sidecars too,
//! and whoever knows a key can look for it. It is no secret: short keys can be guessed from it.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{SystemTime, UNIX_EPOCH};

use tokio::time::Instant;
use tracing::Level;

use super::error::Failure;
use crate::policy::KeyPattern;

/// The target of the log's events, which are at level debug.
pub const TARGET: &str = "larder::origin::query";

/// Numbers the queries of this process.
static LAST_QUERY: AtomicU64 = AtomicU64::new(0);

/// What a load asks for: keys of the rule with this pattern.
#[derive(Debug, Clone, Copy)]
pub(super) struct Asked<'a> {
    pattern: Pattern<'a>,
    keys: Keys<'a>,
}

/// `None`: several.
#[derive(Debug, Clone, Copy)]
struct Pattern<'a>(Option<&'a KeyPattern>);

impl fmt::Display for Pattern<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Some(pattern) => pattern.fmt(f),
            None => f.write_str("-"),
        }
    }
}

#[derive(Debug, Clone, Copy)]
enum Keys<'a> {
    One(&'a [u8]),
    Many(&'a [Vec<u8>]),
}

/// The 64-bit FNV-1a hash of a key: short, the same everywhere, and easily computed by other programs.
pub fn fingerprint(key: &[u8]) -> u64 {
    continued(0xcbf2_9ce4_8422_2325, key)
}

fn continued(hash: u64, bytes: &[u8]) -> u64 {
    bytes.iter().fold(hash, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3))
}

impl<'a> Asked<'a> {
    pub(super) const fn one(pattern: &'a KeyPattern, key: &'a [u8]) -> Self {
        Self { pattern: Pattern(Some(pattern)), keys: Keys::One(key) }
    }

    pub(super) const fn many(pattern: &'a KeyPattern, keys: &'a [Vec<u8>]) -> Self {
        Self { pattern: Pattern(Some(pattern)), keys: Keys::Many(keys) }
    }

    /// What comes from a journal, of any rules.
    pub(super) const fn journalled(keys: &'a [Vec<u8>]) -> Self {
        Self { pattern: Pattern(None), keys: Keys::Many(keys) }
    }
}

impl Keys<'_> {
    const fn count(&self) -> usize {
        match self {
            Self::One(_) => 1,
            Self::Many(keys) => keys.len(),
        }
    }

    /// Of many keys, each goes in with its length, so that other keys of the same bytes give another one.
    fn fingerprint(&self) -> u64 {
        match self {
            Self::One(key) => fingerprint(key),
            Self::Many(keys) => {
                keys.iter().fold(fingerprint(b""), |hash, key| continued(continued(hash, &key.len().to_le_bytes()), key))
            }
        }
    }
}

/// A query under way. Dropped before its end is known, it was abandoned.
pub(super) struct Logged<'a> {
    query: u64,
    origin: &'a str,
    keys: Pattern<'a>,
    key: Hexadecimal,
    count: usize,
    start: Instant,
    outcome: &'static str,
}

struct Hexadecimal(u64);

impl fmt::Display for Hexadecimal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

/// Logs that a query begins. `None` where nobody reads the log.
pub(super) fn begin<'a>(origin: &'a str, asked: Asked<'a>) -> Option<Logged<'a>> {
    if !tracing::enabled!(target: TARGET, Level::DEBUG) {
        return None;
    }
    let Asked { pattern: keys, keys: asked } = asked;
    let (query, key, count) = (LAST_QUERY.fetch_add(1, Relaxed) + 1, Hexadecimal(asked.fingerprint()), asked.count());
    tracing::debug!(target: TARGET, query, origin, %keys, %key, count, at_us = now_us(), "a query begins");
    Some(Logged { query, origin, keys, key, count, start: Instant::now(), outcome: "abandoned" })
}

impl Logged<'_> {
    /// Logs how it ended.
    pub(super) fn ended(mut self, failure: Option<&Failure>) {
        self.outcome = match failure {
            None => "answered",
            Some(Failure::Timeout) => "timeout",
            Some(Failure::Unreachable(_)) => "unreachable",
            Some(Failure::Failed { .. }) => "failed",
            Some(Failure::Unusable(_)) => "unusable",
            Some(Failure::Rejected(_)) => "rejected",
            Some(Failure::Unknown { .. }) => "unknown",
        };
    }
}

impl Drop for Logged<'_> {
    fn drop(&mut self) {
        let Self { query, origin, keys, key, count, start, outcome } = self;
        let took_us = u64::try_from(start.elapsed().as_micros()).unwrap_or(u64::MAX);
        tracing::debug!(target: TARGET, query, origin, %keys, %key, count, at_us = now_us(), took_us, outcome, "a query ended");
    }
}

fn now_us() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_micros()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fingerprints_are_those_of_fnv_1a() {
        // From the reference implementation's test vectors.
        for (key, expected) in [("", 0xcbf2_9ce4_8422_2325), ("a", 0xaf63_dc4c_8601_ec8c), ("foobar", 0x8594_4171_f739_67e8)] {
            assert_eq!(fingerprint(key.as_bytes()), expected, "{key}");
        }
    }

    #[test]
    fn the_same_bytes_in_other_keys_are_another_question() {
        let of = |keys: &[&str]| Keys::Many(&keys.iter().map(|key| key.as_bytes().to_vec()).collect::<Vec<_>>()).fingerprint();
        assert_eq!(of(&["a", "bc"]), of(&["a", "bc"]));
        assert_ne!(of(&["a", "bc"]), of(&["ab", "c"]));
    }
}
