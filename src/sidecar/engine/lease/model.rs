//! What the desk expects of the cache: the scripts over one key and its companions, as code.
//!
//! The simulation runs against this, and an integration test holds it to the scripts on real servers, step by step. A [`Slot`] is a
//! key K with its lease `L`, its stale copy S and its negative entry N. Each function is one script or transaction: it happens at
//! one moment of the server's clock.

use super::{Begun, EARLY_SLACK_MS, Generation, Millis, Mode, Rule, Token, Verdict, Written};

/// So many takers of a missing key without a fill make it hit-for-miss.
pub const MOST_LEADS: u32 = 3;
/// For so long.
pub const HIT_FOR_MISS_MS: Millis = 30_000;

/// A value with its end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Kept<V> {
    /// The value.
    pub value: V,
    /// When it expires.
    pub until: Millis,
}

/// `L`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Lease {
    /// Since when nothing was written.
    pub generation: Generation,
    /// Who took it last.
    pub taker: u64,
    /// When it may be taken again; zero: it was given back. Its record lives longer.
    pub until: Millis,
    /// How many took it while the key was missing. Who refreshes a key that is there says nothing of whether anybody fills it when
    /// it is not.
    pub leads: u32,
    /// Whether somebody waits for its end.
    pub waited_for: bool,
    /// Whether nobody should.
    pub hit_for_miss: bool,
    /// When its record expires.
    pub record_until: Millis,
}

impl Lease {
    /// One that nobody has taken yet, of a generation that begins now: what was begun before, and ended, is not begun again where
    /// BEGIN is repeated.
    fn new(now: Millis, run: u32, fresh: u64) -> Self {
        Self {
            generation: Generation { random: next(fresh ^ now), run },
            taker: fresh,
            until: 0,
            leads: 0,
            waited_for: false,
            hit_for_miss: false,
            record_until: 0,
        }
    }
}

/// A key and what stands beside it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Slot<V> {
    /// K.
    pub value: Option<Kept<V>>,
    /// `L`.
    pub lease: Option<Lease>,
    /// S.
    pub stale: Option<Kept<V>>,
    /// N.
    pub negative: bool,
    /// Whether the end of `L` was announced to those who wait in other pods. Whoever tells them resets it.
    pub announced: bool,
}

impl<V> Default for Slot<V> {
    fn default() -> Self {
        Self { value: None, lease: None, stale: None, negative: false, announced: false }
    }
}

/// When a SET stores.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Condition {
    /// Always.
    Always,
    /// Where there is none: `NX`, `SETNX`.
    Missing,
    /// Where there is one: `XX`.
    Present,
}

impl Condition {
    fn is_met(self, is_there: bool) -> bool {
        match self {
            Self::Always => true,
            Self::Missing => !is_there,
            Self::Present => is_there,
        }
    }
}

/// A client's SET, with the TTL that was planned for it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Set<V> {
    /// What it stores.
    pub value: V,
    /// When.
    pub condition: Condition,
    /// For how long. Zero: until a moment that has passed, so that nothing stays.
    pub ttl: Millis,
    /// How long the stale copy outlives it. Zero: there is none; nor is there of a SET with a condition.
    pub stale_ttl: Millis,
}

/// Another random number: the scripts have a digest for it.
const fn next(random: u64) -> u64 {
    let mixed = (random ^ (random >> 30)).wrapping_add(1).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    mixed ^ (mixed >> 27)
}

impl<V: Clone + PartialEq> Slot<V> {
    /// Drops what has expired.
    pub fn expire(&mut self, now: Millis) {
        self.value = self.value.take().filter(|kept| now < kept.until);
        self.stale = self.stale.take().filter(|kept| now < kept.until);
        self.lease = self.lease.take().filter(|lease| now < lease.record_until);
    }

    /// GET.
    pub fn get(&mut self, now: Millis) -> Option<V> {
        self.expire(now);
        self.value.as_ref().map(|kept| kept.value.clone())
    }

    /// BEGIN, at a server whose run id begins with `run`. May be repeated with the same `fresh`.
    pub fn begin(&mut self, now: Millis, run: u32, fresh: u64, mode: Mode, rule: &Rule) -> Begun<V> {
        self.expire(now);
        match (mode, &self.value) {
            (Mode::Miss, Some(kept)) => return Begun::Value(kept.value.clone()),
            (Mode::Early { left }, Some(kept)) if kept.until > now + left + EARLY_SLACK_MS => return Begun::Fresh,
            _ => {}
        }
        let is_miss = mode == Mode::Miss;
        let stale = self.stale.as_ref().filter(|_| is_miss && rule.stale).map(|kept| kept.value.clone());
        self.lease.take_if(|lease| lease.generation.run != run);
        let lease = self.lease.get_or_insert_with(|| Lease::new(now, run, fresh));
        let generation = lease.generation;
        if lease.hit_for_miss {
            return Begun::Shared { generation };
        }
        let token = Token { generation, taker: fresh };
        if now < lease.until {
            if lease.taker == fresh {
                return Begun::Leased { token, stale };
            }
            lease.waited_for |= is_miss;
            return Begun::Busy { generation, taker: lease.taker, stale, remaining: lease.until - now };
        }
        lease.taker = fresh;
        // Where there is a stale copy nobody waits for who loads, so that one at a time may go on trying.
        if is_miss && stale.is_none() && lease.leads >= MOST_LEADS {
            self.announced |= std::mem::take(&mut lease.waited_for);
            (lease.hit_for_miss, lease.until, lease.record_until) = (true, 0, now + HIT_FOR_MISS_MS);
            return Begun::Shared { generation };
        }
        (lease.until, lease.record_until) = (now + rule.lease, now + rule.memory);
        lease.leads += u32::from(is_miss);
        Begun::Leased { token, stale }
    }

