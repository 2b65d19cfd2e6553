//! How far the stream has been read, and whether anything was lost that was not. Pure.
//!
//! A stream loses its oldest entries when it is trimmed, all of them with its server's memory or by an eviction, and its newest at a failover.
//! Servers count the entries that were ever added. A position therefore holds how many had been added up to it: what is gone beyond that
//! number was never read. Where a stream is made anew they count anew, and may have come further than the position again: so the oldest entry
//! that there is must not lie behind the position, else it is not known whose successor it is.

use std::fmt;
use std::str::FromStr;

use crate::sidecar::upstream::admin_client::Value;

/// The id of an entry.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct EntryId {
    /// Milliseconds since 1970, as a rule.
    ms: u64,
    /// Which one of these.
    seq: u64,
}

impl EntryId {
    /// An id of these parts.
    pub fn new(ms: u64, seq: u64) -> Self {
        Self { ms, seq }
    }

    /// The greatest that is less.
    fn before(self) -> Self {
        match self.seq.checked_sub(1) {
            Some(seq) => Self { seq, ..self },
            None => Self { ms: self.ms.saturating_sub(1), seq: u64::MAX },
        }
    }
}

impl FromStr for EntryId {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        let (ms, seq) = text.split_once('-').ok_or(())?;
        Ok(Self { ms: ms.parse().map_err(|_| ())?, seq: seq.parse().map_err(|_| ())? })
    }
}

impl fmt::Display for EntryId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.ms, self.seq)
    }
}

/// How far the stream has been read. The default is its beginning.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Position {
    /// The last entry that was.
    pub id: EntryId,
    /// How many had been added by then, that one included.
    pub count: u64,
}

impl FromStr for Position {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        let (id, count) = text.split_once(' ').ok_or(())?;
        Ok(Self { id: id.parse()?, count: count.parse().map_err(|_| ())? })
    }
}

impl fmt::Display for Position {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.id, self.count)
    }
}

/// What a server says of the stream.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Stream {
    /// The id of the entry that was added last.
    pub last: EntryId,
    /// How many were ever added.
    pub added: u64,
    /// How many there are.
    pub length: u64,
    /// The id of the oldest that there is.
    pub first: Option<EntryId>,
}

impl Stream {
    /// Reads the answer to `XINFO STREAM`. Where there is no stream, that is the default. `None`: it is another answer.
    pub fn read(answer: &Value) -> Option<Self> {
        if matches!(answer, Value::Error(text) if text.starts_with("ERR no such key")) {
            return Some(Self::default());
        }
        let number = |name| u64::try_from(answer.field(name)?.as_int()?).ok();
        let id = |name| answer.field(name)?.as_str()?.parse::<EntryId>().ok();
        let length = number("length")?;
        let first = id("recorded-first-entry-id").filter(|_| length > 0);
        Some(Self { last: id("last-generated-id")?, added: number("entries-added")?, length, first })
    }

    /// How many are gone.
    fn gone(&self) -> u64 {
        self.added.saturating_sub(self.length)
    }
}

