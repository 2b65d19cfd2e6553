//! CLIENT TRACKING: clients that keep what they have read hear when it changes.
//!
//! Reads go their usual ways, by rules and over shared connections, of which a server knows only the sidecar. So a worker has a
//! connection of its own to each primary ([`tracker`]) on which the server tells of changes, while any of its clients wants to hear of
//! them. Before a read is handed on, its keys are registered there ([`table`]): `TYPE` reads a key and touches nothing. The client
//! alone waits for that, and only for keys that are not registered already.
//!
//! A reply and a message about it come on different connections. A message that comes while a read of its key is under way is told
//! at once and, since the reply may be older, again behind the reply. What is read in other ways than by one command on the shared
//! connections (within transactions, by scripts that may write), or may be something else than the live key's value (a stale copy, a
//! load), is never registered: behind its reply the client is told that it has changed, and keeps nothing.
//!
//! Where it is no longer sure that a server would tell (a connection is lost, a primary, a slot moves, too many keys), clients are told
//! to forget all they have, as after FLUSHALL.

pub mod mode;
mod redirect;
mod table;
mod tracker;

use std::cell::{Cell, RefCell};
use std::fmt;
use std::rc::Rc;
use std::time::Duration;

use rustc_hash::FxHashMap;
use tokio::time::timeout;

use self::mode::Mode;
use self::redirect::Redirected;
pub use self::table::TrackerId;
use self::table::{Asked, ClientId, MOST_KEYS_PER_CLIENT, Table};
use self::tracker::{Kind, Tracker};
use crate::sidecar::commands::{self, Access, Class, CommandSpec, Effect};
use crate::sidecar::resp::{CommandArgs, Protocol, encode};
use crate::sidecar::session::Session;
use crate::sidecar::slots::{self, is_larder_key};
use crate::sidecar::upstream::node::NodeAddr;
use crate::sidecar::upstream::queue::ANY_SLOT;
use crate::sidecar::worker::Worker;

/// The channel whose subscribers get other clients' messages under RESP2.
const CHANNEL: &[u8] = b"__redis__:invalidate";
/// So many keys that a client has read on a connection of its own are named behind the reply; of more it forgets all.
const MOST_NAMED: usize = 1024;
/// So many messages wait for replies that are under way; where there are more, their clients forget all.
const MOST_LATER: usize = 65_536;

/// What a client is told: that these keys have changed, or, if absent, that any may have.
type Changed = Option<Vec<Vec<u8>>>;

/// What a client that tracks has asked for, and how far its next command is.
#[derive(Debug, Default)]
pub struct Tracks {
    mode: Mode,
    /// What CLIENT CACHING said of the next command.
    caching: Option<bool>,
    /// The client that it redirects to is gone.
    broken: bool,
    /// What that one is still to be told.
    redirected: Rc<Redirected>,
    /// How many of its next command's keys are being registered.
    waits: usize,
    /// Whether all that could be done for its next command is done.
    ready: bool,
    /// What it has read on a connection of its own.
    apart: Vec<Vec<u8>>,
    /// Whether that may have been anything.
    apart_all: bool,
}

/// A message for a client, when the reply at a place has left.
#[derive(Debug)]
struct Later {
    session: Rc<Session>,
    place: u32,
    changed: Changed,
}

/// What a worker knows of its clients that track.
#[derive(Default)]
pub struct Tracking {
    table: RefCell<Table>,
    clients: RefCell<FxHashMap<ClientId, Rc<Session>>>,
    trackers: RefCell<FxHashMap<(NodeAddr, Kind), Rc<Tracker>>>,
    later: RefCell<Vec<Later>>,
    next_tracker: Cell<TrackerId>,
}

/// The next command of a client that tracks is about to be handed on. `false`: not yet; the client's task is woken.
pub fn before(session: &Rc<Session>, args: &CommandArgs<'_>) -> bool {
    let Ok(spec) = commands::resolve(args) else { return true };
    if !passes_keys(spec, args) {
        return true;
    }
    let (tracked, broadcast, ready) = {
        let mut tracks = session.tracks().borrow_mut();
        let Some(tracks) = tracks.as_deref_mut() else { return true };
        let ready = std::mem::take(&mut tracks.ready);
        let tracked = tracks.mode.tracks(tracks.caching);
        (tracked, tracks.mode.broadcast, ready)
    };
    let worker = session.worker();
    let tracking = worker.tracking();
    if tracked && reads_in_place(spec, args) && !broadcast && !ready && !tracking.register(worker, session, spec, args) {
        return false;
    }
    if let Some(tracks) = session.tracks().borrow_mut().as_deref_mut() {
        tracks.caching = None;
    }
    if tracked {
        tracking.hand_on(worker, session, spec, args, broadcast);
    }
    true
}

