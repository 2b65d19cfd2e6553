//! The relay as a process, before real servers and real origins. What sidecars do is played: writes are appended by the journal's own script.

mod bench;
pub mod changes;
mod changes_broken;
mod changes_given;
mod changes_history;
mod changes_limits;
mod changes_promises;
mod changes_tags;
mod durable;
mod history;
mod http;
mod letters;
mod linger;
mod loads;
mod login;
mod sqlite;
mod takeover;
pub mod together;

use std::fs::File;
use std::net::TcpStream;
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

use larder::journal::scripts::{self, Appended, Bounds, Status};
use larder::journal::{Change, Partition, Version, partition_of};
use larder::policy::JournalName;
use serde_json::{Value as Json, json};
use tempfile::TempDir;

use crate::read_through::{Servers, policy};
use crate::support::admin::get_at;
use crate::support::resp::{Client, Value};
use crate::support::server::{Engine, RedisCluster, free_port};
use crate::support::wait_for;
use crate::write_behind::{DURABLE, durable};

/// How long anything may take: test machines are busy.
pub const LONG: Duration = Duration::from_secs(60);
/// The journal of all tests.
const JOURNAL: &str = "shop.users";

/// A cache with a journal, and the relays of one snapshot.
pub struct Scene {
    pub servers: Servers,
    /// What sidecars and relays are started with.
    pub snapshot: Json,
    journal: JournalName,
    directory: TempDir,
    generation: u64,
}

/// A primary and a replica under three sentinels, which know WAITAOF.
pub fn sentinel() -> Servers {
    Servers::Sentinel(durable(Engine::Valkey9, 1))
}

/// Three shards with a replica each, which do not know it.
pub fn cluster() -> Servers {
    Servers::Cluster(RedisCluster::start_with(Engine::Redis7, 3, 1, &DURABLE))
}

/// A rule for `NAME:{id}` that writes behind to an SQL origin.
pub fn sql_rule(name: &str, origin: &str, write: &str, delete: &str) -> Json {
    let query = json!({"sql": {"read": format!("SELECT name FROM {name} WHERE id = $id")}});
    rule(name, origin, &query, &json!({"sql": {"write": write, "delete": delete}}))
}

/// A rule for `NAME:{id}` that writes behind.
pub fn rule(name: &str, origin: &str, query: &Json, store: &Json) -> Json {
    let read = json!({
        "ttl": {"default": "1h", "max": "2h", "jitter": "0%"}, "stale": "0s", "negativeTtl": "0s", "lease": "10s", "wait": "10s",
        "load": {"origin": origin, "query": query, "reply": null},
    });
    let journal = json!({"name": JOURNAL, "batch": 100, "maxLag": "30s", "maxDepth": 100_000, "maxBytes": "256Mi"});
    let behind = json!({"read": read, "store": store, "journal": journal});
    json!({"name": name, "keys": format!("{name}:{{id}}"), "strategy": {"writeBehind": behind}})
}

impl Scene {
    /// No relay runs yet.
    pub fn new(servers: Servers, origins: &[Json], rules: &[Json]) -> Self {
        let directory = TempDir::new().expect("a temporary directory");
        let journal = JOURNAL.parse().expect("a name");
        let mut scene = Self { servers, snapshot: Json::Null, journal, directory, generation: 0 };
        scene.set_rules(origins, rules);
        scene
    }

    /// Replaces the snapshot.
    pub fn set_rules(&mut self, origins: &[Json], rules: &[Json]) {
        self.generation += 1;
        self.snapshot = policy(self.servers.topology(), self.generation, origins, rules);
        self.write_snapshot();
    }

    /// Has relays follow databases' changes from now on.
    pub fn follow(&mut self, feeds: &[Json]) {
        self.generation += 1;
        self.snapshot["generation"] = json!(self.generation);
        self.snapshot["feeds"] = json!(feeds);
        self.write_snapshot();
    }

    /// Has whoever starts from now on log in at the servers.
    pub fn log_in(&mut self, user: &str, password: &str) {
        let file = |name: &str, text: &str| {
            let path = self.directory.path().join(name);
            std::fs::write(&path, text).expect("the directory is writable");
            path
        };
        self.snapshot["cluster"]["auth"] =
            json!({"usernameFile": file("user", user), "passwordFile": file("password", password)});
        self.write_snapshot();
    }

    pub fn journal(&self) -> &JournalName {
        &self.journal
    }

    fn write_snapshot(&self) {
        let fresh = self.directory.path().join("fresh");
        std::fs::write(&fresh, self.snapshot.to_string()).expect("the directory is writable");
        std::fs::rename(fresh, self.directory.path().join("snapshot.json")).expect("the directory is writable");
    }

