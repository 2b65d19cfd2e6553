//! What disrupts: rolling, scaling and pruning, one thing at a time over the whole cluster, and only while all is well.
//!
//! The one exception is a pod of an earlier revision that is not ready and holds nothing that others lack: it goes at once, so that
//! a spec that was wrong is healed by writing a better one.

use super::agents::{self, Acting};
use super::{
    Action, Desired, Facts, Layout, Link, Member, Observed, Pod, Role, Rule, Scale, Sentinel, SentinelId, ServerId, ServerState,
    Set, Waiting, Watch, Why, cluster, holds, is_followed, spread,
};

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::Duration;

/// How far a replica that counts as caught up may be behind, in bytes: both offsets were not read at the same moment.
const MAX_LAG: u64 = 1 << 20;
/// How long after a failed handover the next is tried: each may pause writes.
const HANDOVER_PAUSE: Duration = Duration::from_secs(60);
/// How long nothing may have changed before a sentinel forgets its ghosts. One that has forgotten its peers finds them again by their
/// greetings, every two seconds, and the replicas by what the primary tells it, every ten; until it knows all of them it is waited for,
/// and then this long. So whoever forgets, all others know everybody, and have been seen to more than once.
const PRUNE_AFTER: Duration = Duration::from_secs(5);

/// What may be done while the cluster heals: nothing here takes away what works.
pub(super) fn at_once(desired: &Desired, observed: &Observed) -> Vec<Action> {
    replace_broken(desired, observed).into_iter().chain(scale_up(desired, observed)).collect()
}

/// The next disruption, or what it waits for. `healing` is what else is to be done or waited for.
pub(super) fn next(desired: &Desired, observed: &Observed, healing: &[Action]) -> Option<Action> {
    let round = Round::of(desired, observed);
    if round.leaders.len() < usize::from(desired.shards()) {
        return None;
    }
    let to_heal = healing.iter().any(|action| !round.concerns_leaver(action)) && holds(Rule::HealFirst);
    if to_heal {
        return None;
    }
    if let Some(leaving) = deletion_under_way(observed) {
        return Some(Action::Wait(Waiting::Pod(leaving)));
    }
    if let Some(action) = round.drop_broken_leaver() {
        return Some(action);
    }
    if !healing.is_empty() && holds(Rule::HealFirst) {
        return None;
    }
    if let Some(waiting) = round.unsound() {
        return Some(Action::Wait(waiting));
    }
    let in_order = || round.prune().or_else(|| round.scale_down());
    let out_of_order = || round.scale_down().or_else(|| round.prune());
    let step = round.roll().or_else(|| if holds(Rule::PruneBeforeLess) { in_order() } else { out_of_order() });
    // Whatever else is to be done may place a sentinel, or a replica, better.
    step.or_else(|| spread::relieve(observed)).or_else(|| round.spread_primaries()).or_else(|| round.move_replica())
}

/// A pod that is on its way out, where its node lives to see it through.
fn deletion_under_way(observed: &Observed) -> Option<Member> {
    let on_its_way = |pod: &Pod| pod.deleting && pod.lost_node().is_none();
    let found = observed.pods.iter().find(|(_, pod)| on_its_way(pod));
    found.map(|(member, _)| *member).filter(|_| holds(Rule::OneAtATime))
}

/// One pod of an earlier revision that is not ready, where nothing is lost with it.
fn replace_broken(desired: &Desired, observed: &Observed) -> Option<Action> {
    if deletion_under_way(observed).is_some() || !holds(Rule::ReplaceBroken) {
        return None;
    }
    let round = Round::of(desired, observed);
    // On a node that is cut off, a pod does no harm, and cannot be replaced.
    let unready = |pod: &Pod| !pod.ready && !pod.deleting && pod.lost_node().is_none();
    let broken =
        |(member, pod): &(&Member, &Pod)| unready(pod) && round.is_stale(**member, pod) && round.is_expendable(**member, pod);
    let (member, pod) = observed.pods.iter().find(broken)?;
    Some(Action::ReplacePod { member: *member, uid: pod.uid.clone(), why: Why::StaleAndUnready })
}

