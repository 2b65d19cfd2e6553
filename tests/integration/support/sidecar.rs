//! The sidecar under test as a process on loopback, killed when dropped.

use std::fs::File;
use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use serde_json::{Value as Json, json};
use tempfile::TempDir;

use super::resp::{Client, Value};
use super::server::{Engine, PRIMARY_NAME, RedisCluster, SentinelCluster, free_port};
use super::wait_for;

/// How long a sidecar may take to answer its first PING that reaches a server.
const START_LIMIT: Duration = Duration::from_secs(60);

/// One `larderd sidecar`.
pub struct Sidecar {
    port: u16,
    admin: u16,
    child: Child,
    directory: TempDir,
}

/// `snapshot.cluster` for servers that `sentinels` watch.
pub fn sentinel_topology(servers: &SentinelCluster) -> Json {
    json!({"name": "main", "topology": {"sentinel": {"master": PRIMARY_NAME, "sentinels": servers.addresses()}}})
}

/// `snapshot.cluster` for the nodes of a Cluster.
pub fn cluster_topology(servers: &RedisCluster) -> Json {
    json!({"name": "main", "topology": {"cluster": {"seeds": servers.addresses()}}})
}

/// A snapshot without rules: all keys pass untouched.
pub fn bypass(cluster: Json) -> Json {
    json!({"version": 1, "requires": 1, "generation": 1, "cluster": cluster, "unmatched": {"bypass": {}}})
}

impl Sidecar {
    /// Starts a sidecar under `snapshot`, and waits until commands pass through it to every shard.
    pub fn start(snapshot: &Json) -> Self {
        Self::start_with(snapshot, &[])
    }

    /// [`Sidecar::start`] with more arguments, such as `["--workers", "2"]`.
    pub fn start_with(snapshot: &Json, arguments: &[&str]) -> Self {
        Self::start_in(snapshot, arguments, &[])
    }

    /// [`Sidecar::start_with`] with variables of the environment, such as `[("TMPDIR", "/tmp")]`.
    pub fn start_in(snapshot: &Json, arguments: &[&str], environment: &[(&str, &str)]) -> Self {
        Self::start_until(Some(snapshot), arguments, environment, |port, _| {
            let reply = Client::connect(port).and_then(|mut client| client.try_call(&["DBSIZE"]));
            matches!(reply, Ok(Value::Int(_)))
        })
    }

    /// Starts a sidecar under `snapshot`, whose servers may not exist, and waits until it is alive.
    pub fn start_alone(snapshot: &Json) -> Self {
        Self::start_before(Some(snapshot), &[])
    }

    /// [`Sidecar::start_alone`] with more arguments, where the snapshot may come later.
    pub fn start_before(snapshot: Option<&Json>, arguments: &[&str]) -> Self {
        Self::start_until(snapshot, arguments, &[], |port, admin| {
            // The admin port opens last.
            [port, admin].into_iter().all(|port| TcpStream::connect(("127.0.0.1", port)).is_ok())
        })
    }

    /// Starts a sidecar and waits until `ready` holds for its port and its admin port.
    fn start_until(
        snapshot: Option<&Json>,
        arguments: &[&str],
        environment: &[(&str, &str)],
        ready: fn(u16, u16) -> bool,
    ) -> Self {
        let directory = TempDir::new().expect("a temporary directory");
        if let Some(snapshot) = snapshot {
            std::fs::write(directory.path().join("snapshot.json"), snapshot.to_string()).expect("the directory is writable");
        }
        for _ in 0..10 {
            let (port, admin) = (free_port(), free_port());
            let mut child = spawn(&directory, port, admin, arguments, environment);
            if comes_up(&mut child, || ready(port, admin)) {
                return Self { port, admin, child, directory };
            }
            let _ = child.kill();
            let _ = child.wait();
        }
        panic!("the sidecar does not start: {}", read_log(&directory));
    }

    pub fn port(&self) -> u16 {
        self.port
    }