/// Whether the command is one that what CLIENT CACHING said is about: not CLIENT itself, nor what begins a transaction.
fn passes_keys(spec: &CommandSpec, args: &CommandArgs<'_>) -> bool {
    match spec.class {
        Class::Connection | Class::Transaction | Class::PubSub | Class::Refused(_) => false,
        Class::Blocking => !spec.blocks(args),
        _ => true,
    }
}

/// Whether the command reads keys, on the shared connections.
fn reads_in_place(spec: &CommandSpec, args: &CommandArgs<'_>) -> bool {
    let passes = matches!(spec.class, Class::Data | Class::Split(_) | Class::Script)
        || (spec.class == Class::Blocking && !spec.blocks(args));
    passes && spec.access == Access::Read
}

/// The keys of a command, each once.
fn keys_of<'a>(spec: &CommandSpec, args: &CommandArgs<'a>) -> Vec<&'a [u8]> {
    let keys = spec.keys(args).unwrap_or_default();
    let keys = keys.iter().filter(|at| at.effect != Effect::Route).filter_map(|at| args.get(at.index as usize));
    let mut keys: Vec<&[u8]> = keys.filter(|key| !is_larder_key(key)).collect();
    keys.sort_unstable();
    keys.dedup();
    keys
}

/// Whether a read of the key may be answered with something else than what the key holds.
fn may_differ(worker: &Worker, key: &[u8]) -> bool {
    let policy = worker.policy();
    let rule = policy.find(key);
    policy.loads(rule) || policy.leases(rule)
}

/// A client that tracks reads on a connection of its own: what that changes it is told of behind the replies.
#[cold]
pub fn reads_apart(session: &Session, spec: &CommandSpec, args: &CommandArgs<'_>) {
    if spec.access != Access::Read && spec.class != Class::Script {
        return;
    }
    if let Some(tracks) = session.tracks().borrow_mut().as_deref_mut()
        && tracks.mode.tracks(tracks.caching)
    {
        let keys = keys_of(spec, args).into_iter().filter(|key| !tracks.mode.broadcast || tracks.mode.wants(key));
        tracks.apart.extend(keys.map(<[u8]>::to_vec));
        tracks.apart.truncate(MOST_NAMED + 1);
    }
}

/// A client that tracks reads keys that are too long to be named.
#[cold]
pub fn reads_unnamed(session: &Session, spec: &CommandSpec) {
    if let Some(tracks) = session.tracks().borrow_mut().as_deref_mut() {
        tracks.apart_all |= spec.access == Access::Read || spec.class == Class::Script;
    }
}

/// The client goes back to the shared connections, all its commands being answered.
#[cold]
pub fn comes_back(session: &Rc<Session>) {
    let (apart, all) = {
        let mut tracks = session.tracks().borrow_mut();
        let Some(tracks) = tracks.as_deref_mut() else { return };
        tracks.caching = None;
        (std::mem::take(&mut tracks.apart), std::mem::take(&mut tracks.apart_all))
    };
    if all || !apart.is_empty() {
        let changed = (!all && apart.len() <= MOST_NAMED).then_some(apart);
        session.worker().tracking().tell_behind(session, session.last_place(), changed);
    }
}

impl Tracking {
    /// Has a client track. Its trackers stand then, or the servers are away.
    ///
    /// # Errors
    /// The text of a server's refusal.
    pub async fn begin(&self, worker: &Rc<Worker>, session: &Rc<Session>, mode: Mode) -> Result<(), String> {
        if session.is_closed() {
            return Ok(());
        }
        let kind = if mode.broadcast { Kind::Broadcast } else { Kind::Reads };
        self.clients.borrow_mut().insert(session.id(), session.clone());
        let fresh = Tracks { mode, ..Tracks::default() };
        session.set_tracks(Some(Box::new(fresh)));
        self.adjust();
        let patience = Duration::from_millis(worker.patience());
        let mut refused = None;
        for node in worker.router().primaries() {
            let tracker = self.tracker(worker, node.address(), kind);
            // A server that is away has nothing that a client could have read.
            if let Ok(Err(text)) = timeout(patience, tracker.stands()).await {
                refused = Some(text);
            }
        }
        match refused {
            Some(text) => {
                self.end(session);
                Err(text)
            }
            None => Ok(()),
        }
    }

