//! What takes no walk, since its keys have versions: one write invalidates them. Pure.

use super::jobs::Target;
use crate::policy::versions::Counter;
use crate::policy::{KeyPattern, Rule};
use crate::sidecar::policy::ActivePolicy;

/// The version to draw anew, which is all that a target takes. `None`: it takes a walk, or what its tag stands for.
pub fn counter_of(policy: &ActivePolicy, target: &Target) -> Option<Counter> {
    keys_of(policy, target).map(|keys| Counter::of_rule(&keys))
}

fn keys_of(policy: &ActivePolicy, target: &Target) -> Option<KeyPattern> {
    let versioned = |is_meant: &dyn Fn(&Rule) -> bool| {
        let mut rules = (0..).zip(&policy.snapshot().rules).filter(|(id, _)| policy.is_versioned(*id));
        rules.find(|(_, rule)| is_meant(rule)).map(|(_, rule)| rule.keys.clone())
    };
    match target {
        Target::Rule(name) => versioned(&|rule| rule.name == *name),
        Target::Pattern(pattern) => versioned(&|rule| pattern.covers_all_of(&rule.keys)).filter(|_| is_alone(policy, pattern)),
        Target::Tag(_) | Target::Leased => None,
    }
}

/// Whether one rule alone covers keys of this pattern.
fn is_alone(policy: &ActivePolicy, pattern: &KeyPattern) -> bool {
    policy.snapshot().rules.iter().filter(|rule| rule.keys.common_key(pattern).is_some()).count() == 1
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::origin::Origins;
    use crate::policy::Snapshot;

    #[test]
    fn a_versioned_rule_and_a_pattern_of_all_its_keys_take_no_walk() {
        let rule = |name: &str, keys: &str, versioned: bool| {
            format!(
                r#"{{"name":"{name}","keys":"{keys}","versioned":{versioned},"strategy":{{"cacheAside":{{"ttl":{{"default":"1h","max":"2h","jitter":"0%"}}}}}}}}"#
            )
        };
        let rules = [
            rule("one", "page:1", false),
            rule("page", "page:{id}", true),
            rule("user", "user:{id}", true),
            rule("old", "old:{id}", false),
        ];
        let snapshot = format!(
            r#"{{"version":6,"requires":6,"generation":1,"cluster":{{"name":"main","topology":{{"cluster":{{"seeds":["h:1"]}}}}}},
            "unmatched":{{"bypass":{{}}}},"rules":[{}]}}"#,
            rules.join(",")
        );
        let snapshot = Snapshot::parse(snapshot.as_bytes()).expect("a snapshot");
        let origins = Origins::new(&snapshot.origins).expect("no origins");
        let policy = ActivePolicy::new(Arc::new(snapshot), &origins).expect("a policy");
        let found = |target: &Target| keys_of(&policy, target).map(|keys| keys.as_str().to_owned());
        let (rule, pattern) =
            (|name: &str| Target::Rule(name.to_owned()), |text: &str| Target::Pattern(text.parse().expect("a pattern")));
        assert_eq!(found(&rule("page")).as_deref(), Some("page:{id}"));
        for text in ["user:{id}", "user:{name}", "user:{rest…}", "us{rest…}"] {
            assert_eq!(found(&pattern(text)).as_deref(), Some("user:{id}"), "{text}");
        }
        for target in
            [rule("old"), pattern("page:{id}"), pattern("old:{id}"), pattern("user:7"), pattern("{all…}"), Target::Leased]
        {
            assert_eq!(found(&target), None, "{target:?}");
        }
        let name = b"user:7~v3f9a00c1d2e4b567";
        assert_eq!((policy.find(name), policy.key_of(name)), (2, &b"user:7"[..]));
        let plain = b"old:7~v3f9a00c1d2e4b567";
        assert_eq!((policy.find(plain), policy.key_of(plain)), (3, &plain[..]));
    }
}
