//! A relay's login: it can do what the documentation says that it needs, and needs no more. So is that which the operator makes for it.

use std::collections::{BTreeMap, BTreeSet};
use std::time::SystemTime;

use larder::operator::cache_cluster::users::{Access, Grant, Users};
use larder::operator::cache_policy::passwords::Passwords;
use larder::operator::cache_policy::user::relay_grant;
use larder::policy::Snapshot;
use larder::policy::binding::BindingName;
use larder::policy::slots::Companion;

use super::together::{database, rows, rules};
use super::{LONG, Scene, cluster, sentinel};
use crate::read_through::{Servers, sql_origin};
use crate::support::postgres::Postgres;
use crate::support::resp::{Client, Value};
use crate::support::server::Redis;
use crate::support::wait_for;

const PASSWORD: &str = "relay-password";

/// The command of the documentation, with this password.
fn set_user() -> Vec<String> {
    let text = include_str!("../../../docs/relay.md");
    let line = text.lines().find(|line| line.trim_start().starts_with("ACL SETUSER relay")).expect("it says what a login needs");
    line.split_whitespace().map(|word| word.replace("PASSWORD", PASSWORD)).collect()
}

/// The command by which the operator makes the user of a relay that may do this.
fn set_user_of_the_operator(grant: Grant) -> Vec<String> {
    let binding = BindingName::of("CachePolicy", "shop", "main");
    let users = Users::next(None, &Access::Open, "system", None, SystemTime::now());
    let users = users.bind(None, &BTreeMap::from([(binding.clone(), grant)]), None, SystemTime::now());
    let user = users.on_servers().into_iter().find(|user| user.name == binding.user()).expect("it is made");
    ["ACL", "SETUSER", "relay"].map(str::to_owned).into_iter().chain(user.rules).collect()
}

fn all(servers: &Servers) -> Vec<Client> {
    match servers {
        Servers::Sentinel(servers) => servers.servers.iter().map(Redis::client).collect(),
        Servers::Cluster(servers) => servers.servers.iter().map(Redis::client).collect(),
    }
}

#[test]
fn its_login_is_what_a_relay_needs() {
    for (servers, is_vouched_for) in [(sentinel(), false), (cluster(), false), (sentinel(), true), (cluster(), true)] {
        let postgres = Postgres::shared();
        let (url, database) = database(&postgres);
        let mut scene = Scene::new(servers, &[sql_origin("db", &url)], &rules());
        scene.snapshot["writesToDisk"] = is_vouched_for.into();
        let set_user = if is_vouched_for {
            let snapshot = Snapshot::parse(scene.snapshot.to_string().as_bytes()).expect("a snapshot");
            let passwords = Passwords { current: Some(PASSWORD.to_owned()), ..Passwords::default() };
            set_user_of_the_operator(relay_grant(&snapshot, &passwords, None))
        } else {
            set_user()
        };
        for mut server in all(&scene.servers) {
            assert_eq!(server.call(&set_user), Value::Simple("OK".to_owned()));
            assert_eq!(server.line("ACL LOG RESET"), Value::Simple("OK".to_owned()));
        }
        scene.log_in("relay", PASSWORD);
        let relays = [scene.relay(), scene.relay()];
        wait_for("both have their share", LONG, || scene.holders() == [8, 8]);
        for n in 0..100 {
            scene.append(format!("users:{n}").as_bytes(), Some(if [7, 9].contains(&n) { "poison" } else { "good" }));
        }
        scene.append(b"users:8", None);
        scene.wait_until_drained();
        assert_eq!((rows(&postgres, &database).len(), scene.dead()), (97, 2));
        if is_vouched_for {
            letters_are_given_up(&scene);
        }
        relays.into_iter().for_each(super::Relay::stop);
        for mut server in all(&scene.servers) {
            let refused = server.line("ACL LOG").items();
            assert!(refused.is_empty(), "it needs more: {refused:?}");
        }
        if !is_vouched_for {
            letters_are_given_up_but_not_what_is_cached(&scene);
        }
        // Nothing else is open to it.
        let key = String::from_utf8(larder::journal::Partition::new(scene.journal(), 0).log()).expect("a text");
        let mut client = scene.servers.holder_of(&key);
        assert_eq!(client.call(&["AUTH", "relay", PASSWORD]), Value::Simple("OK".to_owned()));
        for command in [
            "GET users:1",
            "SET users:1 x",
            "DEL other:1",
            "UNLINK users:1",
            "CONFIG SET save 60",
            "FLUSHALL",
            "KEYS *",
            "SHUTDOWN NOSAVE",
            "ACL LIST",
        ] {
            let reply = client.line(command);
            assert!(matches!(&reply, Value::Error(text) if text.starts_with("NOPERM")), "{command}: {reply:?}");
        }
    }
}

