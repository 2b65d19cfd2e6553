//! What a snapshot says of one key, for people: told by a sidecar of what is in force there, and by `larder explain` of manifests.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::changes::{Follow, Touches};
use super::pattern::KeyPattern;
use super::rule::{
    AtWaitEnd, Journal, Lifetime, Mode, Query, ReadThrough, ReplyForm, Rule, Stampede, Store, Strategy, Unmatched,
};
use super::snapshot::{OriginKind, Snapshot};
use super::tags;
use super::units::{Beta, Span};

/// What a snapshot says of one key. It holds nothing secret: of an origin, what it is asked, not where it is.
///
/// Fields may be missing in what an older sidecar tells, and be more in what a newer one does.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct KeyFacts {
    /// The key; bytes that are no text are replaced.
    pub key: String,
    /// The CacheCluster.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cluster: Option<String>,
    /// The snapshot's generation.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub generation: Option<u64>,
    /// The rule that decides. `None`: no rule covers the key.
    #[serde(default)]
    pub rule: Option<String>,
    /// Its pattern.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pattern: Option<KeyPattern>,
    /// The named parts of the key.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub parts: BTreeMap<String, String>,
    /// The key's tags.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub tags: Vec<String>,
    /// The tables that its rule follows, each with what a changed row of it is about.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub follows: Vec<String>,
    /// The rule's strategy, or what becomes of keys that no rule covers, as it is written in a CachePolicy.
    pub strategy: String,
    /// Whether the rule takes effect.
    #[serde(default)]
    pub mode: Mode,
    /// How long the key lives.
    #[serde(default)]
    pub ttl: Option<Lifetime>,
    /// How long past its TTL a value may be served.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stale: Option<Span>,
    /// How long a key that the origin does not know is remembered as missing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub negative_ttl: Option<Span>,
    /// How long one load may take before another may begin.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lease: Option<Span>,
    /// How long a read waits for another's load.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub wait: Option<Span>,
    /// How eagerly values are loaded anew before they expire.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub early_expiry: Option<Beta>,
    /// What a read gets that has waited in vain.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub at_wait_end: Option<AtWaitEnd>,
    /// What is asked where the key is missing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub origin: Option<AskedOrigin>,
    /// What that origin is told where the key is written.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub store: Option<Store>,
    /// Where writes are until then.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub journal: Option<Journal>,
    /// Why that rule decides.
    pub why: String,
}

/// What an origin is asked.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct AskedOrigin {
    /// Its name.
    pub name: String,
    /// `sql` or `http`.
    pub kind: String,
    /// The statement or the path as it is written, in which parts of the key stand by their names.
    pub query: Query,
    /// How long one load may take.
    pub timeout: Span,
    /// The most loads under way at once from one sidecar.
    pub max_connections: u32,
    /// How the answer becomes the key's value, where that is said.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reply: Option<ReplyForm>,
}

/// What `snapshot` says of a key that its rule at `position` decides over. `None`: no rule covers it.
pub fn explain(snapshot: &Snapshot, position: Option<usize>, key: &[u8]) -> KeyFacts {
    let found = position.and_then(|at| Some((at, snapshot.rules.get(at)?)));
    let facts = match found {
        Some((at, rule)) => covered(snapshot, at, rule, key),
        None => uncovered(snapshot, key),
    };
    KeyFacts { cluster: Some(snapshot.cluster.name.clone()), generation: Some(snapshot.generation), ..facts }
}

fn uncovered(snapshot: &Snapshot, key: &[u8]) -> KeyFacts {
    let ttl = match &snapshot.unmatched {
        Unmatched::Ttl(lifetime) => Some(*lifetime),
        Unmatched::Bypass {} | Unmatched::Refuse {} => None,
    };
    let why = "no rule covers the key: `unmatched` decides".to_owned();
    KeyFacts { ttl, ..bare(key, snapshot.unmatched.name(), why) }
}

fn bare(key: &[u8], strategy: &str, why: String) -> KeyFacts {
    KeyFacts {
        key: shown(key),
        cluster: None,
        generation: None,
        rule: None,
        pattern: None,
        parts: BTreeMap::new(),
        tags: Vec::new(),
        follows: Vec::new(),
        strategy: strategy.to_owned(),
        mode: Mode::Enforce,
        ttl: None,
        stale: None,
        negative_ttl: None,
        lease: None,
        wait: None,
        early_expiry: None,
        at_wait_end: None,
        origin: None,
        store: None,
        journal: None,
        why,
    }
}

