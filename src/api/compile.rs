//! Compilation: one CacheCluster and the policies about it become the snapshot that a sidecar reads, with every default resolved.

mod behind;
mod feeds;

use std::collections::{BTreeMap, HashSet};

use super::cache_cluster::Keeping;
use super::cache_policy::{
    self, AllowSpec, Defaults, KEPT_VERSION, OriginAccess, OriginSpec, ReplyKind, RuleSpec, StampedeMode, StrategyKind,
    UnmatchedMode, Versioned,
};
use super::path::{FieldPath, at};
use super::problem::{ObjectRef, Problem, Problems};
use super::{CacheCluster, CachePolicy, SecretKeyRef, SensitiveSource};
use crate::policy::changes::{self, Feed, Follow};
use crate::policy::snapshot::{self, Allow, Auth, Cluster, Origin, OriginKind, Sensitive, Snapshot, Tls, Topology};
use crate::policy::{
    AtWaitEnd, Beta, CacheAside, JournalName, KeyPattern, Lifetime, Load, Mode, Percent, Query, ReadThrough, RowVersion, Rule,
    Span, Stampede, Store, Strategy, Unmatched, WriteBehind, WriteThrough, tags,
};

pub use behind::{journal_name, unfit_for_journals};

/// The TTL of a key whose writer and policy give none.
pub const DEFAULT_TTL: Span = Span::from_secs(5 * 60);
/// The longest TTL where a policy gives none.
pub const DEFAULT_MAX_TTL: Span = Span::from_secs(24 * 3600);
/// How much of a TTL chance may take away.
pub const DEFAULT_JITTER: Percent = Percent::new(10);
/// How long one load by the application may hold the lease.
pub const DEFAULT_LEASE: Span = Span::from_secs(3);
/// The longest default wait for another application's load; half the lease where that is shorter.
pub const DEFAULT_WAIT: Span = Span::from_secs(1);
/// How much longer than the origin's timeout others wait for a load by the sidecar: what it loads is then stored, and seen.
pub const WAIT_BEYOND_TIMEOUT: Span = Span::from_millis(500);
/// How much longer than they wait such a load may hold the lease: while it stands, nobody else loads.
pub const LEASE_BEYOND_WAIT: Span = Span::from_millis(500);
/// How eagerly values are loaded anew before they expire.
pub const DEFAULT_EARLY_EXPIRY: Beta = Beta::ONE;
/// The shortest TTL for which that is the default: of a shorter one, the time that loads take is too great a part.
pub const EARLY_EXPIRY_FROM: Span = Span::from_secs(10);
/// How long a key is remembered as missing.
pub const DEFAULT_NEGATIVE_TTL: Span = Span::from_secs(10);
/// The most loads under way at once from one sidecar at one origin.
pub const DEFAULT_MAX_CONNECTIONS: u32 = 4;
/// How long a connection to an origin may take to come about.
pub const DEFAULT_CONNECT_TIMEOUT: Span = Span::from_secs(1);
/// How long one load may take.
pub const DEFAULT_TIMEOUT: Span = Span::from_secs(2);

/// How a sidecar reaches the cache: what the resources do not say, because it depends on where the servers run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reach {
    /// How the servers are found.
    pub topology: Topology,
    /// TLS towards them.
    pub tls: Option<Tls>,
    /// Files with the user and the password for servers.
    pub auth: Option<Auth>,
    /// Files with the user and the password for sentinels.
    pub sentinel_auth: Option<Auth>,
    /// How long a command is tried where no policy says: what a failover of such servers takes.
    pub patience: Span,
}

/// Where the text of an entry in a Secret of `namespace` can be read by a sidecar: a file, or the text itself. The error says why
/// it cannot, and what to do.
pub trait Secrets {
    /// Resolves one reference.
    fn resolve(&self, namespace: &str, secret: &SecretKeyRef) -> Result<Sensitive, String>;
}

impl<F: Fn(&str, &SecretKeyRef) -> Result<Sensitive, String>> Secrets for F {
    fn resolve(&self, namespace: &str, secret: &SecretKeyRef) -> Result<Sensitive, String> {
        self(namespace, secret)
    }
}

