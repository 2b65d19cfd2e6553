//! How a command fails: what went wrong, and what to do next.

use std::fmt::Display;
use std::io::{self, Write as _};
use std::process::ExitCode;

use crate::telemetry::logs;

/// The exit code where the command line is wrong.
pub const WRONG_LINE: u8 = 2;

/// How a command ends: with an exit code of its own, or with a failure (exit code 1, where it names no other).
pub type Outcome = Result<ExitCode, Failure>;

/// Why a command failed, for a person.
#[derive(Debug, PartialEq, Eq)]
pub struct Failure {
    what: String,
    next: String,
    code: u8,
}

impl Failure {
    /// What went wrong, without a full stop, and the next step to take.
    pub fn new(what: impl Display, next: impl Display) -> Self {
        Self { what: what.to_string(), next: next.to_string(), code: 1 }
    }

    /// The same, with this exit code.
    pub fn with_code(self, code: u8) -> Self {
        Self { code, ..self }
    }

    /// How the process ends.
    pub fn code(&self) -> ExitCode {
        ExitCode::from(self.code)
    }

    /// Writes it to standard error, in colour on a terminal.
    pub fn print(&self) {
        // Where standard error is gone, nobody is left to tell.
        let _ = write!(io::stderr().lock(), "{}", self.render(logs::colours_on_stderr()));
    }

    fn render(&self, colours: bool) -> String {
        let (red, bold, plain) = if colours { ("\x1b[1;31m", "\x1b[1m", "\x1b[0m") } else { ("", "", "") };
        let what = self.what.replace('\n', "\n       ");
        let next = self.next.replace('\n', "\n        ");
        format!("{red}error:{plain} {what}\n  {bold}next:{plain} {next}\n")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_says_what_to_do_next() {
        let failure = Failure::new("a.yaml cannot be read\nnot found", "check the path");
        assert_eq!(failure.render(false), "error: a.yaml cannot be read\n       not found\n  next: check the path\n");
        assert!(failure.render(true).contains("\x1b[1;31merror:\x1b[0m"));
    }
}
