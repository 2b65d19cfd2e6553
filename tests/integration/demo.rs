//! `larder demo` in small: a made-up data set and short phases, so that no speed is asserted, only what must hold at any speed.

use std::collections::HashMap;
use std::fs;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use larder::demo::data::Dataset;
use larder::demo::database::Database;
use larder::demo::keyspace::{Entity, Family, Keyspace};
use larder::demo::origin::Asking;
use larder::demo::records::Recorder;
use larder::demo::truth::Truth;
use serde_json::Value;
use tokio::runtime::Handle;

use crate::support::postgres::Postgres;
use crate::support::wait_for;

const PHASES: [&str; 5] = ["none", "aside", "observe", "aside+larder", "larder"];

/// What the demo prints, beside what it reports.
const PRINTED: &str = "printed.txt";

fn run_demo(report: &Path, options: &str) -> Value {
    let printed = fs::File::create(report.join(PRINTED)).unwrap();
    let mut demo = Command::new(env!("CARGO_BIN_EXE_larder"))
        .arg("demo")
        .args(options.split(' '))
        .arg("--report")
        .arg(report)
        .stdout(printed)
        .spawn()
        .unwrap();
    // The exit code tells whether the machine was fast enough as well, which is not the question here.
    wait_for("the demo ends", Duration::from_secs(180), || demo.try_wait().unwrap().is_some());
    let json = fs::read(report.join("demo.json")).expect("the demo writes its report");
    serde_json::from_slice(&json).unwrap()
}

/// The queries of one load as the report's own evidence has them: the key, and start and end in microseconds.
fn evidence(csv: &str, phase: &str, run: &str) -> Vec<(String, u64, u64)> {
    let lines = csv.lines().skip(1).map(|line| line.split(',').collect::<Vec<_>>());
    let micros = |text: &str| text.replace('.', "").parse::<u64>().expect("milliseconds with three digits");
    lines.filter(|cells| cells[..2] == [phase, run]).map(|c| (c[2].to_owned(), micros(c[3]), micros(c[4]))).collect()
}

/// The greatest number of queries for one key that overlap, counted the slow way: a peak is reached where one begins.
fn peak(queries: &[(String, u64, u64)]) -> u64 {
    let overlapping = |(key, at, _): &(String, u64, u64)| {
        queries.iter().filter(|(other, start, end)| other == key && start <= at && at < end).count() as u64
    };
    queries.iter().map(overlapping).max().unwrap_or_default()
}

