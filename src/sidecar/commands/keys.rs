//! Where a command's keys are among its arguments.

use smallvec::SmallVec;

use super::number::parse_i64;
use crate::sidecar::resp::CommandArgs;

/// The keys of one command.
pub type Keys = SmallVec<[KeyAt; 4]>;

/// One key of a command.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KeyAt {
    /// Its place among the arguments; the command's name is at 0.
    pub index: u32,
    /// What happens to it.
    pub effect: Effect,
}

/// What a command does to a key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Effect {
    /// No key: a channel or a cursor, whose slot says where to go.
    Route,
    /// Reads it.
    Read,
    /// May change it, or remove it by taking the last of it; never makes it, never touches its TTL.
    Update,
    /// May make it, or leave it with another TTL or none.
    Write,
    /// Removes it.
    Delete,
}

/// Arguments that contradict themselves, so that the keys cannot be told.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum KeyError {
    /// The number of keys is no number above zero, or above the number of arguments.
    #[error("the number of keys is not a number, or does not fit the number of arguments")]
    Count,
    /// XREAD without STREAMS, or with unequal numbers of keys and IDs.
    #[error("STREAMS is missing, or is followed by unequal numbers of keys and IDs")]
    Streams,
}

/// Places of keys: each `step`th from `first` on, before `end`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KeySpan {
    /// The first key's place.
    pub first: usize,
    /// 2 where each key is followed by a value.
    pub step: usize,
    /// Behind the last key's place.
    pub end: usize,
    /// What happens to the keys.
    pub effect: Effect,
}

impl KeySpan {
    /// Whether the argument at `index` is a key.
    pub fn contains(&self, index: usize) -> bool {
        (self.first..self.end).contains(&index) && (index - self.first).is_multiple_of(self.step)
    }

    /// The place of the last key. `None` where there is none.
    pub fn last(&self) -> Option<usize> {
        (self.first < self.end).then(|| self.first + (self.end - 1 - self.first) / self.step * self.step)
    }
}

/// Some of a command's keys: where they are, and what happens to them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KeyPart {
    /// Where they are.
    pub begin: Begin,
    /// What happens to them.
    pub effect: Effect,
}

/// Where some of a command's keys are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Begin {
    /// From `first` to `last`, each `step`th; a negative `last` counts from the end, -1 being the last argument.
    Range {
        /// The first key's place.
        first: u8,
        /// The last key's place at most.
        last: i8,
        /// 2 where each key is followed by a value.
        step: u8,
    },
    /// As many as the argument at `count` says, right behind it, each `step`th. `may_be_none`: zero is a number too.
    Count {
        /// The place of the number.
        count: u8,
        /// 2 where each key is followed by a value.
        step: u8,
        /// Whether there may be no key at all.
        may_be_none: bool,
    },
    /// Behind the last STORE or STOREDIST at `from` or later.
    Store {
        /// The first place where the word is looked for.
        from: u8,
    },
    /// SORT's: behind the last STORE that is no argument of BY, GET or LIMIT.
    SortStore,
    /// XREAD's and XREADGROUP's: the first half of what follows STREAMS.
    Streams,
}

impl KeyPart {
    /// One key at `first`.
    pub const fn at(first: u8, effect: Effect) -> Self {
        Self::range(first, first as i8, 1, effect)
    }

    /// Keys from `first` to `last`.
    pub const fn range(first: u8, last: i8, step: u8, effect: Effect) -> Self {
        Self { begin: Begin::Range { first, last, step }, effect }
    }

    /// The only place where this part can have a key.
    pub(super) const fn fixed_single(&self) -> Option<usize> {
        match self.begin {
            Begin::Range { first, last, .. } if last == first as i8 => Some(first as usize),
            _ => None,
        }
    }

    /// The place of this part's first key, where it is fixed.
    pub(super) const fn fixed_first(&self) -> Option<usize> {
        match self.begin {
            Begin::Range { first, .. } => Some(first as usize),
            _ => None,
        }
    }

    pub(super) fn collect(&self, args: &CommandArgs<'_>, found: &mut Keys) -> Result<(), KeyError> {
        match self.begin {
            Begin::Range { first, last, step } => {
                let end =
                    if last < 0 { args.len().saturating_sub(usize::from(last.unsigned_abs()) - 1) } else { last as usize + 1 };
                self.push(found, usize::from(first)..end.min(args.len()), step);
            }
            Begin::Count { count, step, may_be_none } => {
                let number = args.get(usize::from(count)).and_then(parse_i64).and_then(|number| usize::try_from(number).ok());
                let number = number.filter(|number| may_be_none || *number > 0).ok_or(KeyError::Count)?;
                let first = usize::from(count) + 1;
                let room = args.len().saturating_sub(first) / usize::from(step);
                if number > room {
                    return Err(KeyError::Count);
                }
                self.push(found, first..first + number * usize::from(step), step);
            }
            Begin::Store { from } => self.push_store(found, last_store(args, usize::from(from))),
            Begin::SortStore => self.push_store(found, sort_store(args)),
            Begin::Streams => {
                let first = streams_at(args).ok_or(KeyError::Streams)? + 1;
                let rest = args.len() - first;
                if rest == 0 || !rest.is_multiple_of(2) {
                    return Err(KeyError::Streams);
                }
                self.push(found, first..first + rest / 2, 1);
            }
        }
        Ok(())
    }

