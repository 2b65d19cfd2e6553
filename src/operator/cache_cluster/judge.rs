//! What is seen becomes verdicts: whether clients are served, whether something is under way, and what a person has to do. Pure.

mod cluster;

use std::collections::BTreeMap;
use std::net::SocketAddr;

use super::plan::{self, Action, Crowded, Desired, Link, Member, Observed, Role, Sentinel, ServerId, ServerState, Waiting};
use super::report::{Verdict, Verdicts};
use super::validate::Wanted;
use crate::policy::agent::StateReport;

/// Everything that verdicts are made of.
#[derive(Debug)]
pub struct Seen<'a> {
    /// What is wanted.
    pub wanted: &'a Wanted,
    /// What the planner was told to want.
    pub desired: &'a Desired,
    /// What servers, sentinels and pods do.
    pub observed: &'a Observed,
    /// What the planner said.
    pub actions: &'a [Action],
    /// How far slots have moved, in words, where they are not where they are to be.
    pub resharding: Option<String>,
    /// What keeps pods from running.
    pub troubles: &'a [String],
    /// The servers whose settings or users are not proved yet.
    pub lags: &'a [Lag],
    /// What the API server refused, with what to do.
    pub refusal: Option<String>,
    /// What is wrong with the clients' password, with what to do, while an earlier one is in force.
    pub stale_password: Option<String>,
    /// What is wrong with what is remembered of certificates, with what to do, while those that stand are left alone.
    pub spoiled_pki: Option<String>,
    /// Whether it ever served.
    pub initialized: bool,
}

/// A server that was told settings or users, and has not proved them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Lag {
    /// Which.
    pub server: ServerId,
    /// What is not proved.
    pub unproved: Unproved,
    /// What it does not take, as its agent says. Empty: it has not heard of them, or is about to.
    pub problems: Vec<String>,
}

/// What a server has not proved. Users also change by time alone: ten minutes after a change of a password the earlier one is dropped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unproved {
    /// Its settings.
    Settings,
    /// Its users.
    Users,
    /// Either, or it does not tell.
    Both,
}

impl Unproved {
    fn as_str(self) -> &'static str {
        match self {
            Self::Settings => "settings",
            Self::Users => "users",
            Self::Both => "settings and users",
        }
    }
}

/// The servers that have not proved what is wanted of them: settings of these generations, and at least these users.
pub fn lags<'a>(
    generations: impl Iterator<Item = (&'a ServerId, &'a u64)>,
    users: u64,
    reports: &BTreeMap<ServerId, StateReport>,
) -> Vec<Lag> {
    let lag = |(server, generation): (&ServerId, &u64)| {
        let Some(StateReport { generation: acts_under, proved, .. }) = reports.get(server) else {
            return Some(Lag { server: *server, unproved: Unproved::Both, problems: Vec::new() });
        };
        let unproved = match (proved.settings == Some(*generation), proved.users.is_some_and(|proved| proved >= users)) {
            (true, true) => return None,
            (false, true) => Unproved::Settings,
            (true, false) => Unproved::Users,
            (false, false) => Unproved::Both,
        };
        // What it says of an earlier generation may be what this one mends.
        let problems = if acts_under == generation { proved.problems.clone() } else { Vec::new() };
        Some(Lag { server: *server, unproved, problems })
    };
    generations.filter_map(lag).collect()
}

/// A server that acts as primary, as most sentinels say.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Acting {
    /// Which.
    pub server: ServerId,
    /// Its announced address.
    pub address: SocketAddr,
}

