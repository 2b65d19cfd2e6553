//! Whole looks at a CacheCluster, before an API server that writes down what it is told.

use std::io::{BufRead as _, BufReader, Write as _};
use std::net::{IpAddr, TcpListener};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, SystemTime};

use serde_json::{Value, json};
use tokio::sync::watch;
use tokio::time::Instant;

use super::build::TAKEOVER_AFTER;
use super::names::{AGENT_PORT, REVISION_ANNOTATION, SENTINEL_PORT, SERVER_PORT};
use super::objects::revisions;
use super::reconcile::Memory;
use super::users::{Access, Users};
use super::validate::{tests::cluster, validate};
use crate::operator::controller::tests::{look_as, look_once};
use crate::operator::election::Leadership;
use crate::operator::fake_api::{Change, FakeApi};
use crate::operator::fake_server::{self, in_bulk};
use crate::policy::agent::{AgentConfig, DataState, Failover, Position, Proved, ServerPhase, StateReport};

/// What stands of a tier `shop` with one replica.
struct Standing {
    spec: Value,
    sentinels: u8,
    network: [u8; 3],
    /// The Services that are gone.
    missing: Vec<&'static str>,
    /// The pod whose node does not answer.
    lost: Option<&'static str>,
}

impl Standing {
    fn new(spec: Value) -> Self {
        // Nobody else listens there.
        let network = [127, fastrand::u8(1..200), fastrand::u8(..)];
        Self { spec, sentinels: 3, network, missing: Vec::new(), lost: None }
    }

    fn address(&self, last: u8) -> IpAddr {
        let [a, b, c] = self.network;
        IpAddr::from([a, b, c, last])
    }

    fn sentinel(&self, index: u8) -> IpAddr {
        self.address(100 + index)
    }

    fn cluster(&self) -> crate::api::CacheCluster {
        let mut cluster = cluster(&self.spec);
        cluster.status = Some(serde_json::from_value(json!({"initialized": true})).unwrap());
        cluster
    }

    fn metadata(&self, name: &str) -> Value {
        let owner = json!({"apiVersion": "larder.dev/v1alpha1", "kind": "CacheCluster", "name": "shop", "uid": self.cluster().metadata.uid, "controller": true});
        json!({"name": name, "namespace": "store", "uid": name, "labels": {"larder.dev/cluster": "shop"}, "ownerReferences": [owner]})
    }

    fn api(&self) -> FakeApi {
        self.api_with([])
    }

