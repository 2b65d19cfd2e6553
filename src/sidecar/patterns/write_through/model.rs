//! What write-through expects of the cache's scripts about one key, as code: the simulation plays with it, and random steps hold the
//! scripts on real servers to it.

use std::collections::BTreeMap;

/// Which write made a value, and which later one none.
pub type Value = u64;
/// Names a write.
pub type Token = u64;
/// Milliseconds.
pub type Time = u64;

/// One key and what stands beside it.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Key {
    /// What the cache has.
    pub value: Option<Value>,
    /// Who may store what he loads.
    pub lease: Option<Token>,
    /// Writes under way, each with the time until which it may come to something.
    pub marks: BTreeMap<Token, Time>,
    /// Whether some of them overlapped.
    pub mixed: bool,
    /// The latest of those that overlapped.
    pub best: Best,
}

/// The latest of writes that overlap.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Best {
    /// None has been made yet.
    #[default]
    None,
    /// The one with this version.
    Version(u64),
    /// Nobody knows.
    Unknown,
}

/// What came of a write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// The origin has this value, whose version it may have told.
    Stored(Value, Option<u64>),
    /// It has none any more.
    Deleted,
    /// Nothing has changed.
    Refused,
}

/// What breaks the model, to show that the simulation would notice. Whoever uses it for anything else leaves it at its default.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Broken {
    /// Nothing.
    #[default]
    Nothing,
    /// A write leaves the right to store what is loaded.
    Revocation,
    /// A write leaves the old value.
    Removal,
    /// Reads get the right to store while a write is under way.
    Mark,
    /// The last of writes that overlap is kept.
    Overlap,
    /// Of writes that overlap, the last to end is kept, whichever is the later.
    Version,
    /// A write that was lost is forgotten.
    Lost,
    /// A write is kept although its mark has gone.
    Own,
    /// A deletion among writes that overlap is forgotten.
    Deletion,
}

impl Key {
    /// Strikes marks of others whose time is over. How many stand, and whether any was struck.
    fn living(&mut self, own: Token, now: Time) -> (usize, bool) {
        let before = self.marks.len();
        self.marks.retain(|token, until| *token == own || *until > now);
        (self.marks.keys().filter(|token| **token != own).count(), self.marks.len() < before)
    }

    /// A write begins. `false`: too many are under way.
    pub fn begin(&mut self, token: Token, now: Time, until: Time, most: usize, broken: Broken) -> bool {
        let (living, lost) = self.living(token, now);
        if living >= most {
            return false;
        }
        match living {
            0 => (self.mixed, self.best) = (false, Best::None),
            _ => self.mixed = true,
        }
        if living > 0 && lost && broken != Broken::Lost {
            self.best = Best::Unknown;
        }
        self.marks.insert(token, until);
        if broken != Broken::Removal {
            self.value = None;
        }
        if broken != Broken::Revocation {
            self.lease = None;
        }
        true
    }

    /// A write ends. Whether its value is kept.
    pub fn end(&mut self, token: Token, now: Time, outcome: Outcome, broken: Broken) -> bool {
        let (living, lost) = self.living(token, now);
        if self.marks.remove(&token).is_none() && broken != Broken::Own {
            (self.value, self.lease) = (None, None);
            match living {
                0 => (self.mixed, self.best) = (false, Best::None),
                _ if lost || outcome != Outcome::Refused => self.best = Best::Unknown,
                _ => {}
            }
            return false;
        }
        let best = if lost && broken != Broken::Lost { Best::Unknown } else { self.best };
        let is_latest = |version: Option<u64>| match (best, version) {
            (Best::Unknown, _) => false,
            _ if !self.mixed => true,
            _ if broken == Broken::Version => true,
            (_, None) => false,
            (Best::None, Some(_)) => true,
            (Best::Version(best), Some(version)) => version > best,
        };
        let kept = match outcome {
            Outcome::Stored(value, version) if living == 0 && (is_latest(version) || broken == Broken::Overlap) => {
                self.value = Some(value);
                true
            }
            _ => false,
        };
        self.best = match (outcome, best) {
            _ if living == 0 => {
                self.mixed = false;
                Best::None
            }
            (Outcome::Deleted, best) if broken == Broken::Deletion => best,
            (Outcome::Deleted | Outcome::Stored(_, None), _) => Best::Unknown,
            (Outcome::Stored(_, Some(version)), Best::Version(best)) => Best::Version(best.max(version)),
            (Outcome::Stored(_, Some(version)), Best::None) => Best::Version(version),
            (_, best) => best,
        };
        kept
    }

    /// A read finds nothing, and asks for the right to store what it loads.
    pub fn lease(&mut self, token: Token, now: Time, broken: Broken) -> bool {
        let marked = self.marks.values().any(|until| *until > now) && broken != Broken::Mark;
        if !marked {
            self.marks.clear();
            (self.mixed, self.best) = (false, Best::None);
        }
        let free = !marked && self.lease.is_none();
        if free {
            self.lease = Some(token);
        }
        free
    }

    /// What a read loaded, where it still has the right to store it.
    pub fn fill(&mut self, token: Token, value: Option<Value>) {
        if self.lease == Some(token) {
            (self.value, self.lease) = (value, None);
        }
    }
}
