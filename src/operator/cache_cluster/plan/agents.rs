//! One primary with replicas under Sentinel, where agents start the servers.
//!
//! Agents decide where a server starts, by what the sentinels name and by what all copies hold; sentinels fail over. What is left
//! for the planner is what neither can do: tell sentinels that remember nothing, and act where their majority is lost. Nothing
//! here contradicts a majority of sentinels that could still fail over, and no pod is restarted to change a role.

use std::collections::BTreeMap;
use std::net::SocketAddr;

use super::{
    Action, Desired, Facts, Link, Observed, Role, Rule, Sentinel, SentinelId, Server, ServerId, ServerState, Waiting, Watch,
    holds, is_followed,
};
use crate::policy::agent::DataState;

/// Who is primary.
enum Verdict<'a> {
    /// This server acts as primary, and no majority contradicts.
    Acting(Acting<'a>),
    /// No majority of sentinels can fail over, and no primary runs: this replica becomes primary.
    Promote(ServerId),
    /// The same, and no server runs at all: without these sentinels' memory, the agents settle it among themselves.
    Forget(Vec<SentinelId>),
    /// The majority that names this server replaces it once these sentinels, which watch nothing, have a voice, too.
    Enlist(SocketAddr, Vec<SentinelId>),
    /// It is not known yet.
    Open(Waiting),
}

/// The server that acts as primary.
#[derive(Clone, Copy)]
pub(super) struct Acting<'a> {
    pub(super) id: ServerId,
    pub(super) server: &'a Server,
    pub(super) facts: &'a Facts,
}

/// What heals. Empty: every server and sentinel is in its place and knows all others.
pub(super) fn heal(desired: &Desired, observed: &Observed) -> Vec<Action> {
    let mut actions = Vec::new();
    match verdict(desired, observed) {
        Verdict::Promote(server) => actions.push(Action::Promote { server }),
        Verdict::Forget(sentinels) => actions.extend(sentinels.into_iter().map(|sentinel| Action::Forget { sentinel })),
        Verdict::Enlist(primary, sentinels) => {
            let quorum = desired.quorum();
            actions.extend(sentinels.into_iter().map(|sentinel| Action::Monitor { sentinel, primary, quorum }));
        }
        Verdict::Open(waiting) => actions.push(Action::Wait(waiting)),
        Verdict::Acting(primary) => {
            actions.extend(repair_replication(desired, observed, primary));
            actions.extend(watch(desired, observed, primary.server.address));
        }
    }
    actions.extend(super::unfinished(observed));
    actions.extend(observed.sentinels.iter().filter_map(|(sentinel, state)| match state {
        Sentinel::Stopped | Sentinel::Silent => Some(Action::Wait(Waiting::Sentinel(*sentinel))),
        Sentinel::Running { .. } => None,
    }));
    actions
}

/// The server that acts as primary, where no majority of sentinels contradicts.
pub(super) fn acting<'a>(desired: &Desired, observed: &'a Observed) -> Option<Acting<'a>> {
    match verdict(desired, observed) {
        Verdict::Acting(acting) => Some(acting),
        Verdict::Promote(_) | Verdict::Forget(_) | Verdict::Enlist(..) | Verdict::Open(_) => None,
    }
}

fn watches(observed: &Observed) -> impl Iterator<Item = (SentinelId, Watch)> {
    observed.sentinels.iter().filter_map(|(id, sentinel)| match sentinel {
        Sentinel::Running { watch } => watch.map(|watch| (*id, watch)),
        Sentinel::Stopped | Sentinel::Silent => None,
    })
}

/// A majority of all sentinels that there are.
pub(super) fn majority(observed: &Observed) -> usize {
    observed.sentinels.len() / 2 + 1
}

/// The primary that a majority of all sentinels names.
pub(super) fn named_by_majority(observed: &Observed) -> Option<SocketAddr> {
    let mut votes: BTreeMap<SocketAddr, usize> = BTreeMap::new();
    for (_, watch) in watches(observed) {
        *votes.entry(watch.primary).or_default() += 1;
    }
    votes.into_iter().find(|(_, votes)| *votes >= majority(observed)).map(|(address, _)| address)
}

