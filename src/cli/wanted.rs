//! Which keys a command is to invalidate, as its arguments name them.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt as _;

use super::local::percent_encoded;
use crate::policy::KeyPattern;

/// The most bytes of keys in one request, and the most keys.
const MOST_OF_REQUEST: (usize, usize) = (8192, 128);

/// Which keys.
#[derive(Clone, Debug, clap::Args)]
#[group(id = "wanted", required = true, multiple = true)]
pub struct Wanted {
    /// Keys: their values, copies and remembered absences go, and no load that began before is stored
    #[arg(value_name = "KEY", conflicts_with_all = ["tag", "rule", "pattern"])]
    keys: Vec<OsString>,
    /// All keys that have this tag, such as user:7
    #[arg(long, value_name = "TAG", conflicts_with_all = ["rule", "pattern"])]
    tag: Option<String>,
    /// All keys of the rule of this name
    #[arg(long, value_name = "NAME", conflicts_with = "pattern")]
    rule: Option<String>,
    /// All keys of a pattern, such as 'user:{id}', that some rule covers
    #[arg(long, value_name = "PATTERN")]
    pattern: Option<KeyPattern>,
}

impl Wanted {
    /// What keys have in common that are not named one by one: the kind, and which of it.
    fn whole(&self) -> Option<(&'static str, &str)> {
        let tag = self.tag.as_deref().map(|tag| ("tag", tag));
        let rule = self.rule.as_deref().map(|rule| ("rule", rule));
        let pattern = self.pattern.as_ref().map(|pattern| ("pattern", pattern.as_str()));
        tag.or(rule).or(pattern)
    }

    /// The queries that name them: keys in parts that fit a request line, else one.
    pub fn queries(&self) -> Vec<String> {
        match self.whole() {
            Some((kind, which)) => vec![format!("{kind}={}", percent_encoded(which.as_bytes()))],
            None => self.parts().iter().map(|part| query_of(part)).collect(),
        }
    }

    /// The arguments that name them to the sidecar's own program: keys in parts, each of them a list of its own.
    #[cfg(feature = "control-plane")]
    pub fn arguments(&self) -> Vec<Vec<OsString>> {
        match self.whole() {
            Some((kind, which)) => vec![vec![format!("--{kind}").into(), which.into()]],
            None => {
                let words = |part: &[OsString]| [OsString::from("--")].into_iter().chain(part.iter().cloned()).collect();
                self.parts().into_iter().map(words).collect()
            }
        }
    }

    /// In words.
    #[cfg(feature = "control-plane")]
    pub fn describe(&self) -> String {
        match self.whole() {
            Some((kind, which)) => format!("the keys of the {kind} `{which}`"),
            None if self.keys.len() == 1 => "the key".to_owned(),
            None => format!("the {} keys", self.keys.len()),
        }
    }

    fn parts(&self) -> Vec<&[OsString]> {
        let (mut parts, mut from, mut bytes) = (Vec::new(), 0, 0);
        for (at, key) in self.keys.iter().enumerate() {
            if at > from && (bytes + key.len() > MOST_OF_REQUEST.0 || at - from == MOST_OF_REQUEST.1) {
                parts.push(&self.keys[from..at]);
                (from, bytes) = (at, 0);
            }
            bytes += key.len();
        }
        parts.push(&self.keys[from..]);
        parts
    }
}

fn query_of(keys: &[OsString]) -> String {
    let pair = |key: &OsString| format!("key={}", percent_encoded(OsStr::as_bytes(key)));
    keys.iter().map(pair).collect::<Vec<_>>().join("&")
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        wanted: Wanted,
    }

    fn wanted(line: &str) -> Result<Wanted, clap::Error> {
        Line::try_parse_from(["x"].into_iter().chain(line.split_whitespace())).map(|line| line.wanted)
    }

    #[test]
    fn one_kind_of_keys_is_named() {
        assert_eq!(wanted("user:7 b&c").unwrap().queries(), ["key=user:7&key=b%26c"]);
        assert_eq!(wanted("--rule user").unwrap().queries(), ["rule=user"]);
        assert_eq!(wanted("--pattern user:{id}").unwrap().queries(), ["pattern=user:%7Bid%7D"]);
        assert_eq!(wanted("--tag user:7").unwrap().queries(), ["tag=user:7"]);
        for bad in ["", "a --rule b", "--rule a --pattern b", "--pattern user:*", "--tag a b", "--tag a --rule b"] {
            assert!(wanted(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn many_keys_go_in_parts_and_each_in_one() {
        let keys: Vec<String> =
            (0..300).map(|number| format!("key:{number}")).chain(["k".repeat(9000), "z".to_owned()]).collect();
        let named = wanted(&keys.join(" ")).unwrap();
        let parts = named.parts();
        assert_eq!(parts.iter().map(|part| part.len()).collect::<Vec<_>>(), [128, 128, 44, 1, 1]);
        assert_eq!(parts.concat(), keys.iter().map(OsString::from).collect::<Vec<_>>());
        #[cfg(feature = "control-plane")]
        assert_eq!(named.arguments()[0].len(), 129);
    }
}
