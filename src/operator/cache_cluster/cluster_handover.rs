//! Planned handover of a Cluster's primary: a replica takes its slots over, and no acknowledged write is lost.
//!
//! `CLUSTER FAILOVER` at the replica has the primary stop its clients until the replica has everything, and then the other primaries vote.
//! That it was accepted says nothing: it is over once the old primary follows, and a majority names the new one. The agent beside
//! the primary may do the same at the same moment; whoever comes later finds nothing to do.

use std::net::SocketAddr;
use std::time::Duration;

use futures_util::future::join_all;
use tokio::time::{Instant, sleep};
use tracing::debug;

use super::handover::{HandoverError, Outcome};
use super::observe;
use super::plan::{Link, Role};
use crate::operator::admin::{Admin, AdminError, Entry};
use crate::operator::election::Leadership;

/// How often roles are looked at.
const LOOK_EVERY: Duration = Duration::from_millis(50);
/// How long a replica tries: servers give a manual failover up after five seconds, and clients go on.
const ATTEMPT: Duration = Duration::from_secs(6);
/// How long clients go on between two attempts.
const TRY_AGAIN: Duration = Duration::from_millis(500);

/// What is handed over, and by whom.
#[derive(Debug, Clone)]
pub struct ClusterHandover<'a> {
    /// The primary, by its announced address.
    pub from: SocketAddr,
    /// The replica that takes over.
    pub to: SocketAddr,
    /// The primaries of all shards, which vote.
    pub primaries: &'a [SocketAddr],
    /// How servers let Larder in.
    pub entry: Entry<'a>,
    /// Whether this process may begin anything.
    pub leadership: &'a Leadership,
    /// When to give up.
    pub limit: Duration,
}

impl ClusterHandover<'_> {
    /// Hands over if the server is a primary. Safe to repeat.
    pub async fn run(&self) -> Result<Outcome, HandoverError> {
        let deadline = Instant::now() + self.limit;
        if !self.is_primary().await? {
            return Ok(Outcome::NoPrimary);
        }
        loop {
            if !self.leadership.holds() {
                return Err(HandoverError::NotLeading(self.from));
            }
            let mut replica = Admin::connect(self.to, self.entry).await?;
            let facts = observe::server(&mut replica, true).await?;
            if facts.is_none_or(|facts| facts.role != Role::Replica { of: self.from, link: Link::Up }) {
                return Err(HandoverError::NoReplica(self.from));
            }
            match replica.ask::<()>("CLUSTER FAILOVER", &[]).await {
                Ok(()) if self.wait_for_demotion(deadline.min(Instant::now() + ATTEMPT)).await => break,
                Ok(()) => {}
                Err(error) => debug!(%error, "a replica does not take over"),
            }
            if Instant::now() + TRY_AGAIN >= deadline {
                return Err(HandoverError::NotDone(self.from));
            }
            sleep(TRY_AGAIN).await;
        }
        while Instant::now() < deadline && !self.is_agreed().await {
            sleep(LOOK_EVERY).await;
        }
        Ok(Outcome::Done { primary: self.to })
    }

    async fn is_primary(&self) -> Result<bool, AdminError> {
        let mut server = Admin::connect(self.from, self.entry).await?;
        let facts = observe::server(&mut server, true).await?;
        Ok(facts.is_some_and(|facts| facts.role == Role::Primary))
    }

    async fn wait_for_demotion(&self, limit: Instant) -> bool {
        while Instant::now() < limit {
            if matches!(self.is_primary().await, Ok(false)) {
                return true;
            }
            sleep(LOOK_EVERY).await;
        }
        false
    }

    /// Whether more than half of the primaries know who owns the slots now.
    async fn is_agreed(&self) -> bool {
        let asked = self.primaries.iter().filter(|address| **address != self.from).map(async |address| {
            let mut primary = Admin::connect(*address, self.entry).await.ok()?;
            let view = observe::server(&mut primary, true).await.ok()??.cluster?;
            Some(view.peers.iter().any(|peer| peer.address == Some(self.to) && !peer.slots.is_empty()))
        });
        // The new owner, which takes the place of the old one, is one of them.
        let agreed = 1 + join_all(asked).await.into_iter().filter(|answer| *answer == Some(true)).count();
        agreed > self.primaries.len() / 2
    }
}
