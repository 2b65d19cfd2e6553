//! The stream of a slot: what was committed, in the order of the commits, and what was confirmed of it.

use std::time::{Duration, SystemTime};

use tokio::time::{Instant, timeout};

use super::address::Address;
use super::link::{Frame, Link, refused};
use super::pgoutput::{DecodeError, Lsn, Message};
use super::wire::{self, Piece, Said, WireError};
use crate::origin::error::Failure;

/// A server that has said nothing for so long is asked whether it is there.
const ASK_AFTER: Duration = Duration::from_secs(5);
/// One that has not answered for so long is given up.
const SILENT_AFTER: Duration = Duration::from_secs(20);
/// From 1970-01-01 to 2000-01-01, from which Postgres counts.
const EPOCH: Duration = Duration::from_secs(946_684_800);
/// What a server says of a name that it does not know.
const UNDEFINED_OBJECT: &str = "42704";

/// Why a stream ends.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Ended {
    /// The publication, or something else that the slot needs, was not there when what it tells was committed: it cannot go on.
    Useless(String),
    /// All else.
    Failure(Failure),
}

impl From<Failure> for Ended {
    fn from(failure: Failure) -> Self {
        Self::Failure(failure)
    }
}

/// Which server speaks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    /// The number of the cluster, and of the timeline that it is on: what it says of places in its log means something on this one alone.
    pub system: String,
    /// The database.
    pub database: String,
}

/// What a stream brings.
#[derive(Debug, PartialEq, Eq)]
pub enum Told<'a> {
    /// A message.
    Message {
        /// When the server sent it, in microseconds since 2000-01-01, by its clock.
        sent: i64,
        /// What it says.
        message: Message<'a>,
    },
    /// Nothing is to be told up to there.
    Alive {
        /// The place in the log.
        end: Lsn,
        /// When the server said so, as for a message.
        sent: i64,
    },
    /// Something that was larger than [`super::MOST_BYTES`], and was passed over.
    TooLarge,
}

/// The stream.
pub(super) struct Stream {
    link: Link,
    /// Up to where the server need not keep anything.
    done: Lsn,
    heard: Instant,
}

impl Stream {
    /// Connects, and asks who answers.
    pub async fn open(address: &Address) -> Result<(Self, Identity), Failure> {
        let mut link = Link::open(address).await?;
        let rows = link.rows("IDENTIFY_SYSTEM").await?;
        let cell = |at: usize| rows.first().and_then(|row| row.get(at)?.clone());
        let unknown = || Failure::Unreachable("the server does not say who it is".to_owned());
        let (system, timeline) = (cell(0).ok_or_else(unknown)?, cell(1).ok_or_else(unknown)?);
        let identity = Identity { system: format!("{system}/{timeline}"), database: cell(3).ok_or_else(unknown)? };
        Ok((Self { link, done: Lsn::default(), heard: Instant::now() }, identity))
    }

    /// Begins where the slot was confirmed up to. Both names are plain. With `notes`, what was noted in the log is told too.
    pub async fn start(&mut self, slot: &str, publication: &str, notes: bool) -> Result<(), Failure> {
        let notes = if notes { ", messages 'true'" } else { "" };
        let command = format!(
            "START_REPLICATION SLOT \"{slot}\" LOGICAL 0/0 (proto_version '1', publication_names '\"{publication}\"'{notes})"
        );
        self.link.send(&wire::query(&command)).await?;
        loop {
            match self.link.said().await? {
                Said::StreamBegins => return Ok(()),
                Said::Refuses(refusal) => return Err(refused(&refusal)),
                _ => {}
            }
        }
    }

    /// Waits for what comes next. A server that says nothing is asked, and given up where it stays silent.
    pub async fn next(&mut self) -> Result<Told<'_>, Ended> {
        loop {
            match timeout(ASK_AFTER, self.link.frame()).await {
                Err(_) if self.heard.elapsed() > SILENT_AFTER => {
                    return Err(Failure::Unreachable("the server is silent".to_owned()).into());
                }
                Err(_) => self.tell(true).await?,
                Ok(frame) => {
                    self.heard = Instant::now();
                    match frame? {
                        Frame::TooLarge => return Ok(Told::TooLarge),
                        Frame::Whole(kind, body) => match self.piece(kind, body.clone())? {
                            Heard::Data => return self.message(body),
                            Heard::Alive { end, sent, reply } => {
                                if reply {
                                    self.tell(false).await?;
                                }
                                return Ok(Told::Alive { end, sent });
                            }
                            Heard::Nothing => {}
                        },
                    }
                }
            }
        }
    }

    /// What a message is, so far as it is not about rows.
    fn piece(&self, kind: u8, body: std::ops::Range<usize>) -> Result<Heard, Ended> {
        match Said::parse(kind, self.link.bytes(body)).map_err(unspoken)? {
            Said::Piece(bytes) => match Piece::parse(bytes).map_err(unspoken)? {
                Piece::Data { .. } => Ok(Heard::Data),
                Piece::Alive { end, sent, reply } => Ok(Heard::Alive { end, sent, reply }),
            },
            Said::Refuses(refusal) if refusal.code == UNDEFINED_OBJECT => Err(Ended::Useless(refusal.text)),
            Said::Refuses(refusal) => Err(refused(&refusal).into()),
            Said::StreamEnds => Err(Failure::Unreachable("the server ended the stream".to_owned()).into()),
            _ => Ok(Heard::Nothing),
        }
    }

    fn message(&self, body: std::ops::Range<usize>) -> Result<Told<'_>, Ended> {
        match Piece::parse(self.link.bytes(body)).map_err(unspoken)? {
            Piece::Data { sent, message } => Ok(Told::Message { sent, message: Message::parse(message).map_err(undecoded)? }),
            Piece::Alive { end, sent, .. } => Ok(Told::Alive { end, sent }),
        }
    }

    /// Whether something is there already.
    pub fn has_more(&mut self) -> bool {
        self.link.has_frame()
    }

    /// Says that all up to `done` has been carried out: the server need not keep it.
    pub async fn confirm(&mut self, done: Lsn) -> Result<(), Failure> {
        self.done = self.done.max(done);
        self.tell(false).await
    }

    /// Says that this side is there.
    pub async fn tell(&mut self, reply: bool) -> Result<(), Failure> {
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().saturating_sub(EPOCH);
        let time = i64::try_from(now.as_micros()).unwrap_or_default();
        self.link.send(&wire::status(self.done, self.done, time, reply)).await
    }
}

/// What a message of the protocol brings.
enum Heard {
    Data,
    Alive { end: Lsn, sent: i64, reply: bool },
    Nothing,
}

fn unspoken(error: WireError) -> Ended {
    Failure::Unreachable(error.to_string()).into()
}

fn undecoded(error: DecodeError) -> Ended {
    Failure::Unreachable(format!("the stream is not understood: {error}")).into()
}
