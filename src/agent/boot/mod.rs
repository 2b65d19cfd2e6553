//! In which place a server starts, or why it does not. Pure: no client, no clock.
//!
//! The invariant: a server that lost its data never becomes, or stays, primary while a peer holds the data. So nothing is started
//! on a guess. A majority of those who vote that names another server, or data of its own that nobody exceeds, or the word of every
//! peer that nobody holds anything: one of these starts a server, and everything else holds it, its port closed, until that has
//! changed or a person accepts the loss.
//!
//! Who votes are the sentinels or, in a Cluster, the primaries of all shards. There the server's own shard is one of the voters, and the
//! others must be a majority without it. A Cluster's server also remembers in its table of nodes which slots it claims; among copies
//! that are as good, the one with the latest claim begins. While a shard of a Cluster owns no slots, each of its servers may start: nobody
//! follows it, and it serves nothing.
//!
//! No vote promotes a server whose `replica-priority` is 0, or that has `cluster-replica-no-failover`. A restarted server has it until it
//! has synchronised once, so that no election can find an empty one; [`Start::Replica`] says when the copy that it brought along is as
//! good.

mod copies;
#[cfg(test)]
mod simulation;
#[cfg(test)]
mod tests;

use std::cmp::Reverse;
use std::fmt;

use copies::{Order, Rank, order};

use crate::policy::agent::{DataState, Position};
use crate::sidecar::upstream::node::NodeAddr;

/// Everything that the decision depends on.
#[derive(Debug, Clone, PartialEq)]
pub struct Situation {
    /// This server's place.
    pub ordinal: u16,
    /// The address that is announced for it.
    pub address: NodeAddr,
    /// What it would start with.
    pub own: DataState,
    /// The epoch with which it would claim slots of a Cluster; `None` where it claims none, and under Sentinel.
    pub claim: Option<u64>,
    /// Every other desired server that could hold the same data.
    pub peers: Vec<PeerView>,
    /// Who votes.
    pub voters: Voters,
    /// What each of them answered; as many as there are, this server's own shard among them.
    pub votes: Vec<Vote>,
    /// Whether a person accepts to lose what only servers hold that cannot be asked.
    pub accept_data_loss: bool,
}

/// Who says which server is the primary.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Voters {
    /// Sentinels.
    Sentinels,
    /// The primaries of a Cluster's shards.
    Primaries,
}

impl fmt::Display for Voters {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Sentinels => "the sentinels",
            Self::Primaries => "the shards' primaries",
        })
    }
}

/// A peer as its agent describes it.
#[derive(Debug, Clone, PartialEq)]
pub struct PeerView {
    /// Its place.
    pub ordinal: u16,
    /// The address that is announced for it.
    pub address: NodeAddr,
    /// What its agent answered.
    pub answer: PeerAnswer,
}

/// What a peer's agent answered.
#[derive(Debug, Clone, PartialEq)]
pub enum PeerAnswer {
    /// Nothing.
    Unreachable,
    /// Its server's data and role.
    State {
        /// What the server holds, or would start with.
        data: DataState,
        /// Whether it serves as primary now; in a Cluster, whether it owns slots.
        acts_as_primary: bool,
        /// The epoch with which it claims slots of a Cluster.
        claim: Option<u64>,
    },
}

/// What one that votes answered.
#[derive(Debug, Clone, PartialEq)]
pub enum Vote {
    /// Nothing.
    Unreachable,
    /// That it knows no primary: a sentinel that watches nothing, or a shard that owns no slots.
    KnowsNone,
    /// Which server it takes for the primary.
    Names {
        /// Its announced address.
        primary: NodeAddr,
        /// The epoch of the claim by which it owns the slots. `None`: of a sentinel; those agree among themselves.
        claim: Option<u64>,
        /// Whether it is replacing it at this moment.
        failing_over: bool,
    },
}

/// What follows.
#[derive(Debug, Clone, PartialEq)]
pub enum Decision {
    /// Start.
    Start(Start),
    /// Keep the port closed.
    Hold(Hold),
}

/// In which place a server starts.
#[derive(Debug, Clone, PartialEq)]
pub enum Start {
    /// As primary.
    Primary,
    /// As a node of a Cluster that owns nothing, until it is told.
    Blank,
    /// As the replica of another.
    Replica {
        /// Whose.
        of: NodeAddr,
        /// Whether it may be promoted before it has synchronised: its own copy is the best there is.
        promotable: bool,
    },
}

