//! Databases' changes: read by one relay at a time from a real Postgres, and seen through real sidecars.

use std::time::Duration;

use serde_json::{Value as Json, json};

use super::{LONG, Relay, Scene};
use crate::read_through::{Servers, rule, sql_origin};
use crate::support::admin::metric;
use crate::support::postgres::Postgres;
use crate::support::resp::{Client, Value};
use crate::support::sidecar::Sidecar;
use crate::support::wait_for;

/// The slot, the publication, and what is kept of them in the cache.
pub const SLOT: &str = "larder_main_db";
pub const STATE: &str = "larder:cs:{larder:events}larder_main_db";
pub const CLAIM: &str = "larder:cr:{larder:events}larder_main_db";
/// What sidecars keep of their reading of the stream.
pub const PLACE: &str = "larder:es:{larder:events}";

const TABLES: [&str; 5] = [
    "CREATE TABLE users (id bigint PRIMARY KEY, name text)",
    "CREATE TABLE orders (id int PRIMARY KEY, user_id bigint, what text)",
    "ALTER TABLE orders REPLICA IDENTITY FULL",
    "CREATE TABLE prices (id int PRIMARY KEY, cents int)",
    "INSERT INTO users SELECT n, 'old' FROM generate_series(1, 20) AS n",
];

/// A database, a cache, and sidecars whose rules follow the database's tables.
pub struct Shop {
    pub postgres: Postgres,
    pub database: String,
    pub scene: Scene,
    pub sidecars: Vec<Sidecar>,
    runtime: tokio::runtime::Runtime,
}

/// `user:{id}`, the orders of a user, and the sum of all prices.
fn rules() -> Vec<Json> {
    let sql = |read: &str| json!({"sql": {"read": read}});
    let settings = || json!({"negativeTtl": "1h"});
    let mut total = rule("total", "db", sql("SELECT sum(cents) FROM prices WHERE $kind = 'all' HAVING count(*) > 0"), settings());
    total["keys"] = json!("total:{kind}");
    vec![
        rule("user", "db", sql("SELECT name FROM users WHERE id = $id"), settings()),
        rule(
            "orders",
            "db",
            sql("SELECT string_agg(what, ' ' ORDER BY id) FROM orders WHERE user_id = $id HAVING count(*) > 0"),
            settings(),
        ),
        total,
    ]
}

pub fn feed() -> Json {
    json!({
        "origin": "db", "slot": SLOT, "publication": SLOT, "maxLag": "1Gi",
        "follows": [
            {"rule": "user", "table": "users", "touches": {"key": {}}},
            {"rule": "orders", "table": "orders", "touches": {"key": {"columns": {"id": "user_id"}}}},
            {"rule": "total", "table": "prices", "touches": {"all": {}}},
        ],
    })
}

impl Shop {
    pub fn new(servers: Servers, sidecars: usize) -> Self {
        Self::behind(servers, sidecars, |port| port)
    }

    /// [`Shop::new`], where Larder asks the database by the port that `door` makes of its own.
    pub fn behind(servers: Servers, sidecars: usize, door: impl FnOnce(u16) -> u16) -> Self {
        Self::under(&rules(), servers, sidecars, door)
    }

    /// [`Shop::new`] with more rules, and where the keys of the rule about all prices have a version.
    pub fn with(servers: Servers, more: &[Json], sidecars: usize) -> Self {
        let mut rules = rules();
        rules[2]["versioned"] = json!(true);
        rules.extend_from_slice(more);
        Self::under(&rules, servers, sidecars, |port| port)
    }

    /// [`Shop::new`], with other rules that follow the same tables otherwise.
    pub fn following(rules: &[Json], follows: &Json, servers: Servers, sidecars: usize) -> Self {
        let mut feed = feed();
        feed["follows"] = follows.clone();
        Self::on(Postgres::start_logical(), rules, &feed, servers, sidecars, |port| port)
    }

    /// [`Shop::new`], where all keys have a version, or none have.
    pub fn of(postgres: Postgres, all_versioned: bool, feed: &Json) -> Self {
        let mut rules = rules();
        rules.iter_mut().for_each(|rule| rule["versioned"] = json!(all_versioned));
        Self::on(postgres, &rules, feed, Servers::sentinel(), 2, |port| port)
    }

