//! What is sent: requests encoded beforehand, with the replies that must come.

use std::io;
use std::time::Duration;

use hdrhistogram::Histogram;
use mio::net::TcpStream;
use mio::{Interest, Poll, Token};
use std::net::SocketAddr;

/// How many keys the load touches.
pub const KEYS: usize = 10_000;
/// The size of each value in bytes.
pub const VALUE_BYTES: usize = 100;
/// A target that sends no byte for this long fails the sample.
pub const STALL: Duration = Duration::from_secs(10);

/// What went wrong with a sample.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    #[error("{0}")]
    Io(#[from] io::Error),
    #[error("a reply differs: expected {expected:?}, got {got:?}")]
    Mismatch { expected: String, got: String },
    #[error("the target closed a connection")]
    Closed,
    #[error("no reply for {STALL:?}")]
    Stalled,
    #[error("the target does not keep up with the rate")]
    Overrun,
}

/// The command that is sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Operation {
    /// GET of a key that is there.
    Get,
    /// SET of a key to the value it has.
    Set,
}

impl Operation {
    pub fn name(self) -> &'static str {
        match self {
            Self::Get => "GET",
            Self::Set => "SET",
        }
    }
}

/// Commands that are written at once, and the replies that must come.
pub struct Batch {
    pub request: Vec<u8>,
    pub replies: Vec<u8>,
}

impl Batch {
    fn new(operation: Operation, pipeline: usize, random: &mut fastrand::Rng) -> Self {
        let mut batch = Self { request: Vec::new(), replies: Vec::new() };
        for _ in 0..pipeline {
            let number = random.usize(..KEYS);
            let (key, value) = (key(number), value(number));
            match operation {
                Operation::Get => {
                    batch.request.extend(encode(&["GET", &key]));
                    batch.replies.extend(format!("${VALUE_BYTES}\r\n{value}\r\n").into_bytes());
                }
                Operation::Set => {
                    batch.request.extend(encode(&["SET", &key, &value]));
                    batch.replies.extend(b"+OK\r\n");
                }
            }
        }
        batch
    }
}

/// A load: which commands, how deep, over how many connections.
pub struct Workload {
    pub operation: Operation,
    pub pipeline: usize,
    pub connections: usize,
    pub batches: Vec<Batch>,
}

impl Workload {
    /// Random keys from a fixed seed: each run sends the same.
    pub fn new(operation: Operation, pipeline: usize, connections: usize) -> Self {
        let mut random = fastrand::Rng::with_seed(42);
        let count = (2048 / pipeline).max(64);
        let batches = (0..count).map(|_| Batch::new(operation, pipeline, &mut random)).collect();
        Self { operation, pipeline, connections, batches }
    }

    pub fn name(&self) -> String {
        format!("{} P{}", self.operation.name(), self.pipeline)
    }
}

pub fn key(number: usize) -> String {
    format!("bench:{number:06}")
}

/// The value of a key: its own name, repeated.
pub fn value(number: usize) -> String {
    let mut value = format!("{}-", key(number)).repeat(VALUE_BYTES);
    value.truncate(VALUE_BYTES);
    value
}

/// A command as an array of bulk strings.
pub fn encode(parts: &[&str]) -> Vec<u8> {
    let mut bytes = format!("*{}\r\n", parts.len()).into_bytes();
    for part in parts {
        bytes.extend_from_slice(format!("${}\r\n{part}\r\n", part.len()).as_bytes());
    }
    bytes
}

/// Whether `got` is what `expected` holds at `at`.
pub fn compare(expected: &[u8], at: usize, got: &[u8]) -> Result<(), LoadError> {
    match expected.get(at..at + got.len()) {
        Some(part) if part == got => Ok(()),
        _ => {
            let show = |bytes: &[u8]| String::from_utf8_lossy(&bytes[..bytes.len().min(120)]).into_owned();
            Err(LoadError::Mismatch { expected: show(&expected[at.min(expected.len())..]), got: show(got) })
        }
    }
}

/// Latencies in nanoseconds, from a microsecond to a minute.
pub fn histogram() -> Histogram<u64> {
    Histogram::new_with_bounds(1_000, 60_000_000_000, 3).expect("constant bounds")
}

/// Connected sockets, registered under their number.
pub fn connect(poll: &Poll, address: SocketAddr, count: usize) -> io::Result<Vec<TcpStream>> {
    (0..count)
        .map(|number| {
            let stream = std::net::TcpStream::connect_timeout(&address, STALL)?;
            stream.set_nodelay(true)?;
            stream.set_nonblocking(true)?;
            let mut stream = TcpStream::from_std(stream);
            poll.registry().register(&mut stream, Token(number), Interest::READABLE | Interest::WRITABLE)?;
            Ok(stream)
        })
        .collect()
}
