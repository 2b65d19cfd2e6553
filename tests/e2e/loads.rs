//! More pods than an origin has connections for: a relay loads for them, and the database sees its connections alone.

use std::ops::RangeInclusive;
use std::thread;

use serde_json::{Value, json};

use super::cluster::{apply, eventually, kubectl, name};
use super::database::Database;
use super::install::PLACE;
use super::policies::{STARTS_WITHIN, await_snapshot};
use super::tier::ready_pods;

/// The rule, its origin, and how its connections call themselves.
const FEW: &str = "few";
/// The Secret with its URL.
const SECRET: &str = "few-url";
/// How many keys each pod reads, of which nobody else reads any, and by how many connections.
const KEYS: usize = 60;
const CONNECTIONS: usize = 4;
/// How many connections there may be at once: a relay that stood still keeps its own beside its successor's.
const AT_ONCE: RangeInclusive<usize> = 1..=2;
/// For how long connections are counted at the most: until pods have read.
const COUNTED_FOR: u32 = 300;

/// Reads keys over several connections; says what was not as it should be.
const READS: &str = "
import json, os, sys, threading, redis
first, count, connections = (int(word) for word in sys.argv[1:4])
left, faults = list(range(first, first + count)), []
def read():
    client = redis.from_url(os.environ['REDIS_URL'], socket_timeout=30)
    while True:
        try:
            number = left.pop()
        except IndexError:
            return
        try:
            value = client.get('few:%d' % number)
            if value != str(2 * number).encode():
                faults.append('few:%d is %r' % (number, value))
        except redis.RedisError as error:
            faults.append('few:%d: %s' % (number, error))
threads = [threading.Thread(target=read) for _ in range(connections)]
for thread in threads: thread.start()
for thread in threads: thread.join()
print(json.dumps(faults))
";

/// Counts the connections of that name until somebody says that it is enough, for so many seconds at the most: the most that there were at once.
const MOST: &str = "
CREATE TABLE counted_enough (at timestamptz);
CREATE FUNCTION most_connections(called text, seconds int) RETURNS bigint LANGUAGE plpgsql AS $$
DECLARE most bigint := 0; found bigint; ends timestamptz := clock_timestamp() + make_interval(secs => seconds);
BEGIN
  WHILE clock_timestamp() < ends AND NOT EXISTS (SELECT 1 FROM counted_enough) LOOP
    PERFORM pg_stat_clear_snapshot();
    SELECT count(*) INTO found FROM pg_stat_activity WHERE application_name = called;
    most := greatest(most, found);
    PERFORM pg_sleep(0.01);
  END LOOP;
  RETURN most;
END $$";

/// The database by one connection for all, under a name of its own.
pub fn origin() -> Value {
    let url = json!({"secretKeyRef": {"name": SECRET, "key": "url"}});
    json!({"name": FEW, "sql": {"url": url, "timeout": "5s", "maxTotalConnections": 1}})
}

pub fn rule() -> Value {
    json!({
        "name": FEW, "keys": "few:{id}", "strategy": "ReadThrough", "ttl": "1h",
        "origin": {"name": FEW, "read": "SELECT $id::int * 2 FROM (SELECT pg_sleep(0.02)) AS pause"},
    })
}

/// What a policy with [`origin`] needs.
pub fn prepare(database: &Database) {
    let url = format!("postgresql://postgres:change-me@{}:5432/postgres?application_name={FEW}", database.name);
    let metadata = json!({"name": SECRET, "namespace": PLACE});
    apply(&json!({"apiVersion": "v1", "kind": "Secret", "metadata": metadata, "stringData": {"url": url}})).expect("applied");
    database.sql(MOST);
}

pub fn clean_up() {
    let _ = kubectl(&["-n", PLACE, "delete", "secret", SECRET, "--ignore-not-found"]);
}

/// Every pod of a Deployment reads what nobody has read, all at once: the database has connections of relays for it, and none of sidecars,
/// which would have one each.
pub fn relays_load_for_all(database: &Database, deployment: &str, relays: &str) -> String {
    let pods = ready_pods(&format!("app={deployment}"));
    assert!(pods.len() > *AT_ONCE.end(), "{} pods would have no more connections than relays may", pods.len());
    await_queue(&pods);
    let most = thread::scope(|scope| {
        let counts = scope.spawn(|| database.try_sql(&format!("SELECT most_connections('{FEW}', {COUNTED_FOR})")));
        eventually("connections are counted", STARTS_WITHIN, || {
            let runs = "SELECT count(*) FROM pg_stat_activity WHERE query LIKE 'SELECT most_connections(%' AND state = 'active'";
            match database.try_sql(runs)?.as_str() {
                "1" => Ok(()),
                found => Err(format!("by {found}")),
            }
        });
        let readers: Vec<_> = (0..).zip(&pods).map(|(at, pod)| scope.spawn(move || read(&name(pod), at))).collect();
        let faults: Vec<String> = readers.into_iter().flat_map(|reader| reader.join().expect("a reader")).collect();
        assert!(faults.is_empty(), "{faults:?}\n{}", super::cluster::describe(PLACE));
        assert!(!counts.is_finished(), "connections were not counted to the end");
        database.sql("INSERT INTO counted_enough VALUES (now())");
        counts.join().expect("it counts").unwrap_or_else(|error| panic!("{error}"))
    });
    let loaded = loaded_by_relays(relays);
    let told = format!("{} pods, {loaded:?} keys loaded by a relay, {most} connections at the most", pods.len());
    assert!(most.parse().is_ok_and(|most| AT_ONCE.contains(&most)), "{told}");
    let wanted = (KEYS * pods.len()) as f64;
    assert!(loaded.iter().sum::<f64>() >= wanted, "{told}, and {wanted} keys were read");
    told
}

/// Waits until all sidecars load by the queue, of which they are told once a relay tends it: before, each has a connection of its own.
fn await_queue(pods: &[Value]) {
    await_snapshot("a queue of the origin", pods, |snapshot| {
        let origins = snapshot["origins"].as_array();
        origins.is_some_and(|origins| origins.iter().any(|origin| origin["name"] == FEW && origin["loadQueue"].is_string()))
    });
}

/// Has one pod read keys of its own: what was wrong.
fn read(pod: &str, at: usize) -> Vec<String> {
    let [first, count, connections] = [at * KEYS, KEYS, CONNECTIONS].map(|number| number.to_string());
    let line = ["-n", PLACE, "exec", pod, "-c", "app", "--", "python3", "-c", READS, &first, &count, &connections];
    let said = kubectl(&line).unwrap_or_else(|error| panic!("{error}"));
    serde_json::from_str(said.lines().last().unwrap_or_default()).unwrap_or_else(|error| panic!("{said}: {error}"))
}

/// How many keys each of the relays with these labels has loaded.
fn loaded_by_relays(labels: &str) -> Vec<f64> {
    let of = |relay: String| {
        let metrics = kubectl(&["get", "--raw", &format!("/api/v1/namespaces/{PLACE}/pods/{relay}:9122/proxy/metrics")]);
        let metrics = metrics.unwrap_or_else(|error| panic!("{relay}: {error}"));
        let counts = metrics.lines().filter(|line| line.starts_with("larder_relay_loads_total"));
        counts.filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok()).sum()
    };
    ready_pods(labels).iter().map(name).map(of).collect()
}
