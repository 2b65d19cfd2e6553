//! What a run ran on.

use std::fs;
use std::path::Path;
use std::process::Command;

use crate::rounds::Plan;
use crate::targets::Programs;

/// Names and values, for the end of the report.
pub fn describe(programs: &Programs, plan: &Plan, connections: u16) -> Vec<(String, String)> {
    let version = |program: &Path, argument: &str| {
        let output = Command::new(program).arg(argument).output();
        let text = output.map(|output| [output.stdout, output.stderr].concat()).unwrap_or_default();
        let text = String::from_utf8_lossy(&text);
        let line = text.lines().map(str::trim).find(|line| !line.is_empty()).unwrap_or("not found");
        // Without the path of the program.
        line.rsplit('/').next().filter(|_| line.starts_with('/')).unwrap_or(line).to_owned()
    };
    let cpu = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model =
        cpu.lines().find_map(|line| line.strip_prefix("model name")).unwrap_or_default().trim_start_matches([' ', '\t', ':']);
    let cores = std::thread::available_parallelism().map_or(0, usize::from);
    let kernel = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    [
        ("load", format!("{connections} connections, {} rounds of {:.1} s per sample", plan.rounds, plan.measured.as_secs_f64())),
        ("processor", format!("{cores} cores, {model}")),
        ("kernel", kernel.trim().to_owned()),
        ("redis", version(&programs.redis_server, "--version")),
        ("nutcracker", version(&programs.nutcracker, "--version")),
        ("haproxy", version(&programs.haproxy, "-v")),
        ("envoy", version(&programs.envoy, "--version")),
        ("larderd", version(&programs.larderd, "--version")),
    ]
    .map(|(name, value)| (name.to_owned(), value))
    .to_vec()
}
