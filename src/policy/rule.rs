//! Rules: how the keys that a pattern covers are cached.

use serde::{Deserialize, Serialize};

use super::journal_name::JournalName;
use super::pattern::KeyPattern;
use super::units::{Beta, ByteSize, Percent, Span};

/// How one family of keys is cached. Every default is resolved before a rule reaches a snapshot.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Rule {
    /// Unique within the snapshot; labels metrics.
    pub name: String,
    /// The keys it covers.
    pub keys: KeyPattern,
    /// Whether it takes effect.
    #[serde(default, skip_serializing_if = "Mode::is_enforce")]
    pub mode: Mode,
    /// What the sidecar does for them.
    pub strategy: Strategy,
    /// Names under which its keys can be invalidated together, as [`tags`](super::tags) reads them. At most [`MAX_TAGS`](super::tags::MAX_TAGS).
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub tags: Vec<KeyPattern>,
    /// Which [versions](super::versions) its keys have in the names that the cache has for them.
    #[serde(default, skip_serializing_if = "Versioned::is_none")]
    pub versioned: Versioned,
}

/// Which versions the keys of a rule have in their names.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "VersionedForm", into = "VersionedForm")]
pub enum Versioned {
    /// None.
    #[default]
    No,
    /// That of the rule, and those of the key's tags.
    Rule,
    /// These, and one of the key's own.
    Entity,
}

impl Versioned {
    fn is_none(&self) -> bool {
        *self == Self::No
    }

    /// Whether there are any.
    pub fn is_any(self) -> bool {
        self != Self::No
    }
}

/// [`Versioned`], as a snapshot says it: the first form that had versions knew those of rules alone.
#[derive(Serialize, Deserialize)]
#[serde(untagged)]
enum VersionedForm {
    OfRule(bool),
    Of(VersionedBy),
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
enum VersionedBy {
    Entity,
}

impl From<VersionedForm> for Versioned {
    fn from(form: VersionedForm) -> Self {
        match form {
            VersionedForm::OfRule(false) => Self::No,
            VersionedForm::OfRule(true) => Self::Rule,
            VersionedForm::Of(VersionedBy::Entity) => Self::Entity,
        }
    }
}

impl From<Versioned> for VersionedForm {
    fn from(versioned: Versioned) -> Self {
        match versioned {
            Versioned::No => Self::OfRule(false),
            Versioned::Rule => Self::OfRule(true),
            Versioned::Entity => Self::Of(VersionedBy::Entity),
        }
    }
}

/// Whether a rule takes effect.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Mode {
    /// It does.
    #[default]
    Enforce,
    /// Its keys pass untouched, and what it would have done is counted.
    Observe,
}

impl Mode {
    fn is_enforce(&self) -> bool {
        *self == Self::Enforce
    }
}

/// What the sidecar does for the keys of a rule.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", rename_all_fields = "camelCase", deny_unknown_fields)]
pub enum Strategy {
    /// Commands pass untouched.
    Bypass {},
    /// The application loads and stores; the sidecar sees to the TTL, and to one load of many misses.
    CacheAside(CacheAside),
    /// The sidecar loads what is missing.
    ReadThrough(Box<ReadThrough>),
    /// The sidecar loads what is missing, and carries writes to the origin before the cache has them.
    WriteThrough(Box<WriteThrough>),
    /// The sidecar loads what is missing, and journals writes, which a relay carries to the origin later.
    WriteBehind(Box<WriteBehind>),
}

/// How long covered keys live.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Lifetime {
    /// The TTL of a key whose writer gave none.
    pub default: Span,
    /// The longest TTL that a writer may give; a longer one is cut to it.
    pub max: Span,
    /// How much of the default TTL chance may take away, so that keys written together do not expire together.
    pub jitter: Percent,
}

impl Lifetime {
    /// The default TTL, shortened by chance: `random` is uniform over all of `u32`.
    pub fn jittered(&self, random: u32) -> Span {
        let full = self.default.as_millis();
        let range = full * u64::from(self.jitter.as_whole()) / 100;
        let cut = range.saturating_mul(u64::from(random)) >> 32;
        Span::from_millis((full - cut).max(1))
    }
}

/// What the sidecar does for keys that the application loads and stores.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct CacheAside {
    /// The lifetime of every covered key.
    pub ttl: Lifetime,
    /// How long past its TTL a value may be served while one caller loads it anew. Zero: never. Above zero only with `stampede`.
    #[serde(default, skip_serializing_if = "Span::is_zero")]
    pub stale: Span,
    /// How many misses become one load. `None`: each miss is passed on, and every client that misses loads.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stampede: Option<Stampede>,
}

