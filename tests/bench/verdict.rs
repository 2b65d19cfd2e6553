//! What Larder was to reach, and whether it does. A claim is met when the whole interval clears it.

use serde::Serialize;

use crate::memory::Memory;
use crate::report::{Figure, Report};
use crate::stats::Estimate;
use crate::targets::Kind;

/// One claim and its outcome.
#[derive(Debug, Clone, Serialize)]
pub struct Verdict {
    pub claim: String,
    pub measured: String,
    pub outcome: Outcome,
}

/// Whether a claim holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Outcome {
    Met,
    /// The median clears it, the interval does not.
    Undecided,
    NotMet,
    NotMeasured,
}

impl Outcome {
    pub fn word(self) -> &'static str {
        match self {
            Self::Met => "met",
            Self::Undecided => "undecided: the interval straddles it",
            Self::NotMet => "**not met**",
            Self::NotMeasured => "not measured",
        }
    }
}

/// A bound on a figure.
#[derive(Clone, Copy)]
enum Bound {
    AtMost(f64),
    AtLeast(f64),
}

impl Bound {
    fn clears(self, value: f64) -> bool {
        match self {
            Self::AtMost(most) => value <= most,
            Self::AtLeast(least) => value >= least,
        }
    }

    fn text(self) -> String {
        match self {
            Self::AtMost(most) => format!("≤ {most}"),
            Self::AtLeast(least) => format!("≥ {least}"),
        }
    }

    fn judge(self, estimate: Option<Estimate>) -> Outcome {
        match estimate {
            None => Outcome::NotMeasured,
            Some(e) if [e.low, e.median, e.high].iter().all(|value| self.clears(*value)) => Outcome::Met,
            Some(e) if self.clears(e.median) => Outcome::Undecided,
            Some(_) => Outcome::NotMet,
        }
    }
}

const CPU: Figure = |m| m.proxy_us;
const THROUGHPUT: Figure = |m| m.throughput;

/// Judges everything that was to be reached, on hits with the rule on.
pub fn judge(report: &Report) -> Vec<Verdict> {
    let ratios = [
        ("CPU per command", CPU, Kind::Nutcracker, "GET P1", Bound::AtMost(0.9)),
        ("CPU per command", CPU, Kind::Nutcracker, "GET P16", Bound::AtMost(0.4)),
        ("throughput", THROUGHPUT, Kind::Nutcracker, "GET P1", Bound::AtLeast(0.95)),
        ("throughput", THROUGHPUT, Kind::Nutcracker, "GET P16", Bound::AtLeast(2.0)),
        ("CPU per command", CPU, Kind::Haproxy, "GET P1", Bound::AtMost(1.0)),
        ("CPU per command", CPU, Kind::Haproxy, "GET P16", Bound::AtMost(1.0)),
        ("CPU per command", CPU, Kind::Envoy, "GET P1", Bound::AtMost(1.0)),
        ("CPU per command", CPU, Kind::Envoy, "GET P16", Bound::AtMost(1.0)),
    ];
    let mut verdicts = Vec::new();
    if !report.targets().into_iter().any(Kind::is_larder) {
        return verdicts;
    }
    for ours in [Kind::LarderTtl, Kind::LarderReadThrough] {
        for (what, figure, reference, load, bound) in ratios {
            let ratio = report.ratio(load, ours, reference, figure);
            verdicts.push(Verdict {
                claim: format!("{}, {load}: {what} {} × {}", ours.name(), bound.text(), reference.name()),
                measured: ratio.map_or("–".to_owned(), |ratio| ratio.to_string()),
                outcome: bound.judge(ratio),
            });
        }
    }
    verdicts.extend(["GET P1", "GET P16"].map(|load| leases(report, load)));
    verdicts.extend(memory(report));
    verdicts.push(rules(report));
    verdicts
}

/// What leases, stale copies and early expiry cost a hit, against a rule that leaves the keys alone.
fn leases(report: &Report, load: &str) -> Verdict {
    let bound = Bound::AtMost(1.1);
    let ratio = report.ratio(load, Kind::LarderCacheAside, Kind::LarderBypass, CPU);
    Verdict {
        claim: format!(
            "{}, {load}: CPU per command {} × {}",
            Kind::LarderCacheAside.name(),
            bound.text(),
            Kind::LarderBypass.name()
        ),
        measured: ratio.map_or("–".to_owned(), |ratio| ratio.to_string()),
        outcome: bound.judge(ratio),
    }
}

fn memory(report: &Report) -> Vec<Verdict> {
    let row = report.memory.as_ref().ok().and_then(|rows| rows.iter().find(|row| row.target == Kind::LarderTtl));
    let claim = |claim: &str, most: f64, figure: fn(&Memory) -> u64| {
        let megabytes = row.map(|row| figure(row) as f64 / 1e6);
        Verdict {
            claim: format!("{}: {claim}", Kind::LarderTtl.name()),
            measured: megabytes.map_or("–".to_owned(), |megabytes| format!("{megabytes:.1} MB")),
            outcome: exact(megabytes, most),
        }
    };
    vec![
        claim("memory when fresh ≤ 10 MB", 10.0, |row| row.fresh),
        claim("memory with 1,000 clients ≤ 20 MB", 20.0, |row| row.with_clients),
        claim("memory after they have gone at most 2 MB above fresh", 2.0, |row| row.after.saturating_sub(row.fresh)),
    ]
}

/// A hundred rules against one, in instructions.
fn rules(report: &Report) -> Verdict {
    let of = |kind: Kind| {
        let rows = report.instructions.as_ref().ok()?;
        rows.iter().find(|row| row.target == kind).map(|row| row.per_command)
    };
    let ratio = of(Kind::LarderHundredRules).zip(of(Kind::LarderTtl)).map(|(hundred, one)| hundred / one);
    Verdict {
        claim: "instructions per GET with 100 rules ≤ 1.05 × those with one".to_owned(),
        measured: ratio.map_or("–".to_owned(), |ratio| format!("{ratio:.3}")),
        outcome: exact(ratio, 1.05),
    }
}

fn exact(value: Option<f64>, most: f64) -> Outcome {
    Bound::AtMost(most).judge(value.map(|value| Estimate { median: value, low: value, high: value }))
}
