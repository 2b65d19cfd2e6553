//! Connections that carry more than one command at a time.

use serde_json::json;

use super::{LIMIT, bulk, item, ok, sidecars, total};
use crate::read_through::Servers;
use crate::support::resp::{Value, encode};
use crate::support::wait_for;

#[test]
fn two_hundred_reads_of_one_key_on_one_connection_make_one_load() {
    let servers = Servers::cluster();
    let sidecars = sidecars(&servers, 3, &[item(json!({}))]);
    let mut clients: Vec<_> = sidecars.iter().map(|sidecar| sidecar.client()).collect();
    clients[1].line("HELLO 3");
    let reads = encode(&["GET", "item:1"]).repeat(200);
    clients.iter_mut().for_each(|client| client.send(&reads).unwrap());
    wait_for("all to have missed", LIMIT, || total(&sidecars, "misses") == 600);
    wait_for("one to be asked to load", LIMIT, || total(&sidecars, "leases") == 1);
    let (holder, reply) = super::first_answered(&mut clients);
    assert_eq!(reply, Value::Nil);
    // Its own fill passes although reads of the same connection wait.
    clients[holder].send(&encode(&["SET", "item:1", "v"])).unwrap();
    for (index, client) in clients.iter_mut().enumerate() {
        let waiting = if index == holder { 199 } else { 200 };
        (0..waiting).for_each(|read| assert_eq!(client.read().unwrap(), bulk("v"), "read {read} of client {index}"));
    }
    assert_eq!(clients[holder].read().unwrap(), ok());
    assert_eq!((total(&sidecars, "leases"), total(&sidecars, "woken"), total(&sidecars, "unparked")), (1, 599, 0));
}

#[test]
fn no_other_command_waits_behind_a_parked_read() {
    let servers = Servers::sentinel();
    let sidecars = sidecars(&servers, 1, &[item(json!({}))]);
    let mut holder = sidecars[0].client();
    assert_eq!(holder.line("GET item:1"), Value::Nil);
    let others = ["GET item:2", "SET plain x", "PING", "GET plain", "MULTI", "SUBSCRIBE c", "BLPOP list 1", "EVAL return{1} 0"];
    for (count, other) in (1..).zip(others) {
        let mut client = sidecars[0].client();
        client.send(&encode(&["GET", "item:1"])).unwrap();
        wait_for("the read to be parked", LIMIT, || total(&sidecars, "misses") > count && client.poll().is_none());
        client.send(&encode(&other.split(' ').collect::<Vec<_>>())).unwrap();
        assert_eq!(client.read().unwrap(), Value::Nil, "before {other}");
        client.read().unwrap_or_else(|error| panic!("{other}: {error}"));
    }
    assert_eq!(total(&sidecars, "unparked"), others.len() as u64);
    // Within one pipeline nobody waits either.
    let mut client = sidecars[0].client();
    client.send(&[encode(&["GET", "item:1"]), encode(&["PING"])].concat()).unwrap();
    assert_eq!((client.read().unwrap(), client.read().unwrap()), (Value::Nil, Value::Simple("PONG".to_owned())));
    // What was passed on was the same miss: its fill is as good as the holder's.
    assert_eq!(client.line("SET item:1 v"), ok());
    assert_eq!(servers.holder_of("item:1").line("GET item:1"), bulk("v"));
}

#[test]
fn a_pipeline_of_misses_is_filled_by_a_pipeline() {
    for servers in [Servers::sentinel(), Servers::cluster()] {
        let sidecars = sidecars(&servers, 2, &[item(json!({}))]);
        let mut client = sidecars[0].client();
        let all = |command: &dyn Fn(u32) -> Vec<u8>| (0..100).flat_map(command).collect::<Vec<u8>>();
        client.send(&all(&|id| encode(&["GET", &format!("item:{id}")]))).unwrap();
        (0..100).for_each(|_| assert_eq!(client.read().unwrap(), Value::Nil));
        assert_eq!(total(&sidecars, "leases"), 100);
        client.send(&all(&|id| encode(&["SETEX", &format!("item:{id}"), "100", &id.to_string()]))).unwrap();
        (0..100).for_each(|_| assert_eq!(client.read().unwrap(), ok()));
        let mut other = sidecars[1].client();
        (0..100).for_each(|id| assert_eq!(other.line(&format!("GET item:{id}")), bulk(&id.to_string())));
        assert_eq!((total(&sidecars, "ambiguous_fills"), total(&sidecars, "late_fills")), (0, 0));
    }
}
