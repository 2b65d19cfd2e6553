//! A cache that takes no writes keeps nobody from what the origin knows.

use std::time::Duration;

use serde_json::json;

use super::{Servers, http_origin, web_rule};
use crate::support::admin::rule_count;
use crate::support::resp::{Client, Value, encode};
use crate::support::wait_for;
use crate::support::web::Web;

const LIMIT: Duration = Duration::from_secs(30);

#[test]
fn a_full_cache_is_read_past_and_filled_again_once_it_has_room() {
    for servers in [Servers::sentinel(), Servers::cluster()] {
        let web = Web::start();
        let sidecar = servers.sidecar(&[http_origin("web", &web, "20s")], &[web_rule("item", json!({"negativeTtl": "1h"}))]);
        let mut clients: Vec<Client> = (0..20).map(|_| sidecar.client()).collect();
        (1..=3).for_each(|id| web.put(&format!("/item/{id}"), "loaded"));
        assert_eq!(clients[0].line("GET item:1").text(), "loaded");
        let ids = 1..=4;
        let limit = |bytes: &str| {
            for id in ids.clone() {
                let mut server = servers.holder_of(&format!("item:{id}"));
                assert_eq!(server.line(&format!("CONFIG SET maxmemory {bytes}")), Value::Simple("OK".to_owned()));
            }
        };
        limit("1");
        assert!(matches!(clients[0].line("SET item:1 x"), Value::Error(text) if text.starts_with("OOM ")), "it is full");
        // What is there is a hit; what is not is loaded once for all who have asked by then, and once more for those who have asked
        // since, and stored nowhere.
        web.hold("/item/2");
        clients.iter_mut().for_each(|client| client.send(&encode(&["GET", "item:2"])).unwrap());
        wait_for("all to have missed", LIMIT, || rule_count(&sidecar, "item", "misses") == 21);
        wait_for("a load to be under way", LIMIT, || web.under_way("/item/2") == 1);
        web.release("/item/2");
        clients.iter_mut().for_each(|client| assert_eq!(client.read().unwrap().text(), "loaded"));
        let visits = web.visits("/item/2");
        assert!((1..=2).contains(&visits), "{visits}");
        let many = clients[0].line("MGET item:1 item:2 item:3 item:4").items();
        assert_eq!(
            many,
            [Value::Bulk(b"loaded".to_vec()), Value::Bulk(b"loaded".to_vec()), Value::Bulk(b"loaded".to_vec()), Value::Nil]
        );
        assert_eq!((web.visits("/item/1"), web.visits("/item/2"), web.visits("/item/3")), (1, visits + 1, 1));
        web.fail("/item/5", 500);
        assert!(matches!(clients[0].line("GET item:5"), Value::Error(text) if text.starts_with("ORIGIN ")));
        assert_eq!(rule_count(&sidecar, "item", "load_errors"), 1);
        limit("0");
        (0..3).for_each(|_| assert_eq!(clients[0].line("GET item:3").text(), "loaded"));
        assert_eq!(web.visits("/item/3"), 2);
        assert_eq!(servers.holder_of("item:3").line("GET item:3").text(), "loaded");
    }
}
