//! One primary with replicas, watched by sentinels.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;

use super::{Action, Desired, Facts, Observed, Role, Sentinel, Server, ServerId, ServerState, Start, Waiting, Watch};

/// Who is primary.
enum Verdict<'a> {
    /// This server acts as primary, and no sentinel's memory contradicts.
    Acting(ServerId, &'a Server, &'a Facts),
    /// Nobody runs who holds data: this server starts as primary.
    Start(ServerId),
    /// This replica holds the only copy: Sentinel may promote it.
    Allow(ServerId),
    /// No primary runs, and the sentinels cannot make one, as they remember too little or name a replica: this one becomes primary.
    Promote(ServerId),
    /// It is not known yet.
    Open(Waiting),
}

pub(super) fn plan(desired: &Desired, observed: &Observed) -> Vec<Action> {
    let mut actions: Vec<Action> = start_sentinels(observed).collect();
    match verdict(desired, observed) {
        Verdict::Start(server) => actions.push(Action::StartServer { server, start: Start::Primary }),
        Verdict::Allow(server) => {
            actions.push(Action::AllowPromotion { server, of: None });
            actions.push(Action::Wait(Waiting::Failover { shard: 0 }));
        }
        Verdict::Promote(server) => actions.push(Action::Promote { server }),
        Verdict::Open(waiting) => actions.push(Action::Wait(waiting)),
        Verdict::Acting(id, primary, facts) => {
            actions.extend(start_replicas(observed, id, primary));
            actions.extend(repair_replication(desired, observed, (id, primary, facts)));
            actions.extend(super::allow_promotions(observed));
            actions.extend(watch(desired, observed, primary.address));
        }
    }
    actions.extend(super::unfinished(observed));
    actions
}

/// A sentinel's memory is in its own configuration file, so it may start at any time, and first.
fn start_sentinels(observed: &Observed) -> impl Iterator<Item = Action> {
    observed.sentinels.iter().filter_map(|(sentinel, state)| match state {
        Sentinel::Stopped => Some(Action::StartSentinel { sentinel: *sentinel }),
        Sentinel::Silent => Some(Action::Wait(Waiting::Sentinel(*sentinel))),
        Sentinel::Running { .. } => None,
    })
}

fn watches(observed: &Observed) -> impl Iterator<Item = Watch> {
    observed.sentinels.values().filter_map(|sentinel| match sentinel {
        Sentinel::Running { watch } => *watch,
        Sentinel::Stopped | Sentinel::Silent => None,
    })
}

fn verdict<'a>(desired: &Desired, observed: &'a Observed) -> Verdict<'a> {
    let patience_over = observed.steady >= desired.takeover_after;
    let mut votes: BTreeMap<SocketAddr, u16> = BTreeMap::new();
    for watch in watches(observed) {
        *votes.entry(watch.primary).or_default() += 1;
    }
    let favourite = votes.iter().max_by_key(|(_, votes)| **votes).map(|(address, votes)| (*address, *votes));
    let absent = observed.sentinels.iter().find(|(_, sentinel)| !matches!(sentinel, Sentinel::Running { .. }));
    match (favourite, absent) {
        (Some((address, count)), _) if count >= desired.quorum() => believed(desired, observed, address),
        // Those who do not answer may remember better.
        (_, Some((sentinel, _))) if !patience_over => Verdict::Open(Waiting::Sentinel(*sentinel)),
        (Some((address, _)), _) if votes.len() == 1 => believed(desired, observed, address),
        (Some(_), _) => Verdict::Open(Waiting::Agreement),
        (None, _) => unremembered(desired, observed),
    }
}

/// The sentinels believe that the primary is at `address`.
fn believed<'a>(desired: &Desired, observed: &'a Observed, address: SocketAddr) -> Verdict<'a> {
    let patience_over = observed.steady >= desired.takeover_after;
    let Some((id, server)) = observed.at(address) else {
        return if patience_over { unremembered(desired, observed) } else { Verdict::Open(Waiting::Agreement) };
    };
    match &server.state {
        ServerState::Running(facts) if facts.role == Role::Primary => Verdict::Acting(id, server, facts),
        ServerState::Running(_) => match promoted_elsewhere(observed, patience_over) {
            Some(verdict) => verdict,
            None if patience_over => unled(observed),
            None => Verdict::Open(Waiting::Agreement),
        },
        ServerState::Silent | ServerState::Starting(_) | ServerState::Absent | ServerState::Held(_) => {
            Verdict::Open(Waiting::Server(id))
        }
        ServerState::Stopped { data, .. } => vacant(desired, observed, id, *data),
    }
}

