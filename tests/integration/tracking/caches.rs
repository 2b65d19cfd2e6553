//! Many clients that cache, many that write, and what is true in the end: nobody keeps what the servers no longer have.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use super::{Tracker, all_changed};
use crate::support::resp::{Client, Value, encode};
use crate::support::server::{Engine, RedisCluster, SentinelCluster};
use crate::support::sidecar::{Sidecar, bypass, cluster_topology, sentinel_topology};
use crate::support::wait_for;

const KEYS: usize = 12;
const READERS: usize = 4;

fn key(index: usize) -> String {
    format!("key:{index}")
}

/// Reads as an application does that keeps all it reads, until told to forget.
struct Cache {
    tracker: Tracker,
    kept: HashMap<String, Value>,
    hits: usize,
    reads: usize,
    /// Reads that are under way, in order.
    asked: std::collections::VecDeque<String>,
}

impl Cache {
    fn new(client: Client, options: &str) -> Self {
        Self { tracker: Tracker::start(client, options), kept: HashMap::new(), hits: 0, reads: 0, asked: Default::default() }
    }

    fn take(&mut self, frame: Value) {
        match frame {
            Value::Push(items) if items[1] == Value::Nil => self.kept.clear(),
            Value::Push(items) => items[1].items().iter().for_each(|key| drop(self.kept.remove(&key.text()))),
            reply => {
                let key = self.asked.pop_front().expect("a reply answers a read");
                if reply.is_error() {
                    self.kept.remove(&key)
                } else {
                    self.kept.insert(key, reply)
                };
            }
        }
    }

    /// Asks for a key unless it is kept.
    fn want(&mut self, key: &str) {
        self.reads += 1;
        if self.kept.contains_key(key) || self.asked.iter().any(|asked| asked == key) {
            self.hits += 1;
            return;
        }
        self.tracker.client.send(&encode(&["GET", key])).unwrap();
        self.asked.push_back(key.to_owned());
    }

    fn pump(&mut self, depth: usize) {
        while self.asked.len() > depth {
            let frame = self.tracker.client.read().unwrap();
            self.take(frame);
        }
        while let Some(frame) = self.tracker.client.poll() {
            self.take(frame);
        }
    }

    /// Until it keeps nothing else than what is true.
    fn settle(&mut self, truth: &HashMap<String, Value>) {
        self.pump(0);
        wait_for("caches to agree with the servers", Duration::from_secs(20), || {
            self.pump(0);
            self.kept.iter().all(|(key, value)| truth[key] == *value)
        });
    }
}

/// Has clients read and write for a while, and compares. How many reads were answered by the clients themselves.
fn run(near: &Sidecar, far: &Sidecar, seconds: f64, options: &str, disturb: impl FnOnce() + Send) -> f64 {
    let over = AtomicBool::new(false);
    let mut caches: Vec<Cache> =
        (0..READERS).map(|index| Cache::new(if index % 2 == 0 { near.client() } else { far.client() }, options)).collect();
    std::thread::scope(|scope| {
        for (index, sidecar) in [near, far, near].into_iter().enumerate() {
            let over = &over;
            scope.spawn(move || write(&mut sidecar.client(), index as u64, over));
        }
        for (index, cache) in caches.iter_mut().enumerate() {
            let over = &over;
            scope.spawn(move || {
                let mut random = fastrand::Rng::with_seed(100 + index as u64);
                while !over.load(Ordering::SeqCst) {
                    cache.want(&key(random.usize(0..KEYS)));
                    cache.pump(index * 3);
                }
            });
        }
        let began = Instant::now();
        disturb();
        std::thread::sleep(Duration::from_secs_f64(seconds).saturating_sub(began.elapsed()));
        over.store(true, Ordering::SeqCst);
    });
    let mut reader = near.client();
    let lasting = |key: &str, reader: &mut Client| matches!(reader.line(&format!("PTTL {key}")), Value::Int(left) if left < 0);
    wait_for("what lives for moments to be gone", Duration::from_secs(20), || {
        (0..KEYS).all(|index| lasting(&key(index), &mut reader))
    });
    // What is kept from before is compared, and no less what is read now.
    for cache in &mut caches {
        (0..KEYS).for_each(|index| cache.want(&key(index)));
        cache.pump(0);
    }
    let mut read = |key: &str| {
        let mut value = Value::Nil;
        wait_for("the servers to answer", Duration::from_secs(20), || {
            value = reader.line(&format!("GET {key}"));
            !value.is_error()
        });
        value
    };
    let truth: HashMap<String, Value> = (0..KEYS).map(|index| (key(index), read(&key(index)))).collect();
    caches.iter_mut().for_each(|cache| cache.settle(&truth));
    let (hits, reads) = caches.iter().fold((0, 0), |(hits, reads), cache| (hits + cache.hits, reads + cache.reads));
    assert!(caches.iter().any(|cache| !cache.kept.is_empty()), "nothing was kept");
    println!("{options}: {reads} reads, {hits} from the clients' own caches");
    hits as f64 / reads as f64
}

