//! The relay's process: the rules in force, which relays live, who has which partition.
//!
//! Relays know of each other through the journal alone: each says that it lives, and claims its share of the partitions. A claim ends by
//! itself where its relay dies or stands still, after [`Config::claim`]; another has the partition within two thirds of that more.

use std::collections::HashMap;
use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::extract::State;
use axum::http::StatusCode;
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse as _, Response};
use axum::routing::get;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep, timeout};
use tracing::{debug, error, info, warn};

use super::changes::keeper::Keeper;
use super::consumer::{Claim, Consumer};
use super::figures::{Figures, Share};
use super::hub::{Hub, HubError};
use super::loads;
use super::rules::Rules;
use super::share::wish;
use crate::journal::scripts::{self, Claimed};
use crate::journal::{Partition, letters};
use crate::origin::{OriginError, Origins};
use crate::policy::snapshot::{Cluster, MAX_BYTES, SnapshotError};
use crate::policy::{JournalName, Snapshot};
use crate::sidecar::access_files::{AccessError, open_access};
use crate::sidecar::admin::{AdminError, AdminListeners, OPENMETRICS, serve_routers};
use crate::sidecar::files::{FileError, WatchedFiles};
use crate::sidecar::signals::stop_on_signals;
use crate::sidecar::upstream::access::Access;
use crate::sidecar::upstream::discovery::{Discovery, Refresh, jittered};
use crate::sidecar::upstream::node::NodeAddrError;
use crate::sidecar::upstream::view::View;
use crate::telemetry::background::Background;

/// How long consumers may take to give up what they have at the end.
const LAST_STEPS: Duration = Duration::from_secs(10);

/// What a relay is started with.
#[derive(Debug, Clone)]
pub struct Config {
    /// The snapshot's file.
    pub snapshot: PathBuf,
    /// Where health and metrics are served.
    pub admin: Option<SocketAddr>,
    /// How long a claim lasts.
    pub claim: Duration,
    /// Whether the slots that it reads go with it.
    pub drop_slots: bool,
}

