//! CLIENT LIST, KILL and UNBLOCK over all clients of a sidecar, whichever of its workers has them.

use std::time::Duration;

use crate::support::resp::{Client, Value, encode};
use crate::support::server::{Engine, RedisCluster, SentinelCluster};
use crate::support::sidecar::{Sidecar, bypass, cluster_topology, sentinel_topology};
use crate::support::wait_for;

const LIMIT: Duration = Duration::from_secs(20);

fn ok() -> Value {
    Value::Simple("OK".to_owned())
}

/// Has sidecars with two workers, on both topologies.
fn on_both(run: impl Fn(&Sidecar)) {
    let sentinel = SentinelCluster::start(Engine::Redis7, 1);
    run(&Sidecar::start_with(&bypass(sentinel_topology(&sentinel)), &["--workers", "2"]));
    let cluster = RedisCluster::start(Engine::Valkey9, 3, 0);
    run(&Sidecar::start_with(&bypass(cluster_topology(&cluster)), &["--workers", "2"]));
}

fn id(client: &mut Client) -> i64 {
    client.line("CLIENT ID").int()
}

/// The lines of CLIENT LIST, as text.
fn list(client: &mut Client, tail: &str) -> Vec<String> {
    client.line(&format!("CLIENT LIST {tail}")).text().lines().map(str::to_owned).collect()
}

/// Whether the sidecar has closed the connection.
fn is_closed(client: &mut Client) -> bool {
    client.stream().set_nonblocking(true).unwrap();
    let seen = client.stream().peek(&mut [0]);
    client.stream().set_nonblocking(false).unwrap();
    !matches!(&seen, Err(error) if error.kind() == std::io::ErrorKind::WouldBlock) && !matches!(seen, Ok(1..))
}

#[test]
fn clients_of_all_workers_are_listed() {
    on_both(|sidecar| {
        let mut clients: Vec<Client> = (0..12).map(|_| sidecar.client()).collect();
        let ids: Vec<i64> = clients.iter_mut().map(id).collect();
        let mut first = clients.remove(0);
        let lines = list(&mut first, "");
        for id in &ids {
            assert!(lines.iter().any(|line| line.starts_with(&format!("id={id} "))), "{id} in {lines:?}");
        }
        assert!(lines.is_sorted_by_key(|line| line[3..].split(' ').next().unwrap().parse::<i64>().unwrap()));
        assert_eq!(list(&mut first, &format!("ID {} {}", ids[3], ids[7])).len(), 2);
        assert_eq!(clients[4].line("CLIENT SETNAME worker"), ok());
        assert!(matches!(clients[5].line("SUBSCRIBE news"), Value::Array(_)));
        let named = list(&mut first, "NAME worker");
        assert!(named.len() == 1 && named[0].contains(&format!("id={} ", ids[5])), "{named:?}");
        let subscribed = list(&mut first, "TYPE pubsub");
        assert!(
            subscribed.len() == 1 && subscribed[0].contains("flags=P") && subscribed[0].contains(" sub=1 "),
            "{subscribed:?}"
        );
        assert!(list(&mut first, "TYPE replica").is_empty());
        assert_eq!(list(&mut first, &format!("TYPE normal NOT-ID {}", ids[0])).len() + 2, list(&mut first, "").len());
    });
}

#[test]
fn whoever_is_killed_is_closed_and_nobody_else() {
    on_both(|sidecar| {
        let mut killer = sidecar.client();
        let mut clients: Vec<Client> = (0..6).map(|_| sidecar.client()).collect();
        let ids: Vec<i64> = clients.iter_mut().map(id).collect();
        assert_eq!(killer.line(&format!("CLIENT KILL ID {}", ids[0])), Value::Int(1));
        wait_for("the client to be closed", LIMIT, || is_closed(&mut clients[0]));
        assert_eq!(killer.line(&format!("CLIENT KILL ID {}", ids[0])), Value::Int(0), "it is gone");
        let address = clients[1].stream().local_addr().unwrap();
        assert_eq!(killer.line(&format!("CLIENT KILL {address}")), ok());
        assert_eq!(killer.line(&format!("CLIENT KILL ADDR {}", clients[2].stream().local_addr().unwrap())), Value::Int(1));
        assert!(matches!(killer.line("CLIENT KILL 127.0.0.1:1"), Value::Error(text) if text == "ERR No such client"));
        // One that blocks, and one that has a transaction.
        clients[3].send(&encode(&["BLPOP", "{q}", "0"])).unwrap();
        wait_for("a blocked client", LIMIT, || list(&mut killer, &format!("ID {}", ids[3]))[0].contains("flags=b"));
        assert_eq!(clients[4].line("MULTI"), ok());
        assert!(!clients[4].line("SET {q}x 1").is_error());
        assert_eq!(killer.line(&format!("CLIENT KILL ID {} {}", ids[3], ids[4])), Value::Int(2));
        wait_for("the others to be closed", LIMIT, || clients[1..5].iter_mut().all(is_closed));
        assert_eq!(killer.line("RPUSH {q} x"), Value::Int(1), "nothing is popped for nobody");
        assert_eq!(killer.line("EXISTS {q}x"), Value::Int(0));
        assert_eq!(clients[5].line("PING"), Value::Simple("PONG".to_owned()));
        // Oneself, after the answer; unless one is spared.
        assert_eq!(killer.line("CLIENT KILL TYPE normal"), Value::Int(1));
        wait_for("the last one to be closed", LIMIT, || is_closed(&mut clients[5]));
        assert_eq!(killer.line("CLIENT KILL TYPE normal SKIPME no"), Value::Int(1));
        wait_for("the killer to be closed", LIMIT, || is_closed(&mut killer));
    });
}

