//! What is to go since rows have changed, until it is written into the stream of events. Pure.

use std::collections::{BTreeMap, BTreeSet};

use crate::policy::tags::MAX_TAG_BYTES;

/// The most keys of one rule that are named one by one: with more, all of the rule's go. A walk over all names is cheaper then, and the stream
/// of events keeps a bounded number of entries.
pub const MOST_KEYS: usize = 10_000;
/// The most tags of one rule that are named one by one: with more, all of the rule's keys go. One walk over all names does for 64 tags.
pub const MOST_TAGS: usize = 256;
/// The longest key that is named.
pub const MOST_KEY_BYTES: usize = 16 * 1024;
/// The most keys in an entry of the stream, and the most bytes that they take: whoever reads the stream reads whole entries.
const MOST_IN_ENTRY: usize = 16;
const MOST_ENTRY_BYTES: usize = 32 * 1024;

/// Why all keys of a rule go where a row's own would do. The text names the remedy.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, thiserror::Error)]
pub enum Why {
    /// The rule says so, or the table was emptied.
    #[error("the change is about all of them")]
    Said,
    /// It follows a table that was not told of until now.
    #[error("it follows another table, or otherwise, from now on")]
    Followed,
    /// Nobody knows what changed.
    #[error("changes may have been lost")]
    Lost,
    /// A row was larger than what is read.
    #[error("a row was too large to be read")]
    TooLarge,
    /// The table lacks a column.
    #[error("the table `{table}` has no column `{column}`: name the column of the part in columns")]
    Column {
        /// The table.
        table: String,
        /// The column.
        column: String,
    },
    /// A row's old value of a column is not told.
    #[error(
        "the old value of `{column}` is not told when a row of `{table}` changes: ALTER TABLE {table} REPLICA IDENTITY FULL, or USING INDEX one with that column"
    )]
    Identity {
        /// The table.
        table: String,
        /// The column.
        column: String,
    },
    /// A key is longer than [`MOST_KEY_BYTES`].
    #[error("a key would be longer than {MOST_KEY_BYTES} bytes")]
    Length,
    /// A tag that no event can name: one longer than [`MAX_TAG_BYTES`], or no text.
    #[error("a tag would be longer than {MAX_TAG_BYTES} bytes, or is not in UTF-8")]
    Tag,
    /// There are more keys than [`MOST_KEYS`].
    #[error("more than {MOST_KEYS} of its rows changed at once")]
    Many,
    /// There are more tags than [`MOST_TAGS`].
    #[error("rows with more than {MOST_TAGS} tags changed at once")]
    ManyTags,
}

/// An entry of the stream: pairs of a kind and what it is about.
pub type Entry = Vec<(&'static [u8], Vec<u8>)>;

/// What is to go. Bounded: a rule's keys are at most [`MOST_KEYS`] and its tags [`MOST_TAGS`], or all of its keys are to go.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Wanted {
    keys: BTreeMap<String, BTreeSet<Vec<u8>>>,
    /// By the rule that follows a table for their sake. Another may have the same tag.
    tags: BTreeMap<String, BTreeSet<Vec<u8>>>,
    rules: BTreeMap<String, Why>,
}

impl Wanted {
    /// One key of a rule.
    pub fn key(&mut self, rule: &str, key: Vec<u8>) {
        if self.rules.contains_key(rule) {
            return;
        }
        if key.len() > MOST_KEY_BYTES {
            return self.rule(rule, Why::Length);
        }
        if insert(&mut self.keys, rule, key) > MOST_KEYS {
            self.rule(rule, Why::Many);
        }
    }

    /// All keys that have a tag, which a rule's may have.
    pub fn tag(&mut self, rule: &str, tag: Vec<u8>) {
        if self.rules.contains_key(rule) {
            return;
        }
        if tag.len() > MAX_TAG_BYTES || std::str::from_utf8(&tag).is_err() {
            return self.rule(rule, Why::Tag);
        }
        if insert(&mut self.tags, rule, tag) > MOST_TAGS {
            self.rule(rule, Why::ManyTags);
        }
    }

    /// All keys of a rule.
    pub fn rule(&mut self, rule: &str, why: Why) {
        self.keys.remove(rule);
        self.tags.remove(rule);
        self.rules.entry(rule.to_owned()).or_insert(why);
    }

    /// Whether nothing is to go.
    pub fn is_empty(&self) -> bool {
        self.keys.is_empty() && self.tags.is_empty() && self.rules.is_empty()
    }

    /// How many keys and tags are named.
    pub fn named(&self) -> usize {
        self.keys.values().chain(self.tags.values()).map(BTreeSet::len).sum()
    }

    /// The rules all of whose keys go, each with the first reason.
    pub fn rules(&self) -> &BTreeMap<String, Why> {
        &self.rules
    }