/// Why a relay does not start, or cannot take up a snapshot.
#[derive(Debug, thiserror::Error)]
pub enum RelayError {
    /// The snapshot cannot be read.
    #[error(transparent)]
    File(#[from] FileError),
    /// It is refused.
    #[error(transparent)]
    Snapshot(#[from] SnapshotError),
    /// An origin, or what a rule tells it, is refused.
    #[error(transparent)]
    Origin(#[from] OriginError),
    /// A secret that it names cannot be used.
    #[error(transparent)]
    Access(#[from] AccessError),
    /// An address of the cache is none.
    #[error(transparent)]
    Address(#[from] NodeAddrError),
    /// The port is taken.
    #[error(transparent)]
    Admin(#[from] AdminError),
    /// The system refuses a runtime or a signal.
    #[error("cannot start: {0}")]
    Io(#[from] io::Error),
}

/// Runs until the process is told to end.
pub fn run(config: &Config) -> Result<(), RelayError> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(run_on(config))
}

async fn run_on(config: &Config) -> Result<(), RelayError> {
    let mut stop = stop_on_signals()?;
    let mut files = WatchedFiles::open(vec![config.snapshot.clone()], MAX_BYTES).await?;
    let snapshot = read(&files)?;
    let rules = Rules::new(&snapshot, &Origins::new(&snapshot.origins)?)?;
    let counters = Arc::new(Background::default());
    let access = open_access(&snapshot.cluster, counters.clone()).await?;
    let (discovery, view, refresh) = Discovery::start(&snapshot.cluster, access.clone(), counters.clone())?;
    let (rules, in_force) = watch::channel(Arc::new(rules));
    let listeners = AdminListeners::open(config.admin, None)?;
    let figures = Figures::default();
    let (end, ended) = watch::channel(false);
    let serving = tokio::spawn(serve(listeners, figures.clone(), view.clone(), ended));
    let place = Place { access: access.servers, view, refresh };
    let (hubs, more_hubs) = (place.clone(), place.clone());
    let (feeds, loaded) = (figures.feeds().clone(), figures.loads().clone());
    let mut relay = Relay::new(place, in_force.clone(), figures, config.claim);
    let loads =
        loads::Keeper::new(relay.token.clone(), Box::new(move || more_hubs.hub()), in_force.clone(), loaded, config.claim);
    let keeper = Keeper::new(relay.token.clone(), Box::new(move || hubs.hub()), in_force, feeds, config.claim);
    let keeper = if config.drop_slots { keeper.dropping_slots() } else { keeper };
    let (halt, halted) = watch::channel(false);
    let loads = tokio::spawn(loads.run(halted.clone()));
    let feeds = tokio::spawn(keeper.run(halted));
    info!(journals = rules.borrow().journals().len(), token = %relay.token, "the relay runs");
    let mut cluster = snapshot.cluster;
    loop {
        tokio::select! {
            () = relay.turn() => {}
            _ = stop.wait_for(|stop| *stop) => break,
            _ = files.changed() => match take_up(&files, &rules) {
                Ok(next) if next.cluster.is_same_place(&cluster) => {}
                Ok(next) => match follow(&discovery, &next.cluster, counters.clone()).await {
                    Ok(()) => cluster = next.cluster,
                    Err(refusal) => error!(%refusal, "a new place of the cache is refused, the last one stays in force"),
                },
                Err(refusal) => error!(%refusal, "a new snapshot is refused, the last good one stays in force"),
            },
        }
    }
    halt.send_replace(true);
    let _ = tokio::join!(relay.stop(), timeout(LAST_STEPS, feeds), timeout(LAST_STEPS, loads));
    end.send_replace(true);
    let _ = timeout(LAST_STEPS, serving).await;
    Ok(())
}

/// Finds the servers of another place from now on. The login that it names is read at the next start.
async fn follow(discovery: &Discovery, cluster: &Cluster, counters: Arc<Background>) -> Result<(), RelayError> {
    Ok(discovery.replace(cluster, open_access(cluster, counters).await?)?)
}

fn read(files: &WatchedFiles) -> Result<Snapshot, SnapshotError> {
    Snapshot::parse(files.current().first().map_or(&[][..], |bytes| bytes))
}

fn take_up(files: &WatchedFiles, rules: &watch::Sender<Arc<Rules>>) -> Result<Snapshot, RelayError> {
    let snapshot = read(files)?;
    let origins = rules.borrow().origins().updated(&snapshot.origins)?;
    rules.send_replace(Arc::new(Rules::new(&snapshot, &origins)?));
    info!(generation = snapshot.generation, "a new snapshot is in force");
    Ok(snapshot)
}

#[derive(Clone)]
struct Shown {
    figures: Figures,
    view: watch::Receiver<Arc<View>>,
}

async fn serve(
    listeners: AdminListeners,
    figures: Figures,
    view: watch::Receiver<Arc<View>>,
    stop: watch::Receiver<bool>,
) -> io::Result<()> {
    async fn readyz(State(shown): State<Shown>) -> Response {
        match shown.view.borrow().kind.is_usable() {
            true => "ok\n".into_response(),
            false => (StatusCode::SERVICE_UNAVAILABLE, "no server of the cache has been found yet\n").into_response(),
        }
    }
    async fn metrics(State(shown): State<Shown>) -> Response {
        ([(CONTENT_TYPE, OPENMETRICS)], shown.figures.render()).into_response()
    }
    let router = Router::new()
        .route("/livez", get(|| async { "ok\n" }))
        .route("/readyz", get(readyz))
        .route("/metrics", get(metrics))
        .with_state(Shown { figures, view });
    serve_routers(listeners, router, Router::new(), None, stop).await
}

/// How to reach the cache.
#[derive(Clone)]
struct Place {
    access: Access,
    view: watch::Receiver<Arc<View>>,
    refresh: Refresh,
}

impl Place {
    fn hub(&self) -> Hub {
        Hub::new(self.access.clone(), self.view.clone(), self.refresh.clone())
    }
}

/// A partition's consumer, and what it is told of its claim.
struct Seat {
    partition: Partition,
    claim: watch::Sender<Option<Claim>>,
    task: JoinHandle<()>,
}

struct Relay {
    token: Arc<str>,
    place: Place,
    hub: Hub,
    rules: watch::Receiver<Arc<Rules>>,
    figures: Figures,
    lasts: Duration,
    seats: HashMap<JournalName, Vec<Seat>>,
    /// Of each journal the relays that lived at the last look.
    living: HashMap<JournalName, Vec<String>>,
}

impl Relay {
    fn new(place: Place, rules: watch::Receiver<Arc<Rules>>, figures: Figures, lasts: Duration) -> Self {
        let token = format!("{:016x}", fastrand::u64(..)).into();
        Self { token, hub: place.hub(), place, rules, figures, lasts, seats: HashMap::new(), living: HashMap::new() }
    }

    /// Looks after all journals once, and sleeps until the next time. May be cancelled.
    async fn turn(&mut self) {
        let journals: Vec<JournalName> = self.rules.borrow().journals().cloned().collect();
        self.seats.retain(|journal, _| journals.contains(journal));
        let mut pause = self.lasts / 4;
        for journal in &journals {
            if let Err(trouble) = self.look_after(journal).await {
                debug!(%journal, %trouble, "the journal cannot be looked after");
                pause = self.lasts / 16;
            }
        }
        sleep(jittered(pause)).await;
    }

    async fn look_after(&mut self, journal: &JournalName) -> Result<(), HubError> {
        let partitions: Vec<Partition> = Partition::all(journal).collect();
        let Some(first) = partitions.first() else { return Ok(()) };
        let millis = u64::try_from(self.lasts.as_millis()).unwrap_or(u64::MAX);
        let mut trouble = None;
        let here = letters::here(first, &self.token, millis);
        match self.hub.run(first.slot(), &here, letters::living).await {
            Ok(living) => drop(self.living.insert(journal.clone(), living)),
            // Who lived a moment ago most likely still does.
            Err(error) => trouble = Some(error),
        }
        let living = self.living.get(journal).cloned().unwrap_or_default();
        let (mut holders, mut share) = (Vec::with_capacity(partitions.len()), Share::default());
        for partition in &partitions {
            match self.hub.run(partition.slot(), &scripts::status(partition), scripts::status_answer).await {
                Ok(status) => {
                    let holder = status.relay.as_ref().map(|holder| String::from_utf8_lossy(holder).into_owned());
                    share.add(&status, holder.as_deref() == Some(&*self.token));
                    holders.push(holder);
                }
                Err(error) => {
                    // Somebody's, until it can be asked.
                    holders.push(Some(String::new()));
                    trouble = Some(error);
                }
            }
        }
        self.figures.set_share(journal, share);
        let wish = wish(&self.token, &living, &holders);
        let seats = self.seats(journal, &partitions);
        for at in &wish.release {
            seats[*at].claim.send_replace(None);
        }
        let token = self.token.clone();
        let stays = |at: &usize| holders[*at].as_deref() == Some(&*token) && !wish.release.contains(at);
        let mine: Vec<usize> = (0..holders.len()).filter(stays).collect();
        for at in mine.into_iter().chain(wish.claim) {
            if let Err(error) = self.claim(journal, at, millis).await {
                trouble = Some(error);
            }
        }
        trouble.map_or(Ok(()), Err)
    }

    fn seats(&mut self, journal: &JournalName, partitions: &[Partition]) -> &[Seat] {
        let (place, rules, token) = (&self.place, &self.rules, &self.token);
        let counts = self.figures.counts(journal);
        self.seats.entry(journal.clone()).or_insert_with(|| {
            let seat = |partition: &Partition| {
                let (claim, claimed) = watch::channel(None);
                let part = (journal.clone(), partition.clone());
                let consumer = Consumer::new(part, token.clone(), place.hub(), rules.clone(), claimed, counts.clone());
                Seat { partition: partition.clone(), claim, task: tokio::spawn(consumer.run()) }
            };
            partitions.iter().map(seat).collect()
        })
    }

    /// Claims a partition, or renews the claim, unless it is being given up.
    async fn claim(&mut self, journal: &JournalName, at: usize, millis: u64) -> Result<(), HubError> {
        let Some(seat) = self.seats.get(journal).and_then(|seats| seats.get(at)) else { return Ok(()) };
        let renewed = Instant::now();
        let call = scripts::claim(&seat.partition, &self.token, millis);
        let claimed = self.hub.run(seat.partition.slot(), &call, scripts::claimed).await?;
        seat.claim.send_replace(match claimed {
            Claimed::Yes { fence, .. } => Some(Claim { fence, renewed, lasts: self.lasts }),
            Claimed::Held(_) => None,
        });
        Ok(())
    }

    /// Gives up everything, so that others need not wait.
    async fn stop(mut self) {
        let seats: Vec<Seat> = self.seats.drain().flat_map(|(_, seats)| seats).collect();
        let journals: Vec<JournalName> = self.rules.borrow().journals().cloned().collect();
        for journal in journals {
            let first = Partition::new(&journal, 0);
            let leave = [b"ZREM".to_vec(), letters::relays(&first), self.token.as_bytes().to_vec()];
            let _ = timeout(LAST_STEPS / 4, self.hub.ask(first.slot(), &[leave.to_vec()])).await;
        }
        let mut tasks = Vec::with_capacity(seats.len());
        for Seat { claim, task, .. } in seats {
            claim.send_replace(None);
            tasks.push(task);
        }
        if timeout(LAST_STEPS, futures_util::future::join_all(tasks)).await.is_err() {
            warn!("some partitions could not be given up in time: their claims end by themselves");
        }
    }
}
