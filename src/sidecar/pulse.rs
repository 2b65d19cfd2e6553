//! What the sidecar tells of itself: a look at the counters, on the second thread. No worker takes part in it.

use std::sync::Arc;
use std::time::Instant;

use tokio::sync::watch;

use super::delivery::{Delivered, Refused};
use super::reload::Told;
use crate::policy::binding::BindingName;
use crate::policy::heartbeat::{Heartbeat, RefusedSnapshot, RuleBeat, UNMATCHED, VERSION};
use crate::policy::snapshot;
use crate::telemetry::metrics::MetricsHub;

/// The longest name of a pod that is told.
const MAX_POD_CHARS: usize = 80;

/// Where a heartbeat's figures come from.
#[derive(Debug, Clone)]
pub struct Pulse {
    sidecar: String,
    binding: BindingName,
    metrics: Arc<MetricsHub>,
    told: watch::Receiver<Option<Told>>,
    delivered: watch::Receiver<Delivered>,
    began: Instant,
}

impl Pulse {
    /// The figures of this process.
    pub fn new(
        binding: BindingName,
        metrics: Arc<MetricsHub>,
        told: watch::Receiver<Option<Told>>,
        delivered: watch::Receiver<Delivered>,
    ) -> Self {
        Self { sidecar: identity(), binding, metrics, told, delivered, began: Instant::now() }
    }

    /// As they are now.
    pub fn heartbeat(&self) -> Heartbeat {
        let (clients, clients_ever) = self.metrics.clients();
        let Delivered { generation, refused, .. } = self.delivered.borrow().clone();
        Heartbeat {
            version: VERSION,
            sidecar: self.sidecar.clone(),
            binding: self.binding.to_string(),
            larder: env!("CARGO_PKG_VERSION").to_owned(),
            understands: snapshot::VERSION,
            generation,
            refused: refused.map(|Refused { generation, reason, .. }| RefusedSnapshot { generation, reason }),
            uptime_seconds: self.began.elapsed().as_secs(),
            clients,
            clients_ever,
            rules: self.rules(),
            rules_left_out: 0,
        }
    }

    fn rules(&self) -> Vec<RuleBeat> {
        let told = self.told.borrow().clone();
        let snapshot = told.map(|told| told.in_force.borrow().policy.snapshot().clone());
        let names = snapshot.iter().flat_map(|snapshot| snapshot.rules.iter().map(|rule| rule.name.as_str()));
        names.chain([UNMATCHED]).map(|name| self.rule(name)).collect()
    }

    fn rule(&self, name: &str) -> RuleBeat {
        let totals = self.metrics.rule_totals(name);
        let of = |counter: &str| totals.iter().find(|(name, _)| *name == counter).map_or(0, |(_, count)| *count);
        RuleBeat {
            name: name.to_owned(),
            hits: of("hits"),
            misses: of("misses"),
            loads: of("loads"),
            load_errors: of("load_errors"),
            loads_saved: of("loads_saved"),
            stale: of("stale"),
            leases: of("leases"),
            wait_timeouts: of("wait_timeouts"),
            never_filled: of("hit_for_miss"),
            refused_fills: of("ambiguous_fills") + of("late_fills"),
            without_ttl: of("ttl_added") + of("ttl_repaired"),
            predicted_loads_saved: of("predicted_loads_saved"),
            predicted_without_ttl: of("predicted_ttl_added"),
        }
    }
}

/// The pod's name, where it is told, or the machine's, and a part by chance: a process that is started again is another one.
fn identity() -> String {
    let named = std::env::var("POD_NAME").ok().filter(|name| !name.is_empty());
    let name = named.or_else(|| std::fs::read_to_string("/proc/sys/kernel/hostname").ok()).unwrap_or_default();
    let name: String = name.trim().chars().filter(|c| c.is_ascii_graphic()).take(MAX_POD_CHARS).collect();
    format!("{name}-{:08x}", fastrand::u32(..))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::telemetry::metrics::UNMATCHED_RULE;

    #[test]
    fn figures_are_the_counters_own() {
        assert_eq!(UNMATCHED, UNMATCHED_RULE);
        let metrics = Arc::new(MetricsHub::new(Arc::default()));
        let mut worker = metrics.worker();
        worker.set_rules(["user"]);
        worker.rule(0).hits.add(7);
        worker.rule(0).late_fills.inc();
        worker.rule(0).ambiguous_fills.inc();
        worker.rule(0).ttl_repaired.inc();
        worker.unmatched().misses.inc();
        worker.clients().inc();
        worker.process().clients_accepted.add(3);
        let (_delivers, delivered) = watch::channel(Delivered { generation: Some(4), ..Delivered::default() });
        let (_tells, told) = watch::channel(None);
        let binding = BindingName::parse("shop").expect("a name");
        let pulse = Pulse::new(binding, metrics, told, delivered);
        let beat = pulse.heartbeat();
        assert_eq!((beat.generation, beat.clients, beat.clients_ever), (Some(4), 1, 3));
        assert_eq!(beat.rules, [RuleBeat { name: UNMATCHED.to_owned(), misses: 1, ..RuleBeat::default() }]);
        let user = pulse.rule("user");
        assert_eq!((user.hits, user.refused_fills, user.without_ttl), (7, 2, 1));
        assert_ne!(pulse.heartbeat().sidecar, Pulse::new(pulse.binding, pulse.metrics, pulse.told, pulse.delivered).sidecar);
    }
}
