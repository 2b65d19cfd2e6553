//! The plain cases, by hand.

use super::super::model::{Condition, Kept, Set, Slot};
use super::super::*;

/// Who waits looks again within this.
const FIRST_LOOK_MS: Millis = 100;
const RULE: Rule = Rule::new(1, 3_000, 1_000);
const RUN: u32 = 7;
const KEYS: [&[u8]; 2] = [b"k", b"m"];

fn set(value: u32) -> Set<u32> {
    Set { value, condition: Condition::Always, ttl: 60_000, stale_ttl: 0 }
}

/// Some pods, and a cache that answers at once. Connection `n` is one of pod `n % pods`.
struct Bench {
    pods: Vec<Desk<u32>>,
    slots: [Slot<u32>; 2],
    rule: Rule,
    now: Millis,
    away: bool,
    answers: Vec<(Asker, Answer<u32>)>,
    watched: Vec<(usize, usize)>,
    disarmed: Vec<u16>,
}

impl Bench {
    fn new(pods: usize) -> Self {
        Self {
            pods: (1..=pods as u64).map(Desk::new).collect(),
            slots: [Slot::default(), Slot::default()],
            rule: RULE,
            now: 1_000,
            away: false,
            answers: Vec::new(),
            watched: Vec::new(),
            disarmed: Vec::new(),
        }
    }

    fn with(&mut self, pod: usize, event: impl FnOnce(&mut Desk<u32>, Millis, &mut Vec<Effect<u32>>)) {
        let mut effects = Vec::new();
        event(&mut self.pods[pod], self.now, &mut effects);
        self.run(pod, effects);
    }

    /// A GET or MGET finds nothing.
    fn read(&mut self, connection: u64, place: u32, keys: &[usize], shared: bool) {
        let pod = connection as usize % self.pods.len();
        let reader = Reader { asker: Asker { connection, place }, database: 0, overtaken: false, shared };
        let rule = self.rule;
        let missing: Vec<Missing<'_>> = keys.iter().map(|key| Missing { key: KEYS[*key], rule }).collect();
        self.with(pod, |desk, now, effects| desk.read_missed(now, reader, &missing, effects));
    }

    fn get(&mut self, connection: u64) {
        self.read(connection, 0, &[0], false);
    }

    fn write(&mut self, connection: u64, value: u32) -> Verdict {
        let pod = connection as usize % self.pods.len();
        let mut effects = Vec::new();
        let verdict = self.pods[pod].write(self.now, connection, 0, KEYS[0], &mut effects);
        if verdict == Verdict::Update {
            self.slots[0].update(self.now, &set(value));
            self.run(pod, effects);
            return verdict;
        }
        let written = self.slots[0].fill(self.now, RUN, verdict, &set(value));
        self.run(pod, effects);
        self.with(pod, |desk, now, effects| desk.wrote(now, connection, 0, KEYS[0], written, effects));
        self.publish(0);
        verdict
    }

    /// Tells those who listen, if there is something to tell.
    fn publish(&mut self, key: usize) {
        if !std::mem::take(&mut self.slots[key].announced) {
            return;
        }
        for (pod, watched) in self.watched.clone() {
            if watched == key {
                self.with(pod, |desk, now, effects| desk.wake(now, 0, KEYS[key], effects));
            }
        }
    }

    fn close(&mut self, connection: u64) {
        let pod = connection as usize % self.pods.len();
        self.with(pod, |desk, now, effects| desk.closed(now, connection, effects));
    }

    fn run(&mut self, pod: usize, effects: Vec<Effect<u32>>) {
        for effect in effects {
            match effect {
                Effect::Ask { name, mode, fresh, rule } => {
                    let key = usize::from(*name.key != *KEYS[0]);
                    let slot = &mut self.slots[key];
                    let begun = if self.away { Begun::Failed } else { slot.begin(self.now, RUN, fresh, mode, &rule) };
                    self.with(pod, |desk, now, effects| desk.begun(now, &name, fresh, begun, effects));
                    self.publish(key);
                }
                Effect::GiveBack { name, token } => {
                    let key = usize::from(*name.key != *KEYS[0]);
                    self.slots[key].release(self.now, token);
                    self.publish(key);
                }
                Effect::Answer { asker, answer } => self.answers.push((asker, answer)),
                Effect::Watch { name } => self.watched.push((pod, usize::from(*name.key != *KEYS[0]))),
                Effect::Unwatch { name } => {
                    let key = usize::from(*name.key != *KEYS[0]);
                    self.watched.retain(|watched| *watched != (pod, key));
                }
                Effect::Disarmed { rule, .. } => self.disarmed.push(rule),
                Effect::Early { .. } => {}
            }
        }
    }

