//! What a hit costs.

use serde_json::json;

use super::{ok, rule, sidecars};
use crate::read_through::Servers;
use crate::support::resp::Client;

/// How many commands a server has carried out, without those of this test.
fn calls(server: &mut Client) -> u64 {
    let stats = server.line("INFO commandstats").text();
    let own = ["cmdstat_info:", "cmdstat_config|resetstat:"];
    let counted = stats.lines().filter(|line| !own.iter().any(|own| line.starts_with(own)));
    counted.filter_map(|line| line.split_once("calls=")?.1.split(',').next()?.parse::<u64>().ok()).sum()
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
