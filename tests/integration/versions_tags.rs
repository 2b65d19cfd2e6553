//! Values with tags that `LARDER.FILL … TAGS` gives them.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use larder::policy::KeyPattern;
use larder::policy::versions::Counter;
use serde_json::{Value as Json, json};
use tempfile::TempDir;

use crate::cache_aside::{bulk, ok, rule};
use crate::read_through::{Servers, policy};
use crate::support::admin::metric;
use crate::support::resp::{Client, Value};
use crate::support::saboteur::Change;
use crate::support::sidecar::Sidecar;
use crate::support::wait_for;

const LIMIT: Duration = Duration::from_secs(60);

/// `page:{id}`, whose keys have versions of their own; `item:{id}`, which have leases alone.
fn rules() -> [Json; 2] {
    let mut page = rule("page", json!({}), json!({"stale": "1h"}));
    page["versioned"] = json!("entity");
    [page, rule("item", json!({}), json!({}))]
}

struct Scene {
    servers: Servers,
    sidecars: [Sidecar; 2],
    directory: TempDir,
}

impl Scene {
    fn open(servers: Servers) -> Self {
        let directory = TempDir::new().unwrap();
        let socket = directory.path().join("admin.sock").display().to_string();
        let asked = Sidecar::start_with(&policy(servers.topology(), 1, &[], &rules()), &["--admin-socket", &socket]);
        let sidecars = [asked, servers.sidecar(&[], &rules())];
        Self { servers, sidecars, directory }
    }

    fn clients(&self) -> [Client; 2] {
        [0, 1].map(|index| self.sidecars[index].client())
    }

    /// Invalidates a tag, and waits until nobody shows what had it.
    #[track_caller]
    fn invalidate(&self, tag: &str) {
        let socket = self.directory.path().join("admin.sock").display().to_string();
        let arguments = ["invalidate", "--tag", tag, "--sync", "--socket", &socket];
        let output = Command::new(Path::new(env!("CARGO_BIN_EXE_larder"))).args(arguments).output().expect("larder runs");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }

    /// What the cache has under one of Larder's own names is lost.
    #[track_caller]
    fn lose(&self, name: Vec<u8>) {
        let name = String::from_utf8(name).unwrap();
        assert_eq!(self.servers.holder_of(&name).call(&["DEL", &name]), Value::Int(1), "{name}");
    }
}

fn keys() -> KeyPattern {
    "page:{id}".parse().unwrap()
}

/// The token for a key that nobody loads.
#[track_caller]
fn token(client: &mut Client, key: &str) -> String {
    let items = client.call(&["LARDER.FETCH", key]).items();
    assert_eq!((items[0].text().as_str(), &items[1]), ("load", &Value::Nil), "{items:?}");
    items[2].text()
}

/// Loads a key, and stores it with tags.
#[track_caller]
fn fill(client: &mut Client, key: &str, value: &str, tags: &[&str]) {
    let token = token(client, key);
    let words = [&["LARDER.FILL", key, &token, value, "TAGS"], tags].concat();
    assert_eq!(client.call(&words), ok(), "{key}");
}

#[test]
fn a_value_goes_with_any_of_its_tags_under_sentinel() {
    check_tags(Servers::sentinel());
}

#[test]
fn a_value_goes_with_any_of_its_tags_in_a_cluster() {
    check_tags(Servers::cluster());
}

fn check_tags(servers: Servers) {
    let scene = Scene::open(servers);
    let [mut one, mut two] = scene.clients();
    fill(&mut one, "page:1", "a", &["author:1", "author:2"]);
    fill(&mut two, "page:2", "b", &["author:2", "author:2", "shelf 7"]);
    fill(&mut two, "page:3", "c", &["author:3"]);
    for client in [&mut one, &mut two] {
        // Who was told of the version before has the value by the name that it had.
        assert_eq!(client.line("MGET page:1 page:2 page:3"), Value::Array(["a", "b", "c"].map(bulk).to_vec()));
    }
    let told = |client: &mut Client, fact: &str| {
        let told = client.line("LARDER.EXPLAIN page:2").items();
        let at = told.iter().position(|item| *item == bulk(fact)).unwrap_or_else(|| panic!("{fact}: {told:?}"));
        told[at + 1].text()
    };
    for client in [&mut one, &mut two] {
        assert_eq!((told(client, "type").as_str(), told(client, "givenTags").as_str()), ("string", "author:2 shelf 7"));
        assert!(told(client, "name").starts_with("page:2~v"));
    }
    scene.invalidate("nobody's");
    for client in [&mut one, &mut two] {
        assert_eq!(client.line("MGET page:1 page:2 page:3"), Value::Array(["a", "b", "c"].map(bulk).to_vec()));
        assert!((1..=3600).contains(&client.line("TTL page:1").int()), "a value has its rule's TTL");
    }
    scene.invalidate("author:1");
    for client in [&mut one, &mut two] {
        assert_eq!(client.line("EXISTS page:1"), Value::Int(0));
        assert_eq!(client.line("MGET page:2 page:3"), Value::Array(vec![bulk("b"), bulk("c")]));
    }
    scene.invalidate("shelf 7");
    assert_eq!(two.line("EXISTS page:1 page:2 page:3"), Value::Int(1));
    // A key that is stored anew keeps its tags until it is filled with others, or invalidated.
    assert_eq!(one.line("SET page:3 d"), ok());
    scene.invalidate("author:3");
    assert_eq!((one.line("EXISTS page:3"), two.line("EXISTS page:3")), (Value::Int(0), Value::Int(0)));
    assert_eq!(one.line("LARDER.INVALIDATE page:3 SYNC"), Value::Int(0));
    assert_eq!(one.line("SET page:3 e"), ok());
    scene.invalidate("author:3");
    assert_eq!((one.line("GET page:3"), two.line("GET page:3")), (bulk("e"), bulk("e")));
    let seen: u64 = scene.sidecars.iter().map(|sidecar| metric(sidecar, "larder_invalidation_walk_seen_total")).sum();
    assert_eq!(seen, 0, "no name was looked at");
}