    fn pass(&mut self, span: Millis) {
        let end = self.now + span;
        while let Some((due, pod)) = (0..self.pods.len()).filter_map(|pod| Some((self.pods[pod].next_deadline()?, pod))).min()
            && due <= end
        {
            self.now = self.now.max(due);
            self.with(pod, |desk, now, effects| desk.tick(now, effects));
        }
        self.now = end;
    }

    /// Whom got what since the last call; the first key's reply of each.
    fn answered(&mut self) -> Vec<(u64, Reply<u32>)> {
        let answers = std::mem::take(&mut self.answers).into_iter().map(|(asker, answer)| match answer {
            Answer::Replies(replies) => (asker.connection, replies[0]),
            other => panic!("{asker:?} got {other:?}"),
        });
        answers.collect()
    }

    fn leads(&mut self) -> Vec<u64> {
        let answered = self.answered().into_iter();
        answered.filter(|(_, reply)| *reply == Reply::Nil(Why::Lead)).map(|(connection, _)| connection).collect()
    }
}

#[test]
fn of_a_thousand_over_five_pods_one_loads_and_the_others_get_what_it_stores() {
    let mut bench = Bench::new(5);
    (1..=1_000).for_each(|connection| bench.get(connection));
    assert_eq!(bench.answered(), [(1, Reply::Nil(Why::Lead))]);
    bench.pass(400);
    assert_eq!(bench.answered(), []);
    assert!(matches!(bench.write(1, 42), Verdict::Fill(_)));
    let answered = bench.answered();
    assert_eq!(answered.len(), 999);
    assert!(answered.iter().all(|(_, reply)| *reply == Reply::Value(42)));
}

#[test]
fn a_holder_that_goes_is_succeeded_by_one() {
    let mut bench = Bench::new(5);
    (1..=1_000).for_each(|connection| bench.get(connection));
    let mut holder = bench.leads();
    for _ in 0..2 {
        assert_eq!(holder.len(), 1);
        bench.close(holder[0]);
        bench.pass(200);
        holder = bench.leads();
    }
    assert_eq!(holder.len(), 1);
}

#[test]
fn a_silent_holder_is_succeeded_by_one_when_its_lease_ends() {
    let mut bench = Bench::new(5);
    bench.get(1);
    assert_eq!(bench.leads(), [1]);
    bench.pass(RULE.lease - 500);
    (2..=1_000).for_each(|connection| bench.get(connection));
    bench.pass(499);
    assert_eq!(bench.answered(), [], "the lease stands");
    bench.pass(500);
    assert_eq!(bench.leads().len(), 1);
}

#[test]
fn after_three_leads_without_a_fill_nobody_waits() {
    let mut bench = Bench::new(1);
    for connection in 1..=3 {
        bench.get(connection);
        assert_eq!(bench.leads(), [connection]);
        bench.pass(RULE.lease);
    }
    (4..=100).for_each(|connection| bench.get(connection));
    let answered = bench.answered();
    assert_eq!(answered.len(), 97);
    assert!(answered.iter().all(|(_, reply)| *reply == Reply::Nil(Why::Shared)));
    assert!(matches!(bench.write(50, 1), Verdict::Fill(_)), "all are of one generation");
    assert_eq!(bench.slots[0].get(bench.now), Some(1));
}

#[test]
fn two_hundred_reads_on_one_connection_are_one_load() {
    let mut bench = Bench::new(5);
    for place in 0..200 {
        (0..5).for_each(|connection| bench.read(connection + 5, place, &[0], true));
    }
    let leads = bench.leads();
    assert_eq!(leads.len(), 1);
    bench.with(leads[0] as usize % 5, |desk, now, effects| desk.arrives(now, leads[0], Command::Set(0, KEYS[0]), effects));
    bench.write(leads[0], 7);
    assert_eq!(bench.answered().len(), 999);
}

