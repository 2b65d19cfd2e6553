//! What is asked of every reply, and of the end.

use super::super::super::desk::LAST_LOOK_MS;
use super::super::super::model::MOST_LEADS;
use super::*;

impl World {
    /// Whether a reply is one that one Redis could have given, which may evict.
    pub(super) fn check(&mut self, conn: usize, front: &Place) {
        let keys: &[usize] = match &front.cmd {
            Cmd::Get(key) => std::slice::from_ref(key),
            Cmd::Mget(keys) => keys,
            Cmd::Set { key, .. } => {
                let point = &mut self.conns[conn].points[*key];
                *point = (*point).max(front.executed.unwrap_or(0));
                return;
            }
            Cmd::Del(_) => return,
        };
        let Some(Got::Replies(replies)) = &front.got else { return };
        for ((key, reply), floor) in keys.iter().zip(replies).zip(&front.floors) {
            let (version, is_stale) = match reply {
                Reply::Nil(_) => continue,
                Reply::Value(version) => (*version, false),
                Reply::Stale(version) => (*version, true),
            };
            if version < *floor && !self.cache.was_resurrected(*key, version) {
                self.fail(|| format!("key {key}: {front:?} read {version}, and {floor} was acknowledged before it"));
            }
            if front.forbidden.contains(&version) {
                self.fail(|| format!("key {key}: {front:?} read what was written behind it"));
            }
            let from = self.conns[conn].points[*key].max(front.arrived);
            match self.cache.held(*key, version, is_stale, from, self.now) {
                Some(point) if !is_stale => self.conns[conn].points[*key] = point,
                Some(_) => {}
                None => self.fail(|| format!("key {key}: {front:?} read {version}, which was not there from {from}")),
            }
        }
    }

    /// Whether a client may get nil.
    pub(super) fn check_nil(&mut self, pod: usize, key: usize, why: Why) {
        if why == Why::Lead {
            self.cache.leads[key] += 1;
            let waited = self.now - self.pods[pod].granted[key].take().unwrap_or(self.now);
            if self.is_quiet() && waited > MOST_DELAY_MS {
                self.fail(|| format!("pod {pod}: who leads key {key} waited {waited} ms"));
            }
        }
        if self.is_quiet() && why == Why::WaitEnd {
            self.fail(|| format!("pod {pod}, key {key}: waited in vain though nobody is slow"));
        }
        let is_plain = self.is_quiet() && !self.config.sharing && !self.config.groups;
        if is_plain && !matches!(why, Why::Lead | Why::Shared) {
            self.fail(|| format!("pod {pod}, key {key}: nil because of {why:?}"));
        }
        if self.is_quiet() && !self.config.groups && why == Why::Again {
            self.fail(|| format!("pod {pod}, key {key}: a latecomer's read over the holder's own connection was not let wait"));
        }
    }

    /// Nothing waits behind a read that waits: from `since` on it needed only what the cache was being asked.
    pub(super) fn check_haste(&mut self, asker: Asker, since: Millis) {
        let took = self.now.saturating_sub(since);
        if self.config.calm && took > MOST_DELAY_MS {
            self.fail(|| format!("{asker:?} held up another command for {took} ms"));
        }
    }

    /// Beside those who lead, one client of each connection is told of a key's miss within a lease, unless misses are to be passed on.
    pub(super) fn check_told(&mut self, conn: usize, replies: &[Reply<Version>], missing: &[usize]) {
        let is_told = |why: Why| matches!(why, Why::Passed | Why::Unparked | Why::WaitEnd);
        let leads = replies.iter().any(|reply| matches!(reply, Reply::Nil(Why::Lead | Why::LocalLead)));
        let (now, rule) = (self.now, self.config.rule);
        for (reply, key) in replies.iter().zip(missing) {
            let Reply::Nil(why) = reply else { continue };
            let again = self.conns[conn].told.iter().any(|(told, at)| told == key && now < at + rule.lease);
            if again && !leads && is_told(*why) && rule.at_wait_end == AtWaitEnd::Error {
                self.fail(|| {
                    format!("key {key}: a second client of connection {conn} was told of its miss within a lease: {why:?}")
                });
            }
            self.conns[conn].told.push((*key, now));
        }
    }

    /// While the cache is away a pod loads a key once a lease.
    pub(super) fn check_alone(&mut self, pod: usize, key: usize) {
        let lease = self.config.rule.lease;
        let last = self.pods[pod].led_alone[key].replace(self.now);
        if let Some(since) = last.map(|last| self.now - last).filter(|since| *since < lease) {
            self.fail(|| format!("pod {pod}, key {key}: two loads within {since} ms while the cache is away"));
        }
    }

    /// Who waits for a value hears of it when it comes, or looks now and then.
    pub(super) fn check_woken(&mut self, asker: Asker, key: usize, version: Version, waited: Millis) {
        let late = self.cache.since(key, version).map_or(0, |since| self.now - since).min(waited);
        // A pod does not listen for the end of its own lease, which a reader of several keys in another may bring about before.
        let hears = self.config.signs && !self.config.groups;
        let most = if hears { MOST_DELAY_MS } else { LAST_LOOK_MS + MOST_DELAY_MS };
        if self.is_quiet() && late > most {
            self.fail(|| format!("{asker:?} was given what had been there for {late} ms"));
        }
    }

    pub(super) fn at_the_end(&mut self) {
        for actor in 0..self.actors.len() {
            if self.actors[actor].step != Step::Idle || self.actors[actor].left > 0 {
                self.fail(|| format!("actor {actor} is stuck"));
            }
        }
        for key in 0..self.config.keys {
            let (leads, ends) = (self.cache.leads[key], self.cache.ends[key]);
            let leases = (self.now / self.config.rule.lease) as u32;
            if self.is_quiet() && leads > 1 + ends + leases {
                self.fail(|| format!("key {key}: {leads} loads though only {ends} leases were ended"));
            }
        }
        let (row, nobody_fills) = (self.cache.most_in_a_row, self.config.calm && self.config.unfilled >= 10);
        if nobody_fills && !self.config.rule.stale && row > MOST_LEADS {
            self.fail(|| format!("{row} took one lease after the other, and nobody filled it"));
        }
        for pod in 0..self.pods.len() {
            let desk = &self.pods[pod].desk;
            let rest = (desk.waiting(), desk.outstanding(), desk.next_deadline());
            if rest != (0, 0, None) {
                self.fail(|| format!("pod {pod} keeps {rest:?}"));
            }
        }
    }
}
