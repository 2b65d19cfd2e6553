//! The client's task: reads commands and hands them on, until the client leaves.

use std::future::poll_fn;
use std::ops::Range;
use std::rc::Rc;
use std::task::{Context, Poll, ready};

use tokio::io::ReadBuf;

use super::{ClientReader, Ending, Session};
use crate::sidecar::dispatch::{self, Flow};
use crate::sidecar::exclusive::{self, Exclusive};
use crate::sidecar::patterns::cache_aside;
use crate::sidecar::resp::command::split_inline;
use crate::sidecar::resp::{CommandArgs, CommandScan, CommandScanner, CommandTail, ProtocolError, encode};
use crate::sidecar::tracking;
use crate::sidecar::worker::SCRATCH_BYTES;

/// An unfinished command is held up to this size; a longer one is passed on as it comes.
pub const MOST_HELD_BYTES: usize = 64 * 1024;
/// Reads in a row before other clients get their turn.
const READS_PER_TURN: usize = 4;

/// What a client's task reads from.
#[derive(Debug)]
pub struct Reader {
    session: Rc<Session>,
    source: ClientReader,
    /// Bytes that are read and not yet handed on.
    inbox: Vec<u8>,
    scanner: CommandScanner,
    /// Set by [`Reader::poll_fill`] where the client sends no more.
    ended: bool,
}

/// A whole command, for those who serve the client in another way.
#[derive(Debug)]
pub struct Taken {
    bytes: Vec<u8>,
    ranges: Vec<Range<u32>>,
}

impl Taken {
    /// The command as an array of bulk strings.
    pub fn raw(&self) -> &[u8] {
        &self.bytes
    }

    /// Its arguments; never none.
    pub fn args(&self) -> CommandArgs<'_> {
        CommandArgs::new(&self.bytes, &self.ranges)
    }
}

/// What is at the front of the inbox.
#[derive(Debug)]
pub enum Front {
    /// A whole command, already taken out.
    Command(Taken),
    /// Not a whole command: more must be read.
    Partial,
    /// A command that is longer than [`MOST_HELD_BYTES`] and not whole.
    Long,
    /// What is no command: the session is ending.
    Broken,
}

/// Why the shared mode ended.
enum Leave {
    /// The session is over.
    Over,
    /// The next command needs a connection of its own.
    Exclusive(Exclusive),
}

/// What a look at the inbox came to.
struct Progress {
    taken: usize,
    flow: Flow,
}

impl Reader {
    /// A reader for `session` on `source`.
    pub fn new(session: Rc<Session>, source: ClientReader) -> Self {
        Self { session, source, inbox: Vec::new(), scanner: CommandScanner::default(), ended: false }
    }

    /// A reader as [`Reader::new`], where the client has sent `inbox` already.
    pub fn resume(session: Rc<Session>, source: ClientReader, inbox: Vec<u8>) -> Self {
        Self { inbox, ..Self::new(session, source) }
    }

    /// The session that it reads for.
    pub fn session(&self) -> &Rc<Session> {
        &self.session
    }

    /// Takes out the command at the front of the inbox.
    pub fn take_front(&mut self) -> Front {
        loop {
            match self.scanner.scan(&self.inbox) {
                Ok(CommandScan::Complete { length }) if self.scanner.ranges().is_empty() => self.skip(length),
                Ok(CommandScan::Complete { length }) => {
                    let taken = Taken { bytes: self.inbox[..length].to_vec(), ranges: self.scanner.ranges().to_vec() };
                    self.skip(length);
                    return Front::Command(taken);
                }
                Ok(CommandScan::Inline { length }) => {
                    if let Err(error) = self.spell_out(length) {
                        return self.give_up(&error);
                    }
                }
                Ok(CommandScan::Incomplete) if self.inbox.len() < MOST_HELD_BYTES => return Front::Partial,
                Ok(CommandScan::Incomplete) if self.scanner.started() => return Front::Long,
                Ok(CommandScan::Incomplete) => return self.give_up(&ProtocolError::Inline),
                Err(error) => return self.give_up(&error),
            }
        }
    }

