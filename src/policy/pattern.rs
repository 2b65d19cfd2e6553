//! Key patterns: which keys a rule covers, and the named parts it takes from them.

use std::fmt;
use std::ops::Range;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};
use smallvec::SmallVec;

/// The most parts one pattern may name.
pub const MAX_PARTS: usize = 8;
/// The longest pattern, in bytes.
pub const MAX_PATTERN_BYTES: usize = 512;

/// A pattern over keys, such as `user:{id}` or `page:{path…}`.
///
/// `{part}` stands for one or more bytes without `:`; `{part…}` (or `{part...}`) for one or more bytes of any kind. `{{` and
/// `}}` stand for the braces themselves. Where several readings fit, each part, from the left, is as short as can be.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct KeyPattern {
    text: String,
    pub(super) segments: Vec<Segment>,
    /// Each part ends at a `:` or at the key's end, so that one pass without second thoughts decides.
    deterministic: bool,
}

/// A piece of a pattern.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) enum Segment {
    Literal(Vec<u8>),
    Part { name: String, any: bool },
}

/// Where the parts of a pattern lie in a key, in the order of [`KeyPattern::parts`].
pub type Captures = SmallVec<[Range<usize>; 4]>;

/// Why a pattern was refused. The text names the remedy.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PatternError {
    /// The pattern is empty.
    #[error("the pattern is empty: write the keys it covers, such as user:{{id}}")]
    Empty,
    /// The pattern is longer than [`MAX_PATTERN_BYTES`].
    #[error("the pattern is longer than {MAX_PATTERN_BYTES} bytes")]
    TooLong,
    /// More than [`MAX_PARTS`] parts.
    #[error("the pattern names more than {MAX_PARTS} parts")]
    TooManyParts,
    /// A brace without its partner.
    #[error("`{0}` has a brace without its partner: write {{part}}, or {{{{ and }}}} for the braces themselves")]
    Brace(String),
    /// A part whose name is not an identifier.
    #[error("`{{{0}}}` is not a part: a name is a letter, then letters, digits or _, such as {{id}} or {{path…}}")]
    Name(String),
    /// A name used twice.
    #[error("the part `{0}` is named twice: give each part its own name")]
    Twice(String),
    /// Two parts with nothing between them.
    #[error("`{0}` and `{1}` stand side by side: put at least one byte between two parts")]
    Adjacent(String, String),
    /// A glob, which the pattern language does not have.
    #[error("`{0}` looks like a glob: write {{part}} for bytes without `:` or {{part…}} for any bytes")]
    Glob(String),
}

impl KeyPattern {
    /// The names of the parts, from left to right.
    pub fn parts(&self) -> impl Iterator<Item = &str> {
        self.segments.iter().filter_map(|segment| match segment {
            Segment::Part { name, .. } => Some(name.as_str()),
            Segment::Literal(_) => None,
        })
    }

    /// The bytes that every covered key begins with. Empty where the pattern begins with a part.
    pub fn literal_prefix(&self) -> &[u8] {
        match self.segments.first() {
            Some(Segment::Literal(bytes)) => bytes,
            _ => &[],
        }
    }

    /// The pattern as it was written.
    pub fn as_str(&self) -> &str {
        &self.text
    }

    /// Whether it ends in a part.
    pub fn ends_open(&self) -> bool {
        matches!(self.segments.last(), Some(Segment::Part { .. }))
    }

    /// Whether no key has more than one reading: each part ends at a `:` or at the key's end.
    pub(super) fn reads_one_way(&self) -> bool {
        self.deterministic
    }

    /// Whether the pattern covers `key`. Allocates nothing for patterns whose parts end at a `:` or at the end.
    pub fn matches(&self, key: &[u8]) -> bool {
        if self.deterministic { self.walk(key, |_| {}) } else { self.search(key).is_some() }
    }

    /// The same for a key that is known to begin with the pattern's [`literal_prefix`](Self::literal_prefix), whose length is `prefix`.
    #[inline]
    pub(super) fn matches_behind(&self, key: &[u8], prefix: usize) -> bool {
        if !self.deterministic {
            return self.search(key).is_some();
        }
        let begun = usize::from(prefix > 0);
        Self::walk_from(&self.segments[begun..], key, prefix, |_| {})
    }

    /// The named parts of `key`, or `None` where the pattern does not cover it.
    pub fn captures(&self, key: &[u8]) -> Option<Captures> {
        if !self.deterministic {
            return self.search(key);
        }
        let mut found = Captures::new();
        self.walk(key, |part| found.push(part)).then_some(found)
    }

