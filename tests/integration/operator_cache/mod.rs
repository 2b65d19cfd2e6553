//! What the operator does over the cache for bindings, with real servers and real sidecars: snapshots that are there whatever becomes of
//! servers, and figures of sidecars that are heard.

mod cluster;
mod scale;

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant, UNIX_EPOCH};

use larder::operator::admin::{Entry, Keys};
use larder::operator::cache_policy::cache::{Caches, Figures, Pace, Servers, Wanted};
use larder::operator::cache_policy::delivery::{Standing, Wish, decide};
use larder::operator::cache_policy::merge::Merged;
use larder::operator::cache_policy::origins::Files;
use larder::operator::election::Leadership;
use larder::operator::metrics::Metrics;
use larder::operator::queue::Key;
use larder::policy::Snapshot;
use larder::policy::binding::BindingName;
use larder::policy::heartbeat::Fleet;
use larder::policy::snapshot::VERSION;
use serde_json::{Value as Json, json};
use tempfile::TempDir;
use tokio::runtime::{Builder, Handle};
use tokio::sync::oneshot;

use crate::read_through::policy;
use crate::support::admin::metric;
use crate::support::resp::{Client, Value};
use crate::support::server::{Engine, PRIMARY_NAME, Redis, SentinelCluster};
use crate::support::sidecar::{Sidecar, sentinel_topology};
use crate::support::wait_for;

const LIMIT: Duration = Duration::from_secs(60);
const BOUND: [&str; 2] = ["--binding", "shop"];

/// An operator's part in caches, on a thread of its own.
struct Operator {
    caches: Caches,
    metrics: Arc<Metrics>,
    /// How often figures were said to be worth telling.
    told: Arc<AtomicUsize>,
    handle: Handle,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Operator {
    /// One that looks every second, and tells sidecars of fewer after three.
    fn start() -> Self {
        let pace = Pace { check: Duration::from_secs(1), tick: Duration::from_millis(500), hold: Duration::from_secs(3) };
        let (metrics, told) = (Arc::new(Metrics::default()), Arc::new(AtomicUsize::new(0)));
        let count = told.clone();
        let caches = Caches::with_pace(Leadership::for_good(), metrics.clone(), pace, move |cluster, binding| {
            count.fetch_add(usize::from((cluster, binding) == (&key(), &shop())), Ordering::Relaxed);
        });
        let (stop, stopped) = oneshot::channel::<()>();
        let runtime = Builder::new_current_thread().enable_all().build().expect("a runtime");
        let handle = runtime.handle().clone();
        let thread = thread::spawn(move || drop(runtime.block_on(stopped)));
        Self { caches, metrics, told, handle, stop: Some(stop), thread: Some(thread) }
    }

    fn set(&self, wanted: Option<Wanted>) {
        let _inside = self.handle.enter();
        self.caches.set(&key(), wanted);
    }

    fn figures(&self) -> Figures {
        self.caches.figures(&key(), &shop()).expect("the binding is known")
    }

    /// Waits until the figures are as they are to be.
    #[track_caller]
    fn await_figures(&self, what: &str, mut done: impl FnMut(&Figures) -> bool) -> Figures {
        let deadline = Instant::now() + LIMIT;
        loop {
            // At first the task has not heard of the binding.
            let figures = self.caches.figures(&key(), &shop());
            match figures {
                Some(figures) if done(&figures) => return figures,
                figures => assert!(Instant::now() < deadline, "{what}: {figures:?}"),
            }
            thread::sleep(Duration::from_millis(20));
        }
    }
}

impl Drop for Operator {
    fn drop(&mut self) {
        self.stop.take();
        let ended = self.thread.take().map(JoinHandle::join);
        assert!(ended.is_some_and(|ended| ended.is_ok()) || thread::panicking(), "the operator's thread failed");
    }
}

fn key() -> Key {
    Key { namespace: "store".to_owned(), name: "main".to_owned() }
}

fn shop() -> BindingName {
    BindingName::parse("shop").unwrap()
}

fn at(port: u16) -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], port))
}

