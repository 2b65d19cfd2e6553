//! What a sidecar does around its desk.

use super::*;

impl World {
    pub(super) fn with_desk(&mut self, pod: usize, event: impl FnOnce(&mut Desk<Version>, Millis, &mut Vec<Effect<Version>>)) {
        let mut effects = Vec::new();
        event(&mut self.pods[pod].desk, self.now, &mut effects);
        self.carry_out(pod, effects);
    }

    pub(super) fn carry_out(&mut self, pod: usize, effects: Vec<Effect<Version>>) {
        for effect in effects {
            if self.config.shown {
                println!("{}     pod {pod}: {effect:?}", self.now);
            }
            match effect {
                Effect::Ask { name, mode, fresh, rule } => {
                    self.forward(pod, Req::Begin { key: key_of(&name.key), fresh, mode, rule });
                }
                Effect::GiveBack { name, token } => self.forward(pod, Req::Release { key: key_of(&name.key), token }),
                Effect::Answer { asker, answer } => self.answered(pod, asker, answer),
                Effect::Early { asker, refresh } => self.answered_early(pod, asker, refresh),
                Effect::Watch { name } => {
                    self.pods[pod].watched.insert(key_of(&name.key));
                    let delay = self.delay();
                    self.at(delay, Event::Wake(pod, key_of(&name.key)));
                }
                Effect::Unwatch { name } => {
                    self.pods[pod].watched.remove(&key_of(&name.key));
                }
                // From now on it promises nothing.
                Effect::Disarmed { .. } => self.excused = true,
            }
        }
        let desk = &self.pods[pod];
        if desk.leads > desk.grants {
            self.fail(|| format!("pod {pod}: a lease, two loads"));
        }
        if let Some(at) = self.pods[pod].desk.next_deadline()
            && self.pods[pod].tick_at.is_none_or(|planned| at < planned)
        {
            self.pods[pod].tick_at = Some(at.max(self.now));
            self.at_time(at.max(self.now), Event::Tick(pod));
        }
    }

    /// A read that found its value and asked for the lease is answered.
    fn answered_early(&mut self, pod: usize, asker: Asker, refresh: bool) {
        self.counts.early += u64::from(refresh);
        let conn = asker.connection as usize - 1;
        let now = self.now;
        let Some(place) = self.conns[conn].place(asker.place) else { return };
        let [key] = *place.keys() else { return };
        let kept = now - place.missed.unwrap_or(now);
        let reply = match place.values[0] {
            Some(version) if !refresh => Reply::Value(version),
            _ => Reply::Nil(Why::Lead),
        };
        if self.is_quiet() && kept > MOST_DELAY_MS {
            self.fail(|| format!("{asker:?} found its value and was kept waiting for {kept} ms"));
        }
        if refresh {
            self.conns[conn].told.push((key, now));
            self.pods[pod].leads += 1;
            self.pods[pod].granted[key] = None;
        }
        self.answer(conn, asker.place, Got::Replies(vec![reply]));
    }

    /// Over which of a pod's connections something goes.
    pub(super) fn lane(&self, req: &Req) -> usize {
        match req {
            Req::Client { conn, .. } if self.config.lanes => conn % 2,
            _ => 0,
        }
    }

    /// The rule, as the desk is told of it.
    fn rule(&self) -> Rule {
        let rule = self.config.rule;
        match self.config.broken {
            Some(Switch::SettledAtOnce) => Rule { settle: 0, ..rule },
            Some(Switch::MemoryIsALease) => Rule { memory: rule.lease, ..rule },
            Some(Switch::NoOverlap) => Rule { overlap: Some(0), ..rule },
            Some(Switch::WaitsTooLong) => Rule { wait: rule.wait * 10, ..rule },
            _ => rule,
        }
    }

    pub(super) fn forward(&mut self, pod: usize, req: Req) {
        let is_slow = self.config.crossed && matches!(req, Req::Client { cmd: Cmd::Set { .. }, .. });
        let delay = if is_slow { self.random.u64(..60) } else { self.delay() };
        let lane = self.lane(&req);
        let at = self.pods[pod].exec_after[lane].max(self.now + delay);
        self.pods[pod].exec_after[lane] = at;
        self.at_time(at, Event::Exec { pod, epoch: self.epoch(pod), req });
    }

