//! Tags: names that keys share, so that one event tells of all of them.
//!
//! A tag is a template over the parts of a rule's keys: under `keys: cart:{user}:{shop}`, `tags: ["user:{user}"]` gives
//! `cart:7:tea` the tag `user:7`. So a key's tags follow from its name, and nothing has to be kept that could be lost: a tag that
//! names all parts stands for one key of the rule, and one that leaves some open for those that a walk finds. What was loaded before an
//! invalidation is refused by the key's lease, whichever of its names was invalidated.

use std::ops::Range;

use super::pattern::{Captures, KeyPattern, Segment};
use super::rule::{Rule, Versioned};

/// The most tags of one rule.
pub const MAX_TAGS: usize = 8;
/// The longest tag that can be invalidated, in bytes.
pub const MAX_TAG_BYTES: usize = 1024;

/// Why a template is no tag of a rule's keys. The text names the remedy.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TagError {
    /// The keys have no such part.
    #[error("the tag names the part `{0}`, which the keys do not have: write parts that the rule's keys name")]
    UnknownPart(String),
    /// What may hold a colon in one of them may not in the other.
    #[error("the keys and the tag write the part `{0}` differently: write {{{0}}} in both, or {{{0}…}} in both")]
    OtherForm(String),
    /// Some text would be several keys' tag, read in several ways.
    #[error("the tag can be read in more than one way: let each part of it end at a colon, or at the tag's end")]
    Ambiguous,
}

/// Checks that each text has one reading as a tag of such keys.
///
/// # Errors
/// What to write instead.
pub fn check(template: &KeyPattern, keys: &KeyPattern) -> Result<(), TagError> {
    for segment in &template.segments {
        let Segment::Part { name, any } = segment else { continue };
        match part_of(keys, name) {
            None => return Err(TagError::UnknownPart(name.clone())),
            Some((_, other)) if other != *any => return Err(TagError::OtherForm(name.clone())),
            Some(_) => {}
        }
    }
    if template.reads_one_way() { Ok(()) } else { Err(TagError::Ambiguous) }
}

/// Whether a key that the rule's pattern covers has a tag. Allocates nothing where each of the key's parts ends at a `:` or at its end.
pub fn has(rule: &Rule, key: &[u8], tag: &[u8]) -> bool {
    if rule.tags.is_empty() {
        return false;
    }
    let Some(parts) = rule.keys.captures(key) else { return false };
    rule.tags.iter().any(|template| is_tag(template, &rule.keys, key, &parts, tag))
}

/// The tags of a key that the rule's pattern covers, in the order of their templates.
pub fn of(rule: &Rule, key: &[u8]) -> Vec<Vec<u8>> {
    let Some(parts) = rule.keys.captures(key) else { return Vec::new() };
    rule.tags.iter().map(|template| pieces(template, &rule.keys, key, &parts).flatten().copied().collect()).collect()
}

/// What one template makes of a tag.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Meaning {
    /// It is none of the template's.
    Nothing,
    /// One key, and no other, has it by this template.
    Key(Vec<u8>),
    /// Keys that it does not name to the end.
    Several,
}

/// Whether a value under a rule may have a tag of this form: by one of the rule's templates, or since it may be given any.
pub fn may_have(tags: &[KeyPattern], versioned: Versioned, tag: &KeyPattern) -> bool {
    versioned == Versioned::Entity || tags.iter().any(|template| template.common_key(tag).is_some())
}

/// What a tag stands for among the keys of a rule, template by template.
pub fn meanings<'r>(rule: &'r Rule, tag: &'r [u8]) -> impl Iterator<Item = Meaning> + 'r {
    rule.tags.iter().map(move |template| meaning(template, &rule.keys, tag))
}

fn meaning(template: &KeyPattern, keys: &KeyPattern, tag: &[u8]) -> Meaning {
    let Some(found) = template.captures(tag) else { return Meaning::Nothing };
    let mut key = Vec::with_capacity(tag.len() + keys.as_str().len());
    for segment in &keys.segments {
        match segment {
            Segment::Literal(bytes) => key.extend_from_slice(bytes),
            Segment::Part { name, .. } => match part_of(template, name).and_then(|(at, _)| found.get(at)) {
                Some(range) => key.extend_from_slice(tag.get(range.clone()).unwrap_or_default()),
                None => return Meaning::Several,
            },
        }
    }
    // Of keys that can be read in several ways the one reading counts by which keys have tags.
    let is_read_so = keys.captures(&key).is_some_and(|parts| is_tag(template, keys, &key, &parts, tag));
    if is_read_so { Meaning::Key(key) } else { Meaning::Nothing }
}

fn is_tag(template: &KeyPattern, keys: &KeyPattern, key: &[u8], parts: &Captures, tag: &[u8]) -> bool {
    let mut rest = tag;
    for piece in pieces(template, keys, key, parts) {
        match rest.strip_prefix(piece) {
            Some(behind) => rest = behind,
            None => return false,
        }
    }
    rest.is_empty()
}

/// A key's tag, piece by piece.
fn pieces<'a>(
    template: &'a KeyPattern,
    keys: &'a KeyPattern,
    key: &'a [u8],
    parts: &'a [Range<usize>],
) -> impl Iterator<Item = &'a [u8]> {
    template.segments.iter().map(move |segment| match segment {
        Segment::Literal(bytes) => bytes.as_slice(),
        Segment::Part { name, .. } => {
            let range = part_of(keys, name).and_then(|(at, _)| parts.get(at));
            range.and_then(|range| key.get(range.clone())).unwrap_or_default()
        }
    })
}

