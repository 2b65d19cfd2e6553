//! One queue's tender: takes requests while this relay has the queue, loads, and answers.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, sleep_until, timeout};
use tracing::{debug, info, warn};

use super::figures::Counts;
use super::hold::Hold;
use crate::journal::loads::{self, ANSWER_LASTS_MS, LoadQueue, MOST_ANSWER_BYTES, Request, Taken};
use crate::origin::{LoadError, Loaded, parcel};
use crate::policy::JournalName;
use crate::relay::hub::{Hub, HubError};
use crate::relay::rules::{Inlets, Rules};
use crate::sidecar::upstream::discovery::jittered;

/// The longest wait for the bell, after which the queue is looked at all the same.
const LONGEST_WAIT: Duration = Duration::from_secs(1);
/// The shortest: zero would be for ever.
const SHORTEST_WAIT: Duration = Duration::from_millis(10);
/// How many answers go to the cache at once, and how often each is tried.
const ANSWERS_AT_ONCE: usize = 32;
const ATTEMPTS: u32 = 2;
/// How long loads and answers may take at the end.
const LAST_STEPS: Duration = Duration::from_secs(5);

/// An answer on its way: its key, and what it holds.
type Answer = (Vec<u8>, Vec<u8>);

/// See the module.
pub struct Tender {
    queue: JournalName,
    place: LoadQueue,
    token: Arc<str>,
    hub: Hub,
    courier: Hub,
    rules: watch::Receiver<Arc<Rules>>,
    counts: Arc<Counts>,
    hold: Hold,
    under_way: JoinSet<()>,
}

impl Tender {
    /// Takes nothing yet. Of the two hubs one carries answers.
    pub fn new(
        queue: JournalName,
        token: Arc<str>,
        [hub, courier]: [Hub; 2],
        rules: watch::Receiver<Arc<Rules>>,
        counts: Arc<Counts>,
        claim: Duration,
    ) -> Self {
        let (place, hold) = (LoadQueue::new(&queue), Hold::new(Instant::now(), claim));
        Self { queue, place, token, hub, courier, rules, counts, hold, under_way: JoinSet::new() }
    }

    /// Tends the queue until `halted`, or until no rule has it any more.
    pub async fn run(self, mut halted: watch::Receiver<bool>) {
        let Self { queue, place, token, hub, courier, rules, counts, hold, under_way } = self;
        let (answers, to_carry) = mpsc::channel(ANSWERS_AT_ONCE);
        let carrying = tokio::spawn(carry(courier, place.slot(), to_carry, counts.clone()));
        let mut work = Work { queue, place, token, hub, counts, hold, under_way, answers };
        let mut last = None;
        while !*halted.borrow() {
            let Some(inlets) = rules.borrow().inlets(&work.queue).cloned() else { break };
            let pause = match work.step(&inlets).await {
                Ok(None) => Duration::ZERO,
                Ok(Some(pause)) => pause,
                Err(trouble) => {
                    debug!(queue = %work.queue, %trouble, "the queue of loads cannot be tended");
                    work.hold.unanswered(Instant::now());
                    work.hold.due().saturating_duration_since(Instant::now())
                }
            };
            last = Some(inlets);
            if !pause.is_zero() {
                tokio::select! {
                    () = sleep(jittered(pause)) => {}
                    _ = halted.wait_for(|halted| *halted) => {}
                }
            }
        }
        work.finish(last).await;
        if timeout(LAST_STEPS, carrying).await.is_err() {
            debug!("some answers could not be carried to the cache in time");
        }
    }
}

struct Work {
    queue: JournalName,
    place: LoadQueue,
    token: Arc<str>,
    hub: Hub,
    counts: Arc<Counts>,
    hold: Hold,
    /// Each a request at the origin.
    under_way: JoinSet<()>,
    answers: mpsc::Sender<Answer>,
}

impl Work {
    /// One step. For how long there is nothing more to do.
    async fn step(&mut self, inlets: &Arc<Inlets>) -> Result<Option<Duration>, HubError> {
        while self.under_way.try_join_next().is_some() {}
        Counts::set(&self.counts.under_way, self.under_way.len());
        if Instant::now() >= self.hold.due() {
            self.claim(inlets).await?;
        }
        if !self.hold.is_ours() {
            return Ok(Some(self.hold.due().saturating_duration_since(Instant::now()).max(SHORTEST_WAIT)));
        }
        let timeout = inlets.timeout.as_duration();
        let room = self.hold.room(Instant::now(), timeout, inlets.at_once, self.under_way.len());
        if room == 0 {
            let due = self.hold.due();
            tokio::select! {
                _ = self.under_way.join_next(), if !self.under_way.is_empty() => {}
                () = sleep_until(due) => {}
            }
            return Ok(None);
        }
        let take = self.place.take(&self.token, room);
        match self.hub.run(self.place.slot(), &take, loads::taken).await? {
            Taken::Lost => self.lose(inlets),
            Taken::Requests(requests) if requests.is_empty() => self.listen().await?,
            Taken::Requests(requests) => requests.iter().for_each(|(left, request)| self.begin(inlets, *left, request)),
        }
        Ok(None)
    }

