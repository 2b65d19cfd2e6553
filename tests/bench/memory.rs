//! Memory of a proxy: fresh, with many clients that each have asked something, and after they have gone.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use crate::account::{anonymous_memory, open_file_limit};
use crate::closed_loop;
use crate::load::{Operation, Workload};
use crate::targets::{Kind, Programs, Target, Upstream};

/// How many clients.
pub const CLIENTS: usize = 1000;
/// Each client has one socket here and up to two in a proxy; servers need some for themselves.
const FILES: usize = 3 * CLIENTS + 200;
/// How long memory may take to come down again.
const SETTLE: Duration = Duration::from_secs(5);

/// Anonymous resident memory in bytes.
#[derive(Debug, Clone, serde::Serialize)]
pub struct Memory {
    #[serde(serialize_with = "crate::report::as_name")]
    pub target: Kind,
    pub fresh: u64,
    pub with_clients: u64,
    pub after: u64,
}

/// Measures each of `kinds` in a process of its own.
pub fn measure(kinds: &[Kind], programs: &Programs, upstream: &Upstream, dir: &std::path::Path) -> Result<Vec<Memory>, String> {
    if open_file_limit() < FILES {
        return Err(format!("{CLIENTS} clients need `ulimit -n {FILES}`, and it is {}", open_file_limit()));
    }
    let proxies = kinds.iter().filter(|kind| **kind != Kind::Direct);
    proxies.map(|kind| measure_one(*kind, programs, upstream, dir).map_err(|error| format!("{}: {error}", kind.name()))).collect()
}

fn measure_one(kind: Kind, programs: &Programs, upstream: &Upstream, dir: &std::path::Path) -> Result<Memory, String> {
    let target = Target::start(kind, programs, upstream, dir)?;
    let pid = target.pid().ok_or("it is no process")?;
    let fresh = settled(pid);
    let with_clients = under_load(target.address, pid)?;
    Ok(Memory { target: kind, fresh, with_clients, after: settled(pid) })
}

/// The most memory while all clients send GETs.
fn under_load(address: SocketAddr, pid: u32) -> Result<u64, String> {
    let workload = Workload::new(Operation::Get, 1, CLIENTS);
    let mut most = 0;
    let (warm_up, measured) = (Duration::from_millis(300), Duration::from_millis(700));
    closed_loop::run(address, &workload, warm_up, measured, || most = most.max(anonymous_memory(pid)))
        .map_err(|error| error.to_string())?;
    Ok(most)
}

/// The least memory within [`SETTLE`], or as soon as it no longer falls.
fn settled(pid: u32) -> u64 {
    let start = Instant::now();
    let mut least = (start, anonymous_memory(pid));
    while start.elapsed() < SETTLE && least.0.elapsed() < Duration::from_secs(2) {
        std::thread::sleep(Duration::from_millis(50));
        let now = anonymous_memory(pid);
        if now < least.1 {
            least = (Instant::now(), now);
        }
    }
    least.1
}
