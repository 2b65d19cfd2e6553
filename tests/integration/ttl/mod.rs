//! No covered key is ever without a TTL, and clients cannot tell.
//!
//! Random commands go to two servers of the same kind: as they are to a bare one, as planned to another. Replies and contents
//! must be equal; on the planned one every covered key has a TTL within its bound after every command, and whenever a second
//! client looks; a stale copy holds what its key holds, and outlives it by no more than it may. Replies that speak of TTLs cannot be equal; `answers` holds what they must be.

mod answers;
mod crash;
mod sidecar;
mod templates;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use larder::policy::{Lifetime, Percent, Span};
use larder::sidecar::commands::resolve;
use larder::sidecar::engine::ttl::{Cover, Coverage, EXEC, MULTI, TtlPlan, plan};
use larder::sidecar::slots::Companion;

use self::templates::{Keys, Random, Words};
use crate::command_table::{Command, server_commands};
use crate::support::resp::{Client, Value, encode, show};
use crate::support::server::{Engine, Redis};

/// How often each write command must succeed: without an error, and so that a covered key holds something else afterwards, or for
/// another time. In transactions it is not known which command did what, and none is counted.
const SUCCESSES: u32 = 50;
/// In so many rounds every template comes once; then those of commands that have not yet succeeded often enough come more often.
const ALIKE: usize = 30;
/// The most rounds over all templates until it has.
const MOST_ROUNDS: usize = 400;

const LIFETIME: Lifetime = Lifetime { default: Span::from_secs(3600), max: Span::from_secs(7200), jitter: Percent::new(10) };

/// How long stale copies outlive their keys.
const STALE: Span = Span::from_secs(600);

/// `c:` and `b:` are covered; `r:` is, and has companions; `s:` is, and has stale copies; `u:` is not.
#[derive(Debug, Clone, Copy)]
struct Rules(Option<Flaw>);

/// What a test of the test breaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Flaw {
    /// Lists get no default TTL.
    ListsKeepNone,
    /// There is no bound.
    Unbounded,
    /// Companions stay.
    CompanionsStay,
    /// Every other write forgets the stale copy.
    CopiesStay,
    /// Stale copies live twice as long.
    CopiesLinger,
}

impl Coverage for Rules {
    fn cover(&self, key: &[u8]) -> Option<Cover> {
        static COVERED: AtomicU32 = AtomicU32::new(0);
        let (loaded_through, copied) = (key.starts_with(b"r:"), key.starts_with(b"s:"));
        let covered = loaded_through || copied || key.starts_with(b"c:") || key.starts_with(b"b:");
        if !covered || (self.0 == Some(Flaw::ListsKeepNone) && key.starts_with(b"c:list")) {
            return None;
        }
        let max = if self.0 == Some(Flaw::Unbounded) { Span::MAX } else { LIFETIME.max };
        let forgotten = self.0 == Some(Flaw::CopiesStay) && COVERED.fetch_add(1, Ordering::Relaxed).is_multiple_of(2);
        let companions = (loaded_through && self.0 != Some(Flaw::CompanionsStay)) || (copied && !forgotten);
        let stale = match self.0 {
            _ if !copied => Span::default(),
            Some(Flaw::CopiesLinger) => Span::from_millis(2 * STALE.as_millis()),
            _ => STALE,
        };
        Some(Cover { lifetime: Lifetime { max, ..LIFETIME }, companions, stale, writes_copy: copied })
    }
}

/// How commands come to the guarded server.
trait Way {
    /// The client whose connection they take.
    fn client(&mut self) -> &mut Client;

    /// One command; the client's reply.
    fn call(&mut self, words: &Words) -> Value;

    /// A transaction of the client's own; the elements of its reply.
    fn transaction(&mut self, batch: &[Words]) -> Value;
}

/// Sends commands as the engine plans them.
struct Guarded {
    client: Client,
    rules: Rules,
    random: fastrand::Rng,
}

impl Guarded {
    fn plan(&mut self, words: &Words) -> (TtlPlan, Vec<u8>) {
        let command = Command::new(words);
        let args = command.args();
        let mut planned = Vec::new();
        let Ok(spec) = resolve(&args) else { return (TtlPlan::Forward, planned) };
        let (rules, random) = (self.rules, &mut self.random);
        (plan(&args, spec, &rules, &mut || random.u32(..), &mut planned), planned)
    }
}

impl Way for Guarded {
    fn client(&mut self) -> &mut Client {
        &mut self.client
    }

