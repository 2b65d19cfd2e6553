//! The same script of commands against a bare server and through the sidecar: replies are identical, or the difference is listed
//! in docs/differences.md. A listed difference that is none any more fails, too.

mod differences;
mod refusals;
mod script;

use std::collections::{BTreeMap, BTreeSet};

use larder::sidecar::commands::{Class, lookup};

use self::differences::{Row, Setup, comparable, rows_about};
use self::script::{CONVERSATIONS, Described, Script, Words, described};
use crate::support::resp::{Client, Value, encode, show};
use crate::support::server::{Engine, Redis, RedisCluster, SentinelCluster};
use crate::support::sidecar::{Sidecar, bypass, cluster_topology, sentinel_topology};
use crate::support::wait_for;

/// Makes the same script in every run.
const SEED: u64 = 7;

/// So many commands must have succeeded at least once, or the script shows little.
const FEWEST_SUCCEEDED: usize = 250;

/// So many examples of a command's differences are told.
const EXAMPLES: usize = 4;

/// What is found with one engine in one set-up.
struct Found {
    /// The table's rows about it.
    rows: Vec<Row>,
    /// The commands that the server describes.
    known: BTreeSet<String>,
    /// The commands that differ as a row allows, and the rows' allowances that were made use of.
    listed: BTreeSet<String>,
    used: BTreeSet<(usize, usize)>,
    /// The commands that differ in another way, each with its first examples.
    unlisted: BTreeMap<String, Vec<String>>,
    /// The commands that the bare server carried out at least once.
    succeeded: BTreeSet<String>,
}

impl Found {
    fn new(setup: Setup, engine: Engine) -> Self {
        Self {
            rows: rows_about(setup, engine),
            known: BTreeSet::new(),
            listed: BTreeSet::new(),
            used: BTreeSet::new(),
            unlisted: BTreeMap::new(),
            succeeded: BTreeSet::new(),
        }
    }

    /// The name by which the server describes the command.
    fn name_of(&self, words: &Words) -> String {
        let word = |at: usize| words.get(at).map(|word| String::from_utf8_lossy(word).to_lowercase()).unwrap_or_default();
        let subcommand = format!("{}|{}", word(0), word(1));
        if self.known.contains(&subcommand) { subcommand } else { word(0) }
    }

    /// Two replies differ.
    fn differ(&mut self, name: &str, words: &Words, own: &Value, through: &Value) {
        let row = self.rows.iter().position(|row| row.commands.iter().any(|command| command == name));
        let allowance = row.and_then(|row| Some((row, self.rows[row].allowance(own, through)?)));
        if let Some(allowance) = allowance {
            self.listed.insert(name.to_owned());
            self.used.insert(allowance);
            return;
        }
        let examples = self.unlisted.entry(name.to_owned()).or_default();
        if examples.len() < EXAMPLES {
            examples.push(format!("{} → bare {} · through {}", show(words), cut(own), cut(through)));
        }
    }

    /// What the table lists, and is not so: commands that this server has, and allowances.
    fn gone(&self) -> Vec<String> {
        let mut gone = Vec::new();
        for (index, row) in self.rows.iter().enumerate() {
            let known: Vec<&String> = row.commands.iter().filter(|name| self.known.contains(*name)).collect();
            gone.extend(known.iter().filter(|name| !self.listed.contains(**name)).map(|name| (*name).clone()));
            let unused = (0..row.allowances()).filter(|pair| !known.is_empty() && !self.used.contains(&(index, *pair)));
            gone.extend(unused.map(|pair| format!("allowance {} of `{}`", pair + 1, row.what)));
        }
        gone
    }
}

#[test]
fn replies_are_those_of_one_server_under_sentinel() {
    for engine in Engine::ALL {
        let servers = SentinelCluster::start(engine, 1);
        let sidecar = Sidecar::start(&allowing(bypass(sentinel_topology(&servers))));
        compare(&Redis::start(engine), &sidecar, Setup::Sentinel);
    }
}

