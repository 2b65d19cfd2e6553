//! What a command on keys that are written through asks for. Pure.

use std::borrow::Cow;

use super::super::content::Form;
use super::hash;
use crate::policy::Lifetime;
use crate::sidecar::commands::{Access, CommandSpec, Effect, Ttl, parse_i64};
use crate::sidecar::engine::ttl::changes;
use crate::sidecar::policy::{ActivePolicy, RuleId};
use crate::sidecar::resp::CommandArgs;

/// The most keys of one MSET, DEL or UNLINK.
pub const MOST_KEYS: usize = 256;
/// The most bytes of the values of one command.
pub const MOST_BYTES: usize = 1024 * 1024;

/// What a command asks for.
#[derive(Debug, PartialEq, Eq)]
pub enum Wish {
    /// Nothing that concerns an origin.
    Nothing,
    /// What cannot be carried to an origin, or is no command: the error reply's text.
    Refused(Cow<'static, str>),
    /// Values, or deletions, of keys of one rule.
    Carry(Order),
}

/// What is carried to the origin.
#[derive(Debug, PartialEq, Eq)]
pub struct Order {
    /// The rule of all keys.
    pub rule: RuleId,
    /// Each key once, with its value, which is as an origin is told it. `None`: it is deleted.
    pub keys: Vec<(Vec<u8>, Option<Vec<u8>>)>,
    /// How long the cache keeps the values.
    pub life: Life,
    /// In which form values are.
    pub form: Form,
    /// What answers values that are stored.
    pub answer: Answer,
    /// By how much the number under the key, of which there is one then, is raised: what comes of it is the value, and the answer.
    pub raise: Option<i64>,
}

impl Order {
    fn of_texts(rule: RuleId, keys: Vec<(Vec<u8>, Option<Vec<u8>>)>, life: Life) -> Self {
        Self { rule, keys, life, form: Form::Text, answer: Answer::Ok, raise: None }
    }
}

/// What answers values that are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Answer {
    /// `OK`.
    Ok,
    /// A number.
    Number(i64),
}

/// How long a value is kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Life {
    /// For the rule's default.
    Default,
    /// For so many milliseconds.
    Within(u64),
    /// Until a moment, in milliseconds since 1970 by the server's clock.
    Until(u64),
}

impl Life {
    /// Milliseconds, and whether they count since 1970. `random` shortens defaults.
    pub fn resolve(self, lifetime: &Lifetime, random: u32) -> (u64, bool) {
        match self {
            Self::Default => (lifetime.jittered(random).as_millis(), false),
            Self::Within(millis) => (millis.min(lifetime.max.as_millis()), false),
            Self::Until(moment) => (moment, true),
        }
    }
}

const NOT_AN_INTEGER: &str = "ERR value is not an integer or out of range";
const SYNTAX: &str = "ERR syntax error";

/// What a command asks for.
pub fn of(policy: &ActivePolicy, spec: &CommandSpec, args: &CommandArgs<'_>) -> Wish {
    let Some(covered) = first_written(policy, spec, args) else {
        return hash::refusal_of_parts(policy, spec, args).map_or(Wish::Nothing, |text| Wish::Refused(text.into()));
    };
    match spec.name {
        name if !is_carried(policy, covered, name) => Wish::Refused(refusal(policy, spec, covered).into()),
        "set" => single(policy, covered, args, 2, || set_life(args)),
        "setex" => single(policy, covered, args, 3, || given_life(args.get(2), 1000, "setex")),
        "psetex" => single(policy, covered, args, 3, || given_life(args.get(2), 1, "psetex")),
        "incr" | "incrby" | "decr" | "decrby" => match (args.get(1), raise(spec.name, args.get(2))) {
            (Some(key), Ok(by)) => {
                let order = Order::of_texts(covered, vec![(key.to_vec(), None)], Life::Default);
                bounded(policy, Order { raise: Some(by), ..order })
            }
            (_, Err(text)) => Wish::Refused(text.into()),
            (None, _) => Wish::Refused(SYNTAX.into()),
        },
        "hset" | "hmset" => match hash::order(policy, covered, spec.name, args) {
            Ok(order) => bounded(policy, order),
            Err(text) => Wish::Refused(text.into()),
        },
        _ => many(policy, covered, spec.name == "mset", args),
    }
}

