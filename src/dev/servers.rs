//! The planner's second actuator: servers and sentinels as processes on loopback.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Display;
use std::fs;
use std::hash::Hash;
use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use futures_util::future::join_all;
use tracing::{debug, info, warn};

use super::DevError;
use super::engine::ServerProgram;
use super::ports::Reservation;
use super::process::{Process, Watchdog, bound_log, last_lines};
use super::restart::Restarts;
use super::run_dir::{Places, RunDir, write_private};
use crate::api::CacheClusterSpec;
use crate::api::cache_cluster::Fsync;
use crate::operator::admin::{Admin, AdminError, Entry, Login};
use crate::operator::cache_cluster::build::{self, ServerConfig, TAKEOVER_AFTER};
use crate::operator::cache_cluster::plan::{
    Action, Desired, Layout, NodeId, Observed, Sentinel, SentinelId, Server, ServerId, ServerState, SlotRange, SlotSet, Start,
    slots_to_move,
};
use crate::operator::cache_cluster::resharding::{Move, Resharding};
use crate::operator::cache_cluster::{monitor, move_slots, observe};

/// A process that ends this often before the cluster was ever complete will not come up by itself.
const MAX_FAILED_STARTS: u32 = 3;

/// How long slots move key by key before everything is looked at again.
const SLOTS_AT_A_LOOK: Duration = Duration::from_millis(500);

const MAX_MEMORY: &str = "maxmemory";
const EVICTION: &str = "maxmemory-policy";

/// What the servers are to be.
#[derive(Debug, Clone)]
pub struct Tier {
    /// The CacheCluster's name, under which sentinels watch its primary.
    pub name: String,
    /// Its specification.
    pub spec: CacheClusterSpec,
    /// The user that servers ask for.
    pub login: Option<Login>,
    /// The user of the relay, where servers ask for users.
    pub relay: Option<Login>,
    /// The program that they run.
    pub program: ServerProgram,
}

impl Tier {
    /// What the planner is to reach.
    pub fn desired(&self) -> Desired {
        let count = |count: u32| u16::try_from(count).unwrap_or(u16::MAX);
        let layout = match self.spec.sentinel_count() {
            0 => Layout::Cluster { shards: count(self.spec.shard_count()) },
            sentinels => Layout::Sentinel { sentinels: count(sentinels) },
        };
        Desired::on_one_machine(layout, count(self.spec.replica_count()), TAKEOVER_AFTER)
    }

    /// Whether `spec` asks for the same, but for the values of settings that servers take while they run.
    pub fn differs_in_settings_at_most(&self, spec: &CacheClusterSpec) -> bool {
        let CacheClusterSpec { memory, eviction, ref parameters, .. } = self.spec;
        let removed = parameters.keys().any(|name| !spec.parameters.contains_key(name));
        !removed && CacheClusterSpec { memory, eviction, parameters: parameters.clone(), ..spec.clone() } == self.spec
    }

    /// The form of its data, which a directory keeps.
    fn form(&self) -> String {
        let (kind, shards, servers) = (self.program.kind, self.spec.shard_count(), self.spec.replica_count() + 1);
        format!("{kind:?} {:?} named {} of {shards} x {servers} servers", self.spec.mode, self.name)
    }
}

/// One place for a process, filled or not.
#[derive(Debug)]
struct Place {
    address: SocketAddr,
    bus_port: Option<u16>,
    /// Its ports, kept from others until its first start.
    reserved: Vec<Reservation>,
    directory: PathBuf,
    process: Option<Process>,
    restarts: Restarts,
    admin: Option<Admin>,
}

impl std::fmt::Debug for Admin {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Admin")
    }
}

impl Place {
    fn log(&self) -> PathBuf {
        self.directory.join("log")
    }

    /// Runs one exchange over the kept connection, which is given up when the exchange fails.
    async fn exchange<T>(
        &mut self,
        login: Option<&Login>,
        exchange: impl AsyncFnOnce(&mut Admin) -> Result<T, AdminError>,
    ) -> Result<T, AdminError> {
        let mut admin = match self.admin.take() {
            Some(admin) => admin,
            None => Admin::connect(self.address, login).await?,
        };
        let answer = exchange(&mut admin).await?;
        self.admin = Some(admin);
        Ok(answer)
    }
}