    fn under(rules: &[Json], servers: Servers, sidecars: usize, door: impl FnOnce(u16) -> u16) -> Self {
        Self::on(Postgres::start_logical(), rules, &feed(), servers, sidecars, door)
    }

    fn on(
        postgres: Postgres,
        rules: &[Json],
        feed: &Json,
        servers: Servers,
        sidecars: usize,
        door: impl FnOnce(u16) -> u16,
    ) -> Self {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        let url = runtime.block_on(postgres.database(&TABLES));
        let own = postgres.port();
        let origins = [sql_origin("db", &url.replace(&format!(":{own}/"), &format!(":{}/", door(own))))];
        let mut scene = Scene::new(servers, &origins, rules);
        scene.follow(std::slice::from_ref(feed));
        let sidecars = (0..sidecars).map(|_| Sidecar::start(&scene.snapshot)).collect();
        let database = url.rsplit('/').next().expect("a name").to_owned();
        Self { postgres, database, scene, sidecars, runtime }
    }

    /// Runs statements past Larder.
    pub fn change(&self, statements: &[&str]) {
        self.runtime.block_on(self.postgres.run(&self.database, statements));
    }

    /// The same, where the database may refuse them or be away.
    pub fn try_to_change(&self, statements: &[&str]) {
        self.runtime.block_on(self.postgres.try_to_run(&self.database, statements));
    }

    pub fn value(&self, query: &str) -> String {
        self.runtime.block_on(self.postgres.value(&self.database, query))
    }

    pub fn clients(&self) -> Vec<Client> {
        self.sidecars.iter().map(Sidecar::client).collect()
    }

    /// The answer of the first sidecar, which is in the cache from then on.
    #[track_caller]
    pub fn cached(&self, key: &str) -> Value {
        let first = self.clients()[0].call(&["GET", key]);
        assert!(!first.is_error(), "{first:?}");
        first
    }

    /// Waits until all sidecars answer this.
    #[track_caller]
    pub fn wait_to_see(&self, key: &str, value: Option<&str>) {
        let wanted = value.map_or(Value::Nil, bulk);
        let mut clients = self.clients();
        wait_for(&format!("{key} is {value:?}"), LONG, || clients.iter_mut().all(|client| client.call(&["GET", key]) == wanted));
    }

    /// A relay, once it reads the database.
    pub fn reading(&self) -> Relay {
        let relay = self.scene.relay();
        wait_for("a relay reads the database", LONG, || figure(&relay, "reading") == 1);
        relay
    }

    /// Waits until the walks of a beginning are over.
    #[track_caller]
    pub fn wait_for_walks(&self) {
        self.wait_for_walks_of(&["user", "orders", "total"]);
    }

    /// The same, of other rules.
    #[track_caller]
    pub fn wait_for_walks_of(&self, rules: &[&str]) {
        wait_for("the walks of the beginning are over", LONG, || {
            let Value::Bulk(jobs) = self.kept(&["HGET", PLACE, "jobs"]) else { return false };
            let jobs = String::from_utf8_lossy(&jobs).into_owned();
            let ended = rules.iter().all(|rule| jobs.contains(&format!("\"{rule}\"")));
            ended && !jobs.contains("\"current\"") && !jobs.contains("\"next\"")
        });
    }

    /// So many names more for walks to pass by.
    pub fn fill(&self, names: u32) {
        let fill = format!("for i = 1, {names} do redis.call('SET', 'filler:' .. i, '') end");
        assert_eq!(self.scene.servers.holder_of("user:1").call(&["EVAL", &fill, "0"]), Value::Nil);
    }

    /// What the cache has under a key of the feed's.
    pub fn kept(&self, command: &[&str]) -> Value {
        self.scene.servers.holder_of("larder:events").call(command)
    }
}

pub fn figure(relay: &Relay, name: &str) -> u64 {
    relay.figure_of(&format!("larder_changes_{name}"), "origin", "db")
}

pub fn bulk(text: &str) -> Value {
    Value::Bulk(text.as_bytes().to_vec())
}

#[test]
fn rows_that_change_take_their_keys_with_them_under_sentinel() {
    check_changes(Servers::sentinel());
}

