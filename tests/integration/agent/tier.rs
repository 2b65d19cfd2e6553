//! Servers under agents, and the sentinels that watch them, as processes on loopback.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value as Json, json};
use tempfile::TempDir;

use crate::support::resp::{Client, Value};
use crate::support::server::{Engine, free_port, has_said};
use crate::support::wait_for;

/// How long anything that is waited for may take. Long: test machines are busy.
pub const LIMIT: Duration = Duration::from_secs(90);
/// The name under which the sentinels watch the primary.
pub const MASTER: &str = "main";
/// As in the image of an engine, which has no certificates of authorities.
const WITHOUT_AUTHORITIES: [(&str, &str); 2] = [("SSL_CERT_FILE", "/nonexistent"), ("SSL_CERT_DIR", "/nonexistent")];

/// The agent as it is shipped, where `make agent-memory` names it: what is built for tests is larger.
pub fn shipped() -> Option<OsString> {
    std::env::var_os("LARDER_AGENT_PROGRAM")
}

/// One tier: servers from ordinal 0, and three sentinels that know nothing yet.
pub struct Tier {
    pub members: Vec<Member>,
    pub sentinels: Vec<Watcher>,
    generation: u64,
    extra: Json,
}

/// A server and its agent.
pub struct Member {
    pub port: u16,
    pub agent_port: u16,
    pub directory: TempDir,
    engine: Engine,
    agent: Option<Child>,
    server_arguments: Vec<String>,
}

/// A sentinel.
pub struct Watcher {
    pub port: u16,
    child: Child,
    _directory: TempDir,
}

impl Tier {
    /// Starts `count` agents and three sentinels.
    pub fn start(engine: Engine, count: usize, durable: bool) -> Self {
        Self::start_with(engine, count, durable, json!({}), &[])
    }

    /// [`Tier::start`], with fields of the configuration and arguments of the servers given.
    pub fn start_with(engine: Engine, count: usize, durable: bool, extra: Json, arguments: &[String]) -> Self {
        let sentinels = (0..3).map(|_| Watcher::start(engine)).collect();
        let members = (0..count).map(|_| Member::new(engine, durable, arguments)).collect();
        let mut tier = Self { members, sentinels, generation: 0, extra };
        tier.configure(json!({}));
        for ordinal in 0..count {
            tier.members[ordinal].start_agent();
        }
        tier
    }

    /// Starts a tier and forms it: server 0 is the primary, the others are in step, and the sentinels know all.
    pub fn form(engine: Engine, count: usize, durable: bool) -> Self {
        let tier = Self::start(engine, count, durable);
        tier.introduce();
        tier
    }

    /// What a control plane does once server 0 serves: the sentinels are told.
    pub fn introduce(&self) {
        self.wait("server 0 to become primary", || self.members[0].phase() == json!("primary"));
        for sentinel in &self.sentinels {
            sentinel.monitor(self.members[0].port);
        }
        self.wait_until_whole(0);
        for sentinel in &self.sentinels {
            self.wait("the sentinels to know all", || sentinel.knows(self.members.len() - 1, 2));
        }
    }

    /// Waits until server `primary` leads and all others follow it.
    pub fn wait_until_whole(&self, primary: usize) {
        let address = self.members[primary].address();
        for (ordinal, member) in self.members.iter().enumerate() {
            let wanted = if ordinal == primary { json!("primary") } else { json!({"replica": {"of": address, "linkUp": true}}) };
            self.wait(&format!("server {ordinal} to be {wanted}"), || member.phase() == wanted);
        }
    }

    /// Waits until the sentinels name a server other than `old` and all others follow it. Says which.
    pub fn wait_for_successor(&self, old: usize) -> usize {
        let mut found = old;
        self.wait("another primary", || {
            let named = self
                .sentinels
                .iter()
                .find_map(Watcher::names)
                .and_then(|port| self.members.iter().position(|member| member.port == port));
            found = named.unwrap_or(old);
            found != old
        });
        self.wait_until_whole(found);
        found
    }

    /// Polls `done` until it holds. Panics with what the agents know and wrote where it does not in time.
    #[track_caller]
    pub fn wait(&self, what: &str, done: impl FnMut() -> bool) {
        wait_before(&self.members, what, done);
    }

