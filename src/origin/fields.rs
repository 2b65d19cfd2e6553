//! A hash in one text of bytes, in which it travels between an origin and the cache: each field, and behind it its value, stands behind
//! its length, which are eight bytes, the greatest first.

/// The bytes of a hash with these fields and values.
pub fn pack<'p>(pairs: impl IntoIterator<Item = (&'p [u8], &'p [u8])>) -> Vec<u8> {
    let mut bytes = Vec::new();
    for text in pairs.into_iter().flat_map(|(field, value)| [field, value]) {
        bytes.extend_from_slice(&(text.len() as u64).to_be_bytes());
        bytes.extend_from_slice(text);
    }
    bytes
}

/// The fields of a hash, each with its value, in the order in which they were packed. Ends where the bytes are none of a hash.
#[derive(Debug, Clone)]
pub struct Fields<'b> {
    rest: &'b [u8],
}

impl<'b> Fields<'b> {
    /// Those of these bytes.
    pub fn of(bytes: &'b [u8]) -> Self {
        Self { rest: bytes }
    }

    /// The value of one of them.
    pub fn get(mut self, name: &[u8]) -> Option<&'b [u8]> {
        self.find(|(field, _)| *field == name).map(|(_, value)| value)
    }

    fn text(&mut self) -> Option<&'b [u8]> {
        let (length, rest) = self.rest.split_first_chunk()?;
        let (text, rest) = rest.split_at_checked(usize::try_from(u64::from_be_bytes(*length)).ok()?)?;
        self.rest = rest;
        Some(text)
    }
}

impl<'b> Iterator for Fields<'b> {
    type Item = (&'b [u8], &'b [u8]);

    fn next(&mut self) -> Option<Self::Item> {
        Some((self.text()?, self.text()?))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn what_is_packed_comes_out_as_it_was(pairs in proptest::collection::vec((any::<Vec<u8>>(), any::<Vec<u8>>()), 0..6)) {
            let borrowed: Vec<_> = pairs.iter().map(|(field, value)| (field.as_slice(), value.as_slice())).collect();
            let bytes = pack(borrowed.iter().copied());
            prop_assert_eq!(&Fields::of(&bytes).collect::<Vec<_>>(), &borrowed);
            for (field, _) in &borrowed {
                let first = borrowed.iter().find(|(other, _)| other == field).map(|(_, value)| *value);
                prop_assert_eq!(Fields::of(&bytes).get(field), first);
            }
        }

        #[test]
        fn any_bytes_come_to_an_end(bytes in any::<Vec<u8>>()) {
            prop_assert!(Fields::of(&bytes).count() <= bytes.len() / 16);
        }
    }
}
