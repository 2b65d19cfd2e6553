//! The structure of a document: fields, types and bounds.

use std::collections::HashSet;

use serde_json::{Map, Value};

use super::{Kind, suggest, unsupported};
use crate::api::finding::{Finding, Severity};
use crate::api::manifest::{Document, Entry, Node, Tree};
use crate::api::path::{FieldPath, at};

/// What ObjectMeta has.
const METADATA_FIELDS: &[&str] = &[
    "name",
    "namespace",
    "labels",
    "annotations",
    "generateName",
    "finalizers",
    "ownerReferences",
    "creationTimestamp",
    "deletionGracePeriodSeconds",
    "deletionTimestamp",
    "generation",
    "managedFields",
    "resourceVersion",
    "selfLink",
    "uid",
];

/// What is wrong with the structure of `document`.
pub(super) fn validate(kind: Kind, document: &Document, schema: &Value) -> Vec<Finding> {
    let mut walk = Walk { kind, document, findings: Vec::new() };
    walk.top(schema);
    walk.findings
}

/// What is wrong with `document` as a Secret.
pub(super) fn validate_secret(document: &Document) -> Vec<Finding> {
    const FIELDS: [&str; 7] = ["apiVersion", "kind", "metadata", "type", "data", "stringData", "immutable"];
    let mut findings = validate_metadata(document);
    let mut refuse = |path, what: String, remedy: &str| findings.push(document.finding(Severity::Error, path, what, remedy));
    let Tree::Map(entries) = &document.root.value else {
        return findings;
    };
    for Entry { key, value, .. } in entries {
        let path = FieldPath::root().key(key);
        if !FIELDS.contains(&key.as_str()) {
            refuse(path, format!("there is no field `{key}`"), &suggest::remedy(key, FIELDS.into_iter()));
        } else if ["data", "stringData"].contains(&key.as_str()) {
            let Tree::Map(texts) = &value.value else {
                refuse(path, "it is not a map".to_owned(), "write entries, as {url: …}");
                continue;
            };
            for entry in texts.iter().filter(|entry| entry.value.as_str().is_none()) {
                refuse(path.key(&entry.key), "it is not a text".to_owned(), "put it in quotes");
            }
        }
    }
    findings
}

/// What is wrong with the metadata of any object.
fn validate_metadata(document: &Document) -> Vec<Finding> {
    let mut findings = Vec::new();
    let mut refuse = |path, what: String, remedy: &str| findings.push(document.finding(Severity::Error, path, what, remedy));
    let path = at!("metadata");
    let Some(Node { value: Tree::Map(entries), .. }) = document.root.get("metadata") else {
        refuse(path, "the object has no metadata".to_owned(), "write metadata.name");
        return findings;
    };
    for entry in entries {
        if !METADATA_FIELDS.contains(&entry.key.as_str()) {
            let remedy = suggest::remedy(&entry.key, METADATA_FIELDS.iter().copied());
            refuse(path.key(&entry.key), format!("there is no field `{}`", entry.key), &remedy);
        }
    }
    for (field, required) in [("name", true), ("namespace", false)] {
        let found = entries.iter().find(|entry| entry.key == field).map(|entry| &entry.value);
        match found.map(|node| (node, node.as_str())) {
            None if required => refuse(path.clone(), "the object has no name".to_owned(), "write metadata.name"),
            None => {}
            Some((_, Some(name))) if is_object_name(name) => {}
            Some(_) => {
                let remedy = "write lower-case letters, digits, dashes and dots, beginning and ending with a letter or digit";
                refuse(path.key(field), format!("the {field} is not one that Kubernetes takes"), remedy);
            }
        }
    }
    findings
}

fn is_object_name(name: &str) -> bool {
    let edge = |byte: Option<&u8>| byte.is_some_and(u8::is_ascii_alphanumeric);
    let bytes = name.as_bytes();
    let inner = |byte: &u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || *byte == b'-' || *byte == b'.';
    bytes.len() <= 253 && edge(bytes.first()) && edge(bytes.last()) && bytes.iter().all(inner)
}

