//! What is heard of the sidecars of one binding, put together. Pure, and bounded: [`super::room`] says how.
//!
//! Messages may come twice, late, or never; processes come and go without a word, and whoever may publish on the channel may say anything.
//! - A process is known by its identity, its counts only ever rise, and a message adds what it is ahead of the greatest seen. So the sums
//!   are right whatever the order, and a restarted process, which has another identity, adds its own.
//! - Who is silent for three intervals is gone. While nothing can be heard, nobody is; afterwards each has that time anew.
//! - A process that is gone is remembered for ten minutes, so that one that was only cut off is not counted twice.
//! - Nonsense spoils the figures of its own binding, and nobody else's.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use super::figures::{Figures, MAX_GENERATIONS, MAX_NOTICES, Notice, Refusal};
use super::room::{COUNTS_OF_ONE, Room, SIDECARS_OF_ONE};
use super::rules::{self, Count, Rules};
use crate::policy::heartbeat::{Heartbeat, MAX_REASON_CHARS, RefusedSnapshot, interval};

/// After how many intervals all sidecars have spoken: one may be lost.
const WORDS: u32 = 2;
/// How many of its intervals a sidecar may be silent.
const SILENCES: u32 = 3;
/// How long a process that is gone is remembered.
const REMEMBERED: Duration = Duration::from_secs(600);
/// How long sidecars may go by an earlier interval: they read their number every half minute or so.
const CATCHES_UP: Duration = Duration::from_secs(60);
/// How far what is recent reaches back, at the least; twice that at the most.
const RECENT: Duration = Duration::from_secs(300);
/// The longest identity that is taken.
const MAX_IDENTITY: usize = 128;
/// How long a sidecar may be without a client before that is told.
const UNUSED_AFTER_SECONDS: u64 = 120;
/// How long a rule may match nothing before that is told, and how many reads there are meanwhile at the least.
const NEVER_MATCHED_AFTER: Duration = Duration::from_secs(600);
const NEVER_MATCHED_READS: u64 = 100;
/// How many reads of what nobody fills are told, at the least, and of how many.
const NEVER_FILLED: u64 = 100;
const NEVER_FILLED_OF: u64 = 10;
/// How many reads that waited in vain are told, at the least, and of how many that found nothing.
const IN_VAIN: u64 = 20;
const IN_VAIN_OF: u64 = 20;

/// One process.
#[derive(Debug)]
struct Sidecar {
    heard: Instant,
    gone: bool,
    uptime: u64,
    generation: Option<u64>,
    understands: u32,
    clients: u64,
    is_unused: bool,
    is_partly_counted: bool,
    refused: Option<Box<RefusedSnapshot>>,
    counts: Box<[Count]>,
}

/// What became of a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Taken {
    /// It is of a sidecar that lived before.
    Known,
    /// It is of one that did not.
    New,
    /// There is no room for another sidecar: it counts as one, and that is all.
    Crowded,
    /// It is no heartbeat.
    Nonsense,
}

impl Taken {
    /// As metrics have it.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Known => "known",
            Self::New => "new",
            Self::Crowded => "crowded",
            Self::Nonsense => "nonsense",
        }
    }
}

/// Sidecars for which there is no room, by how often they speak.
#[derive(Debug, Default)]
struct Crowd {
    since: Option<Instant>,
    now: u32,
    before: u32,
}

/// The sidecars of one binding.
#[derive(Debug)]
pub struct Heard {
    room: Arc<Room>,
    /// Since when everything is heard that is said; `Err`: nothing is, since then.
    listening: Result<Instant, Instant>,
    wanted: u64,
    rules: Rules,
    marked: Instant,
    sidecars: HashMap<Box<str>, Sidecar>,
    gone: usize,
    counts: usize,
    crowd: Crowd,
    /// How many they were told that they are, and before.
    told: u32,
    told_before: (u32, Instant),
}

impl Drop for Heard {
    fn drop(&mut self) {
        self.room.give_sidecars(self.sidecars.len());
        self.room.give_counts(self.counts);
    }
}

