//! The pods of a CacheCluster with TLS as processes: each has an address of its own on loopback, and all have the same ports.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, BufReader, Write as _};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpStream};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use k8s_openapi::api::core::v1::Secret;
use larder::api::CacheCluster;
use larder::operator::admin::{Admin, Entry, Login, Trust};
use larder::operator::cache_cluster::certify;
use larder::operator::cache_cluster::monitor::monitor;
use larder::operator::cache_cluster::objects::{Addresses, Credentials, Installation, Kept, Objects, objects};
use larder::operator::cache_cluster::pki::{Pki, Subjects};
use larder::operator::cache_cluster::plan::{SentinelId, ServerId};
use larder::operator::cache_cluster::users::{Access, SYSTEM_USER, Users};
use larder::operator::cache_cluster::validate::{Wanted, validate};
use larder::policy::digest::sha256;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, ServerName};
use serde_json::Value as Json;
use tempfile::TempDir;
use tokio::runtime::Runtime;

use crate::support::resp::{Value, encode, read_value};
use crate::support::server::{Engine, free_port};

const LIMIT: Duration = Duration::from_secs(90);
const PASSWORD: &str = "client";

/// Everything that runs, and what it was told.
pub struct Pods {
    engine: Engine,
    pub wanted: Wanted,
    pub pki: Pki,
    addresses: Addresses,
    system: Login,
    trust: Trust,
    ports: Ports,
    directory: TempDir,
    servers: Vec<Child>,
    sentinels: Vec<Child>,
    runtime: Runtime,
}

/// What stands for the usual ports.
struct Ports {
    server: u16,
    sentinel: u16,
    agent: u16,
}

fn wanted() -> Wanted {
    let spec = serde_json::json!({
        "engine": {"kind": "Valkey", "version": "8.1"}, "mode": "Sentinel", "memory": "64Mi", "tls": {"enabled": true},
        "auth": {"user": "shop", "password": {"value": PASSWORD}},
    });
    let mut cluster = CacheCluster::new("shop", serde_json::from_value(spec).expect("a specification"));
    cluster.metadata.uid = Some("8d2c".to_owned());
    validate(&cluster).expect("it is valid")
}

impl Pods {
    /// Starts two servers under agents, and three sentinels that know nothing yet.
    pub fn start(engine: Engine, make: fn(&Subjects) -> Pki) -> Self {
        let wanted = wanted();
        // Other tests are on other addresses, so that ports that are free on one of these are free on all.
        let net = fastrand::u8(1..=250);
        let at = |last: u16| IpAddr::V4(Ipv4Addr::new(127, 77, net, last as u8));
        let addresses = Addresses {
            servers: (0..2).map(|index| (ServerId { shard: 0, index }, at(1 + index))).collect(),
            sentinels: (0..3).map(|index| (SentinelId(index), at(11 + index))).collect(),
        };
        let pki = make(&certify::subjects(&wanted, wanted.tls.as_ref().expect("TLS is wanted"), &addresses));
        let mut pods = Self {
            engine,
            trust: Trust::parse(&pki.bundle()).expect("authorities"),
            wanted,
            pki,
            addresses,
            system: Login { user: SYSTEM_USER.to_owned(), password: "system secret".to_owned() },
            ports: Ports { server: free_port(), sentinel: free_port(), agent: free_port() },
            directory: TempDir::new().expect("a temporary directory"),
            servers: Vec::new(),
            sentinels: Vec::new(),
            runtime: tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime"),
        };
        pods.write_files();
        pods.sentinels = (0..3).map(|index| pods.start_sentinel(index)).collect();
        pods.servers = (0..2).map(|index| pods.start_server(index)).collect();
        pods
    }

    fn objects(&self) -> Objects {
        let installation = Installation {
            larder_image: "larder:1".to_owned(),
            image_pull_policy: None,
            operator_namespace: "larder-system".to_owned(),
        };
        let users = Users::next(None, &Access::user("shop", PASSWORD), &self.system.password, None, SystemTime::UNIX_EPOCH);
        let credentials = Credentials { system: self.system.clone(), users, client: None, pki: Some(self.pki.clone()) };
        objects(&self.wanted, &installation, &self.addresses, &credentials, &Kept::default())
    }

    pub fn subjects(&self) -> Subjects {
        certify::subjects(&self.wanted, self.wanted.tls.as_ref().expect("TLS is wanted"), &self.addresses)
    }

    pub fn server_ids(&self) -> impl Iterator<Item = ServerId> + use<> {
        self.wanted.servers()
    }

