//! One pipelined connection to one server, shared by all clients of a worker.
//!
//! Clients append their commands' bytes and wake the connection's task once. The task runs after the clients that were ready
//! in the same turn, so that one write carries what all of them appended, and one read brings the answers of many.

use std::cell::{Cell, RefCell};
use std::future::poll_fn;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::access::Keys;
use super::broken::{Broken, LOST, SILENCE_MS};
use super::bulk::LARGE_REPLY_BYTES;
use super::dial::{DialError, Link};
use super::lane::Lane;
use super::node::NodeAddr;
use super::open::open;
use super::queue::{ANY_SLOT, Pending, Queue, Recovered, Retry};
use super::sink::{Answer, OnReply, Sink};
use crate::sidecar::engine::ttl::MULTI;
use crate::sidecar::meter::{SLOW_MS, Sampler};
use crate::sidecar::resp::{ReplyScanner, reply};
use crate::sidecar::session::Session;
use crate::sidecar::worker::{SCRATCH_BYTES, Worker};
use crate::telemetry::metrics::NodeMeter;

/// Commands that wait for one connection may take this much memory before clients are made to wait.
const FULL_BYTES: usize = 4 * 1024 * 1024;
/// A reply that is not passed on as it comes, since it is put together with others or looked at, may have this size.
const MOST_COLLECTED_BYTES: usize = 64 * 1024 * 1024;
/// A client with this much unread output slows the connection that feeds it.
const SLOW_CLIENT_BYTES: usize = 1024 * 1024;
/// How long a slow client may hold up a shared connection at a time.
const SLOW_CLIENT_PATIENCE_MS: u64 = 100;
/// A server that owes answers and has been silent for this long may hang: no more is written to it, so that what has not left
/// can still go elsewhere, and the topology is looked at.
const SUSPECT_MS: u64 = 1_000;
/// Reads in a row before other tasks get their turn.
const READS_PER_TURN: usize = 16;
/// How long after a login that failed, or that is not answered, the next is tried.
const LOGIN_AGAIN_MS: u64 = 5_000;
const FIRST_BACKOFF_MS: u64 = 10;
const MAX_BACKOFF_MS: u64 = 1_000;

/// A shared, pipelined connection and the commands that wait on it.
#[derive(Debug)]
pub struct Mux {
    node: NodeAddr,
    lane: Lane,
    queue: RefCell<Queue>,
    /// How many commands were pushed, less those that were taken back before they left.
    pushed: Cell<u64>,
    /// How many commands have gone from the front of the queue.
    answered: Cell<u64>,
    connected: Cell<bool>,
    retired: Cell<bool>,
    /// Set while the task is known to run soon.
    scheduled: Cell<bool>,
    waker: RefCell<Option<Waker>>,
    /// Sessions that wait for room.
    waiting: RefCell<Vec<Rc<Session>>>,
    /// A slow client that is waited for, and until when.
    stalled: RefCell<Option<(Rc<Session>, u64)>>,
    counters: Arc<NodeMeter>,
    sampler: Sampler,
    /// When the server last gave a sign of life or owed nothing, on the worker's clock.
    heard: Cell<u64>,
    /// Why the last attempt to connect failed.
    trouble: RefCell<Option<String>>,
    login: Login,
}

/// The login of a connection.
#[derive(Debug, Default)]
struct Login {
    /// With which keys it was made, or has logged in since. Absent: it never stood.
    keys: RefCell<Option<Arc<Keys>>>,
    /// Not before this time is it tried again, on the worker's clock.
    again_at: Cell<u64>,
}

impl Login {
    fn is_now(&self, keys: Arc<Keys>) {
        *self.keys.borrow_mut() = Some(keys);
        self.again_at.set(0);
    }

    /// Whether `keys` hold another login, which should be tried now.
    fn is_due(&self, keys: &Arc<Keys>, now: u64) -> bool {
        let own = self.keys.borrow();
        let Some(own) = own.as_ref().filter(|own| !Arc::ptr_eq(own, keys)) else { return false };
        own.credentials != keys.credentials && now >= self.again_at.get()
    }
}

