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

/// The longest texts of a condition, as Kubernetes bounds those of its own kinds; the library's schema leaves them out.
const CONDITION_CHARS: [(&str, u32); 4] = [("type", 316), ("status", 7), ("reason", 1024), ("message", 32768)];

/// Takes out what says nothing to the API server: `nullable`, so that an empty field is an absent one and rules see no null, and
/// number formats that it does not know and warns of. Bounds the texts of conditions.
fn polished(crd: CustomResourceDefinition) -> Result<CustomResourceDefinition, serde_json::Error> {
    let mut json = serde_json::to_value(crd)?;
    polish(&mut json);
    let conditions = "/spec/versions/0/schema/openAPIV3Schema/properties/status/properties/conditions/items/properties";
    if let Some(Value::Object(fields)) = json.pointer_mut(conditions) {
        for (field, chars) in CONDITION_CHARS {
            if let Some(Value::Object(schema)) = fields.get_mut(field) {
                schema.insert("maxLength".to_owned(), chars.into());
            }
        }
    }
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

    /// What the API server and `kubectl explain` need: no list, map or text without a bound, no field without a description.
    /// Returns how many were looked at.
    fn unfinished(schema: &Value, path: &str, found: &mut Vec<String>) -> usize {
        let lacks = |field: &str| schema.get(field).is_none();
        let mut note = |what: &str| found.push(format!("{path}: {what}"));
        if lacks("description") && !path.ends_with("[]") {
            note("no description");
        }
        match schema["type"].as_str() {
            Some("string") if lacks("enum") && lacks("maxLength") && schema["format"] != "date-time" => {
                note("no bound on its length")
            }
            Some("array") if lacks("maxItems") => note("no bound on its elements"),
            Some("object") if !lacks("additionalProperties") && lacks("maxProperties") => note("no bound on its entries"),
            Some("integer" | "number") if lacks("maximum") => note("no greatest value"),
            None => note("no type"),
            Some(_) => {}
        }
        let fields = schema["properties"].as_object().into_iter().flatten();
        let mut below: Vec<_> = fields.map(|(name, inner)| (format!("{path}.{name}"), inner)).collect();
        let elements = ["items", "additionalProperties"].iter().filter_map(|field| schema.get(field));
        below.extend(elements.map(|inner| (format!("{path}[]"), inner)));
        1 + below.into_iter().map(|(path, inner)| unfinished(inner, &path, found)).sum::<usize>()
    }

    #[test]
    fn everything_is_bounded_and_described_and_tables_have_columns() {
        for crd in [cache_cluster(), cache_policy()] {
            let json = serde_json::to_value(crd.expect("valid")).expect("serialises");
            let version = &json["spec"]["versions"][0];
            let properties = &version["schema"]["openAPIV3Schema"]["properties"];
            let (schema, mut found) = (&properties["spec"], Vec::new());
            // What the operator counts ends where its type does.
            assert!(unfinished(&properties["status"], "status", &mut found) > 15);
            found.retain(|what| !what.ends_with("no greatest value"));
            assert!(unfinished(schema, "spec", &mut found) > 15);
            assert!(found.is_empty(), "{}", found.join("\n"));
            let columns = version["additionalPrinterColumns"].as_array().expect("columns");
            assert!(columns.len() >= 5, "{columns:?}");
            for path in columns.iter().map(|column| column["jsonPath"].as_str().expect("a path")) {
                let Some(path) = path.strip_prefix(".spec.") else { continue };
                let pointer = path.replace("[*]", ".items").split('.').fold(String::new(), |pointer, step| match step {
                    "items" => pointer + "/items",
                    step => pointer + "/properties/" + step,
                });
                assert!(schema.pointer(&pointer).is_some(), "a column shows .spec.{path}, which there is not");
            }
        }
    }
}