impl Heard {
    /// Nothing yet.
    pub fn new(room: Arc<Room>, now: Instant) -> Self {
        Self {
            room,
            listening: Err(now),
            wanted: 0,
            rules: Rules::new(now),
            marked: now,
            sidecars: HashMap::new(),
            gone: 0,
            counts: 0,
            crowd: Crowd::default(),
            told: 1,
            told_before: (1, now),
        }
    }

    /// This is the snapshot now.
    pub fn expect<'a>(&mut self, now: Instant, generation: u64, rules: impl Iterator<Item = &'a str>) {
        self.wanted = generation;
        let Some(moves) = self.rules.replace(now, rules) else { return };
        let before = self.counts;
        for sidecar in self.sidecars.values_mut() {
            sidecar.counts = moves.apply(&sidecar.counts);
        }
        self.counts = self.sidecars.values().map(|sidecar| sidecar.counts.len()).sum();
        self.room.give_counts(before.saturating_sub(self.counts));
    }

    /// Sidecars are told that they are so many: it is by this that they pause.
    pub fn told(&mut self, now: Instant, sidecars: u32) {
        if sidecars != self.told {
            self.told_before = (self.told, now);
            self.told = sidecars;
        }
    }

    /// From now on everything is heard.
    pub fn listen(&mut self, now: Instant) {
        self.listening = Ok(now);
    }

    /// From now on nothing is.
    pub fn deaf(&mut self, now: Instant) {
        if self.listening.is_ok() {
            self.listening = Err(now);
        }
    }

    /// Takes a message from the binding's channel.
    pub fn beat(&mut self, now: Instant, binding: &str, message: &[u8]) -> Taken {
        let beat = match Heartbeat::parse(message) {
            Ok(beat) if beat.binding == binding && (1..=MAX_IDENTITY).contains(&beat.sidecar.len()) => beat,
            _ => return Taken::Nonsense,
        };
        let is_known = self.sidecars.contains_key(beat.sidecar.as_str());
        let Some(mut sidecar) = self.take_out(now, &beat) else {
            self.crowd.saw(now, self.interval(now));
            return Taken::Crowded;
        };
        let (is_new, name) = (sidecar.gone, Box::from(beat.sidecar.as_str()));
        sidecar.hear(now, &beat);
        self.count(&mut sidecar, &beat, is_known);
        self.sidecars.insert(name, sidecar);
        if is_new { Taken::New } else { Taken::Known }
    }

    /// The process that speaks, as far as it is known; a new one counts as gone until it has spoken. `None`: there is no room for it.
    fn take_out(&mut self, now: Instant, beat: &Heartbeat) -> Option<Sidecar> {
        if let Some(known) = self.sidecars.remove(beat.sidecar.as_str()) {
            self.gone -= usize::from(known.gone);
            return Some(known);
        }
        if self.gone > 0 && self.sidecars.len() >= SIDECARS_OF_ONE {
            self.forget(|sidecar| sidecar.gone);
        }
        (self.sidecars.len() < SIDECARS_OF_ONE && self.room.take_sidecar()).then(|| Sidecar {
            heard: now,
            gone: true,
            uptime: 0,
            generation: None,
            understands: 0,
            clients: 0,
            is_unused: false,
            is_partly_counted: false,
            refused: None,
            counts: Box::default(),
        })
    }

    fn count(&mut self, sidecar: &mut Sidecar, beat: &Heartbeat, is_known: bool) {
        // What was counted before it was first heard may be long ago.
        let lately = is_known || beat.uptime_seconds <= RECENT.as_secs();
        let counts = self.rules.merge(&sidecar.counts, &beat.rules);
        let more = counts.len().saturating_sub(sidecar.counts.len());
        if self.counts + more > COUNTS_OF_ONE || !self.room.take_counts(more) {
            sidecar.is_partly_counted = true;
            return;
        }
        self.counts += more;
        self.rules.add(&sidecar.counts, &counts, lately);
        sidecar.counts = counts;
    }

    /// Time has passed.
    pub fn age(&mut self, now: Instant) {
        if now.duration_since(self.marked) >= RECENT {
            self.marked = now;
            self.rules.mark();
        }
        let Ok(since) = self.listening else { return };
        let patience = self.interval(now) * SILENCES;
        for sidecar in self.sidecars.values_mut().filter(|sidecar| !sidecar.gone) {
            sidecar.gone = now.duration_since(sidecar.heard.max(since)) > patience;
            self.gone += usize::from(sidecar.gone);
        }
        if self.gone > 0 {
            self.forget(|sidecar| sidecar.gone && now.duration_since(sidecar.heard) > REMEMBERED);
        }
    }

    fn forget(&mut self, which: impl Fn(&Sidecar) -> bool) {
        let (mut sidecars, mut gone, mut counts) = (0, 0, 0);
        self.sidecars.retain(|_, sidecar| {
            let goes = which(sidecar);
            if goes {
                sidecars += 1;
                gone += usize::from(sidecar.gone);
                counts += sidecar.counts.len();
            }
            !goes
        });
        self.gone -= gone;
        self.counts -= counts;
        self.room.give_sidecars(sidecars);
        self.room.give_counts(counts);
    }

    /// The longest time that a sidecar waits between two messages.
    fn interval(&self, now: Instant) -> Duration {
        let (before, since) = self.told_before;
        let (current, earlier) = (interval(self.told), interval(before));
        let caught_up = now.duration_since(since) > CATCHES_UP + earlier;
        if caught_up { current } else { current.max(earlier) }
    }

    /// How many live.
    pub fn live(&self, now: Instant) -> u32 {
        let known = u32::try_from(self.sidecars.len() - self.gone).unwrap_or(u32::MAX);
        known.saturating_add(self.crowd.len(now, self.interval(now)))
    }

    /// Whether anything is heard.
    pub fn is_listening(&self) -> bool {
        self.listening.is_ok()
    }

    /// All of it, but what is known elsewhere.
    pub fn figures(&self, now: Instant) -> Figures {
        Figures { rules: self.rules.all(), recent: self.rules.recent(), ..self.state(now) }
    }

    /// All but what rises all the time.
    pub fn state(&self, now: Instant) -> Figures {
        let mut figures = Figures {
            listening: self.is_listening(),
            live: self.live(now),
            wanted: self.wanted,
            partly_counted: self.crowd.len(now, self.interval(now)),
            ..Figures::default()
        };
        let mut generations = BTreeMap::new();
        for sidecar in self.sidecars.values().filter(|sidecar| !sidecar.gone) {
            sidecar.add_to(&mut figures);
            match sidecar.generation {
                Some(generation) => *generations.entry(generation).or_insert(0) += 1,
                None => figures.without_snapshot += 1,
            }
        }
        // The oldest may not have spoken yet.
        figures.understands = figures.understands.filter(|_| self.has_heard_all(now));
        figures.current = generations.get(&self.wanted).copied().unwrap_or_default();
        figures.generations = most(generations);
        figures.notices = self.notices(now, &figures);
        figures
    }

    /// Whether everybody who lives had the time to speak.
    fn has_heard_all(&self, now: Instant) -> bool {
        self.listening.is_ok_and(|since| now.duration_since(since) >= self.interval(now) * WORDS)
    }

    fn notices(&self, now: Instant, figures: &Figures) -> Vec<Notice> {
        let mut notices = Vec::new();
        if figures.unused > 0 {
            notices.push(Notice::SidecarUnused { sidecars: figures.unused, of: figures.live });
        }
        // Whoever left something out may have left out just that.
        let everybody_tells = figures.live > 0 && figures.current == figures.live && figures.partly_counted == 0;
        let long_ago = now.checked_sub(NEVER_MATCHED_AFTER);
        if let Some(long_ago) = long_ago.filter(|_| everybody_tells && self.rules.recent_reads() >= NEVER_MATCHED_READS) {
            let is_heard = self.listening.is_ok_and(|since| since <= long_ago);
            let quiet = self.rules.quiet_since(long_ago).filter(|_| is_heard);
            notices.extend(quiet.map(|rule| Notice::NeverMatched { rule: rule.to_owned() }));
        }
        for (rule, recent) in self.rules.lately() {
            let rule = || rule.to_owned();
            let reads = rules::reads(&recent);
            if recent.never_filled >= NEVER_FILLED && recent.never_filled.saturating_mul(NEVER_FILLED_OF) >= reads {
                notices.push(Notice::NeverFilled { rule: rule(), reads: recent.never_filled, of: reads });
            }
            if recent.wait_timeouts >= IN_VAIN && recent.wait_timeouts.saturating_mul(IN_VAIN_OF) >= recent.misses {
                notices.push(Notice::WaitsTimeOut { rule: rule(), reads: recent.wait_timeouts, of: recent.misses });
            }
        }
        notices.truncate(MAX_NOTICES);
        notices
    }
}

