//! The written table of differences, and what the test makes of two replies.

use std::collections::BTreeSet;

use crate::support::resp::Value;
use crate::support::server::Engine;

/// Where the table is.
const PATH: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/differences.md");

/// How the servers are set up behind the sidecar.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Setup {
    Sentinel,
    Cluster,
}

/// A row of the table.
#[derive(Debug)]
pub struct Row {
    /// In lower case, subcommands as `client|id`.
    pub commands: Vec<String>,
    servers: String,
    /// What differs.
    pub what: String,
    /// How a bare server's reply begins, and how the sidecar's may then begin, as the row says with `one` → `other`.
    allowed: Vec<[String; 2]>,
}

impl Row {
    /// Whether it is about this set-up of these servers.
    fn applies(&self, setup: Setup, engine: Engine) -> bool {
        let (topology, only) = match self.servers.split_once(", ") {
            Some((topology, "Redis")) => (topology, Some(Engine::Redis7)),
            Some((topology, "Valkey")) => (topology, Some(Engine::Valkey9)),
            Some((_, other)) => panic!("`{other}` is no engine: {self:?}"),
            None => (self.servers.as_str(), None),
        };
        let fits = match topology {
            "both" => true,
            "Sentinel" => setup == Setup::Sentinel,
            "Cluster" => setup == Setup::Cluster,
            other => panic!("`{other}` is no topology: {self:?}"),
        };
        fits && only.is_none_or(|only| only == engine)
    }

    /// How many allowances it makes.
    pub fn allowances(&self) -> usize {
        self.allowed.len()
    }

    /// Which of its allowances covers these two replies.
    pub fn allowance(&self, own: &Value, through: &Value) -> Option<usize> {
        let begins = |reply: &Value, with: &str| format!("{reply:?}").starts_with(with.trim_end_matches('…'));
        self.allowed.iter().position(|[bare, other]| begins(own, bare) && begins(through, other))
    }
}

/// What a row allows. One that says no more than that commands are refused allows that.
fn allowed(what: &str) -> Vec<[String; 2]> {
    if what == "refused" {
        return vec![["…".to_owned(), "-NOPERM ".to_owned()]];
    }
    let parts: Vec<&str> = what.split('`').collect();
    let pair = |at: usize| match parts.get(at..at + 3)? {
        [bare, between, other] if between.trim() == "→" => Some([bare, other].map(|text| (*text).to_owned())),
        _ => None,
    };
    (1..parts.len()).step_by(2).filter_map(pair).collect()
}

/// The document.
pub fn text() -> String {
    std::fs::read_to_string(PATH).expect("docs/differences.md can be read")
}

/// The table's rows.
pub fn rows() -> Vec<Row> {
    let read = |line: &str| {
        let cells: Vec<&str> = line.trim_matches('|').split(" | ").map(str::trim).collect();
        let [commands, servers, what, why] = cells[..] else { panic!("four cells are expected in: {line}") };
        assert!(!what.is_empty() && !why.is_empty(), "a row says what differs, and why: {line}");
        let commands = commands.split(',').map(|command| command.trim().trim_matches('`').to_lowercase().replace(' ', "|"));
        let allowed = allowed(what);
        assert!(!allowed.is_empty(), "a row says which replies differ, as `one` → `other`: {line}");
        Row { commands: commands.collect(), servers: servers.to_owned(), what: what.to_owned(), allowed }
    };
    let rows: Vec<Row> = text().lines().filter(|line| line.starts_with("| `")).map(read).collect();
    assert!(!rows.is_empty(), "docs/differences.md has no rows");
    rows
}

/// The table's rows about a set-up of these servers.
pub fn rows_about(setup: Setup, engine: Engine) -> Vec<Row> {
    let rows: Vec<Row> = rows().into_iter().filter(|row| row.applies(setup, engine)).collect();
    let mut seen = BTreeSet::new();
    for name in rows.iter().flat_map(|row| &row.commands) {
        assert!(seen.insert(name), "{name} is listed twice for {setup:?} and {engine:?}");
    }
    rows
}

