//! `CachePolicy`: how workloads use a cache tier.

// Each printer column has a name and a path of its own, which the lint takes for repetition.
#![allow(clippy::duplicated_attributes)]

mod behind;
mod changes;
mod invalidate;
mod status;

use std::collections::BTreeMap;

use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::sensitive::SensitiveSource;
use super::text::{
    ColumnText, DurationText, HttpPathText, MAX_ORIGINS, MAX_RULES, NameText, ObjectNameText, PatienceText, PatternText,
    PercentText, PeriodText, PositiveDurationText, SqlText,
};
use crate::policy::{AtWaitEnd, Mode, Percent, ReplyForm, Span};

pub use behind::{MAX_BATCH, Overflow, WriteBehindSpec};
pub use changes::{ChangesSpec, FeedSpec};
pub use invalidate::{InvalidateSpec, Versioned};
pub use status::{
    CachePolicyStatus, ChangesStatus, ConditionType, ConnectionsStatus, GenerationStatus, JournalStatus, MAX_CHANGES_TOLD,
    MAX_GENERATIONS, MAX_NAME_CHARS, MAX_NAMED, MAX_REFUSED_CHARS, SidecarsStatus, WorkloadsStatus,
};

/// How workloads use a cache tier: which keys live how long, and where missing ones are loaded from.
#[derive(CustomResource, KubeSchema, Clone, Debug, PartialEq, Serialize, Deserialize)]
#[kube(
    group = "larder.dev",
    version = "v1alpha1",
    kind = "CachePolicy",
    plural = "cachepolicies",
    shortname = "cpol",
    category = "larder",
    namespaced,
    derive = "PartialEq",
    doc = "How workloads use a cache tier: which keys live how long, and where missing ones are loaded from.",
    printcolumn(name = "Cluster", type_ = "string", json_path = ".spec.cacheCluster"),
    status = "CachePolicyStatus",
    printcolumn(name = "Mode", type_ = "string", json_path = ".spec.mode"),
    printcolumn(name = "Status", type_ = "string", json_path = ".status.summary"),
    printcolumn(name = "Sidecars", type_ = "string", json_path = ".status.sidecars.current"),
    printcolumn(name = "Hits", type_ = "string", json_path = ".status.hitRatio"),
    printcolumn(name = "Saved", type_ = "string", json_path = ".status.originLoadSaved"),
    printcolumn(name = "Rules", type_ = "string", json_path = ".spec.rules[*].name", priority = "1"),
    printcolumn(name = "Workloads", type_ = "integer", json_path = ".status.workloads.matched", priority = "1"),
    printcolumn(name = "Generation", type_ = "integer", json_path = ".status.workloads.generation", priority = "1"),
    printcolumn(name = "Unmatched", type_ = "string", json_path = ".spec.defaults.unmatched", priority = "1"),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp")
)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[x_kube(validation = Rule::new(
    "self.rules.all(r, !has(r.origin) || (has(self.origins) && self.origins.exists(o, o.name == r.origin.name)))")
    .message("a rule's origin.name must be the name of one of spec.origins"))]
#[x_kube(validation = Rule::new(
    "!has(self.origins) || self.rules.all(r, !has(r.origin) || !has(r.origin.read) || self.origins.all(o, o.name != r.origin.name || has(o.sql)))")
    .message("a rule with origin.read needs an sql origin: ask an http origin by path"))]
#[x_kube(validation = Rule::new(
    "!has(self.origins) || self.rules.all(r, !has(r.origin) || !has(r.origin.path) || self.origins.all(o, o.name != r.origin.name || has(o.http)))")
    .message("a rule with origin.path needs an http origin: ask an sql origin by read"))]
#[x_kube(validation = Rule::new(
    "self.rules.all(r, !has(r.writeBehind) || !has(r.writeBehind.journal) || r.writeBehind.journal == self.cacheCluster)")
    .message("a journal lies in the policy's own CacheCluster: remove writeBehind.journal, or write there what spec.cacheCluster says"))]
