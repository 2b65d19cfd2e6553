//! Where the sidecars of a binding find the servers, and the files that they need to be let in.

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;

use crate::api::Reach;
use crate::api::cache_cluster::Keeping;
use crate::operator::cache_cluster::build::PATIENCE;
use crate::operator::cache_cluster::names::{SENTINEL_PORT, SERVER_PORT};
use crate::operator::cache_cluster::objects::Addresses;
use crate::operator::cache_cluster::plan::Layout;
use crate::operator::cache_cluster::validate::Wanted;
use crate::policy::binding::{CA_FILE, PASSWORD_FILE, SECRET_DIR, SENTINEL_PASSWORD_FILE, SENTINEL_USERNAME_FILE, USERNAME_FILE};
use crate::policy::snapshot::{Auth, Cluster, DEFAULT_IDLE_TRANSACTION, Tls, Topology};

/// How a CacheCluster is found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// How its servers are.
    pub topology: Topology,
    /// Whether they and the sentinels speak TLS.
    pub tls: bool,
    /// What its servers keep, where that is known.
    pub keeping: Option<Keeping>,
}

impl Place {
    /// Of a CacheCluster. `None` where nobody whom sidecars ask has an address yet.
    pub fn of(wanted: &Wanted, addresses: &Addresses) -> Option<Self> {
        let at = |address: &IpAddr, port| SocketAddr::new(*address, port).to_string();
        let (topology, asked) = match wanted.layout {
            Layout::Sentinel { .. } => {
                let sentinels: Vec<String> = addresses.sentinels.values().map(|ip| at(ip, SENTINEL_PORT)).collect();
                let asked = sentinels.len();
                (Topology::Sentinel { master: wanted.master_name().to_owned(), sentinels }, asked)
            }
            Layout::Cluster { .. } => {
                let seeds: Vec<String> = addresses.servers.values().map(|ip| at(ip, SERVER_PORT)).collect();
                let asked = seeds.len();
                (Topology::Cluster { seeds }, asked)
            }
        };
        let fsync = wanted.storage.as_ref().map(|storage| storage.fsync.unwrap_or_default());
        let keeping = Some(Keeping { eviction: wanted.eviction, fsync });
        (asked > 0).then_some(Self { topology, tls: wanted.tls.is_some(), keeping })
    }

    /// Whether each of its servers has every write on disk before it answers.
    pub fn is_durable(&self) -> bool {
        self.keeping.is_some_and(Keeping::is_durable)
    }

    /// As a sidecar reaches it that has the binding's Secret. Every binding has a login of its own, also where others need none.
    pub fn reach(&self) -> Reach {
        let auth = |user: &str, password: &str| Auth { username_file: Some(file(user)), password_file: file(password) };
        let tls = Tls { ca_file: file(CA_FILE), cert_file: None, key_file: None, server_name: None };
        Reach {
            topology: self.topology.clone(),
            tls: self.tls.then_some(tls),
            auth: Some(auth(USERNAME_FILE, PASSWORD_FILE)),
            sentinel_auth: matches!(self.topology, Topology::Sentinel { .. })
                .then(|| auth(SENTINEL_USERNAME_FILE, SENTINEL_PASSWORD_FILE)),
            patience: PATIENCE,
        }
    }
}

impl Place {
    /// What a snapshot says of the CacheCluster of this name that is here, where no policy says anything of it.
    pub fn cluster(&self, name: &str) -> Cluster {
        let Reach { topology, tls, auth, sentinel_auth, patience } = self.reach();
        let (name, idle_transaction) = (name.to_owned(), DEFAULT_IDLE_TRANSACTION);
        Cluster { name, topology, tls, auth, sentinel_auth, patience, idle_transaction }
    }
}

/// An entry of the binding's Secret, as a sidecar finds it.
pub(super) fn file(entry: &str) -> PathBuf {
    PathBuf::from(SECRET_DIR).join(entry)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::api::CacheCluster;
    use crate::operator::cache_cluster::plan::{SentinelId, ServerId};
    use crate::operator::cache_cluster::validate::{tests::cluster_wanted, validate};

    #[test]
    fn sidecars_ask_every_sentinel_that_has_an_address() {
        let spec = json!({
            "engine": {"kind": "Valkey", "version": "8.1"}, "mode": "Sentinel", "memory": "256Mi", "tls": {"enabled": true},
        });
        let wanted = validate(&CacheCluster::new("main", serde_json::from_value(spec).unwrap())).unwrap();
        let mut addresses = Addresses::default();
        assert_eq!(Place::of(&wanted, &addresses), None);
        let at = |last: u8| (SentinelId(last.into()), IpAddr::from([10, 96, 0, last]));
        addresses.sentinels.extend([at(0), at(1)]);
        let reach = Place::of(&wanted, &addresses).unwrap().reach();
        let sentinels = ["10.96.0.0:26379", "10.96.0.1:26379"].map(str::to_owned).to_vec();
        assert_eq!(reach.topology, Topology::Sentinel { master: "main".to_owned(), sentinels });
        assert_eq!(reach.tls.unwrap().ca_file, PathBuf::from("/etc/larder/secret/ca.crt"));
    }

    #[test]
    fn sidecars_of_a_cluster_ask_its_servers() {
        let wanted = cluster_wanted(&json!({"mode": "Cluster"}));
        let mut addresses = Addresses::default();
        assert_eq!(Place::of(&wanted, &addresses), None);
        addresses.servers.extend([(ServerId { shard: 2, index: 0 }, IpAddr::from([10, 96, 2, 0]))]);
        let reach = Place::of(&wanted, &addresses).unwrap().reach();
        assert_eq!(reach.topology, Topology::Cluster { seeds: vec!["10.96.2.0:6379".to_owned()] });
        assert_eq!(reach.sentinel_auth, None);
    }
}
