//! The commands that the test makes up.

use std::collections::{BTreeMap, VecDeque};

use larder::sidecar::commands::{Access, Class, Effect};

use crate::command_table::server_commands;
use crate::support::resp::Client;

/// One command.
pub type Words = Vec<Vec<u8>>;

/// Leaves a key without a TTL, as a script may.
pub const SCRIPT: &str = "redis.call('SET', KEYS[1], ARGV[1]) redis.call('PERSIST', KEYS[1]) return ARGV[1]";
/// SHA1 of [`SCRIPT`].
pub const SCRIPT_SHA: &str = "7c4d02528431ab7850be3248ce9bba330aeab195";
/// The same as a function.
pub const LIBRARY: &str = "#!lua name=larder_test\n\
    redis.register_function('leave_bare', function(keys, args) redis.call('SET', keys[1], args[1]) return redis.call('PERSIST', keys[1]) end)";

/// What `<…>` stands for:
///
/// - `<str>` and the other kinds: a key that mostly holds one; `<any>`: any of them. `<blist>`: a list that blocking commands fill.
/// - `<n>`: a small number; `<secs>`, `<millis>`: a TTL, perhaps above the bound; `<at>`, `<at-millis>`: a moment to come.
/// - `<id>`, `<above>`: the next ID of a stream, to be added or not; `<seen>`: one that was added to the stream before it, not long
///   ago.
/// - `<dump>`: a serialised string; `<script>`, `<sha>`: [`SCRIPT`].
pub const ALL: &[&str] = &[
    // Strings.
    "APPEND <str> x",
    "SET <str> v<n>",
    "SET <str> v<n> NX",
    "SET <str> v<n> XX GET",
    "SET <str> v<n> KEEPTTL",
    "SET <str> v<n> GET KEEPTTL",
    "SET <str> v<n> EX <secs>",
    "SET <str> v<n> NX PX <millis>",
    "SET <str> v<n> EXAT <at>",
    "SET <str> v<n> PXAT <at-millis>",
    "SET <str> v<n> IFEQ v1",
    "SET <str> v EX 0",
    "SET <str> v EX 10 PX 10",
    "SET <str> v EX no",
    "SET <str> v EX 9223372036854775807",
    "SET <num> <n>",
    "SET <flt> 1.5",
    "SETNX <str> v<n>",
    "SETNX <str> v1",
    "SETNX <num> 1",
    "SETNX <flt> 1",
    "SETNX <bits> x",
    "SETNX <bits> y",
    "SETEX <str> <secs> v<n>",
    "SETEX <str> 0 v<n>",
    "PSETEX <str> <millis> v<n>",
    "GETSET <str> v<n>",
    "GETDEL <str>",
    "GETEX <str>",
    "GETEX <str> PERSIST",
    "GETEX <str> EX <secs>",
    "GETEX <str> PX <millis>",
    "GETEX <str> EXAT <at>",
    "GETEX <list> PERSIST",
    "MSET <str> a <str> b <num> <n>",
    "MSETNX <str> a <str> b",
    "MSETNX <str> a",
    "MSETNX <num> 1",
    "MSETNX <flt> 1",
    "MSETEX 2 <str> a <str> b",
    "MSETEX 2 <str> a <str> b KEEPTTL",
    "MSETEX 2 <str> a <str> b XX EX <secs>",
    "SETRANGE <str> 2 x",
    "DELIFEQ <str> v<n>",
    "SET <str> v1",
    "DELIFEQ <str> v1",
    "SET <str> v1",
    "DELIFEQ <str> v1",
    "INCR <num>",
    "INCR <str>",
    "INCRBY <num> <n>",
    "DECR <num>",
    "DECRBY <num> <n>",
    "INCRBYFLOAT <flt> 0.25",
    "SETBIT <bits> <n> 1",
    "BITFIELD <bits> SET u8 0 <n> INCRBY u4 3 1",
    "BITFIELD <bits> GET u8 0",
    "BITOP AND <bits> <bits> <bits>",
    "BITOP NOT <bits> <bits>",
    "PFADD <hll> a<n> b<n>",
    "PFMERGE <hll> <hll> <hll>",
    // Keys of any type.
    "DEL <any> <any>",
    "UNLINK <any> <any>",
    "EXPIRE <any> <secs>",
    "EXPIRE <any> 0",
    "EXPIRE <any> no",
    "EXPIRE <any> 9223372036854775807",
    "EXPIRE <any> <secs> NX",
    "EXPIRE <any> <secs> XX",
    "EXPIRE <any> <secs> GT",
    "EXPIRE <any> <secs> LT",
    "EXPIRE <any> <secs> NX XX",
    "PEXPIRE <any> <millis>",
    "PEXPIRE <any> <millis> NX",
    "PEXPIRE <any> -1",
    "EXPIREAT <any> <at>",
    "EXPIREAT <any> <at> NX",
    "PEXPIREAT <any> <at-millis>",
    "PEXPIREAT <any> 1",
    "PERSIST <any>",
    "PERSIST <any>",
    "RENAME <str> <str>",
    "RENAME <list> <list>",
    "RENAMENX <hash> <hash>",
    "RENAMENX <list> <list>",
    "RENAMENX <num> <flt>",
    "RENAMENX <str> <str>",
    "RENAME <str> <str>",
    "COPY <str> <str> REPLACE",
    "COPY <zset> <zset>",
    "COPY <list> <list> DB 1 REPLACE",
    "COPY <str> <str> DB 1 REPLACE",
    "COPY <str> <str> DB 99",
    "MOVE <str> 1",
    "MOVE <set> 1",
    "MOVE <hash> 1",
    "RESTORE <str> 0 <dump> REPLACE",
    "RESTORE <str> <millis> <dump> REPLACE",
    "RESTORE <str> <at-millis> <dump> REPLACE ABSTTL",
    "RESTORE <str> 0 nonsense REPLACE",
    "SORT <list> ALPHA STORE <list>",
    "SORT <set> BY nosort GET # STORE <list>",
    "EVAL <script> 1 <str> v<n>",
    "EVAL <script> 2 <str> <str> v<n>",
    "EVAL error 1 <str>",
    "EVALSHA <sha> 1 <str> v<n>",
    "EVALSHA 0000000000000000000000000000000000000000 1 <str> v<n>",
    "FCALL leave_bare 1 <str> v<n>",
    // Lists.
    "LPUSH <list> a<n>",
    "LPUSH <str> a",
    "RPUSH <list> b<n> c<n>",
    "LPUSHX <list> d",
    "RPUSHX <list> e",
    "LINSERT <list> BEFORE a1 f",
    "LSET <list> 0 g",
    "LSET <list> 0 g",
    // More goes in than is taken out, so that the rest finds something.
    "RPUSH <list> a1 a2 a3 a4",
    "RPUSH <list> a1 a2 a3 a4 a5 a6",
    "LPUSH <list> a1 a2 a3 a4 a5 a6",
    "LPUSH <list> a1 a2 a3",
    "LREM <list> 1 a<n>",
    "LTRIM <list> 0 5",
    "LPOP <list>",
    "RPOP <list> 2",
    "LMPOP 2 <list> <list> LEFT",
    "LMOVE <list> <list> LEFT RIGHT",
    "RPOPLPUSH <list> <list>",
    "BLPOP <list> <list> 0.001",
    "BRPOP <list> 0.001",
    "BLMPOP 0.001 2 <list> <list> RIGHT",
    "BLMOVE <list> <blist> LEFT RIGHT 0.001",
    "BRPOPLPUSH <list> <blist> 0.001",
    "LPOP <blist> 100",
    // Sets.
    "SADD <set> a<n> b<n>",
    "SADD <set> a1 a2 a3 a4 a5 a6 a7 a8 a9",
    "SADD <set> a1 a2 a3 a4 a5 a6 a7 a8 a9 b1",
    "SREM <set> a<n>",
    "SPOP <set> 1000",
    "SMOVE <set> <set> a<n>",
    "SDIFFSTORE <set> <set> <set>",
    "SINTERSTORE <set> <set> <set>",
    "SUNIONSTORE <set> <set> <set>",
    // Sorted sets.
    "ZADD <zset> <n> a<n> <n> b<n>",
    "ZADD <zset> 1 a1 2 a2 3 a3 4 a4 5 a5 6 a6 7 a7 8 a8 9 a9 9 a",
    "ZADD <zset> 1 a1 2 a2 3 a3 4 a4 5 a5 6 a6 7 a7 8 a8 9 a9 9 b",
    "ZADD <zset> XX INCR 1 a<n>",
    "ZINCRBY <zset> <n> a<n>",
    "ZREM <zset> a<n>",
    "ZREMRANGEBYLEX <zset> [a2 [a3",
    "ZREMRANGEBYRANK <zset> 8 20",
    "ZREMRANGEBYRANK <zset> 5 20",
    "ZREMRANGEBYSCORE <zset> 8 20",
    "ZPOPMIN <zset>",
    "ZPOPMAX <zset> 2",
    "ZMPOP 2 <zset> <zset> MIN",
    "ZDIFFSTORE <zset> 2 <zset> <zset>",
    "ZINTERSTORE <zset> 2 <zset> <zset>",
    "ZUNIONSTORE <zset> 2 <zset> <zset>",
    "ZRANGESTORE <zset> <zset> 0 5",
    "BZPOPMIN <zset> 0.001",
    "BZPOPMAX <zset> <zset> 0.001",
    "BZMPOP 0.001 1 <zset> MAX",
    // Places.
    "GEOADD <geo> 13.<n> 38.<n> a<n>",
    "GEOADD <geo> 13.<n> 38.<n> a1",
    "GEOADD <geo> 13.<n> 38.<n> a1 13.5 38.5 a2",
    "GEORADIUS <geo> 13 38 500 km STORE <geo>",
    "GEORADIUS <geo> 13 38 500 km STOREDIST <geo>",
    "GEORADIUSBYMEMBER <geo> a1 500 km STORE <geo>",
    "GEORADIUSBYMEMBER <geo> a1 500 km STOREDIST <geo>",
    "GEOSEARCHSTORE <geo> <geo> FROMLONLAT 13 38 BYRADIUS 500 km",
    // Hashes.
    "HSET <hash> a<n> v<n> b<n> v",
    "HSET <hash> a1 v a2 v a3 v a4 v a5 v a6 v a7 v a8 v a9 v",
    "HMSET <hash> c v<n>",
    "HSETNX <hash> a<n> v",
    "HSETNX <hash> d<n> v",
    "HDEL <hash> a<n>",
    "HINCRBY <hash> count <n>",
    "HINCRBYFLOAT <hash> float 0.5",
    "HSETEX <hash> EX 5000 FIELDS 1 a<n> v<n>",
    "HGETEX <hash> PERSIST FIELDS 1 a<n>",
    "HGETDEL <hash> FIELDS 1 a<n>",
    "HEXPIRE <hash> 5000 FIELDS 1 a<n>",
    "HPEXPIRE <hash> 5000000 FIELDS 1 a<n>",
    "HEXPIREAT <hash> <at> FIELDS 1 a<n>",
    "HPEXPIREAT <hash> <at-millis> FIELDS 1 a<n>",
    "HEXPIRE <hash> 0 FIELDS 1 b<n>",
    "HPERSIST <hash> FIELDS 1 a<n>",
    "HEXPIRE <hash> 6000 FIELDS 3 a1 a2 a3",
    "HPERSIST <hash> FIELDS 3 a1 a2 a3",
    "HPERSIST <hash> FIELDS 4 a1 a2 a3 a4",
    "HGETEX <hash> PERSIST FIELDS 3 a1 a2 a3",
    "HGETEX <hash> EX 4000 FIELDS 2 a1 a2",
    // Streams.
    "XADD <stream> <id> field v<n>",
    "XADD <stream> NOMKSTREAM <id> field v<n>",
    "XADD <stream> MAXLEN 5 <id> field v<n>",
    "XADD <stream> <id> field v<n>",
    "XDEL <stream> 1-1",
    "XDEL <stream> <seen>",
    "XTRIM <stream> MAXLEN 4",
    "XTRIM <stream> MAXLEN 1",
    "XSETID <stream> <above>",
    "XSETID <stream> <above>",
    "XGROUP CREATE <stream> g<n> 0 MKSTREAM",
    "XGROUP CREATE <stream> g1 0 MKSTREAM",
    "XGROUP CREATE <stream> g1 0 MKSTREAM",
    "XGROUP CREATE <stream> g1 0 MKSTREAM",
    "XGROUP CREATE <stream> g1 $ MKSTREAM",
    "XGROUP CREATECONSUMER <stream> g1 c<n>",
    "XGROUP DELCONSUMER <stream> g1 c<n>",
    "XGROUP DELCONSUMER <stream> g1 c1",
    "XGROUP DELCONSUMER <stream> g1 c2",
    "XGROUP CREATECONSUMER <stream> g1 c2",
    "XGROUP CREATECONSUMER <stream> g1 c1",
    "XGROUP SETID <stream> g1 0",
    "XGROUP DESTROY <stream> g<n>",
    "XGROUP DESTROY <stream> g1",
    "XREADGROUP GROUP g1 c1 COUNT 2 STREAMS <stream> >",
    "XREADGROUP GROUP g1 c1 BLOCK 1 STREAMS <stream> >",
    "XACK <stream> g1 <seen>",
    "XACK <stream> g1 <seen> <seen>",
    "XACK <stream> g1 <seen> <seen> 1-1",
    "XCLAIM <stream> g1 c1 0 <seen>",
    "XAUTOCLAIM <stream> g1 c1 0 0 COUNT 1",
    "XGROUP CREATECONSUMER <stream> g1 d<n>",
    "XGROUP DELCONSUMER <stream> g1 d<n>",
    "XGROUP SETID <stream> g1 1-1",
    "XCLAIM <stream> g1 c2 0 <seen> FORCE",
    "XAUTOCLAIM <stream> g1 c2 0 0",
];

