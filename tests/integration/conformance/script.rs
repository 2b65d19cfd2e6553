//! The commands that the test makes up, from what a server says of itself in COMMAND DOCS.

use std::collections::BTreeMap;

use crate::support::resp::{Client, Value};

/// One command.
pub type Words = Vec<Vec<u8>>;

/// How many invocations of each command.
const INVOCATIONS: usize = 12;
/// Tags whose slots lie in different shards of three.
const TAGS: [&str; 3] = ["{a}", "{b}", "{c}"];

/// An argument, as COMMAND DOCS describes it.
#[derive(Debug, Clone)]
struct Argument {
    name: String,
    kind: String,
    token: Option<String>,
    optional: bool,
    multiple: bool,
    multiple_token: bool,
    parts: Vec<Argument>,
}

/// A command or subcommand, as COMMAND DOCS describes it.
#[derive(Debug, Clone)]
pub struct Described {
    /// Such as `get` and `client|id`.
    pub name: String,
    group: String,
    arguments: Vec<Argument>,
}

/// What keeps COMMAND DOCS' arguments from being meaningful, or the answers from being comparable: these are used instead.
/// `K` stands for a key's tag and type, as in `Kset1`.
const INSTEAD: &[(&str, &[&str])] = &[
    // At random, unless all is taken.
    ("spop", &["Kset1 1000", "Kset2 1000", "Knone", "Kstring1", "Kset1 -1", "Kset1 x"]),
    // Its own ID would be the time.
    (
        "xadd",
        &[
            "Kstream1 1-1 f v",
            "Kstream1 9-1 f v g w",
            "Kstream2 NOMKSTREAM 3-3 f v",
            "Kstream1 MAXLEN = 3 99-1 f v",
            "Kstream1 0-0 f v",
            "Kstream1 x f v",
            "Kstring1 1-1 f v",
            "Kstream2 5-* f v",
        ],
    ),
    ("xsetid", &["Kstream1 200-1", "Kstream1 1-1", "Knone 1-1"]),
    ("migrate", &[]),
    (
        "client|tracking",
        &[
            "ON",
            "OFF",
            "x",
            "OFF x",
            "ON x",
            "ON REDIRECT x",
            "ON REDIRECT 999999",
            "ON PREFIX a",
            "ON OPTIN OPTOUT",
            "ON BCAST OPTIN",
            "ON BCAST PREFIX a PREFIX ab",
            "ON BCAST PREFIX a PREFIX a",
            "ON OPTIN NOLOOP",
        ],
    ),
    ("client|caching", &["YES", "NO", "x"]),
    // What follows OFF and SKIP is in the conversations.
    ("client|reply", &["ON", "x"]),
    ("client|no-touch", &["ON", "OFF", "x"]),
    ("client|import-source", &["ON", "OFF", "x"]),
    ("client|list", &["", "TYPE normal", "TYPE x", "ID x", "x"]),
    (
        "client|kill",
        &["ID 999999", "ID x", "1.2.3.4:5", "TYPE x", "TYPE replica", "USER x", "SKIPME x", "nonsense x", "ID 999999 ADDR"],
    ),
    ("client|unblock", &["999999", "999999 ERROR", "999999 nonsense", "x"]),
    ("restore", &["Knone 0 nonsense", "Kstring1 0 nonsense", "Kstring1 -1 x REPLACE", "Kstring1 x x"]),
    (
        "eval",
        &[
            "return{1,2,'x'} 0",
            "return{KEYS[1],ARGV[1]} 1 Kstring1 x",
            "return{redis.call('get',KEYS[1])} 1 Kstring1",
            "return{redis.call('set',KEYS[1],ARGV[1])} 1 Kstring1 v",
            "nonsense( 0",
            "return{redis.error_reply('MY ERR')} 0",
            "return{1} 2 Kstring1",
            "return{1} x",
            "return{1} -1",
            "return{true,false,3.7} 0",
        ],
    ),
    ("eval_ro", &["return{redis.call('get',KEYS[1])} 1 Kstring1", "return{redis.call('set',KEYS[1],1)} 1 Kstring1"]),
    ("evalsha", &["0000000000000000000000000000000000000000 0", "x 0", "0000000000000000000000000000000000000000 1 Kstring1"]),
    ("evalsha_ro", &["0000000000000000000000000000000000000000 0", "x 0"]),
    ("fcall", &["none 0", "none 1 Kstring1", "none x"]),
    ("fcall_ro", &["none 0", "none 1 Kstring1"]),
    ("function|load", &["nonsense", "REPLACE nonsense"]),
    ("function|restore", &["nonsense"]),
    ("function|kill", &[""]),
    ("script|kill", &[""]),
    ("script|load", &["return{1}", "nonsense("]),
    ("script|exists", &["0000000000000000000000000000000000000000", "e0e1f9fabfc9d4800c877a703b823ac0578ff8db x"]),
    // Subcommands alone are commands.
    ("command|getkeys", &["GET a", "MSET a 1 b 2", "PING", "EVAL x 1 k", "NONSENSE a"]),
    ("command|getkeysandflags", &["GET a", "SET a b", "PING"]),
    ("command|info", &["get", "set get nonsense"]),
    ("command|docs", &["get", "nonsense"]),
    ("command|list", &["FILTERBY PATTERN xr*", "FILTERBY ACLCAT hyperloglog", "FILTERBY x y"]),
    ("config|get", &["maxmemory-policy", "maxclients", "list-* hash-*", "nonsense"]),
    (
        "hello",
        &["", "2", "3", "4", "x", "2 SETNAME me", "3 SETNAME", "2 NONSENSE", "3 AUTH x", "2 AUTH nobody x", "3 AUTH nobody x"],
    ),
    ("auth", &["x", "default x", "nobody x", "a b c"]),
    ("select", &["0", "3", "15", "16", "-1", "x", "99999999999"]),
    ("reset", &[""]),
    ("swapdb", &["0 0", "0 x", "0 99"]),
    ("move", &["Kstring1 0", "Knone 1", "Kstring1 x", "Kstring1 99"]),
    (
        "copy",
        &[
            "Kstring1 Kstring2",
            "Kstring1 Kstring2 REPLACE",
            "Klist1 Klist2 REPLACE",
            "Knone Kstring2",
            "Kstring1 Kstring1",
            "Kstring1 Kstring2 DB x",
        ],
    ),
    (
        "sort",
        &[
            "Klist1 ALPHA",
            "Klist1 ALPHA DESC LIMIT 0 2",
            "Kset1 ALPHA",
            "Klist1 ALPHA STORE Klist2",
            "Kstring1",
            "Klist1 LIMIT x 1",
            "Klist1",
        ],
    ),
    ("sort_ro", &["Klist1 ALPHA", "Kset1 ALPHA DESC", "Kstring1", "Klist1"]),
    // Where it ends differs: 0 is where all begin.
    (
        "scan",
        &["0 COUNT 100000", "0 MATCH x* COUNT 100000", "0 COUNT 100000 TYPE list", "x", "0 COUNT x", "0 COUNT 0", "0 NONSENSE"],
    ),
    ("sscan", &["Kset1 0 COUNT 1000", "Kset1 x", "Kstring1 0", "Knone 0"]),
    ("hscan", &["Khash1 0 COUNT 1000", "Khash1 x", "Kstring1 0", "Knone 0"]),
    ("zscan", &["Ksorted_set1 0 COUNT 1000", "Ksorted_set1 x", "Kstring1 0"]),
    ("info", &["server", "nonsense"]),
    ("object|freq", &["Kstring1", "Knone"]),
    ("flushall", &["x", "SYNC x"]),
    ("flushdb", &["x"]),
    ("keys", &["*", "x*"]),
    ("cluster|keyslot", &["a", "{a}b", "x{}y"]),
    ("cluster|countkeysinslot", &["x", "-1", "16384", "15495", "3300"]),
    ("cluster|getkeysinslot", &["x 1", "16384 1", "15495 1000", "15495 x"]),
    ("cluster|replicas", &["nonsense"]),
    ("cluster|slaves", &["nonsense"]),
    ("cluster|count-failure-reports", &["nonsense"]),
    (
        "cluster|slot-stats",
        &[
            "SLOTSRANGE 0 0",
            "SLOTSRANGE 0 16383",
            "SLOTSRANGE 15490 15500",
            "SLOTSRANGE x 1",
            "SLOTSRANGE 5 1",
            "ORDERBY KEY-COUNT LIMIT 2 ASC",
            "ORDERBY cpu-usec",
            "ORDERBY key-count LIMIT 0",
            "nonsense 1",
        ],
    ),
    ("latency|graph", &["none"]),
    // Nothing may wait for ever.
    ("blpop", &["Klist1 0.01", "Knone Klist2 0.01", "Knone 0.01", "Kstring1 0.01", "Klist1 x", "Klist1 -1"]),
    ("brpop", &["Klist1 0.01", "Knone 0.01", "Kstring1 0.01", "Klist1 x"]),
    (
        "blmove",
        &[
            "Klist1 Klist2 LEFT RIGHT 0.01",
            "Knone Klist2 LEFT RIGHT 0.01",
            "Klist1 Kstring1 LEFT RIGHT 0.01",
            "Klist1 Klist2 UP RIGHT 0.01",
        ],
    ),
    ("brpoplpush", &["Klist1 Klist2 0.01", "Knone Klist2 0.01", "Klist1 Kstring1 0.01"]),
    ("blmpop", &["0.01 2 Klist1 Klist2 LEFT", "0.01 1 Knone LEFT COUNT 2", "0.01 x Klist1 LEFT", "0.01 1 Klist1 RIGHT COUNT 2"]),
    ("bzpopmin", &["Ksorted_set1 0.01", "Knone 0.01", "Kstring1 0.01"]),
    ("bzpopmax", &["Ksorted_set1 Ksorted_set2 0.01", "Knone 0.01", "Ksorted_set1 x"]),
    ("bzmpop", &["0.01 1 Ksorted_set1 MIN", "0.01 1 Knone MAX COUNT 2", "0.01 2 Ksorted_set1 MIN"]),
    (
        "xread",
        &[
            "COUNT 1 STREAMS Kstream1 0",
            "BLOCK 10 STREAMS Kstream1 $",
            "BLOCK 10 STREAMS Kstream1 0",
            "STREAMS Kstring1 0",
            "STREAMS Kstream1 Kstream2 0",
            "COUNT x STREAMS Kstream1 0",
            "BLOCK 10",
        ],
    ),
    (
        "xreadgroup",
        &[
            "GROUP group one COUNT 1 STREAMS Kstream1 >",
            "GROUP group one BLOCK 10 STREAMS Kstream1 >",
            "GROUP none one STREAMS Kstream1 >",
            "GROUP group one STREAMS Kstream1 0",
        ],
    ),
    ("wait", &["0 10", "x 10", "0 -1", "0"]),
    ("waitaof", &["0 0 10", "x 0 10", "0 0 -1"]),
    ("multi", &[""]),
    ("exec", &[""]),
    ("discard", &[""]),
    ("watch", &["Kstring1", "Kstring1 Kstring2"]),
    ("unwatch", &[""]),
    ("subscribe", &["news"]),
    ("psubscribe", &["n*"]),
    ("ssubscribe", &["Knews"]),
    ("unsubscribe", &["news", ""]),
    ("punsubscribe", &["n*", ""]),
    ("sunsubscribe", &["Knews", ""]),
    ("quit", &[""]),
    ("debug", &[]),
    ("lolwut", &[""]),
    ("mget", &["Kstring1 Kstring2 Knone", "Kstring1 Kset1", "{a}string1 {b}string1 {c}string1"]),
    ("mset", &["Kstring1 a Kstring2 b", "Kstring1", "{a}string1 1 {b}string1 2", "{a}string1 1 {b}string1"]),
    ("del", &["Kstring1 Knone", "{a}string2 {b}string2"]),
    ("unlink", &["Kstring2 Knone", "{a}string2 {b}string2"]),
    ("exists", &["Kstring1 Kstring1 Knone", "{a}string1 {b}string1"]),
    ("touch", &["Kstring1 Knone", "{a}string1 {b}string1"]),
];

