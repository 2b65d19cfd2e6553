//! Finds the ends of a server's replies, in RESP2 and RESP3.

/// The longest line of a reply (a status, an error, a number, a header).
const MAX_LINE_BYTES: usize = 1024 * 1024;
/// What replies begin with.
const KINDS: &[u8] = b"+-:$*_,#(!=~>%|";
/// The most elements that one reply may announce.
const MAX_ELEMENTS: u64 = 1 << 32;

/// Why a server's bytes are not a reply. The connection they came on is of no more use.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ReplyError {
    /// A type that no RESP version has.
    #[error("the server sent a reply of unknown type {0:#04x}")]
    UnknownType(u8),
    /// A header that is not a number in range.
    #[error("the server sent a reply with a malformed length")]
    Length,
    /// A line longer than any server sends.
    #[error("the server sent a line longer than {MAX_LINE_BYTES} bytes")]
    Line,
}

/// A resumable scanner. Nesting is a count of elements still to come, not a stack: depth costs nothing.
#[derive(Debug, Default, Clone)]
pub struct ReplyScanner {
    /// Whether a reply has begun and is not whole.
    begun: bool,
    /// Elements still to come, all levels together.
    pending: u64,
    /// Where the next element begins, counted from the first byte not yet [`released`](Self::release). May lie past the
    /// buffer's end, within a value that has not arrived.
    at: usize,
}

impl ReplyScanner {
    /// Looks at `buffer`, whose first byte is the reply's first (or the first after those released). The length, up to the
    /// reply's end, once it is whole.
    #[inline]
    pub fn scan(&mut self, buffer: &[u8]) -> Result<Option<usize>, ReplyError> {
        if !self.begun {
            *self = Self { begun: true, pending: 1, at: 0 };
        }
        while self.pending > 0 {
            let Some(rest) = buffer.get(self.at..).filter(|rest| !rest.is_empty()) else {
                return Ok(None);
            };
            let Some(line) = line_length(rest)? else {
                return if KINDS.contains(&rest[0]) { Ok(None) } else { Err(ReplyError::UnknownType(rest[0])) };
            };
            self.pending -= 1;
            match rest[0] {
                b'+' | b'-' | b':' | b'_' | b',' | b'#' | b'(' => self.at += line,
                b'$' | b'!' | b'=' => match number(&rest[1..line])? {
                    -1 if rest[0] == b'$' => self.at += line,
                    length => self.at += line + to_length(length)? + 2,
                },
                b'*' | b'~' | b'>' => self.aggregate(&rest[..line], 1)?,
                b'%' => self.aggregate(&rest[..line], 2)?,
                b'|' => {
                    // An attribute stands before the element it describes.
                    self.pending += 1;
                    self.aggregate(&rest[..line], 2)?;
                }
                other => return Err(ReplyError::UnknownType(other)),
            }
        }
        if buffer.len() < self.at {
            return Ok(None);
        }
        self.begun = false;
        Ok(Some(self.at))
    }

    fn aggregate(&mut self, line: &[u8], each: u64) -> Result<(), ReplyError> {
        let count = match number(&line[1..])? {
            // RESP2's other null.
            -1 if line[0] == b'*' => 0,
            count => u64::try_from(count).map_err(|_| ReplyError::Length)?,
        };
        self.at += line.len();
        self.pending = count.checked_mul(each).and_then(|more| self.pending.checked_add(more)).ok_or(ReplyError::Length)?;
        if self.pending > MAX_ELEMENTS { Err(ReplyError::Length) } else { Ok(()) }
    }

    /// How many of `buffered` bytes can be passed on although the reply is not whole: those before the next header.
    pub fn releasable(&self, buffered: usize) -> usize {
        self.at.min(buffered)
    }

    /// Tells that `bytes` bytes of the reply have been passed on and left the buffer.
    pub fn release(&mut self, bytes: usize) {
        self.at -= bytes;
    }
}

/// The length of the line at the start of `bytes`, its end included. A line feed alone ends none.
#[inline]
fn line_length(bytes: &[u8]) -> Result<Option<usize>, ReplyError> {
    // Short lines, which headers are, need no search.
    if let Some(end) = bytes.iter().take(8).position(|byte| *byte == b'\n')
        && end > 0
        && bytes[end - 1] == b'\r'
    {
        return Ok(Some(end + 1));
    }
    let ends = memchr::memchr_iter(b'\n', bytes).find(|end| *end > 0 && bytes[end - 1] == b'\r');
    match ends {
        Some(end) => Ok(Some(end + 1)),
        None if bytes.len() > MAX_LINE_BYTES => Err(ReplyError::Line),
        None => Ok(None),
    }
}

