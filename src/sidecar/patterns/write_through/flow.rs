//! A write's way to the origin and to the cache.

use std::cell::Cell;
use std::rc::Rc;

use futures_util::future::join_all;
use tokio::sync::oneshot;
use tokio::time::{Duration, Instant};

use super::super::content::Content;
use super::scripts::{self, Names, Outcome};
use super::wish::{self, Order};
use crate::origin::{Change, Changed, LoadError, Writer};
use crate::policy::{self, Lifetime, Span};
use crate::sidecar::exclusive::wait::{Proof, Unconfirmed, wait_for_heirs};
use crate::sidecar::meter::WriteFailure;
use crate::sidecar::patterns::write_behind::Journaller;
use crate::sidecar::policy::{ActivePolicy, RuleId};
use crate::sidecar::resp::encode;
use crate::sidecar::session::Session;
use crate::sidecar::slots;
use crate::sidecar::upstream::lane::Lane;
use crate::sidecar::upstream::queue::{ANY_SLOT, Pending, Retry};
use crate::sidecar::upstream::sink::{Answer, Sink};
use crate::sidecar::worker::Worker;

/// The origin is told within this time of the mark, or not at all.
const ORIGIN_WITHIN: Duration = Duration::from_secs(5);
/// Where a server dies that had the mark, the next is told within this time, after pauses as long as that.
const MARKED_WITHIN: Duration = Duration::from_millis(2_500);
const MARK_AGAIN_AFTER_MS: u64 = 50;
/// A mark outlasts its write by this, for the sake of clocks.
const MARGIN_MS: u64 = 1_000;
/// How many times its timeout a transaction may take at most: it begins within one, and between its beginning, its statement and its
/// end the server lets none of them, and no pause, take longer than one more.
const TIMEOUTS: u64 = 5;
/// The most writes of one worker under way at once; more are told to try again.
const MOST_WRITES: usize = 10_000;

/// How many writes a worker has under way.
#[derive(Debug, Default)]
pub struct Writes(Cell<usize>);

/// One write, with all that it needs of its rule: a change of policy does not tear it.
struct Write {
    rule: RuleId,
    lane: Lane,
    token: String,
    destination: Destination,
    lifetime: Lifetime,
    stale: Span,
    mark_ms: u64,
    order: Order,
    names: Vec<Names>,
}

/// Who is told of a write before the cache has it.
enum Destination {
    Origin(Writer),
    Journal(Journaller, Option<Overflow>),
}

/// Whom a write is told for which the journal has no room.
struct Overflow {
    writer: Writer,
    /// How long that may take, in milliseconds.
    takes_ms: u64,
}

/// A write that was not made, or perhaps was.
#[derive(Debug)]
pub struct Untold {
    /// What counts it.
    pub failure: WriteFailure,
    /// The error reply's text, its code first.
    pub text: String,
}

impl From<LoadError> for Untold {
    fn from(error: LoadError) -> Self {
        let failure = WriteFailure::from(&error);
        let text = match failure {
            WriteFailure::Unknown => format!("ORIGIN {error}: read the key before you repeat it"),
            WriteFailure::Rejected | WriteFailure::Otherwise => format!("ORIGIN {error}: nothing was written"),
        };
        Self { failure, text }
    }
}

/// Begins a write. Its session hands on nothing more until it is answered.
pub fn launch(session: &Rc<Session>, policy: &ActivePolicy, order: Order) {
    let worker = session.worker().clone();
    let place = session.take_place();
    let writes = worker.writes();
    if writes.0.get() >= MOST_WRITES {
        return session
            .answer(place, |out| encode::error(out, "TRYAGAIN too many writes are under way at once: repeat it later"));
    }
    let Some(write) = Write::new(&worker, policy, session.lane().shared(), order) else {
        return session.answer(place, |out| encode::error(out, "TRYAGAIN the policy has changed: repeat the write"));
    };
    writes.0.set(writes.0.get() + 1);
    session.hold();
    let session = session.clone();
    tokio::task::spawn_local(async move {
        let reply = Rc::new(write).run(&worker).await;
        worker.writes().0.set(worker.writes().0.get().saturating_sub(1));
        session.answer(place, |out| match reply {
            Ok(wish::Answer::Ok) => encode::status(out, "OK"),
            Ok(wish::Answer::Number(number)) => encode::integer(out, number),
            Err(text) => encode::error(out, &text),
        });
        session.release();
        worker.flush_dirty();
    });
}

