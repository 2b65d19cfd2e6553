//! The snapshot: the versioned JSON document that is the only contract between the planes.
//!
//! The control plane compiles resources into it; a sidecar reads it from a file and needs nothing else but the secrets that it
//! names by path. An older sidecar refuses a snapshot whose `requires` it does not understand, and keeps the last good one.

use std::collections::HashSet;
use std::fmt;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::changes::{self, Feed, Touches};
use super::journal_name::JournalName;
use super::pattern::KeyPattern;
use super::rule::{
    CacheAside, Lifetime, Mode, Overflow, Query, ReadThrough, RowVersion, Rule, Store, Strategy, Unmatched, Versioned,
    WriteBehind,
};
use super::tags::{self, MAX_TAGS};
use super::units::{ByteSize, Span};

/// The newest form that this build writes and reads. `requires`, `generation` and `cluster` are said alike in all of them, so that a sidecar
/// for which the rest is too new can say so where it is heard.
///
/// 2: rules may have a `mode`, and cache-aside rules `stale` and `stampede` (with `waitFollowsLoads`).
/// 3: origins may have `maxTotalConnections`.
/// 4: rules may write through.
/// 5: rules may write behind.
/// 6: rules may have tags, be versioned, and follow changes of tables, and journals overflow to their origin.
/// 7: rules may have a version for each of their keys.
/// 8: values may be hashes, numbers be raised at their origin, and origins have a `loadQueue`.
/// 9: changes of tables may be about a tag.
/// 10: Larder may keep the versions of what is written through.
pub const VERSION: u32 = 10;
/// The largest snapshot in bytes, which also fits a ConfigMap.
pub const MAX_BYTES: usize = 900 * 1024;
/// The fewest writes that a journal may be bounded to: a command may bring 256 of them.
pub const LEAST_DEPTH: u64 = 16 * 256;
/// The fewest bytes that a journal may be bounded to: a command may bring one MiB, to one of its partitions.
pub const LEAST_BYTES: ByteSize = ByteSize::from_bytes(64 * 1024 * 1024);
/// The most rules in one snapshot.
pub const MAX_RULES: usize = 1000;

/// Everything that a sidecar is told.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Snapshot {
    /// The form of this document.
    pub version: u32,
    /// The oldest form whose readers understand it.
    pub requires: u32,
    /// Rises with each change; the newest valid one wins.
    pub generation: u64,
    /// Where the cache is.
    pub cluster: Cluster,
    /// What becomes of keys that no rule covers.
    pub unmatched: Unmatched,
    /// Within which time a covered key that has no TTL, however it came about, is given one.
    #[serde(default = "default_ttl_sweep")]
    pub ttl_sweep: Span,
    /// Commands that are dangerous on a shared cache, allowed by name.
    #[serde(default)]
    pub allow: Allow,
    /// Whether whoever keeps the servers vouches that each of them has every write on disk before it answers: `appendonly yes` and
    /// `appendfsync always`. Otherwise servers are asked, which takes the right to `CONFIG GET`. Said only where rules write behind.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub writes_to_disk: bool,
    /// Where data is loaded from.
    #[serde(default)]
    pub origins: Vec<Origin>,
    /// In order: the first whose pattern covers a key decides.
    #[serde(default)]
    pub rules: Vec<Rule>,
    /// The databases whose changes end what rules have cached. Relays read them, and sidecars hear of them by events.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub feeds: Vec<Feed>,
}

/// Commands that a policy may allow although they touch every key.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Allow {
    /// FLUSHALL and FLUSHDB.
    pub flush: bool,
    /// KEYS.
    pub keys: bool,
}

/// Where the cache is and how to speak to it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Cluster {
    /// The CacheCluster's name.
    pub name: String,
    /// How its servers are found.
    pub topology: Topology,
    /// TLS towards servers and sentinels. Absent: plain TCP.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tls: Option<Tls>,
    /// The user to log in as at the servers. Absent: none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub auth: Option<Auth>,
    /// The user to log in as at the sentinels. Absent: none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sentinel_auth: Option<Auth>,
    /// How long a command is tried that surely was not carried out, or does no harm when repeated. At most [`MAX_PATIENCE`].
    #[serde(default = "default_patience")]
    pub patience: Span,
    /// How long a transaction, or watched keys, may hold a server connection of their own while their client sends nothing.
    #[serde(default = "default_idle_transaction")]
    pub idle_transaction: Span,
}

