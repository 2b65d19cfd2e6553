//! What a person should know who writes a policy: where it has no effect beside others, or takes theirs away.
//!
//! It is only told: a policy may be written before the one that it takes over from is removed. The judgement is the one that the operator
//! delivers by ([`merge`]), over workloads as they may be: pods with the labels that this policy selects by, alone and together with those of
//! each other policy, as far as they do not contradict each other. Which pods there are is not asked.

use std::collections::{BTreeMap, BTreeSet};

use crate::api::CachePolicy;
use crate::operator::cache_policy::merge::{Namespace, merge};
use crate::operator::cache_policy::slots;
use crate::operator::cache_policy::verdict::Judgement;
use crate::operator::cache_policy::workload::Workload;

/// How many kinds of workloads are judged.
const MOST_WORKLOADS: usize = 16;

type Labels = BTreeMap<String, String>;

/// What is to be said of a policy beside the others of its namespace, in the form in which it is about to be kept. `goes_on` is asked before
/// each kind of workload: policies of a thousand rules take their time.
pub fn advise(policy: &CachePolicy, others: &[CachePolicy], goes_on: impl Fn() -> bool) -> Vec<String> {
    let others: Vec<&CachePolicy> = others.iter().filter(|other| other.metadata.name != policy.metadata.name).collect();
    let mut told = Vec::new();
    for workload in workloads(policy, &others).iter().take_while(|_| goes_on()) {
        let before = judgements(workload, &others);
        let all: Vec<&CachePolicy> = others.iter().copied().chain([policy]).collect();
        for judgement in judgements(workload, &all) {
            let Err(refusal) = &judgement.accepted else { continue };
            let warning = if Some(&judgement.policy) == policy.metadata.name.as_ref() {
                format!("has no effect as long as this holds: {refusal}")
            } else if before.iter().any(|earlier| earlier.policy == judgement.policy && earlier.accepted.is_ok()) {
                format!("CachePolicy {} loses its effect by this: {refusal}", judgement.policy)
            } else {
                continue;
            };
            if !told.contains(&warning) {
                told.push(warning);
            }
        }
    }
    told
}

/// Whether what they name is there is not asked: it may come with them.
fn judgements(workload: &Workload, policies: &[&CachePolicy]) -> Vec<Judgement> {
    let namespace = Namespace { taken: slots::taken(policies), ..Namespace::default() };
    merge(workload, policies, &namespace, 0).map(|outcome| outcome.judgements).unwrap_or_default()
}

/// Pods that the policy selects, one kind for each set of policies that they may follow.
fn workloads(policy: &CachePolicy, others: &[&CachePolicy]) -> Vec<Workload> {
    let own = &policy.spec.workloads.match_labels;
    let with_others = others.iter().filter_map(|other| together(own, &other.spec.workloads.match_labels));
    let mut followed_before = BTreeSet::new();
    let mut workloads = Vec::new();
    for labels in [own.clone()].into_iter().chain(with_others) {
        let workload = pods_with(policy, labels);
        let followed: Vec<Option<&String>> =
            others.iter().filter(|other| workload.follows(other)).map(|other| other.metadata.name.as_ref()).collect();
        if followed_before.insert(followed) && workloads.len() < MOST_WORKLOADS {
            workloads.push(workload);
        }
    }
    workloads
}

/// All of these labels, unless they contradict each other.
fn together(these: &Labels, those: &Labels) -> Option<Labels> {
    let agree = those.iter().all(|(name, value)| these.get(name).is_none_or(|own| own == value));
    agree.then(|| these.iter().chain(those).map(|(name, value)| (name.clone(), value.clone())).collect())
}

