//! Finds the servers and follows them: one task on the second thread, whose findings every worker reads.
//!
//! A finding replaces the one before only when it is newer by the servers' own epochs, or when a majority says so; nothing found
//! leaves the last finding in place. So a peer that was cut off and comes back with an old story changes nothing.

mod cluster;
mod gather;
mod sentinel;
mod subscription;

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::{Notify, watch};
use tokio::task::AbortHandle;
use tokio::time::Instant;
use tracing::{info, warn};

use self::cluster::ClusterFollower;
use self::sentinel::SentinelFollower;
use super::access::ClusterAccess;
use super::dial::DialError;
use super::node::{NodeAddr, NodeAddrError};
use super::view::{SlotMapError, View, ViewKind};
use crate::policy::snapshot::{Cluster, Topology};
use crate::telemetry::background::Background;

/// How often the servers are asked when nothing happens.
const POLL: Duration = Duration::from_secs(10);
/// How long one server or sentinel may take to answer.
const ANSWER_LIMIT: Duration = Duration::from_secs(1);
/// The shortest time from one round to the next, however urgently it is asked for; doubles while rounds bring nothing new.
const MIN_GAP: Duration = Duration::from_millis(50);
/// Where that doubling ends.
const MAX_GAP: Duration = Duration::from_millis(500);
/// The longest pause after failed rounds that nobody asks for.
const MAX_BACK_OFF: Duration = Duration::from_secs(5);
/// How often a lasting failure is logged.
const WARN_EVERY: Duration = Duration::from_secs(30);
/// The most nodes that redirections may ask to be asked first.
const MAX_HINTS: usize = 4;

/// Why a round found nothing to trust.
#[derive(Debug, thiserror::Error)]
pub enum DiscoveryError {
    /// Nobody answered.
    #[error("none of {asked} answered; {first}")]
    NoAnswer {
        /// How many were asked.
        asked: usize,
        /// Why one of them did not.
        first: String,
    },
    /// Too few sentinels answered to tell an old story from a new one.
    #[error("{answered} of {total} sentinels answered: waiting for more before trusting them")]
    TooFew {
        /// How many answered.
        answered: usize,
        /// How many there are.
        total: usize,
    },
    /// Only older findings than the one in use.
    #[error("{from} tells of epoch {epoch}, and epoch {newest} was seen before: it is out of date")]
    Stale {
        /// Who told it.
        from: NodeAddr,
        /// Its epoch.
        epoch: u64,
        /// The epoch of the finding in use.
        newest: u64,
    },
    /// The sentinels name a primary that does not confirm it.
    #[error("the sentinels name {node} as primary, but it does not confirm: {reason}")]
    Unconfirmed {
        /// Whom they name.
        node: NodeAddr,
        /// What it said or did instead.
        reason: String,
    },
}

/// Why one server or sentinel gave no answer that counts.
#[derive(Debug, thiserror::Error)]
enum AskError {
    #[error(transparent)]
    Dial(#[from] DialError),
    #[error("{node}: {reason}")]
    Answer { node: NodeAddr, reason: String },
    #[error("{node}: {error}")]
    SlotMap { node: NodeAddr, error: SlotMapError },
}

impl AskError {
    fn answer(node: &NodeAddr, reason: impl ToString) -> Self {
        Self::Answer { node: node.clone(), reason: reason.to_string() }
    }
}

/// What is followed, and how to log in.
#[derive(Debug, Clone)]
struct Target {
    topology: Topology,
    addresses: Vec<NodeAddr>,
    name: String,
    access: ClusterAccess,
}

impl Target {
    fn new(cluster: &Cluster, access: ClusterAccess) -> Result<Self, NodeAddrError> {
        let addresses = match &cluster.topology {
            Topology::Sentinel { sentinels, .. } => sentinels,
            Topology::Cluster { seeds } => seeds,
        };
        let addresses = addresses.iter().map(|address| address.parse()).collect::<Result<_, _>>()?;
        Ok(Self { topology: cluster.topology.clone(), addresses, name: cluster.name.clone(), access })
    }

