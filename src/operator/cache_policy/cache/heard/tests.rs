use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;
use crate::policy::heartbeat::{MAX_BYTES, RuleBeat, UNMATCHED, VERSION};

const BINDING: &str = "shop";

fn at(start: Instant, second: u64) -> Instant {
    start + Duration::from_secs(second)
}

fn heartbeat(sidecar: &str, uptime: u64) -> Heartbeat {
    Heartbeat {
        version: VERSION,
        sidecar: sidecar.to_owned(),
        binding: BINDING.to_owned(),
        larder: "0.1.0".to_owned(),
        understands: 3,
        generation: Some(7),
        refused: None,
        uptime_seconds: uptime,
        clients: 2,
        clients_ever: 5,
        rules: Vec::new(),
        rules_left_out: 0,
    }
}

fn rule(name: &str, hits: u64, misses: u64) -> RuleBeat {
    RuleBeat { name: name.to_owned(), hits, misses, ..RuleBeat::default() }
}

fn with_rules(sidecar: &str, uptime: u64, rules: Vec<RuleBeat>) -> Heartbeat {
    Heartbeat { rules, ..heartbeat(sidecar, uptime) }
}

fn listening(start: Instant) -> Heard {
    let mut heard = Heard::new(Arc::default(), start);
    heard.expect(start, 7, ["user", "item"].into_iter());
    heard.listen(start);
    heard
}

fn hear(heard: &mut Heard, now: Instant, beat: Heartbeat) -> Taken {
    heard.beat(now, BINDING, &beat.to_json())
}

#[test]
fn who_is_silent_for_three_intervals_is_gone() {
    let start = Instant::now();
    let mut heard = listening(start);
    assert_eq!(hear(&mut heard, start, heartbeat("a", 1)), Taken::New);
    assert_eq!(hear(&mut heard, at(start, 5), heartbeat("b", 1)), Taken::New);
    assert_eq!(hear(&mut heard, at(start, 5), heartbeat("b", 6)), Taken::Known);
    heard.age(at(start, 15));
    assert_eq!(heard.live(at(start, 15)), 2);
    heard.age(at(start, 16));
    assert_eq!(heard.live(at(start, 16)), 1);
    assert_eq!(hear(&mut heard, at(start, 17), heartbeat("a", 18)), Taken::New, "it is back");
    assert_eq!(heard.live(at(start, 17)), 2);
    let figures = heard.figures(at(start, 18));
    assert_eq!((figures.current, figures.clients), (2, 4));
}

#[test]
fn silence_counts_while_somebody_listens_alone() {
    let start = Instant::now();
    let mut heard = listening(start);
    hear(&mut heard, start, heartbeat("a", 1));
    hear(&mut heard, start, heartbeat("b", 1));
    heard.age(at(start, 20));
    assert_eq!(heard.live(at(start, 20)), 0);
    hear(&mut heard, at(start, 21), heartbeat("a", 22));
    heard.deaf(at(start, 30));
    heard.age(at(start, 500));
    assert_eq!((heard.live(at(start, 500)), heard.figures(at(start, 500)).listening), (1, false));
    heard.listen(at(start, 501));
    heard.age(at(start, 516));
    assert_eq!(heard.live(at(start, 516)), 1, "who was gone before is not back for that");
    heard.age(at(start, 517));
    assert_eq!(heard.live(at(start, 517)), 0);
}

#[test]
fn many_may_speak_seldom() {
    let start = Instant::now();
    let mut heard = listening(start);
    heard.told(start, 10_000);
    hear(&mut heard, start, heartbeat("a", 1));
    heard.age(at(start, 60));
    assert_eq!(heard.live(at(start, 60)), 1);
    // They may not know yet that they are few.
    heard.told(at(start, 60), 100);
    heard.age(at(start, 60));
    assert_eq!(heard.live(at(start, 60)), 1);
    hear(&mut heard, at(start, 150), heartbeat("a", 150));
    heard.age(at(start, 170));
    assert_eq!(heard.live(at(start, 170)), 0);
}

#[test]
fn a_process_that_was_cut_off_is_not_counted_twice() {
    let start = Instant::now();
    let mut heard = listening(start);
    hear(&mut heard, start, with_rules("a", 10, vec![rule("user", 100, 10)]));
    heard.age(at(start, 100));
    hear(&mut heard, at(start, 500), with_rules("a", 510, vec![rule("user", 130, 10), rule("strange", 1, 1)]));
    // Started anew.
    hear(&mut heard, at(start, 501), with_rules("b", 1, vec![rule("user", 5, 0), rule(UNMATCHED, 1, 0)]));
    let figures = heard.figures(at(start, 501));
    assert_eq!(figures.rules.len(), 2, "{:?}", figures.rules);
    assert_eq!((figures.rules["user"].hits, figures.rules["user"].misses, figures.rules[UNMATCHED].hits), (135, 10, 1));
    // Its counts stay when it is forgotten, and its room is free.
    heard.age(at(start, 2000));
    assert_eq!((heard.sidecars.len(), heard.counts, heard.room.left()), (0, 0, Room::default().left()));
    assert_eq!(heard.figures(at(start, 2000)).rules["user"].hits, 135);
}

