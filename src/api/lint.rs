//! Anti-patterns: what the API server accepts, and users regret.

use super::cache_cluster::{CacheClusterSpec, Eviction};
use super::cache_policy::{CachePolicySpec, Defaults, OriginAccess, RuleSpec, Stampede, StampedeMode, StrategyKind};
use super::compile::{DEFAULT_NEGATIVE_TTL, DEFAULT_TTL};
use super::finding::{Finding, Severity};
use super::manifest::{Document, Manifests};
use super::path::{FieldPath, at};
use crate::policy::{KeyPattern, Span};

/// A default TTL from which values count as forgotten rather than cached.
const LONG_TTL: Span = Span::from_secs(24 * 3600);
/// The same for the longest TTL that writers may give.
const LONG_MAX_TTL: Span = Span::from_secs(7 * 24 * 3600);

/// A wait from which common clients, which give up after 3 s and ask again, make the load that it should have saved.
const LONG_WAIT: Span = Span::from_secs(2);

/// Words in keys that stand for a query's text, or for its hash.
const QUERY_WORDS: &[&str] = &[
    "sql",
    "query",
    "stmt",
    "statement",
    "select",
    "hash",
    "md5",
    "sha",
    "sha1",
    "sha256",
    "digest",
    "checksum",
    "fingerprint",
    "crc32",
];

/// The codes of all warnings.
pub const CODES: &[&str] = &[
    "covers-everything",
    "evicts-everything",
    "evicts-nothing",
    "long-ttl",
    "long-wait",
    "no-jitter",
    "no-negative-ttl",
    "no-stampede-protection",
    "plain-password",
    "query-key",
    "shadowed",
    "short-ttl",
    "unused-origin",
];

/// An anti-pattern at one place of an object.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AntiPattern {
    /// Which: one of [`CODES`].
    pub code: &'static str,
    /// Where in the object.
    pub path: FieldPath,
    /// What is unwise.
    pub what: String,
    /// Why that is bad; empty where `what` says it all.
    pub why: String,
    /// What to write instead.
    pub remedy: String,
}

impl AntiPattern {
    fn located(self, document: &Document) -> Finding {
        let Self { code, path, what, why, remedy } = self;
        Finding { code, why, ..document.finding(Severity::Warning, path, what, remedy) }
    }
}

/// Warnings about everything in `manifests`.
pub fn lint(manifests: &Manifests) -> Vec<Finding> {
    let clusters = manifests.clusters.iter().map(|cluster| (&cluster.document, of_cluster(&cluster.object.spec)));
    let policies = manifests.policies.iter().map(|policy| (&policy.document, of_policy(&policy.object.spec)));
    let located = |(document, found): (&Document, Vec<AntiPattern>)| -> Vec<Finding> {
        found.into_iter().map(|found| found.located(document)).collect()
    };
    clusters.chain(policies).flat_map(located).collect()
}

/// The anti-patterns of a CacheCluster.
pub fn of_cluster(spec: &CacheClusterSpec) -> Vec<AntiPattern> {
    let mut linter = Linter::default();
    lint_cluster(&mut linter, spec);
    linter.found
}

/// The anti-patterns of a policy, in the order of its rules.
pub fn of_policy(spec: &CachePolicySpec) -> Vec<AntiPattern> {
    let mut linter = Linter::default();
    lint_policy(&mut linter, spec);
    linter.found
}

#[derive(Default)]
struct Linter {
    found: Vec<AntiPattern>,
}

impl Linter {
    fn warn(
        &mut self,
        code: &'static str,
        path: FieldPath,
        what: impl Into<String>,
        why: impl Into<String>,
        remedy: impl Into<String>,
    ) {
        debug_assert!(CODES.contains(&code), "{code} is not in CODES");
        self.found.push(AntiPattern { code, path, what: what.into(), why: why.into(), remedy: remedy.into() });
    }
}

fn lint_cluster(linter: &mut Linter, spec: &CacheClusterSpec) {
    let path = at!("spec", "eviction");
    match spec.eviction() {
        Eviction::VolatileLfu | Eviction::VolatileLru | Eviction::VolatileTtl | Eviction::VolatileRandom => {}
        eviction @ (Eviction::AllkeysLfu | Eviction::AllkeysLru | Eviction::AllkeysRandom) => linter.warn(
            "evicts-everything",
            path,
            format!("{} also drops keys that have no TTL", eviction.as_str()),
            "locks, queues and sessions that share the cache vanish when it is full",
            "write volatile-lfu: covered keys always have a TTL",
        ),
        Eviction::Noeviction => linter.warn(
            "evicts-nothing",
            path,
            "a full server refuses every write",
            "a cache that is full should drop what is used least",
            "write volatile-lfu",
        ),
    }
    if let Some(auth) = &spec.auth
        && auth.password.value.is_some()
    {
        warn_plain_password(linter, at!("spec", "auth", "password", "value"));
    }
}