const KINDS: [&str; 11] = ["str", "num", "flt", "bits", "hll", "list", "set", "zset", "geo", "hash", "stream"];

/// How keys are called.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Keys {
    /// `RULE:KIND` and a number.
    Plain,
    /// With a hash tag, so that all lie in one slot of a Cluster, which has one database.
    Tagged,
}

impl Keys {
    /// Every key that a command may name.
    pub fn all(self) -> Vec<String> {
        let both = |(rule, kind)| [1, 2].map(|number| self.name(rule, kind, number));
        let kinds = ["c", "r", "s", "u"].into_iter().flat_map(|rule| KINDS.into_iter().map(move |kind| (rule, kind)));
        kinds.chain([("b", "list")]).flat_map(both).collect()
    }

    fn name(self, rule: &str, kind: &str, number: u8) -> String {
        format!("{rule}:{}{kind}{number}", if self == Keys::Tagged { "{t}" } else { "" })
    }

    /// The databases that commands may reach, the first last.
    pub fn databases(self) -> &'static [&'static str] {
        if self == Keys::Tagged { &["0"] } else { &["1", "0"] }
    }
}

/// The name by which COMMAND knows a template's command.
pub fn name(line: &str) -> String {
    let mut words = line.split(' ').map(str::to_lowercase);
    let first = words.next().unwrap();
    if first == "xgroup" { format!("{first}|{}", words.next().unwrap()) } else { first }
}

