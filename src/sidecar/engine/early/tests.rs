//! Early expiry with the desks of several pods, a cache as [`model`] has it, and readers at random, in virtual time.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use super::super::lease::model::{Condition, Set, Slot};
use super::super::lease::{
    Asker, Desk, Effect, Millis, Missing, Mode, Name, Reader, Reply, Rule, Verdict, Why, Written, key_hash,
};
use super::*;

const KEY: &[u8] = b"hot";
const TTL_MS: Millis = 10_000;
const LOAD_MS: Millis = 200;
const RULE: Rule = Rule::new(1, 3_000, 1_000);
const PODS: usize = 5;

/// What a run cost.
#[derive(Debug, Default)]
struct Cost {
    reads: u64,
    /// Loads while the value was still there.
    early: u64,
    /// Loads after it had expired.
    late: u64,
    /// Reads that had to wait.
    waited: u64,
    /// Commands beyond the reads themselves and the SETs.
    extra: u64,
}

/// Five pods, each with a desk and hints, and one key in the cache. What a reader was told to load it stores after
/// [`LOAD_MS`].
struct Bench {
    now: Millis,
    random: fastrand::Rng,
    pods: Vec<(Desk<u32>, Early)>,
    slot: Slot<u32>,
    loads: BinaryHeap<Reverse<(Millis, usize, u64)>>,
    next: u64,
    cost: Cost,
    /// Broken, to see that it is noticed: the cache gives the lease for a key whatever its life.
    fresh_ignored: bool,
}

impl Bench {
    fn new(seed: u64) -> Self {
        let pods = (0..PODS as u64).map(|pod| (Desk::new(seed * 100 + pod), Early::default())).collect();
        let random = fastrand::Rng::with_seed(seed);
        let (slot, loads, cost) = (Slot::default(), BinaryHeap::new(), Cost::default());
        Self { now: 0, random, pods, slot, loads, next: 0, cost, fresh_ignored: false }
    }

    fn run(&mut self, reads_per_s: f64, cycles: u64) {
        let end = cycles * TTL_MS;
        let mut at = 0.0;
        while self.now < end {
            at += -(1.0 - self.random.f64()).ln() * 1_000.0 / reads_per_s;
            let at = at as Millis;
            while let Some(Reverse((done, pod, connection))) = self.loads.peek().copied().filter(|load| load.0.0 <= at) {
                self.loads.pop();
                self.tick(done);
                self.store(pod, connection);
            }
            self.tick(at);
            self.read();
        }
    }

    fn tick(&mut self, now: Millis) {
        self.now = now;
        for pod in 0..PODS {
            while self.pods[pod].0.next_deadline().is_some_and(|due| due <= now) {
                let mut effects = Vec::new();
                self.pods[pod].0.tick(now, &mut effects);
                self.carry_out(pod, effects);
            }
        }
    }

    fn read(&mut self) {
        self.cost.reads += 1;
        self.next += 1;
        let pod = self.random.usize(..PODS);
        let asker = Asker { connection: self.next, place: 0 };
        let (desk, early) = &mut self.pods[pod];
        let hash = key_hash(0, KEY);
        let advice = early.advise(hash, self.now, || desk.load_ms(1), || self.random.u32(..));
        let missing = Missing { key: KEY, rule: RULE };
        let mut effects = Vec::new();
        match (self.slot.get(self.now), advice) {
            (Some(_), Advice::Refresh { left }) => {
                desk.expires_early(self.now, asker, 0, &missing, left, &mut effects);
            }
            (Some(_), Advice::Probe) => {
                self.cost.extra += 1;
                let life = self.slot.value.as_ref().map_or(Life::Over, |kept| Life::Ends(kept.until - self.now));
                early.probed(hash, self.now, life);
            }
            (Some(_), Advice::Pass) => {}
            (None, _) => {
                let reader = Reader { asker, database: 0, overtaken: false, shared: false };
                desk.read_missed(self.now, reader, &[missing], &mut effects);
                self.cost.waited += 1;
            }
        }
        self.carry_out(pod, effects);
    }