fn warn_plain_password(linter: &mut Linter, path: FieldPath) {
    linter.warn(
        "plain-password",
        path,
        "a password stands here in plain text",
        "whoever may read the object can read it, and so can its version control",
        "keep it in a Secret, and name it in secretKeyRef",
    );
}

fn lint_policy(linter: &mut Linter, spec: &CachePolicySpec) {
    let defaults = spec.defaults.clone().unwrap_or_default();
    lint_lifetimes(linter, &at!("spec", "defaults"), defaults.ttl, defaults.max_ttl);
    if defaults.jitter.is_some_and(|jitter| jitter.as_whole() == 0) {
        warn_no_jitter(linter, at!("spec", "defaults", "jitter"));
    }
    lint_origins(linter, spec);
    for (index, rule) in spec.rules.iter().enumerate() {
        let path = at!("spec", "rules", index);
        lint_lifetimes(linter, &path, rule.ttl, rule.max_ttl);
        if rule.jitter.is_some_and(|jitter| jitter.as_whole() == 0) {
            warn_no_jitter(linter, path.key("jitter"));
        }
        lint_keys(linter, &path, rule);
        lint_loads(linter, &path, rule, &defaults);
    }
    lint_shadows(linter, spec);
}

fn lint_lifetimes(linter: &mut Linter, path: &FieldPath, ttl: Option<Span>, max_ttl: Option<Span>) {
    if let Some(ttl) = ttl.filter(|ttl| *ttl >= LONG_TTL) {
        linter.warn(
            "long-ttl",
            path.key("ttl"),
            format!("a default TTL of {ttl} keeps values for days"),
            "a change of the data that nobody announces stays unseen that long, and the memory stays taken",
            "write minutes, or at most a few hours",
        );
    }
    if let Some(max_ttl) = max_ttl.filter(|max_ttl| *max_ttl > LONG_MAX_TTL) {
        linter.warn(
            "long-ttl",
            path.key("maxTtl"),
            format!("writers may keep values for {max_ttl}"),
            "one forgotten key outlives every change of its data",
            "write at most 168h (one week)",
        );
    }
}

fn warn_no_jitter(linter: &mut Linter, path: FieldPath) {
    linter.warn(
        "no-jitter",
        path,
        "no TTL differs from another",
        "keys that are written together expire together, and their loads hit the origin at once",
        "write 10%, or remove jitter",
    );
}

fn lint_origins(linter: &mut Linter, spec: &CachePolicySpec) {
    for (index, origin) in spec.origins.iter().enumerate() {
        let kinds: [(&str, Option<&OriginAccess>); 2] = [("sql", origin.sql.as_ref()), ("http", origin.http.as_ref())];
        for (kind, access) in kinds {
            if access.and_then(|access| access.url.value.as_deref()).is_some_and(holds_password) {
                warn_plain_password(linter, at!("spec", "origins", index, kind, "url", "value"));
            }
        }
        if !spec.rules.iter().any(|rule| rule.origin.as_ref().is_some_and(|used| used.name == origin.name)) {
            linter.warn(
                "unused-origin",
                at!("spec", "origins", index),
                format!("no rule loads from `{}`", origin.name),
                "",
                "remove it, or name it in the origin of a ReadThrough, WriteThrough or WriteBehind rule",
            );
        }
    }
}

/// Whether a URL has a password: `scheme://user:password@host`.
fn holds_password(url: &str) -> bool {
    let authority = url.split_once("://").map(|(_, rest)| rest.split(['/', '?', '#']).next().unwrap_or_default());
    let user = authority.and_then(|authority| authority.rsplit_once('@')).map(|(user, _)| user);
    user.and_then(|user| user.split_once(':')).is_some_and(|(_, password)| !password.is_empty())
}

fn lint_keys(linter: &mut Linter, path: &FieldPath, rule: &RuleSpec) {
    let Ok(keys) = rule.keys.parse::<KeyPattern>() else {
        return;
    };
    if rule.strategy != StrategyKind::Bypass && covers_everything(&keys) {
        linter.warn(
            "covers-everything",
            path.key("keys"),
            format!("`{keys}` covers almost every key"),
            "queues, locks and sessions that share the cache get a TTL as well, and are lost when it ends",
            "write one rule for each family of keys, such as user:{id}",
        );
    }
    if let Some(word) = query_word(&keys) {
        linter.warn(
            "query-key",
            path.key("keys"),
            format!("`{word}` in `{keys}` looks like a query's text, or its hash"),
            "nobody can tell which of such keys a change of the data touches, so they cannot be invalidated, only waited out",
            "name the entity that the data is about, such as order:{id} or orders-of-customer:{customer}",
        );
    }
}

fn covers_everything(keys: &KeyPattern) -> bool {
    ["{a}", "{a}:{b}", "{a}:{b}:{c}"].iter().any(|all| all.parse::<KeyPattern>().is_ok_and(|all| keys.covers_all_of(&all)))
}