/// The servers and sentinels of one CacheCluster.
#[derive(Debug)]
pub struct Servers {
    tier: Tier,
    /// When a write is on the disk. `None`: a server that ends loses its data.
    fsync: Option<Fsync>,
    servers: BTreeMap<ServerId, Place>,
    sentinels: BTreeMap<SentinelId, Place>,
    /// The last state that differed from the one before, and since when it lasts.
    shape: Option<(Observed, Instant)>,
    resharding: Resharding,
}

impl Servers {
    /// Finds a place for each, the same as in an earlier run where there was one, also for those of shards that are no longer wanted and
    /// have not left yet. Starts nothing.
    pub fn place(tier: Tier, run_dir: &RunDir) -> Result<Self, DevError> {
        let desired = tier.desired();
        let mut places = run_dir.places(&tier.form())?;
        let in_cluster = matches!(desired.layout, Layout::Cluster { .. });
        let leaving: Vec<ServerId> = places.ports.keys().filter_map(|name| id_of(name)).collect();
        let all: BTreeSet<ServerId> = desired.servers().chain(leaving).collect();
        let servers = all.into_iter().map(|id| Ok((id, place(run_dir, &mut places, name_of(id), in_cluster)?)));
        let servers = servers.collect::<Result<_, DevError>>()?;
        let sentinels = desired.sentinels().map(|id| Ok((id, place(run_dir, &mut places, format!("sentinel-{}", id.0), false)?)));
        let sentinels = sentinels.collect::<Result<_, DevError>>()?;
        run_dir.save_places(&places)?;
        let fsync = tier.spec.keeping().fsync.or(run_dir.is_durable().then_some(Fsync::default()));
        Ok(Self { tier, fsync, servers, sentinels, shape: None, resharding: Resharding::default() })
    }

    /// Asks for as many shards of a Cluster as `spec` does: the plan starts the servers of new ones, and moves slots. Whether that is
    /// another number.
    pub fn resize(&mut self, spec: &CacheClusterSpec, run_dir: &RunDir) -> Result<bool, DevError> {
        let is_same = spec.shard_count() == self.tier.spec.shard_count();
        if is_same || !self.in_cluster() || spec.mode != self.tier.spec.mode {
            return Ok(false);
        }
        let wanted = Tier { spec: CacheClusterSpec { shards: spec.shards, ..self.tier.spec.clone() }, ..self.tier.clone() };
        let mut places = run_dir.places(&wanted.form())?;
        for id in wanted.desired().servers().filter(|id| !self.servers.contains_key(id)).collect::<Vec<_>>() {
            self.servers.insert(id, place(run_dir, &mut places, name_of(id), true)?);
        }
        run_dir.save_places(&places)?;
        self.tier = wanted;
        Ok(true)
    }

    /// How far the move of slots is, where there is something to tell of it.
    pub fn tell_of_slots(&mut self, observed: &Observed) -> Option<String> {
        self.resharding.tell(slots_to_move(&self.tier.desired(), observed))
    }

    fn in_cluster(&self) -> bool {
        self.sentinels.is_empty()
    }

    /// What they are to be.
    pub fn tier(&self) -> &Tier {
        &self.tier
    }

    /// The addresses of the servers.
    pub fn addresses(&self) -> Vec<SocketAddr> {
        self.servers.values().map(|place| place.address).collect()
    }

    /// The addresses of the sentinels.
    pub fn sentinel_addresses(&self) -> Vec<SocketAddr> {
        self.sentinels.values().map(|place| place.address).collect()
    }

    fn places_mut(&mut self) -> impl Iterator<Item = (String, &mut Place)> {
        let servers = self.servers.iter_mut().map(|(id, place)| (id.to_string(), place));
        servers.chain(self.sentinels.iter_mut().map(|(id, place)| (id.to_string(), place)))
    }

    /// Notices processes that have ended: each is named, with the last it said. They are started again by the plan.
    pub async fn reap(&mut self, watchdog: &mut Watchdog) -> Vec<Ended> {
        let mut all = Vec::new();
        for (name, place) in self.places_mut() {
            bound_log(&place.log());
            let Some(status) = place.process.as_mut().and_then(Process::ended) else { continue };
            if let Some(process) = place.process.take() {
                process.clear(watchdog).await;
            }
            place.admin = None;
            place.restarts.ended();
            let hopeless = place.restarts.failed_starts() >= MAX_FAILED_STARTS;
            all.push(Ended { name, how: status.to_string(), said: last_lines(&place.log(), 3), hopeless });
        }
        all
    }

