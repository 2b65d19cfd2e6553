//! What a worker counts: the seam between the data path and telemetry.

use std::cell::{Cell, RefCell};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::engine::lease::Doubt;
use super::policy::{ActivePolicy, RuleId};
use super::upstream::node::NodeAddr;
use crate::origin::LoadError;
use crate::telemetry::background::Background;
use crate::telemetry::hot_keys::HotKeys;
use crate::telemetry::metrics::{MetricsHub, NodeMeter, RuleCounters, WorkerMetrics};
use crate::telemetry::slow_log::SlowLog;

/// Why a write was not made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WriteFailure {
    /// It will not be had.
    Rejected,
    /// It may have been made.
    Unknown,
    /// Anything else: it surely was not.
    Otherwise,
}

impl From<&LoadError> for WriteFailure {
    fn from(error: &LoadError) -> Self {
        match error {
            LoadError::Rejected { .. } => Self::Rejected,
            LoadError::Unknown { .. } => Self::Unknown,
            _ => Self::Otherwise,
        }
    }
}

/// Commands that took this long are noted in the slow log.
pub const SLOW_MS: u64 = 200;
const SLOW_LINES_PER_SECOND: u32 = 5;
/// One command in so many is timed.
const SAMPLE_EVERY: u64 = 64;

/// One worker's counters.
#[derive(Debug)]
pub struct Meter {
    hub: Arc<MetricsHub>,
    metrics: RefCell<WorkerMetrics>,
    slow: RefCell<SlowLog>,
}

impl Meter {
    /// The counters of another worker of `hub`.
    pub fn new(hub: &Arc<MetricsHub>) -> Self {
        let slow = SlowLog::new(Duration::from_millis(SLOW_MS), SLOW_LINES_PER_SECOND);
        Self { hub: hub.clone(), metrics: RefCell::new(hub.worker()), slow: RefCell::new(slow) }
    }

    /// Counts for the rules of `policy` from now on.
    pub fn adopt(&self, policy: &ActivePolicy) {
        let names = policy.snapshot().rules.iter().map(|rule| rule.name.as_str());
        self.metrics.borrow_mut().set_rules(names);
    }

    /// The counters of a rule by their names, summed over all workers.
    pub fn rule_totals(&self, rule: &str) -> Vec<(&'static str, u64)> {
        self.hub.rule_totals(rule)
    }

    /// What is counted beside the data path.
    pub fn background(&self) -> &Arc<Background> {
        self.hub.background()
    }

    /// Where keys are noted while somebody asks which are used most.
    #[inline]
    pub fn hot_keys(&self) -> &HotKeys {
        self.hub.hot_keys()
    }

    #[inline]
    fn on_rule(&self, rule: RuleId, count: impl FnOnce(&RuleCounters)) {
        count(self.metrics.borrow().rule(usize::from(rule)));
    }

    /// A read was answered; null is a miss.
    #[inline]
    pub fn count_read(&self, rule: RuleId, null: bool) {
        self.on_rule(rule, |counters| if null { counters.misses.inc() } else { counters.hits.inc() });
    }

    /// A load began.
    pub fn load(&self, rule: RuleId) {
        self.on_rule(rule, |counters| counters.loads.inc());
    }

    /// A load failed.
    pub fn load_error(&self, rule: RuleId) {
        self.on_rule(rule, |counters| counters.load_errors.inc());
    }

    /// A read that found nothing was served without a load of its own. What spared it is counted beside that.
    pub fn load_saved(&self, rule: RuleId) {
        self.on_rule(rule, |counters| counters.loads_saved.inc());
    }

    /// A read needed the origin's data, and another's load served it.
    pub fn coalesced(&self, rule: RuleId) {
        self.on_rule(rule, |counters| counters.coalesced.inc());
    }

    /// A read was served a stale copy.
    pub fn stale(&self, rule: RuleId) {
        self.on_rule(rule, |counters| counters.stale.inc());
    }

    /// A read was answered by a negative entry.
    pub fn negative(&self, rule: RuleId) {
        self.on_rule(rule, |counters| counters.negative.inc());
    }

    /// A miss was told to a client that may load while others wait.
    pub fn lease_granted(&self, rule: RuleId) {
        self.on_rule(rule, |counters| counters.leases.inc());
    }

    /// A read waited for another client's load, and was given what it stored.
    pub fn woken(&self, rule: RuleId) {
        self.on_rule(rule, |counters| counters.woken.inc());
    }

    /// A read waited for another client's load for too long.
    pub fn wait_timed_out(&self, rule: RuleId) {
        self.on_rule(rule, |counters| counters.wait_timeouts.inc());
    }

    /// A read was told of the miss although another client loads.
    pub fn unparked(&self, rule: RuleId) {
        self.on_rule(rule, |counters| counters.unparked.inc());
    }

    /// A read was told to try again at once: it must not wait, and a client of its connection loads already.
    pub fn cut_short(&self, rule: RuleId) {
        self.on_rule(rule, |counters| counters.cut_short.inc());
    }

    /// A read of a key that nobody fills was told of the miss.
    pub fn hit_for_miss(&self, rule: RuleId) {
        self.on_rule(rule, |counters| counters.hit_for_miss.inc());
    }

    /// A value that could not be told from an outdated one was removed.
    pub fn ambiguous_fill(&self, rule: RuleId, doubt: Doubt) {
        self.on_rule(rule, |counters| {
            counters.ambiguous_fills.inc();
            match doubt {
                Doubt::Mixed => {}
                Doubt::Undated => counters.undated_fills.inc(),
                Doubt::Forgotten => counters.forgotten_fills.inc(),
            }
        });
    }