#[test]
fn the_demo_counts_every_query_and_finds_no_wrong_reply_and_no_stampede() {
    let report = tempfile::tempdir().unwrap();
    let json = run_demo(report.path(), "--seconds 4 --rows 30000 --rate 300 --clients 24");
    let csv = fs::read_to_string(report.path().join("origin-queries.csv")).unwrap();
    let phases = json["phases"].as_array().unwrap();
    assert_eq!(phases.iter().map(|phase| phase["phase"].as_str().unwrap()).collect::<Vec<_>>(), PHASES);
    for phase in phases {
        assert_eq!(phase["wrong"], 0, "{phase}");
        assert_eq!(phase["errors"], 0, "{phase}");
        assert_eq!(phase["closed_loop"]["errors"], 0, "{phase}");
        assert!(phase["answered"].as_u64().unwrap() > 0, "{phase}");
        assert!(phase["requests"] == phases[0]["requests"], "{phase}");
        let name = phase["phase"].as_str().unwrap();
        let (open, closed) = (evidence(&csv, name, "open"), evidence(&csv, name, "closed"));
        for (queries, told) in [(&open, phase), (&closed, &phase["closed_loop"])] {
            assert_eq!(told["origin_queries"], queries.len(), "{told}");
            assert_eq!(told["peak_identical"], peak(queries), "{told}");
            assert!(queries.iter().all(|(_, start, end)| start < end), "{told}");
        }
        // What asks counts as well: sidecars in their metrics.
        assert_eq!(phase["counted_queries"], open.len() + closed.len(), "{phase}");
    }
    let alone = |name: &str| json["setting"]["query_alone"][name].as_f64().unwrap();
    assert!(0.0 < alone("p10_ms") && alone("p10_ms") <= alone("p50_ms") && alone("p50_ms") <= alone("p90_ms"), "{json}");
    let [none, aside, observe, through, larder] = phases.as_slice() else { panic!("five phases") };
    // Without a cache each answer is a query, to the last one.
    assert_eq!(none["origin_queries"], none["answered"], "{none}");
    assert_eq!(none["closed_loop"]["origin_queries"], none["closed_loop"]["answered"], "{none}");
    assert_eq!(none["hit_ratio"], 0.0);
    for enforced in [through, larder] {
        assert_eq!(enforced["peak_identical"], 1, "{enforced}");
        assert!(enforced["closed_loop"]["peak_identical"].as_u64().unwrap() <= 1, "{enforced}");
    }
    for cached in [aside, observe, through, larder] {
        // It loaded at all, and less often than it was asked; only the boards, since the history was there.
        assert!(cached["board_loads"].as_u64().unwrap() >= 2, "{cached}");
        assert!(cached["origin_queries"].as_u64() < cached["answered"].as_u64(), "{cached}");
        let queries = evidence(&csv, cached["phase"].as_str().unwrap(), "open");
        assert!(queries.iter().all(|(key, ..)| key.starts_with("board:")), "{queries:?}");
    }
    // What only observes saves nothing, and what acts does not predict.
    assert_eq!(observe["sidecars"]["loads_saved"], 0, "{observe}");
    assert_eq!(through["sidecars"]["predicted_loads_saved"], 0, "{through}");
    let told = &json["observed"];
    assert_eq!(told["predicted_loads_saved"], observe["sidecars"]["predicted_loads_saved"]);
    assert_eq!((&told["observed_queries"], &told["enforced_queries"]), (&observe["origin_queries"], &through["origin_queries"]));
    // No more can be saved than the queries that were made beyond the first of each expiry.
    assert!(told["predicted_loads_saved"].as_u64() < told["observed_queries"].as_u64(), "{told}");
    for file in ["demo.svg", "demo.txt", "sidecar-0.log"] {
        assert!(report.path().join(file).metadata().unwrap().len() > 200, "{file}");
    }
    let table = fs::read_to_string(report.path().join("demo.txt")).unwrap();
    let printed = fs::read_to_string(report.path().join(PRINTED)).unwrap();
    assert!(printed.contains(table.trim()), "{printed}");
    check_table(&table, &json);
}

/// The cells of the lines that begin with `name`, in order.
fn lines<'a>(table: &'a str, name: &str) -> Vec<Vec<&'a str>> {
    let rests = table.lines().filter_map(|line| line.strip_prefix(name)).filter(|rest| rest.starts_with(' '));
    rests.map(|rest| rest.split_whitespace().collect()).collect()
}

/// What people read is what programs read: each phase beside the others, and what was predicted beside what came of it.
fn check_table(table: &str, json: &Value) {
    let head = table.lines().find(|line| !line.is_empty()).unwrap_or_default();
    assert_eq!(head.split_whitespace().collect::<Vec<_>>(), PHASES, "{table}");
    let cells = |values: &[&Value]| values.iter().map(|value| value.to_string()).collect::<Vec<_>>();
    let phases = json["phases"].as_array().unwrap();
    let column = |name: &str| cells(&phases.iter().map(|phase| &phase[name]).collect::<Vec<_>>());
    let told = |name: &str| &json["observed"][name];
    assert_eq!(lines(table, "answered"), [column("answered")], "{table}");
    assert_eq!(lines(table, "identical queries at once, at most"), [column("peak_identical")], "{table}");
    assert_eq!(lines(table, "the same client, Larder:"), [["observing", "enforcing"]], "{table}");
    let saved = cells(&[told("predicted_loads_saved"), told("enforced_loads_saved")]);
    assert_eq!(lines(table, "loads saved, predicted and counted"), [saved], "{table}");
    let at_once = cells(&[told("predicted_stampede"), told("enforced_peak_identical")]);
    assert_eq!(lines(table, "identical misses at once, and queries"), [at_once], "{table}");
    let queries = cells(&[told("observed_queries"), told("enforced_queries")]);
    assert_eq!(lines(table, "origin queries"), [column("origin_queries"), queries], "{table}");
    // What is claimed of the plain client through Larder is claimed of that phase, beside the same client without.
    let [_, aside, _, through, _] = phases.as_slice() else { panic!("five phases") };
    let claims = json["expectations"].as_array().unwrap();
    let claim = "the same cache-aside client makes fewer queries through Larder";
    let made = claims.iter().find(|made| made["claim"] == claim).unwrap();
    let measured = format!("{} against {}", through["origin_queries"], aside["origin_queries"]);
    assert_eq!(made["measured"], measured, "{made}");
    let sign = if made["met"] == true { "met    " } else { "NOT MET" };
    assert!(table.lines().any(|line| line == format!("{sign}  {claim}: {measured}")), "{table}");
}

