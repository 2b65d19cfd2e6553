//! The simulated cache: [`Slot`]s, a replica that lags, and a record of what was where at which time.

use super::super::model::{Set, Slot};
use super::super::{Begun, Millis, Mode, Rule, Token, Verdict, Written};
use super::Switch;
use super::world::Version;

/// When a version was there.
#[derive(Debug, Clone, Copy)]
struct Stay {
    version: Version,
    from: Millis,
    to: Millis,
}

/// One server and one replica.
#[derive(Debug)]
pub(super) struct Cache {
    slots: Vec<Slot<Version>>,
    replica: Vec<Slot<Version>>,
    replica_floors: Vec<Version>,
    run: u32,
    /// Rises with each failover: what was under way fails.
    pub(super) epoch: u32,
    pub(super) away_until: Millis,
    /// The newest version of each key whose write or deletion was acknowledged, and was not lost by a failover.
    pub(super) floors: Vec<Version>,
    /// Also where it was lost.
    pub(super) newest: Vec<Version>,
    values: Vec<Vec<Stay>>,
    stale: Vec<Vec<Stay>>,
    resurrected: Vec<(usize, Version)>,
    /// How many clients were told to load each key.
    pub(super) leads: Vec<u32>,
    /// How many of its leases were filled, given back, or revoked.
    pub(super) ends: Vec<u32>,
    /// The keys of which the end of a lease was announced, and nobody was told yet.
    pub(super) announced: Vec<usize>,
    broken: Option<Switch>,
}

impl Cache {
    pub(super) fn new(keys: usize, broken: Option<Switch>) -> Self {
        Self {
            slots: vec![Slot::default(); keys],
            replica: vec![Slot::default(); keys],
            replica_floors: vec![0; keys],
            run: 1,
            epoch: 0,
            away_until: 0,
            floors: vec![0; keys],
            newest: vec![0; keys],
            values: vec![Vec::new(); keys],
            stale: vec![Vec::new(); keys],
            resurrected: Vec::new(),
            leads: vec![0; keys],
            ends: vec![0; keys],
            announced: Vec::new(),
            broken,
        }
    }

    fn run(&self) -> u32 {
        if self.broken == Some(Switch::RunIgnored) { 1 } else { self.run }
    }

    /// Changes a slot, and records what came and went.
    fn change<R>(&mut self, now: Millis, key: usize, change: impl FnOnce(&mut Slot<Version>) -> R) -> R {
        let slot = &mut self.slots[key];
        slot.expire(now);
        let before = slot.clone();
        let result = change(slot);
        if std::mem::take(&mut slot.announced) {
            self.announced.push(key);
        }
        let until = |slot: &Slot<Version>| slot.lease.as_ref().map(|lease| (lease.taker, lease.until));
        self.ends[key] += u32::from(before.lease.is_some() && until(&before) != until(slot));
        for (stays, before, after) in
            [(&mut self.values[key], before.value, &slot.value), (&mut self.stale[key], before.stale, &slot.stale)]
        {
            if before.as_ref() == after.as_ref() {
                continue;
            }
            if let (Some(_), Some(last)) = (before, stays.last_mut()) {
                last.to = last.to.min(now);
            }
            if let Some(after) = after {
                stays.push(Stay { version: after.value, from: now, to: after.until });
            }
        }
        result
    }

    /// The first moment between two at which a version was there.
    pub(super) fn held(&self, key: usize, version: Version, is_stale: bool, from: Millis, to: Millis) -> Option<Millis> {
        let stays = if is_stale { &self.stale[key] } else { &self.values[key] };
        let stays = stays.iter().filter(|stay| stay.version == version);
        stays.filter(|stay| stay.from.max(from) <= stay.to.min(to)).map(|stay| stay.from.max(from)).min()
    }

    /// A failover brought it back.
    pub(super) fn was_resurrected(&self, key: usize, version: Version) -> bool {
        self.resurrected.contains(&(key, version))
    }

    /// A client knows that its write or deletion was done.
    pub(super) fn acknowledged(&mut self, key: usize, version: Version) {
        self.floors[key] = self.floors[key].max(version);
        self.newest[key] = self.newest[key].max(version);
    }

    pub(super) fn get(&mut self, now: Millis, key: usize) -> Option<Version> {
        self.slots[key].get(now)
    }

    pub(super) fn delete(&mut self, now: Millis, key: usize) {
        let keeps = self.broken == Some(Switch::DeleteKeepsLease);
        self.change(now, key, |slot| {
            let lease = slot.lease.clone().filter(|_| keeps);
            slot.delete(now);
            slot.lease = lease;
        });
    }

    pub(super) fn update(&mut self, now: Millis, key: usize, set: &Set<Version>) {
        let keeps = self.broken == Some(Switch::UpdateKeepsLease);
        self.change(now, key, |slot| {
            let lease = slot.lease.clone().filter(|_| keeps);
            slot.update(now, set);
            slot.lease = lease;
        });
    }

    pub(super) fn fill(&mut self, now: Millis, key: usize, verdict: Verdict, set: &Set<Version>) -> Written {
        let run = self.run();
        let unchecked = self.broken == Some(Switch::GenerationUnchecked);
        self.change(now, key, |slot| {
            if unchecked && matches!(verdict, Verdict::Fill(_)) {
                return if slot.update(now, set) { Written::Stored } else { Written::Unchanged };
            }
            slot.fill(now, run, verdict, set)
        })
    }

    pub(super) fn begin(&mut self, now: Millis, key: usize, fresh: u64, mode: Mode, rule: &Rule) -> Begun<Version> {
        let run = self.run();
        self.change(now, key, |slot| slot.begin(now, run, fresh, mode, rule))
    }

    pub(super) fn release(&mut self, now: Millis, key: usize, token: Token) {
        self.change(now, key, |slot| slot.release(now, token));
    }

    /// One of K, `L` and S is lost.
    pub(super) fn evict(&mut self, now: Millis, key: usize, which: u8) {
        self.change(now, key, |slot| match which {
            0 => slot.value = None,
            1 => slot.lease = None,
            _ => slot.stale = None,
        });
    }

    /// The replica catches up.
    pub(super) fn synchronise(&mut self, now: Millis) {
        self.slots.iter_mut().for_each(|slot| slot.expire(now));
        self.replica.clone_from(&self.slots);
        self.replica_floors.clone_from(&self.floors);
    }

    /// The replica takes over as it is; for a while nobody answers.
    pub(super) fn fail_over(&mut self, now: Millis, away: Millis) {
        for key in 0..self.slots.len() {
            let replica = self.replica[key].clone();
            let kept = [&replica.value, &replica.stale];
            self.resurrected.extend(kept.into_iter().flatten().map(|kept| (key, kept.value)));
            self.change(now, key, |slot| {
                *slot = replica;
                slot.expire(now);
            });
        }
        self.floors.clone_from(&self.replica_floors);
        (self.run, self.epoch, self.away_until) = (self.run + 1, self.epoch + 1, now + away);
    }
}
