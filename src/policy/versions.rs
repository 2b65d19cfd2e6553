//! Names with versions: what the cache calls a key whose rule is versioned, so that all of the rule's keys are invalidated by one write.
//!
//! `user:7` is kept as `user:7~v3f9a00c1d2e4b567`. The version is made of the rule's own, of those of the key's tags, and of the key's own where
//! the rule says so. Each of these is drawn by chance, never counted up: one that was lost and drawn anew was nobody's before, so nothing that
//! was stored under an earlier one is ever met again.

use std::fmt;

use super::pattern::{KeyPattern, Segment};
use super::rule::{Rule, Versioned};
use super::slots::Companion;
use super::tags;

/// What stands between a key and its version.
const MARK: &[u8] = b"~v";
/// Digits of a version.
const DIGITS: usize = 16;

/// A version of a rule's keys.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Version(u64);

impl Version {
    /// The version of this number. To be drawn by chance from all of `u64`.
    pub const fn new(number: u64) -> Self {
        Self(number)
    }

    /// The version that a text of sixteen small hexadecimal digits stands for.
    pub fn parse(text: &[u8]) -> Option<Self> {
        let is_digit = |byte: &u8| matches!(byte, b'0'..=b'9' | b'a'..=b'f');
        let text =
            std::str::from_utf8(text).ok().filter(|text| text.len() == DIGITS && text.bytes().all(|byte| is_digit(&byte)))?;
        u64::from_str_radix(text, 16).ok().map(Self)
    }

    /// The version that two make together: another one where either changes, but for one chance in 2^64.
    #[must_use]
    pub fn with(self, other: Self) -> Self {
        // The finalizer of SplitMix64 (Steele, Lea and Flood, 2014).
        let mixed = self.0.rotate_left(23) ^ other.0;
        let mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        Self(mixed ^ (mixed >> 31))
    }