impl Cluster {
    /// Whether both say the same of where the cache is and how to speak to it.
    pub fn is_same_place(&self, other: &Self) -> bool {
        *self == Self { patience: self.patience, idle_transaction: self.idle_transaction, ..other.clone() }
    }
}

/// The longest that a command is tried: whoever writes the binding's key in the cache may not have clients wait for ever.
pub const MAX_PATIENCE: Span = Span::from_secs(60);

/// The time within which covered keys without a TTL are repaired, where nothing else is said.
pub const DEFAULT_TTL_SWEEP: Span = Span::from_secs(600);

fn default_ttl_sweep() -> Span {
    DEFAULT_TTL_SWEEP
}

fn default_patience() -> Span {
    Span::from_secs(2)
}

/// How long a silent client's transaction may hold a server connection, where nothing else is said.
pub const DEFAULT_IDLE_TRANSACTION: Span = Span::from_secs(60);

fn default_idle_transaction() -> Span {
    DEFAULT_IDLE_TRANSACTION
}

/// How servers are found. Addresses are `host:port`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", rename_all_fields = "camelCase", deny_unknown_fields)]
pub enum Topology {
    /// The sentinels tell the primary.
    Sentinel {
        /// The name under which they watch it.
        master: String,
        /// Where they are; more are learnt from them.
        sentinels: Vec<String>,
    },
    /// Any of these nodes tells the slot map.
    Cluster {
        /// Where to ask first; more are learnt from them.
        seeds: Vec<String>,
    },
}

/// Files of a TLS client. They may change at any time.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Tls {
    /// The authorities to trust, PEM.
    pub ca_file: PathBuf,
    /// The certificate to present, PEM.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cert_file: Option<PathBuf>,
    /// Its key, PEM.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub key_file: Option<PathBuf>,
    /// The name to expect in the server's certificate. Absent: the host that is dialled.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub server_name: Option<String>,
}

/// Files that hold a user and a password. They may change at any time.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Auth {
    /// The user. Absent: `default`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub username_file: Option<PathBuf>,
    /// The password.
    pub password_file: PathBuf,
}

/// A place where data is loaded from.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Origin {
    /// What rules call it.
    pub name: String,
    /// What it is.
    pub kind: OriginKind,
    /// The most loads under way at once from one sidecar.
    pub max_connections: u32,
    /// The most loads under way at once from all sidecars of the binding, which share it evenly. Absent: unbounded.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_total_connections: Option<u32>,
    /// The queue in the cache by which a relay loads for sidecars whose share of [`Origin::max_total_connections`] is less than one. Absent:
    /// each of them may have one load under way all the same.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub load_queue: Option<JournalName>,
    /// How long a connection may take to come about.
    pub connect_timeout: Span,
    /// How long one load may take.
    pub timeout: Span,
}

impl Origin {
    /// How many loads of this origin one of so many sidecars may have under way: an even share, one at the least.
    pub fn share(&self, sidecars: u32) -> u32 {
        let even = self.max_total_connections.map_or(u32::MAX, |total| (total / sidecars.max(1)).max(1));
        self.max_connections.min(even)
    }

    /// By which queue one of so many sidecars has its keys loaded. `None`: it loads them itself.
    pub fn queue(&self, sidecars: u32) -> Option<&JournalName> {
        let is_beyond = self.max_total_connections.is_some_and(|total| total < sidecars);
        self.load_queue.as_ref().filter(|_| is_beyond)
    }
}

/// What an origin is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", rename_all_fields = "camelCase", deny_unknown_fields)]
pub enum OriginKind {
    /// A database: `postgres://…` or `sqlite://…`.
    Sql {
        /// Its URL.
        url: Sensitive,
    },
    /// A service: `http://…` or `https://…`; paths are appended.
    Http {
        /// Its URL.
        url: Sensitive,
    },
}

/// A text that may hold a password, or the file that holds it. `Debug` shows neither text.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", rename_all_fields = "camelCase", deny_unknown_fields)]
pub enum Sensitive {
    /// The text itself.
    Value(String),
    /// The file to read it from, at each new connection.
    File(PathBuf),
}

