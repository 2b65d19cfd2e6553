//! The command table and the slots against what real servers say.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

use larder::sidecar::commands::{Access, Class, CommandSpec, Effect, lookup, resolve};
use larder::sidecar::resp::CommandArgs;
use larder::sidecar::slots::{Companion, slot_of};

use crate::support::resp::{Client, Value};
use crate::support::server::{Engine, Redis};

/// A command in memory, as the code under test takes it.
pub struct Command {
    buffer: Vec<u8>,
    ranges: Vec<Range<u32>>,
}

impl Command {
    pub fn new<A: AsRef<[u8]>>(words: &[A]) -> Self {
        let (mut buffer, mut ranges) = (Vec::new(), Vec::new());
        for word in words {
            let start = buffer.len() as u32;
            buffer.extend_from_slice(word.as_ref());
            ranges.push(start..buffer.len() as u32);
        }
        Self { buffer, ranges }
    }

    pub fn args(&self) -> CommandArgs<'_> {
        CommandArgs::new(&self.buffer, &self.ranges)
    }
}

/// What COMMAND says of one command or subcommand.
#[derive(Debug, Clone)]
#[allow(dead_code)]
pub struct ServerCommand {
    pub name: String,
    pub arity: i64,
    pub flags: BTreeSet<String>,
    pub has_key_specs: bool,
}

impl ServerCommand {
    pub fn has(&self, flag: &str) -> bool {
        self.flags.contains(flag)
    }

    /// The table's row, through the lookup that sessions use. `None` for subcommands of what is refused as a whole.
    pub fn row(&self) -> Option<&'static CommandSpec> {
        let words: Vec<&str> = self.name.split('|').collect();
        let container = lookup(words[0].as_bytes()).unwrap_or_else(|| panic!("the table lacks {}", self.name));
        if words.len() == 1 || container.subcommands.is_empty() {
            assert!(words.len() == 1 || matches!(container.class, Class::Refused(_)), "the table lacks {}", self.name);
            return (words.len() == 1).then_some(container);
        }
        let command = Command::new(&words);
        Some(container.subcommand(&command.args()).unwrap_or_else(|_| panic!("the table lacks {}", self.name)))
    }
}

/// All commands and subcommands of a server.
pub fn server_commands(client: &mut Client) -> Vec<ServerCommand> {
    let mut found = Vec::new();
    let mut open = client.line("COMMAND").items();
    while let Some(entry) = open.pop() {
        let fields = entry.items();
        found.push(ServerCommand {
            name: fields[0].text(),
            arity: fields[1].int(),
            flags: fields[2].items().iter().map(Value::text).collect(),
            has_key_specs: !fields[8].items().is_empty(),
        });
        open.extend(fields[9].items());
    }
    found
}

#[test]
fn every_command_of_the_servers_has_its_row() {
    let mut arities: BTreeMap<String, Vec<i64>> = BTreeMap::new();
    for engine in Engine::ALL {
        let server = Redis::start(engine);
        let commands = server_commands(&mut server.client());
        assert!(commands.len() > 350, "{engine:?} lists {} commands", commands.len());
        for command in commands {
            arities.entry(command.name.clone()).or_default().push(command.arity);
            if let Some(row) = command.row() {
                check_access(&command, row);
            }
        }
    }
    for (name, arities) in arities {
        check_arity(&name, &arities);
    }
}

fn check_access(command: &ServerCommand, row: &CommandSpec) {
    let expected = match (command.has("write"), command.has("readonly"), row.class) {
        // Neither is passed on as a command on data.
        (_, _, Class::Refused(_)) | (_, true, Class::AnyNode) => return,
        (true, _, _) => Access::Write,
        (_, true, _) => Access::Read,
        // Servers do not know what a script will do.
        (_, _, Class::Script) => Access::Write,
        _ => Access::None,
    };
    assert_eq!(row.access, expected, "{}", command.name);
    // Redis 7.0 does not mark WAIT as blocking.
    let blocks = command.has("blocking") || matches!(row.class, Class::Wait(_));
    assert_eq!(matches!(row.class, Class::Blocking | Class::Wait(_)), blocks, "{}", command.name);
    assert!(!command.has("pubsub") || !matches!(row.class, Class::Data | Class::AnyNode), "{}", command.name);
}

