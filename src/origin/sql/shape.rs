//! From the columns of a row to the bytes of a value.

use super::super::Loaded;
use super::super::error::Failure;
use super::super::fields::pack;
use super::super::http::MAX_BODY_BYTES;
use crate::policy::ReplyForm;

/// How rows become values: the same for one key and for many.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Form {
    /// The only column as it is; NULL is no value.
    AsIs,
    /// A JSON object with these members in this order.
    Object(Vec<String>),
    /// A hash with these fields, but for those that are NULL; none at all is no value.
    Hash(Vec<String>),
}

impl Form {
    /// The form for rows of `columns`, unless they contradict `reply`.
    pub(super) fn of(columns: &[String], reply: Option<ReplyForm>) -> Result<Self, Failure> {
        let refuse = |why: String| Err(Failure::Unusable(why));
        match (reply, columns.len()) {
            (_, 0) => refuse("the statement gives no column".to_owned()),
            (None | Some(ReplyForm::String), 1) => Ok(Self::AsIs),
            (Some(ReplyForm::String), count) => {
                refuse(format!("`as: String` takes one column, and the statement gives {count}: select one, or write `as: Json`"))
            }
            (None | Some(ReplyForm::Json | ReplyForm::Hash), _) => match first_twice(columns) {
                Some(name) => refuse(format!("two columns are called `{name}`: give each a name of its own with AS")),
                None if reply == Some(ReplyForm::Hash) => Ok(Self::Hash(columns.to_vec())),
                None => Ok(Self::Object(columns.to_vec())),
            },
        }
    }

    /// How many columns it takes.
    pub(super) fn width(&self) -> usize {
        match self {
            Self::AsIs => 1,
            Self::Object(names) | Self::Hash(names) => names.len(),
        }
    }

    /// Whether its fields are texts of JSON.
    pub(super) fn is_json(&self) -> bool {
        matches!(self, Self::Object(_))
    }

    /// The value of a row whose fields are texts of JSON where it [is](Self::is_json), and else the bytes themselves.
    pub(super) fn value<'r>(&self, mut fields: impl Iterator<Item = Option<&'r [u8]>>) -> Result<Loaded, Failure> {
        let value = match self {
            Self::AsIs => match fields.next().flatten() {
                Some(bytes) => bytes.to_vec(),
                None => return Ok(Loaded::NotFound),
            },
            Self::Object(names) => object(names, fields),
            Self::Hash(names) => {
                let pairs = names.iter().zip(fields).filter_map(|(name, field)| Some((name.as_bytes(), field?)));
                match pack(pairs) {
                    empty if empty.is_empty() => return Ok(Loaded::NotFound),
                    hash => hash,
                }
            }
        };
        if value.len() > MAX_BODY_BYTES {
            return Err(Failure::Unusable(format!("the value is larger than {MAX_BODY_BYTES} bytes")));
        }
        Ok(Loaded::Found { value, max_age: None, tag: None })
    }
}

fn first_twice(names: &[String]) -> Option<&String> {
    names.iter().enumerate().find(|(index, name)| names[..*index].contains(name)).map(|(_, name)| name)
}

fn object<'r>(names: &[String], fields: impl Iterator<Item = Option<&'r [u8]>>) -> Vec<u8> {
    let mut json = vec![b'{'];
    for (index, (name, field)) in names.iter().zip(fields).enumerate() {
        if index > 0 {
            json.push(b',');
        }
        json.extend_from_slice(string(name).as_bytes());
        json.push(b':');
        json.extend_from_slice(field.unwrap_or(b"null"));
    }
    json.push(b'}');
    json
}

/// `text` as a JSON string.
pub(super) fn string(text: &str) -> String {
    serde_json::Value::from(text).to_string()
}

/// Bytes in a JSON text: `\x` and hexadecimal digits, as Postgres writes them.
pub(super) fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write as _;
    bytes.iter().fold(String::from("\\x"), |mut text, byte| {
        // Writing to a String cannot fail.
        let _ = write!(text, "{byte:02x}");
        text
    })
}

/// Whether `text` is how a 64-bit integer is written, with neither a plus sign nor leading zeros: one number, one spelling.
pub(super) fn canonical_integer(text: &str) -> Option<i64> {
    let number: i64 = text.parse().ok()?;
    let digits = text.strip_prefix('-').unwrap_or(text);
    let plain = digits.bytes().all(|b| b.is_ascii_digit()) && (digits == "0" || !digits.starts_with('0')) && text != "-0";
    plain.then_some(number)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn integers_have_one_spelling() {
        for (text, number) in
            [("0", 0), ("7", 7), ("-7", -7), ("9223372036854775807", i64::MAX), ("-9223372036854775808", i64::MIN)]
        {
            assert_eq!(canonical_integer(text), Some(number));
        }
        for text in ["", "-", "+7", "07", "-0", "00", " 7", "7 ", "7.0", "1e3", "0x7", "9223372036854775808", "٧"] {
            assert_eq!(canonical_integer(text), None, "{text}");
        }
    }

    #[test]
    fn rows_become_values() {
        let names = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>();
        let found = |text: &str| Ok(Loaded::Found { value: text.into(), max_age: None, tag: None });
        let one = Form::of(&names(&["a"]), None).expect("valid");
        assert_eq!(one.value([Some(b"x".as_slice())].into_iter()), found("x"));
        assert_eq!(one.value([None].into_iter()), Ok(Loaded::NotFound));
        let two = Form::of(&names(&["z", "a\"b"]), None).expect("valid");
        assert_eq!(two.value([Some(b"1".as_slice()), None].into_iter()), found(r#"{"z":1,"a\"b":null}"#));
        let forced = Form::of(&names(&["a"]), Some(ReplyForm::Json)).expect("valid");
        assert_eq!(forced.value([Some(b"1".as_slice())].into_iter()), found(r#"{"a":1}"#));
        let hash = Form::of(&names(&["a", "b"]), Some(ReplyForm::Hash)).expect("valid");
        let value = pack([(&b"b"[..], &b"1"[..])]);
        let found = Ok(Loaded::Found { value, max_age: None, tag: None });
        assert_eq!(hash.value([None, Some(b"1".as_slice())].into_iter()), found);
        assert_eq!(hash.value([None, None].into_iter()), Ok(Loaded::NotFound), "there is no empty hash");
        assert!(Form::of(&names(&["a", "a"]), Some(ReplyForm::Hash)).is_err());
        assert!(Form::of(&names(&["a", "b"]), Some(ReplyForm::String)).is_err());
        assert!(Form::of(&names(&["a", "a"]), None).is_err());
        assert!(Form::of(&[], None).is_err());
    }
}
