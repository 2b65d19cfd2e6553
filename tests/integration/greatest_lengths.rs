//! Values and keys of 512 MiB, the greatest length that servers take, pass through a sidecar that holds little of them. Neither
//! does this test: what is sent is made as it goes, and what comes back is compared as it comes.

use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::ops::RangeInclusive;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use serde_json::{Value as Json, json};
use tempfile::TempDir;

use crate::support::resp::{Client, Value};
use crate::support::server::{Engine, SentinelCluster};
use crate::support::sidecar::{Sidecar, bypass, sentinel_topology};

const MIB: u64 = 1024 * 1024;
/// `proto-max-bulk-len` as servers have it unless told otherwise.
const LENGTH: u64 = 512 * MIB;
/// What the sidecar may take in addition, at any moment.
const MOST_GROWTH: u64 = 16 * MIB;
/// How long a server may take over one command of such a length. Long: test machines are busy.
const LONG: Duration = Duration::from_secs(180);

/// 512 MiB of letters, of which no two pieces of 64 KiB are alike.
struct Letters {
    piece: Vec<u8>,
    number: u64,
}

impl Letters {
    fn new() -> Self {
        let mut random = fastrand::Rng::with_seed(7);
        Self { piece: (0..64 * 1024).map(|_| letter(random.u64(..))).collect(), number: 0 }
    }

    /// The next piece, until all have been given.
    fn next(&mut self) -> Option<&[u8]> {
        let total = LENGTH / self.piece.len() as u64;
        if self.number == total {
            return None;
        }
        let number = self.number;
        self.number += 1;
        self.piece[..8].iter_mut().enumerate().for_each(|(at, byte)| *byte = letter(number >> (5 * at)));
        Some(&self.piece)
    }
}

/// One of 32: none has a meaning in keys.
fn letter(bits: u64) -> u8 {
    b'A' + (bits & 31) as u8
}

/// Sends a command with [`Letters`] in the place of its word `*`.
fn send(mut stream: &TcpStream, command: &str) {
    let words: Vec<&str> = command.split(' ').collect();
    stream.write_all(format!("*{}\r\n", words.len()).as_bytes()).expect("it reads");
    for word in words {
        if word == "*" {
            write_letters(stream);
        } else {
            stream.write_all(format!("${}\r\n{word}\r\n", word.len()).as_bytes()).expect("it reads");
        }
    }
}

fn write_letters(mut stream: &TcpStream) {
    stream.write_all(format!("${LENGTH}\r\n").as_bytes()).expect("it reads");
    let mut letters = Letters::new();
    while let Some(piece) = letters.next() {
        stream.write_all(piece).expect("it reads");
    }
    stream.write_all(b"\r\n").expect("it reads");
}

/// Reads a bulk string, which must be [`Letters`].
fn read_letters(mut stream: &TcpStream) {
    let mut read = |length: usize| {
        let mut bytes = vec![0; length];
        stream.read_exact(&mut bytes).expect("the reply goes on");
        bytes
    };
    let head = format!("${LENGTH}\r\n");
    assert_eq!(read(head.len()).escape_ascii().to_string(), head.escape_default().to_string());
    let mut letters = Letters::new();
    let mut at = 0;
    while let Some(piece) = letters.next() {
        assert!(read(piece.len()) == piece, "the reply differs within 64 KiB from byte {at}");
        at += piece.len();
    }
    assert_eq!(read(2), b"\r\n");
}

fn patient(client: Client) -> Client {
    client.stream().set_read_timeout(Some(LONG)).expect("a timeout");
    client
}