/// How many misses of one key become one load by the application.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Stampede {
    /// How long one client may take to load before another one is asked to. Above zero.
    pub lease: Span,
    /// How long a read waits for another client's load. Shorter than `lease`; zero: not at all.
    pub wait: Span,
    /// Whether that is the most: a read waits less where loads take less of late.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub wait_follows_loads: bool,
    /// How eagerly values are loaded anew before they expire. `None`: never before.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub early_expiry: Option<Beta>,
    /// What a read gets that has waited in vain.
    pub at_wait_end: AtWaitEnd,
}

/// What a read gets that has waited for another client's load in vain.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum AtWaitEnd {
    /// An error that says so: the origin sees at most one load per lease and key.
    Error,
    /// A miss: the client loads as well.
    Miss,
}

/// What a miss on a read-through rule does.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct ReadThrough {
    /// The lifetime of loaded and written keys.
    pub ttl: Lifetime,
    /// How long past its TTL a value may be served while the origin fails. Zero: never.
    pub stale: Span,
    /// How long a key that the origin does not know is remembered as missing. Zero: not at all.
    pub negative_ttl: Span,
    /// How long one load may hold the lease before another sidecar may load, as long as its sidecar lives.
    pub lease: Span,
    /// How long a read waits for a load that another sidecar makes, before it loads by itself.
    pub wait: Span,
    /// Which origin, and what to ask it.
    pub load: Load,
}

/// What misses and writes on a write-through rule do.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct WriteThrough {
    /// A miss is loaded as on a read-through rule.
    pub read: ReadThrough,
    /// What is written, at the origin that `read` loads from.
    pub store: Store,
}

/// What misses and writes on a write-behind rule do.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct WriteBehind {
    /// A miss is loaded as on a read-through rule, where no write of its key is on its way.
    pub read: ReadThrough,
    /// What the relay writes, at the origin that `read` loads from.
    pub store: Store,
    /// Where writes are until then.
    pub journal: Journal,
}

/// The journal of a write-behind rule.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Journal {
    /// Its name. Whoever writes the same keys has the same.
    pub name: JournalName,
    /// How old a write may become before the origin has it. While one is older, new ones are refused.
    pub max_lag: Span,
    /// The most writes that wait, over all partitions.
    pub max_depth: u64,
    /// The most bytes that they take, over all partitions.
    pub max_bytes: ByteSize,
    /// The most writes that are carried to the origin in one transaction.
    pub batch: u32,
    /// What becomes of a write for which there is no room.
    #[serde(default, skip_serializing_if = "Overflow::is_reject")]
    pub overflow: Overflow,
}

/// What becomes of a write for which a journal has no room.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Overflow {
    /// It is refused.
    #[default]
    Reject,
    /// The sidecar tells the origin itself, unless an earlier write of the key still waits.
    WriteThrough,
}

impl Overflow {
    fn is_reject(&self) -> bool {
        *self == Self::Reject
    }
}

/// What a write tells its origin.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", rename_all_fields = "camelCase", deny_unknown_fields)]
pub enum Store {
    /// Statements in which `$part` stands for a part of the key, `$value` for the value and `$value.field` for a member of its JSON
    /// object, or of a hash for one of its fields, always as bound parameters.
    Sql {
        /// For a value. A statement that changes no row counts as refused.
        write: String,
        /// For a deletion, whose reply is the number of rows that it changes. `None`: deletions are refused.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        delete: Option<String>,
        /// What tells which of two writes of a row is the later. `None`: of writes that overlap none is kept in the cache.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        version: Option<RowVersion>,
        /// For raising a number by `$by`: a statement that returns what it is then. `None`: INCR is refused.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        increment: Option<String>,
    },
    /// PUT and DELETE of the path that loads ask for.
    Http {
        /// Whether a write is made on condition that the origin has what was last seen of it: `If-Match`, where an `ETag` is known.
        #[serde(default, skip_serializing_if = "std::ops::Not::not")]
        if_match: bool,
    },
}

/// What tells which of two writes of a row is the later: a whole number that rises.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum RowVersion {
    /// One that Larder keeps beside the row: in a table of its own of the same database, counted in the transaction that writes.
    Kept {},
    /// This column of what the statement returns.
    #[serde(untagged)]
    Column(String),
}

impl RowVersion {
    /// The column, where it is one.
    pub fn column(&self) -> Option<&str> {
        match self {
            Self::Kept {} => None,
            Self::Column(name) => Some(name),
        }
    }
}

/// What a load asks of its origin.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Load {
    /// The name of one of the snapshot's origins.
    pub origin: String,
    /// The question, in the origin's own terms.
    pub query: Query,
    /// How the answer becomes the key's value. `None`: one column as text, several as a JSON object.
    pub reply: Option<ReplyForm>,
}

