//! The same script of commands against a bare server and through the sidecar: replies are identical, or the difference is listed
//! in docs/differences.md. A listed difference that is none any more fails, too.

mod differences;
mod refusals;
mod script;

use std::collections::{BTreeMap, BTreeSet};

use larder::sidecar::commands::{Class, lookup};

use self::differences::{Setup, comparable, listed};
use self::script::{CONVERSATIONS, Described, Script, Words, described};
use crate::support::resp::{Client, Value, encode, show};
use crate::support::server::{Engine, Redis, RedisCluster, SentinelCluster};
use crate::support::sidecar::{Sidecar, bypass, cluster_topology, sentinel_topology};
use crate::support::wait_for;

/// Makes the same script in every run.
const SEED: u64 = 7;

/// So many commands must have succeeded at least once, or the script shows little.
const FEWEST_SUCCEEDED: usize = 250;

#[derive(Default)]
struct Found {
    /// By command, each with its first example.
    differences: BTreeMap<String, String>,
    /// The commands that the bare server carried out at least once.
    succeeded: BTreeSet<String>,
}

#[test]
fn replies_are_those_of_one_server_under_sentinel() {
    let mut found = Found::default();
    for engine in Engine::ALL {
        let servers = SentinelCluster::start(engine, 1);
        let sidecar = Sidecar::start(&allowing(bypass(sentinel_topology(&servers))));
        let bare = Redis::start(engine);
        compare(&bare, &sidecar, &mut found);
    }
    check(Setup::Sentinel, &found);
}

#[test]
fn replies_are_those_of_one_server_under_cluster() {
    let mut found = Found::default();
    for engine in Engine::ALL {
        let servers = RedisCluster::start(engine, 3, 1);
        let sidecar = Sidecar::start(&allowing(bypass(cluster_topology(&servers))));
        let bare = Redis::start_with(engine, &["--cluster-enabled", "yes"]);
        let mut client = bare.client();
        assert_eq!(client.line("CLUSTER ADDSLOTSRANGE 0 16383"), Value::Simple("OK".to_owned()));
        wait_for("the cluster of one", std::time::Duration::from_secs(30), || {
            client.line("CLUSTER INFO").text().contains("cluster_state:ok")
        });
        compare(&bare, &sidecar, &mut found);
    }
    check(Setup::Cluster, &found);
}

/// With all that a policy can allow.
fn allowing(mut snapshot: serde_json::Value) -> serde_json::Value {
    snapshot["allow"] = serde_json::json!({"keys": true, "flush": true});
    snapshot
}

#[track_caller]
fn check(setup: Setup, found: &Found) {
    let listed = listed(setup);
    let missing: Vec<String> = found
        .differences
        .iter()
        .filter(|(name, _)| !listed.contains(*name))
        .map(|(name, example)| format!("{name}: {example}"))
        .collect();
    let names: BTreeSet<String> = found.differences.keys().cloned().collect();
    println!("{} commands succeeded, {} differ", found.succeeded.len(), names.len());
    assert!(
        found.succeeded.len() >= FEWEST_SUCCEEDED,
        "only {} commands succeeded: {:?}",
        found.succeeded.len(),
        found.succeeded
    );
    let gone: Vec<&String> = listed.difference(&names).collect();
    assert!(
        missing.is_empty() && gone.is_empty(),
        "docs/differences.md, {setup:?}\nnot listed:\n{}\nlisted, but there is no difference:\n{gone:?}",
        missing.join("\n")
    );
}

/// Runs the script in both protocols.
fn compare(bare: &Redis, sidecar: &Sidecar, found: &mut Found) {
    let commands = described(&mut bare.client());
    assert!(commands.len() > 300, "COMMAND DOCS describes {} commands", commands.len());
    for resp3 in [false, true] {
        let mut pair = Pair { bare: bare.client(), through: sidecar.client(), found, resp3 };
        pair.greet();
        assert_eq!(pair.bare.line("FLUSHALL"), pair.through.line("FLUSHALL"));
        let mut script = Script::new(SEED);
        for command in &commands {
            for words in script.seed() {
                assert_eq!(pair.bare.call(&words), pair.through.call(&words), "{}", show(&words));
            }
            let apart = place_of(command);
            if apart == Place::Refused {
                pair.refuse(command);
                continue;
            }
            for words in script.invocations(command) {
                match apart {
                    Place::OwnConnection => pair.alone(bare, sidecar, &command.name, &words),
                    _ if command.name == "scan" => pair.walk(&words),
                    _ => pair.run(&command.name, &words),
                }
            }
        }
        for (name, lines) in CONVERSATIONS {
            pair.talk(bare, sidecar, name, &script, lines);
        }
    }
}

