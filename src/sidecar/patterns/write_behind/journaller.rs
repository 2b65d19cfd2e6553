//! One rule's journal, as a sidecar uses it.

use std::collections::BTreeMap;
use std::rc::Rc;
use std::time::Duration;

use futures_util::future::join_all;
use tokio::time::Instant;

use crate::journal::scripts::{self, Appended, Bound, Bounds, Call, Left};
use crate::journal::{self, Change, Held, PARTITIONS, Partition, Version};
use crate::origin::Changed;
use crate::policy::{Journal, JournalName};
use crate::sidecar::exclusive::durable::{self, Done, Undone};
use crate::sidecar::meter::WriteFailure;
use crate::sidecar::patterns::write_through::Untold;
use crate::sidecar::resp::{encode, reply};
use crate::sidecar::upstream::ask::ask;
use crate::sidecar::upstream::lane::Lane;
use crate::sidecar::upstream::queue::ANY_SLOT;
use crate::sidecar::worker::Worker;

/// An append leaves within this time, or not at all.
const SENT_WITHIN_MS: u64 = 10_000;
/// It is carried out within this time of being sent, by the server's clock, or not at all: it may lie in a socket of a server that is stopped.
const CARRIED_OUT_WITHIN_MS: u64 = 5_000;

const BUSY: &str = "TRYAGAIN another write of the key is being told to the origin, past the journal";

/// Writes that go past a journal: each one's key and version.
pub type Detour = Vec<(Vec<u8>, Version)>;

/// Appends to a journal, and looks up what is on its way.
#[derive(Debug, Clone)]
pub struct Journaller {
    name: JournalName,
    bounds: Bounds,
}

/// What came of a leave of one partition's keys.
struct Leaving {
    versions: Vec<Version>,
    /// Why the origin must not be told all the same.
    refused: Option<String>,
}

impl Leaving {
    fn refused(text: impl Into<String>) -> Self {
        Self { versions: Vec::new(), refused: Some(text.into()) }
    }

    fn of(answer: &[u8], durable: Result<(), String>, count: usize) -> Self {
        let parts = reply::elements(answer).unwrap_or_default();
        let words: Vec<&[u8]> = parts.iter().filter_map(|part| reply::text(part)).collect();
        match scripts::left(&words) {
            Ok(Left::Done(versions)) if versions.len() == count => {
                Self { versions, refused: durable.err().map(|why| format!("TRYAGAIN {why}")) }
            }
            Ok(Left::Waits) => {
                Self::refused("JOURNAL there is no room, and an earlier write of the key still waits for the origin")
            }
            Ok(Left::Busy) => Self::refused(BUSY),
            Ok(Left::Late) => Self::refused("TRYAGAIN the server took too long"),
            Ok(Left::Done(_)) | Err(_) => Self::refused("ERR the cache gave an unexpected answer to a script of Larder's"),
        }
    }
}

/// What became of the keys of one partition: their places in the order, and their versions.
type Part = (Vec<usize>, Result<Vec<Version>, Untold>);

impl Journaller {
    /// The longest that an append may take, from the moment on in which it is asked for, until it surely comes to nothing, in milliseconds.
    pub const TAKES_MS: u64 = SENT_WITHIN_MS + CARRIED_OUT_WITHIN_MS;

    /// That of a rule.
    pub fn new(journal: &Journal) -> Self {
        let share = |most: u64| most.div_ceil(u64::from(PARTITIONS));
        let bounds = Bounds {
            depth: share(journal.max_depth),
            bytes: share(journal.max_bytes.as_bytes()),
            age_ms: journal.max_lag.as_millis(),
        };
        Self { name: journal.name.clone(), bounds }
    }

