//! Whom the certificates of a CacheCluster name, and who has shown the newest. Pure.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use super::objects::Addresses;
use super::pki::{Certified, Pki, Subjects};
use super::plan::{Member, Observed, Revision, SentinelId, ServerId};
use super::validate::{Tls, Wanted};

/// The domain that most clusters have.
const CLUSTER_DOMAIN: &str = "cluster.local";

/// The certificates that were seen, by fingerprint: of servers by their agents, of sentinels by the operator, in a handshake each.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Shown {
    /// By servers.
    pub servers: BTreeMap<ServerId, String>,
    /// By sentinels.
    pub sentinels: BTreeMap<SentinelId, String>,
}

/// Whom the certificates are to name. Addresses are what is announced; names are what clients may know.
pub fn subjects(wanted: &Wanted, tls: &Tls, addresses: &Addresses) -> Subjects {
    let names = &wanted.names;
    let pods = addresses.servers.keys().map(|id| names.server_pod(*id));
    let services = [names.primary_service(), names.replicas_service(), names.servers_headless()];
    let mut servers = in_all_forms(wanted, pods.chain(services));
    servers.extend(addresses.servers.values().map(IpAddr::to_string));
    // Where agents reach the server beside them.
    servers.insert("127.0.0.1".to_owned());
    let pods = addresses.sentinels.keys().map(|id| names.sentinel_pod(*id));
    let mut sentinels = in_all_forms(wanted, pods.chain([names.sentinels_service(), names.sentinels_headless()]));
    sentinels.extend(addresses.sentinels.values().map(IpAddr::to_string));
    Subjects { cluster: names.cluster().to_owned(), servers, sentinels, rotation: tls.rotation.clone() }
}

/// The names of Services as they are resolved in their namespace, and elsewhere.
fn in_all_forms(wanted: &Wanted, services: impl Iterator<Item = String>) -> BTreeSet<String> {
    let namespace = &wanted.namespace;
    let forms = |name: String| {
        let qualified = format!("{name}.{namespace}");
        [name, format!("{qualified}.svc"), format!("{qualified}.svc.{CLUSTER_DOMAIN}"), qualified]
    };
    services.flat_map(forms).collect()
}

/// How many of the wanted servers and sentinels have shown a certificate that needs not be replaced.
pub fn current(wanted: &Wanted, pki: &Pki, shown: &Shown) -> (usize, usize) {
    let is_current = |certified: Option<&Certified>, shown: Option<&String>| {
        certified.zip(shown).is_some_and(|(certified, shown)| certified.is_served_by(shown))
    };
    let servers = wanted.servers().filter(|id| is_current(pki.servers(), shown.servers.get(id)));
    let sentinels = wanted.sentinel_ids().filter(|id| is_current(pki.sentinels(), shown.sentinels.get(id)));
    (servers.count(), sentinels.count())
}

/// Whether all of them have.
pub fn is_settled(wanted: &Wanted, pki: &Pki, shown: &Shown) -> bool {
    current(wanted, pki, shown) == (wanted.servers().count(), wanted.sentinel_ids().count())
}

/// Makes sentinels that present an earlier certificate count as of an earlier revision: they read theirs when they start, and the planner
/// replaces one after the other while the rest is well.
pub fn age_sentinels(observed: &mut Observed, pki: &Pki, shown: &Shown) {
    let Some(certified) = pki.sentinels() else { return };
    for (id, fingerprint) in &shown.sentinels {
        let pod = observed.pods.get_mut(&Member::Sentinel(*id)).filter(|_| !certified.is_served_by(fingerprint));
        if let Some(revision) = pod.and_then(|pod| pod.revision.as_mut()) {
            *revision = Revision(format!("{} with an earlier certificate", revision.0));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, UNIX_EPOCH};

    use super::super::plan::{Pod, Sentinel};
    use super::super::validate::tests::cluster;
    use super::super::validate::validate;
    use super::*;

    fn wanted() -> Wanted {
        validate(&cluster(&serde_json::json!({"tls": {"enabled": true, "rotation": "one"}}))).unwrap()
    }

    fn addresses() -> Addresses {
        let at = |third: u8, index: u16| IpAddr::from([10, 96, third, index as u8]);
        Addresses {
            servers: (0..2).map(|index| (ServerId { shard: 0, index }, at(0, index))).collect(),
            sentinels: (0..3).map(|index| (SentinelId(index), at(1, index))).collect(),
        }
    }

    fn pod() -> Pod {
        let revision = Some(Revision("a".to_owned()));
        Pod { uid: "1".to_owned(), revision, node: None, started: true, ready: true, deleting: false }
    }

    #[test]
    fn certificates_name_what_clients_may_dial() {
        let wanted = wanted();
        let subjects = subjects(&wanted, wanted.tls.as_ref().unwrap(), &addresses());
        for name in ["shop-0-1", "shop-0-1.store", "shop-primary.store.svc", "shop-replicas.store.svc.cluster.local", "10.96.0.1"]
        {
            assert!(subjects.servers.contains(name) && !subjects.sentinels.contains(name), "{name}: {subjects:?}");
        }
        for name in ["shop-sentinels", "shop-sentinel-2.store.svc", "10.96.1.2"] {
            assert!(subjects.sentinels.contains(name) && !subjects.servers.contains(name), "{name}: {subjects:?}");
        }
        assert_eq!(subjects.rotation.as_deref(), Some("one"));
    }

    #[test]
    fn sentinels_with_an_earlier_certificate_are_of_an_earlier_revision() {
        let wanted = wanted();
        let subjects = subjects(&wanted, wanted.tls.as_ref().unwrap(), &addresses());
        let before = Pki::default().next(&subjects, false, UNIX_EPOCH + Duration::from_secs(1 << 30)).unwrap();
        let asked = Subjects { rotation: Some("two".to_owned()), ..subjects };
        let after = before.next(&asked, true, UNIX_EPOCH + Duration::from_secs((1 << 30) + 60)).unwrap();
        let print = |certified: Option<&Certified>| certified.unwrap().fingerprint().to_owned();
        let (old, new) = (print(before.sentinels()), print(after.sentinels()));
        let shown = Shown {
            servers: addresses().servers.into_keys().map(|id| (id, print(after.servers()))).collect(),
            sentinels: [(SentinelId(0), new.clone()), (SentinelId(1), old)].into(),
        };
        let mut observed = Observed::default();
        for id in (0..3).map(SentinelId) {
            observed.sentinels.insert(id, Sentinel::Silent);
            observed.pods.insert(Member::Sentinel(id), pod());
        }
        age_sentinels(&mut observed, &after, &shown);
        let aged = observed.pods.iter().filter(|(_, found)| **found != pod());
        assert_eq!(aged.map(|(member, _)| *member).collect::<Vec<_>>(), [Member::Sentinel(SentinelId(1))]);
        assert_eq!(current(&wanted, &after, &shown), (2, 1));
        assert!(!is_settled(&wanted, &after, &shown));
        let all = Shown { sentinels: (0..3).map(|index| (SentinelId(index), new.clone())).collect(), ..shown };
        assert!(is_settled(&wanted, &after, &all));
    }
}
