//! Walks over all keys, page by page, for as long as something is wanted that takes it.
//!
//! How far a walk is stands in the cache, so that who takes the turn over goes on there. Where a server or a slot is another's than
//! when the walk began, it begins anew: what moves may have been met at neither place.

use std::cell::RefCell;
use std::rc::Rc;
use std::time::Duration;

use futures_util::future::{join_all, try_join_all};
use tokio::sync::Notify;
use tokio::time::{Instant, sleep, timeout_at};

use super::carry::{confirmed, is_forbidden};
use super::jobs::{Pass, Shard, Target, Walk};
use super::position::EntryId;
use super::shards::{Unsettled, contents, survey};
use super::store::Kept;
use crate::sidecar::dispatch::invalidation_slot;
use crate::sidecar::resp::{Protocol, encode, reply};
use crate::sidecar::slots::is_larder_key;
use crate::sidecar::upstream::ask::{ask_node, caller, heard};
use crate::sidecar::upstream::lane::Lane;
use crate::sidecar::upstream::queue::{ANY_SLOT, Pending, Retry};
use crate::sidecar::upstream::router::Node;
use crate::sidecar::worker::Worker;

/// How many names a step looks at, about.
const NAMES_PER_STEP: &[u8] = b"100";
/// A shard is at rest four times as long as a step took: a walk takes a fifth of its time at the most, and less where it is busy.
const REST: u32 = 4;
/// The shortest and the longest rest.
const RESTS: (Duration, Duration) = (Duration::from_millis(1), Duration::from_millis(500));
/// The pause after something failed, and until slots have come to rest.
const PAUSE: Duration = Duration::from_millis(500);
/// How often replicas are waited for that do not confirm.
const CONFIRMATIONS: usize = 3;

/// What the reader of the stream and the walker share.
#[derive(Debug, Default)]
pub struct Desk {
    /// What is written down.
    pub kept: RefCell<Kept>,
    /// Something new is wanted.
    pub wanted: Notify,
    /// Something should be written down soon.
    pub changed: Notify,
    /// Whether nothing is removed, as in a trial.
    counts_only: bool,
}