impl fmt::Debug for Sensitive {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Value(_) => f.write_str("Value(…)"),
            Self::File(path) => f.debug_tuple("File").field(path).finish(),
        }
    }
}

/// Why a snapshot was refused.
#[derive(Debug, thiserror::Error)]
pub enum SnapshotError {
    /// It is larger than [`MAX_BYTES`].
    #[error("the snapshot has {0} bytes, more than {MAX_BYTES}: split the policy")]
    TooLarge(usize),
    /// It is not JSON of the expected form.
    #[error("the snapshot cannot be read: {0}")]
    Json(#[from] serde_json::Error),
    /// It was written for a newer sidecar.
    #[error("the snapshot requires form {0}, and this sidecar understands {VERSION}: upgrade the sidecar")]
    TooNew(u32),
    /// Its parts contradict each other.
    #[error("the snapshot's {place} is wrong: {why}")]
    Invalid {
        /// Where.
        place: String,
        /// What, and what to write instead.
        why: String,
    },
}

fn invalid(place: impl Into<String>, why: impl Into<String>) -> SnapshotError {
    SnapshotError::Invalid { place: place.into(), why: why.into() }
}

impl Snapshot {
    /// Reads and checks a snapshot.
    pub fn parse(json: &[u8]) -> Result<Self, SnapshotError> {
        #[derive(Deserialize)]
        struct Head {
            requires: u32,
        }
        if json.len() > MAX_BYTES {
            return Err(SnapshotError::TooLarge(json.len()));
        }
        let head: Head = serde_json::from_slice(json)?;
        if head.requires > VERSION {
            return Err(SnapshotError::TooNew(head.requires));
        }
        let snapshot: Self = serde_json::from_slice(json)?;
        snapshot.check()?;
        Ok(snapshot)
    }

    /// The generation that a document claims, even if the rest of it is refused.
    pub fn claimed_generation(json: &[u8]) -> Option<u64> {
        #[derive(Deserialize)]
        struct Claim {
            generation: u64,
        }
        serde_json::from_slice(json).ok().map(|Claim { generation }| generation)
    }

    /// Where a document says that the cache is, even if the rest of it is refused: a snapshot that lets no command pass there.
    pub fn claimed_place(json: &[u8]) -> Option<Self> {
        #[derive(Deserialize)]
        struct Claim {
            generation: u64,
            cluster: Cluster,
        }
        let Claim { generation, cluster } = serde_json::from_slice(json).ok()?;
        Some(Self::waiting(generation, cluster)).filter(|snapshot| snapshot.check().is_ok())
    }

    /// What holds where nothing has been said yet but where the cache is: no command passes.
    pub fn waiting(generation: u64, cluster: Cluster) -> Self {
        Self {
            version: VERSION,
            requires: 1,
            generation,
            cluster,
            unmatched: Unmatched::Refuse {},
            ttl_sweep: DEFAULT_TTL_SWEEP,
            allow: Allow::default(),
            writes_to_disk: false,
            origins: Vec::new(),
            rules: Vec::new(),
            feeds: Vec::new(),
        }
    }

    /// The last snapshot of a binding that is removed: no rule holds any more, and every key that is written gets a TTL.
    ///
    /// A file or a key that is gone says nothing of the kind: it may be late, or lost, and sidecars go on under the last policy.
    pub fn farewell(&self, generation: u64, lifetime: Lifetime) -> Self {
        Self {
            version: VERSION,
            requires: 1,
            generation,
            cluster: self.cluster.clone(),
            unmatched: Unmatched::Ttl(lifetime),
            ttl_sweep: DEFAULT_TTL_SWEEP,
            allow: Allow::default(),
            writes_to_disk: false,
            origins: Vec::new(),
            rules: Vec::new(),
            feeds: Vec::new(),
        }
    }

    /// Whether any rule writes behind.
    pub fn writes_behind(&self) -> bool {
        self.rules.iter().any(|rule| rule.strategy.behind().is_some())
    }

    /// The same, with servers that are vouched for where rules need that: see [`Snapshot::writes_to_disk`].
    #[must_use]
    pub fn vouched_for(mut self, is_durable: bool) -> Self {
        self.writes_to_disk = is_durable && self.writes_behind();
        self
    }