    /// Whether both are the same servers, so that what was found for one still serves the other.
    fn is_same_place(&self, other: &Self) -> bool {
        let same_kind = match (&self.topology, &other.topology) {
            (Topology::Sentinel { master, .. }, Topology::Sentinel { master: other, .. }) => master == other,
            (Topology::Cluster { .. }, Topology::Cluster { .. }) => true,
            _ => false,
        };
        same_kind && self.name == other.name
    }
}

/// The discovery task. Dropping it stops the task; the last view stays readable.
#[derive(Debug)]
pub struct Discovery {
    target: watch::Sender<Target>,
    task: AbortHandle,
}

impl Drop for Discovery {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Discovery {
    /// Starts to find and follow `cluster` on the current tokio runtime.
    pub fn start(
        cluster: &Cluster,
        access: ClusterAccess,
        metrics: Arc<Background>,
    ) -> Result<(Self, watch::Receiver<Arc<View>>, Refresh), NodeAddrError> {
        let (target, targets) = watch::channel(Target::new(cluster, access)?);
        let (view, views) = watch::channel(Arc::new(View { version: 0, kind: ViewKind::Unknown }));
        let refresh = Refresh::default();
        let driver = Driver { publisher: Publisher { view, metrics: metrics.clone() }, refresh: refresh.clone(), metrics };
        let task = tokio::spawn(driver.run(targets)).abort_handle();
        Ok((Self { target, task }, views, refresh))
    }

    /// Follows `cluster` from now on. The view stays until the first new finding, unless it is another cluster's.
    pub fn replace(&self, cluster: &Cluster, access: ClusterAccess) -> Result<(), NodeAddrError> {
        self.target.send_replace(Target::new(cluster, access)?);
        Ok(())
    }
}

/// Asks for a round of discovery, from any thread. Many requests become one round; rounds keep a distance.
#[derive(Debug, Clone, Default)]
pub struct Refresh(Arc<RefreshState>);

#[derive(Debug, Default)]
struct RefreshState {
    wake: Notify,
    hints: Mutex<Vec<NodeAddr>>,
}

impl Refresh {
    /// Something is wrong with what the view says: a connection failed, or a server redirected.
    pub fn request(&self) {
        self.0.wake.notify_one();
    }

    /// As [`Refresh::request`], and `node`, which a redirection named, is asked first: it knows best what it owns.
    pub fn request_from(&self, node: &NodeAddr) {
        let mut hints = self.0.hints.lock().unwrap_or_else(PoisonError::into_inner);
        if hints.len() < MAX_HINTS && !hints.contains(node) {
            hints.push(node.clone());
        }
        drop(hints);
        self.request();
    }

