//! Read-through: what is missing is loaded from the origin, once.
//!
//! In a worker, reads of one missing key join one *flight*. Across workers and pods, the lease decides who loads: the flight
//! that gets it loads and stores, the others look again until the value is there. A covered write or a deletion removes the
//! lease in its own transaction, and a load is stored only while its lease stands: what was loaded before a write is never
//! stored after it.
//!
//! A client may have sent more commands behind its read: what the cache has by the time it is looked at again may be that client's
//! own later write. Such a read is loaded from the origin by itself, and nothing is stored for it.
//!
//! Whom a loaded value may be given to, when its lease was gone: those who asked before that load began. For them the value is
//! as new as the moment they asked. Those who joined later wait for the next attempt.

mod cache;
mod flight;
pub mod hash;
mod many;
mod patience;
mod relayed;

use std::cell::RefCell;
use std::rc::Rc;

use rustc_hash::FxHashMap;

pub use flight::{Flight, Outcome};
pub use many::{Place, Table, complete_exists, complete_mget, load_keys};

use self::hash::HashRead;
use super::super::policy::RuleId;
use super::super::resp::{CommandArgs, CommandScan, CommandScanner, Protocol, encode};
use super::super::session::Session;
use super::super::upstream::lane::Lane;
use super::super::upstream::queue::Recovered;
use super::super::upstream::sink::Sink;
use super::super::worker::Worker;
use super::content::Content;

/// A server's own words for a value of another form than a command is about.
const WRONG_TYPE: &str = "WRONGTYPE Operation against a key holding the wrong kind of value";
/// The most keys that are being loaded at once for one worker; more reads than that are told to try again.
const MOST_FLIGHTS: usize = 10_000;

/// A key, and the connection on which its readers ask. A flight's own questions take the same one: so whoever was told after a
/// write that the key is missing cannot have joined before the flight learnt of it.
pub type FlightKey = (Lane, Vec<u8>);

/// What is being loaded.
#[derive(Debug, Default)]
pub struct Flights {
    by_key: RefCell<FxHashMap<FlightKey, Rc<Flight>>>,
}

impl Flights {
    /// Strikes a flight, unless another one for its key has taken its place.
    fn remove(&self, key: &FlightKey, flight: &Rc<Flight>) {
        let mut by_key = self.by_key.borrow_mut();
        if by_key.get(key).is_some_and(|current| Rc::ptr_eq(current, flight)) {
            by_key.remove(key);
        }
    }

    /// Puts another flight for its key in a flight's place, unless that has been taken.
    fn replace(&self, flight: &Rc<Flight>, other: Rc<Flight>) {
        if let Some(current) = self.by_key.borrow_mut().get_mut(flight.key()).filter(|current| Rc::ptr_eq(current, flight)) {
            *current = other;
        }
    }
}

/// What is done with a key's outcome.
pub type Deliver = Box<dyn FnOnce(&Rc<Worker>, &Outcome)>;

/// Asks for a key; its flight is joined, or made.
fn want(worker: &Rc<Worker>, rule: RuleId, key: FlightKey, deliver: Deliver) -> Option<Rc<Flight>> {
    let mut by_key = worker.flights().by_key.borrow_mut();
    if let Some(flight) = by_key.get(&key) {
        worker.metrics().coalesced(rule);
        worker.metrics().load_saved(rule);
        flight.join(deliver);
        return None;
    }
    if by_key.len() >= MOST_FLIGHTS {
        drop(by_key);
        deliver(worker, &Outcome::Failed("TRYAGAIN too many keys are being loaded at once: repeat the read later".to_owned()));
        return None;
    }
    let flight = Flight::new(rule, key.clone(), deliver);
    by_key.insert(key, flight.clone());
    Some(flight)
}

/// A read of one covered key found nothing: GET, or EXISTS, STRLEN, GETRANGE and [those of hashes](hash), which are answered from the
/// loaded value. What a hash has not got is no miss: then it is there, and answers for itself.
pub fn on_miss(worker: &Rc<Worker>, rule: RuleId, recovered: Recovered, found: &[u8]) {
    worker.metrics().count_read(rule, true);
    let Sink::Client { session, sequence, .. } = recovered.pending.sink else { return };
    // The policy may have changed since the read was sent: its rules may have other positions.
    let policy = worker.policy();
    let read = Read::parse(&recovered.bytes).map(|read| (policy.find(&read.key), read));
    let Some((rule, read)) = read.filter(|(rule, _)| policy.loads(*rule)) else {
        return session.deliver(sequence, found);
    };
    let key = (recovered.pending.lane.shared(), read.key.clone());
    let (found, protocol) = (found.to_vec(), recovered.pending.lane.protocol);
    let answer = move |session: Rc<Session>, outcome: &Outcome| match outcome {
        Outcome::Found(value) | Outcome::Cached(value) => session.answer(sequence, |out| read.answer(value, protocol, out)),
        Outcome::Other => session.answer(sequence, |out| read.answer_other(out)),
        Outcome::NotFound => session.deliver(sequence, &found),
        Outcome::Failed(text) => session.answer(sequence, |out| encode::error(out, text)),
    };
    let again = key.clone();
    let deliver: Deliver = Box::new(move |worker, outcome| match outcome {
        Outcome::Cached(_) | Outcome::Other if session.has_changed_after(sequence) => {
            flight::launch_alone(worker, rule, again, Box::new(move |_, outcome| answer(session, outcome)));
        }
        outcome => answer(session, outcome),
    });
    if let Some(flight) = want(worker, rule, key, deliver) {
        flight::launch(worker, vec![flight]);
    }
}

