//! The decision against a simulated tier: agents that decide on what they saw a moment ago, sentinels that come, go and fail over,
//! processes, pods and agents that fail at random. In a Cluster it is one of three shards, and the primaries of the two others vote.
//!
//! Data is a number of writes. Whatever happens, the last copy of what was acknowledged is destroyed by faults alone, never by a
//! start; no second primary is started; and once the faults end, everybody serves, if need be after a person accepted a loss.

use proptest::prelude::*;
use proptest::test_runner::{Config, RngAlgorithm, TestRng, TestRunner};

use super::*;

const SENTINELS: usize = 3;
/// The voter that is the shard itself, in a Cluster.
const OWN_SEAT: usize = SENTINELS - 1;
const FAILOVER_TICKS: u32 = 4;
const SYNC_TICKS: u32 = 2;
const SETTLE_TICKS: usize = 60;

#[derive(Debug, Clone, Copy)]
enum Event {
    Write,
    /// The server process is killed; its agent lives.
    Kill(usize),
    /// The pod is gone for some ticks; true: with what was not on its disk yet.
    Pod(usize, u32, bool),
    /// The pod ends cleanly, and is gone for some ticks.
    Stop(usize, u32),
    /// A pod's disk is lost with it.
    Disk(usize, u32),
    /// The agent cannot be asked by its peers for some ticks.
    Deaf(usize, u32),
    Sentinel(usize, u32),
    Nothing,
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Place {
    Stopped,
    /// About to start as primary, and telling so.
    Intending,
    Primary,
    /// A node of a Cluster that owns nothing.
    Blank,
    Replica {
        of: usize,
        synced_for: u32,
        promotable: bool,
    },
}

#[derive(Debug, Clone)]
struct Server {
    place: Place,
    data: DataState,
    /// How many writes `data` contains; 0 with [`DataState::Empty`].
    version: u64,
    /// What its table of nodes claims.
    claim: Option<u64>,
    pod_away: u32,
    deaf: u32,
}

#[derive(Debug, Clone)]
struct Sentinel {
    away: u32,
    named: Option<usize>,
    /// In a Cluster, the epoch of the claim of the one that it names.
    claim: u64,
}

struct World {
    rules: Rules,
    voters: Voters,
    durable: bool,
    servers: Vec<Server>,
    sentinels: Vec<Sentinel>,
    primary_gone_for: u32,
    lineages: u32,
    epoch: u64,
    /// The writes that somebody holds and that were acknowledged by the primary of their time.
    truth: u64,
    accept: bool,
    holds: Vec<Option<Hold>>,
    /// What the agents saw last; each decides on this.
    seen: Vec<PeerAnswer>,
}

fn address(index: usize) -> NodeAddr {
    NodeAddr::new("10.0.0.1", 7000 + index as u16)
}

fn index_of(address: &NodeAddr) -> usize {
    usize::from(address.port() - 7000)
}

type Verdict = Result<(), String>;

impl World {
    fn new(rules: Rules, voters: Voters, durable: bool, servers: usize) -> Self {
        let server = Server { place: Place::Stopped, data: DataState::Empty, version: 0, claim: None, pod_away: 0, deaf: 0 };
        Self {
            rules,
            voters,
            durable,
            servers: vec![server; servers],
            sentinels: vec![Sentinel { away: 0, named: None, claim: 0 }; SENTINELS],
            primary_gone_for: 0,
            lineages: 0,
            epoch: 0,
            truth: 0,
            accept: false,
            holds: vec![None; servers],
            seen: vec![PeerAnswer::Unreachable; servers],
        }
    }

    fn held(&self) -> u64 {
        self.servers.iter().map(|server| server.version).max().unwrap_or(0)
    }

    /// What only a fault may do: the truth shrinks to what is left.
    fn after_fault(&mut self) {
        self.truth = self.truth.min(self.held());
    }

    fn new_lineage(&mut self, index: usize) {
        self.lineages += 1;
        let server = &mut self.servers[index];
        if server.version > 0 {
            let lineage = format!("l{}", self.lineages);
            server.data = DataState::Complete(Position { lineage, offset: server.version, led: true, exact: true });
        }
    }

    fn is_cluster(&self) -> bool {
        self.voters == Voters::Primaries
    }

    /// The server owns the shard's slots from now on.
    fn lead(&mut self, index: usize) {
        self.epoch += 1;
        let claim = Some(self.epoch).filter(|_| self.is_cluster());
        let server = &mut self.servers[index];
        (server.place, server.claim) = (Place::Primary, claim);
        self.new_lineage(index);
    }

