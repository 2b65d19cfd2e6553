//! How long reads wait of whose wait the policy says nothing.

use std::time::{Duration, Instant};

use serde_json::json;

use super::{bulk, item, ok};
use crate::read_through::Servers;
use crate::support::resp::{Client, Value};
use crate::support::sidecar::Sidecar;

/// How many loads are to be known.
const LOADS: usize = 100;

/// How long a read waits in vain for a key whose holder hangs.
fn waited(sidecar: &Sidecar, key: &str) -> Duration {
    let mut holder = sidecar.client();
    assert_eq!(holder.call(&["GET", key]), Value::Nil);
    let (mut waiting, begun) = (sidecar.client(), Instant::now());
    let Value::Error(text) = waiting.call(&["GET", key]) else { panic!("an error") };
    assert!(text.starts_with("TRYAGAIN"), "{text}");
    begun.elapsed()
}

/// What LARDER.EXPLAIN tells of the wait: what the policy says, and what it is now.
fn explained(client: &mut Client) -> [String; 2] {
    let told = client.call(&["LARDER.EXPLAIN", "item:1"]).items();
    let field = |name: &str| told.chunks(2).find(|pair| pair[0].text() == name).expect(name)[1].text();
    [field("wait"), field("waitNow")]
}

#[test]
fn where_loads_are_fast_a_read_does_not_wait_long_for_one_that_hangs() {
    let servers = Servers::sentinel();
    let rules = [item(json!({"lease": "8s", "wait": "4s", "waitFollowsLoads": true}))];
    let sidecar = servers.sidecar(&[], &rules);
    let mut client = sidecar.client();
    assert_eq!(explained(&mut client), ["at most 4s", "4s: fewer than 100 loads are known of late"]);
    let before = waited(&sidecar, "item:before");
    for load in 0..LOADS {
        let key = format!("item:{load}");
        assert_eq!(client.call(&["GET", &key]), Value::Nil);
        assert_eq!(client.call(&["SET", &key, "v"]), ok());
        assert_eq!(client.call(&["GET", &key]), bulk("v"));
    }
    let [most, now] = explained(&mut client);
    assert_eq!(most, "at most 4s");
    assert!(now.contains("99 of 100 loads of late took at most "), "{now}");
    let after = waited(&sidecar, "item:after");
    assert!(after * 2 < before, "before {before:?}, after {after:?}: {now}");
}

#[test]
fn a_wait_that_is_given_is_what_it_is() {
    let servers = Servers::cluster();
    let sidecar = servers.sidecar(&[], &[item(json!({"lease": "8s", "wait": "2s"}))]);
    let mut client = sidecar.client();
    let before = waited(&sidecar, "item:before");
    for load in 0..LOADS {
        let key = format!("item:{load}");
        assert_eq!(client.call(&["GET", &key]), Value::Nil);
        assert_eq!(client.call(&["SET", &key, "v"]), ok());
    }
    let told = client.call(&["LARDER.EXPLAIN", "item:1"]).items();
    assert!(told.chunks(2).any(|pair| pair[0].text() == "wait" && pair[1].text() == "2s"), "{told:?}");
    assert!(told.chunks(2).all(|pair| pair[0].text() != "waitNow"), "{told:?}");
    let after = waited(&sidecar, "item:after");
    assert!(after * 4 > before * 3, "before {before:?}, after {after:?}");
}
