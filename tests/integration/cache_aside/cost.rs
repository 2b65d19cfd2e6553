//! What a hit costs.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use serde_json::json;

use super::{LIMIT, bulk, ok, rule, sidecars, total};
use crate::read_through::Servers;
use crate::support::resp::{Client, Value, encode};
use crate::support::sidecar::Sidecar;
use crate::support::wait_for;

/// Who reads one key at once.
const READERS: usize = 12;

/// How many commands servers have carried out, without those of this test.
fn calls(servers: &mut [Client]) -> u64 {
    let own = ["cmdstat_info:", "cmdstat_config|resetstat:"];
    count(servers, |line| !own.iter().any(|own| line.starts_with(own)))
}

/// How many of one kind.
fn calls_of(kind: &str, servers: &mut [Client]) -> u64 {
    count(servers, |line| line.starts_with(kind))
}

fn count(servers: &mut [Client], counts: impl Fn(&str) -> bool) -> u64 {
    let stats: Vec<String> = servers.iter_mut().map(|server| server.line("INFO commandstats").text()).collect();
    let counted = stats.iter().flat_map(|stats| stats.lines()).filter(|line| counts(line));
    counted.filter_map(|line| line.split_once("calls=")?.1.split(',').next()?.parse::<u64>().ok()).sum()
}

/// A connection to each primary.
fn primaries(servers: &Servers) -> Vec<Client> {
    match servers {
        Servers::Sentinel(servers) => vec![servers.primary().client()],
        Servers::Cluster(servers) => (0..servers.shards()).map(|shard| servers.shard(shard).client()).collect(),
    }
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

/// Whoever wrote the key, and however long it is known to live.
#[test]
fn a_hit_costs_one_command() {
    const KEYS: usize = 500;
    const HITS: usize = 10_000;
    for servers in [Servers::sentinel(), Servers::cluster()] {
        let armed = rule("item", json!({"earlyExpiry": 1.0}), json!({"stale": "1m"}));
        let sidecars = sidecars(&servers, 1, &[armed]);
        let (mut client, mut primaries, mut asked) = (sidecars[0].client(), primaries(&servers), Vec::new());
        for is_foreign in [false, true] {
            let keys: Vec<String> = (0..KEYS).map(|id| format!("item:{is_foreign}{id}")).collect();
            for key in &keys {
                let set = ["SET", key, "v", "EX", "300"];
                assert_eq!(if is_foreign { servers.holder_of(key).call(&set) } else { client.call(&set) }, ok());
            }
            primaries.iter_mut().for_each(|server| drop(server.line("CONFIG RESETSTAT")));
            // A few keys at a time, so that each is read again while it is warm.
            for hits in (0..HITS).collect::<Vec<_>>().chunks(100) {
                let key = |hit: &usize| &keys[hit / 200 * 10 % KEYS + hit % 10];
                client.send(&hits.iter().flat_map(|hit| encode(&["GET", key(hit)])).collect::<Vec<_>>()).unwrap();
                hits.iter().for_each(|hit| assert_eq!(client.read().unwrap(), bulk("v"), "{}", key(hit)));
            }
            let (calls, hits) = (calls(&mut primaries), HITS as u64);
            println!("{calls} commands for {hits} hits, foreign: {is_foreign}");
            // Sentinels and discovery ask now and then, too.
            assert!((hits..=hits * 105 / 100).contains(&calls), "{calls} commands for {hits} hits, foreign: {is_foreign}");
            asked.push(calls_of("cmdstat_pttl:", &mut primaries));
        }
        // How long a key lives is asked for where somebody else wrote it, and where another key has taken its place.
        assert!(asked[0] * 4 < asked[1], "{asked:?} questions");
    }
}
