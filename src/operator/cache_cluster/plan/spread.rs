//! Whether the sentinels, or a Cluster's primaries, are spread over enough nodes, and who moves where they are not.
//!
//! After the drain of a node, pods stay where they found room, and with them maybe a majority of the sentinels. Kubernetes moves no pod
//! that runs; so the planner has one made anew, for the scheduler to place it better. It knows less than the scheduler: where a move
//! was in vain, the next one waits longer. A Cluster's primary does not move: it hands over to a replica elsewhere, and a replica is made
//! anew where there is none.

use std::collections::BTreeMap;
use std::time::Duration;

use super::rules::{Rule, holds};
use super::{Action, Member, Observed, ServerId, Why};

/// For how long nothing may have changed before a sentinel is moved: a drain that goes on would bring it back.
const MOVE_AFTER: Duration = Duration::from_secs(30);
/// The least time between two moves, which doubles with each that was in vain.
pub(super) const MOVE_PAUSE: Duration = Duration::from_secs(180);
/// The most.
const MOST_MOVE_PAUSE: Duration = Duration::from_secs(6 * 3600);

/// One node carries a majority of the sentinels: with it, nobody could fail over.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Crowded {
    /// The node's name.
    pub node: String,
    /// How many sentinels it carries.
    pub sentinels: usize,
    /// Of how many.
    pub of: usize,
}

/// The last time that a sentinel, or a replica of a Cluster, was moved.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Moved {
    /// How long ago.
    pub ago: Duration,
    /// How many moves before it, in a row, left a node with as many as it had.
    pub in_vain: u32,
    /// Whether it left the node with fewer, and still with too many.
    pub helped: bool,
}

impl Moved {
    /// How long to wait before the next one.
    fn pause(&self) -> Duration {
        if self.helped {
            return MOVE_AFTER;
        }
        MOVE_PAUSE.saturating_mul(1 << self.in_vain.min(16)).min(MOST_MOVE_PAUSE)
    }
}

/// How often sentinels, or replicas of a Cluster, have been moved in vain: kept by whoever carries moves out.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Tries {
    in_vain: u32,
    /// How many sentinels, or primaries, the crowded node carried at the last look; none: no node is crowded.
    crowd: usize,
    /// How many it carried when one was moved, which is not known to have helped yet.
    open: Option<usize>,
    helped: bool,
}

impl Tries {
    /// One is moved now.
    pub fn begin(&mut self) {
        self.in_vain = if self.open.is_some() { self.in_vain.saturating_add(1) } else { 0 };
        self.open = Some(self.crowd);
        self.helped = false;
    }

    /// What came of it, given what is seen now.
    pub fn note(&mut self, observed: &Observed) {
        if !all_placed(observed) {
            return;
        }
        let primaries = || crowded_primaries(observed, &super::primaries(observed)).map(|crowded| crowded.primaries.len());
        let crowd = crowded(observed).map(|crowded| crowded.sentinels).or_else(primaries).unwrap_or(0);
        if crowd == 0 {
            *self = Self::default();
        } else if self.open.is_some_and(|before| crowd < before) {
            *self = Self { helped: true, ..Self::default() };
        } else if crowd > self.crowd {
            self.helped = false;
        }
        self.crowd = crowd;
    }

    /// The last move, so long ago.
    pub fn moved(&self, ago: Duration) -> Moved {
        Moved { ago, in_vain: self.in_vain, helped: self.helped }
    }
}

/// The node without which the other sentinels are no majority, if there is one.
pub fn crowded(observed: &Observed) -> Option<Crowded> {
    let of = observed.sentinels.len();
    let found = by_node(observed).into_iter().find(|(_, sentinels)| *sentinels > tolerated(observed));
    found.map(|(node, sentinels)| Crowded { node: node.to_owned(), sentinels, of })
}

/// One node carries a majority of a Cluster's primaries: with it, nobody could fail over.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CrowdedPrimaries {
    /// The node's name.
    pub node: String,
    /// Which primaries it carries.
    pub primaries: Vec<ServerId>,
    /// Of how many.
    pub of: usize,
}

/// The node without which the primaries of the other nodes are no majority, if there is one.
pub fn crowded_primaries(observed: &Observed, primaries: &BTreeMap<u16, ServerId>) -> Option<CrowdedPrimaries> {
    let mut carried: BTreeMap<&str, Vec<ServerId>> = BTreeMap::new();
    for id in primaries.values() {
        if let Some(node) = node_of(observed, *id) {
            carried.entry(node).or_default().push(*id);
        }
    }
    let found = carried.into_iter().find(|(_, ids)| is_majority(ids.len(), primaries.len()))?;
    Some(CrowdedPrimaries { node: found.0.to_owned(), primaries: found.1, of: primaries.len() })
}

/// Whether without so many the rest is no majority.
fn is_majority(carried: usize, of: usize) -> bool {
    of - carried < of / 2 + 1
}

