//! WAIT and WAITAOF.
//!
//! A client's writes went over shared connections, and the servers count for each connection apart: some up to its last command,
//! some (Valkey 9) up to its last write. So the connection first writes a mark of Larder's own, which is gone at once. Its WAIT then
//! stands for all that the server had executed before the mark, whoever wrote it: at least the client's own writes, which were
//! answered before. In a Cluster every shard is asked, and the least counts.

use std::future::poll_fn;
use std::pin::pin;
use std::rc::Rc;
use std::task::Poll;
use std::time::Duration;

use futures_util::future::join_all;
use tokio::time::{Instant, timeout};

use super::connection::{Dedicated, Owed};
use super::guard;
use super::pool::{Hold, Target, acquire};
use super::turn::{Turn, Want, turn};
use crate::sidecar::commands::Gather;
use crate::sidecar::resp::{encode, reply};
use crate::sidecar::session::reader::{MOST_HELD_BYTES, Taken};
use crate::sidecar::session::{Ending, Reader, Session};
use crate::sidecar::slots;
use crate::sidecar::upstream::broken::Broken;
use crate::sidecar::upstream::gather::{Assembly, Meeting};
use crate::sidecar::upstream::heirs::{Electable, Electors, Heir, rule_out, strays};
use crate::sidecar::upstream::lane::Lane;
use crate::sidecar::upstream::node::NodeAddr;
use crate::sidecar::upstream::queue::ANY_SLOT;
use crate::sidecar::upstream::sink::Answer;
use crate::sidecar::worker::Worker;

/// How often the topology is looked at.
const LOOK: Duration = Duration::from_millis(200);

/// Carries out `command` at every primary.
pub async fn run(reader: &mut Reader, command: &Taken, gather: Gather) {
    let session = reader.session().clone();
    let router = session.worker().router();
    let mut targets: Vec<(Target, u16)> = vec![(Target::Slot(ANY_SLOT), ANY_SLOT)];
    if session.worker().is_cluster() && router.is_usable() {
        targets = router.shards().into_iter().map(|(node, slot)| (Target::Node(node.address().clone()), slot)).collect();
    }
    let meeting = Meeting::new(session.clone(), session.take_place(), Assembly::Shards(gather), false, targets.len());
    let mut answers = pin!(join_all(targets.iter().map(|(target, slot)| ask(&session, target, *slot, command.raw()))));
    let want = Want { input: MOST_HELD_BYTES, ..Want::default() };
    let answers = loop {
        tokio::select! {
            answers = &mut answers => break answers,
            turned = turn(reader, None, want) => {
                if matches!(turned, Turn::Ended | Turn::Gone) {
                    return session.end(Ending::Now);
                }
            }
        }
    };
    session.end_waits();
    for (index, answer) in answers.iter().enumerate() {
        let answer = match answer {
            Ok(reply) => Answer::Reply(reply),
            Err(text) => Answer::Failed(text),
        };
        meeting.deliver(index as u32, answer);
    }
}

/// The error reply for keys that are removed, of which not all replicas have heard.
pub fn removal_text(why: &Unconfirmed) -> String {
    format!("NOREPLICAS the keys are removed, but {why}: after a failover their old values might come back; repeat the command")
}

/// How long a primary's replicas may take to confirm what it has executed.
const REPLICAS_MS: u64 = 1_000;

/// What must stand at the very server whose replicas confirm it: else another has taken its place, which never had it.
#[derive(Debug, Clone)]
pub struct Proof {
    /// The slot of what must stand.
    pub slot: u16,
    /// A command that answers 1 where it stands; nothing, where it goes without saying.
    pub command: Vec<u8>,
}

/// Why replicas have not confirmed something.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Unconfirmed {
    /// The server that had it is lost, or no primary any more: whoever repeats it finds another.
    #[error("{0}")]
    Moved(&'static str),
    /// A replica that may become primary follows it no longer, or not yet: it may be on its way to be primary without what was done.
    #[error("{connected} of its {known} replicas follow it")]
    Detached {
        /// How many do.
        connected: usize,
        /// How many are known that are there.
        known: usize,
    },
    /// A replica that does not follow it may become primary all the same, now or later, or it is not known which may.
    #[error("{0}")]
    Heir(String),
    /// Anything else.
    #[error("{0}")]
    Otherwise(String),
}

/// Which replicas that follow nobody are none that nothing needs to be known of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Heed {
    /// Those that are taken to be alive.
    Reachable,
    /// All that might ever be promoted without what was done.
    Heirs,
}

/// How long a replica that is there may be without its primary, as after its start, or until it is known that it is gone.
const ATTACHED_WITHIN: Duration = Duration::from_secs(3);
const ATTACHED_LOOK_MS: u64 = 50;

/// Waits until all replicas that might take the place of the primaries that serve `slots` have what these have executed by now. A replica
/// that is there and follows nobody is none that nothing needs to be known of: sentinels may be about to promote it. One that is taken for
/// dead is waited for no longer.
///
/// # Errors
/// Why they have not within a second, or three where one follows nobody, or why it cannot be told.
pub async fn wait_for_replicas(worker: &Rc<Worker>, lane: Lane, slots: &[u16]) -> Result<(), Unconfirmed> {
    let proofs: Vec<Proof> = slots.iter().map(|slot| Proof { slot: *slot, command: Vec::new() }).collect();
    wait_for(worker, lane, &proofs, Heed::Reachable).await
}

