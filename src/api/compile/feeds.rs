//! The databases whose changes rules follow.

use std::collections::BTreeMap;

use super::{Source, split_remedy};
use crate::api::cache_policy::{ChangesSpec, OriginSpec, RuleSpec};
use crate::api::path::FieldPath;
use crate::api::problem::ObjectRef;
use crate::policy::changes::{Feed, Follow, OWN_SLOT_PREFIX, TableName, Touches};
use crate::policy::{ByteSize, KeyPattern, Rule, Strategy, Versioned, digest, tags};

/// How much of its log a database keeps while the cache takes no events.
pub const DEFAULT_MAX_LAG: ByteSize = ByteSize::from_bytes(1024 * 1024 * 1024);
/// The longest name of a slot.
const MOST_NAME_BYTES: usize = 63;

/// A rule that may follow tables, as the snapshot has it.
pub(super) struct Follower<'a> {
    pub rule: &'a str,
    pub keys: &'a KeyPattern,
    pub tags: &'a [KeyPattern],
    pub versioned: Versioned,
}

/// The tables that a rule follows, each with the place of its origin among the policy's.
pub(super) fn follows(
    source: &mut Source<'_>,
    spec: &RuleSpec,
    place: &FieldPath,
    follower: &Follower<'_>,
) -> Vec<(usize, Follow)> {
    let changes: Vec<ChangesSpec> = spec.invalidate.iter().flat_map(|invalidate| invalidate.changes.clone()).collect();
    let mut follows = Vec::new();
    for (index, changes) in changes.iter().enumerate() {
        let place = place.key("invalidate").key("changes").index(index);
        match follow(source, spec, changes, follower) {
            Ok(followed) => follows.push(followed),
            Err((field, text)) => {
                let (what, remedy) = split_remedy(&text);
                source.refuse(place.key(field), what, remedy);
            }
        }
    }
    follows
}

/// One of them; else which field is wrong, and why.
fn follow(
    source: &Source<'_>,
    spec: &RuleSpec,
    changes: &ChangesSpec,
    follower: &Follower<'_>,
) -> Result<(usize, Follow), (&'static str, String)> {
    let origins = &source.policy.spec.origins;
    let named = changes.origin.as_ref().or_else(|| spec.origin.as_ref().map(|origin| &origin.name));
    let none = "the rule loads from no origin whose table this could be: write origin, with the name of one of spec.origins";
    let named = named.ok_or_else(|| ("origin", none.to_owned()))?;
    let at = origins.iter().position(|origin| origin.name == *named);
    let at = at.ok_or_else(|| ("origin", format!("there is no origin `{named}`: write the name of one of spec.origins")))?;
    let is_postgres = origins[at].sql.as_ref().is_some_and(|access| {
        let url = access.url.value.as_deref().unwrap_or("postgres:");
        url.starts_with("postgres")
    });
    if !is_postgres {
        let why =
            format!("the origin `{named}` tells of no changes: name an sql origin on Postgres, or write events to larder:events");
        return Err(("origin", why));
    }
    let table: TableName = changes.table.parse().map_err(|error| ("table", format!("{error}")))?;
    let columns = changes.columns.clone();
    let touches = match (changes.all, &changes.tag) {
        (Some(true), _) => Touches::All {},
        (_, Some(text)) => Touches::Tag { tag: tag_of(text, follower).map_err(|why| ("tag", why))?, columns },
        (_, None) => Touches::Key { columns },
    };
    let follow = Follow { rule: follower.rule.to_owned(), table, touches };
    follow.check(follower.keys).map_err(|why| ("columns", why))?;
    Ok((at, follow))
}

/// The template of a tag that values of the rule may have; else why not.
fn tag_of(text: &str, follower: &Follower<'_>) -> Result<KeyPattern, String> {
    let tag: KeyPattern = text.parse().map_err(|error| format!("{error}"))?;
    if tags::may_have(follower.tags, follower.versioned, &tag) {
        return Ok(tag);
    }
    let known = follower.tags.iter().map(KeyPattern::as_str).collect::<Vec<_>>().join(", ");
    Err(match known.as_str() {
        "" => {
            "no value of the rule has tags: write tags beside changes, or versioned: Entity and give values tags with LARDER.FILL"
                .to_owned()
        }
        known => format!("no value of the rule has such a tag: write a tag of the form of one of {known}"),
    })
}

/// Who follows a table by a tag does so for all of the policy's rules that may have the tag: where it cannot be told which tag it is, the
/// keys of all of them go.
pub(super) fn spread(follows: &mut BTreeMap<usize, Vec<Follow>>, rules: &[Rule]) {
    for follows in follows.values_mut() {
        for at in 0..follows.len() {
            let follow = follows[at].clone();
            let Some(tag) = follow.touches.tag() else { continue };
            let has_tag =
                |rule: &&Rule| !matches!(rule.strategy, Strategy::Bypass {}) && tags::may_have(&rule.tags, rule.versioned, tag);
            for rule in rules.iter().filter(has_tag) {
                let same = Follow { rule: rule.name.clone(), ..follow.clone() };
                if !follows.contains(&same) {
                    follows.push(same);
                }
            }
        }
    }
}

/// The feed of an origin, which the snapshot calls `name`, and which these follow.
pub(super) fn feed(cluster: &ObjectRef, policy: &str, origin: &OriginSpec, name: &str, follows: Vec<Follow>) -> Feed {
    let settings = origin.sql.as_ref().and_then(|access| access.changes.clone()).unwrap_or_default();
    let slot = settings.slot.unwrap_or_else(|| slot_name(cluster, policy, &origin.name));
    let (publication, given) = match settings.publication {
        Some(publication) => (publication, true),
        None => (slot.clone(), false),
    };
    let max_lag = settings.max_lag.unwrap_or(DEFAULT_MAX_LAG);
    Feed { origin: name.to_owned(), slot, publication, given, max_lag, policy: None, follows }
}

/// A name that tells a person whose slot it is, and that no other cache's or origin's has.
fn slot_name(cluster: &ObjectRef, policy: &str, origin: &str) -> String {
    let whole = format!("{}/{}/{policy}/{origin}", cluster.namespace, cluster.name);
    let mark = &digest::sha256(whole.as_bytes())[..8];
    let plain = |c: char| if c.is_ascii_lowercase() || c.is_ascii_digit() { c } else { '_' };
    let said: String =
        format!("{OWN_SLOT_PREFIX}{}_{origin}", cluster.name).chars().map(plain).take(MOST_NAME_BYTES - 9).collect();
    format!("{said}_{mark}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slots_are_named_so_that_a_person_sees_whose_they_are_and_no_two_are_one() {
        let cluster = |namespace: &str, name: &str| ObjectRef {
            kind: "CacheCluster",
            namespace: namespace.to_owned(),
            name: name.to_owned(),
        };
        let main = slot_name(&cluster("shop", "main"), "users", "db");
        assert!(main.starts_with("larder_main_db_") && main.len() == 23, "{main}");
        for other in [
            slot_name(&cluster("stage", "main"), "users", "db"),
            slot_name(&cluster("shop", "main"), "orders", "db"),
            slot_name(&cluster("shop", "main"), "users", "d-b"),
        ] {
            assert_ne!(other, main);
        }
        let long = slot_name(&cluster("shop", &"cache.".repeat(40)), "users", "db");
        assert!(long.len() == MOST_NAME_BYTES && long.starts_with("larder_cache_cache_"), "{long}");
    }
}
