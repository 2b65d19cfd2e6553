//! EXEC's reply without the elements that answer commands of Larder's own, as it comes. It stops where Larder has a part in an answer.

use std::rc::Rc;

use crate::sidecar::policy::RuleId;
use crate::sidecar::resp::{ReplyError, ReplyScanner, encode, reply};

/// One command of the client's within a transaction.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Queued {
    /// How many commands of Larder's own follow it, whose elements are dropped.
    pub extra: u32,
    /// The rule of the one key that it reads: a null is a miss.
    pub reads: Option<RuleId>,
    /// The key that it gets, where a miss tells its client to load it.
    pub leased: Option<Rc<[u8]>>,
    /// The rule of the first key that it writes, where Larder sees to the TTL.
    pub given_ttl: Option<RuleId>,
    /// Its element is not passed on: Larder has a part in the answer.
    pub held: bool,
}

impl Queued {
    /// Whether its element is of no interest to anyone but the client.
    pub fn is_plain(&self) -> bool {
        *self == Self::default()
    }
}

/// How far a filter has come.
#[derive(Debug, PartialEq, Eq)]
pub enum Fed {
    /// It needs more bytes.
    More,
    /// To this element, whole, of a command that is [`held`](Queued::held).
    Held(Vec<u8>),
    /// To the reply's end.
    Whole,
}

/// Passes on the elements of one EXEC's reply that the client asked for.
#[derive(Debug)]
pub struct ExecFilter {
    /// The client's commands, in order.
    commands: Vec<Queued>,
    /// Whether the client gets the array's header: not where the whole transaction was Larder's.
    header: bool,
    /// Nothing is dropped or judged: the reply is passed on as it is.
    as_it_is: bool,
    place: Option<Place>,
    scanner: ReplyScanner,
}

/// Where in the array the filter is.
#[derive(Debug)]
struct Place {
    /// Which of the client's commands is next.
    next: usize,
    /// How many elements of ours come before it.
    dropped: u32,
    /// Whether a part of its element has been passed on.
    begun: bool,
}

impl ExecFilter {
    /// For a transaction of the client's own.
    pub fn of_client(commands: Vec<Queued>) -> Self {
        let as_it_is = commands.iter().all(Queued::is_plain);
        Self { commands, header: true, as_it_is, place: None, scanner: ReplyScanner::default() }
    }

    /// For one command of the client's in a transaction of ours: the first element is its reply.
    pub fn of_ours(command: Queued) -> Self {
        Self { commands: vec![command], header: false, as_it_is: false, place: None, scanner: ReplyScanner::default() }
    }

    /// Whether the whole transaction was Larder's.
    pub fn is_ours(&self) -> bool {
        !self.header
    }

    /// Whether the reply is passed on as it is, without [`ExecFilter::feed`].
    pub fn is_as_it_is(&self) -> bool {
        self.as_it_is
    }

    /// Whether it has begun, or begins with `bytes`: errors and nil, which are no array, are not its business.
    pub fn takes(&self, bytes: &[u8]) -> bool {
        !self.as_it_is && (self.place.is_some() || (bytes.first() == Some(&b'*') && bytes.get(1) != Some(&b'-')))
    }

    /// Whether all elements have come.
    pub fn is_whole(&self) -> bool {
        self.place.as_ref().is_some_and(|place| place.next == self.commands.len() && place.dropped == 0)
    }

    /// Takes bytes of the reply and hands on what the client gets. `judge` is called once for each of the client's commands that are
    /// not held, with its element: the whole of it, or its start where it comes in parts, which no null and no error does. How many
    /// bytes were taken, and how far it has come.
    ///
    /// # Errors
    /// Where the bytes are not a reply, or have another number of elements than there were commands.
    pub fn feed(
        &mut self,
        bytes: &[u8],
        judge: &mut impl FnMut(&Queued, &[u8]),
        pass: &mut impl FnMut(&[u8]),
    ) -> Result<(usize, Fed), ReplyError> {
        let mut at = 0;
        if self.place.is_none() {
            let Some(end) = memchr::memchr(b'\n', bytes) else { return Ok((0, Fed::More)) };
            self.begin(&bytes[..=end], pass)?;
            at = end + 1;
        }
        let Some(place) = &mut self.place else { return Ok((at, Fed::More)) };
        while place.next < self.commands.len() || place.dropped > 0 {
            let rest = &bytes[at..];
            let whole = self.scanner.scan(rest)?;
            let held = place.dropped == 0 && self.commands[place.next].held;
            let length = match whole {
                Some(length) => length,
                None if held => 0,
                None => self.scanner.releasable(rest.len()),
            };
            if place.dropped == 0 && !held && length > 0 {
                if !std::mem::replace(&mut place.begun, true) {
                    judge(&self.commands[place.next], &rest[..length]);
                }
                pass(&rest[..length]);
            }
            at += length;
            if whole.is_none() {
                self.scanner.release(length);
                return Ok((at, Fed::More));
            }
            if held {
                place.next += 1;
                return Ok((at, Fed::Held(rest[..length].to_vec())));
            }
            if place.dropped > 0 {
                place.dropped -= 1;
            } else {
                place.dropped = self.commands[place.next].extra;
                place.next += 1;
                place.begun = false;
            }
        }
        Ok((at, Fed::Whole))
    }