struct Walk<'a> {
    kind: Kind,
    document: &'a Document,
    findings: Vec<Finding>,
}

impl Walk<'_> {
    fn refuse(&mut self, path: FieldPath, what: impl Into<String>, remedy: impl Into<String>) {
        self.findings.push(self.document.finding(Severity::Error, path, what, remedy));
    }

    fn top(&mut self, schema: &Value) {
        self.findings.extend(validate_metadata(self.document));
        let Tree::Map(entries) = &self.document.root.value else {
            return;
        };
        for Entry { key, .. } in entries {
            // An object as `kubectl get -o yaml` shows it has a status, which nobody writes.
            if !["apiVersion", "kind", "metadata", "spec", "status"].contains(&key.as_str()) {
                let remedy = suggest::remedy(key, ["metadata", "spec"].into_iter());
                self.refuse(FieldPath::root().key(key), format!("there is no field `{key}`"), remedy);
            }
        }
        let Some(schema) = schema.pointer("/properties/spec") else {
            return;
        };
        match self.document.root.get("spec") {
            Some(spec) => self.value(schema, spec, &at!("spec")),
            None => self.refuse(FieldPath::root(), "the object has no spec", "write one"),
        }
    }

    fn value(&mut self, schema: &Value, node: &Node, path: &FieldPath) {
        let text = |key: &str| schema.get(key).and_then(Value::as_str);
        match (text("type"), &node.value) {
            (Some("object"), Tree::Map(entries)) => self.map(schema, entries, path),
            (Some("array"), Tree::List(items)) => self.list(schema, items, path),
            (Some("string"), Tree::Scalar(Value::String(text))) => self.text(schema, text, path),
            (Some("integer"), Tree::Scalar(Value::Number(number))) if number.is_i64() || number.is_u64() => {
                self.number(schema, number.as_f64().unwrap_or_default(), path);
            }
            (Some("number"), Tree::Scalar(Value::Number(number))) => {
                self.number(schema, number.as_f64().unwrap_or_default(), path);
            }
            (Some("boolean"), Tree::Scalar(Value::Bool(_))) => {}
            (Some(wanted), found) => {
                let (found, hint) = describe(wanted, found);
                self.refuse(path.clone(), format!("{found} stands where {} belongs", article(wanted)), hint);
            }
            (None, _) => {}
        }
    }

    fn map(&mut self, schema: &Value, entries: &[Entry], path: &FieldPath) {
        let none = Map::new();
        let properties = schema.get("properties").and_then(Value::as_object).unwrap_or(&none);
        let others = schema.get("additionalProperties");
        let present = |entry: &&Entry| entry.value.value != Tree::Scalar(Value::Null);
        for Entry { key, value, .. } in entries.iter().filter(present) {
            match properties.get(key).or(others) {
                Some(schema) => self.value(schema, value, &path.key(key)),
                None => self.unknown(path.key(key), key, properties),
            }
        }
        for required in schema.get("required").and_then(Value::as_array).into_iter().flatten().filter_map(Value::as_str) {
            if !entries.iter().filter(present).any(|entry| entry.key == required) {
                self.refuse(path.clone(), format!("`{required}` is missing"), format!("write {required}"));
            }
        }
        if others.is_some() {
            self.count(schema, entries.len(), ["minProperties", "maxProperties"], "entries", path);
        }
    }

    /// A field that the schema does not have: one that is not supported yet, or a slip of the pen.
    fn unknown(&mut self, path: FieldPath, key: &str, properties: &Map<String, Value>) {
        match unsupported::field(self.kind, &path) {
            Some(sentence) => self.refuse(path, format!("`{key}` is not supported yet"), sentence),
            None => {
                let remedy = suggest::remedy(key, properties.keys().map(String::as_str));
                self.refuse(path, format!("there is no field `{key}`"), remedy);
            }
        }
    }

    fn list(&mut self, schema: &Value, items: &[Node], path: &FieldPath) {
        self.count(schema, items.len(), ["minItems", "maxItems"], "elements", path);
        if let Some(schema) = schema.get("items") {
            for (index, item) in items.iter().enumerate() {
                self.value(schema, item, &path.index(index));
            }
        }
        let keys = schema.get("x-kubernetes-list-map-keys").and_then(Value::as_array).into_iter().flatten();
        for key in keys.filter_map(Value::as_str) {
            let mut seen = HashSet::new();
            for (index, item) in items.iter().enumerate() {
                let name = item.get(key).and_then(Node::as_str);
                if name.is_some_and(|name| !seen.insert(name)) {
                    let what = format!("the {key} `{}` is used twice", name.unwrap_or_default());
                    self.refuse(path.index(index).key(key), what, format!("give each its own {key}"));
                }
            }
        }
    }

    fn count(&mut self, schema: &Value, count: usize, [least, most]: [&str; 2], unit: &str, path: &FieldPath) {
        let bound = |key| schema.get(key).and_then(Value::as_u64);
        if let Some(least) = bound(least).filter(|least| (count as u64) < *least) {
            self.refuse(path.clone(), format!("there are fewer than {least} {unit}"), format!("write at least {least}"));
        }
        if let Some(most) = bound(most).filter(|most| count as u64 > *most) {
            self.refuse(path.clone(), format!("there are {count} {unit}, more than {most}"), "split the object");
        }
    }

    fn text(&mut self, schema: &Value, text: &str, path: &FieldPath) {
        if let Some(allowed) = schema.get("enum").and_then(Value::as_array) {
            let allowed: Vec<&str> = allowed.iter().filter_map(Value::as_str).collect();
            if !allowed.contains(&text) {
                self.refuse(path.clone(), format!("`{text}` is not one of its values"), suggest::one_of(text, &allowed));
            }
            return;
        }
        let length = text.chars().count();
        let bound = |key| schema.get(key).and_then(Value::as_u64);
        if bound("minLength").is_some_and(|least| (length as u64) < least) {
            self.refuse(path.clone(), "it is empty", "write it, or remove the field");
        }
        if let Some(most) = bound("maxLength").filter(|most| length as u64 > *most) {
            self.refuse(path.clone(), format!("it has {length} characters, more than {most}"), "shorten it");
        }
    }

    fn number(&mut self, schema: &Value, number: f64, path: &FieldPath) {
        let bound = |key| schema.get(key).and_then(Value::as_f64);
        let explained = || unsupported::bound(self.kind, path);
        if let Some(least) = bound("minimum").filter(|least| number < *least) {
            let remedy = explained().map_or_else(|| format!("write at least {least}"), str::to_owned);
            self.refuse(path.clone(), format!("{number} is less than {least}"), remedy);
        }
        if let Some(most) = bound("maximum").filter(|most| number > *most) {
            self.refuse(path.clone(), format!("{number} is more than {most}"), format!("write at most {most}"));
        }
    }
}

