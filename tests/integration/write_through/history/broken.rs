//! Histories in which a mechanism is broken on its way to the servers: what comes of it must be noticed.

use super::*;
use crate::support::saboteur::Change;

/// What befalls these: their only server has no replica.
const FAULTS: [Fault; 4] = [Fault::SidecarDies, Fault::SidecarStops, Fault::PostgresDies, Fault::ClientsAreCut];

/// Plays until something is found that is wrong.
fn is_noticed(changes: &'static [Change], versions: Versions) {
    let found = (1..=30).any(|seed| {
        let faults = fastrand::Rng::with_seed(seed).choose_multiple(FAULTS, 2);
        let seen = play(|| Servers::sabotaged(changes), &Plan { seed, versions, faults, keys: 2 });
        println!("seed {seed}: {:?}", seen.wrong.first());
        !seen.wrong.is_empty()
    });
    assert!(found, "{changes:?} is not noticed");
}

#[test]
fn it_is_noticed_where_reads_may_store_while_a_write_is_under_way() {
    is_noticed(
        &[
            Change { from: "then return {'written'} end", to: "then end" },
            Change { from: "redis.call('UNLINK', KEYS[5])\nend\nlocal holder", to: "\nend\nlocal holder" },
        ],
        Versions::Column,
    );
}

#[test]
fn it_is_noticed_where_a_write_takes_nothing_away() {
    is_noticed(
        &[Change { from: "redis.call('UNLINK', KEYS[1], KEYS[2], KEYS[3], KEYS[4])\nreturn {'begun'", to: "return {'begun'" }],
        Versions::Column,
    );
}

#[test]
fn it_is_noticed_where_the_last_of_overlapping_writes_is_kept() {
    is_noticed(
        &[Change {
            from: "and living == 0 and best ~= 'x' and (not mixed or (version ~= '' and (not best or newer(version, best)))) then",
            to: "then",
        }],
        Versions::None,
    );
}