    /// Asks every process what it is.
    pub async fn observe(&mut self) -> Observed {
        let login = self.tier.login.clone();
        let in_cluster = self.in_cluster();
        let servers = join_all(self.servers.iter_mut().map(|(id, place)| {
            let login = login.as_ref();
            async move { (*id, observe_server(place, login, in_cluster).await) }
        }));
        let sentinels = join_all(self.sentinels.iter_mut().map(|(id, place)| {
            let login = login.as_ref();
            async move { (*id, observe_sentinel(place, login).await) }
        }));
        // Sentinels first: a promotion that they tell of has happened by the time that the servers are asked.
        let sentinels = sentinels.await.into_iter().collect();
        let servers = servers.await.into_iter().collect();
        let mut observed = Observed { servers, sentinels, ..Observed::default() };
        let shape = observed.shape();
        observed.steady = match &self.shape {
            Some((last, since)) if *last == shape => since.elapsed(),
            _ => {
                self.shape = Some((shape, Instant::now()));
                Duration::ZERO
            }
        };
        observed
    }

    /// Does one step. A command that fails is tried again by the next plan, if it is still called for.
    pub async fn apply(&mut self, action: &Action, run_dir: &RunDir, watchdog: &mut Watchdog) -> Result<(), DevError> {
        let outcome = match action {
            Action::StartServer { server, start } => return self.start_server(*server, *start, watchdog).await,
            Action::StartSentinel { sentinel } => return self.start_sentinel(*sentinel, watchdog).await,
            Action::RemoveServer { server } => return self.remove(*server, run_dir, watchdog).await,
            Action::MoveSlots { from, to, slots, way } => {
                if let (Some(from), Some(to)) = (self.servers.get(from), self.servers.get(to)) {
                    let entry = Entry::from(self.tier.login.as_ref());
                    let planned = Move { from: from.address, to: to.address, slots, way: *way };
                    let until = Instant::now() + SLOTS_AT_A_LOOK;
                    self.resharding.move_slots(planned, entry, || Instant::now() < until).await;
                }
                return Ok(());
            }
            Action::Wait(_) => return Ok(()),
            Action::Monitor { sentinel, primary, quorum } => self.monitor(*sentinel, *primary, *quorum).await,
            Action::ReplicateFrom { server, primary } => {
                let (host, port) = (primary.ip().to_string(), primary.port().to_string());
                self.tell(*server, "REPLICAOF", &[&host, &port]).await
            }
            Action::Promote { server } => self.tell(*server, "REPLICAOF", &["NO", "ONE"]).await,
            Action::AllowPromotion { server, of } => self.allow_promotion(*server, *of).await,
            Action::ClusterMeet { server, peer } => self.meet(*server, *peer).await,
            Action::AddSlots { server, slots } => self.add_slots(*server, slots).await,
            Action::ClusterReplicate { server, primary: NodeId(id) } => self.tell(*server, "CLUSTER REPLICATE", &[id]).await,
            Action::ClusterForget { server, node: NodeId(id) } => self.tell(*server, "CLUSTER FORGET", &[id]).await,
            Action::SettleSlots { server, slots } => self.settle(*server, slots).await,
            Action::DropKeys { server } => self.tell(*server, "FLUSHALL", &["ASYNC"]).await,
            Action::BumpEpoch { server } => self.tell(*server, "CLUSTER BUMPEPOCH", &[]).await,
            Action::ClusterTakeover { server } => self.tell(*server, "CLUSTER FAILOVER", &["TAKEOVER"]).await,
            // Planned where agents start servers, or pods are rolled; neither is the case here.
            Action::Forget { .. }
            | Action::SetQuorum { .. }
            | Action::PruneGhosts { .. }
            | Action::Handover { .. }
            | Action::ReplacePod { .. }
            | Action::SetReplicas { .. } => return Ok(()),
        };
        match outcome {
            Ok(()) => debug!(?action, "done"),
            Err(error) => warn!(?action, %error, "a step failed and is tried again"),
        }
        Ok(())
    }

