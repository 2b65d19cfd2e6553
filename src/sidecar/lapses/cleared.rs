//! Which keys were removed since when nothing old may be shown. Pure.

use rustc_hash::FxHashMap;

use super::{Mark, Marks};

/// The most keys that are remembered. Beyond that all are forgotten, and removed once more when they are named.
const MOST: usize = 65_536;

/// The keys that were removed, each with what was open by then.
#[derive(Debug, Default)]
pub struct Cleared {
    keys: FxHashMap<(u8, Vec<u8>), Marks>,
}

impl Cleared {
    /// Whether a key was removed since all of this was open.
    pub fn has(&self, database: u8, key: &[u8], marks: &[Mark]) -> bool {
        self.keys.get(&(database, key.to_vec())).is_some_and(|known| marks.iter().all(|mark| known.contains(mark)))
    }

    /// These were removed. A command's keys are remembered together, however many there are.
    pub fn note(&mut self, database: u8, removed: impl Iterator<Item = (Vec<u8>, Marks)>) {
        if self.keys.len() >= MOST {
            self.keys.clear();
        }
        self.keys.extend(removed.map(|(key, marks)| ((database, key), marks)));
    }
}

#[cfg(test)]
mod tests {
    use smallvec::smallvec;

    use super::*;
    use crate::sidecar::events::position::EntryId;

    #[test]
    fn a_key_is_cleared_for_what_was_open_then_and_what_is_remembered_is_bounded() {
        let lapse = |number: u64| Mark::Lapse(EntryId::new(number, 0));
        let mut cleared = Cleared::default();
        cleared.note(0, [(b"user:1".to_vec(), smallvec![lapse(1), lapse(2)])].into_iter());
        assert!(cleared.has(0, b"user:1", &[lapse(2)]) && cleared.has(0, b"user:1", &[lapse(2), lapse(1)]));
        assert!(!cleared.has(0, b"user:1", &[lapse(1), lapse(3)]) && !cleared.has(1, b"user:1", &[lapse(1)]));
        cleared.note(0, (0..MOST * 2).map(|key| (key.to_string().into_bytes(), smallvec![lapse(3)])));
        assert!(cleared.has(0, b"0", &[lapse(3)]), "a command's own are there, however many");
        cleared.note(0, [(b"user:2".to_vec(), smallvec![lapse(3)])].into_iter());
        assert_eq!(cleared.keys.len(), 1);
    }
}