fn article(wanted: &str) -> &'static str {
    match wanted {
        "object" => "a map",
        "array" => "a list",
        "string" => "a text",
        "integer" => "a whole number",
        "number" => "a number",
        "boolean" => "true or false",
        _ => "another value",
    }
}

/// What stands there, and what to write instead.
fn describe(wanted: &str, found: &Tree) -> (String, String) {
    let (found, is_scalar) = match found {
        Tree::Scalar(Value::Null) => ("nothing".to_owned(), false),
        Tree::Scalar(Value::Bool(truth)) => (format!("the truth value {truth}"), true),
        Tree::Scalar(Value::Number(number)) => (format!("the number {number}"), true),
        Tree::Scalar(_) => ("a text".to_owned(), true),
        Tree::List(_) => ("a list".to_owned(), false),
        Tree::Map(_) => ("a map".to_owned(), false),
    };
    let hint = match wanted {
        "string" if is_scalar => "put it in quotes",
        "integer" if is_scalar => "write a whole number, without quotes",
        "number" if is_scalar => "write a number, without quotes",
        "boolean" if is_scalar => "write true or false, without quotes",
        "object" => "write its fields, as {field: value}; `kubectl explain` shows them",
        "array" => "write its elements, each behind a dash",
        _ => "correct it; `kubectl explain` shows the fields",
    };
    (found, hint.to_owned())
}
