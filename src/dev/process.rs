//! Child processes that never outlive this one, however it ends.
//!
//! A watchdog, a small shell script, knows the process groups of all children and ends them when its input closes: the system
//! closes it even after `kill -9`. A child is held back until the watchdog knows it, so that no moment is unguarded. (The other
//! way, a parent-death signal, exists on Linux only and follows the thread that forked, not the process.)

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process_group};
use tokio::io::AsyncWriteExt as _;
use tokio::process::{Child, ChildStdin, Command};
use tokio::time::timeout;

const WATCHDOG: &str = include_str!("watchdog.sh");
/// Becomes the program once a line has come.
const HOLD: &str = r#"read -r _ && exec "$@" </dev/null"#;
/// How long a child has between SIGTERM and SIGKILL.
pub const STOP_WITHIN: Duration = Duration::from_secs(5);
/// A log that grew beyond this is begun anew.
const MAX_LOG_BYTES: u64 = 16 << 20;

/// The process that outlives this one for a moment, to end the others.
#[derive(Debug)]
pub struct Watchdog {
    child: Child,
    orders: ChildStdin,
}

impl Watchdog {
    /// Starts it. It removes the directory `remove` as its last deed.
    pub fn start(remove: Option<&Path>) -> io::Result<Self> {
        let mut command = Command::new("sh");
        command.args(["-c", WATCHDOG, "larder-watchdog"]).args(remove);
        command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null()).process_group(0);
        let mut child = command.spawn()?;
        let orders = child.stdin.take().ok_or(io::ErrorKind::BrokenPipe)?;
        Ok(Self { child, orders })
    }

    async fn order(&mut self, verb: &str, group: Pid) -> io::Result<()> {
        self.orders.write_all(format!("{verb} {}\n", group.as_raw_nonzero()).as_bytes()).await
    }

    /// Lets it end what is left, and waits until it is gone.
    pub async fn stop(self) {
        let Self { mut child, orders } = self;
        drop(orders);
        let _ = timeout(STOP_WITHIN * 2, child.wait()).await;
    }
}

/// A child in a process group of its own. Dropping it kills it.
#[derive(Debug)]
pub struct Process {
    child: Child,
    group: Pid,
}

impl Process {
    /// Starts a program whose output is appended to `log`. Arguments are visible to everyone: they carry no secrets.
    pub async fn start(watchdog: &mut Watchdog, program: &Path, arguments: &[String], log: &Path) -> io::Result<Self> {
        let output = open_log(log)?;
        let mut command = Command::new("sh");
        command.args(["-c", HOLD, "larder-hold"]).arg(program).args(arguments);
        command.stdin(Stdio::piped()).stdout(output.try_clone()?).stderr(output).process_group(0).kill_on_drop(true);
        let mut child = command.spawn()?;
        let ended = || io::Error::other("the child ended before it was started");
        let mut hold = child.stdin.take().ok_or_else(ended)?;
        let group = child.id().and_then(|id| Pid::from_raw(i32::try_from(id).ok()?)).ok_or_else(ended)?;
        watchdog.order("guard", group).await?;
        hold.write_all(b"go\n").await?;
        Ok(Self { child, group })
    }

    /// Its process id.
    pub fn id(&self) -> i32 {
        self.group.as_raw_nonzero().get()
    }

    /// Whether it has ended, and how.
    pub fn ended(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().ok().flatten()
    }

    /// Clears up after a child that has ended: what it forked is ended too.
    pub async fn clear(self, watchdog: &mut Watchdog) {
        let _ = kill_process_group(self.group, Signal::KILL);
        // Without the watchdog nobody could act on a stale group anyway.
        let _ = watchdog.order("forget", self.group).await;
    }

    /// Asks it to end.
    pub fn terminate(&self) {
        let _ = kill_process_group(self.group, Signal::TERM);
    }

    /// Ends it: SIGTERM, and after [`STOP_WITHIN`] SIGKILL.
    pub async fn stop(mut self, watchdog: &mut Watchdog) {
        self.terminate();
        if timeout(STOP_WITHIN, self.child.wait()).await.is_err() {
            let _ = kill_process_group(self.group, Signal::KILL);
            let _ = timeout(STOP_WITHIN, self.child.wait()).await;
        }
        self.clear(watchdog).await;
    }
}

fn open_log(path: &Path) -> io::Result<File> {
    OpenOptions::new().create(true).append(true).mode(0o600).open(path)
}

/// Begins a log anew that has grown too large. Its writer appends, so it goes on at the beginning.
pub fn bound_log(path: &Path) {
    if let Ok(metadata) = std::fs::metadata(path)
        && metadata.len() > MAX_LOG_BYTES
        && let Ok(log) = OpenOptions::new().write(true).open(path)
    {
        let _ = log.set_len(0);
    }
}

/// The last lines of a log, for an error message.
pub fn last_lines(path: &Path, count: usize) -> String {
    let text = std::fs::read(path).unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    let lines: Vec<&str> = text.lines().filter(|line| !line.trim().is_empty()).collect();
    lines.get(lines.len().saturating_sub(count)..).unwrap_or_default().join("\n")
}
