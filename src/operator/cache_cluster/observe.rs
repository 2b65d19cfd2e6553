//! What servers and sentinels say of themselves, as the planner's facts.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use super::plan::{ClusterFacts, Facts, Link, NodeId, OpenSlot, Peer, Role, SlotRange, Watch};
use super::{slot_migrations, spin};
use crate::operator::admin::{Admin, AdminError};

/// Asks a server. `None` while it is loading, when it cannot speak for its data.
pub async fn server(admin: &mut Admin, in_cluster: bool) -> Result<Option<Facts>, AdminError> {
    let info: String = admin.ask("INFO", &[]).await?;
    let Some(mut facts) = parse_info(&info) else { return Ok(None) };
    let switch = if in_cluster { "cluster-replica-no-failover" } else { "replica-priority" };
    let config: HashMap<String, String> = admin.ask("CONFIG GET", &[switch]).await?;
    facts.promotable = !matches!(config.get(switch).map(String::as_str), Some("0" | "yes"));
    if in_cluster {
        let nodes: String = admin.ask("CLUSTER NODES", &[]).await?;
        let state: String = admin.ask("CLUSTER INFO", &[]).await?;
        let (ok, current_epoch) = parse_cluster_info(&state);
        let in_transit = slot_migrations::under_way(admin).await?;
        facts.cluster = Some(ClusterFacts { ok, current_epoch, in_transit, ..parse_nodes(&nodes) });
    }
    Ok(Some(facts))
}

/// Whether a replica has all that its primary had at a moment since this was asked. A link is up a moment before the replica has what was
/// acknowledged without it. False also where it follows nobody in step, or its history is another.
pub async fn has_caught_up(replica: &mut Admin, primary: &mut Admin) -> Result<bool, AdminError> {
    // In this order: how far the primary is counts only once the link was up.
    let before: String = replica.ask("INFO", &["replication"]).await?;
    let all: String = primary.ask("INFO", &["replication"]).await?;
    let after: String = replica.ask("INFO", &["replication"]).await?;
    Ok(is_level(&before, &all, &after))
}

/// Whether a replica that was asked before and after its primary has all that the primary had.
fn is_level(before: &str, primary: &str, after: &str) -> bool {
    let field = |info: &str, name: &str| {
        let value = info.lines().find_map(|line| line.trim_end().strip_prefix(name)?.strip_prefix(':').map(str::to_owned));
        value.unwrap_or_default()
    };
    let offset = |info: &str, name: &str| field(info, name).parse::<u64>().ok();
    let follows = |info: &str| (field(info, "master_host"), field(info, "master_port"), field(info, "master_link_status"));
    let is_up = follows(before).2 == "up" && follows(before) == follows(after);
    let is_one_history = field(primary, "role") == "master" && field(primary, "master_replid") == field(after, "master_replid");
    let reached = offset(after, "slave_repl_offset").zip(offset(primary, "master_repl_offset"));
    is_up && is_one_history && reached.is_some_and(|(reached, all)| reached >= all)
}

/// Asks a sentinel what it watches.
pub async fn sentinel(admin: &mut Admin) -> Result<Option<Watch>, AdminError> {
    let masters: Vec<HashMap<String, String>> = admin.ask("SENTINEL MASTERS", &[]).await?;
    Ok(masters.first().and_then(parse_master))
}

/// The address that a sentinel announces; `None` where it does not tell.
pub async fn announced_by_sentinel(admin: &mut Admin) -> Option<IpAddr> {
    let answer: Result<HashMap<String, String>, _> = admin.ask("SENTINEL CONFIG", &["GET", "announce-ip"]).await;
    answer.ok()?.get("announce-ip")?.parse().ok()
}

/// The processor time that a sentinel has used; `None` where it does not tell.
pub async fn used_by_sentinel(admin: &mut Admin) -> Option<Duration> {
    let info: String = admin.ask("INFO", &["cpu"]).await.ok()?;
    spin::used(&info)
}

fn parse_info(info: &str) -> Option<Facts> {
    let fields: HashMap<&str, &str> = info.lines().filter_map(|line| line.trim_end().split_once(':')).collect();
    let field = |name: &str| fields.get(name).copied();
    if field("loading") == Some("1") || field("async_loading") == Some("1") {
        return None;
    }
    let role = if field("role")? == "master" {
        Role::Primary
    } else {
        let of = parse_address(field("master_host")?, field("master_port")?)?;
        let link = if field("master_link_status") == Some("up") { Link::Up } else { Link::Down };
        Role::Replica { of, link }
    };
    let holds_data = fields.iter().any(|(name, value)| {
        let database = name.strip_prefix("db").is_some_and(|number| number.bytes().all(|byte| byte.is_ascii_digit()));
        database && !value.starts_with("keys=0,")
    });
    let offset = field("slave_repl_offset").or(field("master_repl_offset")).and_then(|offset| offset.parse().ok());
    let lineage = field("master_replid").filter(|_| holds_data).map(str::to_owned);
    Some(Facts { role, holds_data, offset: offset.unwrap_or(0), lineage, promotable: true, cluster: None })
}