/// Compiles the policies about `cluster` into a snapshot. Policies are merged in the order of their age, then their name; policies
/// about other clusters are a problem of the caller's, and are refused.
///
/// Where two policies use the same name for a rule or an origin, the later one's becomes `policy/name` in the snapshot.
pub fn compile(
    cluster: &CacheCluster,
    policies: &[&CachePolicy],
    generation: u64,
    reach: Reach,
    secrets: &dyn Secrets,
) -> Result<Snapshot, Problems> {
    compile_about(&cluster_ref(cluster), Some(cluster.spec.keeping()), policies, generation, reach, secrets)
}

/// [`compile`], where of the cluster only its name is known, and perhaps what its servers keep.
pub fn compile_about(
    cluster: &ObjectRef,
    keeping: Option<Keeping>,
    policies: &[&CachePolicy],
    generation: u64,
    reach: Reach,
    secrets: &dyn Secrets,
) -> Result<Snapshot, Problems> {
    let mut merged = Merged { keeping, ..Merged::default() };
    for policy in in_order(policies) {
        merged.add(cluster, policy, secrets);
    }
    let name = cluster.name.clone();
    let Reach { topology, tls, auth, sentinel_auth, patience } = reach;
    let snapshot = Snapshot {
        version: snapshot::VERSION,
        requires: snapshot::required_form(&merged.origins, &merged.rules).max(changes::required_form(&merged.feeds)),
        generation,
        cluster: Cluster {
            name,
            topology,
            tls,
            auth,
            sentinel_auth,
            patience: merged.patience.unwrap_or(patience),
            idle_transaction: snapshot::DEFAULT_IDLE_TRANSACTION,
        },
        unmatched: merged.unmatched.map_or(Unmatched::Bypass {}, |stated| stated.unmatched),
        ttl_sweep: merged.ttl_sweep.unwrap_or(snapshot::DEFAULT_TTL_SWEEP),
        allow: merged.allow,
        writes_to_disk: false,
        origins: merged.origins,
        rules: merged.rules,
        feeds: merged.feeds,
    };
    let mut problems = merged.problems;
    if problems.is_empty()
        && let Err(error) = snapshot.check()
    {
        problems.push(Problem {
            object: cluster.clone(),
            path: FieldPath::root(),
            what: error.to_string(),
            remedy: "correct the policies about this cluster".to_owned(),
        });
    }
    if problems.is_empty() { Ok(snapshot) } else { Err(Problems(problems)) }
}

/// The policies by age, then name.
pub fn in_order<'a>(policies: &[&'a CachePolicy]) -> Vec<&'a CachePolicy> {
    let mut ordered = policies.to_vec();
    ordered.sort_by_key(|policy| {
        let metadata = &policy.metadata;
        // An object that no server has seen yet is the youngest.
        let created = metadata.creation_timestamp.as_ref().map(|time| time.0);
        (created.is_none(), created, metadata.name.clone())
    });
    ordered
}

/// The policy as problems name it.
pub fn policy_ref(policy: &CachePolicy) -> ObjectRef {
    ObjectRef::new("CachePolicy", &policy.metadata)
}

/// The cluster as problems name it.
pub fn cluster_ref(cluster: &CacheCluster) -> ObjectRef {
    ObjectRef::new("CacheCluster", &cluster.metadata)
}

/// What a policy said of unmatched keys, and which policy it was.
struct Stated {
    unmatched: Unmatched,
    policy: String,
}

#[derive(Default)]
struct Merged {
    keeping: Option<Keeping>,
    unmatched: Option<Stated>,
    ttl_sweep: Option<Span>,
    patience: Option<Span>,
    allow: Allow,
    origins: Vec<Origin>,
    rules: Vec<Rule>,
    feeds: Vec<Feed>,
    origin_names: HashSet<String>,
    rule_names: HashSet<String>,
    problems: Vec<Problem>,
}

/// One policy on its way into the snapshot.
struct Source<'a> {
    object: ObjectRef,
    policy: &'a CachePolicy,
    defaults: Defaults,
    mode: Mode,
    problems: &'a mut Vec<Problem>,
}

