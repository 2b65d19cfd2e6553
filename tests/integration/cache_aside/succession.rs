//! Holders that never fill.

use serde_json::json;

use super::{LIMIT, bulk, first_answered, item, ok, sidecars, total};
use crate::read_through::Servers;
use crate::support::resp::{Client, Value, encode};
use crate::support::wait_for;

/// How a holder goes.
#[derive(Debug, Clone, Copy)]
enum Way {
    Disconnected,
    Silent,
    Killed,
    /// Its SET is one that no server takes.
    Refused,
}

#[test]
fn a_holder_that_goes_has_one_successor() {
    for way in [Way::Disconnected, Way::Silent, Way::Killed, Way::Refused] {
        let servers = Servers::sentinel();
        let mut sidecars = sidecars(&servers, 3, &[item(json!({"lease": "2s", "wait": "1900ms", "atWaitEnd": "error"}))]);
        let first = sidecars.remove(0);
        let mut holder = first.client();
        assert_eq!(holder.line("GET item:1"), Value::Nil);
        // Those who wait have to be there after the lease's end.
        std::thread::sleep(std::time::Duration::from_millis(800));
        let mut others: Vec<Client> = (0..40).map(|index| sidecars[index % 2].client()).collect();
        others.iter_mut().for_each(|client| client.send(&encode(&["GET", "item:1"])).unwrap());
        wait_for("the others to wait", LIMIT, || total(&sidecars, "misses") == 40);
        match way {
            Way::Disconnected => drop(holder),
            Way::Killed => first.signal("KILL"),
            Way::Silent => {}
            Way::Refused => assert!(holder.line("SET item:1 v EX 0").is_error()),
        }
        let (next, reply) = first_answered(&mut others);
        assert_eq!(reply, Value::Nil, "{way:?}");
        assert_eq!(others[next].line("SET item:1 v"), ok());
        for (index, other) in others.iter_mut().enumerate().filter(|(index, _)| *index != next) {
            assert_eq!(other.read().unwrap(), bulk("v"), "client {index}, {way:?}");
        }
        assert_eq!(total(&sidecars, "leases"), 1, "{way:?}");
    }
}

#[test]
fn who_has_waited_in_vain_hears_of_it() {
    let servers = Servers::cluster();
    let stampede = json!({"lease": "20s", "wait": "50ms"});
    let mut rules = [item(stampede.clone()), super::rule("miss", stampede, json!({}))];
    rules[1]["strategy"]["cacheAside"]["stampede"]["atWaitEnd"] = json!("miss");
    let sidecars = sidecars(&servers, 2, &rules);
    let mut holder = sidecars[0].client();
    assert_eq!((holder.line("GET item:a b"), holder.line("GET miss:1")).1, Value::Nil);
    assert_eq!(holder.call(&["GET", "item:\r\n1"]), Value::Nil);
    for sidecar in &sidecars {
        let mut client = sidecar.client();
        let Value::Error(text) = client.call(&["GET", "item:\r\n1"]) else { panic!("an error") };
        assert!(text.starts_with("TRYAGAIN the key `item:\\r\\n1` of rule `item` is being loaded"), "{text}");
        let Value::Error(text) = client.call(&["MGET", "item:\r\n1", "plain"]) else { panic!("an error") };
        assert!(text.starts_with("TRYAGAIN the key `item:\\r\\n1`"), "{text}");
        assert_eq!(client.line("GET miss:1"), Value::Nil);
        assert_eq!(client.line("MGET miss:1 plain").items(), [Value::Nil, Value::Nil]);
    }
    // Their misses are of the holder's generation.
    assert_eq!(sidecars[1].client().line("SET miss:1 v"), ok());
    assert_eq!(holder.line("GET miss:1"), bulk("v"));
    assert_eq!(total(&sidecars, "wait_timeouts"), 4);
}

#[test]
fn waiting_reads_listen_to_the_cache_and_stop() {
    for servers in [Servers::sentinel(), Servers::cluster()] {
        let sidecars = sidecars(&servers, 2, &[item(json!({}))]);
        let (mut holder, mut waiting) = (sidecars[0].client(), sidecars[1].client());
        let lease = larder::sidecar::slots::Companion::Lease.name(b"item:1");
        let mut server = servers.holder_of("item:1");
        let mut listeners = || server.call(&[&b"PUBSUB"[..], b"SHARDNUMSUB", &lease]).items()[1].int();
        assert_eq!(holder.line("GET item:1"), Value::Nil);
        waiting.send(&encode(&["GET", "item:1"])).unwrap();
        wait_for("it to listen", LIMIT, || listeners() == 1);
        assert_eq!(holder.line("SET item:1 v"), ok());
        assert_eq!(waiting.read().unwrap(), bulk("v"));
        wait_for("it to listen no more", LIMIT, || listeners() == 0);
    }
}

#[test]
fn a_key_that_nobody_fills_keeps_nobody_waiting() {
    let servers = Servers::sentinel();
    let sidecars = sidecars(&servers, 2, &[item(json!({}))]);
    for _ in 0..3 {
        let mut client = sidecars[0].client();
        assert_eq!(client.line("GET item:1"), Value::Nil);
        drop(client);
    }
    for round in 0..20 {
        assert_eq!(sidecars[round % 2].client().line("GET item:1"), Value::Nil);
    }
    assert_eq!(total(&sidecars, "leases"), 3);
    assert_eq!(total(&sidecars, "hit_for_miss"), 20);
}
