//! Where clients wait before the first policy is there.
//!
//! Nothing can be done for them yet: not even where the cache is may be known, and what a command means depends on the policy. So
//! their commands are held, unread where there are many, for as long as a client is likely to wait, and then answered by an error
//! that says to try again. Once there is a policy, what is held is served, and nobody had to connect again.

use std::future::poll_fn;
use std::rc::Rc;
use std::task::{Poll, ready};
use std::time::Duration;

use tokio::io::ReadBuf;
use tokio::sync::watch;
use tokio::time::{Instant, sleep_until};

use super::resp::command::split_inline;
use super::resp::{CommandScan, CommandScanner, ProtocolError, encode};
use super::session::{ClientReader, ClientWriter};
use super::worker::Worker;

/// How long a command is held, which a policy would say: clients time out after 3 s.
const PATIENCE: Duration = Duration::from_secs(2);
/// How much of what a client sends is held.
const MOST_HELD_BYTES: usize = 64 * 1024;
const READ_BYTES: usize = 4096;
/// What a command gets that was held in vain.
const NO_POLICY: &str =
    "TRYAGAIN no policy has arrived for this workload yet: the command was not sent, and can safely be repeated";

/// Opens once there is a worker.
#[derive(Debug, Clone)]
pub struct Door {
    worker: watch::Receiver<Option<Rc<Worker>>>,
    /// As many as there are doors: each who waits holds one.
    waiting: Rc<()>,
}

impl Door {
    /// A door, and what opens it.
    pub fn new() -> (watch::Sender<Option<Rc<Worker>>>, Self) {
        let (opens, worker) = watch::channel(None);
        (opens, Self { worker, waiting: Rc::new(()) })
    }

    /// Who is behind it, where it is open.
    pub fn worker(&self) -> Option<Rc<Worker>> {
        self.worker.borrow().clone()
    }

    /// How many wait before it, to within the few that keep it.
    pub fn waiting(&self) -> usize {
        Rc::strong_count(&self.waiting)
    }
}

/// A client that is not served yet.
#[derive(Debug)]
pub struct Visitor {
    /// Where its commands come from.
    pub reader: ClientReader,
    /// Where its replies go.
    pub writer: ClientWriter,
    /// What it has sent.
    pub inbox: Vec<u8>,
}

/// Waits with `visitor` until the door opens. `None`: it left, or cannot be held.
pub async fn wait(visitor: &mut Visitor, mut door: Door) -> Option<Rc<Worker>> {
    let mut until: Option<Instant> = None;
    loop {
        let patience = async {
            match until {
                Some(until) => sleep_until(until).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            biased;
            opened = door.worker.wait_for(Option::is_some) => return opened.ok()?.clone(),
            is_there = visitor.read(), if visitor.inbox.len() < MOST_HELD_BYTES => {
                if !is_there {
                    return None;
                }
                until.get_or_insert_with(|| Instant::now() + PATIENCE);
            }
            () = patience => {
                visitor.turn_away().await?;
                until = (!visitor.inbox.is_empty()).then(|| Instant::now() + PATIENCE);
            }
        }
    }
}

impl Visitor {
    /// Reads once. False at the end.
    async fn read(&mut self) -> bool {
        poll_fn(|cx| {
            let mut bytes = [0; READ_BYTES];
            let mut buffer = ReadBuf::new(&mut bytes);
            let read = ready!(self.reader.poll_read(cx, &mut buffer));
            self.inbox.extend_from_slice(buffer.filled());
            Poll::Ready(read.is_ok() && !buffer.filled().is_empty())
        })
        .await
    }

    /// Answers the commands that are whole. `None`: the client cannot be held any longer.
    async fn turn_away(&mut self) -> Option<()> {
        let mut out = Vec::new();
        let taken = count_whole(&self.inbox, || encode::error(&mut out, NO_POLICY));
        let goes_on = match taken {
            Ok(taken) => {
                self.inbox.drain(..taken);
                self.inbox.len() < MOST_HELD_BYTES
            }
            Err(error) => {
                error.write(&mut out);
                false
            }
        };
        if !goes_on && out.is_empty() {
            encode::error(&mut out, NO_POLICY);
        }
        self.write(&out).await?;
        goes_on.then_some(())
    }

    async fn write(&mut self, mut bytes: &[u8]) -> Option<()> {
        while !bytes.is_empty() {
            let written = poll_fn(|cx| self.writer.poll_write(cx, bytes)).await.ok().filter(|written| *written > 0)?;
            bytes = &bytes[written..];
        }
        Some(())
    }
}

/// How many bytes of `inbox` are whole commands, each of which is told.
fn count_whole(inbox: &[u8], mut tell: impl FnMut()) -> Result<usize, ProtocolError> {
    let mut taken = 0;
    loop {
        let rest = &inbox[taken..];
        let mut scanner = CommandScanner::default();
        let (length, is_command) = match scanner.scan(rest)? {
            CommandScan::Incomplete => return Ok(taken),
            CommandScan::Complete { length } => (length, !scanner.ranges().is_empty()),
            CommandScan::Inline { length } => (length, !split_inline(&rest[..length])?.is_empty()),
        };
        taken += length;
        if is_command {
            tell();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sidecar::session::split_tcp;
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio::net::{TcpListener, TcpStream};

    async fn visitor() -> (Visitor, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let client = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        let (reader, writer) = split_tcp(listener.accept().await.unwrap().0);
        (Visitor { reader, writer, inbox: Vec::new() }, client)
    }

    #[tokio::test]
    async fn commands_are_held_and_then_answered_one_by_one() {
        let (mut visitor, mut client) = visitor().await;
        let (_opens, door) = Door::new();
        let came = Instant::now();
        client.write_all(b"*1\r\n$4\r\nPING\r\nGET k\r\n\r\n*2\r\n$3\r\nGET\r\n$1\r\nk").await.unwrap();
        let answers = async {
            let mut answers = vec![0; 2 * (NO_POLICY.len() + 3)];
            client.read_exact(&mut answers).await.unwrap();
            String::from_utf8(answers).unwrap()
        };
        let answers = tokio::select! {
            answers = answers => answers,
            _ = wait(&mut visitor, door) => panic!("nothing opens"),
        };
        assert_eq!(answers, format!("-{NO_POLICY}\r\n").repeat(2));
        assert!(came.elapsed() >= PATIENCE);
        assert_eq!(visitor.inbox, b"*2\r\n$3\r\nGET\r\n$1\r\nk", "what is not whole is kept");
    }

    #[tokio::test]
    async fn who_breaks_the_protocol_or_sends_too_much_is_told_and_leaves() {
        for (sent, said) in [(b"*x\r\n".to_vec(), "-ERR Protocol error"), (vec![b'x'; MOST_HELD_BYTES], "-")] {
            let (mut visitor, mut client) = visitor().await;
            let (_opens, door) = Door::new();
            client.write_all(&sent).await.unwrap();
            assert!(wait(&mut visitor, door).await.is_none());
            drop(visitor);
            let mut answer = String::new();
            client.read_to_string(&mut answer).await.unwrap();
            assert!(answer.starts_with(said), "{answer}");
        }
    }

    #[tokio::test]
    async fn who_leaves_is_forgotten() {
        let (mut visitor, client) = visitor().await;
        let (_opens, door) = Door::new();
        drop(client);
        assert!(wait(&mut visitor, door).await.is_none());
    }
}
