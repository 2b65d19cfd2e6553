//! Invalidation by events: `XADD larder:events * key user:7`, by whoever changed what the key stands for.
//!
//! One sidecar of each binding reads the stream at a time, and carries out for all of them: values, copies and the right to store what
//! was loaded before are in the cache that they share. An entry is passed only when it was carried out, so each is at least once;
//! twice does no harm. [`position`] notices entries that were lost unread: then all that leases keep right goes, since nobody knows
//! what they said. [`tagged`] tells what a tag stands for, [`drawn`] what one write invalidates; [`jobs`] has what takes a walk over all keys.

mod carry;
mod drawn;
pub mod entry;
mod jobs;
mod line;
pub mod position;
pub mod request;
mod shards;
#[cfg(test)]
mod simulation;
pub mod store;
mod tagged;
mod walker;

use std::cell::Cell;
use std::rc::Rc;
use std::time::Duration;

use tokio::time::{Instant, sleep};

use self::entry::Event;
use self::jobs::Target;
use self::line::{Batch, Line, LineError, MOST_KEPT};
use self::position::{EntryId, Position};
use self::store::Store;
use self::tagged::Tagged;
use self::walker::{Desk, walk_forever};
use super::dispatch::invalidation_slot;
use super::policy::UNMATCHED;
use super::upstream::admin_client::ReplyError;
use super::upstream::router::Node;
use super::versions::{keeper, moment};
use super::worker::Worker;
use crate::policy::KeyPattern;
use crate::policy::binding::BindingName;
use crate::policy::events::STREAM;
use crate::policy::versions::Counter;

/// Who has no turn asks for it this often, times the number of sidecars: two questions a second, of however many.
const ASK_EVERY: Duration = Duration::from_millis(500);
/// The longest time between two of one sidecar's questions.
const ASK_AT_LEAST_EVERY: Duration = Duration::from_secs(30);
/// How often the turn is held anew, and what has changed is written down.
const HOLD_EVERY: Duration = Duration::from_secs(1);
/// The pause before what could not be carried out is tried again.
const PAUSE: Duration = Duration::from_millis(500);
/// The pause after a server has refused what reading takes.
const REFUSED_PAUSE: Duration = Duration::from_secs(60);
/// One line of the log in so long tells of entries that are not understood.
const COMPLAIN_EVERY: Duration = Duration::from_secs(10);

/// Why a turn ends.
#[derive(Debug, thiserror::Error)]
enum Ended {
    #[error(transparent)]
    Line(#[from] LineError),
    #[error("{0}")]
    Error(String),
    #[error("another sidecar reads the stream by now")]
    Overtaken,
    #[error("another server has the stream")]
    Moved,
}

/// Reads the stream for ever, whenever it is this sidecar's turn. One worker of each sidecar runs it.
pub async fn follow_forever(worker: Rc<Worker>, binding: Option<BindingName>) {
    let mut reader = Reader::new(worker, binding);
    loop {
        let share = 0.5 + f64::from(reader.worker.random()) / f64::from(u32::MAX);
        let sidecars = u32::try_from(reader.worker.metrics().background().fleet.get()).unwrap_or(u32::MAX).max(1);
        sleep((ASK_EVERY.saturating_mul(sidecars)).min(ASK_AT_LEAST_EVERY).mul_f64(share)).await;
        // Where nothing is covered, nothing is kept that could be wrong.
        if !reader.worker.policy().covers_anything() {
            continue;
        }
        if let Err(ended) = reader.take_turn().await {
            reader.pause_after(&ended).await;
        }
    }
}

/// Reads the stream.
struct Reader {
    worker: Rc<Worker>,
    store: Store,
    /// Whether the sidecar serves a binding, whose login opens the keys of its rules alone.
    bound: bool,
    /// How far it was when its last turn ended. A cache that knows less has lost something since.
    remembered: Position,
    complained: Cell<Option<Instant>>,
}

impl Reader {
    fn new(worker: Rc<Worker>, binding: Option<BindingName>) -> Self {
        let store = Store::new(binding.as_ref());
        Self { worker, store, bound: binding.is_some(), remembered: Position::default(), complained: Cell::new(None) }
    }

