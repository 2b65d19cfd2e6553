//! A command whose keys are known only far behind its start: it is kept in a [`Spool`] as it comes, up to its last key, and each key
//! is looked at piece by piece. Of the command's bytes no more is held than a read brings; of its keys a few words each.

use std::ops::Range;
use std::rc::Rc;

use super::spool::{Spool, SpoolError};
use super::turn::{Turn, Want, turn};
use crate::policy::RuleScan;
use crate::sidecar::commands::{CommandSpec, Effect, KeySpan};
use crate::sidecar::dispatch::{own_keys, unmatched_text};
use crate::sidecar::engine::ttl::changes;
use crate::sidecar::lapses;
use crate::sidecar::patterns::write_through;
use crate::sidecar::policy::{ActivePolicy, RuleId, UNMATCHED};
use crate::sidecar::resp::command::argument_header;
use crate::sidecar::resp::{CommandArgs, CommandTail, ProtocolError};
use crate::sidecar::session::{Reader, Session};
use crate::sidecar::slots::{self, SlotScan};
use crate::sidecar::upstream::queue::ANY_SLOT;
use crate::sidecar::versions;
use crate::sidecar::worker::Worker;

/// How much is read ahead. Above [`MOST_AT_ONCE`] and a header.
const MOST_AHEAD_BYTES: usize = 128 * 1024;
/// An argument up to this length is looked at when it is whole.
const MOST_AT_ONCE: usize = 64 * 1024;
/// How much of an argument is kept to see what it says: a number of keys, or a key's start in an error.
const HEAD_BYTES: usize = 64;

/// A command, in part or whole in a spool.
#[derive(Debug)]
pub struct LongCommand {
    /// What it is.
    pub spec: &'static CommandSpec,
    /// Its keys, in their order.
    pub keys: Vec<LongKey>,
    policy: Rc<ActivePolicy>,
    worker: Rc<Worker>,
    cluster: bool,
    spool: Spool,
    announced: usize,
    heads: Heads,
    spans: Vec<KeySpan>,
    /// All of `spans` are known.
    spanned: bool,
    /// Where the next argument, or the rest of this one, begins.
    at: u64,
    /// Which argument is next.
    index: usize,
    current: Option<Current>,
    /// Why the policy does not let it pass.
    refusal: Option<String>,
}

/// A key of a command that is not held.
#[derive(Debug, Clone, Copy)]
pub struct LongKey {
    /// Where its header begins in the spool.
    start: u64,
    /// How many bytes it has.
    pub length: u32,
    header: u8,
    /// What happens to it.
    pub effect: Effect,
    /// Its slot, also where there is only one server.
    pub slot: u16,
    /// The rule that covers it.
    pub rule: RuleId,
}

impl LongKey {
    /// Where it is in the spool as a bulk string: header, bytes, line end.
    pub fn as_argument(&self) -> Range<u64> {
        self.start..self.as_text().end
    }

    /// Where its bytes and the line end are.
    pub fn as_text(&self) -> Range<u64> {
        let begin = self.start + u64::from(self.header);
        begin..begin + u64::from(self.length) + 2
    }

    /// Where its bulk string begins.
    pub fn start(&self) -> u64 {
        self.start
    }
}

/// The starts of the arguments so far.
#[derive(Debug, Default)]
struct Heads {
    bytes: Vec<u8>,
    ranges: Vec<Range<u32>>,
}

/// An argument of which a part has come.
#[derive(Debug)]
struct Current {
    /// How many bytes are to come, its line end included.
    left: u64,
    head: Vec<u8>,
    key: Option<KeyScan>,
}

/// A key of which a part has come.
#[derive(Debug)]
struct KeyScan {
    key: LongKey,
    slot: SlotScan,
    rule: RuleScan,
}

/// Why a command is not passed on.
#[derive(Debug)]
pub enum Stopped {
    /// The session is over.
    Gone,
    /// It is swallowed, the tail of it included, and answered with this error.
    Refused(CommandTail, String),
}