/// Commands that follow one another on one connection, by the command that they are about. Each brings one reply; of several in one
/// string, which are sent at once, the last does.
pub const CONVERSATIONS: &[(&str, &[&str])] = &[
    ("multi", &["MULTI", "SET {a}x 1", "INCR {a}x", "LPUSH {a}x y", "GET {a}x", "EXEC", "GET {a}x"]),
    ("multi", &["MULTI", "MULTI", "SET {a}x", "EXEC", "PING"]),
    ("multi", &["MULTI", "NONSENSE {a}x", "GET {a}x", "EXEC"]),
    ("exec", &["EXEC", "MULTI", "EXEC"]),
    ("discard", &["DISCARD", "MULTI", "SET {a}x 9", "DISCARD", "GET {a}x", "EXEC"]),
    ("watch", &["WATCH {a}x {a}y", "MULTI", "GET {a}x", "EXEC", "MULTI", "WATCH {a}x", "DISCARD"]),
    ("watch", &["WATCH {a}x", "SET {a}x 2", "MULTI", "GET {a}x", "EXEC", "GET {a}x"]),
    ("unwatch", &["WATCH {a}x", "SET {a}x 3", "UNWATCH", "MULTI", "GET {a}x", "EXEC", "UNWATCH"]),
    (
        "subscribe",
        &["SUBSCRIBE news", "PING", "SUBSCRIBE news", "SUBSCRIBE other", "UNSUBSCRIBE news", "UNSUBSCRIBE other", "PING"],
    ),
    ("psubscribe", &["PSUBSCRIBE n*", "SUBSCRIBE news", "PUNSUBSCRIBE n*", "UNSUBSCRIBE news", "GET {a}x"]),
    ("ssubscribe", &["SSUBSCRIBE {a}news", "SSUBSCRIBE {a}other", "SUNSUBSCRIBE {a}news", "SUNSUBSCRIBE {a}other", "GET {a}x"]),
    ("unsubscribe", &["UNSUBSCRIBE", "UNSUBSCRIBE none", "PUNSUBSCRIBE", "SUNSUBSCRIBE"]),
    ("reset", &["MULTI", "RESET", "EXEC", "CLIENT SETNAME me", "RESET", "CLIENT GETNAME"]),
    (
        "client|tracking",
        &[
            "CLIENT TRACKING ON",
            "CLIENT TRACKINGINFO",
            "GET {a}x",
            "CLIENT TRACKING ON BCAST",
            "CLIENT CACHING YES",
            "CLIENT TRACKING ON OPTIN",
            "CLIENT CACHING NO",
            "CLIENT CACHING x",
            "CLIENT CACHING YES",
            "CLIENT TRACKINGINFO",
            "GET {a}x",
            "CLIENT TRACKINGINFO",
            "CLIENT TRACKING ON OPTOUT",
            "CLIENT GETREDIR",
            "CLIENT TRACKING OFF",
            "CLIENT TRACKINGINFO",
        ],
    ),
    (
        "client|tracking",
        &[
            "CLIENT TRACKING ON BCAST PREFIX a PREFIX b",
            "CLIENT TRACKING ON BCAST PREFIX ab",
            "CLIENT TRACKING ON BCAST PREFIX a",
            "CLIENT TRACKING ON BCAST PREFIX c NOLOOP",
            "CLIENT TRACKINGINFO",
            "RESET",
            "CLIENT TRACKING ON BCAST",
            "CLIENT TRACKINGINFO",
            "CLIENT TRACKING ON BCAST PREFIX a",
        ],
    ),
    ("client|reply", &["CLIENT REPLY SKIP\nPING\nECHO x", "CLIENT REPLY OFF\nSET {a}x 1\nGET {a}x\nCLIENT REPLY ON", "GET {a}x"]),
    ("client|reply", &["CLIENT REPLY SKIP\nMULTI\nSET {a}x 1", "EXEC", "CLIENT REPLY SKIP\nEXEC\nECHO x"]),
    ("client|no-touch", &["CLIENT NO-TOUCH ON", "GET {a}string1", "CLIENT NO-TOUCH ON", "CLIENT NO-TOUCH OFF", "GET {a}string1"]),
    ("client|setname", &["CLIENT SETNAME me", "CLIENT GETNAME", "HELLO 2 SETNAME other", "CLIENT GETNAME"]),
    ("hello", &["HELLO 3", "HGETALL {a}hash1", "HELLO 2", "HGETALL {a}hash1", "HELLO 3", "SMEMBERS {a}none1"]),
];

