//! Write-through on Kubernetes: while the cache's primary goes, what was acknowledged is in the database, and nobody reads what was there before,
//! through whichever pod.

use std::collections::BTreeMap;
use std::thread;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde_json::{Value, json};

use super::cluster::{kubectl, name};
use super::database::Database;
use super::disruptions::another_reigns;
use super::install::PLACE;
use super::tier::Tier;
use super::write_behind::Written;

/// How long pods write and read, and when the primary's pod is deleted, which may be primary for another 55 s.
const LASTS: Duration = Duration::from_secs(120);
const DELETED_AFTER: Duration = Duration::from_secs(20);
/// The table, and the rule.
const TABLE: &str = "through";

/// Writes rising numbers to twenty keys, one after another; says which it sent last for each, and each that was acknowledged, and when at the
/// latest, in milliseconds since 1970.
const WRITER: &str = "
import json, os, sys, time, redis
client = redis.from_url(os.environ['REDIS_URL'], socket_timeout=15)
number, sent, acknowledged, refused, why, end = 0, {}, [], 0, '', time.time() + float(sys.argv[1])
while time.time() < end:
    number += 1
    key = str(number % 20)
    sent[key] = number
    try:
        client.set('through:' + key, number)
        acknowledged.append((int(time.time() * 1000) + 1, key, number))
    except redis.RedisError as error:
        refused, why = refused + 1, str(error)
    time.sleep(0.02)
print(json.dumps({'sent': sent, 'acknowledged': acknowledged, 'refused': refused, 'why': why}))
";

/// Reads these keys; says what each read brought, and when it began at the earliest.
const READER: &str = "
import json, os, random, sys, time, redis
client = redis.from_url(os.environ['REDIS_URL'], socket_timeout=15)
reads, refused, why, end = [], 0, '', time.time() + float(sys.argv[1])
while time.time() < end:
    key, began = str(random.randrange(20)), int(time.time() * 1000)
    try:
        value = client.get('through:' + key)
        reads.append((began, key, None if value is None else int(value)))
    except redis.RedisError as error:
        refused, why = refused + 1, str(error)
    time.sleep(0.01)
print(json.dumps({'reads': reads, 'refused': refused, 'why': why}))
";

/// When something was acknowledged or a read began, its key, and the number.
type Acknowledged = (u64, String, u64);
type Read = (u64, String, Option<u64>);

pub fn rule(origin: &str) -> Value {
    json!({
        "name": TABLE, "keys": "through:{id}", "strategy": "WriteThrough", "ttl": "1h",
        "origin": {
            "name": origin, "read": "SELECT value FROM through WHERE id = $id",
            "write": "INSERT INTO through VALUES ($id, $value) ON CONFLICT (id) DO UPDATE SET value = $value",
            "delete": "DELETE FROM through WHERE id = $id",
        },
    })
}

pub fn prepare(database: &Database) {
    database.sql("CREATE TABLE through (id text PRIMARY KEY, value text)");
}

