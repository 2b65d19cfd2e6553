//! What became of the policies of a namespace is told: each status at most once in ten seconds, and only where it differs.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::jiff::Timestamp;
use kube::api::{ApiResource, DynamicObject, Patch, PatchParams};
use kube::core::ObjectMeta;
use kube::{Api, Resource as _};
use serde_json::json;
use tokio::time::Instant;
use tracing::debug;

use super::cache::Figures;
use super::fetch::Seen;
use super::judged::Judged;
use super::look::{Delivery, LookError, Memory};
use super::merge::merge;
use super::relay::feeds::Feeds;
use super::relay::tend::Carriage;
use super::report::{self, Part, Progress, Relayed, Verdicts};
use super::verdict::Judgement;
use super::workload::Workload;
use crate::api::cache_policy::CachePolicyStatus;
use crate::api::{CachePolicy, lint};
use crate::operator::cache_cluster::names::MANAGER;
use crate::operator::cache_cluster::report::Happening;
use crate::operator::controller::Context;
use crate::operator::events::{self, Advised};
use crate::operator::watches::Policy;
use crate::policy::Snapshot;
use crate::policy::binding::BindingName;

/// How long a status stands before it is written again.
const APART: Duration = Duration::from_secs(10);

/// What was told of a policy last.
#[derive(Debug)]
pub struct Told {
    uid: Option<String>,
    status: CachePolicyStatus,
    at: Option<Instant>,
    /// What of its sidecars was told.
    notices: BTreeSet<String>,
    /// What of its anti-patterns was.
    advised: Advised,
}

impl Told {
    /// Of a policy that is seen for the first time: what its status says.
    fn earlier(policy: &Policy) -> Self {
        let status = policy.0.as_ref().ok().and_then(|policy| policy.status.clone()).unwrap_or_default();
        let advised = Advised::earlier(status.observed_generation);
        Self { uid: policy.meta().uid.clone(), status, at: None, notices: BTreeSet::new(), advised }
    }
}

/// What there is to tell of.
pub(super) struct Scene<'a> {
    /// What the operator may use.
    pub context: &'a Context,
    /// The namespace.
    pub namespace: &'a str,
    /// What there is.
    pub seen: &'a Seen,
    /// What came of policies, for each workload.
    pub judged: &'a [Judged<'a>],
    /// What came of bindings.
    pub deliveries: &'a BTreeMap<BindingName, Delivery<'a>>,
    /// What their sidecars told.
    pub figures: &'a BTreeMap<BindingName, Figures>,
    /// How far the journals of policies are carried, by these' names.
    pub carriages: &'a BTreeMap<String, Carriage>,
    /// How the changes of the databases are read that they follow.
    pub feeds: &'a BTreeMap<String, Feeds>,
}

/// What a policy is to one workload, as far as it is not held elsewhere.
struct Share<'a> {
    workload: String,
    judgement: &'a Judgement,
    delivery: Option<&'a Delivery<'a>>,
    figures: Option<&'a Figures>,
    rules: &'a BTreeSet<String>,
}

/// For each policy the workloads that follow it, and what came of it there.
type Followers<'a> = HashMap<&'a str, Vec<(&'a Judged<'a>, &'a Judgement)>>;

/// No rules at all.
static NONE: BTreeSet<String> = BTreeSet::new();

/// Policies by their names, whoever was told longest ago first: where the API server is slow, a look ends before all are told, and the next goes on.
/// What was told of policies that are no more is forgotten.
fn in_turn<'a>(
    policies: impl IntoIterator<Item = &'a Arc<Policy>>,
    told: &mut HashMap<String, Told>,
) -> Vec<(&'a str, &'a Policy)> {
    let by_name = policies.into_iter().filter_map(|policy| Some((policy.meta().name.as_deref()?, &**policy)));
    let by_name: HashMap<&str, &Policy> = by_name.collect();
    told.retain(|name, told| by_name.get(name.as_str()).is_some_and(|policy| policy.meta().uid == told.uid));
    let mut in_turn: Vec<(&str, &Policy)> = by_name.into_iter().collect();
    in_turn.sort_by_key(|(name, _)| (told.get(*name).and_then(|told| told.at), *name));
    in_turn
}

