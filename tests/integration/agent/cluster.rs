//! Servers of a Cluster under agents: where each starts, when it does not, and that its table of nodes says so.

use std::fs;

use serde_json::{Value as Json, json};

use super::tier::{Member, wait_before};
use crate::support::resp::{Client, Value};
use crate::support::server::{Engine, free_port};

pub const SHARDS: usize = 3;
const KEYS: usize = 100;
/// A tag whose slot is among the first shard's.
const TAG: &str = "{06S}";

/// Three shards of two servers each: server `index` of shard `shard` is member `shard * 2 + index`.
pub struct Cluster {
    pub members: Vec<Member>,
    pub buses: Vec<u16>,
}

impl Cluster {
    /// Starts the agents.
    pub fn start(engine: Engine, durable: bool) -> Self {
        Self::start_of(engine, durable, SHARDS)
    }

    /// The same of so many shards.
    pub fn start_of(engine: Engine, durable: bool, shards: usize) -> Self {
        let buses: Vec<u16> = (0..shards * 2).map(|_| free_port()).collect();
        let member = |bus: &u16| {
            let mut arguments = vec!["--cluster-port".to_owned(), bus.to_string()];
            for (name, value) in [
                ("enabled", "yes"),
                ("announce-ip", "127.0.0.1"),
                ("node-timeout", "2000"),
                ("require-full-coverage", "no"),
                ("allow-replica-migration", "no"),
                ("replica-validity-factor", "0"),
            ] {
                arguments.extend([format!("--cluster-{name}"), value.to_owned()]);
            }
            Member::new(engine, durable, &arguments)
        };
        let mut cluster = Self { members: buses.iter().map(member).collect(), buses };
        for index in 0..cluster.members.len() {
            let config = cluster.config(index, durable);
            cluster.members[index].write_config(&config);
        }
        cluster.members.iter_mut().for_each(Member::start_agent);
        cluster
    }

    /// What a control plane does for servers that own nothing.
    fn form(engine: Engine, durable: bool) -> Self {
        let cluster = Self::start(engine, durable);
        cluster.wait("all servers to start", || cluster.members.iter().all(|member| member.phase() == json!("primary")));
        let (status, why) = cluster.members[1].get("/readyz");
        assert_eq!((status, why.as_str()), (503, "the server owns no slots\n"));
        for (member, bus) in cluster.members.iter().zip(&cluster.buses).skip(1) {
            cluster.tell(0, &format!("CLUSTER MEET 127.0.0.1 {} {bus}", member.port));
        }
        for shard in 0..SHARDS {
            let (first, last) = (shard * 16384 / SHARDS, (shard + 1) * 16384 / SHARDS - 1);
            cluster.tell(shard * 2, &format!("CLUSTER ADDSLOTSRANGE {first} {last}"));
        }
        for shard in 0..SHARDS {
            let (id, replica) = (node_id(shard * 2), shard * 2 + 1);
            cluster.wait("the replica to know its primary", || cluster.nodes(replica).contains(&id));
            cluster.tell(replica, &format!("CLUSTER REPLICATE {id}"));
        }
        (0..SHARDS).for_each(|shard| cluster.wait_until_whole(shard * 2));
        cluster
    }

    fn config(&self, index: usize, durable: bool) -> Json {
        let servers = |shard: usize| [shard * 2, shard * 2 + 1];
        let (shard, other) = (index / 2, index ^ 1);
        let others: Vec<Vec<String>> = (0..self.members.len() / 2)
            .filter(|other| *other != shard)
            .map(|shard| servers(shard).map(|index| self.members[index].address()).to_vec())
            .collect();
        let (member, peer) = (&self.members[index], &self.members[other]);
        json!({
            "version": 1, "requires": 1, "generation": 1,
            "server": {
                "ordinal": index % 2, "address": member.address(), "dial": member.address(),
                "directory": member.data(), "durable": durable,
            },
            "peers": [{"ordinal": other % 2, "address": peer.address(), "agent": format!("127.0.0.1:{}", peer.agent_port)}],
            "failover": {"cluster": {"id": node_id(index), "busPort": self.buses[index], "shards": others}},
        })
    }

    #[track_caller]
    pub fn wait(&self, what: &str, done: impl FnMut() -> bool) {
        wait_before(&self.members, what, done);
    }

    /// Until member `primary` leads its shard, its sibling follows it, both are ready, and everybody sees a whole Cluster of nobody else.
    pub fn wait_until_whole(&self, primary: usize) {
        let replica = json!({"replica": {"of": self.members[primary].address(), "linkUp": true}});
        for (index, wanted) in [(primary, json!("primary")), (primary ^ 1, replica)] {
            self.wait(&format!("server {index} to be {wanted}"), || {
                let member = &self.members[index];
                member.phase() == wanted && member.get("/readyz").0 == 200
            });
        }
        for index in 0..self.members.len() {
            self.wait("the Cluster to be whole", || {
                let nodes = self.nodes(index);
                nodes.lines().count() == self.members.len()
                    && !nodes.contains("fail ")
                    && !nodes.contains("fail?")
                    && self.is_ok(index)
            });
        }
    }

    pub fn is_ok(&self, index: usize) -> bool {
        self.ask(index, "CLUSTER INFO").contains("cluster_state:ok")
    }

    fn nodes(&self, index: usize) -> String {
        self.ask(index, "CLUSTER NODES")
    }

