//! Snapshots that come through the cache, heartbeats that go there, and origins' connections that sidecars share.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use larder::policy::binding::BindingName;
use larder::policy::heartbeat::{Fleet, Heartbeat, RuleBeat};
use larder::sidecar::slots::slot_of;
use serde_json::{Value as Json, json};
use tempfile::TempDir;

use crate::read_through::{Servers, http_origin, policy, web_rule};
use crate::sidecar_start::ask_owner_socket;
use crate::support::admin::{get, metric};
use crate::support::resp::{Client, Value, encode};
use crate::support::server::{Engine, RedisCluster, SentinelCluster, free_port};
use crate::support::sidecar::{Sidecar, cluster_topology, sentinel_topology};
use crate::support::wait_for;
use crate::support::web::Web;

const LIMIT: Duration = Duration::from_secs(60);
const BOUND: [&str; 2] = ["--binding", "shop"];

fn binding() -> BindingName {
    BindingName::parse("shop").unwrap()
}

/// A snapshot whose generation can be told from the TTL that it gives.
fn of(topology: Json, generation: u64) -> Json {
    let ttl = json!({"default": format!("{}s", generation * 1000), "max": "1000h", "jitter": "0%"});
    let rule = json!({"name": "aside", "keys": "aside:{id}", "strategy": {"cacheAside": {"ttl": ttl}}});
    policy(topology, generation, &[], &[rule])
}

/// Puts `snapshot` where sidecars look for it, and tells them.
fn publish(servers: &Servers, snapshot: &str) {
    let key = binding().snapshot_key();
    let mut server = servers.holder_of(&key);
    assert_eq!(server.call(&["SET", &key, snapshot]), Value::Simple("OK".to_owned()));
    server.call(&["PUBLISH", &key, "newer"]).int();
}

fn generation(sidecar: &Sidecar) -> u64 {
    metric(sidecar, "larder_policy_generation")
}

fn rejected(sidecar: &Sidecar) -> u64 {
    metric(sidecar, "larder_policy_rejected_total")
}

/// Whether a key written through `sidecar` has the TTL of `generation`, give or take a pause of this test.
fn writes_under(generation: u64, servers: &Servers, sidecar: &Sidecar) -> bool {
    assert_eq!(sidecar.client().line("SET aside:probe x"), Value::Simple("OK".to_owned()));
    let ttl = servers.holder_of("aside:probe").line("PTTL aside:probe").int();
    let full = i64::try_from(generation * 1_000_000).unwrap();
    (full - 500_000..=full).contains(&ttl)
}

/// One client of many: every reply is known, and the connection is one to the end.
fn work_until(stop: &AtomicBool, rounds: &AtomicU64, mut client: Client, number: usize) {
    let key = format!("aside:{number}");
    let commands = [encode(&["SET", &key, "x"]), encode(&["GET", &key]), encode(&["PING"])].concat().repeat(4);
    while !stop.load(Ordering::Relaxed) {
        client.send(&commands).unwrap();
        for _ in 0..4 {
            assert_eq!(client.read().unwrap(), Value::Simple("OK".to_owned()));
            assert_eq!(client.read().unwrap().text(), "x");
            assert_eq!(client.read().unwrap(), Value::Simple("PONG".to_owned()));
        }
        rounds.fetch_add(1, Ordering::Relaxed);
        thread::sleep(Duration::from_millis(2));
    }
}

/// Each engine in each topology, one after the other.
fn all_servers() -> impl Iterator<Item = Servers> {
    let of = |engine| {
        let sentinel = move || Servers::Sentinel(SentinelCluster::start(engine, 0));
        let cluster = move || Servers::Cluster(RedisCluster::start(engine, 3, 0));
        [Box::new(sentinel) as Box<dyn Fn() -> Servers>, Box::new(cluster)]
    };
    Engine::ALL.into_iter().flat_map(of).map(|start| start())
}

