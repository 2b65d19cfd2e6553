//! Rules with versions: what clients see of their keys, and what one write does to all of them.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use larder::policy::versions::Counter;
use serde_json::{Value as Json, json};
use tempfile::TempDir;

use crate::cache_aside::{bulk, ok, rule, sidecars};
use crate::read_through::{Servers, http_origin, policy, web_rule};
use crate::support::admin::metric;
use crate::support::resp::{Client, Value};
use crate::support::saboteur::Change;
use crate::support::sidecar::Sidecar;
use crate::support::wait_for;
use crate::support::web::Web;

pub const LIMIT: Duration = Duration::from_secs(60);
pub const VERSION_KEY: &str = "page:{id}";

/// `page:{id}`, versioned, with leases and stale copies; `plain:{id}` without any of that.
pub fn rules() -> [Json; 2] {
    let mut page = rule("page", json!({}), json!({"stale": "1h"}));
    page["versioned"] = json!(true);
    let plain = json!({"name": "plain", "keys": "plain:{id}",
        "strategy": {"cacheAside": {"ttl": {"default": "1h", "max": "2h", "jitter": "10%"}}}});
    [page, plain]
}

/// Waits until sidecars have been told the version: before, each has one of its own.
#[track_caller]
pub fn wait_until_shared(sidecars: &[Sidecar]) {
    let mut clients: Vec<Client> = sidecars.iter().map(Sidecar::client).collect();
    wait_for("the version to be known", LIMIT, || {
        assert_eq!(clients[0].call(&["SET", "page:shared", "v"]), ok());
        clients.iter_mut().all(|client| client.call(&["EXISTS", "page:shared"]) == Value::Int(1))
    });
    assert!(!clients[0].call(&["DEL", "page:shared"]).is_error());
}

#[test]
fn clients_see_their_own_names_under_sentinel() {
    check_names(&Servers::sentinel());
}

#[test]
fn clients_see_their_own_names_in_a_cluster() {
    check_names(&Servers::cluster());
}

fn check_names(servers: &Servers) {
    let sidecars = sidecars(servers, 2, &rules());
    wait_until_shared(&sidecars);
    let [mut one, mut two] = [0, 1].map(|index| sidecars[index].client());
    assert_eq!(one.line("MSET page:1 a page:2 b plain:1 c"), ok());
    assert_eq!(two.line("MGET page:1 plain:1 page:2"), Value::Array(vec![bulk("a"), bulk("c"), bulk("b")]));
    assert_eq!(two.line("EXISTS page:1 page:2 page:3"), Value::Int(2));
    assert!((1..=3600).contains(&two.line("TTL page:1").int()), "a key gets its rule's TTL");
    assert_eq!((two.line("INCR page:n"), one.line("GET page:n")), (Value::Int(1), bulk("1")));
    assert_eq!(servers.holder_of("page:1").line("EXISTS page:1"), Value::Int(0), "the cache has it by another name");
    let names = scan(&mut two, &[]);
    assert_eq!(names, ["page:1", "page:2", "page:n", "plain:1"]);
    assert_eq!(scan(&mut two, &["MATCH", "page:[0-9]"]), ["page:1", "page:2"]);
    assert_eq!((two.line("DEL page:1 page:3"), one.line("GET page:1")), (Value::Int(1), Value::Nil));
    assert_eq!(one.line("SET page:1 loaded"), ok());
    assert_eq!((two.line("GET page:1"), two.line("LARDER.INVALIDATE page:1 plain:1")), (bulk("loaded"), Value::Int(2)));
    for (command, words) in [
        ("HSET page:1 a b", "NOPERM HSET is not carried out on keys of the rule `page`, which is versioned"),
        ("EVAL return(1) 1 page:1", "EVAL is not carried out"),
        ("WATCH page:1", "WATCH is not carried out"),
        ("GET page:1~v0123456789abcdef", "use another name"),
    ] {
        let reply = one.line(command);
        assert!(matches!(&reply, Value::Error(text) if text.contains(words)), "{command}: {reply:?}");
    }
    assert_eq!(one.line("MULTI"), ok());
    assert!(one.line("GET page:2").is_error());
    assert!(one.line("EXEC").is_error());
    let large = "x".repeat(300 * 1024);
    assert_eq!(one.call(&["SET", "page:large", &large]), ok());
    assert_eq!(two.line("STRLEN page:large"), Value::Int(300 * 1024));
}