    /// Claims the queue, or renews the claim.
    async fn claim(&mut self, inlets: &Inlets) -> Result<(), HubError> {
        let (asked, had_it) = (Instant::now(), self.hold.is_ours());
        let lasts = self.hold.lasts(inlets.timeout.as_duration());
        let call = self.place.claim(&self.token, u64::try_from(lasts.as_millis()).unwrap_or(u64::MAX));
        let is_ours = self.hub.run(self.place.slot(), &call, loads::claimed).await?;
        if had_it && !is_ours {
            self.lose(inlets);
        }
        if is_ours && !had_it {
            Counts::add(&self.counts.claims, 1);
            info!(queue = %self.queue, "this relay loads for sidecars");
        }
        self.hold.answered(asked, lasts, is_ours);
        Ok(())
    }

    /// The cache lost the claim, or it ended: whoever has it now has all connections.
    fn lose(&mut self, inlets: &Inlets) {
        self.hold.lost(Instant::now());
        self.under_way.abort_all();
        inlets.close_idle();
        info!(queue = %self.queue, "this relay loads for sidecars no more: another has the queue, or the cache has forgotten who");
    }

    /// Waits until there may be requests.
    async fn listen(&mut self) -> Result<(), HubError> {
        let wait = self.hold.due().saturating_duration_since(Instant::now()).clamp(SHORTEST_WAIT, LONGEST_WAIT);
        let wait = format!("{:.3}", wait.as_secs_f64());
        self.hub.ask(self.place.slot(), &[vec![b"BLPOP".to_vec(), self.place.bell(), wait.into_bytes()]]).await.map(drop)
    }

    /// Begins to load what a sidecar asked for, which waits for another so many milliseconds.
    fn begin(&mut self, inlets: &Arc<Inlets>, left_ms: u64, request: &[u8]) {
        let Some(Request { token, keys }) = Request::parse(request) else {
            warn!(queue = %self.queue, "a request cannot be read: is a sidecar newer than the relay?");
            return;
        };
        // Nobody waits any more, or another relay has the queue by now.
        let Some(deadline) = self.hold.deadline(Instant::now(), Duration::from_millis(left_ms)) else { return };
        let (inlets, counts, answers) = (inlets.clone(), self.counts.clone(), self.answers.clone());
        let key = self.place.answer(&token);
        self.under_way.spawn(async move {
            let results = load(&inlets, &keys, deadline).await;
            Counts::add(&counts.keys, results.len());
            Counts::add(&counts.errors, results.iter().filter(|result| result.is_err()).count());
            // It ends with the tender.
            let _ = answers.send((key, parcel::pack(&results, MOST_ANSWER_BYTES))).await;
        });
    }

    /// Ends what is under way, and gives up the queue, so that another relay need not wait.
    async fn finish(mut self, inlets: Option<Arc<Inlets>>) {
        let ended = async { while self.under_way.join_next().await.is_some() {} };
        if timeout(LAST_STEPS, ended).await.is_err() {
            self.under_way.shutdown().await;
        }
        if let Some(inlets) = inlets {
            inlets.close_idle();
        }
        if self.hold.is_ours() {
            let leave = self.place.leave(&self.token);
            if let Err(trouble) = self.hub.run(self.place.slot(), &leave, loads::left).await {
                debug!(queue = %self.queue, %trouble, "the queue of loads could not be given up: its claim ends by itself");
            }
        }
    }
}

/// Loads keys, those of one rule together.
async fn load(inlets: &Inlets, keys: &[Vec<u8>], deadline: Instant) -> Vec<Result<Loaded, LoadError>> {
    let unknown = || {
        let why = "no rule of the relay covers the key: its snapshot is older than the sidecar's";
        Err(LoadError::Unusable { origin: String::new(), why: why.to_owned() })
    };
    let mut by_rule: BTreeMap<usize, Vec<usize>> = BTreeMap::new();
    for (at, key) in keys.iter().enumerate() {
        if let Some(rule) = inlets.find(key) {
            by_rule.entry(rule).or_default().push(at);
        }
    }
    let mut results: Vec<_> = keys.iter().map(|_| unknown()).collect();
    for (rule, places) in by_rule {
        let Some(loader) = inlets.loader(rule).map(|loader| loader.until(deadline)) else { continue };
        let asked: Vec<Vec<u8>> = places.iter().map(|at| keys[*at].clone()).collect();
        let loaded = match asked.as_slice() {
            [key] => vec![loader.load(key).await],
            keys => loader.load_many(keys).await,
        };
        places.iter().zip(loaded).for_each(|(at, result)| results[*at] = result);
    }
    results
}

/// Carries answers to the cache, which is done with each when its sidecar has it, or waits no more.
async fn carry(mut hub: Hub, slot: u16, mut answers: mpsc::Receiver<Answer>, counts: Arc<Counts>) {
    let mut batch = Vec::with_capacity(ANSWERS_AT_ONCE);
    while answers.recv_many(&mut batch, ANSWERS_AT_ONCE).await > 0 {
        let lasts = ANSWER_LASTS_MS.to_string().into_bytes();
        let set = |(key, bytes): Answer| vec![b"SET".to_vec(), key, bytes, b"PX".to_vec(), lasts.clone()];
        let commands: Vec<Vec<Vec<u8>>> = batch.drain(..).map(set).collect();
        let mut tried = 0;
        while let Err(trouble) = hub.ask(slot, &commands).await {
            tried += 1;
            debug!(%trouble, "answers to sidecars could not be carried to the cache");
            if tried == ATTEMPTS {
                Counts::add(&counts.undelivered, commands.len());
                break;
            }
        }
    }
}
