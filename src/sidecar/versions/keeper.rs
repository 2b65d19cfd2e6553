//! Asks the cache for versions, and draws new ones.

use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;
use std::time::Duration;

use futures_util::future::join_all;
use tokio::time::{sleep, timeout};

use super::state::{State, text_of};
use crate::policy::events::STREAM;
use crate::policy::versions::{Counter, Version};
use crate::policy::{KeyPattern, Versioned};
use crate::sidecar::dispatch::invalidation_slot;
use crate::sidecar::resp::reply;
use crate::sidecar::upstream::ask::ask;
use crate::sidecar::upstream::lane::Lane;
use crate::sidecar::worker::Worker;

/// How often a version is asked for: some times within the second for which an answer is believed.
const ASK_EVERY: Duration = Duration::from_millis(200);
/// What has not been answered by then is asked anew.
const ASK_FOR: Duration = Duration::from_millis(1_000);
/// For how many seconds the cache keeps the version of a tag or a key: a day. Then another is drawn, and what it was part of is a miss.
const FLEETING_LASTS: &[u8] = b"86400";

/// Asks for the versions of the policy's rules for ever. Each worker runs it.
///
/// A rule that becomes versioned, or ceases to be, while sidecars run is invalidated: for some time they do not all call its keys by the
/// same names, and what one has written is not seen by another.
pub async fn keep_forever(worker: Rc<Worker>) {
    let mut known = versioned(&worker);
    loop {
        if known.is_empty() && !worker.has_versions() {
            sleep(ASK_EVERY).await;
            continue;
        }
        let now = versioned(&worker);
        if now != known {
            let became = now.iter().filter(|(pattern, _)| !known.contains_key(*pattern));
            let counters: Vec<Counter> = became.map(|(_, (keys, _))| Counter::of_rule(keys)).collect();
            let failed = join_all(counters.iter().map(|counter| draw(&worker, counter))).await.iter().any(Result::is_err);
            let ceased = known.iter().filter(|(pattern, _)| !now.contains_key(*pattern));
            let told = join_all(ceased.map(|(_, (_, rule))| tell_of_rule(&worker, rule))).await;
            if !failed && told.iter().all(Result::is_ok) {
                known.clone_from(&now);
            }
        }
        fetch(&worker, now.values().map(|(keys, _)| Counter::of_rule(keys)).collect()).await;
        sleep(ASK_EVERY).await;
    }
}

/// The versioned rules of the policy in force, by their patterns' texts and by whether each key has a version of its own.
fn versioned(worker: &Worker) -> BTreeMap<(String, bool), (KeyPattern, String)> {
    let policy = worker.policy();
    let rules = (0..).zip(&policy.snapshot().rules).filter(|(id, _)| policy.is_versioned(*id));
    let rules = rules.map(|(_, rule)| {
        let has_own = rule.versioned == Versioned::Entity;
        ((rule.keys.as_str().to_owned(), has_own), (rule.keys.clone(), rule.name.clone()))
    });
    rules.collect()
}

/// Asks for versions and for those of the tags that they bring along, and draws those that there are not. Ends within a second, whatever was
/// answered.
pub async fn fetch(worker: &Rc<Worker>, counters: BTreeSet<Counter>) {
    let all = async {
        let brought = fetch_all(worker, &counters).await;
        // Those, too, that have changed while they were asked for.
        let unknown = worker.versions().unknown(counters.iter().chain(&brought));
        fetch_all(worker, &unknown).await;
    };
    let _ = timeout(ASK_FOR, all).await;
}

/// Asks for each, and returns the tags that they bring along.
async fn fetch_all(worker: &Rc<Worker>, counters: &BTreeSet<Counter>) -> Vec<Counter> {
    let asked = join_all(counters.iter().map(|counter| fetch_one(worker, counter))).await;
    let known = asked.into_iter().filter_map(|state| {
        state.inspect_err(|error| tracing::debug!(%error, "a version cannot be told: its keys are missing meanwhile")).ok()
    });
    known.flat_map(|state| state.tags.to_vec()).collect()
}

/// Asks for one, and draws it where there is none.
///
/// # Errors
/// The text of an error reply, or that it is not understood.
pub async fn fetch_one(worker: &Rc<Worker>, counter: &Counter) -> Result<State, String> {
    let drawn = Version::new(fastrand::u64(..));
    let (key, digits) = (counter.key(), drawn.to_string());
    let mut command: Vec<&[u8]> = vec![b"SET", &key, digits.as_bytes(), b"NX", b"GET"];
    if counter.is_fleeting() {
        command.extend([&b"EX"[..], FLEETING_LASTS]);
    }
    let asked_at = worker.versions().now();
    let answer = ask(worker, invalidation_slot(worker, &key), Lane::default(), &command).await?;
    let state = if reply::is_null(&answer) { Some(drawn.into()) } else { state_of(worker, counter, &answer) };
    let state = state.ok_or_else(|| "ERR a version is not understood".to_owned())?;
    worker.versions().with_epoch(counter, |epoch| epoch.heard(asked_at, state.clone()));
    // Not before: who draws the first version would be told of that.
    worker.versions().watch(worker, counter, &key);
    Ok(state)
}

