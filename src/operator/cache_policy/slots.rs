//! Which policies name a replication slot that another has. Pure.
//!
//! A slot has one reader, and moves for that one alone: of two policies by one slot each would pass over what the other was told. So they are
//! two where the database is one, and where the cache is one, which keeps by the slot's name who reads it and how far that is.

use std::collections::{BTreeMap, BTreeSet};

use crate::api::cache_policy::{ChangesSpec, OriginSpec, PolicyMode, RuleSpec};
use crate::api::compile::in_order;
use crate::api::{CachePolicy, SensitiveSource};

/// A slot that a policy names and an older one has.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "the slot `{slot}` of the origin `{origin}` is that of the CachePolicy `{winner}`, which is older, and a slot has one reader: name another in \
     sql.changes.slot, or leave it out"
)]
pub struct SlotTaken {
    /// The slot.
    pub slot: String,
    /// The origin whose changes would be read by it.
    pub origin: String,
    /// The policy that has it.
    pub winner: String,
}

/// A slot that a policy names for an origin that its rules follow.
struct Named<'a> {
    slot: &'a str,
    origin: &'a OriginSpec,
    cluster: &'a str,
}

impl Named<'_> {
    fn url(&self) -> Option<&SensitiveSource> {
        self.origin.sql.as_ref().map(|access| &access.url)
    }

    fn clashes_with(&self, other: &Self) -> bool {
        self.slot == other.slot && (self.cluster == other.cluster || self.url() == other.url())
    }
}

/// Of these policies of one namespace, those that name a slot which an older one has, by their names. Who is refused has none.
pub fn taken(policies: &[&CachePolicy]) -> BTreeMap<String, SlotTaken> {
    let mut refused = BTreeMap::new();
    let mut all: Vec<(String, Named<'_>)> = Vec::new();
    for policy in in_order(policies) {
        let name = policy.metadata.name.clone().unwrap_or_default();
        let own = named(policy);
        let clash = own.iter().find_map(|own| Some((own, all.iter().find(|(_, theirs)| own.clashes_with(theirs))?)));
        if let Some((own, (winner, _))) = clash {
            let taken = SlotTaken { slot: own.slot.to_owned(), origin: own.origin.name.clone(), winner: winner.clone() };
            refused.insert(name, taken);
        } else {
            all.extend(own.into_iter().map(|own| (name.clone(), own)));
        }
    }
    refused
}

/// The slots that a policy names. One that only observes follows nothing.
fn named<'a>(policy: &'a CachePolicy) -> Vec<Named<'a>> {
    if policy.spec.mode == Some(PolicyMode::Observe) {
        return Vec::new();
    }
    let of_rule = |rule: &RuleSpec| -> Vec<String> {
        let own = rule.origin.as_ref().map(|origin| origin.name.clone());
        let of_change = |changes: &ChangesSpec| changes.origin.clone().or_else(|| own.clone());
        rule.invalidate.iter().flat_map(|invalidate| &invalidate.changes).filter_map(of_change).collect()
    };
    let followed: BTreeSet<String> = policy.spec.rules.iter().flat_map(of_rule).collect();
    let origins = policy.spec.origins.iter().filter(|origin| followed.contains(&origin.name));
    let named = |origin: &'a OriginSpec| Some(Named { slot: slot_of(origin)?, origin, cluster: &policy.spec.cache_cluster });
    origins.filter_map(named).collect()
}

fn slot_of(origin: &OriginSpec) -> Option<&str> {
    origin.sql.as_ref()?.changes.as_ref()?.slot.as_deref()
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn policy(name: &str, day: u8, cluster: &str, secret: &str, changes: &Value) -> CachePolicy {
        let url = json!({"secretKeyRef": {"name": secret, "key": "url"}});
        serde_json::from_value(json!({
            "apiVersion": "larder.dev/v1alpha1", "kind": "CachePolicy",
            "metadata": {"name": name, "namespace": "store", "creationTimestamp": format!("2026-01-{day:02}T00:00:00Z")},
            "spec": {
                "cacheCluster": cluster, "workloads": {"matchLabels": {"app": name}},
                "origins": [{"name": "db", "sql": {"url": url, "changes": changes}}],
                "rules": [{"name": "user", "keys": "user:{id}", "strategy": "CacheAside",
                    "invalidate": {"changes": [{"table": "users", "origin": "db"}]}}],
            },
        }))
        .unwrap()
    }

    #[track_caller]
    fn check(policies: &[&CachePolicy], refused: &[(&str, &str)]) {
        let taken = taken(policies);
        let told: Vec<(&str, &str)> = taken.iter().map(|(name, taken)| (name.as_str(), taken.winner.as_str())).collect();
        assert_eq!(told, refused);
    }

    #[test]
    fn the_younger_of_two_policies_with_one_slot_is_refused() {
        let slot = &json!({"slot": "cache"});
        let old = policy("old", 1, "main", "db", slot);
        check(&[&policy("young", 2, "main", "db", slot), &old], &[("young", "old")]);
        check(&[&policy("young", 2, "other", "db", slot), &old], &[("young", "old")]);
        check(&[&policy("young", 2, "main", "elsewhere", slot), &old], &[("young", "old")]);
        // Another database and another cache, and another slot.
        check(&[&policy("young", 2, "other", "elsewhere", slot), &old], &[]);
        check(&[&policy("young", 2, "main", "db", &json!({"slot": "mine"})), &old], &[]);
        check(&[&policy("young", 2, "main", "db", &json!({})), &policy("old", 1, "main", "db", &json!({}))], &[]);
        // Who is refused takes nothing from others.
        let mut middle = policy("middle", 2, "main", "db", slot);
        middle.spec.origins.push(policy("x", 2, "main", "db", &json!({"slot": "second"})).spec.origins.remove(0));
        middle.spec.origins[1].name = "second".to_owned();
        middle.spec.rules[0]
            .invalidate
            .as_mut()
            .unwrap()
            .changes
            .push(serde_json::from_value(json!({"table": "users", "origin": "second"})).unwrap());
        let young = policy("young", 3, "main", "db", &json!({"slot": "second"}));
        check(&[&young, &middle], &[("young", "middle")]);
        check(&[&young, &middle, &old], &[("middle", "old")]);
        let text = taken(&[&middle, &old])["middle"].to_string();
        assert!(text.contains("`cache` of the origin `db`") && text.contains("CachePolicy `old`"), "{text}");
    }

    #[test]
    fn who_follows_nothing_needs_no_slot() {
        let slot = &json!({"slot": "cache"});
        let (old, mut observing) = (policy("old", 1, "main", "db", slot), policy("a", 2, "main", "db", slot));
        observing.spec.mode = Some(PolicyMode::Observe);
        let mut idle = policy("b", 3, "main", "db", slot);
        idle.spec.rules[0].invalidate = None;
        check(&[&observing, &idle, &old], &[]);
    }
}