/// Which of a pattern's parts has this name, and whether it may hold any byte.
fn part_of(pattern: &KeyPattern, name: &str) -> Option<(usize, bool)> {
    let parts = pattern.segments.iter().filter_map(|segment| match segment {
        Segment::Part { name, any } => Some((name, *any)),
        Segment::Literal(_) => None,
    });
    parts.enumerate().find(|(_, (other, _))| *other == name).map(|(at, (_, any))| (at, any))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::policy::{Mode, Strategy as RuleStrategy, Versioned};

    fn rule(keys: &str, tags: &[&str]) -> Rule {
        let tags = tags.iter().map(|tag| tag.parse().expect("a pattern")).collect();
        Rule {
            name: "a".to_owned(),
            keys: keys.parse().expect("a pattern"),
            mode: Mode::Enforce,
            strategy: RuleStrategy::Bypass {},
            tags,
            versioned: Versioned::No,
        }
    }

    #[test]
    fn keys_have_tags_by_their_parts() {
        let cart = rule("cart:{user}:{shop}", &["user:{user}", "{shop}:{user}", "carts"]);
        assert_eq!(of(&cart, b"cart:7:tea"), [&b"user:7"[..], b"tea:7", b"carts"]);
        assert!(
            has(&cart, b"cart:7:tea", b"user:7")
                && !has(&cart, b"cart:7:tea", b"user:70")
                && !has(&cart, b"cart:7:tea", b"user:")
        );
        assert!(!has(&cart, b"cart:7", b"user:7") && of(&cart, b"other").is_empty());
        let meanings = |tag: &str| meanings(&cart, tag.as_bytes()).collect::<Vec<_>>();
        assert_eq!(meanings("user:7"), [Meaning::Several, Meaning::Key(b"cart:7:user".to_vec()), Meaning::Nothing]);
        assert_eq!(meanings("carts"), [Meaning::Nothing, Meaning::Nothing, Meaning::Several]);
        assert_eq!(meanings("user:7:8"), [Meaning::Nothing, Meaning::Nothing, Meaning::Nothing]);
    }

    #[test]
    fn a_value_may_have_a_tag_by_a_template_or_be_given_any() {
        let tag = |text: &str| text.parse().expect("a pattern");
        let cart = rule("cart:{user}:{shop}", &["user:{user}"]).tags;
        assert!(may_have(&cart, Versioned::Rule, &tag("user:{id}")) && may_have(&cart, Versioned::No, &tag("user:7")));
        assert!(!may_have(&cart, Versioned::Rule, &tag("shop:{id}")) && !may_have(&[], Versioned::No, &tag("user:{id}")));
        assert!(may_have(&[], Versioned::Entity, &tag("shop:{id}")));
    }

    #[test]
    fn templates_that_could_be_misread_are_refused() {
        let check = |keys: &str, tag: &str| check(&tag.parse().expect("a pattern"), &keys.parse().expect("a pattern"));
        assert_eq!(check("page:{lang}:{path…}", "{lang}:{path…}"), Ok(()));
        assert_eq!(check("fixed", "all"), Ok(()));
        assert_eq!(check("user:{id}", "user:{name}"), Err(TagError::UnknownPart("name".to_owned())));
        assert_eq!(check("page:{path…}", "{path}"), Err(TagError::OtherForm("path".to_owned())));
        assert_eq!(check("user:{id}", "{id…}"), Err(TagError::OtherForm("id".to_owned())));
        assert_eq!(check("a:{x}:{y}", "{x}-{y}"), Err(TagError::Ambiguous));
    }

    const PAIRS: [(&str, &str); 6] = [
        ("k:{a}:{b}", "t:{b}:{a}"),
        ("k:{a}:{b}", "{a}"),
        ("{a}-{b}", "{a}:{b}"),
        ("k:{a…}", "{a…}"),
        ("{a}:k:{b…}", "{b…}"),
        ("k", "t"),
    ];

    proptest! {
        /// The tag that a key has stands for that key, and for no other where it stands for one.
        #[test]
        fn a_tag_leads_back_to_its_key(pair in 0..PAIRS.len(), key in "[k:ab-]{1,9}", other in "[t:ab-]{1,9}") {
            let (keys, tag) = PAIRS[pair];
            let rule = rule(keys, &[tag]);
            prop_assert!(check(&rule.tags[0], &rule.keys).is_ok());
            let (key, other) = (key.as_bytes(), other.as_bytes());
            for tag in of(&rule, key) {
                prop_assert!(has(&rule, key, &tag));
                match meaning(&rule.tags[0], &rule.keys, &tag) {
                    Meaning::Key(named) => prop_assert_eq!(&named, key),
                    Meaning::Several => {}
                    Meaning::Nothing => prop_assert!(false, "{:?} is nobody's", tag),
                }
            }
            prop_assert_eq!(has(&rule, key, other), of(&rule, key).iter().any(|tag| tag == other));
            if let Meaning::Key(named) = meaning(&rule.tags[0], &rule.keys, other) {
                prop_assert!(has(&rule, &named, other));
            }
        }
    }
}
