//! The Kubernetes objects of a CacheCluster. Pure: what is wanted becomes typed objects, without a client.
//!
//! Services come first: the addresses that they are given are announced everywhere, and stand in all the rest.

mod services;

use std::collections::BTreeMap;
use std::net::IpAddr;

use k8s_openapi::api::core::v1::PodTemplateSpec;
use kube::core::ObjectMeta;

use super::plan::{SentinelId, ServerId};
use super::users::Users;
use super::validate::Wanted;
use crate::operator::admin::Login;
use crate::policy::ByteSize;

pub use services::{primary_endpoints, services};

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
    /// Of each desired sentinel.
    pub sentinels: BTreeMap<SentinelId, IpAddr>,
}

/// The passwords of a CacheCluster.
#[derive(Debug, Clone, PartialEq)]
pub struct Credentials {
    /// Larder's own login at servers and sentinels.
    pub system: Login,
    /// Everybody's, as hashes.
    pub users: Users,
}

/// What stands in the cluster already, and decides together with what is wanted.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Kept {
    /// The pod templates of the StatefulSets, by name. One of the wanted revision that another Larder image wrote is kept as it is: an
    /// upgrade of the operator changes no server's pod until something else does.
    pub templates: BTreeMap<String, PodTemplateSpec>,
    /// The memory limits of the servers' containers as they run: a server is never told to hold more data than its pod has room for.
    pub memory: BTreeMap<ServerId, ByteSize>,
    /// How many servers there are to be at this moment, where that differs from `replicas + 1`: a server that is to be removed stays
    /// until the plan says otherwise.
    pub servers: Option<u16>,
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
