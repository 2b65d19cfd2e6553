//! `larder dev` with a policy that writes behind: from its manifest, by an application's SET, to rows in Postgres.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::{Command, Output};

use crate::relay::together::{TABLES, rows};
use crate::support::dev::{Dev, LIMIT, cluster};
use crate::support::postgres::Postgres;
use crate::support::resp::{Client, Value};
use crate::support::server::Engine;
use crate::support::wait_for;
use crate::write_through::block;

const ENGINE: Engine = Engine::Redis7;
const DURABLE: &str = "  storage: {size: 1Gi, fsync: Always}\n  auth: {password: {value: secret}}\n";

/// Users in the table of the relay's tests, by a rule of this strategy.
fn policy(url: &str, strategy: &str) -> String {
    format!(
        "apiVersion: larder.dev/v1alpha1\nkind: CachePolicy\nmetadata: {{name: shop}}\nspec:\n  cacheCluster: main\n  \
         workloads: {{matchLabels: {{app: shop}}}}\n  origins:\n    - {{name: db, sql: {{url: {{value: \"{url}\"}}, timeout: 5s}}}}\n  \
         rules:\n    - name: users\n      keys: \"users:{{id}}\"\n      strategy: {strategy}\n      negativeTtl: 0s\n      origin:\n        \
         name: db\n        read: \"SELECT name FROM users WHERE id = $id\"\n        write: >-\n          \
         INSERT INTO users (id, name, row_version) VALUES ($id, $value, {version})\n          \
         ON CONFLICT (id) DO UPDATE SET name = excluded.name, row_version = excluded.row_version\n        \
         delete: \"DELETE FROM users WHERE id = $id\"\n",
        version = if strategy == "WriteBehind" { "$version" } else { "0" },
    )
}

/// A database of its own, and a run of a policy that writes behind to it.
fn start(mode: &str) -> (Postgres, String, String, Dev, Client) {
    let server = Postgres::start();
    let url = block(server.database(&TABLES));
    let name = url.rsplit('/').next().expect("a name").to_owned();
    let files = [("cache.yaml", cluster(ENGINE, mode, DURABLE)), ("policy.yaml", policy(&url, "WriteBehind"))];
    let mut dev = Dev::start(ENGINE, &files, &["--sidecars", "1"]);
    let client = Client::connect(dev.ready(1)[0]).expect("a sidecar");
    (server, url, name, dev, client)
}

#[track_caller]
fn set(client: &mut Client, n: usize, name: &str) {
    assert_eq!(client.call(&["SET", &format!("users:id-{n}"), name]), Value::Simple("OK".to_owned()), "users:id-{n}");
}

/// The relay's process, once it runs.
fn relay_pid(dev: &Dev) -> u32 {
    let is_relay = |pid: &u32| {
        let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        line.split(|byte| *byte == 0).nth(1) == Some(b"relay")
    };
    let mut found = None;
    wait_for("a relay runs", LIMIT, || {
        found = dev.children().into_iter().find(is_relay);
        found.is_some()
    });
    found.expect("a relay")
}

fn person(run: &Path, command: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_larder")).args(command).arg("--run-dir").arg(run).output().expect("larder runs")
}

#[track_caller]
fn wait_for_rows(server: &Postgres, database: &str, expected: usize) {
    wait_for(&format!("{expected} rows"), LIMIT, || rows(server, database).len() == expected);
}

