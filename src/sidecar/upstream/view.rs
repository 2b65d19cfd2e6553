//! What is known of the servers: a value, made on the discovery thread and read by every worker.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use super::admin_client::Value;
use super::heirs::Heir;
use super::node::NodeAddr;

/// The number of hash slots of a Cluster.
pub const SLOTS: usize = 16_384;
/// The most shards in a map; Redis Cluster is not made for more nodes than a thousand.
const MAX_SHARDS: usize = 4096;
const NOBODY: u16 = u16::MAX;

/// What is known of the servers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct View {
    /// Rises with each change.
    pub version: u64,
    /// Who serves what.
    pub kind: ViewKind,
}

/// Who serves what.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ViewKind {
    /// Nothing was found yet. Once something was, the last finding stays until a newer one.
    Unknown,
    /// One primary serves all keys.
    Primary {
        /// It said itself that it is one.
        node: NodeAddr,
        /// Its reachable replicas, sorted.
        replicas: Vec<NodeAddr>,
        /// Whoever sentinels might promote, reachable or not, sorted.
        heirs: Vec<Heir>,
    },
    /// Each slot has its primary.
    Cluster(SlotMap),
}

impl ViewKind {
    /// Whether commands can be sent somewhere.
    pub fn is_usable(&self) -> bool {
        match self {
            Self::Unknown => false,
            Self::Primary { .. } => true,
            Self::Cluster(map) => !map.primaries().is_empty(),
        }
    }

    /// Whoever might take the place of the primary at an address. `None`: the servers do not tell.
    pub fn heirs(&self, primary: &NodeAddr) -> Option<&[Heir]> {
        match self {
            Self::Primary { node, heirs, .. } => (node == primary).then_some(heirs.as_slice()),
            Self::Cluster(map) => map.heirs(map.primaries().iter().position(|node| node == primary)?),
            Self::Unknown => None,
        }
    }
}

/// By the primary that each follows: the replicas of a Cluster, those that fail and those that load among them.
pub type Followings = BTreeMap<NodeAddr, BTreeSet<NodeAddr>>;

/// One primary with its replicas.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Shard {
    primary: NodeAddr,
    replicas: Vec<NodeAddr>,
}

/// Which primary serves which slot.
#[derive(Clone, PartialEq, Eq)]
pub struct SlotMap {
    /// Sorted, so that equal maps compare equal.
    primaries: Vec<NodeAddr>,
    /// Beside `primaries`.
    replicas: Vec<Vec<NodeAddr>>,
    /// Beside `primaries`; nothing where the servers did not tell.
    heirs: Vec<Option<Vec<Heir>>>,
    /// Positions in `primaries`, or [`NOBODY`].
    owner: Box<[u16; SLOTS]>,
}

/// A run of slots with its nodes, as the servers tell it.
#[derive(Debug, Clone)]
struct Run {
    first: u16,
    last: u16,
    shard: Shard,
}

/// Why a slot map was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SlotMapError {
    /// Its form is not the documented one.
    #[error("the slot map has an unexpected form at {0}")]
    Form(&'static str),
    /// A slot is out of range, or a run ends before it begins.
    #[error("the slot map names the slots {0} to {1}")]
    Slots(i64, i64),
    /// Two primaries have the same slot.
    #[error("the slot map gives slot {0} to two primaries")]
    Twice(u16),
    /// It has more shards than any Cluster.
    #[error("the slot map has more than {MAX_SHARDS} shards")]
    TooMany,
}

impl SlotMap {
    /// All primaries that own a slot, sorted. Positions in it are what [`SlotMap::owner_index`] gives.
    pub fn primaries(&self) -> &[NodeAddr] {
        &self.primaries
    }

    /// The replicas of the primary at `index`, sorted.
    pub fn replicas(&self, index: usize) -> &[NodeAddr] {
        self.replicas.get(index).map_or(&[], Vec::as_slice)
    }

    /// Whoever might take the place of the primary at `index`, reachable or not, sorted. `None`: the servers did not tell.
    pub fn heirs(&self, index: usize) -> Option<&[Heir]> {
        self.heirs.get(index)?.as_deref()
    }