impl Mux {
    /// A connection to `node` that comes about by itself.
    pub fn start(worker: &Rc<Worker>, node: NodeAddr, lane: Lane) -> Rc<Self> {
        let mux = Rc::new(Self {
            counters: worker.metrics().node(&node),
            sampler: Sampler::default(),
            node,
            lane,
            queue: RefCell::default(),
            pushed: Cell::new(0),
            answered: Cell::new(0),
            connected: Cell::new(false),
            retired: Cell::new(false),
            scheduled: Cell::new(false),
            waker: RefCell::default(),
            waiting: RefCell::default(),
            stalled: RefCell::default(),
            heard: Cell::new(worker.now()),
            trouble: RefCell::default(),
            login: Login::default(),
        });
        tokio::task::spawn_local(run(mux.clone(), worker.clone()));
        mux
    }

    /// Appends a command whose bytes are `parts`.
    #[inline]
    pub fn push(&self, parts: &[&[u8]], pending: Pending) {
        self.queue.borrow_mut().push(parts, pending);
        self.pushed.set(self.pushed.get() + 1);
        self.sampler.on_queued(self.pushed.get());
        self.counters.counters.requests.inc();
        self.schedule();
    }

    #[inline]
    fn schedule(&self) {
        if !self.scheduled.replace(true)
            && let Some(waker) = &*self.waker.borrow()
        {
            waker.wake_by_ref();
        }
    }

    /// Whether clients should wait before they send more; `session` is woken when there is room.
    #[inline]
    pub fn is_full(&self, session: &Rc<Session>) -> bool {
        let full = self.queue.borrow().held_bytes() > FULL_BYTES;
        if full {
            self.waiting.borrow_mut().push(session.clone());
        }
        full
    }

    /// A mark that [`Mux::has_passed`] once all commands that have left by now are answered.
    pub fn mark(&self) -> u64 {
        self.answered.get() + self.queue.borrow().sent_count() as u64
    }

    /// As [`Mux::mark`], of all commands that wait, whether they have left or not.
    pub fn mark_all(&self) -> u64 {
        self.answered.get() + self.queue.borrow().len() as u64
    }

    /// Whether the commands before `mark` are answered.
    pub fn has_passed(&self, mark: u64) -> bool {
        self.answered.get() >= mark
    }

    /// Whether nothing waits for it.
    pub fn is_idle(&self) -> bool {
        self.queue.borrow().is_empty()
    }

    /// For how long the server has owed answers and given none, in milliseconds.
    pub fn silent_ms(&self, now: u64) -> u64 {
        let mut queue = self.queue.borrow_mut();
        let owed_since = if queue.is_owed() { queue.front_mut().map(|oldest| oldest.since) } else { None };
        owed_since.map_or(0, |since| silence(now, self.heard.get(), since))
    }

    /// Takes back those that are `wanted` of the commands that have not left.
    pub fn take_unsent(&self, wanted: impl Fn(&Pending) -> bool) -> Vec<Recovered> {
        let taken = self.queue.borrow_mut().take_unsent(wanted);
        self.pushed.set(self.pushed.get() - taken.len() as u64);
        taken
    }

    /// Ends the connection: what is unanswered is settled at once, as after a loss, so that nothing overtakes it.
    pub fn retire(self: &Rc<Self>, worker: &Rc<Worker>) {
        self.retired.set(true);
        settle(self, worker);
        self.schedule();
    }

    /// Whether the connection has ended for good.
    pub fn is_retired(&self) -> bool {
        self.retired.get()
    }

    /// Whether it is for large replies, and no client uses it any more.
    pub fn is_left(&self, worker: &Worker) -> bool {
        self.lane.bulk() > 0 && worker.bulk_lanes().clients(self.lane.bulk()) == 0 && self.is_idle()
    }

    /// Has the connection go on after a slow client has read.
    pub fn resume(&self) {
        self.schedule();
    }

    /// Whether a connection stands.
    pub fn is_connected(&self) -> bool {
        self.connected.get()
    }

    /// Answers commands that never left and have waited for too long. Called with each tick of the worker.
    pub fn expire(&self, worker: &Rc<Worker>) {
        for expired in self.take_unsent(|pending| worker.is_patience_over(pending)) {
            self.fail(worker, expired);
        }
        if self.stalled.borrow().is_some() || (self.connected.get() && !self.queue.borrow().is_empty()) {
            self.schedule();
        }
    }

