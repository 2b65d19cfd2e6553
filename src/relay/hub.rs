//! A relay's own few commands at the servers of the cache, each with a deadline: to whoever owns the slot that they are about.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::BufReader;
use tokio::sync::watch;
use tokio::time::{Instant, timeout_at};

use super::footing::{self, Command, Disk, Footing, Unsure};
use crate::journal::scripts::Call;
use crate::sidecar::resp::Protocol;
use crate::sidecar::upstream::access::Access;
use crate::sidecar::upstream::admin_client::{ReplyError, Value, ask};
use crate::sidecar::upstream::dial::{DialError, Link, dial_primary};
use crate::sidecar::upstream::discovery::Refresh;
use crate::sidecar::upstream::disks::Disks;
use crate::sidecar::upstream::heirs::{Electors, Heir, rule_out, strays};
use crate::sidecar::upstream::node::NodeAddr;
use crate::sidecar::upstream::view::{View, ViewKind};

/// How long a connection and a request may take.
pub const ANSWER_LIMIT: Duration = Duration::from_secs(3);
/// A server that gave no answer is not asked for so long: it would hold up what is to be asked of others.
const AWAY_FOR: Duration = Duration::from_secs(1);
/// Where among [`footing::carry_out`]'s commands the question is whether the server knows WAITAOF.
const WAITAOF_AT: usize = 1;
/// The longest text of a server's error that is repeated.
const MAX_ERROR_CHARS: usize = 200;

/// Why the cache gave no answer that counts. What was asked may have been done.
#[derive(Debug, thiserror::Error)]
pub enum HubError {
    /// It is not known who owns the slot.
    #[error("no server is known that owns slot {0}")]
    NoOwner(u16),
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
    #[error("{node}: no answer within {ANSWER_LIMIT:?}")]
    Timeout {
        /// Who was asked.
        node: NodeAddr,
    },
    /// It gave no answer a moment ago, and was not asked.
    #[error("{node}: no answer a moment ago")]
    Away {
        /// Who.
        node: NodeAddr,
    },
    /// The answer was an error.
    #[error("{node}: the server said `{text}`")]
    Refused {
        /// Who was asked.
        node: NodeAddr,
        /// Its words, shortened.
        text: String,
    },
    /// The answer has another form than a script of Larder's gives.
    #[error("the cache gave an unexpected answer")]
    Answer,
    /// It is not sure that what it said survives it.
    #[error("{node}: {source}")]
    Unsure {
        /// Who was asked.
        node: NodeAddr,
        /// Why not.
        source: Unsure,
    },
}

impl HubError {
    /// Whether the reply was over the bounds of a reply.
    pub fn is_too_large(&self) -> bool {
        matches!(self, Self::Reply { source: ReplyError::TooLarge, .. })
    }
}

/// Connections to the servers, made when they are needed.
#[derive(Debug)]
pub struct Hub {
    access: Access,
    view: watch::Receiver<Arc<View>>,
    refresh: Refresh,
    disk: Disk,
    /// Asks replicas how they write to disk.
    disks: Disks,
    links: HashMap<NodeAddr, BufReader<Link>>,
    /// Servers that gave no answer, and when.
    away: HashMap<NodeAddr, Instant>,
}

impl Hub {
    /// Connects to nothing yet.
    pub fn new(access: Access, view: watch::Receiver<Arc<View>>, refresh: Refresh) -> Self {
        Self { access, view, refresh, disk: Disk::Asked, disks: Disks::default(), links: HashMap::new(), away: HashMap::new() }
    }

    /// Says what tells how servers write to disk, from now on.
    pub fn trust(&mut self, disk: Disk) {
        self.disk = disk;
    }

    /// Sends commands about a slot in one write; a reply for each. One that is an error is an error here, and the connection is given up
    /// with it.
    pub async fn ask(&mut self, slot: u16, commands: &[Command]) -> Result<Vec<Value>, HubError> {
        let node = self.reachable(slot)?;
        let replies = self.ask_node(&node, commands).await;
        self.take_note(&node, replies.as_ref().err());
        replies
    }

    /// Runs a script, whose answer `read` reads.
    pub async fn run<T, E>(
        &mut self,
        slot: u16,
        call: &Call,
        read: impl FnOnce(&[&[u8]]) -> Result<T, E>,
    ) -> Result<T, HubError> {
        let answers = self.ask(slot, &[call.command()]).await?;
        script_answer(answers.first().ok_or(HubError::Answer)?, read)
    }

    /// Runs a script as [`Hub::carry_out`] does.
    pub async fn run_durably<T, E>(
        &mut self,
        slot: u16,
        call: &Call,
        read: impl FnOnce(&[&[u8]]) -> Result<T, E>,
    ) -> Result<T, HubError> {
        script_answer(&self.carry_out(slot, call.command()).await?, read)
    }

    /// Carries out a command, all of whose keys lie in `slot`, and waits until what it did and saw is on disk at the slot's primary and at
    /// every replica that might take its place. Where this fails it may have been carried out all the same.
    pub async fn carry_out(&mut self, slot: u16, command: Command) -> Result<Value, HubError> {
        let node = self.reachable(slot)?;
        let answer = self.carry_out_at(&node, &footing::carry_out(slot, command, self.disk)).await;
        self.take_note(&node, answer.as_ref().err());
        answer
    }

