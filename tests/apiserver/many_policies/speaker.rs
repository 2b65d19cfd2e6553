//! A crowd of sidecars that speaks round after round, and follows what the cache tells it, on threads of its own.

use std::collections::HashMap;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use crate::support::crowd::{Crowd, Tally};
use crate::support::resp::Client;

/// How often each sidecar speaks, where there are few of one binding.
const ROUND: Duration = Duration::from_secs(5);
/// What ends the one that listens: no binding has this name.
const END: &str = "larder:p:(end)";

/// What sidecars count from one round to the next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Course {
    /// Always as much, of which nine tenths are hits.
    Even,
    /// Misses alone, so many that every ratio falls by some per cent.
    Falling,
    /// Nothing.
    Idle,
}

impl Course {
    fn next(self, before: Tally) -> Tally {
        let Tally { round, hits, misses } = before;
        let (more_hits, more_misses) = match self {
            Self::Even => (90, 10),
            Self::Falling => (0, (hits + misses) / 20),
            Self::Idle => (0, 0),
        };
        Tally { round: round + 1, hits: hits + more_hits, misses: misses + more_misses }
    }
}

struct Shared {
    crowd: Crowd,
    ends: AtomicBool,
    course: Mutex<Course>,
    /// What was said in the last round that is over.
    said: Mutex<Tally>,
    heartbeats: AtomicU64,
    unheard: AtomicU64,
    /// When the cache first told of a binding's newest generation.
    told: Mutex<HashMap<String, (u64, Instant)>>,
}

/// A crowd that speaks until this is dropped, which is to be before its server is.
pub struct Speaker {
    port: u16,
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

impl Speaker {
    /// Begins to speak at a server on loopback. Returns once it follows what is told there.
    pub fn start(port: u16, crowd: Crowd) -> Self {
        let shared = Arc::new(Shared {
            crowd,
            ends: AtomicBool::new(false),
            course: Mutex::new(Course::Even),
            said: Mutex::default(),
            heartbeats: AtomicU64::new(0),
            unheard: AtomicU64::new(0),
            told: Mutex::default(),
        });
        let mut hears = connect(port);
        hears.call(&["PSUBSCRIBE", "larder:p:*"]);
        let (one, other) = (shared.clone(), shared.clone());
        let threads = vec![thread::spawn(move || follow(&one, &mut hears)), thread::spawn(move || speak(&other, connect(port)))];
        Self { port, shared, threads }
    }

    /// What sidecars count from the next round on.
    pub fn set(&self, course: Course) {
        *lock(&self.shared.course) = course;
    }

    /// Waits until all have said all that they counted, and count no more. What that was.
    pub async fn await_idle(&self) -> Tally {
        let said = || *lock(&self.shared.said);
        let mut before = said();
        loop {
            tokio::time::sleep(ROUND / 10).await;
            let now = said();
            if now.round > before.round && (now.hits, now.misses) == (before.hits, before.misses) {
                return now;
            }
            if now.round > before.round {
                before = now;
            }
        }
    }

    /// How many heartbeats were published so far, and how many of them nobody heard.
    pub fn heartbeats(&self) -> (u64, u64) {
        (self.shared.heartbeats.load(Ordering::Relaxed), self.shared.unheard.load(Ordering::Relaxed))
    }

    /// The generation that a binding's sidecars have, and since when it is told of; the latter only where it has been while somebody listened.
    pub fn generation(&self, binding: &str) -> (u64, Option<Instant>) {
        let voice = self.shared.crowd.voices.iter().find(|voice| voice.binding.as_str() == binding).expect("a binding of ours");
        let told = lock(&self.shared.told).get(&voice.binding.snapshot_key()).map(|(_, since)| *since);
        (voice.generation.load(Ordering::Relaxed), told)
    }
}

impl Drop for Speaker {
    fn drop(&mut self) {
        self.shared.ends.store(true, Ordering::Relaxed);
        if let Ok(mut server) = Client::connect(self.port) {
            let _ = server.try_call(&["PUBLISH", END, ""]);
        }
        let failed = self.threads.drain(..).map(JoinHandle::join).filter(Result::is_err).count();
        assert!(failed == 0 || thread::panicking(), "who speaks for sidecars failed");
    }
}

fn connect(port: u16) -> Client {
    Client::connect(port).expect("the server accepts")
}

fn lock<T>(what: &Mutex<T>) -> MutexGuard<'_, T> {
    what.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Has sidecars take up what the cache tells of.
fn follow(shared: &Shared, hears: &mut Client) {
    let voices: HashMap<String, &AtomicU64> =
        shared.crowd.voices.iter().map(|voice| (voice.binding.snapshot_key(), &voice.generation)).collect();
    while !shared.ends.load(Ordering::Relaxed) {
        let message = match hears.read() {
            Ok(message) => message,
            // Nothing was said for long.
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => continue,
            Err(error) => panic!("nobody tells of snapshots any more: {error}"),
        };
        let (channel, text) = (message.items()[2].text(), message.items()[3].text());
        if let (Some(generation), Ok(told)) = (voices.get(&channel), text.parse::<u64>())
            && generation.fetch_max(told, Ordering::Relaxed) < told
        {
            lock(&shared.told).insert(channel, (told, Instant::now()));
        }
    }
}

fn speak(shared: &Shared, mut server: Client) {
    let mut tally = Tally::default();
    while !shared.ends.load(Ordering::Relaxed) {
        let began = Instant::now();
        tally = lock(&shared.course).next(tally);
        let all = shared.crowd.len();
        let heard = shared.crowd.speak(&mut server, tally);
        *lock(&shared.said) = tally;
        shared.heartbeats.fetch_add(all as u64, Ordering::Relaxed);
        shared.unheard.fetch_add((all - heard) as u64, Ordering::Relaxed);
        while began.elapsed() < ROUND && !shared.ends.load(Ordering::Relaxed) {
            thread::sleep(Duration::from_millis(20));
        }
    }
}