#[test]
fn rows_that_change_take_their_keys_with_them_in_a_cluster() {
    check_changes(Servers::cluster());
}

fn check_changes(servers: Servers) {
    let shop = Shop::new(servers, 2);
    let relay = shop.reading();
    assert_eq!(shop.cached("user:1"), bulk("old"));
    shop.change(&["UPDATE users SET name = 'new' WHERE id = 1"]);
    shop.wait_to_see("user:1", Some("new"));
    assert_eq!(shop.cached("user:77"), Value::Nil);
    shop.change(&["INSERT INTO users VALUES (77, 'Zoe')"]);
    shop.wait_to_see("user:77", Some("Zoe"));
    // A row that gets another key is about both, and so is one that gets another user.
    assert_eq!(shop.cached("user:78"), Value::Nil);
    shop.change(&["UPDATE users SET id = 78 WHERE id = 77"]);
    shop.wait_to_see("user:77", None);
    shop.wait_to_see("user:78", Some("Zoe"));
    shop.change(&["INSERT INTO orders VALUES (1, 1, 'tea'), (2, 2, 'jam')"]);
    shop.wait_to_see("orders:1", Some("tea"));
    assert_eq!(shop.cached("orders:2"), bulk("jam"));
    shop.change(&["UPDATE orders SET user_id = 2 WHERE id = 1"]);
    shop.wait_to_see("orders:2", Some("tea jam"));
    shop.wait_to_see("orders:1", None);
    shop.change(&["DELETE FROM orders WHERE id = 2"]);
    shop.wait_to_see("orders:2", Some("tea"));
    // Where any row may matter to any key, and where a table is emptied.
    shop.change(&["INSERT INTO prices VALUES (1, 100)"]);
    shop.wait_to_see("total:all", Some("100"));
    shop.change(&["INSERT INTO prices VALUES (2, 50)"]);
    shop.wait_to_see("total:all", Some("150"));
    shop.change(&["TRUNCATE users"]);
    shop.wait_to_see("user:1", None);
    assert_eq!((figure(&relay, "losses_total"), figure(&relay, "troubles")), (0, 0));
    assert!(figure(&relay, "keys_total") >= 8, "{}", relay.log());
}

#[test]
fn another_relay_goes_on_where_one_died_or_stood_still_and_so_does_the_database() {
    let mut shop = Shop::new(Servers::sentinel(), 1);
    let mut relays = vec![shop.reading(), shop.scene.relay()];
    for round in 0..6 {
        let (key, name) = (format!("user:{}", round + 1), format!("round {round}"));
        assert_eq!(shop.cached(&key), bulk("old"));
        let update = format!("UPDATE users SET name = '{name}' WHERE id = {}", round + 1);
        let reads = |relays: &[Relay]| relays.iter().position(|relay| figure(relay, "reading") == 1);
        wait_for("one reads", LONG, || reads(&relays).is_some());
        let at = reads(&relays).expect("one reads");
        match round % 3 {
            0 => {
                relays.remove(at).kill();
                shop.change(&[&update]);
                relays.push(shop.scene.relay());
                shop.wait_to_see(&key, Some(&name));
            }
            1 => {
                relays[at].signal("STOP");
                shop.change(&[&update]);
                shop.wait_to_see(&key, Some(&name));
                relays[at].signal("CONT");
            }
            _ => {
                shop.change(&[&update]);
                shop.postgres.restart();
                shop.wait_to_see(&key, Some(&name));
            }
        }
    }
    let losses: u64 = relays.iter().map(|relay| figure(relay, "losses_total")).sum();
    assert_eq!(losses, 0, "nothing was lost, and nothing was taken for lost");
    // One that is told to end gives the feed up at once, and leaves the slot to the next.
    relays.into_iter().for_each(Relay::stop);
    assert_eq!(shop.kept(&["EXISTS", CLAIM]), Value::Int(0));
    assert_eq!(shop.value("SELECT count(*)::text FROM pg_replication_slots"), "1");
}

