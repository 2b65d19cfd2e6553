//! Where the reading of a feed stands: what is to be said, and how far it is once that was said. Pure.
//!
//! A transaction is said when its rows are known, which is after its commit: Postgres tells of no other. A large one is said in parts, and the
//! position moves with the last. Where it begins follows from what the cache knows and from what the database keeps ([`begin`]).

use std::collections::BTreeMap;
use std::time::Duration;

use tokio::time::Instant;

use super::register::{Followers, Kept, Position};
use super::rows::{Tables, UnknownTable, Watch};
use super::transit::Transit;
use super::wanted::{Wanted, Why};
use crate::origin::changes::pgoutput::{Lsn, Message};
use crate::origin::changes::{Identity, Ready, Told};
use crate::policy::changes::TableName;
use crate::policy::digest;

/// So many keys, or transactions, are said before more is read.
const MOST_KEYS_AT_ONCE: usize = 5_000;
const MOST_TRANSACTIONS_AT_ONCE: usize = 1_000;
/// How often the position is written where nothing is about any key: whether the cache still has it is seen by that.
const MOVE_EVERY: Duration = Duration::from_secs(2);

/// Where a feed begins.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Start {
    /// Up to where everything is said once the entries of `wanted` are.
    pub position: Position,
    /// What goes before anything else is read.
    pub wanted: Wanted,
    /// For whom, from then on.
    pub followers: Followers,
    /// Whether changes may have been lost since the cache was last told of any.
    pub lost: bool,
}

impl Start {
    /// Whether nobody knows what changed before, of anything that rules follow.
    pub fn is_lapse(&self) -> bool {
        self.wanted.rules().values().any(|why| *why == Why::Lost)
    }
}

/// Where to begin. The database goes on from where the slot was confirmed, and what the cache was told reaches to its position: where that is
/// nearer than the slot's, or of another log, or not known, what lies between is lost.
pub fn begin(kept: &Kept, identity: &Identity, ready: &Ready, watches: &[Watch]) -> Start {
    let from = Position::new(ready.confirmed, identity);
    let known = kept.position.as_ref().filter(|known| known.is_of(&from) && known.lsn >= from.lsn && !ready.is_new);
    let followers = followers_of(watches);
    let mut wanted = Wanted::default();
    for watch in watches {
        let rule = &watch.follow.rule;
        if known.is_none() {
            wanted.rule(rule, Why::Lost);
        } else if ready.added.contains(&watch.follow.table) || followers.get(rule) != kept.followers.get(rule) {
            wanted.rule(rule, Why::Followed);
        }
    }
    // A cache that knows of no feed has not lost any.
    let lost = known.is_none() && kept.has_followed();
    Start { position: known.cloned().unwrap_or(from), wanted, followers, lost }
}

/// By rule, a digest of what it follows.
fn followers_of(watches: &[Watch]) -> Followers {
    let mut said: BTreeMap<&str, String> = BTreeMap::new();
    for watch in watches {
        let follow = serde_json::to_string(&watch.follow).unwrap_or_default();
        *said.entry(&watch.follow.rule).or_default() += &format!("{} {follow}\n", watch.keys);
    }
    said.into_iter().map(|(rule, text)| (rule.to_owned(), digest::sha256(text.as_bytes())[..16].to_owned())).collect()
}

/// What to do next.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Due {
    /// To read on.
    Nothing,
    /// To say what is wanted, once these transactions can be seen, and to move to the position.
    Say(Position),
}

/// Where the reading stands.
#[derive(Debug)]
pub struct Course {
    tables: Tables,
    position: Position,
    moved: Instant,
    /// Up to where all that was read is whole.
    reached: Lsn,
    /// Whether a transaction is being read.
    is_open: bool,
    wanted: Wanted,
    xids: Vec<u32>,
    read: u64,
    /// The oldest commit that is not said: how old it was when it was read, and when that was.
    oldest: Option<(Duration, Instant)>,
    /// The same of the newest that was read, or of the database's word that there is no more.
    newest: Option<(Duration, Instant)>,
    transit: Transit,
}

impl Course {
    /// Reads `slot` on from `position`.
    pub fn new(watches: Vec<Watch>, slot: &str, position: Position) -> Self {
        Self {
            tables: Tables::new(watches, slot),
            reached: position.lsn,
            position,
            moved: Instant::now(),
            is_open: false,
            wanted: Wanted::default(),
            xids: Vec::new(),
            read: 0,
            oldest: None,
            newest: None,
            transit: Transit::new(Instant::now()),
        }
    }

