//! The processes that the demo starts: a plain Redis server for the phase without Larder, and `larder dev` for the one with it.

use std::fmt;
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read as _, Write as _};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use serde::Serialize;

use super::Setting;
use super::client::Ttls;
use super::keyspace::Family;
use super::origin;
use super::records::{self, Follower};
use crate::dev::ports::Reservation;

/// How long a server may take to answer, and the tier to be ready.
const START_TIMEOUT: Duration = Duration::from_secs(60);
/// How long `larder dev` may take to stop everything that it started.
const STOP_TIMEOUT: Duration = Duration::from_secs(20);
/// How long a sidecar may take to tell its metrics.
const METRICS_TIMEOUT: Duration = Duration::from_secs(10);
/// The longest answer with metrics that is read.
const MAX_METRICS_BYTES: u64 = 4 << 20;

/// Why a process could not be used.
#[derive(Debug, thiserror::Error)]
pub enum ProcessError {
    /// It could not be started.
    #[error("{program} does not start: {why}")]
    Start {
        /// What was to be run.
        program: String,
        /// What the system said.
        why: io::Error,
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
    /// A sidecar does not tell its metrics.
    #[error("the metrics of the sidecar at {admin} cannot be read: {why}")]
    Metrics {
        /// Where they were asked for.
        admin: String,
        /// What went wrong.
        why: io::Error,
    },
    /// A file that it needs could not be written.
    #[error("{} cannot be written: {why}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What the system said.
        why: io::Error,
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

fn file_error(path: &Path) -> impl FnOnce(io::Error) -> ProcessError {
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
        let log = logs.join("plain-redis.log");
        let output = File::create(&log).map_err(file_error(&log))?;
        let reserved = Reservation::any().map_err(start_error)?;
        let port = reserved.address().map_err(start_error)?.port();
        drop(reserved);
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
    /// The records of their queries.
    pub records: Follower,
    admins: Vec<String>,
    _process: Stopping,
}

impl Tier {
    /// Runs `larder dev` on `manifests`, with the logs in the report's directory, and waits for its `ready:` lines.
    ///
    /// # Errors
    /// Where it does not start, or not all sidecars become ready.
    pub fn start(setting: &Setting, manifests: &Path) -> Result<Self, ProcessError> {
        const PROGRAM: &str = "larder dev";
        // It keeps what it finds until its sidecars listen; a port that was free a moment ago may be somebody's by then.
        const ANY_PORT: &str = "127.0.0.1:0";
        let (sidecars, logs) = (setting.config.sidecars, &setting.config.report);
        let start_error = |why| ProcessError::Start { program: PROGRAM.to_owned(), why };
        let sidecar_logs: Vec<_> = (0..sidecars).map(|index| logs.join(format!("sidecar-{index}.log"))).collect();
        for log in &sidecar_logs {
            // Sidecars append, and an earlier run or phase may have used it.
            File::create(log).map_err(file_error(log))?;
        }
        let log = logs.join("larder-dev.log");
        let stderr = File::create(&log).map_err(file_error(&log))?;
        let mut command = Command::new(&setting.config.larder);
        command.arg("dev").arg("-f").arg(manifests).arg("--sidecar-logs").arg(logs);
        command.args(["--listen", ANY_PORT, "--admin", ANY_PORT]);
        command.args(["--sidecars", &sidecars.to_string(), "--log", &records::filter(), "--log-format", "json"]);
        if let Some(server) = &setting.config.server {
            command.arg("--server-bin").arg(server);
        }
        let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(stderr).spawn().map_err(start_error)?;
        let stdout = child.stdout.take();
        let process = Stopping(child);
        let (ready, lines) = mpsc::sync_channel(64);
        // Lives as long as the child has its end of the pipe; reads on after the ready lines, so that the child never blocks.
        thread::spawn(move || {
            for line in stdout.into_iter().flat_map(|stdout| BufReader::new(stdout).lines()).map_while(Result::ok) {
                if let Some(place) = ready_place(&line) {
                    let _ = ready.try_send(place);
                }
            }
        });
        let deadline = Instant::now() + START_TIMEOUT;
        let (mut urls, mut admins) = (Vec::new(), Vec::new());
        while urls.len() < usize::from(sidecars) {
            let Ok((url, admin)) = lines.recv_timeout(deadline.saturating_duration_since(Instant::now())) else {
                return Err(not_ready(PROGRAM, log));
            };
            urls.push(url);
            admins.push(admin);
        }
        let records = Follower::start(setting.origin.recorder.clone(), sidecar_logs).map_err(start_error)?;
        Ok(Self { urls, records, admins, _process: process })
    }

    /// Every query that the sidecars have made, by their own counters.
    ///
    /// # Errors
    /// Where a sidecar does not answer.
    pub fn counted(&self) -> Result<u64, ProcessError> {
        Ok(self.metrics()?.iter().map(|metrics| sum_of("larder_origin_queries_total", metrics)).sum())
    }

    /// What the sidecars say of their rules.
    ///
    /// # Errors
    /// Where a sidecar does not answer.
    pub fn told(&self) -> Result<Told, ProcessError> {
        let scrapes = self.metrics()?;
        let sum = |family: &str| scrapes.iter().map(|metrics| sum_of(family, metrics)).sum();
        let stampede = scrapes.iter().flat_map(|metrics| values_of("larder_rule_predicted_stampede", metrics)).max();
        Ok(Told {
            loads_saved: sum("larder_rule_loads_saved_total"),
            predicted_loads_saved: sum("larder_rule_predicted_loads_saved_total"),
            predicted_stampede: stampede.unwrap_or_default(),
            predicted_ambiguous_fills: sum("larder_rule_predicted_ambiguous_fills_total"),
            predicted_ttl_added: sum("larder_rule_predicted_ttl_added_total"),
        })
    }

    fn metrics(&self) -> Result<Vec<String>, ProcessError> {
        let one = |admin: &String| metrics(admin).map_err(|why| ProcessError::Metrics { admin: admin.clone(), why });
        self.admins.iter().map(one).collect()
    }
}

/// What all sidecars together say in their metrics since they began. Predictions are those of a policy that only observes, each
/// sidecar's of its own clients.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Told {
    /// Reads that missed and were answered without a load of their own.
    pub loads_saved: u64,
    /// Likewise, if the policy were enforced.
    pub predicted_loads_saved: u64,
    /// The most identical misses that were under way at once in one sidecar.
    pub predicted_stampede: u64,
    /// Values that could not have been told from outdated ones.
    pub predicted_ambiguous_fills: u64,
    /// Keys that would have been given a TTL.
    pub predicted_ttl_added: u64,
}

/// Everything that the sidecar at this admin address counts.
fn metrics(admin: &str) -> io::Result<String> {
    let mut stream = TcpStream::connect(admin)?;
    stream.set_read_timeout(Some(METRICS_TIMEOUT))?;
    stream.set_write_timeout(Some(METRICS_TIMEOUT))?;
    stream.write_all(format!("GET /metrics HTTP/1.1\r\nHost: {admin}\r\nConnection: close\r\n\r\n").as_bytes())?;
    let mut answer = String::new();
    stream.take(MAX_METRICS_BYTES).read_to_string(&mut answer)?;
    let whole = answer.starts_with("HTTP/1.1 200") && answer.ends_with("# EOF\n");
    if whole { Ok(answer) } else { Err(io::Error::other("the answer is no whole scrape")) }
}

/// The sum over all labels.
fn sum_of(family: &str, metrics: &str) -> u64 {
    values_of(family, metrics).sum()
}

fn values_of<'a>(family: &'a str, metrics: &'a str) -> impl Iterator<Item = u64> + 'a {
    let lines = metrics.lines().filter_map(move |line| line.strip_prefix(family)?.strip_prefix('{')?.rsplit_once(' '));
    lines.filter_map(|(_, number)| number.parse().ok())
}

/// The URL and the admin address of a `ready:` line.
fn ready_place(line: &str) -> Option<(String, String)> {
    let mut words = line.strip_prefix("ready:")?.split_whitespace();
    let url = words.next().filter(|url| url.starts_with("redis://"))?;
    let admin = words.find_map(|word| word.strip_prefix("http://"))?;
    Some((url.to_owned(), admin.to_owned()))
}

/// What the sidecars do for the keys.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rules {
    /// They load what is missing.
    ReadThrough,
    /// They let one of many clients load what is missing.
    CacheAside,
    /// They do nothing, and count what [`Rules::CacheAside`] would do.
    Observe,
}

