//! etcd and kube-apiserver.
//!
//! Services get addresses on loopback, a range that no other run uses: whoever plays a pod listens there.

use std::collections::BTreeMap;
use std::fs;
use std::net::{Ipv4Addr, TcpListener};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use kube::Client;
use kube::config::{Config, KubeConfigOptions, Kubeconfig};
use reqwest::Method;
use rustix::process::Signal;
use serde_json::{Value, json};
use tempfile::TempDir;

use super::audit;
use super::process::{Process, free_port, tool};
use super::support::certificates::write_certificates;

/// How long the API server may take to be ready. Long: test machines are busy.
const START_LIMIT: Duration = Duration::from_secs(180);
/// The port by which a run holds its range of addresses.
const RANGE_PORT: u16 = 2379;

/// The namespace that the chart is installed in.
pub const SYSTEM: &str = "larder-system";

/// Who asks the API server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum User {
    /// May do everything.
    Admin,
    /// The operator's ServiceAccount.
    Operator,
    /// The ServiceAccount of the chart's uninstall hook.
    Uninstall,
}

impl User {
    const ALL: [Self; 3] = [Self::Admin, Self::Operator, Self::Uninstall];

    /// The user's name.
    pub fn name(self) -> String {
        match self {
            Self::Admin => "admin".to_owned(),
            Self::Operator => format!("system:serviceaccount:{SYSTEM}:larder"),
            Self::Uninstall => format!("system:serviceaccount:{SYSTEM}:larder-uninstall"),
        }
    }

    fn groups(self) -> String {
        match self {
            Self::Admin => "system:masters".to_owned(),
            Self::Operator | Self::Uninstall => format!("system:serviceaccounts,system:serviceaccounts:{SYSTEM}"),
        }
    }

    /// Tokens of a server that lives as long as a test.
    fn token(self) -> &'static str {
        match self {
            Self::Admin => "admin-token",
            Self::Operator => "operator-token",
            Self::Uninstall => "uninstall-token",
        }
    }
}

/// A running API server.
pub struct ControlPlane {
    port: u16,
    http: reqwest::Client,
    apiserver: Process,
    _etcd: Process,
    _range: TcpListener,
    directory: TempDir,
}

impl ControlPlane {
    /// Starts one, and returns once it is ready.
    pub async fn start() -> Self {
        // Another may have been first; then it is there.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let mut log = String::new();
        for _ in 0..3 {
            match Self::try_start().await {
                Ok(plane) => return plane,
                // Somebody took a port in between.
                Err(why) => log = why,
            }
        }
        panic!("the API server does not start: {log}");
    }

    async fn try_start() -> Result<Self, String> {
        let directory = TempDir::new().expect("a temporary directory");
        let (range, octet) = take_range();
        let (etcd, etcd_url) = start_etcd(directory.path());
        write_files(directory.path());
        let port = free_port();
        let arguments = apiserver_arguments(directory.path(), port, &etcd_url, octet);
        let log = directory.path().join("apiserver.log");
        let mut apiserver = Process::start(&tool("kube-apiserver"), &arguments, &[], &log);
        let http = http_client(directory.path());
        let deadline = Instant::now() + START_LIMIT;
        let request = || http.get(format!("https://127.0.0.1:{port}/readyz")).bearer_auth(User::Admin.token()).send();
        while !request().await.is_ok_and(|answer| answer.status().is_success()) {
            if apiserver.has_ended() || Instant::now() > deadline {
                return Err(format!("{}\n{}", apiserver.log_end(), etcd.log_end()));
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        Ok(Self { port, http, apiserver, _etcd: etcd, _range: range, directory })
    }

    /// Has it stand still: connections stay, and nobody answers. Or go on.
    pub fn stand_still(&self, still: bool) {
        self.apiserver.signal(if still { Signal::STOP } else { Signal::CONT });
    }

    /// A file with which programs ask as `user`.
    pub fn kubeconfig(&self, user: User) -> PathBuf {
        let path = self.directory.path().join(format!("{user:?}.kubeconfig"));
        let config = json!({
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "test", "cluster": {
                "server": format!("https://127.0.0.1:{}", self.port),
                "certificate-authority": self.directory.path().join("ca.pem"),
            }}],
            "users": [{"name": "test", "user": {"token": user.token()}}],
            "contexts": [{"name": "test", "context": {"cluster": "test", "user": "test"}}],
            "current-context": "test",
        });
        fs::write(&path, config.to_string()).expect("the directory is writable");
        path
    }