#[test]
fn where_changes_may_be_lost_everything_that_follows_goes() {
    let shop = Shop::new(Servers::sentinel(), 1);
    shop.reading().stop();
    // The slot is dropped, and with it what nobody had read.
    assert_eq!(shop.cached("user:1"), bulk("old"));
    shop.change(&[&format!("SELECT pg_drop_replication_slot('{SLOT}')"), "UPDATE users SET name = 'one' WHERE id = 1"]);
    let relay = shop.reading();
    shop.wait_to_see("user:1", Some("one"));
    assert_eq!(figure(&relay, "losses_total"), 1);
    relay.stop();
    // Somebody else reads the slot.
    assert_eq!(shop.cached("user:2"), bulk("old"));
    shop.change(&["UPDATE users SET name = 'two' WHERE id = 2"]);
    shop.change(&[&format!("SELECT count(*) FROM pg_logical_slot_get_binary_changes('{SLOT}', NULL, NULL, 'proto_version', '1', 'publication_names', '{SLOT}')")]);
    let relay = shop.reading();
    shop.wait_to_see("user:2", Some("two"));
    assert_eq!(figure(&relay, "losses_total"), 1);
    // The cache forgets where it was, as after a failover that loses the latest writes.
    assert_eq!(shop.cached("user:3"), bulk("old"));
    relay.signal("STOP");
    shop.change(&["UPDATE users SET name = 'three' WHERE id = 3"]);
    assert_eq!(shop.kept(&["HSET", STATE, "position", "0/1 elsewhere"]), Value::Int(0));
    relay.signal("CONT");
    shop.wait_to_see("user:3", Some("three"));
    wait_for("it is noticed", LONG, || figure(&relay, "losses_total") == 2);
    relay.stop();
    assert_eq!(shop.kept(&["DEL", STATE]), Value::Int(1));
    assert_eq!(shop.cached("user:4"), bulk("old"));
    let relay = shop.reading();
    shop.change(&["UPDATE users SET name = 'four' WHERE id = 4"]);
    shop.wait_to_see("user:4", Some("four"));
    drop(relay);
}

/// While the keys of a lost slot's rules are walked over, whoever knows of the feed shows nothing that was cached before. Who does not know of it
/// shows it, as the test would notice.
#[test]
fn once_a_database_is_read_again_nothing_is_shown_that_was_cached_before_its_slot_was_lost() {
    let shop = Shop::new(Servers::sentinel(), 2);
    let mut without = shop.scene.snapshot.clone();
    without.as_object_mut().expect("an object").remove("feeds");
    let unaware = Sidecar::start(&without);
    shop.reading().stop();
    let walked =
        || shop.sidecars.iter().chain([&unaware]).map(|sidecar| metric(sidecar, "larder_invalidation_walks_total")).sum::<u64>();
    shop.wait_for_walks();
    let before = walked();
    shop.fill(400_000);
    (1..=20).for_each(|id| assert_eq!(shop.cached(&format!("user:{id}")), bulk("old")));
    shop.change(&[&format!("SELECT pg_drop_replication_slot('{SLOT}')"), "UPDATE users SET name = 'new'"]);
    let relay = shop.reading();
    let mut clients = shop.clients();
    for id in 1..=8 {
        let key = format!("user:{id}");
        clients.iter_mut().for_each(|client| assert_eq!(client.call(&["GET", &key]), bulk("new"), "{key}"));
    }
    let many: Vec<Value> = clients.iter_mut().map(|client| client.call(&["MGET", "user:9", "user:10"])).collect();
    assert_eq!(many, vec![Value::Array(vec![bulk("new"), bulk("new")]); 2]);
    let client = &mut clients[0];
    assert_eq!(client.line("WATCH user:11"), Value::Simple("OK".to_owned()));
    assert_eq!(client.line("MULTI"), Value::Simple("OK".to_owned()));
    ["GET user:11", "STRLEN user:12"].iter().for_each(|line| assert!(!client.line(line).is_error(), "{line}"));
    assert_eq!(client.line("EXEC"), Value::Array(vec![Value::Nil, Value::Int(0)]));
    let mut other = unaware.client();
    let old = (13..=19).filter(|id| other.call(&["GET", &format!("user:{id}")]) == bulk("old")).count();
    assert_eq!((old, walked()), (7, before), "nothing was walked over yet");
    // Behind the walk, what is in the cache is shown again.
    wait_for("the walk is over", LONG, || walked() > before);
    wait_for("what is cached is shown", LONG, || {
        shop.scene.servers.holder_of("user:20").line("SET user:20 planted");
        clients.iter_mut().all(|client| client.line("GET user:20") == bulk("planted"))
    });
    assert_eq!(figure(&relay, "losses_total"), 1);
}

