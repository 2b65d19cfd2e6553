//! Commands that block, through the sidecar.

use std::net::Shutdown;
use std::time::Duration;

use crate::support::resp::{Value, encode};
use crate::support::server::{Engine, Redis, RedisCluster, SentinelCluster};
use crate::support::sidecar::{Sidecar, bypass, cluster_topology, sentinel_topology};
use crate::support::wait_for;

const LIMIT: Duration = Duration::from_secs(20);

fn blocked(server: &Redis) -> usize {
    let info = server.client().line("INFO clients").text();
    info.lines().find_map(|line| line.strip_prefix("blocked_clients:")).unwrap().trim().parse().unwrap()
}

fn topologies() -> (SentinelCluster, RedisCluster) {
    (SentinelCluster::start(Engine::Redis7, 1), RedisCluster::start(Engine::Redis7, 3, 0))
}

#[test]
fn a_pop_waits_for_another_clients_push() {
    let (sentinel, cluster) = topologies();
    for (topology, servers) in [(sentinel_topology(&sentinel), &sentinel.servers), (cluster_topology(&cluster), &cluster.servers)]
    {
        let sidecar = Sidecar::start(&bypass(topology));
        let mut poppers: Vec<_> = (0..3).map(|_| sidecar.client()).collect();
        for popper in &mut poppers {
            // What follows on the connection waits for the pop.
            popper.send(&[encode(&["BLPOP", "queue", "0"]), encode(&["INCR", "popped"])].concat()).unwrap();
        }
        wait_for("three blocked clients", LIMIT, || servers.iter().map(blocked).sum::<usize>() == 3);
        let mut pusher = sidecar.client();
        assert_eq!(pusher.line("GET popped"), Value::Nil);
        assert!(pusher.line("RPUSH queue a b c").int() > 0);
        let mut popped: Vec<String> = poppers.iter_mut().map(|popper| popper.read().unwrap().items()[1].text()).collect();
        popped.sort();
        assert_eq!(popped, ["a", "b", "c"]);
        let mut counts: Vec<i64> = poppers.iter_mut().map(|popper| popper.read().unwrap().int()).collect();
        counts.sort_unstable();
        assert_eq!(counts, [1, 2, 3]);
        // A timeout, and streams.
        assert_eq!(pusher.line("BLPOP queue 0.01"), Value::Nil);
        assert_eq!(pusher.line("XREAD BLOCK 10 STREAMS stream $"), Value::Nil);
        poppers[0].send(&encode(&["XREAD", "BLOCK", "0", "STREAMS", "stream", "$"])).unwrap();
        wait_for("a blocked reader", LIMIT, || servers.iter().map(blocked).sum::<usize>() == 1);
        assert!(!pusher.line("XADD stream * field value").is_error());
        assert_eq!(poppers[0].read().unwrap().items().len(), 1);
    }
}

#[test]
fn a_blocked_client_that_leaves_leaves_nothing_behind() {
    let sentinel = SentinelCluster::start(Engine::Redis7, 1);
    let sidecar = Sidecar::start(&bypass(sentinel_topology(&sentinel)));
    let primary = sentinel.primary();
    let mut leaver = sidecar.client();
    leaver.send(&encode(&["BLPOP", "queue", "0"])).unwrap();
    wait_for("a blocked client", LIMIT, || blocked(primary) == 1);
    leaver.stream().shutdown(Shutdown::Both).unwrap();
    wait_for("no blocked client", LIMIT, || blocked(primary) == 0);
    let list = primary.client().line("CLIENT LIST").text();
    assert!(!list.contains("cmd=blpop"), "{list}");
    // Nothing is popped for nobody.
    let mut client = sidecar.client();
    assert_eq!(client.line("RPUSH queue a"), Value::Int(1));
    assert_eq!(client.line("LLEN queue"), Value::Int(1));
}

#[test]
fn wait_counts_the_replicas_that_have_the_clients_writes() {
    let sentinel = SentinelCluster::start(Engine::Redis7, 1);
    let cluster = RedisCluster::start(Engine::Redis7, 3, 1);
    for topology in [sentinel_topology(&sentinel), cluster_topology(&cluster)] {
        let sidecar = Sidecar::start(&bypass(topology));
        let mut client = sidecar.client();
        for index in 0..20 {
            assert!(!client.line(&format!("SET key:{index} x")).is_error());
        }
        assert_eq!(client.line("WAIT 1 10000"), Value::Int(1));
    }
    // A replica that has stopped is not counted.
    let sidecar = Sidecar::start(&bypass(sentinel_topology(&sentinel)));
    let replica = sentinel.servers.iter().find(|server| server.port() != sentinel.primary_port()).unwrap();
    replica.pause();
    let mut client = sidecar.client();
    assert!(!client.line("SET key x").is_error());
    let waited = client.line("WAIT 1 300");
    replica.resume();
    assert_eq!(waited, Value::Int(0));
}

#[test]
fn a_blocked_client_hears_of_a_lost_server() {
    let mut sentinel = SentinelCluster::start(Engine::Redis7, 1);
    let sidecar = Sidecar::start(&bypass(sentinel_topology(&sentinel)));
    let mut client = sidecar.client();
    client.send(&encode(&["BLPOP", "queue", "0"])).unwrap();
    let first = sentinel.primary_port();
    let at = sentinel.servers.iter().position(|server| server.port() == first).unwrap();
    wait_for("a blocked client", LIMIT, || blocked(&sentinel.servers[at]) == 1);
    sentinel.servers[at].kill();
    let reply = client.read().unwrap();
    assert!(matches!(&reply, Value::Error(text) if text.starts_with("UNCERTAIN")), "{reply:?}");
    wait_for("a new primary", Duration::from_secs(60), || sentinel.primary_port() != first);
    wait_for("service to go on", LIMIT, || !client.line("RPUSH queue a").is_error());
    assert_eq!(client.line("BLPOP queue 1").items()[1].text(), "a");
}
