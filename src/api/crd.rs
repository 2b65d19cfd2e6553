//! The CustomResourceDefinitions, as `kubectl apply` takes them.

use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::CustomResourceExt as _;
use serde_json::Value;

use super::{CacheCluster, CachePolicy};

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
