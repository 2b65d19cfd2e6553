//! Many clients with pipelines on keys of their own, every reply of which is checked.
//!
//! A key has one writer, who writes rising numbers and reads them back. So each reply tells whether it belongs to its command,
//! whether an older write came over a newer one, and whether a write was carried out that was said not to be.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::support::resp::{Client, Value, encode};
use crate::support::wait_for;

/// Commands that one client sends before it reads.
pub const DEPTH: usize = 64;
/// What a write acknowledged this shortly before a fault may lose: replication is asynchronous, and test machines are busy.
const MAY_BE_LOST: Duration = Duration::from_secs(1);
/// How long a batch may take. Long: test machines are busy.
const BATCH_LIMIT: Duration = Duration::from_secs(60);

/// How keys are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Writes {
    /// As they are sent to a server.
    Plain,
    /// By commands that a rule with a TTL turns into transactions: `SET … KEEPTTL`, and `SETRANGE`, which answers with a length.
    Wrapped,
}

/// A key and the shard that it lived in at the start.
#[derive(Debug, Clone)]
pub struct Key {
    pub name: String,
    pub shard: usize,
}

/// What the clients do and see.
#[derive(Debug, Default)]
struct Control {
    stop: AtomicBool,
    /// Set while clients leave no pause between their batches.
    busy: AtomicBool,
    in_flight: AtomicI64,
    fault: Mutex<Option<Fault>>,
}

/// When which shard lost its primary.
#[derive(Debug, Clone, Copy)]
struct Fault {
    shard: usize,
    at: Instant,
    /// When it was made good. Batches that are sent later meet no error.
    over: Option<Instant>,
}

/// What one client saw.
#[derive(Debug, Default)]
pub struct Seen {
    pub acknowledged: usize,
    pub uncertain: usize,
    pub refused: usize,
    pub lost: usize,
    /// Successes since the last error.
    pub recovered: usize,
    /// What must never happen.
    pub wrong: Vec<String>,
}

/// A load that runs.
pub struct Load {
    /// When every key existed.
    began: Instant,
    control: Arc<Control>,
    clients: Vec<JoinHandle<Seen>>,
    /// When each client began the last batch that it has finished.
    finished: Vec<Arc<Mutex<Option<Instant>>>>,
}

impl Load {
    /// One client on `port` for each list of keys. The keys must exist nowhere; they exist when this returns.
    pub fn start(port: u16, keys: Vec<Vec<Key>>, writes: Writes) -> Self {
        let control = Arc::new(Control::default());
        let start = |keys: Vec<Key>| {
            let mut client = Checked::new(port, keys, writes, control.clone());
            client.fill();
            client
        };
        let clients: Vec<Checked> = keys.into_iter().map(start).collect();
        let finished = clients.iter().map(|client| client.finished.clone()).collect();
        let began = Instant::now();
        let clients = clients.into_iter().map(|client| std::thread::spawn(move || client.run())).collect();
        Self { began, control, clients, finished }
    }

    /// Waits until `count` commands are in flight, has `fault` befall the primary of `shard`, and tells how many were.
    pub fn strike(&self, shard: usize, count: i64, fault: impl FnOnce()) -> i64 {
        self.control.busy.store(true, Ordering::Relaxed);
        let deadline = Instant::now() + Duration::from_secs(20);
        loop {
            let in_flight = self.control.in_flight.load(Ordering::Relaxed);
            if in_flight >= count {
                *self.control.fault.lock().unwrap_or_else(PoisonError::into_inner) =
                    Some(Fault { shard, at: Instant::now(), over: None });
                fault();
                self.control.busy.store(false, Ordering::Relaxed);
                return in_flight;
            }
            assert!(Instant::now() < deadline, "never {count} commands in flight");
            std::thread::yield_now();
        }
    }

    /// From now on the fault explains nothing more. Waits until each client has had a whole batch since.
    pub fn calm(&self) {
        let mut fault = self.control.fault.lock().unwrap_or_else(PoisonError::into_inner);
        fault.as_mut().expect("there was a fault").over.get_or_insert_with(Instant::now);
        drop(fault);
        self.wait_for_a_batch_of_each();
    }

    /// Waits until each client has been at work for so long that a fault may not lose its first writes.
    pub fn wait_for_writes_that_last(&self) {
        self.wait_for_a_batch_after(self.began + MAY_BE_LOST * 2);
    }

    /// Waits until each client has sent a batch and got every reply.
    pub fn wait_for_a_batch_of_each(&self) {
        self.wait_for_a_batch_after(Instant::now());
    }