/// Whether the command of this name on keys of the rule can be carried to its origin.
fn is_carried(policy: &ActivePolicy, rule: RuleId, name: &str) -> bool {
    match name {
        "del" | "unlink" => true,
        "set" | "setex" | "psetex" | "mset" => !policy.loads_hashes(rule),
        "hset" | "hmset" => policy.loads_hashes(rule),
        "incr" | "incrby" | "decr" | "decrby" => policy.writer(rule).is_some_and(|writer| writer.increments()),
        _ => false,
    }
}

/// Why a command cannot be carried out where it stands: within a transaction, say. `None`: it is none of an origin's business.
pub fn refusal_apart(policy: &ActivePolicy, spec: &CommandSpec, args: &CommandArgs<'_>, place: &str) -> Option<String> {
    let Some(rule) = first_written(policy, spec, args) else { return hash::refusal_of_parts(policy, spec, args) };
    Some(match is_carried(policy, rule, spec.name) {
        true => format!(
            "NOPERM {} of a key of the rule `{}` is carried to its origin, which {place} cannot wait for: send it by itself",
            spec.name.to_ascii_uppercase(),
            name_of(policy, rule)
        ),
        false => refusal(policy, spec, rule),
    })
}

/// The rule of the first key that the command changes, and that is written through.
fn first_written(policy: &ActivePolicy, spec: &CommandSpec, args: &CommandArgs<'_>) -> Option<RuleId> {
    // When a copy expires is the cache's own business.
    if spec.access != Access::Write || matches!(spec.ttl, Ttl::Expire(_) | Ttl::ExpireAt | Ttl::Persist | Ttl::GetEx) {
        return None;
    }
    let written = |key: &[u8]| Some(policy.find(key)).filter(|rule| policy.writes_through(*rule));
    if let Some(key) = spec.only_key(args) {
        return written(key);
    }
    let keys = spec.keys(args).ok()?;
    let mut keys = keys.iter().filter(|at| changes(at.effect) && at.effect != Effect::Route);
    keys.find_map(|at| written(args.get(at.index as usize)?))
}

/// What the rule is called.
pub fn name_of(policy: &ActivePolicy, rule: RuleId) -> &str {
    policy.rule(rule).map_or("", |rule| rule.name.as_str())
}

fn refusal(policy: &ActivePolicy, spec: &CommandSpec, rule: RuleId) -> String {
    let name = match spec.name {
        "" => "this command".to_owned(),
        name => name.replace('|', " ").to_ascii_uppercase(),
    };
    let carried = if policy.loads_hashes(rule) { "HSET and HMSET of all fields" } else { "SET, SETEX, PSETEX, MSET" };
    let advice = match spec.name {
        "incr" | "incrby" | "decr" | "decrby" if !policy.loads_hashes(rule) => {
            ", and so can this where the rule has origin.increment"
        }
        _ => "",
    };
    let rule = name_of(policy, rule);
    format!("NOPERM {name} of a key of the rule `{rule}` cannot be carried to its origin: {carried}, DEL and UNLINK can{advice}")
}

fn single(
    policy: &ActivePolicy,
    rule: RuleId,
    args: &CommandArgs<'_>,
    value_at: usize,
    life: impl Fn() -> Result<Life, Cow<'static, str>>,
) -> Wish {
    let (Some(key), Some(value)) = (args.get(1), args.get(value_at)) else { return Wish::Refused(SYNTAX.into()) };
    match life() {
        Ok(life) => bounded(policy, Order::of_texts(rule, vec![(key.to_vec(), Some(value.to_vec()))], life)),
        Err(text) => Wish::Refused(text),
    }
}

fn many(policy: &ActivePolicy, rule: RuleId, stores: bool, args: &CommandArgs<'_>) -> Wish {
    if stores && args.len().is_multiple_of(2) {
        return Wish::Refused("ERR wrong number of arguments for 'mset' command".into());
    }
    let mut keys: Vec<(Vec<u8>, Option<Vec<u8>>)> = Vec::new();
    for at in (1..args.len()).step_by(if stores { 2 } else { 1 }) {
        let Some(key) = args.get(at) else { break };
        if policy.find(key) != rule {
            let text = format!(
                "NOPERM the keys belong to several rules, and those of the rule `{}` are carried to its origin: send one command for each rule",
                name_of(policy, rule)
            );
            return Wish::Refused(text.into());
        }
        let value = if stores { args.get(at + 1).map(<[u8]>::to_vec) } else { None };
        // Of a key that is named twice the last value stays, and it is deleted once.
        keys.retain(|(known, _)| known != key);
        keys.push((key.to_vec(), value));
        if keys.len() > MOST_KEYS {
            return Wish::Refused(
                format!("ERR one command can carry at most {MOST_KEYS} keys to an origin: send several").into(),
            );
        }
    }
    bounded(policy, Order::of_texts(rule, keys, Life::Default))
}