    /// FILL. Under the generation that `L` has, the value is stored, and the generation ends: the SET may have been an update, and
    /// then what others loaded under it is older. Otherwise the key is removed, unless it had this very value before. A condition
    /// that fails leaves all as it is; but without a valid generation the command still ends whichever `L` has, so that the desk may
    /// count it against any one nil. Where a generation ends by what is not stored under it, `L` stays with its holder.
    ///
    /// [`Verdict::Update`] is one key's among several of the same command: alone it goes as [`Slot::update`].
    pub fn fill(&mut self, now: Millis, run: u32, verdict: Verdict, set: &Set<V>) -> Written {
        self.expire(now);
        let is_valid = match verdict {
            Verdict::Update => true,
            Verdict::Fill(generation) => self.is_current(run, generation),
            Verdict::Ambiguous(_) => false,
        };
        if !set.condition.is_met(self.value.is_some()) {
            if !is_valid {
                self.renew(now, run);
            }
            return Written::Unchanged;
        }
        let is_over = set.ttl == 0;
        let is_same = !is_over && self.value.as_ref().is_some_and(|kept| kept.value == set.value);
        if is_valid || is_same {
            self.end_lease();
        } else {
            self.renew(now, run);
        }
        (self.value, self.stale, self.negative) = (None, None, false);
        if is_over || !(is_valid || is_same) {
            return Written::Removed;
        }
        self.value = Some(Kept { value: set.value.clone(), until: now + set.ttl });
        if is_valid {
            self.keep_stale(now, set);
        }
        Written::Stored
    }

    /// What `LARDER.FILL` sends: FILL under a generation, which does nothing under another. Returns whether it stored.
    pub fn fill_if(&mut self, now: Millis, run: u32, generation: Generation, set: &Set<V>) -> bool {
        self.expire(now);
        self.is_current(run, generation) && self.fill(now, run, Verdict::Fill(generation), set) == Written::Stored
    }

    /// A SET that is an update: stored, all companions gone, in one transaction. Returns whether it stored.
    pub fn update(&mut self, now: Millis, set: &Set<V>) -> bool {
        self.expire(now);
        let is_met = set.condition.is_met(self.value.is_some());
        (self.lease, self.stale, self.negative) = (None, None, false);
        if is_met {
            self.value = Some(Kept { value: set.value.clone(), until: now + set.ttl });
            self.keep_stale(now, set);
        }
        is_met
    }

    /// DEL, UNLINK or an invalidation: all gone, in one transaction. Returns whether the key was there.
    pub fn delete(&mut self, now: Millis) -> bool {
        self.expire(now);
        let announced = self.announced;
        let gone = std::mem::replace(self, Self { announced, ..Self::default() });
        gone.value.is_some()
    }

    /// RELEASE. The generation stays, whether it is still the holder's or a later one: the next taker goes on under it. Returns
    /// whether there was something to give back.
    pub fn release(&mut self, now: Millis, token: Token) -> bool {
        self.expire(now);
        let is_holders = |lease: &&mut Lease| lease.taker == token.taker && lease.until != 0;
        let Some(lease) = self.lease.as_mut().filter(is_holders) else { return false };
        lease.until = 0;
        self.announced |= std::mem::take(&mut lease.waited_for);
        true
    }

    fn is_current(&self, run: u32, generation: Generation) -> bool {
        generation.run == run && self.lease.as_ref().is_some_and(|lease| lease.generation == generation)
    }

    /// `L` goes.
    fn end_lease(&mut self) {
        self.announced |= self.lease.take().is_some_and(|lease| lease.waited_for);
    }

    /// The generation ends. Who holds the lease holds it on under the next; a lease that nobody holds goes.
    fn renew(&mut self, now: Millis, run: u32) {
        let is_held = |lease: &&mut Lease| now < lease.until && lease.generation.run == run;
        let Some(lease) = self.lease.as_mut().filter(is_held) else { return self.end_lease() };
        (lease.generation.random, lease.leads) = (next(lease.generation.random), lease.leads.min(1));
    }

    fn keep_stale(&mut self, now: Millis, set: &Set<V>) {
        if set.condition == Condition::Always && set.ttl > 0 && set.stale_ttl > 0 {
            self.stale = Some(Kept { value: set.value.clone(), until: now + set.ttl + set.stale_ttl });
        }
    }
}