    fn call(&mut self, words: &Words) -> Value {
        let (plan, planned) = self.plan(words);
        let mut bytes = Vec::new();
        let replies = plan.write(&encode(words), words.len(), &planned, &mut bytes);
        self.client.send(&bytes).unwrap();
        let mut replies: Vec<Value> = (0..replies).map(|_| self.client.read().unwrap()).collect();
        if !matches!(plan, TtlPlan::Wrap { .. }) {
            return replies.swap_remove(0);
        }
        let executed = replies.pop().unwrap();
        let queued = replies.swap_remove(1);
        if queued.is_error() {
            return queued;
        }
        match executed {
            Value::Array(mut elements) => elements.swap_remove(0),
            other => other,
        }
    }

    fn transaction(&mut self, batch: &[Words]) -> Value {
        let (mut bytes, mut extras) = (MULTI.to_vec(), Vec::new());
        for words in batch {
            let (plan, planned) = self.plan(words);
            extras.push(plan.write_queued(&encode(words), words.len(), &planned, &mut bytes));
        }
        bytes.extend_from_slice(EXEC);
        self.client.send(&bytes).unwrap();
        let commands = batch.len() as u32 + extras.iter().sum::<u32>();
        for _ in 0..=commands {
            let queued = self.client.read().unwrap();
            assert!(matches!(queued, Value::Simple(_)), "{queued:?}");
        }
        let Value::Array(elements) = self.client.read().unwrap() else { panic!("EXEC answers with an array") };
        let mut elements = elements.into_iter();
        let own = extras.into_iter().map(|extra| {
            let own = elements.next().unwrap();
            elements.by_ref().take(extra as usize).for_each(drop);
            own
        });
        Value::Array(own.collect())
    }
}

/// Gives back the covered keys among KEYS whose TTL is missing or above the bound.
const OFFENDERS: &str = "local bad = {} for _, key in ipairs(KEYS) do local ttl = redis.call('PTTL', key) \
                         if ttl == -1 or ttl > tonumber(ARGV[1]) then bad[#bad + 1] = key .. ' ' .. ttl end end return bad";

fn offenders(client: &mut Client, keys: &[String]) -> Vec<String> {
    let (count, max) = (keys.len().to_string(), LIFETIME.max.as_millis().to_string());
    let head = ["EVAL_RO", OFFENDERS, &count].into_iter();
    let words: Vec<&str> = head.chain(keys.iter().map(String::as_str)).chain([max.as_str()]).collect();
    client.call(&words).items().iter().map(Value::text).collect()
}

/// KEYS: keys, each with its stale copy behind it. Gives back the number of copies there are, and those that are not what they
/// must be. One second's grace is for a server's own rounding of TTLs.
const WRONG_COPIES: &str = "\
local found, wrong = 0, {}
for i = 1, #KEYS, 2 do
  local copy = redis.pcall('GET', KEYS[i + 1])
  if copy then
    found = found + 1
    local value, left = redis.pcall('GET', KEYS[i]), redis.call('PTTL', KEYS[i + 1]) - redis.call('PTTL', KEYS[i])
    if copy ~= value or left > ARGV[1] + 1000 then wrong[#wrong + 1] = KEYS[i] .. ' ' .. left end
  end
end
return {found, wrong}";

fn covered_keys(keys: Keys) -> Vec<String> {
    keys.all().into_iter().filter(|key| Rules(None).cover(key.as_bytes()).is_some()).collect()
}

/// How many stale copies there are, and those that are not right. `copied`: keys, each with its copy's name behind it.
fn copies(client: &mut Client, copied: &[Vec<u8>]) -> (i64, Vec<Value>) {
    let (count, stale) = (copied.len().to_string(), STALE.as_millis().to_string());
    let head = [b"EVAL_RO".as_slice(), WRONG_COPIES.as_bytes(), count.as_bytes()];
    let words: Vec<&[u8]> = head.into_iter().chain(copied.iter().map(Vec::as_slice)).chain([stale.as_bytes()]).collect();
    let [found, wrong] = &client.call(&words).items()[..] else { panic!("the check of copies failed") };
    (found.int(), wrong.items())
}

/// The keys that have stale copies, each with its copy's name behind it.
fn copied_keys(keys: Keys) -> Vec<Vec<u8>> {
    let copied = keys.all().into_iter().filter(|key| key.starts_with("s:"));
    copied.flat_map(|key| [key.clone().into_bytes(), Companion::Stale.name(key.as_bytes())]).collect()
}

/// A second client that looks all the time, until it is dropped.
struct Observer {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<(u64, Vec<String>)>>,
}

impl Observer {
    fn start(server: &Redis, keys: Keys) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let (seen, mut client) = (stop.clone(), server.client());
        // What a blocking command moves has its TTL a moment later, by design.
        let keys: Vec<String> = covered_keys(keys).into_iter().filter(|key| !key.starts_with("b:")).collect();
        let thread = std::thread::spawn(move || {
            let (mut looks, mut bad) = (0, Vec::new());
            while !seen.load(Ordering::Relaxed) {
                bad.extend(offenders(&mut client, &keys));
                looks += 1;
                std::thread::sleep(Duration::from_millis(1));
            }
            (looks, bad)
        });
        Self { stop, thread: Some(thread) }
    }

    /// What it saw.
    fn finish(mut self) {
        self.stop.store(true, Ordering::Relaxed);
        let (looks, bad) = self.thread.take().unwrap().join().unwrap();
        assert!(looks > 100, "the second client looked {looks} times");
        assert!(bad.is_empty(), "a second client saw {bad:?}");
    }
}

