//! Relays as whole looks at a namespace make them, before an API server that writes down what it is told and a server that plays a primary.

use std::net::SocketAddr;
use std::time::{Duration, SystemTime};

use serde_json::{Value, json};
use tokio::time::Instant;

use super::kept::Sighting;
use super::tend::Minded;
use super::*;
use crate::api::cache_cluster::{Eviction, Fsync, Keeping};
use crate::journal::Level;
use crate::journal::feed::View;
use crate::operator::admin::Entry;
use crate::operator::cache_cluster::users::{Access, Users};
use crate::operator::cache_policy::look::Memory;
use crate::operator::cache_policy::place::Place;
use crate::operator::cache_policy::ties::Offer;
use crate::operator::controller::tests::look_at_policies_once;
use crate::operator::fake_api::FakeApi;
use crate::operator::fake_server::{self, in_bulk};
use crate::operator::queue::Key;
use crate::policy::snapshot::Topology;

fn policy(strategy: &str, metadata: &Value) -> CachePolicy {
    serde_json::from_value(json!({
        "apiVersion": "larder.dev/v1alpha1", "kind": "CachePolicy", "metadata": metadata,
        "spec": {"cacheCluster": "main", "workloads": {"matchLabels": {"app": "shop"}}, "rules": [
            {"name": "a", "keys": "a:{id}", "strategy": "CacheAside"}, {"name": "b", "keys": "b:{id}", "strategy": strategy},
        ]},
    }))
    .unwrap()
}

#[test]
fn a_relay_follows_its_policy_alone() {
    let shop = policy("WriteBehind", &json!({"name": "shop", "namespace": "store", "uid": "7"}));
    let relay = workload(&shop);
    assert!(relay.follows(&shop) && relay.to_string() == "CachePolicy shop");
    assert_eq!(relay.owner_reference().map(|owner| (owner.kind, owner.uid)), Some(("CachePolicy".to_owned(), "7".to_owned())));
    assert_ne!(binding(&shop), BindingName::of("Deployment", "shop", "main"), "a Deployment may have the policy's name");
}

#[test]
fn rules_that_write_behind_need_one() {
    assert!(writes_behind(&policy("WriteBehind", &json!({}))) && !writes_behind(&policy("WriteThrough", &json!({}))));
    let held = policy("Bypass", &json!({"finalizers": ["other", "larder.dev/journal"]}));
    assert!(is_held(&held) && !is_abandoned(&held) && !is_held(&policy("Bypass", &json!({"finalizers": ["other"]}))));
    assert!(is_abandoned(&policy("Bypass", &json!({"annotations": {"larder.dev/abandon-journal": ""}}))));
}

/// A policy that writes behind, with this metadata besides.
fn shop(metadata: &Value) -> Value {
    let mut shop = json!({
        "apiVersion": "larder.dev/v1alpha1", "kind": "CachePolicy",
        "metadata": {"name": "shop", "namespace": "store", "uid": "7", "generation": 1, "resourceVersion": "1"},
        "spec": {
            "cacheCluster": "main", "workloads": {"matchLabels": {"app": "shop"}},
            "origins": [{"name": "db", "sql": {"url": {"value": "postgres://db/shop"}}}],
            "rules": [{"name": "user", "keys": "user:{id}", "strategy": "WriteBehind", "origin": {
                "name": "db", "read": "SELECT name FROM users WHERE id = $id",
                "write": "INSERT INTO users VALUES ($id, $value, $version) ON CONFLICT (id) DO UPDATE SET name = $value",
                "delete": "DELETE FROM users WHERE id = $id",
            }}],
        },
    });
    for (name, value) in metadata.as_object().into_iter().flatten() {
        shop["metadata"][name] = value.clone();
    }
    shop
}

/// A policy that is being deleted and waits, with these annotations.
fn leaving(annotations: &Value) -> Value {
    shop(&json!({"finalizers": [FINALIZER], "deletionTimestamp": "2026-01-01T00:00:00Z", "annotations": annotations}))
}

