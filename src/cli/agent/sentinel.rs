//! `larderd agent sentinel -- SERVER …`: the sentinel container's entry point.

use std::path::PathBuf;
use std::time::Duration;

use tracing::warn;

use crate::agent::place::{PlaceError, SentinelFiles, become_sentinel};
use crate::agent::reach;
use crate::cli::{Failure, Outcome};

/// How long those that a sentinel remembers are waited for. Their pods are replaced within that time; and where a node is dead, too, the
/// other sentinels need this one no sooner.
const REACHED_WITHIN: Duration = Duration::from_secs(10);

/// Write a sentinel's configuration, with what it remembers, and become the sentinel
#[derive(clap::Args)]
#[command(after_help = "\
Example:
  larderd agent sentinel --template /etc/larder/sentinel.conf --file /data/sentinel.conf -- redis-server

A sentinel keeps its memory in its own configuration file. What it remembers stays; all the rest is written anew at each start.
It starts once each that it remembers accepts a connection or refuses one, and after ten seconds at the latest.")]
pub struct Args {
    /// Its addresses and, where it is given one, its `sentinel myid`
    #[arg(long, value_name = "FILE")]
    template: PathBuf,
    /// Lines of users
    #[arg(long, value_name = "FILE")]
    users: Option<PathBuf>,
    /// The user as which it logs in at servers and other sentinels
    #[arg(long, value_name = "FILE", requires = "password_file")]
    username_file: Option<PathBuf>,
    /// That user's password
    #[arg(long, value_name = "FILE", requires = "username_file")]
    password_file: Option<PathBuf>,
    /// Its own file, with its memory; it need not exist
    #[arg(long, value_name = "FILE")]
    file: PathBuf,
    /// The server's program, and further arguments
    #[arg(last = true, required = true, value_name = "SERVER")]
    server: Vec<String>,
}

/// Returns only where it fails.
pub fn run(args: Args) -> Outcome {
    let Args { template, users, username_file, password_file, file, server } = args;
    let files = SentinelFiles { template, users, login: username_file.zip(password_file), file };
    let configuration = files.compose().map_err(|error: PlaceError| {
        Failure::new(error, "name files that can be read, and a file in a directory that can be written and has space")
    })?;
    let Some((program, arguments)) = server.split_first() else {
        return Err(Failure::new("no program", "name the server's program after --"));
    };
    let silent = reach::wait(&reach::remembered(&configuration), REACHED_WITHIN);
    if !silent.is_empty() {
        warn!(?silent, "nobody answers there; the sentinel starts all the same");
    }
    let error = become_sentinel(program.as_ref(), arguments, &files.file);
    Err(Failure::new(format!("{program}: {error}"), "name the server's program after --"))
}