    /// Writes every member's configuration, with `fields` over those of the start.
    pub fn configure(&mut self, fields: Json) {
        self.generation += 1;
        for ordinal in 0..self.members.len() {
            let mut config = self.config(ordinal);
            for given in [&self.extra, &fields] {
                merge(&mut config, given);
            }
            self.members[ordinal].write_config(&config);
        }
    }

    pub fn generation(&self) -> u64 {
        self.generation
    }

    fn config(&self, ordinal: usize) -> Json {
        let member = &self.members[ordinal];
        let others = self.members.iter().enumerate().filter(|(other, _)| *other != ordinal);
        let peer = |(ordinal, peer): (usize, &Member)| json!({"ordinal": ordinal, "address": peer.address(), "agent": format!("127.0.0.1:{}", peer.agent_port)});
        let sentinels: Vec<String> = self.sentinels.iter().map(|sentinel| format!("127.0.0.1:{}", sentinel.port)).collect();
        json!({
            "version": 1, "requires": 1, "generation": self.generation,
            "server": {
                "ordinal": ordinal, "address": member.address(), "dial": member.address(),
                "directory": member.data(), "durable": member.server_arguments.contains(&"--appendonly".to_owned()),
            },
            "peers": others.map(peer).collect::<Vec<_>>(),
            "failover": {"sentinel": {"master": MASTER, "sentinels": sentinels}},
        })
    }
}

/// Lays `over` on `base`, object by object.
fn merge(base: &mut Json, over: &Json) {
    match (base, over) {
        (Json::Object(base), Json::Object(over)) => {
            for (name, value) in over {
                merge(base.entry(name.clone()).or_insert(Json::Null), value);
            }
        }
        (base, over) => *base = over.clone(),
    }
}

impl Member {
    pub fn new(engine: Engine, durable: bool, arguments: &[String]) -> Self {
        let directory = TempDir::new().expect("a temporary directory");
        fs::create_dir(directory.path().join("data")).expect("the directory is writable");
        let mut server_arguments = arguments.to_vec();
        if durable {
            server_arguments.extend(["--appendonly".to_owned(), "yes".to_owned()]);
        }
        Self { port: free_port(), agent_port: free_port(), directory, engine, agent: None, server_arguments }
    }

    pub fn address(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }

    pub fn data(&self) -> PathBuf {
        self.directory.path().join("data")
    }

    pub fn socket(&self) -> PathBuf {
        self.directory.path().join("agent.sock")
    }

    fn config_path(&self) -> PathBuf {
        self.directory.path().join("agent.json")
    }

    pub fn write_config(&self, config: &Json) {
        let fresh = self.directory.path().join("agent.json.new");
        fs::write(&fresh, config.to_string()).expect("the directory is writable");
        fs::rename(fresh, self.config_path()).expect("the directory is writable");
    }

