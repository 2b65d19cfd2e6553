//! One worker: a thread's share of the clients, with everything on their data path local to it.

use std::cell::{Cell, RefCell};
use std::fmt;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use super::engine::observe::Forecast;
use super::exclusive::durable::Rounds;
use super::lapses::Lapses;
use super::meter::Meter;
use super::patterns::cache_aside::{self, Aside};
use super::patterns::observe;
use super::patterns::read_through::{self, Flights};
use super::patterns::write_through::Writes;
use super::policy::ActivePolicy;
use super::resp::{encode, reply};
use super::roster::Roster;
use super::session::{Ending, Session};
use super::tracking::Tracking;
use super::upstream::access::Access;
use super::upstream::bulk::BulkLanes;
use super::upstream::node::NodeAddr;
use super::upstream::queue::{Pending, Recovered};
use super::upstream::redirect::{Redirect, parse_redirect};
use super::upstream::router::Router;
use super::upstream::sink::{Answer, OnReply, Sink};
use super::versions::Versions;
use crate::policy::snapshot::Topology;
use tokio::runtime::Handle;

/// The size of the buffer into which all sockets of a worker are read.
pub const SCRATCH_BYTES: usize = 64 * 1024;
/// The worker's clock moves in steps of this length.
const TICK: Duration = Duration::from_millis(20);
/// How long a command waits before it is repeated at a server that was not ready for it.
const REPEAT_MS: u64 = 25;
/// How often the watched keys of idle clients are looked for.
const LOOK_MS: u64 = 1_000;
/// How long a command is tried whose client has closed its side. Not at all would be too short for one that has closed it right behind its
/// commands, and still reads. Longer is for nobody: most have given up, and what they wrote is not to come behind what they write anew.
const LEFT_MS: u64 = 2_000;
/// The most redirects that one command follows without a pause.
const MAX_HOPS: u8 = 8;
/// What keeps a command from being carried out that was sent to and fro for so long.
const ASTRAY: &str = "servers point at each other for its slot";

/// What a worker is told by the thread that watches files and servers.
pub trait Outside {
    /// Asks for a fresh look at the servers; cheap, coalesced, never waits.
    fn refresh_topology(&self);

    /// As [`Outside::refresh_topology`], where `node` is asked first: a redirection named it.
    fn refresh_from(&self, node: &NodeAddr);
}

/// One worker's state. Everything a client or a connection needs is reached from here, without locks.
pub struct Worker {
    access: RefCell<Access>,
    outside: Arc<dyn Outside + Send + Sync>,
    router: Router,
    policy: RefCell<Rc<ActivePolicy>>,
    scratch: Rc<RefCell<Vec<u8>>>,
    /// Where commands are drafted before they are sent.
    drafts: RefCell<(Vec<u8>, Vec<u8>)>,
    dirty: RefCell<Vec<Rc<Session>>>,
    sessions: RefCell<slab::Slab<Rc<Session>>>,
    /// Milliseconds since the worker began, moved by its tick.
    clock: Cell<u64>,
    repeats: RefCell<Vec<Repeat>>,
    flights: Flights,
    writes: Writes,
    rounds: Rounds,
    aside: Aside,
    forecast: RefCell<Forecast>,
    /// The runtime of the thread that asks origins.
    origins: Handle,
    random: RefCell<fastrand::Rng>,
    bulk_lanes: BulkLanes,
    roster: Arc<Roster>,
    tracking: Tracking,
    versions: Versions,
    lapses: Lapses,
    meter: Meter,
}

/// A command that waits to be sent again.
struct Repeat {
    due: u64,
    recovered: Recovered,
    /// What the client gets if patience ends first.
    error: Vec<u8>,
}

/// Errors of a server that did not carry a command out and may do so soon, or elsewhere.
enum Refused {
    Redirect(Redirect),
    NotNow,
    NotPrimary,
}

