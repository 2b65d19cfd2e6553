//! The process: threads, listeners, and the end.

use std::io;
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use socket2::{Domain, Protocol, Socket, Type};
use tokio::net::{TcpListener, UnixListener};
use tokio::runtime::Handle;
use tokio::sync::watch;
use tokio::task::LocalSet;

use super::admin::{self, AdminError, AdminListeners, Explanation, Introspect, Invalidation};
use super::delivery::{Binding, Delivered};
use super::events;
use super::events::request::{Refusal, Request, answer};
use super::events::store::Store;
use super::lapses;
use super::meter::Meter;
use super::policy::ActivePolicy;
use super::pulse::Pulse;
use super::reload::{Board, InForce, Policies, PolicyError, Setting, Told};
use super::roster::{Inbox, Roster, run_errands};
use super::session::{Ending, Reader, Session, split_tcp, split_unix};
use super::start_gate::{self, Missing};
use super::sweep;
use super::upstream::discovery::Refresh;
use super::upstream::node::NodeAddr;
use super::upstream::view::View;
use super::versions::keeper::keep_forever;
use super::waiting_room::{self, Door, Visitor};
use super::worker::{Outside, Worker};
use crate::origin::OriginStats;
use crate::policy::Snapshot;
use crate::policy::binding::BindingName;
use crate::telemetry::background::Background;
use crate::telemetry::metrics::MetricsHub;

/// The most clients of one worker; more are told so and closed, as by Redis.
const MOST_CLIENTS: usize = 10_000;
const TOO_MANY: &[u8] = b"-ERR max number of clients reached\r\n";
const BACKLOG: i32 = 1024;

/// What a sidecar is started with.
#[derive(Debug, Clone)]
pub struct Config {
    /// The snapshot's file.
    pub snapshot: PathBuf,
    /// The binding that is served, where snapshots come through the cache as well.
    pub binding: Option<Binding>,
    /// How many sidecars share the origins, where no binding tells.
    pub sidecars: u32,
    /// Where clients come by TCP. Of several, those of IPv6 are left out where the system has none.
    pub listen: Vec<SocketAddr>,
    /// Where clients come by Unix socket.
    pub socket: Option<PathBuf>,
    /// The socket's mode.
    pub socket_mode: u32,
    /// Where health and metrics are served.
    pub admin: Option<SocketAddr>,
    /// Where policy and keys are explained.
    pub admin_socket: Option<PathBuf>,
    /// How many threads serve clients.
    pub workers: usize,
    /// For how long it may be told that applications should not start yet.
    pub start_hold: Duration,
    /// How long clients may finish after the signal to stop.
    pub drain: Duration,
}

/// Why a sidecar does not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The snapshot, or what it names, cannot come into force.
    #[error("{}: {source}", path.display())]
    Policy {
        /// Where the snapshot is.
        path: PathBuf,
        /// Why.
        source: PolicyError,
    },
    /// An address cannot be listened on.
    #[error("cannot listen on {address}: {source}")]
    Listen {
        /// Which.
        address: String,
        /// Why.
        source: io::Error,
    },
    /// The admin addresses cannot be listened on.
    #[error(transparent)]
    Admin(#[from] AdminError),
    /// The system refuses a thread or a runtime.
    #[error("cannot start: {0}")]
    Io(#[from] io::Error),
}

/// How near the end is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    Serving,
    Draining,
    Over,
}

/// What each worker hears from outside.
#[derive(Clone)]
struct Feeds {
    told: watch::Receiver<Option<Told>>,
    stage: watch::Receiver<Stage>,
    origins: Handle,
    roster: Arc<Roster>,
    metrics: Arc<MetricsHub>,
    binding: Option<BindingName>,
}

struct Listeners {
    tcp: Vec<std::net::TcpListener>,
    unix: Option<std::os::unix::net::UnixListener>,
}

/// Runs a sidecar until it is told to stop. Everything is parsed and checked before a port opens.
pub fn run(config: &Config) -> Result<(), StartError> {
    let background = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    background.block_on(supervise(config))
}

