//! The plain cases, by hand.

use super::super::model::{Condition, Filled, Set, Slot};
use super::super::*;

const RULE: Rule = Rule::new(1, 3_000, 1_000);
const RUN: u32 = 7;

fn reader(connection: u64, place: u32) -> Reader {
    Reader { asker: Asker { connection, place }, database: 0, overtaken: false, shared: false }
}

fn set(value: u32) -> Set<u32> {
    Set { value, condition: Condition::Always, ttl: 60_000, stale_ttl: 0 }
}

/// One pod, and one key in the cache that answers at once.
struct Bench {
    desk: Desk<u32>,
    slot: Slot<u32>,
    now: Millis,
    answers: Vec<(Asker, Answer<u32>)>,
}

impl Bench {
    fn new() -> Self {
        Self { desk: Desk::new(1), slot: Slot::default(), now: 1_000, answers: Vec::new() }
    }

    fn read(&mut self, connection: u64, place: u32) {
        let mut effects = Vec::new();
        self.desk.read_missed(self.now, reader(connection, place), &[Missing { key: b"k", rule: RULE }], &mut effects);
        self.run(effects);
    }

    fn write(&mut self, connection: u64, value: u32) -> Verdict {
        let mut effects = Vec::new();
        let verdict = self.desk.write(self.now, connection, 0, b"k", &mut effects);
        let generation = match verdict {
            Verdict::Update => {
                self.slot.update(self.now, &set(value));
                self.run(effects);
                return verdict;
            }
            Verdict::Fill(generation) => Some(generation),
            Verdict::Ambiguous => None,
        };
        let written = match self.slot.fill(self.now, RUN, generation, &set(value)) {
            Filled::Stored { .. } => Written::Stored,
            Filled::Removed { .. } => Written::Removed,
            Filled::Unchanged => Written::Unchanged,
        };
        self.run(effects);
        let mut effects = Vec::new();
        self.desk.wrote(self.now, connection, 0, b"k", written, &mut effects);
        self.run(effects);
        verdict
    }

    fn close(&mut self, connection: u64) {
        let mut effects = Vec::new();
        self.desk.closed(self.now, connection, &mut effects);
        self.run(effects);
    }

    fn run(&mut self, effects: Vec<Effect<u32>>) {
        for effect in effects {
            match effect {
                Effect::Ask { name, mode, fresh, rule } => {
                    let begun = self.slot.begin(self.now, RUN, fresh, mode, &rule);
                    let mut effects = Vec::new();
                    self.desk.begun(self.now, &name, fresh, begun, &mut effects);
                    self.run(effects);
                }
                Effect::GiveBack { token, .. } => {
                    self.slot.release(self.now, token);
                }
                Effect::Answer { asker, answer } => self.answers.push((asker, answer)),
                Effect::Early { .. } | Effect::Watch { .. } | Effect::Unwatch { .. } | Effect::Disarmed { .. } => {}
            }
        }
    }

    fn pass(&mut self, span: Millis) {
        let end = self.now + span;
        while let Some(at) = self.desk.next_deadline().filter(|at| *at <= end) {
            self.now = self.now.max(at);
            let mut effects = Vec::new();
            self.desk.tick(self.now, &mut effects);
            self.run(effects);
        }
        self.now = end;
    }

    fn answered(&mut self) -> Vec<(u64, Reply<u32>)> {
        let answers = std::mem::take(&mut self.answers).into_iter().map(|(asker, answer)| match answer {
            Answer::Replies(replies) => (asker.connection, replies[0]),
            Answer::TimedOut { .. } => panic!("{asker:?} timed out"),
        });
        answers.collect()
    }
}

#[test]
fn one_loads_and_the_others_get_what_it_stores() {
    let mut bench = Bench::new();
    (1..=100).for_each(|connection| bench.read(connection, 0));
    assert_eq!(bench.answered(), [(1, Reply::Nil(Why::Lead))]);
    assert!(matches!(bench.write(1, 42), Verdict::Fill(_)));
    let answered = bench.answered();
    assert_eq!(answered.len(), 99);
    assert!(answered.iter().all(|(_, reply)| *reply == Reply::Value(42)));
}

#[test]
fn a_holder_that_goes_is_succeeded_by_one() {
    let mut bench = Bench::new();
    (1..=10).for_each(|connection| bench.read(connection, 0));
    bench.answered();
    bench.close(1);
    assert_eq!(bench.answered(), [(2, Reply::Nil(Why::Lead))]);
}

#[test]
fn a_value_loaded_before_a_deletion_is_not_stored_after_it() {
    let mut bench = Bench::new();
    bench.read(1, 0);
    bench.slot.delete(bench.now);
    bench.write(1, 1);
    assert_eq!(bench.slot.get(bench.now), None);
}

#[test]
fn a_second_set_soon_after_a_miss_is_never_the_first() {
    let mut bench = Bench::new();
    bench.read(1, 0);
    bench.write(1, 1);
    bench.write(1, 2);
    assert_ne!(bench.slot.get(bench.now), Some(1));
    bench.pass(RULE.memory);
    assert_eq!(bench.write(1, 3), Verdict::Update);
    assert_eq!(bench.slot.get(bench.now), Some(3));
}

#[test]
fn nothing_is_kept_when_all_is_over() {
    let mut bench = Bench::new();
    (1..=10).for_each(|connection| bench.read(connection, 0));
    bench.write(1, 1);
    bench.pass(RULE.memory * 2);
    assert_eq!((bench.desk.waiting(), bench.desk.outstanding(), bench.desk.next_deadline()), (0, 0, None));
}