impl Worker {
    /// A worker under `policy`.
    pub fn new(
        policy: Rc<ActivePolicy>,
        access: Access,
        outside: Arc<dyn Outside + Send + Sync>,
        origins: Handle,
        roster: Arc<Roster>,
        meter: Meter,
    ) -> Rc<Self> {
        meter.adopt(&policy);
        Rc::new(Self {
            access: RefCell::new(access),
            outside,
            router: Router::default(),
            policy: RefCell::new(policy),
            scratch: Rc::new(RefCell::new(vec![0; SCRATCH_BYTES])),
            drafts: RefCell::default(),
            dirty: RefCell::default(),
            sessions: RefCell::default(),
            clock: Cell::new(1),
            repeats: RefCell::default(),
            flights: Flights::default(),
            writes: Writes::default(),
            rounds: Rounds::default(),
            aside: Aside::new(fastrand::u64(..)),
            forecast: RefCell::default(),
            origins,
            random: RefCell::new(fastrand::Rng::new()),
            bulk_lanes: BulkLanes::default(),
            roster,
            tracking: Tracking::default(),
            versions: Versions::default(),
            lapses: Lapses::default(),
            meter,
        })
    }

    /// Where commands go.
    #[inline]
    pub fn router(&self) -> &Router {
        &self.router
    }

    /// The policy in force.
    #[inline]
    pub fn policy(&self) -> Rc<ActivePolicy> {
        self.policy.borrow().clone()
    }

    /// Whether keys of any rule have versions in their names.
    #[inline]
    pub fn has_versions(&self) -> bool {
        self.policy.borrow().has_versions()
    }

    /// Whether any rule, whose keys have no versions, follows a database.
    #[inline]
    pub fn has_followed(&self) -> bool {
        self.policy.borrow().has_followed()
    }

    /// Puts another policy in force; commands that are under way keep what was decided.
    pub fn set_policy(&self, policy: Rc<ActivePolicy>, access: Access) {
        self.meter.adopt(&policy);
        *self.policy.borrow_mut() = policy;
        self.aside.on_policy_change();
        *self.access.borrow_mut() = access;
    }

    /// Whether keys have slots.
    #[inline]
    pub fn is_cluster(&self) -> bool {
        matches!(self.policy.borrow().topology(), Topology::Cluster { .. })
    }

    /// The keys for new connections.
    pub fn access(&self) -> Access {
        self.access.borrow().clone()
    }

    /// The buffer that sockets are read into. Borrowed only within one poll.
    #[inline]
    pub fn scratch(&self) -> Rc<RefCell<Vec<u8>>> {
        self.scratch.clone()
    }

    /// Which versions of keys are meant.
    pub fn versions(&self) -> &Versions {
        &self.versions
    }

    /// Which changes of databases may have been lost.
    pub fn lapses(&self) -> &Lapses {
        &self.lapses
    }

    /// What is being loaded.
    pub fn flights(&self) -> &Flights {
        &self.flights
    }

    /// What is on its way to origins.
    pub fn writes(&self) -> &Writes {
        &self.writes
    }

    /// What waits to become durable.
    #[inline]
    pub fn rounds(&self) -> &Rounds {
        &self.rounds
    }

    /// What is known of leases.
    #[inline]
    pub fn aside(&self) -> &Aside {
        &self.aside
    }

    /// What rules that only observe would have done.
    pub fn forecast(&self) -> &RefCell<Forecast> {
        &self.forecast
    }

    /// Where origins are asked.
    pub fn origins(&self) -> &Handle {
        &self.origins
    }

    /// Who uses the connections for large replies.
    pub fn bulk_lanes(&self) -> &BulkLanes {
        &self.bulk_lanes
    }

    /// What is counted.
    #[inline]
    pub fn metrics(&self) -> &Meter {
        &self.meter
    }

    /// Milliseconds since the worker began, to the tick.
    #[inline]
    pub fn now(&self) -> u64 {
        self.clock.get()
    }

    /// Chance, uniform over all of `u32`.
    pub fn random(&self) -> u32 {
        self.random.borrow_mut().u32(..)
    }

    /// Lends two buffers to draft commands in; their memory stays. Not to be nested.
    pub fn with_drafts<T>(&self, draft: impl FnOnce(&mut Vec<u8>, &mut Vec<u8>) -> T) -> T {
        let (mut first, mut second) = self.drafts.take();
        let result = draft(&mut first, &mut second);
        if first.capacity() + second.capacity() <= 4 * SCRATCH_BYTES {
            *self.drafts.borrow_mut() = (first, second);
        }
        result
    }

    /// Asks for a fresh look at the servers.
    pub fn refresh_topology(&self) {
        self.outside.refresh_topology();
    }

    /// Puts a session in the list of those to flush at the end of the turn.
    #[inline]
    pub fn mark_dirty(&self, session: Rc<Session>) {
        self.dirty.borrow_mut().push(session);
    }

