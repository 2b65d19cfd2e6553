//! A Cluster's number of shards changes while it serves: slots move with their keys, and shards that own none leave.
//!
//! Nothing is remembered between two plans. A slot that is on its way is seen at its nodes, and arrives before others leave; what is to
//! move follows from who owns what. So it goes on from wherever it was left, also by one that ended between two commands.

use std::collections::{BTreeMap, BTreeSet};

use super::cluster::{Cluster, Node};
use super::observed::OpenSlot;
use super::rules::{Rule, holds};
use super::slots::{SlotSet, Transfer, transfers};
use super::{Action, ServerId, ServerState, Set, SlotRange, Starter, Waiting, Way};

/// How many slots an engine moves in one step. It copies their keys in one piece, by a process of its own where it has to.
const AT_ONCE: u16 = 1024;

/// Servers of shards that are wanted no more, and that hold neither slots nor keys: nothing is lost with them. A shard leaves as one.
pub(super) fn emptied(cluster: &Cluster<'_>) -> BTreeSet<ServerId> {
    let shards: BTreeSet<u16> = cluster.observed.servers.keys().map(|id| id.shard).collect();
    let unwanted = shards.into_iter().filter(|shard| *shard >= cluster.desired.shards());
    let drained = unwanted.filter(|shard| !(cluster.owns_slots(*shard) && holds(Rule::DrainFirst)));
    let holds_nothing = |state: &ServerState| match state {
        ServerState::Running(facts) => !facts.holds_data || !holds(Rule::KeepKeys),
        ServerState::Stopped { data, .. } => !data,
        // What was in its memory went with its pod; what is on its volume may come back.
        ServerState::Absent => !cluster.desired.durable,
        ServerState::Held(_) | ServerState::Starting(_) | ServerState::Silent => false,
    };
    let empty = drained.filter(|shard| cluster.in_shard(*shard).all(|(_, server)| holds_nothing(&server.state)));
    empty.flat_map(|shard| cluster.in_shard(shard).map(|(id, _)| id)).collect()
}

/// What is next of a change, where `is_well` says that nothing else is to be done.
pub(super) fn plan(cluster: &Cluster<'_>, is_well: bool) -> Vec<Action> {
    let owners = Owners::of(cluster);
    let mut actions = if holds(Rule::FinishSlots) { owners.finish(cluster) } else { Vec::new() };
    if actions.is_empty() && (is_well || !holds(Rule::MoveWhenWell)) {
        actions.extend(next_transfer(cluster, &owners));
    }
    actions.extend(leave(cluster));
    actions
}

/// Who owns which slots, by what the primaries say of themselves: of two that claim the same, the one with the later claim.
struct Owners<'a> {
    owners: Vec<(&'a Node<'a>, SlotSet)>,
    /// Who claims a slot that is another's by now, and has not heard of it.
    behind: Option<ServerId>,
}

