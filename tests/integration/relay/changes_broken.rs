//! What the reading of changes rests on, broken on its way to a server: each time something old stays for good, or two relays write at a time. So the
//! histories that find nothing of the kind would find it.

use std::thread;

use sqlx::{AssertSqlSafe, Connection as _, PgConnection};

use super::changes::{CLAIM, STATE, Shop, bulk, figure};
use super::{LONG, Relay};
use crate::read_through::Servers;
use crate::support::resp::Value;
use crate::support::saboteur::{Change, Saboteur};
use crate::support::server::{Engine, SentinelCluster};
use crate::support::sidecar::Sidecar;
use crate::support::wait_for;

const STREAM: &str = "larder:events";
/// Whether the cache still has what was written last is not looked at.
const POSITION: &[Change] = &[Change { from: "state[2] ~= ARGV[2]", to: "false" }];
/// Who writes need not have the latest claim.
const FENCE: &[Change] = &[Change { from: "if (state[1] or '0') ~= ARGV[1] then return {'fenced'} end", to: "" }];
/// Every transaction counts as seen by everybody.
const VISIBILITY: &[Change] = &[Change { from: "SELECT txid_current_snapshot()::text", to: "SELECT '9000000:9000000:'" }];

/// A relay that reads, once the walk of its beginning is over: what is cached from then on stays.
fn settled(shop: &Shop) -> Relay {
    let relay = shop.reading();
    shop.wait_for_walks();
    for key in ["user:1", "user:2", "user:3"] {
        assert_eq!(shop.cached(key), bulk("old"));
    }
    relay
}

/// A change of another row is seen: whatever was to be said before it has been said, and carried out.
fn see_a_later_change(shop: &Shop) {
    shop.change(&["UPDATE users SET name = 'later' WHERE id = 3"]);
    shop.wait_to_see("user:3", Some("later"));
}

/// `user:1` changes, and the cache goes back to where it was before the event, as in a failover that loses the latest writes, before any sidecar
/// had read it.
fn lose_an_event(changes: &'static [Change]) -> (Shop, Relay) {
    let mut shop = Shop::new(Servers::Sentinel(SentinelCluster::start_sabotaged(Engine::Valkey9, 0, changes)), 1);
    let relay = settled(&shop);
    // One that only stood still might have the event on its connection.
    drop(shop.sidecars.remove(0));
    let keys = [STREAM, STATE];
    let before = keys.map(|key| shop.kept(&["DUMP", key]));
    let length = |shop: &Shop| shop.kept(&["XLEN", STREAM]).int();
    let written = length(&shop);
    shop.change(&["UPDATE users SET name = 'new' WHERE id = 1"]);
    wait_for("the event is written", LONG, || length(&shop) > written);
    for (key, dump) in keys.into_iter().zip(before) {
        let Value::Bulk(dump) = dump else { panic!("{dump:?}") };
        let words: [&[u8]; 5] = [b"RESTORE", key.as_bytes(), b"0", &dump, b"REPLACE"];
        assert_eq!(shop.scene.servers.holder_of(STREAM).call(&words), Value::Simple("OK".to_owned()));
    }
    shop.sidecars.push(Sidecar::start(&shop.scene.snapshot));
    (shop, relay)
}

#[test]
fn an_event_that_the_cache_lost_is_made_up_for() {
    let (shop, _relay) = lose_an_event(&[]);
    shop.wait_to_see("user:1", Some("new"));
}

#[test]
fn an_event_that_the_cache_lost_would_be_missed_without_the_position() {
    let (shop, relay) = lose_an_event(POSITION);
    see_a_later_change(&shop);
    assert_eq!((shop.cached("user:1"), figure(&relay, "losses_total")), (bulk("old"), 0));
    let Servers::Sentinel(cluster) = &shop.scene.servers else { unreachable!("it is under Sentinel") };
    assert!(cluster.sabotaged() > 0);
}

/// Two rows change in transactions that are in the database's log, and that nobody can see yet.
pub struct Unseen<'a> {
    shop: &'a Shop,
}

impl<'a> Unseen<'a> {
    pub fn begin<'scope>(shop: &'a Shop, scope: &'scope thread::Scope<'scope, '_>) -> Self {
        shop.change(&["ALTER SYSTEM SET synchronous_standby_names = 'nobody'", "SELECT pg_reload_conf()"]);
        wait_for("commits wait for a replica", LONG, || shop.value("SHOW synchronous_standby_names") == "nobody");
        for id in 1..=2 {
            let url = shop.postgres.url(&shop.database);
            scope.spawn(move || update(&url, id));
            let waiting = "SELECT count(*)::text FROM pg_stat_activity WHERE wait_event = 'SyncRep'";
            wait_for("the commit is in the log", LONG, || shop.value(waiting) == id.to_string());
        }
        Self { shop }
    }
}

