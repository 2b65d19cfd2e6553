//! What is said of a key to people.

use std::fmt::Write as _;

use super::Explained;
use crate::cli::output::{Paint, harmless};
use crate::policy::explain::{AskedOrigin, KeyFacts};
use crate::policy::{AtWaitEnd, Journal, Lifetime, Mode, Overflow, Query, ReplyForm, RowVersion, Store};

/// The facts, line by line, and what follows from them.
pub fn text(explained: &Explained, paint: &Paint) -> String {
    let Explained { workload, namespace, source, policy, facts, notes } = explained;
    let mut lines = vec![
        ("key", facts.key.clone()),
        ("workload", format!("{workload}, namespace {namespace}")),
        ("source", source.to_string()),
        ("policy", policy.clone().unwrap_or_else(|| "-".to_owned())),
        ("rule", rule(facts)),
        ("why", facts.why.clone()),
        ("strategy", format!("{}{}", facts.strategy, if facts.mode == Mode::Observe { ", mode Observe" } else { "" })),
    ];
    lines.extend((!facts.tags.is_empty()).then(|| ("tags", facts.tags.join(", "))));
    lines.extend(facts.follows.iter().map(|table| ("follows", table.clone())));
    lines.extend(facts.ttl.as_ref().map(|ttl| ("ttl", lifetime(ttl))));
    let spans = [("stale", facts.stale), ("negative", facts.negative_ttl), ("lease", facts.lease), ("wait", facts.wait)];
    lines.extend(spans.into_iter().filter_map(|(name, span)| Some((name, span?.to_string()))));
    lines.extend(facts.origin.as_ref().map(|origin| ("origin", asked(origin))));
    let mut text = String::new();
    // Writing to a text cannot fail.
    for (name, line) in lines {
        let _ = writeln!(text, "{}{name:<10}{}{}", paint.head, paint.plain, harmless(&line));
    }
    let _ = writeln!(text, "\n{}what the sidecar does{}", paint.head, paint.plain);
    for line in does(facts) {
        let _ = writeln!(text, "  - {}", harmless(&line));
    }
    for note in notes {
        let _ = writeln!(text, "\n{}note:{} {}", paint.busy, paint.plain, harmless(note));
    }
    text
}

fn rule(facts: &KeyFacts) -> String {
    let Some(rule) = &facts.rule else { return "none".to_owned() };
    let mut text = rule.clone();
    if let Some(pattern) = &facts.pattern {
        let _ = write!(text, ": {pattern}");
    }
    let parts: Vec<String> = facts.parts.iter().map(|(name, value)| format!("{name} = {value}")).collect();
    if !parts.is_empty() {
        let _ = write!(text, ", where {}", parts.join(", "));
    }
    text
}

fn lifetime(ttl: &Lifetime) -> String {
    format!("{}, shortened by up to {}; at most {}", ttl.default, ttl.jitter, ttl.max)
}

fn asked(origin: &AskedOrigin) -> String {
    let AskedOrigin { name, kind, query, timeout, max_connections, reply: _ } = origin;
    let question = match query {
        Query::Sql { read, read_many: None } => read.clone(),
        Query::Sql { read, read_many: Some(many) } => format!("{read}; for MGET: {many}"),
        Query::Http { path } => format!("GET {path}"),
    };
    format!("{name} ({kind}, within {timeout}, at most {max_connections} at a time): {question}")
}

/// What becomes of commands on the key, in sentences.
pub fn does(facts: &KeyFacts) -> Vec<String> {
    let mut told = match (facts.rule.is_some(), facts.strategy.as_str()) {
        (false, "Refuse") => vec!["commands that name the key are refused".to_owned()],
        (false, "Ttl") => vec!["reads and deletions pass untouched".to_owned()],
        (_, "Bypass") => vec!["every command passes untouched, and is counted".to_owned()],
        (true, "CacheAside") => cache_aside(facts),
        (true, "ReadThrough") => read_through(facts),
        (true, "WriteThrough") => write_through(facts),
        (true, "WriteBehind") => write_behind(facts),
        (_, other) => vec![format!("{other}: this version of larder does not know more of it")],
    };
    if let Some(Lifetime { default, max, .. }) = &facts.ttl {
        told.push(format!("what is written without a TTL gets {default}; a TTL above {max} is cut to that"));
    }
    if facts.mode == Mode::Observe {
        told.insert(0, "nothing yet: the rule only observes, and /metrics counts what it would do; in mode Enforce:".to_owned());
    }
    told
}

