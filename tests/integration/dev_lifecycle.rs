//! `larder dev`: what it refuses, what it applies, what survives it, and that it leaves nothing behind.

use std::collections::BTreeMap;
use std::fs;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use tempfile::TempDir;

use crate::support::dev::{Dev, LIMIT, assert_gone, cluster, policy, runs};
use crate::support::resp::{Client, Value};
use crate::support::server::Engine;
use crate::support::wait_for;

const REDIS: Engine = Engine::Redis7;

fn files(mode: &str) -> [(&'static str, String); 2] {
    [("cache.yaml", cluster(REDIS, mode, "")), ("policy.yaml", policy("user:{id}"))]
}

fn sentinel_files() -> [(&'static str, String); 2] {
    files("Sentinel")
}

/// Each topology, and its number of processes with one sidecar, which counts, as does the watchdog.
const PROCESSES: [(&str, usize); 2] = [("Sentinel", 2 + 3 + 2), ("Cluster", 3 * 2 + 2)];

#[test]
fn an_interrupt_leaves_nothing_behind() {
    for (mode, processes) in PROCESSES {
        let mut dev = Dev::start(REDIS, &files(mode), &["--sidecars", "1"]);
        dev.ready(1);
        let (children, directory) = (dev.children(), dev.directory());
        assert_eq!(children.len(), processes, "{mode}: {children:?}");
        assert!(directory.exists());
        dev.stop();
        assert!(!children.iter().any(|pid| runs(*pid)), "{mode}: a process is left");
        assert!(!directory.exists(), "{mode}: files are left");
    }
}

#[test]
fn an_interrupt_while_starting_leaves_nothing_behind() {
    let mut dev = Dev::start(REDIS, &sentinel_files(), &["--sidecars", "0"]);
    dev.wait_for_stderr("waiting for");
    let directory = dev.directory();
    wait_for("some processes run", LIMIT, || dev.children().len() >= 3);
    let children = dev.children();
    dev.signal("TERM");
    assert!(dev.wait().success());
    assert_gone(&children, &directory);
}

#[test]
fn a_kill_leaves_nothing_behind() {
    for (mode, processes) in PROCESSES {
        let mut dev = Dev::start(REDIS, &files(mode), &["--sidecars", "1"]);
        dev.ready(1);
        let (children, directory) = (dev.children(), dev.directory());
        assert_eq!(children.len(), processes, "{mode}: {children:?}");
        dev.signal("KILL");
        dev.wait();
        assert_gone(&children, &directory);
    }
}

#[test]
fn two_run_side_by_side() {
    let mut one = Dev::start(REDIS, &sentinel_files(), &["--sidecars", "1"]);
    let mut other = Dev::start(REDIS, &sentinel_files(), &["--sidecars", "1"]);
    let (one_ports, other_ports) = (one.ready(1), other.ready(1));
    assert!(!one_ports.iter().any(|port| other_ports.contains(port)));
    let mut client = Client::connect(one_ports[0]).unwrap();
    assert_eq!(client.call(&["SET", "a", "1"]), Value::Simple("OK".to_owned()));
    assert_eq!(client.call(&["GET", "a"]).text(), "1");
    assert_eq!(Client::connect(other_ports[0]).unwrap().call(&["GET", "a"]), Value::Nil);
    one.stop();
    assert_eq!(Client::connect(other_ports[0]).unwrap().call(&["GET", "a"]), Value::Nil);
    other.stop();
}

/// Each file of servers and sentinels in `directory`, with the port that it names.
fn server_ports(directory: &Path) -> BTreeMap<PathBuf, String> {
    let mut found = BTreeMap::new();
    for entry in fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path()) {
        if entry.is_dir() {
            found.extend(server_ports(&entry));
        } else if entry.extension().is_some_and(|extension| extension == "conf") {
            let text = fs::read_to_string(&entry).unwrap();
            found.extend(text.lines().find_map(|line| line.strip_prefix("port ")).map(|port| (entry, port.to_owned())));
        }
    }
    found
}

#[track_caller]
fn check_data_survives(mode: &str) {
    let manifests = Arc::new(TempDir::new().unwrap());
    fs::write(manifests.path().join("cache.yaml"), cluster(REDIS, mode, "")).unwrap();
    let data = TempDir::new().unwrap();
    let arguments = ["--sidecars", "1", "--data", data.path().to_str().unwrap()];
    let mut first = Dev::start_in(REDIS, &manifests, &arguments);
    // Of all shards.
    let keys: Vec<String> = (0..20).map(|n| format!("k{n}")).collect();
    let mut client = Client::connect(first.ready(1)[0]).unwrap();
    keys.iter().for_each(|key| assert_eq!(client.call(&["SET", key, "kept"]), Value::Simple("OK".to_owned())));
    let ports = server_ports(data.path());
    assert!(ports.len() >= 5, "{ports:?}");
    // A second run on the same directory is refused, and says why.
    let mut second = Dev::start_in(REDIS, &manifests, &arguments);
    assert!(!second.wait().success());
    second.wait_for_stderr("is in use by another `larder dev`");
    first.stop();
    let mut again = Dev::start_in(REDIS, &manifests, &arguments);
    let check_kept = |dev: &mut Dev| {
        let mut client = Client::connect(dev.ready(1)[0]).unwrap();
        keys.iter().for_each(|key| assert_eq!(client.call(&["GET", key]), Value::Bulk(b"kept".to_vec()), "{mode}: {key}"));
        assert_eq!(server_ports(data.path()), ports, "{mode}: the addresses stay");
    };
    check_kept(&mut again);
    // Even a kill keeps what was written a while ago, and the addresses.
    let children = again.children();
    again.signal("KILL");
    again.wait();
    wait_for("its processes are gone", LIMIT, || !children.iter().any(|pid| runs(*pid)));
    let mut last = Dev::start_in(REDIS, &manifests, &arguments);
    check_kept(&mut last);
    last.stop();
    fs::write(manifests.path().join("cache.yaml"), cluster(REDIS, mode, "  replicas: 2\n")).unwrap();
    let mut other = Dev::start_in(REDIS, &manifests, &arguments);
    assert!(!other.wait().success());
    other.wait_for_stderr("name another directory with --data");
}

#[test]
fn data_survives_a_restart() {
    check_data_survives("Sentinel");
    check_data_survives("Cluster");
}

#[test]
fn what_is_saved_is_applied_and_what_is_wrong_is_refused() {
    let mut dev = Dev::start(REDIS, &sentinel_files(), &["--sidecars", "1"]);
    let mut client = Client::connect(dev.ready(1)[0]).unwrap();
    let snapshot = || fs::read_to_string(dev.directory().join("snapshot.json")).unwrap();
    assert!(snapshot().contains("user:{id}"));
    let path = dev.manifests.path().join("policy.yaml");
    fs::write(&path, policy("order:{id}").replace("strategy", "stratgy")).unwrap();
    dev.wait_for_stderr("the earlier ones stay\n");
    wait_for("the place is named", LIMIT, || dev.stderr().contains("policy.yaml:8:"));
    assert!(snapshot().contains("user:{id}"));
    fs::write(&path, policy("order:{id}")).unwrap();
    dev.wait_for_stderr("generation 2 is applied");
    assert!(snapshot().contains("order:{id}"));
    assert_eq!(client.call(&["PING"]), Value::Simple("PONG".to_owned()), "the connection stays");
    dev.stop();
}

#[track_caller]
fn check_refused(files: &[(&str, String)], arguments: &[&str], expected: &[&str]) {
    let mut dev = Dev::start(REDIS, files, arguments);
    assert_eq!(dev.wait().code(), Some(1), "{}", dev.stderr());
    for text in expected {
        dev.wait_for_stderr(text);
    }
}

#[test]
fn what_cannot_run_is_refused_with_the_next_step() {
    let cache = || ("cache.yaml", cluster(REDIS, "Sentinel", ""));
    let other = ("other.yaml", cluster(REDIS, "Cluster", "").replace("main", "other"));
    check_refused(&[cache(), other], &[], &["2 CacheClusters", "cache.yaml:", "other.yaml:", "next:"]);
    check_refused(&[("policy.yaml", policy("user:{id}"))], &[], &["hold no CacheCluster", "next: add one"]);
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let command = |option: &str| {
        let directory = TempDir::new().unwrap();
        let file = directory.path().join("cache.yaml");
        fs::write(&file, cache().1).unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_larder"));
        let free = if option == "--admin" { "--listen" } else { "--admin" };
        command.args(["dev", "-f"]).arg(&file).args([free, "127.0.0.1:0", option, &address]);
        String::from_utf8(command.output().unwrap().stderr).unwrap()
    };
    for option in ["--listen", "--admin"] {
        let said = command(option);
        assert!(said.contains(&address) && said.contains(&format!("choose another address with {option}")), "{said}");
    }
    let newer = cache().1.replace("7.0", "99.1");
    check_refused(&[("cache.yaml", newer)], &[], &["older than the 99.1.0 asked for", "next: install a newer one"]);
    let valkey = cache().1.replace("kind: Redis", "kind: Valkey");
    let redis = std::env::var("LARDER_REDIS_SERVER").unwrap_or_else(|_| "/usr/bin/redis-server".to_owned());
    if REDIS.binary().is_relative() {
        check_refused(&[("cache.yaml", valkey)], &["--server-bin", &redis], &["the manifest asks for Valkey"]);
        check_refused(&[cache()], &["--server-bin", "/bin/true"], &["name the server program with --server-bin"]);
    }
    let parameters = cluster(REDIS, "Sentinel", "  parameters: {no-such-parameter: \"1\"}\n");
    check_refused(&[("cache.yaml", parameters)], &[], &["no-such-parameter", "spec.parameters"]);
}
