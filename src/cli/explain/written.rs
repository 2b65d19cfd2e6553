//! What the policies of a workload say of a key, as they are written: merged as the operator merges them. Pure.

use std::collections::BTreeMap;

use crate::api::CachePolicy;
use crate::api::cache_policy::OriginSpec;
use crate::operator::cache_policy::merge::{Namespace, merge};
use crate::operator::cache_policy::origins::KnownSecrets;
use crate::operator::cache_policy::place::Place;
use crate::operator::cache_policy::slots;
use crate::operator::cache_policy::verdict::Judgement;
use crate::operator::cache_policy::workload::Workload;
use crate::policy::RuleIndex;
use crate::policy::explain::{KeyFacts, explain};
use crate::policy::snapshot::Topology;

/// The label by which all policies of some files are about one workload.
const ANY: &str = "larder.dev/explained";

/// What policies say, as they are written.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Written {
    /// What they say of the key. `None`: no policy is about the workload, or none can take effect.
    pub facts: Option<KeyFacts>,
    /// The policies that are about the workload and have no part in that, each with the reason.
    pub refused: Vec<(String, String)>,
}

/// What the policies of a workload say of a key.
pub fn written(workload: &Workload, policies: &[CachePolicy], key: &[u8]) -> Written {
    let policies: Vec<&CachePolicy> = policies.iter().collect();
    let Some(outcome) = merge(workload, &policies, &with_stand_ins(&policies), 0) else { return Written::default() };
    let refusal = |judgement: Judgement| {
        let why = judgement.accepted.err()?;
        Some((judgement.policy, format!("{}: {why}", why.reason())))
    };
    let refused = outcome.judgements.into_iter().filter_map(refusal).collect();
    let facts = outcome.merged.and_then(|merged| merged.snapshot).map(|snapshot| {
        let position = RuleIndex::new(snapshot.patterns().cloned()).find(key);
        KeyFacts { generation: None, ..explain(&snapshot, position, key) }
    });
    Written { facts, refused }
}

/// The same of policies that are known from files alone: all of them are taken to be about the workload.
pub fn written_in_files(namespace: &str, policies: &[CachePolicy], key: &[u8]) -> Written {
    let labels = BTreeMap::from([(ANY.to_owned(), "true".to_owned())]);
    let about_it: Vec<CachePolicy> = policies
        .iter()
        .map(|policy| {
            let mut policy = policy.clone();
            policy.spec.workloads.match_labels = labels.clone();
            policy
        })
        .collect();
    written(&workload("Workload", "of these files", "", namespace, labels), &about_it, key)
}

/// A workload of a namespace, with the labels of its pods.
pub fn workload(kind: &str, name: &str, api_version: &str, namespace: &str, labels: BTreeMap<String, String>) -> Workload {
    Workload {
        namespace: namespace.to_owned(),
        api_version: api_version.to_owned(),
        kind: kind.to_owned(),
        name: name.to_owned(),
        uid: String::new(),
        labels,
    }
}

/// The policy that a rule of a snapshot comes from, by its name and its pattern.
pub fn policy_of(policies: &[CachePolicy], facts: &KeyFacts) -> Option<String> {
    let (rule, pattern) = (facts.rule.as_deref()?, facts.pattern.as_ref()?);
    let from = |policy: &&CachePolicy| {
        let prefixed = rule.strip_prefix(policy.metadata.name.as_deref().unwrap_or_default());
        let prefixed = prefixed.and_then(|rest| rest.strip_prefix('/'));
        policy
            .spec
            .rules
            .iter()
            .any(|spec| (spec.name == rule || Some(spec.name.as_str()) == prefixed) && spec.keys == pattern.as_str())
    };
    policies.iter().find(from).and_then(|policy| policy.metadata.name.clone())
}

