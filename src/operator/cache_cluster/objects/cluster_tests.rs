//! The objects of a Cluster: what is there instead of sentinels, and that each shard has its own.

use serde_json::{Value, json};

use super::*;
use crate::operator::cache_cluster::users::{Access, SYSTEM_USER};
use crate::operator::cache_cluster::validate::tests::cluster_wanted;
use crate::policy::agent::{AgentConfig, Failover};

fn wanted(further: &Value) -> Wanted {
    let mut spec = json!({"mode": "Cluster", "shards": 3, "replicas": 1});
    for (key, value) in further.as_object().unwrap() {
        spec[key] = value.clone();
    }
    cluster_wanted(&spec)
}

/// Server `index` of shard `shard` is at `10.96.SHARD.INDEX`.
fn addresses(servers: impl Iterator<Item = ServerId>) -> Addresses {
    let at = |id: ServerId| (id, IpAddr::from([10, 96, id.shard as u8, id.index as u8]));
    Addresses { servers: servers.map(at).collect(), sentinels: BTreeMap::new() }
}

fn build(wanted: &Wanted, kept: &Kept) -> Objects {
    let installation = Installation {
        larder_image: "larder:1".to_owned(),
        image_pull_policy: None,
        operator_namespace: "larder-system".to_owned(),
    };
    let system = Login { user: SYSTEM_USER.to_owned(), password: "system password".to_owned() };
    let users = Users::next(None, &Access::Open, &system.password, None, std::time::SystemTime::UNIX_EPOCH);
    let credentials = Credentials { system, users, client: None, pki: None };
    objects(wanted, &installation, &addresses(wanted.servers()), &credentials, kept)
}

fn names<K: kube::ResourceExt>(objects: &[K]) -> Vec<String> {
    objects.iter().map(kube::ResourceExt::name_any).collect()
}

fn entry(objects: &Objects, shard: usize, name: &str) -> String {
    objects.config_maps[shard].data.as_ref().unwrap()[name].clone()
}

#[test]
fn each_shard_has_a_set_and_a_map_of_its_own_and_there_are_no_sentinels() {
    let built = build(&wanted(&json!({})), &Kept::default());
    let shards = ["shop-0", "shop-1", "shop-2"];
    assert_eq!(
        (names(&built.stateful_sets), names(&built.config_maps)),
        (shards.map(str::to_owned).into(), shards.map(str::to_owned).into())
    );
    for (shard, set) in built.stateful_sets.iter().enumerate() {
        let set = json!(set.spec);
        let selected = json!({
            "larder.dev/cluster": "shop", "app.kubernetes.io/component": "server", "larder.dev/shard": shard.to_string(),
        });
        assert_eq!(set["selector"]["matchLabels"], selected);
        assert_eq!((&set["replicas"], &set["podManagementPolicy"]), (&json!(2), &json!("Parallel")));
        assert_eq!(set["updateStrategy"], json!({"type": "OnDelete"}));
        let pod = &set["template"]["spec"];
        let mounted = pod["volumes"].as_array().unwrap().iter().find(|volume| volume["name"] == "config").unwrap();
        assert_eq!(mounted["configMap"]["name"], shards[shard]);
        let ports = pod["containers"][0]["ports"].as_array().unwrap().iter();
        let ports: Vec<_> = ports.map(|port| (port["name"].as_str().unwrap(), port["containerPort"].as_u64().unwrap())).collect();
        assert_eq!(ports, [("redis", 6379), ("agent", 9121), ("bus", 16379)]);
        // No replica where its primary is; all servers as evenly as may be.
        let apart = &pod["affinity"]["podAntiAffinity"]["preferredDuringSchedulingIgnoredDuringExecution"];
        assert_eq!(apart[0]["podAffinityTerm"]["labelSelector"]["matchLabels"], selected);
        let all = json!({"larder.dev/cluster": "shop", "app.kubernetes.io/component": "server"});
        assert_eq!(pod["topologySpreadConstraints"][0]["labelSelector"]["matchLabels"], all);
        assert_eq!((&apart[1]["podAffinityTerm"]["labelSelector"]["matchLabels"], &apart[1]["weight"]), (&all, &json!(20)));
    }
}

#[test]
fn one_server_of_all_shards_is_drained_at_a_time() {
    let built = build(&wanted(&json!({})), &Kept::default());
    let [budget] = &built.disruption_budgets[..] else { panic!("one budget: {:?}", built.disruption_budgets) };
    let selector = json!({"matchLabels": {"larder.dev/cluster": "shop", "app.kubernetes.io/component": "server"}});
    let expected = json!({"maxUnavailable": 1, "unhealthyPodEvictionPolicy": "IfHealthyBudget", "selector": selector});
    assert_eq!((json!(budget.spec), budget.metadata.name.as_deref()), (expected, Some("shop")));
}

