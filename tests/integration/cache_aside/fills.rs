//! What is stored, and what is not.

use std::time::Duration;

use serde_json::json;

use super::{LIMIT, bulk, item, ok, rule, sidecars, total};
use crate::read_through::Servers;
use crate::support::admin::rule_count;
use crate::support::resp::{Client, Value, encode};
use crate::support::wait_for;

#[test]
fn an_update_behind_a_fill_is_never_lost() {
    for servers in [Servers::sentinel(), Servers::cluster()] {
        let sidecars = sidecars(&servers, 1, &[item(json!({}))]);
        for (id, pipelined) in [(1, false), (2, true)] {
            let key = format!("item:{id}");
            let mut client = sidecars[0].client();
            assert_eq!(client.call(&["GET", &key]), Value::Nil);
            let (a, b) = (encode(&["SET", &key, "a"]), encode(&["SET", &key, "b"]));
            if pipelined {
                client.send(&[a, b, encode(&["GET", &key])].concat()).unwrap();
            } else {
                client.send(&a).unwrap();
                assert_eq!(client.read().unwrap(), ok());
                client.send(&[b, encode(&["GET", &key])].concat()).unwrap();
            }
            let replies: Vec<Value> = (0..if pipelined { 3 } else { 2 }).map(|_| client.read().unwrap()).collect();
            let last = replies.last().unwrap();
            assert!([bulk("b"), Value::Nil].contains(last), "{key}: {replies:?}");
            assert_ne!(servers.holder_of(&key).call(&["GET", &key]), bulk("a"));
        }
        // Without a miss before it, a write is an update and stays.
        let mut client = sidecars[0].client();
        assert_eq!((client.line("SET item:3 a"), client.line("SET item:3 b")), (ok(), ok()));
        assert_eq!(client.line("GET item:3"), bulk("b"));
    }
}

#[test]
fn a_late_fill_never_undoes_what_another_pod_did() {
    for servers in [Servers::sentinel(), Servers::cluster()] {
        let sidecars = sidecars(&servers, 2, &[item(json!({}))]);
        let changes = ["DEL", "UNLINK", "SET newer", "APPEND newer", "LARDER.INVALIDATE", "MSET newer", "MULTI", "SETEX newer"];
        for (id, change) in changes.iter().enumerate() {
            let key = format!("item:{id}");
            let (mut loader, mut other) = (sidecars[0].client(), sidecars[1].client());
            assert_eq!(loader.call(&["GET", &key]), Value::Nil);
            match change.split_once(' ') {
                Some(("SETEX", value)) => drop(other.call(&["SETEX", &key, "100", value])),
                Some((name, value)) => drop(other.call(&[name, &key, value])),
                None if *change == "MULTI" => {
                    other.line("MULTI");
                    other.call(&["SET", &key, "newer"]);
                    other.line("EXEC");
                }
                None => drop(other.call(&[change, &key.as_str()])),
            }
            assert_eq!(loader.call(&["SET", &key, "older"]), ok(), "{change}");
            let held = servers.holder_of(&key).call(&["GET", &key]);
            assert_ne!(held, bulk("older"), "{change}");
            // And by its own kind of write, it is not.
            assert_eq!(loader.call(&["SET", &key, "as new"]), ok());
            let held = servers.holder_of(&key).call(&["GET", &key]);
            assert!([bulk("as new"), Value::Nil].contains(&held), "{change}: {held:?}");
        }
        assert!(total(&sidecars, "late_fills") >= changes.len() as u64);
    }
}

/// A pool lends a connection whose load outlasts its lease to somebody who reads the same key, and the key is deleted before or after
/// that: what the first one loaded is older than the deletion, whatever connection it comes over.
#[test]
fn a_load_that_outlasts_its_lease_does_not_pass_for_a_newer_one_over_its_connection() {
    const LEASE: Duration = Duration::from_secs(1);
    for servers in [Servers::sentinel(), Servers::cluster()] {
        let sidecars = sidecars(&servers, 2, &[item(json!({"lease": "1s", "wait": "900ms"}))]);
        let mut lent: Vec<Client> = (0..3).map(|_| sidecars[0].client()).collect();
        let (mut pooled, mut other) = (sidecars[0].client(), sidecars[1].client());
        let keys: Vec<String> = (0..lent.len()).map(|id| format!("item:{id}")).collect();
        for (client, key) in lent.iter_mut().zip(&keys) {
            assert_eq!(client.call(&["GET", key]), Value::Nil);
        }
        // What has to pass is the lease's time, by the sidecar's clock too.
        std::thread::sleep(LEASE * 13 / 10);
        for (id, (client, key)) in lent.iter_mut().zip(&keys).enumerate() {
            let held = || servers.holder_of(key).call(&["GET", key]);
            let delete = |other: &mut Client| _ = other.call(&["DEL", key]);
            if id < 2 {
                delete(&mut other);
            }
            assert_eq!(client.call(&["GET", key]), Value::Nil, "it is lent to another, who loads too");
            if id == 2 {
                assert_eq!(client.call(&["SET", key, "new"]), ok());
                assert_eq!(held(), bulk("new"), "nothing was written since either began");
                // And until the second SET cannot be the first one's again.
                std::thread::sleep(LEASE * 3 / 10);
                delete(&mut other);
            }
            let late = if id == 1 { &mut pooled } else { client };
            assert_eq!(late.call(&["SET", key, "old"]), ok());
            assert_eq!(held(), Value::Nil, "{key}");
        }
    }
}

