//! Key patterns as globs, which is what the servers' access rules know.
//!
//! A glob says less than a pattern: `{id}`, bytes without a colon, becomes "a byte that is no colon, then anything". So globs let
//! through all keys that the pattern covers, and some more that begin alike. They never let through a key of Larder's own, whatever the
//! pattern: a glob knows no exceptions, so one that could reach such keys becomes several that cannot.

use std::collections::BTreeSet;

use super::pattern::{KeyPattern, Segment};

/// What every key of Larder's own begins with.
pub const OWN_PREFIX: &str = "larder:";

/// A piece of a glob.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Token {
    Byte(u8),
    /// Any byte.
    One,
    /// Any byte but a colon.
    NoColon,
    /// Any bytes, or none.
    Star,
}

impl KeyPattern {
    /// Globs that together let through every key that the pattern covers, but for those that begin with [`OWN_PREFIX`], and none of these.
    ///
    /// They hold neither blanks nor quotes, so that each is one word of a server's configuration.
    pub fn globs(&self) -> BTreeSet<String> {
        let tokens = tokens(self);
        let mut split = Split { tokens: &tokens, seen: BTreeSet::new(), globs: BTreeSet::new() };
        split.at(0, 0);
        split.globs
    }
}

fn tokens(pattern: &KeyPattern) -> Vec<Token> {
    let mut tokens = Vec::new();
    for segment in &pattern.segments {
        match segment {
            Segment::Literal(bytes) => tokens.extend(bytes.iter().map(|byte| literal(*byte))),
            Segment::Part { any, .. } => tokens.extend([if *any { Token::One } else { Token::NoColon }, Token::Star]),
        }
    }
    tokens
}

/// What would end a word, or begin a quotation, matches any byte instead.
fn literal(byte: u8) -> Token {
    if byte.is_ascii_whitespace() || byte.is_ascii_control() || byte == b'"' || byte == b'\'' {
        return Token::One;
    }
    Token::Byte(byte)
}

/// Takes a glob apart at each byte at which a key may cease to be one of Larder's own.
struct Split<'a> {
    tokens: &'a [Token],
    seen: BTreeSet<(usize, usize)>,
    globs: BTreeSet<String>,
}

