//! The names of journals.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// The longest name of a journal in bytes: those of a namespace, a policy and an origin, with dots between them.
const MOST_NAME_BYTES: usize = 63 + 1 + 253 + 1 + 253;

/// A journal's name: letters, digits, `.`, `-` and `_`. All sidecars that write the same data have one of the same name.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct JournalName(String);

/// Why a text is no journal's name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is no name of a journal: write letters, digits, `.`, `-` and `_`, at most {MOST_NAME_BYTES} of them")]
pub struct JournalNameError(String);

impl JournalName {
    /// As it is written.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for JournalName {
    type Err = JournalNameError;

    fn from_str(text: &str) -> Result<Self, JournalNameError> {
        let fits = (1..=MOST_NAME_BYTES).contains(&text.len());
        let is_plain = text.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'-' | b'_'));
        if fits && is_plain { Ok(Self(text.to_owned())) } else { Err(JournalNameError(text.chars().take(80).collect())) }
    }
}

impl TryFrom<String> for JournalName {
    type Error = JournalNameError;

    fn try_from(text: String) -> Result<Self, JournalNameError> {
        text.parse()
    }
}

impl From<JournalName> for String {
    fn from(name: JournalName) -> Self {
        name.0
    }
}

impl fmt::Display for JournalName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_plain() {
        for text in ["", "a b", "a{b}", "a/b", "a:b", "ä", &"a".repeat(600)] {
            assert!(text.parse::<JournalName>().is_err(), "{text}");
        }
        assert_eq!("shop.users".parse::<JournalName>().expect("a name").to_string(), "shop.users");
    }
}
