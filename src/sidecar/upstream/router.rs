//! Which server a command goes to, and what happens while that changes.
//!
//! A slot moves to another node only when none of its commands is outstanding at the old one: until then its new commands wait
//! in the lobby, in order. So a connection's commands on one key are carried out in the order in which they were sent, also
//! across a failover or a migration.

use std::cell::{Cell, RefCell};
use std::rc::Rc;

use rustc_hash::FxHashMap;
use smallvec::SmallVec;

use super::heirs::Heir;
use super::lane::Lane;
use super::mux::Mux;
use super::node::NodeAddr;
use super::queue::{ANY_SLOT, Pending, Queue, Recovered, Retry};
use super::sink::{Answer, Sink};
use super::view::{SLOTS, View, ViewKind};
use crate::sidecar::exclusive::pool::Pool;
use crate::sidecar::patterns::cache_aside::recent::Deletion;
use crate::sidecar::worker::Worker;

/// How long a node that lost slots may take to answer what it still owes for them.
const HANDOVER_PATIENCE_MS: u64 = 500;
/// Commands that wait for a node to be known may take this much memory before clients are made to wait.
const LOBBY_FULL_BYTES: usize = 8 * 1024 * 1024;
const NOBODY: u16 = u16::MAX;

type Muxes = SmallVec<[(Lane, Rc<Mux>); 2]>;

/// One server and a worker's connections to it.
#[derive(Debug)]
pub struct Node {
    address: NodeAddr,
    muxes: RefCell<Muxes>,
    pool: Pool,
}

impl Node {
    /// Its address.
    pub fn address(&self) -> &NodeAddr {
        &self.address
    }

    /// The shared connection of `lane`, made at the first use.
    #[inline]
    pub fn mux(&self, worker: &Rc<Worker>, lane: Lane) -> Rc<Mux> {
        let mut muxes = self.muxes.borrow_mut();
        if let Some((_, mux)) = muxes.iter().find(|(other, mux)| *other == lane && !mux.is_retired()) {
            return mux.clone();
        }
        muxes.retain(|(_, mux)| !mux.is_retired());
        let mux = Mux::start(worker, self.address.clone(), lane);
        muxes.push((lane, mux.clone()));
        mux
    }

    /// The connections that one client at a time uses.
    pub fn pool(&self) -> &Pool {
        &self.pool
    }

    fn all_muxes(&self) -> Vec<Rc<Mux>> {
        self.muxes.borrow().iter().map(|(_, mux)| mux.clone()).collect()
    }
}

#[derive(Debug)]
enum RouteMap {
    Unknown,
    Single(Rc<Node>),
    Cluster { nodes: Vec<Rc<Node>>, owner: Box<[u16]> },
}

impl RouteMap {
    fn nodes(&self) -> &[Rc<Node>] {
        match self {
            Self::Unknown => &[],
            Self::Single(node) => std::slice::from_ref(node),
            Self::Cluster { nodes, .. } => nodes,
        }
    }

    #[inline]
    fn owner(&self, slot: u16) -> Option<&Rc<Node>> {
        match self {
            Self::Unknown => None,
            Self::Single(node) => Some(node),
            Self::Cluster { nodes, .. } if slot == ANY_SLOT => nodes.first(),
            Self::Cluster { nodes, owner } => nodes.get(usize::from(owner[usize::from(slot)])),
        }
    }
}

/// A change of owners that is under way.
#[derive(Debug)]
struct Handover {
    /// The slots that change; all of them where there are no slots.
    slots: Option<Box<[bool]>>,
    /// Connections that must answer what they owed at the change.
    waits: Vec<(Rc<Mux>, u64)>,
    until: u64,
}

/// A worker's view of the servers.
#[derive(Debug)]
pub struct Router {
    nodes: RefCell<FxHashMap<NodeAddr, Rc<Node>>>,
    map: RefCell<RouteMap>,
    /// How many replicas each primary has that are there.
    replicas: RefCell<FxHashMap<NodeAddr, usize>>,
    /// Whoever might take each primary's place.
    heirs: RefCell<FxHashMap<NodeAddr, Rc<[Heir]>>>,
    handovers: RefCell<Vec<Handover>>,
    handing_over: Cell<bool>,
    lobby: RefCell<Queue>,
}

