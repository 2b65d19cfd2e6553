//! `larderd relay`: what is written behind, to its origins.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;

use super::{Failure, Outcome};
use crate::policy::Span;
use crate::relay::run::{self, Config, RelayError};

/// The shortest claim: shorter ones end before they can be renewed on a busy machine.
const SHORTEST_CLAIM: Span = Span::from_secs(1);

/// Carry what is written behind from the journal to its origins
#[derive(clap::Args)]
#[command(after_help = "\
Several relays of one snapshot share its partitions, and take over from one that dies or stands still.

Examples:
  larderd relay --snapshot /etc/larder/snapshot.json --admin 127.0.0.1:9122
  larderd relay --snapshot snapshot.json --claim 5s")]
pub struct Args {
    /// The policy snapshot; changes are taken up while it runs
    #[arg(long, value_name = "FILE")]
    snapshot: PathBuf,
    /// Where /livez, /readyz and /metrics are served
    #[arg(long, value_name = "HOST:PORT")]
    admin: Option<SocketAddr>,
    /// After which time without a word from this relay another may take over
    #[arg(long, value_name = "DURATION", default_value = "10s", value_parser = claim)]
    claim: Span,
    /// At the end, take away the replication slots that it reads, with their publications: whoever begins next knows nothing of what changed
    /// meanwhile, and invalidates everything that follows. For a cache that ends with the relay
    #[arg(long)]
    drop_slots: bool,
}

/// Runs until it is told to stop.
pub fn run(args: Args) -> Outcome {
    let Args { snapshot, admin, claim, drop_slots } = args;
    match run::run(&Config { snapshot, admin, claim: claim.as_duration(), drop_slots }) {
        Ok(()) => Ok(ExitCode::SUCCESS),
        Err(error) => Err(Failure::new(&error, next_step(&error))),
    }
}

fn claim(text: &str) -> Result<Span, String> {
    match text.parse::<Span>() {
        Ok(span) if span >= SHORTEST_CLAIM => Ok(span),
        Ok(_) => Err(format!("a claim lasts {SHORTEST_CLAIM} or more")),
        Err(error) => Err(error.to_string()),
    }
}

fn next_step(error: &RelayError) -> &'static str {
    match error {
        RelayError::File(_) => "name the file that the control plane writes with --snapshot",
        RelayError::Snapshot(_) | RelayError::Origin(_) | RelayError::Address(_) => {
            "correct the policy it was made from, and have it written again"
        }
        RelayError::Access(_) => "correct the file; a relay starts only with keys that it can use",
        RelayError::Admin(_) => "choose another address, or stop what listens there",
        RelayError::Io(_) => "raise the limits on threads and open files",
    }
}
