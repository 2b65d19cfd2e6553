//! The journals of rules that write behind, and what they demand of the CacheCluster that keeps them.

use super::{Source, policy_ref, split_remedy};
use crate::api::CachePolicy;
use crate::api::cache_cluster::Keeping;
use crate::api::cache_policy::{RuleSpec, StrategyKind};
use crate::api::path::{FieldPath, at};
use crate::api::problem::{Problem, Problems};
use crate::policy::snapshot::LEAST_BYTES;
use crate::policy::{ByteSize, Journal, JournalName, JournalNameError, Overflow, Span};

/// How old a write may become before its origin has it.
pub const DEFAULT_MAX_LAG: Span = Span::from_secs(5 * 60);
/// The most writes in one transaction: so many take a tenth of a second at a database near by, far below the usual timeout.
pub const DEFAULT_BATCH: u32 = 100;
/// The most writes that wait.
pub const DEFAULT_MAX_DEPTH: u32 = 100_000;
/// The most bytes that they take.
pub const DEFAULT_MAX_BYTES: ByteSize = LEAST_BYTES;

/// The name of the journal of a policy's rules that write behind to one origin, as the policy calls it. All workloads of a policy share it,
/// since they write the same keys; policies never do. A namespace and the name of an origin have no dots, so no two pairs make one name.
///
/// # Errors
/// One of them is longer than Kubernetes lets it be, or has other characters.
pub fn journal_name(namespace: &str, policy: &str, origin: &str) -> Result<JournalName, JournalNameError> {
    format!("{namespace}.{policy}.{origin}").parse()
}

/// The journal of a rule that writes behind. `None`: it is refused.
pub(super) fn journal(source: &mut Source<'_>, spec: &RuleSpec, place: &FieldPath) -> Option<Journal> {
    let behind = spec.write_behind.clone().unwrap_or_default();
    let own = &source.policy.spec.cache_cluster;
    if behind.journal.as_ref().is_some_and(|named| named != own) {
        let what = format!("a journal lies in the policy's own CacheCluster, `{own}`");
        source.refuse(place.key("writeBehind").key("journal"), what, "remove journal");
        return None;
    }
    let name = match journal_name(&source.object.namespace, &source.object.name, &spec.origin.as_ref()?.name) {
        Ok(name) => name,
        Err(error) => {
            let (what, remedy) = split_remedy(&error.to_string());
            source.refuse(place.key("origin").key("name"), what, remedy);
            return None;
        }
    };
    Some(Journal {
        name,
        max_lag: behind.max_lag.unwrap_or(DEFAULT_MAX_LAG),
        max_depth: behind.max_depth.unwrap_or(DEFAULT_MAX_DEPTH).into(),
        max_bytes: behind.max_bytes.unwrap_or(DEFAULT_MAX_BYTES),
        batch: behind.batch.unwrap_or(DEFAULT_BATCH),
        overflow: behind.overflow.map_or(Overflow::Reject, Into::into),
    })
}

/// What a rule needs of its CacheCluster that this does not keep.
struct Lack {
    what: String,
    remedy: &'static str,
}

/// What a CacheCluster lacks for a rule of this strategy. That it has a replica its definition sees to.
fn lacks(strategy: StrategyKind, keeping: Keeping) -> Vec<Lack> {
    let lost = match strategy {
        StrategyKind::CacheAside | StrategyKind::ReadThrough | StrategyKind::Bypass => return Vec::new(),
        StrategyKind::WriteThrough => "the marks of writes under way",
        StrategyKind::WriteBehind => "writes that no origin has yet",
    };
    let mut lacks = Vec::new();
    if keeping.eviction.drops_any_key() {
        let what = format!("the CacheCluster's eviction also drops keys that have no TTL, among them {lost}");
        lacks.push(Lack { what, remedy: "write eviction: volatile-lfu there" });
    }
    if strategy == StrategyKind::WriteBehind && !keeping.is_durable() {
        let what = match keeping.fsync {
            None => {
                "the CacheCluster keeps its data in memory only, and what is written behind must be on disk when it is acknowledged"
            }
            Some(_) => {
                "the CacheCluster's writes reach the disk after they are acknowledged, and what is written behind must be there before"
            }
        };
        let remedy = "write storage.fsync: Always there, or strategy: WriteThrough here";
        lacks.push(Lack { what: what.to_owned(), remedy });
    }
    lacks
}

/// Refuses a rule that needs more of its CacheCluster than that keeps.
pub(super) fn check_keeping(source: &mut Source<'_>, spec: &RuleSpec, place: &FieldPath, keeping: Keeping) {
    for Lack { what, remedy } in lacks(spec.strategy, keeping) {
        source.refuse(place.key("strategy"), what, remedy);
    }
}

/// What keeps the rules of a policy that write behind, and that `counts` includes, from writing to a CacheCluster that keeps this: what
/// compiling the policy with it would say of them. Empty: it can carry their journals.
pub fn unfit_for_journals(policy: &CachePolicy, keeping: Keeping, counts: impl Fn(&RuleSpec) -> bool) -> Problems {
    let rules = policy.spec.rules.iter().enumerate();
    let behind = rules.filter(|(_, rule)| rule.strategy == StrategyKind::WriteBehind && counts(rule));
    let problems = behind.flat_map(|(index, rule)| {
        lacks(rule.strategy, keeping).into_iter().map(move |Lack { what, remedy }| Problem {
            object: policy_ref(policy),
            path: at!("spec", "rules", index).key("strategy"),
            what,
            remedy: remedy.to_owned(),
        })
    });
    Problems(problems.collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_two_policies_or_origins_share_a_journal() {
        let name = |namespace, policy, origin| journal_name(namespace, policy, origin).expect("a name");
        assert_eq!(name("shop", "users", "db").as_str(), "shop.users.db");
        assert_ne!(name("shop", "users.x", "db"), name("shop", "users", "x-db"));
        let longest = ("n".repeat(63), "p".repeat(253), "o".repeat(63));
        assert!(journal_name(&longest.0, &longest.1, &longest.2).is_ok());
        assert!(journal_name("shop", "a b", "db").is_err());
    }
}