    /// Journals values and deletions of different keys, each partition's all or none of them. What came of each, in their order.
    ///
    /// # Errors
    /// Where any was not journalled, or is not known to be durable.
    pub async fn append(&self, worker: &Rc<Worker>, keys: &[(Vec<u8>, Option<Vec<u8>>)]) -> Result<Vec<Changed>, Untold> {
        let mut parts: BTreeMap<u8, Vec<usize>> = BTreeMap::new();
        for (at, (key, _)) in keys.iter().enumerate() {
            parts.entry(journal::partition_of(key)).or_default().push(at);
        }
        let parts = join_all(parts.into_iter().map(|(number, places)| async move {
            let changes = places.iter().filter_map(|at| keys.get(*at));
            let changes = changes.map(|(key, value)| Change { key: key.clone(), value: value.clone() }).collect();
            let versions = self.append_part(worker, Partition::new(&self.name, number), changes).await;
            (places, versions)
        }));
        together(keys.len(), parts.await)
    }

    async fn append_part(&self, worker: &Rc<Worker>, partition: Partition, changes: Vec<Change>) -> Result<Vec<Version>, Untold> {
        let (count, bounds) = (changes.len(), self.bounds);
        let slot = slot_of(worker, &partition);
        let make = move |now: u64| encoded(&scripts::append(&partition, now + CARRIED_OUT_WITHIN_MS * 1_000, bounds, &changes));
        match durable::carry_out(worker, slot, Instant::now() + Duration::from_millis(SENT_WITHIN_MS), make).await {
            Ok(Done { answer, durable }) => self.judge(&answer, durable, count),
            Err(Undone::Surely(text)) => Err(surely(&text)),
            Err(Undone::Perhaps(why)) => Err(perhaps(&why)),
        }
    }

    /// Has writes of these keys go past the journal, for at most `micros` from now on. Nobody journals them meanwhile, and the origin has all that
    /// was journalled before: so it may be told, and what it has then is in order. The writes, in the order of their keys.
    ///
    /// # Errors
    /// Where one of them may not, or it is not known to be durable. The origin must not be told, then: nothing is written.
    pub async fn leave(&self, worker: &Rc<Worker>, keys: &[(Vec<u8>, Option<Vec<u8>>)], micros: u64) -> Result<Detour, Untold> {
        let mut parts: BTreeMap<u8, Vec<usize>> = BTreeMap::new();
        for (at, (key, _)) in keys.iter().enumerate() {
            parts.entry(journal::partition_of(key)).or_default().push(at);
        }
        let parts = join_all(parts.into_iter().map(|(number, places)| async move {
            let names: Vec<Vec<u8>> = places.iter().filter_map(|at| Some(keys.get(*at)?.0.clone())).collect();
            (places, self.leave_part(worker, Partition::new(&self.name, number), names, micros).await)
        }));
        let (mut writes, mut failed) = (vec![(Vec::new(), Version::ZERO); keys.len()], None);
        for (places, Leaving { versions, refused }) in parts.await {
            places.iter().zip(versions).for_each(|(at, version)| writes[*at] = (keys[*at].0.clone(), version));
            failed = failed.or(refused);
        }
        let Some(text) = failed else { return Ok(writes) };
        writes.retain(|(_, version)| *version > Version::ZERO);
        self.arrive(worker, &writes).await;
        Err(surely(&text))
    }

    async fn leave_part(&self, worker: &Rc<Worker>, partition: Partition, keys: Vec<Vec<u8>>, micros: u64) -> Leaving {
        let (count, slot) = (keys.len(), slot_of(worker, &partition));
        let make = move |now: u64| encoded(&scripts::leave(&partition, now + CARRIED_OUT_WITHIN_MS * 1_000, micros, &keys));
        match durable::carry_out(worker, slot, Instant::now() + Duration::from_millis(SENT_WITHIN_MS), make).await {
            Ok(Done { answer, durable }) => Leaving::of(&answer, durable, count),
            Err(Undone::Surely(text) | Undone::Perhaps(text)) => Leaving::refused(text),
        }
    }

    /// Ends what [`Journaller::leave`] began, where it is known what came of the writes. Where it fails, that ends by itself.
    pub async fn arrive(&self, worker: &Rc<Worker>, writes: &[(Vec<u8>, Version)]) {
        let mut parts: BTreeMap<u8, Vec<(Vec<u8>, Version)>> = BTreeMap::new();
        for (key, version) in writes {
            parts.entry(journal::partition_of(key)).or_default().push((key.clone(), *version));
        }
        join_all(parts.into_iter().map(|(number, writes)| async move {
            let partition = Partition::new(&self.name, number);
            let command = scripts::arrive(&partition, &writes).command();
            let command: Vec<&[u8]> = command.iter().map(Vec::as_slice).collect();
            ask(worker, slot_of(worker, &partition), Lane::default(), &command).await
        }))
        .await;
    }