/// More pods are asked for at once: they take nothing away.
fn scale_up(desired: &Desired, observed: &Observed) -> Vec<Action> {
    let Some(scale) = observed.scale else { return Vec::new() };
    let wanted = wanted_scale(desired);
    let sizes = sizes(desired, observed);
    let servers = sizes.into_iter().filter(|(_, size)| *size < wanted.servers);
    let servers = servers.map(|(shard, _)| (Set::Servers { shard }, wanted.servers));
    let sentinels = (scale.sentinels < wanted.sentinels).then_some((Set::Sentinels, wanted.sentinels));
    servers.chain(sentinels).map(|(of, count)| Action::SetReplicas { of, count }).collect()
}

fn wanted_scale(desired: &Desired) -> Scale {
    Scale { servers: desired.replicas + 1, sentinels: desired.sentinels().count() as u16 }
}

/// How many servers the set of each wanted shard asks for.
fn sizes(desired: &Desired, observed: &Observed) -> BTreeMap<u16, u16> {
    match desired.layout {
        Layout::Sentinel { .. } => observed.scale.map(|scale| (0, scale.servers)).into_iter().collect(),
        Layout::Cluster { shards } => observed.sizes.range(..shards).map(|(shard, size)| (*shard, *size)).collect(),
    }
}

/// One look at the cluster.
struct Round<'a> {
    desired: &'a Desired,
    observed: &'a Observed,
    /// Who acts as primary, by shard.
    leaders: BTreeMap<u16, Acting<'a>>,
}

impl<'a> Round<'a> {
    fn of(desired: &'a Desired, observed: &'a Observed) -> Self {
        Self { desired, observed, leaders: super::leaders(desired, observed) }
    }

    fn leads(&self, id: ServerId) -> bool {
        self.leaders.get(&id.shard).is_some_and(|leader| leader.id == id)
    }

    /// Whether somebody who counts takes the server for the primary.
    fn is_named(&self, address: SocketAddr) -> bool {
        match self.desired.layout {
            Layout::Sentinel { .. } => agents::named_by_majority(self.observed) == Some(address),
            Layout::Cluster { .. } => cluster::is_named(self.observed, address),
        }
    }

    fn is_stale(&self, member: Member, pod: &Pod) -> bool {
        self.desired.pods.as_ref().is_some_and(|pods| pod.revision.as_ref() != Some(pods.revision(member)))
    }

    fn is_leaving(&self, member: Member) -> bool {
        let wanted = wanted_scale(self.desired);
        match member {
            Member::Server(server) => server.index >= wanted.servers,
            Member::Sentinel(SentinelId(index)) => index >= wanted.sentinels,
        }
    }

    /// Whether nothing is lost with a pod that is not ready.
    fn is_expendable(&self, member: Member, pod: &Pod) -> bool {
        if !pod.started || !holds(Rule::KeepLastCopy) {
            return true;
        }
        match member {
            Member::Server(server) => self.is_expendable_server(server),
            Member::Sentinel(sentinel) => self.is_expendable_sentinel(sentinel),
        }
    }

    /// What a server that does not serve has on its disk outlives its pod, and what it has in memory others have, where another
    /// serves as primary.
    fn is_expendable_server(&self, id: ServerId) -> bool {
        let Some(server) = self.observed.servers.get(&id) else { return true };
        match &server.state {
            ServerState::Held(_) | ServerState::Absent | ServerState::Stopped { .. } => true,
            // The one that is named may be about to serve.
            ServerState::Starting(_) => !self.is_named(server.address) || self.observed.steady >= self.desired.takeover_after,
            ServerState::Silent | ServerState::Running(Facts { role: Role::Replica { .. }, .. }) => {
                self.leaders.contains_key(&id.shard) && !self.leads(id)
            }
            // A node that owns nothing yet, which nobody can be told of.
            ServerState::Running(Facts { holds_data: false, cluster: Some(view), .. }) if view.slots.is_empty() => true,
            ServerState::Running(Facts { role: Role::Primary, .. }) => false,
        }
    }

    /// What a sentinel remembers is kept, or a majority of the others knows it, or nobody waits any longer for it.
    fn is_expendable_sentinel(&self, id: SentinelId) -> bool {
        if self.desired.durable || self.observed.steady >= self.desired.takeover_after {
            return true;
        }
        let answers = |sentinel: &Sentinel| matches!(sentinel, Sentinel::Running { watch: Some(_) });
        let others = self.observed.sentinels.iter().filter(|(other, sentinel)| **other != id && answers(sentinel)).count();
        others >= agents::majority(self.observed)
    }

