//! `larderd agent exec -- SERVER …`: the server container's entry point.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;

use crate::agent::child::Program;
use crate::agent::run::{AgentError, Config, run as run_agent};
use crate::cli::{Failure, Outcome};

/// Where the agent is asked from inside its container.
pub const SOCKET: &str = "/run/larder/agent.sock";

/// Start a server in the right place, and stay with it
#[derive(clap::Args)]
#[command(after_help = "\
Example:
  larderd agent exec --config /etc/larder/agent.json -- redis-server /etc/redis/redis.conf

The server's port stays closed until its place is known: `larderd agent state` says why.")]
pub struct Args {
    /// The agent's configuration; changes are taken up while the server runs
    #[arg(long, value_name = "FILE")]
    config: PathBuf,
    /// Where /livez, /readyz, /startupz, /metrics and /state are served
    #[arg(long, value_name = "HOST:PORT", default_value = "0.0.0.0:9121")]
    listen: SocketAddr,
    /// Where handovers are asked for, by this container alone
    #[arg(long, value_name = "PATH", default_value = SOCKET)]
    socket: PathBuf,
    /// The server's command line
    #[arg(last = true, required = true, value_name = "SERVER")]
    server: Vec<String>,
}

/// Stays until it is told to end.
pub fn run(args: Args) -> Outcome {
    let Args { config, listen, socket, server } = args;
    match run_agent(Config { file: config, listen, socket, program: Program { words: server } }) {
        Ok(()) => Ok(ExitCode::SUCCESS),
        Err(error) => Err(Failure::new(&error, next_step(&error))),
    }
}

fn next_step(error: &AgentError) -> &'static str {
    match error {
        AgentError::Charge { .. } => "correct the file, or what it names; an agent starts only with what it can use",
        AgentError::Listen(_) => "choose another address, or stop what listens there",
        AgentError::Server(_) => "check the server's program and its data directory",
        AgentError::Io(_) => "raise the limits on threads and open files",
    }
}
