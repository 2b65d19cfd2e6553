//! What was measured, as Markdown tables and as JSON.

use std::fmt::Write;

use serde::{Serialize, Serializer};
use serde_json::{Value, json};

use crate::instructions::Instructions;
use crate::memory::{CLIENTS, Memory};
use crate::rounds::{FOREIGN_CORES, Measurement, Results};
use crate::stats::{Estimate, bootstrap, median};
use crate::targets::Kind;
use crate::verdict::{Outcome, Verdict};

/// Everything that is reported.
pub struct Report {
    pub results: Results,
    /// Or why there is none.
    pub memory: Result<Vec<Memory>, String>,
    /// Or why there is none.
    pub instructions: Result<Vec<Instructions>, String>,
    /// What it ran on: name and value.
    pub environment: Vec<(String, String)>,
}

pub fn as_name<S: Serializer>(kind: &Kind, serializer: S) -> Result<S::Ok, S::Error> {
    kind.name().serialize(serializer)
}

/// A figure of one measurement.
pub type Figure = fn(&Measurement) -> f64;

impl Report {
    /// The values that `figure` takes over the rounds, in order.
    fn over_rounds(&self, target: Kind, load: &str, figure: Figure) -> Vec<f64> {
        self.results.closed.iter().filter(|m| m.target == target && m.load == load).map(figure).collect()
    }

    /// The median of `figure` over the rounds, with its interval. `None` where it was not measured.
    pub fn estimate(&self, target: Kind, load: &str, figure: Figure) -> Option<Estimate> {
        let values = self.over_rounds(target, load, figure);
        (!values.is_empty()).then(|| bootstrap(&values))
    }

    /// The ratio of `figure` between a target and a reference, round by round. `None` where one was not measured.
    pub fn ratio(&self, load: &str, target: Kind, reference: Kind, figure: Figure) -> Option<Estimate> {
        let ours = self.over_rounds(target, load, figure);
        let theirs = self.over_rounds(reference, load, figure);
        let ratios: Vec<f64> = ours.iter().zip(&theirs).map(|(ours, theirs)| ours / theirs).collect();
        (!ratios.is_empty() && ratios.iter().all(|ratio| ratio.is_finite())).then(|| bootstrap(&ratios))
    }

    /// The loads that were measured, in order.
    pub fn loads(&self) -> Vec<&str> {
        let mut found: Vec<&str> = Vec::new();
        for m in &self.results.closed {
            if !found.contains(&m.load.as_str()) {
                found.push(&m.load);
            }
        }
        found
    }

    /// The targets that were measured, in order.
    pub fn targets(&self) -> Vec<Kind> {
        Kind::ALL.into_iter().filter(|kind| self.results.closed.iter().any(|m| m.target == *kind)).collect()
    }

    /// The share of samples that other processes disturbed although they were taken again.
    pub fn disturbed(&self) -> f64 {
        let disturbed = self.results.closed.iter().filter(|m| m.foreign_cores > FOREIGN_CORES).count();
        disturbed as f64 / self.results.closed.len().max(1) as f64
    }

    /// The whole as Markdown.
    pub fn markdown(&self, verdicts: &[Verdict]) -> String {
        let mut text = String::from(INTRODUCTION);
        if self.disturbed() > 0.1 {
            let share = self.disturbed() * 100.0;
            let _ = writeln!(
                text,
                "\n**A noisy run**: in {share:.0} % of the samples other processes used more than {FOREIGN_CORES} cores. \
                 Trust CPU per command and ratios more than rates, and neither to the last digit."
            );
        }
        if !verdicts.is_empty() {
            let _ = writeln!(text, "\n## Against what was to be reached\n\n| claim | measured | |\n|---|---|---|");
        }
        // A run of some targets says nothing of the others.
        for verdict in verdicts.iter().filter(|verdict| verdict.outcome != Outcome::NotMeasured) {
            let _ = writeln!(text, "| {} | {} | {} |", verdict.claim, verdict.measured, verdict.outcome.word());
        }
        let _ = writeln!(text, "\n## Closed loop\n");
        self.loads().iter().for_each(|load| self.closed_table(load, &mut text));
        self.open_table(&mut text);
        self.memory_table(&mut text);
        self.instruction_table(&mut text);
        let _ = writeln!(text, "\n## Where\n\n| | |\n|---|---|");
        for (name, value) in &self.environment {
            let _ = writeln!(text, "| {name} | {value} |");
        }
        text
    }

