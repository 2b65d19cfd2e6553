//! The policy in force, in the form that the data path asks.

use std::sync::Arc;

use super::engine::ttl::{Cover, Coverage};
use crate::origin::{Carriage, Loader, OriginError, Origins, Writer};
use crate::policy::changes::Feed;
use crate::policy::explain::{KeyFacts, explain};
use crate::policy::snapshot::{Allow, Topology};
use crate::policy::versions::split;
use crate::policy::{CacheAside, Journal, Lifetime, Mode, ReadThrough, Rule, RuleIndex, Snapshot, Span, Strategy, Unmatched};

/// The position of a rule in its snapshot.
pub type RuleId = u16;
/// The position that stands for keys that no rule covers.
pub const UNMATCHED: RuleId = RuleId::MAX;

/// A snapshot, indexed. Immutable: a change makes another one.
#[derive(Debug, Clone)]
pub struct ActivePolicy {
    snapshot: Arc<Snapshot>,
    index: RuleIndex,
    /// For each rule, how its misses are loaded.
    loaders: Vec<Option<Loader>>,
    /// For each rule, how its writes reach an origin.
    writers: Vec<Option<Writer>>,
    has_writers: bool,
    /// For each rule, whether what is loaded is a hash.
    hashes: Vec<bool>,
    has_hashes: bool,
    /// For each rule, whether a miss takes a lease.
    leases: Vec<bool>,
    /// For each rule, how eagerly its values are loaded anew before they expire.
    early_expiry: Vec<Option<f64>>,
    has_leases: bool,
    has_early_expiry: bool,
    /// For each rule, whether its keys have versions in their names.
    versioned: Vec<bool>,
    has_versions: bool,
    /// For each rule whose keys have no versions, which of the snapshot's feeds it follows.
    followed: Vec<Box<[usize]>>,
    has_followed: bool,
    /// Whether any rule only observes.
    observes: bool,
    /// Nothing is ever changed or counted: all keys pass untouched and no rule exists.
    transparent: bool,
}

impl ActivePolicy {
    /// Indexes a snapshot, whose origins are `origins`. Connects to nothing.
    pub fn new(snapshot: Arc<Snapshot>, origins: &Origins) -> Result<Self, OriginError> {
        let loader = |rule: &Rule| {
            let Some(read_through) = rule.strategy.loads() else { return Ok(None) };
            let loader = origins.loader(&rule.keys, &read_through.load)?;
            Ok(Some(loader).filter(|_| rule.mode == Mode::Enforce))
        };
        let loaders = snapshot.rules.iter().map(loader).collect::<Result<_, _>>()?;
        let writer = |rule: &Rule| {
            let Some((read, store)) = rule.strategy.writes() else { return Ok(None) };
            let writer = origins.writer(&rule.keys, &read.load, store, Carriage::of(&rule.strategy))?;
            let writer = writer.marked(snapshot.slot_of(&read.load.origin));
            Ok(Some(writer).filter(|_| rule.mode == Mode::Enforce))
        };
        let writers: Vec<Option<Writer>> = snapshot.rules.iter().map(writer).collect::<Result<_, _>>()?;
        let has_writers = writers.iter().any(Option::is_some);
        let hashes: Vec<bool> = snapshot.rules.iter().map(|rule| rule.is_of_hashes() && rule.mode == Mode::Enforce).collect();
        let has_hashes = hashes.contains(&true);
        let leases = |rule: &Rule| match &rule.strategy {
            Strategy::CacheAside(cache_aside) => rule.mode == Mode::Enforce && cache_aside.stampede.is_some(),
            Strategy::Bypass {} | Strategy::ReadThrough(_) | Strategy::WriteThrough(_) | Strategy::WriteBehind(_) => false,
        };
        let leases: Vec<bool> = snapshot.rules.iter().map(leases).collect();
        let has_leases = leases.contains(&true);
        let early_expiry = |rule: &Rule| match &rule.strategy {
            Strategy::CacheAside(cache_aside) if rule.mode == Mode::Enforce => {
                cache_aside.stampede.as_ref().and_then(|stampede| stampede.early_expiry).map(|beta| beta.get())
            }
            _ => None,
        };
        let early_expiry: Vec<Option<f64>> = snapshot.rules.iter().map(early_expiry).collect();
        let has_early_expiry = early_expiry.iter().any(Option::is_some);
        let versioned: Vec<bool> =
            snapshot.rules.iter().map(|rule| rule.versioned.is_any() && rule.mode == Mode::Enforce).collect();
        let has_versions = versioned.contains(&true);
        let followed: Vec<Box<[usize]>> = snapshot.rules.iter().map(|rule| followed(&snapshot, rule)).collect();
        let has_followed = followed.iter().any(|feeds| !feeds.is_empty());
        let observes = snapshot.rules.iter().any(|rule| rule.mode == Mode::Observe);
        let index = RuleIndex::new(snapshot.patterns().cloned());
        let transparent = snapshot.rules.is_empty() && snapshot.unmatched == Unmatched::Bypass {};
        Ok(Self {
            snapshot,
            index,
            loaders,
            writers,
            has_writers,
            hashes,
            has_hashes,
            leases,
            early_expiry,
            has_leases,
            has_early_expiry,
            versioned,
            has_versions,
            followed,
            has_followed,
            observes,
            transparent,
        })
    }

