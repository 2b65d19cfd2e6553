//! What is known of a policy's journals from look to look, and when nobody needs their relay any more. Pure.
//!
//! A journal is *closed* once no sidecar writes to it any more, for longer than a write that was sent may take to arrive, and origins have all
//! that is in it. Only then is a policy let go that is being deleted, or a relay that drains a journal of rules which are gone.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use tokio::time::Instant;

use crate::journal::Level;
use crate::policy::{JournalName, Span};

/// How long nobody has written to a journal before it may count as drained. A script that appends says itself that it is not carried out later
/// than 5 s after it was sent, by the server's clock.
pub const QUIET: Duration = Duration::from_secs(10);

/// What was seen of one journal.
#[derive(Debug, Clone, Copy)]
pub struct Sighting {
    /// Whether rules in force write to it, or some sidecar may not have heard yet that none does.
    pub is_written: bool,
    /// What it holds. `None`: that is not known.
    pub level: Option<Level>,
}

/// See the module.
#[derive(Debug, Default)]
pub struct Kept {
    quiet_since: BTreeMap<JournalName, Instant>,
    closed: BTreeSet<JournalName>,
    levels: BTreeMap<JournalName, Option<Level>>,
}

impl Kept {
    /// Takes note of all journals, as they are now.
    pub fn note(&mut self, sightings: &BTreeMap<JournalName, Sighting>, now: Instant) {
        self.quiet_since.retain(|journal, _| sightings.get(journal).is_some_and(|seen| !seen.is_written));
        self.closed.retain(|journal| sightings.get(journal).is_some_and(|seen| !seen.is_written));
        for (journal, seen) in sightings.iter().filter(|(_, seen)| !seen.is_written) {
            let since = *self.quiet_since.entry(journal.clone()).or_insert(now);
            if now.duration_since(since) >= QUIET && seen.level.is_some_and(|level| level.is_drained()) {
                self.closed.insert(journal.clone());
            }
        }
        self.levels = sightings.iter().map(|(journal, seen)| (journal.clone(), seen.level)).collect();
    }

    /// Whether nobody writes to a journal any more, and origins have all of it.
    pub fn is_closed(&self, journal: &JournalName) -> bool {
        self.closed.contains(journal)
    }

    /// Whether that is so of all of them.
    pub fn are_closed(&self) -> bool {
        self.levels.keys().all(|journal| self.closed.contains(journal))
    }

    /// What all of them hold together. `None`: that is not known of some.
    pub fn level(&self) -> Option<Level> {
        self.levels.values().try_fold(Level::default(), |sum, level| Some(sum.and((*level)?)))
    }

    /// Those whose oldest write is older than it may become, by `max_lag`.
    pub fn late(&self, max_lag: &BTreeMap<JournalName, Span>) -> Option<(&JournalName, Span)> {
        let is_late = |(journal, level): (&'_ JournalName, &Option<Level>)| {
            let bound = *max_lag.get(journal)?;
            level.is_some_and(|level| level.lag_ms > bound.as_millis()).then_some(bound)
        };
        self.levels.iter().find_map(|(journal, level)| Some((journal, is_late((journal, level))?)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn journal(name: &str) -> JournalName {
        name.parse().unwrap()
    }

    fn seen(is_written: bool, level: Option<Level>) -> Sighting {
        Sighting { is_written, level }
    }

    const EMPTY: Option<Level> = Some(Level { depth: 0, bytes: 0, lag_ms: 0, dead: 0, dirty: 0 });
    const FULL: Option<Level> = Some(Level { depth: 7, bytes: 700, lag_ms: 40_000, dead: 0, dirty: 3 });

    #[test]
    fn a_journal_is_closed_once_it_is_quiet_and_drained() {
        let start = Instant::now();
        let mut kept = Kept::default();
        let mut at = |seconds: u64, sighting: Sighting| {
            kept.note(&BTreeMap::from([(journal("a"), sighting)]), start + Duration::from_secs(seconds));
            (kept.is_closed(&journal("a")), kept.are_closed())
        };
        assert_eq!(at(0, seen(true, EMPTY)), (false, false), "it is empty, and written to");
        assert_eq!(at(1, seen(false, EMPTY)), (false, false), "what was sent a moment ago may still come");
        assert_eq!(at(10, seen(false, EMPTY)), (false, false));
        assert_eq!(at(11, seen(false, FULL)), (false, false));
        assert_eq!(at(12, seen(false, None)), (false, false), "nobody knows");
        let letter = Some(Level { dead: 1, dirty: 1, ..Level::default() });
        assert_eq!(at(13, seen(false, letter)), (false, false), "a person has to decide");
        assert_eq!(at(14, seen(false, EMPTY)), (true, true));
        assert_eq!(at(15, seen(false, None)), (true, true), "nobody has written since");
        assert_eq!(at(16, seen(true, EMPTY)), (false, false), "its rules came back");
        assert_eq!(at(17, seen(false, EMPTY)), (false, false));
        assert_eq!(at(27, seen(false, EMPTY)), (true, true));
    }

    #[test]
    fn all_journals_count() {
        let mut kept = Kept::default();
        assert!(kept.are_closed(), "there is none");
        kept.note(&BTreeMap::from([(journal("a"), seen(false, FULL)), (journal("b"), seen(true, FULL))]), Instant::now());
        assert_eq!(kept.level().map(|level| (level.depth, level.lag_ms)), Some((14, 40_000)));
        let bounds = |secs| BTreeMap::from([(journal("b"), Span::from_secs(secs))]);
        assert_eq!(kept.late(&bounds(40)), None);
        assert_eq!(kept.late(&bounds(39)), Some((&journal("b"), Span::from_secs(39))));
        kept.note(&BTreeMap::from([(journal("a"), seen(false, None)), (journal("b"), seen(true, FULL))]), Instant::now());
        assert_eq!((kept.level(), kept.are_closed()), (None, false));
    }
}
