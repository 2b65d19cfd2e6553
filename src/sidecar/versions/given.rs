//! Stores a value with tags that it is given, beside those that follow from its key: `LARDER.FILL … TAGS`.
//!
//! The tags stand with the key's own version, which is drawn anew for them: whoever knows that version knows the tags, and the name of the value is
//! made of theirs as well. So a read stays one command, and whatever of it is lost, nobody meets the value.
//!
//! The name that the client was told is missing and that of the value lie in different slots, so this takes several steps. Between any two of them
//! others write, invalidate and read, and the process may die; what is left then is a miss.
//!
//! 1. The tags' versions are asked for: the value's name is made of them. The client's lease is looked at, so that one that has ended costs nothing.
//! 2. A lease is taken under the value's name, which nobody knows yet. Whoever writes the key once they do ends it.
//! 3. The key's own version is drawn anew, on condition of the one that the client was told of: of two that fill the key one goes on.
//! 4. No tag was invalidated since the load began, or it is noted behind this: then its version is drawn behind it as well, and is another than step 1's.
//!    And all else that the former version was made of still counts: else others may have written the key under a name that has another part.
//! 5. The client's lease is redeemed: whoever wrote the key by its former name, up to now, has ended it. Those who wait for that name are given
//!    the value, for as long as the former version is believed.
//! 6. The value is stored, on condition of step 2's lease.

use std::rc::Rc;

use futures_util::future::{try_join, try_join_all};

use super::epoch::LEASE_MS;
use super::keeper::{self, Drawn};
use super::moment::{self, Moment};
use super::state::{State, combined};
use crate::policy::KeyPattern;
use crate::policy::versions::{Counter, Version, split};
use crate::sidecar::dispatch::{invalidation_slot, submit_invalidation};
use crate::sidecar::engine::lease::{Begun, Generation, Mode, Rule};
use crate::sidecar::patterns::cache_aside::scripts::{self, Names};
use crate::sidecar::resp::reply;
use crate::sidecar::slots::Companion;
use crate::sidecar::upstream::ask::{ask, ask_wire};
use crate::sidecar::upstream::lane::Lane;
use crate::sidecar::upstream::queue::Retry;
use crate::sidecar::upstream::sink::Sink;
use crate::sidecar::worker::Worker;

/// What is to be stored.
#[derive(Debug)]
pub struct Given {
    /// The name under which the client was told that the key is missing.
    pub name: Vec<u8>,
    /// Its lease.
    pub generation: Generation,
    /// How far the log of invalidated tags was before it was told.
    pub moment: Moment,
    /// What it has loaded.
    pub value: Vec<u8>,
    /// For how many milliseconds it is kept, above zero.
    pub ttl_ms: u64,
    /// For how many its stale copy is; zero: there is none.
    pub copy_ms: u64,
    /// The tags, each once.
    pub tags: Vec<Vec<u8>>,
    /// The rule's leases.
    pub lease: Rule,
}

/// What is known before anything is asked.
struct Plan {
    keys: KeyPattern,
    /// What the key's version is made of.
    counters: Vec<Counter>,
    /// What is believed of each, and of the tags that stand with the key's own.
    states: Vec<(Counter, State)>,
    /// The key's own version.
    own: (Counter, Version),
    /// The version that is drawn for the value.
    next: Version,
    tags: Vec<Counter>,
    key: Vec<u8>,
}

/// Stores a value with its tags, where nothing was written to its key and none of them invalidated since the load began. Whether it did.
///
/// # Errors
/// The text of an error reply: whether it is stored is not known.
pub async fn store(worker: &Rc<Worker>, lane: Lane, given: &Given) -> Result<bool, String> {
    let Some(plan) = Plan::of(worker, given) else { return Ok(false) };
    let Some(name) = plan.name(worker, lane, given).await? else { return Ok(false) };
    let Some(generation) = begin(worker, lane, &name, &given.lease).await? else { return Ok(false) };
    let stored = plan.carry_out(worker, lane, given, &name, generation).await;
    if stored != Ok(true) {
        // Nobody is to wait for it, by either name.
        for name in [&given.name, &name] {
            submit_invalidation(worker, lane, name, Sink::Drop);
        }
    }
    stored
}

