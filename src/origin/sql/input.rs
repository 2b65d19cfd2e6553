//! What a statement that writes takes from a command: parts of the key, the value, members of its JSON object.

use std::borrow::Cow;
use std::collections::HashMap;

use serde_json::value::RawValue;

use super::super::fields::Fields;
use super::template::{Taken, Template};
use super::write::{Deed, Step};

/// One parameter. Whatever it holds, it is bound, never text of a statement.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Input {
    /// NULL: a member that is null, or missing.
    Null,
    /// A part of the key.
    Part(String),
    /// A JSON string, or an array or object as it was written.
    Text(String),
    /// A JSON number as it was written, with all its digits.
    Number(String),
    /// A JSON truth value.
    Truth(bool),
    /// The whole value, or a field of one that is a hash.
    Whole(Vec<u8>),
}

/// The parameters of one statement.
#[derive(Debug)]
pub(super) struct Inputs {
    parts: Vec<Input>,
}

impl Inputs {
    /// What `template` takes from `step`. The error says what is wrong with the value.
    pub(super) fn new(template: &Template, step: &Step) -> Result<Self, String> {
        let mut parts: Vec<Input> = step.parts.iter().cloned().map(Input::Part).collect();
        let (value, by) = match &step.deed {
            Deed::Store(value) => (value.as_slice(), 0),
            Deed::Delete => (&[][..], 0),
            Deed::Increment(by) => (&[][..], *by),
        };
        for taken in template.values() {
            parts.push(match taken {
                Taken::Value(way) if way.is_empty() => Input::Whole(value.to_vec()),
                Taken::Value(way) => member(value, way)?,
                Taken::Field(name) => field(value, name)?,
                Taken::Version => Input::Number(step.version.to_string()),
                Taken::By => Input::Number(by.to_string()),
            });
        }
        Ok(Self { parts })
    }

    /// The one at a place of the template.
    pub(super) fn get(&self, index: usize) -> Input {
        self.parts.get(index).cloned().unwrap_or(Input::Null)
    }
}

/// A field of a hash. One that is missing is no NULL: whoever writes some of the fields would lose the others.
fn field(value: &[u8], name: &str) -> Result<Input, String> {
    let found = Fields::of(value).get(name.as_bytes());
    found
        .map(|text| Input::Whole(text.to_vec()))
        .ok_or_else(|| format!("the hash has no field `{name}`, which the statement takes"))
}

type Members<'v> = HashMap<Cow<'v, str>, &'v RawValue>;

/// The member that `way` leads to through JSON objects. One that is missing on the way counts as null.
fn member(value: &[u8], way: &[String]) -> Result<Input, String> {
    let name = || way.join(".");
    let no_object = || format!("the value is not a JSON object, and the statement takes $value.{} from it", name());
    let text = std::str::from_utf8(value).map_err(|_| no_object())?;
    let mut current: &RawValue = serde_json::from_str(text).map_err(|_| no_object())?;
    for (depth, step) in way.iter().enumerate() {
        let members: Members<'_> = match serde_json::from_str(current.get()) {
            Ok(members) => members,
            Err(_) if depth > 0 && current.get() == "null" => return Ok(Input::Null),
            Err(_) => return Err(no_object()),
        };
        match members.get(step.as_str()) {
            Some(found) => current = found,
            None => return Ok(Input::Null),
        }
    }
    let raw = current.get();
    Ok(match raw.as_bytes().first() {
        Some(b'n') => Input::Null,
        Some(b't') => Input::Truth(true),
        Some(b'f') => Input::Truth(false),
        Some(b'"') => {
            let text: String = serde_json::from_str(raw).map_err(|_| no_object())?;
            if text.contains('\0') {
                return Err(format!("$value.{} holds a NUL, which no text of a database can", name()));
            }
            Input::Text(text)
        }
        Some(b'{' | b'[') => Input::Text(raw.to_owned()),
        _ => Input::Number(raw.to_owned()),
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::super::fields::pack;
    use super::*;

    fn of(value: &str, way: &str) -> Result<Input, String> {
        member(value.as_bytes(), &way.split('.').map(str::to_owned).collect::<Vec<_>>())
    }

    #[test]
    fn members_keep_what_they_are() {
        let value = r#"{"s":"a\u0022'; DROP","n":12345678901234567890.50,"t":true,"z":null,"o":{"x":[1, 2],"y":{}},"s2":"é"}"#;
        for (way, input) in [
            ("s", Input::Text("a\"'; DROP".to_owned())),
            ("n", Input::Number("12345678901234567890.50".to_owned())),
            ("t", Input::Truth(true)),
            ("z", Input::Null),
            ("missing", Input::Null),
            ("z.deeper", Input::Null),
            ("o.x", Input::Text("[1, 2]".to_owned())),
            ("o.y", Input::Text("{}".to_owned())),
            ("o.y.none", Input::Null),
            ("s2", Input::Text("é".to_owned())),
        ] {
            assert_eq!(of(value, way), Ok(input), "{way}");
        }
        assert_eq!(of(r#"{"a":1,"a":2}"#, "a"), Ok(Input::Number("2".to_owned())), "the last counts, as everywhere");
    }

    #[test]
    fn a_field_of_a_hash_is_its_bytes_and_a_missing_one_is_no_null() {
        let hash = pack([(&b"name"[..], &b"Ann"[..]), (b"tags", b"\xff\0"), (b"none", b"")]);
        for (name, bytes) in [("name", &b"Ann"[..]), ("tags", b"\xff\0"), ("none", b"")] {
            assert_eq!(field(&hash, name), Ok(Input::Whole(bytes.to_vec())));
        }
        assert!(field(&hash, "age").is_err_and(|error| error.contains("no field `age`")));
        assert!(field(b"{}", "age").is_err());
    }

    #[test]
    fn what_has_no_members_is_refused() {
        for (value, way) in [("", "a"), ("7", "a"), ("[1]", "a"), ("null", "a"), ("{\"a\":1", "a"), (r#"{"a":"x"}"#, "a.b")] {
            assert!(of(value, way).is_err_and(|error| error.contains("JSON object")), "{value}");
        }
        assert!(of(r#"{"a":"\u0000"}"#, "a").is_err_and(|error| error.contains("NUL")));
        assert!(member(b"{\"a\":\"\xff\"}", &["a".to_owned()]).is_err());
    }

    proptest! {
        #[test]
        fn strings_come_out_as_they_went_in(text in "[^\0]{0,40}", other in any::<i64>()) {
            let value = serde_json::json!({"other": other, "text": text, "deep": {"text": text}}).to_string();
            prop_assert_eq!(of(&value, "text"), Ok(Input::Text(text.clone())));
            prop_assert_eq!(of(&value, "deep.text"), Ok(Input::Text(text)));
            prop_assert_eq!(of(&value, "other"), Ok(Input::Number(other.to_string())));
        }

        #[test]
        fn any_bytes_are_taken_or_refused(value in proptest::collection::vec(any::<u8>(), 0..60)) {
            let _ = member(&value, &["a".to_owned()]);
        }
    }
}
