//! Unmodified clients under a rule with leases. The cache of examples/cache-aside, as teams write it: its faults against a bare
//! server, and without them through a sidecar.

use std::path::Path;
use std::process::Command;

use serde_json::{Value as Json, json};

use super::rule;
use crate::read_through::{Servers, policy};
use crate::support::program::output_of;
use crate::support::server::{Engine, Redis};
use crate::support::sidecar::Sidecar;

/// What came of each fault.
fn run(port: u16) -> Json {
    python("cache_aside.py", port)
}

/// What a program of tests/clients/python prints.
fn python(program: &str, port: u16) -> Json {
    let program = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/clients/python").join(program);
    let output = output_of(Command::new("python3").arg(program).arg(port.to_string()));
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
    assert!(
        server.client().line("INFO commandstats").text().contains("cmdstat_keys:"),
        "its invalidation goes through every key"
    );
}

#[test]
fn the_same_code_has_none_of_them_behind_a_sidecar() {
    for servers in [Servers::sentinel(), Servers::cluster()] {
        let found = run(servers.sidecar(&[], &[user()]).port());
        assert_eq!((&found["loads"], &found["late"]), (&json!(1), &Json::Null), "{found}");
        assert!(found["ttl"].as_i64() > Some(0), "{found}");
        let refused = found["pattern"].as_str().unwrap_or_default();
        assert!(refused.contains("KEYS touches every key") && refused.contains("set allow.keys in the CachePolicy"), "{found}");
        assert!(!servers.holder_of("user:1").line("INFO commandstats").text().contains("cmdstat_keys:"));
    }
}

#[test]
fn the_example_with_tokens_loads_once_and_stores_nothing_outdated() {
    let cart = rule("cart", json!({"lease": "15s", "wait": "10s"}), json!({}));
    for servers in [Servers::sentinel(), Servers::cluster()] {
        let sidecar = servers.sidecar(&[], std::slice::from_ref(&cart));
        let found = python("larder_cache.py", sidecar.port());
        assert_eq!((&found["loads"], &found["late"], &found["uncovered"]), (&json!(1), &Json::Null, &json!("x")), "{found}");
        assert!(found["ttl"].as_i64() > Some(0), "{found}");
        // As a program it loads once, and finds what it stored.
        let program = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/clients/python/larder_cache.py");
        let url = format!("redis://127.0.0.1:{}", sidecar.port());
        let output = output_of(Command::new("python3").arg(program).env("REDIS_URL", url));
        let (out, errors) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        assert_eq!(out.matches("cart:7 = {'items': 3} (").count(), 2, "{out}{errors}");
        assert_eq!(servers.holder_of("cart:7").line("GET cart:7").text(), r#"{"items": 3}"#);
    }
}

#[test]
fn a_policy_may_allow_keys() {
    let servers = Servers::sentinel();
    let mut policy = policy(servers.topology(), 1, &[], &[user()]);
    policy["allow"] = json!({"flush": false, "keys": true});
    assert_eq!(run(Sidecar::start(&policy).port())["pattern"], json!(1));
}

/// Runs a client's program, in `tests/clients/DIRECTORY`, through a sidecar under a rule with leases.
#[track_caller]
fn is_ok(directory: &str, program: &str, arguments: &[&str]) {
    for servers in [Servers::sentinel(), Servers::cluster()] {
        let sidecar = servers.sidecar(&[], &[user()]);
        let mut command = Command::new(program);
        command.args(arguments).arg(sidecar.port().to_string());
        command.current_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/clients").join(directory));
        let output = output_of(&mut command);
        let (out, errors) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        assert!(output.status.success() && out.trim() == "ok", "{directory}: {out}{errors}");
    }
}

#[test]
fn ioredis_loads_once_on_one_connection() {
    is_ok("node", "node", &["cache_aside.js"]);
}

#[test]
fn go_redis_loads_once_with_a_pool() {
    is_ok("go", "go", &["run", "./cacheaside"]);
}
