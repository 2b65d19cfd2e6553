//! Database changes on Kubernetes: an application reads through, somebody else changes rows with psql, and every pod shows them, while a relay,
//! the database and the cache's primary die.
//!
//! `make e2e E2E_ARGS=policies_that_follow_tables` runs this alone.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::cluster::{apply, condition, eventually, get, kubectl, list, name, run};
use super::install::{self, PLACE};
use super::nodes::{is_on_foreign_nodes, kill_process};
use super::operator;
use super::report::{self, Line};
use super::shop::{file, pods_that_wait};
use super::tier::{Tier, VALKEY_8_1, ready_pods};

/// The name of the cache, the application, and its policy.
const NAME: &str = "rows";
/// The database.
const DATABASE: &str = "rows-db";
/// What relays of the policy are labelled with.
const RELAYS: &str = "app.kubernetes.io/name=larder-relay,larder.dev/uses-cluster=rows";
/// How many pods read, and which rows there are.
const PODS: usize = 3;
const ROWS: u32 = 20;
/// Pods that run, and have what they need.
const STARTS_WITHIN: Duration = Duration::from_secs(180);
/// How long after a commit a pod may still show the row as it was: a relay that dies is replaced within its claim of 10 s and a third, a
/// primary within some five seconds, and a relay tries again after five seconds at the most.
const BOUND: Duration = Duration::from_secs(30);
/// How long pods read: well beyond the last change.
const READ_FOR: Duration = Duration::from_secs(180);
/// Two kubelets bring the news that nobody follows any more.
const GOES_WITHIN: Duration = Duration::from_secs(240);

/// Reads all rows over and over for so many seconds; says when each value of each was seen last, in milliseconds since 1970.
const READER: &str = "
import json, os, sys, time, redis
client = redis.from_url(os.environ['REDIS_URL'], socket_timeout=15)
seen, refused, end = {}, 0, time.time() + float(sys.argv[1])
while time.time() < end:
    for row in range(1, int(sys.argv[2]) + 1):
        try:
            value = client.get('rows:%d' % row)
        except redis.RedisError as error:
            refused += 1
            continue
        if value is not None:
            seen.setdefault(str(row), {})[value.decode()] = int(time.time() * 1000)
    time.sleep(0.02)
print(json.dumps({'seen': seen, 'refused': refused}))
";

/// For each row, each value that a pod saw, and when it saw that last.
type Seen = BTreeMap<String, BTreeMap<u64, u64>>;

struct Scene {
    tier: Tier,
}

#[test]
fn policies_that_follow_tables_show_what_is_committed() {
    let _cluster = install::cluster();
    if is_on_foreign_nodes() {
        eprintln!("left out: processes are killed from nodes, which must be containers of kind");
        return;
    }
    let _others = (install::beside_others(), install::with_operator());
    operator::await_ready();
    let began = Instant::now();
    let scene = Scene::open();
    scene.told();
    let changes = scene.deaths();
    scene.deleted();
    let told = format!("{changes} commits, none seen as it was by any of {PODS} pods for longer than {BOUND:?}");
    report::add(Line::figures("database changes: relay, database and primary killed", Some(began.elapsed()), &told));
    scene.close();
}

impl Scene {
    fn open() -> Self {
        kubectl(&["label", "namespace", PLACE, "larder.dev/injection=enabled", "--overwrite"]).expect("labelled");
        let tier = Tier::of(NAME, VALKEY_8_1);
        tier.set_password("first").expect("a Secret");
        apply(&tier.manifest()).expect("applied");
        let settings = ("shared_preload_libraries=pg_stat_statements", "wal_level=logical");
        let database = file("app/database.yaml").replace("shop-db", DATABASE).replace(settings.0, settings.1);
        assert!(database.contains(settings.1), "{database}");
        run("kubectl", &["-n", PLACE, "apply", "-f", "-"], &database).expect("applied");
        let rollout = ["-n", PLACE, "rollout", "status", &format!("deployment/{DATABASE}"), "--timeout=180s"];
        kubectl(&rollout).unwrap_or_else(|error| panic!("{error}"));
        sql("CREATE TABLE rows (id int PRIMARY KEY, value bigint NOT NULL)");
        sql("CREATE TABLE history (id int, value bigint, at bigint)");
        sql(&format!("INSERT INTO rows SELECT n, 0 FROM generate_series(1, {ROWS}) AS n"));
        tier.settle("the first time");
        let scene = Self { tier };
        scene.apply_policy();
        apply(&pods_that_wait(NAME, PODS)).expect("applied");
        eventually("the application", STARTS_WITHIN, || match ready_pods(&format!("app={NAME}")).len() {
            PODS => Ok(()),
            found => Err(format!("{found} pods\n{}", super::cluster::describe(PLACE))),
        });
        await_followed("InTime");
        scene
    }

