//! A real server behind a played one: it keeps keys and passes messages on, while who is who stays played.

use std::io;
use std::net::SocketAddr;

use redis::Cmd;
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader, copy_bidirectional};
use tokio::net::TcpStream;

use super::wire::Stream;

/// What it is asked.
const KEPT: [&str; 7] = ["EVAL", "GETRANGE", "SET", "DEL", "SREM", "PUBLISH", "SUBSCRIBE"];

/// Whether a command is for it.
pub fn is_asked(verb: &str) -> bool {
    KEPT.iter().any(|kept| verb.eq_ignore_ascii_case(kept))
}

/// One connection to it, behind one to the played server.
pub struct Keeper {
    stream: BufReader<TcpStream>,
}

impl Keeper {
    pub async fn connect(address: SocketAddr) -> io::Result<Self> {
        let stream = TcpStream::connect(address).await?;
        stream.set_nodelay(true)?;
        Ok(Self { stream: BufReader::new(stream) })
    }

    /// Has a command answered. The reply is as it came.
    pub async fn ask(&mut self, words: &[&str]) -> io::Result<Vec<u8>> {
        self.send(words).await?;
        let (mut reply, mut left) = (Vec::new(), 1);
        while left > 0 {
            left -= 1;
            let start = reply.len();
            self.stream.read_until(b'\n', &mut reply).await?;
            let line = std::str::from_utf8(&reply[start..]).ok().and_then(|line| line.strip_suffix("\r\n"));
            let line = line.ok_or(io::ErrorKind::UnexpectedEof)?;
            // Nothing has the length -1.
            let (kind, length) = (line.bytes().next(), line.get(1..).and_then(|length| length.parse::<usize>().ok()));
            match (kind, length) {
                (Some(b'*'), Some(length)) => left += length,
                (Some(b'$'), Some(length)) => {
                    let start = reply.len();
                    reply.resize(start + length + 2, 0);
                    self.stream.read_exact(&mut reply[start..]).await?;
                }
                _ => {}
            }
        }
        Ok(reply)
    }

    /// Sends a command, and leaves the connection to the two ends until one of them closes it.
    pub async fn join(mut self, mut client: Stream, words: &[&str]) -> io::Result<()> {
        self.send(words).await?;
        copy_bidirectional(&mut client, &mut self.stream).await?;
        Ok(())
    }

    async fn send(&mut self, words: &[&str]) -> io::Result<()> {
        let mut command = Cmd::new();
        for word in words {
            command.arg(*word);
        }
        self.stream.write_all(&command.get_packed_command()).await
    }
}
