//! Cache-aside: the application loads and stores; Larder sees to it that one loads and that nothing old is stored.
//!
//! The decisions are [`engine::lease`](crate::sidecar::engine::lease)'s. Here is what they need: a plain GET goes first, and only
//! its nil comes here. Reads that the desk keeps are *parked*: their replies come later, while the session reads on. Any other
//! command of the same session has them answered before it is handed on, so that nothing waits behind a parked read.

mod effects;
mod reads;
pub mod recent;
pub mod scripts;
pub mod tokens;
pub mod wake;
pub mod writes;

use std::cell::{Cell, RefCell};
use std::fmt;
use std::rc::Rc;

use rustc_hash::FxHashMap;

pub use reads::{Wanted, ask_many, before_get, on_away, on_early, on_miss, on_nil_told, on_seen};
pub use writes::note_life;

use self::reads::Read;
use self::recent::Recent;
use self::wake::Wake;
use crate::policy::AtWaitEnd;
use crate::sidecar::dispatch::Request;
use crate::sidecar::engine::early::Early;
use crate::sidecar::engine::lease::{self, Asker, Command, Desk, Effect, Millis, Name, Rule, key_hash};
use crate::sidecar::policy::{ActivePolicy, RuleId};
use crate::sidecar::resp::Protocol;
use crate::sidecar::session::Session;
use crate::sidecar::worker::Worker;

/// A value as it is passed on: a whole RESP element.
pub type Element = Rc<[u8]>;

/// What a worker knows of leases.
pub struct Aside {
    desk: RefCell<Desk<Element>>,
    /// What the desk keeps is answered to.
    reads: RefCell<FxHashMap<Asker, Read>>,
    wake: Wake,
    /// When keys expire, as far as is known.
    early: RefCell<Early>,
    recent: Recent,
    /// The protocol of who missed last: its connection stands, and serves for Larder's own questions too.
    protocol: Cell<Protocol>,
}

impl Aside {
    /// One that knows nothing. Seeds must differ between workers.
    pub fn new(seed: u64) -> Self {
        Self {
            desk: RefCell::new(Desk::new(seed)),
            reads: RefCell::default(),
            wake: Wake::default(),
            early: RefCell::default(),
            recent: Recent::default(),
            protocol: Cell::default(),
        }
    }

    /// What is listened to.
    pub fn wake(&self) -> &Wake {
        &self.wake
    }

    /// What was written lately.
    pub fn recent(&self) -> &Recent {
        &self.recent
    }

    /// A write gives a key a life of `life` milliseconds; `None`: it ends it, or gives it one that is not known. Of a key that is never
    /// refreshed early nothing comes of that.
    pub fn note_end(&self, database: u8, key: &[u8], life: Option<Millis>, now: Millis) {
        let (hash, mut early) = (key_hash(u32::from(database), key), self.early.borrow_mut());
        match life {
            Some(life) => early.stored(hash, now, life),
            None => early.deleted(hash),
        }
    }

    /// Whether misses of a rule take leases at the moment: not while they are seldom filled.
    pub fn is_armed(&self, worker: &Worker, rule: RuleId) -> bool {
        self.desk.borrow().is_armed(rule, worker.now())
    }

    /// For how long a missing key's read waits at the moment, and how long 99 of 100 of its rule's loads took of late, where enough are
    /// known. `None`: the policy alone says how long.
    pub fn wait_now(&self, worker: &Worker, id: RuleId) -> Option<(Millis, Option<Millis>)> {
        let rule = rule_of(&worker.policy(), id).filter(|rule| rule.wait_follows)?;
        let (desk, now) = (self.desk.borrow(), worker.now());
        Some((desk.wait(&rule, now), desk.load_p99(rule.id, now)))
    }

    /// Lets the desk decide, and carries out what it says.
    fn run<T>(&self, worker: &Rc<Worker>, decide: impl FnOnce(&mut Desk<Element>, Millis, &mut Vec<Effect<Element>>) -> T) -> T {
        let mut effects = Vec::new();
        let result = decide(&mut self.desk.borrow_mut(), worker.now(), &mut effects);
        self.carry_out(worker, effects);
        result
    }

    /// What the worker's clock brings.
    #[inline]
    pub fn tick(&self, worker: &Rc<Worker>) {
        let due = self.desk.borrow().next_deadline().is_some_and(|at| at <= worker.now());
        if due {
            self.run(worker, |desk, now, effects| desk.tick(now, effects));
        }
    }

    /// A sign that a lease has ended.
    pub fn on_sign(&self, worker: &Rc<Worker>, name: &Name) {
        self.run(worker, |desk, now, effects| desk.wake(now, name.database, &name.key, effects));
        worker.flush_dirty();
    }

    /// Servers have changed places.
    pub fn on_topology_change(&self, worker: &Rc<Worker>) {
        self.run(worker, |desk, now, effects| desk.topology_changed(now, effects));
    }

    /// Another policy is in force.
    pub fn on_policy_change(&self) {
        self.desk.borrow_mut().policy_changed();
    }

    /// A session is over.
    pub fn on_end(&self, session: &Rc<Session>) {
        if !session.is_known_to_desk() {
            return;
        }
        if session.has_parked() {
            self.reads.borrow_mut().retain(|asker, _| asker.connection != session.id());
        }
        self.run(session.worker(), |desk, now, effects| desk.closed(now, session.id(), effects));
    }
}

/// A command arrives on a session with parked reads, before it is handed on.
#[cold]
pub fn arrives(session: &Rc<Session>, request: &Request<'_>) {
    let database = u32::from(session.lane().database);
    let command = match (request.spec.name, request.spec.only_key(&request.args)) {
        ("get", Some(key)) => Command::Get(database, key),
        (name, Some(key)) if writes::value_at(name).is_some() => Command::Set(database, key),
        _ => Command::Other,
    };
    tell(session, command);
}

/// The session is about to do something for which all its commands must be answered.
pub fn leaves(session: &Rc<Session>) {
    // A read that is under way must not be parked either, when its nil comes.
    session.set_leaving(true);
    if session.has_parked() {
        tell(session, Command::Other);
    }
}

fn tell(session: &Rc<Session>, command: Command<'_>) {
    // One command waits, another comes: that is noted now, for the first may be answered before the next miss.
    session.note_shared();
    let worker = session.worker();
    worker.aside().run(worker, |desk, now, effects| desk.arrives(now, session.id(), command, effects));
}

/// The parameters of a rule whose misses take a lease.
fn rule_of(policy: &ActivePolicy, id: RuleId) -> Option<Rule> {
    let cache_aside = policy.cache_aside(id)?;
    let stampede = cache_aside.stampede.as_ref()?;
    let at_wait_end = match stampede.at_wait_end {
        AtWaitEnd::Error => lease::AtWaitEnd::Error,
        AtWaitEnd::Miss => lease::AtWaitEnd::Miss,
    };
    let (stale, wait_follows) = (!cache_aside.stale.is_zero(), stampede.wait_follows_loads);
    Some(Rule { at_wait_end, stale, wait_follows, ..Rule::new(id, stampede.lease.as_millis(), stampede.wait.as_millis()) })
}

impl fmt::Debug for Aside {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Aside").field("reads", &self.reads.borrow().len()).finish_non_exhaustive()
    }
}