    /// The same for readers who know no newer form than `form`: without what it cannot say. They are better served by that than by nothing at
    /// all, which is what they make of a snapshot that is newer than they are. But what has to be written to an origin they would write past
    /// it: with a rule of that kind it stays as it is.
    #[must_use]
    pub fn in_form(mut self, form: u32) -> Self {
        let form = form.max(1);
        let is_unknown = |rule: &Rule| match rule.strategy.behind() {
            Some(behind) => form < if behind.journal.overflow == Overflow::Reject { 5 } else { 6 },
            // What reads a hash finds nothing where nobody loads it.
            None => form < 4 && rule.strategy.writes().is_some() || form < 8 && rule.is_of_hashes(),
        };
        if self.rules.iter().any(is_unknown) {
            return self;
        }
        if form < 10 {
            // Of writes that overlap they keep none then, and none of another sidecar's that one of theirs overlaps with.
            self.rules.iter_mut().for_each(|rule| {
                if let Strategy::WriteThrough(write_through) = &mut rule.strategy
                    && let Store::Sql { version, .. } = &mut write_through.store
                {
                    version.take_if(|version| *version == RowVersion::Kept {});
                }
            });
        }
        if form < 9 {
            // Sidecars are told by events which keys a change is about. A relay that knows no tags has all of the rule's go.
            let follows = self.feeds.iter_mut().flat_map(|feed| &mut feed.follows);
            follows.filter(|follow| follow.touches.tag().is_some()).for_each(|follow| follow.touches = Touches::All {});
        }
        if form < 8 {
            // Sidecars that know no queues have a connection each.
            self.origins.iter_mut().for_each(|origin| origin.load_queue = None);
            // They refuse INCR then, as where there is no such statement.
            self.rules.iter_mut().for_each(|rule| {
                if let Strategy::WriteThrough(write_through) = &mut rule.strategy
                    && let Store::Sql { increment, .. } = &mut write_through.store
                {
                    *increment = None;
                }
            });
        }
        if form < 7 {
            // A key is invalidated without a version of its own, too.
            let of_keys = self.rules.iter_mut().filter(|rule| rule.versioned == Versioned::Entity);
            of_keys.for_each(|rule| rule.versioned = Versioned::Rule);
        }
        if form < 6 {
            // Sidecars that know no tags pass an event of one by, as one of a tag that no rule has.
            // Versions are for all sidecars of a binding or for none: they call keys by other names.
            self.rules.iter_mut().for_each(|rule| (rule.tags, rule.versioned) = (Vec::new(), Versioned::No));
            // Which tables are followed is no concern of a sidecar's.
            self.feeds.clear();
        }
        if form < 3 {
            self.origins.iter_mut().for_each(|origin| origin.max_total_connections = None);
        }
        if form < 2 {
            self.rules.iter_mut().for_each(in_first_form);
        }
        self.version = self.version.min(form);
        self.requires = self.required();
        self
    }

    /// Checks what the types cannot express.
    pub fn check(&self) -> Result<(), SnapshotError> {
        let addresses = match &self.cluster.topology {
            Topology::Sentinel { sentinels, .. } => sentinels,
            Topology::Cluster { seeds } => seeds,
        };
        if addresses.is_empty() {
            return Err(invalid("cluster.topology", "it names no address"));
        }
        if let Some(bad) = addresses.iter().find(|address| !is_host_port(address)) {
            return Err(invalid("cluster.topology", format!("`{bad}` is not host:port")));
        }
        if self.ttl_sweep < Span::from_secs(1) {
            return Err(invalid("ttlSweep", "it must be one second or more"));
        }
        if self.cluster.idle_transaction < Span::from_secs(1) {
            return Err(invalid("cluster.idleTransaction", "it must be one second or more"));
        }
        if self.cluster.patience > MAX_PATIENCE {
            return Err(invalid("cluster.patience", format!("it must be at most {MAX_PATIENCE}")));
        }
        if self.rules.len() > MAX_RULES {
            return Err(invalid("rules", format!("there are more than {MAX_RULES}")));
        }
        let (mut origins, mut queues) = (HashSet::new(), HashSet::new());
        for origin in &self.origins {
            if let Some(queue) = &origin.load_queue
                && (origin.max_total_connections.is_none() || !queues.insert(queue))
            {
                let why = "loadQueue needs maxTotalConnections, and is of one origin alone";
                return Err(invalid(format!("origin `{}`", origin.name), why));
            }
            if !origins.insert(origin.name.as_str()) {
                return Err(invalid(format!("origin `{}`", origin.name), "the name is used twice"));
            }
            if origin.max_connections == 0 || origin.timeout.is_zero() {
                return Err(invalid(format!("origin `{}`", origin.name), "maxConnections and timeout must be above zero"));
            }
            if origin.max_total_connections == Some(0) {
                return Err(invalid(format!("origin `{}`", origin.name), "maxTotalConnections must be above zero"));
            }
        }
        let mut names = HashSet::new();
        self.rules.iter().try_for_each(|rule| {
            let place = || format!("rule `{}`", rule.name);
            if !names.insert(rule.name.as_str()) {
                return Err(invalid(place(), "the name is used twice"));
            }
            self.check_rule(rule).map_err(|why| invalid(place(), why))
        })?;
        let mut slots = HashSet::new();
        self.feeds.iter().try_for_each(|feed| {
            let checked = self.check_feed(feed).and_then(|()| match slots.insert(feed.slot.as_str()) {
                true => Ok(()),
                false => Err(format!("the slot `{}` is used twice", feed.slot)),
            });
            checked.map_err(|why| invalid(format!("feed of origin `{}`", feed.origin), why))
        })
    }