fn verdict<'a>(desired: &Desired, observed: &'a Observed) -> Verdict<'a> {
    let patience_over = observed.steady >= desired.takeover_after;
    if let Some(named) = named_by_majority(observed) {
        if let Some(acting) = running_primary_at(observed, named) {
            return Verdict::Acting(acting);
        }
        let unaware = unaware(observed);
        if patience_over && knows_a_replica(observed, named) && !unaware.is_empty() {
            return Verdict::Enlist(named, unaware);
        }
        let able = can_fail_over(observed, named);
        // Those who could fail over and have not, found no copy that is whole.
        if patience_over && able && !desired.accept_data_loss && !observed.running().any(|(_, _, facts)| facts.is_electable()) {
            return Verdict::Open(Waiting::Choice);
        }
        if (!patience_over || (able && !desired.accept_data_loss)) && holds(Rule::RespectMajority) {
            return Verdict::Open(Waiting::Failover { shard: 0 });
        }
        return leaderless(desired, observed);
    }
    let absent = observed.sentinels.iter().find(|(_, sentinel)| !matches!(sentinel, Sentinel::Running { .. }));
    match absent {
        // Those who do not answer may remember better.
        Some((sentinel, _)) if !patience_over => Verdict::Open(Waiting::Sentinel(*sentinel)),
        _ => leaderless(desired, observed),
    }
}

fn running_primary_at(observed: &Observed, address: SocketAddr) -> Option<Acting<'_>> {
    let (id, server) = observed.at(address)?;
    match &server.state {
        ServerState::Running(facts) if facts.role == Role::Primary => Some(Acting { id, server, facts }),
        _ => None,
    }
}

/// Whether the majority that names a primary could replace it: it knows a replica, and is a majority of all that it knows, ghosts
/// included.
fn can_fail_over(observed: &Observed, named: SocketAddr) -> bool {
    let naming = || watches(observed).filter(|(_, watch)| watch.primary == named);
    let known = naming().map(|(_, watch)| usize::from(watch.sentinels) + 1).max().unwrap_or(0);
    knows_a_replica(observed, named) && naming().count() > known / 2
}

/// Whether somebody who names a primary, which is one of ours, knows a replica of it.
fn knows_a_replica(observed: &Observed, named: SocketAddr) -> bool {
    let known = watches(observed).any(|(_, watch)| watch.primary == named && watch.replicas > 0);
    known && observed.at(named).is_some()
}

/// The sentinels that answer and watch nothing.
fn unaware(observed: &Observed) -> Vec<SentinelId> {
    let unaware = observed.sentinels.iter().filter(|(_, sentinel)| matches!(sentinel, Sentinel::Running { watch: None }));
    unaware.map(|(id, _)| *id).collect()
}

/// No majority of sentinels can say who is primary, or replace it. Every server is asked before anything is decided.
fn leaderless<'a>(desired: &Desired, observed: &'a Observed) -> Verdict<'a> {
    let patience_over = observed.steady >= desired.takeover_after || !holds(Rule::Patience);
    let unsettled = |state: &ServerState| matches!(state, ServerState::Silent | ServerState::Starting(_));
    let unsettled = observed.servers.iter().find(|(_, server)| unsettled(&server.state));
    if let (Some((server, _)), false) = (unsettled, patience_over) {
        return Verdict::Open(Waiting::Server(*server));
    }
    let primaries = observed.running().filter(|(_, _, facts)| facts.role == Role::Primary);
    let primaries: Vec<Acting<'_>> = primaries.map(|(id, server, facts)| Acting { id, server, facts }).collect();
    let weight = |acting: &Acting<'_>| (acting.facts.holds_data, followers(observed, acting.server.address), acting.facts.offset);
    match primaries.iter().max_by_key(|acting| weight(acting)) {
        Some(acting) if primaries.len() == 1 || patience_over => Verdict::Acting(*acting),
        Some(_) => Verdict::Open(Waiting::Agreement),
        None if patience_over => vacant(desired, observed),
        None => Verdict::Open(Waiting::Agreement),
    }
}

fn followers(observed: &Observed, address: SocketAddr) -> usize {
    observed.running().filter(|(_, _, facts)| is_followed(facts, address, Link::Up)).count()
}

