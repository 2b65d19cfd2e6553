//! Applications over a failover, with as much patience as Kubernetes gives them: nobody is told of it. And for whom none is left.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{PoisonError, RwLock};
use std::time::{Duration, Instant};

use larder::api::{CacheCluster, CachePolicy, Reach, SecretKeyRef, compile};
use larder::operator::cache_cluster::build::{DOWN_AFTER, FAILOVER_TIMEOUT, PATIENCE};
use larder::policy::snapshot::Sensitive;
use serde_json::{Value as Json, json};

use super::LONG;
use crate::support::admin::{metric, rule_count};
use crate::support::resp::{Client, Value, encode};
use crate::support::server::{Engine, PRIMARY_NAME, SentinelCluster};
use crate::support::sidecar::{Sidecar, bypass, sentinel_topology};
use crate::support::wait_for;

const APPLICATIONS: usize = 12;
/// What each of them does before the primary is killed, and behind the failover.
const ROUNDS: usize = 100;
/// Fewer than applications: they meet at them.
const SHARED: usize = 8;
/// How often sentinels may fail in their first attempt, as they do where they have no time. That is longer than anybody is to wait.
const TIERS: usize = 4;
/// How soon a sidecar hears of a promotion.
const TAKEN_UP: Duration = Duration::from_secs(1);

/// What the policy of an application that caches aside becomes on Kubernetes.
fn snapshot(servers: &SentinelCluster) -> Json {
    let cluster = json!({"engine": {"kind": "Valkey", "version": "8.1"}, "mode": "Sentinel", "memory": "256Mi"});
    let policy = json!({
        "cacheCluster": "main", "workloads": {"matchLabels": {"app": "shop"}},
        "rules": [
            {"name": "own", "keys": "own:{of}:{id}", "strategy": "CacheAside", "stampede": {"mode": "Disabled"}},
            {"name": "shared", "keys": "shared:{id}", "strategy": "CacheAside"},
        ],
    });
    let cluster = CacheCluster::new("main", serde_json::from_value(cluster).expect("a CacheCluster"));
    let policy = CachePolicy::new("shop", serde_json::from_value(policy).expect("a CachePolicy"));
    let topology = serde_json::from_value(sentinel_topology(servers)["topology"].clone()).expect("a topology");
    let reach = Reach { topology, tls: None, auth: None, sentinel_auth: None, patience: PATIENCE };
    let none = |_: &str, _: &SecretKeyRef| -> Result<Sensitive, String> { Err("there are no Secrets".to_owned()) };
    serde_json::to_value(compile(&cluster, &[&policy], 1, reach, &none).expect("it compiles")).expect("a snapshot")
}

/// Sentinels that take as long as the operator's.
fn watch_as_on_kubernetes(servers: &SentinelCluster) {
    for (number, sentinel) in servers.sentinels.iter().enumerate() {
        let down_after = (DOWN_AFTER + Duration::from_millis(250) * u32::try_from(number).unwrap()).as_millis().to_string();
        let failover = FAILOVER_TIMEOUT.as_millis().to_string();
        let settings = ["SENTINEL", "SET", PRIMARY_NAME, "down-after-milliseconds", &down_after, "failover-timeout", &failover];
        assert_eq!(sentinel.client().call(&settings), Value::Simple("OK".to_owned()));
    }
}

/// Applications that read, and write what they miss, until they are stopped.
#[derive(Default)]
struct Applications {
    stop: AtomicBool,
    rounds: [AtomicUsize; APPLICATIONS],
    /// Held by who writes. A write that is under way when its server dies may have been carried out: that is told, by intent.
    writing: RwLock<()>,
}

impl Applications {
    /// The longest that one command took, or which failed.
    fn work(&self, port: u16, number: usize) -> Result<Duration, String> {
        let mut client = Client::connect(port).expect("the sidecar accepts");
        let mut longest = Duration::ZERO;
        for round in 0.. {
            if self.stop.load(Ordering::Relaxed) {
                break;
            }
            let place = (round + number) % SHARED;
            for key in [format!("own:{number}:{place}"), format!("shared:{place}")] {
                longest = longest.max(self.read(&mut client, &key, round)?);
            }
            self.rounds[number].fetch_add(1, Ordering::Relaxed);
            std::thread::sleep(Duration::from_millis(3));
        }
        Ok(longest)
    }

    /// Reads a key, and writes it where it is missing, and now and then anew.
    fn read(&self, client: &mut Client, key: &str, round: usize) -> Result<Duration, String> {
        let began = Instant::now();
        let reply = client.call(&["GET", key]);
        let mut longest = began.elapsed();
        let is_missing = reply == Value::Nil;
        if !is_missing && !matches!(&reply, Value::Bulk(value) if value == key.as_bytes()) {
            return Err(format!("GET {key}: {reply:?}"));
        }
        if is_missing || round.is_multiple_of(10) {
            let _writing = self.writing.read().unwrap_or_else(PoisonError::into_inner);
            let began = Instant::now();
            let reply = client.call(&["SET", key, key]);
            if reply != Value::Simple("OK".to_owned()) {
                return Err(format!("SET {key}: {reply:?}"));
            }
            longest = longest.max(began.elapsed());
        }
        Ok(longest)
    }

    /// Waits until each has gone so many rounds further.
    fn wait_for_rounds(&self) {
        let before: Vec<usize> = self.rounds.iter().map(|rounds| rounds.load(Ordering::Relaxed)).collect();
        let have_all = || self.rounds.iter().zip(&before).all(|(now, before)| now.load(Ordering::Relaxed) >= before + ROUNDS);
        wait_for("the applications to have worked", LONG, || have_all() || self.stop.load(Ordering::Relaxed));
    }
}

