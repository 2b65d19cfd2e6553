//! What the objects of a CacheCluster are called, and how they are labelled. Pure.
//!
//! The names of two CacheClusters of one namespace never meet: within one kind of object, each name gives its CacheCluster away.

use std::collections::BTreeMap;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;

use super::plan::{SentinelId, ServerId};

/// The port of servers.
pub const SERVER_PORT: u16 = 6379;
/// The port of the agents beside them.
pub const AGENT_PORT: u16 = 9121;
/// The port on which the servers of a Cluster talk to each other.
pub const BUS_PORT: u16 = 16379;
/// The port of sentinels.
pub const SENTINEL_PORT: u16 = 26379;

/// The label with the CacheCluster's name.
pub const CLUSTER_LABEL: &str = "larder.dev/cluster";
/// The label with the number of the shard.
pub const SHARD_LABEL: &str = "larder.dev/shard";
/// The label that tells servers from sentinels.
pub const COMPONENT_LABEL: &str = "app.kubernetes.io/component";
/// The annotation of pods, and of the templates that they are made from, with the revision that they have.
pub const REVISION_ANNOTATION: &str = "larder.dev/revision";
/// The label that Kubernetes gives each pod of a StatefulSet.
pub const POD_NAME_LABEL: &str = "statefulset.kubernetes.io/pod-name";
/// The label with a pod's ordinal.
pub const POD_INDEX_LABEL: &str = "apps.kubernetes.io/pod-index";
/// Who applies all objects, and the value of `app.kubernetes.io/managed-by`.
pub const MANAGER: &str = "larder";

/// What a pod runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Component {
    /// A server and its agent.
    Server,
    /// A sentinel.
    Sentinel,
}

impl Component {
    /// The value of [`COMPONENT_LABEL`].
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Server => "server",
            Self::Sentinel => "sentinel",
        }
    }
}

/// The names of one CacheCluster's objects.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Names {
    cluster: String,
}

