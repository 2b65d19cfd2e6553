//! What the cache does with what comes.

use super::*;

impl World {
    pub(super) fn execute(&mut self, pod: usize, epoch: u32, req: Req) {
        if epoch != self.epoch(pod) || self.now < self.cache.away_until {
            if let Req::Client { cmd, .. } = &req {
                self.unlock(cmd);
            }
            return self.reply(pod, epoch, req, Rep::Failed);
        }
        let now = self.now;
        let rep = match &req {
            Req::Client { cmd: Cmd::Get(key), .. } => Rep::Values(vec![self.cache.get(now, *key)]),
            Req::Client { cmd: Cmd::Mget(keys), .. } => Rep::Values(keys.iter().map(|key| self.cache.get(now, *key)).collect()),
            Req::Client { cmd: Cmd::Del(key), .. } => {
                self.cache.delete(now, *key);
                Rep::Done
            }
            Req::Client { conn, place, cmd: cmd @ Cmd::Set { key, version, condition, fill }, verdict } => {
                self.unlock(cmd);
                if let Some(own) = self.conns[*conn].place(*place) {
                    own.executed = Some(now);
                }
                let ttl = self.random.u64(1..self.config.ttl);
                let stale_ttl = if self.config.rule.stale { self.random.u64(1..600) } else { 0 };
                let set = Set { value: *version, condition: *condition, ttl, stale_ttl };
                self.set(*key, &set, *verdict, *fill)
            }
            Req::Begin { key, fresh, mode, rule } => {
                let begun = self.cache.begin(now, *key, *fresh, *mode, rule);
                if self.cache.two_hold {
                    self.fail(|| format!("key {key}: a lease is given to {fresh} that somebody holds"));
                }
                Rep::Begun(begun)
            }
            Req::Release { key, token } => {
                self.cache.release(now, *key, *token);
                Rep::Done
            }
        };
        while let Some(key) = self.cache.announced.pop() {
            self.publish(key);
        }
        self.reply(pod, epoch, req, rep);
    }

    pub(super) fn set(&mut self, key: usize, set: &Set<Version>, verdict: Verdict, fill: bool) -> Rep {
        let before = self.cache.get(self.now, key);
        let rep = if verdict == Verdict::Update {
            self.counts.updates += 1;
            self.cache.update(self.now, key, set);
            Rep::Done
        } else {
            let written = self.cache.fill(self.now, key, verdict, set);
            self.counts.stored += u64::from(written == Written::Stored);
            self.counts.removed += u64::from(written == Written::Removed);
            Rep::Written(written)
        };
        let after = self.cache.get(self.now, key);
        self.counts.fills += u64::from(fill);
        let removed = matches!(rep, Rep::Written(Written::Removed));
        self.counts.spoiled += u64::from(fill && after.is_none() && set.value == self.database[key] && removed);
        let newest = self.cache.newest[key];
        if fill && after == Some(set.value) && before != after && set.value < newest {
            self.fail(|| format!("key {key}: {} stored under {verdict:?}, and {newest} was acknowledged", set.value));
        }
        rep
    }

    pub(super) fn reply(&mut self, pod: usize, epoch: u32, req: Req, rep: Rep) {
        let delay = self.delay();
        let lane = self.lane(&req);
        let at = self.pods[pod].back_after[lane].max(self.now + delay);
        self.pods[pod].back_after[lane] = at;
        self.at_time(at, Event::Back { pod, epoch, req, rep });
    }
}
