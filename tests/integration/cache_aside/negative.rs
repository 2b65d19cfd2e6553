//! "Not found", as applications store it themselves: an empty or a marked value, which is a fill as any other. The TTL is the
//! application's own where it gives one, else the rule's; who waits is given it, and what came later is stronger.

use serde_json::json;

use super::{LIMIT, bulk, item, ok, rule, sidecars, total};
use crate::read_through::Servers;
use crate::support::resp::{Client, Value, encode};
use crate::support::wait_for;

/// How an application may remember that there is no such row: the command, what it leaves, and the most that it may live.
const FORMS: [(&[&str], &str, i64); 8] = [
    (&["SET", "KEY", ""], "", 3_600_000),
    (&["SET", "KEY", "", "EX", "10"], "", 10_000),
    (&["SET", "KEY", "null", "PX", "10000", "NX"], "null", 10_000),
    (&["SETEX", "KEY", "10", "\0missing"], "\0missing", 10_000),
    (&["PSETEX", "KEY", "10000", ""], "", 10_000),
    (&["SETNX", "KEY", ""], "", 3_600_000),
    (&["GETSET", "KEY", ""], "", 3_600_000),
    (&["MSET", "KEY", ""], "", 3_600_000),
];

fn in_place(form: &[&str], key: &str) -> Vec<String> {
    form.iter().map(|word| if *word == "KEY" { key.to_owned() } else { (*word).to_owned() }).collect()
}

#[test]
fn who_waits_is_told_what_the_holder_did_not_find() {
    for servers in [Servers::sentinel(), Servers::cluster()] {
        let sidecars = sidecars(&servers, 2, &[item(json!({}))]);
        for (id, (form, marker, longest)) in FORMS.into_iter().enumerate() {
            let key = format!("item:{id}");
            let mut holder = sidecars[0].client();
            assert_eq!(holder.call(&["GET", &key]), Value::Nil);
            let mut others: Vec<Client> = (0..6).map(|index| sidecars[index % 2].client()).collect();
            others.iter_mut().for_each(|client| client.send(&encode(&["GET", &key])).unwrap());
            let missed = 7 * (id as u64 + 1);
            wait_for("the others to wait", LIMIT, || total(&sidecars, "misses") == missed);
            let reply = holder.call(&in_place(form, &key));
            assert!(!reply.is_error(), "{form:?}: {reply:?}");
            for other in &mut others {
                assert_eq!(other.read().unwrap(), bulk(marker), "{form:?}");
            }
            let left = servers.holder_of(&key).call(&["PTTL", &key]).int();
            assert!((1..=longest).contains(&left), "{form:?}: {left} ms are left");
            assert_eq!(sidecars[1].client().call(&["GET", &key]), bulk(marker), "{form:?}: a hit as any");
        }
        let loads = FORMS.len() as u64;
        assert_eq!((total(&sidecars, "leases"), total(&sidecars, "woken")), (loads, 6 * loads));
        assert_eq!((total(&sidecars, "ambiguous_fills"), total(&sidecars, "late_fills")), (0, 0));
    }
}

#[test]
fn an_absence_that_was_seen_before_the_row_came_is_never_stored() {
    for servers in [Servers::sentinel(), Servers::cluster()] {
        let sidecars = sidecars(&servers, 2, &[item(json!({}))]);
        for (id, (form, marker, _)) in FORMS.into_iter().enumerate() {
            for change in ["DEL", "SET"] {
                let key = format!("item:{change}{id}");
                let (mut loader, mut writer) = (sidecars[0].client(), sidecars[1].client());
                assert_eq!(loader.call(&["GET", &key]), Value::Nil);
                // Somebody inserts the row, and tells the cache.
                match change {
                    "DEL" => assert_eq!(writer.call(&["DEL", &key]), Value::Int(0)),
                    _ => assert_eq!(writer.call(&["SET", &key, "the row"]), ok()),
                }
                assert!(!loader.call(&in_place(form, &key)).is_error(), "{form:?}");
                let held = servers.holder_of(&key).call(&["GET", &key]);
                assert_ne!(held, bulk(marker), "{form:?} behind {change}");
            }
        }
    }
}

#[test]
fn an_absence_is_looked_up_anew_when_its_own_ttl_is_over_and_ends_with_the_row() {
    let servers = Servers::cluster();
    let sidecars = sidecars(&servers, 2, &[rule("item", json!({}), json!({"stale": "1m"}))]);
    let (mut one, mut two) = (sidecars[0].client(), sidecars[1].client());
    assert_eq!(one.line("GET item:1"), Value::Nil);
    assert_eq!(one.call(&["SET", "item:1", "", "PX", "60000"]), ok());
    servers.expire("item:1");
    assert_eq!(one.line("GET item:1"), Value::Nil, "one looks again");
    assert_eq!(two.line("GET item:1"), bulk(""), "the others are served the stale copy meanwhile");
    assert_eq!(one.line("SET item:1 row"), ok());
    assert_eq!(two.line("GET item:1"), bulk("row"));
    // Where a row comes later, its writer's deletion takes all that says otherwise along.
    assert_eq!(one.line("GET item:2"), Value::Nil);
    assert_eq!(one.call(&["SET", "item:2", "", "EX", "60"]), ok());
    assert_eq!(two.line("GET item:2"), bulk(""));
    assert_eq!(two.line("DEL item:2"), Value::Int(1));
    let mut three = sidecars[0].client();
    assert_eq!(two.line("GET item:2"), Value::Nil);
    three.send(&encode(&["GET", "item:2"])).unwrap();
    assert_eq!(two.line("SET item:2 row"), ok());
    assert_eq!(three.read().unwrap(), bulk("row"));
}