impl Scene<'_> {
    /// Tells of every policy, or of those whose turn comes while the look goes on. How soon there is more to tell that came too early.
    pub async fn tell(&self, memory: &mut Memory) -> Result<Option<Duration>, LookError> {
        let mut again: Option<Duration> = None;
        let mut outcome = Ok(());
        let followers = self.followers();
        for (name, policy) in in_turn(self.seen.policies.iter().chain(&self.seen.leaving), &mut memory.told) {
            let told = memory.told.entry(name.to_owned()).or_insert_with(|| Told::earlier(policy));
            let wait = match &policy.0 {
                Ok(policy) if policy.metadata.deletion_timestamp.is_some() => self.tell_leaving(policy, told).await,
                Ok(policy) => self.tell_of(policy, &followers, told).await,
                Err(invalid) => self.tell_unreadable(policy.meta(), &invalid.error, told).await,
            };
            match wait {
                Ok(wait) => again = again.into_iter().chain(wait).min(),
                Err(error) => outcome = Err(error),
            }
        }
        outcome.map(|()| again)
    }

    fn followers(&self) -> Followers<'_> {
        let mut all = Followers::new();
        for judged in self.judged.iter().filter(|judged| !judged.tenant.is_relay) {
            for judgement in &judged.outcome().judgements {
                all.entry(judgement.policy.as_str()).or_default().push((judged, judgement));
            }
        }
        all
    }

    async fn tell_of(
        &self,
        policy: &CachePolicy,
        followers: &Followers<'_>,
        told: &mut Told,
    ) -> Result<Option<Duration>, LookError> {
        let shares = self.shares(policy, followers);
        let parts: Vec<Part<'_>> = shares.iter().map(Share::part).collect();
        let relayed = self.relayed(policy);
        let verdicts = Verdicts::of(&parts, || alone(policy, self.seen)).with(relayed);
        let status = report::status(policy, &verdicts, &parts, relayed, &told.status, Timestamp::now());
        let notices = report::notices(&parts);
        for (key, happening) in &notices {
            if !told.notices.contains(key) {
                self.publish(&policy.metadata, key, happening).await;
            }
        }
        told.notices = notices.into_iter().map(|(key, _)| key).collect();
        for (code, happening) in told.advised.due(policy.metadata.generation, || lint::of_policy(&policy.spec)) {
            self.publish(&policy.metadata, code, &happening).await;
        }
        self.write(&policy.metadata, status, told).await
    }

    /// Of a policy that is being deleted: what it waits for.
    async fn tell_leaving(&self, policy: &CachePolicy, told: &mut Told) -> Result<Option<Duration>, LookError> {
        let relayed = self.relayed(policy);
        let verdicts = Verdicts::leaving().with(relayed);
        let status = report::status(policy, &verdicts, &[], relayed, &told.status, Timestamp::now());
        self.write(&policy.metadata, status, told).await
    }

    fn relayed(&self, policy: &CachePolicy) -> Relayed<'_> {
        let name = policy.metadata.name.as_deref().unwrap_or_default();
        let is_leaving = policy.metadata.deletion_timestamp.is_some();
        Relayed { carriage: self.carriages.get(name), feeds: self.feeds.get(name), is_leaving }
    }

    async fn tell_unreadable(&self, metadata: &ObjectMeta, error: &str, told: &mut Told) -> Result<Option<Duration>, LookError> {
        let goes_on = self.seen.stand_ins.iter().any(|earlier| earlier.meta().uid == metadata.uid);
        let verdicts = Verdicts::unreadable(error, goes_on);
        let conditions = report::conditions(&told.status.conditions, &verdicts, metadata.generation, Timestamp::now());
        let status = CachePolicyStatus {
            observed_generation: metadata.generation,
            conditions,
            summary: Some("Unreadable".to_owned()),
            ..CachePolicyStatus::default()
        };
        if told.status == status {
            return Ok(None);
        }
        match self.write(metadata, status.clone(), told).await {
            // The API server takes no status for one whose fields are of another kind than its definition says: events have to do.
            Err(LookError::Status(_, error)) if matches!(*error, kube::Error::Api(_)) => {
                debug!(namespace = self.namespace, %error, "the status of a policy that cannot be read cannot be written");
                for happening in report::happenings(&told.status, &status) {
                    self.publish(metadata, "", &happening).await;
                }
                told.status = status;
                Ok(None)
            }
            outcome => outcome,
        }
    }

    /// What a policy is to each workload that it selects.
    fn shares<'s>(&'s self, policy: &CachePolicy, followers: &Followers<'s>) -> Vec<Share<'s>> {
        let name = policy.metadata.name.as_deref().unwrap_or_default();
        let share = |(judged, judgement): &(&'s Judged<'s>, &'s Judgement)| {
            let Workload { kind, name: workload, .. } = &judged.tenant.workload;
            let binding = match &judged.outcome().merged {
                Some(merged) => Some(&merged.binding),
                None => self.deliveries.iter().find(|(_, delivery)| is_of(delivery, judged)).map(|(binding, _)| binding),
            };
            Share {
                workload: format!("{kind}/{workload}"),
                judgement,
                delivery: binding.and_then(|binding| self.deliveries.get(binding)),
                figures: binding.and_then(|binding| self.figures.get(binding)),
                rules: judged.rules_of(name).unwrap_or(&NONE),
            }
        };
        followers.get(name).into_iter().flatten().map(share).collect()
    }

    /// Writes a status if it differs, and if it may be by now. How soon it may.
    async fn write(
        &self,
        metadata: &ObjectMeta,
        status: CachePolicyStatus,
        told: &mut Told,
    ) -> Result<Option<Duration>, LookError> {
        if told.status == status {
            return Ok(None);
        }
        let waits = told.at.and_then(|at| APART.checked_sub(at.elapsed())).filter(|waits| !waits.is_zero());
        if waits.is_some() || !self.context.leadership.holds() {
            return Ok(waits);
        }
        let resource = ApiResource::erase::<CachePolicy>(&());
        let api: Api<DynamicObject> = Api::namespaced_with(self.context.client.clone(), self.namespace, &resource);
        let name = metadata.name.clone().unwrap_or_default();
        let document = json!({
            "apiVersion": resource.api_version,
            "kind": resource.kind,
            "metadata": {"name": name, "uid": metadata.uid},
            "status": status,
        });
        match api.patch_status(&name, &PatchParams::apply(MANAGER).force(), &Patch::Apply(&document)).await {
            Ok(_) => {}
            // Deleted in the meantime, or another of the same name.
            Err(kube::Error::Api(status)) if status.code == 404 || status.code == 409 => return Ok(None),
            Err(error) => return Err(LookError::Status(name, Box::new(error))),
        }
        self.context.metrics.wrote_policy_status();
        let happenings = report::happenings(&told.status, &status);
        (told.status, told.at) = (status, Some(Instant::now()));
        for happening in happenings {
            self.publish(metadata, "", &happening).await;
        }
        Ok(None)
    }

    /// Tells an event about a policy. `subject`: see [`events::publish`].
    async fn publish(&self, metadata: &ObjectMeta, subject: &str, happening: &Happening) {
        let name = metadata.name.as_deref().unwrap_or_default();
        let regarding = events::regarding::<CachePolicy>(self.namespace, name, metadata.uid.clone());
        events::publish(&self.context.recorder, &regarding, subject, happening).await;
    }
}

