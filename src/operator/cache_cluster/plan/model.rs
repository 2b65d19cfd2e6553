//! The planner against a modelled cluster of pods under agents and sentinels, while everything fails.
//!
//! Agents and Sentinel are modelled by what they promise; Kubernetes by what it does with pods. A run is a seed: what happens, and
//! when, follows from it. In each run, nothing that the planner does may take the last copy of what was acknowledged, contradict
//! sentinels that could fail over, or disrupt two things at once; when the faults end, the cluster must come to rest as it is
//! desired, its sentinels spread over the nodes, within a bounded number of steps. Each rule of the planner, switched off, must make some run fail. A run that fails is shown
//! step by step with `RUN=n cargo test one_run -- --nocapture`.

mod actors;
mod operator;
mod world;

use operator::{Operator, TAKEOVER_TICKS, TICK};
use world::{Fault, Image, Process, Verdict, World};

use super::rules::{Rule, test::switch_off};
use super::{Desired, Layout, Starter};

/// How many runs: fewer where the code is slow, because nothing is optimised.
const RUNS: u64 = if cfg!(debug_assertions) { 1_500 } else { 12_000 };
const SETTLE_TICKS: u32 = 4_000;
/// For how long nothing must be left to do before a run counts as at rest.
const REST_TICKS: u32 = 30;
/// How many steps may be needed from whatever state to rest.
const MAX_STEPS: u32 = 120;
/// For how long two servers that can be reached may act as primaries.
const MAX_TWO_PRIMARIES: u32 = 4 * TAKEOVER_TICKS;

fn pick<T: Copy>(rng: &mut fastrand::Rng, from: &[T]) -> T {
    from[rng.usize(0..from.len())]
}

fn desired(rng: &mut fastrand::Rng) -> Desired {
    let layout = Layout::Sentinel { sentinels: pick(rng, &[3, 3, 5]) };
    let takeover_after = TICK * TAKEOVER_TICKS;
    let durable = rng.bool();
    Desired { starter: Starter::Agent, durable, ..Desired::on_one_machine(layout, rng.u16(1..4), takeover_after) }
}

fn fault(rng: &mut fastrand::Rng) -> Fault {
    let (index, ticks) = (rng.usize(0..16), rng.u32(1..40));
    match rng.u32(0..42) {
        0..5 => Fault::KillServer(index),
        5 => Fault::Crash(index, 3 * ticks),
        6..8 => Fault::DeletePod(index),
        8..11 => Fault::KillPod(index),
        11 => Fault::KillAllPods,
        12..14 => Fault::DeleteSentinel(index),
        14..16 => Fault::KillSentinel(index, ticks),
        16 => Fault::LoseMemory,
        17..19 => Fault::Freeze(index, ticks),
        19..21 => Fault::Cut(index, ticks),
        21 => Fault::LoseNode(index),
        22..25 => Fault::OperatorAway(ticks),
        25..29 => Fault::Roll(Image::Good),
        29 => Fault::Roll(Image::Missing),
        30 => Fault::Roll(Image::Crashing),
        31 => Fault::RollSentinels,
        32..34 => Fault::Replicas(rng.u16(1..4)),
        34 => Fault::Sentinels(pick(rng, &[3, 5, 7])),
        35 => Fault::Pause,
        36..38 => Fault::Unpause,
        38..41 => Fault::Drain(index, 6 * ticks),
        _ => Fault::Nothing,
    }
}

struct Run {
    world: World,
    operator: Operator,
    two_primaries: u32,
    shown: bool,
}

impl Run {
    fn tick(&mut self, part: usize, struck: bool) -> Verdict {
        self.operator.turn(&mut self.world, part, struck)?;
        self.world.step()?;
        self.show(struck);
        let primaries = (0..self.world.servers.len()).filter(|index| self.world.acts(*index)).count();
        let cut = self.world.nodes.iter().any(|node| *node != world::Node::Up);
        self.two_primaries = if primaries > 1 && !cut && self.world.operator_away == 0 { self.two_primaries + 1 } else { 0 };
        Ok(())
    }

    fn show(&self, struck: bool) {
        if self.shown {
            let World { servers, sentinels, truth, .. } = &self.world;
            println!("--{} {truth} writes; {}", if struck { " fault;" } else { "" }, self.operator.waits_for());
            servers.iter().for_each(|server| println!("   {server:?}"));
            sentinels.iter().for_each(|sentinel| println!("   {:?}", sentinel.memory));
        }
    }

    /// Faults, each after some ticks; then rest.
    fn go(&mut self) -> Verdict {
        for _ in 0..self.world.rng.u32(0..60) {
            self.tick(usize::MAX, false)?;
        }
        for _ in 0..self.world.rng.u32(0..14) {
            let fault = fault(&mut self.world.rng);
            let part = if self.world.rng.u32(0..4) == 0 { self.world.rng.usize(0..3) } else { usize::MAX };
            let gap = if self.world.rng.bool() { self.world.rng.u32(0..6) } else { self.world.rng.u32(6..90) };
            if self.shown {
                println!("{fault:?}");
            }
            self.world.fail(fault);
            self.tick(part, true)?;
            for _ in 0..gap {
                self.tick(part.max(1), false)?;
            }
        }
        self.world.heal_faults();
        self.two_primaries = 0;
        self.settle()
    }