    fn take_hints(&self) -> Vec<NodeAddr> {
        std::mem::take(&mut *self.0.hints.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// Hands findings to the workers.
struct Publisher {
    view: watch::Sender<Arc<View>>,
    metrics: Arc<Background>,
}

impl Publisher {
    fn current(&self) -> Arc<View> {
        self.view.borrow().clone()
    }

    /// Whether `kind` is news.
    fn publish(&self, kind: ViewKind) -> bool {
        let current = self.current();
        if current.kind == kind {
            return false;
        }
        let version = current.version + 1;
        log_change(version, &kind);
        self.metrics.topology_changes.inc();
        self.view.send_replace(Arc::new(View { version, kind }));
        true
    }
}

fn log_change(version: u64, kind: &ViewKind) {
    match kind {
        ViewKind::Unknown => info!(version, "the cluster changed: looking for its servers"),
        ViewKind::Primary { node, replicas, .. } => {
            info!(version, primary = %node, replicas = replicas.len(), "found the primary")
        }
        ViewKind::Cluster(map) => {
            info!(version, primaries = map.primaries().len(), slots = map.covered(), "found the slot map");
        }
    }
}

enum Follower {
    Sentinel(Box<SentinelFollower>),
    Cluster(ClusterFollower),
}

impl Follower {
    fn new(target: &Target, newest: Option<u64>, refresh: Refresh) -> Self {
        let (seeds, access) = (target.addresses.clone(), target.access.clone());
        match &target.topology {
            Topology::Sentinel { master, .. } => {
                Self::Sentinel(Box::new(SentinelFollower::new(master.clone(), seeds, access, newest, refresh)))
            }
            Topology::Cluster { .. } => Self::Cluster(ClusterFollower::new(seeds, access.servers, newest)),
        }
    }

    fn newest(&self) -> Option<u64> {
        match self {
            Self::Sentinel(follower) => follower.newest(),
            Self::Cluster(follower) => follower.newest(),
        }
    }

    async fn round(&mut self, hints: &[NodeAddr], view: &View) -> Result<ViewKind, DiscoveryError> {
        match self {
            Self::Sentinel(follower) => follower.round().await,
            Self::Cluster(follower) => follower.round(hints, view).await,
        }
    }
}

struct Driver {
    publisher: Publisher,
    refresh: Refresh,
    metrics: Arc<Background>,
}

impl Driver {
    async fn run(self, mut targets: watch::Receiver<Target>) {
        let mut target = targets.borrow_and_update().clone();
        let mut newest = None;
        loop {
            let mut follower = Follower::new(&target, newest, self.refresh.clone());
            tokio::select! {
                () = self.follow(&mut follower) => return,
                changed = targets.changed() => if changed.is_err() { return },
            }
            let next = targets.borrow_and_update().clone();
            newest = follower.newest().filter(|_| next.is_same_place(&target));
            if !next.is_same_place(&target) {
                self.publisher.publish(ViewKind::Unknown);
            }
            target = next;
        }
    }

    /// Round after round, for ever.
    async fn follow(&self, follower: &mut Follower) {
        let mut pace = Pace::default();
        let mut warned: Option<Instant> = None;
        loop {
            let started = Instant::now();
            self.metrics.discovery_rounds.inc();
            let hints = self.refresh.take_hints();
            let outcome = follower.round(&hints, &self.publisher.current()).await;
            match outcome {
                Ok(kind) => {
                    pace.after_success(self.publisher.publish(kind));
                    if warned.take().is_some() {
                        info!("the topology is known again");
                    }
                }
                Err(error) => {
                    pace.after_failure();
                    self.metrics.discovery_failures.inc();
                    if warned.is_none_or(|at| at.elapsed() >= WARN_EVERY) {
                        warn!(%error, "the topology cannot be told; the last finding stays in use");
                        warned = Some(Instant::now());
                    }
                }
            }
            let (gap, pause) = pace.waits();
            tokio::time::sleep_until(started + gap).await;
            tokio::select! {
                () = tokio::time::sleep(pause) => pace.after_quiet(),
                () = self.refresh.0.wake.notified() => {}
            }
        }
    }
}

/// How long to wait between rounds.
#[derive(Debug, Default)]
struct Pace {
    /// Rounds in a row that failed.
    failures: u32,
    /// Rounds in a row that were asked for and changed nothing.
    fruitless: u32,
}

impl Pace {
    fn after_success(&mut self, changed: bool) {
        self.failures = 0;
        self.fruitless = if changed { 0 } else { self.fruitless.saturating_add(1) };
    }

    fn after_failure(&mut self) {
        self.failures = self.failures.saturating_add(1);
        self.fruitless = self.fruitless.saturating_add(1);
    }

    /// Nobody asked for a round for a whole pause.
    fn after_quiet(&mut self) {
        self.fruitless = 0;
    }

    /// The distance to keep, and how much longer to wait where nobody asks. Both have jitter, for all sidecars of a cluster see
    /// the same events.
    fn waits(&self) -> (Duration, Duration) {
        let gap = doubled(MIN_GAP, self.fruitless.saturating_sub(1), MAX_GAP);
        let pause = if self.failures == 0 { POLL } else { doubled(2 * MIN_GAP, self.failures - 1, MAX_BACK_OFF) };
        (jittered(gap), jittered(pause))
    }
}

/// `base`, doubled so often, and at most `most`.
pub(crate) fn doubled(base: Duration, times: u32, most: Duration) -> Duration {
    base.saturating_mul(1 << times.min(16)).min(most)
}

/// Between three quarters and five quarters of `duration`.
pub(crate) fn jittered(duration: Duration) -> Duration {
    duration.mul_f64(0.75 + fastrand::f64() / 2.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rounds_keep_a_growing_distance_within_bounds() {
        let mut pace = Pace::default();
        for _ in 0..100 {
            pace.after_failure();
            let (gap, pause) = pace.waits();
            assert!(gap <= MAX_GAP.mul_f64(1.25) && pause <= MAX_BACK_OFF.mul_f64(1.25));
        }
        assert!(pace.waits().0 >= MAX_GAP.mul_f64(0.75));
        pace.after_success(true);
        assert!(pace.waits().0 <= MIN_GAP.mul_f64(1.25));
        assert!(pace.waits().1 >= POLL.mul_f64(0.75));
    }

    #[test]
    fn hints_are_bounded_and_taken_once() {
        let refresh = Refresh::default();
        for port in 1..100 {
            refresh.request_from(&NodeAddr::new("a", port));
            refresh.request_from(&NodeAddr::new("a", 1));
        }
        assert_eq!(refresh.take_hints().len(), MAX_HINTS);
        assert_eq!(refresh.take_hints(), []);
    }
}