    /// Starts the agent, which starts the server when it may.
    pub fn start_agent(&mut self) {
        let log = File::options().create(true).append(true).open(self.directory.path().join("agent.log")).expect("a log");
        let data = self.data().display().to_string();
        let agent = Command::new(shipped().unwrap_or_else(|| env!("CARGO_BIN_EXE_larderd").into()))
            .args(["agent", "exec", "--listen", &format!("127.0.0.1:{}", self.agent_port)])
            .envs(WITHOUT_AUTHORITIES)
            .args(["--config".as_ref(), self.config_path().as_os_str()])
            .args(["--socket".as_ref(), self.socket().as_os_str()])
            .arg("--")
            .arg(self.engine.binary())
            .args(["--port", &self.port.to_string(), "--bind", "127.0.0.1", "--save", "", "--dir", &data])
            .args(["--logfile", "server.log", "--repl-diskless-sync-delay", "0"])
            .args(&self.server_arguments)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::from(log))
            .spawn()
            .expect("larderd runs");
        self.agent = Some(agent);
    }

    pub fn agent_pid(&self) -> u32 {
        self.agent.as_ref().expect("the agent was started").id()
    }

    /// Whether there is no agent, and so no server.
    pub fn is_away(&self) -> bool {
        self.agent.is_none()
    }

    /// `kill -9` of the agent, with which the server ends.
    pub fn kill_agent(&mut self) {
        let port = self.port;
        if let Some(mut agent) = self.agent.take() {
            let _ = agent.kill();
            let _ = agent.wait();
        }
        wait_for("the server to end with its agent", LIMIT, || TcpStream::connect(("127.0.0.1", port)).is_err());
    }

    /// SIGTERM, and waits for the end.
    pub fn stop_agent(&mut self) -> std::process::ExitStatus {
        let mut agent = self.agent.take().expect("the agent was started");
        signal("TERM", agent.id());
        let mut status = None;
        wait_for("the agent to end", LIMIT, || {
            status = agent.try_wait().expect("a child can be waited for");
            status.is_some()
        });
        status.expect("ended")
    }

    /// `kill -9` of the server's process alone.
    pub fn kill_server(&self) {
        signal("KILL", self.server_pid());
    }

    /// The server's own process.
    pub fn server_pid(&self) -> u32 {
        let info = self.client().line("INFO server").text();
        let pid = info.lines().find_map(|line| line.strip_prefix("process_id:")).expect("a process id");
        pid.trim().parse().expect("a number")
    }

    /// Whether the server has ever been told this command.
    pub fn was_told(&self, command: &str) -> bool {
        self.client().line("INFO commandstats").text().contains(&format!("cmdstat_{command}:"))
    }

    pub fn client(&self) -> Client {
        Client::connect(self.port).expect("the server accepts")
    }

    /// Whether the server's port is closed.
    pub fn is_closed(&self) -> bool {
        TcpStream::connect(("127.0.0.1", self.port)).is_err()
    }

    /// What `/state` says; null where nobody answers.
    pub fn state(&self) -> Json {
        self.try_get("/state").and_then(|(_, body)| serde_json::from_str(&body).ok()).unwrap_or(Json::Null)
    }

    pub fn phase(&self) -> Json {
        self.state()["server"].clone()
    }

    /// The reason for which the server is held, or an empty text.
    pub fn held_for(&self) -> String {
        self.phase()["held"]["reason"].as_str().unwrap_or_default().to_owned()
    }

    /// The status and the body of a GET to the agent.
    pub fn get(&self, path: &str) -> (u16, String) {
        self.try_get(path).expect("the agent answers")
    }

    fn try_get(&self, path: &str) -> Option<(u16, String)> {
        let mut stream = TcpStream::connect(("127.0.0.1", self.agent_port)).ok()?;
        stream.set_read_timeout(Some(Duration::from_secs(20))).ok()?;
        write!(stream, "GET {path} HTTP/1.1\r\nHost: agent\r\nConnection: close\r\n\r\n").ok()?;
        let mut text = String::new();
        stream.read_to_string(&mut text).ok()?;
        let status = text.get(9..12)?.parse().ok()?;
        Some((status, text.split_once("\r\n\r\n")?.1.to_owned()))
    }

    /// Runs `larderd agent WORDS --socket …`.
    pub fn ask(&self, words: &[&str]) -> Output {
        let mut command = Command::new(env!("CARGO_BIN_EXE_larderd"));
        command.envs(WITHOUT_AUTHORITIES).arg("agent").args(words).args(["--socket".as_ref(), self.socket().as_os_str()]);
        command.output().expect("larderd runs")
    }

    pub fn log(&self) -> String {
        let read = |path: &Path| fs::read_to_string(path).unwrap_or_default();
        let tail = |text: String| {
            text.lines().rev().take(15).map(str::to_owned).collect::<Vec<_>>().into_iter().rev().collect::<Vec<_>>().join("\n")
        };
        format!("{}\n--\n{}", tail(read(&self.directory.path().join("agent.log"))), tail(read(&self.data().join("server.log"))))
    }
}

impl Drop for Member {
    fn drop(&mut self) {
        if let Some(mut agent) = self.agent.take() {
            let _ = agent.kill();
            let _ = agent.wait();
        }
    }
}

/// Sends a signal by name.
pub fn signal(name: &str, pid: u32) {
    let status = Command::new("kill").args([format!("-{name}"), pid.to_string()]).status();
    assert!(status.is_ok_and(|status| status.success()), "kill -{name} {pid}");
}