    /// The same map, where these are the heirs.
    pub fn with_heirs(mut self, all: &Followings) -> Self {
        let heir = |address: &NodeAddr| Heir { address: address.clone(), is_passed_over: true };
        let of = |primary: &NodeAddr| Some(all.get(primary)?.iter().map(heir).collect());
        self.heirs = self.primaries.iter().map(of).collect();
        self
    }

    /// The position in [`SlotMap::primaries`] of the primary of `slot`, which is below [`SLOTS`].
    #[inline]
    pub fn owner_index(&self, slot: u16) -> Option<usize> {
        self.owner.get(usize::from(slot)).filter(|owner| **owner != NOBODY).map(|owner| usize::from(*owner))
    }

    /// The primary of `slot`, where somebody serves it.
    pub fn owner(&self, slot: u16) -> Option<&NodeAddr> {
        self.primaries.get(self.owner_index(slot)?)
    }

    /// How many slots somebody serves.
    pub fn covered(&self) -> usize {
        self.owner.iter().filter(|owner| **owner != NOBODY).count()
    }

    /// Every node of the map.
    pub fn nodes(&self) -> impl Iterator<Item = &NodeAddr> {
        self.primaries.iter().chain(self.replicas.iter().flatten())
    }

    /// Reads the reply to `CLUSTER SLOTS` that `asked` gave.
    pub fn from_cluster_slots(reply: &Value, asked: &NodeAddr) -> Result<Self, SlotMapError> {
        let entries = reply.as_list().ok_or(SlotMapError::Form("its top"))?;
        let mut runs = Vec::with_capacity(entries.len());
        for entry in entries {
            let [first, last, nodes @ ..] = entry.as_list().unwrap_or_default() else {
                return Err(SlotMapError::Form("a range"));
            };
            let (first, last) = read_run(first, last)?;
            let mut nodes = nodes.iter().map(|node| read_slots_node(node, asked));
            let Some(primary) = nodes.next().transpose()?.flatten() else { continue };
            let replicas = nodes.collect::<Result<Vec<_>, _>>()?.into_iter().flatten().collect();
            runs.push(Run { first, last, shard: Shard { primary, replicas } });
        }
        Self::from_runs(runs)
    }

    /// Reads the reply to `CLUSTER SHARDS` that `asked` gave. `tls` says which of a node's ports to take.
    pub fn from_cluster_shards(reply: &Value, asked: &NodeAddr, tls: bool) -> Result<Self, SlotMapError> {
        let entries = reply.as_list().ok_or(SlotMapError::Form("its top"))?;
        let mut runs = Vec::new();
        for entry in entries {
            let nodes = entry.field("nodes").and_then(Value::as_list).ok_or(SlotMapError::Form("nodes"))?;
            let slots = entry.field("slots").and_then(Value::as_list).ok_or(SlotMapError::Form("slots"))?;
            let mut primary = None;
            let mut replicas = Vec::new();
            for node in nodes {
                let role = node.field("role").and_then(Value::as_str).ok_or(SlotMapError::Form("role"))?;
                let online = node.field("health").and_then(Value::as_str) == Some("online");
                match read_shards_node(node, asked, tls)? {
                    Some(address) if role == "master" && (online || primary.is_none()) => primary = Some(address),
                    Some(address) if role != "master" && online => replicas.push(address),
                    _ => {}
                }
            }
            let Some(primary) = primary else { continue };
            for run in slots.chunks(2) {
                let [first, last] = run else { return Err(SlotMapError::Form("slots")) };
                let (first, last) = read_run(first, last)?;
                runs.push(Run { first, last, shard: Shard { primary: primary.clone(), replicas: replicas.clone() } });
            }
        }
        Self::from_runs(runs)
    }

