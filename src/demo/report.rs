//! The report: a table for people, `demo.json` for programs, a picture, and the origin's records as evidence.

use std::fmt::Write as _;
use std::time::Duration;

use serde::Serialize;

use super::alone::Alone;
use super::keyspace::Family;
use super::phases::{Kind, Phase, Run, millis};
use super::process::Told;
use super::records::{Record, peak_identical};
use super::{DemoError, Setting};

mod picture;

/// The whole outcome, as it stands in `demo.json`.
#[derive(Debug, Serialize)]
pub struct Report {
    /// What was run.
    pub setting: SettingReport,
    /// In the order in which they ran.
    pub phases: Vec<PhaseReport>,
    /// What Larder predicted while it only observed, beside what it then did.
    pub observed: Option<Observed>,
    /// What was expected, and whether it was met.
    pub expectations: Vec<Expectation>,
}

/// Predictions of the open loop under Observe, and what the same load then met under Enforce.
#[derive(Debug, Serialize)]
pub struct Observed {
    /// Loads that Larder would have saved.
    pub predicted_loads_saved: u64,
    /// Loads that it then saved, by its own count.
    pub enforced_loads_saved: u64,
    /// The most identical misses at once that one sidecar saw.
    pub predicted_stampede: u64,
    /// The most identical queries at once that remained.
    pub enforced_peak_identical: usize,
    /// Queries while it only observed.
    pub observed_queries: usize,
    /// Queries that remained.
    pub enforced_queries: usize,
}

/// What was run.
#[derive(Debug, Serialize)]
pub struct SettingReport {
    /// SQLite or Postgres.
    pub database: &'static str,
    /// Distinct keys.
    pub keys: usize,
    /// The skew.
    pub zipf: f64,
    /// The seed.
    pub seed: u64,
    /// Requests a second in the open loop.
    pub rate: f64,
    /// Clients with a connection each.
    pub clients: usize,
    /// The length of each open loop.
    pub seconds: f64,
    /// The TTL of the hot keys.
    pub board_ttl_ms: u64,
    /// The TTL of all other keys.
    pub flight_ttl_ms: u64,
    /// The most queries at once, in every phase.
    pub connections: u32,
    /// What a query took before there was any load.
    pub query_alone: Alone,
}

/// One phase.
#[derive(Debug, Serialize)]
pub struct PhaseReport {
    /// Which.
    pub phase: Kind,
    /// Requests that fell due in the open loop.
    pub requests: u64,
    /// Those that were answered.
    pub answered: u64,
    /// Those whose time came while every client was still waiting, until the end.
    pub unanswered: u64,
    /// Those that got an error.
    pub errors: u64,
    /// Answers a second in the open loop.
    pub throughput: f64,
    /// From the time at which a request was due.
    pub p50_ms: f64,
    /// Likewise.
    pub p99_ms: f64,
    /// Likewise.
    pub max_ms: f64,
    /// Queries at the origin.
    pub origin_queries: usize,
    /// The median time of one, without the wait for a free connection.
    pub query_p50_ms: f64,
    /// Those that got no answer.
    pub failed_queries: usize,
    /// The queries of both loops, by the counters of those who made them: the records must agree.
    pub counted_queries: u64,
    /// The greatest number of identical queries under way at once at the origin.
    pub peak_identical: usize,
    /// The share of answered requests that needed no query of their own.
    pub hit_ratio: f64,
    /// Replies that were not the key's value within the allowed staleness, in both loops.
    pub wrong: u64,
    /// How old the oldest reply about a hot key was.
    pub oldest_board_ms: u64,
    /// How often each hot key was loaded, at least.
    pub board_loads: usize,
    /// What the sidecars told of the open loop, where there were any.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sidecars: Option<Told>,
    /// The closed loop.
    pub closed_loop: ClosedReport,
}

/// The closed loop of a phase.
#[derive(Debug, Serialize)]
pub struct ClosedReport {
    /// Requests that were answered.
    pub answered: u64,
    /// The greatest throughput: answers a second with all clients always asking.
    pub throughput: f64,
    /// From the sending of a request.
    pub p50_ms: f64,
    /// Likewise.
    pub p99_ms: f64,
    /// Queries at the origin.
    pub origin_queries: usize,
    /// The greatest number of identical queries under way at once at the origin.
    pub peak_identical: usize,
    /// Requests that got an error.
    pub errors: u64,
}

