//! Asks the agent of this container over its Unix socket.

use std::io::{self, Write as _};
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use reqwest::{Method, StatusCode};

use crate::cli::{Failure, Outcome, local};

/// How long a question may take, besides what it waits for.
const LIMIT: Duration = Duration::from_secs(5);
/// How long a handover that was begun may take beyond its limit.
const MARGIN: Duration = Duration::from_secs(30);

/// Prints the answer; the exit code says whether it is a good one.
pub fn show(socket: &Path, path: &str) -> Outcome {
    let (status, text) = ask(socket, Method::GET, path, LIMIT)?;
    let _ = io::stdout().write_all(text.as_bytes());
    Ok(if status.is_success() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Asks for a handover and waits for its end.
pub fn handover(socket: &Path, limit: Duration) -> Outcome {
    let path = format!("/handover?limitMillis={}", limit.as_millis());
    let (status, text) = ask(socket, Method::POST, &path, limit + MARGIN)?;
    if status.is_success() {
        let _ = writeln!(io::stdout(), "{text}");
        return Ok(ExitCode::SUCCESS);
    }
    Err(Failure::new(text.trim_end(), "see that a replica is in step and that the sentinels answer, and ask again"))
}

fn ask(socket: &Path, method: Method, path: &str, limit: Duration) -> Result<(StatusCode, String), Failure> {
    local::ask(socket, method, path, limit, "a running `larderd agent exec`")
}
