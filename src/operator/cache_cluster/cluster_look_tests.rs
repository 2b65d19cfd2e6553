//! Whole looks at a CacheCluster of mode Cluster, before an API server and servers that write down what they are told.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex};

use serde_json::{Value, json};

use super::look_tests::{listen, listen_as_agent};
use super::names::{REVISION_ANNOTATION, SERVER_PORT};
use super::objects::{node_id, revisions};
use super::plan::ServerId;
use super::reconcile::Memory;
use super::validate::{tests::cluster, validate};
use crate::api::CacheCluster;
use crate::operator::controller::tests::look_once;
use crate::operator::fake_api::FakeApi;
use crate::operator::fake_server::in_bulk;
use crate::policy::agent::{DataState, Proved, ServerPhase, StateReport};

/// Three shards of two servers that own nothing, at addresses that nobody else has.
struct Standing {
    network: [u8; 2],
}

impl Standing {
    fn new() -> Self {
        Self { network: [fastrand::u8(1..200), fastrand::u8(..)] }
    }

    fn cluster(&self) -> CacheCluster {
        cluster(&json!({"mode": "Cluster"}))
    }

    fn servers(&self) -> impl Iterator<Item = ServerId> + use<> {
        validate(&self.cluster()).unwrap().servers()
    }

    fn address(&self, id: ServerId) -> IpAddr {
        let [b, c] = self.network;
        IpAddr::from([127, b, c, (id.shard * 10 + id.index + 1) as u8])
    }

    fn api(&self) -> FakeApi {
        let wanted = validate(&self.cluster()).unwrap();
        let metadata = |name: &str| {
            let owner = json!({"apiVersion": "larder.dev/v1alpha1", "kind": "CacheCluster", "name": "shop", "uid": wanted.uid, "controller": true});
            json!({"name": name, "namespace": "store", "uid": name, "labels": {"larder.dev/cluster": "shop"}, "ownerReferences": [owner]})
        };
        let mut cluster = serde_json::to_value(self.cluster()).unwrap();
        cluster["metadata"]["resourceVersion"] = json!("1");
        let mut objects: Vec<(&'static str, Value)> = vec![("cacheclusters", cluster)];
        for shard in 0..wanted.shards() {
            let name = wanted.names.shard_set(shard);
            let template = json!({"metadata": {}, "spec": {"containers": []}});
            let spec = json!({"replicas": 2, "serviceName": name, "selector": {}, "template": template});
            objects.push(("statefulsets", json!({"metadata": metadata(&name), "spec": spec})));
        }
        let revision = revisions(&wanted).servers;
        for id in wanted.servers() {
            let (name, address) = (wanted.names.server_pod(id), self.address(id));
            objects.push(("services", json!({"metadata": metadata(&name), "spec": {"clusterIP": address}})));
            let mut metadata = metadata(&name);
            metadata["annotations"] = json!({REVISION_ANNOTATION: revision});
            let status = json!({"conditions": [{"type": "Ready", "status": "False"}], "podIP": address});
            objects.push(("pods", json!({"metadata": metadata, "spec": {"containers": []}, "status": status})));
        }
        FakeApi::new(objects)
    }

    /// The agent of a server, and the server; the commands that it is told.
    fn listen(&self, id: ServerId) -> Arc<Mutex<Vec<String>>> {
        let address = self.address(id);
        let report = StateReport {
            version: 1,
            ordinal: id.index,
            address: Some(format!("{address}:{SERVER_PORT}")),
            generation: 1,
            data: DataState::Empty,
            claim: None,
            server: ServerPhase::Primary,
            proved: Proved::default(),
        };
        listen_as_agent(address, &report);
        let node = node_id("uid", id);
        listen(address, SERVER_PORT, move |line| {
            let bulk = |text: &str| format!("${}\r\n{text}\r\n", text.len());
            match line {
                "INFO" => bulk("role:master\r\nmaster_repl_offset:0\r\nloading:0\r\n"),
                "CONFIG GET cluster-replica-no-failover" => in_bulk(&["cluster-replica-no-failover", "yes"]),
                "CLUSTER NODES" => bulk(&format!("{node} {address}:6379@16379 myself,master - 0 0 0 connected\n")),
                "CLUSTER INFO" => bulk("cluster_state:fail\r\ncluster_slots_ok:0\r\ncluster_current_epoch:0\r\n"),
                "CLUSTER GETSLOTMIGRATIONS" | "CLUSTER MIGRATION STATUS ALL" => "-ERR unknown subcommand\r\n".to_owned(),
                _ => "+OK\r\n".to_owned(),
            }
        })
    }
}

#[tokio::test]
async fn servers_that_own_nothing_are_made_a_cluster() {
    let standing = Standing::new();
    let told: BTreeMap<ServerId, _> = standing.servers().map(|id| (id, standing.listen(id))).collect();
    let api = standing.api();
    look_once(api.client(), standing.cluster(), &mut Memory::default()).await;
    let commands = |shard: u16, index: u16, command: &str| {
        let told = told[&ServerId { shard, index }].lock().unwrap();
        told.iter().filter(|line| line.starts_with(command)).cloned().collect::<Vec<_>>()
    };
    let others = standing.servers().skip(1).map(|id| format!("CLUSTER MEET {} 6379 16379", standing.address(id)));
    assert_eq!(commands(0, 0, "CLUSTER MEET"), others.collect::<Vec<_>>());
    for (shard, slots) in [(0, "0 5460"), (1, "5461 10921"), (2, "10922 16383")] {
        assert_eq!(commands(shard, 0, "CLUSTER ADDSLOTS"), [format!("CLUSTER ADDSLOTSRANGE {slots}")]);
        assert_eq!(commands(shard, 1, "CLUSTER ADDSLOTS"), [""; 0]);
    }
    for what in ["services/shop-nodes", "configmaps/shop-2", "statefulsets/shop-1", "poddisruptionbudgets/shop"] {
        assert!(api.last(what).is_some(), "{what} is not written: {:?}", api.changes());
    }
    assert!(api.last("statefulsets/shop-sentinel").is_none() && api.last("services/shop-primary").is_none());
    let status = api.last("cacheclusters/shop/status").unwrap()["status"].clone();
    assert_eq!((&status["summary"], &status["servers"]["ready"]), (&json!("Forming"), &json!("0/6")), "{status}");
    assert!(status["sentinels"].is_null(), "{status}");
}
