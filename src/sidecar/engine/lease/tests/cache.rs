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
    /// How many of its leases were filled, given back by who held them, or revoked.
    pub(super) ends: Vec<u32>,
    /// The keys of which the end of a lease was announced, and nobody was told yet.
    pub(super) announced: Vec<usize>,
    /// How many took each key's lease one after the other, without a fill.
    in_a_row: Vec<u32>,
    /// The most that did of any.
    pub(super) most_in_a_row: u32,
    /// Who took each key's lease and until when, as long as nothing has ended it.
    holders: Vec<Option<(u64, Millis)>>,
    /// A lease was given to two at once.
    pub(super) two_hold: bool,
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
            in_a_row: vec![0; keys],
            most_in_a_row: 0,
            holders: vec![None; keys],
            two_hold: false,
            broken,
        }
    }

    fn run(&self) -> u32 {
        if self.breaks(Switch::RunIgnored) { 1 } else { self.run }
    }

    fn breaks(&self, switch: Switch) -> bool {
        self.broken == Some(switch)
    }

    /// Changes a slot in a way that may end its lease, and records what came and went.
    fn change<R>(&mut self, now: Millis, key: usize, change: impl FnOnce(&mut Slot<Version>) -> R) -> R {
        self.slots[key].expire(now);
        let until = |slot: &Slot<Version>| slot.lease.as_ref().map(|lease| (lease.taker, lease.until));
        let before = until(&self.slots[key]);
        let result = self.watch(now, key, change);
        if before != until(&self.slots[key]) {
            self.ends[key] += u32::from(before.is_some());
            self.holders[key] = None;
        }
        result
    }

    /// Changes a slot, and records what came and went.
    fn watch<R>(&mut self, now: Millis, key: usize, change: impl FnOnce(&mut Slot<Version>) -> R) -> R {
        let slot = &mut self.slots[key];
        slot.expire(now);
        let before = slot.clone();
        let result = change(slot);
        if std::mem::take(&mut slot.announced) {
            self.announced.push(key);
        }
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

    /// Since when a version has been there that is there, or was until lately.
    pub(super) fn since(&self, key: usize, version: Version) -> Option<Millis> {
        self.values[key].iter().rev().find(|stay| stay.version == version).map(|stay| stay.from)
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
        let (keeps, copies) = (self.breaks(Switch::DeleteKeepsLease), self.breaks(Switch::WritesKeepCopy));
        self.change(now, key, |slot| {
            let (lease, copy) = (slot.lease.clone().filter(|_| keeps), slot.stale.clone().filter(|_| copies));
            slot.delete(now);
            (slot.lease, slot.stale) = (lease, copy);
        });
    }

    pub(super) fn update(&mut self, now: Millis, key: usize, set: &Set<Version>) {
        let (keeps, copies) = (self.breaks(Switch::UpdateKeepsLease), self.breaks(Switch::WritesKeepCopy));
        self.change(now, key, |slot| {
            let (lease, copy) = (slot.lease.clone().filter(|_| keeps), slot.stale.clone().filter(|_| copies));
            slot.update(now, set);
            (slot.lease, slot.stale) = (lease, copy.or(slot.stale.take()));
        });
    }

    pub(super) fn fill(&mut self, now: Millis, key: usize, verdict: Verdict, set: &Set<Version>) -> Written {
        let (run, broken, holder) = (self.run(), self.broken, self.holders[key]);
        let written = self.change(now, key, |slot| {
            if broken == Some(Switch::GenerationUnchecked) && matches!(verdict, Verdict::Fill(_)) {
                return if slot.update(now, set) { Written::Stored } else { Written::Unchanged };
            }
            let before = slot.lease.clone();
            let written = slot.fill(now, run, verdict, set);
            match (broken, written) {
                (Some(Switch::FillKeepsGeneration), Written::Stored)
                | (Some(Switch::RefusalKeepsGeneration), Written::Removed)
                | (Some(Switch::UnmetKeepsGeneration), Written::Unchanged) => slot.lease = before,
                (Some(Switch::RefusalEndsLease), Written::Removed) => slot.lease = None,
                _ => {}
            }
            written
        });
        if written == Written::Removed {
            // Whoever holds the lease holds it on.
            self.holders[key] = holder;
        }
        written
    }

    pub(super) fn begin(&mut self, now: Millis, key: usize, fresh: u64, mode: Mode, rule: &Rule) -> Begun<Version> {
        let (run, broken) = (self.run(), self.broken);
        let taker = |slot: &Slot<Version>| slot.lease.as_ref().map(|lease| lease.taker);
        self.slots[key].expire(now);
        let before = taker(&self.slots[key]);
        let begun = self.watch(now, key, |slot| {
            if let Some(lease) = &mut slot.lease {
                match broken {
                    Some(Switch::LeaseForAll) => lease.until = 0,
                    Some(Switch::LeadsUncounted) => lease.leads = 0,
                    _ => {}
                }
            }
            slot.begin(now, run, fresh, mode, rule)
        });
        if matches!(begun, Begun::Leased { .. }) {
            let taken = before != Some(fresh);
            self.in_a_row[key] = if before.is_none() { 1 } else { self.in_a_row[key] + u32::from(taken) };
            self.most_in_a_row = self.most_in_a_row.max(self.in_a_row[key]);
            self.two_hold |= self.holders[key].is_some_and(|(taker, until)| taker != fresh && now < until);
            self.holders[key] = self.slots[key].lease.as_ref().map(|lease| (lease.taker, lease.until));
        }
        begun
    }

    pub(super) fn release(&mut self, now: Millis, key: usize, token: Token) {
        let holder = self.slots[key].lease.as_ref().map(|lease| lease.taker).filter(|_| self.breaks(Switch::ReleaseUnchecked));
        match holder {
            Some(taker) if taker != token.taker => self.watch(now, key, |slot| slot.release(now, Token { taker, ..token })),
            _ => self.change(now, key, |slot| slot.release(now, token)),
        };
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
            self.holders[key] = None;
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
