//! Locks and existence checks: keys that are looked at, and seldom filled. Their rule gives its leases up for a while, and says so.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use serde_json::json;

use super::{LIMIT, bulk, item, ok, sidecars, total};
use crate::read_through::Servers;
use crate::support::admin::rule_count;
use crate::support::resp::{Client, Value, encode};
use crate::support::sidecar::Sidecar;
use crate::support::wait_for;

/// How LARDER.EXPLAIN begins to tell of leases, where there are and where there are none.
const ARMED: &str = "one client loads a missing key";
const DISARMED: &str = "none for a while";

/// What LARDER.EXPLAIN says of the leases of `item`.
fn leases(client: &mut Client) -> String {
    let facts = client.line("LARDER.EXPLAIN item:x").items();
    let fact = facts.chunks(2).find(|fact| fact[0] == bulk("leases"));
    fact.map(|fact| fact[1].text()).expect("it tells of leases")
}

/// Has a rule meet misses that nobody fills, until it gives its leases up.
fn disarm(sidecar: &Sidecar) {
    assert!(leases(&mut sidecar.client()).starts_with(ARMED));
    for id in 0..64 {
        assert_eq!(sidecar.client().line(&format!("GET item:{id}")), Value::Nil);
    }
    wait_for("the rule to be disarmed", LIMIT, || rule_count(sidecar, "item", "disarmed") == 1);
    assert!(leases(&mut sidecar.client()).starts_with(DISARMED));
    assert!(sidecar.log().contains("seldom filled"), "{}", sidecar.log());
}

#[test]
fn a_rule_whose_misses_are_never_filled_has_no_leases_for_a_while_and_says_so() {
    /// A minute, on a machine that is busy.
    const LONG: Duration = Duration::from_secs(120);
    let servers = Servers::sentinel();
    let sidecars = sidecars(&servers, 1, &[item(json!({}))]);
    disarm(&sidecars[0]);
    // Now nobody waits.
    let (mut holder, mut client) = (sidecars[0].client(), sidecars[0].client());
    assert_eq!((holder.line("GET item:a"), client.line("GET item:a")), (Value::Nil, Value::Nil));
    assert_eq!(holder.line("SET item:a v"), ok());
    assert_eq!(client.line("GET item:a"), bulk("v"));
    // It tries again.
    wait_for("the rule to have leases again", LONG, || leases(&mut client).starts_with(ARMED));
    let (leased, missed) = (total(&sidecars, "leases"), total(&sidecars, "misses"));
    assert_eq!(holder.line("GET item:b"), Value::Nil);
    client.send(&encode(&["GET", "item:b"])).unwrap();
    wait_for("the other to have missed", LIMIT, || total(&sidecars, "misses") == missed + 2);
    assert_eq!(client.poll(), None, "it waits");
    assert_eq!(holder.line("SET item:b v"), ok());
    assert_eq!(client.read().unwrap(), bulk("v"));
    assert_eq!((total(&sidecars, "leases"), total(&sidecars, "disarmed")), (leased + 1, 1));
}

/// Ends a lock, if it is still who took it that does.
const RELEASE: &str = "if redis.call('GET', KEYS[1]) == ARGV[1] then return redis.call('DEL', KEYS[1]) end return 0";
const LOCK: &str = "item:lock";

/// Takes a lock again and again, as libraries for locks do: looks whether it is free, takes it by `SET NX PX`, and releases it by
/// a script. Others do the same; `taken` tells whether one has it.
fn take_turns(mut client: Client, name: usize, taken: &AtomicBool) {
    const TURNS: usize = 15;
    let began = Instant::now();
    for turn in 0..TURNS {
        let token = format!("{name}-{turn}");
        loop {
            assert!(began.elapsed() < LIMIT * 2, "{token} is never taken");
            if client.call(&["GET", LOCK]) != Value::Nil {
                continue;
            }
            let reply = client.call(&["SET", LOCK, &token, "NX", "PX", "60000"]);
            if reply == ok() {
                break;
            }
            assert_eq!(reply, Value::Nil);
        }
        assert!(!taken.swap(true, Ordering::SeqCst), "two have taken the lock, one of them with {token}");
        assert_eq!(client.call(&["GET", LOCK]), bulk(&token));
        assert!((1..=60_000).contains(&client.call(&["PTTL", LOCK]).int()));
        assert_eq!(client.call(&["SET", LOCK, "another", "NX", "PX", "60000"]), Value::Nil);
        assert_eq!(client.call(&["EVAL", RELEASE, "1", LOCK, "another"]), Value::Int(0));
        assert!(taken.swap(false, Ordering::SeqCst));
        assert_eq!(client.call(&["EVAL", RELEASE, "1", LOCK, &token]), Value::Int(1), "{token} was lost");
    }
}

#[test]
fn locks_under_a_rule_that_has_given_its_leases_up_exclude_each_other() {
    for servers in [Servers::sentinel(), Servers::cluster()] {
        let sidecars = sidecars(&servers, 2, &[item(json!({}))]);
        sidecars.iter().for_each(disarm);
        let taken = AtomicBool::new(false);
        std::thread::scope(|scope| {
            for name in 0..8 {
                let (client, taken) = (sidecars[name % 2].client(), &taken);
                scope.spawn(move || take_turns(client, name, taken));
            }
        });
        assert_eq!(servers.holder_of(LOCK).call(&["EXISTS", LOCK]), Value::Int(0));
        assert_eq!((total(&sidecars, "ambiguous_fills"), total(&sidecars, "late_fills")), (0, 0));
        assert!(
            sidecars.iter().all(|sidecar| leases(&mut sidecar.client()).starts_with(DISARMED)),
            "it took too long to show anything"
        );
    }
}