    async fn carry_out_at(&mut self, node: &NodeAddr, commands: &[Command]) -> Result<Value, HubError> {
        let unsure = |source| HubError::Unsure { node: node.clone(), source };
        let (link, answers) = self.exchange(node, commands).await?;
        // Servers without WAITAOF say so.
        let failed = answers.iter().enumerate().find_map(|(at, answer)| error_in(answer).filter(|_| at != WAITAOF_AT));
        if let Some(text) = failed {
            return Err(refused(node, text));
        }
        self.links.insert(node.clone(), link);
        let (footing, answer) = Footing::of(&answers, self.disk).map_err(unsure)?;
        let (strays, electors) = self.strays(node, &footing).map_err(unsure)?;
        rule_out(&strays, &self.access, electors).await.map_err(Unsure::from).map_err(unsure)?;
        if self.disk == Disk::Asked {
            self.disks.check(footing.followers(), &self.access).await.map_err(Unsure::from).map_err(unsure)?;
        }
        let confirmed = self.ask_node(node, &footing.question()).await?;
        footing.confirm(&confirmed).map_err(unsure)?;
        Ok(answer)
    }

    /// Who might be promoted in a primary's place, and does not follow it; and who would do that.
    fn strays(&self, node: &NodeAddr, footing: &Footing) -> Result<(Vec<Heir>, Electors), Unsure> {
        let view = self.view.borrow();
        let heirs = view.kind.heirs(node).ok_or(Unsure::Heirs)?;
        let in_cluster = matches!(view.kind, ViewKind::Cluster(_));
        Ok((strays(heirs, footing.followers()), if in_cluster { Electors::Replicas } else { Electors::Sentinels }))
    }

    /// How many replicas the owner of a slot is known to have.
    pub fn replicas(&self, slot: u16) -> usize {
        self.owner(slot).map_or(0, |(_, replicas)| replicas)
    }

    /// Who owns a slot and is worth asking.
    fn reachable(&self, slot: u16) -> Result<NodeAddr, HubError> {
        let (node, _) = self.owner(slot)?;
        match self.away.get(&node).is_some_and(|since| since.elapsed() < AWAY_FOR) {
            true => Err(HubError::Away { node }),
            false => Ok(node),
        }
    }

    fn take_note(&mut self, node: &NodeAddr, error: Option<&HubError>) {
        if error.is_some() {
            self.refresh.request();
        }
        if matches!(error, Some(HubError::Timeout { .. } | HubError::Dial(_))) {
            self.away.insert(node.clone(), Instant::now());
        }
    }

    fn owner(&self, slot: u16) -> Result<(NodeAddr, usize), HubError> {
        let view = self.view.borrow();
        let owner = match &view.kind {
            ViewKind::Unknown => None,
            ViewKind::Primary { node, replicas, .. } => Some((node.clone(), replicas.len())),
            ViewKind::Cluster(map) => {
                map.owner_index(slot).and_then(|at| Some((map.primaries().get(at)?.clone(), map.replicas(at).len())))
            }
        };
        owner.ok_or(HubError::NoOwner(slot))
    }

    async fn ask_node(&mut self, node: &NodeAddr, commands: &[Command]) -> Result<Vec<Value>, HubError> {
        let (link, replies) = self.exchange(node, commands).await?;
        if let Some(text) = replies.iter().find_map(error_in) {
            return Err(refused(node, text));
        }
        self.links.insert(node.clone(), link);
        Ok(replies)
    }

    /// Sends commands over the connection that there is or a new one, and takes it out: whoever has read the replies puts it back.
    async fn exchange(&mut self, node: &NodeAddr, commands: &[Command]) -> Result<(BufReader<Link>, Vec<Value>), HubError> {
        let deadline = Instant::now() + ANSWER_LIMIT;
        let mut link = match self.links.remove(node) {
            Some(link) => link,
            None => BufReader::with_capacity(16 * 1024, dial_primary(node, &self.access, Protocol::Resp2, deadline).await?.0),
        };
        let words: Vec<Vec<&[u8]>> = commands.iter().map(|command| command.iter().map(Vec::as_slice).collect()).collect();
        let requests: Vec<&[&[u8]]> = words.iter().map(Vec::as_slice).collect();
        let replies = timeout_at(deadline, ask(&mut link, &requests)).await;
        let replies = replies.map_err(|_| HubError::Timeout { node: node.clone() })?;
        let replies = replies.map_err(|source| HubError::Reply { node: node.clone(), source })?;
        Ok((link, replies))
    }
}

fn refused(node: &NodeAddr, text: &str) -> HubError {
    HubError::Refused { node: node.clone(), text: text.chars().take(MAX_ERROR_CHARS).collect() }
}

/// The error that an answer is, or that one of a transaction's answers is.
fn error_in(answer: &Value) -> Option<&str> {
    match answer {
        Value::Error(text) => Some(text),
        Value::List(list) => {
            list.iter().find_map(|answer| if let Value::Error(text) = answer { Some(text.as_str()) } else { None })
        }
        _ => None,
    }
}

fn script_answer<T, E>(answer: &Value, read: impl FnOnce(&[&[u8]]) -> Result<T, E>) -> Result<T, HubError> {
    let list = answer.as_list().ok_or(HubError::Answer)?;
    let texts: Vec<&[u8]> = list.iter().map(bytes_of).collect::<Option<_>>().ok_or(HubError::Answer)?;
    read(&texts).map_err(|_| HubError::Answer)
}

/// A command of plain words.
pub fn words(words: &[&str]) -> Vec<Vec<u8>> {
    words.iter().map(|word| word.as_bytes().to_vec()).collect()
}

/// The bytes of an element of an answer.
pub fn bytes_of(value: &Value) -> Option<&[u8]> {
    match value {
        Value::Text(text) => Some(text),
        _ => None,
    }
}
