//! What a look at a CacheCluster has to do with users: those of bindings, as policies claim them, and who has to be told of any.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::time::SystemTime;

use futures_util::future::join_all;
use tracing::debug;

use super::super::act::{ActError, within};
use super::super::apply::check_leads;
use super::super::fetch;
use super::super::names::{AGENT_PORT, SENTINEL_PORT, SERVER_PORT};
use super::super::objects::Credentials;
use super::super::pki::Pki;
use super::super::plan::{Member, Observed, Sentinel, ServerId};
use super::super::told;
use super::super::users::Users;
use super::super::written::{Built, Writer};
use super::{Look, Memory, actor};
use crate::operator::admin::Entry;
use crate::operator::cache_policy::place::Place;
use crate::operator::cache_policy::ties::{self, Offer};
use crate::operator::watches::namespace_key;
use crate::policy::agent::{Proved, StateReport};

/// Which generations of users servers and sentinels know.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Known {
    /// See [`Offer::proved`].
    pub proved: Option<u64>,
    /// See [`Offer::in_force`].
    pub in_force: Option<u64>,
}

impl Look<'_> {
    /// The newest generation of users that every server had proved by the last look.
    pub(super) fn proved(&self, memory: &Memory) -> Option<u64> {
        self.status(memory)?.users.as_ref().map(|users| users.proved)
    }

    /// Users with those of bindings as policies claim them. Nobody has said so yet: as they were.
    pub(super) fn bound(&self, users: Users, previous: Option<&Users>, memory: &mut Memory) -> Users {
        memory.claims = self.context.ties.claims(&self.place.key);
        let users = match &memory.claims {
            Some(claims) => users.bind(previous, &ties::grants(claims, previous), self.proved(memory), SystemTime::now()),
            None => users,
        };
        memory.users = Some(users.clone());
        users
    }

    /// Tells sentinels of users that changed. Their files say the same, for when they start. Whether every sentinel knows them.
    pub(super) async fn tell_users(
        &self,
        writer: &Writer<'_, '_>,
        built: &Built,
        (credentials, entry): (&Credentials, Entry<'_>),
        observed: &Observed,
        memory: &mut Memory,
    ) -> bool {
        let generation = credentials.users.generation;
        let answering = observed.sentinels.iter().filter(|(_, sentinel)| matches!(sentinel, Sentinel::Running { .. }));
        let mut told = BTreeMap::new();
        for (id, _) in answering {
            let Some(pod) = observed.pods.get(&Member::Sentinel(*id)) else { continue };
            let now = (pod.uid.clone(), generation);
            if memory.told_users.get(id) != Some(&now) {
                let actor = actor(writer, built, entry);
                if let Err(error) = actor.set_users(*id, &credentials.users.on_sentinels()).await {
                    debug!(key = %self.place.key, %error, "a sentinel was not told of users, and is told again");
                    continue;
                }
            }
            told.insert(*id, now);
        }
        memory.told_users = told;
        observed.sentinels.keys().all(|sentinel| memory.told_users.contains_key(sentinel))
    }

    /// Tells servers of workloads' users that changed, before their kubelets bring the files. Whether every desired server has the users
    /// of now, by either way.
    pub(super) async fn tell_servers(
        &self,
        built: &Built,
        (credentials, entry): (&Credentials, Entry<'_>),
        (observed, reports): (&Observed, &BTreeMap<ServerId, StateReport>),
        memory: &mut Memory,
    ) -> bool {
        // What is not written yet may come to be something else of the same generation.
        if !built.is_complete() || !self.context.leadership.holds() {
            return false;
        }
        let before = std::mem::take(&mut memory.told_servers);
        let generation = credentials.users.generation;
        let tell = async |id: ServerId| {
            let proved = &reports.get(&id)?.proved;
            // Where the Secret of users was lost, numbers have begun anew, and the mark is of the time before.
            let is_marked_ahead = proved.users_told.is_some_and(|told| told > generation);
            if !is_marked_ahead && !credentials.users.have_bindings_since(proved.users.unwrap_or_default()) {
                return Some(None);
            }
            let now = (observed.pods.get(&Member::Server(id))?.uid.clone(), generation);
            if proved.users_told == Some(generation) && before.get(&id) == Some(&now) {
                return Some(Some((id, now)));
            }
            let ip = *built.addresses.servers.get(&id)?;
            let told = within("ACL SETUSER", self.tell_server(ip, (credentials, entry), proved)).await;
            let told =
                told.inspect_err(|error| debug!(key = %self.place.key, server = %id, %error, "a server is not told of users"));
            told.is_ok_and(|told| told).then_some(Some((id, now)))
        };
        let told: Vec<_> = join_all(self.wanted.servers().map(tell)).await;
        memory.told_servers = told.iter().flatten().flatten().cloned().collect();
        told.iter().all(Option::is_some)
    }

    /// Tells one server, once its agent leaves alone what it is told. Whether it was.
    async fn tell_server(
        &self,
        ip: IpAddr,
        (credentials, entry): (&Credentials, Entry<'_>),
        before: &Proved,
    ) -> Result<bool, ActError> {
        let generation = credentials.users.generation;
        // An agent of an earlier build would undo it; one that has not looked yet is asked again.
        let Some(told) = before.users_told else { return Ok(false) };
        let server = SocketAddr::new(ip, SERVER_PORT);
        check_leads(self.context)?;
        if told != generation {
            told::mark(server, entry, generation).await?;
        }
        let report = fetch::state_report(self.context, SocketAddr::new(ip, AGENT_PORT), entry.trust).await;
        let Some(Proved { users, users_told, .. }) = report.map(|report| report.proved) else { return Ok(false) };
        if users_told != Some(generation) {
            return Ok(false);
        }
        check_leads(self.context)?;
        let since = users.filter(|_| told <= generation).unwrap_or_default();
        let changed = credentials.users.of_bindings_since(since);
        let is_told = told::tell(server, entry, generation, &changed).await?;
        debug!(key = %self.place.key, %server, generation, users = changed.len(), is_told, "told a server of users");
        Ok(is_told)
    }

    /// Tells the looks at policies where the CacheCluster is, and which users are known everywhere.
    pub(super) fn offer(
        &self,
        built: &Built,
        (credentials, entry): (&Credentials, Entry<'_>),
        Known { proved, in_force }: Known,
        primary: Option<SocketAddr>,
        memory: &Memory,
    ) {
        let Some(addresses) = built.configured.as_ref().filter(|_| self.context.leadership.holds()) else { return };
        let Some(place) = Place::of(self.wanted, addresses) else { return };
        let offer = Offer {
            place,
            authorities: credentials.pki.as_ref().map(Pki::bundle),
            keys: entry.into(),
            servers: addresses.servers.values().map(|ip| SocketAddr::new(*ip, SERVER_PORT)).collect(),
            sentinels: addresses.sentinels.values().map(|ip| SocketAddr::new(*ip, SENTINEL_PORT)).collect(),
            master: self.wanted.master_name().to_owned(),
            primary,
            users: credentials.users.clone(),
            claims: memory.claims.clone(),
            proved,
            in_force,
        };
        if self.context.ties.offer(&self.place.key, offer) {
            self.context.queues.policies.add(namespace_key(&self.place.key.namespace));
        }
    }
}
