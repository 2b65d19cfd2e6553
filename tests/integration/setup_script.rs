//! `scripts/setup` on machines that lack things: what is missing is said, with the way to get it, and nothing is tried that would need
//! root.

use std::fs;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::Path;
use std::process::{Command, Output};

use tempfile::TempDir;

/// What the script itself uses, and nothing that it looks for.
const TOOLS: [&str; 9] = ["bash", "env", "cat", "cmp", "dirname", "mkdir", "rm", "sed", "touch"];

/// A machine that has nothing but `TOOLS` on its path, an apt-get that notes its use, and a user who is not root.
struct Machine {
    path: TempDir,
}

impl Machine {
    fn new() -> Self {
        let machine = Self { path: TempDir::new().unwrap() };
        for tool in TOOLS {
            let found = ["/usr/bin", "/bin"].map(|dir| Path::new(dir).join(tool)).into_iter().find(|path| path.exists());
            symlink(found.unwrap_or_else(|| panic!("there is no {tool}")), machine.path.path().join(tool)).unwrap();
        }
        machine.put("id", "echo 1000");
        machine.put("apt-get", "echo used >\"$(dirname \"$0\")/apt-get.used\"");
        machine
    }

    /// Puts a program on the path.
    fn put(&self, name: &str, body: &str) {
        let path = self.path.path().join(name);
        fs::write(&path, format!("#!/bin/sh\n{body}\n")).unwrap();
        fs::set_permissions(path, fs::Permissions::from_mode(0o755)).unwrap();
    }

    fn run(&self, arguments: &[&str]) -> Output {
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts/setup");
        Command::new(self.path.path().join("bash")).arg(script).args(arguments).env("PATH", self.path.path()).output().unwrap()
    }
}

#[test]
fn what_is_missing_is_said_and_nothing_is_tried_without_root() {
    let machine = Machine::new();
    for arguments in [&["--check"][..], &[]] {
        let output = machine.run(arguments);
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        assert_eq!(output.status.code(), Some(1), "{said}{}", String::from_utf8_lossy(&output.stderr));
        let missing = said.lines().find_map(|line| line.strip_prefix("missing: ")).unwrap_or_else(|| panic!("{said}"));
        let missing: Vec<&str> = missing.split(' ').collect();
        for package in ["gcc", "make", "python3", "redis-server", "valgrind", "sqlite3", "nodejs", "npm", "golang-go"] {
            assert!(missing.contains(&package), "{package} is not named: {said}");
        }
        assert!(said.contains("apt-get install ") && said.contains("package manager"), "{said}");
        assert!(said.contains("missing: Rust 1.") && said.contains("rustup.rs"), "{said}");
    }
    assert!(!machine.path.path().join("apt-get.used").exists(), "packages were to be installed without root");
    // What is there is not named.
    for program in ["redis-server", "node", "go", "valgrind"] {
        machine.put(program, "exit 0");
    }
    let said = String::from_utf8_lossy(&machine.run(&["--check"]).stdout).into_owned();
    let named =
        ["redis-server", "nodejs", "golang-go", "valgrind"].map(|package| said.split_whitespace().any(|word| word == package));
    assert_eq!(named, [false; 4], "{said}");
}
