//! Django's own tests of its Redis backend, unmodified, through a sidecar: docs/django.md.

use std::path::Path;
use std::process::Command;

use larder::api::{CacheCluster, CachePolicy, Reach, SecretKeyRef, compile};
use larder::policy::Span;
use larder::policy::snapshot::Sensitive;
use serde_json::{Value as Json, json};

use super::{bulk, ok};
use crate::read_through::Servers;
use crate::support::admin::rule_count;
use crate::support::program::output_of;
use crate::support::resp::Value;
use crate::support::server::{Engine, Redis};
use crate::support::sidecar::Sidecar;

/// How many there are of Django 5.2, and those that are skipped for every Redis: it evicts by itself.
const RUN: usize = 59;
const SKIPPED: [&str; 3] = ["test_cull", "test_cull_delete_when_store_empty", "test_zero_cull"];
/// Those that read a key that nobody stores, through two cache objects with a connection each. The second waits for what the first
/// is told to load, until the end of its wait, which is an error by default.
const ABSENT_READ_TWICE: [&str; 3] =
    ["test_cache_versioning_get_set", "test_cache_versioning_get_set_many", "test_custom_key_func"];

/// The snapshot of one CacheAside rule for all keys, which says nothing of `stampede` but what is given. Django's `clear` is FLUSHDB,
/// and it may store for ever.
fn snapshot(servers: &Servers, stampede: &Json) -> Json {
    let cluster = json!({"engine": {"kind": "Redis", "version": "7.0"}, "mode": "Sentinel", "memory": "256Mi"});
    let policy = json!({
        "cacheCluster": "main", "workloads": {"matchLabels": {"app": "django"}},
        "allow": {"flush": true},
        "rules": [{"name": "all", "keys": "{key…}", "strategy": "CacheAside", "maxTtl": "8760h", "stampede": stampede}],
    });
    let cluster = CacheCluster::new("main", serde_json::from_value(cluster).expect("a CacheCluster"));
    let policy = CachePolicy::new("django", serde_json::from_value(policy).expect("a CachePolicy"));
    let topology = serde_json::from_value(servers.topology()["topology"].clone()).expect("a topology");
    let reach = Reach { topology, tls: None, auth: None, sentinel_auth: None, patience: Span::from_secs(2) };
    let none = |_: &str, _: &SecretKeyRef| -> Result<Sensitive, String> { Err("there are no Secrets".to_owned()) };
    serde_json::to_value(compile(&cluster, &[&policy], 1, reach, &none).expect("it compiles")).expect("a snapshot")
}

/// What comes of Django's tests: all run that can, and told is which of them failed, and the end of each one's message.
fn failed(port: u16, manner: &str) -> Vec<(String, String)> {
    let program = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/clients/django/run.py");
    let output = output_of(Command::new("python3").arg(program).args([&port.to_string(), manner]));
    let errors = String::from_utf8_lossy(&output.stderr);
    let found: Json = serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{error}: {errors}"));
    let names = |field: &str| found[field].as_object().expect("an object").keys().map(String::as_str).collect::<Vec<_>>();
    assert_eq!(found["ran"].as_array().map(Vec::len), Some(RUN), "{found}");
    assert_eq!(names("skipped"), SKIPPED, "{found}");
    let reasons = found["skipped"].as_object().expect("an object").values();
    reasons.for_each(|reason| assert_eq!(reason, "Culling isn't implemented.", "{found}"));
    let failed = found["failed"].as_object().expect("an object");
    failed.iter().map(|(name, why)| (name.clone(), why.to_string())).collect()
}

/// Which of them failed.
fn names(failed: &[(String, String)]) -> Vec<&str> {
    failed.iter().map(|(name, _)| name.as_str()).collect()
}

/// Of what was loaded under a lease everything has been stored.
#[track_caller]
fn stored_all(sidecar: &Sidecar) {
    let counters = ["leases", "ambiguous_fills", "late_fills"];
    let [leases, refused @ ..] = counters.map(|counter| rule_count(sidecar, "all", counter));
    assert!(leases >= 30 && refused == [0, 0], "{leases} leases, refused fills {refused:?}");
}

#[test]
fn against_a_bare_server_the_same_tests_run_and_are_skipped() {
    let server = Redis::start(Engine::Redis7);
    for manner in ["together", "prefixed"] {
        assert_eq!(failed(server.port(), manner), [], "{manner}");
    }
}

#[test]
fn where_a_rule_sees_to_ttls_alone_all_pass_in_one_process() {
    let servers = Servers::sentinel();
    let sidecar = Sidecar::start(&snapshot(&servers, &json!({"mode": "Disabled"})));
    assert_eq!(failed(sidecar.port(), "together"), []);
}

#[test]
fn under_leases_all_pass_that_read_no_absent_key_twice() {
    let servers = Servers::sentinel();
    let sidecar = Sidecar::start(&snapshot(&servers, &json!({})));
    let failed = failed(sidecar.port(), "prefixed");
    assert_eq!(names(&failed), ABSENT_READ_TWICE, "{failed:?}");
    assert!(failed.iter().all(|(_, why)| why.contains("TryAgainError: the key `")), "{failed:?}");
    stored_all(&sidecar);
}

#[test]
fn all_pass_where_misses_are_passed_on_at_the_end_of_the_wait() {
    let servers = Servers::sentinel();
    let sidecar = Sidecar::start(&snapshot(&servers, &json!({"atWaitEnd": "Miss"})));
    assert_eq!(failed(sidecar.port(), "prefixed"), []);
    stored_all(&sidecar);
}

/// What keeps Django's tests from passing while they share their keys: the one before has looked for a key that it does not store,
/// and has flushed it. What the next one stores may be what the first loaded, over another connection of its pool.
#[test]
fn what_was_looked_for_before_a_flush_is_missed_once_more_after_it() {
    let servers = Servers::sentinel();
    let sidecar = Sidecar::start(&snapshot(&servers, &json!({})));
    let mut first = sidecar.client();
    assert_eq!(first.line("GET k"), Value::Nil);
    assert_eq!(first.line("FLUSHDB"), ok());
    drop(first);
    let mut next = sidecar.client();
    assert_eq!([next.line("SET other v"), next.line("GET other")], [ok(), bulk("v")]);
    assert_eq!([next.line("SET k v"), next.line("GET k")], [ok(), Value::Nil]);
    assert_eq!(rule_count(&sidecar, "all", "late_fills"), 1);
    assert_eq!([next.line("SET k v"), next.line("GET k")], [ok(), bulk("v")]);
}