async fn supervise(config: &Config) -> Result<(), StartError> {
    let counters = Arc::new(Background::default());
    let metrics = Arc::new(MetricsHub::new(counters.clone()));
    let (policies, told, delivered) = open_policies(config, &metrics, counters).await?;
    let listeners = (0..config.workers).map(|index| Listeners::open(config, index)).collect::<Result<Vec<_>, _>>()?;
    let admin = AdminListeners::open(config.admin, config.admin_socket.as_deref())?;
    let (stages, stage) = watch::channel(Stage::Serving);
    let (roster, inboxes) = Roster::new(config.workers);
    let feeds = Feeds {
        told: told.clone(),
        stage: stage.clone(),
        origins: Handle::current(),
        roster: roster.clone(),
        metrics: metrics.clone(),
        binding: config.binding.as_ref().map(|binding| binding.name.clone()),
    };
    let mut threads = Vec::new();
    let binding = feeds.binding.clone();
    for (index, (listeners, inbox)) in listeners.into_iter().zip(inboxes).enumerate() {
        let feeds = feeds.clone();
        let thread = std::thread::Builder::new().name(format!("worker-{index}"));
        threads.push(thread.spawn(move || serve(feeds, inbox, listeners, index == 0))?);
    }
    let (_stop_admin, admin_stop) = watch::channel(false);
    let (gate, missing) = watch::channel(Some(start_gate::NO_POLICY.to_owned()));
    let opening = tokio::spawn(start_gate::keep(told.clone(), config.start_hold, gate));
    let insight = Arc::new(Insight { told, delivered, binding, stage, missing, roster });
    let serving_admin = tokio::spawn(admin::serve(admin, insight, metrics, admin_stop));
    let following = tokio::spawn(policies.follow());
    stop_signal().await?;
    tracing::info!("draining");
    stages.send_replace(Stage::Draining);
    let finished = tokio::task::spawn_blocking(move || threads.into_iter().for_each(|thread| drop(thread.join())));
    if tokio::time::timeout(config.drain, finished).await.is_err() {
        stages.send_replace(Stage::Over);
    }
    serving_admin.abort();
    following.abort();
    opening.abort();
    if let Some(path) = &config.socket {
        let _ = std::fs::remove_file(path);
    }
    Ok(())
}

type Opened = (Policies, watch::Receiver<Option<Told>>, watch::Receiver<Delivered>);

async fn open_policies(config: &Config, metrics: &Arc<MetricsHub>, counters: Arc<Background>) -> Result<Opened, StartError> {
    let (tells, told) = watch::channel(None);
    let (delivers, delivered) = watch::channel(Delivered::default());
    let pulse = |binding: &Binding| Pulse::new(binding.name.clone(), metrics.clone(), told.clone(), delivered.clone());
    let pulse = config.binding.as_ref().map(pulse);
    let (snapshot, binding) = (config.snapshot.clone(), config.binding.clone());
    let setting = Setting { snapshot, binding, sidecars: config.sidecars, workers: config.workers };
    let opened = Policies::open(setting, pulse, Board { told: tells, delivered: delivers }, counters).await;
    let policies = opened.map_err(|source| StartError::Policy { path: config.snapshot.clone(), source })?;
    Ok((policies, told, delivered))
}

/// What the admin server may ask.
struct Insight {
    told: watch::Receiver<Option<Told>>,
    delivered: watch::Receiver<Delivered>,
    binding: Option<BindingName>,
    stage: watch::Receiver<Stage>,
    /// What keeps applications from starting.
    missing: watch::Receiver<Missing>,
    roster: Arc<Roster>,
}

impl Introspect for Insight {
    fn started(&self) -> Result<(), String> {
        self.missing.borrow().clone().map_or(Ok(()), Err)
    }

    fn readiness(&self) -> Result<(), String> {
        if *self.stage.borrow() != Stage::Serving {
            return Err("the sidecar is stopping and takes no new clients".to_owned());
        }
        match &*self.told.borrow() {
            None => Err(start_gate::NO_POLICY.to_owned()),
            Some(told) if !told.view.borrow().kind.is_usable() => Err("no server of the cluster has been found yet".to_owned()),
            Some(_) => Ok(()),
        }
    }

    fn policy(&self) -> Option<Arc<Snapshot>> {
        self.in_force().map(|in_force| in_force.policy.snapshot().clone())
    }

    fn delivered(&self) -> (Option<&str>, Delivered) {
        (self.binding.as_ref().map(BindingName::as_str), self.delivered.borrow().clone())
    }

    fn origins(&self) -> Vec<OriginStats> {
        self.in_force().map(|in_force| in_force.origins.stats()).unwrap_or_default()
    }