/// How long after `publish` each sidecar has `wanted` in force.
fn times_until(wanted: u64, sidecars: &[Sidecar], since: Instant) -> Vec<Duration> {
    thread::scope(|scope| {
        let waits = sidecars.iter().map(|sidecar| {
            scope.spawn(move || {
                wait_for("the generation in the cache", LIMIT, || generation(sidecar) >= wanted);
                since.elapsed()
            })
        });
        let waits: Vec<_> = waits.collect();
        waits.into_iter().map(|wait| wait.join().unwrap()).collect()
    })
}

#[test]
fn a_change_through_the_cache_reaches_five_sidecars_under_load() {
    for servers in all_servers() {
        let first = of(servers.topology(), 1);
        let sidecars: Vec<Sidecar> = (0..5).map(|_| Sidecar::start_with(&first, &BOUND)).collect();
        let (stop, rounds) = (AtomicBool::new(false), AtomicU64::new(0));
        let mut times = Vec::new();
        thread::scope(|scope| {
            let clients: Vec<_> = sidecars
                .iter()
                .flat_map(|sidecar| [sidecar.client(), sidecar.client()])
                .enumerate()
                .map(|(number, client)| {
                    let (stop, rounds) = (&stop, &rounds);
                    scope.spawn(move || work_until(stop, rounds, client, number))
                })
                .collect();
            for generation in 2..=21 {
                let since = Instant::now();
                publish(&servers, &of(servers.topology(), generation).to_string());
                times.extend(times_until(generation, &sidecars, since));
            }
            for sidecar in &sidecars {
                wait_for("the newest TTL", LIMIT, || writes_under(21, &servers, sidecar));
            }
            stop.store(true, Ordering::Relaxed);
            clients.into_iter().for_each(|client| client.join().expect("no command fails, and no connection"));
        });
        assert!(rounds.load(Ordering::Relaxed) > 100, "the clients were busy");
        times.sort();
        let at = |share: usize| times[(times.len() * share / 100).min(times.len() - 1)];
        println!("{} changes in five sidecars each: p50 {:?}, p99 {:?}", times.len() / 5, at(50), at(99));
        for sidecar in &sidecars {
            assert_eq!(rejected(sidecar), 0, "{}", sidecar.log());
        }
    }
}

/// A sidecar of the binding `shop` with a directory for secrets and its owner's socket.
struct Bound {
    sidecar: Sidecar,
    directory: TempDir,
}

impl Bound {
    fn start(snapshot: &Json) -> Self {
        let directory = TempDir::new().unwrap();
        let [secrets, socket] = ["secrets", "owner.sock"].map(|name| directory.path().join(name).display().to_string());
        std::fs::create_dir(&secrets).unwrap();
        let sidecar = Sidecar::start_with(snapshot, &["--binding", "shop", "--secrets", &secrets, "--admin-socket", &socket]);
        Self { sidecar, directory }
    }

    fn secret(&self, name: &str) -> String {
        self.directory.path().join("secrets").join(name).display().to_string()
    }

    /// What `/policy` says.
    fn policy(&self) -> Json {
        let answer = ask_owner_socket(&self.directory.path().join("owner.sock"), "/policy");
        serde_json::from_str(answer.split_once("\r\n\r\n").expect("a body").1).expect("JSON")
    }
}

