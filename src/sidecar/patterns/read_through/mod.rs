//! Read-through: what is missing is loaded from the origin, once.
//!
//! In a worker, reads of one missing key join one *flight*. Across workers and pods, the lease decides who loads: the flight
//! that gets it loads and stores, the others look again until the value is there. A covered write or a deletion removes the
//! lease in its own transaction, and a load is stored only while its lease stands: what was loaded before a write is never
//! stored after it.
//!
//! Whom a loaded value may be given to, when its lease was gone: those who asked before that load began. For them the value is
//! as new as the moment they asked. Those who joined later wait for the next attempt.

mod cache;
mod flight;

use std::cell::RefCell;
use std::rc::Rc;

use rustc_hash::FxHashMap;

pub use flight::{Flight, Outcome};

use super::super::policy::RuleId;
use super::super::resp::{CommandArgs, CommandScan, CommandScanner, encode, reply};
use super::super::session::Session;
use super::super::upstream::mux::Lane;
use super::super::upstream::queue::Recovered;
use super::super::upstream::sink::{Answer, Sink};
use super::super::worker::Worker;

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
}

/// What is done with a key's outcome.
pub type Deliver = Box<dyn FnOnce(&Rc<Worker>, &Outcome)>;

/// Asks for a key; its flight is joined, or made.
fn want(worker: &Rc<Worker>, rule: RuleId, key: FlightKey, deliver: Deliver) -> Option<Rc<Flight>> {
    let mut by_key = worker.flights().by_key.borrow_mut();
    if let Some(flight) = by_key.get(&key) {
        worker.metrics().coalesced(rule);
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

/// A read of one covered key found nothing: GET, or EXISTS, STRLEN and GETRANGE, which are answered from the loaded value.
pub fn on_miss(worker: &Rc<Worker>, rule: RuleId, recovered: Recovered, found: &[u8]) {
    worker.metrics().count_read(rule, true);
    let Sink::Client { session, sequence, .. } = recovered.pending.sink else { return };
    // The policy may have changed since the read was sent: its rules may have other positions.
    let policy = worker.policy();
    let read = Read::parse(&recovered.bytes).map(|read| (policy.find(&read.key), read));
    let Some((rule, read)) = read.filter(|(rule, _)| policy.loads(*rule)) else {
        return session.deliver(sequence, found);
    };
    let key = (recovered.pending.lane, read.key.clone());
    let found = found.to_vec();
    let deliver: Deliver = Box::new(move |_, outcome| match outcome {
        Outcome::Found(value) => session.answer(sequence, |out| read.answer(value, out)),
        Outcome::NotFound => session.deliver(sequence, &found),
        Outcome::Failed(text) => session.answer(sequence, |out| encode::error(out, text)),
    });
    if let Some(flight) = want(worker, rule, key, deliver) {
        flight::launch(worker, vec![flight]);
    }
}

/// A read of one key, as far as its answer can be made from the value.
struct Read {
    key: Vec<u8>,
    form: Form,
}

enum Form {
    Get,
    Exists,
    Length,
    Range(i64, i64),
}

impl Read {
    fn parse(command: &[u8]) -> Option<Self> {
        let mut scanner = CommandScanner::default();
        let Ok(CommandScan::Complete { .. }) = scanner.scan(command) else { return None };
        let args = CommandArgs::new(command, scanner.ranges());
        let number = |index| std::str::from_utf8(args.get(index)?).ok()?.parse().ok();
        let form = match args.name().to_ascii_lowercase().as_slice() {
            b"get" => Form::Get,
            b"exists" => Form::Exists,
            b"strlen" => Form::Length,
            b"getrange" | b"substr" => Form::Range(number(2)?, number(3)?),
            _ => return None,
        };
        Some(Self { key: args.get(1)?.to_vec(), form })
    }

    fn answer(&self, value: &[u8], out: &mut Vec<u8>) {
        match self.form {
            Form::Get => encode::bulk(out, value),
            Form::Exists => encode::integer(out, 1),
            Form::Length => encode::integer(out, value.len() as i64),
            Form::Range(start, end) => encode::bulk(out, range(value, start, end)),
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

/// Completes an MGET whose `answer` may have nulls where keys are loaded through. It was sent on `lane`.
pub fn complete_many(worker: &Rc<Worker>, session: &Rc<Session>, place: u32, lane: Lane, command: &[u8], answer: Answer<'_>) {
    let bytes = match answer {
        Answer::Reply(bytes) => bytes,
        Answer::Failed(text) => return session.answer(place, |out| encode::error(out, text)),
    };
    let missing = count_and_pick_missing(worker, command, bytes);
    let Some(values) = reply::elements(bytes).filter(|_| !missing.is_empty()) else {
        return session.deliver(place, bytes);
    };
    let table = Rc::new(Table {
        session: session.clone(),
        place,
        values: RefCell::new(values.into_iter().map(<[u8]>::to_vec).collect()),
        failure: RefCell::default(),
        open: RefCell::new(missing.len()),
    });
    let mut by_rule: FxHashMap<RuleId, Vec<Rc<Flight>>> = FxHashMap::default();
    for (index, rule, key) in missing {
        let table = table.clone();
        let deliver: Deliver = Box::new(move |_, outcome| table.fill(index, outcome));
        if let Some(flight) = want(worker, rule, (lane, key), deliver) {
            by_rule.entry(rule).or_default().push(flight);
        }
    }
    by_rule.into_values().for_each(|flights| flight::launch(worker, flights));
}

/// The places, rules and names of the keys that MGET did not find and that are loaded through. Counts hits and misses of all.
fn count_and_pick_missing(worker: &Rc<Worker>, command: &[u8], bytes: &[u8]) -> Vec<(usize, RuleId, Vec<u8>)> {
    let mut scanner = CommandScanner::default();
    let Ok(CommandScan::Complete { .. }) = scanner.scan(command) else { return Vec::new() };
    let args = CommandArgs::new(command, scanner.ranges());
    let policy = worker.policy();
    let values = reply::elements(bytes).unwrap_or_default();
    let mut missing = Vec::new();
    for (index, (key, value)) in args.iter().skip(1).zip(values).enumerate() {
        let (rule, null) = (policy.find(key), reply::is_null(value));
        worker.metrics().count_read(rule, null);
        match (policy.loads(rule), null) {
            (true, true) => missing.push((index, rule, key.to_vec())),
            (true, false) => worker.metrics().load_saved(rule),
            (false, _) => {}
        }
    }
    missing
}

/// An MGET's values while some are being loaded.
struct Table {
    session: Rc<Session>,
    place: u32,
    values: RefCell<Vec<Vec<u8>>>,
    failure: RefCell<Option<String>>,
    open: RefCell<usize>,
}

impl Table {
    fn fill(&self, index: usize, outcome: &Outcome) {
        match outcome {
            Outcome::Found(value) => {
                let mut bytes = Vec::with_capacity(value.len() + 16);
                encode::bulk(&mut bytes, value);
                self.values.borrow_mut()[index] = bytes;
            }
            Outcome::NotFound => {}
            Outcome::Failed(text) => *self.failure.borrow_mut() = Some(text.clone()),
        }
        let mut open = self.open.borrow_mut();
        *open -= 1;
        if *open > 0 {
            return;
        }
        // A value that could not be loaded is not a missing one: MGET has no place for an error but the whole reply.
        match &*self.failure.borrow() {
            Some(text) => self.session.answer(self.place, |out| encode::error(out, text)),
            None => self.session.answer(self.place, |out| {
                let values = self.values.borrow();
                encode::array(out, values.len());
                values.iter().for_each(|value| out.extend_from_slice(value));
            }),
        }
    }
}

#[cfg(test)]
mod tests {
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
            Read::parse(&wire).expect("a read").answer(b"abc", &mut out);
            String::from_utf8(out).expect("text")
        };
        assert_eq!(answer(&["GET", "k"]), "$3\r\nabc\r\n");
        assert_eq!(answer(&["exists", "k"]), ":1\r\n");
        assert_eq!(answer(&["STRLEN", "k"]), ":3\r\n");
        assert_eq!(answer(&["GETRANGE", "k", "1", "-1"]), "$2\r\nbc\r\n");
    }
}
