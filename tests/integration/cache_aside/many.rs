//! Reads of many keys at once.

use std::sync::atomic::{AtomicU64, Ordering};

use serde_json::json;

use super::{bulk, item, ok, sidecars, total};
use crate::read_through::Servers;
use crate::support::resp::{Client, Value};

#[test]
fn an_mget_loads_what_nobody_loads_and_never_waits_then() {
    for servers in [Servers::sentinel(), Servers::cluster()] {
        let sidecars = sidecars(&servers, 2, &[item(json!({}))]);
        let (mut one, mut two) = (sidecars[0].client(), sidecars[1].client());
        assert_eq!(one.line("SET item:3 three"), ok());
        assert_eq!(one.line("GET item:1"), Value::Nil);
        // It waits for nobody, since it loads item:2 itself.
        let reply = two.line("MGET item:1 item:2 item:3 plain item:2").items();
        assert_eq!(reply, [Value::Nil, Value::Nil, bulk("three"), Value::Nil, Value::Nil]);
        assert_eq!(two.line("MSET item:1 1 item:2 2 plain p"), ok());
        // Both filled item:1, under one generation.
        one.line("SET item:1 1");
        assert_eq!(two.line("MGET item:2 item:3 plain").items(), [bulk("2"), bulk("three"), bulk("p")]);
        assert!([bulk("1"), Value::Nil].contains(&servers.holder_of("item:1").line("GET item:1")));
        assert_eq!(total(&sidecars, "leases"), 2);
    }
}

const KEYS: u64 = 30;
const CLIENTS: u64 = 20;
const READS: u64 = 500;

fn random(state: &mut u64, below: u64) -> u64 {
    *state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
    (*state >> 33) % below
}

/// Reads overlapping sets of keys, and loads what it is told to.
fn read_many(client: &mut Client, number: u64, loads: &AtomicU64) {
    let mut state = number + 1;
    for _ in 0..READS {
        let keys: Vec<String> = (0..1 + random(&mut state, 6)).map(|_| format!("item:{}", random(&mut state, KEYS))).collect();
        let mut command = vec!["MGET"];
        command.extend(keys.iter().map(String::as_str));
        let values = match client.call(&command) {
            Value::Error(text) => panic!("nobody waits in vain: {text}"),
            values => values.items(),
        };
        for (key, value) in keys.iter().zip(values) {
            if value == Value::Nil {
                loads.fetch_add(1, Ordering::Relaxed);
                assert_eq!(client.call(&["SET", key, &format!("value of {key}"), "PX", "40"]), ok());
            } else {
                assert_eq!(value, bulk(&format!("value of {key}")));
            }
        }
    }
}

#[test]
fn ten_thousand_overlapping_mgets_all_come_to_an_end() {
    let servers = Servers::cluster();
    let sidecars = sidecars(&servers, 3, &[item(json!({"lease": "10s", "wait": "9s"}))]);
    let loads = AtomicU64::new(0);
    std::thread::scope(|scope| {
        for number in 0..CLIENTS {
            let (mut client, loads) = (sidecars[number as usize % 3].client(), &loads);
            scope.spawn(move || read_many(&mut client, number, loads));
        }
    });
    assert_eq!(total(&sidecars, "wait_timeouts"), 0);
    assert!(total(&sidecars, "woken") > 0 && total(&sidecars, "hits") > 0, "some found values, some waited");
    assert!(loads.load(Ordering::Relaxed) > KEYS);
}
