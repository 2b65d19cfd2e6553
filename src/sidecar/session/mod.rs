//! One client: what it has sent, what it is owed, and in which order.
//!
//! Each command takes the next place in the session's order. Answers come in any order and leave in that one: an answer whose
//! turn it is goes straight to the output; one that is early is stashed.

pub mod reader;
mod stream;

use std::cell::{Cell, Ref, RefCell};
use std::collections::VecDeque;
use std::net::SocketAddr;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};

pub use reader::Reader;
pub use stream::{ClientReader, ClientWriter, split_tcp, split_unix};

use super::exclusive::{Held, Waits};
use super::resp::Protocol;
use super::tracking::Tracks;
use super::upstream::bulk::{LARGE_REPLY_BYTES, Sizing};
use super::upstream::lane::Lane;
use super::upstream::mux::{Mux, remember_waker};
use super::worker::Worker;

/// A client may have this many commands without an answer before more are read.
const MOST_OUTSTANDING: u32 = 4096;
/// A client with this much unread output is not read from.
const OUTPUT_PAUSE_BYTES: usize = 256 * 1024;
/// A client with this much unread output, or answers that came early, is closed.
const OUTPUT_LIMIT_BYTES: usize = 64 * 1024 * 1024;
/// Output buffers above this size are given back when they are empty.
const KEEP_OUTPUT_BYTES: usize = 4 * 1024;

/// How far a session has come to its end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ending {
    /// It goes on.
    No,
    /// Nothing more is read; it ends when all is answered and written.
    Draining,
    /// It ends now.
    Now,
}

/// One client's state. Shared, within its worker, by the client's task and the connections that owe it answers.
#[derive(Debug)]
pub struct Session {
    worker: Rc<Worker>,
    id: u64,
    /// When it came, on the worker's clock.
    since: u64,
    writer: RefCell<ClientWriter>,
    output: RefCell<Output>,
    /// The place that the next command gets.
    next: Cell<u32>,
    /// The place whose answer leaves next.
    head: Cell<u32>,
    /// The place of the last command that may change data.
    last_change: Cell<u32>,
    /// How many of its reads wait for a lease's end.
    parked: Cell<u32>,
    /// Whether its next command waits until all are answered.
    leaving: Cell<bool>,
    /// Whether the desk may know something of it.
    is_known_to_desk: Cell<bool>,
    /// Whether several commands were seen under way at once, one of them a read of a missing key.
    is_shared: Cell<bool>,
    /// Answers that came early; the first belongs to `head`.
    stash: RefCell<VecDeque<Option<Vec<u8>>>>,
    stash_bytes: Cell<usize>,
    /// The place whose answer has begun to leave and is not whole.
    streaming: Cell<Option<u32>>,
    waker: RefCell<Option<Waker>>,
    /// Set while the session is in the worker's list of those to flush.
    dirty: Cell<bool>,
    /// Set while the client's task waits for answers or room before it reads on.
    starved: Cell<bool>,
    /// How many commands wait to be repeated, so that none overtakes them.
    holding: Cell<u32>,
    /// Set when a connection waited for this client to read, in vain.
    hopeless: Cell<bool>,
    /// Whether the client has closed its side.
    left: Cell<bool>,
    ending: Cell<Ending>,
    lane: Cell<Lane>,
    /// Set while something must be looked at before its next command is handed on.
    alert: Cell<bool>,
    /// Set until the next reply, which the client does not want.
    skipping: Cell<bool>,
    /// Set while several answers make up one reply.
    joining: Cell<bool>,
    /// Which replies it has got lately; decides about its lane.
    sizing: Cell<Sizing>,
    /// How much of the reply that is leaving in parts has been passed on.
    passed: Cell<usize>,
    /// A connection that waits for this client to read.
    slowed: RefCell<Option<Rc<Mux>>>,
    /// Pushes that wait for the end of a reply that is leaving in parts.
    pushes: RefCell<Vec<u8>>,
    /// What it holds of its own at the servers.
    held: RefCell<Held>,
    /// Whether what its next command needs to know was just asked for.
    asked: Cell<bool>,
    /// Where a command of it blocks.
    waits: RefCell<Vec<Waits>>,
    /// Set while it tracks what it has read.
    tracks: RefCell<Option<Box<Tracks>>>,
    /// What the client told of itself.
    pub about: RefCell<About>,
}

