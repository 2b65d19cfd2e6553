//! Carries out what is wanted of single keys, as LARDER.INVALIDATE does, on nobody's connection.

use std::rc::Rc;

use futures_util::future::join_all;

use crate::policy::versions::Counter;
use crate::sidecar::dispatch::{invalidation_slot, submit_invalidation};
use crate::sidecar::exclusive::wait::{Unconfirmed, wait_for_replicas};
use crate::sidecar::resp::reply;
use crate::sidecar::upstream::ask::{caller, heard};
use crate::sidecar::upstream::lane::Lane;
use crate::sidecar::versions::written::{Mapped, settle};
use crate::sidecar::worker::Worker;

/// What came of it.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Outcome {
    /// How many of the keys were there.
    pub removed: u64,
    /// How many the login may not touch.
    pub forbidden: u64,
    /// Why not every replica that could become primary has heard of it, where that is so.
    pub unconfirmed: Option<String>,
}

/// Removes keys of database 0 with all that is beside them, and waits until replicas have heard of it.
///
/// # Errors
/// The text of an error reply: some of them may be there still, and whoever wants them gone repeats it.
pub async fn invalidate(worker: &Rc<Worker>, keys: &[Vec<u8>]) -> Result<Outcome, String> {
    let mut outcome = Outcome::default();
    if keys.is_empty() {
        return Ok(outcome);
    }
    let lane = Lane::default();
    let policy = worker.policy();
    let is_versioned = |key: &&Vec<u8>| policy.is_versioned(policy.find(key));
    let (versioned, plain): (Vec<&Vec<u8>>, Vec<&Vec<u8>>) = keys.iter().partition(is_versioned);
    let mut asked = Vec::with_capacity(plain.len());
    for key in &plain {
        let (sink, receiver) = caller();
        submit_invalidation(worker, lane, key, sink);
        asked.push(heard(receiver));
    }
    for answer in join_all(asked).await {
        match answer {
            Ok(answer) => outcome.removed += u64::try_from(reply::integer(&answer).unwrap_or_default()).unwrap_or_default(),
            Err(text) if is_forbidden(&text) => outcome.forbidden += 1,
            Err(text) => return Err(text),
        }
    }
    let mut slots: Vec<u16> = plain.iter().map(|key| invalidation_slot(worker, key)).collect();
    let settled = versioned.iter().filter_map(|key| {
        let counters = Counter::all_of(policy.rule(policy.find(key))?, key);
        let mapped = Mapped { lane, keys: vec![(counters, key.to_vec(), None)], invalidates: true };
        Some(async move { settle(worker, &mapped).await })
    });
    for settled in join_all(settled).await {
        match settled {
            Ok(settled) => {
                outcome.removed += settled.removed;
                slots.extend(settled.slots);
            }
            Err(text) if is_forbidden(&text) => outcome.forbidden += 1,
            Err(text) => return Err(text),
        }
    }
    slots.sort_unstable();
    slots.dedup();
    outcome.unconfirmed = confirmed(worker, &slots).await?;
    Ok(outcome)
}

/// Whether the replicas of `slots` have heard of all that was done; else why not.
///
/// # Errors
/// It was perhaps done at a server that is primary no more: it is to be repeated.
pub async fn confirmed(worker: &Rc<Worker>, slots: &[u16]) -> Result<Option<String>, String> {
    match wait_for_replicas(worker, Lane::default(), slots).await {
        Ok(()) => Ok(None),
        Err(moved @ Unconfirmed::Moved(_)) => Err(moved.to_string()),
        Err(other) => Ok(Some(other.to_string())),
    }
}

/// Whether a server refuses it for good, and will refuse it to whoever repeats it.
pub fn is_forbidden(error: &str) -> bool {
    error.starts_with("NOPERM")
}