/// Something that Larder claims.
#[derive(Debug, Serialize)]
pub struct Expectation {
    /// The claim.
    pub claim: &'static str,
    /// What was measured.
    pub measured: String,
    /// Whether it held.
    pub met: bool,
}

impl PhaseReport {
    fn new(setting: &Setting, phase: &Phase) -> Self {
        let Run { tally: open, records } = &phase.open;
        let mut queries: Vec<Duration> = records.iter().map(Record::took).collect();
        queries.sort_unstable();
        let query_p50 = queries.get(queries.len() / 2).copied().unwrap_or_default();
        Self {
            phase: phase.kind,
            requests: setting.schedule.arrivals.len() as u64,
            answered: open.answered,
            unanswered: open.unanswered,
            errors: open.errors,
            throughput: rounded(open.throughput()),
            p50_ms: phase.latency_ms(0.50),
            p99_ms: phase.latency_ms(0.99),
            max_ms: phase.latency_ms(1.0),
            origin_queries: records.len(),
            query_p50_ms: rounded(query_p50.as_secs_f64() * 1000.0),
            failed_queries: records.iter().filter(|record| record.outcome != "answered").count(),
            counted_queries: phase.counted,
            peak_identical: peak_identical(records),
            hit_ratio: (phase.hit_ratio() * 10_000.0).round() / 10_000.0,
            wrong: phase.wrong,
            oldest_board_ms: open.oldest(Family::Board).as_millis() as u64,
            board_loads: phase.board_loads(setting),
            sidecars: phase.told,
            closed_loop: ClosedReport::new(&phase.closed),
        }
    }
}

impl ClosedReport {
    fn new(Run { tally, records }: &Run) -> Self {
        Self {
            answered: tally.answered,
            throughput: rounded(tally.throughput()),
            p50_ms: millis(&tally.latency_us, 0.50),
            p99_ms: millis(&tally.latency_us, 0.99),
            origin_queries: records.len(),
            peak_identical: peak_identical(records),
            errors: tally.errors,
        }
    }
}

fn rounded(value: f64) -> f64 {
    (value * 10.0).round() / 10.0
}

impl PhaseReport {
    fn queries_per_answer(&self) -> f64 {
        self.origin_queries as f64 / self.answered.max(1) as f64
    }

    fn all_errors(&self) -> u64 {
        self.errors + self.closed_loop.errors
    }

    /// In either loop.
    fn greatest_peak(&self) -> usize {
        self.peak_identical.max(self.closed_loop.peak_identical)
    }
}

impl Report {
    /// The report of these phases.
    pub fn new(setting: &Setting, phases: &[Phase]) -> Self {
        let config = &setting.config;
        let miscounted = phases.iter().filter(|phase| phase.recorded != phase.counted).count();
        let phases: Vec<_> = phases.iter().map(|phase| PhaseReport::new(setting, phase)).collect();
        let observed = observed(&phases);
        let expectations = expectations(&phases, miscounted);
        Self {
            setting: SettingReport {
                database: if config.database.is_some() { "Postgres" } else { "SQLite" },
                keys: setting.keys.len(),
                zipf: super::keyspace::ZIPF_EXPONENT,
                seed: super::keyspace::SEED,
                rate: config.rate,
                clients: config.clients,
                seconds: config.length.as_secs_f64(),
                board_ttl_ms: config.ttls.board.as_millis() as u64,
                flight_ttl_ms: config.ttls.flight.as_millis() as u64,
                connections: super::origin::CONNECTIONS,
                query_alone: setting.alone,
            },
            phases,
            observed,
            expectations,
        }
    }

    /// Whether every expectation was met.
    pub fn met(&self) -> bool {
        self.expectations.iter().all(|expectation| expectation.met)
    }

