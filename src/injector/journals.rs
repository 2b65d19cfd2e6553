//! Policies that write behind, and the CacheClusters that keep their journals: what is refused of one for the sake of the other.
//!
//! Whether a CacheCluster can carry a journal is judged as everywhere ([`unfit_for_journals`]), and told in the operator's words. What was
//! unfit before is let be, and so is all that changes nothing of it: the operator's own writes get through, and a person's repair. Writes that
//! lie in a journal are not to lie less safely in any case.

use crate::api::cache_cluster::Keeping;
use crate::api::cache_policy::{PolicyMode, RuleSpec, StrategyKind};
use crate::api::compile::unfit_for_journals;
use crate::api::{CacheCluster, CachePolicy};
use crate::operator::cache_policy::relay::writes_behind;
use crate::operator::cache_policy::verdict::{ACCEPTED, Refusal, first_of};

/// What is to become of an object.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// It is taken.
    Taken,
    /// It is taken, and whoever writes it should know this.
    Doubted(String),
    /// It is refused, for this reason.
    Refused(String),
}

/// Judges a policy that is written, by what it was before, and by the CacheCluster that it names, where there is one.
pub fn judge_policy(old: Option<&CachePolicy>, new: &CachePolicy, cluster: Option<&CacheCluster>) -> Verdict {
    let is_new = |rule: &RuleSpec| !old.is_some_and(|old| wrote_behind(old, new, rule));
    let adds = new.spec.rules.iter().any(|rule| rule.strategy == StrategyKind::WriteBehind && is_new(rule));
    if !adds || new.metadata.deletion_timestamp.is_some() {
        return Verdict::Taken;
    }
    let Some(cluster) = cluster else {
        return Verdict::Doubted(format!(
            "there is no CacheCluster `{}` yet that could keep its journal: write storage.fsync: Always there, and leave eviction at \
             volatile-lfu",
            new.spec.cache_cluster
        ));
    };
    let problems = unfit_for_journals(new, cluster.spec.keeping(), is_new);
    if problems.0.is_empty() { Verdict::Taken } else { Verdict::Refused(first_of(&problems)) }
}

/// Whether a rule was one that writes behind before, to the same CacheCluster. A rule may change its name, or its keys. What only observed
/// wrote nothing.
fn wrote_behind(old: &CachePolicy, new: &CachePolicy, rule: &RuleSpec) -> bool {
    let observes = |policy: &CachePolicy| policy.spec.mode == Some(PolicyMode::Observe);
    let mut rules = old.spec.rules.iter().filter(|earlier| earlier.strategy == StrategyKind::WriteBehind);
    old.spec.cache_cluster == new.spec.cache_cluster
        && (observes(new) || !observes(old))
        && rules.any(|earlier| earlier.name == rule.name || earlier.keys == rule.keys)
}

/// Judges a CacheCluster that is written, by what it was before, and by the policies of its namespace. A new one is never refused: its
/// policies have no effect yet.
pub fn judge_cluster(old: Option<&CacheCluster>, new: &CacheCluster, policies: &[CachePolicy]) -> Verdict {
    let keeping = new.spec.keeping();
    let before = old.map(|old| old.spec.keeping());
    if before == Some(keeping) || new.metadata.deletion_timestamp.is_some() {
        return Verdict::Taken;
    }
    let is_about = |policy: &&CachePolicy| Some(&policy.spec.cache_cluster) == new.metadata.name.as_ref();
    let mut hurt: Vec<&CachePolicy> =
        policies.iter().filter(is_about).filter(|policy| has_a_part(policy) && is_hurt(policy, before, keeping)).collect();
    hurt.sort_by_key(|policy| &policy.metadata.name);
    let Some(first) = hurt.first() else { return Verdict::Taken };
    let others = if hurt.len() == 1 { String::new() } else { format!(" (and of {} more)", hurt.len() - 1) };
    let name = first.metadata.name.as_deref().unwrap_or_default();
    let problems = unfit_for_journals(first, keeping, |_| true);
    let why = first_of(&problems);
    if old.is_none() {
        Verdict::Doubted(format!("the CachePolicy `{name}`{others} has no effect with this: {why}"))
    } else if problems.0.is_empty() {
        Verdict::Refused(format!(
            "this takes away what the journal of the CachePolicy `{name}`{others} needs: it holds writes that no origin has yet, though no rule \
             writes behind any more; wait until it is drained, dead letters among them"
        ))
    } else {
        Verdict::Refused(format!(
            "this takes away what the journal of the CachePolicy `{name}`{others} needs, as it would say itself: {why}; or first, by itself, \
             apply the policy with another strategy, or delete it, and wait until it is drained"
        ))
    }
}

