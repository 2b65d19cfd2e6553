//! What a journal holds, and how it is written down.

use std::fmt;

use serde::{Deserialize, Serialize};

/// What an entry takes in a server beside its key and its value, in bytes: about what streams and hashes add.
const ENTRY_BYTES: usize = 128;

/// Which of two writes of a partition is the later. Microseconds since 1970 by the clock of the server that took the write, or one more
/// than the last where that is not more: so versions also rise where a journal is lost and begins anew. Below 2^53.
///
/// It is an entry's place in the stream as well: the entry's ID there is `VERSION-0`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Version(u64);

impl Version {
    /// Before all others.
    pub const ZERO: Self = Self(0);

    /// The version with this number.
    pub const fn new(number: u64) -> Self {
        Self(number)
    }

    /// Its number.
    pub const fn get(self) -> u64 {
        self.0
    }

    /// Reads decimal digits.
    ///
    /// # Errors
    /// Other bytes, or more than a number has.
    pub fn parse(digits: &[u8]) -> Result<Self, FormError> {
        let text = std::str::from_utf8(digits).map_err(|_| FormError("a version"))?;
        text.parse().map(Self).map_err(|_| FormError("a version"))
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// What lies in a journal has another form than this build knows.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the journal does not hold {0} where one was expected")]
pub struct FormError(pub(super) &'static str);

/// A write that is to be journalled.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Change {
    /// Of which key.
    pub key: Vec<u8>,
    /// What it is to hold. `None`: it is deleted.
    pub value: Option<Vec<u8>>,
}

impl Change {
    /// How much of a journal's bound it takes.
    pub fn weight(&self) -> usize {
        weight(self.key.len(), self.value.as_ref().map_or(0, Vec::len))
    }
}

/// How much of a journal's bound an entry takes, in bytes.
pub const fn weight(key: usize, value: usize) -> usize {
    key + value + ENTRY_BYTES
}

/// One write, in the stream. Fields: `k` key, `c` kind (`s` or `d`), `v` value, `b` how many bytes were ever appended up to and with it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Its place in the order of its partition.
    pub version: Version,
    /// What was written.
    pub change: Change,
    /// How many bytes were ever appended to the partition, this entry's included: what is trimmed up to it.
    pub through: u64,
}

impl Entry {
    /// Reads an entry by its ID and its fields with their values.
    ///
    /// # Errors
    /// Where it has another form.
    pub fn parse<'a>(id: &[u8], fields: impl IntoIterator<Item = (&'a [u8], &'a [u8])>) -> Result<Self, FormError> {
        let version = id.strip_suffix(b"-0").ok_or(FormError("an entry's ID"))?;
        let (mut key, mut kind, mut value, mut through) = (None, None, None, None);
        for (name, content) in fields {
            match name {
                b"k" => key = Some(content),
                b"c" => kind = Some(content),
                b"v" => value = Some(content),
                b"b" => through = Some(content),
                // A later form may say more.
                _ => {}
            }
        }
        let change = Change {
            key: key.ok_or(FormError("an entry's key"))?.to_vec(),
            value: content(kind.and_then(|kind| kind.first()), value.unwrap_or_default())?,
        };
        let through = Version::parse(through.ok_or(FormError("an entry's bytes"))?)?.get();
        Ok(Self { version: Version::parse(version)?, change, through })
    }
}

/// The last write of a key that the origin has not got, in the dirty index: `VERSION`, the kind, and the value.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Held {
    /// Its entry's.
    pub version: Version,
    /// What the key holds. `None`: it is deleted.
    pub value: Option<Vec<u8>>,
}

impl Held {
    /// Reads what the dirty index has of a key.
    ///
    /// # Errors
    /// Where it has another form.
    pub fn parse(bytes: &[u8]) -> Result<Self, FormError> {
        let digits = bytes.iter().take_while(|byte| byte.is_ascii_digit()).count();
        let (version, rest) = bytes.split_at(digits);
        let (kind, value) = rest.split_first().ok_or(FormError("a dirty value"))?;
        Ok(Self { version: Version::parse(version)?, value: content(Some(kind), value)? })
    }
}

/// The letter of a value's or a deletion's kind.
pub(super) fn kind_of(value: Option<&[u8]>) -> &'static [u8] {
    if value.is_some() { b"s" } else { b"d" }
}

fn content(kind: Option<&u8>, value: &[u8]) -> Result<Option<Vec<u8>>, FormError> {
    match kind {
        Some(b's') => Ok(Some(value.to_vec())),
        Some(b'd') => Ok(None),
        _ => Err(FormError("the kind of a write")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn other_forms_are_refused() {
        let entry = |id: &'static str, fields: &[(&'static str, &'static str)]| {
            Entry::parse(id.as_bytes(), fields.iter().map(|(name, value)| (name.as_bytes(), value.as_bytes())))
        };
        let whole = [("k", "user:1"), ("c", "s"), ("v", "x"), ("b", "135"), ("later", "?")];
        let change = Change { key: b"user:1".to_vec(), value: Some(b"x".to_vec()) };
        assert_eq!(entry("17-0", &whole), Ok(Entry { version: Version::new(17), change, through: 135 }));
        assert!(entry("17-1", &whole).is_err() && entry("-0", &whole).is_err() && entry("x-0", &whole).is_err());
        for missing in ["k", "c", "b"] {
            let rest: Vec<_> = whole.into_iter().filter(|(name, _)| *name != missing).collect();
            assert!(entry("17-0", &rest).is_err(), "{missing}");
        }
        for bytes in ["", "17", "s", "sx", "17x", "99999999999999999999s"] {
            assert!(Held::parse(bytes.as_bytes()).is_err(), "{bytes}");
        }
        assert_eq!(Held::parse(b"17d"), Ok(Held { version: Version::new(17), value: None }));
    }

    proptest! {
        #[test]
        fn what_is_held_may_be_any_bytes(version in 0u64..1 << 53, value in proptest::collection::vec(any::<u8>(), 0..64)) {
            let bytes = [version.to_string().as_bytes(), kind_of(Some(&value)), &value].concat();
            prop_assert_eq!(Held::parse(&bytes), Ok(Held { version: Version::new(version), value: Some(value) }));
        }

        #[test]
        fn reading_never_panics(bytes in proptest::collection::vec(any::<u8>(), 0..64)) {
            let _ = Held::parse(&bytes);
            let _ = Entry::parse(&bytes, [(&bytes[..], &bytes[..])]);
        }
    }
}
