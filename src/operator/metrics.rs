//! What the operator counts of itself. Labels are words of the code's own: never names, never the texts of errors.

use std::fmt;
use std::sync::atomic::AtomicU64;
use std::time::Duration;

use prometheus_client::encoding::{EncodeLabelSet, text};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::{Registry, Unit};

use crate::journal::Level;

/// How a reconciliation ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Result {
    result: &'static str,
}

/// What was done.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Kind {
    kind: &'static str,
}

/// The operator's own figures.
#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
    reconciles: Family<Result, Counter>,
    duration: Histogram,
    running: Gauge,
    leads: Gauge,
    writes: Family<Kind, Counter>,
    actions: Family<Kind, Counter>,
    status_writes: Counter,
    switches: Counter,
    clusters: Gauge,
    ready: Gauge,
    invalid: Gauge,
    reviews: Family<Result, Counter>,
    policy_looks: Family<Result, Counter>,
    policy_duration: Histogram,
    policy_merges: Counter,
    policy_status_writes: Counter,
    policies: Gauge,
    journal_depth: Gauge,
    journal_lag: Gauge,
    dead_letters: Gauge,
    changes_behind: Gauge,
    bindings: Gauge,
    heartbeats: Family<Result, Counter>,
    policy_reviews: Family<Result, Counter>,
    cluster_reviews: Family<Result, Counter>,
    missed_pods: Gauge,
    resident: Gauge<i64>,
    cpu: Counter<f64, AtomicU64>,
}

impl Default for Metrics {
    fn default() -> Self {
        let mut metrics = Self {
            registry: Registry::with_prefix("larder_operator"),
            reconciles: Family::default(),
            duration: Histogram::new(exponential_buckets(0.004, 2.0, 12)),
            running: Gauge::default(),
            leads: Gauge::default(),
            writes: Family::default(),
            actions: Family::default(),
            status_writes: Counter::default(),
            switches: Counter::default(),
            clusters: Gauge::default(),
            ready: Gauge::default(),
            invalid: Gauge::default(),
            reviews: Family::default(),
            policy_looks: Family::default(),
            policy_duration: Histogram::new(exponential_buckets(0.001, 2.0, 14)),
            policy_merges: Counter::default(),
            policy_status_writes: Counter::default(),
            policies: Gauge::default(),
            journal_depth: Gauge::default(),
            journal_lag: Gauge::default(),
            dead_letters: Gauge::default(),
            changes_behind: Gauge::default(),
            bindings: Gauge::default(),
            heartbeats: Family::default(),
            policy_reviews: Family::default(),
            cluster_reviews: Family::default(),
            missed_pods: Gauge::default(),
            resident: Gauge::default(),
            cpu: Counter::default(),
        };
        metrics.register();
        metrics
    }
}

