//! The configuration, its addresses parsed once.

use std::sync::Arc;

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
        let (master, sentinels) = match &config.failover {
            Failover::Sentinel { master, sentinels, .. } => (master.clone(), sentinels.as_slice()),
            Failover::Cluster {} => (String::new(), [].as_slice()),
        };
        Ok(Self {
            address: config.server.address.parse()?,
            dial: config.server.dial.parse()?,
            peers: peers.collect::<Result<_, _>>()?,
            master,
            sentinels: sentinels.iter().map(|address| address.parse()).collect::<Result<_, _>>()?,
            config: Arc::new(config),
        })
    }

    /// Checks that `next` can replace this one while the agent runs.
    pub fn may_become(&self, next: &Self) -> Result<(), ChargeError> {
        if self.config.server != next.config.server {
            return Err(ChargeError::Bound("server"));
        }
        let auth = |charge: &Self| match &charge.config.failover {
            Failover::Sentinel { auth, master, .. } => (auth.clone(), master.clone()),
            Failover::Cluster {} => (None, String::new()),
        };
        if auth(self) != auth(next) { Err(ChargeError::Bound("failover")) } else { Ok(()) }
    }

    /// What the keys for servers and sentinels are read from.
    pub fn keys(&self) -> Cluster {
        let sentinel_auth = match &self.config.failover {
            Failover::Sentinel { auth, .. } => auth.clone(),
            Failover::Cluster {} => None,
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