fn covered(snapshot: &Snapshot, at: usize, rule: &Rule, key: &[u8]) -> KeyFacts {
    let parts = rule.keys.captures(key).map(|found| {
        let texts = found.into_iter().map(|range| shown(key.get(range).unwrap_or_default()));
        rule.keys.parts().map(str::to_owned).zip(texts).collect()
    });
    let why = format!(
        "the first rule whose pattern covers the key is `{}`, number {} of {}",
        rule.name,
        at.saturating_add(1),
        snapshot.rules.len()
    );
    let facts = KeyFacts {
        rule: Some(rule.name.clone()),
        pattern: Some(rule.keys.clone()),
        parts: parts.unwrap_or_default(),
        tags: tags::of(rule, key).iter().map(|tag| shown(tag)).collect(),
        follows: follows(snapshot, rule),
        mode: rule.mode,
        ttl: rule.lifetime().copied(),
        ..bare(key, rule.strategy.name(), why)
    };
    match &rule.strategy {
        Strategy::Bypass {} => facts,
        Strategy::CacheAside(cache_aside) => with_stampede(
            KeyFacts { stale: Some(cache_aside.stale).filter(|stale| !stale.is_zero()), ..facts },
            cache_aside.stampede.as_ref(),
        ),
        Strategy::ReadThrough(read_through) => with_load(facts, snapshot, read_through),
        Strategy::WriteThrough(write_through) => {
            KeyFacts { store: Some(write_through.store.clone()), ..with_load(facts, snapshot, &write_through.read) }
        }
        Strategy::WriteBehind(write_behind) => KeyFacts {
            store: Some(write_behind.store.clone()),
            journal: Some(write_behind.journal.clone()),
            ..with_load(facts, snapshot, &write_behind.read)
        },
    }
}

/// What changed rows of the tables that a rule follows are about.
fn follows(snapshot: &Snapshot, rule: &Rule) -> Vec<String> {
    let follows = snapshot.feeds.iter().flat_map(|feed| feed.follows.iter().map(move |follow| (&feed.origin, follow)));
    let said = |(origin, follow): (&String, &Follow)| {
        let Follow { table, touches, .. } = follow;
        let columns = || format!("its columns {}", follow.columns(&rule.keys).join(", "));
        let about = match touches {
            Touches::All {} => "all keys of the rule".to_owned(),
            Touches::Key { .. } => format!("the key by {}", columns()),
            Touches::Tag { tag, .. } if tag.parts().next().is_none() => format!("the tag {tag}"),
            Touches::Tag { tag, .. } => format!("the tag {tag} by {}", columns()),
        };
        format!("{table} of {origin}: {about}")
    };
    follows.filter(|(_, follow)| follow.rule == rule.name).map(said).collect()
}

fn with_stampede(facts: KeyFacts, stampede: Option<&Stampede>) -> KeyFacts {
    let Some(Stampede { lease, wait, wait_follows_loads: _, early_expiry, at_wait_end }) = stampede else { return facts };
    KeyFacts { lease: Some(*lease), wait: Some(*wait), early_expiry: *early_expiry, at_wait_end: Some(*at_wait_end), ..facts }
}

fn with_load(facts: KeyFacts, snapshot: &Snapshot, read_through: &ReadThrough) -> KeyFacts {
    let ReadThrough { ttl: _, stale, negative_ttl, lease, wait, load } = read_through;
    let origin = snapshot.origins.iter().find(|origin| origin.name == load.origin).map(|origin| AskedOrigin {
        name: origin.name.clone(),
        kind: match origin.kind {
            OriginKind::Sql { .. } => "sql".to_owned(),
            OriginKind::Http { .. } => "http".to_owned(),
        },
        query: load.query.clone(),
        timeout: origin.timeout,
        max_connections: origin.max_connections,
        reply: load.reply,
    });
    KeyFacts {
        stale: Some(*stale).filter(|stale| !stale.is_zero()),
        negative_ttl: Some(*negative_ttl).filter(|span| !span.is_zero()),
        lease: Some(*lease),
        wait: Some(*wait),
        origin,
        ..facts
    }
}