#[x_kube(validation = Rule::new(
    "!has(self.allow) || !has(self.allow.flush) || !self.allow.flush || self.rules.all(r, r.strategy != 'WriteBehind')")
    .message("FLUSHALL would drop what WriteBehind rules have acknowledged and no origin has yet: remove allow.flush"))]
pub struct CachePolicySpec {
    /// The CacheCluster, in the same namespace, whose keys this policy is about.
    #[schemars(with = "ObjectNameText")]
    pub cache_cluster: String,
    /// The workloads whose commands follow this policy. On one machine, every sidecar is one.
    pub workloads: Workloads,
    /// Enforce, which is the default: the rules take effect. Observe: no command is changed, and what the rules would do is counted;
    /// keys that no rule covers pass untouched, whatever defaults.unmatched says.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "PolicyMode")]
    pub mode: Option<PolicyMode>,
    /// What rules have when they do not say otherwise, and what becomes of keys that no rule covers.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub defaults: Option<Defaults>,
    /// Commands that touch every key of a shared cache, and are refused unless allowed here.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub allow: Option<AllowSpec>,
    /// What the workloads' pods are given beside the sidecar. Where several policies about a cluster say it, the oldest counts. A pod that
    /// runs keeps what it was given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub inject: Option<InjectSpec>,
    /// Where missing data is loaded from.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = MAX_ORIGINS))]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["name".to_owned()]))]
    pub origins: Vec<OriginSpec>,
    /// In order: the first rule whose pattern covers a key decides.
    #[schemars(length(min = 1, max = MAX_RULES))]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["name".to_owned()]))]
    pub rules: Vec<RuleSpec>,
}

/// The workloads whose commands follow a policy.
#[derive(KubeSchema, Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Workloads {
    /// Labels that a workload's pods all have.
    #[schemars(with = "super::labels::MatchLabelsSchema")]
    pub match_labels: BTreeMap<String, String>,
}

impl Workloads {
    /// Whether these are the workloads of pods with such labels. No label at all, which the definition refuses, stands for none of them.
    pub fn include<'a>(&self, label: impl Fn(&str) -> Option<&'a str>) -> bool {
        !self.match_labels.is_empty() && self.match_labels.iter().all(|(name, value)| label(name) == Some(value))
    }
}

/// Whether rules take effect.
#[derive(JsonSchema, Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[schemars(inline)]
pub enum PolicyMode {
    /// They do.
    Enforce,
    /// What they would do is counted.
    Observe,
}

impl From<PolicyMode> for Mode {
    fn from(mode: PolicyMode) -> Self {
        match mode {
            PolicyMode::Enforce => Self::Enforce,
            PolicyMode::Observe => Self::Observe,
        }
    }
}

/// What rules have when they do not say otherwise.
#[derive(KubeSchema, Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[x_kube(validation = Rule::new("!has(self.ttl) || !has(self.maxTtl) || duration(self.ttl) <= duration(self.maxTtl)")
    .message("ttl is longer than maxTtl: shorten ttl, or lengthen maxTtl"))]
pub struct Defaults {
    /// The TTL of a key whose writer gave none. Default 5m.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<PositiveDurationText>")]
    pub ttl: Option<Span>,
    /// The longest TTL that a writer may give; a longer one is cut to it. Default 24h.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<PositiveDurationText>")]
    pub max_ttl: Option<Span>,
    /// How much of the TTL chance may take away, so that keys written together do not expire together. Default 10%.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<PercentText>")]
    pub jitter: Option<Percent>,
    /// Within which time a covered key that has no TTL is given one: keys older than the policy, and those that were written past
    /// the sidecars. One sidecar walks all keys that often. Where several policies about a cluster say it, the shortest counts.
    /// From 10s to 24h; default 10m.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<PeriodText>")]
    pub ttl_sweep: Option<Span>,
    /// How long the sidecar tries a command before its client is told that no server could take it (TRYAGAIN). What may already have been
    /// carried out is repeated only where that changes nothing: a write that was under way when its server died is never. A client that
    /// closes its connection ends the trying earlier. Where several policies about a cluster say it, the longest counts; those that only
    /// observe say nothing. From 100ms to 1m; default 8s, in which the first attempt at an automatic failover succeeds, or is given up.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<PatienceText>")]
    pub patience: Option<Span>,
    /// What becomes of keys that no rule covers. Bypass, which is the default: they pass untouched, and are counted. Ttl: they
    /// get the TTL of these defaults. Refuse: commands that name them are refused.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "UnmatchedMode")]
    pub unmatched: Option<UnmatchedMode>,
}

