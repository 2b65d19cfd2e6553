//! One file per command: arguments become a validated configuration.
//!
//! To add a command: a file with `Args` (whose doc comment is its help) and `run(Args) -> Outcome`, its `mod` line, and one line in
//! [`Larder`] or [`Larderd`] below.
//!
//! Exit codes: 0 done; 1 it failed; 2 the command line is wrong. `larder check`, `larder status`, `larder explain` and `larder invalidate` have their own, which
//! their help lists.

mod agent;
mod ask;
#[cfg(feature = "control-plane")]
mod changes;
#[cfg(feature = "control-plane")]
mod check;
#[cfg(feature = "control-plane")]
mod cluster;
#[cfg(feature = "control-plane")]
mod completion;
#[cfg(feature = "control-plane")]
mod crds;
#[cfg(feature = "control-plane")]
mod dead_letters;
#[cfg(feature = "control-plane")]
mod demo;
#[cfg(feature = "control-plane")]
mod dev;
#[cfg(feature = "control-plane")]
mod explain;
mod failure;
#[cfg(feature = "control-plane")]
mod invalidate;
mod invalidate_here;
#[cfg(feature = "control-plane")]
mod journal;
mod local;
#[cfg(feature = "control-plane")]
mod operator;
#[cfg(feature = "control-plane")]
mod output;
mod relay;
#[cfg(feature = "control-plane")]
mod runs;
mod sidecar;
#[cfg(feature = "control-plane")]
mod status;
#[cfg(feature = "control-plane")]
mod uninstall_check;
#[cfg(feature = "control-plane")]
mod waiting;
mod wanted;

use std::process::ExitCode;

use clap::error::ErrorKind;
use clap::{Args, Parser, Subcommand, ValueEnum};

#[cfg(feature = "control-plane")]
use completion::words as complete_words;
pub use failure::{Failure, Outcome, WRONG_LINE};

use crate::telemetry::logs::{self, LogFormat};

/// Declares the commands of a binary: each line is `Name(module)`.
macro_rules! commands {
    ($(#[$meta:meta])* $binary:ident { $($command:ident($module:ident)),* $(,)? }) => {
        $(#[$meta])*
        #[derive(Subcommand)]
        enum $binary {
            $($command($module::Args),)*
        }

        impl $binary {
            fn run(self) -> Outcome {
                match self {
                    $(Self::$command(args) => $module::run(args),)*
                }
            }
        }
    };
}

#[cfg(feature = "control-plane")]
commands! {
    /// What `larder` can do.
    Larder {
        Agent(agent),
        Changes(changes),
        Check(check),
        CompleteWords(complete_words),
        Completion(completion),
        Crds(crds),
        DeadLetters(dead_letters),
        Demo(demo),
        Dev(dev),
        Explain(explain),
        Invalidate(invalidate),
        Journal(journal),
        Operator(operator),
        Relay(relay),
        Sidecar(sidecar),
        Status(status),
        UninstallCheck(uninstall_check),
    }
}

commands! {
    /// What `larderd` can do.
    Larderd {
        Agent(agent),
        Explain(ask),
        Invalidate(invalidate_here),
        Relay(relay),
        Sidecar(sidecar),
    }
}

#[derive(Parser)]
#[command(version, about, propagate_version = true, max_term_width = 110)]
struct Line<C: Subcommand> {
    #[command(subcommand)]
    command: C,
    #[command(flatten)]
    logs: LogArgs,
}

/// How any command logs.
#[derive(Args)]
struct LogArgs {
    /// Which events are logged: error, warn, info, debug or trace, or finer, such as info,larder::sidecar=debug
    #[arg(long, global = true, value_name = "FILTER", default_value = "info", help_heading = "Logs")]
    log: String,
    /// How they are written, on standard error
    #[arg(long, global = true, value_enum, default_value_t, help_heading = "Logs")]
    log_format: Format,
}

#[derive(Clone, Copy, Default, ValueEnum)]
enum Format {
    /// Lines for people
    #[default]
    Text,
    /// One JSON object a line
    Json,
}

/// The name under which kubectl finds a plugin, and what its users type.
#[cfg(feature = "control-plane")]
const PLUGIN: (&str, &str) = ("kubectl-larder", "kubectl larder");

/// Runs `larder` with the process' arguments.
#[cfg(feature = "control-plane")]
pub fn larder() -> ExitCode {
    let program = std::env::args_os().next().unwrap_or_default();
    let is_plugin = std::path::Path::new(&program).file_name() == Some(PLUGIN.0.as_ref());
    let name = if is_plugin { PLUGIN.1 } else { "larder" };
    main::<Larder>(name, "Managed cache tiers: custom resources, their checks, and everything on one machine.", Larder::run)
}

/// Runs `larderd` with the process' arguments.
pub fn larderd() -> ExitCode {
    main::<Larderd>("larderd", "Larder's data plane.", Larderd::run)
}

fn main<C: Subcommand>(name: &'static str, about: &'static str, run: fn(C) -> Outcome) -> ExitCode {
    let command = <Line<C> as clap::CommandFactory>::command().name(name).bin_name(name).about(about);
    let line = command.try_get_matches().and_then(|matches| <Line<C> as clap::FromArgMatches>::from_arg_matches(&matches));
    let line = match line {
        Ok(line) => line,
        Err(error) => {
            // Nothing is left to do where even this cannot be written.
            let _ = error.print();
            return if matches!(error.kind(), ErrorKind::DisplayHelp | ErrorKind::DisplayVersion) {
                ExitCode::SUCCESS
            } else {
                ExitCode::from(WRONG_LINE)
            };
        }
    };
    let format = match line.logs.log_format {
        Format::Text => LogFormat::Text,
        Format::Json => LogFormat::Json,
    };
    let outcome = match logs::init(format, &line.logs.log, logs::colours_on_stderr()) {
        Ok(()) => {
            // An error means that a provider is set already, and there is only this one.
            let _ = rustls::crypto::ring::default_provider().install_default();
            run(line.command)
        }
        Err(error) => Err(Failure::new(error.to_string(), "correct --log").with_code(WRONG_LINE)),
    };
    outcome.unwrap_or_else(|failure| {
        failure.print();
        failure.code()
    })
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    #[test]
    fn the_command_lines_are_consistent() {
        #[cfg(feature = "control-plane")]
        Line::<Larder>::command().debug_assert();
        Line::<Larderd>::command().debug_assert();
    }
}
