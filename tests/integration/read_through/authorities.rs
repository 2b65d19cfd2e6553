//! Machines without certificate authorities, such as an image on an empty base.

use serde_json::json;

use super::{Servers, http_origin, policy, rule, web_rule};
use crate::support::resp::Value;
use crate::support::sidecar::Sidecar;
use crate::support::web::Web;

#[test]
fn plain_http_needs_no_authorities_and_https_says_what_is_missing() {
    let (servers, web) = (Servers::sentinel(), Web::start());
    let mut secure = http_origin("secure", &web, "20s");
    secure["kind"]["http"]["url"]["value"] = json!(web.url().replace("http://", "https://"));
    let rules = [web_rule("item", json!({})), rule("other", "secure", json!({"http": {"path": "/other/{id}"}}), json!({}))];
    let snapshot = policy(servers.topology(), 1, &[http_origin("web", &web, "20s"), secure], &rules);
    let without = [("SSL_CERT_FILE", "/nonexistent"), ("SSL_CERT_DIR", "/nonexistent")];
    let sidecar = Sidecar::start_in(&snapshot, &[], &without);
    let mut client = sidecar.client();
    web.put("/item/1", "loaded");
    assert_eq!(client.line("GET item:1").text(), "loaded");
    let refused = client.line("GET other:1");
    assert!(
        matches!(&refused, Value::Error(text) if text.starts_with("ORIGIN ") && text.contains("certificates")),
        "{refused:?}"
    );
}
