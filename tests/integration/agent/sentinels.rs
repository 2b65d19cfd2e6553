//! The entry point of a sentinel.

use std::fs;
use std::net::SocketAddr;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use tempfile::TempDir;

use crate::support::resp::Client;
use crate::support::server::{Engine, free_port};
use crate::support::silent::Silent;
use crate::support::wait_for;

const LIMIT: Duration = Duration::from_secs(60);

struct Sentinel {
    process: Child,
    port: u16,
    _dir: TempDir,
}

impl Drop for Sentinel {
    fn drop(&mut self) {
        // It may have ended.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

impl Sentinel {
    /// Starts one that remembers a primary at this address.
    fn start(primary: SocketAddr) -> Self {
        let (dir, port) = (TempDir::new().expect("a directory"), free_port());
        let path = |name: &str| dir.path().join(name);
        fs::write(path("template"), format!("port {port}\nbind 127.0.0.1\n")).expect("it is written");
        let memory = format!("sentinel monitor main {} {} 1\n", primary.ip(), primary.port());
        fs::write(path("sentinel.conf"), memory).expect("it is written");
        let mut command = Command::new(env!("CARGO_BIN_EXE_larderd"));
        command.args(["agent", "sentinel", "--template"]).arg(path("template")).arg("--file").arg(path("sentinel.conf"));
        command.arg("--").arg(Engine::Redis7.binary()).stdout(Stdio::null());
        Self { process: command.spawn().expect("larderd runs"), port, _dir: dir }
    }

    fn watches(&self) -> bool {
        let Ok(mut client) = Client::connect(self.port) else { return false };
        client.try_call(&["SENTINEL", "MASTERS"]).is_ok_and(|answer| answer.items().len() == 1)
    }
}

#[tokio::test]
async fn a_sentinel_starts_once_those_that_it_remembers_answer() {
    let silent = Silent::open().await;
    let sentinel = Sentinel::start(silent.address());
    wait_for("it to ask for the primary", LIMIT, || !silent.attempts().is_empty());
    assert!(Client::connect(sentinel.port).is_err(), "the sentinel runs although nobody answers where its primary is");
    // Somebody stands behind the address again.
    let accepting = tokio::spawn(silent.answer());
    tokio::task::spawn_blocking(move || wait_for("it to watch", LIMIT, || sentinel.watches())).await.expect("it watches");
    accepting.abort();
}

#[tokio::test]
async fn a_sentinel_starts_although_nobody_answers_for_long() {
    let silent = Silent::open().await;
    let sentinel = Sentinel::start(silent.address());
    wait_for("it to watch", LIMIT, || sentinel.watches());
}