    /// Puts a command back that [`Reader::take_front`] took out last.
    pub fn put_back(&mut self, taken: Taken) {
        self.inbox.splice(..0, taken.bytes);
        self.scanner = CommandScanner::default();
    }

    /// Turns the inline command of `length` bytes at the front into an array of bulk strings.
    fn spell_out(&mut self, length: usize) -> Result<(), ProtocolError> {
        let words = split_inline(&self.inbox[..length])?;
        let mut wire = Vec::new();
        if !words.is_empty() {
            encode::command(&mut wire, &words);
        }
        self.inbox.splice(..length, wire);
        self.scanner = CommandScanner::default();
        Ok(())
    }

    fn give_up(&mut self, error: &ProtocolError) -> Front {
        refuse(&self.session, error);
        self.inbox = Vec::new();
        self.scanner = CommandScanner::default();
        Front::Broken
    }

    /// Whether a whole command, or what can never become one, is at the front of the inbox.
    pub fn is_whole(&mut self) -> bool {
        !matches!(self.scanner.scan(&self.inbox), Ok(CommandScan::Incomplete))
    }

    /// The whole arguments of the unfinished command at the front, and how many it will have.
    pub fn unfinished(&self) -> (CommandArgs<'_>, usize) {
        (CommandArgs::new(&self.inbox, self.scanner.ranges()), self.scanner.announced())
    }

    /// Follows the unfinished command at the front to its end, for a caller that hands it on as it comes. Its first byte is the
    /// inbox' first.
    pub fn begin_tail(&mut self) -> CommandTail {
        self.scanner.into_tail()
    }

    /// The bytes that are read and not handed on.
    pub fn inbox(&self) -> &[u8] {
        &self.inbox
    }

    /// Tells that the first `count` bytes of the inbox are handed on.
    pub fn skip(&mut self, count: usize) {
        self.inbox.drain(..count);
        if self.inbox.is_empty() && self.inbox.capacity() > 2 * MOST_HELD_BYTES {
            self.inbox = Vec::new();
        }
    }

    /// Whether the client sends no more.
    pub fn has_ended(&self) -> bool {
        self.ended
    }

    /// Reads once, where fewer than `most` bytes wait. Ready where something came, or the end.
    pub fn poll_fill(&mut self, cx: &mut Context<'_>, most: usize) -> Poll<()> {
        if self.ended || self.inbox.len() >= most {
            return Poll::Pending;
        }
        let scratch = self.session.worker().scratch();
        let mut scratch = scratch.borrow_mut();
        let room = (most - self.inbox.len()).min(SCRATCH_BYTES);
        let mut buffer = ReadBuf::new(&mut scratch[..room]);
        match ready!(self.source.poll_read(cx, &mut buffer)) {
            Ok(()) if !buffer.filled().is_empty() => self.inbox.extend_from_slice(buffer.filled()),
            _ => self.ended = true,
        }
        Poll::Ready(())
    }

    /// Serves the client to its end.
    pub async fn serve(mut self) {
        loop {
            match poll_fn(|cx| self.poll_shared(cx)).await {
                Leave::Over => break,
                // Boxed, so that the many clients that never need it do not carry the room for it.
                Leave::Exclusive(wish) => Box::pin(exclusive::run(&mut self, wish)).await,
            }
        }
        self.session.end(Ending::Now);
        self.session.worker().aside().on_end(&self.session);
        self.session.worker().tracking().end(&self.session);
        self.session.let_go();
        self.session.leave_lane();
    }

    /// Reads commands for the shared connections.
    fn poll_shared(&mut self, cx: &mut Context<'_>) -> Poll<Leave> {
        let session = self.session.clone();
        session.remember_waker(cx);
        let outcome = self.advance(cx);
        session.worker().flush_dirty();
        if session.output_bytes() > 0 {
            let was_paused = !session.has_room();
            session.poll_flush(cx);
            if was_paused && session.has_room() {
                // Nothing else may come to wake the task: the answers are all there.
                cx.waker().wake_by_ref();
            }
        }
        let drained = session.outstanding() == 0 && session.output_bytes() == 0;
        match session.ending() {
            Ending::Now => Poll::Ready(Leave::Over),
            Ending::Draining if drained => Poll::Ready(Leave::Over),
            Ending::Draining => {
                session.watch_answers();
                Poll::Pending
            }
            Ending::No => outcome,
        }
    }

