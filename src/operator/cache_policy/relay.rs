//! The relay of a policy that writes behind, or that follows tables, or whose sidecars outnumber an origin's connections: who carries its
//! journals to their origins on Kubernetes, reads what databases committed, and loads.
//!
//! To all that brings a snapshot and a login to a workload, a relay is one more workload: the policy itself, which is the only one that it
//! follows. So it has a binding, with a ConfigMap and a Secret of its own, and a user at the servers that reaches the policy's journals, the
//! stream of events where it reads databases' changes, and nothing else, but for the deletion of what is cached of a dead letter's key. It depends on no workload that the policy selects: what these have written is carried on when none of them runs any more.
//!
//! [`objects`] is what runs it. [`level`] asks how much its journals hold and how its feeds are, [`kept`] and [`feeds`] know when nobody needs
//! them any more, and [`tend`] does what is due at a look.

pub mod feeds;
pub mod kept;
pub mod level;
pub mod objects;
pub mod tend;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;

use super::workload::Workload;
use crate::api::CachePolicy;
use crate::api::cache_policy::{OriginSpec, PolicyMode, RuleSpec, StrategyKind};
use crate::api::compile::journal_name;
use crate::policy::binding::BindingName;
use crate::policy::{JournalName, Mode, Snapshot, Span};

/// The kind of the workload that a relay is.
pub const KIND: &str = "CachePolicy";
/// What keeps a policy that is deleted until its journals are drained, and its slots taken away.
pub const FINALIZER: &str = "larder.dev/journal";
/// The annotation by which a person gives up what a policy that is being deleted waits for: what is left in its journals, and its slots.
pub const ABANDON_ANNOTATION: &str = "larder.dev/abandon-journal";

/// Whether a policy has rules that write behind, and takes effect.
pub fn writes_behind(policy: &CachePolicy) -> bool {
    let takes_effect = policy.spec.mode != Some(PolicyMode::Observe);
    takes_effect && policy.spec.rules.iter().any(|rule| rule.strategy == StrategyKind::WriteBehind)
}

/// Whether a policy has rules that follow tables, and takes effect.
pub fn follows_tables(policy: &CachePolicy) -> bool {
    let follows = |rule: &RuleSpec| rule.invalidate.as_ref().is_some_and(|invalidate| !invalidate.changes.is_empty());
    policy.spec.mode != Some(PolicyMode::Observe) && policy.spec.rules.iter().any(follows)
}

/// The queues by which a policy's rules may be loaded by a relay, each with how many connections its origin may have from all sidecars.
pub fn load_queues(policy: &CachePolicy) -> BTreeMap<JournalName, u32> {
    let text = |text: &Option<String>| text.clone().unwrap_or_default();
    let (namespace, name) = (text(&policy.metadata.namespace), text(&policy.metadata.name));
    let loads = |origin: &str| policy.spec.rules.iter().any(|rule| rule.origin.as_ref().is_some_and(|of| of.name == origin));
    let origins = policy.spec.origins.iter().filter(|origin| loads(&origin.name));
    let takes_effect = policy.spec.mode != Some(PolicyMode::Observe);
    let queue = |origin: &OriginSpec| {
        let total = origin.sql.as_ref().or(origin.http.as_ref())?.max_total_connections?;
        Some((journal_name(&namespace, &name, &origin.name).ok()?, total))
    };
    origins.filter(|_| takes_effect).filter_map(queue).collect()
}

/// Whether a policy needs a relay for what its rules say now, however many sidecars there are.
pub fn is_needed(policy: &CachePolicy) -> bool {
    writes_behind(policy) || follows_tables(policy)
}

/// Whether a workload, as a kind and a name with a slash between, is a relay.
pub fn is_relay(workload: &str) -> bool {
    workload.split('/').next() == Some(KIND)
}

/// Whether a policy's deletion waits for its relay, or would.
pub fn is_held(policy: &CachePolicy) -> bool {
    policy.metadata.finalizers.iter().flatten().any(|finalizer| finalizer == FINALIZER)
}

/// Whether a person gave up what a policy waits for.
pub fn is_abandoned(policy: &CachePolicy) -> bool {
    policy.metadata.annotations.as_ref().is_some_and(|annotations| annotations.contains_key(ABANDON_ANNOTATION))
}

/// The relay of a policy, as a workload that follows it. Its labels are no pod's.
pub fn workload(policy: &CachePolicy) -> Workload {
    let metadata = &policy.metadata;
    let text = |text: &Option<String>| text.clone().unwrap_or_default();
    Workload {
        namespace: text(&metadata.namespace),
        api_version: "larder.dev/v1alpha1".to_owned(),
        kind: KIND.to_owned(),
        name: text(&metadata.name),
        uid: text(&metadata.uid),
        labels: policy.spec.workloads.match_labels.clone(),
    }
}

/// The journals that rules of a snapshot write behind to, each with how old a write may become there.
pub fn journals_of(snapshot: &Snapshot) -> BTreeMap<JournalName, Span> {
    let mut journals = BTreeMap::new();
    let in_effect = snapshot.rules.iter().filter(|rule| rule.mode == Mode::Enforce);
    for journal in in_effect.filter_map(|rule| Some(&rule.strategy.behind()?.journal)) {
        let bound = journals.entry(journal.name.clone()).or_insert(journal.max_lag);
        *bound = journal.max_lag.min(*bound);
    }
    journals
}

/// The binding of a policy's relay.
pub fn binding(policy: &CachePolicy) -> BindingName {
    workload(policy).binding(&policy.spec.cache_cluster)
}
