//! Connections of sentinels: those that are ended at their other side are opened anew, and nothing else comes of it; those that nobody
//! answers are given up soon.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::time::Duration;

use larder::operator::admin::{Admin, Entry};
use larder::operator::cache_cluster::{links, spin};

use crate::support::resp::Client;
use crate::support::server::{Engine, SentinelCluster};
use crate::support::silent::Silent;
use crate::support::wait_for;

const LIMIT: Duration = Duration::from_secs(60);

/// The connections that a sentinel has to servers and other sentinels, by where they end and by their numbers there.
fn connections(others: &[SocketAddr], identity: &str) -> BTreeSet<(u16, String)> {
    let name = format!("name=sentinel-{}-", &identity[..8]);
    let of = |other: &SocketAddr| {
        let clients = Client::connect(other.port()).expect("a connection").line("CLIENT LIST").text();
        let lines = clients.lines().filter(|line| line.contains(&name));
        lines.map(|line| (other.port(), line.split(' ').next().expect("a number").to_owned())).collect::<Vec<_>>()
    };
    others.iter().flat_map(of).collect()
}

fn check(engine: Engine) {
    let cluster = SentinelCluster::start(engine, 1);
    let sentinels: Vec<SocketAddr> = cluster.addresses().iter().map(|address| address.parse().expect("an address")).collect();
    let servers = cluster.servers.iter().map(|server| SocketAddr::from(([127, 0, 0, 1], server.port())));
    let others: Vec<SocketAddr> = servers.chain(sentinels[1..].iter().copied()).collect();
    let mut sentinel = Client::connect(sentinels[0].port()).expect("a connection");
    let identity = sentinel.line("SENTINEL MYID").text();
    // For commands and for messages to each server, for commands to each sentinel.
    let whole = 2 * cluster.servers.len() + 2;
    wait_for("the sentinel to be connected to all", LIMIT, || connections(&others, &identity).len() == whole);
    let before = connections(&others, &identity);
    let primary = cluster.primary_port();

    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    let ended = runtime.block_on(spin::end_connections(&identity, &others, Entry::default()));
    assert_eq!(ended, whole, "{engine:?}");
    wait_for("the sentinel to be connected to all anew", LIMIT, || {
        let after = connections(&others, &identity);
        after.len() == whole && after.is_disjoint(&before)
    });
    wait_for("all to be well with the primary in its eyes", LIMIT, || {
        let said = sentinel.line(&format!("SENTINEL MASTER {}", crate::support::server::PRIMARY_NAME));
        let fields: Vec<String> = said.items().iter().map(crate::support::resp::Value::text).collect();
        fields.windows(2).any(|pair| pair[0] == "flags" && pair[1] == "master")
    });
    assert_eq!(cluster.primary_port(), primary, "{engine:?}: nothing was failed over");
}

#[test]
fn a_sentinel_opens_its_connections_anew() {
    for engine in [Engine::Redis7, Engine::Valkey9] {
        check(engine);
    }
}

fn check_given_up(engine: Engine) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    let clusters = [SentinelCluster::start(engine, 1), SentinelCluster::start(engine, 1)];
    let silent = [runtime.block_on(Silent::open()), runtime.block_on(Silent::open())];
    let sentinel = |index: usize| -> SocketAddr { clusters[index].addresses()[0].parse().expect("an address") };
    let reconnects_after = |index: usize| {
        runtime.block_on(async {
            let mut admin = Admin::connect(sentinel(index), Entry::default()).await.expect("it answers");
            links::reconnects_after(&mut admin).await.expect("it tells")
        })
    };
    runtime.block_on(links::shorten(sentinel(0), Entry::default())).expect("it is told");
    assert_eq!(reconnects_after(0), links::RECONNECT_AFTER, "{engine:?}");
    assert!(reconnects_after(1) > links::RECONNECT_AFTER, "{engine:?}");

    // Both begin to watch a server that nobody gets an answer from, the one that was not told first.
    for index in [1, 0] {
        let port = silent[index].port();
        let mut client = Client::connect(sentinel(index).port()).expect("it accepts");
        assert_eq!(client.line(&format!("SENTINEL MONITOR silent 127.0.0.1 {port} 1")).text(), "OK");
        assert_eq!(client.line("SENTINEL SET silent down-after-milliseconds 1000").text(), "OK");
        wait_for("an attempt", LIMIT, || !silent[index].attempts().is_empty());
    }
    let first = silent.each_ref().map(Silent::attempts);
    wait_for("another attempt", LIMIT, || {
        let now = silent[0].attempts();
        !now.is_empty() && now.is_disjoint(&first[0])
    });
    let still = silent[1].attempts();
    assert!(still.is_superset(&first[1]), "{engine:?}: a sentinel that was not told gave {:?} up, too", first[1]);
}

#[test]
fn a_sentinel_gives_up_soon_what_nobody_answers() {
    for engine in [Engine::Redis7, Engine::Valkey9] {
        check_given_up(engine);
    }
}
