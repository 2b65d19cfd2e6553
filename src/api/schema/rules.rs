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
        let mut own = rules_of(schema).peekable();
        if own.peek().is_some() {
            let bound = to_cel(value);
            for Rule { text, message } in own {
                if let Err(why) = self.evaluate(context, text, &bound) {
                    let evaluated = why.is_none();
                    broken.push(Broken { path: path.clone(), message: why.unwrap_or_else(|| message.to_owned()), evaluated });
                }
            }
        }
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
