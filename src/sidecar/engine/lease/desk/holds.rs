//! Who holds which lease, and to whom nil was answered.

use super::super::misses::Misses;
use super::super::{Effect, Generation, Millis, Rule};
use super::{Desk, MOST_MISSES};

impl<V: Clone> Desk<V> {
    pub(super) fn hold(&mut self, connection: u64, key: usize, tenant: u32) {
        const WORTH_CLEANING: usize = 32;
        let keys = &self.keys;
        let holds = &mut self.connections.entry(connection).or_default().holds;
        if holds.len() >= WORTH_CLEANING && holds.len() == holds.capacity() {
            holds.retain(|(key, tenant)| {
                let held = keys.get(*key).filter(|key| key.tenant == *tenant).and_then(|key| key.held);
                held.is_some_and(|held| held.connection == connection)
            });
        }
        holds.push((key, tenant));
    }

    /// The holder does not load any more, or never will.
    pub(super) fn give_back(&mut self, key: usize, effects: &mut Vec<Effect<V>>) {
        let entry = &mut self.keys[key];
        if let Some(held) = entry.held.take() {
            entry.taken_until = 0;
            effects.push(Effect::GiveBack { name: entry.name.clone(), token: held.token });
        }
    }

    /// A lease is not held any more. One that ended before its time was revoked: that says nothing of its holder.
    pub(super) fn end_hold(&mut self, now: Millis, key: usize, effects: &mut Vec<Effect<V>>) {
        let held = self.keys[key].held.take();
        if held.is_some_and(|held| held.until <= now) {
            self.count_unfilled(now, key, effects);
        }
    }

    /// A lead ended without a SET.
    pub(super) fn count_unfilled(&mut self, now: Millis, key: usize, effects: &mut Vec<Effect<V>>) {
        let rule = self.keys[key].rule.id;
        if let Some(until) = self.rates.of(rule).unfilled(now) {
            effects.push(Effect::Disarmed { rule, until });
        }
    }

    /// Another lease was taken, under `generation`. Where that is a new one, a write has ended the old: its holder may still set the
    /// key, and says nothing of how often the rule's leads are filled.
    pub(super) fn supersede_hold(&mut self, now: Millis, key: usize, generation: Generation, effects: &mut Vec<Effect<V>>) {
        let entry = &mut self.keys[key];
        if entry.held.is_some_and(|held| held.token.generation != generation) {
            entry.held = None;
        } else {
            self.end_hold(now, key, effects);
        }
    }

    /// A client gets nil: from now on it may be loading.
    pub(super) fn remember(&mut self, now: Millis, key: usize, connection: u64, generation: Option<Generation>) {
        self.change_misses(now, key, |misses, rule| misses.add(connection, generation, rule, now));
        #[cfg(test)]
        self.forget_late(now, key, connection);
    }

    #[cfg(test)]
    pub(super) fn forget_late(&mut self, now: Millis, key: usize, connection: u64) {
        if self.broken == Some(super::super::tests::Switch::LentForgotten) {
            self.end_misses(key, |misses, rule| misses.forget_late(connection, rule, now));
        }
        if self.broken == Some(super::super::tests::Switch::LentBriefly) {
            self.end_misses(key, |misses, rule| misses.stand_briefly(rule));
        }
    }

    /// Nobody knows whether a SET was executed.
    pub(super) fn doubt(&mut self, now: Millis, key: usize) {
        self.change_misses(now, key, |misses, _| misses.add_doubt(now));
    }

    fn change_misses(&mut self, now: Millis, key: usize, change: impl FnOnce(&mut Misses, &Rule)) {
        let entry = &mut self.keys[key];
        let before = entry.misses.len();
        change(&mut entry.misses, &entry.rule);
        self.misses = self.misses + entry.misses.len() - before;
        if !std::mem::replace(&mut entry.in_order, true) {
            self.order.push_back((key, entry.tenant));
        }
        while self.misses > MOST_MISSES
            && let Some((key, tenant)) = self.order.pop_front()
        {
            self.forget(now, key, tenant);
        }
        if self.order.len() > 64 + 2 * self.keys.len() {
            let keys = &self.keys;
            self.order.retain(|(key, tenant)| keys.get(*key).is_some_and(|key| key.tenant == *tenant));
        }
    }

    /// Ends some of a key's misses.
    pub(super) fn end_misses<R>(&mut self, key: usize, end: impl FnOnce(&mut Misses, &Rule) -> R) -> R {
        let entry = &mut self.keys[key];
        let before = entry.misses.len();
        let result = end(&mut entry.misses, &entry.rule);
        self.misses -= before - entry.misses.len();
        result
    }

    pub(super) fn forget(&mut self, now: Millis, key: usize, tenant: u32) {
        if let Some(entry) = self.keys.get_mut(key).filter(|key| key.tenant == tenant) {
            entry.in_order = false;
            self.misses -= entry.misses.len();
            entry.misses = Misses::default();
            self.forgotten.insert(entry.hash, entry.rule.memory, now);
        }
    }
}
