//! What a database keeps of its log for a slot has an end: Larder's own, `maxLag`, while the cache takes nothing, and the database's own,
//! `max_slot_wal_keep_size`. What is lost by either is made up for before anything of it is shown.

use std::time::Duration;

use serde_json::json;

use super::changes::{SLOT, Shop, bulk, feed, figure};
use super::{LONG, Relay};
use crate::read_through::Servers;
use crate::support::postgres::Postgres;
use crate::support::wait_for;

const KEYS: u32 = 20;
/// Two megabytes of the log that are about no table.
const FILLER: &str = "SELECT pg_logical_emit_message(false, 'filler', repeat('x', 2097152))";
const SLOTS: &str = "SELECT count(*)::text FROM pg_replication_slots";

/// Everything is cached as it was, and names enough lie beside it that a walk over all of them takes a while.
fn cache_all(shop: &Shop, versioned: bool) {
    if !versioned {
        shop.wait_for_walks();
    }
    shop.fill(if versioned { 1_000 } else { 300_000 });
    (1..=KEYS).for_each(|id| assert_eq!(shop.cached(&format!("user:{id}")), bulk("old")));
}

/// Once a relay reads the database again, the first that any sidecar shows of any key is new.
#[track_caller]
fn assert_nothing_is_old(shop: &Shop, relay: &Relay) {
    wait_for("the database is read again", LONG, || figure(relay, "losses_total") == 1 && figure(relay, "reading") == 1);
    for client in &mut shop.clients() {
        for id in 1..=KEYS {
            assert_eq!(client.call(&["GET", &format!("user:{id}")]), bulk("new"), "user:{id}");
        }
    }
}

#[test]
fn a_slot_that_keeps_more_than_it_should_while_the_cache_takes_nothing_is_given_up() {
    let mut feed = feed();
    feed["maxLag"] = json!("1Mi");
    let shop = Shop::of(Postgres::start_logical(), false, &feed);
    let relay = shop.reading();
    cache_all(&shop, false);
    // The log alone does not count while what it tells is taken.
    shop.change(&[FILLER, "UPDATE users SET name = 'old' WHERE id = 1"]);
    shop.wait_to_see("user:1", Some("old"));
    assert_eq!((shop.value(SLOTS).as_str(), figure(&relay, "losses_total")), ("1", 0));
    let Servers::Sentinel(cluster) = &shop.scene.servers else { unreachable!("it is under Sentinel") };
    let cache = cluster.primary();
    cache.pause();
    shop.change(&["UPDATE users SET name = 'new'", FILLER]);
    wait_for("the slot is given up", LONG, || shop.value(SLOTS) == "0");
    wait_for("that is told", LONG, || relay.log().contains("the slot is given up"));
    // It is not made anew before the cache is there: it would keep the log again.
    for _ in 0..10 {
        std::thread::sleep(Duration::from_millis(200));
        assert_eq!(shop.value(SLOTS), "0");
    }
    cache.resume();
    assert_nothing_is_old(&shop, &relay);
    assert_eq!(shop.value(SLOTS), "1");
}

/// Has the database throw away what it keeps for the slot.
fn lose_slot(shop: &Shop) {
    let status = format!("SELECT coalesce(wal_status, 'lost') FROM pg_replication_slots WHERE slot_name = '{SLOT}'");
    wait_for("the database loses the slot", LONG, || {
        shop.change(&[FILLER, "SELECT pg_switch_wal()", "CHECKPOINT"]);
        shop.value(&status) == "lost"
    });
}

fn limited() -> Postgres {
    Postgres::start_logical_with(&["max_slot_wal_keep_size=1MB", "max_wal_size=64MB", "min_wal_size=32MB"])
}

#[test]
fn a_slot_that_the_database_gave_up_while_nobody_read_it_is_made_up_for_before_anything_is_shown() {
    for versioned in [false, true] {
        let shop = Shop::of(limited(), versioned, &feed());
        let relay = shop.reading();
        cache_all(&shop, versioned);
        relay.stop();
        shop.change(&["UPDATE users SET name = 'new'"]);
        lose_slot(&shop);
        assert_nothing_is_old(&shop, &shop.reading());
    }
}

#[test]
fn a_slot_that_the_database_gave_up_while_its_reader_stood_still_is_made_up_for_before_anything_is_shown() {
    let shop = Shop::of(limited(), false, &feed());
    let relay = shop.reading();
    cache_all(&shop, false);
    relay.signal("STOP");
    shop.change(&["UPDATE users SET name = 'new'"]);
    lose_slot(&shop);
    relay.signal("CONT");
    assert_nothing_is_old(&shop, &relay);
}