    fn check_feed(&self, feed: &Feed) -> Result<(), String> {
        let origin = self.origins.iter().find(|origin| origin.name == feed.origin);
        if !origin.is_some_and(|origin| matches!(origin.kind, OriginKind::Sql { .. })) {
            return Err("there is no sql origin of this name: only databases tell of their changes".to_owned());
        }
        feed.check()?;
        feed.follows.iter().try_for_each(|follow| {
            let rule = self.rules.iter().find(|rule| rule.name == follow.rule);
            let rule = rule.ok_or_else(|| format!("there is no rule `{}` that could follow `{}`", follow.rule, follow.table))?;
            let checked = follow.check(&rule.keys).and_then(|()| match follow.touches.tag() {
                Some(tag) if !tags::may_have(&rule.tags, rule.versioned, tag) => Err(format!("no key of it has a tag `{tag}`")),
                Some(_) | None => Ok(()),
            });
            checked.map_err(|why| format!("rule `{}`: {why}", follow.rule))
        })
    }

    fn check_rule(&self, rule: &Rule) -> Result<(), String> {
        if let Some(lifetime) = rule.lifetime()
            && (lifetime.default.is_zero() || lifetime.default > lifetime.max)
        {
            return Err("its ttl must be above zero and at most its maxTtl".to_owned());
        }
        if rule.tags.len() > MAX_TAGS {
            return Err(format!("it has more than {MAX_TAGS} tags"));
        }
        rule.tags.iter().try_for_each(|tag| tags::check(tag, &rule.keys)).map_err(|error| error.to_string())?;
        if rule.versioned.is_any() {
            check_versioned(rule)?;
        }
        if rule.is_of_hashes() {
            check_hashes(rule)?;
        }
        let read_through = match &rule.strategy {
            Strategy::Bypass {} => return Ok(()),
            Strategy::CacheAside(cache_aside) => return check_stampede(cache_aside),
            Strategy::ReadThrough(read_through) => read_through,
            Strategy::WriteThrough(write_through) => {
                check_store(&write_through.read, &write_through.store)?;
                &write_through.read
            }
            Strategy::WriteBehind(write_behind) => {
                check_behind(write_behind, self.allow)?;
                &write_behind.read
            }
        };
        let load = &read_through.load;
        let origin = self.origins.iter().find(|origin| origin.name == load.origin);
        match (origin.map(|origin| &origin.kind), &load.query) {
            (None, _) => Err(format!("origin `{}` does not exist", load.origin)),
            (Some(OriginKind::Sql { .. }), Query::Sql { .. }) | (Some(OriginKind::Http { .. }), Query::Http { .. }) => Ok(()),
            (Some(OriginKind::Sql { .. }), _) => Err("an sql origin is asked by `read`, not by `path`".to_owned()),
            (Some(OriginKind::Http { .. }), _) => Err("an http origin is asked by `path`, not by `read`".to_owned()),
        }?;
        check_lease(rule, read_through)
    }

