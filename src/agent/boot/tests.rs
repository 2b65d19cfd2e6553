//! The decision, case by case.

use super::*;

fn address(ordinal: u16) -> NodeAddr {
    NodeAddr::new("10.0.0.1", 7000 + ordinal)
}

fn at(offset: u64) -> DataState {
    DataState::Complete(Position { lineage: "a".into(), offset, led: false, exact: true })
}

fn led(offset: u64) -> DataState {
    DataState::Complete(Position { lineage: "a".into(), offset, led: true, exact: true })
}

fn of_lineage(lineage: &str) -> DataState {
    DataState::Complete(Position { lineage: lineage.into(), offset: 5, led: false, exact: true })
}

fn stopped(data: DataState) -> PeerAnswer {
    PeerAnswer::State { data, acts_as_primary: false, claim: None }
}

fn primary(data: DataState) -> PeerAnswer {
    PeerAnswer::State { data, acts_as_primary: true, claim: None }
}

fn names(ordinal: u16) -> Vote {
    Vote::Names { primary: address(ordinal), claim: None, failing_over: false }
}

const SILENT: Vote = Vote::Unreachable;
const NONE: Vote = Vote::KnowsNone;

/// Server 1 of three, beside 0 and 2.
fn situation(own: DataState, sentinels: [Vote; 3], zero: PeerAnswer, two: PeerAnswer) -> Situation {
    let peer = |ordinal, answer| PeerView { ordinal, address: address(ordinal), answer };
    Situation {
        ordinal: 1,
        address: address(1),
        own,
        peers: vec![peer(0, zero), peer(2, two)],
        claim: None,
        voters: Voters::Sentinels,
        votes: sentinels.into(),
        accept_data_loss: false,
    }
}

fn shown(decision: &Decision) -> String {
    match decision {
        Decision::Start(Start::Primary) => "primary".into(),
        Decision::Start(Start::Blank) => "blank".into(),
        Decision::Start(Start::Replica { of, promotable }) => {
            format!("replica of {}{}", of.port() - 7000, if *promotable { ", promotable" } else { "" })
        }
        Decision::Hold(hold) => hold.word().into(),
    }
}

#[track_caller]
fn check(situation: &Situation, expected: &str) {
    assert_eq!(shown(&decide(situation)), expected, "{situation:?}");
}

#[track_caller]
fn check_accepting(situation: &Situation, expected: &str, accepting: &str) {
    check(situation, expected);
    check(&Situation { accept_data_loss: true, ..situation.clone() }, accepting);
}

use DataState::{Empty, Partial};
use PeerAnswer::Unreachable;

#[test]
fn a_majority_that_names_another_is_followed() {
    for own in [Empty, Partial, at(5), led(9)] {
        check(&situation(own, [names(0), names(0), SILENT], Unreachable, Unreachable), "replica of 0");
    }
    check(&situation(Empty, [names(0), names(0), names(1)], primary(at(5)), stopped(Empty)), "replica of 0");
    check(&situation(at(5), [names(0), SILENT, SILENT], Unreachable, stopped(Empty)), "NoMajority");
    check(&situation(at(5), [names(0), names(2), SILENT], stopped(Empty), stopped(Empty)), "NoMajority");
}

#[test]
fn an_owner_that_runs_empty_erases_nobody() {
    let with_data = situation(at(5), [names(0), names(0), names(0)], primary(Empty), stopped(at(3)));
    check_accepting(&with_data, "OwnerIsEmpty", "replica of 0");
    check(&Situation { own: Empty, ..with_data }, "replica of 0");
}

#[test]
fn the_best_copy_may_be_promoted_where_the_owner_holds_nothing() {
    let all = [names(0), names(0), names(0)];
    check(&situation(at(5), all.clone(), stopped(Empty), stopped(at(4))), "replica of 0, promotable");
    check(&situation(at(5), all.clone(), stopped(Empty), stopped(at(5))), "replica of 0, promotable");
    check(&situation(at(5), all.clone(), stopped(Empty), stopped(at(6))), "replica of 0");
    check(&situation(at(5), all.clone(), stopped(at(4)), stopped(at(4))), "replica of 0, promotable");
    check(&situation(at(5), all.clone(), stopped(at(5)), stopped(at(4))), "replica of 0");
    check(&situation(at(5), all.clone(), stopped(led(4)), stopped(at(4))), "replica of 0");
    check(&situation(Partial, all.clone(), stopped(Empty), stopped(Empty)), "replica of 0");
    check_accepting(&situation(at(5), all, Unreachable, stopped(at(4))), "replica of 0", "replica of 0, promotable");
}