#[test]
fn another_command_never_waits_behind_a_read_that_waits() {
    let mut bench = Bench::new(1);
    bench.get(1);
    bench.get(2);
    bench.leads();
    bench.with(0, |desk, now, effects| desk.arrives(now, 2, Command::Get(0, KEYS[1]), effects));
    assert_eq!(bench.answered(), [(2, Reply::Nil(Why::Unparked))]);
    assert!(matches!(bench.write(2, 5), Verdict::Fill(_)), "its nil is of the lease's generation");
}

#[test]
fn of_a_connection_that_is_never_quiet_one_read_a_lease_is_told_of_the_miss() {
    for at_wait_end in [AtWaitEnd::Error, AtWaitEnd::Miss] {
        let mut bench = Bench::new(2);
        bench.rule.at_wait_end = at_wait_end;
        // Connection 2 holds the lease, 1 and 3 are of the other pod.
        for connection in [2, 1, 3] {
            (0..10).for_each(|place| bench.read(connection, place, &[0], true));
            bench.with(connection as usize % 2, |desk, now, effects| desk.arrives(now, connection, Command::Other, effects));
        }
        let (mut nils, mut cut) = (Vec::new(), 0);
        for (asker, answer) in std::mem::take(&mut bench.answers) {
            match answer {
                Answer::Replies(replies) if matches!(replies[0], Reply::Nil(_)) => nils.push(asker.connection),
                Answer::CutShort { rule: 1, .. } => cut += 1,
                other => panic!("{asker:?} got {other:?}"),
            }
        }
        if at_wait_end == AtWaitEnd::Miss {
            assert_eq!((nils.len(), cut), (30, 0));
            continue;
        }
        assert_eq!((nils, cut), (vec![2, 1, 3], 27));
        // What the next lease brings is told again, and the fill of who loads beside the holder is as good as its own.
        bench.pass(RULE.lease);
        bench.read(2, 20, &[0], true);
        bench.read(1, 20, &[0], true);
        bench.with(1, |desk, now, effects| desk.arrives(now, 1, Command::Other, effects));
        assert_eq!(bench.answered(), [(2, Reply::Nil(Why::Lead)), (1, Reply::Nil(Why::Unparked))]);
        assert!(matches!(bench.write(1, 5), Verdict::Fill(_)));
        assert_eq!(bench.slots[0].get(bench.now), Some(5));
    }
}

#[test]
fn a_read_that_waits_over_a_shared_connection_that_loads_its_key_gets_what_the_rule_says() {
    let mut bench = Bench::new(1);
    (0..3).for_each(|place| bench.read(1, place, &[0], true));
    bench.pass(RULE.wait);
    let kinds = bench.answers.iter().map(|(asker, answer)| (asker.place, matches!(answer, Answer::TimedOut { .. })));
    assert_eq!(kinds.collect::<Vec<_>>(), [(0, false), (1, true), (2, true)]);
}

#[test]
fn a_read_over_the_holders_own_connection_gets_what_is_loaded_meanwhile() {
    let mut bench = Bench::new(1);
    bench.get(1);
    bench.read(1, 1, &[0], false);
    assert_eq!(bench.answered(), [(1, Reply::Nil(Why::Lead))]);
    bench.pass(RULE.wait / 2 - 1);
    // The pool has lent it: the SET comes over another.
    assert!(matches!(bench.write(2, 4), Verdict::Fill(_)));
    assert_eq!(bench.answered(), [(1, Reply::Value(4))]);
    assert_eq!(bench.pods[0].next_deadline().map(|at| at <= bench.now), Some(false));
}

