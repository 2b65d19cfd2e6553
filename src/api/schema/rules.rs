//! The CEL rules of a schema (`x-kubernetes-validations`), evaluated as the API server evaluates them.

use std::collections::HashMap;
use std::sync::Arc;

use cel::objects::{Key, Map};
use cel::{Context, Program, Value as Cel};
use serde_json::Value;

use crate::api::crd::CrdError;
use crate::api::finding::{BROKEN_RULE, Finding, Severity};
use crate::api::manifest::Document;
use crate::api::path::{FieldPath, at};

/// The rules of some schemas as programs, by their text.
#[derive(Default)]
pub(super) struct Rules {
    programs: HashMap<String, Program>,
}

/// One entry of `x-kubernetes-validations`.
struct Rule<'a> {
    text: &'a str,
    message: &'a str,
}

impl Rule<'_> {
    /// Whether it compares with an earlier form of the object. A file has none.
    fn is_transition(&self) -> bool {
        self.text.contains("oldSelf")
    }
}

fn rules_of(schema: &Value) -> impl Iterator<Item = Rule<'_>> {
    let entries = schema.get("x-kubernetes-validations").and_then(Value::as_array).into_iter().flatten();
    entries.filter_map(|entry| {
        let text = entry.get("rule")?.as_str()?;
        Some(Rule { text, message: entry.get("message").and_then(Value::as_str).unwrap_or("failed rule") })
    })
}

/// A rule that a document breaks.
struct Broken {
    path: FieldPath,
    message: String,
    /// False where the rule met a value that it could not deal with.
    evaluated: bool,
}

/// The schemas directly below one: of each property, of all other values of a map, of the elements of a list.
fn below(schema: &Value) -> impl Iterator<Item = &Value> {
    let properties = schema.get("properties").and_then(Value::as_object).into_iter().flat_map(|properties| properties.values());
    properties.chain(schema.get("additionalProperties")).chain(schema.get("items"))
}

impl Rules {
    /// Compiles every rule in `schema`.
    pub(super) fn compile(&mut self, schema: &Value) -> Result<(), CrdError> {
        for Rule { text, .. } in rules_of(schema) {
            if !self.programs.contains_key(text) {
                let program =
                    Program::compile(text).map_err(|error| CrdError::Rule { rule: text.to_owned(), why: error.to_string() })?;
                self.programs.insert(text.to_owned(), program);
            }
        }
        below(schema).try_for_each(|inner| self.compile(inner))
    }

    #[cfg(test)]
    pub(super) fn count(&self) -> usize {
        self.programs.len()
    }

    /// The rules that `document` breaks.
    pub(super) fn validate(&self, document: &Document, schema: &Value) -> Vec<Finding> {
        let mut broken = Vec::new();
        let json = document.root.to_json();
        self.check(&Context::default(), schema, &json, &FieldPath::root(), &mut broken);
        if let (Some(spec), Some(schema)) = (json.get("spec"), schema.pointer("/properties/spec")) {
            self.walk(&Context::default(), schema, spec, &at!("spec"), &mut broken);
        }
        // A rule that compares malformed values cannot be evaluated; the rule about the malformed value says it better.
        if broken.iter().any(|broken| broken.evaluated) {
            broken.retain(|broken| broken.evaluated);
        }
        let finding = |broken: Broken| {
            let finding = document.finding(Severity::Error, broken.path, broken.message, "");
            Finding { code: BROKEN_RULE, ..finding }
        };
        broken.into_iter().map(finding).collect()
    }

    fn walk(&self, context: &Context<'_, '_>, schema: &Value, value: &Value, path: &FieldPath, broken: &mut Vec<Broken>) {
        self.check(context, schema, value, path, broken);
        match value {
            Value::Object(fields) => {
                for (key, inner) in fields {
                    let property = schema.get("properties").and_then(|properties| properties.get(key));
                    if let Some(schema) = property.or_else(|| schema.get("additionalProperties")) {
                        self.walk(context, schema, inner, &path.key(key), broken);
                    }
                }
            }
            Value::Array(items) => {
                let Some(schema) = schema.get("items") else { return };
                for (index, inner) in items.iter().enumerate() {
                    self.walk(context, schema, inner, &path.index(index), broken);
                }
            }
            _ => {}
        }
    }

    /// The rules of one value, without those of what is below it.
    fn check(&self, context: &Context<'_, '_>, schema: &Value, value: &Value, path: &FieldPath, broken: &mut Vec<Broken>) {
        let mut own = rules_of(schema).filter(|rule| !rule.is_transition()).peekable();
        if own.peek().is_none() {
            return;
        }
        let bound = to_cel(value);
        for Rule { text, message } in own {
            if let Err(why) = self.evaluate(context, text, &bound) {
                let evaluated = why.is_none();
                broken.push(Broken { path: path.clone(), message: why.unwrap_or_else(|| message.to_owned()), evaluated });
            }
        }
    }