#[test]
fn a_reborn_primary_without_data_waits_while_a_peer_holds_some() {
    let mine = [names(1), names(1), names(1)];
    check(&situation(Empty, mine.clone(), stopped(at(5)), stopped(Empty)), "PeerAhead");
    check(&situation(Empty, mine.clone(), stopped(Partial), stopped(Empty)), "PeerAhead");
    check_accepting(&situation(Empty, mine.clone(), Unreachable, stopped(Empty)), "PeersUnknown", "primary");
    check_accepting(&situation(Empty, mine.clone(), Unreachable, stopped(at(5))), "PeerAhead", "PeerAhead");
    check(&situation(Empty, mine, stopped(Empty), stopped(Empty)), "primary");
}

#[test]
fn a_named_primary_with_everything_need_not_ask() {
    let mine = [names(1), names(1), SILENT];
    check(&situation(led(5), mine.clone(), Unreachable, Unreachable), "primary");
    check(&situation(led(5), mine.clone(), stopped(at(9)), stopped(of_lineage("b"))), "primary");
    let torn = DataState::Complete(Position { lineage: "a".into(), offset: 5, led: true, exact: false });
    check_accepting(&situation(torn.clone(), mine.clone(), Unreachable, stopped(at(5))), "PeersUnknown", "primary");
    check(&situation(torn.clone(), mine.clone(), stopped(at(6)), stopped(at(5))), "PeerAhead");
    check(&situation(torn, mine.clone(), stopped(at(5)), stopped(at(4))), "primary");
    check_accepting(&situation(Partial, mine, stopped(Empty), stopped(Empty)), "OwnPartial", "primary");
}

#[test]
fn what_the_sentinels_are_about_to_change_is_waited_for() {
    let changing = Vote::Names { primary: address(1), claim: None, failing_over: true };
    check(&situation(led(5), [changing, names(1), names(1)], stopped(at(5)), stopped(at(5))), "FailoverUnderWay");
    check(&situation(led(5), [names(1), names(1), names(1)], primary(at(5)), stopped(at(5))), "AnotherActs");
}

#[test]
fn where_nobody_is_named_everybody_is_asked_and_one_begins() {
    let nobody = [NONE, NONE, NONE];
    check(&situation(Empty, nobody.clone(), stopped(Empty), stopped(Empty)), "OthersTurn");
    check(&situation(Empty, nobody.clone(), Unreachable, stopped(Empty)), "PeersUnknown");
    check(&situation(Empty, nobody.clone(), primary(Empty), stopped(Empty)), "AnotherActs");
    check(&situation(at(5), nobody.clone(), stopped(Empty), stopped(at(5))), "primary");
    check(&situation(at(5), nobody.clone(), stopped(at(5)), stopped(at(4))), "OthersTurn");
    check(&situation(led(5), nobody.clone(), stopped(at(5)), stopped(Empty)), "primary");
    check_accepting(&situation(at(5), nobody.clone(), stopped(Empty), stopped(of_lineage("b"))), "Incomparable", "primary");
    check_accepting(&situation(at(5), nobody.clone(), stopped(of_lineage("b")), stopped(Empty)), "Incomparable", "OthersTurn");
    // The lowest of all desired servers begins, here 0.
    let zero = Situation { ordinal: 0, address: address(0), ..situation(Empty, nobody, stopped(Empty), stopped(Empty)) };
    let peers =
        zero.peers.iter().zip([1, 2]).map(|(peer, ordinal)| PeerView { ordinal, address: address(ordinal), ..peer.clone() });
    check(&Situation { peers: peers.collect(), ..zero }, "primary");
}