#[test]
fn what_is_recent_is_what_was_added_of_late() {
    let start = Instant::now();
    let mut heard = listening(start);
    // An operator that comes late hears of counts that are days old.
    hear(&mut heard, start, with_rules("old", 100_000, vec![rule("user", 1_000_000, 0)]));
    hear(&mut heard, start, with_rules("young", 20, vec![rule("user", 10, 0)]));
    hear(&mut heard, at(start, 5), with_rules("old", 100_005, vec![rule("user", 1_000_007, 0)]));
    let recent = |heard: &Heard, second| heard.figures(at(start, second)).recent.get("user").map_or(0, |beat| beat.hits);
    assert_eq!((recent(&heard, 5), heard.figures(at(start, 5)).rules["user"].hits), (17, 1_000_017));
    heard.age(at(start, 301));
    assert_eq!(recent(&heard, 301), 17);
    hear(&mut heard, at(start, 302), with_rules("old", 100_302, vec![rule("user", 1_000_008, 0)]));
    heard.age(at(start, 602));
    assert_eq!(recent(&heard, 602), 1);
}

#[test]
fn rules_come_and_go() {
    let start = Instant::now();
    let mut heard = listening(start);
    hear(&mut heard, start, with_rules("a", 10, vec![rule("user", 7, 0), rule("item", 5, 3)]));
    heard.expect(start, 8, ["new", "item"].into_iter());
    assert_eq!(heard.counts, 2);
    hear(&mut heard, start, with_rules("a", 11, vec![rule("user", 9, 0), rule("item", 6, 3), rule("new", 1, 0)]));
    let rules = heard.figures(start).rules;
    let hits: BTreeMap<&str, u64> = rules.iter().map(|(name, beat)| (name.as_str(), beat.hits)).collect();
    assert_eq!(hits, BTreeMap::from([("item", 6), ("new", 1)]));
    assert_eq!(heard.room.left().1, Room::default().left().1 - heard.counts);
}

#[test]
fn sidecars_are_told_apart_by_what_they_have_in_force() {
    let start = Instant::now();
    let mut heard = listening(start);
    let refused = |generation, reason: &str| Some(RefusedSnapshot { generation: Some(generation), reason: reason.to_owned() });
    hear(&mut heard, start, heartbeat("new", 10));
    hear(&mut heard, start, Heartbeat { generation: None, clients_ever: 0, ..heartbeat("empty", 119) });
    hear(&mut heard, start, Heartbeat { generation: Some(6), clients_ever: 0, understands: 2, ..heartbeat("old", 120) });
    hear(&mut heard, start, Heartbeat { generation: Some(6), refused: refused(7, "odd\nreason"), ..heartbeat("choosy", 10) });
    hear(&mut heard, start, Heartbeat { generation: Some(6), refused: refused(3, "long ago"), ..heartbeat("slow", 10) });
    let figures = heard.figures(start);
    assert_eq!((figures.live, figures.current, figures.without_snapshot), (5, 1, 1));
    assert_eq!((&figures.generations[..], figures.unused), (&[(7, 1), (6, 3)][..], 1));
    let refusal = Refusal { sidecars: 2, generation: Some(7), reason: "odd reason".to_owned() };
    assert_eq!(figures.refused, Some(refusal));
    assert_eq!(figures.notices, [Notice::SidecarUnused { sidecars: 1, of: 5 }]);
}

#[test]
fn what_all_understand_is_known_once_all_had_the_time_to_speak() {
    let start = Instant::now();
    let mut heard = listening(start);
    let understood = |heard: &Heard, second| heard.figures(at(start, second)).understands;
    hear(&mut heard, at(start, 1), heartbeat("new", 10));
    assert_eq!(understood(&heard, 4), None, "an older one may be among them");
    hear(&mut heard, at(start, 5), Heartbeat { understands: 2, ..heartbeat("old", 120) });
    assert_eq!([9, 10].map(|second| understood(&heard, second)), [None, Some(2)]);
    hear(&mut heard, at(start, 20), heartbeat("new", 29));
    heard.age(at(start, 21));
    assert_eq!(understood(&heard, 21), Some(3), "the older one is gone");
    heard.deaf(at(start, 22));
    assert_eq!(understood(&heard, 40), None);
    heard.listen(at(start, 40));
    hear(&mut heard, at(start, 41), heartbeat("new", 50));
    assert_eq!([49, 50].map(|second| understood(&heard, second)), [None, Some(3)]);
}

