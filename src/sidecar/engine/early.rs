//! Early expiry: a hot key is refreshed shortly before it expires, by one reader, while all others go on getting its value.
//!
//! XFetch: each read of a key that has `left` to live rolls dice, and refreshes where `-beta * load * ln(U) >= left`, with `U`
//! uniform over (0, 1] and `load` the time that a load takes. The more readers, the earlier the first hits; rare keys are left to
//! expire. By itself that makes `e^(1/beta)` loads an expiry at any rate; here a reader that hits asks for the lease first, which
//! makes it one. A pod that knows too short a life (another refreshed the key) is told so by the same question.
//!
//! How long a key has to live must not be asked for on each read. [`Early`] remembers it for as many keys as it has places: from
//! the writes that pass, and from a PTTL now and then, for keys that are read again and again. One read in [`READS_PER_PROBE`]
//! may bring a PTTL along: a hit costs at most 1.04 commands.

use super::lease::Millis;

/// How many keys' deadlines are remembered: the table takes 128 KiB, from the first read of a rule with early expiry on.
const PLACES: usize = 16_384;
/// One PTTL for so many reads.
pub const READS_PER_PROBE: u32 = 25;
/// Unspent PTTLs add up to this.
const MOST_PROBES: u32 = 8;
/// A key whose life is not known is worth a PTTL if it is read twice within this.
const WARM_MS: Millis = 1_000;
/// A key without a TTL, which none of its rule's writes made so, is asked about no sooner than after this.
const ENDLESS_MS: Millis = 10_000;
/// A place that another key has is given away to one of so many reads, so that yesterday's hot keys do not keep it.
const GIVEN_AWAY_IN: u32 = 64;
/// `-ln(U)` is never more for a `U` of 32 bits.
const MOST_LUCK: f64 = 22.2;

/// What a read should do besides.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Advice {
    /// Nothing.
    Pass,
    /// Ask for the key's PTTL, and report it with [`Early::probed`].
    Probe,
    /// If it finds its value, ask for the lease before passing it on: the key has so many milliseconds left, as far as is known.
    Refresh {
        /// Milliseconds.
        left: Millis,
    },
}

/// What PTTL says of a key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Life {
    /// It has so many milliseconds left.
    Ends(Millis),
    /// It has no TTL.
    Endless,
    /// It does not exist, or the server did not say.
    Over,
}

impl Life {
    /// From the number that PTTL answers with.
    pub fn from_pttl(answer: Option<i64>) -> Self {
        match answer {
            Some(-1) => Self::Endless,
            Some(left) => Millis::try_from(left).map_or(Self::Over, Self::Ends),
            None => Self::Over,
        }
    }
}

/// What is known of a key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Hint {
    Nothing,
    /// It was read then, and its life is not known.
    Read(Millis),
    /// It expires then.
    Expires(Millis),
    /// It is not to be refreshed until then.
    Silent(Millis),
}

impl Hint {
    /// Whether it tells something of what is to come.
    fn is_good(self, now: Millis) -> bool {
        matches!(self, Self::Expires(at) | Self::Silent(at) if now < at)
    }
}

/// The deadlines that one worker knows. Keys are given by hash: a false match costs a question too many or a refresh too few.
#[derive(Debug, Default)]
pub struct Early {
    /// Fingerprint, kind of hint, and its time; empty until the first use.
    places: Vec<u64>,
    /// In reads: see [`READS_PER_PROBE`].
    saved: u32,
}

const TIME_BITS: u32 = 40;
const KIND_BITS: u32 = 2;
const TIME_MASK: u64 = (1 << TIME_BITS) - 1;

impl Early {
    /// A read of a key is about to be sent. `reach` is how long a load takes in milliseconds, times `beta`, which scales how early
    /// refreshes begin; `random` is uniform over all of `u32`. Each is asked for only where it decides something.
    #[inline]
    pub fn advise(&mut self, hash: u64, now: Millis, reach: impl FnOnce() -> f64, random: impl FnOnce() -> u32) -> Advice {
        self.saved = (self.saved + 1).min(READS_PER_PROBE * MOST_PROBES);
        let (hint, is_own) = self.at(hash);
        match hint {
            Hint::Expires(at) if is_own && now < at => roll(at - now, reach(), random),
            Hint::Silent(until) if is_own && now < until => Advice::Pass,
            _ => self.advise_unknown(hash, now, (hint, is_own), random),
        }
    }

