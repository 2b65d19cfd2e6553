//! What came of the policies of each workload, kept from one look at a namespace to the next.
//!
//! To merge policies is the dear part of a look, and a look comes with every change in a namespace, while few workloads are concerned by
//! any one. What a merge depends on is therefore remembered beside its outcome; where it is the same, so is the outcome.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

use super::fetch::{Seen, Tenant};
use super::merge::{Namespace, Outcome, merge};
use super::place::Place;
use super::slots::SlotTaken;
use super::workload::Workload;
use crate::api::CachePolicy;
use crate::api::compile::in_order;
use crate::operator::watches::secrets_of;

/// What came of the policies that one workload follows.
pub struct Judged<'a> {
    /// The workload.
    pub tenant: &'a Tenant,
    settled: Arc<Settled>,
}

impl Judged<'_> {
    /// What came of them.
    pub fn outcome(&self) -> &Outcome {
        &self.settled.outcome
    }

    /// What the rules of a policy are called in the snapshot; `None` where they have no part in it.
    pub fn rules_of(&self, policy: &str) -> Option<&BTreeSet<String>> {
        self.settled.rules.get(policy)
    }
}

#[derive(Debug)]
struct Settled {
    outcome: Outcome,
    rules: HashMap<String, BTreeSet<String>>,
}

/// What is remembered: of each workload that follows policies one outcome.
#[derive(Debug, Default)]
pub struct Outcomes {
    all: HashMap<(String, String), (Option<Basis>, Arc<Settled>)>,
}

/// All that a merge depends on.
#[derive(Debug, PartialEq)]
struct Basis {
    workload: Workload,
    /// The `metadata.uid` and `metadata.generation` of each policy: what a policy says does not change without the latter.
    policies: Vec<(String, i64)>,
    /// The CacheClusters that they name, as far as these are there.
    clusters: BTreeMap<String, Option<Option<Place>>>,
    /// The slots that others have of those that they name.
    taken: Vec<Option<SlotTaken>>,
    /// The Secrets that they name, in the version that was read.
    secrets: BTreeMap<String, Option<Box<str>>>,
}

impl Basis {
    /// `None`: something has no version, and whether it changed cannot be told.
    fn of(
        workload: &Workload,
        followed: &[&CachePolicy],
        namespace: &Namespace,
        versions: &HashMap<&str, Option<&str>>,
    ) -> Option<Self> {
        let version = |policy: &&CachePolicy| Some((policy.metadata.uid.clone()?, policy.metadata.generation?));
        let clusters = followed.iter().map(|policy| &policy.spec.cache_cluster);
        let secret = |name: &str| match versions.get(name) {
            None => Some((name.to_owned(), None)),
            Some(version) => Some((name.to_owned(), Some(Box::from((*version)?)))),
        };
        Some(Self {
            workload: workload.clone(),
            policies: followed.iter().map(version).collect::<Option<_>>()?,
            clusters: clusters.map(|name| (name.clone(), namespace.clusters.get(name).cloned())).collect(),
            taken: followed.iter().map(|policy| namespace.taken.get(policy.metadata.name.as_deref()?).cloned()).collect(),
            secrets: followed.iter().flat_map(|policy| secrets_of(policy)).map(secret).collect::<Option<_>>()?,
        })
    }
}

/// The policies of a namespace, found by the labels that they select.
struct Selectors<'a> {
    /// By one of the labels that a pod has to have.
    by_label: HashMap<(&'a str, &'a str), Vec<&'a CachePolicy>>,
}

impl<'a> Selectors<'a> {
    fn of(policies: &[&'a CachePolicy]) -> Self {
        let mut by_label: HashMap<_, Vec<_>> = HashMap::new();
        for policy in policies {
            // One that selects by no label selects nobody.
            let Some((name, value)) = policy.spec.workloads.match_labels.iter().next() else { continue };
            by_label.entry((name.as_str(), value.as_str())).or_default().push(*policy);
        }
        Self { by_label }
    }

    /// Those that a workload follows, in their order.
    fn followed_by(&self, workload: &Workload) -> Vec<&'a CachePolicy> {
        let labels = workload.labels.iter().map(|(name, value)| (name.as_str(), value.as_str()));
        let near = labels.filter_map(|label| self.by_label.get(&label)).flatten().copied();
        in_order(&near.filter(|policy| workload.follows(policy)).collect::<Vec<_>>())
    }
}