    async fn start_server(&mut self, id: ServerId, start: Start, watchdog: &mut Watchdog) -> Result<(), DevError> {
        let Self { tier, fsync, servers, .. } = self;
        let Some(place) = servers.get_mut(&id).filter(|place| place.restarts.may_start()) else { return Ok(()) };
        let data = place.directory.join("data");
        if fsync.is_none() {
            forget_data(&data).map_err(|source| DevError::Start { what: id.to_string(), source })?;
        }
        let text = build::server(&ServerConfig {
            address: place.address,
            bus_port: place.bus_port,
            directory: &data,
            start,
            fsync: *fsync,
            max_memory: tier.spec.max_memory(),
            eviction: tier.spec.eviction().as_str(),
            writes: tier.spec.writes,
            parameters: &tier.spec.parameters,
            login: tier.login.as_ref(),
            relay: tier.relay.as_ref(),
        });
        run(place, &id, &tier.program.path, "server.conf", &text, &[], watchdog).await
    }

    async fn start_sentinel(&mut self, id: SentinelId, watchdog: &mut Watchdog) -> Result<(), DevError> {
        let Self { tier, sentinels, .. } = self;
        let Some(place) = sentinels.get_mut(&id).filter(|place| place.restarts.may_start()) else { return Ok(()) };
        let previous = fs::read_to_string(place.directory.join("sentinel.conf")).unwrap_or_default();
        let text = build::sentinel(place.address, &place.directory, tier.login.as_ref(), &previous);
        run(place, &id, &tier.program.path, "sentinel.conf", &text, &["--sentinel"], watchdog).await
    }

    /// Lets a server be promoted, where it has all that its primary has; else the next plan asks for it again.
    async fn allow_promotion(&mut self, server: ServerId, of: Option<SocketAddr>) -> Result<(), AdminError> {
        let Some(address) = self.servers.get(&server).map(|place| place.address) else { return Ok(()) };
        if let Some(primary) = of {
            let login = self.tier.login.as_ref();
            let (mut replica, mut primary) = (Admin::connect(address, login).await?, Admin::connect(primary, login).await?);
            if !observe::has_caught_up(&mut replica, &mut primary).await? {
                return Ok(());
            }
        }
        let setting = if self.in_cluster() { ["cluster-replica-no-failover", "no"] } else { ["replica-priority", "100"] };
        self.tell(server, "CONFIG SET", &setting).await
    }

    async fn tell(&mut self, server: ServerId, command: &'static str, arguments: &[&str]) -> Result<(), AdminError> {
        let Some(place) = self.servers.get_mut(&server) else { return Ok(()) };
        place.exchange(self.tier.login.as_ref(), async |admin| admin.ask(command, arguments).await).await
    }

    async fn meet(&mut self, server: ServerId, peer: ServerId) -> Result<(), AdminError> {
        let Some((address, Some(bus))) = self.servers.get(&peer).map(|peer| (peer.address, peer.bus_port)) else {
            return Ok(());
        };
        let (host, port, bus) = (address.ip().to_string(), address.port().to_string(), bus.to_string());
        self.tell(server, "CLUSTER MEET", &[&host, &port, &bus]).await
    }

    async fn add_slots(&mut self, server: ServerId, slots: &[SlotRange]) -> Result<(), AdminError> {
        let bounds: Vec<String> = slots.iter().flat_map(|range| [range.first.to_string(), range.last.to_string()]).collect();
        let bounds: Vec<&str> = bounds.iter().map(String::as_str).collect();
        self.tell(server, "CLUSTER ADDSLOTSRANGE", &bounds).await
    }

    async fn settle(&mut self, server: ServerId, slots: &SlotSet) -> Result<(), AdminError> {
        let Some(place) = self.servers.get_mut(&server) else { return Ok(()) };
        place.exchange(self.tier.login.as_ref(), async |admin| move_slots::settle(admin, slots).await).await
    }

