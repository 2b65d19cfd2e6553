//! The server's process: started so that it never outlives the agent, reaped with all that it leaves behind.

use std::io;
use std::os::unix::process::{CommandExt as _, ExitStatusExt as _};
use std::path::Path;
use std::process::{Command, ExitStatus};

use rustix::io::Errno;
use rustix::process::{Pid, Signal, WaitOptions, kill_process};
use tokio::signal::unix::{Signal as Signals, SignalKind, signal};
use tracing::debug;

/// The command line of the server.
#[derive(Debug, Clone)]
pub struct Program {
    /// The program, and what precedes the agent's own arguments.
    pub words: Vec<String>,
}

/// Every child of this process, also those that the server leaves behind when it is killed: as a container's first process, the
/// agent inherits them.
#[derive(Debug)]
pub struct Children {
    signals: Signals,
}

/// A running server.
#[derive(Debug)]
pub struct Server {
    pid: Pid,
}

impl Children {
    /// Listens for ends of children. Once a process.
    pub fn listen() -> io::Result<Self> {
        adopt_orphans();
        Ok(Self { signals: signal(SignalKind::child())? })
    }

    /// Starts the server with further arguments. They are visible to everyone and carry no secrets.
    pub fn start(&self, program: &Program, arguments: &[String]) -> io::Result<Server> {
        let own = std::env::current_exe()?;
        let parent = std::process::id().to_string();
        let mut command = Command::new(own);
        command.args(["agent", "become", "--parent", &parent, "--"]).args(&program.words).args(arguments);
        let child = command.process_group(0).spawn()?;
        let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw).ok_or(io::ErrorKind::InvalidData)?;
        Ok(Server { pid })
    }

    /// Waits for the server's end, and clears away every other child that ended meanwhile. Cancel-safe.
    pub async fn ended(&mut self, server: &Server) -> ExitStatus {
        loop {
            if let Some(status) = reap(server.pid) {
                return status;
            }
            if self.signals.recv().await.is_none() {
                std::future::pending::<()>().await;
            }
        }
    }
}

impl Server {
    /// Asks it to end.
    pub fn terminate(&self) {
        let _ = kill_process(self.pid, Signal::TERM);
    }

    /// Ends it.
    pub fn kill(&self) {
        let _ = kill_process(self.pid, Signal::KILL);
    }
}

/// The status of `wanted`, if it has ended.
fn reap(wanted: Pid) -> Option<ExitStatus> {
    let mut found = None;
    loop {
        match rustix::process::wait(WaitOptions::NOHANG) {
            Ok(Some((pid, status))) if pid == wanted => found = Some(ExitStatus::from_raw(status.as_raw())),
            Ok(Some((pid, _))) => debug!(pid = pid.as_raw_nonzero().get(), "an orphan has ended"),
            Err(Errno::INTR) => {}
            Ok(None) | Err(_) => return found,
        }
    }
}

#[cfg(target_os = "linux")]
fn adopt_orphans() {
    // Where the agent is not the first process: so that what the server leaves behind is reaped all the same.
    let _ = rustix::process::set_child_subreaper(Some(rustix::process::getpid()));
}

#[cfg(not(target_os = "linux"))]
fn adopt_orphans() {}

/// Turns this process into the server, which the system ends together with `parent`. Returns only where that fails.
pub fn become_server(parent: u32, program: &Path, arguments: &[String]) -> io::Error {
    #[cfg(target_os = "linux")]
    {
        if let Err(error) = rustix::process::set_parent_process_death_signal(Some(Signal::KILL)) {
            return error.into();
        }
        // It may have ended before the system knew.
        let actual = rustix::process::getppid().map(|pid| pid.as_raw_nonzero().get().unsigned_abs());
        if actual != Some(parent) {
            return io::Error::other("the agent has ended");
        }
    }
    #[cfg(not(target_os = "linux"))]
    let _ = parent;
    Command::new(program).args(arguments).exec()
}
