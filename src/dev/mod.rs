//! One machine, no Kubernetes: the same manifests as real processes on loopback.
//!
//! A [`Session`] is prepared (everything is read, checked and reserved), brought up (servers, then sidecars), tended (what dies
//! is restarted, what is saved is applied) and stopped. However the process ends, nothing is left: see [`process`].

pub mod engine;
pub mod manifests;
pub mod ports;
pub mod process;
pub mod relay;
pub mod restart;
pub mod run_dir;
pub mod servers;
pub mod sidecars;

use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use tokio::time::sleep;

use crate::operator::admin::Login;
use crate::operator::cache_cluster::plan::{Action, Layout, ServerId, Waiting, plan};
use crate::operator::cache_cluster::reconcile::random_password;
use crate::policy::Snapshot;
use crate::policy::snapshot::Topology;
use engine::EngineError;
use manifests::{Fingerprint, Loaded, ManifestError};
use process::Watchdog;
use relay::{Left, Relay};
pub use run_dir::{RUN_DIR_PREFIX, admin_socket};
use run_dir::{RunDir, RunDirError};
use servers::{Ended, Servers, Tier};
pub use sidecars::Endpoint;
use sidecars::{SidecarPlaces, Sidecars};

/// How often processes and files are looked at.
const TICK: Duration = Duration::from_millis(100);
/// How often a complete cluster is asked whether it still is.
const WATCH_EVERY: Duration = Duration::from_secs(1);
/// How often files are looked at.
const RELOAD_EVERY: Duration = Duration::from_millis(300);
/// How long what was written behind may take to reach its origins at the end.
const DRAIN_WITHIN: Duration = Duration::from_secs(30);
/// How long bringing up may take.
const BRING_UP_WITHIN: Duration = Duration::from_secs(120);

/// What to run, and where.
#[derive(Debug, Clone)]
pub struct Options {
    /// Files and directories of manifests.
    pub manifests: Vec<PathBuf>,
    /// Where the first sidecar listens; the others follow on the next ports. Port 0: free ones.
    pub listen: SocketAddr,
    /// Its Unix socket.
    pub socket: Option<PathBuf>,
    /// Where the first sidecar's metrics and health are. Port 0: a free one.
    pub admin: SocketAddr,
    /// How many sidecars.
    pub sidecars: u16,
    /// The server program; `None`: found by itself.
    pub server_bin: Option<PathBuf>,
    /// Where data survives the run; `None`: nowhere.
    pub data: Option<PathBuf>,
    /// An existing directory where the sidecars log, each to `sidecar-N.log`; `None`: with everything else of the run.
    pub sidecar_logs: Option<PathBuf>,
    /// How the sidecars log: options of their command line.
    pub log_options: Vec<String>,
    /// The program whose `sidecar` command is run: `larder` or `larderd`.
    pub sidecar_program: PathBuf,
}