/// What becomes of keys that no rule covers.
#[derive(JsonSchema, Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[schemars(inline)]
pub enum UnmatchedMode {
    /// They pass untouched.
    Bypass,
    /// They get the TTL of the defaults.
    Ttl,
    /// Commands that name them are refused.
    Refuse,
}

/// Commands that touch every key of a shared cache.
#[derive(KubeSchema, Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct AllowSpec {
    /// FLUSHALL and FLUSHDB.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub flush: bool,
    /// KEYS.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub keys: bool,
}

/// What pods are given beside the sidecar.
#[derive(KubeSchema, Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[x_kube(validation = Rule::new("!has(self.port) || self.port != 9121")
    .message("port 9121 is where the sidecar serves health and metrics: choose another port, or remove it"))]
pub struct InjectSpec {
    /// How REDIS_URL, REDIS_HOST and REDIS_PORT come to lead to the sidecar. IfAbsent, which is the default: a container gets all three where
    /// its own env names none of them. Override: it gets all three, whatever its env says.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "EnvMode")]
    pub env: Option<EnvMode>,
    /// The port at which the sidecar is found on 127.0.0.1 and ::1. Default 6379. Where a container of the pod declares it, the next that
    /// none declares.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1024, max = 65535))]
    pub port: Option<u16>,
    /// Whether the sidecar is also found at the Unix socket /run/larder/redis.sock, which every container of the pod then has. Default false.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub socket: Option<bool>,
}

/// How variables come to lead to the sidecar.
#[derive(JsonSchema, Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[schemars(inline)]
pub enum EnvMode {
    /// Where a container's own env names none of them.
    #[default]
    IfAbsent,
    /// Whatever it says.
    Override,
}

/// A place where missing data is loaded from.
#[derive(KubeSchema, Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[x_kube(validation = Rule::new("has(self.sql) != has(self.http)").message("write either sql or http, and not both"))]
#[x_kube(validation = Rule::new("!has(self.http) || !has(self.http.changes)")
    .message("a service tells nobody of its changes: remove changes"))]
pub struct OriginSpec {
    /// What rules call it.
    #[schemars(with = "NameText")]
    pub name: String,
    /// A database.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sql: Option<OriginAccess>,
    /// A service that answers GET requests, and PUT and DELETE where a rule writes through or behind.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub http: Option<OriginAccess>,
}

/// How an origin is reached, and how hard it may be leant on.
#[derive(KubeSchema, Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[x_kube(validation = Rule::new("!has(self.maxConnections) || !has(self.maxTotalConnections) || self.maxConnections <= self.maxTotalConnections")
    .message("maxConnections is more than maxTotalConnections: lower maxConnections, or raise maxTotalConnections"))]
pub struct OriginAccess {
    /// The URL: postgres://… or sqlite://… of a database, http://… or https://… of a service.
    pub url: SensitiveSource,
    /// The most loads and writes under way at once from one sidecar. Default 4.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 1000))]
    pub max_connections: Option<u32>,
    /// The most loads and writes under way at once from all sidecars of a workload together, which share it evenly: a thousand pods do not
    /// open thousands of connections to a database. Where they outnumber it, a relay loads for all of them. Default: only maxConnections bounds them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 1_000_000))]
    pub max_total_connections: Option<u32>,
    /// How long a connection may take to come about. Default 1s.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<PositiveDurationText>")]
    pub connect_timeout: Option<Span>,
    /// How long one load or write may take. Default 2s.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<PositiveDurationText>")]
    pub timeout: Option<Span>,
    /// How changes of the database's tables are followed, where rules say so by invalidate.changes. Default: all of its own defaults.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub changes: Option<FeedSpec>,
}

