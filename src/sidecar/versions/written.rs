//! The end of a write of versioned keys: it is acknowledged once the version that counts has heard of it.

use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;

use futures_util::future::try_join_all;

use super::keeper;
use crate::policy::versions::{Counter, Version};
use crate::sidecar::dispatch::{invalidation_slot, submit_invalidation};
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
            match settle(&worker, &mapped).await {
                Ok(_) => sink.deliver(&worker, Answer::Reply(&bytes)),
                Err(text) => {
                    let text =
                        format!("UNCERTAIN the write was made, but which version of its key counts cannot be told: {text}");
                    sink.deliver(&worker, Answer::Failed(&text));
                }
            }
            worker.flush_dirty();
        });
    }
}

/// What was removed under the versions that count.
#[derive(Debug, Default)]
pub struct Settled {
    /// How many keys.
    pub removed: u64,
    /// The slots of all names that were to go.
    pub slots: Vec<u16>,
}

/// A key, what its version is made of, and the version that has heard of the write.
type Open<'m> = (&'m [Counter], &'m [u8], Option<Version>);

/// Removes keys under the versions that count, where these are others than those that they were written under.
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

/// Those of `open` whose version is another by now, with that. Where part of a version is not there any more, the next to need it draws what
/// nothing was stored under.
async fn outdated<'m>(worker: &Rc<Worker>, open: &[Open<'m>]) -> Result<Vec<Open<'m>>, String> {
    let counters: BTreeSet<&Counter> = open.iter().flat_map(|(counters, ..)| *counters).collect();
    let asked = try_join_all(counters.iter().map(|counter| keeper::ask_version(worker, counter))).await?;
    let versions: BTreeMap<&Counter, Option<Version>> = counters.into_iter().zip(asked).collect();
    let counts = |counters: &[Counter]| {
        let parts = counters.iter().map(|counter| versions.get(counter).copied().flatten());
        parts.collect::<Option<Vec<_>>>()?.into_iter().reduce(Version::with)
    };
    let outdated = open.iter().filter_map(|(counters, key, heard_of_it)| {
        let counts = counts(counters).filter(|counts| Some(*counts) != *heard_of_it)?;
        Some((*counters, *key, Some(counts)))
    });
    Ok(outdated.collect())
}