    /// Reads for as long as it is this sidecar's turn; returns at once where it is another's.
    async fn take_turn(&mut self) -> Result<(), Ended> {
        let has_read = self.remembered != Position::default();
        if !has_read && !self.store.is_needed(&self.worker).await.map_err(Ended::Error)? {
            return Ok(());
        }
        let Some(kept) = self.store.take(&self.worker).await.map_err(Ended::Error)? else { return Ok(()) };
        let desk = Desk::default();
        let is_behind = kept.position.id < self.remembered.id;
        desk.kept.replace(kept);
        if is_behind {
            self.note_loss(&desk);
        }
        self.worker.metrics().background().events_reading.set(1);
        let ended = tokio::select! {
            ended = self.read_on(&desk) => ended,
            ended = self.hold(&desk) => ended,
            () = walk_forever(&self.worker, &desk) => Ok(()),
        };
        self.worker.metrics().background().events_reading.set(0);
        self.remembered = desk.kept.borrow().position;
        if !matches!(ended, Err(Ended::Overtaken)) {
            self.store.leave(&self.worker).await;
        }
        ended
    }

    /// What a server refuses is said, and asked for seldom: servers note each refusal. All else is usual.
    async fn pause_after(&self, ended: &Ended) {
        let lasts = |text: &str| text.starts_with("NOPERM") || text.starts_with("WRONGTYPE");
        let refusal = match ended {
            Ended::Line(LineError::Refused(text)) | Ended::Error(text) if lasts(text) => text,
            _ => return tracing::debug!(reason = %ended, "does not read the stream of events for now"),
        };
        tracing::warn!(error = %refusal, "the server does not let this sidecar read {STREAM}: events are not carried out");
        sleep(REFUSED_PAUSE).await;
    }

    fn node(&self) -> Option<Rc<Node>> {
        self.worker.router().node_of(invalidation_slot(&self.worker, STREAM.as_bytes()))
    }

    /// Reads what comes, and carries it out.
    async fn read_on(&self, desk: &Desk) -> Result<(), Ended> {
        let node = self.node().ok_or(Ended::Moved)?;
        let mut line = Line::open(&self.worker, &node).await?;
        let stream = line.stream().await?;
        self.pass(desk, &Batch { entries: Vec::new(), stream }).await?;
        loop {
            let position = desk.kept.borrow().position;
            let batch = match line.read(position).await {
                Err(LineError::Reply(ReplyError::TooLarge)) => {
                    line = Line::open(&self.worker, &node).await?;
                    line.read_one(&self.worker, &node, position).await?
                }
                batch => batch?,
            };
            if self.node().is_none_or(|now| !Rc::ptr_eq(&now, &node)) {
                return Err(Ended::Moved);
            }
            self.carry_out(desk, &batch).await;
            self.pass(desk, &batch).await?;
            if batch.stream.length > MOST_KEPT + MOST_KEPT / 8 {
                line.trim().await?;
            }
        }
    }

    /// Moves on behind a batch that was carried out, or to which nothing came.
    async fn pass(&self, desk: &Desk, batch: &Batch) -> Result<(), Ended> {
        let before = desk.kept.borrow().position;
        let last = batch.entries.last().map_or(before.id, |(id, _)| *id);
        let (next, lost) = before.behind(batch.entries.len() as u64, last, &batch.stream);
        desk.kept.borrow_mut().position = next;
        if lost {
            self.note_loss(desk);
        }
        if next == before && !lost {
            return Ok(());
        }
        self.save(desk).await
    }

    /// Events were lost: nobody knows what they said.
    fn note_loss(&self, desk: &Desk) {
        tracing::warn!("events were lost before they were read: all keys of rules with leases are invalidated");
        self.worker.metrics().background().event_gaps.inc();
        let mut kept = desk.kept.borrow_mut();
        let id = kept.position.id;
        kept.jobs.wish(Target::Leased, id);
        desk.wanted.notify_one();
    }

    /// Holds the turn, and writes down what has changed.
    async fn hold(&self, desk: &Desk) -> Result<(), Ended> {
        loop {
            tokio::select! {
                () = sleep(HOLD_EVERY) => {}
                () = desk.changed.notified() => {}
            }
            self.save(desk).await?;
        }
    }

    async fn save(&self, desk: &Desk) -> Result<(), Ended> {
        let kept = desk.kept.borrow().clone();
        match self.store.save(&self.worker, &kept).await {
            Ok(true) => Ok(()),
            Ok(false) => Err(Ended::Overtaken),
            Err(text) => Err(Ended::Error(text)),
        }
    }

