//! What a control plane tells the agent beside a server, and what agents tell of themselves: versioned JSON documents.
//!
//! The agent reads its [`AgentConfig`] from a file and needs nothing else but the files that it names by path. Agents, and whoever
//! forms a cache tier, read each other's [`StateReport`] over HTTP.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::snapshot::{Auth, Tls};
use super::units::Span;

/// The newest form that this build writes and reads.
pub const VERSION: u32 = 1;
/// The largest document in bytes.
pub const MAX_BYTES: usize = 256 * 1024;
/// The most peers of one server: those of its shard.
pub const MAX_PEERS: usize = 32;
/// The most sentinels that are asked.
pub const MAX_SENTINELS: usize = 15;
/// The most shards of a Cluster.
pub const MAX_SHARDS: usize = 100;
/// The most settings that are held in place.
pub const MAX_SETTINGS: usize = 256;

/// Settings that the agent decides by itself, or that would take the server out of its hands.
const OWN_SETTINGS: [&str; 19] = [
    "replicaof",
    "slaveof",
    "replica-priority",
    "slave-priority",
    "port",
    "tls-port",
    "bind",
    "dir",
    "dbfilename",
    "appendonly",
    "requirepass",
    "masteruser",
    "masterauth",
    "tls-cert-file",
    "tls-key-file",
    "tls-ca-cert-file",
    "cluster-replica-no-failover",
    "cluster-slave-no-failover",
    "cluster-announce-ip",
];

/// Everything that an agent is told.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct AgentConfig {
    /// The form of this document.
    pub version: u32,
    /// The oldest form whose readers understand it.
    pub requires: u32,
    /// Differs with each change; reports repeat it, so that a control plane knows what has been taken up.
    pub generation: u64,
    /// The server beside the agent.
    pub server: ServerPlace,
    /// Every other server that is desired and could hold the same data: what is not named here is not asked.
    #[serde(default)]
    pub peers: Vec<Peer>,
    /// Who decides which server is the primary.
    pub failover: Failover,
    /// Settings that the agent keeps in place with `CONFIG SET`, by their names in `redis.conf`.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub settings: BTreeMap<String, String>,
    /// The users that the agent keeps in place with `ACL SETUSER`. Absent: users are left alone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub users: Option<Users>,
    /// What may be given up to serve again.
    #[serde(default)]
    pub recovery: Recovery,
    /// How long the server may take to end after the signal to stop; then it is killed.
    #[serde(default = "default_shutdown")]
    pub shutdown: Span,
}

fn default_shutdown() -> Span {
    Span::from_secs(20)
}

/// The server beside the agent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct ServerPlace {
    /// Its place among its peers: the lowest begins where nobody holds data.
    pub ordinal: u16,
    /// The address, `host:port`, that is announced for it everywhere and survives restarts.
    pub address: String,
    /// Where the agent reaches it, `host:port`.
    pub dial: String,
    /// Where its data is.
    pub directory: PathBuf,
    /// Whether data survives the process. Otherwise what is left in the directory is removed before each start.
    pub durable: bool,
    /// The value of `replica-priority` once it has synchronised.
    #[serde(default = "default_priority")]
    pub priority: u16,
    /// Whom the agent logs in as, here and at the peers. Absent: nobody.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub auth: Option<Auth>,
    /// TLS towards this server, its peers and the sentinels. Absent: plain TCP.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tls: Option<Tls>,
    /// The login with which this server follows its primary (`masteruser`, `masterauth`), kept in place as its files change. Absent:
    /// what the server's own configuration says.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub replication: Option<Auth>,
    /// The files that this server itself serves TLS with, reloaded when they change. Absent: not watched.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub serves: Option<ServedTls>,
    /// Whether agents serve their ports, and ask each other, over TLS: with what `serves` and `tls` name.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub agent_tls: bool,
}

fn default_priority() -> u16 {
    100
}

/// The files of a TLS server, as `tls-cert-file`, `tls-key-file` and `tls-ca-cert-file` name them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct ServedTls {
    /// The certificate with its chain, PEM.
    pub cert_file: PathBuf,
    /// Its key, PEM.
    pub key_file: PathBuf,
    /// The authorities whose clients are let in, PEM.
    pub ca_file: PathBuf,
}