#[test]
fn what_cannot_come_into_force_keeps_the_last_good_one() {
    let (servers, web) = (Servers::cluster(), Web::start());
    let known = http_origin("web", &web, "20s");
    let with_origin = |generation: u64, kind: Json| {
        let mut snapshot = of(servers.topology(), generation);
        snapshot["origins"] =
            json!([known, {"name": "other", "kind": kind, "maxConnections": 2, "connectTimeout": "1s", "timeout": "1s"}]);
        snapshot
    };
    let mut file = of(servers.topology(), 1);
    file["origins"] = json!([known]);
    let bound = Bound::start(&file);
    let mut newer = of(servers.topology(), 9);
    newer["requires"] = 99.into();
    let mut elsewhere = of(servers.topology(), 9);
    elsewhere["cluster"]["name"] = "other".into();
    let mut ahead = of(servers.topology(), 9);
    ahead["generation"] = u64::MAX.into();
    let bad = [
        ("{".to_owned(), Json::Null, "cannot be read"),
        (newer.to_string(), 9.into(), "upgrade the sidecar"),
        (elsewhere.to_string(), 9.into(), "this sidecar serves"),
        (
            with_origin(9, json!({"http": {"url": {"value": "http://169.254.169.254"}}})).to_string(),
            9.into(),
            "once the file brings",
        ),
        (with_origin(9, json!({"sql": {"url": {"file": "/etc/hostname"}}})).to_string(), 9.into(), "not in the directory"),
        (ahead.to_string(), u64::MAX.into(), "too far ahead"),
    ];
    for (count, (text, refused, why)) in bad.iter().enumerate() {
        for _ in 0..2 {
            publish(&servers, text);
        }
        wait_for("it to be refused", LIMIT, || rejected(&bound.sidecar) == count as u64 + 1);
        let told = bound.policy();
        assert_eq!((&told["generation"], &told["refused"]["generation"]), (&1.into(), refused), "{told}");
        assert!(told["refused"]["reason"].as_str().unwrap().contains(why), "{told}");
        assert_eq!((&told["binding"], &told["way"], &told["refused"]["way"]), (&"shop".into(), &"file".into(), &"cache".into()));
        assert_eq!(bound.sidecar.log().matches("a new policy is refused").count(), count + 1, "{}", bound.sidecar.log());
    }
    assert!(writes_under(1, &servers, &bound.sidecar));

    // One that lacks only a secret comes into force with it.
    let secret = bound.secret("other.url");
    let late = with_origin(10, json!({"sql": {"url": {"file": secret}}}));
    publish(&servers, &late.to_string());
    wait_for("it to be refused", LIMIT, || rejected(&bound.sidecar) == bad.len() as u64 + 1);
    assert_eq!(generation(&bound.sidecar), 1);
    std::fs::write(&secret, "sqlite:///nowhere.db").unwrap();
    wait_for("the secret to be found", LIMIT, || generation(&bound.sidecar) == 10);
    let told = bound.policy();
    assert_eq!((&told["way"], &told["refused"]), (&"cache".into(), &Json::Null), "{told}");
    assert!(writes_under(10, &servers, &bound.sidecar));

    // Nothing is lost with the key, nor with the file.
    servers.holder_of(&binding().snapshot_key()).call(&["DEL", &binding().snapshot_key()]).int();
    std::fs::remove_file(bound.sidecar.snapshot_path()).unwrap();
    publish(&servers, "{ }");
    wait_for("it to be refused", LIMIT, || rejected(&bound.sidecar) == bad.len() as u64 + 2);
    assert!(writes_under(10, &servers, &bound.sidecar));
}

#[test]
fn how_long_a_command_is_tried_may_come_through_the_cache() {
    let mut servers = SentinelCluster::start(Engine::Redis7, 0);
    let snapshot = |generation, patience: &str| {
        let mut topology = sentinel_topology(&servers);
        topology["patience"] = patience.into();
        of(topology, generation)
    };
    let bound = Bound::start(&snapshot(1, "1m"));
    let key = binding().snapshot_key();
    let mut server = servers.primary().client();
    assert_eq!(server.call(&["SET", &key, &snapshot(2, "300ms").to_string()]), Value::Simple("OK".to_owned()));
    wait_for("the newer one", LIMIT, || {
        server.call(&["PUBLISH", &key, "newer"]);
        generation(&bound.sidecar) == 2
    });
    assert_eq!(bound.policy()["policy"]["cluster"]["patience"], "300ms", "{}", bound.policy());
    // Nobody may have clients wait for ever.
    server.call(&["SET", &key, &snapshot(3, "2m").to_string()]);
    wait_for("the next one to be refused", LIMIT, || {
        server.call(&["PUBLISH", &key, "newer"]);
        rejected(&bound.sidecar) == 1
    });
    servers.servers[0].kill();
    let mut client = bound.sidecar.client();
    wait_for("a command to be given up", LIMIT, || match client.line("SET aside:1 x") {
        Value::Error(text) => text.contains("tried for 300ms") || text.contains("reached for 300ms"),
        other => panic!("{other:?}"),
    });
}