/// The primary's process has ended. It may start again as primary only where nobody else can be: not while a replica could be
/// promoted, not while another was, and not while a silent server may hold the data; nor without data where another has some on its disk.
fn vacant<'a>(desired: &Desired, observed: &'a Observed, last: ServerId, data_on_disk: bool) -> Verdict<'a> {
    let patience_over = observed.steady >= desired.takeover_after;
    let votes: BTreeSet<SocketAddr> = watches(observed).map(|watch| watch.primary).collect();
    let has_another_nothing = running_primary(observed).is_some_and(|(_, _, facts)| !facts.holds_data);
    if votes.len() == 1 && data_on_disk && has_another_nothing {
        // That one hung while it was failed over, before it was ever written to.
        return Verdict::Start(last);
    }
    if let Some(verdict) = promoted_elsewhere(observed, patience_over) {
        return verdict;
    }
    if votes.len() > 1 && !patience_over {
        // The few may be the first who know of a failover, to a server that has ended since.
        return Verdict::Open(Waiting::Agreement);
    }
    if let Some((silent, _)) = observed.servers.iter().find(|(_, server)| server.is_silent()) {
        return Verdict::Open(Waiting::Server(*silent));
    }
    let first = if data_on_disk { last } else { on_disk(observed).unwrap_or(last) };
    let electable = || observed.running().filter(|(_, _, facts)| facts.is_electable());
    if !data_on_disk
        && !electable().any(|(_, _, facts)| facts.holds_data)
        && let Some(only_copy) = super::only_copy(observed.running())
    {
        // Who may be promoted had the leave before there was any data, and hung.
        return Verdict::Allow(only_copy);
    }
    let Some((best, ..)) = electable().max_by_key(|(_, _, facts)| facts.merit()) else { return Verdict::Start(first) };
    if !patience_over {
        Verdict::Open(Waiting::Failover { shard: 0 })
    } else if watches(observed).count() < usize::from(desired.quorum()) {
        // Those who watch are too few to fail over, and the others can learn nothing from a primary that is gone.
        Verdict::Promote(best)
    } else if electable().any(|(_, _, facts)| facts.holds_data) {
        Verdict::Open(Waiting::Failover { shard: 0 })
    } else {
        Verdict::Start(first)
    }
}

/// A server that does not run, and has data on its disk.
fn on_disk(observed: &Observed) -> Option<ServerId> {
    let has_data = |server: &Server| matches!(server.state, ServerState::Stopped { data: true, .. });
    observed.servers.iter().find(|(_, server)| has_data(server)).map(|(id, _)| *id)
}

/// The server that the sentinels name follows one that is gone, as where it was started and they were not told of its new place any more.
/// They wait for it to act, and it for its primary: the best copy that there is becomes the primary.
fn unled(observed: &Observed) -> Verdict<'_> {
    if let Some((silent, _)) = observed.servers.iter().find(|(_, server)| server.is_silent()) {
        return Verdict::Open(Waiting::Server(*silent));
    }
    let best = observed.running().max_by_key(|(_, _, facts)| (facts.holds_data, facts.promotable, facts.offset));
    match (best, on_disk(observed)) {
        (Some((best, _, facts)), _) if facts.holds_data && facts.promotable => Verdict::Promote(best),
        (_, Some(server)) => Verdict::Start(server),
        (Some((best, ..)), None) => Verdict::Promote(best),
        (None, None) => Verdict::Open(Waiting::Agreement),
    }
}

/// Another server acts as primary: promoted a moment ago, or an earlier primary that came back and that the sentinels did not
/// take up.
fn promoted_elsewhere(observed: &Observed, patience_over: bool) -> Option<Verdict<'_>> {
    let (id, server, facts) = running_primary(observed)?;
    Some(if patience_over { Verdict::Acting(id, server, facts) } else { Verdict::Open(Waiting::Agreement) })
}