/// The thread of origins is gone: so is this process, soon, and whether the write left is not known.
fn is_stopping() -> LoadError {
    LoadError::Unknown { origin: String::new(), why: "the sidecar is stopping".to_owned() }
}

impl Write {
    fn new(worker: &Worker, policy: &ActivePolicy, lane: Lane, order: Order) -> Option<Self> {
        let rule = order.rule;
        let read = policy.read_through(rule)?;
        let origin = policy.snapshot().origins.iter().find(|origin| origin.name == read.load.origin)?;
        let within = u64::try_from(ORIGIN_WITHIN.as_millis()).unwrap_or(u64::MAX);
        let writer = policy.writer(rule)?.clone();
        let takes_tags = writer.takes_tags();
        let (destination, takes_ms) = match policy.journal(rule) {
            Some(journal) => {
                let takes_ms = within + TIMEOUTS * origin.timeout.as_millis() + MARGIN_MS;
                let overflow = (journal.overflow == policy::Overflow::WriteThrough).then_some(Overflow { writer, takes_ms });
                let overflow_ms = overflow.as_ref().map_or(0, |overflow| overflow.takes_ms);
                (Destination::Journal(Journaller::new(journal), overflow), Journaller::TAKES_MS + overflow_ms)
            }
            None => (Destination::Origin(writer), TIMEOUTS * origin.timeout.as_millis()),
        };
        Some(Self {
            rule,
            lane,
            token: format!("{:08x}{:08x}{:08x}{:08x}", worker.random(), worker.random(), worker.random(), worker.random()),
            destination,
            lifetime: read.ttl,
            stale: read.stale,
            mark_ms: within + takes_ms + MARGIN_MS,
            names: order.keys.iter().map(|(key, _)| Names::of(key, takes_tags)).collect(),
            order,
        })
    }

    async fn run(self: Rc<Self>, worker: &Rc<Worker>) -> Result<wish::Answer, String> {
        let began = Instant::now();
        let tags = match self.mark(worker).await {
            Ok(tags) => tags,
            Err(text) => {
                // The cache is in trouble: the client need not wait until it is not.
                let worker = worker.clone();
                drop(tokio::task::spawn_local(async move { self.end_all(&worker, |_| Outcome::Refused(None)).await }));
                return Err(text);
            }
        };
        if began.elapsed() >= ORIGIN_WITHIN {
            self.end_all(worker, |_| Outcome::Refused(None)).await;
            return Err("TRYAGAIN the cache took too long to prepare for the write: nothing was written".to_owned());
        }
        let written = match &self.destination {
            Destination::Origin(writer) => match self.order.raise {
                Some(by) => self.raise_at_origin(worker, writer, by).await.map_err(Untold::from),
                None => self.tell_origin(worker, writer, &tags, &[]).await.map_err(Untold::from),
            },
            Destination::Journal(journaller, overflow) => match (journaller.append(worker, &self.order.keys).await, overflow) {
                (Err(Untold { failure: WriteFailure::Rejected, .. }), Some(overflow)) => {
                    self.pass_by(worker, journaller, overflow).await
                }
                (written, _) => written,
            },
        };
        worker.metrics().written(self.rule, written.as_ref().err().map(|untold| untold.failure));
        match written {
            Ok(changed) => Ok(self.conclude(worker, &changed).await),
            // The mark stays: until its time is over, nobody knows what there will be.
            Err(Untold { failure: WriteFailure::Unknown, text }) => Err(text),
            Err(Untold { text, .. }) => {
                self.end_all(worker, |index| Outcome::Refused(tags.get(index).and_then(Option::as_deref))).await;
                Err(text)
            }
        }
    }