    /// The snapshot that it was made from.
    pub fn snapshot(&self) -> &Arc<Snapshot> {
        &self.snapshot
    }

    /// Whether no key is ever looked at.
    #[inline]
    pub fn is_transparent(&self) -> bool {
        self.transparent
    }

    /// How servers are found.
    #[inline]
    pub fn topology(&self) -> &Topology {
        &self.snapshot.cluster.topology
    }

    /// How long a command that has not left may wait.
    pub fn patience(&self) -> Span {
        self.snapshot.cluster.patience
    }

    /// How long a silent client's transaction may hold a server connection.
    pub fn idle_transaction(&self) -> Span {
        self.snapshot.cluster.idle_transaction
    }

    /// Whether its servers need not be asked how they write to disk: see [`Snapshot::writes_to_disk`].
    pub fn writes_to_disk(&self) -> bool {
        self.snapshot.writes_to_disk
    }

    /// The CacheCluster's name.
    pub fn cluster_name(&self) -> &str {
        &self.snapshot.cluster.name
    }

    /// Which dangerous commands are allowed.
    pub fn allow(&self) -> Allow {
        self.snapshot.allow
    }

    /// Within which time a covered key without a TTL is given one.
    pub fn ttl_sweep(&self) -> Span {
        self.snapshot.ttl_sweep
    }

    /// Whether any key is covered.
    pub fn covers_anything(&self) -> bool {
        let covers = |rule: &Rule| rule.mode == Mode::Enforce && rule.lifetime().is_some();
        matches!(self.snapshot.unmatched, Unmatched::Ttl(_)) || self.snapshot.rules.iter().any(covers)
    }

    /// The first rule that covers `key`, or [`UNMATCHED`]. `key` may be the name that the cache has for a key of a versioned rule.
    #[inline]
    pub fn find(&self, key: &[u8]) -> RuleId {
        if self.has_versions
            && let Some(rule) = self.find_versioned(key)
        {
            return rule;
        }
        self.index.find(key).map_or(UNMATCHED, |rule| rule as RuleId)
    }

    /// The rule of a name with a version in it, where it is one.
    fn find_versioned(&self, name: &[u8]) -> Option<RuleId> {
        let (key, _) = split(name)?;
        self.index.find(key).map(|rule| rule as RuleId).filter(|rule| self.is_versioned(*rule))
    }