fn state_of(worker: &Worker, counter: &Counter, answer: &[u8]) -> Option<State> {
    let policy = worker.policy();
    let rule = counter.own_key().and_then(|key| policy.rule(policy.find(key)));
    State::parse(reply::text(answer)?, rule.map(|rule| &rule.keys))
}

/// A version, as the cache has it now. `None`: it has none, or none that is understood.
///
/// # Errors
/// The text of an error reply.
pub async fn ask_version(worker: &Rc<Worker>, counter: &Counter) -> Result<Option<State>, String> {
    let key = counter.key();
    let asked_at = worker.versions().now();
    let answer = ask(worker, invalidation_slot(worker, &key), Lane::default(), &[b"GET", &key]).await?;
    let state = state_of(worker, counter, &answer);
    if let Some(state) = &state {
        worker.versions().with_epoch(counter, |epoch| epoch.heard(asked_at, state.clone()));
    }
    Ok(state)
}

/// Invalidates all keys that a version is part of: draws a new one. Of a tag or a key there may be none, and then there is nothing that could be
/// met: the next to need one draws it. Replicas have not heard of it yet.
///
/// # Errors
/// The text of an error reply. It may be repeated.
pub async fn draw(worker: &Rc<Worker>, counter: &Counter) -> Result<(), String> {
    let version = Version::new(fastrand::u64(..));
    let (key, digits) = (counter.key(), version.to_string());
    let mut command: Vec<&[u8]> = vec![b"SET", &key, digits.as_bytes()];
    if counter.is_fleeting() {
        command.extend([&b"XX"[..], b"EX", FLEETING_LASTS]);
    }
    let asked_at = worker.versions().now();
    let answer = ask(worker, invalidation_slot(worker, &key), Lane::default(), &command).await?;
    if !reply::is_null(&answer) {
        worker.versions().with_epoch(counter, |epoch| epoch.heard(asked_at, version.into()));
    }
    Ok(())
}

/// A key's own version that is drawn for a value, and what stands with it.
#[derive(Debug)]
pub struct Drawn<'d> {
    /// The version.
    pub version: Version,
    /// The tags that the value is given.
    pub tags: &'d [Vec<u8>],
    /// Theirs.
    pub counters: &'d [Counter],
}

/// ARGV: the version before, what is to stand in its place, and for how many seconds. Repeated it answers the same.
const DRAW_BEHIND: &str = "\
local before = redis.call('GET', KEYS[1])
if not before then return 0 end
if string.sub(before, 1, 16) == ARGV[1] then redis.call('SET', KEYS[1], ARGV[2], 'EX', ARGV[3]) return 1 end
return before == ARGV[2] and 1 or 0";

/// Draws a key's own version anew, if it is still `before`. Whether it was.
///
/// # Errors
/// The text of an error reply: it may have been drawn.
pub async fn draw_behind(worker: &Rc<Worker>, own: &Counter, before: Version, drawn: &Drawn<'_>) -> Result<bool, String> {
    let (key, before, text) = (own.key(), before.to_string(), text_of(drawn.version, drawn.tags));
    let command: [&[u8]; 7] = [b"EVAL", DRAW_BEHIND.as_bytes(), b"1", &key, before.as_bytes(), text.as_bytes(), FLEETING_LASTS];
    let asked_at = worker.versions().now();
    let answer = ask(worker, invalidation_slot(worker, &key), Lane::default(), &command).await?;
    let is_drawn = reply::integer(&answer) == Some(1);
    if is_drawn {
        let state = State { version: drawn.version, tags: drawn.counters.into() };
        worker.versions().with_epoch(own, |epoch| epoch.heard(asked_at, state));
    }
    Ok(is_drawn)
}

/// A rule is versioned no more: what its keys had before is to go.
async fn tell_of_rule(worker: &Rc<Worker>, rule: &str) -> Result<(), String> {
    let slot = invalidation_slot(worker, STREAM.as_bytes());
    ask(worker, slot, Lane::default(), &[b"XADD", STREAM.as_bytes(), b"*", b"rule", rule.as_bytes()]).await.map(drop)
}