impl Split<'_> {
    /// The keys of which `own` bytes are those of [`OWN_PREFIX`], matched by the tokens before `index`.
    fn at(&mut self, index: usize, own: usize) {
        let Some(next) = OWN_PREFIX.as_bytes().get(own) else { return };
        if !self.seen.insert((index, own)) {
            return;
        }
        match self.tokens.get(index) {
            None => self.add(own, "", index),
            Some(Token::Byte(byte)) if byte == next => self.at(index + 1, own + 1),
            Some(Token::Byte(_)) => self.add(own, "", index),
            Some(Token::One) => self.part(index + 1, own, "", *next),
            Some(Token::NoColon) => self.part(index + 1, own, ":", *next),
            Some(Token::Star) => {
                self.at(index + 1, own);
                self.part(index, own, "", *next);
            }
        }
    }

    /// The next byte is another than Larder's own have there, or the same; and none of `besides`.
    fn part(&mut self, index: usize, own: usize, besides: &str, next: u8) {
        if besides.as_bytes().contains(&next) {
            return self.add(own, &format!("[^{besides}]"), index);
        }
        self.add(own, &format!("[^{besides}{}]", char::from(next)), index);
        self.at(index, own + 1);
    }

    fn add(&mut self, own: usize, class: &str, index: usize) {
        let mut glob = OWN_PREFIX.as_bytes()[..own].to_vec();
        glob.extend_from_slice(class.as_bytes());
        for token in &self.tokens[index..] {
            match token {
                Token::Byte(byte @ (b'*' | b'?' | b'[' | b'\\')) => glob.extend([b'\\', *byte]),
                Token::Byte(byte) => glob.push(*byte),
                Token::One => glob.push(b'?'),
                Token::NoColon => glob.extend(b"[^:]"),
                Token::Star => glob.push(b'*'),
            }
        }
        // A pattern is text, and nothing of more than one byte was taken apart.
        self.globs.insert(String::from_utf8_lossy(&glob).into_owned());
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// As the servers match (`stringmatchlen`), for what is written here.
    fn matches(glob: &[u8], text: &[u8]) -> bool {
        match (glob, text) {
            ([], _) => text.is_empty(),
            ([b'*', rest @ ..], _) => (0..=text.len()).any(|from| matches(rest, &text[from..])),
            (_, []) => false,
            ([b'?', rest @ ..], [_, text @ ..]) => matches(rest, text),
            ([b'[', b'^', class @ ..], [byte, text @ ..]) => {
                let end = class.iter().position(|byte| *byte == b']').expect("a class ends");
                !class[..end].contains(byte) && matches(&class[end + 1..], text)
            }
            ([b'\\', literal, rest @ ..] | [literal, rest @ ..], [byte, text @ ..]) => literal == byte && matches(rest, text),
        }
    }

    fn globs(pattern: &str) -> Vec<String> {
        pattern.parse::<KeyPattern>().expect("a pattern").globs().into_iter().collect()
    }

    #[test]
    fn patterns_become_globs() {
        assert_eq!(globs("user:{id}"), ["user:[^:]*"]);
        assert_eq!(globs("user:{id}:cart"), ["user:[^:]*:cart"]);
        assert_eq!(globs("page:{path…}"), ["page:?*"]);
        assert_eq!(globs("fixed"), ["fixed"]);
        assert_eq!(globs("{{a}}*{id}"), [r"{a}\*[^:]*"]);
        assert_eq!(globs(r"a\b[c]?{id}"), [r"a\\b\[c]\?[^:]*"]);
        assert_eq!(globs("two words\n\"'{id}"), ["two?words???[^:]*"]);
        assert_eq!(globs("ключ:{id}"), ["ключ:[^:]*"]);
    }

    #[test]
    fn no_glob_reaches_larders_own_keys() {
        let apart =
            ["l[^:a]*", "la", "la[^r]*", "lar", "lar[^d]*", "lard", "lard[^e]*", "larde", "larde[^r]*", "larder", "larder[^:]*"];
        assert_eq!(globs("l{id}"), apart);
        assert!(globs("larder:{x…}").is_empty() && globs("larder:l:{a}").is_empty());
        assert_eq!(globs("larders:{id}"), ["larders:[^:]*"]);
        assert!(globs("{key…}").len() <= 2 * OWN_PREFIX.len());
    }

    fn any_pattern() -> impl Strategy<Value = KeyPattern> {
        let piece = prop_oneof!["larder:", "larder", "l", "a", ":", "[*]", " ", "PART", "ANY"];
        prop::collection::vec(piece, 1..6).prop_filter_map("no pattern", |pieces| {
            let named = pieces.iter().enumerate().map(|(at, piece)| match piece.as_str() {
                "PART" => format!("{{p{at}}}"),
                "ANY" => format!("{{p{at}…}}"),
                other => other.to_owned(),
            });
            named.collect::<String>().parse().ok()
        })
    }

    proptest! {
        #[test]
        fn globs_let_through_what_is_covered_and_nothing_of_larders(
            pattern in any_pattern(), keys in prop::collection::vec("(larder|larder:|larde|l|)[lar:x *]{0,6}", 24),
        ) {
            let globs = pattern.globs();
            prop_assert!(globs.iter().all(|glob| !glob.contains(|c: char| c.is_whitespace() || c == '"' || c == '\'')));
            for key in keys {
                let through = globs.iter().any(|glob| matches(glob.as_bytes(), key.as_bytes()));
                let own = key.starts_with(OWN_PREFIX);
                prop_assert!(!own || !through, "{pattern}: {key}: {globs:?}");
                prop_assert!(own || through || !pattern.matches(key.as_bytes()), "{pattern}: {key}: {globs:?}");
            }
        }
    }
}
