//! Why a connection to a server ended.

use std::io;

use crate::sidecar::resp::ReplyError;

/// A server that owes an answer, to no command that blocks, and has been silent for this long is taken for dead.
pub const SILENCE_MS: u64 = 10_000;

/// What a client hears of a command that may have been carried out, and whose reply did not come. Never from where.
pub const LOST: &str =
    "UNCERTAIN the connection to the server was lost before it answered: the command may have been carried out";

/// Why a connection ended.
#[derive(Debug, thiserror::Error)]
pub enum Broken {
    /// The network failed.
    #[error("{0}")]
    Io(#[from] io::Error),
    /// The server closed it.
    #[error("the server closed the connection")]
    Closed,
    /// What came is no reply.
    #[error("{0}")]
    Reply(#[from] ReplyError),
    /// More replies came than were asked for.
    #[error("the server sent a reply that nobody asked for")]
    Unsolicited,
    /// A reply that has to be held is too long for it: the bound, in bytes.
    #[error("the server sent a reply longer than {0} bytes where none is expected")]
    TooLong(usize),
    /// No sign of life.
    #[error("the server was silent for {SILENCE_MS} ms")]
    Silent,
    /// Another server has its slots.
    #[error("another server has taken its place")]
    Displaced,
    /// It was closed from here.
    #[error("the node is no longer in use")]
    Retired,
}
