//! Database changes on Kubernetes: an application reads through, somebody else changes rows with psql, and every pod shows them, while a relay,
//! the database and the cache's primary die.
//!
//! `make e2e E2E_ARGS=policies_that_follow_tables` runs this alone.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::by_hand;
use super::cluster::{apply, condition, eventually, get, kubectl, list, name};
use super::database::{Database, TELLS_CHANGES};
use super::install::{self, PLACE};
use super::loads;
use super::nodes::{is_on_foreign_nodes, kill_process};
use super::operator;
use super::readers::{Seen, history, late, read};
use super::report::{self, Line};
use super::shop::pods_that_wait;
use super::tier::{Tier, VALKEY_8_1, ready_pods};

/// The name of the cache, the application, and its policy.
const NAME: &str = "rows";
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

struct Scene {
    tier: Tier,
    database: Database,
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
    scene.told_by_hand();
    scene.loaded_by_a_relay();
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
        let database = Database::open("rows-db", TELLS_CHANGES);
        database.sql("CREATE TABLE rows (id int PRIMARY KEY, value bigint NOT NULL)");
        database.sql("CREATE TABLE history (id int, value bigint, at bigint)");
        database.sql(&format!("INSERT INTO rows SELECT n, 0 FROM generate_series(1, {ROWS}) AS n"));
        loads::prepare(&database);
        tier.settle("the first time");
        let scene = Self { tier, database };
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
        let rows = json!({
            "name": "rows", "keys": "rows:{id}", "strategy": "ReadThrough", "ttl": "1h",
            "origin": {"name": "db", "read": "SELECT value FROM rows WHERE id = $id::int"},
            "invalidate": {"changes": [{"table": "rows"}]},
        });
        let policy = json!({
            "apiVersion": "larder.dev/v1alpha1", "kind": "CachePolicy", "metadata": {"name": NAME, "namespace": PLACE},
            "spec": {
                "cacheCluster": self.tier.name, "workloads": {"matchLabels": {"app": NAME}},
                "origins": [
                    {"name": "db", "sql": {"url": {"secretKeyRef": {"name": self.database.name, "key": "url"}}, "timeout": "5s"}},
                    loads::origin(),
                ],
                "rules": ([vec![rows, loads::rule()], by_hand::rules("db")].concat()),
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
        let active = self.database.sql("SELECT count(*) FROM pg_replication_slots WHERE active");
        assert_eq!(active, "1", "of the cache {}", self.tier.name);
    }

    /// What no database tells of, somebody does.
    fn told_by_hand(&self) {
        let began = Instant::now();
        let told = by_hand::what_is_told_is_seen(&self.tier, &self.database, NAME);
        report::add(Line::figures("invalidated by XADD and by hand", Some(began.elapsed()), &told));
    }

    /// Another origin, which has fewer connections than there are pods.
    fn loaded_by_a_relay(&self) {
        let began = Instant::now();
        let told = loads::relays_load_for_all(&self.database, NAME, RELAYS);
        report::add(Line::figures("loads of three pods by a relay", Some(began.elapsed()), &told));
    }

    /// Rows change one after another while a relay, the database and the primary die; all pods are judged by what the database has noted. How
    /// many commits there were.
    fn deaths(&self) -> usize {
        let readers = ready_pods(&format!("app={NAME}"));
        let done = AtomicBool::new(false);
        let seen: Vec<Seen> = thread::scope(|scope| {
            let readers: Vec<_> = readers.iter().map(|pod| scope.spawn(|| read(&name(pod), NAME, ROWS, READ_FOR))).collect();
            let changes = scope.spawn(|| change_until(&self.database, &done));
            thread::sleep(Duration::from_secs(10));
            let reader = reader();
            kubectl(&["-n", PLACE, "delete", "pod", &reader, "--grace-period=0", "--force"]).expect("deleted");
            thread::sleep(Duration::from_secs(20));
            kill_process(&self.database.pod(), "postgres");
            thread::sleep(Duration::from_secs(25));
            kill_process(&self.tier.primary(), &self.tier.engine.server());
            thread::sleep(Duration::from_secs(15));
            done.store(true, Ordering::Relaxed);
            changes.join().expect("changes");
            readers.into_iter().map(|reader| reader.join().expect("a reader")).collect()
        });
        let history = history(&self.database, "history");
        for (pod, seen) in seen.iter().enumerate() {
            let late = late(seen, &history, BOUND);
            assert!(late.is_empty(), "pod {pod} showed rows as they were for too long: {late:?}");
            let has = |row: &String, value: &u64| seen.get(row).is_some_and(|values| values.contains_key(value));
            let unseen: Vec<_> =
                history.iter().filter(|(row, values)| values.keys().last().is_some_and(|value| !has(row, value))).collect();
            assert!(unseen.is_empty(), "pod {pod} never showed the newest of {unseen:?}");
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
        let made = "SELECT (SELECT count(*) FROM pg_replication_slots) + (SELECT count(*) FROM pg_publication)";
        assert_eq!(self.database.sql(made), "0");
        eventually("its relays are gone", STARTS_WITHIN, || match list(PLACE, "pods", RELAYS).len() {
            0 => Ok(()),
            found => Err(format!("{found} are left")),
        });
        let slots = self.database.sql("SELECT count(*) FROM pg_replication_slots");
        assert_eq!(slots, "0", "a relay that was ending has made the slot anew");
    }

    fn close(self) {
        let _ = kubectl(&["-n", PLACE, "delete", "--ignore-not-found", "--wait", &format!("deployment/{NAME}")]);
        self.database.delete();
        loads::clean_up();
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

/// Changes one row after another with psql, each time in a transaction that also notes when. The database may be away.
fn change_until(database: &Database, done: &AtomicBool) {
    let mut number = 0;
    while !done.load(Ordering::Relaxed) {
        number += 1;
        let row = number % ROWS + 1;
        let change = format!(
            "WITH changed AS (UPDATE rows SET value = value + 1 WHERE id = {row} RETURNING id, value) \
             INSERT INTO history SELECT id, value, (extract(epoch FROM clock_timestamp()) * 1000)::bigint FROM changed"
        );
        if database.try_sql(&change).is_err() {
            thread::sleep(Duration::from_millis(300));
        }
    }
}
