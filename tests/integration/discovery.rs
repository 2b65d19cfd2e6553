//! Discovery against real servers: failovers, stale sentinels, slot maps, TLS and rotation.

use std::sync::Arc;
use std::time::Duration;

use larder::policy::snapshot::{Auth, Cluster, Tls, Topology};
use larder::policy::units::Span;
use larder::sidecar::access_files::open_access;
use larder::sidecar::resp::Protocol;
use larder::sidecar::upstream::access::{Access, ClusterAccess, Keys};
use larder::sidecar::upstream::dial::{AuthFailure, DialError, Link, dial, dial_primary};
use larder::sidecar::upstream::discovery::{Discovery, Refresh};
use larder::sidecar::upstream::node::NodeAddr;
use larder::sidecar::upstream::redirect::parse_redirect;
use larder::sidecar::upstream::view::{View, ViewKind};
use tempfile::TempDir;
use tokio::sync::watch;
use tokio::time::{Instant, timeout};

use super::support::certificates::{swap_to, tls_arguments, write_certificates};
use super::support::resp::{Client, Value};
use super::support::server::{Engine, PRIMARY_NAME, Redis, RedisCluster, SentinelCluster};

/// How long a change may take to arrive. Long: test machines are busy.
const LONG: Duration = Duration::from_secs(60);

fn run<T>(work: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(work)
}

fn soon() -> Instant {
    Instant::now() + Duration::from_secs(10)
}

fn node(port: u16) -> NodeAddr {
    NodeAddr::new("127.0.0.1", port)
}

fn nobody() -> ClusterAccess {
    let access = Access::fixed(Keys::default());
    ClusterAccess { servers: access.clone(), sentinels: access }
}

fn describe(topology: Topology) -> Cluster {
    Cluster {
        name: "main".to_owned(),
        topology,
        tls: None,
        auth: None,
        sentinel_auth: None,
        patience: Span::from_secs(2),
        idle_transaction: Span::from_secs(60),
    }
}

fn sentinel_topology(sentinels: Vec<String>) -> Topology {
    Topology::Sentinel { master: PRIMARY_NAME.to_owned(), sentinels }
}

fn start(cluster: &Cluster) -> (Discovery, watch::Receiver<Arc<View>>, Refresh) {
    Discovery::start(cluster, nobody(), Arc::default()).expect("the addresses are right")
}

/// Waits until the view is as wanted.
async fn until(views: &mut watch::Receiver<Arc<View>>, what: &str, wanted: impl Fn(&ViewKind) -> bool) -> Arc<View> {
    let found = timeout(LONG, views.wait_for(|view| wanted(&view.kind))).await;
    let found = found.unwrap_or_else(|_| panic!("{what}: not within {LONG:?}")).expect("discovery lives");
    found.clone()
}

