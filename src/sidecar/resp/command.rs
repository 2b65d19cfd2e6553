//! Finds the ends of a client's commands.
//!
//! The scanner keeps its place between reads, so that a command which trickles in is looked at once, and it holds nothing but
//! ranges. Whoever owns the buffer decides how much of an unfinished command to hold; see [`CommandScanner::started`].

use std::ops::Range;

use super::encode;

/// The most arguments in one command. Redis' own bound up to 6.2; later ones take 2³¹, which nobody could hold.
const MAX_ARGUMENTS: i64 = 1024 * 1024;
/// The longest argument, as in Redis (`proto-max-bulk-len`).
pub const MAX_ARGUMENT_BYTES: i64 = 512 * 1024 * 1024;
/// The longest inline command and the longest header line, as in Redis.
pub const MAX_INLINE_BYTES: usize = 64 * 1024;

/// What a scan found at the front of the buffer.
#[derive(Debug, PartialEq, Eq)]
pub enum CommandScan {
    /// A whole command of this many bytes; [`CommandScanner::ranges`] has its arguments. None, where it is empty.
    Complete {
        /// How many bytes it takes.
        length: usize,
    },
    /// An inline command of this many bytes, its line end included.
    Inline {
        /// How many bytes it takes.
        length: usize,
    },
    /// More bytes are needed.
    Incomplete,
}

/// Why a client's bytes are not a command. The text is Redis' own.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ProtocolError {
    /// The array header is not a number in range.
    #[error("ERR Protocol error: invalid multibulk length")]
    ArrayLength,
    /// The array header does not end.
    #[error("ERR Protocol error: too big mbulk count string")]
    ArrayHeader,
    /// A bulk header does not end.
    #[error("ERR Protocol error: too big bulk count string")]
    BulkHeader,
    /// An argument does not begin with `$`.
    #[error("ERR Protocol error: expected '$', got '{}'", char::from(*.0))]
    ExpectedBulk(u8),
    /// A bulk header is not a number in range.
    #[error("ERR Protocol error: invalid bulk length")]
    BulkLength,
    /// An inline command does not end.
    #[error("ERR Protocol error: too big inline request")]
    Inline,
    /// An inline command has an open quote.
    #[error("ERR Protocol error: unbalanced quotes in request")]
    Quotes,
}

impl ProtocolError {
    /// Appends it as a reply: byte for byte Redis' own.
    pub fn write(&self, out: &mut Vec<u8>) {
        let Self::ExpectedBulk(byte) = self else { return encode::error(out, &self.to_string()) };
        out.extend_from_slice(b"-ERR Protocol error: expected '$', got '");
        match byte {
            b'\r' | b'\n' => out.extend_from_slice(b" '"),
            byte => out.extend_from_slice(&[*byte, b'\'']),
        }
        out.extend_from_slice(b"\r\n");
    }
}

/// A resumable scanner over the commands of one client.
#[derive(Debug, Default)]
pub struct CommandScanner {
    ranges: Vec<Range<u32>>,
    /// Arguments still to come. Zero between commands.
    remaining: u32,
    /// Where the next unread header or argument begins, counted from the command's first byte.
    at: usize,
    /// The length of the argument that begins at `at`, once its header is read.
    argument: Option<u32>,
}

impl CommandScanner {
    /// Looks at `buffer`, whose first byte is the command's first. Call again with a longer buffer after
    /// [`CommandScan::Incomplete`].
    pub fn scan(&mut self, buffer: &[u8]) -> Result<CommandScan, ProtocolError> {
        if self.remaining == 0 {
            self.ranges.clear();
            match buffer.first() {
                None => return Ok(CommandScan::Incomplete),
                Some(b'*') => {}
                Some(_) => return scan_inline(buffer),
            }
            let Some((count, length)) = read_header(buffer, ProtocolError::ArrayHeader)? else {
                return Ok(CommandScan::Incomplete);
            };
            let count = count.filter(|count| *count <= MAX_ARGUMENTS).ok_or(ProtocolError::ArrayLength)?;
            if count <= 0 {
                return Ok(CommandScan::Complete { length });
            }
            self.at = length;
            self.remaining = count as u32;
            self.argument = None;
        }
        while self.remaining > 0 {
            let Some(length) = self.argument_length(buffer)? else {
                return Ok(CommandScan::Incomplete);
            };
            let end = self.at + length as usize;
            if buffer.len() < end + 2 {
                return Ok(CommandScan::Incomplete);
            }
            self.ranges.push(self.at as u32..end as u32);
            self.at = end + 2;
            self.argument = None;
            self.remaining -= 1;
        }
        Ok(CommandScan::Complete { length: self.at })
    }

