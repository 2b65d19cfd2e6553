//! `larder invalidate`: what keys stand for has changed, and whoever changed it says so by hand.

mod way;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::time::{sleep, timeout};

use self::way::Way;
use super::cluster::{ClusterArgs, block_on, object_name};
use super::explain::workload::WorkloadName;
use super::invalidate_here::Question;
use super::output::{self, Format, Paint};
use super::wanted::Wanted;
use super::{Failure, Outcome};
use crate::policy::Span;

/// How often it is asked how far it is.
const LOOK_EVERY: Duration = Duration::from_millis(500);

/// Invalidate keys, or all keys of a tag, a rule or a pattern
///
/// Values, stale copies and remembered absences go, and what was loaded before is not stored any more. It is done when the command ends;
/// with a tag, a rule or a pattern it is written down by then, and --wait waits until every server was walked over. Keys of versioned rules may
/// be shown by other sidecars for a second more, which --sync waits for.
///
/// Without --workload the running `larder dev` of this machine is asked.
#[derive(clap::Args)]
#[command(after_help = "\
Exit codes: 0 done, or written down; 1 it was not, and may be repeated; 2 nobody can be asked, or the command line is wrong

Examples:
  larder invalidate user:7 user:8                              two keys of the running `larder dev`
  larder invalidate --tag user:7                               all keys that have this tag
  larder invalidate --rule user --dry-run                      how many keys would go
  larder invalidate --pattern 'user:{id}' --wait               all of a pattern, until they have gone
  larder invalidate page:7 --sync                              until no sidecar can show what it had before
  larder invalidate user:7 --workload deployment/shop -n shop  by a sidecar of a workload on Kubernetes")]
pub struct Args {
    #[command(flatten)]
    wanted: Wanted,
    /// Tell what would go, and change nothing
    #[arg(long)]
    dry_run: bool,
    /// Wait until the keys of the tag, the rule or the pattern have gone, and show how far it is
    #[arg(long, conflicts_with = "dry_run")]
    wait: bool,
    /// End when no sidecar can show what is invalidated any more: as --wait, and for keys of versioned rules too
    #[arg(long, conflicts_with = "dry_run")]
    sync: bool,
    /// How long --sync may take; after that the command fails, and what it has begun goes on
    #[arg(long, value_name = "TIME", default_value = "1m", requires = "sync")]
    deadline: Span,
    /// The workload whose sidecar is asked, such as deployment/shop, statefulset/worker or pod/debug
    #[arg(long, short, value_name = "KIND/NAME", conflicts_with_all = ["run_dir", "socket"])]
    workload: Option<WorkloadName>,
    /// The namespace; otherwise that of the context
    #[arg(long, short, value_name = "NAME", value_parser = object_name, requires = "workload")]
    namespace: Option<String>,
    /// The directory of a `larder dev`, which it names as it starts, or its --data
    #[arg(long, value_name = "DIR", conflicts_with = "socket")]
    run_dir: Option<PathBuf>,
    /// The socket of a sidecar, as `larderd sidecar --admin-socket` names it
    #[arg(long, value_name = "PATH")]
    socket: Option<PathBuf>,
    /// How the answer is written, on standard output
    #[arg(long, short, value_enum, default_value_t, value_name = "FORMAT")]
    output: Format,
    #[command(flatten)]
    cluster: ClusterArgs,
}

/// What came of it.
#[derive(Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
struct Told {
    /// Whether it was only tried.
    dry_run: bool,
    /// What is meant, in words.
    wanted: String,
    /// How many keys were named.
    #[serde(skip_serializing_if = "Option::is_none")]
    named: Option<u64>,
    /// How many of them were there, or would go.
    #[serde(skip_serializing_if = "Option::is_none")]
    removed: Option<u64>,
    /// The event that was written.
    #[serde(skip_serializing_if = "Option::is_none")]
    event: Option<String>,
    /// Whether that is all.
    complete: bool,
}

/// A sidecar's answer to a request: each has some of these.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub struct Answer {
    keys: serde_json::Value,
    removed: Option<u64>,
    event: Option<String>,
    found: Option<u64>,
    complete: Option<bool>,
    state: String,
    pass: u64,
    seen: u64,
    total: u64,
}

/// Asks, and waits where that is wanted.
pub fn run(args: Args) -> Outcome {
    let told = block_on(carry_out(&args))?;
    output::answer(args.output, &told, |paint| text(&told, paint))?;
    Ok(ExitCode::SUCCESS)
}

async fn carry_out(args: &Args) -> Result<Told, Failure> {
    let way = match &args.workload {
        Some(workload) => Way::to_workload(&args.cluster, args.namespace.as_deref(), workload).await?,
        None => Way::on_this_machine(args.socket.as_deref(), args.run_dir.as_deref())?,
    };
    if !args.sync {
        return ask(args, &way, if args.dry_run { Question::Try } else { Question::Invalidate }).await;
    }
    match timeout(Duration::from_millis(args.deadline.as_millis()), ask(args, &way, Question::Sync)).await {
        Ok(told) => told,
        Err(_) => Err(Failure::new(
            format!("within {} it was not everywhere that {} had gone", args.deadline, args.wanted.describe()),
            "what was begun goes on: repeat it, which does no harm, with a longer --deadline",
        )),
    }
}