    fn carry_out(&mut self, pod: usize, effects: Vec<Effect<u32>>) {
        for effect in effects {
            match effect {
                Effect::Ask { mode, fresh, rule, .. } => {
                    self.cost.extra += u64::from(matches!(mode, Mode::Early { .. }));
                    let mode = match mode {
                        Mode::Early { .. } if self.fresh_ignored => Mode::Early { left: TTL_MS * 2 },
                        mode => mode,
                    };
                    let begun = self.slot.begin(self.now, 1, fresh, mode, &rule);
                    let name = Name { database: 0, key: KEY.into() };
                    let mut effects = Vec::new();
                    self.pods[pod].0.begun(self.now, &name, fresh, begun, &mut effects);
                    self.carry_out(pod, effects);
                }
                Effect::Early { asker, refresh } => {
                    self.pods[pod].1.silence(key_hash(0, KEY), self.now + RULE.lease);
                    if refresh {
                        self.cost.early += 1;
                        self.loads.push(Reverse((self.now + LOAD_MS, pod, asker.connection)));
                    }
                }
                Effect::Answer { asker, answer: super::super::lease::Answer::Replies(replies) } => {
                    if replies[0] == Reply::Nil(Why::Lead) {
                        self.cost.late += 1;
                        self.loads.push(Reverse((self.now + LOAD_MS, pod, asker.connection)));
                    }
                }
                Effect::GiveBack { token, .. } => _ = self.slot.release(self.now, token),
                Effect::Answer { .. } | Effect::Watch { .. } | Effect::Unwatch { .. } | Effect::Disarmed { .. } => {}
            }
        }
    }

    fn store(&mut self, pod: usize, connection: u64) {
        let mut effects = Vec::new();
        let verdict = self.pods[pod].0.write(self.now, connection, 0, KEY, &mut effects);
        assert!(matches!(verdict, Verdict::Fill(_)), "a fill was taken for {verdict:?}");
        // No two loads bring the same.
        self.next += 1;
        let set = Set { value: self.next as u32, condition: Condition::Always, ttl: TTL_MS, stale_ttl: 0 };
        assert_eq!(self.slot.fill(self.now, 1, verdict, &set), Written::Stored);
        self.pods[pod].1.stored(key_hash(0, KEY), self.now, TTL_MS);
        self.pods[pod].0.wrote(self.now, connection, 0, KEY, Written::Stored, &mut effects);
        self.carry_out(pod, effects);
    }
}

/// How many readers load when nobody protects the key: all who come between its expiry and the first one's SET.
fn unprotected(reads_per_s: f64, cycles: u64, seed: u64) -> f64 {
    let mut random = fastrand::Rng::with_seed(seed);
    let (mut at, mut until, mut first_stores) = (0.0, 0.0, f64::MAX);
    let (mut loads, mut expiries) = (0u64, 0u64);
    while expiries < cycles {
        at += -(1.0 - random.f64()).ln() * 1_000.0 / reads_per_s;
        if at >= first_stores {
            until = first_stores + TTL_MS as f64;
            first_stores = f64::MAX;
        }
        if at >= until {
            loads += 1;
            if first_stores == f64::MAX {
                expiries += 1;
                first_stores = at + LOAD_MS as f64;
            }
        }
    }
    loads as f64 / expiries as f64
}

#[test]
fn an_expiry_costs_one_load_at_any_rate() {
    println!("reads/s  loads per expiry  of these early  reads that waited  extra commands  loads unprotected");
    for reads_per_s in [100.0, 1_000.0, 10_000.0] {
        let cycles = if reads_per_s > 5_000.0 { 20 } else { 100 };
        let mut bench = Bench::new(7);
        bench.run(reads_per_s, cycles);
        let cost = bench.cost;
        // Without early expiry there would be one in each cycle.
        let loads = (cost.early + cost.late) as f64 / cycles as f64;
        let early = cost.early as f64 / (cost.early + cost.late) as f64;
        let extra = cost.extra as f64 / cost.reads as f64;
        let alone = unprotected(reads_per_s, 50, 7);
        println!("{reads_per_s:7}  {loads:16.2}  {early:14.2}  {:17}  {extra:14.4}  {alone:17.1}", cost.waited);
        assert!((0.8..=1.3).contains(&loads), "{loads} loads an expiry at {reads_per_s} reads/s");
        assert!(early > 0.8, "{early} of the loads came before the expiry, at {reads_per_s} reads/s");
        assert!(extra <= 0.05, "{extra} commands more for a read");
        assert!(alone > reads_per_s * 0.15, "{alone} loads when unprotected: too few to show anything");
    }
}

