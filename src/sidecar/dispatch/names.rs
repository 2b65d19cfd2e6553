//! Commands that name keys which the client did not: RANDOMKEY and CLUSTER GETKEYSINSLOT. They name none of Larder's own, so that
//! servers may have to be asked more than once. Until then no more is read from the client: its order stays.

use std::rc::Rc;

use super::Flow;
use super::shards::slots_of_all;
use crate::sidecar::resp::{encode, reply};
use crate::sidecar::session::Session;
use crate::sidecar::upstream::ask::ask;
use crate::sidecar::versions::shown;

/// How often chance is tried before the keys are walked.
const MOST_DRAWS: usize = 16;
/// How many keys a step of the walk looks at, about.
const KEYS_PER_STEP: &[u8] = b"1000";
/// The most steps of the walk. With more of Larder's keys in a row than these, the client is told that there is no other.
const MOST_STEPS: usize = 1000;
/// Companions stand beside a key in its slot: so many names are asked for each that the client wants.
const NAMES_PER_KEY: u64 = 4;

/// A key of any shard, at random. In a Cluster each shard is as likely as another that holds keys.
pub fn random(session: &Rc<Session>) -> Flow {
    let (asking, protocol) = (session.clone(), session.protocol());
    answer_later(session, async move {
        let found = draw(&asking).await?;
        let mut out = Vec::new();
        match found {
            Some(key) => encode::bulk(&mut out, &key),
            None => encode::null(&mut out, protocol),
        }
        Ok(out)
    })
}

/// Up to `count` keys of a Cluster's slot.
pub fn in_slot(session: &Rc<Session>, slot: u16, count: u64) -> Flow {
    let asking = session.clone();
    answer_later(session, async move {
        let (worker, lane) = (asking.worker().clone(), asking.lane());
        let digits = slot.to_string();
        let mut wanted = count;
        loop {
            wanted = wanted.saturating_mul(NAMES_PER_KEY).min(i64::MAX as u64);
            let command = [&b"CLUSTER"[..], b"GETKEYSINSLOT", digits.as_bytes(), &wanted.to_string().into_bytes()];
            let list = ask(&worker, slot, lane, &command).await?;
            let names = reply::elements(&list).unwrap_or_default();
            let total = names.len() as u64;
            // A name with a version may lie in another slot than the key that the client knows.
            let is_own = |name: &&[u8]| reply::text(name).is_some_and(|name| shown(&worker, name) == Some(name));
            let mut own: Vec<&[u8]> = names.into_iter().filter(is_own).collect();
            if own.len() as u64 >= count || total < wanted {
                own.truncate(usize::try_from(count).unwrap_or(usize::MAX));
                let mut out = Vec::new();
                encode::array(&mut out, own.len());
                own.iter().for_each(|name| out.extend_from_slice(name));
                return Ok(out);
            }
        }
    })
}

/// Answers the command in its place, with a reply or the text of an error.
pub fn answer_later(session: &Rc<Session>, work: impl Future<Output = Result<Vec<u8>, String>> + 'static) -> Flow {
    let (session, place) = (session.clone(), session.take_place());
    session.hold();
    tokio::task::spawn_local(async move {
        match work.await {
            Ok(reply) => session.deliver(place, &reply),
            Err(text) => session.answer(place, |out| encode::error(out, &text)),
        }
        session.release();
        session.worker().flush_dirty();
    });
    Flow::Wait
}

async fn draw(session: &Rc<Session>) -> Result<Option<Vec<u8>>, String> {
    let (worker, lane) = (session.worker(), session.lane());
    let mut shards = slots_of_all(worker);
    for _ in 0..MOST_DRAWS {
        let Some(at) = (worker.random() as usize).checked_rem(shards.len()) else { return Ok(None) };
        let drawn = ask(worker, shards[at], lane, &[b"RANDOMKEY"]).await?;
        match reply::text(&drawn) {
            Some(name) => {
                if let Some(key) = shown(worker, name) {
                    return Ok(Some(key.to_vec()));
                }
            }
            None => drop(shards.swap_remove(at)),
        }
    }
    for slot in shards {
        if let Some(key) = walk(session, slot).await? {
            return Ok(Some(key));
        }
    }
    Ok(None)
}

/// The first key of a shard that is not Larder's.
async fn walk(session: &Rc<Session>, slot: u16) -> Result<Option<Vec<u8>>, String> {
    let mut cursor = b"0".to_vec();
    for _ in 0..MOST_STEPS {
        let page = ask(session.worker(), slot, session.lane(), &[b"SCAN", &cursor, b"COUNT", KEYS_PER_STEP]).await?;
        let parts = reply::elements(&page).unwrap_or_default();
        let [next, keys] = parts[..] else { break };
        let keys = reply::elements(keys).unwrap_or_default();
        if let Some(key) = keys.into_iter().filter_map(reply::text).find_map(|name| shown(session.worker(), name)) {
            return Ok(Some(key.to_vec()));
        }
        cursor = reply::text(next).unwrap_or(b"0").to_vec();
        if cursor == b"0" {
            break;
        }
    }
    Ok(None)
}
