//! The table of what was measured: on standard error as it comes, and as a file.

use std::fmt::Write as _;
use std::fs;
use std::path::Path;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use super::tier::Tier;
use super::writers::Report;

/// One row.
pub struct Line {
    pub tier: String,
    pub case: String,
    pub report: Option<Report>,
    /// From the first write to the reading back of the last.
    pub took: Option<Duration>,
    pub problem: Option<String>,
}

impl Line {
    pub fn of(tier: &Tier, case: &str) -> Self {
        Self { tier: tier.name.clone(), case: case.to_owned(), report: None, took: None, problem: None }
    }

    /// A row about the shop, with figures of its own.
    pub fn figures(case: &str, took: Option<Duration>, figures: &str) -> Self {
        Self { tier: "shop".to_owned(), case: case.to_owned(), report: None, took, problem: Some(figures.to_owned()) }
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
