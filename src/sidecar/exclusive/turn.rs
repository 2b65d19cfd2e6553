//! One wait of a client's task that has a connection of its own: for the server, for the client, for either to take bytes.

use std::future::poll_fn;
use std::rc::Rc;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::time::timeout;

use super::connection::Dedicated;
use crate::sidecar::session::{Ending, Reader, Session};
use crate::sidecar::upstream::broken::Broken;
use crate::sidecar::upstream::queue::ANY_SLOT;

/// How often silence and the topology are looked at.
const LOOK: Duration = Duration::from_millis(200);
/// A client that does not read its replies is not read from.
const MOST_UNREAD: usize = 256 * 1024;

/// What is waited for. Whatever comes first ends the wait.
#[derive(Debug, Clone, Copy)]
pub struct Want {
    /// Bytes of the client, while fewer than so many wait.
    pub input: usize,
    /// All owed replies.
    pub settled: bool,
    /// Fewer unsent bytes than this.
    pub unsent_below: usize,
    /// The slot that the connection serves.
    pub slot: u16,
    /// Whether the server is to answer within seconds.
    pub answers_soon: bool,
    /// Whether the client may be let go when the sidecar drains.
    pub may_drain: bool,
    /// Since when, on the worker's clock, the client has not gone on with its transaction or long command. Absent: it need not.
    pub idle_since: Option<u64>,
}

impl Default for Want {
    fn default() -> Self {
        Self {
            input: 0,
            settled: false,
            unsent_below: 0,
            slot: ANY_SLOT,
            answers_soon: false,
            may_drain: false,
            idle_since: None,
        }
    }
}

/// What came.
#[derive(Debug)]
pub enum Turn {
    /// Bytes of the client.
    Input,
    /// All that was asked of the server is answered.
    Settled,
    /// Room for more bytes towards the server.
    Room,
    /// The client sends no more.
    Ended,
    /// The session is over.
    Gone,
    /// The connection is lost.
    Lost(Broken),
    /// Nothing, for longer than a transaction may be idle.
    Late,
    /// An element of EXEC's reply that Larder has a part in.
    Due,
}

/// Waits. Meanwhile bytes flow in both directions.
pub async fn turn(reader: &mut Reader, mut connection: Option<&mut Dedicated>, want: Want) -> Turn {
    loop {
        match timeout(LOOK, poll_fn(|cx| poll_turn(reader, connection.as_deref_mut(), want, cx))).await {
            Ok(turn) => return turn,
            Err(_) => {
                let broken = connection.as_mut().and_then(|connection| connection.overdue(want.slot, want.answers_soon));
                if let Some(broken) = broken {
                    return Turn::Lost(broken);
                }
                let worker = reader.session().worker();
                if want.idle_since.is_some_and(|since| worker.now() >= since + worker.idle_transaction()) {
                    return Turn::Late;
                }
            }
        }
    }
}

fn poll_turn(reader: &mut Reader, connection: Option<&mut Dedicated>, want: Want, cx: &mut Context<'_>) -> Poll<Turn> {
    let session = reader.session().clone();
    session.remember_waker(cx);
    let came = poll_server(&session, connection, want, cx);
    session.worker().flush_dirty();
    if session.output_bytes() > 0 {
        session.poll_flush(cx);
    }
    if session.ending() == Ending::Now {
        return Poll::Ready(Turn::Gone);
    }
    if let Some(came) = came {
        return Poll::Ready(came);
    }
    if want.may_drain && session.ending() == Ending::Draining {
        return Poll::Ready(Turn::Ended);
    }
    if reader.has_ended() {
        // Told once more to each who asks: nobody may wait for what cannot come.
        return if want.input > 0 { Poll::Ready(Turn::Ended) } else { Poll::Pending };
    }
    if session.output_bytes() < MOST_UNREAD && reader.poll_fill(cx, want.input).is_ready() {
        return Poll::Ready(if reader.has_ended() { Turn::Ended } else { Turn::Input });
    }
    Poll::Pending
}

fn poll_server(session: &Rc<Session>, connection: Option<&mut Dedicated>, want: Want, cx: &mut Context<'_>) -> Option<Turn> {
    let connection = connection?;
    loop {
        match connection.poll(Some(session), cx) {
            Err(broken) => return Some(Turn::Lost(broken)),
            Ok(_) if connection.is_due() => return Some(Turn::Due),
            Ok(_) if want.settled && connection.is_settled() => return Some(Turn::Settled),
            Ok(_) if connection.unsent() < want.unsent_below => return Some(Turn::Room),
            Ok(false) => return None,
            Ok(true) => {}
        }
        let before = session.output_bytes();
        session.poll_flush(cx);
        if session.output_bytes() == before || session.is_closed() {
            // The task is woken when the client has read.
            return None;
        }
    }
}