/// Why a server is not started.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Hold {
    /// No majority of those who vote answers, or they do not agree, and peers alone cannot settle it.
    NoMajority,
    /// The sentinels are replacing this server.
    FailoverUnderWay,
    /// A peer acts as primary, and no majority names it yet.
    AnotherActs(NodeAddr),
    /// Peers that cannot be asked may hold data.
    PeersUnknown(Vec<NodeAddr>),
    /// A peer holds data that this server lacks.
    PeerAhead(NodeAddr),
    /// A peer's copy and this one's have no common history.
    Incomparable(NodeAddr),
    /// Nobody holds more, but this server's copy may lack a part.
    OwnPartial,
    /// Another begins: nobody holds data, or its copy is as good and its claim later or its ordinal lower.
    OthersTurn(NodeAddr),
    /// The majority names a primary that runs empty, and following it would erase this server's data.
    OwnerIsEmpty(NodeAddr),
}

impl Hold {
    /// The reason in one word, for programs.
    pub fn word(&self) -> &'static str {
        match self {
            Self::NoMajority => "NoMajority",
            Self::FailoverUnderWay => "FailoverUnderWay",
            Self::AnotherActs(_) => "AnotherActs",
            Self::PeersUnknown(_) => "PeersUnknown",
            Self::PeerAhead(_) => "PeerAhead",
            Self::Incomparable(_) => "Incomparable",
            Self::OwnPartial => "OwnPartial",
            Self::OthersTurn(_) => "OthersTurn",
            Self::OwnerIsEmpty(_) => "OwnerIsEmpty",
        }
    }
}

impl Hold {
    /// The reason in a sentence, with what ends it.
    pub fn explain(&self, voters: Voters) -> String {
        match self {
            Self::NoMajority => format!("no majority of {voters} answers and agrees; waiting for them"),
            Self::FailoverUnderWay => format!("{voters} are replacing this server; waiting for the new primary"),
            Self::AnotherActs(peer) => format!("{peer} acts as primary; waiting for {voters} to name it"),
            Self::PeersUnknown(peers) => {
                let names: Vec<String> = peers.iter().map(ToString::to_string).collect();
                let names = names.join(", ");
                format!("the agents of {names} do not answer and may hold data; bring them back, or set recovery.acceptDataLoss")
            }
            Self::PeerAhead(peer) => format!("{peer} holds data that this server lacks; waiting for it to be named primary"),
            Self::Incomparable(peer) => format!(
                "the copies here and at {peer} have no common history; let {voters} name one, or set recovery.acceptDataLoss"
            ),
            Self::OwnPartial => {
                "the copy here may lack a part and nobody holds a whole one; recovery.acceptDataLoss starts with it".to_owned()
            }
            Self::OthersTurn(peer) => format!("{peer} begins; waiting for {voters} to name it"),
            Self::OwnerIsEmpty(owner) => format!(
                "{voters} name {owner}, which runs empty while this server holds data; repair it, or set recovery.acceptDataLoss"
            ),
        }
    }
}

/// The rules, each of which a test can switch off to see that it is needed.
#[derive(Debug, Clone, Copy)]
struct Rules {
    /// A majority is one of all who vote, not of those that answer.
    majority_of_all: bool,
    /// The majority's word for this server is not enough without data.
    ask_peers_when_named: bool,
    /// A peer that does not answer may hold data.
    silence_may_be_data: bool,
    /// Data that is not known to be whole counts as data, not as nothing.
    partial_is_data: bool,
    /// A peer that acts as primary is not joined by a second one.
    one_primary: bool,
    /// Among equals one begins.
    one_begins: bool,
    /// A copy that a peer exceeds does not start.
    newest_starts: bool,
    /// An owner that runs empty is not followed by a server with data.
    keep_from_empty_owner: bool,
    /// A server without a whole copy is not promotable before it has synchronised.
    promote_whole_copies_alone: bool,
    /// A sentinel that replaces this server is waited for.
    wait_for_failover: bool,
    /// Among equals the latest claim begins.
    latest_claim_begins: bool,
    /// A node that owns nothing starts only where no peer claims or may hold anything.
    blank_where_unused: bool,
    /// Where voters name different owners of a shard's slots, the latest claim holds.
    latest_claim_holds: bool,
}

impl Rules {
    const SOUND: Self = Self {
        majority_of_all: true,
        ask_peers_when_named: true,
        silence_may_be_data: true,
        partial_is_data: true,
        one_primary: true,
        one_begins: true,
        newest_starts: true,
        keep_from_empty_owner: true,
        promote_whole_copies_alone: true,
        wait_for_failover: true,
        latest_claim_begins: true,
        blank_where_unused: true,
        latest_claim_holds: true,
    };
}

/// Where the server starts, or why it does not.
pub fn decide(situation: &Situation) -> Decision {
    decide_under(Rules::SOUND, situation)
}

