//! The connection that brings one client's messages from one server.
//!
//! Its task delivers whole frames to the session, apart from the client's own commands. Where the connection is lost, or its
//! server no longer serves, the task connects again and subscribes to everything again; what was published meanwhile is lost,
//! as publish/subscribe always may.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeSet, VecDeque};
use std::future::poll_fn;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::task::JoinHandle;
use tokio::time::{sleep, timeout};

use crate::sidecar::resp::{Protocol, ReplyScanner, encode, reply};
use crate::sidecar::session::{Ending, Session};
use crate::sidecar::upstream::broken::Broken;
use crate::sidecar::upstream::dial::Link;
use crate::sidecar::upstream::lane::Lane;
use crate::sidecar::upstream::mux::remember_waker;
use crate::sidecar::upstream::open::open;
use crate::sidecar::upstream::queue::ANY_SLOT;
use crate::sidecar::upstream::router::Node;
use crate::sidecar::worker::SCRATCH_BYTES;

/// How often the topology is looked at.
const LOOK: Duration = Duration::from_millis(500);
const FIRST_BACKOFF_MS: u64 = 10;
const MAX_BACKOFF_MS: u64 = 1_000;
/// The longest message.
const MOST_FRAME_BYTES: usize = 64 * 1024 * 1024;
/// Reads in a row before other tasks get their turn.
const READS_PER_TURN: usize = 16;

/// The three kinds of subscription.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// SUBSCRIBE.
    Channel,
    /// PSUBSCRIBE.
    Pattern,
    /// SSUBSCRIBE.
    Shard,
}

impl Kind {
    /// All kinds.
    pub const ALL: [Kind; 3] = [Kind::Channel, Kind::Pattern, Kind::Shard];

    /// The command, which is also what its confirmation is called.
    pub const fn command(self, subscribe: bool) -> &'static str {
        match (self, subscribe) {
            (Kind::Channel, true) => "subscribe",
            (Kind::Channel, false) => "unsubscribe",
            (Kind::Pattern, true) => "psubscribe",
            (Kind::Pattern, false) => "punsubscribe",
            (Kind::Shard, true) => "ssubscribe",
            (Kind::Shard, false) => "sunsubscribe",
        }
    }
}

/// How many subscriptions a client has, over all its feeds: confirmations say it.
#[derive(Debug, Default)]
pub struct Counts {
    /// Channels and patterns.
    pub general: Cell<usize>,
    /// Shard channels.
    pub shard: Cell<usize>,
}

impl Counts {
    /// The count that a confirmation of this kind says.
    pub fn of(&self, kind: Kind) -> &Cell<usize> {
        if kind == Kind::Shard { &self.shard } else { &self.general }
    }
}

/// A command that is not confirmed for all its channels.
#[derive(Debug)]
struct Asked {
    kind: Kind,
    subscribe: bool,
    channels: VecDeque<Vec<u8>>,
    /// Whether the confirmations are kept: see [`Feed::take_kept`].
    kept: bool,
}

impl Asked {
    fn write(&self, out: &mut Vec<u8>) {
        encode::array(out, 1 + self.channels.len());
        encode::bulk(out, self.kind.command(self.subscribe).as_bytes());
        self.channels.iter().for_each(|channel| encode::bulk(out, channel));
    }
}

/// A feed and its task. Dropping it ends both.
#[derive(Debug)]
pub struct Feed {
    state: Rc<State>,
    task: JoinHandle<()>,
}

#[derive(Debug)]
struct State {
    session: Rc<Session>,
    slot: u16,
    lane: Lane,
    counts: Rc<Counts>,
    /// What the server has confirmed.
    active: RefCell<BTreeSet<(Kind, Vec<u8>)>>,
    asked: RefCell<VecDeque<Asked>>,
    outbox: RefCell<Vec<u8>>,
    /// The connection is to be made anew.
    stale: Cell<bool>,
    connected: Cell<bool>,
    waker: RefCell<Option<Waker>>,
    /// Confirmations, and errors, that do not go to the client by themselves.
    kept: RefCell<Vec<u8>>,
    /// The client's task, while it waits for confirmations.
    asker: RefCell<Option<Waker>>,
}

