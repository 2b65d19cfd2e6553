//! `larder dev`: both topologies come up, answer, and heal.

use std::process::Command;

use crate::support::dev::{Dev, LIMIT, cluster, info, policy};
use crate::support::resp::{Client, Value};
use crate::support::server::{Engine, free_port};
use crate::support::wait_for;

fn ok() -> Value {
    Value::Simple("OK".to_owned())
}

#[track_caller]
fn check_answers(engine: Engine, mode: &str) {
    let files = [("cache.yaml", cluster(engine, mode, "")), ("policy.yaml", policy("user:{id}"))];
    let mut dev = Dev::start(engine, &files, &["--sidecars", "2"]);
    let ports = dev.ready(2);
    let [first, second] = ports[..] else { panic!("two sidecars: {ports:?}") };
    let mut client = Client::connect(first).unwrap();
    assert_eq!(client.call(&["SET", "user:1", "Ann"]), ok());
    for slot in 0..20 {
        assert_eq!(client.call(&["SET", &format!("free:{slot}"), "x"]), ok());
    }
    let mut client = Client::connect(second).unwrap();
    assert_eq!(client.call(&["GET", "user:1"]), Value::Bulk(b"Ann".to_vec()));
    assert_eq!(client.call(&["DBSIZE"]), Value::Int(21));
    dev.stop();
}

#[test]
fn both_topologies_answer_through_sidecars() {
    check_answers(Engine::Redis7, "Sentinel");
    check_answers(Engine::Valkey9, "Sentinel");
    check_answers(Engine::Valkey9, "Cluster");
}

/// The first of `count` ports in a row that were free a moment ago.
fn free_row(count: u16) -> u16 {
    let is_free = |port: u16| std::net::TcpListener::bind(("127.0.0.1", port)).is_ok();
    let mut firsts = (0..1000).map(|_| free_port()).filter(|first| *first < u16::MAX - count);
    firsts.find(|first| (*first..*first + count).all(is_free)).expect("three free ports in a row")
}

/// As many pods would have them.
#[test]
fn sidecars_listen_on_consecutive_ports_and_numbered_sockets() {
    let files = [("cache.yaml", cluster(Engine::Redis7, "Sentinel", "")), ("policy.yaml", policy("user:{id}"))];
    let (port, admin, directory) = (free_row(3), free_row(3), tempfile::TempDir::new().unwrap());
    let socket = directory.path().join("redis.sock");
    let [listen, admin_at] = [port, admin].map(|port| format!("127.0.0.1:{port}"));
    let arguments = ["--sidecars", "3", "--listen", &listen, "--admin", &admin_at, "--socket", &socket.display().to_string()];
    let mut dev = Dev::start(Engine::Redis7, &files, &arguments);
    assert_eq!(dev.ready(3), [port, port + 1, port + 2]);
    let lines = dev.stdout();
    for (index, line) in lines.lines().enumerate() {
        let own = if index == 0 { socket.display().to_string() } else { format!("{}.{index}", socket.display()) };
        let (port, admin) = (usize::from(port) + index, usize::from(admin) + index);
        assert_eq!(line, format!("ready: redis://127.0.0.1:{port} unix://{own} admin http://127.0.0.1:{admin}"));
        let mut stream = std::os::unix::net::UnixStream::connect(&own).expect("the socket accepts");
        std::io::Write::write_all(&mut stream, b"PING\r\n").unwrap();
        let mut reply = [0; 7];
        std::io::Read::read_exact(&mut stream, &mut reply).unwrap();
        assert_eq!(&reply, b"+PONG\r\n");
        assert!(std::net::TcpStream::connect(("127.0.0.1", u16::try_from(admin).unwrap())).is_ok());
    }
    dev.stop();
    assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 0, "sockets are left behind");
}