/// Bursts, so that there is something to keep between them.
fn write(client: &mut Client, seed: u64, over: &AtomicBool) {
    let mut random = fastrand::Rng::with_seed(seed);
    let mut version = 0;
    while !over.load(Ordering::SeqCst) {
        for _ in 0..random.usize(1..20) {
            version += 1;
            let key = key(random.usize(0..KEYS));
            let line = match random.u8(0..8) {
                0 => format!("DEL {key}"),
                1 => format!("SET {key} {seed}-{version} PX 30"),
                _ => format!("SET {key} {seed}-{version}"),
            };
            client.line(&line);
        }
        std::thread::sleep(Duration::from_millis(random.u64(0..20)));
    }
}

#[test]
fn nobody_keeps_what_has_changed() {
    let sentinel = SentinelCluster::start(Engine::Redis7, 1);
    let cluster = RedisCluster::start(Engine::Valkey9, 3, 0);
    for topology in [sentinel_topology(&sentinel), cluster_topology(&cluster)] {
        let start = || Sidecar::start_with(&bypass(topology.clone()), &["--workers", "2"]);
        let (near, far) = (start(), start());
        for options in ["", "BCAST PREFIX key:", "OPTOUT NOLOOP"] {
            let share = run(&near, &far, 3.0, options, || {});
            assert!(share > 0.2, "{options}: {share}");
        }
    }
}

/// A primary is killed while clients read and write: they hear that anything may have changed, and keep nothing old.
#[test]
fn a_failover_has_all_caches_dropped() {
    let mut sentinel = SentinelCluster::start(Engine::Redis7, 1);
    let start = |sentinel: &SentinelCluster| Sidecar::start(&bypass(sentinel_topology(sentinel)));
    let (near, far) = (start(&sentinel), start(&sentinel));
    let mut witness = Tracker::start(near.client(), "");
    let mut listener = Tracker::start(near.client(), "BCAST");
    // Nobody writes it: it is still kept when the primary dies.
    witness.line("GET still");
    let first = sentinel.primary_port();
    let at = sentinel.servers.iter().position(|server| server.port() == first).expect("it is one of them");
    run(&near, &far, 4.0, "", || {
        sentinel.servers[at].kill();
        wait_for("a new primary", Duration::from_secs(60), || sentinel.primary_port() != first);
    });
    witness.expect(&all_changed());
    listener.expect(&all_changed());
    // It goes on.
    let mut writer = far.client();
    wait_for("the new primary to tell of changes", Duration::from_secs(20), || {
        witness.pushes();
        witness.line("GET key:0");
        assert!(!writer.line("SET key:0 new").is_error());
        std::thread::sleep(Duration::from_millis(50));
        witness.pushes().contains(&super::changed(&["key:0"]))
    });
}
