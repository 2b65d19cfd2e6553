//! What a look at a CacheCluster has to do with users: those of bindings, as policies claim them, and who has to be told of any.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::SystemTime;

use tracing::debug;

use super::super::names::{SENTINEL_PORT, SERVER_PORT};
use super::super::objects::Credentials;
use super::super::pki::Pki;
use super::super::plan::{Member, Observed, Sentinel};
use super::super::users::Users;
use super::super::written::{Built, Writer};
use super::{Look, Memory, actor};
use crate::operator::admin::Entry;
use crate::operator::cache_policy::place::Place;
use crate::operator::cache_policy::ties::{self, Offer};
use crate::operator::watches::namespace_key;

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

    /// Tells the looks at policies where the CacheCluster is, and which users are known everywhere.
    pub(super) fn offer(
        &self,
        built: &Built,
        (credentials, entry): (&Credentials, Entry<'_>),
        proved: Option<u64>,
        primary: Option<SocketAddr>,
        memory: &Memory,
    ) {
        let Some(addresses) = built.configured.as_ref().filter(|_| self.context.leadership.holds()) else { return };
        let Some(place) = Place::under_sentinel(self.wanted, addresses) else { return };
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
        };
        if self.context.ties.offer(&self.place.key, offer) {
            self.context.queues.policies.add(namespace_key(&self.place.key.namespace));
        }
    }
}
