//! Leases for clients that know nothing of them: who loads a missing key, who waits, and which values may be stored.
//!
//! # The trouble with cache-aside
//!
//! An application reads a key, gets nil, loads from its database, and sets the key. Two things go wrong. When a hot key expires,
//! everybody gets nil at once and loads (a stampede). And between the load and the SET another client may change the database and
//! delete or set the key: the late SET then stores a value that is older than a write which was already acknowledged.
//!
//! # Outstanding misses
//!
//! The wire does not say whether a `SET` stores what was loaded (a *fill*) or what was just written to the database (an
//! *update*). What the sidecar knows is to whom it answered nil. Each nil for a key of an armed rule is an **outstanding miss**:
//! somebody may be loading, with what the database said at some moment after that nil. A SET that meets no outstanding miss is an
//! update. One that meets some may be either, and is stored only where both are harmless.
//!
//! # Why a generation
//!
//! The cache keeps a lease beside the key, `L`, while somebody loads it. Each `L` begins a **generation**: random bits, and the
//! beginning of the server's run id. Every covered write, deletion and invalidation removes `L` in its own transaction. So *"`L`
//! still has generation G"* proves that nothing was written or invalidated since G began, and a value that was loaded after G began
//! is as new as any. The holder's lease may end without a write: the next taker continues the same generation, and the late fill of
//! the first is as good as that of the second. A fill that is stored ends its generation too, since it may have been an update: what
//! others loaded under it may be older. Losing `L` (eviction, a failover, a restart) loses a fill, never the truth.
//!
//! A SET that is refused may have been an update, too. So it ends the generation, but not the lease: where somebody holds it, `L` is
//! held on under a new generation. What that holder loads will be refused in its turn, and only then does the next one load. If the
//! next began at once, its load would be under way when the holder's SET is refused, and be refused for that, and so on: of a key
//! that is read all the time, one deletion in the midst of a load would keep all loads from being stored, two at a time, for ever.
//!
//! # What is promised
//!
//! - No value older than an acknowledged write or invalidation is stored over it, except by an unplanned failover, which may lose
//!   the write itself (but never brings back a lease). Where it cannot be known what a SET is, the client gets its reply and the
//!   key is removed: a miss, never a wrong value.
//! - That holds for loads up to [`Rule::memory`] where connections are exclusive: one actor, one command after the other. Where
//!   clients share connections (pools, multiplexing), a SET says nothing of the load that it ends. Then it holds for updates by
//!   deletion, and loads up to [`Rule::overlap`] if the next load of the key is under way when they end, or longer ones that end over
//!   the connection of their nil, or one without a nil, though a pool has lent theirs for that next load; for updates by SET over a
//!   connection on which a load of the same key began and has not ended, within [`Rule::settle`]. See [`misses`], also for the bounds.
//! - A SET of which nobody knows whether it was carried out may be sent again, for a lease.
//! - It does not hold while a rule is off because its loads are seldom stored ([`Effect::Disarmed`]): then nothing is tracked.
//! - At most one nil per key and lease, over all pods, while leases are not lost; connections that send other commands meanwhile get
//!   one of their own besides, and commands that lead another key get theirs: they must not wait.
//! - Whoever waits is answered within [`Rule::wait`]; a command that leads any key never waits. A holder that goes away is succeeded
//!   by one.
//!
//! # Connections that carry other commands
//!
//! Replies leave in order, so a read that waits holds up whatever its connection carries behind it. Where that is anything but a read
//! of the same key or its fill, the wait ends at once. Told of the miss, all readers of a connection that is never quiet would load.
//! So one of them is, for each connection, key and lease ([`misses::Misses::was_told`]): it loads beside the holder, and its fill is
//! judged as any. The others get what a wait in vain brings: an error ([`Answer::CutShort`]), or nil where the rule says so.
//!
//! # The holder's own connection
//!
//! A pool that lends the connection returned last sends the next read over the one that holds the lease. To answer it at once would
//! let two load whenever a pool is used; never to answer it would have a client that gave its load up wait for itself. So it waits
//! for about the time of a load ([`rates::Rates::own_wait`]), then it gets nil. It is the connection's only command: any other
//! ends the wait, so nothing queues behind it. What it can hold up is a client whose every connection is lent to readers that wait,
//! and that needs one for its SET: by that much, and not for long, since waits in vain are seldom repeated.
//!
//! [`Desk`] decides all this for one pod. It does no I/O and has no clock: it is told what happened and at what time, and says
//! what is to be done. [`model`] is what it expects of the cache, written down as code.