    /// Logs in again where the login has changed since. In the queue, so that no command waits for it and no reply is mistaken;
    /// where the server refuses it, the connection stays logged in as it was. Called with each tick of the worker.
    pub fn renew_login(self: &Rc<Self>, worker: &Rc<Worker>, keys: &Arc<Keys>) {
        if !self.connected.get() || !self.login.is_due(keys, worker.now()) {
            return;
        }
        let Some(command) = keys.login() else { return };
        self.login.again_at.set(worker.now() + LOGIN_AGAIN_MS);
        let (mux, keys) = (Rc::downgrade(self), keys.clone());
        let sink = Sink::Call(Box::new(move |_, answer| {
            if let Some(mux) = mux.upgrade() {
                mux.on_login(keys, answer);
            }
        }));
        self.push(&[&command], Pending::new(sink, ANY_SLOT, Retry::Here, self.lane, worker.now()));
    }

    fn on_login(&self, keys: Arc<Keys>, answer: Answer<'_>) {
        match answer {
            Answer::Reply(b"+OK\r\n") => {
                tracing::debug!(node = %self.node, "a connection has logged in anew");
                self.login.is_now(keys);
            }
            Answer::Reply(error) => {
                let error = String::from_utf8_lossy(error).trim_end().to_owned();
                tracing::warn!(node = %self.node, error, "a connection cannot log in anew: it goes on as it was, and tries again");
            }
            // A new connection has the new login.
            Answer::Failed(_) => {}
        }
    }

    /// Tells a client that its command was not carried out in time, and why.
    fn fail(&self, worker: &Rc<Worker>, lost: Recovered) {
        let text = match &*self.trouble.borrow() {
            Some(trouble) if !lost.left => worker.untouched_text(trouble),
            _ if !lost.left => worker.unreachable_text(),
            _ => {
                "TRYAGAIN the connection to the server was lost before it answered: the command can safely be repeated".to_owned()
            }
        };
        worker.fail(lost, &text);
    }

    /// Takes out what is not answered.
    fn recover(&self) -> Vec<Recovered> {
        let recovered = self.queue.borrow_mut().drain();
        self.answered.set(self.answered.get() + recovered.len() as u64);
        recovered
    }
}

/// Connects, serves, settles, and again, until the connection is retired.
async fn run(mux: Rc<Mux>, worker: Rc<Worker>) {
    let mut backoff = FIRST_BACKOFF_MS;
    while !mux.retired.get() {
        let keys = worker.access().current();
        match open(&worker, &mux.node, mux.lane).await {
            Ok(link) => {
                mux.login.is_now(keys);
                backoff = FIRST_BACKOFF_MS;
                *mux.trouble.borrow_mut() = None;
                mux.connected.set(true);
                mux.heard.set(worker.now());
                let broken = Connection::new(&mux, &worker, link).serve().await;
                mux.connected.set(false);
                if !matches!(broken, Broken::Retired) {
                    tracing::warn!(node = %mux.node, error = %broken, "lost a server connection");
                }
                mux.counters.counters.reconnects.inc();
            }
            Err(error) => report_dial(&mux, &error),
        }
        worker.refresh_topology();
        settle(&mux, &worker);
        let pause = fastrand::u64(backoff / 2..=backoff);
        backoff = (backoff * 2).min(MAX_BACKOFF_MS);
        tokio::time::sleep(Duration::from_millis(pause)).await;
    }
    settle(&mux, &worker);
}

fn report_dial(mux: &Mux, error: &DialError) {
    tracing::debug!(node = %mux.node, %error, "cannot reach a server");
    *mux.trouble.borrow_mut() = Some(error.told());
}

/// Decides what becomes of each command that a lost connection did not answer.
fn settle(mux: &Rc<Mux>, worker: &Rc<Worker>) {
    // Else a slow client and the connection that waits for it would hold each other.
    drop(mux.stalled.take());
    let mut again = Vec::new();
    for lost in mux.recover() {
        if lost.pending.retry == Retry::Here {
            mux.fail(worker, lost);
        } else if lost.left && lost.pending.retry == Retry::Never {
            lost.pending.sink.deliver(worker, Answer::Failed(LOST));
        } else if worker.is_patience_over(&lost.pending) {
            mux.fail(worker, lost);
        } else {
            again.push(lost);
        }
    }
    worker.resubmit_all(again);
    wake_waiting(mux);
    worker.flush_dirty();
}

fn wake_waiting(mux: &Mux) {
    for session in mux.waiting.take() {
        session.wake();
    }
}

/// A connection while it stands.
struct Connection<'a> {
    mux: &'a Rc<Mux>,
    worker: &'a Rc<Worker>,
    link: Link,
    scanner: ReplyScanner,
    /// The start of a reply whose end has not come.
    residue: Vec<u8>,
}

