//! Replies.

use larder::sidecar::resp::ReplyScanner;
use redis_protocol::resp2::decode as resp2;
use redis_protocol::resp3::decode::complete as resp3;

use super::corpus::{real_replies, written_replies};
use super::{Verdict, fuzz, trickle};

fn ours(case: &[u8]) -> Verdict {
    let look = |scanner: &mut ReplyScanner, bytes: &[u8]| match scanner.scan(bytes) {
        Ok(Some(length)) => Verdict::Whole(length),
        Ok(None) => Verdict::More,
        Err(_) => Verdict::Refused,
    };
    let at_once = look(&mut ReplyScanner::default(), case);
    let mut scanner = ReplyScanner::default();
    assert_eq!(trickle(case, |bytes| look(&mut scanner, bytes)), at_once, "{}", case.escape_ascii());
    at_once
}

fn verdict<F, E>(decoded: Result<Option<(F, usize)>, E>) -> Verdict {
    match decoded {
        Ok(Some((_, length))) => Verdict::Whole(length),
        Ok(None) => Verdict::More,
        Err(_) => Verdict::Refused,
    }
}

fn by_resp2(case: &[u8]) -> Verdict {
    verdict(resp2::decode_range(case))
}

/// The scanner takes both protocols on one connection; the decoder has one function for each.
fn theirs(case: &[u8]) -> Verdict {
    match (by_resp2(case), verdict(resp3::decode_range(case))) {
        (Verdict::Refused, verdict) | (verdict, Verdict::Refused) => verdict,
        (two, three) => {
            assert_eq!(two, three, "the decoder contradicts itself: {}", case.escape_ascii());
            two
        }
    }
}

/// Why the scanner and the decoder may differ.
const CONTENTS: &str = "the decoder judges what is in a line, a verbatim string, a set or a map's keys; the scanner, the ends";
const NUMBERS: &str = "the decoder takes lengths as no server writes them: signs, more than 15 digits";
const COUNTS: &str = "the scanner refuses more elements than any reply has";
const NO_REPLY: &str = "the decoder takes a client's HELLO, and strings in pieces, which no server sends";

/// The reason of a difference. Panics where there is none.
fn check(case: &[u8]) -> Option<&'static str> {
    let (own, other) = (ours(case), theirs(case));
    if own == other {
        return None;
    }
    let plain = in_resp2(case);
    match (own, other) {
        // What is left without the contents is the same.
        (Verdict::Whole(length), Verdict::Refused | Verdict::More) => {
            let plain = in_resp2(&case[..length]).frame;
            assert_eq!(by_resp2(&plain), Verdict::Whole(plain.len()), "decoder {other:?}: {}", case.escape_ascii());
            Some(CONTENTS)
        }
        (Verdict::More, Verdict::Refused) if by_resp2(&plain.frame) == Verdict::More => Some(CONTENTS),
        (Verdict::Refused, _) if plain.oddity.is_some() => plain.oddity,
        _ => panic!("scanner {own:?}, decoder {other:?}: {}", case.escape_ascii()),
    }
}

/// A RESP3 frame rewritten with the same ends in RESP2.
#[derive(Default)]
struct Plain {
    frame: Vec<u8>,
    /// What the scanner refuses in it and the decoder may take.
    oddity: Option<&'static str>,
}

impl Plain {
    /// Ends in what nobody takes.
    fn spoilt(mut self, oddity: Option<&'static str>) -> Self {
        self.frame.push(b'?');
        self.oddity = self.oddity.or(oddity);
        self
    }
}

/// Rewrites a frame, all contents of its lines left out.
fn in_resp2(case: &[u8]) -> Plain {
    let (mut plain, mut rest) = (Plain::default(), case);
    while let Some(kind) = rest.first() {
        if !b"+-:_,#($!=*~>%|".contains(kind) {
            return plain.spoilt(b"H;.".contains(kind).then_some(NO_REPLY));
        }
        let Some(end) = rest.windows(2).position(|pair| pair == b"\r\n") else {
            plain.frame.push(b'+');
            return plain;
        };
        let line = &rest[1..end];
        rest = &rest[end + 2..];
        if b"+-:_,#(".contains(kind) {
            plain.frame.extend_from_slice(b"+\r\n");
            continue;
        }
        let text = std::str::from_utf8(line).unwrap_or("none");
        let is_plain = text == "-1" || text.len() <= 15 && !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
        let Some(number) = text.parse::<i64>().ok().filter(|_| is_plain) else {
            let taken = text.parse::<i64>().is_ok() || text.parse::<u64>().is_ok();
            return plain.spoilt(taken.then_some(NUMBERS));
        };
        let header = match (kind, number) {
            (b'$' | b'*', -1) => "$-1".to_owned(),
            (b'$' | b'!' | b'=', 0..) => format!("${number}"),
            (b'*' | b'~' | b'>', 0..) => format!("*{number}"),
            (b'%', 0..) => format!("*{}", 2 * number),
            // An attribute and what it describes are one element.
            (b'|', 0..) => format!("*{}", 2 * number + 1),
            _ => return plain.spoilt(None),
        };
        if header.starts_with('*') && number >= 1 << 29 {
            plain.oddity = Some(COUNTS);
        }
        plain.frame.extend_from_slice(format!("{header}\r\n").as_bytes());
        if header.starts_with('$') && number >= 0 {
            let length = rest.len().min(usize::try_from(number).expect("not negative").saturating_add(2));
            plain.frame.extend_from_slice(&rest[..length]);
            rest = &rest[length..];
        }
    }
    plain
}

#[test]
fn the_replies_of_real_servers_are_whole_wherever_they_are_cut() {
    let mut kinds = std::collections::BTreeSet::new();
    for reply in [written_replies(), real_replies()].concat() {
        // Some are answers to several commands.
        let mut rest = &reply[..];
        while let Some(kind) = rest.first() {
            kinds.insert(char::from(*kind));
            let Verdict::Whole(length) = ours(rest) else { panic!("{} in {}", rest.escape_ascii(), reply.escape_ascii()) };
            assert!(check(rest).is_none_or(|reason| reason == CONTENTS), "{}", rest.escape_ascii());
            for cut in 0..length.min(3000) {
                let mut scanner = ReplyScanner::default();
                assert_eq!(scanner.scan(&rest[..cut]), Ok(None), "cut at {cut}: {}", rest.escape_ascii());
                assert_eq!(scanner.scan(&rest[..length]), Ok(Some(length)), "cut at {cut}: {}", rest.escape_ascii());
            }
            rest = &rest[length..];
        }
    }
    assert_eq!(kinds.iter().collect::<String>(), "!#$%(*+,-:=>_|~", "every type was there");
}

#[test]
fn mutated_replies_get_the_decoders_verdict() {
    // It holds a place, and neither bytes nor a stack.
    assert!(size_of::<ReplyScanner>() <= 32);
    let seeds: Vec<Vec<u8>> = [written_replies(), real_replies()].concat().into_iter().filter(|it| it.len() < 2048).collect();
    fuzz(&seeds, check);
}