/// A snapshot with two rules.
fn snapshot(servers: &SentinelCluster, generation: u64) -> Json {
    snapshot_at(sentinel_topology(servers), generation)
}

fn snapshot_at(topology: Json, generation: u64) -> Json {
    let ttl = json!({"default": format!("{}s", generation * 1000), "max": "1000h", "jitter": "0%"});
    let rule = |name: &str| json!({"name": name, "keys": format!("{name}:{{id}}"), "strategy": {"cacheAside": {"ttl": ttl}}});
    policy(topology, generation, &[], &[rule("aside"), rule("unused")])
}

fn place(servers: &SentinelCluster) -> Servers {
    Servers {
        servers: servers.servers.iter().map(|server| at(server.port())).collect(),
        sentinels: servers.sentinels.iter().map(|sentinel| at(sentinel.port())).collect(),
        master: PRIMARY_NAME.to_owned(),
        in_cluster: false,
    }
}

/// This snapshot, or no binding at all.
fn wanted(servers: &SentinelCluster, generation: Option<u64>) -> Option<Wanted> {
    let bindings = generation.map(|generation| (shop(), Arc::from(snapshot(servers, generation).to_string())));
    Some(Wanted { servers: place(servers), keys: Keys::from(Entry::default()), bindings: bindings.into_iter().collect() })
}

/// What a server has at the binding's key: the generation. Zero: nothing.
fn generation_at(server: &mut Client) -> u64 {
    match server.try_call(&["GET", &shop().snapshot_key()]) {
        Ok(Value::Bulk(text)) => serde_json::from_slice::<Json>(&text).map_or(0, |json| json["generation"].as_u64().unwrap_or(0)),
        _ => 0,
    }
}

fn fleet_at(server: &mut Client) -> Option<u32> {
    match server.call(&["GET", &shop().fleet_key()]) {
        Value::Bulk(text) => Some(Fleet::parse(&text).expect("a number of sidecars").sidecars),
        _ => None,
    }
}

fn in_force(sidecar: &Sidecar) -> u64 {
    metric(sidecar, "larder_policy_generation")
}

/// Two sidecars that have the first generation from a file, and know who they are.
fn sidecars(servers: &SentinelCluster) -> [Sidecar; 2] {
    ["shop-0", "shop-1"].map(|pod| Sidecar::start_in(&snapshot(servers, 1), &BOUND, &[("POD_NAME", pod)]))
}

#[test]
fn two_sidecars_are_told_and_heard() {
    for engine in Engine::ALL {
        let servers = SentinelCluster::start(engine, 1);
        let [one, two] = sidecars(&servers);
        let operator = Operator::start();
        operator.set(wanted(&servers, Some(2)));
        operator.await_figures("both under the second", |figures| figures.current == 2);
        assert_eq!((in_force(&one), in_force(&two)), (2, 2));
        let mut primary = servers.primary().client();
        wait_for("their number", LIMIT, || fleet_at(&mut primary) == Some(2));
        let ttl = primary.call(&["TTL", &shop().fleet_key()]).int();
        assert!((80_000..=86_400).contains(&ttl), "{ttl}");
        wait_for("both to know it", LIMIT, || [&one, &two].iter().all(|sidecar| metric(sidecar, "larder_sidecars") == 2));

        // A change takes as long as a message does.
        let mut times = Vec::new();
        for generation in 3..23 {
            let since = Instant::now();
            operator.set(wanted(&servers, Some(generation)));
            wait_for("the next generation", LIMIT, || in_force(&one) == generation && in_force(&two) == generation);
            times.push(since.elapsed());
        }
        times.sort();
        println!("{engine:?}: {} changes in two sidecars: p50 {:?}, most {:?}", times.len(), times[10], times[19]);

        // What they count is summed, nonsense on the channel or not.
        for nonsense in ["{".to_owned(), "x".repeat(1 << 20), r#"{"version":1,"binding":"other"}"#.to_owned(), String::new()] {
            primary.call(&["PUBLISH", &shop().heartbeat_channel(), &nonsense]).int();
        }
        for sidecar in [&one, &two] {
            let mut client = sidecar.client();
            assert_eq!((client.line("GET aside:1").is_error(), client.line("SET aside:1 x").is_error()), (false, false));
            (0..10).for_each(|_| assert_eq!(client.line("GET aside:1").text(), "x"));
        }
        let figures =
            operator.await_figures("all reads", |figures| figures.rules.get("aside").is_some_and(|rule| rule.hits >= 20));
        assert_eq!(
            (figures.live, figures.unused, figures.refused, figures.without_snapshot),
            (2, 0, None, 0),
            "{:?}",
            figures.rules
        );
        assert_eq!(figures.generations, [(22, 2)]);
        assert!(figures.recent["aside"].hits >= 20 && figures.listening);
        let told = operator.metrics.render();
        let nonsense = told.lines().find(|line| line.starts_with("larder_operator_heartbeats_total{result=\"nonsense\"}"));
        assert!(nonsense.is_some_and(|line| line.ends_with(" 3") || line.ends_with(" 4")), "{told}");
        assert!(operator.told.load(Ordering::Relaxed) >= 2);

        // One ends, and what was counted stays.
        drop(two);
        let figures = operator.await_figures("one to be missed", |figures| figures.live == 1);
        assert!(figures.rules["aside"].hits >= 20);
        wait_for("the other to have all", LIMIT, || fleet_at(&mut primary) == Some(1));
        operator.await_figures("it to be said", |figures| figures.fleet == Some(1));
    }
}