impl Feed {
    /// A feed of `session` from the server of `slot`.
    pub fn start(session: &Rc<Session>, slot: u16, counts: Rc<Counts>) -> Self {
        let state = Rc::new(State {
            session: session.clone(),
            slot,
            lane: session.lane().shared(),
            counts,
            active: RefCell::default(),
            asked: RefCell::default(),
            outbox: RefCell::default(),
            stale: Cell::new(false),
            connected: Cell::new(false),
            waker: RefCell::default(),
            kept: RefCell::default(),
            asker: RefCell::default(),
        });
        Self { task: tokio::task::spawn_local(run(state.clone())), state }
    }

    /// The slot whose server it is.
    pub fn slot(&self) -> u16 {
        self.state.slot
    }

    /// The channels of a kind that the client is subscribed to here.
    pub fn channels(&self, kind: Kind) -> Vec<Vec<u8>> {
        self.state.active.borrow().iter().filter(|(own, _)| *own == kind).map(|(_, channel)| channel.clone()).collect()
    }

    /// Whether nothing is left to feed.
    pub fn is_idle(&self) -> bool {
        self.state.active.borrow().is_empty() && self.state.asked.borrow().is_empty()
    }

    /// Asks the server for more or fewer channels. The confirmations go to the client, unless they are `kept`.
    pub fn ask(&self, kind: Kind, subscribe: bool, channels: Vec<Vec<u8>>, kept: bool) {
        let asked = Asked { kind, subscribe, channels: channels.into(), kept };
        if self.state.connected.get() {
            asked.write(&mut self.state.outbox.borrow_mut());
        }
        self.state.asked.borrow_mut().push_back(asked);
        self.state.wake();
    }

    /// The confirmations that were kept.
    pub fn take_kept(&self) -> Vec<u8> {
        self.state.kept.take()
    }

    /// Waits until all that was asked is confirmed, or refused.
    pub async fn confirmed(&self) {
        poll_fn(|cx| {
            if self.state.asked.borrow().is_empty() {
                return Poll::Ready(());
            }
            remember_waker(&self.state.asker, cx);
            Poll::Pending
        })
        .await;
    }

    /// Withdraws what is not confirmed. The connection is made anew, so that both sides mean the same.
    pub fn withdraw(&self) {
        self.state.asked.borrow_mut().clear();
        self.state.stale.set(true);
        self.state.wake();
    }
}

impl Drop for Feed {
    fn drop(&mut self) {
        self.task.abort();
        for (kind, _) in self.state.active.borrow().iter() {
            let count = self.state.counts.of(*kind);
            count.set(count.get().saturating_sub(1));
        }
    }
}

async fn run(state: Rc<State>) {
    let worker = state.session.worker().clone();
    let mut backoff = FIRST_BACKOFF_MS;
    while !state.session.is_closed() {
        if let Some(node) = state.choose() {
            match open(&worker, node.address(), state.lane).await {
                Ok(link) => {
                    backoff = FIRST_BACKOFF_MS;
                    let broken = Connection::new(&state, &node, link).serve().await;
                    state.connected.set(false);
                    tracing::debug!(node = %node.address(), error = %broken, "a subscription moves to another connection");
                }
                Err(error) => tracing::debug!(node = %node.address(), %error, "cannot reach a server"),
            }
            worker.refresh_topology();
        }
        sleep(Duration::from_millis(fastrand::u64(backoff / 2..=backoff))).await;
        backoff = (backoff * 2).min(MAX_BACKOFF_MS);
    }
}

impl State {
    fn wake(&self) {
        if let Some(waker) = &*self.waker.borrow() {
            waker.wake_by_ref();
        }
    }

    /// The server to connect to: in a Cluster any for channels and patterns, which all nodes pass on.
    fn choose(&self) -> Option<Rc<Node>> {
        let worker = self.session.worker();
        if self.slot != ANY_SLOT || !worker.is_cluster() {
            return worker.router().node_of(self.slot);
        }
        let nodes = worker.router().primaries();
        if nodes.is_empty() { None } else { nodes.get(worker.random() as usize % nodes.len()).cloned() }
    }

