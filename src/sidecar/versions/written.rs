//! The end of a write of versioned keys: it is acknowledged once the version that counts has heard of it.
//!
//! Where a key is invalidated that has a version of its own, that one is drawn anew behind its removal: the removal is seen at once by all who
//! know the version that counts, and what was loaded before is met by nobody once they have heard of the next.

use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;

use futures_util::future::try_join_all;

use super::keeper;
use super::state::{State, combined};
use crate::policy::versions::{Counter, Version};
use crate::sidecar::dispatch::{invalidation_slot, submit_invalidation};
use crate::sidecar::exclusive::wait::{removal_text, wait_for_replicas};
use crate::sidecar::resp::reply;
use crate::sidecar::upstream::ask::{caller, heard};
use crate::sidecar::upstream::lane::Lane;
use crate::sidecar::upstream::sink::{Answer, Sink};
use crate::sidecar::worker::Worker;

/// How often versions may change while a write asks for them.
const MOST_CHANGES: usize = 4;

/// Versioned keys that a command changes.
#[derive(Debug)]
pub struct Mapped {
    /// Where it goes.
    pub lane: Lane,
    /// What the version of each key is made of, the key, and the version under which it was written, if it was.
    pub keys: Vec<(Vec<Counter>, Vec<u8>, Option<Version>)>,
    /// Whether it invalidates them: then those of their versions that are a key's own are drawn anew, and replicas are to hear of it.
    pub invalidates: bool,
}

impl Mapped {
    /// The same of one key alone, by the name under which the command has it. `None`: it is no versioned key.
    fn of(&self, name: &[u8]) -> Option<Self> {
        let has_it = |version: &Option<Version>, key: &[u8]| version.is_some_and(|version| version.name(key) == name);
        let key = self.keys.iter().find(|(_, key, version)| has_it(version, key))?;
        Some(Self { lane: self.lane, keys: vec![key.clone()], invalidates: self.invalidates })
    }
}

/// Who waits for the reply to a write of versioned keys.
#[derive(Debug)]
pub struct Written {
    /// Who gets the reply.
    pub sink: Sink,
    mapped: Rc<Mapped>,
}

/// `sink`, behind the question which version counts, where the command which is being handed on writes versioned keys.
pub fn guarded(worker: &Worker, sink: Sink) -> Sink {
    match worker.has_versions().then(|| worker.versions().mapped()).flatten() {
        Some(mapped) => Sink::Written(Box::new(Written { sink, mapped })),
        None => sink,
    }
}

/// As [`guarded`], for a command's part that is about the key of this name alone.
pub fn guarded_key(worker: &Worker, name: &[u8], sink: Sink) -> Sink {
    let mapped = worker.has_versions().then(|| worker.versions().mapped()).flatten();
    match mapped.and_then(|mapped| mapped.of(name)) {
        Some(mapped) => Sink::Written(Box::new(Written { sink, mapped: Rc::new(mapped) })),
        None => sink,
    }
}

impl Written {
    /// Hands over the reply, once the version that counts has heard of the write.
    pub fn finish(self, worker: &Rc<Worker>, answer: Answer<'_>) {
        let Self { sink, mapped } = self;
        let bytes = match answer {
            Answer::Reply(bytes) if bytes.first() != Some(&b'-') => bytes.to_vec(),
            _ => return sink.deliver(worker, answer),
        };
        let worker = worker.clone();
        tokio::task::spawn_local(async move {
            match finished(&worker, &mapped).await {
                Ok(()) => sink.deliver(&worker, Answer::Reply(&bytes)),
                Err(text) => sink.deliver(&worker, Answer::Failed(&text)),
            }
            worker.flush_dirty();
        });
    }
}

