//! The rule across crashes: a server that is killed in the midst of writes, and comes back with what it had written down, has no
//! covered key without a TTL, and neither is one left by a sidecar that is killed.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use serde_json::json;

use crate::support::resp::{Client, Value, encode};
use crate::support::server::{Engine, Redis, RedisCluster};
use crate::support::sidecar::{Sidecar, bypass, cluster_topology};
use crate::support::wait_for;

const CLIENTS: u64 = 4;
const ROUNDS: usize = 6;
/// Commands that a client sends at once.
const DEPTH: u64 = 200;
const LIMIT: Duration = Duration::from_secs(60);

/// Writes new keys until it is told to stop, or the sidecar has gone. Errors are what it must expect.
fn write(mut client: Client, number: u64, stop: &AtomicBool, written: &AtomicU64) {
    for at in (0..).step_by(DEPTH as usize) {
        let commands = (at..at + DEPTH).flat_map(|n| {
            let key = format!("c:{number}:{n}");
            match n % 4 {
                0 => encode(&["INCR", &key]),
                1 => encode(&["RPUSH", &key, "a", "b"]),
                2 => encode(&["HSET", &key, "field", "value"]),
                _ => encode(&["SETRANGE", &key, "10", "x"]),
            }
        });
        if stop.load(Ordering::Relaxed) || client.send(&commands.collect::<Vec<_>>()).is_err() {
            return;
        }
        for _ in 0..DEPTH {
            match client.read() {
                Ok(Value::Int(_)) => drop(written.fetch_add(1, Ordering::Relaxed)),
                Ok(_) => {}
                Err(_) => return,
            }
        }
    }
}

/// The keys of a server, how many of them there are, and those without a TTL.
const WITHOUT_TTL: &str = "local keys, bad = redis.call('KEYS', 'c:*'), {} for _, key in ipairs(keys) do \
                           if redis.call('PTTL', key) == -1 then bad[#bad + 1] = key end end return {#keys, bad}";

/// How many keys there are, all of which must have a TTL.
#[track_caller]
fn count_keys(servers: &RedisCluster, what: &str) -> i64 {
    let count = |server: &Redis| {
        let mut client = server.client();
        let mut reply = client.call(&["EVAL", WITHOUT_TTL, "0"]);
        wait_for("the server to answer", LIMIT, || {
            reply = client.call(&["EVAL", WITHOUT_TTL, "0"]);
            !reply.is_error()
        });
        let [keys, bad] = &reply.items()[..] else { panic!("{reply:?}") };
        assert_eq!(bad.items(), [], "{what}: keys without a TTL");
        keys.int()
    };
    servers.servers.iter().map(count).sum()
}

#[test]
fn no_crash_leaves_a_covered_key_without_a_ttl() {
    let mut servers = RedisCluster::start_with(Engine::Redis7, 3, 0, &["--appendonly", "yes", "--appendfsync", "no"]);
    let mut snapshot = bypass(cluster_topology(&servers));
    let lifetime = json!({"default": "1h", "max": "2h", "jitter": "10%"});
    snapshot["rules"] = json!([{"name": "c", "keys": "c:{id…}", "strategy": {"cacheAside": {"ttl": lifetime}}}]);
    for round in 0..ROUNDS {
        let sidecar = Sidecar::start(&snapshot);
        let (stop, written) = (AtomicBool::new(false), AtomicU64::new(0));
        std::thread::scope(|scope| {
            for number in 0..CLIENTS {
                let (client, stop, written) = (sidecar.client(), &stop, &written);
                scope.spawn(move || write(client, CLIENTS * round as u64 + number, stop, written));
            }
            wait_for("writes to be under way", LIMIT, || written.load(Ordering::Relaxed) > 2 * CLIENTS * DEPTH);
            if round % 2 == 0 {
                servers.servers[round / 2].kill();
            } else {
                sidecar.signal("KILL");
            }
            stop.store(true, Ordering::Relaxed);
        });
        if round % 2 == 0 {
            servers.servers[round / 2].restart();
            servers.wait_until_settled();
        }
        let keys = count_keys(&servers, &format!("round {round}"));
        assert!(keys > (2 * CLIENTS * DEPTH) as i64 / 2, "only {keys} keys");
    }
}
