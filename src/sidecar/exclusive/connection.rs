//! A connection that serves one client at a time: bytes to send, replies that are owed, in order.

use std::cell::Cell;
use std::collections::VecDeque;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::OwnedSemaphorePermit;

use super::Waits;
use super::elsewhere::{Elsewhere, instead_of};
use super::exec_filter::{ExecFilter, Fed, Queued};
use super::pool::is_quiet;
use crate::sidecar::meter::Meter;
use crate::sidecar::patterns::cache_aside;
use crate::sidecar::resp::{ReplyScanner, encode, reply};
use crate::sidecar::session::Session;
use crate::sidecar::upstream::access::Keys;
use crate::sidecar::upstream::broken::{Broken, SILENCE_MS};
use crate::sidecar::upstream::dial::Link;
use crate::sidecar::upstream::lane::Lane;
use crate::sidecar::upstream::node::NodeAddr;
use crate::sidecar::upstream::queue::ANY_SLOT;
use crate::sidecar::upstream::router::Node;
use crate::sidecar::worker::{SCRATCH_BYTES, Worker};
use crate::telemetry::metrics::NodeMeter;

/// A client with this much unread output is not read for.
const SLOW_CLIENT_BYTES: usize = 64 * 1024;
/// The start of a long reply is worth passing on from this size.
const WORTH_PASSING: usize = 16 * 1024;
/// The longest reply that is held whole, because it is looked at before it is passed on.
const MOST_REPLY_BYTES: usize = 64 * 1024 * 1024;
/// Reads in a row before other tasks get their turn.
const READS_PER_TURN: usize = 16;
/// How long a server that lost its slots may take to answer.
const DISPLACED_MS: u64 = 1_000;

/// What becomes of a reply.
#[derive(Debug)]
pub enum Owed {
    /// It is dropped. An error is kept: it explains a refused EXEC.
    Nobody,
    /// It is the client's.
    Client(u32),
    /// It is the client's, unless it is an error: see [`Dedicated::take_judged`].
    Judged(u32),
    /// It answers a command inside the client's transaction.
    Queued(u32),
    /// It is kept; see [`Dedicated::take_kept`].
    Kept,
    /// EXEC's, of which only some elements are the client's.
    Exec(u32, ExecFilter),
}

/// A connection that one client uses.
#[derive(Debug)]
pub struct Dedicated {
    worker: Rc<Worker>,
    node: Rc<Node>,
    counters: Arc<NodeMeter>,
    lane: Lane,
    link: Link,
    /// What the server calls it.
    number: i64,
    /// Whether it must serve nobody else.
    spoiled: Rc<Cell<bool>>,
    /// With which it was made.
    keys: Arc<Keys>,
    _permit: Option<OwnedSemaphorePermit>,
    out: Vec<u8>,
    /// Where in `out` the first byte lies that the socket has not taken.
    sent: usize,
    /// How many bytes were ever queued, and ever taken by the socket.
    queued_total: u64,
    sent_total: u64,
    owed: VecDeque<Owed>,
    scanner: ReplyScanner,
    /// The start of a reply whose end has not come, or what follows an element that is due.
    residue: Vec<u8>,
    /// How much of it has been taken.
    residue_taken: usize,
    /// Whether a part of the reply has been passed on.
    begun: bool,
    kept: Vec<Vec<u8>>,
    judged: Option<Vec<u8>>,
    /// What the client hears instead of a null.
    instead_of_null: Option<String>,
    /// Why a command of the client's transaction was not queued.
    elsewhere: Option<Elsewhere>,
    /// The element of EXEC's reply that waits for Larder's part in it. No more is read before.
    due: Option<Vec<u8>>,
    heard: u64,
    /// When the node was seen to have lost its slot.
    displaced: Option<u64>,
}

impl Dedicated {
    /// A connection that is as new, and the keys that it was made with.
    pub fn new(
        worker: &Rc<Worker>,
        node: Rc<Node>,
        lane: Lane,
        ((link, number), keys): ((Link, i64), Arc<Keys>),
        permit: Option<OwnedSemaphorePermit>,
    ) -> Self {
        Self {
            worker: worker.clone(),
            counters: worker.metrics().node(node.address()),
            node,
            lane,
            link,
            number,
            spoiled: Rc::default(),
            keys,
            _permit: permit,
            out: Vec::new(),
            sent: 0,
            queued_total: 0,
            sent_total: 0,
            owed: VecDeque::new(),
            scanner: ReplyScanner::default(),
            residue: Vec::new(),
            residue_taken: 0,
            begun: false,
            kept: Vec::new(),
            judged: None,
            instead_of_null: None,
            elsewhere: None,
            due: None,
            heard: worker.now(),
            displaced: None,
        }
    }

