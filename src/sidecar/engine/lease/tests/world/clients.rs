//! What clients do: read, load, store, write to the database and tell the cache.

use super::*;

impl World {
    pub(super) fn act(&mut self, actor: usize) {
        match self.actors[actor].step {
            Step::Idle => self.begin_operation(actor),
            Step::Loading => self.load(actor),
            Step::Writing(key, version, set) => {
                let cmd = if set { Cmd::Set { key, version, condition: Condition::Always, fill: false } } else { Cmd::Del(key) };
                let ahead = (set && self.config.groups && self.random.u8(..4) == 0).then_some(Cmd::Get(key));
                if self.send(actor, ahead.into_iter().chain([cmd])).is_none() {
                    self.at(1, Event::Act(actor));
                }
            }
            Step::Reading | Step::Filling => {}
        }
    }

    pub(super) fn begin_operation(&mut self, actor: usize) {
        if self.actors[actor].left == 0 {
            return;
        }
        let key = self.random.usize(..self.config.keys);
        let sets = self.pods[self.actors[actor].pod].sets;
        if self.random.u32(..1_000) < self.config.writes && !self.locks[key] {
            self.database[key] += 1;
            self.locks[key] = sets;
            self.actors[actor].left -= 1;
            self.actors[actor].step = Step::Writing(key, self.database[key], sets);
            let pause = self.delay();
            return self.at(pause, Event::Act(actor));
        }
        match self.random.u8(..10) {
            0 if self.config.groups => {
                let mut keys: Vec<usize> = (0..self.config.keys).collect();
                self.random.shuffle(&mut keys);
                keys.truncate(self.random.usize(1..=self.config.keys));
                self.read(actor, Cmd::Mget(keys));
            }
            _ => self.read(actor, Cmd::Get(key)),
        }
    }

    pub(super) fn read(&mut self, actor: usize, cmd: Cmd) {
        if self.send(actor, [cmd]).is_some() {
            self.actors[actor].left -= 1;
            self.actors[actor].step = Step::Reading;
        } else {
            self.at(1, Event::Act(actor));
        }
    }

    /// The next step of a load: the database is read at some moment of it, and some time later the value is stored, if at all.
    pub(super) fn load(&mut self, actor: usize) {
        let Some(load) = self.actors[actor].loads.last().copied() else {
            self.actors[actor].step = Step::Idle;
            let pause = self.delay() * 4;
            return self.at(pause, Event::Act(actor));
        };
        let pod = self.actors[actor].pod;
        let Some(version) = load.version else {
            let version = self.database[load.key];
            if let Some(load) = self.actors[actor].loads.last_mut() {
                load.version = Some(version);
            }
            let rule = self.config.rule;
            let pause = match self.random.u8(..16) {
                0 if !self.config.calm && self.pods[pod].sharing == Sharing::Exclusive => self.random.u64(..rule.memory),
                0..4 if self.config.late => self.random.u64(..rule.lease * 3),
                4..8 if self.config.late => self.random.u64(..rule.lease),
                1 if !self.config.calm => self.random.u64(..rule.lease),
                2..8 if self.config.crossed => self.random.u64(..rule.lease / 3),
                _ => self.random.u64(..20),
            };
            return self.at(pause, Event::Act(actor));
        };
        let (sharing, rule) = (self.pods[pod].sharing, self.config.rule);
        let arrives = self.now + rule.lease / 4 + 1;
        let is_late = |promised: Millis| arrives >= load.nil_at + promised;
        let over = if sharing == Sharing::Pool && is_late(rule.lease) { self.late_over(pod, &load, arrives) } else { None };
        let promised = if sharing == Sharing::Exclusive || over.is_some() { rule.memory } else { rule.lease };
        let is_too_late = is_late(promised) || load.repeat_by.is_some_and(|until| self.now > until);
        if is_too_late || self.random.u8(..10) < self.config.unfilled {
            self.actors[actor].loads.pop();
            return self.at(0, Event::Act(actor));
        }
        self.counts.late += u64::from(self.now > load.nil_at + rule.lease);
        let condition = if self.random.u8(..self.config.condition_in) == 0 { Condition::Missing } else { Condition::Always };
        let fill = Cmd::Set { key: load.key, version, condition, fill: true };
        let twice = (sharing == Sharing::Exclusive && self.random.u8(..10) == 0).then(|| fill.clone());
        if self.send_over(actor, over, [fill].into_iter().chain(twice)).is_some() {
            self.counts.lent += u64::from(over.is_some());
            self.actors[actor].filling = self.actors[actor].loads.pop();
            self.actors[actor].step = Step::Filling;
            self.actors[actor].led = load.leads;
        } else {
            self.at(1, Event::Act(actor));
        }
    }

    /// Over which connection of its pool a fill may be sent though its lease is over: over that of its nil, or one whose clients were
    /// told of no miss. A load is promised that where its connection was lent to somebody who was told of the same miss, as long as
    /// no SET was taken for its fill (over its connection, or over one without a nil of its own), until a lease after one may first have
    /// been refused for its sake.
    fn late_over(&mut self, pod: usize, load: &Load, arrives: Millis) -> Option<usize> {
        let told = |conn: usize| self.conns[conn].told.iter().filter(|(key, _)| *key == load.key).map(|(_, at)| *at);
        // Its own nil, and a newer one, and no SET that was counted against its own.
        let own = &self.conns[load.conn];
        let is_lent = own.last_set[load.key] < load.nil_at && told(load.conn).filter(|at| *at >= load.nil_at).count() > 1;
        let lease = self.config.rule.lease;
        let refused = self.pods[pod].doubts[load.key].iter().find(|at| **at >= load.nil_at + lease);
        let is_refused = refused.is_some_and(|at| arrives >= at + lease);
        let is_taken = self.pods[pod].strays[load.key].iter().any(|at| *at >= load.nil_at);
        if !self.config.late || !is_lent || is_refused || is_taken {
            return None;
        }
        let fits = |conn: &usize| !self.conns[*conn].busy && (*conn == load.conn || told(*conn).next().is_none());
        let fit: Vec<usize> = self.pods[pod].conns.iter().copied().filter(fits).collect();
        fit.get(self.random.usize(..fit.len().max(1))).copied()
    }