    fn follow(&mut self, index: usize, of: usize, promotable: bool) {
        let server = &mut self.servers[index];
        (server.place, server.claim) = (Place::Replica { of, synced_for: 0, promotable }, None);
    }

    /// A pod that is not durable takes its table of nodes along.
    fn stop_pod(&mut self, index: usize) {
        self.stop(index);
        if !self.durable {
            self.servers[index].claim = None;
        }
    }

    fn stop(&mut self, index: usize) {
        let server = &mut self.servers[index];
        server.place = Place::Stopped;
        if let DataState::Complete(position) = &mut server.data {
            position.exact = false;
        }
        if !self.durable {
            (server.data, server.version) = (DataState::Empty, 0);
        }
    }

    fn fault(&mut self, event: Event) {
        let servers = self.servers.len();
        match event {
            Event::Write => self.write(),
            Event::Kill(index) => self.stop(index % servers),
            Event::Pod(index, ticks, power) => {
                self.stop_pod(index % servers);
                let server = &mut self.servers[index % servers];
                server.pod_away = ticks;
                if let (true, DataState::Complete(position)) = (power, &mut server.data) {
                    // The record on the disk is honest: it says what is there at least.
                    server.version = server.version.saturating_sub(1).max(1);
                    position.offset = server.version;
                }
            }
            Event::Stop(index, ticks) => {
                let runs = self.servers[index % servers].place != Place::Stopped;
                self.stop_pod(index % servers);
                let server = &mut self.servers[index % servers];
                server.pod_away = ticks;
                if let (true, DataState::Complete(position)) = (runs, &mut server.data) {
                    position.exact = true;
                }
            }
            Event::Disk(index, ticks) => {
                self.stop(index % servers);
                let server = &mut self.servers[index % servers];
                (server.pod_away, server.data, server.version, server.claim) = (ticks, DataState::Empty, 0, None);
            }
            Event::Deaf(index, ticks) => self.servers[index % servers].deaf = ticks,
            Event::Sentinel(index, ticks) => self.sentinels[index % SENTINELS].away = ticks,
            Event::Nothing => {}
        }
        self.after_fault();
    }

    /// The named primary takes a write, and replicas in step take it too.
    fn write(&mut self) {
        let Some(primary) = self.majority().filter(|index| self.servers[*index].place == Place::Primary) else { return };
        self.truth += 1;
        let in_step = |place| matches!(place, Place::Replica { of, synced_for, .. } if of == primary && synced_for >= SYNC_TICKS);
        let version = self.servers[primary].version + 1;
        self.truth = version;
        if version == 1 {
            self.servers[primary].version = 1;
            self.new_lineage(primary);
        }
        let data = self.servers[primary].data.clone();
        for (index, server) in self.servers.iter_mut().enumerate() {
            let leads = index == primary;
            if leads || in_step(server.place) {
                server.version = version;
                server.data = copy_of(&data, version, leads);
            }
        }
    }

    fn majority(&self) -> Option<usize> {
        (0..self.servers.len()).find(|index| self.sentinels.iter().filter(|s| s.named == Some(*index)).count() > SENTINELS / 2)
    }

    fn tick(&mut self) -> Verdict {
        for server in &mut self.servers {
            (server.pod_away, server.deaf) = (server.pod_away.saturating_sub(1), server.deaf.saturating_sub(1));
        }
        for sentinel in &mut self.sentinels {
            sentinel.away = sentinel.away.saturating_sub(1);
        }
        self.fail_over()?;
        self.introduce();
        self.synchronise()?;
        let seen = self.seen.clone();
        self.seen = (0..self.servers.len()).map(|index| self.answer(index)).collect();
        for index in 0..self.servers.len() {
            if self.servers[index].pod_away == 0 {
                self.act(index, &seen)?;
            }
        }
        Ok(())
    }

    fn answer(&self, index: usize) -> PeerAnswer {
        let server = &self.servers[index];
        if server.pod_away > 0 || server.deaf > 0 {
            return PeerAnswer::Unreachable;
        }
        PeerAnswer::State {
            data: server.data.clone(),
            acts_as_primary: matches!(server.place, Place::Primary | Place::Intending),
            claim: server.claim,
        }
    }

    fn votes(&self, sentinel: usize) -> bool {
        self.sentinels[sentinel].away == 0 && !(self.is_cluster() && sentinel == OWN_SEAT)
    }