    /// Has a client track no more.
    pub fn end(&self, session: &Rc<Session>) {
        if self.clients.borrow_mut().remove(&session.id()).is_none() {
            return;
        }
        session.set_tracks(None);
        self.table.borrow_mut().leave(session.id());
        self.later.borrow_mut().retain(|later| !Rc::ptr_eq(&later.session, session));
        self.adjust();
    }

    /// Trackers learn which prefixes are wanted, and that they are wanted no more.
    fn adjust(&self) {
        self.trackers.borrow().values().for_each(|tracker| tracker.adjust(self));
    }

    /// Whether anybody needs trackers of this kind.
    fn is_wanted(&self, worker: &Worker, kind: Kind) -> bool {
        if kind == Kind::Versions {
            return worker.has_versions();
        }
        let wants = |session: &Rc<Session>| {
            let tracks = session.tracks().borrow();
            tracks.as_deref().is_some_and(|tracks| tracks.mode.broadcast == (kind == Kind::Broadcast))
        };
        self.clients.borrow().values().any(wants)
    }

    /// The prefixes of all clients, none of which begins another.
    fn prefixes(&self) -> Vec<Vec<u8>> {
        let mut all: Vec<Vec<u8>> = Vec::new();
        for session in self.clients.borrow().values() {
            if let Some(tracks) = session.tracks().borrow().as_deref() {
                all.extend(tracks.mode.prefixes.iter().cloned());
            }
        }
        all.sort_unstable();
        let mut least: Vec<Vec<u8>> = Vec::new();
        for prefix in all {
            if least.last().is_none_or(|last| !prefix.starts_with(last)) {
                least.push(prefix);
            }
        }
        least
    }

    /// The tracker of a server, made where there is none.
    fn tracker(&self, worker: &Rc<Worker>, node: &NodeAddr, kind: Kind) -> Rc<Tracker> {
        let mut trackers = self.trackers.borrow_mut();
        let start = || Tracker::start(worker, node.clone(), kind, self.fresh_id());
        trackers.entry((node.clone(), kind)).or_insert_with(start).clone()
    }

    fn fresh_id(&self) -> TrackerId {
        let id = self.next_tracker.get() + 1;
        self.next_tracker.set(id);
        id
    }

    /// Has the servers told of the keys that a command is about to read. `false`: the client waits for that.
    fn register(&self, worker: &Rc<Worker>, session: &Rc<Session>, spec: &CommandSpec, args: &CommandArgs<'_>) -> bool {
        let keys = keys_of(spec, args);
        if self.table.borrow().is_full(keys.len()) {
            self.forget(|_, _, asked| !asked);
        }
        if self.table.borrow().held_by(session.id()) + keys.len() > MOST_KEYS_PER_CLIENT {
            self.table.borrow_mut().leave(session.id());
            self.tell(session, None, None);
        }
        let mut waits = 0;
        for key in keys.into_iter().take(MOST_KEYS_PER_CLIENT).filter(|key| !may_differ(worker, key)) {
            let slot = if worker.is_cluster() { slots::slot_of(key) } else { ANY_SLOT };
            let Some(node) = worker.router().node_of(slot) else { continue };
            let tracker = self.tracker(worker, node.address(), Kind::Reads);
            if tracker.is_refused() {
                continue;
            }
            let known = self.table.borrow().tracker_of(key);
            if let Some(other) = known.filter(|known| *known != tracker.id()) {
                self.forget(|_, known, _| known == other);
            }
            let asked = self.table.borrow_mut().ask(key, tracker.id(), session.id());
            if asked == Asked::Waits(true) {
                tracker.register(key);
            }
            waits += usize::from(asked != Asked::Tracked);
        }
        if waits > 0
            && let Some(tracks) = session.tracks().borrow_mut().as_deref_mut()
        {
            tracks.waits = waits;
            session.hold();
        }
        waits == 0
    }

    /// Keys that a client waits for are registered, or cannot be.
    fn release(&self, waiters: impl IntoIterator<Item = ClientId>) {
        for id in waiters {
            let Some(session) = self.clients.borrow().get(&id).cloned() else { continue };
            let mut tracks = session.tracks().borrow_mut();
            if let Some(tracks) = tracks.as_deref_mut().filter(|tracks| tracks.waits > 0) {
                tracks.waits -= 1;
                if tracks.waits == 0 {
                    tracks.ready = true;
                    session.release();
                }
            }
        }
    }