/// Runs `work` while rounds are asked for again and again, as workers do whose commands fail.
async fn while_asking<T>(refresh: &Refresh, work: impl Future<Output = T>) -> T {
    let asking = async {
        loop {
            refresh.request();
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    };
    tokio::select! {
        done = work => done,
        () = asking => unreachable!("it never ends"),
    }
}

fn is_primary(kind: &ViewKind, port: u16) -> bool {
    matches!(kind, ViewKind::Primary { node, .. } if node.port() == port)
}

#[test]
fn the_primary_is_followed_through_a_failover() {
    let mut cluster = SentinelCluster::start(Engine::Redis7, 2);
    let old = cluster.primary_port();
    run(async {
        // One seed: the others are learnt.
        let (_discovery, mut views, refresh) = start(&describe(sentinel_topology(cluster.addresses()[..1].to_vec())));
        let first = until(&mut views, "the first primary", |kind| is_primary(kind, old)).await;
        let ViewKind::Primary { replicas, .. } = &first.kind else { panic!("{first:?}") };
        assert_eq!(replicas.len(), 2);
        // The sentinel that was given dies with the primary.
        cluster.sentinels[0].kill();
        cluster.servers[0].kill();
        refresh.request();
        let second = until(&mut views, "the new primary", |kind| !is_primary(kind, old)).await;
        assert!(second.version > first.version);
        let ViewKind::Primary { node: promoted, .. } = &second.kind else { panic!("{second:?}") };
        assert!(cluster.servers[1..].iter().any(|server| server.port() == promoted.port()));
        dial_primary(promoted, &nobody().servers, Protocol::Resp3, soon()).await.expect("it is a primary");
        // The old primary comes back and is told to follow: no way back.
        cluster.servers[0].restart();
        let demoted = async {
            loop {
                let answer = dial_primary(&node(old), &nobody().servers, Protocol::Resp2, soon()).await;
                match answer {
                    Err(DialError::NotPrimary { .. } | DialError::MasterDown { .. } | DialError::Loading { .. }) => return,
                    _ => tokio::time::sleep(Duration::from_millis(50)).await,
                }
            }
        };
        timeout(LONG, demoted).await.expect("the old primary follows");
        refresh.request();
        tokio::time::sleep(Duration::from_millis(500)).await;
        assert!(matches!(&views.borrow().kind, ViewKind::Primary { node: now, .. } if now == promoted));
    });
}

#[test]
fn a_sentinel_with_an_old_story_does_not_win() {
    let mut cluster = SentinelCluster::start(Engine::Redis7, 1);
    let old = cluster.primary_port();
    run(async {
        let description = describe(sentinel_topology(cluster.addresses()));
        let (discovery, mut views, refresh) = start(&description);
        until(&mut views, "the first primary", |kind| is_primary(kind, old)).await;
        // One sentinel and the primary are cut off.
        cluster.sentinels[2].kill();
        cluster.servers[0].pause();
        refresh.request();
        let after = until(&mut views, "the new primary", |kind| !is_primary(kind, old)).await;
        // They come back as they were, believing in each other, and those who know better are gone.
        cluster.sentinels[0].kill();
        cluster.sentinels[1].kill();
        cluster.servers[0].resume();
        cluster.sentinels[2].restart();
        dial_primary(&node(old), &nobody().servers, Protocol::Resp2, soon()).await.expect("it believes in itself");
        let mut stale = Client::connect(cluster.sentinels[2].port()).unwrap();
        let told = stale.line(&format!("SENTINEL GET-MASTER-ADDR-BY-NAME {PRIMARY_NAME}"));
        assert_eq!(told.items()[1].text(), old.to_string());
        // A new description of the same cluster forgets nothing.
        discovery.replace(&description, nobody()).expect("the addresses are right");
        for _ in 0..10 {
            refresh.request();
            tokio::time::sleep(Duration::from_millis(100)).await;
            assert_eq!(views.borrow().kind, after.kind);
        }
    });
}

#[test]
fn the_slot_map_follows_moves_and_failovers() {
    let mut cluster = RedisCluster::start(Engine::Redis7, 3, 1);
    let ports: Vec<u16> = cluster.servers.iter().map(Redis::port).collect();
    run(async {
        let (_discovery, mut views, refresh) = start(&describe(Topology::Cluster { seeds: vec![cluster.servers[0].address()] }));
        let view = until(&mut views, "the slot map", ViewKind::is_usable).await;
        let ViewKind::Cluster(map) = &view.kind else { panic!("{view:?}") };
        assert_eq!(map.covered(), 16384);
        for slot in [0, 5461, 10922, 16383] {
            assert_eq!(map.owner(slot), Some(&node(cluster.owner(slot).port())));
        }
        // A replica is told of once it has received something.
        let all_replicas = |kind: &ViewKind| matches!(kind, ViewKind::Cluster(map) if map.nodes().count() == 6);
        while_asking(&refresh, until(&mut views, "the replicas", all_replicas)).await;

        // Slot 0 moves from shard 0 to shard 2; the old owner's redirection says so.
        let to = cluster.servers[2].client().line("CLUSTER MYID").text();
        for server in [2, 0, 1] {
            let reply = cluster.servers[server].client().line(&format!("CLUSTER SETSLOT 0 NODE {to}"));
            assert_eq!(reply, Value::Simple("OK".to_owned()));
        }
        // "06S" is in slot 0.
        let Value::Error(line) = cluster.servers[0].client().line("GET 06S") else { panic!("no redirection") };
        let redirect = parse_redirect(line.as_bytes(), &node(ports[0])).expect("a redirection");
        assert_eq!((redirect.ask, redirect.slot, redirect.node.port()), (false, 0, ports[2]));
        refresh.request_from(&redirect.node);
        let has = |kind: &ViewKind, slot: u16, port: u16| matches!(kind, ViewKind::Cluster(map) if map.owner(slot) == Some(&node(port)));
        until(&mut views, "the moved slot", |kind| has(kind, 0, ports[2])).await;

        // The first seed dies, and its replica takes over.
        cluster.servers[0].kill();
        let promoted = until(&mut views, "the promoted replica", |kind| has(kind, 1, ports[3]));
        while_asking(&refresh, promoted).await;
    });
}

#[test]
fn another_description_is_another_search() {
    let one = RedisCluster::start(Engine::Redis7, 3, 0);
    let two = RedisCluster::start(Engine::Valkey9, 3, 0);
    run(async {
        let seeds = |cluster: &RedisCluster| Topology::Cluster { seeds: cluster.addresses() };
        let (discovery, mut views, _refresh) = start(&describe(seeds(&one)));
        until(&mut views, "the first map", ViewKind::is_usable).await;
        let mut other = describe(seeds(&two));
        other.name = "other".to_owned();
        discovery.replace(&other, nobody()).expect("the addresses are right");
        let is_other =
            |kind: &ViewKind| matches!(kind, ViewKind::Cluster(map) if map.owner(0) == Some(&node(two.servers[0].port())));
        until(&mut views, "the other map", is_other).await;
    });
}

fn with_tls(topology: Topology, dir: &TempDir) -> Cluster {
    let at = |name: &str| dir.path().join("..data").join(name);
    let mut cluster = describe(topology);
    cluster.tls =
        Some(Tls { ca_file: at("ca.pem"), cert_file: Some(at("cert.pem")), key_file: Some(at("key.pem")), server_name: None });
    cluster.auth = Some(Auth { username_file: None, password_file: at("password") });
    cluster
}

#[test]
fn tls_and_logins_follow_their_files() {
    let dir = TempDir::new().unwrap();
    for (version, password) in [("1", "one"), ("2", "two")] {
        let version = dir.path().join(version);
        std::fs::create_dir(&version).unwrap();
        write_certificates(&version);
        std::fs::write(version.join("password"), password).unwrap();
    }
    swap_to(&dir, "1");
    let server =
        Redis::start_with(Engine::Redis7, &tls_arguments(&dir.path().join("1")).iter().map(String::as_str).collect::<Vec<_>>());
    let tls_port = super::support::server::free_port();
    let mut admin = server.client();
    assert_eq!(admin.line(&format!("CONFIG SET tls-port {tls_port}")), Value::Simple("OK".to_owned()));
    assert_eq!(admin.line("CONFIG SET requirepass one"), Value::Simple("OK".to_owned()));
    assert_eq!(admin.line("AUTH one"), Value::Simple("OK".to_owned()));
    run(async {
        let cluster = with_tls(Topology::Cluster { seeds: vec![server.address()] }, &dir);
        let metrics = Arc::new(larder::telemetry::background::Background::default());
        let mut access = open_access(&cluster, metrics.clone()).await.expect("the files are right").servers;
        let target = node(tls_port);
        let (link, _) = dial(&target, &access, Protocol::Resp3, soon()).await.expect("TLS and the login work");
        assert!(matches!(link, Link::Tls(_)));

        // The name in the certificate counts.
        let misnamed = dial(&NodeAddr::new("localhost", tls_port), &access, Protocol::Resp2, soon()).await;
        assert!(matches!(misnamed, Err(DialError::Tls { .. })), "{misnamed:?}");
        // A server without TLS takes the greeting for half a line, and waits for the rest.
        let briefly = Instant::now() + Duration::from_millis(300);
        let plain = dial(&node(server.port()), &access, Protocol::Resp2, briefly).await;
        assert!(matches!(plain, Err(DialError::Timeout { stage: "agreeing on TLS", .. })), "{plain:?}");

        // The server's password changes first, then its certificate and ours, under another authority.
        assert_eq!(admin.line("CONFIG SET requirepass two"), Value::Simple("OK".to_owned()));
        let refused = dial(&target, &access, Protocol::Resp2, soon()).await;
        assert!(matches!(refused, Err(DialError::Auth { failure: AuthFailure::WrongPassword, .. })), "{refused:?}");
        let at = |name: &str| dir.path().join("2").join(name).display().to_string();
        let set = [
            "CONFIG",
            "SET",
            "tls-cert-file",
            &at("cert.pem"),
            "tls-key-file",
            &at("key.pem"),
            "tls-ca-cert-file",
            &at("ca.pem"),
        ];
        assert_eq!(admin.call(&set), Value::Simple("OK".to_owned()));
        let distrusted = dial(&target, &access, Protocol::Resp2, soon()).await;
        assert!(matches!(distrusted, Err(DialError::Tls { .. })), "{distrusted:?}");
        swap_to(&dir, "2");
        timeout(LONG, access.changed()).await.expect("the new files are seen");
        dial(&target, &access, Protocol::Resp2, soon()).await.expect("the new keys work");
        assert_eq!((metrics.secrets_renewed.get(), metrics.secrets_rejected.get()), (1, 0));
    });
}

#[test]
fn logins_and_roles_have_precise_errors() {
    let primary = Redis::start(Engine::Redis7);
    let replica = Redis::start_with(Engine::Redis7, &["--replicaof", "127.0.0.1", &primary.port().to_string()]);
    let locked = Redis::start(Engine::Redis7);
    locked.client().line("CONFIG SET requirepass secret");
    run(async {
        let access = nobody().servers;
        let role = dial_primary(&node(replica.port()), &access, Protocol::Resp2, soon()).await;
        assert!(matches!(role, Err(DialError::NotPrimary { .. })), "{role:?}");
        dial(&node(replica.port()), &access, Protocol::Resp3, soon()).await.expect("a replica can be dialled");
        let required = dial(&node(locked.port()), &access, Protocol::Resp2, soon()).await;
        assert!(matches!(required, Err(DialError::Auth { failure: AuthFailure::Required, .. })), "{required:?}");
        assert_eq!(replica.client().line("CONFIG SET replica-serve-stale-data no"), Value::Simple("OK".to_owned()));
        drop(primary);
        let orphaned = async {
            loop {
                match dial(&node(replica.port()), &access, Protocol::Resp2, soon()).await {
                    Err(DialError::MasterDown { .. }) => return,
                    _ => tokio::time::sleep(Duration::from_millis(20)).await,
                }
            }
        };
        timeout(LONG, orphaned).await.expect("the orphan refuses");
    });
}