    /// Whether the node it is connected to is one to be connected to.
    fn is_placed(&self, node: &Rc<Node>) -> bool {
        let router = self.session.worker().router();
        match self.slot {
            ANY_SLOT => !router.is_usable() || router.serves(node),
            slot => router.node_of(slot).is_none_or(|owner| Rc::ptr_eq(&owner, node)),
        }
    }

    /// All that the server must hear at the start of a connection.
    fn greet(&self) {
        let mut out = self.outbox.borrow_mut();
        out.clear();
        let active = self.active.borrow();
        for kind in Kind::ALL {
            let channels: VecDeque<Vec<u8>> =
                active.iter().filter(|(own, _)| *own == kind).map(|(_, channel)| channel.clone()).collect();
            if !channels.is_empty() {
                Asked { kind, subscribe: true, channels, kept: false }.write(&mut out);
            }
        }
        self.asked.borrow().iter().for_each(|asked| asked.write(&mut out));
        self.stale.set(false);
        self.connected.set(true);
    }

    /// Takes a whole frame. An error: the connection is to be made anew.
    fn take(&self, frame: &[u8]) -> Result<(), Broken> {
        if frame[0] == b'-' {
            return self.take_error(frame);
        }
        let elements = reply::elements(frame).unwrap_or_default();
        let name = elements.first().and_then(|name| reply::text(name)).unwrap_or_default();
        let confirmed = Kind::ALL.into_iter().flat_map(|kind| [(kind, true), (kind, false)]);
        let confirmed = confirmed.into_iter().find(|(kind, subscribe)| kind.command(*subscribe).as_bytes() == name);
        match (confirmed, elements.get(1).and_then(|channel| reply::text(channel))) {
            (None, _) => self.deliver(frame),
            (Some((kind, subscribe)), Some(channel)) => {
                if let Some(kept) = self.confirm(kind, subscribe, channel) {
                    self.tell(kept, &confirmation(self.lane.protocol, kind, subscribe, Some(channel), &self.counts));
                } else if !subscribe && self.active.borrow().contains(&(kind, channel.to_vec())) {
                    // The slot has moved away, and the subscription with it.
                    return Err(Broken::Displaced);
                }
            }
            (Some(_), None) => {}
        }
        Ok(())
    }

    /// What the client asked for, next in order, is confirmed: whether it gets to know of it in another way. `None`: it asked for
    /// something else.
    fn confirm(&self, kind: Kind, subscribe: bool, channel: &[u8]) -> Option<bool> {
        let mut asked = self.asked.borrow_mut();
        let front = asked.front_mut()?;
        if front.kind != kind || front.subscribe != subscribe || front.channels.front().is_none_or(|next| next != channel) {
            return None;
        }
        let kept = front.kept;
        front.channels.pop_front();
        if front.channels.is_empty() {
            asked.pop_front();
        }
        let mut active = self.active.borrow_mut();
        let count = self.counts.of(kind);
        if subscribe && active.insert((kind, channel.to_vec())) {
            count.set(count.get() + 1);
        } else if !subscribe && active.remove(&(kind, channel.to_vec())) {
            count.set(count.get().saturating_sub(1));
        }
        if asked.is_empty() {
            self.wake_asker();
        }
        Some(kept)
    }

    fn take_error(&self, frame: &[u8]) -> Result<(), Broken> {
        let moved = [&b"-MOVED"[..], b"-CLUSTERDOWN", b"-TRYAGAIN", b"-LOADING", b"-MASTERDOWN"];
        if moved.iter().any(|code| frame.starts_with(code)) {
            return Err(Broken::Displaced);
        }
        let asked = self.asked.borrow_mut().pop_front();
        if let Some(asked) = asked {
            self.tell(asked.kept, frame);
        }
        self.wake_asker();
        Ok(())
    }

    fn wake_asker(&self) {
        if let Some(waker) = self.asker.take() {
            waker.wake();
        }
    }

    /// Tells what became of a question.
    fn tell(&self, kept: bool, frame: &[u8]) {
        if kept { self.kept.borrow_mut().extend_from_slice(frame) } else { self.deliver(frame) }
    }

