//! A connection that hears channels: bounded, whatever is said there.
//!
//! A workload may publish on its own channel what it likes, as long as it likes. So messages are read by hand: what is longer than any
//! heartbeat is passed over without being kept.

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use redis::Cmd;
use tokio::io::{AsyncBufRead, AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader, ReadHalf, WriteHalf};
use tokio::time::timeout;

use crate::operator::admin::{self, Entry, Login, Stream};
use crate::policy::heartbeat::MAX_BYTES;

/// How long a connection, the login and the first subscription may take, and how long a command may take to leave.
const WITHIN: Duration = Duration::from_secs(2);
/// How long a server may say nothing. It is asked more often than that.
const SILENCE: Duration = Duration::from_secs(12);
/// How often a silent server is asked whether it is there.
pub const PING_EVERY: Duration = Duration::from_secs(5);
/// The longest line, and the longest name of a channel.
const MAX_LINE: u64 = 512;
const MAX_NAME: usize = 256;
/// How much is read at a time.
const BUFFER: usize = 16 * 1024;

/// Asks for channels.
pub struct Asks {
    stream: WriteHalf<Stream>,
}

/// Hears them.
pub struct Hears {
    frames: Frames<BufReader<ReadHalf<Stream>>>,
}

/// Subscribes to channels, one at the least. Returns once it hears the first.
pub async fn open(address: SocketAddr, entry: Entry<'_>, channels: &[String]) -> io::Result<(Asks, Hears)> {
    let connect = async {
        let (stream, _) = admin::open(address, entry.trust).await?;
        let (reads, mut writes) = tokio::io::split(stream);
        let mut commands = entry.login.map(login).unwrap_or_default();
        commands.extend(command("SUBSCRIBE", channels));
        writes.write_all(&commands).await?;
        writes.flush().await?;
        let mut frames = Frames::new(BufReader::with_capacity(BUFFER, reads));
        while frames.next().await? != Frame::Subscribed {}
        Ok((Asks { stream: writes }, Hears { frames }))
    };
    timeout(WITHIN, connect).await.map_err(|_| io::Error::from(io::ErrorKind::TimedOut))?
}

impl Asks {
    /// Also these channels.
    pub async fn subscribe(&mut self, channels: &[String]) -> io::Result<()> {
        self.send("SUBSCRIBE", channels).await
    }

    /// These no longer.
    pub async fn unsubscribe(&mut self, channels: &[String]) -> io::Result<()> {
        self.send("UNSUBSCRIBE", channels).await
    }

    /// Whether somebody is there: the answer ends the silence.
    pub async fn ping(&mut self) -> io::Result<()> {
        self.write(&command("PING", &[])).await
    }

    async fn send(&mut self, name: &str, channels: &[String]) -> io::Result<()> {
        // Without a channel, UNSUBSCRIBE means all.
        if channels.is_empty() { Ok(()) } else { self.write(&command(name, channels)).await }
    }

    async fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        let write = async {
            self.stream.write_all(bytes).await?;
            self.stream.flush().await
        };
        timeout(WITHIN, write).await.map_err(|_| io::Error::from(io::ErrorKind::TimedOut))?
    }
}

impl Hears {
    /// Hands messages on, with the channels that they came by, until the connection ends or falls silent.
    pub async fn run(mut self, mut on_message: impl FnMut(&str, &[u8])) -> io::Error {
        loop {
            match timeout(SILENCE, self.frames.next()).await {
                Ok(Ok(Frame::Message)) => on_message(&self.frames.channel, &self.frames.payload),
                Ok(Ok(Frame::Subscribed | Frame::Other)) => {}
                Ok(Err(error)) => return error,
                Err(_) => return io::ErrorKind::TimedOut.into(),
            }
        }
    }
}

fn login(Login { user, password }: &Login) -> Vec<u8> {
    Cmd::new().arg("AUTH").arg(user).arg(password).get_packed_command()
}

fn command(name: &str, arguments: &[String]) -> Vec<u8> {
    Cmd::new().arg(name).arg(arguments).get_packed_command()
}

/// What a server sent.
#[derive(Debug, PartialEq, Eq)]
enum Frame {
    /// A message, which is kept in the reader.
    Message,
    /// That a channel is heard.
    Subscribed,
    /// Anything else.
    Other,
}

/// Reads what a server sends to those who subscribed.
struct Frames<R> {
    reader: R,
    line: String,
    kind: Vec<u8>,
    channel: String,
    payload: Vec<u8>,
}

impl<R: AsyncBufRead + Unpin> Frames<R> {
    fn new(reader: R) -> Self {
        Self { reader, line: String::new(), kind: Vec::new(), channel: String::new(), payload: Vec::new() }
    }

    /// The next frame. Whoever gives it up in the middle gives the connection up.
    async fn next(&mut self) -> io::Result<Frame> {
        let length = match self.next_line().await? {
            b'*' => number(&self.line)?,
            b'+' => return Ok(Frame::Other),
            // The code alone: what follows may repeat what was sent.
            b'-' => return Err(io::Error::other(self.line.split(' ').next().unwrap_or_default().to_owned())),
            _ => return Err(nonsense()),
        };
        if !(1..=3).contains(&length) {
            return Err(nonsense());
        }
        let mut kind = std::mem::take(&mut self.kind);
        let mut name = std::mem::take(&mut self.channel).into_bytes();
        let mut payload = std::mem::take(&mut self.payload);
        let mut whole = self.element(&mut kind, MAX_NAME).await?;
        whole &= length < 2 || self.element(&mut name, MAX_NAME).await?;
        whole &= length < 3 || self.element(&mut payload, MAX_BYTES).await?;
        let frame = match &kind[..] {
            b"message" if whole && length == 3 => Frame::Message,
            b"subscribe" => Frame::Subscribed,
            _ => Frame::Other,
        };
        self.channel = String::from_utf8(name).unwrap_or_default();
        (self.kind, self.payload) = (kind, payload);
        Ok(frame)
    }

