//! The policy and the keys in force, and how others come into force: from files, while clients stay connected.

use std::path::Path;
use std::sync::Arc;

use tokio::sync::watch;

use super::access_files::{AccessError, open_access};
use super::files::{FileError, WatchedFiles};
use super::policy::ActivePolicy;
use super::upstream::access::{Access, ClusterAccess};
use super::upstream::discovery::{Discovery, Refresh};
use super::upstream::node::NodeAddrError;
use super::upstream::view::View;
use crate::origin::{OriginError, Origins, check_load_and_file};
use crate::policy::snapshot::{MAX_BYTES, Snapshot, SnapshotError};
use crate::policy::{Mode, Strategy};
use crate::telemetry::background::Background;

/// Why a snapshot cannot come into force.
#[derive(Debug, thiserror::Error)]
pub enum PolicyError {
    /// Its file cannot be read.
    #[error(transparent)]
    File(#[from] FileError),
    /// It is refused.
    #[error(transparent)]
    Snapshot(#[from] SnapshotError),
    /// An origin, or a rule's question to it, cannot be used.
    #[error("its origins: {0}")]
    Origin(#[from] OriginError),
    /// A password or a certificate cannot be used.
    #[error(transparent)]
    Access(#[from] AccessError),
    /// It names an address that is none.
    #[error("its cluster: {0}")]
    Address(#[from] NodeAddrError),
    /// What one worker must see to is spread over several.
    #[error(
        "rule `{rule}` has stampede, which holds with one worker only, and this sidecar has {workers}: a load and its SET may come \
         over connections of different workers, that know nothing of each other. Start it with --workers 1, or remove stampede \
         from the rule"
    )]
    Workers {
        /// The first such rule.
        rule: String,
        /// How many there are.
        workers: usize,
    },
}

/// What workers act under.
#[derive(Debug, Clone)]
pub struct InForce {
    /// The policy.
    pub policy: Arc<ActivePolicy>,
    /// The keys for new connections to servers.
    pub access: Access,
    /// Where the policy's loads go.
    pub origins: Origins,
}

/// Follows a snapshot's file, and the servers that it names.
pub struct Policies {
    files: WatchedFiles,
    /// How many act under each policy.
    workers: usize,
    origins: Origins,
    discovery: Discovery,
    counters: Arc<Background>,
    in_force: watch::Sender<InForce>,
}

/// What is told of policies and servers.
#[derive(Debug, Clone)]
pub struct Told {
    /// What workers act under.
    pub in_force: watch::Receiver<InForce>,
    /// The servers.
    pub view: watch::Receiver<Arc<View>>,
    /// Asks for a fresh look at the servers.
    pub refresh: Refresh,
}

impl Policies {
    /// Reads the snapshot at `path`, for so many workers, and the files it names, and starts to look for its servers.
    pub async fn open(path: &Path, workers: usize, counters: Arc<Background>) -> Result<(Self, Told), PolicyError> {
        let files = WatchedFiles::open(vec![path.to_owned()], MAX_BYTES).await?;
        let snapshot = Arc::new(Snapshot::parse(&json_of(&files))?);
        let origins = Origins::new(&snapshot.origins)?;
        let policy = Arc::new(ActivePolicy::new(snapshot.clone(), &origins)?);
        check_origins(&snapshot).await?;
        check_workers(&policy, workers)?;
        let access = open_access(&snapshot.cluster, counters.clone()).await?;
        let servers = access.servers.clone();
        let (discovery, view, refresh) = Discovery::start(&snapshot.cluster, access, counters.clone())?;
        counters.policy_generation.set(snapshot.generation);
        let (in_force, receiver) = watch::channel(InForce { policy, access: servers, origins: origins.clone() });
        let told = Told { in_force: receiver, view, refresh };
        Ok((Self { files, workers, origins, discovery, counters, in_force }, told))
    }

    /// Takes up each change of the file. A bad one is refused: the last good one stays.
    pub async fn follow(mut self) {
        loop {
            self.files.changed().await;
            match self.take_up().await {
                Ok(generation) => {
                    self.counters.policy_generation.set(generation);
                    tracing::info!(generation, "a new policy is in force");
                }
                Err(error) => {
                    self.counters.policy_rejected.inc();
                    tracing::error!(%error, "a new policy is refused, the last good one stays in force");
                }
            }
        }
    }

    async fn take_up(&mut self) -> Result<u64, PolicyError> {
        let snapshot = Arc::new(Snapshot::parse(&json_of(&self.files))?);
        let origins = self.origins.updated(&snapshot.origins)?;
        let policy = Arc::new(ActivePolicy::new(snapshot.clone(), &origins)?);
        check_workers(&policy, self.workers)?;
        let before = self.in_force.borrow().clone();
        let access = if before.policy.snapshot().cluster == snapshot.cluster {
            before.access
        } else {
            self.change_cluster(&snapshot).await?
        };
        self.origins = origins.clone();
        let generation = snapshot.generation;
        self.in_force.send_replace(InForce { policy, access, origins });
        Ok(generation)
    }

    async fn change_cluster(&self, snapshot: &Snapshot) -> Result<Access, PolicyError> {
        let access: ClusterAccess = open_access(&snapshot.cluster, self.counters.clone()).await?;
        let servers = access.servers.clone();
        self.discovery.replace(&snapshot.cluster, access)?;
        Ok(servers)
    }
}

/// Checks the origins that are asked, also where their URLs stand in files. Only at the start: what is wrong with a file of a later
/// policy fails the loads from that origin, and nothing else.
async fn check_origins(snapshot: &Snapshot) -> Result<(), OriginError> {
    for rule in snapshot.rules.iter().filter(|rule| rule.mode == Mode::Enforce) {
        let Strategy::ReadThrough(read_through) = &rule.strategy else { continue };
        if let Some(origin) = snapshot.origins.iter().find(|origin| origin.name == read_through.load.origin) {
            check_load_and_file(origin, &rule.keys, &read_through.load).await?;
        }
    }
    Ok(())
}

/// Outstanding misses are a worker's own: a SET over another's connection would pass for an update, however old what it brings is.
fn check_workers(policy: &ActivePolicy, workers: usize) -> Result<(), PolicyError> {
    match policy.first_with_leases().filter(|_| workers > 1) {
        Some(rule) => Err(PolicyError::Workers { rule: rule.name.clone(), workers }),
        None => Ok(()),
    }
}

fn json_of(files: &WatchedFiles) -> Arc<[u8]> {
    files.current().first().cloned().unwrap_or_else(|| Arc::from([].as_slice()))
}
