//! The decisions, one line each; what they do to real servers is an integration test.

use std::ops::Range;

use proptest::prelude::*;

use super::super::super::commands::resolve;
use super::super::super::slots::Companion;
use super::*;
use crate::policy::{Percent, Span};

/// `c:` is covered with 100 s, at most 1000 s; `r:` too, and has companions; `s:` too, whose writes keep copies for 60 s more; `l:`
/// too, whose loads do; anything else is not covered.
struct Rules;

impl Coverage for Rules {
    fn cover(&self, key: &[u8]) -> Option<Cover> {
        let lifetime = Lifetime { default: Span::from_secs(100), max: Span::from_secs(1000), jitter: Percent::new(10) };
        let (writes_copy, loads_copy) = (key.starts_with(b"s:"), key.starts_with(b"l:"));
        let stale = if writes_copy || loads_copy { Span::from_secs(60) } else { Span::default() };
        let companions = key.starts_with(b"r:") || writes_copy || loads_copy;
        (companions || key.starts_with(b"c:")).then_some(Cover { lifetime, companions, stale, writes_copy })
    }

    fn database(&self) -> u32 {
        2
    }
}

proptest! {
    /// Whatever the arguments are, what is sent is well-formed, has the client's command in it, and touches no other key.
    #[test]
    fn any_arguments_give_whole_commands(
        name in prop::sample::select(NAMES),
        rest in prop::collection::vec(prop::sample::select(WORDS), 0..8),
    ) {
        let line = [&[name], &rest[..]].concat().join(" ");
        let ranges = ranges_of(&line);
        let args = CommandArgs::new(line.as_bytes(), &ranges);
        let Ok(spec) = resolve(&args) else { return Ok(()) };
        let sent = sent(&line);
        let commands: Vec<&str> = sent.split(" | ").collect();
        let keys = spec.keys(&args).unwrap_or_default();
        prop_assert!(keys.iter().all(|key| (key.index as usize) < args.len()));
        let covered = |key: &KeyAt| Rules.cover(args.get(key.index as usize).unwrap_or_default()).is_some();
        if !keys.iter().any(covered) {
            prop_assert_eq!(&commands, &[line.as_str()]);
        }
        if commands[0] == "MULTI" {
            prop_assert_eq!(commands.last(), Some(&"EXEC"));
            // The one command that another stands for.
            let wanted = if name == "PERSIST" { "PEXPIRE" } else { name };
            prop_assert_eq!(commands[1].split(' ').next(), Some(wanted));
        }
    }
}

const NAMES: &[&str] = &[
    "SET",
    "GET",
    "GETEX",
    "SETEX",
    "EXPIRE",
    "EXPIREAT",
    "PERSIST",
    "MSET",
    "MSETEX",
    "RESTORE",
    "COPY",
    "RENAME",
    "EVAL",
    "SORT",
    "GEORADIUS",
    "BLMOVE",
    "BLMPOP",
    "XREAD",
    "XREADGROUP",
    "ZUNIONSTORE",
    "DEL",
    "INCR",
    "OBJECT",
    "XGROUP",
    "UNKNOWN.CMD",
];

const WORDS: &[&str] = &[
    "c:1",
    "r:1",
    "s:1",
    "x",
    "0",
    "1",
    "2",
    "-1",
    "9223372036854775807",
    "-9223372036854775808",
    "99999999999999999999",
    "NX",
    "XX",
    "GT",
    "GET",
    "EX",
    "PX",
    "EXAT",
    "KEEPTTL",
    "PERSIST",
    "DB",
    "STORE",
    "BY",
    "LIMIT",
    "STREAMS",
    "BLOCK",
    "GROUP",
    "IFEQ",
    "ABSTTL",
    "CREATE",
    "r:a}{b",
    "",
];

/// Where the words of `line` are in it.
fn ranges_of(line: &str) -> Vec<Range<u32>> {
    let mut end = 0;
    let range = |word: &str| {
        let start = end;
        end += word.len() as u32 + 1;
        start..end - 1
    };
    line.split(' ').map(range).collect()
}

/// What is sent instead of `line`, as words with ` | ` between commands. Companions are shown as `<l:KEY>`.
fn sent(line: &str) -> String {
    let ranges = ranges_of(line);
    let words: Vec<&str> = line.split(' ').collect();
    let args = CommandArgs::new(line.as_bytes(), &ranges);
    let spec = resolve(&args).expect("a command");
    let (mut command, mut planned, mut out) = (Vec::new(), Vec::new(), Vec::new());
    encode::command(&mut command, &words);
    let plan = plan(&args, spec, &Rules, &mut || 0, &mut planned);
    let replies = plan.write(&command, words.len(), &planned, &mut out);
    let commands = decode(&out);
    assert_eq!(commands.len(), replies as usize, "{line}");
    commands.join(" | ")
}

