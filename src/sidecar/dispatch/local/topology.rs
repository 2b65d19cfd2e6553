//! CLUSTER, SENTINEL and ROLE: whatever is behind, the client sees one primary, at the address that it used.
//!
//! - A Cluster looks like a Cluster of one node with all slots: a cluster-aware client finds what it needs and comes back here.
//! - Under Sentinel the primary itself answers CLUSTER as a server without Cluster does.
//! - SENTINEL answers under both, for the name of the CacheCluster and the one that its sentinels use: a client that looks for
//!   sentinels may be pointed at the sidecar.

use std::hash::Hasher as _;
use std::rc::Rc;

use rustc_hash::FxHasher;

use super::super::data::send;
use super::super::{Flow, Request, names, refuse, shards, slot_stats};
use super::quoted;
use crate::policy::snapshot::Topology;
use crate::sidecar::commands::parse_i64;
use crate::sidecar::resp::{Protocol, encode};
use crate::sidecar::session::Session;
use crate::sidecar::slots::{self, SLOTS};
use crate::sidecar::upstream::queue::Retry;
use crate::sidecar::upstream::sink::OnReply;

/// Answers one of them.
pub fn run(session: &Rc<Session>, request: &Request<'_>) -> Flow {
    let name = request.spec.name;
    if name == "role" {
        session.answer_now(|out| {
            encode::array(out, 3);
            encode::bulk(out, b"master");
            encode::integer(out, 0);
            encode::array(out, 0);
        });
        return Flow::Continue;
    }
    if name.starts_with("sentinel") {
        return sentinel(session, request);
    }
    if session.worker().is_cluster() { cluster(session, request) } else { shards::any(session, request) }
}

/// The one node that clients see.
struct Announced {
    host: String,
    port: u16,
    id: String,
}

impl Announced {
    /// The address that the client used. Empty on a Unix socket, which clients take for "where you are connected".
    fn to(session: &Session) -> Self {
        let address = session.local_addr();
        let host = address.map(|address| address.ip().to_canonical().to_string()).unwrap_or_default();
        let port = address.map_or(0, |address| address.port());
        let id = node_id(&[session.worker().policy().cluster_name(), &host, &port.to_string()]);
        Self { host, port, id }
    }
}

/// Forty hexadecimal digits, the same for the same words.
fn node_id(words: &[&str]) -> String {
    let part = |number: u32| {
        let mut hasher = FxHasher::default();
        hasher.write_u32(number);
        words.iter().for_each(|word| hasher.write(word.as_bytes()));
        format!("{:016x}", hasher.finish())
    };
    (0..3).map(part).collect::<String>().chars().take(40).collect()
}

fn cluster(session: &Rc<Session>, request: &Request<'_>) -> Flow {
    let node = Announced::to(session);
    let protocol = session.protocol();
    let argument = request.args.get(2).unwrap_or_default();
    match request.spec.last_name() {
        "info" => text(session, &cluster_info(session.worker().router().is_usable())),
        "myid" => session.answer_now(|out| encode::bulk(out, node.id.as_bytes())),
        "myshardid" => {
            let id = node_id(&["shard", &node.id]);
            session.answer_now(|out| encode::bulk(out, id.as_bytes()));
        }
        "nodes" => text(session, &nodes_line(&node)),
        "slots" => session.answer_now(|out| write_slots(&node, protocol, out)),
        "shards" => session.answer_now(|out| write_shards(&node, protocol, out)),
        "keyslot" => session.answer_now(|out| encode::integer(out, i64::from(slots::slot_of(argument)))),
        "links" | "getslotmigrations" => session.answer_now(|out| encode::array(out, 0)),
        "replicas" | "slaves" | "count-failure-reports" if argument != node.id.as_bytes() => {
            return refuse(session, &format!("ERR Unknown node {}", quoted(argument)));
        }
        "replicas" | "slaves" => session.answer_now(|out| encode::array(out, 0)),
        "count-failure-reports" => session.answer_now(|out| encode::integer(out, 0)),
        "countkeysinslot" | "getkeysinslot" => return in_slot(session, request, argument),
        "slot-stats" => return slot_stats::run(session, request),
        _ => return shards::any(session, request),
    }
    Flow::Continue
}

/// The node of the slot answers.
fn in_slot(session: &Rc<Session>, request: &Request<'_>, slot: &[u8]) -> Flow {
    match parse_i64(slot) {
        None => refuse(session, "ERR value is not an integer or out of range"),
        Some(slot) if !(0..i64::from(SLOTS)).contains(&slot) => {
            let lists = request.spec.last_name() == "getkeysinslot";
            refuse(session, if lists { "ERR Invalid slot or number of keys" } else { "ERR Invalid slot" })
        }
        Some(slot)
            if request.spec.last_name() == "getkeysinslot"
                && let Some(count @ 1..) = request.args.get(3).and_then(parse_i64) =>
        {
            names::in_slot(session, slot as u16, count.cast_unsigned())
        }
        Some(slot) => send(session, &[request.raw], slot as u16, Retry::Safe, OnReply::Pass),
    }
}

fn text(session: &Rc<Session>, text: &str) {
    session.answer_now(|out| encode::verbatim(out, session.protocol(), text.as_bytes()));
}

