//! What is asked of every history, over many thousands of them; and that each broken mechanism is found.

use super::super::{AtWaitEnd, Rule};
use super::Switch;
use super::world::{self, Config, Counts};

/// The usual proportions, in a tenth of the time. Shared connections are promised loads up to a lease.
const RULE: Rule = Rule { wait_follows: true, ..Rule::new(1, 300, 100) };

/// Everything at once.
const WILD: Config = Config {
    pods: 3,
    keys: 2,
    actors: 6,
    operations: 8,
    rule: RULE,
    sharing: true,
    calm: false,
    writes: 200,
    ttl: 600,
    unfilled: 8,
    faults: true,
    failover_in: 4,
    breaks: 3,
    early: true,
    early_in: 8,
    condition_in: 6,
    late: false,
    groups: true,
    signs: true,
    lanes: true,
    crossed: false,
    broken: None,
    shown: false,
};

/// Loads are quick and always end in a SET, unless the client goes away. So nobody may wait in vain.
const CALM: Config = Config {
    pods: 5,
    actors: 12,
    rule: Rule { wait_follows: true, ..Rule::new(1, 3_000, 1_000) },
    calm: true,
    writes: 0,
    unfilled: 0,
    faults: false,
    early: false,
    lanes: false,
    ..WILD
};

/// Values that live for a moment only. In a pool a fill may be taken for another load's, which leaves its lease standing.
const BRIEF: Config = Config { ttl: 30, sharing: false, ..CALM };

/// Nobody is woken: who waits looks by itself.
const MUTE: Config = Config { signs: false, rule: Rule::new(1, 6_000, 2_000), sharing: false, ..CALM };

/// Reads before the expiry ask for the lease.
const EARLY: Config = Config { early: true, ..MUTE };

/// Connections to the cache break all the time, and what is safe to repeat is repeated.
const BROKEN: Config = Config { breaks: 100, keys: 1, operations: 30, writes: 100, ..WILD };

/// One key that is written all the time, and read by many at once.
const LIVELY: Config = Config { keys: 1, pods: 2, actors: 12, operations: 40, writes: 100, unfilled: 0, ..WILD };

/// That key, refreshed early and often, and filled where it is not there.
const EAGER: Config = Config { early_in: 2, condition_in: 2, ..LIVELY };

/// That key for longer, written now and then, and nothing comes of many loads.
const FRUITLESS: Config = Config { operations: 100, writes: 30, unfilled: 20, ..LIVELY };

/// Clients load, and nothing comes of it.
const UNFILLED: Config = Config { unfilled: 80, rule: RULE, groups: false, ..CALM };

/// A replica takes over, which has not heard the last.
const FAILOVERS: Config = Config { failover_in: 1, sharing: false, keys: 1, ..WILD };

/// Pools lend connections again whose loads outlast their leases, and keys are deleted meanwhile.
const LENT: Config = Config { pods: 2, keys: 1, operations: 30, unfilled: 1, faults: false, groups: false, late: true, ..WILD };

/// Loads over pools end crosswise, over connections of which now the one is slow, now the other.
const CROSSED: Config = Config { pods: 1, actors: 5, operations: 60, writes: 300, faults: false, crossed: true, ..LIVELY };

/// And their connections are lent again while they outlast their leases.
const POOLS: Config = Config { late: true, ..CROSSED };

/// Reads of several keys that overlap.
const GROUPS: Config = Config { keys: 4, sharing: false, groups: true, ..CALM };

/// The configuration of one history.
fn drawn(base: Config, seed: u64) -> Config {
    let mut random = fastrand::Rng::with_seed(seed ^ 0x5eed);
    let at_wait_end = if random.bool() { AtWaitEnd::Error } else { AtWaitEnd::Miss };
    Config {
        pods: random.u64(1..=base.pods),
        keys: random.usize(1..=base.keys),
        actors: random.usize(2..=base.actors),
        rule: Rule { stale: random.bool(), at_wait_end, ..base.rule },
        sharing: base.crossed || base.sharing && random.bool(),
        unfilled: if random.u8(..4) == 0 { base.unfilled } else { base.unfilled / 8 },
        faults: base.faults && random.bool(),
        early: base.early && random.bool(),
        lanes: base.crossed || base.lanes && random.bool(),
        groups: base.groups && (base.keys > 2 || random.bool()),
        ..base
    }
}