/// Does `work`, and sees to it that the sidecar has little more memory of its own at any moment in between.
fn in_bounded_memory(sidecar: &Sidecar, what: &str, work: impl FnOnce()) {
    let before = sidecar.resident_bytes();
    let over = AtomicBool::new(false);
    let peak = std::thread::scope(|scope| {
        let watch = scope.spawn(|| {
            let (mut peak, mut looks) = (0, 0);
            while !over.load(Ordering::Relaxed) {
                peak = peak.max(sidecar.resident_bytes());
                looks += 1;
                std::thread::sleep(Duration::from_millis(2));
            }
            assert!(looks > 10, "the memory was looked at {looks} times only");
            peak
        });
        // Ends the watch also where the work fails.
        let _end = OnDrop(&over);
        work();
        over.store(true, Ordering::Relaxed);
        watch.join().expect("the sidecar lives")
    });
    println!("{what}: {} KiB before, {} KiB at most", before / 1024, peak / 1024);
    assert!(peak < before + MOST_GROWTH, "{what}: {} KiB before, {} KiB at most", before / 1024, peak / 1024);
}

struct OnDrop<'a>(&'a AtomicBool);

impl Drop for OnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// A snapshot without rules, and one with a rule for every key; with each the TTLs, in seconds, that keys then have.
fn snapshots(servers: &SentinelCluster) -> [(Json, RangeInclusive<i64>); 2] {
    let mut covered = bypass(sentinel_topology(servers));
    covered["rules"] = json!([{"name": "all", "keys": "{key}", "strategy":
        {"cacheAside": {"ttl": {"default": "10m", "max": "24h", "jitter": "10%"}}}}]);
    [(bypass(sentinel_topology(servers)), -1..=-1), (covered, 300..=600)]
}

#[test]
fn a_value_of_the_greatest_length_is_never_held() {
    let servers = SentinelCluster::start(Engine::Redis7, 0);
    for (snapshot, ttl) in snapshots(&servers) {
        let sidecar = Sidecar::start(&snapshot);
        let mut client = patient(sidecar.client());
        assert_eq!(client.line("GET nothing"), Value::Nil);
        in_bounded_memory(&sidecar, "SET", || {
            send(client.stream(), "SET value *");
            assert_eq!(client.read().expect("a reply"), Value::Simple("OK".to_owned()));
        });
        in_bounded_memory(&sidecar, "GET", || {
            send(client.stream(), "GET value");
            read_letters(client.stream());
        });
        // The client goes on as before.
        assert_eq!(client.line("STRLEN value"), Value::Int(LENGTH as i64));
        let left = client.line("TTL value").int();
        assert!(ttl.contains(&left), "a TTL of {left} s");
        assert_eq!(client.line("DEL value"), Value::Int(1));
    }
}

#[test]
fn a_key_of_the_greatest_length_is_never_held() {
    let servers = SentinelCluster::start(Engine::Redis7, 0);
    let files = TempDir::new().expect("a temporary directory");
    let directory = files.path().display().to_string();
    // Without rules it goes on as it comes; under one it is kept in a file until it is whole, since its end decides.
    for (snapshot, ttl) in snapshots(&servers) {
        let sidecar = Sidecar::start_in(&snapshot, &[], &[("TMPDIR", &directory)]);
        let mut client = patient(sidecar.client());
        assert_eq!(client.line("GET nothing"), Value::Nil);
        in_bounded_memory(&sidecar, "SET", || {
            send(client.stream(), "SET * value");
            assert_eq!(client.read().expect("a reply"), Value::Simple("OK".to_owned()));
        });
        // It is the key that was sent: the only one that the server has.
        let server = patient(servers.primary().client());
        send(server.stream(), "RANDOMKEY");
        read_letters(server.stream());
        in_bounded_memory(&sidecar, "GET, TTL, DEL", || {
            send(client.stream(), "GET *");
            assert_eq!(client.read().expect("a reply").text(), "value");
            send(client.stream(), "TTL *");
            let left = client.read().expect("a reply").int();
            assert!(ttl.contains(&left), "a TTL of {left} s");
            send(client.stream(), "DEL *");
            assert_eq!(client.read().expect("a reply"), Value::Int(1));
        });
        assert_eq!(client.line("DBSIZE"), Value::Int(0));
        assert_eq!(files.path().read_dir().expect("a directory").count(), 0, "a file has a name");
    }
}