#[test]
fn a_snapshot_in_the_cache_moves_no_sidecar() {
    let (servers, others) = (Servers::sentinel(), Servers::sentinel());
    let sidecar = Sidecar::start_with(&of(servers.topology(), 1), &BOUND);
    publish(&servers, &of(others.topology(), 2).to_string());
    wait_for("the rules", LIMIT, || generation(&sidecar) == 2);
    wait_for("their TTL, at the same servers", LIMIT, || writes_under(2, &servers, &sidecar));
    // The file may, and the rules that are newer stay.
    let mut moved = of(others.topology(), 1);
    moved["rules"] = json!([]);
    sidecar.replace_snapshot(&moved.to_string());
    wait_for("the other servers", LIMIT, || {
        let set = sidecar.client().line("SET aside:moved x");
        set == Value::Simple("OK".to_owned()) && others.holder_of("aside:moved").line("EXISTS aside:moved").int() == 1
    });
    assert!(writes_under(2, &others, &sidecar));
    // And it listens there.
    publish(&others, &of(servers.topology(), 3).to_string());
    wait_for("what is told there", LIMIT, || generation(&sidecar) == 3);
    assert!(writes_under(3, &others, &sidecar));
}

#[test]
fn the_newest_of_file_and_cache_wins_whatever_comes_first() {
    let servers = Servers::cluster();
    let sidecar = Sidecar::start_with(&of(servers.topology(), 1), &BOUND);
    let stop = AtomicBool::new(false);
    let last = 41;
    thread::scope(|scope| {
        let watching = scope.spawn(|| {
            let mut newest = 0;
            while !stop.load(Ordering::Relaxed) {
                let now = generation(&sidecar);
                assert!(now >= newest, "{now} after {newest}");
                newest = now;
            }
        });
        // Each way brings what is newer and what is long over, without order.
        let shuffled = |seed| {
            let mut all: Vec<u64> = (2..=last).collect();
            fastrand::Rng::with_seed(seed).shuffle(&mut all);
            all
        };
        for (cached, filed) in shuffled(1).into_iter().zip(shuffled(2)) {
            publish(&servers, &of(servers.topology(), cached).to_string());
            sidecar.replace_snapshot(&of(servers.topology(), filed).to_string());
            thread::sleep(Duration::from_millis(fastrand::u64(0..60)));
        }
        publish(&servers, &of(servers.topology(), last).to_string());
        wait_for("the newest", LIMIT, || generation(&sidecar) == last);
        stop.store(true, Ordering::Relaxed);
        watching.join().unwrap();
    });
    assert!(writes_under(last, &servers, &sidecar));
    assert_eq!(rejected(&sidecar), 0, "{}", sidecar.log());
}

#[test]
fn without_a_cache_the_file_counts() {
    let nowhere = json!({"name": "main", "topology": {"cluster": {"seeds": [format!("127.0.0.1:{}", free_port())]}}});
    let sidecar = Sidecar::start_before(Some(&of(nowhere.clone(), 1)), &BOUND);
    wait_for("the file's policy", LIMIT, || generation(&sidecar) == 1);
    sidecar.replace_snapshot(&of(nowhere, 2).to_string());
    wait_for("the file's next", LIMIT, || generation(&sidecar) == 2);
    assert_eq!(get(&sidecar, "/livez").0, 200);
    assert_eq!(get(&sidecar, "/readyz").0, 503);
}