impl Rules {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::ReadThrough, Self::CacheAside, Self::Observe];
}

impl fmt::Display for Rules {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::ReadThrough => "read-through",
            Self::CacheAside => "cache-aside",
            Self::Observe => "observe",
        })
    }
}

/// What the manifests depend on.
#[derive(Debug, Clone, Copy)]
pub struct Manifests<'a> {
    /// What the sidecars do.
    pub rules: Rules,
    /// How many share the connections.
    pub sidecars: u16,
    /// How long values live.
    pub ttls: Ttls,
    /// Where the database is; may hold a password.
    pub url: &'a str,
    /// What stands before the names of its tables.
    pub schema: &'a str,
}

impl<'a> Manifests<'a> {
    /// Those of this run.
    pub fn of(rules: Rules, setting: &'a Setting) -> Self {
        let database = setting.origin.database();
        let (url, schema) = (database.url(), database.schema());
        Self { rules, sidecars: setting.config.sidecars, ttls: setting.config.ttls, url, schema }
    }

    /// Writes a tier and a policy into `dir`.
    ///
    /// # Errors
    /// Where the file cannot be written.
    pub fn write(&self, dir: &Path) -> Result<(), ProcessError> {
        std::fs::create_dir_all(dir).map_err(file_error(dir))?;
        let file = dir.join("flights.yaml");
        let secret = match self.rules {
            Rules::ReadThrough => self.secret(),
            Rules::CacheAside | Rules::Observe => String::new(),
        };
        let text = [TIER.to_owned(), self.policy(), secret].join("---\n");
        std::fs::write(&file, text).map_err(file_error(&file))
    }

