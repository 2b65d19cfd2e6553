//! A key's way from the origin to those who wait for it.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::time::Duration;

use futures_util::future::join_all;
use tokio::time::Instant;

use super::super::content::{Content, Form};
use super::cache::{Begun, Entry};
use super::patience::Patience;
use super::{Deliver, FlightKey, relayed};
use crate::journal::Held;
use crate::origin::{LoadError, Loaded, Loader};
use crate::policy::ReadThrough;
use crate::sidecar::patterns::write_behind::Journaller;
use crate::sidecar::policy::RuleId;
use crate::sidecar::worker::Worker;

/// A lease is held in steps of this length, renewed while its load goes on: short, so that the death of a holder is noticed
/// soon, and long against a pause of the process.
const LEASE_STEP_MS: u64 = 500;
/// How often it is renewed within a step.
const RENEWALS: u64 = 5;
/// Those who wait for another's load look again after a pause between these, which doubles.
const FIRST_LOOK_MS: u64 = 4;
const LAST_LOOK_MS: u64 = 50;

/// What came of a key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// A value from the origin.
    Found(Content<'static>),
    /// A value that the cache has now: not for readers whose clients may have put it there with a later command.
    Cached(Content<'static>),
    /// The cache has a value of another form now: as little for such readers.
    Other,
    /// There is none.
    NotFound,
    /// It could not be told. An error reply's text, its code first.
    Failed(String),
}

/// One key that is being loaded, and those who wait for it.
pub struct Flight {
    rule: RuleId,
    key: FlightKey,
    /// Rises when a load begins, and when the cache's answer is heeded.
    attempt: Cell<u32>,
    /// Whether the cache has answered and nobody has heeded it yet: what it said may be older than what readers ask from here on.
    is_answered: Rc<Cell<bool>>,
    /// Whether its first passenger may still be spared a load. Those who join it are counted as spared when they do.
    may_spare: Cell<bool>,
    /// With the attempt that was under way when each joined, or is the first to be of use to it.
    waiting: RefCell<Vec<(u32, Deliver)>>,
}

impl std::fmt::Debug for Flight {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Flight").field("rule", &self.rule).field("waiting", &self.waiting.borrow().len()).finish_non_exhaustive()
    }
}

impl Flight {
    /// A flight with its first passenger.
    pub fn new(rule: RuleId, key: FlightKey, deliver: Deliver) -> Rc<Self> {
        let waiting = RefCell::new(vec![(0, deliver)]);
        Rc::new(Self { rule, key, attempt: Cell::new(0), is_answered: Rc::default(), may_spare: Cell::new(true), waiting })
    }

    /// What it is for.
    pub fn key(&self) -> &FlightKey {
        &self.key
    }

    /// Another passenger.
    pub fn join(&self, deliver: Deliver) {
        self.waiting.borrow_mut().push((self.attempt.get() + u32::from(self.is_answered.get()), deliver));
    }

    /// A load begins, or an answer is heeded: those who are here asked before it, but for those who came after the answer.
    fn begin_attempt(&self) {
        self.attempt.set(self.attempt.get() + 1);
        self.is_answered.set(false);
    }

    /// Who came after the answer that is heeded, and who comes from now on, looks at the cache anew, and does not wait for the load.
    fn look_anew(self: &Rc<Self>, worker: &Rc<Worker>) {
        let late = self.waiting.take().into_iter().map(|(_, deliver)| (0, deliver)).collect();
        let anew = Rc::new(Self {
            rule: self.rule,
            key: self.key.clone(),
            attempt: Cell::new(0),
            is_answered: Rc::default(),
            may_spare: Cell::new(false),
            waiting: RefCell::new(late),
        });
        worker.flights().replace(self, anew.clone());
        launch(worker, vec![anew]);
    }

    /// Those who asked before the answer that is heeded get a stale copy.
    fn count_stale(&self, worker: &Worker) {
        let attempt = self.attempt.get();
        let early = self.waiting.borrow().iter().filter(|(joined, _)| *joined < attempt).count();
        (0..early).for_each(|_| worker.metrics().stale(self.rule));
        self.spare(worker);
    }

    /// Whoever began it is served without a load of their own.
    fn spare(&self, worker: &Worker) {
        if self.may_spare.take() {
            worker.metrics().load_saved(self.rule);
        }
    }

    fn entry(&self, worker: &Worker, plan: &Plan) -> Entry {
        Entry::new(worker, &self.key, worker.policy().writer(self.rule), Form::of(&plan.rule), self.is_answered.clone())
    }

