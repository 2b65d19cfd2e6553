//! The connection on which one server tells a worker of changes.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::io;
use std::rc::Rc;
use std::time::Duration;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::sync::Notify;
use tokio::time::timeout;

use super::Tracking;
use super::table::TrackerId;
use crate::sidecar::resp::{Protocol, ReplyScanner, encode, reply};
use crate::sidecar::upstream::dial::Link;
use crate::sidecar::upstream::lane::Lane;
use crate::sidecar::upstream::node::NodeAddr;
use crate::sidecar::upstream::open::open;
use crate::sidecar::worker::Worker;

/// A server that has nothing to say is asked this often whether it is there, and given up if it does not answer within as long.
const SILENCE: Duration = Duration::from_secs(5);
/// How long a server may take to read what is sent.
const WRITE_LIMIT: Duration = Duration::from_secs(5);
const FIRST_BACKOFF_MS: u64 = 20;
const MAX_BACKOFF_MS: u64 = 1_000;
/// The longest message.
const MOST_BUFFERED_BYTES: usize = 64 * 1024 * 1024;

/// What a server tells of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Kind {
    /// Keys that were read on the connection.
    Reads,
    /// All keys that begin as clients want.
    Broadcast,
    /// Versions that were asked for, which no client knows of.
    Versions,
}

/// What a reply answers.
#[derive(Debug)]
enum Owed {
    /// CLIENT TRACKING ON.
    Begin,
    /// The same after an OFF.
    Anew,
    /// TYPE.
    Key(Vec<u8>),
    /// Whatever it says.
    Nothing,
}

/// How far a tracker is.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Stage {
    Connecting,
    Standing,
    /// In the server's words.
    Refused(String),
}

/// A tracker.
#[derive(Debug)]
pub struct Tracker {
    node: NodeAddr,
    kind: Kind,
    /// Another after each loss.
    id: Cell<TrackerId>,
    stage: RefCell<Stage>,
    outbox: RefCell<Vec<u8>>,
    owed: RefCell<VecDeque<Owed>>,
    /// What the server was last told to tell of.
    prefixes: RefCell<Vec<Vec<u8>>>,
    /// Something is to be sent, or nobody needs it any more.
    changed: Notify,
    /// Its stage has changed.
    settled: Notify,
}

impl Tracker {
    /// A tracker that comes about by itself.
    pub fn start(worker: &Rc<Worker>, node: NodeAddr, kind: Kind, id: TrackerId) -> Rc<Self> {
        let tracker = Rc::new(Self {
            node,
            kind,
            id: Cell::new(id),
            stage: RefCell::new(Stage::Connecting),
            outbox: RefCell::default(),
            owed: RefCell::default(),
            prefixes: RefCell::default(),
            changed: Notify::new(),
            settled: Notify::new(),
        });
        tokio::task::spawn_local(run(worker.clone(), tracker.clone()));
        tracker
    }

    /// The server.
    pub fn node(&self) -> &NodeAddr {
        &self.node
    }

    /// What it tells of.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// Which connection it is now.
    pub fn id(&self) -> TrackerId {
        self.id.get()
    }

    /// Whether the server tells of nothing.
    pub fn is_refused(&self) -> bool {
        matches!(*self.stage.borrow(), Stage::Refused(_))
    }

    /// Waits until the server tells of what is wanted.
    ///
    /// # Errors
    /// Its refusal.
    pub async fn stands(&self) -> Result<(), String> {
        loop {
            let changed = self.settled.notified();
            match &*self.stage.borrow() {
                Stage::Standing => return Ok(()),
                Stage::Refused(text) => return Err(text.clone()),
                Stage::Connecting => {}
            }
            changed.await;
        }
    }

    /// Asks the server to tell when `key` changes.
    pub fn register(&self, key: &[u8]) {
        encode::command(&mut self.outbox.borrow_mut(), &[&b"TYPE"[..], key]);
        self.owed.borrow_mut().push_back(Owed::Key(key.to_vec()));
        self.changed.notify_one();
    }

