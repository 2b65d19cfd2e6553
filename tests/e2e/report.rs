//! The tables of what was measured: row by row, on standard error as it comes, and by case, in one file.

use std::fmt::Write as _;
use std::fs;
use std::path::Path;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use super::tier::Tier;
use super::writers::Report;

/// From how many values on a median says something. Fewer are all shown, so that those of several runs can be put together.
const ENOUGH_FOR_MEDIAN: usize = 5;

/// One row.
pub struct Line {
    pub tier: String,
    /// Whether that is a Cluster.
    pub cluster: bool,
    pub case: String,
    pub report: Option<Report>,
    /// From the first write to the reading back of the last.
    pub took: Option<Duration>,
    pub problem: Option<String>,
}

impl Line {
    pub fn of(tier: &Tier, case: &str) -> Self {
        let (tier, cluster) = (tier.name.clone(), tier.is_cluster());
        Self { tier, cluster, case: case.to_owned(), report: None, took: None, problem: None }
    }

    /// A row about the shop, with figures of its own.
    pub fn figures(case: &str, took: Option<Duration>, figures: &str) -> Self {
        let (tier, problem) = ("shop".to_owned(), Some(figures.to_owned()));
        Self { tier, cluster: false, case: case.to_owned(), report: None, took, problem }
    }
}

static LINES: Mutex<Vec<Line>> = Mutex::new(Vec::new());

/// Adds a row, and writes the file anew: a run that is cut off leaves what it has.
pub fn add(line: Line) {
    eprintln!("{}", row(&line).trim_end());
    let mut lines = LINES.lock().unwrap_or_else(PoisonError::into_inner);
    lines.push(line);
    let mut text = String::from(
        "| tier | case | s | acknowledged | failed attempts | lost | longest gap, ms | faults, problems |\n\
         |---|---|---|---|---|---|---|---|\n",
    );
    for line in lines.iter() {
        text.push_str(&row(line));
    }
    text.push_str(&by_case(&lines));
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/e2e.md");
    fs::write(&path, text).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
}

fn row(line: &Line) -> String {
    let took = line.took.map(|took| took.as_secs().to_string()).unwrap_or_default();
    let mut text = format!("| {} | {} | {took} |", line.tier, line.case);
    match &line.report {
        Some(report) => {
            let gap = report.longest_gap.as_millis();
            let _ = write!(text, " {} | {} | {} | {gap} |", report.acknowledged, report.failed, report.lost);
        }
        None => text.push_str(" | | | |"),
    }
    if let Some(report) = line.report.as_ref().filter(|report| report.failed > 0 || report.lost > 0) {
        let _ = write!(text, " {} {}", report.faults, if report.lost > 0 { &report.lost_examples } else { "" });
    }
    let problem = line.problem.as_deref().unwrap_or_default().lines().next().unwrap_or_default().replace('|', "/");
    let _ = writeln!(text, " {problem} |");
    text
}

/// What each case came to over all tiers of a mode, with and without a restart of the operator, in the order in which they were first done.
fn by_case(lines: &[Line]) -> String {
    let mut cases: Vec<(String, Vec<&Report>)> = Vec::new();
    for line in lines {
        let (Some(report), case) = (&line.report, line.case.trim_end_matches(", operator restarted")) else { continue };
        let name = format!("{}{case}", if line.cluster { "Cluster: " } else { "" });
        match cases.iter_mut().find(|(case, _)| *case == name) {
            Some((_, reports)) => reports.push(report),
            None => cases.push((name, vec![report])),
        }
    }
    let mut text = String::from("\n| what was done | times | longest gap, ms | lost |\n|---|---|---|---|\n");
    for (case, reports) in cases {
        let gaps = spread(reports.iter().map(|report| report.longest_gap.as_millis()).collect());
        let lost: u64 = reports.iter().map(|report| report.lost).sum();
        let _ = writeln!(text, "| {case} | {} | {gaps} | {lost} |", reports.len());
    }
    text
}

/// Median and range; of few values the values themselves.
fn spread(mut values: Vec<u128>) -> String {
    values.sort_unstable();
    match values.as_slice() {
        [least, .., greatest] if values.len() >= ENOUGH_FOR_MEDIAN => {
            let (below, above) = (values[(values.len() - 1) / 2], values[values.len() / 2]);
            format!("median {}, {least} to {greatest}", u128::midpoint(below, above))
        }
        few => few.iter().map(u128::to_string).collect::<Vec<_>>().join(", "),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians_are_of_five_values_at_least() {
        assert_eq!(spread(vec![]), "");
        assert_eq!(spread(vec![40, 10, 30, 20]), "10, 20, 30, 40");
        assert_eq!(spread(vec![50, 40, 10, 30, 20]), "median 30, 10 to 50");
        assert_eq!(spread(vec![60, 50, 40, 10, 30, 20]), "median 35, 10 to 60");
    }

    #[test]
    fn a_case_is_one_over_all_tiers() {
        let line = |tier: &str, case: &str, gap: u64, lost: u64| Line {
            tier: tier.to_owned(),
            cluster: false,
            case: case.to_owned(),
            report: Some(Report {
                acknowledged: 10_000,
                failed: 0,
                timed_out: 0,
                faults: String::new(),
                lost,
                lost_examples: String::new(),
                lost_between: None,
                longest_gap: Duration::from_millis(gap),
            }),
            took: None,
            problem: None,
        };
        let failed = Line { report: None, ..line("c", "live parameter", 0, 0) };
        let lines = [
            line("a", "pod killed", 7, 1),
            line("a", "live parameter, operator restarted", 5, 0),
            failed,
            line("b", "pod killed", 3, 2),
            Line { cluster: true, ..line("d", "pod killed", 9, 0) },
        ];
        let expected = "\n| what was done | times | longest gap, ms | lost |\n|---|---|---|---|\n\
                        | pod killed | 2 | 3, 7 | 3 |\n| live parameter | 1 | 5 | 0 |\n| Cluster: pod killed | 1 | 9 | 0 |\n";
        assert_eq!(by_case(&lines), expected);
    }
}