/// Where rules are versioned, the keys of a lost slot's rules go by one write for each, however many there are.
#[test]
fn a_lost_slot_takes_no_walk_where_rules_are_versioned() {
    let shop = Shop::of(Postgres::start_logical(), true, &feed());
    shop.reading().stop();
    let old: Vec<Value> = (1..=20).map(|id| shop.cached(&format!("user:{id}"))).collect();
    assert_eq!(old, vec![bulk("old"); 20]);
    shop.change(&[&format!("SELECT pg_drop_replication_slot('{SLOT}')"), "UPDATE users SET name = 'new'"]);
    let relay = shop.reading();
    (1..=20).for_each(|id| shop.wait_to_see(&format!("user:{id}"), Some("new")));
    assert_eq!(figure(&relay, "losses_total"), 1);
    let seen: u64 = shop.sidecars.iter().map(|sidecar| metric(sidecar, "larder_invalidation_walk_seen_total")).sum();
    assert_eq!(seen, 0, "no name was looked at");
}

#[test]
fn a_policy_that_changes_is_followed_and_a_slot_that_nobody_needs_goes() {
    let mut shop = Shop::new(Servers::sentinel(), 1);
    let mut less = feed();
    less["follows"].as_array_mut().expect("a list").truncate(1);
    shop.scene.follow(&[less]);
    let relay = shop.reading();
    assert_eq!(shop.cached("orders:1"), Value::Nil);
    shop.change(&["INSERT INTO orders VALUES (1, 1, 'tea')"]);
    // What changed before a rule followed is not shown once it does.
    shop.scene.follow(&[feed()]);
    shop.wait_to_see("orders:1", Some("tea"));
    let tables = "SELECT count(*)::text FROM pg_publication_tables";
    wait_for("all tables are published", LONG, || shop.value(tables) == "3");
    assert_eq!(figure(&relay, "losses_total"), 0);
    shop.scene.follow(&[]);
    let left = "SELECT ((SELECT count(*) FROM pg_replication_slots) + (SELECT count(*) FROM pg_publication))::text";
    wait_for("the slot is taken away", LONG, || shop.value(left) == "0");
    drop(relay);
}

/// What the operator asks of a relay before a policy goes: slot and publication are taken away, whoever had read by them, and the cache is told.
#[test]
fn a_feed_that_nobody_follows_any_more_is_taken_away_and_the_cache_is_told() {
    let mut shop = Shop::new(Servers::sentinel(), 1);
    let relays = [shop.reading(), shop.scene.relay()];
    let said = |shop: &Shop, field: &str| match shop.kept(&["HGET", STATE, field]) {
        Value::Bulk(text) => Some(String::from_utf8(text).expect("a text")),
        _ => None,
    };
    wait_for("it is known up to when all is said", LONG, || said(&shop, "through").is_some());
    assert_eq!((said(&shop, "trouble"), said(&shop, "removed")), (None, None));
    // A database that says no: whoever asks the cache hears why.
    shop.change(&["ALTER TABLE prices RENAME TO costs"]);
    wait_for("a trouble is told", LONG, || said(&shop, "trouble").is_some_and(|trouble| trouble.contains("no table `prices`")));
    let mut ends = feed();
    ends["follows"] = json!([]);
    shop.scene.follow(&[ends]);
    wait_for("the cache is told", LONG, || said(&shop, "removed").as_deref() == Some("1"));
    let left = "SELECT ((SELECT count(*) FROM pg_replication_slots) + (SELECT count(*) FROM pg_publication))::text";
    assert_eq!((shop.value(left).as_str(), said(&shop, "position")), ("0", None));
    // A slot that somebody makes anew who has not heard of it goes as well.
    shop.change(&[&format!("SELECT pg_create_logical_replication_slot('{SLOT}', 'pgoutput')")]);
    wait_for("that slot goes, too", LONG, || shop.value(left) == "0");
    // And who follows again reads again.
    shop.change(&["ALTER TABLE costs RENAME TO prices"]);
    assert_eq!(shop.cached("user:1"), bulk("old"));
    shop.scene.follow(&[feed()]);
    shop.change(&["UPDATE users SET name = 'new' WHERE id = 1"]);
    shop.wait_to_see("user:1", Some("new"));
    wait_for("it is no longer said", LONG, || said(&shop, "removed").is_none());
    assert_eq!(shop.kept(&["TTL", STATE]), Value::Int(-1));
    drop(relays);
}