/// Splits RESP commands, strictly.
fn decode(mut bytes: &[u8]) -> Vec<String> {
    let mut commands = Vec::new();
    while !bytes.is_empty() {
        let words = (0..take_number(&mut bytes, b'*')).map(|_| {
            let length = take_number(&mut bytes, b'$');
            let (word, rest) = bytes.split_at(length);
            bytes = rest.strip_prefix(b"\r\n").expect("the argument ends where its length says");
            match Companion::parse(word) {
                Some((companion, key)) => format!("<{}:{}>", char::from(companion.letter()), key.escape_ascii()),
                None => word.escape_ascii().to_string(),
            }
        });
        commands.push(words.collect::<Vec<_>>().join(" "));
    }
    commands
}

fn take_number(bytes: &mut &[u8], kind: u8) -> usize {
    let end = memchr::memchr(b'\r', bytes).expect("a header ends");
    let (header, rest) = bytes.split_at(end);
    *bytes = rest.strip_prefix(b"\r\n").expect("a header ends");
    assert_eq!(header[0], kind);
    std::str::from_utf8(&header[1..]).expect("text").parse().expect("a number")
}

#[track_caller]
fn check(line: &str, expected: &str) {
    assert_eq!(sent(line), expected, "{line}");
}

/// The command as it came, and `extra` behind it in one transaction.
#[track_caller]
fn check_wrapped(line: &str, extra: &str) {
    check(line, &format!("MULTI | {line} | {extra} | EXEC"));
}

#[track_caller]
fn check_forwarded(line: &str) {
    check(line, line);
}

#[test]
fn what_needs_nothing_is_sent_as_it_came() {
    for line in [
        "GET c:1",
        "SET x 1",
        "SET c:1 v EX 1000",
        "SET c:1 v NX PX 5",
        "SETEX c:1 1000 v",
        "SETEX c:1 no v",
        "INCR x",
        "MSET x 1 y 2",
        "DEL c:1",
        "LPOP c:1",
        "HDEL c:1 f",
        "HEXPIRE c:1 10 FIELDS 1 f",
        "EXPIRE c:1 1000",
        "EXPIRE c:1 -1",
        "EXPIRE c:1 no",
        "EXPIRE c:1 10 GT",
        "GETEX c:1",
        "GETEX c:1 EX 10",
        "GETDEL c:1",
        "EVAL s 1 x c:1",
        "EVAL s 1",
        "EVAL_RO s 1 c:1",
        "RESTORE c:1 1000000 d",
        "COPY c:1 x",
        "COPY c:1 x DB 3",
        "RENAME c:1 x",
        "SORT c:1",
        "SMOVE c:1 x m",
        "BLPOP c:1 0",
        "TTL c:1",
        "JSON.SET x $ 1",
        "FLUSHALL",
    ] {
        check_forwarded(line);
    }
}

#[test]
fn set_gets_a_ttl_as_an_argument() {
    check("SET c:1 v", "SET c:1 v PX 100000");
    check("set c:1 v nx get", "set c:1 v nx get PX 100000");
    check("SET c:1 v IFEQ ex", "SET c:1 v IFEQ ex PX 100000");
}

#[test]
fn a_ttl_that_stays_or_goes_is_made_up_for() {
    let default = "PEXPIRE c:1 100000 NX";
    for line in ["SET c:1 v KEEPTTL", "SET c:1 v XX KEEPTTL GET", "INCR c:1", "HSET c:1 f v", "SETNX c:1 v", "GETSET c:1 v"] {
        check_wrapped(line, default);
    }
    for line in ["RESTORE c:1 0 d", "RESTORE c:1 0 d ABSTTL", "LMOVE x c:1 LEFT LEFT", "SMOVE x c:1 m", "SORT x STORE c:1"] {
        check_wrapped(line, default);
    }
    check_wrapped("MSET c:1 1 x 2 c:3 3", "PEXPIRE c:1 100000 NX | PEXPIRE c:3 100000 NX");
}