/// The table takes as many arguments as the most lenient server.
fn check_arity(name: &str, arities: &[i64]) {
    let command = ServerCommand { name: name.to_owned(), arity: 0, flags: BTreeSet::new(), has_key_specs: false };
    let Some(row) = command.row() else { return };
    for count in 1..16usize {
        let accepts = |arity: i64| if arity < 0 { count as i64 >= -arity } else { count as i64 == arity };
        assert_eq!(row.arity_ok(count), arities.iter().any(|arity| accepts(*arity)), "{name} with {count} arguments");
    }
}

/// Invocations of the commands whose keys are not at fixed places.
const MOVABLE: &[&str] = &[
    "BLMPOP 0 2 a b LEFT",
    "BZMPOP 0 2 a b MIN COUNT 2",
    "EVAL s 2 a b c",
    "EVAL s 0 a b c",
    "EVAL_RO s 1 a b",
    "EVALSHA s 1 a b",
    "EVALSHA_RO s 2 a b",
    "FCALL f 1 a b",
    "FCALL_RO f 2 a b",
    "GEORADIUS a 1 2 3 km",
    "GEORADIUS a 1 2 3 km WITHDIST STORE b",
    "GEORADIUS a 1 2 3 km STOREDIST b ASC",
    "GEORADIUSBYMEMBER a store 3 km STORE b",
    "LMPOP 3 a b c LEFT COUNT 10",
    "MSETEX 2 a 1 b 2 NX EX 10",
    "SINTERCARD 2 a b LIMIT 1",
    "SORT a BY x LIMIT 0 1 GET # GET y ALPHA STORE d",
    "SORT a BY store",
    "SORT_RO a BY x LIMIT 0 1",
    "XREAD COUNT 1 BLOCK 1 STREAMS a b 0 0",
    "XREAD STREAMS streams 0",
    "XREADGROUP GROUP g c COUNT 1 NOACK STREAMS a b c > > >",
    "ZDIFF 2 a b WITHSCORES",
    "ZDIFFSTORE d 2 a b",
    "ZINTER 2 a b WEIGHTS 1 2",
    "ZINTERCARD 2 a b",
    "ZINTERSTORE d 2 a b AGGREGATE MAX",
    "ZMPOP 1 a MIN",
    "ZUNION 1 a",
    "ZUNIONSTORE d 1 a",
];

#[test]
fn keys_are_where_the_servers_find_them() {
    for engine in Engine::ALL {
        let server = Redis::start(engine);
        let mut client = server.client();
        for command in server_commands(&mut client).iter().filter(|command| command.has_key_specs) {
            let Some(row) = command.row() else { continue };
            // Channels and cursors are no keys: the server would not tell.
            let routes = row.keys.iter().any(|part| part.effect == Effect::Route);
            if routes || matches!(row.class, Class::Refused(_)) {
                continue;
            }
            let samples = if command.has("movablekeys") { movable_samples(command) } else { fixed_samples(command) };
            for sample in samples {
                check_keys(&mut client, &sample);
            }
        }
    }
}

fn movable_samples(command: &ServerCommand) -> Vec<Vec<String>> {
    let own = |line: &&&str| line.split(' ').next().is_some_and(|name| name.eq_ignore_ascii_case(&command.name));
    let samples: Vec<_> = MOVABLE.iter().filter(own).map(|line| line.split(' ').map(str::to_owned).collect()).collect();
    assert!(!samples.is_empty(), "write invocations of {} into MOVABLE", command.name);
    samples
}

/// With as many arguments as are needed, and with some more where there may be more.
fn fixed_samples(command: &ServerCommand) -> Vec<Vec<String>> {
    let needed = command.arity.unsigned_abs() as usize;
    let lengths = if command.arity < 0 { needed..needed + 4 } else { needed..needed + 1 };
    let sample = |length: usize| {
        let names = command.name.split('|').map(str::to_owned);
        names.chain((1..).map(|number| format!("a{number}"))).take(length).collect()
    };
    lengths.map(sample).collect()
}

