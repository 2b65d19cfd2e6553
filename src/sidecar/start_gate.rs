//! Whether the applications of a pod may start. A native sidecar holds them up until its startup probe succeeds.
//!
//! What starts before the first policy is in force, or before the servers know the workload's user, has its first commands fail, and
//! counts as ready all the same. So the probe says "not yet" until a connection to each primary has logged in under the policy. But a cache
//! that is away is to keep no application from starting: after a while the answer is yes in any case.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::{Instant, sleep, timeout};

use super::reload::Told;
use super::resp::Protocol;
use super::upstream::access::Access;
use super::upstream::dial::{DialError, dial, dial_primary};
use super::upstream::view::{View, ViewKind};

/// How long one attempt to log in may take.
const LOGIN_LIMIT: Duration = Duration::from_secs(2);
/// How soon it is tried again.
const TRY_AGAIN: Duration = Duration::from_millis(200);

/// What is missing before applications may start. `None`: they may.
pub type Missing = Option<String>;

/// What is missing at first.
pub const NO_POLICY: &str = "no policy has arrived yet";

/// Opens once there is a policy and a login that works, and after `most` in any case. Then, or when nobody looks any more, it is done.
pub async fn keep(told: watch::Receiver<Option<Told>>, most: Duration, gate: watch::Sender<Missing>) {
    let unused = gate.closed();
    tokio::select! {
        tried = timeout(most, reach(told, &gate)) => {
            if tried.is_err() {
                let missing = gate.borrow().clone().unwrap_or_default();
                tracing::warn!(missing, waited = ?most, "the cache cannot be used yet: applications start all the same");
            }
        }
        () = unused => return,
    }
    gate.send_replace(None);
}

/// Tries until every primary has let a connection in.
async fn reach(mut told: watch::Receiver<Option<Told>>, gate: &watch::Sender<Missing>) {
    let began = Instant::now();
    let first = told.wait_for(Option::is_some).await.ok().and_then(|told| told.clone());
    // Without anybody who tells there is nothing to wait for but the end.
    let Some(Told { in_force, view, .. }) = first else { return std::future::pending().await };
    loop {
        let (servers, access) = (view.borrow().clone(), in_force.borrow().access.clone());
        match log_in(&servers, &access).await {
            Ok(()) => break,
            Err(missing) => {
                tracing::debug!(missing, "applications are not started yet");
                gate.send_replace(Some(missing));
            }
        }
        sleep(TRY_AGAIN).await;
    }
    tracing::info!(waited = ?began.elapsed(), "the cache can be used: applications may start");
}

async fn log_in(servers: &Arc<View>, access: &Access) -> Result<(), String> {
    let told = |error: DialError| error.told();
    let deadline = Instant::now() + LOGIN_LIMIT;
    match &servers.kind {
        ViewKind::Unknown => Err("no server of the cluster has been found yet".to_owned()),
        ViewKind::Primary { node, .. } => dial_primary(node, access, Protocol::Resp2, deadline).await.map(drop).map_err(told),
        ViewKind::Cluster(map) if map.primaries().is_empty() => Err("no server of the cluster has slots yet".to_owned()),
        ViewKind::Cluster(map) => {
            for node in map.primaries() {
                dial(node, access, Protocol::Resp2, deadline).await.map_err(told)?;
            }
            Ok(())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LONG: Duration = Duration::from_secs(20);

    #[tokio::test]
    async fn it_opens_after_a_while_in_any_case() {
        let (_tells, told) = watch::channel(None);
        let (gate, mut gated) = watch::channel(Some(NO_POLICY.to_owned()));
        let began = Instant::now();
        let keeping = tokio::spawn(keep(told, Duration::from_millis(100), gate));
        timeout(LONG, gated.wait_for(Option::is_none)).await.expect("in time").expect("it opens");
        assert!(began.elapsed() >= Duration::from_millis(100));
        timeout(LONG, keeping).await.expect("in time").expect("it is done");
    }

    #[tokio::test]
    async fn it_is_done_when_nobody_looks_any_more() {
        let (tells, told) = watch::channel(None);
        let (gate, gated) = watch::channel(Some(NO_POLICY.to_owned()));
        drop(tells);
        let keeping = tokio::spawn(keep(told, Duration::from_secs(3600), gate));
        tokio::task::yield_now().await;
        assert_eq!(gated.borrow().as_deref(), Some(NO_POLICY), "nobody tells of a policy");
        drop(gated);
        timeout(LONG, keeping).await.expect("in time").expect("it is done");
    }
}
