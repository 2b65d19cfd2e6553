//! The schema of a label selector.

use std::borrow::Cow;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};

/// The schema of `workloads.matchLabels`; never built.
pub enum MatchLabelsSchema {}

impl JsonSchema for MatchLabelsSchema {
    fn inline_schema() -> bool {
        true
    }

    fn schema_name() -> Cow<'static, str> {
        "MatchLabels".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({
            "type": "object",
            "minProperties": 1,
            "maxProperties": 16,
            "additionalProperties": {
                "type": "string",
                "maxLength": 63,
                "x-kubernetes-validations": [{
                    "rule": "self.matches('^(([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9])?$')",
                    "message": "write a label's value: letters, digits, dashes, underscores and dots",
                }],
            },
            "x-kubernetes-validations": [{
                "rule": "self.all(key, size(key) <= 317 && key.matches('^([a-z0-9]([-.a-z0-9]*[a-z0-9])?/)?[A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?$'))",
                "message": "write labels such as app or app.kubernetes.io/name",
            }],
        })
    }
}
