//! The few requests that the sidecar makes on its own account: logins, topology questions, subscriptions.
//!
//! Replies are small and rare, so they become trees here; the data path never does this. Everything is bounded, for a peer may be
//! anything that listens on the port.

use std::io;

use tokio::io::{AsyncBufRead, AsyncBufReadExt as _, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};

use crate::sidecar::resp::encode;

/// The most bytes of one reply. A slot map of 16,384 ranges with three nodes each fits.
const MAX_REPLY_BYTES: usize = 16 << 20;
/// The most values in one reply, containers included: what bounds the memory of a tree of tiny values.
const MAX_REPLY_VALUES: usize = 1 << 20;
/// The deepest nesting. CLUSTER SHARDS needs five.
const MAX_DEPTH: usize = 16;
/// The longest line: a type byte with a number, a simple string, an error.
const MAX_LINE_BYTES: usize = 64 * 1024;

/// A reply, RESP2 or RESP3.
#[derive(Debug, Clone, PartialEq)]
pub enum Value {
    /// RESP2's null bulk or array, RESP3's null.
    Nil,
    /// Any string: simple, bulk, verbatim (without its `txt:`), and numbers that are no integer, as they were written.
    Text(Vec<u8>),
    /// An integer, or a boolean as 0 and 1.
    Int(i64),
    /// An array, a set or a push message.
    List(Vec<Value>),
    /// A map, in order.
    Map(Vec<(Value, Value)>),
    /// An error as the server worded it, without `-`.
    Error(String),
}

/// Why a reply could not be read.
#[derive(Debug, thiserror::Error)]
pub enum ReplyError {
    /// The connection ended or failed.
    #[error("the connection failed: {0}")]
    Io(#[from] io::Error),
    /// What came is not RESP.
    #[error("the reply is not RESP: is the port right, and does it speak TLS?")]
    NotResp,
    /// What came is over the bounds of this client.
    #[error("the reply is too large or nested too deeply")]
    TooLarge,
}

impl Value {
    /// The text, where it is one that is UTF-8.
    pub fn as_str(&self) -> Option<&str> {
        match self {
            Self::Text(text) => std::str::from_utf8(text).ok(),
            _ => None,
        }
    }

    /// The number, where it is one or a text of one.
    pub fn as_int(&self) -> Option<i64> {
        match self {
            Self::Int(number) => Some(*number),
            Self::Text(_) => self.as_str()?.parse().ok(),
            _ => None,
        }
    }

    /// The elements, where it is a list.
    pub fn as_list(&self) -> Option<&[Value]> {
        match self {
            Self::List(list) => Some(list),
            _ => None,
        }
    }

