//! `larderd`: the data plane.

use std::process::ExitCode;

fn main() -> ExitCode {
    larder::cli::larderd()
}