/// Nobody acts as primary, and nobody but the planner can change that.
fn vacant<'a>(desired: &Desired, observed: &'a Observed) -> Verdict<'a> {
    match best_replica(desired, observed) {
        Best::Replica(server) => Verdict::Promote(server),
        Best::Unclear => Verdict::Open(Waiting::Choice),
        Best::Starting(server) => Verdict::Open(Waiting::BestCopy(server)),
        Best::Held | Best::None => {
            // Where a majority answers, nobody else can be naming a primary.
            let answering = observed.sentinels.values().filter(|sentinel| matches!(sentinel, Sentinel::Running { .. })).count();
            let remembering: Vec<SentinelId> = watches(observed).map(|(sentinel, _)| sentinel).collect();
            let runs = observed.running().next().is_some();
            let keeps = (answering < majority(observed) || runs) && holds(Rule::KeepMemory);
            if keeps || remembering.is_empty() || !holds(Rule::ForgetStale) {
                Verdict::Open(Waiting::Agreement)
            } else {
                Verdict::Forget(remembering)
            }
        }
    }
}

/// Which replica's copy is the best.
enum Best {
    /// This one's: no copy that is known is better.
    Replica(ServerId),
    /// That of a server that is held: its agent starts it.
    Held,
    /// That of a server that does not come up, whatever its agent tries.
    Starting(ServerId),
    /// Nobody can say.
    Unclear,
    /// No replica runs.
    None,
}

fn best_replica(desired: &Desired, observed: &Observed) -> Best {
    let replicas: Vec<(ServerId, &Facts)> = observed.running().map(|(id, _, facts)| (id, facts)).collect();
    if replicas.is_empty() {
        return Best::None;
    }
    let merit = |facts: &Facts| (facts.lineage.is_some(), facts.holds_data, facts.offset);
    // Of equals the first.
    let best = replicas.iter().rev().max_by_key(|(_, facts)| merit(facts));
    let Some((id, best)) = best else { return Best::None };
    if !holds(Rule::BestCopy) {
        return replicas.first().map_or(Best::None, |(id, _)| Best::Replica(*id));
    }
    if desired.accept_data_loss {
        return Best::Replica(*id);
    }
    let idle = observed.servers.iter().filter_map(|(id, server)| match &server.state {
        ServerState::Held(held) => Some((&held.data, Best::Held)),
        ServerState::Starting(data) if holds(Rule::HeedStarting) => Some((data, Best::Starting(*id))),
        _ => None,
    });
    let idle: Vec<(&DataState, Best)> = idle.collect();
    let Some(lineage) = &best.lineage else {
        // Copies that are all incomplete, or empty. Empty ones do only where nobody may hold more.
        let all_empty =
            replicas.iter().all(|(_, facts)| !facts.holds_data) && idle.iter().all(|(data, _)| **data == DataState::Empty);
        let may_hold = |state: &ServerState| match state {
            ServerState::Silent | ServerState::Stopped { .. } => true,
            ServerState::Starting(data) => *data != DataState::Empty || !holds(Rule::HeedStarting),
            ServerState::Absent => desired.durable,
            ServerState::Held(_) | ServerState::Running(_) => false,
        };
        let unknown = observed.servers.values().any(|server| may_hold(&server.state));
        return if all_empty && !unknown { Best::Replica(*id) } else { Best::Unclear };
    };
    let others = replicas.iter().filter_map(|(_, facts)| facts.lineage.as_ref());
    if others.into_iter().any(|other| other != lineage) {
        return Best::Unclear;
    }
    for (data, whose) in idle {
        match data {
            DataState::Complete(position) if position.lineage != *lineage => return Best::Unclear,
            DataState::Complete(position) if position.offset > best.offset => return whose,
            DataState::Complete(_) | DataState::Partial | DataState::Empty => {}
        }
    }
    Best::Replica(*id)
}

/// Sentinel repairs a server in the wrong place by itself; the planner does it, one at a time, where Sentinel has not.
fn repair_replication(desired: &Desired, observed: &Observed, primary: Acting<'_>) -> Option<Action> {
    let misplaced = |facts: &Facts| match facts.role {
        Role::Primary => true,
        Role::Replica { of, .. } => of != primary.server.address,
    };
    let (server, _, facts) = observed.running().find(|(server, _, facts)| *server != primary.id && misplaced(facts))?;
    if observed.steady < desired.takeover_after || facts.would_lose_to(primary.facts) {
        return Some(Action::Wait(Waiting::Agreement));
    }
    Some(Action::ReplicateFrom { server, primary: primary.server.address })
}