/// The number in `digits\r\n`.
#[inline]
fn number(line: &[u8]) -> Result<i64, ReplyError> {
    let digits = line.strip_suffix(b"\r\n").ok_or(ReplyError::Length)?;
    if let Some(unsigned) = unsigned(digits) {
        return Ok(unsigned);
    }
    if digits == b"-1" { Ok(-1) } else { Err(ReplyError::Length) }
}

#[inline]
fn unsigned(digits: &[u8]) -> Option<i64> {
    if digits.is_empty() || digits.len() > 15 {
        return None;
    }
    digits.iter().try_fold(0i64, |value, byte| byte.is_ascii_digit().then(|| value * 10 + i64::from(byte - b'0')))
}

fn to_length(number: i64) -> Result<usize, ReplyError> {
    usize::try_from(number).map_err(|_| ReplyError::Length)
}

/// The elements of the aggregate at the start of `reply`, which must be whole: each with its own header. `None` where it is not
/// an aggregate. The elements of a map are its keys and values in turn.
pub fn elements(reply: &[u8]) -> Option<Vec<&[u8]>> {
    if !matches!(reply.first()?, b'*' | b'~' | b'>' | b'%') {
        return None;
    }
    let line = line_length(reply).ok()??;
    let mut rest = &reply[line..];
    let mut found = Vec::new();
    while !rest.is_empty() {
        let length = ReplyScanner::default().scan(rest).ok()??;
        found.push(&rest[..length]);
        rest = &rest[length..];
    }
    Some(found)
}

/// The bytes of the string (bulk, status or verbatim) that `reply` is. `None` for null and all other types.
pub fn text(reply: &[u8]) -> Option<&[u8]> {
    let line = line_length(reply).ok()??;
    match reply[0] {
        b'$' | b'!' => (reply[1] != b'-').then(|| reply.get(line..reply.len() - 2))?,
        b'=' => reply.get(line + 4..reply.len() - 2),
        b'+' | b'-' | b':' | b',' | b'(' => reply.get(1..line - 2),
        _ => None,
    }
}

/// The integer that `reply` is.
pub fn integer(reply: &[u8]) -> Option<i64> {
    let digits = reply.strip_prefix(b":")?.strip_suffix(b"\r\n")?;
    std::str::from_utf8(digits).ok()?.parse().ok()
}

/// Whether `reply` is null, in either protocol.
#[inline]
pub fn is_null(reply: &[u8]) -> bool {
    matches!(reply, [b'_', ..] | [b'$' | b'*', b'-', b'1', ..])
}