    /// A client of this runtime.
    pub async fn client(&self, user: User) -> Client {
        client(&self.kubeconfig(user)).await
    }

    /// Where a test may put its files.
    pub fn directory(&self) -> &Path {
        self.directory.path()
    }

    /// One request by the administrator: the status and the text of the answer.
    pub async fn request(&self, method: Method, path: &str, headers: &[(&str, &str)], body: Option<&Value>) -> (u16, String) {
        let answer = self.send(method, path, headers, body).await;
        (answer.status().as_u16(), answer.text().await.expect("a text"))
    }

    /// The warnings that come with the answer, in one text, behind its status.
    pub async fn warnings(&self, method: Method, path: &str, headers: &[(&str, &str)], body: Option<&Value>) -> (u16, String) {
        let answer = self.send(method, path, headers, body).await;
        let told = answer.headers().get_all("warning").iter().filter_map(|warning| warning.to_str().ok());
        (answer.status().as_u16(), told.collect::<Vec<_>>().join("\n"))
    }

    async fn send(&self, method: Method, path: &str, headers: &[(&str, &str)], body: Option<&Value>) -> reqwest::Response {
        let url = format!("https://127.0.0.1:{}{path}", self.port);
        let mut request = self.http.request(method, url).bearer_auth(User::Admin.token());
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        if let Some(body) = body {
            request = request.body(body.to_string());
        }
        request.send().await.expect("the API server answers")
    }

    /// A document of the API server.
    pub async fn get(&self, path: &str) -> Value {
        let (status, text) = self.request(Method::GET, path, &[("accept", "application/json")], None).await;
        assert_eq!(status, 200, "{path}: {text}");
        serde_json::from_str(&text).expect("JSON")
    }

    /// What the API server has counted of its requests.
    pub async fn requests(&self) -> Requests {
        let (status, text) = self.request(Method::GET, "/metrics", &[], None).await;
        assert_eq!(status, 200, "{text}");
        Requests::parse(&text)
    }

    /// Every request of the operator and of the uninstall hook so far.
    pub fn audit(&self) -> Vec<audit::Entry> {
        audit::read(&self.directory.path().join("audit.log"))
    }
}

/// A client by a kubeconfig file.
pub async fn client(kubeconfig: &Path) -> Client {
    let kubeconfig = Kubeconfig::read_from(kubeconfig).expect("a kubeconfig");
    let config = Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default()).await.expect("a kubeconfig");
    Client::try_from(config).expect("a client")
}

/// `apiserver_request_total` by verb and resource.
#[derive(Debug, Clone, Default)]
pub struct Requests {
    counts: BTreeMap<(String, String), u64>,
}

impl Requests {
    fn parse(text: &str) -> Self {
        let mut requests = Self::default();
        for line in text.lines() {
            let Some((labels, count)) = line.strip_prefix("apiserver_request_total{").and_then(|rest| rest.rsplit_once("} "))
            else {
                continue;
            };
            let label = |name: &str| {
                let value = labels.split_once(&format!("{name}=\""))?.1;
                value.split('"').next().map(str::to_owned)
            };
            let key = (label("verb").unwrap_or_default(), label("resource").unwrap_or_default());
            *requests.counts.entry(key).or_default() += count.parse::<f64>().unwrap_or_default() as u64;
        }
        assert!(!requests.counts.is_empty(), "the API server counts no requests");
        requests
    }

    /// What has come since an earlier count.
    pub fn since(&self, earlier: &Self) -> Self {
        let before = |key| earlier.counts.get(key).copied().unwrap_or_default();
        let counts = self.counts.iter().map(|(key, count)| (key.clone(), count.saturating_sub(before(key))));
        Self { counts: counts.filter(|(_, count)| *count > 0).collect() }
    }

    /// All of them.
    pub fn total(&self) -> u64 {
        self.counts.values().sum()
    }

    /// Those that change something of one of these resources.
    pub fn writes_of(&self, resources: &[&str]) -> BTreeMap<(String, String), u64> {
        let written = self.counts.iter().filter(|((verb, resource), _)| {
            !["GET", "LIST", "WATCH"].contains(&verb.as_str()) && resources.contains(&resource.as_str())
        });
        written.map(|(key, count)| (key.clone(), *count)).collect()
    }
}