/// Whose replies come in no order.
const UNORDERED: &[&str] = &[
    "smembers",
    "sinter",
    "sunion",
    "sdiff",
    "sscan",
    "hscan",
    "scan",
    "keys",
    "hgetall",
    "hkeys",
    "hvals",
    "command",
    "command|list",
    "command|docs",
    "command|info",
    "config|get",
    "cluster|getkeysinslot",
    "pubsub|channels",
    "acl|cat",
    "spop",
    "sort",
    "sort_ro",
    "hello",
    "latency|histogram",
];
/// Whose replies differ between any two servers, or any two moments: only their types are compared.
const SHAPE: &[&str] = &[
    "time",
    "info",
    "lastsave",
    "randomkey",
    "srandmember",
    "hrandfield",
    "zrandmember",
    "client|id",
    "client|info",
    "client|list",
    "memory|usage",
    "memory|stats",
    "memory|doctor",
    "memory|malloc-stats",
    "latency|doctor",
    "lolwut",
    "object|idletime",
    "object|freq",
    "slowlog|get",
    "slowlog|len",
    "commandlog|get",
    "commandlog|len",
    "function|stats",
    "xinfo|consumers",
    "xpending",
    "cluster|info",
    "cluster|nodes",
    "cluster|shards",
    "cluster|slots",
    "cluster|myid",
    "cluster|myshardid",
    "cluster|links",
    "role",
    "latency|latest",
    "latency|histogram",
    "dump",
    "function|dump",
    "command|count",
    "memory|purge",
    "wait",
    "waitaof",
];
/// Whose replies are moments or spans: zero and below are exact.
const SPANS: &[&str] =
    &["ttl", "pttl", "expiretime", "pexpiretime", "httl", "hpttl", "hexpiretime", "hpexpiretime", "xinfo|stream"];

/// What of a reply must be equal.
pub fn comparable(name: &str, reply: &Value) -> Value {
    if reply.is_error() {
        return reply.clone();
    }
    if name == "hello" {
        return without_id(reply);
    }
    if SHAPE.contains(&name) {
        return shape(reply);
    }
    if SPANS.contains(&name) {
        return spans(reply);
    }
    if UNORDERED.contains(&name) { sorted(reply) } else { reply.clone() }
}

/// HELLO's answer without the connection's number. Within a conversation, other answers pass as they are.
fn without_id(reply: &Value) -> Value {
    let is_id = |name: &Value| matches!(name, Value::Bulk(name) if name == b"id");
    match reply {
        Value::Map(pairs) => Value::Map(pairs.iter().filter(|(name, _)| !is_id(name)).cloned().collect()),
        Value::Array(items) => {
            Value::Array(items.chunks(2).filter(|pair| !is_id(&pair[0])).flat_map(<[Value]>::to_vec).collect())
        }
        other => other.clone(),
    }
}

/// The type alone; of two lists one may be longer.
fn shape(reply: &Value) -> Value {
    let kind = match reply {
        Value::Simple(_) => "status",
        Value::Error(_) => "error",
        Value::Int(_) => "integer",
        Value::Bulk(_) => "string",
        Value::Nil => "null",
        Value::Array(_) => "array",
        Value::Set(_) => "set",
        Value::Map(_) => "map",
        Value::Push(_) => "push",
        Value::Double(_) => "double",
        Value::Bool(_) => "boolean",
        Value::BigNumber(_) => "big number",
    };
    Value::Simple(kind.to_owned())
}

fn spans(reply: &Value) -> Value {
    match reply {
        Value::Int(number) => Value::Int((*number).min(1)),
        Value::Array(items) => Value::Array(items.iter().map(spans).collect()),
        other => other.clone(),
    }
}

fn sorted(reply: &Value) -> Value {
    let by_text = |items: &[Value]| {
        let mut items: Vec<Value> = items.iter().map(sorted).collect();
        items.sort_by_key(|item| format!("{item:?}"));
        items
    };
    match reply {
        Value::Array(items) => Value::Array(by_text(items)),
        Value::Set(items) => Value::Set(by_text(items)),
        Value::Map(pairs) => {
            let mut pairs: Vec<_> = pairs.iter().map(|(key, value)| (sorted(key), sorted(value))).collect();
            pairs.sort_by_key(|(key, _)| format!("{key:?}"));
            Value::Map(pairs)
        }
        other => other.clone(),
    }
}
