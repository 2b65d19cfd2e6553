//! Clients that need a server connection of their own for a while.
//!
//! | who | how long | what may be pending when they begin |
//! |---|---|---|
//! | [`transaction`] | MULTI to EXEC; WATCH keeps the connection aside until then; neither for long while idle | nothing |
//! | [`blocking`] | one command | nothing |
//! | [`stream`] | one command that is too long to be held | nothing |
//! | [`subscribe`] | while the client has subscriptions | nothing |
//!
//! A client comes here only when all its commands are answered, and leaves with all answered: its order never breaks. The
//! connections come from [`pool`], and go back only when nothing of the client is left on them.

mod blocking;
mod connection;
pub mod durable;
mod elsewhere;
mod exec_filter;
mod feed;
mod follow;
mod guard;
mod long_command;
mod long_fill;
mod long_pass;
mod long_split;
mod outlet;
pub mod pool;
mod spool;
mod stream;
mod subscribe;
mod transaction;
mod turn;
pub mod wait;

use std::cell::Cell;
use std::rc::Rc;

use connection::Dedicated;
use subscribe::Subscription;

use crate::sidecar::resp::encode;
use crate::sidecar::session::{Reader, Session};
use crate::sidecar::tracking;
use crate::sidecar::upstream::node::NodeAddr;

/// Why a client needs a connection of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exclusive {
    /// A command too long to be held.
    Stream,
    /// MULTI or WATCH.
    Transaction,
    /// A command that blocks.
    Blocking,
    /// A subscription.
    Subscribe,
}

/// What a client holds of its own at the servers between its commands.
#[derive(Debug, Default)]
pub struct Held {
    /// The connection on which keys are watched.
    watch: Option<Watch>,
    subscription: Option<Rc<Subscription>>,
}

impl Held {
    /// Whether keys are watched.
    pub fn is_watching(&self) -> bool {
        self.watch.is_some()
    }

    /// Gives the connection back on which keys are watched, where it has been kept aside since `deadline` or longer: the keys
    /// count as changed.
    pub fn expire_watch(&mut self, deadline: u64) {
        if matches!(&self.watch, Some(Watch::Kept { since, .. }) if *since <= deadline)
            && let Some(Watch::Kept { connection, .. }) = self.watch.replace(Watch::Lost)
        {
            tokio::task::spawn_local(transaction::unwatch(connection));
        }
    }

    /// How many channels, patterns and shard channels the client is subscribed to.
    pub fn subscriptions(&self) -> [usize; 3] {
        self.subscription.as_ref().map_or([0; 3], |subscription| subscription.counts())
    }

    /// Whether there is a subscription.
    pub fn is_subscribed(&self) -> bool {
        self.subscription.is_some()
    }
}

/// Where a command blocks.
#[derive(Debug, Clone)]
pub struct Waits {
    /// The server.
    pub node: NodeAddr,
    /// What the server calls the connection.
    pub number: i64,
    /// Set where the connection must serve nobody after this command.
    pub spoiled: Rc<Cell<bool>>,
}

/// Watched keys.
#[derive(Debug)]
enum Watch {
    /// The server watches.
    Kept {
        /// Where.
        connection: Box<Dedicated>,
        /// Their slot; [`ANY_SLOT`](crate::sidecar::upstream::queue::ANY_SLOT) where there are no slots.
        slot: u16,
        /// Since when it is kept aside, on the worker's clock.
        since: u64,
    },
    /// The connection was lost, or given back since the client was idle: the keys count as changed.
    Lost,
}

/// Serves the client on a connection of its own until the reason is gone. The command that asked is at the front of the inbox.
pub async fn run(reader: &mut Reader, wish: Exclusive) {
    match wish {
        Exclusive::Stream => stream::run(reader).await,
        Exclusive::Transaction => {
            transaction::run(reader).await;
            if subscribe::is_bound(reader.session()) {
                subscribe::run(reader).await;
            }
        }
        Exclusive::Blocking => blocking::run(reader).await,
        Exclusive::Subscribe => subscribe::run(reader).await,
    }
    if reader.session().is_tracking() {
        tracking::comes_back(reader.session());
    }
}

/// Answers the next command with an error.
fn refuse(session: &Rc<Session>, text: &str) {
    session.answer_now(|out| encode::error(out, text));
}
