//! What a hit costs.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use serde_json::json;

use super::{LIMIT, bulk, ok, rule, sidecars, total};
use crate::read_through::Servers;
use crate::support::resp::{Client, Value};
use crate::support::sidecar::Sidecar;
use crate::support::wait_for;

/// Who reads one key at once.
const READERS: usize = 12;

/// How many commands a server has carried out, without those of this test.
fn calls(server: &mut Client) -> u64 {
    let stats = server.line("INFO commandstats").text();
    let own = ["cmdstat_info:", "cmdstat_config|resetstat:"];
    let counted = stats.lines().filter(|line| !own.iter().any(|own| line.starts_with(own)));
    counted.filter_map(|line| line.split_once("calls=")?.1.split(',').next()?.parse::<u64>().ok()).sum()
}

#[test]
fn a_hot_key_is_loaded_anew_before_it_expires_by_one_reader() {
    let servers = Servers::sentinel();
    let armed = rule("item", json!({"earlyExpiry": 1.0, "lease": "2s", "wait": "1900ms"}), json!({}));
    let sidecars = sidecars(&servers, 1, &[armed]);
    let mut client = sidecars[0].client();
    assert_eq!(client.line("SET item:1 0 PX 1500"), ok());
    let (mut loads, mut reads) = (0, 0);
    wait_for("two loads ahead of time", LIMIT, || {
        reads += 1;
        if client.line("GET item:1") == Value::Nil {
            loads += 1;
            // Others still get the value.
            if servers.holder_of("item:1").line("EXISTS item:1").int() == 1 {
                assert_ne!(sidecars[0].client().line("GET item:1"), Value::Nil);
            }
            std::thread::sleep(Duration::from_millis(60));
            assert_eq!(client.call(&["SET", "item:1", &loads.to_string(), "PX", "1500"]), ok());
        }
        total(&sidecars, "early_refreshes") >= 2
    });
    assert!(reads > 3 * loads, "{loads} loads for {reads} reads");
}

/// How long a value lives that [`read_and_load`] stores, and how long a load takes.
const TTL: Duration = Duration::from_millis(1400);
const LOAD: Duration = Duration::from_millis(20);

/// Clients of several sidecars read a key again and again, and load it where there is none, for as long as it takes to store it `times`
/// times. How many loads they made, and how long that took. No two loads bring the same value.
fn read_and_load(sidecars: &[Sidecar], times: u64) -> (u64, Duration) {
    let (loads, stored, began) = (AtomicU64::new(0), AtomicU64::new(0), Instant::now());
    std::thread::scope(|scope| {
        for number in 0..READERS {
            let (mut client, loads, stored) = (sidecars[number % sidecars.len()].client(), &loads, &stored);
            scope.spawn(move || {
                while stored.load(Ordering::Relaxed) < times {
                    match client.line("GET item:1") {
                        Value::Nil => {
                            let load = loads.fetch_add(1, Ordering::Relaxed);
                            std::thread::sleep(LOAD);
                            if client.line(&format!("SET item:1 load-{load} PX {}", TTL.as_millis())) == ok() {
                                stored.fetch_add(1, Ordering::Relaxed);
                            }
                        }
                        value => assert!(value.text().starts_with("load-"), "{value:?}"),
                    }
                    std::thread::sleep(Duration::from_millis(1));
                }
            });
        }
    });
    (loads.into_inner(), began.elapsed())
}

/// In virtual time, at 100 to 10,000 reads a second: the tests of `engine::early`.
#[test]
fn an_expiry_costs_one_load_and_without_leases_many() {
    const STORES: u64 = 6;
    let servers = Servers::sentinel();
    let armed = rule("item", json!({"earlyExpiry": 1.0, "lease": "5s", "wait": "4s"}), json!({}));
    let protected = sidecars(&servers, 3, &[armed]);
    let (loads, took) = read_and_load(&protected, STORES);
    // Each load makes the key live for a TTL. Its successor comes early, but not by half of that.
    let most = 1.0 + 2.0 * took.as_secs_f64() / TTL.as_secs_f64();
    assert!(loads as f64 <= most, "{loads} loads in {took:?}");
    assert_eq!(total(&protected, "leases") + total(&protected, "early_refreshes"), loads);
    servers.expire("item:1");
    let plain = json!({"name": "item", "keys": "item:{id}", "strategy": {"cacheAside": {
        "ttl": {"default": "1h", "max": "2h", "jitter": "10%"}}}});
    let bare = sidecars(&servers, 3, &[plain]);
    // Every reader loads at each expiry: they are all there before the first has stored.
    let (alone, took) = read_and_load(&bare, STORES * READERS as u64);
    let expiries = 1.0 + took.as_secs_f64() / TTL.as_secs_f64();
    assert!(alone as f64 > 3.0 * expiries, "{alone} loads in {took:?}");
}

#[test]
fn the_life_of_a_key_is_known_from_what_is_stored() {
    let servers = Servers::sentinel();
    let sidecars = sidecars(&servers, 1, &[rule("item", json!({"earlyExpiry": 1.0}), json!({}))]);
    let (mut client, mut server) = (sidecars[0].client(), servers.holder_of(""));
    server.line("CONFIG RESETSTAT");
    // Each write tells; no read asks.
    for id in 0..20 {
        assert_eq!(client.line(&format!("SET item:{id} v EX 300")), ok());
    }
    (0..200).for_each(|read| assert_eq!(client.line(&format!("GET item:{}", read % 20)), bulk("v")));
    assert!(!server.line("INFO commandstats").text().contains("cmdstat_pttl:"), "the sidecar asked");
    // What has another end by now is asked for.
    assert_eq!(client.line("EXPIRE item:1 200"), Value::Int(1));
    (0..100).for_each(|_| assert_eq!(client.line("GET item:1"), bulk("v")));
    wait_for("the sidecar to ask", LIMIT, || server.line("INFO commandstats").text().contains("cmdstat_pttl:"));
}

#[test]
fn a_hit_costs_one_command() {
    const HITS: u64 = 2_000;
    let servers = Servers::sentinel();
    let armed = rule("item", json!({"earlyExpiry": 1.0}), json!({"stale": "1m"}));
    let sidecars = sidecars(&servers, 1, &[armed]);
    let (mut client, mut server) = (sidecars[0].client(), servers.holder_of(""));
    assert_eq!(client.line("SET item:1 v EX 300"), ok());
    server.line("CONFIG RESETSTAT");
    (0..HITS).for_each(|_| assert_eq!(client.line("GET item:1").text(), "v"));
    let calls = calls(&mut server);
    // Sentinels and discovery ask now and then, too.
    assert!((HITS..=HITS * 105 / 100).contains(&calls), "{calls} commands for {HITS} hits");
}