fn query_word(keys: &KeyPattern) -> Option<String> {
    let words = keys.as_str().split(|letter: char| !letter.is_ascii_alphanumeric()).map(str::to_ascii_lowercase);
    words.into_iter().find(|word| QUERY_WORDS.contains(&word.as_str()))
}

fn lint_loads(linter: &mut Linter, path: &FieldPath, rule: &RuleSpec, defaults: &Defaults) {
    if let Some(stampede) = &rule.stampede {
        lint_wait(linter, &path.key("stampede"), stampede);
    }
    match rule.strategy {
        StrategyKind::Bypass => {}
        StrategyKind::CacheAside => {
            if rule.stampede.as_ref().is_some_and(|stampede| stampede.mode == Some(StampedeMode::Disabled)) {
                linter.warn(
                    "no-stampede-protection",
                    path.key("stampede").key("mode"),
                    format!("every client that misses a key of `{}` loads it", rule.name),
                    "when a popular key expires, all its readers ask the database at once",
                    "write Lease, or remove stampede",
                );
            }
        }
        StrategyKind::ReadThrough | StrategyKind::WriteThrough | StrategyKind::WriteBehind => {
            let wait = rule.stampede.as_ref().and_then(|stampede| stampede.wait);
            if wait.is_some_and(|wait| wait.is_zero()) {
                linter.warn(
                    "no-stampede-protection",
                    path.key("stampede").key("wait"),
                    "no sidecar waits for another's load",
                    "when a popular key expires, each sidecar asks the origin at once",
                    "remove wait: then they wait for as long as a load may take",
                );
            }
            if rule.negative_ttl.unwrap_or(DEFAULT_NEGATIVE_TTL).is_zero() {
                linter.warn(
                    "no-negative-ttl",
                    path.key("negativeTtl"),
                    "keys that the origin does not have are never remembered",
                    "each read of such a key asks the origin again, which anyone can do on purpose",
                    "write 10s, or remove negativeTtl",
                );
            }
            let ttl = rule.ttl.or(defaults.ttl).unwrap_or(DEFAULT_TTL);
            if ttl < Span::from_secs(1) {
                linter.warn(
                    "short-ttl",
                    path.key("ttl"),
                    format!("a value lives for {ttl}"),
                    "most reads load it again",
                    "write seconds or minutes",
                );
            }
        }
    }
}

fn lint_wait(linter: &mut Linter, path: &FieldPath, stampede: &Stampede) {
    if let Some(wait) = stampede.wait.filter(|wait| *wait > LONG_WAIT) {
        linter.warn(
            "long-wait",
            path.key("wait"),
            format!("a read may wait for {wait}"),
            "many clients give up after 3s and ask again, on another connection and for another load",
            "write at most 2s",
        );
    }
}

/// Rules that can never take effect, because an earlier one covers all their keys.
fn lint_shadows(linter: &mut Linter, spec: &CachePolicySpec) {
    let patterns: Vec<Option<KeyPattern>> = spec.rules.iter().map(|rule| rule.keys.parse().ok()).collect();
    for (later, (rule, keys)) in spec.rules.iter().zip(&patterns).enumerate() {
        let Some(keys) = keys else { continue };
        let covering = spec.rules.iter().zip(&patterns).take(later);
        let shadow =
            covering.into_iter().find(|(_, earlier)| earlier.as_ref().is_some_and(|earlier| earlier.covers_all_of(keys)));
        if let Some((earlier, _)) = shadow {
            linter.warn(
                "shadowed",
                at!("spec", "rules", later, "keys"),
                format!("the rule `{}` never takes effect", rule.name),
                format!("the earlier rule `{}` ({}) covers all its keys, and the first match wins", earlier.name, earlier.keys),
                format!("move it before `{}`, or remove it", earlier.name),
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn passwords_in_urls_are_seen() {
        assert!(holds_password("postgres://u:secret@h/d"));
        assert!(!holds_password("postgres://u@h/d"));
        assert!(!holds_password("postgres://h/d?x=a:b@c"));
        assert!(!holds_password("sqlite://shop.db"));
    }

    #[test]
    fn query_words_are_whole_words() {
        let found = |text: &str| query_word(&text.parse().expect("a pattern"));
        assert_eq!(found("sql:{hash}").as_deref(), Some("sql"));
        assert_eq!(found("page:{md5}").as_deref(), Some("md5"));
        assert_eq!(found("hashtag:{tag}"), None);
    }

    #[test]
    fn patterns_for_everything_are_seen() {
        let everything = |text: &str| covers_everything(&text.parse().expect("a pattern"));
        assert!(everything("{key…}") && everything("{key}") && everything("{a}:{b}"));
        assert!(!everything("user:{id…}") && !everything("{tenant}:user:{id}"));
    }
}