    /// Clients want other things, or nothing. What is wanted no more is told of still: who gets it is decided here.
    pub fn adjust(&self, tracking: &Tracking) {
        if self.kind == Kind::Broadcast && *self.stage.borrow() == Stage::Standing {
            let wanted = tracking.prefixes();
            let told = self.prefixes.borrow().clone();
            let fresh: Vec<Vec<u8>> =
                wanted.iter().filter(|prefix| !told.iter().any(|told| prefix.starts_with(told))).cloned().collect();
            // A server takes no prefix that begins another: then it must forget the others.
            if fresh.iter().any(|prefix| told.iter().any(|told| told.starts_with(prefix))) {
                encode::command(&mut self.outbox.borrow_mut(), &["CLIENT", "TRACKING", "OFF"]);
                self.owed.borrow_mut().extend([Owed::Nothing, Owed::Anew]);
                self.prefixes.take();
                self.begin(wanted);
            } else if !fresh.is_empty() {
                self.owed.borrow_mut().push_back(Owed::Begin);
                self.begin(fresh);
            }
        }
        self.changed.notify_one();
    }

    /// Appends CLIENT TRACKING ON, with further prefixes.
    fn begin(&self, prefixes: Vec<Vec<u8>>) {
        self.enter(Stage::Connecting);
        let mut words: Vec<&[u8]> = vec![b"CLIENT", b"TRACKING", b"ON"];
        if self.kind == Kind::Broadcast {
            words.push(b"BCAST");
            prefixes.iter().for_each(|prefix| words.extend([&b"PREFIX"[..], prefix]));
        }
        encode::command(&mut self.outbox.borrow_mut(), &words);
        self.prefixes.borrow_mut().extend(prefixes);
    }

    fn enter(&self, stage: Stage) {
        self.stage.replace(stage);
        self.settled.notify_waiters();
    }

    /// What the connection owed is lost with it, and what it had registered.
    fn lose(&self, worker: &Rc<Worker>) {
        let tracking = worker.tracking();
        let id = self.id.replace(tracking.fresh_id());
        self.outbox.take();
        let owed = self.owed.take();
        tracking.on_loss(worker, id, self.kind);
        drop(owed);
    }
}

/// Connects, listens, and again, until nobody needs it or its server is no longer part of the topology.
async fn run(worker: Rc<Worker>, tracker: Rc<Tracker>) {
    let mut backoff = FIRST_BACKOFF_MS;
    loop {
        let ended = match open(&worker, &tracker.node, Lane::of(Protocol::Resp3, 0)).await {
            Ok(link) => {
                backoff = FIRST_BACKOFF_MS;
                follow(&worker, &tracker, link).await
            }
            Err(error) => io::Error::other(error),
        };
        tracing::debug!(node = %tracker.node, error = %ended, "a connection that hears of changes has ended");
        let tracking = worker.tracking();
        let refused = tracker.is_refused();
        if !refused {
            tracker.enter(Stage::Connecting);
        }
        tracker.lose(&worker);
        while tracker.is_refused() && tracking.is_wanted(&worker, tracker.kind) && worker.router().knows(&tracker.node) {
            tracker.changed.notified().await;
        }
        if !tracking.is_wanted(&worker, tracker.kind) || !worker.router().knows(&tracker.node) {
            break;
        }
        tokio::time::sleep(Duration::from_millis(fastrand::u64(backoff / 2..=backoff))).await;
        backoff = (backoff * 2).min(MAX_BACKOFF_MS);
    }
    worker.tracking().trackers.borrow_mut().remove(&(tracker.node.clone(), tracker.kind));
    // Should somebody have come to want it meanwhile, or wait for it.
    tracker.lose(&worker);
}