#[test]
fn a_ttl_that_is_too_long_is_cut() {
    let cap = "PEXPIRE c:1 1000000 LT";
    for line in
        ["SET c:1 v EX 1001", "SET c:1 v PXAT 1", "SETEX c:1 1001 v", "PSETEX c:1 1000001 v", "EXPIRE c:1 9223372036854775807"]
    {
        check_wrapped(line, cap);
    }
    for line in ["EXPIREAT c:1 1", "PEXPIREAT c:1 1 GT", "GETEX c:1 EXAT 1", "GETEX c:1 PX 1000001", "RESTORE c:1 1 d ABSTTL"] {
        check_wrapped(line, cap);
    }
}

#[test]
fn what_cannot_be_read_is_guarded_twice() {
    let both = "PEXPIRE c:1 100000 NX | PEXPIRE c:1 1000000 LT";
    for line in [
        "SET c:1 v EX 1 PX 1",
        "SET c:1 v NEWOPTION",
        "SET c:1 v EX",
        "GETEX c:1 EX",
        "GETEX c:1 PERSIST EX 1",
        "JSON.SET c:1 $ 1",
    ] {
        check_wrapped(line, both);
    }
    for line in ["EVAL s 1 c:1", "FCALL f 2 c:1 x", "RENAME x c:1", "COPY x c:1", "MSETEX 2 c:1 1 x 2 EX 5"] {
        check_wrapped(line, both);
    }
}

#[test]
fn expire_nx_acts_as_lt_and_persist_restores_the_default() {
    check("EXPIRE c:1 10 NX", "EXPIRE c:1 10 LT");
    check("pexpire c:1 10 nx NX", "pexpire c:1 10 LT");
    check("EXPIRE c:1 1001 NX", "MULTI | EXPIRE c:1 1001 LT | PEXPIRE c:1 1000000 LT | EXEC");
    check("EXPIREAT c:1 1 NX", "MULTI | EXPIREAT c:1 1 LT | PEXPIRE c:1 1000000 LT | EXEC");
    check_forwarded("EXPIRE c:1 10 NX XX");
    check_forwarded("EXPIRE x 10 NX");
    check("PERSIST c:1", "PEXPIRE c:1 100000");
    check_forwarded("PERSIST x");
    check("GETEX c:1 PERSIST", "GETEX c:1 PX 100000");
}

#[test]
fn blocking_commands_are_repaired_and_copies_elsewhere_guarded_there() {
    check("BLMOVE x c:1 LEFT LEFT 0", "BLMOVE x c:1 LEFT LEFT 0 | PEXPIRE c:1 100000 NX");
    check("BRPOPLPUSH x c:1 0", "BRPOPLPUSH x c:1 0 | PEXPIRE c:1 100000 NX");
    let there = "SELECT 5 | PEXPIRE c:1 100000 NX | PEXPIRE c:1 1000000 LT | SELECT 2";
    check_wrapped("COPY x c:1 REPLACE DB 5", there);
}

#[test]
fn writes_of_keys_that_are_loaded_through_remove_the_companions() {
    let gone = "UNLINK <l:r:1> <s:r:1> <n:r:1>";
    check("SET r:1 v", &format!("MULTI | SET r:1 v PX 100000 | {gone} | EXEC"));
    for line in ["SET r:1 v EX 5", "DEL r:1", "GETDEL r:1", "EXPIRE r:1 0", "LPOP r:1", "HDEL r:1 f", "RENAME r:1 x"] {
        check_wrapped(line, gone);
    }
    check_wrapped("INCR r:1", &format!("PEXPIRE r:1 100000 NX | {gone}"));
    check_wrapped("DEL r:1 c:2 r:3", "UNLINK <l:r:1> <s:r:1> <n:r:1> <l:r:3> <s:r:3> <n:r:3>");
    check("EXPIRE r:1 10 NX", "EXPIRE r:1 10 LT");
    check("PERSIST r:1", "PEXPIRE r:1 100000");
    for line in ["GET r:1", "EXPIRE r:1 5", "GETEX r:1 EX 5", "TOUCH r:1", "SORT r:1"] {
        check_forwarded(line);
    }
}