/// How one family of keys is cached.
#[derive(KubeSchema, Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[x_kube(validation = Rule::new("self.strategy != 'ReadThrough' || has(self.origin)")
    .message("a ReadThrough rule loads what is missing: write origin, with the name of one of spec.origins and read or path"))]
#[x_kube(validation = Rule::new("!(self.strategy in ['WriteThrough', 'WriteBehind']) || has(self.origin)")
    .message("a WriteThrough or WriteBehind rule loads what is missing and writes: write origin, with the name of one of spec.origins and read and write, or path"))]
#[x_kube(validation = Rule::new("self.strategy in ['ReadThrough', 'WriteThrough', 'WriteBehind'] || !has(self.origin)")
    .message("only a ReadThrough, WriteThrough or WriteBehind rule has an origin: remove origin, or write strategy: ReadThrough"))]
#[x_kube(validation = Rule::new("self.strategy in ['ReadThrough', 'WriteThrough', 'WriteBehind'] || !has(self.negativeTtl)")
    .message("only a ReadThrough, WriteThrough or WriteBehind rule knows what the origin does not have: remove negativeTtl, or write strategy: ReadThrough"))]
#[x_kube(validation = Rule::new("self.strategy in ['WriteThrough', 'WriteBehind'] || !has(self.origin) || (!has(self.origin.write) && !has(self.origin.delete) && !has(self.origin.version) && !has(self.origin.increment))")
    .message("only a WriteThrough or WriteBehind rule writes: remove origin.write, origin.delete, origin.version and origin.increment, or write strategy: WriteThrough"))]
#[x_kube(validation = Rule::new("self.strategy != 'WriteBehind' || !has(self.origin) || !has(self.origin.increment)")
    .message("a number is raised while its client waits, not from a journal: remove origin.increment, or write strategy: WriteThrough"))]
#[x_kube(validation = Rule::new("!(self.strategy in ['WriteThrough', 'WriteBehind']) || !has(self.origin) || !has(self.origin.read) || has(self.origin.write)")
    .message("a WriteThrough or WriteBehind rule carries writes to its origin: write origin.write, the statement that stores $value"))]
#[x_kube(validation = Rule::new("self.strategy == 'WriteBehind' || !has(self.writeBehind)")
    .message("only a WriteBehind rule has a journal: remove writeBehind, or write strategy: WriteBehind"))]
#[x_kube(validation = Rule::new("self.strategy != 'WriteBehind' || !has(self.origin) || !has(self.origin.path) || !has(self.origin.version)")
    .message("what is written later cannot be on condition of what the service has now: remove origin.version, or write strategy: WriteThrough"))]
#[x_kube(validation = Rule::new("self.strategy != 'WriteBehind' || !has(self.origin) || !has(self.origin.version) || self.origin.version != 'Kept'")
    .message("a journal numbers its writes itself: write version with the column that write compares with $version, or remove it"))]
#[x_kube(validation = Rule::new("!has(self.writeBehind) || !has(self.writeBehind.overflow) || self.writeBehind.overflow != 'WriteThrough' || !has(self.origin) || !has(self.origin.path)")
    .message("a journal cannot overflow to a service, which has no transactions: remove overflow, or use an sql origin"))]
#[x_kube(validation = Rule::new("self.strategy != 'Bypass' || (!has(self.ttl) && !has(self.maxTtl) && !has(self.jitter) && !has(self.stale) && !has(self.stampede))")
    .message("a Bypass rule touches nothing: remove ttl, maxTtl, jitter, stale and stampede, or write strategy: CacheAside"))]
#[x_kube(validation = Rule::new("!(self.strategy in ['ReadThrough', 'WriteThrough', 'WriteBehind']) || !has(self.stampede) || !has(self.stampede.mode) || self.stampede.mode != 'Disabled'")
    .message("a ReadThrough, WriteThrough or WriteBehind rule always makes one load of many misses: remove stampede.mode, or write strategy: CacheAside"))]
