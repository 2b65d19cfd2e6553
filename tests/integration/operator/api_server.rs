//! A lone API server: etcd and kube-apiserver as processes on loopback. No scheduler, no controllers, no kubelet: what those do, a
//! test does itself, or is glad to do without.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use kube::api::{Api, PostParams};
use kube::config::{KubeConfigOptions, Kubeconfig};
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use k8s_openapi::api::core::v1::Namespace;
use tempfile::TempDir;

use crate::support::certificates::write_certificates;
use crate::support::poll;
use crate::support::server::free_port;

/// Addresses of Services are given from here: all of them are this machine, so that a test can listen on each.
const SERVICE_ADDRESSES: &str = "127.96.0.0/16";

/// An API server with Larder's resource definitions, killed when it is dropped.
pub struct ApiServer {
    etcd: Child,
    server: Child,
    directory: TempDir,
}

/// Where the programs are. `None`, after it has said so, where they are not; a failure where they must be.
fn programs() -> Option<PathBuf> {
    let cache = std::env::var_os("LARDER_KIND_CACHE").map(PathBuf::from);
    let home = || std::env::var_os("HOME").map(|home| Path::new(&home).join(".cache/larder-kind"));
    let programs = cache.or_else(home)?.join("bin");
    if ["etcd", "kube-apiserver"].iter().all(|name| programs.join(name).is_file()) {
        return Some(programs);
    }
    let said = format!("no etcd and kube-apiserver in {}: `make kind-up` builds them", programs.display());
    assert!(std::env::var_os("LARDER_REQUIRE_API_SERVER").is_none(), "{said}");
    println!("skipped: {said}");
    None
}

impl ApiServer {
    /// Starts one. `None` where the programs are missing and need not be there.
    pub async fn start() -> Option<Self> {
        let programs = programs()?;
        // Two processes of one binary may be given the same free port.
        for _ in 0..3 {
            let mut server = Self::spawn(&programs);
            if server.becomes_ready().await {
                server.define_resources().await;
                return Some(server);
            }
        }
        panic!("the API server does not start");
    }

    fn spawn(programs: &Path) -> Self {
        let directory = TempDir::new().expect("a temporary directory");
        let at = |name: &str| directory.path().join(name).display().to_string();
        write_certificates(directory.path());
        let key = rcgen::KeyPair::generate().expect("a key").serialize_pem();
        std::fs::write(directory.path().join("accounts.key"), key).expect("written");
        std::fs::write(directory.path().join("tokens.csv"), "admin,admin,1,system:masters\n").expect("written");
        let (store, peers, port) = (free_port(), free_port(), free_port());
        let (store, peers) = (format!("http://127.0.0.1:{store}"), format!("http://127.0.0.1:{peers}"));
        let etcd = [
            ("--data-dir", at("etcd")),
            ("--listen-client-urls", store.clone()),
            ("--advertise-client-urls", store.clone()),
            ("--listen-peer-urls", peers.clone()),
            ("--initial-advertise-peer-urls", peers.clone()),
            ("--initial-cluster", format!("default={peers}")),
            ("--unsafe-no-fsync", "true".to_owned()),
        ];
        let server = [
            ("--etcd-servers", store),
            ("--bind-address", "127.0.0.1".to_owned()),
            ("--secure-port", port.to_string()),
            ("--tls-cert-file", at("cert.pem")),
            ("--tls-private-key-file", at("key.pem")),
            ("--cert-dir", at("unused")),
            ("--token-auth-file", at("tokens.csv")),
            ("--authorization-mode", "RBAC".to_owned()),
            ("--service-account-issuer", "https://accounts.test".to_owned()),
            ("--service-account-key-file", at("accounts.key")),
            ("--service-account-signing-key-file", at("accounts.key")),
            ("--service-cluster-ip-range", SERVICE_ADDRESSES.to_owned()),
            ("--disable-admission-plugins", "ServiceAccount".to_owned()),
            ("--endpoint-reconciler-type", "none".to_owned()),
        ];
        std::fs::write(directory.path().join("kubeconfig"), kubeconfig(port, &at("ca.pem"))).expect("written");
        let etcd = start(&programs.join("etcd"), &etcd, &directory.path().join("etcd.log"));
        let server = start(&programs.join("kube-apiserver"), &server, &directory.path().join("server.log"));
        Self { etcd, server, directory }
    }

