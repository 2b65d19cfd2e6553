//! Changes of a database that nobody told: until what was cached before has gone, nobody is shown any of it.
//!
//! Where a relay finds that changes may have been lost (a *lapse*), the keys of the rules that follow the database go by a walk over all names, which
//! takes a while. The relay notes the lapse in the cache, beside its position; each sidecar asks for it five times a second, and believes what it
//! was told for a second ([`keeper`]). Until the walk has come to its end, a sidecar removes each key of such a rule before the first command
//! that names it, as LARDER.INVALIDATE does: what is read behind that was stored behind the lapse. The relay waits for that second before it
//! reads on, so that no sidecar shows anything older once it does.
//!
//! Who cannot ask for a second removes what is named anew each second: changes may be lost meanwhile. Rules whose keys have versions need
//! none of this.

mod cleared;
pub mod keeper;
#[cfg(test)]
mod simulation;

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::rc::Rc;
use std::time::{Duration, Instant};

use futures_util::future::join_all;
use rustc_hash::FxHashMap;
use smallvec::SmallVec;
use tokio::sync::Notify;
use tokio::time::timeout;

use self::cleared::Cleared;
use super::commands::{CommandSpec, Effect};
use super::dispatch::{Flow, Request, submit_invalidation};
use super::events::position::EntryId;
use super::policy::{ActivePolicy, RuleId};
use super::resp::{CommandArgs, Protocol, encode};
use super::session::Session;
use super::upstream::ask::{caller, heard};
use super::upstream::lane::Lane;
use super::versions::epoch::{Epoch, LEASE_MS};
use super::worker::Worker;
use crate::policy::versions::Version;

/// The most sessions whose errors are kept. Whose is dropped tries again.
const MOST_FAILED: usize = 1_024;

/// What tells one time in which nothing old may be shown from another.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mark {
    /// A lapse, by the last event that was written for its sake.
    Lapse(EntryId),
    /// A second in which nothing is known.
    Own(Version),
}

/// How a feed is, as far as this worker knows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Footing {
    /// All that it has lost was made up for.
    Whole,
    /// What was stored before is not to be shown.
    Open(Mark),
}

impl From<Version> for Footing {
    fn from(own: Version) -> Self {
        Self::Open(Mark::Own(own))
    }
}

/// Those of a rule's feeds that are open.
type Marks = SmallVec<[Mark; 1]>;

/// What a worker knows of one feed.
#[derive(Debug, Default)]
struct Known {
    footing: Epoch<Footing>,
    /// The latest lapse that was made up for.
    passed: Option<EntryId>,
}

/// What a worker knows of lapses.
#[derive(Debug)]
pub struct Lapses {
    began: Instant,
    /// By the names of the feeds' slots.
    feeds: RefCell<BTreeMap<String, Known>>,
    /// Under which policy all feeds are whole, and until when that is known.
    whole: RefCell<Option<(Rc<ActivePolicy>, u64)>>,
    cleared: RefCell<Cleared>,
    /// The errors of keys that could not be removed, by the sessions that wait for them.
    failed: RefCell<FxHashMap<u64, String>>,
    told: Notify,
    /// When it was last waited in vain for an answer.
    waited_at: Cell<Option<u64>>,
}

impl Default for Lapses {
    fn default() -> Self {
        Self {
            began: Instant::now(),
            feeds: RefCell::default(),
            whole: RefCell::default(),
            cleared: RefCell::default(),
            failed: RefCell::default(),
            told: Notify::new(),
            waited_at: Cell::new(None),
        }
    }
}

