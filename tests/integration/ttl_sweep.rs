//! Keys that lack a TTL because somebody wrote them past the sidecar are given one by the sweep, on every shard.

use std::time::Duration;

use serde_json::json;

use super::support::resp::Value;
use super::support::server::{Engine, RedisCluster, SentinelCluster};
use super::support::sidecar::{Sidecar, cluster_topology, sentinel_topology};
use super::support::wait_for;

#[test]
fn keys_written_past_the_sidecar_get_a_ttl_and_no_others() {
    let servers = RedisCluster::start(Engine::Redis7, 3, 0);
    let covered: Vec<String> = (0..300).map(|number| format!("covered:{number}")).collect();
    for (key, owner) in covered.iter().chain([&"other".to_owned()]).map(|key| (key, servers.owner(slot_of(key)))) {
        owner.client().call(&["SET", key, "v"]);
    }
    let rule = json!({"name": "covered", "keys": "covered:{number}",
        "strategy": {"cacheAside": {"ttl": {"default": "5m", "max": "1h", "jitter": "10%"}}}});
    let mut snapshot = json!({"version": 1, "requires": 1, "generation": 1, "cluster": cluster_topology(&servers),
        "unmatched": {"bypass": {}}, "ttlSweep": "10m", "rules": [rule]});
    let sidecars = [Sidecar::start(&snapshot), Sidecar::start(&snapshot)];
    let mut client = sidecars[0].client();
    // A shorter period counts at once, and not only after the long one.
    (snapshot["ttlSweep"], snapshot["generation"]) = (json!("2s"), json!(2));
    sidecars.iter().for_each(|sidecar| sidecar.replace_snapshot(&snapshot.to_string()));
    wait_for("every covered key has a TTL", Duration::from_secs(30), || {
        covered.iter().all(|key| client.call(&["PTTL", key]).int() > 0)
    });
    let bound = 5 * 60 * 1000;
    assert!(covered.iter().all(|key| client.call(&["PTTL", key]).int() <= bound));
    assert_eq!(client.call(&["PTTL", "other"]).int(), -1);
}

/// Each binding sweeps by its own rules: that another does, or an unbound sidecar, is no reason to wait for long.
#[test]
fn each_binding_has_a_sweep_of_its_own() {
    let servers = SentinelCluster::start(Engine::Valkey9, 0);
    let mut server = servers.primary().client();
    let sidecar = |name: &str| {
        let rule = json!({"name": "covered", "keys": format!("{name}:{{number}}"),
            "strategy": {"cacheAside": {"ttl": {"default": "5m", "max": "1h", "jitter": "10%"}}}});
        let snapshot = json!({"version": 1, "requires": 1, "generation": 1, "cluster": sentinel_topology(&servers),
            "unmatched": {"bypass": {}}, "ttlSweep": "2s", "rules": [rule]});
        Sidecar::start_with(&snapshot, &["--binding", name])
    };
    // One of the first binding's sidecars, that is gone, holds its lease for good; and somebody was killed in its turn.
    for (key, end) in [("larder:sweep", &[][..]), ("larder:sweep:one", &[]), ("larder:sweeps", &["PX", "3000"])] {
        assert_eq!(server.call(&[&["SET", key, "1"], end].concat()), Value::Simple("OK".to_owned()));
    }
    for name in ["one", "two"] {
        (0..50).for_each(|number| drop(server.call(&["SET", &format!("{name}:{number}"), "v"])));
    }
    let _sidecars = ["one", "two"].map(sidecar);
    let mut repaired = |name: &str| (0..50).all(|number| server.call(&["PTTL", &format!("{name}:{number}")]).int() > 0);
    wait_for("the second's keys", Duration::from_secs(60), || repaired("two"));
    assert!(!repaired("one"), "nobody of theirs may sweep");
    servers.primary().client().line("DEL larder:sweep:one").int();
    wait_for("the first's keys", Duration::from_secs(60), || repaired("one"));
}

fn slot_of(key: &str) -> u16 {
    larder::sidecar::slots::slot_of(key.as_bytes())
}