    /// Does what the entries of a batch want, as often as it takes.
    async fn carry_out(&self, desk: &Desk, batch: &Batch) {
        let mut keys = Vec::new();
        for (id, pairs) in &batch.entries {
            let Some(pairs) = pairs else {
                self.refuse(*id, &"it is too large to be read: write one key in each event");
                continue;
            };
            for (kind, what) in pairs {
                match entry::parse(kind, what) {
                    Ok(event) => self.sort(desk, *id, event, &mut keys).await,
                    Err(error) => self.refuse(*id, &error),
                }
            }
        }
        keys.sort_unstable();
        keys.dedup();
        let counters = self.worker.metrics().background().clone();
        loop {
            match carry::invalidate(&self.worker, &keys).await {
                Ok(carry::Outcome { forbidden, unconfirmed, .. }) => {
                    counters.events.add(keys.len() as u64 - forbidden);
                    counters.events_forbidden.add(forbidden);
                    counters.events_unconfirmed.add(u64::from(unconfirmed.is_some()));
                    return;
                }
                Err(error) => tracing::debug!(%error, "events are not carried out yet"),
            }
            sleep(PAUSE).await;
        }
    }

    /// Puts a key with the others, and what takes longer with its like.
    async fn sort(&self, desk: &Desk, id: EntryId, event: Event, keys: &mut Vec<Vec<u8>>) {
        let policy = self.worker.policy();
        let counters = self.worker.metrics().background();
        let target = match event {
            Event::Key(key) if self.bound && policy.find(&key) == UNMATCHED => return counters.events_foreign.inc(),
            Event::Key(key) => return keys.push(key),
            Event::Tag(tag) => match tagged::look_up(&policy, tag.as_bytes()) {
                None => return counters.events_foreign.inc(),
                Some(Tagged { keys: named, counters: drawn, given, walks }) => {
                    for pattern in &given {
                        self.note(pattern, &tag).await;
                    }
                    for counter in &drawn {
                        self.draw(counter).await;
                    }
                    keys.extend(named);
                    if !walks {
                        return;
                    }
                    Target::Tag(tag)
                }
            },
            Event::Rule(name) if !policy.snapshot().rules.iter().any(|rule| rule.name == name) => {
                // Another workload's, perhaps.
                return counters.events_foreign.inc();
            }
            Event::Rule(name) => Target::Rule(name),
            Event::Pattern(pattern) => Target::Pattern(pattern),
        };
        if let Some(counter) = drawn::counter_of(&policy, &target) {
            return self.draw(&counter).await;
        }
        while !desk.kept.borrow().jobs.has_room() {
            sleep(PAUSE).await;
        }
        desk.kept.borrow_mut().jobs.wish(target, id);
        desk.wanted.notify_one();
        counters.events.inc();
    }

    /// Notes that a tag is invalidated, so that what was loaded before is not stored with it.
    async fn note(&self, keys: &KeyPattern, tag: &str) {
        let slot = moment::slot_of(&self.worker, keys);
        loop {
            let noted = match moment::note(&self.worker, keys, tag.as_bytes()).await {
                Ok(()) => carry::confirmed(&self.worker, &[slot]).await,
                Err(text) => Err(text),
            };
            match noted {
                Ok(unconfirmed) => {
                    return self.worker.metrics().background().events_unconfirmed.add(u64::from(unconfirmed.is_some()));
                }
                Err(error) => tracing::debug!(%error, "an invalidated tag is not noted yet"),
            }
            sleep(PAUSE).await;
        }
    }

    /// Invalidates all keys that a version is part of, by a new one.
    async fn draw(&self, counter: &Counter) {
        let counters = self.worker.metrics().background();
        let slot = invalidation_slot(&self.worker, &counter.key());
        loop {
            let drawn = keeper::draw(&self.worker, counter).await;
            let confirmed = match drawn {
                Ok(()) => carry::confirmed(&self.worker, &[slot]).await,
                Err(text) => Err(text),
            };
            match confirmed {
                Ok(unconfirmed) => {
                    counters.events.inc();
                    return counters.events_unconfirmed.add(u64::from(unconfirmed.is_some()));
                }
                Err(error) => tracing::debug!(%error, "no new version is drawn yet"),
            }
            sleep(PAUSE).await;
        }
    }

    /// An entry is not understood: it is passed all the same, since it would hold up all others.
    fn refuse(&self, id: EntryId, why: &dyn std::fmt::Display) {
        self.worker.metrics().background().events_refused.inc();
        if self.complained.get().is_none_or(|at| at.elapsed() >= COMPLAIN_EVERY) {
            self.complained.set(Some(Instant::now()));
            tracing::warn!(entry = %id, %why, "an event of {STREAM} is not understood, and nothing was invalidated for it");
        }
    }
}
