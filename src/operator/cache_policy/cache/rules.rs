//! What is counted for the rules of a binding, over all processes that ever told of it. Pure.

use std::collections::{BTreeMap, HashMap};

use tokio::time::Instant;

use crate::policy::heartbeat::{RuleBeat, UNMATCHED};
use crate::policy::snapshot::MAX_RULES;

/// How many counts there are for each rule.
const COUNTERS: usize = 13;

/// The counts of one rule, in the order of [`counters`].
type Counts = [u64; COUNTERS];

/// One count of a process that is not zero: which, and how much it was at the most. It only ever rises.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Count {
    at: u32,
    value: u64,
}

/// A rule.
#[derive(Debug)]
struct Rule {
    name: Box<str>,
    /// Since when it is one.
    since: Instant,
    /// Of all processes, all the time.
    all: Counts,
    /// What was added since the last mark, and between the last two.
    now: Counts,
    before: Counts,
}

/// The rules of a binding's snapshot, and keys that none covers, with what was counted for each.
#[derive(Debug)]
pub struct Rules {
    rules: Vec<Rule>,
    places: HashMap<Box<str>, u32>,
}

/// How another list of rules changes the places of counts.
#[derive(Debug)]
pub struct Moves(Vec<Option<u32>>);

impl Moves {
    /// What is left of a process' counts.
    pub fn apply(&self, counts: &[Count]) -> Box<[Count]> {
        let moved = |count: &Count| {
            let (rule, counter) = (count.at as usize / COUNTERS, count.at % COUNTERS as u32);
            let to = (*self.0.get(rule)?)?;
            Some(Count { at: to * COUNTERS as u32 + counter, value: count.value })
        };
        let mut moved: Vec<Count> = counts.iter().filter_map(moved).collect();
        moved.sort_unstable_by_key(|count| count.at);
        moved.into()
    }
}

impl Rules {
    /// No rule yet.
    pub fn new(now: Instant) -> Self {
        let mut rules = Self { rules: Vec::new(), places: HashMap::new() };
        let _ = rules.replace(now, std::iter::empty());
        rules
    }

    /// These are the rules now. What was counted for those that stay is kept. `None`: they are the same.
    pub fn replace<'a>(&mut self, now: Instant, names: impl Iterator<Item = &'a str>) -> Option<Moves> {
        let names: Vec<&str> = [UNMATCHED].into_iter().chain(names.take(MAX_RULES)).collect();
        if self.rules.iter().map(|rule| &*rule.name).eq(names.iter().copied()) {
            return None;
        }
        let mut old: HashMap<Box<str>, Rule> = self.rules.drain(..).map(|rule| (rule.name.clone(), rule)).collect();
        let before = std::mem::take(&mut self.places);
        for name in names {
            if self.places.contains_key(name) {
                continue;
            }
            self.places.insert(name.into(), place(self.rules.len()));
            let new = || Rule {
                name: name.into(),
                since: now,
                all: Counts::default(),
                now: Counts::default(),
                before: Counts::default(),
            };
            self.rules.push(old.remove(name).unwrap_or_else(new));
        }
        let mut moves = vec![None; before.len()];
        for (name, from) in before {
            if let Some(slot) = moves.get_mut(from as usize) {
                *slot = self.places.get(&name).copied();
            }
        }
        Some(Moves(moves))
    }

    /// What a process tells, with what it told before. A message that comes late or twice changes nothing.
    pub fn merge(&self, before: &[Count], told: &[RuleBeat]) -> Box<[Count]> {
        let known = told.iter().filter_map(|beat| Some((*self.places.get(beat.name.as_str())?, counters(beat))));
        let counts = known.flat_map(|(rule, counts)| {
            let at = move |counter| rule * COUNTERS as u32 + counter;
            (0u32..).zip(counts).filter(|(_, value)| *value > 0).map(move |(counter, value)| Count { at: at(counter), value })
        });
        let mut merged: Vec<Count> = before.iter().copied().chain(counts).collect();
        merged.sort_unstable_by_key(|count| (count.at, std::cmp::Reverse(count.value)));
        merged.dedup_by_key(|count| count.at);
        merged.into()
    }

    /// Adds what a process counted beyond what it had told before. `lately`: whether that happened in the time since.
    pub fn add(&mut self, before: &[Count], after: &[Count], lately: bool) {
        let mut earlier = before.iter().peekable();
        for count in after {
            while earlier.next_if(|earlier| earlier.at < count.at).is_some() {}
            let known = earlier.peek().filter(|earlier| earlier.at == count.at).map_or(0, |earlier| earlier.value);
            let more = count.value.saturating_sub(known);
            let (rule, counter) = (count.at as usize / COUNTERS, count.at as usize % COUNTERS);
            let Some(rule) = self.rules.get_mut(rule) else { continue };
            for counts in [Some(&mut rule.all), lately.then_some(&mut rule.now)].into_iter().flatten() {
                counts[counter] = counts[counter].saturating_add(more);
            }
        }
    }

    /// A while has passed: what is recent is what was counted since the last time that this was said.
    pub fn mark(&mut self) {
        for rule in &mut self.rules {
            rule.before = std::mem::take(&mut rule.now);
        }
    }

    /// All that was counted.
    pub fn all(&self) -> BTreeMap<String, RuleBeat> {
        beats(self.rules.iter().map(|rule| (rule, rule.all)))
    }

    /// What was counted lately.
    pub fn recent(&self) -> BTreeMap<String, RuleBeat> {
        beats(self.rules.iter().map(|rule| (rule, rule.recent())))
    }

    /// What was counted lately for each rule of the snapshot, by its name.
    pub fn lately(&self) -> impl Iterator<Item = (&str, RuleBeat)> {
        self.rules.iter().map(|rule| (&*rule.name, beat(&rule.name, &rule.recent()))).filter(|(name, _)| *name != UNMATCHED)
    }

    /// Rules that have been there since `moment` and for which nothing was ever counted.
    pub fn quiet_since(&self, moment: Instant) -> impl Iterator<Item = &str> {
        let quiet = move |rule: &&Rule| rule.since <= moment && rule.all == Counts::default() && &*rule.name != UNMATCHED;
        self.rules.iter().filter(quiet).map(|rule| &*rule.name)
    }

    /// How many reads there were lately, of whatever keys.
    pub fn recent_reads(&self) -> u64 {
        self.rules.iter().map(|rule| beat("", &rule.recent())).fold(0, |sum, beat| sum.saturating_add(reads(&beat)))
    }
}

