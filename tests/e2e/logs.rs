//! What the pods of a tier say while it is disturbed: of a pod that is gone nobody can ask afterwards.

use std::fs::{self, File};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

use super::install::{PLACE, SYSTEM};
use super::tier::Tier;

/// The most lines that are shown of each file, the last ones.
const SHOWN: usize = 200;

/// The logs of a tier's pods, and of the operator's, since this was made, as far as the pods were there then.
pub struct Logs {
    followers: Vec<(Child, PathBuf)>,
}

impl Logs {
    pub fn follow(tier: &Tier) -> Self {
        let of = |namespace: &str, labels: &str| {
            let name = format!("larder-e2e-{}-{}-{namespace}.log", tier.name, std::process::id());
            let path = std::env::temp_dir().join(name);
            let mut command = Command::new("kubectl");
            command.args(["-n", namespace, "logs", "-f", "-l", labels, "--prefix", "--since=1s", "--max-log-requests=20"]);
            let file = File::create(&path).ok()?;
            let child = command.stdin(Stdio::null()).stdout(file).stderr(Stdio::null()).spawn().ok()?;
            Some((child, path))
        };
        let tiers = format!("larder.dev/cluster={}", tier.name);
        Self {
            followers: [of(PLACE, &tiers), of(SYSTEM, "app.kubernetes.io/component=operator")].into_iter().flatten().collect(),
        }
    }

    /// What was said last.
    pub fn shown(&self) -> String {
        let last = |path: &PathBuf| {
            let text = fs::read(path).map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).unwrap_or_default();
            let lines: Vec<&str> = text.lines().collect();
            lines[lines.len().saturating_sub(SHOWN)..].join("\n")
        };
        self.followers.iter().map(|(_, path)| last(path)).collect::<Vec<_>>().join("\n")
    }
}

impl Drop for Logs {
    fn drop(&mut self) {
        for (child, path) in &mut self.followers {
            let _ = child.kill();
            let _ = child.wait();
            let _ = fs::remove_file(path);
        }
    }
}
