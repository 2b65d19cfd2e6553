//! Loads what an MGET or EXISTS that is too long to be held does not find in the cache.
//!
//! The parts are gathered first. Then the keys that are missing, and that a rule loads, are read from the file and loaded, some at a
//! time: neither their names nor the loads under way grow with the command.

use std::rc::Rc;

use super::long_command::{LongCommand, LongKey};
use super::stream::MOST_WHOLE_BYTES;
use crate::sidecar::commands::{Access, CommandSpec, Join};
use crate::sidecar::patterns::content::Content;
use crate::sidecar::patterns::read_through::{self, Outcome, hash};
use crate::sidecar::policy::RuleId;
use crate::sidecar::resp::{encode, reply};
use crate::sidecar::session::Session;
use crate::sidecar::upstream::gather::Gathered;

/// The most keys that are loaded at once.
const MOST_KEYS: usize = 1_000;
/// The most bytes of such keys, and one key.
const MOST_KEY_BYTES: usize = 1024 * 1024;

/// Whether keys that the command does not find are to be loaded.
pub fn may_load(command: &LongCommand) -> bool {
    let policy = command.policy();
    matches!(command.spec.name, "mget" | "exists") && command.keys.iter().any(|key| policy.loads(key.rule))
}

/// Why a key that is missing in the cache is not loaded.
pub fn too_long(key: &LongKey) -> String {
    format!(
        "ERR a key of {} bytes is not in the cache, and cannot be loaded from its origin: the longest that can has {MOST_WHOLE_BYTES}",
        key.length
    )
}

/// The key of a read of one key whose null would say that the origin has nothing, which nobody has asked it.
pub fn only_loaded_key<'a>(command: &'a LongCommand, spec: &CommandSpec) -> Option<&'a LongKey> {
    let reads = spec.access != Access::Write && matches!(spec.name, "get" | "strlen" | "getrange" | "substr");
    let policy = command.policy();
    let loads = |key: &LongKey| reads && policy.loads(key.rule) || hash::loads(spec.name) && policy.loads_hashes(key.rule);
    command.keys.first().filter(|key| loads(key))
}

/// Answers the command at `place`, of which `gathered` is what the cache has.
pub async fn complete(session: &Rc<Session>, place: u32, command: &LongCommand, join: Join, gathered: Gathered) {
    if gathered.whole.first() == Some(&b'-') {
        return session.deliver(place, &gathered.whole);
    }
    let mut elements: Vec<Vec<u8>> = match join {
        Join::Sum => gathered.parts,
        _ => reply::elements(&gathered.whole).unwrap_or_default().into_iter().map(<[u8]>::to_vec).collect(),
    };
    let found = |element: &mut Vec<u8>, value: Option<&Content<'_>>| match (join, value) {
        (Join::Sum, _) => {
            element.clear();
            encode::integer(element, 1);
        }
        (_, Some(Content::Text(text))) => {
            element.clear();
            encode::bulk(element, text);
        }
        // Of what is no string MGET shows null.
        (_, Some(Content::Hash(_)) | None) => {}
    };
    let missing = count_and_pick_missing(session, command, &elements);
    if let Err(text) = load(session, command, &missing, |at, value| found(&mut elements[at], value)).await {
        return session.answer(place, |out| encode::error(out, &text));
    }
    session.answer(place, |out| match join {
        Join::Sum => encode::integer(out, elements.iter().filter_map(|element| reply::integer(element)).sum()),
        _ => {
            encode::array(out, elements.len());
            elements.iter().for_each(|element| out.extend_from_slice(element));
        }
    });
    session.worker().flush_dirty();
}

/// Counts hits and misses, and picks the places of the keys to load.
fn count_and_pick_missing(session: &Session, command: &LongCommand, elements: &[Vec<u8>]) -> Vec<usize> {
    let (policy, metrics) = (command.policy(), session.worker().metrics());
    let mut missing = Vec::new();
    for (at, (key, element)) in command.keys.iter().zip(elements).enumerate() {
        let absent = reply::is_null(element) || reply::integer(element) == Some(0);
        metrics.count_read(key.rule, absent);
        if absent && policy.loads(key.rule) {
            missing.push(at);
        }
    }
    missing
}

/// Loads the keys at these places, and hands on what is found.
async fn load(
    session: &Rc<Session>,
    command: &LongCommand,
    missing: &[usize],
    mut found: impl FnMut(usize, Option<&Content<'_>>),
) -> Result<(), String> {
    let mut rest = missing;
    while !rest.is_empty() && !session.is_closed() {
        let (batch, others) = rest.split_at(batch_length(command, rest));
        rest = others;
        let outcomes = read_through::load_keys(session.worker(), session.lane(), keys(command, batch).await?).await;
        for (at, outcome) in batch.iter().zip(outcomes) {
            match outcome {
                Outcome::Found(value) | Outcome::Cached(value) => found(*at, Some(&value)),
                Outcome::Other => found(*at, None),
                Outcome::NotFound => {}
                Outcome::Failed(text) => return Err(text),
            }
        }
    }
    Ok(())
}

/// How many of these keys are loaded together.
fn batch_length(command: &LongCommand, places: &[usize]) -> usize {
    let mut bytes = 0;
    let fits = places.iter().take(MOST_KEYS).take_while(|at| {
        bytes += command.keys[**at].length as usize;
        bytes <= MOST_KEY_BYTES
    });
    fits.count().max(1)
}

async fn keys(command: &LongCommand, places: &[usize]) -> Result<Vec<(RuleId, Vec<u8>)>, String> {
    let keys: Vec<LongKey> = places.iter().map(|at| command.keys[*at]).collect();
    if let Some(key) = keys.iter().find(|key| key.length as usize > MOST_WHOLE_BYTES) {
        return Err(too_long(key));
    }
    let bytes = command.bytes(keys.iter().map(LongKey::as_text).collect()).await.map_err(|error| error.to_string())?;
    let mut rest = &bytes[..];
    let mut named = Vec::with_capacity(keys.len());
    for key in keys {
        let (own, others) = rest.split_at((key.length as usize + 2).min(rest.len()));
        named.push((key.rule, own[..own.len().saturating_sub(2)].to_vec()));
        rest = others;
    }
    Ok(named)
}