impl Source<'_> {
    fn refuse(&mut self, path: FieldPath, what: impl Into<String>, remedy: impl Into<String>) {
        self.problems.push(Problem { object: self.object.clone(), path, what: what.into(), remedy: remedy.into() });
    }
}

impl Merged {
    fn add(&mut self, cluster: &ObjectRef, policy: &CachePolicy, secrets: &dyn Secrets) {
        let object = policy_ref(policy);
        let mut problems = Vec::new();
        let defaults = policy.spec.defaults.clone().unwrap_or_default();
        let mode = policy.spec.mode.map_or(Mode::Enforce, Into::into);
        let mut source = Source { object, policy, defaults, mode, problems: &mut problems };
        if source.object.namespace != cluster.namespace || policy.spec.cache_cluster != cluster.name {
            let what = format!("the policy is about the CacheCluster `{}` of its own namespace", policy.spec.cache_cluster);
            source.refuse(at!("spec", "cacheCluster"), what, "compile it with that cluster");
        }
        self.add_unmatched(&mut source);
        // Each policy is promised that it takes no longer.
        self.ttl_sweep = self.ttl_sweep.into_iter().chain(source.defaults.ttl_sweep).min();
        // Each is promised that it is tried at least that long.
        let patience = source.defaults.patience.filter(|_| mode == Mode::Enforce);
        self.patience = self.patience.into_iter().chain(patience).max();
        let AllowSpec { flush, keys } = policy.spec.allow.unwrap_or_default();
        self.allow = Allow { flush: self.allow.flush || flush, keys: self.allow.keys || keys };
        let renamed = self.add_origins(&mut source, secrets);
        self.add_rules(cluster, &mut source, &renamed);
        self.problems.append(&mut problems);
    }

    fn add_unmatched(&mut self, source: &mut Source<'_>) {
        let Some(mode) = source.defaults.unmatched else {
            return;
        };
        if source.mode == Mode::Observe {
            return;
        }
        let unmatched = match mode {
            UnmatchedMode::Bypass => Unmatched::Bypass {},
            UnmatchedMode::Refuse => Unmatched::Refuse {},
            UnmatchedMode::Ttl => match lifetime(&source.defaults, None, None, None) {
                Ok(lifetime) => Unmatched::Ttl(lifetime),
                Err(why) => return source.refuse(at!("spec", "defaults", "ttl"), why.what, why.remedy),
            },
        };
        match &self.unmatched {
            Some(stated) if stated.unmatched != unmatched => {
                let what = format!("the policy `{}` about the same cluster says otherwise of unmatched keys", stated.policy);
                source.refuse(at!("spec", "defaults", "unmatched"), what, "write the same in both, or leave it to one of them");
            }
            _ => self.unmatched = Some(Stated { unmatched, policy: source.object.name.clone() }),
        }
    }

    /// Adds the origins, and returns what each is called in the snapshot, in order.
    fn add_origins(&mut self, source: &mut Source<'_>, secrets: &dyn Secrets) -> Vec<String> {
        let mut names = Vec::new();
        for (index, spec) in source.policy.spec.origins.iter().enumerate() {
            let place = at!("spec", "origins", index);
            let name = unique(&mut self.origin_names, &source.object.name, &spec.name);
            if let Some(origin) = compile_origin(source, spec, &place, name.clone(), secrets) {
                self.origins.push(origin);
            }
            names.push(name);
        }
        names
    }