#[test]
fn with_a_minority_of_sentinels_only_the_word_of_all_peers_counts() {
    let few = [names(1), SILENT, SILENT];
    check(&situation(led(5), few.clone(), stopped(at(5)), stopped(at(5))), "primary");
    check_accepting(&situation(led(5), few.clone(), Unreachable, stopped(at(5))), "PeersUnknown", "PeersUnknown");
    check(&situation(Empty, few, stopped(Empty), stopped(at(1))), "PeerAhead");
}

#[test]
fn each_reason_names_its_remedy_or_what_is_waited_for() {
    for hold in [
        Hold::NoMajority,
        Hold::FailoverUnderWay,
        Hold::AnotherActs(address(0)),
        Hold::PeersUnknown(vec![address(0)]),
        Hold::PeerAhead(address(0)),
        Hold::Incomparable(address(0)),
        Hold::OwnPartial,
        Hold::OthersTurn(address(0)),
        Hold::OwnerIsEmpty(address(0)),
    ] {
        for voters in [Voters::Sentinels, Voters::Primaries] {
            let text = hold.explain(voters);
            assert!(text.contains("waiting") || text.contains("recovery.acceptDataLoss"), "{text}");
        }
    }
}

/// Server 1 of three in a shard of a Cluster; `claims` are those of servers 0, 1 and 2.
fn in_cluster(own: DataState, votes: [Vote; 3], claims: [Option<u64>; 3], zero: PeerAnswer, two: PeerAnswer) -> Situation {
    let mut situation = Situation { voters: Voters::Primaries, claim: claims[1], ..situation(own, votes, zero, two) };
    for (peer, its) in situation.peers.iter_mut().zip([claims[0], claims[2]]) {
        if let PeerAnswer::State { claim, .. } = &mut peer.answer {
            *claim = its;
        }
    }
    situation
}

const UNCLAIMED: [Option<u64>; 3] = [None; 3];

#[test]
fn servers_of_a_shard_that_is_unused_start_all_at_once() {
    for votes in [[SILENT, SILENT, SILENT], [NONE, NONE, SILENT]] {
        let beside = |zero, claims| in_cluster(Empty, votes.clone(), claims, zero, stopped(Empty));
        check(&beside(stopped(Empty), UNCLAIMED), "blank");
        check(&beside(stopped(at(5)), UNCLAIMED), "PeerAhead");
        check(&beside(Unreachable, UNCLAIMED), "PeersUnknown");
        check(&beside(primary(Empty), UNCLAIMED), "AnotherActs");
        // Its table outlived its data, and says that it owns the slots.
        check(&beside(stopped(Empty), [Some(3), None, None]), "OthersTurn");
        check(&beside(stopped(Empty), [None, Some(3), None]), "primary");
        let blank = in_cluster(at(5), votes.clone(), UNCLAIMED, stopped(Empty), stopped(Empty));
        check(&blank, "primary");
    }
}

#[test]
fn in_a_cluster_the_other_shards_are_a_majority_without_this_one() {
    let both = |ordinal| [names(ordinal), names(ordinal), SILENT];
    let mine = [None, Some(3), None];
    // A table that outlived its data brings no empty primary back: whoever the others name by now, leads.
    check(&in_cluster(Empty, both(0), mine, Unreachable, Unreachable), "replica of 0");
    check(&in_cluster(Empty, both(1), mine, stopped(at(5)), stopped(at(5))), "PeerAhead");
    check(&in_cluster(Empty, both(1), mine, stopped(Empty), stopped(Empty)), "primary");
    check(&in_cluster(Empty, both(1), UNCLAIMED, stopped(Empty), stopped(Empty)), "primary");
    check(&in_cluster(led(5), both(1), mine, Unreachable, Unreachable), "primary");
    let one = [names(0), SILENT, SILENT];
    check(&in_cluster(led(5), one, mine, stopped(at(5)), stopped(at(5))), "NoMajority");
    // Where no shard answers, the copies decide, and among equals the latest claim.
    let nobody = [SILENT, SILENT, SILENT];
    let equal = |claims| in_cluster(at(5), nobody.clone(), claims, stopped(at(5)), stopped(at(5)));
    check(&equal([None, Some(3), Some(2)]), "primary");
    check(&equal([None, Some(3), Some(4)]), "OthersTurn");
    check(&equal(UNCLAIMED), "OthersTurn");
}