    /// Takes in what the stream brings.
    ///
    /// # Errors
    /// The stream is not what it should be.
    pub fn take(&mut self, told: &Told<'_>) -> Result<(), UnknownTable> {
        match told {
            Told::Message { sent, message: begin @ Message::Begin { xid, time, .. } } => {
                self.tables.take(begin, &mut self.wanted)?;
                self.is_open = true;
                self.xids.push(*xid);
                let age = Duration::from_micros(u64::try_from(sent.saturating_sub(*time)).unwrap_or_default());
                let now = Instant::now();
                let read = (age + self.transit.lain(*sent, now), now);
                self.oldest.get_or_insert(read);
                self.newest = Some(read);
            }
            Told::Message { sent, message: Message::Commit { end, .. } } => {
                self.transit.lain(*sent, Instant::now());
                self.is_open = false;
                self.read += 1;
                self.reached = self.reached.max(*end);
                if self.wanted.is_empty() {
                    // It was about no key.
                    self.xids.clear();
                    self.oldest = None;
                }
            }
            Told::Message { sent, message } => {
                self.transit.lain(*sent, Instant::now());
                self.tables.take(message, &mut self.wanted)?;
            }
            Told::Alive { end, sent } => {
                let lain = self.transit.lain(*sent, Instant::now());
                if !self.is_open {
                    self.reached = self.reached.max(*end);
                    self.newest = Some((lain, Instant::now()));
                }
            }
            Told::TooLarge => self.tables.all_of_all(&Why::TooLarge, &mut self.wanted),
        }
        Ok(())
    }

    /// All keys of the rules that follow these tables go: they were not told of until now.
    pub fn added(&mut self, tables: &[TableName]) {
        for watch in self.tables.watches().to_vec() {
            if tables.contains(&watch.follow.table) {
                self.wanted.rule(&watch.follow.rule, Why::Followed);
            }
        }
    }

    /// What to do next, where more may be there already.
    pub fn due(&mut self, has_more: bool) -> Due {
        let due = self.next(has_more);
        self.transit.goes_on(due == Due::Nothing && !has_more, Instant::now());
        due
    }

    fn next(&self, has_more: bool) -> Due {
        let is_full = self.wanted.named() >= MOST_KEYS_AT_ONCE || self.xids.len() >= MOST_TRANSACTIONS_AT_ONCE;
        if !self.wanted.is_empty() && (is_full || (!has_more && !self.is_open)) {
            return Due::Say(self.position.at(if self.is_open { self.position.lsn } else { self.reached }));
        }
        match self.wanted.is_empty() && !self.is_open && self.moved.elapsed() >= MOVE_EVERY {
            true => Due::Say(self.position.at(self.reached)),
            false => Due::Nothing,
        }
    }

    /// What is to be said.
    pub fn wanted(&self) -> &Wanted {
        &self.wanted
    }

    /// The transactions that have to be seen before it is.
    pub fn xids(&self) -> &[u32] {
        &self.xids
    }

    /// What was left.
    pub fn position(&self) -> &Position {
        &self.position
    }

    /// How old the oldest commit is that is not said, as far as the database's clock told.
    pub fn age(&self) -> Duration {
        self.oldest.map_or(Duration::ZERO, |(age, since)| age + since.elapsed())
    }

    /// How old a commit may be that is not said once what is wanted is: as old as the newest that was read, or as the database's word since that
    /// there is no more.
    pub fn behind(&self) -> Duration {
        self.oldest.filter(|_| self.is_open).or(self.newest).map_or(Duration::ZERO, |(age, since)| age + since.elapsed())
    }

    /// What was wanted has been said, and the position moved. How many transactions that brought to their end.
    pub fn said(&mut self, position: Position) -> u64 {
        self.position = position;
        self.moved = Instant::now();
        self.wanted = Wanted::default();
        if self.is_open {
            // The transaction that is being read has to be seen for what is to come as well.
            self.xids.drain(..self.xids.len().saturating_sub(1));
        } else {
            self.xids.clear();
            self.oldest = None;
        }
        std::mem::take(&mut self.read)
    }
}

#[cfg(test)]
mod tests;
