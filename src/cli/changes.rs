//! `larder changes`: whether the changes of the databases that rules follow are told, and how far behind that is.

use std::process::ExitCode;
use std::time::Duration;

use serde::Serialize;

use super::journal::SnapshotArgs;
use super::output::{self, Format, Paint, Table, harmless};
use super::{Failure, Outcome};
use crate::journal::feed::{LATE, View};
use crate::relay::desk::FeedStatus;

/// How old a change may be that is not said before something is wrong: a relay that has nothing to say looks every few seconds.
const LATE_MS: u64 = LATE.as_secs() * 1_000;

/// See whether a relay reads the changes of the databases that rules follow, and how much the databases keep for it
#[derive(clap::Args)]
#[command(after_help = "\
Exit codes: 0 all are read; 1 one is not, or its slot is gone, or the database does not answer; 2 the cache cannot be asked, or the
command line is wrong

Examples:
  larder changes
  larder changes --snapshot snapshot.json --output json")]
pub struct Args {
    #[command(flatten)]
    place: SnapshotArgs,
    /// How it is written, on standard output
    #[arg(long, short, value_enum, default_value_t, value_name = "FORMAT")]
    output: Format,
}

/// Asks, and shows.
pub fn run(args: Args) -> Outcome {
    let Args { place, output } = args;
    let feeds = place.with(async |desk| desk.feeds().await)?;
    if feeds.is_empty() {
        return Err(Failure::new("no rule follows a table", "name another snapshot").with_code(super::WRONG_LINE));
    }
    let shown: Vec<Shown> = feeds.into_iter().map(Shown::new).collect();
    output::answer(output, &shown, |paint| table(&shown, paint))?;
    Ok(if shown.iter().all(|feed| feed.trouble.is_none()) { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// A feed, for a person.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Shown {
    origin: String,
    slot: String,
    /// The relay that reads it.
    reader: Option<String>,
    /// Up to where in the database's log all is said.
    position: Option<String>,
    /// How old a change may be that is not said, in milliseconds.
    behind_milliseconds: Option<u64>,
    /// How much of its log the database keeps for it.
    kept_bytes: Option<u64>,
    /// What is not well.
    trouble: Option<String>,
}

impl Shown {
    fn new(feed: FeedStatus) -> Self {
        let FeedStatus { origin, slot, ends, view, lag } = feed;
        let View { reader, position, behind_ms, trouble: said, is_removed, .. } = view;
        let trouble = match &lag {
            Err(error) => Some(error.to_string()),
            Ok(None) if ends && is_removed => None,
            Ok(_) if ends => Some(format!("nobody follows it any more: a relay takes the slot `{slot}` away")),
            Ok(None) => Some(format!("the database has no slot `{slot}`: a relay makes it when it begins")),
            Ok(Some(lag)) if lag.lost => Some("the slot is lost: a relay makes it anew, and invalidates what follows".to_owned()),
            Ok(Some(_)) if reader.is_none() => Some("no relay reads it: see that one runs, and what its log says".to_owned()),
            Ok(Some(_)) if said.is_some() => said,
            Ok(Some(_)) => behind_ms.filter(|behind| *behind > LATE_MS).map(|behind| {
                format!("what was committed {} s ago may not be said yet: see what the relay's log says", behind / 1_000)
            }),
        };
        let kept_bytes = lag.ok().flatten().map(|lag| lag.bytes);
        Self { origin, slot, reader, position, behind_milliseconds: behind_ms, kept_bytes, trouble }
    }
}

fn table(feeds: &[Shown], paint: &Paint) -> String {
    let mut table = Table::new(&["ORIGIN", "SLOT", "READER", "SAID UP TO", "BEHIND", "KEPT"], paint);
    let dash = || "-".to_owned();
    for Shown { origin, slot, reader, position, behind_milliseconds, kept_bytes, trouble } in feeds {
        let behind =
            behind_milliseconds.map_or_else(dash, |millis| format!("{:.1} s", Duration::from_millis(millis).as_secs_f64()));
        let kept = kept_bytes.map_or_else(dash, |bytes| format!("{bytes} bytes"));
        let reader = reader.as_deref().map_or_else(|| "none".to_owned(), harmless);
        let cells = vec![origin.clone(), slot.clone(), reader, position.clone().unwrap_or_else(dash), behind, kept];
        let colour = if trouble.is_some() { paint.bad } else { "" };
        table.push(cells, colour, trouble.iter().map(|trouble| harmless(trouble)).collect());
    }
    table.render(paint)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::origin::LoadError;
    use crate::origin::changes::Lag;

    fn feed(reader: Option<&str>, lag: Result<Option<Lag>, LoadError>) -> Shown {
        let view = View { reader: reader.map(str::to_owned), behind_ms: Some(1_500), ..View::default() };
        shown(view, false, lag)
    }

    fn shown(view: View, ends: bool, lag: Result<Option<Lag>, LoadError>) -> Shown {
        let (origin, slot) = ("db".to_owned(), "larder_main_db".to_owned());
        Shown::new(FeedStatus { origin, slot, ends, view, lag })
    }

    #[test]
    fn what_is_not_well_is_said() {
        let well = feed(Some("a"), Ok(Some(Lag { bytes: 7, lost: false })));
        assert_eq!((well.kept_bytes, well.trouble), (Some(7), None));
        let away = LoadError::Unreachable { origin: "db".to_owned(), why: "connection refused".to_owned() };
        for (shown, word) in [
            (feed(None, Ok(Some(Lag::default()))), "no relay reads it"),
            (feed(Some("a"), Ok(Some(Lag { bytes: 7, lost: true }))), "lost"),
            (feed(Some("a"), Ok(None)), "no slot"),
            (feed(Some("a"), Err(away)), "cannot be reached"),
        ] {
            assert!(shown.trouble.is_some_and(|trouble| trouble.contains(word)), "{word}");
        }
        let read = || View { reader: Some("a".to_owned()), ..View::default() };
        let there = || Ok(Some(Lag::default()));
        for (view, ends, lag, word) in [
            (View { behind_ms: Some(45_500), ..read() }, false, there(), "committed 45 s ago"),
            (View { trouble: Some("there is no table `x`".to_owned()), ..read() }, false, there(), "no table `x`"),
            (read(), true, there(), "takes the slot `larder_main_db` away"),
        ] {
            assert!(shown(view, ends, lag).trouble.is_some_and(|trouble| trouble.contains(word)), "{word}");
        }
        assert_eq!(shown(View { is_removed: true, ..read() }, true, Ok(None)).trouble, None);
    }
}