#[x_kube(validation = Rule::new("!(self.strategy in ['ReadThrough', 'WriteThrough', 'WriteBehind']) || !has(self.stampede) || !has(self.stampede.earlyExpiry)")
    .message("earlyExpiry is supported on CacheAside rules only, so far: remove it; one sidecar loads an expired key while the others wait"))]
#[x_kube(validation = Rule::new("!(self.strategy in ['ReadThrough', 'WriteThrough', 'WriteBehind']) || !has(self.stampede) || !has(self.stampede.atWaitEnd)")
    .message("at the end of its wait a ReadThrough, WriteThrough or WriteBehind rule loads by itself: remove atWaitEnd, or write strategy: CacheAside"))]
#[x_kube(validation = Rule::new("self.strategy != 'CacheAside' || !has(self.stampede) || !has(self.stampede.wait) || has(self.stampede.lease) || duration(self.stampede.wait) < duration('3s')")
    .message("wait is not shorter than the 3s that a lease lasts where none is given: write a longer lease as well, or a shorter wait"))]
#[x_kube(validation = Rule::new("self.strategy != 'CacheAside' || !has(self.stale) || duration(self.stale) == duration('0s') || !has(self.stampede) || !has(self.stampede.mode) || self.stampede.mode != 'Disabled'")
    .message("stale values are served while one caller loads, which needs a lease: remove stale, or write stampede.mode: Lease"))]
#[x_kube(validation = Rule::new("self.strategy != 'Bypass' || !has(self.invalidate)")
    .message("a Bypass rule caches nothing that could be invalidated: remove invalidate, or write strategy: CacheAside"))]
#[x_kube(validation = Rule::new("self.strategy in ['CacheAside', 'ReadThrough'] || !has(self.invalidate) || !has(self.invalidate.versioned)")
    .message("only a CacheAside or ReadThrough rule can be versioned: remove invalidate.versioned"))]
#[x_kube(validation = Rule::new("!has(self.ttl) || !has(self.maxTtl) || duration(self.ttl) <= duration(self.maxTtl)")
    .message("ttl is longer than maxTtl: shorten ttl, or lengthen maxTtl"))]
pub struct RuleSpec {
    /// Unique within the policy; labels metrics.
    #[schemars(with = "NameText")]
    pub name: String,
    /// The keys it covers. {part} stands for one or more bytes without a colon, {part…} for one or more bytes of any kind:
    /// user:{id} covers user:7.
    #[schemars(with = "PatternText")]
    pub keys: String,
    /// What the sidecar does. CacheAside: the application loads and stores, the sidecar sees to the TTL and to one load of many
    /// misses. ReadThrough: the sidecar loads what is missing from an origin. WriteThrough: it does, and carries SET and DEL to the origin
    /// before the cache has them. WriteBehind: it does, and keeps SET and DEL in a journal on disk, from which a relay carries them to the
    /// origin soon after. Bypass: commands pass untouched.
    pub strategy: StrategyKind,
    /// The TTL of a key whose writer gave none. Default: that of spec.defaults.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<PositiveDurationText>")]
    pub ttl: Option<Span>,
    /// The longest TTL that a writer may give. Default: that of spec.defaults, or ttl where that is longer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<PositiveDurationText>")]
    pub max_ttl: Option<Span>,
    /// How much of the TTL chance may take away. Default: that of spec.defaults.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<PercentText>")]
    pub jitter: Option<Percent>,
    /// How long past its TTL a value may be served: on a CacheAside rule while one caller loads it anew, on a ReadThrough rule while
    /// the origin fails. Default 0s: never.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<DurationText>")]
    pub stale: Option<Span>,
    /// How long a key that the origin does not have is remembered as missing. Default 10s; 0s: not at all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<DurationText>")]
    pub negative_ttl: Option<Span>,
    /// How many callers of one missing key become one load.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stampede: Option<Stampede>,
    /// Where a missing key is loaded from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub origin: Option<RuleOrigin>,
    /// What ends values before their TTL, beside writes, deletions and events about single keys, which need nothing here.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub invalidate: Option<InvalidateSpec>,
    /// On a WriteBehind rule: how writes wait for their origin.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub write_behind: Option<WriteBehindSpec>,
}

