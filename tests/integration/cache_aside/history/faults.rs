//! What befalls servers and sidecars in a history.

use std::time::{Duration, Instant};

use larder::sidecar::slots::{Companion, is_larder_key, slot_of};
use serde_json::Value as Json;

use super::run::{KEYS, World};
use crate::read_through::Servers;
use crate::support::resp::Value;
use crate::support::server::{Redis, RedisCluster, SentinelCluster};
use crate::support::sidecar::Sidecar;
use crate::support::wait_for;

/// Faults of one history.
const FAULTS: usize = 12;
const LIMIT: Duration = Duration::from_secs(60);

/// What befalls a server at most once in a history. By neither is anything lost that was acknowledged.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Great {
    /// Its replica takes over, as planned: the primary hands over what it was told until then.
    Failover,
    /// It answers nothing for longer than a lease, and is not given up.
    Stop,
}

impl Great {
    /// Which of them, if any, befalls the history `seed`, where topologies take turns.
    pub fn of(seed: u64) -> Option<Self> {
        [Some(Self::Failover), Some(Self::Stop), None][(seed / 2 % 3) as usize]
    }
}

/// Nobody takes over from a server by itself that stops for as long as [`Great::Stop`] has it.
pub fn never_give_up(servers: &Servers) {
    match servers {
        Servers::Sentinel(cluster) => cluster.sentinels.iter().for_each(|sentinel| {
            sentinel.client().line("SENTINEL SET main down-after-milliseconds 15000");
        }),
        // A planned failover is granted once in two such times.
        Servers::Cluster(cluster) => cluster.servers.iter().for_each(|server| {
            server.client().line("CONFIG SET cluster-node-timeout 5000");
        }),
    }
}

pub fn befall(
    servers: &Servers,
    sidecars: &mut [Sidecar],
    rule: &Json,
    great: Option<Great>,
    world: &World,
    mut random: fastrand::Rng,
) {
    for index in 0..FAULTS {
        std::thread::sleep(Duration::from_millis(random.u64(20..150)));
        let victim = random.usize(..sidecars.len());
        let key = &world.rows[random.usize(..KEYS)].key;
        look_at_ttls(servers, world, key);
        match random.u8(0..10) {
            _ if index == FAULTS / 3 && great == Some(Great::Failover) => {
                fail_over(servers, key);
                world.note(|seen| seen.failovers += 1);
            }
            _ if index == FAULTS / 3 && great == Some(Great::Stop) => {
                stop(server_of(servers, key), &mut random);
                world.note(|seen| seen.stops += 1);
            }
            0 => {
                // Its clients are gone, and so is what it knew of them.
                world.take_counts(&sidecars[victim..=victim]);
                sidecars[victim] = servers.sidecar(&[], std::slice::from_ref(rule));
                world.ports.lock().unwrap()[victim] = sidecars[victim].port();
            }
            1 | 2 => {
                sidecars[victim].signal("STOP");
                std::thread::sleep(Duration::from_millis(random.u64(50..400)));
                sidecars[victim].signal("CONT");
            }
            3 | 4 => {
                servers.holder_of(key).call(&["CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes"]);
            }
            _ => evict(servers, key, &mut random),
        }
    }
}

/// The names of a key and of what stands beside it.
fn names(key: &str) -> [Vec<u8>; 3] {
    [key.as_bytes().to_vec(), Companion::Lease.name(key.as_bytes()), Companion::Stale.name(key.as_bytes())]
}

/// As a full server does: a key goes, or what stands beside it.
fn evict(servers: &Servers, key: &str, random: &mut fastrand::Rng) {
    let names = names(key);
    let name = &names[random.usize(..names.len())];
    assert!(name == key.as_bytes() || is_larder_key(name));
    servers.holder_of(key).call(&[&b"UNLINK"[..], name]);
}

/// Nothing of a covered key is there for good.
pub fn look_at_ttls(servers: &Servers, world: &World, key: &str) {
    let mut server = servers.holder_of(key);
    for name in names(key) {
        match server.call(&[&b"PTTL"[..], &name]).int() {
            -2 => {}
            -1 => world.note_wrong(&format!("{} has no TTL", name.escape_ascii())),
            _ => world.note(|seen| seen.ttls += 1),
        }
    }
}

fn server_of<'a>(servers: &'a Servers, key: &str) -> &'a Redis {
    match servers {
        Servers::Sentinel(cluster) => cluster.primary(),
        Servers::Cluster(cluster) => cluster.owner(slot_of(key.as_bytes())),
    }
}

/// For longer than a lease.
fn stop(server: &Redis, random: &mut fastrand::Rng) {
    server.pause();
    std::thread::sleep(Duration::from_millis(random.u64(1050..1400)));
    server.resume();
}

/// Another server takes the place of the one that holds `key`.
fn fail_over(servers: &Servers, key: &str) {
    let old = server_of(servers, key);
    match servers {
        Servers::Sentinel(cluster) => fail_over_by_sentinel(cluster, old),
        Servers::Cluster(cluster) => fail_over_in_cluster(cluster, old),
    }
    wait_for("the old primary to follow the new one", LIMIT, || old.follows());
}

/// Asks again where it was refused, and where a failover that began came to nothing.
fn ask_until(what: &str, mut ask: impl FnMut() -> bool, done: impl Fn() -> bool) {
    let mut asked: Option<Instant> = None;
    wait_for(what, LIMIT, || {
        let done = done();
        if !done && asked.is_none_or(|at| at.elapsed() > LIMIT / 4) {
            asked = ask().then(Instant::now);
        }
        done
    });
}

fn fail_over_by_sentinel(cluster: &SentinelCluster, old: &Redis) {
    // The primary pauses writes until the replica has all of them.
    let ask = || !cluster.sentinels[0].client().line("SENTINEL FAILOVER main COORDINATED").is_error();
    ask_until("the sentinels' failover", ask, || cluster.primary_port() != old.service_port());
}

fn fail_over_in_cluster(cluster: &RedisCluster, old: &Redis) {
    let role = |server: &Redis| server.client().line("ROLE").items();
    let follows = |server: &&Redis| role(server).get(2).is_some_and(|port| *port == Value::Int(i64::from(old.port())));
    let replica = cluster.servers.iter().find(follows).expect("each primary has a replica");
    // The primary pauses writes here, too.
    let ask = || !replica.client().line("CLUSTER FAILOVER").is_error();
    ask_until("the Cluster's failover", ask, || role(replica)[0].text() == "master");
}