    /// Where it leads.
    pub fn address(&self) -> &NodeAddr {
        self.node.address()
    }

    /// What is to be known of it while a command blocks on it.
    pub fn waits(&self) -> Waits {
        Waits { node: self.node.address().clone(), number: self.number, spoiled: self.spoiled.clone() }
    }

    /// The lane it is for.
    pub fn lane(&self) -> Lane {
        self.lane
    }

    /// A command of the client's transaction has brought it into the client's new lane.
    pub fn adopt(&mut self, lane: Lane) {
        self.lane = lane.shared();
    }

    /// Whether EXEC's reply waits for Larder's part in it.
    pub fn is_due(&self) -> bool {
        self.due.is_some()
    }

    /// The element in whose place Larder answers; then comes [`Dedicated::resume`].
    pub fn take_due(&mut self) -> Option<Vec<u8>> {
        self.due.take()
    }

    /// Goes on with EXEC's reply, Larder's answer having left.
    pub fn resume(&mut self, session: &Rc<Session>) -> Result<(), Broken> {
        self.heard = self.worker.now();
        let place = session.take_place();
        session.deliver_part(place, &[]);
        let whole = match self.owed.front_mut() {
            Some(Owed::Exec(own, filter)) => {
                *own = place;
                filter.is_whole()
            }
            _ => false,
        };
        if whole {
            self.end_exec(session, place);
        }
        let residue = std::mem::take(&mut self.residue);
        self.residue_taken += self.consume(Some(session), &residue[self.residue_taken..])?;
        self.residue = residue;
        if !self.is_due() {
            self.drop_taken();
        }
        Ok(())
    }

    fn drop_taken(&mut self) {
        self.residue.drain(..std::mem::take(&mut self.residue_taken));
        if self.residue.is_empty() && self.residue.capacity() > SCRATCH_BYTES {
            self.residue = Vec::new();
        }
    }

    fn end_exec(&mut self, session: &Rc<Session>, place: u32) {
        session.deliver(place, &[]);
        session.end_join();
        self.owed.pop_front();
    }

    /// Appends a command, or a piece of one.
    pub fn queue(&mut self, bytes: &[u8]) {
        if self.is_settled() {
            self.heard = self.worker.now();
        }
        self.out.extend_from_slice(bytes);
        self.queued_total += bytes.len() as u64;
    }

    /// Tells what becomes of the next reply that is not spoken for. What is owed to somebody counts as a request.
    pub fn owe(&mut self, owed: Owed) {
        if !matches!(owed, Owed::Nobody) {
            self.counters.counters.requests.inc();
        }
        if self.owed.is_empty() {
            self.heard = self.worker.now();
        }
        self.owed.push_back(owed);
    }

    /// How many bytes the socket has not taken.
    pub fn unsent(&self) -> usize {
        self.out.len() - self.sent
    }

    /// A mark for [`Dedicated::has_left`], before the next byte.
    pub fn mark(&self) -> u64 {
        self.queued_total
    }

    /// Whether a byte behind `mark` was handed to the socket.
    pub fn has_left(&self, mark: u64) -> bool {
        self.sent_total > mark
    }

    /// Whether all is sent and all is answered.
    pub fn is_settled(&self) -> bool {
        self.owed.is_empty() && self.unsent() == 0
    }

    /// How many replies are owed.
    pub fn owes(&self) -> usize {
        self.owed.len()
    }

    /// The replies that were kept, and errors.
    pub fn take_kept(&mut self) -> Vec<Vec<u8>> {
        std::mem::take(&mut self.kept)
    }

    /// The error that answered [`Owed::Judged`].
    pub fn take_judged(&mut self) -> Option<Vec<u8>> {
        self.judged.take()
    }

    /// A null that answers the client becomes this error.
    pub fn refuse_null(&mut self, text: String) {
        self.instead_of_null = Some(text);
    }

    /// What was owed when the connection was lost.
    pub fn into_owed(self) -> VecDeque<Owed> {
        self.owed
    }

    /// Gives the connection back. Nothing of the client may be left on it. With another login than is in use now it is closed.
    pub fn give_back(self) {
        let is_current = Arc::ptr_eq(&self.keys, &self.worker.access().current());
        if is_current
            && !self.spoiled.get()
            && self.is_settled()
            && self.residue.is_empty()
            && self.worker.router().serves(&self.node)
        {
            self.node.pool().put((self.link, self.number), self.lane, self.keys, self.worker.now());
        }
    }

    /// Whether the server has said nothing, not even that it closed the connection, since the last reply.
    pub async fn is_alive(&mut self) -> bool {
        is_quiet(&mut self.link).await
    }