    /// The length of the argument at `at`, past its header. `None`: the header is not whole yet.
    fn argument_length(&mut self, buffer: &[u8]) -> Result<Option<u32>, ProtocolError> {
        if let Some(length) = self.argument {
            return Ok(Some(length));
        }
        let Some((length, header)) = argument_header(buffer.get(self.at..).unwrap_or_default())? else {
            return Ok(None);
        };
        self.at += header;
        self.argument = Some(length);
        Ok(Some(length))
    }

    /// The arguments of the command that the last scan completed, or those of an unfinished one that are whole.
    pub fn ranges(&self) -> &[Range<u32>] {
        &self.ranges
    }

    /// Whether a command has begun and is not whole.
    pub fn started(&self) -> bool {
        self.remaining > 0
    }

    /// How many arguments the command says it has.
    pub fn announced(&self) -> usize {
        self.ranges.len() + self.remaining as usize
    }

    /// What is left of an unfinished command, for a caller that passes it on without holding it.
    pub fn into_tail(&mut self) -> CommandTail {
        let tail = CommandTail { remaining: self.remaining, skip: self.at as u64, argument: self.argument };
        *self = Self::default();
        tail
    }

    /// Gives back memory that an unusual command took.
    pub fn shrink(&mut self) {
        if self.ranges.capacity() > 256 {
            self.ranges = Vec::new();
        }
    }
}

/// Follows an unfinished command to its end while its bytes are passed on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CommandTail {
    remaining: u32,
    /// Bytes to pass before the next header.
    skip: u64,
    argument: Option<u32>,
}

impl CommandTail {
    /// Of a command of which `skip` more bytes are to come before the next header, and so many arguments behind it.
    pub fn new(remaining: u32, skip: u64) -> Self {
        Self { remaining, skip, argument: None }
    }

    /// How many of `bytes`, which follow those already passed, belong to the command, and whether it ends with them. Bytes of
    /// a header that is not whole yet are not counted: offer them again with more behind them.
    pub fn advance(&mut self, bytes: &[u8]) -> Result<(usize, bool), ProtocolError> {
        let mut passed = 0usize;
        loop {
            if let Some(length) = self.argument.take() {
                self.skip += u64::from(length) + 2;
                self.remaining -= 1;
            }
            let available = (bytes.len() - passed) as u64;
            let step = self.skip.min(available);
            passed += step as usize;
            self.skip -= step;
            if self.skip > 0 {
                return Ok((passed, false));
            }
            if self.remaining == 0 {
                return Ok((passed, true));
            }
            let Some((length, header)) = argument_header(&bytes[passed..])? else {
                return Ok((passed, false));
            };
            self.skip = header as u64;
            self.argument = Some(length);
        }
    }
}

/// Reads the header of an argument: the argument's length, and how many bytes the header takes. `None`: it is not whole yet.
///
/// # Errors
/// Where it is none, or announces more than [`MAX_ARGUMENT_BYTES`].
pub fn argument_header(buffer: &[u8]) -> Result<Option<(u32, usize)>, ProtocolError> {
    match buffer.first() {
        None => return Ok(None),
        Some(b'$') => {}
        Some(_) => return no_bulk(buffer).map(|()| None),
    }
    let Some((length, header)) = read_header(buffer, ProtocolError::BulkHeader)? else {
        return Ok(None);
    };
    let length = length.filter(|length| (0..=MAX_ARGUMENT_BYTES).contains(length)).ok_or(ProtocolError::BulkLength)?;
    Ok(Some((length as u32, header)))
}

/// Reads `*N\r\n` or `$N\r\n`: the number, `None` where it is none, and how many bytes the line takes.
#[inline]
fn read_header(buffer: &[u8], too_big: ProtocolError) -> Result<Option<(Option<i64>, usize)>, ProtocolError> {
    // Nearly all headers have one to three digits.
    let mut value = 0i64;
    for (index, byte) in buffer.iter().enumerate().skip(1).take(10) {
        match byte {
            b'0'..=b'9' => value = value * 10 + i64::from(byte - b'0'),
            // A number that begins with a zero is none, as in Redis, unless it is zero.
            b'\r' if index == 2 || index > 2 && buffer[1] != b'0' => {
                return Ok((buffer.len() > index + 1).then_some((Some(value), index + 2)));
            }
            _ => break,
        }
    }
    read_odd_header(buffer, too_big)
}