/// Whether a running replica that has not synchronised since it started may be promoted: nobody holds more than it brought along.
pub fn may_be_promoted(situation: &Situation) -> bool {
    let owner = named(&situation.votes).filter(|owner| **owner != situation.address);
    owner.is_some_and(|owner| is_best_copy(Rules::SOUND, situation, owner))
}

/// The server that those who vote name as one: most of all, or where they tell of claims the owner by the latest that any of most of them has
/// heard of.
pub fn named(votes: &[Vote]) -> Option<&NodeAddr> {
    match consensus(Rules::SOUND, votes) {
        Consensus::Names(owner) => Some(owner),
        Consensus::Minority(_) | Consensus::Split => None,
    }
}

/// What those who vote say as one.
#[derive(Debug, PartialEq)]
enum Consensus<'a> {
    /// A majority names this server.
    Names(&'a NodeAddr),
    /// Those that answer name at most this server; they are no majority.
    Minority(Option<&'a NodeAddr>),
    /// Those that answer contradict each other.
    Split,
}

fn consensus(rules: Rules, answers: &[Vote]) -> Consensus<'_> {
    let named = || {
        answers.iter().filter_map(|answer| match answer {
            Vote::Names { primary, .. } => Some(primary),
            Vote::Unreachable | Vote::KnowsNone => None,
        })
    };
    if let Some(owner) = latest_claim(answers).filter(|_| rules.latest_claim_holds) {
        return Consensus::Names(owner);
    }
    let count = if rules.majority_of_all { answers.len() } else { named().count() };
    if let Some(owner) = named().find(|owner| named().filter(|other| other == owner).count() > count / 2) {
        return Consensus::Names(owner);
    }
    let first = named().next();
    if named().all(|other| Some(other) == first) { Consensus::Minority(first) } else { Consensus::Split }
}

/// The owner by the latest claim that any voter has heard of, where a majority names an owner.
///
/// Primaries of a Cluster hear of a claim from the owner alone. Where that has ended before all of them did, they never come to agree while its
/// shard waits for them. Whoever names another, be it most of them, has missed the later claim: by the rules of Redis Cluster it holds once he hears of it.
fn latest_claim(answers: &[Vote]) -> Option<&NodeAddr> {
    let claims = answers.iter().filter_map(|answer| match answer {
        Vote::Names { primary, claim: Some(claim), .. } => Some((*claim, primary)),
        _ => None,
    });
    let (latest, owner) = claims.clone().max_by_key(|(claim, _)| *claim)?;
    let is_majority = claims.clone().count() > answers.len() / 2;
    let is_its_own = claims.clone().all(|(claim, other)| claim < latest || other == owner);
    (is_majority && is_its_own).then_some(owner)
}

fn decide_under(rules: Rules, situation: &Situation) -> Decision {
    let me = &situation.address;
    match consensus(rules, &situation.votes) {
        Consensus::Names(owner) if owner != me => follow(rules, situation, owner),
        Consensus::Names(_) => lead(rules, situation, Standing::Named),
        Consensus::Minority(owner) if owner.is_none_or(|owner| owner == me) => lead(rules, situation, Standing::Unnamed),
        Consensus::Minority(_) | Consensus::Split => Decision::Hold(Hold::NoMajority),
    }
}

/// The majority names another.
fn follow(rules: Rules, situation: &Situation, owner: &NodeAddr) -> Decision {
    let runs_empty = situation.peers.iter().any(|peer| {
        peer.address == *owner && matches!(peer.answer, PeerAnswer::State { data: DataState::Empty, acts_as_primary: true, .. })
    });
    let holds_data = situation.own != DataState::Empty;
    if rules.keep_from_empty_owner && runs_empty && holds_data && !situation.accept_data_loss {
        return Decision::Hold(Hold::OwnerIsEmpty(owner.clone()));
    }
    let promotable = is_best_copy(rules, situation, owner);
    Decision::Start(Start::Replica { of: owner.clone(), promotable })
}

/// Whether this server's copy is whole, the owner waits because its own is not as good, and nobody else's is better. What cannot be
/// asked could be better, unless its loss is accepted.
fn is_best_copy(rules: Rules, situation: &Situation, owner: &NodeAddr) -> bool {
    if !rules.promote_whole_copies_alone {
        return true;
    }
    let Some(own) = Rank::of(&situation.own).filter(Rank::is_complete) else { return false };
    situation.peers.iter().all(|peer| match &peer.answer {
        PeerAnswer::Unreachable => situation.accept_data_loss,
        PeerAnswer::State { acts_as_primary: true, .. } => false,
        PeerAnswer::State { data, .. } => match order(&own, Rank::of(data).as_ref()) {
            Order::Ahead => true,
            // An owner whose copy is as good starts again by itself.
            Order::Equal => situation.ordinal < peer.ordinal && peer.address != *owner,
            Order::Behind => false,
            Order::Unknown => situation.accept_data_loss,
        },
    })
}