impl Metrics {
    fn register(&mut self) {
        let registry = &mut self.registry;
        registry.register("reconciles", "Reconciliations, by how they ended", self.reconciles.clone());
        let help = "How long reconciliations took";
        registry.register_with_unit("reconcile_duration", help, Unit::Seconds, self.duration.clone());
        registry.register("reconciles_running", "Reconciliations under way", self.running.clone());
        registry.register("leads", "1 where this operator acts, 0 where another does", self.leads.clone());
        registry.register("object_writes", "Objects that were written to the API server, by kind", self.writes.clone());
        registry.register("actions", "Steps that were taken on servers, sentinels and pods, by kind", self.actions.clone());
        registry.register("status_writes", "Status documents that were written", self.status_writes.clone());
        registry.register("switches_heard", "Changes of a primary that sentinels told of", self.switches.clone());
        registry.register("clusters", "CacheClusters that are watched", self.clusters.clone());
        registry.register("clusters_ready", "CacheClusters that are ready", self.ready.clone());
        registry.register("clusters_refused", "CacheClusters whose specification cannot be used", self.invalid.clone());
        registry.register("pod_reviews", "Pods that the webhook was asked about, by what became of them", self.reviews.clone());
        let help = "Looks at the policies of a namespace, by how they ended";
        registry.register("policy_looks", help, self.policy_looks.clone());
        let help = "How long looks at the policies of a namespace took";
        registry.register_with_unit("policy_look_duration", help, Unit::Seconds, self.policy_duration.clone());
        let help = "Workloads whose policies were merged: one for each that is concerned by a change";
        registry.register("policy_merges", help, self.policy_merges.clone());
        let help = "Status documents of policies that were written";
        registry.register("policy_status_writes", help, self.policy_status_writes.clone());
        registry.register("policies", "CachePolicies that are kept", self.policies.clone());
        let help = "Writes that policies have journalled, and no origin has yet";
        registry.register("journal_depth", help, self.journal_depth.clone());
        let help = "Age of the oldest of them";
        registry.register_with_unit("journal_lag", help, Unit::Seconds, self.journal_lag.clone());
        let help = "Writes that an origin refused, and that wait for a person";
        registry.register("journal_dead_letters", help, self.dead_letters.clone());
        let help = "How old a change may be that a database committed, that a rule follows, and that is not told";
        registry.register_with_unit("changes_behind", help, Unit::Seconds, self.changes_behind.clone());
        registry.register("bindings", "Workloads that are tied to a CacheCluster", self.bindings.clone());
        registry.register("heartbeats", "Messages on the channels of bindings, by what became of them", self.heartbeats.clone());
        let help = "Policies that the webhook was asked about, by what was said of them";
        registry.register("policy_reviews", help, self.policy_reviews.clone());
        let help = "CacheClusters that the webhook was asked about, by what was said of them";
        registry.register("cluster_reviews", help, self.cluster_reviews.clone());
        let help = "Pods without the sidecar that they would be given if they were made now, as this operator found while it led";
        registry.register("missed_pods", help, self.missed_pods.clone());
        registry.register_with_unit("resident_memory", "Memory that the process holds", Unit::Bytes, self.resident.clone());
        registry.register_with_unit("cpu", "Processor time that the process used", Unit::Seconds, self.cpu.clone());
    }

    /// Everything in the OpenMetrics text form. Empty only where formatting fails, which it does not.
    pub fn render(&self) -> String {
        if let Some((resident, cpu)) = process() {
            self.resident.set(resident);
            self.cpu.inner().store(cpu.as_secs_f64().to_bits(), std::sync::atomic::Ordering::Relaxed);
        }
        let mut out = String::new();
        match text::encode(&mut out, &self.registry) {
            Ok(()) => out,
            Err(fmt::Error) => String::new(),
        }
    }

    /// A reconciliation begins.
    pub fn begun(&self) {
        self.running.inc();
    }

    /// A reconciliation has ended, as this word says, after so long.
    pub fn ended(&self, result: &'static str, took: Duration) {
        self.running.dec();
        self.reconciles.get_or_create(&Result { result }).inc();
        self.duration.observe(took.as_secs_f64());
    }

    /// Whether this operator acts.
    pub fn set_leads(&self, leads: bool) {
        self.leads.set(i64::from(leads));
    }

    /// An object of this kind was written.
    pub fn wrote(&self, kind: &'static str) {
        self.writes.get_or_create(&Kind { kind }).inc();
    }

    /// A step of this kind was taken.
    pub fn acted(&self, kind: &'static str) {
        self.actions.get_or_create(&Kind { kind }).inc();
    }

    /// A status was written.
    pub fn wrote_status(&self) {
        self.status_writes.inc();
    }

    /// A sentinel told of another primary.
    pub fn heard_switch(&self) {
        self.switches.inc();
    }

    /// The webhook was asked about a pod, of which this became.
    pub fn reviewed_pod(&self, result: &'static str) {
        self.reviews.get_or_create(&Result { result }).inc();
    }

    /// The policies of a namespace were looked at: how that ended, and how long it took.
    pub fn looked_at_policies(&self, result: &'static str, took: Duration) {
        self.policy_looks.get_or_create(&Result { result }).inc();
        self.policy_duration.observe(took.as_secs_f64());
    }

    /// The policies of so many workloads were merged.
    pub fn merged(&self, workloads: usize) {
        self.policy_merges.inc_by(u64::try_from(workloads).unwrap_or(u64::MAX));
    }

    /// The status of a policy was written.
    pub fn wrote_policy_status(&self) {
        self.policy_status_writes.inc();
    }