/// What the sidecar does for the keys of a rule.
#[derive(JsonSchema, Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[schemars(inline)]
pub enum StrategyKind {
    /// The application loads and stores; the sidecar sees to the TTL, and to one load of many misses.
    CacheAside,
    /// The sidecar loads what is missing.
    ReadThrough,
    /// The sidecar loads what is missing, and carries writes to the origin before the cache has them.
    WriteThrough,
    /// The sidecar loads what is missing, and journals writes, which a relay carries to the origin later.
    WriteBehind,
    /// Commands pass untouched.
    Bypass,
}

/// How many callers of one missing key become one load.
#[derive(KubeSchema, Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[x_kube(validation = Rule::new("!has(self.wait) || !has(self.lease) || duration(self.wait) < duration(self.lease)")
    .message("wait is not shorter than lease: when the lease ends, the next caller loads, and need not wait"))]
#[x_kube(validation = Rule::new("!has(self.lease) || duration(self.lease) <= duration('5m')")
    .message("lease is longer than 5m: a caller that dies while it loads would keep the others waiting that long; write the longest time that a load takes"))]
#[x_kube(validation = Rule::new("!has(self.mode) || self.mode != 'Disabled' || (!has(self.lease) && !has(self.wait) && !has(self.earlyExpiry) && !has(self.atWaitEnd))")
    .message("mode: Disabled protects from nothing: remove lease, wait, earlyExpiry and atWaitEnd, or write mode: Lease"))]
pub struct Stampede {
    /// Lease, which is the default: of all who miss a key, one loads. Disabled: every caller that misses loads.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "StampedeMode")]
    pub mode: Option<StampedeMode>,
    /// How long one load may hold the lease before another caller may load. Default 3s; on a ReadThrough rule 500ms more than wait,
    /// and never less than the origin's timeout and 1s.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<PositiveDurationText>")]
    pub lease: Option<Span>,
    /// How long a read waits for a load that another caller makes. Default: half the lease, at most 1s, and once a sidecar has seen 100
    /// loads twice the time within which 99 of 100 are done, where that is less, but at least 250ms; on a ReadThrough rule the
    /// origin's timeout and 500ms, so that all who ask wait for one load.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<DurationText>")]
    pub wait: Option<Span>,
    /// How eagerly one caller is asked to load a value anew before it expires, in units of the time that loads take. Default 1.0
    /// where ttl is at least 10s, else 0; 0: never before.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 10))]
    pub early_expiry: Option<f64>,
    /// What a read gets that has waited in vain. Error, which is the default: an error, so that at most one caller loads per lease
    /// and key. Miss: a miss, so that it loads as well.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "WaitEnd")]
    pub at_wait_end: Option<WaitEnd>,
}

/// Whether many misses of one key become one load. There is no `Off`: YAML 1.1 takes that for a truth value.
#[derive(JsonSchema, Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[schemars(inline)]
pub enum StampedeMode {
    /// Of all who miss a key, one loads.
    Lease,
    /// Every caller that misses loads.
    Disabled,
}

/// What a read gets that has waited for another caller's load in vain.
#[derive(JsonSchema, Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[schemars(inline)]
pub enum WaitEnd {
    /// An error.
    Error,
    /// A miss.
    Miss,
}

impl From<WaitEnd> for AtWaitEnd {
    fn from(end: WaitEnd) -> Self {
        match end {
            WaitEnd::Error => Self::Error,
            WaitEnd::Miss => Self::Miss,
        }
    }
}

/// What `version` says where Larder is to keep it: no column.
pub const KEPT_VERSION: &str = "Kept";