#[test]
fn a_holder_that_reads_again_is_told_again_to_load_after_a_loads_time() {
    let mut bench = Bench::new(1);
    for connection in [2, 3] {
        bench.get(connection);
        bench.pass(20);
        bench.write(connection, 1);
        bench.slots[0].delete(bench.now);
    }
    bench.answers.clear();
    for (round, waits) in [true, true, true, false, false].into_iter().enumerate() {
        bench.read(1, 2 * round as u32, &[0], false);
        bench.read(1, 2 * round as u32 + 1, &[0], false);
        assert_eq!(bench.leads(), [1], "in round {round}");
        bench.slots[0].delete(bench.now);
        if waits {
            bench.pass(59);
            assert_eq!(bench.answered(), [], "in round {round}");
            bench.pass(1);
            assert_eq!(bench.answered(), [(1, Reply::Nil(Why::Again))], "in round {round}");
        }
        bench.write(1, 1);
        bench.slots[0].delete(bench.now);
    }
}

#[test]
fn nothing_queues_behind_a_read_that_waits_for_its_own_connection() {
    let mut bench = Bench::new(1);
    bench.get(1);
    bench.read(1, 1, &[0], false);
    bench.with(0, |desk, now, effects| desk.arrives(now, 1, Command::Other, effects));
    let [(_, Answer::Replies(_)), (Asker { place: 1, .. }, Answer::CutShort { rule: 1, .. })] = &bench.answers[..] else {
        panic!("{:?}", bench.answers)
    };
    bench.answers.clear();
    // Nor does it wait where commands queue already, nor for several keys at once.
    bench.read(1, 2, &[0, 1], false);
    let replies = [Reply::Nil(Why::Again), Reply::Nil(Why::Lead)].into_iter().collect();
    assert_eq!(bench.answers, [(Asker { connection: 1, place: 2 }, Answer::Replies(replies))]);
}

#[test]
fn a_read_whose_connection_holds_the_lease_no_more_waits_as_any() {
    let mut bench = Bench::new(2);
    bench.get(2);
    bench.read(2, 1, &[0], false);
    bench.slots[0].delete(bench.now);
    // Another pod leads by now.
    bench.get(1);
    assert_eq!(bench.leads(), [2, 1]);
    bench.pass(RULE.wait - 1);
    assert_eq!(bench.answered(), []);
    bench.write(1, 8);
    assert_eq!(bench.answered(), [(2, Reply::Value(8))]);
}

#[test]
fn a_group_that_leads_a_key_does_not_wait_for_the_others() {
    let mut bench = Bench::new(1);
    bench.read(1, 0, &[0], false);
    bench.read(2, 0, &[1], false);
    bench.answers.clear();
    bench.read(3, 0, &[0, 1], false);
    assert_eq!(bench.answers, [], "it leads none");
    bench.close(2);
    let replies = [Reply::Nil(Why::Passed), Reply::Nil(Why::Lead)].into_iter().collect();
    assert_eq!(bench.answers, [(Asker { connection: 3, place: 0 }, Answer::Replies(replies))]);
}

#[test]
fn a_stale_copy_spares_all_but_the_holder_the_wait() {
    let mut bench = Bench::new(2);
    bench.rule.stale = true;
    bench.slots[0].stale = Some(Kept { value: 3, until: 90_000 });
    (1..=10).for_each(|connection| bench.get(connection));
    let answered = bench.answered();
    assert_eq!(answered[0], (1, Reply::Nil(Why::Lead)));
    assert_eq!(answered.len(), 10);
    assert!(answered[1..].iter().all(|(_, reply)| *reply == Reply::Stale(3)));
}

#[test]
fn while_the_cache_is_away_a_pod_loads_once_a_lease() {
    let mut bench = Bench::new(1);
    bench.away = true;
    bench.rule.at_wait_end = AtWaitEnd::Miss;
    for round in 0..3 {
        (1..=10).for_each(|connection| bench.get(round * 10 + connection));
        let answered = bench.answered();
        assert_eq!(answered, [(round * 10 + 1, Reply::Nil(Why::LocalLead))]);
        bench.pass(RULE.lease);
        assert_eq!(bench.answered().len(), 9);
    }
    bench.away = false;
    assert_eq!(bench.write(1, 1), Verdict::Ambiguous(Doubt::Undated), "nothing proves that it is new");
}