#[test]
fn a_person_is_told_what_is_conspicuous() {
    let start = Instant::now();
    let mut heard = listening(start);
    let odd = |uptime, times: u64| {
        let item = RuleBeat { wait_timeouts: times, never_filled: times * 10, ..rule("item", 0, times * 20) };
        with_rules("a", uptime, vec![item])
    };
    hear(&mut heard, start, odd(10, 1));
    assert_eq!(heard.figures(start).notices, []);
    (1..=120).for_each(|round| {
        hear(&mut heard, at(start, round * 5), odd(10 + round * 5, round));
        heard.age(at(start, round * 5));
    });
    let notices = heard.figures(at(start, 600)).notices;
    let subjects: Vec<_> = notices.iter().map(Notice::subject).collect();
    assert_eq!(subjects, [("RuleNeverMatched", "user"), ("MissesNeverFilled", "item"), ("WaitsTimeOut", "item")]);
    // Whoever left something out may have left out just that; and what one has not in force it cannot match.
    hear(&mut heard, at(start, 600), Heartbeat { rules_left_out: 1, ..odd(611, 120) });
    assert_eq!(heard.figures(at(start, 600)).notices.len(), 2);
    hear(&mut heard, at(start, 600), Heartbeat { generation: Some(6), ..odd(612, 120) });
    assert_eq!(heard.figures(at(start, 600)).notices.len(), 2);
}

#[test]
fn a_crowd_has_bounds_and_is_counted_all_the_same() {
    let start = Instant::now();
    let room = Arc::new(Room::of(10, 30));
    let mut heard = Heard::new(room.clone(), start);
    heard.expect(start, 7, ["user"].into_iter());
    heard.listen(start);
    let speak = |heard: &mut Heard, second| {
        (0..25)
            .map(|number| hear(heard, at(start, second), with_rules(&format!("s{number}"), second, vec![rule("user", 1, 1)])))
            .filter(|taken| *taken == Taken::Crowded)
            .count()
    };
    for second in [1, 6, 11] {
        assert_eq!(speak(&mut heard, second), 15);
        heard.age(at(start, second));
        assert_eq!(heard.live(at(start, second)), 25);
    }
    assert_eq!((room.left(), heard.figures(at(start, 11)).partly_counted), ((0, 10), 15));
    heard.age(at(start, 40));
    assert_eq!(heard.live(at(start, 40)), 0);
    drop(heard);
    assert_eq!(room.left(), (10, 30));
}

#[test]
fn who_is_gone_makes_room() {
    let start = Instant::now();
    let mut heard = listening(start);
    let many = |heard: &mut Heard, prefix: &str, second| {
        (0..SIDECARS_OF_ONE)
            .all(|number| hear(heard, at(start, second), heartbeat(&format!("{prefix}{number}"), 1)) == Taken::New)
    };
    assert!(many(&mut heard, "a", 0));
    assert_eq!(hear(&mut heard, start, heartbeat("late", 1)), Taken::Crowded);
    heard.age(at(start, 100));
    assert!(many(&mut heard, "b", 100));
    assert_eq!((heard.sidecars.len(), heard.gone), (SIDECARS_OF_ONE, 0));
}

/// What a process counted, as it rises.
#[derive(Debug, Clone)]
struct Process {
    steps: Vec<(u64, u64)>,
}

impl Process {
    fn beats(&self, name: &str) -> Vec<Heartbeat> {
        let (mut user, mut item) = (0, 0);
        let beat = |(at, (more, less)): (usize, &(u64, u64))| {
            (user, item) = (user + more, item + less);
            with_rules(name, at as u64 * 5, vec![rule("user", user, item), rule("item", item, 0)])
        };
        self.steps.iter().enumerate().map(beat).collect()
    }
}

fn processes() -> impl Strategy<Value = Vec<Process>> {
    let steps = proptest::collection::vec((0u64..1000, 0u64..1000), 1..8);
    proptest::collection::vec(steps.prop_map(|steps| Process { steps }), 1..6)
}

