//! Rows that are changed all the time, while relays are killed and stand still, Postgres is restarted, and slots and positions vanish: nothing old
//! stays, and no client sees a row go back.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use sqlx::{Connection as _, PgConnection};

use super::changes::{SLOT, STATE, Shop, figure};
use super::{LONG, Relay};
use crate::read_through::Servers;
use crate::support::resp::{Client, Value};
use crate::support::server::{Engine, SentinelCluster};
use crate::support::wait_for;

/// How long rows are changed.
const LASTS: Duration = Duration::from_secs(25);
const KEYS: u32 = 20;

/// Ends the others, also where the test fails.
struct Ends<'a>(&'a AtomicBool);

impl Drop for Ends<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// What a row says, where it says anything.
fn number(value: &Value) -> Option<u64> {
    let Value::Bulk(text) = value else { return None };
    std::str::from_utf8(text).ok()?.parse().ok()
}

/// Changes rows until `done`. Postgres may be away at any time.
fn change_until(url: &str, done: &AtomicBool) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    runtime.block_on(async {
        let mut connection: Option<PgConnection> = None;
        while !done.load(Ordering::Relaxed) {
            if connection.is_none() {
                connection = PgConnection::connect(url).await.ok();
            }
            let Some(open) = &mut connection else { continue };
            let change = "UPDATE users SET name = (name::bigint + 1)::text WHERE id = 1 + floor(random() * 20)::bigint";
            if sqlx::raw_sql(change).execute(open).await.is_err() {
                connection = None;
            }
            tokio::time::sleep(Duration::from_millis(3)).await;
        }
    });
}

/// Reads keys until `done`, and tells which went back: the key, what was seen, and what was seen next.
fn read_until(mut client: Client, done: &AtomicBool) -> Vec<(u32, u64, u64)> {
    let mut seen: BTreeMap<u32, u64> = BTreeMap::new();
    let mut back = Vec::new();
    while !done.load(Ordering::Relaxed) {
        let id = fastrand::u32(1..=KEYS);
        if let Some(now) = number(&client.call(&["GET", &format!("user:{id}")])) {
            let before = seen.insert(id, now).unwrap_or_default();
            if now < before {
                back.push((id, before, now));
            }
        }
    }
    back
}

/// The keys that a client sees otherwise than the database has them.
fn old(shop: &Shop) -> Vec<u32> {
    let mut clients = shop.clients();
    let is_old = |id: &u32| {
        let row = shop.value(&format!("SELECT name FROM users WHERE id = {id}")).into_bytes();
        clients.iter_mut().any(|client| client.call(&["GET", &format!("user:{id}")]) != Value::Bulk(row.clone()))
    };
    (1..=KEYS).filter(is_old).collect()
}

/// How many things can happen.
const DISTURBANCES: u32 = 6;

fn disturb(what: u32, shop: &mut Shop, relays: &mut Vec<Relay>) {
    let at = fastrand::usize(..relays.len());
    match what {
        0 => {
            relays.remove(at).kill();
            relays.push(shop.scene.relay());
        }
        1 => {
            relays[at].signal("STOP");
            std::thread::sleep(Duration::from_millis(fastrand::u64(500..4_000)));
            relays[at].signal("CONT");
        }
        2 => shop.postgres.restart(),
        3 => {
            // Whoever reads it is ended first, and may be back before it can be dropped.
            let end = format!("SELECT pg_terminate_backend(active_pid) FROM pg_replication_slots WHERE slot_name = '{SLOT}'");
            let drop = format!(
                "SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots WHERE NOT active AND slot_name = '{SLOT}'"
            );
            shop.try_to_change(&[&end, "SELECT pg_sleep(0.1)", &drop]);
        }
        4 => drop(shop.kept(&["HSET", STATE, "position", "0/1 elsewhere"])),
        _ => drop(shop.kept(&["DEL", STATE])),
    }
}