/// Whether a reply about a hash shows nothing of it, which may be since there is none: null, zero, or an array of nothing but nulls. Of an
/// array the beginning will do, up to the end of an element.
#[inline]
pub fn is_hollow(reply: &[u8]) -> bool {
    match reply {
        [b':', b'0', ..] => true,
        [b'*' | b'%', ..] => {
            let line = line_length(reply).ok().flatten().unwrap_or(reply.len());
            let mut rest = reply.get(line..).unwrap_or_default();
            while let Some(after) = rest.strip_prefix(b"$-1\r\n").or_else(|| rest.strip_prefix(b"_\r\n")) {
                rest = after;
            }
            rest.is_empty()
        }
        _ => is_null(reply),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn what_shows_nothing_of_a_hash_is_told_from_what_does() {
        for hollow in [":0\r\n", "$-1\r\n", "_\r\n", "*0\r\n", "%0\r\n", "*-1\r\n", "*2\r\n$-1\r\n$-1\r\n", "*2\r\n_\r\n_\r\n"] {
            assert!(is_hollow(hollow.as_bytes()), "{hollow:?}");
        }
        assert!(is_hollow(b"*9\r\n$-1\r\n"), "so far");
        for shown in
            [":1\r\n", ":10\r\n", "$0\r\n\r\n", "*1\r\n$0\r\n\r\n", "*2\r\n$-1\r\n$1\r\nx\r\n", "%1\r\n$1\r\na\r\n$0\r\n\r\n"]
        {
            assert!(!is_hollow(shown.as_bytes()), "{shown:?}");
        }
    }

    fn value() -> impl Strategy<Value = Vec<u8>> {
        let leaf = prop_oneof![
            proptest::collection::vec(any::<u8>(), 0..30).prop_map(|bytes| [
                format!("${}\r\n", bytes.len()).as_bytes(),
                &bytes[..],
                b"\r\n"
            ]
            .concat()),
            Just(b"$-1\r\n".to_vec()),
            Just(b"_\r\n".to_vec()),
            Just(b"#t\r\n".to_vec()),
            any::<i64>().prop_map(|number| format!(":{number}\r\n").into_bytes()),
            "[a-z ]{0,30}".prop_map(|text| format!("+{text}\r\n").into_bytes()),
            "[a-z ]{0,30}".prop_map(|text| format!("-ERR {text}\r\n").into_bytes()),
            any::<f64>().prop_map(|number| format!(",{number}\r\n").into_bytes()),
            "[a-z]{0,9}".prop_map(|text| format!("={}\r\ntxt:{text}\r\n", text.len() + 4).into_bytes()),
        ];
        leaf.prop_recursive(4, 40, 6, |inner| {
            prop_oneof![
                (prop_oneof![Just('*'), Just('~')], proptest::collection::vec(inner.clone(), 0..6)).prop_map(|(kind, items)| [
                    format!("{kind}{}\r\n", items.len()).into_bytes(),
                    items.concat()
                ]
                .concat()),
                proptest::collection::vec((inner.clone(), inner.clone()), 0..4).prop_map(|pairs| {
                    let body: Vec<u8> = pairs.iter().flat_map(|(key, value)| [key.clone(), value.clone()].concat()).collect();
                    [format!("%{}\r\n", pairs.len()).into_bytes(), body].concat()
                }),
                (inner.clone(), inner.clone(), inner)
                    .prop_map(|(key, value, described)| { [b"|1\r\n".to_vec(), key, value, described].concat() }),
            ]
        })
    }

    proptest! {
        #[test]
        fn ends_are_found_split_at_every_byte(values in proptest::collection::vec(value(), 1..4)) {
            let wire = values.concat();
            let mut scanner = ReplyScanner::default();
            let (mut start, mut lengths) = (0, Vec::new());
            for end in 0..=wire.len() {
                while let Some(length) = scanner.scan(&wire[start..end]).expect("valid") {
                    lengths.push(length);
                    start += length;
                    if start == end { break }
                }
            }
            prop_assert_eq!(lengths, values.iter().map(Vec::len).collect::<Vec<_>>());
        }

        #[test]
        fn what_is_released_early_adds_up(value in value(), step in 1usize..7) {
            let mut scanner = ReplyScanner::default();
            let (mut start, mut end) = (0, 0);
            let total = loop {
                if let Some(length) = scanner.scan(&value[start..end]).expect("valid") { break start + length }
                let free = scanner.releasable(end - start);
                scanner.release(free);
                start += free;
                end = (end + step).min(value.len());
            };
            prop_assert_eq!(total, value.len());
        }

        #[test]
        fn the_oracle_agrees(value in value()) {
            // `redis-protocol` decodes whole frames; both must take the same bytes. It knows RESP2's null only outside RESP3.
            let three = value.windows(3).all(|bytes| bytes != b"$-1");
            if let (true, Ok(Some((_, taken)))) = (three, redis_protocol::resp3::decode::complete::decode(&value)) {
                prop_assert_eq!(ReplyScanner::default().scan(&value), Ok(Some(taken)));
            }
        }

        #[test]
        fn noise_never_panics(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = ReplyScanner::default().scan(&bytes);
        }
    }

    #[test]
    fn deep_nesting_costs_no_stack() {
        let mut wire = b"*1\r\n".repeat(100_000);
        wire.extend_from_slice(b":1\r\n");
        assert_eq!(ReplyScanner::default().scan(&wire), Ok(Some(wire.len())));
    }

    #[test]
    fn parts_of_replies() {
        let wire = b"*3\r\n$1\r\na\r\n:7\r\n*0\r\n";
        let parts = elements(wire).expect("an array");
        assert_eq!(parts, [&b"$1\r\na\r\n"[..], b":7\r\n", b"*0\r\n"]);
        assert_eq!(text(parts[0]), Some(&b"a"[..]));
        assert_eq!(integer(parts[1]), Some(7));
        assert!(is_null(b"$-1\r\n") && is_null(b"_\r\n") && is_null(b"*-1\r\n") && !is_null(b":-1\r\n"));
    }
}