    /// The key that the cache has by this name: without its version, where its rule is versioned.
    pub fn key_of<'n>(&self, name: &'n [u8]) -> &'n [u8] {
        match split(name) {
            Some((key, _)) if self.has_versions && self.find_versioned(name).is_some() => key,
            _ => name,
        }
    }

    /// Whether the keys of the rule have versions in the names that the cache has for them.
    #[inline]
    pub fn is_versioned(&self, id: RuleId) -> bool {
        matches!(self.versioned.get(usize::from(id)), Some(true))
    }

    /// Whether those of any rule do.
    #[inline]
    pub fn has_versions(&self) -> bool {
        self.has_versions
    }

    /// The slots of the feeds that tell a rule's keys of changes, where these have no versions.
    pub fn followed(&self, id: RuleId) -> impl Iterator<Item = &str> {
        let feeds = self.followed.get(usize::from(id)).map(|feeds| &feeds[..]).unwrap_or_default();
        feeds.iter().filter_map(|feed| self.snapshot.feeds.get(*feed)).map(|feed| feed.slot.as_str())
    }

    /// Whether any such rule follows a feed.
    #[inline]
    pub fn has_followed(&self) -> bool {
        self.has_followed
    }

    /// Where rules are looked for.
    pub fn index(&self) -> &RuleIndex {
        &self.index
    }

    /// The rule at a position, whether it takes effect or not.
    pub fn rule(&self, id: RuleId) -> Option<&Rule> {
        self.snapshot.rules.get(usize::from(id))
    }

    /// The rule at a position, where it takes effect.
    fn enforced(&self, id: RuleId) -> Option<&Rule> {
        self.rule(id).filter(|rule| rule.mode == Mode::Enforce)
    }

    /// The rule at a position, where it only observes.
    pub fn observed(&self, id: RuleId) -> Option<&Rule> {
        self.rule(id).filter(|rule| rule.mode == Mode::Observe)
    }

    /// Whether any rule only observes.
    #[inline]
    pub fn observes(&self) -> bool {
        self.observes
    }

    /// Whether misses of the rule are loaded.
    #[inline]
    pub fn loads(&self, id: RuleId) -> bool {
        matches!(self.loaders.get(usize::from(id)), Some(Some(_)))
    }

    /// Whether what is loaded for the rule is a hash.
    #[inline]
    pub fn loads_hashes(&self, id: RuleId) -> bool {
        matches!(self.hashes.get(usize::from(id)), Some(true))
    }

    /// Whether a miss of the rule takes a lease, so that one client loads for all who ask.
    #[inline]
    pub fn leases(&self, id: RuleId) -> bool {
        matches!(self.leases.get(usize::from(id)), Some(true))
    }

    /// How eagerly values of the rule are loaded anew before they expire, where they are.
    #[inline]
    pub fn early_expiry(&self, id: RuleId) -> Option<f64> {
        self.early_expiry.get(usize::from(id)).copied().flatten()
    }

    /// Whether values of any rule are loaded anew before they expire.
    #[inline]
    pub fn has_early_expiry(&self) -> bool {
        self.has_early_expiry
    }

    /// Whether misses of any rule take leases.
    #[inline]
    pub fn has_leases(&self) -> bool {
        self.has_leases
    }

    /// The first rule whose misses take leases.
    pub fn first_with_leases(&self) -> Option<&Rule> {
        self.snapshot.rules.iter().zip(&self.leases).find_map(|(rule, leases)| leases.then_some(rule))
    }

    /// How the rule's keys are cached, where the application loads and stores them.
    pub fn cache_aside(&self, id: RuleId) -> Option<&CacheAside> {
        match &self.enforced(id)?.strategy {
            Strategy::CacheAside(cache_aside) => Some(cache_aside),
            _ => None,
        }
    }

    /// What a miss of the rule does, where misses are loaded.
    pub fn read_through(&self, id: RuleId) -> Option<&ReadThrough> {
        self.enforced(id)?.strategy.loads()
    }

    /// Where writes of the rule wait for its origin, where they do.
    pub fn journal(&self, id: RuleId) -> Option<&Journal> {
        self.enforced(id)?.strategy.behind().map(|write_behind| &write_behind.journal)
    }

    /// Whether writes of any rule are carried to an origin.
    #[inline]
    pub fn has_writers(&self) -> bool {
        self.has_writers
    }

    /// Whether some writes are not the cache's business alone: those that an origin has to hear of, and those of some fields of a hash.
    #[inline]
    pub fn minds_writes(&self) -> bool {
        self.has_writers || self.has_hashes
    }

    /// Whether writes of the rule are carried to its origin.
    #[inline]
    pub fn writes_through(&self, id: RuleId) -> bool {
        self.writer(id).is_some()
    }

    /// How writes of the rule reach its origin.
    pub fn writer(&self, id: RuleId) -> Option<&Writer> {
        self.writers.get(usize::from(id))?.as_ref()
    }

    /// How misses of the rule are loaded.
    pub fn loader(&self, id: RuleId) -> Option<&Loader> {
        self.loaders.get(usize::from(id))?.as_ref()
    }

    /// The lifetime of the keys of a rule, or of those that no rule covers.
    pub fn lifetime_of(&self, id: RuleId) -> Option<Lifetime> {
        match self.rule(id) {
            Some(rule) => rule.lifetime().filter(|_| rule.mode == Mode::Enforce).copied(),
            None => match &self.snapshot.unmatched {
                Unmatched::Ttl(lifetime) => Some(*lifetime),
                Unmatched::Bypass {} | Unmatched::Refuse {} => None,
            },
        }
    }

    /// Which rule covers `key`, what it does, and why.
    pub fn explain(&self, key: &[u8]) -> KeyFacts {
        let id = self.find(key);
        explain(&self.snapshot, (id != UNMATCHED).then_some(usize::from(id)), key)
    }

    /// Whether commands on keys that no rule covers are refused.
    pub fn refuses_unmatched(&self) -> bool {
        self.snapshot.unmatched == Unmatched::Refuse {}
    }
}

/// The feeds that a rule follows, where its keys have no versions.
fn followed(snapshot: &Snapshot, rule: &Rule) -> Box<[usize]> {
    if rule.mode != Mode::Enforce || rule.versioned.is_any() {
        return Box::default();
    }
    let follows = |feed: &Feed| feed.follows.iter().any(|follow| follow.rule == rule.name);
    snapshot.feeds.iter().enumerate().filter(|(_, feed)| follows(feed)).map(|(at, _)| at).collect()
}

/// The coverage of the keys of one database.
#[derive(Debug, Clone, Copy)]
pub struct Covered<'a> {
    /// The policy in force.
    pub policy: &'a ActivePolicy,
    /// What the client selected.
    pub database: u8,
}

impl Coverage for Covered<'_> {
    fn cover(&self, key: &[u8]) -> Option<Cover> {
        let rule = self.policy.find(key);
        let lifetime = self.policy.lifetime_of(rule)?;
        let (companions, stale, writes_copy) = match self.policy.enforced(rule).map(|rule| &rule.strategy) {
            Some(Strategy::CacheAside(cache_aside)) => (cache_aside.stampede.is_some(), cache_aside.stale, true),
            Some(strategy @ (Strategy::ReadThrough(_) | Strategy::WriteThrough(_) | Strategy::WriteBehind(_))) => {
                (true, strategy.loads().map_or(Span::default(), |read_through| read_through.stale), false)
            }
            Some(Strategy::Bypass {}) | None => (false, Span::default(), false),
        };
        Some(Cover { lifetime, companions, stale, writes_copy })
    }

    fn database(&self) -> u32 {
        u32::from(self.database)
    }
}
