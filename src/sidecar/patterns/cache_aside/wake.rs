//! How a pod hears of the end of another pod's lease: through the cache.
//!
//! While somebody waits, the lease's name is subscribed as a sharded channel, on one connection per server. Who ends an awaited
//! lease announces it in the same script. The waiter looks once when the subscription stands, and at each sign. Where servers
//! do not know sharded channels, or the user may not use them, the desk's own looks, which are rarer, must do.

use std::cell::{Cell, RefCell};
use std::io;
use std::rc::Rc;
use std::time::Duration;

use rustc_hash::FxHashMap;
use smallvec::SmallVec;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::sync::Notify;
use tokio::time::timeout;

use crate::sidecar::engine::lease::Name;
use crate::sidecar::resp::{ReplyScanner, encode, reply};
use crate::sidecar::slots::{self, Companion};
use crate::sidecar::upstream::dial::Link;
use crate::sidecar::upstream::lane::Lane;
use crate::sidecar::upstream::node::NodeAddr;
use crate::sidecar::upstream::open::open;
use crate::sidecar::upstream::queue::ANY_SLOT;
use crate::sidecar::worker::Worker;

/// The most channels of a worker. Those who wait for more leases look now and then.
const MOST_CHANNELS: usize = 10_000;
/// How long a server may take to read what is sent.
const WRITE_LIMIT: Duration = Duration::from_secs(5);
/// A connection on which nothing is subscribed is closed after this.
const IDLE: Duration = Duration::from_secs(30);
const FIRST_BACKOFF_MS: u64 = 20;
const MAX_BACKOFF_MS: u64 = 1_000;
/// A message is a line or two.
const MOST_BUFFERED_BYTES: usize = 1024 * 1024;

/// What a worker listens to.
#[derive(Debug, Default)]
pub struct Wake {
    listeners: RefCell<FxHashMap<NodeAddr, Rc<Listener>>>,
    /// Who waits at each channel, and where it is subscribed. More than one: the same key in several databases.
    channels: RefCell<FxHashMap<Vec<u8>, Channel>>,
    /// A server has refused: nothing is subscribed any more.
    refused: Cell<bool>,
}

#[derive(Debug)]
struct Channel {
    names: SmallVec<[Rc<Name>; 1]>,
    listener: Rc<Listener>,
}

/// One connection to one server.
#[derive(Debug, Default)]
struct Listener {
    /// What is to be sent.
    outbox: RefCell<Vec<u8>>,
    changed: Notify,
    channels: Cell<usize>,
    /// Whether what is sent goes anywhere.
    connected: Cell<bool>,
}

/// Why a listener's connection ended.
enum Ended {
    Idle,
    Refused(String),
    Lost(io::Error),
}

impl Wake {
    /// Listens for the end of a key's lease.
    pub fn watch(&self, worker: &Rc<Worker>, name: &Rc<Name>) {
        let channel = Companion::Lease.name(&name.key);
        let mut channels = self.channels.borrow_mut();
        if let Some(known) = channels.get_mut(&channel) {
            known.names.push(name.clone());
            return;
        }
        let slot = if worker.is_cluster() { slots::slot_of(&name.key) } else { ANY_SLOT };
        let Some(node) = worker.router().node_of(slot).filter(|_| !self.refused.get() && channels.len() < MOST_CHANNELS) else {
            return;
        };
        let listener = self.listener(worker, node.address());
        listener.send(b"SSUBSCRIBE", &channel);
        listener.channels.set(listener.channels.get() + 1);
        channels.insert(channel, Channel { names: SmallVec::from_elem(name.clone(), 1), listener });
    }

    /// Listens no more.
    pub fn unwatch(&self, name: &Rc<Name>) {
        let channel = Companion::Lease.name(&name.key);
        let mut channels = self.channels.borrow_mut();
        let Some(known) = channels.get_mut(&channel) else { return };
        known.names.retain(|other| other != name);
        if known.names.is_empty() {
            known.listener.send(b"SUNSUBSCRIBE", &channel);
            known.listener.channels.set(known.listener.channels.get().saturating_sub(1));
            channels.remove(&channel);
        }
    }

    fn listener(&self, worker: &Rc<Worker>, node: &NodeAddr) -> Rc<Listener> {
        let mut listeners = self.listeners.borrow_mut();
        let start = || {
            let listener = Rc::new(Listener::default());
            tokio::task::spawn_local(listen(worker.clone(), node.clone(), listener.clone()));
            listener
        };
        listeners.entry(node.clone()).or_insert_with(start).clone()
    }

    /// The names that wait at `channel`.
    fn names(&self, channel: &[u8]) -> SmallVec<[Rc<Name>; 1]> {
        self.channels.borrow().get(channel).map(|known| known.names.clone()).unwrap_or_default()
    }