#[test]
fn the_end_of_a_wait_is_what_the_rule_says() {
    let mut bench = Bench::new(1);
    bench.get(1);
    bench.get(2);
    bench.answers.clear();
    bench.pass(RULE.wait);
    let [(asker, Answer::TimedOut { rule: 1, waited: 1_000, .. })] = &bench.answers[..] else { panic!("{:?}", bench.answers) };
    assert_eq!(asker.connection, 2);
    bench.rule.at_wait_end = AtWaitEnd::Miss;
    bench.answers.clear();
    bench.get(3);
    bench.pass(RULE.wait);
    assert_eq!(bench.answered(), [(3, Reply::Nil(Why::WaitEnd))]);
}

/// How long a read waits in vain for a load that hangs. Its holder goes away at last.
fn waited_in_vain(bench: &mut Bench) -> Millis {
    bench.get(1_001);
    bench.get(1_002);
    let begun = bench.now;
    bench.answers.clear();
    while bench.answers.is_empty() {
        bench.pass(1);
    }
    assert!(matches!(bench.answers[..], [(_, Answer::TimedOut { .. })]), "{:?}", bench.answers);
    let waited = bench.now - begun;
    bench.close(1_001);
    // Its miss, and that of who waited, are outstanding for so long.
    bench.pass(RULE.memory);
    waited
}

/// So many loads, one after the other, that take so long.
fn load(bench: &mut Bench, loads: u64, took: Millis) {
    for connection in 1..=loads {
        bench.slots[0].delete(bench.now);
        bench.get(connection);
        bench.pass(took);
        bench.write(connection, 1);
        assert_eq!(bench.slots[0].get(bench.now), Some(1), "it is stored");
    }
    bench.slots[0].delete(bench.now);
    bench.answers.clear();
}

#[test]
fn where_nothing_is_said_of_a_wait_it_is_twice_what_loads_take() {
    let mut bench = Bench::new(1);
    bench.rule.wait_follows = true;
    assert_eq!(waited_in_vain(&mut bench), RULE.wait);
    load(&mut bench, 100, 10);
    assert_eq!(waited_in_vain(&mut bench), 250);
    load(&mut bench, 3, 200);
    assert!((400..=450).contains(&waited_in_vain(&mut bench)), "three slow ones show");
    load(&mut bench, 3, 2_000);
    assert_eq!(waited_in_vain(&mut bench), RULE.wait, "those that outlast every wait count as well");
    bench.rule.wait_follows = false;
    load(&mut bench, 300, 10);
    assert_eq!(waited_in_vain(&mut bench), RULE.wait, "a wait that is given is what it is");
}

#[test]
fn a_load_that_outlasts_its_lease_counts_from_its_own_nil() {
    let mut bench = Bench::new(1);
    bench.rule.wait_follows = true;
    load(&mut bench, 100, 10);
    for round in 0..3 {
        let slow = 500 + 2 * round;
        bench.get(slow);
        bench.pass(RULE.lease + 50);
        bench.get(slow + 1);
        bench.pass(10);
        bench.write(slow, 1);
        bench.close(slow + 1);
        bench.slots[0].delete(bench.now);
    }
    assert!(bench.pods[0].load_p99(1, bench.now) > Some(RULE.lease));
}

#[test]
fn a_value_loaded_before_a_deletion_is_not_stored_after_it() {
    let mut bench = Bench::new(1);
    bench.get(1);
    bench.slots[0].delete(bench.now);
    bench.write(1, 1);
    assert_eq!(bench.slots[0].get(bench.now), None);
}

#[test]
fn a_deletion_in_the_midst_of_a_load_costs_that_load_and_the_next_and_no_more() {
    for pods in [1, 2, 5] {
        let mut bench = Bench::new(pods);
        bench.get(1);
        assert_eq!(bench.leads(), [1]);
        bench.slots[0].delete(bench.now);
        bench.get(2);
        bench.pass(FIRST_LOOK_MS);
        assert_eq!(bench.leads(), [2]);
        bench.get(3);
        bench.pass(FIRST_LOOK_MS);
        // The first one's is refused. The third does not begin beside the second, whose load is as good as refused, too.
        bench.write(1, 1);
        bench.pass(FIRST_LOOK_MS);
        assert_eq!(bench.leads(), Vec::<u64>::new());
        bench.write(2, 2);
        assert_eq!(bench.slots[0].get(bench.now), None);
        assert_eq!(bench.leads(), [3]);
        bench.write(3, 3);
        assert_eq!(bench.slots[0].get(bench.now), Some(3), "{pods} pods");
    }
}