impl Drop for Observer {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        let _ = self.thread.take().map(JoinHandle::join);
    }
}

struct Pair<W> {
    keys: Keys,
    bare: Client,
    guarded: W,
    /// On the guarded server, for questions.
    checker: Client,
    covered: Vec<String>,
    /// The keys that have stale copies, each with its copy's name behind it.
    copied: Vec<Vec<u8>>,
    /// How many copies were looked at.
    copies_seen: i64,
    successes: BTreeMap<String, u32>,
}

impl<W: Way> Pair<W> {
    /// `way` leads to the server `guarded`.
    fn start(bare: &Redis, guarded: &Redis, keys: Keys, resp3: bool, way: W) -> Self {
        let mut pair = Self {
            keys,
            bare: bare.client(),
            guarded: way,
            checker: guarded.client(),
            covered: covered_keys(keys),
            copied: copied_keys(keys),
            copies_seen: 0,
            successes: BTreeMap::new(),
        };
        for client in [&mut pair.bare, pair.guarded.client()] {
            if resp3 {
                assert!(!client.line("HELLO 3").is_error());
            }
        }
        for client in [&mut pair.bare, &mut pair.checker] {
            assert!(!client.call(&["FUNCTION", "LOAD", "REPLACE", templates::LIBRARY]).is_error());
            assert_eq!(client.call(&["SCRIPT", "LOAD", templates::SCRIPT]).text(), templates::SCRIPT_SHA);
        }
        pair
    }

    /// One command on both.
    fn step(&mut self, words: &Words) {
        let loaded = self.plant_companions(std::slice::from_ref(words));
        let covered: Vec<&[u8]> = words.iter().map(Vec::as_slice).filter(|word| Rules(None).cover(word).is_some()).collect();
        let before = held(&mut self.checker, &covered);
        let ours = self.guarded.call(words);
        let theirs = self.bare.call(words);
        let exists = self.bare.call(&[b"EXISTS", words[1].as_slice()]) == Value::Int(1);
        answers::check(words, &theirs, &ours, Some(exists));
        if !ours.is_error() && held(&mut self.checker, &covered) != before {
            *self.successes.entry(templates::name_of(words)).or_default() += 1;
        }
        self.check_ttls(&show(words));
        self.check_companions(loaded, &show(words));
    }

    /// A client's own transaction on both.
    fn transaction(&mut self, batch: &[Words]) {
        let shown = batch.iter().map(|words| show(words)).collect::<Vec<_>>().join(" | ");
        let loaded = self.plant_companions(batch);
        let ours = self.guarded.transaction(batch).items();
        self.bare.line("MULTI");
        batch.iter().for_each(|words| drop(self.bare.call(words)));
        let theirs = self.bare.line("EXEC").items();
        assert_eq!(ours.len(), theirs.len(), "{shown}");
        for ((words, theirs), ours) in batch.iter().zip(&theirs).zip(&ours) {
            answers::check(words, theirs, ours, None);
        }
        self.check_ttls(&shown);
        self.check_companions(loaded, &shown);
    }