/// A namespace in which all is there that the policies name: what a rule says of a key does not depend on it.
fn with_stand_ins(policies: &[&CachePolicy]) -> Namespace {
    let somewhere = || Place {
        topology: Topology::Sentinel { master: "main".to_owned(), sentinels: vec!["localhost:26379".to_owned()] },
        tls: false,
        keeping: None,
    };
    let clusters = policies.iter().map(|policy| (policy.spec.cache_cluster.clone(), Some(somewhere()))).collect();
    let mut secrets: BTreeMap<String, BTreeMap<String, Vec<u8>>> = BTreeMap::new();
    for OriginSpec { sql, http, .. } in policies.iter().flat_map(|policy| &policy.spec.origins) {
        for (access, url) in [(sql, "postgres://localhost/db"), (http, "http://localhost")] {
            let reference = access.as_ref().and_then(|access| access.url.secret_key_ref.as_ref());
            if let Some(reference) = reference {
                secrets.entry(reference.name.clone()).or_default().insert(reference.key.clone(), url.into());
            }
        }
    }
    Namespace { clusters, secrets: KnownSecrets(secrets), taken: slots::taken(policies), ..Namespace::default() }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::api::Manifests;

    fn policies(text: &str) -> Vec<CachePolicy> {
        let manifests = Manifests::parse(Path::new("a.yaml"), text).expect("valid");
        manifests.policies.into_iter().map(|located| located.object).collect()
    }

    const SHOP: &str = "apiVersion: larder.dev/v1alpha1\nkind: CachePolicy\nmetadata: {name: shop}\nspec:\n  cacheCluster: main\n  \
        workloads: {matchLabels: {app: shop}}\n  origins:\n    - {name: db, sql: {url: {secretKeyRef: {name: db, key: url}}}}\n  rules:\n    \
        - {name: user, keys: 'user:{id}', strategy: ReadThrough, ttl: 10m, origin: {name: db, read: 'SELECT name FROM users WHERE id = $id'}}\n";
    const CARTS: &str = "apiVersion: larder.dev/v1alpha1\nkind: CachePolicy\nmetadata: {name: carts}\nspec:\n  cacheCluster: main\n  \
        workloads: {matchLabels: {app: shop}}\n  rules:\n    - {name: user, keys: 'cart:{id}', strategy: CacheAside}\n";

    fn shop(labels: &[(&str, &str)]) -> Workload {
        let labels = labels.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
        workload("Deployment", "shop", "apps/v1", "default", labels)
    }

    #[test]
    fn the_rule_and_its_policy_are_found_without_the_secret() {
        let policies = policies(&format!("{SHOP}---\n{CARTS}"));
        let told = written(&shop(&[("app", "shop")]), &policies, b"user:42");
        assert_eq!(told.refused, []);
        let facts = told.facts.expect("facts");
        assert_eq!((facts.strategy.as_str(), facts.generation), ("ReadThrough", None));
        assert_eq!(policy_of(&policies, &facts).as_deref(), Some("shop"));
        // The same name in two policies: the later one's is written with its policy.
        let facts = written(&shop(&[("app", "shop")]), &policies, b"cart:7").facts.expect("facts");
        assert_eq!(policy_of(&policies, &facts).as_deref(), Some("carts"), "{facts:?}");
        let facts = written(&shop(&[("app", "shop")]), &policies, b"other").facts.expect("facts");
        assert_eq!((policy_of(&policies, &facts), facts.strategy.as_str()), (None, "Bypass"));
    }

    #[test]
    fn a_workload_that_no_policy_selects_has_none() {
        assert_eq!(written(&shop(&[("app", "other")]), &policies(SHOP), b"user:42"), Written::default());
        assert!(written_in_files("default", &policies(SHOP), b"user:42").facts.is_some());
    }

    #[test]
    fn what_overlaps_is_refused_with_the_winner() {
        let rival = SHOP.replace("name: shop}\nspec", "name: zeta}\nspec").replace("user:{id}", "user:{number}");
        let told = written_in_files("default", &policies(&format!("{SHOP}---\n{rival}")), b"user:42");
        let [(policy, why)] = told.refused.as_slice() else { panic!("{told:?}") };
        assert!(policy == "zeta" && why.starts_with("Overlap: ") && why.contains("`shop`"), "{told:?}");
        assert_eq!(told.facts.and_then(|facts| facts.rule).as_deref(), Some("user"));
    }
}
