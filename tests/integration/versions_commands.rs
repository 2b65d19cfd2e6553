//! Which commands are carried out on versioned keys: those that are named, as on any other key; and all others are refused by name.

use std::collections::BTreeSet;

use larder::sidecar::commands::{Class, Effect};
use larder::sidecar::versions::NAMED;
use serde_json::json;

use crate::cache_aside::{bulk, ok, rule};
use crate::command_table::{Command, server_commands};
use crate::read_through::Servers;
use crate::support::resp::Value;
use crate::support::sidecar::Sidecar;

/// `page:{id}`, versioned.
fn sidecar(servers: &Servers) -> Sidecar {
    let mut page = rule("page", json!({}), json!({}));
    page["versioned"] = json!(true);
    servers.sidecar(&[], &[page])
}

/// Commands one after another, each on what those before it have left.
const LINES: &[&str] = &[
    "SET page:a 7",
    "GET page:a",
    "INCR page:a",
    "INCRBY page:a 5",
    "DECR page:a",
    "DECRBY page:a 2",
    "INCRBYFLOAT page:a 1.5",
    "APPEND page:a 00",
    "STRLEN page:a",
    "GETRANGE page:a 0 2",
    "SUBSTR page:a 1 2",
    "SETRANGE page:a 3 zz",
    "INCR page:a",
    "GETSET page:a new",
    "GETEX page:a EX 100",
    "GETDEL page:a",
    "EXISTS page:a",
    "SETEX page:b 100 v",
    "PSETEX page:b 100000 w",
    "SETNX page:c v",
    "SETNX page:c w",
    "SET page:c x XX GET",
    "MSET page:d 1 page:e 2",
    "MSETNX page:e 1 page:f 2",
    "MSETNX page:f 1 page:g 2",
    "MGET page:d page:e page:f page:g page:none",
    "EXISTS page:d page:none page:d",
    "TOUCH page:d page:none",
    "TYPE page:d",
    "TYPE page:none",
    "EXPIRE page:d 200",
    "TTL page:d",
    "PEXPIRE page:d 100000",
    "PTTL page:d",
    "EXPIRETIME page:d",
    "PEXPIRETIME page:d",
    "PERSIST page:d",
    "EXPIREAT page:d 1",
    "EXISTS page:d",
    "PEXPIREAT page:e 1",
    "DEL page:e page:f page:none",
    "UNLINK page:g page:none",
    "GET page:c extra",
    "INCRBY page:c 1",
];

/// The answers to these are times, which pass.
const TIMES: [&str; 4] = ["TTL", "PTTL", "EXPIRETIME", "PEXPIRETIME"];

fn word_of(line: &str) -> &str {
    line.split(' ').next().unwrap_or_default()
}

/// Each command that is named answers on versioned keys what it answers on a server's own.
#[test]
fn the_commands_that_are_named_are_carried_out_as_on_any_other_key() {
    let servers = Servers::sentinel();
    let sidecar = sidecar(&servers);
    let (mut client, mut server) = (sidecar.client(), servers.holder_of("bare:a"));
    for line in LINES {
        let (through, bare) = (client.line(line), server.line(&line.replace("page:", "bare:")));
        let is_time = TIMES.contains(&word_of(line));
        match is_time {
            true => assert!(through.int() > 0 && bare.int() >= through.int() - 1_000, "{line}: {through:?} is not {bare:?}"),
            false => assert_eq!(through, bare, "{line}"),
        }
    }
    // Those of Larder's own.
    let fetched = client.line("LARDER.FETCH page:own").items();
    assert_eq!((fetched[0].text().as_str(), &fetched[1]), ("load", &Value::Nil), "{fetched:?}");
    assert_eq!(client.call(&["LARDER.FILL", "page:own", &fetched[2].text(), "v"]), ok());
    assert_eq!((client.line("GET page:own"), client.line("LARDER.INVALIDATE page:own")), (bulk("v"), Value::Int(1)));
    assert_eq!(client.line("EXISTS page:own"), Value::Int(0));
    let own = ["larder.fetch", "larder.fill", "larder.invalidate"].map(str::to_owned);
    let tried: BTreeSet<String> = LINES.iter().map(|line| word_of(line).to_ascii_lowercase()).chain(own).collect();
    assert_eq!(tried, NAMED.iter().map(|name| (*name).to_owned()).collect(), "each command that is named is tried here");
}

/// A form of the command in which the table finds a key.
fn on_a_key(name: &str, arity: i64) -> Option<Vec<String>> {
    const KEY: &str = "page:1";
    let names: Vec<&str> = name.split('|').collect();
    let least = usize::try_from(arity.unsigned_abs()).ok()?.max(names.len() + 1);
    // Where nothing else is said all arguments are the key; or the number of keys comes first, or behind a script.
    let beginnings: [&[&str]; 5] = [&[], &["1"], &["s", "1"], &["0", "1"], &["STREAMS"]];
    let forms = (least..least + 4).flat_map(|length| beginnings.map(|beginning| (length, beginning)));
    let words = forms.map(|(length, beginning)| {
        let mut words: Vec<String> = names.iter().chain(beginning).map(|word| (*word).to_owned()).collect();
        words.resize(length.max(words.len() + 1), KEY.to_owned());
        words
    });
    let mut words = words.filter(|words| {
        let command = Command::new(words);
        let Some(row) = larder::sidecar::commands::lookup(names[0].as_bytes()) else { return false };
        let row = match row.subcommands.is_empty() {
            true => Some(row),
            false => row.subcommand(&command.args()).ok(),
        };
        row.filter(|row| row.arity_ok(words.len())).is_some_and(|row| {
            let keys = row.keys(&command.args()).unwrap_or_default();
            keys.iter().any(|at| at.effect != Effect::Route && words.get(at.index as usize).is_some_and(|word| word == KEY))
        })
    });
    words.next()
}

#[test]
fn all_other_commands_that_name_such_a_key_are_refused_by_name() {
    let servers = Servers::sentinel();
    let sidecar = sidecar(&servers);
    assert_eq!(sidecar.client().line("SET page:1 v"), ok());
    let (mut refused, mut passed) = (BTreeSet::new(), Vec::new());
    for command in server_commands(&mut servers.holder_of("page:1")) {
        let is_refused_anyway = command.row().is_none_or(|row| matches!(row.class, Class::Refused(_)));
        if is_refused_anyway || NAMED.contains(&command.name.as_str()) {
            continue;
        }
        let Some(words) = on_a_key(&command.name, command.arity) else { continue };
        let words: Vec<&str> = words.iter().map(String::as_str).collect();
        let said =
            format!("{} is not carried out on keys of the rule `page`", command.name.replace('|', " ").to_ascii_uppercase());
        match sidecar.client().call(&words) {
            Value::Error(text) if text.contains(&said) => drop(refused.insert(command.name.clone())),
            other => passed.push(format!("{words:?}: {other:?}")),
        }
    }
    assert!(passed.is_empty(), "{passed:#?}");
    assert!(refused.len() > 120, "{} commands are refused: {refused:?}", refused.len());
    for name in [
        "hset",
        "lpush",
        "zadd",
        "setbit",
        "rename",
        "copy",
        "dump",
        "object|encoding",
        "eval",
        "xread",
        "blpop",
        "watch",
        "sort",
        "lcs",
    ] {
        assert!(refused.contains(name), "{name}: {refused:?}");
    }
    assert_eq!(sidecar.client().line("GET page:1"), bulk("v"));
}