    /// The value under `name` in a map, or in RESP2's list of names and values by turns.
    pub fn field(&self, name: &str) -> Option<&Value> {
        match self {
            Self::Map(pairs) => pairs.iter().find(|(key, _)| key.as_str() == Some(name)).map(|(_, value)| value),
            Self::List(list) => list.chunks_exact(2).find(|pair| pair[0].as_str() == Some(name)).map(|pair| &pair[1]),
            _ => None,
        }
    }
}

/// Sends `commands` in one write and reads a reply for each. Not cancel-safe: a connection whose request was dropped half-way
/// must be dropped too.
pub async fn ask<S>(stream: &mut S, commands: &[&[&[u8]]]) -> Result<Vec<Value>, ReplyError>
where
    S: AsyncBufRead + AsyncWrite + Unpin,
{
    let mut request = Vec::new();
    for command in commands {
        encode::command(&mut request, command);
    }
    stream.write_all(&request).await?;
    stream.flush().await?;
    let mut replies = Vec::with_capacity(commands.len());
    for _ in commands {
        replies.push(read_value(stream).await?);
    }
    Ok(replies)
}

/// A container that still lacks `missing` values.
struct Open {
    kind: OpenKind,
    missing: usize,
    values: Vec<Value>,
}

enum OpenKind {
    List,
    Map,
    /// RESP3's attributes, which precede the value that they describe.
    Attributes,
}

/// What one line starts.
enum Head {
    Whole(Value),
    Bulk { length: usize, verbatim: bool },
    Container { kind: OpenKind, values: usize },
}

/// Reads one reply.
pub async fn read_value<R: AsyncBufRead + Unpin>(reader: &mut R) -> Result<Value, ReplyError> {
    let mut bytes_left = MAX_REPLY_BYTES;
    let mut values_left = MAX_REPLY_VALUES;
    let mut open: Vec<Open> = Vec::new();
    loop {
        values_left = values_left.checked_sub(1).ok_or(ReplyError::TooLarge)?;
        let line = read_line(reader).await?;
        bytes_left = bytes_left.checked_sub(line.len()).ok_or(ReplyError::TooLarge)?;
        let mut done = match parse_head(&line)? {
            Head::Whole(value) => value,
            Head::Bulk { length, verbatim } => {
                bytes_left = bytes_left.checked_sub(length).ok_or(ReplyError::TooLarge)?;
                read_bulk(reader, length, verbatim).await?
            }
            Head::Container { kind: OpenKind::List, values: 0 } => Value::List(Vec::new()),
            Head::Container { kind: OpenKind::Map, values: 0 } => Value::Map(Vec::new()),
            Head::Container { kind: OpenKind::Attributes, values: 0 } => continue,
            Head::Container { kind, values } => {
                if open.len() == MAX_DEPTH || values > values_left {
                    return Err(ReplyError::TooLarge);
                }
                open.push(Open { kind, missing: values, values: Vec::new() });
                continue;
            }
        };
        loop {
            let Some(top) = open.last_mut() else { return Ok(done) };
            top.values.push(done);
            top.missing -= 1;
            if top.missing > 0 {
                break;
            }
            let Some(Open { kind, values, .. }) = open.pop() else { break };
            done = match kind {
                OpenKind::List => Value::List(values),
                OpenKind::Map => Value::Map(pair_up(values)),
                OpenKind::Attributes => break,
            };
        }
    }
}

fn pair_up(values: Vec<Value>) -> Vec<(Value, Value)> {
    let mut pairs = Vec::with_capacity(values.len() / 2);
    let mut values = values.into_iter();
    while let (Some(key), Some(value)) = (values.next(), values.next()) {
        pairs.push((key, value));
    }
    pairs
}

/// A line without its end.
async fn read_line<R: AsyncBufRead + Unpin>(reader: &mut R) -> Result<Vec<u8>, ReplyError> {
    let mut line = Vec::new();
    reader.take(MAX_LINE_BYTES as u64).read_until(b'\n', &mut line).await?;
    if line.is_empty() {
        return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
    }
    match line.strip_suffix(b"\r\n") {
        Some(body) => Ok(body.to_vec()),
        None if line.len() == MAX_LINE_BYTES => Err(ReplyError::TooLarge),
        None if line.ends_with(b"\n") => Err(ReplyError::NotResp),
        None => Err(io::Error::from(io::ErrorKind::UnexpectedEof).into()),
    }
}

async fn read_bulk<R: AsyncBufRead + Unpin>(reader: &mut R, length: usize, verbatim: bool) -> Result<Value, ReplyError> {
    let mut body = Vec::new();
    reader.take(length as u64 + 2).read_to_end(&mut body).await?;
    if body.len() < length + 2 {
        return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
    }
    if !body.ends_with(b"\r\n") {
        return Err(ReplyError::NotResp);
    }
    body.truncate(length);
    if verbatim {
        body.drain(..body.len().min(4));
    }
    Ok(Value::Text(body))
}

fn parse_head(line: &[u8]) -> Result<Head, ReplyError> {
    let (kind, rest) = line.split_first().ok_or(ReplyError::NotResp)?;
    let text = || std::str::from_utf8(rest).map_err(|_| ReplyError::NotResp);
    let number = || text()?.parse::<i64>().map_err(|_| ReplyError::NotResp);
    let container = |kind: OpenKind, per_entry: usize| match number()? {
        -1 => Ok(Head::Whole(Value::Nil)),
        count => {
            let count = usize::try_from(count).map_err(|_| ReplyError::NotResp)?;
            Ok(Head::Container { kind, values: count.saturating_mul(per_entry) })
        }
    };
    match kind {
        b'+' | b',' | b'(' => Ok(Head::Whole(Value::Text(rest.to_vec()))),
        b'-' => Ok(Head::Whole(Value::Error(String::from_utf8_lossy(rest).into_owned()))),
        b':' => Ok(Head::Whole(Value::Int(number()?))),
        b'_' if rest.is_empty() => Ok(Head::Whole(Value::Nil)),
        b'#' if rest == b"t" || rest == b"f" => Ok(Head::Whole(Value::Int(i64::from(rest == b"t")))),
        b'$' | b'=' | b'!' if rest == b"-1" => Ok(Head::Whole(Value::Nil)),
        b'$' | b'=' => {
            let length = usize::try_from(number()?).map_err(|_| ReplyError::NotResp)?;
            Ok(Head::Bulk { length, verbatim: *kind == b'=' })
        }
        b'*' | b'~' | b'>' => container(OpenKind::List, 1),
        b'%' => container(OpenKind::Map, 2),
        b'|' => container(OpenKind::Attributes, 2),
        _ => Err(ReplyError::NotResp),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use tokio::io::BufReader;

    fn block_on<T>(future: impl Future<Output = T>) -> T {
        tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(future)
    }

    fn read(mut bytes: &[u8]) -> Result<Value, ReplyError> {
        block_on(read_value(&mut bytes))
    }

    fn text(text: &str) -> Value {
        Value::Text(text.as_bytes().to_vec())
    }

    #[test]
    fn both_protocols_become_the_same_tree() {
        let want = Value::List(vec![text("a"), Value::Int(7), Value::Nil]);
        assert_eq!(read(b"*3\r\n$1\r\na\r\n:7\r\n$-1\r\n").unwrap(), want);
        assert_eq!(read(b"|1\r\n+ttl\r\n:3\r\n~3\r\n=5\r\ntxt:a\r\n:7\r\n_\r\n").unwrap(), want);
        let map = read(b"%2\r\n+a\r\n#t\r\n+b\r\n*0\r\n").unwrap();
        assert_eq!(map.field("a").and_then(Value::as_int), Some(1));
        assert_eq!(read(b"*4\r\n+a\r\n:1\r\n+b\r\n*0\r\n").unwrap().field("a").and_then(Value::as_int), Some(1));
        assert_eq!(read(b"-ERR no\r\n").unwrap(), Value::Error("ERR no".to_owned()));
    }

    #[test]
    fn what_is_not_resp_is_refused_in_bounded_memory() {
        for bad in [&b"HTTP/1.1 400 Bad Request\r\n"[..], b"\r\n", b"*x\r\n", b"$-2\r\n", b"$1\r\nab\r\n", b":1\n", b"*-2\r\n"] {
            assert!(matches!(read(bad), Err(ReplyError::NotResp)), "{bad:?}");
        }
        for large in [&b"$999999999999\r\n"[..], b"*999999999999\r\n", b"%9223372036854775807\r\n"] {
            assert!(matches!(read(large), Err(ReplyError::TooLarge)), "{large:?}");
        }
        assert!(matches!(read(&b"*1\r\n".repeat(100)), Err(ReplyError::TooLarge)));
        assert!(matches!(read(&vec![b'+'; MAX_LINE_BYTES + 1]), Err(ReplyError::TooLarge)));
        assert!(matches!(read(b"$5\r\nab"), Err(ReplyError::Io(_))));
    }

    fn value() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            Just(Value::Nil),
            any::<i64>().prop_map(Value::Int),
            any::<Vec<u8>>().prop_map(Value::Text),
            "[A-Z]{1,9} [a-z ]{0,9}".prop_map(Value::Error),
        ];
        leaf.prop_recursive(4, 32, 4, |inner| {
            prop_oneof![
                proptest::collection::vec(inner.clone(), 0..4).prop_map(Value::List),
                proptest::collection::vec((inner.clone(), inner), 0..4).prop_map(Value::Map),
            ]
        })
    }