    /// Whether there is anything for a relay to do.
    pub fn needs_relay(&self) -> bool {
        let writes_behind = |rule: &Rule| rule.mode == Mode::Enforce && rule.strategy.behind().is_some();
        !self.feeds.is_empty() || self.rules.iter().any(writes_behind) || self.load_queues().next().is_some()
    }

    /// The queues by which rules have their keys loaded, each with its origin.
    pub fn load_queues(&self) -> impl Iterator<Item = (&JournalName, &Origin)> {
        let loads = |origin: &Origin, rule: &Rule| {
            rule.mode == Mode::Enforce && rule.strategy.loads().is_some_and(|read| read.load.origin == origin.name)
        };
        let is_used = move |origin: &&Origin| self.rules.iter().any(|rule| loads(origin, rule));
        self.origins.iter().filter(is_used).filter_map(|origin| Some((origin.load_queue.as_ref()?, origin)))
    }

    /// The same for so many sidecars: with queues only where these outnumber an origin's connections.
    #[must_use]
    pub fn shared_among(self, sidecars: u32) -> Self {
        self.with_queues(|origin| origin.queue(sidecars).is_some())
    }

    /// The same, of whose queues only those of such origins stay.
    #[must_use]
    pub fn with_queues(mut self, stays: impl Fn(&Origin) -> bool) -> Self {
        for origin in &mut self.origins {
            if !stays(origin) {
                origin.load_queue = None;
            }
        }
        self.requires = self.required();
        self
    }

    /// The oldest form whose readers understand it.
    fn required(&self) -> u32 {
        required_form(&self.origins, &self.rules).max(changes::required_form(&self.feeds))
    }

    /// The slot by which the changes of an origin are followed, where they are.
    pub fn slot_of(&self, origin: &str) -> Option<&str> {
        self.feeds.iter().find(|feed| feed.origin == origin).map(|feed| feed.slot.as_str())
    }