/// One method for each object: its documentation, and what is put behind the CacheCluster's name.
macro_rules! suffixed {
    ($($(#[$doc:meta])* $method:ident = $suffix:literal;)+) => {$(
        $(#[$doc])*
        pub fn $method(&self) -> String {
            format!(concat!("{}", $suffix), self.cluster)
        }
    )+};
}

impl Names {
    /// The names of the CacheCluster of this name.
    pub fn new(cluster: impl Into<String>) -> Self {
        Self { cluster: cluster.into() }
    }

    /// The CacheCluster's own name: also that of its ServiceAccount and NetworkPolicy, of a Cluster's PodDisruptionBudget, and the one under
    /// which sentinels watch the primary.
    pub fn cluster(&self) -> &str {
        &self.cluster
    }

    suffixed! {
        /// The sentinels' StatefulSet, ConfigMap and PodDisruptionBudget.
        sentinel_set = "-sentinel";
        /// The headless Service of the servers' StatefulSets.
        servers_headless = "-servers";
        /// The headless Service of the sentinels' StatefulSet.
        sentinels_headless = "-sentinels-headless";
        /// The Service of all sentinels, for clients.
        sentinels_service = "-sentinels";
        /// The Service whose one endpoint is the primary, and its EndpointSlice.
        primary_service = "-primary";
        /// The Service of all servers that are ready.
        replicas_service = "-replicas";
        /// The same of a Cluster: each of them knows who owns which slots.
        nodes_service = "-nodes";
        /// The Secret with Larder's own login.
        system_secret = "-system";
        /// The Secret with the users of servers and sentinels.
        users_secret = "-users";
        /// The Secret with the login that clients are told: one that every server knows.
        client_secret = "-client";
        /// The Secret with the authority's key and all that is remembered of certificates.
        pki_secret = "-pki";
        /// The Secret with the servers' certificate and its key.
        server_tls_secret = "-server-tls";
        /// The Secret with the sentinels' certificate and its key.
        sentinel_tls_secret = "-sentinel-tls";
        /// The ConfigMap with the authorities that clients trust.
        authority_map = "-ca";
    }

    /// A shard's StatefulSet and ConfigMap, and under Sentinel the PodDisruptionBudget.
    pub fn shard_set(&self, shard: u16) -> String {
        format!("{}-{shard}", self.cluster)
    }

    /// A server's pod, and its own Service.
    pub fn server_pod(&self, server: ServerId) -> String {
        format!("{}-{}-{}", self.cluster, server.shard, server.index)
    }

    /// A sentinel's pod, and its own Service.
    pub fn sentinel_pod(&self, sentinel: SentinelId) -> String {
        format!("{}-sentinel-{}", self.cluster, sentinel.0)
    }

    /// The server whose pod has this name.
    pub fn parse_server_pod(&self, pod: &str) -> Option<ServerId> {
        let (shard, index) = pod.strip_prefix(&self.cluster)?.strip_prefix('-')?.split_once('-')?;
        let server = ServerId { shard: shard.parse().ok()?, index: index.parse().ok()? };
        (self.server_pod(server) == pod).then_some(server)
    }

    /// The sentinel whose pod has this name.
    pub fn parse_sentinel_pod(&self, pod: &str) -> Option<SentinelId> {
        let index = pod.strip_prefix(&self.cluster)?.strip_prefix("-sentinel-")?;
        let sentinel = SentinelId(index.parse().ok()?);
        (self.sentinel_pod(sentinel) == pod).then_some(sentinel)
    }

    /// The labels of every object of this CacheCluster.
    pub fn labels(&self) -> BTreeMap<String, String> {
        let labels = [
            ("app.kubernetes.io/name", "larder-cache"),
            ("app.kubernetes.io/instance", &self.cluster),
            ("app.kubernetes.io/managed-by", MANAGER),
            (CLUSTER_LABEL, &self.cluster),
        ];
        labels.into_iter().map(|(key, value)| (key.to_owned(), value.to_owned())).collect()
    }

    /// The labels of what belongs to servers or to sentinels; `shard` for what belongs to one shard.
    pub fn component_labels(&self, component: Component, shard: Option<u16>) -> BTreeMap<String, String> {
        let mut labels = self.labels();
        labels.insert(COMPONENT_LABEL.to_owned(), component.as_str().to_owned());
        if let Some(shard) = shard {
            labels.insert(SHARD_LABEL.to_owned(), shard.to_string());
        }
        labels
    }

    /// What selects the pods of servers or of sentinels, or of both, and of one shard alone where it is given. These few labels never
    /// change: a StatefulSet's selector cannot.
    pub fn selector(&self, component: Option<Component>, shard: Option<u16>) -> LabelSelector {
        let mut labels = BTreeMap::from([(CLUSTER_LABEL.to_owned(), self.cluster.clone())]);
        if let Some(component) = component {
            labels.insert(COMPONENT_LABEL.to_owned(), component.as_str().to_owned());
        }
        if let Some(shard) = shard {
            labels.insert(SHARD_LABEL.to_owned(), shard.to_string());
        }
        LabelSelector { match_labels: Some(labels), match_expressions: None }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pods_are_told_by_their_names() {
        let names = Names::new("shop");
        let server = ServerId { shard: 0, index: 11 };
        assert_eq!(names.server_pod(server), "shop-0-11");
        assert_eq!(names.parse_server_pod("shop-0-11"), Some(server));
        assert_eq!(names.parse_sentinel_pod("shop-sentinel-2"), Some(SentinelId(2)));
        for other in ["shop-0", "shop-0-01", "shop-0-0-1", "shop-2-0-1", "shops-0-1", "shop-sentinel-2", "shop-0-"] {
            assert_eq!(names.parse_server_pod(other), None, "{other}");
        }
        assert_eq!(names.parse_sentinel_pod("shop-sentinel-0-1"), None);
    }
}