    /// Gives the outcome to everybody; the flight is over.
    fn settle(self: &Rc<Self>, worker: &Rc<Worker>, outcome: &Outcome) {
        worker.flights().remove(&self.key, self);
        let waiting = self.waiting.take();
        waiting.into_iter().for_each(|(_, deliver)| deliver(worker, outcome));
        worker.flush_dirty();
    }

    /// Gives the outcome to those who asked before the load began. Whether the flight is over.
    fn settle_early(self: &Rc<Self>, worker: &Rc<Worker>, outcome: &Outcome) -> bool {
        let attempt = self.attempt.get();
        let (early, late): (Vec<_>, Vec<_>) = self.waiting.take().into_iter().partition(|(joined, _)| *joined < attempt);
        let over = late.is_empty();
        *self.waiting.borrow_mut() = late;
        if over {
            worker.flights().remove(&self.key, self);
        }
        early.into_iter().for_each(|(_, deliver)| deliver(worker, outcome));
        worker.flush_dirty();
        over
    }
}

/// What a flight needs of its rule. Taken once, so that a change of policy does not tear it.
struct Plan {
    rule: ReadThrough,
    loader: Loader,
    /// Where values are that the origin has not got yet.
    journaller: Option<Journaller>,
}

impl Plan {
    fn new(worker: &Worker, rule: RuleId) -> Option<Self> {
        let policy = worker.policy();
        Some(Self {
            rule: policy.read_through(rule)?.clone(),
            loader: policy.loader(rule)?.clone(),
            journaller: policy.journal(rule).map(Journaller::new),
        })
    }

    fn lease_ms(&self) -> u64 {
        LEASE_STEP_MS.min(self.rule.lease.as_millis())
    }

    fn outcome_of(&self, result: Result<Loaded, LoadError>) -> Outcome {
        match result {
            Ok(Loaded::Found { value, .. }) => Outcome::Found(Content::new(Form::of(&self.rule), value)),
            Ok(Loaded::NotFound) => Outcome::NotFound,
            Err(error) => Outcome::Failed(format!("ORIGIN {error}")),
        }
    }
}

/// Sends flights of one rule on their way: those that get the lease are loaded together.
pub fn launch(worker: &Rc<Worker>, flights: Vec<Rc<Flight>>) {
    match flights.first().and_then(|flight| Plan::new(worker, flight.rule)) {
        Some(plan) => drop(tokio::task::spawn_local(lead(worker.clone(), Rc::new(plan), flights))),
        None => {
            flights.iter().for_each(|flight| flight.settle(worker, &policy_changed()));
        }
    }
}

async fn lead(worker: Rc<Worker>, plan: Rc<Plan>, flights: Vec<Rc<Flight>>) {
    let entries: Vec<Entry> = flights.iter().map(|flight| flight.entry(&worker, &plan)).collect();
    let begun = join_all(entries.iter().map(|entry| entry.begin(&worker, plan.lease_ms()))).await;
    let (mut leased, mut alone) = (Vec::new(), Vec::new());
    for ((flight, entry), begun) in flights.into_iter().zip(entries).zip(begun) {
        match react(&worker, &flight, begun) {
            Next::Over => {}
            Next::Load => leased.push((flight, entry)),
            Next::LoadAlone => alone.push(flight),
            Next::LookAgain(..) => drop(tokio::task::spawn_local(follow(worker.clone(), plan.clone(), flight))),
        }
    }
    let leased = async {
        if !leased.is_empty() {
            load_leased(&worker, &plan, leased).await;
        }
    };
    tokio::join!(leased, load_alone(&worker, &plan, alone));
}

/// What a look at the cache leads to.
enum Next {
    Over,
    Load,
    /// The cache takes no lease, which keeps nobody from the value.
    LoadAlone,
    /// Somebody else, whose token this is, has the lease for another so many milliseconds.
    LookAgain(Vec<u8>, u64),
}

fn react(worker: &Rc<Worker>, flight: &Rc<Flight>, begun: Result<Begun, String>) -> Next {
    flight.begin_attempt();
    let outcome = match begun {
        Ok(Begun::Value(value)) => {
            worker.metrics().coalesced(flight.rule);
            flight.spare(worker);
            Outcome::Cached(value)
        }
        Ok(Begun::Other) => Outcome::Other,
        Ok(Begun::Nothing) => {
            worker.metrics().negative(flight.rule);
            flight.spare(worker);
            Outcome::NotFound
        }
        Ok(Begun::Leased(stale)) => {
            if let Some(stale) = stale {
                // The policy allows it: nobody waits for the refresh.
                flight.count_stale(worker);
                if !flight.settle_early(worker, &Outcome::Cached(stale)) {
                    flight.look_anew(worker);
                }
            }
            return Next::Load;
        }
        Ok(Begun::Busy { stale: Some(stale), .. }) => {
            flight.count_stale(worker);
            Outcome::Cached(stale)
        }
        Ok(Begun::Busy { stale: None, holder, left_ms }) => return Next::LookAgain(holder, left_ms),
        Ok(Begun::Written | Begun::Refused) => return Next::LoadAlone,
        Err(text) => {
            flight.settle(worker, &Outcome::Failed(text));
            return Next::Over;
        }
    };
    // Whoever asked after the cache had answered, of a deletion in between perhaps, is told of nothing older.
    if flight.settle_early(worker, &outcome) { Next::Over } else { Next::LookAgain(Vec::new(), 0) }
}