    fn apply_policy(&self) {
        let policy = json!({
            "apiVersion": "larder.dev/v1alpha1", "kind": "CachePolicy", "metadata": {"name": NAME, "namespace": PLACE},
            "spec": {
                "cacheCluster": self.tier.name, "workloads": {"matchLabels": {"app": NAME}},
                "origins": [{"name": "db", "sql": {"url": {"secretKeyRef": {"name": DATABASE, "key": "url"}}, "timeout": "5s"}}],
                "rules": [{
                    "name": "rows", "keys": "rows:{id}", "strategy": "ReadThrough", "ttl": "1h",
                    "origin": {"name": "db", "read": "SELECT value FROM rows WHERE id = $id::int"},
                    "invalidate": {"changes": [{"table": "rows"}]},
                }],
            },
        });
        apply(&policy).expect("applied");
    }

    /// The status and a relay's pod tell a person how it is.
    fn told(&self) {
        let changes = policy().expect("it is there")["status"]["changes"].clone();
        assert!(changes[0]["reading"] == true && changes[0]["lagSeconds"] == 0, "{changes}");
        let relay = name(&ready_pods(RELAYS)[0]);
        let line = ["-n", PLACE, "exec", &relay, "--", "/bin/larder", "changes", "--snapshot"];
        let said =
            kubectl(&[&line[..], &["/etc/larder/policy/snapshot.json"]].concat()).unwrap_or_else(|error| panic!("{error}"));
        assert!(said.contains("larder_rows_db_"), "{said}");
        assert_eq!(sql("SELECT count(*) FROM pg_replication_slots WHERE active"), "1", "of the cache {}", self.tier.name);
    }

    /// Rows change one after another while a relay, the database and the primary die; all pods are judged by what the database has noted. How
    /// many commits there were.
    fn deaths(&self) -> usize {
        let readers = ready_pods(&format!("app={NAME}"));
        let done = AtomicBool::new(false);
        let seen: Vec<Seen> = thread::scope(|scope| {
            let readers: Vec<_> = readers.iter().map(|pod| scope.spawn(|| read(&name(pod), READ_FOR))).collect();
            let changes = scope.spawn(|| change_until(&done));
            thread::sleep(Duration::from_secs(10));
            let reader = reader();
            kubectl(&["-n", PLACE, "delete", "pod", &reader, "--grace-period=0", "--force"]).expect("deleted");
            thread::sleep(Duration::from_secs(20));
            kill_process(&name(&ready_pods(&format!("app={DATABASE}"))[0]), "postgres");
            thread::sleep(Duration::from_secs(25));
            kill_process(&self.tier.primary(), &self.tier.engine.server());
            thread::sleep(Duration::from_secs(15));
            done.store(true, Ordering::Relaxed);
            changes.join().expect("changes");
            readers.into_iter().map(|reader| reader.join().expect("a reader")).collect()
        });
        let history = history();
        for (pod, seen) in seen.iter().enumerate() {
            let late = late(seen, &history);
            assert!(late.is_empty(), "pod {pod} showed rows as they were for too long: {late:?}");
        }
        self.tier.settle("after the failover");
        await_followed("InTime");
        history.values().map(BTreeMap::len).sum()
    }

    /// A policy that is deleted goes once nothing of it is left at the database.
    fn deleted(&self) {
        kubectl(&["-n", PLACE, "delete", "cachepolicy", NAME, "--wait=false"]).expect("deleted");
        let line = ["-n", PLACE, "get", "cachepolicy", NAME, "--ignore-not-found", "-o", "jsonpath={.status}"];
        eventually("the policy is gone", GOES_WITHIN, || match kubectl(&line)? {
            status if status.is_empty() => Ok(()),
            status => Err(status),
        });
        assert_eq!(sql("SELECT (SELECT count(*) FROM pg_replication_slots) + (SELECT count(*) FROM pg_publication)"), "0");
        eventually("its relays are gone", STARTS_WITHIN, || match list(PLACE, "pods", RELAYS).len() {
            0 => Ok(()),
            found => Err(format!("{found} are left")),
        });
        assert_eq!(sql("SELECT count(*) FROM pg_replication_slots"), "0", "a relay that was ending has made the slot anew");
    }

    fn close(self) {
        let names = [format!("deployment/{NAME}"), format!("deployment/{DATABASE}"), format!("service/{DATABASE}")];
        let ours = ["-n", PLACE, "delete", "--ignore-not-found", "--wait", &names[0], &names[1], &names[2]];
        let _ = kubectl(&[&ours[..], &[&format!("secret/{DATABASE}")]].concat());
        self.tier.delete();
    }
}

