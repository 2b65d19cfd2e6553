//! Keys that lack a TTL because somebody wrote them past the sidecar are given one by the sweep, on every shard.

use std::time::Duration;

use serde_json::json;

use super::support::server::{Engine, RedisCluster};
use super::support::sidecar::{Sidecar, cluster_topology};
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

fn slot_of(key: &str) -> u16 {
    larder::sidecar::slots::slot_of(key.as_bytes())
}