/// In a relay's pod, with all that is cached of a letter's key.
fn letters_are_given_up(scene: &Scene) {
    let key = "users:7";
    let text = |name: Vec<u8>| String::from_utf8(name).expect("a text");
    let copies = [Companion::Lease, Companion::Stale, Companion::Negative].map(|copy| text(copy.name(key.as_bytes())));
    let mut holder = scene.servers.holder_of(key);
    for name in [key].into_iter().chain(copies.iter().map(String::as_str)) {
        assert_eq!(holder.call(&["SET", name, "poison"]), Value::Simple("OK".to_owned()));
    }
    let dropped = scene.person(&["dead-letters", "drop", "--all"]);
    assert!(dropped.status.success(), "{}", String::from_utf8_lossy(&dropped.stderr));
    assert_eq!((scene.dead(), holder.call(&["EXISTS", key, &copies[0], &copies[1], &copies[2]]).int()), (0, 0));
}

/// By a login that may delete no such key, as where no rule writes it behind any more: each goes all the same, and it is said what stays.
fn letters_are_given_up_but_not_what_is_cached(scene: &Scene) {
    let mut holder = scene.servers.holder_of("users:7");
    assert_eq!(holder.call(&["SET", "users:7", "poison"]), Value::Simple("OK".to_owned()));
    let dropped = scene.person(&["dead-letters", "drop", "--all"]);
    let told = String::from_utf8_lossy(&dropped.stdout);
    assert!(dropped.status.success(), "{told}{}", String::from_utf8_lossy(&dropped.stderr));
    let stays = |line: &str| line.contains("is dropped; ") && line.contains("stay until its TTL ends") && line.contains("NOPERM");
    assert!(told.lines().count() == 2 && told.lines().all(stays), "{told}");
    assert_eq!((scene.dead(), scene.dirty(), holder.call(&["GET", "users:7"]).text().as_str()), (0, 0, "poison"));
}

/// The same login follows a database's changes.
#[test]
fn the_login_of_the_documentation_is_enough_for_changes() {
    check_changes(&set_user());
}

#[test]
fn the_login_that_the_operator_makes_is_enough_for_changes() {
    let slots = BTreeSet::from([super::changes::SLOT.to_owned()]);
    check_changes(&set_user_of_the_operator(Grant::of_relay(PASSWORD, BTreeSet::new()).with_feeds(slots)));
}

fn check_changes(set_user: &[String]) {
    let mut shop = super::changes::Shop::new(Servers::sentinel(), 1);
    shop.scene.snapshot["writesToDisk"] = true.into();
    for mut server in all(&shop.scene.servers) {
        assert_eq!(server.call(set_user), Value::Simple("OK".to_owned()));
        assert_eq!(server.line("ACL LOG RESET"), Value::Simple("OK".to_owned()));
    }
    shop.scene.log_in("relay", PASSWORD);
    let relay = shop.reading();
    assert_eq!(shop.cached("user:1"), Value::Bulk(b"old".to_vec()));
    shop.change(&["UPDATE users SET name = 'new' WHERE id = 1"]);
    shop.wait_to_see("user:1", Some("new"));
    // And slot and publication are taken away.
    let mut ends = super::changes::feed();
    ends["follows"] = serde_json::json!([]);
    shop.scene.follow(&[ends]);
    let removed = ["HGET", super::changes::STATE, "removed"];
    wait_for("the slot is taken away", LONG, || shop.kept(&removed) == Value::Bulk(b"1".to_vec()));
    relay.stop();
    for mut server in all(&shop.scene.servers) {
        let refused = server.line("ACL LOG").items();
        assert!(refused.is_empty(), "it needs more: {refused:?}");
    }
}