fn node_of(observed: &Observed, id: ServerId) -> Option<&str> {
    Some(observed.pods.get(&Member::Server(id))?.node.as_ref()?.name.as_str())
}

/// A primary of a crowded node, and a replica in step on a node that would not be crowded with it.
pub(super) fn relieve_primaries(
    observed: &Observed,
    primaries: &BTreeMap<u16, ServerId>,
    candidates: impl Fn(ServerId) -> Vec<ServerId>,
) -> Option<(ServerId, ServerId)> {
    let CrowdedPrimaries { node, primaries: crowd, of } =
        crowded_primaries(observed, primaries).filter(|_| holds(Rule::SpreadPrimaries))?;
    let carries = |node: &str| primaries.values().filter(|id| node_of(observed, **id) == Some(node)).count();
    let has_room =
        |to: &ServerId| node_of(observed, *to).is_some_and(|other| other != node && !is_majority(carries(other) + 1, of));
    crowd.into_iter().find_map(|from| candidates(from).into_iter().find(has_room).map(|to| (from, to)))
}

/// A replica of a crowded node's primary is made anew, where an open node that carries fewer servers could take that primary over. Only
/// once no replica can as it stands; nothing else is under way, and all others are well: that is for the caller to see.
pub(super) fn move_replica(observed: &Observed, primaries: &BTreeMap<u16, ServerId>) -> Option<Action> {
    let CrowdedPrimaries { node, primaries: crowd, of } =
        crowded_primaries(observed, primaries).filter(|_| holds(Rule::MoveReplicas))?;
    if !rests(observed) && holds(Rule::MoveSlowly) {
        return None;
    }
    let carries = |node: &str| primaries.values().filter(|id| node_of(observed, **id) == Some(node)).count();
    let servers = |node: &str| observed.servers.keys().filter(|id| node_of(observed, **id) == Some(node)).count();
    let takes_over = |open: &&String| **open != node && !is_majority(carries(open) + 1, of);
    let fewest = observed.open_nodes.iter().filter(takes_over).map(|open| servers(open)).min()?;
    let is_replica =
        |id: &ServerId| crowd.iter().any(|primary| primary.shard == id.shard) && !primaries.values().any(|other| other == id);
    // The scheduler evens servers out: one would come back to a node that carries only one more.
    let moves = |id: &ServerId| node_of(observed, *id).is_some_and(|node| servers(node) > fewest + 1);
    let id = observed.servers.keys().rev().filter(|id| is_replica(id)).find(|id| moves(id))?;
    let pod = observed.pods.get(&Member::Server(*id))?;
    Some(Action::ReplacePod { member: Member::Server(*id), uid: pod.uid.clone(), why: Why::Crowded })
}

/// Whether nothing has changed for long enough, and the last move is long enough ago.
fn rests(observed: &Observed) -> bool {
    observed.steady >= MOVE_AFTER && observed.moved.is_none_or(|moved| moved.ago >= moved.pause())
}

/// Whether there is a node that could take a sentinel more without being crowded itself. Only where nodes may be seen.
pub fn has_room(observed: &Observed) -> bool {
    let carried = by_node(observed);
    let room = |node: &String| carried.get(node.as_str()).copied().unwrap_or_default() < tolerated(observed);
    observed.open_nodes.iter().any(room) || !holds(Rule::MoveWhereRoom)
}

/// Whether every sentinel, or without sentinels every server, has a place: who counts before that, miscounts.
fn all_placed(observed: &Observed) -> bool {
    let placed = |member| observed.pods.get(&member).is_some_and(|pod| pod.node.is_some() && !pod.deleting);
    if observed.sentinels.is_empty() {
        return observed.servers.keys().all(|id| placed(Member::Server(*id)));
    }
    observed.sentinels.keys().all(|id| placed(Member::Sentinel(*id)))
}

/// One sentinel of a crowded node is made anew, where another node has room. Nothing else is under way, and all others are well: that is
/// for the caller to see.
pub(super) fn relieve(observed: &Observed) -> Option<Action> {
    let Crowded { node, .. } = crowded(observed).filter(|_| holds(Rule::MoveSentinels))?;
    if !has_room(observed) || (!rests(observed) && holds(Rule::MoveSlowly)) {
        return None;
    }
    let on_it =
        observed.pods.iter().rev().find(|(member, pod)| {
            matches!(member, Member::Sentinel(_)) && pod.node.as_ref().is_some_and(|found| found.name == node)
        });
    on_it.map(|(member, pod)| Action::ReplacePod { member: *member, uid: pod.uid.clone(), why: Why::Crowded })
}

/// How many sentinels the others can do without.
fn tolerated(observed: &Observed) -> usize {
    let of = observed.sentinels.len();
    of.saturating_sub(of / 2 + 1)
}

