//! Planned handover of a Cluster's primary: a replica takes its slots over, and no acknowledged write is lost.
//!
//! `CLUSTER FAILOVER` at a replica has the primary stop its clients until the replica has everything, and then the other primaries vote.
//! That the replica accepted the order says nothing: it is over once this server follows another, and those who vote name that one, by
//! the rule by which a server finds its place when it starts.

use std::time::Duration;

use tokio::time::{Instant, sleep};
use tracing::{debug, info};

use super::ballot;
use super::boot::named;
use super::charge::Charge;
use super::handover::{Handover, HandoverError, read_info};
use super::info::{Attached, Role};
use super::line::Line;
use crate::sidecar::upstream::access::Access;
use crate::sidecar::upstream::node::NodeAddr;

/// How often the server's role is looked at.
const LOOK_EVERY: Duration = Duration::from_millis(20);
/// How often the other shards are asked whom they name.
const ASK_EVERY: Duration = Duration::from_millis(100);
/// How long a replica tries: servers give a manual failover up after five seconds, and clients go on.
const ATTEMPT: Duration = Duration::from_secs(6);
/// How long clients go on between two attempts.
const TRY_AGAIN: Duration = Duration::from_millis(500);

/// Hands the primary over that `server` leads to, and that serves. A failover that is under way counts as the own.
pub(super) async fn hand_over(
    charge: &Charge,
    access: &Access,
    server: &mut Line,
    deadline: Instant,
) -> Result<Handover, HandoverError> {
    let mut attempts = 0;
    let successor = loop {
        let info = read_info(server).await?;
        if let Some(Role::Replica { host, port, .. }) = info.role() {
            break NodeAddr::new(host, port);
        }
        let online: Vec<Attached> = info.attached().into_iter().filter(|replica| replica.online).collect();
        // Another one where the one before did not come about.
        let Some(replica) = online.get(attempts % online.len().max(1)) else { return Err(HandoverError::NoReplica) };
        let replica = NodeAddr::new(replica.host.clone(), replica.port);
        info!(%replica, "a replica is asked to take over");
        let order = Line::new(replica.clone(), access.clone()).ask(&["CLUSTER", "FAILOVER"]).await.map(drop);
        if let Err(error) = order {
            debug!(%error, "a replica does not take over");
        } else if let Some(successor) = wait_for_demotion(server, deadline.min(Instant::now() + ATTEMPT)).await {
            break successor;
        }
        attempts += 1;
        if Instant::now() + TRY_AGAIN >= deadline {
            return Err(HandoverError::NotDone);
        }
        sleep(TRY_AGAIN).await;
    };
    // The server may end now; those who vote are to know first.
    while Instant::now() < deadline {
        let ballot = ballot::hold(charge, access).await;
        if named(&ballot.votes).is_some_and(|owner| *owner != charge.address) {
            break;
        }
        sleep(ASK_EVERY).await;
    }
    Ok(Handover::Done { primary: successor.to_string() })
}

/// Whom the server follows, once it does.
async fn wait_for_demotion(server: &mut Line, limit: Instant) -> Option<NodeAddr> {
    while Instant::now() < limit {
        if let Ok(info) = read_info(server).await
            && let Some(Role::Replica { host, port, .. }) = info.role()
        {
            return Some(NodeAddr::new(host, port));
        }
        sleep(LOOK_EVERY).await;
    }
    None
}