    /// A command comes to its sidecar.
    pub(super) fn arrive(&mut self, conn: usize, place: u32, cmd: Cmd) {
        if !self.conns[conn].open {
            return self.unlock(&cmd);
        }
        let pod = self.conns[conn].pod;
        let connection = conn as u64 + 1;
        let ignore = self.config.broken == Some(Switch::OvertakenIgnored);
        let command = match &cmd {
            Cmd::Get(key) => Command::Get(0, NAMES[*key]),
            Cmd::Set { key, .. } => Command::Set(0, NAMES[*key]),
            Cmd::Mget(_) | Cmd::Del(_) => Command::Other,
        };
        if !ignore {
            self.with_desk(pod, |desk, now, effects| desk.arrives(now, connection, command, effects));
        }
        if let Cmd::Set { key, .. } = &cmd {
            // What such a SET was put down to may have been this connection's: then this one is put down to another's.
            let told = self.conns[conn].told.iter().filter(|(told, _)| told == key).map(|(_, at)| *at).max();
            let strays = &mut self.pods[pod].strays[*key];
            if told.is_none_or(|told| strays.last().is_some_and(|stray| *stray >= told)) {
                strays.push(self.now);
            }
        }
        self.conns[conn].arrived(place, self.now);
        let mut effects = Vec::new();
        let mut verdict = Verdict::Update;
        if let Cmd::Set { key, .. } = &cmd {
            verdict = self.pods[pod].desk.write(self.now, connection, 0, NAMES[*key], &mut effects);
            let is_doubtful = matches!(verdict, Verdict::Ambiguous(_));
            if is_doubtful {
                self.pods[pod].doubts[*key].push(self.now);
            }
            if self.breaks(Switch::MissesIgnored) || self.breaks(Switch::DoubtStored) && is_doubtful {
                verdict = Verdict::Update;
            }
            if self.breaks(Switch::SetEndsAllMisses) {
                self.pods[pod].desk.forget_misses(NAMES[*key]);
            }
        }
        if let (Cmd::Del(key), Some(Switch::DeleteEndsMisses)) = (&cmd, self.config.broken) {
            self.pods[pod].desk.forget_misses(NAMES[*key]);
        }
        self.forward(pod, Req::Client { conn, place, cmd, verdict });
        self.carry_out(pod, effects);
    }

    pub(super) fn unlock(&mut self, cmd: &Cmd) {
        if let Cmd::Set { key, fill: false, .. } = cmd {
            self.locks[*key] = false;
        }
    }

    /// The cache's answer comes back to a pod.
    pub(super) fn come_back(&mut self, pod: usize, req: Req, rep: Rep) {
        match (req, rep) {
            (Req::Client { conn, place, cmd: Cmd::Get(key), .. }, Rep::Values(values)) => {
                self.read_back(pod, conn, place, &[key], values);
            }
            (Req::Client { conn, place, cmd: Cmd::Mget(keys), .. }, Rep::Values(values)) => {
                self.read_back(pod, conn, place, &keys, values);
            }
            (Req::Client { conn, place, cmd: Cmd::Get(key), .. }, _) => self.miss(pod, conn, place, &[key], vec![None], true),
            (Req::Client { conn, place, cmd: Cmd::Mget(keys), .. }, _) => {
                let values = vec![None; keys.len()];
                self.miss(pod, conn, place, &keys, values, true);
            }
            (Req::Client { conn, place, cmd, verdict }, rep) => self.write_back(pod, conn, place, &cmd, verdict, rep),
            (Req::Begin { key, fresh, mode, rule }, rep) => {
                let begun = match rep {
                    Rep::Begun(begun) => begun,
                    // What is safe to repeat is repeated, once in a while.
                    _ if self.random.bool() => {
                        // It takes a while until there is a connection again.
                        let pause = self.random.u64(..self.config.rule.lease);
                        self.pods[pod].exec_after[0] = self.pods[pod].exec_after[0].max(self.now + pause);
                        return self.forward(pod, Req::Begin { key, fresh, mode, rule });
                    }
                    _ => Begun::Failed,
                };
                if matches!(begun, Begun::Leased { .. }) {
                    self.pods[pod].grants += 1;
                    self.pods[pod].granted[key] = Some(self.now);
                }
                let name = Name { database: 0, key: NAMES[key].into() };
                let mut effects = Vec::new();
                self.pods[pod].desk.begun(self.now, &name, fresh, begun, &mut effects);
                let swallow = self.breaks(Switch::UnclaimedKept);
                effects.retain(|effect| !(swallow && matches!(effect, Effect::GiveBack { .. })));
                self.carry_out(pod, effects);
            }
            (Req::Release { .. }, _) => {}
        }
    }