/// Somebody else loads: looks until the value is there, the lease is free, or patience ends.
async fn follow(worker: Rc<Worker>, plan: Rc<Plan>, flight: Rc<Flight>) {
    let lease = Duration::from_millis(plan.lease_ms());
    let mut patience = Patience::new(Instant::now(), plan.rule.wait.as_duration(), lease);
    let mut pause = FIRST_LOOK_MS;
    loop {
        tokio::time::sleep(Duration::from_millis(fastrand::u64(pause / 2..=pause))).await;
        pause = (pause * 2).min(LAST_LOOK_MS);
        let entry = flight.entry(&worker, &plan);
        let begun = entry.begin(&worker, plan.lease_ms()).await;
        match react(&worker, &flight, begun) {
            Next::Over => return,
            Next::Load => return load_leased(&worker, &plan, vec![(flight, entry)]).await,
            Next::LookAgain(holder, left_ms) if patience.goes_on(Instant::now(), &holder, left_ms) => {}
            Next::LoadAlone | Next::LookAgain(..) => return load_alone(&worker, &plan, vec![flight]).await,
        }
    }
}

/// Loads for one reader who may not be given what the cache has: for nobody else, and nothing is stored.
pub fn launch_alone(worker: &Rc<Worker>, rule: RuleId, key: FlightKey, deliver: Deliver) {
    let flight = Flight::new(rule, key, deliver);
    match Plan::new(worker, rule) {
        Some(plan) => {
            let worker = worker.clone();
            drop(tokio::task::spawn_local(async move { load_alone(&worker, &plan, vec![flight]).await }));
        }
        None => flight.settle(worker, &policy_changed()),
    }
}

fn policy_changed() -> Outcome {
    Outcome::Failed("TRYAGAIN the policy has changed: repeat the read".to_owned())
}

/// Loads without the lease: what comes is given to those who wait, and stored by nobody.
async fn load_alone(worker: &Rc<Worker>, plan: &Plan, mut flights: Vec<Rc<Flight>>) {
    while !flights.is_empty() {
        flights.iter().for_each(|flight| flight.begin_attempt());
        let results = ask(worker, plan, &flights).await;
        let settled = flights.iter().zip(results).map(|(flight, result)| flight.settle_early(worker, &plan.outcome_of(result)));
        let settled: Vec<bool> = settled.collect();
        flights = flights.into_iter().zip(settled).filter_map(|(flight, over)| (!over).then_some(flight)).collect();
    }
}

/// Loads the flights that have their lease, stores what comes, and gives it to those who wait.
async fn load_leased(worker: &Rc<Worker>, plan: &Rc<Plan>, leased: Vec<(Rc<Flight>, Entry)>) {
    let (flights, entries): (Vec<Rc<Flight>>, Vec<Entry>) = leased.into_iter().unzip();
    flights.iter().for_each(|flight| flight.begin_attempt());
    let results = tokio::select! {
        results = ask(worker, plan, &flights) => results,
        () = keep_leases(worker, plan, &entries) => Vec::new(),
    };
    for ((flight, entry), result) in flights.into_iter().zip(entries).zip(results) {
        let (worker, plan) = (worker.clone(), plan.clone());
        tokio::task::spawn_local(async move {
            if !conclude(&worker, &plan, &flight, &entry, result).await {
                follow(worker, plan, flight).await;
            }
        });
    }
}

/// Renews the leases while their load goes on. Never ends: the load does, within its origin's timeout.
async fn keep_leases(worker: &Rc<Worker>, plan: &Plan, entries: &[Entry]) {
    let lease = plan.lease_ms();
    let until = Instant::now() + plan.rule.lease.as_duration();
    loop {
        tokio::time::sleep(Duration::from_millis(lease / RENEWALS)).await;
        if Instant::now() >= until {
            // The policy lets nobody hold a lease for longer: the next one may load.
            std::future::pending::<()>().await;
        }
        // A lease that is gone is found out when the value is to be stored.
        join_all(entries.iter().map(|entry| entry.renew(worker, lease))).await;
    }
}