impl Position {
    /// The position behind a batch of so many entries, of which `last` is the last, and whether any before them were lost unread. `now`
    /// is what a server said of the stream afterwards. Where it cannot be told, they count as lost.
    pub fn behind(self, read: u64, last: EntryId, now: &Stream) -> (Self, bool) {
        let count = self.count + read;
        let is_after = match now.first {
            Some(first) => first.before() > self.id,
            None => now.last > last,
        };
        let is_after = self.count > 0 && is_after;
        // All that had been added up to the position would be gone from the stream that it is of.
        let is_another = is_after && now.gone() < self.count;
        let is_reborn = now.last < last || now.added < count || is_another;
        let is_trimmed = is_after || now.gone() > self.count;
        let lost = is_reborn || is_trimmed;
        let counted = if now.last == last { now.added } else { count.max(now.gone()) };
        let next = if is_reborn {
            Self { id: now.last, count: now.added }
        } else if is_trimmed {
            // What is gone is told of once.
            Self { id: last.max(now.first.map_or(now.last, EntryId::before)), count: counted }
        } else {
            Self { id: last, count: counted }
        };
        (next, lost)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn id(ms: u64) -> EntryId {
        EntryId::new(ms, 0)
    }

    /// A stream whose entries have rising numbers for ids.
    fn stream(last: u64, added: u64, length: u64) -> Stream {
        Stream { last: id(last), added, length, first: (length > 0).then(|| id(last + 1 - length)) }
    }

    #[test]
    fn positions_and_answers_are_read_back() {
        let position = Position { id: EntryId::new(1_700_000_000_000, 3), count: 9 };
        assert_eq!(position.to_string().parse(), Ok(position));
        for bad in ["", "1-1", "1 1", "a-1 1", "1-1 x"] {
            assert_eq!(bad.parse::<Position>(), Err(()), "{bad}");
        }
        let text = |text: &str| Value::Text(text.as_bytes().to_vec());
        let told = [text("length"), Value::Int(2), text("last-generated-id"), text("7-0"), text("entries-added"), Value::Int(5)];
        let first = [text("recorded-first-entry-id"), text("6-0")];
        assert_eq!(Stream::read(&Value::List([&told[..], &first].concat())), Some(stream(7, 5, 2)));
        assert_eq!(Stream::read(&Value::Error("ERR no such key".to_owned())), Some(Stream::default()));
        assert_eq!(Stream::read(&Value::Error("WRONGTYPE".to_owned())), None);
    }

    #[test]
    fn what_was_lost_is_told_from_what_was_read() {
        let at = |last, count| Position { id: id(last), count };
        // A new reader of a stream that is whole, and of one that was trimmed.
        assert!(!at(0, 0).behind(0, id(0), &stream(3, 3, 3)).1);
        assert!(at(0, 0).behind(0, id(0), &stream(3, 3, 2)).1);
        assert!(!at(0, 0).behind(0, id(0), &Stream::default()).1);
        // Trimmed less far than was read; up to there, which a stream that was made anew may look like; and beyond.
        assert!(!at(3, 3).behind(0, id(3), &stream(5, 5, 3)).1);
        assert!(at(3, 3).behind(0, id(3), &stream(5, 5, 2)).1);
        assert!(at(3, 3).behind(0, id(3), &stream(5, 5, 1)).1);
        // What was lost is told of once.
        let (next, lost) = at(1, 1).behind(0, id(1), &stream(4, 4, 1));
        assert!(lost && next.count == 3 && !next.behind(1, id(4), &stream(4, 4, 1)).1);
        // Trimmed behind what was read, of which it cannot be told whether it was all that came.
        assert_eq!(at(3, 3).behind(2, id(5), &stream(5, 5, 0)), (at(5, 5), true));
        assert_eq!(at(5, 5).behind(0, id(5), &stream(5, 5, 0)), (at(5, 5), false));
        // Another server, which knows nothing, or less.
        assert_eq!(at(3, 3).behind(0, id(3), &Stream::default()), (at(0, 0), true));
        assert_eq!(at(3, 3).behind(0, id(3), &stream(2, 2, 2)), (at(2, 2), true));
        // Made anew, with more entries by now than had been read of the one before, and with some of these read.
        assert_eq!(at(3, 3).behind(0, id(3), &stream(14, 5, 5)), (at(14, 5), true));
        assert_eq!(at(3, 3).behind(1, id(10), &stream(14, 5, 5)), (at(14, 5), true));
    }

    /// A stream that is written, trimmed and evicted by others at any moment.
    #[derive(Default)]
    struct Model {
        entries: std::collections::VecDeque<u64>,
        /// The last id that was given.
        last: u64,
        added: u64,
    }

    impl Model {
        fn add(&mut self) {
            (self.last, self.added) = (self.last + 1, self.added + 1);
            self.entries.push_back(self.last);
        }

        fn evict(&mut self, position: u64, unread: &mut u64) {
            self.trim(0, position, unread);
            self.added = 0;
        }

        fn trim(&mut self, keep: usize, position: u64, unread: &mut u64) {
            while self.entries.len() > keep {
                *unread += u64::from(self.entries.pop_front().is_some_and(|entry| entry > position));
            }
        }

        fn told(&self) -> Stream {
            if self.added == 0 { Stream::default() } else { stream(self.last, self.added, self.entries.len() as u64) }
        }
    }

    #[derive(Debug, Clone)]
    enum Step {
        Add(u8),
        Trim(usize),
        Evict,
        /// Reads so many, while somebody adds and trims before the server is asked of the stream.
        Read(usize, u8, usize),
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            (1u8..5).prop_map(Step::Add),
            (0usize..6).prop_map(Step::Trim),
            Just(Step::Evict),
            (1usize..6, 0u8..3, 0usize..8).prop_map(|(read, add, keep)| Step::Read(read, add, keep)),
        ]
    }

    proptest! {
        /// No entry is lost unnoticed; and where nothing interferes, nothing is taken for lost that was not.
        #[test]
        fn every_loss_is_noticed(steps in proptest::collection::vec(step(), 1..60)) {
            let (mut model, mut position) = (Model::default(), Position::default());
            let (mut unread, mut counts_are_exact) = (0, true);
            for step in steps {
                match step {
                    Step::Add(count) => (0..count).for_each(|_| model.add()),
                    Step::Trim(keep) => model.trim(keep, position.id.ms, &mut unread),
                    // Who has read nothing misses nothing; and one of which nothing is left may look like the one before it.
                    Step::Evict if position.count == 0 || model.entries.is_empty() => {}
                    Step::Evict => {
                        model.evict(position.id.ms, &mut unread);
                        counts_are_exact = false;
                    }
                    Step::Read(most, adds, keep) => {
                        let batch: Vec<u64> = model.entries.iter().copied().filter(|entry| *entry > position.id.ms).take(most).collect();
                        let last = batch.last().copied().unwrap_or(position.id.ms);
                        let lost_before = unread;
                        let is_after = model.entries.front().is_some_and(|first| *first > position.id.ms);
                        let interferes = adds > 0 || model.entries.len() > keep;
                        (0..adds).for_each(|_| model.add());
                        model.trim(keep, last, &mut unread);
                        let (next, lost) = position.behind(batch.len() as u64, id(last), &model.told());
                        prop_assert!(lost || lost_before == 0, "unnoticed at {:?} of {:?}", position, model.told());
                        if !interferes && batch.len() < most && counts_are_exact && !is_after {
                            prop_assert_eq!(lost, lost_before > 0, "at {:?} of {:?}", position, model.told());
                        }
                        // What was trimmed behind the batch is noticed now, or with the next.
                        unread = if lost { 0 } else { unread - lost_before };
                        counts_are_exact = model.told().last == id(last) || (counts_are_exact && !lost);
                        position = next;
                    }
                }
            }
        }
    }
}
