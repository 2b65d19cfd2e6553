//! What the operator of the pod asks: invalidate this, or tell how far that is.

use std::collections::BTreeSet;
use std::rc::Rc;
use std::time::Duration;

use serde_json::{Value as Json, json};
use tokio::time::{Instant, sleep};

use super::carry;
use super::drawn;
use super::jobs::{Pass, Progress, Target};
use super::position::EntryId;
use super::store::Store;
use super::tagged;
use super::walker::count;
use crate::policy::KeyPattern;
use crate::policy::events::STREAM;
use crate::sidecar::dispatch::invalidation_slot;
use crate::sidecar::policy::{ActivePolicy, UNMATCHED};
use crate::sidecar::resp::{encode, reply};
use crate::sidecar::slots::is_larder_key;
use crate::sidecar::upstream::ask::{ask, caller, heard};
use crate::sidecar::upstream::lane::Lane;
use crate::sidecar::upstream::queue::{Pending, Retry};
use crate::sidecar::versions::epoch::LEASE_MS;
use crate::sidecar::versions::name_now;
use crate::sidecar::worker::Worker;

/// How long a trial may count.
const COUNT_FOR: Duration = Duration::from_secs(10);

/// Which keys are meant.
#[derive(Debug, Clone, PartialEq)]
pub enum Meant {
    /// These.
    Keys(Vec<Vec<u8>>),
    /// Those that have this tag.
    Tag(String),
    /// Those of the rule of this name.
    Rule(String),
    /// Those of a pattern that some rule covers.
    Pattern(KeyPattern),
}

/// What is asked.
#[derive(Debug, Clone, PartialEq)]
pub enum Request {
    /// That they go.
    Invalidate(Meant),
    /// That they go, and that no sidecar can show what keys had before once it is answered.
    Sync(Meant),
    /// What would go.
    Try(Meant),
    /// How far it is, by the event that the first was answered with.
    Follow(Meant, EntryId),
}

/// Why there is no answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Refusal {
    /// It is no request that can be carried out; the text says what to write.
    Wrong(String),
    /// Not now, or not as a whole: it may be repeated.
    Later(String),
}

/// Answers a request. Keys have gone when it is answered; what takes longer has been written down.
///
/// # Errors
/// Why not.
pub async fn answer(worker: &Rc<Worker>, store: &Store, bound: bool, request: Request) -> Result<Json, Refusal> {
    let policy = worker.policy();
    let meant = match &request {
        Request::Invalidate(meant) | Request::Sync(meant) | Request::Try(meant) | Request::Follow(meant, _) => meant.clone(),
    };
    check(&policy, &meant, bound).map_err(Refusal::Wrong)?;
    match (request, target_of(meant)) {
        (Request::Invalidate(Meant::Keys(keys)), _) => invalidate(worker, &keys).await,
        (Request::Sync(Meant::Keys(keys)), _) => {
            let told = invalidate(worker, &keys).await?;
            if keys.iter().any(|key| policy.is_versioned(policy.find(key))) {
                sleep(Duration::from_millis(LEASE_MS)).await;
            }
            Ok(told)
        }
        (Request::Invalidate(meant) | Request::Sync(meant), _) => announce(worker, &meant).await,
        (Request::Try(Meant::Keys(keys)), _) => try_keys(worker, &policy, &keys).await,
        (Request::Try(_), Some(target)) => try_walk(worker, target).await,
        (Request::Follow(_, event), Some(target)) => follow(worker, store, &target, event).await,
        (Request::Try(_) | Request::Follow(..), None) => Err(Refusal::Wrong("keys have gone when they are answered".to_owned())),
    }
}

fn target_of(meant: Meant) -> Option<Target> {
    match meant {
        Meant::Keys(_) => None,
        Meant::Tag(tag) => Some(Target::Tag(tag)),
        Meant::Rule(name) => Some(Target::Rule(name)),
        Meant::Pattern(pattern) => Some(Target::Pattern(pattern)),
    }
}

/// What is wrong with it under this policy.
fn check(policy: &ActivePolicy, meant: &Meant, bound: bool) -> Result<(), String> {
    match meant {
        Meant::Keys(keys) => {
            if let Some(key) = keys.iter().find(|key| key.is_empty() || is_larder_key(key)) {
                return Err(format!("`{}` is no key of an application", String::from_utf8_lossy(key)));
            }
            match keys.iter().find(|key| bound && policy.find(key) == UNMATCHED) {
                Some(key) => {
                    let key = String::from_utf8_lossy(key).into_owned();
                    Err(format!("no rule of this workload covers the key `{key}`: ask a workload whose rules do"))
                }
                None => Ok(()),
            }
        }
        Meant::Tag(tag) => match tagged::look_up(policy, tag.as_bytes()) {
            Some(_) => Ok(()),
            None => {
                let rules = policy.snapshot().rules.iter();
                let templates: BTreeSet<&str> = rules.flat_map(|rule| &rule.tags).map(KeyPattern::as_str).collect();
                let templates = templates.into_iter().collect::<Vec<_>>().join(", ");
                Err(match templates.as_str() {
                    "" => "no rule has tags: write them in its `invalidate.tags`, or name keys, a rule or a pattern".to_owned(),
                    templates => format!("no key can have the tag `{tag}`: write one of {templates}"),
                })
            }
        },
        Meant::Rule(name) => {
            let rules = &policy.snapshot().rules;
            let Some(index) = rules.iter().position(|rule| rule.name == *name) else {
                let names: Vec<&str> = rules.iter().map(|rule| rule.name.as_str()).collect();
                return Err(format!("there is no rule `{name}`: write one of {}", names.join(", ")));
            };
            match u16::try_from(index).ok().and_then(|id| policy.lifetime_of(id)) {
                Some(_) => Ok(()),
                None => Err(format!("the rule `{name}` leaves its keys alone, and nothing is invalidated for it: name keys")),
            }
        }
        Meant::Pattern(_) => Ok(()),
    }
}

