//! Invalidation by events: written by anyone, carried out once for all sidecars, and through what happens to sidecars and servers.

use std::path::Path;
use std::process::{Command, Output};
use std::time::Duration;

use serde_json::{Value as Json, json};
use tempfile::TempDir;

use crate::cache_aside::{bulk, ok, rule, sidecars};
use crate::read_through::{Servers, policy};
use crate::support::admin::metric;
use crate::support::resp::{Client, Value, encode};
use crate::support::saboteur::Change;
use crate::support::server::{Engine, SentinelCluster};
use crate::support::sidecar::{Sidecar, sentinel_topology};
use crate::support::wait_for;

const LIMIT: Duration = Duration::from_secs(60);
const STREAM: &str = "larder:events";

/// `item:{id}` with leases and stale copies, and `plain:{id}` without either.
fn rules() -> [Json; 2] {
    let plain = json!({"name": "plain", "keys": "plain:{id}",
        "strategy": {"cacheAside": {"ttl": {"default": "1h", "max": "2h", "jitter": "10%"}}}});
    [rule("item", json!({}), json!({"stale": "1h"})), plain]
}

/// The same, whose keys share the tag `id:{id}`, and `cart:{user}:{shop}` with a tag for each part.
fn tagged() -> [Json; 3] {
    let [mut item, mut plain] = rules();
    item["tags"] = json!(["id:{id}"]);
    plain["tags"] = json!(["id:{id}", "plains"]);
    let mut cart = rule("cart", json!({}), json!({}));
    (cart["keys"], cart["tags"]) = (json!("cart:{user}:{shop}"), json!(["user:{user}", "shop:{shop}"]));
    [item, plain, cart]
}

/// Writes an event past Larder.
fn announce(servers: &Servers, kind: &str, what: &str) {
    let id = servers.holder_of(STREAM).call(&["XADD", STREAM, "*", kind, what]);
    assert!(matches!(id, Value::Bulk(_)), "{id:?}");
}

fn exists(servers: &Servers, key: &str) -> bool {
    servers.holder_of(key).call(&["EXISTS", key]) == Value::Int(1)
}

fn events(sidecars: &[Sidecar]) -> u64 {
    sidecars.iter().map(|sidecar| metric(sidecar, "larder_events_total")).sum()
}

#[track_caller]
fn wait_for_events(sidecars: &[Sidecar], count: u64) {
    wait_for("the events to be carried out", LIMIT, || events(sidecars) >= count);
}

#[track_caller]
fn wait_until_gone(servers: &Servers, key: &str) {
    wait_for("a key to go", LIMIT, || !exists(servers, key));
}

#[test]
fn an_event_does_what_the_command_does_under_sentinel() {
    check_keys(&Servers::sentinel());
}

#[test]
fn an_event_does_what_the_command_does_in_a_cluster() {
    check_keys(&Servers::cluster());
}

fn check_keys(servers: &Servers) {
    let sidecars = sidecars(servers, 3, &rules());
    let [mut one, mut two] = [0, 1].map(|index| sidecars[index].client());
    assert_eq!(one.line("SET item:1 v"), ok());
    announce(servers, "key", "item:1");
    wait_until_gone(servers, "item:1");
    // What was loaded before it is not stored.
    assert_eq!(one.line("GET item:2"), Value::Nil);
    let id = two.line("XADD larder:events MAXLEN ~ 1000 * key item:2 key plain:1");
    assert!(matches!(id, Value::Bulk(_)), "{id:?}");
    wait_for_events(&sidecars, 3);
    assert_eq!(one.line("SET item:2 late"), ok());
    assert!(!exists(servers, "item:2"), "a load that began before the event was stored");
    // Nor is its copy served.
    assert_eq!(one.line("SET item:3 old"), ok());
    servers.expire("item:3");
    announce(servers, "key", "item:3");
    wait_for_events(&sidecars, 4);
    assert_eq!(one.line("GET item:3"), Value::Nil);
    two.send(&encode(&["GET", "item:3"])).unwrap();
    assert_eq!(one.line("SET item:3 new"), ok());
    assert_eq!(two.read().unwrap(), bulk("new"));
    // One of them does it all.
    let reading: u64 = sidecars.iter().map(|sidecar| metric(sidecar, "larder_events_reading")).sum();
    assert_eq!((events(&sidecars), reading), (4, 1));
    assert!(sidecars.iter().all(|sidecar| metric(sidecar, "larder_event_gaps_total") == 0));
}