/// Has everybody stop when it is dropped, also where one fails.
struct Stopping<'a>(&'a Applications);

impl Drop for Stopping<'_> {
    fn drop(&mut self) {
        self.0.stop.store(true, Ordering::Relaxed);
    }
}

/// Kills the primary of a tier under applications. How long they were without one, and the longest that one of their commands took, or
/// which failed.
fn kill_a_primary(engine: Engine) -> (Duration, Result<Duration, String>) {
    let mut servers = SentinelCluster::start(engine, 2);
    watch_as_on_kubernetes(&servers);
    let sidecar = Sidecar::start(&snapshot(&servers));
    let old = servers.primary_port();
    let at = servers.servers.iter().position(|server| server.service_port() == old).expect("one of ours");
    let applications = Applications::default();
    std::thread::scope(|scope| {
        let (applications, port) = (&applications, sidecar.port());
        let work = |number| {
            scope.spawn(move || {
                let _stopping = Stopping(applications);
                applications.work(port, number)
            })
        };
        let threads: Vec<_> = (0..APPLICATIONS).map(work).collect();
        let stopping = Stopping(applications);
        applications.wait_for_rounds();
        let writing = applications.writing.write().unwrap_or_else(PoisonError::into_inner);
        let began = Instant::now();
        servers.servers[at].kill();
        wait_for("the sidecar to notice", LONG, || sidecar.log().contains("lost a server connection"));
        drop(writing);
        wait_for("a promotion", LONG, || servers.primary_port() != old);
        let promoted = began.elapsed();
        applications.wait_for_rounds();
        drop(stopping);
        let all: Result<Vec<Duration>, String> = threads.into_iter().map(|thread| thread.join().expect("it ends")).collect();
        (promoted, all.map(|all| all.into_iter().max().unwrap_or_default()))
    })
}

fn nobody_is_told_of_a_killed_primary(engine: Engine) {
    for _ in 0..TIERS {
        let (promoted, longest) = kill_a_primary(engine);
        println!("{engine:?}: promoted after {promoted:?}, the longest command: {longest:?}");
        if promoted + TAKEN_UP < PATIENCE.as_duration() {
            let longest = longest.expect("no command fails");
            assert!(longest >= DOWN_AFTER, "nobody had to wait: the test shows nothing");
            return;
        }
    }
    panic!("no first attempt at a failover succeeded");
}

#[test]
fn nobody_is_told_of_a_killed_primary_of_redis() {
    nobody_is_told_of_a_killed_primary(Engine::Redis7);
}

#[test]
fn nobody_is_told_of_a_killed_primary_of_valkey() {
    nobody_is_told_of_a_killed_primary(Engine::Valkey9);
}

/// A write that follows a miss is stored under the right to it, or not at all: it may be sent to the next primary, too. Of another nobody
/// knows, and that is told.
#[test]
fn a_fill_that_was_under_way_is_sent_to_the_next_primary() {
    let mut servers = SentinelCluster::start(Engine::Redis7, 2);
    let sidecar = Sidecar::start(&snapshot(&servers));
    let mut client = sidecar.client();
    assert_eq!(client.line("SET shared:2 old"), Value::Simple("OK".to_owned()));
    assert_eq!(client.line("GET shared:1"), Value::Nil);
    let old = servers.primary_port();
    let at = servers.servers.iter().position(|server| server.service_port() == old).expect("one of ours");
    servers.servers[at].pause();
    let both = [encode(&["SET", "shared:1", "new"]), encode(&["SET", "shared:2", "new"])].concat();
    client.send(&both).expect("the sidecar reads");
    wait_for("both to lie at a server that answers nobody", LONG, || rule_count(&sidecar, "shared", "ttl_added") == 3);
    servers.servers[at].kill();
    assert_eq!(client.read().expect("an answer"), Value::Simple("OK".to_owned()));
    let told = client.read().expect("an answer");
    assert!(matches!(&told, Value::Error(text) if text.starts_with("UNCERTAIN ")), "{told:?}");
    wait_for("the sentinel that is asked to name another", LONG, || servers.primary_port() != old);
}

/// What waits for a server when its client gives up would else come behind what that client, or another, writes anew.
#[test]
fn nothing_is_written_for_a_client_that_has_given_up() {
    let mut servers = SentinelCluster::start(Engine::Redis7, 0);
    let mut topology = sentinel_topology(&servers);
    topology["patience"] = json!("1m");
    let sidecar = Sidecar::start(&bypass(topology));
    servers.servers[0].kill();
    wait_for("the sidecar to notice", LONG, || sidecar.log().contains("lost a server connection"));
    let set = |key: &str| {
        let mut client = sidecar.client();
        client.send(&encode(&["SET", key, "x"])).expect("the sidecar reads");
        client
    };
    let (gives_up, mut half_closed, mut stays) = (set("given-up"), set("half-closed"), set("stays"));
    drop(gives_up);
    half_closed.stream().shutdown(std::net::Shutdown::Write).expect("a socket");
    // Who still reads is told, long before the policy's patience ends: the other is gone by then as well.
    let told = half_closed.read().expect("an answer");
    assert!(matches!(&told, Value::Error(text) if text.starts_with("TRYAGAIN ") && text.contains("was not sent")), "{told:?}");
    wait_for("both to be gone", LONG, || metric(&sidecar, "larder_clients") == 1);
    servers.servers[0].restart();
    assert_eq!(stays.read().expect("an answer"), Value::Simple("OK".to_owned()));
    let mut server = servers.servers[0].client();
    assert_eq!(server.line("EXISTS given-up half-closed").int(), 0, "{:?}", server.line("KEYS *"));
    assert_eq!(server.line("GET stays").text(), "x");
}
