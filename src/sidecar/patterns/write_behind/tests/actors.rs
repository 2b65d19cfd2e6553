//! Sidecars and relays, one step at a time.

use super::Switch;
use super::world::{CARRIED_OUT_WITHIN, DETOUR_TAKES, KEYS, Moment, Row, SENT_WITHIN, TOLD_WITHIN, World};
use crate::journal;
use crate::journal::scripts::{Claimed, Fenced};
use crate::journal::{Held, Version};
use crate::sidecar::patterns::write_through::model::{self as key, Outcome, Token};

const MOST: usize = 64;
/// A relay's claim is over at once, so that relays overtake each other; a transaction takes at most so many entries.
const CLAIM_MS: u64 = 0;
const BATCH: usize = 3;

/// A write, as far as it has come.
#[derive(Debug, Clone, Copy)]
pub struct Write {
    key: usize,
    token: Token,
    deletes: bool,
    /// It is not sent later.
    until: u64,
}

/// A read, as far as it has come.
#[derive(Debug, Clone, Copy)]
pub struct Read {
    key: usize,
    token: Option<Token>,
    /// What was acknowledged when it began.
    floor: u64,
}

/// A write that goes past the journal.
#[derive(Debug, Clone, Copy)]
pub struct Detour {
    pub key: usize,
    pub version: Version,
    /// Its number.
    pub number: u64,
    pub deletes: bool,
}

#[derive(Debug, Clone, Copy)]
pub enum Actor {
    Idle,
    /// Its mark stands, since this moment.
    Marked(Write, Moment),
    /// And is confirmed.
    Ready(Write),
    /// The append is on its way to this primary, and counts until then.
    Sent(Write, Moment, u64),
    /// Its sidecar is dead.
    Flying(Write, Moment, u64),
    /// It stands in the journal.
    Appended(Write, Moment, Version, u64),
    /// All have it on disk.
    Durable(Write, Version, u64),
    /// The journal has no room: the write goes past it, which is to be confirmed; the origin is told until then.
    Away(Write, Moment, Detour, u64),
    /// The origin is being told, until when that comes to nothing.
    Telling(Write, Detour, u64),
    /// It has it.
    Told(Write, Detour),
    /// A read found nothing, and looks at the dirty index.
    Looks(Read),
    /// It asks the origin.
    Asks(Read),
    /// It has looked at the dirty index before it has a lease.
    LooksAhead(usize, u64),
    /// It knows a write of this number, and whether that deletes.
    Knows(Read, u64, bool),
}

/// What a relay tells the origin.
#[derive(Debug, Clone)]
pub struct Transaction {
    from: Version,
    upto: Version,
    /// Key, version, number of the write, whether it deletes.
    changes: Vec<(usize, Version, u64, bool)>,
}

#[derive(Debug, Clone)]
pub enum Relay {
    Idle,
    /// It has the partition.
    Claimed(u64),
    /// It has read entries, and what it will tell the origin.
    Read(u64, Moment, Batch),
    /// They are confirmed.
    Ready(u64, Batch),
    /// The origin has them.
    Applied(u64, Batch),
}

#[derive(Debug, Clone)]
pub struct Batch {
    transaction: Transaction,
    through: u64,
    cleared: Vec<(Vec<u8>, Version)>,
}

impl World {
    fn key_broken(&self) -> key::Broken {
        match self.switch {
            Switch::Key(broken) => broken,
            _ => key::Broken::Nothing,
        }
    }

    fn journal_broken(&self) -> journal::model::Broken {
        match self.switch {
            Switch::Journal(broken) => broken,
            _ => journal::model::Broken::Nothing,
        }
    }

    fn begin(&mut self, write: Write) -> bool {
        let (broken, mark) = (self.key_broken(), self.mark());
        self.change(|state, now| state.keys[write.key].begin(write.token, now, now + mark, MOST, broken))
    }

    fn finish(&mut self, write: Write, outcome: Outcome) {
        let broken = self.key_broken();
        self.change(|state, now| state.keys[write.key].end(write.token, now, outcome, broken));
    }

