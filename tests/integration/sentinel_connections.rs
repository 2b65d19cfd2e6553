//! A sentinel whose connections are ended at their other side opens others, and nothing else comes of it.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::time::Duration;

use larder::operator::admin::Entry;
use larder::operator::cache_cluster::spin;

use crate::support::resp::Client;
use crate::support::server::{Engine, SentinelCluster};
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
