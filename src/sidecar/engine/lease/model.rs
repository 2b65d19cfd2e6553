//! What the desk expects of the cache: the scripts over one key and its companions, as code.
//!
//! The simulation runs against this. A [`Slot`] is a key K with its lease `L`, its
//! stale copy S and its negative entry N. Each function is one script or transaction: it happens at one moment of the server's clock.

use super::{Begun, EARLY_SLACK_MS, Generation, Millis, Mode, Rule, Token};

/// So many takers without a fill make a key hit-for-miss.
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
    /// When it may be taken again. Its record lives longer.
    pub until: Millis,
    /// How many took it.
    pub leads: u32,
    /// Whether somebody waits for its end.
    pub waited_for: bool,
    /// Whether nobody should.
    pub hit_for_miss: bool,
    /// When its record expires.
    pub record_until: Millis,
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
}

impl<V> Default for Slot<V> {
    fn default() -> Self {
        Self { value: None, lease: None, stale: None, negative: false }
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
    /// For how long.
    pub ttl: Millis,
    /// How long the stale copy lives. Zero: there is none.
    pub stale_ttl: Millis,
}

/// What FILL did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Filled {
    /// The value is there.
    Stored {
        /// Whether somebody in another pod waits for this.
        waited_for: bool,
    },
    /// The command did as it says, and the key was removed.
    Removed {
        /// Whether somebody in another pod waits for this.
        waited_for: bool,
    },
    /// The command's condition failed: nothing was written.
    Unchanged,
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
        if let (Mode::Miss, Some(kept)) = (mode, &self.value) {
            return Begun::Value(kept.value.clone());
        }
        if let (Mode::Early { left }, Some(kept)) = (mode, &self.value)
            && kept.until > now + left + EARLY_SLACK_MS
        {
            return Begun::Fresh;
        }
        let stale = self.stale.as_ref().map(|kept| kept.value.clone());
        let record_until = now + rule.memory;
        let Some(lease) = self.lease.as_mut().filter(|lease| lease.generation.run == run) else {
            // What was begun before, and ended, is not begun again where BEGIN is repeated.
            let generation = Generation { random: next(fresh ^ now), run };
            self.lease = Some(Lease {
                generation,
                taker: fresh,
                until: now + rule.lease,
                leads: 1,
                waited_for: false,
                hit_for_miss: false,
                record_until,
            });
            return Begun::Leased { token: Token { generation, taker: fresh }, stale };
        };
        let generation = lease.generation;
        if lease.hit_for_miss {
            return Begun::Shared { generation };
        }
        if now < lease.until && lease.taker != fresh {
            lease.waited_for |= mode == Mode::Miss;
            return Begun::Busy { generation, taker: lease.taker, stale, remaining: lease.until - now };
        }
        if now >= lease.until {
            if lease.leads >= MOST_LEADS {
                (lease.hit_for_miss, lease.record_until) = (true, now + HIT_FOR_MISS_MS);
                return Begun::Shared { generation };
            }
            (lease.taker, lease.until, lease.record_until) = (fresh, now + rule.lease, record_until);
            (lease.leads, lease.waited_for) = (lease.leads + 1, false);
        }
        Begun::Leased { token: Token { generation, taker: fresh }, stale }
    }

    /// FILL. Under the generation that `L` has, the value is stored, and the generation ends: the SET may have been an update, and
    /// then what others loaded under it is older. Otherwise the key is removed, unless it had this very value before. A condition
    /// that fails leaves all as it is; but without a valid generation the command still ends whichever `L` has, so that the desk may
    /// count it against any one nil. Where a generation ends by what is not stored under it, `L` stays with its holder.
    pub fn fill(&mut self, now: Millis, run: u32, generation: Option<Generation>, set: &Set<V>) -> Filled {
        self.expire(now);
        let is_current = |lease: &Lease| lease.generation.run == run && Some(lease.generation) == generation;
        let is_valid = self.lease.as_ref().is_some_and(is_current);
        if !set.condition.is_met(self.value.is_some()) {
            if !is_valid {
                self.renew(now, run);
            }
            return Filled::Unchanged;
        }
        let is_same = self.value.as_ref().is_some_and(|kept| kept.value == set.value);
        let waited_for = if is_valid || is_same { self.end_lease() } else { self.renew(now, run) };
        self.value = Some(Kept { value: set.value.clone(), until: now + set.ttl });
        (self.stale, self.negative) = (None, false);
        if is_valid {
            self.keep_stale(now, set);
        } else if !is_same {
            self.value = None;
            return Filled::Removed { waited_for };
        }
        Filled::Stored { waited_for }
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
        std::mem::take(self).value.is_some()
    }

    /// RELEASE. The generation stays, whether it is still the holder's or a later one: the next taker goes on under it. Returns
    /// whether somebody waits.
    pub fn release(&mut self, now: Millis, token: Token) -> bool {
        self.expire(now);
        let is_holders = |lease: &&mut Lease| lease.taker == token.taker;
        let Some(lease) = self.lease.as_mut().filter(is_holders) else { return false };
        lease.until = 0;
        lease.waited_for
    }

    /// `L` goes. Returns whether somebody waits for that.
    fn end_lease(&mut self) -> bool {
        self.lease.take().is_some_and(|lease| lease.waited_for)
    }

    /// The generation ends. Who holds the lease holds it on under the next; a lease that nobody holds goes. Returns whether somebody
    /// waits for that.
    fn renew(&mut self, now: Millis, run: u32) -> bool {
        let is_held = |lease: &&mut Lease| !lease.hit_for_miss && now < lease.until && lease.generation.run == run;
        let Some(lease) = self.lease.as_mut().filter(is_held) else { return self.end_lease() };
        (lease.generation.random, lease.leads) = (next(lease.generation.random), 1);
        false
    }

    fn keep_stale(&mut self, now: Millis, set: &Set<V>) {
        if set.stale_ttl > 0 {
            self.stale = Some(Kept { value: set.value.clone(), until: now + set.ttl + set.stale_ttl });
        }
    }
}
