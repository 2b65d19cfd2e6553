//! The configuration, its addresses parsed once.

use std::sync::Arc;

use super::node_table::Seat;
use crate::policy::Span;
use crate::policy::agent::{AgentConfig, AgentConfigError, Failover};
use crate::policy::snapshot::{Cluster, DEFAULT_IDLE_TRANSACTION, Topology};
use crate::sidecar::access_files::AccessError;
use crate::sidecar::files::FileError;
use crate::sidecar::served_tls::ServedTlsError;
use crate::sidecar::upstream::node::{NodeAddr, NodeAddrError};

/// Why a configuration cannot come into force.
#[derive(Debug, thiserror::Error)]
pub enum ChargeError {
    /// Its file cannot be read.
    #[error(transparent)]
    File(#[from] FileError),
    /// It is refused.
    #[error(transparent)]
    Config(#[from] AgentConfigError),
    /// It names an address that is none.
    #[error("the agent's configuration: {0}")]
    Address(#[from] NodeAddrError),
    /// A password or a certificate cannot be used.
    #[error(transparent)]
    Access(#[from] AccessError),
    /// The certificate that it serves cannot be used.
    #[error(transparent)]
    Served(#[from] ServedTlsError),
    /// It changes what an agent is bound to as long as it runs.
    #[error("the agent's configuration changes `{0}`, which stands as long as the agent runs: restart the pod")]
    Bound(&'static str),
}

/// What the agent is charged with.
#[derive(Debug, Clone)]
pub struct Charge {
    /// The document as it was read.
    pub config: Arc<AgentConfig>,
    /// The address that is announced for the server.
    pub address: NodeAddr,
    /// Where the agent reaches it.
    pub dial: NodeAddr,
    /// Every other desired server.
    pub peers: Vec<PeerPlace>,
    /// The name under which the sentinels watch the primary.
    pub master: String,
    /// Every sentinel.
    pub sentinels: Vec<NodeAddr>,
    /// The Cluster that the server is in; `None` under Sentinel.
    pub cluster: Option<ClusterCharge>,
}

/// A server's place in a Cluster.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClusterCharge {
    /// The id of its node where nobody remembers another.
    pub id: String,
    /// The port of its bus.
    pub bus_port: u16,
    /// The servers of every other shard.
    pub shards: Vec<Vec<NodeAddr>>,
}

/// Where a peer and its agent are.
#[derive(Debug, Clone)]
pub struct PeerPlace {
    /// Its place.
    pub ordinal: u16,
    /// The address that is announced for it.
    pub address: NodeAddr,
    /// Where its agent serves HTTP.
    pub agent: NodeAddr,
}

fn addresses(texts: &[String]) -> Result<Vec<NodeAddr>, NodeAddrError> {
    texts.iter().map(|address| address.parse()).collect()
}

impl Charge {
    /// Reads a document.
    pub fn parse(json: &[u8]) -> Result<Self, ChargeError> {
        let config = AgentConfig::parse(json)?;
        let peers = config.peers.iter().map(|peer| {
            Ok::<_, NodeAddrError>(PeerPlace {
                ordinal: peer.ordinal,
                address: peer.address.parse()?,
                agent: peer.agent.parse()?,
            })
        });
        let (master, sentinels, cluster) = match &config.failover {
            Failover::Sentinel { master, sentinels, .. } => (master.clone(), addresses(sentinels)?, None),
            Failover::Cluster { id, bus_port, shards } => {
                let shards = shards.iter().map(|servers| addresses(servers)).collect::<Result<_, _>>()?;
                let cluster = ClusterCharge { id: id.clone(), bus_port: *bus_port, shards };
                (String::new(), Vec::new(), Some(cluster))
            }
        };
        Ok(Self {
            address: config.server.address.parse()?,
            dial: config.server.dial.parse()?,
            peers: peers.collect::<Result<_, _>>()?,
            master,
            sentinels,
            cluster,
            config: Arc::new(config),
        })
    }

    /// Checks that `next` can replace this one while the agent runs.
    pub fn may_become(&self, next: &Self) -> Result<(), ChargeError> {
        if self.config.server != next.config.server {
            return Err(ChargeError::Bound("server"));
        }
        let auth = |charge: &Self| match &charge.config.failover {
            Failover::Sentinel { auth, master, .. } => (auth.clone(), master.clone(), None),
            Failover::Cluster { bus_port, .. } => (None, String::new(), Some(*bus_port)),
        };
        if auth(self) != auth(next) { Err(ChargeError::Bound("failover")) } else { Ok(()) }
    }

    /// The server's place in its Cluster, if it is in one.
    pub fn seat(&self) -> Option<Seat> {
        let ClusterCharge { id, bus_port, shards: _ } = self.cluster.as_ref()?;
        Some(Seat { id: id.clone(), address: self.address.clone(), bus_port: *bus_port })
    }

    /// What the keys for servers and sentinels are read from.
    pub fn keys(&self) -> Cluster {
        let sentinel_auth = match &self.config.failover {
            Failover::Sentinel { auth, .. } => auth.clone(),
            Failover::Cluster { .. } => None,
        };
        let server = &self.config.server;
        Cluster {
            name: self.master.clone(),
            topology: Topology::Cluster { seeds: vec![server.dial.clone()] },
            tls: server.tls.clone(),
            auth: server.auth.clone(),
            sentinel_auth,
            patience: Span::from_secs(2),
            idle_transaction: DEFAULT_IDLE_TRANSACTION,
        }
    }
}
