//! Publish and subscribe through the sidecar.

use std::time::Duration;

use crate::support::resp::{Client, Value, encode};
use crate::support::server::{Engine, RedisCluster, SentinelCluster};
use crate::support::sidecar::{Sidecar, bypass, cluster_topology, sentinel_topology};
use crate::support::wait_for;

fn bulk(text: &str) -> Value {
    Value::Bulk(text.as_bytes().to_vec())
}

fn confirmation(kind: &str, channel: &str, count: i64) -> Vec<Value> {
    vec![bulk(kind), bulk(channel), Value::Int(count)]
}

fn read(client: &mut Client) -> Vec<Value> {
    client.read().unwrap().items()
}

#[track_caller]
fn publish(client: &mut Client, command: &str) {
    let reply = client.line(command);
    assert!(!reply.is_error(), "{command}: {reply:?}");
}

#[test]
fn resp2_subscribers() {
    let (sentinel, cluster) = (SentinelCluster::start(Engine::Redis7, 1), RedisCluster::start(Engine::Redis7, 3, 0));
    for topology in [sentinel_topology(&sentinel), cluster_topology(&cluster)] {
        let sidecar = Sidecar::start(&bypass(topology));
        let (mut client, mut other) = (sidecar.client(), sidecar.client());
        client.send(&encode(&["SUBSCRIBE", "a", "b"])).unwrap();
        assert_eq!(read(&mut client), confirmation("subscribe", "a", 1));
        assert_eq!(read(&mut client), confirmation("subscribe", "b", 2));
        assert_eq!(client.line("PSUBSCRIBE n*").items(), confirmation("psubscribe", "n*", 3));
        publish(&mut other, "PUBLISH a hello");
        assert_eq!(read(&mut client), [bulk("message"), bulk("a"), bulk("hello")]);
        publish(&mut other, "PUBLISH news world");
        assert_eq!(read(&mut client), [bulk("pmessage"), bulk("n*"), bulk("news"), bulk("world")]);
        // Only some commands go.
        assert_eq!(client.line("PING").items(), [bulk("pong"), bulk("")]);
        assert_eq!(client.line("PING x").items(), [bulk("pong"), bulk("x")]);
        let refused = client.line("GET key");
        assert!(matches!(&refused, Value::Error(text) if text.starts_with("ERR Can't execute 'get': only")), "{refused:?}");
        assert_eq!(client.line("UNSUBSCRIBE b").items(), confirmation("unsubscribe", "b", 2));
        assert_eq!(client.line("PUNSUBSCRIBE").items(), confirmation("punsubscribe", "n*", 1));
        assert_eq!(client.line("UNSUBSCRIBE").items(), confirmation("unsubscribe", "a", 0));
        // And back to normal.
        assert_eq!(client.line("SET key 1"), Value::Simple("OK".to_owned()));
        assert_eq!(client.line("UNSUBSCRIBE").items(), [bulk("unsubscribe"), Value::Nil, Value::Int(0)]);
        wait_for("no subscriber", Duration::from_secs(10), || other.line("PUBSUB NUMSUB a").items()[1] == Value::Int(0));
    }
}

#[test]
fn resp3_subscribers_go_on_with_other_commands() {
    let (sentinel, cluster) = (SentinelCluster::start(Engine::Valkey9, 1), RedisCluster::start(Engine::Valkey9, 3, 0));
    for topology in [sentinel_topology(&sentinel), cluster_topology(&cluster)] {
        let sidecar = Sidecar::start(&bypass(topology));
        let (mut client, mut other) = (sidecar.client(), sidecar.client());
        client.line("HELLO 3");
        assert_eq!(client.line("SUBSCRIBE a"), Value::Push(confirmation("subscribe", "a", 1)));
        assert_eq!(client.line("SSUBSCRIBE {s}hard"), Value::Push(confirmation("ssubscribe", "{s}hard", 1)));
        assert_eq!(client.line("SET key 1"), Value::Simple("OK".to_owned()));
        publish(&mut other, "PUBLISH a hello");
        assert_eq!(client.read().unwrap(), Value::Push(vec![bulk("message"), bulk("a"), bulk("hello")]));
        publish(&mut other, "SPUBLISH {s}hard shout");
        assert_eq!(client.read().unwrap(), Value::Push(vec![bulk("smessage"), bulk("{s}hard"), bulk("shout")]));
        // Messages never land within a reply, however long.
        let long = vec![b'v'; 3 * 1024 * 1024];
        assert_eq!(client.call(&[&b"SET"[..], b"long", &long]), Value::Simple("OK".to_owned()));
        client.send(&encode(&["GET", "long"]).repeat(10)).unwrap();
        for _ in 0..200 {
            publish(&mut other, "PUBLISH a interruption");
        }
        let (mut values, mut messages) = (0, 0);
        while values < 10 || messages < 200 {
            match client.read().unwrap() {
                Value::Bulk(bytes) => {
                    assert!(bytes == long);
                    values += 1;
                }
                Value::Push(items) => {
                    assert_eq!(items[2], bulk("interruption"));
                    messages += 1;
                }
                other => panic!("{other:?}"),
            }
        }
        assert_eq!(client.line("SUNSUBSCRIBE"), Value::Push(confirmation("sunsubscribe", "{s}hard", 0)));
        assert_eq!(client.line("UNSUBSCRIBE a"), Value::Push(confirmation("unsubscribe", "a", 0)));
    }
}

#[test]
fn a_subscription_outlives_its_server() {
    let mut sentinel = SentinelCluster::start(Engine::Redis7, 1);
    let sidecar = Sidecar::start(&bypass(sentinel_topology(&sentinel)));
    let (mut client, mut other) = (sidecar.client(), sidecar.client());
    assert_eq!(client.line("SUBSCRIBE a").items(), confirmation("subscribe", "a", 1));
    let first = sentinel.primary_port();
    let at = sentinel.servers.iter().position(|server| server.port() == first).unwrap();
    sentinel.servers[at].kill();
    wait_for("the subscription to be taken up again", Duration::from_secs(60), || other.line("PUBLISH a hello") == Value::Int(1));
    assert_eq!(read(&mut client), [bulk("message"), bulk("a"), bulk("hello")]);
}

#[test]
fn subscribers_and_idle_transactions_do_not_hold_up_the_end() {
    let sentinel = SentinelCluster::start(Engine::Redis7, 1);
    let mut sidecar = Sidecar::start_with(&bypass(sentinel_topology(&sentinel)), &["--drain", "10m"]);
    let (mut subscriber, mut transaction) = (sidecar.client(), sidecar.client());
    assert_eq!(subscriber.line("SUBSCRIBE a").items(), confirmation("subscribe", "a", 1));
    let mut pushed = sidecar.client();
    pushed.line("HELLO 3");
    assert_eq!(pushed.line("SUBSCRIBE a"), Value::Push(confirmation("subscribe", "a", 1)));
    assert_eq!(transaction.line("MULTI"), Value::Simple("OK".to_owned()));
    sidecar.signal("TERM");
    sidecar.wait_for_end(Duration::from_secs(60));
    assert!(subscriber.read().is_err() && pushed.read().is_err() && transaction.read().is_err());
}