impl Default for Router {
    fn default() -> Self {
        Self {
            nodes: RefCell::default(),
            map: RefCell::new(RouteMap::Unknown),
            replicas: RefCell::default(),
            heirs: RefCell::default(),
            handovers: RefCell::default(),
            handing_over: Cell::new(false),
            lobby: RefCell::default(),
        }
    }
}

impl Router {
    /// The node that serves `slot`. `None`: nobody is known to, or the slot is changing hands.
    #[inline]
    pub fn node_of(&self, slot: u16) -> Option<Rc<Node>> {
        if self.handing_over.get() && self.is_changing(slot) {
            return None;
        }
        self.map.borrow().owner(slot).cloned()
    }

    fn is_changing(&self, slot: u16) -> bool {
        self.handovers.borrow().iter().any(|change| change.concerns(slot))
    }

    /// The node at `address`, known or not.
    pub fn node_at(&self, address: &NodeAddr) -> Rc<Node> {
        let mut nodes = self.nodes.borrow_mut();
        let fresh = || Rc::new(Node { address: address.clone(), muxes: RefCell::default(), pool: Pool::default() });
        nodes.entry(address.clone()).or_insert_with(fresh).clone()
    }

    /// All primaries, in an order that only changes with the view.
    pub fn primaries(&self) -> Vec<Rc<Node>> {
        self.map.borrow().nodes().to_vec()
    }

    /// All primaries of a Cluster, each with a slot that it owns: a command for that slot finds its way also when another node
    /// takes the shard over. Empty without slots.
    pub fn shards(&self) -> Vec<(Rc<Node>, u16)> {
        let map = self.map.borrow();
        let RouteMap::Cluster { nodes, owner } = &*map else { return Vec::new() };
        let mut first = vec![None; nodes.len()];
        for (slot, index) in owner.iter().enumerate() {
            if let Some(place) = first.get_mut(usize::from(*index)) {
                place.get_or_insert(slot as u16);
            }
        }
        nodes.iter().zip(first).filter_map(|(node, slot)| Some((node.clone(), slot?))).collect()
    }

    /// Whether `node` is one of the primaries.
    pub fn serves(&self, node: &Rc<Node>) -> bool {
        self.map.borrow().nodes().iter().any(|other| Rc::ptr_eq(other, node))
    }

    /// Whether any server is known.
    pub fn is_usable(&self) -> bool {
        !self.map.borrow().nodes().is_empty()
    }

    /// Whether the server at `address` is part of the topology.
    pub fn knows(&self, address: &NodeAddr) -> bool {
        self.map.borrow().nodes().iter().any(|node| node.address() == address)
    }

    /// How many replicas of the primary at `address` are there, as far as is known, whether they follow it or not.
    pub fn replicas_at(&self, address: &NodeAddr) -> usize {
        self.replicas.borrow().get(address).copied().unwrap_or_default()
    }

    /// Whoever might take the place of the primary at `address`, reachable or not. `None`: the servers do not tell.
    pub fn heirs_at(&self, address: &NodeAddr) -> Option<Rc<[Heir]>> {
        self.heirs.borrow().get(address).cloned()
    }

    /// Whether [`Router::finish_handover`] may have something to do.
    #[inline]
    pub fn needs_attention(&self) -> bool {
        self.handing_over.get()
    }

    /// Queues a command until its slot has an owner.
    pub fn wait_in_lobby(&self, parts: &[&[u8]], pending: Pending) {
        self.lobby.borrow_mut().push(parts, pending);
    }

    /// Whether clients should wait before they send more to the lobby.
    pub fn is_lobby_full(&self) -> bool {
        self.lobby.borrow().held_bytes() > LOBBY_FULL_BYTES
    }