#[test]
fn clients_wait_for_the_first_snapshot_and_are_told_to_try_again() {
    for servers in [Servers::sentinel(), Servers::cluster()] {
        let sidecar = Sidecar::start_before(None, &BOUND);
        assert_eq!((get(&sidecar, "/livez").0, get(&sidecar, "/readyz").0), (200, 503));
        let mut early = sidecar.client();
        let Value::Error(text) = early.line("GET aside:1") else { panic!("there is nothing to say yet") };
        assert!(text.starts_with("TRYAGAIN no policy has arrived"), "{text}");
        // A file that cannot be used is none.
        sidecar.replace_snapshot("{");
        wait_for("it to be refused", LIMIT, || rejected(&sidecar) == 1);
        assert_eq!(get(&sidecar, "/readyz").0, 503);
        // The cache has a newer one than the file, and can only be found through it.
        publish(&servers, &of(servers.topology(), 5).to_string());
        early.send(&[encode(&["SET", "aside:1", "x"]), encode(&["GET", "aside:1"])].concat()).unwrap();
        sidecar.replace_snapshot(&of(servers.topology(), 4).to_string());
        // The connection is the same; what was sent last is held or answered, never lost.
        let answers = [early.read().unwrap(), early.read().unwrap()];
        if answers[0].is_error() {
            assert!(answers.iter().all(Value::is_error), "{answers:?}");
        } else {
            assert_eq!((answers[0].clone(), answers[1].text()), (Value::Simple("OK".to_owned()), "x".to_owned()));
        }
        wait_for("the newest", LIMIT, || generation(&sidecar) == 5);
        wait_for("the cache", LIMIT, || get(&sidecar, "/readyz").0 == 200);
        wait_for("its TTL", LIMIT, || writes_under(5, &servers, &sidecar));
        assert_eq!(early.line("SET aside:2 x"), Value::Simple("OK".to_owned()));
        // Started anew with an old file.
        drop(sidecar);
        let again = Sidecar::start_with(&of(servers.topology(), 4), &BOUND);
        wait_for("the newest", LIMIT, || generation(&again) == 5);
    }
}

#[test]
fn a_sidecar_that_waits_can_be_stopped() {
    let mut sidecar = Sidecar::start_before(None, &BOUND);
    let mut client = sidecar.client();
    client.send(&encode(&["GET", "aside:1"])).unwrap();
    sidecar.signal("TERM");
    assert_eq!(sidecar.wait_for_end(LIMIT).code(), Some(0), "{}", sidecar.log());
    assert!(client.read().is_err());
}

/// The names of the binding are all that its login needs for it, beside the rules' keys; and it may come after the sidecar.
#[test]
fn a_login_of_the_binding_s_own_is_enough_and_may_come_late() {
    for servers in [Servers::sentinel(), Servers::cluster()] {
        let nodes = match &servers {
            Servers::Sentinel(sentinel) => &sentinel.servers,
            Servers::Cluster(cluster) => &cluster.servers,
        };
        let (key, fleet, beats) = (binding().snapshot_key(), binding().fleet_key(), binding().heartbeat_channel());
        for node in nodes {
            let rights = [format!("%R~{key}"), format!("%R~{fleet}"), format!("&{key}"), format!("&{beats}")];
            let mut user = vec!["ACL", "SETUSER", "shop", "on", ">hush", "resetchannels", "~aside:*", "+@all"];
            user.extend(rights.iter().map(String::as_str));
            assert_eq!(node.client().call(&user), Value::Simple("OK".to_owned()));
        }
        let secrets = TempDir::new().unwrap();
        let [user, password] = ["username", "password"].map(|name| secrets.path().join(name));
        let with_login = |generation| {
            let mut snapshot = of(servers.topology(), generation);
            snapshot["cluster"]["auth"] = json!({"usernameFile": user, "passwordFile": password});
            snapshot
        };
        let shown = secrets.path().display().to_string();
        let sidecar = Sidecar::start_before(Some(&with_login(1)), &["--binding", "shop", "--secrets", &shown]);
        wait_for("the login to be missed", LIMIT, || rejected(&sidecar) == 1);
        assert_eq!((get(&sidecar, "/livez").0, get(&sidecar, "/readyz").0), (200, 503));
        std::fs::write(&user, "shop").unwrap();
        std::fs::write(&password, "hush").unwrap();
        wait_for("the login to be found", LIMIT, || generation(&sidecar) == 1);
        let mut subscriber = servers.holder_of(&key);
        subscriber.send(&encode(&["SUBSCRIBE", &beats])).unwrap();
        hear(&mut subscriber, |beat| beat.generation == Some(1));
        let told = [b"SET".as_slice(), fleet.as_bytes(), &Fleet::of(3).to_json()];
        assert_eq!(servers.holder_of(&fleet).call(&told), Value::Simple("OK".to_owned()));
        publish(&servers, &with_login(2).to_string());
        wait_for("the snapshot in the cache", LIMIT, || generation(&sidecar) == 2);
        wait_for("the number of sidecars", LIMIT, || metric(&sidecar, "larder_sidecars") == 3);
        wait_for("the servers", LIMIT, || get(&sidecar, "/readyz").0 == 200);
        assert!(writes_under(2, &servers, &sidecar));
        let foreign = sidecar.client().line("SET other x");
        assert!(matches!(&foreign, Value::Error(text) if text.starts_with("NOPERM")), "{foreign:?}");
        let log = sidecar.log();
        assert!(!log.contains("may not use") && !log.contains("hush"), "{log}");
    }
}