/// A question to an origin.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", rename_all_fields = "camelCase", deny_unknown_fields)]
pub enum Query {
    /// A statement in which `$part` stands for a part of the key, always as a bound parameter.
    Sql {
        /// For one key.
        read: String,
        /// For many keys at once: `$part` is then the array of that part over all keys, and the answer has a column named
        /// after each part.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        read_many: Option<String>,
    },
    /// A path, appended to the origin's URL, in which `{part}` stands for a part of the key, percent-encoded.
    Http {
        /// Such as `/products/{id}?lang={lang}`.
        path: String,
    },
}

/// How an answer becomes a value.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum ReplyForm {
    /// The only column, or the body, as it is.
    String,
    /// The row as a JSON object.
    Json,
    /// The row as a hash, with a field for each column that is not NULL.
    Hash,
}

/// What becomes of keys that no rule covers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", rename_all_fields = "camelCase", deny_unknown_fields)]
pub enum Unmatched {
    /// They pass untouched.
    Bypass {},
    /// They get this lifetime, as under a cache-aside rule.
    Ttl(Lifetime),
    /// Commands that name them are refused.
    Refuse {},
}

impl Strategy {
    /// As it is written in a CachePolicy.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Bypass {} => "Bypass",
            Self::CacheAside(_) => "CacheAside",
            Self::ReadThrough(_) => "ReadThrough",
            Self::WriteThrough(_) => "WriteThrough",
            Self::WriteBehind(_) => "WriteBehind",
        }
    }
}

impl Strategy {
    /// What a miss does, where it is loaded by the sidecar.
    pub fn loads(&self) -> Option<&ReadThrough> {
        match self {
            Self::Bypass {} | Self::CacheAside(_) => None,
            Self::ReadThrough(read_through) => Some(read_through),
            Self::WriteThrough(write_through) => Some(&write_through.read),
            Self::WriteBehind(write_behind) => Some(&write_behind.read),
        }
    }

    /// Whether numbers are raised at the origin.
    pub fn increments(&self) -> bool {
        matches!(self.writes(), Some((_, Store::Sql { increment: Some(_), .. })))
    }

    /// Whether Larder keeps versions of what is written.
    pub fn keeps_versions(&self) -> bool {
        matches!(self.writes(), Some((_, Store::Sql { version: Some(RowVersion::Kept {}), .. })))
    }

    /// What is loaded and what a write tells the origin, where writes are carried there: at once, or later.
    pub fn writes(&self) -> Option<(&ReadThrough, &Store)> {
        match self {
            Self::WriteThrough(write_through) => Some((&write_through.read, &write_through.store)),
            Self::WriteBehind(write_behind) => Some((&write_behind.read, &write_behind.store)),
            Self::Bypass {} | Self::CacheAside(_) | Self::ReadThrough(_) => None,
        }
    }

    /// What misses and writes do, where writes are journalled.
    pub fn behind(&self) -> Option<&WriteBehind> {
        match self {
            Self::WriteBehind(write_behind) => Some(write_behind),
            Self::Bypass {} | Self::CacheAside(_) | Self::ReadThrough(_) | Self::WriteThrough(_) => None,
        }
    }
}

impl Unmatched {
    /// As it is written in a CachePolicy.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Bypass {} => "Bypass",
            Self::Ttl(_) => "Ttl",
            Self::Refuse {} => "Refuse",
        }
    }
}

impl Rule {
    /// Whether its values are hashes.
    pub fn is_of_hashes(&self) -> bool {
        self.strategy.loads().is_some_and(|read| read.load.reply == Some(ReplyForm::Hash))
    }

    /// The lifetime of covered keys, where the rule has one.
    pub fn lifetime(&self) -> Option<&Lifetime> {
        match &self.strategy {
            Strategy::Bypass {} => None,
            Strategy::CacheAside(cache_aside) => Some(&cache_aside.ttl),
            Strategy::ReadThrough(read_through) => Some(&read_through.ttl),
            Strategy::WriteThrough(write_through) => Some(&write_through.read.ttl),
            Strategy::WriteBehind(write_behind) => Some(&write_behind.read.ttl),
        }
    }

    /// How long the lease of a missing key lasts, and how long others wait for its holder, where the rule takes leases.
    pub fn lease(&self) -> Option<(Span, Span)> {
        match &self.strategy {
            Strategy::Bypass {} => None,
            Strategy::CacheAside(cache_aside) => cache_aside.stampede.map(|stampede| (stampede.lease, stampede.wait)),
            Strategy::ReadThrough(_) | Strategy::WriteThrough(_) | Strategy::WriteBehind(_) => {
                self.strategy.loads().map(|read_through| (read_through.lease, read_through.wait))
            }
        }
    }
}