#[test]
fn nobody_else_reaches_the_bus() {
    let built = build(&wanted(&json!({})), &Kept::default());
    let ingress = json!(built.network_policy.unwrap().spec.unwrap().ingress);
    let open = |port: u16| {
        let is_open = |rule: &&Value| rule["ports"].as_array().unwrap().iter().any(|open| open["port"] == port);
        let to = ingress.as_array().unwrap().iter().filter(is_open).flat_map(|rule| rule["from"].as_array().unwrap().clone());
        to.collect::<Vec<Value>>()
    };
    assert_eq!(open(16379), [json!({"podSelector": {"matchLabels": {"larder.dev/cluster": "shop"}}})]);
    assert_eq!((open(6379).len(), open(9121).len(), open(26379).len()), (3, 2, 0));
}

#[test]
fn services_of_a_cluster_are_those_of_its_servers() {
    let wanted = wanted(&json!({}));
    let services = services(&wanted, [ServerId { shard: 3, index: 0 }]);
    let expected =
        ["shop-servers", "shop-nodes", "shop-0-0", "shop-0-1", "shop-1-0", "shop-1-1", "shop-2-0", "shop-2-1", "shop-3-0"];
    assert_eq!(names(&services), expected);
    let ports = |index: usize| json!(services[index].spec.as_ref().unwrap().ports).as_array().unwrap().len();
    assert_eq!((ports(0), ports(1), ports(2)), (3, 1, 3));
}

#[test]
fn servers_announce_the_address_of_their_service_and_know_all_shards() {
    let built = build(&wanted(&json!({})), &Kept::default());
    let common = entry(&built, 1, "server.conf");
    let lines = "cluster-enabled yes\ncluster-config-file nodes.conf\ncluster-port 16379\ncluster-node-timeout 2000\n\
                 cluster-require-full-coverage no\ncluster-allow-replica-migration no\ncluster-replica-validity-factor 0\n";
    assert!(common.contains(lines), "{common}");
    let place = entry(&built, 1, "server-0.conf");
    assert!(
        place.contains("replica-announce-ip 10.96.1.0\nreplica-announce-port 6379\ncluster-announce-ip 10.96.1.0\n"),
        "{place}"
    );
    let config = AgentConfig::parse(entry(&built, 1, "agent-0.json").as_bytes()).unwrap();
    let peers: Vec<&str> = config.peers.iter().map(|peer| peer.address.as_str()).collect();
    assert_eq!(peers, ["10.96.1.1:6379"]);
    let Failover::Cluster { id, bus_port, shards } = config.failover else { panic!("a Cluster's") };
    let others = [["10.96.0.0:6379", "10.96.0.1:6379"], ["10.96.2.0:6379", "10.96.2.1:6379"]];
    assert_eq!((bus_port, shards), (16379, others.map(|shard| shard.map(str::to_owned).to_vec()).to_vec()));
    // Whoever changes this makes strangers of all servers whose tables are lost.
    assert_eq!(id, "30b99d9b1c22c5e4b776eaeb66d19be9f6289134");
}

#[test]
fn under_tls_the_bus_is_encrypted_too() {
    let built = build(&wanted(&json!({"tls": {"enabled": true}})), &Kept::default());
    assert!(entry(&built, 0, "server.conf").contains("tls-cluster yes\n"));
}

#[test]
fn a_shard_that_is_still_to_go_keeps_its_set() {
    let wanted = wanted(&json!({}));
    let kept = Kept { servers: BTreeMap::from([(0, 2), (1, 3), (2, 2), (3, 1)]), ..Kept::default() };
    let built = build(&wanted, &kept);
    let sizes: Vec<_> = built.stateful_sets.iter().map(|set| set.spec.as_ref().unwrap().replicas.unwrap()).collect();
    assert_eq!(sizes, [2, 3, 2, 1]);
}

#[test]
fn the_volumes_of_a_shard_that_leaves_go_with_its_pods() {
    let mut built = build(&wanted(&json!({"storage": {"size": "1Gi"}})), &Kept::default());
    let set = &mut built.stateful_sets[2];
    let when_scaled = |set: &StatefulSet| {
        json!(set.spec.as_ref().unwrap().persistent_volume_claim_retention_policy)["whenScaled"].as_str().map(str::to_owned)
    };
    assert_eq!(when_scaled(set).as_deref(), Some("Retain"));
    release_volumes(set);
    assert_eq!(when_scaled(set).as_deref(), Some("Delete"));
}
