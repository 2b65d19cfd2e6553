//! A primary that is cut off from its replicas stops acknowledging writes, by the settings that the operator renders.

use std::time::Duration;

use serde_json::{Value as Json, json};

use larder::api::CacheCluster;
use larder::operator::admin::Login;
use larder::operator::cache_cluster::objects::{Addresses, Credentials, Installation, Kept, objects};
use larder::operator::cache_cluster::users::{Access, Users};
use larder::operator::cache_cluster::validate::validate;

use super::tier::{Member, Tier, signal};
use crate::support::resp::{Client, Value};
use crate::support::server::Engine;

const MAX_LAG_SECS: u64 = 2;

/// The settings that the operator gives the agents of a tier of this specification.
fn rendered(writes: Json, replicas: usize) -> Json {
    let mut cluster: CacheCluster = serde_json::from_value(json!({
        "apiVersion": "larder.dev/v1alpha1",
        "kind": "CacheCluster",
        "metadata": {"name": "shop", "namespace": "store", "uid": "u", "generation": 1},
        "spec": {"engine": {"kind": "Valkey", "version": "8.1"}, "mode": "Sentinel", "memory": "64Mi", "replicas": replicas},
    }))
    .expect("a CacheCluster");
    cluster.spec.writes = serde_json::from_value(writes).expect("spec.writes");
    let wanted = validate(&cluster).expect("it can be carried out");
    let addresses = Addresses {
        servers: wanted.servers().map(|id| (id, [10, 96, 0, id.index as u8].into())).collect(),
        sentinels: wanted.sentinel_ids().map(|id| (id, [10, 96, 1, id.0 as u8].into())).collect(),
    };
    let system = Login { user: "larder-system".to_owned(), password: "p".to_owned() };
    let users = Users::next(None, &Access::Open, &system.password, None, std::time::SystemTime::UNIX_EPOCH);
    let installation = Installation {
        larder_image: "larder:1".to_owned(),
        image_pull_policy: None,
        operator_namespace: "larder-system".to_owned(),
    };
    let made =
        objects(&wanted, &installation, &addresses, &Credentials { system, users, client: None, pki: None }, &Kept::default());
    let data = made.config_maps[0].data.as_ref().expect("entries");
    let config: Json = serde_json::from_str(&data["agent-0.json"]).expect("JSON");
    assert!(config["settings"]["min-replicas-to-write"].is_string(), "{config}");
    json!({"settings": config["settings"]})
}

/// Servers that stand still, until this is dropped.
struct Frozen(Vec<u32>);

impl Frozen {
    fn freeze(members: &[Member]) -> Self {
        let pid = |member: &Member| {
            let info = member.client().line("INFO server").text();
            let pid = info.lines().find_map(|line| line.strip_prefix("process_id:")).expect("a process id");
            pid.trim().parse().expect("a number")
        };
        let frozen = Self(members.iter().map(pid).collect());
        frozen.0.iter().for_each(|pid| signal("STOP", *pid));
        frozen
    }
}

impl Drop for Frozen {
    fn drop(&mut self) {
        self.0.iter().for_each(|pid| signal("CONT", *pid));
    }
}

/// The server's own clock.
fn now(client: &mut Client) -> Duration {
    let parts: Vec<u64> = client.line("TIME").items().iter().map(|part| part.text().parse().expect("a number")).collect();
    Duration::from_secs(parts[0]) + Duration::from_micros(parts[1])
}

/// Whether a write is acknowledged; otherwise it is refused because replicas lack.
fn is_acknowledged(client: &mut Client) -> bool {
    match client.line("INCR written") {
        Value::Int(_) => true,
        Value::Error(text) if text.starts_with("NOREPLICAS") => false,
        other => panic!("{other:?}"),
    }
}

fn form(engine: Engine, replicas: usize, writes: Json) -> Tier {
    let tier = Tier::start_with(engine, replicas + 1, false, rendered(writes, replicas), &[]);
    tier.introduce();
    let generation = tier.generation();
    let proved = |member: &Member| member.state()["proved"]["settings"] == json!(generation);
    tier.wait("the settings to be proved", || tier.members.iter().all(proved));
    tier
}

/// Freezes so many replicas, the first ones, of those that a write needs.
fn check_cut_off(engine: Engine, replicas: usize, min_replicas: usize, frozen: usize) {
    let tier = form(engine, replicas, json!({"minReplicas": min_replicas, "maxLag": format!("{MAX_LAG_SECS}s")}));
    let mut client = tier.members[0].client();
    tier.wait("writes to be acknowledged", || is_acknowledged(&mut client));
    let still = Frozen::freeze(&tier.members[1..=frozen]);
    let start = now(&mut client);
    // The server counts whole seconds, and looks once a second.
    let bound = Duration::from_secs(MAX_LAG_SECS + 2);
    let (mut last, mut count) = (start, 0);
    tier.wait("the bound to pass by twice", || {
        if is_acknowledged(&mut client) {
            (last, count) = (now(&mut client), count + 1);
        }
        now(&mut client) > start + 2 * bound
    });
    println!(
        "{engine:?}, {min_replicas} of {replicas} needed, {frozen} frozen: {count} acknowledged, the last after {:?}",
        last - start
    );
    if replicas - frozen < min_replicas {
        assert!(last <= start + bound, "{engine:?}: a write was acknowledged {:?} after the replicas froze", last - start);
        assert!(!is_acknowledged(&mut client));
    } else {
        assert!(last > start + bound, "{engine:?}: enough replicas follow, and yet writes are refused");
    }
    drop(still);
    tier.wait("writes to be acknowledged again", || is_acknowledged(&mut client));
}

#[test]
fn a_primary_without_its_only_replica_acknowledges_nothing() {
    for engine in Engine::ALL {
        check_cut_off(engine, 1, 1, 1);
    }
}

#[test]
fn a_primary_acknowledges_only_what_enough_replicas_hear() {
    check_cut_off(Engine::Redis7, 2, 2, 1);
    check_cut_off(Engine::Valkey9, 2, 1, 2);
    check_cut_off(Engine::Valkey9, 2, 1, 1);
}

/// Without `spec.writes` a primary goes on alone: frozen replicas, or none at all, wedge nothing.
#[test]
fn a_primary_that_is_to_go_on_alone_does() {
    let mut tier = form(Engine::Redis7, 1, Json::Null);
    let mut client = tier.members[0].client();
    let still = Frozen::freeze(&tier.members[1..]);
    let start = now(&mut client);
    tier.wait("the default lag to pass by", || {
        assert!(is_acknowledged(&mut client));
        now(&mut client) > start + Duration::from_secs(12)
    });
    drop(still);
    tier.members[1].kill_agent();
    tier.wait("the replica to be gone", || client.line("INFO replication").text().contains("connected_slaves:0"));
    assert!(is_acknowledged(&mut client));
}