pub mod desk;
pub mod forgotten;
pub mod load_times;
pub mod misses;
pub mod model;
pub mod rates;
mod timers;
pub mod under_way;

#[cfg(test)]
mod tests;

use std::fmt;
use std::hash::{Hash, Hasher};
use std::rc::Rc;

use rustc_hash::FxHasher;
use smallvec::SmallVec;

pub use desk::Desk;

/// Milliseconds on the worker's clock.
pub type Millis = u64;

/// The name of a key: which database, and its bytes.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Name {
    /// The database that was selected.
    pub database: u32,
    /// The key.
    pub key: Box<[u8]>,
}

/// One request of one client.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Asker {
    /// The client's connection. Unique in the process; numbers are not used again. Zero is nobody's.
    pub connection: u64,
    /// The reply's place in the connection's order.
    pub place: u32,
}

/// Who reads, and how.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Reader {
    /// The request.
    pub asker: Asker,
    /// The selected database.
    pub database: u32,
    /// A later command of the same client for the same server was sent before this one was answered. So nothing that is found out
    /// now may answer it: that could show what a later write did. It gets nil, as soon as it is known under which generation.
    pub overtaken: bool,
    /// The connection has had several commands under way at once: it is no single actor's. Where it is, a second read over the
    /// connection that holds a key's lease waits as any other; else see [`Why::Again`].
    pub shared: bool,
}

/// What becomes of a read whose wait is over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AtWaitEnd {
    /// It fails: the client may try again.
    Error,
    /// It gets nil, and loads beside the holder.
    Miss,
}

/// The parameters of one armed rule. All spans in milliseconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rule {
    /// Its position in the policy. Figures are kept by it: see [`Desk::policy_changed`].
    pub id: u16,
    /// How long a holder may load before somebody else may.
    pub lease: Millis,
    /// How long a nil counts as an outstanding miss, and a generation is remembered: ten leases.
    pub memory: Millis,
    /// For how long after the first SET that followed a nil another may still be its fill: the first was somebody else's, on a shared
    /// connection, or it is sent twice. Zero: the first SET on its connection ends an outstanding miss, whoever sent it.
    pub settle: Millis,
    /// How long a nil of another connection speaks beside younger ones: a load that began before a deletion may still end in a SET
    /// on a shared connection while the next one runs. At most a lease. A load that never ends in a SET keeps others from being stored
    /// for as long, where the key is written meanwhile. `None` trades the promise for hits: four times what loads take of late, but
    /// at least [`LEAST_OVERLAP_MS`]; a slower load may then be stored over an acknowledged deletion.
    pub overlap: Option<Millis>,
    /// How long a read may wait for a fill.
    pub wait: Millis,
    /// Whether that is the most, and a read waits less where loads take less: see [`rates::Rates::wait`].
    pub wait_follows: bool,
    /// What then becomes of it.
    pub at_wait_end: AtWaitEnd,
    /// Whether stale copies are kept: they are asked for on each miss.
    pub stale: bool,
}

/// See [`Rule::overlap`].
pub const LEAST_OVERLAP_MS: Millis = 100;

impl Rule {
    /// The usual proportions: ten leases of memory, a quarter of a lease to settle, a lease of overlap.
    pub const fn new(id: u16, lease: Millis, wait: Millis) -> Self {
        let (memory, settle) = (lease * 10, lease / 4);
        let (overlap, wait_follows, at_wait_end) = (Some(lease), false, AtWaitEnd::Error);
        Self { id, lease, memory, settle, overlap, wait, wait_follows, at_wait_end, stale: false }
    }

