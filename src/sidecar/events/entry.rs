//! What an entry of the stream says. Pure.
//!
//! An entry is a list of pairs: `key user:7`, `tag user:7`, `rule user`, `pattern user:{id}`. Each pair stands for itself, so that one that is not
//! understood takes nothing from the others.

use crate::policy::tags::MAX_TAG_BYTES;
use crate::policy::{KeyPattern, PatternError};
use crate::sidecar::slots::is_larder_key;

/// The longest name of a rule that is read.
const MOST_NAME_BYTES: usize = 256;

/// Something that has changed.
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    /// What this key stands for.
    Key(Vec<u8>),
    /// What all keys that have this tag stand for.
    Tag(String),
    /// What all keys of the rule of this name stand for.
    Rule(String),
    /// What all keys of a pattern that some rule covers stand for.
    Pattern(KeyPattern),
}

/// Why a pair is not understood. The text names the remedy.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NotUnderstood {
    /// Another word than those above.
    #[error("`{0}` is no kind of event: write `key KEY`, `tag TAG`, `rule NAME` or `pattern PATTERN`")]
    Kind(String),
    /// An empty key.
    #[error("the key is empty: write `key KEY`")]
    NoKey,
    /// One of Larder's own keys.
    #[error("the key `{0}` is Larder's own, and changes with the key that it belongs to: name that one")]
    OwnKey(String),
    /// No tag of any key.
    #[error("no key has such a tag: write `tag TAG`, in UTF-8 and of at most {MAX_TAG_BYTES} bytes")]
    Tag,
    /// No name of a rule.
    #[error("no rule has such a name: write `rule NAME`, as the policy has it")]
    RuleName,
    /// No pattern.
    #[error("the pattern is not understood: {0}")]
    Pattern(#[from] PatternError),
    /// A pattern that is no text.
    #[error("a pattern is text in UTF-8, such as user:{{id}}")]
    NotText,
    /// No entry of a stream has such pairs, but XADD's arguments may.
    #[error("an event is a pair of words: write `XADD larder:events * key KEY`")]
    Pairs,
}

/// Reads one pair.
///
/// # Errors
/// What it lacks.
pub fn parse(kind: &[u8], what: &[u8]) -> Result<Event, NotUnderstood> {
    let is = |word: &str| kind.eq_ignore_ascii_case(word.as_bytes());
    if is("key") {
        return match what {
            [] => Err(NotUnderstood::NoKey),
            own if is_larder_key(own) => Err(NotUnderstood::OwnKey(shown(own))),
            key => Ok(Event::Key(key.to_vec())),
        };
    }
    if is("tag") {
        let tag = std::str::from_utf8(what).ok().filter(|tag| !tag.is_empty() && tag.len() <= MAX_TAG_BYTES);
        return tag.map(|tag| Event::Tag(tag.to_owned())).ok_or(NotUnderstood::Tag);
    }
    if is("rule") {
        let name = std::str::from_utf8(what).ok().filter(|name| !name.is_empty() && name.len() <= MOST_NAME_BYTES);
        return name.map(|name| Event::Rule(name.to_owned())).ok_or(NotUnderstood::RuleName);
    }
    if is("pattern") {
        let text = std::str::from_utf8(what).map_err(|_| NotUnderstood::NotText)?;
        return Ok(Event::Pattern(text.parse()?));
    }
    Err(NotUnderstood::Kind(shown(kind)))
}

/// What is wrong with the event that an XADD with these arguments announces, its name and the stream's included. Where its options are
/// wrong any server answers with the error that fits.
///
/// # Errors
/// The first pair that nobody would understand.
pub fn check_announcement<'a>(args: impl Iterator<Item = &'a [u8]>) -> Result<(), NotUnderstood> {
    let mut rest = args.skip(2).peekable();
    while let Some(word) = rest.next() {
        let is = |option: &str| word.eq_ignore_ascii_case(option.as_bytes());
        if is("maxlen") || is("minid") {
            rest.next_if(|next| matches!(next, [b'=' | b'~']));
            rest.next();
        } else if is("limit") {
            rest.next();
        } else if !is("nomkstream") {
            // The entry's id: pairs follow.
            break;
        }
    }
    if rest.peek().is_none() {
        return Err(NotUnderstood::Pairs);
    }
    while let Some(kind) = rest.next() {
        parse(kind, rest.next().ok_or(NotUnderstood::Pairs)?)?;
    }
    Ok(())
}