impl Sidecar {
    fn hear(&mut self, now: Instant, beat: &Heartbeat) {
        (self.heard, self.gone) = (self.heard.max(now), false);
        if beat.uptime_seconds < self.uptime {
            // Overtaken by a newer one.
            return;
        }
        self.uptime = beat.uptime_seconds;
        self.generation = beat.generation;
        self.understands = beat.understands;
        self.clients = beat.clients;
        self.is_unused = beat.clients_ever == 0 && beat.uptime_seconds >= UNUSED_AFTER_SECONDS;
        self.is_partly_counted = beat.rules_left_out > 0;
        self.refused = beat.refused.as_ref().map(|refused| Box::new(clean(refused)));
    }

    fn add_to(&self, figures: &mut Figures) {
        figures.clients = figures.clients.saturating_add(self.clients);
        figures.unused += u32::from(self.is_unused);
        figures.partly_counted = figures.partly_counted.saturating_add(u32::from(self.is_partly_counted));
        figures.understands = Some(figures.understands.map_or(self.understands, |oldest| oldest.min(self.understands)));
        let Some(refused) = &self.refused else { return };
        let told = figures.refused.get_or_insert_with(|| Refusal {
            sidecars: 0,
            generation: refused.generation,
            reason: refused.reason.clone(),
        });
        told.sidecars += 1;
        if refused.generation > told.generation {
            (told.generation, told.reason) = (refused.generation, refused.reason.clone());
        }
    }
}

