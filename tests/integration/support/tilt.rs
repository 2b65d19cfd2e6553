//! Sentinels that stand still, and what comes of it.

use std::process::Command;
use std::thread;
use std::time::Duration;

use super::resp::Client;
use super::wait_for;

/// Sentinels whose timer is late by more than two seconds enter TILT mode.
const STILL: Duration = Duration::from_millis(2500);

/// Has the sentinel stand still, as with its node, until it is in TILT mode: for half a minute from then on it does nothing.
pub fn stand_still(port: u16) {
    let info = client(port).line("INFO server").text();
    let pid = info.lines().find_map(|line| line.strip_prefix("process_id:")).expect("a process id").trim();
    let signal = |name: &str| assert!(Command::new("kill").args([name, pid]).status().is_ok_and(|status| status.success()));
    signal("-STOP");
    thread::sleep(STILL);
    signal("-CONT");
    wait_for("TILT mode", Duration::from_secs(20), || is_in_tilt(port));
}

/// Whether the sentinel is in TILT mode.
pub fn is_in_tilt(port: u16) -> bool {
    client(port).line("INFO sentinel").text().lines().any(|line| line.trim_end() == "sentinel_tilt:1")
}

fn client(port: u16) -> Client {
    Client::connect(port).expect("the sentinel accepts")
}