/// As [`wait_for_replicas`], at servers where all of `proofs` stand, and with no replica left out that might be promoted later, dead or not:
/// see [`heirs`](crate::sidecar::upstream::heirs).
///
/// # Errors
/// As there, [`Unconfirmed::Moved`] where one does not stand, and [`Unconfirmed::Heir`].
pub async fn wait_for_heirs(worker: &Rc<Worker>, lane: Lane, proofs: &[Proof]) -> Result<(), Unconfirmed> {
    wait_for(worker, lane, proofs, Heed::Heirs).await
}

async fn wait_for(worker: &Rc<Worker>, lane: Lane, proofs: &[Proof], heed: Heed) -> Result<(), Unconfirmed> {
    let mut targets: Vec<(Target, Vec<&Proof>)> = Vec::new();
    for proof in proofs {
        let slot = proof.slot;
        let target = worker.router().node_of(slot).map_or(Target::Slot(slot), |node| Target::Node(node.address().clone()));
        match targets.iter_mut().find(|(other, _)| *other == target) {
            Some((_, proofs)) => proofs.push(proof),
            None => targets.push((target, vec![proof])),
        }
    }
    let confirmed =
        join_all(targets.iter().map(|(target, proofs)| confirm_attached(worker, target, proofs, lane.shared(), heed))).await;
    confirmed.into_iter().collect()
}

async fn confirm_attached(
    worker: &Rc<Worker>,
    target: &Target,
    proofs: &[&Proof],
    lane: Lane,
    heed: Heed,
) -> Result<(), Unconfirmed> {
    let until = Instant::now() + ATTACHED_WITHIN;
    loop {
        match confirm(worker, target, proofs, lane, heed).await {
            Err(Unconfirmed::Detached { .. } | Unconfirmed::Heir(_)) if Instant::now() < until => {
                worker.refresh_topology();
                let pause = ATTACHED_LOOK_MS / 2 + u64::from(worker.random()) % ATTACHED_LOOK_MS;
                tokio::time::sleep(Duration::from_millis(pause)).await;
            }
            outcome => return outcome,
        }
    }
}

async fn confirm(worker: &Rc<Worker>, target: &Target, proofs: &[&Proof], lane: Lane, heed: Heed) -> Result<(), Unconfirmed> {
    let acquired = acquire(worker, target, lane, Hold::Brief).await;
    let mut connection = acquired.map_err(|text| Unconfirmed::Otherwise(format!("({text})")))?;
    let node = connection.address().clone();
    let lost = |broken: Broken| {
        tracing::warn!(%node, error = %broken, "lost the connection on which replicas were to confirm a removal");
        Unconfirmed::Moved("the connection to the server was lost before its replicas confirmed it")
    };
    let role = call(&mut connection, &[b"ROLE"]).await.map_err(lost)?;
    let Some(followers) = followers_of(&role) else {
        return Err(Unconfirmed::Moved("the server is no primary any more"));
    };
    if let Err(why) = check_followers(worker, &node, &followers, heed).await {
        connection.give_back();
        return Err(why);
    }
    let replicas = followers.len();
    let commands: Vec<&[u8]> =
        proofs.iter().map(|proof| proof.command.as_slice()).filter(|command| !command.is_empty()).collect();
    for command in &commands {
        connection.queue(command);
        connection.owe(Owed::Kept);
    }
    if replicas > 0 {
        connection.queue(&mark(proofs.first().map_or(ANY_SLOT, |proof| proof.slot)));
        (0..MARK_COMMANDS).for_each(|_| connection.owe(Owed::Kept));
    }
    settle(&mut connection, false).await.map_err(lost)?;
    let answers = connection.take_kept();
    let (proved, marked) = answers.split_at(commands.len().min(answers.len()));
    if proved.iter().any(|answer| reply::integer(answer) != Some(1)) {
        connection.give_back();
        return Err(Unconfirmed::Moved("another server has taken the place of the one that had it"));
    }
    if let Some(error) = marked.first().and_then(|reply| reply.strip_prefix(b"-")) {
        return Err(Unconfirmed::Otherwise(format!("the server says ({})", String::from_utf8_lossy(error).trim_end())));
    }
    if replicas > 0 {
        let (count, bound) = (replicas.to_string(), REPLICAS_MS.to_string());
        let answer = call(&mut connection, &[b"WAIT", count.as_bytes(), bound.as_bytes()]).await.map_err(lost)?;
        let have = reply::integer(&answer).unwrap_or_default();
        if have < replicas as i64 {
            let text = format!("{have} of {replicas} replicas confirmed it within {REPLICAS_MS} ms");
            return Err(Unconfirmed::Otherwise(text));
        }
    }
    if heed == Heed::Heirs {
        // Others that came meanwhile may be among those that were counted.
        let after = call(&mut connection, &[b"ROLE"]).await.map_err(lost)?;
        let after = followers_of(&after).ok_or(Unconfirmed::Moved("the server is no primary any more"))?;
        if after != followers {
            connection.give_back();
            return Err(Unconfirmed::Detached { connected: after.len(), known: replicas });
        }
    }
    connection.give_back();
    Ok(())
}

