//! `/livez` and `/readyz` in a sidecar's life: before there is a server, while it serves, and at its end.

use std::time::Duration;

use serde_json::json;

use crate::read_through::{Servers, http_origin, policy, web_rule};
use crate::support::admin::get;
use crate::support::resp::{Value, encode};
use crate::support::server::{PRIMARY_NAME, free_port};
use crate::support::sidecar::{Sidecar, bypass};
use crate::support::wait_for;
use crate::support::web::Web;

const LIMIT: Duration = Duration::from_secs(30);

/// The sidecar lives, and is not ready, for a reason that contains `reason`.
#[track_caller]
fn assert_unready(sidecar: &Sidecar, reason: &str) {
    let (status, body) = get(sidecar, "/readyz");
    assert!(status == 503 && body.contains(reason), "{status} {body}");
    assert_eq!(get(sidecar, "/livez").0, 200);
}

#[test]
fn ready_means_that_a_server_is_known_and_the_end_has_not_come() {
    let (servers, web) = (Servers::cluster(), Web::start());
    web.put("/item/1", "loaded");
    web.hold("/item/1");
    let nobody = format!("127.0.0.1:{}", free_port());
    for topology in
        [json!({"cluster": {"seeds": [nobody]}}), json!({"sentinel": {"master": PRIMARY_NAME, "sentinels": [nobody]}})]
    {
        let mut sidecar = Sidecar::start_alone(&bypass(json!({"name": "main", "topology": topology})));
        assert_unready(&sidecar, "no server");
        // A client is told, too, once its patience has ended.
        assert!(matches!(sidecar.client().line("GET k"), Value::Error(text) if text.starts_with("TRYAGAIN ")));
        assert_unready(&sidecar, "no server");

        let rules = [web_rule("item", json!({}))];
        let known = policy(servers.topology(), 2, &[http_origin("web", &web, "20s")], &rules);
        sidecar.replace_snapshot(&known.to_string());
        wait_for("the servers to be found", LIMIT, || get(&sidecar, "/readyz").0 == 200);
        let mut client = sidecar.client();
        assert_eq!(client.line("SET k v"), Value::Simple("OK".to_owned()));

        let before = web.under_way("/item/1");
        client.send(&encode(&["GET", "item:1"])).expect("the sidecar reads");
        wait_for("a load to be under way", LIMIT, || web.under_way("/item/1") == before + 1);
        sidecar.signal("TERM");
        wait_for("the end to be told", LIMIT, || get(&sidecar, "/readyz").0 == 503);
        assert_unready(&sidecar, "stopping");
        web.release("/item/1");
        assert_eq!(client.read().expect("a reply").text(), "loaded");
        assert_eq!(sidecar.wait_for_end(LIMIT).code(), Some(0), "{}", sidecar.log());
        web.hold("/item/1");
        servers.expire("item:1");
    }
}