    /// The key with these values for the parts. `None` where one has none, or where the pattern does not cover what comes out: an empty value,
    /// or one with a `:` where none may be.
    pub fn render<'v>(&self, mut value: impl FnMut(&str) -> Option<&'v [u8]>) -> Option<Vec<u8>> {
        let mut key = Vec::new();
        for segment in &self.segments {
            match segment {
                Segment::Literal(bytes) => key.extend_from_slice(bytes),
                Segment::Part { name, .. } => key.extend_from_slice(value(name)?),
            }
        }
        self.matches(&key).then_some(key)
    }

    /// One pass over a deterministic pattern.
    fn walk(&self, key: &[u8], on_part: impl FnMut(Range<usize>)) -> bool {
        Self::walk_from(&self.segments, key, 0, on_part)
    }

    #[inline]
    fn walk_from(segments: &[Segment], key: &[u8], mut at: usize, mut on_part: impl FnMut(Range<usize>)) -> bool {
        for segment in segments {
            match segment {
                Segment::Literal(bytes) => {
                    if !key[at..].starts_with(bytes) {
                        return false;
                    }
                    at += bytes.len();
                }
                Segment::Part { any, .. } => {
                    let rest = &key[at..];
                    let length = if *any { rest.len() } else { memchr::memchr(b':', rest).unwrap_or(rest.len()) };
                    if length == 0 {
                        return false;
                    }
                    on_part(at..at + length);
                    at += length;
                }
            }
        }
        at == key.len()
    }

    /// The general case: depth first, each part as short as can be. `dead` remembers the places that led nowhere, which keeps
    /// hostile keys at `segments × length` steps.
    fn search(&self, key: &[u8]) -> Option<Captures> {
        let width = key.len() + 1;
        let mut dead = vec![false; self.segments.len() * width];
        let mut found = Captures::new();
        self.descend(key, 0, 0, width, &mut dead, &mut found).then_some(found)
    }

    fn descend(&self, key: &[u8], index: usize, at: usize, width: usize, dead: &mut [bool], found: &mut Captures) -> bool {
        let Some(segment) = self.segments.get(index) else {
            return at == key.len();
        };
        if dead[index * width + at] {
            return false;
        }
        let reached = match segment {
            Segment::Literal(bytes) => {
                key[at..].starts_with(bytes) && self.descend(key, index + 1, at + bytes.len(), width, dead, found)
            }
            Segment::Part { any, .. } => {
                let rest = &key[at..];
                let most = if *any { rest.len() } else { memchr::memchr(b':', rest).unwrap_or(rest.len()) };
                (1..=most).any(|length| {
                    found.push(at..at + length);
                    let reached = self.descend(key, index + 1, at + length, width, dead, found);
                    if !reached {
                        found.pop();
                    }
                    reached
                })
            }
        };
        if !reached {
            dead[index * width + at] = true;
        }
        reached
    }
}

impl FromStr for KeyPattern {
    type Err = PatternError;

    fn from_str(text: &str) -> Result<Self, PatternError> {
        if text.is_empty() {
            return Err(PatternError::Empty);
        }
        if text.len() > MAX_PATTERN_BYTES {
            return Err(PatternError::TooLong);
        }
        if text.contains('*') && !text.contains('{') {
            return Err(PatternError::Glob(text.to_owned()));
        }
        let segments = parse_segments(text)?;
        check_parts(&segments)?;
        let deterministic = is_deterministic(&segments);
        Ok(Self { text: text.to_owned(), segments, deterministic })
    }
}

fn parse_segments(text: &str) -> Result<Vec<Segment>, PatternError> {
    let brace = || PatternError::Brace(text.to_owned());
    let mut segments = Vec::new();
    let mut literal = Vec::new();
    let mut rest = text;
    while let Some(next) = rest.find(['{', '}']) {
        literal.extend_from_slice(&rest.as_bytes()[..next]);
        let brace_at = &rest[next..];
        if let Some(after) = brace_at.strip_prefix("{{").or_else(|| brace_at.strip_prefix("}}")) {
            literal.push(brace_at.as_bytes()[0]);
            rest = after;
            continue;
        }
        let inner = brace_at.strip_prefix('{').ok_or_else(brace)?;
        let end = inner.find('}').ok_or_else(brace)?;
        if !literal.is_empty() {
            segments.push(Segment::Literal(std::mem::take(&mut literal)));
        }
        segments.push(parse_part(&inner[..end])?);
        rest = &inner[end + 1..];
    }
    literal.extend_from_slice(rest.as_bytes());
    if !literal.is_empty() {
        segments.push(Segment::Literal(literal));
    }
    Ok(segments)
}

fn parse_part(inner: &str) -> Result<Segment, PatternError> {
    let open = inner.strip_suffix('…').or_else(|| inner.strip_suffix("..."));
    let (name, any) = open.map_or((inner, false), |name| (name, true));
    let mut letters = name.chars();
    let starts_well = letters.next().is_some_and(|c| c.is_ascii_alphabetic());
    if !starts_well || !letters.all(|c| c.is_ascii_alphanumeric() || c == '_') {
        return Err(PatternError::Name(inner.to_owned()));
    }
    Ok(Segment::Part { name: name.to_owned(), any })
}

fn check_parts(segments: &[Segment]) -> Result<(), PatternError> {
    let mut names: Vec<&str> = Vec::new();
    for segment in segments {
        if let Segment::Part { name, .. } = segment {
            if names.contains(&name.as_str()) {
                return Err(PatternError::Twice(name.clone()));
            }
            names.push(name);
        }
    }
    if names.len() > MAX_PARTS {
        return Err(PatternError::TooManyParts);
    }
    for pair in segments.windows(2) {
        if let [Segment::Part { name: left, .. }, Segment::Part { name: right, .. }] = pair {
            return Err(PatternError::Adjacent(left.clone(), right.clone()));
        }
    }
    Ok(())
}