    /// Whether something is only waited for because of a member that is to go.
    fn concerns_leaver(&self, action: &Action) -> bool {
        let member = match action {
            Action::Wait(
                Waiting::Server(server)
                | Waiting::Synchronisation(server)
                | Waiting::Held { server, .. }
                | Waiting::Pod(Member::Server(server)),
            ) => Member::Server(*server),
            Action::Wait(
                Waiting::Sentinel(sentinel) | Waiting::Discovery(sentinel) | Waiting::Pod(Member::Sentinel(sentinel)),
            ) => Member::Sentinel(*sentinel),
            _ => return false,
        };
        self.is_leaving(member)
    }

    /// The last member goes although it is not well: it is to go, and is waited for otherwise.
    fn drop_broken_leaver(&self) -> Option<Action> {
        let scale = self.observed.scale?;
        let wanted = wanted_scale(self.desired);
        let serves = |id| self.observed.servers.get(&id).is_some_and(|server| matches!(server.state, ServerState::Running(_)));
        let drops = |(shard, size): &(u16, u16)| {
            let last = ServerId { shard: *shard, index: size.saturating_sub(1) };
            *size > wanted.servers && !self.leads(last) && !serves(last)
        };
        if let Some((shard, size)) = sizes(self.desired, self.observed).into_iter().find(drops) {
            return Some(Action::SetReplicas { of: Set::Servers { shard }, count: size - 1 });
        }
        let last = SentinelId(scale.sentinels.saturating_sub(1));
        let answers = matches!(self.observed.sentinels.get(&last), Some(Sentinel::Running { .. }));
        let drops = scale.sentinels > wanted.sentinels && !answers;
        drops.then_some(Action::SetReplicas { of: Set::Sentinels, count: scale.sentinels - 1 })
    }

    /// What is not as it must be before anything is disrupted, though it heals by itself.
    fn unsound(&self) -> Option<Waiting> {
        self.observed.scale?;
        let servers = self.observed.servers.keys().map(|id| Member::Server(*id));
        let members = servers.chain(self.observed.sentinels.keys().map(|id| Member::Sentinel(*id)));
        for member in members {
            let Some(pod) = self.observed.pods.get(&member) else { return Some(Waiting::Pod(member)) };
            if let Some(node) = pod.lost_node() {
                return Some(Waiting::Node { member, node: node.to_owned() });
            }
            if (!pod.ready || pod.deleting) && holds(Rule::OneAtATime) {
                return Some(Waiting::Pod(member));
            }
        }
        let is_behind = |id: ServerId, facts: &Facts| {
            let leader = self.leaders.get(&id.shard).filter(|leader| leader.id != id);
            leader.is_some_and(|leader| facts.offset.saturating_add(MAX_LAG) < leader.facts.offset)
        };
        let behind = self.observed.running().find(|(id, _, facts)| is_behind(*id, facts));
        behind.map(|(id, ..)| Waiting::Synchronisation(id))
    }

    /// Sentinels, then a shard after the other: its replicas, then the primary, which hands over first.
    fn roll(&self) -> Option<Action> {
        let stale = |member| self.observed.pods.get(&member).filter(|pod| self.is_stale(member, pod));
        let replace = |member| stale(member).map(|pod| Action::ReplacePod { member, uid: pod.uid.clone(), why: Why::Stale });
        let sentinels = self.observed.sentinels.keys().map(|id| Member::Sentinel(*id));
        if let Some(action) = sentinels.into_iter().find_map(replace) {
            return Some(action);
        }
        self.leaders.iter().find_map(|(shard, primary)| {
            let servers = self.observed.servers.keys().rev().filter(|id| id.shard == *shard);
            let replicas = servers.filter(|id| **id != primary.id).map(|id| Member::Server(*id));
            if let Some(action) = replicas.into_iter().find_map(replace) {
                return Some(action);
            }
            let replace_primary = replace(Member::Server(primary.id))?;
            Some(if holds(Rule::HandOverFirst) { self.hand_over(*primary) } else { replace_primary })
        })
    }

    fn primaries(&self) -> BTreeMap<u16, ServerId> {
        self.leaders.iter().map(|(shard, leader)| (*shard, leader.id)).collect()
    }

    /// Where a node carries a majority of a Cluster's primaries and no replica of theirs is where it could take over, one is made anew.
    fn move_replica(&self) -> Option<Action> {
        let is_cluster = matches!(self.desired.layout, Layout::Cluster { .. });
        is_cluster.then(|| spread::move_replica(self.observed, &self.primaries())).flatten()
    }

