//! `larderd sidecar`: the proxy beside a workload.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;

use super::{Failure, Outcome};
use crate::origin::OriginError;
use crate::policy::Span;
use crate::policy::binding::{self, BindingName};
use crate::sidecar::delivery::Binding;
use crate::sidecar::reload::PolicyError;
use crate::sidecar::server::{self, Config, StartError};

/// Serve Redis clients under a policy, beside a workload
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  larderd sidecar --snapshot /etc/larder/snapshot.json --listen 127.0.0.1:6379
  larderd sidecar --snapshot snapshot.json --listen 127.0.0.1:6379 --listen '[::1]:6379'
  larderd sidecar --snapshot snapshot.json --socket /run/larder/redis.sock --admin 127.0.0.1:9121
  larderd sidecar --binding shop-1f0c8a52de --listen 127.0.0.1:6379")]
pub struct Args {
    /// The policy snapshot; changes are taken up while clients stay connected
    #[arg(long, value_name = "FILE", required_unless_present = "binding")]
    snapshot: Option<PathBuf>,
    /// The binding to serve: snapshots come through the cache as well as by file, whichever is newer counts, and clients wait until
    /// the first is there
    #[arg(long, value_name = "NAME", value_parser = BindingName::parse)]
    binding: Option<BindingName>,
    /// Where the binding's Secret is mounted: what comes through the cache names no files but these
    #[arg(long, value_name = "DIR", default_value = binding::SECRET_DIR, requires = "binding")]
    secrets: PathBuf,
    /// How many sidecars, this one included, share the connections of origins with maxTotalConnections, where no binding tells
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=1_000_000), conflicts_with = "binding")]
    sidecars: u32,
    /// Where clients connect by TCP; may be repeated. Of several, an IPv6 address is left out where the system has no IPv6
    #[arg(long, value_name = "HOST:PORT", required_unless_present = "socket")]
    listen: Vec<SocketAddr>,
    /// Where clients connect by Unix socket
    #[arg(long, value_name = "PATH")]
    socket: Option<PathBuf>,
    /// Who may connect there, as an octal mode
    #[arg(long, value_name = "MODE", default_value = "660", value_parser = socket_mode)]
    socket_mode: u32,
    /// Where /livez, /livez?started, /readyz and /metrics are served
    #[arg(long, value_name = "HOST:PORT")]
    admin: Option<SocketAddr>,
    /// Where the policy and keys are explained, for this machine's owner alone
    #[arg(long, value_name = "PATH")]
    admin_socket: Option<PathBuf>,
    /// How many threads serve clients. One, where any rule has stampede: more are refused
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u8).range(1..=64))]
    workers: u8,
    /// For how long /livez?started may say that no policy has arrived, or that no server lets the sidecar in: applications that wait for it
    /// start after that in any case
    #[arg(long, value_name = "DURATION", default_value = "15s")]
    start_hold: Span,
    /// How long clients may finish after the signal to stop
    #[arg(long, value_name = "DURATION", default_value = "10s")]
    drain: Span,
}

/// Serves until it is told to stop.
pub fn run(args: Args) -> Outcome {
    let Args { snapshot, binding, secrets, sidecars, listen, .. } = args;
    let Args { socket, socket_mode, admin, admin_socket, workers, start_hold, drain, .. } = args;
    let config = Config {
        snapshot: snapshot.unwrap_or_else(|| PathBuf::from(binding::POLICY_DIR).join(binding::SNAPSHOT_FILE)),
        binding: binding.map(|name| Binding { name, secrets }),
        sidecars,
        listen,
        socket,
        socket_mode,
        admin,
        admin_socket,
        workers: usize::from(workers),
        start_hold: start_hold.as_duration(),
        drain: drain.as_duration(),
    };
    match server::run(&config) {
        Ok(()) => Ok(ExitCode::SUCCESS),
        Err(error) => Err(Failure::new(&error, next_step(&error))),
    }
}

fn socket_mode(text: &str) -> Result<u32, String> {
    match u32::from_str_radix(text, 8) {
        Ok(mode) if mode <= 0o777 => Ok(mode),
        _ => Err("write an octal mode from 000 to 777, such as 660".to_owned()),
    }
}

fn next_step(error: &StartError) -> &'static str {
    match error {
        StartError::Policy { source: PolicyError::File(_), .. } => "name the file that the control plane writes with --snapshot",
        StartError::Policy { source: PolicyError::Access(_), .. } => {
            "correct the file; a sidecar starts only with keys that it can use"
        }
        StartError::Policy { source: PolicyError::Origin(OriginError::Secret { .. }), .. } => {
            "correct the file, which holds the origin's url, or have it mounted; a sidecar starts only with origins that it can ask"
        }
        StartError::Policy { source: PolicyError::Workers { .. }, .. } => "start it with --workers 1; leases need it",
        StartError::Policy { .. } => "correct the policy it was made from, and have it written again",
        StartError::Listen { .. } | StartError::Admin(_) => "choose another address, or stop what listens there",
        StartError::Io(_) => "raise the limits on threads and open files",
    }
}