    /// Writes to every client that got something in this turn.
    #[inline]
    pub fn flush_dirty(&self) {
        loop {
            let mut dirty = self.dirty.take();
            if dirty.is_empty() {
                return;
            }
            dirty.drain(..).for_each(|session| session.flush());
            let mut place = self.dirty.borrow_mut();
            if place.is_empty() {
                // Keeps the list's memory.
                *place = dirty;
                return;
            }
        }
    }

    /// What follows a connection's turn.
    #[inline]
    pub fn after_turn(self: &Rc<Self>) {
        if self.router.needs_attention() {
            self.router.finish_handover(self);
        }
    }

    /// Sends a command whose bytes are `parts` to the node that its slot belongs to. `false`: the session should pause.
    #[inline]
    pub fn submit(self: &Rc<Self>, parts: &[&[u8]], pending: Pending) -> bool {
        let Some(node) = self.router.node_of(pending.slot) else {
            self.router.wait_in_lobby(parts, pending);
            return !self.router.is_lobby_full();
        };
        let mux = node.mux(self, pending.lane);
        let session = pending.sink.session().cloned();
        mux.push(parts, pending);
        session.is_none_or(|session| !mux.is_full(&session))
    }

    /// Sends again what a lost connection or a change of owners gave back, oldest first, unless its patience has ended. What
    /// cannot be sent yet waits in front of what came later.
    pub fn resubmit_all(self: &Rc<Self>, all: Vec<Recovered>) {
        let mut early = Vec::new();
        for mut recovered in all {
            if self.is_patience_over(&recovered.pending) {
                self.fail_unreachable(recovered);
                continue;
            }
            if let Sink::Transaction(transaction) = &mut recovered.pending.sink {
                transaction.error = None;
            }
            match self.router.node_of(recovered.pending.slot) {
                None => early.push(recovered),
                Some(node) => {
                    self.meter.retry();
                    node.mux(self, recovered.pending.lane).push(&[&recovered.bytes], recovered.pending);
                }
            }
        }
        self.router.return_to_lobby(early);
    }

    /// Whether a command has been tried for as long as the policy allows, and its client is likely to wait.
    pub fn is_patience_over(&self, pending: &Pending) -> bool {
        let tried = self.now().saturating_sub(pending.since);
        let has_left = || pending.sink.session().is_some_and(|session| session.has_left());
        tried > self.patience() || (tried > LEFT_MS && has_left())
    }

    /// How long a command is tried where the policy allows it, in milliseconds.
    pub fn patience(&self) -> u64 {
        self.policy.borrow().patience().as_millis()
    }

    /// Tells a client that its command never left.
    pub fn fail_unreachable(self: &Rc<Self>, recovered: Recovered) {
        let text = self.unreachable_text();
        self.fail(recovered, &text);
    }

    /// Answers a command that no server answered. Where the cache is away, one client of this worker may load what a GET asked for.
    pub fn fail(self: &Rc<Self>, recovered: Recovered, text: &str) {
        if let Sink::Client { on_reply: OnReply::Lease(_) | OnReply::Early(_), .. } = &recovered.pending.sink {
            let mut error = Vec::new();
            encode::error(&mut error, text);
            return cache_aside::on_away(self, recovered, &error);
        }
        recovered.pending.sink.deliver(self, Answer::Failed(text));
    }

    /// The error for a command that never left. As all that clients are told, it names no server.
    pub fn unreachable_text(&self) -> String {
        let policy = self.policy.borrow();
        format!(
            "TRYAGAIN no server of {} could be reached for {}: the command was not sent, and can safely be repeated",
            policy.cluster_name(),
            policy.patience()
        )
    }

    /// The error for a command that never left because of `trouble` with its server.
    pub fn untouched_text(&self, trouble: &str) -> String {
        let patience = self.policy.borrow().patience();
        format!("TRYAGAIN {trouble}; it was tried for {patience}: the command was not sent, and can safely be repeated")
    }

    /// The error for a command for whose slot servers point at each other, tried for as long as the policy allows.
    pub fn astray_text(&self) -> String {
        self.untouched_text(ASTRAY)
    }