#[test]
fn of_two_owners_that_are_named_the_one_with_the_later_claim_leads() {
    let by = |ordinal, claim| Vote::Names { primary: address(ordinal), claim: Some(claim), failing_over: false };
    let at_odds = |zero, one| [by(0, zero), by(1, one), SILENT];
    let shard = |own, votes| in_cluster(own, votes, [None, Some(7), None], stopped(at(4)), stopped(at(4)));
    check(&shard(led(5), at_odds(3, 7)), "primary");
    check(&shard(at(5), at_odds(8, 7)), "replica of 0, promotable");
    check(&shard(at(3), at_odds(8, 7)), "replica of 0");
    check(&shard(at(3), at_odds(3, 7)), "PeerAhead");
    check(&shard(led(5), at_odds(7, 7)), "NoMajority");
    let most_missed_it = [by(1, 7), by(0, 8), by(1, 7)];
    check(&shard(led(5), most_missed_it), "replica of 0, promotable");
    let mut most_silent = shard(led(5), at_odds(3, 7));
    most_silent.votes.extend([SILENT, SILENT]);
    check(&most_silent, "NoMajority");
    // Sentinels come to agree by themselves.
    check(&situation(led(5), [names(0), names(1), SILENT], stopped(at(4)), stopped(at(4))), "NoMajority");
}

/// By the same rule the end of a handover is known: that most of those who vote have missed the news keeps nobody waiting.
#[test]
fn who_is_named_is_the_owner_by_the_latest_claim_or_by_most() {
    let by = |ordinal, claim| Vote::Names { primary: address(ordinal), claim: Some(claim), failing_over: false };
    assert_eq!(named(&[by(0, 7), by(1, 8), by(0, 7)]), Some(&address(1)));
    assert_eq!(named(&[by(0, 7), by(1, 7), by(0, 7)]), Some(&address(0)));
    assert_eq!(named(&[names(1), names(1), SILENT]), Some(&address(1)));
    assert_eq!((named(&[names(0), names(1), SILENT]), named(&[by(1, 8), SILENT, SILENT])), (None, None));
}

/// What a broken rule would do where chance seldom leads.
#[test]
fn the_rules_that_chance_seldom_needs_are_needed() {
    #[track_caller]
    fn check(rules: Rules, situation: &Situation, sound: &str, broken: &str) {
        assert_eq!(shown(&decide(situation)), sound, "{situation:?}");
        assert_eq!(shown(&decide_under(rules, situation)), broken, "{situation:?}");
    }
    let sound = Rules::SOUND;
    let stale = [names(1), SILENT, SILENT];
    let rules = Rules { majority_of_all: false, ..sound };
    check(rules, &situation(led(5), stale, Unreachable, Unreachable), "PeersUnknown", "primary");
    let mine = [names(1), names(1), names(1)];
    let rules = Rules { one_primary: false, ..sound };
    check(rules, &situation(led(5), mine.clone(), primary(at(5)), stopped(Empty)), "AnotherActs", "primary");
    let rules = Rules { one_begins: false, ..sound };
    check(rules, &situation(Empty, [NONE, NONE, NONE], stopped(Empty), stopped(Empty)), "OthersTurn", "primary");
    let rules = Rules { partial_is_data: false, ..sound };
    check(rules, &situation(Empty, mine, stopped(Partial), stopped(Empty)), "PeerAhead", "primary");
    let rules = Rules { keep_from_empty_owner: false, ..sound };
    let others = [names(0), names(0), names(0)];
    check(rules, &situation(at(5), others, primary(Empty), stopped(Empty)), "OwnerIsEmpty", "replica of 0");
    let rules = Rules { wait_for_failover: false, ..sound };
    let changing = Vote::Names { primary: address(1), claim: None, failing_over: true };
    let changing = [changing, names(1), names(1)];
    check(rules, &situation(led(5), changing, stopped(at(5)), stopped(at(5))), "FailoverUnderWay", "primary");
    let rules = Rules { latest_claim_begins: false, ..sound };
    let claimed = in_cluster(at(5), [SILENT, SILENT, SILENT], [None, Some(3), None], stopped(at(5)), stopped(at(5)));
    check(rules, &claimed, "primary", "OthersTurn");
}
