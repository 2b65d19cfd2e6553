//! What a tag stands for under a policy: keys that it names to the end, versions that are drawn anew, and keys that a walk has to find. Where values
//! may be given tags any text may be one. Pure.

use crate::policy::tags::{Meaning, meanings};
use crate::policy::versions::Counter;
use crate::policy::{KeyPattern, Versioned};
use crate::sidecar::policy::{ActivePolicy, RuleId};

/// What a tag stands for.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Tagged {
    /// The keys that it names to the end: one for each template at the most.
    pub keys: Vec<Vec<u8>>,
    /// Its versions among the keys of versioned rules.
    pub counters: Vec<Counter>,
    /// The patterns among whose keys values may have been given it: that it was invalidated is noted before its versions are drawn.
    pub given: Vec<KeyPattern>,
    /// Whether others may have it, too.
    pub walks: bool,
}

/// What `tag` stands for. `None`: no key of any rule that takes effect can have it.
pub fn look_up(policy: &ActivePolicy, tag: &[u8]) -> Option<Tagged> {
    let mut found: Option<Tagged> = None;
    for (id, rule) in (0..).zip(&policy.snapshot().rules) {
        let id: RuleId = id;
        if policy.lifetime_of(id).is_none() {
            continue;
        }
        if policy.is_versioned(id) && rule.versioned == Versioned::Entity {
            let Tagged { counters, given, .. } = found.get_or_insert_default();
            if !given.contains(&rule.keys) {
                given.push(rule.keys.clone());
                counters.push(Counter::of_tag(&rule.keys, tag));
            }
        }
        for meaning in meanings(rule, tag) {
            match meaning {
                Meaning::Nothing => {}
                Meaning::Key(_) | Meaning::Several if policy.is_versioned(id) => {
                    let counters = &mut found.get_or_insert_default().counters;
                    let counter = Counter::of_tag(&rule.keys, tag);
                    if !counters.contains(&counter) {
                        counters.push(counter);
                    }
                }
                // Another rule before this one may decide over the key.
                Meaning::Key(key) if policy.find(&key) != id => {}
                Meaning::Key(key) => found.get_or_insert_default().keys.push(key),
                Meaning::Several => found.get_or_insert_default().walks = true,
            }
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::origin::Origins;
    use crate::policy::Snapshot;

    #[test]
    fn a_tag_stands_for_keys_of_several_rules() {
        let rule = |name: &str, keys: &str, tags: &str| {
            format!(
                r#"{{"name":"{name}","keys":"{keys}","tags":{tags},"strategy":{{"cacheAside":{{"ttl":{{"default":"1h","max":"2h","jitter":"0%"}}}}}}}}"#
            )
        };
        let rules = [
            rule("one", "user:1", "[]"),
            rule("user", "user:{id}", r#"["user:{id}"]"#),
            rule("face", "face:{id}", r#"["user:{id}","faces"]"#),
            rule("cart", "cart:{id}:{shop}", r#"["cart:{id}"]"#),
            rule("page", "page:{id}:{lang}", r#"["page:{id}","user:{id}"]"#).replacen(
                "\"strategy\"",
                "\"versioned\":true,\"strategy\"",
                1,
            ),
            rule("seen", "seen:{id}", r#"["seen:{id}"]"#).replacen("\"strategy\"", "\"mode\":\"observe\",\"strategy\"", 1),
        ];
        let snapshot = format!(
            r#"{{"version":6,"requires":6,"generation":1,"cluster":{{"name":"main","topology":{{"cluster":{{"seeds":["h:1"]}}}}}},
            "unmatched":{{"bypass":{{}}}},"rules":[{}]}}"#,
            rules.join(",")
        );
        let snapshot = Snapshot::parse(snapshot.as_bytes()).expect("a snapshot");
        let origins = Origins::new(&snapshot.origins).expect("no origins");
        let policy = ActivePolicy::new(Arc::new(snapshot), &origins).expect("a policy");
        let keys = |keys: &[&str]| keys.iter().map(|key| key.as_bytes().to_vec()).collect::<Vec<_>>();
        let found = |tag: &str| look_up(&policy, tag.as_bytes());
        let counter = |tag: &str| vec![Counter::of_tag(&policy.snapshot().rules[4].keys, tag.as_bytes())];
        let tagged = |keys, tag: &str| Some(Tagged { keys, counters: counter(tag), ..Tagged::default() });
        assert_eq!(found("user:7"), tagged(keys(&["user:7", "face:7"]), "user:7"));
        assert_eq!(found("user:1"), tagged(keys(&["face:1"]), "user:1"), "another rule covers user:1");
        assert_eq!(found("page:7"), tagged(keys(&[]), "page:7"));
        assert_eq!(found("faces"), Some(Tagged { keys: keys(&[]), walks: true, ..Tagged::default() }));
        assert_eq!(found("cart:7"), Some(Tagged { keys: keys(&[]), walks: true, ..Tagged::default() }));
        assert_eq!((found("seen:7"), found("none")), (None, None), "what is only observed is not touched");
    }
    #[test]
    fn any_text_may_be_a_tag_that_a_value_was_given() {
        let rule = |name: &str, tags: &str| {
            format!(
                r#"{{"name":"{name}","keys":"{name}:{{id}}","tags":{tags},"versioned":"entity","strategy":{{"cacheAside":{{"ttl":{{"default":"1h","max":"2h","jitter":"0%"}}}}}}}}"#
            )
        };
        let snapshot = format!(
            r#"{{"version":7,"requires":7,"generation":1,"cluster":{{"name":"main","topology":{{"cluster":{{"seeds":["h:1"]}}}}}},
            "unmatched":{{"bypass":{{}}}},"rules":[{},{}]}}"#,
            rule("page", r#"["page:{id}"]"#),
            rule("user", "[]")
        );
        let snapshot = Snapshot::parse(snapshot.as_bytes()).expect("a snapshot");
        let origins = Origins::new(&snapshot.origins).expect("no origins");
        let policy = ActivePolicy::new(Arc::new(snapshot), &origins).expect("a policy");
        let keys: Vec<KeyPattern> = policy.snapshot().patterns().cloned().collect();
        for tag in ["anything", "page:7"] {
            let counters = keys.iter().map(|keys| Counter::of_tag(keys, tag.as_bytes())).collect();
            assert_eq!(look_up(&policy, tag.as_bytes()), Some(Tagged { counters, given: keys.clone(), ..Tagged::default() }));
        }
    }
}