    /// What becomes of a command whose reply is an error, or a miss that starts a load. `overtaken` says that a later command of
    /// the same client for the same slot may be carried out before this one could be repeated.
    pub fn on_unusual_reply(self: &Rc<Self>, node: &NodeAddr, recovered: Recovered, reply: &[u8], overtaken: bool) {
        if let Sink::Client { session, sequence, on_reply } = &recovered.pending.sink
            && reply.first() != Some(&b'-')
        {
            match *on_reply {
                OnReply::Fill(rule) | OnReply::FillZero(rule) | OnReply::FillHash(rule) => {
                    return read_through::on_miss(self, rule, recovered, reply);
                }
                OnReply::FillMany => {
                    let (session, lane) = (session.clone(), recovered.pending.lane);
                    let place = read_through::Place { session, sequence: *sequence, lane };
                    return read_through::complete_mget(self, place, &recovered.bytes, reply);
                }
                OnReply::Lease(rule) if reply::is_null(reply) => {
                    return cache_aside::on_miss(self, rule, recovered, reply, overtaken);
                }
                OnReply::Lease(rule) => return cache_aside::on_seen(self, rule, recovered, reply),
                OnReply::Early(rule) => return cache_aside::on_early(self, rule, recovered, reply, overtaken),
                OnReply::Watch(_) | OnReply::WatchMany => observe::on_reply(session, &recovered.bytes, reply),
                OnReply::Pass | OnReply::Count(_) => {}
            }
        }
        let error = match &recovered.pending.sink {
            Sink::Transaction(transaction) => transaction.failure(reply).unwrap_or(reply).to_vec(),
            _ => reply.to_vec(),
        };
        match classify(&error, node, self.is_cluster()) {
            None => recovered.pending.sink.deliver(self, Answer::Reply(reply)),
            Some(Refused::Redirect(redirect)) if recovered.pending.hops >= MAX_HOPS => {
                self.repeat_lost(recovered, &redirect, overtaken);
            }
            Some(Refused::Redirect(redirect)) => self.follow(recovered, redirect),
            Some(refused) => {
                tracing::debug!(%node, error = %String::from_utf8_lossy(&error).trim_end(), "a server does not serve now");
                if matches!(refused, Refused::NotPrimary) {
                    self.refresh_topology();
                }
                self.repeat_later(recovered, reply, overtaken);
            }
        }
    }

    /// Servers point at each other for its slot, as where one of the two between which it moves key by key fails over: they will agree.
    fn repeat_lost(self: &Rc<Self>, mut recovered: Recovered, redirect: &Redirect, overtaken: bool) {
        self.meter.redirect();
        self.outside.refresh_from(&redirect.node);
        (recovered.pending.hops, recovered.pending.asking) = (0, false);
        if let Sink::Transaction(transaction) = &mut recovered.pending.sink {
            // It names a server.
            transaction.error = None;
        }
        let text = if overtaken {
            format!(
                "TRYAGAIN {ASTRAY}, and later commands of this connection may be ahead of it: the command was not sent, and can safely \
                 be repeated"
            )
        } else {
            self.astray_text()
        };
        let mut error = Vec::new();
        encode::error(&mut error, &text);
        self.repeat_later(recovered, &error, overtaken);
    }

    fn follow(self: &Rc<Self>, mut recovered: Recovered, redirect: Redirect) {
        self.meter.redirect();
        if !redirect.ask {
            self.outside.refresh_from(&redirect.node);
        }
        recovered.pending.hops += 1;
        recovered.pending.asking = redirect.ask;
        if let Sink::Transaction(transaction) = &mut recovered.pending.sink {
            transaction.error = None;
        }
        let mux = self.router.node_at(&redirect.node).mux(self, recovered.pending.lane);
        mux.push(&[&recovered.bytes], recovered.pending);
    }

    /// Repeats a command that a server refused for now, where no later command of its client can have overtaken it. Until then
    /// no more is read from the client.
    fn repeat_later(self: &Rc<Self>, recovered: Recovered, reply: &[u8], overtaken: bool) {
        if overtaken || self.is_patience_over(&recovered.pending) {
            return recovered.pending.sink.deliver(self, Answer::Reply(reply));
        }
        if self.router.node_of(recovered.pending.slot).is_none() {
            // Its slot is changing hands: later commands of its client may wait in the lobby, and must stay behind it.
            return self.router.return_to_lobby(vec![recovered]);
        }
        if let Some(session) = recovered.pending.sink.session() {
            session.hold();
        }
        let due = self.now() + REPEAT_MS;
        self.repeats.borrow_mut().push(Repeat { due, recovered, error: reply.to_vec() });
    }

