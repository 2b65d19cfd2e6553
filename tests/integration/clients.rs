//! Widespread clients, unmodified, through the sidecar on both topologies: as one server, as sentinels, as a Cluster, and as
//! database 3. Their programs are in tests/clients; scripts/setup installs what they need.

use std::path::Path;
use std::process::Command;

use crate::support::program::output_of;
use crate::support::server::{Engine, RedisCluster, SentinelCluster};
use crate::support::sidecar::{Sidecar, bypass, cluster_topology, sentinel_topology};

/// Runs a client's program against both topologies. `program` and `arguments` run it in `tests/clients/DIRECTORY`.
#[track_caller]
fn smoke(directory: &str, program: &str, arguments: &[&str]) {
    on_both(|port, topology| {
        let mut command = Command::new(program);
        command.args(arguments).args([port.to_string().as_str(), topology]);
        command.current_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/clients").join(directory));
        let output = output_of(&mut command);
        let (out, errors) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        assert!(output.status.success() && out.trim() == "ok", "{directory} on {topology}: {out}{errors}");
    });
}

#[track_caller]
fn on_both(run: impl Fn(u16, &str)) {
    let servers = SentinelCluster::start(Engine::Redis7, 1);
    run(Sidecar::start(&bypass(sentinel_topology(&servers))).port(), "sentinel");
    let servers = RedisCluster::start(Engine::Valkey9, 3, 1);
    run(Sidecar::start(&bypass(cluster_topology(&servers))).port(), "cluster");
}

#[test]
fn redis_py() {
    smoke("python", "python3", &["smoke.py"]);
}

#[test]
fn ioredis() {
    smoke("node", "node", &["smoke.js"]);
}

#[test]
fn go_redis() {
    smoke("go", "go", &["run", "."]);
}

#[test]
fn redis_rs() {
    on_both(|port, topology| {
        let address = format!("redis://any:any@127.0.0.1:{port}/{}", if topology == "sentinel" { 3 } else { 0 });
        for address in [address.clone(), format!("{address}?protocol=resp3")] {
            let client = redis::Client::open(address).unwrap();
            rust_operations(&mut client.get_connection().unwrap());
        }
    });
}

fn rust_operations(connection: &mut redis::Connection) {
    use redis::TypedCommands as _;
    let key = |name: &str| format!("{{smoke}}:{name}");
    let names = ["text", "number", "hash", "list", "set", "zset"].map(key);
    connection.del(&names[..]).unwrap();
    connection.set_ex(key("text"), "value", 100).unwrap();
    assert_eq!(connection.get(key("text")).unwrap().as_deref(), Some("value"));
    let values: Vec<Option<String>> = redis::cmd("MGET").arg(key("text")).arg(key("none")).query(connection).unwrap();
    assert_eq!(values, [Some("value".to_owned()), None]);
    assert_eq!(connection.incr(key("number"), 5).unwrap(), 5);
    connection.hset(key("hash"), "a", 1).unwrap();
    assert_eq!(connection.hgetall(key("hash")).unwrap().get("a").map(String::as_str), Some("1"));
    assert_eq!(connection.rpush(key("list"), &["a", "b", "c"][..]).unwrap(), 3);
    let popped: (String, String) = redis::cmd("BLPOP").arg(key("list")).arg(1).query(connection).unwrap();
    assert_eq!(popped, (key("list"), "a".to_owned()));
    assert_eq!(connection.sadd(key("set"), &["x", "y"][..]).unwrap(), 2);
    assert_eq!(connection.zadd(key("zset"), "one", 1).unwrap(), 1);
    let (number, text): (i64, String) =
        redis::pipe().atomic().incr(key("number"), 1).get(key("number")).query(connection).unwrap();
    assert_eq!((number, text.as_str()), (6, "6"));
    let script = "return redis.call('GET', KEYS[1])";
    let got: String = redis::cmd("EVAL").arg(script).arg(1).arg(key("text")).query(connection).unwrap();
    assert_eq!(got, "value");
    let wrong = redis::cmd("LPUSH").arg(key("text")).arg("x").query::<i64>(connection).unwrap_err();
    assert!(wrong.to_string().contains("WRONGTYPE"), "{wrong}");
    assert_eq!(connection.del(&names[..]).unwrap(), 6);
}