/// Whether the journal of a policy could be kept before, and could not now. What lies in one already is not to lie less safely than it did,
/// whatever its rules say by now.
fn is_hurt(policy: &CachePolicy, before: Option<Keeping>, keeping: Keeping) -> bool {
    let fits = |keeping| unfit_for_journals(policy, keeping, |_| true).0.is_empty();
    match before {
        Some(before) if holds_writes(policy) => is_less_safe(keeping, before),
        _ => before.is_none_or(fits) && !fits(keeping),
    }
}

/// Whether a journal lacks something with the one that it did not lack with the other.
fn is_less_safe(keeping: Keeping, before: Keeping) -> bool {
    // In memory only, on disk later, on disk at once.
    let disk = |keeping: Keeping| (keeping.fsync.is_some(), keeping.is_durable());
    disk(keeping) < disk(before) || keeping.eviction.drops_any_key() && !before.eviction.drops_any_key()
}

/// Whether a policy writes behind, may come to, or has writes that no origin has yet: not where it only observes, or is refused for what it
/// says itself, and nothing of it is left in a journal.
fn has_a_part(policy: &CachePolicy) -> bool {
    holds_writes(policy) || writes_behind(policy) && !is_refused(policy)
}

/// Whether a policy is refused for what it says itself, as it is now.
fn is_refused(policy: &CachePolicy) -> bool {
    let Some(status) = &policy.status else { return false };
    let is_up_to_date = status.observed_generation == policy.metadata.generation;
    let mut refusals = status.conditions.iter().filter(|condition| condition.type_ == ACCEPTED && condition.status == "False");
    is_up_to_date && refusals.any(|condition| condition.reason == Refusal::INVALID)
}