#[test]
fn a_failover_loses_no_snapshot() {
    let mut cluster = SentinelCluster::start(Engine::Redis7, 2);
    let topology = sentinel_topology(&cluster);
    let sidecar = Sidecar::start_with(&of(topology.clone(), 1), &BOUND);
    let key = binding().snapshot_key();
    let put = |server: &mut Client, generation: u64| {
        assert_eq!(server.call(&["SET", &key, &of(topology.clone(), generation).to_string()]), Value::Simple("OK".to_owned()));
    };
    let mut first = cluster.primary().client();
    put(&mut first, 2);
    first.call(&["PUBLISH", &key, "2"]).int();
    wait_for("the first primary's", LIMIT, || generation(&sidecar) == 2);
    let old = cluster.primary_port();
    cluster.servers.iter_mut().find(|server| server.port() == old).unwrap().kill();
    wait_for("another primary", LIMIT, || {
        let port = cluster.primary_port();
        let role = (port != old).then(|| Client::connect(port).and_then(|mut client| client.try_call(&["ROLE"])));
        matches!(role, Some(Ok(role)) if role.items()[0].text() == "master")
    });
    // Nobody is told: it is read once the sidecar is there.
    put(&mut cluster.primary().client(), 3);
    wait_for("the new primary's", LIMIT, || generation(&sidecar) == 3);
}

#[test]
fn the_line_moves_with_its_slot() {
    let mut cluster = RedisCluster::start(Engine::Valkey9, 3, 1);
    let topology = cluster_topology(&cluster);
    let sidecar = Sidecar::start_with(&of(topology.clone(), 1), &BOUND);
    let key = binding().snapshot_key();
    let slot = slot_of(key.as_bytes());
    let put = |server: &mut Client, generation: u64| {
        let reply = server.try_call(&["SET", &key, &of(topology.clone(), generation).to_string()]);
        matches!(reply, Ok(Value::Simple(_)))
    };
    assert!(put(&mut cluster.owner(slot).client(), 2));
    wait_for("the sidecar to listen where the key is", LIMIT, || {
        cluster.owner(slot).client().call(&["PUBLISH", &key, "2"]).int() == 1
    });
    wait_for("the first owner's", LIMIT, || generation(&sidecar) == 2);
    let old = cluster.owner(slot).port();
    cluster.servers.iter_mut().find(|server| server.port() == old).unwrap().kill();
    wait_for("another owner", LIMIT, || {
        let owner = cluster.owner(slot).port();
        owner != old && Client::connect(owner).is_ok_and(|mut client| put(&mut client, 3))
    });
    // Nobody is told: it is read once the sidecar is there.
    wait_for("the next owner's", LIMIT, || generation(&sidecar) == 3);
}

/// The heartbeats that a server hears, until one is as `wanted`.
fn hear(subscriber: &mut Client, wanted: impl Fn(&Heartbeat) -> bool) -> Heartbeat {
    let deadline = Instant::now() + LIMIT;
    loop {
        assert!(Instant::now() < deadline, "no such heartbeat");
        let message = subscriber.read().expect("a message").items();
        if message[0].text() == "message" {
            let beat = Heartbeat::parse(message[2].text().as_bytes()).expect("a heartbeat");
            assert_eq!(beat.binding, "shop");
            if wanted(&beat) {
                return beat;
            }
        }
    }
}