    /// Ends a server that holds nothing, and gives up its place. Nothing of it is left: by its old name in the Cluster, which the others
    /// have forgotten, nobody is to come back.
    async fn remove(&mut self, id: ServerId, run_dir: &RunDir, watchdog: &mut Watchdog) -> Result<(), DevError> {
        let Some(place) = self.servers.remove(&id) else { return Ok(()) };
        if let Some(process) = place.process {
            process.stop(watchdog).await;
        }
        let mut places = run_dir.places(&self.tier.form())?;
        places.ports.remove(&name_of(id));
        run_dir.save_places(&places)?;
        run_dir.remove(&name_of(id))?;
        info!(server = %id, "a server held neither slots nor keys any more, and is gone");
        Ok(())
    }

    async fn monitor(&mut self, sentinel: SentinelId, primary: SocketAddr, quorum: u16) -> Result<(), AdminError> {
        let Self { tier, sentinels, .. } = self;
        let Tier { name, login, .. } = &*tier;
        let login = login.as_ref();
        let mut voted = 0;
        for place in sentinels.values_mut().filter(|place| place.process.is_some()) {
            let vote = place.exchange(login, async |admin| monitor::last_vote(admin, name).await).await;
            voted = voted.max(vote.unwrap_or(0));
        }
        let Some(place) = sentinels.get_mut(&sentinel) else { return Ok(()) };
        let watched = (quorum, voted);
        place.exchange(login, async |admin| monitor::monitor((sentinel, admin), name, primary, watched, login).await).await
    }

    /// Applies those settings of `spec` that servers take while they run: memory, eviction and parameters. What came of it, in
    /// sentences; the rest of `spec` is left alone.
    pub async fn reconfigure(&mut self, spec: &CacheClusterSpec) -> Vec<String> {
        let (before, after) = (settings(&self.tier.spec), settings(spec));
        let mut told = Vec::new();
        for (name, value) in after.iter().filter(|(name, value)| before.get(*name) != Some(value)) {
            told.push(match self.set(name, value).await {
                Ok(()) => {
                    self.remember(name, spec);
                    format!("{name} is {value} now, on every server")
                }
                Err(error) => {
                    format!("{name} is not {value} on every server: {error}: correct it, or restart larder dev to apply it")
                }
            });
        }
        told
    }

    /// Changes one setting of the servers that run, the first of which may refuse it. The others find it when they start.
    async fn set(&mut self, name: &str, value: &str) -> Result<(), AdminError> {
        let login = self.tier.login.clone();
        for place in self.servers.values_mut().filter(|place| place.process.is_some()) {
            let () = place.exchange(login.as_ref(), async |admin| admin.ask("CONFIG SET", &[name, value]).await).await?;
        }
        Ok(())
    }

    /// Has servers that start from now on find the setting as `spec` has it.
    fn remember(&mut self, name: &str, spec: &CacheClusterSpec) {
        match name {
            MAX_MEMORY => self.tier.spec.memory = spec.memory,
            EVICTION => self.tier.spec.eviction = spec.eviction,
            parameter => {
                let value = spec.parameters.get(parameter).cloned().unwrap_or_default();
                self.tier.spec.parameters.insert(parameter.to_owned(), value);
            }
        }
    }

    /// Ends all of them, sentinels first, so that they see no fault in it.
    pub async fn stop(&mut self, watchdog: &mut Watchdog) {
        stop_all(&mut self.sentinels, watchdog).await;
        stop_all(&mut self.servers, watchdog).await;
    }
}

/// The settings that can be changed while servers run, as servers call them.
fn settings(spec: &CacheClusterSpec) -> BTreeMap<String, String> {
    let mut settings = spec.parameters.clone();
    settings.insert(MAX_MEMORY.to_owned(), spec.max_memory().as_bytes().to_string());
    settings.insert(EVICTION.to_owned(), spec.eviction().as_str().to_owned());
    settings
}

/// A process that has ended by itself.
#[derive(Debug)]
pub struct Ended {
    /// Whose.
    pub name: String,
    /// How.
    pub how: String,
    /// The end of its log.
    pub said: String,
    /// Whether starting it again is of no use.
    pub hopeless: bool,
}

async fn stop_all<I: Ord + Hash>(places: &mut BTreeMap<I, Place>, watchdog: &mut Watchdog) {
    places.values().filter_map(|place| place.process.as_ref()).for_each(Process::terminate);
    for place in places.values_mut() {
        place.admin = None;
        if let Some(process) = place.process.take() {
            process.stop(watchdog).await;
        }
    }
}

