//! The handover that a control plane asks for, by commands alone, under writers.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use larder::operator::admin::Entry;
use larder::operator::cache_cluster::handover::{Handover, HandoverError, Outcome};
use larder::operator::election::Leadership;
use tokio::sync::watch;
use tokio::time::Instant;

use crate::support::resp::{Client, Value};
use crate::support::server::{Engine, PRIMARY_NAME, Redis, SentinelCluster};
use crate::support::tilt::{is_in_tilt, stand_still};
use crate::support::wait_for;

const WRITERS: usize = 4;
/// How long a writer rests after each write: sentinels and servers share the processors with it.
const PACE: Duration = Duration::from_millis(1);
const LIMIT: Duration = Duration::from_secs(60);

/// Writers of values of their own to whichever server takes them.
struct Writers {
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<Vec<String>>>,
}

impl Writers {
    fn start(cluster: &SentinelCluster) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let ports: Vec<u16> = cluster.servers.iter().map(Redis::port).collect();
        let thread = |id| {
            let (ports, stop) = (ports.clone(), stop.clone());
            thread::spawn(move || write(id, &ports, &stop))
        };
        let threads = (0..WRITERS).map(thread).collect();
        thread::sleep(Duration::from_millis(500));
        Self { stop, threads }
    }

    /// Ends them, and counts the acknowledged writes that `primary` does not have.
    fn lost(self, primary: &Redis) -> usize {
        thread::sleep(Duration::from_millis(500));
        self.stop.store(true, Ordering::Relaxed);
        let mut client = primary.client();
        // Sentinels cut clients off when they turn a server round, be it the last time.
        let mut is_missing = |key: &String| loop {
            match client.try_call(&["GET", key]) {
                Ok(value) => break value == Value::Nil,
                Err(_) => client = primary.client(),
            }
        };
        let mut lost = 0;
        for thread in self.threads {
            let acknowledged = thread.join().expect("the writer ends");
            assert!(acknowledged.len() > 100, "too few writes to say anything: {}", acknowledged.len());
            lost += acknowledged.iter().filter(|key| is_missing(key)).count();
        }
        lost
    }
}

/// The keys whose writes were acknowledged. A key whose write was not is left: whether it was done is not known.
fn write(id: usize, ports: &[u16], stop: &AtomicBool) -> Vec<String> {
    let mut acknowledged = Vec::new();
    let mut connection: Option<Client> = None;
    for number in 0.. {
        if stop.load(Ordering::Relaxed) {
            break;
        }
        let Some(client) = connection.as_mut() else {
            connection = Client::connect(ports[number % ports.len()]).ok();
            continue;
        };
        let key = format!("w{id}:{number}");
        match client.try_call(&["SET", &key, "x"]) {
            Ok(Value::Simple(_)) => {
                acknowledged.push(key);
                thread::sleep(PACE);
            }
            Ok(_) | Err(_) => {
                connection = None;
                thread::sleep(Duration::from_millis(5));
            }
        }
    }
    acknowledged
}

fn at(port: u16) -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], port))
}

/// Hands over from server 0 to server `to`, `times` at once.
fn hand_over(cluster: &SentinelCluster, to: usize, limit: Duration, times: usize) -> Vec<Result<Outcome, HandoverError>> {
    let sentinels: Vec<SocketAddr> = cluster.addresses().iter().map(|address| address.parse().expect("an address")).collect();
    let (from, to) = (at(cluster.servers[0].port()), at(cluster.servers[to].port()));
    let (entry, leadership) = (Entry::default(), &Leadership::for_good());
    let handover = Handover { master: PRIMARY_NAME, from, to, sentinels: &sentinels, entry, leadership, limit };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    runtime.block_on(futures_util::future::join_all((0..times).map(|_| handover.run())))
}

fn follows(server: &Redis, primary: &Redis) -> bool {
    let info = server.client().line("INFO replication").text();
    info.contains(&format!("master_port:{}\r", primary.port())) && info.contains("master_link_status:up")
}