/// A script takes only so many arguments.
#[test]
fn an_mset_of_too_many_keys_for_a_script_is_carried_out_and_leaves_nothing_doubtful() {
    let servers = Servers::sentinel();
    let sidecars = sidecars(&servers, 1, &[item(json!({}))]);
    let (mut loader, mut other) = (sidecars[0].client(), sidecars[0].client());
    let held = |key: &str| servers.holder_of(key).call(&["GET", key]);
    assert_eq!(loader.line("GET item:1"), Value::Nil);
    let keys: Vec<String> = (0..9_000).map(|number| format!("unmatched:{number}")).collect();
    let pairs = keys.iter().flat_map(|key| [key.as_str(), "v"]);
    let mset: Vec<&str> = ["MSET", "item:1", "of many"].into_iter().chain(pairs).collect();
    assert_eq!(other.call(&mset), ok());
    assert_eq!((held("item:1"), held(&keys[0]), held(&keys[8_999])), (Value::Nil, bulk("v"), bulk("v")));
    assert_eq!(loader.line("SET item:1 older"), ok());
    assert_eq!(held("item:1"), Value::Nil, "it may have been loaded before");
    assert_eq!(loader.line("GET item:1"), Value::Nil);
    assert_eq!(loader.line("SET item:1 new"), ok());
    assert_eq!(held("item:1"), bulk("new"));
}

#[test]
fn a_deletion_costs_the_loads_that_it_meets_and_the_next_one_is_stored() {
    for servers in [Servers::sentinel(), Servers::cluster()] {
        let sidecars = sidecars(&servers, 3, &[item(json!({}))]);
        let (mut first, mut second, mut third) = (sidecars[0].client(), sidecars[1].client(), sidecars[2].client());
        assert_eq!(first.line("GET item:1"), Value::Nil);
        assert_eq!(second.line("DEL item:1"), Value::Int(0));
        assert_eq!(second.line("GET item:1"), Value::Nil, "it loads anew");
        third.send(&encode(&["GET", "item:1"])).unwrap();
        wait_for("the third to wait", LIMIT, || rule_count(&sidecars[2], "item", "misses") == 1);
        // What the first one loaded may be older than the deletion, or newer than what the second loads: neither is stored.
        assert_eq!(first.line("SET item:1 first"), ok());
        assert_eq!(second.line("SET item:1 second"), ok());
        assert_eq!(third.read().unwrap(), Value::Nil, "it was not told to load beside them");
        assert_eq!(third.line("SET item:1 third"), ok());
        assert_eq!(first.line("GET item:1"), bulk("third"));
        assert_eq!((total(&sidecars, "leases"), total(&sidecars, "late_fills")), (3, 2));
    }
}

#[test]
fn a_fill_comes_by_any_kind_of_set_and_any_connection_of_the_pod() {
    let servers = Servers::sentinel();
    let sidecars = sidecars(&servers, 1, &[item(json!({})), rule("old", json!({}), json!({"stale": "1h"}))]);
    let (mut client, mut pooled, mut server) = (sidecars[0].client(), sidecars[0].client(), servers.holder_of(""));
    let large = "x".repeat(200_000);
    let fills: [&[&str]; 9] = [
        &["SET", "KEY", "v"],
        &["SET", "KEY", "v", "EX", "100", "NX"],
        &["SETEX", "KEY", "100", "v"],
        &["PSETEX", "KEY", "100000", "v"],
        &["SETNX", "KEY", "v"],
        &["GETSET", "KEY", "v"],
        &["SET", "KEY", "v", "GET", "PX", "100000"],
        &["MSET", "KEY", "v", "other", "w"],
        &["SET", "KEY", &large],
    ];
    for (id, fill) in fills.iter().enumerate() {
        for (family, by) in [("item", &mut pooled), ("old", &mut client)] {
            let key = format!("{family}:{id}");
            let fill: Vec<&str> = fill.iter().map(|word| if *word == "KEY" { key.as_str() } else { *word }).collect();
            let mut reader = sidecars[0].client();
            assert_eq!(reader.call(&["GET", &key]), Value::Nil);
            let reply = by.call(&fill);
            assert!([ok(), Value::Int(1), Value::Nil].contains(&reply), "{fill:?}: {reply:?}");
            let value = if fill.contains(&large.as_str()) { &large } else { "v" };
            assert_eq!(server.call(&["GET", &key]), bulk(value), "{fill:?}");
            let ttl = server.call(&["PTTL", &key]).int();
            assert!((1..=3_600_000).contains(&ttl), "{fill:?}: {ttl}");
        }
    }
    assert_eq!(server.line("GET other"), bulk("w"));
    assert_eq!((total(&sidecars, "ambiguous_fills"), total(&sidecars, "late_fills")), (0, 0));
}

