//! The interleaved run: in each round, every load is put on every target in turn, in an order that changes.

use std::time::Duration;

use serde::Serialize;

use crate::account::{Cpu, cpu, machine};
use crate::load::{Operation, Workload};
use crate::targets::{Kind, Target, Upstream};
use crate::{closed_loop, open_loop};

/// What to run.
pub struct Plan {
    pub workloads: Vec<Workload>,
    pub rounds: usize,
    pub measured: Duration,
    /// Of the open loop, in commands a second; 0: none.
    pub rate: f64,
}

/// How much CPU time others may use, in cores, before a sample counts as disturbed.
pub const FOREIGN_CORES: f64 = 0.15;
/// How often a disturbed sample is taken again.
const RETRIES: usize = 2;

/// One measurement of one target under one load.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Measurement {
    #[serde(serialize_with = "crate::report::as_name")]
    pub target: Kind,
    /// The load's name, such as `GET P16`.
    pub load: String,
    pub round: usize,
    /// Commands a second.
    pub throughput: f64,
    pub p50_us: f64,
    pub p99_us: f64,
    /// CPU time of the proxy per command; 0 for `direct`.
    pub proxy_us: f64,
    /// The same of its busiest thread, and that thread's name.
    pub busiest_thread: (String, f64),
    pub redis_us: f64,
    /// CPU time of processes that are no part of this, in cores.
    pub foreign_cores: f64,
}

/// CPU accounts at one moment.
struct Accounts {
    proxy: Cpu,
    redis: Duration,
    all_ours: Duration,
    machine: Duration,
}

impl Accounts {
    fn take(upstream: &Upstream, targets: &[Target], target: &Target) -> Self {
        let ours = targets.iter().filter_map(Target::pid).chain(upstream.pids()).chain([std::process::id()]);
        Self {
            proxy: target.pid().map(cpu).unwrap_or_default(),
            redis: cpu(upstream.redis.pid()).total(),
            all_ours: ours.map(|pid| cpu(pid).total()).sum(),
            machine: machine(),
        }
    }
}

/// Latencies of one target under the open loop, in microseconds.
#[derive(Debug, Clone, Serialize)]
pub struct OpenLatency {
    #[serde(serialize_with = "crate::report::as_name")]
    pub target: Kind,
    pub round: usize,
    pub p50_us: f64,
    pub p99_us: f64,
}

/// All that was measured.
#[derive(Debug, Default)]
pub struct Results {
    pub closed: Vec<Measurement>,
    pub open: Vec<OpenLatency>,
    /// Of the open loop, in commands a second.
    pub rate: f64,
}

/// Runs `plan`. A target that fails a sample fails the run: a proxy that answers wrongly is not compared.
pub fn run(plan: &Plan, upstream: &Upstream, targets: &[Target]) -> Result<Results, String> {
    let mut results = Results { rate: plan.rate, ..Results::default() };
    for round in 0..plan.rounds {
        for workload in &plan.workloads {
            for offset in 0..targets.len() {
                let target = &targets[(round + offset) % targets.len()];
                results.closed.push(measure(plan, upstream, targets, target, workload, round)?);
            }
        }
        for offset in (0..targets.len()).filter(|_| plan.rate > 0.0) {
            let target = &targets[(round + offset) % targets.len()];
            results.open.push(open_latency(plan, target, round)?);
        }
        eprintln!("round {} of {}", round + 1, plan.rounds);
    }
    Ok(results)
}

fn open_latency(plan: &Plan, target: &Target, round: usize) -> Result<OpenLatency, String> {
    let workload = Workload::new(Operation::Get, 1, 50);
    let latency = open_loop::run(target.address, &workload, plan.rate, plan.measured)
        .map_err(|error| format!("{} under an open loop: {error}", target.kind.name()))?;
    let micros = |quantile| latency.value_at_quantile(quantile) as f64 / 1e3;
    Ok(OpenLatency { target: target.kind, round, p50_us: micros(0.5), p99_us: micros(0.99) })
}

/// Takes a sample, again where others disturbed it; the quietest counts.
fn measure(
    plan: &Plan,
    upstream: &Upstream,
    targets: &[Target],
    target: &Target,
    workload: &Workload,
    round: usize,
) -> Result<Measurement, String> {
    let mut best: Option<Measurement> = None;
    for _ in 0..=RETRIES {
        let measurement = sample(plan.measured, upstream, targets, target, workload, round)
            .map_err(|error| format!("{} under {}: {error}{}", target.kind.name(), workload.name(), target.last_words()))?;
        if best.as_ref().is_none_or(|best| measurement.foreign_cores < best.foreign_cores) {
            best = Some(measurement);
        }
        if best.as_ref().is_some_and(|best| best.foreign_cores <= FOREIGN_CORES) {
            break;
        }
    }
    best.ok_or_else(|| "no sample".to_owned())
}

fn sample(
    measured: Duration,
    upstream: &Upstream,
    targets: &[Target],
    target: &Target,
    workload: &Workload,
    round: usize,
) -> Result<Measurement, crate::load::LoadError> {
    let mut edges = Vec::with_capacity(2);
    let warm_up = measured.mul_f64(0.2).max(Duration::from_millis(100));
    let sample = closed_loop::run(target.address, workload, warm_up, measured, || {
        edges.push(Accounts::take(upstream, targets, target));
    })?;
    let [before, after] = &edges[..] else { return Err(crate::load::LoadError::Stalled) };
    let per_command = |used: Duration| used.as_secs_f64() * 1e6 / sample.requests.max(1) as f64;
    let seconds = sample.elapsed.as_secs_f64();
    let micros = |quantile| sample.latency.value_at_quantile(quantile) as f64 / 1e3;
    let foreign = (after.machine - before.machine).saturating_sub(after.all_ours - before.all_ours);
    let busiest = after.proxy.threads.iter().map(|(name, used)| {
        let earlier = before.proxy.threads.get(name).copied().unwrap_or_default();
        (name.clone(), per_command(used.saturating_sub(earlier)))
    });
    Ok(Measurement {
        target: target.kind,
        load: workload.name(),
        round,
        throughput: sample.requests as f64 / seconds,
        p50_us: micros(0.5),
        p99_us: micros(0.99),
        proxy_us: per_command(after.proxy.total().saturating_sub(before.proxy.total())),
        busiest_thread: busiest.max_by(|a, b| a.1.total_cmp(&b.1)).unwrap_or_default(),
        redis_us: per_command(after.redis - before.redis),
        foreign_cores: foreign.as_secs_f64() / seconds,
    })
}
