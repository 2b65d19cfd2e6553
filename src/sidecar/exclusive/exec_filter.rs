//! EXEC's reply without the elements that answer commands of Larder's own, as it comes.

use crate::sidecar::resp::{ReplyError, ReplyScanner, encode, reply};

/// Passes on the elements of one EXEC's reply that the client asked for.
#[derive(Debug)]
pub struct ExecFilter {
    /// For each of the client's commands, how many elements behind its own are dropped.
    extras: Vec<u32>,
    /// Whether the client gets the array's header: not where the whole transaction was Larder's.
    header: bool,
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
}

impl ExecFilter {
    /// For a transaction of the client's own.
    pub fn of_client(extras: Vec<u32>) -> Self {
        Self { extras, header: true, place: None, scanner: ReplyScanner::default() }
    }

    /// For one command of the client's, followed by `extra` commands in a transaction of ours: the first element is its reply.
    pub fn of_ours(extra: u32) -> Self {
        Self { extras: vec![extra], header: false, place: None, scanner: ReplyScanner::default() }
    }

    /// Whether the whole transaction was Larder's.
    pub fn is_ours(&self) -> bool {
        !self.header
    }

    /// Whether it has begun, or begins with `bytes`: errors and nil, which are no array, are not its business.
    pub fn takes(&self, bytes: &[u8]) -> bool {
        self.place.is_some() || (bytes.first() == Some(&b'*') && bytes.get(1) != Some(&b'-'))
    }

    /// Takes bytes of the reply and hands on what the client gets. How many were taken, and whether the reply has ended.
    ///
    /// # Errors
    /// Where the bytes are not a reply, or have another number of elements than there were commands.
    pub fn feed(&mut self, bytes: &[u8], pass: &mut impl FnMut(&[u8])) -> Result<(usize, bool), ReplyError> {
        let mut at = 0;
        if self.place.is_none() {
            let Some(end) = memchr::memchr(b'\n', bytes) else { return Ok((0, false)) };
            self.begin(&bytes[..=end], pass)?;
            at = end + 1;
        }
        let Some(place) = &mut self.place else { return Ok((at, false)) };
        while place.next < self.extras.len() || place.dropped > 0 {
            let rest = &bytes[at..];
            let whole = self.scanner.scan(rest)?;
            let length = whole.unwrap_or_else(|| self.scanner.releasable(rest.len()));
            if place.dropped == 0 && length > 0 {
                pass(&rest[..length]);
            }
            at += length;
            if whole.is_none() {
                self.scanner.release(length);
                return Ok((at, false));
            }
            if place.dropped > 0 {
                place.dropped -= 1;
            } else {
                place.dropped = self.extras.get(place.next).copied().unwrap_or(0);
                place.next += 1;
            }
        }
        Ok((at, true))
    }

    fn begin(&mut self, line: &[u8], pass: &mut impl FnMut(&[u8])) -> Result<(), ReplyError> {
        let wanted: u64 = self.extras.iter().map(|extra| 1 + u64::from(*extra)).sum();
        let number = line.strip_prefix(b"*").map(|digits| [b":", digits].concat());
        let number = number.as_deref().and_then(reply::integer);
        if number.and_then(|number| u64::try_from(number).ok()) != Some(wanted) {
            return Err(ReplyError::Length);
        }
        if self.header {
            let mut header = Vec::new();
            encode::array(&mut header, self.extras.len());
            pass(&header);
        }
        self.place = Some(Place { next: 0, dropped: 0 });
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Feeds `wire` in steps of each size, and compares what is passed on.
    #[track_caller]
    fn check(make: impl Fn() -> ExecFilter, wire: &str, passed: &str) {
        for step in 1..=wire.len() {
            let (mut filter, mut got) = (make(), Vec::new());
            let (mut start, mut end, mut done) = (0, 0, false);
            while !done {
                end = (end + step).min(wire.len());
                let (taken, ended) = filter.feed(&wire.as_bytes()[start..end], &mut |part| got.extend_from_slice(part)).unwrap();
                start += taken;
                done = ended;
            }
            assert_eq!(String::from_utf8_lossy(&got), passed, "in steps of {step}");
            assert_eq!(start, wire.len());
        }
    }

    #[test]
    fn elements_of_ours_are_dropped() {
        let wire = "*5\r\n+OK\r\n:1\r\n:0\r\n*2\r\n$1\r\na\r\n$-1\r\n:1\r\n";
        check(|| ExecFilter::of_client(vec![2, 1]), wire, "*2\r\n+OK\r\n*2\r\n$1\r\na\r\n$-1\r\n");
        check(|| ExecFilter::of_ours(1), "*2\r\n$5\r\nhello\r\n:1\r\n", "$5\r\nhello\r\n");
        check(|| ExecFilter::of_client(vec![]), "*0\r\n", "*0\r\n");
    }

    #[test]
    fn another_number_of_elements_is_an_error() {
        assert!(ExecFilter::of_ours(1).feed(b"*1\r\n+OK\r\n", &mut |_| ()).is_err());
        assert!(!ExecFilter::of_ours(1).takes(b"-EXECABORT") && !ExecFilter::of_ours(1).takes(b"*-1\r\n"));
    }
}