/// How a command is run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    Common,
    /// It changes what its connection is in.
    OwnConnection,
    /// Not on the bare server: it would change it.
    Refused,
}

fn place_of(command: &Described) -> Place {
    let mut names = command.name.split('|');
    let Some(spec) = names.next().and_then(|name| lookup(name.as_bytes())) else { return Place::Common };
    let spec = names.next().and_then(|name| spec.subcommands.iter().find(|sub| sub.last_name() == name)).unwrap_or(spec);
    match spec.class {
        Class::Refused(_) => Place::Refused,
        Class::Connection | Class::Transaction | Class::PubSub => Place::OwnConnection,
        _ => Place::Common,
    }
}

struct Pair<'a> {
    bare: Client,
    through: Client,
    found: &'a mut Found,
    resp3: bool,
}

impl Pair<'_> {
    fn greet(&mut self) {
        if self.resp3 {
            assert!(!self.bare.line("HELLO 3").is_error());
            assert!(!self.through.line("HELLO 3").is_error());
        }
    }

    fn run(&mut self, name: &str, words: &Words) {
        let (own, through) = (self.bare.call(words), self.through.call(words));
        self.judge(name, words, &own, &through);
    }

    fn judge(&mut self, name: &str, words: &Words, own: &Value, through: &Value) {
        if !own.is_error() {
            self.found.succeeded.insert(name.to_owned());
        }
        let kind = if words[0].eq_ignore_ascii_case(b"hello") { "hello" } else { name };
        if comparable(kind, own) != comparable(kind, through) {
            let example = format!("{} → bare {} · through {}", show(words), cut(own), cut(through));
            self.found.differences.entry(name.to_owned()).or_insert(example);
        }
    }

    /// On connections of their own.
    fn alone(&mut self, bare: &Redis, sidecar: &Sidecar, name: &str, words: &Words) {
        let mut other = Pair { bare: bare.client(), through: sidecar.client(), found: &mut *self.found, resp3: self.resp3 };
        other.greet();
        other.run(name, words);
    }

    /// One command after the other on connections of their own.
    fn talk(&mut self, bare: &Redis, sidecar: &Sidecar, name: &str, script: &Script, lines: &[&str]) {
        let mut other = Pair { bare: bare.client(), through: sidecar.client(), found: &mut *self.found, resp3: self.resp3 };
        other.greet();
        for lines in lines {
            let mut words: Vec<Words> = lines.lines().map(|line| script.words(line)).collect();
            let Some(last) = words.pop() else { continue };
            for silent in words {
                other.bare.send(&encode(&silent)).expect("the server reads");
                other.through.send(&encode(&silent)).expect("the sidecar reads");
            }
            other.run(name, &last);
        }
    }

    /// SCAN to its end: where the cursor stands in between is the server's own affair.
    fn walk(&mut self, words: &Words) {
        let (own, through) = (walk(&mut self.bare, words), walk(&mut self.through, words));
        self.judge("scan", words, &own, &through);
    }

    /// Never on the bare server.
    fn refuse(&mut self, command: &Described) {
        let mut words: Words = command.name.split('|').map(|word| word.as_bytes().to_vec()).collect();
        // As many arguments as any of them needs.
        let reply = loop {
            let reply = self.through.call(&words);
            let short = matches!(&reply, Value::Error(text) if text.contains("wrong number of arguments"));
            if !short || words.len() > 8 {
                break reply;
            }
            words.push(b"1".to_vec());
        };
        assert!(
            matches!(&reply, Value::Error(text) if text.starts_with("NOPERM ") && text.contains("is not passed on by Larder")),
            "{}: {reply:?}",
            show(&words)
        );
        self.found.differences.entry(command.name.clone()).or_insert_with(|| format!("{reply:?}"));
    }
}

fn walk(client: &mut Client, words: &Words) -> Value {
    let (mut words, mut found) = (words.clone(), Vec::new());
    loop {
        let reply = client.call(&words);
        if reply.is_error() {
            return reply;
        }
        let [cursor, items] = &reply.items()[..] else { panic!("{}: {reply:?}", show(&words)) };
        found.extend(items.items());
        words[1] = cursor.text().into_bytes();
        if words[1] == b"0" {
            return Value::Array(found);
        }
    }
}

fn cut(value: &Value) -> String {
    format!("{value:?}").chars().take(160).collect()
}
