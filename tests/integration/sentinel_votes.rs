//! A sentinel that is told anew whom to watch, as after it lost its file, gives the vote that it forgot to nobody else.

use std::net::SocketAddr;

use larder::operator::admin::{Admin, Entry};
use larder::operator::cache_cluster::monitor;
use larder::operator::cache_cluster::plan::SentinelId;

use crate::support::resp::Client;
use crate::support::server::{Engine, PRIMARY_NAME, SentinelCluster};

/// Asks a sentinel for its vote. Whom it names, and of which epoch that vote is.
fn ask_for_vote(sentinel: SocketAddr, primary: u16, epoch: u64, candidate: &str) -> (String, i64) {
    let mut client = Client::connect(sentinel.port()).expect("a connection");
    let said = client.line(&format!("SENTINEL IS-MASTER-DOWN-BY-ADDR 127.0.0.1 {primary} {epoch} {candidate}"));
    (said.items()[1].text(), said.items()[2].int())
}

fn check(engine: Engine) {
    let cluster = SentinelCluster::start(engine, 1);
    let sentinels: Vec<SocketAddr> = cluster.addresses().iter().map(|address| address.parse().expect("an address")).collect();
    let identity = |place: usize| Client::connect(sentinels[place].port()).expect("a connection").line("SENTINEL MYID").text();
    let [own, winner, rival] = [0, 1, 2].map(identity);
    let primary = cluster.primary_port();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");

    let epoch = 100;
    for voter in [0, 1] {
        let (chosen, of) = ask_for_vote(sentinels[voter], primary, epoch, &winner);
        assert_eq!((chosen.as_str(), of), (winner.as_str(), 100), "{engine:?}");
    }
    let votes: Vec<u64> = runtime.block_on(async {
        let mut votes = Vec::new();
        for address in &sentinels {
            let mut admin = Admin::connect(*address, Entry::default()).await.expect("it answers");
            votes.push(monitor::last_vote(&mut admin, PRIMARY_NAME).await.expect("it tells"));
            assert_eq!(monitor::last_vote(&mut admin, "another").await.expect("it tells"), 0, "{engine:?}");
        }
        votes
    });
    assert_eq!((votes[0], votes[1]), (epoch, epoch), "{engine:?}: asking gave no vote away");

    runtime.block_on(async {
        let mut admin = Admin::connect(sentinels[0], Entry::default()).await.expect("it answers");
        let voted = votes.iter().copied().max().expect("votes");
        let watched = SocketAddr::from(([127, 0, 0, 1], primary));
        let told = monitor::monitor((SentinelId(0), &mut admin), PRIMARY_NAME, watched, (2, voted), None).await;
        told.expect("it watches");
    });
    // What it has no vote left for: the epoch in which its vote may have made another the leader.
    assert_eq!(ask_for_vote(sentinels[0], primary, epoch, &rival), (own, 100), "{engine:?}");
    assert_eq!(ask_for_vote(sentinels[0], primary, epoch + 1, &rival), (rival, 101), "{engine:?}: the next one is open");
}

#[test]
fn a_sentinel_that_watches_anew_votes_only_in_a_later_epoch() {
    for engine in [Engine::Redis7, Engine::Valkey9] {
        check(engine);
    }
}