    fn begin(&mut self, line: &[u8], pass: &mut impl FnMut(&[u8])) -> Result<(), ReplyError> {
        let wanted: u64 = self.commands.iter().map(|command| 1 + u64::from(command.extra)).sum();
        let number = line.strip_prefix(b"*").map(|digits| [b":", digits].concat());
        let number = number.as_deref().and_then(reply::integer);
        if number.and_then(|number| u64::try_from(number).ok()) != Some(wanted) {
            return Err(ReplyError::Length);
        }
        if self.header {
            let mut header = Vec::new();
            encode::array(&mut header, self.commands.len());
            pass(&header);
        }
        self.place = Some(Place { next: 0, dropped: 0, begun: false });
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn extra(extra: u32) -> Queued {
        Queued { extra, ..Queued::default() }
    }

    /// Feeds `wire` in steps of each size, and compares what is passed on, and which elements are judged null.
    #[track_caller]
    fn check(make: impl Fn() -> ExecFilter, wire: &str, passed: &str, nulls: &[bool]) {
        for step in 1..=wire.len() {
            let (mut filter, mut got) = (make(), Vec::new());
            let (mut start, mut end, mut judged) = (0, 0, Vec::new());
            while !filter.is_whole() {
                end = (end + step).min(wire.len());
                let (taken, fed) = filter
                    .feed(&wire.as_bytes()[start..end], &mut |_, element| judged.push(reply::is_null(element)), &mut |part| {
                        got.extend_from_slice(part)
                    })
                    .unwrap();
                start += taken;
                if let Fed::Held(element) = fed {
                    got.extend_from_slice(&[b"(", &element[..], b")"].concat());
                }
            }
            assert_eq!(String::from_utf8_lossy(&got), passed, "in steps of {step}");
            assert_eq!(start, wire.len());
            assert_eq!(judged, nulls, "in steps of {step}");
        }
    }

    #[test]
    fn elements_of_ours_are_dropped() {
        let wire = "*5\r\n+OK\r\n:1\r\n:0\r\n*2\r\n$1\r\na\r\n$-1\r\n:1\r\n";
        let two = || ExecFilter::of_client(vec![extra(2), extra(1)]);
        check(two, wire, "*2\r\n+OK\r\n*2\r\n$1\r\na\r\n$-1\r\n", &[false, false]);
        let nulls = "*5\r\n$-1\r\n$-1\r\n_\r\n$1\r\n$\r\n:0\r\n";
        let three = || ExecFilter::of_client(vec![extra(1), extra(0), extra(1)]);
        check(three, nulls, "*3\r\n$-1\r\n_\r\n$1\r\n$\r\n", &[true, true, false]);
        check(|| ExecFilter::of_ours(extra(1)), "*2\r\n$5\r\nhello\r\n:1\r\n", "$5\r\nhello\r\n", &[false]);
        check(|| ExecFilter::of_client(vec![]), "*0\r\n", "*0\r\n", &[]);
        assert!(two().takes(b"*5\r\n") && !two().takes(b"-EXECABORT"));
        assert!(!ExecFilter::of_client(vec![extra(0)]).takes(b"*1\r\n"), "nothing is to be dropped");
    }

    #[test]
    fn it_stops_at_elements_that_are_held() {
        let held = || Queued { held: true, ..Queued::default() };
        let wire = "*6\r\n+PONG\r\n:1\r\n:0\r\n$4\r\na\r\nb\r\n*2\r\n+x\r\n%0\r\n+PONG\r\n";
        let mixed = || ExecFilter::of_client(vec![held(), extra(1), extra(0), held(), held()]);
        let passed = "*5\r\n(+PONG\r\n):1\r\n$4\r\na\r\nb\r\n(*2\r\n+x\r\n%0\r\n)(+PONG\r\n)";
        check(mixed, wire, passed, &[false, false]);
        check(|| ExecFilter::of_client(vec![held()]), "*1\r\n$-1\r\n", "*1\r\n($-1\r\n)", &[]);
        assert!(!ExecFilter::of_client(vec![held()]).is_as_it_is());
    }

    #[test]
    fn another_number_of_elements_is_an_error() {
        let ours = || ExecFilter::of_ours(extra(1));
        assert!(ours().feed(b"*1\r\n+OK\r\n", &mut |_, _| (), &mut |_| ()).is_err());
        assert!(!ours().takes(b"-EXECABORT") && !ours().takes(b"*-1\r\n"));
    }
}
