//! Versions that Larder keeps in the database.

use std::sync::Arc;
use std::time::Duration;

use serde_json::{Value as Json, json};
use sqlx::{ConnectOptions as _, Connection as _};
use tempfile::TempDir;

use super::sql::{mark, refused};
use super::{block, origin, rule, sidecar};
use crate::read_through::Servers;
use crate::support::postgres::Postgres;
use crate::support::resp::{Client, Value, encode};
use crate::support::sidecar::Sidecar;
use crate::support::wait_for;

const LIMIT: Duration = Duration::from_secs(60);
const READ: &str = "SELECT v FROM texts WHERE id = $id";
const TEXTS: &str = "CREATE TABLE texts (id text PRIMARY KEY, v text NOT NULL)";
const WRITE: &str = "INSERT INTO texts VALUES ($id, $value) ON CONFLICT (id) DO UPDATE SET v = excluded.v";
/// What begins with `slow` takes a while.
const SLOW: [&str; 2] = [
    "CREATE FUNCTION slow() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN \
     IF NEW.v LIKE 'slow%' THEN PERFORM pg_sleep(2); END IF; RETURN NEW; END $$",
    "CREATE TRIGGER slow BEFORE INSERT OR UPDATE ON texts FOR EACH ROW EXECUTE FUNCTION slow()",
];

fn ok() -> Value {
    Value::Simple("OK".to_owned())
}

fn bulk(text: &str) -> Value {
    Value::Bulk(text.as_bytes().to_vec())
}

/// What `write` says, with a version that Larder keeps.
fn kept(write: &str) -> Json {
    json!({"write": write, "delete": "DELETE FROM texts WHERE id = $id", "version": {"kept": {}}})
}

/// Rules whose versions Larder keeps, and none.
fn both(write: &str) -> [Json; 2] {
    [rule("kept", "db", READ, &kept(write)), rule("plain", "db", READ, &json!({"write": write}))]
}

/// Two sidecars before one database.
struct Shop {
    servers: Servers,
    postgres: Arc<Postgres>,
    database: String,
    sidecars: [Sidecar; 2],
}

impl Shop {
    fn open(tables: &[&str], rules: &[Json]) -> Self {
        let (servers, postgres) = (Servers::sentinel(), Postgres::shared());
        let url = block(postgres.database(tables));
        let database = url.rsplit('/').next().expect("a name").to_owned();
        let origins = [origin("db", &url, "20s")];
        let sidecars = [0, 1].map(|_| sidecar(&servers, &origins, rules));
        Self { servers, postgres, database, sidecars }
    }

    fn value(&self, query: &str) -> String {
        block(self.postgres.value(&self.database, query))
    }

    fn cached(&self, key: &str) -> Value {
        self.servers.holder_of(key).call(&["GET", key])
    }

    fn clients(&self) -> [Client; 2] {
        self.sidecars.each_ref().map(Sidecar::client)
    }

    /// How many transactions wait for a lock.
    fn waiting(&self) -> String {
        self.value("SELECT count(*)::text FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()")
    }
}

/// Two writes of `key` overlap, of which the first draws its version first and the second takes long.
fn overlap(shop: &Shop, key: &str) {
    let [mut first, mut second] = shop.clients();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    let url = shop.postgres.local_url(&shop.database);
    let lock = "BEGIN; LOCK TABLE texts IN ACCESS EXCLUSIVE MODE";
    let mut holder = runtime.block_on(async {
        let mut holder = sqlx::PgConnection::connect(&url).await.expect("connects");
        sqlx::raw_sql(lock).execute(&mut holder).await.expect(lock);
        holder
    });
    first.send(&encode(&["SET", key, "first"])).unwrap();
    wait_for("the first write to be at its statement", LIMIT, || shop.waiting() == "1");
    second.send(&encode(&["SET", key, "slow second"])).unwrap();
    wait_for("the second write to have begun", LIMIT, || shop.waiting() == "2");
    runtime.block_on(async { sqlx::raw_sql("COMMIT").execute(&mut holder).await.expect("commits") });
    assert_eq!([first.read().unwrap(), second.read().unwrap()], [ok(), ok()]);
}

#[test]
fn of_writes_that_overlap_the_last_to_be_committed_is_kept() {
    let shop = Shop::open(&[TEXTS, SLOW[0], SLOW[1]], &both(WRITE));
    overlap(&shop, "kept:1");
    assert_eq!(
        (shop.value("SELECT v FROM texts WHERE id = '1'").as_str(), shop.cached("kept:1")),
        ("slow second", bulk("slow second"))
    );
    overlap(&shop, "plain:2");
    assert_eq!(shop.cached("plain:2"), Value::Nil);
    let last = shop.value("SELECT v FROM texts WHERE id = '2'");
    assert_eq!(shop.clients()[0].line("GET plain:2"), bulk(&last));
    for key in ["kept:1", "plain:2"] {
        assert_eq!(shop.servers.holder_of(key).call(&["EXISTS", &mark(key)]), Value::Int(0));
    }
}

