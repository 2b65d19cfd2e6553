//! WAIT and WAITAOF.
//!
//! A client's writes went over shared connections, and the servers count for each connection apart. A connection that carries
//! out any other command first waits for all writes that the server has executed by then, whoever made them: at least the
//! client's own, which were answered before. In a Cluster every shard is asked, and the least counts.

use std::future::poll_fn;
use std::pin::pin;
use std::rc::Rc;
use std::task::Poll;
use std::time::Duration;

use futures_util::future::join_all;
use tokio::time::timeout;

use super::connection::{Dedicated, Owed};
use super::guard;
use super::pool::{Hold, Target, acquire};
use super::turn::{Turn, Want, turn};
use crate::sidecar::commands::Gather;
use crate::sidecar::resp::{encode, reply};
use crate::sidecar::session::reader::{MOST_HELD_BYTES, Taken};
use crate::sidecar::session::{Ending, Reader, Session};
use crate::sidecar::upstream::broken::Broken;
use crate::sidecar::upstream::gather::{Assembly, Meeting};
use crate::sidecar::upstream::mux::Lane;
use crate::sidecar::upstream::queue::ANY_SLOT;
use crate::sidecar::upstream::sink::Answer;
use crate::sidecar::worker::Worker;

const PING: &[u8] = b"*1\r\n$4\r\nPING\r\n";
/// How often the topology is looked at.
const LOOK: Duration = Duration::from_millis(200);

/// Carries out `command` at every primary.
pub async fn run(reader: &mut Reader, command: &Taken, gather: Gather) {
    let session = reader.session().clone();
    let router = session.worker().router();
    let mut targets: Vec<Target> = vec![Target::Slot(ANY_SLOT)];
    if session.worker().is_cluster() && router.is_usable() {
        targets = router.primaries().iter().map(|node| Target::Node(node.address().clone())).collect();
    }
    let meeting = Meeting::new(session.clone(), session.take_place(), Assembly::Shards(gather), false, targets.len());
    let mut answers = pin!(join_all(targets.iter().map(|target| ask(&session, target, command.raw()))));
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
    for (index, answer) in answers.iter().enumerate() {
        let answer = match answer {
            Ok(reply) => Answer::Reply(reply),
            Err(text) => Answer::Failed(text),
        };
        meeting.deliver(index as u32, answer);
    }
}

/// How long a primary's replicas may take to confirm what it has executed.
const REPLICAS_MS: u64 = 1_000;

/// Waits until all connected replicas of the primaries that serve `slots` have what these have executed by now.
///
/// # Errors
/// The text of the error reply, where they have not within a second, or it cannot be told.
pub async fn wait_for_replicas(worker: &Rc<Worker>, lane: Lane, slots: &[u16]) -> Result<(), String> {
    let mut targets: Vec<Target> = Vec::new();
    for slot in slots {
        let target = worker.router().node_of(*slot).map_or(Target::Slot(*slot), |node| Target::Node(node.address().clone()));
        if !targets.contains(&target) {
            targets.push(target);
        }
    }
    let confirmed = join_all(targets.iter().map(|target| confirm(worker, target, lane.shared()))).await;
    confirmed.into_iter().collect()
}

async fn confirm(worker: &Rc<Worker>, target: &Target, lane: Lane) -> Result<(), String> {
    let doubt = |why: &str| {
        format!(
            "NOREPLICAS the keys are removed, but {why}: after a failover their old values might come back; repeat the command"
        )
    };
    let mut connection = acquire(worker, target, lane, Hold::Brief).await.map_err(|text| doubt(&format!("({text})")))?;
    let node = connection.address().clone();
    let lost = || doubt(&format!("the connection to {node} was lost before its replicas confirmed it"));
    let role = call(&mut connection, &[b"ROLE"]).await.map_err(|_| lost())?;
    let replicas = reply::elements(&role).and_then(|role| Some(reply::elements(role.get(2)?)?.len())).unwrap_or_default();
    if replicas > 0 {
        let (count, bound) = (replicas.to_string(), REPLICAS_MS.to_string());
        let answer = call(&mut connection, &[b"WAIT", count.as_bytes(), bound.as_bytes()]).await.map_err(|_| lost())?;
        let have = reply::integer(&answer).unwrap_or_default();
        if have < replicas as i64 {
            return Err(doubt(&format!("{have} of {replicas} replicas of {node} confirmed it within {REPLICAS_MS} ms")));
        }
    }
    connection.give_back();
    Ok(())
}

async fn call(connection: &mut Dedicated, command: &[&[u8]]) -> Result<Vec<u8>, Broken> {
    let mut wire = Vec::new();
    encode::command(&mut wire, command);
    connection.queue(&wire);
    connection.owe(Owed::Kept);
    settle(connection, false).await?;
    Ok(connection.take_kept().pop().unwrap_or_default())
}

async fn ask(session: &Rc<Session>, target: &Target, command: &[u8]) -> Result<Vec<u8>, String> {
    let mut connection = acquire(session.worker(), target, session.lane(), Hold::Lasting).await?;
    connection.queue(PING);
    connection.owe(Owed::Nobody);
    connection.queue(command);
    connection.owe(Owed::Kept);
    if let Err(broken) = settle(&mut connection, false).await {
        let node = connection.address();
        tracing::warn!(%node, error = %broken, "lost a client's own server connection");
        return Err(guard::lost_text(node, true));
    }
    // PING's error would be before it.
    let reply = connection.take_kept().pop().unwrap_or_default();
    connection.give_back();
    Ok(reply)
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
