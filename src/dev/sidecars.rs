//! The sidecars, as processes: as many as pods would have.

use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use super::DevError;
use super::ports::Reservation;
use super::process::{Process, Watchdog, bound_log, last_lines};
use super::restart::Restarts;
use super::run_dir::{admin_socket, fits_socket};
use super::servers::Ended;
use crate::operator::admin::{Admin, Entry};

/// Where one sidecar is reached.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Endpoint {
    /// Where it speaks RESP.
    pub listen: SocketAddr,
    /// The Unix socket where it does too.
    pub socket: Option<PathBuf>,
    /// Where its metrics and health are.
    pub admin: SocketAddr,
}

#[derive(Debug)]
struct Sidecar {
    endpoint: Endpoint,
    reserved: Vec<Reservation>,
    process: Option<Process>,
    restarts: Restarts,
    log: PathBuf,
    /// Where the owner of the run asks it.
    private: Option<PathBuf>,
}

/// All sidecars of a run.
#[derive(Debug)]
pub struct Sidecars {
    program: PathBuf,
    snapshot: PathBuf,
    log_options: Vec<String>,
    sidecars: Vec<Sidecar>,
}

/// Where sidecars are to be: the first at these addresses, each further one a port higher.
#[derive(Debug, Clone)]
pub struct SidecarPlaces<'a> {
    /// How many.
    pub count: u16,
    /// RESP.
    pub listen: SocketAddr,
    /// The Unix socket; further sidecars append `.1`, `.2` and so on.
    pub socket: Option<&'a Path>,
    /// Metrics and health.
    pub admin: SocketAddr,
    /// The directory of their logs; `None`: the run's.
    pub logs: Option<&'a Path>,
    /// What they are told of logging: options of the command line.
    pub log_options: &'a [String],
}

impl Sidecars {
    /// Reserves their ports; starts nothing.
    pub fn place(program: PathBuf, run_dir: &Path, places: &SidecarPlaces<'_>) -> Result<Self, DevError> {
        let mut sidecars = Vec::new();
        for index in 0..places.count {
            let listen = reserve(places.listen, index, "--listen")?;
            let admin = reserve(places.admin, index, "--admin")?;
            let unknown = |source| DevError::Start { what: format!("sidecar {index}"), source };
            let endpoint = Endpoint {
                listen: listen.address().map_err(unknown)?,
                socket: places.socket.map(|path| numbered(path, index)),
                admin: admin.address().map_err(unknown)?,
            };
            let log = places.logs.unwrap_or(run_dir).join(format!("sidecar-{index}.log"));
            let private = Some(admin_socket(run_dir, index)).filter(|path| fits_socket(path));
            let reserved = vec![listen, admin];
            sidecars.push(Sidecar { endpoint, reserved, process: None, restarts: Restarts::default(), log, private });
        }
        let log_options = places.log_options.to_vec();
        Ok(Self { program, snapshot: run_dir.join("snapshot.json"), log_options, sidecars })
    }

    /// Where they are.
    pub fn endpoints(&self) -> impl Iterator<Item = &Endpoint> {
        self.sidecars.iter().map(|sidecar| &sidecar.endpoint)
    }

    /// Starts those that do not run and may.
    pub async fn start(&mut self, watchdog: &mut Watchdog) -> Result<(), DevError> {
        let count = self.sidecars.len();
        for (index, sidecar) in self.sidecars.iter_mut().enumerate() {
            if sidecar.process.is_some() || !sidecar.restarts.may_start() {
                continue;
            }
            sidecar.reserved.clear();
            sidecar.restarts.started();
            let mut arguments = arguments(&self.snapshot, &sidecar.endpoint, sidecar.private.as_deref());
            arguments.extend(["--sidecars".to_owned(), count.to_string()]);
            arguments.extend_from_slice(&self.log_options);
            let started = Process::start(watchdog, &self.program, &arguments, &sidecar.log).await;
            sidecar.process = Some(started.map_err(|source| DevError::Start { what: format!("sidecar {index}"), source })?);
        }
        Ok(())
    }