/// Stores what a load brought, and tells those who may hear it. Whether the flight is over.
async fn conclude(
    worker: &Rc<Worker>,
    plan: &Plan,
    flight: &Rc<Flight>,
    entry: &Entry,
    result: Result<Loaded, LoadError>,
) -> bool {
    let stored = match &result {
        Ok(Loaded::Found { value, max_age, tag }) => {
            let value = &Content::new(Form::of(&plan.rule), value.as_slice());
            let ttl = plan.rule.ttl.jittered(worker.random());
            let ttl = max_age.map_or(ttl, |limit| ttl.min(limit)).as_millis();
            let stale = plan.rule.stale.as_millis();
            if ttl == 0 {
                entry.give_back(worker);
                Ok(false)
            } else {
                entry.fill(worker, value, tag.as_deref(), ttl, if stale > 0 { ttl + stale } else { 0 }).await
            }
        }
        Ok(Loaded::NotFound) => entry.fill_nothing(worker, plan.rule.negative_ttl.as_millis()).await,
        Err(_) => {
            entry.give_back(worker);
            flight.settle(worker, &plan.outcome_of(result));
            return true;
        }
    };
    let outcome = plan.outcome_of(result);
    match stored {
        // What was stored may be deleted by now, and asked for again: who came after the answer waits on.
        Ok(true) => {
            flight.begin_attempt();
            flight.settle_early(worker, &outcome)
        }
        // Revoked, or not known: the cache may be away, which keeps nobody from the value.
        Ok(false) | Err(_) => flight.settle_early(worker, &outcome),
    }
}

/// What the keys of flights are: as they were last written, where the origin has not got that yet, else as it has them.
async fn ask(worker: &Rc<Worker>, plan: &Plan, flights: &[Rc<Flight>]) -> Vec<Result<Loaded, LoadError>> {
    let Some(journaller) = &plan.journaller else { return ask_origin(worker, plan, flights).await };
    let held = join_all(flights.iter().map(|flight| journaller.look_up(worker, &flight.key.1))).await;
    let clean: Vec<Rc<Flight>> =
        flights.iter().zip(&held).filter(|(_, held)| matches!(held, Ok(None))).map(|(flight, _)| flight.clone()).collect();
    let mut loaded = match clean.is_empty() {
        true => Vec::new(),
        false => ask_origin(worker, plan, &clean).await,
    }
    .into_iter();
    let origin = || plan.rule.load.origin.clone();
    let answer = |held: Result<Option<Held>, String>| match held {
        Ok(Some(Held { value: Some(value), .. })) => Ok(Loaded::Found { value, max_age: None, tag: None }),
        Ok(Some(Held { value: None, .. })) => Ok(Loaded::NotFound),
        Ok(None) => loaded.next().unwrap_or_else(|| Err(LoadError::Busy { origin: origin() })),
        // What the origin has may be older than an acknowledged write.
        Err(why) => {
            Err(LoadError::Unreachable { origin: origin(), why: format!("the journal before it cannot be read ({why})") })
        }
    };
    held.into_iter().map(answer).collect()
}

async fn ask_origin(worker: &Rc<Worker>, plan: &Plan, flights: &[Rc<Flight>]) -> Vec<Result<Loaded, LoadError>> {
    for flight in flights {
        worker.metrics().load(flight.rule);
        flight.may_spare.set(false);
    }
    let policy = worker.policy();
    let keys: Vec<Vec<u8>> = flights.iter().map(|flight| policy.key_of(&flight.key.1).to_vec()).collect();
    let results = match plan.loader.queue() {
        Some(queue) => relayed::load(worker, &plan.loader, queue, &keys).await,
        None => load_here(worker, plan.loader.clone(), keys).await,
    };
    let failed = flights.iter().zip(&results).filter(|(_, result)| result.is_err());
    failed.for_each(|(flight, _)| worker.metrics().load_error(flight.rule));
    results
}

/// Loads over this sidecar's own connections.
async fn load_here(worker: &Worker, loader: Loader, keys: Vec<Vec<u8>>) -> Vec<Result<Loaded, LoadError>> {
    let (count, origin) = (keys.len(), loader.origin().to_owned());
    let task = worker.origins().spawn(async move {
        match keys.as_slice() {
            [key] => vec![loader.load(key).await],
            keys => loader.load_many(keys).await,
        }
    });
    task.await.unwrap_or_else(|_| (0..count).map(|_| Err(LoadError::Busy { origin: origin.clone() })).collect())
}