    fn add_rules(&mut self, cluster: &ObjectRef, source: &mut Source<'_>, origin_names: &[String]) {
        // By the place of their origin.
        let mut follows: BTreeMap<usize, Vec<Follow>> = BTreeMap::new();
        let earlier = self.rules.len();
        for (index, spec) in source.policy.spec.rules.iter().enumerate() {
            let place = at!("spec", "rules", index);
            let name = unique(&mut self.rule_names, &source.object.name, &spec.name);
            let keys = spec.keys.parse::<KeyPattern>();
            if let Err(error) = &keys {
                let (what, remedy) = split_remedy(&error.to_string());
                source.refuse(place.key("keys"), what, remedy);
            }
            let strategy = compile_strategy(source, spec, &place, keys.as_ref().ok(), origin_names);
            let tags = compile_tags(source, spec, &place, keys.as_ref().ok());
            let versioned = match spec.invalidate.as_ref().and_then(|invalidate| invalidate.versioned) {
                None => crate::policy::Versioned::No,
                Some(Versioned::Rule) => crate::policy::Versioned::Rule,
                Some(Versioned::Entity) => crate::policy::Versioned::Entity,
            };
            if versioned.is_any() && keys.as_ref().is_ok_and(|keys| !keys.ends_open()) {
                let what = "the version stands behind the last part of a key, and these keys end otherwise";
                source.refuse(place.key("invalidate").key("versioned"), what, "remove it, or let the keys end in a part");
            }
            if let Some(keeping) = self.keeping {
                behind::check_keeping(source, spec, &place, keeping);
            }
            if let Ok(keys) = &keys {
                let follower = feeds::Follower { rule: &name, keys, tags: &tags, versioned };
                for (origin, follow) in feeds::follows(source, spec, &place, &follower) {
                    follows.entry(origin).or_default().push(follow);
                }
            }
            if let (Ok(keys), Some(strategy)) = (keys, strategy) {
                self.rules.push(Rule { name, keys, mode: source.mode, strategy, tags, versioned });
            }
        }
        feeds::spread(&mut follows, &self.rules[earlier..]);
        // What only observes changes nothing in the cache.
        for (at, follows) in follows.into_iter().filter(|_| source.mode == Mode::Enforce) {
            let (spec, name) = (&source.policy.spec.origins[at], &origin_names[at]);
            self.feeds.push(feeds::feed(cluster, &source.object.name, spec, name, follows));
        }
    }
}

/// `name`, or `policy/name` where it is taken. A policy's own names are unique by its schema; a second one of the same policy
/// cannot come about through the API server, and is found by the snapshot's own check.
fn unique(taken: &mut HashSet<String>, policy: &str, name: &str) -> String {
    let name = if taken.contains(name) { format!("{policy}/{name}") } else { name.to_owned() };
    taken.insert(name.clone());
    name
}

fn compile_origin(
    source: &mut Source<'_>,
    spec: &OriginSpec,
    place: &FieldPath,
    name: String,
    secrets: &dyn Secrets,
) -> Option<Origin> {
    type Make = fn(Sensitive) -> OriginKind;
    let (field, access, make): (_, &OriginAccess, Make) = match (&spec.sql, &spec.http) {
        (Some(access), None) => ("sql", access, |url| OriginKind::Sql { url }),
        (None, Some(access)) => ("http", access, |url| OriginKind::Http { url }),
        _ => {
            source.refuse(place.clone(), "an origin is either sql or http", "write one of them");
            return None;
        }
    };
    let place = place.key(field).key("url");
    let url = resolve(source, &access.url, &place, secrets)?;
    if let Sensitive::Value(text) = &url
        && let Err(remedy) = check_url(field, text)
    {
        source.refuse(place, "the URL has no scheme that this kind of origin knows", remedy);
        return None;
    }
    Some(Origin {
        name,
        kind: make(url),
        max_connections: access.max_connections.unwrap_or(DEFAULT_MAX_CONNECTIONS),
        max_total_connections: access.max_total_connections,
        load_queue: access.max_total_connections.and_then(|_| load_queue(source, &spec.name)),
        connect_timeout: access.connect_timeout.unwrap_or(DEFAULT_CONNECT_TIMEOUT),
        timeout: access.timeout.unwrap_or(DEFAULT_TIMEOUT),
    })
}

/// The queue by which a relay of the policy loads from an origin, as the policy calls it. It has the name of a journal for the same origin, beside
/// which it lies. `None`: Kubernetes knows no such name.
fn load_queue(source: &Source<'_>, origin: &str) -> Option<JournalName> {
    journal_name(&source.object.namespace, &source.object.name, origin).ok()
}

/// Whether `url` is one of an origin of this `kind`, `sql` or `http`. The error is the remedy; it never shows the URL.
pub fn check_url(kind: &str, url: &str) -> Result<(), &'static str> {
    let (schemes, remedy): (&[&str], _) = match kind {
        "sql" => (&["postgres://", "postgresql://", "sqlite:"], "write postgres://… or sqlite://…"),
        _ => (&["http://", "https://"], "write http://… or https://…"),
    };
    if schemes.iter().any(|scheme| url.starts_with(scheme)) { Ok(()) } else { Err(remedy) }
}

