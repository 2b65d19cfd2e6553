//! `larder journal`: what is written behind and has not reached its origin yet.

mod place;

use std::process::ExitCode;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use serde::Serialize;
use tokio::time::sleep;

pub use self::place::{PlaceArgs, SnapshotArgs};

use super::output::{self, Format, Paint, Table, harmless};
use super::{Failure, Outcome};
use crate::journal::Entry;
use crate::journal::scripts::Status;
use crate::policy::Span;

/// How often a journal that is drained is looked at.
const LOOK_EVERY: Duration = Duration::from_millis(200);

/// See what is written behind and has not reached its origin yet, and wait until it has
#[derive(clap::Args)]
pub struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(clap::Subcommand)]
enum Command {
    /// Show how full the journal is, how far behind its origin, and which relays drain it
    #[command(after_help = "\
Exit codes: 0 shown; 2 the journal cannot be asked, or the command line is wrong

Examples:
  larder journal status
  larder journal status --snapshot snapshot.json --output json")]
    Status {
        #[command(flatten)]
        place: PlaceArgs,
        /// How it is written, on standard output
        #[arg(long, short, value_enum, default_value_t, value_name = "FORMAT")]
        output: Format,
    },
    /// Show the oldest writes, without their values
    #[command(after_help = "\
Exit codes: 0 shown; 2 the journal cannot be asked, or the command line is wrong

Examples:
  larder journal peek
  larder journal peek --snapshot snapshot.json --count 3 --values")]
    Peek {
        #[command(flatten)]
        place: PlaceArgs,
        /// How many
        #[arg(long, value_name = "N", default_value_t = 20, value_parser = clap::value_parser!(u16).range(1..=1000))]
        count: u16,
        /// Show the values, too
        #[arg(long)]
        values: bool,
        /// How they are written, on standard output
        #[arg(long, short, value_enum, default_value_t, value_name = "FORMAT")]
        output: Format,
    },
    /// Wait until every write that was acknowledged has reached its origin or is a dead letter
    #[command(after_help = "\
Relays drain a journal all the time: this waits for them, and says how much is left. Stop what writes first, or it may never end.

Exit codes: 0 nothing is left, and there are no dead letters; 1 something is left at the end of the time, or there are dead letters;
2 the journal cannot be asked, or the command line is wrong

Examples:
  larder journal drain --run-dir ./cache-data
  larder journal drain --snapshot snapshot.json --timeout 5m")]
    Drain {
        #[command(flatten)]
        place: PlaceArgs,
        /// When to give up
        #[arg(long, value_name = "DURATION", default_value = "1m")]
        timeout: Span,
    },
}

/// Asks, shows, waits.
pub fn run(args: Args) -> Outcome {
    match args.command {
        Command::Status { place, output } => {
            let shown = place.with(async |desk, journal| Ok(Shown::new(journal.as_str(), &desk.status(journal).await?)))?;
            output::answer(output, &shown, |paint| shown.table(paint))?;
            Ok(ExitCode::SUCCESS)
        }
        Command::Peek { place, count, values, output } => {
            let mut entries = place.with(async |desk, journal| desk.peek(journal, usize::from(count)).await)?;
            entries.sort_by_key(|(_, entry)| entry.version);
            entries.truncate(usize::from(count));
            let shown: Vec<Write> = entries.iter().map(|(number, entry)| Write::new(*number, entry, values)).collect();
            output::answer(output, &shown, |paint| writes(&shown, values, paint))?;
            Ok(ExitCode::SUCCESS)
        }
        Command::Drain { place, timeout } => drain(&place, timeout),
    }
}

fn drain(place: &PlaceArgs, limit: Span) -> Outcome {
    let until = Instant::now() + limit.as_duration();
    let left = place.with(async |desk, journal| {
        loop {
            let shown = Shown::new(journal.as_str(), &desk.status(journal).await?);
            if shown.depth == 0 || Instant::now() >= until {
                return Ok(shown);
            }
            sleep(LOOK_EVERY).await;
        }
    })?;
    if left.depth > 0 {
        let relays = if left.relays.is_empty() { "no relay drains it: see that one runs" } else { "see the relay's log for why" };
        return Err(Failure::new(format!("{} writes are left after {limit}", left.depth), relays));
    }
    if left.dead > 0 {
        let what = format!("nothing is left but {} dead letters", left.dead);
        return Err(Failure::new(what, "see them with `larder dead-letters list`, and replay or drop each"));
    }
    output::print("nothing is left\n")?;
    Ok(ExitCode::SUCCESS)
}