fn parse_address(host: &str, port: &str) -> Option<SocketAddr> {
    Some(SocketAddr::new(host.parse().ok()?, port.parse().ok()?))
}

/// Reads `CLUSTER INFO`: whether the Cluster is whole, and the greatest epoch that was heard of.
fn parse_cluster_info(info: &str) -> (bool, u64) {
    let field = |name: &str| info.lines().find_map(|line| line.trim_end().strip_prefix(name));
    let is_whole = field("cluster_state:") == Some("ok") && field("cluster_slots_ok:") == Some("16384");
    (is_whole, field("cluster_current_epoch:").and_then(|epoch| epoch.parse().ok()).unwrap_or(0))
}

/// The epoch with which a node that starts with this file, its `nodes.conf`, claims slots as a primary.
pub fn claim(nodes_conf: &str) -> Option<u64> {
    let own =
        |line: &&str| line.split_ascii_whitespace().nth(2).is_some_and(|flags| flags.split(',').any(|flag| flag == "myself"));
    let facts = parse_nodes(nodes_conf.lines().find(own)?);
    (!facts.slots.is_empty()).then_some(facts.epoch)
}

/// Reads `CLUSTER NODES`: `id ip:port@bus[,name] flags primary ping pong epoch link slots…`.
fn parse_nodes(nodes: &str) -> ClusterFacts {
    let mut facts = ClusterFacts::default();
    for line in nodes.lines() {
        let words: Vec<&str> = line.split_ascii_whitespace().collect();
        let [id, address, flags, _primary, _ping, _pong, epoch, _link, slots @ ..] = &words[..] else { continue };
        let flags: Vec<&str> = flags.split(',').collect();
        let id = NodeId((*id).to_owned());
        let open = |arrow| slots.iter().filter_map(|text| parse_open(text, arrow)).collect();
        let (migrating, importing) = (open("->-"), open("-<-"));
        let slots = slots.iter().filter_map(|slots| parse_slots(slots)).collect();
        let epoch = epoch.parse().unwrap_or(0);
        if flags.contains(&"myself") {
            (facts.id, facts.epoch, facts.slots) = (id, epoch, slots);
            (facts.migrating, facts.importing) = (migrating, importing);
            continue;
        }
        let address = address.split_once('@').and_then(|(address, _)| address.parse().ok());
        let address = address.filter(|_| !flags.contains(&"noaddr"));
        facts.peers.push(Peer { id, address, handshake: flags.contains(&"handshake"), slots });
    }
    facts
}

/// `7`, or `0-5460`; a slot on its way (`[7->-…]`) still belongs to whom the plain ranges say.
pub(super) fn parse_slots(text: &str) -> Option<SlotRange> {
    let (first, last) = text.split_once('-').unwrap_or((text, text));
    Some(SlotRange { first: first.parse().ok()?, last: last.parse().ok()? })
}

/// `[7->-ID]`, a slot on its way to another node, or `[7-<-ID]`, on its way from there.
fn parse_open(text: &str, arrow: &str) -> Option<OpenSlot> {
    let (slot, peer) = text.strip_prefix('[')?.strip_suffix(']')?.split_once(arrow)?;
    Some(OpenSlot { slot: slot.parse().ok()?, peer: NodeId(peer.to_owned()) })
}