    fn policy(&self) -> String {
        let origins = match self.rules {
            Rules::ReadThrough => self.origins(),
            Rules::CacheAside | Rules::Observe => String::new(),
        };
        let mode = match self.rules {
            Rules::ReadThrough | Rules::CacheAside => "Enforce",
            Rules::Observe => "Observe",
        };
        let rules = Family::ALL.map(|family| self.rule(family)).concat();
        format!(
            r#"apiVersion: larder.dev/v1alpha1
kind: CachePolicy
metadata: {{name: flights}}
spec:
  cacheCluster: demo
  workloads: {{matchLabels: {{app: demo}}}}
  mode: {mode}
{origins}  rules:
{rules}"#
        )
    }

    fn origins(&self) -> String {
        let connections = (origin::CONNECTIONS / u32::from(self.sidecars.max(1))).max(1);
        format!(
            r#"  origins:
    - name: {name}
      sql: {{url: {{secretKeyRef: {{name: {name}, key: url}}}}, maxConnections: {connections}, timeout: 5s}}
"#,
            name = origin::NAME
        )
    }

    /// The TTL is exact, as that of an application which sets it itself.
    fn rule(&self, family: Family) -> String {
        let (name, keys, ttl) = (family.name(), family.pattern_text(), self.ttls.of(family).as_millis());
        let strategy = match self.rules {
            Rules::ReadThrough => {
                // A JSON string is a YAML one.
                let read = serde_json::Value::from(family.sql(self.schema));
                format!("ReadThrough\n      origin: {{name: {}, read: {read}}}", origin::NAME)
            }
            Rules::CacheAside | Rules::Observe => "CacheAside".to_owned(),
        };
        format!(
            r#"    - name: {name}
      keys: "{keys}"
      ttl: {ttl}ms
      jitter: 0%
      stampede: {{lease: 6s, wait: 5s}}
      strategy: {strategy}
"#
        )
    }

    /// The database's URL.
    fn secret(&self) -> String {
        let url = serde_json::Value::from(self.url);
        format!("apiVersion: v1\nkind: Secret\nmetadata: {{name: {}}}\nstringData: {{url: {url}}}\n", origin::NAME)
    }
}

const TIER: &str = r#"apiVersion: larder.dev/v1alpha1
kind: CacheCluster
metadata: {name: demo}
spec:
  engine: {kind: Redis, version: "7.0"}
  mode: Sentinel
  replicas: 1
  sentinels: 3
  memory: 256Mi
"#;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dev::manifests::Loaded;
    use crate::dev::run_dir::RunDir;
    use crate::policy::snapshot::Topology;

    #[test]
    fn a_ready_line_names_a_url_and_an_admin_address() {
        let place = ("redis://127.0.0.1:6379".to_owned(), "127.0.0.1:9121".to_owned());
        assert_eq!(ready_place("ready: redis://127.0.0.1:6379 unix:///s admin http://127.0.0.1:9121"), Some(place));
        assert_eq!(ready_place("starting"), None);
    }

    #[test]
    fn larder_dev_takes_the_manifests() {
        for (rules, url, schema) in Rules::ALL.into_iter().flat_map(|rules| {
            [(rules, "sqlite:///tmp/flights.db", ""), (rules, "postgres://user:pass@127.0.0.1/flights", "larder_demo.")]
        }) {
            let dir = tempfile::tempdir().expect("a directory");
            let (second, minute) = (Duration::from_secs(1), Duration::from_secs(60));
            let ttls = Ttls { board: second, flight: minute };
            Manifests { rules, sidecars: 2, ttls, url, schema }.write(dir.path()).expect("writes");
            let loaded = Loaded::read(&[dir.path().to_owned()]).expect("no error");
            let run_dir = RunDir::open(Some(&dir.path().join("run"))).expect("a directory");
            let topology = Topology::Sentinel { master: "demo".to_owned(), sentinels: vec!["127.0.0.1:1".to_owned()] };
            let snapshot = loaded.compile(&run_dir, 1, topology).expect("accepted");
            assert_eq!(snapshot.rules.len(), Family::ALL.len());
        }
    }

    #[test]
    fn counters_are_summed_over_their_labels() {
        let metrics = "# TYPE larder_origin_queries counter\nlarder_origin_queries_total{origin=\"a b\"} 3\n\
                       larder_origin_queries_total{origin=\"c\"} 4\nlarder_origin_queries_totals{origin=\"d\"} 9\n";
        assert_eq!(sum_of("larder_origin_queries_total", metrics), 7);
    }
}