    fn settle(&mut self) -> Verdict {
        self.operator.steps = 0;
        for tick in 0..SETTLE_TICKS {
            // A person looks after a while, and accepts what is lost.
            if tick == SETTLE_TICKS / 2 {
                if !self.operator.waits_for_a_person() {
                    return Err(format!("it waits for nobody: {}", self.operator.waits_for()));
                }
                self.world.desired.accept_data_loss = true;
                self.operator.steps = 0;
            }
            self.tick(usize::MAX, false)?;
            if self.two_primaries > MAX_TWO_PRIMARIES {
                return Err("two servers act as primaries for too long".to_owned());
            }
            if self.operator.steps > MAX_STEPS {
                return Err(format!("it oscillates: {}", self.operator.waits_for()));
            }
            if self.operator.idle >= REST_TICKS && self.world.crowded().is_none() {
                return self.is_as_desired();
            }
        }
        Err(format!("it does not come to rest: {}", self.operator.waits_for()))
    }

    fn is_as_desired(&self) -> Verdict {
        let world = &self.world;
        let wrong = |what: String| Err(format!("at rest, {what}"));
        let (servers, sentinels) = (usize::from(world.desired.replicas) + 1, world.desired.sentinels().count());
        if (world.servers.len(), world.sentinels.len(), world.scale) != (servers, sentinels, (servers, sentinels)) {
            return wrong(format!("there are {} servers and {} sentinels", world.servers.len(), world.sentinels.len()));
        }
        let Some(primary) = world.named().filter(|primary| world.acts(*primary)) else { return wrong("nobody leads".to_owned()) };
        for (index, server) in world.servers.iter().enumerate() {
            let in_place = index == primary || world.follows_in_step(index, primary);
            let current = server.pod.is_some_and(|pod| pod.made_of == world.template);
            if !in_place || !current || (server.process == Process::Primary && index != primary) {
                return wrong(format!("server {index} is out of place or stale: {server:?}"));
            }
        }
        let all = |count: usize, but: usize| ((1u16 << count) - 1) as u8 & !(1 << but);
        for (index, sentinel) in world.sentinels.iter().enumerate() {
            let Some(memory) = sentinel.memory else { return wrong(format!("sentinel {index} watches nothing")) };
            let knows = (memory.primary, memory.replicas, memory.peers, memory.quorum);
            let wanted = (primary, all(servers, primary), all(sentinels, index), world.desired.quorum());
            let current = sentinel.pod.is_some_and(|pod| pod.made_of == world.sentinel_template);
            if knows != wanted || !current {
                return wrong(format!("sentinel {index} knows {knows:?}, not {wanted:?}, or is stale"));
            }
        }
        world.last_copy_is_there("at rest")
    }
}

fn run(seed: u64) -> Verdict {
    run_shown(seed, false)
}

fn run_shown(seed: u64, shown: bool) -> Verdict {
    let mut rng = fastrand::Rng::with_seed(seed);
    let desired = desired(&mut rng);
    let mut run = Run { world: World::new(rng.u64(..), desired), operator: Operator::new(), two_primaries: 0, shown };
    run.go().map_err(|what| format!("run {seed}: {what}"))
}

#[test]
fn every_cluster_keeps_its_data_and_comes_to_rest() {
    for seed in 0..RUNS {
        run(seed).unwrap();
    }
}

#[test]
fn one_run() {
    if let Some(seed) = std::env::var("RUN").ok().and_then(|seed| seed.parse().ok()) {
        run_shown(seed, true).unwrap();
    }
}

#[track_caller]
fn check_are_caught(rules: &[Rule], runs: u64) {
    for rule in rules {
        switch_off(Some(*rule));
        let caught = (0..runs).any(|seed| run(seed).is_err());
        switch_off(None);
        assert!(caught, "in {runs} runs nothing goes wrong without {rule:?}");
    }
}

#[test]
fn each_rule_is_needed() {
    use Rule::*;
    let roll = [OneAtATime, HealFirst, HandOverFirst, KeepLastCopy, ReplaceBroken, PauseHandovers, KeepPrimary, Pause];
    let heal = [RespectMajority, TellUnaware, KeepQuorum, RaiseQuorumLate, Prune, PruneSlowly, AwaitDiscovery, PruneBeforeLess];
    let spread = [MoveSentinels, MoveWhereRoom, MoveSlowly];
    check_are_caught(&[&roll[..], &heal[..], &spread[..]].concat(), 1_500);
}

/// They matter where several things fail at once.
#[test]
#[cfg_attr(debug_assertions, ignore = "thousands of runs take minutes without optimisation")]
fn each_rarer_rule_is_needed() {
    check_are_caught(&[Rule::Patience, Rule::BestCopy, Rule::HeedStarting, Rule::KeepMemory, Rule::ForgetStale], 12_000);
}
