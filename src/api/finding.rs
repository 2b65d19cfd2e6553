//! What is wrong, or unwise, in a file, and what to do about it.

use std::fmt;
use std::path::{Path, PathBuf};

use serde::Serialize;

use super::manifest::Position;
use super::path::FieldPath;

/// How much a finding weighs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    /// The object is accepted, but its users will regret it.
    Warning,
    /// The object is refused.
    Error,
}

/// The code of errors.
pub const INVALID: &str = "invalid";
/// The code of errors that a CEL rule found: `what` is its message, word for word, which also says what to write instead.
pub const BROKEN_RULE: &str = "rule";

/// Something in a file that is wrong or unwise.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// How much it weighs.
    pub severity: Severity,
    /// What kind of finding it is, in one word: stable, for machines.
    pub code: &'static str,
    /// The file.
    pub file: PathBuf,
    /// Where in the file.
    pub position: Position,
    /// Where in the object; the root where the file itself is at fault.
    pub path: FieldPath,
    /// What is wrong.
    pub what: String,
    /// Why that is bad; empty where `what` says it all.
    pub why: String,
    /// What to write instead.
    pub remedy: String,
}

impl Finding {
    /// A finding about a file as a whole.
    pub fn about_file(file: &Path, what: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self {
            severity: Severity::Error,
            code: INVALID,
            file: file.to_owned(),
            position: Position::default(),
            path: FieldPath::root(),
            what: what.into(),
            why: String::new(),
            remedy: remedy.into(),
        }
    }
}

impl fmt::Display for Finding {
    /// `file:line:column: path: what; remedy`, on one line.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.file.display())?;
        if self.position.line > 0 {
            write!(f, ":{}:{}", self.position.line, self.position.column)?;
        }
        write!(f, ": ")?;
        if !self.path.steps().is_empty() {
            write!(f, "{}: ", self.path)?;
        }
        write!(f, "{}", self.what)?;
        if !self.why.is_empty() {
            write!(f, " ({})", self.why)?;
        }
        if !self.remedy.is_empty() {
            write!(f, "; {}", self.remedy)?;
        }
        Ok(())
    }
}

/// Why manifests were refused: at least one finding, shown one a line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refused(pub Vec<Finding>);

impl fmt::Display for Refused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (at, finding) in self.0.iter().enumerate() {
            if at > 0 {
                f.write_str("\n")?;
            }
            finding.fmt(f)?;
        }
        Ok(())
    }
}

impl std::error::Error for Refused {}