    /// Notices those that have ended.
    pub async fn reap(&mut self, watchdog: &mut Watchdog) -> Vec<Ended> {
        let mut all = Vec::new();
        for (index, sidecar) in self.sidecars.iter_mut().enumerate() {
            bound_log(&sidecar.log);
            let Some(status) = sidecar.process.as_mut().and_then(Process::ended) else { continue };
            if let Some(process) = sidecar.process.take() {
                process.clear(watchdog).await;
            }
            sidecar.restarts.ended();
            all.push(Ended {
                name: format!("sidecar {index}"),
                how: status.to_string(),
                said: last_lines(&sidecar.log, 3),
                hopeless: sidecar.restarts.failed_starts() >= 3,
            });
        }
        all
    }

    /// The first that does not answer commands yet, which every shard must answer.
    pub async fn first_unready(&mut self) -> Option<&Endpoint> {
        for sidecar in &mut self.sidecars {
            let answers = async {
                let mut admin = Admin::connect(sidecar.endpoint.listen, Entry::default()).await.ok()?;
                let _: String = admin.ask("PING", &[]).await.ok()?;
                admin.ask::<u64>("DBSIZE", &[]).await.ok()
            };
            if sidecar.process.is_none() || answers.await.is_none() {
                return Some(&sidecar.endpoint);
            }
            sidecar.restarts.answered();
        }
        None
    }

    /// Ends all of them.
    pub async fn stop(&mut self, watchdog: &mut Watchdog) {
        self.sidecars.iter().filter_map(|sidecar| sidecar.process.as_ref()).for_each(Process::terminate);
        for sidecar in &mut self.sidecars {
            if let Some(process) = sidecar.process.take() {
                process.stop(watchdog).await;
            }
            [&sidecar.endpoint.socket, &sidecar.private].into_iter().flatten().for_each(|socket| remove_socket(socket));
        }
    }
}

fn arguments(snapshot: &Path, endpoint: &Endpoint, private: Option<&Path>) -> Vec<String> {
    let text = |path: &Path| path.to_string_lossy().into_owned();
    let mut arguments = vec!["sidecar".to_owned(), "--snapshot".to_owned(), text(snapshot)];
    arguments.extend(["--listen".to_owned(), endpoint.listen.to_string()]);
    arguments.extend(["--admin".to_owned(), endpoint.admin.to_string()]);
    // Nobody waits long for a machine's own clients; it must be over before SIGKILL.
    arguments.extend(["--drain".to_owned(), "2s".to_owned()]);
    if let Some(socket) = &endpoint.socket {
        arguments.extend(["--socket".to_owned(), text(socket)]);
    }
    if let Some(socket) = private {
        arguments.extend(["--admin-socket".to_owned(), text(socket)]);
    }
    arguments
}

fn reserve(first: SocketAddr, index: u16, option: &'static str) -> Result<Reservation, DevError> {
    let taken = |address: SocketAddr, source| DevError::ListenTaken { address, option, source };
    let mut address = first;
    if first.port() != 0 {
        let port = first.port().checked_add(index).ok_or_else(|| taken(first, io::ErrorKind::AddrNotAvailable.into()))?;
        address.set_port(port);
    }
    Reservation::at_or_any(address).map_err(|source| taken(address, source))
}

fn numbered(path: &Path, index: u16) -> PathBuf {
    if index == 0 {
        return path.to_owned();
    }
    let mut name = path.as_os_str().to_owned();
    name.push(format!(".{index}"));
    name.into()
}

/// A sidecar removes its socket; one that was killed could not.
fn remove_socket(path: &Path) {
    use std::os::unix::fs::FileTypeExt as _;
    if std::fs::symlink_metadata(path).is_ok_and(|metadata| metadata.file_type().is_socket()) {
        let _ = std::fs::remove_file(path);
    }
}