fn cache_aside(facts: &KeyFacts) -> Vec<String> {
    let mut told = vec!["a read is answered from the cache; on a miss the application loads, and stores".to_owned()];
    told.push(match (facts.lease, facts.wait) {
        (Some(lease), Some(wait)) => {
            let end = match facts.at_wait_end {
                Some(AtWaitEnd::Error) => "an error that says to try again",
                _ => "the miss",
            };
            format!("of all who miss it one is told so and may load for {lease}; the others wait up to {wait}, then get {end}")
        }
        _ => "everybody who misses it loads: the rule has no stampede protection".to_owned(),
    });
    if let Some(stale) = facts.stale {
        told.push(format!("up to {stale} past its TTL the old value is served while one loads"));
    }
    if facts.early_expiry.is_some_and(|beta| beta.get() > 0.0) {
        told.push("a key that is read often is loaded anew by one client shortly before it expires".to_owned());
    }
    told
}

/// Whether the key's value is a hash.
fn is_hash(facts: &KeyFacts) -> bool {
    facts.origin.as_ref().is_some_and(|origin| origin.reply == Some(ReplyForm::Hash))
}

fn read_through(facts: &KeyFacts) -> Vec<String> {
    let origin = facts.origin.as_ref().map_or("its origin", |origin| origin.name.as_str());
    let mut told =
        vec![format!("a read is answered from the cache; a miss is loaded from `{origin}` by the sidecar, once for all who ask")];
    if is_hash(facts) {
        told.push(
            "the value is a hash, with a field for each column that is not NULL: HGET, HMGET, HGETALL, HEXISTS, HLEN, HKEYS, HVALS and HSTRLEN load it"
                .to_owned(),
        );
    }
    if let Some(negative) = facts.negative_ttl {
        told.push(format!("that `{origin}` has no such key is remembered for {negative}"));
    }
    if let Some(stale) = facts.stale {
        told.push(format!("up to {stale} past its TTL the old value is served where `{origin}` fails"));
    }
    if let Some(wait) = facts.wait {
        told.push(format!("a read waits up to {wait} for a load that another pod makes, then loads by itself"));
    }
    told
}

fn write_behind(facts: &KeyFacts) -> Vec<String> {
    let origin = facts.origin.as_ref().map_or("its origin", |origin| origin.name.as_str());
    let mut told = read_through(facts);
    told.push(format!(
        "SET, SETEX, PSETEX, MSET, DEL and UNLINK are journalled, and acknowledged when the journal is on disk here and at every replica \
         that may take over; a relay carries them to `{origin}`, and reads see them meanwhile. Commands that change a part of a value are refused"
    ));
    if let Some(Journal { name, max_lag, max_depth, max_bytes, batch, overflow }) = &facts.journal {
        told.push(format!(
            "the journal `{name}` has no room for writes while one of its sixteen partitions holds one older than {max_lag}, or a sixteenth of \
             {max_depth} writes or {max_bytes}; up to {batch} are carried in one transaction"
        ));
        told.push(match overflow {
            Overflow::Reject => "a write for which there is no room is refused".to_owned(),
            Overflow::WriteThrough => format!(
                "a write for which there is no room is told to `{origin}` before it is acknowledged, unless an earlier one of the key still waits"
            ),
        });
    }
    match &facts.store {
        Some(Store::Sql { write, delete, version: _, increment: _ }) => {
            told.push(format!("the last value of each key is written by: {write}"));
            told.push(match delete {
                Some(delete) => format!("DEL and UNLINK answer how many keys they name, and the rows go by: {delete}"),
                None => "DEL and UNLINK are refused: the rule has no origin.delete".to_owned(),
            });
        }
        Some(Store::Http { .. }) => told.push("a value is written by PUT of that path, DEL and UNLINK send DELETE".to_owned()),
        None => {}
    }
    told
}