#[test]
fn what_was_loaded_before_its_tag_was_invalidated_is_not_stored() {
    let scene = Scene::open(Servers::sentinel());
    let [mut one, mut two] = scene.clients();
    let loaded = [1, 2].map(|number| (number, token(&mut one, &format!("page:{number}"))));
    scene.invalidate("author:1");
    let answers = loaded.map(|(number, token)| {
        one.call(&["LARDER.FILL", &format!("page:{number}"), &token, "old", "TAGS", "shelf:1", &format!("author:{number}")])
    });
    assert_eq!(answers, [Value::Nil, ok()], "the other's tags are as they were");
    assert_eq!((one.line("GET page:2"), two.line("EXISTS page:1")), (bulk("old"), Value::Int(0)));
    // Nor is what was loaded before the key was written, by whichever name, or the log of invalidated tags was lost.
    let writes: [&[&str]; 3] = [&["SET", "page:4", "new"], &["DEL", "page:4"], &["LARDER.INVALIDATE", "page:4"]];
    for write in writes {
        assert!(!two.line("DEL page:4").is_error());
        let token = token(&mut one, "page:4");
        assert!(!two.call(write).is_error());
        assert_eq!(one.call(&["LARDER.FILL", "page:4", &token, "old", "TAGS", "a"]), Value::Nil, "{write:?}");
        assert_ne!(two.line("GET page:4"), bulk("old"));
    }
    let token = token(&mut one, "page:5");
    scene.lose(Counter::log_of(&keys()));
    assert_eq!(one.call(&["LARDER.FILL", "page:5", &token, "old", "TAGS", "a"]), Value::Nil);
}

#[test]
fn whatever_is_lost_of_a_value_with_tags_is_a_miss() {
    let scene = Scene::open(Servers::sentinel());
    let [mut one, mut two] = scene.clients();
    let lost = [Counter::of_key(b"page:1"), Counter::of_tag(&keys(), b"author:2"), Counter::of_rule(&keys())];
    for (number, counter) in (1..).zip(lost) {
        let key = format!("page:{number}");
        fill(&mut one, &key, "v", &[&format!("author:{number}")]);
        assert_eq!(two.call(&["GET", &key]), bulk("v"));
        scene.lose(counter.key());
        wait_for("the value to be gone", LIMIT, || {
            [&mut one, &mut two].into_iter().all(|client| client.call(&["EXISTS", &key]) == Value::Int(0))
        });
    }
}

/// With a log that is not asked in truth, an old value is shown.
#[test]
fn a_fill_that_does_not_ask_what_was_invalidated_stores_what_is_old() {
    const UNASKED: &[Change] = &[Change { from: "tonumber(at) > since then", to: "tonumber(at) < since then" }];
    for (changes, stored) in [(&[][..], Value::Nil), (UNASKED, ok())] {
        let scene = Scene::open(Servers::sabotaged(changes));
        let [mut one, _] = scene.clients();
        let token = token(&mut one, "page:1");
        scene.invalidate("author:1");
        assert_eq!(one.call(&["LARDER.FILL", "page:1", &token, "old", "TAGS", "author:1"]), stored);
        assert_eq!(scene.servers.changed() > 0, stored == ok());
    }
}

#[test]
fn what_takes_no_tags_says_so() {
    let scene = Scene::open(Servers::sentinel());
    let [mut client, _] = scene.clients();
    let token = "0000000000000001@00000000";
    let many: Vec<String> = (0..9).map(|number| format!("t{number}")).collect();
    for (tail, text) in [
        (vec!["page:1", token, "v", "TAGS"], "syntax error"),
        (vec!["page:1", token, "v", "LABELS", "a"], "syntax error"),
        (vec!["page:1", token, "v", "PX", "5", "TAGS"], "syntax error"),
        (vec!["page:1", token, "v", "TAGS", ""], "at most 8 tags"),
        ([&["page:1", token, "v", "TAGS"][..], &many.iter().map(String::as_str).collect::<Vec<_>>()].concat(), "at most 8 tags"),
        (vec!["item:1", token, "v", "TAGS", "a"], "versioned: Entity in the rule `item`"),
        (vec!["page:1", "0000000000000001@00000000+7", "v", "TAGS", "a"], "no token"),
    ] {
        let Value::Error(error) = client.call(&[&["LARDER.FILL"][..], &tail].concat()) else { panic!("{tail:?} is not refused") };
        assert!(error.contains(text), "{tail:?}: {error}");
    }
    assert_eq!(client.call(&["LARDER.FILL", "page:1", token, "v", "TAGS", "a"]), Value::Nil, "a token that tells of no moment");
}