#[test]
fn a_tag_stands_for_keys_of_several_rules_under_sentinel() {
    check_tags(&Servers::sentinel());
}

#[test]
fn a_tag_stands_for_keys_of_several_rules_in_a_cluster() {
    check_tags(&Servers::cluster());
}

fn check_tags(servers: &Servers) {
    let sidecars = sidecars(servers, 2, &tagged());
    let [mut one, mut two] = [0, 1].map(|index| sidecars[index].client());
    let keys = ["item:7", "plain:7", "item:8", "plain:8", "cart:7:tea", "cart:7:milk", "cart:8:tea"];
    for key in keys {
        assert_eq!(one.call(&["SET", key, "v"]), ok());
    }
    let there = || keys.into_iter().filter(|key| exists(servers, key)).collect::<Vec<_>>();
    assert_eq!(one.line("GET cart:7:late"), Value::Nil, "a load begins");
    // What a tag names to the end goes without a walk.
    announce(servers, "tag", "id:7");
    wait_for_events(&sidecars, 2);
    assert_eq!(there(), ["item:8", "plain:8", "cart:7:tea", "cart:7:milk", "cart:8:tea"]);
    let walks = || sidecars.iter().map(|sidecar| metric(sidecar, "larder_invalidation_walks_total")).sum::<u64>();
    assert_eq!(walks(), 0);
    assert!(!two.line("XADD larder:events * tag user:7 tag nobody:7").is_error());
    wait_for("the walk to end", LIMIT, || walks() == 1);
    assert_eq!(there(), ["item:8", "plain:8", "cart:8:tea"]);
    assert_eq!(one.line("SET cart:7:late v"), ok());
    assert!(!exists(servers, "cart:7:late"), "a load that began before the event was stored");
    let foreign: u64 = sidecars.iter().map(|sidecar| metric(sidecar, "larder_events_foreign_total")).sum();
    assert_eq!((foreign, events(&sidecars)), (1, 3));
}

#[test]
fn a_person_invalidates_a_tag() {
    let (servers, directory) = (Servers::sentinel(), TempDir::new().unwrap());
    let socket = directory.path().join("admin.sock").display().to_string();
    let sidecar = Sidecar::start_with(&policy(servers.topology(), 1, &[], &tagged()), &["--admin-socket", &socket]);
    let mut client = sidecar.client();
    for key in ["item:7", "plain:7", "plain:8", "cart:7:tea", "cart:8:tea"] {
        assert_eq!(client.call(&["SET", key, "v"]), ok());
    }
    let invalidate = |arguments: &[&str]| larder(&[&["invalidate", "--socket", &socket], arguments].concat());
    assert_eq!(said(&invalidate(&["--tag", "user:7", "--dry-run"])), "the keys of the tag `user:7`: 1 would go\n");
    assert_eq!(said(&invalidate(&["--tag", "id:7", "--wait"])), "the keys of the tag `id:7`: invalidated\n");
    assert!(!exists(&servers, "item:7") && !exists(&servers, "plain:7"));
    let walked = said(&invalidate(&["--tag", "shop:tea", "--wait"]));
    assert_eq!(walked, "the keys of the tag `shop:tea`: invalidated; 2 had something in the cache\n");
    assert!(exists(&servers, "plain:8"));
    let output = invalidate(&["--tag", "nobody"]);
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(
        output.status.code() == Some(2) && error.contains("write one of id:{id}, plains, shop:{shop}, user:{user}"),
        "{error}"
    );
}

