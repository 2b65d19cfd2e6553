//! The connection on which the stream is read: a read blocks until something comes.

use std::rc::Rc;
use std::time::Duration;

use tokio::io::BufReader;
use tokio::time::timeout;

use super::position::{EntryId, Position, Stream};
use crate::policy::events::STREAM;
use crate::sidecar::resp::Protocol;
use crate::sidecar::upstream::admin_client::{ReplyError, Value, ask};
use crate::sidecar::upstream::dial::{DialError, Link};
use crate::sidecar::upstream::lane::Lane;
use crate::sidecar::upstream::open::open;
use crate::sidecar::upstream::router::Node;
use crate::sidecar::worker::Worker;

/// How long a read waits for an entry: often enough to notice what happens to the stream without one.
const BLOCK_MS: &str = "1000";
/// How long a server may take beyond that.
const ANSWER_LIMIT: Duration = Duration::from_secs(5);
/// The most entries of one read.
const MOST_READ: &str = "128";
/// The most entries that are kept. A server trims in steps of a hundred or so.
pub const MOST_KEPT: u64 = 65_536;

/// The id of the first entry behind the one in ARGV, without what it says.
const NEXT_ID: &str = "\
local found = redis.call('XRANGE', KEYS[1], '(' .. ARGV[1], '+', 'COUNT', 1)
return found[1] and found[1][1]";

/// Why a connection is given up.
#[derive(Debug, thiserror::Error)]
pub enum LineError {
    /// It did not come about.
    #[error(transparent)]
    Dial(#[from] DialError),
    /// It failed.
    #[error(transparent)]
    Reply(#[from] ReplyError),
    /// The server does not answer.
    #[error("the server does not answer")]
    Silent,
    /// It answers with something else.
    #[error("the server said `{0}`")]
    Refused(String),
}

/// An entry: its pairs. `None`: it is too large to be read.
pub type Entry = Option<Vec<(Vec<u8>, Vec<u8>)>>;

/// What one read brought.
#[derive(Debug, Default)]
pub struct Batch {
    /// The entries, with their ids.
    pub entries: Vec<(EntryId, Entry)>,
    /// What the server said of the stream afterwards.
    pub stream: Stream,
}

/// The connection.
#[derive(Debug)]
pub struct Line(BufReader<Link>);

impl Line {
    /// Connects to `node`.
    ///
    /// # Errors
    /// Where that fails within some seconds.
    pub async fn open(worker: &Rc<Worker>, node: &Rc<Node>) -> Result<Self, LineError> {
        let link = open(worker, node.address(), Lane::of(Protocol::Resp2, 0)).await?;
        Ok(Self(BufReader::new(link)))
    }

    /// What the server says of the stream.
    ///
    /// # Errors
    /// As [`Line::read`].
    pub async fn stream(&mut self) -> Result<Stream, LineError> {
        let [answer] = self.ask([&[b"XINFO", b"STREAM", STREAM.as_bytes()]]).await?;
        stream_of(&answer)
    }

    /// What comes behind `position`, at once or within a second.
    ///
    /// # Errors
    /// Where the connection is of no more use.
    pub async fn read(&mut self, position: Position) -> Result<Batch, LineError> {
        let id = position.id.to_string();
        let read: [&[u8]; 8] = [
            b"XREAD",
            b"COUNT",
            MOST_READ.as_bytes(),
            b"BLOCK",
            BLOCK_MS.as_bytes(),
            b"STREAMS",
            STREAM.as_bytes(),
            id.as_bytes(),
        ];
        let [entries, stream] = self.ask([&read, &[b"XINFO", b"STREAM", STREAM.as_bytes()]]).await?;
        Ok(Batch { entries: entries_of(entries)?, stream: stream_of(&stream)? })
    }

    /// The entry behind `position` alone, where a read would bring more than is taken. One that is too large by itself comes without what it
    /// says.
    ///
    /// # Errors
    /// As [`Line::read`].
    pub async fn read_one(&mut self, worker: &Rc<Worker>, node: &Rc<Node>, position: Position) -> Result<Batch, LineError> {
        let id = position.id.to_string();
        let next: [&[u8]; 5] = [b"EVAL_RO", NEXT_ID.as_bytes(), b"1", STREAM.as_bytes(), id.as_bytes()];
        let [next] = self.ask([&next]).await?;
        let Some(next) = next.as_str().and_then(|id| id.parse::<EntryId>().ok()) else {
            return Ok(Batch { entries: Vec::new(), stream: self.stream().await? });
        };
        let only: [&[u8]; 6] = [b"XREAD", b"COUNT", b"1", b"STREAMS", STREAM.as_bytes(), id.as_bytes()];
        let entries = match self.ask([&only]).await {
            Ok([entries]) => entries_of(entries)?,
            Err(LineError::Reply(ReplyError::TooLarge)) => {
                *self = Self::open(worker, node).await?;
                vec![(next, None)]
            }
            Err(error) => return Err(error),
        };
        Ok(Batch { entries, stream: self.stream().await? })
    }

    /// Drops the oldest entries beyond [`MOST_KEPT`], about.
    ///
    /// # Errors
    /// As [`Line::read`].
    pub async fn trim(&mut self) -> Result<(), LineError> {
        let most = MOST_KEPT.to_string();
        let [answer] = self.ask([&[b"XTRIM", STREAM.as_bytes(), b"MAXLEN", b"~", most.as_bytes()]]).await?;
        if let Value::Error(text) = answer { Err(LineError::Refused(text)) } else { Ok(()) }
    }

    async fn ask<const N: usize>(&mut self, commands: [&[&[u8]]; N]) -> Result<[Value; N], LineError> {
        let answers = timeout(ANSWER_LIMIT, ask(&mut self.0, &commands)).await.map_err(|_| LineError::Silent)??;
        answers.try_into().map_err(|_| LineError::Silent)
    }
}

fn stream_of(answer: &Value) -> Result<Stream, LineError> {
    Stream::read(answer).ok_or_else(|| refused(answer))
}

fn refused(answer: &Value) -> LineError {
    LineError::Refused(match answer {
        Value::Error(text) => text.clone(),
        _ => "something that no server of a known version says".to_owned(),
    })
}

/// The entries of XREAD's answer about one stream.
fn entries_of(answer: Value) -> Result<Vec<(EntryId, Entry)>, LineError> {
    if answer == Value::Nil {
        return Ok(Vec::new());
    }
    let entries = answer.as_list().and_then(|streams| streams.first()?.as_list()?.get(1)?.as_list());
    let read = |entry: &Value| {
        let [id, pairs] = entry.as_list()? else { return None };
        let words: Vec<&Value> = pairs.as_list()?.iter().collect();
        let bytes = |word: &Value| if let Value::Text(bytes) = word { Some(bytes.clone()) } else { None };
        let pairs = words.chunks_exact(2).map(|pair| Some((bytes(pair[0])?, bytes(pair[1])?))).collect::<Option<Vec<_>>>()?;
        Some((id.as_str()?.parse::<EntryId>().ok()?, Some(pairs)))
    };
    entries.and_then(|entries| entries.iter().map(read).collect()).ok_or_else(|| refused(&answer))
}
