//! What no read may show, as docs/database-changes.md has it. Pure.
//!
//! Each row is written by one client, with numbers that rise, so what a read shows tells which commit it is of. A commit is *told* once the position that
//! the cache keeps is at or past it, and *carried out* once sidecars have read the stream up to the event that stood last in it then. Of a read that
//! begins behind that:
//!
//! - It shows that commit, or a later one. Where changes may have been lost, that holds from a second behind the relay's note of it on, however long
//!   the walk takes. Keys of rules with versions have that second always.
//! - What an event invalidated is not shown behind the moment when it was carried out, its walk included.
//! - Of what was never committed, or is committed later, nothing is shown at any time.
//!
//! Where the cache lost the note itself, what was told before may be shown until the relay has told anew: such a time is a *gap*.

use std::ops::RangeInclusive;
use std::time::{Duration, Instant};

use crate::support::histories::offset;

/// How long sidecars go on as they were told, and a tenth more.
pub const SECOND: Duration = Duration::from_millis(1_100);

/// What makes a key old.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Its row is followed.
    Row,
    /// All rows of a table are, and its rule has a version.
    All,
    /// Events of the client that writes it. `versioned`: its rule has a version.
    Told { versioned: bool },
}

impl Kind {
    /// How long it may be shown behind the moment when it was carried out.
    fn grace(self) -> Duration {
        match self {
            Self::Row | Self::Told { versioned: false } => Duration::ZERO,
            Self::All | Self::Told { versioned: true } => SECOND,
        }
    }
}

/// What a client heard of a transaction.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Heard {
    Committed,
    /// It never asked to commit.
    RolledBack,
    Nothing,
}

/// A write of a row; its number is its place among those of its key, counted from 1.
#[derive(Debug, Clone, Copy)]
pub struct Write {
    pub began: Instant,
    pub heard: Heard,
    /// When the commit was acknowledged, and a place in the database's log at or behind its end.
    pub acknowledged: Option<(Instant, u64)>,
}

/// What a client was shown.
#[derive(Debug, Clone, Copy)]
pub struct Read {
    pub key: usize,
    pub began: Instant,
    pub ended: Instant,
    /// `None`: that there is no such row, though there always is.
    pub number: Option<u64>,
}

/// From when on all that was committed up to a place in the log was carried out.
#[derive(Debug, Clone, Copy)]
pub struct Told {
    pub from: Instant,
    pub lsn: u64,
}

/// From when on an event was carried out about a key, whose row had this number before.
#[derive(Debug, Clone, Copy)]
pub struct Carried {
    pub from: Instant,
    pub key: usize,
    pub number: u64,
}

/// All that happened.
pub struct History {
    pub kinds: Vec<Kind>,
    /// By key.
    pub writes: Vec<Vec<Write>>,
    pub reads: Vec<Read>,
    told: Vec<Told>,
    pub carried: Vec<Carried>,
    gaps: Vec<RangeInclusive<Instant>>,
    /// What was seen to be wrong beside reads.
    pub wrong: Vec<String>,
    /// What the cache showed, each time that it was another, for a person.
    pub trace: Vec<(Instant, String)>,
}

/// What a history came to.
#[derive(Debug, Default)]
pub struct Verdict {
    pub reads: usize,
    /// How many reads were held to anything.
    pub held: usize,
    pub commits: usize,
    pub wrong: Vec<String>,
    /// How long it took from each commit's acknowledgement until it was carried out, the shortest first.
    pub delays: Vec<Duration>,
    /// How long gaps lasted together.
    pub gaps: Duration,
}

impl History {
    pub fn new(kinds: Vec<Kind>) -> Self {
        let writes = kinds.iter().map(|_| Vec::new()).collect();
        let (reads, told, carried, gaps, wrong, trace) = Default::default();
        Self { kinds, writes, reads, told, carried, gaps, wrong, trace }
    }

    /// A write begins; its number.
    pub fn begin(&mut self, key: usize) -> u64 {
        self.writes[key].push(Write { began: Instant::now(), heard: Heard::Nothing, acknowledged: None });
        self.writes[key].len() as u64
    }

    /// All up to `lsn` is carried out, from `from` on and not before what was told last.
    pub fn tell(&mut self, from: Instant, lsn: u64) {
        let (last, furthest) = self.told.last().map_or((from, 0), |told| (told.from, told.lsn));
        self.told.push(Told { from: from.max(last), lsn: lsn.max(furthest) });
    }

    /// The furthest place that was told.
    pub fn furthest(&self) -> u64 {
        self.told.last().map_or(0, |told| told.lsn)
    }

    pub fn add_gap(&mut self, from: Instant, to: Instant) {
        self.gaps.push(from..=to);
    }

    /// The least that a read may show.
    fn floor(&self, read: &Read) -> u64 {
        if self.gaps.iter().any(|gap| *gap.start() <= read.ended && read.began <= *gap.end()) {
            return 0;
        }
        let kind = self.kinds[read.key];
        let is_due = |from: Instant| from + kind.grace() <= read.began;
        if matches!(kind, Kind::Told { .. }) {
            let due = self.carried.iter().filter(|carried| carried.key == read.key && is_due(carried.from));
            return due.map(|carried| carried.number).max().unwrap_or(0);
        }
        let due = self.told.partition_point(|told| is_due(told.from));
        let Some(told) = due.checked_sub(1).map(|last| self.told[last]) else { return 0 };
        let is_told = |write: &Write| write.acknowledged.is_some_and(|(_, lsn)| lsn <= told.lsn);
        self.writes[read.key].iter().rposition(is_told).map_or(0, |at| at as u64 + 1)
    }