    fn deliver(&self, frame: &[u8]) {
        // A client may have gone back to RESP2 with its subscriptions.
        if frame[0] == b'>' && self.session.protocol() == Protocol::Resp2 {
            let mut plain = frame.to_vec();
            plain[0] = b'*';
            self.session.deliver_push(&plain);
        } else {
            self.session.deliver_push(frame);
        }
    }
}

/// What a client gets when a subscription begins or ends.
pub fn confirmation(protocol: Protocol, kind: Kind, subscribe: bool, channel: Option<&[u8]>, counts: &Counts) -> Vec<u8> {
    let mut frame = Vec::new();
    encode::array(&mut frame, 3);
    if protocol == Protocol::Resp3 {
        frame[0] = b'>';
    }
    encode::bulk(&mut frame, kind.command(subscribe).as_bytes());
    match channel {
        Some(channel) => encode::bulk(&mut frame, channel),
        None => encode::null(&mut frame, protocol),
    }
    encode::integer(&mut frame, counts.of(kind).get() as i64);
    frame
}

/// A connection while it stands.
struct Connection<'a> {
    state: &'a Rc<State>,
    node: &'a Rc<Node>,
    link: Link,
    sent: usize,
    scanner: ReplyScanner,
    residue: Vec<u8>,
}

impl<'a> Connection<'a> {
    fn new(state: &'a Rc<State>, node: &'a Rc<Node>, link: Link) -> Self {
        state.greet();
        Self { state, node, link, sent: 0, scanner: ReplyScanner::default(), residue: Vec::new() }
    }

    async fn serve(mut self) -> Broken {
        loop {
            match timeout(LOOK, poll_fn(|cx| self.poll(cx))).await {
                Ok(broken) => return broken,
                Err(_) if !self.state.is_placed(self.node) => return Broken::Displaced,
                Err(_) => {}
            }
        }
    }

    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Broken> {
        remember_waker(&self.state.waker, cx);
        if self.state.stale.get() {
            return Poll::Ready(Broken::Displaced);
        }
        let polled = self.write(cx).and_then(|()| self.read(cx));
        self.state.session.worker().flush_dirty();
        match polled {
            Ok(()) => Poll::Pending,
            Err(broken) => Poll::Ready(broken),
        }
    }

    fn write(&mut self, cx: &mut Context<'_>) -> Result<(), Broken> {
        let mut out = self.state.outbox.borrow_mut();
        while self.sent < out.len() {
            match Pin::new(&mut self.link).poll_write(cx, &out[self.sent..]) {
                Poll::Ready(Ok(0)) => return Err(Broken::Closed),
                Poll::Ready(count) => self.sent += count?,
                Poll::Pending => break,
            }
        }
        if self.sent == out.len() {
            out.clear();
            self.sent = 0;
        }
        match Pin::new(&mut self.link).poll_flush(cx) {
            Poll::Ready(Err(error)) => Err(error.into()),
            _ => Ok(()),
        }
    }

    fn read(&mut self, cx: &mut Context<'_>) -> Result<(), Broken> {
        let scratch = self.state.session.worker().scratch();
        for _ in 0..READS_PER_TURN {
            let mut scratch = scratch.borrow_mut();
            let mut buffer = ReadBuf::new(&mut scratch[..SCRATCH_BYTES]);
            match Pin::new(&mut self.link).poll_read(cx, &mut buffer) {
                Poll::Pending => return Ok(()),
                Poll::Ready(result) => result?,
            }
            if buffer.filled().is_empty() {
                return Err(Broken::Closed);
            }
            self.residue.extend_from_slice(buffer.filled());
            self.consume()?;
        }
        cx.waker().wake_by_ref();
        Ok(())
    }

    fn consume(&mut self) -> Result<(), Broken> {
        let mut at = 0;
        while let Some(length) = self.scanner.scan(&self.residue[at..])? {
            self.state.take(&self.residue[at..at + length])?;
            at += length;
            if at == self.residue.len() {
                break;
            }
        }
        self.residue.drain(..at);
        if self.residue.is_empty() && self.residue.capacity() > SCRATCH_BYTES {
            self.residue = Vec::new();
        }
        if self.residue.len() > MOST_FRAME_BYTES {
            self.state.session.end(Ending::Now);
        }
        Ok(())
    }
}
