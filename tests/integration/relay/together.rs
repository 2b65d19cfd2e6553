//! One relay and Postgres.

use std::collections::BTreeMap;

use larder::journal::partition_of;
use larder::origin::Origins;
use larder::policy::Snapshot;
use larder::relay::rules::Rules;
use serde_json::Value as Json;

use super::{LONG, Scene, cluster, sentinel, sql_rule};
use crate::read_through::sql_origin;
use crate::support::postgres::Postgres;
use crate::support::wait_for;
use crate::write_through::block;

/// What a rule writes, and a line of history for each time that it is written.
pub const TABLES: [&str; 2] = [
    "CREATE TABLE users (id text PRIMARY KEY, name text NOT NULL CHECK (name <> 'poison'), row_version bigint NOT NULL)",
    "CREATE TABLE history (place bigserial PRIMARY KEY, id text NOT NULL, version bigint NOT NULL)",
];
pub const WRITE: &str = "WITH told AS (INSERT INTO history (id, version) VALUES ($id, $version)) \
     INSERT INTO users (id, name, row_version) VALUES ($id, $value, $version) \
     ON CONFLICT (id) DO UPDATE SET name = $value, row_version = $version WHERE users.row_version < $version";
pub const DELETE: &str = "DELETE FROM users WHERE id = $id";

/// A database with [`TABLES`], and its name.
pub fn database(server: &Postgres) -> (String, String) {
    let url = block(server.database(&TABLES));
    let name = url.rsplit('/').next().expect("a name").to_owned();
    (url, name)
}

pub fn rules() -> Vec<Json> {
    vec![sql_rule("users", "db", WRITE, DELETE)]
}

/// What the table has, by id.
pub fn rows(server: &Postgres, database: &str) -> BTreeMap<String, String> {
    let text = block(server.value(database, "SELECT coalesce(json_object_agg(id, name), '{}')::text FROM users"));
    serde_json::from_str(&text).expect("a JSON object of texts")
}

/// Writes that were made twice, and older ones of a key that were made after newer ones.
pub fn disorder(server: &Postgres, database: &str) -> Vec<String> {
    let of = |what: &str, query: &str| {
        let rows = format!("SELECT coalesce(json_agg(t)::text, '[]') FROM ({query}) t");
        let rows: Vec<Json> = serde_json::from_str(&block(server.value(database, &rows))).expect("rows");
        rows.into_iter().map(|row| format!("{what}: {row}")).collect::<Vec<_>>()
    };
    let twice = "SELECT id, version FROM history GROUP BY id, version HAVING count(*) > 1";
    let back = "SELECT * FROM (SELECT id, version, lag(version) OVER (PARTITION BY id ORDER BY place) AS before FROM history) AS lines \
                WHERE before > version";
    [of("made twice", twice), of("older over newer", back)].concat()
}

#[track_caller]
pub fn assert_in_order(server: &Postgres, database: &str) {
    assert_eq!(disorder(server, database), Vec::<String>::new());
}

#[test]
fn the_last_write_of_each_key_reaches_the_database() {
    for servers in [sentinel(), cluster()] {
        let server = Postgres::shared();
        let (url, database) = database(&server);
        let scene = Scene::new(servers, &[sql_origin("db", &url)], &rules());
        let mut last = BTreeMap::new();
        for n in 0..300 {
            let id = format!("id-{}", n % 20);
            let name = (n % 7 != 0).then(|| format!("name {n}"));
            scene.append(format!("users:{id}").as_bytes(), name.as_deref());
            last.insert(id, name);
        }
        let relay = scene.relay();
        scene.wait_until_drained();
        let expected: BTreeMap<_, _> = last.into_iter().filter_map(|(id, name)| Some((id, name?))).collect();
        assert_eq!(rows(&server, &database), expected);
        assert_eq!((scene.dirty(), scene.dead()), (0, 0));
        assert_in_order(&server, &database);
        wait_for("the figures are those of the end", LONG, || relay.figure("larder_relay_entries_total") == 300);
        assert_eq!(relay.figure("larder_relay_changes_total"), 20, "what a later write made needless is not told");
        assert!(relay.figure("larder_relay_tellings_total") <= 20, "{}", relay.figure("larder_relay_tellings_total"));
        wait_for("the levels are looked at again", LONG, || relay.figure("larder_journal_depth") == 0);
        assert_eq!(relay.figure("larder_relay_partitions"), 16);
        relay.stop();
        assert!(scene.holders().is_empty(), "who is told to stop gives up what he has");
    }
}