/// Whether the majority names this server.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Standing {
    Named,
    Unnamed,
}

/// Nobody else is named: the server leads, if its data allows.
fn lead(rules: Rules, situation: &Situation, standing: Standing) -> Decision {
    let failing_over = situation.votes.iter().any(|answer| matches!(answer, Vote::Names { failing_over: true, .. }));
    if rules.wait_for_failover && failing_over {
        return Decision::Hold(Hold::FailoverUnderWay);
    }
    let acting = situation.peers.iter().find(|peer| matches!(peer.answer, PeerAnswer::State { acts_as_primary: true, .. }));
    if let Some(peer) = acting.filter(|_| rules.one_primary) {
        return Decision::Hold(Hold::AnotherActs(peer.address.clone()));
    }
    if standing == Standing::Unnamed && situation.voters == Voters::Primaries && is_unused(rules, situation) {
        return Decision::Start(Start::Blank);
    }
    if standing == Standing::Named && (leads_for_certain(&situation.own) || !rules.ask_peers_when_named) {
        return Decision::Start(Start::Primary);
    }
    match hindrance(rules, situation, standing) {
        Some(hold) => Decision::Hold(hold),
        None => Decision::Start(Start::Primary),
    }
}

/// Whether nobody of the shard holds or claims anything. Each of its servers then harms nobody: it serves nothing before it is given slots.
fn is_unused(rules: Rules, situation: &Situation) -> bool {
    let is_nothing = |data: &DataState, claim: Option<u64>| *data == DataState::Empty && claim.is_none();
    let is_unused = |peer: &PeerView| match &peer.answer {
        PeerAnswer::State { data, claim, .. } => is_nothing(data, *claim),
        PeerAnswer::Unreachable => false,
    };
    is_nothing(&situation.own, situation.claim) && (situation.peers.iter().all(is_unused) || !rules.blank_where_unused)
}

/// What a person accepts is the loss of copies that cannot be asked; never a second primary, which only a majority can exclude.
fn loss_is_accepted(situation: &Situation) -> bool {
    let answering = situation.votes.iter().filter(|answer| **answer != Vote::Unreachable).count();
    situation.accept_data_loss && answering > situation.votes.len() / 2
}

/// The named primary, with all that it ever acknowledged: no replica can hold more, so none need be asked.
fn leads_for_certain(own: &DataState) -> bool {
    matches!(own, DataState::Complete(Position { led: true, exact: true, .. }))
}

/// What keeps this server from leading, as far as everybody's data goes.
fn hindrance(rules: Rules, situation: &Situation, standing: Standing) -> Option<Hold> {
    let own = Rank::of(&situation.own);
    let mut unknown = Vec::new();
    let mut incomparable = None;
    let mut turn = None;
    for peer in &situation.peers {
        let PeerAnswer::State { data, claim, .. } = &peer.answer else {
            unknown.push(peer.address.clone());
            continue;
        };
        let theirs = Rank::of(data).filter(|rank| rules.partial_is_data || rank.is_complete());
        let order = own.as_ref().map_or_else(|| copies::against_nothing(theirs.as_ref()), |own| order(own, theirs.as_ref()));
        let turn_of = |claim: Option<u64>, ordinal| (Reverse(claim.filter(|_| rules.latest_claim_begins)), ordinal);
        let is_before = turn_of(*claim, peer.ordinal) < turn_of(situation.claim, situation.ordinal);
        let earlier = rules.one_begins && is_before && standing == Standing::Unnamed;
        match order {
            Order::Ahead => {}
            Order::Behind if rules.newest_starts => return Some(Hold::PeerAhead(peer.address.clone())),
            Order::Behind => {}
            Order::Equal if earlier => turn = turn.or_else(|| Some(Hold::OthersTurn(peer.address.clone()))),
            Order::Equal => {}
            Order::Unknown if loss_is_accepted(situation) && earlier => return Some(Hold::OthersTurn(peer.address.clone())),
            Order::Unknown => incomparable = incomparable.or_else(|| Some(Hold::Incomparable(peer.address.clone()))),
        }
    }
    let unknown = (!unknown.is_empty() && rules.silence_may_be_data).then_some(Hold::PeersUnknown(unknown));
    let partial = own.is_some_and(|own| !own.is_complete()).then_some(Hold::OwnPartial);
    if loss_is_accepted(situation) { turn } else { unknown.or(incomparable).or(partial).or(turn) }
}
