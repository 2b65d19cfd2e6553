//! Write-behind on Kubernetes: an application writes, while its relays, its cache and its database die; what is journalled outlives it, and
//! the policy that is deleted. A rule of the same policy writes through, see [`write_through`].
//!
//! `make e2e E2E_ARGS=policies_that_write_behind` runs this alone.

use std::collections::BTreeMap;
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::cluster::{apply, condition, eventually, get, kubectl, list, name, uid};
use super::database::{COUNTS_QUERIES, Database};
use super::install::{self, PLACE};
use super::nodes::{CutOff, is_on_foreign_nodes, kill_process};
use super::operator;
use super::policies::await_snapshot;
use super::report::{self, Line};
use super::shop::pods_that_wait;
use super::tier::{Tier, VALKEY_8_1, ready_pods};
use super::write_through;

/// The name of the cache, the application, and its policy.
const NAME: &str = "behind";
/// One pod of the application writes. The other is there to read what is written through.
const PODS: usize = 2;
/// How old a write may become, beyond all that is done to its way; and as soon as the journal is to be full.
const NEVER: &str = "1h";
const SOON: &str = "15s";
/// Pods that run, and have what they need.
const STARTS_WITHIN: Duration = Duration::from_secs(180);
/// What is journalled reaches a database that answers again: a relay asks it within a minute, whose breaker doubles its pauses.
const DRAINS_WITHIN: Duration = Duration::from_secs(180);
/// For how long a deletion is seen to wait.
const WAITS: Duration = Duration::from_secs(20);

