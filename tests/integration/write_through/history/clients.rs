//! The clients of a history, and what they have seen.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::LIMIT;
use crate::faults;
use crate::support::resp::Value;
use crate::support::sidecar::connect_to_any;

/// What a client heard of a write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Heard {
    Made,
    NotMade,
    Nothing,
}

/// A write that changed something, or may have.
#[derive(Debug)]
pub struct Write {
    pub key: usize,
    /// `None`: it deletes.
    pub value: Option<String>,
    pub sent: Instant,
    pub answered: Instant,
    pub heard: Heard,
}

#[derive(Debug)]
pub struct Read {
    pub key: usize,
    pub sent: Instant,
    pub value: Option<String>,
}

/// What clients share, and what they have seen.
#[derive(Default)]
pub struct World {
    pub keys: usize,
    pub ports: Mutex<Vec<u16>>,
    over: AtomicBool,
    next: AtomicU64,
    pub writes: Mutex<Vec<Write>>,
    pub reads: Mutex<Vec<Read>>,
    pub errors: Mutex<BTreeMap<String, u64>>,
}

pub fn key(index: usize) -> String {
    format!("kv:{index}")
}

impl World {
    /// Sidecars at these ports, and so many keys.
    pub fn new(ports: Vec<u16>, keys: usize) -> Self {
        Self { keys, ports: Mutex::new(ports), ..Self::default() }
    }

    fn is_over(&self) -> bool {
        self.over.load(Ordering::SeqCst)
    }

    fn note_error(&self, text: &str) {
        let word = text.split([':', '`']).next().unwrap_or_default().to_owned();
        *self.errors.lock().unwrap().entry(word).or_default() += 1;
    }

    /// Writes to any keys.
    pub fn write(&self, seed: u64) {
        let mut random = fastrand::Rng::with_seed(seed);
        let mut client = connect_to_any(&self.ports, &mut random, LIMIT);
        while !self.is_over() {
            let at = random.usize(..self.keys);
            let value = (random.u8(0..8) > 0).then(|| format!("v{}", self.next.fetch_add(1, Ordering::SeqCst)));
            let sent = Instant::now();
            let reply = match &value {
                Some(value) => client.try_call(&["SET", &key(at), value]),
                None => client.try_call(&["DEL", &key(at)]),
            };
            let answered = Instant::now();
            let heard = match &reply {
                Ok(Value::Error(text)) => {
                    self.note_error(text);
                    if text.contains("nothing was written") { Heard::NotMade } else { Heard::Nothing }
                }
                Ok(_) => Heard::Made,
                Err(_) => Heard::Nothing,
            };
            if reply.is_err() {
                client = connect_to_any(&self.ports, &mut random, LIMIT);
            }
            // What was not there is not deleted.
            if !matches!(reply, Ok(Value::Int(0))) {
                self.writes.lock().unwrap().push(Write { key: at, value, sent, answered, heard });
            }
            std::thread::sleep(Duration::from_millis(random.u64(0..8)));
        }
    }

    /// Reads any keys.
    pub fn read(&self, seed: u64) {
        let mut random = fastrand::Rng::with_seed(seed);
        let mut client = connect_to_any(&self.ports, &mut random, LIMIT);
        while !self.is_over() {
            let at = random.usize(..self.keys);
            let sent = Instant::now();
            match client.try_call(&["GET", &key(at)]) {
                Ok(Value::Error(text)) => self.note_error(&text),
                Ok(Value::Nil) => self.reads.lock().unwrap().push(Read { key: at, sent, value: None }),
                Ok(value) => self.reads.lock().unwrap().push(Read { key: at, sent, value: Some(value.text()) }),
                Err(_) => client = connect_to_any(&self.ports, &mut random, LIMIT),
            }
            std::thread::sleep(Duration::from_micros(random.u64(0..4_000)));
        }
    }

    /// Drops keys from the cache, as a server does that is full.
    pub fn evict(&self, servers: &[u16], seed: u64) {
        faults::evict(servers, seed, || self.is_over(), |random| key(random.usize(..self.keys)));
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
