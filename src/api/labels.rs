//! The schemas of maps of labels and annotations.

use std::borrow::Cow;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde_json::{Value, json};

/// Labels that Larder gives pods itself, and selects them by.
const OWN_KEYS: &str =
    "^(larder[.]dev/.*|app[.]kubernetes[.]io/(name|instance|component|managed-by)|(apps|statefulset)[.]kubernetes[.]io/.*)$";

fn labels(least: usize, own_keys_too: bool) -> Schema {
    let mut rules = vec![key_rule("write labels such as app or app.kubernetes.io/name")];
    if !own_keys_too {
        rules.push(own_rule());
    }
    let mut schema = json_schema!({
        "type": "object",
        "maxProperties": 16,
        "additionalProperties": {
            "type": "string",
            "maxLength": 63,
            "x-kubernetes-validations": [{
                "rule": "self.matches('^(([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9])?$')",
                "message": "write a label's value: letters, digits, dashes, underscores and dots",
            }],
        },
        "x-kubernetes-validations": rules,
    });
    if least > 0 {
        schema.insert("minProperties".to_owned(), json!(least));
    }
    schema
}

fn annotations() -> Schema {
    json_schema!({
        "type": "object",
        "maxProperties": 16,
        "additionalProperties": { "type": "string", "maxLength": 1024 },
        "x-kubernetes-validations": [key_rule("write annotations such as team or example.com/team"), own_rule()],
    })
}

fn key_rule(message: &str) -> Value {
    json!({
        "rule": "self.all(key, size(key) <= 317 && key.matches('^([a-z0-9]([-.a-z0-9]*[a-z0-9])?/)?[A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?$'))",
        "message": message,
    })
}

fn own_rule() -> Value {
    json!({
        "rule": format!("!self.exists(key, key.matches('{OWN_KEYS}'))"),
        "message": "Larder and Kubernetes set larder.dev/*, app.kubernetes.io/name, instance, component and managed-by themselves: choose other keys",
    })
}

macro_rules! map_schemas {
    ($($(#[$doc:meta])* $name:ident($schema:expr))+) => {$(
        $(#[$doc])*
        pub enum $name {}

        impl JsonSchema for $name {
            fn inline_schema() -> bool {
                true
            }

            fn schema_name() -> Cow<'static, str> {
                stringify!($name).into()
            }

            fn json_schema(_: &mut SchemaGenerator) -> Schema {
                $schema
            }
        }
    )+};
}

map_schemas! {
    /// The schema of `workloads.matchLabels`; never built.
    MatchLabelsSchema(labels(1, true))
    /// The schema of labels that nodes, pods or namespaces must have, if any; never built.
    LabelsSchema(labels(0, true))
    /// The schema of labels that are given to pods; never built.
    PodLabelsSchema(labels(0, false))
    /// The schema of annotations that are given to pods; never built.
    PodAnnotationsSchema(annotations())
}