fn resolve(source: &mut Source<'_>, sensitive: &SensitiveSource, place: &FieldPath, secrets: &dyn Secrets) -> Option<Sensitive> {
    match (&sensitive.value, &sensitive.secret_key_ref) {
        (Some(text), None) => Some(Sensitive::Value(text.clone())),
        (None, Some(secret)) => match secrets.resolve(&source.object.namespace, secret) {
            Ok(found) => Some(found),
            Err(why) => {
                let (what, remedy) = split_remedy(&why);
                source.refuse(place.key("secretKeyRef"), what, remedy);
                None
            }
        },
        _ => {
            source.refuse(place.clone(), "it is either a value or a secretKeyRef", "write one of them");
            None
        }
    }
}

/// Errors of the vocabulary read `what: remedy`.
fn split_remedy(text: &str) -> (String, String) {
    match text.split_once(": ") {
        Some((what, remedy)) => (what.to_owned(), remedy.to_owned()),
        None => (text.to_owned(), "correct it".to_owned()),
    }
}

struct Why {
    what: String,
    remedy: String,
}

/// The lifetime of a rule's keys. What a rule leaves open comes from the policy's defaults, and what those leave open from Larder's;
/// a default never contradicts what was written, so it gives way.
fn lifetime(defaults: &Defaults, ttl: Option<Span>, max_ttl: Option<Span>, jitter: Option<Percent>) -> Result<Lifetime, Why> {
    let stated_max = max_ttl.or(defaults.max_ttl);
    let (default, max) = match (ttl.or(defaults.ttl.filter(|_| max_ttl.is_none())), stated_max) {
        (Some(ttl), Some(max)) => (ttl, max),
        (Some(ttl), None) => (ttl, DEFAULT_MAX_TTL.max(ttl)),
        (None, Some(max)) => (defaults.ttl.unwrap_or(DEFAULT_TTL).min(max), max),
        (None, None) => (DEFAULT_TTL, DEFAULT_MAX_TTL),
    };
    if default > max {
        return Err(Why {
            what: format!("the ttl of {default} is longer than the maxTtl of {max}"),
            remedy: "shorten ttl, or write a longer maxTtl".to_owned(),
        });
    }
    if default.is_zero() {
        return Err(Why {
            what: "a ttl of zero would delete what is written".to_owned(),
            remedy: "write at least 1ms".to_owned(),
        });
    }
    let jitter = jitter.or(defaults.jitter).unwrap_or(DEFAULT_JITTER);
    Ok(Lifetime { default, max, jitter })
}

fn compile_strategy(
    source: &mut Source<'_>,
    spec: &RuleSpec,
    place: &FieldPath,
    keys: Option<&KeyPattern>,
    origin_names: &[String],
) -> Option<Strategy> {
    if spec.strategy == StrategyKind::Bypass {
        return Some(Strategy::Bypass {});
    }
    let ttl = match lifetime(&source.defaults, spec.ttl, spec.max_ttl, spec.jitter) {
        Ok(lifetime) => lifetime,
        Err(why) => {
            source.refuse(place.key("ttl"), why.what, why.remedy);
            return None;
        }
    };
    let stampede = spec.stampede.clone().unwrap_or_default();
    let stale = spec.stale.unwrap_or_default();
    if spec.strategy == StrategyKind::CacheAside {
        let stampede = compile_stampede(source, &stampede, &ttl, &place.key("stampede"))?;
        return Some(Strategy::CacheAside(CacheAside { ttl, stale, stampede }));
    }
    let load = compile_load(source, spec, place, keys, origin_names)?;
    let (lease, wait) = lease_and_wait_of_loads(&stampede, timeout_of(source, spec));
    let negative_ttl = spec.negative_ttl.unwrap_or(DEFAULT_NEGATIVE_TTL);
    let read = ReadThrough { ttl, stale, negative_ttl, lease, wait, load };
    if spec.strategy == StrategyKind::ReadThrough {
        return Some(Strategy::ReadThrough(Box::new(read)));
    }
    let store = compile_store(source, spec, place, &read.load)?;
    if spec.strategy == StrategyKind::WriteBehind {
        let journal = behind::journal(source, spec, place)?;
        return Some(Strategy::WriteBehind(Box::new(WriteBehind { read, store, journal })));
    }
    Some(Strategy::WriteThrough(Box::new(WriteThrough { read, store })))
}