#[test]
fn writes_in_transactions_are_never_fills() {
    let servers = Servers::cluster();
    let sidecars = sidecars(&servers, 1, &[item(json!({}))]);
    let mut client = sidecars[0].client();
    assert_eq!(client.line("GET item:1"), Value::Nil);
    assert_eq!(client.line("MULTI"), ok());
    client.line("SET item:1 old");
    client.line("GET item:1");
    assert_eq!(client.line("EXEC").items()[0], ok());
    assert_eq!(servers.holder_of("item:1").line("GET item:1"), Value::Nil, "it may have been loaded before another's write");
    client.line("MULTI");
    client.line("SET item:2 v");
    assert_eq!(client.line("EXEC").items(), [ok()]);
    assert_eq!(client.line("GET item:2"), bulk("v"), "there was no miss before it");
    // Nobody is held up by a read under WATCH, or within MULTI.
    let mut watching = sidecars[0].client();
    watching.line("WATCH item:{x}3");
    assert_eq!(watching.line("GET item:{x}3"), Value::Nil);
    watching.line("MULTI");
    watching.line("GET item:{x}4");
    assert_eq!(watching.line("EXEC").items(), [Value::Nil]);
    for key in ["item:{x}3", "item:{x}4"] {
        let lease = larder::sidecar::slots::Companion::Lease.name(key.as_bytes());
        assert_eq!(servers.holder_of(key).call(&[&b"EXISTS"[..], &lease]), Value::Int(0));
    }
    // Nor by a script, whose nil nobody is told of.
    let script = "return redis.call('GET', KEYS[1])";
    assert_eq!(watching.call(&["EVAL", script, "1", "item:{x}5"]), Value::Nil);
    assert_eq!(sidecars[0].client().line("GET item:{x}5"), Value::Nil, "it takes the lease");
    assert_eq!(total(&sidecars, "leases"), 2);
    // But what they were told is a miss as any: a value from before another's write is not stored.
    for key in ["item:{x}3", "item:{x}4"] {
        let mut other = sidecars[0].client();
        other.call(&["DEL", key]);
        assert_eq!(watching.call(&["SET", key, "late"]), ok());
        assert_eq!(servers.holder_of(key).call(&["GET", key]), Value::Nil, "{key}");
    }
}

#[test]
fn stale_copies_are_served_while_one_loads() {
    let servers = Servers::cluster();
    let sidecars = sidecars(&servers, 2, &[rule("item", json!({}), json!({"stale": "1h"}))]);
    let (mut one, mut two) = (sidecars[0].client(), sidecars[1].client());
    assert_eq!(one.line("SET item:1 first"), ok());
    servers.expire("item:1");
    assert_eq!(one.line("GET item:1"), Value::Nil, "it loads");
    for _ in 0..5 {
        assert_eq!(two.line("GET item:1"), bulk("first"));
        assert_eq!(sidecars[0].client().line("GET item:1"), bulk("first"));
    }
    assert_eq!(total(&sidecars, "stale"), 10);
    assert_eq!(one.line("SET item:1 second"), ok());
    assert_eq!(two.line("GET item:1"), bulk("second"));
    servers.expire("item:1");
    assert_eq!(two.line("GET item:1"), Value::Nil);
    assert_eq!(one.line("GET item:1"), bulk("second"), "the fill wrote the copy too");
    // A deletion takes the copy along.
    assert_eq!(two.line("DEL item:1"), Value::Int(0));
    assert_eq!(one.line("GET item:1"), Value::Nil);
}

#[test]
fn a_transaction_leaves_nothing_doubtful_and_ends_no_miss_that_it_may_not_end() {
    for servers in [Servers::sentinel(), Servers::cluster()] {
        let sidecars = sidecars(&servers, 2, &[rule("item", json!({"lease": "4s", "wait": "3s"}), json!({"stale": "1h"}))]);
        let (mut loader, mut other) = (sidecars[0].client(), sidecars[1].client());
        assert_eq!(loader.line("GET item:1"), Value::Nil);
        other.line("DEL item:1");
        assert_eq!(loader.line("MULTI"), ok());
        loader.line("SET item:1 older EX 60");
        assert_eq!(loader.line("EXEC"), Value::Array(vec![ok()]));
        // The copy would be served to whoever misses while another loads.
        assert_eq!(other.line("GET item:1"), Value::Nil);
        let mut third = sidecars[1].client();
        third.send(&encode(&["GET", "item:1"])).unwrap();
        assert_eq!(other.line("SET item:1 newer"), ok());
        assert_eq!(third.read().unwrap(), bulk("newer"));

        assert_eq!(loader.line("GET item:2"), Value::Nil);
        assert_eq!(loader.line("MULTI"), ok());
        loader.line("SET item:2 older");
        assert_eq!(loader.line("DISCARD"), ok());
        other.line("DEL item:2");
        // For a quarter of a lease, any further SET would be taken for the fill's repetition.
        std::thread::sleep(Duration::from_millis(1_100));
        assert_eq!(loader.line("SET item:2 older"), ok());
        assert_eq!(servers.holder_of("item:2").line("GET item:2"), Value::Nil, "the load was before the deletion");
    }
}