/// What a load asks of its origin.
#[derive(KubeSchema, Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[x_kube(validation = Rule::new("has(self.read) != has(self.path)").message("write either read (for an sql origin) or path (for an http origin)"))]
#[x_kube(validation = Rule::new("!has(self.readMany) || has(self.read)").message("readMany answers MGET beside read: write read as well"))]
#[x_kube(validation = Rule::new("!has(self.path) || (!has(self.write) && !has(self.delete) && !has(self.increment))")
    .message("an http origin is written to by PUT and DELETE of path: remove write, delete and increment"))]
#[x_kube(validation = Rule::new("!has(self.path) || !has(self.version) || self.version == 'ETag'")
    .message("an http origin tells versions by its ETag header: write version: ETag, or remove it"))]
pub struct RuleOrigin {
    /// The name of one of spec.origins.
    #[schemars(with = "NameText")]
    pub name: String,
    /// For an sql origin: the statement that finds one key's value, in which $part stands for a part of the key, always as a
    /// bound parameter, never as text.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<SqlText>")]
    pub read: Option<String>,
    /// For an sql origin: the statement that finds many keys' values at once, in which $part is the array of that part over all
    /// keys (… = ANY($id)), and whose answer has a column named after each part.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<SqlText>")]
    pub read_many: Option<String>,
    /// For an http origin: the path, appended to its URL, in which {part} stands for a part of the key, percent-encoded.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<HttpPathText>")]
    pub path: Option<String>,
    /// On a WriteThrough or WriteBehind rule with an sql origin: the statement that stores a value, in which $part stands for a part of the
    /// key, $value for the value and $value.field for a member of its JSON object, or under as: Hash for a field, always as bound
    /// parameters. Where it changes no row, the write is refused. On a WriteBehind rule $version stands for a number that rises with each
    /// write of a key: a statement that takes it and changes no row has met a later write.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<SqlText>")]
    pub write: Option<String>,
    /// On a WriteThrough or WriteBehind rule with an sql origin: the statement that deletes a key's row, in which $part stands for a part of
    /// the key. On a WriteThrough rule the reply to DEL is the number of rows. Without it, DEL is refused.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<SqlText>")]
    pub delete: Option<String>,
    /// On a WriteThrough rule with an sql origin: the statement that raises a key's number, in which $part stands for a part of the key and
    /// $by for how much it is raised, and which returns what it is then (UPDATE … SET n = n + $by … RETURNING n): the reply to INCR, INCRBY,
    /// DECR and DECRBY, and what the cache keeps. Without it, they are refused.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<SqlText>")]
    pub increment: Option<String>,
    /// On a WriteThrough rule: which of two writes of a key is the later. For an sql origin a column that write returns (RETURNING
    /// row_version), a whole number that rises with each write, or Kept: one that Larder counts in the transaction of the write, in its table
    /// larder_versions of that database; without it, of writes that overlap none is kept in the cache. For an http origin ETag: a write is
    /// made on condition that the origin still has what was last seen of it (If-Match). On a WriteBehind rule with an sql origin: the column
    /// that write compares with $version.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<ColumnText>")]
    pub version: Option<String>,
    /// How the answer becomes the key's value. String: the only column, or the body, as it is. Json: the row as a JSON object. Hash, on a
    /// ReadThrough or WriteThrough rule with an sql origin: the row as a hash, with a field for each column that is not NULL.
    /// Default: one column as it is, several as a JSON object, a body as it is.
    #[serde(default, rename = "as", skip_serializing_if = "Option::is_none")]
    #[schemars(with = "ReplyKind")]
    pub reply: Option<ReplyKind>,
}

/// How an answer becomes a value.
#[derive(JsonSchema, Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[schemars(inline)]
pub enum ReplyKind {
    /// The only column, or the body, as it is.
    String,
    /// The row as a JSON object.
    Json,
    /// The row as a hash.
    Hash,
}

impl From<ReplyKind> for ReplyForm {
    fn from(kind: ReplyKind) -> Self {
        match kind {
            ReplyKind::String => Self::String,
            ReplyKind::Json => Self::Json,
            ReplyKind::Hash => Self::Hash,
        }
    }
}