#[test]
fn what_is_not_understood_is_said_and_holds_up_nothing() {
    let servers = Servers::sentinel();
    let sidecars = sidecars(&servers, 1, &rules());
    let mut client = sidecars[0].client();
    let long_tag = format!("XADD larder:events * tag {}", "a".repeat(1025));
    for (command, words) in [
        (long_tag.as_str(), "ERR no key has such a tag"),
        ("XADD larder:events * user 7", "`user` is no kind of event"),
        ("XADD larder:events * key larder:l:{abc}item:1", "Larder's own"),
        ("XADD larder:other * key item:1", "NOPERM"),
        ("DEL larder:events", "NOPERM"),
        ("XRANGE larder:events - +", "NOPERM"),
    ] {
        let reply = client.line(command);
        assert!(matches!(&reply, Value::Error(text) if text.contains(words)), "{command}: {reply:?}");
    }
    assert_eq!(client.line("SET item:1 v"), ok());
    for (kind, what) in [("tag", ""), ("nonsense", "x"), ("pattern", "item:*"), ("rule", "foreign"), ("key", "item:1")] {
        announce(&servers, kind, what);
    }
    wait_for_events(&sidecars, 1);
    assert!(!exists(&servers, "item:1"));
    let count = |name: &str| metric(&sidecars[0], &format!("larder_events_{name}_total"));
    assert_eq!((count("refused"), count("foreign"), events(&sidecars)), (3, 1, 1));
    let log = sidecars[0].log();
    assert!(log.contains("is not understood") && log.contains("no key has such a tag"), "{log}");
}

#[test]
fn events_wait_for_a_sidecar_and_are_passed_once() {
    let servers = Servers::cluster();
    let mut running = sidecars(&servers, 1, &rules());
    let mut client = running[0].client();
    for key in ["item:1", "item:2"] {
        assert_eq!(client.call(&["SET", key, "v"]), ok());
    }
    announce(&servers, "key", "item:1");
    wait_until_gone(&servers, "item:1");
    wait_for("it to be written down", LIMIT, || {
        let state = servers.holder_of(STREAM).line("HGET larder:es:{larder:events} position");
        matches!(state, Value::Bulk(text) if text.ends_with(b" 1"))
    });
    running.clear();
    announce(&servers, "key", "item:2");
    let sidecars = sidecars(&servers, 1, &rules());
    wait_until_gone(&servers, "item:2");
    wait_for_events(&sidecars, 1);
    assert_eq!(events(&sidecars), 1, "the first was passed before");
    assert_eq!(metric(&sidecars[0], "larder_event_gaps_total"), 0);
}

#[test]
fn what_leases_keep_right_goes_where_events_were_lost() {
    let servers = Servers::sentinel();
    let mut running = sidecars(&servers, 1, &rules());
    let mut client = running[0].client();
    for key in ["item:1", "item:2", "plain:1", "free:1"] {
        assert_eq!(client.call(&["SET", key, "v"]), ok());
    }
    announce(&servers, "key", "item:9");
    wait_for_events(&running, 1);
    running.clear();
    for _ in 0..3 {
        announce(&servers, "key", "item:1");
    }
    assert_eq!(servers.holder_of(STREAM).line("XTRIM larder:events MAXLEN 1"), Value::Int(3));
    let sidecars = sidecars(&servers, 1, &rules());
    wait_until_gone(&servers, "item:2");
    wait_for("the walk to end", LIMIT, || metric(&sidecars[0], "larder_invalidation_walks_total") == 1);
    assert!(exists(&servers, "plain:1") && exists(&servers, "free:1"));
    assert_eq!(metric(&sidecars[0], "larder_event_gaps_total"), 1);
    // So it is where the stream itself is gone.
    assert_eq!(sidecars[0].client().line("SET item:3 v"), ok());
    assert_eq!(servers.holder_of(STREAM).line("DEL larder:events"), Value::Int(1));
    wait_until_gone(&servers, "item:3");
    announce(&servers, "key", "plain:1");
    wait_until_gone(&servers, "plain:1");
}

