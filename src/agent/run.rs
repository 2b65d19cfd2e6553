//! The process: its parts put together, and its end.

use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tracing::{error, info};

use super::board::Board;
use super::charge::{Charge, ChargeError};
use super::child::{Children, Program};
use super::cluster_memory::ClusterMemory;
use super::disk::Disk;
use super::endpoints;
use super::handover::Handovers;
use super::line::Line;
use super::node_table::NodeTable;
use super::peers::PeerClient;
use super::supervisor::Supervisor;
use super::upkeep::Upkeep;
use crate::policy::agent::{MAX_BYTES, ServedTls};
use crate::sidecar::access_files::open_access;
use crate::sidecar::admin::{AdminError, AdminListeners};
use crate::sidecar::files::WatchedFiles;
use crate::sidecar::served_tls::open_served;
use crate::sidecar::signals::stop_on_signals;
use crate::telemetry::background::Background;

/// How long requests under way are waited for at the end.
const LAST_REQUESTS: Duration = Duration::from_secs(2);

/// What an agent is started with.
#[derive(Debug)]
pub struct Config {
    /// The configuration's file.
    pub file: PathBuf,
    /// Where health, metrics and the state are served.
    pub listen: SocketAddr,
    /// Where handovers are asked for.
    pub socket: PathBuf,
    /// The server's command line.
    pub program: Program,
}

/// Why an agent does not start, or ends.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    /// Its configuration, or what it names, cannot come into force.
    #[error("{}: {source}", path.display())]
    Charge {
        /// Where it is.
        path: PathBuf,
        /// Why.
        source: ChargeError,
    },
    /// It cannot listen.
    #[error(transparent)]
    Listen(#[from] AdminError),
    /// The server's program, or its directory, cannot be used.
    #[error("the server cannot be started: {0}")]
    Server(io::Error),
    /// The system refuses a runtime or a signal.
    #[error("cannot start: {0}")]
    Io(io::Error),
}

/// Runs until the process is told to end. The server has ended by then.
pub fn run(config: Config) -> Result<(), AgentError> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(AgentError::Io)?;
    runtime.block_on(run_on(config))
}

async fn run_on(config: Config) -> Result<(), AgentError> {
    let Config { file, listen, socket, program } = config;
    let at = |source: ChargeError| AgentError::Charge { path: file.clone(), source };
    let stop = stop_on_signals().map_err(AgentError::Io)?;
    let children = Children::listen().map_err(AgentError::Io)?;
    let mut files = WatchedFiles::open(vec![file.clone()], MAX_BYTES).await.map_err(|error| at(error.into()))?;
    let first = Arc::new(read(&mut files).map_err(at)?);
    let access = open_access(&first.keys(), Arc::new(Background::default())).await.map_err(|error| at(error.into()))?;
    let server = &first.config.server;
    let mut disk = Disk::new(Path::new(&server.directory), server.durable);
    let memory = ClusterMemory::of(&first);
    let remembered = memory.as_ref().and_then(ClusterMemory::read);
    let owns_nothing = remembered.as_ref().is_some_and(NodeTable::is_blank);
    let brought = disk.inspect(owns_nothing).map_err(AgentError::Server)?;
    let listeners = AdminListeners::open(Some(listen), Some(&socket))?;
    let secured = server.agent_tls.then(|| access.servers.clone());
    let http = PeerClient::new(secured).map_err(|error| AgentError::Io(io::Error::other(error)))?;
    let served = match server.serves.as_ref().filter(|_| server.agent_tls) {
        Some(ServedTls { cert_file, key_file, .. }) => {
            Some(open_served(cert_file.clone(), key_file.clone()).await.map_err(|error| at(error.into()))?)
        }
        None => None,
    };
    let board = Arc::new(Board::new(server.ordinal));
    board.update(|known| {
        known.report.data = brought;
        known.report.claim = remembered.and_then(|table| table.claim());
        known.report.address = Some(first.address.to_string());
    });
    let (charges, charge) = watch::channel(first.clone());
    let upkeep = Upkeep::open(charge.clone(), access.servers.clone()).await.map_err(at)?;
    let handovers = Handovers { charge: charge.clone(), access: access.clone(), one: tokio::sync::Mutex::default() };
    let (end, ended) = watch::channel(false);
    let serving = tokio::spawn(endpoints::serve(listeners, board.clone(), handovers, served, ended));
    let following = tokio::spawn(follow(files, charges, board.clone()));
    info!(%listen, server = %first.address, ordinal = server.ordinal, "the agent serves");
    let supervisor = Supervisor {
        charge,
        disk,
        memory,
        line: Line::new(first.dial.clone(), access.servers.clone()),
        access,
        http,
        board,
        children,
        program,
        upkeep,
        stop,
    };
    let outcome = supervisor.run().await.map_err(AgentError::Server);
    following.abort();
    end.send_replace(true);
    let _ = tokio::time::timeout(LAST_REQUESTS, serving).await;
    outcome
}

fn read(files: &mut WatchedFiles) -> Result<Charge, ChargeError> {
    Charge::parse(files.current().first().map_or(&[][..], |bytes| bytes))
}

/// Takes up each change of the configuration. A bad one is refused: the last good one stays.
async fn follow(mut files: WatchedFiles, charges: watch::Sender<Arc<Charge>>, board: Arc<Board>) {
    loop {
        files.changed().await;
        let before = charges.borrow().clone();
        let next = read(&mut files).and_then(|next| before.may_become(&next).map(|()| next));
        match next {
            Ok(next) => {
                info!(generation = next.config.generation, "a new configuration is in force");
                charges.send_replace(Arc::new(next));
            }
            Err(refusal) => {
                board.update(|known| known.counts.refusals += 1);
                error!(%refusal, "a new configuration is refused, the last good one stays in force");
            }
        }
    }
}