    /// Writes and reads as far as possible, and delivers what is whole to `session`. `true`: it stopped because the client is
    /// slow, and must be called again when the client has read.
    pub fn poll(&mut self, session: Option<&Rc<Session>>, cx: &mut Context<'_>) -> Result<bool, Broken> {
        self.write(cx)?;
        for _ in 0..READS_PER_TURN {
            if self.is_due() {
                return Ok(false);
            }
            if session.is_some_and(|session| session.output_bytes() > SLOW_CLIENT_BYTES) {
                self.heard = self.worker.now();
                return Ok(true);
            }
            let scratch = self.worker.scratch();
            let mut scratch = scratch.borrow_mut();
            let mut buffer = ReadBuf::new(&mut scratch[..SCRATCH_BYTES]);
            match Pin::new(&mut self.link).poll_read(cx, &mut buffer) {
                Poll::Pending => return Ok(false),
                Poll::Ready(result) => result?,
            }
            if buffer.filled().is_empty() {
                return Err(Broken::Closed);
            }
            self.heard = self.worker.now();
            self.take(session, buffer.filled())?;
            if let Some(session) = session {
                session.flush();
            }
        }
        // More may be waiting; others first.
        cx.waker().wake_by_ref();
        Ok(false)
    }

    fn write(&mut self, cx: &mut Context<'_>) -> Result<(), Broken> {
        while self.unsent() > 0 {
            match Pin::new(&mut self.link).poll_write(cx, &self.out[self.sent..]) {
                Poll::Ready(Ok(0)) => return Err(Broken::Closed),
                Poll::Ready(Ok(count)) => {
                    self.sent += count;
                    self.sent_total += count as u64;
                    self.heard = self.worker.now();
                }
                Poll::Ready(Err(error)) => return Err(error.into()),
                Poll::Pending => break,
            }
        }
        if self.unsent() == 0 {
            self.out.clear();
            self.sent = 0;
        } else if self.sent > SCRATCH_BYTES {
            self.out.drain(..self.sent);
            self.sent = 0;
        }
        match Pin::new(&mut self.link).poll_flush(cx) {
            Poll::Ready(Err(error)) => Err(error.into()),
            _ => Ok(()),
        }
    }

    /// Whether the server must be given up: it is silent (where it `answers_soon`), or `slot` has had another server for a while.
    pub fn overdue(&mut self, slot: u16, answers_soon: bool) -> Option<Broken> {
        let (now, displaced) = (self.worker.now(), self.is_displaced(slot));
        match self.displaced {
            Some(since) if displaced && now.saturating_sub(since) > DISPLACED_MS => return Some(Broken::Displaced),
            Some(_) if displaced => {}
            _ => self.displaced = displaced.then_some(now),
        }
        let silent = answers_soon && !self.is_settled() && now.saturating_sub(self.heard) > SILENCE_MS;
        silent.then_some(Broken::Silent)
    }

    /// Whether `slot` has another server.
    pub fn is_displaced(&self, slot: u16) -> bool {
        let router = self.worker.router();
        match slot {
            ANY_SLOT => router.is_usable() && !router.serves(&self.node),
            slot => router.node_of(slot).is_some_and(|node| !Rc::ptr_eq(&node, &self.node)),
        }
    }

    fn take(&mut self, session: Option<&Rc<Session>>, chunk: &[u8]) -> Result<(), Broken> {
        if self.residue.is_empty() {
            let taken = self.consume(session, chunk)?;
            self.residue.extend_from_slice(&chunk[taken..]);
        } else {
            let mut residue = std::mem::take(&mut self.residue);
            residue.extend_from_slice(chunk);
            self.residue_taken = self.consume(session, &residue)?;
            self.residue = residue;
            self.drop_taken();
        }
        if self.residue.len() > MOST_REPLY_BYTES { Err(Broken::TooLong(MOST_REPLY_BYTES)) } else { Ok(()) }
    }

    fn consume(&mut self, session: Option<&Rc<Session>>, bytes: &[u8]) -> Result<usize, Broken> {
        let mut at = 0;
        while at < bytes.len() {
            let rest = &bytes[at..];
            if let (Some(Owed::Exec(place, filter)), Some(session)) = (self.owed.front_mut(), session)
                && filter.takes(rest)
            {
                let (place, meter) = (*place, self.worker.metrics());
                let mut judge = |command: &Queued, element: &[u8]| {
                    count(meter, command, element);
                    if let Some(key) = command.leased.as_deref().filter(|_| reply::is_null(element)) {
                        cache_aside::on_nil_told(session, place, key);
                    }
                };
                let (taken, fed) = filter.feed(rest, &mut judge, &mut |part| {
                    session.deliver_part(place, part);
                })?;
                at += taken;
                match fed {
                    Fed::More => break,
                    Fed::Whole => self.end_exec(session, place),
                    Fed::Held(element) => {
                        session.join();
                        session.deliver(place, &[]);
                        self.due = Some(element);
                        break;
                    }
                }
                continue;
            }
            match self.scanner.scan(rest)? {
                Some(length) => {
                    at += length;
                    self.settle(session, &rest[..length])?;
                }
                None => {
                    let free = self.scanner.releasable(rest.len());
                    if self.pass_part(session, &rest[..free]) {
                        self.scanner.release(free);
                        at += free;
                    }
                    break;
                }
            }
        }
        Ok(at)
    }

