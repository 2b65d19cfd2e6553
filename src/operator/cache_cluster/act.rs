//! The planner's steps, carried out on servers, sentinels and pods. Each is safe to repeat; whether this process still leads is asked
//! before each of them.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::time::Duration;

use futures_util::future::join_all;
use k8s_openapi::api::core::v1::Pod;
use tokio::time::timeout;
use tracing::{debug, info};

use super::apply::{Applier, ApplyError, check_leads};
use super::cluster_steps::{self, Step};
use super::fetch;
use super::handover::{HandoverError, PREFERRED, PRIORITY};
use super::monitor;
use super::move_slots;
use super::names::{AGENT_PORT, BUS_PORT, SENTINEL_PORT, SERVER_PORT};
use super::objects::Addresses;
use super::observe;
use super::plan::{Action, Member, SentinelId, ServerId, SlotSet, Why};
use super::users::UserRules;
use crate::operator::admin::{Admin, AdminError, Entry};
use crate::policy::agent::ServerPhase;
use crate::policy::binding::BindingName;

/// How long one step on a server or a sentinel may take; handovers have a deadline of their own.
const STEP_WITHIN: Duration = Duration::from_secs(5);

/// Why a step was not taken. The next plan takes it up, where it is still called for.
#[derive(Debug, thiserror::Error)]
pub enum ActError {
    /// A server or a sentinel did not do it.
    #[error(transparent)]
    Admin(#[from] AdminError),
    /// A primary was not handed over.
    #[error(transparent)]
    Handover(#[from] HandoverError),
    /// A sentinel was to forget its ghosts, and has other cares by now.
    #[error("the sentinel takes the primary for down, or replaces it, and forgets no ghosts now")]
    Alarmed,
    /// Too little of the time that a look may take was left.
    #[error("no time is left in this look for a handover; the next one begins it")]
    NoTime,
    /// A server or a sentinel took too long.
    #[error("{what}: no answer within {} s", STEP_WITHIN.as_secs())]
    Late {
        /// What was asked.
        what: &'static str,
    },
    /// A pod or an object could not be changed.
    #[error(transparent)]
    Apply(#[from] ApplyError),
}

/// Takes steps for one CacheCluster.
pub struct Actor<'a, 'b> {
    /// Writes objects, and knows the CacheCluster.
    pub applier: &'a Applier<'b>,
    /// Where servers and sentinels are.
    pub addresses: &'a Addresses,
    /// How they let Larder in.
    pub entry: Entry<'a>,
}

impl Actor<'_, '_> {
    /// Takes a step on one server, sentinel or pod. Nothing is done for steps of other kinds: those that a planner never names where agents
    /// start the servers, and those that take more than one.
    pub async fn take(&self, action: &Action) -> Result<(), ActError> {
        check_leads(self.applier.context)?;
        let master = self.applier.wanted.master_name();
        match action {
            Action::Monitor { sentinel, primary, quorum } => self.monitor(*sentinel, *primary, *quorum).await?,
            Action::SetQuorum { sentinel, quorum } => {
                self.tell_sentinel(*sentinel, "SENTINEL SET", &[master, "quorum", &quorum.to_string()]).await?;
            }
            Action::Forget { sentinel } => self.tell_sentinel(*sentinel, "SENTINEL REMOVE", &[master]).await?,
            Action::PruneGhosts { sentinel } => self.prune(*sentinel).await?,
            Action::ReplicateFrom { server, primary } => {
                let (host, port) = (primary.ip().to_string(), primary.port().to_string());
                self.tell_server(*server, "REPLICAOF", &[&host, &port]).await?;
            }
            Action::Promote { server } => self.tell_server(*server, "REPLICAOF", &["NO", "ONE"]).await?,
            Action::ClusterMeet { .. }
            | Action::AddSlots { .. }
            | Action::ClusterReplicate { .. }
            | Action::ClusterForget { .. }
            | Action::BumpEpoch { .. }
            | Action::ClusterTakeover { .. } => self.cluster_step(action).await?,
            Action::SettleSlots { server, slots } => self.settle(*server, slots).await?,
            Action::DropKeys { server } => {
                info!(%server, cluster = master, "drops copies of keys whose slots have moved");
                self.tell_server(*server, "FLUSHALL", &["ASYNC"]).await?;
            }
            Action::ReplacePod { member: Member::Server(server), why: Why::StaleAndUnready, .. }
                if self.leads_by_now(*server).await =>
            {
                info!(%server, cluster = master, "a pod that was to be replaced has begun to serve as primary, and stays");
            }
            Action::ReplacePod { member, uid, why } => {
                info!(%member, ?why, cluster = master, "replaces a pod");
                self.applier.delete::<Pod>(&self.pod_name(*member), uid).await?;
            }
            _ => {}
        }
        debug!(?action, cluster = master, "done");
        Ok(())
    }

    /// Whether a server that did not serve when it was looked at has become primary since.
    async fn leads_by_now(&self, id: ServerId) -> bool {
        let Some(ip) = self.addresses.servers.get(&id) else { return false };
        let report = fetch::state_report(self.applier.context, SocketAddr::new(*ip, AGENT_PORT), self.entry.trust).await;
        report.is_some_and(|report| report.server == ServerPhase::Primary)
    }

    fn pod_name(&self, member: Member) -> String {
        match member {
            Member::Server(server) => self.applier.wanted.names.server_pod(server),
            Member::Sentinel(sentinel) => self.applier.wanted.names.sentinel_pod(sentinel),
        }
    }

    async fn server(&self, id: ServerId) -> Result<Option<Admin>, ActError> {
        check_leads(self.applier.context)?;
        let Some(ip) = self.addresses.servers.get(&id) else { return Ok(None) };
        Ok(Some(Admin::connect(SocketAddr::new(*ip, SERVER_PORT), self.entry).await?))
    }

    async fn sentinel(&self, id: SentinelId) -> Result<Option<Admin>, ActError> {
        check_leads(self.applier.context)?;
        let Some(ip) = self.addresses.sentinels.get(&id) else { return Ok(None) };
        Ok(Some(Admin::connect(SocketAddr::new(*ip, SENTINEL_PORT), self.entry).await?))
    }

    async fn tell_server(&self, id: ServerId, command: &'static str, arguments: &[&str]) -> Result<(), ActError> {
        within(command, async {
            let Some(mut admin) = self.server(id).await? else { return Ok(()) };
            Ok(admin.ask(command, arguments).await?)
        })
        .await
    }

    async fn tell_sentinel(&self, id: SentinelId, command: &'static str, arguments: &[&str]) -> Result<(), ActError> {
        within(command, async {
            let Some(mut admin) = self.sentinel(id).await? else { return Ok(()) };
            Ok(admin.ask(command, arguments).await?)
        })
        .await
    }

    async fn cluster_step(&self, action: &Action) -> Result<(), ActError> {
        let at = |id| self.addresses.servers.get(&id).map(|ip| (SocketAddr::new(*ip, SERVER_PORT), BUS_PORT));
        let Some(Step { server, command, arguments }) = cluster_steps::step(action, at) else { return Ok(()) };
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        self.tell_server(server, command, &arguments).await
    }

    /// A server forgets that slots were on their way.
    async fn settle(&self, id: ServerId, slots: &SlotSet) -> Result<(), ActError> {
        within("CLUSTER SETSLOT", async {
            let Some(mut admin) = self.server(id).await? else { return Ok(()) };
            Ok(move_slots::settle(&mut admin, slots).await?)
        })
        .await
    }

    /// A sentinel forgets all that it knows of others, and finds them anew; also a failover that it has begun. So it is asked right
    /// before whether all is well with the primary, and whether enough of the others answer it.
    async fn prune(&self, id: SentinelId) -> Result<(), ActError> {
        within("SENTINEL RESET", async {
            let Some(mut admin) = self.sentinel(id).await? else { return Ok(()) };
            let master = self.applier.wanted.master_name();
            if observe::sentinel(&mut admin).await?.is_none_or(|watch| watch.alarmed) {
                return Err(ActError::Alarmed);
            }
            let _: String = admin.ask("SENTINEL CKQUORUM", &[master]).await?;
            Ok(admin.ask("SENTINEL RESET", &[master]).await?)
        })
        .await
    }

    async fn monitor(&self, id: SentinelId, primary: SocketAddr, quorum: u16) -> Result<(), ActError> {
        within("SENTINEL MONITOR", async {
            let Some(mut admin) = self.sentinel(id).await? else { return Ok(()) };
            let master = self.applier.wanted.master_name();
            let voted = self.last_vote(master).await;
            Ok(monitor::monitor((id, &mut admin), master, primary, (quorum, voted), self.entry.login).await?)
        })
        .await
    }

    /// The last epoch in which any sentinel that answers gave a vote.
    async fn last_vote(&self, master: &str) -> u64 {
        let votes = self.addresses.sentinels.values().map(async |ip| {
            let mut admin = Admin::connect(SocketAddr::new(*ip, SENTINEL_PORT), self.entry).await.ok()?;
            monitor::last_vote(&mut admin, master).await.ok()
        });
        join_all(votes).await.into_iter().flatten().max().unwrap_or(0)
    }

    /// Takes back the preference for a server that a handover left behind which was cut short, as by the end of an operator.
    pub async fn end_preference(&self, id: ServerId) -> Result<(), ActError> {
        within("CONFIG SET replica-priority", async {
            let Some(mut admin) = self.server(id).await? else { return Ok(()) };
            let config: HashMap<String, String> = admin.ask("CONFIG GET", &["replica-priority"]).await?;
            if config.get("replica-priority").is_none_or(|priority| priority != PREFERRED) {
                return Ok(());
            }
            info!(server = %id, cluster = self.applier.wanted.master_name(), "takes back a preference that a handover left behind");
            Ok(admin.ask("CONFIG SET", &["replica-priority", &PRIORITY.to_string()]).await?)
        })
        .await
    }

    /// Makes a sentinel know these users, and forget their earlier rules and passwords. Connections stay, but for those of bindings' users that
    /// are no more: these go. Whatever else a sentinel has of users is left alone.
    pub async fn set_users(&self, id: SentinelId, users: &[UserRules]) -> Result<(), ActError> {
        within("ACL SETUSER", async {
            let Some(mut admin) = self.sentinel(id).await? else { return Ok(()) };
            for UserRules { name, rules } in users {
                let arguments = [name.as_str(), "reset"].into_iter().chain(rules.iter().map(String::as_str));
                let _: () = admin.ask("ACL SETUSER", &arguments.collect::<Vec<_>>()).await?;
            }
            let present: Vec<String> = admin.ask("ACL USERS", &[]).await?;
            let is_wanted = |name: &str| users.iter().any(|user| user.name == name);
            for name in present.iter().filter(|name| BindingName::of_user(name).is_some() && !is_wanted(name)) {
                let _: i64 = admin.ask("ACL DELUSER", &[name]).await?;
            }
            Ok(())
        })
        .await
    }
}

pub(super) async fn within<T>(what: &'static str, step: impl Future<Output = Result<T, ActError>>) -> Result<T, ActError> {
    timeout(STEP_WITHIN, step).await.map_err(|_| ActError::Late { what })?
}

/// Whether the steps behind one are taken although it failed: what one sentinel or server is told, others need.
pub fn goes_on(action: &Action) -> bool {
    matches!(action, Action::Monitor { .. } | Action::SetQuorum { .. } | Action::Forget { .. } | Action::ClusterForget { .. })
}

/// What kind of step it is, as a label of metrics.
pub fn word(action: &Action) -> &'static str {
    match action {
        Action::StartServer { .. } | Action::StartSentinel { .. } => "start",
        Action::Monitor { .. } => "monitor",
        Action::ReplicateFrom { .. } => "replicate_from",
        Action::Promote { .. } => "promote",
        Action::AllowPromotion { .. } => "allow_promotion",
        Action::ClusterMeet { .. }
        | Action::AddSlots { .. }
        | Action::ClusterReplicate { .. }
        | Action::ClusterForget { .. }
        | Action::BumpEpoch { .. }
        | Action::ClusterTakeover { .. } => "cluster",
        Action::MoveSlots { .. } | Action::SettleSlots { .. } => "move_slots",
        Action::DropKeys { .. } => "drop_keys",
        Action::RemoveServer { .. } => "remove_server",
        Action::Forget { .. } => "forget",
        Action::SetQuorum { .. } => "set_quorum",
        Action::PruneGhosts { .. } => "prune_ghosts",
        Action::Handover { .. } => "handover",
        Action::ReplacePod { .. } => "replace_pod",
        Action::SetReplicas { .. } => "set_replicas",
        Action::Wait(_) => "wait",
    }
}