/// Another server that could hold the same data.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Peer {
    /// Its place.
    pub ordinal: u16,
    /// The address, `host:port`, that is announced for it.
    pub address: String,
    /// Where its agent serves HTTP, `host:port`.
    pub agent: String,
}

/// Who decides which server is the primary.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", rename_all_fields = "camelCase", deny_unknown_fields)]
pub enum Failover {
    /// Sentinels, by majority.
    Sentinel {
        /// The name under which they watch the primary.
        master: String,
        /// Every sentinel, `host:port`.
        sentinels: Vec<String>,
        /// Whom the agent logs in as there. Absent: nobody.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        auth: Option<Auth>,
    },
    /// The primaries of a Cluster's shards, by majority.
    Cluster {
        /// The id of this server's node, 40 hexadecimal digits, where neither it nor the others remember another.
        id: String,
        /// The port of its bus.
        bus_port: u16,
        /// The servers of every other shard, `host:port`, shard by shard. Their primaries vote.
        shards: Vec<Vec<String>>,
    },
}

/// Users of the server, in numbered generations.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Users {
    /// A file in the form of the servers' own `aclfile`, `user NAME RULE…` on each line, after a first line `# generation N`: the number
    /// rises with each change, and stands in the file itself because files of a pod do not change at the same moment.
    pub file: PathBuf,
}

/// What may be given up to serve again.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Recovery {
    /// Data that only servers hold that cannot be asked. A person sets this, and removes it again.
    pub accept_data_loss: bool,
}

/// Why a document was refused.
#[derive(Debug, thiserror::Error)]
pub enum AgentConfigError {
    /// It is larger than [`MAX_BYTES`].
    #[error("the agent's configuration has {0} bytes, more than {MAX_BYTES}")]
    TooLarge(usize),
    /// It is not JSON of the expected form.
    #[error("the agent's configuration cannot be read: {0}")]
    Json(#[from] serde_json::Error),
    /// It was written for a newer agent.
    #[error("the agent's configuration requires form {0}, and this agent understands {VERSION}: upgrade the agent")]
    TooNew(u32),
    /// Its parts contradict each other.
    #[error("the agent's configuration: {place}: {why}")]
    Invalid {
        /// Where.
        place: &'static str,
        /// What, and what to write instead.
        why: String,
    },
}

impl AgentConfig {
    /// Reads and checks a document.
    pub fn parse(json: &[u8]) -> Result<Self, AgentConfigError> {
        #[derive(Deserialize)]
        struct Head {
            requires: u32,
        }
        if json.len() > MAX_BYTES {
            return Err(AgentConfigError::TooLarge(json.len()));
        }
        let head: Head = serde_json::from_slice(json)?;
        if head.requires > VERSION {
            return Err(AgentConfigError::TooNew(head.requires));
        }
        let config: Self = serde_json::from_slice(json)?;
        config.check()?;
        Ok(config)
    }

    fn check(&self) -> Result<(), AgentConfigError> {
        let invalid = |place, why: String| Err(AgentConfigError::Invalid { place, why });
        match &self.failover {
            // An even number is one too many, or one too few, on the way between two odd ones.
            Failover::Sentinel { sentinels, .. } if sentinels.is_empty() || sentinels.len() > MAX_SENTINELS => {
                return invalid("failover", format!("name from 1 to {MAX_SENTINELS} sentinels"));
            }
            // Of two shards none is a majority without the other.
            Failover::Cluster { shards, .. } if shards.len() < 2 || shards.len() >= MAX_SHARDS => {
                return invalid("failover", format!("name the servers of 2 to {} other shards", MAX_SHARDS - 1));
            }
            Failover::Cluster { shards, .. } if shards.iter().any(|shard| shard.is_empty() || shard.len() > MAX_PEERS + 1) => {
                return invalid("failover", format!("name from 1 to {} servers of each shard", MAX_PEERS + 1));
            }
            Failover::Cluster { id, .. } if !is_node_id(id) => {
                return invalid("failover", "`id` takes 40 hexadecimal digits in small letters".into());
            }
            Failover::Sentinel { .. } | Failover::Cluster { .. } => {}
        }
        if self.peers.is_empty() || self.peers.len() > MAX_PEERS {
            return invalid("peers", format!("name from 1 to {MAX_PEERS}: a single server is no cache tier"));
        }
        let mut ordinals: Vec<u16> = self.peers.iter().map(|peer| peer.ordinal).chain([self.server.ordinal]).collect();
        ordinals.sort_unstable();
        if ordinals.windows(2).any(|pair| pair[0] == pair[1]) {
            return invalid("peers", "each server has an ordinal of its own".into());
        }
        if self.server.agent_tls && (self.server.serves.is_none() || self.server.tls.is_none()) {
            return invalid("server", "`agentTls` takes `serves` and `tls` with it: name the files".into());
        }
        if self.settings.len() > MAX_SETTINGS {
            return invalid("settings", format!("there are more than {MAX_SETTINGS}"));
        }
        match self.settings.keys().find(|name| OWN_SETTINGS.contains(&name.to_ascii_lowercase().as_str())) {
            Some(own) => invalid("settings", format!("`{own}` is the agent's own: remove it")),
            None => Ok(()),
        }
    }
}

/// Whether a text is the id of a Cluster's node.
pub fn is_node_id(text: &str) -> bool {
    text.len() == 40 && text.bytes().all(|byte| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte))
}