fn hold(base: Config, seeds: std::ops::Range<u64>) -> Counts {
    let mut sum = Counts::default();
    for seed in seeds {
        let (counts, result) = world::run(drawn(base, seed), seed);
        if let Err(text) = result {
            panic!("seed {seed}: {text}");
        }
        sum.add(&counts);
    }
    sum
}

/// Shows one history: `SEED=19 WORLD=wild cargo test one_history -- --nocapture`.
#[test]
fn one_history() {
    if let Some(seed) = std::env::var("SEED").ok().and_then(|seed| seed.parse().ok()) {
        let base = match std::env::var("WORLD").as_deref() {
            Ok("calm") => CALM,
            Ok("groups") => GROUPS,
            Ok("failovers") => FAILOVERS,
            Ok("lent") => LENT,
            Ok("brief") => BRIEF,
            Ok("mute") => MUTE,
            Ok("early") => EARLY,
            Ok("unfilled") => UNFILLED,
            Ok("broken") => BROKEN,
            Ok("lively") => LIVELY,
            Ok("crossed") => CROSSED,
            Ok("pools") => POOLS,
            Ok("eager") => EAGER,
            Ok("fruitless") => FRUITLESS,
            _ => WILD,
        };
        let config = Config { shown: true, ..drawn(base, seed) };
        println!("{config:?}");
        println!("{:?}", world::run(config, seed));
    }
}

/// How many histories are played: more with `HISTORIES=1000000`.
fn histories() -> u64 {
    std::env::var("HISTORIES").ok().and_then(|count| count.parse().ok()).unwrap_or(10_000)
}

#[test]
fn every_history_is_one_that_a_redis_that_evicts_could_have_had() {
    let counts = hold(WILD, 0..histories());
    println!("{counts:?}");
}

#[test]
fn no_lease_outlives_a_failover() {
    let counts = hold(FAILOVERS, 0..histories() / 5);
    assert!(counts.failovers > 0);
}

#[test]
fn no_load_that_outlasts_its_lease_passes_for_one_to_whom_its_connection_was_lent() {
    let counts = hold(LENT, 0..histories());
    println!("{counts:?}");
    assert!(counts.lent > histories() / 100, "{counts:?}");
}

#[test]
fn nobody_waits_in_vain_and_one_at_a_time_loads() {
    let counts = hold(CALM, 0..histories() / 5);
    println!("{counts:?}");
    // What is excused is rare.
    assert!(counts.orphaned * 50 < counts.leads, "{counts:?}");
}

#[test]
fn overlapping_groups_never_wait_for_each_other() {
    let counts = hold(GROUPS, 0..histories() / 5);
    println!("{counts:?}");
}

/// A key that changes about twice a second, read all the time, over connections of all kinds; one load in ten ends without a SET.
/// Where a rule lets nils of other connections speak for a few loads' time only, what such a load leaves behind does not keep the
/// others from being stored.
#[test]
fn loads_that_come_to_nothing_do_not_spoil_the_others() {
    let rule = Rule { overlap: None, wait_follows: true, ..Rule::new(1, 3_000, 1_000) };
    let steady = Config {
        pods: 3,
        keys: 1,
        actors: 9,
        operations: 4_000,
        writes: 2,
        ttl: 20_000,
        unfilled: 1,
        groups: false,
        rule,
        ..CALM
    };
    let mut sum = Counts::default();
    for seed in 0..10 {
        let (counts, result) = world::run(steady, seed);
        assert_eq!(result, Ok(()), "seed {seed}");
        sum.add(&counts);
    }
    println!("{sum:?}");
    assert!(sum.stored > sum.removed, "{sum:?}");
    assert!(sum.values > 2 * sum.leads, "{sum:?}");
}

#[test]
fn who_waits_is_served_where_nobody_is_woken() {
    println!("{:?}", hold(MUTE, 0..histories() / 5));
}

#[test]
fn what_is_repeated_where_connections_break_is_stored_only_if_it_is_new() {
    let counts = hold(BROKEN, 0..histories() / 5);
    assert!(counts.repeated > 0, "{counts:?}");
}