/// What came of the policies for each workload that follows any, and how many were merged for that. `versions`: of each Secret that was
/// read the version. Others have their turn between two merges.
pub async fn judge<'a>(
    seen: &'a Seen,
    versions: &HashMap<&str, Option<&str>>,
    outcomes: &mut Outcomes,
) -> (Vec<Judged<'a>>, usize) {
    let policies = seen.readable();
    let selectors = Selectors::of(&policies);
    let mut before = std::mem::take(&mut outcomes.all);
    let (mut all, mut merged) = (Vec::new(), 0);
    for tenant in &seen.tenants {
        let workload = &tenant.workload;
        let followed =
            if tenant.is_relay { seen.policy_of(workload).into_iter().collect() } else { selectors.followed_by(workload) };
        if followed.is_empty() {
            continue;
        }
        let key = (workload.kind.clone(), workload.name.clone());
        let basis = Basis::of(workload, &followed, &seen.namespace, versions);
        let known = before.remove(&key).filter(|(known, _)| basis.is_some() && *known == basis);
        let (basis, settled) = match known {
            Some(known) => known,
            None => {
                let Some(outcome) = merge(workload, &followed, &seen.namespace, 0) else { continue };
                merged += 1;
                tokio::task::yield_now().await;
                // What goes on instead of something that is missing depends on more.
                let is_whole = outcome.judgements.iter().all(|judgement| judgement.resolved.is_ok());
                (basis.filter(|_| is_whole), Arc::new(Settled { rules: rules(&outcome, &followed), outcome }))
            }
        };
        outcomes.all.insert(key, (basis, settled.clone()));
        all.push(Judged { tenant, settled });
    }
    (all, merged)
}

