//! Rules whose keys have versions in their names, so that all of them are invalidated by one write.
//!
//! The application says `user:7`, and the cache has `user:7~v…`: what a client names is mapped before anything else looks at it, and mapped
//! back where names are listed. [`epoch`] knows the version that is meant, [`keeper`] asks the cache for it, and draws a new one where the rule
//! is invalidated: what was stored under the old name is met by nobody any more, a load that is under way included.
//!
//! A key's version is made of its rule's and its tags' ([`Counter`]), and of its own where the rule says so: whoever invalidates a tag, or such a
//! key, draws that one anew. With a key's own stand the tags that its value was [`given`].
//!
//! A read takes the version that was told within the last second. A write takes it, too, and then asks which version counts: where that is
//! another by now, the key goes under that one as well before the write is acknowledged ([`written`]). So no other sidecar goes on with what
//! the write has ended, however late this one hears of a new version.
//!
//! What a client stores goes under the name that it was told is missing: had it been told before the rule was invalidated, its value is of no
//! use to anybody, and goes where nobody looks.
//!
//! A server tells a worker when a version changes that the worker has asked for, by the means of CLIENT TRACKING: then it is asked for anew at once.
//! Nothing rests on that but how soon others see it.

pub mod epoch;
pub mod given;
#[cfg(test)]
mod given_simulation;
mod glob;
pub mod keeper;
mod listing;
pub mod moment;
#[cfg(test)]
mod simulation;
pub mod state;
mod told;
pub mod written;

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::rc::Rc;
use std::time::Instant;

use rustc_hash::FxHashMap;

use self::epoch::{Epoch, Place, place};
use self::state::{State, combined};
use self::told::Told;
use self::written::Mapped;
use super::commands::{CommandSpec, Effect};
use super::dispatch::{self, Flow, Request, submit_invalidation};
use super::patterns::cache_aside::writes;
use super::policy::{ActivePolicy, RuleId};
use super::resp::{CommandArgs, CommandScan, CommandScanner, encode};
use super::session::Session;
use super::tracking::TrackerId;
use super::upstream::sink::Sink;
use super::worker::Worker;
use crate::policy::versions::{Counter, Version, split};

pub use listing::{Listing, shown, shown_list, when_known};

/// The commands whose keys are mapped. All others that name such a key are refused.
pub const NAMED: [&str; 38] = [
    "append",
    "decr",
    "decrby",
    "del",
    "exists",
    "expire",
    "expireat",
    "expiretime",
    "get",
    "getdel",
    "getex",
    "getrange",
    "getset",
    "incr",
    "incrby",
    "incrbyfloat",
    "larder.fetch",
    "larder.fill",
    "larder.invalidate",
    "mget",
    "mset",
    "persist",
    "pexpire",
    "pexpireat",
    "pexpiretime",
    "psetex",
    "pttl",
    "set",
    "setex",
    "setnx",
    "setrange",
    "strlen",
    "substr",
    "touch",
    "ttl",
    "type",
    "unlink",
    "msetnx",
];

/// The most versions that a worker remembers.
const MOST_EPOCHS: usize = 65_536;

/// What a worker knows of versions.
#[derive(Debug)]
pub struct Versions {
    began: Instant,
    epochs: RefCell<FxHashMap<Counter, Epoch>>,
    told: RefCell<Told>,
    /// The versions of which a server was asked to say when they change, by their keys, and on which connection.
    watched: RefCell<FxHashMap<Vec<u8>, (Counter, TrackerId)>>,
    /// The names that stand in the command which is being handed on, where it may change them.
    mapped: RefCell<Option<Rc<Mapped>>>,
}

impl Default for Versions {
    fn default() -> Self {
        Self {
            began: Instant::now(),
            epochs: RefCell::default(),
            told: RefCell::default(),
            watched: RefCell::default(),
            mapped: RefCell::default(),
        }
    }
}