impl LongCommand {
    /// Keeps the unfinished command at the front of the inbox, which is a `spec` of `announced` arguments, up to its last key.
    ///
    /// # Errors
    /// Where it cannot be kept, or the policy does not let it pass.
    pub async fn read(
        reader: &mut Reader,
        session: &Rc<Session>,
        spec: &'static CommandSpec,
        announced: usize,
    ) -> Result<Self, Stopped> {
        let spool = match Spool::create().await {
            Ok(spool) => spool,
            Err(error) => return Err(Stopped::Refused(reader.begin_tail(), error.to_string())),
        };
        let header = memchr::memchr(b'\n', reader.inbox()).map_or(0, |end| end + 1);
        reader.begin_tail();
        let mut command = Self {
            spec,
            keys: Vec::new(),
            policy: session.worker().policy(),
            worker: session.worker().clone(),
            cluster: session.worker().is_cluster(),
            spool,
            announced,
            heads: Heads::default(),
            spans: Vec::new(),
            spanned: false,
            at: header as u64,
            index: 0,
            current: None,
            refusal: None,
        };
        command.keep(reader, header).await?;
        command.read_until(reader, Self::has_all_keys).await?;
        Ok(command)
    }

    /// Keeps the rest of it too.
    pub async fn read_to_end(&mut self, reader: &mut Reader) -> Result<(), Stopped> {
        self.read_until(reader, Self::is_whole).await
    }

    async fn read_until(&mut self, reader: &mut Reader, done: fn(&Self) -> bool) -> Result<(), Stopped> {
        let worker = reader.session().worker().clone();
        let mut active = worker.now();
        loop {
            let Ok(count) = self.take(reader.inbox(), done) else { return Err(Stopped::Gone) };
            if count > 0 {
                active = worker.now();
            }
            self.keep(reader, count).await?;
            if let Some(text) = self.refusal.take() {
                return Err(Stopped::Refused(self.tail(), text));
            }
            if done(self) {
                return Ok(());
            }
            let want = Want { input: MOST_AHEAD_BYTES, idle_since: Some(active), ..Want::default() };
            match turn(reader, None, want).await {
                // Half a command keeps room that others may need.
                Turn::Ended | Turn::Gone | Turn::Late => return Err(Stopped::Gone),
                _ => {}
            }
        }
    }

    /// Moves the first `count` bytes of the inbox, which were looked at, into the spool.
    async fn keep(&mut self, reader: &mut Reader, count: usize) -> Result<(), Stopped> {
        if count == 0 {
            return Ok(());
        }
        let kept = self.spool.append(&reader.inbox()[..count]).await;
        reader.skip(count);
        kept.map_err(|error| Stopped::Refused(self.tail(), error.to_string()))
    }

    /// What is not kept of it.
    pub fn tail(&self) -> CommandTail {
        let begun = usize::from(self.current.is_some());
        let remaining = (self.announced - self.index).saturating_sub(begun);
        CommandTail::new(remaining as u32, self.current.as_ref().map_or(0, |current| current.left))
    }

    fn is_whole(&self) -> bool {
        self.index >= self.announced
    }

    fn has_all_keys(&self) -> bool {
        let last = self.spans.iter().filter_map(KeySpan::last).max();
        self.is_whole() || (self.spanned && self.current.is_none() && last.is_none_or(|last| self.index > last))
    }

    /// Looks at `bytes`, which follow those already looked at, until it is `done`. How many were looked at.
    fn take(&mut self, bytes: &[u8], done: fn(&Self) -> bool) -> Result<usize, ProtocolError> {
        let mut taken = 0;
        while !done(self) && self.refusal.is_none() {
            let rest = &bytes[taken..];
            let count = if self.current.is_some() { self.take_more(rest) } else { self.take_next(rest)? };
            if count == 0 {
                break;
            }
            taken += count;
            self.at += count as u64;
        }
        Ok(taken)
    }

    /// Begins the next argument. Zero where too little of it has come.
    fn take_next(&mut self, bytes: &[u8]) -> Result<usize, ProtocolError> {
        let Some((length, header)) = argument_header(bytes)? else { return Ok(0) };
        let size = length as usize;
        let whole = bytes.get(header..header + size + 2);
        if size <= MOST_AT_ONCE && whole.is_none() {
            return Ok(0);
        }
        self.look_for_spans();
        let effect = self.spans.iter().find(|span| span.contains(self.index)).map(|span| span.effect);
        let key = effect.map(|effect| LongKey { start: self.at, length, header: header as u8, effect, slot: 0, rule: UNMATCHED });
        if let Some(argument) = whole {
            let argument = &argument[..size];
            if let Some(key) = key {
                let (slot, rule) = (slots::slot_of(argument), self.policy.find(argument));
                self.enter(LongKey { slot, rule, ..key }, argument);
            }
            self.end_argument(argument);
            return Ok(header + size + 2);
        }
        let key = key.map(|key| KeyScan { key, slot: SlotScan::default(), rule: RuleScan::default() });
        self.current = Some(Current { left: u64::from(length) + 2, head: Vec::new(), key });
        Ok(header)
    }

