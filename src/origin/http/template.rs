//! Paths with `{part}` placeholders.
//!
//! A part is percent-encoded down to the unreserved characters, so that it stays within its segment or query value whatever
//! it holds.

use crate::policy::KeyPattern;

/// The longest path and query, in bytes. Common servers accept no more than 8 KiB.
const MAX_PATH_BYTES: usize = 16 * 1024;

/// A path, cut at its placeholders.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Template {
    pieces: Vec<Piece>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Piece {
    Text(String),
    /// The index among the pattern's parts.
    Part(usize),
}

impl Template {
    /// Cuts `path` at its placeholders, each of which must be a part of `keys`. The error says what to write instead.
    pub(super) fn parse(path: &str, keys: &KeyPattern) -> Result<Self, String> {
        if !path.starts_with('/') {
            return Err("a path begins with /".to_owned());
        }
        if path.len() > MAX_PATH_BYTES {
            return Err(format!("the path is longer than {MAX_PATH_BYTES} bytes"));
        }
        let mut pieces = Vec::new();
        let mut text = String::new();
        let mut rest = path;
        while let Some(next) = rest.find(['{', '}']) {
            text.push_str(&rest[..next]);
            let brace = &rest[next..];
            if let Some(after) = brace.strip_prefix("{{").or_else(|| brace.strip_prefix("}}")) {
                text.push_str(if brace.starts_with('{') { "%7B" } else { "%7D" });
                rest = after;
                continue;
            }
            let inner = brace.strip_prefix('{').and_then(|inner| inner.split_once('}'));
            let (name, after) = inner.ok_or("a brace has no partner: write {part}, or {{ and }} for the braces themselves")?;
            pieces.push(Piece::Text(std::mem::take(&mut text)));
            pieces.push(Piece::Part(index_of(name, keys)?));
            rest = after;
        }
        text.push_str(rest);
        pieces.push(Piece::Text(text));
        let template = Self { pieces };
        template.check_text()?;
        Ok(template)
    }

    fn check_text(&self) -> Result<(), String> {
        for piece in &self.pieces {
            if let Piece::Text(text) = piece
                && let Some(bad) = text.chars().find(|c| !c.is_ascii_graphic() || matches!(c, '#' | '\\' | '"' | '<' | '>'))
            {
                return Err(format!("`{bad}` may not stand in a path as it is: percent-encode it"));
            }
        }
        // With a part that is no dot segment, only the text itself can be one.
        let sample = self.fill(|_| b"x".as_slice());
        if sample.is_none() { Err("a path may not hold the segments . or ..".to_owned()) } else { Ok(()) }
    }

    /// The path and query for a key's parts. `None` where no path can express them: they would make a `.` or `..` segment,
    /// which every URL parser resolves even when it is percent-encoded, or a path that is too long.
    pub(super) fn render(&self, parts: &[&[u8]]) -> Option<String> {
        self.fill(|index| parts.get(index).copied().unwrap_or_default())
    }

    fn fill<'p>(&self, part: impl Fn(usize) -> &'p [u8]) -> Option<String> {
        let mut path = String::new();
        for piece in &self.pieces {
            match piece {
                Piece::Text(text) => path.push_str(text),
                Piece::Part(index) => encode(part(*index), &mut path),
            }
            if path.len() > MAX_PATH_BYTES {
                return None;
            }
        }
        let segments = path.split('?').next().unwrap_or_default();
        let dotted = segments.split('/').any(|segment| {
            let segment = segment.replace("%2e", ".").replace("%2E", ".");
            segment == "." || segment == ".."
        });
        (!dotted).then_some(path)
    }
}

fn index_of(name: &str, keys: &KeyPattern) -> Result<usize, String> {
    keys.parts().position(|part| part == name).ok_or_else(|| {
        let known = keys.parts().map(|part| format!("{{{part}}}")).collect::<Vec<_>>().join(", ");
        let known = if known.is_empty() { "none".to_owned() } else { known };
        format!("`{{{name}}}` is not a part of the pattern {keys}: its parts are {known}")
    })
}

fn encode(part: &[u8], path: &mut String) {
    const HEX: &[u8; 16] = b"0123456789ABCDEF";
    for byte in part {
        if byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.' | b'_' | b'~') {
            path.push(char::from(*byte));
        } else {
            path.push('%');
            path.push(char::from(HEX[usize::from(byte >> 4)]));
            path.push(char::from(HEX[usize::from(byte & 15)]));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn template(path: &str) -> Result<Template, String> {
        Template::parse(path, &"shop:{tenant}:{id…}".parse().expect("valid"))
    }

    #[track_caller]
    fn check(path: &str, parts: [&[u8]; 2], rendered: Option<&str>) {
        assert_eq!(template(path).expect(path).render(&parts).as_deref(), rendered, "{path}");
    }

    #[test]
    fn parts_stay_within_their_place() {
        check("/t/{tenant}/p/{id}?x={id}", [b"a", b"7"], Some("/t/a/p/7?x=7"));
        check("/p/{id}", [b"a", b"../../admin"], Some("/p/..%2F..%2Fadmin"));
        check("/p/{id}?l={tenant}", [b"a&b=c", b"?#/%"], Some("/p/%3F%23%2F%25?l=a%26b%3Dc"));
        check("/p/{id}", [b"", b"\0\xff\xc3\xa9 +"], Some("/p/%00%FF%C3%A9%20%2B"));
        check("/p/{{{id}}}", [b"", b"7"], Some("/p/%7B7%7D"));
        check("/fixed", [b"", b""], Some("/fixed"));
    }

    #[test]
    fn dot_segments_cannot_be_expressed() {
        check("/p/{id}", [b"", b".."], None);
        check("/p/{id}/x", [b"", b"."], None);
        check("/p/{tenant}{id}", [b".", b"."], None);
        check("/p/v{id}", [b"", b".."], Some("/p/v.."));
        check("/p?x={id}", [b"", b".."], Some("/p?x=.."));
        check("/p/{id}", [b"", &[b'x'; 20_000]], None);
    }

    #[test]
    fn what_is_refused_says_what_to_write() {
        for (path, word) in [
            ("p", "begins with /"),
            ("", "begins with /"),
            ("/{nope}", "{tenant}, {id}"),
            ("/{id", "partner"),
            ("/id}", "partner"),
            ("/a b", "percent-encode"),
            ("/a#b", "percent-encode"),
            ("/é", "percent-encode"),
            ("/../{id}", "segments"),
            ("/%2e./{id}", "segments"),
        ] {
            let error = template(path).expect_err(path);
            assert!(error.contains(word), "{path}: {error}");
        }
    }

    proptest! {
        #[test]
        fn a_part_adds_no_segment_and_no_parameter(id in proptest::collection::vec(any::<u8>(), 1..40)) {
            if let Some(path) = template("/p/{id}?q={id}").expect("valid").render(&[b"t", &id]) {
                let url = reqwest::Url::parse(&format!("http://host{path}")).expect("a URL");
                prop_assert_eq!(url.path_segments().map(Iterator::count), Some(2));
                prop_assert_eq!(url.query_pairs().count(), 1);
                prop_assert_eq!(url.fragment(), None);
                prop_assert_eq!(url.host_str(), Some("host"));
            } else {
                prop_assert!(id == b"." || id == b"..");
            }
        }
    }
}
