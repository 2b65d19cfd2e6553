//! Reads of many keys, some of which are to be loaded: MGET, and EXISTS.

use std::cell::{RefCell, RefMut};
use std::rc::Rc;

use futures_util::future::join_all;
use rustc_hash::FxHashMap;
use smallvec::SmallVec;
use tokio::sync::oneshot;

use super::super::super::policy::RuleId;
use super::super::super::resp::{CommandArgs, CommandScan, CommandScanner, encode, reply};
use super::super::super::session::Session;
use super::super::super::upstream::lane::Lane;
use super::super::super::worker::Worker;
use super::super::cache_aside::{self, Wanted};
use super::super::content::Content;
use super::{Deliver, Flight, Outcome, flight, want};

/// Where the one reply goes, and on which connection the command was sent.
#[derive(Debug, Clone)]
pub struct Place {
    /// The client.
    pub session: Rc<Session>,
    /// The reply's place in its order.
    pub sequence: u32,
    /// How the command was sent.
    pub lane: Lane,
}

/// A key that the cache does not have, by its position among the command's.
type Missing = (usize, RuleId, Vec<u8>);

/// Completes an MGET whose `reply` may have nulls where keys are loaded through.
pub fn complete_mget(worker: &Rc<Worker>, place: Place, command: &[u8], reply: &[u8]) {
    let Some(values) = reply::elements(reply) else {
        return place.session.deliver(place.sequence, reply);
    };
    let missing = count_and_pick_missing(worker, command, true, values.iter().map(|value| reply::is_null(value)));
    if missing.is_empty() {
        return place.session.deliver(place.sequence, reply);
    }
    let values = values.into_iter().map(<[u8]>::to_vec).collect();
    load(worker, place, Collected::Values(values), missing);
}

/// Completes an EXISTS whose keys were asked for one by one; `replies` are in their order.
pub fn complete_exists(worker: &Rc<Worker>, place: Place, command: &[u8], replies: &[Vec<u8>]) {
    let count = replies.iter().filter_map(|reply| reply::integer(reply)).sum();
    let missing = count_and_pick_missing(worker, command, false, replies.iter().map(|reply| reply::integer(reply) == Some(0)));
    if missing.is_empty() {
        return place.session.answer(place.sequence, |out| encode::integer(out, count));
    }
    load(worker, place, Collected::Count(count), missing);
}

/// Counts hits and misses of all keys of `command`, and picks what is missing and loaded through, or `leased`.
fn count_and_pick_missing(worker: &Rc<Worker>, command: &[u8], leased: bool, absent: impl Iterator<Item = bool>) -> Vec<Missing> {
    let mut scanner = CommandScanner::default();
    let Ok(CommandScan::Complete { .. }) = scanner.scan(command) else { return Vec::new() };
    let args = CommandArgs::new(command, scanner.ranges());
    let policy = worker.policy();
    let mut missing = Vec::new();
    for (index, (key, absent)) in args.iter().skip(1).zip(absent).enumerate() {
        let rule = policy.find(key);
        worker.metrics().count_read(rule, absent);
        if absent && (policy.loads(rule) || leased && policy.leases(rule)) {
            missing.push((index, rule, key.to_vec()));
        }
    }
    missing
}

/// Loads what is missing, each rule's keys together, and answers when all is known.
fn load(worker: &Rc<Worker>, place: Place, collected: Collected, missing: Vec<Missing>) {
    let (lane, policy) = (place.lane.shared(), worker.policy());
    let (leased, missing): (Vec<Missing>, Vec<Missing>) = missing.into_iter().partition(|(_, rule, _)| policy.leases(*rule));
    let state = State { collected, failure: None, open: missing.len() + leased.len() };
    let table = Rc::new(Table { place, state: RefCell::new(state) });
    let mut by_rule: FxHashMap<RuleId, Vec<Rc<Flight>>> = FxHashMap::default();
    for (index, rule, key) in missing {
        let table = table.clone();
        let key = (lane, key);
        let again = key.clone();
        let deliver: Deliver = Box::new(move |worker, outcome| match outcome {
            Outcome::Cached(_) | Outcome::Other if table.place.session.has_changed_after(table.place.sequence) => {
                flight::launch_alone(worker, rule, again, Box::new(move |_, outcome| table.fill(index, outcome)));
            }
            outcome => table.fill(index, outcome),
        });
        if let Some(flight) = want(worker, rule, key, deliver) {
            by_rule.entry(rule).or_default().push(flight);
        }
    }
    by_rule.into_values().for_each(|flights| flight::launch(worker, flights));
    if !leased.is_empty() {
        ask_for_leases(worker, table, leased);
    }
}

