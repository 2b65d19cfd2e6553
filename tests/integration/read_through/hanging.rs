//! Origins that hang, fail, know nothing or set limits.

use std::time::Duration;

use larder::sidecar::slots::Companion;
use serde_json::json;

use super::{Servers, http_origin, web_rule};
use crate::support::admin::rule_count;
use crate::support::resp::{Client, Value, encode};
use crate::support::wait_for;
use crate::support::web::Web;

const LIMIT: Duration = Duration::from_secs(30);

#[test]
fn a_hanging_origin_holds_nobody_elses_keys() {
    let (servers, web, other) = (Servers::cluster(), Web::start(), Web::start());
    let mut rules = vec![web_rule("item", json!({})), web_rule("other", json!({}))];
    rules[1]["strategy"]["readThrough"]["load"]["origin"] = json!("other");
    let sidecar = servers.sidecar(&[http_origin("web", &web, "4s"), http_origin("other", &other, "4s")], &rules);
    web.put("/item/1", "late");
    web.hold("/item/1");
    let mut hung = sidecar.client();
    let pipeline = [encode(&["GET", "item:1"]), encode(&["GET", "other:0"]), encode(&["SET", "plain", "x"])].concat();
    other.put("/other/0", "of another");
    hung.send(&pipeline).unwrap();
    wait_for("the load to hang", LIMIT, || web.under_way("/item/1") == 1);
    let mut client = sidecar.client();
    for id in 2..20 {
        web.put(&format!("/item/{id}"), "of the same origin");
        other.put(&format!("/other/{id}"), "of another");
        assert_eq!(client.line(&format!("GET item:{id}")).text(), "of the same origin");
        assert_eq!(client.line(&format!("GET other:{id}")).text(), "of another");
        assert_eq!(client.line(&format!("MGET item:{id} other:{id}")).items().len(), 2);
        assert_eq!(client.line(&format!("SET plain:{id} x")), Value::Simple("OK".to_owned()));
    }
    assert_eq!(web.under_way("/item/1"), 1, "all that while the first load has hung");
    // Within the timeout, in order.
    let error = Value::Error("ORIGIN origin `web` gave no answer within 4s".to_owned());
    assert_eq!(hung.read().unwrap(), error);
    assert_eq!(hung.read().unwrap().text(), "of another");
    assert_eq!(hung.read().unwrap(), Value::Simple("OK".to_owned()));
    web.release("/item/1");
    assert_eq!(hung.line("GET item:1").text(), "late");
    assert_eq!(rule_count(&sidecar, "item", "load_errors"), 1);
}

#[test]
fn an_origin_that_hangs_with_all_its_connections_holds_nobody_elses_keys() {
    const CONNECTIONS: usize = 4;
    let (servers, web, other) = (Servers::cluster(), Web::start(), Web::start());
    let mut rules = vec![web_rule("item", json!({})), web_rule("other", json!({}))];
    rules[1]["strategy"]["readThrough"]["load"]["origin"] = json!("other");
    let sidecar = servers.sidecar(&[http_origin("web", &web, "30s"), http_origin("other", &other, "30s")], &rules);
    // More are asked for than the origin has connections.
    let paths: Vec<String> = (0..CONNECTIONS * 3).map(|id| format!("/item/{id}")).collect();
    paths.iter().for_each(|path| {
        web.put(path, "late");
        web.hold(path);
    });
    let mut hung: Vec<Client> = paths.iter().map(|_| sidecar.client()).collect();
    hung.iter_mut().enumerate().for_each(|(id, client)| client.send(&encode(&["GET", &format!("item:{id}")])).unwrap());
    let under_way = || paths.iter().map(|path| web.under_way(path)).sum::<usize>();
    wait_for("all connections to hang", LIMIT, || under_way() == CONNECTIONS);
    wait_for("the others to wait", LIMIT, || rule_count(&sidecar, "item", "misses") == paths.len() as u64);
    let mut client = sidecar.client();
    for id in 0..40 {
        other.put(&format!("/other/{id}"), "of another");
        assert_eq!(client.line(&format!("GET other:{id}")).text(), "of another");
        assert_eq!(client.line(&format!("MGET other:{id} plain")).items().len(), 2);
        assert_eq!(client.line(&format!("SET plain:{id} x")), Value::Simple("OK".to_owned()));
    }
    assert_eq!(under_way(), CONNECTIONS, "all that while the origin has hung");
    paths.iter().for_each(|path| web.release(path));
    hung.iter_mut().for_each(|client| assert_eq!(client.read().unwrap().text(), "late"));
}

