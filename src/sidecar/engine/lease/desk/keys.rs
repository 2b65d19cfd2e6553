//! One key: who is asked, who waits, who loads.

use std::collections::VecDeque;
use std::rc::Rc;

use super::super::misses::Misses;
use super::super::timers::Due;
use super::super::under_way::UnderWay;
use super::super::{Effect, Generation, Millis, Mode, Name, Reply, Rule, Token, Why, key_hash};
use super::{Desk, FIRST_LOOK_MS, Held, Key, LAST_LOOK_MS, PartState, Waiter};

impl<V: Clone> Desk<V> {
    pub(super) fn find(&self, database: u32, key: &[u8]) -> Option<usize> {
        let same = |index: &&usize| {
            let name = &self.keys[**index].name;
            name.database == database && *name.key == *key
        };
        self.index.get(&key_hash(database, key))?.iter().find(same).copied()
    }

    pub(super) fn key(&mut self, database: u32, key: &[u8], rule: Rule) -> usize {
        if let Some(found) = self.find(database, key) {
            self.keys[found].rule = rule;
            return found;
        }
        let hash = key_hash(database, key);
        self.memory = self.memory.max(rule.memory);
        self.tenants = self.tenants.wrapping_add(1);
        let index = self.keys.insert(Key {
            name: Rc::new(Name { database, key: key.into() }),
            hash,
            tenant: self.tenants,
            rule,
            misses: Misses::default(),
            under_way: UnderWay::default(),
            in_order: false,
            ask: None,
            asks: 0,
            again: false,
            waiters: VecDeque::new(),
            waiting: 0,
            held: None,
            filling_since: None,
            known: None,
            taken_until: 0,
            local_until: 0,
            look_at: None,
            look_pause: FIRST_LOOK_MS,
            watched: false,
            timer_at: None,
        });
        self.index.entry(hash).or_default().push(index);
        index
    }

    pub(super) fn ask(&mut self, key: usize, mode: Mode, effects: &mut Vec<Effect<V>>) {
        let fresh = self.random.u64(1..);
        let entry = &mut self.keys[key];
        entry.ask = Some(fresh);
        entry.asks = entry.asks.wrapping_add(1);
        entry.look_at = None;
        effects.push(Effect::Ask { name: entry.name.clone(), mode, fresh, rule: entry.rule });
    }

    /// Asks now, or as soon as the BEGIN that is under way is answered.
    pub(super) fn look(&mut self, key: usize, effects: &mut Vec<Effect<V>>) {
        let entry = &mut self.keys[key];
        if entry.ask.is_some() {
            entry.again = true;
        } else {
            self.ask(key, Mode::Miss, effects);
        }
    }

    /// The key is there: whoever came before BEGIN was sent gets it.
    pub(super) fn found(&mut self, now: Millis, key: usize, value: &V, effects: &mut Vec<Effect<V>>) {
        self.keys[key].known = None;
        self.each_waiter(now, key, effects, |desk, waiter, fits| {
            let request = &desk.requests[waiter.request];
            if request.overtaken && desk.told_already(now, waiter.request).is_some() {
                return None;
            }
            if request.overtaken {
                desk.remember(now, key, request.asker.connection, None);
                return Some(Reply::Nil(Why::Passed));
            }
            fits.then(|| Reply::Value(value.clone()))
        });
        // Their misses may be younger than what was found.
        self.keys[key].again = true;
    }

    /// A read that found its value and asked for the lease did not get it.
    pub(super) fn end_early(&mut self, now: Millis, key: usize, effects: &mut Vec<Effect<V>>) {
        let waiters = self.keys[key].waiters.iter().filter(|waiter| self.is_waiting(waiter));
        let early = waiters.copied().find(|waiter| self.requests[waiter.request].early);
        if let Some(early) = early {
            self.resolve(early.request, early.part, Reply::Nil(Why::Passed));
            self.settle(now, early.request, effects);
        }
    }

    /// Nobody waits: all get nil.
    pub(super) fn all_nil(&mut self, now: Millis, key: usize, generation: Option<Generation>, effects: &mut Vec<Effect<V>>) {
        self.keys[key].known = generation;
        self.each_waiter(now, key, effects, |desk, waiter, _| {
            let connection = desk.requests[waiter.request].asker.connection;
            #[cfg(test)]
            if desk.broken == Some(super::super::tests::Switch::SharedForgotten) {
                return Some(Reply::Nil(Why::Shared));
            }
            desk.remember(now, key, connection, generation);
            Some(Reply::Nil(Why::Shared))
        });
    }