/// Listens until the connection ends, and says how.
async fn follow(worker: &Rc<Worker>, tracker: &Rc<Tracker>, mut link: Link) -> io::Error {
    let asked = tracker.outbox.take();
    tracker.owed.borrow_mut().push_front(Owed::Begin);
    tracker.prefixes.take();
    tracker.begin(worker.tracking().prefixes());
    tracker.outbox.borrow_mut().extend_from_slice(&asked);
    let (mut scanner, mut buffer, mut silent) = (ReplyScanner::default(), Vec::new(), false);
    loop {
        let outgoing = tracker.outbox.take();
        if !outgoing.is_empty()
            && let Err(error) = timeout(WRITE_LIMIT, link.write_all(&outgoing)).await.unwrap_or_else(|late| Err(late.into()))
        {
            return error;
        }
        if !worker.tracking().is_wanted(worker, tracker.kind) || !worker.router().knows(&tracker.node) {
            return io::Error::other("nobody needs it");
        }
        let read = tokio::select! {
            read = timeout(SILENCE, link.read_buf(&mut buffer)) => read,
            () = tracker.changed.notified() => continue,
        };
        match read {
            Err(_) if silent => return io::ErrorKind::TimedOut.into(),
            Err(_) => {
                silent = true;
                encode::command(&mut tracker.outbox.borrow_mut(), &["PING"]);
                tracker.owed.borrow_mut().push_back(Owed::Nothing);
                continue;
            }
            Ok(Ok(0)) => return io::ErrorKind::UnexpectedEof.into(),
            Ok(Ok(_)) => silent = false,
            Ok(Err(error)) => return error,
        }
        if let Err(error) = hear_all(worker, tracker, &mut scanner, &mut buffer) {
            return error;
        }
        worker.flush_dirty();
    }
}

fn hear_all(worker: &Rc<Worker>, tracker: &Tracker, scanner: &mut ReplyScanner, buffer: &mut Vec<u8>) -> io::Result<()> {
    let mut at = 0;
    while at < buffer.len() {
        let Some(length) = scanner.scan(&buffer[at..]).map_err(io::Error::other)? else { break };
        hear(worker, tracker, &buffer[at..at + length])?;
        at += length;
    }
    buffer.drain(..at);
    if buffer.len() > MOST_BUFFERED_BYTES { Err(io::ErrorKind::InvalidData.into()) } else { Ok(()) }
}

/// One message or reply of the server.
fn hear(worker: &Rc<Worker>, tracker: &Tracker, frame: &[u8]) -> io::Result<()> {
    let tracking = worker.tracking();
    if frame[0] == b'>' {
        let parts = reply::elements(frame).unwrap_or_default();
        if let [kind, changed] = parts[..]
            && reply::text(kind) == Some(b"invalidate")
        {
            match reply::elements(changed).filter(|_| !reply::is_null(changed)) {
                None => tracking.on_flush(worker, tracker),
                Some(keys) => {
                    let keys: Vec<&[u8]> = keys.into_iter().filter_map(reply::text).collect();
                    tracking.on_changes(worker, tracker, &keys);
                }
            }
        }
        return Ok(());
    }
    let owed = tracker.owed.borrow_mut().pop_front();
    let failed = frame[0] == b'-';
    match owed {
        None => return Err(io::Error::other("a reply that nothing asked for")),
        Some(Owed::Nothing) => {}
        Some(Owed::Key(key)) => tracking.on_registered(&key, tracker.id(), !failed),
        Some(Owed::Begin | Owed::Anew) if failed => {
            let text = String::from_utf8_lossy(&frame[1..]).trim_end().to_owned();
            tracing::warn!(node = %tracker.node, error = text, "a server does not tell of changes");
            tracker.enter(Stage::Refused(text));
            return Err(io::Error::other("refused"));
        }
        Some(Owed::Begin) => {
            tracker.enter(Stage::Standing);
            // Clients may have come while it began.
            tracker.adjust(tracking);
        }
        Some(Owed::Anew) => {
            tracker.enter(Stage::Standing);
            // In between nothing was told.
            tracking.on_loss(worker, tracker.id(), Kind::Broadcast);
            tracker.adjust(tracking);
        }
    }
    Ok(())
}