#[test]
fn replies_are_those_of_one_server_under_cluster() {
    for engine in Engine::ALL {
        let servers = RedisCluster::start(engine, 3, 1);
        let sidecar = Sidecar::start(&allowing(bypass(cluster_topology(&servers))));
        let bare = Redis::start_with(engine, &["--cluster-enabled", "yes"]);
        let mut client = bare.client();
        assert_eq!(client.line("CLUSTER ADDSLOTSRANGE 0 16383"), Value::Simple("OK".to_owned()));
        wait_for("the cluster of one", std::time::Duration::from_secs(30), || {
            client.line("CLUSTER INFO").text().contains("cluster_state:ok")
        });
        compare(&bare, &sidecar, Setup::Cluster);
    }
}

/// With all that a policy can allow.
fn allowing(mut snapshot: serde_json::Value) -> serde_json::Value {
    snapshot["allow"] = serde_json::json!({"keys": true, "flush": true});
    snapshot
}

#[track_caller]
fn check(setup: Setup, engine: Engine, found: &Found) {
    let succeeded = found.succeeded.len();
    println!("{setup:?}, {engine:?}: {succeeded} commands succeeded, {} differ", found.listed.len());
    assert!(succeeded >= FEWEST_SUCCEEDED, "only {succeeded} commands succeeded: {:?}", found.succeeded);
    let unlisted: Vec<String> =
        found.unlisted.iter().map(|(name, examples)| format!("{name}:\n    {}", examples.join("\n    "))).collect();
    let gone = found.gone();
    assert!(
        unlisted.is_empty() && gone.is_empty(),
        "docs/differences.md, {setup:?}, {engine:?}\nnot listed:\n{}\nlisted, but there is no such difference:\n{gone:#?}",
        unlisted.join("\n")
    );
}

/// Runs the script in both protocols, and holds what differs against the table.
#[track_caller]
fn compare(bare: &Redis, sidecar: &Sidecar, setup: Setup) {
    let mut found = Found::new(setup, bare.engine());
    let commands = described(&mut bare.client());
    assert!(commands.len() > 300, "COMMAND DOCS describes {} commands", commands.len());
    found.known = commands.iter().map(|command| command.name.clone()).collect();
    for resp3 in [false, true] {
        run_script(bare, sidecar, &commands, resp3, &mut found);
    }
    check(setup, bare.engine(), &found);
}

fn run_script(bare: &Redis, sidecar: &Sidecar, commands: &[Described], resp3: bool, found: &mut Found) {
    let mut pair = Pair { bare: bare.client(), through: sidecar.client(), found, resp3 };
    pair.greet();
    assert_eq!(pair.bare.line("FLUSHALL"), pair.through.line("FLUSHALL"));
    let mut script = Script::new(SEED);
    for command in commands {
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
    for (_, lines) in CONVERSATIONS {
        pair.talk(bare, sidecar, &script, lines);
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
        // What is queued succeeds later, if at all.
        if !own.is_error() && *own != Value::Simple("QUEUED".to_owned()) {
            self.found.succeeded.insert(name.to_owned());
        }
        if comparable(name, own) != comparable(name, through) {
            self.found.differ(name, words, own, through);
        }
    }

    /// On connections of their own.
    fn alone(&mut self, bare: &Redis, sidecar: &Sidecar, name: &str, words: &Words) {
        let mut other = Pair { bare: bare.client(), through: sidecar.client(), found: &mut *self.found, resp3: self.resp3 };
        other.greet();
        other.run(name, words);
    }

    /// One command after the other on connections of their own, each judged under its own name.
    fn talk(&mut self, bare: &Redis, sidecar: &Sidecar, script: &Script, lines: &[&str]) {
        let mut other = Pair { bare: bare.client(), through: sidecar.client(), found: &mut *self.found, resp3: self.resp3 };
        other.greet();
        for lines in lines {
            let mut words: Vec<Words> = lines.lines().map(|line| script.words(line)).collect();
            let Some(last) = words.pop() else { continue };
            for silent in words {
                other.bare.send(&encode(&silent)).expect("the server reads");
                other.through.send(&encode(&silent)).expect("the sidecar reads");
            }
            let name = other.found.name_of(&last);
            other.run(&name, &last);
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
        // Whatever the server would say.
        self.found.differ(&command.name, &words, &Value::Nil, &reply);
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
