//! Who is primary, and how soon another may be: as a tier's sentinels say, or as the servers of a Cluster say of one of its shards.

use std::collections::BTreeMap;
use std::time::Duration;

use serde_json::Value;

use super::cluster::{eventually, get, list, name};
use super::install::PLACE;
use super::tier::Tier;
use super::writers::Guide;

/// A hash tag, and the slot of all keys that have it.
#[derive(Clone, Copy)]
pub struct Tag {
    pub name: &'static str,
    pub slot: u16,
}

/// One in each of three shards. In a Cluster it is the first one's that is disturbed; without, all are with the one primary.
pub const TAGS: [Tag; 3] = [Tag { name: "a", slot: 15495 }, Tag { name: "b", slot: 3300 }, Tag { name: "c", slot: 7365 }];

impl Tag {
    /// A key whose shard is the tag's.
    pub fn key(self, rest: &str) -> String {
        format!("{{{}}}{rest}", self.name)
    }
}

/// Who is primary, and since when.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reign {
    pub pod: String,
    /// Of its claim to the shard's slots, in a Cluster: greater each time that it became the primary.
    epoch: u64,
}

impl Tier {
    /// The pod of the primary, in a Cluster of that of the shard which is disturbed: most of those who know say so, and it does itself.
    pub fn primary(&self) -> String {
        self.primary_of(TAGS[0])
    }

    /// The same of the shard that a tag's keys are in.
    pub fn primary_of(&self, tag: Tag) -> String {
        eventually(&format!("{} has a primary", self.name), Duration::from_secs(60), || self.primary_of_seen(tag, None))
    }

    /// The same at this moment, without asking anybody on a node that stands still.
    pub fn primary_seen(&self, standing: Option<&str>) -> Result<String, String> {
        self.primary_of_seen(TAGS[0], standing)
    }

    fn primary_of_seen(&self, tag: Tag, standing: Option<&str>) -> Result<String, String> {
        let is_asked = |pod: &Value| standing.is_none_or(|node| pod["spec"]["nodeName"] != node);
        let (servers, sentinels) = (self.servers(), self.sentinels());
        let knowing = if self.is_cluster() { &servers } else { &sentinels };
        let mut named: BTreeMap<String, usize> = BTreeMap::new();
        for pod in knowing.iter().filter(|pod| is_asked(pod)) {
            if let Some(address) = self.named_by(&name(pod), tag) {
                *named.entry(address).or_default() += 1;
            }
        }
        let (address, _) = named.iter().find(|(_, count)| **count * 2 > knowing.len()).ok_or(format!("named are {named:?}"))?;
        let service = list(PLACE, "services", &format!("larder.dev/cluster={}", self.name))
            .into_iter()
            .find(|service| service["spec"]["clusterIP"] == **address)
            .ok_or(format!("no Service has the address {address}"))?;
        let found = name(&service);
        if !servers.iter().any(|pod| name(pod) == found && is_asked(pod)) {
            return Err(format!("{found} is not to be asked"));
        }
        let role = self.ask(&found, "6379", &["role"])?;
        if role.starts_with("master") { Ok(found) } else { Err(format!("{found} says {role}")) }
    }

    /// The address of the primary, as a sentinel or a server of a Cluster says.
    fn named_by(&self, pod: &str, tag: Tag) -> Option<String> {
        if self.is_cluster() {
            let nodes = self.ask(pod, "6379", &["cluster", "nodes"]).ok()?;
            let address = owner(&nodes, tag.slot)?.address;
            return Some(address.rsplit_once(':')?.0.to_owned());
        }
        let said = self.ask(pod, "26379", &["sentinel", "get-master-addr-by-name", &self.name]).ok()?;
        said.lines().next().map(str::to_owned)
    }

    /// The servers of the same shard as this one's, itself among them.
    pub fn shard_of(&self, pod: &str) -> Vec<Value> {
        let shard = |pod: &Value| pod["metadata"]["labels"]["larder.dev/shard"].clone();
        let servers = self.servers();
        let own = servers.iter().find(|server| name(server) == pod).map(&shard);
        servers.into_iter().filter(|server| Some(shard(server)) == own).collect()
    }

    /// What was done to another tier's node may have been done to one of this tier's, too: a sentinel whose node was paused does nothing for
    /// half a minute, and what is disturbed meanwhile is disturbed twice.
    pub fn is_at_rest(&self) -> Result<(), String> {
        let (asked, port, topic, wanted) = match self.is_cluster() {
            true => (self.servers(), "6379", ["cluster", "info"], ["cluster_state:ok", "cluster_slots_pfail:0"]),
            false => (self.sentinels(), "26379", ["info", "sentinel"], ["sentinel_tilt:0"; 2]),
        };
        for pod in asked.iter().map(name) {
            let info = self.ask_as_larder(&pod, port, &topic)?;
            let says = |wanted: &&str| info.lines().any(|line| line.trim_end() == *wanted);
            if !wanted.iter().all(says) {
                return Err(format!("{pod} says {info}"));
            }
        }
        Ok(())
    }