#[test]
fn of_writes_of_sqlite_that_overlap_the_last_to_be_committed_is_kept() {
    let directory = TempDir::new().expect("a temporary directory");
    let url = format!("sqlite://{}", directory.path().join("shop.db").display());
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    let mut holder = runtime.block_on(async {
        let options: sqlx::sqlite::SqliteConnectOptions = url.parse().expect("a URL");
        let mut connection = options.create_if_missing(true).connect().await.expect("a database");
        sqlx::raw_sql(TEXTS).execute(&mut connection).await.expect("a table");
        connection
    });
    // The first has told the cache long before the second is committed.
    let slow = "INSERT INTO texts (id, v) SELECT $id, $value WHERE (WITH RECURSIVE steps (n) AS \
                (SELECT 1 UNION ALL SELECT n + 1 FROM steps WHERE n < 200000) SELECT count(*) FROM steps) > 0 \
                ON CONFLICT (id) DO UPDATE SET v = excluded.v";
    let servers = Servers::sentinel();
    let sidecars = [0, 1].map(|_| sidecar(&servers, &[origin("db", &url, "20s")], &both(slow)));
    for key in ["kept:1", "plain:2"] {
        let [mut first, mut second] = sidecars.each_ref().map(Sidecar::client);
        runtime.block_on(async { sqlx::raw_sql("BEGIN IMMEDIATE").execute(&mut holder).await.expect("nobody writes") });
        first.send(&encode(&["SET", key, "one"])).unwrap();
        second.send(&encode(&["SET", key, "two"])).unwrap();
        // Each has a field, and a third tells that they overlap.
        wait_for("both writes to be under way", LIMIT, || servers.holder_of(key).call(&["HLEN", &mark(key)]) == Value::Int(3));
        runtime.block_on(async { sqlx::raw_sql("COMMIT").execute(&mut holder).await.expect("commits") });
        assert_eq!([first.read().unwrap(), second.read().unwrap()], [ok(), ok()]);
        let cached = servers.holder_of(key).call(&["GET", key]);
        let last: String = runtime.block_on(async {
            let query = sqlx::query_scalar("SELECT v FROM texts WHERE id = $1").bind(key.split_once(':').expect("a part").1);
            query.fetch_one(&mut holder).await.expect("a row")
        });
        assert_eq!(cached, if key == "kept:1" { bulk(&last) } else { Value::Nil }, "{key}");
        assert_eq!(first.call(&["GET", key]), bulk(&last));
    }
}

#[test]
fn versions_rise_for_all_that_is_written_and_survive_deletions() {
    let counts = "CREATE TABLE counts (id text PRIMARY KEY, n bigint NOT NULL)";
    let people = "CREATE TABLE people (id text PRIMARY KEY, name text NOT NULL)";
    let raise = "INSERT INTO counts VALUES ($id, $by) ON CONFLICT (id) DO UPDATE SET n = counts.n + $by RETURNING n";
    let count = json!({"write": "INSERT INTO counts VALUES ($id, $value::bigint)", "increment": raise, "version": {"kept": {}}});
    let name = "INSERT INTO people VALUES ($id, $value.name) ON CONFLICT (id) DO UPDATE SET name = excluded.name";
    let mut person =
        rule("person", "db", "SELECT name FROM people WHERE id = $id", &json!({"write": name, "version": {"kept": {}}}));
    *person.pointer_mut("/strategy/writeThrough/read/load/reply").expect("a rule that loads") = json!("Hash");
    let rules =
        [rule("kept", "db", READ, &kept(WRITE)), rule("count", "db", "SELECT n FROM counts WHERE id = $id", &count), person];
    let shop = Shop::open(&[TEXTS, counts, people], &rules);
    let [mut client, mut other] = shop.clients();
    let key = "kept:'); DROP TABLE larder_versions; --";
    assert_eq!((client.call(&["SET", key, "one"]), other.call(&["SET", key, "two"])), (ok(), ok()));
    assert_eq!(other.call(&["DEL", key]), Value::Int(1));
    let versions = || shop.value("SELECT string_agg(version::text, ',' ORDER BY version) FROM larder_versions");
    assert_eq!(versions(), "2", "a deletion draws none, and takes none away");
    assert_eq!((client.call(&["SET", key, "three"]), shop.cached(key)), (ok(), bulk("three")));
    assert_eq!(versions(), "3");
    assert_eq!((client.line("INCRBY count:1 41"), other.line("INCR count:1")), (Value::Int(41), Value::Int(42)));
    assert_eq!(shop.cached("count:1"), bulk("42"));
    assert_eq!(versions(), "2,3");
    assert_eq!(client.line("HSET person:1 name Ann"), Value::Int(1));
    assert_eq!(shop.servers.holder_of("person:1").line("HGET person:1 name"), bulk("Ann"));
    // What the origin refuses gives its version back.
    refused(&client.line("SET count:1 x"), &["ORIGIN", "nothing was written"]);
    assert_eq!(versions(), "1,2,3");
}