/// What an agent tells of its server.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct StateReport {
    /// The form of this document.
    pub version: u32,
    /// The server's place.
    pub ordinal: u16,
    /// The address that the server announces as long as its agent runs. Absent: an agent of an earlier build.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub address: Option<String>,
    /// The generation of the configuration that the agent acts under.
    pub generation: u64,
    /// The data that the server holds or, where it does not run, would start with.
    pub data: DataState,
    /// The epoch with which the server claims slots of a Cluster or, where it does not run, would. Absent: it owns none, or is in no Cluster.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub claim: Option<u64>,
    /// What the server is doing.
    pub server: ServerPhase,
    /// What of the configuration has been proved on the running server.
    #[serde(default)]
    pub proved: Proved,
}

/// The data that one server holds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum DataState {
    /// None: nothing is lost with it.
    Empty,
    /// Some, but it may lack a part: a copy was under way, or nobody knows how far it reaches.
    Partial,
    /// All that there was at some moment.
    Complete(Position),
}

/// How far a copy of the data reaches.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Position {
    /// The replication id, under which offsets can be compared.
    pub lineage: String,
    /// The replication offset, in bytes.
    pub offset: u64,
    /// Whether the server was this lineage's primary: then no replica can be further.
    pub led: bool,
    /// Whether nothing that was acknowledged can be missing from this copy. False after a kill, unless each change is on the disk
    /// before it is acknowledged.
    pub exact: bool,
}

/// What a server is doing.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", rename_all_fields = "camelCase")]
pub enum ServerPhase {
    /// It does not run, and its place is being decided.
    Deciding,
    /// It does not run: its port is closed until the reason is gone.
    Held {
        /// Why, for programs: one word.
        reason: String,
        /// Why, for people, with what ends it.
        message: String,
    },
    /// It is about to start, begins, or loads its data.
    Starting {
        /// Whether as primary. Told before it is done, so that no other does the same.
        as_primary: bool,
    },
    /// It serves as primary.
    Primary,
    /// It serves as a replica.
    Replica {
        /// The announced address of its primary.
        of: String,
        /// Whether it follows in step.
        link_up: bool,
    },
    /// It was told to end.
    Stopping,
}

/// What of the configuration has been proved on the running server.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Proved {
    /// The generation of the configuration whose settings were read back from the server.
    pub settings: Option<u64>,
    /// The generation of the users that were read back.
    pub users: Option<u64>,
    /// The generation of workloads' users that the server is being told of before the file comes, and which the agent therefore leaves
    /// alone ([`super::told`]); 0 where there is none. Absent: nobody has looked, or an agent of an earlier build, which makes users what
    /// its file says.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub users_told: Option<u64>,
    /// The user with which the server follows its primary, by its file, once its login was read back.
    pub replication: Option<String>,
    /// The SHA-256 of the certificate (DER, in hexadecimal) that was in its file and that a handshake showed.
    pub certificate: Option<String>,
    /// What could not be proved, and why; names and reasons, never values.
    pub problems: Vec<String>,
}