impl Crowd {
    fn saw(&mut self, now: Instant, interval: Duration) {
        let since = *self.since.get_or_insert(now);
        if now.duration_since(since) >= interval {
            let is_next = now.duration_since(since) < interval * 2;
            (self.before, self.now, self.since) = (if is_next { self.now } else { 0 }, 0, Some(now));
        }
        self.now = self.now.saturating_add(1);
    }

    fn len(&self, now: Instant, interval: Duration) -> u32 {
        match self.since {
            Some(since) if now.duration_since(since) < interval * SILENCES => self.now.max(self.before),
            _ => 0,
        }
    }
}

/// The generations with the most sidecars, the newest first.
fn most(generations: BTreeMap<u64, u32>) -> Vec<(u64, u32)> {
    let mut all: Vec<(u64, u32)> = generations.into_iter().collect();
    all.sort_unstable_by_key(|(generation, sidecars)| std::cmp::Reverse((*sidecars, *generation)));
    all.truncate(MAX_GENERATIONS);
    all.sort_unstable_by_key(|(generation, _)| std::cmp::Reverse(*generation));
    all
}

/// What is shown to people.
fn clean(refused: &RefusedSnapshot) -> RefusedSnapshot {
    let reason = refused.reason.chars().take(MAX_REASON_CHARS);
    let reason = reason.map(|c| if c.is_control() { ' ' } else { c }).collect();
    RefusedSnapshot { generation: refused.generation, reason }
}

#[cfg(test)]
mod tests;
