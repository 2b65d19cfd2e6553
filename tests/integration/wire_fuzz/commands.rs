//! Commands.

use larder::sidecar::resp::{CommandArgs, CommandScan, CommandScanner, ProtocolError, command::split_inline};
use redis_protocol::resp2::decode::decode;
use redis_protocol::resp2::types::OwnedFrame;

use super::corpus::commands;
use super::mutation::Mutator;
use super::{Verdict, fuzz, trickle};
use crate::support::server::{Engine, Redis, SentinelCluster};
use crate::support::sidecar::{Sidecar, bypass, sentinel_topology};
use crate::wire::converse;

/// What the scanner says, and why it refuses.
fn ours(case: &[u8]) -> (Verdict, Vec<Vec<u8>>, Option<ProtocolError>) {
    let mut refusal = None;
    let mut look = |scanner: &mut CommandScanner, bytes: &[u8]| match scanner.scan(bytes) {
        Ok(CommandScan::Complete { length } | CommandScan::Inline { length }) => Verdict::Whole(length),
        Ok(CommandScan::Incomplete) => Verdict::More,
        Err(error) => {
            refusal = Some(error);
            Verdict::Refused
        }
    };
    let mut scanner = CommandScanner::default();
    let at_once = look(&mut scanner, case);
    let args = match at_once {
        Verdict::Whole(_) => CommandArgs::new(case, scanner.ranges()).iter().map(<[u8]>::to_vec).collect(),
        _ => Vec::new(),
    };
    // An argument takes six bytes at least: what is held of it is bounded by what came.
    assert!(scanner.ranges().len() * 6 <= case.len(), "{}", case.escape_ascii());
    let mut resumed = CommandScanner::default();
    assert_eq!(trickle(case, |bytes| look(&mut resumed, bytes)), at_once, "{}", case.escape_ascii());
    (at_once, args, refusal)
}

/// The arguments, where the frame is what a command must be.
fn arguments(frame: OwnedFrame) -> Option<Vec<Vec<u8>>> {
    let OwnedFrame::Array(items) = frame else { return None };
    let bulk = |item| if let OwnedFrame::BulkString(bytes) = item { Some(bytes) } else { None };
    items.into_iter().map(bulk).collect()
}

/// Why the scanner and the decoder may differ. In each case the scanner does as Redis does, which the last test here shows.
const INLINE: &str = "inline commands have no decoder";
const EMPTY: &str = "a command without arguments, also of a negative number of them, is passed over";
const BULKS: &str = "arguments are bulk strings and nothing else, which is said when their first line is whole";
const NUMBERS: &str = "a number begins with no zero and no plus, is no null, and has a bound";
const LINE_ENDS: &str = "the byte behind a header's carriage return is not looked at";

/// The reason of a difference. Panics where there is none.
fn check(case: &[u8]) -> Option<&'static str> {
    let (own, args, refusal) = ours(case);
    if case.first() != Some(&b'*') {
        let _ = split_inline(case);
        return (!case.is_empty()).then_some(INLINE);
    }
    let decode = |case: &[u8]| match decode(case) {
        Ok(Some((frame, length))) => (Verdict::Whole(length), arguments(frame)),
        Ok(None) => (Verdict::More, None),
        Err(_) => (Verdict::Refused, None),
    };
    match (own, decode(case), refusal) {
        (Verdict::Whole(length), _, _) if args.is_empty() => {
            let line = std::str::from_utf8(&case[1..length - 2]).expect("a number");
            assert!(line.parse::<i64>().is_ok_and(|count| count <= 0), "{}", case.escape_ascii());
            Some(EMPTY)
        }
        (Verdict::Whole(length), (Verdict::Whole(other), Some(others)), _) if length == other && args == others => None,
        (Verdict::More, (Verdict::More, _), _) | (Verdict::Refused, (Verdict::Refused, _), _) => None,
        (Verdict::Whole(_) | Verdict::More, _, _) => {
            let Walk { fixed, unfinished, .. } = walk(case);
            let (other, others) = decode(&fixed);
            if own == Verdict::More && unfinished.is_some_and(|kind| kind != b'$') {
                return Some(BULKS);
            }
            assert_eq!((own, own != Verdict::More), (other, others.as_ref() == Some(&args)), "{}", case.escape_ascii());
            Some(LINE_ENDS)
        }
        (Verdict::Refused, (_, None), Some(ProtocolError::ExpectedBulk(_))) => Some(BULKS),
        (Verdict::Refused, _, Some(ProtocolError::ArrayLength | ProtocolError::BulkLength)) if has_odd_number(case) => {
            Some(NUMBERS)
        }
        (own, other, refusal) => panic!("scanner {own:?} {refusal:?}, decoder {other:?}: {}", case.escape_ascii()),
    }
}

