//! What changed without the database telling of it: somebody says so, in the stream of events by the engine's own client, or with
//! `larder invalidate` from where a person sits. Every pod then shows what is there now.

use std::thread;
use std::time::Duration;

use serde_json::{Value, json};

use super::cluster::{name, run};
use super::database::Database;
use super::install::PLACE;
use super::readers::{Reader, Seen, history, late};
use super::tier::{Tier, ready_pods};
use super::workloads::LARDER;

/// The rule, its keys, and its table.
const TOLD: &str = "told";
/// One row is told of by an event, the other by command.
const ROWS: u32 = 2;
/// An event is carried out some milliseconds later, and five seconds where the sidecar that reads the stream has just died; on two processors
/// that have much else to do.
const BOUND: Duration = Duration::from_secs(15);
/// Long enough that every pod shows a row as it was, once nobody has told yet that it changed.
const UNTOLD: Duration = Duration::from_secs(3);
/// Within which every pod has read each row once more, in milliseconds: well below [`UNTOLD`].
const READ_AGAIN_MS: u64 = 1_000;
/// How long pods read at the most: they end when they have seen both rows as they are.
const READ_FOR: Duration = Duration::from_secs(240);
const NOW: &str = "(extract(epoch FROM clock_timestamp()) * 1000)::bigint";

/// A rule that loads, and follows no table.
pub fn rule(origin: &str) -> Value {
    json!({
        "name": TOLD, "keys": "told:{id}", "strategy": "ReadThrough", "ttl": "1h",
        "origin": {"name": origin, "read": "SELECT value FROM told WHERE id = $id::int"},
    })
}

/// Changes a row, and lets some time go by in which nobody tells of it: what the time is then, in milliseconds since 1970.
fn change(database: &Database, row: u32) -> u64 {
    database.sql(&format!("UPDATE told SET value = value + 1 WHERE id = {row}"));
    thread::sleep(UNTOLD);
    let now = database.sql(&format!("SELECT {NOW}"));
    now.parse().unwrap_or_else(|error| panic!("{now:?}: {error}"))
}

/// Two rows change; each is seen by every pod of a Deployment from some seconds after somebody said so, and not before.
pub fn what_is_told_is_seen(tier: &Tier, database: &Database, deployment: &str) -> String {
    database.sql("CREATE TABLE told (id int PRIMARY KEY, value bigint NOT NULL)");
    database.sql("CREATE TABLE told_history (id int, value bigint, at bigint)");
    database.sql(&format!("INSERT INTO told SELECT n, 0 FROM generate_series(1, {ROWS}) AS n"));
    let note = |row: u32| {
        database.sql(&format!("INSERT INTO told_history SELECT id, value, {NOW} FROM told WHERE id = {row}"));
    };
    let pods = ready_pods(&format!("app={deployment}"));
    let begin = |pod: &Value| Reader::begin(&name(pod), TOLD, ROWS, (1, READ_FOR));
    let mut readers: Vec<Reader> = pods.iter().map(begin).collect();
    readers.iter_mut().for_each(Reader::await_reading);
    let primary = tier.primary();
    let first_told = change(database, 1);
    let event = tier.ask(&primary, "6379", &["XADD", "larder:events", "*", "key", "told:1"]);
    let event = event.unwrap_or_else(|error| panic!("{error}"));
    assert!(event.contains('-'), "XADD answered {event}");
    note(1);
    let workload = format!("deployment/{deployment}");
    let second_told = change(database, 2);
    let said = run(LARDER, &["invalidate", "told:2", "--workload", &workload, "-n", PLACE], "");
    let said = said.unwrap_or_else(|error| panic!("{error}"));
    note(2);
    let seen: Vec<Seen> = readers.into_iter().map(Reader::finish).collect();
    let history = history(database, "told_history");
    for (pod, seen) in pods.iter().zip(&seen) {
        let late = late(seen, &history, BOUND);
        assert!(late.is_empty(), "{} showed rows as they were for too long: {late:?} of {seen:?}, {history:?}", name(pod));
        for (row, told) in (1..).zip([first_told, second_told]) {
            let values = &seen[&format!("{row}")];
            assert!(
                values.get(&0).is_some_and(|last| last + READ_AGAIN_MS >= told),
                "{}: nobody had to tell of row {row}: {seen:?}",
                name(pod)
            );
            assert!(values.contains_key(&1), "{} never showed row {row} as it is: {seen:?}, {history:?}", name(pod));
        }
    }
    format!("an event, and `larder invalidate`, which said {said:?}: seen by {} pods within {BOUND:?}", pods.len())
}
