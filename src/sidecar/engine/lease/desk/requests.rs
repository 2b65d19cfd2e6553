//! One request: its parts, and when it is answered.

use smallvec::SmallVec;

use super::super::timers::Due;
use super::super::{Answer, Asker, AtWaitEnd, Effect, Millis, Missing, Mode, Reader, Reply, Why};
use super::{Desk, Key, MOST_WAITING, Part, PartState, Request, Waiter};

impl<V: Clone> Desk<V> {
    pub(super) fn open_request(&mut self, now: Millis, wait: Millis, asker: Asker, early: bool, overtaken: bool) -> usize {
        self.tenants = self.tenants.wrapping_add(1);
        let (tenant, parts, until) = (self.tenants, SmallVec::new(), now + wait);
        let opened = Request { tenant, asker, parts, since: now, until, own: false, early, won: false, overtaken };
        let request = self.requests.insert(opened);
        self.connections.entry(asker.connection).or_default().requests.push(request);
        self.timers.push(until, Due::Request(request as u32, tenant));
        request
    }

    /// For how long a read waits that comes over the very connection that holds its key's lease. `None`: it comes over another, over
    /// one that several share, or such waits are in vain of late.
    pub(super) fn own_wait(&mut self, now: Millis, reader: &Reader, missing: &[Missing<'_>]) -> Option<Millis> {
        let [Missing { key, rule }] = missing else { return None };
        let key = self.find(reader.database, key).filter(|_| !reader.shared)?;
        let leads = self.leads(now, key, reader.asker.connection);
        #[cfg(test)]
        let leads = leads && self.broken != Some(super::super::tests::Switch::OwnReadsPass);
        leads.then(|| self.rates.of(rule.id).own_wait(rule.wait, now)).flatten()
    }

    fn leads(&self, now: Millis, key: usize, connection: u64) -> bool {
        self.keys[key].held.is_some_and(|held| held.connection == connection && now < held.until)
    }

    pub(super) fn open_part(
        &mut self,
        now: Millis,
        request: usize,
        reader: &Reader,
        missing: &Missing<'_>,
        effects: &mut Vec<Effect<V>>,
    ) {
        if !self.is_armed(missing.rule.id, now) {
            let done = Part { key: usize::MAX, state: PartState::Done(Reply::Nil(Why::Untracked)) };
            return self.requests[request].parts.push(done);
        }
        let key = self.key(reader.database, missing.key, missing.rule);
        let part = self.wait_for(request, key);
        let connection = reader.asker.connection;
        let leads = !reader.shared && !self.requests[request].own && self.leads(now, key, connection);
        let entry = &self.keys[key];
        if self.waiting > MOST_WAITING || leads {
            let known = entry.known;
            self.remember(now, key, connection, known);
            self.resolve(request, part, Reply::Nil(if leads { Why::Again } else { Why::Untracked }));
        } else if entry.ask.is_none() {
            if now < entry.taken_until && !entry.rule.stale {
                self.requests[request].parts[part].state = PartState::Waiting;
                if entry.look_at.is_none() {
                    self.expect(now, key, effects);
                }
            } else {
                self.ask(key, Mode::Miss, effects);
            }
        }
        self.finish(now, key, effects);
    }

    pub(super) fn wait_for(&mut self, request: usize, key: usize) -> usize {
        let entry = &mut self.keys[key];
        let open = &mut self.requests[request];
        let part = open.parts.len();
        open.parts.push(Part { key, state: PartState::Asking });
        entry.waiters.push_back(Waiter { request, tenant: open.tenant, part, since_ask: entry.asks });
        entry.waiting += 1;
        self.waiting += 1;
        part
    }

    pub(super) fn requests_of(&self, connection: u64) -> SmallVec<[usize; 2]> {
        self.connections.get(&connection).map(|connection| connection.requests.clone()).unwrap_or_default()
    }

    /// Decides one part.
    pub(super) fn resolve(&mut self, request: usize, part: usize, reply: Reply<V>) {
        let part = &mut self.requests[request].parts[part];
        if !matches!(part.state, PartState::Done(_)) {
            part.state = PartState::Done(reply);
            self.waiting -= 1;
            self.keys[part.key].waiting -= 1;
            if self.keys[part.key].waiting == 0 {
                self.touched.push(part.key);
            }
        }
    }

    /// Answers a request that has all its answers. One that must not wait gets nil where somebody else loads.
    pub(super) fn settle(&mut self, now: Millis, request: usize, effects: &mut Vec<Effect<V>>) {
        self.settle_as(now, request, Why::Passed, effects);
    }

    pub(super) fn settle_as(&mut self, now: Millis, request: usize, why: Why, effects: &mut Vec<Effect<V>>) {
        let Some(open) = self.requests.get(request) else { return };
        if open.parts.iter().any(|part| matches!(part.state, PartState::Asking)) {
            return;
        }
        let must_not_wait = open.won || open.overtaken;
        #[cfg(test)]
        let must_not_wait = must_not_wait && self.broken != Some(super::super::tests::Switch::WinnerWaits);
        if must_not_wait {
            if let Some(key) = self.told_already(now, request) {
                return self.cut_short(request, key, effects);
            }
            self.pass(now, request, why);
        }
        let open = &self.requests[request];
        if open.parts.iter().all(|part| matches!(part.state, PartState::Done(_))) {
            self.answer(request, effects);
        }
    }

    /// For which key's sake a read that must not wait is not told of a miss: a client of its connection was, within this lease. A
    /// read that leads a key is told of all.
    pub(super) fn told_already(&self, now: Millis, request: usize) -> Option<usize> {
        let open = &self.requests[request];
        #[cfg(test)]
        if self.broken == Some(super::super::tests::Switch::OvertakenReadsLoad) {
            return None;
        }
        if open.won || open.early {
            return None;
        }
        let undecided = open.parts.iter().filter(|part| !matches!(part.state, PartState::Done(_)));
        undecided.map(|part| part.key).find(|key| {
            let Key { rule, misses, .. } = &self.keys[*key];
            rule.at_wait_end == AtWaitEnd::Error && misses.was_told(open.asker.connection, rule, now)
        })
    }

    fn cut_short(&mut self, request: usize, key: usize, effects: &mut Vec<Effect<V>>) {
        let (asker, key) = (self.requests[request].asker, &self.keys[key]);
        let answer = Answer::CutShort { name: key.name.clone(), rule: key.rule.id };
        self.drop_request(request);
        effects.push(Effect::Answer { asker, answer });
    }

    /// Nil for every part that is not decided.
    pub(super) fn pass(&mut self, now: Millis, request: usize, why: Why) {
        for part in 0..self.requests[request].parts.len() {
            let open = &self.requests[request];
            if matches!(open.parts[part].state, PartState::Done(_)) {
                continue;
            }
            let (key, connection) = (open.parts[part].key, open.asker.connection);
            let is_told = !open.early;
            #[cfg(test)]
            let is_told = is_told && self.broken != Some(super::super::tests::Switch::PassedForgotten);
            if is_told {
                let known = self.keys[key].known;
                self.remember(now, key, connection, known);
            }
            self.resolve(request, part, Reply::Nil(why));
        }
    }

    pub(super) fn answer(&mut self, request: usize, effects: &mut Vec<Effect<V>>) {
        let done = self.requests.remove(request);
        self.unlist(done.asker.connection, request);
        if let ([Part { key, state: PartState::Done(Reply::Value(_)) }], true) = (&done.parts[..], done.own)
            && let Some(rule) = self.keys.get(*key).map(|key| key.rule.id)
        {
            self.rates.of(rule).own_wait_served();
        }
        if done.early {
            effects.push(Effect::Early { asker: done.asker, refresh: done.won });
            return;
        }
        let reply = |part: Part<V>| match part.state {
            PartState::Done(reply) => reply,
            PartState::Asking | PartState::Waiting => Reply::Nil(Why::Passed),
        };
        let replies = done.parts.into_iter().map(reply).collect();
        effects.push(Effect::Answer { asker: done.asker, answer: Answer::Replies(replies) });
    }

    /// A deadline of a request has come.
    pub(super) fn wait_is_over(&mut self, now: Millis, request: usize, effects: &mut Vec<Effect<V>>) {
        let open = &self.requests[request];
        let undecided = open.parts.iter().find(|part| !matches!(part.state, PartState::Done(_)));
        let undecided = undecided.map(|part| &self.keys[part.key]);
        let leads = undecided.and_then(|key| key.held).is_some_and(|held| held.connection == open.asker.connection);
        if open.own && leads {
            if let Some(rule) = undecided.map(|key| key.rule.id) {
                self.rates.of(rule).own_wait_in_vain(now);
            }
            self.pass(now, request, Why::Again);
            return self.answer(request, effects);
        }
        if now < open.until {
            // It waits for somebody else by now.
            return;
        }
        if open.overtaken
            && let Some(key) = self.told_already(now, request)
        {
            return self.cut_short(request, key, effects);
        }
        let may_fail = !(open.early || open.won || open.overtaken);
        match undecided.map(|key| (key.rule, key.name.clone())) {
            Some((rule, name)) if may_fail && rule.at_wait_end == AtWaitEnd::Error => {
                let (asker, waited) = (open.asker, now.saturating_sub(open.since));
                self.drop_request(request);
                effects.push(Effect::Answer { asker, answer: Answer::TimedOut { name, rule: rule.id, waited } });
            }
            _ => {
                self.pass(now, request, Why::WaitEnd);
                self.answer(request, effects);
            }
        }
    }

    pub(super) fn drop_request(&mut self, request: usize) {
        for part in 0..self.requests[request].parts.len() {
            self.resolve(request, part, Reply::Nil(Why::Passed));
        }
        let dropped = self.requests.remove(request);
        self.unlist(dropped.asker.connection, request);
    }

    pub(super) fn unlist(&mut self, connection: u64, request: usize) {
        if let Some(of) = self.connections.get_mut(&connection) {
            of.requests.retain(|listed| *listed != request);
            if of.requests.is_empty() && of.holds.is_empty() {
                self.connections.remove(&connection);
            }
        }
    }
}