impl Lapses {
    /// Milliseconds on a clock that does not stand still while the worker does.
    fn now(&self) -> u64 {
        u64::try_from(self.began.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    fn with_feed<T>(&self, slot: &str, look: impl FnOnce(&mut Known) -> T) -> T {
        let mut feeds = self.feeds.borrow_mut();
        match feeds.get_mut(slot) {
            Some(known) => look(known),
            None => look(feeds.entry(slot.to_owned()).or_default()),
        }
    }

    /// Whether nothing is open of anything that a rule of the policy follows.
    #[inline]
    fn are_whole(&self, policy: &Rc<ActivePolicy>) -> bool {
        self.whole.borrow().as_ref().is_some_and(|(of, until)| Rc::ptr_eq(of, policy) && self.now() < *until)
    }

    /// The feeds of a rule that are open. `None`: of one it is not known.
    fn known(&self, policy: &ActivePolicy, rule: RuleId) -> Option<Marks> {
        let now = self.now();
        let mut marks = Marks::new();
        for slot in policy.followed(rule) {
            match self.with_feed(slot, |known| known.footing.known(now))? {
                Footing::Whole => {}
                Footing::Open(mark) => marks.push(mark),
            }
        }
        Some(marks)
    }

    /// As [`Lapses::known`]; what is not known counts as open.
    fn current(&self, policy: &ActivePolicy, rule: RuleId) -> Marks {
        let now = self.now();
        let footing = |slot: &str| self.with_feed(slot, |known| known.footing.current(now, || fastrand::u64(..)));
        let open = |slot: &str| match footing(slot) {
            Footing::Whole => None,
            Footing::Open(mark) => Some(mark),
        };
        policy.followed(rule).filter_map(open).collect()
    }

    /// Whether a command may wait for an answer: not where another has just waited in vain.
    fn may_wait(&self) -> bool {
        self.waited_at.get().is_none_or(|at| self.now() >= at + LEASE_MS)
    }

    /// What a session asks for could not be removed.
    fn note_failure(&self, session: u64, text: String) {
        let mut failed = self.failed.borrow_mut();
        if failed.len() >= MOST_FAILED {
            // Sessions that have gone leave theirs.
            failed.clear();
        }
        failed.insert(session, text);
    }

    /// Waits until more is known, for a second at the most.
    async fn wait(&self) {
        if timeout(Duration::from_millis(LEASE_MS), self.told.notified()).await.is_err() {
            self.waited_at.set(Some(self.now()));
        }
    }
}

/// A key that is to go before a command that names it.
#[derive(Debug)]
struct Doubted {
    key: Vec<u8>,
    marks: Marks,
}

/// Has what is old of a command's keys removed before it is handed on. `None`: there is nothing to remove.
#[cold]
fn takes_doubted(session: &Rc<Session>, policy: &ActivePolicy, request: &Request<'_>) -> Option<Flow> {
    let lapses = session.worker().lapses();
    if let Some(text) = lapses.failed.borrow_mut().remove(&session.id()) {
        session.answer_now(|out| encode::error(out, &text));
        return Some(Flow::Continue);
    }
    let named = named(policy, request.spec, &request.args);
    let is_unknown = named.iter().any(|(_, rule)| lapses.known(policy, *rule).is_none());
    if is_unknown && lapses.may_wait() {
        apart(session, |session| async move { session.worker().lapses().wait().await });
        return Some(Flow::Again);
    }
    let lane = Lane::of(Protocol::Resp2, session.lane().database);
    let doubted = doubted(lapses, policy, lane, &named);
    if doubted.is_empty() {
        return None;
    }
    apart(session, move |session| async move {
        let worker = session.worker();
        if let Err(text) = remove(worker, lane, doubted).await {
            worker.lapses().note_failure(session.id(), text);
        }
    });
    Some(Flow::Again)
}

/// As [`takes_doubted`], at no cost where nothing is open.
#[inline]
pub fn takes(session: &Rc<Session>, request: &Request<'_>) -> Option<Flow> {
    let policy = session.worker().policy();
    let lapses = session.worker().lapses();
    if lapses.are_whole(&policy) && lapses.failed.borrow().is_empty() {
        return None;
    }
    takes_doubted(session, &policy, request)
}

/// Removes what is old of the keys of a command that takes a way of its own, in this database.
///
/// # Errors
/// The text of the error reply.
pub async fn clear(session: &Rc<Session>, database: u8, spec: &CommandSpec, args: &CommandArgs<'_>) -> Result<(), String> {
    let worker = session.worker();
    let (policy, lapses) = (worker.policy(), worker.lapses());
    if !policy.has_followed() || lapses.are_whole(&policy) {
        return Ok(());
    }
    let named = named(&policy, spec, args);
    if named.iter().any(|(_, rule)| lapses.known(&policy, *rule).is_none()) && lapses.may_wait() {
        lapses.wait().await;
    }
    let lane = Lane::of(Protocol::Resp2, database);
    let doubted = doubted(lapses, &policy, lane, &named);
    remove(worker, lane, doubted).await
}

/// The refusal of a command whose bytes are not held, of one key of this rule, while what is old of it cannot be removed before.
pub fn refusal_too_long(worker: &Worker, policy: &ActivePolicy, rule: RuleId) -> Option<String> {
    if !policy.has_followed() || worker.lapses().current(policy, rule).is_empty() {
        return None;
    }
    let name = policy.rule(rule).map_or("", |rule| rule.name.as_str());
    Some(format!(
        "TRYAGAIN changes of the database that the rule `{name}` follows may have been lost: until its keys were walked over, a command on them has at most 1 MiB"
    ))
}

/// Does something before the session's next command is handed on.
fn apart<F: Future<Output = ()> + 'static>(session: &Rc<Session>, what: impl FnOnce(Rc<Session>) -> F + 'static) {
    session.hold();
    let session = session.clone();
    tokio::task::spawn_local(async move {
        what(session.clone()).await;
        session.release();
    });
}

/// The keys of a command whose rules follow a database.
fn named(policy: &ActivePolicy, spec: &CommandSpec, args: &CommandArgs<'_>) -> Vec<(Vec<u8>, RuleId)> {
    // Where the arguments contradict themselves any server answers with the error that fits.
    let keys = spec.keys(args).unwrap_or_default();
    let followed = |at: usize| {
        let key = args.get(at)?;
        let rule = policy.find(key);
        policy.followed(rule).next().map(|_| (key.to_vec(), rule))
    };
    keys.iter().filter(|at| at.effect != Effect::Route).filter_map(|at| followed(at.index as usize)).collect()
}

/// Those of them that may be old.
fn doubted(lapses: &Lapses, policy: &ActivePolicy, lane: Lane, named: &[(Vec<u8>, RuleId)]) -> Vec<Doubted> {
    let cleared = lapses.cleared.borrow();
    let doubt = |(key, rule): &(Vec<u8>, RuleId)| {
        let marks = lapses.current(policy, *rule);
        (!marks.is_empty() && !cleared.has(lane.database, key, &marks)).then(|| Doubted { key: key.clone(), marks })
    };
    named.iter().filter_map(doubt).collect()
}

/// Removes keys with all that is beside them, and the right to store what was loaded before.
async fn remove(worker: &Rc<Worker>, lane: Lane, doubted: Vec<Doubted>) -> Result<(), String> {
    let asked = doubted.iter().map(|Doubted { key, .. }| {
        let (sink, receiver) = caller();
        submit_invalidation(worker, lane, key, sink);
        heard(receiver)
    });
    let asked: Vec<_> = asked.collect();
    for answer in join_all(asked).await {
        answer.map_err(|text| {
            format!("TRYAGAIN changes of the database may have been lost, and what was cached before cannot be removed: {text}")
        })?;
    }
    worker.lapses().cleared.borrow_mut().note(lane.database, doubted.into_iter().map(|Doubted { key, marks }| (key, marks)));
    Ok(())
}