fn cluster_info(usable: bool) -> String {
    let (state, ok) = if usable { ("ok", SLOTS) } else { ("fail", 0) };
    let lines = [
        format!("cluster_state:{state}"),
        format!("cluster_slots_assigned:{SLOTS}"),
        format!("cluster_slots_ok:{ok}"),
        "cluster_slots_pfail:0".to_owned(),
        format!("cluster_slots_fail:{}", SLOTS - ok),
        "cluster_known_nodes:1".to_owned(),
        "cluster_size:1".to_owned(),
        "cluster_current_epoch:1".to_owned(),
        "cluster_my_epoch:1".to_owned(),
        "cluster_stats_messages_sent:0".to_owned(),
        "cluster_stats_messages_received:0".to_owned(),
        "total_cluster_links_buffer_limit_exceeded:0".to_owned(),
    ];
    lines.map(|line| line + "\r\n").concat()
}

fn nodes_line(node: &Announced) -> String {
    let Announced { host, port, id } = node;
    format!("{id} {host}:{port}@{port} myself,master - 0 0 1 connected 0-{}\n", SLOTS - 1)
}

fn write_slots(node: &Announced, protocol: Protocol, out: &mut Vec<u8>) {
    encode::array(out, 1);
    encode::array(out, 3);
    encode::integer(out, 0);
    encode::integer(out, i64::from(SLOTS - 1));
    encode::array(out, 4);
    encode::bulk(out, node.host.as_bytes());
    encode::integer(out, i64::from(node.port));
    encode::bulk(out, node.id.as_bytes());
    encode::map(out, protocol, 0);
}

fn write_shards(node: &Announced, protocol: Protocol, out: &mut Vec<u8>) {
    encode::array(out, 1);
    encode::map(out, protocol, 2);
    encode::bulk(out, b"slots");
    encode::array(out, 2);
    encode::integer(out, 0);
    encode::integer(out, i64::from(SLOTS - 1));
    encode::bulk(out, b"nodes");
    encode::array(out, 1);
    encode::map(out, protocol, 7);
    pair(out, "id", &node.id);
    encode::bulk(out, b"port");
    encode::integer(out, i64::from(node.port));
    pair(out, "ip", &node.host);
    pair(out, "endpoint", &node.host);
    pair(out, "role", "master");
    encode::bulk(out, b"replication-offset");
    encode::integer(out, 0);
    pair(out, "health", "online");
}

fn pair(out: &mut Vec<u8>, name: &str, value: &str) {
    encode::bulk(out, name.as_bytes());
    encode::bulk(out, value.as_bytes());
}

fn sentinel(session: &Rc<Session>, request: &Request<'_>) -> Flow {
    let node = Announced::to(session);
    let protocol = session.protocol();
    let names = watched_names(session);
    let asked = request.args.get(2).unwrap_or_default();
    let known = names.iter().any(|name| name.as_bytes() == asked);
    match request.spec.last_name() {
        "get-master-addr-by-name" | "get-primary-addr-by-name" if !known => {
            // A sentinel has the null of arrays here, which RESP2 tells from that of strings.
            session.answer_now(|out| encode::null_array(out, protocol));
        }
        "get-master-addr-by-name" | "get-primary-addr-by-name" => session.answer_now(|out| {
            encode::array(out, 2);
            encode::bulk(out, node.host.as_bytes());
            encode::bulk(out, node.port.to_string().as_bytes());
        }),
        "masters" | "primaries" => session.answer_now(|out| {
            encode::array(out, names.len());
            names.iter().for_each(|name| write_master(name, &node, protocol, out));
        }),
        "myid" => {
            let id = node_id(&["sentinel", &node.id]);
            session.answer_now(|out| encode::bulk(out, id.as_bytes()));
        }
        "pending-scripts" => session.answer_now(|out| encode::array(out, 0)),
        "master" | "primary" | "replicas" | "slaves" | "sentinels" | "ckquorum" if !known => {
            return refuse(session, "ERR No such master with that name");
        }
        "master" | "primary" => {
            let name = quoted(asked);
            session.answer_now(|out| write_master(&name, &node, protocol, out));
        }
        "replicas" | "slaves" | "sentinels" => session.answer_now(|out| encode::array(out, 0)),
        "ckquorum" => session.answer_now(|out| {
            encode::status(out, "OK 1 usable Sentinels. Quorum and failover authorization can be reached");
        }),
        name => {
            let name = name.to_ascii_uppercase();
            return refuse(session, &format!("NOPERM SENTINEL {name} is not answered by Larder: ask a sentinel itself"));
        }
    }
    Flow::Continue
}

/// The names that stand for the one primary: the CacheCluster's, and the one that its sentinels use.
fn watched_names(session: &Session) -> Vec<String> {
    let policy = session.worker().policy();
    let mut names = vec![policy.cluster_name().to_owned()];
    if let Topology::Sentinel { master, .. } = policy.topology()
        && *master != names[0]
    {
        names.push(master.clone());
    }
    names
}

fn write_master(name: &str, node: &Announced, protocol: Protocol, out: &mut Vec<u8>) {
    let port = node.port.to_string();
    let fields = [
        ("name", name),
        ("ip", &node.host),
        ("port", &port),
        ("runid", &node.id),
        ("flags", "master"),
        ("link-pending-commands", "0"),
        ("link-refcount", "1"),
        ("last-ping-sent", "0"),
        ("last-ok-ping-reply", "0"),
        ("last-ping-reply", "0"),
        ("down-after-milliseconds", "30000"),
        ("info-refresh", "0"),
        ("role-reported", "master"),
        ("role-reported-time", "0"),
        ("config-epoch", "0"),
        ("num-slaves", "0"),
        ("num-other-sentinels", "0"),
        ("quorum", "1"),
        ("failover-timeout", "180000"),
        ("parallel-syncs", "1"),
    ];
    encode::map(out, protocol, fields.len());
    fields.iter().for_each(|(field, value)| pair(out, field, value));
}