    fn wait_for_a_batch_after(&self, at: Instant) {
        for (client, finished) in self.finished.iter().enumerate() {
            wait_for(&format!("a batch of client {client}"), BATCH_LIMIT, || {
                finished.lock().unwrap_or_else(PoisonError::into_inner).is_some_and(|began| began > at)
            });
        }
    }

    /// Ends the load. Panics with the first wrong replies, if any.
    pub fn stop(self) -> Vec<Seen> {
        self.control.stop.store(true, Ordering::Relaxed);
        let seen: Vec<Seen> = self.clients.into_iter().map(|client| client.join().expect("the client lives")).collect();
        let wrong: Vec<&String> = seen.iter().flat_map(|seen| &seen.wrong).collect();
        assert!(wrong.is_empty(), "{} wrong, such as {:#?}", wrong.len(), &wrong[..wrong.len().min(5)]);
        seen
    }
}

/// What is known of one key.
#[derive(Debug)]
struct Known {
    key: Key,
    issued: u64,
    /// The newest number that was acknowledged or read, and when.
    floor: (u64, Instant),
    /// What was acknowledged, and when.
    acknowledged: Vec<(u64, Instant)>,
    /// Numbers of writes that were said not to be carried out.
    never: BTreeSet<u64>,
    /// Whether a failover's loss was already seen.
    rewound: bool,
    /// Whether the key was found missing, and no write was acknowledged since.
    gone: bool,
}

impl Known {
    /// The newest number that a failover may not lose.
    fn safe(&self, fault: &Fault) -> u64 {
        let old_enough = |(_, at): &&(u64, Instant)| *at + MAY_BE_LOST < fault.at;
        self.acknowledged.iter().rev().find(old_enough).map_or(0, |(number, _)| *number)
    }
}

struct Checked {
    client: Client,
    keys: Vec<Known>,
    writes: Writes,
    control: Arc<Control>,
    /// When the batch under way was sent.
    began: Instant,
    finished: Arc<Mutex<Option<Instant>>>,
    seen: Seen,
}

enum Sent {
    /// The key, the number, and the reply that says that it was written.
    Write(usize, u64, Value),
    Get(usize),
}

/// A command that writes `number` to `key`, and its reply.
fn write(writes: Writes, key: &str, number: u64) -> (Vec<u8>, Value) {
    let value = format!("{key}={number}");
    let ok = Value::Simple("OK".to_owned());
    match writes {
        Writes::Plain => (encode(&["SET", key, &value]), ok),
        Writes::Wrapped if number.is_multiple_of(2) => (encode(&["SET", key, &value, "KEEPTTL"]), ok),
        // Numbers only rise, so that nothing of the value before is left behind it.
        Writes::Wrapped => (encode(&["SETRANGE", key, "0", &value]), Value::Int(value.len() as i64)),
    }
}

impl Checked {
    fn new(port: u16, keys: Vec<Key>, writes: Writes, control: Arc<Control>) -> Self {
        let known = |key| Known {
            key,
            issued: 0,
            floor: (0, Instant::now()),
            acknowledged: Vec::new(),
            never: BTreeSet::new(),
            rewound: false,
            gone: false,
        };
        let client = Client::connect(port).expect("the sidecar accepts");
        Self {
            client,
            keys: keys.into_iter().map(known).collect(),
            writes,
            control,
            began: Instant::now(),
            finished: Arc::default(),
            seen: Seen::default(),
        }
    }

    fn fill(&mut self) {
        for known in &mut self.keys {
            known.issued = 1;
            known.floor.0 = 1;
            known.acknowledged.push((1, Instant::now()));
            let reply = self.client.call(&["SET", &known.key.name, &format!("{}=1", known.key.name)]);
            assert_eq!(reply, Value::Simple("OK".to_owned()));
        }
    }

    fn run(mut self) -> Seen {
        let mut random =
            fastrand::Rng::with_seed(self.keys.len() as u64 ^ u64::from(self.client.stream().local_addr().unwrap().port()));
        while !self.control.stop.load(Ordering::Relaxed) {
            self.batch(&mut random);
            if !self.control.busy.load(Ordering::Relaxed) {
                std::thread::sleep(Duration::from_millis(20));
            }
        }
        self.seen
    }