    /// [`Rule::overlap`], where loads take `load_ms`.
    fn overlap(&self, load_ms: f64) -> Millis {
        let measured = || ((load_ms * 4.0) as Millis).max(LEAST_OVERLAP_MS);
        self.overlap.unwrap_or_else(measured).min(self.lease)
    }
}

/// A span of time without writes of one key, as `L` in the cache names it: see the [module](self).
///
/// Its text is `RANDOM@RUN`: sixteen and eight hexadecimal digits, the latter the first of the server's run id.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Generation {
    /// From the taker who began it.
    pub random: u64,
    /// Of the server that kept it.
    pub run: u32,
}

impl Generation {
    /// The length of its text.
    pub const LEN: usize = 25;

    /// Reads its text. `None`: not a generation.
    pub fn parse(text: &[u8]) -> Option<Self> {
        let text = std::str::from_utf8(text).ok().filter(|text| text.len() == Self::LEN)?;
        let is_hex = |text: &str| text.bytes().all(|byte| byte.is_ascii_hexdigit());
        let (random, run) = text.split_once('@').filter(|(random, run)| random.len() == 16 && is_hex(random) && is_hex(run))?;
        Some(Self { random: u64::from_str_radix(random, 16).ok()?, run: u32::from_str_radix(run, 16).ok()? })
    }
}

impl fmt::Display for Generation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}@{:08x}", self.random, self.run)
    }
}

/// A lease, as its holder knows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Token {
    /// Proves that nothing was written.
    pub generation: Generation,
    /// Who took it: the random number of the BEGIN that won. Several takers may follow each other within a generation.
    pub taker: u64,
}

/// What BEGIN is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// The key was missing: its value, or the lease.
    Miss,
    /// The key is there and about to expire: the lease, though it is there.
    Early {
        /// How long it is thought to live. If it lives much longer ([`EARLY_SLACK_MS`]) somebody refreshed it meanwhile, and the
        /// lease is not given.
        left: Millis,
    },
}

/// By so much a key's life may be longer than a pod thought when it asks for the lease before the key expires.
pub const EARLY_SLACK_MS: Millis = 100;

/// What BEGIN answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Begun<V> {
    /// The key is there.
    Value(V),
    /// The key is there, and no string.
    Other,
    /// The key is there, and lives longer than was thought: see [`Mode::Early`].
    Fresh,
    /// The lease is ours.
    Leased {
        /// What was taken.
        token: Token,
        /// The stale copy, where there is one.
        stale: Option<V>,
    },
    /// Nobody fills this key: for a while nobody waits either.
    Shared {
        /// Of all who load meanwhile.
        generation: Generation,
    },
    /// Somebody has the lease.
    Busy {
        /// That of the lease.
        generation: Generation,
        /// Who has it: see [`Token::taker`].
        taker: u64,
        /// The stale copy, where there is one.
        stale: Option<V>,
        /// When the lease ends.
        remaining: Millis,
    },
    /// No answer, or an error: the cache cannot be asked.
    Failed,
}

/// Why a client got nil.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Why {
    /// It holds the lease.
    Lead,
    /// It came over the connection that holds the lease, and about the time of a load was not enough. Either a pool lent the
    /// connection to somebody else while its holder loads, or its client has given that load up, and nobody else will fill the key
    /// for it.
    Again,
    /// The cache is away, and this pod's turn to load is its.
    LocalLead,
    /// Nobody waits for this key at the moment (hit-for-miss), or what was found is no string.
    Shared,
    /// It must not wait: a later command of the same client has been sent, or it leads another key of the same command.
    Passed,
    /// It waited until its client sent something else.
    Unparked,
    /// Its wait was over.
    WaitEnd,
    /// Its rule is disarmed, or too many wait already.
    Untracked,
}