/// The tags of a rule's keys.
fn compile_tags(source: &mut Source<'_>, spec: &RuleSpec, place: &FieldPath, keys: Option<&KeyPattern>) -> Vec<KeyPattern> {
    let texts = spec.invalidate.iter().flat_map(|invalidate| &invalidate.tags);
    let mut tags = Vec::new();
    for (index, text) in texts.enumerate() {
        let checked = text.parse::<KeyPattern>().map_err(|error| error.to_string()).and_then(|tag| match keys {
            Some(keys) => tags::check(&tag, keys).map(|()| tag).map_err(|error| error.to_string()),
            None => Ok(tag),
        });
        match checked {
            Ok(tag) => tags.push(tag),
            Err(error) => {
                let (what, remedy) = split_remedy(&error);
                source.refuse(place.key("invalidate").key("tags").index(index), what, remedy);
            }
        }
    }
    tags
}

/// What a rule that writes through or behind tells its origin.
fn compile_store(source: &mut Source<'_>, spec: &RuleSpec, place: &FieldPath, load: &Load) -> Option<Store> {
    let origin = spec.origin.as_ref()?;
    match (&load.query, &origin.write) {
        (Query::Http { .. }, _) => Some(Store::Http { if_match: origin.version.is_some() }),
        (Query::Sql { .. }, Some(write)) => {
            let (write, delete) = (write.clone(), origin.delete.clone());
            let version = origin
                .version
                .clone()
                .map(|name| if name == KEPT_VERSION { RowVersion::Kept {} } else { RowVersion::Column(name) });
            Some(Store::Sql { write, delete, version, increment: origin.increment.clone() })
        }
        (Query::Sql { .. }, None) => {
            let what = format!("a {:?} rule carries writes to its origin", spec.strategy);
            source.refuse(place.key("origin"), what, "write `write`, the statement that stores $value");
            None
        }
    }
}

/// How long the sidecar may hold a lease while it loads from an origin of this timeout, and how long other sidecars wait for it. A
/// load takes no longer than the timeout: so with the defaults, of all who ask one loads, as long as it lives.
fn lease_and_wait_of_loads(spec: &cache_policy::Stampede, timeout: Span) -> (Span, Span) {
    let sum = |one: Span, other: Span| Span::from_millis(one.as_millis() + other.as_millis());
    let usual = sum(timeout, WAIT_BEYOND_TIMEOUT);
    let wait = spec.wait.unwrap_or(usual);
    (spec.lease.unwrap_or(sum(wait.max(usual), LEASE_BEYOND_WAIT)), wait)
}

/// How long a load of the rule's origin may take.
fn timeout_of(source: &Source<'_>, spec: &RuleSpec) -> Span {
    let named = spec.origin.as_ref().map(|origin| &origin.name);
    let origin = source.policy.spec.origins.iter().find(|origin| Some(&origin.name) == named);
    let access = origin.and_then(|origin| origin.sql.as_ref().or(origin.http.as_ref()));
    access.and_then(|access| access.timeout).unwrap_or(DEFAULT_TIMEOUT)
}

/// How long an application may hold a lease, and how long others wait for it. Where nothing is said of the latter, that is the most:
/// a sidecar that knows how long loads take has them wait less.
fn lease_and_wait(spec: &cache_policy::Stampede) -> (Span, Span) {
    let lease = spec.lease.unwrap_or(DEFAULT_LEASE);
    (lease, spec.wait.unwrap_or_else(|| DEFAULT_WAIT.min(Span::from_millis(lease.as_millis() / 2))))
}

