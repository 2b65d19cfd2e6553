//! Many ask for one key that has expired, and has a stale copy: one load, for which nobody waits.

use std::time::Duration;

use serde_json::json;

use super::{Servers, http_origin, web_rule};
use crate::support::admin::rule_count;
use crate::support::resp::{Client, Value, encode};
use crate::support::sidecar::Sidecar;
use crate::support::wait_for;
use crate::support::web::Web;

const SIDECARS: usize = 5;
const CLIENTS: usize = 1000;
const LIMIT: Duration = Duration::from_secs(30);

fn total(sidecars: &[Sidecar], counter: &str) -> u64 {
    sidecars.iter().map(|sidecar| rule_count(sidecar, "item", counter)).sum()
}

/// All ask, and then all read what they are answered.
fn ask_all(clients: &mut [Client]) -> Vec<Value> {
    clients.iter_mut().for_each(|client| client.send(&encode(&["GET", "item:7"])).unwrap());
    clients.iter_mut().map(|client| client.read().unwrap()).collect()
}

#[test]
fn a_thousand_connections_on_an_expired_key_get_its_stale_copy_while_one_load_is_under_way() {
    for servers in [Servers::sentinel(), Servers::cluster()] {
        let web = Web::start();
        // Whoever waited for the load would wait for longer than a client of this test does.
        let rules = [web_rule("item", json!({"stale": "1h", "lease": "60s", "wait": "60s"}))];
        let sidecars: Vec<Sidecar> = (0..SIDECARS).map(|_| servers.sidecar(&[http_origin("web", &web, "60s")], &rules)).collect();
        let mut clients: Vec<Client> = (0..CLIENTS).map(|index| sidecars[index % SIDECARS].client()).collect();
        web.put("/item/7", "old");
        assert_eq!(clients[0].line("GET item:7").text(), "old");
        servers.expire("item:7");
        web.put("/item/7", "new");
        web.hold("/item/7");
        // The first round begins the load; in the second it is under way.
        for round in 1..=2 {
            let replies = ask_all(&mut clients);
            assert!(replies.iter().all(|reply| *reply == Value::Bulk(b"old".to_vec())), "round {round}: {replies:?}");
            wait_for("the load to come", LIMIT, || web.visits("/item/7") == 2);
            assert_eq!(web.under_way("/item/7"), 1, "round {round}: the answers came before the load's end");
            assert_eq!(total(&sidecars, "stale"), (round * CLIENTS) as u64);
            assert_eq!(total(&sidecars, "loads_saved"), (round * CLIENTS) as u64, "each once, also who joined another's look");
        }
        web.release("/item/7");
        for client in &mut clients[..SIDECARS] {
            wait_for("the new value", LIMIT, || client.line("GET item:7").text() == "new");
        }
        let replies = ask_all(&mut clients);
        assert!(replies.iter().all(|reply| *reply == Value::Bulk(b"new".to_vec())), "{replies:?}");
        assert_eq!((web.visits("/item/7"), total(&sidecars, "loads")), (2, 2));
    }
}