    /// Starts a relay whose claims last two seconds.
    pub fn relay(&self) -> Relay {
        let (admin, log) = (free_port(), tempfile::NamedTempFile::new().expect("a file"));
        let child = Command::new(env!("CARGO_BIN_EXE_larderd"))
            .args(["relay", "--claim", "2s", "--admin", &format!("127.0.0.1:{admin}"), "--snapshot"])
            .arg(self.directory.path().join("snapshot.json"))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::from(File::create(log.path()).expect("a file of ours")))
            .spawn()
            .expect("larderd runs");
        let relay = Relay { child, admin, log };
        wait_for("the relay is ready", LONG, || {
            TcpStream::connect(("127.0.0.1", admin)).is_ok() && get_at(admin, "/readyz").0 == 200
        });
        relay
    }

    /// What a person's command says of this journal.
    pub fn person(&self, command: &[&str]) -> Output {
        let snapshot = self.directory.path().join("snapshot.json");
        let mut larder = Command::new(env!("CARGO_BIN_EXE_larder"));
        larder.args(command).arg("--snapshot").arg(snapshot).output().expect("larder runs")
    }

    /// Appends writes of one key each, as a sidecar does; `None` deletes.
    pub fn append(&self, key: &[u8], value: Option<&str>) -> Version {
        let partition = Partition::new(&self.journal, partition_of(key));
        let bounds = Bounds { depth: 100_000, bytes: 1 << 30, age_ms: 3_600_000 };
        let change = Change { key: key.to_vec(), value: value.map(|value| value.as_bytes().to_vec()) };
        let call = scripts::append(&partition, 1 << 53, bounds, &[change]);
        match scripts::appended(&slices(&self.run(&partition, &call.command()))) {
            Ok(Appended::Done(versions)) => versions[0],
            other => panic!("{other:?}"),
        }
    }

    fn client(&self, partition: &Partition) -> Client {
        self.servers.holder_of(&String::from_utf8_lossy(&partition.log()))
    }

    /// A Cluster that is short of processors may be down for a moment, and then does nothing.
    fn run(&self, partition: &Partition, command: &[Vec<u8>]) -> Vec<Vec<u8>> {
        let mut answer = Value::Nil;
        wait_for("the servers not to be down", LONG, || {
            answer = self.client(partition).call(command);
            !matches!(&answer, Value::Error(text) if text.starts_with("CLUSTERDOWN"))
        });
        bulks(&answer)
    }

    /// How each partition is.
    pub fn status(&self) -> Vec<Status> {
        let status = |partition: Partition| {
            let answer = self.run(&partition, &scripts::status(&partition).command());
            scripts::status_answer(&slices(&answer)).expect("a status")
        };
        Partition::all(&self.journal).map(status).collect()
    }

    pub fn depth(&self) -> u64 {
        self.status().iter().map(|status| status.depth).sum()
    }

    pub fn dirty(&self) -> u64 {
        self.status().iter().map(|status| status.dirty).sum()
    }

    pub fn dead(&self) -> u64 {
        self.status().iter().map(|status| status.dead).sum()
    }

    /// Which relays have how many partitions.
    pub fn holders(&self) -> Vec<usize> {
        let mut counts = std::collections::BTreeMap::<Vec<u8>, usize>::new();
        self.status().into_iter().filter_map(|status| status.relay).for_each(|relay| *counts.entry(relay).or_default() += 1);
        counts.into_values().collect()
    }

    #[track_caller]
    pub fn wait_until_drained(&self) {
        wait_for("the journal is drained", LONG, || self.depth() == 0);
    }
}

fn bulks(value: &Value) -> Vec<Vec<u8>> {
    assert!(!value.is_error(), "{value:?}");
    value.items().iter().map(|item| item.text().into_bytes()).collect()
}

fn slices(answer: &[Vec<u8>]) -> Vec<&[u8]> {
    answer.iter().map(Vec::as_slice).collect()
}

/// A `larderd relay`, killed when dropped.
pub struct Relay {
    child: Child,
    admin: u16,
    log: tempfile::NamedTempFile,
}

impl Relay {
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    pub fn signal(&self, name: &str) {
        let status = Command::new("kill").args([format!("-{name}"), self.child.id().to_string()]).status();
        assert!(status.is_ok_and(|status| status.success()), "kill -{name}");
    }

    /// SIGKILL.
    pub fn kill(mut self) {
        self.child.kill().expect("it lives");
        self.child.wait().expect("a child");
    }

    /// SIGTERM, and its end.
    pub fn stop(mut self) {
        self.signal("TERM");
        wait_for("the relay ends", LONG, || self.child.try_wait().expect("a child").is_some());
        assert!(self.child.wait().expect("a child").success(), "{}", self.log());
    }

    pub fn log(&self) -> String {
        std::fs::read_to_string(self.log.path()).unwrap_or_default()
    }

    /// A figure of the journal, such as `larder_relay_entries_total`.
    pub fn figure(&self, name: &str) -> u64 {
        self.figure_of(name, "journal", JOURNAL)
    }

    /// A figure of what a label names.
    pub fn figure_of(&self, name: &str, label: &str, value: &str) -> u64 {
        let (status, text) = get_at(self.admin, "/metrics");
        assert_eq!(status, 200, "{text}");
        let line = format!("{name}{{{label}=\"{value}\"}} ");
        text.lines().find_map(|found| found.strip_prefix(&line)?.parse().ok()).unwrap_or_else(|| panic!("no {name} in {text}"))
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