#[test]
fn a_blocked_client_is_unblocked_as_by_its_server() {
    on_both(|sidecar| {
        let (mut popper, mut other) = (sidecar.client(), sidecar.client());
        let id = id(&mut popper);
        let unblock = |other: &mut Client, mode: &str| other.line(&format!("CLIENT UNBLOCK {id}{mode}"));
        assert_eq!(unblock(&mut other, ""), Value::Int(0), "it does not block");
        let cases =
            [("BLPOP {q} 0", "", false), ("BRPOP {q} 0", " TIMEOUT", false), ("BLMOVE {q} {q}2 LEFT RIGHT 0", " ERROR", true)];
        for (command, mode, fails) in cases {
            popper.send(&[encode(&command.split(' ').collect::<Vec<_>>()), encode(&["ECHO", "after"])].concat()).unwrap();
            wait_for("it to be unblocked", LIMIT, || unblock(&mut other, mode) == Value::Int(1));
            let reply = popper.read().unwrap();
            let words = Value::Error("UNBLOCKED client unblocked via CLIENT UNBLOCK".to_owned());
            assert_eq!(reply, if fails { words } else { Value::Nil }, "{command}{mode}");
            assert_eq!(popper.read().unwrap(), Value::Bulk(b"after".to_vec()));
        }
        popper.send(&encode(&["WAIT", "9", "0"])).unwrap();
        // It waits at every shard, at none longer than at another.
        wait_for("WAIT to be ended", LIMIT, || {
            unblock(&mut other, "");
            popper.poll().is_some_and(|reply| matches!(reply, Value::Int(_)))
        });
        assert_eq!(unblock(&mut other, ""), Value::Int(0));
        nothing_is_lost_between(sidecar, &mut popper, id);
    });
}

/// However an unblocking and a push fall together: what was popped comes to the client, and no connection's next user is disturbed.
fn nothing_is_lost_between(sidecar: &Sidecar, popper: &mut Client, id: i64) {
    let (mut pusher, mut unblocker) = (sidecar.client(), sidecar.client());
    let (mut popped, mut unblocked) = (0, 0);
    const ROUNDS: i64 = 300;
    for round in 0..ROUNDS {
        popper.send(&encode(&["BLPOP", "{q}", "5"])).unwrap();
        if round % 3 == 0 {
            // Sometimes it waits long since.
            wait_for("it to block", LIMIT, || list(&mut pusher, &format!("ID {id}"))[0].contains("flags=b"));
        }
        unblocker.send(&encode(&["CLIENT", "UNBLOCK", &id.to_string()])).unwrap();
        assert!(matches!(pusher.line(&format!("RPUSH {{q}} {round}")), Value::Int(_)));
        let told = unblocker.read().unwrap().int();
        match popper.read().unwrap() {
            Value::Nil => {
                unblocked += 1;
                assert_eq!(told, 1, "it was told so");
                assert_eq!(pusher.line("LPOP {q}").text(), round.to_string(), "the element is still there");
            }
            reply => {
                popped += 1;
                assert_eq!(reply.items()[1].text(), round.to_string());
                assert_eq!(pusher.line("LLEN {q}"), Value::Int(0));
            }
        }
    }
    assert_eq!(popped + unblocked, ROUNDS);
    println!("{popped} popped, {unblocked} unblocked");
}
