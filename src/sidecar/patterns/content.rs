//! What the cache has under a key, or is to have.

use std::borrow::Cow;

use crate::origin::fields::{Fields, pack};
use crate::policy::{ReadThrough, ReplyForm};
use crate::sidecar::resp::reply;

/// In which form the values of a rule are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    /// Strings.
    Text,
    /// Hashes.
    Hash,
}

impl Form {
    /// That of what this rule loads.
    pub fn of(rule: &ReadThrough) -> Self {
        if rule.load.reply == Some(ReplyForm::Hash) { Self::Hash } else { Self::Text }
    }
}

/// A value.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Content<'b> {
    /// A string.
    Text(Cow<'b, [u8]>),
    /// A hash, as [`pack`] makes it, with one field at the least.
    Hash(Cow<'b, [u8]>),
}

impl<'b> Content<'b> {
    /// What an origin gave, or is to have.
    pub fn new(form: Form, value: impl Into<Cow<'b, [u8]>>) -> Self {
        match form {
            Form::Text => Self::Text(value.into()),
            Form::Hash => Self::Hash(value.into()),
        }
    }

    /// What a script of Larder's answers with: a string, or fields and values in turn. `None`: it is null, or of another form.
    pub fn read(form: Form, answer: &[u8]) -> Option<Content<'static>> {
        match form {
            Form::Text => Some(Content::Text(Cow::Owned(reply::text(answer)?.to_vec()))),
            Form::Hash => {
                let texts = reply::elements(answer)?.into_iter().map(reply::text).collect::<Option<Vec<_>>>()?;
                let (pairs, _) = texts.as_chunks::<2>();
                Some(Content::Hash(Cow::Owned(pack(pairs.iter().map(|[field, value]| (*field, *value))))))
            }
        }
    }

    /// The argument of a script in which a string stands: nothing, of a hash.
    pub fn text(&self) -> &[u8] {
        match self {
            Self::Text(text) => text,
            Self::Hash(_) => &[],
        }
    }

    /// The arguments in which a hash stands, fields and values in turn: none, of a string.
    pub fn pairs(&self) -> impl Iterator<Item = &[u8]> {
        let hash: &[u8] = match self {
            Self::Text(_) => &[],
            Self::Hash(hash) => hash,
        };
        Fields::of(hash).flat_map(|(field, value)| [field, value])
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sidecar::resp::encode;

    #[test]
    fn a_hash_is_told_to_a_script_as_a_script_tells_it() {
        let hash = Content::new(Form::Hash, pack([(&b"name"[..], &b"Ann"[..]), (b"mail", b"")]));
        let mut answer = Vec::new();
        encode::array(&mut answer, 4);
        hash.pairs().for_each(|text| encode::bulk(&mut answer, text));
        assert_eq!(Content::read(Form::Hash, &answer), Some(hash.clone()));
        assert_eq!((Content::read(Form::Text, &answer), hash.text()), (None, &b""[..]));
        let text = Content::new(Form::Text, &b"x"[..]);
        assert_eq!(Content::read(Form::Text, b"$1\r\nx\r\n"), Some(text.clone()));
        assert_eq!((Content::read(Form::Hash, b"$1\r\nx\r\n"), text.pairs().count()), (None, 0));
        for form in [Form::Text, Form::Hash] {
            assert_eq!(Content::read(form, b"$-1\r\n"), None);
        }
    }
}