    fn check_ttls(&mut self, shown: &str) {
        let bad = offenders(&mut self.checker, &self.covered);
        assert!(bad.is_empty(), "{shown} left {bad:?}");
        let (seen, wrong) = copies(&mut self.checker, &self.copied);
        self.copies_seen += seen;
        assert_eq!(wrong, [], "{shown} left stale copies that are not right");
    }

    /// Gives the keys of `batch` that are loaded through their companions. Returns them with what they hold.
    fn plant_companions(&mut self, batch: &[Words]) -> Vec<(String, String)> {
        let keys = batch.iter().flatten().filter(|word| word.starts_with(b"r:"));
        let keys: Vec<String> = keys.map(|key| String::from_utf8(key.clone()).unwrap()).collect();
        let plant = |key: String| {
            let [lease, stale, negative] = companions(&key);
            self.checker.call(&[b"MSET".as_slice(), &lease, b"x", &stale, b"x", &negative, b"x"]);
            let content = content(&mut self.checker, &key);
            (key, content)
        };
        keys.into_iter().map(plant).collect()
    }

    /// What changed has no companions left.
    fn check_companions(&mut self, planted: Vec<(String, String)>, shown: &str) {
        for (key, before) in planted {
            if content(&mut self.checker, &key) != before {
                let [lease, stale, negative] = companions(&key);
                let left = self.checker.call(&[b"EXISTS".as_slice(), &lease, &stale, &negative]);
                assert_eq!(left, Value::Int(0), "{shown} left companions of {key}");
            }
        }
    }

    /// Every template once, in this order.
    fn round(&mut self, templates: &[&str], random: &mut Random) {
        let mut rest = templates;
        while !rest.is_empty() {
            let (batch, tail) = rest.split_at(random.batch().min(rest.len()));
            rest = tail;
            let batch: Vec<Words> = batch.iter().map(|line| random.fill(line)).collect();
            match &batch[..] {
                [words] => self.step(words),
                batch => self.transaction(batch),
            }
        }
    }

    /// The commands that have not yet succeeded often enough.
    fn missing<'n>(&self, needed: &'n [String]) -> Vec<&'n String> {
        needed.iter().filter(|name| self.successes.get(*name).copied().unwrap_or(0) < SUCCESSES).collect()
    }

    /// All keys hold the same on both, in all databases; the covered ones have their TTLs in the other database too.
    fn check_contents(&mut self) {
        for database in self.keys.databases() {
            for client in [&mut self.bare, &mut self.checker] {
                client.call(&["SELECT", database]);
            }
            for key in self.keys.all() {
                let (theirs, ours) = (content(&mut self.bare, &key), content(&mut self.checker, &key));
                assert_eq!(ours, theirs, "{key} in database {database}");
            }
            let bad = offenders(&mut self.checker, &self.covered);
            assert!(bad.is_empty(), "in database {database}: {bad:?}");
        }
    }

    /// Empties the other databases, where else MOVE would soon find every name taken.
    fn empty_the_others(&mut self) {
        for database in self.keys.databases() {
            for client in [&mut self.bare, &mut self.checker] {
                client.call(&["SELECT", database]);
                if *database != "0" {
                    client.line("FLUSHDB");
                }
            }
        }
    }
}

/// The companions that a write must remove.
fn companions(key: &str) -> [Vec<u8>; 3] {
    [Companion::Lease, Companion::Stale, Companion::Negative].map(|companion| companion.name(key.as_bytes()))
}

/// What keys hold, and until when, in one text. Equal only where nothing has changed.
fn held(client: &mut Client, keys: &[&[u8]]) -> String {
    const HELD: &[u8] = b"local all = {} for _, key in ipairs(KEYS) do \
                          all[#all + 1] = (redis.call('DUMP', key) or 'none') .. ' ' .. redis.call('PEXPIRETIME', key) end \
                          return redis.sha1hex(table.concat(all, ' '))";
    let count = keys.len().to_string();
    let words: Vec<&[u8]> = [b"EVAL_RO".as_slice(), HELD, count.as_bytes()].into_iter().chain(keys.iter().copied()).collect();
    client.call(&words).text()
}

