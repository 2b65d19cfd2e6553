//! Under which versions clients were told that a key is missing: what they store is a value of that version, whatever counts by then. Pure.

use rustc_hash::FxHashMap;
use smallvec::SmallVec;

use crate::policy::versions::Version;

/// So many keys are noted before those are looked for whose misses are over.
const FIRST_LOOK: usize = 1_024;

/// The versions under which keys were told to be missing, and may still be stored.
#[derive(Debug, Default)]
pub struct Told {
    keys: FxHashMap<(u32, Vec<u8>), SmallVec<[Version; 2]>>,
    /// How many keys there were when the misses that are over were dropped last.
    left: usize,
}

impl Told {
    /// A client was told of a key. `is_outstanding` tells of a name whether any miss of it is not over: of the others nothing is kept.
    pub fn note(&mut self, database: u32, key: &[u8], version: Version, is_outstanding: impl Fn(u32, &[u8]) -> bool) {
        if self.keys.len() > FIRST_LOOK.max(2 * self.left) {
            self.keys.retain(|(database, key), versions| {
                versions.retain(|version| is_outstanding(*database, &version.name(key)));
                !versions.is_empty()
            });
            self.left = self.keys.len();
        }
        let versions = self.keys.entry((database, key.to_vec())).or_default();
        if !versions.contains(&version) {
            versions.push(version);
        }
    }

    /// The versions but the current one under which a key was told to be missing, and is. What is over is forgotten.
    pub fn take(&mut self, database: u32, key: &[u8], current: Version, is_missing: impl Fn(Version) -> bool) -> Vec<Version> {
        let at = (database, key.to_vec());
        let Some(versions) = self.keys.get_mut(&at) else { return Vec::new() };
        versions.retain(|version| is_missing(*version));
        let others = versions.iter().copied().filter(|version| *version != current).collect();
        if versions.is_empty() {
            self.keys.remove(&at);
        }
        others
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn misses_are_remembered_until_they_are_over() {
        let [a, b] = [1, 2].map(Version::new);
        let mut told = Told::default();
        told.note(0, b"k", a, |_, _| true);
        told.note(0, b"k", b, |_, _| true);
        told.note(0, b"k", b, |_, _| true);
        assert_eq!(told.take(0, b"k", b, |_| true), [a]);
        assert_eq!(told.take(1, b"k", b, |_| true), []);
        assert_eq!(told.take(0, b"k", Version::new(3), |version| version == b), [b]);
        assert_eq!(told.take(0, b"k", b, |_| false), []);
        for number in 0..10 * FIRST_LOOK {
            told.note(0, number.to_string().as_bytes(), a, |_, name| name.starts_with(b"7"));
        }
        assert!(told.keys.len() < 3 * FIRST_LOOK, "{}", told.keys.len());
    }
}