    /// The table and the expectations, for people.
    pub fn table(&self) -> String {
        let mut text = String::from("\n");
        let mut row = |name: &str, cell: &dyn Fn(&PhaseReport) -> String| {
            let cells: String = self.phases.iter().map(|phase| format!("{:>14}", cell(phase))).collect();
            // Writing to a String cannot fail.
            let _ = writeln!(text, "{name:<42}{cells}");
        };
        row("", &|phase| phase.phase.to_string());
        row("requests", &|phase| phase.requests.to_string());
        row("answered", &|phase| phase.answered.to_string());
        row("throughput, a second", &|phase| format!("{:.0}", phase.throughput));
        row("p50", &|phase| show_ms(phase.p50_ms));
        row("p99", &|phase| show_ms(phase.p99_ms));
        row("max", &|phase| show_ms(phase.max_ms));
        row("origin queries", &|phase| phase.origin_queries.to_string());
        row("identical queries at once, at most", &|phase| phase.peak_identical.to_string());
        row("hit ratio", &|phase| format!("{:.1} %", phase.hit_ratio * 100.0));
        row("wrong replies", &|phase| phase.wrong.to_string());
        row("errors", &|phase| phase.all_errors().to_string());
        row("greatest throughput (closed loop)", &|phase| format!("{:.0}", phase.closed_loop.throughput));
        if let Some(observed) = &self.observed {
            let _ = write!(text, "\n{}", observed.told());
        }
        text.push('\n');
        for expectation in &self.expectations {
            let sign = if expectation.met { "met    " } else { "NOT MET" };
            let _ = writeln!(text, "{sign}  {}: {}", expectation.claim, expectation.measured);
        }
        text
    }
}

fn show_ms(value: f64) -> String {
    if value >= 1000.0 { format!("{:.1} s", value / 1000.0) } else { format!("{value:.2} ms") }
}

impl Observed {
    /// Prediction and outcome, for people.
    fn told(&self) -> String {
        let line = |what: &str, observed: String, enforced: String| format!("{what:<42}{observed:>14}{enforced:>14}\n");
        let number = |count: u64| count.to_string();
        [
            line("the same client, Larder:", "observing".to_owned(), "enforcing".to_owned()),
            line("loads saved, predicted and counted", number(self.predicted_loads_saved), number(self.enforced_loads_saved)),
            line(
                "identical misses at once, and queries",
                number(self.predicted_stampede),
                self.enforced_peak_identical.to_string(),
            ),
            line("origin queries", self.observed_queries.to_string(), self.enforced_queries.to_string()),
        ]
        .concat()
    }
}

fn observed(phases: &[PhaseReport]) -> Option<Observed> {
    let find = |kind| phases.iter().find(|phase| phase.phase == kind);
    let (observe, enforce) = (find(Kind::Observe)?, find(Kind::AsideLarder)?);
    let (predicted, enforced) = (observe.sidecars?, enforce.sidecars?);
    Some(Observed {
        predicted_loads_saved: predicted.predicted_loads_saved,
        enforced_loads_saved: enforced.loads_saved,
        predicted_stampede: predicted.predicted_stampede,
        enforced_peak_identical: enforce.peak_identical,
        observed_queries: observe.origin_queries,
        enforced_queries: enforce.origin_queries,
    })
}

/// What is expected of Larder, beside the other phases. `miscounted`: of how many phases records and counters differ.
fn expectations(phases: &[PhaseReport], miscounted: usize) -> Vec<Expectation> {
    let find = |kind| phases.iter().find(|phase| phase.phase == kind);
    let mut expectations = Vec::new();
    if let (Some(none), Some(aside), Some(larder)) = (find(Kind::None), find(Kind::Aside), find(Kind::Larder)) {
        expectations.extend(against_none(none, larder));
        expectations.extend(against_aside(aside, larder));
        let loads = larder.board_loads;
        expectations.push(expect("every hot key expired at least 5 times", loads >= 6, format!("{loads} loads each")));
    }
    if let (Some(aside), Some(through)) = (find(Kind::Aside), find(Kind::AsideLarder)) {
        expectations.extend(same_client(aside, through));
    }
    let total = |count: fn(&PhaseReport) -> u64| phases.iter().map(count).sum::<u64>();
    let (wrong, errors) = (total(|phase| phase.wrong), total(PhaseReport::all_errors));
    let answered = total(|phase| phase.answered + phase.closed_loop.answered);
    expectations.push(expect("no wrong reply in any phase", wrong == 0, format!("{wrong} of {answered}")));
    expectations.push(expect("no error in any phase", errors == 0, format!("{errors} beside {answered} answers")));
    let agree = format!("{} of {} phases", phases.len() - miscounted, phases.len());
    expectations.push(expect("the records of queries agree with the counters of those who made them", miscounted == 0, agree));
    expectations
}