impl Drop for Unseen<'_> {
    fn drop(&mut self) {
        self.shop.try_to_change(&["ALTER SYSTEM RESET synchronous_standby_names", "SELECT pg_reload_conf()"]);
    }
}

fn update(url: &str, id: u32) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    runtime.block_on(async {
        let mut connection = PgConnection::connect(url).await.expect("the server accepts");
        let update = format!("UPDATE users SET name = 'new' WHERE id = {id}");
        sqlx::raw_sql(AssertSqlSafe(update)).execute(&mut connection).await.expect("updated");
    });
}

#[test]
fn an_event_is_not_written_before_its_change_can_be_seen() {
    let shop = Shop::new(Servers::Sentinel(SentinelCluster::start(Engine::Valkey9, 0)), 1);
    let _relay = settled(&shop);
    thread::scope(|scope| {
        let _unseen = Unseen::begin(&shop, scope);
        assert_eq!(shop.cached("user:1"), bulk("old"));
    });
    shop.wait_to_see("user:1", Some("new"));
    shop.wait_to_see("user:2", Some("new"));
}

#[test]
fn an_event_that_is_written_before_its_change_can_be_seen_would_be_missed() {
    let (saboteur, mut sabotage) = (Saboteur::open(), None);
    let port = saboteur.port();
    let shop = Shop::behind(Servers::Sentinel(SentinelCluster::start(Engine::Valkey9, 0)), 1, |postgres| {
        sabotage = Some(saboteur.before(postgres, VISIBILITY));
        port
    });
    let relay = settled(&shop);
    let said = figure(&relay, "keys_total");
    thread::scope(|scope| {
        let _unseen = Unseen::begin(&shop, scope);
        wait_for("both are said", LONG, || figure(&relay, "keys_total") == said + 2);
        // The second is carried out behind the first.
        wait_for("both are carried out", LONG, || shop.scene.servers.holder_of("user:2").line("EXISTS user:2") == Value::Int(0));
        assert_eq!(shop.cached("user:1"), bulk("old"), "a load in between stores the row as it was");
    });
    see_a_later_change(&shop);
    assert_eq!(shop.cached("user:1"), bulk("old"), "and nobody says any more that it is old");
    assert!(sabotage.is_some_and(|sabotage| sabotage.made() > 0));
}

/// Another relay claims the feed, as the cache has it, just before a row changes, five times over: how many events the relay that had it before
/// writes meanwhile.
fn write_overtaken(changes: &'static [Change]) -> i64 {
    // KEYS: claim, state, stream.
    const OVERTAKE: &str = "\
redis.call('SET', KEYS[1], 'another', 'PX', 1500)
redis.call('HINCRBY', KEYS[2], 'fence', 1)
return redis.call('XLEN', KEYS[3])";
    const LOOK: &str = "\
if redis.call('GET', KEYS[1]) ~= 'another' then return -1 end
return redis.call('XLEN', KEYS[3])";
    let shop = Shop::new(Servers::Sentinel(SentinelCluster::start_sabotaged(Engine::Valkey9, 0, changes)), 1);
    let relay = settled(&shop);
    let run = |script: &str| shop.kept(&["EVAL", script, "3", CLAIM, STATE, STREAM]).int();
    let mut written = 0;
    for round in 0..5 {
        wait_for("the relay reads", LONG, || figure(&relay, "reading") == 1);
        let before = run(OVERTAKE);
        shop.change(&[&format!("UPDATE users SET name = 'round {round}' WHERE id = 1")]);
        let mut last = before;
        wait_for("the other's claim ends", LONG, || {
            let length = run(LOOK);
            last = last.max(length);
            length < 0
        });
        written += last - before;
        shop.wait_to_see("user:1", Some(&format!("round {round}")));
    }
    written
}

#[test]
fn what_a_relay_writes_that_was_overtaken_is_refused() {
    assert_eq!(write_overtaken(&[]), 0);
}

#[test]
fn what_a_relay_writes_that_was_overtaken_would_be_taken_without_the_fence() {
    assert!(write_overtaken(FENCE) > 0);
}