    /// The journal has no room: the origin is told at once, while nobody journals a write of these keys.
    async fn pass_by(&self, worker: &Rc<Worker>, journaller: &Journaller, overflow: &Overflow) -> Result<Vec<Changed>, Untold> {
        let began = Instant::now();
        let detour = journaller.leave(worker, &self.order.keys, overflow.takes_ms * 1_000).await?;
        if began.elapsed() >= ORIGIN_WITHIN {
            journaller.arrive(worker, &detour).await;
            let text = "TRYAGAIN the cache took too long to prepare for the write: nothing was written".to_owned();
            return Err(Untold { failure: WriteFailure::Otherwise, text });
        }
        let versions: Vec<u64> = detour.iter().map(|(_, version)| version.get()).collect();
        let tags = vec![None; self.order.keys.len()];
        let told = self.tell_origin(worker, &overflow.writer, &tags, &versions).await.map_err(Untold::from);
        // As long as nobody knows what became of it, nothing may be journalled.
        if !matches!(told, Err(Untold { failure: WriteFailure::Unknown, .. })) {
            journaller.arrive(worker, &detour).await;
        }
        told?;
        // As of what is journalled, how many rows there were is not told.
        let changed = |version| Changed { rows: 1, version: Some(version), ..Changed::default() };
        Ok(versions.into_iter().map(changed).collect())
    }

    /// Says that a write is under way, and takes the old value away for good. What the origin called each value.
    ///
    /// The replicas of the very server that has the mark must confirm it: the next primary may have no replica yet, and no mark.
    async fn mark(&self, worker: &Rc<Worker>) -> Result<Vec<Option<String>>, String> {
        let until = Instant::now() + MARKED_WITHIN;
        let keys = self.order.keys.iter().zip(&self.names);
        let proofs: Vec<Proof> = keys
            .map(|((key, _), names)| Proof { slot: self.slot(worker, key), command: scripts::stands(names, &self.token) })
            .collect();
        loop {
            let tags = self.begin(worker).await?;
            match wait_for_heirs(worker, self.lane, &proofs).await {
                Ok(()) => return Ok(tags),
                Err(Unconfirmed::Moved(_)) if Instant::now() < until => {
                    let pause = MARK_AGAIN_AFTER_MS / 2 + u64::from(worker.random()) % MARK_AGAIN_AFTER_MS;
                    tokio::time::sleep(Duration::from_millis(pause)).await;
                }
                Err(why) => {
                    return Err(format!(
                        "NOREPLICAS nothing was written: the old value is removed, but {why}: after a failover it might come back"
                    ));
                }
            }
        }
    }

    async fn begin(&self, worker: &Rc<Worker>) -> Result<Vec<Option<String>>, String> {
        let begin = |index: usize| {
            let mut wire = Vec::new();
            scripts::begin(&self.names[index], &self.token, self.mark_ms, &mut wire);
            self.ask(worker, index, wire)
        };
        let untouched = |text: String| format!("{text} (nothing was written)");
        let answers = join_all((0..self.names.len()).map(begin)).await.into_iter();
        let begun = answers.map(|answer| answer.and_then(|answer| scripts::begun(&answer)).map_err(untouched));
        begun.collect()
    }

    async fn tell_origin(
        &self,
        worker: &Rc<Worker>,
        writer: &Writer,
        tags: &[Option<String>],
        versions: &[u64],
    ) -> Result<Vec<Changed>, LoadError> {
        let keys = self.order.keys.iter().zip(tags);
        let changes: Vec<Change> =
            keys.map(|((key, value), tag)| Change { key: key.clone(), value: value.clone(), tag: tag.clone() }).collect();
        let (writer, token, versions) = (writer.clone(), self.token.clone(), versions.to_vec());
        let told = worker.origins().spawn(async move { writer.write_as(&changes, &versions, &format!("\"{token}\"")).await });
        told.await.unwrap_or_else(|_| Err(is_stopping()))
    }

