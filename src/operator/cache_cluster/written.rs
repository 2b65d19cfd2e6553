//! All objects of a CacheCluster, written in the order in which they need each other: Services first, since the addresses that they are
//! given stand in all the rest.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use k8s_openapi::api::apps::v1::StatefulSet;
use k8s_openapi::api::core::v1::Service;
use kube::ResourceExt as _;
use tracing::info;

use super::apply::{Applier, ApplyError};
use super::fetch::find;
use super::names::SENTINEL_PORT;
use super::objects::{Addresses, Credentials, Kept, Objects, objects, release_volumes, services};
use super::parts;
use super::plan::{DesiredPods, Revision, Scale, SentinelId, ServerId, Set};
use super::validate::Wanted;
use crate::operator::held::Held;
use crate::operator::watches::Watches;
use crate::policy::agent::StateReport;

/// What came of writing.
#[derive(Debug, Clone, Default)]
pub struct Built {
    /// Where servers and sentinels are, and those that are still to be removed.
    pub addresses: Addresses,
    /// How many pods the StatefulSets asked for before; `None` until all of them exist.
    pub scale: Option<Scale>,
    /// The same of each shard whose set exists.
    pub sizes: BTreeMap<u16, u16>,
    /// What pods are to be made of; `None` until their addresses are known.
    pub pods: Option<DesiredPods>,
    /// The generation of each agent's configuration, as it is to be proved.
    pub agent_generations: BTreeMap<ServerId, u64>,
    /// The addresses of all that are configured; `None` until each has one.
    pub configured: Option<Addresses>,
    /// The Services that are to be.
    service_names: Vec<String>,
    /// The StatefulSets as they were written.
    sets: Vec<StatefulSet>,
}

/// Writes the objects of one CacheCluster.
pub struct Writer<'a, 'b> {
    /// What there is.
    pub watches: &'a Watches,
    /// How one object is written.
    pub applier: &'a mut Applier<'b>,
}

impl Writer<'_, '_> {
    /// Writes the Services. What came of it, and the first error: the others are written all the same.
    pub async fn write_services(&mut self) -> (Built, Option<ApplyError>) {
        let sizes = self.sizes();
        let mut built = Built { scale: self.scale(&sizes), ..Built::default() };
        let names = self.applier.wanted.names.clone();
        let present = sizes.iter().flat_map(|(shard, size)| (0..*size).map(|index| ServerId { shard: *shard, index }));
        let servers: BTreeSet<ServerId> = self.applier.wanted.servers().chain(present).collect();
        let mut by_name = BTreeMap::new();
        let mut error = None;
        let wanted_services = services(self.applier.wanted, servers.iter().copied());
        built.service_names = wanted_services.iter().map(kube::ResourceExt::name_any).collect();
        for service in wanted_services {
            match self.write_service(service).await {
                Ok(service) => drop(by_name.insert(service.name().to_owned(), service.part.address)),
                Err(refused) => error = error.or(Some(refused)),
            }
        }
        let address = |name: String| by_name.get(&name).copied().flatten();
        built.addresses.servers = servers.iter().filter_map(|id| Some((*id, address(names.server_pod(*id))?))).collect();
        let sentinel_ids = self.applier.wanted.sentinel_ids();
        built.addresses.sentinels = sentinel_ids.filter_map(|id| Some((id, address(names.sentinel_pod(id))?))).collect();
        let all = servers.len() + usize::from(self.applier.wanted.sentinels());
        built.sizes = sizes;
        // A server that is not told of all its peers could take itself for the only one with data.
        let complete = built.addresses.servers.len() + built.addresses.sentinels.len() == all;
        self.add_leaving_sentinels(&mut built);
        built.configured = complete.then(|| built.addresses.clone());
        (built, error)
    }

    /// Writes all the rest, where everybody has an address. The first error: what does not need what failed is written all the same.
    pub async fn write_rest(&mut self, built: &mut Built, credentials: &Credentials) -> Result<(), ApplyError> {
        let Some(configured) = built.configured.clone() else { return Ok(()) };
        let kept = self.kept(&built.sizes);
        let objects = objects(self.applier.wanted, &self.applier.context.installation, &configured, credentials, &kept);
        let written = self.write_objects(objects, built).await;
        let kept = self.applier.keep_only(&self.watches.services, &built.service_names).await;
        written.and(kept)
    }