/// Writes rising numbers to forty keys, one after another, for so many seconds, or so many of them; says which it sent last for each key,
/// and which were acknowledged last. What was not written, as the answer says, counts as not sent.
const WRITER: &str = "
import json, os, sys, time, redis
seconds, most, first = float(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
client = redis.from_url(os.environ['REDIS_URL'], socket_timeout=15)
deadline = time.monotonic() + 120
while True:
    try:
        client.set('behind:first', first)
        break
    except redis.RedisError as error:
        if time.monotonic() > deadline: raise
        time.sleep(0.5)
sent, acknowledged, refused, full = {'first': first}, {'first': first}, 0, 0
end, number = time.monotonic() + seconds, first
while time.monotonic() < end and number < first + most:
    number += 1
    key = str(number % 40)
    before, sent[key] = sent.get(key), number
    try:
        client.set('behind:' + key, number)
        acknowledged[key] = number
    except redis.RedisError as error:
        refused += 1
        print(error, file=sys.stderr)
        if str(error).startswith('JOURNAL a write has waited') and str(error).endswith('nothing was written'):
            full += 1
            if before is None: del sent[key]
            else: sent[key] = before
    time.sleep(0.05)
print(json.dumps({'sent': sent, 'acknowledged': acknowledged, 'refused': refused, 'full': full}))
";

/// What was written: for each key the last number that was sent, and the last one that was acknowledged.
#[derive(Clone, Debug, Default)]
pub struct Written {
    pub sent: BTreeMap<String, u64>,
    pub acknowledged: BTreeMap<String, u64>,
    pub refused: u64,
    /// How many of these were refused since the journal was over a bound.
    pub full: u64,
}

impl Written {
    /// After more of it.
    fn and(mut self, later: Self) -> Self {
        self.sent.extend(later.sent);
        self.acknowledged.extend(later.acknowledged);
        self.refused += later.refused;
        self.full += later.full;
        self
    }

    /// Whether a table has the last acknowledged write of each key, or one that was sent later; what it has where not.
    pub fn is_in(&self, found: &BTreeMap<String, u64>) -> Result<(), String> {
        for (key, acknowledged) in &self.acknowledged {
            let sent = self.sent.get(key).copied().unwrap_or_default();
            match found.get(key) {
                Some(value) if (*acknowledged..=sent).contains(value) => {}
                other => {
                    return Err(format!("{key}: {acknowledged} was acknowledged, {sent} sent, and the database has {other:?}"));
                }
            }
        }
        Ok(())
    }
}

struct Scene {
    tier: Tier,
    database: Database,
}

#[test]
fn policies_that_write_behind_lose_nothing() {
    let _cluster = install::cluster();
    if is_on_foreign_nodes() {
        eprintln!("left out: processes are killed from nodes, which must be containers of kind");
        return;
    }
    let _others = (install::beside_others(), install::with_operator());
    operator::await_ready();
    let began = Instant::now();
    let scene = Scene::open();
    scene.asked_by_a_person();
    scene.written_through();
    let written = scene.deaths();
    let written = scene.scaled_to_zero(written);
    scene.deleted(&written);
    let told = format!(
        "{} keys, {} writes refused while something was away, {} of them since the journal was full",
        written.acknowledged.len(),
        written.refused,
        written.full
    );
    report::add(Line::figures("write-behind: relay, primary and database killed", Some(began.elapsed()), &told));
    scene.close();
}

impl Scene {
    fn open() -> Self {
        kubectl(&["label", "namespace", PLACE, "larder.dev/injection=enabled", "--overwrite"]).expect("labelled");
        let tier = Tier { durable: true, ..Tier::of(NAME, VALKEY_8_1) };
        tier.set_password("first").expect("a Secret");
        let mut manifest = tier.manifest();
        manifest["spec"]["storage"]["fsync"] = json!("Always");
        apply(&manifest).expect("applied");
        let database = Database::open("behind-db", COUNTS_QUERIES);
        database.sql("CREATE TABLE IF NOT EXISTS behind (id text PRIMARY KEY, value text, row_version bigint)");
        write_through::prepare(&database);
        tier.settle("the first time");
        let scene = Self { tier, database };
        scene.apply_policy(NEVER);
        // A snapshot that is there before the pod is mounted with it.
        eventually("the policy is delivered or waits for pods", STARTS_WITHIN, || match relays().len() {
            2 => Ok(()),
            found => Err(format!("{found} relays are ready\n{}", super::cluster::describe(PLACE))),
        });
        apply(&pods_that_wait(NAME, PODS)).expect("applied");
        scene.await_application();
        scene
    }

    fn apply_policy(&self, max_lag: &str) {
        let write = "INSERT INTO behind VALUES ($id, $value, $version) ON CONFLICT (id) DO UPDATE \
                     SET value = $value, row_version = $version WHERE behind.row_version < $version";
        let policy = json!({
            "apiVersion": "larder.dev/v1alpha1", "kind": "CachePolicy", "metadata": {"name": NAME, "namespace": PLACE},
            "spec": {
                "cacheCluster": self.tier.name, "workloads": {"matchLabels": {"app": NAME}},
                "origins": [{"name": "db", "sql": {"url": {"secretKeyRef": {"name": self.database.name, "key": "url"}}, "timeout": "5s"}}],
                "rules": [{
                    "name": "behind", "keys": "behind:{id}", "strategy": "WriteBehind", "writeBehind": {"maxLag": max_lag},
                    "origin": {
                        "name": "db", "read": "SELECT value FROM behind WHERE id = $id", "write": write,
                        "delete": "DELETE FROM behind WHERE id = $id",
                    },
                }, write_through::rule("db")],
            },
        });
        apply(&policy).expect("applied");
    }

    fn await_application(&self) {
        eventually("the application", STARTS_WITHIN, || match pods().len() {
            PODS => Ok(()),
            found => Err(format!("{found} pods\n{}", super::cluster::describe(PLACE))),
        });
    }

    /// Has the application write for so long, at most so many, while something is done.
    fn written_during(&self, seconds: u64, most: u64, first: u64, act: impl FnOnce()) -> Written {
        let pod = name(&pods()[0]);
        let (seconds, most, first) = (seconds.to_string(), most.to_string(), first.to_string());
        let line = ["-n", PLACE, "exec", &pod, "-c", "app", "--", "python3", "-c", WRITER, &seconds, &most, &first];
        thread::scope(|scope| {
            let writer = scope.spawn(|| kubectl(&line));
            act();
            let said = writer.join().expect("a writer").unwrap_or_else(|error| panic!("{error}"));
            let said: Value = serde_json::from_str(said.lines().last().unwrap_or_default()).expect("JSON");
            let numbers = |field: &str| {
                let of = said[field].as_object().expect("an object");
                of.iter().map(|(key, number)| (key.clone(), number.as_u64().expect("a number"))).collect()
            };
            let count = |field: &str| said[field].as_u64().unwrap_or_default();
            Written {
                sent: numbers("sent"),
                acknowledged: numbers("acknowledged"),
                refused: count("refused"),
                full: count("full"),
            }
        })
    }

    /// A person asks in a relay's pod, which has all that takes.
    fn asked_by_a_person(&self) {
        let relay = name(&relays()[0]);
        let line = ["-n", PLACE, "exec", &relay, "--", "/bin/larder", "journal", "status"];
        let said = kubectl(&[&line[..], &["--snapshot", "/etc/larder/policy/snapshot.json"]].concat());
        let said = said.unwrap_or_else(|error| panic!("{error}"));
        assert!(said.contains(&format!("{PLACE}.{NAME}.db")), "{said}");
    }

    /// What is written through, while the primary's pod is deleted.
    fn written_through(&self) {
        let began = Instant::now();
        let told = write_through::what_is_acknowledged_is_there_and_seen(&self.tier, &self.database, &pods());
        report::add(Line::figures("write-through: primary's pod deleted", Some(began.elapsed()), &told));
    }

    /// A relay, the primary and the database die one after another, while the application writes.
    fn deaths(&self) -> Written {
        let written = self.written_during(90, u64::MAX >> 1, 1_000, || {
            thread::sleep(Duration::from_secs(5));
            let relay = name(&relays()[0]);
            kubectl(&["-n", PLACE, "delete", "pod", &relay, "--grace-period=0", "--force"]).expect("deleted");
            thread::sleep(Duration::from_secs(15));
            kill_process(&self.tier.primary(), &self.tier.engine.server());
            thread::sleep(Duration::from_secs(20));
            kill_process(&self.database.pod(), "postgres");
        });
        assert!(written.acknowledged.len() == 41, "{written:?}");
        self.tier.settle("after the failover");
        self.await_equal(&written);
        written
    }

    /// Nobody reaches the database until the journal takes no more, and the workload goes: all that was acknowledged arrives.
    fn scaled_to_zero(&self, before: Written) -> Written {
        self.apply_policy(SOON);
        await_snapshot("the lag that the journal may have", &pods(), |snapshot| {
            let lag = |rule: &Value| rule["strategy"]["writeBehind"]["journal"]["maxLag"] == SOON;
            snapshot["rules"].as_array().is_some_and(|rules| rules.iter().any(lag))
        });
        let written = {
            let _away = CutOff::pod(&self.database.pod());
            let filled = self.written_during(60, u64::MAX >> 1, 1_000_000, || {});
            assert!(filled.full > 0 && filled.acknowledged.len() > 1, "the journal took everything: {filled:?}");
            scale(0);
            eventually("nobody writes", STARTS_WITHIN, || match list(PLACE, "pods", &format!("app={NAME}")).len() {
                0 => Ok(()),
                found => Err(format!("{found} pods")),
            });
            // How many it takes within its bound depends on the machine.
            await_depth("the journal holds what was acknowledged", |depth| depth > 0);
            before.and(filled)
        };
        self.await_equal(&written);
        await_depth("the journal is empty", |depth| depth == 0);
        self.apply_policy(NEVER);
        written
    }

    /// A policy that is deleted stays until its journal is drained, and says how much is left.
    fn deleted(&self, before: &Written) {
        scale(PODS);
        self.await_application();
        let written = {
            let _stands = Locked::begin(&self.database);
            let written = before.clone().and(self.written_during(60, 200, 2_000_000, || {}));
            await_depth("the journal is full", |depth| depth >= 40);
            kubectl(&["-n", PLACE, "delete", "cachepolicy", NAME, "--wait=false"]).expect("deleted");
            eventually("it says how much is left", Duration::from_secs(60), || {
                let policy = policy().ok_or("it is gone")?;
                let carried = condition(&policy, "Carried").ok_or("nothing is told")?;
                let message = carried["message"].as_str().unwrap_or_default();
                let says = carried["reason"] == "Draining" && message.contains("writes and 0 dead letters are left");
                if says { Ok(()) } else { Err(format!("{carried}")) }
            });
            thread::sleep(WAITS);
            assert!(policy().is_some(), "it went before its journal was drained");
            written
        };
        let line = ["-n", PLACE, "get", "cachepolicy", NAME, "--ignore-not-found", "-o", "jsonpath={.status}"];
        eventually("the policy is gone", DRAINS_WITHIN, || match kubectl(&line)? {
            status if status.is_empty() => Ok(()),
            status => Err(status),
        });
        self.await_equal(&written);
        eventually("its relays are gone", STARTS_WITHIN, || match list(PLACE, "pods", RELAYS).len() {
            0 => Ok(()),
            found => Err(format!("{found} are left")),
        });
    }

    /// Waits until the database has the last acknowledged write of each key, or one that came later.
    fn await_equal(&self, written: &Written) {
        eventually("the database has what was acknowledged", DRAINS_WITHIN, || written.is_in(&self.database.numbers("behind")));
    }

    fn close(self) {
        let _ = kubectl(&["-n", PLACE, "delete", "--ignore-not-found", "--wait", &format!("deployment/{NAME}")]);
        self.database.delete();
        self.tier.delete();
    }
}

/// The application's pods.
fn pods() -> Vec<Value> {
    ready_pods(&format!("app={NAME}"))
}

/// What relays are labelled with.
const RELAYS: &str = "app.kubernetes.io/name=larder-relay,larder.dev/uses-cluster=behind";

/// The relays, each of which holds to the restricted profile and has no token.
fn relays() -> Vec<Value> {
    let relays = ready_pods(RELAYS);
    for relay in &relays {
        let mounts = relay["spec"]["containers"][0]["volumeMounts"].to_string();
        assert!(!mounts.contains("serviceaccount"), "{} has a token: {mounts}", uid(relay));
    }
    relays
}

fn policy() -> Option<Value> {
    get(PLACE, &format!("cachepolicy/{NAME}"))
}

fn scale(replicas: usize) {
    kubectl(&["-n", PLACE, "scale", &format!("deployment/{NAME}"), &format!("--replicas={replicas}")]).expect("scaled");
}

/// Waits until the policy's status tells of so many writes that no origin has.
fn await_depth(what: &str, wanted: impl Fn(u64) -> bool) {
    eventually(what, DRAINS_WITHIN, || {
        let status = policy().ok_or("there is no policy")?["status"].clone();
        match status["journal"]["depth"].as_u64() {
            Some(depth) if wanted(depth) => Ok(()),
            _ => Err(status.to_string()),
        }
    });
}

/// A table to which nobody can write, as long as this is held.
struct Locked {
    database: Database,
    holder: Option<thread::JoinHandle<()>>,
}

impl Locked {
    fn begin(database: &Database) -> Self {
        let database = *database;
        let holder = thread::spawn(move || {
            // It ends when it is told to.
            let _ = database.try_sql("BEGIN; LOCK TABLE behind IN EXCLUSIVE MODE; SELECT pg_sleep(900)");
        });
        eventually("the table is locked", Duration::from_secs(60), || {
            let held = database
                .sql("SELECT count(*) FROM pg_locks WHERE mode = 'ExclusiveLock' AND relation = 'behind'::regclass AND granted");
            if held == "1" { Ok(()) } else { Err(held) }
        });
        Self { database, holder: Some(holder) }
    }
}

impl Drop for Locked {
    fn drop(&mut self) {
        self.database.sql(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE query LIKE '%pg_sleep(900)%' AND pid <> pg_backend_pid()",
        );
        if let Some(holder) = self.holder.take() {
            let _ = holder.join();
        }
    }
}