    /// How long a sentinel, or a Cluster's server, waits before it takes a server for dead.
    pub fn down_after(&self) -> Duration {
        if !self.is_cluster() {
            return self.sentinels_setting("down-after-milliseconds");
        }
        let server = self.servers().first().map(name).expect("a server");
        let said = self.ask_as_larder(&server, "6379", &["config", "get", "cluster-node-timeout"]).expect("an answer");
        Duration::from_millis(said.lines().last().and_then(|line| line.trim().parse().ok()).expect("a number"))
    }

    /// How long a failover may take. Within twice that of the last one nobody begins another by himself.
    pub fn failover_timeout(&self) -> Duration {
        if self.is_cluster() { self.down_after() } else { self.sentinels_setting("failover-timeout") }
    }

    /// Rises with each failover.
    pub fn epoch(&self) -> u64 {
        if !self.is_cluster() {
            return self.sentinels_number("config-epoch");
        }
        self.cluster_number(&self.primary(), "cluster_current_epoch").expect("a number")
    }

    fn cluster_number(&self, server: &str, field: &str) -> Result<u64, String> {
        let info = self.ask(server, "6379", &["cluster", "info"])?;
        let said = info.lines().find_map(|line| line.trim_end().strip_prefix(field)?.strip_prefix(':')?.parse().ok());
        said.ok_or(info)
    }

    fn sentinels_setting(&self, field: &str) -> Duration {
        Duration::from_millis(self.sentinels_number(field))
    }

    fn sentinels_number(&self, field: &str) -> u64 {
        let sentinel = self.sentinels().first().map(name).expect("a sentinel");
        let said = self.ask(&sentinel, "26379", &["sentinel", "master", &self.name]).expect("an answer");
        let mut lines = said.lines().skip_while(|line| *line != field).skip(1);
        lines.next().and_then(|line| line.parse().ok()).expect(field)
    }

    /// The primary, and which of its times as primary this is.
    pub fn reign(&self) -> Reign {
        eventually(&format!("{} has a primary", self.name), Duration::from_secs(60), || self.reign_seen())
    }

    /// The same at this moment.
    pub fn reign_seen(&self) -> Result<Reign, String> {
        let pod = self.primary_seen(None)?;
        let epoch = if self.is_cluster() { self.cluster_number(&pod, "cluster_my_epoch")? } else { 0 };
        Ok(Reign { pod, epoch })
    }

    /// Whom clients ask for the primary.
    pub fn guide(&self) -> Guide {
        let address = |name: &str| {
            let service = get(PLACE, &format!("service/{}-{name}", self.name)).unwrap_or_default();
            service["spec"]["clusterIP"].as_str().expect("an address").to_owned()
        };
        match self.is_cluster() {
            true => Guide::Cluster { address: address("nodes") },
            false => Guide::Sentinels { address: address("sentinels"), master: self.name.clone() },
        }
    }
}

/// A node, as `CLUSTER NODES` has it.
pub struct ClusterNode {
    pub id: String,
    /// `HOST:PORT`.
    pub address: String,
    /// Whom it follows.
    pub follows: Option<String>,
    /// The first and the last slot of each range that it owns.
    slots: Vec<(u16, u16)>,
}

/// The nodes that are not taken for dead.
pub fn nodes(said: &str) -> Vec<ClusterNode> {
    let node = |line: &str| {
        let fields: Vec<&str> = line.split_ascii_whitespace().collect();
        let [id, address, flags, follows, _, _, _, _, ranges @ ..] = fields.as_slice() else { return None };
        // Slots that are on their way stand in brackets.
        let range = |text: &&str| {
            let (first, last) = text.split_once('-').unwrap_or((*text, *text));
            Some((first.parse().ok()?, last.parse().ok()?))
        };
        let is_well = !flags.split(',').any(|flag| matches!(flag, "fail" | "handshake" | "noaddr"));
        is_well.then(|| ClusterNode {
            id: (*id).to_owned(),
            address: address.split_once('@').map_or(*address, |(address, _)| address).to_owned(),
            follows: (*follows != "-").then(|| (*follows).to_owned()),
            slots: ranges.iter().filter_map(range).collect(),
        })
    };
    said.lines().filter_map(node).collect()
}

/// Who owns a slot.
pub fn owner(said: &str, slot: u16) -> Option<ClusterNode> {
    let owns = |node: &ClusterNode| node.slots.iter().any(|(first, last)| (*first..=*last).contains(&slot));
    nodes(said).into_iter().find(owns)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_owner_of_a_slot_is_told_by_a_nodes_table() {
        let said = "07c3 10.96.0.1:6379@16379 myself,master - 0 0 3 connected 0-5460 [93->-292f]\n\
                    6ec2 10.96.0.2:6379@16379,name slave 292f 0 1426238317239 4 connected\n\
                    67ed 10.96.0.3:6379@16379 master,fail - 0 1426238316232 2 connected 10923-16383\n\
                    292f 10.96.0.4:6379@16379 master - 0 1426238318243 4 connected 5461 5463-16383\n";
        let address = |slot| owner(said, slot).map(|node| node.address);
        assert_eq!(address(93).as_deref(), Some("10.96.0.1:6379"));
        assert_eq!((address(5461).as_deref(), address(5462)), (Some("10.96.0.4:6379"), None));
        assert_eq!(address(15495).as_deref(), Some("10.96.0.4:6379"));
        let followers: Vec<String> = nodes(said).into_iter().filter_map(|node| node.follows).collect();
        assert_eq!(followers, ["292f"]);
    }
}