    /// Reads a bulk string or a number. Whether it is kept: what is too long is not.
    async fn element(&mut self, into: &mut Vec<u8>, most: usize) -> io::Result<bool> {
        into.clear();
        match self.next_line().await? {
            b':' => return Ok(true),
            b'$' => {}
            _ => return Err(nonsense()),
        }
        // That there is nothing has no length.
        let Ok(length) = usize::try_from(number(&self.line)?) else { return Ok(true) };
        let mut left = length;
        while left > 0 {
            let some = self.reader.fill_buf().await?;
            if some.is_empty() {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            let part = some.len().min(left);
            if length <= most {
                into.extend_from_slice(&some[..part]);
            }
            self.reader.consume(part);
            left -= part;
        }
        let mut end = [0; 2];
        self.reader.read_exact(&mut end).await?;
        if end == *b"\r\n" { Ok(length <= most) } else { Err(nonsense()) }
    }

    /// Reads a line, and keeps what follows its first byte.
    async fn next_line(&mut self) -> io::Result<u8> {
        self.line.clear();
        let mut bytes = std::mem::take(&mut self.line).into_bytes();
        (&mut self.reader).take(MAX_LINE).read_until(b'\n', &mut bytes).await?;
        let line = match bytes.strip_suffix(b"\r\n") {
            Some(line) => line,
            None if bytes.is_empty() => return Err(io::ErrorKind::UnexpectedEof.into()),
            None => return Err(nonsense()),
        };
        let Some((first, rest)) = line.split_first() else { return Err(nonsense()) };
        self.line = String::from_utf8_lossy(rest).into_owned();
        Ok(*first)
    }
}

fn number(text: &str) -> io::Result<i64> {
    text.parse().map_err(|_| nonsense())
}

fn nonsense() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, "the server does not speak its protocol")
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use tokio::runtime::Builder;

    use super::*;

    /// All messages in what a server sent, and how it ended.
    fn heard(sent: &[u8], buffer: usize) -> (Vec<(String, Vec<u8>)>, io::ErrorKind) {
        let runtime = Builder::new_current_thread().build().unwrap();
        runtime.block_on(async {
            let mut frames = Frames::new(BufReader::with_capacity(buffer, sent));
            let mut messages = Vec::new();
            loop {
                match frames.next().await {
                    Ok(Frame::Message) => messages.push((frames.channel.clone(), frames.payload.clone())),
                    Ok(_) => {}
                    Err(error) => return (messages, error.kind()),
                }
            }
        })
    }

    fn message(channel: &str, payload: &[u8]) -> Vec<u8> {
        let head = format!("*3\r\n$7\r\nmessage\r\n${}\r\n{channel}\r\n${}\r\n", channel.len(), payload.len());
        [head.as_bytes(), payload, b"\r\n"].concat()
    }

    #[test]
    fn what_is_no_heartbeat_is_passed_over() {
        let sent = [
            b"+OK\r\n*3\r\n$9\r\nsubscribe\r\n$1\r\na\r\n:1\r\n".to_vec(),
            message("a", b"one"),
            message("a", &vec![b'x'; MAX_BYTES * 10]),
            message(&"n".repeat(MAX_NAME + 1), b"named too long"),
            b"*2\r\n$4\r\npong\r\n$0\r\n\r\n*3\r\n$11\r\nunsubscribe\r\n$-1\r\n:0\r\n".to_vec(),
            message("a", &vec![b'y'; MAX_BYTES]),
            message("b", b""),
        ]
        .concat();
        let told = |channel: &str, payload: &[u8]| (channel.to_owned(), payload.to_vec());
        let expected = vec![told("a", b"one"), told("a", &vec![b'y'; MAX_BYTES]), told("b", b"")];
        for buffer in [16, 1000, BUFFER] {
            assert_eq!(heard(&sent, buffer), (expected.clone(), io::ErrorKind::UnexpectedEof));
        }
        assert_eq!(heard(b"-NOAUTH Authentication required\r\n", 64).1, io::ErrorKind::Other);
        assert_eq!(heard(format!("*{}", "9".repeat(1000)).as_bytes(), 64).1, io::ErrorKind::InvalidData);
    }

    proptest! {
        #[test]
        fn messages_are_read_whatever_is_in_them(
            all in proptest::collection::vec(("[a-z:]{1,30}", proptest::collection::vec(any::<u8>(), 0..100)), 0..8), buffer in 1usize..40
        ) {
            let sent: Vec<u8> = all.iter().flat_map(|(channel, payload)| message(channel, payload)).collect();
            prop_assert_eq!(heard(&sent, buffer), (all, io::ErrorKind::UnexpectedEof));
        }

        #[test]
        fn what_is_no_protocol_ends_the_connection(sent in proptest::collection::vec(any::<u8>(), 0..200), at in 0usize..60) {
            let mut sent = [message("a", b"one"), sent].concat();
            let (messages, _) = heard(&sent, 64);
            prop_assert!(messages.len() <= 20);
            let at = at % sent.len();
            sent[at] ^= 0x55;
            heard(&sent, 64);
        }
    }
}