/// `None` where it is refused.
fn compile_stampede(
    source: &mut Source<'_>,
    spec: &cache_policy::Stampede,
    ttl: &Lifetime,
    place: &FieldPath,
) -> Option<Option<Stampede>> {
    match spec.mode.unwrap_or(StampedeMode::Lease) {
        StampedeMode::Disabled => return Some(None),
        StampedeMode::Lease => {}
    }
    let early_expiry = match spec.early_expiry {
        None => (ttl.default >= EARLY_EXPIRY_FROM).then_some(DEFAULT_EARLY_EXPIRY),
        Some(0.0) => None,
        Some(factor) => match Beta::try_from(factor) {
            Ok(beta) => Some(beta),
            Err(error) => {
                let (what, remedy) = split_remedy(&error.to_string());
                source.refuse(place.key("earlyExpiry"), what, remedy);
                return None;
            }
        },
    };
    let (lease, wait) = lease_and_wait(spec);
    let (wait_follows_loads, at_wait_end) = (spec.wait.is_none(), spec.at_wait_end.map_or(AtWaitEnd::Error, Into::into));
    Some(Some(Stampede { lease, wait, wait_follows_loads, early_expiry, at_wait_end }))
}

fn compile_load(
    source: &mut Source<'_>,
    spec: &RuleSpec,
    place: &FieldPath,
    keys: Option<&KeyPattern>,
    origin_names: &[String],
) -> Option<Load> {
    let Some(origin) = &spec.origin else {
        source.refuse(place.clone(), "the rule loads what is missing", "write its origin");
        return None;
    };
    let place = place.key("origin");
    let Some(index) = source.policy.spec.origins.iter().position(|candidate| candidate.name == origin.name) else {
        let what = format!("there is no origin `{}` in this policy", origin.name);
        source.refuse(place.key("name"), what, "write the name of one of spec.origins");
        return None;
    };
    let is_sql = source.policy.spec.origins.get(index).is_some_and(|origin| origin.sql.is_some());
    let query = match (&origin.read, &origin.path) {
        (Some(read), None) if is_sql => Query::Sql { read: read.clone(), read_many: origin.read_many.clone() },
        (None, Some(path)) if !is_sql => Query::Http { path: path.clone() },
        _ => {
            let what = format!("`{}` is {} origin", origin.name, if is_sql { "an sql" } else { "an http" });
            source.refuse(place, what, if is_sql { "ask it by read" } else { "ask it by path" });
            return None;
        }
    };
    if origin.read_many.is_some() && keys.is_some_and(|keys| keys.parts().next().is_none()) {
        source.refuse(place.key("readMany"), "the rule covers one key only", "remove readMany, or name a part in keys");
        return None;
    }
    if origin.reply == Some(ReplyKind::Hash)
        && let Err((field, why)) = hash_is_possible(spec, &query)
    {
        source.refuse(place.key(field), why.what, why.remedy);
        return None;
    }
    let origin_name = origin_names.get(index)?.clone();
    Some(Load { origin: origin_name, query, reply: origin.reply.map(Into::into) })
}

/// Whether the values of this rule can be hashes. The error says which field of its origin is wrong.
fn hash_is_possible(spec: &RuleSpec, query: &Query) -> Result<(), (&'static str, Why)> {
    let refuse = |field, what: &str, remedy: &str| Err((field, Why { what: what.to_owned(), remedy: remedy.to_owned() }));
    let versioned = spec.invalidate.as_ref().is_some_and(|invalidate| invalidate.versioned.is_some());
    match query {
        Query::Http { .. } => {
            refuse("as", "a hash is made of a row's columns, and an http origin has none", "write as: Json, or remove it")
        }
        Query::Sql { read_many: Some(_), .. } => {
            refuse("readMany", "it answers MGET, which gives no hashes", "remove it, or write as: Json")
        }
        Query::Sql { .. } if spec.origin.as_ref().is_some_and(|origin| origin.increment.is_some()) => {
            refuse("increment", "a hash is no number to be raised", "remove it, or write as: String")
        }
        Query::Sql { .. } if spec.strategy == StrategyKind::WriteBehind => {
            refuse("as", "hashes cannot be written behind", "write strategy: WriteThrough, or as: Json")
        }
        Query::Sql { .. } if versioned => {
            refuse("as", "the commands on hashes know no versions", "write as: Json, or remove invalidate.versioned")
        }
        Query::Sql { .. } => Ok(()),
    }
}

#[cfg(test)]
mod tests;