/// All names that a client is shown, in order.
fn scan(client: &mut Client, options: &[&str]) -> Vec<String> {
    let (mut names, mut cursor) = (Vec::new(), "0".to_owned());
    loop {
        let page = client.call(&[&["SCAN", &cursor], options].concat()).items();
        names.extend(page[1].items().iter().map(Value::text));
        cursor = page[0].text();
        if cursor == "0" {
            break;
        }
    }
    names.sort();
    names.dedup();
    names
}

pub fn larder(arguments: &[&str]) -> String {
    let output = Command::new(Path::new(env!("CARGO_BIN_EXE_larder"))).args(arguments).output().expect("larder runs");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

#[test]
fn one_write_invalidates_a_rule_under_sentinel() {
    check_rule(&Servers::sentinel());
}

#[test]
fn one_write_invalidates_a_rule_in_a_cluster() {
    check_rule(&Servers::cluster());
}

fn check_rule(servers: &Servers) {
    let directory = TempDir::new().unwrap();
    let socket = directory.path().join("admin.sock").display().to_string();
    let asked = Sidecar::start_with(&policy(servers.topology(), 1, &[], &rules()), &["--admin-socket", &socket]);
    let sidecars = [asked, servers.sidecar(&[], &rules())];
    wait_until_shared(&sidecars);
    let [mut one, mut two] = [0, 1].map(|index| sidecars[index].client());
    for number in 0..500 {
        assert_eq!(one.call(&["SET", &format!("page:{number}"), "old"]), ok());
    }
    assert_eq!(one.line("SET plain:1 v"), ok());
    assert_eq!(two.line("GET page:late"), Value::Nil, "a load begins");
    let told = larder(&["invalidate", "--rule", "page", "--wait", "--socket", &socket]);
    assert_eq!(told, "the keys of the rule `page`: invalidated\n");
    for client in [&mut one, &mut two] {
        assert_eq!(client.line("EXISTS page:1 page:499 plain:1"), Value::Int(1));
        assert_eq!(scan(client, &["MATCH", "page:*"]), [""; 0]);
    }
    // What was loaded before is stored nowhere that anybody looks.
    assert_eq!(two.line("SET page:late old"), ok());
    assert_eq!((two.line("EXISTS page:late"), one.line("EXISTS page:late")), (Value::Int(0), Value::Int(0)));
    assert_eq!(one.line("GET page:1"), Value::Nil);
    assert_eq!(one.line("SET page:1 new"), ok());
    assert_eq!(two.line("GET page:1"), bulk("new"));
    let seen: u64 = sidecars.iter().map(|sidecar| metric(sidecar, "larder_invalidation_walk_seen_total")).sum();
    assert_eq!(seen, 0, "no name was looked at");
    // An event about one key finds it, whatever it is called.
    let event = servers.holder_of("larder:events").line("XADD larder:events * key page:1");
    assert!(matches!(event, Value::Bulk(_)), "{event:?}");
    wait_for("the event", LIMIT, || two.line("EXISTS page:1") == Value::Int(0));
}

#[test]
fn one_write_invalidates_a_tag_under_sentinel() {
    check_tag(&Servers::sentinel());
}

#[test]
fn one_write_invalidates_a_tag_in_a_cluster() {
    check_tag(&Servers::cluster());
}

fn check_tag(servers: &Servers) {
    let mut face = rule("face", json!({}), json!({}));
    (face["keys"], face["tags"], face["versioned"]) =
        (json!("face:{user}:{size}"), json!(["user:{user}", "{size}"]), json!(true));
    let [page, _] = rules();
    let sidecars = sidecars(servers, 2, &[page, face]);
    wait_until_shared(&sidecars);
    let [mut one, mut two] = [0, 1].map(|index| sidecars[index].client());
    assert_eq!(one.line("MSET face:7:s a face:7:l b face:8:s c page:7 d"), ok());
    assert_eq!(two.line("MGET face:7:s face:7:l face:8:s"), Value::Array(vec![bulk("a"), bulk("b"), bulk("c")]));
    assert_eq!(two.line("GET face:7:late"), Value::Nil, "a load begins");
    let event = one.line("XADD larder:events * tag user:7");
    assert!(matches!(event, Value::Bulk(_)), "{event:?}");
    wait_for("the tag's keys to go", LIMIT, || {
        [&mut one, &mut two].into_iter().all(|client| client.line("EXISTS face:7:s face:7:l") == Value::Int(0))
    });
    assert_eq!(two.line("SET face:7:late old"), ok());
    assert_eq!((one.line("EXISTS face:7:late"), two.line("EXISTS face:7:late")), (Value::Int(0), Value::Int(0)));
    for client in [&mut one, &mut two] {
        assert_eq!(client.line("EXISTS face:8:s page:7"), Value::Int(2));
    }
    assert_eq!(scan(&mut two, &["MATCH", "face:*"]), ["face:8:s"]);
    let seen: u64 = sidecars.iter().map(|sidecar| metric(sidecar, "larder_invalidation_walk_seen_total")).sum();
    assert_eq!(seen, 0, "no name was looked at");
}

#[test]
fn keys_have_versions_of_their_own_under_sentinel() {
    check_entities(&Servers::sentinel());
}

#[test]
fn keys_have_versions_of_their_own_in_a_cluster() {
    check_entities(&Servers::cluster());
}

fn check_entities(servers: &Servers) {
    let [mut page, plain] = rules();
    page["versioned"] = json!("entity");
    let sidecars = sidecars(servers, 2, &[page, plain]);
    wait_until_shared(&sidecars);
    let [mut one, mut two] = [0, 1].map(|index| sidecars[index].client());
    assert_eq!(one.line("MSET page:1 a page:2 b page:3 c plain:1 d"), ok());
    assert_eq!(two.line("MGET page:1 page:2 plain:1"), Value::Array(vec![bulk("a"), bulk("b"), bulk("d")]));
    assert_eq!((two.line("EXISTS page:1 page:2 page:4"), two.line("STRLEN page:3")), (Value::Int(2), Value::Int(1)));
    assert!((1..=3600).contains(&two.line("TTL page:1").int()), "a key gets its rule's TTL");
    assert_eq!(scan(&mut two, &["MATCH", "page:*"]), ["page:1", "page:2", "page:3"]);
    assert_eq!((two.line("DEL page:3"), one.line("GET page:3")), (Value::Int(1), Value::Nil));
    // One key's version is drawn anew, and no other's.
    let version = own_version(servers, "page:1");
    assert_eq!(two.line("GET page:late"), Value::Nil, "a load begins");
    assert_eq!(one.line("LARDER.INVALIDATE page:1 page:late plain:1"), Value::Int(2));
    assert_eq!((two.line("EXISTS page:1"), two.line("GET page:2")), (Value::Int(0), bulk("b")));
    assert_eq!(two.line("SET page:late old"), ok());
    assert_eq!((two.line("EXISTS page:late"), one.line("EXISTS page:late")), (Value::Int(0), Value::Int(0)));
    wait_for("both to have heard of the next version", LIMIT, || {
        assert_eq!(one.line("SET page:1 new"), ok());
        two.line("GET page:1") == bulk("new")
    });
    assert_ne!(own_version(servers, "page:1"), version);
    // An event does the same, and one about the rule or lost versions do it to all.
    let event = one.line("XADD larder:events * key page:1");
    assert!(matches!(event, Value::Bulk(_)), "{event:?}");
    wait_for("the event", LIMIT, || two.line("EXISTS page:1") == Value::Int(0));
    assert!(!one.line("XADD larder:events * rule page").is_error());
    wait_for("the rule's keys to go", LIMIT, || {
        [&mut one, &mut two].into_iter().all(|client| client.line("EXISTS page:2") == Value::Int(0))
    });
    assert_eq!((one.line("SET page:5 v"), two.line("GET page:5")), (ok(), bulk("v")));
    let own = own_name("page:5");
    assert_eq!(servers.holder_of(&own).call(&["DEL", &own]), Value::Int(1));
    wait_for("a lost version to be a miss", LIMIT, || {
        [&mut one, &mut two].into_iter().all(|client| client.line("EXISTS page:5") == Value::Int(0))
    });
}

/// Where the cache keeps the version that is a key's own.
fn own_name(key: &str) -> String {
    String::from_utf8(Counter::of_key(key.as_bytes()).key()).unwrap()
}

fn own_version(servers: &Servers, key: &str) -> String {
    let name = own_name(key);
    servers.holder_of(&name).call(&["GET", &name]).text()
}

#[test]
fn a_version_that_is_lost_is_a_miss() {
    let servers = Servers::sentinel();
    let sidecars = sidecars(&servers, 2, &rules());
    wait_until_shared(&sidecars);
    let [mut one, mut two] = [0, 1].map(|index| sidecars[index].client());
    assert_eq!(one.line("SET page:1 old"), ok());
    let mut server = servers.holder_of(VERSION_KEY);
    let names = server.line("KEYS larder:v:*").items();
    assert_eq!(server.call(&["DEL", &names[0].text()]), Value::Int(1));
    wait_for("the old value to be gone", LIMIT, || {
        [&mut one, &mut two].into_iter().all(|client| client.line("EXISTS page:1") == Value::Int(0))
    });
    wait_until_shared(&sidecars);
    assert_eq!(one.line("SET page:1 new"), ok());
    assert_eq!(two.line("GET page:1"), bulk("new"));
}

/// What another sidecar has stored under a version of which the one that deletes has not heard: of a sidecar, and of one that is told of no
/// version when it asks which one counts.
#[test]
fn a_deletion_that_did_not_ask_which_version_counts_would_leave_what_others_show() {
    const UNANSWERED: &[Change] = &[Change { from: "GET\r\n$23\r\nlarder:v:", to: "GET\r\n$23\r\nlarder:w:" }];
    for (changes, stays) in [(&[][..], false), (UNANSWERED, true)] {
        let servers = Servers::sabotaged(changes);
        let sidecars = sidecars(&servers, 1, &rules());
        let mut client = sidecars[0].client();
        assert_eq!(client.line("SET page:1 v"), ok());
        let mut server = servers.holder_of(VERSION_KEY);
        let version_key = server.line("KEYS larder:v:*").items()[0].text();
        // Between the two, the sidecar may have asked by chance.
        let stayed = (0..5).any(|round| {
            let version = format!("{round:016x}");
            let name = format!("page:1~v{version}");
            assert_eq!(server.call(&["SET", &name, "old"]), ok());
            assert_eq!(server.call(&["SET", &version_key, &version]), ok());
            assert!(!client.line("DEL page:1").is_error());
            server.call(&["EXISTS", &name]) == Value::Int(1)
        });
        assert_eq!((stayed, servers.changed() > 0), (stays, stays));
    }
}

#[test]
fn the_origin_is_asked_for_the_key_that_the_client_named() {
    let web = Web::start();
    web.put("/page/7", "content");
    let mut page = web_rule("page", json!({}));
    page["versioned"] = json!(true);
    let servers = Servers::sentinel();
    let sidecar = servers.sidecar(&[http_origin("web", &web, "5s")], &[page]);
    let mut client = sidecar.client();
    assert_eq!(client.line("GET page:7"), bulk("content"));
    wait_until_shared(std::slice::from_ref(&sidecar));
    assert_eq!(client.line("GET page:7"), bulk("content"));
    let before = web.visits("/page/7");
    assert_eq!(client.line("GET page:7"), bulk("content"));
    assert_eq!(web.visits("/page/7"), before, "it was cached");
}