/// Of the servers that act as primary, the one with the most data.
fn running_primary(observed: &Observed) -> Option<(ServerId, &Server, &Facts)> {
    let primaries = observed.running().filter(|(_, _, facts)| facts.role == Role::Primary);
    primaries.max_by_key(|(_, _, facts)| (facts.holds_data, facts.offset))
}

/// No sentinel remembers anything: a first start, or the loss of every sentinel's memory. Every server is asked first.
fn unremembered<'a>(desired: &Desired, observed: &'a Observed) -> Verdict<'a> {
    let patience_over = observed.steady >= desired.takeover_after;
    let silent = observed.servers.iter().find(|(_, server)| server.is_silent());
    if let (Some((silent, _)), false) = (silent, patience_over) {
        return Verdict::Open(Waiting::Server(*silent));
    }
    if let Some((id, server, facts)) = running_primary(observed) {
        return Verdict::Acting(id, server, facts);
    }
    if let Some((best, ..)) = observed.running().max_by_key(|(_, _, facts)| facts.merit()) {
        return if patience_over { Verdict::Promote(best) } else { Verdict::Open(Waiting::Agreement) };
    }
    let stopped = || observed.servers.iter().find(|(_, server)| server.is_stopped()).map(|(id, _)| *id);
    match on_disk(observed).or_else(stopped) {
        Some(server) => Verdict::Start(server),
        None => Verdict::Open(Waiting::Agreement),
    }
}

fn start_replicas<'a>(observed: &'a Observed, id: ServerId, primary: &'a Server) -> impl Iterator<Item = Action> + 'a {
    let stopped = observed.servers.iter().filter(move |(server, state)| **server != id && state.is_stopped());
    stopped.map(|(server, _)| Action::StartServer { server: *server, start: Start::ReplicaOf(primary.address) })
}

/// Sentinel repairs a server in the wrong place by itself; the planner does it, one at a time, where Sentinel has not.
fn repair_replication(desired: &Desired, observed: &Observed, primary: (ServerId, &Server, &Facts)) -> Option<Action> {
    let (id, primary, primary_facts) = primary;
    let misplaced = |facts: &Facts| match facts.role {
        Role::Primary => true,
        Role::Replica { of, .. } => of != primary.address,
    };
    let (server, _, facts) = observed.running().find(|(server, _, facts)| *server != id && misplaced(facts))?;
    if observed.steady < desired.takeover_after || facts.would_lose_to(primary_facts) {
        return Some(Action::Wait(Waiting::Agreement));
    }
    Some(Action::ReplicateFrom { server, primary: primary.address })
}

/// Sentinels that watch nothing are told; those that watch another primary only when they have not come round by themselves.
fn watch<'a>(desired: &'a Desired, observed: &'a Observed, primary: SocketAddr) -> impl Iterator<Item = Action> + 'a {
    let patience_over = observed.steady >= desired.takeover_after;
    let others = desired.sentinels().count() as u16 - 1;
    // A new sentinel asks the primary for its replicas at once and then every ten seconds: let it find them all.
    let replicas_in_step = observed.running().filter(|(_, _, facts)| facts.is_in_step()).count();
    let first = watches(observed).next().is_none();
    let too_early = first && !patience_over && replicas_in_step < usize::from(desired.replicas);
    observed.sentinels.iter().filter_map(move |(sentinel, state)| {
        let Sentinel::Running { watch } = state else { return None };
        let monitor = Action::Monitor { sentinel: *sentinel, primary, quorum: desired.quorum() };
        match watch {
            None if too_early => Some(Action::Wait(Waiting::Discovery(*sentinel))),
            None => Some(monitor),
            Some(watch) if watch.primary != primary && patience_over => Some(monitor),
            Some(watch) if watch.primary != primary => Some(Action::Wait(Waiting::Agreement)),
            Some(watch) if watch.replicas < desired.replicas || watch.sentinels < others => {
                Some(Action::Wait(Waiting::Discovery(*sentinel)))
            }
            Some(_) => None,
        }
    })
}
