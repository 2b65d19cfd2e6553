//! The Kubernetes objects of a CacheCluster. Pure: what is wanted becomes typed objects, without a client.
//!
//! Services come first: the addresses that they are given are announced everywhere, and stand in all the rest.

#[cfg(test)]
mod cluster_tests;
mod config;
mod network;
mod pods;
mod revision;
mod services;
mod sets;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::net::IpAddr;

use k8s_openapi::api::apps::v1::StatefulSet;
use k8s_openapi::api::core::v1::{ConfigMap, Pod, PodTemplateSpec, Secret, ServiceAccount};
use k8s_openapi::api::networking::v1::NetworkPolicy;
use k8s_openapi::api::policy::v1::PodDisruptionBudget;
use kube::core::ObjectMeta;

use super::pki::Pki;
use super::plan::{SentinelId, ServerId};
use super::users::Users;
use super::validate::Wanted;
use crate::operator::admin::Login;
use crate::policy::ByteSize;

pub use config::{AUTHORITIES, PASSWORD, PKI_STATE, USERNAME, USERS_STATE, announced_address, max_memory, node_id, sentinel_id};
pub use pods::{DATA_VOLUME, MAIN_CONTAINER};
pub use revision::{Revisions, revisions};
pub use services::{primary_endpoints, services};
pub use sets::release_volumes;

/// What all CacheClusters of one operator share.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Installation {
    /// The image that holds `larderd`, copied into each server's pod.
    pub larder_image: String,
    /// When it is pulled; `None`: as Kubernetes decides by its tag.
    pub image_pull_policy: Option<String>,
    /// The operator's own namespace, from which it asks servers and sentinels.
    pub operator_namespace: String,
}

/// The cluster addresses of the Services of single pods.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Addresses {
    /// Of each desired server, and of each that is still to be removed.
    pub servers: BTreeMap<ServerId, IpAddr>,
    /// Of each desired sentinel, and of each that is still to be removed.
    pub sentinels: BTreeMap<SentinelId, IpAddr>,
}

/// The passwords and certificates of a CacheCluster.
#[derive(Debug, Clone, PartialEq)]
pub struct Credentials {
    /// Larder's own login at servers and sentinels.
    pub system: Login,
    /// Everybody's, as hashes.
    pub users: Users,
    /// What clients are told of it: a login that every server knows. `None`: nothing, or what they were told already.
    pub client: Option<Login>,
    /// Certificates, and who signs them. `None`: plain TCP.
    pub pki: Option<Pki>,
}

/// What stands in the cluster already, and decides together with what is wanted.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Kept {
    /// The pod templates of the StatefulSets, by name. One of the wanted revision that another Larder image wrote is kept as it is: an
    /// upgrade of the operator changes no server's pod until something else does.
    pub templates: BTreeMap<String, PodTemplateSpec>,
    /// The memory limits of the servers' containers as they run: a server is never told to hold more data than its pod has room for.
    pub memory: BTreeMap<ServerId, ByteSize>,
    /// How many servers a shard is to have at this moment, where that differs from `replicas + 1`: a server that is to be removed stays
    /// until the plan says otherwise.
    pub servers: BTreeMap<u16, u16>,
}

/// Everything but Services, in the order in which it is applied: what others name comes before them.
#[derive(Debug, Clone, PartialEq)]
pub struct Objects {
    /// The account of all pods, without a token.
    pub service_account: ServiceAccount,
    /// Larder's own login, everybody's as hashes, the one that clients are told, and certificates.
    pub secrets: Vec<Secret>,
    /// What servers, agents and sentinels are told, and whom clients trust.
    pub config_maps: Vec<ConfigMap>,
    /// Who may open connections. `None`: everybody; one that stands is to be deleted.
    pub network_policy: Option<NetworkPolicy>,
    /// How many pods may be drained at the same time.
    pub disruption_budgets: Vec<PodDisruptionBudget>,
    /// The servers, shard by shard, and the sentinels.
    pub stateful_sets: Vec<StatefulSet>,
    /// The revisions that pods are to have.
    pub revisions: Revisions,
    /// The generation of each agent's configuration: what is to come back as `generation`, and as `proved.settings`, in its report.
    pub agent_generations: BTreeMap<ServerId, u64>,
}

/// Builds all objects but Services. A server or a sentinel without an address is not configured, and not told of to the others.
pub fn objects(
    wanted: &Wanted,
    installation: &Installation,
    addresses: &Addresses,
    credentials: &Credentials,
    kept: &Kept,
) -> Objects {
    let revisions = revisions(wanted);
    let (servers, agent_generations) = config::of_servers(wanted, addresses, kept);
    let mut config_maps = servers;
    if !wanted.is_cluster() {
        config_maps.push(config::of_sentinels(wanted, addresses));
    }
    config_maps.extend(config::of_clients(wanted, credentials));
    Objects {
        service_account: ServiceAccount {
            metadata: metadata(wanted, wanted.names.cluster(), wanted.names.labels()),
            automount_service_account_token: Some(false),
            ..ServiceAccount::default()
        },
        secrets: config::secrets(wanted, credentials),
        config_maps,
        network_policy: network::network_policy(wanted, installation),
        disruption_budgets: sets::disruption_budgets(wanted),
        stateful_sets: sets::stateful_sets(wanted, installation, kept, &revisions),
        revisions,
        agent_generations,
    }
}

/// The memory limit of a server's container, for [`Kept::memory`]. `None` where it is not one that Larder writes.
pub fn memory_limit(pod: &Pod) -> Option<ByteSize> {
    let containers = &pod.spec.as_ref()?.containers;
    let server = containers.iter().find(|container| container.name == MAIN_CONTAINER)?;
    server.resources.as_ref()?.limits.as_ref()?.get("memory")?.0.parse().ok()
}

/// The metadata of an object of a CacheCluster.
fn metadata(wanted: &Wanted, name: impl Into<String>, labels: BTreeMap<String, String>) -> ObjectMeta {
    ObjectMeta {
        name: Some(name.into()),
        namespace: Some(wanted.namespace.clone()),
        labels: Some(labels),
        owner_references: Some(vec![wanted.owner_reference()]),
        ..ObjectMeta::default()
    }
}
