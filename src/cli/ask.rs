//! `larderd explain`: asks the sidecar of this container what is in force there.

use std::ffi::OsString;
use std::io::{self, Write as _};
use std::os::unix::ffi::OsStrExt as _;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use reqwest::Method;

use super::local::percent_encoded;
use super::{Failure, Outcome, local};
use crate::policy::binding::ADMIN_SOCKET;

/// How long an answer may take, beside the time that keys are watched.
const LIMIT: Duration = Duration::from_secs(5);

/// Ask the sidecar of this container which rule decides over a key, or for its whole policy
///
/// The answer is JSON, without secrets. Only the sidecar's own user may ask: in a pod, `larder explain` asks by this command.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  larderd explain user:42                    the rule that decides over a key, and why
  larderd explain                            the whole policy in force, its generation, and how it came
  larderd explain --hot 5                    the keys that clients use most during the next five seconds")]
pub struct Args {
    /// The key; otherwise the whole policy
    #[arg(value_name = "KEY", conflicts_with = "hot")]
    key: Option<OsString>,
    /// Watch the keys of commands for this many seconds, and tell which are used most
    #[arg(long, value_name = "SECONDS", value_parser = clap::value_parser!(u8).range(1..=20))]
    hot: Option<u8>,
    /// The sidecar's socket, as `larderd sidecar --admin-socket` names it
    #[arg(long, value_name = "PATH", default_value = ADMIN_SOCKET)]
    socket: PathBuf,
}

/// Prints the answer.
pub fn run(args: Args) -> Outcome {
    let Args { key, hot, socket } = args;
    let (path, limit) = match (key, hot) {
        (Some(key), _) => (format!("/explain?key={}", percent_encoded(key.as_bytes())), LIMIT),
        (None, Some(seconds)) => (format!("/hot?seconds={seconds}"), LIMIT + Duration::from_secs(u64::from(seconds))),
        (None, None) => ("/policy".to_owned(), LIMIT),
    };
    let (status, text) = local::ask(&socket, Method::GET, &path, limit, "a running `larderd sidecar`")?;
    if !status.is_success() {
        return Err(Failure::new(text.trim_end(), "ask again, or see the sidecar's log"));
    }
    // Nobody is left to tell where nobody reads.
    let _ = io::stdout().write_all(text.as_bytes());
    Ok(ExitCode::SUCCESS)
}