/// A range of loopback addresses that no other run on this machine has: `127.octet.0.0/16`.
fn take_range() -> (TcpListener, u8) {
    let mut octets = 64..=191;
    // The address of the network itself, which no Service gets.
    let taken = octets.find_map(|octet| Some((TcpListener::bind((Ipv4Addr::new(127, octet, 0, 0), RANGE_PORT)).ok()?, octet)));
    taken.expect("a range of addresses is free")
}

fn start_etcd(directory: &Path) -> (Process, String) {
    let client = format!("http://127.0.0.1:{}", free_port());
    let peer = format!("http://127.0.0.1:{}", free_port());
    let arguments = [
        ("name", "etcd".to_owned()),
        ("data-dir", directory.join("etcd").display().to_string()),
        ("listen-client-urls", client.clone()),
        ("advertise-client-urls", client.clone()),
        ("listen-peer-urls", peer.clone()),
        ("initial-advertise-peer-urls", peer.clone()),
        ("initial-cluster", format!("etcd={peer}")),
        ("log-level", "error".to_owned()),
    ];
    let mut arguments: Vec<String> = arguments.iter().map(|(name, value)| format!("--{name}={value}")).collect();
    // Nothing here is to survive.
    arguments.push("--unsafe-no-fsync".to_owned());
    (Process::start(&tool("etcd"), &arguments, &[], &directory.join("etcd.log")), client)
}

/// Certificates, the keys of ServiceAccounts, tokens, and what is audited.
fn write_files(directory: &Path) {
    write_certificates(directory);
    let accounts = rcgen::KeyPair::generate().expect("a key");
    let tokens: Vec<String> =
        User::ALL.iter().map(|user| format!("{},{},{user:?},\"{}\"", user.token(), user.name(), user.groups())).collect();
    let policy = json!({
        "apiVersion": "audit.k8s.io/v1",
        "kind": "Policy",
        "omitStages": ["RequestReceived"],
        "rules": [{"level": "Metadata", "users": [User::Operator.name(), User::Uninstall.name()]}, {"level": "None"}],
    });
    for (name, text) in [
        ("accounts.key", accounts.serialize_pem()),
        ("accounts.pub", accounts.public_key_pem()),
        ("tokens.csv", tokens.join("\n")),
        ("audit.json", policy.to_string()),
    ] {
        fs::write(directory.join(name), text).expect("the directory is writable");
    }
}

fn apiserver_arguments(directory: &Path, port: u16, etcd: &str, octet: u8) -> Vec<String> {
    let at = |name: &str| directory.join(name).display().to_string();
    let arguments = [
        ("etcd-servers", etcd.to_owned()),
        ("bind-address", "127.0.0.1".to_owned()),
        ("secure-port", port.to_string()),
        ("tls-cert-file", at("cert.pem")),
        ("tls-private-key-file", at("key.pem")),
        ("token-auth-file", at("tokens.csv")),
        ("authorization-mode", "RBAC".to_owned()),
        ("anonymous-auth", "false".to_owned()),
        ("service-account-issuer", "https://kubernetes.default.svc".to_owned()),
        ("service-account-key-file", at("accounts.pub")),
        ("service-account-signing-key-file", at("accounts.key")),
        ("service-cluster-ip-range", format!("127.{octet}.0.0/16")),
        ("endpoint-reconciler-type", "none".to_owned()),
        // Some clusters check who may name an owner that blocks its deletion.
        ("enable-admission-plugins", "OwnerReferencesPermissionEnforcement".to_owned()),
        ("audit-policy-file", at("audit.json")),
        ("audit-log-path", at("audit.log")),
        ("profiling", "false".to_owned()),
    ];
    arguments.into_iter().map(|(name, value)| format!("--{name}={value}")).collect()
}

fn http_client(directory: &Path) -> reqwest::Client {
    let authority = fs::read(directory.join("ca.pem")).expect("ca.pem");
    let authority = reqwest::Certificate::from_pem(&authority).expect("a certificate");
    let builder = reqwest::Client::builder().tls_certs_only([authority]).no_proxy().timeout(Duration::from_secs(60));
    builder.build().expect("a client")
}