#[test]
fn through_all_that_happens_nothing_old_stays() {
    let mut shop = Shop::new(Servers::sentinel(), 2);
    shop.change(&["UPDATE users SET name = '0'"]);
    let url = shop.postgres.url(&shop.database);
    let done = AtomicBool::new(false);
    let mut relays = vec![shop.scene.relay(), shop.scene.relay()];
    let readers: Vec<Client> = (0..4).map(|at| shop.sidecars[at % 2].client()).collect();
    let back: Vec<_> = std::thread::scope(|scope| {
        let _ends = Ends(&done);
        scope.spawn(|| change_until(&url, &done));
        let readers: Vec<_> = readers.into_iter().map(|client| scope.spawn(|| read_until(client, &done))).collect();
        let until = Instant::now() + LASTS;
        while Instant::now() < until {
            std::thread::sleep(Duration::from_millis(fastrand::u64(300..2_000)));
            disturb(fastrand::u32(..DISTURBANCES), &mut shop, &mut relays);
        }
        done.store(true, Ordering::Relaxed);
        readers.into_iter().flat_map(|reader| reader.join().expect("a reader")).collect()
    });
    wait_for("nothing is old", LONG, || old(&shop).is_empty());
    assert_eq!(back, [], "a row went back");
    let changed = shop.value("SELECT sum(name::bigint)::text FROM users");
    let losses: u64 = relays.iter().map(|relay| figure(relay, "losses_total")).sum();
    println!("{changed} changes, and changes may have been lost {losses} times for the relays that live");

    // It would have been noticed: with no relay that reads, what changes stays old.
    relays.into_iter().for_each(Relay::stop);
    assert_eq!(old(&shop), [0; 0]);
    shop.change(&["UPDATE users SET name = '1000000'"]);
    assert_eq!(old(&shop).len(), KEYS as usize);
    let _relay = shop.reading();
    wait_for("nothing is old", LONG, || old(&shop).is_empty());
}

/// What every row says now.
fn rows(shop: &Shop) -> Vec<(u32, u64)> {
    let all = shop.value("SELECT string_agg(id || ' ' || name, ',' ORDER BY id) FROM users");
    let row = |row: &str| row.split_once(' ').and_then(|(id, name)| Some((id.parse().ok()?, name.parse().ok()?)));
    all.split(',').map(|text| row(text).unwrap_or_else(|| panic!("{text}"))).collect()
}

/// Each thing that can happen, one after another, while rows go on changing: behind each, no client is shown for long what is older than what had been
/// committed by then.
#[test]
fn behind_each_thing_that_happens_what_was_committed_is_shown() {
    let mut shop = Shop::new(Servers::sentinel(), 2);
    shop.change(&["UPDATE users SET name = '0'"]);
    let url = shop.postgres.url(&shop.database);
    let done = AtomicBool::new(false);
    let mut relays = vec![shop.scene.relay(), shop.scene.relay()];
    let mut clients = shop.clients();
    std::thread::scope(|scope| {
        let _ends = Ends(&done);
        scope.spawn(|| change_until(&url, &done));
        for what in 0..DISTURBANCES {
            wait_for("a relay reads the database", LONG, || relays.iter().any(|relay| figure(relay, "reading") == 1));
            disturb(what, &mut shop, &mut relays);
            let (committed, began) = (rows(&shop), Instant::now());
            wait_for(&format!("what was committed is shown behind {what}"), LONG, || {
                let is_shown = |client: &mut Client, (id, least): &(u32, u64)| {
                    number(&client.call(&["GET", &format!("user:{id}")])).is_some_and(|shown| shown >= *least)
                };
                clients.iter_mut().all(|client| committed.iter().all(|row| is_shown(client, row)))
            });
            println!("behind {what}: {:?}", began.elapsed());
        }
    });
    drop(relays);
}

/// Changes prices until `done`: their sum rises.
fn raise_until(url: &str, done: &AtomicBool) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    runtime.block_on(async {
        let mut connection = PgConnection::connect(url).await.expect("the server accepts");
        while !done.load(Ordering::Relaxed) {
            sqlx::raw_sql("UPDATE prices SET cents = cents + 1").execute(&mut connection).await.expect("raised");
            tokio::time::sleep(Duration::from_millis(fastrand::u64(5..200))).await;
        }
    });
}

