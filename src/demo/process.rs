//! The processes that the demo starts: a plain Redis server for the phase without Larder, and `larder dev` for the one with it.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::net::{SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use super::client::Ttls;
use super::keyspace::Family;

/// How long a server may take to answer, and the tier to be ready.
const START_TIMEOUT: Duration = Duration::from_secs(60);
/// How long `larder dev` may take to stop everything that it started.
const STOP_TIMEOUT: Duration = Duration::from_secs(20);

/// Why a process could not be used.
#[derive(Debug, thiserror::Error)]
pub enum ProcessError {
    /// It could not be started.
    #[error("{program} does not start: {why}")]
    Start {
        /// What was to be run.
        program: String,
        /// What the system said.
        why: std::io::Error,
    },
    /// It ended, or was not ready in time.
    #[error("{program} ended, or was not ready within {START_TIMEOUT:?}; {} ends with: {said}", log.display())]
    NotReady {
        /// What was run.
        program: String,
        /// Where its output went.
        log: PathBuf,
        /// The last of it.
        said: String,
    },
    /// A file that it needs could not be written.
    #[error("{} cannot be written: {why}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What the system said.
        why: std::io::Error,
    },
}

/// A child that is asked to stop, and killed where it does not.
struct Stopping(Child);

impl Drop for Stopping {
    fn drop(&mut self) {
        // The standard library only knows SIGKILL, after which the servers of `larder dev` would live on.
        let asked = Command::new("sh").args(["-c", "kill -TERM \"$1\"", "sh", &self.0.id().to_string()]).status();
        let deadline = Instant::now() + STOP_TIMEOUT;
        while asked.as_ref().is_ok_and(|status| status.success()) && Instant::now() < deadline {
            if !matches!(self.0.try_wait(), Ok(None)) {
                return;
            }
            thread::sleep(Duration::from_millis(20));
        }
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// `count` consecutive ports that were free a moment ago.
fn free_ports(count: u16) -> std::io::Result<u16> {
    loop {
        let first = TcpListener::bind(("127.0.0.1", 0))?;
        let port = first.local_addr()?.port();
        let rest: Option<Vec<_>> =
            (1..count).map(|offset| TcpListener::bind(("127.0.0.1", port.checked_add(offset)?)).ok()).collect();
        if rest.is_some() {
            return Ok(port);
        }
    }
}

fn file_error(path: &Path) -> impl FnOnce(std::io::Error) -> ProcessError {
    move |why| ProcessError::File { path: path.to_owned(), why }
}

fn not_ready(program: &str, log: PathBuf) -> ProcessError {
    let text = std::fs::read_to_string(&log).unwrap_or_default();
    let lines: Vec<_> = text.lines().rev().take(3).collect();
    let said = lines.into_iter().rev().collect::<Vec<_>>().join(" / ");
    ProcessError::NotReady { program: program.to_owned(), log, said }
}

/// A Redis server without replicas, persistence or Larder.
pub struct PlainRedis {
    port: u16,
    _process: Stopping,
}

impl PlainRedis {
    /// Starts `program`, with its log in `logs`, and waits until it answers.
    ///
    /// # Errors
    /// Where it does not start or answer.
    pub fn start(program: &Path, logs: &Path) -> Result<Self, ProcessError> {
        let shown = program.display().to_string();
        let start_error = |why| ProcessError::Start { program: shown.clone(), why };
        let port = free_ports(1).map_err(start_error)?;
        let log = logs.join("plain-redis.log");
        let output = File::create(&log).map_err(file_error(&log))?;
        let child = Command::new(program)
            .args(["--port", &port.to_string(), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"])
            .stdin(Stdio::null())
            .stdout(output)
            .stderr(Stdio::null())
            .spawn()
            .map_err(start_error)?;
        let mut process = Stopping(child);
        let client = redis::Client::open(format!("redis://127.0.0.1:{port}/"));
        let deadline = Instant::now() + START_TIMEOUT;
        while Instant::now() < deadline && matches!(process.0.try_wait(), Ok(None)) {
            let pong = client.as_ref().ok().and_then(|client| client.get_connection_with_timeout(Duration::from_secs(1)).ok());
            if pong.is_some_and(|mut connection| redis::cmd("PING").query::<String>(&mut connection).is_ok()) {
                return Ok(Self { port, _process: process });
            }
            thread::sleep(Duration::from_millis(20));
        }
        Err(not_ready(&shown, log))
    }

    /// Its address as clients write it.
    pub fn url(&self) -> String {
        format!("redis://127.0.0.1:{}/", self.port)
    }
}

/// A tier under Sentinel with one replica, and sidecars in front of it.
pub struct Tier {
    /// Where the sidecars listen, as clients write it.
    pub urls: Vec<String>,
    _process: Stopping,
}

impl Tier {
    /// Runs `larder dev` on `manifests`, with its log in `logs`, and waits for its `ready:` lines.
    ///
    /// # Errors
    /// Where it does not start, or not all sidecars become ready.
    pub fn start(
        larder: &Path,
        manifests: &Path,
        logs: &Path,
        sidecars: u16,
        server: Option<&Path>,
    ) -> Result<Self, ProcessError> {
        const PROGRAM: &str = "larder dev";
        let start_error = |why| ProcessError::Start { program: PROGRAM.to_owned(), why };
        let listen = free_ports(sidecars).map_err(start_error)?;
        let admin = free_ports(sidecars).map_err(start_error)?;
        let log = logs.join("larder-dev.log");
        let stderr = File::create(&log).map_err(file_error(&log))?;
        let mut command = Command::new(larder);
        command.arg("dev").arg("-f").arg(manifests);
        command.args(["--listen", &format!("127.0.0.1:{listen}"), "--admin", &format!("127.0.0.1:{admin}")]);
        command.args(["--sidecars", &sidecars.to_string()]);
        if let Some(server) = server {
            command.arg("--server-bin").arg(server);
        }
        let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(stderr).spawn().map_err(start_error)?;
        let stdout = child.stdout.take();
        let process = Stopping(child);
        let (ready, lines) = mpsc::sync_channel(64);
        // Lives as long as the child has its end of the pipe; reads on after the ready lines, so that the child never blocks.
        thread::spawn(move || {
            for line in stdout.into_iter().flat_map(|stdout| BufReader::new(stdout).lines()).map_while(Result::ok) {
                if let Some(url) = ready_url(&line) {
                    let _ = ready.try_send(url);
                }
            }
        });
        let deadline = Instant::now() + START_TIMEOUT;
        let mut urls = Vec::new();
        while urls.len() < usize::from(sidecars) {
            match lines.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                Ok(url) => urls.push(url),
                Err(_) => return Err(not_ready(PROGRAM, log)),
            }
        }
        Ok(Self { urls, _process: process })
    }
}

fn ready_url(line: &str) -> Option<String> {
    let url = line.strip_prefix("ready:")?.split_whitespace().next()?;
    url.starts_with("redis://").then(|| url.to_owned())
}

/// Writes the manifests of the demo into `dir`: a tier, and the policy that makes GET load from the origin at `origin`.
///
/// # Errors
/// Where the file cannot be written.
pub fn write_manifests(dir: &Path, origin: SocketAddr, ttls: Ttls) -> Result<(), ProcessError> {
    std::fs::create_dir_all(dir).map_err(file_error(dir))?;
    let file = dir.join("flights.yaml");
    std::fs::write(&file, manifests(origin, ttls)).map_err(file_error(&file))
}

fn manifests(origin: SocketAddr, ttls: Ttls) -> String {
    let rules = Family::ALL.map(|family| {
        format!(
            r#"    - name: {name}
      keys: "{pattern}"
      strategy: ReadThrough
      ttl: {ttl}ms
      stampede: {{lease: 5s, wait: 5s}}
      origin: {{name: flights, path: "{path}"}}
"#,
            name = family.name(),
            pattern = family.pattern(),
            ttl = ttls.of(family).as_millis(),
            path = family.path(),
        )
    });
    format!(
        r#"apiVersion: larder.dev/v1alpha1
kind: CacheCluster
metadata: {{name: demo}}
spec:
  engine: {{kind: Redis, version: "7.0"}}
  mode: Sentinel
  replicas: 1
  sentinels: 3
  memory: 256Mi
---
apiVersion: larder.dev/v1alpha1
kind: CachePolicy
metadata: {{name: flights}}
spec:
  cacheCluster: demo
  workloads: {{matchLabels: {{app: demo}}}}
  origins:
    - name: flights
      http: {{url: {{value: "http://{origin}"}}, maxConnections: 4, timeout: 5s}}
  rules:
{}"#,
        rules.concat()
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ready_line_names_a_url() {
        assert_eq!(ready_url("ready: redis://127.0.0.1:6379 sidecar 1"), Some("redis://127.0.0.1:6379".to_owned()));
        assert_eq!(ready_url("starting"), None);
    }

    #[test]
    fn ports_are_consecutive_and_free() {
        let first = free_ports(3).expect("ports");
        for port in first..first + 3 {
            TcpListener::bind(("127.0.0.1", port)).expect("still free");
        }
    }
}