/// An order that its rule's origin can take.
fn bounded(policy: &ActivePolicy, order: Order) -> Wish {
    let Some(writer) = policy.writer(order.rule) else { return Wish::Nothing };
    let name = || name_of(policy, order.rule);
    // What is journalled is told one after the other anyway.
    if order.keys.len() > 1 && !writer.is_transactional() && policy.journal(order.rule).is_none() {
        let text =
            format!("NOPERM the origin of the rule `{}` takes one change at a time: send one command for each key", name());
        return Wish::Refused(text.into());
    }
    if order.raise.is_none() && order.keys.iter().any(|(_, value)| value.is_none()) && !writer.deletes() {
        return Wish::Refused(
            format!("NOPERM the rule `{}` does not say how its origin deletes: write origin.delete", name()).into(),
        );
    }
    let bytes: usize = order.keys.iter().map(|(key, value)| key.len() + value.as_ref().map_or(0, Vec::len)).sum();
    if bytes > MOST_BYTES {
        return Wish::Refused(format!("ERR one command can carry at most {MOST_BYTES} bytes to an origin").into());
    }
    Wish::Carry(order)
}

/// By how much INCR and its kin raise a number. The error is a server's.
fn raise(name: &str, by: Option<&[u8]>) -> Result<i64, &'static str> {
    let by = by.map_or(Ok(1), |by| parse_i64(by).ok_or(NOT_AN_INTEGER))?;
    match name {
        "decr" | "decrby" => by.checked_neg().ok_or("ERR decrement would overflow"),
        _ => Ok(by),
    }
}

/// What SET's options say.
fn set_life(args: &CommandArgs<'_>) -> Result<Life, Cow<'static, str>> {
    let mut life = None;
    let mut options = args.iter().skip(3);
    while let Some(option) = options.next() {
        let word = option.to_ascii_uppercase();
        let said = match word.as_slice() {
            b"EX" => given_life(options.next(), 1000, "set")?,
            b"PX" => given_life(options.next(), 1, "set")?,
            b"EXAT" => moment(options.next(), 1000)?,
            b"PXAT" => moment(options.next(), 1)?,
            b"NX" | b"XX" | b"GET" | b"KEEPTTL" | b"IFEQ" | b"IFNE" | b"IFDEQ" | b"IFDNE" => {
                let word = String::from_utf8_lossy(&word).into_owned();
                return Err(format!("NOPERM SET with {word} cannot be carried to an origin: send it without").into());
            }
            _ => return Err(SYNTAX.into()),
        };
        if life.replace(said).is_some() {
            return Err(SYNTAX.into());
        }
    }
    Ok(life.unwrap_or(Life::Default))
}

fn given_life(time: Option<&[u8]>, unit: i64, command: &str) -> Result<Life, Cow<'static, str>> {
    match time.map(|time| parse_i64(time).ok_or(NOT_AN_INTEGER)) {
        None => Err(SYNTAX.into()),
        Some(Err(text)) => Err(text.into()),
        Some(Ok(time)) => match u64::try_from(time) {
            Ok(time) if time > 0 => Ok(Life::Within(time.saturating_mul(unit.unsigned_abs()))),
            _ => Err(format!("ERR invalid expire time in '{command}' command").into()),
        },
    }
}