impl<'a> Owners<'a> {
    fn of(cluster: &'a Cluster<'_>) -> Self {
        let mut claims: Vec<(&Node<'_>, SlotSet)> = cluster
            .nodes
            .iter()
            .filter(|node| node.serves())
            .map(|node| (node, node.view.slots.iter().copied().collect()))
            .collect();
        claims.sort_by_key(|(node, _)| std::cmp::Reverse((node.view.epoch, node.id)));
        let (mut taken, mut behind) = (SlotSet::default(), None);
        for (node, slots) in &mut claims {
            if !slots.common(&taken).is_empty() {
                behind = Some(node.id);
                slots.remove(&taken);
            }
            taken.add(slots);
        }
        Self { owners: claims, behind }
    }

    fn owner(&self, slot: u16) -> Option<&'a Node<'a>> {
        self.owners.iter().find(|(_, slots)| slots.contains(slot)).map(|(node, _)| *node)
    }

    fn by_shard(&self) -> BTreeMap<u16, SlotSet> {
        let mut shards: BTreeMap<u16, SlotSet> = BTreeMap::new();
        self.owners.iter().for_each(|(node, slots)| shards.entry(node.id.shard).or_default().add(slots));
        shards
    }

    /// Slots of a shard that are not its primary's, with both. A getter that died had just been told that they are its own, and had told nobody:
    /// the replica that took over does not know of them, and it comes back as their owner. The primary has the keys that came with them.
    fn left_behind(&self) -> impl Iterator<Item = (&'a Node<'a>, &'a Node<'a>, &SlotSet)> {
        self.owners.iter().filter(|(_, slots)| !slots.is_empty()).filter_map(|(node, slots)| {
            // The latest claim comes first.
            let (primary, _) = self.owners.iter().find(|(other, _)| other.id.shard == node.id.shard)?;
            (primary.id != node.id).then_some((*node, *primary, slots))
        })
    }

    /// Slots that are on their way arrive. Whoever owns one decides where it goes; where only the other side remembers, as after a
    /// failover, it goes there. A mark that means nothing any more is removed.
    fn finish(&self, cluster: &Cluster<'_>) -> Vec<Action> {
        let mut moves: BTreeMap<(ServerId, ServerId), SlotSet> = BTreeMap::new();
        let mut settled: BTreeMap<ServerId, SlotSet> = BTreeMap::new();
        let mut decided = SlotSet::default();
        let primaries = || cluster.nodes.iter().filter(|node| node.is_primary());
        let migrating = primaries().flat_map(|node| node.view.migrating.iter().map(move |open| (node, open)));
        for (node, OpenSlot { slot, peer }) in migrating {
            let is_own = self.owner(*slot).is_some_and(|owner| owner.id == node.id);
            let leads = |shard: u16| shard == node.id.shard && cluster.head(shard).is_none_or(|head| head.id == node.id);
            match cluster.shard_of_id(peer).filter(|shard| is_own && !leads(*shard)) {
                None => settled.entry(node.id).or_default().insert(one(*slot)),
                Some(shard) => {
                    decided.insert(one(*slot));
                    if let Some(target) = cluster.head(shard) {
                        moves.entry((node.id, target.id)).or_default().insert(one(*slot));
                    }
                }
            }
        }
        let importing = primaries().flat_map(|node| node.view.importing.iter().map(move |open| (node, open)));
        for (node, OpenSlot { slot, .. }) in importing.filter(|(_, open)| !decided.contains(open.slot)) {
            match (self.owner(*slot), cluster.head(node.id.shard)) {
                (Some(owner), head) if owner.id.shard == node.id.shard && head.is_none_or(|head| head.id == owner.id) => {
                    settled.entry(node.id).or_default().insert(one(*slot));
                }
                (Some(owner), Some(target)) => moves.entry((owner.id, target.id)).or_default().insert(one(*slot)),
                (None, _) | (_, None) => {}
            }
        }
        let settle = settled.into_iter().map(|(server, slots)| Action::SettleSlots { server, slots });
        let finish = moves.into_iter().map(|((from, to), slots)| Action::MoveSlots { from, to, slots, way: Way::ByKeys });
        settle.chain(finish).collect()
    }
}

fn one(slot: u16) -> SlotRange {
    SlotRange { first: slot, last: slot }
}

/// The next slots that begin to move: from one shard to one other at a time.
fn next_transfer(cluster: &Cluster<'_>, owners: &Owners<'_>) -> Option<Action> {
    if let Some(behind) = owners.behind {
        return Some(Action::Wait(Waiting::Gossip(behind)));
    }
    let is_under_way = |node: &Node<'_>| node.view.in_transit.as_ref().is_some_and(|slots| !slots.is_empty());
    if cluster.nodes.iter().any(is_under_way) {
        return Some(Action::Wait(Waiting::Slots));
    }
    let owned = owners.by_shard();
    let total = owned.values().map(SlotSet::len).fold(0, u16::saturating_add);
    if total < SlotSet::all().len() {
        return None;
    }
    if let Some((source, target, slots)) = owners.left_behind().next() {
        return Some(step(source, target, slots));
    }
    let Transfer { from, to, slots } = transfers(&owned, cluster.desired.shards()).into_iter().next()?;
    // Primaries that own slots vote, and agents count the votes of those that they know of.
    let is_new = !owned.contains_key(&to) && holds(Rule::TellBeforeMoves);
    if let Some(server) = cluster.observed.unaware.first().filter(|_| is_new) {
        return Some(Action::Wait(Waiting::Told(*server)));
    }
    Some(step(cluster.head(from)?, cluster.head(to)?, &slots))
}

/// As many of the slots as move at once, by the way that both nodes know.
fn step(source: &Node<'_>, target: &Node<'_>, slots: &SlotSet) -> Action {
    let is_atomic = source.view.in_transit.is_some() && target.view.in_transit.is_some();
    let (slots, way) = if is_atomic { (slots.first(AT_ONCE), Way::Atomic) } else { (slots.clone(), Way::ByKeys) };
    Action::MoveSlots { from: source.id, to: target.id, slots, way }
}

/// Servers that hold nothing go, once all others have been told to forget them: a node that is forgotten and still talks would be taken
/// up again after a minute. Those that still hold keys are waited for: an engine drops those of slots that it has moved. A replica that
/// was promoted before that reached it keeps them, and is told after a while. Where keys move one by one, such a key could be the only
/// copy, and is left alone.
fn leave(cluster: &Cluster<'_>) -> Vec<Action> {
    let unwanted = cluster.nodes.iter().filter(|node| node.id.shard >= cluster.desired.shards());
    let keepers = unwanted.filter(|node| !cluster.owns_slots(node.id.shard) && node.facts.holds_data);
    let are_strays = cluster.patience_over() && cluster.all_answer() && left_to_move(cluster) == Some(0);
    let drop_or_wait = |node: &Node<'_>| {
        let is_told = are_strays && node.is_primary() && node.view.in_transit.is_some() && holds(Rule::DropStrays);
        if is_told { Action::DropKeys { server: node.id } } else { Action::Wait(Waiting::Keys(node.id)) }
    };
    let mut actions: Vec<Action> = keepers.map(drop_or_wait).collect();
    if cluster.all_answer() {
        match cluster.desired.starter {
            Starter::Planner => actions.extend(cluster.leaving.iter().map(|server| Action::RemoveServer { server: *server })),
            Starter::Agent => {
                let shards: BTreeSet<u16> = cluster.leaving.iter().map(|server| server.shard).collect();
                actions.extend(shards.into_iter().map(|shard| Action::SetReplicas { of: Set::Servers { shard }, count: 0 }));
            }
        }
    }
    actions
}

/// How many slots are not where they are to be.
pub(super) fn left_to_move(cluster: &Cluster<'_>) -> Option<u16> {
    let owners = Owners::of(cluster);
    let owned = owners.by_shard();
    let total = owned.values().map(SlotSet::len).fold(0, u16::saturating_add);
    let left = || {
        let between = transfers(&owned, cluster.desired.shards());
        between.iter().map(|transfer| transfer.slots.len()).chain(owners.left_behind().map(|(.., slots)| slots.len())).sum()
    };
    (total == SlotSet::all().len()).then(left)
}