    /// Where this part's keys are in a command of `announced` arguments of which only the first have come: the first place, the
    /// step, and the place behind the last. `Ok(None)`: that cannot be told yet, but no argument so far is a key of this part.
    ///
    /// # Errors
    /// Where the arguments contradict themselves, as in [`CommandSpec::keys`](super::CommandSpec::keys); and where words anywhere
    /// among the arguments decide.
    pub(super) fn span(&self, args: &CommandArgs<'_>, announced: usize) -> Result<Option<KeySpan>, KeyError> {
        let effect = self.effect;
        match self.begin {
            Begin::Range { first, last, step } => {
                let end =
                    if last < 0 { announced.saturating_sub(usize::from(last.unsigned_abs()) - 1) } else { last as usize + 1 };
                Ok(Some(KeySpan { first: usize::from(first), step: usize::from(step), end: end.min(announced), effect }))
            }
            Begin::Count { count, .. } if args.len() <= usize::from(count) && announced > usize::from(count) => Ok(None),
            Begin::Count { count, step, may_be_none } => {
                let number = args.get(usize::from(count)).and_then(parse_i64).and_then(|number| usize::try_from(number).ok());
                let number = number.filter(|number| may_be_none || *number > 0).ok_or(KeyError::Count)?;
                let (first, step) = (usize::from(count) + 1, usize::from(step));
                if number > announced.saturating_sub(first) / step {
                    return Err(KeyError::Count);
                }
                Ok(Some(KeySpan { first, step, end: first + number * step, effect }))
            }
            Begin::Store { .. } | Begin::SortStore | Begin::Streams => Err(KeyError::Streams),
        }
    }

    /// Whether [`KeyPart::span`] can tell the places before the command's end.
    pub(super) const fn has_span(&self) -> bool {
        matches!(self.begin, Begin::Range { .. } | Begin::Count { .. })
    }

    fn push(&self, found: &mut Keys, places: std::ops::Range<usize>, step: u8) {
        let effect = self.effect;
        found.extend(places.step_by(usize::from(step)).map(|index| KeyAt { index: index as u32, effect }));
    }

    fn push_store(&self, found: &mut Keys, place: Option<usize>) {
        found.extend(place.map(|index| KeyAt { index: index as u32, effect: self.effect }));
    }
}

/// The place of GEORADIUS' destination.
fn last_store(args: &CommandArgs<'_>, from: usize) -> Option<usize> {
    let mut found = None;
    let mut at = from;
    while let (Some(word), Some(_)) = (args.get(at), args.get(at + 1)) {
        if word.eq_ignore_ascii_case(b"store") || word.eq_ignore_ascii_case(b"storedist") {
            at += 1;
            found = Some(at);
        }
        at += 1;
    }
    found
}

/// The place of SORT's destination.
fn sort_store(args: &CommandArgs<'_>) -> Option<usize> {
    let mut found = None;
    let mut at = 2;
    while let Some(word) = args.get(at) {
        let is = |name: &[u8]| word.eq_ignore_ascii_case(name);
        if is(b"limit") {
            at += 2;
        } else if is(b"by") || is(b"get") {
            at += 1;
        } else if is(b"store") && at + 1 < args.len() {
            at += 1;
            found = Some(at);
        }
        at += 1;
    }
    found
}

/// The place of XREAD's word STREAMS.
fn streams_at(args: &CommandArgs<'_>) -> Option<usize> {
    stream_options(args).find(|(_, option)| matches!(option, StreamOption::Streams)).map(|(at, _)| at)
}

/// Whether XREAD or XREADGROUP has the option BLOCK.
pub(super) fn has_block_option(args: &CommandArgs<'_>) -> bool {
    stream_options(args).any(|(_, option)| matches!(option, StreamOption::Block))
}

enum StreamOption {
    Block,
    Streams,
    Other,
}

/// The options of XREAD and XREADGROUP up to and with STREAMS, with their places.
fn stream_options<'a>(args: &CommandArgs<'a>) -> impl Iterator<Item = (usize, StreamOption)> + use<'a> {
    let args = *args;
    let mut next = Some(1);
    std::iter::from_fn(move || {
        let at = next?;
        let word = args.get(at)?;
        let is = |name: &[u8]| word.eq_ignore_ascii_case(name);
        let (option, values) = match () {
            () if is(b"streams") => (StreamOption::Streams, None),
            () if is(b"block") => (StreamOption::Block, Some(1)),
            () if is(b"count") || is(b"claim") => (StreamOption::Other, Some(1)),
            () if is(b"group") => (StreamOption::Other, Some(2)),
            () if is(b"noack") => (StreamOption::Other, Some(0)),
            () => {
                next = None;
                return None;
            }
        };
        next = values.map(|values| at + 1 + values);
        Some((at, option))
    })
}