/// What an older sidecar tells, who knows the second form of snapshots.
fn older_beat() -> Vec<u8> {
    let beat = json!({
        "version": 1, "sidecar": "shop-old-1", "binding": shop().to_string(), "larder": "0.0.9", "understands": 2, "generation": 1,
        "uptimeSeconds": 100, "clients": 1, "clientsEver": 1,
    });
    beat.to_string().into_bytes()
}

/// A sidecar that is older than the operator, beside one that is not: both are told what both understand, until the older one is gone.
#[test]
fn an_older_sidecar_is_told_what_it_understands() {
    let servers = SentinelCluster::start(Engine::Valkey9, 0);
    let mut policies = snapshot(&servers, 1);
    (policies["version"], policies["requires"]) = (3.into(), 3.into());
    policies["origins"] = json!([{"name": "api", "kind": {"http": {"url": {"file": "/etc/larder/secret/api"}}}, "maxConnections": 2,
        "maxTotalConnections": 9, "connectTimeout": "1s", "timeout": "1s"}]);
    let policies: Snapshot = serde_json::from_value(policies).expect("a snapshot");
    let merged = Merged {
        cluster: "main".to_owned(),
        binding: shop(),
        snapshot: Some(policies),
        is_complete: true,
        files: Files::default(),
    };
    // What the operator makes of the policies, given what stands and what was heard.
    let decided = |stands: Option<&Snapshot>, understood| {
        let (snapshot, newest) = (stands.cloned().map(Arc::new), stands.map(|stands| stands.generation));
        let text = stands.map(|stands| Arc::from(serde_json::to_string(stands).expect("it serialises")));
        let standing = Standing { text, snapshot, newest, understood, ..Standing::default() };
        decide(&standing, Wish::Merged(&merged), None, UNIX_EPOCH + Duration::from_secs(1)).expect("something is wanted").snapshot
    };
    let secrets = TempDir::new().expect("a directory");
    std::fs::write(secrets.path().join("api"), "http://127.0.0.1:1").expect("the directory is writable");
    let of_sidecars = |snapshot: &Snapshot| {
        let text = serde_json::to_string(snapshot).expect("it serialises");
        text.replace("/etc/larder/secret", &secrets.path().display().to_string())
    };
    let first = decided(None, None);
    assert_eq!((first.version, first.requires), (3, 3), "nobody is known to be older");
    let json = serde_json::from_str(&of_sidecars(&first)).expect("JSON");
    let shown = secrets.path().display().to_string();
    let sidecar = Sidecar::start_with(&json, &[&BOUND[..], &["--secrets", &shown]].concat());
    let operator = Operator::start();
    let put = |snapshot: &Snapshot| {
        let bindings = [(shop(), Arc::from(of_sidecars(snapshot)))].into();
        operator.set(Some(Wanted { servers: place(&servers), keys: Keys::from(Entry::default()), bindings }));
    };
    put(&first);
    operator.await_figures("one sidecar", |figures| figures.understands == Some(VERSION));
    let (mut server, channel, beat) = (servers.primary().client(), shop().heartbeat_channel(), older_beat());
    let figures = operator.await_figures("the older one", |figures| {
        server.call(&[b"PUBLISH".as_slice(), channel.as_bytes(), &beat]);
        figures.understands == Some(2)
    });
    let second = decided(Some(&first), figures.understands);
    assert_eq!((second.version, second.requires, second.generation), (2, 1, first.generation + 1));
    put(&second);
    operator.await_figures("the newer one follows as well", |figures| figures.generations.contains(&(second.generation, 1)));
    assert_eq!(in_force(&sidecar), second.generation);
    // It is heard no more.
    let figures = operator.await_figures("the older one to be gone", |figures| figures.understands == Some(VERSION));
    let third = decided(Some(&second), figures.understands);
    assert_eq!((third.version, third.requires, third.generation), (3, 3, second.generation + 1));
    put(&third);
    wait_for("all of it to be in force", LIMIT, || in_force(&sidecar) == third.generation);
}