/// What a client told of itself, kept here and never forwarded.
#[derive(Debug, Default)]
pub struct About {
    /// `CLIENT SETNAME`.
    pub name: Vec<u8>,
    /// `CLIENT SETINFO LIB-NAME`.
    pub library: Vec<u8>,
    /// `CLIENT SETINFO LIB-VER`.
    pub library_version: Vec<u8>,
}

#[derive(Debug, Default)]
struct Output {
    bytes: Vec<u8>,
    /// Where the first byte lies that the socket has not taken.
    written: usize,
}

impl Session {
    /// A session of `worker` that writes to `writer`.
    pub fn new(worker: Rc<Worker>, id: u64, writer: ClientWriter) -> Rc<Self> {
        Rc::new(Self {
            since: worker.now(),
            worker,
            id,
            writer: RefCell::new(writer),
            output: RefCell::default(),
            next: Cell::new(0),
            head: Cell::new(0),
            last_change: Cell::new(u32::MAX),
            parked: Cell::new(0),
            leaving: Cell::new(false),
            is_known_to_desk: Cell::new(false),
            is_shared: Cell::new(false),
            stash: RefCell::default(),
            stash_bytes: Cell::new(0),
            streaming: Cell::new(None),
            waker: RefCell::default(),
            dirty: Cell::new(false),
            starved: Cell::new(false),
            holding: Cell::new(0),
            hopeless: Cell::new(false),
            left: Cell::new(false),
            ending: Cell::new(Ending::No),
            lane: Cell::default(),
            alert: Cell::new(false),
            skipping: Cell::new(false),
            joining: Cell::new(false),
            sizing: Cell::default(),
            passed: Cell::new(0),
            slowed: RefCell::default(),
            pushes: RefCell::default(),
            held: RefCell::default(),
            asked: Cell::new(false),
            waits: RefCell::default(),
            tracks: RefCell::default(),
            about: RefCell::default(),
        })
    }

    /// Unique in the process.
    pub fn id(&self) -> u64 {
        self.id
    }

    /// The address that the client connected to. `None` on a Unix socket.
    pub fn local_addr(&self) -> Option<SocketAddr> {
        self.writer.borrow().local_addr()
    }

    /// The address that the client came from. `None` on a Unix socket.
    pub fn peer_addr(&self) -> Option<SocketAddr> {
        self.writer.borrow().peer_addr()
    }

    /// How long the client has been connected, in seconds.
    pub fn age_seconds(&self) -> u64 {
        self.worker.now().saturating_sub(self.since) / 1000
    }

    /// Whose client it is.
    pub fn worker(&self) -> &Rc<Worker> {
        &self.worker
    }

    /// The protocol that the client speaks now.
    #[inline]
    pub fn protocol(&self) -> Protocol {
        self.lane.get().protocol
    }

    /// The connections that the client's commands take.
    #[inline]
    pub fn lane(&self) -> Lane {
        self.lane.get()
    }

    /// Changes protocol or database for the commands that follow.
    pub fn set_lane(&self, lane: Lane) {
        self.lane.set(lane);
    }

    /// Whether something must be looked at before its next command is handed on: see [`Session::is_lane_settled`], and
    /// [`tracking::before`](super::tracking::before).
    #[inline]
    pub fn is_alert(&self) -> bool {
        self.alert.get()
    }

    /// Whether the next command may be handed on, on the lane that the size of the last replies calls for. `false`: commands are
    /// still on the old lane, where they could be overtaken.
    pub fn is_lane_settled(&self) -> bool {
        let settled = self.sizing.get() == Sizing::Small || self.settle_lane();
        self.alert.set(self.sizing.get() != Sizing::Small || self.is_tracking());
        settled
    }

