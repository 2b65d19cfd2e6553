//! The table against itself; what real servers say of it is an integration test.

use std::ops::Range;

use super::table::GROUPS;
use super::*;

/// The words of a line as a command in memory.
struct Words {
    buffer: Vec<u8>,
    ranges: Vec<Range<u32>>,
}

impl Words {
    fn new(line: &str) -> Self {
        let (mut buffer, mut ranges) = (Vec::new(), Vec::new());
        for word in line.split(' ') {
            let start = buffer.len() as u32;
            buffer.extend_from_slice(word.as_bytes());
            ranges.push(start..buffer.len() as u32);
        }
        Self { buffer, ranges }
    }

    fn args(&self) -> CommandArgs<'_> {
        CommandArgs::new(&self.buffer, &self.ranges)
    }
}

fn all() -> impl Iterator<Item = &'static CommandSpec> {
    GROUPS.iter().flat_map(|group| group.iter())
}

#[test]
fn every_name_is_found_in_any_case() {
    for spec in all() {
        let mixed: String =
            spec.name.chars().enumerate().map(|(i, c)| if i % 2 == 0 { c.to_ascii_uppercase() } else { c }).collect();
        for name in [spec.name, &spec.name.to_uppercase(), &mixed] {
            assert!(std::ptr::eq(lookup(name.as_bytes()).expect(name), spec), "{name}");
        }
        for sub in spec.subcommands {
            let (container, last) = sub.name.split_once('|').expect("a subcommand has a container");
            assert_eq!(container, spec.name);
            let words = Words::new(&format!("{} {}", container.to_uppercase(), last.to_uppercase()));
            assert!(std::ptr::eq(spec.subcommand(&words.args()).expect(sub.name), sub));
        }
    }
    for name in [
        "",
        "g",
        "ge",
        "gett",
        "get\0",
        "g\x05t",
        "no_such_command_at_all",
        "set ",
        "georadiuxbymember_ro",
        "zremrangebyscorf",
        "\x7f\x7f\x7f",
    ] {
        assert_eq!(lookup(name.as_bytes()), None, "{name:?}");
    }
}

#[test]
fn rows_agree_with_themselves() {
    for spec in all().flat_map(|spec| std::iter::once(spec).chain(spec.subcommands)) {
        let effects: Vec<Effect> = spec.keys.iter().map(|part| part.effect).collect();
        let writes = effects.iter().any(|effect| matches!(effect, Effect::Update | Effect::Write | Effect::Delete));
        assert_eq!(spec.ttl != Ttl::Keeps, effects.contains(&Effect::Write), "{}", spec.name);
        assert!(!writes || spec.access == Access::Write, "{}", spec.name);
        assert_eq!(spec.name, spec.name.to_lowercase());
        assert_ne!(spec.arity, 0);
    }
}

#[track_caller]
fn check_keys(line: &str, expected: Result<&[(u32, Effect)], KeyError>) {
    let words = Words::new(line);
    let spec = resolve(&words.args()).expect("a command");
    let found = spec.keys(&words.args());
    let found = found.map(|keys| keys.into_iter().map(|key| (key.index, key.effect)).collect::<Vec<_>>());
    if spec.has_spans() {
        check_spans(spec, &words, found.clone());
    }
    assert_eq!(found, expected.map(<[_]>::to_vec), "{line}");
}

/// What is told of a command before its end is what is told of the whole, and nothing that has come turns out to be a key later.
#[track_caller]
fn check_spans(spec: &CommandSpec, words: &Words, keys: Result<Vec<(u32, Effect)>, KeyError>) {
    let (args, mut spans) = (words.args(), Vec::new());
    for come in 0..=args.len() {
        let first = CommandArgs::new(&words.buffer, &words.ranges[..come]);
        match (spec.spans(&first, args.len(), &mut spans), &keys) {
            (Err(error), keys) => assert_eq!(Err(error), *keys),
            (Ok(all), Ok(keys)) => {
                let is_key =
                    |index: usize| spans.iter().find(|span| span.contains(index)).map(|span| (index as u32, span.effect));
                let seen = if all.is_some() { args.len() } else { come };
                let expected: Vec<_> =
                    (0..seen as u32).filter_map(|index| keys.iter().find(|key| key.0 == index).copied()).collect();
                assert_eq!((0..seen).filter_map(is_key).collect::<Vec<_>>(), expected);
                if all.is_some() {
                    assert_eq!(spans.iter().filter_map(KeySpan::last).max(), keys.iter().map(|key| key.0 as usize).max());
                }
            }
            (Ok(all), Err(_)) => assert!(all.is_none(), "the contradiction is not seen"),
        }
    }
}