#[test]
fn heartbeats_tell_what_happened() {
    for servers in [Servers::sentinel(), Servers::cluster()] {
        let channel = binding().heartbeat_channel();
        // Any node of a Cluster hears them.
        let mut subscriber = servers.holder_of("anywhere");
        subscriber.send(&encode(&["SUBSCRIBE", &channel])).unwrap();
        let sidecar = Sidecar::start_in(&of(servers.topology(), 7), &BOUND, &[("POD_NAME", "shop-0")]);
        let unused = hear(&mut subscriber, |_| true);
        assert!(unused.sidecar.starts_with("shop-0-") && unused.generation == Some(7), "{unused:?}");
        assert_eq!((unused.refused, unused.understands), (None, larder::policy::snapshot::VERSION));
        let mut client = sidecar.client();
        for _ in 0..10 {
            client.line("SET aside:1 x");
            client.line("GET aside:1");
        }
        client.line("GET aside:2");
        client.line("GET plain");
        let mut newer = of(servers.topology(), 8);
        newer["requires"] = 99.into();
        publish(&servers, &newer.to_string());
        let beat = hear(&mut subscriber, |beat| beat.refused.is_some() && beat.rules.iter().any(|rule| rule.hits == 10));
        assert_eq!(beat.refused.as_ref().and_then(|refused| refused.generation), Some(8), "{beat:?}");
        assert_eq!((beat.generation, beat.clients), (Some(7), 1), "{beat:?}");
        let aside = RuleBeat { name: "aside".to_owned(), hits: 10, misses: 1, without_ttl: 10, ..RuleBeat::default() };
        assert_eq!(beat.rules[0], aside);
        assert_eq!((beat.rules_left_out, beat.sidecar == unused.sidecar), (0, true));
        drop(client);
        let left = hear(&mut subscriber, |beat| beat.clients == 0);
        assert!(left.clients_ever >= 2, "{left:?}");
        assert!(metric(&sidecar, "larder_heartbeats_total") >= 3);
    }
}

/// The first snapshot that a sidecar finds is of a form that is newer than it is.
#[test]
fn a_sidecar_that_is_too_old_for_its_first_snapshot_is_heard_and_told_another() {
    for servers in [Servers::sentinel(), Servers::cluster()] {
        let mut subscriber = servers.holder_of("anywhere");
        subscriber.send(&encode(&["SUBSCRIBE", &binding().heartbeat_channel()])).unwrap();
        let mut newest = of(servers.topology(), 7);
        (newest["version"], newest["requires"], newest["novel"]) = (99.into(), 99.into(), json!(["nothing", "known"]));
        let sidecar = Sidecar::start_before(Some(&newest), &BOUND);
        let beat = hear(&mut subscriber, |_| true);
        assert_eq!((beat.generation, beat.understands), (None, larder::policy::snapshot::VERSION), "{beat:?}");
        let refused = beat.refused.expect("it was refused");
        assert!(refused.generation == Some(7) && refused.reason.contains("upgrade the sidecar"), "{refused:?}");
        // Where the cache is does not let a command pass.
        let mut early = sidecar.client();
        let Value::Error(text) = early.line("SET aside:1 x") else { panic!("nothing is in force yet") };
        assert!(text.starts_with("TRYAGAIN no policy has arrived"), "{text}");
        assert_eq!((generation(&sidecar), get(&sidecar, "/readyz").0), (0, 503));
        assert_eq!(servers.holder_of("aside:1").line("EXISTS aside:1"), Value::Int(0));
        // The file is a minute late.
        publish(&servers, &of(servers.topology(), 8).to_string());
        wait_for("what it understands", LIMIT, || generation(&sidecar) == 8);
        assert_eq!(early.line("SET aside:2 x"), Value::Simple("OK".to_owned()), "on the same connection");
        wait_for("its TTL", LIMIT, || writes_under(8, &servers, &sidecar));
        let beat = hear(&mut subscriber, |beat| beat.generation == Some(8));
        assert_eq!(beat.refused, None);
        // From now on one that is too new keeps the last good one.
        (newest["generation"], newest["cluster"]["topology"]) = (9.into(), json!({"cluster": {"seeds": ["127.0.0.1:1"]}}));
        sidecar.replace_snapshot(&newest.to_string());
        wait_for("it to be refused", LIMIT, || rejected(&sidecar) == 2);
        sidecar.replace_snapshot(&of(servers.topology(), 10).to_string());
        wait_for("the file's", LIMIT, || generation(&sidecar) == 10);
        wait_for("its TTL", LIMIT, || writes_under(10, &servers, &sidecar));
    }
}