    pub(super) fn read_back(&mut self, pod: usize, conn: usize, place: u32, keys: &[usize], values: Vec<Option<Version>>) {
        if values.iter().any(Option::is_none) {
            return self.miss(pod, conn, place, keys, values, false);
        }
        let Some(own) = self.conns[conn].place(place) else { return };
        (own.answered, own.values) = (true, values.clone());
        if let ([key], [Some(version)]) = (keys, &values[..]) {
            let connection = conn as u64 + 1;
            let overtaken = self.conns[conn].is_overtaken(place, *key);
            if !self.breaks(Switch::SeenIgnored) {
                self.with_desk(pod, |desk, now, effects| desk.seen(now, connection, 0, NAMES[*key], version, effects));
            }
            let tries = self.config.early && !overtaken && self.random.u8(..self.config.early_in) == 0;
            if tries && self.config.broken == Some(Switch::EarlyWithoutLease) {
                if let Some(own) = self.conns[conn].place(place) {
                    own.missed = Some(self.now);
                }
                return self.answer(conn, place, Got::Replies(vec![Reply::Nil(Why::Lead)]));
            }
            if tries {
                let missing = Missing { key: NAMES[*key], rule: self.rule() };
                let asker = Asker { connection, place };
                let (mut effects, left) = (Vec::new(), self.random.u64(..300));
                let held = self.pods[pod].desk.expires_early(self.now, asker, 0, &missing, left, &mut effects);
                if let Some(own) = self.conns[conn].place(place).filter(|_| held) {
                    own.missed = Some(self.now);
                }
                self.carry_out(pod, effects);
                if held {
                    return;
                }
            }
        }
        let replies = values.into_iter().flatten().map(Reply::Value).collect();
        self.answer(conn, place, Got::Replies(replies));
    }

    pub(super) fn miss(&mut self, pod: usize, conn: usize, place: u32, keys: &[usize], values: Vec<Option<Version>>, away: bool) {
        let (now, rule) = (self.now, self.rule());
        let forbidden = self.conns[conn].written_behind(place, keys);
        let Some(own) = self.conns[conn].place(place) else { return };
        (own.answered, own.missed, own.forbidden) = (true, Some(now), forbidden);
        let missing: Vec<Missing<'_>> = keys
            .iter()
            .zip(&values)
            .filter(|(_, value)| value.is_none())
            .map(|(key, _)| Missing { key: NAMES[*key], rule })
            .collect();
        own.values = values;
        let overtaken = keys.len() > 1 && self.conns[conn].is_overtaken(place, usize::MAX)
            || keys.len() == 1 && self.conns[conn].is_overtaken(place, keys[0]);
        let reader = Reader {
            asker: Asker { connection: conn as u64 + 1, place },
            database: 0,
            overtaken: overtaken && self.config.broken != Some(Switch::OvertakenIgnored),
            shared: self.conns[conn].shared,
        };
        self.with_desk(pod, |desk, now, effects| {
            if away {
                desk.cache_away(now, reader, &missing, effects);
            } else {
                desk.read_missed(now, reader, &missing, effects);
            }
        });
    }

    pub(super) fn write_back(&mut self, pod: usize, conn: usize, place: u32, cmd: &Cmd, verdict: Verdict, rep: Rep) {
        if let (Cmd::Set { key, .. }, true) = (cmd, verdict != Verdict::Update) {
            let written = if let Rep::Written(written) = rep { written } else { Written::Failed };
            let connection = conn as u64 + 1;
            self.pods[pod].led_alone[*key] = None;
            let mut effects = Vec::new();
            self.pods[pod].desk.wrote(self.now, connection, 0, NAMES[*key], written, &mut effects);
            let is_given_back = effects.iter().any(|effect| matches!(effect, Effect::GiveBack { .. }));
            let led = self.conns[conn].place(place).map(|own| own.actor).is_some_and(|actor| self.actors[actor].led);
            self.counts.orphaned += u64::from(written == Written::Removed && led && !is_given_back);
            self.carry_out(pod, effects);
        }
        let got = if matches!(rep, Rep::Failed) { Got::Error } else { Got::Done };
        if let Some(own) = self.conns[conn].place(place) {
            own.answered = true;
        }
        self.answer(conn, place, got);
    }

    /// Tells all pods that listen.
    pub(super) fn publish(&mut self, key: usize) {
        if !self.config.signs || self.breaks(Switch::SignsUnsent) {
            return;
        }
        for pod in 0..self.pods.len() {
            if self.pods[pod].watched.contains(&key) {
                let delay = self.delay();
                self.at(delay, Event::Wake(pod, key));
            }
        }
    }