/// What a key holds, in an order of its own.
fn content(client: &mut Client, key: &str) -> String {
    let (question, sorted): (&[&str], bool) = match client.call(&["TYPE", key]).text().as_str() {
        "string" => (&["GET"], false),
        "list" => (&["LRANGE", "0", "-1"], false),
        "set" => (&["SMEMBERS"], true),
        "zset" => (&["ZRANGE", "0", "-1", "WITHSCORES"], false),
        "hash" => (&["HVALS"], true),
        "stream" => (&["XRANGE", "-", "+"], false),
        other => return other.to_owned(),
    };
    let words: Vec<&str> = [question[0], key].into_iter().chain(question[1..].iter().copied()).collect();
    let reply = client.call(&words);
    // The checker speaks RESP2, the bare client perhaps RESP3: only texts are compared.
    let mut texts = Vec::new();
    flatten(&reply, &mut texts);
    if sorted {
        texts.sort();
    }
    texts.join(" ")
}

fn flatten(value: &Value, texts: &mut Vec<String>) {
    match value {
        Value::Array(_) | Value::Set(_) | Value::Map(_) => value.items().iter().for_each(|item| flatten(item, texts)),
        Value::Bulk(bytes) => texts.push(bytes.escape_ascii().to_string()),
        Value::Double(text) => texts.push(text.clone()),
        other => texts.push(format!("{other:?}")),
    }
}

fn run(engine: Engine, resp3: bool, seed: u64, rules: Rules) {
    let guarded = Redis::start(engine);
    let way = Guarded { client: guarded.client(), rules, random: fastrand::Rng::with_seed(3) };
    compare(&Redis::start(engine), &guarded, Keys::Plain, resp3, seed, way);
}

/// Plays until each write command has succeeded often enough on the server `guarded`, to which `way` leads, and on a bare one.
fn compare(bare: &Redis, guarded: &Redis, keys: Keys, resp3: bool, seed: u64, way: impl Way) {
    let engine = guarded.engine();
    let observer = Observer::start(guarded, keys);
    let mut pair = Pair::start(bare, guarded, keys, resp3, way);
    let names: Vec<String> = server_commands(&mut bare.client()).into_iter().map(|command| command.name).collect();
    let needed = templates::write_commands(&mut bare.client(), keys);
    assert!(needed.len() >= 100, "{engine:?} has {} write commands", needed.len());
    let mut random = Random::new(seed, keys, &mut bare.client());
    let templates: Vec<&str> = templates::ALL.iter().copied().filter(|line| names.contains(&templates::name(line))).collect();
    for round in 0..MOST_ROUNDS {
        let mut playing = templates.clone();
        if round >= ALIKE {
            let missing = pair.missing(&needed);
            let rare = templates.iter().filter(|line| missing.iter().any(|name| **name == templates::name(line)));
            playing.extend(rare.flat_map(|line| [*line; 3]));
        }
        random.shuffle(&mut playing);
        pair.round(&playing, &mut random);
        if round % 10 == 0 {
            pair.check_contents();
        }
        if round % 5 == 0 {
            pair.empty_the_others();
        }
        if pair.missing(&needed).is_empty() {
            println!("{engine:?}: {} rounds for {} commands", round + 1, needed.len());
            break;
        }
    }
    pair.check_contents();
    let mut fewest: Vec<(u32, &String)> =
        needed.iter().map(|name| (pair.successes.get(name).copied().unwrap_or(0), name)).collect();
    fewest.sort();
    println!("{engine:?}: the fewest successes {:?}", &fewest[..fewest.len().min(12)]);
    let rare: Vec<_> = pair.missing(&needed).into_iter().map(|name| (name, pair.successes.get(name))).collect();
    assert!(rare.is_empty(), "these succeeded too rarely: {rare:?}");
    assert!(pair.copies_seen > 1000, "only {} stale copies were looked at", pair.copies_seen);
    observer.finish();
}

#[test]
fn no_covered_key_is_without_a_ttl_on_redis() {
    run(Engine::Redis7, false, 11, Rules(None));
}

#[test]
fn no_covered_key_is_without_a_ttl_on_valkey() {
    run(Engine::Valkey9, true, 12, Rules(None));
}

#[test]
fn the_check_catches_what_it_is_for() {
    for (flaw, word) in [
        (Flaw::ListsKeepNone, "left [\"c:list"),
        (Flaw::Unbounded, "left [\""),
        (Flaw::CompanionsStay, "left companions of r:"),
        (Flaw::CopiesStay, "left stale copies that are not right"),
        (Flaw::CopiesLinger, "left stale copies that are not right"),
    ] {
        let broken = std::panic::catch_unwind(|| run(Engine::Redis7, false, 13, Rules(Some(flaw))));
        let message = broken.expect_err("a broken engine passed").downcast::<String>().expect("a message");
        assert!(message.contains(word), "{flaw:?}: {message}");
    }
}