    fn advance(&mut self, cx: &mut Context<'_>) -> Poll<Leave> {
        let mut flow = if self.may_go_on() && !self.inbox.is_empty() { self.take_inbox() } else { Flow::Continue };
        for _ in 0..READS_PER_TURN {
            match flow {
                Flow::Continue if self.may_go_on() => flow = ready!(self.poll_more(cx)),
                Flow::Continue => {
                    self.watch_for_the_end(cx);
                    return Poll::Pending;
                }
                Flow::Wait | Flow::Quiet | Flow::Again => {
                    self.session.watch_answers();
                    return Poll::Pending;
                }
                Flow::Exclusive(wish) => return self.leave_for(wish),
            }
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    }

    /// While a command of the client's is repeated, none behind it is handed on. That the client has left is seen all the same: nobody
    /// waits for the command any more.
    fn watch_for_the_end(&mut self, cx: &mut Context<'_>) {
        while self.session.is_held() && !self.session.has_left() && self.inbox.len() < MOST_HELD_BYTES {
            let scratch = self.session.worker().scratch();
            let mut scratch = scratch.borrow_mut();
            let room = (MOST_HELD_BYTES - self.inbox.len()).min(SCRATCH_BYTES);
            let mut buffer = ReadBuf::new(&mut scratch[..room]);
            match self.source.poll_read(cx, &mut buffer) {
                Poll::Pending => return,
                Poll::Ready(Ok(())) if !buffer.filled().is_empty() => {
                    self.session.worker().metrics().client_bytes(buffer.filled().len());
                    self.inbox.extend_from_slice(buffer.filled());
                }
                // Read anew, it says so anew: what came before it is handed on first.
                Poll::Ready(_) => self.session.note_left(),
            }
        }
    }

    fn may_go_on(&self) -> bool {
        self.session.ending() == Ending::No && self.session.may_read()
    }

    /// A client changes lane only after its commands on the old one are answered.
    fn leave_for(&mut self, wish: Exclusive) -> Poll<Leave> {
        cache_aside::leaves(&self.session);
        if self.session.outstanding() > 0 {
            self.session.watch_answers();
            return Poll::Pending;
        }
        Poll::Ready(Leave::Exclusive(wish))
    }

    /// Reads once, into the worker's scratch, and hands on what is whole.
    fn poll_more(&mut self, cx: &mut Context<'_>) -> Poll<Flow> {
        let scratch = self.session.worker().scratch();
        let mut scratch = scratch.borrow_mut();
        let mut buffer = ReadBuf::new(&mut scratch[..SCRATCH_BYTES]);
        match self.source.poll_read(cx, &mut buffer) {
            Poll::Pending => return Poll::Pending,
            Poll::Ready(Err(_)) => {
                self.session.note_left();
                self.session.end(Ending::Now);
            }
            Poll::Ready(Ok(())) if buffer.filled().is_empty() => {
                self.session.note_left();
                self.session.end(Ending::Draining);
            }
            Poll::Ready(Ok(())) => {}
        }
        self.session.worker().metrics().client_bytes(buffer.filled().len());
        if !self.inbox.is_empty() {
            self.inbox.extend_from_slice(buffer.filled());
            return Poll::Ready(self.take_inbox());
        }
        let progress = hand_on(&self.session, &mut self.scanner, buffer.filled());
        self.inbox.extend_from_slice(&buffer.filled()[progress.taken..]);
        Poll::Ready(progress.flow)
    }

    fn take_inbox(&mut self) -> Flow {
        let progress = hand_on(&self.session, &mut self.scanner, &self.inbox);
        if progress.taken == self.inbox.len() {
            self.inbox.clear();
            if self.inbox.capacity() > MOST_HELD_BYTES {
                self.inbox = Vec::new();
            }
        } else {
            self.inbox.drain(..progress.taken);
        }
        progress.flow
    }
}

/// Hands on the whole commands at the front of `bytes`, as long as the session may go on.
fn hand_on(session: &Rc<Session>, scanner: &mut CommandScanner, bytes: &[u8]) -> Progress {
    let mut taken = 0;
    let flow = loop {
        if taken == bytes.len() {
            break Flow::Continue;
        }
        let rest = &bytes[taken..];
        if session.is_alert() && !may_hand_on(session, scanner, rest) {
            cache_aside::leaves(session);
            break Flow::Quiet;
        }
        let (length, flow) = match scanner.scan(rest) {
            Ok(CommandScan::Complete { length }) if scanner.ranges().is_empty() => (length, Flow::Continue),
            Ok(CommandScan::Complete { length }) => {
                (length, dispatch::command(session, &rest[..length], CommandArgs::new(rest, scanner.ranges())))
            }
            Ok(CommandScan::Inline { length }) => (length, inline(session, &rest[..length])),
            Ok(CommandScan::Incomplete) if rest.len() >= MOST_HELD_BYTES => break Flow::Exclusive(Exclusive::Stream),
            Ok(CommandScan::Incomplete) => break Flow::Continue,
            Err(error) => {
                refuse(session, &error);
                return Progress { taken: bytes.len(), flow: Flow::Wait };
            }
        };
        match flow {
            Flow::Continue => taken += length,
            Flow::Wait => {
                taken += length;
                break Flow::Wait;
            }
            Flow::Quiet => {
                cache_aside::leaves(session);
                break Flow::Quiet;
            }
            Flow::Again => break Flow::Again,
            Flow::Exclusive(wish) => break Flow::Exclusive(wish),
        }
        if !session.may_read() {
            break Flow::Wait;
        }
    };
    Progress { taken, flow }
}

/// Whether the command at the front of `bytes` may be handed on by a session that has something to see to before.
#[cold]
fn may_hand_on(session: &Rc<Session>, scanner: &mut CommandScanner, bytes: &[u8]) -> bool {
    if !session.is_lane_settled() {
        return false;
    }
    if !session.is_tracking() {
        return true;
    }
    match scanner.scan(bytes) {
        Ok(CommandScan::Complete { .. }) if !scanner.ranges().is_empty() => {
            tracking::before(session, &CommandArgs::new(bytes, scanner.ranges()))
        }
        Ok(CommandScan::Inline { length }) => {
            with_inline(&bytes[..length], |_, args| tracking::before(session, &args)).ok().flatten().unwrap_or(true)
        }
        _ => true,
    }
}

fn inline(session: &Rc<Session>, line: &[u8]) -> Flow {
    match with_inline(line, |raw, args| dispatch::command(session, raw, args)) {
        Ok(flow) => flow.unwrap_or(Flow::Continue),
        Err(error) => {
            refuse(session, &error);
            Flow::Wait
        }
    }
}

/// Has `run` see an inline command as an array of bulk strings. `None`: there is none on the line.
fn with_inline<T>(line: &[u8], run: impl FnOnce(&[u8], CommandArgs<'_>) -> T) -> Result<Option<T>, ProtocolError> {
    let words = split_inline(line)?;
    if words.is_empty() {
        return Ok(None);
    }
    let mut wire = Vec::new();
    encode::command(&mut wire, &words);
    let mut scanner = CommandScanner::default();
    match scanner.scan(&wire) {
        Ok(CommandScan::Complete { length }) => Ok(Some(run(&wire[..length], CommandArgs::new(&wire, scanner.ranges())))),
        _ => Ok(None),
    }
}

/// Answers a protocol error as Redis does, and closes.
fn refuse(session: &Rc<Session>, error: &ProtocolError) {
    session.answer_now(|out| error.write(out));
    session.end(Ending::Draining);
}