#[test]
fn a_write_that_surely_stores_for_a_known_time_writes_the_copy() {
    let copied = |body: &str, millis: u32| format!("MULTI | {body} | UNLINK <l:s:1> <n:s:1> | SET <s:s:1> v PX {millis} | EXEC");
    check("SET s:1 v", &copied("SET s:1 v PX 100000", 160_000));
    for line in ["SET s:1 v EX 1000", "set s:1 v px 1000000", "SETEX s:1 1000 v", "PSETEX s:1 1000000 v"] {
        check(line, &copied(line, 1_060_000));
    }
    let gone = "UNLINK <l:s:1> <s:s:1> <n:s:1>";
    for line in ["SET s:1 v NX", "SET s:1 v XX", "SET s:1 v GET", "SET s:1 v IFEQ x"] {
        check(line, &format!("MULTI | {line} PX 100000 | {gone} | EXEC"));
    }
    for line in
        ["SET s:1 v EX 0", "SET s:1 v EX -1", "SETEX s:1 0 v", "SETEX s:1 no v", "DEL s:1", "LPOP s:1", "SET s:1 v NX EX 5"]
    {
        check_wrapped(line, gone);
    }
    for line in ["SET s:1 v EX 1001", "SET s:1 v PXAT 5", "SETEX s:1 1001 v"] {
        check_wrapped(line, &format!("PEXPIRE s:1 1000000 LT | {gone}"));
    }
    for line in ["SET s:1 v KEEPTTL", "APPEND s:1 v", "SETNX s:1 v", "GETSET s:1 v", "MSET s:1 v"] {
        check_wrapped(line, &format!("PEXPIRE s:1 100000 NX | {gone}"));
    }
}

#[test]
fn what_shortens_a_keys_time_shortens_its_copys() {
    let copy = |millis: u32| format!("PEXPIRE <s:s:1> {millis} LT");
    for line in ["EXPIRE s:1 10", "PEXPIRE s:1 10000 GT", "GETEX s:1 EX 10"] {
        check_wrapped(line, &copy(70_000));
    }
    check("EXPIRE s:1 10 NX", &format!("MULTI | EXPIRE s:1 10 LT | {} | EXEC", copy(70_000)));
    check("PERSIST s:1", &format!("MULTI | PEXPIRE s:1 100000 | {} | EXEC", copy(160_000)));
    check("GETEX s:1 PERSIST", &format!("MULTI | GETEX s:1 PX 100000 | {} | EXEC", copy(160_000)));
    check_wrapped("EXPIRE s:1 9223372036854775807", &format!("PEXPIRE s:1 1000000 LT | {}", copy(1_060_000)));
    check_wrapped("EXPIRE s:1 0", "UNLINK <l:s:1> <s:s:1> <n:s:1>");
    for line in ["GET s:1", "GETEX s:1", "GETEX s:1 EX 0", "TTL s:1"] {
        check_forwarded(line);
    }
}

#[test]
fn copies_of_loads_are_shortened_and_never_written() {
    check_wrapped("EXPIRE l:1 10", "PEXPIRE <s:l:1> 70000 LT");
    check("PERSIST l:1", "MULTI | PEXPIRE l:1 100000 | PEXPIRE <s:l:1> 160000 LT | EXEC");
    check("SET l:1 v", "MULTI | SET l:1 v PX 100000 | UNLINK <l:l:1> <s:l:1> <n:l:1> | EXEC");
    check_wrapped("SETEX l:1 10 v", "UNLINK <l:l:1> <s:l:1> <n:l:1>");
}

#[test]
fn commands_too_long_to_be_held_are_guarded_whatever_their_options() {
    let guards_of = |line: &str| {
        let ranges = ranges_of(line);
        let args = CommandArgs::new(line.as_bytes(), &ranges);
        let mut out = Vec::new();
        let count = guards(&args, resolve(&args).expect("a command"), &Rules, &mut || 0, &mut out);
        let commands = decode(&out);
        assert_eq!(commands.len(), count as usize);
        commands.join(" | ")
    };
    let both = "PEXPIRE c:1 100000 NX | PEXPIRE c:1 1000000 LT";
    assert_eq!(guards_of("SET c:1 cut EX 5"), both);
    assert_eq!(guards_of("MSET x cut c:1 cut"), both);
    assert_eq!(guards_of("SET r:1 cut"), "PEXPIRE r:1 100000 NX | PEXPIRE r:1 1000000 LT | UNLINK <l:r:1> <s:r:1> <n:r:1>");
    assert_eq!(guards_of("SET s:1 cut EX 5"), "PEXPIRE s:1 100000 NX | PEXPIRE s:1 1000000 LT | UNLINK <l:s:1> <s:s:1> <n:s:1>");
    assert_eq!(guards_of("SET x cut"), "");
    assert_eq!(guards_of("GET c:1"), "");
}
