//! `tests/kind/up` where the machine's docker can pull kind's published node image, and where it cannot: with programs that note how they
//! are called in place of docker, kind, kubectl and helm.

use std::fs;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::Path;
use std::process::{Command, Output};

use tempfile::TempDir;

/// What the scripts themselves use.
const TOOLS: [&str; 19] = [
    "awk", "bash", "cat", "date", "dirname", "env", "grep", "id", "install", "mkdir", "nice", "ps", "setsid", "sh", "sleep",
    "tail", "timeout", "which", "xargs",
];
/// What a machine with kind has.
const PLAYED: [&str; 4] = ["docker", "helm", "kind", "kubectl"];
/// What would build nodes from packages.
const BUILDERS: [&str; 3] = ["apt-get", "debootstrap", "dockerd"];

/// A machine on whose path are those programs alone. Each played one notes its name and arguments.
struct Machine {
    path: TempDir,
    cache: TempDir,
}

impl Machine {
    /// `pulls`: whether its docker gets images.
    fn new(pulls: bool) -> Self {
        let machine = Self { path: TempDir::new().unwrap(), cache: TempDir::new().unwrap() };
        for tool in TOOLS {
            let found = ["/usr/bin", "/bin"].map(|dir| Path::new(dir).join(tool)).into_iter().find(|path| path.exists());
            symlink(found.unwrap_or_else(|| panic!("there is no {tool}")), machine.path.path().join(tool)).unwrap();
        }
        for name in PLAYED {
            machine.put(name, if name == "docker" && !pulls { "case $1 in pull) exit 1 ;; esac" } else { "" });
        }
        for name in BUILDERS {
            machine.put(name, "exit 1");
        }
        machine
    }

    fn put(&self, name: &str, body: &str) {
        let (path, log) = (self.path.path().join(name), self.log());
        fs::write(&path, format!("#!/bin/sh\necho \"{name} $*\" >>'{}'\n{body}\n", log.display())).unwrap();
        fs::set_permissions(path, fs::Permissions::from_mode(0o755)).unwrap();
    }

    fn log(&self) -> std::path::PathBuf {
        self.cache.path().join("called")
    }

    fn up(&self) -> Output {
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/kind/up");
        Command::new(self.path.path().join("bash"))
            .arg(script)
            .env_clear()
            .env("PATH", self.path.path())
            .env("HOME", self.cache.path())
            .env("LARDER_KIND_CACHE", self.cache.path())
            .output()
            .unwrap()
    }

    fn called(&self) -> Vec<String> {
        fs::read_to_string(self.log()).unwrap_or_default().lines().map(str::to_owned).collect()
    }

    fn nodes(&self) -> String {
        fs::read_to_string(self.cache.path().join("nodes")).unwrap_or_default().trim().to_owned()
    }
}

/// The version of Kubernetes that the scripts pin.
fn version() -> String {
    let pinned = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/kind/mod/k8s/go.mod")).unwrap();
    let words: Vec<&str> = pinned.split_whitespace().collect();
    let place = words.iter().position(|word| *word == "k8s.io/kubernetes").unwrap();
    words[place + 1].to_owned()
}

#[test]
fn the_published_node_image_is_used_where_it_can_be_pulled() {
    let machine = Machine::new(true);
    let output = machine.up();
    let called = machine.called();
    assert!(output.status.success(), "{called:?} {}", String::from_utf8_lossy(&output.stderr));
    assert_eq!(machine.nodes(), "published");
    let image = format!("kindest/node:{}", version());
    let made: Vec<&String> = called.iter().filter(|line| line.starts_with("kind create cluster")).collect();
    assert!(called.contains(&format!("docker pull --quiet {image}")), "{called:?}");
    assert!(made.len() == 1 && made[0].contains(&format!("--image {image}")), "{called:?}");
    assert!(!called.iter().any(|line| BUILDERS.iter().any(|name| line.starts_with(name))), "something was built: {called:?}");
}

#[test]
fn nodes_are_built_where_it_cannot_be_pulled() {
    let machine = Machine::new(false);
    let output = machine.up();
    let called = machine.called();
    assert_eq!(machine.nodes(), "built", "{called:?}");
    assert!(called.iter().any(|line| line.starts_with("apt-get ")), "nothing was fetched to build them: {called:?}");
    // Its packages cannot be had on this machine, which ends it.
    assert!(!output.status.success() && !called.iter().any(|line| line.starts_with("kind create")), "{called:?}");
}