    fn encode(value: &Value, out: &mut Vec<u8>) {
        match value {
            Value::Nil => out.extend_from_slice(b"_\r\n"),
            Value::Int(number) => out.extend_from_slice(format!(":{number}\r\n").as_bytes()),
            Value::Text(text) => {
                out.extend_from_slice(format!("${}\r\n", text.len()).as_bytes());
                out.extend_from_slice(text);
                out.extend_from_slice(b"\r\n");
            }
            Value::Error(text) => out.extend_from_slice(format!("-{text}\r\n").as_bytes()),
            Value::List(list) => {
                out.extend_from_slice(format!("*{}\r\n", list.len()).as_bytes());
                list.iter().for_each(|value| encode(value, out));
            }
            Value::Map(pairs) => {
                out.extend_from_slice(format!("%{}\r\n", pairs.len()).as_bytes());
                pairs.iter().for_each(|(key, value)| {
                    encode(key, out);
                    encode(value, out);
                });
            }
        }
    }

    proptest! {
        #[test]
        fn every_value_reads_back_whatever_the_buffer(value in value(), capacity in 1usize..40) {
            let mut bytes = Vec::new();
            encode(&value, &mut bytes);
            bytes.extend_from_slice(b"+next\r\n");
            let mut reader = BufReader::with_capacity(capacity, &bytes[..]);
            prop_assert_eq!(block_on(read_value(&mut reader)).unwrap(), value);
            prop_assert_eq!(block_on(read_value(&mut reader)).unwrap(), text("next"));
        }

        #[test]
        fn no_bytes_make_it_panic(bytes in any::<Vec<u8>>()) {
            let _ = read(&bytes);
        }
    }
}
