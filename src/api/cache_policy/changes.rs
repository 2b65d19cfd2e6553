//! Tables whose changes end cached values, as a CachePolicy says it.

use std::collections::BTreeMap;

use kube::KubeSchema;
use serde::{Deserialize, Serialize};

use crate::api::text::{ColumnText, NameText, SlotText, StorageText, TableText, TagText};
use crate::policy::ByteSize;

/// The most tables that a rule may follow.
pub const MAX_CHANGES: usize = 8;

/// A table whose committed changes end the values of keys that are made from its rows.
#[derive(KubeSchema, Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[x_kube(validation = Rule::new("!has(self.all) || !self.all || !has(self.columns)")
    .message("all: true is about every key of the rule, whatever its row says: remove columns, or all"))]
#[x_kube(validation = Rule::new("!has(self.all) || !self.all || !has(self.tag)")
    .message("all: true is about every key of the rule, whatever its tags are: remove tag, or all"))]
pub struct ChangesSpec {
    /// The table as the catalogue has it: users, of the schema public, or shop.users. A partitioned table stands for its partitions.
    #[schemars(with = "TableText")]
    pub table: String,
    /// The name of the one of spec.origins that has it, an sql origin on Postgres. Default: the one that the rule itself loads from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<NameText>")]
    pub origin: Option<String>,
    /// The tag that a row is about, instead of a key, in which {column} stands for that column of the row: with tag author:{id} the change of
    /// the author 7 ends all values that have the tag author:7, of whatever rule. A row is about the tag of the row as it was, and about that
    /// of the row as it is. Values of the rule must be able to have such a tag: by its tags, or under versioned: Entity.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<TagText>")]
    pub tag: Option<String>,
    /// For parts of the keys, or of the tag, the columns that have their values. A part that is not named here has the column of its own name:
    /// under keys user:{id} a row is about the key that its column id gives, as it was and as it is.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    #[schemars(with = "BTreeMap<String, ColumnText>", extend("maxProperties" = 8))]
    pub columns: BTreeMap<String, String>,
    /// Whether each change is about every key of the rule. Default false.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub all: Option<bool>,
}

/// How the changes of a database are followed, where rules follow its tables.
#[derive(KubeSchema, Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct FeedSpec {
    /// The name of the replication slot. Where there is none of this name it is made, and taken away when no rule follows any more. One that somebody
    /// else has made before, of a name that does not begin with larder_, stays. Each cache that follows a database needs a slot of its own. Default: a
    /// name made of the CacheCluster's and the origin's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<SlotText>")]
    pub slot: Option<String>,
    /// A publication that somebody else has made, with all tables that rules follow. Default: one is made, kept and taken away, for which the
    /// login of the URL has to own the tables.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<SlotText>")]
    pub publication: Option<String>,
    /// How much of its log the database keeps while the cache takes no events; beyond that the slot is given up, and what follows is invalidated
    /// as a whole. While no relay runs, only the database's own max_slot_wal_keep_size bounds it. Default 1Gi.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<StorageText>")]
    pub max_lag: Option<ByteSize>,
}