impl Rule {
    fn recent(&self) -> Counts {
        let mut recent = self.now;
        recent.iter_mut().zip(self.before).for_each(|(now, before)| *now = now.saturating_add(before));
        recent
    }
}

/// Reads of a rule's keys.
pub fn reads(beat: &RuleBeat) -> u64 {
    beat.hits.saturating_add(beat.misses)
}

fn beats<'a>(counted: impl Iterator<Item = (&'a Rule, Counts)>) -> BTreeMap<String, RuleBeat> {
    let counted = counted.filter(|(_, counts)| *counts != Counts::default());
    counted.map(|(rule, counts)| (rule.name.to_string(), beat(&rule.name, &counts))).collect()
}

/// A place in the list of rules, which is short.
fn place(index: usize) -> u32 {
    u32::try_from(index).unwrap_or(u32::MAX)
}

fn counters(beat: &RuleBeat) -> Counts {
    let RuleBeat {
        name: _,
        hits,
        misses,
        loads,
        load_errors,
        loads_saved,
        stale,
        leases,
        wait_timeouts,
        never_filled,
        refused_fills,
        without_ttl,
        predicted_loads_saved,
        predicted_without_ttl,
    } = *beat;
    [
        hits,
        misses,
        loads,
        load_errors,
        loads_saved,
        stale,
        leases,
        wait_timeouts,
        never_filled,
        refused_fills,
        without_ttl,
        predicted_loads_saved,
        predicted_without_ttl,
    ]
}

fn beat(name: &str, counts: &Counts) -> RuleBeat {
    let [
        hits,
        misses,
        loads,
        load_errors,
        loads_saved,
        stale,
        leases,
        wait_timeouts,
        never_filled,
        refused_fills,
        without_ttl,
        predicted_loads_saved,
        predicted_without_ttl,
    ] = *counts;
    RuleBeat {
        name: name.to_owned(),
        hits,
        misses,
        loads,
        load_errors,
        loads_saved,
        stale,
        leases,
        wait_timeouts,
        never_filled,
        refused_fills,
        without_ttl,
        predicted_loads_saved,
        predicted_without_ttl,
    }
}
