//! Validation of documents against the schemas of the CustomResourceDefinitions, as the API server does it: structure first, then
//! the CEL rules, whose messages are shown word for word.

mod rules;
mod structure;
mod suggest;
mod unsupported;

use serde_json::Value;

use super::crd::{self, CrdError};
use super::finding::Finding;
use super::manifest::Document;
use rules::Rules;

/// The schemas of both kinds, and their rules as programs.
pub struct Schemas {
    cache_cluster: Value,
    cache_policy: Value,
    rules: Rules,
}

/// A kind that has a schema.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A cache tier.
    CacheCluster,
    /// How workloads use one.
    CachePolicy,
}

impl Kind {
    /// The kind's name.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::CacheCluster => "CacheCluster",
            Self::CachePolicy => "CachePolicy",
        }
    }
}

impl Schemas {
    /// Builds the schemas from the types, and compiles their rules.
    pub fn load() -> Result<Self, CrdError> {
        let schema = |crd| {
            let json = serde_json::to_value(crd)?;
            Ok::<_, CrdError>(json.pointer("/spec/versions/0/schema/openAPIV3Schema").cloned().unwrap_or_default())
        };
        let (cache_cluster, cache_policy) = (schema(crd::cache_cluster()?)?, schema(crd::cache_policy()?)?);
        let mut rules = Rules::default();
        rules.compile(&cache_cluster)?;
        rules.compile(&cache_policy)?;
        Ok(Self { cache_cluster, cache_policy, rules })
    }

    /// What is wrong with `document` as a `kind`: its structure, or, where that is right, what breaks a rule.
    pub fn validate(&self, kind: Kind, document: &Document) -> Vec<Finding> {
        let schema = match kind {
            Kind::CacheCluster => &self.cache_cluster,
            Kind::CachePolicy => &self.cache_policy,
        };
        let findings = structure::validate(kind, document, schema);
        if findings.is_empty() { self.rules.validate(document, schema) } else { findings }
    }
}

/// What is wrong with `document` as a core/v1 Secret.
pub fn validate_secret(document: &Document) -> Vec<Finding> {
    structure::validate_secret(document)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_rule_of_the_definitions_compiles() {
        let schemas = Schemas::load().expect("the schemas load");
        assert!(schemas.rules.count() > 20);
    }
}