fn cluster() -> (&'static str, Value) {
    let storage = json!({"size": "1Gi", "fsync": "Always"});
    let spec = json!({"engine": {"kind": "Valkey", "version": "8.1"}, "mode": "Sentinel", "memory": "256Mi", "storage": storage});
    let metadata = json!({"name": "main", "namespace": "store", "uid": "3", "resourceVersion": "1"});
    ("cacheclusters", json!({"apiVersion": "larder.dev/v1alpha1", "kind": "CacheCluster", "metadata": metadata, "spec": spec}))
}

fn workload_of_the_policy() -> (&'static str, Value) {
    let template = json!({"metadata": {"labels": {"app": "shop"}}, "spec": {"containers": []}});
    let metadata = json!({"name": "shop", "namespace": "store", "uid": "9", "resourceVersion": "1"});
    ("deployments", json!({"metadata": metadata, "spec": {"selector": {}, "template": template}}))
}

/// A primary whose journals hold so many writes in each partition, and that knows of no feed.
fn primary(depth: u64) -> SocketAddr {
    primary_with(depth, &View::default())
}

/// The same, where each feed is so. Where somebody reads it, somebody tends all queues of loads.
fn primary_with(depth: u64, view: &View) -> SocketAddr {
    let text = |text: &Option<String>| text.clone().unwrap_or_default();
    let behind = view.behind_ms.map(|millis| millis.to_string()).unwrap_or_default();
    let removed = if view.is_removed { "1" } else { "" };
    let is_read = view.reader.is_some();
    let feed = ["view", &text(&view.reader), "", &behind, "0", &text(&view.trouble), removed].map(str::to_owned);
    fake_server::listen("127.0.0.1:0", move |words| {
        if words.iter().any(|word| word.ends_with("/loads:relay")) {
            return format!(":{}\r\n", u8::from(is_read));
        }
        if words.iter().any(|word| word.starts_with("larder:cr:")) {
            return in_bulk(&feed);
        }
        // now, depth, bytes, oldest, last, position, fence, dirty, dead, parked; and nobody drains it.
        let numbers = [9_000_000, depth, depth * 100, depth.min(1) * 4_000_000, 5_000_000, 0, 0, depth, 0, 0];
        let words = numbers.map(|number: u64| number.to_string());
        in_bulk(&["status".to_owned()].into_iter().chain(words).chain([String::new()]).collect::<Vec<_>>())
    })
}

fn offer(primary: SocketAddr) -> Offer {
    let topology = Topology::Sentinel { master: "main".to_owned(), sentinels: vec!["10.96.0.7:26379".to_owned()] };
    let keeping = Keeping { eviction: Eviction::VolatileLfu, fsync: Some(Fsync::Always) };
    Offer {
        place: Place { topology, tls: false, keeping: Some(keeping) },
        authorities: None,
        keys: Entry::default().into(),
        servers: Vec::new(),
        sentinels: Vec::new(),
        master: "main".to_owned(),
        primary: Some(primary),
        users: Users::next(None, &Access::Open, "system", None, SystemTime::UNIX_EPOCH),
        claims: None,
        proved: None,
        in_force: None,
    }
}

fn key() -> Key {
    Key { namespace: "store".to_owned(), name: "main".to_owned() }
}

