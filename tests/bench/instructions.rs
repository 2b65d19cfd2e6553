//! Instructions per command of the whole sidecar, counted by valgrind: the cost of a hundred rules against that of one, free of
//! noise. Instructions of the kernel are not counted.

use std::fs;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::process::Command;

use crate::load::{Operation, Workload, compare};
use crate::processes::Process;
use crate::targets::{Kind, Programs, Target, Upstream};

/// Commands sent at once.
const PIPELINE: usize = 16;
/// Batches of the short and of the long run; their difference has no start-up in it.
const BATCHES: [usize; 2] = [100, 1100];

/// Instructions per command.
#[derive(Debug, Clone, serde::Serialize)]
pub struct Instructions {
    #[serde(serialize_with = "crate::report::as_name")]
    pub target: Kind,
    pub per_command: f64,
}

/// Counts each of `kinds`.
pub fn count(kinds: &[Kind], programs: &Programs, upstream: &Upstream, dir: &Path) -> Result<Vec<Instructions>, String> {
    Command::new("valgrind").arg("--version").output().map_err(|error| format!("valgrind: {error}"))?;
    let counts = kinds.iter().map(|kind| {
        let [short, long] = BATCHES.map(|batches| run(*kind, batches, programs, upstream, dir));
        let commands = (BATCHES[1] - BATCHES[0]) * PIPELINE;
        Ok(Instructions { target: *kind, per_command: (long? - short?) / commands as f64 })
    });
    counts.collect()
}

/// The instructions of one run of the sidecar from its start to its end.
fn run(kind: Kind, batches: usize, programs: &Programs, upstream: &Upstream, dir: &Path) -> Result<f64, String> {
    let file = dir.join("callgrind.out");
    let wrapper = ["valgrind", "--tool=callgrind", &format!("--callgrind-out-file={}", file.display())].map(str::to_owned);
    let programs = Programs { wrapper: wrapper.to_vec(), ..programs.clone() };
    let target = Target::start(kind, &programs, upstream, dir)?;
    send(target.address, batches).map_err(|error| format!("{} under valgrind: {error}", kind.name()))?;
    target.process.map(Process::terminate).transpose()?;
    let text = fs::read_to_string(&file).map_err(|error| format!("{}: {error}", file.display()))?;
    let totals = text.lines().find_map(|line| line.strip_prefix("totals: ")).and_then(|number| number.trim().parse().ok());
    totals.ok_or_else(|| format!("{} holds no total", file.display()))
}

fn send(address: SocketAddr, batches: usize) -> Result<(), crate::load::LoadError> {
    let workload = Workload::new(Operation::Get, PIPELINE, 1);
    let mut stream = TcpStream::connect(address)?;
    stream.set_read_timeout(Some(crate::load::STALL))?;
    stream.set_nodelay(true)?;
    for batch in workload.batches.iter().cycle().take(batches) {
        stream.write_all(&batch.request)?;
        let mut reply = vec![0; batch.replies.len()];
        stream.read_exact(&mut reply)?;
        compare(&batch.replies, 0, &reply)?;
    }
    Ok(())
}
