//! The kernel's accounts: CPU time and memory of processes, and what the whole machine used meanwhile.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::time::Duration;

/// A process's CPU time by thread name.
#[derive(Debug, Clone, Default)]
pub struct Cpu {
    pub threads: BTreeMap<String, Duration>,
}

impl Cpu {
    pub fn total(&self) -> Duration {
        self.threads.values().sum()
    }
}

/// CPU time that the process has used so far. The scheduler's own account counts nanoseconds; where it is not kept, ticks.
pub fn cpu(pid: u32) -> Cpu {
    let mut cpu = Cpu::default();
    let Ok(tasks) = fs::read_dir(format!("/proc/{pid}/task")) else { return cpu };
    for task in tasks.flatten().map(|task| task.path()) {
        let name = fs::read_to_string(task.join("comm")).unwrap_or_default().trim().to_owned();
        let used = scheduled(&task).or_else(|| ticks(&task)).unwrap_or_default();
        *cpu.threads.entry(name).or_default() += used;
    }
    cpu
}

fn scheduled(task: &Path) -> Option<Duration> {
    let text = fs::read_to_string(task.join("schedstat")).ok()?;
    let nanos: u64 = text.split_whitespace().next()?.parse().ok()?;
    Some(Duration::from_nanos(nanos))
}

/// utime + stime, in ticks of 10 ms.
fn ticks(task: &Path) -> Option<Duration> {
    let text = fs::read_to_string(task.join("stat")).ok()?;
    // The name may hold blanks; what follows its closing bracket does not.
    let fields: Vec<&str> = text.rsplit_once(')')?.1.split_whitespace().collect();
    let user: u64 = fields.get(11)?.parse().ok()?;
    let system: u64 = fields.get(12)?.parse().ok()?;
    Some(Duration::from_millis((user + system) * 10))
}

/// Anonymous resident memory in bytes: what the process itself holds, without the file of its program.
pub fn anonymous_memory(pid: u32) -> u64 {
    let text = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix("RssAnon:")).unwrap_or_default();
    line.split_whitespace().next().and_then(|number| number.parse::<u64>().ok()).unwrap_or(0) * 1024
}

/// CPU time that the whole machine has used, and that was stolen from it.
pub fn machine() -> Duration {
    let text = fs::read_to_string("/proc/stat").unwrap_or_default();
    let first = text.lines().next().unwrap_or_default();
    let fields: Vec<u64> = first.split_whitespace().skip(1).filter_map(|field| field.parse().ok()).collect();
    // user nice system idle iowait irq softirq steal
    let busy: u64 = [0, 1, 2, 5, 6, 7].iter().filter_map(|at| fields.get(*at)).sum();
    Duration::from_millis(busy * 10)
}

/// The most open files that this process and its children may have.
pub fn open_file_limit() -> usize {
    let text = fs::read_to_string("/proc/self/limits").unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix("Max open files")).unwrap_or_default();
    line.split_whitespace().next().and_then(|number| number.parse().ok()).unwrap_or(1024)
}