impl Versions {
    /// Milliseconds on a clock that does not stand still while the worker does.
    fn now(&self) -> u64 {
        u64::try_from(self.began.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    fn with_epoch<T>(&self, counter: &Counter, look: impl FnOnce(&mut Epoch) -> T) -> T {
        let mut epochs = self.epochs.borrow_mut();
        if let Some(epoch) = epochs.get_mut(counter) {
            return look(epoch);
        }
        if epochs.len() >= MOST_EPOCHS {
            // What is not known any more is asked for anew.
            let now = self.now();
            epochs.retain(|_, epoch| epoch.known(now).is_some());
            if epochs.len() >= MOST_EPOCHS {
                epochs.clear();
            }
        }
        look(epochs.entry(counter.clone()).or_default())
    }

    /// The version that a key of these is meant under now.
    fn current(&self, counters: &[Counter]) -> Version {
        let now = self.now();
        let current = |counter: &Counter| Some(self.with_epoch(counter, |epoch| epoch.current(now, || fastrand::u64(..))));
        combined(counters, current).unwrap_or(Version::new(0))
    }

    /// The version of a key of these, where all of it is known.
    fn known(&self, counters: &[Counter]) -> Option<Version> {
        combined(counters, |counter| self.state(counter))
    }

    /// What the cache says of a counter, where it is known.
    fn state(&self, counter: &Counter) -> Option<State> {
        let now = self.now();
        self.with_epoch(counter, |epoch| epoch.known(now))
    }

    /// Those of them that are not known, and of the tags that they bring along.
    fn unknown<'c>(&self, counters: impl Iterator<Item = &'c Counter>) -> BTreeSet<Counter> {
        let mut unknown = BTreeSet::new();
        for counter in counters {
            match self.state(counter) {
                None => unknown.extend([counter.clone()]),
                Some(state) => unknown.extend(state.tags.iter().filter(|tag| self.state(tag).is_none()).cloned()),
            }
        }
        unknown
    }

    /// Has the server say when a version changes that was just told. Where it does not, or the word is lost, an answer is believed for
    /// its second all the same.
    fn watch(&self, worker: &Rc<Worker>, counter: &Counter, key: &[u8]) {
        let known = self.watched.borrow().get(key).map(|(_, tracker)| *tracker);
        let tracker = worker.tracking().watch_version(worker, key, known);
        let Some(tracker) = tracker.filter(|tracker| known != Some(*tracker)) else { return };
        let mut watched = self.watched.borrow_mut();
        if watched.len() >= MOST_EPOCHS {
            watched.clear();
        }
        watched.insert(key.to_vec(), (counter.clone(), tracker));
    }

    /// A server says that the version at this key has changed. It says so once.
    pub fn on_change(&self, key: &[u8]) {
        let watched = self.watched.borrow_mut().remove(key);
        if let Some((counter, _)) = watched {
            let now = self.now();
            self.with_epoch(&counter, |epoch| epoch.forget(now));
        }
    }

    /// A server says that any may have changed.
    pub fn on_flush(&self) {
        let now = self.now();
        self.watched.borrow_mut().clear();
        self.epochs.borrow_mut().values_mut().for_each(|epoch| epoch.forget(now));
    }

    /// The names that the command which is being handed on may change.
    pub fn mapped(&self) -> Option<Rc<Mapped>> {
        self.mapped.borrow().clone()
    }
}

/// Maps a command of versioned keys, and hands it on. `None`: it names none.
pub fn takes(session: &Rc<Session>, request: &Request<'_>) -> Option<Flow> {
    let policy = &session.worker().policy();
    let places = places(policy, request.spec, &request.args);
    if places.is_empty() {
        return None;
    }
    let explains = request.spec.name == "larder.explain";
    if !explains && let Some(text) = refusal(session, policy, request, &places) {
        session.answer_now(|out| encode::error(out, &text));
        return Some(Flow::Continue);
    }
    let worker = session.worker();
    let counters: Vec<Vec<Counter>> = places.iter().map(|(at, rule)| counters(policy, *rule, request.args.get(*at))).collect();
    let unknown = worker.versions().unknown(counters.iter().flatten());
    if !unknown.is_empty() && !session.take_asked() {
        ask_first(session, unknown);
        return Some(Flow::Again);
    }
    session.take_asked();
    if explains {
        return None;
    }
    let names: Vec<(Version, Vec<u8>)> =
        places.iter().zip(&counters).map(|((at, _), counters)| name(session, request, *at, counters)).collect();
    let changes = dispatch::changes(request);
    let wire = rewritten(request, &places, &names);
    let mut scanner = CommandScanner::default();
    let Ok(CommandScan::Complete { .. }) = scanner.scan(&wire) else { return None };
    if changes {
        let keys =
            places.iter().zip(counters).zip(&names).filter_map(|(((at, _), counters), (version, _))| {
                Some((counters, request.args.get(*at)?.to_vec(), Some(*version)))
            });
        let invalidates = request.spec.name == "larder.invalidate";
        let mapped = Mapped { lane: session.lane(), keys: keys.collect(), invalidates };
        worker.versions().mapped.replace(Some(Rc::new(mapped)));
    }
    let mapped = Request { raw: &wire, args: CommandArgs::new(&wire, scanner.ranges()), spec: request.spec };
    let flow = dispatch::hand_on(session, &mapped);
    worker.versions().mapped.take();
    Some(flow)
}

/// What the version of a rule's key is made of.
fn counters(policy: &ActivePolicy, rule: RuleId, key: Option<&[u8]>) -> Vec<Counter> {
    policy.rule(rule).map(|rule| Counter::all_of(rule, key.unwrap_or_default())).unwrap_or_default()
}

/// Asks for versions before the session's next command is handed on.
fn ask_first(session: &Rc<Session>, unknown: BTreeSet<Counter>) {
    session.hold();
    let session = session.clone();
    tokio::task::spawn_local(async move {
        keeper::fetch(session.worker(), unknown).await;
        session.note_asked();
        session.release();
    });
}

/// Where a command names versioned keys, and their rules.
fn places(policy: &ActivePolicy, spec: &CommandSpec, args: &CommandArgs<'_>) -> Vec<(usize, RuleId)> {
    let versioned = |at: usize| {
        let rule = policy.find(args.get(at)?);
        policy.is_versioned(rule).then_some((at, rule))
    };
    if spec.name == "larder.invalidate" {
        return (1..dispatch::invalidation_keys_end(args)).filter_map(versioned).collect();
    }
    // Where the arguments contradict themselves any server answers with the error that fits.
    let keys = spec.keys(args).unwrap_or_default();
    keys.iter().filter(|at| at.effect != Effect::Route).filter_map(|at| versioned(at.index as usize)).collect()
}

fn refusal(session: &Session, policy: &ActivePolicy, request: &Request<'_>, places: &[(usize, RuleId)]) -> Option<String> {
    let (first, rule) = *places.first()?;
    let rule = policy.rule(rule).map_or("", |rule| rule.name.as_str());
    let key = String::from_utf8_lossy(request.args.get(first).unwrap_or_default()).into_owned();
    if !NAMED.contains(&request.spec.name) {
        let command = request.spec.name.replace('|', " ").to_ascii_uppercase();
        return Some(apart_text(&command, rule));
    }
    if places.iter().any(|(at, _)| request.args.get(*at).and_then(split).is_some()) {
        return Some(format!("NOPERM `{key}` ends as the versions do that the rule `{rule}` gives names: use another name"));
    }
    session.is_tracking().then(|| {
        format!("NOPERM the keys of the rule `{rule}` change their names, and cannot be tracked: read them over a connection without CLIENT TRACKING")
    })
}

fn apart_text(command: &str, rule: &str) -> String {
    format!(
        "NOPERM {command} is not carried out on keys of the rule `{rule}`, which is versioned: strings are read and written by GET, SET and their like, \
         outside transactions and scripts"
    )
}

/// The refusal of a command that takes its own way (a transaction, a script, one that blocks or is too long to be held), where it names
/// a versioned key.
pub fn refusal_apart(policy: &ActivePolicy, spec: &CommandSpec, args: &CommandArgs<'_>) -> Option<String> {
    if !policy.has_versions() {
        return None;
    }
    let (_, rule) = *places(policy, spec, args).first()?;
    let command = spec.name.replace('|', " ").to_ascii_uppercase();
    Some(apart_text(&command, policy.rule(rule).map_or("", |rule| rule.name.as_str())))
}

/// The refusal of a command whose bytes are not held, of one key of this rule.
pub fn too_long_text(policy: &ActivePolicy, rule: RuleId) -> String {
    let name = policy.rule(rule).map_or("", |rule| rule.name.as_str());
    format!("ERR a command on keys of the rule `{name}`, which is versioned, has at most 1 MiB")
}

/// What the cache calls a key, and the version in it. A value is stored under the version under which it may have been told to be missing.
fn name(session: &Session, request: &Request<'_>, at: usize, counters: &[Counter]) -> (Version, Vec<u8>) {
    let worker = session.worker();
    let key = request.args.get(at).unwrap_or_default();
    let current = worker.versions().current(counters);
    if writes::value_at(request.spec.name).is_none() && !matches!(request.spec.name, "mset" | "msetnx") {
        return (current, current.name(key));
    }
    let database = u32::from(session.lane().database);
    let is_missing = |version: Version| writes::is_outstanding(worker, database, &version.name(key));
    let told = worker.versions().told.borrow_mut().take(database, key, current, is_missing);
    let Place { version, revoked } = place(current, &told, !told.is_empty() && is_missing(current));
    for version in revoked {
        submit_invalidation(worker, session.lane(), &version.name(key), Sink::Drop);
    }
    (version, version.name(key))
}

fn rewritten(request: &Request<'_>, places: &[(usize, RuleId)], names: &[(Version, Vec<u8>)]) -> Vec<u8> {
    let mut wire = Vec::with_capacity(request.raw.len() + 24 * places.len());
    let mut mapped = places.iter().zip(names).peekable();
    encode::array(&mut wire, request.args.len());
    for (at, arg) in request.args.iter().enumerate() {
        match mapped.next_if(|((place, _), _)| *place == at) {
            Some((_, (_, name))) => encode::bulk(&mut wire, name),
            None => encode::bulk(&mut wire, arg),
        }
    }
    wire
}

/// A client was told that a key is missing, which the cache would have by this name.
pub fn note_missing(worker: &Worker, database: u32, name: &[u8]) {
    if !worker.has_versions() {
        return;
    }
    let policy = worker.policy();
    if let Some((key, version)) = split(name).filter(|_| policy.is_versioned(policy.find(name))) {
        let is_outstanding = |database: u32, name: &[u8]| writes::is_outstanding(worker, database, name);
        worker.versions().told.borrow_mut().note(database, key, version, is_outstanding);
    }
}

/// What the cache calls a key of any rule at the moment.
pub fn name_now(worker: &Worker, key: &[u8]) -> Vec<u8> {
    let policy = worker.policy();
    let id = policy.find(key);
    match policy.is_versioned(id) {
        false => key.to_vec(),
        true => worker.versions().current(&counters(&policy, id, Some(key))).name(key),
    }
}

/// What the cache calls a versioned key at the moment, and the tags that its value was given, as far as they are known. `None`: it is none.
pub fn told_of(worker: &Worker, key: &[u8]) -> Option<(Vec<u8>, Vec<String>)> {
    let policy = worker.policy();
    let id = policy.find(key);
    let rule = policy.rule(id).filter(|_| policy.is_versioned(id))?;
    let counters = Counter::all_of(rule, key);
    let states = counters.iter().filter_map(|counter| worker.versions().state(counter));
    let given = states.flat_map(|state| state.tags.to_vec()).filter_map(|tag| tag.tag(&rule.keys));
    let given = given.map(|tag| String::from_utf8_lossy(&tag).into_owned()).collect();
    Some((worker.versions().current(&counters).name(key), given))
}
