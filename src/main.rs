//! `larder`: the control plane, and everything on one machine.

use std::process::ExitCode;

fn main() -> ExitCode {
    larder::cli::larder()
}
