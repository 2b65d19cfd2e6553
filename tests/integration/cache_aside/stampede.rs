//! Many miss one key at once: one loads.

use serde_json::json;

use super::{LIMIT, first_answered, item, ok, sidecars, total};
use crate::read_through::Servers;
use crate::support::resp::{Client, Value, encode};
use crate::support::wait_for;

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
            assert_eq!(servers.holder_of("item:7").call(&GET).text(), value);
            servers.expire("item:7");
        }
    }
}