    /// Where `--admin` listens.
    pub fn admin_port(&self) -> u16 {
        self.admin
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// A new connection.
    pub fn client(&self) -> Client {
        Client::connect(self.port).expect("the sidecar accepts")
    }

    /// The snapshot's file; writing to it changes the policy.
    pub fn snapshot_path(&self) -> PathBuf {
        self.directory.path().join("snapshot.json")
    }

    /// What the sidecar wrote to its log.
    pub fn log(&self) -> String {
        read_log(&self.directory)
    }

    /// The value of a metric without labels. Panics where there is none.
    pub fn metric(&self, name: &str) -> f64 {
        let mut stream = TcpStream::connect(("127.0.0.1", self.admin)).expect("the admin port accepts");
        stream.write_all(b"GET /metrics HTTP/1.1\r\nhost: larder\r\nconnection: close\r\n\r\n").expect("it reads");
        let mut text = String::new();
        stream.read_to_string(&mut text).expect("it answers");
        let value = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        value.unwrap_or_else(|| panic!("no {name} in {text}")).trim().parse().expect("a number")
    }

    /// The memory of its own that is resident now, in bytes (RssAnon).
    pub fn resident_bytes(&self) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.pid())).expect("the process lives");
        let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).expect("the kernel counts RssAnon");
        line.trim().trim_end_matches(" kB").parse::<u64>().expect("a number") * 1024
    }

    /// Sends a signal by name, such as `TERM`.
    pub fn signal(&self, name: &str) {
        let status = Command::new("kill").args([format!("-{name}"), self.pid().to_string()]).status();
        assert!(status.is_ok_and(|status| status.success()), "kill -{name} {}", self.pid());
    }

    /// Waits until the process has ended by itself.
    pub fn wait_for_end(&mut self, limit: Duration) -> ExitStatus {
        let mut ended = None;
        wait_for("the sidecar to end", limit, || {
            ended = self.child.try_wait().expect("a child can be waited for");
            ended.is_some()
        });
        ended.expect("ended")
    }

    /// Replaces the snapshot, as the control plane does: at once.
    pub fn replace_snapshot(&self, text: &str) {
        let fresh = self.directory.path().join("snapshot.new");
        std::fs::write(&fresh, text).expect("the directory is writable");
        std::fs::rename(fresh, self.snapshot_path()).expect("the directory is writable");
    }
}

impl Drop for Sidecar {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn spawn(directory: &TempDir, port: u16, admin: u16, arguments: &[&str], environment: &[(&str, &str)]) -> Child {
    let log = File::create(directory.path().join("sidecar.log")).expect("the directory is writable");
    Command::new(env!("CARGO_BIN_EXE_larderd"))
        .arg("sidecar")
        .args(["--snapshot".as_ref(), directory.path().join("snapshot.json").as_os_str()])
        .args(["--listen", &format!("127.0.0.1:{port}"), "--admin", &format!("127.0.0.1:{admin}")])
        .args(arguments)
        .envs(environment.iter().copied())
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::from(log))
        .spawn()
        .expect("larderd runs")
}

/// Whether it becomes ready before the limit. False at once where the process ended: another took its port.
fn comes_up(child: &mut Child, ready: impl Fn() -> bool) -> bool {
    let deadline = Instant::now() + START_LIMIT;
    while Instant::now() < deadline {
        if child.try_wait().is_ok_and(|status| status.is_some()) {
            return false;
        }
        if ready() {
            return true;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    false
}

fn read_log(directory: &TempDir) -> String {
    std::fs::read_to_string(directory.path().join("sidecar.log")).unwrap_or_default()
}

#[test]
fn a_sidecar_passes_commands() {
    let sentinel = SentinelCluster::start(Engine::Redis7, 1);
    let sidecar = Sidecar::start(&bypass(sentinel_topology(&sentinel)));
    assert_eq!(sidecar.client().line("SET key value"), Value::Simple("OK".to_owned()));
    assert_eq!(sentinel.primary().client().line("GET key").text(), "value");
    let cluster = RedisCluster::start(Engine::Redis7, 3, 1);
    let sidecar = Sidecar::start(&bypass(cluster_topology(&cluster)));
    let mut client = sidecar.client();
    for index in 0..20 {
        assert_eq!(client.line(&format!("SET key:{index} {index}")), Value::Simple("OK".to_owned()));
        assert_eq!(client.line(&format!("GET key:{index}")).text(), index.to_string());
    }
}

/// A connection to any sidecar that takes one. `ports`: theirs; one that is killed comes back on another.
#[track_caller]
pub fn connect_to_any(ports: &Mutex<Vec<u16>>, random: &mut fastrand::Rng, within: Duration) -> Client {
    let deadline = Instant::now() + within;
    loop {
        let port = {
            let ports = ports.lock().unwrap();
            ports[random.usize(..ports.len())]
        };
        match Client::connect(port) {
            Ok(client) => return client,
            Err(error) => assert!(Instant::now() < deadline, "no sidecar takes a connection: {error}"),
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}