    /// How many policies there are, and how many workloads are tied to a CacheCluster.
    pub fn set_policies(&self, policies: usize, bindings: usize) {
        for (gauge, count) in [(&self.policies, policies), (&self.bindings, bindings)] {
            gauge.set(i64::try_from(count).unwrap_or(i64::MAX));
        }
    }

    /// What the journals of all policies hold together, as far as caches say it.
    pub fn set_journals(&self, level: &Level) {
        let gauges =
            [(&self.journal_depth, level.depth), (&self.journal_lag, level.lag_ms / 1_000), (&self.dead_letters, level.dead)];
        gauges.into_iter().for_each(|(gauge, count)| {
            gauge.set(i64::try_from(count).unwrap_or(i64::MAX));
        });
    }

    /// How old a change may be that is not told, of all databases that policies follow, as far as caches say it.
    pub fn set_changes_behind(&self, millis: u64) {
        self.changes_behind.set(i64::try_from(millis / 1_000).unwrap_or(i64::MAX));
    }

    /// A message came on a binding's channel, of which this became.
    pub fn heard(&self, result: &'static str) {
        self.heartbeats.get_or_create(&Result { result }).inc();
    }

    /// A webhook was asked about a CacheCluster, of which this was said.
    pub fn reviewed_cluster(&self, result: &'static str) {
        self.cluster_reviews.get_or_create(&Result { result }).inc();
    }

    /// The webhook was asked about a policy, of which this was said.
    pub fn reviewed_policy(&self, result: &'static str) {
        self.policy_reviews.get_or_create(&Result { result }).inc();
    }

    /// How many pods lack the sidecar that they would be given now.
    pub fn set_missed_pods(&self, count: usize) {
        self.missed_pods.set(i64::try_from(count).unwrap_or(i64::MAX));
    }

    /// How many CacheClusters there are, how many of them are ready, and how many are refused.
    pub fn set_clusters(&self, all: usize, ready: usize, refused: usize) {
        let gauges = [(&self.clusters, all), (&self.ready, ready), (&self.invalid, refused)];
        gauges.into_iter().for_each(|(gauge, count)| {
            gauge.set(i64::try_from(count).unwrap_or(i64::MAX));
        });
    }
}

/// The memory that the process holds, in bytes, and the time that its threads have run, from the kernel's accounts.
fn process() -> Option<(i64, Duration)> {
    let pages: i64 = std::fs::read_to_string("/proc/self/statm").ok()?.split_ascii_whitespace().nth(1)?.parse().ok()?;
    let stat = std::fs::read_to_string("/proc/self/stat").ok()?;
    // The second field is a name in parentheses that may hold anything; utime and stime are the 14th and 15th, in ticks of 10 ms.
    let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_ascii_whitespace().collect();
    let ticks: u64 = fields.get(11)?.parse::<u64>().ok()?.checked_add(fields.get(12)?.parse().ok()?)?;
    Some((pages.saturating_mul(4096), Duration::from_millis(ticks.saturating_mul(10))))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_counted_is_shown() {
        let metrics = Metrics::default();
        metrics.begun();
        metrics.ended("ok", Duration::from_millis(20));
        metrics.set_leads(true);
        metrics.set_clusters(3, 2, 1);
        metrics.set_journals(&Level { depth: 7, lag_ms: 3_900, ..Level::default() });
        metrics.set_changes_behind(45_900);
        let text = metrics.render();
        for line in [
            "larder_operator_reconciles_total{result=\"ok\"} 1",
            "larder_operator_leads 1",
            "larder_operator_clusters_ready 2",
            "larder_operator_journal_depth 7",
            "larder_operator_journal_lag_seconds 3",
            "larder_operator_changes_behind_seconds 45",
            "larder_operator_reconcile_duration_seconds_count 1",
            "larder_operator_reconciles_running 0",
        ] {
            assert!(text.lines().any(|shown| shown == line), "{line}: {text}");
        }
        let resident = text.lines().find_map(|line| line.strip_prefix("larder_operator_resident_memory_bytes ")).unwrap();
        assert!(resident.parse::<u64>().unwrap() > 0);
    }
}
