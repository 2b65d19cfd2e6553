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

/// A rule whose table nobody follows, and how it is told that rows of it have changed.
struct Told {
    /// The rule, its keys, and its table.
    name: &'static str,
    /// How it is invalidated, if not by its keys.
    invalidate: Option<fn() -> Value>,
    /// What the event about the first row says.
    event: [&'static str; 2],
    /// What the command about the second row says.
    command: &'static [&'static str],
}

const TOLD: [Told; 2] = [
    Told { name: "told", invalidate: None, event: ["key", "told:1"], command: &["told:2"] },
    Told {
        name: "edition",
        invalidate: Some(|| json!({"versioned": "Rule", "tags": ["edition:{id}"]})),
        event: ["tag", "edition:1"],
        command: &["--rule", "edition"],
    },
];
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

/// Rules that load, and follow no table.
pub fn rules(origin: &str) -> Vec<Value> {
    let rule = |told: &Told| {
        let Told { name, invalidate, .. } = told;
        let mut rule = json!({
            "name": name, "keys": format!("{name}:{{id}}"), "strategy": "ReadThrough", "ttl": "1h",
            "origin": {"name": origin, "read": format!("SELECT value FROM {name} WHERE id = $id::int")},
        });
        if let Some(invalidate) = invalidate {
            rule["invalidate"] = invalidate();
        }
        rule
    };
    TOLD.iter().map(rule).collect()
}

/// Changes a row, and lets some time go by in which nobody tells of it: what the time is then, in milliseconds since 1970.
fn change(database: &Database, table: &str, row: u32) -> u64 {
    database.sql(&format!("UPDATE {table} SET value = value + 1 WHERE id = {row}"));
    thread::sleep(UNTOLD);
    let now = database.sql(&format!("SELECT {NOW}"));
    now.parse().unwrap_or_else(|error| panic!("{now:?}: {error}"))
}

/// Two rows of each table change; each is seen by every pod of a Deployment from some seconds after somebody said so, and not before.
pub fn what_is_told_is_seen(tier: &Tier, database: &Database, deployment: &str) -> String {
    let pods = ready_pods(&format!("app={deployment}"));
    let said: Vec<String> = TOLD.iter().map(|told| is_seen(told, (tier, database), deployment, &pods)).collect();
    let ways = TOLD.map(|told| format!("`{}` and `{}`", told.event.join(" "), told.command.join(" "))).join(", ");
    format!("{ways} (which said {said:?}): seen by {} pods within {BOUND:?}", pods.len())
}

/// What the command said.
fn is_seen(told: &Told, (tier, database): (&Tier, &Database), deployment: &str, pods: &[Value]) -> String {
    let table = told.name;
    database.sql(&format!("CREATE TABLE {table} (id int PRIMARY KEY, value bigint NOT NULL)"));
    database.sql(&format!("CREATE TABLE {table}_history (id int, value bigint, at bigint)"));
    database.sql(&format!("INSERT INTO {table} SELECT n, 0 FROM generate_series(1, {ROWS}) AS n"));
    let note = |row: u32| {
        database.sql(&format!("INSERT INTO {table}_history SELECT id, value, {NOW} FROM {table} WHERE id = {row}"));
    };
    let begin = |pod: &Value| Reader::begin(&name(pod), table, ROWS, (1, READ_FOR));
    let mut readers: Vec<Reader> = pods.iter().map(begin).collect();
    readers.iter_mut().for_each(Reader::await_reading);
    let primary = tier.primary();
    let first_told = change(database, table, 1);
    let [kind, what] = told.event;
    let event = tier.ask(&primary, "6379", &["XADD", "larder:events", "*", kind, what]);
    let event = event.unwrap_or_else(|error| panic!("{error}"));
    assert!(event.contains('-'), "XADD answered {event}");
    note(1);
    let workload = format!("deployment/{deployment}");
    let second_told = change(database, table, 2);
    let said = run(LARDER, &[&["invalidate"][..], told.command, &["--workload", &workload, "-n", PLACE]].concat(), "");
    let said = said.unwrap_or_else(|error| panic!("{error}"));
    note(2);
    let seen: Vec<Seen> = readers.into_iter().map(Reader::finish).collect();
    let history = history(database, &format!("{table}_history"));
    for (pod, seen) in pods.iter().zip(&seen) {
        judge(&name(pod), seen, &history, [first_told, second_told]);
    }
    said
}

/// `told`: when each row was told of.
fn judge(pod: &str, seen: &Seen, history: &Seen, told: [u64; 2]) {
    let late = late(seen, history, BOUND);
    assert!(late.is_empty(), "{pod} showed rows as they were for too long: {late:?} of {seen:?}, {history:?}");
    for (row, told) in (1..).zip(told) {
        let values = &seen[&format!("{row}")];
        let last = values.get(&0);
        assert!(last.is_some_and(|last| last + READ_AGAIN_MS >= told), "{pod}: nobody had to tell of row {row}: {seen:?}");
        assert!(values.contains_key(&1), "{pod} never showed row {row} as it is: {seen:?}, {history:?}");
    }
}