    /// The commands that subscribe again what `listener` listens to.
    fn resume(&self, listener: &Rc<Listener>) {
        let mut outbox = listener.outbox.borrow_mut();
        outbox.clear();
        let channels = self.channels.borrow();
        let own = channels.iter().filter(|(_, channel)| Rc::ptr_eq(&channel.listener, listener));
        own.for_each(|(name, _)| encode::command(&mut outbox, &[&b"SSUBSCRIBE"[..], name]));
    }

    /// Strikes a listener and what it listened to: the desk's own looks go on.
    fn remove(&self, node: &NodeAddr, listener: &Rc<Listener>) {
        self.channels.borrow_mut().retain(|_, channel| !Rc::ptr_eq(&channel.listener, listener));
        let mut listeners = self.listeners.borrow_mut();
        if listeners.get(node).is_some_and(|current| Rc::ptr_eq(current, listener)) {
            listeners.remove(node);
        }
    }
}

impl Listener {
    fn send(&self, command: &[u8], channel: &[u8]) {
        // Who connects subscribes to all that is waited for: see `resume`.
        if self.connected.get() {
            encode::command(&mut self.outbox.borrow_mut(), &[command, channel]);
            self.changed.notify_one();
        }
    }
}

/// Keeps one server's subscriptions, until there are none for a while or the server is no longer part of the topology.
async fn listen(worker: Rc<Worker>, node: NodeAddr, listener: Rc<Listener>) {
    let mut backoff = FIRST_BACKOFF_MS;
    loop {
        let ended = match open(&worker, &node, Lane::default()).await {
            Ok(link) => {
                backoff = FIRST_BACKOFF_MS;
                listener.connected.set(true);
                worker.aside().wake().resume(&listener);
                let ended = follow(&worker, &listener, link).await;
                listener.connected.set(false);
                listener.outbox.take();
                ended
            }
            Err(error) => Ended::Lost(io::Error::other(error)),
        };
        match ended {
            Ended::Idle => break,
            Ended::Refused(text) => {
                if !worker.aside().wake().refused.replace(true) {
                    tracing::warn!(%node, error = %text, "waiting reads are not woken by other pods: sharded channels are refused");
                }
                break;
            }
            Ended::Lost(error) => tracing::debug!(%node, %error, "lost a connection that listens for the end of leases"),
        }
        if listener.channels.get() == 0 || !worker.router().knows(&node) {
            break;
        }
        tokio::time::sleep(Duration::from_millis(fastrand::u64(backoff / 2..=backoff))).await;
        backoff = (backoff * 2).min(MAX_BACKOFF_MS);
    }
    worker.aside().wake().remove(&node, &listener);
}

async fn follow(worker: &Rc<Worker>, listener: &Rc<Listener>, mut link: Link) -> Ended {
    let (mut scanner, mut buffer) = (ReplyScanner::default(), Vec::new());
    loop {
        let outgoing = listener.outbox.take();
        if !outgoing.is_empty()
            && let Err(error) = timeout(WRITE_LIMIT, link.write_all(&outgoing)).await.unwrap_or_else(|late| Err(late.into()))
        {
            return Ended::Lost(error);
        }
        let read = tokio::select! {
            read = timeout(IDLE, link.read_buf(&mut buffer)) => read,
            () = listener.changed.notified() => continue,
        };
        match read {
            Err(_) if listener.channels.get() == 0 => return Ended::Idle,
            // A server that has nothing to say is not dead; TCP's keep-alive finds out.
            Err(_) => continue,
            Ok(Ok(0)) => return Ended::Lost(io::ErrorKind::UnexpectedEof.into()),
            Ok(Ok(_)) => {}
            Ok(Err(error)) => return Ended::Lost(error),
        }
        loop {
            match scanner.scan(&buffer) {
                Ok(Some(length)) => {
                    if let Some(ended) = hear(worker, &buffer[..length]) {
                        return ended;
                    }
                    buffer.drain(..length);
                }
                Ok(None) if buffer.len() > MOST_BUFFERED_BYTES => return Ended::Lost(io::ErrorKind::InvalidData.into()),
                Ok(None) => break,
                Err(error) => return Ended::Lost(io::Error::other(error)),
            }
        }
    }
}

/// One message of the server.
fn hear(worker: &Rc<Worker>, message: &[u8]) -> Option<Ended> {
    if let Some(error) = message.strip_prefix(b"-") {
        let text = String::from_utf8_lossy(error).trim_end().to_owned();
        let elsewhere = text.starts_with("MOVED ") || text.starts_with("CLUSTERDOWN");
        if elsewhere {
            worker.refresh_topology();
        }
        return Some(if elsewhere { Ended::Lost(io::Error::other(text)) } else { Ended::Refused(text) });
    }
    let parts = reply::elements(message).unwrap_or_default();
    let [kind, channel, ..] = parts.as_slice() else { return None };
    // `sunsubscribe` without being asked: the slot has moved, and the desk looks as it would at any sign.
    let channel = reply::text(channel).unwrap_or_default();
    let names = worker.aside().wake().names(channel);
    if reply::text(kind).is_some() {
        names.iter().for_each(|name| worker.aside().on_sign(worker, name));
    }
    None
}
