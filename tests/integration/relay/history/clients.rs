//! The clients of a history, and what they have seen.

use std::collections::BTreeMap;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::{DOUBT_LASTS, LONG};
use crate::faults::evict;
use crate::support::resp::{Client, Value};
use crate::support::sidecar::connect_to_any;

pub const KEYS_OF_A_WRITER: usize = 4;

/// What a client heard of a write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Heard {
    Acknowledged,
    Refused,
    Nothing,
}

/// The writes of one key; the number of each is its place, counted from 1.
#[derive(Default)]
pub struct Account {
    /// Whether it deletes, and what was heard of it.
    pub writes: Vec<(bool, Heard)>,
    /// The last that was acknowledged; 0: none.
    pub acknowledged: usize,
}

impl Account {
    fn begin(&mut self, deletes: bool) -> usize {
        self.writes.push((deletes, Heard::Nothing));
        self.writes.len()
    }

    fn end(&mut self, number: usize, heard: Heard) {
        self.writes[number - 1].1 = heard;
        if heard == Heard::Acknowledged {
            self.acknowledged = number;
        }
    }

    /// Whether a key may be as `value` says, between the writes `floor` and `ceiling`.
    pub fn admits(&self, floor: usize, ceiling: usize, value: Option<usize>) -> bool {
        let may = |number: usize, deletes: bool| {
            self.writes.get(number - 1).is_some_and(|(does, heard)| *does == deletes && *heard != Heard::Refused)
        };
        match value {
            Some(number) => (floor.max(1)..=ceiling).contains(&number) && may(number, false),
            None => floor == 0 || (floor..=ceiling).any(|number| may(number, true)),
        }
    }
}

#[derive(Debug)]
pub struct Read {
    pub key: usize,
    pub floor: usize,
    pub ceiling: usize,
    pub value: Option<usize>,
}

/// What clients know of each other, and what they have seen.
#[derive(Default)]
pub struct World {
    pub ports: Mutex<Vec<u16>>,
    over: AtomicBool,
    pub accounts: Vec<Mutex<Account>>,
    pub reads: Mutex<Vec<Read>>,
    pub errors: Mutex<BTreeMap<String, u64>>,
}

/// Keys of two rules, which share a journal and a table, by turns.
pub fn key(index: usize) -> String {
    format!("{}:{index}", super::RULES[index % super::RULES.len()])
}

pub fn number(value: &Value) -> Option<usize> {
    if *value == Value::Nil { None } else { Some(value.text().parse().expect("a number")) }
}

impl World {
    /// Sidecars at these ports, and so many keys.
    pub fn new(ports: Vec<u16>, keys: usize) -> Self {
        let accounts = (0..keys).map(|_| Mutex::default()).collect();
        Self { ports: Mutex::new(ports), accounts, ..Self::default() }
    }

    fn is_over(&self) -> bool {
        self.over.load(Ordering::SeqCst)
    }

    fn note_error(&self, text: &str) {
        let word = text.split([':', '`']).next().unwrap_or_default().to_owned();
        *self.errors.lock().unwrap().entry(word).or_default() += 1;
    }

    /// Writes to keys of its own.
    pub fn write(&self, writer: usize, seed: u64) {
        let mut random = fastrand::Rng::with_seed(seed);
        let mut client = connect_to_any(&self.ports, &mut random, LONG);
        let mut rests: [Option<Instant>; KEYS_OF_A_WRITER] = [None; KEYS_OF_A_WRITER];
        while !self.is_over() {
            std::thread::sleep(Duration::from_millis(random.u64(0..8)));
            let own = random.usize(..KEYS_OF_A_WRITER);
            if rests[own].is_some_and(|since| since.elapsed() < DOUBT_LASTS) {
                continue;
            }
            let heard = self.write_once(&mut client, writer * KEYS_OF_A_WRITER + own, random.u8(0..8) == 0);
            rests[own] = matches!(heard, Ok(Heard::Nothing) | Err(_)).then(Instant::now);
            if heard.is_err() {
                client = connect_to_any(&self.ports, &mut random, LONG);
            }
        }
    }

    /// Writes to a key once: what was heard of it. An error: the connection is lost, and nothing was.
    pub fn write_once(&self, client: &mut Client, at: usize, deletes: bool) -> io::Result<Heard> {
        let (name, number) = (key(at), self.accounts[at].lock().unwrap().begin(deletes));
        let reply =
            if deletes { client.try_call(&["DEL", &name]) } else { client.try_call(&["SET", &name, &number.to_string()]) };
        let heard = reply.map(|reply| match reply {
            Value::Error(text) => {
                self.note_error(&text);
                let refused =
                    text.contains("nothing was written") || text.starts_with("NOREPLICAS") || text.starts_with("TRYAGAIN");
                if refused { Heard::Refused } else { Heard::Nothing }
            }
            _ => Heard::Acknowledged,
        });
        self.accounts[at].lock().unwrap().end(number, *heard.as_ref().unwrap_or(&Heard::Nothing));
        heard
    }

    /// Reads any keys.
    pub fn read(&self, seed: u64) {
        let mut random = fastrand::Rng::with_seed(seed);
        let mut client = connect_to_any(&self.ports, &mut random, LONG);
        while !self.is_over() {
            std::thread::sleep(Duration::from_micros(random.u64(0..4_000)));
            if self.read_once(&mut client, random.usize(..self.accounts.len())).is_err() {
                client = connect_to_any(&self.ports, &mut random, LONG);
            }
        }
    }

    /// Reads a key once. An error: the connection is lost.
    pub fn read_once(&self, client: &mut Client, at: usize) -> io::Result<()> {
        let floor = self.accounts[at].lock().unwrap().acknowledged;
        match client.try_call(&["GET", &key(at)])? {
            Value::Error(text) => self.note_error(&text),
            value => {
                let ceiling = self.accounts[at].lock().unwrap().writes.len();
                self.reads.lock().unwrap().push(Read { key: at, floor, ceiling, value: number(&value) });
            }
        }
        Ok(())
    }

    /// Drops keys from the cache, as a server does that is full.
    pub fn evict(&self, servers: &[u16], seed: u64) {
        evict(servers, seed, || self.is_over(), |random| key(random.usize(..self.accounts.len())));
    }
}

/// The clients go when this does, also where a test fails.
pub struct Ends<'a>(pub &'a World);

impl Drop for Ends<'_> {
    fn drop(&mut self) {
        self.0.over.store(true, Ordering::SeqCst);
        if std::thread::panicking() {
            println!("the clients heard: {:?}", self.0.errors.lock().unwrap_or_else(PoisonError::into_inner));
        }
    }
}