#[test]
fn events_go_on_at_the_next_primary() {
    for engine in [Engine::Redis7, Engine::Valkey9] {
        let mut cluster = SentinelCluster::start(engine, 1);
        let sidecar = Sidecar::start(&policy(sentinel_topology(&cluster), 1, &[], &rules()));
        let mut client = sidecar.client();
        assert_eq!(client.line("SET item:1 v"), ok());
        assert!(!client.line("XADD larder:events * key item:1").is_error());
        wait_for("the first event", LIMIT, || metric(&sidecar, "larder_events_total") == 1);
        cluster.servers[0].kill();
        wait_for("the failover", LIMIT, || client.line("SET item:2 v") == ok());
        wait_for("an event to be taken", LIMIT, || !client.line("XADD larder:events * key item:2").is_error());
        let mut primary = cluster.servers[1].client();
        wait_for("the second event", LIMIT, || primary.line("EXISTS item:2") == Value::Int(0));
        // It is counted once replicas have had their time to confirm it.
        wait_for("it to be counted", LIMIT, || metric(&sidecar, "larder_events_total") >= 2);
    }
}

fn larder(arguments: &[&str]) -> Output {
    let program = Path::new(env!("CARGO_BIN_EXE_larder"));
    Command::new(program).args(arguments).env("TMPDIR", "/nonexistent").output().expect("larder runs")
}

#[track_caller]
fn said(output: &Output) -> String {
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{out}{err}");
    out.into_owned()
}

/// A sidecar that is asked over its socket, and the socket.
fn private_sidecar(servers: &Servers, directory: &TempDir) -> (Sidecar, String) {
    let socket = directory.path().join("admin.sock").display().to_string();
    let snapshot = policy(servers.topology(), 1, &[], &rules());
    (Sidecar::start_with(&snapshot, &["--admin-socket", &socket]), socket)
}

#[test]
fn a_person_invalidates_keys() {
    let (servers, directory) = (Servers::sentinel(), TempDir::new().unwrap());
    let (sidecar, socket) = private_sidecar(&servers, &directory);
    let mut client = sidecar.client();
    for key in ["item:1", "plain:1"] {
        assert_eq!(client.call(&["SET", key, "v"]), ok());
    }
    let tried = said(&larder(&["invalidate", "item:1", "item:2", "--dry-run", "--socket", &socket]));
    assert_eq!(tried, "the 2 keys: 1 would go\n");
    assert!(exists(&servers, "item:1"));
    let done = said(&larder(&["invalidate", "item:1", "item:2", "--socket", &socket, "--output", "json"]));
    let done: Json = serde_json::from_str(&done).unwrap();
    assert_eq!((&done["named"], &done["removed"], &done["complete"]), (&json!(2), &json!(1), &json!(true)));
    assert!(!exists(&servers, "item:1") && exists(&servers, "plain:1"));
    for (arguments, code, words) in [
        (vec!["--tag", "a", "--socket", &socket], 2, "no rule has tags"),
        (vec!["--rule", "none", "--socket", &socket], 2, "write one of item, plain"),
        (vec!["--pattern", "item:*", "--socket", &socket], 2, "{part}"),
        (vec!["item:1"], 2, "no `larder dev` runs here"),
        (vec!["item:1", "--socket", "/no/such.sock"], 1, "there is no such socket"),
        (vec!["item:1", "--rule", "item"], 2, "cannot be used with"),
    ] {
        let output = larder(&[&["invalidate"], arguments.as_slice()].concat());
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(code), "{arguments:?}: {error}");
        assert!(error.contains(words), "{arguments:?}: {error}");
    }
}