/// What is written through Larder stays in the cache, though the database tells of it like of any other change; what is made from the same row does
/// not.
#[test]
fn a_write_through_larder_does_not_remove_what_it_stored() {
    let servers = Servers::sentinel();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    let postgres = Postgres::start_logical();
    let url = runtime.block_on(postgres.database(&TABLES));
    let origins = [sql_origin("db", &url)];
    let store = json!({"write": "INSERT INTO users VALUES ($id, $value) ON CONFLICT (id) DO UPDATE SET name = $value"});
    let through = crate::write_through::rule("user", "db", "SELECT name FROM users WHERE id = $id", &store);
    let shout = rule("shout", "db", json!({"sql": {"read": "SELECT upper(name) FROM users WHERE id = $id"}}), json!({}));
    let mut scene = Scene::new(servers, &origins, &[through, shout]);
    let follow = |rule: &str| json!({"rule": rule, "table": "users", "touches": {"key": {}}});
    let mut both = feed();
    both["follows"] = json!([follow("user"), follow("shout")]);
    scene.follow(&[both]);
    let sidecar = Sidecar::start(&scene.snapshot);
    let relay = scene.relay();
    wait_for("a relay reads the database", LONG, || figure(&relay, "reading") == 1);
    let mut client = sidecar.client();
    let named = figure(&relay, "keys_total");
    let mut writes = 0_u64;
    // The walk of the beginning may still be under way, and take with it what is written first.
    wait_for("what is written stays cached", LONG, || {
        let read = figure(&relay, "transactions_total");
        assert!(!client.line("GET shout:1").is_error());
        assert_eq!(client.call(&["SET", "user:1", &format!("mine {writes}")]), Value::Simple("OK".to_owned()));
        writes += 1;
        wait_for("the change is read", LONG, || figure(&relay, "transactions_total") > read);
        wait_for("what else is made from the row goes", LONG, || {
            client.line("GET shout:1") == bulk(&format!("MINE {}", writes - 1))
        });
        scene.servers.holder_of("user:1").line("EXISTS user:1") == Value::Int(1)
    });
    assert_eq!(figure(&relay, "keys_total"), named + writes, "of the two keys one was named each time");
    // Somebody else's change of the same row is another matter.
    let database = url.rsplit('/').next().expect("a name");
    runtime.block_on(postgres.run(database, &["UPDATE users SET name = 'theirs' WHERE id = 1"]));
    wait_for("the change is seen", LONG, || client.line("GET user:1") == bulk("theirs"));
}

/// How long it took from each of so many commits, one after another, until the last of so many sidecars showed the new row; the shortest first.
/// `versioned`: what the snapshot says of the rule's versions.
pub fn from_commits(rounds: usize, sidecars: usize, versioned: Option<&str>) -> Vec<Duration> {
    let mut rules = rules();
    if let Some(versioned) = versioned {
        rules[0]["versioned"] = json!(versioned);
    }
    let shop = Shop::under(&rules, Servers::sentinel(), sidecars, |port| port);
    let _relay = shop.reading();
    let mut clients = shop.clients();
    let mut times: Vec<Duration> = Vec::new();
    for round in 0..rounds {
        let key = format!("user:{}", round % 20 + 1);
        for client in &mut clients {
            client.call(&["GET", &key]);
        }
        let name = format!("round {round}");
        shop.change(&[&format!("UPDATE users SET name = '{name}' WHERE id = {}", round % 20 + 1)]);
        let since = std::time::Instant::now();
        let wanted = bulk(&name);
        for client in &mut clients {
            while client.call(&["GET", &key]) != wanted {
                std::thread::sleep(Duration::from_micros(200));
            }
        }
        times.push(since.elapsed());
    }
    times.sort();
    times
}