    fn from_runs(runs: Vec<Run>) -> Result<Self, SlotMapError> {
        let mut shards: Vec<Shard> = runs.iter().map(|run| run.shard.clone()).collect();
        shards.sort_by(|a, b| a.primary.cmp(&b.primary));
        shards.dedup_by(|a, b| a.primary == b.primary);
        if shards.len() > MAX_SHARDS {
            return Err(SlotMapError::TooMany);
        }
        let mut owner = Box::new([NOBODY; SLOTS]);
        for run in runs {
            let Ok(index) = shards.binary_search_by(|shard| shard.primary.cmp(&run.shard.primary)) else { continue };
            for slot in run.first..=run.last {
                match &mut owner[usize::from(slot)] {
                    free if *free == NOBODY => *free = index as u16,
                    _ => return Err(SlotMapError::Twice(slot)),
                }
            }
        }
        let (primaries, mut replicas): (Vec<_>, Vec<_>) = shards.into_iter().map(|shard| (shard.primary, shard.replicas)).unzip();
        replicas.iter_mut().for_each(|replicas| replicas.sort());
        Ok(Self { primaries, replicas, heirs: Vec::new(), owner })
    }
}

impl fmt::Debug for SlotMap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SlotMap").field("primaries", &self.primaries).field("covered", &self.covered()).finish_non_exhaustive()
    }
}

/// Who follows whom, from the reply to `CLUSTER SHARDS` that `asked` gave; replicas by the addresses that they tell their primaries.
pub fn followings(reply: &Value, asked: &NodeAddr, tls: bool) -> Result<Followings, SlotMapError> {
    let mut all = Followings::new();
    for entry in reply.as_list().ok_or(SlotMapError::Form("its top"))? {
        let nodes = entry.field("nodes").and_then(Value::as_list).ok_or(SlotMapError::Form("nodes"))?;
        let is_primary = |node: &Value| node.field("role").and_then(Value::as_str) == Some("master");
        let (mut primaries, mut replicas) = (Vec::new(), BTreeSet::new());
        for node in nodes {
            let address = read_shards_node(node, asked, tls)?;
            if is_primary(node) {
                primaries.extend(address);
            } else {
                let own = node.field("ip").and_then(Value::as_str).filter(|ip| !ip.is_empty());
                let own =
                    own.zip(address.as_ref()).and_then(|(ip, named)| NodeAddr::new(ip, named.port()).to_string().parse().ok());
                replicas.extend(own.or(address));
            }
        }
        // Beside a primary that has failed there may be the one in its place.
        for primary in primaries {
            all.entry(primary).or_default().extend(replicas.iter().cloned());
        }
    }
    Ok(all)
}

fn read_run(first: &Value, last: &Value) -> Result<(u16, u16), SlotMapError> {
    let (Some(first), Some(last)) = (first.as_int(), last.as_int()) else {
        return Err(SlotMapError::Form("a range"));
    };
    match (u16::try_from(first), u16::try_from(last)) {
        (Ok(from), Ok(to)) if from <= to && usize::from(to) < SLOTS => Ok((from, to)),
        _ => Err(SlotMapError::Slots(first, last)),
    }
}

/// A node of `CLUSTER SLOTS`: `[host, port, id, metadata]`. A null or empty host stands for the one that was asked; `?` for a
/// node whose name is not known yet: then the metadata may hold its address, else there is no way to it.
fn read_slots_node(node: &Value, asked: &NodeAddr) -> Result<Option<NodeAddr>, SlotMapError> {
    let [host, port, rest @ ..] = node.as_list().unwrap_or_default() else {
        return Err(SlotMapError::Form("a node"));
    };
    let port = read_port(port)?;
    let metadata = rest.get(1);
    address(host, port, asked, metadata.and_then(|metadata| metadata.field("ip")))
}

/// A node of `CLUSTER SHARDS`, whose `endpoint` follows the same conventions.
fn read_shards_node(node: &Value, asked: &NodeAddr, tls: bool) -> Result<Option<NodeAddr>, SlotMapError> {
    let port = node.field(if tls { "tls-port" } else { "port" });
    let Some(port) = port.map(read_port).transpose()? else { return Ok(None) };
    address(node.field("endpoint").unwrap_or(&Value::Nil), port, asked, node.field("ip"))
}

fn read_port(port: &Value) -> Result<u16, SlotMapError> {
    port.as_int().and_then(|port| u16::try_from(port).ok()).ok_or(SlotMapError::Form("a port"))
}

