//! What docs/database-changes.md promises of the reading itself: that an idle table holds up no log, that the figures tell how far behind it is, and
//! that a transaction is said as a whole, and not before its commit.

use std::thread;
use std::time::{Instant, UNIX_EPOCH};

use serde_json::{Value as Json, json};
use sqlx::{Connection as _, PgConnection};

use super::changes::{SLOT, Shop, bulk, feed, figure};
use super::changes_broken::Unseen;
use super::together::{DELETE, TABLES, WRITE};
use super::{LONG, Scene, sentinel, sql_rule};
use crate::read_through::{Servers, rule, sql_origin};
use crate::support::postgres::Postgres;
use crate::support::resp::Value;
use crate::support::sidecar::Sidecar;
use crate::support::wait_for;
use crate::write_through::block;

const STREAM: &str = "larder:events";

/// The last entry of the stream of events: its words.
fn last_entry(shop: &Shop) -> Vec<String> {
    let entries = shop.kept(&["XREVRANGE", STREAM, "+", "-", "COUNT", "1"]).items();
    let entry = entries.first().map(Value::items).unwrap_or_default();
    entry.get(1).map(Value::items).unwrap_or_default().iter().map(Value::text).collect()
}

fn is_cached(shop: &Shop, id: u32) -> bool {
    let key = format!("user:{id}");
    shop.scene.servers.holder_of(&key).call(&["EXISTS", &key]) == Value::Int(1)
}

#[test]
fn the_slot_of_an_idle_table_goes_on_while_others_write() {
    let shop = Shop::new(Servers::sentinel(), 1);
    let relay = shop.reading();
    let noise = ["CREATE TABLE noise (n int)", "INSERT INTO noise SELECT generate_series(1, 10000)"];
    let kept = || shop.value(&format!("SELECT restart_lsn::text FROM pg_replication_slots WHERE slot_name = '{SLOT}'"));
    let goes_on = |place: &str, before: &str| {
        let written = shop.value("SELECT pg_current_wal_lsn()::text");
        let confirmed =
            format!("SELECT (confirmed_flush_lsn >= '{written}')::text FROM pg_replication_slots WHERE slot_name = '{SLOT}'");
        wait_for(&format!("the slot to be confirmed behind what was written in {place}"), LONG, || {
            shop.value(&confirmed) == "true"
        });
        // So is what it keeps the log from, once the server has written down which transactions run.
        wait_for(&format!("the log of {place} to be let go"), LONG, || {
            shop.change(&["CHECKPOINT"]);
            shop.value(&format!("SELECT (restart_lsn > '{before}')::text FROM pg_replication_slots WHERE slot_name = '{SLOT}'"))
                == "true"
        });
    };
    let before = kept();
    shop.change(&noise);
    goes_on("the same database", &before);
    let before = kept();
    block(shop.postgres.run("postgres", &noise));
    goes_on("another database", &before);
    assert_eq!((figure(&relay, "keys_total"), figure(&relay, "losses_total")), (0, 0), "nothing was said");
}

/// How old a change may be that is not said, as `larder changes` shows it, in milliseconds.
fn shown_behind(shop: &Shop) -> u128 {
    let output = shop.scene.person(&["changes", "--output", "json"]);
    let feeds: Json = serde_json::from_slice(&output.stdout).expect("JSON");
    feeds[0]["behindMilliseconds"].as_u64().unwrap_or_else(|| panic!("{feeds}")).into()
}

/// What is shown of how far behind the reading is, is never less than the age of a change that is not said, and falls once it is.
fn check_behind(shop: &Shop, committed: Instant, shown: impl Fn() -> u128, release: impl FnOnce()) {
    let mut before = 0;
    wait_for("the figure to grow", LONG, || {
        let age = committed.elapsed().as_millis();
        let behind = shown();
        // Both are cut to milliseconds, by two processes.
        assert!(behind + 2 >= age, "{behind} ms are shown, and a change of {age} ms ago is not said");
        assert!(behind >= before, "it fell from {before} to {behind} while nothing was said");
        before = behind;
        behind >= 3_000
    });
    release();
    wait_for("the figure to fall", LONG, || shown() < before);
    shop.wait_to_see("user:1", Some("new"));
}