#[test]
fn sidecars_share_an_origin_s_connections() {
    let (servers, web) = (Servers::cluster(), Web::start());
    let paths: Vec<String> = (0..4).map(|number| format!("/item/{number}")).collect();
    paths.iter().for_each(|path| web.put(path, "page"));
    let mut origin = http_origin("web", &web, "60s");
    origin["maxTotalConnections"] = 4.into();
    let item = web_rule("item", json!({"wait": "1h"}));
    let mut snapshot = policy(servers.topology(), 1, &[origin], &[item]);
    snapshot["requires"] = 3.into();
    let sidecar = Sidecar::start_with(&snapshot, &BOUND);
    let share = |sidecar: &Sidecar| metric(sidecar, "larder_origin_connections{origin=\"web\"}");
    let level = |what: &str| metric(&sidecar, &format!("larder_origin_{what}{{origin=\"web\"}}"));
    wait_for("nobody counts the sidecars: it is the only one", LIMIT, || share(&sidecar) == 4);
    let fleet = binding().fleet_key();
    assert_eq!(slot_of(fleet.as_bytes()), slot_of(binding().snapshot_key().as_bytes()), "one connection reads both");
    let tell = |sidecars: u32| {
        let mut server = servers.holder_of(&fleet);
        let set = [b"SET".as_slice(), fleet.as_bytes(), &Fleet::of(sidecars).to_json()];
        assert_eq!(server.call(&set), Value::Simple("OK".to_owned()));
        server.call(&["PUBLISH", &binding().snapshot_key(), "1"]).int();
    };
    for (sidecars, wanted) in [(3, 1), (1000, 1), (1, 4), (2, 2)] {
        tell(sidecars);
        wait_for("its share", LIMIT, || share(&sidecar) == wanted);
    }
    assert_eq!(metric(&sidecar, "larder_sidecars"), 2);
    paths.iter().for_each(|path| web.hold(path));
    let mut clients: Vec<Client> = (0..4).map(|_| sidecar.client()).collect();
    for (number, client) in clients.iter_mut().enumerate() {
        client.send(&encode(&["GET", &format!("item:{number}")])).unwrap();
    }
    wait_for("two loads, and two that wait", LIMIT, || (level("inflight"), level("waiting")) == (2, 2));
    // Half the fleet goes: the loads that wait begin.
    tell(1);
    wait_for("four loads", LIMIT, || level("inflight") == 4);
    wait_for("four requests", LIMIT, || paths.iter().map(|path| web.under_way(path)).sum::<usize>() == 4);
    // It comes back: what is under way goes on, and the next ones are fewer.
    tell(2);
    wait_for("its share", LIMIT, || share(&sidecar) == 2);
    paths.iter().for_each(|path| web.release(path));
    for client in &mut clients {
        assert_eq!(client.read().unwrap().text(), "page");
    }
    let mut late = of(servers.topology(), 2);
    late["origins"] = snapshot["origins"].clone();
    late["requires"] = 3.into();
    late["origins"][0]["maxConnections"] = 8.into();
    publish(&servers, &late.to_string());
    wait_for("the changed origin", LIMIT, || generation(&sidecar) == 2);
    assert_eq!(share(&sidecar), 2, "an origin that changed has the same share");
}