    fn closed_table(&self, load: &str, text: &mut String) {
        let _ = writeln!(
            text,
            "### {load}\n\n| target | thousand/s | ÷ direct | ÷ nutcracker | p50 µs | p99 µs | proxy CPU µs | ÷ nutcracker | redis CPU µs |\n\
             |---|---|---|---|---|---|---|---|---|"
        );
        for target in self.targets() {
            let row = |figure| median(&self.over_rounds(target, load, figure));
            let ratio =
                |reference, figure| self.ratio(load, target, reference, figure).map_or("–".to_owned(), |r| r.to_string());
            let proxy = |shown: String| if target == Kind::Direct { "–".to_owned() } else { shown };
            let _ = writeln!(
                text,
                "| {} | {:.1} | {} | {} | {:.0} | {:.0} | {} | {} | {:.2} |",
                target.name(),
                row(|m| m.throughput) / 1e3,
                ratio(Kind::Direct, |m| m.throughput),
                ratio(Kind::Nutcracker, |m| m.throughput),
                row(|m| m.p50_us),
                row(|m| m.p99_us),
                proxy(format!("{:.2}", row(|m| m.proxy_us))),
                proxy(ratio(Kind::Nutcracker, |m| m.proxy_us)),
                row(|m| m.redis_us),
            );
        }
        text.push('\n');
    }

    fn open_table(&self, text: &mut String) {
        if self.results.open.is_empty() {
            return;
        }
        let rate = self.results.rate;
        let _ = writeln!(text, "## Open loop\n\nGET at {rate:.0} a second.\n\n| target | p50 µs | p99 µs |\n|---|---|---|");
        for target in self.targets() {
            let rows: Vec<_> = self.results.open.iter().filter(|row| row.target == target).collect();
            let p50 = median(&rows.iter().map(|row| row.p50_us).collect::<Vec<_>>());
            let p99 = median(&rows.iter().map(|row| row.p99_us).collect::<Vec<_>>());
            let _ = writeln!(text, "| {} | {p50:.0} | {p99:.0} |", target.name());
        }
    }

    fn memory_table(&self, text: &mut String) {
        let _ = writeln!(text, "\n## Memory\n");
        match &self.memory {
            Err(why) => drop(writeln!(text, "Not measured: {why}.")),
            Ok(rows) => {
                let _ = writeln!(text, "RssAnon in MB.\n\n| target | fresh | {CLIENTS} clients | after |\n|---|---|---|---|");
                for row in rows {
                    let [fresh, with, after] = [row.fresh, row.with_clients, row.after].map(|bytes| bytes as f64 / 1e6);
                    let _ = writeln!(text, "| {} | {fresh:.1} | {with:.1} | {after:.1} |", row.target.name());
                }
            }
        }
    }

    fn instruction_table(&self, text: &mut String) {
        let _ = writeln!(text, "\n## Instructions\n");
        match &self.instructions {
            Err(why) => drop(writeln!(text, "Not counted: {why}.")),
            Ok(rows) => {
                let _ = writeln!(text, "User-space instructions of the whole sidecar per GET, one client, sixteen at once.\n");
                let _ = writeln!(text, "| target | per command |\n|---|---|");
                for row in rows {
                    let _ = writeln!(text, "| {} | {:.0} |", row.target.name(), row.per_command);
                }
            }
        }
    }

    /// The whole as JSON: every sample, so that others can reckon anew.
    pub fn json(&self, verdicts: &[Verdict]) -> Value {
        json!({
            "environment": self.environment.iter().cloned().collect::<std::collections::BTreeMap<_, _>>(),
            "disturbedShare": self.disturbed(),
            "verdicts": verdicts,
            "closedLoop": self.results.closed,
            "openLoop": {"rate": self.results.rate, "rounds": self.results.open},
            "memory": self.memory.as_ref().ok(),
            "instructions": self.instructions.as_ref().ok(),
        })
    }
}

const INTRODUCTION: &str = "# Benchmark

Written by `make bench`: one Redis, and proxies in front of it that forward the same commands, measured in one interleaved run. Values
have 100 bytes, every GET is a hit, and every byte of every reply is compared with what it must be. Each proxy does its work in one
thread with its default settings. Figures are medians over the rounds; ratios are taken within each round, and the brackets hold
their 95 % bootstrap interval. CPU time is the kernel's account of the process, all threads. `P16` means that each connection sends 16
commands at once; latencies of the closed loop are those of a whole batch at full load.
";