fn expect(claim: &'static str, met: bool, measured: String) -> Expectation {
    Expectation { claim, measured, met }
}

fn against_none(none: &PhaseReport, larder: &PhaseReport) -> [Expectation; 4] {
    let saved = |larder: f64, none: f64| 100.0 * (1.0 - larder / none.max(f64::MIN_POSITIVE));
    let raw = saved(larder.origin_queries as f64, none.origin_queries as f64);
    let each = saved(larder.queries_per_answer(), none.queries_per_answer());
    let gain = larder.closed_loop.throughput / none.closed_loop.throughput.max(f64::MIN_POSITIVE);
    [
        expect(
            "at least 90 % fewer queries than without a cache",
            raw >= 90.0,
            format!("{raw:.1} % ({} against {})", larder.origin_queries, none.origin_queries),
        ),
        expect(
            "at least 90 % fewer queries for each answer",
            each >= 90.0,
            format!("{each:.2} % (answers: {} against {})", larder.answered, none.answered),
        ),
        expect("p50 below 2 ms", larder.p50_ms < 2.0, format!("{} against {}", show_ms(larder.p50_ms), show_ms(none.p50_ms))),
        expect("at least 10 times the greatest throughput without a cache", gain >= 10.0, format!("{gain:.0} times")),
    ]
}

fn against_aside(aside: &PhaseReport, larder: &PhaseReport) -> [Expectation; 2] {
    [
        expect(
            "fewer queries than plain cache-aside",
            larder.origin_queries < aside.origin_queries,
            format!("{} against {}", larder.origin_queries, aside.origin_queries),
        ),
        expect(
            "never two identical queries at once",
            larder.greatest_peak() == 1,
            format!("{} against {}", larder.greatest_peak(), aside.greatest_peak()),
        ),
    ]
}

fn same_client(aside: &PhaseReport, through: &PhaseReport) -> [Expectation; 2] {
    [
        expect(
            "the same cache-aside client makes fewer queries through Larder",
            through.origin_queries < aside.origin_queries,
            format!("{} against {}", through.origin_queries, aside.origin_queries),
        ),
        expect(
            "and never two identical ones at once",
            through.greatest_peak() == 1,
            format!("{} against {}", through.greatest_peak(), aside.greatest_peak()),
        ),
    ]
}

/// Writes everything into the report's directory.
///
/// # Errors
/// Where a file cannot be written.
pub fn write(setting: &Setting, phases: &[Phase], report: &Report) -> Result<(), DemoError> {
    let dir = &setting.config.report;
    let json = serde_json::to_string_pretty(report).map_err(|error| DemoError::Report(error.to_string()))?;
    std::fs::write(dir.join("demo.json"), json + "\n")?;
    std::fs::write(dir.join("demo.txt"), report.table())?;
    std::fs::write(dir.join("origin-queries.csv"), records(phases))?;
    picture::draw(&dir.join("demo.svg"), phases, report).map_err(DemoError::Report)
}

/// Start and end of every query, in milliseconds since the phase's open loop began.
fn records(phases: &[Phase]) -> String {
    let mut text = String::from("phase,loop,query,start_ms,end_ms,outcome\n");
    for phase in phases {
        for (name, run) in [("open", &phase.open), ("closed", &phase.closed)] {
            for Record { query, start_us, end_us, outcome } in &run.records {
                let [start, end] = [start_us, end_us].map(|at| at.saturating_sub(phase.start_us) as f64 / 1000.0);
                // Writing to a String cannot fail.
                let _ = writeln!(text, "{},{name},{query},{start:.3},{end:.3},{outcome}", phase.kind);
            }
        }
    }
    text
}