    pub fn sentinel_ids(&self) -> impl Iterator<Item = SentinelId> + use<> {
        self.wanted.sentinel_ids()
    }

    fn server_ip(&self, index: usize) -> IpAddr {
        *self.addresses.servers.values().nth(index).expect("a server")
    }

    pub fn server_address(&self, index: usize) -> SocketAddr {
        SocketAddr::new(self.server_ip(index), self.ports.server)
    }

    fn agent_address(&self, index: usize) -> SocketAddr {
        SocketAddr::new(self.server_ip(index), self.ports.agent)
    }

    pub fn sentinel_address(&self, index: usize) -> SocketAddr {
        SocketAddr::new(*self.addresses.sentinels.values().nth(index).expect("a sentinel"), self.ports.sentinel)
    }

    /// How the operator gets in.
    pub fn entry(&self) -> Entry<'_> {
        Entry { login: Some(&self.system), trust: Some(&self.trust) }
    }

    pub fn run<T>(&self, what: impl Future<Output = T>) -> T {
        self.runtime.block_on(what)
    }

    fn path(&self, pod: &str, path: &str) -> PathBuf {
        self.directory.path().join(pod).join(path.trim_start_matches('/'))
    }

    /// Every pod's mounts, with its own address and the ports of this test.
    fn write_files(&self) {
        let objects = self.objects();
        let servers = (0..2).map(|index| (format!("server-{index}"), self.server_ip(index), 0));
        let sentinels = (0..3).map(|index| (format!("sentinel-{index}"), self.sentinel_address(index).ip(), 1));
        for (pod, ip, config_map) in servers.chain(sentinels) {
            for directory in ["data", "etc/larder/config"] {
                fs::create_dir_all(self.path(&pod, directory)).expect("writable");
            }
            for (name, content) in objects.config_maps[config_map].data.as_ref().expect("it has data") {
                fs::write(self.path(&pod, "etc/larder/config").join(name), self.localised(&pod, ip, content)).expect("writable");
            }
            for (mount, secret) in ["system", "users"].into_iter().zip(&objects.secrets) {
                write_secret(&self.path(&pod, "etc/larder").join(mount), secret, None);
            }
            write_secret(&self.path(&pod, "etc/larder/tls"), &objects.secrets[3 + config_map], Some(1));
        }
    }

    /// A file of a pod: pods have addresses and roots of their own there, and processes here have not.
    fn localised(&self, pod: &str, ip: IpAddr, content: &str) -> String {
        let Ports { server, sentinel, agent } = &self.ports;
        let root = |path: &str| self.path(pod, path).to_string_lossy().into_owned();
        // The longer number first: it holds the shorter one.
        let content = content.replace("26379", "SENTINEL").replace("6379", "SERVER").replace("9121", "AGENT");
        let content = content.replace("bind * -::*\n", &format!("bind {ip}\n")).replace("127.0.0.1:", &format!("{ip}:"));
        let content = content.replace("/etc/larder", &root("/etc/larder")).replace("/data", &root("/data"));
        let content = content.replace("SENTINEL", &sentinel.to_string()).replace("SERVER", &server.to_string());
        content.replace("AGENT", &agent.to_string())
    }

    fn spawn(&self, pod: &str, arguments: &[String]) -> Child {
        let log = File::options().create(true).append(true).open(self.path(pod, "log")).expect("writable");
        let mut command = Command::new(env!("CARGO_BIN_EXE_larderd"));
        command.args(arguments).stdin(Stdio::null()).stdout(log.try_clone().expect("a log")).stderr(log);
        command.spawn().expect("larderd runs")
    }

    fn start_server(&self, index: usize) -> Child {
        let pod = format!("server-{index}");
        let at = |path: &str| self.path(&pod, path).to_string_lossy().into_owned();
        let mut arguments = vec!["agent".to_owned(), "exec".to_owned(), "--config".to_owned()];
        arguments.push(at(&format!("etc/larder/config/agent-{index}.json")));
        arguments.extend(["--listen".to_owned(), self.agent_address(index).to_string()]);
        arguments.extend(["--socket".to_owned(), at("agent.sock"), "--".to_owned()]);
        arguments.extend([self.binary(), at(&format!("etc/larder/config/server-{index}.conf"))]);
        self.spawn(&pod, &arguments)
    }

    fn start_sentinel(&self, index: usize) -> Child {
        let pod = format!("sentinel-{index}");
        let at = |path: &str| self.path(&pod, path).to_string_lossy().into_owned();
        let mut arguments: Vec<String> = ["agent", "sentinel", "--template"].map(str::to_owned).into();
        arguments.extend([at(&format!("etc/larder/config/sentinel-{index}.conf")), "--users".to_owned()]);
        arguments.extend([at("etc/larder/users/sentinel-users.conf"), "--username-file".to_owned()]);
        arguments.extend([at("etc/larder/system/username"), "--password-file".to_owned()]);
        arguments.extend([at("etc/larder/system/password"), "--file".to_owned(), at("data/sentinel.conf"), "--".to_owned()]);
        arguments.push(self.binary());
        self.spawn(&pod, &arguments)
    }

    fn binary(&self) -> String {
        self.engine.binary().to_string_lossy().into_owned()
    }

    /// Ends a sentinel and starts it again, with what it remembered.
    pub fn restart_sentinel(&mut self, index: usize) {
        end(&mut self.sentinels[index]);
        self.sentinels[index] = self.start_sentinel(index);
    }

    /// What the operator does: server 0 leads, and the sentinels are told.
    pub fn form(&self) {
        self.wait("server 0 to lead", || self.state(0)["server"] == "primary");
        for index in 0..3 {
            self.wait("the sentinel to be told", || {
                self.run(async {
                    let mut admin = Admin::connect(self.sentinel_address(index), self.entry()).await?;
                    let id = SentinelId(u16::try_from(index).expect("one of three"));
                    monitor((id, &mut admin), "shop", self.server_address(0), (2, 0), Some(&self.system)).await
                })
                .is_ok()
            });
        }
        self.wait("server 1 to follow", || self.follows(1, 0));
        for index in 0..3 {
            self.wait("the sentinels to know all", || self.sentinel_is_whole(index));
        }
    }

    /// Whether a sentinel watches a primary, and knows the replica and the two others.
    pub fn sentinel_is_whole(&self, index: usize) -> bool {
        let masters = self.run(async {
            let mut admin = Admin::connect(self.sentinel_address(index), self.entry()).await?;
            admin.ask::<Vec<BTreeMap<String, String>>>("SENTINEL MASTERS", &[]).await
        });
        let is_whole = |master: &BTreeMap<String, String>| {
            let field = |name: &str| master.get(name).map(String::as_str);
            (field("flags"), field("num-slaves"), field("num-other-sentinels")) == (Some("master"), Some("1"), Some("2"))
        };
        masters.is_ok_and(|masters| masters.first().is_some_and(is_whole))
    }

    /// Whether one server follows the other in step.
    pub fn follows(&self, replica: usize, primary: usize) -> bool {
        let of = self.server_address(primary).to_string();
        self.state(replica)["server"] == serde_json::json!({"replica": {"of": of, "linkUp": true}})
    }

    /// What an agent tells; null where it does not.
    fn state(&self, index: usize) -> Json {
        let url = format!("https://{}/state", self.agent_address(index));
        let ask = async { self.trust.http().get(url).send().await?.bytes().await };
        self.run(ask).ok().and_then(|body| serde_json::from_slice(&body).ok()).unwrap_or(Json::Null)
    }

    /// The certificate that the agent has seen in a handshake.
    pub fn proved_certificate(&self, index: usize) -> Option<String> {
        self.state(index)["proved"]["certificate"].as_str().map(str::to_owned)
    }

    /// Puts other certificates in the place of all, at once for each pod, as a kubelet does.
    pub fn replace_certificates(&mut self, pki: Pki) {
        self.trust = Trust::parse(&pki.bundle()).expect("authorities");
        self.pki = pki;
        let version = usize::try_from(self.pki.generation()).expect("small");
        let objects = self.objects();
        for (pod, secret) in
            (0..2).map(|index| (format!("server-{index}"), 3)).chain((0..3).map(|index| (format!("sentinel-{index}"), 4)))
        {
            write_secret(&self.path(&pod, "etc/larder/tls"), &objects.secrets[secret], Some(version));
        }
    }

    /// Asks the agent beside a server to hand over, as a container's preStop does.
    pub fn hand_over_by_agent(&self, index: usize) {
        let socket = self.path(&format!("server-{index}"), "agent.sock");
        let mut command = Command::new(env!("CARGO_BIN_EXE_larderd"));
        let done = command.args(["agent", "handover", "--limit", "60s", "--socket"]).arg(socket).output().expect("larderd runs");
        assert!(done.status.success(), "{}\n{}", String::from_utf8_lossy(&done.stderr), self.logs());
    }

    /// All that was written but Secrets: ConfigMaps, logs, and what programs print of the certificates.
    pub fn everything_but_secrets(&self) -> String {
        let objects = self.objects();
        format!("{:?}\n{:?}\n{}", objects.config_maps, self.pki, self.logs())
    }

    fn logs(&self) -> String {
        let pods = fs::read_dir(self.directory.path()).expect("readable").flatten();
        pods.map(|pod| format!("{:?}\n{}", pod.path(), fs::read_to_string(pod.path().join("log")).unwrap_or_default())).collect()
    }

    /// Polls until it holds. Panics with all logs where it does not in time.
    #[track_caller]
    pub fn wait(&self, what: &str, mut done: impl FnMut() -> bool) {
        let deadline = Instant::now() + LIMIT;
        while !done() {
            let states = || (0..2).map(|index| self.state(index).to_string()).collect::<Vec<_>>().join("\n");
            assert!(Instant::now() < deadline, "{what}: not within {LIMIT:?}\n{}\n{}", states(), self.logs());
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

impl Drop for Pods {
    fn drop(&mut self) {
        self.servers.iter_mut().chain(&mut self.sentinels).for_each(end);
    }
}

fn end(child: &mut Child) {
    let _ = child.kill();
    let _ = child.wait();
}

/// A Secret's entries as files; with a version in a directory of its own, to which a link leads that is replaced at once.
fn write_secret(mount: &Path, secret: &Secret, version: Option<usize>) {
    let data = secret.data.as_ref().expect("it has data");
    let Some(version) = version else {
        fs::create_dir_all(mount).expect("writable");
        data.iter().for_each(|(name, bytes)| fs::write(mount.join(name), &bytes.0).expect("writable"));
        return;
    };
    let directory = mount.join(format!("..{version}"));
    fs::create_dir_all(&directory).expect("writable");
    for (name, bytes) in data {
        fs::write(directory.join(name), &bytes.0).expect("writable");
        let _ = symlink(format!("..data/{name}"), mount.join(name));
    }
    let fresh = mount.join("..data_tmp");
    symlink(format!("..{version}"), &fresh).expect("writable");
    fs::rename(fresh, mount.join("..data")).expect("writable");
}

/// A client of the cache that trusts what the ConfigMap for clients holds.
pub struct TlsClient {
    stream: BufReader<rustls::StreamOwned<rustls::ClientConnection, TcpStream>>,
}

impl TlsClient {
    pub fn try_connect(address: SocketAddr, authorities: &str) -> io::Result<Self> {
        let mut roots = rustls::RootCertStore::empty();
        for authority in CertificateDer::pem_slice_iter(authorities.as_bytes()) {
            roots.add(authority.expect("PEM")).expect("an authority");
        }
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let config =
            rustls::ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions().expect("versions");
        let config = config.with_root_certificates(roots).with_no_client_auth();
        let mut connection =
            rustls::ClientConnection::new(Arc::new(config), ServerName::from(address.ip())).map_err(io::Error::other)?;
        let mut socket = TcpStream::connect(address)?;
        socket.set_read_timeout(Some(Duration::from_secs(20)))?;
        while connection.is_handshaking() {
            connection.complete_io(&mut socket)?;
        }
        Ok(Self { stream: BufReader::new(rustls::StreamOwned::new(connection, socket)) })
    }

    pub fn connect(pods: &Pods, server: usize) -> Self {
        let published = pods.objects().config_maps[2].data.as_ref().expect("it has data")["ca.crt"].clone();
        Self::try_connect(pods.server_address(server), &published).expect("a handshake")
    }

    /// As the clients' user.
    pub fn login(pods: &Pods, server: usize) -> Self {
        Self::login_with(pods, server, "shop", PASSWORD)
    }

    pub fn login_as_larder(pods: &Pods, server: usize) -> Self {
        Self::login_with(pods, server, SYSTEM_USER, &pods.system.password)
    }

    fn login_with(pods: &Pods, server: usize, user: &str, password: &str) -> Self {
        let mut client = Self::connect(pods, server);
        assert_eq!(client.call(&["AUTH", user, password]), Value::Simple("OK".to_owned()));
        client
    }

    /// The fingerprint of the certificate that was shown.
    pub fn certificate(&self) -> String {
        sha256(&self.stream.get_ref().conn.peer_certificates().expect("certificates")[0])
    }

    pub fn call(&mut self, words: &[&str]) -> Value {
        self.stream.get_mut().write_all(&encode(words)).expect("the server reads");
        read_value(&mut self.stream).expect("the server answers")
    }
}
