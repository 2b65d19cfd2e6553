//! Many miss one key at once: one loads.

use std::time::{Duration, Instant};

use serde_json::json;

use super::{LIMIT, bulk, first_answered, item, ok, sidecars, total};
use crate::read_through::Servers;
use crate::support::resp::{Client, Value, encode};
use crate::support::wait_for;

/// Loads that take longer than their leases.
#[test]
fn of_many_connections_over_five_sidecars_one_loads_a_lease_while_nobody_stores() {
    const LEASE: Duration = Duration::from_millis(1500);
    let servers = Servers::cluster();
    let sidecars = sidecars(&servers, 5, &[item(json!({"lease": "1500ms", "wait": "700ms"}))]);
    let mut clients: Vec<Client> = (0..200).map(|index| sidecars[index % 5].client()).collect();
    clients.iter_mut().for_each(|client| client.send(&encode(&GET)).unwrap());
    let (mut told, mut repeated, mut since) = (Vec::new(), 0, Instant::now());
    // Three leases without a store would be the most that anybody waits for.
    wait_for("two to be told of the miss", LIMIT, || {
        for (index, client) in clients.iter_mut().enumerate() {
            match client.poll() {
                None => {}
                Some(Value::Nil) => {
                    assert!(told.is_empty() || since.elapsed() > LEASE * 9 / 10, "two loads within a lease");
                    since = Instant::now();
                    told.push(index);
                }
                Some(Value::Error(text)) => {
                    assert!(text.starts_with("TRYAGAIN"), "{text}");
                    repeated += 1;
                    client.send(&encode(&GET)).unwrap();
                }
                Some(value) => panic!("{value:?}"),
            }
        }
        told.len() == 2
    });
    assert!(repeated > 0, "somebody waited in vain");
    // The load of the first, whose lease is over, is as good as any: nothing was written meanwhile.
    assert_eq!(clients[told[0]].line("SET item:7 v"), ok());
    for (index, client) in clients.iter_mut().enumerate().filter(|(index, _)| !told.contains(index)) {
        let reply = client.read().unwrap();
        let reply = if matches!(reply, Value::Error(_)) { client.call(&GET) } else { reply };
        assert_eq!(reply, bulk("v"), "client {index}");
    }
    assert_eq!(total(&sidecars, "leases"), 2);
}

const GET: [&str; 2] = ["GET", "item:7"];

#[test]
fn of_a_thousand_connections_over_five_sidecars_one_loads() {
    for servers in [Servers::sentinel(), Servers::cluster()] {
        let sidecars = sidecars(&servers, 5, &[item(json!({}))]);
        let mut clients: Vec<Client> = (0..1000).map(|index| sidecars[index % 5].client()).collect();
        for round in 1..=2 {
            clients.iter_mut().for_each(|client| client.send(&encode(&GET)).unwrap());
            let (holder, reply) = first_answered(&mut clients);
            assert_eq!(reply, Value::Nil);
            wait_for("all to have missed", LIMIT, || total(&sidecars, "misses") == 1000 * round);
            assert_eq!(total(&sidecars, "leases"), round);
            let value = format!("value {round}");
            assert_eq!(clients[holder].call(&["SET", "item:7", &value]), ok());
            for (index, client) in clients.iter_mut().enumerate().filter(|(index, _)| *index != holder) {
                assert_eq!(client.read().unwrap(), Value::Bulk(value.clone().into_bytes()), "client {index} in round {round}");
            }
            assert_eq!((total(&sidecars, "leases"), total(&sidecars, "woken")), (round, 999 * round));
            clients.iter_mut().take(10).for_each(|client| assert_eq!(client.call(&GET).text(), value));
            assert_eq!((total(&sidecars, "hits"), total(&sidecars, "loads_saved")), (10 * round, 999 * round), "hits are hits");
            assert_eq!(servers.holder_of("item:7").call(&GET).text(), value);
            servers.expire("item:7");
        }
    }
}
