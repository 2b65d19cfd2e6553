//! What workers count, and how it is shown to Prometheus.
//!
//! Every worker has counters of its own, which it alone raises with plain stores; a scrape sums them. So counting costs an addition
//! and workers never touch each other's cache lines. Labels are rule names and node addresses, both bounded; never keys or errors.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric as _, MetricEncoder, NoLabelSet, text};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::registry::{Registry, Unit};

use super::background::Background;
use super::counter::{Counter, Gauge};
use super::histogram::{Distribution, Histogram};
use super::hot_keys::HotKeys;
use super::readings::{self, Reading};

/// The label of keys that no rule covers.
pub const UNMATCHED_RULE: &str = "(unmatched)";
/// The most rules that one worker keeps counters of: those of a full snapshot, and as many that are gone.
const MAX_RULES: usize = 2048;
/// The most nodes that one worker keeps counters of; more share one line.
const MAX_NODES: usize = 1024;
/// The label of what is beyond those bounds.
const OTHERS: &str = "(others)";

/// Declares a struct of counters whose fields become the families `larder_PREFIX_FIELD`.
macro_rules! counters {
    ($(#[$doc:meta])* $name:ident, $prefix:literal, { $($(#[doc = $help:literal])+ $field:ident),+ $(,)? }) => {
        $(#[$doc])*
        #[derive(Debug, Default)]
        pub struct $name { $($(#[doc = $help])+ pub $field: Counter),+ }

        impl $name {
            const FAMILIES: &'static [Family<$name>] = &[$(Family {
                name: concat!("larder_", $prefix, stringify!($field)),
                help: concat!($($help),+),
                read: |counters| counters.$field.get(),
            }),+];
        }
    };
}

/// One family: how it is called and where its value is.
struct Family<T> {
    name: &'static str,
    help: &'static str,
    read: fn(&T) -> u64,
}

counters!(
    /// What one worker counts for one rule.
    RuleCounters, "rule_", {
        /// Reads that the cache answered with a value
        hits,
        /// Reads that the cache answered with nothing
        misses,
        /// Loads from the origin
        loads,
        /// Reads that the cache answered with nothing and that were served without a load of their own, whoever loads
        loads_saved,
        /// Reads that waited for a load that another had begun
        coalesced,
        /// Reads that were served a value past its TTL
        stale,
        /// Reads that were answered by a remembered absence
        negative,
        /// Loads that failed
        load_errors,
        /// Commands whose changes were carried to the origin, whatever came of them
        writes,
        /// Of those, commands that the origin refused
        writes_rejected,
        /// Of those, commands that failed before anything was changed
        write_errors,
        /// Of those, commands of which it is not known whether the origin made them
        writes_unknown,
        /// Values that were written and not kept, since another write of the key was under way
        writes_unkept,
        /// Keys that were given a TTL that their writer had not given
        ttl_added,
        /// Misses whose client may load while others wait
        leases,
        /// Reads that waited for another client's load and were given what it stored
        woken,
        /// Reads that waited for another client's load for too long
        wait_timeouts,
        /// Reads that were told of the miss although another loads, since their client sent more commands
        unparked,
        /// Reads that were told to try again at once: their client sent more commands, and loads the key already on the same connection
        cut_short,
        /// Reads of keys that nobody fills, which were told of the miss at once
        hit_for_miss,
        /// Values that could not be told from outdated ones and were removed
        ambiguous_fills,
        /// Of those, values that may come of a load of which it is not known since when nothing was written
        undated_fills,
        /// Of those, values of keys that more clients were loading than are remembered
        forgotten_fills,
        /// Values that were loaded before a later write or deletion, and were removed
        late_fills,
        /// Reads that were told of a miss before the key expired, to load it anew
        early_refreshes,
        /// Times that a rule's leases were given up for a while, since they were seldom filled
        disarmed,
        /// Keys that had no TTL when the sweep came by, and were given one
        ttl_repaired,
        /// Under Observe: misses that would have been answered from another client's load
        predicted_loads_saved,
        /// Under Observe: writes that would have been given a TTL that their writer had not given
        predicted_ttl_added,
        /// Under Observe: values that could not have been told from outdated ones, and would have been removed
        predicted_ambiguous_fills,
    }
);

/// What one worker counts for one rule, with the worst that it has seen.
#[derive(Debug, Default)]
struct RuleMeter {
    counters: RuleCounters,
    /// The most identical misses at once, under Observe.
    stampede: Gauge,
}

const STAMPEDE: &str = "larder_rule_predicted_stampede";

counters!(
    /// What one worker counts for one node. The number of requests under way is beside it, in [`NodeMeter`].
    NodeCounters, "node_", {
        /// Commands sent to the node
        requests,
        /// Replies of the node that were errors
        errors,
        /// Connections to the node that were made again after one was lost
        reconnects,
    }
);

counters!(
    /// What one worker counts for itself.
    ProcessCounters, "", {
        /// Clients that connected
        clients_accepted,
        /// Clients that were turned away or closed for breaking a limit or the protocol
        clients_rejected,
        /// Commands that clients sent
        commands,
        /// Commands that were answered by an error of the sidecar's own
        commands_refused,
        /// Bytes received from clients
        client_bytes_received,
        /// Bytes sent to clients
        client_bytes_sent,
        /// Bytes received from servers
        upstream_bytes_received,
        /// Bytes sent to servers
        upstream_bytes_sent,
        /// Redirections that were followed: MOVED and ASK
        redirects,
        /// Commands that were sent again after a failure or a refusal
        retries,
    }
);

/// What one worker counts for one node, with its level of requests under way.
#[derive(Debug, Default)]
pub struct NodeMeter {
    /// Counts.
    pub counters: NodeCounters,
    /// Commands sent and not yet answered.
    pub inflight: Gauge,
}

/// Everything that one worker counts, shared with the hub.
#[derive(Debug, Default)]
struct Block {
    process: ProcessCounters,
    clients: Gauge,
    /// Time spent in the sidecar itself, and time spent waiting for a server.
    proxy: Histogram,
    upstream: Histogram,
    rules: Mutex<BTreeMap<Arc<str>, Arc<RuleMeter>>>,
    nodes: Mutex<BTreeMap<Arc<str>, Arc<NodeMeter>>>,
}

/// One worker's handle. It belongs to one thread: two that counted with the same handle would lose counts.
#[derive(Debug)]
pub struct WorkerMetrics {
    block: Arc<Block>,
    rules: Vec<Arc<RuleMeter>>,
    unmatched: Arc<RuleMeter>,
}

impl WorkerMetrics {
    /// Counts for the rules of a new policy from now on, by their position. A rule whose name was there before goes on where it was.
    pub fn set_rules<'a>(&mut self, names: impl IntoIterator<Item = &'a str>) {
        let names: Vec<&str> = names.into_iter().collect();
        let mut known = lock(&self.block.rules);
        if known.len() + names.len() > MAX_RULES {
            known.retain(|name, _| &**name == UNMATCHED_RULE || names.contains(&&**name));
        }
        self.rules = names.iter().map(|name| entry(&mut known, name, MAX_RULES)).collect();
    }

    /// The counters of the rule at a position; those of [`WorkerMetrics::unmatched`] where there is none.
    #[inline]
    pub fn rule(&self, index: usize) -> &RuleCounters {
        &self.rules.get(index).unwrap_or(&self.unmatched).counters
    }

    /// So many identical misses were under way at once, of a rule that only observes.
    pub fn raise_stampede(&self, index: usize, at_once: u64) {
        let stampede = &self.rules.get(index).unwrap_or(&self.unmatched).stampede;
        stampede.set(stampede.get().max(at_once));
    }

    /// The counters of keys that no rule covers.
    #[inline]
    pub fn unmatched(&self) -> &RuleCounters {
        &self.unmatched.counters
    }

    /// The counters of the node at an address, to be kept beside its connections. Counters that nobody holds any more are dropped
    /// when there are too many nodes.
    pub fn node(&self, address: &str) -> Arc<NodeMeter> {
        let mut nodes = lock(&self.block.nodes);
        if nodes.len() >= MAX_NODES && !nodes.contains_key(address) {
            nodes.retain(|_, meter| Arc::strong_count(meter) > 1);
        }
        entry(&mut nodes, address, MAX_NODES)
    }

    /// The worker's own counters.
    #[inline]
    pub fn process(&self) -> &ProcessCounters {
        &self.block.process
    }

    /// How many clients are connected.
    pub fn clients(&self) -> &Gauge {
        &self.block.clients
    }

    /// Counts the time, in nanoseconds, that a command spent in the sidecar itself.
    #[inline]
    pub fn record_proxy(&self, ns: u64) {
        self.block.proxy.record(ns);
    }

    /// Counts the time, in nanoseconds, that a command waited for a server.
    #[inline]
    pub fn record_upstream(&self, ns: u64) {
        self.block.upstream.record(ns);
    }
}

/// The value under `name`, made where there is none. What is over the bound shares a value.
fn entry<T: Default>(map: &mut BTreeMap<Arc<str>, Arc<T>>, name: &str, bound: usize) -> Arc<T> {
    let name = if map.len() < bound || map.contains_key(name) { name } else { OTHERS };
    if let Some(value) = map.get(name) {
        return value.clone();
    }
    map.entry(name.into()).or_default().clone()
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// All workers' counters, and those of the second thread.
#[derive(Debug)]
pub struct MetricsHub {
    sums: Arc<Sums>,
    registry: Registry,
    hot_keys: HotKeys,
}

#[derive(Debug)]
struct Sums {
    background: Arc<Background>,
    workers: Mutex<Vec<Arc<Block>>>,
}

impl MetricsHub {
    /// A hub without workers.
    pub fn new(background: Arc<Background>) -> Self {
        let sums = Arc::new(Sums { background, workers: Mutex::default() });
        let mut registry = Registry::default();
        registry.register_collector(Box::new(sums.clone()));
        Self { sums, registry, hot_keys: HotKeys::default() }
    }

    /// Which keys are used most, while somebody asks.
    #[inline]
    pub fn hot_keys(&self) -> &HotKeys {
        &self.hot_keys
    }

    /// The counters of another worker.
    pub fn worker(&self) -> WorkerMetrics {
        let block = Arc::new(Block::default());
        let unmatched = entry(&mut lock(&block.rules), UNMATCHED_RULE, MAX_RULES);
        lock(&self.sums.workers).push(block.clone());
        WorkerMetrics { block, rules: Vec::new(), unmatched }
    }

    /// The counters of the second thread.
    pub fn background(&self) -> &Arc<Background> {
        &self.sums.background
    }

    /// Everything in the OpenMetrics text format, and what another layer has just read. Empty only where formatting fails, which it
    /// does not.
    pub fn render(&self, readings: Vec<Reading>) -> String {
        let mut out = String::new();
        let written = text::encode_registry(&mut out, &self.registry)
            .and_then(|()| readings::append(&mut out, readings))
            .and_then(|()| text::encode_eof(&mut out));
        match written {
            Ok(()) => out,
            Err(fmt::Error) => String::new(),
        }
    }

    /// The sum over all workers of one rule's counters, by the names of their fields.
    pub fn rule_totals(&self, name: &str) -> Vec<(&'static str, u64)> {
        let workers = lock(&self.sums.workers).clone();
        let blocks: Vec<_> = workers.iter().filter_map(|block| lock(&block.rules).get(name).cloned()).collect();
        let total = |family: &Family<RuleCounters>| blocks.iter().map(|meter| (family.read)(&meter.counters)).sum();
        let stampede = blocks.iter().map(|meter| meter.stampede.get()).max().unwrap_or_default();
        let totals = RuleCounters::FAMILIES.iter().map(|family| (family.name, total(family))).chain([(STAMPEDE, stampede)]);
        totals.map(|(name, total)| (name.trim_start_matches("larder_rule_"), total)).collect()
    }

    /// How many clients are connected, and how many have connected since the process began.
    pub fn clients(&self) -> (u64, u64) {
        let workers = lock(&self.sums.workers);
        let now = workers.iter().map(|block| block.clients.get()).sum();
        (now, workers.iter().map(|block| block.process.clients_accepted.get()).sum())
    }

    /// The distributions of time spent in the sidecar and of time spent waiting for servers.
    pub fn latencies(&self) -> (Distribution, Distribution) {
        self.sums.latencies()
    }
}

impl Sums {
    fn latencies(&self) -> (Distribution, Distribution) {
        let (mut proxy, mut upstream) = (Distribution::default(), Distribution::default());
        for block in lock(&self.workers).iter() {
            block.proxy.add_to(&mut proxy);
            block.upstream.add_to(&mut upstream);
        }
        (proxy, upstream)
    }
}

type Labels<'a> = [(&'static str, &'a str)];

impl Collector for Sums {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let workers = lock(&self.workers).clone();
        for family in ProcessCounters::FAMILIES {
            let total = workers.iter().map(|block| (family.read)(&block.process)).sum();
            counter(&mut encoder, family.name, family.help)?.plain(total)?;
        }
        let clients = workers.iter().map(|block| block.clients.get()).sum();
        gauge(&mut encoder, "larder_clients", "Clients that are connected", &[(None, clients)])?;
        encode_by_name(&mut encoder, "rule", RuleCounters::FAMILIES, |visit| {
            workers.iter().for_each(|block| lock(&block.rules).iter().for_each(|(name, meter)| visit(name, &meter.counters)));
        })?;
        encode_stampedes(&mut encoder, &workers)?;
        encode_nodes(&mut encoder, &workers)?;
        self.encode_latencies(&mut encoder)?;
        encode_background(&mut encoder, &self.background)
    }
}

impl Sums {
    fn encode_latencies(&self, encoder: &mut DescriptorEncoder<'_>) -> fmt::Result {
        let (proxy, upstream) = self.latencies();
        let help = "Time that commands spent in the sidecar itself, and waiting for a server";
        let mut family =
            encoder.encode_descriptor("larder_request_duration", help, Some(&Unit::Seconds), MetricType::Histogram)?;
        for (part, distribution) in [("proxy", proxy), ("upstream", upstream)] {
            let labels: &Labels<'_> = &[("part", part)];
            let mut line = family.encode_family(&labels)?;
            line.encode_histogram::<NoLabelSet>(distribution.sum_seconds(), distribution.count(), &distribution.buckets(), None)?;
        }
        Ok(())
    }
}

/// Encodes one family after another, each with a line a name, summed over the workers that `each` visits.
fn encode_by_name<T>(
    encoder: &mut DescriptorEncoder<'_>,
    label: &'static str,
    families: &[Family<T>],
    each: impl Fn(&mut dyn FnMut(&Arc<str>, &T)),
) -> fmt::Result {
    for family in families {
        let mut sums: BTreeMap<Arc<str>, u64> = BTreeMap::new();
        each(&mut |name, counters| *sums.entry(name.clone()).or_default() += (family.read)(counters));
        let mut lines = counter(encoder, family.name, family.help)?;
        for (name, total) in &sums {
            lines.labelled(&[(label, name)], *total)?;
        }
    }
    Ok(())
}

fn encode_stampedes(encoder: &mut DescriptorEncoder<'_>, workers: &[Arc<Block>]) -> fmt::Result {
    let mut worst: BTreeMap<Arc<str>, u64> = BTreeMap::new();
    for block in workers {
        for (name, meter) in lock(&block.rules).iter() {
            let level = worst.entry(name.clone()).or_default();
            *level = meter.stampede.get().max(*level);
        }
    }
    let lines: Vec<_> = worst.iter().map(|(name, level)| (Some(("rule", &**name)), *level)).collect();
    gauge(encoder, STAMPEDE, "Under Observe: the most identical misses that were under way at once", &lines)
}

fn encode_nodes(encoder: &mut DescriptorEncoder<'_>, workers: &[Arc<Block>]) -> fmt::Result {
    encode_by_name(encoder, "node", NodeCounters::FAMILIES, |visit| {
        workers.iter().for_each(|block| lock(&block.nodes).iter().for_each(|(name, meter)| visit(name, &meter.counters)));
    })?;
    let mut inflight: BTreeMap<Arc<str>, u64> = BTreeMap::new();
    for block in workers {
        lock(&block.nodes).iter().for_each(|(name, meter)| *inflight.entry(name.clone()).or_default() += meter.inflight.get());
    }
    let lines: Vec<_> = inflight.iter().map(|(name, level)| (Some(("node", &**name)), *level)).collect();
    gauge(encoder, "larder_node_inflight", "Commands sent to the node and not yet answered", &lines)
}

fn encode_background(encoder: &mut DescriptorEncoder<'_>, background: &Background) -> fmt::Result {
    let Background {
        policy_generation,
        policy_rejected,
        policy_refused_generation,
        heartbeats,
        fleet,
        secrets_rejected,
        secrets_renewed,
        topology_changes,
        discovery_rounds,
        discovery_failures,
        events,
        events_foreign,
        events_refused,
        events_forbidden,
        events_unconfirmed,
        event_gaps,
        events_reading,
        walks,
        walk_seen,
        walk_removed,
    } = background;
    let generation = [(None, policy_generation.get())];
    gauge(encoder, "larder_policy_generation", "The generation of the policy that is applied", &generation)?;
    let refused = [(None, policy_refused_generation.get())];
    gauge(encoder, "larder_policy_refused_generation", "The generation of the policy that was refused last", &refused)?;
    let fleet = [(None, fleet.get())];
    gauge(encoder, "larder_sidecars", "How many sidecars share the origins' connections; zero is not known", &fleet)?;
    let reading = [(None, events_reading.get())];
    gauge(encoder, "larder_events_reading", "1 while this sidecar reads larder:events for all of its binding", &reading)?;
    for (name, help, count) in [
        ("larder_events", "Events that were carried out, or whose walk was begun", events),
        ("larder_events_foreign", "Events about what no rule of this policy covers", events_foreign),
        ("larder_events_refused", "Events that were not understood", events_refused),
        ("larder_events_forbidden", "Keys of events that the login may not touch", events_forbidden),
        ("larder_events_unconfirmed", "Invalidations that might come back after a failover", events_unconfirmed),
        ("larder_event_gaps", "Times that events were lost unread, and all that leases keep right was invalidated", event_gaps),
        ("larder_invalidation_walks", "Walks over all keys that came to their end", walks),
        ("larder_invalidation_walk_seen", "Names that walks looked at", walk_seen),
        ("larder_invalidation_walk_removed", "Keys that walks removed something of", walk_removed),
        ("larder_heartbeats", "What was told to the control plane through the cache", heartbeats),
        ("larder_policy_rejected", "Policies that were refused, the older one staying", policy_rejected),
        ("larder_secrets_rejected", "Credentials or certificates that were refused, the older ones staying", secrets_rejected),
        ("larder_secrets_renewed", "Credentials or certificates that were taken up after the start", secrets_renewed),
        ("larder_topology_changes", "Changes of the primary or of the slot map", topology_changes),
        ("larder_discovery_rounds", "Rounds of questions to sentinels or nodes", discovery_rounds),
        ("larder_discovery_failures", "Rounds of questions that found nothing to trust", discovery_failures),
    ] {
        counter(encoder, name, help)?.plain(count.get())?;
    }
    Ok(())
}

/// A counter's lines.
struct Lines<'a>(MetricEncoder<'a>);