    /// Writes a Service. One that is gone comes back at the address that was announced for its pod, if nobody else has that by now: a
    /// pod that runs knows no other.
    async fn write_service(&mut self, service: Service) -> Result<Arc<Held<parts::Service>>, ApplyError> {
        let (name, namespace) = (service.name_any(), &self.applier.wanted.namespace);
        let stands = find(&self.watches.services, namespace, &name).is_some();
        if let Some(address) = self.announced(&name).filter(|_| !stands) {
            let mut restored = service.clone();
            restored.spec.get_or_insert_default().cluster_ip = Some(address.to_string());
            match self.applier.apply(&self.watches.services, restored).await {
                Err(error) if error.is_refusal() => info!(name, namespace, %error, "a Service cannot have its address again"),
                outcome => return outcome,
            }
        }
        self.applier.apply(&self.watches.services, service).await
    }

    /// The address that was last announced for a pod.
    fn announced(&self, pod: &str) -> Option<IpAddr> {
        let Wanted { names, namespace, .. } = self.applier.wanted;
        let (map, entry) = match (names.parse_server_pod(pod), names.parse_sentinel_pod(pod)) {
            (Some(id), _) => (names.shard_set(id.shard), format!("server-{}.conf", id.index)),
            (None, Some(id)) => (names.sentinel_set(), format!("sentinel-{}.conf", id.0)),
            (None, None) => return None,
        };
        find(&self.watches.config_maps, namespace, &map)?.part.announced(&entry)
    }

    /// How many pods a StatefulSet asks for, where it exists.
    fn size(&self, set: &str) -> Option<u16> {
        let live = find(&self.watches.stateful_sets, &self.applier.wanted.namespace, set)?;
        self.applier.applied.asked_for(set, live.fingerprint()).or_else(|| u16::try_from(live.part.replicas?).ok())
    }

    /// The same of each shard: those that are wanted, and those beyond that have not left. The set of one that has left stays, and asks for
    /// no pods.
    fn sizes(&self) -> BTreeMap<u16, u16> {
        let wanted = self.applier.wanted;
        let size = |shard: u16| self.size(&wanted.names.shard_set(shard)).map(|size| (shard, size));
        let last = if wanted.is_cluster() { u16::MAX } else { wanted.shards() };
        let beyond = (wanted.shards()..last).map_while(size).filter(|(_, size)| *size > 0);
        (0..wanted.shards()).filter_map(size).chain(beyond).collect()
    }

    /// How many pods the StatefulSets ask for, where all that are wanted exist.
    fn scale(&self, sizes: &BTreeMap<u16, u16>) -> Option<Scale> {
        let wanted = self.applier.wanted;
        let sentinels = if wanted.is_cluster() { 0 } else { self.size(&wanted.names.sentinel_set())? };
        let servers = sizes.values().copied().max()?;
        (0..wanted.shards()).all(|shard| sizes.contains_key(&shard)).then_some(Scale { servers, sentinels })
    }

    /// Sentinels that are to go keep their Services as long as their set asks for them. Until then they count: they are configured, and
    /// agents hear them for a majority.
    fn add_leaving_sentinels(&self, built: &mut Built) {
        let wanted = self.applier.wanted;
        let Some(scale) = built.scale else { return };
        for id in (wanted.sentinels()..scale.sentinels).map(SentinelId) {
            let name = wanted.names.sentinel_pod(id);
            let service = find(&self.watches.services, &wanted.namespace, &name);
            if let Some(address) = service.and_then(|service| service.part.address) {
                built.addresses.sentinels.insert(id, address);
            }
            built.service_names.push(name);
        }
    }