/// One look at these objects. What was told to the API server.
async fn look(objects: Vec<(&'static str, Value)>, primary: Option<SocketAddr>, memory: &mut Memory) -> (FakeApi, Duration) {
    let api = FakeApi::new(objects);
    let begin = |context: &crate::operator::controller::Context| {
        if let Some(primary) = primary {
            context.ties.offer(&key(), offer(primary));
        }
    };
    let next = look_at_policies_once(api.client(), memory, begin).await.unwrap();
    (api, next)
}

fn relay_name() -> String {
    objects::object_name(&binding(&serde_json::from_value(shop(&Value::Null)).unwrap()))
}

/// The finalizers that the policy was given last.
fn finalizers(api: &FakeApi) -> Option<Value> {
    Some(api.last("cachepolicies/shop")?["metadata"].get("finalizers").cloned().unwrap_or_default())
}

fn carried(api: &FakeApi) -> Option<(Value, Value)> {
    let status = api.last("cachepolicies/shop/status")?["status"].clone();
    let carried = status["conditions"].as_array()?.iter().find(|condition| condition["type"] == "Carried")?["reason"].clone();
    Some((carried, status["journal"]["depth"].clone()))
}

#[tokio::test]
async fn a_policy_that_writes_behind_gets_a_relay_whether_its_workload_runs_or_not() {
    for workloads in [vec![workload_of_the_policy()], Vec::new()] {
        let objects = [vec![("cachepolicies", shop(&Value::Null)), cluster()], workloads.clone()].concat();
        let (api, next) = look(objects, Some(primary(2)), &mut Memory::default()).await;
        let changed: Vec<String> = api.changes().into_iter().map(|change| change.what).collect();
        assert_eq!(changed.first().map(String::as_str), Some("cachepolicies/shop"), "before anybody writes: {changed:?}");
        assert_eq!(finalizers(&api), Some(json!([FINALIZER])));
        let relay = binding(&serde_json::from_value(shop(&Value::Null)).unwrap());
        let [map, secret] = ["configmaps", "secrets"].map(|kind| api.last(&format!("{kind}/{}", relay.object_name())).unwrap());
        let snapshot = Snapshot::parse(map["data"]["snapshot.json"].as_str().unwrap().as_bytes()).unwrap();
        assert!(snapshot.writes_to_disk && snapshot.requires == 5);
        assert_eq!(journals_of(&snapshot).into_keys().map(String::from).collect::<Vec<_>>(), ["store.shop.db"]);
        assert_eq!(secret["metadata"]["ownerReferences"][0]["kind"], "CachePolicy");
        let deployment = api.last(&format!("deployments/{}", relay_name())).unwrap();
        let volumes = &deployment["spec"]["template"]["spec"]["volumes"];
        assert_eq!(volumes[1]["secret"]["secretName"], *relay.object_name());
        for kind in ["networkpolicies", "poddisruptionbudgets"] {
            assert!(api.last(&format!("{kind}/{}", relay_name())).is_some(), "{changed:?}");
        }
        // Each of the sixteen partitions holds two.
        assert_eq!(carried(&api), Some((json!("InTime"), json!(32))));
        let workloads_told = api.last("cachepolicies/shop/status").unwrap()["status"]["workloads"]["matched"].clone();
        assert_eq!(workloads_told, workloads.len(), "the relay is none");
        assert!(next <= Duration::from_secs(10));
    }
}

/// The same, of which a rule follows a table instead of writing behind.
fn following(mut shop: Value) -> Value {
    let rule = &mut shop["spec"]["rules"][0];
    rule["strategy"] = json!("ReadThrough");
    rule["invalidate"] = json!({"changes": [{"table": "users", "all": true}]});
    rule["origin"] = json!({"name": "db", "read": "SELECT name FROM users WHERE id = $id"});
    shop
}

/// What the relay of the policy was given last.
fn given(api: &FakeApi) -> Snapshot {
    let relay = binding(&serde_json::from_value(shop(&Value::Null)).unwrap());
    let map = api.last(&format!("configmaps/{}", relay.object_name())).unwrap();
    Snapshot::parse(map["data"]["snapshot.json"].as_str().unwrap().as_bytes()).unwrap()
}

fn followed(api: &FakeApi) -> (Value, Value) {
    let status = api.last("cachepolicies/shop/status").unwrap()["status"].clone();
    let condition = status["conditions"].as_array().unwrap().iter().find(|condition| condition["type"] == "Followed");
    (condition.map(|condition| condition["reason"].clone()).unwrap_or_default(), status["changes"].clone())
}

#[tokio::test]
async fn a_policy_that_follows_tables_has_a_relay_and_tells_how_far_behind_it_is() {
    let reads = View { reader: Some("r".to_owned()), behind_ms: Some(47_000), ..View::default() };
    let objects = || vec![("cachepolicies", following(shop(&Value::Null))), cluster(), workload_of_the_policy()];
    let (api, next) = look(objects(), Some(primary_with(0, &reads)), &mut Memory::default()).await;
    let changed: Vec<String> = api.changes().into_iter().map(|change| change.what).collect();
    assert_eq!((changed.first().map(String::as_str), finalizers(&api)), (Some("cachepolicies/shop"), Some(json!([FINALIZER]))));
    assert!(api.last(&format!("deployments/{}", relay_name())).is_some() && next <= Duration::from_secs(10));
    let feeds = given(&api).feeds;
    let [feed] = &feeds[..] else { panic!("{feeds:?}") };
    assert_eq!((feed.policy.as_deref(), feed.follows.len(), carried(&api)), (Some("shop"), 1, None));
    let (reason, changes) = followed(&api);
    let expected = json!([{"origin": "db", "slot": feed.slot, "reading": true, "lagSeconds": 40, "keptMebibytes": 0}]);
    assert_eq!((reason, changes), (json!("Late"), expected));
    let (api, _) = look(objects(), Some(primary(0)), &mut Memory::default()).await;
    assert_eq!(followed(&api).0, "Beginning");
    let nobody = "127.0.0.1:1".parse().unwrap();
    let (api, _) = look(objects(), Some(nobody), &mut Memory::default()).await;
    assert_eq!(followed(&api).0, "Unknown");
}

#[tokio::test]
async fn a_policy_that_follows_tables_goes_once_its_slot_is_taken_away() {
    let objects = |annotations: &Value| vec![("cachepolicies", following(leaving(annotations))), cluster()];
    let mut memory = Memory::default();
    let (api, next) = look(objects(&json!({})), Some(primary(0)), &mut memory).await;
    let snapshot = given(&api);
    assert_eq!((snapshot.feeds.len(), snapshot.feeds[0].follows.len()), (1, 0), "its relay takes the slot away");
    assert_eq!((finalizers(&api), followed(&api).0), (None, json!("Leaving")));
    assert!(api.last(&format!("deployments/{}", relay_name())).is_some() && next <= Duration::from_secs(2));
    let message = api.last("cachepolicies/shop/status").unwrap()["status"]["conditions"][3]["message"].clone();
    assert!(message.as_str().unwrap().contains("pg_drop_replication_slot('larder_main_db_"), "{message}");
    let away = primary_with(0, &View { trouble: Some("away".to_owned()), ..View::default() });
    let (api, _) = look(objects(&json!({})), Some(away), &mut Memory::default()).await;
    assert_eq!(finalizers(&api), None);
    // A person may not want to wait for a database that is gone, and nothing waits for a cache that is.
    let (api, _) = look(objects(&json!({ABANDON_ANNOTATION: "true"})), Some(primary(0)), &mut Memory::default()).await;
    assert_eq!(finalizers(&api), Some(Value::Null));
    let gone = vec![("cachepolicies", following(leaving(&json!({}))))];
    assert_eq!(finalizers(&look(gone, None, &mut Memory::default()).await.0), Some(Value::Null));

    let removed = primary_with(0, &View { is_removed: true, ..View::default() });
    let (api, _) = look(objects(&json!({})), Some(removed), &mut Memory::default()).await;
    assert_eq!(finalizers(&api), Some(Value::Null));
    let deleted = api.changes().into_iter().find(|change| change.method == axum::http::Method::DELETE).unwrap();
    assert_eq!(deleted.what, format!("deployments/{}", relay_name()));
}

#[tokio::test]
async fn a_slot_that_rules_follow_no_more_is_taken_away_before_the_relay_goes() {
    let objects = vec![("cachepolicies", following(shop(&Value::Null))), cluster()];
    let (first, _) = look(objects, Some(primary(0)), &mut Memory::default()).await;
    // The relay has been told that nobody follows any more.
    let relay = binding(&serde_json::from_value(shop(&Value::Null)).unwrap());
    let [mut map, mut secret] =
        ["configmaps", "secrets"].map(|kind| first.last(&format!("{kind}/{}", relay.object_name())).unwrap());
    let mut told = given(&first);
    told.feeds[0].follows.clear();
    map["data"]["snapshot.json"] = json!(serde_json::to_string(&told).unwrap());
    for object in [&mut map, &mut secret] {
        (object["metadata"]["uid"], object["metadata"]["resourceVersion"]) = (json!("5"), json!("1"));
    }
    let mut plain = following(shop(&json!({"finalizers": [FINALIZER], "generation": 2})));
    plain["spec"]["rules"][0].as_object_mut().unwrap().remove("invalidate");
    let objects = || vec![("cachepolicies", plain.clone()), cluster(), ("configmaps", map.clone()), ("secrets", secret.clone())];
    let mut memory = Memory::default();
    let (api, next) = look(objects(), Some(primary(0)), &mut memory).await;
    assert_eq!((finalizers(&api), followed(&api).0), (None, json!("InTime")));
    assert!(api.last(&format!("configmaps/{}", relay.object_name())).is_none() && next <= Duration::from_secs(2));
    let removed = View { is_removed: true, ..View::default() };
    let (api, _) = look(objects(), Some(primary_with(0, &removed)), &mut memory).await;
    assert_eq!(finalizers(&api), Some(Value::Null));
}

/// The same, of which a rule loads by two connections for all sidecars.
fn loading(metadata: &Value) -> Value {
    let mut shop = following(shop(metadata));
    shop["spec"]["rules"][0].as_object_mut().unwrap().remove("invalidate");
    shop["spec"]["origins"][0]["sql"]["maxTotalConnections"] = json!(2);
    shop
}

/// The policy, and so many pods of its workload that mount its binding.
fn crowd(policy: Value, count: usize) -> Vec<(&'static str, Value)> {
    let pod = |number: usize| {
        let labels = json!({"app": "shop", "larder.dev/binding": BindingName::of("Deployment", "shop", "main").as_str()});
        let name = format!("shop-{number}");
        let metadata = json!({"name": name, "namespace": "store", "uid": name, "resourceVersion": "1", "labels": labels});
        ("pods", json!({"metadata": metadata, "spec": {"containers": []}, "status": {"phase": "Running"}}))
    };
    let fixed = [("cachepolicies", policy), cluster(), workload_of_the_policy()];
    fixed.into_iter().chain((0..count).map(pod)).collect()
}

/// The queue of the origin in what sidecars were given last.
fn queue_of_sidecars(api: &FakeApi) -> Option<String> {
    let map = api.last(&format!("configmaps/{}", BindingName::of("Deployment", "shop", "main").object_name())).unwrap();
    let snapshot = Snapshot::parse(map["data"]["snapshot.json"].as_str().unwrap().as_bytes()).unwrap();
    snapshot.origins[0].load_queue.clone().map(String::from)
}

#[tokio::test]
async fn sidecars_that_outnumber_connections_have_a_relay_and_load_by_it_once_it_is_there() {
    let (api, _) = look(crowd(loading(&Value::Null), 2), Some(primary(0)), &mut Memory::default()).await;
    assert_eq!((api.last(&format!("deployments/{}", relay_name())), finalizers(&api)), (None, None), "they have one each");
    assert_eq!(queue_of_sidecars(&api), None);
    let (api, next) = look(crowd(loading(&Value::Null), 3), Some(primary(0)), &mut Memory::default()).await;
    assert_eq!(finalizers(&api), Some(json!([FINALIZER])));
    assert!(api.last(&format!("deployments/{}", relay_name())).is_some() && next <= Duration::from_secs(2));
    let given = given(&api);
    assert_eq!((given.origins[0].load_queue.as_ref().map(JournalName::as_str), given.requires), (Some("store.shop.db"), 8));
    assert_eq!((queue_of_sidecars(&api), carried(&api)), (None, None), "nobody tends it yet");
    // It is seen to tend the queue, and remembered.
    let tended = || primary_with(0, &View { reader: Some("r".to_owned()), ..View::default() });
    let mut memory = Memory::default();
    let held = loading(&json!({"finalizers": [FINALIZER]}));
    let (_, next) = look(crowd(held.clone(), 3), Some(tended()), &mut memory).await;
    assert!(next > Duration::from_secs(2), "nothing is waited for");
    let mut minded = Minded::default();
    minded.tended.insert("store.shop.db".parse().unwrap());
    let (api, _) = look(crowd(held.clone(), 3), Some(primary(0)), &mut Memory::with_relay("shop", minded)).await;
    assert_eq!(queue_of_sidecars(&api).as_deref(), Some("store.shop.db"));
    // It stays until they are half as many as there may be connections, and then goes without a word.
    let (api, _) = look(crowd(held.clone(), 2), Some(tended()), &mut Memory::default()).await;
    assert_eq!(finalizers(&api), None);
    let (api, _) = look(crowd(held, 1), Some(tended()), &mut Memory::default()).await;
    assert_eq!((finalizers(&api), queue_of_sidecars(&api)), (Some(Value::Null), None));
}

#[tokio::test]
async fn a_relay_that_stands_is_not_written_again() {
    let mut memory = Memory::default();
    let held = shop(&json!({"finalizers": [FINALIZER]}));
    let (first, _) = look(vec![("cachepolicies", held.clone()), cluster()], Some(primary(0)), &mut memory).await;
    let relay = binding(&serde_json::from_value(held.clone()).unwrap());
    let mut objects = vec![("cachepolicies", held), cluster()];
    for (kind, name) in [("configmaps", relay.object_name()), ("secrets", relay.object_name()), ("deployments", relay_name())] {
        let mut object = first.last(&format!("{kind}/{name}")).unwrap();
        object["metadata"]["uid"] = json!(name);
        object["metadata"]["resourceVersion"] = json!("1");
        objects.push((kind, object));
    }
    let (second, _) = look(objects, Some(primary(0)), &mut memory).await;
    let changed: Vec<String> = second.changes().into_iter().map(|change| change.what).collect();
    assert_eq!(changed.iter().filter(|what| !what.ends_with("/status")).collect::<Vec<_>>(), Vec::<&String>::new());
}

#[tokio::test]
async fn a_deletion_waits_and_says_how_much_is_left() {
    let mut memory = Memory::default();
    let objects = || vec![("cachepolicies", leaving(&json!({}))), cluster(), workload_of_the_policy()];
    let (api, next) = look(objects(), Some(primary(3)), &mut memory).await;
    assert_eq!((finalizers(&api), carried(&api)), (None, Some((json!("Draining"), json!(48)))));
    assert!(api.last(&format!("deployments/{}", relay_name())).is_some(), "it goes on being drained");
    assert!(next <= Duration::from_secs(2));
    let message = api.last("cachepolicies/shop/status").unwrap()["status"]["conditions"][3]["message"].clone();
    assert!(message.as_str().unwrap().contains("48 writes and 0 dead letters are left"), "{message}");
    // Where nobody knows what is left, it waits as well.
    let (api, _) = look(objects(), None, &mut Memory::default()).await;
    assert_eq!(finalizers(&api), None);

    // It is empty, and nobody has written for a while.
    let journal: JournalName = "store.shop.db".parse().unwrap();
    let seen = BTreeMap::from([(journal, Sighting { is_written: false, level: Some(Level::default()) })]);
    let mut minded = Minded::default();
    minded.kept.note(&seen, Instant::now().checked_sub(kept::QUIET).unwrap());
    let mut memory = Memory::with_relay("shop", minded);
    let (api, _) = look(objects(), Some(primary(0)), &mut memory).await;
    assert_eq!(finalizers(&api), Some(Value::Null));
    let deleted = api.changes().into_iter().find(|change| change.method == axum::http::Method::DELETE).unwrap();
    assert_eq!(deleted.what, format!("deployments/{}", relay_name()));
}

#[tokio::test]
async fn what_is_left_is_given_up_by_a_person_or_with_its_cache() {
    let abandoned = leaving(&json!({ABANDON_ANNOTATION: "true"}));
    let (api, _) = look(vec![("cachepolicies", abandoned), cluster()], Some(primary(3)), &mut Memory::default()).await;
    assert_eq!(finalizers(&api), Some(Value::Null));
    let (api, _) = look(vec![("cachepolicies", leaving(&json!({})))], None, &mut Memory::default()).await;
    assert_eq!(finalizers(&api), Some(Value::Null), "a namespace that ends must come to its end");
    // Not that of a policy which stays.
    let stays = shop(&json!({"finalizers": [FINALIZER], "annotations": {ABANDON_ANNOTATION: "true"}}));
    let (api, _) = look(vec![("cachepolicies", stays), cluster()], Some(primary(3)), &mut Memory::default()).await;
    assert_eq!(finalizers(&api), None);
}