/// Whether nobody is missing among those who follow a primary.
async fn check_followers(worker: &Worker, node: &NodeAddr, followers: &[NodeAddr], heed: Heed) -> Result<(), Unconfirmed> {
    if heed == Heed::Reachable {
        let (connected, known) = (followers.len(), worker.router().replicas_at(node));
        return if connected < known { Err(Unconfirmed::Detached { connected, known }) } else { Ok(()) };
    }
    let heirs = worker.router().heirs_at(node).ok_or_else(|| Unconfirmed::Heir(HEIRS_UNKNOWN.to_owned()))?;
    check_heirs(worker, &heirs, followers).await.map_err(|electable| Unconfirmed::Heir(electable.to_string()))
}

/// What is said where it is not known who might take a primary's place.
pub(super) const HEIRS_UNKNOWN: &str =
    "the servers do not tell who might take the primary's place (in a Cluster, by CLUSTER SHARDS)";

/// Makes sure that none of a primary's heirs is promoted without what `followers` have.
pub(super) async fn check_heirs(worker: &Worker, heirs: &[Heir], followers: &[NodeAddr]) -> Result<(), Electable> {
    let strays = strays(heirs, followers);
    if strays.is_empty() {
        return Ok(());
    }
    let electors = if worker.is_cluster() { Electors::Replicas } else { Electors::Sentinels };
    rule_out(&strays, &worker.access(), electors).await
}

/// Who follows a primary, sorted. `None`: it is none.
pub(super) fn followers_of(role: &[u8]) -> Option<Vec<NodeAddr>> {
    let parts = reply::elements(role)?;
    let is_primary = parts.first().and_then(|word| reply::text(word)) == Some(b"master");
    let follower = |entry: &&[u8]| {
        let entry = reply::elements(entry)?;
        let word = |at: usize| std::str::from_utf8(reply::text(entry.get(at).copied()?)?).ok();
        Some(NodeAddr::new(word(0)?, word(1)?.parse().ok()?))
    };
    let mut followers: Vec<NodeAddr> = reply::elements(parts.get(2)?)?.iter().map(follower).collect::<Option<_>>()?;
    followers.sort();
    is_primary.then_some(followers)
}

async fn call(connection: &mut Dedicated, command: &[&[u8]]) -> Result<Vec<u8>, Broken> {
    let mut wire = Vec::new();
    encode::command(&mut wire, command);
    connection.queue(&wire);
    connection.owe(Owed::Kept);
    settle(connection, false).await?;
    Ok(connection.take_kept().pop().unwrap_or_default())
}

/// How many commands [`mark`] writes.
pub(super) const MARK_COMMANDS: usize = 2;

/// A write in `slot` that is replicated, and undone at once.
pub(super) fn mark(slot: u16) -> Vec<u8> {
    let slot = if slot == ANY_SLOT { 0 } else { slot };
    let key = [&b"larder:w:{"[..], &slots::tag_of(slot), b"}"].concat();
    let mut wire = Vec::new();
    encode::command(&mut wire, &[&b"SET"[..], &key, b"", b"PX", b"1000"]);
    encode::command(&mut wire, &[&b"UNLINK"[..], &key]);
    wire
}

async fn ask(session: &Rc<Session>, target: &Target, slot: u16, command: &[u8]) -> Result<Vec<u8>, String> {
    let mut connection = acquire(session.worker(), target, session.lane(), Hold::Lasting).await?;
    connection.queue(&mark(slot));
    (0..MARK_COMMANDS).for_each(|_| connection.owe(Owed::Kept));
    connection.queue(command);
    connection.owe(Owed::Kept);
    session.begin_wait(connection.waits());
    if let Err(broken) = settle(&mut connection, false).await {
        let node = connection.address();
        tracing::warn!(%node, error = %broken, "lost a client's own server connection");
        return Err(guard::lost_text(true).to_owned());
    }
    let mut replies = connection.take_kept();
    let (reply, marked) = (replies.pop().unwrap_or_default(), replies.into_iter().next().unwrap_or_default());
    connection.give_back();
    // Without the mark the count would stand for nothing.
    Ok(if marked.first() == Some(&b'-') { marked } else { reply })
}

/// Waits until all is answered. `answers_soon`: within seconds.
pub(super) async fn settle(connection: &mut Dedicated, answers_soon: bool) -> Result<(), Broken> {
    loop {
        let polled = poll_fn(|cx| match connection.poll(None, cx) {
            Err(broken) => Poll::Ready(Err(broken)),
            Ok(_) if connection.is_settled() => Poll::Ready(Ok(())),
            Ok(_) => Poll::Pending,
        });
        match timeout(LOOK, polled).await {
            Ok(result) => return result,
            Err(_) => connection.overdue(ANY_SLOT, answers_soon).map_or(Ok(()), Err)?,
        }
    }
}