/// Fills keys, so that commands find something.
const SEED: &[&str] = &[
    "SET Kstring1 hello",
    "SET Kstring2 12",
    "SETBIT Kbitmap1 7 1",
    "DEL Klist1 Klist2 Kset1 Kset2 Khash1 Ksorted_set1 Kgeo1 Kstream1",
    "RPUSH Klist1 a b c 1 2 3",
    "RPUSH Klist2 b",
    "SADD Kset1 a b c",
    "SADD Kset2 1 2 3",
    "HSET Khash1 a 1 b two c 3",
    "ZADD Ksorted_set1 1 a 2 b 3 c",
    "ZADD Ksorted_set2 5 b 7 z",
    "GEOADD Kgeo1 13.361389 38.115556 a 15.087269 37.502669 b",
    "PFADD Khyperloglog1 a b c",
    "XADD Kstream1 1-1 f v",
    "XADD Kstream1 2-1 f w",
    "XGROUP CREATE Kstream1 group 0",
];

/// What a server says of its commands, sorted by name, containers left out.
pub fn described(client: &mut Client) -> Vec<Described> {
    let mut found = Vec::new();
    for (name, docs) in pairs(&client.line("COMMAND DOCS")) {
        let docs: BTreeMap<String, Value> = pairs(&docs).into_iter().collect();
        match docs.get("subcommands") {
            Some(subcommands) => {
                for (name, docs) in pairs(subcommands) {
                    found.push(describe(name, &pairs(&docs).into_iter().collect()));
                }
            }
            None => found.push(describe(name, &docs)),
        }
    }
    found.sort_by(|one, other| one.name.cmp(&other.name));
    found
}