    /// A value that was loaded before a write or deletion was removed.
    pub fn late_fill(&self, rule: RuleId) {
        self.on_rule(rule, |counters| counters.late_fills.inc());
    }

    /// A read was told of a miss before the key expired.
    pub fn early_refresh(&self, rule: RuleId) {
        self.on_rule(rule, |counters| counters.early_refreshes.inc());
    }

    /// A rule has no leases for a while.
    pub fn disarmed(&self, rule: RuleId) {
        self.on_rule(rule, |counters| counters.disarmed.inc());
    }

    /// A command's changes were carried to the origin. `failed`: how, where they were not made.
    pub fn written(&self, rule: RuleId, failed: Option<WriteFailure>) {
        self.on_rule(rule, |counters| {
            counters.writes.inc();
            match failed {
                None => {}
                Some(WriteFailure::Rejected) => counters.writes_rejected.inc(),
                Some(WriteFailure::Unknown) => counters.writes_unknown.inc(),
                Some(WriteFailure::Otherwise) => counters.write_errors.inc(),
            }
        });
    }

    /// A value that was written is not kept: another write of its key was under way.
    pub fn unkept(&self, rule: RuleId) {
        self.on_rule(rule, |counters| counters.writes_unkept.inc());
    }

    /// A write was given what keeps its keys within their TTLs.
    pub fn ttl_added(&self, rule: RuleId) {
        self.on_rule(rule, |counters| counters.ttl_added.inc());
    }

    /// A miss of a rule that only observes: whether it would have been saved a load, and how many load at once.
    pub fn predicted_miss(&self, rule: RuleId, saved: bool, at_once: u64) {
        let metrics = self.metrics.borrow();
        if saved {
            metrics.rule(usize::from(rule)).predicted_loads_saved.inc();
        }
        metrics.raise_stampede(usize::from(rule), at_once);
    }

    /// A value that a rule, which only observes, could not have told from an outdated one.
    pub fn predicted_ambiguous_fill(&self, rule: RuleId) {
        self.on_rule(rule, |counters| counters.predicted_ambiguous_fills.inc());
    }

    /// A write that a rule, which only observes, would have given a TTL.
    pub fn predicted_ttl_added(&self, rule: RuleId) {
        self.on_rule(rule, |counters| counters.predicted_ttl_added.inc());
    }

    /// A key that had no TTL was given one by the sweep.
    pub fn ttl_repaired(&self, rule: RuleId) {
        self.on_rule(rule, |counters| counters.ttl_repaired.inc());
    }

    /// The counters of a node, to be kept beside a connection to it.
    pub fn node(&self, node: &NodeAddr) -> Arc<NodeMeter> {
        self.metrics.borrow().node(&node.to_string())
    }

    /// A redirect was followed.
    pub fn redirect(&self) {
        self.metrics.borrow().process().redirects.inc();
    }

    /// A command is sent again.
    pub fn retry(&self) {
        self.metrics.borrow().process().retries.inc();
    }

    /// A client came.
    pub fn client_came(&self) {
        let metrics = self.metrics.borrow();
        metrics.process().clients_accepted.inc();
        metrics.clients().inc();
    }

    /// A client left.
    pub fn client_left(&self) {
        self.metrics.borrow().clients().dec();
    }

    /// A client was turned away.
    pub fn client_rejected(&self) {
        self.metrics.borrow().process().clients_rejected.inc();
    }

    /// Bytes came from a client.
    #[inline]
    pub fn client_bytes(&self, count: usize) {
        self.metrics.borrow().process().client_bytes_received.add(count as u64);
    }

    /// Bytes came from a server.
    #[inline]
    pub fn upstream_bytes(&self, count: usize) {
        self.metrics.borrow().process().upstream_bytes_received.add(count as u64);
    }

    /// Notes a slow command.
    #[cold]
    pub fn slow(&self, took_ms: u64, command: &[u8]) {
        let name = String::from_utf8_lossy(&command[..command.len().min(32)]).to_ascii_uppercase();
        self.slow.borrow_mut().note(Duration::from_millis(took_ms), &name, None);
    }

    fn record(&self, proxy: Duration, upstream: Duration) {
        let metrics = self.metrics.borrow();
        metrics.record_proxy(proxy.as_nanos() as u64);
        metrics.record_upstream(upstream.as_nanos() as u64);
    }
}

/// Times one command in [`SAMPLE_EVERY`] on its way through a connection: one at a time.
#[derive(Debug, Default)]
pub struct Sampler(Cell<Option<Sample>>);

#[derive(Debug, Clone, Copy)]
struct Sample {
    /// The command's number on its connection.
    number: u64,
    queued: Instant,
    written: Option<Instant>,
}

impl Sampler {
    /// The command `number` is queued.
    #[inline]
    pub fn on_queued(&self, number: u64) {
        if number.is_multiple_of(SAMPLE_EVERY) && self.0.get().is_none() {
            self.0.set(Some(Sample { number, queued: Instant::now(), written: None }));
        }
    }

    /// All that is queued is written.
    #[inline]
    pub fn on_written(&self) {
        if let Some(sample) = self.0.get()
            && sample.written.is_none()
        {
            self.0.set(Some(Sample { written: Some(Instant::now()), ..sample }));
        }
    }

    /// The command `number` is answered.
    #[inline]
    pub fn on_answered(&self, number: u64, meter: &Meter) {
        if let Some(sample) = self.0.get()
            && sample.number <= number
        {
            if let Some(written) = sample.written {
                meter.record(written - sample.queued, written.elapsed());
            }
            self.0.set(None);
        }
    }
}
