//! Whether servers have each write on disk before they answer, as they say themselves.
//!
//! A primary's own settings say nothing of its replicas'. `WAIT` counts a replica that has a write in memory; `WAITAOF` one whose fsync is
//! due, unless its `appendfsync` is `always`.

use std::collections::HashMap;
use std::fmt;
use std::time::Duration;

use futures_util::future::join_all;
use tokio::io::BufReader;
use tokio::time::{Instant, timeout_at};

use super::access::Access;
use super::admin_client::{Value, ask};
use super::dial::{Link, dial_any};
use super::node::NodeAddr;

/// How long a server may take to say.
const ANSWER_LIMIT: Duration = Duration::from_secs(2);
/// The most connections that are kept.
const MOST_LINKS: usize = 64;
const QUESTION: &[&[u8]] = &[b"CONFIG", b"GET", b"append*"];
/// The longest text of a server's error that is repeated.
const MAX_ERROR_CHARS: usize = 200;

/// Why a server is not known to have each write on disk before it answers.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Careless {
    /// It does not.
    #[error("{0} does not write each command to disk: it needs appendonly yes and appendfsync always")]
    Settings(NodeAddr),
    /// It refuses to tell.
    #[error("{0} does not tell whether it writes to disk ({1}): let the login use CONFIG GET")]
    Refused(NodeAddr, String),
    /// It does not answer.
    #[error("{0} does not answer whether it writes to disk")]
    Silent(NodeAddr),
}

/// Asks servers, over connections that it keeps.
#[derive(Default)]
pub struct Disks(HashMap<NodeAddr, BufReader<Link>>);

impl fmt::Debug for Disks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Disks").field(&self.0.len()).finish()
    }
}

impl Disks {
    /// Asks each of these.
    ///
    /// # Errors
    /// The first that does not write to disk as it must, or is not known to.
    pub async fn check(&mut self, servers: &[NodeAddr], access: &Access) -> Result<(), Careless> {
        let links = servers.iter().map(|node| (node, self.0.remove(node))).collect::<Vec<_>>();
        let asked = join_all(links.into_iter().map(|(node, link)| ask_one(node, link, access))).await;
        let mut outcome = Ok(());
        for (node, asked) in servers.iter().zip(asked) {
            match asked {
                Ok(link) if self.0.len() < MOST_LINKS => drop(self.0.insert(node.clone(), link)),
                Ok(_) => {}
                Err(careless) => outcome = outcome.and(Err(careless)),
            }
        }
        outcome
    }

    /// Takes over the connections of another.
    pub fn absorb(&mut self, other: Self) {
        self.0.extend(other.0);
    }
}

async fn ask_one(node: &NodeAddr, link: Option<BufReader<Link>>, access: &Access) -> Result<BufReader<Link>, Careless> {
    let deadline = Instant::now() + ANSWER_LIMIT;
    let kept = match link {
        Some(link) => question(link, deadline).await,
        None => None,
    };
    let answered = match kept {
        Some(answered) => Some(answered),
        None => match dial_any(node, access, deadline).await {
            Ok((link, _)) => question(BufReader::with_capacity(4 * 1024, link), deadline).await,
            Err(_) => None,
        },
    };
    match answered {
        Some((_, Value::Error(text))) => Err(Careless::Refused(node.clone(), text.chars().take(MAX_ERROR_CHARS).collect())),
        Some((link, settings)) if writes_all(&settings) => Ok(link),
        Some(_) => Err(Careless::Settings(node.clone())),
        None => Err(Careless::Silent(node.clone())),
    }
}

async fn question(mut link: BufReader<Link>, deadline: Instant) -> Option<(BufReader<Link>, Value)> {
    let answer = timeout_at(deadline, ask(&mut link, &[QUESTION])).await.ok()?.ok()?.pop()?;
    Some((link, answer))
}

/// Whether the answer to `CONFIG GET append*` says that a server has each write on disk before it answers.
pub fn writes_all(settings: &Value) -> bool {
    let says = |name, value| settings.field(name).and_then(Value::as_str) == Some(value);
    says("appendonly", "yes") && says("appendfsync", "always")
}