/// The server writes down every statement, which is a count that the demo has no part in.
#[test]
fn the_demo_runs_on_a_postgres_that_counts_the_same_queries() {
    let server = Postgres::start();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let url = runtime.block_on(server.database(&[]));
    let report = tempfile::tempdir().unwrap();
    let json = run_demo(report.path(), &format!("--seconds 2 --rows 5000 --rate 200 --clients 16 --database {url}"));
    let phases = json["phases"].as_array().unwrap();
    assert_eq!(phases.iter().map(|phase| phase["phase"].as_str().unwrap()).collect::<Vec<_>>(), PHASES);
    assert!(phases.iter().all(|phase| phase["wrong"] == 0 && phase["errors"] == 0), "{json}");
    // Those that were made one by one before there was any load are in no phase.
    let alone = json["setting"]["query_alone"]["queries"].as_u64().unwrap();
    let told: u64 = alone + phases.iter().map(|phase| phase["counted_queries"].as_u64().unwrap()).sum::<u64>();
    let executed = || {
        let log = server.log();
        let statements = log.split("execute <unnamed>: ").skip(1).map(|rest| rest.split("LOG: ").next().unwrap_or_default());
        statements.filter(|statement| statement.contains("larder_demo.flights")).count() as u64
    };
    wait_for("the server to write its log", Duration::from_secs(20), || executed() >= told);
    assert_eq!(executed(), told);
    assert!(told > 100, "{told} queries are few");
}

/// What applications and sidecars ask, against values that were counted without SQL, while rows change.
async fn statements_agree_with_the_truth(dataset: &Dataset, database: Database) {
    let keyspace = Keyspace::of(dataset);
    let truth = Truth::new(dataset, &keyspace);
    let keys: Vec<String> = keyspace.entities.iter().map(Entity::key).collect();
    let asking = Asking::new(&database, Handle::current(), Arc::new(Recorder::new(&keys))).unwrap();
    let ask = |family: Family, key: String| {
        let asking = asking.clone();
        async move { tokio::task::spawn_blocking(move || asking.query(family, &key)).await.unwrap().expect("an answer") }
    };
    let mut random = fastrand::Rng::with_seed(7);
    for _ in 0..3 {
        for index in (0..keys.len()).step_by(173).chain(0..keyspace.boards) {
            let value = ask(keyspace.entities[index].family(), keys[index].clone()).await;
            assert_eq!(value, Some(truth.current(index)), "{}", keys[index]);
        }
        let update = truth.next_update(&mut random).expect("flights leave today");
        truth.update_sent(update, std::time::Instant::now());
        database.apply(update).await.expect("updates");
    }
    for (family, key) in [(Family::Board, "board:XXX"), (Family::Flight, "flight:AA:1x:1"), (Family::Flight, "flight:AA:0:1")] {
        assert_eq!(ask(family, key.to_owned()).await, None, "{key}");
    }
    let history: HashMap<_, _> = database.history().await.unwrap().into_iter().collect();
    assert!((keyspace.boards..keys.len()).all(|index| history[&keys[index]] == truth.current(index)));
    database.close().await;
}

#[tokio::test]
async fn the_demos_statements_agree_with_the_truth_in_sqlite() {
    let dataset = Dataset::generate(3000);
    let dir = tempfile::tempdir().unwrap();
    let database = Database::open_sqlite(&dataset, None, &dir.path().join("flights.db")).await.unwrap();
    statements_agree_with_the_truth(&dataset, database).await;
}

#[tokio::test]
async fn the_demos_statements_agree_with_the_truth_in_postgres() {
    let dataset = Dataset::generate(3000);
    let server = Postgres::shared();
    let database = Database::open_postgres(&dataset, &server.database(&[]).await).await.unwrap();
    statements_agree_with_the_truth(&dataset, database).await;
}