fn write_through(facts: &KeyFacts) -> Vec<String> {
    let origin = facts.origin.as_ref().map_or("its origin", |origin| origin.name.as_str());
    let mut told = read_through(facts);
    let commands = if is_hash(facts) { "HSET and HMSET of all fields" } else { "SET, SETEX, PSETEX and MSET" };
    told.push(format!(
        "{commands} are carried to `{origin}` first, and acknowledged when it has them; commands that change a part of a value are refused"
    ));
    match &facts.store {
        Some(Store::Sql { write, delete, version, increment }) => {
            told.push(format!("a value is written by: {write}"));
            told.push(match delete {
                Some(delete) => format!("DEL and UNLINK answer how many rows this changed: {delete}"),
                None => "DEL and UNLINK are refused: the rule has no origin.delete".to_owned(),
            });
            if let Some(increment) = increment {
                told.push(format!("INCR, INCRBY, DECR and DECRBY answer the number that this returns: {increment}"));
            }
            told.push(match version {
                Some(RowVersion::Column(version)) => {
                    format!("of writes that overlap, the cache keeps the one with the greatest `{version}`")
                }
                Some(RowVersion::Kept {}) => {
                    "of writes that overlap, the cache keeps the one that was committed last, by a version that Larder counts in \
                     the table larder_versions"
                        .to_owned()
                }
                None => "of writes that overlap, the cache keeps none: the next read loads".to_owned(),
            });
        }
        Some(Store::Http { if_match }) => {
            told.push("a value is written by PUT of that path, DEL and UNLINK send DELETE".to_owned());
            if *if_match {
                told.push("each on condition that the origin still has what was last seen of it (If-Match)".to_owned());
            }
        }
        None => {}
    }
    told
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::cli::explain::Source;

    fn explained(facts: serde_json::Value) -> Explained {
        Explained {
            workload: "Deployment shop".to_owned(),
            namespace: "shop".to_owned(),
            source: Source::Sidecar {
                pod: "shop-1".to_owned(),
                binding: Some("shop-1f0c".to_owned()),
                way: Some("cache".to_owned()),
                generation: Some(7),
            },
            policy: Some("catalog".to_owned()),
            facts: serde_json::from_value(facts).expect("facts"),
            notes: vec!["mind\nthis".to_owned()],
        }
    }

    #[test]
    fn everything_that_decides_is_shown() {
        let shown = text(
            &explained(json!({
                "key": "user:42", "rule": "user", "pattern": "user:{id}", "parts": {"id": "42"}, "tags": ["user:42", "users"], "follows": ["users of db: the key by its columns id"], "strategy": "ReadThrough",
                "ttl": {"default": "10m", "max": "24h", "jitter": "10%"}, "stale": "1m", "negativeTtl": "10s", "lease": "3s", "wait": "2s",
                "origin": {"name": "db", "kind": "sql", "query": {"sql": {"read": "SELECT name FROM users WHERE id = $id"}},
                    "timeout": "2s", "maxConnections": 4},
                "why": "the first",
            })),
            &Paint::NONE,
        );
        let expected = "\
key       user:42
workload  Deployment shop, namespace shop
source    the sidecar of pod shop-1: binding shop-1f0c, generation 7, which came by cache
policy    catalog
rule      user: user:{id}, where id = 42
why       the first
strategy  ReadThrough
tags      user:42, users
follows   users of db: the key by its columns id
ttl       10m, shortened by up to 10%; at most 24h
stale     1m
negative  10s
lease     3s
wait      2s
origin    db (sql, within 2s, at most 4 at a time): SELECT name FROM users WHERE id = $id

what the sidecar does
  - a read is answered from the cache; a miss is loaded from `db` by the sidecar, once for all who ask
  - that `db` has no such key is remembered for 10s
  - up to 1m past its TTL the old value is served where `db` fails
  - a read waits up to 2s for a load that another pod makes, then loads by itself
  - what is written without a TTL gets 10m; a TTL above 24h is cut to that

note: mind this
";
        assert_eq!(shown, expected, "{shown}");
    }

    #[track_caller]
    fn says(facts: serde_json::Value, words: &[&str]) {
        let told = does(&serde_json::from_value(facts).expect("facts")).join("\n");
        for words in words {
            assert!(told.contains(words), "{words} in {told}");
        }
    }

    #[test]
    fn each_strategy_has_its_own_words() {
        let ttl = json!({"default": "5m", "max": "1h", "jitter": "0%"});
        says(json!({"key": "a", "rule": null, "strategy": "Bypass", "why": ""}), &["passes untouched"]);
        says(json!({"key": "a", "rule": null, "strategy": "Refuse", "why": ""}), &["are refused"]);
        says(json!({"key": "a", "rule": null, "strategy": "Ttl", "ttl": ttl, "why": ""}), &["gets 5m", "cut to that"]);
        says(json!({"key": "a", "rule": "r", "strategy": "CacheAside", "ttl": ttl, "why": ""}), &["no stampede protection"]);
        says(
            json!({"key": "a", "rule": "r", "strategy": "CacheAside", "mode": "observe", "ttl": ttl, "lease": "3s", "wait": "1s",
                "atWaitEnd": "error", "stale": "1m", "earlyExpiry": 1.0, "why": ""}),
            &["nothing yet: the rule only observes", "may load for 3s", "wait up to 1s, then get an error", "before it expires"],
        );
        says(json!({"key": "a", "rule": "r", "strategy": "WriteAround", "why": ""}), &["does not know more of it"]);
        says(json!({"key": "a", "rule": "r", "strategy": "WriteBehind", "why": ""}), &["are journalled", "a relay carries them"]);
        let store = json!({"sql": {"write": "INSERT INTO t VALUES ($id, $value)", "delete": "DELETE FROM t WHERE id = $id"}});
        let raising = json!({"sql": {"write": "INSERT …", "increment": "UPDATE t SET n = n + $by WHERE id = $id RETURNING n"}});
        says(
            json!({"key": "a:1", "rule": "a", "strategy": "WriteThrough", "store": raising, "why": ""}),
            &["DECRBY answer the number that this returns: UPDATE t"],
        );
        let kept = json!({"sql": {"write": "INSERT …", "version": {"kept": {}}}});
        says(
            json!({"key": "a:1", "rule": "a", "strategy": "WriteThrough", "store": kept, "why": ""}),
            &["committed last", "larder_versions"],
        );
        let journal = json!({"name": "shop.p.db", "maxLag": "5m", "maxDepth": 4096, "maxBytes": "64Mi", "batch": 100});
        says(
            json!({"key": "a:1", "rule": "a", "strategy": "WriteBehind", "store": store, "journal": journal, "why": ""}),
            &["`shop.p.db` has no room", "older than 5m", "up to 100", "written by: INSERT", "rows go by: DELETE"],
        );
        says(
            json!({"key": "a:1", "rule": "a", "strategy": "WriteThrough", "store": store, "why": ""}),
            &[
                "SET, SETEX, PSETEX and MSET are carried to `its origin` first",
                "written by: INSERT",
                "rows this changed: DELETE",
                "the cache keeps none",
            ],
        );
        let db = json!({"name": "db", "kind": "sql", "query": {"sql": {"read": "SELECT name FROM users WHERE id = $id"}},
            "timeout": "2s", "maxConnections": 4, "reply": "Hash"});
        says(
            json!({"key": "a:1", "rule": "a", "strategy": "WriteThrough", "origin": db, "store": store, "why": ""}),
            &["a field for each column", "HSET and HMSET of all fields are carried to `db` first"],
        );
    }
}