impl<'a> Connection<'a> {
    fn new(mux: &'a Rc<Mux>, worker: &'a Rc<Worker>, link: Link) -> Self {
        Self { mux, worker, link, scanner: ReplyScanner::default(), residue: Vec::new() }
    }

    async fn serve(mut self) -> Broken {
        poll_fn(|cx| self.poll_turn(cx)).await
    }

    fn poll_turn(&mut self, cx: &mut Context<'_>) -> Poll<Broken> {
        self.mux.scheduled.set(false);
        remember_waker(&self.mux.waker, cx);
        if self.mux.retired.get() {
            return Poll::Ready(Broken::Retired);
        }
        if let Err(broken) = self.write(cx) {
            return Poll::Ready(broken);
        }
        let outcome = self.read(cx);
        self.worker.flush_dirty();
        if self.mux.queue.borrow().held_bytes() < FULL_BYTES / 2 {
            wake_waiting(self.mux);
        }
        self.worker.after_turn();
        outcome.map(|broken| broken)
    }

    fn write(&mut self, cx: &mut Context<'_>) -> Result<(), Broken> {
        let mut queue = self.mux.queue.borrow_mut();
        if !queue.is_owed() {
            self.mux.heard.set(self.worker.now());
        }
        let may_write = self.worker.now().saturating_sub(self.mux.heard.get()) < SUSPECT_MS;
        // A command that has begun to leave is finished in any case: the server cannot answer half of one.
        let mut room = if may_write { queue.unsent().len() } else { queue.rest_of_started() };
        while room > 0 {
            match Pin::new(&mut self.link).poll_write(cx, &queue.unsent()[..room]) {
                Poll::Ready(Ok(0)) => return Err(Broken::Closed),
                Poll::Ready(Ok(count)) => {
                    queue.mark_sent(count);
                    room -= count;
                }
                Poll::Ready(Err(error)) => return Err(error.into()),
                Poll::Pending => break,
            }
        }
        if queue.unsent().is_empty() {
            self.mux.sampler.on_written();
        }
        // TLS buffers records of its own.
        match Pin::new(&mut self.link).poll_flush(cx) {
            Poll::Ready(Err(error)) => Err(error.into()),
            _ => Ok(()),
        }
    }

    fn read(&mut self, cx: &mut Context<'_>) -> Poll<Broken> {
        for _ in 0..READS_PER_TURN {
            if self.is_stalled() {
                return Poll::Pending;
            }
            let scratch = self.worker.scratch();
            let mut scratch = scratch.borrow_mut();
            let mut buffer = ReadBuf::new(&mut scratch[..SCRATCH_BYTES]);
            match Pin::new(&mut self.link).poll_read(cx, &mut buffer) {
                Poll::Pending => return self.check_silence(),
                Poll::Ready(Err(error)) => return Poll::Ready(error.into()),
                Poll::Ready(Ok(())) if buffer.filled().is_empty() => return Poll::Ready(Broken::Closed),
                Poll::Ready(Ok(())) => {}
            }
            self.mux.heard.set(self.worker.now());
            self.worker.metrics().upstream_bytes(buffer.filled().len());
            if let Err(broken) = self.take(buffer.filled()) {
                return Poll::Ready(broken);
            }
        }
        // More may be waiting; others first.
        self.mux.scheduled.set(true);
        cx.waker().wake_by_ref();
        Poll::Pending
    }

    fn check_silence(&self) -> Poll<Broken> {
        let silent = self.mux.silent_ms(self.worker.now());
        if silent >= SUSPECT_MS {
            self.worker.refresh_topology();
        }
        if silent > SILENCE_MS { Poll::Ready(Broken::Silent) } else { Poll::Pending }
    }

    fn is_stalled(&self) -> bool {
        let mut stalled = self.mux.stalled.borrow_mut();
        let Some((session, until)) = &*stalled else { return false };
        let late = self.worker.now() >= *until && self.holds_others_up();
        let over = session.output_bytes() < SLOW_CLIENT_BYTES / 2 || session.is_closed() || late;
        if late {
            session.lose_patience();
        }
        if over {
            *stalled = None;
        } else {
            // What the server has sent is not looked at: it is not silent.
            self.mux.heard.set(self.worker.now());
        }
        !over
    }