    pub(super) fn send(&mut self, actor: usize, cmds: impl IntoIterator<Item = Cmd>) -> Option<()> {
        self.send_over(actor, None, cmds)
    }

    /// Sends commands, all at once; of a pool over any connection, or that one. `None`: none is free.
    fn send_over(&mut self, actor: usize, over: Option<usize>, cmds: impl IntoIterator<Item = Cmd>) -> Option<()> {
        let pod = self.actors[actor].pod;
        let conn = match self.pods[pod].sharing {
            _ if over.is_some() => over?,
            Sharing::Pool => {
                let free: Vec<usize> = self.pods[pod].conns.iter().copied().filter(|conn| !self.conns[*conn].busy).collect();
                let last = free.iter().copied().max_by_key(|conn| self.conns[*conn].returned).filter(|_| self.config.late);
                match last.filter(|_| self.random.u8(..8) > 0) {
                    Some(last) => last,
                    None => *free.get(self.random.usize(..free.len().max(1)))?,
                }
            }
            _ => self.actors[actor].conn,
        };
        let delay = self.delay();
        self.actors[actor].conn = conn;
        self.conns[conn].busy = true;
        let at = self.conns[conn].arrive_after.max(self.now + delay);
        self.conns[conn].arrive_after = at;
        for cmd in cmds {
            let floors = match &cmd {
                Cmd::Get(key) => vec![self.cache.floors[*key]],
                Cmd::Mget(keys) => keys.iter().map(|key| self.cache.floors[*key]).collect(),
                _ => Vec::new(),
            };
            let place = self.conns[conn].push(actor, cmd.clone(), floors);
            self.actors[actor].awaits += 1;
            self.at_time(at, Event::Arrive { conn, place, cmd });
        }
        Some(())
    }

    /// A client gets a reply.
    pub(super) fn deliver(&mut self, conn: usize, place: u32, actor: usize, got: Got) {
        let _ = place;
        self.actors[actor].awaits -= 1;
        if let (Step::Writing(key, version, _), Got::Done) = (self.actors[actor].step, &got) {
            self.cache.acknowledged(key, version);
        }
        if self.actors[actor].awaits > 0 {
            return;
        }
        if self.pods[self.actors[actor].pod].sharing == Sharing::Pool {
            (self.conns[conn].busy, self.conns[conn].returned) = (false, self.now);
        }
        let mut pause = self.delay();
        if let (Some(load), Got::Error) = (self.actors[actor].filling.take(), &got)
            && self.random.bool()
        {
            // Many a client repeats what failed, but not for long. What failed has been known for up to a quarter lease.
            let quarter = self.config.rule.lease / 4;
            self.counts.repeated += 1;
            self.actors[actor].loads.push(Load { repeat_by: Some(self.now + quarter), ..load });
            pause += self.random.u64(..quarter);
        }
        if self.actors[actor].step == Step::Reading || self.actors[actor].step == Step::Filling {
            self.actors[actor].step = Step::Loading;
        } else {
            self.actors[actor].step = Step::Idle;
        }
        self.at(pause, Event::Act(actor));
    }

    pub(super) fn close(&mut self, conn: usize) {
        let pod = self.conns[conn].pod;
        // In a pool a fill may be lost though the holder's connection stands: that is a silent holder, and not calm.
        if !self.conns[conn].open || (self.config.calm && self.pods[pod].sharing == Sharing::Pool) {
            return;
        }
        self.conns[conn].open = false;
        let fresh = self.conns.len();
        self.conns.push(Conn::new(pod, self.config.keys));
        self.pods[pod].conns.iter_mut().filter(|own| **own == conn).for_each(|own| *own = fresh);
        let lost = std::mem::take(&mut self.conns[conn].places);
        for actor in 0..self.actors.len() {
            if self.actors[actor].pod != pod || self.actors[actor].conn != conn {
                continue;
            }
            self.actors[actor].conn = fresh;
            self.actors[actor].filling = None;
            let awaited = lost.iter().filter(|place| place.actor == actor).count() as u32;
            if self.pods[pod].sharing == Sharing::Exclusive {
                // The process is gone, and what it was loading.
                self.actors[actor].loads.clear();
            }
            if awaited > 0 && self.actors[actor].awaits == awaited {
                self.actors[actor].awaits = 0;
                let step = self.actors[actor].step;
                self.actors[actor].step = if step == Step::Filling { Step::Loading } else { Step::Idle };
                self.at(1, Event::Act(actor));
            } else {
                self.actors[actor].awaits -= awaited;
            }
        }
        let swallow = self.config.broken == Some(Switch::DisconnectKeepsLease);
        let mut effects = Vec::new();
        self.pods[pod].desk.closed(self.now, conn as u64 + 1, &mut effects);
        effects.retain(|effect| !(swallow && matches!(effect, Effect::GiveBack { .. })));
        self.carry_out(pod, effects);
    }
}