    /// Looks at more of an argument that has begun.
    fn take_more(&mut self, bytes: &[u8]) -> usize {
        let Some(current) = &mut self.current else { return 0 };
        let count = current.left.min(bytes.len() as u64);
        // The line end is no part of the argument.
        let own = current.left.saturating_sub(2).min(count) as usize;
        let room = HEAD_BYTES.saturating_sub(current.head.len()).min(own);
        current.head.extend_from_slice(&bytes[..room]);
        if let Some(scan) = &mut current.key {
            scan.slot.feed(&bytes[..own]);
            scan.rule.feed(self.policy.index(), &bytes[..own]);
        }
        current.left -= count;
        if current.left == 0
            && let Some(ended) = self.current.take()
        {
            if let Some(scan) = ended.key {
                let slot = scan.slot.finish();
                let rule = scan.rule.finish(self.policy.index()).map_or(UNMATCHED, |rule| rule as RuleId);
                self.enter(LongKey { slot, rule, ..scan.key }, &ended.head);
            }
            self.end_argument(&ended.head);
        }
        count as usize
    }

    /// Where the keys are, once the arguments so far tell.
    fn look_for_spans(&mut self) {
        if self.spanned {
            return;
        }
        let args = CommandArgs::new(&self.heads.bytes, &self.heads.ranges);
        match self.spec.spans(&args, self.announced, &mut self.spans) {
            Ok(all) => self.spanned = all.is_some(),
            Err(_) => {
                // Any server answers with the error that fits.
                self.spans.clear();
                self.spanned = true;
            }
        }
    }

    fn end_argument(&mut self, argument: &[u8]) {
        self.index += 1;
        if !self.spanned {
            let start = self.heads.bytes.len() as u32;
            self.heads.bytes.extend_from_slice(&argument[..argument.len().min(HEAD_BYTES)]);
            self.heads.ranges.push(start..self.heads.bytes.len() as u32);
            self.look_for_spans();
        }
    }

    /// Notes a key of which `head` is the start.
    fn enter(&mut self, key: LongKey, head: &[u8]) {
        if key.effect != Effect::Route {
            if slots::is_larder_key(head) {
                self.refusal = Some(own_keys::refusal(head));
            } else if key.rule == UNMATCHED && self.policy.refuses_unmatched() {
                self.refusal = Some(unmatched_text(head));
            } else if self.policy.is_versioned(key.rule) {
                self.refusal = Some(versions::too_long_text(&self.policy, key.rule));
            } else if let Some(text) = lapses::refusal_too_long(&self.worker, &self.policy, key.rule) {
                self.refusal = Some(text);
            } else if changes(key.effect) && self.policy.writes_through(key.rule) {
                self.refusal = Some(write_through::too_long_text(&self.policy, key.rule));
            }
        }
        self.keys.push(key);
    }

    /// The slot of all keys; [`ANY_SLOT`] where there are no slots, or no keys. `None`: they lie in several.
    pub fn slot(&self) -> Option<u16> {
        let Some(slot) = self.keys.first().map(|key| key.slot).filter(|_| self.cluster) else { return Some(ANY_SLOT) };
        self.keys.iter().all(|key| key.slot == slot).then_some(slot)
    }

    /// How many arguments each key takes: two, where a value follows.
    pub fn step(&self) -> usize {
        self.spans.first().map_or(1, |span| span.step)
    }

    /// Where a key of a whole command, and a value that follows it, are as bulk strings.
    pub fn key_and_value(&self, place: usize) -> Range<u64> {
        let end = self.keys.get(place + 1).map_or(self.len(), LongKey::start);
        self.keys.get(place).map_or(end, LongKey::start)..end
    }

    /// The policy under which it was looked at.
    pub fn policy(&self) -> &Rc<ActivePolicy> {
        &self.policy
    }

    /// How many arguments it has, its name included.
    pub fn announced(&self) -> usize {
        self.announced
    }

    /// How many of its bytes are kept.
    pub fn len(&self) -> u64 {
        self.spool.len()
    }

    /// Reads ranges of the kept bytes, one after the other.
    ///
    /// # Errors
    /// Where the file fails.
    pub async fn bytes(&self, ranges: Vec<Range<u64>>) -> Result<Vec<u8>, SpoolError> {
        self.spool.read(ranges).await
    }
}