    fn judge(&self, answer: &[u8], durable: Result<(), String>, count: usize) -> Result<Vec<Version>, Untold> {
        let parts = reply::elements(answer).unwrap_or_default();
        let words: Vec<&[u8]> = parts.iter().filter_map(|part| reply::text(part)).collect();
        match (scripts::appended(&words), durable) {
            (Ok(Appended::Done(versions)), Ok(())) if versions.len() == count => Ok(versions),
            (Ok(Appended::Done(_)), Err(why)) => Err(perhaps(&why)),
            (Ok(Appended::Full(bound)), _) => Err(Untold {
                failure: WriteFailure::Rejected,
                text: format!("JOURNAL {}: nothing was written", self.full_text(bound)),
            }),
            (Ok(Appended::Late), _) => Err(surely("TRYAGAIN the server took too long")),
            (Ok(Appended::Busy), _) => Err(surely(BUSY)),
            (Ok(Appended::Done(_)) | Err(_), _) => Err(perhaps("the cache gave an unexpected answer to a script of Larder's")),
        }
    }

    fn full_text(&self, bound: Bound) -> String {
        let Bounds { depth, bytes, age_ms } = self.bounds;
        match bound {
            Bound::Depth => format!("{depth} writes of the key's partition wait for the origin, the most there may be"),
            Bound::Bytes => {
                format!("the writes of the key's partition that wait for the origin take {bytes} bytes, the most there may be")
            }
            Bound::Age => format!("a write has waited for the origin for more than {age_ms} ms, the longest it may"),
        }
    }

    /// What a key was last written to, where the origin has not got that yet.
    ///
    /// # Errors
    /// Why that cannot be told.
    pub async fn look_up(&self, worker: &Rc<Worker>, key: &[u8]) -> Result<Option<Held>, String> {
        let partition = Partition::new(&self.name, journal::partition_of(key));
        let command = scripts::look_up(&partition, key);
        let command: Vec<&[u8]> = command.iter().map(Vec::as_slice).collect();
        let answer = ask(worker, slot_of(worker, &partition), Lane::default(), &command).await?;
        scripts::looked_up(reply::text(&answer)).map_err(|error| error.to_string())
    }
}

/// What came of all keys, given what came of each partition's.
fn together(count: usize, parts: Vec<Part>) -> Result<Vec<Changed>, Untold> {
    let mut changed = vec![Changed::default(); count];
    let (mut made, mut failed) = (0, None);
    for (places, outcome) in parts {
        match outcome {
            Ok(versions) => {
                made += places.len();
                for (at, version) in places.into_iter().zip(versions) {
                    changed[at] = Changed { rows: 1, version: Some(version.get()), ..Changed::default() };
                }
            }
            // What may have been made weighs more than what was not.
            Err(untold) if failed.is_none() || untold.failure == WriteFailure::Unknown => failed = Some(untold),
            Err(_) => {}
        }
    }
    match failed {
        None => Ok(changed),
        Some(untold) if made == 0 => Err(untold),
        Some(Untold { text, .. }) => Err(Untold {
            failure: WriteFailure::Unknown,
            text: format!("JOURNAL {made} of {count} keys are written, others are not known to be ({text}): repeat the command"),
        }),
    }
}

fn surely(text: &str) -> Untold {
    Untold { failure: WriteFailure::Otherwise, text: format!("{text}: nothing was written") }
}

fn perhaps(why: &str) -> Untold {
    let text = format!("JOURNAL the write may come to the origin or not: {why}; read the key before you repeat it");
    Untold { failure: WriteFailure::Unknown, text }
}

fn slot_of(worker: &Worker, partition: &Partition) -> u16 {
    if worker.is_cluster() { partition.slot() } else { ANY_SLOT }
}

fn encoded(call: &Call) -> Vec<u8> {
    let mut wire = Vec::new();
    encode::command(&mut wire, &call.command());
    wire
}