/// Whether a policy's journal was seen to hold writes that no origin has, dead letters among them.
fn holds_writes(policy: &CachePolicy) -> bool {
    let journal = policy.status.as_ref().and_then(|status| status.journal.as_ref());
    journal.is_some_and(|journal| journal.depth > 0 || journal.dead_letters > 0)
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    const ALWAYS: &str = "Always";

    fn cluster(fsync: &str, eviction: &str) -> CacheCluster {
        let mut object = json!({
            "apiVersion": "larder.dev/v1alpha1", "kind": "CacheCluster", "metadata": {"name": "main", "namespace": "shop"},
            "spec": {
                "engine": {"kind": "Valkey", "version": "8.1"}, "mode": "Sentinel", "memory": "256Mi", "eviction": eviction,
                "storage": {"size": "1Gi", "fsync": fsync},
            },
        });
        if fsync.is_empty() {
            object["spec"].as_object_mut().unwrap().remove("storage");
        }
        serde_json::from_value(object).unwrap()
    }

    fn fit() -> CacheCluster {
        cluster(ALWAYS, "volatile-lfu")
    }

    fn unfit() -> CacheCluster {
        cluster("EverySecond", "volatile-lfu")
    }

    /// With a rule for each of these names and strategies.
    fn policy(name: &str, rules: &[(&str, &str)]) -> CachePolicy {
        let rules: Vec<Value> = rules
            .iter()
            .map(|(name, strategy)| json!({"name": name, "keys": format!("{name}:{{id}}"), "strategy": strategy}))
            .collect();
        serde_json::from_value(json!({
            "apiVersion": "larder.dev/v1alpha1", "kind": "CachePolicy",
            "metadata": {"name": name, "namespace": "shop", "generation": 1},
            "spec": {"cacheCluster": "main", "workloads": {"matchLabels": {"app": "shop"}}, "rules": rules},
        }))
        .unwrap()
    }

    fn behind() -> CachePolicy {
        policy("users", &[("other", "CacheAside"), ("user", "WriteBehind")])
    }

    fn observing() -> CachePolicy {
        let mut policy = behind();
        policy.spec.mode = Some(PolicyMode::Observe);
        policy
    }

    /// Whose journal holds so many writes and dead letters.
    fn holding(policy: CachePolicy, depth: u64, dead: u64) -> CachePolicy {
        let journal = json!({"depth": depth, "bytes": 0, "lagSeconds": 0, "deadLetters": dead});
        let status = serde_json::from_value(json!({"observedGeneration": 1, "conditions": [], "journal": journal})).unwrap();
        CachePolicy { status: Some(status), ..policy }
    }

    #[track_caller]
    fn refused(verdict: &Verdict, parts: &[&str]) {
        let Verdict::Refused(why) = verdict else { panic!("{verdict:?}") };
        assert!(parts.iter().all(|part| why.contains(part)), "{why}");
    }

    #[test]
    fn a_rule_that_writes_behind_needs_a_cluster_that_can_carry_its_journal() {
        assert_eq!(judge_policy(None, &behind(), Some(&fit())), Verdict::Taken);
        for (fsync, eviction, part) in [
            ("EverySecond", "volatile-lfu", "reach the disk after they are acknowledged"),
            ("", "volatile-lfu", "in memory only"),
            (ALWAYS, "allkeys-lru", "writes that no origin has yet; write eviction: volatile-lfu there"),
            ("", "allkeys-lru", "(and 1 more)"),
        ] {
            let verdict = judge_policy(None, &behind(), Some(&cluster(fsync, eviction)));
            refused(&verdict, &["spec.rules[1].strategy: the CacheCluster", part]);
        }
        for strategy in ["CacheAside", "ReadThrough", "WriteThrough", "Bypass"] {
            let other = policy("users", &[("user", strategy)]);
            assert_eq!(judge_policy(None, &other, Some(&cluster("", "allkeys-lru"))), Verdict::Taken, "{strategy}");
        }
    }

    #[test]
    fn where_there_is_no_cluster_yet_it_may_come_later() {
        let verdict = judge_policy(None, &behind(), None);
        assert!(matches!(&verdict, Verdict::Doubted(why) if why.contains("no CacheCluster `main` yet")), "{verdict:?}");
        assert_eq!(judge_policy(None, &policy("users", &[("user", "ReadThrough")]), None), Verdict::Taken);
        assert_eq!(judge_policy(Some(&behind()), &behind(), None), Verdict::Taken, "as the operator writes its finalizer");
    }

    #[test]
    fn what_was_unfit_before_can_be_changed_in_other_respects() {
        let (old, unfit) = (behind(), unfit());
        let updated = |change: &dyn Fn(&mut CachePolicy)| {
            let mut new = old.clone();
            change(&mut new);
            judge_policy(Some(&old), &new, Some(&unfit))
        };
        let let_be: [&dyn Fn(&mut CachePolicy); 6] = [
            &|_| (),
            &|new| new.metadata.finalizers = Some(vec!["larder.dev/journal".to_owned()]),
            &|new| new.spec.rules[1].name = "renamed".to_owned(),
            &|new| new.spec.rules[1].keys = "person:{id}".to_owned(),
            &|new| drop(new.spec.rules.remove(1)),
            &|new| new.spec.rules[1].strategy = StrategyKind::WriteThrough,
        ];
        for (number, change) in let_be.iter().enumerate() {
            assert_eq!(updated(change), Verdict::Taken, "{number}");
        }
        let more = updated(&|new| {
            let second = RuleSpec { name: "cart".to_owned(), keys: "cart:{id}".to_owned(), ..new.spec.rules[1].clone() };
            new.spec.rules.push(second);
        });
        refused(&more, &["spec.rules[2].strategy"]);
        refused(&updated(&|new| new.spec.rules[0].strategy = StrategyKind::WriteBehind), &["spec.rules[0].strategy"]);
        // To another CacheCluster all of it is new.
        let mut elsewhere = old.clone();
        elsewhere.spec.cache_cluster = "other".to_owned();
        refused(&judge_policy(Some(&elsewhere), &old, Some(&unfit)), &["spec.rules[1].strategy"]);
        let goes = updated(&|new| {
            new.spec.rules[0].strategy = StrategyKind::WriteBehind;
            new.metadata.deletion_timestamp = serde_json::from_value(json!("2026-01-01T00:00:00Z")).unwrap();
        });
        assert_eq!(goes, Verdict::Taken);
    }

    #[test]
    fn what_only_observes_has_no_journal() {
        assert_eq!(judge_cluster(Some(&fit()), &unfit(), &[observing()]), Verdict::Taken);
        for (depth, dead) in [(7, 0), (0, 1)] {
            let earlier = holding(observing(), depth, dead);
            refused(&judge_cluster(Some(&fit()), &unfit(), &[earlier]), &["`users`", "reach the disk after"]);
        }
        for (old, new) in [(observing(), observing()), (behind(), observing())] {
            assert_eq!(judge_policy(Some(&old), &new, Some(&unfit())), Verdict::Taken);
        }
        // From now on it would write.
        refused(&judge_policy(Some(&observing()), &behind(), Some(&unfit())), &["spec.rules[1].strategy"]);
        assert_eq!(judge_policy(Some(&observing()), &behind(), Some(&fit())), Verdict::Taken);
    }

    #[test]
    fn a_cluster_keeps_what_its_policies_write_behind_by() {
        let policies = [policy("aside", &[("user", "CacheAside")]), behind(), policy("later", &[("cart", "WriteBehind")])];
        for (fsync, eviction) in [("EverySecond", "volatile-lfu"), ("", "volatile-lfu"), (ALWAYS, "allkeys-lfu")] {
            let verdict = judge_cluster(Some(&fit()), &cluster(fsync, eviction), &policies);
            refused(
                &verdict,
                &[
                    "the CachePolicy `later` (and of 1 more)",
                    "spec.rules[0].strategy: the CacheCluster",
                    "or first, by itself, apply the policy with another strategy, or delete it, and wait until it is drained",
                ],
            );
            let verdict = judge_cluster(None, &cluster(fsync, eviction), &policies);
            assert!(matches!(&verdict, Verdict::Doubted(why) if why.contains("`later`")), "{verdict:?}");
        }
        assert_eq!(judge_cluster(Some(&fit()), &cluster(ALWAYS, "noeviction"), &policies), Verdict::Taken);
        assert_eq!(judge_cluster(Some(&fit()), &unfit(), &policies[..1]), Verdict::Taken);
        let mut elsewhere = behind();
        elsewhere.spec.cache_cluster = "other".to_owned();
        assert_eq!(judge_cluster(Some(&fit()), &unfit(), &[elsewhere]), Verdict::Taken);
    }

    #[test]
    fn a_cluster_that_was_unfit_can_be_changed_and_mended() {
        let policies = [behind()];
        let mut labelled = unfit();
        labelled.metadata.labels = Some([("a".to_owned(), "b".to_owned())].into());
        labelled.spec.replicas = Some(2);
        assert_eq!(judge_cluster(Some(&unfit()), &labelled, &policies), Verdict::Taken);
        assert_eq!(judge_cluster(Some(&unfit()), &fit(), &policies), Verdict::Taken);
        // Its policies have no part as it is: nothing is taken from them.
        assert_eq!(judge_cluster(Some(&unfit()), &cluster(ALWAYS, "allkeys-lru"), &policies), Verdict::Taken);
        let mut goes = unfit();
        goes.metadata.deletion_timestamp = serde_json::from_value(json!("2026-01-01T00:00:00Z")).unwrap();
        assert_eq!(judge_cluster(Some(&fit()), &goes, &policies), Verdict::Taken);
    }

    /// Whatever was unfit before.
    #[test]
    fn writes_in_a_journal_do_not_come_to_lie_less_safely() {
        let shapes =
            [("", "volatile-lfu"), ("EverySecond", "volatile-lfu"), (ALWAYS, "volatile-lfu"), ("EverySecond", "allkeys-lfu")];
        let judged = |old: usize, new: usize, policy: &CachePolicy| {
            let [old, new] = [old, new].map(|at| cluster(shapes[at].0, shapes[at].1));
            judge_cluster(Some(&old), &new, std::slice::from_ref(policy))
        };
        // Of the one that has no such rule any more it is told what there is to wait for.
        let turned = holding(policy("users", &[("user", "WriteThrough")]), 7, 0);
        for policy in [&holding(behind(), 7, 0), &holding(behind(), 0, 1), &turned] {
            for (old, new) in [(2, 0), (2, 1), (2, 3), (1, 0), (1, 3), (0, 3)] {
                refused(&judged(old, new, policy), &["the CachePolicy `users`", "until it is drained"]);
            }
            for (old, new) in [(0, 1), (0, 2), (1, 2), (3, 1), (3, 2)] {
                assert_eq!(judged(old, new, policy), Verdict::Taken, "{old} {new}");
            }
        }
        refused(&judged(2, 1, &turned), &["no rule writes behind any more"]);
        for drained in [behind(), holding(behind(), 0, 0)] {
            assert_eq!(judged(1, 0, &drained), Verdict::Taken);
        }
        assert_eq!(judged(2, 1, &holding(policy("users", &[("user", "WriteThrough")]), 0, 0)), Verdict::Taken);
    }

    #[test]
    fn policies_that_are_refused_for_themselves_hold_up_nothing() {
        let judged = |generation: i64, reason: &str, depth: u64| {
            let mut policy = behind();
            policy.status = serde_json::from_value(json!({
                "observedGeneration": generation,
                "conditions": [{
                    "type": "Accepted", "status": "False", "reason": reason, "message": "", "lastTransitionTime": "2026-01-01T00:00:00Z",
                }],
                "journal": {"depth": depth, "bytes": 0, "lagSeconds": 0, "deadLetters": 0},
            }))
            .unwrap();
            judge_cluster(Some(&fit()), &unfit(), &[policy])
        };
        assert_eq!(judged(1, "InvalidSpec", 0), Verdict::Taken);
        for (generation, reason, depth) in [(1, "InvalidSpec", 7), (0, "InvalidSpec", 0), (1, "Overlap", 0)] {
            refused(&judged(generation, reason, depth), &["`users`"]);
        }
        let mut draining = behind();
        draining.metadata.deletion_timestamp = serde_json::from_value(json!("2026-01-01T00:00:00Z")).unwrap();
        refused(&judge_cluster(Some(&fit()), &unfit(), &[draining]), &["`users`"]);
    }
}