impl Share<'_> {
    /// How far it has come with this policy: where others are waited for, its own rules may be in force as they are.
    fn progress(&self) -> &Progress {
        let Some(delivery) = self.delivery else { return &Progress::Nothing };
        let is_in_force = || {
            let (Some((stands, _)), Some(merged)) = (&delivery.stands, delivery.merged()) else { return false };
            let rule = |snapshot: &'_ Snapshot, name: &String| snapshot.rules.iter().find(|rule| rule.name == *name).cloned();
            self.judgement.has_part() && self.rules.iter().all(|name| rule(stands, name) == rule(merged, name))
        };
        match &delivery.progress {
            Progress::WaitsForPolicies(_) if is_in_force() => &Progress::Delivered,
            progress => progress,
        }
    }

    fn part(&self) -> Part<'_> {
        Part {
            workload: &self.workload,
            judgement: self.judgement,
            progress: self.progress(),
            snapshot: self.delivery.and_then(|delivery| Some(&*delivery.stands.as_ref()?.0)),
            sidecars: self.delivery.map_or(0, |delivery| delivery.bound.sidecars),
            figures: self.figures,
            rules: self.rules,
        }
    }
}

fn is_of(delivery: &Delivery<'_>, judged: &Judged<'_>) -> bool {
    delivery.tenant.is_some_and(|tenant| std::ptr::eq(tenant, judged.tenant))
}