    /// Takes a new view of the servers.
    pub fn adopt(&self, worker: &Rc<Worker>, view: &View) {
        let fresh = match &view.kind {
            ViewKind::Unknown => return,
            ViewKind::Primary { node, .. } => RouteMap::Single(self.node_at(node)),
            ViewKind::Cluster(map) => {
                let nodes = map.primaries().iter().map(|address| self.node_at(address)).collect();
                let index = |slot| map.owner_index(slot as u16).map_or(NOBODY, |owner| owner as u16);
                RouteMap::Cluster { nodes, owner: (0..SLOTS).map(index).collect() }
            }
        };
        *self.replicas.borrow_mut() = match &view.kind {
            ViewKind::Unknown => FxHashMap::default(),
            ViewKind::Primary { node, replicas, .. } => std::iter::once((node.clone(), replicas.len())).collect(),
            ViewKind::Cluster(map) => {
                map.primaries().iter().enumerate().map(|(index, node)| (node.clone(), map.replicas(index).len())).collect()
            }
        };
        let heirs = |node: &Rc<Node>| Some((node.address().clone(), view.kind.heirs(node.address())?.into()));
        *self.heirs.borrow_mut() = fresh.nodes().iter().filter_map(heirs).collect();
        let old = self.map.replace(fresh);
        if self.begin_handover(worker, &old) {
            worker.aside().on_topology_change(worker);
            worker.tracking().on_topology_change(worker);
        }
        self.forget_old_nodes();
        if self.is_usable() {
            // What waited for an owner may have one now, also while other slots change hands: before newer commands reach it.
            let waiting = self.lobby.borrow_mut().drain();
            worker.resubmit_all(waiting);
        }
        self.finish_handover(worker);
    }

    /// Whether any slot changes hands.
    fn begin_handover(&self, worker: &Rc<Worker>, old: &RouteMap) -> bool {
        let map = self.map.borrow();
        let (mut slots, mut gained) = (vec![false; SLOTS], vec![false; SLOTS]);
        let mut losers: Vec<Rc<Node>> = Vec::new();
        let spans = if matches!(*map, RouteMap::Cluster { .. }) { SLOTS } else { 1 };
        for (slot, changes) in slots.iter_mut().enumerate().take(spans) {
            let (before, after) = (old.owner(slot as u16), map.owner(slot as u16));
            gained[slot] = after.is_some_and(|after| before.is_none_or(|before| !Rc::ptr_eq(before, after)));
            if let Some(before) = before
                && after.is_none_or(|after| !Rc::ptr_eq(before, after))
            {
                *changes = true;
                if !losers.iter().any(|loser| Rc::ptr_eq(loser, before)) {
                    losers.push(before.clone());
                }
            }
        }
        drop(map);
        let deletions = worker.aside().recent().deletions(spans == SLOTS, |slot| gained[usize::from(slot) % spans]);
        if losers.is_empty() && deletions.is_empty() {
            return false;
        }
        // Nothing is read at a new owner before it has deleted what it may have an older value of.
        deletions.iter().for_each(|deletion| slots[usize::from(deletion.slot) % spans] = true);
        let slots = matches!(*self.map.borrow(), RouteMap::Cluster { .. }).then(|| slots.into_boxed_slice());
        let mut handover = Handover { slots, waits: Vec::new(), until: worker.now() + HANDOVER_PATIENCE_MS };
        // What has not left goes to the new owner, before all that comes from now on.
        let mut unsent = Vec::new();
        for mux in losers.iter().flat_map(|node| node.all_muxes()) {
            unsent.extend(mux.take_unsent(|pending| pending.retry != Retry::Here && handover.concerns(pending.slot)));
            let mark = mux.mark();
            handover.waits.push((mux, mark));
        }
        self.delete_again(worker, &deletions, &mut handover);
        self.handovers.borrow_mut().push(handover);
        self.handing_over.set(true);
        self.return_to_lobby(unsent);
        true
    }

    /// Has new owners delete what was written lately; what they do not answer for holds the handover up, within its bounds.
    fn delete_again(&self, worker: &Rc<Worker>, deletions: &[Deletion], handover: &mut Handover) {
        if !deletions.is_empty() {
            let overflowed = worker.aside().recent().has_overflowed(worker.now());
            tracing::info!(commands = deletions.len(), overflowed, "deletes at new primaries what was written lately");
        }
        for deletion in deletions {
            let Some(node) = self.map.borrow().owner(deletion.slot).cloned() else { continue };
            let lane = Lane { database: deletion.database, ..Lane::default() };
            let mux = node.mux(worker, lane);
            let sink = Sink::Call(Box::new(|_, answer| {
                let error = match answer {
                    Answer::Reply(bytes) => bytes.strip_prefix(b"-").map(|error| String::from_utf8_lossy(error).into_owned()),
                    Answer::Failed(text) => Some(text.to_owned()),
                };
                if let Some(error) = error {
                    tracing::warn!(%error, "a new primary may serve values from before the last writes: it did not delete them");
                }
            }));
            mux.push(&[&deletion.wire], Pending::new(sink, deletion.slot, Retry::Safe, lane, worker.now()));
            let mark = mux.mark_all();
            handover.waits.push((mux, mark));
        }
    }