/// Where the reading is, is known once something was said.
fn say_something(shop: &Shop) {
    shop.change(&["UPDATE users SET name = 'settled' WHERE id = 20"]);
    shop.wait_to_see("user:20", Some("settled"));
}

#[test]
fn what_larder_changes_shows_grows_while_the_relay_stands_still() {
    let shop = Shop::new(Servers::sentinel(), 1);
    let relay = shop.reading();
    assert_eq!((shop.cached("user:1"), shop.cached("user:20")), (bulk("old"), bulk("old")));
    say_something(&shop);
    relay.signal("STOP");
    shop.change(&["UPDATE users SET name = 'new' WHERE id = 1"]);
    check_behind(&shop, Instant::now(), || shown_behind(&shop), || relay.signal("CONT"));
}

/// A commit that is in the log, and that nobody may see yet, holds up the relay that reads it.
#[test]
fn a_relay_s_own_figures_grow_while_it_waits_and_tell_how_long_that_was() {
    let shop = Shop::new(Servers::sentinel(), 1);
    let relay = shop.reading();
    assert_eq!(shop.cached("user:20"), bulk("old"));
    say_something(&shop);
    let (began, mut held) = (Instant::now(), 0);
    thread::scope(|scope| {
        let unseen = Unseen::begin(&shop, scope);
        let committed = Instant::now();
        let release = || {
            held = committed.elapsed().as_millis();
            drop(unseen);
        };
        check_behind(&shop, committed, || figure(&relay, "behind_milliseconds").into(), release);
    });
    wait_for("the lag of what was held up", LONG, || u128::from(figure(&relay, "lag_milliseconds")) >= held);
    let lag = u128::from(figure(&relay, "lag_milliseconds"));
    assert!(lag <= began.elapsed().as_millis(), "{lag} ms is longer than all that it took");
}