    /// The lease is ours: one gets nil, the others the stale copy or they wait.
    pub(super) fn leased(&mut self, now: Millis, key: usize, token: Token, stale: Option<V>, effects: &mut Vec<Effect<V>>) {
        let Some(holder) = self.choose(key) else {
            effects.push(Effect::GiveBack { name: self.keys[key].name.clone(), token });
            return;
        };
        self.supersede_hold(now, key, token.generation, effects);
        let connection = self.requests[holder.request].asker.connection;
        let entry = &mut self.keys[key];
        entry.known = Some(token.generation);
        entry.taken_until = now + entry.rule.lease;
        entry.held = Some(Held { connection, token, since: now, until: entry.taken_until, ended: false });
        let tenant = entry.tenant;
        self.hold(connection, key, tenant);
        self.remember(now, key, connection, Some(token.generation));
        self.resolve(holder.request, holder.part, Reply::Nil(Why::Lead));
        self.requests[holder.request].won = true;
        self.settle(now, holder.request, effects);
        self.others(now, key, stale, effects);
    }

    /// The lease is somebody else's, or of another client of this pod.
    pub(super) fn busy(
        &mut self,
        now: Millis,
        key: usize,
        lease: Token,
        stale: Option<V>,
        remaining: Millis,
        effects: &mut Vec<Effect<V>>,
    ) {
        let entry = &mut self.keys[key];
        entry.known = Some(lease.generation);
        entry.taken_until = now + remaining.min(entry.rule.lease);
        // Under another generation than it was taken, the lease may still be this pod's.
        if entry.held.is_some_and(|held| held.token.taker != lease.taker) {
            entry.held = None;
        }
        self.others(now, key, stale, effects);
    }

    /// Those who do not hold the lease.
    pub(super) fn others(&mut self, now: Millis, key: usize, stale: Option<V>, effects: &mut Vec<Effect<V>>) {
        self.each_waiter(now, key, effects, |desk, waiter, fits| {
            let request = &desk.requests[waiter.request];
            #[cfg(test)]
            if desk.broken == Some(super::super::tests::Switch::AllSucceed) {
                return Some(Reply::Nil(Why::Lead));
            }
            match &stale {
                Some(stale) if fits && !request.overtaken => Some(Reply::Stale(stale.clone())),
                _ => None,
            }
        });
        self.expect(now, key, effects);
    }

    /// Sees to it that whoever waits for a key is woken.
    pub(super) fn expect(&mut self, now: Millis, key: usize, effects: &mut Vec<Effect<V>>) {
        let entry = &mut self.keys[key];
        if entry.waiting == 0 {
            return;
        }
        let is_elsewhere = entry.held.is_none() && now >= entry.local_until;
        if is_elsewhere && !std::mem::replace(&mut entry.watched, true) {
            effects.push(Effect::Watch { name: entry.name.clone() });
        }
        let pause = entry.look_pause;
        let jittered = pause - self.random.u64(..pause / 4 + 1);
        let until_end = entry.taken_until.saturating_sub(now).max(1);
        #[cfg(test)]
        if self.broken == Some(super::super::tests::Switch::NobodyLooks) {
            return;
        }
        entry.look_at = Some(now + jittered.min(until_end));
        entry.look_pause = (pause * 2).min(LAST_LOOK_MS);
    }

    /// The cache cannot be asked: one load at a time in this pod.
    pub(super) fn grant_locally(&mut self, now: Millis, key: usize, effects: &mut Vec<Effect<V>>) {
        let entry = &mut self.keys[key];
        entry.known = None;
        let held_until = entry.held.map_or(0, |held| held.until);
        let is_free = now >= entry.local_until.max(held_until);
        #[cfg(test)]
        let is_free = is_free || self.broken == Some(super::super::tests::Switch::AwayForAll);
        if is_free && let Some(holder) = self.choose(key) {
            let entry = &mut self.keys[key];
            entry.local_until = now + entry.rule.lease;
            let connection = self.requests[holder.request].asker.connection;
            self.remember(now, key, connection, None);
            #[cfg(test)]
            if self.broken == Some(super::super::tests::Switch::AwayForgotten) {
                self.end_misses(key, |misses, _| *misses = Misses::default());
            }
            self.resolve(holder.request, holder.part, Reply::Nil(Why::LocalLead));
            self.requests[holder.request].won = true;
            self.settle(now, holder.request, effects);
        }
        let entry = &mut self.keys[key];
        entry.taken_until = entry.local_until.max(held_until);
        self.others(now, key, None, effects);
    }

    /// Who shall load: one that must not wait anyhow, else the oldest. Of one connection's always the oldest: replies leave in order,
    /// and a nil behind a read that waits for it would never arrive.
    fn choose(&self, key: usize) -> Option<Waiter> {
        let waiters = || self.keys[key].waiters.iter().filter(|waiter| self.is_waiting(waiter));
        let request = |waiter: &Waiter| &self.requests[waiter.request];
        #[cfg(test)]
        if self.broken == Some(super::super::tests::Switch::YoungestLeads) {
            return waiters().next_back().copied();
        }
        let chosen = waiters().find(|waiter| request(waiter).early);
        let chosen = chosen.or_else(|| waiters().find(|waiter| request(waiter).overtaken)).or_else(|| waiters().next())?;
        let connection = request(chosen).asker.connection;
        waiters().find(|waiter| request(waiter).asker.connection == connection).copied()
    }