    /// Connections to nodes that serve nothing any more end once they owe nothing, by the tick.
    fn forget_old_nodes(&self) {
        let map = self.map.borrow();
        self.nodes.borrow_mut().retain(|_, node| {
            let serves = map.nodes().iter().any(|other| Rc::ptr_eq(other, node));
            serves || node.all_muxes().iter().any(|mux| !mux.is_retired())
        });
    }

    /// Ends the changes of owners for which all that was owed is answered, and sends what waited.
    pub fn finish_handover(&self, worker: &Rc<Worker>) {
        if self.handing_over.get() {
            let mut handovers = self.handovers.borrow_mut();
            let before = handovers.len();
            handovers.retain(|change| change.waits.iter().any(|(mux, mark)| !mux.has_passed(*mark)));
            self.handing_over.set(!handovers.is_empty());
            if handovers.len() == before {
                return;
            }
        }
        if !self.lobby.borrow().is_empty() && self.is_usable() {
            let waiting = self.lobby.borrow_mut().drain();
            worker.resubmit_all(waiting);
        }
    }

    /// Puts commands into the lobby that are older than all that wait there.
    pub fn return_to_lobby(&self, older: Vec<Recovered>) {
        if older.is_empty() {
            return;
        }
        let mut lobby = self.lobby.borrow_mut();
        let younger = lobby.drain();
        older.into_iter().chain(younger).for_each(|waiting| lobby.push(&[&waiting.bytes], waiting.pending));
    }

    /// What the worker's clock brings: patience ends, nodes that nobody needs go.
    pub fn tick(&self, worker: &Rc<Worker>) {
        let overdue: Vec<Rc<Mux>> = self.handovers.borrow().iter().flat_map(|change| change.overdue(worker)).collect();
        overdue.iter().for_each(|mux| mux.retire(worker));
        self.finish_handover(worker);
        self.retire_idle(worker);
        let nodes: Vec<Rc<Node>> = self.nodes.borrow().values().cloned().collect();
        let keys = worker.access().current();
        for mux in nodes.iter().flat_map(|node| node.all_muxes()) {
            mux.expire(worker);
            mux.renew_login(worker, &keys);
        }
        nodes.iter().for_each(|node| node.pool.close_idle(worker.now(), &keys));
        self.expire_lobby(worker);
    }

    /// Ends the connections of nodes that are in no view, and those for large replies that nobody uses, once they owe nothing.
    fn retire_idle(&self, worker: &Rc<Worker>) {
        let idle: Vec<Rc<Mux>> = {
            let (nodes, map) = (self.nodes.borrow(), self.map.borrow());
            let foreign = nodes.values().filter(|node| !map.nodes().iter().any(|other| Rc::ptr_eq(other, node)));
            foreign.flat_map(|node| node.all_muxes()).filter(|mux| mux.is_idle() && !mux.is_retired()).collect()
        };
        if !idle.is_empty() && self.is_usable() {
            idle.iter().for_each(|mux| mux.retire(worker));
            self.forget_old_nodes();
        }
        let left: Vec<Rc<Mux>> = {
            let nodes = self.nodes.borrow();
            nodes.values().flat_map(|node| node.all_muxes()).filter(|mux| !mux.is_retired() && mux.is_left(worker)).collect()
        };
        left.iter().for_each(|mux| mux.retire(worker));
    }

    fn expire_lobby(&self, worker: &Rc<Worker>) {
        let expired = self.lobby.borrow_mut().take_unsent(|pending| worker.is_patience_over(pending));
        expired.into_iter().for_each(|recovered| worker.fail_unreachable(recovered));
    }
}

impl Handover {
    fn concerns(&self, slot: u16) -> bool {
        match &self.slots {
            Some(slots) if slot != ANY_SLOT => slots[usize::from(slot)],
            Some(_) => false,
            None => true,
        }
    }

    /// The connections to give up: those to a server that hangs, and in the end those that are merely slow.
    fn overdue(&self, worker: &Worker) -> Vec<Rc<Mux>> {
        let now = worker.now();
        let late = |mux: &Mux| mux.silent_ms(now) >= HANDOVER_PATIENCE_MS || now >= self.until + worker.patience();
        let waits = self.waits.iter().filter(|(mux, mark)| now >= self.until && !mux.has_passed(*mark) && late(mux));
        waits.map(|(mux, _)| mux.clone()).collect()
    }
}
