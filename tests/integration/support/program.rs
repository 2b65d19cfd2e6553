//! Programs that a test runs to their end: which comes in time, or is made.

use std::os::unix::process::CommandExt as _;
use std::process::{Command, Output, Stdio};
use std::sync::mpsc;
use std::time::Duration;

/// How long one may take. Long: test machines are busy, and some programs are compiled first.
const LIMIT: Duration = Duration::from_secs(300);

/// What `command` printed, and how it ended. One that does not end is killed with all that it started, and its words are told.
#[track_caller]
pub fn output_of(command: &mut Command) -> Output {
    let child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).process_group(0).spawn();
    let child = child.unwrap_or_else(|error| panic!("{command:?} does not run ({error}): scripts/setup says what is missing"));
    let group = child.id();
    let (send, receive) = mpsc::channel();
    std::thread::spawn(move || send.send(child.wait_with_output()));
    if let Ok(output) = receive.recv_timeout(LIMIT) {
        return output.expect("its output can be read");
    }
    let _ = Command::new("kill").args(["-KILL", "--", &format!("-{group}")]).status();
    let told = receive.recv().expect("it is waited for").expect("its output can be read");
    let (out, errors) = (String::from_utf8_lossy(&told.stdout), String::from_utf8_lossy(&told.stderr));
    panic!("{command:?} has not ended within {LIMIT:?}: {out}{errors}");
}