/// Why a walk stops for now.
#[derive(Debug, thiserror::Error)]
enum Halt {
    #[error(transparent)]
    Unsettled(#[from] Unsettled),
    #[error("{0}")]
    Error(String),
    #[error("servers or slots changed meanwhile")]
    Changed,
}

/// Walks for ever, whenever something is wanted.
pub async fn walk_forever(worker: &Rc<Worker>, desk: &Desk) {
    loop {
        if !desk.kept.borrow_mut().jobs.begin() {
            desk.wanted.notified().await;
            continue;
        }
        match walk(worker, desk).await {
            Ok(()) => {
                let mut kept = desk.kept.borrow_mut();
                if let Some(walk) = &kept.jobs.current {
                    tracing::info!(removed = walk.removed, restarts = walk.restarts, "a walk over all keys has ended");
                    worker.metrics().background().walks.inc();
                }
                kept.jobs.end();
                desk.changed.notify_one();
            }
            Err(halt) => {
                tracing::debug!(reason = %halt, "a walk over all keys pauses");
                sleep(PAUSE).await;
            }
        }
    }
}

/// One walk, from where it is to its end.
async fn walk(worker: &Rc<Worker>, desk: &Desk) -> Result<(), Halt> {
    let shards = survey(worker).await?;
    let found: Vec<Shard> = shards.iter().map(|(shard, _)| shard.clone()).collect();
    if !with_walk(desk, |walk| walk.fits(&found)) {
        let (contents, total) = contents(worker, &shards).await;
        with_walk(desk, |walk| walk.start_over(contents, total));
    }
    loop {
        try_join_all(shards.iter().map(|(shard, node)| walk_shard(worker, desk, shard, node))).await?;
        let pass = with_walk(desk, |walk| walk.pass);
        if pass == Pass::Values {
            confirm(worker, desk).await?;
        }
        // Behind the replicas' word: whoever takes a place from now on has heard.
        let now = survey(worker).await?;
        if now.len() != shards.len() || now.iter().any(|(shard, _)| !found.contains(shard)) {
            with_walk(desk, Walk::give_up);
            return Err(Halt::Changed);
        }
        if pass == Pass::Values {
            return Ok(());
        }
        let (contents, total) = contents(worker, &shards).await;
        with_walk(desk, |walk| walk.start_pass(Pass::Values, contents, total));
        desk.changed.notify_one();
    }
}

/// Reads or changes the walk under way.
fn with_walk<T: Default>(desk: &Desk, look: impl FnOnce(&mut Walk) -> T) -> T {
    desk.kept.borrow_mut().jobs.current.as_mut().map(look).unwrap_or_default()
}

/// One pass over one shard, from where it is.
async fn walk_shard(worker: &Rc<Worker>, desk: &Desk, shard: &Shard, node: &Rc<Node>) -> Result<(), Halt> {
    loop {
        let place = with_walk(desk, |walk| {
            let reached = walk.shards.iter().find(|reached| reached.shard == *shard)?;
            Some((*reached.databases.first()?, reached.cursor.clone()))
        });
        let Some((database, cursor)) = place else { return Ok(()) };
        let began = Instant::now();
        let page = ask_node(worker, node, database, &[b"SCAN", cursor.as_bytes(), b"COUNT", NAMES_PER_STEP]).await;
        let page = page.map_err(Halt::Error)?;
        let parts = reply::elements(&page).and_then(|parts| <[&[u8]; 2]>::try_from(parts).ok());
        let Some([next, names]) = parts else { return Err(Halt::Error("ERR SCAN's answer is not understood".to_owned())) };
        let mut names: Vec<&[u8]> = reply::elements(names).unwrap_or_default().into_iter().filter_map(reply::text).collect();
        let seen = names.len() as u64;
        if desk.counts_only {
            // A key and its copy may come on different pages.
            names.retain(|name| !is_larder_key(name));
        }
        let policy = worker.policy();
        let doomed = with_walk(desk, |walk| walk.sift(&policy, names.iter().copied()));
        let removed = if desk.counts_only { doomed.len() as u64 } else { remove(worker, database, &doomed).await? };
        let next = String::from_utf8_lossy(reply::text(next).unwrap_or(b"0")).into_owned();
        with_walk(desk, |walk| walk.turn_page(shard, &next, seen, removed));
        if !desk.counts_only {
            let counters = worker.metrics().background();
            counters.walk_seen.add(seen);
            counters.walk_removed.add(removed);
        }
        sleep((began.elapsed() * REST).clamp(RESTS.0, RESTS.1)).await;
    }
}

/// Removes names, each group of which is of one slot. How many of the groups had any.
async fn remove(worker: &Rc<Worker>, database: u8, groups: &[Vec<Vec<u8>>]) -> Result<u64, Halt> {
    let lane = Lane::of(Protocol::Resp2, database);
    let asked = groups.iter().map(|names| {
        let mut wire = Vec::new();
        encode::array(&mut wire, 1 + names.len());
        encode::bulk(&mut wire, b"UNLINK");
        names.iter().for_each(|name| encode::bulk(&mut wire, name));
        let slot = names.first().map_or(ANY_SLOT, |name| invalidation_slot(worker, name));
        let (sink, receiver) = caller();
        worker.submit(&[&wire], Pending::new(sink, slot, Retry::Safe, lane, worker.now()));
        heard(receiver)
    });
    let mut removed = 0;
    for answer in join_all(asked).await {
        match answer {
            Ok(answer) => removed += u64::from(reply::integer(&answer).unwrap_or_default() > 0),
            // A key that the rule's pattern covers, and the login's globs do not: nothing of this workload's writes it.
            Err(text) if is_forbidden(&text) => worker.metrics().background().events_forbidden.inc(),
            Err(text) => return Err(Halt::Error(text)),
        }
    }
    Ok(removed)
}

/// Waits until replicas have heard of it. Where they do not in time, it is said, and the walk has ended all the same.
async fn confirm(worker: &Rc<Worker>, desk: &Desk) -> Result<(), Halt> {
    let shards = worker.router().shards();
    let slots: Vec<u16> = if worker.is_cluster() { shards.into_iter().map(|(_, slot)| slot).collect() } else { vec![ANY_SLOT] };
    let mut why = None;
    for _ in 0..CONFIRMATIONS {
        match confirmed(worker, &slots).await {
            Ok(None) => return Ok(()),
            Ok(unconfirmed) => why = unconfirmed,
            Err(_) => {
                with_walk(desk, Walk::give_up);
                return Err(Halt::Changed);
            }
        }
    }
    worker.metrics().background().events_unconfirmed.inc();
    tracing::warn!(reason = why, "what a walk removed might come back after a failover");
    Ok(())
}

/// What a trial counted.
#[derive(Debug, Default)]
pub struct Counted {
    /// How many keys a walk would remove something of.
    pub found: u64,
    /// How many names were looked at.
    pub seen: u64,
    /// How many there are, about.
    pub total: u64,
    /// Whether that was all of them.
    pub complete: bool,
}

/// Counts what a walk would remove, at its pace, until the deadline.
///
/// # Errors
/// The text of an error.
pub async fn count(worker: &Rc<Worker>, target: Target, until: Instant) -> Result<Counted, String> {
    let desk = Desk { counts_only: true, ..Desk::default() };
    {
        let mut kept = desk.kept.borrow_mut();
        kept.jobs.wish(target, EntryId::default());
        kept.jobs.begin();
    }
    let shards = survey(worker).await.map_err(|unsettled| unsettled.to_string())?;
    let (contents, total) = contents(worker, &shards).await;
    with_walk(&desk, |walk| walk.start_pass(Pass::Values, contents, total));
    let walked = timeout_at(until, try_join_all(shards.iter().map(|(shard, node)| walk_shard(worker, &desk, shard, node)))).await;
    let complete = match walked {
        Ok(Err(halt)) => return Err(halt.to_string()),
        Ok(Ok(_)) => true,
        Err(_) => false,
    };
    Ok(with_walk(&desk, |walk| Counted { found: walk.removed, seen: walk.seen, total, complete }))
}
