//! LARDER.FETCH and LARDER.FILL.

use std::time::Duration;

use serde_json::json;

use super::{item, rule, sidecars, total};
use crate::read_through::Servers;
use crate::support::resp::{Client, Value};
use crate::support::wait_for;

/// The word, the value and the token that FETCH answers.
fn fetch(client: &mut Client, line: &str) -> (String, Option<String>, Option<String>) {
    let items = client.line(line).items();
    let [word, value, token] = &items[..] else { panic!("{line}: {items:?}") };
    let text = |value: &Value| (*value != Value::Nil).then(|| value.text());
    (word.text(), text(value), text(token))
}

fn ok() -> Value {
    Value::Simple("OK".to_owned())
}

#[test]
fn a_token_stores_what_was_loaded_while_nothing_was_written() {
    for servers in [Servers::sentinel(), Servers::cluster()] {
        let sidecars = sidecars(&servers, 2, &[rule("item", json!({}), json!({"stale": "1h"}))]);
        let (mut one, mut two) = (sidecars[0].client(), sidecars[1].client());
        let (word, value, token) = fetch(&mut one, "LARDER.FETCH item:1");
        assert_eq!((word.as_str(), value), ("load", None));
        let token = token.expect("a token");
        assert_eq!(fetch(&mut two, "LARDER.FETCH item:1 WAIT 0").0, "busy");
        assert_eq!(one.call(&["LARDER.FILL", "item:1", &token, "v", "PX", "99999999999"]), ok());
        assert_eq!(fetch(&mut two, "LARDER.FETCH item:1"), ("value".to_owned(), Some("v".to_owned()), None));
        let ttl = one.line("PTTL item:1").int();
        assert!((1..=7_200_000).contains(&ttl), "{ttl}");
        // A token is good for one fill.
        assert_eq!(one.call(&["LARDER.FILL", "item:1", &token, "w"]), Value::Nil);
        // The copy is served while somebody loads anew.
        servers.expire("item:1");
        assert_eq!(fetch(&mut two, "LARDER.FETCH item:1").0, "load");
        assert_eq!(fetch(&mut one, "LARDER.FETCH item:1"), ("stale".to_owned(), Some("v".to_owned()), None));
    }
}

#[test]
fn a_late_fill_stores_nothing_and_removes_nothing() {
    let servers = Servers::sentinel();
    let sidecars = sidecars(&servers, 2, &[item(json!({}))]);
    let (mut one, mut two) = (sidecars[0].client(), sidecars[1].client());
    let token = fetch(&mut one, "LARDER.FETCH item:1").2.expect("a token");
    assert_eq!(two.line("SET item:1 newer"), ok());
    assert_eq!(one.call(&["LARDER.FILL", "item:1", &token, "older"]), Value::Nil);
    assert_eq!(one.line("GET item:1").text(), "newer");
    let token = fetch(&mut one, "LARDER.FETCH item:2").2.expect("a token");
    two.line("LARDER.INVALIDATE item:2");
    assert_eq!(one.call(&["LARDER.FILL", "item:2", &token, "older"]), Value::Nil);
    assert_eq!(one.line("EXISTS item:2").int(), 0);
    assert_eq!(total(&sidecars, "late_fills"), 2);
}

#[test]
fn who_waits_is_woken_by_the_fill() {
    let servers = Servers::sentinel();
    let sidecars = sidecars(&servers, 2, &[item(json!({}))]);
    let mut holder = sidecars[0].client();
    let token = fetch(&mut holder, "LARDER.FETCH item:1").2.expect("a token");
    std::thread::scope(|scope| {
        let waiters: Vec<_> = (0..10)
            .map(|number| {
                let mut client = sidecars[number % 2].client();
                scope.spawn(move || fetch(&mut client, "LARDER.FETCH item:1 WAIT 15000"))
            })
            .collect();
        wait_for("the waiters to ask", Duration::from_secs(10), || total(&sidecars, "misses") == 11);
        assert_eq!(holder.call(&["LARDER.FILL", "item:1", &token, "v"]), ok());
        for waiter in waiters {
            assert_eq!(waiter.join().unwrap(), ("value".to_owned(), Some("v".to_owned()), None));
        }
    });
    assert_eq!(total(&sidecars, "leases"), 1);
}

#[test]
fn what_cannot_be_done_is_said() {
    let servers = Servers::sentinel();
    let sidecars = sidecars(&servers, 1, &[item(json!({}))]);
    let mut client = sidecars[0].client();
    // No rule, no lease: the client loads, and stores with SET.
    assert_eq!(fetch(&mut client, "LARDER.FETCH other"), ("load".to_owned(), None, None));
    for (line, text) in [
        ("LARDER.FETCH item:1 WAIT no", "milliseconds"),
        ("LARDER.FETCH item:1 5", "syntax error"),
        ("LARDER.FILL item:1 token v", "no token of LARDER.FETCH"),
        ("LARDER.FILL item:1 0000000000000001@00000000 v PX 0", "at least 1"),
        ("LARDER.FILL item:1 0000000000000001@00000000 v TAGS a", "versioned: Entity"),
        ("LARDER.FILL other 0000000000000001@00000000 v", "no rule with leases"),
        ("LARDER.FETCH larder:x", "Larder's own"),
    ] {
        let Value::Error(error) = client.line(line) else { panic!("{line} is not refused") };
        assert!(error.contains(text), "{line}: {error}");
    }
    client.line("LPUSH item:list a");
    assert!(matches!(client.line("LARDER.FETCH item:list"), Value::Error(error) if error.starts_with("WRONGTYPE")));
}