/// What one key's read gets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reply<V> {
    /// Nil, and with it the right and duty to load.
    Nil(Why),
    /// The value.
    Value(V),
    /// The stale copy.
    Stale(V),
}

/// What one request gets.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Answer<V> {
    /// For each of its missing keys, in the order in which they were named.
    Replies(SmallVec<[Reply<V>; 1]>),
    /// An error: one key's load took too long.
    TimedOut {
        /// That key.
        name: Rc<Name>,
        /// Its rule's id.
        rule: u16,
        /// How long was waited.
        waited: Millis,
    },
    /// An error: it must not wait, and a client of its connection has been told of a key's miss within this lease already.
    CutShort {
        /// That key.
        name: Rc<Name>,
        /// Its rule's id.
        rule: u16,
    },
}

/// What is to be done. In the order of the buffer; what concerns one key must reach its server in that order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Effect<V> {
    /// Send BEGIN; report with [`Desk::begun`]. One at a time for a key.
    Ask {
        /// Of which key.
        name: Rc<Name>,
        /// What for.
        mode: Mode,
        /// A fresh random number: the taker, and the generation if one begins.
        fresh: u64,
        /// For how long the lease, and how long its memory after that.
        rule: Rule,
    },
    /// Answer a read.
    Answer {
        /// Whose.
        asker: Asker,
        /// With what.
        answer: Answer<V>,
    },
    /// Answer a read whose value is held back while the lease is asked for: see [`Desk::expires_early`].
    Early {
        /// Whose.
        asker: Asker,
        /// With nil, so that it loads; otherwise with the value that it found.
        refresh: bool,
    },
    /// Send RELEASE. Nobody waits for its answer.
    GiveBack {
        /// Of which key.
        name: Rc<Name>,
        /// What is given back.
        token: Token,
    },
    /// Listen for the end of another pod's lease; call [`Desk::wake`] once when listening has begun, and at each sign.
    Watch {
        /// Of which key.
        name: Rc<Name>,
    },
    /// Listen no more.
    Unwatch {
        /// Of which key.
        name: Rc<Name>,
    },
    /// A rule's loads are seldom stored: it is off for a while.
    Disarmed {
        /// Its id.
        rule: u16,
        /// When it tries again.
        until: Millis,
    },
}

/// How a SET (and its kin) of a key of an armed rule must be sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// As an update: stored, lease removed, in one transaction.
    Update,
    /// By FILL, under this generation.
    Fill(Generation),
    /// By FILL, with no generation: whatever it writes is removed.
    Ambiguous(Doubt),
}

/// Why it cannot be known whether what a SET stores is new.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Doubt {
    /// It may be the fill of any of several loads, and between their beginnings something was written.
    Mixed,
    /// Of a load whose fill it may be it is not known since when nothing was written: it began while the cache was away, in a
    /// transaction, or behind a SET of which nobody knows whether it was carried out.
    Undated,
    /// There was no room to remember who loads the key.
    Forgotten,
}

/// What became of a write that had a verdict.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Written {
    /// It is stored.
    Stored,
    /// Its reply is what it would be; the key is removed.
    Removed,
    /// It did not write: its own condition (NX, XX) failed.
    Unchanged,
    /// It failed, or nobody knows.
    Failed,
}

/// A command that arrives on a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Command<'a> {
    /// GET.
    Get(u32, &'a [u8]),
    /// SET and its kin, which may be a fill.
    Set(u32, &'a [u8]),
    /// Anything else.
    Other,
}

/// The hash of a key, as tables of this engine are given it.
pub fn key_hash(database: u32, key: &[u8]) -> u64 {
    let mut hasher = FxHasher::default();
    database.hash(&mut hasher);
    key.hash(&mut hasher);
    hasher.finish()
}

/// One missing key of a request.
#[derive(Debug, Clone, Copy)]
pub struct Missing<'a> {
    /// The key.
    pub key: &'a [u8],
    /// Its rule.
    pub rule: Rule,
}