#[test]
fn stale_copies_bridge_a_refresh_and_an_outage() {
    let (servers, web) = (Servers::cluster(), Web::start());
    let rules = [web_rule("item", json!({"stale": "1h"}))];
    let sidecar = servers.sidecar(&[http_origin("web", &web, "20s")], &rules);
    let mut client = sidecar.client();
    web.put("/item/1", "first");
    assert_eq!(client.line("GET item:1").text(), "first");
    servers.expire("item:1");
    web.put("/item/1", "second");
    web.hold("/item/1");
    for _ in 0..10 {
        assert_eq!(client.line("GET item:1").text(), "first", "nobody waits for the refresh");
    }
    wait_for("the refresh to begin", LIMIT, || web.visits("/item/1") == 2);
    web.release("/item/1");
    wait_for("the refresh to be seen", LIMIT, || client.line("GET item:1").text() == "second");
    assert_eq!(web.visits("/item/1"), 2);
    servers.expire("item:1");
    web.fail("/item/1", 503);
    for _ in 0..20 {
        assert_eq!(client.line("GET item:1").text(), "second", "the origin is down");
    }
    assert_eq!(client.line("MGET item:1 item:1").items(), vec![Value::Bulk(b"second".to_vec()); 2]);
    assert!(rule_count(&sidecar, "item", "stale") >= 30);
    assert_eq!(client.line("DEL item:1"), Value::Int(0));
    // Without a copy there is nothing to bridge with.
    let Value::Error(text) = client.line("GET item:1") else { panic!("an error") };
    assert!(text.starts_with("ORIGIN origin `web` "), "{text}");
}

#[test]
fn what_shortens_a_keys_life_shortens_that_of_its_stale_copy() {
    let (servers, web) = (Servers::cluster(), Web::start());
    let sidecar = servers.sidecar(&[http_origin("web", &web, "20s")], &[web_rule("item", json!({"stale": "1m"}))]);
    let mut client = sidecar.client();
    web.put("/item/1", "loaded");
    assert_eq!(client.line("GET item:1").text(), "loaded");
    let stale = Companion::Stale.name(b"item:1");
    let left = || servers.holder_of("item:1").call(&[&b"PTTL"[..], &stale]).int();
    assert!(left() > 3_000_000, "{}", left());
    assert_eq!(client.line("EXPIRE item:1 10"), Value::Int(1));
    assert!((1..=70_000).contains(&left()), "{}", left());
    assert_eq!(client.line("GET item:1").text(), "loaded");
}

#[test]
fn what_an_origin_does_not_know_is_remembered_for_a_while() {
    let (servers, web) = (Servers::cluster(), Web::start());
    let rules = [web_rule("brief", json!({"negativeTtl": "300ms"})), web_rule("item", json!({"negativeTtl": "1h"}))];
    let sidecar = servers.sidecar(&[http_origin("web", &web, "20s")], &rules);
    let mut client = sidecar.client();
    for _ in 0..10 {
        assert_eq!(client.line("GET item:1"), Value::Nil);
    }
    assert_eq!(web.visits("/item/1"), 1);
    assert_eq!(rule_count(&sidecar, "item", "negative"), 9);
    assert_eq!(client.line("EXISTS item:1"), Value::Int(0));
    assert_eq!(client.line("STRLEN item:1"), Value::Int(0));
    assert_eq!(client.line("GETRANGE item:1 0 -1").text(), "");
    // A write ends the absence at once.
    assert_eq!(client.line("SET item:1 x"), Value::Simple("OK".to_owned()));
    assert_eq!(client.line("GET item:1").text(), "x");
    assert_eq!(client.line("DEL item:1"), Value::Int(1));
    web.put("/item/1", "known now");
    assert_eq!(client.line("GET item:1").text(), "known now");
    assert_eq!(client.line("GET brief:1"), Value::Nil);
    web.put("/brief/1", "later");
    wait_for("the absence to be forgotten", LIMIT, || client.line("GET brief:1") == Value::Bulk(b"later".to_vec()));
    assert_eq!(web.visits("/brief/1"), 2);
}

#[test]
fn the_origin_limits_how_long_its_answers_are_kept() {
    let (servers, web) = (Servers::cluster(), Web::start());
    let sidecar = servers.sidecar(&[http_origin("web", &web, "20s")], &[web_rule("item", json!({"stale": "1m"}))]);
    let mut client = sidecar.client();
    web.put_limited("/item/1", "brief", "max-age=60");
    web.put_limited("/item/2", "never", "no-store");
    web.put_limited("/item/3", "long", "max-age=31536000");
    assert_eq!(client.line("GET item:1").text(), "brief");
    let ttl = servers.holder_of("item:1").line("PTTL item:1").int();
    assert!((1..=60_000).contains(&ttl), "{ttl}");
    for visit in 1..=3 {
        assert_eq!(client.line("GET item:2").text(), "never");
        assert_eq!(web.visits("/item/2"), visit);
        assert_eq!(servers.holder_of("item:2").line("EXISTS item:2"), Value::Int(0));
    }
    assert_eq!(client.line("GET item:3").text(), "long");
    let ttl = servers.holder_of("item:3").line("PTTL item:3").int();
    assert!((60_001..=3_600_000).contains(&ttl), "{ttl}");
}