impl Watcher {
    fn start(engine: Engine) -> Self {
        for _ in 0..10 {
            let (port, directory) = (free_port(), TempDir::new().expect("a temporary directory"));
            let file = directory.path().join("sentinel.conf");
            let text = format!("port {port}\nbind 127.0.0.1\ndir {}\nlogfile sentinel.log\n", directory.path().display());
            fs::write(&file, text).expect("the directory is writable");
            let mut child = Command::new(engine.binary())
                .args([file.as_os_str(), "--sentinel".as_ref()])
                .stdin(Stdio::null())
                .stdout(Stdio::null())
                .stderr(Stdio::null())
                .spawn()
                .expect("the sentinel runs");
            let mut answers = false;
            wait_for("the sentinel to answer or end", LIMIT, || {
                let has_ended = child.try_wait().is_ok_and(|status| status.is_some());
                // Who answers at the port of one that has ended is another.
                let log = fs::read_to_string(directory.path().join("sentinel.log")).unwrap_or_default();
                answers =
                    !has_ended && has_said(&log, child.id(), "Sentinel ID is") && TcpStream::connect(("127.0.0.1", port)).is_ok();
                answers || has_ended
            });
            let watcher = Self { port, child, _directory: directory };
            if answers {
                return watcher;
            }
        }
        panic!("the sentinel does not start");
    }

    /// Makes it watch a primary.
    pub fn monitor(&self, port: u16) {
        let mut client = Client::connect(self.port).expect("the sentinel accepts");
        for line in [
            format!("SENTINEL MONITOR {MASTER} 127.0.0.1 {port} 2"),
            format!("SENTINEL SET {MASTER} down-after-milliseconds 1000 failover-timeout 5000"),
        ] {
            assert_eq!(client.line(&line), Value::Simple("OK".to_owned()), "{line}");
        }
    }

    /// The port of the primary it names.
    pub fn names(&self) -> Option<u16> {
        let mut client = Client::connect(self.port).ok()?;
        let reply = client.try_call(&["SENTINEL", "GET-MASTER-ADDR-BY-NAME", MASTER]).ok()?;
        if reply == Value::Nil { None } else { reply.items().get(1)?.text().parse().ok() }
    }

    /// Whether it is failing the primary over.
    pub fn acts(&self) -> bool {
        let mut client = Client::connect(self.port).expect("the sentinel accepts");
        let masters = client.line("SENTINEL MASTERS");
        masters.items()[0].items()[9].text().contains("failover_in_progress")
    }

    /// Whether it sees a replica as one that it would promote: it asks them every ten seconds, and they may not be before they have a copy.
    pub fn would_promote(&self) -> bool {
        let mut client = Client::connect(self.port).expect("the sentinel accepts");
        let replicas = client.line(&format!("SENTINEL REPLICAS {MASTER}"));
        replicas.items().iter().any(|replica| {
            let fields: Vec<String> = replica.items().iter().map(Value::text).collect();
            let field = |name: &str| fields.chunks(2).find(|pair| pair[0] == name).map(|pair| pair[1].as_str());
            field("flags") == Some("slave") && field("slave-priority") != Some("0")
        })
    }

    /// `kill -9`.
    pub fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    fn knows(&self, replicas: usize, others: usize) -> bool {
        let Ok(mut client) = Client::connect(self.port) else { return false };
        let mut count = |what: &str| client.line(&format!("SENTINEL {what} {MASTER}")).items().len();
        count("REPLICAS") == replicas && count("SENTINELS") == others
    }
}

impl Drop for Watcher {
    fn drop(&mut self) {
        self.kill();
    }
}

/// Polls `done` until it holds. Panics with what the agents of `members` know and wrote where it does not in time.
#[track_caller]
pub fn wait_before(members: &[Member], what: &str, mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + LIMIT;
    while !done() {
        if Instant::now() > deadline {
            let known = members.iter().map(|member| format!("{}\n{}", member.state(), member.log()));
            panic!("{what}: not within {LIMIT:?}\n{}", known.collect::<Vec<_>>().join("\n\n"));
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}
