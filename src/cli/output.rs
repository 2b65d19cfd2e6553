//! What commands write to standard output: for people, or for machines.

use std::fmt::Write as _;
use std::io::{self, ErrorKind, IsTerminal as _, Write as _};

use clap::ValueEnum;
use serde::Serialize;

use super::Failure;
use crate::telemetry::logs;

/// How a command's answer is written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// For people
    #[default]
    Table,
    /// One JSON document
    Json,
    /// The same as YAML
    Yaml,
}

/// Writes an answer: `table` makes the text for people.
pub fn answer<T: Serialize>(format: Format, value: &T, table: impl FnOnce(&Paint) -> String) -> Result<(), Failure> {
    let unwritten = |error: &dyn std::fmt::Display| Failure::new(error, "report this: the answer cannot be written");
    print(&match format {
        Format::Table => table(&Paint::of_stdout()),
        Format::Json => format!("{}\n", serde_json::to_string_pretty(value).map_err(|error| unwritten(&error))?),
        Format::Yaml => serde_saphyr::to_string(value).map_err(|error| unwritten(&error))?,
    })
}

/// Writes a text to standard output. Who reads no further is no failure.
pub fn print(text: &str) -> Result<(), Failure> {
    match io::stdout().lock().write_all(text.as_bytes()) {
        Err(error) if error.kind() != ErrorKind::BrokenPipe => {
            Err(Failure::new(format!("standard output cannot be written: {error}"), "send it elsewhere"))
        }
        _ => Ok(()),
    }
}

/// The colours of a terminal, or none.
#[derive(Debug)]
pub struct Paint {
    /// What is wrong.
    pub bad: &'static str,
    /// What is under way.
    pub busy: &'static str,
    /// What is well.
    pub good: &'static str,
    /// Headings.
    pub head: &'static str,
    /// The end of each of these.
    pub plain: &'static str,
}

impl Paint {
    /// No colours.
    pub const NONE: Self = Self { bad: "", busy: "", good: "", head: "", plain: "" };
    /// Those of a terminal.
    pub const COLOURS: Self = Self { bad: "\x1b[1;31m", busy: "\x1b[1;33m", good: "\x1b[32m", head: "\x1b[1m", plain: "\x1b[0m" };

    /// Colours where standard output is a terminal whose user wants them.
    pub fn of_stdout() -> Self {
        if io::stdout().is_terminal() && logs::colours_wanted() { Self::COLOURS } else { Self::NONE }
    }
}

/// What others wrote, on one line, and without what could steer a terminal.
pub fn harmless(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect::<String>().trim().to_owned()
}

/// Lines in columns. A row's colour is the whole row's.
#[derive(Debug, Default)]
pub struct Table {
    rows: Vec<Row>,
}

#[derive(Debug)]
struct Row {
    cells: Vec<String>,
    colour: &'static str,
    /// Lines below it, which are in no column.
    below: Vec<String>,
}

impl Table {
    /// A table with these headings.
    pub fn new(headings: &[&str], paint: &Paint) -> Self {
        let mut table = Self::default();
        table.push(headings.iter().map(|heading| (*heading).to_owned()).collect(), paint.head, Vec::new());
        table
    }

    /// Adds a row, and the lines below it.
    pub fn push(&mut self, cells: Vec<String>, colour: &'static str, below: Vec<String>) {
        self.rows.push(Row { cells, colour, below });
    }

    /// The lines.
    pub fn render(&self, paint: &Paint) -> String {
        let columns = self.rows.iter().map(|row| row.cells.len()).max().unwrap_or_default();
        let width = |column: usize| {
            self.rows.iter().filter_map(|row| row.cells.get(column)).map(|cell| cell.chars().count()).max().unwrap_or_default()
        };
        let widths: Vec<usize> = (0..columns).map(width).collect();
        let mut text = String::new();
        for Row { cells, colour, below } in &self.rows {
            let padded = cells.iter().zip(&widths).map(|(cell, width)| format!("{cell:<width$}"));
            let line = padded.collect::<Vec<_>>().join("  ");
            let end = if colour.is_empty() { "" } else { paint.plain };
            // Writing to a text cannot fail.
            let _ = writeln!(text, "{colour}{}{end}", line.trim_end());
            for line in below {
                let _ = writeln!(text, "{line}");
            }
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_as_wide_as_their_widest_cell() {
        let mut table = Table::new(&["NAME", "PHASE"], &Paint::NONE);
        table.push(vec!["grün".to_owned(), "-".to_owned()], "", vec!["  below".to_owned()]);
        table.push(vec!["longer".to_owned(), "Ready".to_owned()], "", Vec::new());
        assert_eq!(table.render(&Paint::NONE), "NAME    PHASE\ngrün    -\n  below\nlonger  Ready\n");
    }

    #[test]
    fn a_row_is_painted_to_its_end() {
        let mut table = Table::new(&["A"], &Paint::COLOURS);
        table.push(vec!["x".to_owned()], Paint::COLOURS.bad, Vec::new());
        assert_eq!(table.render(&Paint::COLOURS), "\x1b[1mA\x1b[0m\n\x1b[1;31mx\x1b[0m\n");
    }

    #[test]
    fn what_others_wrote_steers_no_terminal() {
        assert_eq!(harmless("a\x1b[31mb\nc\t"), "a [31mb c");
    }
}
