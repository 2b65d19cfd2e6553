//! What ends cached values before their TTL, as a CachePolicy says it.

use kube::KubeSchema;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::changes::{ChangesSpec, MAX_CHANGES};
use crate::api::text::TagText;
use crate::policy::tags::MAX_TAGS;

/// What ends the values of a rule's keys before their TTL.
#[derive(KubeSchema, Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct InvalidateSpec {
    /// Names under which keys can be invalidated together, by the event `tag NAME` or `larder invalidate --tag NAME`, in which {part}
    /// stands for that part of the key: under keys cart:{user}:{shop} and tags user:{user} the key cart:7:tea has the tag user:7. Several
    /// rules may have the same tags. At most 8.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(with = "Vec<TagText>", length(max = MAX_TAGS))]
    pub tags: Vec<String>,
    /// Rule: the cache keeps the rule's keys under names with a version, which is the rule's own, so that one write invalidates all of them,
    /// however many there are; what was loaded before is met by nobody either. Reads may take a second to notice. On such keys GET, SET and
    /// their like are carried out, and other commands are refused by name. Entity: each key has a version of its own as well, which is drawn
    /// anew when the key is invalidated; what is read or written of a key for the first time within a second costs a question more. Only where
    /// strategy is CacheAside or ReadThrough and keys end in a part.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Versioned")]
    pub versioned: Option<Versioned>,
    /// Tables whose committed changes end the values of the keys that are made from their rows. At most 8.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = MAX_CHANGES))]
    pub changes: Vec<ChangesSpec>,
}

/// Which keys share a version.
#[derive(JsonSchema, Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[schemars(inline)]
pub enum Versioned {
    /// All of the rule.
    Rule,
    /// Those, and each has one of its own.
    Entity,
}
