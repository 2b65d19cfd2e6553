//! Which version of a rule's keys is meant at the moment. Pure.
//!
//! What the cache answered is believed for a second from when it was asked. After that the version is unknown; where it cannot be asked for,
//! one of this worker's own stands in, drawn anew each second, under which nobody else has stored anything. So who cannot ask has
//! misses, and of what others invalidate meanwhile nothing that is older than a second.

use super::state::State;
use crate::policy::versions::Version;

/// For how long an answer is believed, in milliseconds: the longest that a read may meet what was invalidated.
pub const LEASE_MS: u64 = 1_000;

/// What a worker knows of one rule's version, or of whatever else the cache is asked for again and again. Times are milliseconds of a clock that
/// never goes back.
#[derive(Debug)]
pub struct Epoch<S = State> {
    /// The last answer, and when it was asked for.
    believed: Option<(S, u64)>,
    /// What stands in for it, and since when.
    own: Option<(S, u64)>,
    /// When it was heard last that something else counts by now: no question of before tells it.
    forgotten_at: u64,
}

impl<S> Default for Epoch<S> {
    fn default() -> Self {
        Self { believed: None, own: None, forgotten_at: 0 }
    }
}

impl<S: Clone + From<Version>> Epoch<S> {
    /// What the cache answered to a question of `asked_at`. An answer to an earlier question than the last is none.
    pub fn heard(&mut self, asked_at: u64, state: S) {
        if asked_at >= self.forgotten_at && self.believed.as_ref().is_none_or(|(_, before)| *before <= asked_at) {
            self.believed = Some((state, asked_at));
        }
    }

    /// Something else counts by now, or soon will: it is to be asked for anew.
    pub fn forget(&mut self, now: u64) {
        (self.believed, self.forgotten_at) = (None, now);
    }

    /// What is meant now.
    pub fn current(&mut self, now: u64, random: impl FnOnce() -> u64) -> S {
        match &self.believed {
            Some((state, asked_at)) if now < asked_at + LEASE_MS => state.clone(),
            _ => self.stand_in(now, random),
        }
    }

    /// What is meant, where it is known.
    pub fn known(&self, now: u64) -> Option<S> {
        self.believed.as_ref().filter(|(_, asked_at)| now < asked_at + LEASE_MS).map(|(state, _)| state.clone())
    }

    fn stand_in(&mut self, now: u64, random: impl FnOnce() -> u64) -> S {
        match &self.own {
            Some((state, since)) if now < since + LEASE_MS => state.clone(),
            _ => self.own.insert((Version::new(random()).into(), now)).0.clone(),
        }
    }
}

/// What becomes of a value that a client stores.
#[derive(Debug, PartialEq, Eq)]
pub struct Place {
    /// The version that it goes under.
    pub version: Version,
    /// The versions under which no load that is under way may be stored any more.
    pub revoked: Vec<Version>,
}

/// Where a value goes whose key clients were told of as missing under the versions `told`, and perhaps under the `current` one as well. It may
/// be the value of any of these loads: where there are several, it is stored under none.
pub fn place(current: Version, told: &[Version], is_missing_now: bool) -> Place {
    match told {
        [] => Place { version: current, revoked: Vec::new() },
        [only] if !is_missing_now => Place { version: *only, revoked: Vec::new() },
        [first, ..] => Place { version: *first, revoked: told.iter().copied().chain([current]).collect() },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_value_that_may_be_of_several_loads_is_stored_under_none() {
        let [now, a, b] = [1, 2, 3].map(Version::new);
        assert_eq!(place(now, &[], true), Place { version: now, revoked: vec![] });
        assert_eq!(place(now, &[a], false), Place { version: a, revoked: vec![] });
        assert_eq!(place(now, &[a], true), Place { version: a, revoked: vec![a, now] });
        assert_eq!(place(now, &[a, b], false), Place { version: a, revoked: vec![a, b, now] });
    }

    #[test]
    fn an_answer_is_believed_for_a_second_from_its_question() {
        let mut epoch = Epoch::default();
        let mut drawn = 100;
        let mut at = |epoch: &mut Epoch, now: u64| {
            epoch
                .current(now, || {
                    drawn += 1;
                    drawn
                })
                .version
        };
        let known = |epoch: &Epoch, now| epoch.known(now).map(|state| state.version);
        let [a, b] = [1, 2].map(Version::new);
        assert_eq!((at(&mut epoch, 0), at(&mut epoch, 999), known(&epoch, 0)), (Version::new(101), Version::new(101), None));
        epoch.heard(900, a.into());
        assert_eq!((at(&mut epoch, 1000), at(&mut epoch, 1899), known(&epoch, 1899)), (a, a, Some(a)));
        assert_eq!((at(&mut epoch, 1900), known(&epoch, 1900)), (Version::new(102), None), "nobody has answered since");
        epoch.heard(2000, b.into());
        epoch.heard(1950, a.into());
        assert_eq!(at(&mut epoch, 2500), b, "an answer that comes late is none");
        epoch.forget(2600);
        epoch.heard(2599, b.into());
        assert_eq!(known(&epoch, 2600), None, "another counts by now");
        epoch.heard(2600, a.into());
        assert_eq!(known(&epoch, 2600), Some(a));
    }
}