fn pods_with(policy: &CachePolicy, labels: Labels) -> Workload {
    let shown: Vec<String> = labels.iter().map(|(name, value)| format!("{name}={value}")).collect();
    Workload {
        namespace: policy.metadata.namespace.clone().unwrap_or_default(),
        api_version: "v1".to_owned(),
        kind: "pods with".to_owned(),
        name: shown.join(","),
        uid: String::new(),
        labels,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn policy(name: &str, day: u8, labels: &Value, cluster: &str, keys: &str) -> CachePolicy {
        serde_json::from_value(json!({
            "apiVersion": "larder.dev/v1alpha1", "kind": "CachePolicy",
            "metadata": {"name": name, "namespace": "shop", "creationTimestamp": format!("2026-01-{day:02}T00:00:00Z")},
            "spec": {
                "cacheCluster": cluster, "workloads": {"matchLabels": labels},
                "rules": [{"name": "r", "keys": keys, "strategy": "CacheAside"}],
            },
        }))
        .unwrap()
    }

    #[track_caller]
    fn told(policy: &CachePolicy, others: &[CachePolicy], parts: &[&str]) {
        let said = advise(policy, others, || true);
        assert_eq!(said.len(), usize::from(!parts.is_empty()), "{said:?}");
        for part in parts {
            assert!(said[0].contains(part), "{part}: {said:?}");
        }
    }

    #[test]
    fn what_has_no_effect_beside_others_is_told() {
        let shop = json!({"app": "shop"});
        let old = [policy("old", 1, &shop, "main", "user:{id}")];
        told(&policy("beside", 2, &shop, "main", "cart:{id}"), &old, &[]);
        let wide = policy("wide", 2, &shop, "main", "{kind}:7");
        told(&wide, &old, &["has no effect as long as", "CachePolicy `old`", "for pods with app=shop", "`user:7`"]);
        told(&policy("elsewhere", 2, &shop, "other", "cart:{id}"), &old, &["names the CacheCluster `main`"]);
        told(&policy("strangers", 2, &json!({"app": "cart"}), "other", "user:{id}"), &old, &[]);
    }

    #[test]
    fn pods_that_several_policies_may_select_are_thought_of() {
        let old = [policy("old", 1, &json!({"app": "shop"}), "main", "user:{id}")];
        let tier = policy("tier", 2, &json!({"tier": "web"}), "main", "user:{id}");
        told(&tier, &old, &["for pods with app=shop,tier=web"]);
        let narrow = policy("narrow", 2, &json!({"app": "shop", "tier": "web"}), "other", "x:{id}");
        told(&narrow, &old, &["pods with app=shop,tier=web follows", "names the CacheCluster `main`"]);
    }

    #[test]
    fn an_older_policy_that_changes_may_take_from_a_younger() {
        let shop = json!({"app": "shop"});
        let young = [policy("young", 9, &shop, "main", "user:{id}")];
        told(&policy("old", 1, &shop, "main", "{kind}:{id}"), &young, &["CachePolicy young loses its effect", "`old`"]);
        // It is compared with others, not with what it was.
        let before = [policy("old", 1, &shop, "main", "user:{id}")];
        told(&policy("old", 1, &shop, "main", "{kind}:{id}"), &before, &[]);
        told(&policy("broken", 1, &shop, "main", "{id}{x}"), &[], &["spec.rules[0].keys"]);
    }

    #[test]
    fn many_policies_are_judged_within_bounds() {
        let others: Vec<CachePolicy> = (0..100)
            .map(|index| policy(&format!("p{index}"), 1, &json!({format!("l{index}"): "x"}), "main", &format!("k{index}:{{id}}")))
            .collect();
        let policy = policy("one", 2, &json!({"app": "shop"}), "main", "user:{id}");
        let kinds = std::cell::Cell::new(0);
        let count = || {
            kinds.set(kinds.get() + 1);
            kinds.get() < 4
        };
        assert_eq!((advise(&policy, &others, count), kinds.get()), (vec![], 4), "there are more, and time was up");
        let others: Vec<&CachePolicy> = others.iter().collect();
        assert_eq!(workloads(&policy, &others).len(), MOST_WORKLOADS);
    }
}