    /// What is wrong with a read.
    fn wrong_with(&self, read: &Read, floor: u64) -> Option<String> {
        let Some(number) = read.number else { return Some("it shows no row".to_owned()) };
        let write = usize::try_from(number).ok().and_then(|number| self.writes[read.key].get(number.checked_sub(1)?));
        match write {
            None if number > 0 => Some(format!("it shows {number}, which nobody wrote")),
            Some(write) if write.heard == Heard::RolledBack => Some(format!("it shows {number}, which was rolled back")),
            Some(write) if write.began > read.ended => Some(format!("it shows {number} before that was written")),
            _ if number < floor => Some(format!("it shows {number}, and {floor} was carried out before it began")),
            _ => None,
        }
    }

    /// What the cache showed around the first read that is wrong.
    pub fn trace(&self) -> Vec<String> {
        let wrong = self.reads.iter().filter(|read| self.wrong_with(read, self.floor(read)).is_some());
        let Some(first) = wrong.min_by_key(|read| read.began) else { return Vec::new() };
        let (before, after) = (Duration::from_secs(4), Duration::from_secs(1));
        let near = self.trace.iter().filter(|(at, _)| *at + before >= first.began && *at <= first.began + after);
        let mut lines = vec![format!("{first:?}, which took {:?}", first.ended - first.began)];
        lines.extend(near.map(|(at, what)| format!("{}: {what}", offset(*at, first.began))));
        lines
    }

    pub fn judge(&self) -> Verdict {
        let mut verdict = Verdict { reads: self.reads.len(), wrong: self.wrong.clone(), ..Verdict::default() };
        for read in &self.reads {
            let floor = self.floor(read);
            verdict.held += usize::from(floor > 0);
            verdict.wrong.extend(self.wrong_with(read, floor).map(|why| format!("a read of key {}: {why}", read.key)));
        }
        let followed = self.kinds.iter().zip(&self.writes).filter(|(kind, _)| !matches!(kind, Kind::Told { .. }));
        for (since, lsn) in followed.flat_map(|(_, writes)| writes).filter_map(|write| write.acknowledged) {
            let told = self.told.get(self.told.partition_point(|told| told.lsn < lsn));
            verdict.delays.extend(told.map(|told| told.from.saturating_duration_since(since)));
        }
        verdict.delays.sort_unstable();
        verdict.commits = self.writes.iter().flatten().filter(|write| write.heard == Heard::Committed).count();
        verdict.gaps = self.gaps.iter().map(|gap| *gap.end() - *gap.start()).sum();
        verdict
    }
}

/// A history of one key, where each moment is so many milliseconds behind its beginning: two commits, both of which were told.
fn two_commits(kind: Kind) -> (History, impl Fn(u64) -> Instant) {
    let began = Instant::now();
    let at = move |millis: u64| began + Duration::from_millis(millis);
    let mut history = History::new(vec![kind]);
    for (number, millis) in [(1_u64, 10), (2, 20)] {
        let acknowledged = Some((at(millis + 5), number * 100));
        history.writes[0].push(Write { began: at(millis), heard: Heard::Committed, acknowledged });
    }
    history.writes[0].push(Write { began: at(30), heard: Heard::RolledBack, acknowledged: None });
    history.writes[0].push(Write { began: at(5_000), heard: Heard::Nothing, acknowledged: None });
    history.tell(at(40), 150);
    history.tell(at(60), 250);
    history.carried.push(Carried { from: at(60), key: 0, number: 2 });
    (history, at)
}

#[test]
fn what_is_old_or_was_never_there_is_noticed() {
    for kind in [Kind::Row, Kind::All, Kind::Told { versioned: false }, Kind::Told { versioned: true }] {
        let (mut history, at) = two_commits(kind);
        let grace = u64::try_from(kind.grace().as_millis()).unwrap();
        let mut is_wrong = |number: Option<u64>, began: u64, ended: u64| {
            history.reads = vec![Read { key: 0, began: at(began), ended: at(ended), number }];
            !history.judge().wrong.is_empty()
        };
        assert!(is_wrong(Some(1), grace + 60, grace + 61), "{kind:?}: what was replaced is shown");
        assert!(!is_wrong(Some(2), grace + 60, grace + 61) && !is_wrong(Some(1), grace + 59, grace + 90), "{kind:?}");
        assert!(is_wrong(None, 1, 2) && is_wrong(Some(9), 1, 2), "{kind:?}: what nobody wrote");
        assert!(is_wrong(Some(3), 70, 80), "{kind:?}: what was rolled back");
        assert!(is_wrong(Some(2), 5, 19) && !is_wrong(Some(2), 5, 20), "{kind:?}: what is written later");
        assert!(!is_wrong(Some(4), 5_000, 5_001), "{kind:?}: what may have been committed");
        history.add_gap(at(grace + 50), at(grace + 70));
        let read = |began| Read { key: 0, began: at(grace + began), ended: at(grace + began + 1), number: Some(1) };
        history.reads = vec![read(60), read(71)];
        assert_eq!(history.judge().wrong.len(), 1, "{kind:?}: a gap excuses what lies in it, and nothing else");
    }
}
