//! What a hit costs.

use serde_json::json;

use super::{LIMIT, ok, rule, sidecars, total};
use crate::read_through::Servers;
use crate::support::resp::{Client, Value};
use crate::support::wait_for;

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
            std::thread::sleep(std::time::Duration::from_millis(60));
            assert_eq!(client.call(&["SET", "item:1", &loads.to_string(), "PX", "1500"]), ok());
        }
        total(&sidecars, "early_refreshes") >= 2
    });
    assert!(reads > 3 * loads, "{loads} loads for {reads} reads");
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