    /// A majority of sentinels replaces a primary that is gone by the best replica that may be promoted.
    fn fail_over(&mut self) -> Verdict {
        let up: Vec<usize> = (0..SENTINELS).filter(|index| self.votes(*index)).collect();
        self.spread_news(&up);
        let Some(named) = self.owner() else { return Ok(()) };
        self.primary_gone_for = if self.servers[named].place == Place::Primary { 0 } else { self.primary_gone_for + 1 };
        if self.primary_gone_for < FAILOVER_TICKS || up.len() <= SENTINELS / 2 {
            return Ok(());
        }
        let electable = |place| matches!(place, Place::Replica { promotable: true, .. });
        let candidates = (0..self.servers.len()).filter(|index| electable(self.servers[*index].place));
        let Some(chosen) = candidates.max_by_key(|index| self.servers[*index].version) else { return Ok(()) };
        let Server { place, version, .. } = self.servers[chosen];
        let on_the_agents_word = matches!(place, Place::Replica { synced_for, .. } if synced_for < SYNC_TICKS);
        if on_the_agents_word && version < self.held() && !self.accept {
            return Err(format!("server {chosen} was promoted with {version} of {} writes", self.held()));
        }
        // What the election leaves behind, replication had not brought over: no start's fault.
        self.truth = self.truth.min(version);
        self.lead(chosen);
        // In a Cluster one hears of it at once, and the others from the new owner, while it runs.
        let hear = if self.is_cluster() { 1 } else { up.len() };
        up.iter().take(hear).for_each(|index| self.name(*index, chosen, self.epoch));
        self.primary_gone_for = 0;
        Ok(())
    }

    fn name(&mut self, voter: usize, owner: usize, claim: u64) {
        (self.sentinels[voter].named, self.sentinels[voter].claim) = (Some(owner), claim);
    }

    /// Sentinels that return hear from the others. The primaries of a Cluster hear of a claim from its owner alone, one after the other.
    fn spread_news(&mut self, up: &[usize]) {
        if !self.is_cluster() {
            let Some(named) = self.majority() else { return };
            return up.iter().for_each(|index| self.name(*index, named, 0));
        }
        let running = |server: &Server| server.claim.filter(|_| server.place == Place::Primary);
        let claims = self.servers.iter().enumerate().filter_map(|(index, server)| Some((running(server)?, index)));
        let Some((claim, owner)) = claims.max() else { return };
        if let Some(voter) = up.iter().find(|voter| self.sentinels[**voter].claim < claim) {
            self.name(*voter, owner, claim);
        }
    }

    /// Who may be replaced: by the primaries of a Cluster the one with the latest claim, also where not all have heard of it.
    fn owner(&self) -> Option<usize> {
        if !self.is_cluster() {
            return self.majority();
        }
        let named = self.sentinels.iter().filter_map(|voter| Some((voter.claim, voter.named?)));
        named.clone().max().filter(|_| named.count() > SENTINELS / 2).map(|(_, owner)| owner)
    }

    /// What a control plane does for sentinels that know no primary: it names the one that the others name, or that runs.
    fn introduce(&mut self) {
        let up: Vec<usize> = (0..SENTINELS).filter(|index| self.votes(*index)).collect();
        let known = up.iter().find_map(|index| Some((self.sentinels[*index].named?, self.sentinels[*index].claim)));
        // A Cluster's slots are given away once all servers run and nobody knows of an owner; or again, to an owner that forgot them.
        let is_unused = |server: &Server| server.place == Place::Blank;
        if let Some(owner) = self.majority().filter(|owner| is_unused(&self.servers[*owner])) {
            self.lead(owner);
        } else if self.sentinels.iter().all(|sentinel| sentinel.named.is_none()) && self.servers.iter().all(is_unused) {
            self.lead(0);
        }
        let leads = |server: &Server| server.place == Place::Primary;
        let named = known.or_else(|| {
            let index = self.servers.iter().position(leads)?;
            Some((index, self.servers[index].claim.unwrap_or(0)))
        });
        let Some((owner, claim)) = named else { return };
        let unaware: Vec<usize> = up.into_iter().filter(|index| self.sentinels[*index].named.is_none()).collect();
        unaware.into_iter().for_each(|index| self.name(index, owner, claim));
    }