/// What a pod thinks of a key's life may be over: others have refreshed it.
#[test]
fn without_the_question_how_long_a_key_lives_several_pods_refresh_it() {
    let mut bench = Bench { fresh_ignored: true, ..Bench::new(7) };
    bench.run(1_000.0, 100);
    let loads = (bench.cost.early + bench.cost.late) as f64 / 100.0;
    assert!(loads > 1.6, "{loads} loads an expiry: the test shows nothing");
}

#[test]
fn hints_cost_one_command_in_twenty_five_whatever_is_read() {
    for keys in [1u64, 100, 20_000, 1_000_000] {
        let (mut early, mut random) = (Early::default(), fastrand::Rng::with_seed(keys));
        let (mut probes, reads) = (0, 200_000u64);
        for read in 0..reads {
            let key = random.u64(..keys).wrapping_mul(0x9e37_79b9_7f4a_7c15);
            match early.advise(key, read / 10, || 200.0, || random.u32(..)) {
                Advice::Probe => {
                    probes += 1;
                    early.probed(key, read / 10, Life::Ends(500));
                }
                Advice::Pass | Advice::Refresh { .. } => {}
            }
        }
        assert!(probes * u64::from(READS_PER_PROBE) <= reads, "{probes} PTTLs for {reads} reads of {keys} keys");
        assert!(keys > 100 || probes > 0, "hot keys get their hints");
    }
}

#[test]
fn the_dice_fall_as_xfetch_says() {
    let mut random = fastrand::Rng::with_seed(1);
    // At one load's time before the expiry 37 reads of a hundred refresh, at twice that time 14.
    for (left, expected) in [(200, 0.368), (400, 0.135), (100, 0.607)] {
        let count = (0..100_000).filter(|_| matches!(roll(left, 200.0, || random.u32(..)), Advice::Refresh { .. })).count();
        let share = count as f64 / 100_000.0;
        assert!((share - expected).abs() < 0.01, "{share} at {left} ms");
    }
    assert_eq!(roll(60_000, 200.0, || 0), Advice::Pass, "no luck reaches that far");
    assert!(matches!(roll(1, 200.0, || u32::MAX / 2), Advice::Refresh { left: 1 }));
}

#[test]
fn a_silenced_key_is_left_alone_and_a_deleted_one_forgotten() {
    let mut early = Early::default();
    early.stored(5, 0, 100);
    assert!(matches!(early.advise(5, 50, || 200.0, || 0), Advice::Refresh { left: 50 }));
    early.silence(5, 3_050);
    assert_eq!(early.advise(5, 90, || 200.0, || 0), Advice::Pass);
    early.stored(5, 200, 10_000);
    assert!(matches!(early.advise(5, 10_190, || 200.0, || 0), Advice::Refresh { left: 10 }));
    early.deleted(5);
    assert_eq!(early.advise(5, 10_190, || 200.0, || 0), Advice::Pass);
}

#[test]
fn another_keys_hint_is_kept_while_it_is_good() {
    let (mine, yours) = (1 << 50 | 9, 2 << 50 | 9);
    let mut early = Early::default();
    early.stored(mine, 0, 1_000);
    early.stored(yours, 0, 1_000);
    assert!(matches!(early.advise(mine, 999, || 200.0, || 0), Advice::Refresh { left: 1 }));
    early.stored(yours, 1_000, 1_000);
    assert!(matches!(early.advise(yours, 1_999, || 200.0, || 0), Advice::Refresh { left: 1 }), "it expired");
}

#[test]
fn a_key_without_a_ttl_is_not_asked_about_again_and_again() {
    let (mut early, mut probes) = (Early::default(), 0);
    for read in 0..100_000u64 {
        if early.advise(7, read / 10, || 200.0, || 1) == Advice::Probe {
            probes += 1;
            early.probed(7, read / 10, Life::from_pttl(Some(-1)));
        }
    }
    assert!((1..=2).contains(&probes), "{probes} PTTLs within ten seconds");
    early.stored(7, 10_000, 1_000);
    assert!(
        matches!(early.advise(7, 10_990, || 200.0, || 0), Advice::Refresh { left: 10 }),
        "a write that gives it a life counts"
    );
    assert_eq!(Life::from_pttl(Some(-2)), Life::Over);
    assert_eq!(Life::from_pttl(Some(0)), Life::Ends(0));
}