/// The name by which COMMAND knows a command.
pub fn name_of(words: &Words) -> String {
    let text = |word: &Vec<u8>| String::from_utf8_lossy(word).into_owned();
    name(&words.iter().take(2).map(text).collect::<Vec<_>>().join(" "))
}

/// The commands of a server that write to keys and that the sidecar passes on. A Cluster never moves a key to another database.
pub fn write_commands(client: &mut Client, keys: Keys) -> Vec<String> {
    let writes = |command: &crate::command_table::ServerCommand| {
        let row = command.row()?;
        let names_keys = row.keys.iter().any(|part| part.effect != Effect::Route);
        let passed_on = !matches!(row.class, Class::Refused(_));
        let can_succeed = keys == Keys::Plain || command.name != "move";
        (row.access == Access::Write && names_keys && passed_on && can_succeed).then(|| command.name.clone())
    };
    server_commands(client).iter().filter_map(writes).collect()
}

/// Fills templates.
pub struct Random {
    keys: Keys,
    random: fastrand::Rng,
    dump: Vec<u8>,
    next_id: u64,
    /// The last key that was chosen.
    last: Vec<u8>,
    /// The newest IDs that were to be added to each stream.
    added: BTreeMap<Vec<u8>, VecDeque<Vec<u8>>>,
    now_secs: i64,
}