/// What the rules of each policy are called in the snapshot: where several policies use one name, the younger's has its policy's before it.
fn rules(outcome: &Outcome, followed: &[&CachePolicy]) -> HashMap<String, BTreeSet<String>> {
    let by_name: HashMap<&str, &CachePolicy> =
        followed.iter().filter_map(|policy| Some((policy.metadata.name.as_deref()?, *policy))).collect();
    let (mut taken, mut all) = (BTreeSet::new(), HashMap::new());
    for judgement in outcome.judgements.iter().filter(|judgement| judgement.has_part()) {
        let Some(policy) = by_name.get(judgement.policy.as_str()) else { continue };
        let named = policy.spec.rules.iter().map(|rule| {
            if taken.contains(&rule.name) { format!("{}/{}", judgement.policy, rule.name) } else { rule.name.clone() }
        });
        let named: BTreeSet<String> = named.collect();
        taken.extend(named.iter().cloned());
        all.insert(judgement.policy.clone(), named);
    }
    all
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::operator::cache_policy::origins::KnownSecrets;
    use crate::policy::snapshot::Topology;

    fn policy(name: &str, generation: i64, labels: &Value, keys: &str) -> CachePolicy {
        let url = json!({"secretKeyRef": {"name": "db", "key": "url"}});
        serde_json::from_value(json!({
            "apiVersion": "larder.dev/v1alpha1", "kind": "CachePolicy",
            "metadata": {"name": name, "namespace": "store", "uid": name, "generation": generation},
            "spec": {
                "cacheCluster": "main", "workloads": {"matchLabels": labels}, "origins": [{"name": "db", "sql": {"url": url}}],
                "rules": [{"name": "r", "keys": keys, "strategy": "ReadThrough",
                    "origin": {"name": "db", "read": "SELECT name FROM users WHERE id = $id"}}],
            },
        }))
        .unwrap()
    }

    fn seen(policies: Vec<CachePolicy>, workloads: &[&str], port: u16) -> Seen {
        let topology = Topology::Sentinel { master: "main".to_owned(), sentinels: vec![format!("10.96.0.7:{port}")] };
        let tenant = |name: &&str| Tenant {
            workload: Workload {
                name: (*name).to_owned(),
                labels: [("app", *name), ("tier", "web")].map(|(label, value)| (label.to_owned(), value.to_owned())).into(),
                ..Workload::shop()
            },
            mounted: BTreeSet::new(),
            makers: BTreeSet::new(),
            is_relay: false,
        };
        let url = BTreeMap::from([("url".to_owned(), b"postgres://app:hidden@db/shop".to_vec())]);
        Seen {
            policies: policies.into_iter().map(|policy| Arc::new(kube::core::DeserializeGuard(Ok(policy)))).collect(),
            leaving: Vec::new(),
            stand_ins: Vec::new(),
            unknown: Vec::new(),
            tenants: workloads.iter().map(tenant).collect(),
            bound: BTreeMap::new(),
            namespace: Namespace {
                clusters: BTreeMap::from([("main".to_owned(), Some(Place { topology, tls: false, keeping: None }))]),
                secrets: KnownSecrets(BTreeMap::from([("db".to_owned(), url)])),
                ..Namespace::default()
            },
            offers: BTreeMap::new(),
            clusters: BTreeSet::from(["main".to_owned()]),
            queues: BTreeMap::new(),
        }
    }

    /// How many workloads were merged, and the names of those that follow something.
    async fn look(seen: &Seen, version: &str, outcomes: &mut Outcomes) -> (usize, Vec<String>) {
        let versions = HashMap::from([("db", Some(version))]);
        let (judged, merged) = judge(seen, &versions, outcomes).await;
        for judged in &judged {
            let anew = merge(&judged.tenant.workload, &seen.readable(), &seen.namespace, 0).unwrap();
            assert_eq!(*judged.outcome(), anew, "what is remembered is what would come of it now");
        }
        (merged, judged.iter().map(|judged| judged.tenant.workload.name.clone()).collect())
    }

    #[tokio::test]
    async fn what_concerns_one_workload_is_merged_for_it_alone() {
        let (a, b) = (json!({"app": "a"}), json!({"app": "b"}));
        let of_all = json!({"tier": "web"});
        let mut outcomes = Outcomes::default();
        let first = vec![policy("one", 1, &a, "a:{id}"), policy("two", 1, &b, "b:{id}")];
        let names = ["a", "b", "idle"];
        assert_eq!(look(&seen(first.clone(), &names, 1), "7", &mut outcomes).await, (2, vec!["a".to_owned(), "b".to_owned()]));
        assert_eq!(look(&seen(first.clone(), &names, 1), "7", &mut outcomes).await.0, 0, "nothing changed");
        let changed = vec![policy("one", 2, &a, "other:{id}"), policy("two", 1, &b, "b:{id}")];
        assert_eq!(look(&seen(changed.clone(), &names, 1), "7", &mut outcomes).await.0, 1, "one of its policies");
        assert_eq!(look(&seen(changed.clone(), &names, 2), "7", &mut outcomes).await.0, 2, "where the cache is");
        assert_eq!(look(&seen(changed.clone(), &names, 2), "8", &mut outcomes).await.0, 2, "the URL's Secret");
        let more: Vec<CachePolicy> = changed.iter().cloned().chain([policy("three", 1, &of_all, "c:{id}")]).collect();
        assert_eq!(look(&seen(more, &names, 2), "8", &mut outcomes).await.0, 3, "one that all follow");
        assert_eq!(look(&seen(changed.clone(), &["b"], 2), "8", &mut outcomes).await.0, 1);
        assert_eq!(outcomes.all.len(), 1, "who is gone is not remembered");
        assert_eq!(look(&seen(changed[..1].to_vec(), &["b"], 2), "8", &mut outcomes).await, (0, Vec::new()));
        assert!(outcomes.all.is_empty());
    }

    #[tokio::test]
    async fn what_has_no_version_is_merged_each_time() {
        let mut outcomes = Outcomes::default();
        let mut nameless = policy("one", 1, &json!({"app": "a"}), "a:{id}");
        nameless.metadata.generation = None;
        for _ in 0..2 {
            assert_eq!(look(&seen(vec![nameless.clone()], &["a"], 1), "7", &mut outcomes).await.0, 1);
        }
    }

    #[tokio::test]
    async fn rules_are_known_by_their_names_in_the_snapshot() {
        let labels = json!({"app": "a"});
        let policies =
            vec![policy("one", 1, &labels, "a:{id}"), policy("two", 1, &labels, "b:{id}"), policy("x", 1, &labels, "a:1")];
        let seen = seen(policies, &["a"], 1);
        let (judged, _) = judge(&seen, &HashMap::from([("db", Some("1"))]), &mut Outcomes::default()).await;
        let named = |policy: &str| judged[0].rules_of(policy).map(|rules| rules.iter().cloned().collect::<Vec<_>>());
        assert_eq!((named("one"), named("two"), named("x")), (Some(vec!["r".to_owned()]), Some(vec!["two/r".to_owned()]), None));
        let snapshot = judged[0].outcome().merged.as_ref().unwrap().snapshot.as_ref().unwrap();
        assert_eq!(snapshot.rules.iter().map(|rule| rule.name.as_str()).collect::<Vec<_>>(), ["r", "two/r"]);
    }
}