    /// As entries of the stream. `policy`: whose rules they are, which some sidecars may call after it.
    pub fn entries(&self, policy: Option<&str>) -> Vec<Entry> {
        let mut entries: Vec<Entry> = Vec::new();
        let (mut room, mut bytes) = (0, 0);
        let longer = self.rules.keys().flat_map(|rule| policy.map(|policy| format!("{policy}/{rule}")));
        let names: Vec<String> = self.rules.keys().cloned().chain(longer).collect();
        let rules = names.iter().map(|rule| (&b"rule"[..], rule.as_bytes()));
        let tags: BTreeSet<&Vec<u8>> = self.tags.values().flatten().collect();
        let tags = tags.into_iter().map(|tag| (&b"tag"[..], tag.as_slice()));
        let keys = self.keys.values().flatten().map(|key| (&b"key"[..], key.as_slice()));
        for (kind, what) in rules.chain(tags).chain(keys) {
            if room == 0 || bytes + what.len() > MOST_ENTRY_BYTES {
                entries.push(Vec::new());
                (room, bytes) = (MOST_IN_ENTRY, 0);
            }
            (room, bytes) = (room - 1, bytes + what.len());
            if let Some(entry) = entries.last_mut() {
                entry.push((kind, what.to_vec()));
            }
        }
        entries
    }
}

/// Adds one of a rule's. How many there are then.
fn insert(all: &mut BTreeMap<String, BTreeSet<Vec<u8>>>, rule: &str, what: Vec<u8>) -> usize {
    let of_rule = match all.get_mut(rule) {
        Some(of_rule) => of_rule,
        None => all.entry(rule.to_owned()).or_default(),
    };
    of_rule.insert(what);
    of_rule.len()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn too_many_keys_of_a_rule_become_all_of_them() {
        let mut wanted = Wanted::default();
        for key in 0..=MOST_KEYS {
            assert!(wanted.rules().is_empty(), "{key}");
            wanted.key("user", format!("user:{key}").into_bytes());
        }
        assert_eq!((wanted.named(), wanted.rules().get("user")), (0, Some(&Why::Many)));
        wanted.key("user", b"user:1".to_vec());
        wanted.key("order", b"order:1".to_vec());
        wanted.key("page", vec![b'x'; MOST_KEY_BYTES + 1]);
        assert_eq!((wanted.named(), wanted.rules().get("page")), (1, Some(&Why::Length)));
    }

    #[test]
    fn a_tag_of_several_rules_is_said_once_and_what_none_can_name_is_all_of_the_rule() {
        let mut wanted = Wanted::default();
        ["page", "shelf"].iter().for_each(|rule| wanted.tag(rule, b"author:1".to_vec()));
        wanted.key("page", b"page:1".to_vec());
        let said = |wanted: &Wanted| wanted.entries(None).into_iter().flatten().collect::<Vec<_>>();
        let pair = |kind: &'static [u8], what: &[u8]| (kind, what.to_vec());
        assert_eq!(said(&wanted), [pair(b"tag", b"author:1"), pair(b"key", b"page:1")]);
        wanted.tag("page", vec![0xff]);
        assert_eq!(said(&wanted), [pair(b"rule", b"page"), pair(b"tag", b"author:1")]);
        wanted.tag("shelf", vec![b'a'; MAX_TAG_BYTES + 1]);
        assert_eq!((wanted.rules().get("page"), wanted.rules().get("shelf")), (Some(&Why::Tag), Some(&Why::Tag)));
        (0..=MOST_TAGS).for_each(|number| wanted.tag("face", format!("user:{number}").into_bytes()));
        assert_eq!((wanted.named(), wanted.rules().get("face")), (0, Some(&Why::ManyTags)));
    }

    #[test]
    fn rules_are_called_as_any_sidecar_may_call_them() {
        let mut wanted = Wanted::default();
        wanted.rule("user", Why::Lost);
        wanted.key("order", b"order:1".to_vec());
        let said: Vec<Vec<u8>> = wanted.entries(Some("shop")).into_iter().flatten().map(|(_, what)| what).collect();
        assert_eq!(said, [b"user".to_vec(), b"shop/user".to_vec(), b"order:1".to_vec()]);
    }

    proptest! {
        /// Everything is said, each once, in entries that can be read.
        #[test]
        fn entries_say_everything_within_their_bounds(
            keys in proptest::collection::btree_set(proptest::collection::vec(any::<u8>(), 1..9_000), 0..40),
            rules in proptest::collection::btree_set("[a-c]{1,3}", 0..20),
        ) {
            let mut wanted = Wanted::default();
            rules.iter().for_each(|rule| wanted.rule(rule, Why::Said));
            keys.iter().for_each(|key| wanted.key("users", key.clone()));
            let entries = wanted.entries(None);
            let mut said = BTreeSet::new();
            for entry in &entries {
                prop_assert!((1..=MOST_IN_ENTRY).contains(&entry.len()));
                let bytes: usize = entry.iter().map(|(_, what)| what.len()).sum();
                prop_assert!(entry.len() == 1 || bytes <= MOST_ENTRY_BYTES);
                for pair in entry {
                    prop_assert!(said.insert(pair.clone()), "said twice");
                }
            }
            prop_assert_eq!(said.len(), keys.len() + rules.len());
            prop_assert!(keys.into_iter().all(|key| said.contains(&(&b"key"[..], key))));
        }
    }
}