fn by_node(observed: &Observed) -> BTreeMap<&str, usize> {
    let mut nodes: BTreeMap<&str, usize> = BTreeMap::new();
    for (member, pod) in &observed.pods {
        if let (Member::Sentinel(_), Some(node)) = (member, &pod.node) {
            *nodes.entry(&node.name).or_default() += 1;
        }
    }
    nodes
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::operator::cache_cluster::plan::{Node, Pod, Sentinel, SentinelId};

    fn on(nodes: &[Option<&str>]) -> Observed {
        let mut observed = Observed { steady: MOVE_AFTER, ..Observed::default() };
        for (index, node) in nodes.iter().enumerate() {
            let id = SentinelId(index as u16);
            let node = node.map(|name| Node { name: name.to_owned(), ready: true });
            let pod = Pod { uid: index.to_string(), revision: None, node, started: true, ready: true, deleting: false };
            observed.sentinels.insert(id, Sentinel::Running { watch: None });
            observed.pods.insert(Member::Sentinel(id), pod);
        }
        observed.open_nodes = ["a", "b", "c"].map(str::to_owned).into();
        observed
    }

    #[test]
    fn a_majority_on_one_node_is_told() {
        assert_eq!(crowded(&on(&[Some("a"), Some("b"), Some("c")])), None);
        let two_of_three = Crowded { node: "b".into(), sentinels: 2, of: 3 };
        assert_eq!(crowded(&on(&[Some("a"), Some("b"), Some("b")])), Some(two_of_three));
        assert_eq!(crowded(&on(&[Some("a"), Some("b"), Some("b"), Some("c"), Some("c")])), None);
        assert_eq!(crowded(&on(&[Some("a"), None, None])), None);
        // Of four, two are no majority, and without two there is none.
        assert!(crowded(&on(&[Some("a"), Some("a"), Some("b"), Some("c")])).is_some());
    }

    #[test]
    fn the_last_of_a_crowded_node_moves_where_another_has_room() {
        let moves = |observed: &Observed| match relieve(observed) {
            Some(Action::ReplacePod { member: Member::Sentinel(id), why: Why::Crowded, .. }) => Some(id.0),
            None => None,
            other => panic!("{other:?}"),
        };
        let crowded = on(&[Some("a"), Some("b"), Some("b")]);
        assert_eq!(moves(&crowded), Some(2));
        assert_eq!(moves(&on(&[Some("a"), Some("a"), Some("a"), Some("b"), Some("c")])), Some(2), "one more has room beside one");
        let full = Observed { open_nodes: ["a", "b"].map(str::to_owned).into(), ..crowded.clone() };
        assert_eq!(moves(&full), None, "both nodes that are open carry one");
        assert_eq!(moves(&Observed { open_nodes: Default::default(), ..crowded.clone() }), None, "nodes may not be seen");
        assert_eq!(moves(&Observed { steady: Duration::ZERO, ..crowded }), None);
        assert_eq!(moves(&on(&[Some("a"), Some("b"), Some("c")])), None);
    }

    #[test]
    fn moves_that_do_not_help_are_counted() {
        let (crowded, spread) = (on(&[Some("a"), Some("b"), Some("b")]), on(&[Some("a"), Some("b"), Some("c")]));
        let mut tries = Tries::default();
        let mut moved = |seen: &Observed| {
            tries.begin();
            tries.note(seen);
            tries.moved(Duration::ZERO).in_vain
        };
        // While the pod is made anew nobody knows whether it will have helped.
        assert_eq!((moved(&crowded), moved(&on(&[Some("a"), Some("b"), None])), moved(&crowded)), (0, 1, 2));
        assert_eq!((moved(&spread), moved(&crowded), moved(&crowded)), (0, 0, 1));
    }

    #[test]
    fn who_has_gone_some_of_the_way_goes_on_at_once() {
        let (three, two) = (on(&[Some("b"), Some("b"), Some("b")]), on(&[Some("b"), Some("b"), Some("c")]));
        let mut tries = Tries::default();
        tries.note(&three);
        tries.begin();
        let next = |tries: &Tries| relieve(&Observed { moved: Some(tries.moved(MOVE_AFTER)), ..two.clone() });
        assert_eq!(next(&tries), None, "it is not known yet");
        tries.note(&two);
        assert!(next(&tries).is_some(), "one of three has left, and two are still too many");
        // The second comes back.
        tries.begin();
        tries.note(&two);
        assert_eq!(next(&tries), None);
    }

    #[test]
    fn who_moved_in_vain_waits_longer_each_time() {
        let crowded = on(&[Some("a"), Some("b"), Some("b")]);
        let moves = |minutes: u64, in_vain| {
            let moved = Some(Moved { ago: Duration::from_secs(minutes * 60), in_vain, helped: false });
            relieve(&Observed { moved, ..crowded.clone() }).is_some()
        };
        assert!(!moves(2, 0) && moves(3, 0) && !moves(5, 1) && moves(6, 1) && !moves(300, 30) && moves(360, 30));
    }
}
