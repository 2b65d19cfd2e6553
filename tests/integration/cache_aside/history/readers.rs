//! What applications do: read, load where there is nothing, set.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::run::{KEYS, Row, World};
use crate::support::resp::{Client, Value, encode};

/// How a reader uses its connections, which decides for how long what it loaded may be stored.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Use {
    /// One command after the other: for ten leases.
    Alone,
    /// Shared by several loads: for one lease.
    Shared,
}

/// Loads take a few milliseconds; some outlast a key's TTL and, where that is allowed, a lease.
fn pause(usage: Use, random: &mut fastrand::Rng) {
    let most = match random.u8(0..20) {
        0 if usage == Use::Alone => 1500,
        1..4 => 80,
        _ => 10,
    };
    std::thread::sleep(Duration::from_millis(random.u64(0..=most)));
}

/// What the database says now, after a while and for a while.
fn load(row: &Row, usage: Use, random: &mut fastrand::Rng) -> String {
    pause(usage, random);
    let version = row.version.load(Ordering::SeqCst);
    pause(usage, random);
    row.value(version)
}

/// A client that shares its connections gives a load up that took this long since its nil: half a lease.
const SHARED_LIMIT: Duration = Duration::from_millis(500);

/// Sets what was loaded, as different applications do. `false`: the connection is gone, or is given up.
fn fill(world: &World, row: &Row, client: &mut Client, usage: Use, missed: Instant, random: &mut fastrand::Rng) -> bool {
    let value = load(row, usage, random);
    if usage == Use::Shared && missed.elapsed() > SHARED_LIMIT {
        return false;
    }
    let set: &[&str] = match random.u8(0..20) {
        0 => return false,
        1 => return true,
        2..5 => &["SET", &row.key, &value, "NX"],
        5..7 => &["PSETEX", &row.key, "200", &value],
        7 => &["SETNX", &row.key, &value],
        8..10 => &["MSET", &row.key, &value],
        _ => &["SET", &row.key, &value],
    };
    world.note(|seen| seen.fills += 1);
    !matches!(world.call(client, set), Ok(Value::Error(_)) | Err(_))
}

/// Reads one key. `None`: the connection is gone. `Some(true)`: it is to be loaded.
fn read(world: &World, row: &Row, client: &mut Client, who: &str) -> Option<bool> {
    let least = row.acknowledged.load(Ordering::SeqCst);
    match world.call(client, &["GET", &row.key]).ok()? {
        Value::Nil => {
            world.note(|seen| seen.misses += 1);
            return Some(true);
        }
        Value::Error(_) => {}
        value => world.judge(row, least, &value, who),
    }
    Some(false)
}

/// One connection, one command after the other.
pub fn exclusive(world: &World, mut random: fastrand::Rng) {
    let mut client = world.connect(&mut random);
    if random.bool() {
        // Where the connection is gone, the first read finds out.
        let _ = client.try_call(&["HELLO", "3"]);
    }
    while !world.is_over() {
        let row = &world.rows[random.usize(..KEYS)];
        let stands = match read(world, row, &mut client, "an exclusive reader") {
            Some(true) => fill(world, row, &mut client, Use::Alone, Instant::now(), &mut random),
            Some(false) => true,
            None => false,
        };
        if !stands {
            client = world.connect(&mut random);
        }
    }
}

/// Two connections to one sidecar: the SET may take the other one. Of keys that are only ever deleted.
pub fn pooled(world: &World, mut random: fastrand::Rng) {
    'again: while !world.is_over() {
        let first = world.connect(&mut random);
        // Where the sidecar is gone already, another one is taken.
        let Ok(address) = first.stream().peer_addr() else { continue };
        let Ok(second) = Client::connect(address.port()) else { continue };
        let mut pool = [first, second];
        while !world.is_over() {
            let row = &world.rows[random.usize(..KEYS / 2)];
            let (which, sent) = (random.usize(..2), Instant::now());
            match read(world, row, &mut pool[which], "a pool's reader") {
                Some(true) if !fill(world, row, &mut pool[random.usize(..2)], Use::Shared, sent, &mut random) => continue 'again,
                Some(_) => {}
                None => continue 'again,
            }
        }
    }
}

/// One connection with several commands at once. Of keys that are only ever deleted.
pub fn multiplexed(world: &World, mut random: fastrand::Rng) {
    'again: while !world.is_over() {
        let mut client = world.connect(&mut random);
        while !world.is_over() {
            let rows: Vec<&Row> = (0..4).map(|_| &world.rows[random.usize(..KEYS / 2)]).collect();
            let least: Vec<u64> = rows.iter().map(|row| row.acknowledged.load(Ordering::SeqCst)).collect();
            let batch: Vec<u8> = rows.iter().flat_map(|row| encode(&["GET", &row.key])).collect();
            let sent = Instant::now();
            if world.send(&mut client, &batch).is_err() {
                continue 'again;
            }
            let mut missing = Vec::new();
            for (row, least) in rows.into_iter().zip(least) {
                match world.reply(&mut client, sent, &["GET", &row.key]) {
                    Ok(Value::Nil) => missing.push(row),
                    Ok(Value::Error(_)) => {}
                    Ok(value) => world.judge(row, least, &value, "a multiplexed reader"),
                    Err(_) => continue 'again,
                }
            }
            world.note(|seen| seen.misses += missing.len() as u64);
            for row in missing {
                if !fill(world, row, &mut client, Use::Shared, sent, &mut random) {
                    continue 'again;
                }
            }
        }
    }
}

/// Reads several keys with one command.
pub fn many(world: &World, mut random: fastrand::Rng) {
    'again: while !world.is_over() {
        let mut client = world.connect(&mut random);
        while !world.is_over() {
            let rows: Vec<&Row> = (0..3).map(|_| &world.rows[random.usize(..KEYS)]).collect();
            let least: Vec<u64> = rows.iter().map(|row| row.acknowledged.load(Ordering::SeqCst)).collect();
            let command: Vec<&str> = std::iter::once("MGET").chain(rows.iter().map(|row| row.key.as_str())).collect();
            let values = match world.call(&mut client, &command) {
                Ok(Value::Array(values)) => values,
                Ok(_) => continue,
                Err(_) => continue 'again,
            };
            let mut missing: Vec<&Row> = Vec::new();
            for ((row, least), value) in rows.into_iter().zip(least).zip(&values) {
                match value {
                    Value::Nil if missing.iter().all(|other| other.key != row.key) => missing.push(row),
                    Value::Nil => {}
                    value => world.judge(row, least, value, "a reader of many"),
                }
            }
            world.note(|seen| seen.misses += missing.len() as u64);
            for row in missing {
                if !fill(world, row, &mut client, Use::Alone, Instant::now(), &mut random) {
                    continue 'again;
                }
            }
        }
    }
}