impl Lines<'_> {
    fn plain(self, total: u64) -> fmt::Result {
        ConstCounter::new(total).encode(self.0)
    }

    fn labelled(&mut self, labels: &Labels<'_>, total: u64) -> fmt::Result {
        ConstCounter::new(total).encode(self.0.encode_family(&labels)?)
    }
}

fn counter<'a>(encoder: &'a mut DescriptorEncoder<'_>, name: &'a str, help: &str) -> Result<Lines<'a>, fmt::Error> {
    encoder.encode_descriptor(name, help, None, MetricType::Counter).map(Lines)
}

fn gauge(
    encoder: &mut DescriptorEncoder<'_>,
    name: &str,
    help: &str,
    lines: &[(Option<(&'static str, &str)>, u64)],
) -> fmt::Result {
    let mut family = encoder.encode_descriptor(name, help, None, MetricType::Gauge)?;
    for (label, level) in lines {
        let value = ConstGauge::new(level.cast_signed());
        match label {
            Some(label) => value.encode(family.encode_family(&std::slice::from_ref(label))?)?,
            None => return value.encode(family),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line<'a>(text: &'a str, start: &str) -> Option<&'a str> {
        text.lines().find_map(|line| line.strip_prefix(start)?.strip_prefix(' '))
    }

    #[test]
    fn workers_are_summed_and_rules_keep_their_counts_across_policies() {
        let hub = MetricsHub::new(Arc::default());
        let (mut one, mut two) = (hub.worker(), hub.worker());
        one.set_rules(["user", "page"]);
        two.set_rules(["user", "page"]);
        one.rule(0).hits.add(3);
        two.rule(0).hits.inc();
        one.rule(1).misses.inc();
        one.rule(7).hits.inc();
        // The rules change places.
        one.set_rules(["page", "user"]);
        one.rule(1).hits.inc();
        let text = hub.render(Vec::new());
        assert_eq!(line(&text, r#"larder_rule_hits_total{rule="user"}"#), Some("5"));
        assert_eq!(line(&text, r#"larder_rule_misses_total{rule="page"}"#), Some("1"));
        assert_eq!(line(&text, r#"larder_rule_hits_total{rule="(unmatched)"}"#), Some("1"));
        assert!(hub.rule_totals("user").contains(&("hits", 5)));
        assert!(text.ends_with("# EOF\n"));
    }

    #[test]
    fn nodes_levels_and_latencies_are_shown() {
        let hub = MetricsHub::new(Arc::default());
        let worker = hub.worker();
        let node = worker.node("10.0.0.1:6379");
        node.counters.requests.add(2);
        node.inflight.inc();
        worker.clients().inc();
        worker.clients().inc();
        worker.clients().dec();
        worker.record_proxy(1_000_000);
        worker.record_upstream(u64::MAX / 4);
        hub.background().policy_generation.set(7);
        let text = hub.render(Vec::new());
        assert_eq!(line(&text, r#"larder_node_requests_total{node="10.0.0.1:6379"}"#), Some("2"));
        assert_eq!(line(&text, r#"larder_node_inflight{node="10.0.0.1:6379"}"#), Some("1"));
        assert_eq!(line(&text, "larder_clients"), Some("1"));
        assert_eq!(line(&text, "larder_policy_generation"), Some("7"));
        assert_eq!(line(&text, r#"larder_request_duration_seconds_count{part="proxy"}"#), Some("1"));
        assert_eq!(line(&text, r#"larder_request_duration_seconds_sum{part="proxy"}"#), Some("0.001"));
        assert_eq!(line(&text, r#"larder_request_duration_seconds_bucket{le="0.001048576",part="proxy"}"#), Some("1"));
        assert_eq!(line(&text, r#"larder_request_duration_seconds_bucket{le="0.000524288",part="proxy"}"#), Some("0"));
        assert_eq!(line(&text, r#"larder_request_duration_seconds_bucket{le="+Inf",part="upstream"}"#), Some("1"));
    }

    #[test]
    fn names_are_bounded() {
        let hub = MetricsHub::new(Arc::default());
        let mut worker = hub.worker();
        let held = worker.node("held");
        for at in 0..3 * MAX_NODES {
            drop(worker.node(&at.to_string()));
        }
        held.counters.requests.inc();
        assert!(lock(&worker.block.nodes).len() <= MAX_NODES);
        assert_eq!(worker.node("held").counters.requests.get(), 1);
        for round in 0..10 {
            let names: Vec<String> = (0..1000).map(|at| format!("{round}-{at}")).collect();
            worker.set_rules(names.iter().map(String::as_str));
            worker.rule(999).hits.inc();
        }
        assert!(lock(&worker.block.rules).len() <= MAX_RULES);
    }
}