/// A walk over headers, each of which Redis ends with the byte behind a carriage return, whatever that is.
struct Walk {
    /// The case with line feeds in those places.
    fixed: Vec<u8>,
    headers: Vec<Vec<u8>>,
    /// The first byte of a header that is not whole.
    unfinished: Option<u8>,
}

fn walk(case: &[u8]) -> Walk {
    let mut walk = Walk { fixed: case.to_vec(), headers: Vec::new(), unfinished: None };
    let mut at = 0;
    while let Some(end) = memchr::memchr(b'\r', case.get(at..).unwrap_or_default()) {
        let header = &case[at..at + end];
        let Some(behind) = walk.fixed.get_mut(at + end + 1) else { break };
        *behind = b'\n';
        let payload = header.strip_prefix(b"$").and_then(|digits| std::str::from_utf8(digits).ok()?.parse::<usize>().ok());
        walk.headers.push(header.to_vec());
        at = (at + end + 2).saturating_add(payload.map_or(0, |length| length.saturating_add(2)));
    }
    walk.unfinished = case.get(at).copied();
    walk
}

/// Whether a header holds what Redis takes for no number, or out of bounds.
fn has_odd_number(case: &[u8]) -> bool {
    walk(case).headers.iter().filter(|header| matches!(header.first(), Some(b'*' | b'$'))).any(|header| {
        let text = String::from_utf8_lossy(&header[1..]).into_owned();
        let bounds = if header[0] == b'*' { i64::MIN..=1024 * 1024 } else { 0..=512 * 1024 * 1024 };
        !text.parse::<i64>().is_ok_and(|number| number.to_string() == text && bounds.contains(&number))
    })
}

#[test]
fn mutated_commands_get_the_decoders_verdict() {
    fuzz(&commands(), check);
}

/// Whatever comes, the sidecar answers with a bare server's bytes, and closes when it does.
#[test]
fn mutated_commands_get_a_bare_servers_answer() {
    let servers = SentinelCluster::start(Engine::Redis7, 0);
    let sidecar = Sidecar::start(&bypass(sentinel_topology(&servers)));
    let bare = Redis::start(Engine::Redis7);
    let inline: [&[u8]; 6] =
        [b"PING\r\n", b"SET k 'a b'\n", b"GET k\r\n", b"ECHO \"\\x41\\\"\"\r\n", b"\r\n", b"  SET  k2\t\"v\"  \r\nGET k2\r\n"];
    let mut seeds: Vec<Vec<u8>> =
        commands().into_iter().filter(|it| it.is_ascii() && !it.contains(&0) && !contains(it, b"XADD")).collect();
    seeds.extend(inline.map(<[u8]>::to_vec));
    let mut mutator = Mutator::new(&seeds, 7);
    let mut answered = 0;
    for _ in 0..1_500 {
        let case = mutator.next();
        // Redis takes a NUL in a header or an inline command for the end of all that came, and waits; what is announced and
        // larger than the sidecar's bound, it waits for, too.
        let is_larger = [&b"*1048577"[..], b"$536870913", b"*2147483647"].iter().any(|text| contains(&case, text));
        if case.contains(&0) || is_larger || contains(&case, b"HELLO") || contains(&case, b"XADD") {
            continue;
        }
        let case = [&case[..], b"\r\nPING\r\n"].concat();
        let (wanted, got) = (converse(bare.port(), &case), converse(sidecar.port(), &case));
        answered += usize::from(!wanted.is_empty());
        assert_eq!(got.escape_ascii().to_string(), wanted.escape_ascii().to_string(), "{}", case.escape_ascii());
    }
    assert!(answered > 1_000, "only {answered} were answered at all");
}

fn contains(text: &[u8], part: &[u8]) -> bool {
    text.windows(part.len()).any(|window| window == part)
}