fn is_deterministic(segments: &[Segment]) -> bool {
    segments.iter().enumerate().all(|(index, segment)| match (segment, segments.get(index + 1)) {
        (Segment::Part { any, .. }, Some(Segment::Literal(next))) => !any && next.first() == Some(&b':'),
        _ => true,
    })
}

impl fmt::Display for KeyPattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl fmt::Debug for KeyPattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.text, f)
    }
}

impl Serialize for KeyPattern {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.text)
    }
}

impl<'de> Deserialize<'de> for KeyPattern {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[track_caller]
    fn check(pattern: &str, key: &str, parts: Option<&[&str]>) {
        let pattern: KeyPattern = pattern.parse().expect("a valid pattern");
        let found = pattern.captures(key.as_bytes());
        let found = found.map(|ranges| ranges.into_iter().map(|range| &key[range]).collect::<Vec<_>>());
        assert_eq!(found.as_deref(), parts, "{pattern} on {key}");
        assert_eq!(pattern.matches(key.as_bytes()), parts.is_some());
    }

    #[test]
    fn parts_are_taken_from_keys() {
        check("user:{id}", "user:7", Some(&["7"]));
        check("user:{id}", "user:", None);
        check("user:{id}", "user:7:x", None);
        check("user:{id}", "users:7", None);
        check("user:{id}:cart:{item}", "user:7:cart:9", Some(&["7", "9"]));
        check("page:{path…}", "page:a:b/c", Some(&["a:b/c"]));
        check("page:{path...}", "page:", None);
        check("fixed", "fixed", Some(&[]));
        check("fixed", "fixed2", None);
        check("{a}-{b}", "x-y-z", Some(&["x", "y-z"]));
        check("{a…}:end", "x:y:end", Some(&["x:y"]));
        check("a{{{x}}}", "a{7}", Some(&["7"]));
    }

    #[test]
    fn keys_are_made_from_values() {
        let render = |pattern: &str, value: &'static [u8]| {
            let pattern: KeyPattern = pattern.parse().expect("a valid pattern");
            pattern.render(|part| (part == "id").then_some(value))
        };
        assert_eq!(render("user:{id}", b"7"), Some(b"user:7".to_vec()));
        assert_eq!(render("a{{{id}}}", b"\xff"), Some(b"a{\xff}".to_vec()));
        assert_eq!(render("user:{id}", b""), None);
        assert_eq!(render("user:{id}", b"7:8"), None);
        assert_eq!(render("page:{id…}", b"7:8"), Some(b"page:7:8".to_vec()));
        assert_eq!(render("user:{id}:{more}", b"7"), None, "a part without a value");
    }

    #[test]
    fn bad_patterns_say_what_to_write() {
        for (text, word) in [
            ("", "empty"),
            ("user:*", "glob"),
            ("user:{id", "partner"),
            ("user:}", "partner"),
            ("user:{}", "name"),
            ("user:{1x}", "name"),
            ("{a}{b}", "side by side"),
            ("{a}:{a}", "twice"),
            ("{a}:{b}:{c}:{d}:{e}:{f}:{g}:{h}:{i}", "more than"),
        ] {
            let error = text.parse::<KeyPattern>().expect_err(text).to_string();
            assert!(error.contains(word), "{text}: {error}");
        }
    }

    proptest! {
        #[test]
        fn the_quick_walk_agrees_with_the_search(key in "[a:]{0,12}") {
            for pattern in ["a:{x}", "{x}:{y}", "{x}:a:{y…}", "a{x}", "{x…}"] {
                let pattern: KeyPattern = pattern.parse().expect("valid");
                prop_assert!(pattern.deterministic);
                let mut quick = Captures::new();
                let reached = pattern.walk(key.as_bytes(), |part| quick.push(part));
                prop_assert_eq!(reached.then_some(quick), pattern.search(key.as_bytes()));
            }
        }

        #[test]
        fn a_key_is_made_again_from_its_parts(key in "[a:]{1,12}") {
            for pattern in ["a:{x}", "{x}:{y}", "{x}:a:{y…}", "a{x}", "{x…}"] {
                let pattern: KeyPattern = pattern.parse().expect("valid");
                let Some(found) = pattern.captures(key.as_bytes()) else { continue };
                let parts: Vec<&str> = pattern.parts().collect();
                let value = |name: &str| parts.iter().position(|part| *part == name).map(|at| &key.as_bytes()[found[at].clone()]);
                prop_assert_eq!(pattern.render(value), Some(key.clone().into_bytes()));
            }
        }

        #[test]
        fn hostile_keys_cost_no_more_than_their_length(tail in "[ab-]{0,400}") {
            let pattern: KeyPattern = "{a}-{b}-{c}-{d}-{e}-{f}-{g}-!".parse().expect("valid");
            prop_assert!(!pattern.matches(tail.as_bytes()));
        }
    }
}