/// Loads keys that were missing on `lane`, each rule's together, for a client that sends nothing meanwhile. What came of each, in
/// their order.
pub async fn load_keys(worker: &Rc<Worker>, lane: Lane, missing: Vec<(RuleId, Vec<u8>)>) -> Vec<Outcome> {
    let mut by_rule: FxHashMap<RuleId, Vec<Rc<Flight>>> = FxHashMap::default();
    let mut outcomes = Vec::with_capacity(missing.len());
    for (rule, key) in missing {
        let (sender, receiver) = oneshot::channel();
        outcomes.push(receiver);
        let deliver: Deliver = Box::new(move |_, outcome| drop(sender.send(outcome.clone())));
        if let Some(flight) = want(worker, rule, (lane.shared(), key), deliver) {
            by_rule.entry(rule).or_default().push(flight);
        }
    }
    by_rule.into_values().for_each(|flights| flight::launch(worker, flights));
    let stopping = |_| Outcome::Failed("TRYAGAIN the sidecar is stopping".to_owned());
    join_all(outcomes).await.into_iter().map(|outcome| outcome.unwrap_or_else(stopping)).collect()
}

/// Keys that the application loads: a key that is named twice is asked for once.
fn ask_for_leases(worker: &Rc<Worker>, table: Rc<Table>, leased: Vec<Missing>) {
    let mut seen: FxHashMap<Vec<u8>, usize> = FxHashMap::default();
    let mut wanted: Vec<Wanted> = Vec::with_capacity(leased.len());
    for (index, rule, key) in leased {
        match seen.get(&key) {
            Some(at) => wanted[*at].places.push(index),
            None => {
                seen.insert(key.clone(), wanted.len());
                wanted.push(Wanted { key, rule, places: SmallVec::from_elem(index, 1) });
            }
        }
    }
    cache_aside::ask_many(worker, table, wanted);
}

/// One reply, while some of its keys are being loaded.
pub struct Table {
    place: Place,
    state: RefCell<State>,
}

struct State {
    collected: Collected,
    failure: Option<String>,
    /// How many keys are not known yet.
    open: usize,
}

enum Collected {
    /// MGET's elements, encoded.
    Values(Vec<Vec<u8>>),
    /// How many keys there are.
    Count(i64),
}

impl Table {
    /// Where the reply goes.
    pub fn place(&self) -> &Place {
        &self.place
    }

    /// A key is known: `value` is a whole element, or there is none.
    pub fn decide(&self, index: usize, value: Option<&[u8]>) {
        let mut state = self.state.borrow_mut();
        if let (Collected::Values(values), Some(value)) = (&mut state.collected, value) {
            values[index] = value.to_vec();
        }
        self.close_one(state);
    }

    /// A key cannot be told.
    pub fn fail(&self, text: &str) {
        let mut state = self.state.borrow_mut();
        state.failure = Some(text.to_owned());
        self.close_one(state);
    }

    fn fill(&self, index: usize, outcome: &Outcome) {
        let mut state = self.state.borrow_mut();
        match outcome {
            Outcome::Found(value) | Outcome::Cached(value) => state.collected.add(index, Some(value)),
            Outcome::Other => state.collected.add(index, None),
            Outcome::NotFound => {}
            Outcome::Failed(text) => state.failure = Some(text.clone()),
        }
        self.close_one(state);
    }

    fn close_one(&self, mut state: RefMut<'_, State>) {
        state.open -= 1;
        if state.open == 0 {
            self.place.session.answer(self.place.sequence, |out| state.write(out));
        }
    }
}

impl State {
    fn write(&self, out: &mut Vec<u8>) {
        match (&self.failure, &self.collected) {
            // A key that could not be loaded is not a missing one: the reply has no place for an error but the whole of it.
            (Some(text), _) => encode::error(out, text),
            (None, Collected::Count(count)) => encode::integer(out, *count),
            (None, Collected::Values(values)) => {
                encode::array(out, values.len());
                values.iter().for_each(|value| out.extend_from_slice(value));
            }
        }
    }
}

impl Collected {
    /// A key is there. Of what is no string MGET shows null, as a server does.
    fn add(&mut self, index: usize, value: Option<&Content<'_>>) {
        match (self, value) {
            (Self::Count(count), _) => *count += 1,
            (Self::Values(values), Some(Content::Text(text))) => {
                let mut bytes = Vec::with_capacity(text.len() + 16);
                encode::bulk(&mut bytes, text);
                values[index] = bytes;
            }
            (Self::Values(_), Some(Content::Hash(_)) | None) => {}
        }
    }
}