/// What does not begin as an argument must: an error once its line is whole, as in Redis.
#[cold]
fn no_bulk(line: &[u8]) -> Result<(), ProtocolError> {
    match read_odd_header(line, ProtocolError::BulkHeader)? {
        Some(_) => Err(ProtocolError::ExpectedBulk(line[0])),
        None => Ok(()),
    }
}

#[cold]
fn read_odd_header(buffer: &[u8], too_big: ProtocolError) -> Result<Option<(Option<i64>, usize)>, ProtocolError> {
    match memchr::memchr(b'\r', buffer) {
        None if buffer.len() > MAX_INLINE_BYTES => Err(too_big),
        None => Ok(None),
        Some(end) if buffer.len() < end + 2 => Ok(None),
        Some(end) => {
            let digits = buffer.get(1..end).and_then(|digits| std::str::from_utf8(digits).ok());
            let number = digits.and_then(|digits| digits.parse::<i64>().ok().filter(|number| number.to_string() == digits));
            Ok(Some((number, end + 2)))
        }
    }
}

fn scan_inline(buffer: &[u8]) -> Result<CommandScan, ProtocolError> {
    match memchr::memchr(b'\n', buffer) {
        Some(end) => Ok(CommandScan::Inline { length: end + 1 }),
        None if buffer.len() > MAX_INLINE_BYTES => Err(ProtocolError::Inline),
        None => Ok(CommandScan::Incomplete),
    }
}

/// Splits an inline command as Redis does: blanks separate, `"` quotes with escapes, `'` quotes without.
pub fn split_inline(line: &[u8]) -> Result<Vec<Vec<u8>>, ProtocolError> {
    let line = line.strip_suffix(b"\n").unwrap_or(line);
    let line = line.strip_suffix(b"\r").unwrap_or(line);
    let mut words = Vec::new();
    let mut rest = line;
    loop {
        let blanks = rest.iter().take_while(|byte| is_space(**byte) || **byte == 0).count();
        rest = &rest[blanks..];
        if rest.is_empty() {
            return Ok(words);
        }
        let (word, used) = inline_word(rest)?;
        words.push(word);
        rest = &rest[used..];
    }
}

/// C's white space, which has the vertical tab, too.
const fn is_space(byte: u8) -> bool {
    byte.is_ascii_whitespace() || byte == 0x0b
}

fn inline_word(bytes: &[u8]) -> Result<(Vec<u8>, usize), ProtocolError> {
    let mut word = Vec::new();
    let mut at = 0;
    while let Some(&byte) = bytes.get(at) {
        match byte {
            b'"' | b'\'' => {
                at = quoted(bytes, at, &mut word)?;
                // A closing quote ends the word.
                if bytes.get(at).is_some_and(|next| !is_space(*next)) {
                    return Err(ProtocolError::Quotes);
                }
                return Ok((word, at));
            }
            b' ' | b'\n' | b'\r' | b'\t' | 0 => break,
            _ => {
                word.push(byte);
                at += 1;
            }
        }
    }
    Ok((word, at))
}

/// Reads a quoted stretch that begins at `at`; returns where it ends.
fn quoted(bytes: &[u8], mut at: usize, word: &mut Vec<u8>) -> Result<usize, ProtocolError> {
    let quote = bytes[at];
    at += 1;
    loop {
        match (bytes.get(at), bytes.get(at + 1)) {
            (None, _) => return Err(ProtocolError::Quotes),
            (Some(byte), _) if *byte == quote => return Ok(at + 1),
            (Some(b'\\'), Some(b'\'')) if quote == b'\'' => {
                word.push(b'\'');
                at += 2;
            }
            (Some(b'\\'), Some(b'x')) if quote == b'"' && hex_pair(bytes, at + 2).is_some() => {
                word.extend(hex_pair(bytes, at + 2));
                at += 4;
            }
            (Some(b'\\'), Some(escaped)) if quote == b'"' => {
                word.push(match escaped {
                    b'n' => b'\n',
                    b'r' => b'\r',
                    b't' => b'\t',
                    b'b' => 8,
                    b'a' => 7,
                    other => *other,
                });
                at += 2;
            }
            (Some(byte), _) => {
                word.push(*byte);
                at += 1;
            }
        }
    }
}