    /// The patterns of all rules, in order.
    pub fn patterns(&self) -> impl Iterator<Item = &KeyPattern> {
        self.rules.iter().map(|rule| &rule.keys)
    }
}

/// A rule as the first form says it. What is only observed is passed by, and misses are everybody's to load.
fn in_first_form(rule: &mut Rule) {
    if rule.mode == Mode::Observe {
        (rule.mode, rule.strategy) = (Mode::Enforce, Strategy::Bypass {});
    }
    if let Strategy::CacheAside(cache_aside) = &mut rule.strategy {
        (cache_aside.stampede, cache_aside.stale) = (None, Span::default());
    }
}

/// The oldest form whose readers understand these origins and rules.
pub fn required_form(origins: &[Origin], rules: &[Rule]) -> u32 {
    let is_newer = |rule: &Rule| match &rule.strategy {
        _ if rule.mode == Mode::Observe => true,
        Strategy::CacheAside(cache_aside) => cache_aside.stampede.is_some() || !cache_aside.stale.is_zero(),
        Strategy::Bypass {} | Strategy::ReadThrough(_) | Strategy::WriteThrough(_) | Strategy::WriteBehind(_) => false,
    };
    if rules.iter().any(|rule| rule.strategy.keeps_versions()) {
        return 10;
    }
    let of_rule = |rule: &Rule| rule.is_of_hashes() || rule.strategy.increments();
    if rules.iter().any(of_rule) || origins.iter().any(|origin| origin.load_queue.is_some()) {
        return 8;
    }
    if rules.iter().any(|rule| rule.versioned == Versioned::Entity) {
        return 7;
    }
    let overflows = |rule: &Rule| rule.strategy.behind().is_some_and(|behind| behind.journal.overflow != Overflow::Reject);
    if rules.iter().any(|rule| rule.versioned.is_any() || !rule.tags.is_empty() || overflows(rule)) {
        return 6;
    }
    if rules.iter().any(|rule| rule.strategy.behind().is_some()) {
        return 5;
    }
    if rules.iter().any(|rule| rule.strategy.writes().is_some()) {
        return 4;
    }
    if origins.iter().any(|origin| origin.max_total_connections.is_some()) {
        return 3;
    }
    if rules.iter().any(is_newer) { 2 } else { 1 }
}

fn check_stampede(cache_aside: &CacheAside) -> Result<(), String> {
    match &cache_aside.stampede {
        Some(stampede) if stampede.wait >= stampede.lease => Err("its wait must be shorter than its lease".to_owned()),
        None if !cache_aside.stale.is_zero() => {
            Err("stale is served while one caller loads: it needs stampede as well".to_owned())
        }
        Some(_) | None => Ok(()),
    }
}

fn check_versioned(rule: &Rule) -> Result<(), String> {
    if !matches!(rule.strategy, Strategy::CacheAside(_) | Strategy::ReadThrough(_)) {
        return Err(format!("a {} rule cannot be versioned", rule.strategy.name()));
    }
    if !rule.keys.ends_open() {
        return Err("the keys of a versioned rule must end in a part, behind which their version stands".to_owned());
    }
    Ok(())
}

fn check_hashes(rule: &Rule) -> Result<(), String> {
    let query = rule.strategy.loads().map(|read| &read.load.query);
    match query {
        _ if rule.strategy.increments() => Err("a hash is no number to be raised: it must not say `increment`".to_owned()),
        _ if rule.strategy.behind().is_some() => Err("hashes cannot be written behind".to_owned()),
        _ if rule.versioned.is_any() => Err("a rule whose values are hashes cannot be versioned".to_owned()),
        Some(Query::Http { .. }) => Err("a hash is made of a row's columns, and an http origin has none".to_owned()),
        Some(Query::Sql { read_many: Some(_), .. }) => Err("`readMany` answers MGET, which gives no hashes".to_owned()),
        Some(Query::Sql { read_many: None, .. }) | None => Ok(()),
    }
}

fn check_behind(write_behind: &WriteBehind, allow: Allow) -> Result<(), String> {
    let WriteBehind { read, store, journal } = write_behind;
    check_store(read, store)?;
    if matches!(store, Store::Sql { increment: Some(_), .. }) {
        return Err("a number is raised while its client waits, not from a journal: it must not say `increment`".to_owned());
    }
    if matches!(store, Store::Sql { version: Some(RowVersion::Kept {}), .. }) {
        return Err("a journal numbers its writes itself: its version must be a column".to_owned());
    }
    if matches!(store, Store::Http { if_match: true }) {
        return Err(
            "what is written later cannot be on condition of what the origin has now: it must not say `ifMatch`".to_owned()
        );
    }
    if journal.overflow == Overflow::WriteThrough && matches!(store, Store::Http { .. }) {
        return Err(
            "its journal cannot overflow to a service, which has no transactions: its overflow must be `reject`".to_owned()
        );
    }
    if journal.max_lag.is_zero() || journal.batch == 0 {
        return Err("its journal's maxLag and batch must be above zero".to_owned());
    }
    if journal.max_depth < LEAST_DEPTH || journal.max_bytes < LEAST_BYTES {
        return Err(format!("its journal must hold at least {LEAST_DEPTH} writes and {LEAST_BYTES}"));
    }
    if allow.flush {
        return Err("FLUSHALL would drop the journal: the policy must not allow it".to_owned());
    }
    Ok(())
}

fn check_store(read: &ReadThrough, store: &Store) -> Result<(), String> {
    match (&read.load.query, store) {
        (Query::Sql { .. }, Store::Sql { .. }) | (Query::Http { .. }, Store::Http { .. }) => Ok(()),
        (Query::Sql { .. }, Store::Http { .. }) => Err("an sql origin is written to by `write`".to_owned()),
        (Query::Http { .. }, Store::Sql { .. }) => Err("an http origin is written to by its `path`, not by `write`".to_owned()),
    }
}

fn check_lease(rule: &Rule, read_through: &ReadThrough) -> Result<(), String> {
    if rule.keys.parts().next().is_none() && matches!(&read_through.load.query, Query::Sql { read_many: Some(_), .. }) {
        return Err("`readMany` needs a pattern with at least one part".to_owned());
    }
    if read_through.lease.is_zero() {
        return Err("its lease must be above zero".to_owned());
    }
    Ok(())
}

fn is_host_port(address: &str) -> bool {
    address.rsplit_once(':').is_some_and(|(host, port)| !host.is_empty() && port.parse::<u16>().is_ok_and(|port| port > 0))
}

#[cfg(test)]
mod tests;
