//! Follows the slot map of a Cluster.
//!
//! Each round asks a few nodes, and the map with the highest `cluster_current_epoch` counts: every change of ownership raises it,
//! and a node that was cut off stays behind. Among equals, one that a redirection named counts first, for it knows what it owns.
//! A map below the epoch in use is believed only from a majority of the known primaries: a cluster that was set up anew.

use std::collections::BTreeSet;

use tokio::io::BufReader;
use tokio::time::{Instant, timeout};

use super::gather::gather;
use super::{ANSWER_LIMIT, AskError, DiscoveryError};
use crate::sidecar::upstream::access::Access;
use crate::sidecar::upstream::admin_client::{Value, ask};
use crate::sidecar::upstream::dial::dial_any;
use crate::sidecar::upstream::node::NodeAddr;
use crate::sidecar::upstream::view::{Followings, SlotMap, View, ViewKind, followings};

/// How many nodes a round asks, doubled after each failed round.
const ASKED: usize = 3;
/// The most nodes that a round asks.
const MAX_ASKED: usize = 64;

/// What one node tells.
#[derive(Debug, Clone)]
struct Report {
    from: NodeAddr,
    epoch: u64,
    /// Whether it believes itself part of a working majority.
    healthy: bool,
    map: SlotMap,
    /// Who follows whom, failed or not. `None`: it does not tell.
    followings: Option<Followings>,
}

/// Asks the nodes of one Cluster.
pub struct ClusterFollower {
    seeds: Vec<NodeAddr>,
    access: Access,
    /// The epoch of the finding in use.
    newest: Option<u64>,
    failures: u32,
}

impl ClusterFollower {
    /// `newest` is the epoch of a finding that is in use already.
    pub fn new(seeds: Vec<NodeAddr>, access: Access, newest: Option<u64>) -> Self {
        Self { seeds, access, newest, failures: 0 }
    }

    /// The epoch of the finding in use.
    pub const fn newest(&self) -> Option<u64> {
        self.newest
    }

    pub async fn round(&mut self, hints: &[NodeAddr], view: &View) -> Result<ViewKind, DiscoveryError> {
        let known = match &view.kind {
            ViewKind::Cluster(map) => Some(map),
            _ => None,
        };
        let asked = self.pick(hints, known);
        let asks: Vec<_> = asked.iter().map(|node| ask_node(node, &self.access)).collect();
        // One that a redirection named is worth waiting for.
        let (reports, errors) = gather(asks, ASKED.min(asked.len().div_ceil(2))).await;
        if reports.is_empty() {
            self.failures = self.failures.saturating_add(1);
            let first = errors.first().map_or_else(|| "there was no answer".to_owned(), ToString::to_string);
            return Err(DiscoveryError::NoAnswer { asked: asked.len(), first });
        }
        let primaries = known.map_or(0, |map| map.primaries().len());
        // What any node knows of may be promoted.
        let heirs = reports.iter().map(|report| report.followings.as_ref()).collect::<Option<Vec<_>>>().map(together);
        let chosen =
            choose(reports, hints, self.newest, primaries).inspect_err(|_| self.failures = self.failures.saturating_add(1))?;
        self.failures = 0;
        self.newest = Some(chosen.epoch);
        Ok(ViewKind::Cluster(match heirs {
            Some(heirs) => chosen.map.with_heirs(&heirs),
            None => chosen.map,
        }))
    }

    /// Hints, then nodes of the map by chance with one seed among them; after failures more and more, in the end all.
    fn pick(&self, hints: &[NodeAddr], known: Option<&SlotMap>) -> Vec<NodeAddr> {
        let count = ASKED.saturating_mul(1 << self.failures.min(8)).min(MAX_ASKED);
        let mut nodes: Vec<&NodeAddr> = known.into_iter().flat_map(SlotMap::nodes).collect();
        let mut seeds: Vec<&NodeAddr> = self.seeds.iter().collect();
        fastrand::shuffle(&mut nodes);
        fastrand::shuffle(&mut seeds);
        let (some, rest) = nodes.split_at(nodes.len().min(count.saturating_sub(1)));
        let in_order = hints.iter().chain(some.iter().copied()).chain(seeds).chain(rest.iter().copied());
        let mut seen = BTreeSet::new();
        in_order.filter(|node| seen.insert(*node)).take(count + hints.len()).cloned().collect()
    }
}

fn together(all: Vec<&Followings>) -> Followings {
    let mut together = Followings::new();
    for (primary, replicas) in all.into_iter().flatten() {
        together.entry(primary.clone()).or_default().extend(replicas.iter().cloned());
    }
    together
}

/// Picks the map to use. `newest` is the epoch of the finding in use, and `primaries` the number of its primaries.
fn choose(reports: Vec<Report>, hints: &[NodeAddr], newest: Option<u64>, primaries: usize) -> Result<Report, DiscoveryError> {
    let answered = reports.len();
    let votes = |report: &Report| reports.iter().filter(|other| other.map == report.map).count();
    let rank = |report: &Report| (report.epoch, report.healthy, hints.contains(&report.from), votes(report));
    let best = reports.iter().enumerate().max_by_key(|(_, report)| rank(report)).map(|(at, _)| at);
    let Some(best) = best.and_then(|at| reports.into_iter().nth(at)) else {
        return Err(DiscoveryError::NoAnswer { asked: 0, first: "there was no answer".to_owned() });
    };
    match newest {
        Some(newest) if best.epoch < newest && answered * 2 <= primaries => {
            Err(DiscoveryError::Stale { from: best.from, epoch: best.epoch, newest })
        }
        _ => Ok(best),
    }
}