    /// `Err(None)` where the rule is broken, `Err(Some(why))` where it cannot be evaluated, which also refuses the object.
    fn evaluate(&self, context: &Context<'_, '_>, text: &str, bound: &Cel) -> Result<(), Option<String>> {
        let Some(program) = self.programs.get(text) else {
            return Err(Some(format!("the rule `{text}` was not compiled")));
        };
        let mut context = context.new_inner_scope();
        context.add_variable_from_value("self", bound.clone());
        match program.execute(&context) {
            Ok(Cel::Bool(true)) => Ok(()),
            Ok(Cel::Bool(false)) => Err(None),
            Ok(other) => Err(Some(format!("the rule `{text}` gave {other:?}"))),
            Err(error) => Err(Some(format!("the rule `{text}` cannot be evaluated: {error}"))),
        }
    }
}

/// The value as CEL sees it under a structural schema: whole numbers are signed.
fn to_cel(value: &Value) -> Cel {
    match value {
        Value::Null => Cel::Null,
        Value::Bool(truth) => Cel::Bool(*truth),
        Value::Number(number) => number.as_i64().map_or_else(|| Cel::Float(number.as_f64().unwrap_or_default()), Cel::Int),
        Value::String(text) => Cel::String(Arc::new(text.clone())),
        Value::Array(items) => Cel::List(Arc::new(items.iter().map(to_cel).collect())),
        Value::Object(fields) => {
            let map: HashMap<Key, Cel> = fields.iter().map(|(key, value)| (Key::from(key.as_str()), to_cel(value))).collect();
            Cel::Map(Map { map: Arc::new(map) })
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use schemars::{JsonSchema, SchemaGenerator};

    use super::*;
    use crate::api::text::{DurationText, MemoryText, PatternText, PercentText, PositiveDurationText, VersionText};
    use crate::policy::{ByteSize, KeyPattern, Percent, Span};

    /// Whether the schema's rule lets a text pass.
    fn passes<T: JsonSchema>(text: &str) -> bool {
        let schema = serde_json::to_value(T::json_schema(&mut SchemaGenerator::default())).expect("serialises");
        let mut rules = Rules::default();
        rules.compile(&schema).expect("compiles");
        let mut broken = Vec::new();
        rules.walk(&Context::default(), &schema, &Value::String(text.to_owned()), &FieldPath::root(), &mut broken);
        broken.is_empty()
    }

    #[test]
    fn what_users_write_passes() {
        for text in ["250ms", "10s", "5m", "1h30m", "8760h", "24h"] {
            assert!(passes::<PositiveDurationText>(text), "{text}");
        }
        assert!(passes::<DurationText>("0") && passes::<DurationText>("0s"));
        for text in ["0s", "0", "", "5", "5d", "-5m", "1.5h", "8761h", "9999h9999h"] {
            assert!(!passes::<PositiveDurationText>(text), "{text}");
        }
        assert!(["16Mi", "512Mi", "4Gi", "100M"].iter().all(|text| passes::<MemoryText>(text)));
        assert!(["0Mi", "15Mi", "1Ki", "512", "0Gi", "1.5Gi"].iter().all(|text| !passes::<MemoryText>(text)));
        assert!(["7.0", "7.2.4", "8.1", "10.0"].iter().all(|text| passes::<VersionText>(text)));
        assert!(["6.2", "7", "latest", "8.1-rc1"].iter().all(|text| !passes::<VersionText>(text)));
    }

    proptest! {
        /// The resources' types are parsed after the rules have passed, so the rules may let nothing pass that does not parse.
        #[test]
        fn what_passes_also_parses(
            duration in "([0-9]{1,6}(ms|s|m|h|d)?){1,3}",
            share in "[0-9]{0,3}%?",
            size in "[0-9]{1,4}(Mi|Gi|M|G|Ki)?",
        ) {
            prop_assert!(!passes::<DurationText>(&duration) || duration.parse::<Span>().is_ok(), "{}", duration);
            prop_assert!(!passes::<PositiveDurationText>(&duration) || duration.parse::<Span>().is_ok_and(|span| !span.is_zero()));
            prop_assert!(!passes::<PercentText>(&share) || share.parse::<Percent>().is_ok(), "{}", share);
            prop_assert!(!passes::<MemoryText>(&size) || size.parse::<ByteSize>().is_ok_and(|size| size.as_bytes() >= 16_000_000));
        }

        /// A pattern that parses is never refused by the rule; the rule cannot see everything that the parser refuses.
        #[test]
        fn no_good_pattern_is_refused(text in r"([a-z:]|\{[a-z]{1,2}\}|\{[a-z]…\}|\{\{|\}\}|\*){1,6}") {
            prop_assert!(text.parse::<KeyPattern>().is_err() || passes::<PatternText>(&text), "{}", text);
        }
    }
}