    fn settle_lane(&self) -> bool {
        let (lanes, lane) = (self.worker.bulk_lanes(), self.lane.get());
        let (sizing, bulk) = match self.sizing.get() {
            Sizing::Large { patience } if patience > 0 => {
                self.sizing.set(Sizing::Large { patience: patience - 1 });
                return true;
            }
            _ if self.outstanding() > 0 => return false,
            Sizing::Grown => (Sizing::on_large_lane(), lanes.enter()),
            Sizing::Large { .. } | Sizing::Small => (Sizing::Small, 0),
        };
        lanes.leave(lane.bulk());
        self.sizing.set(sizing);
        self.lane.set(lane.with_bulk(bulk));
        true
    }

    /// A large reply has come for this client on a shared connection.
    pub fn note_large_reply(&self) {
        self.sizing.set(self.sizing.get().after_large());
        self.alert.set(true);
    }

    /// A part of a reply was passed on from a shared connection.
    pub fn note_passed(&self, count: usize) {
        let passed = self.passed.get() + count;
        self.passed.set(passed);
        if passed >= LARGE_REPLY_BYTES {
            self.note_large_reply();
        }
    }

    /// Takes the next place in the order.
    #[inline]
    pub fn take_place(&self) -> u32 {
        let place = self.next.get();
        self.next.set(place.wrapping_add(1));
        place
    }

    /// How many commands have no answer yet.
    #[inline]
    pub fn outstanding(&self) -> u32 {
        self.next.get().wrapping_sub(self.head.get())
    }

    /// The place that the next command gets.
    pub fn next_place(&self) -> u32 {
        self.next.get()
    }

    /// The place of the last command that was handed on.
    pub fn last_place(&self) -> u32 {
        self.next.get().wrapping_sub(1)
    }

    /// Whether the command at `place` was handed on, and its reply has not left.
    pub fn is_unanswered(&self, place: u32) -> bool {
        place.wrapping_sub(self.head.get()) < self.outstanding()
    }

    /// How many commands have come after the one at `place`.
    pub fn count_after(&self, place: u32) -> u32 {
        self.next.get().wrapping_sub(place).wrapping_sub(1)
    }

    /// The next command may change data.
    #[inline]
    pub fn note_change(&self) {
        self.last_change.set(self.next.get());
    }

    /// Whether a command that may change data has come after the one at `place`, whose answer must then not show what came later.
    pub fn has_changed_after(&self, place: u32) -> bool {
        let next = self.next.get();
        next.wrapping_sub(self.last_change.get()) < next.wrapping_sub(place)
    }

    /// Whether reads wait for a lease's end.
    #[inline]
    pub fn has_parked(&self) -> bool {
        self.parked.get() > 0
    }

    /// Whether its next command waits until all are answered: then no read may wait for anything else.
    pub fn is_leaving(&self) -> bool {
        self.leaving.get()
    }

    /// Its next command waits until all are answered, or is handed on.
    #[inline]
    pub fn set_leaving(&self, leaving: bool) {
        self.leaving.set(leaving);
    }

    /// One more read waits for a lease's end.
    pub fn park(&self) {
        self.parked.set(self.parked.get() + 1);
        self.is_known_to_desk.set(true);
    }

    /// Whether it is known to carry several commands at once, as of now or earlier: then it is no single actor's.
    pub fn is_shared(&self) -> bool {
        if self.outstanding() > 1 {
            self.is_shared.set(true);
        }
        self.is_shared.get()
    }

    /// It carries several commands at once.
    pub fn note_shared(&self) {
        self.is_shared.set(true);
    }

    /// One read less does.
    pub fn unpark(&self) {
        self.parked.set(self.parked.get().saturating_sub(1));
    }

    /// Whether the desk may know something of it: then it is to be told of the session's end.
    pub fn is_known_to_desk(&self) -> bool {
        self.is_known_to_desk.get()
    }

    /// The desk knows something of it.
    pub fn make_known_to_desk(&self) {
        self.is_known_to_desk.set(true);
    }

    /// Delivers a whole reply, or the rest of one that was begun.
    #[inline]
    pub fn deliver(self: &Rc<Self>, place: u32, bytes: &[u8]) {
        if place == self.head.get() {
            self.output.borrow_mut().bytes.extend_from_slice(bytes);
            self.advance();
        } else {
            self.stash(place, bytes.to_vec());
        }
    }