#[test]
fn what_the_cache_loses_is_put_back() {
    for engine in Engine::ALL {
        let mut servers = SentinelCluster::start(engine, 0);
        let [one, _two] = sidecars(&servers);
        let operator = Operator::start();
        operator.set(wanted(&servers, Some(2)));
        operator.await_figures("both", |figures| figures.current == 2 && figures.fleet == Some(2));
        let mut primary = servers.primary().client();
        let is_whole = |server: &mut Client, generation| generation_at(server) == generation && fleet_at(server) == Some(2);
        wait_for("all of it", LIMIT, || is_whole(&mut primary, 2));
        assert_eq!(primary.line("FLUSHALL"), Value::Simple("OK".to_owned()));
        wait_for("all of it after the flush", LIMIT, || is_whole(&mut primary, 2));

        // A value of another type, and one that is none.
        primary.call(&["DEL", &shop().snapshot_key(), "larder:bindings"]).int();
        primary.call(&["LPUSH", &shop().snapshot_key(), "x"]).int();
        primary.call(&["SET", "larder:bindings", "x"]).is_error();
        wait_for("a snapshot instead of a list", LIMIT, || generation_at(&mut primary) == 2);
        assert!(!primary.call(&["SET", &shop().snapshot_key(), &"x".repeat(2 << 20)]).is_error());
        wait_for("a snapshot instead of something large", LIMIT, || generation_at(&mut primary) == 2);

        // A server that begins anew has nothing.
        servers.servers[0].restart();
        let mut primary = servers.servers[0].client();
        wait_for("all of it after a restart", LIMIT, || is_whole(&mut primary, 2));
        operator.await_figures("both, after a restart", |figures| figures.listening && figures.current == 2);
        operator.set(wanted(&servers, Some(3)));
        wait_for("the next generation", LIMIT, || in_force(&one) == 3);

        // What is newer stays, until something newer still is wanted.
        assert!(!primary.call(&["SET", &shop().snapshot_key(), &snapshot(&servers, 50).to_string()]).is_error());
        operator.await_figures("the newer one to be seen", |figures| figures.newer_in_cache == Some(50));
        operator.set(wanted(&servers, Some(4)));
        operator.await_figures("what is wanted", |figures| figures.wanted == 4);
        assert_eq!(generation_at(&mut primary), 50);
        operator.set(wanted(&servers, Some(51)));
        wait_for("what is newer still", LIMIT, || {
            generation_at(&mut primary) == 51 && operator.figures().newer_in_cache.is_none()
        });

        // A binding that is gone leaves nothing, nor does one of an earlier leader's.
        primary.call(&["SADD", "larder:bindings", "earlier", "No Binding", &"x".repeat(100)]).int();
        primary.call(&["SET", "larder:p:earlier", "x"]).is_error();
        operator.set(wanted(&servers, None));
        wait_for("nothing of bindings", LIMIT, || primary.line("EXISTS larder:p:shop larder:p:earlier").int() == 0);
        wait_for("no number of sidecars", LIMIT, || fleet_at(&mut primary).is_none());
        operator.set(wanted(&servers, Some(60)));
        wait_for("it to come again", LIMIT, || generation_at(&mut primary) == 60);
        operator.set(None);
        wait_for("nothing once more", LIMIT, || {
            generation_at(&mut primary) == 0 && operator.caches.figures(&key(), &shop()).is_none()
        });
        operator.set(wanted(&servers, Some(61)));
        wait_for("it to come after all", LIMIT, || generation_at(&mut primary) == 61);
    }
}

