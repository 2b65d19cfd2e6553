//! One partition's consumer: carries out what a [`Drain`] asks, for as long as this relay has the partition.

use std::sync::Arc;
use std::time::Duration;

use futures_util::future::join_all;
use tokio::sync::watch;
use tokio::time::{Instant, sleep};
use tracing::{info, warn};

use super::drain::{Ask, Batch, Drain, Hold, Target};
use super::figures::Counts;
use super::hub::{Hub, HubError, bytes_of};
use super::plan::{Item, Told};
use super::rules::{Outlet, Rules};
use crate::journal::scripts::{self, Fenced};
use crate::journal::{self, FormError, Partition, Version};
use crate::origin::{self, LoadError, OriginError, Verdict};
use crate::policy::JournalName;
use crate::sidecar::upstream::admin_client::Value;
use crate::sidecar::upstream::discovery::{doubled, jittered};

/// The most entries of a batch, whatever rules say.
const MAX_BATCH: usize = 500;
/// The most dead letters of a partition. With so many it stands still until a person looks at them.
pub const MAX_DEAD_LETTERS: u64 = 10_000;
/// A batch that is not full is waited for this long: what comes meanwhile shares its transaction, or makes writes before it needless.
const LINGER: Duration = Duration::from_millis(20);
/// How often an empty partition is looked at.
const IDLE: Duration = Duration::from_millis(50);
/// After troubles in a row.
const FIRST_BACK_OFF: Duration = Duration::from_millis(100);
const MAX_BACK_OFF: Duration = Duration::from_secs(5);
/// How often a lasting trouble is logged.
const WARN_EVERY: Duration = Duration::from_secs(30);

/// That this relay has a partition.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Claim {
    /// The journal's.
    pub fence: u64,
    /// When it was last asked for with success, at the latest.
    pub renewed: Instant,
    /// How long it lasts from then.
    pub lasts: Duration,
}

