//! `larder dev`: what manifests say of secrets and values, and what stands where nothing is said.

use std::fs;
use std::path::Path;
use std::process::Command;

use crate::support::dev::{Dev, LIMIT, cluster, info, policy};
use crate::support::resp::{Client, Value};
use crate::support::server::Engine;
use crate::support::wait_for;

const REDIS: Engine = Engine::Redis7;

/// An SQLite database in which every user has this name.
fn database(directory: &Path, name: &str) -> String {
    let path = directory.join(format!("{name}.db"));
    let tables = format!(
        "CREATE TABLE users (id INTEGER PRIMARY KEY, name TEXT);
         INSERT INTO users SELECT value, '{name}' FROM generate_series(1, 1000);"
    );
    let made = Command::new("sqlite3").arg(&path).arg(tables).status().expect("make setup installs sqlite3");
    assert!(made.success());
    format!("sqlite://{}", path.display())
}

fn secret(key: &str, url: &str) -> String {
    format!("apiVersion: v1\nkind: Secret\nmetadata: {{name: shop-db}}\nstringData: {{{key}: \"{url}\"}}\n")
}

/// A policy that reads through an origin whose URL is in the Secret.
const READ_THROUGH: &str = "\
apiVersion: larder.dev/v1alpha1
kind: CachePolicy
metadata: {name: shop}
spec:
  cacheCluster: main
  workloads: {matchLabels: {app: shop}}
  origins:
    - {name: db, sql: {url: {secretKeyRef: {name: shop-db, key: url}}}}
  rules:
    - {name: user, keys: \"user:{id}\", strategy: ReadThrough, origin: {name: db, read: \"SELECT name FROM users WHERE id = $id\"}}
";

#[test]
fn secrets_and_values_reach_servers_and_origins_and_may_change() {
    let databases = tempfile::TempDir::new().unwrap();
    let [one, two] = ["one", "two"].map(|name| database(databases.path(), name));
    let plain = "  auth: {user: shop, password: {value: \"a plain password\"}}\n";
    let files = [
        ("cache.yaml", cluster(REDIS, "Sentinel", plain)),
        ("policy.yaml", READ_THROUGH.to_owned()),
        ("secret.yaml", secret("url", &one)),
    ];
    let mut dev = Dev::start(REDIS, &files, &["--sidecars", "1"]);
    let mut client = Client::connect(dev.ready(1)[0]).unwrap();
    assert_eq!(client.call(&["GET", "user:1"]).text(), "one");
    let snapshot = || fs::read_to_string(dev.directory().join("snapshot.json")).unwrap();
    assert!(!snapshot().contains("sqlite:") && !snapshot().contains("a plain password"), "{}", snapshot());

    let path = dev.manifests.path().join("secret.yaml");
    fs::write(&path, secret("other", &two)).unwrap();
    dev.wait_for_stderr("the earlier ones stay\n");
    wait_for("the place is named", LIMIT, || dev.stderr().contains("policy.yaml:8:"));
    assert_eq!(client.call(&["GET", "user:2"]).text(), "one");

    fs::write(&path, secret("url", &two)).unwrap();
    dev.wait_for_stderr("generation 2 is applied");
    // Values that are cached stay; what is loaded from now on comes from the other database.
    let mut ids = 3..;
    wait_for("the other database to be asked", LIMIT, || {
        client.call(&["GET", &format!("user:{}", ids.next().unwrap())]).text() == "two"
    });
    assert_eq!(client.call(&["GET", "user:1"]).text(), "one");
    dev.stop();
}

#[test]
fn a_sidecar_that_dies_is_started_again() {
    let files = [("cache.yaml", cluster(REDIS, "Sentinel", "")), ("policy.yaml", policy("user:{id}"))];
    let mut dev = Dev::start(REDIS, &files, &["--sidecars", "1"]);
    let port = dev.ready(1)[0];
    let line = |pid: &u32| fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    let is_sidecar = |pid: &u32| line(pid).split('\0').nth(1) == Some("sidecar");
    let sidecar = dev.children().into_iter().find(is_sidecar).expect("a sidecar runs").to_string();
    assert!(Command::new("kill").args(["-9", &sidecar]).status().unwrap().success());
    dev.wait_for_stderr("sidecar 0 ended");
    wait_for("the port to answer again", LIMIT, || {
        let reply = Client::connect(port).and_then(|mut client| client.try_call(&["SET", "user:1", "Ann"]));
        matches!(reply, Ok(Value::Simple(_)))
    });
    dev.stop();
}

#[test]
fn settings_of_servers_change_while_they_run() {
    let files = [("cache.yaml", cluster(REDIS, "Sentinel", "  parameters: {hz: \"20\"}\n"))];
    let mut dev = Dev::start(REDIS, &files, &["--sidecars", "0"]);
    let ports = dev.ready(1);
    let path = dev.manifests.path().join("cache.yaml");
    let save = |memory: &str, further: &str| {
        fs::write(&path, cluster(REDIS, "Sentinel", further).replace("memory: 64Mi", &format!("memory: {memory}"))).unwrap();
    };
    let all_have = |name: &str, value: &str| {
        wait_for(&format!("{name} to be {value}"), LIMIT, || {
            ports.iter().all(|port| {
                let reply = Client::connect(*port).and_then(|mut client| client.try_call(&["CONFIG", "GET", name]));
                reply.is_ok_and(|reply| !reply.is_error() && reply.items().get(1).is_some_and(|found| found.text() == value))
            })
        });
    };
    all_have("hz", "20");
    save("128Mi", "  parameters: {hz: \"30\", maxmemory-samples: \"7\"}\n  eviction: volatile-ttl\n");
    let expected = [("hz", "30"), ("maxmemory-samples", "7"), ("maxmemory-policy", "volatile-ttl"), ("maxmemory", "100663296")];
    expected.iter().for_each(|(name, value)| all_have(name, value));
    dev.wait_for_stderr("generation 2 is applied");
    assert!(!dev.stderr().contains("restart larder dev"), "{}", dev.stderr());
    // A server that starts anew has them too.
    let killed = info(ports[1], "process_id").unwrap();
    assert!(Command::new("kill").args(["-9", &killed]).status().unwrap().success());
    wait_for("another process", LIMIT, || info(ports[1], "process_id").is_some_and(|pid| pid != killed));
    expected.iter().for_each(|(name, value)| all_have(name, value));

    save("128Mi", "  parameters: {hz: \"30\", maxmemory-samples: \"many\"}\n  eviction: volatile-ttl\n");
    dev.wait_for_stderr("maxmemory-samples is not many on every server");
    save("128Mi", "  parameters: {hz: \"40\", maxmemory-samples: \"7\"}\n  eviction: volatile-ttl\n  replicas: 2\n");
    dev.wait_for_stderr("restart larder dev to apply that");
    all_have("hz", "40");
    dev.stop();
}

#[test]
fn clients_and_tools_are_expected_at_the_usual_ports() {
    let help = Command::new(env!("CARGO_BIN_EXE_larder")).args(["dev", "--help"]).output().unwrap();
    let help = String::from_utf8(help.stdout).unwrap();
    for address in ["127.0.0.1:6379", "127.0.0.1:9121"] {
        assert!(help.contains(&format!("[default: {address}]")), "{help}");
    }
}
