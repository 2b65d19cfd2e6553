//! What the cache says of a counter, and the version that several make together. Pure.
//!
//! With a key's own version stand the tags that its value was given, beside those that follow from its name: so neither can be lost without the
//! other, and a value is met by nobody who does not know its tags.

use std::rc::Rc;

use crate::policy::KeyPattern;
use crate::policy::versions::{Counter, Version, from_hex};

/// What the cache says of a counter.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct State {
    /// Its version.
    pub version: Version,
    /// With a key's own: the counters of the tags that its value was given.
    pub tags: Rc<[Counter]>,
}

impl From<Version> for State {
    fn from(version: Version) -> Self {
        Self { version, tags: Rc::default() }
    }
}

impl State {
    /// Reads what the cache has: a version, and behind it tags in hexadecimal digits, where the pattern of the key is `keys`. `None`: it is
    /// nothing of that form.
    pub fn parse(text: &[u8], keys: Option<&KeyPattern>) -> Option<Self> {
        let mut words = text.split(|byte| *byte == b' ');
        let version = Version::parse(words.next()?)?;
        let tags = words.map(|word| Some(Counter::of_tag(keys?, &from_hex(word)?))).collect::<Option<Vec<_>>>()?;
        Some(Self { version, tags: tags.into() })
    }
}

/// What the cache is to have of a key's own version whose value was given these tags.
pub fn text_of(version: Version, tags: &[Vec<u8>]) -> String {
    let digits = |tag: &Vec<u8>| tag.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
    [version.to_string()].into_iter().chain(tags.iter().map(digits)).collect::<Vec<_>>().join(" ")
}

/// The version that counters make together, with the tags that they bring along. `None`: `look` does not know all of them, or there are none.
pub fn combined(counters: &[Counter], mut look: impl FnMut(&Counter) -> Option<State>) -> Option<Version> {
    let mut all: Option<Version> = None;
    let mut add = |version: Version| all = Some(all.map_or(version, |all| all.with(version)));
    for counter in counters {
        let state = look(counter)?;
        add(state.version);
        for tag in state.tags.iter() {
            add(look(tag)?.version);
        }
    }
    all
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn keys() -> KeyPattern {
        "page:{id}".parse().expect("a pattern")
    }

    #[test]
    fn a_version_is_made_of_all_that_is_known_and_of_nothing_less() {
        let [rule, own, tag] = [Counter::of_rule(&keys()), Counter::of_key(b"page:1"), Counter::of_tag(&keys(), b"t")];
        let [a, b, c, d] = [1, 2, 3, 4].map(Version::new);
        let made = |own_tags: &[Counter], of_tag: Option<Version>| {
            combined(&[rule.clone(), own.clone()], |counter| match counter {
                counter if *counter == rule => Some(a.into()),
                counter if *counter == own => Some(State { version: b, tags: own_tags.into() }),
                _ => of_tag.map(Into::into),
            })
        };
        assert_eq!(made(&[], None), Some(a.with(b)));
        let tags = [tag];
        assert_eq!((made(&tags, Some(c)), made(&tags, None)), (Some(a.with(b).with(c)), None));
        assert_ne!(made(&tags, Some(c)), made(&tags, Some(d)));
        assert_eq!(combined(&[], |_| Some(a.into())), None);
    }

    proptest! {
        #[test]
        fn what_is_written_is_read(number in any::<u64>(), tags in proptest::collection::vec("\\PC{1,12}", 0..4)) {
            let tags: Vec<Vec<u8>> = tags.into_iter().map(String::into_bytes).collect();
            let (version, keys) = (Version::new(number), keys());
            let text = text_of(version, &tags);
            let counters: Vec<Counter> = tags.iter().map(|tag| Counter::of_tag(&keys, tag)).collect();
            let state = State { version, tags: counters.into() };
            prop_assert_eq!(State::parse(text.as_bytes(), Some(&keys)), Some(state));
            prop_assert_eq!(State::parse(text.as_bytes(), None).is_some(), tags.is_empty());
        }

        #[test]
        fn no_bytes_make_it_panic(text in proptest::collection::vec(any::<u8>(), 0..60), hex in "[0-9a-f]{16}( [0-9a-f]{0,5}){0,3}") {
            let _ = State::parse(&text, Some(&keys()));
            let _ = State::parse(hex.as_bytes(), Some(&keys()));
        }
    }
}