/// The relay that reads the database.
fn reader() -> String {
    eventually("a relay reads the database", STARTS_WITHIN, || {
        let reads = |relay: &String| {
            let metrics = kubectl(&["get", "--raw", &format!("/api/v1/namespaces/{PLACE}/pods/{relay}:9122/proxy/metrics")]);
            metrics.is_ok_and(|metrics| metrics.contains("larder_changes_reading{origin=\"db\"} 1"))
        };
        ready_pods(RELAYS).iter().map(name).find(reads).ok_or_else(|| "none does".to_owned())
    })
}

fn policy() -> Option<Value> {
    get(PLACE, &format!("cachepolicy/{NAME}"))
}

fn await_followed(reason: &str) {
    eventually(&format!("databases' changes are {reason}"), STARTS_WITHIN, || {
        let policy = policy().ok_or("there is no policy")?;
        let followed = condition(&policy, "Followed").ok_or("nothing is told")?;
        if followed["reason"] == reason { Ok(()) } else { Err(followed.to_string()) }
    });
}

/// What one pod sees while it reads.
fn read(pod: &str, lasts: Duration) -> Seen {
    let (seconds, rows) = (lasts.as_secs().to_string(), ROWS.to_string());
    let line = ["-n", PLACE, "exec", pod, "-c", "app", "--", "python3", "-c", READER, &seconds, &rows];
    let said = kubectl(&line).unwrap_or_else(|error| panic!("{error}"));
    let said: Value = serde_json::from_str(said.lines().last().unwrap_or_default()).expect("JSON");
    eprintln!("{pod}: {} reads were refused while something was away", said["refused"]);
    let seen: BTreeMap<String, BTreeMap<String, u64>> = serde_json::from_value(said["seen"].clone()).expect("what was seen");
    let number = |(value, at): (String, u64)| (value.parse().expect("a number"), at);
    seen.into_iter().map(|(row, values)| (row, values.into_iter().map(number).collect())).collect()
}

/// Changes one row after another with psql, each time in a transaction that also notes when. The database may be away.
fn change_until(done: &AtomicBool) {
    let mut number = 0;
    while !done.load(Ordering::Relaxed) {
        number += 1;
        let row = number % ROWS + 1;
        let change = format!(
            "WITH changed AS (UPDATE rows SET value = value + 1 WHERE id = {row} RETURNING id, value) \
             INSERT INTO history SELECT id, value, (extract(epoch FROM clock_timestamp()) * 1000)::bigint FROM changed"
        );
        if psql(&change).is_err() {
            thread::sleep(Duration::from_millis(300));
        }
    }
}

/// For each row the values that it had, and since when.
fn history() -> Seen {
    let mut history = Seen::new();
    for line in sql("SELECT id || ' ' || value || ' ' || at FROM history").lines() {
        let mut words = line.split(' ');
        let mut number = || words.next().and_then(|word| word.parse::<u64>().ok()).expect("a number");
        let (row, value, at) = (number(), number(), number());
        history.entry(row.to_string()).or_default().insert(value, at);
    }
    history
}

/// What was seen for too long after the next value had been committed: the row, the value, and for how long in milliseconds. What every pod must
/// have seen in the end is the last value, where it went on reading for long enough.
fn late(seen: &Seen, history: &Seen) -> Vec<(String, u64, u64)> {
    let bound = u64::try_from(BOUND.as_millis()).expect("a bound");
    let mut late = Vec::new();
    let end = seen.values().flat_map(BTreeMap::values).max().copied().unwrap_or_default();
    for (row, values) in history {
        let seen = seen.get(row).unwrap_or_else(|| panic!("row {row} was never read"));
        for (value, last) in seen {
            if let Some((_, since)) = values.range(value + 1..).next()
                && last.saturating_sub(*since) > bound
            {
                late.push((row.clone(), *value, last - since));
            }
        }
        if let Some((newest, at)) = values.last_key_value()
            && !seen.contains_key(newest)
            && at + bound < end
        {
            late.push((row.clone(), *newest, *at));
        }
    }
    late
}

fn psql(query: &str) -> Result<String, String> {
    let deployment = format!("deployment/{DATABASE}");
    let place = ["-n", PLACE, "exec", &deployment, "--", "env", "PGPASSWORD=change-me"];
    kubectl(&[&place[..], &["psql", "-h", "127.0.0.1", "-U", "postgres", "-tAqc", query]].concat())
}

/// Asks the database, once it answers.
fn sql(query: &str) -> String {
    eventually(&format!("the database answers {query}"), Duration::from_secs(90), || psql(query))
}