    fn synchronise(&mut self) -> Verdict {
        let named = self.majority();
        for index in 0..self.servers.len() {
            // Sentinels turn replicas and second primaries towards the one that they name.
            if let Some(named) = named.filter(|named| *named != index && self.servers[*named].place == Place::Primary) {
                match &mut self.servers[index].place {
                    Place::Primary => self.follow(index, named, true),
                    Place::Blank => self.follow(index, named, false),
                    Place::Replica { of, synced_for, .. } if *of != named => (*of, *synced_for) = (named, 0),
                    Place::Replica { .. } | Place::Stopped | Place::Intending => {}
                }
            }
            let Place::Replica { of, synced_for, promotable } = self.servers[index].place else { continue };
            let primary = self.servers[of].clone();
            // Whoever listens at the address is followed, also one that owns nothing.
            if primary.place != Place::Primary && primary.place != Place::Blank {
                continue;
            }
            let synced_for = synced_for + 1;
            let promotable = promotable || synced_for >= SYNC_TICKS;
            self.servers[index].place = Place::Replica { of, synced_for, promotable };
            if synced_for == SYNC_TICKS {
                self.servers[index].version = primary.version;
                self.servers[index].data = copy_of(&primary.data, primary.version, false);
                self.last_copy_is_there(&format!("server {index} followed server {of}"))?;
            }
        }
        Ok(())
    }

    fn last_copy_is_there(&self, what: &str) -> Verdict {
        if self.held() >= self.truth || self.accept {
            return Ok(());
        }
        Err(format!("{what}: of {} writes {} are left", self.truth, self.held()))
    }

    fn situation(&self, index: usize, seen: &[PeerAnswer]) -> Situation {
        let answer = |sentinel: usize| match self.sentinels[sentinel].named {
            _ if !self.votes(sentinel) => Vote::Unreachable,
            None => Vote::KnowsNone,
            Some(named) => {
                let claim = Some(self.sentinels[sentinel].claim).filter(|_| self.is_cluster());
                Vote::Names { primary: address(named), claim, failing_over: false }
            }
        };
        let others = (0..self.servers.len()).filter(|other| *other != index);
        let peer = |other: usize| PeerView { ordinal: other as u16, address: address(other), answer: seen[other].clone() };
        Situation {
            ordinal: index as u16,
            address: address(index),
            own: self.servers[index].data.clone(),
            peers: others.map(peer).collect(),
            claim: self.servers[index].claim,
            voters: self.voters,
            votes: (0..SENTINELS).map(answer).collect(),
            accept_data_loss: self.accept,
        }
    }

    fn act(&mut self, index: usize, seen: &[PeerAnswer]) -> Verdict {
        // Who intends to lead asks again after having told so.
        let fresh: Vec<PeerAnswer> = (0..self.servers.len()).map(|other| self.answer(other)).collect();
        let intends = self.servers[index].place == Place::Intending;
        let situation = self.situation(index, if intends { &fresh } else { seen });
        match (self.servers[index].place, decide_under(self.rules, &situation)) {
            (Place::Stopped, Decision::Hold(hold)) => self.holds[index] = Some(hold),
            (Place::Stopped, Decision::Start(Start::Blank)) => self.servers[index].place = Place::Blank,
            (Place::Intending, Decision::Hold(_) | Decision::Start(Start::Replica { .. } | Start::Blank)) => {
                self.servers[index].place = Place::Stopped;
            }
            (Place::Stopped, Decision::Start(Start::Primary)) => self.servers[index].place = Place::Intending,
            (Place::Intending, Decision::Start(Start::Primary)) => {
                let second = (0..self.servers.len()).find(|other| self.servers[*other].place == Place::Primary);
                if let Some(other) = second {
                    return Err(format!("server {index} became a second primary beside {other}"));
                }
                let own = self.servers[index].version;
                if own < self.truth && self.held() > own && !self.accept {
                    return Err(format!("server {index} became primary with {own} of {} writes", self.truth));
                }
                if self.accept {
                    self.truth = self.truth.min(own);
                }
                self.lead(index);
            }
            (Place::Stopped, Decision::Start(Start::Replica { of, promotable })) => {
                self.follow(index, index_of(&of), promotable);
            }
            (Place::Replica { of, synced_for, promotable: false }, _) => {
                let promotable = may_be_promoted(&situation);
                self.servers[index].place = Place::Replica { of, synced_for, promotable };
            }
            (Place::Replica { .. } | Place::Primary | Place::Blank, _) => {}
        }
        Ok(())
    }

    fn serves(&self) -> bool {
        let primaries = self.servers.iter().filter(|server| server.place == Place::Primary).count();
        let follow = |server: &Server| matches!(server.place, Place::Replica { synced_for, .. } if synced_for >= SYNC_TICKS);
        primaries == 1 && self.servers.iter().filter(|server| follow(server)).count() == self.servers.len() - 1
    }