    /// What stands already, and is not to change by itself.
    fn kept(&self, sizes: &BTreeMap<u16, u16>) -> Kept {
        let wanted = self.applier.wanted;
        let mut kept = Kept { servers: sizes.clone(), ..Kept::default() };
        let shards: BTreeSet<u16> = (0..wanted.shards()).chain(sizes.keys().copied()).collect();
        for name in shards.into_iter().map(|shard| wanted.names.shard_set(shard)).chain([wanted.names.sentinel_set()]) {
            let set = find(&self.watches.stateful_sets, &wanted.namespace, &name);
            if let Some(template) = set.and_then(|set| set.part.template()) {
                kept.templates.insert(name, template);
            }
        }
        for id in wanted.servers() {
            let pod = find(&self.watches.pods, &wanted.namespace, &wanted.names.server_pod(id));
            if let Some(limit) = pod.and_then(|pod| pod.part.memory) {
                kept.memory.insert(id, limit);
            }
        }
        kept
    }

    async fn write_objects(&mut self, objects: Objects, built: &mut Built) -> Result<(), ApplyError> {
        let Objects {
            service_account,
            secrets,
            config_maps,
            network_policy,
            disruption_budgets,
            stateful_sets,
            revisions,
            agent_generations,
        } = objects;
        let Self { watches, applier } = self;
        applier.apply(&watches.accounts, service_account).await?;
        for secret in secrets {
            applier.apply(&watches.secrets, secret).await?;
        }
        for config_map in config_maps {
            applier.apply(&watches.config_maps, config_map).await?;
        }
        let mut policies = Vec::new();
        if let Some(policy) = network_policy {
            policies.push(policy.name_any());
            applier.apply(&watches.network_policies, policy).await?;
        }
        applier.keep_only(&watches.network_policies, &policies).await?;
        for budget in disruption_budgets {
            applier.apply(&watches.budgets, budget).await?;
        }
        let pods = DesiredPods { servers: Revision(revisions.servers), sentinels: Revision(revisions.sentinels) };
        for mut set in stateful_sets {
            // Sentinels, as servers, come and go when the plan says so.
            if set.name_any() == applier.wanted.names.sentinel_set()
                && let (Some(scale), Some(spec)) = (built.scale, &mut set.spec)
            {
                spec.replicas = Some(i32::from(scale.sentinels));
            }
            applier.apply(&watches.stateful_sets, set.clone()).await?;
            built.sets.push(set);
        }
        (built.pods, built.agent_generations) = (Some(pods), agent_generations);
        Ok(())
    }

    /// Makes a set ask for `count` pods.
    pub async fn scale_to(&mut self, built: &Built, set: Set, count: u16) -> Result<(), ApplyError> {
        let names = &self.applier.wanted.names;
        let name = match set {
            Set::Servers { shard } => names.shard_set(shard),
            Set::Sentinels => names.sentinel_set(),
        };
        let Some(mut set) = built.sets.iter().find(|set| set.name_any() == name).cloned() else { return Ok(()) };
        if let Some(spec) = &mut set.spec {
            spec.replicas = Some(i32::from(count));
        }
        // Of a shard that is wanted, the plan never takes the last server.
        if count == 0 {
            release_volumes(&mut set);
        }
        let shown = find(&self.watches.stateful_sets, &self.applier.wanted.namespace, &name).map(|live| live.fingerprint());
        self.applier.apply(&self.watches.stateful_sets, set).await?;
        if let Some(shown) = shown {
            self.applier.applied.ask_for(&name, count, shown);
        }
        Ok(())
    }
}

impl Built {
    /// Whether everything could be written, so that there is something to plan for.
    pub fn is_complete(&self) -> bool {
        self.pods.is_some()
    }

    /// The servers whose agents act under another configuration than the one that was written, and may not know of every shard.
    pub fn unaware(&self, reports: &BTreeMap<ServerId, StateReport>) -> BTreeSet<ServerId> {
        if !self.is_complete() {
            return self.addresses.servers.keys().copied().collect();
        }
        let is_unaware =
            |(id, generation): &(&ServerId, &u64)| reports.get(id).is_none_or(|told| told.generation != **generation);
        self.agent_generations.iter().filter(is_unaware).map(|(id, _)| *id).collect()
    }

    /// Where the sentinels listen, those that are still to be removed among them.
    pub fn sentinels(&self) -> Vec<SocketAddr> {
        self.addresses.sentinels.values().map(|ip| SocketAddr::new(*ip, SENTINEL_PORT)).collect()
    }
}
