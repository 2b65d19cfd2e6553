//! The process: threads, listeners, what is watched, and the end.

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

use super::access_files::{AccessError, open_access};
use super::meter::Meter;
use super::policy::ActivePolicy;
use super::session::{ClientReader, ClientWriter, Ending, Reader, Session, split_tcp, split_unix};
use super::upstream::access::Access;
use super::upstream::discovery::{Discovery, Refresh};
use super::upstream::view::View;
use super::worker::{Outside, Worker};
use crate::origin::{OriginError, Origins};
use crate::policy::{Snapshot, SnapshotError};
use crate::telemetry::background::Background;

/// The most clients of one worker; more are told so and closed, as by Redis.
const MOST_CLIENTS: usize = 10_000;
const BACKLOG: i32 = 1024;

/// What a sidecar is started with.
#[derive(Debug, Clone)]
pub struct Config {
    /// The snapshot's file.
    pub snapshot: PathBuf,
    /// Where clients come by TCP.
    pub listen: Option<SocketAddr>,
    /// Where clients come by Unix socket.
    pub socket: Option<PathBuf>,
    /// Where health and metrics are served.
    pub admin: Option<SocketAddr>,
    /// Where policy and keys are explained.
    pub admin_socket: Option<PathBuf>,
    /// How many threads serve clients.
    pub workers: usize,
    /// How long clients may finish after the signal to stop.
    pub drain: Duration,
}

/// Why a sidecar does not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// A file cannot be read.
    #[error("cannot read {}: {source}", path.display())]
    Read {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The snapshot is refused.
    #[error("{}: {source}", path.display())]
    Snapshot {
        /// Where it is.
        path: PathBuf,
        /// Why.
        source: SnapshotError,
    },
    /// A password or a certificate cannot be used.
    #[error(transparent)]
    Access(#[from] AccessError),
    /// An address cannot be listened on.
    #[error("cannot listen on {address}: {source}")]
    Listen {
        /// Which.
        address: String,
        /// Why.
        source: io::Error,
    },
    /// An origin, or a rule's question to it, cannot be used.
    #[error("the snapshot's origins: {0}")]
    Origin(#[from] OriginError),
    /// The snapshot names an address that is none.
    #[error("the snapshot's cluster: {0}")]
    Address(#[from] super::upstream::node::NodeAddrError),
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
    policy: watch::Receiver<Arc<ActivePolicy>>,
    view: watch::Receiver<Arc<View>>,
    stage: watch::Receiver<Stage>,
    access: Access,
    refresh: Refresh,
    origins: Handle,
}

struct Listeners {
    tcp: Option<std::net::TcpListener>,
    unix: Option<std::os::unix::net::UnixListener>,
}

/// Runs a sidecar until it is told to stop. Everything is parsed and checked before a port opens.
pub fn run(config: &Config) -> Result<(), StartError> {
    let snapshot = Arc::new(read_snapshot(&config.snapshot)?);
    let origins = Origins::new(&snapshot.origins)?;
    let policy = Arc::new(ActivePolicy::new(snapshot, &origins)?);
    let listeners = (0..config.workers).map(|index| Listeners::open(config, index)).collect::<Result<Vec<_>, _>>()?;
    let background = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    background.block_on(supervise(config, policy, listeners))
}

async fn supervise(config: &Config, policy: Arc<ActivePolicy>, listeners: Vec<Listeners>) -> Result<(), StartError> {
    let counters = Arc::new(Background::default());
    let cluster_access = open_access(&policy.snapshot().cluster, counters.clone()).await?;
    let access = cluster_access.servers.clone();
    let (_discovery, view, refresh) = Discovery::start(&policy.snapshot().cluster, cluster_access, counters)?;
    let (_policies, policy) = watch::channel(policy);
    let (stages, stage) = watch::channel(Stage::Serving);
    let feeds = Feeds { policy, view, stage, access, refresh, origins: Handle::current() };
    let mut threads = Vec::new();
    for (index, listeners) in listeners.into_iter().enumerate() {
        let feeds = feeds.clone();
        threads.push(std::thread::Builder::new().name(format!("worker-{index}")).spawn(move || serve(feeds, listeners))?);
    }
    stop_signal().await?;
    tracing::info!("draining");
    stages.send_replace(Stage::Draining);
    let finished = tokio::task::spawn_blocking(move || threads.into_iter().for_each(|thread| drop(thread.join())));
    if tokio::time::timeout(config.drain, finished).await.is_err() {
        stages.send_replace(Stage::Over);
    }
    if let Some(path) = &config.socket {
        let _ = std::fs::remove_file(path);
    }
    Ok(())
}

fn read_snapshot(path: &Path) -> Result<Snapshot, StartError> {
    let json = std::fs::read(path).map_err(|source| StartError::Read { path: path.to_owned(), source })?;
    Snapshot::parse(&json).map_err(|source| StartError::Snapshot { path: path.to_owned(), source })
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
        let tcp = config.listen.map(|address| {
            listen_tcp(address, config.workers > 1).map_err(|source| StartError::Listen { address: address.to_string(), source })
        });
        let unix =
            config.socket.as_ref().filter(|_| index == 0).map(|path| {
                listen_unix(path).map_err(|source| StartError::Listen { address: path.display().to_string(), source })
            });
        Ok(Self { tcp: tcp.transpose()?, unix: unix.transpose()? })
    }
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

fn listen_unix(path: &Path) -> io::Result<std::os::unix::net::UnixListener> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let listener = std::os::unix::net::UnixListener::bind(path)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o660))?;
    listener.set_nonblocking(true)?;
    Ok(listener)
}