    pub fn actor_step(&mut self, actor: Actor) -> Result<Actor, String> {
        let gives_up = self.random.u8(..) < 12;
        Ok(match actor {
            Actor::Idle if self.random.bool() => {
                let (key, token, deletes) = (self.random.usize(..KEYS), self.number(), self.random.u8(..) < 50);
                let write = Write { key, token, deletes, until: self.now + SENT_WITHIN };
                if self.begin(write) { Actor::Marked(write, self.moment()) } else { Actor::Idle }
            }
            Actor::Idle => self.read()?,
            Actor::Marked(..) | Actor::Ready(_) | Actor::Appended(..) | Actor::Durable(..) if gives_up => Actor::Idle,
            Actor::Away(..) | Actor::Told(..) if gives_up => Actor::Idle,
            Actor::Marked(write, _) if self.now >= write.until => {
                self.finish(write, Outcome::Refused);
                Actor::Idle
            }
            Actor::Marked(write, moment) if !self.is_same_reign(moment) && self.switch != Switch::MarkUnconfirmed => {
                if self.begin(write) { Actor::Marked(write, self.moment()) } else { Actor::Idle }
            }
            Actor::Marked(write, moment) if self.switch == Switch::MarkUnconfirmed || self.is_confirmed(moment, false) => {
                Actor::Ready(write)
            }
            Actor::Marked(..) => actor,
            Actor::Ready(write) if self.now > write.until => {
                self.finish(write, Outcome::Refused);
                Actor::Idle
            }
            // The journal has no room: seldom of use where the key is dirty.
            Actor::Ready(write)
                if self.overflows && self.random.u8(..) < if self.look_up(write.key).is_some() { 8 } else { 128 } =>
            {
                let (began, until) = (self.now, self.clock() + CARRIED_OUT_WITHIN);
                match self.leave(write.key, write.deletes, until) {
                    Some(detour) => Actor::Away(write, self.moment(), detour, began + TOLD_WITHIN),
                    None => {
                        self.finish(write, Outcome::Refused);
                        Actor::Idle
                    }
                }
            }
            Actor::Away(write, moment, detour, until) => {
                let unconfirmed = self.switch == Switch::LeaveUnconfirmed;
                if self.now > until || (!self.is_same_reign(moment) && !unconfirmed) {
                    self.arrive(detour);
                    self.finish(write, Outcome::Refused);
                    Actor::Idle
                } else if unconfirmed || self.is_confirmed(moment, true) {
                    Actor::Telling(write, detour, self.now + DETOUR_TAKES)
                } else {
                    actor
                }
            }
            Actor::Telling(_, detour, until) if gives_up => {
                self.astray.push((detour, until));
                Actor::Idle
            }
            Actor::Telling(write, detour, until) => {
                let is_made = self.now <= until;
                if is_made {
                    self.pass_by(detour);
                    Actor::Told(write, detour)
                } else {
                    self.arrive(detour);
                    self.finish(write, Outcome::Refused);
                    Actor::Idle
                }
            }
            Actor::Told(write, detour) => {
                self.arrive(detour);
                let Detour { version, number, .. } = detour;
                let outcome = if write.deletes { Outcome::Deleted } else { Outcome::Stored(number, Some(version.get())) };
                self.finish(write, outcome);
                self.acknowledged[write.key] = self.acknowledged[write.key].max(number);
                self.seen.acknowledged += 1;
                Actor::Idle
            }
            Actor::Ready(write) => Actor::Sent(write, self.moment(), self.clock() + CARRIED_OUT_WITHIN),
            Actor::Sent(write, moment, until) if gives_up => Actor::Flying(write, moment, until),
            // The connection is lost: whether the append was carried out is not known.
            Actor::Sent(_, moment, _) | Actor::Flying(_, moment, _) if !self.is_same_reign(moment) => Actor::Idle,
            Actor::Sent(write, _, until) => match self.append(write.key, write.deletes, until) {
                Some((version, number)) => Actor::Appended(write, self.moment(), version, number),
                None => {
                    self.finish(write, Outcome::Refused);
                    Actor::Idle
                }
            },
            // A server may be stopped for long.
            Actor::Flying(..) if self.random.u8(..) < 220 => actor,
            Actor::Flying(write, _, until) => {
                self.append(write.key, write.deletes, until);
                Actor::Idle
            }
            Actor::Appended(_, moment, ..) if !self.is_same_reign(moment) && self.switch != Switch::Unconfirmed => Actor::Idle,
            Actor::Appended(write, moment, version, number)
                if self.switch == Switch::Unconfirmed || self.is_confirmed(moment, true) =>
            {
                Actor::Durable(write, version, number)
            }
            Actor::Appended(..) => actor,
            Actor::Durable(write, version, number) => {
                let outcome = if write.deletes { Outcome::Deleted } else { Outcome::Stored(number, Some(version.get())) };
                self.finish(write, outcome);
                self.acknowledged[write.key] = self.acknowledged[write.key].max(number);
                self.seen.acknowledged += 1;
                Actor::Idle
            }
            // So that a whole write finds its way in between.
            Actor::LooksAhead(..) if self.random.u8(..) < 220 => actor,
            Actor::LooksAhead(key, floor) => Actor::Asks(self.lease(key, floor)),
            Actor::Looks(read) if self.switch == Switch::DirtyUnread => Actor::Asks(read),
            Actor::Looks(read) => match self.look_up(read.key) {
                Some((number, deleted)) => {
                    self.seen.from_dirty += 1;
                    Actor::Knows(read, number, deleted)
                }
                None => Actor::Asks(read),
            },
            Actor::Asks(read) => {
                let Row { number, deleted, .. } = self.rows[read.key];
                Actor::Knows(read, number, deleted)
            }
            Actor::Knows(Read { key, token, floor }, number, deleted) => {
                if let Some(token) = token {
                    self.change(|state, _| state.keys[key].fill(token, (number > 0 && !deleted).then_some(number)));
                    self.seen.filled += 1;
                }
                if number < floor {
                    return Err(format!("key {key}: a read gave {number}, and {floor} was acknowledged before it began"));
                }
                Actor::Idle
            }
        })
    }