/// A script that waited in a server that stood still says no more than was so when it was made.
#[test]
fn an_outage_of_the_cache_counts_in_what_is_shown() {
    let shop = Shop::new(Servers::sentinel(), 1);
    let relay = shop.reading();
    assert_eq!(shop.cached("user:20"), bulk("old"));
    say_something(&shop);
    let Servers::Sentinel(cluster) = &shop.scene.servers else { unreachable!("it is under Sentinel") };
    let cache = cluster.primary();
    let clock = || UNIX_EPOCH.elapsed().expect("it is later").as_millis();
    let mut monitor = cache.client();
    assert_eq!(monitor.line("MONITOR"), Value::Simple("OK".to_owned()));
    cache.pause();
    shop.change(&["UPDATE users SET name = 'new' WHERE id = 1"]);
    let committed = clock();
    wait_for("the relay has no answer", LONG, || relay.log().contains("no answer within"));
    let outage = clock() - committed;
    cache.resume();
    // By the cache's clock, in milliseconds since 1970: up to when all is said, as it is written with the change.
    let mut is_said = false;
    let through = loop {
        let Ok(Value::Simple(command)) = monitor.read() else { panic!("nothing is said: {}", relay.log()) };
        is_said |= command.contains("user:1\"");
        let written = command.split_once(r#""through" ""#).and_then(|(_, rest)| rest.split('"').next()?.parse::<u128>().ok());
        if let Some(through) = written.filter(|_| is_said) {
            break through;
        }
    };
    // The relay had read it a moment after its commit.
    let after = through.saturating_sub(committed);
    assert!(after < outage / 2, "all is said up to {after} ms after the last commit that was, before an outage of {outage} ms");
    shop.wait_to_see("user:1", Some("new"));
}

#[test]
fn a_transaction_is_said_as_a_whole_and_not_before_its_commit() {
    let shop = Shop::new(Servers::sentinel(), 1);
    let _relay = shop.reading();
    shop.wait_for_walks();
    (1..=6).for_each(|id| assert_eq!(shop.cached(&format!("user:{id}")), bulk("old")));
    let update = |id: u32| format!("UPDATE users SET name = 'new' WHERE id = {id}");
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    let open = |ids: std::ops::RangeInclusive<u32>| {
        runtime.block_on(async {
            let mut connection = PgConnection::connect(&shop.postgres.url(&shop.database)).await.expect("the server accepts");
            sqlx::raw_sql("BEGIN").execute(&mut connection).await.expect("begun");
            for id in ids {
                sqlx::raw_sql(sqlx::AssertSqlSafe(update(id))).execute(&mut connection).await.expect("updated");
            }
            connection
        })
    };
    let (mut whole, mut given_up) = (open(1..=3), open(4..=4));
    // What is committed meanwhile is said, and nothing of what is not.
    shop.change(&[&update(5)]);
    shop.wait_to_see("user:5", Some("new"));
    assert_eq!(last_entry(&shop), ["key", "user:5"]);
    assert!((1..=4).all(|id| is_cached(&shop, id)), "a row that is not committed was said");
    runtime.block_on(async {
        sqlx::raw_sql("ROLLBACK").execute(&mut given_up).await.expect("rolled back");
        sqlx::raw_sql("COMMIT").execute(&mut whole).await.expect("committed");
    });
    (1..=3).for_each(|id| shop.wait_to_see(&format!("user:{id}"), Some("new")));
    assert_eq!(last_entry(&shop), ["key", "user:1", "key", "user:2", "key", "user:3"], "all of it in one entry");
    shop.change(&[&update(6)]);
    shop.wait_to_see("user:6", Some("new"));
    assert!(is_cached(&shop, 4), "what was rolled back was said");
}

/// A write that waited in the journal is told of like any other once the relay has made it: what it stored stays, and what else is made from the row goes.
#[test]
fn a_write_behind_does_not_remove_what_it_stored() {
    let postgres = Postgres::start_logical();
    let url = block(postgres.database(&TABLES));
    let database = url.rsplit('/').next().expect("a name");
    let shout = rule("shout", "db", json!({"sql": {"read": "SELECT upper(name) FROM users WHERE id = $id"}}), json!({}));
    let mut scene = Scene::new(sentinel(), &[sql_origin("db", &url)], &[sql_rule("users", "db", WRITE, DELETE), shout]);
    let follow = |rule: &str| json!({"rule": rule, "table": "users", "touches": {"key": {}}});
    let mut both = feed();
    both["follows"] = json!([follow("users"), follow("shout")]);
    scene.follow(&[both]);
    let sidecar = Sidecar::start(&scene.snapshot);
    let relay = scene.relay();
    wait_for("a relay reads the database", LONG, || figure(&relay, "reading") == 1);
    let mut client = sidecar.client();
    let (named, mut writes) = (figure(&relay, "keys_total"), 0_u64);
    // The walk of the beginning may still be under way, and take with it what is written first.
    wait_for("what is written stays cached", LONG, || {
        writes += 1;
        assert_eq!(client.call(&["SET", "users:1", &format!("mine {writes}")]), Value::Simple("OK".to_owned()));
        wait_for("what else is made from the row is new", LONG, || client.line("GET shout:1") == bulk(&format!("MINE {writes}")));
        wait_for("the change is said", LONG, || figure(&relay, "keys_total") == named + writes);
        scene.wait_until_drained();
        scene.servers.holder_of("users:1").line("EXISTS users:1") == Value::Int(1)
    });
    assert_eq!(client.line("GET users:1"), bulk(&format!("mine {writes}")));
    assert_eq!(figure(&relay, "keys_total"), named + writes, "of the two keys one was named each time");
    // Somebody else's change of the same row is another matter.
    block(postgres.run(database, &["UPDATE users SET name = 'theirs' WHERE id = '1'"]));
    wait_for("the change is seen", LONG, || client.line("GET users:1") == bulk("theirs"));
}