fn check(engine: Engine) {
    let cluster = SentinelCluster::start(engine, 2);
    let writers = Writers::start(&cluster);
    let to = &cluster.servers[2];
    let outcomes = hand_over(&cluster, 2, LIMIT, 1);
    assert!(matches!(outcomes[..], [Ok(Outcome::Done { primary })] if primary == at(to.port())), "{engine:?}: {outcomes:?}");
    wait_for("the first sentinel to name it", LIMIT, || cluster.primary_port() == to.port());
    for server in &cluster.servers[..2] {
        wait_for("the others to follow", LIMIT, || follows(server, to));
    }
    assert_eq!(writers.lost(to), 0, "{engine:?}: acknowledged writes were lost");
    assert_eq!(to.client().line("CONFIG GET replica-priority").items()[1].text(), "100", "the preference stays behind");
    // Again, there is nothing to do.
    let again = hand_over(&cluster, 2, LIMIT, 1);
    assert!(matches!(again[..], [Ok(Outcome::NoPrimary)]), "{again:?}");
}

/// A sentinel whose node stood still carries nothing out for half a minute, although it takes the order.
#[test]
fn a_planned_handover_passes_over_a_sentinel_in_tilt_mode() {
    for engine in Engine::ALL {
        let cluster = SentinelCluster::start(engine, 1);
        let first: SocketAddr = cluster.addresses()[0].parse().expect("an address");
        stand_still(first.port());
        let outcomes = hand_over(&cluster, 1, LIMIT, 1);
        assert!(matches!(outcomes[..], [Ok(Outcome::Done { .. })]), "{engine:?}: {outcomes:?}");
        assert!(is_in_tilt(first.port()), "{engine:?}: the handover waited for a sentinel that did not act");
    }
}

#[test]
fn a_planned_handover_by_pause_goes_where_it_should_and_loses_no_acknowledged_write() {
    check(Engine::Redis7);
}

#[test]
fn a_planned_coordinated_handover_goes_where_it_should_and_loses_no_acknowledged_write() {
    check(Engine::Valkey9);
}

/// As a control plane and a preStop hook would.
#[test]
fn two_planned_handovers_at_once_are_one() {
    for engine in [Engine::Redis7, Engine::Valkey9] {
        let cluster = SentinelCluster::start(engine, 1);
        let writers = Writers::start(&cluster);
        let outcomes = hand_over(&cluster, 1, LIMIT, 2);
        assert!(outcomes.iter().all(Result::is_ok), "{engine:?}: {outcomes:?}");
        assert_eq!(writers.lost(&cluster.servers[1]), 0, "{engine:?}: acknowledged writes were lost");
    }
}

#[test]
fn a_planned_handover_that_cannot_be_is_given_up_and_writes_go_on() {
    let cluster = SentinelCluster::start(Engine::Redis7, 1);
    let mut client = cluster.servers[0].client();
    // The replica hangs: it will never have everything.
    cluster.servers[1].pause();
    assert_eq!(client.line("SET before x"), Value::Simple("OK".to_owned()));
    let outcomes = hand_over(&cluster, 1, Duration::from_secs(2), 1);
    assert!(matches!(outcomes[..], [Err(HandoverError::Behind(_) | HandoverError::NoReplica(_))]), "{outcomes:?}");
    assert_eq!(client.line("SET after x"), Value::Simple("OK".to_owned()), "writes are paused no longer");
    cluster.servers[1].resume();
    assert_eq!(cluster.primary_port(), cluster.servers[0].port());
}

