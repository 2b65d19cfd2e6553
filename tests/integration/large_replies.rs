//! Large replies have connections of their own, so that other clients' small commands do not wait behind them.

use std::io::{Read, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use crate::support::resp::{Client, Value, encode};
use crate::support::server::{Engine, SentinelCluster};
use crate::support::sidecar::{Sidecar, bypass, sentinel_topology};
use crate::support::wait_for;

const MIB: usize = 1024 * 1024;

/// How many small reads one client makes one after the other in `time`.
fn small_reads(client: &mut Client, time: Duration) -> usize {
    let deadline = Instant::now() + time;
    let mut count = 0;
    while Instant::now() < deadline {
        assert_eq!(client.line("GET small").text(), "v");
        count += 1;
    }
    count
}

/// Reads one reply to `GET` of a value of `length` bytes `b'x'`, a little at a time.
fn read_slowly(client: &Client, length: usize, taken: &AtomicUsize, stop: &AtomicBool) {
    let mut stream = client.stream();
    let header = format!("${length}\r\n");
    let mut left = header.len() + length + 2;
    let mut buffer = vec![0; 64 * 1024];
    while left > 0 && !stop.load(Ordering::Relaxed) {
        let most = left.min(buffer.len());
        let count = stream.read(&mut buffer[..most]).expect("the sidecar goes on");
        assert!(count > 0, "a slow reader was closed");
        left -= count;
        taken.fetch_add(count, Ordering::Relaxed);
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn small_reads_do_not_wait_behind_slow_readers_of_large_values() {
    const READERS: usize = 2;
    let servers = SentinelCluster::start(Engine::Redis7, 1);
    let sidecar = Sidecar::start(&bypass(sentinel_topology(&servers)));
    let mut small = sidecar.client();
    let length = 32 * MIB;
    assert_eq!(small.call(&[&b"SET"[..], b"large", &vec![b'x'; length]]), Value::Simple("OK".to_owned()));
    assert_eq!(small.line("SET small v"), Value::Simple("OK".to_owned()));
    let (time, before) = (Duration::from_secs(2), sidecar.resident_bytes());
    let floor = small_reads(&mut small, time);
    let stop = Arc::new(AtomicBool::new(false));
    let taken: Arc<[AtomicUsize; READERS]> = Arc::default();
    let readers: Vec<_> = (0..READERS)
        .map(|index| {
            let (mut slow, taken, stop) = (sidecar.client(), taken.clone(), stop.clone());
            // The first large reply tells what this client reads.
            assert!(matches!(slow.line("GET large"), Value::Bulk(_)));
            std::thread::spawn(move || {
                while !stop.load(Ordering::Relaxed) {
                    slow.send(&encode(&["GET", "large"])).expect("the sidecar reads");
                    read_slowly(&slow, length, &taken[index], &stop);
                }
            })
        })
        .collect();
    let begun = || taken.iter().all(|taken| taken.load(Ordering::Relaxed) > 2 * MIB);
    wait_for("the large replies to begin", Duration::from_secs(20), begun);
    let beside = small_reads(&mut small, time);
    // The slow readers' replies are not held here either: the server keeps them until they are read.
    let after = sidecar.resident_bytes();
    stop.store(true, Ordering::Relaxed);
    readers.into_iter().for_each(|reader| reader.join().expect("a slow reader got what it asked for"));
    assert!(beside * 6 >= floor, "{beside} small reads beside large ones, {floor} without");
    assert!(after < before + 16 * MIB as u64, "{before} bytes before, {after} after");
}

#[test]
fn a_client_keeps_its_order_when_its_replies_grow_and_shrink() {
    let servers = SentinelCluster::start(Engine::Redis7, 1);
    let sidecar = Sidecar::start(&bypass(sentinel_topology(&servers)));
    let mut client = sidecar.client();
    let connections = || {
        let list = servers.primary().client().line("CLIENT LIST").text();
        list.lines().filter(|line| line.contains("cmd=incr") || line.contains("cmd=get")).count()
    };
    assert_eq!(client.call(&[&b"SET"[..], b"large", &vec![b'x'; MIB]]), Value::Simple("OK".to_owned()));
    let mut counter = 0;
    for small in [0, 1, 5, 1500, 1, 3000, 0] {
        let mut wire = encode(&["GET", "large"]);
        for _ in 0..small {
            wire.extend_from_slice(&encode(&["INCR", "count"]));
        }
        wire.extend_from_slice(&encode(&["GET", "large"]));
        wire.extend_from_slice(&encode(&["INCR", "count"]));
        let mut writer = client.stream().try_clone().unwrap();
        let sender = std::thread::spawn(move || writer.write_all(&wire).unwrap());
        assert!(matches!(client.read().unwrap(), Value::Bulk(bytes) if bytes.len() == MIB));
        for _ in 0..small {
            counter += 1;
            assert_eq!(client.read().unwrap(), Value::Int(counter));
        }
        assert!(matches!(client.read().unwrap(), Value::Bulk(bytes) if bytes.len() == MIB));
        counter += 1;
        assert_eq!(client.read().unwrap(), Value::Int(counter));
        sender.join().unwrap();
    }
    assert_eq!(connections(), 2, "the shared connection, and the one for large replies");
    // Nobody reads large values any more: their connection is not kept.
    drop(client);
    wait_for("the connection for large replies to end", Duration::from_secs(20), || connections() == 1);
}