/// Why a run cannot begin or go on. Each text ends in the remedy.
#[derive(Debug, thiserror::Error)]
pub enum DevError {
    /// The manifests cannot be used.
    #[error(transparent)]
    Manifest(#[from] ManifestError),
    /// There is no suitable server program.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// The run's directory cannot be used.
    #[error(transparent)]
    RunDir(#[from] RunDirError),
    /// A port of a sidecar is not free.
    #[error("{address} cannot be used: {source}: stop what listens there, or choose another address with {option}")]
    ListenTaken {
        /// The address.
        address: SocketAddr,
        /// The option that chooses it.
        option: &'static str,
        /// Why.
        source: io::Error,
    },
    /// A port that the data remembers is not free.
    #[error("the port of {process} cannot be used: {source}: stop what listens there, or name another directory with --data")]
    PortTaken {
        /// Which server or sentinel.
        process: String,
        /// Why.
        source: io::Error,
    },
    /// A process cannot be started.
    #[error("{what} cannot be started: {source}: see that the program exists, and that there is space for files and processes")]
    Start {
        /// What.
        what: String,
        /// Why.
        source: io::Error,
    },
    /// A process ends again and again before it ever answered.
    #[error("{} ends whenever it is started ({}). It said:\n{}\nCorrect what it complains of, such as spec.parameters", .0.name, .0.how, .0.said)]
    Hopeless(Ended),
    /// The relay gets no password.
    #[error("the system gives no random numbers: see that it can")]
    NoRandomness,
    /// It took too long.
    #[error("after {} s, larder still waits for {waiting}: see whether this machine is overloaded, and the logs in --data", BRING_UP_WITHIN.as_secs())]
    TooSlow {
        /// What it waits for.
        waiting: String,
    },
}

/// What a run tells while it goes on.
#[derive(Debug)]
pub enum Event<'a> {
    /// What is waited for changed.
    Waiting(&'a str),
    /// A process ended by itself and is started again.
    Ended(&'a Ended),
    /// The manifests changed and were applied, as this generation.
    Reloaded {
        /// The snapshot's generation.
        generation: u64,
    },
    /// The manifests changed and were refused: the earlier ones stay.
    Refused(&'a ManifestError),
    /// Something that its user should know.
    Note(&'a str),
}

/// How far the servers are from what is wanted.
enum Convergence {
    /// They are it.
    Settled,
    /// Commands are served, and slots move.
    Resharding,
    /// Something is waited for.
    Waiting(String),
}

impl Convergence {
    /// When everything is looked at again, besides a tick that passes anyway.
    fn look_again_after(&self) -> Duration {
        match self {
            Self::Settled => WATCH_EVERY,
            Self::Resharding => Duration::ZERO,
            Self::Waiting(_) => TICK,
        }
    }
}

/// A run.
pub struct Session {
    options: Options,
    run_dir: RunDir,
    watchdog: Option<Watchdog>,
    servers: Servers,
    sidecars: Sidecars,
    relay: Relay,
    loaded: Loaded,
    /// What sidecars are told.
    snapshot: Snapshot,
    fingerprint: Fingerprint,
    /// Manifests that were saved and wait for journals to be drained.
    held_up: Option<Fingerprint>,
    generation: u64,
    /// The servers of a Cluster that the snapshot names: none that has not joined it yet.
    seeds: Vec<SocketAddr>,
    /// The server that was last told to hold keys although it is to go.
    keeper: Option<ServerId>,
    /// Whether commands have worked.
    served: bool,
}

impl fmt::Debug for Session {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Session").field("run_dir", &self.run_dir).field("servers", &self.servers).finish_non_exhaustive()
    }
}

impl Session {
    /// Reads, checks and reserves everything; starts no server.
    pub async fn prepare(options: Options) -> Result<Self, DevError> {
        let fingerprint = Fingerprint::of(&options.manifests);
        let loaded = Loaded::read(&options.manifests)?;
        let spec = loaded.cluster().spec.clone();
        let program = engine::find(&spec.engine, options.server_bin.as_deref()).await?;
        let run_dir = RunDir::open(options.data.as_deref())?;
        let places = SidecarPlaces {
            count: options.sidecars,
            listen: options.listen,
            socket: options.socket.as_deref(),
            admin: options.admin,
            logs: options.sidecar_logs.as_deref(),
            log_options: &options.log_options,
        };
        let sidecars = Sidecars::place(options.sidecar_program.clone(), run_dir.path(), &places)?;
        let name = loaded.cluster().metadata.name.clone().unwrap_or_default();
        let login = loaded.login().cloned();
        let relay = login.as_ref().map(relay_login).transpose()?;
        let relay_auth = relay.as_ref().map(|relay| manifests::auth_files(&run_dir, "relay-", relay)).transpose()?;
        let tier = Tier { name, spec, login, relay, program };
        let servers = Servers::place(tier, &run_dir)?;
        let remove = Some(run_dir.path()).filter(|_| !run_dir.is_durable());
        let watchdog =
            Watchdog::start(remove).map_err(|source| DevError::Start { what: "the watchdog (sh)".to_owned(), source })?;
        let generation = manifests::next_generation(&run_dir.path().join("snapshot.json"));
        let seeds = servers.addresses();
        let snapshot = loaded.compile(&run_dir, generation, topology(&servers, &seeds))?.shared_among(options.sidecars.into());
        let relay = Relay::new(options.sidecar_program.clone(), run_dir.path(), &options.log_options, relay_auth);
        let watchdog = Some(watchdog);
        let (held_up, keeper, served) = (None, None, false);
        let mut session = Self {
            options,
            run_dir,
            watchdog,
            servers,
            sidecars,
            relay,
            loaded,
            snapshot,
            fingerprint,
            held_up,
            generation,
            seeds,
            keeper,
            served,
        };
        session.write_snapshots()?;
        Ok(session)
    }

    /// The program that the servers run, in words.
    pub fn engine(&self) -> String {
        let program = &self.servers.tier().program;
        format!("{:?} {} ({})", program.kind, program.version, program.path.display())
    }

    /// Where everything of the run lives.
    pub fn directory(&self) -> &std::path::Path {
        self.run_dir.path()
    }

    /// Where the sidecars are.
    pub fn endpoints(&self) -> Vec<Endpoint> {
        self.sidecars.endpoints().cloned().collect()
    }

    /// Where the servers are.
    pub fn servers(&self) -> &Servers {
        &self.servers
    }

    /// Starts everything and waits until commands work. May be cancelled: the session is then still to be stopped.
    pub async fn bring_up(&mut self, tell: &mut dyn FnMut(Event<'_>)) -> Result<(), DevError> {
        for note in self.loaded.idle() {
            tell(Event::Note(&note));
        }
        let deadline = Instant::now() + BRING_UP_WITHIN;
        let mut last = String::new();
        while let Some(waiting) = self.advance(tell).await? {
            if waiting != last {
                tell(Event::Waiting(&waiting));
                last = waiting;
            }
            if Instant::now() >= deadline {
                return Err(DevError::TooSlow { waiting: last });
            }
            sleep(TICK).await;
        }
        self.served = true;
        Ok(())
    }

    /// Takes every step that can be taken now. What it then waits for; `None` once commands work.
    async fn advance(&mut self, tell: &mut dyn FnMut(Event<'_>)) -> Result<Option<String>, DevError> {
        if let Some(ended) = self.reap(tell).await.into_iter().find(|ended| ended.hopeless) {
            return Err(DevError::Hopeless(ended));
        }
        if let Convergence::Waiting(what) = self.converge(tell).await? {
            return Ok(Some(what));
        }
        self.start_clients().await?;
        let unready = self.sidecars.first_unready().await;
        Ok(unready.map(|endpoint| format!("the sidecar at {} to answer", endpoint.listen)))
    }

    /// Observes, plans and applies once.
    async fn converge(&mut self, tell: &mut dyn FnMut(Event<'_>)) -> Result<Convergence, DevError> {
        let observed = self.servers.observe().await;
        if let Some(progress) = self.servers.tell_of_slots(&observed) {
            tell(Event::Note(&progress));
        }
        let actions = plan(&self.servers.tier().desired(), &observed);
        let Some(watchdog) = &mut self.watchdog else { return Ok(Convergence::Settled) };
        for action in &actions {
            self.servers.apply(action, &self.run_dir, watchdog).await?;
        }
        if actions.iter().all(Action::is_resharding) {
            self.tell_of_keeper(&actions, tell);
            return Ok(if actions.is_empty() { Convergence::Settled } else { Convergence::Resharding });
        }
        let waiting = actions.iter().find_map(|action| match action {
            Action::Wait(waiting) if !action.is_resharding() => Some(waiting.to_string()),
            _ => None,
        });
        Ok(Convergence::Waiting(waiting.unwrap_or_else(|| "the servers to start".to_owned())))
    }

    /// A server that is to go and still holds keys is told of, once nothing else is left to do.
    fn tell_of_keeper(&mut self, actions: &[Action], tell: &mut dyn FnMut(Event<'_>)) {
        let keeper = match actions {
            [Action::Wait(waiting @ Waiting::Keys(server)), ..] => Some((*server, waiting)),
            _ => None,
        };
        let known = std::mem::replace(&mut self.keeper, keeper.map(|(server, _)| server));
        if let Some((_, waiting)) = keeper.filter(|(server, _)| known != Some(*server)) {
            tell(Event::Waiting(&waiting.to_string()));
        }
    }

    fn compile(&self, loaded: &Loaded, generation: u64) -> Result<Snapshot, ManifestError> {
        let snapshot = loaded.compile(&self.run_dir, generation, topology(&self.servers, &self.seeds))?;
        Ok(snapshot.shared_among(self.options.sidecars.into()))
    }

    /// Sidecars that start find a Cluster by the servers that it has now.
    fn follow_servers(&mut self) -> Result<(), ManifestError> {
        let addresses = self.servers.addresses();
        if addresses == self.seeds {
            return Ok(());
        }
        (self.seeds, self.generation) = (addresses, self.generation + 1);
        self.snapshot = self.compile(&self.loaded, self.generation)?;
        self.write_snapshots()
    }

    /// Starts what speaks to the servers.
    async fn start_clients(&mut self) -> Result<(), DevError> {
        let Some(watchdog) = &mut self.watchdog else { return Ok(()) };
        self.sidecars.start(watchdog).await?;
        self.relay.start(watchdog).await
    }

    async fn reap(&mut self, tell: &mut dyn FnMut(Event<'_>)) -> Vec<Ended> {
        let Some(watchdog) = &mut self.watchdog else { return Vec::new() };
        let mut ended = self.servers.reap(watchdog).await;
        ended.extend(self.sidecars.reap(watchdog).await);
        ended.extend(self.relay.reap(watchdog).await);
        ended.iter().for_each(|ended| tell(Event::Ended(ended)));
        ended
    }

    /// Keeps everything running, and applies what is saved. Returns only with an error; may be cancelled.
    pub async fn tend(&mut self, tell: &mut dyn FnMut(Event<'_>)) -> Result<(), DevError> {
        let mut observe_at = Instant::now();
        let mut reload_at = Instant::now();
        loop {
            let ended = self.reap(tell).await;
            if !ended.is_empty() || Instant::now() >= observe_at {
                let convergence = self.converge(tell).await?;
                if matches!(convergence, Convergence::Settled) {
                    self.follow_servers()?;
                }
                observe_at = Instant::now() + convergence.look_again_after();
                self.start_clients().await?;
            }
            if Instant::now() >= reload_at {
                self.reload(tell).await;
                reload_at = Instant::now() + RELOAD_EVERY;
            }
            sleep(TICK).await;
        }
    }

    /// Applies manifests that were saved since. Wrong ones are told, and change nothing.
    async fn reload(&mut self, tell: &mut dyn FnMut(Event<'_>)) {
        let fingerprint = Fingerprint::of(&self.options.manifests);
        if fingerprint == self.fingerprint {
            return;
        }
        let generation = self.generation + 1;
        let compile = |loaded: Loaded| Ok((self.compile(&loaded, generation)?, loaded));
        match Loaded::read(&self.options.manifests).and_then(compile) {
            Ok((snapshot, _)) if self.is_held_up(&snapshot, &fingerprint, tell).await => return,
            Ok((snapshot, loaded)) => self.take_up(snapshot, loaded, tell).await,
            Err(error) => tell(Event::Refused(&error)),
        }
        self.fingerprint = fingerprint;
    }

    /// Whether rules would write behind no more, or elsewhere, while their journals still hold writes that reads must see: told once.
    async fn is_held_up(&mut self, next: &Snapshot, saved: &Fingerprint, tell: &mut dyn FnMut(Event<'_>)) -> bool {
        let journals = self.relay.given_up_by(&self.snapshot, next);
        if journals.is_empty() {
            return false;
        }
        let left = match self.relay.left(&journals).await {
            Some(Left { writes: 0, .. }) => return false,
            Some(left) => left.writes_in_words(),
            None => "what is written behind".to_owned(),
        };
        if self.held_up.as_ref() != Some(saved) {
            self.held_up = Some(saved.clone());
            tell(Event::Note(&format!(
                "the manifests were saved, and wait for {left} to reach their origin: `larder journal status` tells why it takes long; a \
                 restart applies them at once"
            )));
        }
        true
    }

    async fn take_up(&mut self, snapshot: Snapshot, loaded: Loaded, tell: &mut dyn FnMut(Event<'_>)) {
        let before = std::mem::replace(&mut self.snapshot, snapshot);
        if let Err(error) = self.write_snapshots() {
            self.snapshot = before;
            return tell(Event::Refused(&error));
        }
        self.generation = self.snapshot.generation;
        self.reload_cluster(&loaded, tell).await;
        loaded.idle().iter().for_each(|note| tell(Event::Note(note)));
        self.loaded = loaded;
        tell(Event::Reloaded { generation: self.generation });
    }

    /// Applies what of the CacheCluster changed and can be applied; tells the rest.
    async fn reload_cluster(&mut self, loaded: &Loaded, tell: &mut dyn FnMut(Event<'_>)) {
        let cluster = |loaded: &Loaded| (loaded.cluster().metadata.name.clone(), loaded.cluster().spec.clone());
        if cluster(loaded) == cluster(&self.loaded) && loaded.login() == self.loaded.login() {
            return;
        }
        let wanted = loaded.cluster();
        match self.servers.resize(&wanted.spec, &self.run_dir) {
            Ok(true) => tell(Event::Note(&format!("shards: {} are wanted now", wanted.spec.shard_count()))),
            Ok(false) => {}
            Err(error) => tell(Event::Note(&format!("the number of shards stays as it was: {error}"))),
        }
        self.servers.reconfigure(&wanted.spec).await.iter().for_each(|note| tell(Event::Note(note)));
        let tier = self.servers.tier();
        let others_stay = wanted.metadata.name.as_deref() == Some(&*tier.name)
            && loaded.login() == tier.login.as_ref()
            && tier.differs_in_settings_at_most(&wanted.spec);
        if !others_stay {
            tell(Event::Note(
                "the CacheCluster changed: restart larder dev to apply that; its policies, shards, memory, eviction and parameters are applied now",
            ));
        }
    }

    /// Tells the relay, then the sidecars: what these write behind is somebody's from the beginning.
    fn write_snapshots(&mut self) -> Result<(), ManifestError> {
        self.relay.follow(&self.snapshot)?;
        manifests::write_snapshot(&self.run_dir.path().join("snapshot.json"), &self.snapshot)
    }

    /// Ends the sidecars, and waits for what was written behind to reach its origins. May be cancelled.
    pub async fn drain(&mut self, tell: &mut dyn FnMut(Event<'_>)) {
        let journals = self.relay.journals();
        if !self.served || journals.is_empty() {
            return;
        }
        if let Some(watchdog) = &mut self.watchdog {
            self.sidecars.stop(watchdog).await;
        }
        let until = Instant::now() + DRAIN_WITHIN;
        let mut last = None;
        loop {
            let left = self.relay.left(&journals).await;
            let is_over = Instant::now() >= until;
            match left {
                Some(left) if left.writes == 0 || is_over => return self.tell_of_rest(left, tell),
                None if is_over => return tell(Event::Note("it is not known what is left in the journals: no server answers")),
                Some(now) if last != left => {
                    let writes = now.writes_in_words();
                    tell(Event::Waiting(&format!("{writes} to reach their origins; another signal ends it at once")));
                }
                _ => {}
            }
            last = left.or(last);
            self.reap(tell).await;
            let _ = self.converge(tell).await;
            if let Some(watchdog) = &mut self.watchdog {
                let _ = self.relay.start(watchdog).await;
            }
            sleep(TICK).await;
        }
    }

    fn tell_of_rest(&self, left: Left, tell: &mut dyn FnMut(Event<'_>)) {
        let (writes, dead) = (left.writes_in_words(), left.dead_in_words());
        let what = match left {
            Left { writes: 0, dead: 0 } => return,
            Left { writes: 0, .. } => dead,
            Left { dead: 0, .. } => format!("{writes} that no origin has yet"),
            Left { .. } => format!("{writes} that no origin has yet, and {dead}"),
        };
        let fate = if self.run_dir.is_durable() { "kept for the next run" } else { "lost with this run: --data would keep it" };
        tell(Event::Note(&format!("left in the journals: {what}; {fate}")));
    }

    /// Ends everything, sidecars first and the relay behind them, and removes what is not to stay.
    pub async fn stop(mut self) {
        let Some(mut watchdog) = self.watchdog.take() else { return };
        self.sidecars.stop(&mut watchdog).await;
        self.relay.stop(&mut watchdog).await;
        self.servers.stop(&mut watchdog).await;
        watchdog.stop().await;
    }
}

/// How sidecars and the relay find the servers.
fn topology(servers: &Servers, seeds: &[SocketAddr]) -> Topology {
    let tier = servers.tier();
    let texts = |addresses: &[SocketAddr]| addresses.iter().map(SocketAddr::to_string).collect();
    match tier.desired().layout {
        Layout::Sentinel { .. } => {
            Topology::Sentinel { master: tier.name.clone(), sentinels: texts(&servers.sentinel_addresses()) }
        }
        Layout::Cluster { .. } => Topology::Cluster { seeds: texts(seeds) },
    }
}

/// The user of the relay beside that of the servers, with a password of this run.
fn relay_login(login: &Login) -> Result<Login, DevError> {
    let password = random_password().map_err(|_| DevError::NoRandomness)?;
    Ok(Login { user: format!("{}-relay", login.user), password })
}