    /// With these objects besides.
    fn api_with<const N: usize>(&self, others: [(&'static str, Value); N]) -> FakeApi {
        let metadata = |name: &str| self.metadata(name);
        let mut cluster = serde_json::to_value(self.cluster()).unwrap();
        cluster["metadata"]["resourceVersion"] = json!("1");
        let mut objects = vec![("cacheclusters", cluster)];
        for (name, replicas) in [("shop-0", 2), ("shop-sentinel", self.sentinels)] {
            let template = json!({"metadata": {}, "spec": {"containers": []}});
            let spec = json!({"replicas": replicas, "serviceName": name, "selector": {}, "template": template});
            objects.push(("statefulsets", json!({"metadata": metadata(name), "spec": spec})));
        }
        let revisions = revisions(&validate(&self.cluster()).unwrap());
        let servers = (0..2).map(|index| (format!("shop-0-{index}"), self.address(index)));
        let sentinels = (0..self.sentinels).map(|index| (format!("shop-sentinel-{index}"), self.sentinel(index)));
        for (name, address) in servers.chain(sentinels) {
            if !self.missing.contains(&name.as_str()) {
                objects.push(("services", json!({"metadata": metadata(&name), "spec": {"clusterIP": address}})));
            }
            let mut metadata = metadata(&name);
            let revision = if name.contains("sentinel") { &revisions.sentinels } else { &revisions.servers };
            let is_lost = self.lost == Some(name.as_str());
            // Nothing but its node keeps a lost one from being replaced.
            metadata["annotations"] = json!({REVISION_ANNOTATION: if is_lost { "earlier" } else { revision.as_str() }});
            let status = json!({"conditions": [is_ready(!is_lost)], "podIP": address});
            let spec = json!({"containers": [], "nodeName": is_lost.then_some(LOST_NODE)});
            objects.push(("pods", json!({"metadata": metadata, "spec": spec, "status": status})));
        }
        for node in [LOST_NODE, "a"] {
            let status = json!({"conditions": [is_ready(node != LOST_NODE)]});
            objects.push(("nodes", json!({"metadata": {"name": node}, "status": status})));
        }
        let server = |index: u8| format!("replica-announce-ip {}\nreplica-announce-port 6379\n", self.address(index));
        let data = json!({"server-0.conf": server(0), "server-1.conf": server(1)});
        objects.push(("configmaps", json!({"metadata": metadata("shop-0"), "data": data})));
        objects.extend(others);
        FakeApi::new(objects)
    }
}

/// The node that does not answer.
const LOST_NODE: &str = "lost";

fn is_ready(is_ready: bool) -> Value {
    json!({"type": "Ready", "status": if is_ready { "True" } else { "False" }})
}

/// A sentinel that watches `primary`, or nothing, and the commands that it is told.
fn listen_as_sentinel(address: IpAddr, primary: Option<IpAddr>) -> Arc<Mutex<Vec<String>>> {
    listen(address, SENTINEL_PORT, move |line| sentinel_answer(line, address, primary))
}

fn sentinel_answer(line: &str, address: IpAddr, primary: Option<IpAddr>) -> String {
    match (line, primary) {
        ("SENTINEL MASTERS", None) => "*0\r\n".to_owned(),
        ("SENTINEL MASTERS", Some(primary)) => {
            let primary = primary.to_string();
            let fields = [
                ["ip", &primary],
                ["port", "6379"],
                ["flags", "master"],
                ["num-slaves", "1"],
                ["num-other-sentinels", "2"],
                ["quorum", "2"],
            ];
            format!("*1\r\n{}", in_bulk(fields.as_flattened()))
        }
        ("SENTINEL CONFIG GET announce-ip", _) => in_bulk(&["announce-ip", &address.to_string()]),
        _ => "+OK\r\n".to_owned(),
    }
}

/// A server with this priority, and the commands that it is told.
fn listen_as_server(address: IpAddr, priority: &'static str) -> Arc<Mutex<Vec<String>>> {
    listen(address, SERVER_PORT, move |line| server_answer(line, priority))
}

fn server_answer(line: &str, priority: &str) -> String {
    match line {
        "CONFIG GET replica-priority" => in_bulk(&["replica-priority", priority]),
        _ => "+OK\r\n".to_owned(),
    }
}

/// Somebody who speaks the servers' protocol, and the commands that come.
pub(super) fn listen(
    address: IpAddr,
    port: u16,
    answer_to: impl Fn(&str) -> String + Clone + Send + 'static,
) -> Arc<Mutex<Vec<String>>> {
    let told = Arc::new(Mutex::new(Vec::new()));
    let heard = told.clone();
    fake_server::listen((address, port), move |words| {
        let line = words.join(" ");
        let answer = answer_to(&line);
        heard.lock().unwrap().push(line);
        answer
    });
    told
}

/// Sentinels and agents of a primary and a replica that follows, which announces the last of its address so.
fn listen_as_tier(standing: &Standing, second: u8) {
    let primary = standing.address(0);
    for index in 0..3 {
        listen_as_sentinel(standing.sentinel(index), Some(primary));
    }
    listen_as_agents(standing, second);
}

/// The agents of such a tier.
fn listen_as_agents(standing: &Standing, second: u8) {
    let primary = standing.address(0);
    let servers = [ServerPhase::Primary, ServerPhase::Replica { of: format!("{primary}:6379"), link_up: true }];
    for (index, server) in (0..).zip(servers) {
        let announced = standing.address(if index == 1 { second } else { index });
        let position = Position { lineage: "aa".to_owned(), offset: 1, led: false, exact: true };
        let report = StateReport {
            version: 1,
            ordinal: u16::from(index),
            address: Some(format!("{announced}:6379")),
            generation: 1,
            data: DataState::Complete(position),
            claim: None,
            server,
            proved: Proved::default(),
        };
        listen_as_agent(standing.address(index), &report);
    }
}

/// An agent that always tells the same.
pub(super) fn listen_as_agent(address: IpAddr, report: &StateReport) {
    let listener = TcpListener::bind((address, AGENT_PORT)).unwrap();
    let body = serde_json::to_string(report).unwrap();
    thread::spawn(move || {
        for mut stream in listener.incoming().map_while(Result::ok) {
            BufReader::new(&stream).lines().map_while(Result::ok).take_while(|line| !line.is_empty()).for_each(drop);
            let head = "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nConnection: close\r\nContent-Length: ";
            let _ = write!(stream, "{head}{}\r\n\r\n{body}", body.len());
        }
    });
}

async fn look(standing: &Standing, api: &FakeApi) {
    look_once(api.client(), standing.cluster(), &mut Memory::default()).await;
}

#[tokio::test]
async fn a_pause_stops_everything_but_the_status() {
    let spec =
        |paused: bool| json!({"paused": paused, "replicas": 3, "sentinels": 5, "memory": "512Mi", "parameters": {"hz": "20"}});
    let mut standing = Standing::new(spec(true));
    let told = listen_as_sentinel(standing.sentinel(0), None);
    let was_told = |command: &str| told.lock().unwrap().iter().any(|line| line.starts_with(command));
    let api = standing.api();
    look(&standing, &api).await;
    let changes: Vec<String> = api.changes().into_iter().map(|change| change.what).collect();
    assert_eq!(changes, ["cacheclusters/shop/status"]);
    let status = api.last("cacheclusters/shop/status").unwrap()["status"].clone();
    assert_eq!(status["summary"], "Paused", "{status}");
    assert!(was_told("SENTINEL MASTERS") && !was_told("ACL SETUSER"), "{told:?}");
    // The same without the pause changes all of it.
    standing.spec = spec(false);
    let api = standing.api();
    look(&standing, &api).await;
    for what in ["services/shop-0-0", "configmaps/shop-0", "secrets/shop-users", "statefulsets/shop-0"] {
        assert!(api.last(what).is_some(), "{what} is not written: {:?}", api.changes());
    }
    assert!(was_told("ACL SETUSER"), "{told:?}");
}

/// Whoever served once is repaired, and never formed anew over its data.
#[tokio::test]
async fn what_once_served_stays_initialized_while_nobody_serves() {
    let standing = Standing::new(json!({}));
    for (served, reason) in [(true, "NoPrimary"), (false, "Forming")] {
        let (mut cluster, api) = (standing.cluster(), standing.api());
        cluster.status = cluster.status.filter(|_| served);
        look_once(api.client(), cluster, &mut Memory::default()).await;
        let status = api.last("cacheclusters/shop/status").unwrap()["status"].clone();
        let conditions = status["conditions"].as_array().unwrap();
        let ready = conditions.iter().find(|condition| condition["type"] == "Ready").unwrap();
        assert_eq!((&ready["status"], &ready["reason"]), (&json!("False"), &json!(reason)), "{status}");
        assert_eq!(status["initialized"] == true, served, "{status}");
    }
}

#[tokio::test]
async fn sentinels_that_are_to_go_count_until_they_are_gone() {
    let mut standing = Standing::new(json!({}));
    standing.sentinels = 4;
    let api = standing.api();
    look(&standing, &api).await;
    let configured = |api: &FakeApi| {
        let agent = api.last("configmaps/shop-0").unwrap()["data"]["agent-0.json"].as_str().unwrap().to_owned();
        let agent = AgentConfig::parse(agent.as_bytes()).unwrap();
        let Failover::Sentinel { sentinels, .. } = agent.failover else { panic!("under Sentinel") };
        let last = api.last("configmaps/shop-sentinel").unwrap()["data"]["sentinel-3.conf"].is_string();
        let removed = api.changes().iter().any(|change| change.method == "DELETE" && change.what == "services/shop-sentinel-3");
        (sentinels.len(), last, removed)
    };
    assert_eq!(configured(&api), (4, true, false));
    assert_eq!(api.last("statefulsets/shop-sentinel").unwrap()["spec"]["replicas"], 4, "nobody may go while nobody leads");
}

#[tokio::test]
async fn a_service_that_is_gone_comes_back_at_its_address() {
    let mut standing = Standing::new(json!({}));
    standing.missing = vec!["shop-0-1"];
    let (address, api) = (standing.address(1).to_string(), standing.api());
    look(&standing, &api).await;
    assert_eq!(api.last("services/shop-0-1").unwrap()["spec"]["clusterIP"], address);
    assert!(api.last("services/shop-0-0").unwrap()["spec"].get("clusterIP").is_none(), "what stands keeps its own");
    // Where another has it by now, any other does.
    let api = standing.api().refusing(&[&address]);
    look(&standing, &api).await;
    assert!(api.last("services/shop-0-1").unwrap()["spec"].get("clusterIP").is_none());
    let config = api.last("configmaps/shop-0").unwrap()["data"]["server-1.conf"].as_str().unwrap().to_owned();
    assert!(!config.contains(&address), "{config}");
}

/// Its agent has the address for as long as it runs; the pod that follows takes the new one up.
#[tokio::test]
async fn a_pod_that_announces_an_address_of_the_past_is_replaced() {
    for moved in [false, true] {
        let standing = Standing::new(json!({}));
        listen_as_tier(&standing, if moved { 99 } else { 1 });
        let api = standing.api();
        look(&standing, &api).await;
        let removed = api.changes().into_iter().filter(|change| change.method == "DELETE");
        let removed = removed.map(|Change { what, body, .. }| (what, body.get("gracePeriodSeconds").cloned()));
        let expected = if moved { vec![("pods/shop-0-1".to_owned(), None)] } else { Vec::new() };
        assert_eq!(removed.collect::<Vec<_>>(), expected, "by its own grace, never by force");
        let status = api.last("cacheclusters/shop/status").unwrap()["status"].clone();
        assert_eq!(status["summary"], if moved { "Rolling" } else { "Configuring" }, "{status}");
    }
}

/// Whether its processes still run, a person alone can find out.
#[tokio::test]
async fn pods_of_a_lost_node_are_left_alone_and_the_status_names_the_commands() {
    let mut standing = Standing::new(json!({"storage": {"size": "1Gi"}}));
    standing.lost = Some("shop-0-1");
    let claim = json!({"metadata": standing.metadata("data-shop-0-1"), "status": {"phase": "Bound"}});
    let (api, mut memory) = (standing.api_with([("persistentvolumeclaims", claim)]), Memory::default());
    let mut look = async || {
        look_once(api.client(), standing.cluster(), &mut memory).await;
        memory.age_absences(TAKEOVER_AFTER);
        api.last("cacheclusters/shop/status").unwrap()["status"].clone()
    };
    let status = look().await;
    assert_ne!(status["summary"], "Blocked", "it may be back in a moment: {status}");
    let status = look().await;
    assert_eq!(status["summary"], "Blocked", "{status}");
    let conditions = status["conditions"].as_array().unwrap();
    let message = conditions.iter().find(|condition| condition["type"] == "Progressing").unwrap()["message"].as_str().unwrap();
    for words in
        ["node lost of pod shop-0-1", "`kubectl delete node lost`", "`kubectl delete pvc/data-shop-0-1 pod/shop-0-1 -n store`"]
    {
        assert!(message.contains(words), "{words}: {message}");
    }
    let removed = api.changes().into_iter().filter(|change| change.method == "DELETE" && change.what.starts_with("pods/"));
    assert_eq!(removed.map(|change| change.what).collect::<Vec<_>>(), Vec::<String>::new());
}

/// By an operator that ended in the middle: until somebody takes it back, sentinels would promote that replica before all others.
#[tokio::test]
async fn a_preference_that_a_handover_left_behind_is_taken_back_once() {
    let standing = Standing::new(json!({}));
    listen_as_tier(&standing, 1);
    let told = [listen_as_server(standing.address(0), "100"), listen_as_server(standing.address(1), "1")];
    let said = |index: usize| {
        let lines = told[index].lock().unwrap();
        lines.iter().filter(|line| line.starts_with("CONFIG")).cloned().collect::<Vec<_>>()
    };
    let (api, mut memory) = (standing.api(), Memory::default());
    look_once(api.client(), standing.cluster(), &mut memory).await;
    look_once(api.client(), standing.cluster(), &mut memory).await;
    assert_eq!(said(0), ["CONFIG GET replica-priority"]);
    assert_eq!(said(1), ["CONFIG GET replica-priority", "CONFIG SET replica-priority 100"]);
}

/// A look takes longer than a Lease is trusted for: another may act by its end.
#[tokio::test]
async fn an_operator_that_leads_no_more_changes_nothing_from_then_on() {
    // The Lease is lost at this question or command, and all in this order is done before.
    let in_order = ["SENTINEL MASTERS", "cacheclusters/shop/status", "ACL SETUSER", "CONFIG SET", "pods/shop-0-1"];
    for (lost_at, done) in [("never", 5), ("SENTINEL MASTERS", 1), ("ACL SETUSER", 3), ("CONFIG SET", 4)] {
        let standing = Standing::new(json!({}));
        let (gives, until) = watch::channel(Some(Instant::now() + Duration::from_secs(3600)));
        let lose_at = move |line: &str| {
            if line.starts_with(lost_at) {
                gives.send_replace(None);
            }
        };
        let primary = standing.address(0);
        listen_as_agents(&standing, 99);
        let mut told = Vec::new();
        for address in (0..3).map(|index| standing.sentinel(index)) {
            let lose_at = lose_at.clone();
            told.push(listen(address, SENTINEL_PORT, move |line| {
                lose_at(line);
                sentinel_answer(line, address, Some(primary))
            }));
        }
        for address in (0..2).map(|index| standing.address(index)) {
            let lose_at = lose_at.clone();
            told.push(listen(address, SERVER_PORT, move |line| {
                lose_at(line);
                server_answer(line, "1")
            }));
        }
        let api = standing.api();
        let outcome = look_as(Leadership::given(until), api.client(), standing.cluster(), &mut Memory::default()).await;
        assert_eq!(outcome.is_ok(), lost_at == "never", "{outcome:?}");
        let told: Vec<String> = told.iter().flat_map(|told| told.lock().unwrap().clone()).collect();
        let changes: Vec<String> = api.changes().into_iter().map(|change| change.what).collect();
        let happened =
            |what: &&str| told.iter().any(|line| line.starts_with(what)) || changes.iter().any(|change| change == what);
        let happened: Vec<&str> = in_order.into_iter().filter(happened).collect();
        assert_eq!(happened, in_order[..done], "lost at {lost_at}: {told:?} {changes:?}");
    }
}

/// It is an error, so that the look is repeated once the Lease is back.
#[tokio::test]
async fn an_operator_that_does_not_lead_changes_nothing() {
    let standing = Standing::new(json!({}));
    listen_as_agents(&standing, 99);
    let primary = standing.address(0);
    let told: Vec<_> = (0..3).map(|index| listen_as_sentinel(standing.sentinel(index), Some(primary))).collect();
    let (_kept, until) = watch::channel(None);
    let api = standing.api();
    let outcome = look_as(Leadership::given(until), api.client(), standing.cluster(), &mut Memory::default()).await;
    assert_eq!(outcome.map_err(|error| error.word()), Err("not_leading"));
    assert!(api.changes().is_empty(), "{:?}", api.changes());
    let told: Vec<String> = told.iter().flat_map(|told| told.lock().unwrap().clone()).collect();
    assert!(!told.iter().any(|line| line.contains(" SET")), "{told:?}");
}

/// Of an operator that was away when it was due: all that it changes is the users, which servers then have to read back.
#[tokio::test]
async fn an_operator_that_returns_drops_an_earlier_password_that_is_due() {
    let standing = Standing::new(json!({}));
    let (now, open) = (SystemTime::now(), Access::Open);
    let first = Users::next(None, &Access::user("app", "p1"), "system", None, now);
    let second = Users::next(Some(&first), &open, "system", Some(1), now);
    let bytes = |text: &str| serde_json::to_value(k8s_openapi::ByteString(text.as_bytes().to_vec())).unwrap();
    for (ago, expected) in [(60, 2), (700, 3)] {
        let proved = Users::next(Some(&second), &open, "system", Some(2), now - Duration::from_secs(ago));
        let secret = |name: &str, entry: &str, text: &str| {
            ("secrets", json!({"metadata": standing.metadata(name), "data": {entry: bytes(text)}}))
        };
        let secrets = [secret("shop-system", "password", "system"), secret("shop-users", "state.json", &proved.to_json())];
        let api = standing.api_with(secrets);
        look(&standing, &api).await;
        let written = api.last("secrets/shop-users").unwrap()["data"]["state.json"].clone();
        let written: k8s_openapi::ByteString = serde_json::from_value(written).unwrap();
        assert_eq!(Users::parse(&written.0).unwrap().generation, expected, "{ago} s after all servers had both");
    }
}