    /// Passes on the start of a long reply.
    fn pass_part(&mut self, session: Option<&Rc<Session>>, part: &[u8]) -> bool {
        let place = match self.owed.front() {
            Some(Owed::Client(place) | Owed::Judged(place)) => place,
            Some(Owed::Exec(place, filter)) if filter.is_as_it_is() => place,
            _ => return false,
        };
        let Some(session) = session else { return false };
        let worth = self.begun || (part.len() >= WORTH_PASSING && !matches!(part[0], b'>' | b'-'));
        let passed = worth && session.deliver_part(*place, part);
        self.begun |= passed;
        passed
    }

    /// A whole reply, or the rest of one.
    fn settle(&mut self, session: Option<&Rc<Session>>, reply: &[u8]) -> Result<(), Broken> {
        let begun = std::mem::take(&mut self.begun);
        if !begun && reply[0] == b'>' {
            return Ok(());
        }
        let failed = !begun && reply[0] == b'-';
        let owed = self.owed.pop_front().ok_or(Broken::Unsolicited)?;
        if failed && !matches!(owed, Owed::Nobody) {
            self.counters.counters.errors.inc();
        }
        match (owed, session) {
            (Owed::Kept, _) => self.kept.push(reply.to_vec()),
            (Owed::Judged(_), _) if failed => self.judged = Some(reply.to_vec()),
            (Owed::Nobody, _) if failed => self.kept.push(reply.to_vec()),
            (Owed::Exec(place, filter), Some(session)) if filter.is_as_it_is() && !failed => session.deliver(place, reply),
            (Owed::Exec(place, filter), Some(session)) => self.settle_exec(session, place, &filter, reply),
            (Owed::Queued(place), Some(session)) => {
                let elsewhere = Elsewhere::of(reply);
                self.elsewhere = self.elsewhere.or(elsewhere);
                self.tell(session, place, reply, elsewhere.map(Elsewhere::of_queued));
            }
            (Owed::Client(place) | Owed::Judged(place), Some(session)) => {
                let text = match begun {
                    false if failed => instead_of(reply),
                    false if reply::is_null(reply) => self.instead_of_null.take(),
                    _ => None,
                };
                self.tell(session, place, reply, text);
            }
            (Owed::Nobody, _) | (_, None) => {}
        }
        Ok(())
    }

    /// An EXEC that carried nothing out. Of ours, what was refused before is the client's answer.
    fn settle_exec(&mut self, session: &Rc<Session>, place: u32, filter: &ExecFilter, reply: &[u8]) {
        let (kept, queued) = (std::mem::take(&mut self.kept), self.elsewhere.take());
        if filter.is_ours() {
            let reply = kept.first().map_or(reply, Vec::as_slice);
            return self.tell(session, place, reply, instead_of(reply));
        }
        let elsewhere = queued.or_else(|| Elsewhere::of(reply)).filter(|_| reply.first() == Some(&b'-'));
        self.tell(session, place, reply, elsewhere.map(Elsewhere::of_exec));
    }

    /// Gives the client a reply, or the error that stands for it.
    fn tell(&self, session: &Rc<Session>, place: u32, reply: &[u8], instead: Option<String>) {
        self.note_redirect(reply);
        match instead {
            Some(text) => session.answer(place, |out| encode::error(out, &text)),
            None => session.deliver(place, reply),
        }
    }

    fn note_redirect(&self, reply: &[u8]) {
        if reply.starts_with(b"-MOVED") || reply.starts_with(b"-READONLY") || reply.starts_with(b"-CLUSTERDOWN") {
            self.worker.refresh_topology();
        }
    }
}

/// Counts for the rules of a command's keys, given the reply to it. An error is neither a hit nor a miss.
fn count(meter: &Meter, command: &Queued, reply: &[u8]) {
    if reply.first() == Some(&b'-') {
        return;
    }
    if let Some(rule) = command.reads {
        meter.count_read(rule, reply::is_null(reply));
    }
    if let Some(rule) = command.given_ttl {
        meter.ttl_added(rule);
    }
}
