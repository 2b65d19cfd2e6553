//! What befalls servers while a history is played. Nothing here returns before all of them are in step again: a tier bears one fault at a
//! time.

use std::time::Duration;

use crate::read_through::Servers;
use crate::support::resp::{Client, Value};
use crate::support::server::{Redis, RedisCluster};
use crate::support::{wait_for, wait_or_tell};

/// How long anything may take: sentinels that a busy machine held up do nothing for half a minute, time and again.
const LIMIT: Duration = Duration::from_secs(180);

impl Servers {
    /// Where this test reaches each server.
    pub fn ports(&self) -> Vec<u16> {
        self.all().iter().map(Redis::port).collect()
    }

    fn all(&self) -> &[Redis] {
        match self {
            Self::Sentinel(servers) => &servers.servers,
            Self::Cluster(servers) => &servers.servers,
        }
    }

    /// How many elections there have been of which these servers and their sentinels know, in a Cluster those without a winner among them.
    pub fn elections(&self) -> u64 {
        match self {
            Self::Sentinel(servers) => servers.failovers(),
            Self::Cluster(servers) => servers.servers.iter().filter_map(current_epoch).max().unwrap_or(0),
        }
    }

    /// A primary dies, another takes its place, and it follows that when it comes back: it, with the configuration of its start.
    pub fn fail_over(&mut self, random: &mut fastrand::Rng) -> &Redis {
        match self {
            Self::Sentinel(servers) => {
                let at = servers.fail_over(LIMIT);
                &servers.servers[at]
            }
            Self::Cluster(servers) => {
                let (at, partner) = a_shard(servers, random);
                fail_over(servers, at, partner)
            }
        }
    }

    /// [`Servers::fail_over`], where in a Cluster it is the server on `port` that dies, if that is a primary.
    pub fn fail_over_at(&mut self, port: u16, random: &mut fastrand::Rng) -> &Redis {
        let shard = match self {
            Self::Sentinel(_) => None,
            Self::Cluster(servers) => {
                let at = servers.servers.iter().position(|server| server.port() == port).expect("one of ours");
                is_primary(&servers.servers[at]).then_some((at, (at + servers.shards()) % servers.servers.len()))
            }
        };
        match (self, shard) {
            (Self::Cluster(servers), Some((at, partner))) => fail_over(servers, at, partner),
            (servers, _) => servers.fail_over(random),
        }
    }

    /// A primary stands still until another has taken its place, and `longer`; then it follows that.
    pub fn stand_still(&self, longer: Duration, random: &mut fastrand::Rng) {
        let old = match self {
            Self::Sentinel(servers) => {
                let port = servers.agreed_port(LIMIT);
                let old = servers.servers.iter().find(|server| server.service_port() == port).expect("one of ours");
                old.pause();
                let is_replaced = || servers.elected_port().is_some_and(|elected| elected != port);
                wait_or_tell("another primary", LIMIT, is_replaced, || servers.described());
                old
            }
            Self::Cluster(servers) => {
                let (at, partner) = a_shard(servers, random);
                servers.servers[at].pause();
                wait_for("another primary", LIMIT, || is_primary(&servers.servers[partner]));
                &servers.servers[at]
            }
        };
        std::thread::sleep(longer);
        old.resume();
        wait_for("the old primary to follow", LIMIT, || old.follows());
    }

    /// A replica is dead, or stands still, for so long, and then follows its primary again, unless the machine is so busy that it has taken that one's
    /// place: it, with the configuration of its start where it died.
    pub fn lose_a_replica(&mut self, dies: bool, lasts: Duration, random: &mut fastrand::Rng) -> &Redis {
        let (primary, replica) = match self {
            Self::Sentinel(servers) => {
                let primary = servers.agreed_port(LIMIT);
                let replicas = servers.servers.iter_mut().filter(|server| server.service_port() != primary);
                (Some(primary), random.choice(replicas.collect::<Vec<_>>()).expect("a replica"))
            }
            Self::Cluster(servers) => {
                let (_, at) = a_shard(servers, random);
                (None, &mut servers.servers[at])
            }
        };
        if dies {
            replica.kill();
        } else {
            replica.pause();
        }
        std::thread::sleep(lasts);
        match primary {
            Some(primary) if dies => replica.restart_following(primary),
            None if dies => replica.restart(),
            _ => replica.resume(),
        }
        let told = || replica.client().line("INFO replication").text();
        wait_or_tell(
            "the replica to follow",
            LIMIT,
            || replica.follows() || is_primary(replica),
            || format!("{primary:?}: {} {}", told(), replica.log()),
        );
        if dies && primary.is_some() {
            wait_for("it to hear that it may be promoted", LIMIT, || replica.may_be_promoted());
        }
        replica
    }
}

/// A primary of a Cluster with one replica each, and that replica.
fn a_shard(servers: &RedisCluster, random: &mut fastrand::Rng) -> (usize, usize) {
    let (shard, shards) = (random.usize(..servers.shards()), servers.shards());
    if is_primary(&servers.servers[shard]) { (shard, shard + shards) } else { (shard + shards, shard) }
}

/// The primary dies, and follows its replica when it comes back.
fn fail_over(servers: &mut RedisCluster, primary: usize, replica: usize) -> &Redis {
    servers.servers[primary].kill();
    wait_for("another primary", LIMIT, || is_primary(&servers.servers[replica]));
    servers.servers[primary].restart();
    wait_for("the old primary to follow", LIMIT, || servers.servers[primary].follows());
    &servers.servers[primary]
}

fn is_primary(server: &Redis) -> bool {
    // Sentinels close connections where they change whom it follows.
    let role = Client::connect(server.port()).and_then(|mut client| client.try_call(&["ROLE"]));
    role.is_ok_and(|role| matches!(&role, Value::Array(items) if items[0].text() == "master"))
}

fn current_epoch(server: &Redis) -> Option<u64> {
    let told = Client::connect(server.port()).ok()?.try_call(&["CLUSTER", "INFO"]).ok()?.text();
    told.lines().find_map(|line| line.strip_prefix("cluster_current_epoch:")?.trim().parse().ok())
}

/// Drops keys that `name` gives from the servers on these ports, as one does that is full.
pub fn evict(ports: &[u16], seed: u64, is_over: impl Fn() -> bool, name: impl Fn(&mut fastrand::Rng) -> String) {
    let mut random = fastrand::Rng::with_seed(seed);
    let mut clients: Vec<Option<Client>> = ports.iter().map(|_| None).collect();
    while !is_over() {
        std::thread::sleep(Duration::from_millis(random.u64(5..25)));
        let name = name(&mut random);
        for (client, port) in clients.iter_mut().zip(ports) {
            if client.is_none() {
                *client = Client::connect(*port).ok();
            }
            // Replicas and owners of other slots refuse, and some may be dead.
            if client.as_mut().is_some_and(|client| client.try_call(&["DEL", &name]).is_err()) {
                *client = None;
            }
        }
    }
}
