//! The cache of examples/cache-aside, as teams write it: its faults against a bare server, and without them through a sidecar.

use std::path::Path;
use std::process::Command;

use serde_json::{Value as Json, json};

use super::rule;
use crate::read_through::{Servers, policy};
use crate::support::server::{Engine, Redis};
use crate::support::sidecar::Sidecar;

/// What came of each fault.
fn run(port: u16) -> Json {
    let program = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/clients/python/cache_aside.py");
    let output = Command::new("python3").arg(program).arg(port.to_string()).output().expect("scripts/setup installs Python");
    let errors = String::from_utf8_lossy(&output.stderr);
    serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{error}: {errors}"))
}

fn user() -> Json {
    rule("user", json!({"lease": "15s", "wait": "10s"}), json!({}))
}

#[test]
fn a_bare_server_shows_each_fault() {
    let server = Redis::start(Engine::Redis7);
    let found = run(server.port());
    assert!(found["loads"].as_u64() > Some(10), "{found}");
    assert_eq!((&found["ttl"], &found["late"], &found["pattern"]), (&json!(-1), &json!("old"), &json!(1)), "{found}");
}

#[test]
fn the_same_code_has_none_of_them_behind_a_sidecar() {
    for servers in [Servers::sentinel(), Servers::cluster()] {
        let found = run(servers.sidecar(&[], &[user()]).port());
        assert_eq!((&found["loads"], &found["late"]), (&json!(1), &Json::Null), "{found}");
        assert!(found["ttl"].as_i64() > Some(0), "{found}");
        let refused = found["pattern"].as_str().unwrap_or_default();
        assert!(refused.contains("KEYS touches every key") && refused.contains("set allow.keys in the CachePolicy"), "{found}");
    }
}

#[test]
fn a_policy_may_allow_keys() {
    let servers = Servers::sentinel();
    let mut policy = policy(servers.topology(), 1, &[], &[user()]);
    policy["allow"] = json!({"flush": false, "keys": true});
    assert_eq!(run(Sidecar::start(&policy).port())["pattern"], json!(1));
}