fn check_writes_reach_the_database(mode: &str) {
    let (mut server, _, database, dev, mut client) = start(mode);
    (0..50).for_each(|n| set(&mut client, n, "first"));
    assert_eq!(client.call(&["GET", "users:id-7"]).text(), "first", "{mode}: whether it is in the database or not");
    wait_for_rows(&server, &database, 50);
    assert_eq!(client.call(&["DEL", "users:id-0"]), Value::Int(1));
    wait_for_rows(&server, &database, 49);
    // A relay that dies is started again.
    let first = relay_pid(&dev);
    assert!(Command::new("kill").args(["-KILL", &first.to_string()]).status().expect("kill runs").success());
    dev.wait_for_stderr("the relay ended");
    (50..100).for_each(|n| set(&mut client, n, "second"));
    wait_for_rows(&server, &database, 99);
    assert_ne!(relay_pid(&dev), first);
    // While the database is away, writes are acknowledged and seen.
    server.interrupt(|| {
        (0..100).for_each(|n| set(&mut client, n, "third"));
        assert_eq!(client.call(&["GET", "users:id-99"]).text(), "third", "{mode}");
        let status = person(&dev.directory(), &["journal", "status", "--output", "json"]);
        let status: serde_json::Value = serde_json::from_slice(&status.stdout).expect("JSON");
        assert!(status["dirty"].as_u64().is_some_and(|dirty| dirty > 0), "{status}");
    });
    wait_for("what was written meanwhile", LIMIT, || {
        rows(&server, &database).values().filter(|name| *name == "third").count() == 100
    });
    // A refused write is a person's.
    set(&mut client, 3, "poison");
    wait_for("a dead letter", LIMIT, || {
        let list = person(&dev.directory(), &["dead-letters", "list"]);
        String::from_utf8_lossy(&list.stdout).contains("users:id-3")
    });
    assert_eq!(client.call(&["GET", "users:id-3"]).text(), "poison", "{mode}: it was acknowledged");
    let dropped = person(&dev.directory(), &["dead-letters", "drop", "--all"]);
    assert!(dropped.status.success(), "{}", String::from_utf8_lossy(&dropped.stderr));
    assert_eq!(client.call(&["GET", "users:id-3"]).text(), "third", "{mode}");
    // What is acknowledged in the last moment is in the database when all has ended.
    (0..100).for_each(|n| set(&mut client, n, "last"));
    dev.stop();
    let expected: BTreeMap<String, String> = (0..100).map(|n| (format!("id-{n}"), "last".to_owned())).collect();
    assert_eq!(rows(&server, &database), expected, "{mode}");
}

#[test]
fn writes_reach_the_database_whatever_ends_and_begins_meanwhile() {
    check_writes_reach_the_database("Sentinel");
}

#[test]
fn writes_reach_the_database_from_all_shards() {
    check_writes_reach_the_database("Cluster");
}

#[test]
fn a_rule_writes_behind_until_its_journal_is_drained() {
    let (mut server, url, database, dev, mut client) = start("Sentinel");
    let manifest = dev.manifests.path().join("policy.yaml");
    server.interrupt(|| {
        set(&mut client, 1, "behind");
        fs::write(&manifest, policy(&url, "WriteThrough")).expect("the directory is writable");
        dev.wait_for_stderr("the manifests were saved, and wait for 1 write to reach their origin");
        assert_eq!(client.call(&["GET", "users:id-1"]).text(), "behind");
        set(&mut client, 2, "behind");
    });
    dev.wait_for_stderr("the manifests were saved: generation 2 is applied");
    assert_eq!(rows(&server, &database).len(), 2);
    assert_eq!(client.call(&["GET", "users:id-2"]).text(), "behind");
    wait_for("writes go through", LIMIT, || {
        client.call(&["SET", "users:id-3", "through"]) == Value::Simple("OK".to_owned()) && rows(&server, &database).len() == 3
    });
    dev.stop();
}

#[test]
fn a_person_is_told_what_is_lost() {
    let (mut server, _, _, mut dev, mut client) = start("Sentinel");
    server.interrupt(|| {
        (0..5).for_each(|n| set(&mut client, n, "lost"));
        dev.signal("INT");
        dev.wait_for_stderr("5 writes to reach their origins");
        dev.signal("INT");
        assert!(dev.wait().success(), "{}", dev.stderr());
    });
    assert!(dev.stderr().contains("what the journals still hold is not waited for"), "{}", dev.stderr());
}