#[test]
fn a_key_that_is_written_all_the_time_is_never_read_as_it_was() {
    println!("{:?}", hold(LIVELY, 0..histories() / 5));
}

#[test]
fn a_fill_that_overtakes_another_on_its_way_to_the_cache_is_no_older_than_that() {
    println!("{:?}", hold(CROSSED, 0..histories() / 5));
}

#[test]
fn loads_that_outlast_their_leases_and_end_crosswise_pass_for_no_newer_one() {
    let counts = hold(POOLS, 0..histories() / 5);
    assert!(counts.lent > 0, "{counts:?}");
}

#[test]
fn values_that_are_gone_at_once_are_loaded_one_at_a_time() {
    println!("{:?}", hold(BRIEF, 0..histories() / 5));
}

#[test]
fn who_asks_for_the_lease_too_late_has_its_value_at_once() {
    let counts = hold(EARLY, 0..histories() / 5);
    assert!(counts.early > 0, "{counts:?}");
}

#[test]
fn a_key_that_nobody_fills_is_leased_three_times() {
    let counts = hold(UNFILLED, 0..histories() / 5);
    assert!(counts.shared > 0 && counts.stored == 0, "{counts:?}");
}

/// What finds each switch.
fn base_for(switch: Switch) -> Config {
    match switch {
        Switch::RunIgnored | Switch::SeenIgnored => LIVELY,
        Switch::SharedForgotten => FRUITLESS,
        Switch::UnmetKeepsGeneration => EAGER,
        Switch::FailureUndoubted | Switch::AwayForgotten | Switch::EarlyKept => BROKEN,
        Switch::WinnerWaits => GROUPS,
        Switch::LentForgotten => LENT,
        Switch::LentUnheard | Switch::LentBriefly => POOLS,
        Switch::UnderWayIgnored => CROSSED,
        Switch::DisconnectKeepsLease | Switch::OwnReadsPass | Switch::UnclaimedKept => CALM,
        Switch::SignsUnsent | Switch::YoungestLeads => CALM,
        Switch::NobodyLooks => MUTE,
        Switch::LeadsUncounted => UNFILLED,
        _ => WILD,
    }
}

/// The same key, under rules that trade nothing. What lent connections are held against costs some fills that were as new as any, as a
/// load that comes to nothing looks like one that goes on: a bounded share more than if nobody minded.
#[test]
fn what_is_held_against_lent_connections_costs_few_fills() {
    let share = |sharing: bool, pods: u64, broken: Option<Switch>| {
        let rule = Rule::new(1, 3_000, 1_000);
        let steady = Config {
            pods,
            keys: 1,
            actors: 9,
            operations: 1_000,
            writes: 2,
            ttl: 20_000,
            unfilled: 1,
            groups: false,
            rule,
            ..CALM
        };
        let mut sum = Counts::default();
        (0..10).for_each(|seed| sum.add(&world::run(Config { sharing, broken, ..steady }, seed).0));
        println!("sharing {sharing}, {pods} pods, {broken:?}: {sum:?}");
        sum.spoiled as f64 / sum.fills as f64
    };
    for (sharing, pods) in [(false, 1), (false, 3), (true, 1), (true, 3)] {
        let (before, after) = (share(sharing, pods, Some(Switch::LentForgotten)), share(sharing, pods, None));
        println!("{before:.3} {after:.3}");
        assert!(after < before + 0.1, "{before:.3} of all fills before, {after:.3} after");
    }
}

#[test]
fn each_broken_mechanism_is_found() {
    let mut unfound = Vec::new();
    for switch in Switch::ALL {
        let base = base_for(switch);
        let found = (0..50_000).find_map(|seed| {
            let config = drawn(base, seed);
            let text = world::run(Config { broken: Some(switch), ..config }, seed).1.err()?;
            // It is the switch that is found.
            world::run(config, seed).1.is_ok().then_some((seed, text))
        });
        println!("{switch:?}: {found:?}");
        unfound.extend(found.is_none().then_some(switch));
    }
    assert_eq!(unfound, [], "broken, and nothing was found");
}
