//! `larderd agent`: beside a Redis or Valkey server.

mod exec;
mod local;
mod sentinel;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use super::{Failure, Outcome};
use crate::agent::child::become_server;
use crate::agent::place::install;
use crate::policy::Span;

/// Be a server's entry point: decide its place, supervise it, hand it over
#[derive(clap::Args)]
pub struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(clap::Subcommand)]
enum Command {
    Exec(exec::Args),
    Sentinel(sentinel::Args),
    /// Copy this program to a file, for a container whose image does not have it
    Install {
        /// The file; what is there is replaced
        #[arg(value_name = "DESTINATION")]
        destination: PathBuf,
    },
    /// Hand this server's role over to a replica, if it is a primary, and wait until that is done (for preStop)
    Handover {
        #[command(flatten)]
        socket: Socket,
        /// When to give up and serve on
        #[arg(long, value_name = "DURATION", default_value = "15s")]
        limit: Span,
    },
    /// Ask whether the server lives, has started, or is ready (for exec probes): exit code 0 or 1
    Probe {
        #[command(flatten)]
        socket: Socket,
        /// What to ask
        #[arg(value_enum)]
        what: What,
    },
    /// Print what the agent knows of its server, as JSON
    State {
        #[command(flatten)]
        socket: Socket,
    },
    /// Become the server, and end with the agent
    #[command(hide = true)]
    Become {
        /// The agent's process id
        #[arg(long)]
        parent: u32,
        /// The server's command line
        #[arg(last = true, required = true, value_name = "SERVER")]
        server: Vec<String>,
    },
}

/// Where the agent of this machine or container is asked.
#[derive(clap::Args)]
struct Socket {
    /// The agent's Unix socket
    #[arg(long, value_name = "PATH", default_value = exec::SOCKET)]
    socket: PathBuf,
}

#[derive(Clone, Copy, clap::ValueEnum)]
enum What {
    /// Whether it lives
    Live,
    /// Whether it has started
    Start,
    /// Whether clients are served
    Ready,
}

/// Does one of it.
pub fn run(args: Args) -> Outcome {
    match args.command {
        Command::Exec(args) => exec::run(args),
        Command::Sentinel(args) => sentinel::run(args),
        Command::Install { destination } => install_at(&destination),
        Command::Handover { socket, limit } => local::handover(&socket.socket, limit.as_duration()),
        Command::Probe { socket, what } => {
            let path = match what {
                What::Live => "/livez",
                What::Start => "/startupz",
                What::Ready => "/readyz",
            };
            local::show(&socket.socket, path)
        }
        Command::State { socket } => local::show(&socket.socket, "/state"),
        Command::Become { parent, server } => become_named(parent, &server),
    }
}

fn install_at(destination: &Path) -> Outcome {
    match install(destination) {
        Ok(()) => Ok(ExitCode::SUCCESS),
        Err(error) => Err(Failure::new(error, "name a file in a directory that exists, can be written and has space")),
    }
}

fn become_named(parent: u32, server: &[String]) -> Outcome {
    let Some((program, arguments)) = server.split_first() else { return Ok(ExitCode::FAILURE) };
    let error = become_server(parent, program.as_ref(), arguments);
    Err(Failure::new(format!("{program}: {error}"), "name the server's program after --"))
}