#[test]
fn a_holder_whose_generation_has_ended_is_succeeded_when_it_goes() {
    let mut bench = Bench::new(2);
    bench.get(1);
    bench.slots[0].delete(bench.now);
    bench.get(2);
    assert_eq!(bench.leads(), [1, 2]);
    bench.get(3);
    bench.write(1, 1);
    assert_eq!(bench.leads(), Vec::<u64>::new());
    bench.close(2);
    bench.pass(FIRST_LOOK_MS);
    assert_eq!(bench.leads(), [3]);
}

#[test]
fn a_second_set_soon_after_a_miss_is_never_the_first() {
    let mut bench = Bench::new(1);
    bench.get(1);
    bench.write(1, 1);
    bench.write(1, 2);
    assert_eq!(bench.slots[0].get(bench.now), None);
    bench.pass(RULE.settle);
    assert_eq!(bench.write(1, 3), Verdict::Update);
    assert_eq!(bench.slots[0].get(bench.now), Some(3));
}

#[test]
fn a_late_fill_over_another_connection_than_its_closed_one_is_not_taken_for_an_update() {
    let mut bench = Bench::new(1);
    bench.get(1);
    bench.close(1);
    bench.slots[0].delete(bench.now);
    bench.pass(RULE.memory - 1);
    bench.write(2, 1);
    assert_eq!(bench.slots[0].get(bench.now), None);
}

#[test]
fn a_set_that_fails_after_all_else_is_over_leaves_its_key_in_doubt() {
    let mut bench = Bench::new(1);
    bench.get(1);
    let sent = bench.pods[0].write(bench.now, 1, 0, KEYS[0], &mut Vec::new());
    assert!(matches!(sent, Verdict::Fill(_)), "{sent:?}");
    bench.with(0, |desk, now, effects| desk.topology_changed(now, effects));
    bench.pass(RULE.settle);
    bench.with(0, |desk, now, effects| desk.wrote(now, 1, 0, KEYS[0], Written::Failed, effects));
    // The client sends it again, and may have loaded it before another's deletion.
    assert_eq!(bench.write(1, 1), Verdict::Ambiguous(Doubt::Forgotten));
    bench.pass(2 * RULE.memory);
    assert_eq!(bench.write(1, 2), Verdict::Update);
}

#[test]
fn a_token_that_is_refused_ends_no_other_load() {
    let mut bench = Bench::new(1);
    bench.get(1);
    let Some(first) = bench.slots[0].lease.as_ref().map(|lease| lease.generation) else { panic!("a lease") };
    bench.slots[0].delete(bench.now);
    bench.pass(RULE.lease);
    bench.get(2);
    bench.slots[0].delete(bench.now);
    // The first one's token is no longer good. The second's load is not over by that.
    for connection in [1, 3] {
        bench.with(0, |desk, now, effects| desk.redeemed(now, connection, 0, KEYS[0], first, Written::Unchanged, effects));
    }
    assert!(matches!(bench.write(4, 5), Verdict::Fill(_)), "it may be the second's");
    assert_eq!(bench.slots[0].get(bench.now), None);
}

#[test]
fn a_token_that_is_good_ends_its_own_load_and_wakes_who_waits() {
    let mut bench = Bench::new(1);
    bench.get(1);
    bench.get(2);
    assert_eq!(bench.leads(), [1]);
    let Some(token) = bench.slots[0].lease.as_ref().map(|lease| lease.generation) else { panic!("a lease") };
    bench.slots[0].fill(bench.now, RUN, Verdict::Fill(token), &set(6));
    bench.with(0, |desk, now, effects| desk.redeemed(now, 1, 0, KEYS[0], token, Written::Stored, effects));
    assert_eq!(bench.answered(), [(2, Reply::Value(6))]);
    bench.pass(RULE.settle);
    assert_eq!(bench.write(1, 7), Verdict::Update, "nothing is outstanding");
}