/// A rule with a version, each of whose keys every change is about: versions are evicted, and relays killed, while changes make new ones. A version
/// that is lost is a miss, and never an earlier one.
#[test]
fn through_lost_versions_nothing_old_stays() {
    let shop = Shop::versioned(Servers::sentinel(), 2);
    shop.change(&["INSERT INTO prices VALUES (1, 1)"]);
    let url = shop.postgres.url(&shop.database);
    let done = AtomicBool::new(false);
    let mut relays = vec![shop.scene.relay(), shop.scene.relay()];
    let readers = shop.clients();
    let mut lost = 0;
    let back: Vec<_> = std::thread::scope(|scope| {
        let _ends = Ends(&done);
        scope.spawn(|| raise_until(&url, &done));
        let readers: Vec<_> = readers.into_iter().map(|client| scope.spawn(|| read_total_until(client, &done))).collect();
        let until = Instant::now() + LASTS / 2;
        while Instant::now() < until {
            std::thread::sleep(Duration::from_millis(fastrand::u64(50..500)));
            if fastrand::u32(..8) == 0 {
                relays.remove(0).kill();
                relays.push(shop.scene.relay());
            } else if let Value::Array(versions) = shop.kept(&["KEYS", "larder:v:*"])
                && let Some(version) = fastrand::choice(versions)
            {
                lost += shop.kept(&["DEL", &version.text()]).int();
            }
        }
        done.store(true, Ordering::Relaxed);
        readers.into_iter().flat_map(|reader| reader.join().expect("a reader")).collect()
    });
    assert!(lost > 5, "{lost} versions were lost");
    assert_eq!(back, [], "the sum went back");
    let sum = shop.value("SELECT sum(cents)::text FROM prices");
    shop.wait_to_see("total:all", Some(&sum));
    assert!(sum.parse::<u64>().is_ok_and(|sum| sum > 20), "{sum}");
}

/// Reads the sum until `done`, and tells where it went back: what was seen, and what was seen next.
fn read_total_until(mut client: Client, done: &AtomicBool) -> Vec<(u64, u64)> {
    let (mut before, mut back) = (0, Vec::new());
    while !done.load(Ordering::Relaxed) {
        if let Some(now) = number(&client.call(&["GET", "total:all"])) {
            if now < before {
                back.push((before, now));
            }
            before = now;
        }
    }
    back
}

/// A primary of the cache that dies takes events with it that no replica has, and perhaps the position that says that they were written: either they
/// are written again, or it is noticed.
#[test]
fn through_failovers_of_the_cache_nothing_old_stays() {
    let mut shop = Shop::new(Servers::Sentinel(SentinelCluster::start(Engine::Valkey9, 1)), 2);
    shop.change(&["UPDATE users SET name = '0'"]);
    let url = shop.postgres.url(&shop.database);
    let done = AtomicBool::new(false);
    let relays = [shop.scene.relay(), shop.scene.relay()];
    let readers: Vec<Client> = (0..4).map(|at| shop.sidecars[at % 2].client()).collect();
    std::thread::scope(|scope| {
        let _ends = Ends(&done);
        scope.spawn(|| change_until(&url, &done));
        for client in readers {
            scope.spawn(|| read_until(client, &done));
        }
        for _ in 0..3 {
            std::thread::sleep(Duration::from_millis(fastrand::u64(1_000..3_000)));
            let Servers::Sentinel(cluster) = &mut shop.scene.servers else { unreachable!("it is under Sentinel") };
            cluster.fail_over(LONG);
        }
        std::thread::sleep(Duration::from_secs(1));
    });
    wait_for("nothing is old", LONG, || old(&shop).is_empty());
    let losses: u64 = relays.iter().map(|relay| figure(relay, "losses_total")).sum();
    println!("changes may have been lost {losses} times");
}