#[test]
fn the_primary_is_followed() {
    for engine in Engine::ALL {
        let mut servers = SentinelCluster::start(engine, 2);
        let [one, two] = sidecars(&servers);
        let operator = Operator::start();
        operator.set(wanted(&servers, Some(2)));
        operator.await_figures("both", |figures| figures.current == 2);
        let old = servers.primary_port();
        servers.servers.iter_mut().find(|server| server.port() == old).unwrap().kill();
        // Wanted while there is no primary.
        operator.set(wanted(&servers, Some(3)));
        wait_for("another primary", LIMIT, || servers.primary_port() != old);
        wait_for("the snapshot there", LIMIT, || {
            let port = servers.primary_port();
            Client::connect(port).is_ok_and(|mut client| generation_at(&mut client) == 3)
        });
        operator.await_figures("both there", |figures| figures.listening && figures.current == 2);
        assert_eq!((in_force(&one), in_force(&two)), (3, 3));

        // A planned one, after which the old primary goes on as a replica.
        let back = servers.servers.iter_mut().find(|server| server.port() == old).unwrap();
        back.restart();
        wait_for("the old one as a replica", LIMIT, || {
            is_replica(servers.servers.iter().find(|server| server.port() == old).unwrap())
        });
        let now = servers.primary_port();
        // A sentinel may begin one and give it up where it has not yet heard of the replicas again.
        wait_for("the next primary", LIMIT, || {
            let is_another = servers.primary_port() != now;
            if !is_another {
                let _ = servers.sentinels[0].client().line(&format!("SENTINEL FAILOVER {PRIMARY_NAME}"));
            }
            is_another
        });
        operator.set(wanted(&servers, Some(4)));
        wait_for("the snapshot there", LIMIT, || {
            let port = servers.primary_port();
            Client::connect(port).is_ok_and(|mut client| generation_at(&mut client) == 4)
        });
        operator.await_figures("both there again", |figures| figures.listening && figures.current == 2);
    }
}

fn is_replica(server: &Redis) -> bool {
    // Whoever asks while a sentinel tells it whom to follow is hung up on.
    let told = Client::connect(server.port()).and_then(|mut client| client.try_call(&["INFO", "replication"]));
    matches!(told, Ok(Value::Bulk(text)) if String::from_utf8_lossy(&text).contains("master_link_status:up"))
}

#[test]
fn without_sentinels_the_only_primary_counts() {
    let (primary, replica) = (Redis::start(Engine::Redis7), Redis::start(Engine::Redis7));
    replica.client().call(&["REPLICAOF", "127.0.0.1", &primary.port().to_string()]);
    wait_for("a replica", LIMIT, || is_replica(&replica));
    let operator = Operator::start();
    let servers = Servers { servers: vec![at(replica.port()), at(primary.port())], ..Servers::default() };
    let bindings = BTreeMap::from([(shop(), Arc::from(r#"{"generation":2,"rules":[]}"#))]);
    operator.set(Some(Wanted { servers, keys: Keys::from(Entry::default()), bindings }));
    wait_for("the snapshot", LIMIT, || generation_at(&mut primary.client()) == 2);
    assert_eq!(operator.figures().wanted, 2);
}
