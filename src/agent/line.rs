//! A connection to a server or a sentinel for the agent's own few commands, each with a deadline.

use std::time::Duration;

use tokio::io::BufReader;
use tokio::time::{Instant, timeout_at};

use crate::sidecar::upstream::access::Access;
use crate::sidecar::upstream::admin_client::{ReplyError, Value, ask};
use crate::sidecar::upstream::dial::{DialError, Link, dial_any};
use crate::sidecar::upstream::node::NodeAddr;

/// How long a connection and a command may take. Nothing that is asked takes a healthy server long.
pub const DEADLINE: Duration = Duration::from_secs(1);
/// The longest text of a server's error that is repeated.
const MAX_ERROR_CHARS: usize = 200;

/// Why a command brought nothing.
#[derive(Debug, thiserror::Error)]
pub enum LineError {
    /// There is no connection.
    #[error(transparent)]
    Dial(#[from] DialError),
    /// The reply cannot be read.
    #[error("{node}: {source}")]
    Reply {
        /// Who was asked.
        node: NodeAddr,
        /// Why.
        source: ReplyError,
    },
    /// The deadline passed.
    #[error("{node}: {command}: no answer within {DEADLINE:?}")]
    Timeout {
        /// Who was asked.
        node: NodeAddr,
        /// What: the command's name, never its arguments.
        command: String,
    },
    /// The answer was an error.
    #[error("{node}: {command}: {text}")]
    Refused {
        /// Who was asked.
        node: NodeAddr,
        /// What: the command's name, never its arguments.
        command: String,
        /// The server's words, shortened.
        text: String,
    },
}

/// A connection that is made when it is needed, and made again after a failure.
#[derive(Debug)]
pub struct Line {
    node: NodeAddr,
    access: Access,
    stream: Option<BufReader<Link>>,
}

impl Line {
    /// A line that is not connected yet.
    pub fn new(node: NodeAddr, access: Access) -> Self {
        Self { node, access, stream: None }
    }

    /// Whom it reaches.
    pub fn node(&self) -> &NodeAddr {
        &self.node
    }

    /// Gives up the connection: the next command is sent over another.
    pub fn hang_up(&mut self) {
        self.stream = None;
    }

    /// Sends one command. An answer that is an error is one here too.
    pub async fn ask(&mut self, command: &[&str]) -> Result<Value, LineError> {
        // Over a kept connection a server that has ended is only noticed now; and what was sent may have been done, so nothing is
        // sent twice.
        let deadline = Instant::now() + DEADLINE;
        let mut stream = match self.stream.take() {
            Some(stream) => stream,
            None => BufReader::with_capacity(4096, dial_any(&self.node, &self.access, deadline).await?.0),
        };
        let words: Vec<&[u8]> = command.iter().map(|word| word.as_bytes()).collect();
        let name = || command.iter().take(2).copied().collect::<Vec<_>>().join(" ");
        let replies = timeout_at(deadline, ask(&mut stream, &[&words])).await;
        let replies = replies.map_err(|_| LineError::Timeout { node: self.node.clone(), command: name() })?;
        let replies = replies.map_err(|source| LineError::Reply { node: self.node.clone(), source })?;
        self.stream = Some(stream);
        match replies.into_iter().next() {
            Some(Value::Error(text)) => {
                let text = text.chars().take(MAX_ERROR_CHARS).collect();
                Err(LineError::Refused { node: self.node.clone(), command: name(), text })
            }
            Some(value) => Ok(value),
            None => Ok(Value::Nil),
        }
    }

    /// The certificate that the server presented on this connection, DER. Connects where there is no connection.
    pub async fn presented_certificate(&mut self) -> Result<Option<Vec<u8>>, LineError> {
        if self.stream.is_none() {
            self.ask(&["PING"]).await.or_else(|error| match error {
                // Whatever it answers, it has shown its certificate.
                LineError::Refused { .. } => Ok(Value::Nil),
                other => Err(other),
            })?;
        }
        let Some(Link::Tls(stream)) = self.stream.as_ref().map(BufReader::get_ref) else { return Ok(None) };
        let chain = stream.get_ref().1.peer_certificates().unwrap_or_default();
        Ok(chain.first().map(|certificate| certificate.to_vec()))
    }
}