/// What a server's directory is called.
fn name_of(ServerId { shard, index }: ServerId) -> String {
    format!("server-{shard}-{index}")
}

fn id_of(name: &str) -> Option<ServerId> {
    let (shard, index) = name.strip_prefix("server-")?.split_once('-')?;
    Some(ServerId { shard: shard.parse().ok()?, index: index.parse().ok()? })
}

/// Finds the place of one process: its earlier one, or a new one.
fn place(run_dir: &RunDir, places: &mut Places, name: String, with_bus: bool) -> Result<Place, DevError> {
    let directory = run_dir.subdirectory(&name)?;
    run_dir.subdirectory(&format!("{name}/data"))?;
    let at = |port: u16| SocketAddr::from((Ipv4Addr::LOCALHOST, port));
    let known = places.ports.get(&name).copied();
    let taken = |source| DevError::PortTaken { process: name.clone(), source };
    let reserve = |port: Option<u16>| match port {
        Some(port) => Reservation::at(at(port)).map_err(taken),
        None => Reservation::any().map_err(taken),
    };
    let port = reserve(known.map(|(port, _)| port))?;
    let bus = if with_bus { Some(reserve(known.and_then(|(_, bus)| bus))?) } else { None };
    let address = port.address().map_err(taken)?;
    let bus_port = bus.as_ref().map(|bus| bus.address().map(|address| address.port())).transpose().map_err(taken)?;
    let reserved = std::iter::once(port).chain(bus).collect();
    places.ports.insert(name, (address.port(), bus_port));
    Ok(Place { address, bus_port, reserved, directory, process: None, restarts: Restarts::default(), admin: None })
}

/// Writes the configuration, gives up the reserved ports and starts the program.
async fn run(
    place: &mut Place,
    what: &dyn Display,
    program: &Path,
    file: &str,
    text: &str,
    further: &[&str],
    watchdog: &mut Watchdog,
) -> Result<(), DevError> {
    let fail = |source| DevError::Start { what: what.to_string(), source };
    let path = place.directory.join(file);
    write_private(&path, text.as_bytes()).map_err(fail)?;
    let arguments: Vec<String> =
        std::iter::once(path.to_string_lossy().into_owned()).chain(further.iter().map(|&word| word.to_owned())).collect();
    place.reserved.clear();
    place.restarts.started();
    place.process = Some(Process::start(watchdog, program, &arguments, &place.log()).await.map_err(fail)?);
    Ok(())
}

/// An ephemeral server starts with nothing but its name in the Cluster.
fn forget_data(data: &Path) -> io::Result<()> {
    for entry in fs::read_dir(data)? {
        let entry = entry?;
        let path = entry.path();
        if entry.file_type()?.is_dir() {
            fs::remove_dir_all(path)?;
        } else if entry.file_name() != "nodes.conf" {
            fs::remove_file(path)?;
        }
    }
    Ok(())
}

async fn observe_server(place: &mut Place, login: Option<&Login>, in_cluster: bool) -> Server {
    let state = if place.process.is_none() {
        let data = place.directory.join("data");
        let claim = fs::read_to_string(data.join("nodes.conf")).ok().and_then(|nodes| observe::claim(&nodes));
        ServerState::Stopped { data: data.join("appendonlydir").is_dir(), claim }
    } else {
        match place.exchange(login, async |admin| observe::server(admin, in_cluster).await).await {
            Ok(Some(facts)) => {
                place.restarts.answered();
                ServerState::Running(facts)
            }
            Ok(None) => ServerState::Silent,
            Err(error) => {
                debug!(%error, "a server does not answer");
                ServerState::Silent
            }
        }
    };
    Server { address: place.address, bus_port: place.bus_port.unwrap_or(0), state }
}

async fn observe_sentinel(place: &mut Place, login: Option<&Login>) -> Sentinel {
    if place.process.is_none() {
        return Sentinel::Stopped;
    }
    match place.exchange(login, async |admin| observe::sentinel(admin).await).await {
        Ok(watch) => {
            place.restarts.answered();
            Sentinel::Running { watch }
        }
        Err(error) => {
            debug!(%error, "a sentinel does not answer");
            Sentinel::Silent
        }
    }
}