impl Seen<'_> {
    /// The server that acts as primary and that most sentinels name.
    pub fn acting(&self) -> Option<Acting> {
        let primaries = self.observed.servers.iter().filter(|(_, server)| is_primary(&server.state));
        // Those that are still to go count.
        let sentinels = self.observed.sentinels.len().max(usize::from(self.wanted.sentinels()));
        let named = |address| self.watching(address) > sentinels / 2;
        let mut named = primaries.filter(|(_, server)| named(server.address));
        named.next().map(|(id, server)| Acting { server: *id, address: server.address })
    }

    /// How many sentinels name this address.
    pub fn watching(&self, address: SocketAddr) -> usize {
        let names =
            |sentinel: &&Sentinel| matches!(sentinel, Sentinel::Running { watch: Some(watch) } if watch.primary == address);
        self.observed.sentinels.values().filter(names).count()
    }

    /// How many replicas of the primary follow it in step.
    pub fn in_step(&self) -> usize {
        if self.wanted.is_cluster() {
            return self.in_step_in_cluster();
        }
        let Some(Acting { address, .. }) = self.acting() else { return 0 };
        let follows = |state: &ServerState| match state {
            ServerState::Running(facts) => facts.role == Role::Replica { of: address, link: Link::Up },
            _ => false,
        };
        self.observed.servers.values().filter(|server| follows(&server.state)).count()
    }

    /// How many pods of servers, and of sentinels, are of the wanted revision.
    pub fn updated(&self) -> (usize, usize) {
        let Some(pods) = &self.desired.pods else { return (0, 0) };
        let current =
            |(member, pod): &(&Member, &plan::Pod)| pod.revision.as_ref() == Some(pods.revision(**member)) && !pod.deleting;
        let is_wanted = |member: &&Member| !matches!(member, Member::Server(server) if server.shard >= self.wanted.shards());
        let current = self.observed.pods.iter().filter(current).map(|(member, _)| member);
        let current: Vec<&Member> = current.filter(is_wanted).collect();
        let servers = current.iter().filter(|member| matches!(member, Member::Server(_))).count();
        (servers, current.len() - servers)
    }

    /// The verdicts.
    pub fn verdicts(&self) -> Verdicts {
        Verdicts {
            accepted: Verdict::yes("Accepted", "the specification can be carried out"),
            ready: self.ready(),
            progressing: self.progressing(),
            degraded: self.degraded(),
        }
    }

    fn ready(&self) -> Verdict {
        if self.wanted.is_cluster() {
            return self.ready_in_cluster();
        }
        let names = &self.wanted.names;
        if let Some(Acting { server, address }) = self.acting() {
            let pod = names.server_pod(server);
            // Until it served for the first time, nobody misses it: then it is ready once it is as it is written. What replicas lack,
            // keeps nobody from being served.
            if let Some(lag) = self.lags.iter().find(|lag| lag.server == server && !self.initialized) {
                return Verdict::no("Forming", self.tell_of(lag));
            }
            return Verdict::yes("Serving", format!("{pod} at {address} is the primary"));
        }
        if !self.initialized {
            return Verdict::no("Forming", self.waits());
        }
        let held = self.held();
        let primary = self.observed.servers.values().find(|server| is_primary(&server.state));
        match (primary, held) {
            (Some(server), _) => {
                let (count, of) = (self.watching(server.address), self.wanted.sentinels());
                let message = format!("only {count} of {of} sentinels name the primary at {}: {}", server.address, self.waits());
                Verdict::no("NoMajority", message)
            }
            (None, Some(held)) => Verdict::no("Held", held),
            (None, None) => Verdict::no("NoPrimary", self.waits()),
        }
    }

    /// A server that is held, and why.
    fn held(&self) -> Option<String> {
        self.observed.servers.iter().find_map(|(id, server)| match &server.state {
            ServerState::Held(held) => Some(format!("{} is held: {}", self.wanted.names.server_pod(*id), held.message)),
            _ => None,
        })
    }

    /// What is waited for, in words.
    fn waits(&self) -> String {
        if let Some(trouble) = self.refusal.as_ref().or(self.troubles.first()) {
            return trouble.clone();
        }
        let waiting = self.actions.iter().find_map(|action| match action {
            Action::Wait(waiting) => Some(waiting),
            _ => None,
        });
        waiting.map_or_else(|| "the operator brings it up".to_owned(), |waiting| format!("waits for {waiting}"))
    }

    fn progressing(&self) -> Verdict {
        if self.wanted.paused {
            return Verdict::no("Paused", "spec.paused is true and nothing is changed or repaired: remove it to go on");
        }
        if let Some(refusal) = &self.refusal {
            return Verdict::no("Blocked", refusal.clone());
        }
        if let Some(trouble) = self.troubles.first() {
            return Verdict::no("Blocked", trouble.clone());
        }
        let reason = self.movement();
        if self.actions.is_empty() && reason != "Rolling" {
            // One that is refused waits for a person, and the others are told of once it is mended.
            let refused = self.lags.iter().find(|lag| !lag.problems.is_empty());
            return match refused.or(self.lags.first()) {
                Some(lag) if lag.problems.is_empty() => Verdict::yes("Configuring", self.tell_of(lag)),
                Some(lag) => Verdict::no("Blocked", self.tell_of(lag)),
                None => Verdict::no("Settled", "everything is as it is written"),
            };
        }
        let message = match reason {
            "Rolling" => {
                let (servers, sentinels) = self.updated();
                let (all_servers, all_sentinels) = (self.wanted.server_count(), self.wanted.sentinels());
                let updated = if all_sentinels == 0 {
                    format!("{servers} of {all_servers} servers are updated")
                } else {
                    format!("{servers} of {all_servers} servers and {sentinels} of {all_sentinels} sentinels are updated")
                };
                format!("{updated}; {}", self.waits())
            }
            "Resharding" => self.tell_of_slots(),
            _ => self.waits(),
        };
        Verdict::yes(reason, message)
    }

    /// What a server has not proved yet, in words.
    fn tell_of(&self, lag: &Lag) -> String {
        let pod = self.wanted.names.server_pod(lag.server);
        if lag.problems.is_empty() {
            let others = self.lags.len().saturating_sub(1);
            let others = if others > 0 { format!(", nor have {others} others") } else { String::new() };
            let unproved = lag.unproved.as_str();
            format!("{pod} has not proved the {unproved} that are written{others}; its files change within two minutes")
        } else {
            format!("{pod} does not take what is written: {}; correct spec.parameters", lag.problems.join("; "))
        }
    }

    /// What kind of work is under way.
    fn movement(&self) -> &'static str {
        let any = |is: fn(&Action) -> bool| self.actions.iter().any(is);
        if !self.initialized {
            "Forming"
        } else if any(Action::is_resharding) {
            "Resharding"
        } else if any(|action| matches!(action, Action::SetReplicas { .. } | Action::Forget { .. } | Action::PruneGhosts { .. }))
            || self
                .observed
                .scale
                .is_some_and(|scale| (scale.servers, scale.sentinels) != (self.wanted.replicas + 1, self.wanted.sentinels()))
            || self.observed.sizes.values().any(|size| *size != self.wanted.replicas + 1)
        {
            "Scaling"
        } else if any(|action| matches!(action, Action::ReplacePod { .. } | Action::Handover { .. })) || self.has_stale_pods() {
            "Rolling"
        } else {
            "Repairing"
        }
    }

    fn has_stale_pods(&self) -> bool {
        let Some(pods) = &self.desired.pods else { return false };
        self.observed.pods.iter().any(|(member, pod)| pod.revision.as_ref() != Some(pods.revision(*member)))
    }

    fn degraded(&self) -> Verdict {
        if let Some(problem) = &self.stale_password {
            return Verdict::yes("PasswordNotChanged", format!("the earlier password stays in force: {problem}"));
        }
        if let Some(problem) = &self.spoiled_pki {
            return Verdict::yes("CertificatesUnreadable", format!("certificates are not renewed: {problem}"));
        }
        let (in_step, replicas) = (self.in_step(), usize::from(self.wanted.replicas) * usize::from(self.wanted.shards()));
        if in_step < replicas {
            let message = format!("{in_step} of {replicas} replicas follow in step; {}", self.waits());
            return Verdict::yes("ReplicasNotInStep", message);
        }
        let answer = |sentinel: &&Sentinel| matches!(sentinel, Sentinel::Running { watch: Some(_) });
        let watching = self.observed.sentinels.values().filter(answer).count();
        if watching < usize::from(self.wanted.sentinels()) {
            let message = format!("{watching} of {} sentinels watch; {}", self.wanted.sentinels(), self.waits());
            return Verdict::yes("SentinelsMissing", message);
        }
        if self.wanted.is_cluster()
            && let Some(verdict) = self.crowded_in_cluster()
        {
            return verdict;
        }
        match plan::crowded(self.observed) {
            Some(crowded) => Verdict::yes("TooFewNodes", self.tell_of_crowded(&crowded)),
            None => Verdict::no("Healthy", "the loss of any one node is survived"),
        }
    }

    /// One node carries too many sentinels, in words.
    fn tell_of_crowded(&self, Crowded { node, sentinels, of }: &Crowded) -> String {
        let set = self.wanted.names.sentinel_set();
        let remedy = if plan::has_room(self.observed) {
            "another has room, and one of them is made anew to move there; where that does not help within minutes, see whether the \
             scheduler finds room for it"
                .to_owned()
        } else {
            format!(
                "add nodes, or let pods of {set} be scheduled on more of them; where another has room that Larder does not see, delete \
                 one of those pods"
            )
        };
        format!("node {node} holds {sentinels} of {of} sentinels, and without it nobody can fail over: {remedy}")
    }

    /// Whether something is to be looked at again soon.
    pub fn is_in_motion(&self) -> bool {
        let waits_for_a_person =
            |action: &Action| matches!(action, Action::Wait(Waiting::Choice | Waiting::BestCopy(_) | Waiting::Node { .. }));
        let moves = self.actions.iter().any(|action| !waits_for_a_person(action));
        let lags = self.lags.iter().any(|lag| lag.problems.is_empty());
        self.refusal.is_none() && !self.wanted.paused && (moves || lags)
    }
}