    fn settle(&mut self) -> Verdict {
        for _ in 0..SETTLE_TICKS {
            self.tick()?;
        }
        Ok(())
    }

    /// The faults one after the other, then quiet.
    fn run(&mut self, events: &[Event]) -> Verdict {
        for event in events {
            self.fault(*event);
            self.tick()?;
        }
        self.settle()?;
        if !self.serves() {
            // What remains has to be for a person to settle, and must then be settled.
            let stuck = |hold: &Hold| matches!(hold, Hold::OwnPartial | Hold::Incomparable(_) | Hold::OwnerIsEmpty(_));
            if !self.holds.iter().flatten().any(stuck) && !self.servers.iter().any(|server| server.version > 0) {
                return Err(format!("nobody serves and nobody says why: {:?} {:?}", self.servers, self.holds));
            }
            self.accept = true;
            self.settle()?;
        }
        if self.serves() { Ok(()) } else { Err(format!("nobody serves: {:?} {:?}", self.servers, self.holds)) }
    }
}

fn copy_of(data: &DataState, version: u64, led: bool) -> DataState {
    match data {
        DataState::Complete(position) => {
            DataState::Complete(Position { lineage: position.lineage.clone(), offset: version, led, exact: true })
        }
        other => other.clone(),
    }
}

fn events() -> impl Strategy<Value = Vec<Event>> {
    let event = prop_oneof![
        3 => Just(Event::Write),
        3 => Just(Event::Nothing),
        2 => (0usize..4).prop_map(Event::Kill),
        2 => (0usize..4, 1u32..12, any::<bool>()).prop_map(|(index, ticks, power)| Event::Pod(index, ticks, power)),
        1 => (0usize..4, 1u32..12).prop_map(|(index, ticks)| Event::Stop(index, ticks)),
        1 => (0usize..4, 1u32..12).prop_map(|(index, ticks)| Event::Disk(index, ticks)),
        1 => (0usize..4, 1u32..12).prop_map(|(index, ticks)| Event::Deaf(index, ticks)),
        1 => (0usize..SENTINELS, 1u32..12).prop_map(|(index, ticks)| Event::Sentinel(index, ticks)),
    ];
    proptest::collection::vec(event, 0..60)
}

fn check(rules: Rules, voters: Voters, cases: u32) -> Result<(), String> {
    let config = Config { cases, failure_persistence: None, ..Config::default() };
    let mut runner = TestRunner::new_with_rng(config, TestRng::from_seed(RngAlgorithm::ChaCha, &[7; 32]));
    let form = (any::<bool>(), 2usize..5, events());
    let outcome = runner.run(&form, |(durable, servers, events)| {
        World::new(rules, voters, durable, servers).run(&events).map_err(TestCaseError::fail)
    });
    outcome.map_err(|error| error.to_string())
}

#[test]
fn no_start_loses_data_and_everybody_serves_in_the_end() {
    for voters in [Voters::Sentinels, Voters::Primaries] {
        if let Err(error) = check(Rules::SOUND, voters, 10_000) {
            panic!("{voters:?}: {error}");
        }
    }
}

/// The rules whose absence chance finds quickly; the others are held by cases.
#[test]
fn each_broken_rule_is_caught() {
    let sound = Rules::SOUND;
    let broken = [
        ("ask_peers_when_named", Rules { ask_peers_when_named: false, ..sound }),
        ("silence_may_be_data", Rules { silence_may_be_data: false, ..sound }),
        ("newest_starts", Rules { newest_starts: false, ..sound }),
        ("promote_whole_copies_alone", Rules { promote_whole_copies_alone: false, ..sound }),
    ];
    let of_clusters = [
        ("blank_where_unused", Rules { blank_where_unused: false, ..sound }),
        ("latest_claim_holds", Rules { latest_claim_holds: false, ..sound }),
    ];
    let everywhere = broken.iter().map(|rule| (rule, Voters::Sentinels));
    let in_clusters = broken.iter().chain(&of_clusters).map(|rule| (rule, Voters::Primaries));
    let survives = |((name, rules), voters): (&(&'static str, Rules), Voters)| {
        check(*rules, voters, 4000).is_ok().then(|| format!("{name} with {voters:?}"))
    };
    let survivors: Vec<String> = everywhere.chain(in_clusters).filter_map(survives).collect();
    assert!(survivors.is_empty(), "nobody notices that these are missing: {survivors:?}");
}