    /// Where a node carries a majority of a Cluster's primaries, one of them hands over to a replica elsewhere.
    fn spread_primaries(&self) -> Option<Action> {
        let primaries = self.primaries();
        let in_step = |from: ServerId| {
            let leader = self.leaders.get(&from.shard);
            let follows = |facts: &Facts| leader.is_some_and(|leader| is_followed(facts, leader.server.address, Link::Up));
            let running = self.observed.running().filter(|(_, _, facts)| facts.is_electable() && follows(facts));
            running.map(|(id, ..)| id).collect()
        };
        let (from, to) = spread::relieve_primaries(self.observed, &primaries, in_step)?;
        if self.observed.handover_failed.is_some_and(|ago| ago < HANDOVER_PAUSE) && holds(Rule::PauseHandovers) {
            return Some(Action::Wait(Waiting::HandoverRetry(from)));
        }
        Some(Action::Handover { from, to })
    }

    /// To the replica in step that stays, of the right revision, and furthest.
    fn hand_over(&self, primary: Acting<'_>) -> Action {
        if self.observed.handover_failed.is_some_and(|ago| ago < HANDOVER_PAUSE) && holds(Rule::PauseHandovers) {
            return Action::Wait(Waiting::HandoverRetry(primary.id));
        }
        let follows = |facts: &Facts| facts.is_electable() && is_followed(facts, primary.server.address, Link::Up);
        let candidates = self.observed.running().filter(|(id, _, facts)| *id != primary.id && follows(facts));
        let stays = |id: &ServerId| !self.is_leaving(Member::Server(*id));
        let best = candidates.filter(|(id, ..)| stays(id)).max_by_key(|(id, _, facts)| (facts.offset, std::cmp::Reverse(*id)));
        match best {
            Some((to, ..)) => Action::Handover { from: primary.id, to },
            None => Action::Wait(Waiting::Synchronisation(primary.id)),
        }
    }

    /// One sentinel that knows more than there are forgets them all, and finds again those that there are.
    fn prune(&self) -> Option<Action> {
        let scale = self.observed.scale?;
        let haunted =
            self.staying_sentinels().find(|(_, watch)| watch.replicas >= scale.servers || watch.sentinels >= scale.sentinels);
        let (sentinel, _) = haunted.filter(|_| holds(Rule::Prune))?;
        if self.observed.steady < PRUNE_AFTER && holds(Rule::PruneSlowly) {
            return Some(Action::Wait(Waiting::Ghosts(sentinel)));
        }
        Some(Action::PruneGhosts { sentinel })
    }

    /// What the sentinels watch that are not to go.
    fn staying_sentinels(&self) -> impl Iterator<Item = (SentinelId, Watch)> {
        self.observed.sentinels.iter().filter_map(|(id, sentinel)| match sentinel {
            Sentinel::Running { watch: Some(watch) } if !self.is_leaving(Member::Sentinel(*id)) => Some((*id, *watch)),
            _ => None,
        })
    }

    /// One member less. A primary that is to go hands over first; before a sentinel goes, the others have forgotten the one that went
    /// before it, so that they are a majority of all that they know.
    fn scale_down(&self) -> Option<Action> {
        let scale = self.observed.scale?;
        let wanted = wanted_scale(self.desired);
        if let Some((shard, size)) = sizes(self.desired, self.observed).into_iter().find(|(_, size)| *size > wanted.servers) {
            let leaver = self.leaders.get(&shard).filter(|leader| self.is_leaving(Member::Server(leader.id)));
            return Some(match leaver.filter(|_| holds(Rule::KeepPrimary)) {
                Some(primary) => self.hand_over(*primary),
                None => Action::SetReplicas { of: Set::Servers { shard }, count: size - 1 },
            });
        }
        if scale.sentinels <= wanted.sentinels {
            return None;
        }
        // Who stays knows everybody: what it hears no more afterwards is the one that left, and nobody else.
        let unaware = self.staying_sentinels().find(|(_, watch)| watch.sentinels + 1 < scale.sentinels);
        Some(match unaware {
            Some((sentinel, _)) => Action::Wait(Waiting::Discovery(sentinel)),
            None => Action::SetReplicas { of: Set::Sentinels, count: scale.sentinels - 1 },
        })
    }
}