#[test]
fn commands_on_many_keys_take_their_versions_in_one_order() {
    let shop = Shop::open(&[TEXTS], &both(WRITE));
    // Two that wait for each other would do so until their time is over.
    let patient = format!("ALTER DATABASE {} SET deadlock_timeout = '5min'", shop.database);
    block(shop.postgres.run("postgres", &[&patient]));
    let keys: Vec<String> = (0..16).map(|at| format!("kept:{at}")).collect();
    std::thread::scope(|scope| {
        for (at, mut client) in shop.clients().into_iter().enumerate() {
            let mut keys = keys.clone();
            scope.spawn(move || {
                if at == 1 {
                    keys.reverse();
                }
                for round in 0..20 {
                    let value = format!("{at} {round}");
                    let pairs = keys.iter().flat_map(|key| [key.as_str(), &value]);
                    assert_eq!(client.call(&["MSET"].into_iter().chain(pairs).collect::<Vec<_>>()), ok());
                }
            });
        }
    });
    for key in &keys {
        let last = shop.value(&format!("SELECT v FROM texts WHERE id = '{}'", key.split_once(':').expect("a part").1));
        assert!([Value::Nil, bulk(&last)].contains(&shop.cached(key)), "{key}");
        assert_eq!(shop.clients()[0].call(&["GET", key]), bulk(&last));
    }
    assert_eq!(shop.value("SELECT (min(version) = 40 AND max(version) = 40)::text FROM larder_versions"), "true");
}

#[test]
fn a_login_that_may_not_keep_versions_is_told_what_to_run() {
    let (servers, postgres) = (Servers::sentinel(), Postgres::shared());
    let url = block(postgres.database(&["REVOKE ALL ON SCHEMA public FROM PUBLIC", TEXTS]));
    let database = url.rsplit('/').next().expect("a name");
    let login = format!("poor_{database}");
    let run = |statements: &[&str]| block(postgres.run(database, statements));
    run(&[
        &format!("CREATE ROLE {login} LOGIN PASSWORD 'secret'"),
        &format!("GRANT USAGE ON SCHEMA public TO {login}"),
        &format!("GRANT SELECT, INSERT, UPDATE, DELETE ON texts TO {login}"),
    ]);
    let origins = [origin("db", &url.replacen("postgres:secret", &format!("{login}:secret"), 1), "20s")];
    let sidecar = sidecar(&servers, &origins, &both(WRITE));
    let mut client = sidecar.client();
    let reply = client.line("SET kept:1 one");
    refused(
        &reply,
        &[
            "ORIGIN",
            "no table larder_versions",
            "permission denied",
            "let the login SELECT, INSERT and UPDATE",
            "nothing was written",
        ],
    );
    let Value::Error(text) = reply else { unreachable!("it was refused") };
    run(&[&text[text.find("CREATE TABLE").expect("there")..text.find(", and let").expect("there")]]);
    let grant = "GRANT SELECT, INSERT, UPDATE ON larder_versions TO ";
    refused(&client.line("SET kept:1 one"), &["permission denied", grant, "nothing was written"]);
    assert_eq!(block(postgres.value(database, "SELECT count(*)::text FROM texts")), "0");
    assert_eq!((client.line("SET plain:2 two"), client.line("DEL kept:2")), (ok(), Value::Int(1)), "these need none");
    run(&[&format!("{grant}{login}")]);
    assert_eq!((client.line("SET kept:1 one"), servers.holder_of("kept:1").line("GET kept:1")), (ok(), bulk("one")));
    // Somebody else's table of that name.
    run(&[
        "DROP TABLE larder_versions",
        "CREATE TABLE larder_versions (counter bigint, version bigint)",
        &format!("{grant}{login}"),
    ]);
    refused(&client.line("SET kept:1 two"), &["what Larder did not write", "drop it", "nothing was written"]);
}