/// One pod writes and all read, before the primary's pod is deleted, meanwhile, and once another is primary.
pub fn what_is_acknowledged_is_there_and_seen(tier: &Tier, database: &Database, pods: &[Value]) -> String {
    let (said, reads, deleted, moved) = thread::scope(|scope| {
        let writer = scope.spawn(|| run(&name(&pods[0]), WRITER));
        let readers: Vec<_> = pods.iter().map(|pod| scope.spawn(|| run(&name(pod), READER))).collect();
        thread::sleep(DELETED_AFTER);
        let (deleted, moved) = delete_primary(tier);
        let reads: Vec<Value> = readers.into_iter().map(|reader| reader.join().expect("a reader")).collect();
        (writer.join().expect("a writer"), reads, deleted, moved)
    });
    let acknowledged: Vec<Acknowledged> = serde_json::from_value(said["acknowledged"].clone()).expect("numbers");
    let numbers = |said: &Value| serde_json::from_value::<Vec<Read>>(said["reads"].clone()).expect("reads");
    let by_pod: Vec<Vec<Read>> = reads.iter().map(numbers).collect();
    let all = by_pod.concat();
    let refused: Vec<String> =
        std::iter::once(&said).chain(&reads).map(|said| format!("{} refused, {}", said["refused"], said["why"])).collect();
    let told = format!("{} writes acknowledged, {} reads; {refused:?}", acknowledged.len(), all.len());
    let wrong = older(&acknowledged, &all);
    assert!(
        wrong.is_empty(),
        "{} reads showed what was there before, such as {:?}: {told}",
        wrong.len(),
        &wrong[..wrong.len().min(5)]
    );
    let written = Written {
        sent: serde_json::from_value(said["sent"].clone()).expect("numbers"),
        acknowledged: acknowledged.iter().map(|(_, key, number)| (key.clone(), *number)).collect(),
        ..Written::default()
    };
    written.is_in(&database.numbers(TABLE)).unwrap_or_else(|wrong| panic!("{wrong}: {told}"));
    assert!(acknowledged.iter().any(|(at, ..)| *at < deleted), "nothing was written at the first primary: {told}");
    assert!(acknowledged.iter().any(|(at, ..)| *at > moved), "nothing was written at the next primary: {told}");
    for (pod, reads) in pods.iter().zip(&by_pod) {
        assert!(reads.iter().any(|(at, ..)| *at > moved), "{} read nothing at the next primary: {told}", name(pod));
    }
    tier.settle("after its primary's pod was deleted");
    told
}

/// Deletes the primary's pod: when that began, and when another was primary, in milliseconds since 1970. Pods have this machine's clock.
fn delete_primary(tier: &Tier) -> (u64, u64) {
    let now = || {
        let since = SystemTime::now().duration_since(UNIX_EPOCH).expect("a time");
        u64::try_from(since.as_millis()).expect("a time")
    };
    let primary = tier.reign();
    let deleted = now();
    kubectl(&["-n", PLACE, "delete", "pod", &primary.pod, "--wait=false"]).expect("deleted");
    another_reigns(tier, &primary);
    (deleted, now())
}

/// Runs a program in a pod for as long as this lasts: what it says.
fn run(pod: &str, program: &str) -> Value {
    let seconds = LASTS.as_secs().to_string();
    let said = kubectl(&["-n", PLACE, "exec", pod, "-c", "app", "--", "python3", "-c", program, &seconds]);
    let said = said.unwrap_or_else(|error| panic!("{error}"));
    serde_json::from_str(said.lines().last().unwrap_or_default()).unwrap_or_else(|error| panic!("{pod}: {error}"))
}

/// The reads that began once a later number of their key was acknowledged, each with that.
fn older(acknowledged: &[Acknowledged], reads: &[Read]) -> Vec<(Read, u64)> {
    let mut by_key: BTreeMap<&str, Vec<(u64, u64)>> = BTreeMap::new();
    for (at, key, number) in acknowledged {
        by_key.entry(key.as_str()).or_default().push((*at, *number));
    }
    let least = |began: u64, key: &str| {
        let numbers = by_key.get(key)?;
        let before = numbers.partition_point(|(at, _)| *at <= began);
        Some(numbers[before.checked_sub(1)?].1)
    };
    let is_older = |read: &&Read| least(read.0, &read.1).is_some_and(|least| read.2.is_none_or(|number| number < least));
    reads.iter().filter(is_older).map(|read| (read.clone(), least(read.0, &read.1).unwrap_or_default())).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_read_is_held_to_what_was_acknowledged_before_it_began() {
        let key = |key: &str| key.to_owned();
        let acknowledged = [(10, key("a"), 1), (20, key("a"), 3), (15, key("b"), 2)];
        let right = [
            (9, key("a"), None),
            (10, key("a"), Some(1)),
            (19, key("a"), Some(3)),
            (20, key("b"), Some(4)),
            (30, key("c"), None),
        ];
        assert_eq!(older(&acknowledged, &right), []);
        let wrong = [(20, key("a"), Some(1)), (15, key("b"), None)];
        assert_eq!(older(&acknowledged, &wrong), [(wrong[0].clone(), 3), (wrong[1].clone(), 2)]);
    }
}