#[test]
fn a_rule_and_a_pattern_go_on_every_shard() {
    let (servers, directory) = (Servers::cluster(), TempDir::new().unwrap());
    let (sidecar, socket) = private_sidecar(&servers, &directory);
    let mut client = sidecar.client();
    let keys = |name: &str| (0..300).map(|number| format!("{name}:{number}")).collect::<Vec<_>>();
    for key in [keys("item"), keys("plain"), keys("free")].concat() {
        assert_eq!(client.call(&["SET", &key, "v"]), ok());
    }
    assert_eq!(client.line("GET item:late"), Value::Nil, "a load begins");
    let tried = said(&larder(&["invalidate", "--rule", "item", "--dry-run", "--socket", &socket]));
    let counted: u64 = tried.split(' ').rev().nth(2).and_then(|number| number.parse().ok()).unwrap_or_default();
    assert!((300..=330).contains(&counted), "{tried}: SCAN may name a key twice");
    let output = larder(&["invalidate", "--rule", "item", "--wait", "--socket", &socket]);
    assert!(said(&output).contains("invalidated"), "{output:?}");
    assert!(String::from_utf8_lossy(&output.stderr).contains("waiting for the event to be read"), "{output:?}");
    assert!(keys("item").iter().all(|key| !exists(&servers, key)));
    assert!(keys("plain").iter().all(|key| exists(&servers, key)));
    assert_eq!(client.line("SET item:late v"), ok());
    assert!(!exists(&servers, "item:late"), "a load that began before was stored");
    // A pattern is about what rules cover.
    for pattern in ["plain:{id}", "free:{id}"] {
        said(&larder(&["invalidate", "--pattern", pattern, "--wait", "--socket", &socket]));
    }
    assert!(keys("plain").iter().all(|key| !exists(&servers, key)));
    assert!(keys("free").iter().all(|key| exists(&servers, key)));
    let Servers::Cluster(cluster) = &servers else { panic!("there are shards") };
    for primary in &cluster.servers[..cluster.shards()] {
        let calls = primary.client().line("INFO commandstats").text();
        assert!(calls.contains("cmdstat_scan:") && !calls.contains("cmdstat_keys:"), "{calls}");
    }
}

/// The same check, of a walk and of one that leaves leases.
#[test]
fn a_walk_that_left_leases_would_have_late_loads_stored() {
    const LEASES_STAY: &[Change] = &[Change { from: "UNLINK\r\n$23\r\nlarder:l:", to: "EXISTS\r\n$23\r\nlarder:l:" }];
    for (changes, stored) in [(&[][..], false), (LEASES_STAY, true)] {
        let servers = Servers::sabotaged(changes);
        let sidecars = sidecars(&servers, 1, &rules());
        let mut client = sidecars[0].client();
        assert_eq!(client.line("GET item:late"), Value::Nil);
        announce(&servers, "rule", "item");
        wait_for("the walk to end", LIMIT, || metric(&sidecars[0], "larder_invalidation_walks_total") == 1);
        assert_eq!(client.line("SET item:late v"), ok());
        assert_eq!((exists(&servers, "item:late"), servers.changed() > 0), (stored, stored));
    }
}

#[test]
fn a_walk_goes_on_where_its_sidecar_was_killed() {
    let servers = Servers::sentinel();
    let mut sidecars = sidecars(&servers, 2, &rules());
    let mut server = servers.holder_of("item:0");
    for part in 0..40 {
        let words = (0..500).flat_map(|number| [format!("item:{part}-{number}"), "v".to_owned()]);
        assert_eq!(server.call(&[vec!["MSET".to_owned()], words.collect()].concat()), ok());
    }
    let size = |server: &mut Client| server.line("DBSIZE").int();
    announce(&servers, "rule", "item");
    let walked = |sidecar: &Sidecar| metric(sidecar, "larder_invalidation_walk_removed_total");
    wait_for("the walk to be under way", LIMIT, || sidecars.iter().any(|sidecar| walked(sidecar) > 0));
    let reader = sidecars.iter().position(|sidecar| walked(sidecar) > 0).unwrap();
    drop(sidecars.remove(reader));
    assert!(size(&mut server) > 1000, "it had not ended yet");
    wait_for("the other to end it", LIMIT, || metric(&sidecars[0], "larder_invalidation_walks_total") == 1);
    assert!(size(&mut server) < 10, "{}", size(&mut server));
}