/// What would come of a policy for a workload that follows no other: where it selects none, it is judged all the same.
fn alone(policy: &CachePolicy, seen: &Seen) -> Judgement {
    let workload = Workload {
        namespace: policy.metadata.namespace.clone().unwrap_or_default(),
        api_version: String::new(),
        kind: "a workload".to_owned(),
        name: "with these labels".to_owned(),
        uid: String::new(),
        labels: policy.spec.workloads.match_labels.clone(),
    };
    let outcome = merge(&workload, &[policy], &seen.namespace, 0);
    let judgement = outcome.and_then(|outcome| outcome.judgements.into_iter().next());
    judgement.unwrap_or_else(|| Judgement {
        policy: policy.metadata.name.clone().unwrap_or_default(),
        accepted: Ok(()),
        resolved: Ok(()),
        goes_on: false,
        remarks: Vec::new(),
    })
}

#[cfg(test)]
mod tests {
    use kube::core::DeserializeGuard;

    use super::*;

    fn policy(name: &str) -> Arc<Policy> {
        let spec = json!({"cacheCluster": "main", "workloads": {"matchLabels": {"app": "shop"}}, "rules": []});
        let (version, metadata) = ("larder.dev/v1alpha1", json!({"name": name, "uid": "1"}));
        let policy = json!({"apiVersion": version, "kind": "CachePolicy", "metadata": metadata, "spec": spec});
        Arc::new(DeserializeGuard(Ok(serde_json::from_value(policy).unwrap())))
    }

    #[test]
    fn whoever_was_told_longest_ago_comes_first() {
        let now = Instant::now();
        let told = |name: &str, uid: &str, seconds| {
            let (uid, at) = (Some(uid.to_owned()), Some(now + Duration::from_secs(seconds)));
            let (status, advised) = (CachePolicyStatus::default(), Advised::earlier(None));
            (name.to_owned(), Told { uid, status, at, notices: BTreeSet::new(), advised })
        };
        let policies = ["late", "early", "new", "another"].map(policy);
        let mut all = HashMap::from([told("late", "1", 2), told("early", "1", 1), told("another", "2", 3), told("gone", "1", 0)]);
        let order: Vec<&str> = in_turn(&policies, &mut all).into_iter().map(|(name, _)| name).collect();
        assert_eq!(order, ["another", "new", "early", "late"]);
        assert_eq!(all.keys().collect::<BTreeSet<_>>(), [&"early".to_owned(), &"late".to_owned()].into());
    }
}