    fn batch(&mut self, random: &mut fastrand::Rng) {
        let (mut bytes, mut sent) = (Vec::new(), Vec::new());
        for _ in 0..DEPTH {
            let index = random.usize(..self.keys.len());
            let known = &mut self.keys[index];
            if random.bool() {
                known.issued += 1;
                let (command, reply) = write(self.writes, &known.key.name, known.issued);
                bytes.extend(command);
                sent.push(Sent::Write(index, known.issued, reply));
            } else {
                bytes.extend(encode(&["GET", &known.key.name]));
                sent.push(Sent::Get(index));
            }
        }
        self.control.in_flight.fetch_add(sent.len() as i64, Ordering::Relaxed);
        self.began = Instant::now();
        self.client.send(&bytes).expect("the sidecar reads");
        for command in sent {
            let reply = self.client.read().unwrap_or_else(|error| panic!("no reply: {error}; seen {:?}", self.seen));
            self.control.in_flight.fetch_sub(1, Ordering::Relaxed);
            let wrong = match command {
                Sent::Write(index, number, written) => self.on_write(index, number, &written, &reply),
                Sent::Get(index) => self.on_get(index, &reply),
            };
            if let Err(why) = wrong {
                self.seen.wrong.push(format!("{why}: {reply:?}"));
            }
        }
        *self.finished.lock().unwrap_or_else(PoisonError::into_inner) = Some(self.began);
    }

    /// Checks that an error is one that a fault explains; the failed shard's only.
    fn on_error(&mut self, index: usize, text: &str, allowed: &[&str]) -> Result<(), String> {
        self.seen.recovered = 0;
        self.seen.refused += 1;
        let fault = *self.control.fault.lock().unwrap_or_else(PoisonError::into_inner);
        let key = &self.keys[index].key;
        let felt = |fault: Fault| fault.shard == key.shard && fault.over.is_none_or(|over| self.began < over);
        let explained = fault.is_some_and(felt) && allowed.iter().any(|code| text.starts_with(code));
        if explained { Ok(()) } else { Err(format!("an error on {} of shard {}, with {fault:?}", key.name, key.shard)) }
    }

    fn on_write(&mut self, index: usize, number: u64, written: &Value, reply: &Value) -> Result<(), String> {
        let known = &mut self.keys[index];
        match reply {
            reply if reply == written => {
                known.floor = (number, Instant::now());
                known.acknowledged.push(known.floor);
                known.gone = false;
                self.seen.acknowledged += 1;
                self.seen.recovered += 1;
                Ok(())
            }
            Value::Error(text) if text.starts_with("UNCERTAIN ") => {
                self.seen.uncertain += 1;
                self.on_error(index, text, &["UNCERTAIN "])
            }
            Value::Error(text) => {
                known.never.insert(number);
                self.on_error(index, text, &["TRYAGAIN ", "CLUSTERDOWN ", "READONLY "])
            }
            _ => Err(format!("an answer to the write of {} {number}", known.key.name)),
        }
    }

    fn on_get(&mut self, index: usize, reply: &Value) -> Result<(), String> {
        let known = &mut self.keys[index];
        let text = match reply {
            Value::Bulk(bytes) => String::from_utf8_lossy(bytes).into_owned(),
            Value::Error(text) => return self.on_error(index, text, &["TRYAGAIN ", "CLUSTERDOWN "]),
            Value::Nil => return self.on_missing(index),
            _ => return Err(format!("an answer to GET {}", known.key.name)),
        };
        let number =
            text.strip_prefix(&known.key.name).and_then(|rest| rest.strip_prefix('=')).and_then(|digits| digits.parse().ok());
        let Some(number): Option<u64> = number else { return Err(format!("another key's value for GET {}", known.key.name)) };
        if number > known.issued || known.never.contains(&number) {
            return Err(format!("a value of {} that was never to be written", known.key.name));
        }
        if number < known.floor.0 {
            let fault = *self.control.fault.lock().unwrap_or_else(PoisonError::into_inner);
            let fault = fault.filter(|fault| fault.shard == known.key.shard && known.floor.1 < fault.at + MAY_BE_LOST);
            let Some(_) = fault.filter(|fault| !known.rewound && number >= known.safe(fault)) else {
                return Err(format!("an older value of {} after {}", known.key.name, known.floor.0));
            };
            known.rewound = true;
            self.seen.lost += 1;
        }
        known.floor = (number, Instant::now());
        known.gone = false;
        self.seen.recovered += 1;
        Ok(())
    }

    /// Keys of a rule that were written shortly before a failover are removed at the new primary, which may have an older value.
    fn on_missing(&mut self, index: usize) -> Result<(), String> {
        let known = &mut self.keys[index];
        let fault = *self.control.fault.lock().unwrap_or_else(PoisonError::into_inner);
        let felt = |fault: Fault| fault.shard == known.key.shard && fault.over.is_none_or(|over| known.floor.1 < over);
        let removed = self.writes == Writes::Wrapped && fault.is_some_and(felt);
        if !(known.gone || removed) {
            return Err(format!("nothing for GET {} after {}, with {fault:?}", known.key.name, known.floor.0));
        }
        self.seen.lost += usize::from(!known.gone);
        known.gone = true;
        self.seen.recovered += 1;
        Ok(())
    }
}