    /// Delivers a reply that `write` writes.
    pub fn answer(self: &Rc<Self>, place: u32, write: impl FnOnce(&mut Vec<u8>)) {
        if self.is_streaming(place) {
            // Half a reply has left: there is no honest end to it.
            return self.end(Ending::Now);
        }
        if place == self.head.get() {
            write(&mut self.output.borrow_mut().bytes);
            self.advance();
        } else {
            let mut bytes = Vec::new();
            write(&mut bytes);
            self.stash(place, bytes);
        }
    }

    /// Answers the next command on the spot.
    pub fn answer_now(self: &Rc<Self>, write: impl FnOnce(&mut Vec<u8>)) {
        let place = self.take_place();
        self.answer(place, write);
    }

    /// Delivers the start of a long reply. `false` where its turn has not come.
    pub fn deliver_part(self: &Rc<Self>, place: u32, part: &[u8]) -> bool {
        if place != self.head.get() {
            return false;
        }
        self.streaming.set(Some(place));
        self.output.borrow_mut().bytes.extend_from_slice(part);
        self.touch();
        true
    }

    /// Whether the reply at `place` has begun to leave.
    pub fn is_streaming(&self, place: u32) -> bool {
        self.streaming.get() == Some(place) && !self.skipping.get()
    }

    /// The answers from here on are parts of one reply, each at a place of its own: no push comes between them.
    pub fn join(&self) {
        self.joining.set(true);
    }

    /// The reply of several answers is whole.
    pub fn end_join(&self) {
        if self.joining.take() {
            self.append_push(&self.pushes.take());
        }
    }

    /// Drops the replies to later commands, all earlier ones being answered: `CLIENT REPLY OFF`.
    pub fn mute(&self) {
        self.skipping.set(false);
        self.streaming.set(None);
        self.writer.borrow_mut().mute(self.output_bytes());
    }

    /// Drops the reply to the next command alone, all earlier ones being answered: `CLIENT REPLY SKIP`.
    pub fn skip_next(&self) {
        if !self.writer.borrow().is_muted() {
            self.mute();
            self.skipping.set(true);
            // As if that reply had begun to leave: so its end is noticed where the end of a long one is.
            self.streaming.set(Some(self.next.get()));
        }
    }

    /// Delivers replies again.
    pub fn unmute(&self) {
        if self.skipping.take() {
            self.streaming.set(None);
        }
        self.writer.borrow_mut().unmute(self.output_bytes());
    }

    /// Whether replies are dropped, or the next one is.
    pub fn is_muted(&self) -> bool {
        self.writer.borrow().is_muted()
    }

    /// Whether only the next reply is dropped.
    pub fn is_skipping(&self) -> bool {
        self.skipping.get()
    }

    /// Appends a frame that belongs to no command's answer: a push of a subscription. It never lands within a reply.
    pub fn deliver_push(self: &Rc<Self>, bytes: &[u8]) {
        if self.joining.get() || (self.streaming.get().is_some() && !self.skipping.get()) {
            self.pushes.borrow_mut().extend_from_slice(bytes);
        } else {
            self.append_push(bytes);
        }
        self.touch();
    }

    fn append_push(&self, bytes: &[u8]) {
        if !bytes.is_empty() {
            self.writer.borrow().note_push(self.output_bytes(), bytes.len());
            self.output.borrow_mut().bytes.extend_from_slice(bytes);
        }
    }

    #[inline]
    fn advance(self: &Rc<Self>) {
        self.head.set(self.head.get().wrapping_add(1));
        if self.streaming.get().is_some() {
            self.end_streaming();
        }
        if !self.stash.borrow().is_empty() {
            self.unstash();
        }
        self.touch();
    }

    fn end_streaming(&self) {
        self.streaming.set(None);
        self.passed.set(0);
        if self.skipping.take() {
            self.unmute();
        }
        if !self.joining.get() {
            self.append_push(&self.pushes.take());
        }
    }

