//! What came of loads, as bytes: whoever loads for another hands it over in the words that a load of the other's own would have brought.
//!
//! A parcel is a row of fields, each behind its length: for each load what became of it, then what that says.

use super::{LoadError, Loaded};
use crate::policy::Span;

/// Writes what came of loads, in their order. A value with which all of it would have more than `most` bytes is replaced by an error that
/// says so.
pub fn pack(results: &[Result<Loaded, LoadError>], most: usize) -> Vec<u8> {
    let mut out = Vec::new();
    for result in results {
        let before = out.len();
        put(&mut out, result);
        if out.len() > most && result.is_ok() {
            out.truncate(before);
            put(&mut out, &Err(too_large(most)));
        }
    }
    out
}

/// Reads that form again, where rules call the origin `origin`. `None`: it is none, or of another number of loads.
pub fn unpack(bytes: &[u8], origin: &str, count: usize) -> Option<Vec<Result<Loaded, LoadError>>> {
    let mut fields = Fields(bytes);
    let results = (0..count).map(|_| fields.result(origin)).collect::<Option<Vec<_>>>()?;
    fields.0.is_empty().then_some(results)
}

fn too_large(most: usize) -> LoadError {
    let why = format!("what a relay hands over at once is at most {most} bytes, and the value is larger");
    LoadError::Unusable { origin: String::new(), why }
}

fn put(out: &mut Vec<u8>, result: &Result<Loaded, LoadError>) {
    let mut field = |bytes: &[u8]| {
        out.extend_from_slice(format!("{}:", bytes.len()).as_bytes());
        out.extend_from_slice(bytes);
    };
    match result {
        Ok(Loaded::Found { value, max_age, tag }) => {
            field(b"found");
            field(max_age.map(|age| age.as_millis().to_string()).unwrap_or_default().as_bytes());
            field(tag.as_ref().map(|tag| format!("={tag}")).unwrap_or_default().as_bytes());
            field(value);
        }
        Ok(Loaded::NotFound) => field(b"nothing"),
        Err(error) => {
            field(error.kind().as_bytes());
            let (why, span) = match error {
                LoadError::Refused { retry_in: span, .. } | LoadError::Timeout { within: span, .. } => ("", *span),
                LoadError::Busy { .. } => ("", Span::default()),
                LoadError::Unreachable { why, .. }
                | LoadError::Failed { why, .. }
                | LoadError::Unusable { why, .. }
                | LoadError::Rejected { why, .. }
                | LoadError::Unknown { why, .. } => (why.as_str(), Span::default()),
            };
            field(why.as_bytes());
            field(span.as_millis().to_string().as_bytes());
        }
    }
}

/// What is left to read.
struct Fields<'a>(&'a [u8]);

impl<'a> Fields<'a> {
    fn next(&mut self) -> Option<&'a [u8]> {
        let colon = memchr::memchr(b':', self.0)?;
        let length: usize = std::str::from_utf8(&self.0[..colon]).ok()?.parse().ok()?;
        let (field, rest) = self.0[colon + 1..].split_at_checked(length)?;
        self.0 = rest;
        Some(field)
    }

    fn text(&mut self) -> Option<&'a str> {
        std::str::from_utf8(self.next()?).ok()
    }

    fn result(&mut self, origin: &str) -> Option<Result<Loaded, LoadError>> {
        let kind = self.text()?;
        match kind {
            "found" => {
                let max_age = match self.text()? {
                    "" => None,
                    millis => Some(Span::from_millis(millis.parse().ok()?)),
                };
                let tag = self.text()?.strip_prefix('=').map(str::to_owned);
                Some(Ok(Loaded::Found { max_age, tag, value: self.next()?.to_vec() }))
            }
            "nothing" => Some(Ok(Loaded::NotFound)),
            _ => {
                let (origin, why) = (origin.to_owned(), self.text()?.to_owned());
                let span = Span::from_millis(self.text()?.parse().ok()?);
                Some(Err(match kind {
                    "refused" => LoadError::Refused { origin, retry_in: span },
                    "busy" => LoadError::Busy { origin },
                    "timeout" => LoadError::Timeout { origin, within: span },
                    "unreachable" => LoadError::Unreachable { origin, why },
                    "failed" => LoadError::Failed { origin, why },
                    "unusable" => LoadError::Unusable { origin, why },
                    "rejected" => LoadError::Rejected { origin, why },
                    "unknown" => LoadError::Unknown { origin, why },
                    _ => return None,
                }))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn any_result() -> impl Strategy<Value = Result<Loaded, LoadError>> {
        let origin = || "db".to_owned();
        let span = || (0u64..1 << 40).prop_map(Span::from_millis);
        let bytes = proptest::collection::vec(any::<u8>(), 0..30);
        let found = (bytes, proptest::option::of(span()), proptest::option::of(".{0,9}"));
        prop_oneof![
            found.prop_map(|(value, max_age, tag)| Ok(Loaded::Found { value, max_age, tag })),
            Just(Ok(Loaded::NotFound)),
            span().prop_map(move |retry_in| Err(LoadError::Refused { origin: origin(), retry_in })),
            Just(Err(LoadError::Busy { origin: "db".to_owned() })),
            span().prop_map(move |within| Err(LoadError::Timeout { origin: origin(), within })),
            ".{0,9}".prop_map(move |why| Err(LoadError::Unreachable { origin: origin(), why })),
            ".{0,9}".prop_map(move |why| Err(LoadError::Failed { origin: origin(), why })),
            ".{0,9}".prop_map(move |why| Err(LoadError::Unusable { origin: origin(), why })),
            ".{0,9}".prop_map(move |why| Err(LoadError::Rejected { origin: origin(), why })),
            ".{0,9}".prop_map(move |why| Err(LoadError::Unknown { origin: origin(), why })),
        ]
    }

    proptest! {
        #[test]
        fn what_is_packed_is_unpacked(results in proptest::collection::vec(any_result(), 0..6)) {
            let bytes = pack(&results, usize::MAX);
            prop_assert_eq!(unpack(&bytes, "db", results.len()), Some(results.clone()));
            prop_assert_eq!(unpack(&bytes, "db", results.len() + 1), None);
        }

        #[test]
        fn what_is_none_is_refused(bytes in proptest::collection::vec(any::<u8>(), 0..60), count in 0usize..4) {
            let _ = unpack(&bytes, "db", count);
        }
    }

    #[test]
    fn a_value_that_is_too_large_is_told_by_itself() {
        let value = |length| Ok(Loaded::Found { value: vec![b'x'; length], max_age: None, tag: None });
        let results = [value(10), value(1_000), Ok(Loaded::NotFound)];
        let unpacked = unpack(&pack(&results, 500), "db", 3).expect("a parcel");
        assert_eq!((&unpacked[0], &unpacked[2]), (&results[0], &results[2]));
        assert!(matches!(&unpacked[1], Err(LoadError::Unusable { origin, why }) if origin == "db" && why.contains("500")));
    }
}
