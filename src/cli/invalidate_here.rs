//! `larderd invalidate`: has the sidecar of this container invalidate something.

use std::io::{self, Write as _};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use reqwest::Method;

use super::wanted::Wanted;
use super::{Failure, Outcome, local};
use crate::policy::binding::ADMIN_SOCKET;

/// How long an answer may take: longer than the sidecar tries.
pub const LIMIT: Duration = Duration::from_secs(28);

/// Have the sidecar of this container invalidate keys, or all keys of a tag, a rule or a pattern
///
/// The answer is JSON. Keys have gone when it comes. For a tag, a rule or a pattern it names an event, by which --event asks how far that is.
/// Only the sidecar's own user may ask: in a pod, `larder invalidate` asks by this command.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  larderd invalidate user:7 user:8                 these keys
  larderd invalidate --rule user --dry-run         how many keys would go
  larderd invalidate --rule user                   all keys of the rule
  larderd invalidate --rule user --event 1700000000000-0
                                                   how far that is")]
pub struct Args {
    #[command(flatten)]
    wanted: Wanted,
    /// Tell what would go, and change nothing
    #[arg(long)]
    dry_run: bool,
    /// Answer once no sidecar can show what the keys had before
    #[arg(long, conflicts_with_all = ["dry_run", "event"])]
    sync: bool,
    /// Ask how far the tag, rule or pattern is, by the event that it was answered with
    #[arg(long, value_name = "ID", conflicts_with_all = ["dry_run", "keys"])]
    event: Option<String>,
    /// The sidecar's socket, as `larderd sidecar --admin-socket` names it
    #[arg(long, value_name = "PATH", default_value = ADMIN_SOCKET)]
    socket: PathBuf,
}

/// Prints the answer.
pub fn run(args: Args) -> Outcome {
    let Args { wanted, dry_run, sync, event, socket } = args;
    let question = match (&event, dry_run, sync) {
        (Some(event), ..) => Question::Follow(event),
        (None, true, _) => Question::Try,
        (None, false, true) => Question::Sync,
        (None, false, false) => Question::Invalidate,
    };
    for query in wanted.queries() {
        let (method, path) = question.request(&query);
        let (status, text) = local::ask(&socket, method, &path, LIMIT, "a running `larderd sidecar`")?;
        if !status.is_success() {
            return Err(Failure::new(text.trim_end(), "repeat it, which does no harm, or see the sidecar's log"));
        }
        // Nobody is left to tell where nobody reads.
        let _ = io::stdout().write_all(text.as_bytes());
    }
    Ok(ExitCode::SUCCESS)
}

/// What a sidecar is asked.
#[derive(Debug, Clone, Copy)]
pub enum Question<'e> {
    /// What would go.
    Try,
    /// That it goes.
    Invalidate,
    /// That it goes, and that no sidecar can show what keys had before once it is answered.
    Sync,
    /// How far the event is that it was answered with.
    Follow(&'e str),
}

impl Question<'_> {
    /// How it is asked over the sidecar's socket.
    pub fn request(self, query: &str) -> (Method, String) {
        match self {
            Self::Follow(event) => {
                (Method::GET, format!("/invalidate?{query}&event={}", local::percent_encoded(event.as_bytes())))
            }
            Self::Try => (Method::POST, format!("/invalidate?{query}&dry-run")),
            Self::Sync => (Method::POST, format!("/invalidate?{query}&sync")),
            Self::Invalidate => (Method::POST, format!("/invalidate?{query}")),
        }
    }

    /// The options by which `larderd invalidate` asks it.
    #[cfg(feature = "control-plane")]
    pub fn options(self) -> Vec<std::ffi::OsString> {
        let words: &[&str] = match &self {
            Self::Follow(event) => &["--event", event],
            Self::Try => &["--dry-run"],
            Self::Sync => &["--sync"],
            Self::Invalidate => &[],
        };
        words.iter().map(Into::into).collect()
    }
}