    /// The same for a key whose life is not known.
    fn advise_unknown(&mut self, hash: u64, now: Millis, (hint, is_own): (Hint, bool), random: impl FnOnce() -> u32) -> Advice {
        if hint.is_good(now) && !random().is_multiple_of(GIVEN_AWAY_IN) {
            return Advice::Pass;
        }
        let advice = match hint {
            Hint::Read(at) if is_own && now < at + WARM_MS && self.saved >= READS_PER_PROBE => {
                self.saved -= READS_PER_PROBE;
                Advice::Probe
            }
            _ => Advice::Pass,
        };
        self.put(hash, Hint::Read(now));
        advice
    }

    /// How long a key has to live, as far as is known.
    pub fn left(&self, hash: u64, now: Millis) -> Option<Millis> {
        match self.at(hash) {
            (Hint::Expires(at), true) => at.checked_sub(now),
            _ => None,
        }
    }

    /// A write of a key passes that gives it a life of `ttl_ms`.
    pub fn stored(&mut self, hash: u64, now: Millis, ttl_ms: Millis) {
        let (hint, is_own) = self.at(hash);
        if is_own || !hint.is_good(now) {
            self.put(hash, Hint::Expires(now + ttl_ms));
        }
    }

    /// PTTL said how long a key lives.
    pub fn probed(&mut self, hash: u64, now: Millis, life: Life) {
        let hint = match life {
            Life::Ends(left) => Hint::Expires(now + left),
            Life::Endless => Hint::Silent(now + ENDLESS_MS),
            Life::Over => Hint::Nothing,
        };
        self.put(hash, hint);
    }

    /// Somebody refreshes a key, or its life is longer than was known: no dice until then.
    pub fn silence(&mut self, hash: u64, until: Millis) {
        self.put(hash, Hint::Silent(until));
    }

    /// A key is deleted.
    pub fn deleted(&mut self, hash: u64) {
        if self.at(hash).1 {
            self.put(hash, Hint::Nothing);
        }
    }

    /// What is in a key's place, and whether it is the key's own.
    #[inline]
    fn at(&self, hash: u64) -> (Hint, bool) {
        let place = self.places.get(hash as usize % PLACES).copied().unwrap_or(0);
        let time = place & TIME_MASK;
        let hint = match place >> TIME_BITS & 3 {
            0 => Hint::Nothing,
            1 => Hint::Read(time),
            2 => Hint::Expires(time),
            _ => Hint::Silent(time),
        };
        (hint, place >> (TIME_BITS + KIND_BITS) == fingerprint(hash))
    }

    fn put(&mut self, hash: u64, hint: Hint) {
        let (kind, time) = match hint {
            Hint::Nothing => (0, 0),
            Hint::Read(at) => (1, at),
            Hint::Expires(at) => (2, at),
            Hint::Silent(until) => (3, until),
        };
        self.places.resize(PLACES, 0);
        self.places[hash as usize % PLACES] =
            fingerprint(hash) << (TIME_BITS + KIND_BITS) | kind << TIME_BITS | time.min(TIME_MASK);
    }
}

/// The bits of a hash that its place does not tell.
fn fingerprint(hash: u64) -> u64 {
    hash >> (TIME_BITS + KIND_BITS)
}

#[inline]
fn roll(left: Millis, reach: f64, random: impl FnOnce() -> u32) -> Advice {
    let needed = left as f64;
    if needed > reach * MOST_LUCK {
        return Advice::Pass;
    }
    let luck = -((f64::from(random()) + 1.0) / 4_294_967_296.0).ln();
    if reach * luck >= needed { Advice::Refresh { left } } else { Advice::Pass }
}

#[cfg(test)]
#[path = "early/tests.rs"]
mod tests;