    fn explain(&self, key: Vec<u8>) -> Explanation {
        let explained = self.in_force().and_then(|in_force| serde_json::to_value(in_force.policy.explain(&key)).ok());
        Box::pin(std::future::ready(explained))
    }

    fn invalidate(&self, request: Request) -> Invalidation {
        let unready = || Err(Refusal::Later("no policy is in force yet, or the sidecar is stopping".to_owned()));
        if self.in_force().is_none() {
            return Box::pin(std::future::ready(unready()));
        }
        let (roster, binding) = (self.roster.clone(), self.binding.clone());
        Box::pin(async move {
            let asked = roster.ask_first(async move |worker: Rc<Worker>| {
                answer(&worker, &Store::new(binding.as_ref()), binding.is_some(), request).await
            });
            asked.await.unwrap_or_else(unready)
        })
    }
}

impl Insight {
    fn in_force(&self) -> Option<InForce> {
        self.told.borrow().as_ref().map(|told| told.in_force.borrow().clone())
    }
}

async fn stop_signal() -> io::Result<()> {
    use tokio::signal::unix::{SignalKind, signal};
    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    Ok(())
}

impl Listeners {
    fn open(config: &Config, index: usize) -> Result<Self, StartError> {
        let refuse = |address: String| |source| StartError::Listen { address, source };
        let mut tcp = Vec::new();
        for address in &config.listen {
            match listen_tcp(*address, config.workers > 1) {
                Ok(listener) => tcp.push(listener),
                Err(error) if config.listen.len() > 1 && lacks_ipv6(*address, &error) => {
                    tracing::warn!(%address, %error, "there is no IPv6 here: this address is left out");
                }
                Err(error) => return Err(refuse(address.to_string())(error)),
            }
        }
        let unix = config.socket.as_ref().filter(|_| index == 0);
        let unix = unix.map(|path| listen_unix(path, config.socket_mode).map_err(refuse(path.display().to_string())));
        Ok(Self { tcp, unix: unix.transpose()? })
    }
}

/// Whether an address of IPv6 cannot be had because the system has none of them.
fn lacks_ipv6(address: SocketAddr, error: &io::Error) -> bool {
    let missing = [rustix::io::Errno::AFNOSUPPORT, rustix::io::Errno::ADDRNOTAVAIL].map(|errno| Some(errno.raw_os_error()));
    address.is_ipv6() && missing.contains(&error.raw_os_error())
}

fn listen_tcp(address: SocketAddr, shared: bool) -> io::Result<std::net::TcpListener> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
    socket.set_reuse_address(true)?;
    if shared {
        socket.set_reuse_port(true)?;
    }
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    socket.set_nonblocking(true)?;
    Ok(socket.into())
}

fn listen_unix(path: &Path, mode: u32) -> io::Result<std::os::unix::net::UnixListener> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let listener = std::os::unix::net::UnixListener::bind(path)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode))?;
    listener.set_nonblocking(true)?;
    Ok(listener)
}

/// A worker's thread. `does_chores`: it does what one does for the whole sidecar.
fn serve(feeds: Feeds, inbox: Inbox, listeners: Listeners, does_chores: bool) {
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return tracing::error!(%error, "cannot start a worker"),
    };
    let local = LocalSet::new();
    runtime.block_on(local.run_until(work(feeds, inbox, listeners, does_chores)));
}

struct FromBackground(Refresh);

impl Outside for FromBackground {
    fn refresh_topology(&self) {
        self.0.request();
    }

    fn refresh_from(&self, node: &NodeAddr) {
        self.0.request_from(node);
    }
}