async fn invalidate(worker: &Rc<Worker>, keys: &[Vec<u8>]) -> Result<Json, Refusal> {
    let outcome = carry::invalidate(worker, keys).await.map_err(Refusal::Later)?;
    let carry::Outcome { removed, forbidden, unconfirmed } = outcome;
    if forbidden > 0 {
        return Err(Refusal::Wrong(format!("the servers do not let this workload touch {forbidden} of the keys")));
    }
    if let Some(why) = unconfirmed {
        return Err(Refusal::Later(format!(
            "the keys are removed, but {why}: after a failover their old values might come back"
        )));
    }
    Ok(json!({"keys": keys.len(), "removed": removed}))
}

/// Writes an event, which stays also when this sidecar ends.
async fn announce(worker: &Rc<Worker>, meant: &Meant) -> Result<Json, Refusal> {
    let (kind, what) = match meant {
        Meant::Tag(tag) => ("tag", tag.as_str()),
        Meant::Rule(name) => ("rule", name.as_str()),
        Meant::Pattern(pattern) => ("pattern", pattern.as_str()),
        Meant::Keys(_) => return Err(Refusal::Wrong("keys need no event".to_owned())),
    };
    let (sink, receiver) = caller();
    let mut wire = Vec::new();
    encode::command(&mut wire, &["XADD", STREAM, "*", kind, what]);
    let slot = invalidation_slot(worker, STREAM.as_bytes());
    worker.submit(&[&wire], Pending::new(sink, slot, Retry::Never, Lane::default(), worker.now()));
    let id = heard(receiver).await.map_err(Refusal::Later)?;
    let id = reply::text(&id).map(String::from_utf8_lossy).unwrap_or_default().into_owned();
    if let Ok(Some(why)) | Err(why) = carry::confirmed(worker, &[slot]).await {
        return Err(Refusal::Later(format!("the event {id} is written, but {why}: after a failover it might be lost")));
    }
    Ok(json!({"event": id, kind: what}))
}

async fn try_keys(worker: &Rc<Worker>, policy: &ActivePolicy, keys: &[Vec<u8>]) -> Result<Json, Refusal> {
    let mut told = Vec::new();
    for key in keys {
        let name = name_now(worker, key);
        let there = ask(worker, invalidation_slot(worker, &name), Lane::default(), &[b"EXISTS", &name]).await;
        let there = reply::integer(&there.map_err(Refusal::Later)?) == Some(1);
        let rule = policy.rule(policy.find(key)).map(|rule| rule.name.clone());
        told.push(json!({"key": String::from_utf8_lossy(key), "rule": rule, "there": there}));
    }
    Ok(json!({"dryRun": true, "keys": told}))
}

async fn try_walk(worker: &Rc<Worker>, target: Target) -> Result<Json, Refusal> {
    let counted = count(worker, target, Instant::now() + COUNT_FOR).await.map_err(Refusal::Later)?;
    Ok(
        json!({"dryRun": true, "found": counted.found, "seen": counted.seen, "total": counted.total, "complete": counted.complete}),
    )
}

async fn follow(worker: &Rc<Worker>, store: &Store, target: &Target, event: EntryId) -> Result<Json, Refusal> {
    let kept = store.look(worker).await.map_err(Refusal::Later)?;
    let progress = kept.jobs.progress(target, event);
    if progress == Progress::Unknown && kept.position.id >= event && draws(&worker.policy(), target) {
        // What sidecars were told before they have forgotten by then.
        sleep(Duration::from_millis(LEASE_MS)).await;
    }
    Ok(match progress {
        Progress::Waiting => json!({"state": "waiting"}),
        Progress::Walking(walk) => {
            let pass = if walk.pass == Pass::Leases { 1 } else { 2 };
            json!({"state": "walking", "pass": pass, "seen": walk.seen, "total": walk.total, "removed": walk.removed,
                "restarts": walk.restarts})
        }
        Progress::Ended(removed) => json!({"state": "ended", "removed": removed}),
        Progress::Unknown if kept.position.id < event => json!({"state": "unread"}),
        // It was carried out before it was passed.
        Progress::Unknown if !takes_walk(&worker.policy(), target) => json!({"state": "ended"}),
        Progress::Unknown => json!({"state": "unknown"}),
    })
}

/// Whether a target is more than keys, which have gone once their event is passed.
fn takes_walk(policy: &ActivePolicy, target: &Target) -> bool {
    match target {
        Target::Tag(tag) => tagged::look_up(policy, tag.as_bytes()).is_none_or(|found| found.walks),
        Target::Rule(_) | Target::Pattern(_) | Target::Leased => drawn::counter_of(policy, target).is_none(),
    }
}

/// Whether new versions are drawn for a target, of which sidecars hear one by one.
fn draws(policy: &ActivePolicy, target: &Target) -> bool {
    match target {
        Target::Tag(tag) => tagged::look_up(policy, tag.as_bytes()).is_some_and(|found| !found.counters.is_empty()),
        Target::Rule(_) | Target::Pattern(_) | Target::Leased => drawn::counter_of(policy, target).is_some(),
    }
}