/// Sentinels that watch nothing are told at once; those that watch another primary only when they have not come round by themselves.
fn watch<'a>(desired: &'a Desired, observed: &'a Observed, primary: SocketAddr) -> impl Iterator<Item = Action> + 'a {
    let patience_over = observed.steady >= desired.takeover_after;
    let others = desired.sentinels().count().saturating_sub(1);
    let replicas = observed.running().filter(|(_, _, facts)| is_followed(facts, primary, Link::Up)).count();
    let all_watch = watches(observed).count() == observed.sentinels.len();
    observed.sentinels.iter().filter_map(move |(sentinel, state)| {
        let Sentinel::Running { watch } = state else { return None };
        let sentinel = *sentinel;
        let monitor = Action::Monitor { sentinel, primary, quorum: desired.quorum() };
        let Some(watch) = watch else { return holds(Rule::TellUnaware).then_some(monitor) };
        if watch.primary != primary {
            return Some(if patience_over { monitor } else { Action::Wait(Waiting::Agreement) });
        }
        // A greater number waits until there are as many who could agree.
        let settable = watch.quorum > desired.quorum() || all_watch || !holds(Rule::RaiseQuorumLate);
        if watch.quorum != desired.quorum() && settable && holds(Rule::KeepQuorum) {
            return Some(Action::SetQuorum { sentinel, quorum: desired.quorum() });
        }
        if watch.alarmed {
            return Some(Action::Wait(Waiting::Failover { shard: 0 }));
        }
        let knows_all = usize::from(watch.replicas) >= replicas && usize::from(watch.sentinels) >= others;
        (!knows_all && holds(Rule::AwaitDiscovery)).then_some(Action::Wait(Waiting::Discovery(sentinel)))
    })
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::super::rules::test::switch_off;
    use super::super::{Layout, Starter, plan};
    use super::*;
    use crate::policy::agent::Position;

    const PATIENCE: Duration = Duration::from_secs(20);

    /// The sentinels remember nothing, server 1 follows a primary that is gone, and server 0 ends whenever it is started.
    fn behind_one_that_crashes(offset: u64, accept_data_loss: bool) -> Vec<Action> {
        let at = |index: u16| SocketAddr::from(([10, 96, 0, 0], 6379 + index));
        let server = |index, state| (ServerId { shard: 0, index }, Server { address: at(index), bus_port: 0, state });
        let position = Position { lineage: "aa".to_owned(), offset, led: true, exact: false };
        let replica = Facts {
            role: Role::Replica { of: at(0), link: Link::Down },
            holds_data: true,
            offset: 5,
            lineage: Some("aa".to_owned()),
            promotable: true,
            cluster: None,
        };
        let observed = Observed {
            servers: [server(0, ServerState::Starting(DataState::Complete(position))), server(1, ServerState::Running(replica))]
                .into(),
            sentinels: (0..3).map(|index| (SentinelId(index), Sentinel::Running { watch: None })).collect(),
            steady: PATIENCE,
            ..Observed::default()
        };
        let layout = Layout::Sentinel { sentinels: 3 };
        let desired =
            Desired { starter: Starter::Agent, durable: true, accept_data_loss, ..Desired::on_one_machine(layout, 1, PATIENCE) };
        plan(&desired, &observed)
    }

    #[test]
    fn a_server_that_crashes_again_and_again_and_holds_more_is_waited_for() {
        let (first, second) = (ServerId { shard: 0, index: 0 }, ServerId { shard: 0, index: 1 });
        let waits = Action::Wait(Waiting::BestCopy(first));
        let promotes = Action::Promote { server: second };
        let actions = behind_one_that_crashes(9, false);
        assert!(actions.contains(&waits) && !actions.contains(&promotes), "{actions:?}");
        // What it holds the other has, or a person does without it.
        assert!(behind_one_that_crashes(5, false).contains(&promotes));
        assert!(behind_one_that_crashes(9, true).contains(&promotes));
        switch_off(Some(Rule::HeedStarting));
        let hasty = behind_one_that_crashes(9, false);
        switch_off(None);
        assert!(hasty.contains(&promotes), "{hasty:?}");
    }
}
