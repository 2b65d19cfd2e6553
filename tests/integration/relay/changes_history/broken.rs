//! The checker of histories, before servers on the way to which something of what it rests on is broken: it notices.

use super::{Fault, Plan, Seen, play};
use crate::read_through::Servers;
use crate::support::saboteur::Change;

/// Events about keys say nothing that anybody understands.
const EVENTS: &[Change] = &[Change { from: "$3\r\nkey\r\n", to: "$3\r\nkex\r\n" }];
/// A relay that finds that changes may have been lost has the keys walked over, and does not note it.
const LAPSES: &[Change] = &[Change { from: "if ARGV[9] ~= '' and last then", to: "if false then" }];
const NOTHING: &[Change] = &[];

/// What a history shows before such servers. `fill`: how many names a walk has to pass by.
fn play_broken(seed: u64, changes: &'static [Change], faults: &[Fault], fill: u32) -> Seen {
    play(Servers::sabotaged(changes), &Plan { seed, versioned: true, evicts: false, faults: faults.to_vec(), fill })
}

#[test]
fn it_is_noticed_where_something_is_broken() {
    let (slots, reader) = ([Fault::SlotGoes; 3], [Fault::ReaderIsEnded]);
    let plans = [(EVENTS, &reader[..], 0), (LAPSES, &slots[..], 200_000), (NOTHING, &slots[..], 200_000)];
    let wrong: Vec<Vec<String>> = std::thread::scope(|scope| {
        let played = plans.map(|(changes, faults, fill)| scope.spawn(move || play_broken(7, changes, faults, fill)));
        played.into_iter().map(|played| played.join().expect("a history").verdict.wrong).collect()
    });
    let is_noticed = wrong.iter().map(|wrong| wrong.iter().any(|wrong| wrong.contains("was carried out before")));
    assert_eq!(is_noticed.collect::<Vec<_>>(), [true, true, false], "{:?}", wrong[2]);
    assert_eq!(wrong[2], [""; 0], "with nothing broken nothing is wrong");
}