fn shown(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::RuleIndex;

    const SNAPSHOT: &str = r#"{"version":3,"requires":2,"generation":7,
        "cluster":{"name":"main","topology":{"cluster":{"seeds":["127.0.0.1:7000"]}}},
        "unmatched":{"ttl":{"default":"5m","max":"1h","jitter":"10%"}},
        "origins":[{"name":"db","kind":{"sql":{"url":{"value":"postgres://u:hush@h/d"}}},"maxConnections":2,"connectTimeout":"1s","timeout":"2s"}],
        "rules":[
            {"name":"user","keys":"user:{id}","strategy":{"readThrough":{"ttl":{"default":"10m","max":"24h","jitter":"10%"},"stale":"1m",
                "negativeTtl":"10s","lease":"3s","wait":"2500ms",
                "load":{"origin":"db","query":{"sql":{"read":"SELECT name FROM users WHERE id = $id"}},"reply":null}}}},
            {"name":"page","keys":"page:{id…}","mode":"observe","strategy":{"cacheAside":{"ttl":{"default":"1m","max":"1h","jitter":"0%"},
                "stampede":{"lease":"3s","wait":"1s","earlyExpiry":1.0,"atWaitEnd":"miss"}}}},
            {"name":"queue","keys":"queue:{id}","strategy":{"bypass":{}}}]}"#;

    fn facts(key: &str) -> KeyFacts {
        let snapshot = Snapshot::parse(SNAPSHOT.as_bytes()).expect("a snapshot");
        let position = RuleIndex::new(snapshot.patterns().cloned()).find(key.as_bytes());
        explain(&snapshot, position, key.as_bytes())
    }

    fn span(text: &str) -> Option<Span> {
        Some(text.parse().expect("a span"))
    }

    #[test]
    fn a_rule_that_loads_tells_what_it_asks_and_not_where() {
        let user = facts("user:42");
        assert_eq!((user.rule.as_deref(), user.strategy.as_str(), user.generation), (Some("user"), "ReadThrough", Some(7)));
        assert_eq!(user.parts, BTreeMap::from([("id".to_owned(), "42".to_owned())]));
        assert_eq!((user.stale, user.negative_ttl, user.lease, user.wait), (span("1m"), span("10s"), span("3s"), span("2500ms")));
        assert!(user.why.contains("number 1 of 3"), "{}", user.why);
        let json = serde_json::to_string(&user).expect("JSON");
        assert!(json.contains("WHERE id = $id") && !json.contains("hush") && !json.contains("postgres"), "{json}");
        assert_eq!(serde_json::from_str::<KeyFacts>(&json).expect("reads back"), user);
    }

    #[test]
    fn each_strategy_says_what_it_has() {
        let page = facts("page:a:b");
        assert_eq!((page.mode, page.strategy.as_str(), page.at_wait_end), (Mode::Observe, "CacheAside", Some(AtWaitEnd::Miss)));
        assert_eq!((page.lease, page.wait, page.stale, &page.origin), (span("3s"), span("1s"), None, &None));
        let queue = facts("queue:1");
        assert_eq!((queue.strategy.as_str(), queue.ttl, queue.lease), ("Bypass", None, None));
        let other = facts("other");
        assert_eq!((&other.rule, other.strategy.as_str(), other.pattern), (&None, "Ttl", None));
        assert_eq!(other.ttl.map(|ttl| ttl.default), span("5m"));
    }

    #[test]
    fn what_a_changed_row_is_about_is_said() {
        let follow = |table: &str, touches: &str| format!(r#"{{"rule":"user","table":"{table}","touches":{touches}}}"#);
        let follows = [
            follow("users", r#"{"key":{}}"#),
            follow("shop.addresses", r#"{"tag":{"tag":"city:{id}","columns":{"id":"city_id"}}}"#),
            follow("prices", r#"{"tag":{"tag":"prices"}}"#),
            follow("rates", r#"{"all":{}}"#),
        ];
        let feed = format!(r#"{{"origin":"db","slot":"a","publication":"a","maxLag":"1Gi","follows":[{}]}}"#, follows.join(","));
        let json = SNAPSHOT.replacen(r#""rules""#, &format!(r#""feeds":[{feed}],"rules""#), 1);
        let json = json.replacen(r#""strategy""#, r#""tags":["city:{id}","prices"],"strategy""#, 1);
        let snapshot = Snapshot::parse(json.as_bytes()).expect("a snapshot");
        let told = [
            "users of db: the key by its columns id",
            "shop.addresses of db: the tag city:{id} by its columns city_id",
            "prices of db: the tag prices",
            "rates of db: all keys of the rule",
        ];
        assert_eq!(
            (explain(&snapshot, Some(0), b"user:42").follows, explain(&snapshot, Some(2), b"queue:1").follows),
            (told.map(str::to_owned).to_vec(), vec![])
        );
    }

    #[test]
    fn what_an_older_sidecar_tells_is_understood() {
        let told = r#"{"key":"a","rule":null,"strategy":"Bypass","ttl":null,"why":"no rule covers the key","more":1}"#;
        let facts: KeyFacts = serde_json::from_str(told).expect("facts");
        assert_eq!((facts.rule, facts.generation, facts.mode), (None, None, Mode::Enforce));
    }
}
