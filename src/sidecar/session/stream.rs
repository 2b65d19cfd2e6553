//! The two kinds of socket that clients come on.

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
            Self::Unix(_) => None,
        }
    }

    /// The address that the client came from. `None` on a Unix socket.
    pub fn peer_addr(&self) -> Option<SocketAddr> {
        match self {
            Self::Tcp(half) => half.peer_addr().ok(),
            Self::Unix(_) => None,
        }
    }

    /// Writes without waiting.
    #[inline]
    pub fn try_write(&self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Self::Tcp(half) => half.try_write(bytes),
            Self::Unix(half) => half.try_write(bytes),
        }
    }

    /// As [`AsyncWrite::poll_write`].
    pub fn poll_write(&mut self, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        match self {
            Self::Tcp(half) => Pin::new(half).poll_write(cx, bytes),
            Self::Unix(half) => Pin::new(half).poll_write(cx, bytes),
        }
    }
}