    /// Whether waiting for a slow client keeps others waiting: those on the same connection, or on slots that change hands.
    fn holds_others_up(&self) -> bool {
        self.worker.bulk_lanes().clients(self.mux.lane.bulk()) != 1 || self.worker.router().needs_attention()
    }

    fn take(&mut self, chunk: &[u8]) -> Result<(), Broken> {
        if self.residue.is_empty() {
            let taken = self.consume(chunk)?;
            self.residue.extend_from_slice(&chunk[taken..]);
        } else {
            let mut residue = std::mem::take(&mut self.residue);
            residue.extend_from_slice(chunk);
            let taken = self.consume(&residue)?;
            residue.drain(..taken);
            if residue.is_empty() && residue.capacity() > SCRATCH_BYTES {
                residue = Vec::new();
            }
            self.residue = residue;
        }
        if self.residue.len() >= LARGE_REPLY_BYTES {
            self.note_large_residue();
        }
        Ok(())
    }

    /// A reply that cannot be passed on yet is large, or too large.
    #[cold]
    fn note_large_residue(&self) {
        if self.residue.len() > MOST_COLLECTED_BYTES {
            return self.give_up_collecting();
        }
        let mut queue = self.mux.queue.borrow_mut();
        if let Some(session) = queue.front_mut().and_then(|front| front.sink.session()) {
            session.note_large_reply();
        }
    }

    /// Answers the command whose reply is being collected with an error; the rest of the reply is let through to nobody.
    #[cold]
    fn give_up_collecting(&self) {
        let sink = {
            let mut queue = self.mux.queue.borrow_mut();
            let Some(front) = queue.front_mut() else { return };
            std::mem::replace(&mut front.sink, Sink::Drop)
        };
        let text = format!("ERR the reply is larger than {MOST_COLLECTED_BYTES} bytes, the most that can be put together here");
        sink.deliver(self.worker, Answer::Failed(&text));
    }

    /// Delivers the whole replies at the front of `bytes`, and what can be passed on of an unfinished one.
    fn consume(&mut self, bytes: &[u8]) -> Result<usize, Broken> {
        let mut at = 0;
        while at < bytes.len() {
            match self.scanner.scan(&bytes[at..])? {
                Some(length) => {
                    self.on_reply(&bytes[at..at + length])?;
                    at += length;
                }
                None => {
                    let free = self.scanner.releasable(bytes.len() - at);
                    if self.pass_part(&bytes[at..at + free]) {
                        self.scanner.release(free);
                        at += free;
                    }
                    break;
                }
            }
        }
        Ok(at)
    }

    /// Passes on the start of a long reply, where it is next in its client's order and needs no thought.
    fn pass_part(&self, part: &[u8]) -> bool {
        const WORTH_PASSING: usize = 16 * 1024;
        let queue = &mut *self.mux.queue.borrow_mut();
        let Some(front) = queue.front_mut() else { return false };
        let Sink::Client { session, sequence, on_reply } = &mut front.sink else { return matches!(front.sink, Sink::Drop) };
        let begun = session.is_streaming(*sequence);
        let may_load = match *on_reply {
            OnReply::FillMany => true,
            // So far it may be all nulls.
            OnReply::FillHash(_) => reply::is_hollow(part),
            _ => false,
        };
        if front.replies > 1 || !(begun || part.len() >= WORTH_PASSING) || may_load {
            return false;
        }
        if !session.deliver_part(*sequence, part) {
            return false;
        }
        session.note_passed(part.len());
        if !begun {
            match *on_reply {
                OnReply::Pass | OnReply::FillMany | OnReply::WatchMany => {}
                OnReply::Count(rule)
                | OnReply::Watch(rule)
                | OnReply::Fill(rule)
                | OnReply::FillZero(rule)
                | OnReply::FillHash(rule)
                | OnReply::Lease(rule)
                | OnReply::Early(rule) => self.worker.metrics().count_read(rule, false),
            }
        }
        *on_reply = OnReply::Pass;
        // What has begun to leave cannot be begun anew.
        front.retry = Retry::Never;
        if session.output_bytes() > SLOW_CLIENT_BYTES && !session.is_hopeless() && self.mux.stalled.borrow().is_none() {
            let until = self.worker.now() + SLOW_CLIENT_PATIENCE_MS;
            *self.mux.stalled.borrow_mut() = Some((session.clone(), until));
            session.wake_when_drained(self.mux.clone());
        }
        true
    }