/// A read of one key, as far as its answer can be made from the value.
struct Read {
    key: Vec<u8>,
    question: Question,
}

enum Question {
    Get,
    Exists,
    Length,
    Range(i64, i64),
    Hash(HashRead),
}

impl Read {
    fn parse(command: &[u8]) -> Option<Self> {
        let mut scanner = CommandScanner::default();
        let Ok(CommandScan::Complete { .. }) = scanner.scan(command) else { return None };
        let args = CommandArgs::new(command, scanner.ranges());
        let number = |index| std::str::from_utf8(args.get(index)?).ok()?.parse().ok();
        let question = match args.name().to_ascii_lowercase().as_slice() {
            b"get" => Question::Get,
            b"exists" => Question::Exists,
            b"strlen" => Question::Length,
            b"getrange" | b"substr" => Question::Range(number(2)?, number(3)?),
            name => Question::Hash(HashRead::parse(name, &args)?),
        };
        Some(Self { key: args.get(1)?.to_vec(), question })
    }

    fn answer(&self, value: &Content<'_>, protocol: Protocol, out: &mut Vec<u8>) {
        match (&self.question, value) {
            (Question::Get, Content::Text(text)) => encode::bulk(out, text),
            (Question::Length, Content::Text(text)) => encode::integer(out, text.len() as i64),
            (Question::Range(start, end), Content::Text(text)) => encode::bulk(out, range(text, *start, *end)),
            (Question::Hash(read), Content::Hash(hash)) => read.answer(hash, protocol, out),
            _ => self.answer_other(out),
        }
    }

    /// Appends what a value of another form answers.
    fn answer_other(&self, out: &mut Vec<u8>) {
        match self.question {
            Question::Exists => encode::integer(out, 1),
            _ => encode::error(out, WRONG_TYPE),
        }
    }
}

/// GETRANGE's part of a value: both ends count, negative ones from the end.
fn range(value: &[u8], start: i64, end: i64) -> &[u8] {
    let length = value.len() as i64;
    if start < 0 && end < 0 && start > end {
        return &[];
    }
    let absolute = |at: i64| if at < 0 { (length + at).max(0) } else { at };
    let (start, end) = (absolute(start), absolute(end).min(length - 1));
    if start > end || length == 0 { &[] } else { &value[start as usize..=end as usize] }
}

#[cfg(test)]
mod tests {
    use super::super::content::Form;
    use super::*;

    #[test]
    fn ranges_are_those_of_redis() {
        let value = b"This is a string";
        for (start, end, part) in [
            (0, 3, &b"This"[..]),
            (-3, -1, b"ing"),
            (0, -1, b"This is a string"),
            (10, 100, b"string"),
            (5, 2, b""),
            (-1, -5, b""),
            (-100, 3, b"This"),
        ] {
            assert_eq!(range(value, start, end), part, "{start} {end}");
        }
        assert_eq!(range(b"", 0, -1), b"");
    }

    #[test]
    fn reads_are_answered_from_the_value() {
        let answer = |command: &[&str]| {
            let mut wire = Vec::new();
            encode::command(&mut wire, command);
            let mut out = Vec::new();
            let value = Content::new(Form::Text, &b"abc"[..]);
            Read::parse(&wire).expect("a read").answer(&value, Protocol::Resp2, &mut out);
            String::from_utf8(out).expect("text")
        };
        assert_eq!(answer(&["GET", "k"]), "$3\r\nabc\r\n");
        assert_eq!(answer(&["exists", "k"]), ":1\r\n");
        assert_eq!(answer(&["STRLEN", "k"]), ":3\r\n");
        assert_eq!(answer(&["GETRANGE", "k", "1", "-1"]), "$2\r\nbc\r\n");
        assert_eq!(answer(&["HGET", "k", "f"]), format!("-{WRONG_TYPE}\r\n"));
    }
}