/// How many IDs of a stream are remembered.
const REMEMBERED: usize = 3;

impl Random {
    pub fn new(seed: u64, keys: Keys, client: &mut Client) -> Self {
        let name = keys.name("u", "dumped", 0);
        client.call(&["SET", &name, "v"]);
        let crate::support::resp::Value::Bulk(dump) = client.call(&["DUMP", &name]) else { panic!("DUMP answers with bytes") };
        client.call(&["DEL", &name]);
        let now_secs = client.line("TIME").items()[0].text().parse().unwrap();
        let random = fastrand::Rng::with_seed(seed);
        Self { keys, random, dump, next_id: 0, last: Vec::new(), added: BTreeMap::new(), now_secs }
    }

    pub fn shuffle(&mut self, templates: &mut [&str]) {
        self.random.shuffle(templates);
    }

    /// How many commands go together: mostly one, else a transaction.
    pub fn batch(&mut self) -> usize {
        if self.random.u8(..) < 220 { 1 } else { self.random.usize(2..6) }
    }

    /// A command after a template.
    pub fn fill(&mut self, line: &str) -> Words {
        line.split(' ').map(|word| self.fill_word(word)).collect()
    }

    fn fill_word(&mut self, word: &str) -> Vec<u8> {
        let (Some(open), Some(close)) = (word.find('<'), word.find('>')) else {
            return word.as_bytes().to_vec();
        };
        if close < open {
            return word.as_bytes().to_vec();
        }
        let filled = self.placeholder(&word[open + 1..close]);
        [&word.as_bytes()[..open], &filled, &word.as_bytes()[close + 1..]].concat()
    }

