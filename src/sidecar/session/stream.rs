//! The two kinds of socket that clients come on.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::task::{Context, Poll};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpStream, UnixStream, tcp, unix};

/// The half that commands come from.
#[derive(Debug)]
pub enum ClientReader {
    /// TCP.
    Tcp(tcp::OwnedReadHalf),
    /// A Unix socket.
    Unix(unix::OwnedReadHalf),
}

/// The half that replies go to.
#[derive(Debug)]
pub enum ClientWriter {
    /// TCP.
    Tcp(tcp::OwnedWriteHalf),
    /// A Unix socket.
    Unix(unix::OwnedWriteHalf),
    /// Of a client that wants no replies, or did once.
    Muted(Box<Muted>),
    /// None: only while one takes another's place.
    Gone,
}

/// What of a client's output reaches it: pushes always do, replies only while it wants them.
///
/// The output is one stream of bytes, so that what is slow to leave keeps its order. Here is told which of them are dropped.
#[derive(Debug)]
pub struct Muted {
    inner: ClientWriter,
    /// How the bytes that wait go on, the first ones first.
    runs: RefCell<VecDeque<Run>>,
    /// Whether what comes behind them is written.
    passes: bool,
}

/// So many bytes are dropped, and then so many are written.
#[derive(Debug)]
struct Run {
    dropped: usize,
    passed: usize,
}

/// The halves of a TCP client.
pub fn split_tcp(stream: TcpStream) -> (ClientReader, ClientWriter) {
    let (reader, writer) = stream.into_split();
    (ClientReader::Tcp(reader), ClientWriter::Tcp(writer))
}

/// The halves of a client on a Unix socket.
pub fn split_unix(stream: UnixStream) -> (ClientReader, ClientWriter) {
    let (reader, writer) = stream.into_split();
    (ClientReader::Unix(reader), ClientWriter::Unix(writer))
}

impl ClientReader {
    /// As [`AsyncRead::poll_read`].
    #[inline]
    pub fn poll_read(&mut self, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match self {
            Self::Tcp(half) => Pin::new(half).poll_read(cx, buffer),
            Self::Unix(half) => Pin::new(half).poll_read(cx, buffer),
        }
    }
}

impl ClientWriter {
    /// The address that the client connected to. `None` on a Unix socket.
    pub fn local_addr(&self) -> Option<SocketAddr> {
        match self {
            Self::Tcp(half) => half.local_addr().ok(),
            Self::Muted(muted) => muted.inner.local_addr(),
            Self::Unix(_) | Self::Gone => None,
        }
    }

    /// The address that the client came from. `None` on a Unix socket.
    pub fn peer_addr(&self) -> Option<SocketAddr> {
        match self {
            Self::Tcp(half) => half.peer_addr().ok(),
            Self::Muted(muted) => muted.inner.peer_addr(),
            Self::Unix(_) | Self::Gone => None,
        }
    }

    /// Writes without waiting.
    #[inline]
    pub fn try_write(&self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Self::Tcp(half) => half.try_write(bytes),
            Self::Unix(half) => half.try_write(bytes),
            Self::Muted(muted) => muted.try_write(bytes),
            Self::Gone => Err(io::ErrorKind::BrokenPipe.into()),
        }
    }

    /// As [`AsyncWrite::poll_write`].
    pub fn poll_write(&mut self, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        match self {
            Self::Tcp(half) => Pin::new(half).poll_write(cx, bytes),
            Self::Unix(half) => Pin::new(half).poll_write(cx, bytes),
            Self::Muted(muted) => muted.poll_write(cx, bytes),
            Self::Gone => Poll::Ready(Err(io::ErrorKind::BrokenPipe.into())),
        }
    }

    /// Whether replies are dropped.
    pub fn is_muted(&self) -> bool {
        matches!(self, Self::Muted(muted) if !muted.passes)
    }

    /// Drops the replies that come behind the `waiting` bytes.
    pub fn mute(&mut self, waiting: usize) {
        let mut muted = match std::mem::replace(self, Self::Gone) {
            Self::Muted(muted) => muted,
            inner => Box::new(Muted { inner, runs: RefCell::default(), passes: true }),
        };
        muted.decide(waiting);
        muted.passes = false;
        *self = Self::Muted(muted);
    }

    /// Writes what comes behind the `waiting` bytes.
    pub fn unmute(&mut self, waiting: usize) {
        if let Self::Muted(muted) = self {
            muted.decide(waiting);
            muted.passes = true;
        }
    }

    /// Tells that a push of `length` bytes is about to follow the `waiting` bytes.
    pub fn note_push(&self, waiting: usize, length: usize) {
        if let Self::Muted(muted) = self {
            muted.decide(waiting);
            muted.runs.borrow_mut().push_back(Run { dropped: 0, passed: length });
        }
    }
}

impl Muted {
    /// What becomes of all the `waiting` bytes is settled.
    fn decide(&self, waiting: usize) {
        let mut runs = self.runs.borrow_mut();
        let settled: usize = runs.iter().map(|run| run.dropped + run.passed).sum();
        let rest = waiting.saturating_sub(settled);
        if rest > 0 {
            runs.push_back(if self.passes { Run { dropped: 0, passed: rest } } else { Run { dropped: rest, passed: 0 } });
        }
    }

    fn try_write(&self, bytes: &[u8]) -> io::Result<usize> {
        let (skipped, room) = self.next(bytes.len());
        if skipped > 0 {
            return Ok(self.advance(skipped));
        }
        self.inner.try_write(&bytes[..room]).map(|count| self.advance(count))
    }

    fn poll_write(&mut self, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let (skipped, room) = self.next(bytes.len());
        if skipped > 0 {
            return Poll::Ready(Ok(self.advance(skipped)));
        }
        self.inner.poll_write(cx, &bytes[..room]).map_ok(|count| self.advance(count))
    }

    /// How many of the next `length` bytes are dropped; where none, how many are written.
    fn next(&self, length: usize) -> (usize, usize) {
        match self.runs.borrow().front() {
            Some(run) if run.dropped > 0 => (run.dropped.min(length), 0),
            Some(run) => (0, run.passed.min(length)),
            None if self.passes => (0, length),
            None => (length, 0),
        }
    }

    /// `count` bytes have gone; says so.
    fn advance(&self, count: usize) -> usize {
        let mut runs = self.runs.borrow_mut();
        if let Some(run) = runs.front_mut() {
            let gone = if run.dropped > 0 { &mut run.dropped } else { &mut run.passed };
            *gone -= count;
            if run.dropped + run.passed == 0 {
                runs.pop_front();
            }
        }
        count
    }
}
