//! The shop of examples/, which knows nothing of Larder, and the customers of the end-to-end tests, before one real database: two of the shop's
//! processes, each with a sidecar of its own.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use serde_json::Value as Json;
use tempfile::TempDir;

use super::support::dev::Dev;
use super::support::postgres::Postgres;
use super::support::program::output_of;
use super::support::server::{Engine, free_port};

const STARTS_WITHIN: Duration = Duration::from_secs(60);
/// Few, so that most of what is asked for is there before long.
const PRODUCTS: &str = "100";
const REQUESTS: u64 = 1500;

fn source(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

/// A Python program that ends with the test.
struct Program(Child);

impl Program {
    fn start(path: &str, variables: &[(&str, String)]) -> Self {
        let mut command = Command::new("python3");
        command.arg(source(path)).envs(variables.iter().map(|(name, value)| (*name, value)));
        let child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn();
        Self(child.expect("python3 runs: scripts/setup installs it"))
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// What a program answers at a port, once it does.
async fn ask(client: &reqwest::Client, port: u16, path: &str) -> Json {
    let url = format!("http://127.0.0.1:{port}/{path}");
    let deadline = tokio::time::Instant::now() + STARTS_WITHIN;
    loop {
        match client.get(&url).send().await {
            Ok(answer) if answer.status().is_success() => {
                return serde_json::from_str(&answer.text().await.expect("a text")).expect("JSON");
            }
            other if tokio::time::Instant::now() > deadline => panic!("{url}: {other:?}"),
            _ => tokio::time::sleep(Duration::from_millis(100)).await,
        }
    }
}

/// The example's own manifests, but for the engine, of which there is another here.
fn start_dev() -> (Dev, Vec<u16>) {
    let manifests = Arc::new(TempDir::new().expect("a temporary directory"));
    for name in ["cache.yaml", "policy.yaml"] {
        let text = fs::read_to_string(source("examples/shop").join(name)).expect(name);
        let text = text.replace("{kind: Valkey, version: \"8.1\"}", "{kind: Redis, version: \"7.0\"}");
        fs::write(manifests.path().join(name), text).expect("the directory is writable");
    }
    let mut dev = Dev::start_in(Engine::Redis7, &manifests, &["--sidecars", "2"]);
    let ports = dev.ready(2);
    (dev, ports)
}

#[tokio::test]
async fn customers_of_the_shop_are_told_what_the_database_says() {
    // Another test may have been first.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let client = reqwest::Client::builder().no_proxy().tls_certs_only([]).build().expect("a client");
    let server = Postgres::shared();
    let database = server.database(&[]).await;
    let (dev, sidecars) = start_dev();
    let common = [("DATABASE_URL", database), ("PRODUCTS", PRODUCTS.to_owned()), ("PAGE_KIB", "8".to_owned())];
    let with = |more: &[(&'static str, String)]| [&common[..], more].concat();
    let mut prepare = Command::new("python3");
    prepare.args([source("examples/shop/shop.py").as_os_str(), "prepare".as_ref()]);
    let prepared = output_of(prepare.envs(common.iter().map(|(name, value)| (*name, value))));
    assert!(prepared.status.success(), "{}", String::from_utf8_lossy(&prepared.stderr));

    let shops: Vec<(Program, u16)> = sidecars
        .iter()
        .map(|sidecar| {
            let port = free_port();
            let redis = format!("redis://127.0.0.1:{sidecar}");
            (Program::start("examples/shop/shop.py", &with(&[("REDIS_URL", redis), ("PORT", port.to_string())])), port)
        })
        .collect();
    for (_, port) in &shops {
        ask(&client, *port, "healthz").await;
    }
    let targets: Vec<String> = shops.iter().map(|(_, port)| format!("http://127.0.0.1:{port}")).collect();
    let control = free_port();
    let customers = with(&[("TARGET", targets.join(",")), ("CONTROL_PORT", control.to_string())]);
    let _customers = Program::start("tests/e2e/shop/load.py", &customers);

    ask(&client, control, "healthz").await;
    ask(&client, control, "begin?rate=200&writes=5").await;
    let deadline = tokio::time::Instant::now() + STARTS_WITHIN;
    while ask(&client, control, "status").await["requests"].as_u64() < Some(REQUESTS) {
        assert!(tokio::time::Instant::now() < deadline, "{REQUESTS} requests take more than {} s", STARTS_WITHIN.as_secs());
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    let found = ask(&client, control, "end").await;
    for fault in ["wrong", "older", "database"] {
        assert_eq!(found[fault], 0, "{fault}: {found}");
    }
    // On a machine that has no time for it a server may not answer within the sidecar's patience, or the shop within that of its customers.
    let slow = |fault: &String| ["TryAgain", "TimeoutError", "timed out"].iter().any(|word| fault.contains(word));
    let faults = found["faults"].as_object().expect("faults");
    assert!(faults.keys().all(slow), "{found}");
    assert!(found["failed"].as_u64().expect("a number") * 20 < found["requests"].as_u64().expect("a number"), "{found}");
    assert!(found["written"].as_u64() > Some(0), "nobody changed a price: {found}");
    let queries = server.log().matches("FROM products, pg_sleep(").count() as u64;
    let requests = found["requests"].as_u64().expect("a number");
    println!("{queries} queries for {requests} requests: {found}");
    assert!(queries > 0 && queries * 2 < requests, "{queries} queries for {requests} requests");
    dev.stop();
}