#[test]
fn two_loads_of_the_same_row_do_not_delete_each_other() {
    let mut bench = Bench::new(2);
    bench.get(1);
    bench.pass(RULE.lease);
    bench.get(2);
    assert_eq!(bench.leads(), [1, 2]);
    bench.write(1, 9);
    bench.write(2, 9);
    assert_eq!(bench.slots[0].get(bench.now), Some(9));
}

#[test]
fn a_rule_whose_loads_are_seldom_stored_disarms_itself() {
    let mut bench = Bench::new(1);
    for connection in 1..=64 {
        bench.slots[0].delete(bench.now);
        bench.get(connection);
        bench.close(connection);
    }
    assert_eq!(bench.disarmed, [1]);
    assert!(!bench.pods[0].is_armed(1, bench.now));
    bench.answers.clear();
    (100..110).for_each(|connection| bench.get(connection));
    assert!(bench.answered().iter().all(|(_, reply)| *reply == Reply::Nil(Why::Untracked)));
    bench.pass(60_000);
    assert!(bench.pods[0].is_armed(1, bench.now));
}

#[test]
fn nothing_is_kept_when_all_is_over() {
    let mut bench = Bench::new(1);
    (1..=10).for_each(|connection| bench.get(connection));
    bench.write(1, 1);
    bench.pass(RULE.memory * 2);
    let desk = &bench.pods[0];
    assert_eq!((desk.waiting(), desk.outstanding(), desk.next_deadline()), (0, 0, None));
}

#[test]
fn however_many_misses_there_are_a_bounded_number_is_kept_and_none_is_taken_for_over() {
    let (mut desk, mut effects) = (Desk::<u32>::new(1), Vec::new());
    let key = |number: u32| number.to_be_bytes();
    for number in 0..3 * desk::MOST_MISSES as u32 {
        let reader = Reader { asker: Asker { connection: 1, place: number }, database: 0, overtaken: false, shared: true };
        let key = key(number);
        desk.read_missed(1_000, reader, &[Missing { key: &key, rule: RULE }], &mut effects);
        let Some(Effect::Ask { name, fresh, .. }) = effects.pop() else { panic!("{effects:?}") };
        let token = Token { generation: Generation { random: fresh, run: RUN }, taker: fresh };
        desk.begun(1_000, &name, fresh, Begun::Leased { token, stale: None }, &mut effects);
        effects.clear();
        assert!(desk.outstanding() <= desk::MOST_MISSES);
    }
    for number in (0..3 * desk::MOST_MISSES as u32).step_by(1_000) {
        assert_ne!(desk.write(1_000 + RULE.memory - 1, 2, 0, &key(number), &mut effects), Verdict::Update, "{number}");
    }
    desk.tick(1_000 + RULE.memory, &mut effects);
    assert_eq!((desk.outstanding(), desk.next_deadline()), (0, None));
}

#[test]
fn generations_are_read_as_they_are_written() {
    let generation = Generation { random: 0x0123_4567_89ab_cdef, run: 0x0000_00ff };
    let text = generation.to_string();
    assert_eq!((text.as_str(), text.len()), ("0123456789abcdef@000000ff", Generation::LEN));
    assert_eq!(Generation::parse(text.as_bytes()), Some(generation));
    for wrong in ["", "x", "0123456789abcdef0000000ff", "+123456789abcdef@000000ff", "0123456789abcde@0000000ff"] {
        assert_eq!(Generation::parse(wrong.as_bytes()), None, "{wrong}");
    }
}

#[test]
fn leads_that_writes_ended_say_nothing_of_a_rule() {
    let mut bench = Bench::new(1);
    for _ in 0..200 {
        bench.get(1);
        bench.slots[0].delete(bench.now);
        bench.pass(10);
    }
    assert_eq!(bench.disarmed, Vec::<u16>::new());
    for _ in 0..1_000 {
        bench.get(1);
        bench.pass(RULE.lease);
    }
    assert!(!bench.disarmed.is_empty(), "nobody fills");
}

