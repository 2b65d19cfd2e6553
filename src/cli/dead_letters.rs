//! `larder dead-letters`: writes that were acknowledged, and that their origin refuses.

use std::fmt;
use std::process::ExitCode;
use std::str::FromStr;

use serde::Serialize;

use super::journal::{PlaceArgs, age_ms};
use super::output::{self, Format, Paint, Table, harmless};
use super::{Failure, Outcome};
use crate::journal::PARTITIONS;
use crate::journal::letters::{Dropped, Letter, Replayed};
use crate::policy::Span;
use crate::relay::desk::GivenUp;

/// What is said of a letter that somebody has replayed or dropped already.
const NOT_THERE: &str = "is not there";

/// See the writes that their origin refuses, and have them told again or give them up
///
/// Until then reads go on to see such a write's value, unless a later write of its key has been acknowledged.
#[derive(clap::Args)]
pub struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(clap::Subcommand)]
enum Command {
    /// List them, without their values
    #[command(after_help = "\
Exit codes: 0 there are none; 1 there are some; 2 the journal cannot be asked, or the command line is wrong

Examples:
  larder dead-letters list
  larder dead-letters list --output json --snapshot snapshot.json")]
    List {
        #[command(flatten)]
        place: PlaceArgs,
        /// How they are written, on standard output
        #[arg(long, short, value_enum, default_value_t, value_name = "FORMAT")]
        output: Format,
    },
    /// Show one with its value
    #[command(after_help = "\
Exit codes: 0 shown; 1 there is no such letter; 2 the journal cannot be asked, or the command line is wrong

Examples:
  larder dead-letters show 3/1764457200000-0 --snapshot snapshot.json")]
    Show {
        /// Which, as `list` names it
        #[arg(value_name = "LETTER")]
        letter: LetterName,
        #[command(flatten)]
        place: PlaceArgs,
        /// How it is written, on standard output
        #[arg(long, short, value_enum, default_value_t, value_name = "FORMAT")]
        output: Format,
    },
    /// Have writes told to their origin once more, after what it refused them for is mended
    ///
    /// A write is told as the newest of its key, and not at all where a later one has been acknowledged.
    #[command(after_help = "\
Exit codes: 0 all stand in the journal again; 1 some do not; 2 the journal cannot be asked, or the command line is wrong

Examples:
  larder dead-letters replay 3/1764457200000-0 --snapshot snapshot.json
  larder dead-letters replay --all --snapshot snapshot.json")]
    Replay {
        #[command(flatten)]
        chosen: Chosen,
        #[command(flatten)]
        place: PlaceArgs,
    },
    /// Give writes up: reads see what the origin has
    #[command(after_help = "\
Exit codes: 0 all are gone; 1 some were not there; 2 the journal cannot be asked, or the command line is wrong

Examples:
  larder dead-letters drop 3/1764457200000-0 --snapshot snapshot.json
  larder dead-letters drop --all --snapshot snapshot.json")]
    Drop {
        #[command(flatten)]
        chosen: Chosen,
        #[command(flatten)]
        place: PlaceArgs,
    },
}

#[derive(clap::Args)]
#[group(required = true, multiple = false)]
struct Chosen {
    /// Which, as `list` names them
    #[arg(value_name = "LETTER")]
    letters: Vec<LetterName>,
    /// All that there are
    #[arg(long)]
    all: bool,
}

/// A letter's partition and its ID there.
#[derive(Debug, Clone, PartialEq, Eq)]
struct LetterName {
    partition: u8,
    id: String,
}

impl fmt::Display for LetterName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.partition, self.id)
    }
}

impl FromStr for LetterName {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let parse = || {
            let (partition, id) = text.split_once('/')?;
            let partition = partition.parse().ok().filter(|partition| *partition < PARTITIONS)?;
            let (millis, number) = id.split_once('-')?;
            let _: (u64, u64) = (millis.parse().ok()?, number.parse().ok()?);
            Some(Self { partition, id: id.to_owned() })
        };
        parse().ok_or_else(|| "write it as `larder dead-letters list` does, such as 3/1764457200000-0".to_owned())
    }
}