fn moment(time: Option<&[u8]>, unit: i64) -> Result<Life, Cow<'static, str>> {
    match given_life(time, unit, "set")? {
        Life::Within(millis) => Ok(Life::Until(millis)),
        other => Ok(other),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::origin::Origins;
    use crate::origin::fields::pack;
    use crate::policy::Snapshot;
    use crate::sidecar::commands;
    use crate::sidecar::resp::{CommandScan, CommandScanner, encode};

    fn policy() -> ActivePolicy {
        let read = r#"{"ttl":{"default":"10m","max":"1h","jitter":"0%"},"stale":"0s","negativeTtl":"0s","lease":"3s","wait":"1s",
            "load":{"origin":"ORIGIN","query":QUERY,"reply":null}}"#;
        let sql = read.replace("ORIGIN", "db").replace("QUERY", r#"{"sql":{"read":"SELECT v FROM t WHERE id = $id"}}"#);
        let http = read.replace("ORIGIN", "api").replace("QUERY", r#"{"http":{"path":"/x/{id}"}}"#);
        let rule = |name: &str, read: &str, store: &str| {
            format!(
                r#"{{"name":"{name}","keys":"{name}:{{id}}","strategy":{{"writeThrough":{{"read":{read},"store":{store}}}}}}}"#
            )
        };
        let write = r#""write":"INSERT INTO t VALUES ($id, $value)""#;
        let all = format!(r#"{{"sql":{{{write},"delete":"DELETE FROM t WHERE id = $id"}}}}"#);
        let hashes = sql.replace(r#""reply":null"#, r#""reply":"Hash""#);
        let fields = all.replace("($id, $value)", "($id, $value.name, $value.mail)");
        let loads = format!(r#"{{"name":"l","keys":"l:{{id}}","strategy":{{"readThrough":{hashes}}}}}"#);
        let rules = [
            rule(
                "n",
                &sql,
                &all.replace(r#""write""#, r#""increment":"UPDATE t SET n = n + $by WHERE id = $id RETURNING n","write""#),
            ),
            rule("h", &hashes, &fields),
            loads,
            rule("a", &sql, &all),
            rule("b", &sql, &format!(r#"{{"sql":{{{write}}}}}"#)),
            rule("w", &http, r#"{"http":{}}"#),
            rule("o", &sql, &all).replacen("\"strategy\"", "\"mode\":\"observe\",\"strategy\"", 1),
        ];
        let json = format!(
            r#"{{"version":4,"requires":4,"generation":1,"cluster":{{"name":"main","topology":{{"cluster":{{"seeds":["127.0.0.1:7000"]}}}}}},
            "unmatched":{{"bypass":{{}}}},"origins":[
            {{"name":"db","kind":{{"sql":{{"url":{{"value":"sqlite://x.db"}}}}}},"maxConnections":2,"connectTimeout":"1s","timeout":"2s"}},
            {{"name":"api","kind":{{"http":{{"url":{{"value":"http://h"}}}}}},"maxConnections":2,"connectTimeout":"1s","timeout":"2s"}}],
            "rules":[{}]}}"#,
            rules.join(",")
        );
        let snapshot = Arc::new(Snapshot::parse(json.as_bytes()).expect("a snapshot"));
        ActivePolicy::new(snapshot.clone(), &Origins::new(&snapshot.origins).expect("origins")).expect("a policy")
    }

    fn with<T>(line: &str, look: impl FnOnce(&CommandSpec, &CommandArgs<'_>) -> T) -> T {
        let mut wire = Vec::new();
        encode::command(&mut wire, &line.split(' ').collect::<Vec<_>>());
        let mut scanner = CommandScanner::default();
        assert!(matches!(scanner.scan(&wire), Ok(CommandScan::Complete { .. })));
        let args = CommandArgs::new(&wire, scanner.ranges());
        look(commands::resolve(&args).expect(line), &args)
    }

    fn wish(line: &str) -> Wish {
        with(line, |spec, args| of(&policy(), spec, args))
    }

    #[track_caller]
    fn carries(line: &str, keys: &[(&str, Option<&str>)], life: Life) {
        let bytes = |(key, value): &(&str, Option<&str>)| (key.as_bytes().to_vec(), value.map(|value| value.as_bytes().to_vec()));
        let Wish::Carry(order) = wish(line) else { panic!("{line}: {:?}", wish(line)) };
        assert_eq!((order.keys, order.life), (keys.iter().map(bytes).collect(), life), "{line}");
    }

    #[test]
    fn whole_values_and_deletions_are_carried() {
        carries("SET a:1 x", &[("a:1", Some("x"))], Life::Default);
        carries("set a:1 x ex 7", &[("a:1", Some("x"))], Life::Within(7_000));
        carries("SET a:1 x PX 7", &[("a:1", Some("x"))], Life::Within(7));
        carries("SET a:1 x EXAT 7", &[("a:1", Some("x"))], Life::Until(7_000));
        carries("SET a:1 x PXAT 7", &[("a:1", Some("x"))], Life::Until(7));
        carries("SET a:1 x EX 9223372036854775807", &[("a:1", Some("x"))], Life::Within(u64::MAX));
        carries("SETEX a:1 7 x", &[("a:1", Some("x"))], Life::Within(7_000));
        carries("PSETEX a:1 7 x", &[("a:1", Some("x"))], Life::Within(7));
        carries("MSET a:1 x a:2 y a:1 z", &[("a:2", Some("y")), ("a:1", Some("z"))], Life::Default);
        carries("DEL a:1 a:2 a:1", &[("a:2", None), ("a:1", None)], Life::Default);
        carries("UNLINK a:1", &[("a:1", None)], Life::Default);
        carries("SET w:1 x", &[("w:1", Some("x"))], Life::Default);
    }

    #[test]
    fn numbers_are_raised_where_the_rule_says_how() {
        for (line, by) in [("INCR n:1", 1), ("DECR n:1", -1), ("INCRBY n:1 7", 7), ("DECRBY n:1 -7", 7), ("incrby n:1 -3", -3)] {
            let Wish::Carry(order) = wish(line) else { panic!("{line}: {:?}", wish(line)) };
            assert_eq!((order.keys, order.raise), (vec![(b"n:1".to_vec(), None)], Some(by)), "{line}");
        }
        for (line, words) in [
            ("INCRBY n:1 x", "not an integer"),
            ("DECRBY n:1 -9223372036854775808", "decrement would overflow"),
            ("INCRBYFLOAT n:1 1.5", "INCRBYFLOAT"),
            ("INCR a:1", "where the rule has origin.increment"),
        ] {
            let Wish::Refused(text) = wish(line) else { panic!("{line}: {:?}", wish(line)) };
            assert!(text.contains(words), "{line}: {text}");
        }
    }

    #[test]
    fn a_whole_hash_is_carried_and_no_part_of_one() {
        let hash = |pairs: &[(&str, &str)]| pack(pairs.iter().map(|(field, value)| (field.as_bytes(), value.as_bytes())));
        let ann = hash(&[("mail", "a@b"), ("name", "Ann")]);
        for (line, answer) in [
            ("HSET h:1 mail a@b name Ann", Answer::Number(2)),
            ("HMSET h:1 mail a@b name Ann", Answer::Ok),
            ("HSET h:1 name Bob mail a@b name Ann", Answer::Number(2)),
        ] {
            let Wish::Carry(order) = wish(line) else { panic!("{line}: {:?}", wish(line)) };
            assert_eq!(order.keys, [(b"h:1".to_vec(), Some(ann.clone()))], "{line}");
            assert_eq!((order.form, order.answer, order.life), (Form::Hash, answer, Life::Default), "{line}");
        }
        carries("DEL h:1 h:2", &[("h:1", None), ("h:2", None)], Life::Default);
        for (line, words) in [
            ("HSET h:1 name Ann", "lacks `mail`"),
            ("HSET h:1 name Ann mail a@b age 41", "has no field `age`"),
            ("HSET h:1 name Ann mail", "wrong number of arguments for 'hset'"),
            ("HDEL h:1 name", "HSET and HMSET of all fields, DEL and UNLINK can"),
            ("HINCRBY h:1 name 1", "HINCRBY"),
            ("HSETNX h:1 name Ann", "HSETNX"),
            ("HSETEX h:1 FIELDS 1 name Ann", "HSETEX"),
            ("SET h:1 x", "HSET and HMSET of all fields"),
            ("MSET h:1 x", "HSET and HMSET of all fields"),
            ("HSET l:1 name Ann", "some of its fields"),
            ("HINCRBY l:1 age 1", "some of its fields"),
        ] {
            let Wish::Refused(text) = wish(line) else { panic!("{line}: {:?}", wish(line)) };
            assert!(text.contains(words), "{line}: {text}");
        }
        for line in
            ["HGETALL h:1", "HEXPIRE other:1 7 FIELDS 1 x", "HSET other:1 name Ann", "DEL l:1", "HDEL l:1 name", "SET l:1 x"]
        {
            assert_eq!(wish(line), Wish::Nothing, "{line}");
        }
        let apart = |line: &str| with(line, |spec, args| refusal_apart(&policy(), spec, args, "a transaction"));
        assert!(apart("HSET h:1 name Ann").is_some_and(|text| text.contains("send it by itself")));
        assert!(apart("HSET l:1 name Ann").is_some_and(|text| text.contains("some of its fields")));
    }

    #[test]
    fn what_is_no_business_of_an_origin_passes() {
        for line in [
            "GET a:1",
            "MGET a:1 a:2",
            "EXPIRE a:1 7",
            "PERSIST a:1",
            "GETEX a:1 EX 7",
            "PEXPIREAT a:1 7",
            "SET other:1 x",
            "SET o:1 x",
            "APPEND other:1 x",
            "TTL a:1",
            "SINTERSTORE other:1 a:1 a:2",
            "EVAL_RO x 1 a:1",
            "COPY a:1 other:1",
            "DEL other:1",
        ] {
            assert_eq!(wish(line), Wish::Nothing, "{line}");
        }
    }

    #[test]
    fn all_else_is_refused_by_name() {
        for (line, words) in [
            ("APPEND a:1 x", "NOPERM APPEND of a key of the rule `a`"),
            ("INCR a:1", "INCR"),
            ("SETNX a:1 x", "SETNX"),
            ("GETSET a:1 x", "GETSET"),
            ("GETDEL a:1", "GETDEL"),
            ("MSETNX a:1 x", "MSETNX"),
            ("HSET a:1 f x", "HSET"),
            ("LPUSH a:1 x", "LPUSH"),
            ("EVAL x 1 a:1", "EVAL"),
            ("RENAME a:1 other:1", "RENAME"),
            ("COPY other:1 a:1", "COPY"),
            ("RESTORE a:1 0 x", "RESTORE"),
            ("SINTERSTORE a:1 other:1", "SINTERSTORE"),
            ("NOVEL a:1", "this command"),
            ("SET a:1 x NX", "SET with NX"),
            ("SET a:1 x EX 7 xx", "SET with XX"),
            ("SET a:1 x KEEPTTL", "SET with KEEPTTL"),
            ("SET a:1 x GET", "SET with GET"),
            ("SET a:1 x EX", "syntax"),
            ("SET a:1 x EX 7 PX 7", "syntax"),
            ("SET a:1 x WHAT", "syntax"),
            ("SET a:1 x EX y", "not an integer"),
            ("SET a:1 x EX 0", "invalid expire time in 'set'"),
            ("SET a:1 x PXAT -1", "invalid expire time in 'set'"),
            ("SETEX a:1 0 x", "invalid expire time in 'setex'"),
            ("MSET a:1 x other:1 y", "several rules"),
            ("MSET other:1 x a:1 y", "several rules"),
            ("DEL a:1 b:1", "several rules"),
            ("MSET a:1 x a:2", "wrong number"),
            ("DEL b:1", "origin.delete"),
            ("DEL w:1 w:2", "one change at a time"),
        ] {
            let Wish::Refused(text) = wish(line) else { panic!("{line}: {:?}", wish(line)) };
            assert!(text.contains(words), "{line}: {text}");
        }
        let many: Vec<String> = (0..=MOST_KEYS).map(|at| format!("a:{at}")).collect();
        assert!(matches!(wish(&format!("DEL {}", many.join(" "))), Wish::Refused(text) if text.contains("at most 256 keys")));
    }

    #[test]
    fn nothing_is_carried_from_where_nobody_can_wait() {
        let apart = |line: &str| with(line, |spec, args| refusal_apart(&policy(), spec, args, "a transaction"));
        assert!(apart("SET a:1 x").is_some_and(|text| text.contains("a transaction cannot wait for: send it by itself")));
        assert!(apart("INCR a:1").is_some_and(|text| text.contains("INCR")));
        assert_eq!([apart("GET a:1"), apart("EXPIRE a:1 7"), apart("SET other:1 x")], [None, None, None]);
    }

    #[test]
    fn a_value_is_kept_no_longer_than_its_rule_says() {
        let lifetime = *policy().rule(0).and_then(crate::policy::Rule::lifetime).expect("a lifetime");
        assert_eq!(Life::Default.resolve(&lifetime, 0), (600_000, false));
        assert_eq!(Life::Within(u64::MAX).resolve(&lifetime, 0), (3_600_000, false));
        assert_eq!(Life::Until(7).resolve(&lifetime, 0), (7, true));
    }
}
