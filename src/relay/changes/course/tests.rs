//! Histories of a database, a cache that may lose its latest writes, and relays that die or overtake each other: no change goes unsaid, and no
//! relay writes behind one that overtook it.

use super::*;
use crate::origin::changes::SlotOwner;
use crate::origin::changes::pgoutput::{Cell, Column, Identity as ReplicaIdentity, Relation};
use crate::relay::changes::register::Written;
use crate::relay::changes::wanted::Entry;

const HISTORIES: u64 = 4_000;
const STEPS: usize = 60;

/// What is left out, one at a time, to see that it is missed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Broken {
    /// A relay that writes does not look at whether the cache has what it wrote last.
    Position,
    /// A relay that begins takes what the database keeps for all that there was.
    Beginning,
    /// Who writes need not have the latest claim.
    Fence,
}

/// What the cache keeps.
#[derive(Debug, Clone, Default)]
struct Cache {
    kept: Kept,
    fence: u64,
    /// The latest claim under which anything was written.
    wrote: u64,
    /// What was said, and when.
    stream: Vec<(u64, Entry)>,
}

/// A relay that reads.
struct Session {
    fence: u64,
    course: Course,
    /// The next commit that it reads.
    next: u64,
}

struct World {
    random: fastrand::Rng,
    broken: Option<Broken>,
    now: u64,
    /// When each transaction was committed. The n-th ends at `n + 1`, and changes the row `n`.
    commits: Vec<u64>,
    /// Up to where the slot was confirmed, and whether it was made since anybody looked.
    slot: Option<u64>,
    cache: Cache,
    replica: Cache,
    relays: [Option<Session>; 2],
    /// How often a relay wrote behind one that had overtaken it.
    overtaken: u64,
}

/// What a history came to.
#[derive(Debug, Default, PartialEq, Eq)]
struct Wrong {
    /// The changes of which nothing was said since.
    unsaid: Vec<usize>,
    /// How often a relay wrote behind one that had overtaken it.
    overtaken: u64,
}