impl Plan {
    /// `None`: the client was told of another version than counts, as far as is known.
    fn of(worker: &Worker, given: &Given) -> Option<Self> {
        let policy = worker.policy();
        let (key, told) = split(&given.name)?;
        let rule = policy.rule(policy.find(&given.name))?;
        let counters = Counter::all_of(rule, key);
        let versions = worker.versions();
        if versions.known(&counters) != Some(told) {
            return None;
        }
        let of_key = counters.iter().find(|counter| counter.is_of_key())?;
        let (own, state) = (of_key.clone(), versions.state(of_key)?);
        let all = counters.iter().chain(state.tags.iter());
        let states = all.map(|counter| Some((counter.clone(), versions.state(counter)?))).collect::<Option<_>>()?;
        let tags = given.tags.iter().map(|tag| Counter::of_tag(&rule.keys, tag)).collect();
        let next = Version::new(fastrand::u64(..));
        Some(Self { keys: rule.keys.clone(), counters, states, own: (own, state.version), next, tags, key: key.to_vec() })
    }

    /// The value's name. `None`: the client's lease has ended.
    async fn name(&self, worker: &Rc<Worker>, lane: Lane, given: &Given) -> Result<Option<Vec<u8>>, String> {
        let mut states = self.states.clone();
        let lease = Companion::Lease.name(&given.name);
        let look: [&[u8]; 2] = [b"GET", &lease];
        let held = ask(worker, invalidation_slot(worker, &lease), lane, &look);
        let told = try_join_all(self.tags.iter().map(|tag| keeper::fetch_one(worker, tag)));
        let (held, told) = try_join(held, told).await?;
        states.extend(self.tags.iter().cloned().zip(told));
        let is_held = reply::text(&held).is_some_and(|text| text.starts_with(given.generation.to_string().as_bytes()));
        let next = State { version: self.next, tags: self.tags.clone().into() };
        let look = |counter: &Counter| match *counter == self.own.0 {
            true => Some(next.clone()),
            false => states.iter().rev().find(|(other, _)| other == counter).map(|(_, state)| state.clone()),
        };
        Ok(combined(&self.counters, look).filter(|_| is_held).map(|version| version.name(&self.key)))
    }

    /// All that is to be done once a lease is taken under the value's name.
    async fn carry_out(
        &self,
        worker: &Rc<Worker>,
        lane: Lane,
        given: &Given,
        name: &[u8],
        generation: Generation,
    ) -> Result<bool, String> {
        let drawn = Drawn { version: self.next, tags: &given.tags, counters: &self.tags };
        Ok(keeper::draw_behind(worker, &self.own.0, self.own.1, &drawn).await?
            && self.counts_still(worker).await?
            && moment::is_unchanged(worker, &self.keys, &given.moment, &given.tags).await?
            && redeem(worker, lane, given).await?
            && fill(worker, lane, name, generation, given).await?)
    }

    /// Whether all counts of the former version but the key's own.
    async fn counts_still(&self, worker: &Rc<Worker>) -> Result<bool, String> {
        let rest: Vec<&(Counter, State)> = self.states.iter().filter(|(counter, _)| *counter != self.own.0).collect();
        let now = try_join_all(rest.iter().map(|(counter, _)| keeper::ask_version(worker, counter))).await?;
        Ok(rest.iter().zip(now).all(|((_, state), now)| now.as_ref() == Some(state)))
    }
}

/// Takes a lease under a name that nobody knows.
async fn begin(worker: &Rc<Worker>, lane: Lane, name: &[u8], rule: &Rule) -> Result<Option<Generation>, String> {
    let (taker, mut wire) = (fastrand::u64(..), Vec::new());
    scripts::begin(&Names::of(name), taker, Mode::Miss, rule, &mut wire);
    match scripts::begun(&ask_wire(worker, invalidation_slot(worker, name), lane, &wire, Retry::Safe).await?, taker)? {
        Begun::Leased { token, .. } => Ok(Some(token.generation)),
        _ => Ok(None),
    }
}

/// Ends the client's lease, if it stands.
async fn redeem(worker: &Rc<Worker>, lane: Lane, given: &Given) -> Result<bool, String> {
    let mut wire = Vec::new();
    scripts::fill_if(&Names::of(&given.name), given.generation, &given.value, given.ttl_ms.min(LEASE_MS), 0, &mut wire);
    Ok(!reply::is_null(&ask_wire(worker, invalidation_slot(worker, &given.name), lane, &wire, Retry::Never).await?))
}

async fn fill(worker: &Rc<Worker>, lane: Lane, name: &[u8], generation: Generation, given: &Given) -> Result<bool, String> {
    let mut wire = Vec::new();
    scripts::fill_if(&Names::of(name), generation, &given.value, given.ttl_ms, given.copy_ms, &mut wire);
    let stored = !reply::is_null(&ask_wire(worker, invalidation_slot(worker, name), lane, &wire, Retry::Never).await?);
    if stored {
        worker.aside().note_end(lane.database, name, Some(given.ttl_ms), worker.now());
    }
    Ok(stored)
}
