//! How a review is shown.

use std::fmt::Write as _;
use std::io::{self, ErrorKind, IsTerminal as _, Write as _};

use serde::Serialize;

use super::review::Review;
use crate::api::finding::{Finding, Severity};
use crate::cli::Failure;
use crate::telemetry::logs;

/// Writes it for people.
pub(super) fn text(review: &Review) -> Result<(), Failure> {
    print(&render(review, io::stdout().is_terminal() && logs::colours_wanted()))
}

/// Writes it for machines.
pub(super) fn json(review: &Review) -> Result<(), Failure> {
    let findings = review.findings.iter().map(JsonFinding::new).collect();
    let document = Document { errors: review.errors(), warnings: review.warnings(), findings };
    let json = serde_json::to_string_pretty(&document).map_err(|error| Failure::new(error, "report this"))?;
    print(&format!("{json}\n"))
}

fn print(text: &str) -> Result<(), Failure> {
    match io::stdout().lock().write_all(text.as_bytes()) {
        Err(error) if error.kind() != ErrorKind::BrokenPipe => {
            Err(Failure::new(format!("standard output cannot be written: {error}"), "send it elsewhere"))
        }
        _ => Ok(()),
    }
}

#[derive(Serialize)]
struct Document<'a> {
    errors: usize,
    warnings: usize,
    findings: Vec<JsonFinding<'a>>,
}

#[derive(Serialize)]
struct JsonFinding<'a> {
    severity: Severity,
    code: &'static str,
    file: String,
    line: u64,
    column: u64,
    path: String,
    what: &'a str,
    why: &'a str,
    remedy: &'a str,
}

impl<'a> JsonFinding<'a> {
    fn new(finding: &'a Finding) -> Self {
        let Finding { severity, code, file, position, path, what, why, remedy } = finding;
        Self {
            severity: *severity,
            code,
            file: file.display().to_string(),
            line: position.line,
            column: position.column,
            path: path.to_string(),
            what,
            why,
            remedy,
        }
    }
}

/// The colours of a terminal, or none.
struct Paint {
    error: &'static str,
    warning: &'static str,
    place: &'static str,
    plain: &'static str,
}

const COLOURS: Paint = Paint { error: "\x1b[1;31m", warning: "\x1b[1;33m", place: "\x1b[1m", plain: "\x1b[0m" };
const NO_COLOURS: Paint = Paint { error: "", warning: "", place: "", plain: "" };

fn render(review: &Review, colours: bool) -> String {
    let paint = if colours { COLOURS } else { NO_COLOURS };
    let mut text = String::new();
    for finding in &review.findings {
        render_finding(&mut text, finding, &paint);
    }
    let [clusters, policies, secrets] = review.objects;
    let objects = format!(
        "{}, {}, {}",
        count(clusters, "CacheCluster", "CacheClusters"),
        count(policies, "CachePolicy", "CachePolicies"),
        count(secrets, "Secret", "Secrets")
    );
    let (errors, warnings) = (count(review.errors(), "error", "errors"), count(review.warnings(), "warning", "warnings"));
    // Writing to a text cannot fail.
    let _ = match (review.errors(), review.warnings()) {
        (0, 0) => writeln!(text, "ok: {objects}, nothing found"),
        (0, _) => writeln!(text, "{warnings}; {objects}"),
        _ => writeln!(text, "{errors}, {warnings}; usable: {objects}"),
    };
    text
}

fn render_finding(text: &mut String, finding: &Finding, paint: &Paint) {
    let Finding { severity, code, file, position, path, what, why, remedy } = finding;
    let Paint { error, warning, place, plain } = paint;
    let _ = write!(text, "{place}{}", file.display());
    if position.line > 0 {
        let _ = write!(text, ":{}:{}", position.line, position.column);
    }
    let _ = match severity {
        Severity::Error => write!(text, ":{plain} {error}error:{plain} "),
        Severity::Warning => write!(text, ":{plain} {warning}warning[{code}]:{plain} "),
    };
    if !path.steps().is_empty() {
        let _ = write!(text, "{path}: ");
    }
    let _ = writeln!(text, "{what}");
    for (label, line) in [("why", why), ("fix", remedy)].into_iter().filter(|(_, line)| !line.is_empty()) {
        let _ = writeln!(text, "    {label}: {line}");
    }
}

fn count(number: usize, one: &str, many: &str) -> String {
    format!("{number} {}", if number == 1 { one } else { many })
}