#[test]
fn servers_ask_for_the_user_of_the_manifest() {
    let secret = "apiVersion: v1\nkind: Secret\nmetadata: {name: main}\nstringData: {password: 'a \"quoted\" p\\ss'}\n";
    let auth = "  auth: {user: shop, password: {secretKeyRef: {name: main, key: password}}}\n";
    for mode in ["Sentinel", "Cluster"] {
        let files = [("cache.yaml", cluster(Engine::Redis7, mode, auth)), ("secret.yaml", secret.to_owned())];
        let mut dev = Dev::start(Engine::Redis7, &files, &["--sidecars", "0"]);
        let port = dev.ready(1)[0];
        let mut client = Client::connect(port).unwrap();
        let refused = client.call(&["GET", "a"]);
        assert!(matches!(&refused, Value::Error(text) if text.starts_with("NOAUTH")), "{refused:?}");
        assert_eq!(client.call(&["AUTH", "shop", "a \"quoted\" p\\ss"]), ok());
        for pid in dev.children() {
            let arguments = std::fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            assert!(!arguments.contains("quoted"), "{arguments}");
        }
        dev.stop();
    }
}

/// The primary is killed; a replica takes its place with the data, and the killed server comes back behind it.
#[track_caller]
fn check_heals(mode: &str) {
    let files = [("cache.yaml", cluster(Engine::Redis7, mode, ""))];
    let mut dev = Dev::start(Engine::Redis7, &files, &["--sidecars", "0"]);
    let ports = dev.ready(1);
    let is_primary = |port: &u16| info(*port, "role").as_deref() == Some("master");
    let primary = *ports.iter().find(|port| is_primary(port)).expect("a primary");
    let mut client = Client::connect(primary).unwrap();
    // Slot 0 and all slots of the first shard are the first server's.
    let key = (0..).map(|n| format!("k{n}")).find(|key| client.call(&["SET", key, "kept"]) == ok()).unwrap();
    assert_eq!(client.call(&["WAIT", "1", "30000"]), Value::Int(1));
    let pid = info(primary, "process_id").unwrap();
    assert!(Command::new("kill").args(["-9", &pid]).status().unwrap().success());
    dev.wait_for_stderr("and is started again");
    let has_key = |port: u16| {
        let reply = Client::connect(port).ok().and_then(|mut client| client.try_call(&["GET", &key]).ok());
        reply == Some(Value::Bulk(b"kept".to_vec()))
    };
    let follows = |port: u16| info(port, "master_link_status").as_deref() == Some("up");
    wait_for("the killed server follows another", LIMIT, || follows(primary));
    let successors: Vec<u16> = ports.iter().copied().filter(|port| is_primary(port) && has_key(*port)).collect();
    assert_eq!(successors.len(), 1, "{ports:?}: {}", dev.stderr());
    let of = info(primary, "master_port").unwrap();
    assert_eq!(of, successors[0].to_string());
    assert!(info(primary, "db0").is_some_and(|keys| keys.starts_with("keys=1,")), "the data is on both again");
    dev.stop();
}

#[test]
fn a_killed_primary_comes_back_as_a_replica_under_sentinel() {
    check_heals("Sentinel");
}

#[test]
fn a_killed_primary_comes_back_as_a_replica_in_a_cluster() {
    check_heals("Cluster");
}

/// The children that are sentinels.
fn sentinels(dev: &Dev) -> Vec<u32> {
    let is_sentinel = |pid: &u32| {
        let arguments = std::fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        // A server that is up calls itself by its address.
        arguments.contains("sentinel")
    };
    dev.children().into_iter().filter(is_sentinel).collect()
}