    /// Asks `decide` for a reply to each that waits for a key. `None`: it goes on waiting. `decide` is also told whether the waiter
    /// came before BEGIN was sent, so that what BEGIN found is no older than its own miss.
    pub(super) fn each_waiter(
        &mut self,
        now: Millis,
        key: usize,
        effects: &mut Vec<Effect<V>>,
        mut decide: impl FnMut(&mut Self, &Waiter, bool) -> Option<Reply<V>>,
    ) {
        let asks = self.keys[key].asks;
        let waiters = std::mem::take(&mut self.keys[key].waiters);
        let mut stay = VecDeque::new();
        for waiter in waiters {
            if !self.is_waiting(&waiter) {
                continue;
            }
            let fits = waiter.since_ask != asks;
            #[cfg(test)]
            let fits = fits || self.broken == Some(super::super::tests::Switch::SinceAskIgnored);
            match decide(self, &waiter, fits) {
                Some(reply) => self.resolve(waiter.request, waiter.part, reply),
                None => {
                    self.requests[waiter.request].parts[waiter.part].state = PartState::Waiting;
                    self.keys[key].again |= !fits && self.keys[key].rule.stale;
                    stay.push_back(waiter);
                }
            }
            self.settle(now, waiter.request, effects);
        }
        stay.retain(|waiter| self.is_waiting(waiter));
        let entry = &mut self.keys[key];
        stay.append(&mut entry.waiters);
        entry.waiters = stay;
    }

    pub(super) fn is_waiting(&self, waiter: &Waiter) -> bool {
        let request = self.requests.get(waiter.request).filter(|request| request.tenant == waiter.tenant);
        request.is_some_and(|request| !matches!(request.parts[waiter.part].state, PartState::Done(_)))
    }

    /// A key's time has come: holds end, misses are over, those who wait look again.
    pub(super) fn attend(&mut self, now: Millis, key: usize, effects: &mut Vec<Effect<V>>) {
        let entry = &mut self.keys[key];
        entry.timer_at = entry.timer_at.filter(|at| *at > now);
        if entry.held.is_some_and(|held| held.until <= now) {
            self.end_hold(now, key, effects);
        }
        self.end_misses(key, |misses, rule| misses.prune(rule, now));
        let entry = &self.keys[key];
        if entry.look_at.is_some_and(|at| at <= now) && entry.waiting > 0 && entry.ask.is_none() {
            self.ask(key, Mode::Miss, effects);
        }
        self.finish(now, key, effects);
    }

    /// Ends an event that concerned a key: it is dropped when nothing is left of it.
    pub(super) fn finish(&mut self, now: Millis, key: usize, effects: &mut Vec<Effect<V>>) {
        let Some(entry) = self.keys.get_mut(key) else { return };
        if entry.waiting == 0 {
            entry.waiters.clear();
            (entry.look_at, entry.look_pause) = (None, FIRST_LOOK_MS);
            if std::mem::take(&mut entry.watched) {
                effects.push(Effect::Unwatch { name: entry.name.clone() });
            }
            let is_over = entry.ask.is_none() && entry.held.is_none() && now >= entry.local_until;
            if is_over && entry.misses.is_empty() {
                let hash = entry.hash;
                self.keys.remove(key);
                if let Some(same) = self.index.get_mut(&hash) {
                    same.retain(|index| *index != key);
                    if same.is_empty() {
                        self.index.remove(&hash);
                    }
                }
                return;
            }
        }
        let local = Some(entry.local_until).filter(|at| *at > now);
        let held = entry.held.map(|held| held.until);
        let misses = entry.misses.end(&entry.rule);
        let Some(at) = [entry.look_at, held, misses, local].into_iter().flatten().min() else { return };
        if entry.timer_at.is_none_or(|armed| at < armed) {
            entry.timer_at = Some(at);
            self.timers.push(at, Due::Key(key as u32, entry.tenant));
        }
        self.compact();
    }

    /// Ends every event.
    pub(super) fn finish_touched(&mut self, now: Millis, effects: &mut Vec<Effect<V>>) {
        while let Some(key) = self.touched.pop() {
            self.finish(now, key, effects);
        }
    }

    /// Drops deadlines that are no longer due, when they are most.
    pub(super) fn compact(&mut self) {
        if self.timers.len() > 64 + 4 * (self.keys.len() + self.requests.len()) {
            let (keys, requests) = (&self.keys, &self.requests);
            self.timers.retain(|due| match due {
                Due::Request(at, tenant) => requests.get(at as usize).is_some_and(|request| request.tenant == tenant),
                Due::Key(at, tenant) => keys.get(at as usize).is_some_and(|key| key.tenant == tenant),
            });
        }
    }
}