async fn ask(args: &Args, way: &Way, question: Question<'_>) -> Result<Told, Failure> {
    let answers = way.ask(&args.wanted, question).await?;
    let mut told = sum(&answers, args.wanted.describe(), args.dry_run);
    if (args.wait || args.sync)
        && let Some(event) = told.event.clone()
    {
        told.removed = follow(way, args, &event).await?;
        told.complete = true;
    }
    Ok(told)
}

/// The answers of all parts as one.
fn sum(answers: &[Answer], wanted: String, dry_run: bool) -> Told {
    let mut told = Told { dry_run, wanted, complete: true, ..Told::default() };
    for answer in answers {
        let (named, there) = match &answer.keys {
            serde_json::Value::Array(keys) => {
                let there = keys.iter().filter(|key| key["there"] == true).count();
                (Some(keys.len() as u64), Some(there as u64))
            }
            keys => (keys.as_u64(), answer.removed),
        };
        told.named = add(told.named, named);
        told.removed = add(told.removed, answer.found.or(there));
        told.complete &= answer.complete.unwrap_or(answer.event.is_none());
        told.event = answer.event.clone().or(told.event);
    }
    told
}

fn add(one: Option<u64>, other: Option<u64>) -> Option<u64> {
    one.map_or(other, |one| Some(one + other.unwrap_or_default()))
}

/// Waits until an event is carried out; how many keys its walk removed, where it took one.
async fn follow(way: &Way, args: &Args, event: &str) -> Result<Option<u64>, Failure> {
    let progress = super::waiting::Progress::begin("the event to be read");
    loop {
        let answer = way.ask(&args.wanted, Question::Follow(event)).await?.into_iter().next().unwrap_or_default();
        match answer.state.as_str() {
            "ended" => return Ok(answer.removed),
            "unknown" => {
                let next = "see the sidecars' logs, and repeat it";
                return Err(Failure::new(format!("the event {event} was read, and nothing is known of what came of it"), next));
            }
            _ => progress.tell(&state(&answer)),
        }
        sleep(LOOK_EVERY).await;
    }
}

fn state(answer: &Answer) -> String {
    match answer.state.as_str() {
        "waiting" => "another walk to end".to_owned(),
        "walking" => {
            let share = (answer.seen * 100).checked_div(answer.total).unwrap_or(100).min(100);
            format!("walk {} of 2, {share} %: {} keys removed", answer.pass, answer.removed.unwrap_or_default())
        }
        _ => "the event to be read".to_owned(),
    }
}

fn text(told: &Told, paint: &Paint) -> String {
    let Told { dry_run, wanted, named: _, removed, event, complete } = told;
    let count = removed.unwrap_or_default();
    let (good, busy, plain) = (paint.good, paint.busy, paint.plain);
    match (dry_run, event, complete) {
        (true, _, true) => format!("{wanted}: {count} would go\n"),
        (true, _, false) => format!("{wanted}: at least {count} would go; there are too many to count in ten seconds\n"),
        (false, Some(event), false) => {
            format!("{wanted}: {busy}written down{plain} as event {event}; they go from now on, and --wait waits for it\n")
        }
        (false, Some(_), true) if removed.is_none() => format!("{wanted}: {good}invalidated{plain}\n"),
        (false, ..) => format!("{wanted}: {good}invalidated{plain}; {count} had something in the cache\n"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(answers: &str, dry_run: bool) -> String {
        let answers: Vec<Answer> = serde_json::from_str(answers).expect("answers");
        text(&sum(&answers, "the keys".to_owned(), dry_run), &Paint::NONE)
    }

    #[test]
    fn answers_are_told_in_words() {
        assert_eq!(
            told(r#"[{"keys":2,"removed":1},{"keys":1,"removed":1}]"#, false),
            "the keys: invalidated; 2 had something in the cache\n"
        );
        let tried = r#"[{"dryRun":true,"keys":[{"key":"a","there":true},{"key":"b","there":false}]}]"#;
        assert_eq!(told(tried, true), "the keys: 1 would go\n");
        assert!(told(r#"[{"found":7,"complete":false}]"#, true).starts_with("the keys: at least 7 would go"));
        assert!(told(r#"[{"event":"7-0","kind":"rule"}]"#, false).contains("written down as event 7-0"));
    }

    #[test]
    fn a_walk_says_how_far_it_is() {
        let answer = Answer { state: "walking".to_owned(), pass: 2, seen: 5, total: 10, removed: Some(3), ..Answer::default() };
        assert_eq!(state(&answer), "walk 2 of 2, 50 %: 3 keys removed");
        assert_eq!(state(&Answer { total: 0, ..answer }), "walk 2 of 2, 100 %: 3 keys removed");
    }
}