async fn ask_node(node: &NodeAddr, access: &Access) -> Result<Report, AskError> {
    let (link, _) = dial_any(node, access, Instant::now() + ANSWER_LIMIT).await?;
    let mut link = BufReader::with_capacity(16 * 1024, link);
    let question = async {
        // Of those two one may be refused. Only the newer names replicas that fail.
        let commands: [&[&[u8]]; 3] = [&[b"CLUSTER", b"INFO"], &[b"CLUSTER", b"SLOTS"], &[b"CLUSTER", b"SHARDS"]];
        ask(&mut link, &commands).await
    };
    let replies = timeout(ANSWER_LIMIT, question).await;
    let replies = replies.map_err(|_| AskError::answer(node, "the node did not answer in time"))?;
    let replies = replies.map_err(|error| AskError::answer(node, error))?;
    let tls = access.current().tls.is_some();
    let map = match replies.as_slice() {
        [_, Value::Error(text), Value::Error(_)] => {
            let text: String = text.chars().take(100).collect();
            return Err(AskError::answer(node, format!("the node said `{text}`: is it part of a Cluster?")));
        }
        [_, Value::Error(_), shards] => SlotMap::from_cluster_shards(shards, node, tls),
        [_, slots, _] => SlotMap::from_cluster_slots(slots, node),
        _ => return Err(AskError::answer(node, "a reply is missing")),
    };
    let map = map.map_err(|error| AskError::SlotMap { node: node.clone(), error })?;
    if map.covered() == 0 {
        return Err(AskError::answer(node, "the node knows of no slots: it may have left its Cluster"));
    }
    let (epoch, healthy) = replies.first().and_then(Value::as_str).map_or((0, false), read_info);
    let followings = replies.get(2).and_then(|shards| followings(shards, node, tls).ok());
    Ok(Report { from: node.clone(), epoch, healthy, map, followings })
}

/// The current epoch and whether the cluster works, from the reply to CLUSTER INFO.
fn read_info(info: &str) -> (u64, bool) {
    let field = |name: &str| info.lines().find_map(|line| line.trim_end().strip_prefix(name)?.strip_prefix(':'));
    let epoch = field("cluster_current_epoch").and_then(|epoch| epoch.parse().ok()).unwrap_or(0);
    (epoch, field("cluster_state") == Some("ok"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node(host: &str) -> NodeAddr {
        NodeAddr::new(host, 7000)
    }

    /// A map in which `owner` has all slots.
    fn map(owner: &str) -> SlotMap {
        let node = Value::List(vec![Value::Text(owner.as_bytes().to_vec()), Value::Int(7000)]);
        let all = Value::List(vec![Value::Int(0), Value::Int(16383), node]);
        SlotMap::from_cluster_slots(&Value::List(vec![all]), &NodeAddr::new("asked", 7000)).unwrap()
    }

    fn report(from: &str, epoch: u64, healthy: bool, owner: &str) -> Report {
        Report { from: node(from), epoch, healthy, map: map(owner), followings: None }
    }

    #[track_caller]
    fn check(reports: &[Report], hints: &[NodeAddr], newest: Option<u64>, want: Option<&str>) {
        let chosen = choose(reports.to_vec(), hints, newest, 3).ok();
        assert_eq!(chosen.and_then(|it| it.map.owner(0).map(|owner| owner.host().to_owned())).as_deref(), want);
    }

    #[test]
    fn the_newest_epoch_counts_then_health_then_the_redirection_then_agreement() {
        check(&[report("a", 7, false, "x"), report("b", 6, true, "y"), report("c", 6, true, "y")], &[], None, Some("x"));
        check(&[report("a", 6, false, "x"), report("b", 6, true, "y")], &[], None, Some("y"));
        let three = [report("a", 6, true, "x"), report("b", 6, true, "y"), report("c", 6, true, "y")];
        check(&three, &[node("a")], None, Some("x"));
        check(&three, &[], None, Some("y"));
    }

    #[test]
    fn only_a_majority_turns_back() {
        check(&[report("a", 5, true, "x")], &[], Some(6), None);
        check(&[report("a", 5, true, "x"), report("b", 5, true, "x")], &[], Some(6), Some("x"));
        check(&[report("a", 6, true, "x")], &[], Some(6), Some("x"));
    }

    #[test]
    fn hints_come_first_and_failures_widen_the_circle() {
        let seeds: Vec<NodeAddr> = (0..10).map(|at| node(&format!("s{at}"))).collect();
        let mut follower = ClusterFollower::new(seeds, Access::fixed(Default::default()), None);
        let known = map("x");
        let picked = follower.pick(&[node("hint")], Some(&known));
        assert_eq!(picked[..2], [node("hint"), node("x")]);
        assert_eq!(picked.len(), 4);
        follower.failures = 9;
        assert_eq!(follower.pick(&[], Some(&known)).len(), 11);
    }

    #[test]
    fn cluster_info_is_read() {
        assert_eq!(read_info("cluster_state:ok\r\ncluster_current_epoch:42\r\n"), (42, true));
        assert_eq!(read_info("cluster_state:fail\r\n"), (0, false));
    }
}
