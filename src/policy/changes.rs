//! Which rows of which tables a rule's keys, or tags of theirs, are made from: when these change, the keys go.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::pattern::KeyPattern;
use super::tags::MAX_TAG_BYTES;
use super::units::ByteSize;

/// The longest name of a schema, a table, a column, a slot or a publication in bytes, as Postgres has it.
const MOST_NAME_BYTES: usize = 63;
/// What the names of slots begin with that are Larder's own, whoever made them. Others may be somebody else's.
pub const OWN_SLOT_PREFIX: &str = "larder_";
/// The schema of a table that is named without one.
const DEFAULT_SCHEMA: &str = "public";

/// The changes of one database, as relays follow them: one relay at a time reads them from a slot of logical replication.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Feed {
    /// The name of the snapshot's origin that has the tables.
    pub origin: String,
    /// The slot's name. No other cache follows the same database by a slot of this name. One that does not begin with [`OWN_SLOT_PREFIX`], and was
    /// there before any relay came, is somebody else's, and stays.
    pub slot: String,
    /// The publication's name.
    pub publication: String,
    /// Whether the publication is somebody else's, who has the tables in it. Larder makes and changes its own.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub given: bool,
    /// How much of its log the database keeps at the most while the cache takes nothing. Beyond that the slot is given up, and what follows its
    /// tables is invalidated as a whole.
    pub max_lag: ByteSize,
    /// The policy whose rules these are. Where a sidecar has rules of several policies, it may call one `POLICY/RULE`: events name it so, too.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub policy: Option<String>,
    /// Which rules follow which tables. None: nobody does any more, and relays take away what they have made of slot and publication.
    pub follows: Vec<Follow>,
}

/// A table that a rule follows.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Follow {
    /// The rule's name.
    pub rule: String,
    /// The table.
    pub table: TableName,
    /// What a changed row means for the rule's keys.
    pub touches: Touches,
}

impl Feed {
    /// What is wrong with its names. The text names the remedy.
    ///
    /// # Errors
    /// The first thing.
    pub fn check(&self) -> Result<(), String> {
        for (what, name) in [("slot", &self.slot), ("publication", &self.publication)] {
            let is_plain = name.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'_');
            if !is_plain || !(1..=MOST_NAME_BYTES).contains(&name.len()) {
                let name: String = name.chars().take(80).collect();
                return Err(format!(
                    "`{name}` is no name of a {what}: write up to {MOST_NAME_BYTES} small letters, digits and _"
                ));
            }
        }
        Ok(())
    }
}

/// The oldest form of snapshots whose readers understand these feeds.
pub fn required_form(feeds: &[Feed]) -> u32 {
    let names_tags = |feed: &Feed| feed.follows.iter().any(|follow| matches!(follow.touches, Touches::Tag { .. }));
    match feeds {
        [] => 1,
        feeds if feeds.iter().any(names_tags) => 9,
        _ => 6,
    }
}

/// Which keys of a rule a changed row is about.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", rename_all_fields = "camelCase", deny_unknown_fields)]
pub enum Touches {
    /// The one that the rule's pattern gives with the row's columns for its parts: with those of the row as it was, and as it is.
    Key {
        /// The columns of parts that have another name than theirs. A part that is not here has the column of its own name.
        #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
        columns: BTreeMap<String, String>,
    },
    /// Those that have the tag which this template gives with the row's columns for its parts: with those of the row as it was, and as it is.
    Tag {
        /// The template. Its parts are columns, and not parts of the rule's keys.
        tag: KeyPattern,
        /// As for a key.
        #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
        columns: BTreeMap<String, String>,
    },
    /// All of them.
    All {},
}

impl Touches {
    /// The tag's template, where a change is about a tag.
    pub fn tag(&self) -> Option<&KeyPattern> {
        match self {
            Self::Tag { tag, .. } => Some(tag),
            Self::Key { .. } | Self::All {} => None,
        }
    }
}

impl Follow {
    /// What is made from a row: a key of these, or a tag. None where a change touches all keys.
    pub fn template<'a>(&'a self, keys: &'a KeyPattern) -> Option<&'a KeyPattern> {
        match &self.touches {
            Touches::All {} => None,
            Touches::Key { .. } => Some(keys),
            Touches::Tag { tag, .. } => Some(tag),
        }
    }