    /// Has the number under the only key raised.
    async fn raise_at_origin(&self, worker: &Rc<Worker>, writer: &Writer, by: i64) -> Result<Vec<Changed>, LoadError> {
        let (writer, keys) = (writer.clone(), self.order.keys.clone());
        let told = worker.origins().spawn(async move {
            match keys.as_slice() {
                [(key, _)] => writer.increment(key, by).await.map(|changed| vec![changed]),
                _ => Ok(Vec::new()),
            }
        });
        told.await.unwrap_or_else(|_| Err(is_stopping()))
    }

    /// The origin has made the changes: the cache hears of it. Where it cannot, the old value is gone all the same.
    async fn conclude(&self, worker: &Rc<Worker>, changed: &[Changed]) -> wish::Answer {
        let life = self.order.life.resolve(&self.lifetime, worker.random());
        let (most, stale) = (self.lifetime.max.as_millis(), self.stale.as_millis());
        let values = self.order.keys.iter().map(|(_, value)| value.as_deref());
        let mut contents: Vec<_> = values.map(|value| value.map(|value| Content::new(self.order.form, value))).collect();
        let number = changed.first().and_then(|changed| changed.number);
        if let (Some(number), Some(content)) = (number, contents.first_mut()) {
            *content = Some(Content::new(self.order.form, number.to_string().into_bytes()));
        }
        let outcome = |index: usize| match &contents[index] {
            Some(value) => {
                let told = changed.get(index);
                let (version, tag) = (told.and_then(|told| told.version), told.and_then(|told| told.tag.as_deref()));
                Outcome::Stored { version, value, life, most, stale, tag }
            }
            None => Outcome::Deleted,
        };
        let kept = self.end_all(worker, outcome).await;
        if contents.iter().all(Option::is_none) {
            let rows: u64 = changed.iter().map(|changed| changed.rows).sum();
            return wish::Answer::Number(i64::try_from(rows).unwrap_or(i64::MAX));
        }
        kept.into_iter().filter(|kept| !kept).for_each(|_| worker.metrics().unkept(self.rule));
        number.map_or(self.order.answer, wish::Answer::Number)
    }

    /// Takes the marks away, with what came of each write. Whether each value is kept.
    async fn end_all<'a>(&'a self, worker: &Rc<Worker>, outcome: impl Fn(usize) -> Outcome<'a>) -> Vec<bool> {
        let end = |index: usize| {
            let mut wire = Vec::new();
            scripts::end(&self.names[index], &self.token, outcome(index), &mut wire);
            self.ask(worker, index, wire)
        };
        let answers = join_all((0..self.names.len()).map(end)).await;
        answers.into_iter().map(|answer| answer.and_then(|answer| scripts::ended(&answer)).unwrap_or(false)).collect()
    }

    fn slot(&self, worker: &Worker, key: &[u8]) -> u16 {
        if worker.is_cluster() { slots::slot_of(key) } else { ANY_SLOT }
    }

    /// Sends a script about one key. It may be repeated: at worst its key is a miss once more.
    async fn ask(&self, worker: &Rc<Worker>, index: usize, wire: Vec<u8>) -> Result<Vec<u8>, String> {
        let (sender, receiver) = oneshot::channel();
        let sink = Sink::Call(Box::new(move |_, answer| {
            let answer = match answer {
                Answer::Reply(bytes) => Ok(bytes.to_vec()),
                Answer::Failed(text) => Err(text.to_owned()),
            };
            // Whoever asked may have gone.
            let _ = sender.send(answer);
        }));
        let slot = self.order.keys.get(index).map_or(ANY_SLOT, |(key, _)| self.slot(worker, key));
        worker.submit(&[&wire], Pending::new(sink, slot, Retry::Safe, self.lane, worker.now()));
        receiver.await.unwrap_or_else(|_| Err("TRYAGAIN the sidecar is stopping".to_owned()))
    }
}
