//! A small blocking RESP client, independent of the code under test.

use std::fmt;
use std::io::{self, BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

/// A reply of RESP2 or RESP3.
#[derive(Clone, PartialEq)]
pub enum Value {
    Simple(String),
    Error(String),
    Int(i64),
    /// `$` and `=` (whose format prefix stays).
    Bulk(Vec<u8>),
    /// `$-1`, `*-1` or `_`.
    Nil,
    Array(Vec<Value>),
    Set(Vec<Value>),
    Map(Vec<(Value, Value)>),
    Push(Vec<Value>),
    /// As the server wrote it.
    Double(String),
    Bool(bool),
    BigNumber(String),
}

impl Value {
    /// Bulk or simple text, or a panic.
    #[track_caller]
    pub fn text(&self) -> String {
        match self {
            Value::Bulk(bytes) => String::from_utf8_lossy(bytes).into_owned(),
            Value::Simple(text) => text.clone(),
            other => panic!("{other:?} is not text"),
        }
    }

    /// An integer, or a panic.
    #[track_caller]
    pub fn int(&self) -> i64 {
        match self {
            Value::Int(number) => *number,
            other => panic!("{other:?} is not an integer"),
        }
    }

    /// The elements of an array, a set or a push; a map's keys and values in turn. Panics on anything else.
    #[track_caller]
    pub fn items(&self) -> Vec<Value> {
        match self {
            Value::Array(items) | Value::Set(items) | Value::Push(items) => items.clone(),
            Value::Map(pairs) => pairs.iter().flat_map(|(key, value)| [key.clone(), value.clone()]).collect(),
            other => panic!("{other:?} has no items"),
        }
    }

    pub fn is_error(&self) -> bool {
        matches!(self, Value::Error(_))
    }
}

impl fmt::Debug for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Value::Simple(text) => write!(f, "+{text}"),
            Value::Error(text) => write!(f, "-{text}"),
            Value::Int(number) => write!(f, ":{number}"),
            Value::Bulk(bytes) => write!(f, "\"{}\"", bytes.escape_ascii()),
            Value::Nil => f.write_str("nil"),
            Value::Array(items) => f.debug_list().entries(items).finish(),
            Value::Set(items) => f.write_str("~").and_then(|()| f.debug_list().entries(items).finish()),
            Value::Push(items) => f.write_str(">").and_then(|()| f.debug_list().entries(items).finish()),
            Value::Map(pairs) => f.debug_map().entries(pairs.iter().map(|(key, value)| (key, value))).finish(),
            Value::Double(text) => write!(f, ",{text}"),
            Value::Bool(value) => write!(f, "#{value}"),
            Value::BigNumber(text) => write!(f, "({text}"),
        }
    }
}

/// One connection.
pub struct Client {
    reader: BufReader<TcpStream>,
}

impl Client {
    /// Connects to `127.0.0.1:port`. Each reply is waited for up to 20 seconds.
    pub fn connect(port: u16) -> io::Result<Self> {
        Self::connect_to(SocketAddr::from(([127, 0, 0, 1], port)))
    }

    /// The same at another address.
    pub fn connect_to(address: SocketAddr) -> io::Result<Self> {
        let stream = TcpStream::connect(address)?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(Duration::from_secs(20)))?;
        Ok(Self { reader: BufReader::new(stream) })
    }

    /// Sends one command and reads one reply. Panics where the connection fails.
    #[track_caller]
    pub fn call<A: AsRef<[u8]>>(&mut self, args: &[A]) -> Value {
        self.try_call(args).unwrap_or_else(|error| panic!("{}: {error}", show(args)))
    }

    /// Sends one command and reads one reply.
    pub fn try_call<A: AsRef<[u8]>>(&mut self, args: &[A]) -> io::Result<Value> {
        self.send(&encode(args))?;
        self.read()
    }

    /// [`Client::call`] with the words of `line` as arguments.
    #[track_caller]
    pub fn line(&mut self, line: &str) -> Value {
        self.call(&line.split_whitespace().collect::<Vec<_>>())
    }

    /// Sends bytes as they are.
    pub fn send(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.reader.get_mut().write_all(bytes)
    }

    /// Reads one reply.
    pub fn read(&mut self) -> io::Result<Value> {
        read_value(&mut self.reader)
    }

    /// A reply, where at least a part of one is there already.
    pub fn poll(&mut self) -> Option<Value> {
        if self.reader.buffer().is_empty() {
            self.reader.get_ref().set_nonblocking(true).expect("a socket can be told");
            let there = self.reader.get_ref().peek(&mut [0]);
            self.reader.get_ref().set_nonblocking(false).expect("a socket can be told");
            match there {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return None,
                other => assert_ne!(other.expect("the connection stands"), 0, "the connection was closed"),
            }
        }
        Some(self.read().expect("the rest comes"))
    }

    pub fn stream(&self) -> &TcpStream {
        self.reader.get_ref()
    }
}

/// The bytes of one command.
pub fn encode<A: AsRef<[u8]>>(args: &[A]) -> Vec<u8> {
    let mut out = format!("*{}\r\n", args.len()).into_bytes();
    for arg in args {
        let arg = arg.as_ref();
        out.extend_from_slice(format!("${}\r\n", arg.len()).as_bytes());
        out.extend_from_slice(arg);
        out.extend_from_slice(b"\r\n");
    }
    out
}

/// A command as a person reads it.
pub fn show<A: AsRef<[u8]>>(args: &[A]) -> String {
    args.iter().map(|arg| arg.as_ref().escape_ascii().to_string()).collect::<Vec<_>>().join(" ")
}

/// Reads one reply of RESP2 or RESP3 from any stream.
pub fn read_value(reader: &mut impl BufRead) -> io::Result<Value> {
    let mut line = Vec::new();
    reader.read_until(b'\n', &mut line)?;
    if !line.ends_with(b"\r\n") {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    let text = String::from_utf8_lossy(&line[1..line.len() - 2]).into_owned();
    let number = || text.parse::<i64>().map_err(|_| bad(&line));
    Ok(match line[0] {
        b'+' => Value::Simple(text),
        b'-' => Value::Error(text),
        b':' => Value::Int(number()?),
        b',' => Value::Double(text),
        b'(' => Value::BigNumber(text),
        b'#' => Value::Bool(text == "t"),
        b'_' => Value::Nil,
        b'$' | b'=' | b'!' => match usize::try_from(number()?) {
            Err(_) => Value::Nil,
            Ok(length) => {
                let mut bytes = vec![0; length + 2];
                reader.read_exact(&mut bytes)?;
                bytes.truncate(length);
                if line[0] == b'!' { Value::Error(String::from_utf8_lossy(&bytes).into_owned()) } else { Value::Bulk(bytes) }
            }
        },
        b'*' if text == "-1" => Value::Nil,
        b'*' => Value::Array(read_many(reader, number()?)?),
        b'~' => Value::Set(read_many(reader, number()?)?),
        b'>' => Value::Push(read_many(reader, number()?)?),
        b'%' => {
            let flat = read_many(reader, number()? * 2)?;
            Value::Map(flat.chunks(2).map(|pair| (pair[0].clone(), pair[1].clone())).collect())
        }
        _ => return Err(bad(&line)),
    })
}

fn read_many(reader: &mut impl BufRead, count: i64) -> io::Result<Vec<Value>> {
    (0..count).map(|_| read_value(reader)).collect()
}

fn bad(line: &[u8]) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("not RESP: {}", line.escape_ascii()))
}