fn pairs(value: &Value) -> Vec<(String, Value)> {
    value.items().chunks(2).map(|pair| (pair[0].text(), pair[1].clone())).collect()
}

fn describe(name: String, docs: &BTreeMap<String, Value>) -> Described {
    let arguments = docs.get("arguments").map_or_else(Vec::new, read_arguments);
    Described { name, group: docs["group"].text(), arguments }
}

fn read_arguments(list: &Value) -> Vec<Argument> {
    let read = |entry: &Value| {
        let fields: BTreeMap<String, Value> = pairs(entry).into_iter().collect();
        let flags: Vec<String> =
            fields.get("flags").map_or_else(Vec::new, |flags| flags.items().iter().map(Value::text).collect());
        let has = |flag: &str| flags.iter().any(|other| other == flag);
        Argument {
            name: fields["name"].text(),
            kind: fields["type"].text(),
            token: fields.get("token").map(Value::text),
            optional: has("optional"),
            multiple: has("multiple"),
            multiple_token: has("multiple_token"),
            parts: fields.get("arguments").map_or_else(Vec::new, read_arguments),
        }
    };
    list.items().iter().map(read).collect()
}

/// Makes up commands. The same seed makes the same.
pub struct Script {
    random: fastrand::Rng,
    tag: &'static str,
    group: String,
    /// Where the number of keys belongs, once they are known.
    count_at: Option<usize>,
}