/// A worker's thread.
fn serve(feeds: Feeds, listeners: Listeners) {
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return tracing::error!(%error, "cannot start a worker"),
    };
    let local = LocalSet::new();
    runtime.block_on(local.run_until(work(feeds, listeners)));
}

struct FromBackground(Refresh);

impl Outside for FromBackground {
    fn refresh_topology(&self) {
        self.0.request();
    }
}

async fn work(feeds: Feeds, listeners: Listeners) {
    let Feeds { mut policy, mut view, mut stage, access, refresh, origins } = feeds;
    let active = Rc::new(ActivePolicy::clone(&policy.borrow_and_update()));
    let worker = Worker::new(active, access, Arc::new(FromBackground(refresh)), origins, Meter::default());
    worker.router().adopt(&worker, &view.borrow_and_update().clone());
    tokio::task::spawn_local(worker.clone().tick_forever());
    let accepting = [accept_tcp(&worker, listeners.tcp), accept_unix(&worker, listeners.unix)];
    loop {
        tokio::select! {
            Ok(()) = policy.changed() => worker.set_policy(Rc::new(ActivePolicy::clone(&policy.borrow_and_update()))),
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

fn accept_tcp(worker: &Rc<Worker>, listener: Option<std::net::TcpListener>) -> Accepting {
    let listener = TcpListener::from_std(listener?).ok()?;
    let worker = worker.clone();
    Some(tokio::task::spawn_local(async move {
        loop {
            match listener.accept().await {
                Ok((stream, _)) => {
                    let _ = stream.set_nodelay(true);
                    admit(&worker, split_tcp(stream));
                }
                Err(error) => pause_accepting(&error).await,
            }
        }
    }))
}

fn accept_unix(worker: &Rc<Worker>, listener: Option<std::os::unix::net::UnixListener>) -> Accepting {
    let listener = UnixListener::from_std(listener?).ok()?;
    let worker = worker.clone();
    Some(tokio::task::spawn_local(async move {
        loop {
            match listener.accept().await {
                Ok((stream, _)) => admit(&worker, split_unix(stream)),
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

fn admit(worker: &Rc<Worker>, (reader, writer): (ClientReader, ClientWriter)) {
    static NEXT_ID: AtomicU64 = AtomicU64::new(1);
    if worker.clients() >= MOST_CLIENTS {
        let _ = writer.try_write(b"-ERR max number of clients reached\r\n");
        return;
    }
    let session = Session::new(worker.clone(), NEXT_ID.fetch_add(1, Ordering::Relaxed), writer);
    let place = worker.register(&session);
    let worker = worker.clone();
    tokio::task::spawn_local(async move {
        Reader::new(session, reader).serve().await;
        worker.unregister(place);
    });
}