#[test]
fn a_planned_handover_without_a_majority_of_sentinels_is_given_up_and_writes_go_on() {
    let mut cluster = SentinelCluster::start(Engine::Redis7, 1);
    cluster.sentinels.iter_mut().for_each(crate::support::server::Sentinel::kill);
    let outcomes = hand_over(&cluster, 1, Duration::from_secs(2), 1);
    assert!(matches!(outcomes[..], [Err(HandoverError::NotBegun { .. })]), "{outcomes:?}");
    assert_eq!(cluster.servers[0].client().line("SET after x"), Value::Simple("OK".to_owned()), "writes are paused no longer");
}

/// As when the operator's look at a tier is over, or its work is taken from it.
#[test]
fn a_planned_handover_that_is_dropped_in_the_middle_leaves_no_pause() {
    let cluster = SentinelCluster::start(Engine::Redis7, 1);
    let mut client = cluster.servers[0].client();
    // The replica hangs, and writes are paused while it is waited for.
    cluster.servers[1].pause();
    assert_eq!(client.line("SET before x"), Value::Simple("OK".to_owned()));
    let sentinels: Vec<SocketAddr> = cluster.addresses().iter().map(|address| address.parse().expect("an address")).collect();
    let (from, to) = (at(cluster.servers[0].port()), at(cluster.servers[1].port()));
    let (entry, leadership) = (Entry::default(), &Leadership::for_good());
    let handover = Handover { master: PRIMARY_NAME, from, to, sentinels: &sentinels, entry, leadership, limit: LIMIT };
    let was_told = |client: &mut Client, command: &str| client.line("INFO commandstats").text().contains(command);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    runtime.block_on(async {
        let paused = async {
            while !was_told(&mut client, "cmdstat_client|pause:") {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        tokio::select! {
            outcome = handover.run() => panic!("it waits for the replica: {outcome:?}"),
            () = paused => {}
        }
        let unpaused = async {
            while !was_told(&mut client, "cmdstat_client|unpause:") {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        tokio::time::timeout(LIMIT / 2, unpaused).await.expect("writes are unpaused before the server does it by itself");
    });
    assert_eq!(client.line("SET after x"), Value::Simple("OK".to_owned()));
    cluster.servers[1].resume();
}

/// Its Lease has gone while the sentinels had yet to hear whom they are to prefer, which takes them ten seconds: by then another may act.
#[test]
fn a_planned_handover_begins_nothing_once_another_leads() {
    for engine in [Engine::Redis7, Engine::Valkey9] {
        let cluster = SentinelCluster::start(engine, 2);
        let sentinels: Vec<SocketAddr> = cluster.addresses().iter().map(|address| address.parse().expect("an address")).collect();
        let (from, to) = (at(cluster.servers[0].port()), at(cluster.servers[2].port()));
        let (gives, until) = watch::channel(Some(Instant::now() + 10 * LIMIT));
        let (entry, leadership) = (Entry::default(), &Leadership::given(until));
        let handover = Handover { master: PRIMARY_NAME, from, to, sentinels: &sentinels, entry, leadership, limit: LIMIT };
        let mut preferred = cluster.servers[2].client();
        let mut priority = || preferred.line("CONFIG GET replica-priority").items()[1].text();
        let lose = async {
            while priority() != "1" {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            gives.send_replace(None);
        };
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        let (outcome, ()) = runtime.block_on(async { tokio::join!(handover.run(), lose) });
        assert!(matches!(outcome, Err(HandoverError::NotLeading(address)) if address == from), "{engine:?}: {outcome:?}");
        let told = |port: u16| Client::connect(port).expect("a connection").line("INFO commandstats").text();
        let heard = told(from.port());
        for command in ["client|pause", "client|unpause", "failover", "replicaof"] {
            assert!(!heard.contains(&format!("cmdstat_{command}:")), "{engine:?}: the primary was told {command}: {heard}");
        }
        for sentinel in &sentinels {
            assert!(!told(sentinel.port()).contains("cmdstat_sentinel|failover:"), "{engine:?}: {sentinel} was to fail over");
        }
        assert_eq!(priority(), "100", "the preference stays behind");
    }
}