/// Asks, shows, changes.
pub fn run(args: Args) -> Outcome {
    match args.command {
        Command::List { place, output } => {
            let shown: Vec<Shown> = letters(&place)?.iter().map(|(number, letter)| Shown::new(*number, letter, false)).collect();
            output::answer(output, &shown, |paint| table(&shown, paint))?;
            Ok(if shown.is_empty() { ExitCode::SUCCESS } else { ExitCode::from(1) })
        }
        Command::Show { letter, place, output } => {
            let found = letters(&place)?.into_iter().find(|(number, found)| *number == letter.partition && found.id == letter.id);
            let Some((number, found)) = found else {
                return Err(Failure::new(format!("there is no dead letter {letter}"), "see `larder dead-letters list`"));
            };
            let shown = Shown::new(number, &found, true);
            output::answer(output, &shown, |_| shown.text())?;
            Ok(ExitCode::SUCCESS)
        }
        Command::Replay { chosen, place } => each(&place, chosen, Deed::Replay),
        Command::Drop { chosen, place } => each(&place, chosen, Deed::Drop),
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Deed {
    Replay,
    Drop,
}

fn letters(place: &PlaceArgs) -> Result<Vec<(u8, Letter)>, Failure> {
    place.with(async |desk, journal| desk.letters(journal).await)
}

/// Does the deed with each, and says what came of it.
fn each(place: &PlaceArgs, chosen: Chosen, deed: Deed) -> Outcome {
    let told = place.with(async |desk, journal| {
        let letters: Vec<LetterName> = match chosen.all {
            true => {
                let all = desk.letters(journal).await?.into_iter();
                all.map(|(partition, letter)| LetterName { partition, id: letter.id }).collect()
            }
            false => chosen.letters,
        };
        let mut told = Vec::with_capacity(letters.len());
        for letter in letters {
            let (done, what) = match deed {
                Deed::Replay => replayed(desk.replay(journal, letter.partition, &letter.id).await?),
                Deed::Drop => dropped(&desk.drop(journal, letter.partition, &letter.id).await?),
            };
            told.push((done, format!("{letter} {what}\n")));
        }
        Ok(told)
    })?;
    output::print(&told.iter().map(|(_, line)| line.as_str()).collect::<String>())?;
    Ok(if told.iter().all(|(done, _)| *done) { ExitCode::SUCCESS } else { ExitCode::from(1) })
}

/// Whether a replay was one, and what came of it.
fn replayed(outcome: Replayed) -> (bool, String) {
    let (done, what) = match outcome {
        Replayed::Yes(_) => (true, "stands in the journal again"),
        Replayed::Superseded => (false, "is superseded by a later write of its key: drop it"),
        Replayed::Absent => (false, NOT_THERE),
    };
    (done, what.to_owned())
}

/// Whether a letter was given up, and what came of it.
fn dropped(GivenUp { letter, kept }: &GivenUp) -> (bool, String) {
    match (letter, kept) {
        (Dropped::Absent, _) => (false, NOT_THERE.to_owned()),
        (Dropped::Last | Dropped::Superseded, None) => (true, "is dropped".to_owned()),
        (Dropped::Last | Dropped::Superseded, Some(why)) => {
            let why = harmless(&why.to_string());
            (true, format!("is dropped; what is cached of its key may stay until its TTL ends, for its deletion failed: {why}"))
        }
    }
}

/// A letter, for a person.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Shown {
    letter: String,
    key: String,
    /// `set` or `delete`.
    kind: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    value: Option<String>,
    version: u64,
    /// What the origin said.
    why: String,
    age_ms: u64,
}

impl Shown {
    fn new(partition: u8, letter: &Letter, values: bool) -> Self {
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        Self {
            letter: LetterName { partition, id: letter.id.clone() }.to_string(),
            key: text(&letter.change.key),
            kind: if letter.change.value.is_some() { "set" } else { "delete" },
            value: letter.change.value.as_deref().filter(|_| values).map(text),
            version: letter.version.get(),
            why: letter.why.clone(),
            age_ms: age_ms(letter.since_ms()),
        }
    }

    fn text(&self) -> String {
        let Self { letter, key, kind, value, why, .. } = self;
        let age = Span::from_millis(self.age_ms);
        let value = value.as_deref().map(|value| format!("value   {}\n", harmless(value))).unwrap_or_default();
        format!("letter  {letter}, {age} old\nkey     {}\nkind    {kind}\nwhy     {}\n{value}", harmless(key), harmless(why))
    }
}

fn table(all: &[Shown], paint: &Paint) -> String {
    let mut table = Table::new(&["LETTER", "AGE", "KIND", "KEY", "WHY"], paint);
    for shown in all {
        let age = Span::from_millis(shown.age_ms).to_string();
        let cells = vec![shown.letter.clone(), age, shown.kind.to_owned(), harmless(&shown.key), harmless(&shown.why)];
        table.push(cells, "", Vec::new());
    }
    if all.is_empty() { "there are no dead letters\n".to_owned() } else { table.render(paint) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn letters_are_named_as_they_are_listed() {
        let name: LetterName = "3/1764457200000-0".parse().expect("a name");
        assert_eq!(name.to_string(), "3/1764457200000-0");
        for bad in ["", "3", "3/", "16/1-0", "3/x-0", "3/1", "3/1-0; DROP", "-1/1-0"] {
            assert!(bad.parse::<LetterName>().is_err(), "{bad}");
        }
    }
}