    /// The columns for the parts of its template, in their order.
    pub fn columns<'a>(&'a self, keys: &'a KeyPattern) -> Vec<&'a str> {
        let (Touches::Key { columns } | Touches::Tag { columns, .. }) = &self.touches else { return Vec::new() };
        let parts = self.template(keys).into_iter().flat_map(KeyPattern::parts);
        parts.map(|part| columns.get(part).map_or(part, String::as_str)).collect()
    }

    /// What is wrong with it for a rule of these keys. The text names the remedy.
    ///
    /// # Errors
    /// The first thing.
    pub fn check(&self, keys: &KeyPattern) -> Result<(), String> {
        let (what, template, columns) = match &self.touches {
            Touches::All {} => return Ok(()),
            Touches::Key { .. } if keys.parts().next().is_none() => {
                return Err(format!("the keys `{keys}` have no part that a row of `{}` could say: write all: true", self.table));
            }
            Touches::Key { columns } => ("keys", keys, columns),
            Touches::Tag { tag, .. } if tag.as_str().len() > MAX_TAG_BYTES => {
                return Err(format!("a tag has at most {MAX_TAG_BYTES} bytes: write a shorter one"));
            }
            Touches::Tag { tag, columns } => ("tag", tag, columns),
        };
        for (part, column) in columns {
            if !template.parts().any(|known| known == part) {
                let known = template.parts().collect::<Vec<_>>().join(", ");
                return Err(match known.as_str() {
                    "" => format!("the {what} `{template}` has no part `{part}`: remove columns"),
                    known => {
                        format!("no part `{part}` is in the {what} `{template}`: columns names a column for each of {known}")
                    }
                });
            }
            if column.is_empty() || column.len() > MOST_NAME_BYTES {
                return Err(format!(
                    "the column of `{part}` has no name that Postgres takes: write 1 to {MOST_NAME_BYTES} bytes"
                ));
            }
        }
        Ok(())
    }
}

/// A table's name as the database's catalogue has it: `users`, of the schema `public`, or `shop.users`. Letters count as they are, without
/// the folding of SQL's names outside quotes.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct TableName {
    schema: String,
    table: String,
}

/// Why a text is no table's name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is no name of a table: write TABLE or SCHEMA.TABLE as the catalogue has it, each of 1 to {MOST_NAME_BYTES} bytes")]
pub struct TableNameError(String);

impl TableName {
    /// Its schema.
    pub fn schema(&self) -> &str {
        &self.schema
    }

    /// Its own name.
    pub fn table(&self) -> &str {
        &self.table
    }

    /// Whether it is the table of this schema and name.
    pub fn is(&self, schema: &str, table: &str) -> bool {
        self.schema == schema && self.table == table
    }
}

impl FromStr for TableName {
    type Err = TableNameError;

    fn from_str(text: &str) -> Result<Self, TableNameError> {
        let (schema, table) = text.split_once('.').unwrap_or((DEFAULT_SCHEMA, text));
        let is_name = |name: &str| {
            (1..=MOST_NAME_BYTES).contains(&name.len()) && !name.chars().any(|c| c.is_control() || matches!(c, '.' | '"'))
        };
        match is_name(schema) && is_name(table) {
            true => Ok(Self { schema: schema.to_owned(), table: table.to_owned() }),
            false => Err(TableNameError(text.chars().take(140).collect())),
        }
    }
}

impl TryFrom<String> for TableName {
    type Error = TableNameError;

    fn try_from(text: String) -> Result<Self, TableNameError> {
        text.parse()
    }
}

impl From<TableName> for String {
    fn from(name: TableName) -> Self {
        name.to_string()
    }
}

impl fmt::Display for TableName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.schema == DEFAULT_SCHEMA {
            true => f.write_str(&self.table),
            false => write!(f, "{}.{}", self.schema, self.table),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_are_named_as_the_catalogue_does() {
        for (text, schema, table) in
            [("users", "public", "users"), ("shop.Users", "shop", "Users"), ("public.a b", "public", "a b")]
        {
            let name: TableName = text.parse().expect("a name");
            assert!(name.is(schema, table), "{name:?}");
            assert_eq!(name.to_string().parse(), Ok(name));
        }
        for bad in ["", ".", "a.", ".b", "a.b.c", "\"users\"", "a\0", &"a".repeat(64)] {
            assert!(bad.parse::<TableName>().is_err(), "{bad}");
        }
    }