    #[inline]
    fn on_reply(&self, bytes: &[u8]) -> Result<(), Broken> {
        let mut queue = self.mux.queue.borrow_mut();
        if bytes[0] == b'>' {
            return Ok(());
        }
        let front = queue.front_mut().ok_or(Broken::Unsolicited)?;
        if front.replies > 1 {
            front.replies -= 1;
            if bytes[0] == b'-'
                && let Sink::Transaction(transaction) = &mut front.sink
            {
                transaction.error.get_or_insert_with(|| bytes.to_vec());
            }
            return Ok(());
        }
        if needs_thought(front, bytes) {
            drop(queue);
            self.on_unusual_reply(bytes);
            return Ok(());
        }
        let took = self.worker.now().saturating_sub(front.since);
        if took >= SLOW_MS {
            self.worker.metrics().slow(took, command_name(queue.front_bytes()));
        }
        let pending = queue.pop();
        drop(queue);
        self.mux.answered.set(self.mux.answered.get() + 1);
        self.mux.sampler.on_answered(self.mux.answered.get(), self.worker.metrics());
        if let Some(pending) = pending {
            pending.sink.deliver(self.worker, Answer::Reply(bytes));
        }
        Ok(())
    }

    /// Errors that may mean another node, and misses that start a load, need the command's bytes.
    #[cold]
    fn on_unusual_reply(&self, bytes: &[u8]) {
        if bytes[0] == b'-' {
            self.mux.counters.counters.errors.inc();
        }
        let mut queue = self.mux.queue.borrow_mut();
        let command = queue.front_bytes().to_vec();
        let Some(mut pending) = queue.pop() else { return };
        drop(queue);
        self.mux.answered.set(self.mux.answered.get() + 1);
        pending.asking = false;
        let overtaken = match &pending.sink {
            Sink::Client { session, sequence, .. } if bytes[0] != b'-' => {
                // Readers of one key on one connection need not overtake each other.
                let after = session.count_after(*sequence);
                after > 0 && after > self.mux.queue.borrow().count_same(session, &command)
            }
            sink if bytes[0] == b'-' => {
                sink.session().is_some_and(|session| self.mux.queue.borrow().has_another(session, pending.slot))
            }
            _ => false,
        };
        let recovered = Recovered { pending, bytes: command, left: true };
        self.worker.on_unusual_reply(&self.mux.node, recovered, bytes, overtaken);
    }
}

#[inline]
fn needs_thought(front: &Pending, bytes: &[u8]) -> bool {
    if bytes[0] == b'-' {
        return true;
    }
    match &front.sink {
        Sink::Client { session, on_reply, .. } => match on_reply {
            OnReply::Pass | OnReply::Count(_) => false,
            OnReply::Lease(_) => reply::is_null(bytes) || session.has_parked(),
            OnReply::Fill(_) | OnReply::Watch(_) => reply::is_null(bytes),
            OnReply::FillZero(_) => matches!(bytes, [b':' | b'$', b'0', ..]),
            OnReply::FillHash(_) => reply::is_hollow(bytes),
            OnReply::FillMany | OnReply::WatchMany | OnReply::Early(_) => true,
        },
        _ => false,
    }
}

/// The name of a whole command, for the slow log. A transaction of ours goes by the name of what is within.
fn command_name(command: &[u8]) -> &[u8] {
    let command = command.strip_prefix(MULTI).unwrap_or(command);
    command.split(|byte| *byte == b'\n').nth(2).map_or(&[], |line| line.trim_ascii_end())
}

/// Keeps the task's waker without cloning it each time.
pub fn remember_waker(place: &RefCell<Option<Waker>>, cx: &Context<'_>) {
    let mut place = place.borrow_mut();
    match &*place {
        Some(waker) if waker.will_wake(cx.waker()) => {}
        _ => *place = Some(cx.waker().clone()),
    }
}

/// For how many milliseconds a server has owed an answer and said nothing. A connection on which nothing was asked is not silent.
fn silence(now: u64, heard: u64, owed_since: u64) -> u64 {
    now.saturating_sub(heard).min(now.saturating_sub(owed_since))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_idle_connection_is_not_silent() {
        // Heard long ago, asked just now; and asked long ago, while answers to others still come.
        assert_eq!(silence(60_000, 1_000, 59_990), 10);
        assert_eq!(silence(60_000, 59_990, 1_000), 10);
        assert!(silence(60_000, 1_000, 2_000) > SILENCE_MS);
    }
}