fn check_keys(client: &mut Client, sample: &[String]) {
    let question: Vec<&str> = ["COMMAND", "GETKEYSANDFLAGS"].into_iter().chain(sample.iter().map(String::as_str)).collect();
    let answer = client.call(&question);
    let command = Command::new(sample);
    let row = resolve(&command.args()).unwrap_or_else(|error| panic!("{sample:?}: {error:?}"));
    let found = row.keys(&command.args()).unwrap_or_else(|error| panic!("{sample:?}: {error}"));
    if let Value::Error(text) = &answer {
        // Servers stumble over PFMERGE without sources, which they execute all the same.
        let stumbled = sample.len() == 2 && sample[0].eq_ignore_ascii_case("pfmerge");
        let fits =
            if stumbled { text.contains("Invalid arguments") } else { text.contains("no key arguments") && found.is_empty() };
        assert!(fits, "{sample:?}: {text}, but the table has {found:?}");
        return;
    }
    let answer = answer.items();
    let theirs: Vec<String> = answer.iter().map(|entry| entry.items()[0].text()).collect();
    let ours: Vec<String> = found.iter().map(|key| sample[key.index as usize].clone()).collect();
    assert_eq!(ours, theirs, "{sample:?}");
    for (entry, key) in answer.iter().zip(found) {
        let flags: BTreeSet<String> = entry.items()[1].items().iter().map(Value::text).collect();
        check_effect(sample, key.effect, &flags);
    }
}

fn check_effect(sample: &[String], effect: Effect, flags: &BTreeSet<String>) {
    let has = |flag: &str| flags.contains(flag);
    // BITFIELD that only reads: the table does not look at its subcommands.
    let harmless = sample[0].eq_ignore_ascii_case("bitfield") && has("RO");
    let fits = match effect {
        Effect::Write if harmless => true,
        Effect::Route => has("not_key"),
        // Redis counts PFCOUNT's refreshed cache as a write.
        Effect::Read => has("RO") || (has("RW") && !has("insert") && !has("update") && !has("delete")),
        Effect::Delete => has("RM") || has("delete") || sample[0].eq_ignore_ascii_case("move"),
        // XREADGROUP changes what is pending, which servers do not count as part of the key.
        Effect::Update if sample[0].eq_ignore_ascii_case("xreadgroup") => has("RO"),
        Effect::Update => has("RW") && (has("delete") || has("update") || has("insert")),
        Effect::Write => (has("RW") || has("OW")) && (has("insert") || has("update")),
    };
    assert!(fits, "{sample:?}: the table says {effect:?}, the server {flags:?}");
}

#[test]
fn slots_are_the_servers_own() {
    let server = Redis::start_with(Engine::Redis7, &["--cluster-enabled", "yes"]);
    let mut client = server.client();
    let mut random = fastrand::Rng::with_seed(7);
    let hostile = ["", "a}b", "{}x", "x{}{y}", "{", "}", "{}", "{{}}", "{a", "a}{b}", "{a}{b}", "}{", "user:{1}", "{\0}\0"];
    let binary = (0..2000).map(|_| {
        let alphabet: &[u8] = if random.bool() { b"{}ab" } else { b"{}\0\xff\r\n:az" };
        (0..random.usize(0..40)).map(|_| alphabet[random.usize(0..alphabet.len())]).collect::<Vec<u8>>()
    });
    for key in hostile.iter().map(|key| key.as_bytes().to_vec()).chain(binary) {
        for name in [key.clone(), Companion::Stale.name(&key)] {
            let theirs = client.call(&[b"CLUSTER".as_slice(), b"KEYSLOT", &name]).int();
            assert_eq!(i64::from(slot_of(&name)), theirs, "{}", name.escape_ascii());
        }
        assert_eq!(slot_of(&Companion::Stale.name(&key)), slot_of(&key));
    }
}