    fn key(columns: &[(&str, &str)]) -> Follow {
        let columns = columns.iter().map(|(part, column)| ((*part).to_owned(), (*column).to_owned())).collect();
        Follow { rule: "order".to_owned(), table: "users".parse().expect("a name"), touches: Touches::Key { columns } }
    }

    #[test]
    fn parts_have_the_columns_of_their_names_or_those_that_are_said() {
        let keys: KeyPattern = "order:{user}:{id}".parse().expect("a pattern");
        assert_eq!(key(&[]).columns(&keys), ["user", "id"]);
        assert_eq!(key(&[("user", "user_id")]).columns(&keys), ["user_id", "id"]);
        assert_eq!(key(&[("user", "user_id")]).check(&keys), Ok(()));
        for (changes, keys, word) in [
            (key(&[("person", "user_id")]), "order:{user}:{id}", "no part `person` is in the keys"),
            (key(&[("user", "")]), "order:{user}:{id}", "no name that Postgres takes"),
            (key(&[]), "settings", "all: true"),
        ] {
            let error = changes.check(&keys.parse().expect("a pattern")).expect_err(word);
            assert!(error.contains(word), "{error}");
        }
        let all = Follow { touches: Touches::All {}, ..key(&[]) };
        assert!(all.check(&"settings".parse().expect("a pattern")).is_ok() && all.columns(&keys).is_empty());
    }

    #[test]
    fn a_tag_is_made_from_columns_and_not_from_parts_of_the_keys() {
        let keys: KeyPattern = "page:{number}".parse().expect("a pattern");
        let tag = |text: &str, columns: &[(&str, &str)]| {
            let columns = columns.iter().map(|(part, column)| ((*part).to_owned(), (*column).to_owned())).collect();
            Follow { touches: Touches::Tag { tag: text.parse().expect("a pattern"), columns }, ..key(&[]) }
        };
        assert_eq!(tag("author:{id}:{lang}", &[("id", "author_id")]).columns(&keys), ["author_id", "lang"]);
        for (follow, word) in [
            (tag("author:{id}", &[("id", "author_id")]), None),
            (tag("prices", &[]), None),
            (tag("author:{id}", &[("number", "id")]), Some("no part `number` is in the tag `author:{id}`")),
            (tag("prices", &[("id", "id")]), Some("remove columns")),
            (tag("author:{id}", &[("id", "")]), Some("no name that Postgres takes")),
        ] {
            let checked = follow.check(&keys);
            assert_eq!(checked.is_err(), word.is_some(), "{checked:?}");
            assert!(word.is_none_or(|word| checked.is_err_and(|why| why.contains(word))), "{word:?}");
        }
        let follow = tag("author:{id}", &[]);
        let json = r#"{"rule":"order","table":"users","touches":{"tag":{"tag":"author:{id}"}}}"#;
        assert_eq!(serde_json::to_string(&follow).expect("JSON"), json);
        let feed = |follows: Vec<Follow>| Feed {
            origin: "db".to_owned(),
            slot: "a".to_owned(),
            publication: "a".to_owned(),
            given: false,
            max_lag: ByteSize::from_bytes(1),
            policy: None,
            follows,
        };
        let forms = [required_form(&[]), required_form(&[feed(vec![key(&[])])]), required_form(&[feed(vec![key(&[]), follow])])];
        assert_eq!(forms, [1, 6, 9]);
    }

    #[test]
    fn a_feed_reads_back_as_it_is_written() {
        let json = r#"{"origin":"db","slot":"larder_main_db","publication":"larder_main_db","maxLag":"1Gi","follows":[{"rule":"order","table":"shop.users","touches":{"key":{"columns":{"id":"user_id"}}}}]}"#;
        let feed: Feed = serde_json::from_str(json).expect("a feed");
        assert_eq!(serde_json::to_string(&feed).expect("JSON"), json);
        assert_eq!(feed.check(), Ok(()));
        let short = serde_json::from_str::<Follow>(r#"{"rule":"order","table":"users","touches":{"key":{}}}"#);
        assert_eq!(short.expect("a table"), key(&[]));
        for (wrong, word) in [
            (Feed { slot: "Larder".to_owned(), ..feed.clone() }, "`Larder` is no name of a slot"),
            (Feed { publication: "a\"".to_owned(), ..feed }, "no name of a publication"),
        ] {
            assert!(wrong.check().is_err_and(|why| why.contains(word)), "{word}");
        }
    }
}
