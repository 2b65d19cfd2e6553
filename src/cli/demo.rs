//! `larder demo`: the main job in a minute.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use super::{Failure, Outcome};
use crate::demo::client::Ttls;
use crate::demo::{self, Config, DemoError};

/// Show what a cache does for a slow database: the same load without one, with plain cache-aside, and with Larder
///
/// Loads a public data set (every flight out of New York in 2013) into an embedded SQLite, and asks it for departure boards and
/// punctuality: aggregates of 50 to 300 ms. Five phases meet the same requests at the same times, while rows change: `none` (each
/// request is a query), `aside` (GET, and on nil a query and SET, against a plain Redis), `observe` and `aside+larder` (the same client,
/// against a sidecar that only predicts, or acts), and `larder` (GET from a sidecar that loads what is missing). Every reply is held
/// against the truth. Takes two and a half minutes.
///
/// Exit codes: 0 all expectations met; 1 one was not met, or the demo failed; 2 the command line is wrong.
#[derive(clap::Args)]
pub struct Args {
    /// The length of each phase's open loop, in seconds
    #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u64).range(1..=3600))]
    seconds: u64,
    /// Where the table, the picture, demo.json and the origin's records go
    #[arg(long, value_name = "DIR", default_value = "target/demo")]
    report: PathBuf,
    /// A Postgres to use instead of the embedded SQLite; the demo drops and creates its schema `larder_demo` there. The URL may
    /// hold a password: give it as LARDER_DEMO_DATABASE rather than as an argument
    #[arg(long, value_name = "URL")]
    database: Option<String>,
    /// Requests a second in the open loop
    #[arg(long, default_value_t = 1000, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    rate: u32,
    /// Clients, each with a connection of its own
    #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(u16).range(1..=150))]
    clients: u16,
    /// Make up this many flights instead of reading the data set
    #[arg(long, value_parser = clap::value_parser!(u32).range(100..=1_000_000))]
    rows: Option<u32>,
    /// Where scripts/demo-data left the data set, and where the database made from it is kept
    #[arg(long, value_name = "DIR", default_value = ".cache/demo")]
    cache: PathBuf,
    /// The redis-server or valkey-server to run
    #[arg(long, value_name = "PATH")]
    server_bin: Option<PathBuf>,
}

/// Runs the command.
pub fn run(args: Args) -> Outcome {
    let larder =
        std::env::current_exe().map_err(|why| Failure::new(format!("this program cannot be found: {why}"), "run it again"))?;
    let length = Duration::from_secs(args.seconds);
    let config = Config {
        length,
        rate: f64::from(args.rate),
        clients: usize::from(args.clients),
        ttls: Ttls { board: board_ttl(args.seconds), flight: Duration::from_secs(600) },
        sidecars: 2,
        database: args.database.or_else(|| std::env::var("LARDER_DEMO_DATABASE").ok()),
        rows: args.rows,
        cache: args.cache,
        report: args.report,
        larder,
        server: args.server_bin,
    };
    match demo::run(config) {
        Ok(true) => Ok(ExitCode::SUCCESS),
        Ok(false) => Ok(ExitCode::FAILURE),
        Err(error) => Err(Failure::new(&error, next_step(&error))),
    }
}

/// Less than a sixth of the phase, in steps of 100 ms, so that every board expires at least five times in it although it is gone while
/// it is loaded; at least a second.
fn board_ttl(seconds: u64) -> Duration {
    Duration::from_millis(seconds * 100 / 64 * 100).max(Duration::from_secs(1))
}

fn next_step(error: &DemoError) -> &'static str {
    match error {
        DemoError::Data(_) => "run `make demo`, which fetches the data set first, or try a made-up one with --rows 50000",
        DemoError::Database(_) => "check that --database is reachable and may create a schema, or leave it out to use SQLite",
        DemoError::Process(_) => "check that redis-server is installed (make setup), or name one with --server-bin",
        DemoError::Report(_) | DemoError::System(_) => "check the directory given as --report, free space and open files",
        DemoError::Records(_) => "run it again; see the sidecars' logs in the directory given as --report",
        DemoError::Origin(_) => "correct the URL given as --database, or leave it out to use SQLite",
        DemoError::Client(_) | DemoError::Histogram(_) | DemoError::Pattern(_) => {
            "run it again; if it persists, report it with this message"
        }
        DemoError::Interrupted => "run it again, and let it finish; --seconds makes it shorter",
    }
}