    pub fn ask(&self, index: usize, line: &str) -> String {
        let client = Client::connect(self.members[index].port);
        client.map(|mut client| client.line(line).text()).unwrap_or_default()
    }

    #[track_caller]
    pub fn tell(&self, index: usize, line: &str) {
        assert_eq!(self.members[index].client().line(line), Value::Simple("OK".to_owned()), "{line}");
    }

    /// Writes to the first shard, whose primary is `primary`, and waits until its replica has everything.
    pub fn write(&self, primary: usize) {
        let mut client = self.members[primary].client();
        for key in 0..KEYS {
            assert_eq!(client.line(&format!("SET {TAG}{key} {key}")), Value::Simple("OK".to_owned()));
        }
        assert_eq!(client.line("WAIT 1 20000"), Value::Int(1));
    }

    pub fn assert_all_there(&self, primary: usize) {
        let mut client = self.members[primary].client();
        let left = (0..KEYS).filter(|key| client.line(&format!("GET {TAG}{key}")) == Value::Bulk(key.to_string().into_bytes()));
        assert_eq!(left.count(), KEYS);
    }
}

fn node_id(index: usize) -> String {
    format!("{:040x}", 0xabc0 + index)
}

fn table_of(member: &Member) -> String {
    fs::read_to_string(member.data().join("nodes.conf")).unwrap_or_default()
}

fn own_line(table: &str) -> String {
    table.lines().find(|line| line.contains("myself")).unwrap_or_default().to_owned()
}

fn lose_everything(member: &Member) {
    fs::remove_dir_all(member.data()).expect("it is there");
    fs::create_dir(member.data()).expect("the directory is writable");
}

#[test]
fn an_empty_primary_with_its_table_left_comes_back_as_a_replica() {
    for engine in Engine::ALL {
        let cluster = Cluster::form(engine, false);
        cluster.write(0);
        cluster.members[0].kill_server();
        cluster.wait("the reborn primary to be held", || cluster.members[0].held_for() == "PeerAhead");
        assert!(cluster.members[0].is_closed());
        assert!(own_line(&table_of(&cluster.members[0])).contains("0-5460"), "its table says that it owns the slots");
        cluster.wait_until_whole(1);
        cluster.assert_all_there(1);
        assert!(own_line(&table_of(&cluster.members[0])).contains("myself,slave"));
        cluster.wait("it to be promotable", || {
            let mut client = cluster.members[0].client();
            client.line("CONFIG GET cluster-replica-no-failover").items().get(1).is_some_and(|value| value.text() == "no")
        });
    }
}

#[test]
fn a_server_that_lost_its_disk_is_who_it_was_without_anybody_telling_it() {
    for engine in Engine::ALL {
        let mut cluster = Cluster::form(engine, false);
        cluster.write(0);
        cluster.members[0].kill_agent();
        lose_everything(&cluster.members[0]);
        cluster.members[0].start_agent();
        cluster.wait_until_whole(1);
        cluster.assert_all_there(1);
        assert!(own_line(&cluster.nodes(0)).starts_with(&node_id(0)), "{}", cluster.nodes(0));
    }
}

#[test]
fn a_shard_that_lost_everything_gets_its_slots_back_empty() {
    let mut cluster = Cluster::form(Engine::Valkey9, false);
    cluster.write(0);
    for index in [0, 1] {
        cluster.members[index].kill_agent();
        lose_everything(&cluster.members[index]);
    }
    // The other one must not begin while anybody could hold data.
    cluster.members[1].start_agent();
    cluster.wait("the replica to have a place", || cluster.members[1].phase() != json!("deciding"));
    cluster.members[0].start_agent();
    cluster.wait_until_whole(0);
    assert_eq!(cluster.members[0].client().line("DBSIZE"), Value::Int(0));
}

#[test]
fn all_servers_killed_at_once_come_back_with_all_that_was_on_their_disks() {
    for engine in Engine::ALL {
        let mut cluster = Cluster::form(engine, true);
        (0..SHARDS).for_each(|shard| cluster.tell(shard * 2, "CONFIG SET appendfsync always"));
        cluster.write(0);
        cluster.members.iter_mut().rev().for_each(|member| assert!(member.stop_agent().success()));
        cluster.members.iter_mut().rev().for_each(Member::start_agent);
        (0..SHARDS).for_each(|shard| cluster.wait_until_whole(shard * 2));
        cluster.assert_all_there(0);
    }
}

#[test]
fn a_primary_that_is_to_end_hands_its_slots_over() {
    for engine in Engine::ALL {
        let mut cluster = Cluster::form(engine, false);
        cluster.write(0);
        let handed_over = cluster.members[0].ask(&["handover", "--limit", "15s"]);
        assert!(handed_over.status.success(), "{}", String::from_utf8_lossy(&handed_over.stderr));
        let successor = cluster.members[1].address();
        assert!(String::from_utf8_lossy(&handed_over.stdout).contains(&successor));
        cluster.assert_all_there(1);
        let again = cluster.members[0].ask(&["handover", "--limit", "5s"]);
        assert!(again.status.success() && String::from_utf8_lossy(&again.stdout).contains("noPrimary"));
        assert!(cluster.members[0].stop_agent().success());
        cluster.members[0].start_agent();
        cluster.wait_until_whole(1);
        cluster.assert_all_there(1);
    }
}