    /// A command is handed on: who read what is remembered, or told behind the reply.
    fn hand_on(&self, worker: &Rc<Worker>, session: &Rc<Session>, spec: &CommandSpec, args: &CommandArgs<'_>, broadcast: bool) {
        let place = session.next_place();
        let mut untold = Vec::new();
        if reads_in_place(spec, args) {
            for key in keys_of(spec, args) {
                let differs = may_differ(worker, key);
                let told = !differs && (broadcast || self.table.borrow_mut().hold(key, session.id(), place));
                if !told {
                    untold.push(key.to_vec());
                }
            }
        } else if spec.class == Class::Script {
            untold.extend(keys_of(spec, args).into_iter().map(<[u8]>::to_vec));
        }
        if !untold.is_empty() {
            self.tell_behind(session, place, Some(untold));
        }
    }

    /// Has the server of a version told when that changes: what a worker was told of it is then forgotten at once. `known`: the tracker that was asked
    /// for it last. Which one it is, where there is one that tells.
    pub fn watch_version(&self, worker: &Rc<Worker>, key: &[u8], known: Option<TrackerId>) -> Option<TrackerId> {
        let slot = if worker.is_cluster() { slots::slot_of(key) } else { ANY_SLOT };
        let node = worker.router().node_of(slot)?;
        let tracker = self.tracker(worker, node.address(), Kind::Versions);
        if tracker.is_refused() {
            return None;
        }
        if known != Some(tracker.id()) {
            tracker.register(key);
        }
        Some(tracker.id())
    }

    /// A server has answered a question.
    fn on_registered(&self, key: &[u8], tracker: TrackerId, tracked: bool) {
        let waiters = self.table.borrow_mut().answered(key, tracker, tracked);
        self.release(waiters);
    }

    /// A server tells of changes.
    fn on_changes(&self, worker: &Worker, tracker: &Tracker, keys: &[&[u8]]) {
        if tracker.kind() == Kind::Versions {
            return keys.iter().for_each(|key| worker.versions().on_change(key));
        }
        let keys = keys.iter().copied().filter(|key| !is_larder_key(key));
        match tracker.kind() {
            Kind::Reads => keys.for_each(|key| self.on_change(key, tracker.id())),
            Kind::Broadcast => self.broadcast(&keys.collect::<Vec<_>>()),
            Kind::Versions => {}
        }
    }

    fn on_change(&self, key: &[u8], tracker: TrackerId) {
        let holders = self.table.borrow_mut().invalidated(key, tracker);
        for (id, place) in holders {
            let session = self.clients.borrow().get(&id).cloned();
            if let Some(session) = session {
                self.tell(&session, Some(vec![key.to_vec()]), Some(place));
            }
        }
    }

    fn broadcast(&self, keys: &[&[u8]]) {
        for session in self.each(|mode| mode.broadcast) {
            let own: Vec<Vec<u8>> = {
                let tracks = session.tracks().borrow();
                let Some(tracks) = tracks.as_deref() else { continue };
                keys.iter().filter(|key| tracks.mode.wants(key)).map(|key| key.to_vec()).collect()
            };
            if !own.is_empty() {
                self.tell(&session, Some(own), None);
            }
        }
    }

    /// The clients whose mode fits.
    fn each(&self, fits: impl Fn(&Mode) -> bool) -> Vec<Rc<Session>> {
        let fits = |session: &&Rc<Session>| session.tracks().borrow().as_deref().is_some_and(|tracks| fits(&tracks.mode));
        self.clients.borrow().values().filter(fits).cloned().collect()
    }

    /// A server was emptied: as there, all who track hear of it.
    fn on_flush(&self, worker: &Rc<Worker>, tracker: &Tracker) {
        if tracker.kind() == Kind::Versions {
            return worker.versions().on_flush();
        }
        let (id, broadcast) = (tracker.id(), tracker.kind() == Kind::Broadcast);
        self.table.borrow_mut().forget(|_, known, asked| known == id && !asked);
        self.each(|mode| mode.broadcast == broadcast).iter().for_each(|session| self.tell(session, None, None));
        worker.flush_dirty();
    }

    /// A tracker's connection is lost, or its server tells of another set of keys.
    fn on_loss(&self, worker: &Rc<Worker>, id: TrackerId, kind: Kind) {
        match kind {
            Kind::Reads => self.forget(|_, known, _| known == id),
            Kind::Broadcast => self.each(|mode| mode.broadcast).iter().for_each(|session| self.tell(session, None, None)),
            // What is registered there no more is so at the next question.
            Kind::Versions => {}
        }
        worker.flush_dirty();
    }

    /// Forgets keys; who has read any of them forgets all.
    fn forget(&self, gone: impl FnMut(&[u8], TrackerId, bool) -> bool) {
        let (waiters, holders) = self.table.borrow_mut().forget(gone);
        for id in holders {
            let session = self.clients.borrow().get(&id).cloned();
            if let Some(session) = session {
                self.tell(&session, None, None);
            }
        }
        self.release(waiters);
    }