    /// Whether it answers before the limit. False at once where a process ended.
    async fn becomes_ready(&mut self) -> bool {
        let client = self.client().await;
        for _ in 0..600 {
            let ended = |child: &mut Child| child.try_wait().is_ok_and(|status| status.is_some());
            if ended(&mut self.etcd) || ended(&mut self.server) {
                println!("the API server ended: {}", self.log());
                return false;
            }
            let ask = http_get("/readyz");
            if client.request_text(ask).await.is_ok_and(|text| text.trim() == "ok") {
                return true;
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        println!("the API server does not become ready: {}", self.log());
        false
    }

    fn log(&self) -> String {
        let log = std::fs::read_to_string(self.directory.path().join("server.log")).unwrap_or_default();
        log.lines().rev().take(5).collect::<Vec<_>>().join("\n")
    }

    async fn define_resources(&self) {
        let client = self.client().await;
        let api: Api<CustomResourceDefinition> = Api::all(client.clone());
        for crd in [larder::api::crd::cache_cluster(), larder::api::crd::cache_policy()] {
            api.create(&PostParams::default(), &crd.expect("valid")).await.expect("created");
        }
        poll("the definitions are served", async || {
            let ask = http_get("/apis/larder.dev/v1alpha1/namespaces/default/cacheclusters");
            client.request_text(ask).await.is_ok()
        })
        .await;
        poll("the default namespace", async || Api::<Namespace>::all(client.clone()).get("default").await.is_ok()).await;
    }

    /// A file that tells programs where it is and how it lets them in, with every right.
    pub fn kubeconfig(&self) -> PathBuf {
        self.directory.path().join("kubeconfig")
    }

    /// A client with every right.
    pub async fn client(&self) -> kube::Client {
        // Another test may have set it.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let file = Kubeconfig::read_from(self.kubeconfig()).expect("a kubeconfig");
        let config = kube::Config::from_custom_kubeconfig(file, &KubeConfigOptions::default()).await.expect("a configuration");
        kube::Client::try_from(config).expect("a client")
    }

    /// Makes a namespace.
    pub async fn make_namespace(&self, name: &str) {
        let namespace = serde_json::from_value(serde_json::json!({"metadata": {"name": name}})).expect("a namespace");
        Api::<Namespace>::all(self.client().await).create(&PostParams::default(), &namespace).await.expect("created");
    }

    /// How many requests it has answered, by verb and resource, without watches (which last) and its own.
    pub async fn requests(&self) -> std::collections::BTreeMap<String, u64> {
        let text = self.client().await.request_text(http_get("/metrics")).await.expect("metrics");
        let mut counts = std::collections::BTreeMap::new();
        for line in text.lines().filter_map(|line| line.strip_prefix("apiserver_request_total{")) {
            let Some((labels, count)) = line.rsplit_once("} ") else { continue };
            let label = |name: &str| {
                let labels = labels.split(',').find_map(|pair| pair.strip_prefix(&format!("{name}=\"")));
                labels.unwrap_or_default().trim_end_matches('"').to_owned()
            };
            let name = format!("{} {}/{}", label("verb"), label("resource"), label("subresource"));
            *counts.entry(name).or_default() += count.parse::<f64>().unwrap_or_default() as u64;
        }
        counts
    }
}

impl Drop for ApiServer {
    fn drop(&mut self) {
        for child in [&mut self.server, &mut self.etcd] {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

pub fn http_get(path: &str) -> axum::http::Request<Vec<u8>> {
    axum::http::Request::get(path).body(Vec::new()).expect("a request")
}

fn start(program: &Path, arguments: &[(&str, String)], log: &Path) -> Child {
    let log = std::fs::File::create(log).expect("a log");
    Command::new(program)
        .args(arguments.iter().map(|(name, value)| format!("{name}={value}")))
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(log)
        .spawn()
        .unwrap_or_else(|error| panic!("{}: {error}", program.display()))
}

fn kubeconfig(port: u16, ca: &str) -> String {
    serde_json::json!({
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "test", "cluster": {"server": format!("https://127.0.0.1:{port}"), "certificate-authority": ca}}],
        "users": [{"name": "admin", "user": {"token": "admin"}}],
        "contexts": [{"name": "test", "context": {"cluster": "test", "user": "admin"}}],
        "current-context": "test",
    })
    .to_string()
}
