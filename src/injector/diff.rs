//! JSON Patch: how one document becomes another.

use serde::Serialize;
use serde_json::{Map, Value};

/// One step.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(tag = "op", rename_all = "lowercase")]
pub enum Step {
    /// A member that was not there.
    Add {
        /// Where.
        path: String,
        /// What.
        value: Value,
    },
    /// Something in place of what is there.
    Replace {
        /// Where.
        path: String,
        /// What.
        value: Value,
    },
    /// A member that is there no more.
    Remove {
        /// Where.
        path: String,
    },
}

/// The steps from one document to another. Lists of different lengths are replaced as a whole.
pub fn steps(from: &Value, to: &Value) -> Vec<Step> {
    let mut found = Vec::new();
    compare(from, to, &mut String::new(), &mut found);
    found
}

fn compare(from: &Value, to: &Value, path: &mut String, found: &mut Vec<Step>) {
    match (from, to) {
        _ if from == to => {}
        (Value::Object(from), Value::Object(to)) => compare_members(from, to, path, found),
        (Value::Array(from), Value::Array(to)) if from.len() == to.len() => {
            for (index, (from, to)) in from.iter().zip(to).enumerate() {
                below(path, &index.to_string(), |path| compare(from, to, path, found));
            }
        }
        _ => found.push(Step::Replace { path: path.clone(), value: to.clone() }),
    }
}

fn compare_members(from: &Map<String, Value>, to: &Map<String, Value>, path: &mut String, found: &mut Vec<Step>) {
    for name in from.keys().filter(|name| !to.contains_key(*name)) {
        below(path, name, |path| found.push(Step::Remove { path: path.clone() }));
    }
    for (name, value) in to {
        below(path, name, |path| match from.get(name) {
            Some(before) => compare(before, value, path, found),
            None => found.push(Step::Add { path: path.clone(), value: value.clone() }),
        });
    }
}

/// Goes one member deeper for as long as `visit` takes.
fn below(path: &mut String, member: &str, visit: impl FnOnce(&mut String)) {
    let length = path.len();
    path.push('/');
    path.push_str(&member.replace('~', "~0").replace('/', "~1"));
    visit(path);
    path.truncate(length);
}

/// Carries the steps out, as the API server does. An error says which could not be.
#[cfg(test)]
pub fn apply(document: &mut Value, steps: &[Step]) -> Result<(), String> {
    for step in steps {
        let (Step::Add { path, .. } | Step::Replace { path, .. } | Step::Remove { path }) = step;
        let failed = || format!("{step:?} does not apply");
        if path.is_empty() {
            let Step::Replace { value, .. } = step else { return Err(failed()) };
            *document = value.clone();
            continue;
        }
        let (parent, name) = path.rsplit_once('/').ok_or_else(failed)?;
        let name = name.replace("~1", "/").replace("~0", "~");
        match (document.pointer_mut(parent).ok_or_else(failed)?, step) {
            (Value::Object(object), Step::Add { value, .. }) => drop(object.insert(name, value.clone())),
            (Value::Object(object), Step::Remove { .. }) => drop(object.remove(&name).ok_or_else(failed)?),
            (Value::Object(object), Step::Replace { value, .. }) => *object.get_mut(&name).ok_or_else(failed)? = value.clone(),
            (Value::Array(list), Step::Replace { value, .. }) => {
                let index: usize = name.parse().map_err(|_| failed())?;
                *list.get_mut(index).ok_or_else(failed)? = value.clone();
            }
            _ => return Err(failed()),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    #[test]
    fn steps_are_as_small_as_their_change() {
        let from = json!({"a": {"b/c": [1, {"d": 2}]}, "gone": 1, "same": [1, 2]});
        let to = json!({"a": {"b/c": [1, {"d": 3}], "~": 4}, "same": [1, 2]});
        let found = serde_json::to_value(steps(&from, &to)).unwrap();
        let expected = json!([
            {"op": "remove", "path": "/gone"},
            {"op": "replace", "path": "/a/b~1c/1/d", "value": 3},
            {"op": "add", "path": "/a/~0", "value": 4},
        ]);
        assert_eq!(found, expected);
        assert!(steps(&to, &to).is_empty());
    }

    fn document() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![Just(Value::Null), any::<bool>().prop_map(Value::from), (0..3).prop_map(Value::from)];
        leaf.prop_recursive(4, 24, 4, |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
                prop::collection::btree_map("[a-c~/]{1,2}", inner, 0..4).prop_map(|members| members.into_iter().collect()),
            ]
        })
    }

    proptest! {
        #[test]
        fn steps_lead_from_one_document_to_the_other(from in document(), to in document()) {
            let mut changed = from.clone();
            apply(&mut changed, &steps(&from, &to)).unwrap();
            prop_assert_eq!(changed, to);
        }
    }
}