fn hex_pair(bytes: &[u8], at: usize) -> Option<u8> {
    let digit = |index: usize| bytes.get(index).and_then(|byte| char::from(*byte).to_digit(16));
    Some((digit(at)? * 16 + digit(at + 1)?) as u8)
}

#[cfg(test)]
mod tests {
    use super::super::CommandArgs;
    use super::*;
    use proptest::prelude::*;

    fn args_strategy() -> impl Strategy<Value = Vec<Vec<u8>>> {
        proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..40), 1..8)
    }

    proptest! {
        #[test]
        fn commands_read_back_split_at_every_byte(commands in proptest::collection::vec(args_strategy(), 1..4)) {
            let mut wire = Vec::new();
            for command in &commands {
                encode::command(&mut wire, command);
            }
            let mut scanner = CommandScanner::default();
            let (mut start, mut seen) = (0, Vec::new());
            for end in 0..=wire.len() {
                while let CommandScan::Complete { length } = scanner.scan(&wire[start..end]).expect("valid") {
                    let args = CommandArgs::new(&wire[start..end], scanner.ranges());
                    seen.push(args.iter().map(<[u8]>::to_vec).collect::<Vec<_>>());
                    start += length;
                }
            }
            prop_assert_eq!(seen, commands);
            prop_assert_eq!(start, wire.len());
        }

        #[test]
        fn a_tail_ends_where_the_command_ends(args in args_strategy(), cut in 0usize..200, step in 1usize..9) {
            let mut wire = Vec::new();
            encode::command(&mut wire, &args);
            let whole = wire.len();
            wire.extend_from_slice(b"*1\r\n$4\r\nPING\r\n");
            let cut = cut.min(whole - 1);
            let mut scanner = CommandScanner::default();
            prop_assert_eq!(scanner.scan(&wire[..cut]).expect("valid"), CommandScan::Incomplete);
            if scanner.started() {
                let mut tail = scanner.into_tail();
                let (mut at, mut end) = (0, cut);
                loop {
                    let (passed, done) = tail.advance(&wire[at..end]).expect("valid");
                    at += passed;
                    if done { break }
                    end = (end + step).min(wire.len());
                }
                prop_assert_eq!(at, whole);
            }
        }

        #[test]
        fn noise_never_panics(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = CommandScanner::default().scan(&bytes);
            let _ = split_inline(&bytes);
        }
    }

    #[test]
    fn errors_are_those_of_redis() {
        for (wire, text) in [
            ("*abc\r\n", "invalid multibulk length"),
            ("*2000000\r\n", "invalid multibulk length"),
            ("*1\r\n:1\r\n", "expected '$', got ':'"),
            ("*1\r\n$-1\r\n", "invalid bulk length"),
            ("*1\r\n$600000000\r\n", "invalid bulk length"),
            ("*01\r\n", "invalid multibulk length"),
            ("*+1\r\n", "invalid multibulk length"),
            ("*-0\r\n", "invalid multibulk length"),
            ("*1\r\n$00\r\n", "invalid bulk length"),
        ] {
            let error = CommandScanner::default().scan(wire.as_bytes()).expect_err(wire).to_string();
            assert!(error.contains(text), "{wire:?}: {error}");
        }
        let endless = vec![b'x'; MAX_INLINE_BYTES + 1];
        assert_eq!(CommandScanner::default().scan(&endless), Err(ProtocolError::Inline));
    }

    #[test]
    fn empty_commands_are_skipped() {
        for wire in ["*0\r\n", "*-1\r\n"] {
            assert_eq!(CommandScanner::default().scan(wire.as_bytes()), Ok(CommandScan::Complete { length: wire.len() }));
        }
    }

    #[test]
    fn inline_words_are_split_as_in_redis() {
        let words = |line: &str| split_inline(line.as_bytes()).map(|words| words.join(&b"|"[..]));
        assert_eq!(words("SET a  b\r\n"), Ok(b"SET|a|b".to_vec()));
        assert_eq!(words("SET \"a b\" 'c\\'d'\n"), Ok(b"SET|a b|c'd".to_vec()));
        assert_eq!(words("SET \"\\x41\\n\"\n"), Ok(b"SET|A\n".to_vec()));
        assert_eq!(words("SET \"a\n"), Err(ProtocolError::Quotes));
        assert_eq!(words("SET \"a\"b\n"), Err(ProtocolError::Quotes));
        assert_eq!(words("\r\n"), Ok(Vec::new()));
    }
}