/// As many writes as a rule's `batch` says are told in one transaction, and no more.
#[test]
fn a_batch_has_as_many_writes_as_its_rule_says() {
    let server = Postgres::shared();
    let (url, database) = database(&server);
    let mut rules = rules();
    rules[0]["strategy"]["writeBehind"]["journal"]["batch"] = 5.into();
    let scene = Scene::new(sentinel(), &[sql_origin("db", &url)], &rules);
    for key in (0..).map(|n| format!("users:{n}")).filter(|key| partition_of(key.as_bytes()) == 0).take(40) {
        scene.append(key.as_bytes(), Some("one of forty"));
    }
    let relay = scene.relay();
    scene.wait_until_drained();
    assert_eq!(rows(&server, &database).len(), 40);
    let figures = || ["changes", "tellings", "batches"].map(|name| relay.figure(&format!("larder_relay_{name}_total")));
    wait_for("the figures are those of the end", LONG, || figures() == [40, 8, 8]);
    wait_for("nothing is older any more", LONG, || relay.figure("larder_journal_lag_milliseconds") == 0);
}

#[test]
fn the_snapshot_of_the_documentation_is_one() {
    let text = include_str!("../../../docs/relay.md");
    let json = text.split("```json").nth(1).and_then(|rest| rest.split("```").next()).expect("a block of JSON");
    let snapshot = Snapshot::parse(json.as_bytes()).expect("a snapshot");
    let rules = Rules::new(&snapshot, &Origins::new(&snapshot.origins).expect("origins")).expect("statements that fit");
    assert_eq!(rules.journals().map(ToString::to_string).collect::<Vec<_>>(), ["shop.users"]);
}

#[test]
fn hostile_keys_and_values_are_nothing_but_keys_and_values() {
    let server = Postgres::shared();
    let (url, database) = database(&server);
    let scene = Scene::new(sentinel(), &[sql_origin("db", &url)], &rules());
    let hostile = ["'; DROP TABLE users; --", "$value", "\\", "%00", "a\r\nXADD b", "é{1}}{", "\"quoted\"", "*1\r\n$4\r\nPING"];
    for text in hostile {
        scene.append(format!("users:{text}").as_bytes(), Some(text));
    }
    // None of these can be a text of Postgres.
    scene.append(b"users:\xff\xfe", Some("bytes"));
    scene.append(b"users:nul\0", Some("bytes"));
    scene.append(b"strange:1", Some("of no rule"));
    let _relay = scene.relay();
    scene.wait_until_drained();
    let expected: BTreeMap<_, _> = hostile.iter().map(|text| ((*text).to_owned(), (*text).to_owned())).collect();
    assert_eq!(rows(&server, &database), expected);
    assert_eq!((scene.dead(), scene.dirty()), (3, 3));
}

#[test]
fn an_outage_of_the_database_is_waited_for() {
    let mut server = Postgres::start();
    let (url, database) = database(&server);
    let scene = Scene::new(sentinel(), &[sql_origin("db", &url)], &rules());
    let relay = scene.relay();
    scene.append(b"users:1", Some("before"));
    scene.wait_until_drained();
    server.interrupt(|| {
        for n in 0..50 {
            scene.append(format!("users:{n}").as_bytes(), Some("during"));
        }
        wait_for("the relay has tried", LONG, || relay.figure("larder_relay_retries_total") > 0);
        assert_eq!((scene.depth(), scene.dead()), (50, 0));
    });
    scene.wait_until_drained();
    assert_eq!(rows(&server, &database).len(), 50);
    assert_eq!((scene.dead(), scene.dirty()), (0, 0));
    assert_in_order(&server, &database);
}

#[test]
fn what_a_rule_says_wrong_is_waited_for_until_it_is_mended() {
    let server = Postgres::shared();
    let (url, database) = database(&server);
    let origins = [sql_origin("db", &url)];
    let wrong = "INSERT INTO no_such_table (id, name) VALUES ($id, $value)";
    let mut scene = Scene::new(sentinel(), &origins, &[sql_rule("users", "db", wrong, DELETE)]);
    let relay = scene.relay();
    scene.append(b"users:1", Some("patient"));
    wait_for("the relay has tried", LONG, || relay.figure("larder_relay_retries_total") > 0);
    assert_eq!((scene.depth(), scene.dead()), (1, 0));
    scene.set_rules(&origins, &rules());
    scene.wait_until_drained();
    assert_eq!(rows(&server, &database), BTreeMap::from([("1".to_owned(), "patient".to_owned())]));
    assert!(relay.log().contains("no_such_table"), "{}", relay.log());
}