    fn placeholder(&mut self, name: &str) -> Vec<u8> {
        let lengths = [1000, 3600, 7200, 7201, 100_000, 31_536_000];
        let secs: i64 = lengths[self.random.usize(0..lengths.len())];
        match name {
            "n" => self.random.u8(1..10).to_string().into_bytes(),
            "secs" => secs.to_string().into_bytes(),
            "millis" => (secs * 1000).to_string().into_bytes(),
            "at" => (self.now_secs + secs).to_string().into_bytes(),
            "at-millis" => ((self.now_secs + secs) * 1000).to_string().into_bytes(),
            "above" => self.above(),
            "id" => {
                let id = self.above();
                let added = self.added.entry(self.last.clone()).or_default();
                added.push_back(id.clone());
                if added.len() > REMEMBERED {
                    added.pop_front();
                }
                id
            }
            "seen" => {
                let added = self.added.get(&self.last).filter(|added| !added.is_empty());
                added.map_or_else(|| b"1-1".to_vec(), |added| added[self.random.usize(0..added.len())].clone())
            }
            "dump" => self.dump.clone(),
            "script" => SCRIPT.as_bytes().to_vec(),
            "sha" => SCRIPT_SHA.as_bytes().to_vec(),
            "blist" => self.keys.name("b", "list", self.random.u8(1..3)).into_bytes(),
            "any" => {
                let kind = KINDS[self.random.usize(0..KINDS.len())];
                self.key(kind)
            }
            kind => {
                assert!(KINDS.contains(&kind), "<{kind}> is no placeholder");
                self.key(kind)
            }
        }
    }

    fn above(&mut self) -> Vec<u8> {
        self.next_id += 1;
        format!("{}-1", self.next_id).into_bytes()
    }

    fn key(&mut self, kind: &str) -> Vec<u8> {
        let rule = ["c", "r", "s", "u"][self.random.usize(0..4)];
        self.last = self.keys.name(rule, kind, self.random.u8(1..3)).into_bytes();
        self.last.clone()
    }
}