impl Script {
    pub fn new(seed: u64) -> Self {
        Self { random: fastrand::Rng::with_seed(seed), tag: TAGS[0], group: String::new(), count_at: None }
    }

    /// Commands that fill the keys of every tag.
    pub fn seed(&mut self) -> Vec<Words> {
        let mut all = Vec::new();
        for tag in TAGS {
            self.tag = tag;
            all.extend(SEED.iter().map(|line| self.words(line)));
        }
        all
    }

    /// Several invocations of one command, wrong ones included.
    pub fn invocations(&mut self, command: &Described) -> Vec<Words> {
        let head: Vec<Vec<u8>> = command.name.split('|').map(|word| word.as_bytes().to_vec()).collect();
        self.group.clone_from(&command.group);
        if let Some((_, tails)) = INSTEAD.iter().find(|(name, _)| *name == command.name) {
            return tails.iter().map(|tail| self.with_tail(&head, tail)).collect();
        }
        let one = |script: &mut Self| {
            script.tag = TAGS[script.random.usize(0..TAGS.len())];
            script.count_at = None;
            let mut words = head.clone();
            command.arguments.iter().for_each(|argument| script.fill(argument, &mut words));
            script.spoil(&mut words, head.len());
            words
        };
        let count = if command.arguments.is_empty() { 2 } else { INVOCATIONS };
        (0..count).map(|_| one(self)).collect()
    }

    fn with_tail(&mut self, head: &Words, tail: &str) -> Words {
        self.tag = TAGS[self.random.usize(0..TAGS.len())];
        let mut words = head.clone();
        words.extend(self.words(tail));
        words
    }