fn parse_master(fields: &HashMap<String, String>) -> Option<Watch> {
    let field = |name: &str| fields.get(name).map(String::as_str);
    let number = |name: &str| field(name)?.parse().ok();
    let primary = parse_address(field("ip")?, field("port")?)?;
    let flags = field("flags").unwrap_or_default();
    let alarmed = flags.split(',').any(|flag| ["s_down", "o_down", "failover_in_progress"].contains(&flag));
    let (replicas, sentinels) = (number("num-slaves")?, number("num-other-sentinels")?);
    Some(Watch { primary, replicas, sentinels, quorum: number("quorum")?, alarmed })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_replica_is_level_once_it_has_what_its_primary_had_while_the_link_was_up() {
        let replica = |offset, link: &str, port| {
            format!(
                "role:slave\r\nmaster_host:127.0.0.1\r\nmaster_port:{port}\r\nmaster_link_status:{link}\r\n\
                 slave_repl_offset:{offset}\r\nmaster_replid:aa\r\nmaster_repl_offset:{offset}\r\n"
            )
        };
        let primary = |role: &str, lineage: &str| format!("role:{role}\r\nmaster_replid:{lineage}\r\nmaster_repl_offset:42\r\n");
        let (before, all) = (replica(7, "up", 7001), primary("master", "aa"));
        assert!(is_level(&before, &all, &replica(42, "up", 7001)));
        assert!(!is_level(&before, &all, &replica(41, "up", 7001)), "it lacks something");
        assert!(!is_level(&replica(7, "down", 7001), &all, &replica(42, "up", 7001)), "the link was down before");
        assert!(!is_level(&before, &all, &replica(42, "down", 7001)), "the link is lost");
        assert!(!is_level(&before, &all, &replica(42, "up", 7002)), "it follows another");
        assert!(!is_level(&before, &primary("master", "bb"), &replica(42, "up", 7001)), "offsets of two histories");
        assert!(!is_level(&before, &primary("slave", "aa"), &replica(42, "up", 7001)), "it is no primary");
    }

    #[test]
    fn a_replica_is_read() {
        let info = "# Replication\r\nrole:slave\r\nmaster_host:127.0.0.1\r\nmaster_port:7001\r\nmaster_link_status:up\r\n\
                    slave_repl_offset:42\r\nmaster_repl_offset:42\r\nloading:0\r\n# Keyspace\r\ndb0:keys=3,expires=1,avg_ttl=0\r\n";
        let facts = parse_info(info).expect("facts");
        assert_eq!(facts.role, Role::Replica { of: SocketAddr::from(([127, 0, 0, 1], 7001)), link: Link::Up });
        assert_eq!((facts.holds_data, facts.offset), (true, 42));
        assert_eq!(parse_info(&info.replace("loading:0", "loading:1")), None);
    }

    #[test]
    fn an_empty_primary_is_read() {
        let facts =
            parse_info("role:master\r\nmaster_repl_offset:0\r\nloading:0\r\ndb0_distrib_strings_sizes:1=1\r\n").expect("facts");
        assert_eq!((facts.role, facts.holds_data), (Role::Primary, false));
    }

    #[test]
    fn a_watch_is_read() {
        let fields = |flags: &str| {
            let fields = [
                ("ip", "10.0.0.1"),
                ("port", "6379"),
                ("flags", flags),
                ("num-slaves", "2"),
                ("num-other-sentinels", "4"),
                ("quorum", "3"),
            ];
            fields.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect::<HashMap<_, _>>()
        };
        let primary = SocketAddr::from(([10, 0, 0, 1], 6379));
        let watch = Watch { primary, replicas: 2, sentinels: 4, quorum: 3, alarmed: false };
        assert_eq!(parse_master(&fields("master")), Some(watch));
        for flags in ["s_down,master", "s_down,o_down,master", "master,failover_in_progress"] {
            assert_eq!(parse_master(&fields(flags)), Some(Watch { alarmed: true, ..watch }), "{flags}");
        }
    }

    #[test]
    fn the_claim_of_a_file_is_read() {
        let peer = "bb 127.0.0.1:7001@17001 master - 0 1 9 connected 5461-10921\n";
        let file = |own: &str| format!("{peer}{own}vars currentEpoch 9 lastVoteEpoch 0\n");
        assert_eq!(claim(&file("aa 127.0.0.1:7000@17000 myself,master - 0 0 3 connected 0-5460\n")), Some(3));
        assert_eq!(claim(&file("aa 127.0.0.1:7000@17000 myself,slave bb 0 0 9 connected\n")), None);
        assert_eq!(claim(&file("")), None);
    }

    #[test]
    fn a_nodes_table_is_read() {
        let nodes = "aa 127.0.0.1:7000@17000 myself,master - 0 0 3 connected 0-5460 [7->-bb] [5461-<-cc]\n\
                     bb 127.0.0.1:7001@17001,name slave aa 0 1 3 connected\n\
                     cc :0@0 master,noaddr - 0 1 2 disconnected 5461 5463-5464\n\
                     dd 127.0.0.1:7003@17003 handshake - 0 0 0 disconnected\n";
        let facts = parse_nodes(nodes);
        assert_eq!((facts.id, facts.epoch, facts.slots), (NodeId("aa".to_owned()), 3, vec![SlotRange { first: 0, last: 5460 }]));
        assert_eq!(facts.migrating, [OpenSlot { slot: 7, peer: NodeId("bb".to_owned()) }]);
        assert_eq!(facts.importing, [OpenSlot { slot: 5461, peer: NodeId("cc".to_owned()) }]);
        let [bb, cc, dd] = &facts.peers[..] else { panic!("three peers") };
        assert_eq!(bb.address, Some(SocketAddr::from(([127, 0, 0, 1], 7001))));
        assert_eq!((cc.address, cc.slots.len()), (None, 2));
        assert!(dd.handshake && !bb.handshake);
    }
}