/// Why a step came to nothing. All of these pass, by themselves or by a person's hand; nothing is lost meanwhile.
#[derive(Debug, thiserror::Error)]
enum Trouble {
    #[error(transparent)]
    Cache(#[from] HubError),
    #[error(transparent)]
    Origin(#[from] LoadError),
    #[error(transparent)]
    Rule(#[from] OriginError),
    #[error("{0}: was it written by a newer sidecar? Upgrade the relay")]
    Form(#[from] FormError),
    #[error("there are {MAX_DEAD_LETTERS} dead letters: replay or drop some")]
    TooManyDeadLetters,
    #[error("the claim may have ended")]
    Late,
}

/// What a step came to.
enum Pace {
    On,
    Idle,
    Fenced,
}

/// What was read, beside the drain's own account of it.
#[derive(Default)]
struct Held {
    entries: Vec<journal::Entry>,
    /// By entry. `None`: no rule that writes behind covers its key any more.
    outlets: Vec<Option<Outlet>>,
}

/// A partition's consumer.
pub struct Consumer {
    journal: JournalName,
    partition: Partition,
    token: Arc<str>,
    hub: Hub,
    rules: watch::Receiver<Arc<Rules>>,
    claim: watch::Receiver<Option<Claim>>,
    counts: Arc<Counts>,
    held: Held,
    most: usize,
    lingered: bool,
    warned: Option<Instant>,
}

impl Consumer {
    /// A consumer that waits for its first claim. `token` is that of the claims.
    pub fn new(
        (journal, partition): (JournalName, Partition),
        token: Arc<str>,
        hub: Hub,
        rules: watch::Receiver<Arc<Rules>>,
        claim: watch::Receiver<Option<Claim>>,
        counts: Arc<Counts>,
    ) -> Self {
        let held = Held::default();
        Self { journal, partition, token, hub, rules, claim, counts, held, most: MAX_BATCH, lingered: false, warned: None }
    }

    /// Consumes whenever this relay has the partition, until nobody can claim it for this consumer any more.
    pub async fn run(mut self) {
        loop {
            let claimed = self.claim.wait_for(Option::is_some).await.map(|claim| *claim);
            let Ok(Some(claim)) = claimed else { return };
            Counts::add(&self.counts.claims, 1);
            info!(journal = %self.journal, partition = self.partition.number(), fence = claim.fence, "the partition is claimed");
            self.consume(claim.fence).await;
            let over = self.claim.has_changed().is_err();
            if over || self.claim.borrow().is_none() {
                // Where it fails, the claim ends by itself.
                let release = scripts::release(&self.partition, &self.token);
                let _ = self.hub.ask(self.partition.slot(), &[release.command()]).await;
            }
            if over {
                return;
            }
        }
    }

    /// Consumes under one claim.
    async fn consume(&mut self, fence: u64) {
        let mut drain = Drain::new(fence);
        let mut failures = 0;
        while self.has(fence) {
            if self.rules.has_changed().unwrap_or(false) {
                // What could not be told by the rules of before may be by those of now.
                drain = Drain::new(fence);
            }
            match self.step(&mut drain).await {
                Ok(Pace::On) => failures = 0,
                Ok(Pace::Idle) => {
                    failures = 0;
                    self.pause(IDLE, fence).await;
                }
                Ok(Pace::Fenced) => {
                    Counts::add(&self.counts.fenced, 1);
                    drain = Drain::new(fence);
                    self.wait_for_renewal(fence).await;
                }
                Err(trouble) => {
                    Counts::add(&self.counts.retries, 1);
                    self.warn(&trouble);
                    self.pause(jittered(doubled(FIRST_BACK_OFF, failures, MAX_BACK_OFF)), fence).await;
                    failures = failures.saturating_add(1);
                }
            }
        }
    }

    fn has(&self, fence: u64) -> bool {
        self.claim.borrow().is_some_and(|claim| claim.fence == fence) && self.claim.has_changed().is_ok()
    }

    /// Sleeps, unless the claim ends.
    async fn pause(&mut self, pause: Duration, fence: u64) {
        tokio::select! {
            () = sleep(pause) => {}
            _ = self.claim.wait_for(|claim| claim.is_none_or(|claim| claim.fence != fence)) => {}
        }
    }

    /// Another was here. Whether the claim still stands is for the journal to say before anything is begun anew.
    async fn wait_for_renewal(&mut self, fence: u64) {
        let since = Instant::now();
        // An error means that the relay stops.
        let _ = self.claim.wait_for(|claim| claim.is_none_or(|claim| claim.fence != fence || claim.renewed > since)).await;
    }

    fn warn(&mut self, trouble: &Trouble) {
        if self.warned.is_some_and(|warned| warned.elapsed() < WARN_EVERY) {
            return;
        }
        self.warned = Some(Instant::now());
        warn!(journal = %self.journal, partition = self.partition.number(), %trouble, "the journal waits");
    }

    async fn step(&mut self, drain: &mut Drain) -> Result<Pace, Trouble> {
        match drain.next() {
            Ask::Nothing => return Ok(Pace::Fenced),
            Ask::Read => return self.read(drain).await,
            Ask::Take { origin, least } => {
                let rules = self.rules.borrow().clone();
                if let Some(ledger) = rules.ledger(origin, &self.partition, &self.journal)? {
                    let origin::Hold { fence, position } = ledger.take(least).await?;
                    drain.taken(Hold { fence, position });
                }
            }
            Ask::Parked(indices) => {
                let versions = self.parked(&indices).await?;
                drain.parked_before(&versions);
            }
            Ask::Tell { origin, fence, entries } => {
                let (origin, entries) = (origin.to_owned(), entries.to_vec());
                self.tell(drain, &origin, fence, &entries).await?;
            }
            Ask::TellEach { entries, .. } => {
                let entries = entries.to_vec();
                self.tell_each(drain, &entries).await?;
            }
            Ask::Park { index, why } => {
                let why = why.to_owned();
                self.park(drain, index, &why).await?;
            }
            Ask::Finish { upto, through, made } => {
                let made = made.to_vec();
                self.finish(drain, Version::new(upto), through, &made).await?;
            }
        }
        Ok(Pace::On)
    }

    /// Reads the front of the partition, such that what it read cannot vanish from the journal after an origin has it.
    async fn read(&mut self, drain: &mut Drain) -> Result<Pace, Trouble> {
        let rules = self.rules.borrow_and_update().clone();
        let wanted = rules.batch(&self.journal).unwrap_or(1).clamp(1, MAX_BATCH);
        let count = wanted.min(self.most);
        let waiting = self.waiting().await?;
        if waiting == 0 {
            return Ok(Pace::Idle);
        }
        if waiting < count && !self.lingered {
            self.lingered = true;
            sleep(LINGER).await;
            return Ok(Pace::On);
        }
        let entries = match self.read_front(count).await {
            Err(Trouble::Cache(error)) if error.is_too_large() && count > 1 => {
                self.most = count / 2;
                return Ok(Pace::On);
            }
            entries => entries?,
        };
        (self.lingered, self.most) = (false, (self.most * 2).min(MAX_BATCH));
        let outlet = |entry: &journal::Entry| rules.outlet(&self.journal, &entry.change.key).cloned();
        let outlets: Vec<Option<Outlet>> = entries.iter().map(outlet).collect();
        drain.read(batch(&entries, &outlets));
        self.held = Held { entries, outlets };
        Ok(Pace::On)
    }

    /// How many entries there are.
    async fn waiting(&mut self) -> Result<usize, Trouble> {
        let answers = self.hub.ask(self.partition.slot(), &[vec![b"XLEN".to_vec(), self.partition.log()]]).await?;
        let count = answers.first().and_then(Value::as_int).and_then(|count| usize::try_from(count).ok());
        Ok(count.ok_or(HubError::Answer)?)
    }

    /// The first `count` entries, which are on disk everywhere.
    async fn read_front(&mut self, count: usize) -> Result<Vec<journal::Entry>, Trouble> {
        let range = [b"XRANGE".to_vec(), self.partition.log(), b"-".to_vec(), b"+".to_vec(), b"COUNT".to_vec()];
        let command = range.into_iter().chain([count.to_string().into_bytes()]).collect();
        self.hub.trust(self.rules.borrow().disk());
        let answer = self.hub.carry_out(self.partition.slot(), command).await?;
        answer.as_list().ok_or(HubError::Answer)?.iter().map(entry_of).collect()
    }

    /// Which of these entries' keys have a dead letter.
    async fn parked(&mut self, indices: &[usize]) -> Result<Vec<Option<u64>>, Trouble> {
        let keys = indices.iter().filter_map(|index| Some(self.held.entries.get(*index)?.change.key.clone()));
        let command = [b"HMGET".to_vec(), self.partition.parked()].into_iter().chain(keys).collect();
        let answers = self.hub.ask(self.partition.slot(), &[command]).await?;
        let list = answers.first().and_then(Value::as_list).ok_or(HubError::Answer)?;
        Ok(list.iter().map(|version| version.as_int().and_then(|version| u64::try_from(version).ok())).collect())
    }

    async fn tell(&mut self, drain: &mut Drain, origin: &str, fence: u64, told: &[Told]) -> Result<(), Trouble> {
        let rules = self.rules.borrow().clone();
        let Some(ledger) = rules.ledger(origin, &self.partition, &self.journal)? else { return Ok(()) };
        let entries: Vec<origin::Entry> = told.iter().filter_map(|told| self.held.entry(told)).collect();
        let upto = told.last().map_or(0, |told| told.at);
        Counts::add(&self.counts.tellings, 1);
        match ledger.apply(fence, upto, &entries).await {
            Ok(Verdict::Applied) => {
                Counts::add(&self.counts.changes, entries.len());
                drain.told();
            }
            Ok(Verdict::Fenced) => drain.fenced(),
            Err(LoadError::Rejected { why, .. }) => {
                Counts::add(&self.counts.halvings, usize::from(entries.len() > 1));
                drain.refused(&why);
            }
            Err(error) => return Err(error.into()),
        }
        Ok(())
    }

    /// Tells an origin that keeps no account, only while the claim surely stands: it would take from anybody.
    async fn tell_each(&mut self, drain: &mut Drain, told: &[Told]) -> Result<(), Trouble> {
        let claim = *self.claim.borrow();
        let (held, journal, number) = (&self.held, &self.journal, self.partition.number());
        let tellings = told.iter().map(|told| async move {
            let (Some(entry), Some(outlet)) = (held.entry(told), held.outlet(told)) else {
                return Ok(Err("no rule that writes behind covers its key any more".to_owned()));
            };
            let most = Duration::from_millis(outlet.timeout_ms);
            let good = claim.is_some_and(|claim| claim.renewed.elapsed() + most.min(claim.lasts / 2) < claim.lasts);
            if !good {
                return Err(Trouble::Late);
            }
            let id = format!("\"{journal}/{number}/{}\"", entry.version);
            match outlet.writer.write(std::slice::from_ref(&entry.change), &id).await {
                Ok(_) => Ok(Ok(())),
                Err(LoadError::Rejected { why, .. }) => Ok(Err(why)),
                Err(error) => Err(Trouble::Origin(error)),
            }
        });
        let mut trouble = None;
        let mut outcomes = Vec::with_capacity(told.len());
        for outcome in join_all(tellings).await {
            Counts::add(&self.counts.tellings, 1);
            Counts::add(&self.counts.changes, usize::from(matches!(outcome, Ok(Ok(())))));
            outcomes.push(outcome.map_err(|why| trouble = Some(why)).ok());
        }
        drain.told_each(outcomes);
        trouble.map_or(Ok(()), Err)
    }

    async fn park(&mut self, drain: &mut Drain, index: usize, why: &str) -> Result<(), Trouble> {
        let Some(entry) = self.held.entries.get(index) else { return Ok(()) };
        let call = scripts::park(&self.partition, drain.fence(), MAX_DEAD_LETTERS, entry.version, &entry.change, why);
        // The origin passes it over next: from then on the letter is the only place where it is.
        self.hub.trust(self.rules.borrow().disk());
        match self.hub.run_durably(self.partition.slot(), &call, scripts::parked).await? {
            Fenced::Lost => drain.fenced(),
            Fenced::Done(false) => return Err(Trouble::TooManyDeadLetters),
            Fenced::Done(true) => {
                let rule = self.held.outlets.get(index).and_then(|outlet| Some(outlet.as_ref()?.rule.as_str())).unwrap_or("-");
                // What the origin said may quote the value: it is for the letter alone.
                warn!(journal = %self.journal, rule, version = %entry.version, "a write is refused, and is a dead letter now");
                Counts::add(&self.counts.dead_letters, 1);
                drain.parked();
            }
        }
        Ok(())
    }

    async fn finish(&mut self, drain: &mut Drain, upto: Version, through: u64, made: &[usize]) -> Result<(), Trouble> {
        let entry = |index: &usize| self.held.entries.get(*index).map(|entry| (entry.change.key.clone(), entry.version));
        let cleared: Vec<(Vec<u8>, Version)> = made.iter().filter_map(entry).collect();
        let call = scripts::done(&self.partition, drain.fence(), upto, through, &cleared);
        match self.hub.run(self.partition.slot(), &call, scripts::done_answer).await? {
            Fenced::Lost => drain.fenced(),
            Fenced::Done(_) => {
                Counts::add(&self.counts.batches, 1);
                Counts::add(&self.counts.entries, self.held.entries.len());
                self.held = Held::default();
                drain.finished();
            }
        }
        Ok(())
    }
}

impl Held {
    fn outlet(&self, told: &Told) -> Option<&Outlet> {
        self.outlets.get(told.index)?.as_ref()
    }

    /// The entry as an origin is told it.
    fn entry(&self, told: &Told) -> Option<origin::Entry> {
        let journal::Entry { version, change, .. } = self.entries.get(told.index)?;
        let change = origin::Change { key: change.key.clone(), value: change.value.clone(), tag: None };
        Some(origin::Entry { position: told.at, version: version.get(), writer: self.outlet(told)?.writer.clone(), change })
    }
}

/// What is planned of the entries. Those without a rule are for an origin of their own, which refuses each.
fn batch(entries: &[journal::Entry], outlets: &[Option<Outlet>]) -> Batch {
    let mut targets: Vec<Target> = Vec::new();
    let mut items = Vec::with_capacity(entries.len());
    for (entry, outlet) in entries.iter().zip(outlets) {
        let target = match outlet {
            Some(Outlet { origin, keeps_account: true, .. }) => Target { name: origin.clone(), at_once: None },
            Some(Outlet { origin, at_once, .. }) => Target { name: origin.clone(), at_once: Some(*at_once) },
            None => Target { name: String::new(), at_once: Some(MAX_BATCH) },
        };
        let origin = targets.iter().position(|known| *known == target).unwrap_or_else(|| {
            targets.push(target);
            targets.len() - 1
        });
        items.push(Item { version: entry.version.get(), key: entry.change.key.clone(), origin });
    }
    Batch { items, targets, through: entries.last().map_or(0, |entry| entry.through) }
}

/// Reads an element of XRANGE's answer: an ID, and a list of fields and values by turns.
fn entry_of(element: &Value) -> Result<journal::Entry, Trouble> {
    let read = || {
        let [id, fields] = element.as_list()? else { return None };
        let fields: Vec<&[u8]> = fields.as_list()?.iter().map(bytes_of).collect::<Option<_>>()?;
        Some((bytes_of(id)?, fields))
    };
    let (id, fields) = read().ok_or(HubError::Answer)?;
    Ok(journal::Entry::parse(id, fields.chunks_exact(2).map(|pair| (pair[0], pair[1])))?)
}