fn watches() -> Vec<Watch> {
    let follow = serde_json::from_str(r#"{"rule":"user","table":"users","touches":{"key":{}}}"#).expect("a table");
    vec![Watch { keys: "user:{id}".parse().expect("a pattern"), follow }]
}

fn identity() -> Identity {
    Identity { system: "7/1".to_owned(), database: "shop".to_owned() }
}

fn message(message: Message<'_>) -> Told<'_> {
    Told::Message { sent: 0, message }
}

impl World {
    fn new(seed: u64, broken: Option<Broken>) -> Self {
        let random = fastrand::Rng::with_seed(seed);
        let (cache, replica) = (Cache::default(), Cache::default());
        Self { random, broken, now: 0, commits: Vec::new(), slot: None, cache, replica, relays: [None, None], overtaken: 0 }
    }

    /// As the script does.
    fn write(&mut self, fence: u64, left: Option<&Position>, next: &Position, entries: Vec<Entry>) -> Written {
        let Self { cache, now, .. } = self;
        if cache.fence != fence && self.broken != Some(Broken::Fence) {
            return Written::Fenced;
        }
        if left.is_some() && cache.kept.position.as_ref() != left {
            return Written::Lost;
        }
        self.overtaken += u64::from(fence < cache.wrote);
        cache.wrote = cache.wrote.max(fence);
        cache.stream.extend(entries.into_iter().map(|entry| (*now, entry)));
        cache.kept.position = Some(next.clone());
        Written::Yes { at: *now }
    }

    fn end(&self) -> u64 {
        self.commits.len() as u64
    }

    fn step(&mut self) {
        self.now += 1;
        let relay = self.random.usize(..2);
        match self.random.u32(..100) {
            0..30 => self.commits.push(self.now),
            30..40 => self.begin(relay),
            40..75 => self.read(relay),
            75..82 => self.relays[relay] = None,
            82..90 => self.replica = self.cache.clone(),
            90..96 => self.cache = self.replica.clone(),
            96..98 => self.slot = None,
            98 => self.slot = self.slot.map(|_| self.end()),
            _ => self.cache = Cache::default(),
        }
    }

    /// A relay claims the feed, and begins.
    fn begin(&mut self, relay: usize) {
        // Who was there before goes on until it writes.
        // A fence is later than all others, whatever the cache has lost of them.
        self.cache.fence = self.now.max(self.cache.fence + 1);
        let is_new = self.slot.is_none();
        let confirmed = *self.slot.insert(self.slot.unwrap_or(self.commits.len() as u64));
        let ready = Ready { is_new, confirmed: Lsn::new(confirmed), ..Ready::default() };
        let mut start = begin(&self.cache.kept, &identity(), &ready, &watches());
        if self.broken == Some(Broken::Beginning) {
            start.wanted = Wanted::default();
        }
        let fence = self.cache.fence;
        let written = self.write(fence, None, &start.position, start.wanted.entries(None));
        assert!(matches!(written, Written::Yes { .. }), "{written:?}");
        self.cache.kept.followers = start.followers;
        let mut course = Course::new(watches(), "larder_main_db", start.position);
        let columns = vec![Column { name: "id".to_owned(), identity: true, kind: 20 }];
        let (schema, name) = ("public".to_owned(), "users".to_owned());
        let table = Relation { id: 1, schema, name, identity: ReplicaIdentity::Default, columns };
        course.take(&message(Message::Relation(table))).expect("a table");
        self.relays[relay] = Some(Session { fence, course, next: confirmed });
    }

    /// A relay reads a transaction, and says what it means, unless it dies on the way.
    fn read(&mut self, relay: usize) {
        let Some(mut session) = self.relays[relay].take() else { return };
        if session.next < self.end() {
            let (at, text) = (session.next, session.next.to_string());
            let xid = u32::try_from(at).expect("few");
            let row = vec![Cell::Text(text.as_bytes())];
            for part in [
                Message::Begin { commit: Lsn::new(at), time: 0, xid },
                Message::Insert { table: 1, new: row },
                Message::Commit { end: Lsn::new(at + 1), time: 0 },
            ] {
                session.course.take(&message(part)).expect("it is known");
            }
            session.next = at + 1;
        }
        let has_more = session.next < self.end() && self.random.bool();
        let Due::Say(next) = session.course.due(has_more) else {
            self.relays[relay] = Some(session);
            return;
        };
        let left = (self.broken != Some(Broken::Position)).then(|| session.course.position().clone());
        let entries = session.course.wanted().entries(None);
        if !matches!(self.write(session.fence, left.as_ref(), &next, entries), Written::Yes { .. }) {
            return;
        }
        let lsn = next.lsn;
        session.course.said(next);
        // It may die before it confirms, or may not confirm as no replica has heard.
        if self.random.u32(..3) > 0 {
            self.confirm(lsn);
        }
        self.relays[relay] = Some(session);
    }

    fn confirm(&mut self, to: Lsn) {
        self.slot = self.slot.map(|slot| slot.max(to.get()));
    }

    /// The changes of which nothing was said since.
    fn unsaid(&mut self) -> Vec<usize> {
        self.now += 1;
        if self.random.bool() {
            self.begin(0);
        } else if let Some(at) = (0..2).find(|at| self.relays[*at].is_some()) {
            self.relays.swap(0, at);
        }
        // Whoever reads on meets something sooner or later.
        self.commits.push(self.now);
        for _ in 0..self.commits.len() * 20 {
            self.now += 1;
            if self.relays[0].is_none() {
                self.begin(0);
            }
            self.read(0);
        }
        let said = |at: usize, since: u64| {
            let key = format!("user:{at}").into_bytes();
            let is_it = |(kind, what): &(&[u8], Vec<u8>)| (*kind == b"key" && *what == key) || *kind == b"rule";
            self.cache.stream.iter().any(|(when, entry)| *when >= since && entry.iter().any(is_it))
        };
        self.commits.iter().enumerate().filter(|(at, since)| !said(*at, **since)).map(|(at, _)| at).collect()
    }
}

fn play(seed: u64, broken: Option<Broken>) -> Wrong {
    let mut world = World::new(seed, broken);
    (0..STEPS).for_each(|_| world.step());
    Wrong { unsaid: world.unsaid(), overtaken: world.overtaken }
}

#[test]
fn no_change_goes_unsaid_and_one_relay_writes_at_a_time() {
    for seed in 0..HISTORIES {
        assert_eq!(play(seed, None), Wrong::default(), "seed {seed}");
    }
}

#[test]
fn what_is_left_out_is_missed() {
    for (broken, is_missed) in [
        (Broken::Position, (|wrong| !wrong.unsaid.is_empty()) as fn(&Wrong) -> bool),
        (Broken::Beginning, |wrong| !wrong.unsaid.is_empty()),
        (Broken::Fence, |wrong| wrong.overtaken > 0),
    ] {
        assert!((0..HISTORIES).any(|seed| is_missed(&play(seed, Some(broken)))), "{broken:?} goes unnoticed");
    }
}

#[test]
fn a_beginning_invalidates_what_it_cannot_vouch_for_and_nothing_else() {
    let ready = |confirmed: u64| Ready { confirmed: Lsn::new(confirmed), ..Ready::default() };
    let position = Position::new(Lsn::new(5), &identity());
    let kept = Kept { position: Some(position.clone()), followers: followers_of(&watches()), ..Kept::default() };
    let whole = begin(&kept, &identity(), &ready(5), &watches());
    assert_eq!((whole.position.clone(), whole.lost, whole.wanted.is_empty()), (position.clone(), false, true));
    // What was not confirmed comes again.
    assert_eq!(begin(&kept, &identity(), &ready(3), &watches()).position, position);
    let elsewhere = Identity { system: "7/2".to_owned(), ..identity() };
    for (kept, identity, ready) in [
        (&kept, identity(), ready(6)),
        (&kept, elsewhere, ready(5)),
        (&kept, identity(), Ready { is_new: true, ..ready(5) }),
        (&Kept { position: None, ..kept.clone() }, identity(), ready(5)),
    ] {
        let start = begin(kept, &identity, &ready, &watches());
        assert!(start.lost && start.wanted.rules().get("user") == Some(&Why::Lost), "{ready:?}");
        assert_eq!(start.position, Position::new(ready.confirmed, &identity));
    }
    let made = Kept { made_by: Some(SlotOwner::Larder), ..Kept::default() };
    let first = begin(&made, &identity(), &Ready { is_new: true, ..ready(5) }, &watches());
    assert!(!first.lost && !first.wanted.is_empty(), "what was cached before goes, and nothing was lost");
    // Other followers, and tables that were not told of.
    let mut others = watches();
    others[0].follow.table = "people".parse().expect("a name");
    let added = Ready { added: vec!["users".parse().expect("a name")], ..ready(5) };
    for start in [begin(&kept, &identity(), &ready(5), &others), begin(&kept, &identity(), &added, &watches())] {
        assert!(!start.lost && start.wanted.rules().get("user") == Some(&Why::Followed));
    }
}

#[test]
fn a_large_transaction_is_said_in_parts_and_passed_with_the_last() {
    let mut course = Course::new(watches(), "larder_main_db", Position::new(Lsn::new(5), &identity()));
    let columns = vec![Column { name: "id".to_owned(), identity: true, kind: 20 }];
    let (schema, name) = ("public".to_owned(), "users".to_owned());
    let table = Relation { id: 1, schema, name, identity: ReplicaIdentity::Default, columns };
    course.take(&message(Message::Relation(table))).expect("a table");
    course.take(&message(Message::Begin { commit: Lsn::new(8), time: 0, xid: 3 })).expect("a beginning");
    let mut said = 0;
    for row in 0..MOST_KEYS_AT_ONCE + 1 {
        let text = row.to_string();
        course.take(&message(Message::Insert { table: 1, new: vec![Cell::Text(text.as_bytes())] })).expect("a row");
        if let Due::Say(next) = course.due(false) {
            assert_eq!((next.lsn, course.xids()), (Lsn::new(5), &[3][..]));
            said += course.wanted().named();
            course.said(next);
        }
    }
    assert_eq!(said, MOST_KEYS_AT_ONCE);
    course.take(&message(Message::Commit { end: Lsn::new(9), time: 0 })).expect("an end");
    assert_eq!(course.due(true), Due::Nothing, "more may be there already");
    let Due::Say(next) = course.due(false) else { panic!("the rest") };
    assert_eq!((next.lsn, course.wanted().named(), course.xids()), (Lsn::new(9), 1, &[3][..]));
    assert_eq!(course.said(next), 1);
    assert!(course.xids().is_empty() && course.due(false) == Due::Nothing);
}