    /// What the cache calls `key` in this version.
    pub fn name(self, key: &[u8]) -> Vec<u8> {
        [key, MARK, self.to_string().as_bytes()].concat()
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

/// The key and the version that a name is made of. `None`: it is not of that form.
pub fn split(name: &[u8]) -> Option<(&[u8], Version)> {
    let (rest, digits) = name.split_at_checked(name.len().checked_sub(DIGITS)?)?;
    Some((rest.strip_suffix(MARK)?, Version::parse(digits)?))
}

/// The bytes that pairs of hexadecimal digits stand for. `None`: they are no such pairs, or there are none.
pub fn from_hex(digits: &[u8]) -> Option<Vec<u8>> {
    let digits = std::str::from_utf8(digits).ok().filter(|digits| !digits.is_empty() && digits.len().is_multiple_of(2))?;
    (0..digits.len()).step_by(2).map(|at| u8::from_str_radix(digits.get(at..at + 2)?, 16).ok()).collect()
}

/// What has a version: a rule, a tag among the keys of one, or a key.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Counter {
    /// A text that the rule's pattern covers: so who may use the rule's keys may use what stands beside it.
    text: Vec<u8>,
    of: Of,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
enum Of {
    Rule,
    Tag,
    Key,
}

impl Counter {
    /// The one that all keys of a pattern share. Whoever has a rule of the same pattern has the same.
    pub fn of_rule(keys: &KeyPattern) -> Self {
        Self { text: keys.as_str().as_bytes().to_vec(), of: Of::Rule }
    }

    /// The one that the keys of a pattern share which have this tag.
    pub fn of_tag(keys: &KeyPattern, tag: &[u8]) -> Self {
        let mut text = Vec::with_capacity(keys.as_str().len() + 2 * tag.len());
        for segment in &keys.segments {
            match segment {
                Segment::Literal(bytes) => text.extend_from_slice(bytes),
                Segment::Part { .. } => text.push(b'~'),
            }
        }
        // Digits, which any part may hold.
        text.extend(tag.iter().flat_map(|byte| format!("{byte:02x}").into_bytes()));
        Self { text, of: Of::Tag }
    }

    /// The one of a key. Its text ends in a tilde, as those of rules and tags do not.
    pub fn of_key(key: &[u8]) -> Self {
        Self { text: [key, b"~"].concat(), of: Of::Key }
    }

    /// The key in which the cache keeps which tags of a pattern's keys were invalidated lately. No counter has it: a tag is not empty, and no key that
    /// a pattern covers ends where its last part begins.
    pub fn log_of(keys: &KeyPattern) -> Vec<u8> {
        Self::of_tag(keys, b"").key()
    }

    /// All that the version of a rule's key is made of: the rule's own first, the key's own last.
    pub fn all_of(rule: &Rule, key: &[u8]) -> Vec<Self> {
        let tags = tags::of(rule, key).into_iter().map(|tag| Self::of_tag(&rule.keys, &tag));
        let own = (rule.versioned == Versioned::Entity).then(|| Self::of_key(key));
        [Self::of_rule(&rule.keys)].into_iter().chain(tags).chain(own).collect()
    }

    /// The key in which the cache keeps it.
    pub fn key(&self) -> Vec<u8> {
        Companion::Versions.name(&self.text)
    }

    /// The tag among the keys of a pattern whose it is.
    pub fn tag(&self, keys: &KeyPattern) -> Option<Vec<u8>> {
        let digits = self.text.strip_prefix(Self::of_tag(keys, b"").text.as_slice()).filter(|_| self.of == Of::Tag)?;
        from_hex(digits)
    }

    /// The key whose own it is.
    pub fn own_key(&self) -> Option<&[u8]> {
        self.text.strip_suffix(b"~").filter(|_| self.is_of_key())
    }

    /// Whether it is a key's.
    pub fn is_of_key(&self) -> bool {
        self.of == Of::Key
    }

    /// Whether there may be any number of its kind, so that the cache forgets those that were drawn long ago.
    pub fn is_fleeting(&self) -> bool {
        self.of != Of::Rule
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::policy::slots::is_larder_key;

    #[test]
    fn other_names_have_no_version() {
        for name in [
            "",
            "user:7",
            "~v",
            "user:7~v3f9a00c1d2e4b56",
            "user:7~v3F9A00C1D2E4B567",
            "user:7~w3f9a00c1d2e4b567",
            "3f9a00c1d2e4b567",
        ] {
            assert_eq!(split(name.as_bytes()), None, "{name}");
        }
        assert!(is_larder_key(&Counter::of_rule(&"user:{id}".parse().expect("a pattern")).key()));
    }

    #[test]
    fn versions_are_kept_where_the_rule_s_keys_may_be() {
        let keys: KeyPattern = "face:{user}:{size}".parse().expect("a pattern");
        let (tags, key) = ([b"user:7", b"user:8"].map(|tag| Counter::of_tag(&keys, tag)), Counter::of_key(b"face:7:s"));
        let counters = [vec![Counter::of_rule(&keys)], tags.to_vec(), vec![key]].concat();
        for counter in &counters {
            assert!(keys.matches(&counter.text), "{counter:?}");
            assert_eq!(Companion::parse(&counter.key()), Some((Companion::Versions, &counter.text[..])));
        }
        let names: std::collections::BTreeSet<Vec<u8>> = counters.iter().map(Counter::key).collect();
        assert_eq!(names.len(), counters.len());
        assert!(!names.contains(&Counter::log_of(&keys)));
        let tags: Vec<Vec<u8>> = counters.iter().filter_map(|counter| counter.tag(&keys)).collect();
        assert_eq!(tags, [b"user:7", b"user:8"]);
        assert_eq!(counters.iter().filter_map(Counter::own_key).collect::<Vec<_>>(), [b"face:7:s"]);
        let [a, b, c] = [1, 2, 3].map(Version::new);
        assert!(a.with(b) != a.with(c) && a.with(b) != c.with(b) && a.with(b) != b.with(a));
    }

    proptest! {
        #[test]
        fn a_name_leads_back_to_its_key(key in proptest::collection::vec(any::<u8>(), 0..40), number in any::<u64>()) {
            let version = Version::new(number);
            let name = version.name(&key);
            prop_assert_eq!(split(&name), Some((&key[..], version)));
            // What covers a key whose last part is open covers its names.
            let pattern: KeyPattern = "{a…}".parse().expect("a pattern");
            prop_assert!(key.is_empty() || pattern.matches(&name));
        }
    }
}