    fn stash(self: &Rc<Self>, place: u32, bytes: Vec<u8>) {
        let mut stash = self.stash.borrow_mut();
        let index = place.wrapping_sub(self.head.get()) as usize;
        if stash.len() <= index {
            stash.resize_with(index + 1, || None);
        }
        self.stash_bytes.set(self.stash_bytes.get() + bytes.len());
        stash[index] = Some(bytes);
        drop(stash);
        self.touch();
    }

    /// The head has moved by one: so does the stash, and further where the next answers are there.
    fn unstash(&self) {
        let mut stash = self.stash.borrow_mut();
        stash.pop_front();
        while let Some(Some(_)) = stash.front() {
            if let Some(Some(bytes)) = stash.pop_front() {
                self.stash_bytes.set(self.stash_bytes.get() - bytes.len());
                self.output.borrow_mut().bytes.extend_from_slice(&bytes);
                self.head.set(self.head.get().wrapping_add(1));
            }
        }
    }

    #[inline]
    fn touch(self: &Rc<Self>) {
        if self.is_closed() {
            return self.forget_answers();
        }
        if !self.dirty.replace(true) {
            self.worker.mark_dirty(self.clone());
        }
        if self.output_bytes() + self.stash_bytes.get() + self.pushes.borrow().len() > OUTPUT_LIMIT_BYTES {
            self.end(Ending::Now);
        }
    }

    /// Nobody will read what is still to come.
    #[cold]
    fn forget_answers(&self) {
        *self.output.borrow_mut() = Output::default();
        self.pushes.take();
        self.stash.borrow_mut().iter_mut().flatten().for_each(|bytes| *bytes = Vec::new());
        self.stash_bytes.set(0);
    }

    /// How many bytes the client has not taken.
    #[inline]
    pub fn output_bytes(&self) -> usize {
        let output = self.output.borrow();
        output.bytes.len() - output.written
    }

    /// Writes what there is without waiting. What the socket does not take, the client's task writes when it can.
    #[inline]
    pub fn flush(&self) {
        self.dirty.set(false);
        let mut output = self.output.borrow_mut();
        let mut full = false;
        while output.written < output.bytes.len() && self.ending.get() != Ending::Now {
            match self.writer.borrow().try_write(&output.bytes[output.written..]) {
                Ok(count) => output.written += count,
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {
                    full = true;
                    break;
                }
                Err(_) => {
                    self.ending.set(Ending::Now);
                    full = true;
                }
            }
        }
        output.reclaim();
        drop(output);
        if full || self.starved.get() || self.ending.get() != Ending::No {
            self.wake();
        }
    }

    /// Writes what the socket did not take before, from the client's task.
    pub fn poll_flush(&self, cx: &mut Context<'_>) {
        let mut output = self.output.borrow_mut();
        while output.written < output.bytes.len() {
            let polled = self.writer.borrow_mut().poll_write(cx, &output.bytes[output.written..]);
            match polled {
                Poll::Ready(Ok(count)) if count > 0 => output.written += count,
                Poll::Ready(_) => return self.ending.set(Ending::Now),
                Poll::Pending => break,
            }
        }
        output.reclaim();
        let drained = output.bytes.len() - output.written < OUTPUT_PAUSE_BYTES;
        drop(output);
        if drained {
            self.hopeless.set(false);
            if let Some(mux) = self.slowed.take() {
                mux.resume();
            }
        }
    }

    /// Whether more commands may be read. Where not, the task is woken when it may.
    #[inline]
    pub fn may_read(&self) -> bool {
        let may = self.outstanding() < MOST_OUTSTANDING && self.has_room() && self.holding.get() == 0;
        self.starved.set(!may);
        may
    }

    /// Whether the client has taken enough of its answers to be read from.
    #[inline]
    pub fn has_room(&self) -> bool {
        self.output_bytes() < OUTPUT_PAUSE_BYTES
    }

    /// Wakes the client's task when the next answer leaves.
    pub fn watch_answers(&self) {
        self.starved.set(true);
    }

    /// Lets no further command be read until [`Session::release`].
    pub fn hold(&self) {
        self.holding.set(self.holding.get() + 1);
    }

