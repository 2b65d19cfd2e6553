//! `larder operator` as a process, under the ServiceAccount of its chart.

use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use super::control_plane::{ControlPlane, SYSTEM, User};
use super::process::{Process, free_port};

/// A running operator.
pub struct Operator {
    process: Process,
    port: u16,
    http: reqwest::Client,
}

impl Operator {
    /// Starts one that keeps the CacheClusters of some namespaces.
    pub fn start(plane: &ControlPlane, namespaces: &[&str]) -> Self {
        Self::start_with(plane, namespaces, &[])
    }

    /// The same with more arguments.
    pub fn start_with(plane: &ControlPlane, namespaces: &[&str], more: &[String]) -> Self {
        let port = free_port();
        let mut arguments = vec![
            "operator".to_owned(),
            format!("--watch-namespaces={}", namespaces.join(",")),
            format!("--lease-namespace={SYSTEM}"),
            "--larder-image=registry.example/larder:1".to_owned(),
            format!("--listen=127.0.0.1:{port}"),
            "--log=info".to_owned(),
        ];
        arguments.extend_from_slice(more);
        let kubeconfig = plane.kubeconfig(User::Operator);
        let log = plane.directory().join("operator.log");
        let larder = PathBuf::from(env!("CARGO_BIN_EXE_larder"));
        let process = Process::start(&larder, &arguments, &[("KUBECONFIG", kubeconfig.as_path())], &log);
        let http = reqwest::Client::builder().no_proxy().tls_certs_only([]).timeout(Duration::from_secs(10));
        Self { process, port, http: http.build().expect("a client") }
    }

    /// The sum of one of its own figures over all labels, or over the one that `label` names; `None` where it does not answer yet.
    pub async fn figure(&self, name: &str, label: Option<&str>) -> Option<f64> {
        let answer = self.http.get(format!("http://127.0.0.1:{}/metrics", self.port)).send().await.ok()?;
        let text = answer.text().await.ok()?;
        let of_name = text.lines().filter_map(|line| {
            let (series, value) = line.rsplit_once(' ')?;
            let (series_name, labels) = series.split_once('{').unwrap_or((series, ""));
            let wanted = series_name == name && label.is_none_or(|label| labels.contains(label));
            wanted.then(|| value.parse::<f64>().unwrap_or_default())
        });
        Some(of_name.sum())
    }

    /// What it waits for before it is ready; `None`: it is.
    pub async fn waits_for(&self) -> Option<String> {
        let answer = match self.http.get(format!("http://127.0.0.1:{}/readyz", self.port)).send().await {
            Ok(answer) => answer,
            Err(error) => return Some(error.to_string()),
        };
        if answer.status().is_success() { None } else { answer.text().await.ok().or_else(|| Some("it hung up".to_owned())) }
    }

    /// How many looks at CacheClusters it has ended so far.
    pub async fn looks(&self) -> f64 {
        self.figure("larder_operator_reconciles_total", None).await.unwrap_or_default()
    }

    /// The memory that it holds now, and the most that it held, in KiB.
    pub fn memory(&self) -> (u64, u64) {
        let status = fs::read_to_string(format!("/proc/{}/status", self.process.pid())).expect("it runs");
        let field = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name)).expect("a field");
            line.trim().trim_end_matches(" kB").parse().expect("a number")
        };
        (field("VmRSS:"), field("VmHWM:"))
    }

    /// The processor time that it used, in seconds.
    pub async fn cpu_seconds(&self) -> f64 {
        self.figure("larder_operator_cpu_seconds_total", None).await.unwrap_or_default()
    }

    /// How often the API server, or who plays servers and sentinels, left it without an answer for seconds, as it and those before it wrote.
    pub fn silences(&self) -> usize {
        let log = self.process.log();
        ["the lease could not be looked at", "a look at policies took more than", " to answer"]
            .iter()
            .map(|words| log.matches(words).count())
            .sum()
    }

    pub fn log_end(&self) -> String {
        self.process.log_end()
    }

    /// SIGTERM, and the end that follows.
    pub fn stop(mut self) {
        self.process.stop();
    }
}