fn address(host: &Value, port: u16, asked: &NodeAddr, ip: Option<&Value>) -> Result<Option<NodeAddr>, SlotMapError> {
    let known = match host {
        Value::Nil => Some(asked.host()),
        Value::Text(text) if text.is_empty() => Some(asked.host()),
        Value::Text(text) if text == b"?" => ip.and_then(Value::as_str).filter(|ip| !ip.is_empty() && *ip != "?"),
        Value::Text(text) => Some(std::str::from_utf8(text).map_err(|_| SlotMapError::Form("a host"))?),
        _ => return Err(SlotMapError::Form("a host")),
    };
    // Through the text form, so that a host is never anything but what an address may hold.
    Ok(known.and_then(|host| NodeAddr::new(host, port).to_string().parse().ok()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn text(text: &str) -> Value {
        Value::Text(text.as_bytes().to_vec())
    }

    fn list(values: impl IntoIterator<Item = Value>) -> Value {
        Value::List(values.into_iter().collect())
    }

    fn asked() -> NodeAddr {
        NodeAddr::new("asked", 7000)
    }

    fn slots_entry(first: i64, last: i64, nodes: impl IntoIterator<Item = Value>) -> Value {
        list([Value::Int(first), Value::Int(last)].into_iter().chain(nodes))
    }

    fn node(host: Value, port: i64) -> Value {
        list([host, Value::Int(port), text("id"), list([])])
    }

    #[test]
    fn cluster_slots_names_primaries_and_replicas() {
        let reply = list([
            slots_entry(0, 99, [node(text("10.0.0.2"), 1), node(text("10.0.0.3"), 1)]),
            slots_entry(100, 100, [node(text("10.0.0.1"), 1)]),
            slots_entry(16000, 16383, [node(text("10.0.0.2"), 1), node(text("10.0.0.3"), 1)]),
        ]);
        let map = SlotMap::from_cluster_slots(&reply, &asked()).unwrap();
        assert_eq!(map.primaries(), [NodeAddr::new("10.0.0.1", 1), NodeAddr::new("10.0.0.2", 1)]);
        assert_eq!(map.owner(16383), Some(&NodeAddr::new("10.0.0.2", 1)));
        assert_eq!(map.owner(100), Some(&NodeAddr::new("10.0.0.1", 1)));
        assert_eq!(map.owner(101), None);
        assert_eq!(map.replicas(1), [NodeAddr::new("10.0.0.3", 1)]);
        assert_eq!(map.covered(), 101 + 384);
    }

    #[test]
    fn replicas_that_fail_are_heirs() {
        let shard = |nodes: Vec<Vec<(Value, Value)>>| {
            list([
                text("slots"),
                list([Value::Int(0), Value::Int(16383)]),
                text("nodes"),
                list(nodes.into_iter().map(Value::Map)),
            ])
        };
        let reply = list([shard(vec![
            shards_node("master", "10.0.0.1", "online"),
            shards_node("replica", "10.0.0.3", "fail"),
            shards_node("replica", "10.0.0.2", "loading"),
        ])]);
        let all = followings(&reply, &asked(), false).unwrap();
        let map = SlotMap::from_cluster_shards(&reply, &asked(), false).unwrap();
        assert_eq!((map.replicas(0), map.heirs(0)), (&[][..], None));
        let map = map.with_heirs(&all);
        let heirs: Vec<_> = map.heirs(0).unwrap().iter().map(|heir| heir.address.host().to_owned()).collect();
        assert_eq!(heirs, ["10.0.0.2", "10.0.0.3"]);
        assert_eq!(map.with_heirs(&Followings::new()).heirs(0), None, "nobody told of that primary");
    }

    #[test]
    fn hosts_that_are_not_told_are_the_one_asked() {
        let metadata = Value::Map(vec![(text("ip"), text("10.0.0.9"))]);
        let reply = list([
            slots_entry(0, 0, [node(Value::Nil, 1)]),
            slots_entry(1, 1, [node(text(""), 2)]),
            slots_entry(2, 2, [node(text("?"), 3)]),
            slots_entry(3, 3, [list([text("?"), Value::Int(4), text("id"), metadata])]),
            slots_entry(4, 4, [node(text("fd00::1"), 5)]),
        ]);
        let map = SlotMap::from_cluster_slots(&reply, &asked()).unwrap();
        let owner = |slot| map.owner(slot).map(ToString::to_string);
        assert_eq!(owner(0).as_deref(), Some("asked:1"));
        assert_eq!(owner(1).as_deref(), Some("asked:2"));
        assert_eq!(owner(2), None);
        assert_eq!(owner(3).as_deref(), Some("10.0.0.9:4"));
        assert_eq!(owner(4).as_deref(), Some("[fd00::1]:5"));
    }

    fn shards_node(role: &str, host: &str, health: &str) -> Vec<(Value, Value)> {
        vec![
            (text("id"), text("id")),
            (text("port"), Value::Int(1)),
            (text("tls-port"), Value::Int(2)),
            (text("ip"), text(host)),
            (text("endpoint"), text(host)),
            (text("role"), text(role)),
            (text("health"), text(health)),
        ]
    }

    fn as_resp2(pairs: Vec<(Value, Value)>) -> Value {
        list(pairs.into_iter().flat_map(|(key, value)| [key, value]))
    }

    #[test]
    fn cluster_shards_is_read_in_both_protocols() {
        for form in [Value::Map, as_resp2] {
            let nodes = list([
                form(shards_node("master", "10.0.0.8", "fail")),
                form(shards_node("master", "10.0.0.1", "online")),
                form(shards_node("replica", "10.0.0.2", "online")),
                form(shards_node("replica", "10.0.0.3", "loading")),
            ]);
            let slots = list([Value::Int(0), Value::Int(1), Value::Int(5), Value::Int(6)]);
            let reply = list([form(vec![(text("slots"), slots), (text("nodes"), nodes)])]);
            let map = SlotMap::from_cluster_shards(&reply, &asked(), false).unwrap();
            assert_eq!(map.owner(6), Some(&NodeAddr::new("10.0.0.1", 1)));
            assert_eq!(map.owner(2), None);
            assert_eq!(map.replicas(0), [NodeAddr::new("10.0.0.2", 1)]);
            let tls = SlotMap::from_cluster_shards(&reply, &asked(), true).unwrap();
            assert_eq!(tls.owner(0), Some(&NodeAddr::new("10.0.0.1", 2)));
        }
    }

    #[test]
    fn contradictions_are_refused() {
        let check = |reply: Value, error: SlotMapError| {
            assert_eq!(SlotMap::from_cluster_slots(&reply, &asked()), Err(error));
        };
        let a = || node(text("a"), 1);
        check(list([slots_entry(5, 4, [a()])]), SlotMapError::Slots(5, 4));
        check(list([slots_entry(0, 16384, [a()])]), SlotMapError::Slots(0, 16384));
        check(list([slots_entry(-1, 4, [a()])]), SlotMapError::Slots(-1, 4));
        check(list([slots_entry(0, 4, [a()]), slots_entry(4, 5, [node(text("b"), 1)])]), SlotMapError::Twice(4));
        check(Value::Nil, SlotMapError::Form("its top"));
        check(list([Value::Int(1)]), SlotMapError::Form("a range"));
        check(list([slots_entry(0, 1, [node(text("a"), 70000)])]), SlotMapError::Form("a port"));
    }

    proptest! {
        #[test]
        fn each_slot_has_the_owner_that_its_run_names(cuts in proptest::collection::btree_set(1u16..16384, 0..60), seed in any::<u64>()) {
            let mut random = fastrand::Rng::with_seed(seed);
            let starts: Vec<u16> = std::iter::once(0).chain(cuts.iter().copied()).collect();
            let mut want = vec![None; SLOTS];
            let mut entries = Vec::new();
            for (at, first) in starts.iter().enumerate() {
                let last = starts.get(at + 1).map_or(SLOTS as u16 - 1, |next| next - 1);
                let Some(host) = random.u8(0..6).checked_sub(1) else { continue };
                let host = format!("10.0.0.{host}");
                want[usize::from(*first)..=usize::from(last)].fill(Some(host.clone()));
                entries.push(slots_entry(i64::from(*first), i64::from(last), [node(text(&host), 1)]));
            }
            random.shuffle(&mut entries);
            let map = SlotMap::from_cluster_slots(&list(entries), &asked()).unwrap();
            for slot in 0..SLOTS as u16 {
                prop_assert_eq!(map.owner(slot).map(|node| node.host().to_owned()), want[usize::from(slot)].clone());
            }
        }
    }
}