#[test]
fn keys_are_where_the_server_finds_them() {
    use Effect::{Read, Update, Write};
    check_keys("GET a", Ok(&[(1, Read)]));
    check_keys("MSET a 1 b 2", Ok(&[(1, Write), (3, Write)]));
    check_keys("BLPOP a b 0", Ok(&[(1, Update), (2, Update)]));
    check_keys("EVAL x 0", Ok(&[]));
    check_keys("EVAL x 2 a b c", Ok(&[(3, Write), (4, Write)]));
    check_keys("EVAL x 2 a", Err(KeyError::Count));
    check_keys("EVAL x -1 a", Err(KeyError::Count));
    check_keys("EVAL x 01 a", Err(KeyError::Count));
    check_keys("LMPOP 0 a LEFT", Err(KeyError::Count));
    check_keys("ZUNIONSTORE d 2 a b", Ok(&[(1, Write), (3, Read), (4, Read)]));
    check_keys("MSETEX 2 a 1 b 2 EX 1", Ok(&[(2, Write), (4, Write)]));
    check_keys("MSETEX 9223372036854775807 a 1", Err(KeyError::Count));
    check_keys("SORT a", Ok(&[(1, Read)]));
    check_keys("SORT a BY store GET store LIMIT 0 1 STORE d", Ok(&[(1, Read), (10, Write)]));
    check_keys("GEORADIUS a 1 2 3 km STOREDIST x STORE y", Ok(&[(1, Read), (9, Write)]));
    check_keys("GEORADIUSBYMEMBER a store 10 km", Ok(&[(1, Read)]));
    check_keys("XREAD COUNT 1 STREAMS a b 0 0", Ok(&[(4, Read), (5, Read)]));
    check_keys("XREAD COUNT 1 STREAMS a b 0", Err(KeyError::Streams));
    check_keys("XREAD COUNT 1 a 0", Err(KeyError::Streams));
    check_keys("XREADGROUP GROUP streams streams STREAMS a >", Ok(&[(5, Update)]));
    check_keys("OBJECT ENCODING a", Ok(&[(2, Read)]));
    check_keys("JSON.SET a $ 1", Ok(&[(1, Write)]));
    check_keys("NOSUCH", Ok(&[]));
}

#[test]
fn only_block_makes_xread_block() {
    for (line, blocks) in [
        ("XREAD STREAMS a 0", false),
        ("XREAD BLOCK 0 STREAMS a 0", true),
        ("XREAD COUNT 1 block 0 STREAMS a 0", true),
        ("XREADGROUP GROUP block c STREAMS block >", false),
        ("BLPOP a 0", true),
        ("LPOP a", false),
        ("WAIT 1 0", true),
    ] {
        let words = Words::new(line);
        assert_eq!(resolve(&words.args()).expect("a command").blocks(&words.args()), blocks, "{line}");
    }
}

#[test]
fn errors_are_the_servers_own() {
    for (line, text) in [
        ("GET", "-ERR wrong number of arguments for 'get' command\r\n"),
        ("XGROUP CREATE a", "-ERR wrong number of arguments for 'xgroup|create' command\r\n"),
        ("client", "-ERR wrong number of arguments for 'client' command\r\n"),
        ("CLIENT no\rsuch", "-ERR unknown subcommand 'no such'. Try CLIENT HELP.\r\n"),
    ] {
        let words = Words::new(line);
        let mut out = Vec::new();
        resolve(&words.args()).expect_err(line).write(&words.args(), &mut out);
        assert_eq!(String::from_utf8(out).expect("text"), text);
    }
}

#[test]
fn keys_at_fixed_places_are_found_without_a_list() {
    let words = Words::new("GET a");
    assert_eq!(resolve(&words.args()).expect("a command").only_key(&words.args()), Some(&b"a"[..]));
    let words = Words::new("MGET a b");
    let spec = resolve(&words.args()).expect("a command");
    assert_eq!((spec.only_key(&words.args()), spec.first_key(&words.args())), (None, Some(&b"a"[..])));
}