    /// Servers have changed places: what another has now, nobody tells of.
    pub fn on_topology_change(&self, worker: &Rc<Worker>) {
        if self.clients.borrow().is_empty() {
            return;
        }
        let nodes: FxHashMap<TrackerId, NodeAddr> =
            self.trackers.borrow().values().map(|tracker| (tracker.id(), tracker.node().clone())).collect();
        let cluster = worker.is_cluster();
        self.forget(|key, tracker, _| {
            let slot = if cluster { slots::slot_of(key) } else { ANY_SLOT };
            let owner = worker.router().node_of(slot);
            owner.is_none_or(|owner| nodes.get(&tracker) != Some(owner.address()))
        });
        for kind in [Kind::Reads, Kind::Broadcast].into_iter().filter(|kind| self.is_wanted(worker, *kind)) {
            worker.router().primaries().iter().for_each(|node| drop(self.tracker(worker, node.address(), kind)));
        }
        self.each(|mode| mode.broadcast).iter().for_each(|session| self.tell(session, None, None));
    }

    /// Tells a client of changes: now, and again where a read is under way that may show what was before. `place`: of its last read.
    fn tell(&self, session: &Rc<Session>, changed: Changed, place: Option<u32>) {
        let place = place.unwrap_or_else(|| session.last_place());
        send(session, &changed);
        if session.is_unanswered(place) {
            self.tell_behind(session, place, changed);
        }
    }

    fn tell_behind(&self, session: &Rc<Session>, place: u32, changed: Changed) {
        let mut later = self.later.borrow_mut();
        if later.len() >= MOST_LATER {
            let session_of = |later: &Later| Rc::ptr_eq(&later.session, session);
            later.retain(|waiting| !session_of(waiting));
            return later.push(Later { session: session.clone(), place, changed: None });
        }
        later.push(Later { session: session.clone(), place, changed });
    }

    /// Tells what had to wait for replies. Called with each tick of the worker.
    #[inline]
    pub fn tick(&self) {
        if !self.later.borrow().is_empty() {
            self.run_later();
        }
    }

    #[cold]
    fn run_later(&self) {
        let all = self.later.take();
        let (waiting, due): (Vec<Later>, Vec<Later>) =
            all.into_iter().partition(|later| later.session.is_unanswered(later.place));
        self.later.borrow_mut().extend(waiting);
        due.into_iter().filter(|later| later.session.is_tracking()).for_each(|later| send(&later.session, &later.changed));
    }
}

/// Sends a message to whom the client has chosen.
fn send(session: &Rc<Session>, changed: &Changed) {
    let redirect = {
        let tracks = session.tracks().borrow();
        tracks.as_deref().and_then(|tracks| Some((tracks.mode.redirect?, tracks.redirected.clone())))
    };
    match redirect {
        None => deliver(session, changed, false),
        Some((target, redirected)) => redirect::send(session, &redirected, target, changed.clone()),
    }
}

/// `redirected`: the client gets another's message, which under RESP2 is one of a channel.
fn deliver(session: &Rc<Session>, changed: &Changed, redirected: bool) {
    let protocol = session.protocol();
    let mut frame = Vec::new();
    match protocol {
        Protocol::Resp3 => frame.extend_from_slice(b">2\r\n$10\r\ninvalidate\r\n"),
        Protocol::Resp2 if redirected && session.held().borrow().is_subscribed() => {
            encode::array(&mut frame, 3);
            encode::bulk(&mut frame, b"message");
            encode::bulk(&mut frame, CHANNEL);
        }
        // As by a server: nowhere.
        Protocol::Resp2 => return,
    }
    match changed {
        None => encode::null(&mut frame, protocol),
        Some(keys) => {
            encode::array(&mut frame, keys.len());
            keys.iter().for_each(|key| encode::bulk(&mut frame, key));
        }
    }
    session.deliver_push(&frame);
}

impl Tracks {
    /// What the client has asked for.
    pub fn mode(&self) -> &Mode {
        &self.mode
    }

    /// What CLIENT CACHING said of the next command.
    pub fn caching(&self) -> Option<bool> {
        self.caching
    }

    /// CLIENT CACHING says something.
    pub fn set_caching(&mut self, caching: bool) {
        self.caching = Some(caching);
    }

    /// Whether the client that it redirects to is gone.
    pub fn is_broken(&self) -> bool {
        self.broken
    }
}

impl fmt::Debug for Tracking {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tracking").field("clients", &self.clients.borrow().len()).finish_non_exhaustive()
    }
}
