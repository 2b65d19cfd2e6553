//! The CustomResourceDefinitions, as `kubectl apply` takes them.

use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::CustomResourceExt as _;
use serde_json::Value;

use super::{CacheCluster, CachePolicy};

/// One definition as a file.
pub struct CrdFile {
    /// The name that the file has in `crds/`.
    pub name: &'static str,
    /// Its text.
    pub yaml: String,
}

/// Why definitions could not be written: never, unless a type of the resources has no schema.
#[derive(Debug, thiserror::Error)]
pub enum CrdError {
    /// The schema is not one of the API server's.
    #[error("a definition is not a CustomResourceDefinition: {0}")]
    Schema(#[from] serde_json::Error),
    /// A CEL rule is not one.
    #[error("the rule `{rule}` does not compile: {why}")]
    Rule {
        /// The rule.
        rule: String,
        /// What the compiler says.
        why: String,
    },
    /// It does not serialise.
    #[error("a definition cannot be written as YAML: {0}")]
    Yaml(#[from] serde_saphyr::ser::Error),
}

/// All definitions.
pub fn files() -> Result<Vec<CrdFile>, CrdError> {
    let file = |name, crd: CustomResourceDefinition| -> Result<CrdFile, CrdError> {
        let yaml = serde_saphyr::to_string(&crd)?;
        Ok(CrdFile { name, yaml: format!("# Written by `larder crds`; a test fails when the two differ.\n{yaml}") })
    };
    Ok(vec![file("larder.dev_cacheclusters.yaml", cache_cluster()?)?, file("larder.dev_cachepolicies.yaml", cache_policy()?)?])
}

/// The definition of CacheCluster.
pub fn cache_cluster() -> Result<CustomResourceDefinition, serde_json::Error> {
    polished(CacheCluster::crd())
}

/// The definition of CachePolicy.
pub fn cache_policy() -> Result<CustomResourceDefinition, serde_json::Error> {
    polished(CachePolicy::crd())
}

/// Takes out what says nothing to the API server: `nullable`, so that an empty field is an absent one and rules see no null, and
/// number formats that it does not know and warns of.
fn polished(crd: CustomResourceDefinition) -> Result<CustomResourceDefinition, serde_json::Error> {
    let mut json = serde_json::to_value(crd)?;
    polish(&mut json);
    serde_json::from_value(json)
}

fn polish(json: &mut Value) {
    match json {
        Value::Object(fields) => {
            if fields.get("nullable") == Some(&Value::Bool(true)) {
                fields.remove("nullable");
            }
            if fields.get("format").and_then(Value::as_str).is_some_and(|format| format.starts_with("uint")) {
                fields.remove("format");
            }
            fields.values_mut().for_each(polish);
        }
        Value::Array(items) => items.iter_mut().for_each(polish),
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_says_nullable() {
        for crd in [cache_cluster(), cache_policy()] {
            let json = serde_json::to_string(&crd.expect("valid")).expect("serialises");
            assert!(!json.contains("nullable") && !json.contains("uint"), "{json}");
        }
    }
}