async fn finished(worker: &Rc<Worker>, mapped: &Mapped) -> Result<(), String> {
    let settled = settle(worker, mapped)
        .await
        .map_err(|text| format!("UNCERTAIN the write was made, but which version of its key counts cannot be told: {text}"))?;
    if mapped.invalidates && !settled.slots.is_empty() {
        wait_for_replicas(worker, mapped.lane, &settled.slots).await.map_err(|why| removal_text(&why))?;
    }
    Ok(())
}

/// What was done under the versions that count.
#[derive(Debug, Default)]
pub struct Settled {
    /// How many keys were removed.
    pub removed: u64,
    /// The slots of all names that were to go, and of the versions that were drawn anew.
    pub slots: Vec<u16>,
}

/// A key, what its version is made of, and the version that has heard of the write.
type Open<'m> = (&'m [Counter], &'m [u8], Option<Version>);

/// Removes keys under the versions that count, where these are others than those that they were written under, and draws anew those that
/// are their own where they are invalidated.
///
/// # Errors
/// The text of an error reply: keys may be there still, and whoever wants them gone repeats it.
pub async fn settle(worker: &Rc<Worker>, mapped: &Mapped) -> Result<Settled, String> {
    let mut settled = Settled::default();
    let mut open: Vec<Open<'_>> =
        mapped.keys.iter().map(|(counters, key, version)| (&counters[..], &key[..], *version)).collect();
    for _ in 0..=MOST_CHANGES {
        open = outdated(worker, &open).await?;
        if open.is_empty() {
            draw_own(worker, mapped, &mut settled.slots).await?;
            return Ok(settled);
        }
        let removals = open.iter().filter_map(|(_, key, counts)| {
            let (name, (sink, receiver)) = ((*counts)?.name(key), caller());
            settled.slots.push(invalidation_slot(worker, &name));
            submit_invalidation(worker, mapped.lane, &name, sink);
            Some(heard(receiver))
        });
        for there in try_join_all(removals.collect::<Vec<_>>()).await? {
            settled.removed += u64::try_from(reply::integer(&there).unwrap_or_default()).unwrap_or_default();
        }
    }
    Err("TRYAGAIN what was written is invalidated again and again".to_owned())
}

async fn draw_own(worker: &Rc<Worker>, mapped: &Mapped, slots: &mut Vec<u16>) -> Result<(), String> {
    let all = mapped.keys.iter().filter(|_| mapped.invalidates).flat_map(|(counters, ..)| counters);
    let own: BTreeSet<&Counter> = all.filter(|counter| counter.is_of_key()).collect();
    slots.extend(own.iter().map(|counter| invalidation_slot(worker, &counter.key())));
    try_join_all(own.into_iter().map(|counter| keeper::draw(worker, counter))).await.map(drop)
}

/// Those of `open` whose version is another by now, with that. Where part of a version is not there any more, the next to need it draws what
/// nothing was stored under.
async fn outdated<'m>(worker: &Rc<Worker>, open: &[Open<'m>]) -> Result<Vec<Open<'m>>, String> {
    let mut states = ask_all(worker, open.iter().flat_map(|(counters, ..)| *counters).cloned().collect()).await?;
    let brought = states.values().flatten().flat_map(|state| state.tags.iter());
    let brought = brought.filter(|tag| !states.contains_key(*tag)).cloned().collect();
    states.extend(ask_all(worker, brought).await?);
    let counts = |counters: &[Counter]| combined(counters, |counter| states.get(counter).cloned().flatten());
    let outdated = open.iter().filter_map(|(counters, key, heard_of_it)| {
        let counts = counts(counters).filter(|counts| Some(*counts) != *heard_of_it)?;
        Some((*counters, *key, Some(counts)))
    });
    Ok(outdated.collect())
}

async fn ask_all(worker: &Rc<Worker>, counters: BTreeSet<Counter>) -> Result<BTreeMap<Counter, Option<State>>, String> {
    let asked = try_join_all(counters.iter().map(|counter| keeper::ask_version(worker, counter))).await?;
    Ok(counters.into_iter().zip(asked).collect())
}