fn shown(text: &[u8]) -> String {
    String::from_utf8_lossy(&text[..text.len().min(64)]).into_owned()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn check(line: &str) -> Result<(), NotUnderstood> {
        check_announcement(line.split(' ').map(str::as_bytes))
    }

    #[test]
    fn each_kind_is_read_and_what_is_none_says_what_to_write() {
        assert_eq!(parse(b"key", b"user:7"), Ok(Event::Key(b"user:7".to_vec())));
        assert_eq!(parse(b"KEY", b"\xff\0"), Ok(Event::Key(b"\xff\0".to_vec())));
        assert_eq!(parse(b"tag", b"user:7"), Ok(Event::Tag("user:7".to_owned())));
        assert_eq!(parse(b"rule", b"user"), Ok(Event::Rule("user".to_owned())));
        assert_eq!(parse(b"pattern", b"user:{id}"), Ok(Event::Pattern("user:{id}".parse().unwrap())));
        for (kind, what, word) in [
            ("tag", "", "no key has such a tag"),
            ("keys", "a", "`keys` is no kind"),
            ("key", "", "the key is empty"),
            ("key", "larder:l:{abc}a", "Larder's own"),
            ("rule", "", "no rule"),
            ("pattern", "user:*", "{part}"),
        ] {
            let error = parse(kind.as_bytes(), what.as_bytes()).unwrap_err().to_string();
            assert!(error.contains(word), "{error}");
        }
        assert_eq!(parse(b"pattern", b"\xff"), Err(NotUnderstood::NotText));
        assert_eq!(parse(b"tag", b"\xff"), Err(NotUnderstood::Tag));
        assert_eq!(parse(b"tag", &[b'a'; MAX_TAG_BYTES + 1]), Err(NotUnderstood::Tag));
    }

    #[test]
    fn an_announcement_is_checked_behind_its_options() {
        for good in [
            "XADD larder:events * key a",
            "xadd larder:events MAXLEN ~ 1000 * key a key b",
            "XADD larder:events NOMKSTREAM minid = 5 LIMIT 10 7-1 rule user pattern a:{b}",
            "XADD larder:events MAXLEN 1000 * key maxlen",
        ] {
            assert_eq!(check(good), Ok(()), "{good}");
        }
        assert_eq!(check("XADD larder:events *"), Err(NotUnderstood::Pairs));
        assert_eq!(check("XADD larder:events * key a key"), Err(NotUnderstood::Pairs));
        assert_eq!(check("XADD larder:events * key a tag b"), Ok(()));
        assert_eq!(check("XADD larder:events MAXLEN ~ 10 * user 7"), Err(NotUnderstood::Kind("user".to_owned())));
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_panic(args in proptest::collection::vec(any::<Vec<u8>>(), 0..12)) {
            let _ = check_announcement(args.iter().map(Vec::as_slice));
            let _ = parse(args.first().map_or(b"rule", |kind| kind), args.last().map_or(b"", |what| what));
        }

        /// What the sidecar lets pass, its readers understand.
        #[test]
        fn what_is_let_pass_is_understood(pairs in proptest::collection::vec(("key|rule|pattern|tag|x", "[a-z:{}]{0,8}"), 1..5)) {
            let args = ["XADD", "larder:events", "*"].into_iter().chain(pairs.iter().flat_map(|(kind, what)| [&**kind, &**what]));
            let passes = check_announcement(args.map(str::as_bytes)).is_ok();
            let understood = pairs.iter().all(|(kind, what)| parse(kind.as_bytes(), what.as_bytes()).is_ok());
            prop_assert_eq!(passes, understood);
        }
    }
}