fn is_primary(state: &ServerState) -> bool {
    matches!(state, ServerState::Running(facts) if facts.role == Role::Primary)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use serde_json::json;

    use super::super::plan::{Facts, Layout, Server, Watch};
    use super::super::validate::{tests::cluster, validate};
    use super::*;
    use crate::policy::agent::{DataState, Proved, ServerPhase};

    /// Server 0 leads, server 1 follows, three sentinels say so, and nothing is to be done.
    fn check_at_rest<T>(initialized: bool, lags: &[Lag], check: impl FnOnce(&Seen<'_>) -> T) -> T {
        let wanted = validate(&cluster(&json!({}))).unwrap();
        let at = |index: u8| SocketAddr::from(([10, 96, 0, index], 6379));
        let server = |index: u8, role| {
            let facts = Facts { role, holds_data: true, offset: 1, lineage: None, promotable: true, cluster: None };
            let server = Server { address: at(index), bus_port: 0, state: ServerState::Running(facts) };
            (ServerId { shard: 0, index: u16::from(index) }, server)
        };
        let replica = Role::Replica { of: at(0), link: Link::Up };
        let watch = Watch { primary: at(0), replicas: 1, sentinels: 2, quorum: 2, alarmed: false };
        let observed = Observed {
            servers: [server(0, Role::Primary), server(1, replica)].into(),
            sentinels: wanted.sentinel_ids().map(|id| (id, Sentinel::Running { watch: Some(watch) })).collect(),
            ..Observed::default()
        };
        let desired = Desired::on_one_machine(Layout::Sentinel { sentinels: 3 }, 1, Duration::ZERO);
        check(&Seen {
            wanted: &wanted,
            desired: &desired,
            observed: &observed,
            actions: &[],
            resharding: None,
            troubles: &[],
            lags,
            refusal: None,
            stale_password: None,
            spoiled_pki: None,
            initialized,
        })
    }

    fn second_lags(problems: &[&str]) -> [Lag; 1] {
        let server = ServerId { shard: 0, index: 1 };
        let problems = problems.iter().map(|problem| (*problem).to_owned()).collect();
        [Lag { server, unproved: Unproved::Users, problems }]
    }

    #[test]
    fn slots_on_their_way_are_told_with_what_is_waited_for() {
        check_at_rest(true, &[], |seen| {
            let told = |actions: &[Action], account: Option<&str>| {
                let resharding = account.map(str::to_owned);
                let moving = Seen { actions, resharding, refusal: None, stale_password: None, spoiled_pki: None, ..*seen };
                (moving.progressing(), moving.verdicts().summary())
            };
            let waiting = [Action::Wait(Waiting::Slots)];
            let (verdict, summary) = told(&waiting, Some("3 of 9 slots have moved"));
            let message = "3 of 9 slots have moved; waits for the servers to finish a move of slots";
            assert_eq!((verdict.reason, verdict.message.as_str(), summary), ("Resharding", message, "Resharding"));
            assert_eq!(told(&waiting, None).0.message, "waits for the servers to finish a move of slots");
        });
    }

    #[test]
    fn settings_that_are_not_proved_are_under_way() {
        check_at_rest(true, &[], |seen| {
            assert_eq!((seen.ready().reason, seen.progressing().reason, seen.is_in_motion()), ("Serving", "Settled", false));
        });
        check_at_rest(true, &second_lags(&[]), |seen| {
            let progressing = seen.progressing();
            assert!(progressing.holds && progressing.reason == "Configuring", "{progressing:?}");
            assert!(progressing.message.starts_with("shop-0-1 has not proved the users that are written;"), "{progressing:?}");
            assert!(seen.ready().holds && seen.is_in_motion() && seen.verdicts().summary() == "Configuring");
        });
        check_at_rest(false, &second_lags(&[]), |seen| assert!(seen.ready().holds));
        let [mut first] = second_lags(&[]);
        first.server.index = 0;
        check_at_rest(false, &[first], |seen| {
            let ready = seen.ready();
            assert!(!ready.holds && ready.reason == "Forming" && ready.message.contains("shop-0-0"), "{ready:?}");
        });
    }

    #[test]
    fn settings_that_a_server_does_not_take_wait_for_a_person() {
        check_at_rest(true, &second_lags(&["hz: the server has no such setting"]), |seen| {
            let progressing = seen.progressing();
            assert!(!progressing.holds && progressing.reason == "Blocked", "{progressing:?}");
            assert!(progressing.message.starts_with("shop-0-1 does not take what is written: hz: "), "{progressing:?}");
            assert!(!seen.is_in_motion());
        });
    }

    #[test]
    fn who_lags_is_told_by_the_generations_that_come_back() {
        let ids = [0, 1].map(|index| ServerId { shard: 0, index });
        let wanted = BTreeMap::from(ids.map(|id| (id, 7)));
        let report = |generation, settings, users| StateReport {
            version: 1,
            ordinal: 0,
            address: None,
            generation,
            data: DataState::Empty,
            claim: None,
            server: ServerPhase::Primary,
            proved: Proved { settings, users, problems: vec!["why".to_owned()], ..Proved::default() },
        };
        let lags = |second: Option<StateReport>| {
            let mut reports = BTreeMap::from([(ids[0], report(7, Some(7), Some(3)))]);
            reports.extend(second.map(|report| (ids[1], report)));
            let lags = lags(wanted.iter(), 3, &reports).into_iter();
            lags.map(|lag| (lag.server, lag.unproved, lag.problems.len())).collect::<Vec<_>>()
        };
        assert_eq!(lags(Some(report(7, Some(7), Some(4)))), []);
        assert_eq!(lags(None), [(ids[1], Unproved::Both, 0)]);
        let earlier = report(6, Some(6), Some(3));
        assert_eq!(lags(Some(earlier)), [(ids[1], Unproved::Settings, 0)], "what it says is of an earlier generation");
        assert_eq!(lags(Some(report(7, None, Some(3)))), [(ids[1], Unproved::Settings, 1)]);
        assert_eq!(lags(Some(report(7, Some(7), Some(2)))), [(ids[1], Unproved::Users, 1)]);
        assert_eq!(lags(Some(report(7, None, None))), [(ids[1], Unproved::Both, 1)]);
    }

    #[test]
    fn who_is_crowded_is_told_what_happens_next() {
        let carried = |open: &[&str]| {
            check_at_rest(true, &[], |seen| {
                let node = plan::Node { name: "a".to_owned(), ready: true };
                let pod = plan::Pod {
                    uid: String::new(),
                    revision: None,
                    node: Some(node),
                    started: true,
                    ready: true,
                    deleting: false,
                };
                let sentinels = seen.wanted.sentinel_ids().take(2).map(|id| (Member::Sentinel(id), pod.clone()));
                let open_nodes = open.iter().map(|node| (*node).to_owned()).collect();
                let observed = Observed { pods: sentinels.collect(), open_nodes, ..seen.observed.clone() };
                let degraded = Seen {
                    observed: &observed,
                    refusal: None,
                    stale_password: None,
                    spoiled_pki: None,
                    resharding: None,
                    ..*seen
                }
                .degraded();
                assert!(degraded.holds && degraded.reason == "TooFewNodes", "{degraded:?}");
                degraded.message
            })
        };
        let full = carried(&["a"]);
        assert!(full.contains("node a holds 2 of 3 sentinels") && full.contains("add nodes") && full.contains("shop-sentinel"));
        let room = carried(&["a", "b"]);
        assert!(room.contains("one of them is made anew") && !room.contains("add nodes"), "{room}");
    }
}