/// A journal, for a person.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Shown {
    journal: String,
    /// Writes that are not trimmed.
    depth: u64,
    bytes: u64,
    /// The age of the oldest, in milliseconds.
    lag_ms: u64,
    /// Keys whose last write the origin has not got.
    dirty: u64,
    dead: u64,
    /// Those that drain it.
    relays: Vec<String>,
    partitions: Vec<Part>,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Part {
    number: usize,
    depth: u64,
    lag_ms: u64,
    dead: u64,
    relay: Option<String>,
}

impl Shown {
    fn new(journal: &str, all: &[Status]) -> Self {
        let sum = |read: fn(&Status) -> u64| all.iter().map(read).sum();
        let relay = |status: &Status| Some(harmless(&String::from_utf8_lossy(status.relay.as_ref()?)));
        let part = |(number, status): (usize, &Status)| Part {
            number,
            depth: status.depth,
            lag_ms: status.age_ms(),
            dead: status.dead,
            relay: relay(status),
        };
        let mut relays: Vec<String> = all.iter().filter_map(relay).collect();
        relays.sort();
        relays.dedup();
        Self {
            journal: journal.to_owned(),
            depth: sum(|status| status.depth),
            bytes: sum(|status| status.bytes),
            lag_ms: all.iter().map(Status::age_ms).max().unwrap_or(0),
            dirty: sum(|status| status.dirty),
            dead: sum(|status| status.dead),
            relays,
            partitions: all.iter().enumerate().map(part).collect(),
        }
    }

    fn table(&self, paint: &Paint) -> String {
        let mut table = Table::new(&["PARTITION", "WRITES", "LAG", "DEAD", "RELAY"], paint);
        for part in &self.partitions {
            let colour = match part {
                Part { relay: None, .. } => paint.bad,
                Part { dead: 1.., .. } => paint.busy,
                _ => "",
            };
            let lag = if part.depth == 0 { "-".to_owned() } else { Span::from_millis(part.lag_ms).to_string() };
            let relay = part.relay.clone().unwrap_or_else(|| "none".to_owned());
            table.push(
                vec![part.number.to_string(), part.depth.to_string(), lag, part.dead.to_string(), relay],
                colour,
                Vec::new(),
            );
        }
        let Self { journal, depth, bytes, dirty, dead, lag_ms, .. } = self;
        let lag = Span::from_millis(*lag_ms);
        let head = format!("{journal}: {depth} writes of {dirty} keys in {bytes} bytes, {lag} behind; {dead} dead letters\n\n");
        head + &table.render(paint)
    }
}

/// A write, for a person.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Write {
    partition: u8,
    version: u64,
    key: String,
    /// `set` or `delete`.
    kind: &'static str,
    /// How many bytes the value has.
    bytes: usize,
    #[serde(skip_serializing_if = "Option::is_none")]
    value: Option<String>,
    age_ms: u64,
}

impl Write {
    fn new(partition: u8, entry: &Entry, values: bool) -> Self {
        let value = entry.change.value.as_deref();
        Self {
            partition,
            version: entry.version.get(),
            key: String::from_utf8_lossy(&entry.change.key).into_owned(),
            kind: if value.is_some() { "set" } else { "delete" },
            bytes: value.map_or(0, <[u8]>::len),
            value: value.filter(|_| values).map(|value| String::from_utf8_lossy(value).into_owned()),
            age_ms: age_ms(entry.version.get() / 1_000),
        }
    }
}

/// How long ago a moment in milliseconds since 1970 was, by this machine's clock.
pub fn age_ms(since_ms: u64) -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(now.as_millis()).unwrap_or(u64::MAX).saturating_sub(since_ms)
}

fn writes(all: &[Write], values: bool, paint: &Paint) -> String {
    let mut headings = vec!["AGE", "KIND", "BYTES", "KEY"];
    headings.extend(values.then_some("VALUE"));
    let mut table = Table::new(&headings, paint);
    for write in all {
        let age = Span::from_millis(write.age_ms).to_string();
        let mut cells = vec![age, write.kind.to_owned(), write.bytes.to_string(), harmless(&write.key)];
        cells.extend(values.then(|| write.value.as_deref().map_or_else(|| "-".to_owned(), harmless)));
        table.push(cells, "", Vec::new());
    }
    if all.is_empty() { "nothing is left\n".to_owned() } else { table.render(paint) }
}