async fn work(feeds: Feeds, inbox: Inbox, listeners: Listeners, does_chores: bool) {
    let Feeds { mut told, mut stage, origins, roster, metrics, binding } = feeds;
    let (opens, door) = Door::new();
    let mut accepting: Vec<Accepting> = listeners.tcp.into_iter().map(|listener| accept_tcp(&door, listener)).collect();
    accepting.push(accept_unix(&door, listeners.unix));
    let told = tokio::select! {
        biased;
        told = told.wait_for(Option::is_some) => told.ok().and_then(|told| told.clone()),
        _ = stage.changed() => None,
    };
    let Some(Told { mut in_force, mut view, refresh }) = told else { return };
    let InForce { policy, access, .. } = in_force.borrow_and_update().clone();
    let policy = Rc::new(ActivePolicy::clone(&policy));
    let worker = Worker::new(policy, access, Arc::new(FromBackground(refresh)), origins, roster, Meter::new(&metrics));
    worker.router().adopt(&worker, &View::clone(&view.borrow_and_update()));
    tokio::task::spawn_local(worker.clone().tick_forever());
    tokio::task::spawn_local(keep_forever(worker.clone()));
    tokio::task::spawn_local(lapses::keeper::keep_forever(worker.clone(), binding.clone()));
    tokio::task::spawn_local(run_errands(worker.clone(), inbox));
    if does_chores {
        tokio::task::spawn_local(sweep::sweep_forever(worker.clone(), sweep::lease(binding.as_ref())));
        tokio::task::spawn_local(events::follow_forever(worker.clone(), binding));
    }
    opens.send_replace(Some(worker.clone()));
    loop {
        tokio::select! {
            Ok(()) = in_force.changed() => {
                let InForce { policy, access, .. } = in_force.borrow_and_update().clone();
                worker.set_policy(Rc::new(ActivePolicy::clone(&policy)), access);
            }
            Ok(()) = view.changed() => {
                let view = view.borrow_and_update().clone();
                worker.router().adopt(&worker, &view);
            }
            _ = stage.changed() => break,
        }
    }
    accepting.into_iter().flatten().for_each(|task| task.abort());
    drain(&worker, &mut stage).await;
}

/// Lets clients finish, until there is none or the time is up.
async fn drain(worker: &Rc<Worker>, stage: &mut watch::Receiver<Stage>) {
    worker.end_sessions(Ending::Draining);
    while worker.clients() > 0 {
        tokio::select! {
            () = tokio::time::sleep(Duration::from_millis(10)) => {}
            changed = stage.changed() => {
                if changed.is_err() || *stage.borrow() == Stage::Over {
                    worker.end_sessions(Ending::Now);
                    break;
                }
            }
        }
    }
}

type Accepting = Option<tokio::task::JoinHandle<()>>;

fn accept_tcp(door: &Door, listener: std::net::TcpListener) -> Accepting {
    let listener = TcpListener::from_std(listener).ok()?;
    let door = door.clone();
    Some(tokio::task::spawn_local(async move {
        loop {
            match listener.accept().await {
                Ok((stream, _)) => {
                    let _ = stream.set_nodelay(true);
                    let (reader, writer) = split_tcp(stream);
                    let_in(&door, Visitor { reader, writer, inbox: Vec::new() });
                }
                Err(error) => pause_accepting(&error).await,
            }
        }
    }))
}

fn accept_unix(door: &Door, listener: Option<std::os::unix::net::UnixListener>) -> Accepting {
    let listener = UnixListener::from_std(listener?).ok()?;
    let door = door.clone();
    Some(tokio::task::spawn_local(async move {
        loop {
            match listener.accept().await {
                Ok((stream, _)) => {
                    let (reader, writer) = split_unix(stream);
                    let_in(&door, Visitor { reader, writer, inbox: Vec::new() });
                }
                Err(error) => pause_accepting(&error).await,
            }
        }
    }))
}

/// The usual cause is a limit on open files, which only time eases.
async fn pause_accepting(error: &io::Error) {
    tracing::warn!(%error, "cannot accept a client");
    tokio::time::sleep(Duration::from_millis(100)).await;
}

/// Brings a client to the worker, at once where there is one.
fn let_in(door: &Door, mut visitor: Visitor) {
    if let Some(worker) = door.worker() {
        return admit(&worker, visitor);
    }
    if door.waiting() > MOST_CLIENTS {
        let _ = visitor.writer.try_write(TOO_MANY);
        return;
    }
    let door = door.clone();
    tokio::task::spawn_local(async move {
        if let Some(worker) = waiting_room::wait(&mut visitor, door).await {
            admit(&worker, visitor);
        }
    });
}

fn admit(worker: &Rc<Worker>, visitor: Visitor) {
    static NEXT_ID: AtomicU64 = AtomicU64::new(1);
    let Visitor { reader, writer, inbox } = visitor;
    if worker.clients() >= MOST_CLIENTS {
        worker.metrics().client_rejected();
        let _ = writer.try_write(TOO_MANY);
        return;
    }
    let session = Session::new(worker.clone(), NEXT_ID.fetch_add(1, Ordering::Relaxed), writer);
    let place = worker.register(&session);
    let worker = worker.clone();
    tokio::task::spawn_local(async move {
        Reader::resume(session, reader, inbox).serve().await;
        worker.unregister(place);
    });
}