proptest! {
    /// Whatever is lost, comes twice or in another order: the sums are those of the greatest that was heard of each process.
    #[test]
    fn sums_outlive_restarts_and_disorder(processes in processes(), picks in proptest::collection::vec(any::<prop::sample::Index>(), 1..60)) {
        let start = Instant::now();
        let mut heard = listening(start);
        let all: Vec<Heartbeat> =
            processes.iter().enumerate().flat_map(|(number, process)| process.beats(&format!("p{number}"))).collect();
        let mut greatest: BTreeMap<String, (u64, u64)> = BTreeMap::new();
        for (second, pick) in (0u64..).zip(picks) {
            let beat = pick.get(&all).clone();
            let (hits, misses) = (beat.rules[0].hits, beat.rules[0].misses);
            let known = greatest.entry(beat.sidecar.clone()).or_default();
            *known = (known.0.max(hits), known.1.max(misses));
            hear(&mut heard, at(start, second * 7), beat);
            heard.age(at(start, second * 7));
        }
        let figures = heard.figures(start);
        let told = figures.rules.get("user").map_or((0, 0), |beat| (beat.hits, beat.misses));
        let expected = greatest.values().fold((0, 0), |sum, known| (sum.0 + known.0, sum.1 + known.1));
        prop_assert_eq!(told, expected);
        prop_assert_eq!(figures.rules.get("item").map_or(0, |beat| beat.hits), expected.1);
    }

    /// Who lives is who spoke within three intervals, as long as everything is heard.
    #[test]
    fn the_living_are_those_who_spoke(spoken in proptest::collection::vec((0u64..4, 0usize..8), 1..120)) {
        let start = Instant::now();
        let mut heard = listening(start);
        let (mut second, mut last) = (0, [None; 8]);
        for (passes, who) in spoken {
            second += passes;
            hear(&mut heard, at(start, second), heartbeat(&format!("s{who}"), second));
            last[who] = Some(second);
            heard.age(at(start, second));
            let living = last.iter().flatten().filter(|spoke| second - **spoke <= 15).count();
            prop_assert_eq!(heard.live(at(start, second)) as usize, living);
        }
    }

    /// Nothing that is said on the channel breaks anything, or takes more than its room.
    #[test]
    fn nonsense_hurts_nobody(
        messages in proptest::collection::vec(hostile(), 1..60), ages in proptest::collection::vec(0u64..400, 60)
    ) {
        let start = Instant::now();
        let room = Arc::new(Room::of(20, 200));
        let mut heard = Heard::new(room.clone(), start);
        heard.listen(start);
        let mut second = 0;
        for (message, passes) in messages.iter().zip(ages) {
            let rules = ["a", "b", "c"];
            heard.expect(at(start, second), second, rules[..second as usize % 4].iter().copied());
            let _ = heard.beat(at(start, second), BINDING, message);
            second += passes;
            heard.age(at(start, second));
            let figures = heard.figures(at(start, second));
            prop_assert!(figures.notices.len() <= MAX_NOTICES && figures.generations.len() <= MAX_GENERATIONS);
            prop_assert!(figures.refused.is_none_or(|refused| refused.reason.chars().count() <= MAX_REASON_CHARS));
            prop_assert!(figures.rules.len() <= 4);
            prop_assert_eq!(room.left(), (20 - heard.sidecars.len(), 200 - heard.counts));
            prop_assert_eq!(heard.counts, heard.sidecars.values().map(|sidecar| sidecar.counts.len()).sum::<usize>());
            prop_assert_eq!(heard.gone, heard.sidecars.values().filter(|sidecar| sidecar.gone).count());
        }
        drop(heard);
        prop_assert_eq!(room.left(), (20, 200));
    }
}

/// Heartbeats of anybody, and what is none.
fn hostile() -> impl Strategy<Value = Vec<u8>> {
    let number = prop_oneof![Just(0), Just(u64::MAX), any::<u64>()];
    let rule = ("[abcx]|\\PC{0,40}", number.clone(), number.clone()).prop_map(|(name, hits, waits)| RuleBeat {
        wait_timeouts: waits,
        never_filled: hits,
        ..rule(&name, hits, waits)
    });
    let rules = proptest::collection::vec(rule, 0..8);
    let beat = ("[a-e]{1,2}|\\PC{0,200}", number.clone(), number, any::<Option<u64>>(), rules, "\\PC{0,300}|\n{0,300}").prop_map(
        |(sidecar, uptime, clients, generation, rules, reason)| Heartbeat {
            sidecar,
            uptime_seconds: uptime,
            clients,
            clients_ever: clients,
            generation,
            refused: generation.map(|_| RefusedSnapshot { generation, reason }),
            understands: clients as u32,
            rules_left_out: uptime,
            rules,
            ..heartbeat("", 0)
        },
    );
    prop_oneof![
        4 => beat.prop_map(|beat| serde_json::to_vec(&beat).unwrap()),
        1 => proptest::collection::vec(any::<u8>(), 0..200),
        1 => Just(vec![b'['; MAX_BYTES * 2]),
        1 => Just(vec![b'['; MAX_BYTES]),
        1 => Just(serde_json::to_vec(&Heartbeat { binding: "other".to_owned(), ..heartbeat("a", 1) }).unwrap()),
    ]
}