#[test]
fn a_fill_that_overtakes_another_which_is_under_way_is_held_against_what_that_one_ended() {
    let mut bench = Bench::new(1);
    bench.get(1);
    bench.slots[0].delete(bench.now);
    bench.get(2);
    bench.with(0, |desk, now, effects| desk.wake(now, 0, KEYS[0], effects));
    assert_eq!(bench.leads(), [1, 2]);
    // A pool swaps the connections: the newer value comes over the older's.
    let mut effects = Vec::new();
    let newer = bench.pods[0].write(bench.now, 1, 0, KEYS[0], &mut effects);
    assert_eq!(newer, Verdict::Ambiguous(Doubt::Mixed));
    // It is on its way over another of the pod's connections to the cache when this one is carried out.
    assert_eq!(bench.write(2, 1), Verdict::Ambiguous(Doubt::Mixed));
    assert_eq!(bench.slots[0].get(bench.now), None, "nothing was loaded since the deletion but the other's");
    let written = bench.slots[0].fill(bench.now, RUN, newer, &set(2));
    bench.run(0, effects);
    bench.with(0, |desk, now, effects| desk.wrote(now, 1, 0, KEYS[0], written, effects));
    bench.pass(RULE.settle);
    bench.get(3);
    assert!(matches!(bench.write(3, 3), Verdict::Fill(_)));
    assert_eq!(bench.slots[0].get(bench.now), Some(3));
}

/// Three loads of one pool. The first outlasts its lease, and its SET, over a connection that nobody reads by, is counted against the
/// second's nil; the second's comes over the third's connection.
#[test]
fn what_stands_for_a_younger_load_is_heard_over_all_connections() {
    let mut bench = Bench::new(1);
    bench.get(1);
    bench.pass(3 * RULE.lease);
    bench.slots[0].delete(bench.now);
    bench.get(1);
    assert_eq!(bench.leads(), [1, 1], "the connection was lent");
    assert_eq!(bench.write(4, 1), Verdict::Ambiguous(Doubt::Mixed));
    bench.slots[0].delete(bench.now);
    bench.get(2);
    assert_eq!(bench.leads(), [2]);
    assert_eq!(bench.write(2, 2), Verdict::Ambiguous(Doubt::Mixed));
    assert_eq!(bench.slots[0].get(bench.now), None);
}

/// Nor where the first was stored, which took the second's nil.
#[test]
fn what_is_stored_late_leaves_its_own_nil_to_speak_for_the_younger_load() {
    let mut bench = Bench::new(1);
    bench.get(1);
    bench.pass(3 * RULE.lease);
    bench.get(1);
    assert_eq!(bench.leads(), [1, 1], "nothing was written since the first one's nil");
    assert!(matches!(bench.write(4, 1), Verdict::Fill(_)));
    bench.slots[0].delete(bench.now);
    bench.get(2);
    assert_eq!(bench.leads(), [2]);
    assert_eq!(bench.write(2, 1), Verdict::Ambiguous(Doubt::Mixed));
    assert_eq!(bench.slots[0].get(bench.now), None);
}

/// The same once more: the third's SET comes over a fourth's connection, when it is a lease since the first was refused.
#[test]
fn it_stands_for_the_next_one_as_long_as_that_may_load() {
    let mut bench = Bench::new(1);
    bench.get(1);
    bench.pass(3 * RULE.lease);
    bench.slots[0].delete(bench.now);
    bench.get(1);
    assert_eq!(bench.write(4, 1), Verdict::Ambiguous(Doubt::Mixed));
    bench.pass(RULE.lease - 200);
    bench.slots[0].delete(bench.now);
    bench.get(2);
    bench.pass(100);
    assert_eq!(bench.write(2, 2), Verdict::Ambiguous(Doubt::Mixed));
    bench.pass(200);
    bench.slots[0].delete(bench.now);
    bench.get(3);
    assert_eq!(bench.leads(), [1, 1, 2, 3]);
    assert_eq!(bench.write(3, 3), Verdict::Ambiguous(Doubt::Mixed));
    // Nothing is handed on for ever.
    bench.pass(RULE.lease);
    bench.get(3);
    assert!(matches!(bench.write(3, 4), Verdict::Fill(_)));
    assert_eq!(bench.slots[0].get(bench.now), Some(4));
}