    /// The desk answers a read.
    pub(super) fn answered(&mut self, pod: usize, asker: Asker, answer: Answer<Version>) {
        let conn = asker.connection as usize - 1;
        let wait = self.config.rule.wait;
        let now = self.now;
        let Some(own) = self.conns[conn].place(asker.place) else {
            return self.fail(|| format!("{asker:?} is answered, but nobody asked"));
        };
        let waited = now - own.missed.unwrap_or(0);
        let (values, missing, pressed) = (own.values.clone(), own.missing(), own.pressed);
        if let Some(pressed) = pressed {
            self.check_haste(asker, pressed.max(now - waited));
        }
        if waited > wait {
            self.fail(|| format!("{asker:?} waited {waited} ms"));
        }
        let Answer::Replies(replies) = answer else {
            let is_cut = matches!(answer, Answer::CutShort { .. });
            *(if is_cut { &mut self.counts.cut_short } else { &mut self.counts.timed_out }) += 1;
            if self.is_quiet() && !is_cut {
                self.fail(|| format!("{asker:?} timed out though nobody is slow"));
            }
            return self.answer(conn, asker.place, Got::Error);
        };
        self.check_told(conn, &replies, &missing);
        for (reply, key) in replies.iter().zip(&missing) {
            self.count(pod, *key, reply);
        }
        match (&replies[..], &missing[..]) {
            ([Reply::Value(version)], [key]) => self.check_woken(asker, *key, *version, waited),
            ([Reply::Nil(Why::LocalLead)], [key]) => self.check_alone(pod, *key),
            _ => {}
        }
        self.counts.waited += u64::from(waited > 10);
        let mut replies = replies.into_iter();
        let filled = values.into_iter().map(|value| match value {
            Some(version) => Reply::Value(version),
            None => replies.next().expect("a reply for each missing key"),
        });
        let filled = filled.collect();
        self.answer(conn, asker.place, Got::Replies(filled));
    }

    pub(super) fn count(&mut self, pod: usize, key: usize, reply: &Reply<Version>) {
        if let Reply::Nil(why) = reply {
            self.check_nil(pod, key, *why);
        }
        let counts = &mut self.counts;
        let counter = match reply {
            Reply::Value(_) => &mut counts.values,
            Reply::Stale(_) => &mut counts.stale,
            Reply::Nil(Why::Lead) => {
                self.pods[pod].leads += 1;
                &mut counts.leads
            }
            Reply::Nil(Why::Again | Why::Passed | Why::Untracked) => &mut counts.passed,
            Reply::Nil(Why::LocalLead) => &mut counts.local,
            Reply::Nil(Why::Shared) => &mut counts.shared,
            Reply::Nil(Why::Unparked) => &mut counts.unparked,
            Reply::Nil(Why::WaitEnd) => &mut counts.timed_out,
        };
        *counter += 1;
    }

    /// An answer is known; it leaves when its turn has come.
    pub(super) fn answer(&mut self, conn: usize, place: u32, got: Got) {
        let Some(own) = self.conns[conn].place(place) else { return };
        own.got = Some(got);
        while self.conns[conn].places.front().is_some_and(|front| front.got.is_some()) {
            let Some(front) = self.conns[conn].places.pop_front() else { return };
            self.check(conn, &front);
            let Some(got) = front.got else { return };
            let keys = match &front.cmd {
                Cmd::Get(key) => vec![*key],
                Cmd::Mget(keys) => keys.clone(),
                _ => Vec::new(),
            };
            if let Got::Replies(replies) = &got {
                let nils = keys.iter().zip(replies).filter(|(_, reply)| matches!(reply, Reply::Nil(_)));
                let nil_at = front.missed.unwrap_or(self.now);
                let load = |(key, reply): (&usize, &Reply<Version>)| Load {
                    key: *key,
                    nil_at,
                    conn,
                    leads: *reply == Reply::Nil(Why::Lead),
                    version: None,
                    repeat_by: None,
                };
                let loads: Vec<Load> = nils.map(load).collect();
                if !matches!(self.actors[front.actor].step, Step::Writing(..)) {
                    self.actors[front.actor].loads = loads;
                }
            }
            let delay = self.delay();
            let at = self.conns[conn].deliver_after.max(self.now + delay);
            self.conns[conn].deliver_after = at;
            self.at_time(at, Event::Deliver { conn, place: front.place, actor: front.actor, got });
        }
    }
}