#[test]
fn a_sentinel_that_dies_is_started_again_and_watches() {
    let mut dev = Dev::start(Engine::Redis7, &[("cache.yaml", cluster(Engine::Redis7, "Sentinel", ""))], &["--sidecars", "1"]);
    let mut client = Client::connect(dev.ready(1)[0]).unwrap();
    let before = sentinels(&dev);
    assert_eq!(before.len(), 3, "{before:?}");
    let snapshot: serde_json::Value =
        serde_json::from_str(&std::fs::read_to_string(dev.directory().join("snapshot.json")).unwrap()).unwrap();
    let topology = &snapshot["cluster"]["topology"]["sentinel"];
    let name = topology["master"].as_str().unwrap().to_owned();
    let addresses = topology["sentinels"].as_array().unwrap().clone();
    let port = |address: &serde_json::Value| address.as_str().unwrap().rsplit_once(':').unwrap().1.parse::<u16>().unwrap();
    let killed = before[0];
    let of_killed: Vec<u16> =
        addresses.iter().map(port).filter(|port| info(*port, "process_id") == Some(killed.to_string())).collect();
    let [of_killed] = of_killed[..] else { panic!("{killed} is none of {addresses:?}") };
    assert!(Command::new("kill").args(["-9", &killed.to_string()]).status().unwrap().success());
    dev.wait_for_stderr("and is started again");
    let knows_the_others = |port: u16| -> Option<bool> {
        let mut sentinel = Client::connect(port).ok()?;
        let others = sentinel.try_call(&["SENTINEL", "SENTINELS", &name]).ok()?;
        let replicas = sentinel.try_call(&["SENTINEL", "REPLICAS", &name]).ok()?;
        Some(!others.is_error() && !replicas.is_error() && others.items().len() == 2 && replicas.items().len() == 1)
    };
    wait_for("the sentinel watches again", LIMIT, || knows_the_others(of_killed) == Some(true));
    let after = sentinels(&dev);
    assert_eq!(after.len(), 3, "{after:?}");
    assert!(!after.contains(&killed));
    assert_eq!(client.call(&["SET", "a", "1"]), ok(), "clients notice nothing");
    dev.stop();
}

/// The number that a node answers with: `BUMPED 7`, or `STILL 7` where it has the greatest epoch that it knows.
fn bump_epoch(port: u16) -> u64 {
    let reply = Client::connect(port).unwrap().call(&["CLUSTER", "BUMPEPOCH"]);
    let Value::Simple(text) = &reply else { panic!("{reply:?}") };
    text.rsplit(' ').next().and_then(|epoch| epoch.parse().ok()).unwrap_or_else(|| panic!("{text}"))
}

fn current_epoch(port: u16) -> u64 {
    let text = Client::connect(port).unwrap().call(&["CLUSTER", "INFO"]).text();
    text.lines().find_map(|line| line.strip_prefix("cluster_current_epoch:")?.parse().ok()).unwrap_or_else(|| panic!("{text}"))
}

/// Gives a primary and its replica the same epoch, the greatest of all: once both have heard of another's, each takes the next before
/// it hears that the other does. A takeover brings no new one then.
fn tie([primary, replica]: [u16; 2], another: u16) {
    wait_for("two nodes with one epoch", LIMIT, || {
        let epoch = bump_epoch(another);
        wait_for("the epoch to be heard of", LIMIT, || [primary, replica].iter().all(|port| current_epoch(*port) >= epoch));
        bump_epoch(primary) == bump_epoch(replica)
    });
}

#[test]
fn a_lost_majority_of_primaries_is_replaced() {
    let files = [("cache.yaml", cluster(Engine::Redis7, "Cluster", ""))];
    let mut dev = Dev::start(Engine::Redis7, &files, &["--sidecars", "0"]);
    let ports = dev.ready(1);
    let primaries: Vec<u16> = ports.iter().copied().filter(|port| info(*port, "role").as_deref() == Some("master")).collect();
    for port in &primaries {
        let mut client = Client::connect(*port).unwrap();
        (0..).find(|n| client.call(&["SET", &format!("k{n}"), "kept"]) == ok()).unwrap();
        assert_eq!(client.call(&["WAIT", "1", "30000"]), Value::Int(1));
    }
    let follows_first = |port: &&u16| info(**port, "master_port") == Some(primaries[0].to_string());
    let replica = *ports.iter().find(follows_first).expect("the first primary has a replica");
    tie([primaries[0], replica], primaries[2]);
    let pids: Vec<String> = primaries[..2].iter().map(|port| info(*port, "process_id").unwrap()).collect();
    assert!(Command::new("kill").arg("-9").args(&pids).status().unwrap().success());
    for port in &primaries[..2] {
        wait_for("the killed primaries follow others", LIMIT, || info(*port, "master_link_status").as_deref() == Some("up"));
        assert!(info(*port, "db0").is_some(), "the data is kept");
    }
    dev.stop();
}
