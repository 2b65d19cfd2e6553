//! Connections to one server that one client at a time uses.

use std::cell::RefCell;
use std::future::poll_fn;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use tokio::io::{AsyncRead, ReadBuf};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, sleep, timeout_at};

use super::connection::Dedicated;
use crate::sidecar::upstream::access::Keys;
use crate::sidecar::upstream::dial::{DialError, Link};
use crate::sidecar::upstream::lane::Lane;
use crate::sidecar::upstream::node::NodeAddr;
use crate::sidecar::upstream::open::open_numbered;
use crate::sidecar::upstream::router::Node;
use crate::sidecar::worker::Worker;

/// The most connections of one worker to one server for transactions and long commands. Who comes later waits.
const MOST_BRIEF: usize = 64;
/// The most connections of one worker to one server that blocked clients hold. They may hold them for ever, so that waiting for
/// one would not help.
const MOST_LASTING: usize = 4096;
/// The most unused connections that are kept.
const MOST_IDLE: usize = 16;
/// How long an unused connection is kept.
const IDLE_MS: u64 = 30_000;
const FIRST_BACKOFF: Duration = Duration::from_millis(10);
const MAX_BACKOFF: Duration = Duration::from_millis(250);

/// How long a connection is wanted for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Hold {
    /// A transaction or a command.
    Brief,
    /// A command that may block for ever.
    Lasting,
}

/// Which server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Target {
    /// The one that a slot belongs to.
    Slot(u16),
    /// The one at an address.
    Node(NodeAddr),
}

/// A worker's dedicated connections to one server.
#[derive(Debug)]
pub struct Pool {
    brief: Arc<Semaphore>,
    lasting: Arc<Semaphore>,
    idle: RefCell<Vec<Idle>>,
}

#[derive(Debug)]
struct Idle {
    link: (Link, i64),
    lane: Lane,
    /// With which it was made.
    keys: Arc<Keys>,
    since: u64,
}

impl Default for Pool {
    fn default() -> Self {
        Self {
            brief: Arc::new(Semaphore::new(MOST_BRIEF)),
            lasting: Arc::new(Semaphore::new(MOST_LASTING)),
            idle: RefCell::default(),
        }
    }
}

impl Pool {
    /// Takes back a connection that is as new.
    pub(super) fn put(&self, link: (Link, i64), lane: Lane, keys: Arc<Keys>, now: u64) {
        let mut idle = self.idle.borrow_mut();
        if idle.len() < MOST_IDLE {
            idle.push(Idle { link, lane, keys, since: now });
        }
    }

    /// Closes what has been unused for long, or was made with other keys.
    pub fn close_idle(&self, now: u64, keys: &Arc<Keys>) {
        if !self.idle.borrow().is_empty() {
            let is_good = |idle: &Idle| now.saturating_sub(idle.since) < IDLE_MS && Arc::ptr_eq(&idle.keys, keys);
            self.idle.borrow_mut().retain(is_good);
        }
    }

    /// An unused connection, made with `keys`, that the server has not closed meanwhile.
    async fn take_idle(&self, lane: Lane, keys: &Arc<Keys>) -> Option<(Link, i64)> {
        loop {
            let mut link = {
                let mut idle = self.idle.borrow_mut();
                let at = idle.iter().rposition(|idle| idle.lane == lane && Arc::ptr_eq(&idle.keys, keys))?;
                idle.swap_remove(at).link
            };
            if is_quiet(&mut link.0).await {
                return Some(link);
            }
        }
    }

    async fn permit(&self, hold: Hold) -> Option<OwnedSemaphorePermit> {
        let semaphore = if hold == Hold::Brief { &self.brief } else { &self.lasting };
        semaphore.clone().acquire_owned().await.ok()
    }
}

/// Whether nothing has come on a connection: neither bytes nor its end.
pub(super) async fn is_quiet(link: &mut Link) -> bool {
    poll_fn(|cx| {
        let mut byte = [0u8; 1];
        Poll::Ready(Pin::new(&mut *link).poll_read(cx, &mut ReadBuf::new(&mut byte)).is_pending())
    })
    .await
}

/// A connection for one client. Waits for a server to be known, reachable and free, as long as the policy's patience.
///
/// # Errors
/// The text of an error reply: nothing of the client's command has left.
pub(super) async fn acquire(worker: &Rc<Worker>, target: &Target, lane: Lane, hold: Hold) -> Result<Dedicated, String> {
    let lane = lane.shared();
    let deadline = Instant::now() + Duration::from_millis(worker.patience());
    let mut backoff = FIRST_BACKOFF;
    loop {
        let node = match target {
            Target::Slot(slot) => worker.router().node_of(*slot),
            Target::Node(address) => Some(worker.router().node_at(address)),
        };
        if let Some(node) = node {
            match timeout_at(deadline, connect(worker, &node, lane, hold)).await {
                Ok(Ok(connection)) => return Ok(connection),
                Ok(Err(error)) => {
                    tracing::debug!(node = %node.address(), %error, "cannot reach a server");
                    worker.refresh_topology();
                }
                Err(_) if hold_is_full(&node, hold) => return Err(busy_text(worker, hold)),
                Err(_) => {}
            }
        }
        if Instant::now() + backoff >= deadline {
            return Err(worker.unreachable_text());
        }
        sleep(backoff.mul_f64(0.5 + f64::from(worker.random()) / f64::from(u32::MAX) / 2.0)).await;
        backoff = (backoff * 2).min(MAX_BACKOFF);
    }
}

fn hold_is_full(node: &Node, hold: Hold) -> bool {
    let pool = node.pool();
    let semaphore = if hold == Hold::Brief { &pool.brief } else { &pool.lasting };
    semaphore.available_permits() == 0
}

fn busy_text(worker: &Worker, hold: Hold) -> String {
    let (most, whose) = match hold {
        Hold::Brief => (MOST_BRIEF, "transactions, watched keys and long commands"),
        Hold::Lasting => (MOST_LASTING, "commands that block"),
    };
    format!(
        "TRYAGAIN all {most} connections to the server for {whose} were in use for {} ms: \
         the command was not sent, and can safely be repeated",
        worker.patience()
    )
}

async fn connect(worker: &Rc<Worker>, node: &Rc<Node>, lane: Lane, hold: Hold) -> Result<Dedicated, DialError> {
    let permit = node.pool().permit(hold).await;
    let keys = worker.access().current();
    let link = match node.pool().take_idle(lane, &keys).await {
        Some(link) => link,
        None => open_numbered(worker, node.address(), lane).await?,
    };
    Ok(Dedicated::new(worker, node.clone(), lane, (link, keys), permit))
}