    fn run_repeats(self: &Rc<Self>) {
        let now = self.now();
        let (due, later): (Vec<Repeat>, Vec<Repeat>) = self.repeats.take().into_iter().partition(|repeat| repeat.due <= now);
        *self.repeats.borrow_mut() = later;
        for repeat in due {
            let session = repeat.recovered.pending.sink.session().cloned();
            if self.is_patience_over(&repeat.recovered.pending) {
                repeat.recovered.pending.sink.deliver(self, Answer::Reply(&repeat.error));
            } else {
                self.resubmit_all(vec![repeat.recovered]);
            }
            if let Some(session) = session {
                session.release();
            }
        }
    }

    /// Moves the clock, and does what time brings. Runs for as long as the worker.
    pub async fn tick_forever(self: Rc<Self>) {
        let (began, mut look_at) = (tokio::time::Instant::now(), LOOK_MS);
        let mut ticks = tokio::time::interval(TICK);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            ticks.tick().await;
            self.clock.set(reading(began.elapsed()));
            if !self.repeats.borrow().is_empty() {
                self.run_repeats();
            }
            self.router.tick(&self);
            self.aside.tick(&self);
            self.tracking.tick();
            if self.now() >= look_at {
                look_at = self.now() + LOOK_MS;
                self.expire_watches();
            }
            self.flush_dirty();
        }
    }

    /// For how long a silent client's transaction may hold a server connection, in milliseconds.
    pub fn idle_transaction(&self) -> u64 {
        self.policy.borrow().idle_transaction().as_millis()
    }

    /// Takes the connections back on which idle clients have keys watched.
    fn expire_watches(&self) {
        let deadline = self.now().saturating_sub(self.idle_transaction());
        self.sessions.borrow().iter().for_each(|(_, session)| session.held().borrow_mut().expire_watch(deadline));
    }

    /// Enters a session in the list of live ones.
    pub fn register(&self, session: &Rc<Session>) -> usize {
        self.meter.client_came();
        self.sessions.borrow_mut().insert(session.clone())
    }

    /// Strikes a session from the list.
    pub fn unregister(&self, place: usize) {
        self.meter.client_left();
        let session = self.sessions.borrow_mut().remove(place);
        observe::on_end(self, session.id());
    }

    /// How many clients there are.
    pub fn clients(&self) -> usize {
        self.sessions.borrow().len()
    }

    /// What is known of clients that track what they have read.
    pub fn tracking(&self) -> &Tracking {
        &self.tracking
    }

    /// All workers, this one included.
    pub fn roster(&self) -> &Arc<Roster> {
        &self.roster
    }

    /// Shows every session.
    pub fn each_session(&self, mut look: impl FnMut(&Rc<Session>)) {
        self.sessions.borrow().iter().for_each(|(_, session)| look(session));
    }

    /// Has every session end, once its commands are answered or at once.
    pub fn end_sessions(&self, ending: Ending) {
        self.sessions.borrow().iter().for_each(|(_, session)| session.end(ending));
    }
}

/// What the clock shows when the worker has run for `elapsed`. Never 0: that is before any worker began.
fn reading(elapsed: Duration) -> u64 {
    elapsed.as_millis() as u64 + 1
}

fn classify(error: &[u8], asked: &NodeAddr, cluster: bool) -> Option<Refused> {
    /// The servers' own words: a script's error of the same code means something else, and must not run the script again.
    const NOT_NOW: [&[u8]; 5] = [
        b"-TRYAGAIN Multiple keys request during rehashing",
        b"-CLUSTERDOWN ",
        b"-LOADING Redis is loading",
        b"-LOADING Valkey is loading",
        b"-MASTERDOWN Link with MASTER is down",
    ];
    if error.starts_with(b"-MOVED ") || error.starts_with(b"-ASK ") {
        return parse_redirect(error, asked).map(Refused::Redirect);
    }
    if !cluster && error.starts_with(b"-READONLY You can't write against a read only replica") {
        return Some(Refused::NotPrimary);
    }
    NOT_NOW.iter().any(|words| error.starts_with(words)).then_some(Refused::NotNow)
}

impl fmt::Debug for Worker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Worker").field("clients", &self.clients()).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_clock_goes_on_after_fifty_days() {
        let day = Duration::from_secs(86_400);
        assert_eq!(reading(day * 50) - reading(day * 49), 86_400_000);
        assert_eq!(reading(day * 3650) - reading(Duration::ZERO), 3650 * 86_400_000);
    }
}