    /// Ends [`Session::hold`].
    pub fn release(&self) {
        self.holding.set(self.holding.get().saturating_sub(1));
        if self.holding.get() == 0 {
            self.wake();
        }
    }

    /// What its next command needs to know was asked for.
    pub fn note_asked(&self) {
        self.asked.set(true);
    }

    /// Whether it was, since the last command that needed anything.
    pub fn take_asked(&self) -> bool {
        self.asked.take()
    }

    /// Whether something keeps further commands from being read.
    pub fn is_held(&self) -> bool {
        self.holding.get() > 0
    }

    /// The client has closed its side: it sends nothing more, and hardly reads.
    pub fn note_left(&self) {
        self.left.set(true);
    }

    /// Whether it has.
    #[inline]
    pub fn has_left(&self) -> bool {
        self.left.get()
    }

    /// A connection has waited in vain for this client to read.
    pub fn lose_patience(&self) {
        self.hopeless.set(true);
    }

    /// Whether no connection should wait for this client, before it has read.
    pub fn is_hopeless(&self) -> bool {
        self.hopeless.get()
    }

    /// Resumes `mux` when the client has read.
    pub fn wake_when_drained(&self, mux: Rc<Mux>) {
        *self.slowed.borrow_mut() = Some(mux);
        self.wake();
    }

    /// Has the client's task look at its state.
    #[inline]
    pub fn wake(&self) {
        if let Some(waker) = &*self.waker.borrow() {
            waker.wake_by_ref();
        }
    }

    /// Remembers whom to wake.
    #[inline]
    pub fn remember_waker(&self, cx: &Context<'_>) {
        remember_waker(&self.waker, cx);
    }

    /// What the client holds of its own at the servers: watched keys, subscriptions.
    pub fn held(&self) -> &RefCell<Held> {
        &self.held
    }

    /// What it has asked to be told of.
    pub fn tracks(&self) -> &RefCell<Option<Box<Tracks>>> {
        &self.tracks
    }

    /// It asks to be told of changes, or no more.
    pub fn set_tracks(&self, tracks: Option<Box<Tracks>>) {
        self.tracks.replace(tracks);
        self.alert.set(true);
    }

    /// Whether it is told of changes of what it has read.
    pub fn is_tracking(&self) -> bool {
        self.tracks.borrow().is_some()
    }

    /// Where a command of it blocks, if one does.
    pub fn waits(&self) -> Ref<'_, [Waits]> {
        Ref::map(self.waits.borrow(), Vec::as_slice)
    }

    /// A command of it blocks at a server.
    pub fn begin_wait(&self, wait: Waits) {
        self.waits.borrow_mut().push(wait);
    }

    /// None does any more.
    pub fn end_waits(&self) {
        self.waits.borrow_mut().clear();
    }

    /// Lets go of watched keys and subscriptions, as RESET does and the end of the session.
    pub fn let_go(&self) {
        drop(self.held.take());
        drop(self.slowed.take());
    }

    /// Leaves its lane for large replies, at the session's end.
    pub fn leave_lane(&self) {
        self.worker.bulk_lanes().leave(self.lane.replace(Lane::default()).bulk());
    }

    /// Brings the session nearer to its end.
    pub fn end(&self, ending: Ending) {
        if self.ending.get() != Ending::Now {
            self.ending.set(ending);
            self.wake();
        }
    }

    /// How far it is from its end.
    #[inline]
    pub fn ending(&self) -> Ending {
        self.ending.get()
    }

    /// Whether answers are of no more use.
    pub fn is_closed(&self) -> bool {
        self.ending.get() == Ending::Now
    }
}

impl Output {
    #[inline]
    fn reclaim(&mut self) {
        if self.written == self.bytes.len() {
            self.bytes.clear();
            self.written = 0;
            if self.bytes.capacity() > KEEP_OUTPUT_BYTES {
                self.bytes = Vec::new();
            }
        } else if self.written > OUTPUT_PAUSE_BYTES {
            self.bytes.drain(..self.written);
            self.written = 0;
        }
    }
}