    pub fn words(&self, line: &str) -> Words {
        let key = |word: &str| match word.strip_prefix('K') {
            Some(rest) => format!("{}{rest}", self.tag).into_bytes(),
            None => word.as_bytes().to_vec(),
        };
        line.split_whitespace().map(key).collect()
    }

    /// One command in six is not as it should be.
    fn spoil(&mut self, words: &mut Words, head: usize) {
        match self.random.u8(0..24) {
            0 => words.push(b"extra".to_vec()),
            1 if words.len() > head => drop(words.pop()),
            2 | 3 if words.len() > head + 1 => {
                let at = self.random.usize(head + 1..words.len());
                words[at] = b"nonsense".to_vec();
            }
            _ => {}
        }
    }

    fn fill(&mut self, argument: &Argument, out: &mut Words) {
        if argument.optional && self.random.bool() {
            return;
        }
        let times = if argument.multiple { self.random.usize(1..4) } else { 1 };
        for time in 0..times {
            if let Some(token) = argument.token.as_ref().filter(|_| time == 0 || argument.multiple_token) {
                out.push(if token == "\"\"" { Vec::new() } else { token.clone().into_bytes() });
            }
            self.fill_value(argument, out);
        }
        if argument.kind == "key"
            && argument.multiple
            && let Some(at) = self.count_at.take()
        {
            out[at] = times.to_string().into_bytes();
        }
    }

    fn fill_value(&mut self, argument: &Argument, out: &mut Words) {
        let name = argument.name.as_str();
        let word = match argument.kind.as_str() {
            "pure-token" => return,
            "oneof" => {
                let part = self.random.usize(0..argument.parts.len());
                return self.fill(&Argument { optional: false, ..argument.parts[part].clone() }, out);
            }
            "block" => return argument.parts.iter().for_each(|part| self.fill(part, out)),
            "key" => self.key(name),
            "integer" if name == "numkeys" => {
                self.count_at = Some(out.len());
                "1".to_owned()
            }
            "integer" => self.integer(name),
            "unix-time" => self.pick(&["1", "4000000000", "4000000000000"]),
            "double" => self.pick(&["0", "1.5", "-2", "3", "100"]),
            "pattern" => self.pick(&["*", "a*", "nosort", "[abc]"]),
            _ => self.string(name),
        };
        out.push(word.into_bytes());
    }

    /// Mostly of the type that the command is for.
    fn key(&mut self, _name: &str) -> String {
        let own = ["string", "list", "set", "sorted_set", "hash", "stream", "geo", "hyperloglog", "bitmap"];
        let group = self.group.replace('-', "_");
        let kind = match self.random.u8(0..12) {
            0 => "none",
            1 => own[self.random.usize(0..own.len())],
            _ if own.contains(&group.as_str()) => &group,
            _ => own[self.random.usize(0..own.len())],
        };
        format!("{}{kind}{}", self.tag, self.random.u8(1..3))
    }

    /// Never a time that ends while the test runs.
    fn integer(&mut self, name: &str) -> String {
        match name {
            "seconds" => self.pick(&["-1", "0", "100000", "200000"]),
            "milliseconds" | "ttl" => self.pick(&["-1", "0", "100000000", "200000000"]),
            "min-idle-time" | "ms" | "idle" => "0".to_owned(),
            "unix-time-milliseconds" => "1".to_owned(),
            "bit" => self.pick(&["0", "1"]),
            _ => self.pick(&["0", "1", "2", "3", "7", "-1"]),
        }
    }

    fn string(&mut self, name: &str) -> String {
        match name {
            "group" => "group".to_owned(),
            "consumer" => self.pick(&["one", "two"]),
            "id" | "start" | "end" | "lastid" | "last-id" => self.pick(&["0", "1-1", "2-1", "3", "-", "+"]),
            "min" | "max" => self.pick(&["-", "+", "[a", "(c", "1", "-inf", "+inf"]),
            "encoding" => self.pick(&["u8", "i5", "u64"]),
            _ => self.pick(&["a", "b", "c", "1", "two", "3.5"]),
        }
    }

    fn pick(&mut self, pool: &[&str]) -> String {
        pool[self.random.usize(0..pool.len())].to_owned()
    }
}