    fn arrive(&mut self, detour: Detour) {
        self.change(|state, _| state.journal.arrive(&[(vec![detour.key as u8], detour.version)]));
    }

    /// What the dirty index has of a key.
    fn look_up(&self, key: usize) -> Option<(u64, bool)> {
        let Held { version, value } = self.state().journal.dirty.get(&vec![key as u8])?;
        Some((self.numbers.get(version).copied().unwrap_or_default(), value.is_none()))
    }

    fn read(&mut self) -> Result<Actor, String> {
        let key = self.random.usize(..KEYS);
        let floor = self.acknowledged[key];
        match self.state().keys[key].value {
            Some(value) if value < floor => Err(format!("key {key}: a read gave {value}, and {floor} was acknowledged before")),
            Some(_) => Ok(Actor::Idle),
            None if self.switch == Switch::DirtyFirst && self.look_up(key).is_none() => Ok(Actor::LooksAhead(key, floor)),
            None => Ok(Actor::Looks(self.lease(key, floor))),
        }
    }

    fn lease(&mut self, key: usize, floor: u64) -> Read {
        let (token, broken) = (self.number(), self.key_broken());
        let leased = self.change(|state, now| state.keys[key].lease(token, now, broken));
        Read { key, token: leased.then_some(token), floor }
    }

    /// A relay goes on, or dies.
    pub fn advance_relay(&mut self, at: usize, relay: Relay) -> Relay {
        if self.random.u8(..) < 16 {
            if let Relay::Ready(_, batch) = relay {
                // What it has told the origin may still come to something.
                self.adrift.push(batch.transaction);
            }
            return Relay::Idle;
        }
        self.advance_relay_surely(at, relay)
    }

    pub fn advance_relay_surely(&mut self, at: usize, relay: Relay) -> Relay {
        match relay {
            Relay::Idle => {
                let token = format!("{at}-{}", self.number());
                match self.change(|state, now| state.journal.claim(now, &token, CLAIM_MS)) {
                    Claimed::Yes { fence, .. } => Relay::Claimed(fence),
                    Claimed::Held(_) => Relay::Idle,
                }
            }
            Relay::Claimed(fence) => self.read_batch(fence),
            Relay::Read(_, moment, _) if !self.is_same_reign(moment) && self.switch != Switch::RelayUnconfirmed => Relay::Idle,
            Relay::Read(fence, moment, batch) if self.switch == Switch::RelayUnconfirmed || self.is_confirmed(moment, true) => {
                if self.switch == Switch::ClearedEarly {
                    self.clear(fence, &batch);
                }
                Relay::Ready(fence, batch)
            }
            Relay::Read(..) => relay,
            Relay::Ready(fence, batch) => {
                if self.commit(&batch.transaction) {
                    Relay::Applied(fence, batch)
                } else {
                    Relay::Idle
                }
            }
            Relay::Applied(fence, batch) => match self.clear(fence, &batch) {
                true => Relay::Claimed(fence),
                false => Relay::Idle,
            },
        }
    }

    fn clear(&mut self, fence: u64, batch: &Batch) -> bool {
        let (upto, broken) = (batch.transaction.upto, self.journal_broken());
        let done = self.change(|state, _| state.journal.done(fence, upto, batch.through, &batch.cleared, broken));
        done != Fenced::Lost
    }

    fn read_batch(&mut self, fence: u64) -> Relay {
        let from = self.position;
        let entries: Vec<_> = self.state().journal.log.iter().take(BATCH).cloned().collect();
        let Some(last) = entries.last() else { return Relay::Idle };
        let (through, upto) = (last.through, last.version.max(from));
        let of = |entry: &journal::Entry| usize::from(entry.change.key[0]);
        let numbered = |entry: &journal::Entry| self.numbers.get(&entry.version).copied().unwrap_or_default();
        let fresh = entries.iter().filter(|entry| entry.version > from || self.switch == Switch::Order);
        let mut changes: Vec<(usize, Version, u64, bool)> =
            fresh.map(|entry| (of(entry), entry.version, numbered(entry), entry.change.value.is_none())).collect();
        // The last of each key counts.
        let later = changes.clone();
        changes.retain(|(key, version, ..)| !later.iter().any(|(other, newer, ..)| other == key && newer > version));
        let cleared = entries.iter().map(|entry| (entry.change.key.clone(), entry.version)).collect();
        let batch = Batch { transaction: Transaction { from, upto, changes }, through, cleared };
        Relay::Read(fence, self.moment(), batch)
    }

    /// The origin carries out a transaction, or undoes it.
    pub fn commit(&mut self, transaction: &Transaction) -> bool {
        if self.position != transaction.from && self.switch != Switch::Order {
            self.seen.refused_commits += 1;
            return false;
        }
        for (key, version, number, deleted) in &transaction.changes {
            if self.rows[*key].version < *version || self.switch == Switch::Order {
                self.rows[*key] = Row { version: *version, number: *number, deleted: *deleted };
            }
        }
        self.position = self.position.max(transaction.upto);
        true
    }
}
